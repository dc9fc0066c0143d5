"""Run the training scripts in child processes: start one, disturb it, compare what it leaves with an undisturbed run.

This process imports torch and trains nothing, so that a fork of it is a fresh process, ready in milliseconds instead of
seconds. Each child leads a process group, dies with this process, and has a time limit.

Called as `python -m tests.faults.runs NAME OPTION…` (under torchrun), it runs scripts/NAME.py on the same few images.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import json
import mmap
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # every run imports it: once here, not in each child
from torch import Tensor

import torchbasics as tb
from tests.common import load_script
from torchbasics import checkpoint, cli
from torchbasics.checkpoint import saved_steps
from torchbasics.data import Images, Splits

libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
HUNG = 999  # the exit code of a child that was ended because it took too long

# 224 training images make 7 batches an epoch.
SAVED_PER_EPOCH = (
    *("--dataset", "digits", "--model", "simplenet", "--epochs", "2", "--batch-size", "32", "--limit-batches", "7"),
    *("--precision", "fp32", "--device", "cpu", "--quiet"),
)
SMALL = (*SAVED_PER_EPOCH, "--save-every", "2")
STEPS = 14
Hook = Callable[[tb.Trainer], Any]


def draw_splits() -> Splits:
    """Return few drawn digits, in the form in which `load_splits` returns 70,000."""
    inputs, targets = tb.draw_digits(352)
    classes = tuple("0123456789")
    parts = (slice(224), slice(224, 288), slice(288, 352))
    train, val, test = (Images(inputs[part], targets[part], classes) for part in parts)
    return Splits(train, val, test, "digits", "")


SPLITS = draw_splits()
SCRIPTS = {name: load_script(name) for name in ("train_mnist", "train_ddp")}


@dataclass
class Row:
    """One line of the table: what was injected how often, and what went wrong."""

    name: str
    title: str
    seed: int
    full: bool
    folder: Path
    count: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.seed} {self.name}")
        self.paths = 0

    def pick(self, full: Any, sample: Any) -> Any:
        """Return how much to do: in the whole matrix, and in the sample."""
        return full if self.full else sample

    def some(self, cases: list, sample: int) -> list:
        """Return all of `cases`, or a random sample of them in the same order."""
        return cases if self.full else sorted(self.random.sample(cases, min(sample, len(cases))), key=cases.index)

    def case(self, name: str, *problems: str | list[str]) -> None:
        """Count one fault. `problems` says what went wrong; empty ones do not count."""
        self.count += 1
        found = [text for part in problems for text in ([part] if isinstance(part, str) else part) if text]
        self.failures += [f"{name}: {text}" for text in found]

    def new(self, name: str = "run") -> Path:
        """Return a path in the row's folder that does not exist yet."""
        self.paths += 1
        return self.folder / f"{name}-{self.paths}"


class Child:
    """A forked process that leads a process group. `err` is what it printed on stderr, once it has ended."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid = pid
        self.log = log
        self.code: int | None = None
        self.err = ""
        self.began = time.monotonic()

    def poll(self) -> int | None:
        """Return the exit code, minus the signal that killed it; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.end(os.waitstatus_to_exitcode(status))
        return self.code

    def end(self, code: int) -> None:
        path = self.log.with_suffix(".err")  # it may have been killed before it made it
        self.code, self.err = code, path.read_text(errors="backslashreplace") if path.exists() else ""

    def wait(self, limit: float = 60.0) -> int:
        """Return the exit code. After `limit` seconds let the child print where it is, end it, and return HUNG."""
        deadline, pause = time.monotonic() + limit, 0.001
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGUSR2)
                time.sleep(0.5)
                self.kill_group()
                os.waitpid(self.pid, 0)
                self.end(HUNG)
                break
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)
        assert self.code is not None
        return self.code

    def send(self, signum: int) -> None:
        """Send a signal, if the process is still there."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def left_behind(self, within: float = 12.0) -> str:
        """Wait for the end of the whole group; return a problem if some process outlives `within` seconds."""
        deadline = time.monotonic() + within
        while True:
            with contextlib.suppress(ChildProcessError):  # orphans became children of this process
                while os.waitpid(-self.pid, os.WNOHANG)[0]:
                    pass
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return ""
            if time.monotonic() > deadline:
                self.kill_group()
                return f"a process is left {within:g} s after the end"
            time.sleep(0.01)


_children: list[Child] = []


def start(work: Callable[[], int | None], log: Path, **environment: str) -> Child:
    """Fork a process that calls `work` and exits with its result (None: 0; an exception: 70 and a traceback)."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        _children.append(Child(pid, log))
        return _children[-1]
    code = 70
    try:
        os.setpgid(0, 0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(71)
        for number, ending in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(log.with_suffix(ending), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", write_through=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell job ignores it
        faulthandler.register(signal.SIGUSR2, file=sys.stderr)
        os.environ.update(environment)
        _children.clear()
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def adopt_orphans() -> None:
    """Make the orphans of children this process's own, so that they are seen and waited for."""
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children() -> list[str]:
    """End what is left of all groups; return a problem for each group that had not ended by itself."""
    problems = [f"{child.log.name}: {problem}" for child in _children if (problem := child.left_behind(2.0))]
    _children.clear()
    return problems


def shared_number() -> ctypes.c_int64:
    """Return a number, 0, whose `value` a child writes and this process reads, whatever becomes of the child."""
    return ctypes.c_int64.from_buffer(mmap.mmap(-1, 8))


def run_script(name: str, argv: list[str]) -> int:
    """Return the exit code of scripts/NAME.py, run in this process on few images."""
    torch.set_num_threads(1)
    mock.patch.object(tb, "load_splits", lambda *args, **options: SPLITS).start()
    return cli.run(SCRIPTS[name].main, argv)


def training(
    *argv: Any, hook: Hook | None = None, before: Callable[[], Any] | None = None, script: str = "train_mnist"
) -> Callable[[], int]:
    """Return the work of a child: call `before`, then the script, with `hook` after each step."""

    def work() -> int:
        if hook is not None:
            fit = tb.Trainer.fit

            def hooked(trainer: tb.Trainer, *args: Any, **options: Any) -> Any:
                trainer.on_step_end.append(hook)
                return fit(trainer, *args, **options)

            mock.patch.object(tb.Trainer, "fit", hooked).start()
        if before is not None:
            before()
        return run_script(script, [str(word) for word in argv])

    return work


def at_step(step: int, action: Callable[[], Any], reached: ctypes.c_int64 | None = None) -> Hook:
    """Return a hook that calls `action` after `step`, before its save; `reached` follows the steps."""

    def hook(trainer: tb.Trainer) -> None:
        if reached is not None:
            reached.value = trainer.step
        if trainer.step == step:
            action()

    return hook


def send_self(signum: int = signal.SIGKILL, times: int = 1) -> Callable[[], None]:
    """Return a function that sends this process a signal."""

    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), signum)

    return send


