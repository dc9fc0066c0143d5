"""Saves that are cut short or fail, and checkpoints that are not as they were written: rows 3 to 7."""

from __future__ import annotations

import contextlib
import hashlib
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
from tests.faults.kills import STEPS, in_own_namespace, may_mount, saved_step
from tests.faults.runs import (
    PR_SET_PTRACER,
    SMALL,
    Child,
    Row,
    differences,
    kill_at,
    libc,
    one_error,
    reference,
    remove,
    resume_to_end,
    start,
    training,
)
from torchbasics import checkpoint
from torchbasics.checkpoint import CheckpointError, CheckpointFolder

CALLS = "openat,open,creat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat"
OPTIONS = (*SMALL, "--keep", "2")
SAVED = 6  # the save that is disturbed: two older checkpoints are there, one is going to be removed
LINE = re.compile(r"(?:\d+ +)?(\w+)\(")


# ------------------------------------------------------------------------------------------------------- rows 3 and 4


def traced(
    work: Callable[[Callable[[], None]], Any],
    files: Path,
    *expressions: str,
    paths: Callable[[int], list[Path]] = lambda pid: [],
) -> Child:
    """A child that strace (`-e` each of `expressions`) follows from where `work` calls its argument, the gate, on.

    With `paths` (given the child's process number) only calls on those count: not what it says, nor what else it reads.
    """
    ready, go = os.pipe(), os.pipe()

    def gate() -> None:
        os.write(ready[1], b"x")
        os.read(go[0], 1)

    def body() -> Any:
        libc.prctl(PR_SET_PTRACER, -1, 0, 0, 0)  # strace is no parent of ours
        os.close(go[1])
        return work(gate)

    child = start(body, files)
    os.close(ready[1]), os.close(go[0])
    tracer = None
    try:
        if os.read(ready[0], 1):
            options = [word for expression in expressions for word in ("-e", expression)]
            options += [word for path in paths(child.pid) for word in ("-P", str(path))]
            command = ["strace", "-f", "-o", str(files.with_suffix(".strace")), *options, "-p", str(child.pid)]
            tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            line = tracer.stderr.readline()  # type: ignore[union-attr]
            if "attached" not in line:
                raise RuntimeError(f"strace: {line}")
            os.write(go[1], b"x")
        child.wait(60)
    finally:
        os.close(ready[0]), os.close(go[1])
        if tracer is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                tracer.wait(10)
            tracer.kill()
            tracer.stderr.close()  # type: ignore[union-attr]
            tracer.wait()
    return child


def traced_save(place: str, run: Path, *expressions: str, end_after: bool = False) -> Child:
    """The SMALL run, traced in one save: of step SAVED, or of best.pt in the place of an older one.

    `end_after`: the run ends after that save.
    """

    def work(gate: Callable[[], None]) -> Any:
        save, save_best, number = CheckpointFolder.save, CheckpointFolder.save_best, [0]

        def gated_save(folder: CheckpointFolder, state: Any) -> Path:
            wanted = place == "step" and state["step"] == SAVED
            if wanted:
                gate()
            path = save(folder, state)
            return os._exit(0) if wanted and end_after else path

        def gated_best(folder: CheckpointFolder, state: Any) -> None:
            number[0] += 1
            if place == "best" and number[0] == 2:
                gate()
            save_best(folder, state)
            if place == "best" and number[0] == 2 and end_after:
                os._exit(0)

        CheckpointFolder.save = gated_save  # type: ignore[method-assign]
        CheckpointFolder.save_best = gated_best  # type: ignore[method-assign]
        return training(*OPTIONS, "--output", run)()

    def touched(pid: int) -> list[Path]:
        folder, names = run / "checkpoints", ["best.pt", "best.pt.json"]
        if place == "step":
            names = [f"step-{step:08d}.pt{end}" for step in range(2, SAVED + 1, 2) for end in ("", ".json")]
        return [folder, *(folder / name for name in names), *(folder / f".{name}.{pid}.tmp" for name in names[-2:])]

    return traced(work, run, *expressions, paths=touched)


