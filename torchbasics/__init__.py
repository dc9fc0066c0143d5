"""torchbasics: what people copy first when a PyTorch project begins, on torch and torchvision alone."""

# While the package is being rewritten, names are resolved lazily, so that each module can be worked on alone.
import importlib

__version__ = "0.2.0"
_PUBLIC = {
    "checkpoint": "CheckpointError load_checkpoint load_latest save_checkpoint",
    "data": "CustomDataset DataError channel_statistics RandomAffine TensorLoader get_transforms load_images load_mnist load_splits pad_collate read_image split_dataset",
    "device": "device_name cache_cpu_memory check_pytorch_environment pick_device pick_precision set_seed",
    "digits": "draw_digits",
    "early_stopping": "EarlyStopping",
    "evaluation": "compute_accuracy evaluate predict predict_all",
    "memory": "MemoryTracker",
    "models": "CNN MLP MODELS CustomLoss EnsembleModel FastNet MNISTNet NeuralNetwork ShiftedViews SimpleNet SmallVGG count_parameters count_parameters_by_layer freeze init_weights make_model unfreeze",
    "monitors": "GradientMonitor check_nan_inf find_nonfinite",
    "optim": "averaged_copy param_groups warmup_cosine_scheduler warmup_lr_scheduler",
    "run": "RunDirectory",
    "trainer": "Interrupted NonFiniteLoss Trainer",
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names.split()}


def __getattr__(name):
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(name)
