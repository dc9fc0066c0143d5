"""Two and three processes do what one does: gradients, counts, stops and resumes, against plain loops in this process.

The functions whose first argument is `rank` run in each process of a group (tests/processes.py).
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import shutil
import signal
import tempfile
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from tests.processes import SHARES_MEMORY, in_processes, needs_processes, needs_shared_memory, outcomes
from torchbasics import distributed, parallel
from torchbasics.checkpoint import CheckpointError, CheckpointFolder, load_checkpoint
from torchbasics.data import RandomAffine, TensorLoader
from torchbasics.device import branched_random_state, random_state, set_random_state
from torchbasics.early_stopping import EarlyStopping
from torchbasics.evaluation import evaluate
from torchbasics.interrupts import Interrupted
from torchbasics.models import make_model
from torchbasics.optim import averaged_copy
from torchbasics.trainer import NonFiniteLoss, Trainer

CPU = torch.device("cpu")
WIDTH = 6
THREADS = torch.get_num_threads()


def setUpModule() -> None:
    torch.set_num_threads(1)


def tearDownModule() -> None:
    torch.set_num_threads(THREADS)


# ------------------------------------------------------------------------------------------- what all processes build


def samples(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs (count, WIDTH), whose first column numbers them, and targets of 3 classes."""
    generator = torch.Generator().manual_seed(count)
    inputs = torch.randn(count, WIDTH, generator=generator, dtype=dtype)
    targets = (inputs[:, 1:4] + 0.5 * torch.randn(count, 3, generator=generator, dtype=dtype)).argmax(1)
    inputs[:, 0] = torch.arange(count) / count
    return inputs, targets


def loader_of(count: int, batch_size: int = 6, **options: Any) -> TensorLoader:
    return TensorLoader(*samples(count), batch_size, shuffle=True, seed=3, **options)


def network(norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    middle = nn.Sequential(nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout))
    return nn.Sequential(nn.Linear(WIDTH, 8), middle, nn.Linear(8, 3)).double()


def wrapped(model: nn.Module, strategy: str, **options: Any) -> nn.Module:
    """`model` as it is in one process, else by `strategy`; FSDP before the optimizer is made, DDP before or after."""
    if distributed.world_size() == 1:
        return model
    return parallel.shard(model, CPU) if strategy == "fsdp" else parallel.replicate(model, CPU, **options)


def trainer_of(strategy: str, lr: float = 0.1, norm: bool = False, **options: Any) -> Trainer:
    """SGD with momentum, whose rate sinks at each step."""
    model = wrapped(network(norm), strategy, **({} if "accumulate" in options else {"static": True}))
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, CPU, schedule, scheduler_interval="step", **options)


def whole(tensor: Tensor | None) -> Tensor:
    """The tensor, of which FSDP has a part in each process."""
    assert tensor is not None
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()


def signal_at(step: int, signum: int, wanted: bool = True) -> Callable[[Trainer], None]:
    """A call-back that, if `wanted`, sends this process a signal after `step`."""

    def send(trainer: Trainer) -> None:
        if wanted and trainer.step == step:
            os.kill(os.getpid(), signum)

    return send


def noted_gradients(trainer: Trainer) -> list[list[Tensor]]:
    """A list that gets the gradient of each step."""
    noted: list[list[Tensor]] = []
    parameters = list(trainer.model.parameters())
    trainer.optimizer.register_step_pre_hook(lambda *_: noted.append([whole(p.grad) for p in parameters]))
    return noted


def noted_samples(model: nn.Module, count: int) -> list[list[int]]:
    """A list that gets the numbers of the samples of each training batch."""
    noted: list[list[int]] = []

    def note(module: nn.Module, inputs: tuple) -> None:
        if torch.is_grad_enabled():
            noted.append((inputs[0][:, 0] * count).round().int().tolist())

    model.register_forward_pre_hook(note)
    return noted


class ParallelCase(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def assert_close(self, actual: Any, expected: Any, rtol: float = 1e-9, message: Any = None) -> None:
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol / 100, msg=lambda text: f"{message}: {text}")

    def assert_same(self, actual: Any, expected: Any, message: Any = None) -> None:
        self.assert_close(actual, expected, 0, message)


# ------------------------------------------------------------------------------------------------------- the gradient

WINDOWS = [(n, accumulate, None) for n in (1, 5, 7, 20) for accumulate in (1, 3)] + [(7, 3, 0.05), (20, 1, 0.05)]


def windows(rank: int, strategy: str) -> list[dict[str, Any]]:
    """Two epochs of each of WINDOWS."""
    found = []
    for count, accumulate, clip in WINDOWS:
        trainer = trainer_of(strategy, accumulate=accumulate, clip_norm=clip)
        gradients, numbers = noted_gradients(trainer), noted_samples(trainer.model, count)
        steps: list[tuple[float | None, float]] = []

        def note(trainer: Trainer, steps: list = steps) -> None:
            norm = None if trainer.grad_norm is None else float(whole(trainer.grad_norm))
            steps.append((norm, trainer.optimizer.param_groups[0]["lr"]))

        trainer.on_step_end = (note,)
        history = trainer.fit(loader_of(count), num_epochs=2, verbose=False)
        every = distributed.gather_objects(numbers)
        found.append(
            {
                "gradients": gradients,
                "norms": [norm for norm, _ in steps],
                "rates": [rate for _, rate in steps],
                "weights": [whole(p) for p in trainer.model.parameters()],
                "losses": history["train_loss"],
                "accuracies": history["train_acc"],
                "samples": [list(itertools.chain(*parts)) for parts in zip(*every, strict=True)],
            }
        )
    return found


