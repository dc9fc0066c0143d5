"""Processes that are killed, signalled, started all at once, or given too little: rows 1, 2, 9 to 12 and 16."""

from __future__ import annotations

import datetime
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torchbasics as tb
from tests.faults.runs import (
    ROOT,
    SMALL,
    Child,
    Row,
    Shared,
    differences,
    kill_at,
    leavings,
    libc,
    one_error,
    reference,
    remove,
    resume_to_end,
    start,
    training,
)
from tests.test_train_mnist import write_images

STEPS = 14  # of the SMALL run: 2 epochs of 7 batches
ALL_ON = ("--accumulate", "2", "--ema", "0.9", "--clip-norm", "1", "--patience", "5", "--save-every", "1")


def folder_options(row: Row, *more: str) -> tuple[str, ...]:
    """A folder of 60 small images, read by two workers: 13 batches an epoch."""
    if not (row.folder / "images").is_dir():
        write_images(row.folder / "images", 60)
    folder = ("--dataset", "folder", "--data-dir", str(row.folder / "images"), "--num-workers", "2")
    return (*SMALL, *folder, "--batch-size", "4", "--val-size", "8", *more)


# ------------------------------------------------------------------------------------------------------- rows 1 and 2


def killed_and_resumed(row: Row) -> None:
    """Row 1: SIGKILL at a random step or a random time; a new process goes on to the same end."""
    for name, options, steps, full, quick in (
        ("plain", SMALL, STEPS, 60, 2),
        ("accumulation, averages, clipping", (*SMALL, *ALL_ON), STEPS // 2 + 1, 50, 1),
        ("folder, two workers", folder_options(row), 26, 30, 1),
        ("bf16", (*SMALL, "--precision", "bf16"), STEPS, 30, 0),
    ):
        if not row.pick(full, quick):
            continue
        expected, seconds = reference(row, *options)
        killed = 0
        while killed < row.pick(full, quick):
            run, at = row.new(), row.rng.randint(1, steps)
            if row.rng.random() < 0.5:
                child = start(training(*options, "--output", run, hook=kill_at(at)), run)
                what, code = f"{name}, step {at}", child.wait()
            else:
                child, pause = start(training(*options, "--output", run), run), row.rng.uniform(0, seconds)
                time.sleep(pause)
                child.signal(signal.SIGKILL)
                what, code = f"{name}, after {pause:.3f} s", child.wait()
            if code:  # else it was too late
                killed += 1
                problems = [f"exit code {code}: {child.err}"] * (code != -9)
                row.case(what, problems, resume_to_end(run, *options), differences(run, expected))
            child.kill_group()  # its workers, which may have seen all of the next run
            remove(run)
    if not row.quick:
        two_ranks(row)
        torchrun_restarts(row)


def ddp_script() -> Any:
    """scripts/train_ddp.py as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("train_ddp_under_test", ROOT / "scripts" / "train_ddp.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    before = list(sys.path)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    sys.path[:] = before
    return module


def start_ranks(row: Row, script: Any, *argv: Any, hooks: tuple = (None, None)) -> list[Child]:
    """Two processes of one gloo job, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(
            training(*argv, "--timeout", 20, hook=hooks[rank], script=script),
            row.new(f"rank{rank}"),
            OMP_NUM_THREADS="1",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **shared,
        )
        for rank in range(2)
    ]


def two_ranks(row: Row) -> None:
    """Row 1, last part: one of two gloo ranks is killed; the other ends by itself, and both go on."""
    script, options = ddp_script(), (*SMALL, *ALL_ON[:-2])
    run = row.new()
    ranks = start_ranks(row, script, *options, "--output", run)
    if any(child.wait() for child in ranks):
        raise RuntimeError(f"the undisturbed run of two ranks failed: {[child.err for child in ranks]}")
    expected = leavings(run)
    remove(run)
    for _ in range(30):
        run, at, victim = row.new(), row.rng.randint(1, 7), row.rng.randint(0, 1)
        hooks = tuple(kill_at(at) if rank == victim else None for rank in range(2))
        ranks = start_ranks(row, script, *options, "--output", run, hooks=hooks)
        codes = [child.wait(40) for child in ranks]
        other = 1 - victim
        problems = [f"the victim ended with {codes[victim]}"] * (codes[victim] != -9)
        problems += [f"the other rank ended with {codes[other]}: {ranks[other].err[-300:]}"] * (codes[other] != 1)
        begun = ("--resume", run) if (run / "run.json").exists() else (*options, "--output", run)
        again = start_ranks(row, script, *begun)
        problems += [f"resumed: {child.err[-300:]}" for child in again if child.wait(40)]
        row.case(f"two ranks, rank {victim} at step {at}", problems, differences(run, expected))
        remove(run)


