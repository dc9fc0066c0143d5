"""Measures every speed that this project claims against a named peer, here and now, in one run.

    python scripts/benchmark.py --quick
    python scripts/benchmark.py --only loop --only step --data-dir ./data

Ours and the peer take turns (A B A B …), after one run each to warm up where they share a process; of the long ones,
`run` and `speedrun`, the peer's come first, and `inference` measures each format once. A ratio is the median of the
pairs' ratios or, where one side ran less often, the ratio of the medians; the lowest and the highest stand beside it.
The goals are those for two cores with native bf16 and nothing else running; one that is missed is shown, and is no
error.

README's table is made from the saved figures of a run:

    python scripts/benchmark.py --data-dir ./data --json > benchmark.json
    python scripts/benchmark.py --from benchmark.json --markdown
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import datetime
import difflib
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import operator
import os
import platform
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "torchbasics" / "__init__.py").is_file():  # in a checkout its own package comes first, installed or not
    sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn

import torchbasics as tb
from torchbasics import options
from torchbasics.data import NORMALISATION
from torchbasics.device import AUTOCAST_DTYPES, autocast, bf16_is_native, device_name, synchronize
from torchbasics.mnist import import_torchvision, is_present

FORMAT, SCHEMA = "torchbasics benchmark", 1
EMULATED = "NOTICE: the goals are those of two cores with native bf16, and here it is emulated"
QUICK = "QUICK: little work, seldom repeated: it shows that all of it runs, the figures mean little"
NO_MNIST = "needs MNIST, and there is none in {}; name its folder by --data-dir"
MEAN, STD = NORMALISATION["mnist"]


class Skip(Exception):
    """A section, or a peer, that can't be measured here; the text says why."""


@dataclass
class Setting:
    """How much is measured, on what."""

    quick: bool
    runs: int
    long_runs: int
    data_dir: Path
    device: torch.device
    precision: str
    folder: Path  # for all files of this run; removed at its end
    debug: bool = False
    cache: dict[str, Any] = field(default_factory=dict)  # what several sections need is made once

    def few(self, full: int, quick: int) -> int:
        """The one or the other, as --quick says."""
        return quick if self.quick else full

    @property
    def pairs(self) -> int:
        """Repetitions where a difference of a percent is looked for: the machine's own speed varies by ten."""
        return self.few(max(self.runs, 61), 2)


# ----------------------------------------------------------------------------------------------------- what a figure is


class Goal(NamedTuple):
    """The ratio is to be at least, at most or above `number`; `text` says so where that is not enough."""

    sign: str
    number: float
    text: str = ""


COMPARED = {"≥": operator.ge, "≤": operator.le, ">": operator.gt}
KINDS: dict[str, tuple[Callable[[float, float], float], str]] = {  # what is made of ours and the peer's, and its unit
    "as fast": (lambda ours, peer: peer / ours, "×"),  # of times
    "the rate": (lambda ours, peer: ours / peer, "×"),  # of rates
    "as long": (lambda ours, peer: ours / peer, "×"),
    "reached": (lambda ours, peer: peer / ours, "%"),
    "of it": (lambda ours, peer: ours / peer, "%"),
    "seconds more": (lambda ours, peer: ours - peer, "+s"),
    "points more": (lambda ours, peer: ours - peer, "points"),
    "seconds": (lambda ours, _: ours, "s"),
    "accuracy": (lambda ours, _: ours, "%"),
    "count": (lambda ours, _: ours, ""),
}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def row(what: str, peer: str, kind: str, unit: str, ours: Sequence[float], peers: Sequence[float] = (),
        goal: Goal | None = None, note: str = "") -> dict[str, Any]:
    """One line of the table. `unit`: s, images/s, % (values are fractions), or none; `peer` is whom it is against."""
    function, ratio_unit = KINDS[kind]
    if len(ours) != len(peers):
        ours_only, against = [statistics.median(ours)], [statistics.median(peers) if peers else math.nan]
    else:
        ours_only, against = list(ours), list(peers)
    ratio = spread(list(map(function, ours_only, against)))
    judged = goal and {"text": goal.text or f"{goal.sign} {quantity(goal.number, ratio_unit)}", "number": goal.number,
                       "met": bool(COMPARED[goal.sign](ratio["median"], goal.number))}
    return {"what": what, "peer": peer, "ours": spread(ours), "peers": spread(peers) if peers else None, "unit": unit,
            "kind": kind, "ratio": ratio, "ratio_unit": ratio_unit, "goal": judged, "runs": len(ours), "note": note}


def skipped(what: str, peer: str, reason: str) -> dict[str, Any]:
    return {"what": what, "peer": peer, "skipped": reason}


def interleaved(runs: int, *contenders: Callable[[], float], warm_up: int = 1) -> list[list[float]]:
    """What each returned in `runs` rounds in which they take turns, after `warm_up` rounds that don't count.

    Contenders that run in processes of their own have nothing to warm up.
    """
    rounds = [[contender() for contender in contenders] for _ in range(warm_up + runs)]
    return [list(series) for series in zip(*rounds[warm_up:], strict=True)]


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device has done it."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------------ other processes


def die_with_parent() -> Callable[[], Any] | None:
    """To be called between fork and exec: on Linux SIGTERM will come when the parent ends, however it does."""
    if sys.platform != "linux":
        return None
    return functools.partial(ctypes.CDLL(None).prctl, 1, signal.SIGTERM, 0, 0, 0)  # 1: PR_SET_PDEATHSIG


def end(process: subprocess.Popen) -> None:
    """Ends it and its group: torchrun stops its workers, which are groups of their own, if it is asked first."""
    for signum, patience in ((signal.SIGTERM, 20), (getattr(signal, "SIGKILL", signal.SIGTERM), 20)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signum) if hasattr(os, "killpg") else process.terminate()
                process.wait(patience)


