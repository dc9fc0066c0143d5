"""Exact resume: a run that was interrupted anywhere ends bit for bit as the one that was not."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import random
import shutil
import signal
import tempfile
import unittest
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, TensorDataset

from torchbasics.checkpoint import CheckpointError, load_checkpoint
from torchbasics.data import RandomAffine, SeededImageFolder, TensorLoader, folder_loader
from torchbasics.early_stopping import EarlyStopping
from torchbasics.optim import averaged_copy, make_schedule
from torchbasics.position import LoaderPosition, own_generators
from torchbasics.trainer import Interrupted, Trainer

EPOCHS = 3
Build = Callable[..., tuple[Trainer, Any, Any]]


def setUpModule() -> None:
    torch.set_num_threads(1)


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """The places where two nested values differ, bit for bit (NaN equals NaN)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.nan_to_num(1e30), b.nan_to_num(1e30)):
            yield where
    elif isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from differences(a.get(key), b.get(key), f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            yield f"{where} (length)"
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, f"{where}[{i}]")
    elif not (a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))):
        yield f"{where}: {a!r} and {b!r}"


def images(count: int = 44) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    targets = torch.arange(count) % 3
    inputs = torch.randint(0, 200, (count, 1, 8, 8), generator=generator)
    inputs[torch.arange(count), 0, targets * 2] += 50
    return inputs.to(torch.uint8), targets


def network(channels: int = 1, dropout: float = 0.3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(4 * 36, 3)
    )


class NoisyDataset(Dataset):
    """Augments from the global random state, as most data sets of others do."""

    def __init__(self) -> None:
        self.inputs, self.targets = images()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index] / 255 + 0.05 * torch.randn(1, 8, 8) + 0.01 * random.random(), self.targets[index]


class ResumeCase(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.addCleanup(warnings.resetwarnings)
        warnings.simplefilter("ignore")

    def trainer(self, name: str, model: nn.Module | None = None, **options: Any) -> Trainer:
        torch.manual_seed(11)
        random.seed(11)
        model = model or network()
        torch.manual_seed(12)
        make = options.pop("finish", lambda model, optimizer: {})
        optimizer = options.pop("optimizer", lambda p: torch.optim.SGD(p, 0.05, momentum=0.9))(model.parameters())
        return Trainer(
            model,
            nn.CrossEntropyLoss(),
            optimizer,
            checkpoint_dir=self.folder / name,
            **{**options, **make(model, optimizer)},
        )

    def tensor_loaders(self, batch_size: int = 8) -> tuple[TensorLoader, TensorLoader]:
        inputs, targets = images()
        return (
            TensorLoader(inputs, targets, batch_size, shuffle=True, seed=5, augment=RandomAffine()),
            TensorLoader(inputs, targets, 16, shuffle=True, seed=6),
        )  # an odd validation, whose order changes by epoch

    def interrupt(self, build: Build, name: str, places: list[tuple[str, int]], fresh: bool = True) -> Trainer:
        """Runs `build`'s training through interruptions at `places` (kind, count), each resumed by new objects."""
        for kind, count in places:
            trainer, train, val = build(name)
            if trainer.checkpoints.steps():
                trainer.resume()
            kill = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
            if kind == "batch":
                trainer.on_step_end = (lambda t, c=count, k=kill: t.epoch * 100 + t.batch >= c and k(),)
            elif kind == "epoch":
                trainer.on_epoch_end = (lambda t, c=count, k=kill: t.epoch == c and k(),)
            else:
                val = _KillInValidation(val, count, kill)
            with self.assertRaises(Interrupted):
                trainer.fit(train, val, EPOCHS, verbose=False)
        trainer, train, val = build(name)
        self.assertIsNotNone(trainer.resume())
        torch.rand(5), random.random()  # whatever a program does between resume and fit
        trainer.fit(train, val, EPOCHS, verbose=False)
        return trainer

    def check(self, build: Build, *routes: list[tuple[str, int]]) -> Trainer:
        straight, train, val = build("straight")
        straight.fit(train, val, EPOCHS, verbose=False)
        expected = copy.deepcopy(straight.state_dict())
        best = load_checkpoint(self.folder / "straight" / "best.pt")
        last = load_checkpoint(straight.checkpoints.steps()[-1][1])
        for number, places in enumerate(routes):
            with self.subTest(places=places):
                resumed = self.interrupt(build, f"run{number}", places)
                self.assertEqual(list(differences(resumed.state_dict(), expected)), [])
                self.assertEqual(list(differences(load_checkpoint(resumed.checkpoints.best), best)), [])
                self.assertEqual(list(differences(load_checkpoint(resumed.checkpoints.steps()[-1][1]), last)), [])
        return straight


class _KillInValidation:
    """Wraps a validation loader: sends the signal in its `count`-th use."""

    def __init__(self, loader: Any, count: int, kill: Callable) -> None:
        self.loader, self.count, self.kill = loader, count, kill

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)

    def __iter__(self) -> Iterator:
        self.count -= 1
        for i, batch in enumerate(self.loader):
            if self.count == 0 and i == 1:
                self.kill()
            yield batch