def calls_of_a_save(row: Row) -> list[tuple[str, str, int]]:
    """All system calls of the saves that matter, each as (which save, name, which of that name)."""
    found = []
    for place in ("step", "best"):
        run = row.new()
        child = traced_save(place, run, f"trace={CALLS}", end_after=True)
        if child.code:
            raise RuntimeError(f"the counted run failed: {child.err}")
        lines = run.with_suffix(".strace").read_text().splitlines()
        names = Counter(match[1] for line in lines if (match := LINE.match(line)))
        if not names["rename"] + names["renameat"] + names["renameat2"]:
            raise RuntimeError(f"no save was seen: {names}")
        remove(run)
        found += [(place, name, number) for name in sorted(names) for number in range(1, names[name] + 1)]
    return found


def why_no_strace(row: Row) -> str:
    """Why strace cannot be used here; empty if it can."""
    if not shutil.which("strace"):
        return "needs strace"
    try:
        files = row.new("probe")
        child = traced(lambda gate: (gate(), os.fsync(os.open("/", 0))), files, "inject=fsync:signal=SIGKILL:when=1")
    except (OSError, RuntimeError) as error:
        return f"strace does not work here ({error})"
    return "" if child.code == -9 else "strace cannot inject here"


def killed_in_a_save(row: Row) -> None:
    """Row 3: SIGKILL before each system call of a save; the newest intact one loads, and the run ends the same."""
    if reason := why_no_strace(row):
        return row.skip(reason)
    expected, _ = reference(row, *OPTIONS)
    calls = calls_of_a_save(row)
    chosen = row.some(calls, 3) + [call for call in calls if row.quick and call[:2] == ("best", "rename")]
    for place, name, number in chosen:
        run = row.new()
        child = traced_save(place, run, f"trace={name}", f"inject={name}:signal=SIGKILL:when={number}")
        problems = [f"exit code {child.code}"] if child.code != -9 else []
        problems += loads_without_a_word(run, place, (SAVED - 2, SAVED))
        name = f"{place}, before {name} {number}"
        row.case(name, problems, resume_to_end(run, *OPTIONS), differences(run, expected))
        remove(run)