def torchrun_restarts(row: Row, kills: int = 3) -> None:
    """The same under torchrun, which restarts all by itself."""
    finals = []
    for name, wanted in (("straight", 0), ("killed", kills)):
        run = row.new(name)
        options = ("--dataset", "digits", "--model", "simplenet", "--epochs", "2", "--limit-batches", "300", "--quiet")
        options += ("--precision", "fp32", "--batch-size", "64", "--save-every", "20", "--output", str(run))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [f"--max-restarts={2 * kills}", str(ROOT / "scripts" / "train_ddp.py"), *options]
        with open(run.with_name(run.name + ".log"), "w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        try:
            done, problems = kill_workers(row, process, run, wanted)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        finals.append(leavings(run) if process.returncode == 0 else {})
        if wanted:
            problems += ["differs from the undisturbed"] * (finals[0] != finals[1])
            for _ in range(done):
                row.case("torchrun", problems)
                problems = []
        elif process.returncode:
            row.case("torchrun, undisturbed", run.with_name(run.name + ".log").read_text()[-300:])


def kill_workers(row: Row, process: subprocess.Popen, run: Path, wanted: int) -> tuple[int, list[str]]:
    """Kills a worker of torchrun `wanted` times, each after a new checkpoint was seen."""
    done, end = 0, time.monotonic() + 300
    seen: set[str] = set()
    while process.poll() is None and time.monotonic() < end:
        names = {path.name for path in (run / "checkpoints").glob("step-*.pt")}
        if done < wanted and names - seen:
            seen |= names
            time.sleep(row.rng.uniform(0, 0.5))
            found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, timeout=20)
            workers = [int(pid) for pid in found.stdout.split()]
            if workers:
                os.kill(row.rng.choice(workers), signal.SIGKILL)
                done += 1
        time.sleep(0.02)
    return done, [f"exit code {process.returncode}, {done} kills"] if process.returncode or done < wanted else []


def killed_many_times(row: Row) -> None:
    """Row 2: 20 kills within one run; each loses at most one save interval."""
    kills, interval = row.pick(20, 3), 3
    options = (*SMALL, "--epochs", row.pick("20", "3"), "--save-every", str(interval), "--ema", "0.9")
    expected, _ = reference(row, *options)
    run, reached, done = row.new(), Shared(), 0
    while done < kills:
        begun = ("--resume", run) if (run / "run.json").exists() else (*options, "--output", run)
        at = saved_step(run) + row.rng.randint(interval, 2 * interval + 1)
        child = start(training(*begun, hook=kill_at(at, reached=reached)), run)
        code = child.wait()
        lost = reached.value - saved_step(run)
        problems = [f"{lost} steps were lost, at most {interval} may be"] if lost > interval else []
        if code != -9:
            problems.append(f"ended with {code} before its kill at step {at}: {child.err[-300:]}")
        row.case(f"kill {done + 1} at step {at}", problems)
        done += 1
        if code == 0:
            break
    row.failures += ["nothing was saved before the last kill"] * (not saved_step(run))
    row.failures += resume_to_end(run, *options) + differences(run, expected)


def saved_step(run: Path) -> int:
    """The newest checkpoint's step, 0 without one."""
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*.pt"))
    return int(names[-1][5:-3]) if names else 0


# -------------------------------------------------------------------------------------------------- rows 9 and 10


def signalled(row: Row) -> None:
    """Row 9: SIGTERM and SIGINT, once and twice, in a step, a save, a validation, and at random times."""
    options = folder_options(row)
    expected, seconds = reference(row, *options)
    for what, place in (("step", in_step), ("save", in_save), ("validation", in_validation), ("group", in_group)):
        for signum in (signal.SIGTERM, signal.SIGINT):
            sample = int((what == "save") == (signum == signal.SIGINT))
            for _ in range(row.pick(4, sample)):
                at = row.rng.randint(1, 2) if what == "validation" else row.rng.randint(1, 25)
                run, reached = row.new(), Shared()
                child = start(place(options, run, at, signum, reached), run)
                signal_case(row, f"{signum.name} in {what} {at}", child, run, options, expected, signum, reached)
    for times in (1, 2):
        for signum in (signal.SIGTERM, signal.SIGINT):
            for _ in range(row.pick(6 * times, int(times == 2 and signum == signal.SIGTERM))):
                run, pause = row.new(), row.rng.uniform(0.2, seconds)
                child = start(training(*options, "--output", run), run)
                time.sleep(pause)
                for _ in range(times):
                    child.signal(signum)
                    time.sleep(row.rng.choice((0, 0.001, 0.01)))
                name = f"{times} × {signum.name} after {pause:.3f} s"
                signal_case(row, name, child, run, options, expected, signum, None)


