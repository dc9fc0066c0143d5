"""Measure every speed that this project claims against a named peer, on this machine, in one run.

    python -m tests.benchmark --data-dir data --markdown > docs/benchmarks.md
    PYTHONPATH=/tmp/peers python -m tests.benchmark loop step

Ours and the peer do the same work and take turns (A B A B …). Each round gives one figure; shown are medians, with the
lowest and the highest in parentheses. Whole trainings take minutes, so `run` and `speedrun` compare with one run of
the peer. All sections together take 20 to 50 minutes on two cores, `loop` takes three. Use a machine that does nothing
else. MNIST must be in --data-dir, where scripts/train_mnist.py downloads it. Frameworks that are not installed are
skipped; `pip install --target /tmp/peers NAME` keeps them apart.

The goals are for two cores with native bf16. A missed goal is shown, and is no error.
Exit codes: 0 measured, 1 a section failed, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import itertools
import json
import logging
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import torchbasics as tb
from torchbasics import cli
from torchbasics.data import NORMALISATION
from torchbasics.device import autocast, bf16_is_native, synchronize
from torchbasics.mnist import is_present

GOALS = {  # of each kind of row: how ours compares with the peer, or the unit of ours alone; and the goal, if any
    "import": ("more", "≤", 0.05),
    "loader, augmented": ("as fast", "≥", 20),
    "loader, plain": ("as fast", "≥", 80),
    "loop, MNISTNet": ("as long", "≤", 1.01),
    "loop, SimpleNet": ("as long", "≤", None),
    "loop, framework": ("as fast", "≥", 1),
    "step": ("as fast", "≥", 2.5),
    "run, accuracy": ("%", "≥", 0.996),
    "run, training": ("as fast", "≥", 3),
    "speedrun, seconds": ("s", "≤", 1.5),
    "speedrun, training": ("as fast", "≥", 140),
    "speedrun, process": ("as fast", "≥", 40),
    "speedrun, accuracy": ("%", "≥", 0.99),
    "save": ("more", "≤", 0.05),
    "ddp, 128": ("as fast", "≥", 1.6),
    "ddp, 512": ("as fast", "≥", 1.8),
    "ddp, 1 process": ("as long", "≤", 1.03),
    "inference": ("as fast", "≥", None),
    "gpu, waits": ("", "≤", 0),
}
NEEDS_BF16 = {"step", "speedrun, seconds"}  # goals for a machine that computes in it
FIGURES: dict[str, tuple[Callable[[float, float], float], str]] = {  # of ours and the peer's, with their unit
    "more": (lambda ours, peer: ours - peer, "s"),
    "as fast": (lambda ours, peer: peer / ours, "×"),
    "as long": (lambda ours, peer: ours / peer, "×"),
}
ROOT = Path(__file__).resolve().parents[1]
DEVICE = tb.pick_device()
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Setting(NamedTuple):
    """How much is measured, on what."""

    quick: bool
    data_dir: Path
    folder: Path  # for all files, removed at the end

    def rounds(self, count: int) -> int:
        return 1 if self.quick else count

    def steps(self, count: int) -> int:
        return max(2, count // 20) if self.quick else count


class Row(NamedTuple):
    """One line of the table."""

    goal: str  # in GOALS
    what: str
    peer: str = ""
    ours: Sequence[float] = ()
    peers: Sequence[float] = ()  # as many, or none
    skipped: str = ""  # why there are no figures

    def cells(self) -> list[str]:
        """Return what the table shows: what, ours, the peer's, the figure, the goal, the verdict."""
        if self.skipped:
            return [self.what, "", self.peer, f"skipped: {self.skipped}", "", ""]
        kind, sign, limit = GOALS[self.goal]
        figures, unit, peer, ours = self.ours, kind, "", spread(self.ours, "s" if self.peers else kind)
        if self.peers:
            compare, unit = FIGURES[kind]
            figures = [compare(*pair) for pair in zip(self.ours, self.peers, strict=True)]
            peer = f"{self.peer}: {spread(self.peers, 's')}"
        figure = f"{spread(figures, unit)} {kind}" if self.peers else ours
        if limit is None:
            return [self.what, ours, peer, figure, "", ""]
        median = statistics.median(figures)
        met = median >= limit if sign == "≥" else median <= limit
        without = self.goal in NEEDS_BF16 and not bf16_is_native(DEVICE)
        verdict = "met" if met else "NOT MET" + " (the goal supposes bf16)" * without
        return [self.what, ours, peer, figure, f"{sign} {quantity(limit, unit)}", verdict]


