"""Check a machine for PyTorch: one line per check, and what to do where something is wrong.

    python scripts/env_check.py
    python scripts/env_check.py --quick --redact --markdown

It needs the standard library alone, so it can be copied anywhere. torch is only ever imported in child processes with a
timeout: without torch, with a torchvision that does not match and with a GPU that hangs or crashes, it still ends and
says so. A check is a small function that returns `Result(status, name, found, todo)`, or a list of them.

Exit codes: 0 nothing failed; 1 something failed (with --strict also a warning); 2 wrong usage.
"""

from __future__ import annotations

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == "__main__":  # nothing of its own folder is needed, and a json.py beside this file must not stop it
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder or ".") != HERE]

import argparse
import ctypes
import getpass
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
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple

PASS, WARN, FAIL, SKIP = "PASS", "WARN", "FAIL", "SKIP"
SCHEMA_VERSION = 1  # of --json; it grows when a key changes its meaning or goes
MIN_PYTHON, MIN_TORCH, MIN_ONNXSCRIPT = (3, 10), (2, 10), (0, 6, 2)
GIB = 2**30
MARK = "\x1eenv_check "  # begins the lines that a child writes for its parent, whatever else libraries print
GET_STARTED = "choose the right build on https://pytorch.org/get-started/locally"


class Result(NamedTuple):
    """One line of the report; `todo` is empty only for PASS."""

    status: str
    name: str
    found: str
    todo: str = ""


# ---------------------------------------------------------------------------------------------------- small helpers


def capture(command: list[str], timeout: float) -> tuple[int | None, str, str]:
    """Return (exit code, stdout, stderr) of a command; the code is None if it had to be killed after `timeout` seconds."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    code: int | None = None
    try:
        out, err = process.communicate(timeout=timeout)
        code = process.returncode
    except subprocess.TimeoutExpired:
        kill_group(process)
        try:
            out, err = process.communicate(timeout=5)
        except subprocess.TimeoutExpired as late:  # stuck inside a driver, where no signal arrives: leave it behind
            out, err = late.stdout or b"", late.stderr or b""
    except BaseException:
        kill_group(process)
        raise
    return code, out.decode(errors="replace"), err.decode(errors="replace")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and, where the system has process groups, everything that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    except OSError:
        process.kill()


def output_of(*command: str) -> str:
    """Return what a command prints, or an empty string if it is missing, fails or takes longer than 10 s."""
    try:
        code, out, _ = capture(list(command), 10)
    except OSError:
        return ""
    return out.strip() if code == 0 else ""


def one_line(text: object, limit: int = 240) -> str:
    """Return a text on one line; an exception with its type first."""
    words = f"{type(text).__name__}: {text}" if isinstance(text, BaseException) else str(text)
    words = " ".join(words.split())
    return words if len(words) <= limit else words[: limit - 3] + "..."


def read(path: str | Path) -> str:
    """Return the text of a file, or an empty string if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def version_tuple(version: str) -> tuple[int, ...]:
    """`2.15.0+cu132` gives (2, 15, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def satisfies(version: str, spec: str) -> bool:
    """Say whether a version fits a requirement such as `>=2.14.0,<3`; an operator outside == != >= <= > < counts as kept."""
    have = version_tuple(version)
    for operator, wanted in re.findall(r"(==|!=|>=|<=|>|<)\s*([\d.]+\d)", spec):
        want = version_tuple(wanted)
        size = max(len(have), len(want))
        a, b = have + (0,) * (size - len(have)), want + (0,) * (size - len(want))
        if not {"==": a == b, "!=": a != b, ">=": a >= b, "<=": a <= b, ">": a > b, "<": a < b}[operator]:
            return False
    return True


def version_of(package: str) -> str:
    """Return the installed version of a package without importing it, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def environment(*prefixes: str) -> str:
    """Return the set environment variables with these prefixes as `A=1, B=2`."""
    return ", ".join(f"{name}={value!r}" for name, value in sorted(os.environ.items()) if name.startswith(prefixes))


def guarded(check: Callable[..., Any], *arguments: object) -> list[Result]:
    """Run one check; an exception in it becomes a FAIL of one line."""
    try:
        outcome = check(*arguments)
    except Exception as error:
        name = ": ".join([*(str(a) for a in arguments), check_name(check)])
        return [Result(FAIL, name, one_line(error), "read the exception; if it says nothing, report it with --markdown")]
    return outcome if isinstance(outcome, list) else [outcome]


def check_name(check: Callable[..., Any]) -> str:
    """`check_shared_memory` and `live_shared_memory` give `shared memory`."""
    return check.__name__.split("_", 1)[1].replace("_", " ")


# --------------------------------------------------------------------------------- the machine, without any torch


def check_python() -> Result:
    """The interpreter and the system."""
    found = f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.release()} {platform.machine()}"
    if sys.version_info[:2] < MIN_PYTHON:
        return Result(FAIL, "Python", found, f"make an environment with Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer")
    if sys.maxsize < 2**32:
        return Result(FAIL, "Python", f"{found}, 32 bit", "install a 64-bit Python: torch has no 32-bit wheels")
    return Result(PASS, "Python", found)


# Run in a child: a module that is loaded before any script starts cannot be hidden, and a file that hands over the real
# module (it has all the public names) hides nothing, so each name is judged by what importing it gives.
HIDDEN_PROBE = """
import sys
loaded = set(sys.modules)
import importlib
mark, folder = sys.argv[1:3]
for name in sys.argv[3:]:
    if name not in loaded:
        real = importlib.import_module(name)
        public = getattr(real, "__all__", None) or [n for n in vars(real) if not n.startswith("_")]
        sys.modules.pop(name)
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        seen = importlib.import_module(name)
        sys.path.remove(folder)
        if not all(hasattr(seen, n) for n in public):
            continue
    print(mark + name, flush=True)
"""


