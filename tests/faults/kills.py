"""Processes that are killed, signalled, or started all at once."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchbasics as tb
from tests.common import ROOT
from torchbasics import cli

from .runs import (
    SAVED_PER_EPOCH,
    SMALL,
    SPLITS,
    STEPS,
    Child,
    Hook,
    Row,
    at_step,
    children_of,
    contents,
    differences,
    exit_problems,
    last_step,
    leavings,
    refusal_problems,
    resume_problems,
    send_self,
    shared_number,
    start,
    training,
    undisturbed,
)

EVERYTHING = ("--accumulate", "2", "--ema", "0.9", "--clip-norm", "1", "--save-every", "1")


def killed(row: Row) -> None:
    """SIGKILL after a random step or at a random time; a new process continues to the same end."""
    for name, options, steps, full, sample in (
        ("plain", SMALL, STEPS, 40, 1),
        ("saved per epoch", SAVED_PER_EPOCH, STEPS, 15, 0),
        ("everything on", (*SMALL, *EVERYTHING, "--patience", "5"), STEPS // 2 + 1, 40, 1),
        ("cnn in bf16", (*SMALL, "--model", "cnn", "--precision", "bf16"), STEPS, 15, 0),
    ):
        for number in range(row.pick(full, sample)):
            expected, seconds = undisturbed(row, *options)
            run, step, pause = row.new(), row.random.randint(1, steps), row.random.uniform(0, seconds)
            by_step = number % 2 == 0
            hook = at_step(step if by_step else -1, send_self())
            child = start(training(*options, "--output", run, hook=hook), run)
            if not by_step:
                time.sleep(pause)
                child.send(signal.SIGKILL)
            problems = exit_problems(child, *((-9,) if by_step else (-9, 0)))  # 0: it was faster
            what = f"{name}, step {step}" if by_step else f"{name}, after {pause:.3f} s"
            row.case(what, problems, resume_problems(run, expected, *options))
    if row.full:
        killed_many_times(row)


def killed_many_times(row: Row) -> None:
    """20 kills within one run: each costs at most one save interval."""
    kills, interval = 20, 3
    options = (*SMALL, "--epochs", str(kills), "--save-every", str(interval), "--ema", "0.9")
    expected, _ = undisturbed(row, *options)
    run, reached = row.new(), shared_number()
    for number in range(kills):
        begun = ("--resume", run) if last_step(run) else (*options, "--output", run)
        step = last_step(run) + row.random.randint(interval + 1, 2 * interval)  # after the next save
        child = start(training(*begun, hook=at_step(step, send_self(), reached)), run.with_name(f"many-{number}"))
        problems, lost = exit_problems(child, -9), reached.value - last_step(run)
        row.case(f"kill {number + 1}, step {step}", problems, [f"{lost} steps were lost"] * (lost > interval))
    row.failures += resume_problems(run, expected, *options)


def signalled(row: Row) -> None:
    """SIGTERM, SIGINT and SIGUSR1 in a step, a save and a validation, and at random times; once, and twice at once."""
    expected, seconds = undisturbed(row, *SMALL)
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    cases = list(itertools.product(("step", "save", "validation"), signals, (1, 2)))
    for place, signum, times in row.some(cases, 3):
        for _ in range(row.pick(3, 1)):
            run, reached = row.new(), shared_number()
            at = row.random.randint(1, 2 if place == "validation" else 6)
            child = start(disturbed(run, place, at, send_self(signum, times), reached), run)
            problems = exit_problems(child, 128 + signum if times == 1 else -signum)
            line = f"{signum.name}: saved {run}/checkpoints/step-{reached.value:08d}.pt" if times == 1 else ""
            problems += [f"printed {child.err!r}, expected {line!r}"] * (line not in child.err)
            name = f"{times} × {signum.name} in {place} {at}"
            row.case(name, problems, resume_problems(run, expected, *SMALL))
    for number in range(row.pick(30, 1)):
        run, signum, times = row.new(), row.random.choice(signals), 1 + number % 2
        pause = row.random.uniform(0, seconds)
        child = start(training(*SMALL, "--output", run), run)
        time.sleep(pause)
        for _ in range(times):
            child.send(signum)
            time.sleep(row.random.choice((0, 0.001, 0.01)))
        # Before and after `fit` the signal does what it does to any program.
        problems = exit_problems(child, 0, 128 + signum, -signum)
        row.case(f"{times} × {signum.name} after {pause:.3f} s", problems, resume_problems(run, expected, *SMALL))


def disturbed(
    run: Path, place: str, at: int, action: Callable[[], None], reached: ctypes.c_int64
) -> Callable[[], int]:
    """Return the work of a child that calls `action` in step 2 * `at`, in fsync number `at` after the first step, or in
    validation number `at`. `reached` follows the steps."""
    fsync, forward, numbers = os.fsync, tb.Trainer.forward, itertools.count(1)

    def disturbed_fsync(descriptor: int) -> None:
        if reached.value and next(numbers) == at:
            action()
        fsync(descriptor)

    def disturbed_forward(trainer: tb.Trainer, *args: Any) -> Any:
        if not torch.is_grad_enabled() and trainer.epoch == at and next(numbers) == 1:
            action()
        return forward(trainer, *args)

    def before() -> None:
        if place == "save":
            mock.patch("os.fsync", disturbed_fsync).start()
        elif place == "validation":
            mock.patch.object(tb.Trainer, "forward", disturbed_forward).start()

    step = 2 * at if place == "step" else -1
    return training(*SMALL, "--output", run, before=before, hook=at_step(step, action, reached))


def with_workers(run: Path, hook: Hook | None = None, resume: bool = False) -> Callable[[], int]:
    """Return the work of a child: a user's own program around a Trainer and a DataLoader with two workers."""

    def main(argv: object) -> int:
        torch.set_num_threads(1)
        tb.set_seed(1)
        train, val = (TensorDataset(part.inputs.float() / 255, part.targets) for part in SPLITS[:2])
        loader = DataLoader(train, batch_size=16, shuffle=True, num_workers=2)  # 14 batches
        model = tb.SimpleNet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with tb.RunDirectory(run, resume=resume) as directory:
            folder = directory.checkpoints
            trainer = tb.Trainer(model, nn.CrossEntropyLoss(), optimizer, checkpoint_dir=folder, save_every=3)
            trainer.resume()
            if hook is not None:
                trainer.on_step_end.append(hook)
            directory.watch(trainer, 2, loader, quiet=True)
            trainer.fit(loader, DataLoader(val, batch_size=32, num_workers=1), 2, verbose=False)
            directory.write_info(result=trainer.history)
        return 0

    return lambda: cli.run(main, [])


