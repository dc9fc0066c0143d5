"""torchbasics: what people copy first when a PyTorch project begins, on torch and torchvision alone."""

from .checkpoint import CheckpointError, load_checkpoint, load_initial_weights, load_latest, save_checkpoint
from .data import (
    CustomDataset,
    Images,
    RandomAffine,
    TensorLoader,
    channel_statistics,
    get_transforms,
    load_images,
    load_mnist,
    load_splits,
    pad_collate,
    read_image,
    split_dataset,
)  # fmt: skip
from .device import cache_cpu_memory, check_pytorch_environment, device_name, pick_device, pick_precision, set_seed
from .digits import draw_digits
from .early_stopping import EarlyStopping
from .evaluation import compute_accuracy, evaluate, predict, predict_all
from .memory import MemoryTracker
from .mnist import DataError
from .models import (
    CNN,
    MLP,
    MODELS,
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
)  # fmt: skip
from .monitors import GradientMonitor, check_nan_inf, find_nonfinite
from .optim import averaged_copy, param_groups, warmup_cosine_scheduler, warmup_lr_scheduler
from .run import RunDirectory, saved_options
from .trainer import Interrupted, NonFiniteLoss, Trainer

__version__ = "0.2.0"
__all__ = [
    "CNN", "MLP", "MODELS", "CheckpointError", "CustomDataset", "CustomLoss", "DataError", "EarlyStopping",
    "EnsembleModel", "FastNet", "GradientMonitor", "Images", "Interrupted", "MNISTNet", "MemoryTracker",
    "NeuralNetwork", "NonFiniteLoss", "RandomAffine", "RunDirectory", "ShiftedViews", "SimpleNet", "SmallVGG",
    "TensorLoader", "Trainer", "averaged_copy", "cache_cpu_memory", "channel_statistics", "check_nan_inf",
    "check_pytorch_environment", "compute_accuracy", "count_parameters", "count_parameters_by_layer", "device_name",
    "draw_digits", "evaluate", "find_nonfinite", "freeze", "get_transforms", "init_weights", "load_checkpoint",
    "load_images", "load_initial_weights", "load_latest", "load_mnist", "load_splits", "make_model", "pad_collate",
    "param_groups", "pick_device", "pick_precision", "predict", "predict_all", "read_image", "save_checkpoint",
    "saved_options", "set_seed", "split_dataset", "unfreeze", "warmup_cosine_scheduler", "warmup_lr_scheduler",
]  # fmt: skip
