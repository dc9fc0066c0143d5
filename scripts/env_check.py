"""Check a machine for PyTorch: one line per check, and what to do where something is wrong.

    python scripts/env_check.py
    python scripts/env_check.py --quick --redact --markdown

It needs the standard library alone, so it can be copied anywhere. torch is only ever imported in child processes with a
timeout: without torch, with a torchvision that does not match and with a GPU that hangs or crashes, it still ends and
says so. A check is a small function that returns one or more `Result(status, name, found, todo)`.

Exit codes: 0 nothing failed; 1 something failed (with --strict also a warning); 2 wrong usage.
"""

from __future__ import annotations

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def python_path() -> list[str]:
    """Return the folders of PYTHONPATH; an empty entry means the current one."""
    path = os.environ.get("PYTHONPATH", "")
    return [os.path.abspath(folder or ".") for folder in path.split(os.pathsep)] if path else []


if __name__ == "__main__":  # a json.py beside this file or on PYTHONPATH must not stop it: the standard library first
    rest = [folder for folder in sys.path if os.path.abspath(folder or ".") not in (HERE, *python_path())]
    cut = next((i for i, folder in enumerate(rest) if folder.endswith("-packages")), len(rest))
    sys.path[:] = rest[:cut] + [f for f in sys.path if os.path.abspath(f) in python_path()] + rest[cut:]

import argparse
import contextlib
import ctypes
import functools
import getpass
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

PASS, WARN, FAIL, SKIP = "PASS", "WARN", "FAIL", "SKIP"
SCHEMA_VERSION = 1  # of --json; it grows when a key changes its meaning or goes
GIB = 2**30
MARK = "\x1eenv_check "  # begins the lines that a child writes for its parent, whatever else libraries print
GET_STARTED = "take the right build from https://pytorch.org/get-started/locally"
torch: Any = None  # only check_torch binds it, and only in a child
WHEELS = "https://download.pytorch.org/whl"
PAIR_FROM = "pip install --force-reinstall torch torchvision --index-url"
PAIR = "pip install --force-reinstall torch torchvision (both in one command, so that they pair)"


class Result(NamedTuple):
    """One line of the report."""

    status: str
    name: str
    found: str
    todo: str


def result(name: str, found: str, todo: str = "", status: str = WARN) -> Result:
    """Return a PASS if there is nothing to do, and otherwise `status`."""
    return Result(status if todo else PASS, name, found, todo)


def guarded(name: str, check: Callable[..., Any], *arguments: object) -> list[Result]:
    """Run one check; an exception in it becomes a FAIL of one line."""
    try:
        outcome = check(*arguments)
        return [outcome] if isinstance(outcome, Result) else list(outcome)
    except Exception as error:
        return [result(name, one_line(error), "report this line, with the output of --markdown", FAIL)]


def title(function: Callable[..., Any]) -> str:
    """`check_extras` gives `extras`, `live_gloo_all_reduce` gives `gloo all reduce`."""
    return function.__name__.split("_", 1)[1].replace("_", " ")


def one_line(text: object, limit: int = 300) -> str:
    """Return a text on one line; an exception with its type first."""
    words = " ".join((f"{type(text).__name__}: {text}" if isinstance(text, BaseException) else str(text)).split())
    return words if len(words) <= limit else words[: limit - 3] + "..."