def workers(row: Row) -> None:
    """A loader's worker is killed, or its parent; signals reach all of them. None is left, and a resume is exact."""
    expected, _ = undisturbed(row, work=with_workers)
    actions: tuple[tuple[str, Callable[[], None], int], ...] = (
        ("worker killed", lambda: os.kill(row.random.choice(children_of(os.getpid())), signal.SIGKILL), 1),
        ("parent killed", send_self(), -9),
        ("SIGINT to the group", lambda: os.killpg(os.getpgrp(), signal.SIGINT), 130),
        ("SIGTERM twice", send_self(signal.SIGTERM, 2), -15),
    )
    for name, action, code in row.some(list(actions) * row.pick(8, 1), 2):
        run, step = row.new(), row.random.choice((*range(4, 11), *range(18, 25)))  # its epoch has more to load
        child = start(with_workers(run, at_step(step, action)), run)
        if code == 1:
            child.wait()
            # torch's handler of SIGCHLD may raise when the loader is deleted, after the error line.
            child.err = child.err.partition("Exception ignored in: <function _MultiProcessingDataLoaderIter.__del__")[0]
        problems = refusal_problems(child, 1, "worker") if code == 1 else exit_problems(child, code)
        problems.append(child.left_behind())
        again = start(with_workers(run, resume=True), run.with_name(run.name + "-continued"))
        row.case(f"{name}, step {step}", problems, exit_problems(again, 0), differences(run, expected))


def ranks(row: Row) -> None:
    """One of two processes is killed: the other ends by itself, and both continue. Or torchrun restarts them."""
    options = (*SMALL, *EVERYTHING)
    run = row.new("undisturbed")
    for child in start_ranks(row, (None, None), *options, "--output", run):
        row.failures += exit_problems(child, 0)
    expected = leavings(run)
    for _ in range(row.pick(10, 1)):
        run, step, victim = row.new(), row.random.randint(2, 7), row.random.randint(0, 1)
        hooks = [at_step(step, send_self()) if rank == victim else None for rank in range(2)]
        children = start_ranks(row, hooks, *options, "--output", run)
        problems = exit_problems(children[victim], -9) + exit_problems(children[1 - victim], 1)
        for child in start_ranks(row, (None, None), "--resume", run):
            problems += exit_problems(child, 0)
        row.case(f"rank {victim} killed, step {step}", problems, differences(run, expected))
    if row.full:
        under_torchrun(row)


