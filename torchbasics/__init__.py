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
    load_splits,
    pad_collate,
    split_dataset,
)
from torchbasics.device import cache_cpu_memory, check_pytorch_environment, pick_device, pick_precision, set_seed
from torchbasics.digits import draw_digits
from torchbasics.early_stopping import EarlyStopping
from torchbasics.evaluation import compute_accuracy, evaluate, predict
from torchbasics.interrupts import Interrupted
from torchbasics.memory import MemoryTracker
from torchbasics.mnist import DataError
from torchbasics.models import (
    CNN,
    MLP,
    CustomLoss,
    EnsembleModel,
    FastNet,
    MNISTNet,
    NeuralNetwork,
    ShiftedViews,
    SimpleNet,
    SmallVGG,
    count_parameters,
    count_parameters_by_layer,
    freeze,
    init_weights,
    make_model,
    unfreeze,
)
from torchbasics.monitors import GradientMonitor
from torchbasics.nonfinite import check_nan_inf, trace_nonfinite
from torchbasics.optim import (
    averaged_copy,
    make_optimizer,
    make_schedule,
    warmup_cosine_scheduler,
    warmup_lr_scheduler,
)
from torchbasics.trainer import NonFiniteLoss, Trainer

__version__ = "0.1.0"
__all__ = [
    "CNN",
    "MLP",
    "BatchOrder",
    "CheckpointError",
    "CheckpointFolder",
    "CustomDataset",
    "CustomLoss",
    "DataError",
    "EarlyStopping",
    "EnsembleModel",
    "FastNet",
    "GradientMonitor",
    "Images",
    "Interrupted",
    "MNISTNet",
    "MemoryTracker",
    "NeuralNetwork",
    "NonFiniteLoss",
    "RandomAffine",
    "RunDirectory",
    "SeededImageFolder",
    "ShiftedViews",
    "SimpleNet",
    "SmallVGG",
    "TensorLoader",
    "Trainer",
    "averaged_copy",
    "cache_cpu_memory",
    "check_nan_inf",
    "check_pytorch_environment",
    "compute_accuracy",
    "count_parameters",
    "count_parameters_by_layer",
    "draw_digits",
    "evaluate",
    "folder_loader",
    "freeze",
    "get_transforms",
    "init_weights",
    "load_checkpoint",
    "load_images",
    "load_mnist",
    "load_splits",
    "load_weights",
    "make_model",
    "make_optimizer",
    "make_schedule",
    "pad_collate",
    "pick_device",
    "pick_precision",
    "predict",
    "save_checkpoint",
    "set_seed",
    "split_dataset",
    "trace_nonfinite",
    "unfreeze",
    "warmup_cosine_scheduler",
    "warmup_lr_scheduler",
]