def capture(command: list[str], timeout: float) -> tuple[int | None, str, str]:
    """Return (exit code, stdout, stderr) of a command; the code is None if it had to be killed after `timeout` s."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True)
    code: int | None = None
    try:
        out, err = process.communicate(timeout=timeout)
        code = process.returncode
    except BaseException as error:
        with contextlib.suppress(OSError):  # the whole group: a child may have workers
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        try:
            out, err = process.communicate(timeout=5)
        except subprocess.TimeoutExpired as late:  # stuck inside a driver, where no signal arrives: leave it behind
            out, err = late.stdout or b"", late.stderr or b""
    return code, out.decode(errors="replace"), err.decode(errors="replace")


def output_of(*command: str) -> str:
    """Return what a command prints, or an empty string if it is missing, fails or takes longer than 10 s."""
    with contextlib.suppress(OSError):
        code, out, _ = capture(list(command), 10)
        return out.strip() if code == 0 else ""
    return ""


def read(path: str | Path) -> str:
    """Return the text of a file, or an empty string if it cannot be read."""
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def numbers(version: str) -> tuple[int, ...]:
    """`2.15.0+cu132` gives (2, 15, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def version_of(package: str) -> str:
    """Return the installed version of a package without importing it, or an empty string."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


def settings(*prefixes: str) -> str:
    """Return the environment variables with these prefixes, as `A='1', B='2'`."""
    return ", ".join(f"{name}={value!r}" for name, value in sorted(os.environ.items()) if name.startswith(prefixes))


# --------------------------------------------------------------------------------- the machine, without any torch


def check_python() -> Result:
    found = f"{platform.python_version()} at {sys.executable}, {platform.platform()}"
    good = sys.version_info[:2] >= (3, 10) and sys.maxsize > 2**32
    return result("Python", found, "" if good else "make an environment with a 64-bit Python 3.10 or newer", FAIL)


def check_hidden_modules() -> Result:
    """Files that Python would import in place of standard modules (or of torch and numpy).

    They are read and never run. What Python loads before any script cannot be hidden, and a file that puts the real
    module in its own place hides nothing (scripts/profile.py does).
    """
    standard: frozenset[str] = getattr(sys, "stdlib_module_names", frozenset())
    loaded = output_of(sys.executable, "-I", "-c", "import sys; print(*sys.modules)").split()
    hands_over, hidden = re.compile(r"sys\.modules\[[^]]*\]\s*=[^=]|globals\(\)\.update\("), []
    for folder in map(Path, dict.fromkeys([HERE, *python_path(), os.getcwd()])):
        for path in filter(Path.is_file, [*folder.glob("*.py"), *folder.glob("*/__init__.py")]):
            name = path.parent.name if path.name == "__init__.py" else path.stem
            if name in standard and name not in loaded and not hands_over.search(read(path)):
                hidden.append(str(path))
            if name in ("torch", "torchvision", "numpy") and not any(folder.glob(f"{name}-*.dist-info")):
                hidden.append(str(path))
    todo = "rename them: Python imports these files in place of the real modules" if hidden else ""
    return result("hidden modules", ", ".join(hidden) or "no file on the path hides a standard module", todo)


def cgroup_limits(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> tuple[float, float]:
    """Return the container's limits (CPUs, bytes of memory) by cgroup v1 and v2; infinite where there is none."""
    cpus, memory = [float("inf")], [float("inf")]
    for line in read(membership).splitlines():
        _, controllers, group = line.split(":", 2)
        folder = Path(root, controllers, group.strip("/"))
        for level in [folder, *folder.parents]:  # a limit of any level above holds too
            v1 = f"{read(level / 'cpu.cfs_quota_us')} {read(level / 'cpu.cfs_period_us')}"
            quota = read(level / "cpu.max") or v1
            cpus += [int(a) / int(b) for a, b in re.findall(r"^(\d+)\s+(\d+)", quota)]  # "max" and -1 are no limit
            for name in ("memory.max", "memory.limit_in_bytes"):
                memory += [int(n) for n in re.findall(r"^\d{1,18}$", read(level / name).strip())]  # v1: 19 digits, none
    return min(cpus), min(memory)


def allowed_cpus() -> int:
    """Return how many CPUs the affinity of this process allows."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cpus() -> int:
    """Return how many CPUs this process may keep busy: affinity and container quota, rounded up."""
    return int(max(1, min(allowed_cpus(), cgroup_limits()[0] + 0.99)))


def check_cpu() -> Result:
    text = read("/proc/cpuinfo")
    fields = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", text, re.MULTILINE))
    model = fields.get("model name") or output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    flags += ["bf16"] if output_of("sysctl", "-n", "hw.optional.arm.FEAT_BF16") == "1" else []
    known = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
    have = " ".join(flag for flag in known if flag in flags)
    found = f"{model or 'unknown'}, {fields.get('cpu cores', '?')} cores per socket, {os.cpu_count()} logical CPUs; "
    slow = "avx2" not in flags and "sse2" in flags
    todo = "expect slow runs: without AVX2, torch uses its slowest kernels" if slow else ""
    found += f"{have or 'features unknown'}; bf16 {'native' if 'bf16' in have else 'emulated' if have else 'unknown'}"
    return result("CPU", found, todo)


def check_CPU_affinity() -> Result:
    """CPUs of the machine, of this process and of the container; `torch threads` says what torch makes of them."""
    which = re.search(r"Cpus_allowed_list:\s*(\S+)", read("/proc/self/status"))
    found = f"{os.cpu_count()} CPUs in the machine, {allowed_cpus()} allowed for this process"
    found += f" ({which.group(1)})" if which else ""
    quota = cgroup_limits()[0]
    found += f", container quota {'none' if quota == float('inf') else f'{quota:g}'}, so {usable_cpus()} usable"
    return result("CPU affinity", found)


def check_thread_settings() -> Result:
    """OMP_NUM_THREADS and its relatives against the CPUs that may be used."""
    cpus, threads = usable_cpus(), os.environ.get("OMP_NUM_THREADS", "")
    found = f"{cpus} usable CPUs; "
    found += settings("OMP_", "MKL_", "KMP_", "GOMP_") or "no variables set"
    wrong = threads and (not re.fullmatch(r"[1-9]\d*(,\d+)*", threads) or int(threads.split(",")[0]) > cpus)
    return result("thread settings", found, f"export OMP_NUM_THREADS={cpus}, or less" if wrong else "")


def check_space() -> Iterator[Result]:
    """RAM, disk and shared memory."""
    fields = {key: int(kib) * 1024 for key, kib in re.findall(r"(Mem\w+):\s+(\d+) kB", read("/proc/meminfo"))}
    if not fields and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        fields["MemTotal"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if fields:
        total, limit = fields["MemTotal"], cgroup_limits()[1]
        free = min(fields.get("MemAvailable", total), limit)
        found = f"{total / GIB:.1f} GiB, {free / GIB:.1f} free, container limit "
        found += "none" if limit == float("inf") else f"{limit / GIB:.1f} GiB"
        yield result("RAM", found, "end other programs, or take smaller batches" if free < 2 * GIB else "")
    else:
        yield result("RAM", "not known on this system", "see the system's own monitor", SKIP)

    for folder in dict.fromkeys([os.getcwd(), tempfile.gettempdir()]):
        free = shutil.disk_usage(folder).free
        todo = "" if os.access(folder, os.W_OK) else "not writable: go to another folder, or name one with --output"
        todo = todo or ("free some space: data and checkpoints need a few GiB" if free < 2 * GIB else "")
        yield result("disk", f"{free / GIB:.1f} GiB free at {folder}", todo)

    if os.path.isdir("/dev/shm"):  # carries the batches of DataLoader workers; a container has 64 MiB by default
        usage = shutil.disk_usage("/dev/shm")
        todo = "start the container with --shm-size=8g (or --ipc=host), or use num_workers=0"
        found = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free"
        yield result("/dev/shm", found, todo if usage.free < GIB // 2 else "")


@functools.lru_cache(maxsize=1)  # a broken driver may take its time
def nvidia_gpus() -> tuple[list[str], str]:
    """Return the names of the NVIDIA GPUs and the driver's version (empty without one), without torch."""
    listed = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    rows = re.findall(r"^(.+), ([\d.]+)$", listed, re.MULTILINE)
    if rows:
        return [name for name, _ in rows], rows[0][1]
    cards = [p.parent for p in Path("/sys/bus/pci/devices").glob("*/vendor") if read(p).strip() == "0x10de"]
    driver = re.search(r"Module\D*([\d.]+)", read("/proc/driver/nvidia/version"))
    names = ["an NVIDIA GPU" for card in cards if read(card / "class").startswith("0x03")]  # the bus shows it anyway
    return names, driver.group(1) if driver else ""


def check_GPU_driver() -> Result:
    names, driver = nvidia_gpus()
    found = f"{', '.join(names) or 'no NVIDIA GPU'}; driver {driver or 'not found'}"
    todo = "install the NVIDIA driver; start a container with --gpus all" if names and not driver else ""
    return result("GPU driver", found, todo)


def hides_all_gpus() -> bool:
    """Say whether CUDA_VISIBLE_DEVICES switches every GPU off."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() in ("", "-1")


def check_visible_devices() -> Result:
    name, gpus = "CUDA_VISIBLE_DEVICES", nvidia_gpus()[0]
    found = settings("CUDA_VISIBLE", "CUDA_DEVICE_ORDER", "HIP_VISIBLE", "ROCR_VISIBLE", "ZE_AFFINITY") or "not set"
    if hides_all_gpus():
        return result(name, f"{found}: all GPUs are hidden", f"unset {name} to use the GPU" if gpus else "")
    entries = [entry.strip() for entry in os.environ.get(name, "0").split(",")]
    bad = len(set(entries)) < len(entries) or not all(re.fullmatch(r"\d+|(GPU|MIG)-\S+", entry) for entry in entries)
    bad = bad or (len(gpus) > 0 and any(entry.isdigit() and int(entry) >= len(gpus) for entry in entries))
    todo = f"list existing GPUs once each, as in {name}=0,1: CUDA ignores all from the first bad entry on"
    return result(name, found, todo if bad else "")


def distributed_problem(env: dict[str, str]) -> str:
    """Return what is inconsistent in the variables of torch.distributed, or an empty string."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    missing = [name for name in (*names, "MASTER_ADDR") if not env.get(name)]
    if missing:
        return f"{' and '.join(missing)} missing"
    values = {name: env[name] for name in (*names, "LOCAL_WORLD_SIZE") if name in env}
    wrong = [f"{name}={value!r}" for name, value in values.items() if not re.fullmatch(r"\d+", value)]
    if wrong:
        return f"{' and '.join(wrong)} must be a whole number"
    rank, world, local, port = (int(values[name]) for name in names)
    here = int(values.get("LOCAL_WORLD_SIZE", world))
    rules = {
        f"RANK {rank} is not below WORLD_SIZE {world}": rank < world,
        f"LOCAL_RANK {local} is not below the {here} processes of this machine": local < here,
        f"LOCAL_WORLD_SIZE {here} is above WORLD_SIZE {world}": here <= world,
        f"MASTER_PORT {port} is not between 1 and 65535": 0 < port < 65536,
    }
    return ", ".join(problem for problem, kept in rules.items() if not kept)


def check_distributed_variables() -> Result:
    found = settings("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_") or "none set"
    if not any(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return result("distributed variables", f"{found}: one process")
    problem = distributed_problem(dict(os.environ))
    todo = "start with torchrun, which sets them all, or unset RANK, WORLD_SIZE and LOCAL_RANK" if problem else ""
    return result("distributed variables", f"{problem} ({found})" if problem else found, todo, FAIL)


def check_allocator_settings() -> Result:
    found = settings("PYTORCH_", "CUDA_LAUNCH_BLOCKING", "MALLOC_CONF", "LD_PRELOAD", "TORCH_ALLOW_TF32", "NVIDIA_TF32")
    debugging = ("PYTORCH_NO_CUDA_MEMORY_CACHING", "CUDA_LAUNCH_BLOCKING")
    slow = [name for name in debugging if os.environ.get(name, "0") not in ("", "0")]
    found = found or "defaults"
    return result("allocator settings", found, f"unset {' and '.join(slow)}: slow, for debugging only" if slow else "")


def check_compiler() -> Result:
    """What torch.compile needs: a C++ compiler and Python's headers, for a GPU triton."""
    name = os.environ.get("CXX") or {"Windows": "cl", "Darwin": "clang++"}.get(platform.system(), "g++")
    path = shutil.which(name.split()[0])
    header = os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
    version = output_of(path, "--version").split("\n")[0] if path and name != "cl" else path
    found = f"{version or name + ' not found'}, Python.h {'found' if header else 'not found'}, triton "
    todo = "only torch.compile needs it: install a C++ compiler and Python's headers (apt install g++ python3-dev)"
    return result("compiler", found + (version_of("triton") or "not installed"), "" if path and header else todo)


def check_extras() -> Iterator[Result]:
    """The optional packages, without importing them."""
    extras = {"onnx": "onnx onnxscript onnxruntime", "quant": "torchao", "tensorboard": "tensorboard"}
    for extra, packages in extras.items():
        have = {name: version_of(name) or version_of(name + "-gpu") for name in packages.split()}
        old = numbers(have.get("onnxscript") or "9") < (0, 6, 2)  # torch.onnx.export needs that one
        todo = f"only if you want it: pip install -U {packages}" if old or not all(have.values()) else ""
        found = ", ".join(f"{name} {version or 'not installed'}" for name, version in have.items())
        yield result(f"extra [{extra}]", found, todo, WARN if old else SKIP)


HOST_CHECKS: list[Callable[..., Any]] = [
    check_python, check_hidden_modules, check_cpu, check_CPU_affinity, check_thread_settings, check_space,
    check_GPU_driver, check_visible_devices, check_distributed_variables, check_allocator_settings, check_compiler,
    check_extras,
]  # fmt: skip


# ------------------------------------------------------------------------------- torch and its devices (in a child)


def check_torch() -> Result:
    global torch
    try:
        torch = importlib.import_module("torch")
        found = f"{torch.__version__} at {os.path.dirname(torch.__file__)}"  # a mere folder of this name has neither
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            return result("torch", "not installed", f"pip install torch torchvision: {GET_STARTED}", FAIL)
        todo = f"in a new virtual environment: {PAIR}; no file named torch may lie on the path"
        return result("torch", f"{version_of('torch')} does not import: {one_line(error)}", todo, FAIL)
    todo = "pip install -U torch torchvision: before 2.10, loading a file could run its code"
    return result("torch", found, todo if numbers(torch.__version__) < (2, 10) else "", FAIL)


def check_torch_threads() -> Result:
    threads, cpus = torch.get_num_threads(), usable_cpus()
    found = f"{threads} in an operation, {torch.get_num_interop_threads()} between operations, for {cpus} usable CPUs, "
    found += f"kernels for {torch.backends.cpu.get_cpu_capability()}"
    return result("torch threads", found, f"export OMP_NUM_THREADS={cpus}" if threads > cpus else "")


def driver_cuda() -> tuple[int, ...]:
    """Return the newest CUDA version that the driver supports, as (13, 2), or () without a driver."""
    with contextlib.suppress(OSError):
        version, library = ctypes.c_int(), ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
            return version.value // 1000, version.value % 1000 // 10
    return ()


def check_CUDA() -> Result:
    """The wheel's CUDA (or ROCm) against the driver; a CUDA build on a machine without GPU is a normal case."""
    cuda, gpus, driver = torch.version.cuda or "", nvidia_gpus()[0], driver_cuda()
    found = f"CUDA {cuda} build" if cuda else f"ROCm {torch.version.hip} build" if torch.version.hip else "CPU build"
    found += f", driver for CUDA {driver[0]}.{driver[1]}" if driver else ""
    if torch.cuda.is_available():
        return result("CUDA", f"{found}, {torch.cuda.device_count()} GPU(s) usable")
    if not gpus or hides_all_gpus():
        why = "no GPU on this machine" if not gpus else "CUDA_VISIBLE_DEVICES hides all GPUs"
        return result("CUDA", f"{found}, {why}: work runs on the CPU, which is supported")
    if not cuda:
        return result("CUDA", f"{found}, though there is {gpus[0]}", f"to use it, {GET_STARTED}")
    todo = "see whether nvidia-smi works; reload the driver or restart; start a container with --gpus all"
    if driver and driver[0] < numbers(cuda)[0]:
        todo = f"update the NVIDIA driver to one for CUDA {cuda}, or for a build with CUDA {driver[0]}, {GET_STARTED}"
    try:
        torch.cuda.init()
    except Exception as error:
        found = f"{found}, {gpus[0]} does not work: {one_line(error)}"
    return result("CUDA", found, todo, FAIL if driver else WARN)


def architecture_verdict(capability: tuple[int, int], built: list[str]) -> tuple[str, str]:
    """Say whether a wheel's architectures (`sm_90`, `compute_90`) serve a GPU of this compute capability.

    Machine code runs on the same major version with an equal or higher minor one (the `a` variants on exactly that
    GPU only); PTX (`compute_`) is compiled on any newer GPU at the first start.
    """
    ptx = False
    for kind, number, suffix in re.findall(r"(sm|compute)_(\d+)([af]?)", " ".join(built)):
        code = (int(number[:-1]), int(number[-1]))
        same_major = code[0] == capability[0] and code <= capability and suffix != "a"
        if kind == "sm" and (same_major or code == capability):
            return PASS, f"{kind}_{number}{suffix} in the wheel"
        ptx = ptx or (kind == "compute" and not suffix and code <= capability)
    if ptx:
        return WARN, "only PTX in the wheel"
    return FAIL, f"no code for it in the wheel ({' '.join(built)})"


def check_GPUs() -> Iterator[Result]:
    """Memory, compute capability against the wheel, and bf16 of each GPU."""
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0  # if not, check_CUDA has said why
    for i in range(usable):
        properties, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        capability = (properties.major, properties.minor)
        built = torch.cuda.get_arch_list()
        status, code = (PASS, "ROCm") if torch.version.hip else architecture_verdict(capability, built)
        bf16 = "native" if torch.version.hip or capability >= (8, 0) else "emulated"
        found = f"{properties.name}, {total / GIB:.1f} GiB, {free / GIB:.1f} free, "
        found += f"capability {capability[0]}.{capability[1]}, {code}, bf16 {bf16}"
        todo = {WARN: "the first start compiles for minutes: take a newer torch", FAIL: GET_STARTED}.get(status, "")
        full = "end what holds its memory: nvidia-smi lists it" if free < total / 10 else ""
        yield result(f"cuda:{i}", found, todo or full, FAIL if status == FAIL else WARN)
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        for i in range(torch.xpu.device_count()):
            properties = torch.xpu.get_device_properties(i)
            found = f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"
            with contextlib.suppress(RuntimeError, AttributeError):  # some Intel GPUs do not tell what is free
                found += f", {torch.xpu.mem_get_info(i)[0] / GIB:.1f} free"
            yield result(f"xpu:{i}", found)


def check_libraries() -> Result:
    """What the wheel brings: cuDNN, NCCL, gloo, flash attention, TF32, MPS, XPU."""
    cuda, dist = torch.backends.cuda, torch.distributed
    nccl = dist.is_available() and dist.is_nccl_available() and cuda.is_built()
    facts = {
        "cuDNN": torch.backends.cudnn.version() if cuda.is_built() else "no",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if nccl else "no",
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "flash attention": cuda.is_built() and cuda.is_flash_attention_available(),
        "TF32 products": cuda.is_built() and cuda.matmul.fp32_precision == "tf32",
        "TF32 convolutions": cuda.is_built() and torch.backends.cudnn.conv.fp32_precision == "tf32",
        "MPS": torch.backends.mps.is_available(),
        "XPU": hasattr(torch, "xpu") and torch.xpu.is_available(),
    }
    words = {True: "yes", False: "no"}
    return result("libraries", ", ".join(f"{n} {words[v] if isinstance(v, bool) else v}" for n, v in facts.items()))


def usable_devices() -> list[str]:
    """Return the names of the devices for the live checks."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    return devices + [f"xpu:{i}" for i in range(torch.xpu.device_count() if hasattr(torch, "xpu") else 0)]


def torchvision_facts() -> tuple[str, str, str]:
    """Return its version with the build, the torch it asks for, and why its library does not load; imports nothing."""
    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec and spec.origin else Path("/nonexistent")
    version = re.search(r"__version__ = '([^']+)'", read(folder / "version.py"))
    requires, reason = "", ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        requires = " ".join(r for r in importlib.metadata.requires("torchvision") or [] if re.match(r"torch\b", r))
    for library in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            reason = one_line(str(error).replace(str(folder), "torchvision"), 150)
    return version.group(1) if version else version_of("torchvision"), requires, reason


def satisfies(version: str, requires: str) -> bool:
    """Say whether a torch version keeps `torch (==2.13.0)` or `torch>=2.14`; other operators count as kept."""
    have = numbers(version)
    pinned, least = re.search(r"==\s*([\d.]+)", requires), re.search(r">=\s*([\d.]+)", requires)
    return (not pinned or numbers(pinned.group(1)) == have) and (not least or numbers(least.group(1)) <= have)


def torchvision_cause(error: str, torch_version: str, vision: str, requires: str, reason: str) -> tuple[str, str]:
    """Name the true cause of a failing torchvision (other module, version or build) and the remedy."""
    build, vision_build = torch_version.partition("+")[2] or "plain", vision.partition("+")[2] or "plain"
    why = f" ({error}{': ' if reason else ''}{reason})"
    module = re.search(r"No module named '(\w+)", error)
    if module:
        return error, f"pip install {'pillow' if module.group(1) == 'PIL' else module.group(1)}"
    if not satisfies(torch_version, requires):
        return f"it asks for {requires}, but torch is {torch_version}{why}", PAIR
    if build != vision_build:
        index = "" if build == "plain" else f" --index-url https://download.pytorch.org/whl/{build}"
        remedy = f"pip install --force-reinstall --no-deps torchvision=={vision.partition('+')[0]}{index}"
        return f"a {vision_build} build of torchvision beside a {build} build of torch{why}", remedy
    return f"its compiled library does not fit torch {torch_version}{why}", PAIR


def check_torchvision() -> Result:
    """torchvision imports, and a compiled operator of it works with this torch."""
    if importlib.util.find_spec("torchvision") is None:
        return result("torchvision", "not installed", f"pip install torchvision: {GET_STARTED}", FAIL)
    try:
        from torchvision.ops import nms

        nms(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([0.5]), 0.5)
        vision, requires, _ = torchvision_facts()
        found = f"{vision} beside torch {torch.__version__}"
        todo = "" if satisfies(torch.__version__, requires) else f"it asks for {requires}: {PAIR}"
        return result("torchvision", found, todo)
    except BaseException as error:
        vision, requires, reason = torchvision_facts()
        cause, todo = torchvision_cause(one_line(error), torch.__version__, vision, requires, reason)
        return result("torchvision", f"{vision} does not work: {cause}", todo, FAIL)


# ------------------------------------------------------------- live checks: the same work here and in float64


def work_matrix_product(device: str, dtype: Any) -> Any:
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return a @ b


def work_convolution(device: str, dtype: Any) -> Any:
    """Forward and backward: the gradient of the kernel depends on both."""
    random = torch.Generator().manual_seed(0)
    images, kernel = torch.randn(4, 3, 16, 16, generator=random), torch.randn(8, 3, 3, 3, generator=random)
    kernel = kernel.to(device, dtype).requires_grad_()
    torch.nn.functional.conv2d(images.to(device, dtype), kernel, padding=1).square().mean().backward()
    return kernel.grad


def work_attention(device: str, dtype: Any) -> Any:
    q, k, v = torch.randn(3, 2, 4, 64, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def work_optimizer_step(device: str, dtype: Any) -> Any:
    weight = torch.tensor([1.0, -2.0], device=device, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
    return weight  # [0.8, -1.6]


def work_torch_compile(device: str, dtype: Any) -> Any:
    """Compiled on the device; the float64 reference is plain."""
    x = torch.linspace(-2, 2, 1000, dtype=torch.float64).to(device, dtype)

    def function(t: Any) -> Any:
        return (t.sin() * 2 + t.square()).relu()

    return function(x) if dtype == torch.float64 else torch.compile(function)(x)


WORK = [work_matrix_product, work_convolution, work_attention, work_optimizer_step]


def compare(device: str, work: Callable[[str, Any], Any]) -> Result:
    """Compare some work with the same work in float64 on the CPU; errors are relative to the largest number."""
    limits = {torch.float32: 5e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # fp32 may run as TF32
    exact, found, good = work("cpu", torch.float64).detach(), [], True
    for dtype, limit in limits.items() if work in (work_matrix_product, work_attention) else [(torch.float32, 5e-3)]:
        try:
            error = float((work(device, dtype).detach().cpu().double() - exact).abs().max() / exact.abs().max())
        except (RuntimeError, TypeError) as problem:
            if dtype == torch.float32:
                raise
            found.append(f"{str(dtype)[6:]} not possible ({one_line(problem, 60)})")  # an older device; fp32 is enough
            continue
        found.append(f"{str(dtype)[6:]} {error:.1e}")
        good = good and error <= limit  # a NaN is not
    todo = "" if good else "wrong numbers: reinstall torch, update the driver, test the device's memory"
    return result(f"{device}: {title(work)}", "relative error " + ", ".join(found), todo, FAIL)


def live_speed(device: str) -> Result:
    """A short figure that tells a healthy device from a throttled one; not a benchmark."""
    side, count = (1024, 2**24) if device == "cpu" else (4096, 2**26)
    a, source = torch.randn(side, side, device=device), torch.ones(count, device=device)
    target, module = torch.empty_like(source), getattr(torch, device.split(":")[0])

    def synchronize() -> None:
        module.synchronize(*[device] if ":" in device else [])  # that of mps takes no device

    def best(work: Callable[[], Any]) -> float:
        """Return the shortest time of a call, in seconds, of about 0.2 s of calls after a warm-up."""
        times: list[float] = []
        while sum(times[1:]) < 0.2:
            start = time.perf_counter()
            work()
            synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    flops, moved = 2 * side**3, 2 * 4 * count  # a copy reads and writes
    found = f"{flops / best(lambda: a @ a) / 1e9:,.0f} GFLOP/s fp32 product"
    found += f", {moved / best(lambda: target.copy_(source)) / 1e9:,.0f} GB/s copy"
    return result(f"{device}: speed", found)


def live_data_loader_worker(device: str) -> Result:
    batches = [batch.tolist() for batch in torch.utils.data.DataLoader(list(range(4)), batch_size=2, num_workers=1)]
    todo = "" if batches == [[0, 1], [2, 3]] else "use num_workers=0"
    return result(f"{device}: data loader worker", f"4 samples in batches {batches}", todo, FAIL)


def live_gloo_all_reduce(device: str) -> Result:
    """Two ranks, as threads of this process, add 1 and 2 over this machine's network."""
    name, dist = f"{device}: gloo all-reduce", torch.distributed
    if not (dist.is_available() and dist.is_gloo_available()):
        return result(name, "no gloo in this torch", f"only for several processes: {GET_STARTED}", SKIP)
    store = dist.HashStore()

    def rank_sum(rank: int) -> float:
        value = torch.tensor([rank + 1.0])
        dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20)).allreduce([value]).wait()
        return value.item()

    try:
        with ThreadPoolExecutor(2) as pool:
            found = f"1 + 2 over 2 ranks gives {list(pool.map(rank_sum, range(2)))}"
    except RuntimeError as error:
        found = one_line(error)
    todo = "let the host name resolve to this machine (/etc/hosts), or export GLOO_SOCKET_IFNAME=lo"
    return result(name, found, "" if found.endswith("[3.0, 3.0]") else todo, FAIL)