@contextlib.contextmanager
def started(command: Sequence[str | Path], setting: Setting, environment: dict[str, str] | None = None
            ) -> Iterator[subprocess.Popen]:
    """A process, which has ended afterwards, whatever happens."""
    with subprocess.Popen(
        [str(part) for part in command], cwd=setting.folder, env={**os.environ, **(environment or {})}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=die_with_parent()) as process:
        try:
            yield process
        finally:
            end(process)


def output_of(process: subprocess.Popen, setting: Setting, codes: Iterable[int] = (0,)) -> str:
    """Its stdout, when it is done. RuntimeError if it takes too long, or ends by another exit code than `codes`."""
    limit, name = setting.few(3 * 3600, 300), " ".join(process.args[1:4])  # type: ignore[index, arg-type]
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{name} … was not done within {limit} s") from None
    if process.returncode not in codes:
        last = (errors.strip() or out.strip() or "it said nothing").splitlines()[-1]
        raise RuntimeError(f"{name} … ended with code {process.returncode}: {last}")
    return out


def child(command: Sequence[str | Path], setting: Setting, codes: Iterable[int] = (0,),
          environment: dict[str, str] | None = None) -> str:
    """The stdout of a process."""
    with started(command, setting, environment) as process:
        return output_of(process, setting, codes)


def alone(setting: Setting, contender: str, **how: Any) -> list[Any]:
    """What one of the CONTENDERS yields in a process of its own."""
    lines = child([sys.executable, __file__, "--alone", contender, json.dumps(how)], setting).splitlines()
    return [json.loads(line) for line in lines]


def beside(name: str) -> Path:
    """Another script of this project."""
    path = Path(__file__).resolve().with_name(name)
    if not path.is_file():
        raise Skip(f"needs {name} beside this script")
    return path


@contextlib.contextmanager
def training(setting: Setting, *arguments: Any, launcher: Sequence[str] = (), script: str = "train_mnist.py",
             device: str = "", environment: dict[str, str] | None = None) -> Iterator[Callable[[], dict[str, Any]]]:
    """A run that is started in a fresh process; what is given waits for its result.

    With the result are its seconds in all, and the images/s of each epoch.
    """
    output = Path(tempfile.mkdtemp(dir=setting.folder)) / "run"
    command = [sys.executable, *launcher, beside(script), "--data-dir", setting.data_dir, "--output", output,
               "--device", device or setting.device, *arguments]
    began = time.perf_counter()
    with started(command, setting, environment) as process:

        def result() -> dict[str, Any]:
            table = output_of(process, setting)
            seconds = time.perf_counter() - began
            told = json.loads((output / "run.json").read_text(encoding="utf-8"))["result"]
            rates = re.findall(r"^ +\d+ .*? ([\d,]+) +[\d.]+(?:  best)?$", table, re.MULTILINE)
            return told | {"process_seconds": seconds, "output": output,
                           "epoch_rates": [float(rate.replace(",", "")) for rate in rates]}

        yield result


def train(setting: Setting, *arguments: Any) -> dict[str, Any]:
    """The result of a run of train_mnist in a fresh process."""
    with training(setting, *arguments) as result:
        return result()


# ----------------------------------------------------------------------------------------------------------------- data


def has_mnist(setting: Setting) -> bool:
    return is_present("mnist", setting.data_dir)


def images(setting: Setting) -> tuple[Tensor, Tensor]:
    """MNIST's training images and labels, or as many digits drawn."""
    if "images" not in setting.cache:
        if has_mnist(setting):
            full = tb.load_images("mnist", setting.data_dir, download=False)
            setting.cache["images"] = full.inputs, full.targets
        else:
            setting.cache["images"] = tb.draw_digits(setting.few(60_000, 6_000))
    return setting.cache["images"]


def tensor_loader(setting: Setting, batch_size: int = 128, augment: bool = True, batches: int | None = None) -> Any:
    return tb.TensorLoader(
        *images(setting), batch_size, shuffle=True, device=setting.device, mean=MEAN, std=STD, drop_last=True,
        augment=tb.RandomAffine() if augment else None, limit_batches=batches)


def write_idx(path: Path, values: Tensor) -> None:
    """The format of MNIST's files: magic number (type 8: uint8; dimensions), sizes, values."""
    header = struct.pack(f">{values.dim() + 1}I", 0x0800 + values.dim(), *values.shape)
    path.write_bytes(header + values.to(torch.uint8).contiguous().numpy().tobytes())


def idx_folder(setting: Setting) -> Path:
    """The same images as torchvision's MNIST class reads them, from a folder of this run."""
    root = setting.folder / "idx"
    if not root.exists():
        raw = root / "MNIST" / "raw"
        raw.mkdir(parents=True)
        if has_mnist(setting):
            test = tb.load_images("mnist", setting.data_dir, train=False, download=False)
            parts = {"train": images(setting), "t10k": (test.inputs, test.targets)}
        else:
            parts = {"train": images(setting), "t10k": tb.draw_digits(1000, seed=1)}
        for name, (inputs, labels) in parts.items():
            write_idx(raw / f"{name}-images-idx3-ubyte", inputs[:, 0])
            write_idx(raw / f"{name}-labels-idx1-ubyte", labels)
    return root


def torchvision_mnist(root: Path, train: bool = True, augment: bool = False) -> Any:
    """torchvision's own class, with the transforms that its examples use."""
    torchvision = import_torchvision()
    from torchvision import transforms

    shake = [transforms.RandomAffine(10, translate=(0.1, 0.1))] if augment else []
    return torchvision.datasets.MNIST(str(root), train, transforms.Compose(
        [*shake, transforms.ToTensor(), transforms.Normalize(MEAN, STD)]), download=False)


# -------------------------------------------------------------------------------------- the sections: import and loader


