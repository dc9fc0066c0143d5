"""Judge a model: mean loss and accuracy over a loader, its outputs, and the class of one image.

`Trainer` counts by the same functions, so that training and `evaluate` report the same figures.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .device import autocast, preserved_random_state


class Figure(NamedTuple):
    """What a batch adds to the mean of that name: the sum of value * factor over all batches by that of the weights."""

    name: str
    value: Tensor | float
    factor: float
    weight: Tensor | float


def evaluate(
    model: nn.Module,
    loader: Iterable,
    criterion: Callable[[Any, Any], Tensor],
    device: torch.device | str | None = None,
    *,
    precision: str = "fp32",
) -> tuple[float, float | None]:
    """Return (mean loss, accuracy or None) of `model` over `loader`, whose batches are pairs (inputs, targets).

    The accuracy, between 0 and 1, is None unless `criterion` is CrossEntropyLoss or NLLLoss and the outputs are scores
    (N, C, ...) for class targets (N, ...). Move the model to `device` (default: leave it); change no weight, mode or
    random state. Raise ValueError if no target counts.
    """
    place = torch.device(device) if device is not None else model_device(model)
    model.to(place)
    if isinstance(criterion, nn.Module):
        criterion.to(place)
    means = Means()
    with torch.no_grad(), evaluation_mode(model), preserved_random_state(place):
        for batch in loader:
            count = count_targets(batch, criterion)
            if count:
                inputs, targets = to_device(batch, place)
                with autocast(place, precision):
                    outputs = in_float32(model(inputs))
                    loss = criterion(outputs, targets)
                loss_figure = Figure("loss", loss.reshape(()), factor=count, weight=count)
                means.add([loss_figure, *accuracy_figures(criterion, outputs, targets)])
    means.read()
    values = means.values()
    if "loss" not in values:
        raise ValueError("the loader gave no target that counts; an iterator can be read only once")
    return values["loss"], values.get("acc")


def compute_accuracy(model: nn.Module, loader: Iterable, device: torch.device | str | None = None) -> float:
    """Return the share of targets, between 0 and 1, whose class `model` ranks first. Targets of -100 do not count.

    Raise ValueError unless the outputs are (N, C, ...) for class targets (N, ...).
    """
    place = torch.device(device) if device is not None else model_device(model)
    model.to(place)
    means = Means()
    with torch.no_grad(), evaluation_mode(model), preserved_random_state(place):
        for batch in loader:
            inputs, targets = to_device(batch, place)
            outputs = model(inputs)
            if not are_class_scores(outputs, targets):
                raise ValueError("accuracy needs outputs (N, C, ...) and integer class targets (N, ...)")
            means.add(accuracy_figures(nn.CrossEntropyLoss(), outputs, targets))
    means.read()
    return means.values().get("acc", math.nan)


def predict(model: nn.Module, image: Tensor, device: torch.device | str | None = None) -> tuple[Any, Any]:
    """Return (class, confidence) of an image (C, H, W) as (int, float), of a batch (B, C, H, W) as tensors (B,)."""
    if image.dim() not in (3, 4):
        raise ValueError(f"expected an image (C, H, W) or a batch (B, C, H, W), got shape {tuple(image.shape)}")
    place = torch.device(device) if device is not None else model_device(model)
    model.to(place)
    batch = image if image.dim() == 4 else image.unsqueeze(0)
    with torch.no_grad(), evaluation_mode(model):
        confidences, classes = model(batch.to(place)).softmax(1).max(1)  # (B,), (B,)
    return (classes.cpu(), confidences.cpu()) if image.dim() == 4 else (int(classes), float(confidences))


def predict_all(
    model: nn.Module, loader: Iterable, device: torch.device | str | None = None, *, precision: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """Return (outputs, targets) of all batches (inputs, targets) of `loader`, on the CPU. Batches must be such pairs.

    Outputs are float32 (N, ...). Change no weight, mode or random state. Raise ValueError for an empty loader.
    """
    place = torch.device(device) if device is not None else model_device(model)
    model.to(place)
    outputs, targets = [], []
    with torch.no_grad(), evaluation_mode(model), preserved_random_state(place), autocast(place, precision):
        for batch_inputs, batch_targets in loader:
            outputs.append(model(to_device(batch_inputs, place)).float())
            targets.append(batch_targets)
    if not outputs:
        raise ValueError("the loader gave no batch")
    return torch.cat(outputs).cpu(), torch.cat(targets).cpu()


class Means:
    """Weighted means by name. Values wait on their device until `read`, so that adding never waits for it."""

    def __init__(self, sums: Mapping[str, list[float]] | None = None) -> None:
        self.sums = {name: list(pair) for name, pair in (sums or {}).items()}  # name: [weighted sum, weight]
        self.waiting: list[list[Figure]] = []

    def add(self, figures: list[Figure]) -> None:
        """Add the figures of one batch."""
        self.waiting.append(figures)

    def read(self) -> list[float]:
        """Add up what is waiting, in the order of the batches; return the losses among it, 0 where nothing counted.

        The sums are Python numbers (float64), so the result does not depend on when they are read.
        """
        tensors = [part for batch in self.waiting for figure in batch for part in (figure.value, figure.weight)]
        numbers = iter(fetch(tensors))
        losses = []
        for name, _, factor, _ in itertools.chain.from_iterable(self.waiting):
            value, weight = next(numbers), next(numbers)
            pair = self.sums.setdefault(name, [0.0, 0.0])
            if weight:  # a weight of 0 adds nothing, whatever the value
                pair[0] += value * factor
                pair[1] += weight
            if name == "loss":
                losses.append(value if weight else 0.0)
        self.waiting = []
        return losses

    def values(self) -> dict[str, float]:
        """Return the means of what was read, NaN where nothing counted."""
        return {name: total / weight if weight else math.nan for name, (total, weight) in self.sums.items()}

    @staticmethod
    def sum_of(parts: Iterable[Mapping[str, list[float]]]) -> Means:
        """Return the means over several processes, from their `sums`."""
        parts = list(parts)
        names = dict.fromkeys(name for part in parts for name in part)
        pairs = {name: [part[name] for part in parts if name in part] for name in names}
        return Means({name: [math.fsum(column) for column in zip(*rows, strict=True)] for name, rows in pairs.items()})


def fetch(values: list[Any]) -> list[float]:
    """Return numbers and 0-d tensors as numbers, with one transfer from an accelerator."""
    remote = [value for value in values if isinstance(value, Tensor) and value.device.type != "cpu"]
    if remote:
        dtype = torch.float32 if remote[0].device.type == "mps" else torch.float64
        numbers = iter(torch.stack([value.to(dtype) for value in remote]).tolist())
        values = [next(numbers) if isinstance(v, Tensor) and v.device.type != "cpu" else v for v in values]
    return [value.item() if isinstance(value, Tensor) else value for value in values]


def count_targets(batch: Any, criterion: Any = None, class_weight: Tensor | None = None) -> float:
    """Return how many terms the mean loss of `batch` has: its targets for a classification loss, else its samples.

    For a pair (inputs, class targets) under CrossEntropyLoss or NLLLoss these are the targets that are not ignored,
    times their class weights. `class_weight` is the criterion's weight on the targets' device.
    """
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if pair and is_classification(criterion) and isinstance(batch[1], Tensor):
        return float(count_classes(batch[1], criterion, class_weight))
    return float(len(first_tensor(batch)))


def count_classes(targets: Tensor, criterion: Any, class_weight: Tensor | None = None) -> Tensor:
    """Return the denominator of CrossEntropyLoss and NLLLoss. Targets are classes (N, ...) or shares (N, C, ...)."""
    if targets.is_floating_point():
        return torch.tensor(targets.numel() / targets.shape[1])
    kept = targets != criterion.ignore_index
    if criterion.weight is None:
        return kept.sum()
    weight = criterion.weight.to(targets.device) if class_weight is None else class_weight
    return weight[targets[kept]].sum()


def is_classification(criterion: Any) -> bool:
    """Return whether `criterion` is CrossEntropyLoss or NLLLoss, whose targets are classes."""
    return isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss))


def are_class_scores(outputs: Any, targets: Any) -> bool:
    """Return whether these are scores (N, C, ...) and integer class targets (N, ...)."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)) or outputs.dim() < 2:
        return False
    return not targets.is_floating_point() and outputs.shape[:1] + outputs.shape[2:] == targets.shape


