"""Check what this machine has for PyTorch: one line per check, and below it what to do if something is wrong.

    python scripts/env_check.py
    CUDA_VISIBLE_DEVICES= python scripts/env_check.py

It needs nothing but Python's standard library, so it can be copied anywhere. torch is imported only in child processes
with a time limit: this script ends, and says what is wrong, even where torch is missing, crashes or hangs. To report a
bug of torch itself, add what `python -m torch.utils.collect_env` prints.

Exit codes: 0 nothing failed (there may be warnings), 1 something failed, 2 bad arguments.
"""

from __future__ import annotations

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == "__main__":  # a file random.py beside this script must not stop it
    sys.path[:] = [folder for folder in sys.path if folder != HERE]

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

CHILD_SECONDS = 180.0  # a first import of torch from a slow disk takes a minute
RESULT = "env_check result: "  # begins the lines that a child writes for its parent; libraries may print others
GIB = 2**30
SAFE = {"torch": (2, 11), "Pillow": (12, 3), "onnx": (1, 21)}  # versions before these have known security holes
PAIR = "pip install --force-reinstall torch torchvision (one command for both, as their versions must fit)"
CHOOSE_BUILD = "choose your system's build at https://pytorch.org/get-started/locally"


class Result(NamedTuple):
    """One line of the report."""

    status: str  # PASS, WARN, FAIL
    name: str
    found: str
    todo: str = ""


def result(name: str, found: str, todo: str = "", status: str = "WARN") -> Result:
    """Return a PASS if there is nothing to do, else `status`."""
    return Result(status if todo else "PASS", name, found, todo)


def one_line(error: object) -> str:
    """Return the text of an error on one line of at most 300 characters; an exception with its type."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    return " ".join(text.split())[:300]


def read(path: str) -> str:
    """Return the text of a file, or an empty string if it cannot be read."""
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def installed(package: str) -> str:
    """Return the version of a package without importing it, or an empty string."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: `2.14.1+cu130` gives (2, 14, 1)."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def usable_cpus() -> int:
    """Return how many CPUs this process may keep busy: those it is bound to, within the container's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = re.match(r"(\d+) (\d+)", read("/sys/fs/cgroup/cpu.max"))  # microseconds in each period; "max" if unlimited
    return max(1, min(cpus, -(-int(quota[1]) // int(quota[2])))) if quota else cpus


def nvidia_gpus() -> tuple[str, str]:
    """Return the names of the NVIDIA GPUs and the driver's version, without torch; empty if there are none."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20)
        rows = [row.rsplit(", ", 1) for row in listed.stdout.splitlines() if ", " in row]
        if listed.returncode == 0 and rows:
            return ", ".join(name for name, _ in rows), rows[0][1]
    for card in Path("/sys/bus/pci/devices").glob("*"):  # without a driver the bus still shows the card
        if read(f"{card}/vendor").strip() == "0x10de" and read(f"{card}/class").startswith("0x03"):
            return "an NVIDIA GPU", ""
    return "", ""


# Checks of the machine, which run in this process.


def check_python() -> Result:
    found = f"{platform.python_version()} at {sys.executable}, {platform.platform()}"
    good = sys.version_info >= (3, 11) and sys.maxsize > 2**32
    return result("Python", found, "" if good else "make an environment with a 64-bit Python 3.11 or newer", "FAIL")


def check_packages() -> Iterator[Result]:
    """Warn of installed versions with known security holes. `check_torch` does so for torch."""
    for package in ("Pillow", "onnx"):
        version = installed(package)
        old = version != "" and numbers(version) < SAFE[package]
        todo = f"pip install --upgrade {package}: this version has known security holes" if old else ""
        yield result(package, version or "not installed", todo)


def check_load() -> Result:
    if not hasattr(os, "getloadavg"):
        return Result("PASS", "load", "not known on this system")
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    todo = "the machine is busy: end other programs (see top) before you measure times" if load > cpus / 2 else ""
    return result("load", f"{load:.1f} processes wanted {cpus} CPUs in the last minute", todo)