def live_nccl_all_reduce(device: str) -> Result:
    """This process adds a one from each visible GPU."""
    name, count = f"{device}: nccl all-reduce", torch.cuda.device_count()
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return result(name, "no NCCL in this torch", "only for several GPUs: use gloo", SKIP)
    values = [torch.ones(1024, device=f"cuda:{i}") for i in range(count)]
    torch.cuda.nccl.all_reduce(values)
    good = all(bool((value == count).all()) for value in values)
    todo = "" if good else "try NCCL_P2P_DISABLE=1; in a virtual machine, switch ACS off"
    return result(name, f"over {count} GPU(s)", todo, FAIL)


# ------------------------------------------------------------------------------------------- children and parent


def run_child(group: str, with_compile: bool) -> int:
    """Write, for the parent, the facts of torch (`torch`) or the live checks of one device, an event a line."""

    def emit(**event: object) -> None:
        print(MARK + json.dumps(event), flush=True)

    def run(name: str, check: Callable[..., Any], *arguments: object) -> list[Result]:
        emit(running=name)
        results = guarded(name, check, *arguments)
        emit(results=results)
        return results

    if group != "torch":
        check_torch()
        if ":" in group:
            getattr(torch, group.split(":")[0]).set_device(int(group.split(":")[1]))
        for work in [*WORK, *([work_torch_compile] if with_compile else [])]:
            run(f"{group}: {title(work)}", compare, group, work)
        extra = {"cpu": [live_data_loader_worker, live_gloo_all_reduce], "cuda:0": [live_nccl_all_reduce]}
        for check in [live_speed, *extra.get(group, [])]:  # last what may hang, so that it takes no other with it
            run(f"{group}: {title(check)}", check, group)
    elif run("torch", check_torch)[0].status == PASS:
        for fact in (check_torch_threads, check_libraries, check_CUDA, check_GPUs):
            run(title(fact), fact)
        with contextlib.suppress(Exception):  # the checks above have said what is wrong
            emit(devices=usable_devices())
        run("torchvision", check_torchvision)  # last: a library of another build may crash the process
    emit(done=True)
    return 0


