"""Where did the first NaN come from? `trace_nonfinite` names the module that made it, in the forward or the backward.

Anomaly mode looks at the backward only, and lets a NaN loss with finite gradients pass (pytorch#160016); people want
the first module that made the value, not one that passed it on (pytorch#182156). This file imports nothing but torch
and can be copied away alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def check_nan_inf(tensor: Tensor, name: str = "tensor") -> bool:
    """Whether `tensor` holds a NaN or infinite value; if so, prints one line that says how many and where the first is.

    Any dtype but float8, strided or sparse COO; integers hold none. One transfer from the device. TypeError for
    anything but a tensor.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected a tensor to check, got {type(tensor).__name__}")
    values = tensor.detach()
    values = values.coalesce().values() if values.is_sparse else values
    nan, bad = values.isnan(), ~values.isfinite()
    first = bad.flatten().to(torch.uint8).argmax() if bad.numel() else bad.sum()
    nans, all_bad, where = torch.stack([nan.sum(), bad.sum(), first]).tolist()
    if all_bad:
        place = "" if tensor.is_sparse or not values.dim() else f", the first at {_index(where, values.shape)}"
        print(f"{name}: {nans} NaN and {all_bad - nans} infinite of {tensor.numel()} values{place}")
    return bool(all_bad)


@dataclasses.dataclass(frozen=True)
class Culprit:
    """Who made the first non-finite value; `str()` of it is the message."""

    module: str  # its name in the model, "" for the model itself
    kind: str  # its class
    phase: str  # "forward", "backward", "input" (it came into the model) or "loss" (made by what follows the model)
    call: int = 1  # which call of this module, from 1
    inputs: tuple[str, ...] = ()  # shape, type and statistics of each tensor that it was given
    outputs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()  # its own parameters and buffers that are not finite

    def __str__(self) -> str:
        given = "; ".join(self.inputs) or "no tensor"
        if self.phase == "input":
            return f"the model was given non-finite values: {given}"
        if self.phase == "loss":
            return "the loss, or what else follows the model, made the first non-finite gradient"
        who = f"module {self.module!r} ({self.kind})" if self.module else f"the model itself ({self.kind})"
        who += f", in its call {self.call}," if self.call > 1 else ""
        if self.phase == "backward":
            return f"{who} made the first non-finite gradient; in the forward it was given {given}"
        who += f", whose own values are not finite ({'; '.join(self.weights)})," if self.weights else ""
        return f"{who} made the first non-finite value; it was given {given}; it gave {'; '.join(self.outputs)}"


@dataclasses.dataclass(eq=False)
class _Call:
    """One call of a module, in the order of the calls."""

    name: str
    module: nn.Module
    number: int
    parent: _Call | None
    finite_inputs: bool
    inputs: tuple[str, ...]
    suspects: int  # how many there were when it began
    bad_output_gradient: bool = False

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1

    def culprit(self, phase: str, output: Any = ()) -> Culprit:
        own = [*self.module.named_parameters(recurse=False), *self.module.named_buffers(recurse=False)]
        weights = tuple(f"{name} {describe(value)}" for name, value in own if not _all_finite(value))
        kind, gave = type(self.module).__name__, tuple(describe(tensor) for tensor in _tensors(output))
        return Culprit(self.name, kind, phase, self.number, self.inputs, gave, weights)


