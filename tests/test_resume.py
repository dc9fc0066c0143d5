"""Stop a training anywhere, continue it in a new Trainer, and compare with the training that was never stopped."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchbasics as tb

from .common import same_weights

X = torch.randn(22, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (22,), generator=torch.Generator().manual_seed(2))
EPOCHS = 3


class Noisy(torch.utils.data.TensorDataset):
    """Samples that are augmented from torch's global generator."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(6), y


class Stateful:
    """A loader with a position of its own, as torchdata's StatefulDataLoader has one."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, self.given = self.given, 0
        for number in range(start, 6):
            self.given = number + 1
            yield X[4 * number : 4 * number + 4], Y[4 * number : 4 * number + 4]
        self.given = 0

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


class PythonRandom:
    """A loader without a length, whose order comes from Python's random."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = random.sample(range(22), 22)
        for start in range(0, 22, 4):
            part = order[start : start + 4]
            yield X[part], Y[part]


def shared_generator(shuffle: bool = True) -> torch.utils.data.DataLoader:
    generator = torch.Generator().manual_seed(5)
    return torch.utils.data.DataLoader(Noisy(X, Y), 4, shuffle=shuffle, generator=generator)


LOADERS: dict[str, Callable[[], Any]] = {
    "TensorLoader": lambda: tb.TensorLoader(X, Y, 4, shuffle=True, seed=3),
    "list": lambda: [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 22, 4)],
    "DataLoader, shuffled": lambda: torch.utils.data.DataLoader(Noisy(X, Y), 4, shuffle=True),
    "DataLoader with a generator": shared_generator,
    "loader with a position": Stateful,
    "loader without a length": PythonRandom,
}


def make_trainer(folder: str | None, stop: tuple[int, Any] | None = None, **options: Any) -> tb.Trainer:
    """Return a trainer that sends itself SIGTERM after the step `stop`: (epoch, batch) or (epoch, "validation")."""
    torch.manual_seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    averages = tb.averaged_copy(model, 0.9) if options.pop("averaged", False) else None
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)

    def stop_after_step(trainer: tb.Trainer) -> None:
        if stop == (trainer.epoch, trainer.batch):
            os.kill(os.getpid(), signal.SIGTERM)

    def stop_in_validation(outputs: Tensor, targets: Tensor) -> Tensor:
        if stop == (trainer.epoch - 1, "validation") and not torch.is_grad_enabled() and not trainer.model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return outputs[:, 0]

    trainer = tb.Trainer(
        model, nn.CrossEntropyLoss(), optimizer, "cpu", schedule, checkpoint_dir=folder, clip_norm=1.0,
        averages=averages, early_stopping=tb.EarlyStopping(50), metrics={"first": stop_in_validation},
        on_step_end=[stop_after_step], **options)  # fmt: skip
    return trainer


def train(trainer: tb.Trainer, make_loader: Callable[[], Any]) -> tb.Trainer:
    loader = make_loader()
    val_loader = loader if isinstance(loader, torch.utils.data.DataLoader) else [(X[:9], Y[:9]), (X[9:], Y[9:])]
    trainer.fit(loader, val_loader, EPOCHS, verbose=False)
    return trainer