def quantity(value: float, unit: str) -> str:
    """Return a value with three digits and its unit: seconds as s, ms or µs, fractions as percentages."""
    if unit == "%":
        return f"{value:.2%}"
    if unit == "s" and 0 < abs(value) < 1:
        value, unit = (value * 1e3, "ms") if abs(value) >= 1e-3 else (value * 1e6, "µs")
    digits = max(0, 3 - len(str(int(abs(value)))))
    return f"{value:,.{digits}f}" + (f" {unit}" if unit in ("s", "ms", "µs") else unit)


def spread(values: Sequence[float], unit: str) -> str:
    """Return the median, with the lowest and the highest value in parentheses."""
    low, middle, high = (quantity(kind(values), unit) for kind in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def take_turns(rounds: int, *contenders: Callable[[], float], warm_up: int = 1) -> list[list[float]]:
    """Return a list of values for each contender: they take turns for `rounds` rounds, after `warm_up` rounds."""
    values = [[contender() for contender in contenders] for _ in range(warm_up + rounds)]
    return [list(column) for column in zip(*values[warm_up:], strict=True)]


def seconds_of(function: Callable[[], Any]) -> float:
    synchronize(DEVICE)
    began = time.perf_counter()
    function()
    synchronize(DEVICE)
    return time.perf_counter() - began


def call(*command: Any, codes: Sequence[int] = (0,), **env: str) -> str:
    """Run a command to its end and return what it printed. RuntimeError unless its exit code is in `codes`."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=3600)  # fmt: skip
    if done.returncode not in codes:
        last = (done.stdout.strip() or "no error message").splitlines()[-1]
        raise RuntimeError(f"{' '.join(words[1:5])} … ended with code {done.returncode}: {last}")
    return done.stdout


def fresh(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, computed in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def train(setting: Setting, *args: Any, script: str = "train_mnist.py", processes: int = 0, **env: str) -> Any:
    """Train by a script in a new process, or by torchrun in `processes`; return what its run.json says of the end."""
    output = Path(tempfile.mkdtemp(dir=setting.folder)) / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *launcher, ROOT / "scripts" / script, "--data-dir", setting.data_dir, "--output", output]
    began = time.perf_counter()
    call(*command, *args, **env)
    seconds = time.perf_counter() - began
    result = json.loads((output / "run.json").read_text(encoding="utf-8"))["result"]
    return result | {"process_seconds": seconds, "best": output / "checkpoints" / "best.pt"}


def tensor_loader(setting: Setting, batch_size: int, batches: int, augment: bool = False) -> tb.TensorLoader:
    images = tb.load_images("mnist", setting.data_dir, download=False)
    mean, std = NORMALISATION["mnist"]
    return tb.TensorLoader(
        images.inputs, images.targets, batch_size, shuffle=True, device=DEVICE, mean=mean, std=std,
        drop_last=True, augment=tb.RandomAffine() if augment else None, limit_batches=batches,
    )  # fmt: skip


def torchvision_mnist(data_dir: Path, train: bool = True, augment: bool = False) -> Any:
    """Return torchvision's own data set, with the transforms of its examples."""
    from torchvision import datasets
    from torchvision import transforms as T

    affine = [T.RandomAffine(10, translate=(0.1, 0.1))] if augment else []
    steps = T.Compose([*affine, T.ToTensor(), T.Normalize(*NORMALISATION["mnist"])])
    return datasets.MNIST(str(data_dir), train, steps, download=False)


def import_section(setting: Setting) -> Iterator[Row]:
    """Import torch, then the package; both times begin together, so the noise between processes is in both."""
    code = (
        "import time; began = time.perf_counter(); import torch; alone = time.perf_counter() - began; "
        "import torchbasics; torchbasics.Trainer, torchbasics.TensorLoader; print(time.perf_counter() - began, alone)"
    )
    call(sys.executable, "-c", code, PYTHONDONTWRITEBYTECODE="")  # compile it, as an installed package is
    lines = [call(sys.executable, "-c", code).splitlines()[-1] for _ in range(setting.rounds(11))]
    both, alone = zip(*(map(float, line.split()) for line in lines), strict=True)
    yield Row("import", "import torch and torchbasics", "import torch", both, alone)


def loader_section(setting: Setting) -> Iterator[Row]:
    """Seconds per image, ready on the device, from TensorLoader and from torchvision through a DataLoader."""
    steps = setting.steps(100)

    def per_image(batches: Iterable) -> float:
        iterator = iter(batches)
        next(iterator)  # starting workers does not count

        def load() -> None:
            for inputs, _ in itertools.islice(iterator, steps):
                inputs.to(DEVICE)

        return seconds_of(load) / (128 * steps)

    for augment, workers in itertools.product((True, False), (0, 2)):
        kind = "augmented" if augment else "plain"
        ours = tensor_loader(setting, 128, steps + 1, augment)
        dataset = torchvision_mnist(setting.data_dir, augment=augment)
        peer = torch.utils.data.DataLoader(dataset, 128, shuffle=True, num_workers=workers)
        name = f"torchvision's MNIST in a DataLoader with {workers} workers"
        jobs = functools.partial(per_image, ours), functools.partial(per_image, peer)
        times = take_turns(setting.rounds(5), *jobs)
        yield Row(f"loader, {kind}", f"an image, {kind}, batches of 128", name, *times)


class Job(NamedTuple):
    """What every loop gets. A loop is a function that trains one epoch and returns its seconds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Any
    precision: str
    criterion: nn.Module = nn.CrossEntropyLoss()


def make_job(setting: Setting, name: str, steps: int) -> Job:
    """Return MNISTNet as train_mnist trains it, or SimpleNet in fp32, whose steps are mostly overhead."""
    tb.set_seed(0)
    model = tb.make_model({"model": name}).to(DEVICE)
    precision, batch_size = "fp32", 64
    if name == "mnistnet":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        precision, batch_size = tb.pick_precision("auto", DEVICE), 128
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    return Job(model, optimizer, tensor_loader(setting, batch_size, steps), precision)


def read(value: Tensor) -> Any:
    """Return the value of a tensor; on an accelerator that would wait for it, so the sums stay there."""
    return value.item() if DEVICE.type == "cpu" else value.detach()


def by_hand(job: Job, backward: Callable[[Tensor], Any] = Tensor.backward) -> Callable[[], float]:
    """The loop as everybody writes it, with the epoch's mean loss and accuracy over its samples."""
    def epoch() -> tuple[float, float]:
        loss_sum = correct = count = 0
        job.model.train()
        for inputs, targets in job.loader:
            inputs, targets = inputs.to(DEVICE), targets.to(DEVICE)
            job.optimizer.zero_grad()
            with autocast(DEVICE, job.precision):
                outputs = job.model(inputs).float()
                loss = job.criterion(outputs, targets)
            backward(loss)
            job.optimizer.step()
            loss_sum += read(loss) * len(targets)
            correct += read((outputs.argmax(1) == targets).sum())
            count += len(targets)
        return float(loss_sum) / count, float(correct) / count

    return lambda: seconds_of(epoch)


def by_trainer(job: Job, **options: Any) -> Callable[[], float]:
    trainer = tb.Trainer(job.model, job.criterion, job.optimizer, DEVICE, precision=job.precision, **options)
    return lambda: seconds_of(lambda: trainer.train_one_epoch(job.loader))


def by_fabric(job: Job) -> Callable[[], float]:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator=DEVICE.type, devices=1, precision="32-true")
    model, optimizer = fabric.setup(job.model, job.optimizer)
    return by_hand(job._replace(model=model, optimizer=optimizer), fabric.backward)


