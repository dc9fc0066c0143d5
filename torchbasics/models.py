"""Small networks, simplest first, and helpers that count, initialise and freeze their parameters.

Every classifier returns logits of shape (B, num_classes); softmax belongs to the loss or to the prediction. This file
imports nothing but torch and can be copied away alone.

>>> model = SimpleNet()
>>> model(torch.zeros(2, 1, 28, 28)).shape
torch.Size([2, 10])
>>> count_parameters(model)
109386
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "CNN",
    "MLP",
    "CustomLoss",
    "EnsembleModel",
    "FastNet",
    "MNISTNet",
    "NeuralNetwork",
    "ShiftedViews",
    "SimpleNet",
    "SmallVGG",
    "count_parameters",
    "count_parameters_by_layer",
    "freeze",
    "init_weights",
    "make_model",
    "unfreeze",
]


class SimpleNet(nn.Module):
    """Linear layers with ReLU between them: the smallest classifier.

    Input: floats (B, input_size), or (B, ...) with input_size values per sample. Output: logits (B, num_classes).
    Raises ValueError if a size is not a positive integer, or if the input has another size or holds integers.
    """

    def __init__(self, input_size: int = 784, hidden_sizes: Sequence[int] = (128, 64), num_classes: int = 10) -> None:
        super().__init__()
        sizes = [input_size, *hidden_sizes]
        _check_sizes(input_size=input_size, num_classes=num_classes)
        for size in hidden_sizes:
            _check_sizes(hidden_sizes=size)
        self.input_size = input_size
        self.hidden = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))
        self.output = nn.Linear(sizes[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = _flat_features(x, self.input_size)  # (B, 784)
        for layer in self.hidden:
            x = F.relu(layer(x))  # (B, 128), (B, 64)
        return self.output(x)  # (B, 10)


class NeuralNetwork(nn.Module):
    """Two hidden layers of 30 and 20 units, written as one `nn.Sequential`.

    Input: floats (B, num_inputs). Output: logits (B, num_outputs). Raises ValueError like `SimpleNet`.
    """

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        _check_sizes(num_inputs=num_inputs, num_outputs=num_outputs)
        self.num_inputs = num_inputs
        self.layers = nn.Sequential(
            nn.Linear(num_inputs, 30),
            nn.ReLU(),
            nn.Linear(30, 20),
            nn.ReLU(),
            nn.Linear(20, num_outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(_flat_features(x, self.num_inputs))  # (B, num_outputs)


class MLP(nn.Module):
    """Two hidden layers, each followed by BatchNorm, ReLU and Dropout.

    Input: floats (B, input_dim); B must be at least 2 in training mode, because BatchNorm takes its statistics from the
    batch. Output: logits (B, output_dim). Raises ValueError like `SimpleNet`.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        _check_sizes(input_dim=input_dim, hidden_dim=hidden_dim, output_dim=output_dim)
        self.input_dim = input_dim
        self.layers = nn.Sequential(
            *_mlp_block(input_dim, hidden_dim, dropout),
            *_mlp_block(hidden_dim, hidden_dim, dropout),
            nn.Linear(hidden_dim, output_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(_flat_features(x, self.input_dim))  # (B, output_dim)


class CNN(nn.Module):
    """Two convolutions of 32 and 64 channels, each with BatchNorm, ReLU and pooling; then two linear layers.

    Input: floats (B, in_channels, image_size, image_size); `image_size`, in pixels, is a multiple of 4, because two
    poolings halve it. Output: logits (B, num_classes). Raises ValueError for other sizes or shapes and integer images.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28, dropout: float = 0.5) -> None:
        super().__init__()
        _check_image_model(num_classes, in_channels, image_size)
        self.in_channels, self.image_size = in_channels, image_size
        self.features = nn.Sequential(
            *_conv(in_channels, 32, pool=True),  # (B, 32, 14, 14)
            *_conv(32, 64, pool=True),  # (B, 64, 7, 7)
        )
        self.classifier = _classifier(64 * (image_size // 4) ** 2, 128, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        _check_images(x, self.in_channels, self.image_size)
        x = self.features(x)  # (B, 64, 7, 7)
        return self.classifier(x.flatten(1))  # (B, 3136) -> (B, 10)


class MNISTNet(nn.Module):
    """Two blocks of two convolutions (32, then 64 channels), then two linear layers; above 99% on MNIST.

    Input and errors as for `CNN`. Output: logits (B, num_classes). A block drops whole channels (Dropout2d), since
    neighbouring pixels of one channel say nearly the same. The weights start by the method of Kaiming He et al. (2015),
    which keeps the variance of the activations through ReLU layers.
    """

    def __init__(
        self, num_classes: int = 10, dropout: float = 0.25, in_channels: int = 1, image_size: int = 28
    ) -> None:
        super().__init__()
        _check_image_model(num_classes, in_channels, image_size)
        self.in_channels, self.image_size = in_channels, image_size
        self.block1 = _double_conv(in_channels, 32, dropout)
        self.block2 = _double_conv(32, 64, dropout)
        self.classifier = _classifier(64 * (image_size // 4) ** 2, 256, num_classes, dropout)
        self.apply(_kaiming)

    def forward(self, x: Tensor) -> Tensor:
        _check_images(x, self.in_channels, self.image_size)
        x = self.block1(x)  # (B, 32, 14, 14)
        x = self.block2(x)  # (B, 64, 7, 7)
        return self.classifier(x.flatten(1))  # (B, 3136) -> (B, 10)


class FastNet(nn.Module):
    """Two small convolutions and two linear layers: 99% on MNIST after a second of training.

    On a CPU a small convolution takes far longer than its arithmetic would, so there are only two, without padding. The
    first has a stride of 2 and is pooled at once, so that BatchNorm and ReLU have a quarter of the work. 207,130
    parameters by default. Input, output and errors as for `CNN`; `image_size` is at least 16.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        _check_image_model(num_classes, in_channels, image_size, smallest=16)
        self.in_channels, self.image_size = in_channels, image_size
        self.features = nn.Sequential(
            *_plain_conv(in_channels, 16, kernel=5, stride=2, pool=True),  # (B, 16, 6, 6)
            *_plain_conv(16, 48),  # (B, 48, 4, 4)
        )
        self.classifier = nn.Sequential(
            nn.Linear(48 * (image_size // 4 - 3) ** 2, 256, bias=False),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Linear(256, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        _check_images(x, self.in_channels, self.image_size)
        # in the order that channels_last has in memory: nothing is copied, which saves a tenth of a step
        x = self.features(x).permute(0, 2, 3, 1)  # (B, 4, 4, 48)
        return self.classifier(x.flatten(1))  # (B, 768) -> (B, 10)


class SmallVGG(nn.Module):
    """Five convolutions (16, 32, pool, 64, 64, pool, 128 channels) without padding, then one linear layer.

    After VGG (Simonyan and Zisserman, arXiv:1409.1556), with BatchNorm. As accurate on MNIST as MNISTNet in half of its
    time: few channels where images are large, many where they are small, and pooling before BatchNorm and ReLU, which
    then have a quarter of the work. `channels` are those of the five convolutions. `dropout` stands before the linear
    layer; half as often a block drops a whole channel. 139,514 parameters by default. Input, output and errors as for
    `CNN`; `image_size` is at least 24.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        dropout: float = 0.2,
        channels: Sequence[int] = (16, 32, 64, 64, 128),
    ) -> None:
        super().__init__()
        _check_image_model(num_classes, in_channels, image_size, smallest=24)
        if len(channels) != 5:
            raise ValueError(f"expected channels of five convolutions, got {tuple(channels)}")
        for number in channels:
            _check_sizes(channels=number)
        self.in_channels, self.image_size = in_channels, image_size
        a, b, c, d, e = channels
        self.features = nn.Sequential(
            *_plain_conv(in_channels, a),  # (B, 16, 26, 26)
            *_plain_conv(a, b, pool=True),  # (B, 32, 12, 12)
            nn.Dropout2d(dropout / 2),
            *_plain_conv(b, c),  # (B, 64, 10, 10)
            *_plain_conv(c, d, pool=True),  # (B, 64, 4, 4)
            nn.Dropout2d(dropout / 2),
            *_plain_conv(d, e),  # (B, 128, 2, 2)
            nn.Dropout2d(dropout / 2),
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(e * (image_size // 4 - 5) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        _check_images(x, self.in_channels, self.image_size)
        return self.classifier(self.dropout(self.features(x).flatten(1)))  # (B, 512) -> (B, 10)


MODELS = ("mnistnet", "cnn", "mlp", "simplenet", "fastnet", "smallvgg", "widevgg")


def make_model(
    name: str, num_classes: int = 10, in_channels: int = 1, image_size: int = 28, dropout: float = 0.2
) -> nn.Module:
    """Return the untrained classifier `name` (one of MODELS) for images of that many channels and pixels.

    `widevgg` is SmallVGG with 24, 48, 96, 192 and 192 channels; `mlp` has hidden layers of 256 units; `simplenet` and
    `fastnet` have no dropout. Raises ValueError for another name or bad sizes.
    """
    if name == "mnistnet":
        return MNISTNet(num_classes, dropout, in_channels, image_size)
    if name == "cnn":
        return CNN(num_classes, in_channels, image_size, dropout)
    if name == "mlp":
        return MLP(in_channels * image_size**2, 256, num_classes, dropout)
    if name == "simplenet":
        return SimpleNet(in_channels * image_size**2, num_classes=num_classes)
    if name == "fastnet":
        return FastNet(num_classes, in_channels, image_size)
    if name == "smallvgg":
        return SmallVGG(num_classes, in_channels, image_size, dropout)
    if name == "widevgg":
        return SmallVGG(num_classes, in_channels, image_size, dropout, channels=(24, 48, 96, 192, 192))
    raise ValueError(f"expected a model of {', '.join(MODELS)}, got {name!r}")


class EnsembleModel(nn.Module):
    """Average the *probabilities* of several classifiers that return logits of the same shape (B, num_classes).

    The output is the logarithm of the mean probability, (B, num_classes). It serves wherever logits do: `argmax` gives
    the class, `softmax` (or `exp`) the mean probability, and `CrossEntropyLoss` or `NLLLoss` its log-loss. Averaging
    probabilities instead of logits is the linear opinion pool; its log-loss is never above the members' mean log-loss.
    Raises ValueError without models, and if their numbers of classes differ.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        if len(self.models) == 0:
            raise ValueError("expected at least one model in the ensemble, got none")

    def forward(self, x: Tensor) -> Tensor:
        outputs = [model(x) for model in self.models]
        _check_same_classes(outputs)
        log_probabilities = torch.stack([output.log_softmax(-1) for output in outputs])  # (M, B, C)
        return log_probabilities.logsumexp(0) - math.log(len(outputs))  # (B, C)

    @classmethod
    def from_checkpoints(
        cls, build_model: Callable[[dict[str, Any]], nn.Module], checkpoints: Iterable[dict[str, Any]]
    ) -> EnsembleModel:
        """Build one member per loaded checkpoint, in evaluation mode.

        `build_model(checkpoint)` returns the untrained network for a checkpoint; its "model_state_dict" is then loaded.
        Raises ValueError, naming the checkpoint's position (from 0), if the key is missing or the weights do not fit.
        """
        models = []
        for position, checkpoint in enumerate(checkpoints):
            if "model_state_dict" not in checkpoint:
                raise ValueError(f"checkpoint {position}: expected a key 'model_state_dict', got {sorted(checkpoint)}")
            model = build_model(checkpoint)
            try:
                model.load_state_dict(checkpoint["model_state_dict"])
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"checkpoint {position} does not fit the model: {reason}") from error
            models.append(model)
        return cls(models).eval()


class ShiftedViews(nn.Module):
    """Test-time augmentation: the mean probability of a classifier over nine views of each image.

    A view is shifted by up to 1/28 of the size in each direction, with its edges repeated. Input: images (B, C, H, W);
    output: log-probabilities (B, num_classes), which serve wherever logits do, as those of `EnsembleModel`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        step = max(1, round(x.shape[-2] / 28))
        wide = F.pad(x, (step,) * 4, mode="replicate")
        corners = [(top, left) for top in (0, step, 2 * step) for left in (0, step, 2 * step)]
        views = (wide[..., top : top + x.shape[-2], left : left + x.shape[-1]] for top, left in corners)
        log_probabilities = torch.stack([self.model(view).log_softmax(-1) for view in views])  # (9, B, C)
        return log_probabilities.logsumexp(0) - math.log(9)


class CustomLoss(nn.Module):
    """Mean squared error plus `weight` times mean absolute error: a loss of one's own is a module like any other.

    Input and target have the same shape; the output is a scalar. Raises ValueError for a negative weight and for shapes
    that differ: (B, 1) against (B,) would broadcast to (B, B) without a word.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"expected weight >= 0, got {weight}")
        self.weight = weight

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.shape != target.shape:
            raise ValueError(
                f"expected input and target of one shape, got {tuple(input.shape)} and {tuple(target.shape)}"
            )
        return F.mse_loss(input, target) + self.weight * F.l1_loss(input, target)


def init_weights(module: nn.Module) -> None:
    """Initialise one layer by its kind. For a whole model: `model.apply(init_weights)`.

    Linear: Xavier uniform. Convolution: Kaiming normal for ReLU, fan-out. Embedding: normal(0, 0.02), its padding row
    zero. Norms: weight 1, bias 0. Biases: 0. Other modules stay as they are.
    Sources: Glorot & Bengio (2010), He et al. (2015), Radford et al. (2018); `torch.nn.init`.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, _CONVOLUTIONS):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
    elif isinstance(module, _NORMS):
        if module.weight is not None:
            nn.init.ones_(module.weight)
    else:
        return
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        nn.init.zeros_(bias)


def freeze(module: nn.Module) -> nn.Module:
    """Exclude all parameters of a module from training, and return it.

    BatchNorm layers still move their running statistics in training mode: also call `module.eval()` to hold those.
    """
    return module.requires_grad_(False)


def unfreeze(module: nn.Module) -> nn.Module:
    """Make all parameters of a module trainable again, and return it."""
    return module.requires_grad_(True)


def count_parameters(model: nn.Module, trainable_only: bool = True) -> int:
    """Return the number of parameter values, shared ones once; with `trainable_only=False` frozen ones too."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def count_parameters_by_layer(model: nn.Module, verbose: bool = True) -> dict[str, int]:
    """Return {layer name: number of parameter values}, frozen ones included, in the model's order.

    Shared parameters count once, at their first layer, so that the sum is `count_parameters(model, False)`. Parameters
    of the model itself stand under the name "". With `verbose` it prints a table with the sizes in FP32 and FP16; KB is
    1000 bytes. Buffers, such as BatchNorm's running statistics, are not counted.
    """
    counts: dict[str, int] = {}
    kinds: dict[str, str] = {}
    seen: set[Tensor] = set()
    for name, layer in model.named_modules():
        own = [p for p in layer.parameters(recurse=False) if p not in seen]
        if own:
            seen.update(own)
            counts[name] = sum(p.numel() for p in own)
            frozen = "" if any(p.requires_grad for p in own) else " (frozen)"
            kinds[name] = type(layer).__name__ + frozen
    if verbose:
        _print_table(counts, kinds)
    return counts


def _print_table(counts: Mapping[str, int], kinds: Mapping[str, str]) -> None:
    rows = [(name or "(model)", kinds[name], count) for name, count in counts.items()]
    rows.append(("total", "", sum(counts.values())))
    name_width = max(len("layer"), *(len(name) for name, _, _ in rows))
    kind_width = max(len("type"), *(len(kind) for _, kind, _ in rows))
    print(f"{'layer':<{name_width}}  {'type':<{kind_width}}  {'parameters':>12}  {'FP32 KB':>12}  {'FP16 KB':>12}")
    for name, kind, count in rows:
        sizes = f"{count * 4 / 1000:>12,.1f}  {count * 2 / 1000:>12,.1f}"
        print(f"{name:<{name_width}}  {kind:<{kind_width}}  {count:>12,}  {sizes}")


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _mlp_block(n: int, m: int, dropout: float) -> list[nn.Module]:
    return [nn.Linear(n, m), nn.BatchNorm1d(m), nn.ReLU(), nn.Dropout(dropout)]


def _conv(n: int, m: int, pool: bool = False) -> list[nn.Module]:
    """Convolution → BatchNorm → ReLU → pool; the last two give the same values in either order, this one is cheaper."""
    return [nn.Conv2d(n, m, 3, padding=1), nn.BatchNorm2d(m), *_pool(pool), nn.ReLU()]


def _plain_conv(n: int, m: int, kernel: int = 3, stride: int = 1, pool: bool = False) -> list[nn.Module]:
    """Convolution without padding → pool → BatchNorm → ReLU, which have less to do after the pool than before it."""
    conv = nn.Conv2d(n, m, kernel, stride, bias=False)  # BatchNorm would take a bias away again
    return [conv, *_pool(pool), nn.BatchNorm2d(m), nn.ReLU()]


def _pool(pool: bool) -> list[nn.Module]:
    return [nn.MaxPool2d(2)] if pool else []


def _double_conv(n: int, m: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(*_conv(n, m), *_conv(m, m, pool=True), nn.Dropout2d(dropout))


def _classifier(features: int, hidden: int, num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, num_classes))


def _kaiming(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"expected {name} to be a positive integer, got {size!r}")


def _check_image_model(num_classes: int, in_channels: int, image_size: int, smallest: int = 4) -> None:
    _check_sizes(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    if image_size % 4:
        raise ValueError(f"expected image_size to be a multiple of 4 (two poolings halve it), got {image_size}")
    if image_size < smallest:
        raise ValueError(
            f"expected image_size to be at least {smallest} (this network shrinks it to nothing), got {image_size}; "
            "take larger images, or mnistnet or cnn, which take smaller ones"
        )


# The checks read shapes and dtypes only, so they cost no device sync and leave a dynamic batch dynamic. `torch.fx.wrap`
# keeps them as one call in a symbolic trace; the deprecated `torch.jit.trace` would warn about each of them.


def _flat_features(x: Tensor, features: int) -> Tensor:
    _check_features(x, features)
    return x.flatten(1)


@torch.fx.wrap
def _check_features(x: Tensor, features: int) -> None:
    if torch.jit.is_tracing():
        return
    _check_floats(x)
    values = 1
    for size in x.shape[1:]:
        values *= size
    if x.ndim < 2 or values != features:
        raise ValueError(
            f"expected input of shape (B, {features}), or (B, ...) of {features} values each, got {list(x.shape)};"
            " a single sample needs a batch dimension: x.unsqueeze(0)"
        )


@torch.fx.wrap
def _check_images(x: Tensor, channels: int, size: int) -> None:
    if torch.jit.is_tracing():
        return
    _check_floats(x)
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] != size or x.shape[3] != size:
        raise ValueError(
            f"expected images of shape (B, {channels}, {size}, {size}), got {list(x.shape)};"
            " a single image needs a batch dimension: x.unsqueeze(0)"
        )


@torch.fx.wrap
def _check_floats(x: Tensor) -> None:
    if not (x.is_floating_point() or x.is_quantized):
        raise ValueError(f"expected floating-point input, got {x.dtype}; convert images of 0..255 with x.float() / 255")


@torch.fx.wrap
def _check_same_classes(outputs: list[Tensor]) -> None:
    if torch.jit.is_tracing():
        return
    for output in outputs:
        if output.shape[-1] != outputs[0].shape[-1]:
            raise ValueError(
                f"expected models with one number of classes, got {outputs[0].shape[-1]} and {output.shape[-1]}"
            )