ALL_PLACES: list[list[tuple[str, int]]] = [
    [("batch", 1)],
    [("batch", 3)],
    [("batch", 6)],
    [("val", 1)],
    [("epoch", 1)],
    [("batch", 102)],
    [("val", 2)],
    [("batch", 206)],
    [("epoch", 3)],
    [("batch", 2), ("batch", 104)],
    [("batch", 2), ("val", 1), ("batch", 203)],
]  # 100 · epoch + batch; 44 samples by 8 are 6 batches
FEW_PLACES: list[list[tuple[str, int]]] = [
    [("batch", 2)],
    [("epoch", 1)],
    [("val", 2)],
    [("batch", 105), ("batch", 201)],
]


class Loaders(ResumeCase):
    def test_tensor_loader_with_augmentation_and_dropout(self) -> None:
        self.check(lambda name: (self.trainer(name), *self.tensor_loaders()), *ALL_PLACES)

    def test_everything_on(self) -> None:
        def finish(model: nn.Module, optimizer: Any) -> dict[str, Any]:
            return {
                "averages": averaged_copy(model, 0.8),
                "scheduler": make_schedule("onecycle", optimizer, EPOCHS * 2),
            }

        def build(name: str) -> tuple:
            return self.trainer(
                name,
                accumulate=3,
                clip_norm=0.5,
                clip_value=0.2,
                finish=finish,
                early_stopping=EarlyStopping(5),
                optimizer=lambda p: torch.optim.AdamW(p, 0.01),
            ), *self.tensor_loaders()

        straight = self.check(build, *ALL_PLACES)
        self.assertEqual(straight.step, EPOCHS * 2)

    def test_saving_every_few_steps(self) -> None:
        self.check(lambda name: (self.trainer(name, save_every=4, keep=2), *self.tensor_loaders()), *FEW_PLACES)

    def test_early_stopping_and_plateau(self) -> None:
        def build(name: str) -> tuple:
            return self.trainer(
                name,
                early_stopping=EarlyStopping(1, delta=10.0),
                finish=lambda _, o: {
                    "scheduler": ReduceLROnPlateau(o, patience=0, threshold=10.0, threshold_mode="abs")
                },
            ), *self.tensor_loaders()

        straight = self.check(build, [("batch", 3)], [("epoch", 1)], [("batch", 104)])
        self.assertEqual(straight.epoch, 2)
        self.assertNotEqual(straight.optimizer.param_groups[0]["lr"], 0.05)

    def test_data_loader(self) -> None:
        def build(name: str) -> tuple:
            data = NoisyDataset()
            return self.trainer(name), DataLoader(data, 8, shuffle=True), DataLoader(TensorDataset(*self.floats()), 16)

        self.check(build, *ALL_PLACES)

    def floats(self) -> tuple[Tensor, Tensor]:
        inputs, targets = images()
        return inputs / 255, targets

    def test_data_loader_with_a_generator(self) -> None:
        def build(name: str) -> tuple:
            generator = torch.Generator().manual_seed(21)
            return (
                self.trainer(name),
                DataLoader(TensorDataset(*self.floats()), 8, shuffle=True, generator=generator),
                self.tensor_loaders()[1],
            )

        self.check(build, *ALL_PLACES)

    def test_sampler_with_a_generator(self) -> None:
        def build(name: str) -> tuple:
            data = TensorDataset(*self.floats())
            sampler = RandomSampler(data, generator=torch.Generator().manual_seed(21))
            return self.trainer(name, accumulate=4), DataLoader(data, 8, sampler=sampler), self.tensor_loaders()[1]

        self.check(build, [("batch", 4)], [("batch", 6)], [("val", 1)], [("epoch", 1)], [("epoch", 2)])

    def test_data_loader_with_workers(self) -> None:
        def build(name: str) -> tuple:
            return (
                self.trainer(name),
                DataLoader(NoisyDataset(), 8, shuffle=True, num_workers=2),
                self.tensor_loaders()[1],
            )

        self.check(build, [("batch", 4)], [("epoch", 1)], [("val", 2)])

    def test_workers_that_outlive_an_epoch(self) -> None:
        def build(name: str) -> tuple:
            data = TensorDataset(*self.floats())
            loader = DataLoader(data, 8, shuffle=True, num_workers=1, persistent_workers=True)
            return self.trainer(name), loader, None

        self.check(build, [("epoch", 1)], [("batch", 104)])

    def test_generators_by_any_name(self) -> None:
        class Shuffled(torch.utils.data.Sampler):
            def __init__(self, count: int) -> None:
                self.count, self.rng = count, torch.Generator().manual_seed(4)

            def __len__(self) -> int:
                return self.count

            def __iter__(self) -> Iterator[int]:
                return iter(torch.randperm(self.count, generator=self.rng).tolist())

        def build(name: str) -> tuple:
            data = TensorDataset(*self.floats())
            return self.trainer(name), DataLoader(data, 8, sampler=Shuffled(len(data))), None

        self.check(build, [("batch", 3)], [("epoch", 1)])

    def test_generators_at_any_depth(self) -> None:
        class Noisy(torch.utils.data.TensorDataset):
            def __init__(self, *tensors: Tensor) -> None:
                super().__init__(*tensors)
                self.rng = torch.Generator().manual_seed(6)

            def __getitem__(self, index: int) -> tuple:
                inputs, targets = super().__getitem__(index)
                return inputs + torch.rand((), generator=self.rng), targets

        class Wrapped(torch.utils.data.Sampler):
            def __init__(self, inner: torch.utils.data.Sampler) -> None:
                self.within = {"inner": [inner]}

            def __len__(self) -> int:
                return len(self.within["inner"][0])

            def __iter__(self) -> Iterator[int]:
                return iter(self.within["inner"][0])

        def build(name: str) -> tuple:
            noisy = Noisy(*self.floats())
            parts = [torch.utils.data.Subset(noisy, range(start, len(noisy), 2)) for start in (0, 1)]
            sampler = Wrapped(RandomSampler(parts[0], generator=torch.Generator().manual_seed(4)))
            return self.trainer(name), DataLoader(parts[0], 8, sampler=sampler), DataLoader(parts[1], 8)

        self.check(build, [("batch", 3)], [("epoch", 1)], [("val", 1)])
        weights = []
        for validated in (False, True):
            trainer, train, val = build(f"validated: {validated}")
            trainer.fit(train, val if validated else None, 3, verbose=False)
            weights.append(list(trainer.model.parameters()))
        self.assertTrue(all(map(torch.equal, *weights)))

    def test_generators_among_many_attributes_but_not_among_samples(self) -> None:
        class Iterated(list):
            def __iter__(self) -> Iterator:
                raise AssertionError("a loader is for the training to iterate")

        loader, (own, sample) = Iterated([1]), (torch.Generator() for _ in range(2))
        vars(loader).update({f"attribute{i}": i for i in range(300)}, rng=own, samples=[sample] * 300)
        self.assertEqual(own_generators(loader), [own])

    def test_a_batch_sampler_is_told_the_epoch(self) -> None:
        """Through the sampler inside it, which else gives the same order in each."""
        data = TensorDataset(torch.arange(12), torch.zeros(12))
        sampler = DistributedSampler(data, 1, 0)
        position = LoaderPosition(torch.device("cpu"))
        loader = DataLoader(data, batch_sampler=BatchSampler(sampler, 12, False))
        orders = [next(position.batches(loader, epoch, 0))[0].tolist() for epoch in (0, 1, 0)]
        self.assertNotEqual(orders[0], orders[1])
        self.assertEqual(orders[0], orders[2])

    def test_any_iterable(self) -> None:
        def build(name: str) -> tuple:
            inputs, targets = self.floats()
            return self.trainer(name), list(zip(inputs.split(8), targets.split(8), strict=True)), None

        self.check(build, [("batch", 1)], [("epoch", 1)], [("batch", 106)])

    def test_one_that_knows_epochs_only(self) -> None:
        """As torch's DistributedSampler does."""

        class Epochs:
            epoch = 0

            def __init__(self, batches: Any) -> None:
                self.batches = batches

            def set_epoch(self, epoch: int) -> None:
                self.epoch = epoch

            def __iter__(self) -> Iterator:
                inputs, targets = self.batches
                order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(self.epoch))
                return iter(list(zip(inputs[order].split(8), targets[order].split(8), strict=True)))

        self.check(
            lambda name: (self.trainer(name), Epochs(self.floats()), None),
            [("batch", 3)],
            [("epoch", 2)],
            [("batch", 201)],
        )