def import_time(setting: Setting) -> Iterator[dict[str, Any]]:
    """Fresh processes that import torch, then the package; both times begin at the same moment.

    So what varies between processes, ten times what is looked for, is in both. The package is a copy, which may write
    its bytecode: where PYTHONDONTWRITEBYTECODE is set it would be compiled in each process, unlike an installed torch.
    """
    home = setting.folder / "imported"
    shutil.copytree(Path(tb.__file__).parent, home / "torchbasics", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(home), os.environ.get("PYTHONPATH")))),
                   "PYTHONDONTWRITEBYTECODE": ""}
    code = ("import time; began = time.perf_counter(); import torch; alone = time.perf_counter() - began; "
            "import torchbasics; print(time.perf_counter() - began, alone)")

    def importing() -> list[float]:
        said = child([sys.executable, "-c", code], setting, environment=environment)
        return [float(seconds) for seconds in said.split()]

    importing()  # to warm up: it reads the files, and writes the bytecode
    ours, peers = zip(*(importing() for _ in range(setting.few(max(setting.runs, 21), 2))), strict=True)
    yield row("import torchbasics", "import torch", "seconds more", "s", ours, peers, Goal("≤", 0.05))


def loading(loader: Any, device: torch.device, batches: int, passed_over: int = 0) -> float:
    """Images a second over `batches` batches, which then lie on `device`, after those `passed_over`."""
    iterator = itertools.islice(iter(loader), passed_over + batches)
    for _ in itertools.islice(iterator, passed_over):
        pass
    counts: list[int] = []
    seconds = timed(lambda: counts.extend(len(targets) for _, targets in iterator), device)
    return sum(counts) / seconds


def loader(setting: Setting) -> Iterator[dict[str, Any]]:
    """TensorLoader against torchvision's MNIST class in a DataLoader, PIL transforms and all."""
    root = idx_folder(setting)
    for augment, goal in ((True, 20), (False, 80)):
        ours = tensor_loader(setting, augment=augment, batches=setting.few(10_000, 20))
        for workers in (0, 2):
            peer = torch.utils.data.DataLoader(
                torchvision_mnist(root, augment=augment), 128, shuffle=True, num_workers=workers)
            # starting workers counts for nothing: the clock begins when the first batch is there
            rates, others = interleaved(
                setting.few(setting.runs, 1), functools.partial(loading, ours, setting.device, len(ours)),
                functools.partial(loading, peer, torch.device("cpu"), setting.few(120, 10), min(workers, 1)))
            yield row(f"{'augmented' if augment else 'plain'} images, batches of 128",
                      f"torchvision MNIST, PIL, DataLoader with {workers} workers", "the rate", "images/s",
                      rates, others, Goal("≥", goal))


# --------------------------------------------------------------------------------------------------- the sections: loop


class Job(NamedTuple):
    """What every loop gets, equal for all."""

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Any
    device: torch.device
    precision: str
    memory_format: torch.memory_format


def make_job(setting: Setting, tiny: bool, batches: int) -> Job:
    """MNISTNet in train_mnist's precision and layout, or a small MLP in fp32, whose step is mostly calls."""
    tb.set_seed(0)
    model = (tb.SimpleNet() if tiny else tb.MNISTNet()).to(setting.device)
    layout = torch.preserve_format if tiny else torch.channels_last
    model.to(memory_format=layout)  # type: ignore[call-overload]
    batches_of = tensor_loader(setting, 64 if tiny else 128, augment=not tiny, batches=batches)
    return Job(model, nn.CrossEntropyLoss(), tb.make_optimizer("adamw", model.parameters(), 1e-3, 1e-4), batches_of,
               setting.device, "fp32" if tiny else setting.precision, layout)


def by_hand(job: Job, backward: Callable[[Tensor], Any] = Tensor.backward) -> None:
    """An epoch of the loop that everybody writes; nothing is logged."""
    half = job.precision != "fp32"
    job.model.train()
    for inputs, targets in job.loader:
        inputs, targets = inputs.to(job.device, memory_format=job.memory_format), targets.to(job.device)
        job.optimizer.zero_grad()
        with autocast(job.device, job.precision):
            outputs = job.model(inputs)
        backward(job.criterion(outputs.float() if half else outputs, targets))
        job.optimizer.step()


def by_trainer(job: Job, **more: Any) -> Callable[[], Any]:
    trainer = tb.Trainer(job.model, job.criterion, job.optimizer, job.device, precision=job.precision,
                         channels_last=job.memory_format == torch.channels_last, **more)
    return lambda: trainer.fit(job.loader, None, 1, verbose=False)


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

    engine = create_supervised_trainer(job.model, job.optimizer, job.criterion, device=job.device)
    return lambda: engine.run(job.loader, max_epochs=1)


def by_lightning(job: Job) -> Callable[[], float]:
    """Returns seconds by itself: setting up a fit, hundreds of milliseconds, is left out."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def training_step(self, batch: Any, _: int) -> Tensor:
            return job.criterion(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return job.optimizer

        def on_train_epoch_start(self) -> None:
            synchronize(job.device)
            self.began = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            synchronize(job.device)
            self.seconds = time.perf_counter() - self.began

    def epoch() -> float:
        module = Module()
        lightning.Trainer(
            accelerator=job.device.type, devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False).fit(module, job.loader)
        return module.seconds

    return epoch


PEERS: dict[str, tuple[str, str, Callable[[Job], Callable[[], Any]]]] = {  # module, package, loop
    "Fabric": ("lightning", "lightning", by_fabric),
    "Accelerate": ("accelerate", "accelerate", by_accelerate),
    "Ignite": ("ignite", "pytorch-ignite", by_ignite),
    "Lightning Trainer": ("lightning", "lightning", by_lightning),
}


def per_step(epoch: Callable[[], Any], job: Job) -> Callable[[], float]:
    """Seconds of a step, from an epoch that is timed here, or that times itself."""
    def measure() -> float:
        own: list[Any] = []
        seconds = timed(lambda: own.append(epoch()), job.device)
        return (own[0] if isinstance(own[0], float) else seconds) / len(job.loader)

    return measure


def loop(setting: Setting) -> Iterator[dict[str, Any]]:
    """Trainer.fit against a hand-written loop over the same batches, then against others' trainers."""
    for tiny, steps, kind, goal in ((False, setting.few(20, 2), "as long", Goal("≤", 1.01)),
                                    (True, setting.few(400, 20), "seconds more", Goal("≤", 10e-6))):
        job = make_job(setting, tiny, steps)  # one for both: two equal models differ by percents, by where they lie
        seconds, others = interleaved(setting.pairs, per_step(by_trainer(job), job),
                                      per_step(functools.partial(by_hand, job), job))
        yield row(f"a step of {'SimpleNet, 64 images, fp32' if tiny else 'MNISTNet, 128 images'}",
                  "hand-written loop", kind, "s", seconds, others, goal)
    for name, (module, package, make) in PEERS.items():
        what = "a step of SimpleNet, 64 images, fp32"
        if importlib.util.find_spec(module) is None:
            yield skipped(what, name, f"not installed: pip install {package}")
            continue
        with quiet():
            job = make_job(setting, True, steps)
            seconds, others = interleaved(setting.pairs, per_step(by_trainer(job), job), per_step(make(job), job))
        yield row(what, f"{name} {importlib.metadata.version(package)}", "as fast", "s", seconds, others,
                  Goal("≥", 1))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Other packages' advice goes nowhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# ------------------------------------------------------------------------------------------ the sections: step, monitor


