"""Measure every speed this project claims against a named peer, on this machine, in one run.

    python -m tests.benchmark --quick
    python -m tests.benchmark loop step --data-dir data --markdown

Ours and the peer do the same work and take turns (A B A B …). Each pair gives one figure; shown are medians, with the
lowest and the highest in parentheses. Whole trainings take minutes, so `run` compares one of each, `speedrun` five of
ours with one of the peer's, and `inference` shows what one run of scripts/export.py measures.

The goals are for two cores with native bf16 and nothing else running. A missed goal is shown, and is no error.
Exit codes: 0 measured, 1 a section failed, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import multiprocessing
import operator
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
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
from torchbasics.mnist import import_torchvision, is_present

ROOT = Path(__file__).resolve().parents[1]

GOALS: dict[str, tuple[str, str, float]] = {  # of a row: its figure, and the goal if there is one
    "import": ("more", "≤", 0.05),
    "loader, augmented": ("as fast", "≥", 20),
    "loader, plain": ("as fast", "≥", 80),
    "loop, MNISTNet": ("as long", "≤", 1.01),
    "loop, SimpleNet": ("as long", "", 0),
    "loop, framework": ("as fast", ">", 1),
    "step": ("as fast", "≥", 2.5),
    "run, accuracy": ("points higher", ">", 0),
    "run, training": ("as fast", "≥", 3),
    "speedrun, training": ("as fast", "≥", 140),
    "speedrun, process": ("as fast", "≥", 40),
    "speedrun, seconds": ("itself", "≤", 1.5),
    "speedrun, accuracy": ("itself", "≥", 0.99),
    "save": ("beyond 1.5×", "≤", 0.05),
    "ddp, 2 processes": ("as fast", "≥", 1.8),
    "ddp, 1 process": ("as long", "≤", 1.03),
    "inference": ("as fast", "", 0),
    "gpu, waits": ("itself", "≤", 0),
}
COMPARE = {"≤": operator.le, "≥": operator.ge, ">": operator.gt}
FIGURES: dict[str, tuple[Callable[[float, float], float], str]] = {  # how ours and the peer's make a figure, its unit
    "as fast": (lambda ours, peer: peer / ours, "×"),
    "as long": (lambda ours, peer: ours / peer, "×"),
    "more": (lambda ours, peer: ours - peer, "s"),
    "beyond 1.5×": (lambda ours, peer: ours - 1.5 * peer, "s"),
    "points higher": (lambda ours, peer: 100 * (ours - peer), ""),
    "itself": (lambda ours, peer: ours, ""),
}


class Setting(NamedTuple):
    """How much is measured, on what."""

    quick: bool
    data_dir: Path
    device: torch.device
    folder: Path  # for all files, removed at the end

    def pick(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    @property
    def has_mnist(self) -> bool:
        return is_present("mnist", self.data_dir)


class Row(NamedTuple):
    """One line of the table."""

    goal: str  # in GOALS
    what: str
    peer: str = ""
    ours: Sequence[float] = ()
    peers: Sequence[float] = ()
    unit: str = "s"
    skipped: str = ""  # why there are no figures

    def figures(self) -> list[float]:
        """Return one figure per pair; if the peer ran only once, one per run of ours."""
        peers = self.peers if len(self.peers) == len(self.ours) else [*self.peers, 0.0][:1] * len(self.ours)
        return list(map(FIGURES[GOALS[self.goal][0]][0], self.ours, peers))


def interleaved(pairs: int, *contenders: Callable[[], float], warm_up: int = 1) -> Any:
    """Return a list of values for each contender: they take turns for `pairs` rounds, after `warm_up` rounds."""
    rounds = [[contender() for contender in contenders] for _ in range(warm_up + pairs)]
    return [list(values) for values in zip(*rounds[warm_up:], strict=True)]


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def call(command: Sequence[Any], env: dict[str, str] | None = None, codes: Sequence[int] = (0,)) -> tuple[str, str]:
    """Run a process to its end and return its stdout and stderr. RuntimeError unless its exit code is in `codes`."""
    words, pipe, env = [str(word) for word in command], subprocess.PIPE, os.environ | (env or {})
    with subprocess.Popen(words, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            process.terminate()  # torchrun passes it on to its workers
            raise
    if process.returncode not in codes:
        last = (err.strip() or "no error message").splitlines()[-1]
        raise RuntimeError(f"{' '.join(words[1:5])} … ended with code {process.returncode}: {last}")
    return out, err


def fresh(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, computed in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def train(
    setting: Setting, *args: Any, script: str = "train_mnist.py", launcher: Sequence[str] = (), env: Any = None
) -> dict[str, Any]:
    """Train by a script in a new process; return its result, with the seconds of the process and what it printed."""
    output = Path(tempfile.mkdtemp(dir=setting.folder)) / "run"
    began = time.perf_counter()
    command = [sys.executable, *launcher, ROOT / "scripts" / script, "--data-dir", setting.data_dir]
    table = call([*command, "--output", output, *args], env)[0]
    seconds = time.perf_counter() - began
    result = json.loads((output / "run.json").read_text(encoding="utf-8"))["result"]
    return result | {"process_seconds": seconds, "table": table, "best": output / "checkpoints" / "best.pt"}


@functools.cache
def images(setting: Setting) -> tuple[Tensor, Tensor]:
    """Return MNIST's training images and labels, or drawn digits."""
    if not setting.has_mnist:
        return tb.draw_digits(setting.pick(60_000, 6_000))
    full = tb.load_images("mnist", setting.data_dir, download=False)
    return full.inputs, full.targets