def in_step(options: tuple, run: Path, at: int, signum: int, reached: Shared) -> Any:
    return training(*options, "--output", run, hook=kill_at(at, signum, reached))


def in_group(options: tuple, run: Path, at: int, signum: int, reached: Shared) -> Any:
    """As a terminal's Ctrl-C, or a batch system: the signal goes to the loader's workers too."""

    def hook(trainer: tb.Trainer) -> None:
        reached.value = trainer.step
        if trainer.step == at:
            os.killpg(os.getpgrp(), signum)

    return training(*options, "--output", run, hook=hook)


def in_save(options: tuple, run: Path, at: int, signum: int, reached: Shared) -> Any:
    """The signal comes in one of the operations of a save."""

    def before() -> None:
        real, number = os.fsync, [0]

        def fsync(descriptor: int) -> None:
            number[0] += reached.value > 0
            if number[0] == at:
                os.kill(os.getpid(), signum)
            real(descriptor)

        os.fsync = fsync

    return training(*options, "--output", run, before=before, hook=kill_at(-1, reached=reached))


def in_validation(options: tuple, run: Path, at: int, signum: int, reached: Shared) -> Any:
    """The signal comes in the `at`th validation."""

    def before() -> None:
        validate, number = tb.Trainer.validate, [0]

        def signalled(trainer: tb.Trainer, loader: Any) -> Any:
            number[0] += 1
            if number[0] == at:
                os.kill(os.getpid(), signum)
            return validate(trainer, loader)

        tb.Trainer.validate = signalled  # type: ignore[method-assign]

    return training(*options, "--output", run, before=before, hook=kill_at(-1, reached=reached))


def signal_case(
    row: Row, name: str, child: Child, run: Path, options: tuple, expected: dict, signum: int, reached: Shared | None
) -> None:
    """Exit code, checkpoint at that step, no process left, and the same end after a resume."""
    code = child.wait(40)
    problems = [child.group_gone(5)]
    if reached is not None:
        if code != 128 + signum:
            problems.append(f"exit code {code}: {child.err[-300:]!r}")
        if saved_step(run) != reached.value:
            problems.append(f"stopped after step {reached.value}, saved at {saved_step(run)}")
    elif code not in (128 + signum, -signum, 0):  # it may come before or after the training, or twice
        problems.append(f"exit code {code}: {child.err[-300:]!r}")
    if "Traceback" in child.err and code > 0 and name[0] != "2":  # ended at once: its workers may complain
        problems.append(child.err[-300:])
    problems += resume_to_end(run, *options) if code else []
    row.case(name, problems, differences(run, expected))
    remove(run)


def workers_killed(row: Row) -> None:
    """Row 10: a loader's worker is killed, or its parent; nothing is left, and one line says what was."""
    options = folder_options(row, "--epochs", "40")
    children = []
    for _ in range(row.pick(4, 1)):
        for what in ("worker", "parent", "parent of new workers"):
            run, begun = row.new(), Shared()
            child = start(training(*options, "--output", run, hook=kill_at(-1, reached=begun)), run)
            children.append((what, child, begun))
        while not children_of(child.pid) and what.endswith("new workers") and child.poll() is None:
            pass
        if what.endswith("new workers"):
            time.sleep(row.rng.choice((0, 0, 0.001, 0.01)))
            child.signal(signal.SIGKILL)
    for what, child, begun in children:
        while begun.value < 2 and child.poll() is None:
            time.sleep(0.01)
        time.sleep(row.rng.uniform(0, 0.05))
        workers = children_of(child.pid)
        if what == "parent":
            child.signal(signal.SIGKILL)
        elif workers:
            os.kill(row.rng.choice(workers), signal.SIGKILL)
    for what, child, _ in children:
        code = child.wait(20)
        said = one_error(child, "worker", codes=(1,)) if what == "worker" else []
        wrong = f"exit code {code}" if what != "worker" and code != -9 else ""
        row.case(f"{what} killed", said, wrong, child.group_gone(10))