def loads_without_a_word(run: Path, place: str, steps: tuple[int, ...]) -> list[str]:
    """Problems unless `latest` gives one of `steps`, and best.pt loads; a kill leaves nothing that looks damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = CheckpointFolder(run / "checkpoints").latest()
            if place == "best":
                steps = (STEPS,)
                tb.load_checkpoint(run / "checkpoints" / "best.pt")
        except (CheckpointError, Warning) as error:
            return [str(error)]
    return [] if found and found[1]["step"] in steps else [f"loads {found and found[0].name}"]


def failing_saves(row: Row) -> None:
    """Row 4: ENOSPC and EIO at each system call of a save, once or from there on; full and small file systems."""
    expected, _ = reference(row, *OPTIONS)
    if reason := why_no_strace(row):
        row.skip(reason)
    else:
        ways = [(error, on) for error in ("ENOSPC", "EIO") for on in ("", "+")]
        cases = [(*call, *way) for call in calls_of_a_save(row) for way in ways]
        for place, name, number, error, on in row.some(cases, 3):
            run = row.new()
            child = traced_save(place, run, f"trace={name}", f"inject={name}:error={error}:when={number}{on}")
            fault_case(row, f"{place}, {error} at {name} {number}{on}", child, run, place, expected)
    for room in row.pick((500, 5000, 13_500, 200_000, 1_000_000, 3_000_000), (5000,)):  # what it says is in files too
        run = row.new()
        files = lambda n=room: resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))  # noqa: E731
        hook = lambda trainer, set_limit=files: trainer.step == SAVED and set_limit()  # noqa: E731
        child = start(training(*OPTIONS, "--output", run, hook=hook), run)
        child.wait()
        fault_case(row, f"files of at most {room} bytes", child, run, "step", expected)
    small_file_systems(row, expected)


def fault_case(row: Row, name: str, child: Child, run: Path, place: str, expected: dict[str, str]) -> None:
    """One line and exit 1, or it went on; what was saved before is as it was; a resume ends the same."""
    problems = [] if child.code == 0 else one_error(child, codes=(1,))
    problems += loads_without_a_word(run, place, (SAVED - 2, SAVED) if child.code else (STEPS,))
    temporary = [path.name for path in run.rglob("*.tmp")]
    if child.code == 0 or not (name.endswith("+") or "unlink" in name):
        problems += [f"left {temporary}"] * bool(temporary)
    if child.code:
        problems += resume_to_end(run, *OPTIONS)
    row.case(name, problems, differences(run, expected))
    remove(run)


def small_file_systems(row: Row, expected: dict[str, str]) -> None:
    """A tmpfs that is too small, and then is made larger."""
    if reason := may_mount():
        return row.skip(f"1 MB tmpfs: {reason}")
    for size in row.pick(("64k", "1m", "4m", "8m", "11m"), ("1m",)):
        place = row.new("small")
        place.mkdir()
        inner = Row(4, "", row.seed, row.quick, row.new("inner"))
        inner.folder.mkdir()

        def work(place: Path = place, inner: Row = inner, size: str = size) -> int:
            run = place / "run"
            child = start(training(*OPTIONS, "--output", run), inner.folder / "first")
            problems = [] if child.wait() == 0 else one_error(child, "o space left", codes=(1,))
            if size in ("64k", "1m", "4m") and child.code == 0:
                problems.append("it cannot have fitted")
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True, timeout=20)
            if child.code:
                again = ("--resume", run) if (run / "run.json").exists() else (*OPTIONS, "--output", run)
                child = start(training(*again), inner.folder / "second")
                problems += [f"again: {child.err[-300:]}"] if child.wait() else []
            print("\n".join(problems + differences(run, expected)))
            return 0

        mounts = (("-t", "tmpfs", "-o", f"size={size}", "none", str(place)),)
        child = start(in_own_namespace(work, *mounts), row.new("files"))
        code = child.wait()
        row.case(f"tmpfs of {size}", f"exit code {code}: {child.err[-300:]}" if code else "", child.out.strip())


# ------------------------------------------------------------------------------------------------------- rows 5 and 6


def interrupted_run(row: Row, *more: str, at: int = 9) -> Path:
    """A run that was killed in its second epoch, with three checkpoints."""
    run = row.new()
    start(training(*SMALL, *more, "--output", run, hook=kill_at(at)), run).wait()
    return run


def damaged(row: Row) -> None:
    """Row 5: the newest checkpoint truncated, emptied, replaced or without its record."""
    expected, _ = reference(row, *SMALL)
    run = interrupted_run(row)
    folder = run / "checkpoints"
    (before, _), (_, path) = CheckpointFolder(folder).steps()[-2:]
    content, record = path.read_bytes(), path.with_name(path.name + ".json").read_bytes()
    lengths = sorted({0, 1, len(content) - 1, *(row.rng.randrange(len(content)) for _ in range(row.pick(200, 10)))})
    for length in lengths:
        path.write_bytes(content[:length])
        row.case(f"truncated to {length}", falls_back(folder, before))
    for name, replace in replacements(path, content, record).items():
        put_back(path, content, record)
        replace()
        row.case(name, falls_back(folder, before, "" if "link" in name or "empty" in name else WORDS[name[:6]]))
        if name in row.pick(tuple(replacements(path, content, record)), ("a pipe",)):
            copy = row.new()
            shutil.copytree(run, copy, symlinks=True, copy_function=copy_special)
            child = start(training("--resume", copy), copy)
            warned = [line for line in child.err.splitlines() if line] if child.wait(30) == 0 else []
            problems = [] if len(warned) == 1 and warned[0].startswith("warning: ") else [f"said {child.err[-300:]!r}"]
            row.case(f"{name}, resumed", problems, differences(copy, expected))
            remove(copy)
    put_back(path, content, record)
    none_intact(row, run)


def copy_special(source: str, target: str) -> Any:
    """As shutil.copy2, and pipes too."""
    return shutil.copy2(source, target) if os.path.isfile(source) else os.mkfifo(target)


def replacements(path: Path, content: bytes, record: bytes) -> dict[str, Callable[[], Any]]:
    """What can stand in the place of a checkpoint, or of its record."""
    record_path = path.with_name(path.name + ".json")
    other = path.with_name("elsewhere")

    def link() -> None:
        other.write_bytes(content)
        path.unlink()
        path.symlink_to(other)

    return {
        "a directory": lambda: (path.unlink(), path.mkdir()),
        "a pipe": lambda: (path.unlink(), os.mkfifo(path)),
        "a link to a copy of it": link,
        "a link to itself": lambda: (path.unlink(), path.symlink_to(path)),
        "no record": lambda: record_path.unlink(),
        "an empty record": lambda: record_path.write_bytes(b""),
        "a directory as record": lambda: (record_path.unlink(), record_path.mkdir()),
        "a pipe as record": lambda: (record_path.unlink(), os.mkfifo(record_path)),
    }


def put_back(path: Path, content: bytes, record: bytes) -> None:
    """The checkpoint and its record as they were."""
    for place, value in ((path, content), (path.with_name(path.name + ".json"), record)):
        if place.is_dir() and not place.is_symlink():
            place.rmdir()
        elif os.path.lexists(place):
            place.unlink()
        place.write_bytes(value)


WORDS = {"a dire": "not a regular file", "a pipe": "not a regular file", "no rec": "is missing"}


def falls_back(folder: Path, step: int, word: str = "") -> list[str]:
    """Problems unless `step` is loaded, with one warning, which has `word` in it."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = CheckpointFolder(folder).latest()
        except (CheckpointError, OSError) as error:
            return [f"refused: {error}"]
    if not found or found[1]["step"] != step or len(warned) != 1:
        return [f"loaded {found and found[0].name} with {len(warned)} warnings, expected step {step} with one"]
    return [] if word in str(warned[0].message) else [f"{word!r} is not in {warned[0].message}"]


