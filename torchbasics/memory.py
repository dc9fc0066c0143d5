"""Memory: what is in use, the peak of each phase, what a model will need before it runs, what fits, and what leaks.

All numbers are bytes; `format_memory` prints them. This file imports nothing but torch and can be copied away alone.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import sys
import tempfile
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

CUDA_BLOCK = 512  # bytes; torch's CUDA allocator rounds every size up to a multiple of it
_WITH_ALLOCATOR = ("cuda", "xpu")  # devices whose allocator counts, also the peak


def get_memory_info(device: torch.device | str | None = None) -> dict[str, int]:
    """The memory in use now, in bytes; `device` is by default the current accelerator, else the CPU.

    CUDA and XPU: `allocated` to tensors, `reserved` from the driver for them, the peaks of both, `slack` (reserved but
    not allocated), `outside` torch (the context, libraries, other processes), `available`, `total`.
    MPS: `allocated`, `reserved`, `slack`, `total` (what is recommended).
    CPU: of this process `resident` and `peak_resident`; of the machine (or its container) `available` and `total`;
    each only where the system tells it (Linux all, macOS the peak).
    """
    place = _device(device)
    if place.type in _WITH_ALLOCATOR:
        return _allocator_info(place)
    if place.type == "mps":
        allocated, reserved = torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
        return {
            "allocated": allocated,
            "reserved": reserved,
            "slack": reserved - allocated,
            "total": torch.mps.recommended_max_memory(),
        }
    return _process_info()


def _allocator_info(device: torch.device) -> dict[str, int]:
    module = getattr(torch, device.type)
    free, total = module.mem_get_info(device)
    allocated, reserved = module.memory_allocated(device), module.memory_reserved(device)
    return {
        "allocated": allocated,
        "reserved": reserved,
        "peak_allocated": module.max_memory_allocated(device),
        "peak_reserved": module.max_memory_reserved(device),
        "slack": reserved - allocated,
        "outside": total - free - reserved,
        "available": free + reserved - allocated,
        "total": total,
    }


def _process_info() -> dict[str, int]:
    status, machine = _proc("/proc/self/status"), _proc("/proc/meminfo")
    found = {
        "resident": status.get("VmRSS"),
        "peak_resident": status.get("VmHWM", _peak_resident()),
        "available": machine.get("MemAvailable"),
        "total": machine.get("MemTotal"),
    }
    info = {name: value for name, value in found.items() if value is not None}
    with contextlib.suppress(OSError, ValueError, KeyError):  # a container may have less than its machine
        folder = Path("/sys/fs/cgroup")
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        info["total"] = min(info["total"], limit)
        kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used -= int(kept["inactive_file"])  # of files that were read; given back when asked for
        info["available"] = min(info["available"], max(limit - used, 0))
    return info


def _proc(path: str) -> dict[str, int]:
    """The lines `Name:  123 kB` of a file of Linux, in bytes; nothing where there is no such file."""
    found = {}
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if value.rstrip().endswith("kB"):
                found[name] = int(value.split()[0]) * 1024
    return found


def _peak_resident() -> int | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def format_memory(info: dict[str, Any]) -> str:
    """One line per entry of `info`: bytes in a unit that suits, other values as they are."""
    width = max(map(len, info), default=0)
    return "\n".join(f"{name.replace('_', ' '):{width}}  {_readable(name, value)}" for name, value in info.items())


def _readable(name: str, value: Any) -> str:
    if name == "error":
        return f"{value:>+12.1%}"
    size, units = float(value), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:>8.0f} B" if units[0] == "B" else f"{size:>8.1f} {units[0]}"


# ---------------------------------------------------------------------------------------------------- before running


def estimate_model_memory(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    input_shape: Sequence[int] | None = None,
    *,
    inputs: Any = None,
    dtype: torch.dtype = torch.float32,
    loss: Callable[[Any], Tensor] | None = None,
    precision: str = "fp32",
    measure: bool = False,
) -> dict[str, Any]:
    """What training `model` needs, in bytes, by running two steps on fake tensors: nothing is allocated or changed.

    `parameters`, `buffers`, `gradients`, and `optimizer_state`: what this very optimizer makes in a step, not "times
    four". With `input_shape` (batch first, of `dtype`), or `inputs` for `model(inputs)`: also `inputs`,
    `activations` (alive at the end of the forward: what backward needs, outputs and loss) and as `total` the peak: the
    most that is alive at any moment, so not the sum of the parts, which are not all alive at once. Without: their sum.

    Measured by torch's profiler on a CPU (torch 2.15): +0.1% to -1.8% off for MNISTNet, resnet18 and an MLP with SGD,
    momentum and Adam. Not seen: what a kernel takes inside (workspaces of cuDNN and cuBLAS), fragments of the
    allocator, the context of CUDA. `measure=True` also runs two steps on a copy, for `measured` (by the allocator's
    counter, on a CPU by the profiler) and the estimate's `error` (-0.02: 2% too low).

    Args:
        loss: what backward starts from, as a function of the outputs; by default their mean square.
        precision: `fp32`, or `bf16` or `fp16` under autocast.

    Raises ValueError for an optimizer of another model, or one that needs a closure; RuntimeError if the model looks
    at values (`.item()`, `nonzero`), which fake tensors do not have. The method is that of torch's own
    `torch.distributed._tools.mem_tracker`, which is private.
    """
    if inputs is None and input_shape is not None:
        inputs = torch.empty(tuple(input_shape), dtype=dtype, device="meta")
    plan = _Plan(_bare(model), optimizer, inputs, loss or _mean_square, precision)
    _check_optimizer(plan)
    try:
        found = _run(plan, FakeTensorMode(allow_non_fake_inputs=True))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise RuntimeError(
            f"{type(plan.model).__name__} looks at the values of tensors ({error}), so it cannot be estimated; "
            "leave input_shape out, or measure a step with MemoryTracker.phase"
        ) from error
    if measure and inputs is not None:
        found["measured"] = _measured_peak(plan)
        found["error"] = found["total"] / found["measured"] - 1
    return found


class _Plan(NamedTuple):
    model: nn.Module
    optimizer: Optimizer | None
    inputs: Any
    loss: Callable[[Any], Tensor]
    precision: str

    @property
    def device(self) -> torch.device:
        first = next(chain(self.model.parameters(), self.model.buffers()), None)
        return first.device if first is not None else torch.device("cpu")


def _check_optimizer(plan: _Plan) -> None:
    if plan.optimizer is None:
        return
    if isinstance(plan.optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS needs a closure and cannot be estimated; count its history_size × 2 × parameters")
    own = {id(parameter) for parameter in plan.model.parameters()}
    if not any(id(p) in own for group in plan.optimizer.param_groups for p in group["params"]):
        raise ValueError("the optimizer has none of the model's parameters; give the one that trains this model")


def _run(plan: _Plan, fake: FakeTensorMode | None) -> dict[str, Any]:
    """The bytes of each part and the peak of two training steps, on fake tensors, or (None) on real copies."""
    live = LiveBytes(CUDA_BLOCK if plan.device.type == "cuda" else 1)
    with _attributes_kept(plan.model), _random_kept(plan.device), fake or contextlib.nullcontext():
        parameters, buffers, optimizer = _twins(plan)  # fake here: a clone under a FakeTensorMode takes no memory
        with live:
            found = {"parameters": live.see(parameters), "buffers": live.see(buffers)}
            if plan.inputs is None:
                found |= _without_inputs(parameters, optimizer)
            else:
                for _ in range(2):  # the second has the optimizer's state from its beginning
                    found |= _step(plan, parameters, buffers, optimizer, live)
                found["total"] = live.peak
        found["optimizer_state"] = _bytes(optimizer.state) if optimizer is not None else 0
    total = found.pop("total", None) or sum(found.values())
    order = ("parameters", "buffers", "gradients", "optimizer_state", "inputs", "activations")
    return {name: found[name] for name in order if name in found} | {"total": total}


def _twins(plan: _Plan) -> tuple[dict[str, Tensor], dict[str, Tensor], Optimizer | None]:
    """Copies of the parameters and buffers by name, and an optimizer like the plan's over them."""

    def twin(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    parameters = {name: twin(tensor) for name, tensor in plan.model.named_parameters()}
    buffers = {name: twin(tensor) for name, tensor in plan.model.named_buffers()}
    if plan.optimizer is None:
        return parameters, buffers, None
    twins = {id(p): parameters[name] for name, p in plan.model.named_parameters()}
    return parameters, buffers, _optimizer_of(twins, plan.optimizer, twin)


def _step(plan: _Plan, parameters: Any, buffers: Any, optimizer: Optimizer | None, live: LiveBytes) -> dict[str, int]:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan.precision)
    inputs = _zeros_like(plan.inputs, plan.device)
    sizes = {"inputs": live.see(inputs)}
    before = live.now
    with torch.enable_grad(), torch.autocast(plan.device.type, dtype=half or torch.bfloat16, enabled=half is not None):
        outputs = functional_call(plan.model, (parameters, buffers), (inputs,))
    loss = plan.loss(outputs)
    sizes["activations"] = live.now - before
    if loss.requires_grad:
        loss.backward()
    sizes["gradients"] = _bytes([parameter.grad for parameter in parameters.values()])
    if optimizer is not None:
        _take_step(optimizer)
    for parameter in parameters.values():
        parameter.grad = None
    return sizes