def products(model: nn.Module, inputs: Tensor, precision: str) -> Callable[[], None]:
    """Does the convolutions and matrix products of one step alone, each at its shape, forward and backward."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    handles = [layer.register_forward_hook(lambda layer, x, out: seen.append((layer, x[0], out)))
               for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
    work = []
    for number, (layer, x, out) in enumerate(seen):
        layer, x = copy.deepcopy(layer).to(dtype), x.to(dtype).requires_grad_(number > 0)  # the images need no gradient
        work.append((layer, x, torch.randn_like(out, dtype=dtype)))

    def once() -> None:
        for layer, x, gradient in work:
            layer(x).backward(gradient)
            layer.zero_grad()
            x.grad = None

    return once


def seconds_of_a_step(whose: str, steps: int, repeats: int, data_dir: str, device: str, quick: bool) -> Iterator[float]:
    """A step of MNISTNet over batches that are already drawn, after one round to warm up.

    `ours` as train_mnist steps, `plain` as a newcomer does, or only the `products` of ours.
    """
    place = torch.device(device)
    setting = Setting(quick, runs=1, long_runs=1, data_dir=Path(data_dir), device=place,
                      precision=tb.pick_precision("auto", place), folder=Path(tempfile.gettempdir()))
    job = make_job(setting, tiny=False, batches=steps)
    job = job._replace(loader=list(job.loader))
    if whose != "plain":
        tb.cache_cpu_memory()
    if whose == "ours":
        schedule = tb.make_schedule("onecycle", job.optimizer, 100_000)
        work = by_trainer(job, scheduler=schedule)
    elif whose == "plain":
        plain = tb.MNISTNet().to(place)
        job = job._replace(model=plain, optimizer=torch.optim.AdamW(plain.parameters(), 1e-3, weight_decay=1e-4),
                           precision="fp32", memory_format=torch.contiguous_format)
        work = functools.partial(by_hand, job)
    else:
        once = products(job.model, job.loader[0][0].contiguous(memory_format=job.memory_format), job.precision)
        work = lambda: [once() for _ in range(steps)]  # noqa: E731
    measure = per_step(work, job)
    measure()
    for _ in range(repeats):
        yield measure()


def step(setting: Setting) -> Iterator[dict[str, Any]]:
    """train_mnist's precision, layout and optimizer against a newcomer's, and against the arithmetic alone.

    Each in processes of its own: `cache_cpu_memory`, which is part of ours, changes all of a process.
    """
    how = {"steps": setting.few(20, 2), "repeats": setting.few(5, 1), "data_dir": str(setting.data_dir),
           "device": str(setting.device), "quick": setting.quick}

    def one(whose: str) -> float:
        return statistics.median(alone(setting, "step", whose=whose, **how))

    contenders = (functools.partial(one, whose) for whose in ("ours", "plain", "products"))
    ours, peers, arithmetic = interleaved(setting.few(setting.runs, 1), *contenders, warm_up=0)
    what = f"a step of MNISTNet, 128 images, {setting.precision}, channels_last, fused AdamW, cache_cpu_memory"
    yield row(what, "plain eager fp32", "as fast", "s", ours, peers, Goal("≥", 2.5))
    yield row(f"{what}: rate", "its convolutions and products alone", "reached", "s", ours, arithmetic,
              Goal("≥", 0.7))


def monitor(setting: Setting) -> Iterator[dict[str, Any]]:
    """GradientMonitor as a call-back, which reports at every tenth step."""
    job = make_job(setting, False, setting.few(20, 10))  # one for both, as in `loop`
    callback = tb.GradientMonitor(job.model, every=10, verbose=False)
    train_watched = by_trainer(job, on_step_end=(callback,))

    def watched() -> None:
        train_watched()
        callback.detach()  # from the optimizer, which is the other loop's too

    ours, peers = interleaved(setting.pairs, per_step(watched, job), per_step(by_trainer(job), job))
    yield row("a step of MNISTNet with GradientMonitor every 10 steps", "without it", "as long", "s", ours, peers,
              Goal("≤", 1.02))


# ------------------------------------------------------------------------------------------ the sections: run, speedrun


def classic_net() -> nn.Sequential:
    """The network of the classic MNIST example; log-probabilities (B, 10) of images (B, 1, 28, 28)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(),  # (B, 64, 24, 24)
        nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten(),  # (B, 9216)
        nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10), nn.LogSoftmax(1))


