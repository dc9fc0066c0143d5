"""Runs of the training scripts in processes forked from this one: start one, disturb it, see what it leaves.

This process has imported torch and runs nothing itself, so that a fork of it is a fresh process, ready in milliseconds
instead of seconds. Each child leads a process group of its own, dies with this process, and has a time limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import hashlib
import io
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what every run imports somewhere: once here, not in every child
import torchvision.utils
from torch import Tensor
from torchvision.transforms import v2

import torchbasics as tb
from tests.scripts import load_script
from tests.test_train_mnist import few_digits

ROOT = Path(__file__).resolve().parents[2]
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_PTRACER = 1, 36, 0x59616D61
train_mnist = load_script("train_mnist")
IMPORTED = (torch._dynamo, torchvision.utils, v2)

# 200 training images, 40 for validation, 80 for the test; 7 steps an epoch
SMALL = (
    *("--dataset", "digits", "--model", "mlp", "--epochs", "2", "--val-size", "40", "--batch-size", "32"),
    *("--precision", "fp32", "--save-every", "2", "--device", "cpu", "--quiet"),
)


@dataclass
class Row:
    """One line of the matrix: what was injected how often, and what went wrong."""

    number: int
    fault: str
    seed: int
    quick: bool
    folder: Path
    count: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self._names = 0

    def pick(self, full: Any, quick: Any) -> Any:
        """How much of something: in the whole matrix, and in the sample."""
        return quick if self.quick else full

    def some(self, cases: list, quick: int) -> list:
        """All of `cases`, or a random sample of `quick` of them."""
        return sorted(self.rng.sample(cases, min(quick, len(cases))), key=cases.index) if self.quick else cases

    def case(self, name: str, *problems: str | list[str]) -> None:
        """One fault more was injected; `problems` says what went wrong (what is empty does not count)."""
        self.count += 1
        found = [text for part in problems for text in ([part] if isinstance(part, str) else part) if text]
        self.failures += [f"{name}: {text}" for text in found]

    def skip(self, reason: str) -> None:
        """A part that cannot be done here."""
        self.skipped.append(reason)

    def new(self, name: str = "run") -> Path:
        """A path of this row that is not there yet."""
        self._names += 1
        return self.folder / f"{name}-{self._names}"


# ------------------------------------------------------------------------------------------------------------ processes


class Child:
    """A forked process that leads a group; `out` and `err` are what it has said."""

    def __init__(self, pid: int, files: Path) -> None:
        self.pid, self.files, self.code = pid, files, None
        self.began = time.monotonic()

    @property
    def out(self) -> str:
        return self._said(".out")

    @property
    def err(self) -> str:
        return self._said(".err")

    def _said(self, ending: str) -> str:
        path = self.files.with_suffix(ending)
        return path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""  # killed before

    def poll(self) -> int | None:
        """The exit code, minus the signal that killed it; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, limit: float = 60.0) -> int:
        """The exit code; after `limit` seconds the whole group is killed, and the code is 999: it hung."""
        end, pause = time.monotonic() + limit, 0.001
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill_group()
                os.waitpid(self.pid, 0)
                self.code = 999
                break
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)
        return self.code

    def signal(self, signum: int) -> None:
        """Sends it, if the process is still there."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill_group(self) -> None:
        """Ends all of the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def group_gone(self, within: float) -> str:
        """Waits for the end of all processes of the group; a problem if some live longer than `within` seconds."""
        end = time.monotonic() + within
        while True:
            with contextlib.suppress(ChildProcessError):  # orphans are ours (subreaper): let them go
                while os.waitpid(-self.pid, os.WNOHANG)[0]:
                    pass
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return ""
            if time.monotonic() > end:
                self.kill_group()
                return f"processes are left {within:g} s after the end"
            time.sleep(0.02)


_children: list[Child] = []