def check_memory() -> Result:
    fields = {name: int(kib) * 1024 for name, kib in re.findall(r"(Mem\w+): +(\d+) kB", read("/proc/meminfo"))}
    if not fields:
        return Result("PASS", "memory", "not known on this system")
    limit = read("/sys/fs/cgroup/memory.max").strip()  # of a container; "max" if unlimited
    total = min(fields["MemTotal"], int(limit)) if limit.isdigit() else fields["MemTotal"]
    free = min(fields["MemAvailable"], total)
    todo = "end other programs, or train with a smaller --batch-size" if free < 2 * GIB else ""
    return result("memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", todo)


def check_disks() -> Iterator[Result]:
    for folder in dict.fromkeys([os.getcwd(), tempfile.gettempdir()]):
        free = shutil.disk_usage(folder).free
        todo = "make room: data and checkpoints take a few GiB" if free < 2 * GIB else ""
        todo = todo if os.access(folder, os.W_OK) else "not writable: choose another folder"
        yield result("disk", f"{free / GIB:.1f} GiB free at {folder}", todo)
    if os.path.isdir("/dev/shm"):  # through which the workers of a DataLoader send batches; 64 MiB in a container
        free = shutil.disk_usage("/dev/shm").free
        todo = "start the container with --shm-size=8g, or use num_workers=0" if free < GIB // 2 else ""
        yield result("shared memory", f"{free / GIB:.2f} GiB free at /dev/shm", todo)


def check_compiler() -> Result:
    """Compile a line of C++ with Python's headers, as torch.compile does."""
    command = os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++")
    todo = "only torch.compile needs it: install a C++ compiler and Python's headers (apt install g++ python3-dev)"
    if shutil.which(command) is None:
        return Result("WARN", "C++ compiler", f"{command} not found", todo)
    options = ["-fsyntax-only", "-x", "c++", "-I", sysconfig.get_path("include"), "-"]
    done = subprocess.run([command, *options], input="#include <Python.h>", capture_output=True, text=True, timeout=60)
    if done.returncode:
        return Result("WARN", "C++ compiler", f"{command} fails: {one_line(done.stderr)}", todo)
    return Result("PASS", "C++ compiler", f"{shutil.which(command)}, with Python's headers")


def check_gpu_driver() -> Result:
    gpus, driver = nvidia_gpus()
    todo = "install NVIDIA's driver; in a container, start it with --gpus all" if gpus and not driver else ""
    return result("NVIDIA GPU", f"{gpus}, driver {driver or 'not found'}" if gpus else "none found", todo)


