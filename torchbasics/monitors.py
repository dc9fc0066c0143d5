"""Is the training healthy? GradientMonitor judges gradients and steps; find_nonfinite names the module that made a NaN.

This file imports nothing but torch and can be copied alone.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.optim import Optimizer

PROBLEMS = {  # worst first, with what to do
    "non-finite": "look at the data and the loss, lower the learning rate; find_nonfinite names the module",
    "too high": "lower the learning rate, or warm it up",
    "spike": "clip the gradient (clip_norm=1), look at that batch",
    "exploding": "clip the gradient (clip_norm=1), lower the learning rate",
    "zero": "nothing flows back to here: dead ReLUs (lower the rate, other initialisation), or a detached part",
    "dead units": "most units never fire: lower the learning rate, other initialisation, LeakyReLU or GELU",
    "vanishing": "other activations (ReLU, GELU), normalisation or residual connections, other initialisation",
}
VERDICTS = (*PROBLEMS, "zero so far", "ok", "no gradient", "frozen")
NUMBERS = ("mean", "std", "max", "min", "norm", "weight_norm", "grad_weight_ratio", "dead_share", "update_ratio")
UNIT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # row i of their weights feeds output unit i
PATIENCE = 3  # reports in a row without a gradient that make a parameter "zero" and a unit dead


@dataclass
class History:
    """What the earlier reports found for one parameter."""

    norms: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    updates: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    zeros: int = 0  # reports in a row with a gradient of exactly zero
    silent: Tensor | int = 0  # (units,): reports in a row without a gradient
    began_at_zero: bool = False  # such weights may grow fast


class GradientMonitor:
    """Report on the gradients of `model` and the steps of its optimizer.

    Without an optimizer, call `check_gradients()` or `print_gradient_report()` between backward and `zero_grad`. With
    `optimizer`, or as `Trainer(on_step_end=[monitor])`, the monitor reports on the first three steps and on every
    `every`-th: on the gradients the optimizer used (whole windows, after unscaling and clipping) and on the change they
    made. As a callback it sees the second step first, and prints a line to stderr when the verdict changes.

    The verdicts on a parameter. Those that compare with the weights look only at two and more dimensions:
        non-finite: a gradient or weight is NaN or infinite.
        too high: the step is above `max_update_ratio` of the weights' norm in the median of the last three to five
            reports, or ten times that in one. Healthy is near 1e-3, and up to 0.1 in the first steps of Adam.
        spike: the norm is ten times the median of the last 100 reports (of at least 10), and above all of them.
        exploding: the norm is above `max_norm`. Off by default: a run broken by its learning rate can have smaller
            gradients than a healthy one. Tutorials use 100.
        zero: the gradient was exactly zero in three reports in a row; `zero so far` before that.
        dead units: the same for at least 90% of the units of a linear or convolution layer.
        vanishing: gradient over weight is below 1e-6 of the model's largest.

    Attributes: `report` (the last one), `problems` (each with where it was seen first), `verdict`, `step`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        every: int = 10,
        max_update_ratio: float = 0.2,
        max_norm: float = math.inf,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.model = model
        self.every = every
        self.max_update_ratio = max_update_ratio
        self.max_norm = max_norm
        self.report: dict[str, dict[str, Any]] = {}
        self.problems: dict[str, str] = {}
        self.step = 0
        self._history: dict[str, History] = {}
        self._watched: dict[str, tuple[Tensor, Tensor]] = {}  # (row, weight) by name, from before the step
        self._handles: list[Any] = []
        self._announced: set[str] = set()
        self.optimizer: Optimizer | None = None
        if optimizer is not None:
            self.attach(optimizer)

    def check_gradients(self) -> dict[str, dict[str, Any]]:
        """Return {parameter: record}: of the last watched step if there is one, else of the gradients there are now.

        A record holds `mean`, `std` (n - 1), `max`, `min` (both ignore NaN), `norm`, `weight_norm`,
        `grad_weight_ratio`, `update_ratio` (norm of the step over norm of the weights), `dead_share`: floats, None
        where there is no value; `has_nan`, `has_inf`: bools; `verdict`. The device is read once. Each call without
        a watched optimizer counts as a report.
        """
        if self.optimizer is None or not self.report:
            self._finish(self._measure())
        return self.report

    def print_gradient_report(self) -> None:
        """Print the table of `check_gradients()`, worst first, and the verdict on the model."""
        report = self.check_gradients()
        width = max([9, *map(len, report)])
        keys = ("norm", "mean", "std", "min", "max", "grad_weight_ratio", "update_ratio")
        titles = (*keys[:5], "grad/weight", "step/weight")
        print(f"{'parameter':{width}}" + "".join(f"{title:>12}" for title in titles) + "  verdict")
        for name, record in sorted(report.items(), key=lambda item: VERDICTS.index(item[1]["verdict"])):
            cells = ["-" if record[key] is None else f"{record[key]:.3g}" for key in keys]
            print(f"{name:{width}}" + "".join(f"{cell:>12}" for cell in cells) + f"  {record['verdict']}")
        print(f"model: {self.verdict}")

    @property
    def verdict(self) -> str:
        """Return one line: `healthy`, or the worst problem, where and what to do; then the run's other problems."""
        worst = min((record["verdict"] for record in self.report.values()), key=VERDICTS.index, default="frozen")
        if worst in ("no gradient", "frozen"):
            return "no gradient to judge: call this after backward"
        text = "healthy"
        if worst in PROBLEMS:
            names = [name for name, record in self.report.items() if record["verdict"] == worst]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            text = f"{worst} ({names[0]}{more}): {PROBLEMS[worst]}"
        others = [f"{verdict} ({where})" for verdict, where in self.problems.items() if verdict != worst]
        return text + (f"; seen in this run: {', '.join(others)}" if others else "")

    def attach(self, optimizer: Optimizer) -> None:
        """Watch the steps of `optimizer`, and of no other."""
        self.detach()
        self.optimizer = optimizer
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def detach(self) -> None:
        """Stop watching."""
        self.optimizer = None
        while self._handles:
            self._handles.pop().remove()

    def __call__(self, trainer: Any) -> None:
        """Watch `trainer.optimizer`, and print the verdict if it changed; for `Trainer(on_step_end=[monitor])`."""
        if self.optimizer is not trainer.optimizer:
            self.attach(trainer.optimizer)
        self.step = trainer.step
        problems = {record["verdict"] for record in self.report.values()} & PROBLEMS.keys()
        if problems != self._announced:
            print(f"gradients at step {self.step}: {self.verdict}", file=sys.stderr)
        self._announced = problems

    def _before_step(self, *_: Any) -> None:
        self.step += 1
        # a rate far too high shows in the first steps, and perhaps not later
        if self.step <= 3 or self.step % self.every == 0:
            parameters = dict(unwrap(self.model).named_parameters())
            for name, row in self._measure().items():
                self._watched[name] = row, parameters[name].detach().clone()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        parameters, rows = dict(unwrap(self.model).named_parameters()), {}
        for name, (row, before) in self._watched.items():
            change = vector_norm(real_values(parameters[name] - before))
            rows[name] = torch.cat([row[:-1], (change.float() / row[5]).reshape(1)])
        self._watched = {}
        overflow = getattr(optimizer, "found_inf", None)  # a GradScaler lets fused optimizers skip the step themselves
        if rows and not (overflow is not None and overflow.item()):
            self._finish(rows)

    @torch.no_grad()
    def _measure(self) -> dict[str, Tensor]:
        """Return NUMBERS as a row (9,) for each parameter with a gradient, on its device; the last one is unknown."""
        model, rows = unwrap(self.model), {}
        with_units = {id(module.weight) for module in model.modules() if isinstance(module, UNIT_LAYERS)}
        for name, parameter in model.named_parameters():
            weight = real_values(parameter)
            if parameter.grad is None or not weight.numel():
                continue
            grad, history = real_values(parameter.grad), self._history.setdefault(name, History())
            mean = grad.mean()
            std = vector_norm(grad - mean) / math.sqrt(max(grad.numel() - 1, 1))  # torch.std: 4 times as long on a CPU
            low, high = grad.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).aminmax()
            norm, weight_norm = vector_norm(grad), vector_norm(weight).to(grad.dtype)
            dead_share = unknown = grad.new_full((), math.nan)
            if id(parameter) in with_units:  # a unit that never fires gets no gradient: its row is zero
                silent = grad.flatten(1).abs().amax(1) == 0  # (units,)
                history.silent = (history.silent + 1) * silent
                dead_share = (history.silent >= PATIENCE).to(grad.dtype).mean()
            row = [mean, std, high, low, norm, weight_norm, norm / weight_norm, dead_share, unknown]
            rows[name] = torch.stack(row).float()
        return rows

    def _finish(self, rows: dict[str, Tensor]) -> None:
        """Read `rows` from the device, and make the report."""
        device = next((row.device for row in rows.values()), torch.device("cpu"))
        table = torch.stack([row.to(device) for row in rows.values()]).tolist() if rows else []
        known = dict(zip(rows, table, strict=True))
        parameters = dict(unwrap(self.model).named_parameters())
        self.report = {name: make_record(known.get(name), p.requires_grad) for name, p in parameters.items()}
        # biases and the like begin near zero: comparing with them tells nothing
        ratios = {name: self.report[name]["grad_weight_ratio"] for name in known if parameters[name].dim() > 1}
        largest = max((ratio for ratio in ratios.values() if ratio is not None), default=0.0)
        for name in known:
            verdict = self._judge(self.report[name], self._history[name], largest if name in ratios else None)
            self.report[name]["verdict"] = verdict
            if verdict in PROBLEMS:
                self.problems.setdefault(verdict, f"{name}, step {self.step}" if self.optimizer else name)

    def _judge(self, record: dict[str, Any], history: History, largest: float | None) -> str:
        """Return the verdict on one parameter; `largest` is the model's gradient-to-weight ratio, None for biases."""
        norm, update, relative = record["norm"], record["update_ratio"], record["grad_weight_ratio"]
        if record["has_nan"] or record["has_inf"] or not math.isfinite(record["weight_norm"]):
            return "non-finite"
        earlier = list(history.norms)
        history.norms.append(norm)
        history.zeros = history.zeros + 1 if record["max"] == record["min"] == 0 else 0
        history.began_at_zero = history.began_at_zero or record["weight_norm"] == 0
        if update is not None and largest is not None and not history.began_at_zero:
            history.updates.append(update)
            usual = median(history.updates) if len(history.updates) >= 3 else 0.0
            if usual > self.max_update_ratio or update > 10 * self.max_update_ratio:
                return "too high"
        if len(earlier) >= 10 and norm > max(earlier) and norm > 10 * median(earlier) > 0:
            return "spike"
        if norm > self.max_norm:
            return "exploding"
        if history.zeros:
            return "zero" if history.zeros >= PATIENCE else "zero so far"
        if record["dead_share"] is not None and record["dead_share"] > 0.9 - 1e-6:  # it is float32
            return "dead units"
        if largest is not None and relative is not None and relative < 1e-6 * largest:
            return "vanishing"
        return "ok"


