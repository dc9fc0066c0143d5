"""Saves that are cut short or fail, and checkpoints that are not as they were written."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import io
import os
import re
import resource
import shutil
import subprocess
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import torchbasics as tb
from torchbasics import checkpoint
from torchbasics.checkpoint import CheckpointError, load_latest, saved_steps, step_path

from .runs import (
    SMALL,
    STEPS,
    Child,
    Row,
    at_step,
    contents,
    differences,
    exit_problems,
    refusal_problems,
    resume_problems,
    send_self,
    shared_number,
    start,
    training,
    undisturbed,
)

SAVED = 8  # the step whose save is disturbed: three older ones are there, of which one will be removed
PLACES = ("step", "best", "metrics")  # the save of that step; best.pt and metrics.jsonl in the place of an older one
CALLS = "open,openat,creat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,mkdir"


def around_save(place: str, enter: Callable[[], object], leave: Callable[[], object]) -> None:
    """Let this process call `enter` and `leave` around the save at `place`."""
    owner: Any
    wanted: Callable[..., bool]
    if place == "step":
        owner, name, number, wanted = checkpoint, "save_step", 1, lambda state, folder, step: step == SAVED
    elif place == "best":
        owner, name, number, wanted = checkpoint, "save_checkpoint", 2, lambda state, path: path.name == "best.pt"
    else:  # the first one, of no epoch, is written at the start
        owner, name, number, wanted = tb.RunDirectory, "write_metrics", 3, lambda run, trainer: True
    function, saves = getattr(owner, name), 0

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        nonlocal saves
        saves += wanted(*args)
        if not wanted(*args) or saves != number:
            return function(*args)
        enter()
        try:
            return function(*args)
        finally:
            leave()

    mock.patch.object(owner, name, wrapped).start()


def before_call(
    run: Path, place: str, at: int, action: Callable[[], None], calls: ctypes.c_int64, and_later: bool = False
) -> Callable[[], int]:
    """Return the work of a child that calls `action` before call number `at` of the save at `place`, or from there on.

    Calls are what Python asks of the system: open, write, fsync, replace, unlink. `calls` counts them.
    """
    armed = [False]

    def tick() -> None:
        calls.value += armed[0]
        if armed[0] and (calls.value == at or (and_later and calls.value > at > 0)):
            action()

    class File(io.FileIO):
        def write(self, data: Any) -> Any:
            tick()
            return super().write(data)

    def open_file(path: Any, mode: str = "r", **options: Any) -> Any:
        tick()
        return io.BufferedRandom(File(path, "w+")) if mode == "w+b" else open(path, mode, **options)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            tick()
            return function(*args, **options)

        return call

    def before() -> None:
        checkpoint.open = open_file  # type: ignore[attr-defined]  # hides the built-in one
        for name in ("fsync", "replace", "unlink"):
            mock.patch.object(os, name, counted(getattr(os, name))).start()
        around_save(place, lambda: armed.insert(0, True), lambda: armed.insert(0, False))

    return training(*SMALL, "--output", run, before=before)


def calls_of_saves(row: Row) -> list[tuple[str, int]]:
    """Return the calls of the save at each place, as (place, number)."""
    found = []
    for place in row.pick(PLACES, PLACES[:1]):
        run, calls = row.new(), shared_number()
        child = start(before_call(run, place, -1, send_self(), calls), run)
        if exit_problems(child, 0) or calls.value < 5:
            raise RuntimeError(f"{calls.value} calls were seen in the save of {place}: {child.err}")
        found += [(place, number + 1) for number in range(calls.value)]
    return found


def killed_in_a_save(row: Row) -> None:
    """SIGKILL before each system call of a save: what was saved before loads, and the run ends the same."""
    for place, at in row.some(calls_of_saves(row), 2):
        run = row.new()
        child = start(before_call(run, place, at, send_self(), shared_number()), run)
        kill_case(row, f"{place}, before call {at}", child)
    if not row.full:
        return
    if reason := strace_missing(row):
        row.skipped.append(f"system calls by strace: {reason}")
        return
    for place in PLACES:
        run = row.new()
        traced_save(run, place, lambda: os._exit(0), f"trace={CALLS}")
        lines = run.with_suffix(".strace").read_text().splitlines()
        names = Counter(match[1] for line in lines if (match := re.match(r"(?:\d+ +)?(\w+)\(", line)))
        if not names["rename"] + names["renameat"] + names["renameat2"]:
            raise RuntimeError(f"strace saw no save: {names}")
        for name, number in [(name, i + 1) for name, count in sorted(names.items()) for i in range(count)]:
            run, inject = row.new(), f"inject={name}:signal=SIGKILL:when={number}"
            kill_case(row, f"{place}, before {name} {number}", traced_save(run, place, bool, f"trace={name}", inject))


def kill_case(row: Row, name: str, child: Child) -> None:
    expected, _ = undisturbed(row, *SMALL)
    run, place = child.log, name.partition(",")[0]
    problems = exit_problems(child, -9) + loading_problems(run, place)
    row.case(name, problems, resume_problems(run, expected, *SMALL))


def loading_problems(run: Path, place: str) -> list[str]:
    """Return a problem unless the newest checkpoint and best.pt load without a warning."""
    steps = (SAVED - 2, SAVED) if place == "step" else (STEPS - 2, STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = load_latest(run / "checkpoints")
            tb.load_checkpoint(run / "checkpoints" / "best.pt", require_seal=True)
        except (OSError, ValueError, Warning) as error:
            return [repr(error)]
    return [] if found and found[1]["step"] in steps else [f"loads {found and found[0].name}, expected step {steps}"]


def traced(work: Callable[[Callable[[], None]], Any], log: Path, *expressions: str) -> Child:
    """Return a child that has ended, followed by strace (`-e` each of `expressions`) from where it called the gate."""
    ready, go = os.pipe(), os.pipe()

    def gate() -> None:
        os.write(ready[1], b"x")
        os.read(go[0], 1)

    child = start(lambda: os.close(go[1]) or work(gate), log)  # type: ignore[func-returns-value]
    os.close(ready[1])
    os.close(go[0])
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ready[0])
        if os.read(ready[0], 1):
            options = [word for expression in expressions for word in ("-e", expression)]
            command = ["strace", "-f", "-o", str(log.with_suffix(".strace")), *options, "-p", str(child.pid)]
            tracer = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            stack.callback(tracer.kill)
            assert tracer.stderr is not None
            if "attached" not in (line := tracer.stderr.readline()):
                raise RuntimeError(f"strace: {line}")
        os.close(go[1])  # which opens the gate
        child.wait()
    return child


def traced_save(run: Path, place: str, leave: Callable[[], object], *expressions: str) -> Child:
    """Run the script under strace from the save at `place` on, and call `leave` when that is done."""

    def work(gate: Callable[[], None]) -> int:
        return training(*SMALL, "--output", run, before=lambda: around_save(place, gate, leave))()

    return traced(work, run, *expressions)


def strace_missing(row: Row) -> str:
    """Return why strace cannot be used here, or nothing."""
    if not shutil.which("strace"):
        return "it is not installed"
    try:
        child = traced(lambda gate: [gate(), os.sync()], row.new("probe"), "inject=sync:signal=SIGKILL")  # type: ignore
    except (OSError, RuntimeError) as error:
        return f"it does not work ({error})"
    return "" if child.code == -9 else "it cannot inject"


def failing_saves(row: Row) -> None:
    """ENOSPC and EIO in each call of a save, once or from there on; and the system's own limit on file sizes."""
    ways = [(number, and_later) for number in (errno.ENOSPC, errno.EIO) for and_later in (False, True)]
    for (place, at), (number, and_later) in row.some([(call, way) for call in calls_of_saves(row) for way in ways], 1):

        def fail(number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        run = row.new()
        child = start(before_call(run, place, at, fail, shared_number(), and_later), run)
        name = f"{place}, {errno.errorcode[number]} in call {at}" + " and later" * and_later
        failure_case(row, name, child, os.strerror(number))
    for room in row.pick((500, 5000, 50_000, 500_000, 1_000_000), (5000,)):  # the error line is in a file, too
        run = row.new()

        def limit(room: int = room) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

        child = start(training(*SMALL, "--output", run, hook=at_step(SAVED, limit)), run)
        failure_case(row, f"step, files of at most {room} bytes", child, os.strerror(errno.EFBIG))


def failure_case(row: Row, name: str, child: Child, reason: str) -> None:
    """Check that the run went on, or said why not; that what was saved is intact, and that a resume is exact."""
    expected, _ = undisturbed(row, *SMALL)
    run, place = child.log, name.partition(",")[0]
    if child.wait() == 0:
        row.case(name, [f"printed {child.err!r}"] * bool(child.err), differences(run, expected))
        return
    problems = refusal_problems(child, 1, reason) + loading_problems(run, place)
    rest = [path.name for path in run.rglob(".*.unfinished")]
    problems += [f"left {rest}"] * (bool(rest) and "later" not in name)  # they could not be removed
    row.case(name, problems, resume_problems(run, expected, *SMALL))


def interrupted_run(row: Row) -> Path:
    """Return a run that was killed in its second epoch, with checkpoints of steps 4, 6 and 8."""
    run = row.new()
    problems = exit_problems(start(training(*SMALL, "--output", run, hook=at_step(9, send_self())), run), -9)
    if problems or [step for step, _ in saved_steps(run / "checkpoints")] != [4, 6, 8]:
        raise RuntimeError(f"a run could not be interrupted: {problems}")
    return run


def copy_of(row: Row, original: Path) -> Path:
    run = row.new()
    shutil.copytree(original, run)
    return run


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flip_any(row: Row, path: Path) -> None:
    flip(path, row.random.randrange(8 * path.stat().st_size))


def damaged(row: Row) -> None:
    """Flipped bits and cut files are seen before torch reads them; the newest intact one is used. Without: exit 2."""
    flipped_bits(row)
    expected, _ = undisturbed(row, *SMALL)
    original = interrupted_run(row)
    for steps in row.pick([(8,), (8, 6)] * 5, [(8, 6)]):
        run = copy_of(row, original)
        for step in steps:
            flip_any(row, step_path(run / "checkpoints", step))
        child = start(training("--resume", run), run)
        problems = exit_problems(child, 0)
        for step in steps:
            line = rf"warning: .*step-{step:08d}.pt: damaged.*continuing from step-{min(steps) - 2:08d}.pt\n"
            problems += [f"printed {child.err!r}"] * (not re.search(line, child.err))
        row.case(f"resumed with damaged steps {steps}", problems, differences(run, expected))
    for name, damage in row.some(
        [
            ("flipped", lambda path: flip_any(row, path)),
            ("cut", lambda path: path.write_bytes(path.read_bytes()[:-1])),
            ("empty", lambda path: path.write_bytes(b"")),
        ],
        1,
    ):
        run = copy_of(row, original)
        for _, path in saved_steps(run / "checkpoints"):
            damage(path)
        row.case(f"all {name}", unchanged_refusal(row, run, "none of the 3 checkpoints"))
    cut_files(row, original / "checkpoints")


def cut_files(row: Row, folder: Path) -> None:
    """Cut the newest checkpoint to some lengths, those around its last record and seal included."""
    newest = step_path(folder, 8)
    content = newest.read_bytes()
    size = len(content)
    lengths = {0, 1, 22, 64, size - 1, size - 64, size - 65, size - 66, size - 86}
    lengths |= {row.random.randrange(size) for _ in range(row.pick(200, 5))}
    for length in sorted(lengths):
        newest.write_bytes(content[:length])
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = load_latest(folder)
        right = found is not None and found[1]["step"] == 6 and len(warned) == 1
        row.case(f"cut to {length} bytes", [f"loads {found and found[0].name}, {len(warned)} warnings"] * (not right))


def flipped_bits(row: Row) -> None:
    """Flip single bits of a small checkpoint."""
    path = row.new("flipped.pt")
    tb.save_checkpoint({"epoch": 1, "model_state_dict": {"w": torch.rand(50, 20)}}, path)
    with mock.patch.object(torch, "load", side_effect=AssertionError("torch has read it")):
        for bit in row.random.sample(range(8 * path.stat().st_size), row.pick(5000, 200)):
            flip(path, bit)
            try:
                tb.load_checkpoint(path, require_seal=True)
            except CheckpointError as error:
                row.case(f"bit {bit}", str(error) if "torch has read it" in str(error) else "")
            else:
                row.case(f"bit {bit}", "was not seen")
            flip(path, bit)
    row.failures += [] if tb.load_checkpoint(path)["epoch"] == 1 else ["the intact file does not load"]


def unchanged_refusal(row: Row, run: Path, *words: str) -> list[str]:
    """Return what is wrong with a `--resume` that must end with exit code 2 and one line, and change nothing."""
    before = contents(run)
    problems = refusal_problems(start(training("--resume", run), row.new("refused")), 2, *words)
    return problems + ["something was changed"] * (contents(run) != before)


def foreign(row: Row) -> None:
    """Checkpoints deleted before a resume and during a run; strange files beside them, which stay."""
    expected, _ = undisturbed(row, *SMALL)
    original = interrupted_run(row)
    strange: list[tuple[str, Callable[[Path], object]]] = [
        ("step-00000099.pt", lambda path: path.mkdir()),
        ("step-00000098.pt", lambda path: torch.save({"step": 98}, path)),
        ("step-00000097.pt", lambda path: path.symlink_to("nowhere")),
        ("step-9.pt", lambda path: path.write_text("mine")),
        ("step-00000008.pt.bak", lambda path: path.write_text("mine")),
        (".best.pt.1.unfinished", lambda path: path.write_text("half")),
        ("folder", lambda path: path.mkdir()),
    ]
    for name, make in row.some(strange, 1):
        run = copy_of(row, original)
        place = run / "checkpoints" / name
        make(place)
        child = start(training("--resume", run), run)
        problems = exit_problems(child, 0)
        if name.startswith("step-000000") and name.endswith(".pt"):  # reported, and passed over
            line = rf"warning: .*{name}.*continuing from step-00000008.pt\n"
            problems += [f"printed {child.err!r}"] * (not re.match(line, child.err))
            problems += ["it is gone"] * (not os.path.lexists(place))
            place.rename(run / "strange")  # else it is the newest
        else:
            problems += [f"printed {child.err!r}"] * bool(child.err)
            problems += ["it is gone"] * (not place.exists() and "unfinished" not in name)
        row.case(name, problems, differences(run, expected))
    for name, pattern in row.some([("the newest", "*8.pt"), ("older ones", "*[46].pt")], 1):
        run = copy_of(row, original)
        for path in (run / "checkpoints").glob(pattern):
            path.unlink()
        row.case(f"deleted: {name}", resume_problems(run, expected))
    refusals = [(f"checkpoints{name}", "no checkpoint to resume from") for name in ("", "/step-*")]
    for pattern, said in row.some([*refusals, ("checkpoints/best.pt", "the run's best weights")], 2):
        run = copy_of(row, original)
        for path in list(run.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        row.case(f"deleted: {pattern}", unchanged_refusal(row, run, said))
    run = row.new()
    hook = at_step(5, lambda: shutil.rmtree(run / "checkpoints"))
    child = start(training(*SMALL, "--output", run, hook=hook), run)
    row.case("checkpoints deleted in a run", exit_problems(child, 0), differences(run, expected))
    if not row.full:
        return
    gone = row.new()
    child = start(training(*SMALL, "--output", gone, hook=at_step(5, lambda: shutil.rmtree(gone))), gone)
    row.case("run deleted in a run", refusal_problems(child, 1, "was moved or removed"))