def run_group(group: str, command: list[str], timeout: float) -> tuple[list[Result], list[str]]:
    """Run a child; return its results and the devices it names. A hang or crash is a FAIL of the check that ran."""
    try:
        code, out, err = capture(command, timeout)
    except OSError as error:  # no memory left to start a process, or no interpreter
        code, out, err = 1, "", one_line(error)
    results: list[Result] = []
    state: dict[str, Any] = {"running": group}
    for line in out.split("\n"):
        if line.startswith(MARK) and line.endswith("}"):  # the last line of a killed child may be torn
            state.update(json.loads(line[len(MARK) :]))
            results += [Result(*fields) for fields in state.pop("results", [])]
    if "done" not in state:
        if code is None:
            found = f"no answer within {timeout:g} s; the checks after it did not run"
            todo = "it hangs or is slow: see nvidia-smi and dmesg, restart the machine, or raise --timeout"
        else:
            ending = signal.strsignal(-code) if code < 0 else f"exit code {code}"
            found = f"the process ended with {ending}: {one_line((err.strip().splitlines() or ['no message'])[-1])}"
            todo = f"in a new virtual environment: {PAIR}; if it stays, update the driver"
        results.append(result(state["running"], found, todo, FAIL))
    return results, state.get("devices", [])


def cuda_remedy(build: str) -> str:
    """Say what gives torch an NVIDIA (or AMD) GPU, for every cause that holds; `build` begins the CUDA line."""
    if platform.system() == "Darwin":
        return "macOS has no CUDA: use --require mps"
    (gpus, driver), steps = nvidia_gpus(), []
    if build.startswith("CPU"):  # CUDA 13 needs a driver of 580 or newer
        index = f"{WHEELS}/{'cu126' if driver and numbers(driver) < (580,) else 'cu130'}"
        steps.append(f"this torch is built for the CPU only: {PAIR_FROM} {index}, or {GET_STARTED}")
    if hides_all_gpus():
        steps.append("CUDA_VISIBLE_DEVICES hides all GPUs: unset it, or name one, as in CUDA_VISIBLE_DEVICES=0")
    if build.startswith("ROCm"):
        steps.append("see whether rocminfo lists the GPU; start a container with --device=/dev/kfd --device=/dev/dri")
    elif not gpus or not driver:
        missing = "no NVIDIA driver works" if gpus else "no NVIDIA GPU is found"
        steps.append(f"{missing}: install the driver until nvidia-smi lists the GPU; start a container with --gpus all")
    return "; ".join(steps)