def none_intact(row: Row, run: Path) -> None:
    """If no checkpoint is intact: exit 2, and nothing is changed."""
    for name, damage in {
        "all truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "all emptied": lambda path: path.write_bytes(b""),
        "all without record": lambda path: path.with_name(path.name + ".json").unlink(),
        "all gone": lambda path: path.unlink(),
    }.items():
        copy = row.new()
        shutil.copytree(run, copy)
        for _, path in CheckpointFolder(copy / "checkpoints").steps():
            damage(path)
        before = {path: path.read_bytes() for path in (copy / "checkpoints").glob("*.pt")}
        metrics = (copy / "metrics.jsonl").read_bytes()
        child = start(training("--resume", copy), copy)
        child.wait(30)
        changed = any(not path.exists() or path.read_bytes() != before[path] for path in before)
        changed |= (copy / "metrics.jsonl").read_bytes() != metrics
        word = "" if name == "all gone" else "is intact"
        row.case(name, one_error(child, word, codes=(2,)), ["something was changed"] * changed)
        remove(copy)


def flipped_bits(row: Row) -> None:
    """Row 6: single bits of checkpoint and record; each is seen before torch reads the file."""
    path = row.new("flips") / "best.pt"
    path.parent.mkdir()
    state = {"epoch": 1, "loss": 0.5, "model_state_dict": {"w": torch.rand(50, 20)}, "optimizer_state_dict": {}}
    tb.save_checkpoint(state, path)
    places = (path, path.with_name("best.pt.json"))
    with mock.patch.object(torch, "load", side_effect=AssertionError("torch has read it")):
        for number in range(row.pick(2000, 200)):
            place = places[number % 4 == 3]
            content = place.read_bytes()
            bit = row.rng.randrange(8 * len(content))
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            place.write_bytes(changed)
            problem = ""
            try:
                tb.load_checkpoint(path)
                problem = "was not seen"
            except CheckpointError as error:
                problem = "torch has read it" if "torch has read it" in str(error) else ""
            row.case(f"{place.name}, bit {bit}", problem)
            place.write_bytes(content)
    row.failures += [] if tb.load_checkpoint(path)["epoch"] == 1 else ["the intact one does not load"]


# -------------------------------------------------------------------------------------------------------------- row 7


def forge(path: Path, value: Any) -> None:
    """Writes `value` as a checkpoint with a record that is right: only its content can be refused."""
    box = io.BytesIO()
    torch.save(value, box)
    forge_bytes(path, box.getvalue())