def check_processes() -> Result:
    """Check the variables by which torchrun tells a process its place; if they are left over, scripts wait forever."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = {name: os.environ[name] for name in names if os.environ.get(name)}
    found = ", ".join(f"{name}={value}" for name, value in values.items()) or "none set: one process"
    if not values.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        return result("torchrun variables", found)
    whole = all(value.isdigit() for name, value in values.items() if name != "MASTER_ADDR")
    good = len(values) == len(names) and whole and int(values["RANK"]) < int(values["WORLD_SIZE"])
    todo = "" if good else f"start with torchrun, which sets all five, or unset {' '.join(values)}"
    return result("torchrun variables", found, todo, "FAIL")


# Checks that import torch, each in a child process.


def check_torch() -> Iterator[Result]:
    """Say which torch there is, what its CPU threads are, and which accelerators it can use or why none."""
    try:
        import torch

        version = torch.__version__
    except Exception as error:  # also that of a mere folder called torch, which has no version
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            yield Result("FAIL", "torch", "not installed", f"pip install torch torchvision, or {CHOOSE_BUILD}")
        else:
            yield Result("FAIL", "torch", f"{installed('torch')} does not import: {one_line(error)}", PAIR)
        return
    upgrade = "pip install --upgrade torch torchvision: before 2.11, a checkpoint can run code as it is loaded"
    todo = upgrade if numbers(version) < SAFE["torch"] else ""
    yield result("torch", f"{version} at {os.path.dirname(torch.__file__)}", todo, "FAIL")

    threads, cpus = torch.get_num_threads(), usable_cpus()
    variable = os.environ.get("OMP_NUM_THREADS", "not set")
    kernels = torch.backends.cpu.get_cpu_capability()  # such as AVX2
    found = f"{threads} for {cpus} usable CPUs ({kernels}), OMP_NUM_THREADS {variable}"
    yield result("threads", found, f"export OMP_NUM_THREADS={cpus}" if threads > cpus else "")
    yield from find_accelerators(torch)


def find_accelerators(torch: Any) -> Iterator[Result]:
    """Yield a line for each accelerator, named as its device, or one that says why there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        yield explain_no_accelerator(torch)
        return
    count = torch.accelerator.device_count()
    for index in range(count):
        if accelerator.type not in ("cuda", "xpu"):
            yield Result("PASS", accelerator.type, f"{platform.machine()} GPU, memory shared with the CPU")
            break
        properties = getattr(torch, accelerator.type).get_device_properties(index)
        found, todo = f"{properties.name}, {properties.total_memory / GIB:.1f} GiB", ""
        if accelerator.type == "cuda":
            free, total = torch.cuda.mem_get_info(index)
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            found += f" ({free / GIB:.1f} free), compute capability {properties.major}.{properties.minor}"
            found += f", bf16 {'native' if native else 'emulated'}"
            todo = "end the programs that hold its memory: nvidia-smi lists them" if free < total / 10 else ""
        yield result(f"{accelerator.type}:{index}", found, todo)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and count < len(visible.split(",")):
        todo = "name existing GPUs, each once, as in 0,1: all after the first bad one are ignored"
        yield Result("WARN", "CUDA_VISIBLE_DEVICES", f"{visible}, of which {count} usable", todo)


def explain_no_accelerator(torch: Any) -> Result:
    """Say why torch finds no accelerator. A machine without any GPU is a normal case."""
    gpus, driver = nvidia_gpus()
    build = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and visible.split(",")[0].strip() in ("", "-1")
    hides = f"CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs"
    if platform.system() == "Darwin":
        apple = platform.machine() == "arm64"
        todo = "update to macOS 14 or newer" if apple else "on an Apple chip, install Python for arm64"
        return Result("WARN", "accelerator", "none: MPS is not available", todo)
    if not gpus:
        return result("accelerator", f"none: no NVIDIA GPU found; {hides if hidden else build}; all runs on the CPU")
    if hidden:
        return Result("WARN", "accelerator", f"none: {hides}", "unset CUDA_VISIBLE_DEVICES to use the GPU")
    if not torch.version.cuda:
        return Result("WARN", "accelerator", f"none: there is {gpus}, but {build}", CHOOSE_BUILD)
    try:
        torch.cuda.init()
        reason = "no reason given"
    except Exception as error:
        reason = one_line(error)
    todo = f"run nvidia-smi; if it works, update the driver (now {driver or 'none'}) or {CHOOSE_BUILD}"
    return Result("FAIL", "accelerator", f"none: there is {gpus}, {build}: {reason}", todo)