def tensor_loader(setting: Setting, batch_size: int, batches: int, augment: bool = False) -> tb.TensorLoader:
    mean, std = NORMALISATION["mnist"]
    return tb.TensorLoader(
        *images(setting), batch_size, shuffle=True, device=setting.device, mean=mean, std=std, drop_last=True,
        augment=tb.RandomAffine() if augment else None, limit_batches=batches,
    )  # fmt: skip


def torchvision_mnist(data_dir: Path, train: bool = True, augment: bool = False) -> Any:
    """Return torchvision's own data set, with the transforms of its examples."""
    torchvision = import_torchvision()
    from torchvision import transforms as T

    affine = [T.RandomAffine(10, translate=(0.1, 0.1))] if augment else []
    steps = T.Compose([*affine, T.ToTensor(), T.Normalize(*NORMALISATION["mnist"])])
    return torchvision.datasets.MNIST(str(data_dir), train, steps, download=False)


def import_time(setting: Setting) -> Iterator[Row]:
    """Import torch, then the package; both times begin together, so the noise between processes is in both."""
    code = (
        "import time; began = time.perf_counter(); import torch; alone = time.perf_counter() - began; "
        "import torchbasics; torchbasics.Trainer, torchbasics.TensorLoader; print(time.perf_counter() - began, alone)"
    )
    command = [sys.executable, "-c", code]
    call(command, {"PYTHONDONTWRITEBYTECODE": ""})  # compile it, as an installed package is
    texts = [call(command)[0] for _ in range(setting.pick(21, 2))]
    both, alone = zip(*(map(float, text.split()) for text in texts), strict=True)
    yield Row("import", "import torch and torchbasics", "import torch", both, alone)


def loader(setting: Setting) -> Iterator[Row]:
    """Seconds per image, ready on the device, from TensorLoader and from torchvision through a DataLoader."""
    if not setting.has_mnist:
        yield Row("loader, plain", "images of batches of 128", skipped="needs MNIST in --data-dir")
        return

    def per_image(batches: Iterable, count: int, skip: int = 0) -> float:
        iterator = iter(batches)
        for _ in itertools.islice(iterator, skip):  # starting workers does not count
            pass
        took = seconds_of(lambda: [None for _ in itertools.islice(iterator, count)], setting.device)
        return took / (128 * count)

    for augment, workers in itertools.product((True, False), (0, 2)):
        kind, steps = "augmented" if augment else "plain", setting.pick(100, 3)
        ours = tensor_loader(setting, 128, steps, augment)
        dataset = torchvision_mnist(setting.data_dir, augment=augment)
        peer = torch.utils.data.DataLoader(dataset, 128, shuffle=True, num_workers=workers)
        jobs = functools.partial(per_image, ours, steps), functools.partial(per_image, peer, steps, min(workers, 1))
        name = f"torchvision's MNIST in a DataLoader with {workers} workers"
        yield Row(f"loader, {kind}", f"an image, {kind}, batches of 128", name, *interleaved(setting.pick(5, 1), *jobs))