def start_ranks(row: Row, hooks: Any, *argv: Any) -> list[Child]:
    """Start two processes of one job, as torchrun would, each with its hook."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["OMP_NUM_THREADS"] = "2"  # a number that was chosen; it is 1
    children = []
    for rank, hook in enumerate(hooks):
        work = training(*argv, "--timeout", 20, hook=hook, script="train_ddp")
        children.append(start(work, row.new(f"rank{rank}"), RANK=str(rank), LOCAL_RANK=str(rank), **shared))
    return children


def under_torchrun(row: Row, kills: int = 3) -> None:
    """Kill processes of a job under torchrun, each after a new checkpoint was seen. It ends as the undisturbed one."""
    options = [*SMALL, "--epochs", "80", "--save-every", "20", "--timeout", "20"]
    finals = []
    for wanted in (0, kills):
        run = row.new("torchrun")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [f"--max-restarts={kills}", "-m", "tests.faults.runs", "train_ddp", *options, "--output", str(run)]
        with open(run.with_suffix(".log"), "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=ROOT)
        job = Child(process.pid, run)
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
                job.kill_group()
                process.wait()
        right = process.returncode == 0 and done == wanted
        said = run.with_suffix(".log").read_text()[-400:]
        row.case(
            f"torchrun, {done} kills",
            [f"exit code {process.returncode}, {wanted} kills were to be: {said}"] * (not right),
            job.left_behind(),
        )
        finals.append(leavings(run) if right else {})
    row.failures += ["torchrun: the killed run differs from the undisturbed one"] * (finals[0] != finals[1])


def together(row: Row) -> None:
    """Many starts at once: of one --output or one --resume only one runs; with default names each gets its own."""
    expected, _ = undisturbed(row, *SMALL)
    number = row.pick(20, 3)
    for kind in row.some(["output", "resume"] * row.pick(3, 1), 1):
        run = row.new()
        options: tuple[Any, ...] = (*SMALL, "--output", run)
        if kind == "resume":
            row.failures += exit_problems(start(training(*options, hook=at_step(5, send_self())), run), -9)
            options = ("--resume", run)
        children = start_together(row, number, *options)
        codes = [child.wait() for child in children]
        problems = [f"exit codes {codes}"] * (codes.count(0) != 1)
        for child in children:
            problems += refusal_problems(child, 2, str(run)) if child.code else []
        row.case(f"{number} starts with one --{kind}", problems, differences(run, expected))
    for _ in range(row.pick(3, 1)):
        folder = row.new("folder")
        folder.mkdir()
        children = start_together(row, number, *SMALL, folder=folder)
        problems = [problem for child in children for problem in exit_problems(child, 0)]
        made = list((folder / "runs").iterdir())
        problems += [f"{len(made)} directories"] * (len(made) != number)
        row.case(f"{number} starts without --output", problems, *(differences(run, expected) for run in made))
    holder_killed(row, expected)


def start_together(row: Row, number: int, *argv: Any, folder: Path = ROOT) -> list[Child]:
    """Start children that begin in `folder` at the same moment, and train slowly enough to meet."""
    reader, writer = os.pipe()

    def wait() -> None:
        os.close(writer)
        os.read(reader, 1)  # until the parent closes its end
        os.chdir(folder)

    work = training(*argv, before=wait, hook=lambda trainer: time.sleep(0.05))
    children = [start(work, row.new("starter")) for _ in range(number)]
    os.close(reader)
    os.close(writer)
    return children


def holder_killed(row: Row, expected: dict[str, str]) -> None:
    """The lock of a run keeps others out, who change nothing, and dies with its holder."""
    run, reached = row.new(), shared_number()
    holder = start(training(*SMALL, "--output", run, hook=at_step(3, lambda: time.sleep(60), reached)), run)
    while reached.value < 3 and holder.poll() is None:
        time.sleep(0.01)
    before = contents(run)
    second = start(training("--resume", run), row.new("second"))
    problems = refusal_problems(second, 2, "another process is using this run")
    problems += ["the second start changed something"] * (contents(run) != before)
    holder.send(signal.SIGKILL)
    row.case("the holder is killed", problems, exit_problems(holder, -9), resume_problems(run, expected, *SMALL))
