"""Processes that are killed, signalled, or started all at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchbasics as tb
from tests.common import ROOT
from torchbasics import cli
from torchbasics.checkpoint import saved_steps

from .runs import (
    SMALL,
    SPLITS,
    STEPS,
    Child,
    Row,
    Shared,
    at_step,
    children_of,
    differences,
    last_step,
    leavings,
    refusal_problems,
    resume_problems,
    send_self,
    start,
    training,
    undisturbed,
)

EVERYTHING = ("--accumulate", "2", "--ema", "0.9", "--clip-norm", "1", "--save-every", "1")


def killed(row: Row) -> None:
    """SIGKILL after a random step or at a random time; a new process continues to the same end."""
    for name, options, steps, full, sample in (
        ("plain", SMALL, STEPS, 40, 1),
        ("saved per epoch", SMALL[: SMALL.index("--save-every")] + ("--quiet",), STEPS, 15, 0),
        ("everything on", (*SMALL, *EVERYTHING, "--patience", "5"), STEPS // 2 + 1, 40, 1),
        ("cnn in bf16", (*SMALL, "--model", "cnn", "--precision", "bf16"), STEPS, 15, 0),
    ):
        if not row.pick(full, sample):
            continue
        expected, seconds = undisturbed(row, *options)
        for number in range(row.pick(full, sample)):
            run = row.new()
            if number % 2 == 0:
                step = row.random.randint(1, steps)
                what = f"{name}, step {step}"
                child = start(training(*options, "--output", run, hook=at_step(step, send_self())), run)
            else:
                pause = row.random.uniform(0, seconds)
                what = f"{name}, after {pause:.3f} s"
                child = start(training(*options, "--output", run), run)
                time.sleep(pause)
                child.send(signal.SIGKILL)
            if child.wait() == 0:  # it was faster
                row.case(what, differences(run, expected))
            else:
                problems = [f"exit code {child.code}: {child.err}"] * (child.code != -signal.SIGKILL)
                row.case(what, problems, resume_problems(run, expected, *options))
    killed_many_times(row)


def killed_many_times(row: Row) -> None:
    """20 kills within one run: each costs at most one save interval."""
    kills, interval = row.pick(20, 2), 3
    options = (*SMALL, "--epochs", str(kills), "--save-every", str(interval), "--ema", "0.9")
    expected, _ = undisturbed(row, *options)
    run, reached = row.new(), Shared()
    for number in range(kills):
        begun = ("--resume", run) if last_step(run) else (*options, "--output", run)
        step = last_step(run) + row.random.randint(interval + 1, 2 * interval)  # after the next save
        child = start(training(*begun, hook=at_step(step, send_self(), reached)), run.with_name(f"many-{number}"))
        code, lost = child.wait(), reached.value - last_step(run)
        problems = [f"ended with {code}: {child.err[-300:]}"] * (code != -signal.SIGKILL)
        row.case(f"kill {number + 1}, step {step}", problems, [f"{lost} steps were lost"] * (lost > interval))
    row.failures += resume_problems(run, expected, *options)


def signalled(row: Row) -> None:
    """SIGTERM, SIGINT and SIGUSR1 in a step, a save and a validation; at random times; and twice."""
    expected, seconds = undisturbed(row, *SMALL)
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    cases = [(place, signum, times) for place in (in_step, in_save, in_validation) for signum in signals for times in (1, 2)]
    for place, signum, times in row.some(cases, 4):
        for _ in range(row.pick(3, 1)):
            run, reached = row.new(), Shared()
            at = row.random.randint(1, 2 if place is in_validation else 6)
            child = start(place(run, at, send_self(signum, times), reached), run)
            name = f"{times} × {signum.name} {place.__name__} {at}"
            row.case(name, signal_problems(child, run, signum, times, reached), resume_problems(run, expected, *SMALL))
    for number in range(row.pick(30, 1)):
        run, signum, times = row.new(), row.random.choice(signals), 1 + number % 2
        pause = row.random.uniform(0, seconds)
        child = start(training(*SMALL, "--output", run), run)
        time.sleep(pause)
        for _ in range(times):
            child.send(signum)
            time.sleep(row.random.choice((0, 0.001, 0.01)))
        # Before and after `fit` the signal does what it does to any program.
        code = child.wait()
        problems = [f"exit code {code}: {child.err[-300:]!r}"] * (code not in (0, 128 + signum, -signum))
        problems += ["a traceback"] * ("Traceback" in child.err)
        name = f"{times} × {signum.name} after {pause:.3f} s"
        row.case(name, problems, resume_problems(run, expected, *SMALL))


def signal_problems(child: Child, run: Path, signum: int, times: int, reached: Shared) -> list[str]:
    """Return what is wrong after one signal (saved, 128 + signum) or two at once (ended by the second)."""
    code = child.wait()
    if times == 2:
        return [f"exit code {code}: {child.err[-300:]!r}"] * (code != -signum)
    problems = [f"exit code {code}: {child.err[-300:]!r}"] * (code != 128 + signum)
    line = f"{signal.Signals(signum).name}: saved {run}/checkpoints/step-{reached.value:08d}.pt\n"
    return problems + [f"printed {child.err!r}, expected {line!r}"] * (child.err != line)


def in_step(run: Path, at: int, action: Callable[[], None], reached: Shared) -> Callable[[], int]:
    def hook(trainer: tb.Trainer) -> None:
        reached.value = trainer.step
        if trainer.step == 2 * at:
            action()

    return training(*SMALL, "--output", run, hook=hook)


def in_save(run: Path, at: int, action: Callable[[], None], reached: Shared) -> Callable[[], int]:
    """Call `action` in the `at`th fsync after the first step."""

    def before() -> None:
        fsync, calls = os.fsync, 0

        def disturbed(descriptor: int) -> None:
            nonlocal calls
            calls += reached.value > 0
            if reached.value and calls == at:
                action()
            fsync(descriptor)

        os.fsync = disturbed

    return training(*SMALL, "--output", run, before=before, hook=at_step(-1, send_self(), reached))


def in_validation(run: Path, at: int, action: Callable[[], None], reached: Shared) -> Callable[[], int]:
    """Call `action` when the first batch of the `at`th validation was judged."""

    def before() -> None:
        forward = tb.Trainer.forward

        def disturbed(trainer: tb.Trainer, *args: Any) -> Any:
            result = forward(trainer, *args)
            if not torch.is_grad_enabled() and trainer.epoch == at and not disturbed_epochs:
                disturbed_epochs.append(at)
                action()
            return result

        disturbed_epochs: list[int] = []
        tb.Trainer.forward = disturbed  # type: ignore[method-assign]

    return training(*SMALL, "--output", run, before=before, hook=at_step(-1, send_self(), reached))


def with_workers(run: Path, hook: Callable[[tb.Trainer], Any] | None = None, resume: bool = False) -> Callable[[], int]:
    """Return the work of a child: a program of a user, around a Trainer and a DataLoader with two workers."""

    def main(argv: object) -> int:
        torch.set_num_threads(1)
        tb.set_seed(1)
        train, val = (TensorDataset(part.inputs.float() / 255, part.targets) for part in SPLITS[:2])
        loader = DataLoader(train, batch_size=16, shuffle=True, num_workers=2)
        model = tb.SimpleNet()
        with tb.RunDirectory(run, resume=resume) as directory:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            trainer = tb.Trainer(model, nn.CrossEntropyLoss(), optimizer, checkpoint_dir=directory.checkpoints, save_every=3)
            trainer.resume()
            if hook is not None:
                trainer.on_step_end.append(hook)
            directory.watch(trainer, 2, loader, quiet=True)
            trainer.fit(loader, DataLoader(val, batch_size=32, num_workers=1), 2, verbose=False)
            directory.write_info(result=trainer.history)
        return 0

    return lambda: cli.run(main, [])


def workers(row: Row) -> None:
    """A loader's worker is killed, or its parent; Ctrl-C reaches all of them. None is left, and a resume is exact."""
    expected, _ = undisturbed(row, work=with_workers)

    def kill_worker() -> None:
        os.kill(row.random.choice(children_of(os.getpid())), signal.SIGKILL)

    def signal_group() -> None:
        os.killpg(os.getpgrp(), signal.SIGINT)

    actions: tuple[tuple[str, Callable[[], None]], ...] = (
        ("worker killed", kill_worker),
        ("parent killed", send_self()),
        ("SIGINT to the group", signal_group),
        ("SIGTERM twice", send_self(signal.SIGTERM, 2)),
    )
    for _ in range(row.pick(8, 1)):
        for name, action in actions:
            run, step = row.new(), row.random.randint(4, 24)  # 14 steps an epoch
            child = start(with_workers(run, at_step(step, action)), run)
            code = child.wait()
            problems = [child.left_behind()]
            if name == "worker killed" and code:  # 0: all its batches were there already
                problems += refusal_problems(child, "worker", code=1)
            elif name != "worker killed":
                wanted = {"parent killed": -9, "SIGINT to the group": 130, "SIGTERM twice": -15}[name]
                problems += [f"exit code {code}, expected {wanted}: {child.err[-300:]!r}"] * (code != wanted)
            again = start(with_workers(run, resume=True), run.with_name(run.name + "-continued"))
            problems += [f"continued: {again.err[-300:]!r}"] * (again.wait() != 0)
            row.case(f"{name}, step {step}", problems, differences(run, expected))