class Folders(ResumeCase):
    def setUp(self) -> None:
        super().setUp()
        from PIL import Image  # comes with torchvision

        inputs, targets = images(30)
        for i, (image, target) in enumerate(zip(inputs, targets.tolist(), strict=True)):
            folder = self.folder / "images" / f"class{target}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.frombytes("L", (8, 8), bytes(image.flatten().tolist())).save(folder / f"{i}.png")

    def build(self, name: str, workers: int) -> tuple:
        from torchvision.transforms import v2

        still = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        train = SeededImageFolder(
            self.folder / "images", v2.Compose([v2.RandomAffine(10, translate=(0.1, 0.1)), *still]), seed=4
        )
        val = SeededImageFolder(self.folder / "images", v2.Compose(still))
        return (
            self.trainer(name, accumulate=2, finish=lambda model, _: {"averages": averaged_copy(model, 0.7)}),
            folder_loader(train, 8, shuffle=True, seed=4, num_workers=workers),
            folder_loader(val, 16),
        )

    def test_without_workers(self) -> None:
        self.check(lambda name: self.build(name, 0), *FEW_PLACES)

    def test_with_two_workers(self) -> None:
        self.check(lambda name: self.build(name, 2), [("batch", 2)], [("epoch", 1)], [("val", 2), ("batch", 202)])

    def test_the_number_of_workers_changes_nothing(self) -> None:
        states = []
        for workers in (0, 2):
            trainer, train, val = self.build(f"workers{workers}", workers)
            trainer.fit(train, val, 2, verbose=False)
            states.append(copy.deepcopy(trainer.state_dict()))
        self.assertEqual(list(differences(*states)), [])