def device_remedy(kind: str, facts: list[Result]) -> str:
    """Say what makes a kind of device work, by what the facts say of torch."""
    if facts[0].status != PASS:
        return f"mend torch first: {facts[0].todo}"
    if kind == "mps":
        apple = platform.system() == "Darwin"
        here = "update macOS, and use an arm64 Python" if apple else "this is no Mac: use --require cpu, cuda or xpu"
        return f"MPS needs Apple silicon and macOS 14 or newer: {here}"
    if kind == "xpu":
        build = "" if "+xpu" in facts[0].found else f"this torch has no XPU: {PAIR_FROM} {WHEELS}/xpu; "
        return f"{build}install the Intel GPU driver (apt install libze-intel-gpu1); in a container, --device=/dev/dri"
    cuda = next((fact for fact in facts if fact.name == "CUDA"), facts[-1])  # or where the child ended before it
    return cuda_remedy(cuda.found) or cuda.todo or f"see the lines above, or {GET_STARTED}"


def check_wanted(require: str, min_gpus: int, devices: list[str], facts: list[Result]) -> Iterator[Result]:
    """--require and --min-gpus against the devices."""
    gpus, usable = [d for d in devices if d != "cpu"], f"usable: {', '.join(devices) or 'none'}"
    if require:
        have = any(device.split(":")[0] == require for device in devices)
        todo = "" if have else device_remedy(require, facts)
        yield result("--require", f"{require}; {usable}", todo, FAIL)
    if len(gpus) < min_gpus:
        todo = "see which GPUs nvidia-smi lists and CUDA_VISIBLE_DEVICES names, or take a smaller number"
        todo = todo if gpus else device_remedy("mps" if platform.system() == "Darwin" else require or "cuda", facts)
        yield result("--min-gpus", f"{len(gpus)} of {min_gpus}; {usable}", todo, FAIL)
    elif min_gpus:
        yield result("--min-gpus", f"{len(gpus)} of {min_gpus}; {usable}")


