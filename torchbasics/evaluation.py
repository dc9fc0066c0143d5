"""Judging a model: means per sample over a loader, accuracy, the outputs themselves, and the class of one image."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchbasics import distributed
from torchbasics.device import autocast, preserved_random_state
from torchbasics.position import preserved_generators

SUMS = ("loss_sum", "samples", "correct", "predictions")


class BatchResult(NamedTuple):
    """What one batch adds to the means; the tensors stay on the device until they are read."""

    loss: Tensor  # mean over the batch, of one element
    correct: Tensor | None  # of each sample: its number of right classes, (B,); None where targets are not classes
    ignored: Tensor | None  # of each sample: how many of its targets the criterion ignores, (B,); None: it ignores none
    predictions: int  # those of ignored targets too
    samples: int


class RunningMeans:
    """Means per sample. What comes from the device waits in `pending`, and is read in one transfer.

    Sums are taken in float64 on the host, batch after batch in their order: so it doesn't matter when they are read.
    """

    def __init__(self, loss_sum: float = 0.0, samples: int = 0, correct: int = 0, predictions: int = 0) -> None:
        self.loss_sum, self.samples, self.correct, self.predictions = loss_sum, samples, correct, predictions
        self.pending: list[BatchResult] = []

    def add(self, results: Iterable[BatchResult]) -> None:
        """Takes the results of further batches."""
        self.pending += results

    def read(self) -> tuple[float, int] | None:
        """Adds up what is pending; returns the first non-finite loss and how many batches ago it was, or None."""
        if not self.pending:
            return None
        wide = torch.float32 if self.pending[0].loss.device.type == "mps" else torch.float64
        losses = torch.stack([result.loss for result in self.pending]).to(wide)
        counts = (_sum([getattr(result, name) for result in self.pending], losses) for name in ("correct", "ignored"))
        *values, correct, ignored = torch.cat([losses, *counts]).tolist()
        bad = next(((loss, len(values) - i) for i, loss in enumerate(values) if not math.isfinite(loss)), None)
        self.correct += int(correct)
        self.predictions -= int(ignored)
        for loss, result in zip(values, self.pending, strict=True):
            self.loss_sum += loss * result.samples
            self.samples += result.samples
            self.predictions += result.predictions
        self.pending.clear()
        return bad

    def means(self) -> tuple[float, float | None]:
        """(Mean loss, accuracy or None); ValueError if there was no sample."""
        if not self.samples:
            raise ValueError("no sample was counted: the loader gave no batch, or every step was skipped")
        return self.loss_sum / self.samples, self.correct / self.predictions if self.predictions else None

    def state_dict(self) -> dict[str, Any]:
        """The sums so far; the arguments of another RunningMeans that goes on from them."""
        return {name: getattr(self, name) for name in SUMS}

    @staticmethod
    def sum_of(states: Sequence[dict[str, Any]]) -> RunningMeans:
        """The means of several processes' samples, from their `state_dict`s."""
        return RunningMeans(**{name: sum(state[name] for state in states) for name in SUMS})

    def reduced(self) -> RunningMeans:
        """The means of all processes' samples; this one's own where there is one process."""
        every = distributed.all_gather([getattr(self, name) for name in SUMS])
        loss_sum, *counts = (math.fsum(parts) for parts in zip(*every, strict=True))
        return RunningMeans(loss_sum, *(int(count) for count in counts))


