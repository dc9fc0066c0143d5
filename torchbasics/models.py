"""Small networks, simplest first, and helpers that count, initialise and freeze parameters.

Every classifier returns logits of shape (B, num_classes). Softmax belongs in the loss or in the prediction. This file
imports only torch and can be copied alone. The shape comments hold for the default arguments.

>>> model = SimpleNet()
>>> model(torch.zeros(2, 1, 28, 28)).shape
torch.Size([2, 10])
>>> count_parameters(model)
109386
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SimpleNet(nn.Module):
    """Linear layers with ReLU between them: the smallest classifier.

    Input: floats (B, ...) with `input_size` values per sample. Output: logits (B, num_classes). `hidden_sizes` are the
    widths of the hidden layers; one integer means one hidden layer.
    """

    def __init__(
        self, input_size: int = 784, hidden_sizes: int | Sequence[int] = (128, 64), num_classes: int = 10
    ) -> None:
        super().__init__()
        if isinstance(hidden_sizes, int):
            hidden_sizes = (hidden_sizes,)
        sizes = [input_size, *hidden_sizes]
        _check_sizes(*sizes, num_classes)
        self.hidden = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))
        self.output = nn.Linear(sizes[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)  # (B, 784)
        for layer in self.hidden:
            x = F.relu(layer(x))  # (B, 128), then (B, 64)
        return self.output(x)  # (B, 10)


class NeuralNetwork(nn.Module):
    """Two hidden layers of 30 and 20 units, written as one `nn.Sequential`.

    Input: floats (B, ...) with `num_inputs` values per sample. Output: logits (B, num_outputs).
    """

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        _check_sizes(num_inputs, num_outputs)
        self.layers = nn.Sequential(
            nn.Linear(num_inputs, 30), nn.ReLU(),
            nn.Linear(30, 20), nn.ReLU(),
            nn.Linear(20, num_outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))  # (B, num_inputs) -> (B, num_outputs)


class MLP(nn.Module):
    """Two hidden layers, each followed by BatchNorm, ReLU and Dropout.

    Input: floats (B, ...) with `input_dim` values per sample. In training mode B must be at least 2, because BatchNorm
    takes its statistics from the batch. Output: logits (B, output_dim).
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        _check_sizes(input_dim, hidden_dim, output_dim)
        self.layers = nn.Sequential(
            nn.Linear(input_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden_dim, output_dim),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))  # (B, input_dim) -> (B, output_dim)