class ResumeTest(unittest.TestCase):
    def compare(self, make_loader: Callable[[], Any], stops: list[tuple[int, Any]], **options: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            straight = train(make_trainer(folder, **options), make_loader)
        for stop in stops:
            with self.subTest(stop=stop), tempfile.TemporaryDirectory() as folder:
                with self.assertRaises(tb.Interrupted) as caught:
                    train(make_trainer(folder, stop, **options), make_loader)
                self.assertEqual(caught.exception.signum, signal.SIGTERM)
                self.assertTrue(caught.exception.checkpoint.is_file())
                resumed = make_trainer(folder, **options)
                self.assertEqual(resumed.resume(), caught.exception.checkpoint)
                torch.manual_seed(99)  # whatever draws between the load and fit changes nothing
                random.seed(99)
                train(resumed, make_loader)
                self.assertTrue(same_weights(straight.model, resumed.model))
                self.assertTrue(same_weights(straight.evaluated_model, resumed.evaluated_model))
                self.assertEqual(str(straight.optimizer.state_dict()), str(resumed.optimizer.state_dict()))
                self.assertEqual(straight.history, resumed.history)
                self.assertEqual(straight.epoch_records, resumed.epoch_records)
                self.assertEqual(straight.best_epoch, resumed.best_epoch)

    def test_a_run_stopped_after_any_step_or_in_any_validation_ends_as_if_never_stopped(self) -> None:
        for name, make_loader in LOADERS.items():
            thorough = name in ("TensorLoader", "DataLoader, shuffled")
            batches = (*range(1, 7), "validation") if thorough else (1, 6, "validation")
            stops = [(1, batch) for batch in batches] + [(0, 3), (2, "validation")]
            with self.subTest(loader=name):
                self.compare(make_loader, stops)

    def test_a_run_stopped_twice_in_the_same_validation_ends_as_if_never_stopped(self) -> None:
        for name in ("TensorLoader", "DataLoader with a generator"):
            with tempfile.TemporaryDirectory() as folder:
                straight = train(make_trainer(folder), LOADERS[name])
            with self.subTest(loader=name), tempfile.TemporaryDirectory() as folder:
                for stop in ((1, "validation"), (1, "validation"), None):
                    trainer = make_trainer(folder, stop)
                    trainer.resume()
                    with contextlib.suppress(tb.Interrupted):
                        train(trainer, LOADERS[name])
                    self.assertEqual(trainer.pending is None, stop is None)
                self.assertTrue(same_weights(straight.model, trainer.model))
                self.assertEqual(straight.history, trainer.history)

    def test_a_run_with_accumulation_and_averages_resumes_exactly_also_after_its_last_short_window(self) -> None:
        for name in ("TensorLoader", "DataLoader, shuffled", "loader with a position"):
            with self.subTest(loader=name):
                self.compare(LOADERS[name], [(1, 4), (1, 6), (1, "validation")], accumulate=4, averaged=True)

    def test_a_loader_with_workers_resumes_exactly(self) -> None:
        def make_loader() -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader(Noisy(X, Y), 4, shuffle=True, num_workers=1)

        self.compare(make_loader, [(1, 2)])

    def test_fp16_resumes_with_its_loss_scale(self) -> None:
        self.compare(LOADERS["list"], [(1, 3)], precision="fp16")

    def test_a_signal_that_also_kills_the_workers_before_the_first_batch_loses_nothing(self) -> None:
        class Killed:
            """Draw an order from torch's generator; on the first batch of the second epoch behave as if killed."""

            def __init__(self, epoch: int | None) -> None:
                self.epochs_left = epoch

            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                order = torch.randperm(22)
                if self.epochs_left == 0:
                    os.kill(os.getpid(), signal.SIGTERM)
                    raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")
                self.epochs_left = None if self.epochs_left is None else self.epochs_left - 1
                for part in order.split(4):
                    yield X[part], Y[part]

        with tempfile.TemporaryDirectory() as folder:
            straight = train(make_trainer(folder), lambda: Killed(None))
        with tempfile.TemporaryDirectory() as folder:
            with self.assertRaises(tb.Interrupted):
                train(make_trainer(folder), lambda: Killed(1))
            resumed = make_trainer(folder)
            resumed.resume()
            train(resumed, lambda: Killed(None))
            self.assertTrue(same_weights(straight.model, resumed.model))
            self.assertEqual(straight.history, resumed.history)

    def test_save_every_saves_within_an_epoch_and_a_kill_loses_only_the_steps_since(self) -> None:
        make_loader = LOADERS["TensorLoader"]
        with tempfile.TemporaryDirectory() as folder:
            straight = train(make_trainer(folder), make_loader)
        with tempfile.TemporaryDirectory() as folder:

            class Killed(BaseException):
                pass

            def kill(trainer: tb.Trainer) -> None:
                if trainer.step == 9:
                    raise Killed

            first = make_trainer(folder, save_every=4)
            first.on_step_end.append(kill)
            with self.assertRaises(Killed):
                train(first, make_loader)
            second = make_trainer(folder, save_every=4)
            self.assertEqual(second.resume(), Path(folder, "step-00000008.pt"))
            train(second, make_loader)
            self.assertTrue(same_weights(straight.model, second.model))
            self.assertEqual(straight.history, second.history)

    def test_the_end_of_a_run_that_was_stopped_in_its_last_validation_is_saved(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(2):
                trainer = make_trainer(folder, (2, "validation"), save_every=2)
                trainer.resume()
                with self.assertRaises(tb.Interrupted):
                    train(trainer, LOADERS["list"])
                self.assertIsNotNone(trainer.pending)
            finished = make_trainer(folder, save_every=2)
            finished.resume()
            train(finished, LOADERS["list"])
            again = make_trainer(folder, save_every=2)
            again.resume()
            self.assertIsNone(again.pending)
            self.assertEqual(again.history, finished.history)

    def test_early_stopping_goes_on_counting_after_a_resume_and_a_stopped_run_stays_stopped(self) -> None:
        def trainer(folder: str, patience: int) -> tb.Trainer:
            torch.manual_seed(0)
            model = nn.Linear(6, 3)
            optimizer = torch.optim.SGD(model.parameters(), 10.0)  # gets worse from the second epoch on
            stopping = tb.EarlyStopping(patience)
            return tb.Trainer(model, nn.CrossEntropyLoss(), optimizer, checkpoint_dir=folder, early_stopping=stopping)

        data = LOADERS["list"]()
        with tempfile.TemporaryDirectory() as folder:
            first = trainer(folder, 3)
            first.fit(data, data, 50, verbose=False)
            self.assertTrue(first.stopped)
            second = trainer(folder, 3)
            second.resume()
            second.fit(data, data, 50, verbose=False)
            self.assertEqual(second.epoch, first.epoch)
            third = trainer(folder, 30)
            third.resume()
            third.fit(data, data, first.epoch + 1, verbose=False)
            self.assertEqual(third.epoch, first.epoch + 1)

    def test_best_is_not_overwritten_by_a_worse_epoch_after_a_resume(self) -> None:
        data = LOADERS["list"]()
        with tempfile.TemporaryDirectory() as folder:
            first = make_trainer(folder)
            first.fit(data, data, 2, verbose=False)
            score = first.best_score
            second = make_trainer(folder)
            second.resume()
            self.assertEqual(second.best_score, score)

    def test_best_weights_that_are_missing_damaged_or_another_runs_are_found_before_training_goes_on(self) -> None:
        data = LOADERS["list"]()
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
            for path in (folder, other):
                make_trainer(path).fit(data, data, 1, verbose=False)
            best = Path(folder, "best.pt")
            intact = best.read_bytes()
            flipped = intact[:500] + bytes([intact[500] ^ 1]) + intact[501:]
            for content, text in (
                (Path(other, "best.pt").read_bytes(), "best.pt: from another run"),
                (flipped, "best.pt: damaged"),
                (None, "best.pt: missing"),
            ):
                best.unlink() if content is None else best.write_bytes(content)
                with self.assertRaisesRegex(tb.CheckpointError, text):
                    make_trainer(folder).resume()
            best.write_bytes(intact)
            self.assertIsNotNone(make_trainer(folder).resume())

    def test_a_checkpoint_of_another_setup_is_refused_with_its_file(self) -> None:
        data = LOADERS["list"]()
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(folder).fit(data, data, 1, verbose=False)
            model = nn.Linear(6, 3)
            adam = tb.Trainer(model, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()), checkpoint_dir=folder)
            with self.assertRaisesRegex(tb.CheckpointError, r"step-\d+\.pt: .*SGD.*Adam"):
                adam.resume()
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau
            sgd = torch.optim.SGD(model.parameters(), 0.1)
            other = tb.Trainer(model, nn.CrossEntropyLoss(), sgd, scheduler=schedule(sgd), checkpoint_dir=folder)
            with self.assertRaisesRegex(tb.CheckpointError, r"(?s)step-\d+\.pt: .*Missing key"):
                other.resume()

    def test_a_new_run_in_the_folder_of_an_earlier_one_is_refused(self) -> None:
        data = LOADERS["list"]()
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(folder).fit(data, data, 1, verbose=False)
            with self.assertRaisesRegex(ValueError, "holds an earlier run; call resume"):
                make_trainer(folder).fit(data, data, 1, verbose=False)

    def test_a_loader_with_fewer_batches_than_were_done_is_refused(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with self.assertRaises(tb.Interrupted):
                train(make_trainer(folder, (0, 5)), LOADERS["list"])
            trainer = make_trainer(folder)
            trainer.resume()
            with self.assertRaisesRegex(ValueError, "same data set"):
                trainer.fit(LOADERS["list"]()[:3], LOADERS["list"](), 1, verbose=False)

    def test_another_data_set_after_a_resume_warns(self) -> None:
        data = LOADERS["list"]()
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(folder).fit(data, data, 1, verbose=False)
            trainer = make_trainer(folder)
            trainer.resume()
            with self.assertWarnsRegex(UserWarning, "has 4 batches, it had 6"):
                trainer.fit(data[:4], data, 2, verbose=False)

    def test_validating_logging_and_saving_change_no_weight(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            often = make_trainer(folder, save_every=1)
            often.on_step_end.append(lambda trainer: trainer.validate(shared_generator()))
            train(often, LOADERS["DataLoader, shuffled"])
        seldom = make_trainer(None)
        train(seldom, LOADERS["DataLoader, shuffled"])
        self.assertTrue(same_weights(often.model, seldom.model))

    def test_a_second_fit_continues_to_the_total_of_its_epochs(self) -> None:
        once = train(make_trainer(None), LOADERS["TensorLoader"])
        twice = make_trainer(None)
        loader, val_loader = LOADERS["TensorLoader"](), [(X[:9], Y[:9]), (X[9:], Y[9:])]
        twice.fit(loader, val_loader, 1, verbose=False)
        twice.fit(loader, val_loader, EPOCHS, verbose=False)
        self.assertEqual(once.history, twice.history)
        self.assertTrue(same_weights(once.model, twice.model))