class NonFiniteTrace:
    """What `trace_nonfinite` found: `culprit`, or None as long as all is finite; `str()` of it says so in words."""

    def __init__(self, model: nn.Module) -> None:
        self._root = model
        self._names = {module: name for name, module in model.named_modules()}
        self._calls: dict[nn.Module, list[_Call]] = {}
        self._stack: list[_Call] = []
        self._suspects: list[Culprit] = []  # of the forward
        self._first_bad: tuple[_Call, Tensor] | None = None  # whose output's gradient was the first bad one, and it
        self._blamed: list[_Call] = []  # of the backward
        self._handles: list[Any] = []

    @property
    def culprit(self) -> Culprit | None:
        """Of the forward if there is one, else of the backward."""
        if self._suspects:
            return self._suspects[0]
        blamed = [call for call in self._blamed if not call.bad_output_gradient]
        if blamed:  # a module shares its input with the first one in it: the innermost is meant
            return max(blamed, key=lambda call: call.depth).culprit("backward")
        return self._by_elimination()

    def __str__(self) -> str:
        return str(self.culprit) if self.culprit else "all values are finite"

    def _attach(self) -> None:
        for module, name in self._names.items():
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    self._handles.append(parameter.register_hook(self._parameter_hook(module, name)))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()

    # Forward. A module made a value if it was given finite ones and none of the modules inside it is to blame.

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = list(_tensors((args, kwargs)))  # looked at before the module may change them in place
        call = self._call(module, _all_finite(given), tuple(describe(tensor) for tensor in given))
        self._stack.append(call)
        if module is self._root and not call.finite_inputs:
            self._suspects.append(call.culprit("input"))
        self._watch(given, lambda grad: self._blame(call, grad))

    def _call(self, module: nn.Module, finite_inputs: bool, inputs: tuple[str, ...]) -> _Call:
        calls = self._calls.setdefault(module, [])
        parent = self._stack[-1] if self._stack else None
        calls.append(
            _Call(self._names[module], module, len(calls) + 1, parent, finite_inputs, inputs, len(self._suspects))
        )
        return calls[-1]

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        while self._stack and self._stack[-1].module is not module:  # left by an exception that the model caught
            self._stack.pop()
        if not self._stack:
            return
        call = self._stack.pop()
        if _all_finite(output):
            del self._suspects[call.suspects :]  # it was meant, like the -inf of a mask before a softmax
        elif call.finite_inputs:
            self._suspects.append(call.culprit("forward", output))
        self._watch(_tensors(output), lambda grad: self._note_bad_output(call, grad))

    # Backward. Hooks on the tensors between modules, not on modules: those break on changes in place.

    def _watch(self, tensors: Any, when_bad: Callable[[Tensor], None]) -> None:
        def look(grad: Tensor) -> None:
            if not _all_finite(grad):
                when_bad(grad)

        if torch.is_grad_enabled():
            self._handles += [tensor.register_hook(look) for tensor in tensors if tensor.requires_grad]

    def _note_bad_output(self, call: _Call, grad: Tensor) -> None:
        call.bad_output_gradient = True
        self._first_bad = self._first_bad or (call, grad)

    def _blame(self, call: _Call, grad: Tensor) -> None:
        """The gradient of what `call` was given is bad: it made that, unless the gradient that came to it was bad, too.

        Only the first bad gradient counts; the hooks of all modules that share its tensor see it.
        """
        self._first_bad = self._first_bad or (call, grad)
        if self._first_bad[1].data_ptr() == grad.data_ptr():
            self._blamed.append(call)

    def _parameter_hook(self, module: nn.Module, name: str) -> Callable[[Tensor], None]:
        def look(grad: Tensor) -> None:
            if self._first_bad is None and not _all_finite(grad):  # none of its outputs' gradients was bad before
                call = self._calls.get(module, [_Call(name, module, 1, None, True, (), 0)])[-1]
                self._first_bad = (call, grad)
                self._blamed.append(call)

        return look

    def _by_elimination(self) -> Culprit | None:
        """A bad gradient came to a module and no module made it: the one around them did, between its modules."""
        if self._first_bad is None:
            return None
        call: _Call | None = self._first_bad[0]
        while call is not None and call.bad_output_gradient:
            call = call.parent
        return Culprit("", "", "loss") if call is None else call.culprit("backward")


@contextlib.contextmanager
def trace_nonfinite(model: nn.Module) -> Iterator[NonFiniteTrace]:
    """While this is open, forward and backward of `model` are watched; the `culprit` of its value made the first NaN.

    Told apart: a module that makes a non-finite value from finite ones, and those that pass it on. The innermost module
    is named; one with others inside only for what it does between them. Values that end inside a module (a mask of
    -inf before a softmax) count as meant. Slow: it waits for the device at each module; a compiled model runs better
    under `torch.compiler.set_stance("force_eager")`. Its hooks are gone at the end, after exceptions too.
    """
    trace = NonFiniteTrace(_bare(model))
    trace._attach()
    try:
        yield trace
    finally:
        trace._detach()