class CNN(nn.Module):
    """Two convolutions of 32 and 64 channels, each with BatchNorm, ReLU and pooling, then two linear layers.

    Pooling comes before ReLU: the values are the same in either order, and ReLU has a quarter of the work. Input:
    floats (B, in_channels, image_size, image_size), `image_size` a multiple of 4. Output: logits (B, num_classes).
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28, dropout: float = 0.5) -> None:
        super().__init__()
        _check_image_model(num_classes, in_channels, image_size)
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.MaxPool2d(2), nn.ReLU(),  # (B, 32, 14, 14)
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.MaxPool2d(2), nn.ReLU(),  # (B, 64, 7, 7)
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(64 * (image_size // 4) ** 2, 128), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(128, num_classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # (B, 64, 7, 7)
        return self.classifier(x.flatten(1))  # (B, 3136) -> (B, 10)


class MNISTNet(nn.Module):
    """Two blocks of two convolutions (32, then 64 channels), then two linear layers: above 99% on MNIST.

    Each block ends by dropping whole channels (Dropout2d), because neighbouring pixels of a channel are nearly equal.
    The weights start as in He et al., "Delving Deep into Rectifiers" (2015, arXiv:1502.01852), which keeps the variance
    of activations through ReLU layers. Input and output are those of `CNN`.
    """

    def __init__(
        self, num_classes: int = 10, dropout: float = 0.25, in_channels: int = 1, image_size: int = 28
    ) -> None:
        super().__init__()
        _check_image_model(num_classes, in_channels, image_size)
        self.block1 = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.MaxPool2d(2), nn.ReLU(),
            nn.Dropout2d(dropout),
        )  # fmt: skip
        self.block2 = nn.Sequential(
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.MaxPool2d(2), nn.ReLU(),
            nn.Dropout2d(dropout),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(64 * (image_size // 4) ** 2, 256), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(256, num_classes),
        )  # fmt: skip
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(x)  # (B, 32, 14, 14)
        x = self.block2(x)  # (B, 64, 7, 7)
        return self.classifier(x.flatten(1))  # (B, 3136) -> (B, 10)


class FastNet(nn.Module):
    """Two small convolutions and two linear layers: 99% on MNIST after a second of training.

    On a CPU a small convolution takes far longer than its arithmetic would, so there are only two. The first has a
    stride of 2 and is pooled at once, so that BatchNorm and ReLU have a quarter of the work. Input and output are those
    of `CNN`; `image_size` is at least 16.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        _check_image_model(num_classes, in_channels, image_size, smallest=16)
        # no bias before BatchNorm, which would subtract it again
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 16, 5, stride=2, bias=False),  # (B, 16, 12, 12)
            nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(),  # (B, 16, 6, 6)
            nn.Conv2d(16, 48, 3, bias=False), nn.BatchNorm2d(48), nn.ReLU(),  # (B, 48, 4, 4)
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(48 * (image_size // 4 - 3) ** 2, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU(),
            nn.Linear(256, num_classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # (B, 48, 4, 4)
        x = x.permute(0, 2, 3, 1)  # (B, 4, 4, 48): the order of channels_last in memory, so that flatten copies nothing
        return self.classifier(x.flatten(1))  # (B, 768) -> (B, 10)


class SmallVGG(nn.Module):
    """Five convolutions without padding, two poolings, then one linear layer.

    After VGG (Simonyan and Zisserman, 2014, arXiv:1409.1556), with BatchNorm. A step takes a third of MNISTNet's time,
    since it has few channels where images are large and many where they are small. `channels` are those of the five
    convolutions. `dropout` is the rate before the linear layer; half that rate drops whole channels. Input and
    output are those of `CNN`; `image_size` is at least 24.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28, dropout: float = 0.2,
        channels: Sequence[int] = (8, 16, 32, 64, 128),
    ) -> None:  # fmt: skip
        super().__init__()
        _check_image_model(num_classes, in_channels, image_size, smallest=24)
        c1, c2, c3, c4, c5 = channels
        # no bias before BatchNorm, which would subtract it again
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, c1, 3, bias=False), nn.BatchNorm2d(c1), nn.ReLU(),  # (B, 8, 26, 26)
            nn.Conv2d(c1, c2, 3, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(c2), nn.ReLU(),  # (B, 16, 12, 12)
            nn.Dropout2d(dropout / 2),
            nn.Conv2d(c2, c3, 3, bias=False), nn.BatchNorm2d(c3), nn.ReLU(),  # (B, 32, 10, 10)
            nn.Conv2d(c3, c4, 3, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(c4), nn.ReLU(),  # (B, 64, 4, 4)
            nn.Dropout2d(dropout / 2),
            nn.Conv2d(c4, c5, 3, bias=False), nn.BatchNorm2d(c5), nn.ReLU(),  # (B, 128, 2, 2)
            nn.Dropout2d(dropout / 2),
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(c5 * (image_size // 4 - 5) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # (B, 128, 2, 2)
        return self.classifier(self.dropout(x.flatten(1)))  # (B, 512) -> (B, 10)


MODELS = ("mnistnet", "cnn", "mlp", "simplenet", "fastnet", "smallvgg", "widevgg")


def make_model(config: Mapping[str, Any]) -> nn.Module:
    """Return the untrained classifier that `config`, such as the metadata of a checkpoint, describes.

    `config["model"]` is one of MODELS. "num_classes" (10), "in_channels" (1), "image_size" (28) and "dropout" (the
    model's own) may be absent; other keys are ignored. `mlp` has hidden layers of 256 units; `widevgg` is a SmallVGG of
    24, 48, 96, 192 and 192 channels; `simplenet` and `fastnet` have no dropout.

    Raises ValueError for an unknown model and for sizes that it cannot have.
    """
    name = config.get("model")
    in_channels, image_size = config.get("in_channels", 1), config.get("image_size", 28)
    sizes = {"num_classes": config.get("num_classes", 10), "in_channels": in_channels, "image_size": image_size}
    dropout = {"dropout": config["dropout"]} if "dropout" in config else {}
    if name == "mnistnet":
        return MNISTNet(**sizes, **dropout)
    if name == "cnn":
        return CNN(**sizes, **dropout)
    if name == "mlp":
        return MLP(in_channels * image_size**2, 256, sizes["num_classes"], **dropout)
    if name == "simplenet":
        return SimpleNet(in_channels * image_size**2, num_classes=sizes["num_classes"])
    if name == "fastnet":
        return FastNet(**sizes)
    if name == "smallvgg":
        return SmallVGG(**sizes, **dropout)
    if name == "widevgg":
        return SmallVGG(**sizes, **dropout, channels=(24, 48, 96, 192, 192))
    raise ValueError(f"expected a model of {', '.join(MODELS)}, got {name!r}")


class EnsembleModel(nn.Module):
    """Average the predictions of several models.

    For classifiers, whose logits have shape (B, C) with C >= 2, the output is the logarithm of the mean probability,
    (B, C), which serves wherever logits do. For outputs of any other shape, as in regression, it is their mean.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return _mean_prediction([model(x) for model in self.models])


class ShiftedViews(nn.Module):
    """Average the predictions of a model over nine views of each image: test-time augmentation.

    A view is shifted by up to 1/28 of the height in each direction, its edge pixels repeated. Input: images
    (B, C, H, W). The output is the mean of the nine predictions as in `EnsembleModel`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        step = max(1, round(height / 28))
        padded = F.pad(x, (step,) * 4, mode="replicate")  # (B, C, H + 2 * step, W + 2 * step)
        starts = (0, step, 2 * step)
        views = [padded[..., top : top + height, left : left + width] for top in starts for left in starts]
        return _mean_prediction([self.model(view) for view in views])


class CustomLoss(nn.Module):
    """Compute the mean squared error plus `weight` times the mean absolute error: a loss is a module like any other.

    The output is a scalar. Raises ValueError for shapes that differ, because (B, 1) and (B,) would broadcast to (B, B).
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.shape != target.shape:
            raise ValueError(f"expected equal shapes, got input {tuple(input.shape)} and target {tuple(target.shape)}")
        return F.mse_loss(input, target) + self.weight * F.l1_loss(input, target)


def init_weights(module: nn.Module) -> None:
    """Initialise one layer by its kind. For a whole model: `model.apply(init_weights)`.

    Linear: Xavier uniform (Glorot and Bengio, 2010). Convolution: Kaiming normal for ReLU, fan-out (He et al., 2015).
    Embedding: normal(0, 0.02) (Radford et al., 2018), its padding row zero. Norms: weight 1. Biases: 0. Other modules
    stay as they are. A weight that is computed from other parameters (`torch.nn.utils.parametrizations`, pruning) stays
    too, with a warning.
    """
    if not isinstance(module, (nn.Linear, nn.Embedding, *_CONVOLUTIONS, *_NORMS)):
        return
    weight, bias = module.weight, getattr(module, "bias", None)
    if isinstance(bias, nn.Parameter):
        nn.init.zeros_(bias)
    if weight is None:  # a norm without affine parameters
        return
    if not isinstance(weight, nn.Parameter):
        kind = type(module).__name__
        warnings.warn(f"init_weights left the weight of a {kind}: it is computed from other parameters", stacklevel=2)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(weight)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(weight, 0.0, 0.02)
        if module.padding_idx is not None:
            nn.init.zeros_(weight[module.padding_idx])
    elif isinstance(module, _CONVOLUTIONS):
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    else:
        nn.init.ones_(weight)


def freeze(module: nn.Module) -> nn.Module:
    """Exclude all parameters of a module from training, and return the module.

    BatchNorm layers still update their running statistics in training mode. Call `module.eval()` to stop that too.
    """
    return module.requires_grad_(False)


def unfreeze(module: nn.Module) -> nn.Module:
    """Make all parameters of a module trainable again, and return the module."""
    return module.requires_grad_(True)


def count_parameters(model: nn.Module, trainable_only: bool = True) -> int:
    """Return the number of parameter values; `trainable_only=False` includes frozen ones. Shared ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def count_parameters_by_layer(model: nn.Module, verbose: bool = True) -> dict[str, int]:
    """Return {layer name: number of parameter values}, frozen ones included, in the model's order.

    Shared parameters count at their first layer, so that the sum is `count_parameters(model, False)`. Parameters that
    belong to the model itself have the name "". `verbose` prints a table, with sizes in KB of 1000 bytes.
    """
    layers: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():  # each once
        layers.setdefault(name.rpartition(".")[0], []).append(parameter)
    counts = {layer: sum(p.numel() for p in own) for layer, own in layers.items()}
    if verbose:
        rows = []  # (layer, type, parameters)
        for layer, own in layers.items():
            frozen = "" if any(p.requires_grad for p in own) else " (frozen)"
            rows.append((layer or "(model)", type(model.get_submodule(layer)).__name__ + frozen, counts[layer]))
        rows.append(("total", "", sum(counts.values())))
        name_width = max(5, *(len(name) for name, _, _ in rows))
        kind_width = max(4, *(len(kind) for _, kind, _ in rows))
        print(f"{'layer':<{name_width}}  {'type':<{kind_width}}  {'parameters':>12}  {'FP32 KB':>12}  {'FP16 KB':>12}")
        for name, kind, count in rows:
            sizes = f"{count * 4 / 1000:>12,.1f}  {count * 2 / 1000:>12,.1f}"
            print(f"{name:<{name_width}}  {kind:<{kind_width}}  {count:>12,}  {sizes}")
    return counts


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _mean_prediction(predictions: list[Tensor]) -> Tensor:
    """Return the log of the mean probability of logits (B, C) with C >= 2, and the mean of any other outputs."""
    outputs = torch.stack(predictions)  # (M, B, C), or (M, ...)
    if outputs.ndim == 3 and outputs.shape[2] >= 2:
        return outputs.log_softmax(-1).logsumexp(0) - math.log(len(predictions))  # (B, C)
    return outputs.mean(0)


def _check_sizes(*sizes: int) -> None:
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"expected sizes to be positive integers, got {', '.join(map(repr, sizes))}")


def _check_image_model(num_classes: int, in_channels: int, image_size: int, smallest: int = 4) -> None:
    _check_sizes(num_classes, in_channels, image_size)
    if image_size % 4 or image_size < smallest:
        raise ValueError(f"expected image_size to be a multiple of 4 and at least {smallest}, got {image_size}")