def by_accelerate(job: Job) -> Callable[[], float]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=DEVICE.type == "cpu", mixed_precision="no")
    model, optimizer = accelerator.prepare(job.model, job.optimizer)
    return by_hand(job._replace(model=model, optimizer=optimizer), accelerator.backward)


def by_ignite(job: Job) -> Callable[[], float]:
    from ignite.engine import create_supervised_trainer
    from ignite.metrics import Accuracy, Average

    engine = create_supervised_trainer(
        job.model, job.optimizer, job.criterion, DEVICE,
        output_transform=lambda inputs, targets, outputs, loss: (outputs, targets, loss.detach()),
    )  # fmt: skip
    Accuracy(output_transform=lambda output: output[:2], device=DEVICE).attach(engine, "accuracy")
    Average(output_transform=lambda output: output[2], device=DEVICE).attach(engine, "loss")  # of equal batches
    return lambda: seconds_of(lambda: engine.run(job.loader, max_epochs=1))


def by_lightning(job: Job) -> Callable[[], float]:
    """The epoch without the hundreds of milliseconds that `fit` takes to set up."""
    import lightning

    class Module(lightning.LightningModule):
        loss_sum = correct = 0.0

        def training_step(self, batch: Any, _: int) -> Tensor:
            outputs = self.model(batch[0])
            loss = job.criterion(outputs, batch[1])
            self.loss_sum += read(loss) * len(outputs)  # self.log would take longer
            self.correct += read((outputs.argmax(1) == batch[1]).sum())
            return loss

        def configure_optimizers(self) -> Any:
            return job.optimizer

        def on_train_epoch_start(self) -> None:
            synchronize(DEVICE)
            self.began = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            synchronize(DEVICE)
            self.seconds = time.perf_counter() - self.began

    def epoch() -> float:
        module = Module()
        module.model = job.model
        lightning.Trainer(
            accelerator=DEVICE.type, devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, job.loader)  # fmt: skip
        return module.seconds

    return epoch


