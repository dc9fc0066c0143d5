"""GradientMonitor: are gradients and updates healthy? One transfer from the device per report, however many parameters.

This file imports nothing but torch and can be copied away alone.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import weakref
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

PROBLEMS = {  # worst first, with what to do
    "non-finite": "look at the data and the loss, lower the learning rate; trace_nonfinite names the module",
    "too high": "lower the learning rate, or warm it up",
    "spike": "clip the gradient (clip_norm=1), look at that batch",
    "exploding": "clip the gradient (clip_norm=1), lower the learning rate",
    "zero": "nothing flows back to here: dead ReLUs (lower the rate, other initialisation), or a detached part",
    "dead units": "most units never fire: lower the learning rate, other initialisation, LeakyReLU or GELU",
    "vanishing": "other activations (ReLU, GELU), normalisation or residual connections, other initialisation",
}
VERDICTS = (*PROBLEMS, "zero so far", "ok", "no gradient", "frozen")
_UNIT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # row i of their weights feeds output unit i
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)


class GradientRecord(TypedDict):
    """What is known of one parameter; the numbers are None where it has no gradient (`grad is None`, or frozen)."""

    mean: float | None
    std: float | None  # of the sample: divided by n - 1
    max: float | None
    min: float | None
    norm: float | None  # Euclidean
    has_nan: bool
    has_inf: bool
    weight_norm: float | None
    grad_weight_ratio: float | None  # None also where the weights are all zero
    update_ratio: float | None  # norm of the step over norm of the weights before it, if the step was watched
    dead_share: float | None  # share of the units whose gradient was zero in the last `patience` reports
    verdict: str  # one of VERDICTS


@dataclasses.dataclass
class _Past:
    """Of one parameter, over the earlier reports."""

    norms: list[float] = dataclasses.field(default_factory=list)
    updates: list[float] = dataclasses.field(default_factory=list)
    highest: float = 0.0
    zeros: int = 0  # reports in a row with a gradient of exactly zero
    began_at_zero: bool | None = None


class GradientMonitor:
    """Reports on the gradients of `model`, and with `optimizer` on its steps: the first three and every `every`-th.

    Alone: `check_gradients()` or `print_gradient_report()` between backward and `zero_grad`. With an optimizer (or as
    `Trainer(on_step_end=[monitor])`) its step hooks show what it really used: gradients after unscaling and clipping,
    of whole windows of accumulation. As a call-back alone it meets the optimizer after the first step; give `optimizer`
    here to see that one, too. A step that a scaler skips is not reported. Sharded parameters: this rank's part.

    The rules, for parameters of two and more dimensions where they compare with the weights (biases begin near zero):
        too high: the step is above `max_update_ratio` of the weights' norm in the median of the last reports, or ten
            times that at once; healthy is near 1e-3, and up to 0.1 in the first steps of Adam.
        spike: the norm is `spike` times the median of its last `window` reports (at least 10), and its highest.
        zero: exactly zero in `patience` reports in a row; before that `zero so far`, which is no problem yet.
        dead units: at least `dead_share` of the outputs of a linear or convolution layer had a gradient of exactly zero
            in `patience` reports in a row.
        vanishing: the gradient-to-weight ratio is below `vanishing` of the model's largest.
        exploding, also vanishing: norm above `max_norm` or below `min_norm`; off by default, since a run broken by its
            learning rate can have smaller norms than a healthy one. The tutorials' values are 100 and 1e-7.

    `verbose`: as a call-back, print a line to stderr when the verdict changes.
    Attributes: `report` (the last one), `step` (of the optimizer), `problems` (verdict → where it was seen first).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        every: int = 10,
        max_update_ratio: float = 0.2,
        spike: float = 10.0,
        patience: int = 3,
        dead_share: float = 0.9,
        vanishing: float = 1e-6,
        max_norm: float | None = None,
        min_norm: float | None = None,
        window: int = 100,
        verbose: bool = True,
    ) -> None:
        for option, value in (("every", every), ("patience", patience), ("window", window)):
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        self.model, self.every, self.patience, self.window, self.verbose = model, every, patience, window, verbose
        self.max_update_ratio, self.spike, self.dead_share, self.vanishing = (
            max_update_ratio,
            spike,
            dead_share,
            vanishing,
        )
        self.max_norm, self.min_norm = max_norm, min_norm
        self.report: dict[str, GradientRecord] = {}
        self.problems: dict[str, str] = {}
        self.step = self._steps_seen = 0
        self._past: dict[str, _Past] = {}
        self._silent: dict[torch.device, tuple[tuple[str, ...], Tensor]] = {}  # reports in a row, per unit
        self._seen: list[tuple[weakref.ref, int]] = []  # the gradients of the last report, and their versions
        self._watched: _Watched | None = None
        self._optimizer: Optimizer | None = None
        self._handles: list[Any] = []
        self._said = "healthy"
        if optimizer is not None:
            self.attach(optimizer)

    # ------------------------------------------------------------------------------------------------------------- use

    def check_gradients(self) -> dict[str, GradientRecord]:
        """The record of each parameter by name, of the gradients there are now; after `zero_grad` of the last report.

        The same gradients are counted once, however often one asks. One transfer from the device.
        """
        grads = [p.grad for p in _bare(self.model).parameters() if p.grad is not None]
        same = len(grads) == len(self._seen) and all(
            ref() is grad and version == grad._version for grad, (ref, version) in zip(grads, self._seen, strict=True)
        )
        if self.report and (same or not grads):
            return self.report
        with torch.no_grad():
            return self._finish(self._measure())

    def print_gradient_report(self) -> None:
        """Prints `format_report()`."""
        print(self.format_report())

    def format_report(self) -> str:
        """The table of `check_gradients()`, worst first, and the verdict on the model."""
        report = self.check_gradients()
        width = max([9, *map(len, report)])
        titles = ("norm", "mean", "std", "min", "max", "grad/weight", "step/weight")
        lines = [f"{'parameter':{width}}" + "".join(f"{title:>12}" for title in titles) + "  verdict"]
        for name, record in sorted(report.items(), key=lambda item: VERDICTS.index(item[1]["verdict"])):
            keys = ("norm", "mean", "std", "min", "max", "grad_weight_ratio", "update_ratio")
            cells = "".join(f"{_short(record[key]):>12}" for key in keys)  # type: ignore[literal-required]
            lines.append(f"{name:{width}}{cells}  {record['verdict']}{_details(record)}")
        return "\n".join([*lines, f"model: {self.verdict}"])

    @property
    def verdict(self) -> str:
        """One line on the model: `healthy`, or what is wrong, where and what to do; then what was wrong before."""
        found = [(name, record["verdict"]) for name, record in self.report.items() if record["verdict"] in PROBLEMS]
        if not any(record["norm"] is not None for record in self.report.values()):
            now = "no gradient to judge: call this after backward"
        elif not found:
            now = "healthy"
        else:
            worst = min((verdict for _, verdict in found), key=VERDICTS.index)
            names = [name for name, verdict in found if verdict == worst]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            now = f"{worst} ({names[0]}{more}): {PROBLEMS[worst]}"
        before = [verdict for verdict in self.problems if not now.startswith(verdict)]
        if not before:
            return now
        seen = ", ".join(f"{verdict} ({self.problems[verdict]})" for verdict in before)
        advice = f": {PROBLEMS[min(before, key=VERDICTS.index)]}" if now == "healthy" else ""
        return f"{'nothing wrong now' if now == 'healthy' else now}; seen in this run: {seen}{advice}"

    def attach(self, optimizer: Optimizer) -> None:
        """Watches the steps of `optimizer`, instead of another one's."""
        self.detach()
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Watches no steps any more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizer, self._watched = [], None, None

    def __call__(self, trainer: Any) -> None:
        """As `Trainer(on_step_end=[monitor])`: watches that trainer's optimizer and tells what changes."""
        if self._optimizer is not trainer.optimizer:
            self.attach(trainer.optimizer)
        self.step = trainer.step
        kinds = sorted({record["verdict"] for record in self.report.values()} & PROBLEMS.keys(), key=VERDICTS.index)
        said = ", ".join(kinds) or "healthy"
        if self.verbose and said != self._said:
            print(f"gradients at step {self.step}: {self.verdict}", file=sys.stderr)
        self._said = said

    # ---------------------------------------------------------------------------------------------- at a step and after

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self.step += 1
        self._watched = None
        self._steps_seen += 1
        if self._steps_seen > 3 and self.step % self.every:  # a rate far too high shows at once, later perhaps not
            return
        with torch.no_grad():
            watched = self._measure()
            watched.scale = getattr(optimizer, "grad_scale", None)  # of a fused optimizer that unscales by itself
            watched.skipped = getattr(optimizer, "found_inf", None)
            # copies of the weights, in few calls
            watched.before = [list(torch._foreach_mul(group.weights, 1)) for group in watched.groups]
        self._watched = watched

    def _after_step(self, *_: Any) -> None:
        watched, self._watched = self._watched, None
        if watched is not None:
            with torch.no_grad():
                self._finish(watched)

    def _measure(self) -> _Watched:
        """Statistics of all gradients, still on their devices."""
        found: dict[torch.device, _Group] = {}
        bare = _bare(self.model)
        layers = {id(module.weight) for module in bare.modules() if isinstance(module, _UNIT_LAYERS)}
        seen = []
        for name, parameter in bare.named_parameters():
            if parameter.grad is None or not parameter.numel():
                continue
            seen.append((weakref.ref(parameter.grad), parameter.grad._version))
            grad, weight = _local(parameter.grad), _local(parameter.detach())
            group = found.setdefault(weight.device, _Group())
            group.names.append(name)
            group.sizes.append(weight.numel() * (2 if weight.is_complex() else 1))
            group.weights.append(weight)
            group.values.append(_values(grad))
            if id(parameter) in layers and not grad.is_sparse:
                group.unit_names.append(name)
                group.unit_grads.append(grad)
        self._seen = seen
        for device, group in found.items():
            group.rows = _rows(group.values, [_values(weight) for weight in group.weights])
            group.counts = [value.numel() for value in group.values]
            group.dead = self._dead_shares(device, group.unit_names, group.unit_grads)
            group.values = group.unit_grads = []  # hold no gradient longer than needed
        return _Watched(list(found.values()))

    def _dead_shares(self, device: torch.device, names: list[str], grads: list[Tensor]) -> list[Tensor]:
        """Per layer the share of units without gradient in `patience` reports in a row, () each, on the device.

        A unit that never fires, through whatever activation, gets no gradient: its row of the weight's is zero.
        """
        if not names:
            return []
        largest = [grad.abs().amax(tuple(range(1, grad.dim()))) for grad in grads]  # (units,) each
        silent = torch.cat(largest) == 0
        known, counts = self._silent.get(device, ((), silent.new_zeros((), dtype=torch.int32)))
        if known != tuple(names):
            counts = torch.zeros_like(silent, dtype=torch.int32)
        counts = (counts + 1) * silent
        self._silent[device] = (tuple(names), counts)
        return [part.mean() for part in (counts >= self.patience).float().split([len(g) for g in grads])]

    def _finish(self, watched: _Watched) -> dict[str, GradientRecord]:
        """The transfer, the records and the verdicts."""
        rows, skipped = _fetch(watched)
        if skipped:
            return self.report
        report: dict[str, GradientRecord] = {}
        for name, parameter in _bare(self.model).named_parameters():
            report[name] = _record(*rows[name]) if name in rows else _without_gradient(parameter.requires_grad)
        matrices = {name for name, p in _bare(self.model).named_parameters() if p.dim() > 1}
        ratios = [record["grad_weight_ratio"] for name, record in report.items() if name in matrices]
        largest = max((ratio for ratio in ratios if ratio is not None and math.isfinite(ratio)), default=0.0)
        for name in rows:
            past = self._past.setdefault(name, _Past())
            report[name]["verdict"] = self._judge(report[name], past, largest if name in matrices else None)
            _remember(report[name], past, self.window)
        self.report = report
        for name, record in report.items():
            if record["verdict"] in PROBLEMS:
                where = f"{name}, step {self.step}" if self._optimizer else name
                self.problems.setdefault(record["verdict"], where)
        return report

    def _judge(self, record: GradientRecord, past: _Past, largest: float | None) -> str:
        """The verdict on one parameter; `largest` ratio in the model, or None for biases and the like."""
        norm, weight, update = record["norm"] or 0.0, record["weight_norm"] or 0.0, record["update_ratio"]
        if past.began_at_zero is None:
            past.began_at_zero = weight == 0
        past.zeros = past.zeros + 1 if record["max"] == record["min"] == 0 else 0
        if record["has_nan"] or record["has_inf"] or not math.isfinite(weight):
            return "non-finite"
        if update is not None and largest is not None and not past.began_at_zero:
            recent = [*past.updates[-4:], update]
            if update > 10 * self.max_update_ratio or (len(recent) >= 3 and _median(recent) > self.max_update_ratio):
                return "too high"
        if len(past.norms) >= 10 and norm > past.highest and norm > self.spike * _median(past.norms) > 0:
            return "spike"
        if self.max_norm is not None and norm > self.max_norm:
            return "exploding"
        if past.zeros:
            return "zero" if past.zeros >= self.patience else "zero so far"
        if (record["dead_share"] or 0.0) + 1e-6 >= self.dead_share:  # its mean is float32
            return "dead units"
        low = largest is not None and (record["grad_weight_ratio"] or largest) < self.vanishing * largest
        return "vanishing" if low or (self.min_norm is not None and norm < self.min_norm) else "ok"