def start(work: Callable[[], Any], files: Path, limit: float = 120.0, **environment: str) -> Child:
    """Forks a process that does `work` and exits with what that returns (None: 0; it raises: 70, and a traceback)."""
    sys.stdout.flush(), sys.stderr.flush()
    faulthandler.cancel_dump_traceback_later()  # a fork with its thread in between would wait for it for ever
    parent = os.getpid()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        _children.append(Child(pid, files))
        return _children[-1]
    code = 70
    try:
        os.setpgid(0, 0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(71)
        for number, ending in ((1, ".out"), (2, ".err")):
            descriptor = os.open(files.with_suffix(ending), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        faulthandler.dump_traceback_later(limit * 0.9)
        os.environ.update(environment)
        _children.clear()
        code = work() or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end_children() -> None:
    """Kills what is left of all groups."""
    for child in _children:
        child.kill_group()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-child.pid, 0)[0]:
                pass
    _children.clear()


def prepare() -> None:
    """Before the first fork. Orphans of children become this process's children, so that they are seen and counted."""
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Shared:
    """A number that a child writes and this process reads, whatever becomes of the child."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        return struct.unpack("q", self.memory[:8])[0]

    @value.setter
    def value(self, number: int) -> None:
        self.memory[:8] = struct.pack("q", number)


# -------------------------------------------------------------------------------------------------- runs of the scripts

Hook = Callable[[tb.Trainer], Any]


def training(*argv: Any, hook: Hook | None = None, before: Callable[[], Any] | None = None, script: Any = None) -> Any:
    """What a child is to do: `main(argv)` on few digits, `before` at the beginning, `hook` after each step."""

    def work() -> int:
        torch.set_num_threads(1)
        tb.digits.draw_digits = few_digits
        if hook is not None:
            fit = tb.Trainer.fit

            def hooked(trainer: tb.Trainer, *args: Any, **options: Any) -> Any:
                trainer.on_step_end += (hook,)
                return fit(trainer, *args, **options)

            tb.Trainer.fit = hooked  # type: ignore[method-assign]
        if before is not None:
            before()
        return (script or train_mnist).main([str(arg) for arg in argv])

    return work


def kill_at(step: int, signum: int = signal.SIGKILL, reached: Shared | None = None) -> Hook:
    """A hook that sends this process `signum` when `step` is reached, before its save; `reached` follows the steps."""

    def hook(trainer: tb.Trainer) -> None:
        if reached is not None:
            reached.value = trainer.step
        if trainer.step == step:
            os.kill(os.getpid(), signum)

    return hook


def one_error(child: Child, *words: str, codes: tuple[int, ...] = (1, 2)) -> list[str]:
    """Problems with how a run refused: one line `error: …` with all `words`, an exit code of `codes`, no traceback."""
    lines = [line for line in child.err.splitlines() if line]
    found = [line for line in lines if line.startswith("error: ")]
    problems = []
    if child.code not in codes:
        problems.append(f"exit code {child.code}, expected {' or '.join(map(str, codes))}: {child.err[-300:]!r}")
    if len(found) != 1 or any(not line.startswith(("error: ", "warning: ")) for line in lines):
        problems.append(f"expected one line, got {child.err[-300:]!r}")
    problems += [f"{word!r} is not in {found[0]!r}" for word in words if found and word not in found[0]]
    return problems


# ------------------------------------------------------------------------------------------------- what a run has left


def flat(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a nested value, each with its place; of a tensor the SHA-256 of its bytes."""
    if isinstance(value, Tensor):
        content = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        yield where, f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        yield where, f"{len(value)} entries"
        if len(value) > 100 and all(isinstance(item, (int, float)) for item in value):
            yield where, hashlib.sha256(repr(value).encode()).hexdigest()
        else:
            for i, item in enumerate(value):
                yield from flat(item, f"{where}[{i}]")
    else:
        yield where, repr(value)


RESULTS = ("test_accuracy", "test_loss", "best_val_accuracy", "best_epoch", "epochs_run", "stopped_because")


def leavings(run: Path) -> dict[str, str]:
    """All that must be the same whether a run was disturbed or not: place → value or hash."""
    checkpoints = sorted((run / "checkpoints").glob("step-*.pt"))
    result = json.loads((run / "run.json").read_text()).get("result") or {}
    metrics = hashlib.sha256((run / "metrics.jsonl").read_bytes()).hexdigest()
    found = {"newest": checkpoints[-1].name, "metrics": metrics}
    found |= {name: repr(result.get(name)) for name in RESULTS}
    for name in (checkpoints[-1].name, "best.pt"):
        found |= dict(flat(tb.load_checkpoint(run / "checkpoints" / name), name))
    return found


def differences(run: Path, expected: dict[str, str]) -> list[str]:
    """Where the `leavings` of a run are not those expected: at most three places, and how many more."""
    try:
        found = leavings(run)
    except (ValueError, OSError, LookupError) as error:
        return [f"cannot be read: {error!r}"]
    places = [place for place in {**expected, **found} if found.get(place) != expected.get(place)]
    more = [f"… {len(places) - 3} more"] if len(places) > 3 else []
    return [f"differs: {place}" for place in places[:3]] + more


def reference(row: Row, *argv: Any, script: Any = None) -> tuple[dict[str, str], float]:
    """The leavings of the undisturbed run with these options, and how many seconds it took."""
    run = row.new("undisturbed")
    child = start(training(*argv, "--output", run, script=script), run)
    if child.wait(120):
        raise RuntimeError(f"the undisturbed run failed: {child.err}")
    seconds = time.monotonic() - child.began
    expected = leavings(run)
    shutil.rmtree(run)
    return expected, seconds


def resume_to_end(run: Path, *argv: Any, script: Any = None) -> list[str]:
    """What a user does after a kill: `--resume`; only where nothing was begun, the same command again."""
    begun = (run / "run.json").exists()
    options = ("--resume", run) if begun else (*argv, "--output", run)
    child = start(training(*options, script=script), run.with_name(run.name + "-resumed"))
    if child.wait(60) != 0 or child.err:
        return [f"{'resume' if begun else 'new start'}: exit code {child.code}: {child.err[-400:]!r}"]
    return []


def remove(run: Path) -> None:
    """Deletes a run and what its processes said."""
    shutil.rmtree(run, ignore_errors=True)
    for path in list(run.parent.iterdir()):
        if path.name.startswith(run.name + ".") or path.name.startswith(run.name + "-resumed"):
            path.unlink()