def plain_windows(count: int, accumulate: int, clip: float | None) -> dict[str, Any]:
    """The same by hand: the gradient of the mean over all samples of a window."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = loader_of(count, rank=0, world_size=1)
    found: dict[str, list] = {name: [] for name in ("gradients", "norms", "rates", "losses", "accuracies", "samples")}
    for _ in range(2):
        batches, total, right = list(loader), 0.0, 0
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            found["samples"] += [(x[:, 0] * count).round().int().tolist() for x, _ in window]
            inputs, targets = (torch.cat(parts) for parts in zip(*window, strict=True))
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = nn.functional.cross_entropy(outputs, targets)
            loss.backward()
            gradient = [whole(p.grad) for p in model.parameters()]
            norm = float(torch.cat([g.flatten() for g in gradient]).norm())
            for p, g in zip(model.parameters(), gradient, strict=True):
                p.grad = g if clip is None else g * min(clip / (norm + 1e-6), 1)
            found["gradients"].append([whole(p.grad) for p in model.parameters()])
            found["norms"].append(None if clip is None else norm)
            optimizer.step()
            schedule.step()
            found["rates"].append(optimizer.param_groups[0]["lr"])
            total += loss.item() * len(targets)
            right += int((outputs.argmax(1) == targets).sum())
        found["losses"].append(total / count)
        found["accuracies"].append(right / count)
    return {**found, "weights": [p.detach() for p in model.parameters()]}


class Gradient(ParallelCase):
    """Of a window it is that of one batch of all its samples, wherever they lie; one step, one clip, one rate."""

    def check(self, found: list[dict[str, Any]], world_size: int) -> None:
        clipped = 0
        for (count, accumulate, clip), result in zip(WINDOWS, found, strict=True):
            expected = plain_windows(count, accumulate, clip)
            for name in ("gradients", "norms", "rates", "weights", "losses"):
                self.assert_close(result[name], expected[name], message=(world_size, count, accumulate, clip, name))
            self.assertEqual(result["accuracies"], expected["accuracies"])
            self.assertEqual(result["samples"], expected["samples"])  # in their order
            clipped += sum(norm is not None and norm > 0.05 for norm in expected["norms"])
        self.assertGreater(clipped, 4)

    def test_one_process(self) -> None:
        self.check(windows(0, "ddp"), 1)

    @needs_processes
    def test_ddp(self) -> None:
        for world_size in (2, 3):
            for found in in_processes(world_size, windows, "ddp"):
                self.check(found, world_size)

    @needs_processes
    def test_fsdp(self) -> None:
        for world_size in (2, 3):
            for found in in_processes(world_size, windows, "fsdp"):
                self.check(found, world_size)


def exchanges(rank: int) -> dict[str, Any]:
    """How often gradients are sent in an epoch of 7 batches in windows of 3."""
    trainer = trainer_of("ddp", accumulate=3)
    assert isinstance(trainer.model, DistributedDataParallel)
    sent = []

    def count(state: Any, bucket: dist.GradBucket) -> Any:
        sent.append(trainer.step)
        work = dist.all_reduce(bucket.buffer().div_(distributed.world_size()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    count.__annotations__ = {}  # DDP would look at them, as classes
    trainer.model.register_comm_hook(None, count)
    trainer.train_one_epoch(loader_of(40))

    sharded: Any = trainer_of("fsdp", accumulate=3)
    with mock.patch.object(
        sharded.model, "set_requires_gradient_sync", wraps=sharded.model.set_requires_gradient_sync
    ) as switch:
        sharded.train_one_epoch(loader_of(40))
    return {"ddp": sent, "fsdp": [call.args[0] for call in switch.call_args_list]}


@needs_processes
class NoSync(ParallelCase):
    def test_gradients_are_sent_once_a_step(self) -> None:
        for found in in_processes(2, exchanges):
            self.assertEqual(found["ddp"], [0, 1, 2])  # the model is one bucket
            self.assertEqual(found["fsdp"], [False, False, True, False, False, True, True])


# ----------------------------------------------------------------------------------------------------------- evaluation

COUNTS = (1, 5, 7, 10_001)


def evaluations(rank: int, strategy: str) -> list[dict[str, Any]]:
    found = []
    for count in COUNTS:
        trainer = trainer_of(strategy)
        loader = TensorLoader(*samples(count), 1000)
        seen = [len(targets) for _, targets in loader]
        loss, accuracy = trainer.validate(loader)
        again = evaluate(trainer.evaluated_model, loader, nn.CrossEntropyLoss(), reduce=True)
        found.append({"loss": loss, "accuracy": accuracy, "again": again, "seen": sum(seen), "batches": len(seen)})
    return found


class Evaluation(ParallelCase):
    """Every sample counts once, whatever their number and that of the processes."""

    def check(self, every: list[list[dict[str, Any]]]) -> None:
        for i, count in enumerate(COUNTS):
            inputs, targets = samples(count)
            with torch.no_grad():
                outputs = network()(inputs)
            loss = nn.functional.cross_entropy(outputs, targets, reduction="sum").item() / count
            right = int((outputs.argmax(1) == targets).sum())
            for found in (results[i] for results in every):
                self.assertLess(abs(found["loss"] / loss - 1), 1e-12, count)
                self.assertEqual(found["accuracy"], right / count)
                self.assertEqual(found["again"], (found["loss"], found["accuracy"]))
                self.assertEqual(found["loss"], every[0][i]["loss"])  # the same float everywhere
            self.assertEqual(sum(results[i]["seen"] for results in every), count)
            self.assertEqual({results[i]["batches"] for results in every}, {-(-count // 1000)})

    def test_one_process(self) -> None:
        self.check([evaluations(0, "ddp")])

    @needs_processes
    def test_many(self) -> None:
        for world_size, strategy in ((2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp")):
            with self.subTest(strategy, world_size=world_size):
                self.check(in_processes(world_size, evaluations, strategy))


# ------------------------------------------------------------------------------------- losses, dropout, random numbers


def epoch_of_images(rank: int) -> dict[str, Any]:
    """As the scripts train: uint8 images, augmented, in float32; 100 in batches of 16."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(100) % 10
    images = torch.randint(0, 100, (100, 1, 28, 28), generator=generator)
    images[torch.arange(100), 0, 2 * targets + 2] += 150
    loader = TensorLoader(images.to(torch.uint8), targets, 16, shuffle=True, seed=1, augment=RandomAffine())
    torch.manual_seed(0)
    model = make_model("simplenet")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    trainer = Trainer(wrapped(model, "ddp"), nn.CrossEntropyLoss(), optimizer)
    losses: list[float] = []

    def note(trainer: Trainer) -> None:
        result = trainer._running.pending[-1]
        parts = distributed.all_gather([float(result.loss) * result.samples, result.samples])
        losses.append(sum(loss for loss, _ in parts) / sum(count for _, count in parts))

    trainer.on_step_end = (note,)
    history = trainer.fit(loader, loader, 2, verbose=False)
    return {"losses": losses, "history": history}