def _without_inputs(parameters: dict[str, Tensor], optimizer: Optimizer | None) -> dict[str, int]:
    for parameter in parameters.values():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    if optimizer is not None:
        _take_step(optimizer)
    return {"gradients": _bytes([parameter.grad for parameter in parameters.values()])}


def _take_step(optimizer: Optimizer) -> None:
    is_fake = isinstance(optimizer.param_groups[0]["params"][0], FakeTensor)
    with _OneForValues() if is_fake else contextlib.nullcontext():
        optimizer.step()


class _OneForValues(TorchDispatchMode):
    """`.item()` of a fake tensor is 1: an optimizer that looks at a norm (Adafactor) makes the same state anyhow."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 1 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def _optimizer_of(twins: dict[int, Tensor], optimizer: Optimizer, twin: Callable[[Tensor], Tensor]) -> Optimizer:
    """Another of the same kind and options, without state and hooks, over the twins of its parameters."""
    other = copy.copy(optimizer)
    for name, value in vars(optimizer).items():
        if name not in vars(other) and not callable(value):  # a schedule puts a `step` there that is the original's
            setattr(other, name, value)
    other.state = defaultdict(dict)
    other.param_groups = []
    for group in optimizer.param_groups:
        own = [twins[id(p)] if id(p) in twins else twin(p) for p in group["params"]]
        choice = {}
        if group.get("foreach", 0) is None and not group.get("fused") and own and own[0].device.type != "cpu":
            choice = {"foreach": True}  # torch's default for real tensors, with its temporary lists
        other.param_groups.append({**group, "params": own, **choice})
    return other


def _zeros_like(value: Any, device: torch.device) -> Any:
    """Zeros like the tensors in `value`."""
    if isinstance(value, Tensor):
        return torch.zeros(value.shape, dtype=value.dtype, device=device)
    if isinstance(value, dict):
        return {key: _zeros_like(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_zeros_like(item, device) for item in value)
    return value


def _mean_square(outputs: Any) -> Tensor:
    return torch.stack([t.float().square().mean() for t in _tensors(outputs) if t.is_floating_point()]).sum()


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """What the modules keep of a run, such as a cached tensor, is forgotten."""
    kept = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in kept:
            vars(module).clear()
            vars(module).update(attributes)


def _random_kept(device: torch.device) -> Any:
    return (
        torch.random.fork_rng([])
        if device.type == "cpu"
        else torch.random.fork_rng([device.index or 0], device_type=device.type)
    )


def _measured_peak(plan: _Plan) -> int:
    """The peak of the same two steps on real copies, beyond what is allocated now."""
    if plan.device.type in _WITH_ALLOCATOR:
        module = getattr(torch, plan.device.type)
        start = module.memory_allocated(plan.device)
        module.reset_peak_memory_stats(plan.device)
        _run(plan, None)
        return module.max_memory_allocated(plan.device) - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            _run(plan, None)
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))


def find_batch_size(
    model: nn.Module,
    sample_shape: Sequence[int],
    optimizer: Optimizer | None = None,
    budget: int | None = None,
    *,
    max_batch_size: int = 65536,
    dtype: torch.dtype = torch.float32,
    loss: Callable[[Any], Tensor] | None = None,
    precision: str = "fp32",
) -> int:
    """The largest batch of samples of `sample_shape` whose training fits into `budget` bytes, by estimation.

    `budget` counts everything, the model too; by default nine tenths of what is available, and what the model has
    already. Nothing is allocated to find out; on an accelerator forward and backward are then tried once with that
    size, and again with a tenth less while memory runs out. Raises ValueError if not even one sample fits.
    """
    device = _Plan(model, None, None, _mean_square, precision).device
    limit = _default_budget(model, optimizer, device) if budget is None else budget

    def total(size: int) -> int:
        shape = (size, *sample_shape)
        return estimate_model_memory(model, optimizer, shape, dtype=dtype, loss=loss, precision=precision)["total"]

    size = _largest(total, limit, max_batch_size)
    if device.type != "cpu":
        plan = _Plan(_bare(model), None, None, loss or _mean_square, precision)
        ballast = estimate_model_memory(model, optimizer)["optimizer_state"]
        while size and not _runs(plan, torch.empty((size, *sample_shape), dtype=dtype, device="meta"), ballast):
            size = size * 9 // 10
    if not size:
        raise ValueError(f"not even one sample fits into {limit:,} bytes: a smaller model, or a larger budget")
    return size


def _default_budget(model: nn.Module, optimizer: Optimizer | None, device: torch.device) -> int:
    info = get_memory_info(device)
    available = info.get("available", info.get("total", 0) - info.get("reserved", 0))
    if available <= 0:
        what = "no memory is left on" if "available" in info else "the system does not tell how much memory is on"
        raise ValueError(f"{what} {device}; give a budget in bytes")
    held = [list(model.parameters()), list(model.buffers()), optimizer.state if optimizer is not None else ()]
    return available * 9 // 10 + _bytes(held)


def _largest(total: Callable[[int], int], limit: int, most: int) -> int:
    """The largest size up to `most` whose `total` is within `limit`; 0 if none. `total` grows, mostly along a line.

    So the line through the last two points tells the next guess; bisection helps where there is none.
    """
    if most < 2 or total(2) > limit:  # 1 comes last: BatchNorm cannot train on one sample
        return int(most >= 1 and total(1) <= limit)
    low, high, before, guess, tries = 2, most + 1, (2, total(2)), 4, 0
    while high - low > 1:
        guess, tries = min(max(guess, low + 1), high - 1), tries + 1
        bytes_ = total(guess)
        low, high = (guess, high) if bytes_ <= limit else (low, guess)
        slope, before = (bytes_ - before[1]) / (guess - before[0]), (guess, bytes_)
        guess = guess + int((limit - bytes_) // slope) if slope > 0 and tries % 4 else (low + high) // 2
    return low


def _runs(plan: _Plan, inputs: Tensor, ballast: int) -> bool:
    """Whether forward and backward run without running out of memory, beside `ballast` bytes; changes nothing."""
    parameters = {n: p.detach().requires_grad_(p.requires_grad) for n, p in plan.model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in plan.model.named_buffers()}
    out_of_memory = False
    with _attributes_kept(plan.model), _random_kept(plan.device):
        try:
            weight = torch.empty(ballast, dtype=torch.uint8, device=plan.device)
            _step(plan._replace(inputs=inputs), parameters, buffers, None, LiveBytes())
            del weight
        except torch.OutOfMemoryError:
            out_of_memory = True
    if out_of_memory and plan.device.type in _WITH_ALLOCATOR:  # here, where no traceback holds the tensors any more
        getattr(torch, plan.device.type).empty_cache()
    return not out_of_memory


# ------------------------------------------------------------------------------------------------- while it is running


class MemoryTracker:
    """Peaks per phase, leaks and snapshots on `device`: by default the current accelerator, else the CPU.

    `MemoryTracker.get_memory_info()` and `.estimate_model_memory(model)` also work without an instance.

        tracker = MemoryTracker()
        with tracker.phase("forward"):
            loss = criterion(model(inputs), targets)
        with tracker.phase("backward"):
            loss.backward()
        print(format_memory(tracker.peaks))

    On CUDA and XPU the allocator counts; a phase starts torch's peak counter anew (the tracker's own `get_memory_info`
    remembers the highest). Elsewhere the bytes of all tensors that the operations in the phases meet are counted: that
    takes some 10 µs per operation, does not see what a kernel takes inside, and not what torch.compile has compiled.
    `history=True` (CUDA): remember who allocated what, for `snapshot`.
    """

    def __init__(self, device: torch.device | str | None = None, *, history: bool = False) -> None:
        self.device = _device(device)
        self.peaks: dict[str, int] = {}
        self._live = LiveBytes()
        self._open: list[int] = []  # per phase that is open, the highest so far
        self._highest: dict[str, int] = {}
        self.get_memory_info = partial(self._info, self.device)  # type: ignore[method-assign]
        if history:
            self._need_cuda("history")
            torch.cuda.memory._record_memory_history(device=self.device)

    @staticmethod
    def get_memory_info(device: torch.device | str | None = None) -> dict[str, int]:
        """As the function `get_memory_info`; of an instance, by default for its device."""
        return get_memory_info(device)

    estimate_model_memory = staticmethod(estimate_model_memory)
    find_batch_size = staticmethod(find_batch_size)

    def _info(self, device: torch.device | str | None) -> dict[str, int]:
        info = get_memory_info(device)
        own = _device(device) == self.device
        return {name: max(value, self._highest.get(name, 0)) if own else value for name, value in info.items()}

    def print_memory_info(self) -> None:
        """Prints the device and `get_memory_info()`."""
        print(f"memory of {self.device}\n{format_memory(self.get_memory_info())}")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the peak of what happens inside to `peaks[name]`: the highest, if the phase comes more than once.

        In bytes and absolute: what was alive before counts. Phases may hold others.
        """
        if self._open:
            self._open[-1] = max(self._open[-1], self._read_peak())
        self._reset_peak()
        self._open.append(0)
        try:
            with contextlib.nullcontext() if self._counts else self._live:
                yield
        finally:
            peak = max(self._open.pop(), self._read_peak())
            self.peaks[name] = max(self.peaks.get(name, 0), peak)

    @property
    def _counts(self) -> bool:
        return self.device.type in _WITH_ALLOCATOR

    def _read_peak(self) -> int:
        return getattr(torch, self.device.type).max_memory_allocated(self.device) if self._counts else self._live.peak

    def _reset_peak(self) -> None:
        if self._counts:
            info = self._info(self.device)
            self._highest = {name: value for name, value in info.items() if name.startswith("peak")}
            getattr(torch, self.device.type).reset_peak_memory_stats(self.device)
        self._live.peak = self._live.now

    def check_leak(self, step: Callable[[], Any], steps: int = 10, warmup: int = 3) -> dict[str, Any]:
        """Runs equal steps and says whether the tensors alive after them grow.

        Returns `leaking`, `bytes_per_step` (mean), `readings` (bytes after each step beyond those after the warm-up,
        with the garbage collected) and `growing`: what there is more of, by size, shape, type and the operation that
        made it. A leak grows in both halves of the steps: what is made once, on first use, is none. On every device
        it is tensors that are counted; memory outside torch is not seen.
        """
        if steps < 4 or warmup < 1:
            raise ValueError(f"need steps >= 4 and warmup >= 1, got {steps} and {warmup}")
        live, readings = LiveBytes(), []
        with _quick_collection():
            for i in range(warmup + steps):
                with live:
                    step()
                gc.collect()
                if i == warmup - 1:
                    first, known = live.now, set(live.alive)
                elif i >= warmup:
                    readings.append(live.now - first)
        new = Counter(entry.made_by for key, entry in live.alive.items() if key not in known)
        return {
            "leaking": readings[-1] > readings[steps // 2 - 1] > 0,
            "bytes_per_step": readings[-1] / steps,
            "readings": readings,
            "growing": [f"{count} × {what}" for what, count in new.most_common() if count >= steps // 2],
        }

    def snapshot(self, path: str | os.PathLike) -> Path:
        """Writes what torch's CUDA allocator holds, for https://docs.pytorch.org/memory_viz; returns the path.

        With `history=True` also who allocated it. The file is a pickle: open only your own. RuntimeError elsewhere.
        """
        self._need_cuda("snapshot")
        torch.cuda.memory._dump_snapshot(os.fspath(path))
        return Path(path)

    def _need_cuda(self, what: str) -> None:
        if self.device.type != "cuda":
            raise RuntimeError(
                f"{what} needs torch's CUDA allocator, and this tracker is for {self.device}; "
                "use phase and check_leak here"
            )


# --------------------------------------------------------------------------------------------------- counting tensors


class _Alive(NamedTuple):
    storage: weakref.ref
    size: int
    made_by: str


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of the storages that operations take or make, until they die: `now` and `peak`.

    Sees every operation, backward's too, on real and on fake tensors. Sizes are rounded up to multiples of `block`.
    A storage that many tensors share counts once. `alive` holds what there is.
    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.block = block
        self.alive: dict[int, _Alive] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.see((args, kwargs))
        out = func(*args, **(kwargs or {}))
        self.see(out, made_by=str(func))
        return out

    def see(self, value: Any, made_by: str = "before") -> int:
        """Counts the tensors in `value`; returns their bytes, also of those that were counted before."""
        storages = {storage._cdata: storage for tensor in _tensors(value) for storage in _storages(tensor)}
        for key, storage in storages.items():
            known = self.alive.get(key)
            if storage.nbytes() and (known is None or known.storage() is not storage):
                self._add(key, storage, made_by)
        return sum(self.alive[key].size for key in storages if key in self.alive)

    def _add(self, key: int, storage: Any, made_by: str) -> None:
        size = -(-storage.nbytes() // self.block) * self.block

        def gone(_: Any) -> None:
            self.now -= size
            self.alive.pop(key, None)

        self.alive[key] = _Alive(weakref.ref(storage, gone), size, f"{size:,} bytes by {made_by}")
        self.now += size
        self.peak = max(self.peak, self.now)


@contextlib.contextmanager
def _quick_collection() -> Iterator[None]:
    """`gc.collect` looks only at objects made inside: there may be millions from before."""
    mine = gc.get_freeze_count() == 0
    if mine:
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


def _storages(tensor: Tensor) -> list[Any]:
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices().untyped_storage(), tensor._values().untyped_storage()]
    return [tensor.untyped_storage()] if tensor.layout == torch.strided else []


def _bytes(value: Any) -> int:
    """Of the storages of all tensors in `value`, each once."""
    return sum({s._cdata: s.nbytes() for tensor in _tensors(value) for s in _storages(tensor)}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for item in value.values() for tensor in _tensors(item))
    elif isinstance(value, (list, tuple)):
        yield from (tensor for item in value for tensor in _tensors(item))


def _device(name: torch.device | str | None) -> torch.device:
    """`name`, or the current accelerator, or the CPU; with an index where there are several of a kind."""
    current = torch.accelerator.current_accelerator(check_available=True)
    place = torch.device(name) if name is not None else current or torch.device("cpu")
    if place.type in _WITH_ALLOCATOR and place.index is None:
        return torch.device(place.type, torch.accelerator.current_device_index())
    return place


def _bare(model: nn.Module) -> nn.Module:
    """Without the wrappers: their processes must not wait for each other here."""
    inner: Any = model
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    while isinstance(inner, wrappers) or hasattr(inner, "_orig_mod"):
        inner = inner.module if isinstance(inner, wrappers) else inner._orig_mod
    return inner
