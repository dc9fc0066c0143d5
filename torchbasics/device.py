"""Where and how numbers are computed: device, precision, memory, seeds, threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
import sys
from collections.abc import Iterator

import torch

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """Returns the device called `name`; `auto` takes the accelerator that is there, else the CPU.

    `name` may carry an index (`cuda:1`). Raises ValueError if that device is unknown or not available here.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return next((torch.device(kind) for kind in DEVICES[2:] if _device_count(kind)), torch.device("cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; choose one of {', '.join(DEVICES)} (or cuda:1 …)") from None
    if device.type not in DEVICES:
        raise ValueError(f"unsupported device {name!r}; choose one of {', '.join(DEVICES)}")
    if (device.index or 0) >= _device_count(device.type):
        raise ValueError(
            f"device {name!r} is not available here ({_device_count(device.type)} of that kind); "
            "use --device auto, or run scripts/env_check.py to see why"
        )
    return device


def _device_count(kind: str) -> int:
    if kind == "cpu":
        return 1
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    backend = getattr(torch, kind)
    return backend.device_count() if backend.is_available() else 0


def bf16_is_native(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        cpu = torch.cpu  # its feature tests have changed names over the releases: ask for each
        found = cpu.get_capabilities() if hasattr(cpu, "get_capabilities") else {}
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16")) or any(
            getattr(cpu, test, bool)() for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    return device.type == "xpu"


def pick_precision(name: str = "auto", device: torch.device | str = "cpu") -> str:
    """Returns `fp32`, `bf16` or `fp16`; `auto` is bf16 where the hardware runs it natively, else fp32."""
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}; choose one of {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    return "bf16" if bf16_is_native(torch.device(device)) else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """`torch.autocast` for `precision` on `device`; with `fp32` it changes nothing."""
    if precision == "fp32":
        return contextlib.nullcontext()  # a disabled autocast takes as long as a small layer
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPES[precision])


def cache_cpu_memory() -> bool:
    """Makes the C library keep the memory of freed tensors for the next ones, as torch does on accelerators.

    By default glibc returns large blocks to the system, and every training step has to take them again, page by page:
    of a step of MNISTNet that is a quarter. The process stays as large as it once was (glibc manual, mallopt).

    Returns whether the C library agreed: not without glibc, nor where the user has set malloc's own variables.
    """
    if any(name in os.environ for name in MALLOC_VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Windows, musl
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    return bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))  # give nothing back; map no block of its own


def set_seed(seed: int = 42, deterministic: bool = False) -> None:
    """Seeds Python's, NumPy's (if loaded) and torch's global generators, on all devices.

    `deterministic=True` also makes torch choose deterministic kernels, or raise where there is none; False ends that.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be between 0 and 2**32 - 1, got {seed}")
    _seed_all(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it; see its reproducibility notes
        torch.backends.cudnn.benchmark = False
    if deterministic or torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler: a second
        torch.use_deterministic_algorithms(deterministic)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def random_state(device: torch.device) -> dict:
    """The state of all global generators, as tensors and plain values (so that `weights_only` loading reads it)."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state(*_which(device))
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (str(name), keys.tolist(), *(float(x) if isinstance(x, float) else int(x) for x in rest))
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """Puts back what `random_state` returned. A state of another kind of device is left out."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if device.type in state:
        getattr(torch, device.type).set_rng_state(state[device.type].cpu(), *_which(device))
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])


def branched_random_state(state: dict, branch: int, device: torch.device) -> dict:
    """A random state that follows from `state` and `branch`, unlike any other branch's; branch 0 is `state` itself.

    So each of several processes has random numbers of its own, and the same ones in a repeated run.
    """
    if not branch:
        return state
    with preserved_random_state(device):
        set_random_state(state, device)
        first = int(torch.randint(2**31, ()))
        _seed_all((first + branch) % 2**32)
        return random_state(device)


@contextlib.contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """What happens inside draws what it likes; afterwards the global generators stand where they stood."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


def device_name(device: torch.device) -> str:
    """The hardware's name, e.g. `NVIDIA H200` or `AMD EPYC, 2 threads`."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).get_device_name(device)
    if device.type == "mps":
        return f"Apple {platform.machine()} GPU"
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all work given to it (needed before reading a clock)."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(*_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """The argument of torch's functions on one device: `cuda:1` need not be the current one; MPS has one only."""
    return () if device.type == "mps" else (device,)


def check_pytorch_environment() -> torch.device:
    """Prints what there is to compute with, in five lines, and returns the device that `auto` means here.

    The long form, which also says what to mend, is `scripts/env_check.py`.
    """
    device = pick_device()
    print(f"torch      {torch.__version__} (CUDA {torch.version.cuda or 'none'}), Python {platform.python_version()}")
    print(f"device     {device}: {device_name(device)}")
    print(
        "others     "
        + (", ".join(f"{kind} × {_device_count(kind)}" for kind in DEVICES[1:] if _device_count(kind)) or "none")
    )
    print(f"precision  {pick_precision('auto', device)} (bf16 {'native' if bf16_is_native(device) else 'emulated'})")
    print(f"threads    {torch.get_num_threads()} of {os.cpu_count()} processors")
    return device