def streams(rank: int) -> dict[str, Any]:
    """Training with dropout, with a stream of random numbers for each process."""
    masks: list[list[bool]] = []
    model = network(dropout=0.5)
    wrapper = wrapped(model, "ddp")
    model.get_submodule("1.2").register_forward_hook(
        lambda module, inputs, outputs: masks.append((outputs == 0).flatten().tolist())
    )
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    trainer = Trainer(wrapper, nn.CrossEntropyLoss(), optimizer)
    set_random_state(branched_random_state(random_state(CPU), rank, CPU), CPU)
    constant = TensorLoader(torch.ones(24, WIDTH).double(), torch.arange(24) % 3, 8)
    trainer.fit(constant, num_epochs=3, verbose=False)
    return {"masks": masks, "weights": {name: p.detach() for name, p in model.named_parameters()}}


@needs_processes
class OneCourse(ParallelCase):
    def test_losses_of_one_and_many_processes_agree(self) -> None:
        alone = epoch_of_images(0)
        self.assertEqual(len(alone["losses"]), 14)
        self.assertLess(alone["history"]["train_loss"][1], alone["history"]["train_loss"][0])
        for world_size in (2, 3):
            for found in in_processes(world_size, epoch_of_images):
                self.assert_close(found["losses"], alone["losses"], 1e-4)
                for name in ("train_loss", "val_loss"):
                    self.assert_close(found["history"][name], alone["history"][name], 1e-4)

    def test_dropout_differs_and_weights_do_not(self) -> None:
        one, two, three = in_processes(3, streams)
        self.assertEqual(len(one["masks"]), 9)
        size = min(len(found["masks"][0]) for found in (one, two, three))
        first = [found["masks"][0][:size] for found in (one, two, three)]
        self.assertTrue(first[0] != first[1] and first[1] != first[2] and first[0] != first[2])
        for other in (two, three):
            self.assert_same(other["weights"], one["weights"])
        self.assertFalse(torch.equal(one["weights"]["0.weight"], network().state_dict()["0.weight"]))


# ------------------------------------------------------------------------------------------------------ stop and resume