def classic_example(root: str, epochs: int = 14, stop_at: float | None = None, *, device: str = "cpu", seed: int = 1,
                    limit: int | None = None, began: float | None = None) -> Iterator[dict[str, float]]:
    """Trains it; after each epoch its number, test accuracy, seconds of training so far, and in all since `began`.

    Adadelta at rate 1, times 0.7 each epoch, batches of 64, single images through PIL in a DataLoader; written from
    the description of the example, and shuffled, as that is on accelerators only. Ends when `stop_at` is reached.
    """
    began = time.time() if began is None else began
    torch.manual_seed(seed)
    model = classic_net().to(device)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
    train, test = (torch.utils.data.DataLoader(torchvision_mnist(Path(root), part), size, shuffle=part)
                   for part, size in ((True, 64), (False, 1000)))
    seconds = 0.0
    for epoch in range(1, epochs + 1):
        seconds += timed(functools.partial(classic_epoch, model, optimizer, train, limit), torch.device(device))
        schedule.step()
        accuracy = classic_accuracy(model, test, limit)
        yield {"epoch": epoch, "accuracy": accuracy, "train_seconds": seconds, "process_seconds": time.time() - began}
        if stop_at is not None and accuracy >= stop_at:
            return


def classic_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, train: Iterable, limit: int | None) -> None:
    device = next(model.parameters()).device
    model.train()
    for inputs, targets in itertools.islice(train, limit):
        optimizer.zero_grad()
        nn.functional.nll_loss(model(inputs.to(device)), targets.to(device)).backward()
        optimizer.step()


@torch.no_grad()
def classic_accuracy(model: nn.Module, test: Iterable, limit: int | None) -> float:
    device = next(model.parameters()).device
    model.eval()
    right = [model(inputs.to(device)).argmax(1).cpu() == targets for inputs, targets in itertools.islice(test, limit)]
    return float(torch.cat(right).float().mean())


def classic_runs(setting: Setting, stop_at: float | None = None) -> list[list[dict[str, float]]]:
    """The epochs of each long run, in fresh processes; a whole run serves `speedrun` too, and is not made twice."""
    if "classic" not in setting.cache:
        runs = []
        for seed in range(1, setting.few(setting.long_runs, 1) + 1):
            how = {"root": str(idx_folder(setting)), "epochs": setting.few(14, 1), "device": str(setting.device),
                   "stop_at": stop_at, "seed": seed, "limit": setting.few(0, 5) or None, "began": time.time()}
            runs.append(alone(setting, "classic", **how))
        setting.cache["classic"] = runs
    return setting.cache["classic"]


def need_mnist(setting: Setting) -> None:
    if not has_mnist(setting):
        raise Skip(NO_MNIST.format(setting.data_dir))


def recipe(setting: Setting, *arguments: Any) -> dict[str, Any]:
    """train_mnist on MNIST."""
    quick = ("--epochs", 1, "--limit-batches", 5, "--val-size", 100) if setting.quick else ()
    return train(setting, "--dataset", "mnist", *quick, *arguments)


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """The default recipe against the classic example, each from start to end in a fresh process."""
    need_mnist(setting)
    ends = [epochs[-1] for epochs in classic_runs(setting)]
    results = [recipe(setting, "--seed", seed) for seed in range(1, len(ends) + 1)]
    peer = f"the classic example, {ends[0]['epoch']} epoch{'s' * (ends[0]['epoch'] > 1)}"
    yield row("default recipe: test accuracy", peer, "points more", "%", [one["test_accuracy"] for one in results],
              [epoch["accuracy"] for epoch in ends], Goal(">", 0, "higher"),
              f"{results[0]['parameters']:,} and 1,199,882 parameters; ours chooses its epoch without the test images")
    yield row("default recipe: training, validation and saving", f"{peer}, without its tests", "as fast", "s",
              [result["train_seconds"] for result in results], [epoch["train_seconds"] for epoch in ends],
              Goal("≥", 3))


def speedrun(setting: Setting) -> Iterator[dict[str, Any]]:
    """`--preset speedrun` against the classic example up to its first epoch with 99%."""
    need_mnist(setting)
    reached = [next((epoch for epoch in epochs if epoch["accuracy"] >= 0.99), epochs[-1])
               for epochs in classic_runs(setting, stop_at=0.99)]
    peer = f"the classic example to {min(epoch['accuracy'] for epoch in reached):.2%}"
    results = [recipe(setting, "--preset", "speedrun", "--seed", seed)
               for seed in range(1, setting.few(setting.runs, 1) + 1)]
    accuracies, ours, whole = ([result[key] for result in results]
                               for key in ("test_accuracy", "train_seconds", "process_seconds"))
    mean = statistics.fmean(accuracies)
    peers, whole_peers = ([epoch[key] for epoch in reached] for key in ("train_seconds", "process_seconds"))
    what = f"--preset speedrun, {mean:.2%} on average"
    yield row(f"{what}: training", peer, "as fast", "s", ours, peers, Goal("≥", 140))
    yield row(f"{what}: training", "", "seconds", "s", ours, goal=Goal("≤", 1.5))
    yield row(f"{what}: whole process", peer, "as fast", "s", whole, whole_peers, Goal("≥", 40))
    yield row("--preset speedrun: mean test accuracy", "", "accuracy", "%", [mean], goal=Goal("≥", 0.99),
              note=f"{len(accuracies)} seeds, {min(accuracies):.2%} to {max(accuracies):.2%}")


# ------------------------------------------------------------------------------ the sections: save, ddp, inference, gpu