def exit_problems(child: Child, *codes: int) -> list[str]:
    """Wait for a child; return a problem unless its exit code is one of `codes` and it printed no traceback."""
    if child.wait() in codes and "Traceback" not in child.err:
        return []
    return [f"exit code {child.code}, expected {' or '.join(map(str, codes))}: {child.err[-400:]!r}"]


def refusal_problems(child: Child, code: int, *words: str) -> list[str]:
    """Wait for a child; return problems unless it ended with `code` and one line `error: …` that has all `words`."""
    problems = exit_problems(child, code)
    right = re.fullmatch(r"(warning: .*\n)*error: .*\n", child.err) and all(word in child.err for word in words)
    return problems + [f"printed {child.err[-400:]!r}, expected one line with {words}"] * (not right)


def flat(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of a nested value as text, each with its place; of a tensor the hash of its bytes."""
    if isinstance(value, Tensor):
        yield place, checkpoint.weights_hash({"": value})
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{place}[{key!r}]")
    elif isinstance(value, (list, tuple)) and len(value) < 100:
        for i, item in enumerate(value):
            yield from flat(item, f"{place}[{i}]")
    else:
        yield place, repr(value)


def leavings(run: Path) -> dict[str, str]:
    """Return all that must be the same whether a run was disturbed or not: place → value or hash."""
    newest = saved_steps(run / "checkpoints")[-1][1]
    found = {"newest": newest.name, "metrics.jsonl": (run / "metrics.jsonl").read_text()}
    result = json.loads((run / "run.json").read_text())["result"]
    found |= flat({name: value for name, value in result.items() if "seconds" not in name}, "result")
    for path in (newest, run / "checkpoints" / "best.pt"):
        state = tb.load_checkpoint(path, require_seal=True)
        del state["metadata"], state["run_id"]  # the name of the directory, and a random one
        found |= flat(state, path.name)
    return found


def differences(run: Path, expected: dict[str, str]) -> list[str]:
    """Return where the leavings of a run differ from `expected`: at most three places."""
    try:
        found = leavings(run)
    except (ValueError, OSError, LookupError) as error:
        return [f"cannot be read: {error!r}"]
    places = [place for place in {**expected, **found} if found.get(place) != expected.get(place)]
    return [f"{len(places)} values differ: {', '.join(places[:3])}"] if places else []


_undisturbed: dict[Any, tuple[dict[str, str], float]] = {}


def undisturbed(row: Row, *argv: Any, work: Callable[[Path], Any] | None = None) -> tuple[dict[str, str], float]:
    """Return the leavings of the undisturbed run with these options (or of `work`), and its seconds."""
    if (argv, work) not in _undisturbed:
        run = row.new("undisturbed")
        child = start(work(run) if work else training(*argv, "--output", run), run)
        if child.wait() or child.err:
            raise RuntimeError(f"the undisturbed run failed: {child.err}")
        _undisturbed[argv, work] = leavings(run), time.monotonic() - child.began
    return _undisturbed[argv, work]


def resume_problems(run: Path, expected: dict[str, str], *argv: Any) -> list[str]:
    """Do what a user does after a kill: `--resume`, or without a checkpoint start anew in another directory.

    Return what goes wrong, and in what the finished run differs from the undisturbed one.
    """
    options: tuple[Any, ...] = ("--resume", run)
    if not saved_steps(run / "checkpoints"):
        run = run.with_name(run.name + "-anew")
        options = (*argv, "--output", run)
    child = start(training(*options), run.with_name(run.name + "-continued"))
    problems = exit_problems(child, 0) + [f"printed {child.err!r}"] * bool(child.err)
    return problems + differences(run, expected)


def last_step(run: Path) -> int:
    """Return the step of the newest checkpoint, 0 without one."""
    return max((step for step, _ in saved_steps(run / "checkpoints")), default=0)


def contents(folder: Path) -> dict[Path, bytes]:
    """Return the content of all files in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def children_of(pid: int) -> list[int]:
    """Return the process numbers of the children of a process."""
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


if __name__ == "__main__":
    sys.exit(run_script(sys.argv[1], sys.argv[2:]))