FRAMEWORKS = {  # name: package, loop
    "Fabric": ("lightning", by_fabric),
    "Accelerate": ("accelerate", by_accelerate),
    "Ignite": ("pytorch-ignite", by_ignite),
    "Lightning Trainer": ("lightning", by_lightning),
}


def loop_section(setting: Setting) -> Iterator[Row]:
    """The Trainer against the loop by hand and frameworks, all of which count loss and accuracy per sample."""

    def compare(goal: str, name: str, steps: int, peer: str, make: Callable[[Job], Callable[[], float]]) -> Row:
        job = make_job(setting, name, steps)  # one model for both: two differ by percents, by where in memory they lie
        times = take_turns(setting.rounds(21), by_trainer(job), make(job))
        what = f"a step of {type(job.model).__name__}, {job.loader.batch_size} images, {job.precision}"
        return Row(goal, what, peer, *[[seconds / steps for seconds in column] for column in times])

    yield compare("loop, MNISTNet", "mnistnet", setting.steps(10), "loop by hand", by_hand)
    steps = setting.steps(200)
    yield compare("loop, SimpleNet", "simplenet", steps, "loop by hand", by_hand)
    for name, (package, make) in FRAMEWORKS.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Row("loop, framework", "a step of SimpleNet, 64 images, fp32", name, skipped=f"pip install {package}")
        else:
            yield compare("loop, framework", "simplenet", steps, f"{name} {version}", make)