def make_record(row: list[float] | None, trainable: bool) -> dict[str, Any]:
    """Return the record of one parameter, from None if it has no gradient."""
    if row is None:
        verdict = "no gradient" if trainable else "frozen"
        return dict.fromkeys(NUMBERS) | {"has_nan": False, "has_inf": False, "verdict": verdict}
    record: dict[str, Any] = dict(zip(NUMBERS, row, strict=True))
    for key in NUMBERS[6:]:  # not known, or divided by the norm of weights that are all zero
        record[key] = record[key] if math.isfinite(record[key]) else None
    record["has_nan"] = math.isnan(record["norm"])
    record["has_inf"] = math.isinf(record["max"]) or math.isinf(record["min"])
    return record


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DDP, DataParallel, AveragedModel and torch.compile, whose names have no prefix."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    inner: Any = model
    while isinstance(inner, wrappers) or hasattr(inner, "_orig_mod"):
        inner = inner.module if isinstance(inner, wrappers) else inner._orig_mod
    return inner


def dense(tensor: Tensor) -> Tensor:
    """Return the values of a tensor as a plain one: of a sharded one this rank's, of a sparse one all of them."""
    tensor = tensor.detach()
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def real_values(tensor: Tensor) -> Tensor:
    """Return the values of a tensor as real numbers of at least 32 bits: half precision overflows in a norm."""
    tensor = dense(tensor)
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_nan_inf(tensor: Tensor, name: str = "tensor") -> bool:
    """Return whether `tensor` holds a NaN or infinite value; if so, print how many and where the first is."""
    text = count_nonfinite(tensor)
    if text:
        print(f"{name}: {text}")
    return bool(text)