def check_torchvision() -> Iterator[Result]:
    """Call a compiled operator of torchvision, which fails if torch is of another version or build."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        yield Result("FAIL", "torchvision", "not installed", PAIR)
        return
    build = re.search(r"__version__ = '(.*)'", read(os.path.join(os.path.dirname(spec.origin), "version.py")))
    version = build[1] if build else installed("torchvision")  # the file also names the build, as in 0.29.1+cu130
    wants = [line for line in importlib.metadata.requires("torchvision") or [] if re.match(r"torch\b", line)]
    found = f"{version}, which wants {wants[0] if wants else 'any torch'}, beside torch {torch.__version__}"
    try:
        from torchvision.ops import nms

        nms(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([0.5]), 0.5)
        exact = re.search(r"==\s*([\d.]+)", found)
        fits = exact is None or numbers(exact[1]) == numbers(torch.__version__)
        yield result("torchvision", found, "" if fits else PAIR)
    except Exception as error:
        yield Result("FAIL", "torchvision", f"{found}, does not work: {one_line(error)}", PAIR)


def check_step(device: str) -> Iterator[Result]:
    """Compute a gradient on `device`: that fails on a GPU for which this build of torch has no code."""
    import torch

    images = torch.ones(1, 1, 8, 8, device=device, requires_grad=True)
    hidden = torch.nn.functional.conv2d(images, torch.ones(1, 1, 3, 3, device=device)).flatten(1)  # (1, 36), all 9
    output = (hidden @ torch.ones(36, 1, device=device)).sum()
    total = float(torch.autograd.grad(output, images)[0].sum())  # 36 places of the kernel, each over 9 pixels
    found = f"the gradient of a convolution and a product sums to {total:g}, by hand to 324"
    yield result(f"{device} computes", found, "" if total == 324 else f"update the driver, or {PAIR}", "FAIL")


MACHINE: list[Callable[[], Any]] = [check_python, check_packages, check_load, check_memory,
                                    check_disks, check_compiler, check_gpu_driver, check_processes]  # fmt: skip
CHILDREN: dict[str, Callable[..., Iterator[Result]]] = {
    "torch": check_torch, "torchvision": check_torchvision, "step": check_step,
}  # fmt: skip


def guarded(name: str, check: Callable[..., Any], *args: str) -> Iterator[Result]:
    """Yield the results of a check; an exception in it becomes a FAIL of one line."""
    try:
        results = check(*args)
        yield from [results] if isinstance(results, Result) else results
    except Exception as error:
        yield Result("FAIL", name, one_line(error), "read the message; if the check is at fault, report this line")


def in_child(name: str, *args: str) -> Iterator[Result]:
    """Yield the results of a check that runs in a child process; a crash or a hang of the child is a FAIL."""
    with tempfile.TemporaryFile() as output:  # a pipe would be kept open by the children of a killed child
        command = [sys.executable, os.path.abspath(__file__), "--child", name, *args]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            code: int | None = child.wait(CHILD_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            child.kill()
        output.seek(0)
        lines = output.read().decode(errors="replace").split("\n")
    yield from (Result(*json.loads(line[len(RESULT) :])) for line in lines if line.startswith(RESULT))
    if code is None:
        todo = "see whether nvidia-smi answers, restart the machine, or update the driver"
        yield Result("FAIL", name, f"no answer within {CHILD_SECONDS:g} s", todo)
    elif code != 0:
        ending = signal.strsignal(-code) if code < 0 else f"exit code {code}"
        said = [line for line in lines if line.strip() and not line.startswith(RESULT)]
        yield Result("FAIL", name, f"the process ended with {ending}: {one_line((said or ['no message'])[-1])}", PAIR)


def all_results() -> Iterator[Result]:
    """Yield all lines of the report, in order."""
    for check in MACHINE:
        yield from guarded(check.__name__, check)
    facts = list(in_child("torch"))
    yield from facts
    if not any(line.name == "torch" and line.status == "FAIL" for line in facts):
        yield from in_child("torchvision")
        names = [line.name for line in facts]
        for device in ["cpu", *(name for name in names if name.partition(":")[0] in ("cuda", "mps", "xpu"))]:
            yield from in_child("step", device)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print the beginning of `message` in one line, without the usage."""
        self.exit(2, f"error: {one_line(message)[:120]}\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)  # a check and its arguments
    args = parser.parse_args(argv)
    if args.child:
        for line in guarded(args.child[0], CHILDREN[args.child[0]], *args.child[1:]):
            print(RESULT + json.dumps(line), flush=True)
        return 0
    counts = dict.fromkeys(("PASS", "WARN", "FAIL"), 0)
    for line in all_results():
        counts[line.status] += 1
        print(f"{line.status}  {line.name:20}  {line.found}", flush=True)
        if line.todo:
            print(f"      -> {line.todo}", flush=True)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return int(counts["FAIL"] > 0)


if __name__ == "__main__":
    sys.exit(main())