@dataclasses.dataclass
class _Group:
    """The parameters of one device that have a gradient."""

    names: list[str] = dataclasses.field(default_factory=list)
    sizes: list[int] = dataclasses.field(default_factory=list)  # real numbers in the parameter
    counts: list[int] = dataclasses.field(default_factory=list)  # elements stored: fewer in a sparse gradient
    weights: list[Tensor] = dataclasses.field(default_factory=list)
    values: list[Tensor] = dataclasses.field(default_factory=list)
    unit_names: list[str] = dataclasses.field(default_factory=list)
    unit_grads: list[Tensor] = dataclasses.field(default_factory=list)
    rows: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))  # (parameters, 6)
    dead: list[Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Watched:
    groups: list[_Group]
    before: list[list[Tensor]] | None = None  # the weights before the step, per group
    scale: Tensor | None = None
    skipped: Tensor | None = None


def _bare(model: nn.Module) -> nn.Module:
    """Without the wrappers, so that names have no `module.` or `_orig_mod.` before them."""
    inner: Any = model
    while isinstance(inner, _WRAPPERS) or hasattr(inner, "_orig_mod"):
        inner = inner.module if isinstance(inner, _WRAPPERS) else inner._orig_mod
    return inner


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _values(tensor: Tensor) -> Tensor:
    """The real numbers stored in `tensor`, at least float32: norms overflow early in half precision."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
        tensor = tensor if tensor.numel() else tensor.new_zeros(1)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _rows(values: list[Tensor], weights: list[Tensor]) -> Tensor:
    """(parameters, 6) on the device: sum without NaN, norm of the deviations from the mean, min, max, norm, of weights.

    `torch.var_mean` would take twenty times as long on a CPU.
    """
    wide = torch.float32 if values[0].device.type == "mps" else torch.float64
    sums = [value.nansum(dtype=wide) for value in values]  # infinite only if a value is, even where others are NaN
    ranges = [torch.aminmax(value) for value in values]
    columns = [
        sums,
        [torch.linalg.vector_norm(value - total / value.numel()) for value, total in zip(values, sums, strict=True)],
        [low for low, _ in ranges],
        [high for _, high in ranges],
        torch._foreach_norm(values, 2),
        torch._foreach_norm(weights, 2),
    ]
    return torch.stack([torch.stack(list(column)).to(wide) for column in columns], dim=1)


def _fetch(watched: _Watched) -> tuple[dict[str, tuple[list[float], int, int]], bool]:
    """The one transfer: per parameter its row, elements and stored elements; and whether a scaler skipped the step."""
    tables, target = [], torch.device("cpu")
    for i, group in enumerate(watched.groups):
        target = group.rows.device if target.type == "cpu" else target
        extra = torch.full((len(group.names), 3), math.nan, dtype=group.rows.dtype, device=group.rows.device)
        if watched.before is not None:
            changes = [_values(step) for step in torch._foreach_sub(group.weights, watched.before[i])]
            extra[:, 0] = torch.stack(list(torch._foreach_norm(changes, 2)))
        for name, share in zip(group.unit_names, group.dead, strict=True):
            extra[group.names.index(name), 1] = share
        extra[:, 2] = 0 if watched.skipped is None else watched.skipped.to(extra.device)
        rows = group.rows
        if watched.scale is not None:
            scale = watched.scale.to(rows)
            rows = torch.cat([rows[:, :5] / scale, rows[:, 5:]], dim=1)
        tables.append(torch.cat([rows, extra], dim=1))
    if not tables:
        return {}, False
    table = torch.cat([part.to(target) for part in tables]).tolist()
    names = [name for group in watched.groups for name in group.names]
    sizes = [size for group in watched.groups for size in group.sizes]
    counts = [count for group in watched.groups for count in group.counts]
    return dict(zip(names, zip(table, sizes, counts, strict=True), strict=True)), bool(table[0][8])


def _record(row: list[float], size: int, count: int) -> GradientRecord:
    total, deviation, low, high, norm, weight_norm, change, dead, _ = row
    has_nan = math.isnan(low)
    norm = norm if has_nan else max(norm, -low, high)  # squares of tiny numbers are zero in float32
    mean = math.nan if has_nan else total / size
    if count < size:  # sparse: what is not stored is zero
        low, high = min(low, 0.0), max(high, 0.0)
        deviation = math.sqrt(max(norm * norm - size * mean * mean, 0.0)) if math.isfinite(norm) else math.nan
    return {
        "mean": mean,
        "std": deviation / math.sqrt(max(size - 1, 1)),
        "max": high,
        "min": low,
        "norm": norm,
        "has_nan": has_nan,
        "has_inf": not math.isfinite(total),
        "weight_norm": weight_norm,
        "grad_weight_ratio": norm / weight_norm if weight_norm else None,
        "update_ratio": None if math.isnan(change) or not weight_norm else change / weight_norm,
        "dead_share": None if math.isnan(dead) else dead,
        "verdict": "ok",
    }


def _without_gradient(trainable: bool) -> GradientRecord:
    record: Any = dict.fromkeys(GradientRecord.__annotations__)
    return record | {"has_nan": False, "has_inf": False, "verdict": "no gradient" if trainable else "frozen"}


def _remember(record: GradientRecord, past: _Past, window: int) -> None:
    norm, update = record["norm"], record["update_ratio"]
    if norm is not None and math.isfinite(norm):
        past.norms = [*past.norms, norm][-window:]
        past.highest = max(past.highest, norm)
    if update is not None and math.isfinite(update):
        past.updates = [*past.updates, update][-window:]


def _median(values: list[float]) -> float:
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _details(record: GradientRecord) -> str:
    if record["verdict"] == "non-finite":
        where = ["gradient"] if record["has_nan"] or record["has_inf"] else []
        where += [] if math.isfinite(record["weight_norm"] or 0.0) else ["weights"]
        return f" ({' and '.join(where)})"
    return f" ({record['dead_share']:.0%})" if record["verdict"] == "dead units" else ""
