"""Where and how numbers are computed: device, precision, memory, seeds and random state."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`: `cpu`, `cuda`, `cuda:1`, `mps`, `xpu`; `auto` is the accelerator, else the CPU.

    Raise ValueError if torch does not know the device or it is not available here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:1, mps or xpu") from None
    count = 1 if device.type == "cpu" else 0
    if accelerator is not None and device.type == accelerator.type:
        count = torch.accelerator.device_count()
    if (device.index or 0) >= count:
        raise ValueError(
            f"device {name!r} is not available here ({count} of that kind); "
            "use auto, or run scripts/env_check.py to see why"
        )
    return device


def bf16_is_native(device: torch.device) -> bool:
    """Return whether the hardware computes in bfloat16. Elsewhere bfloat16 is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        if found.get("bf16", False):  # ARM
            return True
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512"  # not if ATEN_CPU_CAPABILITY=avx2 forbids it
        return wide and (found.get("avx512_bf16", False) or found.get("amx_bf16", False))
    return device.type == "xpu"


def cpu_seconds() -> tuple[float, float]:
    """Return seconds: the time, and how long other programs have computed on all cores so far.

    The second is known on Linux only, and 0 elsewhere. Programs that give way to others (`nice`) do not count.
    """
    others = 0.0
    with contextlib.suppress(OSError), open("/proc/stat", encoding="ascii") as file:
        _, user, _, system, *_ = file.readline().split()
        others = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK") - time.process_time()
    return time.monotonic(), others


def busy_cores(since: tuple[float, float]) -> float:
    """Return how many cores other programs have used on average `since` an earlier `cpu_seconds()`, 0.0 if unknown."""
    seconds, others = (now - before for now, before in zip(cpu_seconds(), since, strict=True))
    return max(others, 0.0) / max(seconds, 0.1)


def pick_precision(name: str = "auto", device: torch.device | str = "cpu") -> str:
    """Return `fp32`, `bf16` or `fp16`; `auto` is bf16 where the hardware computes in it, else fp32."""
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}; choose one of {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    return "bf16" if bf16_is_native(torch.device(device)) else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return `torch.autocast` for `precision` on `device`; for `fp32` a context that changes nothing."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def cache_cpu_memory() -> bool:
    """Make glibc keep the memory of freed tensors for the next ones, as torch does on accelerators.

    By default it returns large blocks to the system, and every training step has to take them again: a quarter of a
    step of MNISTNet. The price: the process stays as large as it once was (glibc manual, mallopt). Return False if the
    C library is another one, or if the user has set malloc's own variables.
    """
    if any(name in os.environ for name in MALLOC_VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    return bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))  # never trim the heap, never map a single block


def set_seed(seed: int = 42, deterministic: bool = False) -> None:
    """Seed the global generators of Python, NumPy (if it is loaded) and torch, on all devices.

    `deterministic=True` also makes torch choose deterministic kernels, or raise where there is none; False ends that.
    Raise ValueError for a seed outside 0 to 2**32 - 1, which NumPy refuses.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs to be deterministic
        torch.backends.cudnn.benchmark = False
    if deterministic or torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler: a second
        torch.use_deterministic_algorithms(deterministic)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of all global generators as tensors and plain values, which `weights_only` loading accepts."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type != "cpu":
        index = () if device.type == "mps" else (device,)  # MPS has one device, and its functions take none
        state[device.type] = torch.get_device_module(device).get_rng_state(*index)
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (name, keys.tolist(), *rest)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned. The state of a device of another kind is ignored."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"].cpu())
    if device.type in state:
        index = () if device.type == "mps" else (device,)
        torch.get_device_module(device).set_rng_state(state[device.type].cpu(), *index)
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])


@contextlib.contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Restore the global generators at the end of the block, whatever it draws or seeds."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


def device_name(device: torch.device) -> str:
    """Return the name of the hardware, e.g. `NVIDIA H200` or `AMD EPYC 9654, 2 threads`."""
    if device.type == "mps":
        return f"Apple {platform.machine()} GPU"
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished all work given to it, as one must before reading a clock."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def check_pytorch_environment() -> torch.device:
    """Print what there is to compute with, and return the device of `auto`. `scripts/env_check.py` is the long form."""
    device = pick_device()
    name = device_name(device)
    if device.type in ("cuda", "xpu"):
        memory = torch.get_device_module(device).get_device_properties(device).total_memory
        name += f", {memory / 2**30:.0f} GiB (1 of {torch.accelerator.device_count()})"
    print(f"torch      {torch.__version__} (CUDA {torch.version.cuda or 'none'}), Python {platform.python_version()}")
    print(f"device     {device}: {name}")
    print(f"precision  {pick_precision('auto', device)} (bf16 is {'native' if bf16_is_native(device) else 'emulated'})")
    print(f"threads    {torch.get_num_threads()} of {os.cpu_count()} processors")
    return device