def collect(args: argparse.Namespace) -> Iterator[Result]:
    """Yield all results in the order of the report."""

    def child(group: str) -> tuple[list[Result], list[str]]:
        options = ["--child", group, *(["--compile"] if args.compile else [])]
        return run_group(group, [sys.executable, os.path.abspath(__file__), *options], args.timeout)

    for check in HOST_CHECKS:
        yield from guarded(title(check), check)
    facts, devices = child("torch")
    if not devices and facts[0].status == PASS:
        devices = ["cpu"]  # torch works, but the child died on its way to the devices
    yield from facts
    yield from check_wanted(args.require, args.min_gpus, devices, facts)
    if args.quick or not devices:
        todo = "run without --quick" if args.quick else "mend torch first"
        yield result("live checks", "left out", todo, SKIP)
    for device in [] if args.quick else devices:
        yield from child(device)[0]


# ------------------------------------------------------------------------------------------------------ rendering


def redactor() -> Callable[[str], str]:
    """Return a function that takes home folders, host names and user names out of a text."""
    home, host = os.path.expanduser("~"), socket.gethostname()
    homes = [re.escape(path) for path in {home, os.path.realpath(home)} if len(path) > 1 and os.path.isabs(path)]
    hosts = {host, host.split(".")[0], platform.node(), os.environ.get("MASTER_ADDR", "")}
    users = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    with contextlib.suppress(KeyError, OSError, ImportError):  # a user id without a name, as containers have
        users.add(getpass.getuser())
    rules = [(rf"(?:{'|'.join([*homes, '/home/[^/ ]+', '/Users/[^/ ]+'])})(?![\w-])", "~")]
    for names, word in ((hosts, "(host)"), (users, "(user)")):
        rules += [(rf"(?<!\w){re.escape(name)}(?!\w)", word) for name in sorted(names, key=len, reverse=True) if name]

    def clean(text: str) -> str:
        for pattern, replacement in rules:
            text = re.sub(pattern, replacement, text, flags=re.IGNORECASE)
        return text

    return clean


