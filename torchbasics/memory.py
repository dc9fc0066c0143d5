"""Memory in use, the peak of each phase, what training a model will take, and the batch size that fits.

All numbers are bytes. This file imports nothing but torch and can be copied alone.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import json
import os
import tempfile
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_phase_lock = threading.Lock()  # torch.profiler crashes when one profile starts inside another


class MemoryTracker:
    """Record the peak memory of each phase of a program on `device`: by default the current accelerator, else the CPU.

        tracker = MemoryTracker()
        with tracker.phase("forward"):
            loss = criterion(model(inputs), targets)
        with tracker.phase("backward"):
            loss.backward()
        tracker.print_memory_info()

    `peaks` maps each phase to its peak in bytes. The other methods need no instance.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = _choose_device(device)
        self.peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record in `peaks[name]` the most bytes held at once inside, beyond those held when the phase began.

        A repeated phase keeps its highest peak. On accelerators the allocator counts: its peak statistics are reset. On
        a CPU `torch.profiler` counts, so no other profile may be running. Raise RuntimeError inside another phase.
        """
        if not _phase_lock.acquire(blocking=False):
            raise RuntimeError(f"phase {name!r} begins inside another phase; phases must not overlap")
        try:
            if self.device.type == "cpu":
                os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report its progress on stderr
                activities = [torch.profiler.ProfilerActivity.CPU]
                with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
                    yield
                peak = _profiled_peak(profiler)
            else:
                allocator = torch.get_device_module(self.device)
                allocator.reset_peak_memory_stats(self.device)
                before = allocator.memory_allocated(self.device)
                yield
                peak = allocator.max_memory_allocated(self.device) - before
        finally:
            _phase_lock.release()
        self.peaks[name] = max(self.peaks.get(name, 0), peak)

    def print_memory_info(self) -> None:
        """Print the memory in use on the tracker's device, and the peak of each phase, in MiB (2**20 bytes)."""
        for title, sizes in (("in use", self.get_memory_info(self.device)), ("peak of each phase", self.peaks)):
            print(f"{title} on {self.device}")
            for name, size in sizes.items():
                print(f"  {name.replace('_', ' '):16}  {size / 2**20:>12,.2f} MiB")

    @staticmethod
    def get_memory_info(device: torch.device | str | None = None) -> dict[str, int]:
        """Return the memory in use now, in bytes, on `device`: by default the current accelerator, else the CPU.

        CUDA and XPU: `allocated` to tensors, `peak_allocated`, `reserved` from the driver, `available`, `total`.
        MPS: `allocated`, `reserved`. CPU, on Linux only: `resident` and `peak_resident` of this process, `available`
        and `total` of the machine (a container may have less).
        """
        device = _choose_device(device)
        if device.type == "cpu":
            return _process_memory()
        if device.type == "mps":
            return {"allocated": torch.mps.current_allocated_memory(), "reserved": torch.mps.driver_allocated_memory()}
        allocator = torch.get_device_module(device)
        free, total = allocator.mem_get_info(device)
        allocated, reserved = allocator.memory_allocated(device), allocator.memory_reserved(device)
        return {
            "allocated": allocated,
            "peak_allocated": allocator.max_memory_allocated(device),
            "reserved": reserved,
            "available": free + reserved - allocated,
            "total": total,
        }

    @staticmethod
    def estimate_model_memory(
        model: nn.Module, optimizer: Optimizer | None = None, input_shape: Sequence[int] | None = None, *,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, int]:  # fmt: skip
        """Return what training `model` takes, in bytes (not MB), by part and in total.

        - `parameters`, `buffers`, and `gradients` of the parameters that are not frozen.
        - `optimizer`: the state that `optimizer` keeps for its parameters, such as two averages for Adam.
        - `inputs`: a batch of `input_shape` (B, …) and `dtype`: `torch.long` for a model that begins with an embedding.
          Without `input_shape` this and the next two are 0.
        - `activations`: what a forward pass leaves for backward: the tensors that autograd saves and the outputs,
          without parameters, buffers and inputs. Tensors that share a storage count once.
        - `temporary`: an allowance for what comes and goes in a step: in backward the gradients of the outputs and of
          the largest activation; in the optimizer's step, when activations are gone, one parameter's state once more.
        - `total`: their sum. It assumes that all gradients are alive beside all activations, as in accumulation.

        The activations are those of a batch of 2 and one of 4, all ones, extrapolated to B. They run in training mode
        on a copy that shares the parameters. For mixed precision call this inside `torch.autocast`. Pass the bare
        model, not its DDP wrapper; on the meta device it takes no memory. Not included: the loss, and CUDA's context
        and workspaces. On a CPU (18 small models) activations were 1.00 to 1.02 times those that torch.profiler saw,
        totals 0.81 to 1.36 times the peak.
        """
        if input_shape is None:
            parts = _fixed_parts(model, optimizer) | {"inputs": 0, "activations": 0, "temporary": 0}
            return parts | {"total": sum(parts.values())}
        return _estimator(model, optimizer, input_shape[1:], dtype)(input_shape[0])

    @staticmethod
    def find_batch_size(
        model: nn.Module, optimizer: Optimizer | None, sample_shape: Sequence[int], budget: int | None = None, *,
        dtype: torch.dtype = torch.float32, max_batch_size: int = 65536,
    ) -> int:  # fmt: skip
        """Return the largest batch size whose estimated total fits into `budget` bytes, without trying it out.

        `sample_shape` is the shape of one input, without the batch dimension. `budget` includes the model; by default
        it is 90% of the memory available on the model's device, and what the model occupies already. Raise ValueError
        if not even one sample fits, or if the available memory is not known.
        """
        estimate = _estimator(model, optimizer, sample_shape, dtype)
        if budget is None:
            info = MemoryTracker.get_memory_info(_device_of(model))
            if "available" not in info:
                raise ValueError("this system does not report its available memory; give a budget in bytes")
            budget = info["available"] * 9 // 10 + estimate(0)["parameters"] + estimate(0)["buffers"]
        sizes = range(1, max_batch_size + 1)
        fitting = bisect.bisect_right(sizes, budget, key=lambda batch_size: estimate(batch_size)["total"])
        if fitting == 0:
            raise ValueError(f"not even one sample fits into {budget:,} bytes; use a smaller model or a larger budget")
        return sizes[fitting - 1]