def seconds_of_step(setting: Setting, ours: bool) -> float:
    """Return the median seconds of a step of MNISTNet, as train_mnist or a newcomer takes it."""
    steps = setting.steps(10)
    job = make_job(setting, "mnistnet", steps)
    job = job._replace(loader=list(job.loader))
    if ours:
        tb.cache_cpu_memory()
        epoch = by_trainer(job)
    else:
        model = tb.MNISTNet().to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        epoch = by_hand(job._replace(model=model, optimizer=optimizer, precision="fp32"))
    return statistics.median(take_turns(3, epoch)[0]) / steps


def step_section(setting: Setting) -> Iterator[Row]:
    """In new processes, since cache_cpu_memory changes a whole process."""
    jobs = [functools.partial(fresh, seconds_of_step, setting, ours) for ours in (True, False)]
    times = take_turns(setting.rounds(5), *jobs, warm_up=0)
    ours = f"{tb.pick_precision('auto', DEVICE)}, channels_last, fused AdamW, cache_cpu_memory"
    yield Row("step", f"a step of MNISTNet, 128 images, {ours}", "plain eager fp32", *times)


def classic_example(setting: Setting) -> dict[str, float]:
    """Train the network of PyTorch's MNIST example, written from its description, until it is right on 99% of the test.

    Return the number of epochs, the accuracy, and the seconds of training. Batches of 64 single images come through
    PIL; Adadelta at rate 1, times 0.7 after each epoch. It shuffles, as the example does on accelerators only.
    """
    torch.manual_seed(1)
    limit = 5 if setting.quick else None
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(),  # (B, 64, 24, 24)
        nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten(),  # (B, 9216)
        nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10), nn.LogSoftmax(1),
    ).to(DEVICE)  # fmt: skip
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
    train, test = (
        torch.utils.data.DataLoader(torchvision_mnist(setting.data_dir, part), size, shuffle=part)
        for part, size in ((True, 64), (False, 1000))
    )

    def train_epoch() -> None:
        model.train()
        for inputs, targets in itertools.islice(train, limit):
            optimizer.zero_grad()
            nn.functional.nll_loss(model(inputs.to(DEVICE)), targets.to(DEVICE)).backward()
            optimizer.step()
        schedule.step()

    epochs, accuracy, seconds = 0, 0.0, 0.0
    while epochs == 0 or (accuracy < 0.99 and epochs < 14 and not setting.quick):
        seconds += seconds_of(train_epoch)
        model.eval()
        with torch.no_grad():
            right = [model(x.to(DEVICE)).argmax(1).cpu() == y for x, y in itertools.islice(test, limit)]
        accuracy = float(torch.cat(right).float().mean())
        epochs += 1
    return {"epochs": epochs, "accuracy": accuracy, "train_seconds": seconds}


@functools.cache
def classic_result(setting: Setting) -> dict[str, float]:
    """Return the result of the classic example in a new process; `run` and `speedrun` share it."""
    began = time.perf_counter()
    result = fresh(classic_example, setting)
    return result | {"process_seconds": time.perf_counter() - began}


def recipe(setting: Setting, *args: Any) -> Any:
    """Return the result of train_mnist on MNIST."""
    short = ("--epochs", 1, "--limit-batches", 5) if setting.quick else ()
    return train(setting, "--dataset", "mnist", *short, *args)


def run_section(setting: Setting) -> Iterator[Row]:
    """The default recipe once, and the 14 epochs of the classic example, by the mean of those that were run."""
    result, classic = recipe(setting), classic_result(setting)
    yield Row("run, accuracy", "default recipe: test accuracy", ours=[result["test_accuracy"]])
    peer = f"classic example, 14 times the mean of its epochs ({classic['epochs']} run)"
    expected = 14 * classic["train_seconds"] / classic["epochs"]
    # Ours validates and saves meanwhile. The peer's tests do not count.
    yield Row("run, training", "default recipe: training", peer, [result["train_seconds"]], [expected])