def as_markdown(results: Iterable[Result]) -> str:
    """A table that GitHub shows, whatever characters the facts hold."""
    escapes = str.maketrans({"|": "\\|", "<": "&lt;", ">": "&gt;", "`": "\\`", "*": "\\*", "_": "\\_", "~": "\\~"})
    rows = ["| " + " | ".join(cell.translate(escapes) for cell in line) + " |" for line in results]
    return "\n".join(["| Status | Check | Found | What to do |", "| --- | --- | --- | --- |", *rows])


def report(args: argparse.Namespace) -> int:
    """Run everything, print it in the chosen form, and return the exit code."""
    start, clean, results = time.monotonic(), redactor() if args.redact else str, []
    for line in collect(args):
        line = line._replace(found=clean(one_line(line.found, 600)), todo=clean(one_line(line.todo, 600)))
        results.append(line)
        if not (args.json or args.markdown):
            todo = f"\n      -> {line.todo}" if line.todo else ""
            print(f"{line.status}  {line.name:<24} {line.found}{todo}", flush=True)
    counts = {status: sum(line.status == status for line in results) for status in (PASS, WARN, FAIL, SKIP)}
    code, seconds = int(counts[FAIL] > 0 or (args.strict and counts[WARN] > 0)), time.monotonic() - start
    if args.json:
        head = {"schema_version": SCHEMA_VERSION, "exit_code": code, "seconds": round(seconds, 2)}
        print(json.dumps({**head, "checks": [line._asdict() for line in results]}, indent=2), flush=True)
    elif args.markdown:
        print(as_markdown(results), flush=True)
    else:
        words = ", ".join(f"{count} {status}" for status, count in counts.items())
        print(f"{words} in {seconds:.1f} s", flush=True)
    return code


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if sys.stdout is not None:
            sys.stdout.flush()  # what --help printed: `main` answers for an output that takes no more
        super().exit(status, message)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    need = parser.add_argument_group("what must be there")
    need.add_argument("--require", choices=["cpu", "cuda", "mps", "xpu"], help="device that must work (default: none)")
    need.add_argument("--min-gpus", type=int, default=0, metavar="N", help="GPUs that must be usable (default: 0)")
    need.add_argument("--strict", action="store_true", help="a warning fails too (default: off)")
    live = parser.add_argument_group("live checks")
    live.add_argument("--quick", action="store_true", help="facts only, nothing is computed (default: off)")
    live.add_argument("--compile", action="store_true", help="try torch.compile too (default: off)")
    live.add_argument("--timeout", type=float, default=120, metavar="S", help="seconds per child (default: 120)")
    output = parser.add_argument_group("output").add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object (default: text)")
    output.add_argument("--markdown", action="store_true", help="a table for a bug report (default: text)")
    parser.add_argument("--redact", action="store_true", help="hide home, host and user names (default: off)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not 0 < args.timeout <= 86400 or args.min_gpus < 0:
        parser.error("--timeout must be above 0 and at most 86400 seconds, --min-gpus 0 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal must not stop the report
    try:
        args = parse_args(argv)
        return run_child(args.child, args.compile) if args.child else report(args)
    except OSError as error:  # the output takes no more; the interpreter must not flush into it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `| head` has left
            return 128 + 13
        print(f"error: {error.filename or 'standard output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + int(signal.SIGINT)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no child is left behind
    sys.exit(main())