def _estimator(
    model: nn.Module, optimizer: Optimizer | None, sample_shape: Sequence[int], dtype: torch.dtype
) -> Callable[[int], dict[str, int]]:
    """Measure once; return a function from a batch size to the parts of its estimate."""
    fixed = _fixed_parts(model, optimizer)
    largest_state = max(_state_sizes(optimizer), default=0)
    two, four = (_measure_forward(model, (size, *sample_shape), dtype) for size in (2, 4))

    def estimate(batch_size: int) -> dict[str, int]:
        # A line through both: 100 bytes for 2 and 180 for 4 are 40 per sample, and 20 whatever the size.
        parts = {name: max(0, two[name] + (four[name] - two[name]) * (batch_size - 2) // 2) for name in two}
        parts["temporary"] = max(parts["temporary"], largest_state - parts["activations"])
        parts = fixed | parts  # in the order of the docstring
        return parts | {"total": sum(parts.values())}

    return estimate


def _fixed_parts(model: nn.Module, optimizer: Optimizer | None) -> dict[str, int]:
    # `numel`, unlike `nbytes`, raises for the parameters of a lazy module that has not run yet.
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    return {
        "parameters": sum(size for size, _ in sizes),
        "buffers": sum(buffer.nbytes for buffer in model.buffers()),
        "gradients": sum(size for size, trained in sizes if trained),
        "optimizer": sum(_state_sizes(optimizer)),
    }


def _measure_forward(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    """Run `model` in training mode on ones of `shape`; return the bytes of `inputs`, `activations`, `temporary`."""
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})  # which are shared
    if not model.training:  # else submodules may be in eval mode on purpose
        model.train()
    device = _device_of(model)
    inputs = torch.ones(shape, dtype=dtype, device=device)  # not zeros, which may mean padding
    saved: list[weakref.ref[Tensor]] = []  # weak, as forward may drop again what it saved

    def pack(tensor: Tensor) -> Tensor:
        packed = tensor.detach()  # a saved output would otherwise hold its own graph for ever (pytorch#115255)
        saved.append(weakref.ref(packed))
        return packed

    keep_random_state = torch.random.fork_rng([])
    if device.type in ("cuda", "xpu"):
        keep_random_state = torch.random.fork_rng([device], device_type=device.type)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keep_random_state, torch.enable_grad(), hooks:
        outputs = _tensors(model(inputs))
    alive = [tensor for tensor in [reference() for reference in saved] if tensor is not None]
    others = {tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers(), inputs]}
    sizes = [storage.nbytes() for storage in {tensor.untyped_storage() for tensor in [*alive, *outputs]} - others]
    return {
        "inputs": inputs.nbytes,
        "activations": sum(sizes),
        "temporary": sum(output.nbytes for output in outputs) + max(sizes, default=0),
    }


def _state_sizes(optimizer: Optimizer | None) -> list[int]:
    """Return the bytes of the optimizer's state for each parameter that it trains."""
    if optimizer is None:
        return []
    sizes = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                state = optimizer.state.get(parameter) or _state_after_one_step(optimizer, group, parameter)
                sizes.append(sum(tensor.nbytes for tensor in _tensors(state)))
    return sizes


def _state_after_one_step(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return what a copy of `optimizer` keeps for a parameter like this one; the optimizer itself takes no step."""
    twin = nn.Parameter(torch.zeros_like(parameter))
    twin.grad = torch.zeros_like(parameter)
    other = copy.copy(optimizer)
    other.param_groups = [{**group, "params": [twin]}]
    other.state = defaultdict(dict)
    other.step()
    return other.state[twin]


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a nest of tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _profiled_peak(profiler: torch.profiler.profile) -> int:
    """Return the most bytes held at once on the CPU while `profiler` ran, beyond those held at its start."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))  # the one public place with each allocation and its time
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    changes.sort(key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in changes), initial=0))


def _process_memory() -> dict[str, int]:
    """Return the memory of this process and of the machine from Linux's /proc, and nothing elsewhere."""
    fields: dict[str, str] = {}
    for path in ("/proc/self/status", "/proc/meminfo"):
        with contextlib.suppress(OSError):
            lines = Path(path).read_text(encoding="utf-8").splitlines()  # such as "MemTotal:  16315280 kB"
            fields |= dict(line.split(":", 1) for line in lines)
    names = {"resident": "VmRSS", "peak_resident": "VmHWM", "available": "MemAvailable", "total": "MemTotal"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items() if field in fields}


def _device_of(model: nn.Module) -> torch.device:
    return next(chain(model.parameters(), model.buffers()), torch.empty(0)).device


def _choose_device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