def _sum(parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """The sum of all entries of those `parts` (n,) that are there, (1,) of the dtype of `like`."""
    found = [part for part in parts if part is not None]
    return torch.cat(found).sum().to(like.dtype).view(1) if found else like.new_zeros(1)


def forward(
    model: nn.Module, criterion: Callable, inputs: Any, targets: Tensor, precision: str
) -> tuple[Tensor, BatchResult]:
    """The mean loss of one batch, for backward, and the result to count."""
    # a process's part of a batch may be empty: it takes part in all that is done together, and adds nothing
    samples = targets.shape[0]
    with autocast(targets.device, precision):
        try:
            outputs = model(inputs)
        except RuntimeError as error:
            if samples:
                raise
            raise RuntimeError(
                "the model does not take a batch of no samples, which is this process's part of a small one "
                f"({error}); in it x.flatten(1) does what x.view(len(x), -1) does not, or leave the last batch out"
            ) from error
    # losses are sums of exponentials: not in half precision; of several outputs autocast sees to that
    one = isinstance(outputs, Tensor)
    if one and outputs.dtype in (torch.bfloat16, torch.float16):
        outputs = outputs.float()
    with autocast(targets.device, "fp32" if one else precision):
        loss = criterion(outputs, targets) if samples else nothing_of(outputs)
    if loss.dim():
        if loss.numel() != 1:
            raise ValueError(f"criterion must return one number, the batch's mean, got shape {tuple(loss.shape)}")
        loss = loss.squeeze()
    return loss, BatchResult(loss.detach(), *_correct(criterion, outputs, targets), samples)


def _correct(criterion: Callable, outputs: Any, targets: Tensor) -> tuple[Tensor | None, Tensor | None, int]:
    """Right classes and ignored targets of each sample, on the device, and predictions; none without class indices."""
    if not isinstance(outputs, Tensor) or targets.is_floating_point() or not _are_scores(outputs.shape, targets.shape):
        return None, None, 0
    right, ignored = outputs.argmax(1) == targets, None
    if (index := getattr(criterion, "ignore_index", None)) is not None:
        ignored = targets == index
        if index >= 0:  # else none of them is right anyway
            right &= ~ignored
    if right.dim() > 1:
        right = right.flatten(1).sum(1)
        ignored = None if ignored is None else ignored.flatten(1).sum(1)
    return right, ignored, targets.numel()


def _are_scores(outputs: torch.Size, targets: torch.Size) -> bool:
    """Whether outputs (B, classes, …) belong to targets (B, …); one score alone has no largest."""
    return len(outputs) > 1 and outputs[1] > 1 and outputs[:1] + outputs[2:] == targets


def without_samples(batch: Any) -> Any:
    """`batch` without the samples in its tensors; what else has a method `to` cannot be cut, and stays."""
    return tree_map(lambda part: part[:0] if isinstance(part, Tensor) else part, batch)


def nothing_of(outputs: Any) -> Tensor:
    """Zero, as a loss that reaches all parameters that `outputs` came from."""
    if isinstance(outputs, Tensor):
        return outputs.sum() * 0
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    return torch.stack([nothing_of(part) for part in parts]).sum()


def to_device(value: Any, device: torch.device, memory_format: torch.memory_format = torch.preserve_format) -> Any:
    """`value`, or what is in a list, tuple or dict, on `device`; images (B, C, H, W) in `memory_format`."""

    def move(part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part.to(device)
        layout = memory_format if part.dim() == 4 else torch.preserve_format
        return part.to(device, non_blocking=True, memory_format=layout)

    return tree_map(move, value)


def tree_map(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `function` applied to its tensors, in lists (which become tuples), tuples, NamedTuples and dicts.

    And to what else has a method `to`, as torch's PackedSequence.
    """
    if hasattr(value, "to"):
        return function(value)
    if isinstance(value, dict):
        return {key: tree_map(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(tree_map(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return tuple(tree_map(function, item) for item in value)
    return value


def with_empty_batches(loader: Iterable) -> Iterator:
    """The batches of `loader`, then empty ones, until no process has any more."""
    empty = None
    for batch in itertools.chain(loader, itertools.repeat(None)):
        if not any(has_one for (has_one,) in distributed.all_gather([batch is not None])):
            return
        if batch is not None:
            empty = without_samples(batch)
        yield empty if batch is None else batch


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode and without gradients; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: a tensor that the model caches must serve training too
            yield
    finally:
        for module in training:
            module.training = True


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU if it has none."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return first.device if first is not None else torch.device("cpu")


def evaluate(
    model: nn.Module,
    loader: Iterable,
    criterion: Callable,
    device: torch.device | str | None = None,
    *,
    precision: str = "fp32",
    memory_format: torch.memory_format = torch.preserve_format,
    reduce: bool = False,
) -> tuple[float, float | None]:
    """(Mean loss per sample, accuracy between 0 and 1, or None where targets are not classes) of `model` on `loader`.

    The model is moved to `device`; by default it stays where it is. Changes no weight, buffer, mode or random state.
    With `reduce` every process has a part of the samples, and all get the means of all.
    """
    place = torch.device(device) if device is not None else model_device(model)
    model.to(place)
    means = RunningMeans()
    with preserved_random_state(place), preserved_generators(loader), evaluation_mode(model):
        for batch in loader:
            inputs, targets = to_device(batch, place, memory_format)
            means.add([forward(model, criterion, inputs, targets, precision)[1]])
    means.read()
    return (means.reduced() if reduce else means).means()


def outputs_of(
    model: nn.Module,
    loader: Iterable,
    device: torch.device | str | None = None,
    *,
    precision: str = "fp32",
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """The outputs of `model` for all of `loader`, (N, …) float32 on the CPU; a batch is inputs, or starts with them."""
    place = torch.device(device) if device is not None else model_device(model)
    model.to(place)
    outputs = []
    with (
        preserved_random_state(place),
        preserved_generators(loader),
        evaluation_mode(model),
        autocast(place, precision),
    ):
        for batch in loader:
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            outputs.append(model(to_device(inputs, place, memory_format)).float())
    if not outputs:
        raise ValueError("the loader gave no batch")
    return torch.cat(outputs).cpu()


def compute_accuracy(model: nn.Module, loader: Iterable, device: torch.device | str | None = None) -> float:
    """The share of samples of `loader` whose class `model` gets right, between 0 and 1."""
    accuracy = evaluate(model, loader, nn.CrossEntropyLoss(), device)[1]
    if accuracy is None:
        raise ValueError("accuracy needs integer class targets and outputs with one score per class")
    return accuracy


def predict(model: nn.Module, image: Tensor, device: torch.device | str | None = None) -> tuple[Any, Any]:
    """The class and its probability: of an image (C, H, W) as (int, float), of a batch (B, C, H, W) as tensors (B,)."""
    if image.dim() not in (3, 4):
        raise ValueError(f"expected an image (C, H, W) or a batch (B, C, H, W), got shape {tuple(image.shape)}")
    batch = image if image.dim() == 4 else image.unsqueeze(0)
    place = torch.device(device) if device is not None else model_device(model)
    model.to(place)
    with evaluation_mode(model):
        confidences, classes = model(batch.to(place)).softmax(1).max(1)
    return (classes.cpu(), confidences.cpu()) if image.dim() == 4 else (int(classes), float(confidences))