def accuracy_figures(criterion: Any, outputs: Any, targets: Any, count: float | None = None) -> list[Figure]:
    """Return the figure "acc", correct targets of those that count, for a classification loss and class scores.

    `count` is the number of targets that are not ignored, if it is known already.
    """
    if not (is_classification(criterion) and are_class_scores(outputs, targets)):
        return []
    correct = outputs.argmax(1) == targets
    if criterion.ignore_index >= 0:  # an ignored target below 0 is never predicted
        correct &= targets != criterion.ignore_index
    counted = (targets != criterion.ignore_index).sum() if count is None else count
    return [Figure("acc", correct.sum(), factor=1.0, weight=counted)]


def in_float32(outputs: Any) -> Any:
    """Return half-precision outputs in float32, since losses are sums of exponentials; return others as they are."""
    if isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16):
        return outputs.float()
    return outputs


def to_device(value: Any, device: torch.device) -> Any:
    """Return `value` with everything in it that can move on `device`; keep the kinds of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=device.type == "cuda")  # on MPS it would corrupt (pytorch#139550)
    if hasattr(value, "to"):  # PackedSequence, a graph of torch_geometric
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [to_device(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a nest of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(part)


def first_tensor(value: Any) -> Tensor:
    """Return the first tensor with a dimension in a nest of tuples, lists and mappings; ValueError if there is none."""
    for tensor in tensors(value):
        if tensor.dim():
            return tensor
    raise ValueError("the batch holds no tensor with a dimension for the samples; override count_targets")


def length(value: Any) -> int | None:
    """Return the length of a loader or data set; None if it has none, as a DataLoader over an IterableDataset."""
    try:
        return len(value)
    except TypeError:
        return None


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # parents first; by train(), which some modules override
            if module.training != training:
                module.train(training)


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer; the CPU if it has none."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return first.device if first is not None else torch.device("cpu")