class Precisions(ResumeCase):
    def test_bf16(self) -> None:
        self.check(lambda name: (self.trainer(name, precision="bf16"), *self.tensor_loaders()), *FEW_PLACES)

    def test_fp16_with_skipped_steps(self) -> None:
        def build(name: str) -> tuple:
            trainer = self.trainer(
                name,
                precision="fp16",
                finish=lambda _, o: {"scheduler": make_schedule("cosine", o, 18)},
                scheduler_interval="step",
            )
            bad = {(0, 1), (1, 4)}
            trainer.model[5].weight.register_hook(
                lambda grad: grad + math.inf if (trainer.epoch, trainer.batch) in bad else grad
            )
            return trainer, *self.tensor_loaders()

        straight = self.check(build, [("batch", 2)], [("batch", 1), ("batch", 105)], [("epoch", 1)])
        self.assertEqual((straight.skipped, straight.step, straight.scaler.get_scale()), (2, 16, 2.0**14))


class Again(ResumeCase):
    def test_what_was_resumed_is_what_a_save_would_hold(self) -> None:
        first = self.trainer("run")
        first.fit(*self.tensor_loaders(), 1, verbose=False)
        saved = load_checkpoint(first.checkpoints.steps()[-1][1])
        again = self.trainer("run")
        torch.rand(3), random.random()
        again.resume()
        self.assertEqual(list(differences(again.state_dict(), saved)), [])