class Job(NamedTuple):
    """What every loop gets."""

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Any
    device: torch.device
    precision: str


def make_job(setting: Setting, name: str, steps: int) -> Job:
    """Return MNISTNet as train_mnist trains it, or SimpleNet in fp32, whose steps are mostly overhead."""
    tb.set_seed(0)
    model = tb.make_model({"model": name}).to(setting.device)
    precision, batch_size = "fp32", 64
    if name == "mnistnet":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        precision, batch_size = tb.pick_precision("auto", setting.device), 128
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    batches = tensor_loader(setting, batch_size, steps)
    return Job(model, nn.CrossEntropyLoss(), optimizer, batches, setting.device, precision)


def by_hand(job: Job, backward: Callable[[Tensor], Any] = Tensor.backward) -> tuple[float, float]:
    """Train one epoch as everybody writes it; return mean loss and accuracy."""
    # Reading each loss costs a CPU nothing. On an accelerator it would wait, so the sums stay there.
    read: Callable[[Tensor], Any] = Tensor.item if job.device.type == "cpu" else Tensor.detach
    loss_sum = correct = count = 0
    job.model.train()
    for inputs, targets in job.loader:
        inputs, targets = inputs.to(job.device), targets.to(job.device)
        job.optimizer.zero_grad()
        with autocast(job.device, job.precision):
            outputs = job.model(inputs)
            outputs = outputs if outputs.dtype == torch.float32 else outputs.float()
            loss = job.criterion(outputs, targets)
        backward(loss)
        job.optimizer.step()
        loss_sum += read(loss) * len(targets)
        correct += read((outputs.argmax(1) == targets).sum())
        count += len(targets)
    return float(loss_sum) / count, float(correct) / count


def by_trainer(job: Job, **options: Any) -> Callable[[], Any]:
    trainer = tb.Trainer(job.model, job.criterion, job.optimizer, job.device, precision=job.precision, **options)
    return lambda: trainer.train_one_epoch(job.loader)


def by_fabric(job: Job) -> Callable[[], Any]:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator=job.device.type, devices=1, precision="32-true")
    model, optimizer = fabric.setup(job.model, job.optimizer)
    return lambda: by_hand(job._replace(model=model, optimizer=optimizer), fabric.backward)


def by_accelerate(job: Job) -> Callable[[], Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=job.device.type == "cpu", mixed_precision="no")
    model, optimizer = accelerator.prepare(job.model, job.optimizer)
    return lambda: by_hand(job._replace(model=model, optimizer=optimizer), accelerator.backward)


def by_ignite(job: Job) -> Callable[[], Any]:
    from ignite.engine import create_supervised_trainer
    from ignite.metrics import Accuracy, Average

    engine = create_supervised_trainer(
        job.model, job.optimizer, job.criterion, job.device,
        output_transform=lambda inputs, targets, outputs, loss: (outputs, targets, loss.detach()),
    )  # fmt: skip
    Accuracy(output_transform=lambda output: output[:2], device=job.device).attach(engine, "acc")
    Average(output_transform=lambda output: output[2], device=job.device).attach(engine, "loss")  # of equal batches
    return lambda: engine.run(job.loader, max_epochs=1)