def speedrun_section(setting: Setting) -> Iterator[Row]:
    classic, seeds = classic_result(setting), range(1, setting.rounds(3) + 1)
    results = [recipe(setting, "--preset", "speedrun", "--seed", seed) for seed in seeds]
    for part in ("training", "process"):
        key = "train_seconds" if part == "training" else "process_seconds"
        ours, peer = [result[key] for result in results], f"classic example to {classic['accuracy']:.2%}"
        yield Row(f"speedrun, {part}", f"--preset speedrun: {part}", peer, ours, [classic[key]] * len(ours))
    seconds = [result["train_seconds"] for result in results]
    yield Row("speedrun, seconds", "--preset speedrun: training", ours=seconds)
    accuracies = [result["test_accuracy"] for result in results]
    yield Row("speedrun, accuracy", "--preset speedrun: test accuracy", ours=accuracies)


def save_section(setting: Setting) -> Iterator[Row]:
    job = make_job(setting, "mnistnet", 1)
    by_hand(job)()
    state = {"epoch": 1, "model_state_dict": job.model.state_dict(), "optimizer_state_dict": job.optimizer.state_dict()}

    def seconds(save: Callable[..., Any], file: str) -> float:
        return seconds_of(lambda: save(state, setting.folder / file))

    jobs = functools.partial(seconds, tb.save_checkpoint, "ours.pt"), functools.partial(seconds, torch.save, "its.pt")
    times = take_turns(setting.rounds(21), *jobs)
    size = (setting.folder / "ours.pt").stat().st_size / 1e6
    yield Row("save", f"save_checkpoint, durable and verified, {size:.1f} MB", "torch.save", *times)


def ddp_section(setting: Setting) -> Iterator[Row]:
    """Seconds of two epochs with their validation. Each process gets half of the cores, also a single one."""
    threads = max(1, CORES // 2)

    def seconds(processes: int, batch_size: int, steps: int) -> float:
        args = ("--dataset", "mnist", "--epochs", 2, "--device", "cpu", "--batch-size", batch_size)
        script = "train_ddp.py" if processes else "train_mnist.py"
        result = train(setting, *args, "--limit-batches", steps, script=script, processes=processes,
                       OMP_NUM_THREADS=str(threads))  # fmt: skip
        return result["train_seconds"]

    for batch_size, steps in ((128, setting.steps(100)), (512, setting.steps(50))):
        runs = [functools.partial(seconds, processes, batch_size, steps) for processes in (2, 1, 0)]
        two, one, plain = take_turns(setting.rounds(3), *runs, warm_up=0)
        what = f"SmallVGG, 2 epochs of {steps} steps of {batch_size} images, {{}} under torchrun"
        yield Row(f"ddp, {batch_size}", what.format("2 processes"), "1 process", two, one)
        yield Row("ddp, 1 process", what.format("1 process"), "train_mnist.py", one, plain)


def inference_section(setting: Setting) -> Iterator[Row]:
    """Median seconds of a call with one image, in the formats that scripts/export.py can make here."""
    best = train(setting, "--dataset", "mnist", "--epochs", 1, "--limit-batches", setting.steps(150))["best"]
    formats = ("pt2", "onnx") if setting.quick else ("all",)
    command = [sys.executable, ROOT / "scripts" / "export.py", "--checkpoint", best, "--format", *formats]
    printed = call(*command, "--output", setting.folder / "exported", codes=(0, 1, 3))  # one that fails is a row
    # Rows of its table begin with a name and the MB, and end with the milliseconds of a call.
    calls = re.findall(r"^([a-z][\w-]*) +[\d.]+ .* ([\d.]+)$", printed, re.MULTILINE)
    seconds = {name: float(milliseconds) / 1000 for name, milliseconds in calls}
    eager = seconds.pop("model")
    for name, value in seconds.items():
        yield Row("inference", f"SmallVGG as {name}, one image", "eager", [value], [eager])
    for name, reason in re.findall(r"^error: ([\w-]+): (.*)", printed, re.MULTILINE):
        yield Row("inference", f"SmallVGG as {name}, one image", "eager", skipped=reason)


def gpu_section(setting: Setting) -> Iterator[Row]:
    """How often ten steps make the host wait for the device. All other sections use the GPU too if there is one."""
    if DEVICE.type != "cuda":
        yield Row("gpu, waits", "MNISTNet: waits in 10 steps", skipped="needs CUDA")
        return
    job = make_job(setting, "mnistnet", 20)

    def watch(trainer: tb.Trainer) -> None:
        if trainer.step in (5, 15):
            torch.cuda.set_sync_debug_mode("warn" if trainer.step == 5 else "default")

    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        schedule = torch.optim.lr_scheduler.OneCycleLR(job.optimizer, 1e-3, 100)
        by_trainer(job, scheduler=schedule, clip_norm=1.0, averages=tb.averaged_copy(job.model, 0.999),
                   log_every=100, on_step_end=[watch])()  # fmt: skip
    waits = sum("synchronizing CUDA" in str(warning.message) for warning in noted)
    yield Row("gpu, waits", "MNISTNet: waits for the device in 10 steps", ours=[waits])


SECTIONS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "import": import_section, "loader": loader_section, "loop": loop_section, "step": step_section,
    "run": run_section, "speedrun": speedrun_section, "save": save_section, "ddp": ddp_section,
    "inference": inference_section, "gpu": gpu_section,
}  # fmt: skip