def course(
    rank: int,
    strategy: str,
    folder: str,
    *,
    hard: bool = False,
    resume: bool = False,
    stop: tuple[int, int, int] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """3 epochs of 4 steps. `hard`: with dropout and BatchNorm. `stop`: this rank gets, after this step, this signal."""
    torch.manual_seed(2)
    model = wrapped(network(norm=hard, dropout=0.3 if hard else 0.0), strategy)
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    schedule = OneCycleLR(optimizer, 0.05, total_steps=12)
    trainer = Trainer(
        model, nn.CrossEntropyLoss(), optimizer, CPU, schedule, checkpoint_dir=folder, keep=9, clip_norm=1.0, **options
    )
    set_random_state(branched_random_state(random_state(CPU), rank, CPU), CPU)
    if stop is not None:
        victim, step, signum = stop
        trainer.on_step_end = (signal_at(step, signum, rank == victim),)
    loader, raised, path = loader_of(30, 8), 0, ""
    if resume:
        torch.rand(5)  # the checkpoint's random state is what counts
        found = trainer.resume()
        assert found is not None
    try:
        trainer.fit(loader, loader_of(9), 3, verbose=False)
    except Interrupted as stopped:
        raised, path = stopped.signum, str(stopped.checkpoint)
    weights = parallel.full_weights(trainer.model)
    return {
        "weights": weights or None,
        "history": trainer.history,
        "at": (trainer.step, trainer.epoch, trainer.batch),
        "raised": raised,
        "path": path,
    }


def courses(rank: int, plan: list[tuple[str, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [course(rank, strategy, folder, **options) for strategy, folder, options in plan]


def newest(folder: Path) -> dict[str, Any]:
    return load_checkpoint(CheckpointFolder(folder).steps()[-1][1])


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two checkpoints differ."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys(), key=str)
        return [found for key in keys for found in differences(a.get(key), b.get(key), f"{where}[{key!r}]")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{where}[{i}]")]
    return [] if a == b else [where]


@needs_processes
class Resume(ParallelCase):
    def copy_of(self, name: str) -> str:
        path = self.folder / f"{name} {len(list(self.folder.iterdir()))}"
        return str(shutil.copytree(self.folder / name, path))

    def test_two_processes_go_on_exactly(self) -> None:
        """With dropout, BatchNorm and running means, in mid-epoch: the whole checkpoint is the same, bit for bit."""
        for strategy in ("ddp", "fsdp"):
            straight, cut = (str(self.folder / f"{strategy} {name}") for name in ("straight", "cut"))
            plan = [
                (strategy, straight, {"hard": True}),
                (strategy, cut, {"hard": True, "stop": (1, 5, signal.SIGTERM)}),
                (strategy, cut, {"hard": True, "resume": True}),
            ]
            for found in in_processes(2, courses, plan):
                self.assertEqual([one["raised"] for one in found], [0, signal.SIGTERM, 0])
                self.assertEqual(found[1]["at"], (6, 1, 2))  # agreed on at the next step, in mid-epoch
                self.assertEqual(found[2]["history"], found[0]["history"])
            expected, actual = newest(Path(straight)), newest(Path(cut))
            self.assertEqual(len(expected["ranks"]), 2)
            self.assertEqual(differences(actual, expected), [])

    def test_averages_and_early_stopping_go_on_too(self) -> None:
        straight, cut = (str(self.folder / name) for name in ("straight", "cut"))
        for found in in_processes(2, with_averages, straight, cut):
            self.assertEqual(found, [12, 7, 12])
        self.assertEqual(differences(newest(Path(cut)), newest(Path(straight))), [])

    def test_any_number_of_processes_and_strategy_go_on(self) -> None:
        """Without random numbers: stopped in mid-epoch and resumed elsewhere, it is the course of one process."""
        stop = (0, 5, signal.SIGINT)
        expected = course(0, "ddp", str(self.folder / "straight"))
        alone = course(0, "ddp", str(self.folder / "alone"), stop=stop)
        self.assertEqual((alone["raised"], alone["at"]), (signal.SIGINT, (5, 1, 1)))
        begun = [(strategy, str(self.folder / strategy), {"stop": stop}) for strategy in ("ddp", "fsdp")]
        self.assertEqual([one["at"] for one in in_processes(2, courses, begun)[1]], [(6, 1, 2)] * 2)
        on = {"resume": True}
        found = {f"{name} by one": course(0, "ddp", self.copy_of(name), resume=True) for name in ("ddp", "fsdp")}
        for world_size, pairs in (
            (2, [("alone", "ddp"), ("alone", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp")]),
            (3, [("ddp", "ddp"), ("ddp", "fsdp"), ("fsdp", "fsdp")]),
        ):
            results = in_processes(world_size, courses, [(now, self.copy_of(name), on) for name, now in pairs])[0]
            found |= {f"{name} by {now} of {world_size}": one for (name, now), one in zip(pairs, results, strict=True)}
        for name, one in found.items():
            self.assertEqual(one["at"], (12, 3, 0), name)
            self.assert_close(one["weights"], expected["weights"], message=name)
            for key in ("train_loss", "val_loss", "lr"):
                self.assert_close(one["history"][key], expected["history"][key], message=(name, key))
            self.assertEqual(one["history"]["train_acc"], expected["history"]["train_acc"], name)

    def test_a_loader_of_each_process_goes_on_with_its_own_order(self) -> None:
        """DataLoaders that shuffle by a generator that differs from process to process."""
        straight, resumed = zip(*in_processes(2, own_orders, str(self.folder / "cut")), strict=True)
        self.assertNotEqual(straight[0], straight[1])
        self.assertEqual(list(resumed), list(straight))


def with_averages(rank: int, straight: str, cut: str) -> list[int]:
    """The steps done by three trainers, of which the third goes on where the second was stopped by a signal."""
    steps = []
    for folder, stop, resume in ((straight, False, False), (cut, True, False), (cut, False, True)):
        model = network(norm=True, dropout=0.3)
        averages = averaged_copy(model, 0.8)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        trainer = Trainer(
            wrapped(model, "ddp"),
            nn.CrossEntropyLoss(),
            optimizer,
            averages=averages,
            early_stopping=EarlyStopping(9),
            checkpoint_dir=folder,
            on_step_end=[signal_at(6, signal.SIGTERM, stop)],
        )
        set_random_state(branched_random_state(random_state(CPU), rank, CPU), CPU)
        if resume:
            trainer.resume()
        try:
            trainer.fit(loader_of(30, 8), loader_of(9), 3, verbose=False)
        except Interrupted:
            assert stop
        steps.append(trainer.step)
    return steps


def own_orders(rank: int, folder: str) -> tuple[list, list]:
    """The samples of two epochs of 5 batches, straight, and stopped after 7 and resumed."""
    orders: list[list] = []
    for stop, resume in ((False, False), (True, False), (False, True)):
        inputs, targets = samples(20)
        loader = DataLoader(TensorDataset(inputs, targets), 4, True, generator=torch.Generator().manual_seed(rank))
        trainer = trainer_of("ddp", checkpoint_dir=folder if stop or resume else None)
        if stop or resume:
            trainer.on_step_end = (signal_at(6, signal.SIGTERM, stop),)
        seen = noted_samples(trainer.model, 20)
        if resume:
            trainer.resume()
        try:
            trainer.fit(loader, num_epochs=2, verbose=False)
        except Interrupted:
            assert stop
        orders.append(seen)
    return orders[0], orders[1] + orders[2]


# -------------------------------------------------------------------------------------------------- stopping together


def signalled_in_validation(rank: int, folder: str) -> dict[str, Any]:
    """Rank 1 is signalled while it validates after the first epoch."""
    trainer = trainer_of("ddp", checkpoint_dir=folder)

    class Signals:
        def __iter__(self) -> Any:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return iter(loader_of(9))

    try:
        trainer.fit(loader_of(30, 8), Signals(), 3, verbose=False)
    except Interrupted as stopped:
        return {"raised": stopped.signum, "at": (trainer.step, trainer.epoch, trainer.batch)}
    return {}


@needs_processes
class Signals(ParallelCase):
    def test_one_that_only_one_process_got_stops_all_at_one_step(self) -> None:
        for strategy, victim, signum in (("ddp", 2, signal.SIGINT), ("fsdp", 0, signal.SIGTERM)):
            folder = self.folder / strategy
            plan = [(strategy, str(folder), {"stop": (victim, 6, signum)})]
            every = [found[0] for found in in_processes(3, courses, plan)]
            path = str(folder / "step-00000007.pt")
            self.assertEqual({one["raised"] for one in every}, {signum})
            self.assertEqual({one["at"] for one in every}, {(7, 1, 3)})
            self.assertEqual({one["path"] for one in every}, {path})
            state = load_checkpoint(path)
            self.assertEqual((state["step"], state["epoch"], state["batch"]), (7, 1, 3))

    def test_after_the_last_step_of_an_epoch(self) -> None:
        plan = [("ddp", str(self.folder / "run"), {"stop": (1, 4, signal.SIGINT)})]
        for (found,) in in_processes(2, courses, plan):
            self.assertEqual((found["raised"], found["at"]), (signal.SIGINT, (4, 0, 4)))
            self.assertEqual(found["history"]["train_loss"], [])  # its end comes after the resume

    def test_in_validation(self) -> None:
        for found in in_processes(2, signalled_in_validation, str(self.folder / "run")):
            self.assertEqual(found, {"raised": signal.SIGINT, "at": (4, 0, 4)})


def unequal(rank: int, strategy: str, validate: bool = False) -> dict[str, Any]:
    """Process 0 has 5 batches, process 1 has 2, process 2 has 3, of 4 samples each."""
    batches = own_batches(rank)
    trainer = trainer_of(strategy)
    gradients = noted_gradients(trainer)
    loss, accuracy = trainer.train_one_epoch(batches)
    found = {"gradients": gradients, "loss": loss, "accuracy": accuracy, "steps": trainer.step}
    return {**found, "validated": trainer.validate(batches)} if validate else found


def own_batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = samples(40)
    parts = list(zip(inputs.split(4), targets.split(4), strict=True))
    return [parts[:5], parts[5:7], parts[7:10]][rank]


def no_batch(rank: int) -> str:
    trainer = trainer_of("ddp")
    try:
        trainer.train_one_epoch(own_batches(0) if rank == 0 else [])
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@needs_processes
class UnequalLoaders(ParallelCase):
    def expected(self) -> tuple[list[list[Tensor]], float]:
        """Step i is that of the i-th batches of all who have one."""
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        gradients, total = [], 0.0
        for step, window in enumerate(itertools.zip_longest(*map(own_batches, range(3)))):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            inputs, targets = (torch.cat(parts) for parts in zip(*filter(None, window), strict=True))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            gradients.append([whole(p.grad) for p in model.parameters()])
            optimizer.step()
            total += loss.item() * len(targets)
        return gradients, total / 40

    def test_who_has_less_takes_part_with_nothing(self) -> None:
        gradients, loss = self.expected()
        for strategy in ("ddp", "fsdp"):
            for found in in_processes(3, unequal, strategy, timeout=10.0):
                self.assertEqual(found["steps"], 5)
                self.assert_close(found["gradients"], gradients, message=strategy)
                self.assert_close(found["loss"], loss)

    def test_in_evaluation_too(self) -> None:
        means = []
        for strategy in ("ddp", "fsdp"):
            found = in_processes(3, unequal, strategy, True, timeout=10.0)
            self.assertEqual(len({one["validated"] for one in found}), 1)
            means.append(found[0]["validated"])
        self.assertGreater(means[0][1], 0.2)
        self.assert_close(means[1], means[0])  # DDP needs no empty batches; FSDP's count nothing

    def test_a_process_without_any_batch_says_so(self) -> None:
        found = in_processes(2, no_batch, timeout=10.0)
        self.assertRegex(found[1], "^ValueError: the loader of this process gave no batch at all")
        self.assertRegex(found[0], "^RuntimeError: ")  # it lost contact, and did not hang


# --------------------------------------------------------------------------------------------------- non-finite losses


def poisoned(rank: int, strategy: str, policy: str) -> dict[str, Any]:
    """The third of 6 batches is NaN in process 1 alone."""
    inputs, targets = samples(48)
    parts = list(zip(inputs.split(4), targets.split(4), strict=True))[rank::2]
    if rank == 1:
        parts[2] = (parts[2][0] * math.nan, parts[2][1])
    trainer = trainer_of(strategy, norm=True, nan_policy=policy, clip_norm=5.0)
    try:
        means = trainer.train_one_epoch(parts)
    except NonFiniteLoss as error:
        return {"error": str(error)}
    except RuntimeError as error:
        return {"lost": distributed.is_lost_contact(error)}
    return {
        "means": means,
        "steps": trainer.step,
        "skipped": trainer.skipped,
        "weights": [whole(p) for p in trainer.model.parameters()],
        "buffers": [buffer.clone() for buffer in trainer.model.buffers()],
    }


@needs_processes
class NonFinite(ParallelCase):
    def expected(self) -> tuple[list[Tensor], list[list[Tensor]], float]:
        """By hand: two copies of the model, whose gradients are averaged, and the third batch passed by."""
        inputs, targets = samples(48)
        batches = list(zip(inputs.split(4), targets.split(4), strict=True))
        models = [network(norm=True), network(norm=True)]
        optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in models]
        total = 0.0
        for step, i in enumerate((0, 1, 3, 4, 5)):
            for model, (x, y) in zip(models, batches[2 * i : 2 * i + 2], strict=True):
                model.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                total += loss.item() * len(y)
            for p, q in zip(*(model.parameters() for model in models), strict=True):
                p.grad, q.grad = ((whole(p.grad) + whole(q.grad)) / 2 for _ in range(2))
            for model, optimizer in zip(models, optimizers, strict=True):
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
                optimizer.step()
        weights = [p.detach() for p in models[0].parameters()]
        return weights, [list(model.buffers()) for model in models], total / 40

    def test_skip_is_for_all(self) -> None:
        weights, buffers, loss = self.expected()
        for strategy in ("ddp", "fsdp"):
            for rank, found in enumerate(in_processes(2, poisoned, strategy, "skip")):
                self.assertEqual((found["steps"], found["skipped"]), (5, 1), strategy)
                self.assert_close(found["weights"], weights, message=strategy)
                self.assert_close(found["buffers"], buffers[rank], message=strategy)
                self.assert_close(found["means"][0], loss)

    def test_stop_names_the_batch_and_lets_nobody_wait(self) -> None:
        other, found = in_processes(2, poisoned, "ddp", "stop", timeout=10.0)
        self.assertRegex(found["error"], "the loss is nan at epoch 1, batch 3, after 2 steps")
        self.assertEqual(other, {"lost": True})


# --------------------------------------------------------------------------------------------------------- BatchNorm

EMPTY = 19  # in batches of 6: the last is one sample, of which the first of two processes has nothing


def statistics(rank: int, strategy: str, folder: str) -> dict[str, Any]:
    """One epoch without learning (rate 0), so that only the statistics change; then a validation."""
    trainer = trainer_of(strategy, lr=0.0, norm=True, checkpoint_dir=folder)
    model = trainer.evaluated_model
    before: list[Tensor] = []
    trainer.on_step_end = (lambda t: before.__setitem__(slice(None), [b.clone() for b in model.buffers()]),)
    loader = TensorLoader(*samples(EMPTY), 6, limit_batches=4)
    # one sample alone has no variance: BatchNorm1d refuses it, so the part with the last one is made of two
    batches = [(x.repeat(2, 1), y.repeat(2)) if len(x) == 1 else (x, y) for x, y in loader]
    with (
        mock.patch.object(CheckpointFolder, "save", autospec=True, side_effect=CheckpointFolder.save) as save,
        mock.patch.object(CheckpointFolder, "save_best", autospec=True, side_effect=CheckpointFolder.save_best) as best,
    ):
        trainer.fit(batches, TensorLoader(*samples(50), 20), 1, verbose=False)
    after = [buffer.clone() for buffer in model.buffers()]
    saves = (save.call_count, best.call_count)
    return {
        "before": before,
        "after": after,
        "val": (trainer.history["val_loss"][0], trainer.history["val_acc"][0]),
        "saves": saves,
    }


@needs_processes
class BatchNormStatistics(ParallelCase):
    def test_an_empty_part_leaves_them_and_those_of_rank_0_count(self) -> None:
        twin = network(norm=True)  # what process 0 saw: the first half of each batch of 6, nothing of the last
        inputs, _ = samples(EMPTY)
        for start in (0, 6, 12):
            twin(inputs[start : start + 3])
        other = network(norm=True)
        for part in (inputs[3:6], inputs[9:12], inputs[15:18], inputs[18:].repeat(2, 1)):
            other(part)
        twin.eval()
        x, y = samples(50)
        with torch.no_grad():
            outputs = twin(x)
        loss, accuracy = nn.functional.cross_entropy(outputs, y).item(), float((outputs.argmax(1) == y).sum()) / 50
        for strategy in ("ddp", "fsdp"):
            folder = self.folder / strategy
            every = in_processes(2, statistics, strategy, str(folder))
            for found, own in zip(every, (twin, other), strict=True):
                self.assertTrue(all(bool(buffer.isfinite().all()) for buffer in found["before"]))
                self.assert_close(found["before"], list(own.buffers()), message=strategy)
                self.assert_close(found["after"], list(own.buffers()), message=strategy)  # judging changes nothing
                self.assert_close(found["val"], (loss, accuracy), message=strategy)
            self.assertEqual([found["saves"] for found in every], [(1, 1), (0, 0)])  # only rank 0 writes
            for path in (folder / "best.pt", CheckpointFolder(folder).steps()[-1][1]):
                saved = load_checkpoint(path)["model_state_dict"]
                self.assert_close(saved, twin.state_dict(), message=path)


class SyncBatchNormWithAnEmptyPart(ParallelCase):
    def test_it_takes_part_in_the_exchange_of_statistics(self) -> None:
        """SyncBatchNorm exchanges in training mode only: who left that mode would let the others wait for ever."""
        modes = []

        class Noted(nn.SyncBatchNorm):
            def forward(self, inputs: Tensor) -> Tensor:
                modes.append((len(inputs), self.training))
                return inputs * 1.0

        model = nn.Sequential(nn.Linear(WIDTH, 8), Noted(8), nn.Linear(8, 3)).double()
        trainer = Trainer(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1))
        inputs, targets = samples(6)
        trainer.train_one_epoch([(inputs, targets), (inputs[:0], targets[:0])])
        self.assertEqual(modes, [(6, True), (0, True)])


# -------------------------------------------------------------------------------------------- strategies by themselves


def replicas(rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)  # other weights everywhere: those of rank 0 are taken
    linear, norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
    replica = parallel.replicate(nn.Sequential(linear, norm), CPU)
    weights = linear.weight.detach().clone()
    twin = nn.Sequential(copy.deepcopy(linear), nn.BatchNorm1d(3))
    for inputs in torch.randn(3, 5, 4) + 10 * rank:
        replica(inputs)
        twin(inputs)
    return {
        "weights": weights,
        "buffers": list(norm.buffers()),
        "own_buffers": list(twin.buffers()),
        "is_ddp": isinstance(replica, DistributedDataParallel),
        "is_sharded": parallel.is_sharded(replica),
        "names": sorted(parallel.full_state(replica, torch.optim.SGD(replica.parameters(), 0.1))[0]),
    }


def shards(rank: int) -> dict[str, Any]:
    model = parallel.shard(make_model("mlp"), CPU)  # has lists of layers with BatchNorm among them
    plain = make_model("mlp")
    half = parallel.shard(make_model("cnn"), CPU, "bf16")
    seen: dict[str, str] = {}
    for name, module in half.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_forward_hook(
                lambda m, i, o, name=name: seen.update({f"{name} {type(m).__name__}": str(m.weight.dtype)})
            )
    half(torch.randn(4, 1, 28, 28)).float().sum().backward()
    lists = parallel.shard(make_model("simplenet"), CPU)
    return {
        "own": sum(p.numel() for p in parallel.own_parameters(model)),
        "all": sum(p.numel() for p in plain.parameters()),
        "is_sharded": (parallel.is_sharded(model), parallel.is_sharded(plain)),
        "seen": seen,
        "grads": sorted({str(whole(p.grad).dtype) for p in half.parameters()}),
        "kept": sorted({str(p.dtype) for p in half.parameters()}),
        "blocks": [name for name, module in lists.named_modules() if parallel.is_sharded(module)],
    }


def states(rank: int) -> dict[str, Any]:
    """An FSDP step with AdamW in two groups, given in another order than the model's; its state, taken and loaded."""

    def build(sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network(norm=True)
        if sharded:
            parallel.shard(model, CPU)
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        others = [p for name, p in model.named_parameters() if not name.endswith("bias")]
        return model, torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": others, "lr": 0.02}], 0.01)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        inputs, targets = samples(12)
        nn.functional.cross_entropy(model(inputs), targets).backward()  # all have the same: the mean is that of one
        optimizer.step()

    plain, sharded, other = build(False), build(True), build(True)
    for pair in (plain, sharded):
        step(*pair)
        step(*pair)
    found = distributed.gather_objects(parallel.full_state(*sharded))
    weights, state = found[0]
    assert found[1] == ({}, {}), "only rank 0 is to have it"
    parallel.load_full_weights(other[0], weights, "here")
    parallel.load_optimizer(*other, state)
    step(*other)
    step(*plain)
    after = parallel.full_state(*other)
    return {
        "weights": weights,
        "state": state,
        "plain": None if rank else {"weights": plain[0].state_dict(), "state": plain[1].state_dict()},
        "after": {"weights": after[0], "state": after[1]},
    }


def wrong_weights(rank: int) -> list[str]:
    model, errors = parallel.shard(network(norm=True), CPU), []
    before = [p.detach().clone() for p in parallel.own_parameters(model)]
    good = network(norm=True).state_dict()
    name = "0.weight"
    for bad in (
        {key: value for key, value in good.items() if key != name},
        {**good, name: torch.zeros(3, 3).double()},
        {**good, name: good[name].float()},
        {**good, "more": torch.zeros(1)},
    ):
        try:
            parallel.load_full_weights(model, bad, "here.pt")
        except CheckpointError as error:
            errors.append(str(error))
    now = parallel.own_parameters(model)
    return errors if all(torch.equal(a, b) for a, b in zip(before, now, strict=True)) else ["changed"]


@needs_processes
class Strategies(ParallelCase):
    def test_replicate(self) -> None:
        every = in_processes(2, replicas)
        torch.manual_seed(0)
        expected = nn.Linear(4, 3).weight.detach()
        for found in every:
            self.assert_same(found["weights"], expected)
            self.assertEqual((found["is_ddp"], found["is_sharded"]), (True, False))
            self.assertEqual(found["names"][0], "0.bias")  # without the wrapper's prefix
            self.assert_same(found["buffers"], found["own_buffers"])  # not sent at each forward

    def test_shard(self) -> None:
        every = in_processes(2, shards)
        self.assertEqual(sum(found["own"] for found in every), every[0]["all"])
        for found in every:
            self.assertLess(found["own"], 0.6 * found["all"])
            self.assertEqual(found["is_sharded"], (True, False))
            self.assertEqual(found["blocks"], ["", "hidden.0", "hidden.1", "output"])
            self.assertEqual((found["grads"], found["kept"]), (["torch.float32"], ["torch.float32"]))
            for name, dtype in found["seen"].items():
                self.assertEqual(dtype, "torch.float32" if name.endswith("BatchNorm2d") else "torch.bfloat16", name)
            self.assertEqual(len(found["seen"]), 4)

    def test_the_state_of_shards_is_that_of_one_process(self) -> None:
        found = in_processes(2, states)[0]
        model = network(norm=True)
        self.assertEqual(list(found["weights"]), list(model.state_dict()))
        self.assertEqual([group["params"] for group in found["state"]["param_groups"]], [[0, 1, 2], [3, 4, 5]])
        self.assertEqual(sorted(found["state"]["state"]), list(range(6)))
        self.assert_close(found["after"]["weights"], found["plain"]["weights"])
        self.assert_close(found["after"]["state"]["state"], found["plain"]["state"]["state"])
        groups, expected = (found[name]["state"]["param_groups"] for name in ("after", "plain"))
        self.assertEqual(groups, [{**group, "betas": list(group["betas"])} for group in expected])
        names = ["0.bias", "1.0.bias", "2.bias", "0.weight", "1.0.weight", "2.weight"]
        named = dict(model.named_parameters())
        optimizer = torch.optim.AdamW([{"params": [named[name] for name in half]} for half in (names[:3], names[3:])])
        optimizer.load_state_dict(found["state"])  # a plain optimizer takes it
        self.assertEqual(optimizer.state[named["2.weight"]]["exp_avg"].shape, named["2.weight"].shape)
        self.assertEqual([group["lr"] for group in optimizer.param_groups], [0.01, 0.02])

    def test_weights_of_another_model_change_nothing(self) -> None:
        for found in in_processes(2, wrong_weights):
            self.assertEqual(len(found), 4, found)
            for error, pattern in zip(found, ("missing", "shape", "float32", "unknown"), strict=True):
                self.assertRegex(error, f"^here.pt: of another model: .*{pattern}")

    def test_what_does_not_go_together(self) -> None:
        with self.assertRaisesRegex(ValueError, "--sync-bn.*accelerator"):
            parallel.replicate(network(norm=True), CPU, sync_bn=True)
        model: Any = network()
        model.__class__ = type("Sharded", (type(model),), {"set_requires_gradient_sync": None})  # as fully_shard does
        with self.assertRaisesRegex(ValueError, "averages need the whole weights"):
            Trainer(
                model,
                nn.CrossEntropyLoss(),
                torch.optim.SGD(model.parameters(), 0.1),
                averages=averaged_copy(network(), 0.9),
            )

    def test_after_an_error_each_has_its_own_buffers_again(self) -> None:
        model = network(norm=True)
        before = copy.deepcopy(list(model.buffers()))
        with (
            mock.patch("torchbasics.distributed.world_size", lambda: 2),
            mock.patch("torch.distributed.broadcast", lambda buffer, src: buffer.fill_(7)),
            self.assertRaises(ZeroDivisionError),
            parallel.shared_buffers(model),
        ):
            self.assertTrue(all(bool((buffer == 7).all()) for buffer in model.buffers()))
            raise ZeroDivisionError
        self.assert_same(list(model.buffers()), before)

    def test_without_others_nothing_is_exchanged(self) -> None:
        model = network(norm=True)
        with parallel.gradient_sync(model, wanted=False):
            model(samples(4)[0]).sum().backward()
        self.assertIsNotNone(model[0].weight.grad)
        before = copy.deepcopy(list(model.buffers()))
        with parallel.shared_buffers(model):
            self.assert_same(list(model.buffers()), before)
        self.assert_same(list(model.buffers()), before)
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.step()
        weights, state = parallel.full_state(model, optimizer)
        self.assert_same(weights, model.state_dict())
        self.assertEqual(state.keys(), optimizer.state_dict().keys())


# ----------------------------------------------------------------------------------------------- the exchange by DDP


def clocks(rank: int) -> dict[str, Any]:
    """Process 1 is 0.3 s late to the first exchange; then the same gradient, sent in float32 and in bfloat16."""
    waited, gradients = [], []
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(20, 5)
        replica = parallel.replicate(model, CPU)
        exchange = parallel.GradientExchange(replica, CPU, bf16)
        loss = replica(torch.randn(8, 20, generator=torch.Generator().manual_seed(rank))).square().mean()
        distributed.barrier()
        if rank == 1 and not bf16:
            time.sleep(0.3)
        loss.backward()
        waited.append(exchange.seconds)
        gradients.append(whole(model.weight.grad))
    return {"waited": waited[0], "gradients": gradients}


@needs_processes
class Exchange(ParallelCase):
    def test_it_counts_the_wait_for_others_and_sends_the_mean(self) -> None:
        for processes_here in ("2", "1"):  # through memory, and as if one of them were on another machine
            self.check_clock(*in_processes(2, clocks, LOCAL_WORLD_SIZE=processes_here))

    def check_clock(self, one: dict[str, Any], two: dict[str, Any]) -> None:
        self.assertTrue(0.25 < one["waited"] < 5, one["waited"])
        self.assertLess(two["waited"], one["waited"] - 0.1)
        torch.manual_seed(0)
        model = nn.Linear(20, 5)
        for rank in range(2):
            loss = model(torch.randn(8, 20, generator=torch.Generator().manual_seed(rank))).square().mean() / 2
            loss.backward()
        for found in (one, two):
            full, half = found["gradients"]
            self.assert_close(full, model.weight.grad, 1e-5)
            self.assertFalse(torch.equal(half, full))
            torch.testing.assert_close(half, full, rtol=2**-6, atol=1e-3)
            self.assertEqual(half.dtype, torch.float32)

    def test_the_mean_is_that_of_all_reduce(self) -> None:
        """To the last bit for two processes; for three it is added up in the order of ranks."""
        for count, local, static in ((2, 2, False), (2, 2, True), (2, 1, False), (3, 3, False)):
            parts = [[gradients_of(bucketed(), rank, step, count) for step in range(3)] for rank in range(count)]
            for found in in_processes(count, averaged, static, LOCAL_WORLD_SIZE=str(local)):
                self.assertEqual(found["through memory"], local == count and SHARES_MEMORY)
                self.assertGreater(found["buckets"], 2)
                for step, gradients in enumerate(found["gradients"]):
                    for i, gradient in enumerate(gradients):
                        mean = functools.reduce(torch.add, [part[step][i] for part in parts])
                        self.assertTrue(torch.equal(gradient, mean), (count, local, static, step, i))

    def test_what_ddp_may_leave_out_is_not_for_rows(self) -> None:
        """Rows of a sparse gradient, and the bucket of a layer that no process used."""
        for found in in_processes(2, partial_gradients):
            self.assertEqual(found["through memory"], [False, False])
            self.assertEqual(found["sparse"].tolist(), [[0.5] * 2, [0.5] * 2, [0.0] * 2])
            self.assertEqual((found["used"].tolist(), found["unused"]), ([[1.5]], None))

    @needs_shared_memory
    def test_who_is_killed_while_the_others_wait_for_its_gradient(self) -> None:
        first, second = outcomes(2, killed_in_backward)
        self.assertEqual(second.code, -signal.SIGKILL)
        self.assertEqual(first.result, "DistNetworkError: rank 1 has left, lost contact: True")


def bucketed() -> nn.Module:
    """Small layers, some of float64, one frozen: DDP makes a bucket a type, and starts a new one where one is full."""
    torch.manual_seed(0)
    layers = [nn.Linear(30, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 7), Double(), nn.Linear(7, 5)]
    layers[-1].double()
    layers[2].bias.requires_grad_(False)  # type: ignore[union-attr]
    return nn.Sequential(*layers)


def small_buckets(model: nn.Module, static: bool = False) -> DistributedDataParallel:
    return DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=0.002, static_graph=static)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return model(torch.randn(4, 30, generator=generator)).square().mean()


def gradients_of(model: nn.Module, rank: int, step: int, count: int) -> list[Tensor]:
    loss_of(model, rank, step).backward()
    return [p.grad / count for p in model.parameters() if p.grad is not None]


def averaged(rank: int, static: bool) -> dict[str, Any]:
    buckets: set[int] = set()

    def counted(name: str) -> Any:
        real = getattr(parallel.GradientExchange, name)

        def hook(exchange: Any, *args: Any) -> Any:
            buckets.add(args[-1].index())
            return real(exchange, *args)

        return mock.patch.object(parallel.GradientExchange, name, hook)

    model, gradients = bucketed(), []
    replica = small_buckets(model, static)
    model[0].bias.requires_grad_(False)  # too late: DDP hands it over all the same
    with counted("_through_memory"), counted("_by_all_reduce"):
        exchange = parallel.GradientExchange(replica, CPU)
    model[0].bias.requires_grad_(True)
    copy.deepcopy(replica)
    for step in range(3):  # after the first DDP arranges its buckets anew
        model.zero_grad()
        loss_of(replica, rank, step).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return {"through memory": exchange.through_memory, "buckets": len(buckets), "gradients": gradients}


def partial_gradients(rank: int) -> dict[str, Any]:
    embedding = nn.Embedding(3, 2, sparse=True)
    replica = DistributedDataParallel(embedding, gradient_as_bucket_view=False)
    first = parallel.GradientExchange(replica, CPU)
    replica(torch.tensor([rank])).sum().backward()

    model = nn.Sequential(nn.Linear(1, 1, bias=False), Unused())
    options: dict[str, Any] = {"find_unused_parameters": True, "skip_all_reduce_unused_params": True}
    replica = DistributedDataParallel(model, bucket_cap_mb=1e-6, **options)
    second = parallel.GradientExchange(replica, CPU)
    replica(torch.tensor([[1.0 + rank]])).sum().backward()
    return {
        "through memory": [first.through_memory, second.through_memory],
        "sparse": whole(embedding.weight.grad.to_dense()),
        "used": whole(model[0].weight.grad),
        "unused": model[1].weight.grad,
    }


class Unused(nn.Linear):
    def __init__(self) -> None:
        super().__init__(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return x


def killed_in_backward(rank: int) -> str:
    model = bucketed()
    replica = small_buckets(model)
    parallel.GradientExchange(replica, CPU)
    loss_of(replica, rank, 0).backward()
    loss = loss_of(replica, rank, 1)
    if rank == 1:  # some of its buckets are written, the last is not
        model[0].weight.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))
    try:
        loss.backward()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}, lost contact: {distributed.is_lost_contact(error)}"
    return "nothing failed"


if __name__ == "__main__":
    unittest.main()