def by_lightning(job: Job) -> Callable[[], float]:
    """The epoch returns its seconds, without the hundreds of milliseconds that a fit takes to set up."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def training_step(self, batch: Any, _: int) -> Tensor:
            outputs = self.model(batch[0])
            loss = job.criterion(outputs, batch[1])
            read: Callable[[Tensor], Any] = Tensor.item if job.device.type == "cpu" else Tensor.detach
            self.loss_sum += read(loss) * len(outputs)  # self.log would take longer
            self.correct += read((outputs.argmax(1) == batch[1]).sum())
            return loss

        def configure_optimizers(self) -> Any:
            return job.optimizer

        def on_train_epoch_start(self) -> None:
            self.loss_sum = self.correct = 0
            synchronize(job.device)
            self.began = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            synchronize(job.device)
            self.seconds = time.perf_counter() - self.began

    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "accelerator": job.device.type, "devices": 1, "max_epochs": 1}

    def epoch() -> float:
        module = Module()
        lightning.Trainer(**options).fit(module, job.loader)
        return module.seconds

    return epoch


FRAMEWORKS: dict[str, tuple[str, str, Callable[[Job], Callable[[], Any]]]] = {  # name: module, package, loop
    "Fabric": ("lightning", "lightning", by_fabric),
    "Accelerate": ("accelerate", "accelerate", by_accelerate),
    "Ignite": ("ignite", "pytorch-ignite", by_ignite),
    "Lightning Trainer": ("lightning", "lightning", by_lightning),
}


def per_step(job: Job, epoch: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that trains one epoch and returns the seconds of a step."""

    def measure() -> float:
        own: list[Any] = []
        seconds = seconds_of(lambda: own.append(epoch()), job.device)
        return (own[0] if isinstance(own[0], float) else seconds) / len(job.loader)

    return measure


def loop(setting: Setting) -> Iterator[Row]:
    """The Trainer against the hand-written loop and frameworks, all of which count loss and accuracy per sample.

    Both sides of a pair train the same model: two equal ones differ by percents, by where in memory they lie.
    """
    pairs, what = setting.pick(61, 2), "a step of {}, {} images, {}"
    for name, steps in (("MNISTNet", setting.pick(20, 2)), ("SimpleNet", setting.pick(400, 20))):
        job = make_job(setting, name.lower(), steps)
        times = interleaved(pairs, per_step(job, by_trainer(job)), per_step(job, functools.partial(by_hand, job)))
        text = what.format(name, job.loader.batch_size, job.precision)
        yield Row(f"loop, {name}", text, "hand-written loop", *times)
    for name, (module, package, make) in FRAMEWORKS.items():
        if importlib.util.find_spec(module) is None:
            yield Row("loop, framework", text, name, skipped=f"not installed: pip install {package}")
            continue
        job = make_job(setting, "simplenet", steps)
        times = interleaved(pairs, per_step(job, by_trainer(job)), per_step(job, make(job)))
        yield Row("loop, framework", text, f"{name} {importlib.metadata.version(package)}", *times)


def seconds_of_step(setting: Setting, ours: bool) -> float:
    """Return the median seconds of a step of MNISTNet over drawn batches, as train_mnist or a newcomer takes it."""
    if ours:
        tb.cache_cpu_memory()
    job = make_job(setting, "mnistnet", setting.pick(20, 2))
    job = job._replace(loader=list(job.loader))
    if ours:
        epoch = by_trainer(job)
    else:
        model = tb.MNISTNet().to(setting.device)
        plain = job._replace(model=model, optimizer=torch.optim.AdamW(model.parameters(), 1e-3), precision="fp32")
        epoch = functools.partial(by_hand, plain)
    return statistics.median(interleaved(setting.pick(5, 1), per_step(job, epoch))[0])


def step(setting: Setting) -> Iterator[Row]:
    """In new processes, since cache_cpu_memory changes a whole process."""
    times = interleaved(
        setting.pick(5, 1), lambda: fresh(seconds_of_step, setting, True),
        lambda: fresh(seconds_of_step, setting, False), warm_up=0,
    )  # fmt: skip
    ours = f"{tb.pick_precision('auto', setting.device)}, channels_last, fused AdamW, cache_cpu_memory"
    yield Row("step", f"a step of MNISTNet, 128 images, {ours}", "plain eager fp32", *times)