def forge_bytes(path: Path, content: bytes) -> None:
    """Writes any bytes with a record that is right."""
    path.write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.with_name(path.name + ".json").write_bytes(checkpoint._record_bytes([entry]))


def of_something_else(row: Row) -> None:
    """Row 7: keys missing, unknown, of another shape or dtype, NaN weights, another model, a future format."""
    run = interrupted_run(row)
    newest = CheckpointFolder(run / "checkpoints").steps()[-1][1]
    name = "layers.0.weight"
    cases = {**whole_changes(), **weight_changes(name)}
    for what, (change, word) in cases.items():
        if row.quick and what not in ("no 'epoch'", "NaN weights", "a future format", "wrong shape"):
            continue
        copy = row.new()
        shutil.copytree(run, copy)
        for _, path in CheckpointFolder(copy / "checkpoints").steps():
            state = tb.load_checkpoint(path)
            change(state)
            forge(path, state)
        child = start(training("--resume", copy), copy)
        child.wait(30)
        row.case(what, one_error(child, word, "checkpoints/step-", codes=(2,)))
        remove(copy)
    other_models(row, run, newest)


def whole_changes() -> dict[str, tuple[Callable[[dict], Any], str]]:
    """Changes of the checkpoint's own entries, and the word that the line must have."""
    changes: dict[str, tuple[Callable[[dict], Any], str]] = {
        f"no {key!r}": (lambda state, key=key: state.pop(key), repr(key))
        for key in ("epoch", "model_state_dict", "optimizer_state_dict", "loss")
    }
    changes |= {
        f"no {key!r}, which the Trainer needs": (lambda state, key=key: state.pop(key), key)
        for key in ("history", "step", "batch", "random_state", "position", "running", "best_score", "first_epoch")
    }
    changes |= {
        f"{key} is a {type(value).__name__}": (lambda state, key=key, value=value: state.update({key: value}), key)
        for key, value in (("epoch", "1"), ("epoch", 1.5), ("model_state_dict", []), ("optimizer_state_dict", 3))
    }
    changes |= {
        f"{key} is a {type(value).__name__} too": (lambda state, key=key, value=value: state.update({key: value}), key)
        for key, value in (("history", 3), ("step", "x"), ("batch", None), ("random_state", []), ("position", 7))
    }
    changes["a future format"] = (lambda state: state.update(format=2), "format 2")
    changes["another loss function's averages"] = (
        lambda state: state.update(averages_state_dict={"n_averaged": torch.tensor(1)}),
        "averages_state_dict",
    )
    return changes


def weight_changes(name: str) -> dict[str, tuple[Callable[[dict], Any], str]]:
    """Changes of one weight, and the word that the line must have."""

    def change(value: Callable[[torch.Tensor], Any]) -> Callable[[dict], Any]:
        return lambda state: state["model_state_dict"].update({name: value(state["model_state_dict"][name])})

    return {
        "a weight is missing": (lambda state: state["model_state_dict"].pop(name), name),
        "an unknown weight": (lambda state: state["model_state_dict"].update({"extra": torch.ones(1)}), "extra"),
        "wrong shape": (change(lambda weight: weight[:-1].clone()), name),
        "wrong dtype": (change(lambda weight: weight.double()), name),
        "NaN weights": (change(lambda weight: weight.clone().fill_(float("nan"))), name),
        "one infinite weight": (change(lambda weight: weight.clone().index_fill_(0, torch.tensor(0), torch.inf)), name),
        "a list as weight": (change(lambda weight: [1.0]), name),
    }


def other_models(row: Row, run: Path, newest: Path) -> None:
    """A checkpoint of another model, in the right place and under the right name."""
    other = interrupted_run(row, "--model", "simplenet")
    for end in ("", ".json"):
        for _, path in CheckpointFolder(run / "checkpoints").steps():
            shutil.copy(f"{CheckpointFolder(other / 'checkpoints').steps()[-1][1]}{end}", f"{path}{end}")
    child = start(training("--resume", run), run)
    child.wait(30)
    row.case("another model's", one_error(child, "model is 'simplenet' there, 'mlp' here", codes=(2,)))
    if saved_step(run) != int(newest.name[5:-3]):
        row.failures.append("another model's: something was saved")