def save(setting: Setting) -> Iterator[dict[str, Any]]:
    """A durable save with its record against torch.save alone, of MNISTNet and AdamW, into one folder."""
    job = make_job(setting, False, setting.few(10, 1))
    trainer = by_trainer(job)
    seconds = interleaved(1, per_step(trainer, job))[0][0]
    state = {"epoch": 1, "model_state_dict": job.model.state_dict(), "optimizer_state_dict": job.optimizer.state_dict(),
             "loss": 0.0}
    ours, peers = interleaved(
        setting.few(2 * setting.runs, 2),
        lambda: timed(lambda: tb.save_checkpoint(state, setting.folder / "ours.pt"), setting.device),
        lambda: timed(lambda: torch.save(state, setting.folder / "plain.pt"), setting.device))
    goal = Goal("≤", 1.5 + 0.05 / statistics.median(peers), "≤ 1.5× + 50 ms")
    yield row("save_checkpoint: fsync, SHA-256, rename", "torch.save", "as long", "s", ours, peers, goal,
              f"{(setting.folder / 'ours.pt').stat().st_size / 1e6:.1f} MB, in {tempfile.gettempdir()}")
    yield row("two saves, as after an epoch", f"the epoch, 430 steps of {seconds * 1e3:.0f} ms", "of it", "s",
              [2 * value for value in ours], [430 * seconds])


