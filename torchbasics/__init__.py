"""torchbasics: the foundation of a PyTorch project, on nothing but torch and torchvision."""

from torchbasics.checkpoint import (
    CheckpointError,
    CheckpointFolder,
    RunDirectory,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from torchbasics.data import (
    BatchOrder,
    CustomDataset,
    Images,
    RandomAffine,
    SeededImageFolder,
    TensorLoader,
    folder_loader,
    get_transforms,
    load_images,
    load_mnist,
    pad_collate,
    split_dataset,
)
from torchbasics.device import pick_device, pick_precision, set_seed
from torchbasics.digits import draw_digits
from torchbasics.early_stopping import EarlyStopping
from torchbasics.mnist import DataError
from torchbasics.models import (
    CNN,
    MLP,
    CustomLoss,
    EnsembleModel,
    MNISTNet,
    NeuralNetwork,
    SimpleNet,
    count_parameters,
    count_parameters_by_layer,
    freeze,
    init_weights,
    unfreeze,
)
from torchbasics.optim import (
    averaged_copy,
    make_optimizer,
    make_schedule,
    warmup_cosine_scheduler,
    warmup_lr_scheduler,
)
from torchbasics.trainer import (
    Interrupted,
    NonFiniteLoss,
    Trainer,
    compute_accuracy,
    evaluate,
    predict,
)

__version__ = "0.1.0"
__all__ = [name for name in dir() if not name.startswith("_") and name not in (
    "checkpoint", "data", "device", "digits", "distributed", "early_stopping", "mnist", "models", "optim", "trainer", "demo", "monitors")]