def hidden_modules(folder: str) -> list[str]:
    """Return the standard modules that a folder at the front of the path would replace by something else."""
    standard = getattr(sys, "stdlib_module_names", frozenset()) - set(sys.builtin_module_names)
    names = [p.stem for p in Path(folder).glob("*.py")] + [p.parent.name for p in Path(folder).glob("*/__init__.py")]
    harmful = []
    for name in sorted(standard & set(names)):
        _, out, _ = capture([sys.executable, "-I", "-c", HIDDEN_PROBE, MARK, folder, name], 10)
        if MARK + name not in out:
            harmful.append(name)
    return harmful


def check_hidden_modules() -> Result:
    """Files on the path that stand in front of standard modules, torch or numpy."""
    on_path = [HERE, *(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
    hidden, doubtful = [], []
    for folder in dict.fromkeys([*on_path, os.getcwd()]):
        harmful = [os.path.join(folder, name) for name in hidden_modules(folder)]
        (hidden if folder in on_path else doubtful).extend(harmful)
        for name in ("torch", "torchvision", "numpy", "PIL"):
            candidates = [Path(folder, name + ".py"), Path(folder, name, "__init__.py")]
            installed = any(Path(folder).glob(f"{name}-*-info")) or any(Path(folder).glob("pillow-*-info"))
            doubtful += [str(path) for path in candidates if path.is_file() and not installed]
    todo = "rename them: Python imports these files in place of the real modules"
    if hidden or doubtful:
        return Result(FAIL if hidden else WARN, "hidden modules", ", ".join(hidden + doubtful), todo)
    return Result(PASS, "hidden modules", "no file on the path hides a standard module")


def cgroup_limits(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> tuple[float | None, int | None]:
    """Return the container's limits (CPUs, bytes of memory), from cgroup v2 and v1; None where there is no limit."""
    cpus: list[float] = []
    memory: list[int] = []
    for line in read(membership).splitlines():
        _, controllers, group = line.split(":", 2)
        base = Path(root, controllers) if controllers else Path(root)
        folder = base / group.strip("/")
        for level in [folder, *folder.parents]:  # a limit of any level above holds too
            quota = read(level / "cpu.max").split() or [
                read(level / "cpu.cfs_quota_us").strip(), read(level / "cpu.cfs_period_us").strip()
            ]  # fmt: skip
            if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
                cpus.append(int(quota[0]) / int(quota[1]))
            for name in ("memory.max", "memory.limit_in_bytes"):
                value = read(level / name).strip()
                if value.isdigit() and int(value) < 2**60:  # v1 writes a number near 2**63 for "no limit"
                    memory.append(int(value))
            if level == base:
                break
    return min(cpus, default=None), min(memory, default=None)


def usable_cpus() -> int:
    """Return how many CPUs this process may keep busy: affinity and container quota, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_limits()[0]
    return allowed if quota is None else max(1, min(allowed, -int(-quota // 1)))


def check_cpu() -> Result:
    """Model, cores and the instructions that decide about speed."""
    text = read("/proc/cpuinfo")
    fields = dict(re.findall(r"^([^\t:]+?)\s*:[ ]?(.*)$", text, re.MULTILINE))
    model = fields.get("model name") or output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    cores = len(set(re.findall(r"physical id\s*: (\d+)\n(?:.*\n)*?core id\s*: (\d+)", text)))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    if output_of("sysctl", "-n", "hw.optional.arm.FEAT_BF16") == "1":
        flags.add("bf16")
    known = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
    have = [flag for flag in known if flag in flags]
    bf16 = "native" if {"avx512_bf16", "amx_bf16", "bf16"} & flags else "emulated"
    found = f"{model or 'unknown model'}, {f'{cores} cores, ' if cores else ''}{os.cpu_count()} logical; "
    found += f"{' '.join(have) or 'instruction set unknown'}; bf16 {bf16 if flags else 'unknown'}"
    if platform.machine() in ("x86_64", "AMD64") and flags and "avx2" not in flags:
        return Result(WARN, "CPU", found, "expect slow runs: without AVX2, torch falls back to its slowest kernels")
    return Result(PASS, "CPU", found)


def check_usable_cpus() -> Result:
    """Affinity and container quota."""
    quota = cgroup_limits()[0]
    limit = "no container quota" if quota is None else f"container quota {quota:g}"
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Result(PASS, "usable CPUs", f"{usable_cpus()} ({allowed} by affinity, {limit})")


def check_memory() -> Result:
    """RAM, and the container's share of it."""
    fields = {key: int(kib) * 1024 for key, kib in re.findall(r"^(\w+):\s+(\d+) kB", read("/proc/meminfo"), re.MULTILINE)}
    total = fields.get("MemTotal")
    if total is None and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if total is None:
        return Result(SKIP, "RAM", "unknown on this system", "look into the system's own monitor")
    limit = cgroup_limits()[1]
    usable = min(fields.get("MemAvailable", total), limit or total)
    found = f"{total / GIB:.1f} GiB, {usable / GIB:.1f} GiB usable" + (f", container limit {limit / GIB:.1f}" if limit else "")
    if usable < 2 * GIB:
        return Result(WARN, "RAM", found, "end other programs, or take smaller batches and fewer workers")
    return Result(PASS, "RAM", found)


def check_disk() -> Result:
    """Free space and whether the current folder can be written."""
    here, temporary = os.getcwd(), tempfile.gettempdir()
    free = {folder: shutil.disk_usage(folder).free / GIB for folder in (here, temporary)}
    found = ", ".join(f"{gib:.1f} GiB free at {folder}" for folder, gib in free.items())
    if not os.access(here, os.W_OK):
        return Result(WARN, "disk", f"{found}; {here} is not writable", "change the folder, or name one with --output")
    if min(free.values()) < 2:
        return Result(WARN, "disk", found, "free some space: data sets and checkpoints need a few GiB")
    return Result(PASS, "disk", found)


def check_shared_memory() -> Result:
    """/dev/shm carries the batches of DataLoader workers."""
    if not os.path.isdir("/dev/shm"):
        return Result(SKIP, "/dev/shm", "not on this system", "nothing to do: only Linux passes batches this way")
    usage = shutil.disk_usage("/dev/shm")
    found = f"{usage.total / GIB:.2f} GiB, {usage.free / GIB:.2f} GiB free"
    if usage.free < GIB // 2:
        todo = "start the container with --shm-size=8g (or --ipc=host), or use num_workers=0"
        return Result(WARN, "/dev/shm", found, todo)
    return Result(PASS, "/dev/shm", found)


def nvidia_gpus() -> tuple[list[str], str]:
    """Return the names of the NVIDIA GPUs and the driver's version (empty without a driver), without torch."""
    listed = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    rows = [line.rsplit(", ", 1) for line in listed if ", " in line]
    if rows:
        return [row[0] for row in rows], rows[0][1]
    driver = re.search(r"Module\D*([\d.]+)", read("/proc/driver/nvidia/version"))
    models = [read(path) for path in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    names = [match.group(1).strip() for match in (re.search(r"Model:\s*(.+)", text) for text in models) if match]
    if not names:  # no driver: the bus still shows the card
        devices = [p.parent for p in Path("/sys/bus/pci/devices").glob("*/vendor") if read(p).strip() == "0x10de"]
        names = ["an NVIDIA GPU" for device in devices if read(device / "class").startswith("0x03")]
    return names, driver.group(1) if driver else ""


def check_NVIDIA_driver() -> Result:
    """The GPUs that the system sees, whatever torch makes of them."""
    names, driver = nvidia_gpus()
    if names and not driver:
        todo = "install the NVIDIA driver; in a container, start it with --gpus all"
        return Result(WARN, "NVIDIA driver", f"{len(names)} GPU(s) on the bus, but no driver", todo)
    if not names:
        state = f"driver {driver}, but no GPU" if driver else "none, and no NVIDIA GPU on this machine"
        return Result(PASS, "NVIDIA driver", f"{state}: work runs on the CPU")
    return Result(PASS, "NVIDIA driver", f"{driver}; {', '.join(names)}")


def hides_all_gpus() -> bool:
    """Say whether CUDA_VISIBLE_DEVICES switches every GPU off."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() in ("", "-1")


def check_visible_devices() -> Result:
    """CUDA_VISIBLE_DEVICES and its relatives."""
    name = "CUDA_VISIBLE_DEVICES"
    found = environment(name, "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE", "HIP_VISIBLE", "ROCR_VISIBLE", "ZE_AFFINITY") or "not set"
    entries = [entry.strip() for entry in os.environ.get(name, "").split(",")]
    gpus = nvidia_gpus()[0]
    if name in os.environ and hides_all_gpus():
        status, todo = (WARN, f"unset {name} to use the GPU") if gpus else (PASS, "")
        return Result(status, name, f"{found}: all GPUs are hidden", todo)
    bad = [e for e in entries if not re.fullmatch(r"(\d+|(GPU|MIG)-\S+)?", e) or (gpus and e.isdigit() and int(e) >= len(gpus))]
    if bad or len(set(entries)) < len(entries):
        return Result(WARN, name, found, f"list existing GPUs once each, as in {name}=0,1: CUDA drops all from the first bad one")
    return Result(PASS, name, found)


def distributed_problem(env: dict[str, str]) -> str:
    """Return what is inconsistent in the variables of torch.distributed, or an empty string."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        return f"{', '.join(missing)} missing"
    numbers = {n: env[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "LOCAL_WORLD_SIZE") if n in env}
    wrong = [f"{name}={value!r}" for name, value in numbers.items() if not re.fullmatch(r"\d+", value)]
    if wrong:
        return f"{', '.join(wrong)} not a whole number"
    rank, world, local, port = (int(numbers[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
    local_world = int(numbers.get("LOCAL_WORLD_SIZE", world))
    for bad, problem in (
        (world < 1, "WORLD_SIZE below 1"),
        (rank >= world, f"RANK {rank} is not below WORLD_SIZE {world}"),
        (local >= local_world, f"LOCAL_RANK {local} is not below the {local_world} processes of this machine"),
        (local_world > world, f"LOCAL_WORLD_SIZE {local_world} is above WORLD_SIZE {world}"),
        (not 0 < port < 65536, f"MASTER_PORT {port} is not between 1 and 65535"),
    ):
        if bad:
            return problem
    return ""


def check_distributed_variables() -> Result:
    """RANK, WORLD_SIZE and the others, as torchrun sets them."""
    found = environment("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not any(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return Result(PASS, "distributed variables", f"{found or 'none set'}: one process")
    problem = distributed_problem(dict(os.environ))
    if problem:
        todo = "start with torchrun, which sets all five, or unset RANK, WORLD_SIZE and LOCAL_RANK"
        return Result(FAIL, "distributed variables", f"{problem} ({found})", todo)
    return Result(PASS, "distributed variables", found)


def check_thread_variables() -> Result:
    """OMP_NUM_THREADS and the like against the CPUs that may be used."""
    found = environment("OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_") or "not set"
    threads, cpus = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip(), usable_cpus()
    if threads and not re.fullmatch(r"0*[1-9]\d*", threads):
        return Result(WARN, "thread variables", found, f"set OMP_NUM_THREADS to a whole number, here at most {cpus}")
    if threads and int(threads) > cpus:
        return Result(WARN, "thread variables", f"{found} on {cpus} usable CPUs", f"export OMP_NUM_THREADS={cpus}")
    return Result(PASS, "thread variables", found)


def check_allocator_settings() -> Result:
    """Settings of the memory allocators, and switches that slow everything down."""
    found = environment("PYTORCH_", "CUDA_LAUNCH_BLOCKING", "MALLOC_CONF", "LD_PRELOAD", "TORCH_ALLOW_TF32") or "defaults"
    slow = [n for n in ("PYTORCH_NO_CUDA_MEMORY_CACHING", "CUDA_LAUNCH_BLOCKING") if os.environ.get(n, "0") not in ("", "0")]
    if slow:
        return Result(WARN, "allocator settings", found, f"unset {' and '.join(slow)}: for debugging only, it is slow")
    return Result(PASS, "allocator settings", found)


def check_compiler() -> Result:
    """What torch.compile needs: a C++ compiler and Python's headers, for a GPU triton."""
    default = {"Windows": "cl", "Darwin": "clang++"}.get(platform.system(), "g++")
    compiler = os.environ.get("CXX") or default
    path = shutil.which(compiler.split()[0])
    header = os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
    version = (output_of(path, "--version") if path and default != "cl" else "").split("\n")[0]
    found = f"{version or path or compiler + ' not found'}; Python.h {'found' if header else 'not found'}; "
    found += f"triton {version_of('triton') or version_of('triton-windows') or 'not installed'}"
    if not path or not header:
        todo = "needed by torch.compile only: install a C++ compiler and Python's headers (apt install g++ python3-dev)"
        return Result(WARN, "compiler", found, todo)
    return Result(PASS, "compiler", found)


def check_extras() -> list[Result]:
    """The optional packages, without importing them."""
    results = []
    for extra, packages in {"onnx": "onnx onnxscript onnxruntime", "quant": "torchao", "tensorboard": "tensorboard"}.items():
        have = {name: version_of(name) or version_of(name + "-gpu") for name in packages.split()}
        found = ", ".join(f"{name} {version or 'not installed'}" for name, version in have.items())
        result = Result(PASS, f"extra [{extra}]", found)
        if not all(have.values()):
            result = result._replace(status=SKIP, todo=f"only if you want it: pip install {packages}")
        elif version_tuple(have.get("onnxscript", "9")) < MIN_ONNXSCRIPT:
            result = result._replace(status=WARN, todo="pip install -U onnxscript: torch.onnx.export needs 0.6.2 or newer")
        results.append(result)
    return results


HOST_CHECKS = (
    check_python, check_hidden_modules, check_cpu, check_usable_cpus, check_memory, check_disk, check_shared_memory,
    check_NVIDIA_driver, check_visible_devices, check_distributed_variables, check_thread_variables,
    check_allocator_settings, check_compiler, check_extras,
)  # fmt: skip


# ------------------------------------------------------------------------------- torch and its devices (in a child)


def check_torch() -> Result:
    """torch imports, is PyTorch and is new enough."""
    try:
        import torch
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            return Result(FAIL, "torch", "not installed", f"pip install torch torchvision ({GET_STARTED})")
        todo = "pip install --force-reinstall torch torchvision, best in a new virtual environment"
        return Result(FAIL, "torch", f"{version_of('torch')} does not import: {one_line(error)}", todo)
    if not hasattr(torch, "__version__"):
        return Result(FAIL, "torch", f"{list(torch.__path__)} is not PyTorch", "rename that folder: it hides the real torch")
    found = f"{torch.__version__} at {os.path.dirname(torch.__file__)}"
    if version_tuple(torch.__version__) < MIN_TORCH:
        return Result(FAIL, "torch", found, "pip install -U torch torchvision: before 2.10, loading a file can run its code")
    return Result(PASS, "torch", found)


def check_torch_threads() -> Result:
    """torch's own threads against the CPUs that may be used."""
    import torch

    threads, cpus = torch.get_num_threads(), usable_cpus()
    found = f"{threads} (and {torch.get_num_interop_threads()} between operators), kernels for "
    found += torch.backends.cpu.get_cpu_capability()
    if threads > cpus:
        return Result(WARN, "torch threads", f"{found}, on {cpus} usable CPUs", f"export OMP_NUM_THREADS={cpus}")
    return Result(PASS, "torch threads", found)


def driver_cuda() -> tuple[int, ...]:
    """Return the newest CUDA version that the driver supports, as (13, 2), or () without a driver."""
    try:
        version = ctypes.c_int()
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        return divmod(version.value // 10, 100) if library.cuDriverGetVersion(ctypes.byref(version)) == 0 else ()
    except OSError:
        return ()


def check_CUDA() -> Result:
    """The wheel's CUDA (or ROCm) against the driver; a CUDA build on a machine without GPU is a normal case."""
    import torch

    cuda, (gpus, _), driver = torch.version.cuda or "", nvidia_gpus(), driver_cuda()
    build = f"CUDA {cuda} build" if cuda else f"ROCm {torch.version.hip} build" if torch.version.hip else "CPU build"
    if driver:
        build += f", driver for CUDA up to {driver[0]}.{driver[1]}"
    if torch.cuda.is_available():
        return Result(PASS, "CUDA", f"{build}, {torch.cuda.device_count()} GPU(s)")
    if not gpus:
        return Result(PASS, "CUDA", f"{build}, no usable GPU on this machine: work runs on the CPU, which is supported")
    if hides_all_gpus():
        return Result(PASS, "CUDA", f"{build}, all GPUs hidden by CUDA_VISIBLE_DEVICES: work runs on the CPU")
    if not cuda:
        return Result(WARN, "CUDA", f"{build}, though the machine has {gpus[0]}", f"to use it, {GET_STARTED}")
    reason = cuda_error()
    todo = "see whether nvidia-smi works; reload the driver or restart; in a container, start it with --gpus all"
    if driver and driver[0] < version_tuple(cuda)[0]:
        todo = f"update the NVIDIA driver to one for CUDA {cuda}, or install a torch for CUDA {driver[0]}: {GET_STARTED}"
    return Result(FAIL if driver else WARN, "CUDA", f"{build}, but {gpus[0]} cannot be used: {reason}", todo)


def cuda_error() -> str:
    """Return why CUDA does not start, in torch's words."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return one_line(error)
    return "torch finds no device"


def architecture_verdict(capability: tuple[int, int], built: list[str]) -> tuple[str, str]:
    """Say whether a wheel's architecture list (`sm_90`, `compute_90`) serves a GPU of this compute capability.

    Machine code runs on the same major version with an equal or higher minor one; `a` variants on the very same GPU,
    `f` variants within the family; PTX (`compute_`) is compiled at the first start on every newer GPU.
    """
    major, minor = capability
    for kind, number, suffix in (match for arch in built for match in re.findall(r"(sm|compute)_(\d+)([af]?)", arch)):
        have = (int(number[:-1]), int(number[-1]))
        if kind == "sm" and have[0] == major and (have[1] == minor if suffix == "a" else have[1] <= minor):
            return PASS, f"machine code {kind}_{number}{suffix}"
    ptx = [n for arch in built for n in re.findall(r"^compute_(\d+)$", arch) if (int(n[:-1]), int(n[-1])) <= capability]
    return (WARN, f"only PTX compute_{ptx[-1]}") if ptx else (FAIL, f"no code for it in {' '.join(built)}")


def check_GPUs() -> list[Result]:
    """Each CUDA device: memory, compute capability against the wheel, bf16."""
    import torch

    return [result for i in range(torch.cuda.device_count()) for result in guarded(check_cuda_device, i)]


def check_cuda_device(index: int) -> Result:
    """One CUDA or ROCm device."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    free, total = torch.cuda.mem_get_info(index)
    status, code = (PASS, "ROCm") if torch.version.hip else architecture_verdict(capability, torch.cuda.get_arch_list())
    bf16 = "native" if torch.version.hip or capability >= (8, 0) else "emulated"
    found = f"{properties.name}, {total / GIB:.1f} GiB ({free / GIB:.1f} free), capability {capability[0]}.{capability[1]}, "
    found += f"{code}, bf16 {bf16}"
    if status == PASS and free < total / 10:
        return Result(WARN, f"cuda:{index}", found, "end the process that holds the memory (nvidia-smi lists it)")
    todo = {WARN: "the first start compiles for minutes; a newer torch may have machine code", FAIL: GET_STARTED}
    return Result(status, f"cuda:{index}", found, todo.get(status, ""))


def check_libraries() -> Result:
    """cuDNN, NCCL, flash attention, TF32 and the CPU's libraries as the wheel has them."""
    import torch

    cuda = torch.backends.cuda.is_built()
    distributed = torch.distributed.is_available()
    nccl = cuda and distributed and torch.distributed.is_nccl_available()
    facts = {
        "cuDNN": torch.backends.cudnn.version() if cuda else None,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        "gloo": "yes" if distributed and torch.distributed.is_gloo_available() else None,
        "flash attention": "yes" if cuda and torch.backends.cuda.is_flash_attention_available() else None,
        "MKL": "yes" if torch.backends.mkl.is_available() else None,
        "oneDNN": "yes" if torch.backends.mkldnn.is_available() else None,
    }
    tf32 = {"highest": "off"}.get(torch.get_float32_matmul_precision(), "on") if cuda else "no"
    found = ", ".join(f"{name} {value or 'no'}" for name, value in facts.items())
    return Result(PASS, "libraries", f"{found}, TF32 products {tf32}")


def check_MPS() -> Result:
    """Apple's GPU."""
    import torch

    if torch.backends.mps.is_available():
        return Result(PASS, "MPS", f"available, macOS {platform.mac_ver()[0]}")
    if platform.system() != "Darwin":
        return Result(SKIP, "MPS", "not on this system", "nothing to do: MPS exists on Apple machines only")
    todo = "use an Apple-silicon Python (not Rosetta) and a recent macOS, or work on the CPU"
    return Result(WARN, "MPS", f"not available (built into torch: {torch.backends.mps.is_built()})", todo)


def check_XPU() -> Result | list[Result]:
    """Intel's GPUs."""
    import torch

    if not (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return Result(SKIP, "XPU", "no Intel GPU that this torch can use", f"only if you have one: {GET_STARTED}")
    properties = [torch.xpu.get_device_properties(i) for i in range(torch.xpu.device_count())]
    return [Result(PASS, f"xpu:{i}", f"{p.name}, {p.total_memory / GIB:.1f} GiB") for i, p in enumerate(properties)]


def usable_devices() -> list[str]:
    """Return the names of the devices for the live checks."""
    import torch

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    return devices + [f"xpu:{i}" for i in range(torch.xpu.device_count() if hasattr(torch, "xpu") else 0)]


def torchvision_facts() -> tuple[str, str, str]:
    """Return (version with build tag, the torch that it asks for, why its library does not load), without importing it."""
    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec and spec.origin else Path("/nonexistent")
    version = re.search(r"__version__ = '([^']+)'", read(folder / "version.py"))
    try:
        requires = " ".join(r for r in importlib.metadata.requires("torchvision") or [] if re.match(r"torch\b", r))
    except importlib.metadata.PackageNotFoundError:
        requires = ""
    reason = ""
    for library in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            reason = one_line(str(error).replace(str(folder) + os.sep, ""))
    return version.group(1) if version else version_of("torchvision"), requires, reason


def torchvision_cause(error: str, torch_version: str, vision: str, requires: str, reason: str) -> tuple[str, str]:
    """Name the true cause of a failing `import torchvision`, and the remedy."""
    build, vision_build = torch_version.partition("+")[2], vision.partition("+")[2]
    why = f" ({reason})" if reason else ""
    module = re.search(r"No module named '(\w+)", error)
    if module and module.group(1) != "torchvision":
        return error, f"pip install {'pillow' if module.group(1) == 'PIL' else module.group(1)}"
    if not satisfies(torch_version, requires):
        cause = f"it is made for {requires}, not for torch {torch_version}{why}"
        return cause, "pip install --force-reinstall torch torchvision (both in one command, so that they pair)"
    if build != vision_build and (build or vision_build) and vision:
        index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
        cause = f"a {vision_build or 'plain'} build of torchvision beside a {build or 'plain'} build of torch{why}"
        return cause, f"pip install --force-reinstall --no-deps torchvision=={vision.partition('+')[0]}{index}"
    if "torchvision::" in error or reason:
        cause = f"its compiled library does not load beside torch {torch_version}{why or ': ' + error}"
        return cause, "pip install --force-reinstall torch torchvision (both in one command, so that they pair)"
    return error, "pip install --force-reinstall torchvision"


def check_torchvision() -> Result:
    """torchvision imports, and its compiled operators work with this torch."""
    import torch

    if importlib.util.find_spec("torchvision") is None:
        return Result(FAIL, "torchvision", "not installed", f"pip install torchvision, from where torch came ({GET_STARTED})")
    try:
        import torchvision

        kept = torchvision.ops.nms(torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9]]), torch.tensor([0.5, 0.9]), 0.5)
    except BaseException as error:
        vision, requires, reason = torchvision_facts()
        cause, todo = torchvision_cause(one_line(error), torch.__version__, vision, requires, reason)
        return Result(FAIL, "torchvision", f"{vision} does not work: {cause}", todo)
    vision, requires, _ = torchvision_facts()
    if kept.tolist() != [1] or not satisfies(torch.__version__, requires):
        todo = "pip install --force-reinstall torch torchvision (both in one command, so that they pair)"
        return Result(WARN, "torchvision", f"{vision} asks for {requires}, here is {torch.__version__}", todo)
    return Result(PASS, "torchvision", f"{vision} pairs with torch {torch.__version__}")


TORCH_CHECKS = (
    check_torch_threads, check_libraries, check_CUDA, check_GPUs, check_MPS, check_XPU,
)  # fmt: skip


# ------------------------------------------------------------------------------------ live checks (a child each)


def error_of(value: Any, exact: Any) -> float:
    """Return the largest deviation from a float64 result, relative to its largest entry; NaN counts as infinite."""
    deviation = (value.detach().cpu().double() - exact).abs().max() / exact.abs().max()
    return float(deviation) if deviation == deviation else float("inf")


def judged(name: str, errors: dict[str, float], limits: dict[str, float]) -> Result:
    """Turn relative errors into a result; TF32-like errors in fp32 warn, larger ones fail."""
    found = "relative error " + ", ".join(f"{kind} {error:.1e}" for kind, error in errors.items())
    if all(error <= limits[kind] for kind, error in errors.items()):
        return Result(PASS, name, found)
    if all(error <= max(limits[kind], 5e-3) for kind, error in errors.items()):
        return Result(WARN, name, found, "TF32 or another reduced precision is on: see torch.set_float32_matmul_precision")
    return Result(FAIL, name, found, "wrong numbers: reinstall torch, update the driver, test the memory of the device")


LIMITS = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}


def live_matrix_product(device: str) -> Result:
    """A product in each precision against float64."""
    import torch

    errors = {}
    for kind, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        a, b = (torch.randn(256, 256).to(dtype) for _ in range(2))
        errors[kind] = error_of(a.to(device) @ b.to(device), a.double() @ b.double())
    return judged(f"{device}: matrix product", errors, LIMITS)


def live_convolution(device: str) -> Result:
    """A convolution, forward and backward, against float64."""
    import torch

    images, kernel, above = torch.randn(4, 3, 16, 16), torch.randn(8, 3, 3, 3), torch.randn(4, 8, 16, 16)  # above: dL/dout

    def forward_backward(where: str, dtype: Any) -> list[Any]:
        x, w = images.to(where, dtype), kernel.to(where, dtype).requires_grad_()
        out = torch.nn.functional.conv2d(x, w, padding=1)
        out.backward(above.to(where, dtype))
        return [out.detach(), w.grad]

    got, exact = forward_backward(device, torch.float32), forward_backward("cpu", torch.float64)
    errors = {"fp32": max(error_of(got[0], exact[0]), error_of(got[1], exact[1]))}
    return judged(f"{device}: convolution", errors, {"fp32": 5e-4})


def live_attention(device: str) -> Result:
    """scaled_dot_product_attention against the formula in float64; on CUDA also whether the flash kernel runs."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attention = torch.nn.functional.scaled_dot_product_attention
    q, k, v = torch.randn(3, 2, 4, 64, 32)  # each (batch 2, heads 4, length 64, width 32)
    exact = torch.softmax(q.double() @ k.double().transpose(-2, -1) / 32**0.5, dim=-1) @ v.double()
    result = judged(f"{device}: attention", {"fp32": error_of(attention(*(t.to(device) for t in (q, k, v))), exact)}, LIMITS)
    if not device.startswith("cuda"):
        return result
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            error = error_of(attention(*(t.to(device, torch.float16) for t in (q, k, v))), exact)
        flash = f"flash kernel in fp16 {error:.1e}"
    except RuntimeError as failure:
        flash = f"no flash kernel for this GPU ({one_line(failure, 60)})"
    return result._replace(found=f"{result.found}; {flash}")


def live_optimizer_step(device: str) -> Result:
    """One step of SGD on sum(w^2) with rate 0.1 gives 0.8 w."""
    import torch

    weight = torch.tensor([1.0, -2.0], device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
    error = error_of(weight, torch.tensor([0.8, -1.6], dtype=torch.float64))
    return judged(f"{device}: optimizer step", {"fp32": error}, LIMITS)


def live_speed(device: str) -> Result:
    """A short figure, to tell a healthy machine from a throttled one; not a benchmark."""
    import torch

    side, megabytes = (1024, 64) if device == "cpu" else (4096, 256)
    dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]
    figures = []
    for dtype in dtypes:
        a = torch.randn(side, side, device=device).to(dtype)
        figures.append(f"{2e-9 * side**3 / best_seconds(lambda a=a: a @ a, device):,.0f} GFLOP/s {str(dtype)[6:]} product")
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), device)
    return Result(PASS, f"{device}: speed", ", ".join([*figures, f"{2e-9 * 4 * len(source) / seconds:,.1f} GB/s copy (read + write)"]))


def best_seconds(work: Callable[[], Any], device: str) -> float:
    """Return the shortest time of one call, after a warm-up, within about 0.2 s of trying."""
    import torch

    synchronize = getattr(torch, device.split(":")[0]).synchronize
    work()
    synchronize()
    times: list[float] = []
    while sum(times) < 0.2:
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def live_data_loader(device: str) -> Result:
    """A DataLoader with one worker process delivers what a list holds."""
    from torch.utils.data import DataLoader

    name = f"{device}: DataLoader worker"
    batches = [batch.tolist() for batch in DataLoader(list(range(8)), batch_size=4, num_workers=1)]  # type: ignore[arg-type]
    if batches == [[0, 1, 2, 3], [4, 5, 6, 7]]:
        return Result(PASS, name, "8 samples through 1 worker")
    return Result(FAIL, name, f"wrong batches {batches}", "use num_workers=0, and report this")


def live_gloo_all_reduce(device: str) -> Result:
    """Two gloo ranks, as threads of this process, sum 1 and 2 over the network of this machine."""
    from concurrent.futures import ThreadPoolExecutor
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    name = f"{device}: all-reduce (gloo)"
    if not (dist.is_available() and dist.is_gloo_available()):
        return Result(SKIP, name, "this torch has no gloo", f"only for many processes: {GET_STARTED}")
    store = dist.HashStore()

    def rank_sum(rank: int) -> float:
        value = torch.tensor([rank + 1.0])
        dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20)).allreduce([value]).wait()
        return value.item()

    todo = "let the host name resolve to this machine (/etc/hosts), or export GLOO_SOCKET_IFNAME=lo"
    try:
        with ThreadPoolExecutor(2) as pool:
            sums = list(pool.map(rank_sum, range(2)))
    except RuntimeError as error:
        return Result(FAIL, name, one_line(error), todo)
    return Result(PASS if sums == [3, 3] else FAIL, name, f"1 + 2 on 2 ranks gives {sums}", "" if sums == [3, 3] else todo)


def live_nccl_all_reduce(device: str) -> Result:
    """One process sums over all visible GPUs with NCCL."""
    import torch

    name, count = f"{device}: all-reduce (NCCL)", torch.cuda.device_count()
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return Result(SKIP, name, "this torch has no NCCL", "only for several GPUs: use gloo, or another build of torch")
    values = [torch.ones(1024, device=f"cuda:{i}") for i in range(count)]
    torch.cuda.nccl.all_reduce(values)
    for i in range(count):
        torch.cuda.synchronize(i)
    if all(bool((value == count).all()) for value in values):
        return Result(PASS, name, f"over {count} GPU(s)")
    return Result(FAIL, name, f"wrong sum over {count} GPUs", "try NCCL_P2P_DISABLE=1; in a virtual machine, switch ACS off")


def live_compile(device: str) -> Result:
    """torch.compile builds a small function that gives the same numbers."""
    import torch

    x, start = torch.linspace(-2, 2, 1000, device=device), time.perf_counter()

    def function(t: Any) -> Any:
        return (t.sin() * 2 + t.square()).relu()

    error = error_of(torch.compile(function)(x), function(x.cpu().double()))
    result = judged(f"{device}: torch.compile", {"fp32": error}, LIMITS)
    return result._replace(found=f"{result.found}, {time.perf_counter() - start:.1f} s")


def live_checks(device: str, with_compile: bool) -> list[Callable[[str], Result]]:
    """Return the live checks of a device; those that may hang come last, so that they take no other with them."""
    checks = [live_matrix_product, live_convolution, live_attention, live_optimizer_step, live_speed]
    checks += [live_compile] if with_compile else []
    checks += [live_data_loader, live_gloo_all_reduce] if device == "cpu" else []
    return checks + ([live_nccl_all_reduce] if device == "cuda:0" else [])


# ------------------------------------------------------------------------------------------- children and parent


def emit(**event: object) -> None:
    """Write one event for the parent."""
    print(MARK + json.dumps(event), flush=True)


def emit_checks(checks: Iterable[Callable[..., Any]], *arguments: object) -> bool:
    """Run checks in a child, announcing each; return whether all passed without FAIL."""
    good = True
    for check in checks:
        emit(running=": ".join([*(str(a) for a in arguments), check_name(check)]))
        results = guarded(check, *arguments)
        emit(results=results)
        good = good and all(result.status != FAIL for result in results)
    return good


def run_child(group: str, with_compile: bool) -> int:
    """The work of a child process: the facts of torch, or the live checks of one device."""
    if group != "torch":
        emit_checks(live_checks(group, with_compile), group)
    elif emit_checks([check_torch]):
        emit_checks(TORCH_CHECKS)
        emit(devices=usable_devices())
        emit_checks([check_torchvision])  # last: a library of another build may crash the process
    emit(done=True)
    return 0


def run_group(group: str, command: list[str], timeout: float) -> tuple[list[Result], list[str]]:
    """Run a child; return its results and the devices that it names. A hang or crash is a FAIL of the check that ran."""
    code, out, err = capture(command, timeout)
    results: list[Result] = []
    state: dict[str, Any] = {}
    for line in out.split("\n"):
        if line.startswith(MARK) and line.endswith("}"):  # the last line of a killed child may be torn
            state.update(json.loads(line[len(MARK) :]))
            results += [Result(*result) for result in state.pop("results", [])]
    if not state.get("done"):
        last = (err.strip().splitlines() or ["it says nothing"])[-1]
        how = f"no answer within {timeout:g} s" if code is None else f"the process ended with {exit_name(code)}: {last}"
        todo = "the device or its driver hangs: see nvidia-smi and dmesg, restart; if it is only slow, raise --timeout"
        if code is not None:
            todo = "reinstall torch and torchvision in a new environment; if it stays, update the driver"
        results.append(Result(FAIL, state.get("running", group), one_line(how), todo))
        results.append(Result(SKIP, f"{group}: later checks", "not reached", "mend the check above first"))
    return results, state.get("devices", [])


def exit_name(code: int) -> str:
    """Return an exit code in words: `SIGSEGV` for -11."""
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"exit code {code}"


def child_command(group: str, args: argparse.Namespace) -> list[str]:
    """Return the command that runs this file as a child."""
    return [sys.executable, os.path.abspath(__file__), "--child", group, *(["--compile"] if args.compile else [])]


def check_required(args: argparse.Namespace, devices: list[str], results: list[Result]) -> list[Result]:
    """What --require and --min-gpus ask for."""
    answers = []
    seen, gpus = ", ".join(devices) or "nothing", sum(device != "cpu" for device in devices)
    why = "; ".join(r.found for r in results if r.name in ("torch", "CUDA", "CUDA_VISIBLE_DEVICES", args.require.upper()))
    if args.require:
        have = any(device.split(":")[0] == args.require for device in devices)
        todo = f"mend the cause above, {GET_STARTED}, or ask for what is here"
        answers.append(Result(*((PASS, "--require", f"{args.require}: usable") if have else
                                (FAIL, "--require", f"{args.require}: torch can use {seen} only ({why})", todo))))  # fmt: skip
    if args.min_gpus:
        answer = Result(PASS, "--min-gpus", f"{gpus} of {args.min_gpus} GPUs")
        answers.append(answer if gpus >= args.min_gpus else answer._replace(status=FAIL, todo=f"see above ({why})"))
    return answers


def collect(args: argparse.Namespace) -> Iterator[Result]:
    """Yield all results in the order of the report."""
    for check in HOST_CHECKS:
        yield from guarded(check)
    results, devices = run_group("torch", child_command("torch", args), args.timeout)
    usable = any(result.name == "torch" and result.status == PASS for result in results)
    devices = devices or (["cpu"] if usable else [])
    yield from results
    yield from check_required(args, devices, results)
    if args.quick or not devices:
        why, todo = ("left out by --quick", "run without --quick") if args.quick else ("no working torch", "mend torch first")
        yield Result(SKIP, "live checks", why, todo)
        return
    for device in devices:
        if sys.stderr.isatty():
            print(f"... live checks on {device}", file=sys.stderr)
        yield from run_group(device, child_command(device, args), args.timeout)[0]


# ------------------------------------------------------------------------------------------------------ rendering


def redactor() -> Callable[[str], str]:
    """Return a function that takes home folders, host names and user names out of a text."""
    home, host = os.path.expanduser("~"), socket.gethostname()
    homes = {path for path in (home, os.path.realpath(home)) if len(path) > 1 and os.path.isabs(path)}
    hosts = {host, host.split(".")[0], platform.node(), os.environ.get("MASTER_ADDR", "")}
    users = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    try:
        users.add(getpass.getuser())
    except (KeyError, OSError, ImportError):  # a user id without a name, as containers have
        pass
    rules = [(re.escape(path) + r"(?!\w)", "~") for path in sorted(homes, key=len, reverse=True)]
    rules += [(r"(?<![\w/\\])(/home|/Users|[A-Z]:\\Users)[/\\][^/\\\s',;]+", "~")]
    for names, word in ((hosts, "(host)"), (users, "(user)")):
        rules += [(rf"(?<!\w){re.escape(n)}(?!\w)", word) for n in sorted(names, key=len, reverse=True) if n]

    def clean(text: str) -> str:
        for pattern, replacement in rules:
            text = re.sub(pattern, replacement, text, flags=re.IGNORECASE)
        return text

    return clean


def as_text(result: Result) -> str:
    """One line, and a second one with what to do."""
    line = f"{result.status}  {result.name:<24} {result.found}"
    return f"{line}\n      -> {result.todo}" if result.todo else line


def as_markdown(results: list[Result]) -> str:
    """A table that GitHub shows, whatever characters the facts hold."""
    rows = [["Status", "Check", "Found", "What to do"], ["---"] * 4, *(list(result) for result in results)]
    escape = str.maketrans({"|": "\\|", "<": "&lt;", ">": "&gt;", "`": "\\`", "*": "\\*", "_": "\\_", "~": "\\~"})
    return "\n".join(["### env_check", "", *("| " + " | ".join(c.translate(escape) for c in row) + " |" for row in rows)])


def as_json(results: list[Result], code: int, seconds: float) -> str:
    """One object; `schema_version` says how to read it."""
    counts = {status: sum(result.status == status for result in results) for status in (PASS, WARN, FAIL, SKIP)}
    head = {"schema": "env_check", "schema_version": SCHEMA_VERSION, "exit_code": code, "seconds": round(seconds, 2)}
    return json.dumps({**head, "counts": counts, "checks": [result._asdict() for result in results]}, indent=2)


def summary(results: list[Result], seconds: float) -> str:
    """The last line of the text."""
    words = {PASS: "passed", WARN: "warned", FAIL: "failed", SKIP: "skipped"}
    return ", ".join(f"{sum(r.status == s for r in results)} {word}" for s, word in words.items()) + f" in {seconds:.1f} s"


def seconds_above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 86400 seconds")
    return value


def count_from_zero(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    need = parser.add_argument_group("what must be there")
    need.add_argument("--require", choices=["cpu", "cuda", "mps", "xpu"], default="", help="device that must work (default: none)")
    need.add_argument("--min-gpus", type=count_from_zero, default=0, metavar="N", help="number of GPUs that must be usable (default: 0)")
    need.add_argument("--strict", action="store_true", help="a warning fails too (default: off)")
    live = parser.add_argument_group("live checks")
    live.add_argument("--quick", action="store_true", help="facts only, nothing is computed (default: off)")
    live.add_argument("--compile", action="store_true", help="try torch.compile too, up to a minute (default: off)")
    live.add_argument("--timeout", type=seconds_above_zero, default=120.0, metavar="S", help="limit for each child process, in seconds (default: 120)")
    out = parser.add_argument_group("output")
    form = out.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object on stdout (default: text)")
    form.add_argument("--markdown", action="store_true", help="a table to paste into a bug report (default: text)")
    out.add_argument("--redact", action="store_true", help="hide home folders, host and user names (default: off)")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def report(args: argparse.Namespace) -> int:
    """Run everything, print it in the chosen form, and return the exit code."""
    start = time.monotonic()
    clean = redactor() if args.redact else str
    results = []
    for result in collect(args):
        results.append(result._replace(found=clean(one_line(result.found, 600)), todo=clean(one_line(result.todo, 600))))
        if not (args.json or args.markdown):
            print(as_text(results[-1]), flush=True)
    code = int(any(result.status == FAIL or (args.strict and result.status == WARN) for result in results))
    seconds = time.monotonic() - start
    form = as_json(results, code, seconds) if args.json else as_markdown(results) if args.markdown else summary(results, seconds)
    print(form, flush=True)
    return code


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal must not stop the report
    try:
        return run_child(args.child, args.compile) if args.child else report(args)
    except BrokenPipeError:  # `| head` has left; the interpreter must not flush into the closed pipe at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except KeyboardInterrupt:
        return 128 + int(signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