def find_nonfinite(
    model: nn.Module, criterion: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, precision: str = "fp32"
) -> str | None:
    """Replays a batch, forward and backward, and says who makes the first NaN or infinite value; None if nobody does.

    `inputs` and `targets` are on the model's device; `precision` is `fp32`, `bf16` or `fp16` (autocast). Weights,
    buffers, gradients, modes and random states are afterwards as before. Dropout draws anew, so that a value that came
    by chance may not come again.
    """
    bare = _bare(model)
    first = next(_tensors((inputs, list(bare.parameters()))), torch.empty(0))
    modules = [bare, criterion] if isinstance(criterion, nn.Module) else [bare]
    with _unchanged(modules, first.device), trace_nonfinite(bare) as trace:
        with _autocast(first.device.type, precision):
            outputs = bare(inputs)
        if trace.culprit is None:
            one = isinstance(outputs, Tensor)
            if one and outputs.dtype in (torch.bfloat16, torch.float16):
                outputs = outputs.float()  # as in Trainer: losses are not for half precision
            with _autocast(first.device.type, "fp32" if one else precision):
                loss = criterion(outputs, targets)
            if not _all_finite(loss):
                what = "; ".join(describe(tensor) for tensor in _tensors((outputs, targets)))
                return f"the loss, {describe(loss)}, made from finite outputs and the targets: {what}"
            loss.backward()
        return str(trace) if trace.culprit else None


def _autocast(device_type: str, precision: str) -> torch.autocast:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device_type, dtype=half or torch.bfloat16, enabled=half is not None)


@contextlib.contextmanager
def _unchanged(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """With gradients, not compiled; gradients, buffers and random states are put back at the end."""
    grads = [(parameter, parameter.grad) for module in modules for parameter in module.parameters()]
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    drawn = random.getstate()
    indices, kind = ([], "cuda") if device.type == "cpu" else ([device.index or 0], device.type)
    try:
        for parameter, _ in grads:
            parameter.grad = None
        with (
            torch.random.fork_rng(indices, device_type=kind),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        random.setstate(drawn)
        for parameter, grad in grads:
            parameter.grad = grad
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def describe(tensor: Tensor) -> str:
    """Shape, type, least, greatest and mean of the finite values; how many are not, the first, in how many samples."""
    head = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    values = tensor.detach()
    values = values.to_dense() if values.layout != torch.strided else values
    if not values.numel() or not (values.is_floating_point() or values.is_complex()):
        return head
    values = values.abs() if values.is_complex() else values.float() if values.dtype != torch.float64 else values
    finite = values[values.isfinite()]
    text = f"from {finite.min():.3g} to {finite.max():.3g}, mean {finite.mean():.3g}" if len(finite) else "none finite"
    if len(finite) < values.numel():
        bad = ~values.isfinite()
        where = _index(int(bad.flatten().to(torch.uint8).argmax()), values.shape)
        text += f", {int(values.isnan().sum())} NaN and {int(values.isinf().sum())} inf, the first at {where}"
        if values.dim() > 1:
            text += f", in {int(bad.flatten(1).any(1).sum())} of {len(values)} samples"
    return f"{head} {text}"


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    """The position of element number `flat` in a tensor of `shape`."""
    position = []
    for size in reversed(shape):
        flat, at = divmod(flat, size)
        position.append(at)
    return tuple(reversed(position))


def _bare(model: nn.Module) -> nn.Module:
    """Without the wrappers, so that names have no `module.` or `_orig_mod.` before them and no process waits."""
    inner: Any = model
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    while isinstance(inner, wrappers) or hasattr(inner, "_orig_mod"):
        inner = inner.module if isinstance(inner, wrappers) else inner._orig_mod
    return inner


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for item in value.values() for tensor in _tensors(item))
    elif isinstance(value, (list, tuple)):
        yield from (tensor for item in value for tensor in _tensors(item))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value))


def _all_finite(value: Any) -> bool:
    for tensor in _tensors(value):
        values = tensor.detach()
        values = values.coalesce().values() if values.is_sparse else values
        if (values.is_floating_point() or values.is_complex()) and not bool(values.isfinite().all()):
            return False
    return True