def classic_example(setting: Setting) -> list[dict[str, float]]:
    """Train the network of PyTorch's MNIST example, written from its description; return accuracy and times by epoch.

    Batches of 64 single images through PIL, Adadelta at rate 1, times 0.7 after each of 14 epochs. It shuffles, as
    the example does on accelerators only.
    """
    torch.manual_seed(1)
    device, limit = setting.device, 5 if setting.quick else None
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(),  # (B, 64, 24, 24)
        nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten(),  # (B, 9216)
        nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10), nn.LogSoftmax(1),
    ).to(device)  # fmt: skip
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
            nn.functional.nll_loss(model(inputs.to(device)), targets.to(device)).backward()
            optimizer.step()

    epochs, began, seconds = [], time.perf_counter(), 0.0
    for _ in range(setting.pick(14, 1)):
        seconds += seconds_of(train_epoch, device)
        schedule.step()
        model.eval()
        with torch.no_grad():
            right = [model(x.to(device)).argmax(1).cpu() == y for x, y in itertools.islice(test, limit)]
        accuracy = float(torch.cat(right).float().mean())
        epochs.append({"accuracy": accuracy, "train": seconds, "process": time.perf_counter() - began})
    return epochs


@functools.cache
def classic_epochs(setting: Setting) -> list[dict[str, float]]:
    """Return the epochs of the classic example in a new process, with its start-up in "process"; `run` shares them."""
    began = time.perf_counter()
    epochs = fresh(classic_example, setting)
    start_up = time.perf_counter() - began - epochs[-1]["process"]
    return [epoch | {"process": epoch["process"] + start_up} for epoch in epochs]


def recipe(setting: Setting, *args: Any) -> Any:
    """Return the result of train_mnist on MNIST."""
    short = ("--epochs", 1, "--limit-batches", 5) if setting.quick else ()
    return train(setting, "--dataset", "mnist", *short, *args)


def run(setting: Setting) -> Iterator[Row]:
    if not setting.has_mnist:
        yield Row("run, training", "default recipe", skipped="needs MNIST in --data-dir")
        return
    result, end = recipe(setting), classic_epochs(setting)[-1]
    peer = f"classic example, epochs: {len(classic_epochs(setting))}"
    accuracies = [result["test_accuracy"]], [end["accuracy"]]
    yield Row("run, accuracy", "default recipe: test accuracy", peer, *accuracies, unit="%")
    # Ours validates and saves meanwhile. The peer's tests do not count.
    yield Row("run, training", "default recipe: training", peer, [result["train_seconds"]], [end["train"]])


def speedrun(setting: Setting) -> Iterator[Row]:
    if not setting.has_mnist:
        yield Row("speedrun, training", "--preset speedrun", skipped="needs MNIST in --data-dir")
        return
    epochs = classic_epochs(setting)
    reached = next((epoch for epoch in epochs if epoch["accuracy"] >= 0.99), epochs[-1])
    peer = f"classic example to {reached['accuracy']:.2%}"
    seeds = range(1, setting.pick(5, 1) + 1)
    results = [recipe(setting, "--preset", "speedrun", "--seed", seed) for seed in seeds]
    training = [result["train_seconds"] for result in results]
    process = [result["process_seconds"] for result in results]
    mean = statistics.fmean(result["test_accuracy"] for result in results)
    yield Row("speedrun, training", "--preset speedrun: training", peer, training, [reached["train"]])
    yield Row("speedrun, process", "--preset speedrun: whole process", peer, process, [reached["process"]])
    yield Row("speedrun, seconds", "--preset speedrun: training", ours=training)
    yield Row("speedrun, accuracy", f"--preset speedrun: mean test accuracy, seeds: {len(seeds)}", "", [mean], unit="%")


def save(setting: Setting) -> Iterator[Row]:
    job = make_job(setting, "mnistnet", 1)
    by_hand(job)
    state = {"epoch": 1, "model_state_dict": job.model.state_dict(), "optimizer_state_dict": job.optimizer.state_dict()}
    times = interleaved(
        setting.pick(21, 2),
        lambda: seconds_of(lambda: tb.save_checkpoint(state, setting.folder / "ours.pt"), setting.device),
        lambda: seconds_of(lambda: torch.save(state, setting.folder / "plain.pt"), setting.device),
    )
    size = (setting.folder / "ours.pt").stat().st_size / 1e6
    yield Row("save", f"save_checkpoint, durable and verified, {size:.1f} MB", "torch.save", *times)