def ddp(setting: Setting) -> Iterator[dict[str, Any]]:
    """Processes of one thread each under torchrun; images a second of their second epoch, in which nothing starts."""
    if not torch.distributed.is_available():
        raise Skip("torch.distributed is not available in this build of torch")
    arguments = ("--dataset", "mnist" if has_mnist(setting) else "digits", "--model", "smallvgg", "--epochs", 2,
                 "--val-size", 1000)

    def started_with(processes: int, images: int) -> contextlib.AbstractContextManager[Callable[[], dict[str, Any]]]:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
        return training(
            setting, *arguments, "--batch-size", images, "--limit-batches", setting.few(19_200, 768) // images,
            device="cpu", environment={"OMP_NUM_THREADS": "1"}, launcher=launcher if processes else (),
            script="train_ddp.py" if processes else "train_mnist.py")

    def rate(processes: int, images: int) -> float:
        with started_with(processes, images) as result:
            return result()["epoch_rates"][-1]

    def side_by_side(images: int) -> float:
        """Two trainings of half batches at once that exchange nothing: what the machine itself allows."""
        with started_with(0, images // 2) as one, started_with(0, images // 2) as other:
            return one()["epoch_rates"][-1] + other()["epoch_rates"][-1]

    sizes = (128, 512)
    jobs = [functools.partial(rate, *job) for job in ((2, 128), (1, 128), (0, 128), (2, 512), (1, 512))]
    two, one, none, larger_two, larger_one, *apart = interleaved(
        setting.few(setting.runs, 1), *jobs, *(functools.partial(side_by_side, size) for size in sizes),
        warm_up=0)
    for images, ours, peers, free in zip(sizes, (two, larger_two), (one, larger_one), apart, strict=True):
        what = f"SmallVGG, 2 processes of one thread, {images} images a batch"
        yield row(what, "1 process of one thread", "the rate", "images/s", ours, peers, Goal("≥", 1.8),
                  "they exchange the gradients at each step")
        yield row(what, "2 trainings of half batches side by side", "the rate", "images/s", ours, free,
                  note=f"these exchange nothing, and are {statistics.median(map(operator.truediv, free, peers)):.2f} "
                  "times one process: so much this machine allows")
    yield row("SmallVGG, 1 process under torchrun", "plain train_mnist", "as long", "s", [1 / value for value in one],
              [1 / value for value in none], Goal("≤", 1.03), "seconds an image; one thread")


def inference(setting: Setting) -> Iterator[dict[str, Any]]:
    """What scripts/export.py measures of every format, each in a fresh process, on a network trained for this."""
    script = beside("export.py")
    trained = train(setting, "--dataset", "mnist" if has_mnist(setting) else "digits", "--model", "smallvgg",
                    "--epochs", 1, "--quiet", "--limit-batches", setting.few(150, 5), "--val-size", 1000)
    formats = ("pt2", "torchscript") if setting.quick else ("all",)
    command = [sys.executable, script, "--checkpoint", trained["output"] / "checkpoints" / "best.pt", "--benchmark",
               "--json", "--output", setting.folder / "exported",
               *itertools.chain.from_iterable(("--format", name) for name in formats)]
    eager, *others = json.loads(child(command, setting, codes=(0, 1, 3)))["rows"]
    for other, size in itertools.product(others, ("1", "64")):
        what, peer = f"SmallVGG as {other['format']}, batch {size}", f"eager, batch {size}"
        if other["result"] != "ok":
            yield skipped(what, peer, other["result"].removeprefix("SKIP: "))
            continue
        ours, peers = ([ms / 1e3 for ms in each["latency_ms"][size]] for each in (other, eager))
        found = row(what, peer, "as fast", "s", ours[:1], peers[:1], note="p50 (p50 to p95) of one process each")
        found["ours"]["max"], found["peers"]["max"] = ours[1], peers[1]
        yield found


def gpu(setting: Setting) -> Iterator[dict[str, Any]]:
    """Where CUDA is: the whole step as one graph against the eager step, and no waiting for the device."""
    if setting.device.type != "cuda":
        raise Skip("needs CUDA" + ("; it is here: leave out --device" if torch.cuda.is_available() else ""))
    waits = host_waits(setting)
    yield row("MNISTNet: waits for the device in 10 steps", "", "count", "", [float(bool(waits))], goal=Goal("≤", 0),
              note=waits)
    job = make_job(setting, tiny=False, batches=setting.few(400, 20))
    graph, eager = interleaved(setting.pairs, per_step(by_trainer(job, cuda_graph="on"), job),
                               per_step(by_trainer(job), job))
    yield row("MNISTNet, 128 images, step as a CUDA graph", "eager step", "as fast", "s", graph, eager, Goal("≥", 6),
              "with the loader's work")
    arguments = ("--dataset", "mnist" if has_mnist(setting) else "digits",
                 *(("--epochs", 2, "--limit-batches", 20) if setting.quick else ()))
    whole = [train(setting, *arguments, "--cuda-graph", "on", "--seed", seed)
             for seed in range(1, setting.few(setting.runs, 1) + 1)]
    yield row("default recipe, 15 augmented epochs: training", "", "seconds", "s",
              [one["train_seconds"] for one in whole], goal=Goal("≤", 5))
    if has_mnist(setting):
        fast = [recipe(setting, "--preset", "speedrun", "--cuda-graph", "on", "--seed", seed)
                for seed in range(1, setting.few(setting.runs, 1) + 1)]
        mean = statistics.fmean(one["test_accuracy"] for one in fast)
        yield row(f"--preset speedrun, {mean:.2%} on average: training", "", "seconds", "s",
                  [one["train_seconds"] for one in fast], goal=Goal("≤", 0.3), note="with its warm-up and capture")
        yield row("--preset speedrun: mean test accuracy", "", "accuracy", "%", [mean], goal=Goal("≥", 0.99),
                  note=f"{len(fast)} seeds")


def host_waits(setting: Setting) -> str:
    """What made the host wait for the device in ten steps in the midst of an epoch; empty if nothing did."""
    job = make_job(setting, tiny=False, batches=20)

    def watch(trainer: tb.Trainer) -> None:
        if trainer.step in (5, 15):
            torch.cuda.set_sync_debug_mode("error" if trainer.step == 5 else "default")

    try:
        by_trainer(job, cuda_graph="on" if setting.device.type == "cuda" else "off", on_step_end=(watch,),
                   log_every=1000, clip_norm=1.0, averages=tb.averaged_copy(job.model, 0.999),
                   scheduler=tb.make_schedule("onecycle", job.optimizer, 1000))()
    except RuntimeError as error:
        if "synchron" not in str(error):
            raise
        return str(error).strip().splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


SECTIONS: dict[str, Callable[[Setting], Iterator[dict[str, Any]]]] = {
    "import": import_time, "loader": loader, "loop": loop, "step": step, "run": run, "speedrun": speedrun, "save": save,
    "monitor": monitor, "ddp": ddp, "inference": inference, "gpu": gpu,
}
# What is measured in processes of its own; generators of what JSON can hold.
CONTENDERS: dict[str, Callable[..., Iterable[Any]]] = {"classic": classic_example, "step": seconds_of_a_step}


# ----------------------------------------------------------------------------------------------- measuring, and showing


def machine(setting: Setting) -> dict[str, Any]:
    """What the figures depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = importlib.util.find_spec("torchvision")
    versions = {"torch": torch.__version__,
                "torchvision": importlib.metadata.version("torchvision") if found else "absent",
                "Python": platform.python_version(), "torchbasics": tb.__version__}
    return {"cpu": device_name(torch.device("cpu")).rpartition(", ")[0], "device": str(setting.device),
            "device_name": device_name(setting.device), "cores": cores, "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, "system": platform.platform(),
            "versions": versions,
            "native_bf16": bf16_is_native(setting.device), "precision": setting.precision,
            "data": "MNIST" if has_mnist(setting) else "drawn digits",
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}


def machine_lines(report: dict[str, Any]) -> list[str]:
    here = report["machine"]
    names = dict.fromkeys([here["cpu"], here["device_name"]] if here["device"] != "cpu" else [here["cpu"]])
    lines = [f"{' and '.join(names)}, {here['cores']} cores, {here['threads']} threads, load {here['load']:.2f} at the "
             f"start; {', '.join(f'{name} {version}' for name, version in here['versions'].items())}; bf16 "
             f"{'native' if here['native_bf16'] else 'emulated'}, {here['precision']} used; {here['data']}; "
             f"{here['started'][:10]}"]
    lines += [QUICK] if report["quick"] else []
    lines += [EMULATED] if not here["native_bf16"] else []
    busy = "NOTICE: something else was running when this began: take the figures from a quiet machine"
    return lines + ([busy] if here["load"] > 0.3 * here["cores"] else [])


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """One section; what goes wrong in it stops no other."""
    found: dict[str, Any] = {"section": name, "result": "ok", "rows": []}
    began = time.perf_counter()
    try:
        for each in SECTIONS[name](setting):
            found["rows"].append({"section": name, **each})
    except (Skip, options.MissingExtra) as reason:
        found |= {"result": f"SKIP: {reason}", "missing_package": isinstance(reason, options.MissingExtra)}
    except Exception as error:
        if setting.debug:
            raise
        found["result"] = f"FAILED: {options.one_line(error)}"
    return found | {"seconds": time.perf_counter() - began}


def quantity(value: float, unit: str) -> str:
    """A value as people write it: three digits, seconds as s, ms or µs, fractions as percentages."""
    if unit == "+s":
        return f"{'-' if value < 0 else '+'}{quantity(abs(value), 's')}"
    if unit in ("%", "points"):
        return f"{value:.2%}" if unit == "%" else f"{100 * value:+.2f} points"
    factor, name = 1.0, f" {unit}" if unit not in ("", "×") else unit
    if unit == "s" and value < 1:
        factor, name = (1e3, " ms") if value >= 1e-3 else (1e6, " µs")
    digits = 0 if value * factor >= 100 else 1 if value * factor >= 10 else 2
    text = f"{value * factor:,.{digits}f}"
    return (text.rstrip("0").rstrip(".") if digits else text) + name


def ranged(values: dict[str, float], unit: str) -> str:
    low, middle, high = (quantity(values[key], unit) for key in ("min", "median", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"


def cells(found: dict[str, Any]) -> list[str]:
    """The words of one row: what, ours, peer, ratio, goal, runs."""
    if "skipped" in found:
        return [found["what"], "", found["peer"], f"SKIP: {found['skipped']}", "", ""]
    goal, peers = found["goal"], found["peers"]
    kind = f" {found['kind']}" if found["ratio_unit"] in ("×", "%") else ""
    return [found["what"], ranged(found["ours"], found["unit"]),
            f"{found['peer']}: {ranged(peers, found['unit'])}" if peers else "",
            ranged(found["ratio"], found["ratio_unit"]) + kind if peers else "",
            f"{goal['text']}: {'met' if goal['met'] else 'not met'}" if goal else "", str(found["runs"])]


def section_lines(found: dict[str, Any]) -> list[str]:
    """A section for the terminal: its rows, or why there are none."""
    lines = [f"\n{found['section']} ({found['seconds']:.0f} s)"]
    for each in found["rows"]:
        what, ours, peer, ratio, goal, _ = cells(each)
        lines.append(f"  {what}: {ours}" if ours else f"  {what}")
        lines += [f"      against {peer}"] if peer else []
        lines.append("      " + "; ".join(filter(None, (ratio, goal and f"goal {goal}", each.get("note", "")))))
    return lines + ([f"  {found['result']}"] if found["result"] != "ok" else [])


def markdown(report: dict[str, Any]) -> str:
    """README's table."""
    lines = [". ".join(machine_lines(report)) + ". Medians (lowest to highest).", "",
             "| Section | What | Ours | Peer | Ratio | Goal | Runs |", "|---|---|---|---|---|---|---|"]
    for found in report["sections"]:
        rows = [cells(each) for each in found["rows"]]
        rows += [["", "", "", found["result"], "", ""]] if found["result"] != "ok" else []
        lines += ["| " + " | ".join([f"`{found['section']}`", *(text.replace("|", "\\|") for text in texts)]) + " |"
                  for texts in rows]
    return "\n".join(lines)


def load_report(path: str) -> dict[str, Any]:
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        good = (report["format"], report["schema"]) == (FORMAT, SCHEMA)
        markdown(report)  # whatever is missing shows here
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError):
        good = False
    if not good:
        raise ValueError(f"--from {path}: not what --json of this version prints; make a new one")
    return report