def machine(setting: Setting) -> str:
    """Return what the figures depend on, in one line."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    parts = [
        f"{tb.device_name(DEVICE)}, {CORES} cores",
        f"bf16 {'native' if bf16_is_native(DEVICE) else 'emulated'}",
        f"torch {torch.__version__}, Python {platform.python_version()}, torchbasics {tb.__version__}",
        str(datetime.date.today()),
    ]
    if load > 0.3 * CORES:
        parts.append(f"load average of the minute before: {load:.1f}")
    return "; ".join([*parts, "QUICK: the figures mean little"] if setting.quick else parts)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="see whether all of it runs; the figures mean little")
    parser.add_argument("--data-dir", default="./data", type=cli.path_argument, metavar="DIR",
                        help="where MNIST is (default: ./data)")  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="print a page with a table, for docs/benchmarks.md")
    args = parser.parse_args(argv)
    for name in args.sections:  # Python 3.11's `choices` refuses to have none
        if name not in SECTIONS:
            parser.error(f"there is no section {name!r}; choose of {', '.join(SECTIONS)}")
    if not is_present("mnist", args.data_dir):
        parser.error(f"--data-dir {args.data_dir}: no MNIST there; scripts/train_mnist.py --dataset mnist downloads it")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    warnings.simplefilter("ignore")  # advice of the frameworks
    logging.disable(logging.WARNING)
    failed = False
    if DEVICE.type == "cpu":
        tb.cache_cpu_memory()  # for both sides of what is measured in this process
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        setting = Setting(args.quick, Path(args.data_dir).resolve(), Path(folder))
        if args.markdown:
            print(f"# Benchmarks\n\nBy `python -m tests.benchmark --markdown` on {machine(setting)}.\n")
            print("Values are medians (lowest to highest). The goals are for two cores.\n")
            print("| What | Ours | Peer | Figure | Goal | Verdict |\n|---|---|---|---|---|---|")
        else:
            print(machine(setting))
        for name in args.sections or SECTIONS:
            try:
                for row in SECTIONS[name](setting):
                    cells = row.cells()
                    line = "| " + " | ".join(cells) + " |" if args.markdown else "; ".join(filter(None, cells))
                    print(line, flush=True)
            except Exception as error:
                failed = True
                print(f"error: {name}: {type(error).__name__}: {cli.printable(error)}", file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(cli.run(main))