def count_nonfinite(tensor: Tensor) -> str:
    """Return how many values are not finite and where the first is, "" if none."""
    values = dense(tensor)
    bad = ~values.isfinite()
    if not bad.any():
        return ""
    nans = int(values.isnan().sum())
    place = f", the first at {tuple(bad.nonzero()[0].tolist())}" if bad.dim() else ""
    return f"{nans} NaN and {int(bad.sum()) - nans} infinite of {tensor.numel()} values{place}"


def find_nonfinite(model: nn.Module, run: Callable[[], Tensor]) -> str | None:
    """Replay a batch and return a line that names the module which made the first bad value, or None.

    Bad are NaN and +inf; -inf is not, since attention masks hold it. `run()` calls the model and returns the loss, a
    single number. If that is finite, its gradients are computed too, by `torch.autograd.grad`: no `.grad` changes, and
    no other process is waited for if `run` calls the unwrapped model.

    In the forward pass, the module is the innermost one whose outputs are bad and whose inputs are not. In the backward
    pass, it is the innermost one whose gradients are finite at its outputs and not at its inputs. A module that
    contains others is named for what it does between them. Slow: it waits for the device at each module.

    The model's buffers and torch's random states are put back. Dropout draws anew, so a value that came by chance may
    not come again.
    """
    inner = unwrap(model)
    parameters = {name: parameter for name, parameter in inner.named_parameters() if parameter.requires_grad}
    buffers = [(buffer, buffer.clone()) for buffer in inner.buffers()]
    devices = {parameter.device for parameter in inner.parameters() if parameter.device.type != "cpu"}
    kind = next((device.type for device in devices), "cuda")
    # not compiled, since compiled modules call no hooks
    compiler = torch.compiler.set_stance("force_eager")
    with ExitStack() as hooks, torch.random.fork_rng(devices, device_type=kind), compiler, torch.enable_grad():
        watch = Watch(inner, hooks)
        try:
            loss = run()
            if not loss.isfinite():
                return watch.made or f"the loss is not finite: {watch.last}"
            if not parameters or not loss.requires_grad:
                return None
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
    if watch.first_bad is not None:
        return watch.backward_culprit()
    bad = [name for name, grad in zip(parameters, grads, strict=True) if count_nonfinite(grad)]
    return f"the gradients of {', '.join(bad[:3])} alone are not finite" if bad else None