class Damage(ResumeCase):
    def build(self, name: str, **options: Any) -> tuple:
        return self.trainer(name, save_every=2, keep=5, **options), *self.tensor_loaders()

    def test_a_damaged_newest_one_falls_back_to_the_one_before(self) -> None:
        straight, train, val = self.build("straight")
        straight.fit(train, val, EPOCHS, verbose=False)
        expected = copy.deepcopy(straight.state_dict())

        trainer, train, val = self.build("run")
        trainer.on_step_end = (lambda t: t.step == 11 and os.kill(os.getpid(), signal.SIGTERM),)
        with self.assertRaises(Interrupted) as caught:
            trainer.fit(train, val, EPOCHS, verbose=False)
        content = bytearray(caught.exception.checkpoint.read_bytes())
        content[len(content) // 2] ^= 1
        caught.exception.checkpoint.write_bytes(content)

        again, train, val = self.build("run")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            self.assertEqual(again.resume().name, "step-00000010.pt")
        self.assertIn("step-00000011.pt", str(told[0].message))
        again.fit(train, val, EPOCHS, verbose=False)
        self.assertEqual(list(differences(again.state_dict(), expected)), [])

    def test_all_damaged_is_an_error_and_none_is_none(self) -> None:
        trainer, train, val = self.build("run")
        self.assertIsNone(trainer.resume())
        trainer.fit(train, val, 1, verbose=False)
        for _, path in trainer.checkpoints.steps():
            path.write_bytes(b"nonsense")
        again, _, _ = self.build("run")
        with self.assertRaisesRegex(CheckpointError, "none of the 3 checkpoints"):
            again.resume()

    def test_of_something_else(self) -> None:
        trainer, train, val = self.build("run", metadata={"dataset": "digits"})
        trainer.fit(train, val, 1, verbose=False)
        for options in (
            {"metadata": {"dataset": "mnist"}},
            {"metadata": {}},
            {"metadata": {"dataset": "digits"}, "model": network(channels=2)},
            {"metadata": {"dataset": "digits"}, "precision": "fp16"},
            {"metadata": {"dataset": "digits"}, "optimizer": lambda p: torch.optim.Adam(p, 0.05)},
        ):
            other, _, _ = self.build("run", **options)
            with self.subTest(options), self.assertRaises(CheckpointError) as caught:
                other.resume()
            self.assertNotIn("\n", str(caught.exception))
            self.assertIn("step-", str(caught.exception))

    def test_mid_epoch_with_another_loader(self) -> None:
        trainer, train, val = self.build("run")
        trainer.on_step_end = (lambda t: t.step == 3 and os.kill(os.getpid(), signal.SIGTERM),)
        with self.assertRaises(Interrupted):
            trainer.fit(train, val, EPOCHS, verbose=False)
        again, train, val = self.build("run")
        again.resume()
        with self.assertRaisesRegex(ValueError, "another kind of loader"):
            again.fit([(torch.zeros(8, 1, 8, 8), torch.zeros(8).long())], val, EPOCHS, verbose=False)

    def test_mid_epoch_with_a_shorter_loader(self) -> None:
        batches = [(torch.rand(8, 1, 8, 8), torch.arange(8) % 3)] * 4
        trainer = self.trainer("run", on_step_end=[lambda t: t.step == 3 and os.kill(os.getpid(), signal.SIGTERM)])
        with self.assertRaises(Interrupted):
            trainer.fit(batches, None, EPOCHS, verbose=False)
        again = self.trainer("run")
        again.resume()
        with self.assertRaisesRegex(ValueError, "after batch 3, the loader has 2"):
            again.fit(batches[:2], None, EPOCHS, verbose=False)


class KillingDataset(NoisyDataset):
    """Sends SIGTERM while its `at`-th item is fetched: where one waits for data, a signal is most likely to come."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at, self.fetched = at, 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.fetched += 1
        if self.fetched == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


class WhileFetching(ResumeCase):
    def states(self, name: str, places: list[int], **options: Any) -> dict[str, Any]:
        for at in [*places, 0]:
            trainer = self.trainer(name, **options)
            trainer.resume()
            try:
                trainer.fit(DataLoader(KillingDataset(at), 8, shuffle=True), None, EPOCHS, verbose=False)
            except Interrupted:
                continue
        return trainer.state_dict()

    def test_a_signal_in_any_batch(self) -> None:
        for options in ({}, {"save_every": 2}, {"accumulate": 3}):
            expected = self.states(f"whole{options}", [], **options)
            for at in (1, 5, 8, 12, 45, 50):  # the first batch, its last item, another, and in the second epoch
                with self.subTest(options, at=at):
                    found = self.states(f"cut{options}{at}", [at], **options)
                    self.assertEqual(list(differences(found, expected)), [])

    def test_dead_workers_before_the_first_batch(self) -> None:
        """The workers die of the signal before a batch came: saved is the state before the epoch's order was drawn."""

        class Dying:
            def __init__(self, dead: bool) -> None:
                self.batches, self.dead = DataLoader(NoisyDataset(), 8, shuffle=True), dead

            def __iter__(self) -> Iterator:
                return self.first_dead(iter(self.batches))  # iter() draws, here and now

            def first_dead(self, batches: Iterator) -> Iterator:
                if self.dead:
                    os.kill(os.getpid(), signal.SIGTERM)
                    raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
                yield from batches

        def end(name: str, deaths: list[bool]) -> dict[str, Any]:
            for dead in deaths:
                trainer = self.trainer(name)
                trainer.resume()
                with contextlib.suppress(Interrupted):
                    trainer.fit(Dying(dead), None, EPOCHS, verbose=False)
            return trainer.state_dict()

        self.assertEqual(list(differences(end("cut", [True, False]), end("whole", [False]))), [])

    def test_dead_workers_at_the_start_of_a_validation(self) -> None:
        def dead() -> Iterator:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
            yield

        trainer = self.trainer("run")
        train, val = self.tensor_loaders()
        with self.assertRaises(Interrupted) as caught:
            trainer.fit(train, dead(), EPOCHS, verbose=False)
        self.assertEqual(load_checkpoint(caught.exception.checkpoint)["batch"], len(train))
        again = self.trainer("run")
        again.resume()
        again.fit(train, val, EPOCHS, verbose=False)
        whole = self.trainer("whole")
        whole.fit(*self.tensor_loaders(), EPOCHS, verbose=False)
        self.assertEqual(list(differences(again.state_dict(), whole.state_dict())), [])

    def test_generators_of_a_batch_sampler(self) -> None:
        def loader() -> DataLoader:
            generator = torch.Generator().manual_seed(4)
            data = TensorDataset(images()[0] / 255, images()[1])
            return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, generator=generator), 8, False))

        whole = self.trainer("whole")
        whole.fit(loader(), None, EPOCHS, verbose=False)
        cut = self.trainer("cut")
        cut.on_epoch_end = (lambda t: t.epoch == 1 and os.kill(os.getpid(), signal.SIGTERM),)
        with self.assertRaises(Interrupted):
            cut.fit(loader(), None, EPOCHS, verbose=False)
        again = self.trainer("cut")
        again.resume()
        again.fit(loader(), None, EPOCHS, verbose=False)
        self.assertEqual(list(differences(again.state_dict(), whole.state_dict())), [])


class ConstructorWins(ResumeCase):
    def test_patience_of_the_constructor_state_of_the_checkpoint(self) -> None:
        first = self.trainer("run", early_stopping=EarlyStopping(1, delta=10.0))
        first.fit(*self.tensor_loaders(), 6, verbose=False)
        self.assertEqual(first.epoch, 2)
        again = self.trainer("run", early_stopping=EarlyStopping(3, delta=10.0))
        again.resume()
        again.fit(*self.tensor_loaders(), 6, verbose=False)
        self.assertEqual(again.epoch, 4)  # one epoch without improvement was seen before

        straight = self.trainer("straight", early_stopping=EarlyStopping(3, delta=10.0))
        straight.fit(*self.tensor_loaders(), 6, verbose=False)
        self.assertEqual(list(differences(again.state_dict(), straight.state_dict())), [])


if __name__ == "__main__":
    unittest.main()