# --------------------------------------------------------------------------------------------------------- command line


def section_name(text: str) -> str:
    if text not in SECTIONS:
        near = difflib.get_close_matches(text, SECTIONS, 1, 0)[0]
        raise argparse.ArgumentTypeError(f"no section {text!r}, did you mean {near}? there are {', '.join(SECTIONS)}")
    return text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("what").add_argument
    add("--only", action="append", type=section_name, metavar="NAME",
        help=f"{', '.join(SECTIONS)}; may be given several times (default: all)")
    add("--quick", action="store_true", help="all in small, in a few minutes; figures mean little (default: off)")
    add("--runs", type=options.COUNT, default=5, metavar="N",
        help="pairs of runs of each measurement; seeds of speedrun; at least 61 where percents count (default: 5)")
    add("--long-runs", type=options.COUNT, default=1, metavar="N",
        help="whole trainings of each side, minutes each, in run (default: 1)")
    add("--data-dir", default="./data", metavar="DIR", help="where MNIST is; it is not downloaded; without it drawn "
        "digits take its place where that is the same work (default: ./data)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps or xpu (default: auto)")
    add = parser.add_argument_group("result").add_argument
    add("--json", action="store_true", help="one JSON object; times in s, accuracies as fractions (default: a table)")
    add("--markdown", action="store_true", help="README's table (default: one for the terminal)")
    add("--from", dest="source", metavar="FILE", help="show what --json has printed into FILE, measure nothing "
        "(default: measure)")
    add("--debug", action="store_true", help="show tracebacks (default: off)")
    add("--alone", nargs=2, help=argparse.SUPPRESS)  # one of the CONTENDERS, and its arguments as JSON
    args = parser.parse_args(argv)
    if args.json and (args.markdown or args.source):
        parser.error("--json prints what is measured; leave out --markdown and --from")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns 0 done (goals met or not), 1 a section failed, 2 bad input, 3 a named section lacks a package."""
    args = parse_args(argv)
    before = None
    with contextlib.suppress(ValueError):  # not in the main thread
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # children and files first
    try:
        return options.guarded(lambda: show(args), args.debug)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def show(args: argparse.Namespace) -> int:
    """The recipe."""
    if args.alone:
        for found in CONTENDERS[args.alone[0]](**json.loads(args.alone[1])):
            print(json.dumps(found), flush=True)
        return 0
    if args.source:
        report = load_report(args.source)
        lines = machine_lines(report) + [line for each in report["sections"] for line in section_lines(each)]
        print(markdown(report) if args.markdown else "\n".join(lines))
        return 0
    device = tb.pick_device(args.device)
    tb.cache_cpu_memory()  # for both sides of all that is measured in this process
    names = [name for name in SECTIONS if name in (args.only or SECTIONS)]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        setting = Setting(args.quick, args.runs, args.long_runs, Path(args.data_dir).resolve(), device,
                          tb.pick_precision("auto", device), Path(folder), args.debug)
        report = {"format": FORMAT, "schema": SCHEMA, "quick": args.quick, "machine": machine(setting),
                  "arguments": {name: getattr(args, name) for name in ("only", "runs", "long_runs", "data_dir")},
                  "sections": []}
        speak = not (args.json or args.markdown)
        print("\n".join(machine_lines(report)), flush=True) if speak else None
        for name in names:
            say(f"measuring {name}")
            with contextlib.redirect_stdout(sys.stderr):  # what peers have to say is not our result
                report["sections"].append(measure(name, setting))
            say("")
            print("\n".join(section_lines(report["sections"][-1])), flush=True) if speak else None
    if not speak:
        print(json.dumps(report, indent=2) if args.json else markdown(report))
    return judge(report, args)


def judge(report: dict[str, Any], args: argparse.Namespace) -> int:
    """The exit code; what failed is told on stderr too."""
    failed = [each for each in report["sections"] if each["result"].startswith("FAILED")]
    missing = [each for each in report["sections"] if args.only and each.get("missing_package")]
    for each in (*failed, *missing):
        print(f"error: {each['section']}: {each['result'].partition(': ')[2]}", file=sys.stderr)
    return 1 if failed else 3 if missing else 0


def say(what: str) -> None:
    """What is being measured, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