@dataclass(eq=False)
class Call:
    """One call of a module."""

    who: str
    parent: Call | None  # the call it was made in
    inputs: str  # described
    given_bad: bool
    bad_gradient: bool = False  # a gradient of its outputs is not finite


class Watch:
    """Watch the calls of a model's modules and their gradients, until `hooks` is closed."""

    def __init__(self, model: nn.Module, hooks: ExitStack) -> None:
        self.hooks = hooks
        self.open: list[Call] = []  # the calls that have not ended, outermost first
        self.made = ""  # who made the first bad value
        self.last = "no module was called"  # what the last call was given and gave
        self.first_bad: Call | None = None  # where the first bad gradient was seen, at an input or output
        for name, module in model.named_modules():
            kind = type(module).__name__
            who = f"module {name!r} ({kind})" if name else f"the model itself ({kind})"
            hooks.enter_context(module.register_forward_pre_hook(partial(self.enter, who), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(self.leave))

    def enter(self, who: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = (args, kwargs)  # described now, since the module may change them in place
        call = Call(who, self.open[-1] if self.open else None, describe(given), is_bad(given))
        self.open.append(call)

        def own(value: Any) -> Any:
            """Return a view of a tensor: its gradient is this call's share of the tensor's gradient."""
            if isinstance(value, Tensor) and value.requires_grad and value.layout == torch.strided:
                value = value.view_as(value)
            self.watch_gradients(value, call, output=False)
            return value

        return tuple(map(own, args)), {key: own(value) for key, value in kwargs.items()}

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self.open.pop()
        self.last = f"{call.who} was given {call.inputs} and gave {describe(output)}"
        if is_bad(output) and not call.given_bad and not self.made:  # inner calls end before those around them
            values = (*module.named_parameters(), *module.named_buffers())
            bad = [name for name, value in values if is_bad(value)]
            holding = f", which holds NaN or infinity in {', '.join(bad[:3])}," if bad else ""
            what = f"made the first NaN or infinite value: it was given {call.inputs} and gave {describe(output)}"
            self.made = f"{call.who}{holding} {what}"
        self.watch_gradients(output, call, output=True)

    def watch_gradients(self, value: Any, call: Call, output: bool) -> None:
        """Note a gradient that is not finite. Hooks of tensors do so: those of modules forbid changes in place."""

        def look(grad: Tensor) -> None:
            if count_nonfinite(grad):
                self.first_bad = self.first_bad or call
                call.bad_gradient = call.bad_gradient or output

        for tensor in tensors(value):
            if tensor.requires_grad:
                self.hooks.enter_context(tensor.register_hook(look))

    def backward_culprit(self) -> str:
        """Return who made the first bad gradient: the innermost call around it whose outputs have finite gradients."""
        call = self.first_bad
        while call is not None and call.bad_gradient:
            call = call.parent
        if call is None:
            return "the loss, or what else follows the model, made the first gradient that is not finite"
        return f"{call.who} made the first gradient that is not finite; in the forward pass it was given {call.inputs}"


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def is_bad(value: Any) -> bool:
    """Return whether a tensor in `value` holds NaN or +inf."""
    return any(bool((values.isnan() | values.isposinf()).any()) for values in map(real_values, tensors(value)))


def describe(value: Any) -> str:
    """Return shape, type and range of each tensor in `value`, or what is not finite in it."""
    texts = []
    for tensor in tensors(value):
        text, values = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}", dense(tensor)
        if bad := count_nonfinite(tensor):
            text += f" with {bad}"
        elif values.numel() and values.is_floating_point():
            text += f" from {values.min():.3g} to {values.max():.3g}"
        texts.append(text)
    return " and ".join(texts) or "no tensor"