def start_ranks(row: Row, *argv: Any, hooks: tuple[Any, Any] = (None, None)) -> list[Child]:
    """Start two processes of one job, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    work = [training(*argv, "--timeout", 20, hook=hook, script="train_ddp") for hook in hooks]
    return [
        start(work[rank], row.new(f"rank{rank}"), RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="2", **shared)
        for rank in range(2)
    ]


def ranks(row: Row) -> None:
    """One of two processes is killed: the other ends by itself, and both continue; or torchrun restarts them."""
    options = (*SMALL, "--accumulate", "2", "--ema", "0.9", "--clip-norm", "1", "--save-every", "1")
    run = row.new("undisturbed")
    children = start_ranks(row, *options, "--output", run)
    if any(child.wait() for child in children):
        raise RuntimeError(f"the undisturbed run failed: {[child.err for child in children]}")
    expected = leavings(run)
    for _ in range(row.pick(10, 1)):
        run, step, victim = row.new(), row.random.randint(2, 7), row.random.randint(0, 1)
        hooks = [at_step(step, send_self()) if rank == victim else None for rank in range(2)]
        children = start_ranks(row, *options, "--output", run, hooks=(hooks[0], hooks[1]))
        codes = [child.wait(40) for child in children]
        problems = [f"the victim ended with {codes[victim]}"] * (codes[victim] != -signal.SIGKILL)
        other = children[1 - victim]
        problems += [f"the other ended with {other.code}: {other.err[-300:]}"] * (other.code != 1)
        again = start_ranks(row, "--resume", run)
        problems += [f"resumed: {child.err[-300:]}" for child in again if child.wait(40)]
        row.case(f"rank {victim} killed, step {step}", problems, differences(run, expected))
    if row.full:
        torchrun(row)


def torchrun(row: Row, kills: int = 3) -> None:
    """Kill processes of a job under torchrun, each after a new checkpoint was seen; it ends as if nothing were."""
    options = ("--dataset", "digits", "--model", "simplenet", "--epochs", "40", "--batch-size", "32", "--save-every", "20",
               "--precision", "fp32", "--device", "cpu", "--quiet")  # fmt: skip
    finals = []
    for wanted in (0, kills):
        run = row.new("torchrun")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [f"--max-restarts={kills + 1}", "-m", "tests.faults.runs", "train_ddp", *options, "--output", str(run)]
        with open(run.with_suffix(".log"), "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=ROOT)
        done, seen, deadline = 0, 0, time.monotonic() + 240
        try:
            while process.poll() is None and time.monotonic() < deadline:
                newest, found = last_step(run), children_of(process.pid)
                if done < wanted and newest > seen and len(found) == 2:
                    time.sleep(row.random.uniform(0, 0.1))
                    os.kill(row.random.choice(found), signal.SIGKILL)
                    done, seen = done + 1, newest
                time.sleep(0.01)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said = run.with_suffix(".log").read_text()[-400:]
        problems = [f"exit code {process.returncode}, {done} kills: {said}"] * (process.returncode != 0 or done < wanted)
        finals.append({} if problems else leavings(run))
        for _ in range(max(done, 1)):
            row.case(f"torchrun, {done} kills", problems)
            problems = []
    row.failures += ["torchrun: the killed run differs from the undisturbed one"] * (finals[0] != finals[1])


def together(row: Row) -> None:
    """Many starts at once: of one --output or one --resume only one runs; with default names each gets its own."""
    expected, _ = undisturbed(row, *SMALL)
    number = row.pick(20, 4)
    for kind in ("one output", "one resume", "default names"):
        for _ in range(row.pick(3, 1)):
            run = row.new()
            options: tuple[Any, ...] = (*SMALL, "--output", run)
            if kind == "one resume":
                start(training(*options, hook=at_step(5, send_self())), run).wait()
                options = ("--resume", run)
            if kind == "default names":
                run.mkdir()
                options = SMALL
            children = start_together(row, number, run.parent if kind != "default names" else run, options)
            codes = [child.wait() for child in children]
            if kind == "default names":
                made = sorted((run / "runs").iterdir())
                problems = [f"exit codes {codes}"] * any(codes)
                problems += [f"{len(made)} directories for {number} runs"] * (len(made) != number)
                row.case(f"{number} starts, {kind}", problems, *(differences(one, expected) for one in made))
                continue
            problems = [f"exit codes {codes}"] * (codes.count(0) != 1 or codes.count(2) != number - 1)
            for child in children:
                problems += refusal_problems(child, str(run), code=2) if child.code else []
            row.case(f"{number} starts, {kind}", problems, differences(run, expected))
    holder_killed(row, expected)


def start_together(row: Row, number: int, folder: Path, options: tuple[Any, ...]) -> list[Child]:
    """Start `number` children in `folder` that begin at the same moment, and train slowly enough to meet."""
    reader, writer = os.pipe()

    def wait() -> None:
        os.close(writer)
        os.read(reader, 1)  # until the parent closes its end
        os.chdir(folder)

    work = training(*options, before=wait, hook=lambda trainer: time.sleep(0.05))
    children = [start(work, row.new("starter")) for _ in range(number)]
    os.close(reader)
    os.close(writer)
    return children


def holder_killed(row: Row, expected: dict[str, str]) -> None:
    """The lock of a run keeps others out, who change nothing, and dies with its holder."""
    run, reached = row.new(), Shared()

    def hold(trainer: tb.Trainer) -> None:
        if trainer.step == 3:  # one is saved
            reached.value = 3
            time.sleep(60)

    holder = start(training(*SMALL, "--output", run, hook=hold), run)
    while not reached.value and holder.poll() is None:
        time.sleep(0.01)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    second = start(training("--resume", run), row.new("second"))
    second.wait()
    problems = refusal_problems(second, "another process is using this run", code=2)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    problems += ["the second start changed something"] * (before != after)
    holder.send(signal.SIGKILL)
    holder.wait()
    assert saved_steps(run / "checkpoints")
    row.case("the holder is killed", problems, resume_problems(run, expected, *SMALL))