def ddp(setting: Setting) -> Iterator[Row]:
    """Seconds per image of the second epoch, with its validation. Each process gets half of the cores."""
    env = {"OMP_NUM_THREADS": str(max(1, core_count() // 2))}
    common = ("--dataset", "mnist" if setting.has_mnist else "digits", "--epochs", 2, "--device", "cpu")

    def per_image(processes: int, batch_size: int) -> float:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}") if processes else ()
        args = (*common, "--batch-size", batch_size, "--limit-batches", setting.pick(19_200, 1024) // batch_size)
        script = "train_ddp.py" if processes else "train_mnist.py"
        table = train(setting, *args, script=script, launcher=launcher, env=env)["table"]
        rates = re.findall(r" ([\d,]+) +[\d.]+(?: best)?$", table, re.MULTILINE)  # samples/s, before the seconds
        return 1 / float(rates[-1].replace(",", ""))

    jobs = [functools.partial(per_image, *job) for job in ((2, 128), (1, 128), (0, 128), (2, 512), (1, 512))]
    two, one, plain, two_large, one_large = interleaved(setting.pick(5, 1), *jobs, warm_up=0)
    what = "an image, SmallVGG, batches of {}, {} under torchrun"
    yield Row("ddp, 2 processes", what.format(128, "2 processes"), "1 process", two, one)
    yield Row("ddp, 2 processes", what.format(512, "2 processes"), "1 process", two_large, one_large)
    yield Row("ddp, 1 process", what.format(128, "1 process"), "train_mnist.py", one, plain)


def inference(setting: Setting) -> Iterator[Row]:
    """Median seconds of a call with one image, in the formats that scripts/export.py can make here."""
    dataset, steps = "mnist" if setting.has_mnist else "digits", setting.pick(150, 20)
    best = train(setting, "--dataset", dataset, "--epochs", 1, "--limit-batches", steps, "--quiet")["best"]
    command = [sys.executable, ROOT / "scripts" / "export.py", "--checkpoint", best]
    formats = ("pt2", "onnx") if setting.quick else ("all",)
    out, err = call([*command, "--output", setting.folder / "exported", "--format", *formats], codes=(0, 1, 3))
    # Rows of its table begin with a name and two numbers (MB, difference), and end with the milliseconds of a call.
    calls = re.findall(r"^([a-z][\w-]*) +[\d.]+ +[-+\d.e]+ .* ([\d.]+)$", out, re.MULTILINE)
    seconds = {name: float(milliseconds) / 1000 for name, milliseconds in calls}
    eager = seconds.pop("model")
    for name, value in seconds.items():
        yield Row("inference", f"SmallVGG as {name}, one image", "eager", [value], [eager])
    for name, reason in re.findall(r"^error: ([\w-]+): (.*)", err, re.MULTILINE):
        yield Row("inference", f"SmallVGG as {name}, one image", "eager", skipped=reason)


def gpu(setting: Setting) -> Iterator[Row]:
    """How often ten steps make the host wait for the device. All other sections use the GPU too if there is one."""
    if setting.device.type != "cuda":
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
    yield Row("gpu, waits", "MNISTNet: waits for the device in 10 steps", ours=[waits], unit="")


SECTIONS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "import": import_time, "loader": loader, "loop": loop, "step": step, "run": run, "speedrun": speedrun,
    "save": save, "ddp": ddp, "inference": inference, "gpu": gpu,
}  # fmt: skip


def core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(setting: Setting) -> str:
    """Return what the figures depend on, in one line."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    names = dict.fromkeys(tb.device_name(device) for device in (torch.device("cpu"), setting.device))
    parts = [
        f"{', '.join(names)}, {core_count()} cores, load {load:.2f} at the start",
        f"torch {torch.__version__}, torchvision {importlib.metadata.version('torchvision')}, "
        f"Python {platform.python_version()}, torchbasics {tb.__version__}",
        f"bf16 {'native' if bf16_is_native(setting.device) else 'emulated'}",
        "MNIST" if setting.has_mnist else "drawn digits",
        f"{datetime.date.today()}",
    ]
    if load > 0.3 * core_count():
        parts.append("NOTICE: other programs were running, so take the figures from a quieter machine")
    return "; ".join(parts + ["QUICK: the figures mean little"] * setting.quick)


def quantity(value: float, unit: str) -> str:
    """Return a value with three digits and its unit: seconds as s, ms or µs, fractions as percentages."""
    if unit == "%":
        return f"{value:.2%}"
    factor = 1.0
    if unit == "s" and abs(value) < 1:
        factor, unit = (1e3, "ms") if abs(value) >= 1e-3 or not value else (1e6, "µs")
    digits = min(max(2 - len(str(int(abs(value * factor)))) + 1, 0), 2)
    return f"{value * factor:,.{digits}f}{'' if unit in ('', '×') else ' '}{unit}"


def spread(values: Sequence[float], unit: str) -> str:
    low, middle, high = (quantity(kind(values), unit) for kind in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def cells(row: Row) -> list[str]:
    """Return the words of a row: what, ours, peer, figure, goal, verdict, runs."""
    if row.skipped:
        return [row.what, "", row.peer, f"SKIP: {row.skipped}", "", "", ""]
    kind, sign, number = GOALS[row.goal]
    figures, unit = row.figures(), row.unit if kind == "itself" else FIGURES[kind][1]
    peer = f"{row.peer}: {spread(row.peers, row.unit)}" if row.peers else ""
    figure = f"{spread(figures, unit)} {kind}" if row.peers else ""
    goal = verdict = ""
    if sign:
        goal = f"{sign} {quantity(number, unit)}"
        verdict = "met" if COMPARE[sign](statistics.median(figures), number) else "NOT MET"
    return [row.what, spread(row.ours, row.unit), peer, figure, goal, verdict, str(len(row.ours))]


def print_row(words: list[str], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(words) + " |", flush=True)
    else:
        what, ours, peer, figure, goal, verdict, _ = words
        parts = [ours, peer and f"against {peer}", figure, goal and f"goal {goal}: {verdict}"]
        print(f"  {what}\n      " + "; ".join(filter(None, parts)), flush=True)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="see whether all of it runs; the figures mean little")
    parser.add_argument("--data-dir", default="./data", type=cli.path_argument, metavar="DIR",
                        help="where MNIST is; without it some take drawn digits (default: ./data)")  # fmt: skip
    parser.add_argument("--json", type=cli.path_argument, metavar="FILE", help="write every single value to FILE too")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    args = parser.parse_args(argv)
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"no section {name!r}; there are {', '.join(SECTIONS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # end the processes and remove the files first
    warnings.simplefilter("ignore")  # advice of the frameworks
    logging.disable(logging.WARNING)
    device, failed = tb.pick_device(), False
    report: list[dict[str, Any]] = []
    if device.type == "cpu":
        tb.cache_cpu_memory()  # for both sides of what is measured in this process
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        setting = Setting(args.quick, Path(args.data_dir).resolve(), device, Path(folder))
        where = machine(setting)
        print(where, flush=True)
        if args.markdown:
            print("\n| What | Ours | Peer | Figure | Goal | Verdict | Runs |\n|---|---|---|---|---|---|---|")
        for name in args.sections or SECTIONS:
            if not args.markdown:
                print(name, flush=True)
            try:
                for row in SECTIONS[name](setting):
                    print_row(cells(row), args.markdown)
                    report.append({"section": name, **row._asdict(), "words": cells(row)})
            except Exception as error:
                failed = True
                traceback.print_exc()
                print_row([name, "", "", f"FAILED: {cli.printable(error)}", "", "", ""], args.markdown)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": where, "rows": report}, indent=1), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(cli.run(main))