def children_of(pid: int) -> list[int]:
    """The process numbers of its children."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(number) for number in listed.read_text().split()] if listed.exists() else []


# ---------------------------------------------------------------------------------------------------- rows 11 and 12


def started_together(row: Row) -> None:
    """Row 11: many start on one directory: one wins, the others exit 2 and change nothing; the lock dies with it."""
    number = row.pick(20, 5)
    expected, _ = reference(row, *SMALL)
    for kind in row.pick(("new", "resume", "overwrite"), ("new",)):
        run = row.new()
        if kind != "new":
            start(training(*SMALL, "--output", run, hook=kill_at(5)), run).wait()
        options = ("--resume", run) if kind == "resume" else (*SMALL, "--output", run)
        options += ("--overwrite",) if kind == "overwrite" else ()
        reader, writer = os.pipe()

        def together(wait_for: int = reader, close: int = writer) -> None:
            os.close(close)
            os.read(wait_for, 1)  # until the parent closes its end

        slow = lambda trainer: time.sleep(row.pick(0.1, 0.05))  # noqa: E731  # the winner is still there when the last one looks
        children = [start(training(*options, before=together, hook=slow), row.new("starter")) for _ in range(number)]
        os.close(reader)
        os.close(writer)
        codes = [child.wait(60) for child in children]
        problems = [] if codes.count(0) == 1 and codes.count(2) == number - 1 else [f"exit codes {codes}"]
        problems += [p for c in children if c.code == 2 for p in one_error(c, "another run is using", codes=(2,))]
        row.case(f"{number} starts, {kind}", problems, differences(run, expected))
        remove(run)
    run, holds = row.new(), Shared()

    def hold(trainer: tb.Trainer) -> None:
        holds.value = trainer.step
        time.sleep(60)

    holder = start(training(*SMALL, "--output", run, hook=hold), run)
    while not holds.value and holder.poll() is None:  # metrics.jsonl is written after run.json
        time.sleep(0.01)
    before = snapshot(run)
    second = start(training("--resume", run), row.new("second"))
    second.wait()
    problems = one_error(second, "another run is using", codes=(2,))
    problems += ["the second start changed something"] * (snapshot(run) != before)
    holder.signal(signal.SIGKILL)
    holder.wait()
    row.case("the holder is killed", problems, resume_to_end(run), differences(run, expected))


def snapshot(run: Path) -> dict[str, bytes]:
    """The content of all files of a run."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def in_own_namespace(work: Callable[[], Any], *mounts: tuple[str, ...]) -> Callable[[], Any]:
    """`work` in a mount namespace of its own, where `mounts` (arguments of mount) are done; all ends with the child."""

    def run() -> Any:
        if libc.unshare(0x00020000):  # CLONE_NEWNS
            raise OSError("unshare: not permitted")
        for arguments in (("--make-rprivate", "/"), *mounts):
            subprocess.run(["mount", *arguments], check=True, timeout=20, capture_output=True)
        return work()

    return run


def may_mount() -> str:
    """Why nothing can be mounted here; empty if it can."""
    if os.name != "posix" or os.geteuid() or not shutil.which("mount"):
        return "mounting needs root"
    files = Path("/tmp") / f"faults-probe-{os.getpid()}"
    probe = start(in_own_namespace(lambda: 0, ("-t", "tmpfs", "-o", "size=64k", "none", "/mnt")), files)
    code = probe.wait(20)
    for ending in (".out", ".err"):
        files.with_suffix(ending).unlink(missing_ok=True)
    return "mounting is not permitted" if code else ""


def too_little(row: Row) -> None:
    """Row 12: a directory that cannot be written or vanishes; little shared memory, address space, few descriptors."""
    expected, _ = reference(row, *SMALL)
    why_not = may_mount()
    run = row.new()
    run.mkdir()
    if why_not:
        row.skip(f"read-only file system, small /dev/shm: {why_not}")
    else:
        mounts = ("--bind", str(run), str(run)), ("-o", "remount,bind,ro", str(run))
        child = start(in_own_namespace(training(*SMALL, "--output", run / "new"), *mounts), run)
        child.wait()
        row.case("read-only file system", one_error(child, "cannot write there", "Read-only", codes=(2,)))
        small_shared_memory(row)
    if os.geteuid() == 0:
        nobody = row.new("nobody")
        child = start(training(*SMALL, "--output", run / "new", before=lambda: os.setuid(65534)), nobody)
        child.wait()
        # the work folder is closed to others, so what fails first may be the folder above
        row.case("a directory of another user", one_error(child, "ermission denied", codes=(1, 2)))
    run = row.new()
    vanish = lambda trainer: trainer.step == 5 and shutil.rmtree(run)  # noqa: E731
    child = start(training(*SMALL, "--output", run, hook=vanish), run)
    if child.wait() == 0:
        row.case("the directory vanishes", differences(run, expected))
    else:
        row.case("the directory vanishes", one_error(child))
    limits(row, expected)


def small_shared_memory(row: Row) -> None:
    """/dev/shm of 64 KB, for batches that fit and those that don't."""
    for size in row.pick((28, 64, 112, 224), (112,)):
        run = row.new()
        options = (*folder_options(row), "--image-size", str(size), "--output", str(run))
        # the images may lie in the memory that is covered
        data = row.folder if row.folder.is_relative_to("/dev/shm") else None
        mounts: list[tuple[str, ...]] = [("-t", "tmpfs", "-o", "size=64k", "none", "/dev/shm")]
        if data is not None:
            (Path("/mnt")).mkdir(exist_ok=True)
            mounts = [
                ("--bind", str(data), "/mnt"),
                *mounts,
            ]
            options = tuple(str(option).replace(str(data), "/mnt") for option in options)
        child = start(in_own_namespace(training(*options), *mounts), run)
        if child.wait() == 0:
            row.case(f"64 KB of shared memory, images of {size}")
        else:
            row.case(f"64 KB of shared memory, images of {size}", one_error(child, "shared memory", codes=(1,)))


def limits(row: Row, expected: dict[str, str]) -> None:
    """Little address space, few descriptors: one line, or the same end."""

    def limited(kind: int, value: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(kind, (value, value))

    def address_space(more: int) -> Callable[[], None]:
        def set_limit() -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)

        return set_limit

    cases: list[tuple[str, tuple, Callable[[], None]]] = [
        ("64 descriptors", SMALL, limited(resource.RLIMIT_NOFILE, 64)),
        ("64 descriptors, two workers", folder_options(row), limited(resource.RLIMIT_NOFILE, 64)),
    ]
    cases += [
        (f"{mib} MB of memory to spare", SMALL, address_space(mib << 20))
        for mib in row.pick((0, 1, 2, 4, 8, 16, 32, 64, 128), (2,))
    ]
    for name, options, before in row.some(cases, 2):
        run = row.new()
        child = start(training(*options, "--output", run, before=before), run)
        if child.wait(40) == 0:
            row.case(name, differences(run, expected) if options is SMALL else [])
        else:
            row.case(name, one_error(child, codes=(1, 2)), child.group_gone(10))


# -------------------------------------------------------------------------------------------------------------- row 16


def clock_set(row: Row) -> None:
    """Row 16: the clock jumps by a year during the run, and the files' times are equal or the wrong way round."""
    expected, _ = reference(row, *SMALL)
    for years in row.pick((-1, 1, -30), (-1,)):
        for order in row.pick(("equal", "reversed", "future"), ("reversed",)):
            run, at = row.new(), row.rng.randint(5, 12)
            start(training(*SMALL, "--output", run, hook=kill_at(at)), run).wait()
            newest = saved_step(run)
            for i, path in enumerate(sorted((run / "checkpoints").iterdir())):
                instant = {"equal": 1e9, "reversed": 1e9 - i * 86400, "future": 4e9 - i}[order]
                os.utime(path, (instant, instant))
            found = tb.CheckpointFolder(run / "checkpoints").latest()
            problems = [f"step {found and found[1]['step']} for the newest, {newest}"] * (
                found is None or found[1]["step"] != newest
            )
            said = row.new("said")
            child = start(training("--resume", run, before=lambda y=years: jump(y)), said)
            problems += [f"resumed: {child.err[-300:]}"] if child.wait() else []
            found = tb.CheckpointFolder(run / "checkpoints").latest()
            problems += [f"newest {newest}"] * (found is None or found[1]["step"] != STEPS)
            row.case(f"{years} years, file times {order}, step {at}", problems, differences(run, expected))
            remove(run)


def jump(years: int) -> None:
    """The clock of this process is off by so many years, from the second reading on."""
    off = years * 365 * 86400.0
    real_time, real_datetime = time.time, datetime.datetime

    class Shifted(real_datetime):  # type: ignore[valid-type, misc]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real_datetime.fromtimestamp(real_time() + off, tz)

    mock.patch.object(time, "time", lambda: real_time() + off).start()
    mock.patch.object(datetime, "datetime", Shifted).start()
