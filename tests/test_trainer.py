"""Trainer, compared with loops written by hand."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import signal
import tempfile
import unittest
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchbasics as tb

from .common import same_weights

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(2))


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Return pairs cut from X and Y, one after the other."""
    return list(zip(X.split([*sizes, 40 - sum(sizes)]), Y.split([*sizes, 40 - sum(sizes)]), strict=True))[: len(sizes)]


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def make_trainer(model: Any = None, criterion: Any = None, rate: float = 0.1, **options: Any) -> tb.Trainer:
    model = model or make_model()
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    return tb.Trainer(model, criterion or nn.CrossEntropyLoss(), optimizer, **options)


def train_by_hand(loader: Any, epochs: int, criterion: Any = None, model: nn.Module | None = None) -> nn.Module:
    """Return what a plain loop makes of the model of `make_trainer`."""
    model = model or make_model()
    criterion = criterion or nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()
    return model


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


class LoopTest(unittest.TestCase):
    def test_fit_trains_to_the_same_weights_as_a_loop_by_hand(self) -> None:
        loader = batches(16, 16, 8)
        trainer = make_trainer()
        trainer.fit(loader, loader, 3, verbose=False)
        self.assertTrue(same_weights(trainer.model, train_by_hand(loader, 3)))
        self.assertEqual((trainer.epoch, trainer.step), (3, 9))

    def test_mean_loss_and_accuracy_are_over_samples_not_over_batches(self) -> None:
        loader = batches(16, 16, 8)
        trainer = make_trainer()
        with torch.no_grad():
            outputs = trainer.model(X)
        loss, accuracy = trainer.validate(loader)
        self.assertAlmostEqual(loss, F.cross_entropy(outputs, Y).item(), places=6)
        self.assertEqual(accuracy, int((outputs.argmax(1) == Y).sum()) / 40)

    def test_each_list_of_the_history_has_one_entry_per_epoch(self) -> None:
        trainer = make_trainer(clip_norm=1.0)
        loader = batches(20, 20)
        trainer.fit(loader, None, 1, verbose=False)
        history = trainer.fit(loader, loader, 3, verbose=False)
        self.assertEqual(set(history), {"train_loss", "train_acc", "val_loss", "val_acc", "lr", "grad_norm"})
        self.assertEqual({len(values) for values in history.values()}, {3})
        self.assertEqual(history["val_loss"][0], None)
        self.assertEqual(history["lr"], [0.1] * 3)

    def test_train_one_epoch_and_validate_can_be_called_by_hand(self) -> None:
        loader = tb.TensorLoader(X, Y, 16, shuffle=True, seed=1)
        trainer = make_trainer()
        by_hand = [trainer.train_one_epoch(loader) for _ in range(2)]
        other = make_trainer()
        other.fit(tb.TensorLoader(X, Y, 16, shuffle=True, seed=1), None, 2, verbose=False)
        self.assertTrue(same_weights(trainer.model, other.model))
        self.assertEqual([loss for loss, _ in by_hand], other.history["train_loss"])
        self.assertEqual(trainer.history, {})
        history = trainer.fit(loader, None, 3, verbose=False)  # the epochs by hand have no value in the history
        self.assertEqual([loss is None for loss in history["train_loss"]], [True, True, False])
        self.assertEqual((trainer.best_epoch, len(trainer.epoch_records)), (2, 3))

    def test_loaders_without_a_length_work(self) -> None:
        class Stream:
            def __iter__(self) -> Any:
                return iter(batches(16, 16, 8))

        class Samples(torch.utils.data.IterableDataset):
            def __iter__(self) -> Any:
                return zip(X, Y, strict=True)

        for stream in (Stream(), torch.utils.data.DataLoader(Samples(), 16)):  # len() of the latter raises TypeError
            trainer = make_trainer()
            trainer.fit(stream, stream, 1, verbose=False)
            self.assertTrue(same_weights(trainer.model, train_by_hand(batches(16, 16, 8), 1)))

    def test_an_iterator_or_an_empty_loader_is_refused(self) -> None:
        for loader in (iter(batches(16)), (pair for pair in batches(16)), []):
            with self.assertRaisesRegex(ValueError, "iterator|no batch"):
                make_trainer().fit(loader, None, 1, verbose=False)
            with self.assertRaisesRegex(ValueError, "iterator|no target"):
                make_trainer().fit(batches(16), loader, 1, verbose=False)

    def test_fit_prints_a_line_per_epoch_and_says_when_there_is_nothing_to_do(self) -> None:
        trainer, out = make_trainer(), io.StringIO()
        with contextlib.redirect_stdout(out):
            trainer.fit(batches(40), batches(40), 2)
            trainer.fit(batches(40), batches(40), 2)
        lines = out.getvalue().splitlines()
        self.assertEqual(len(lines), 3)
        self.assertRegex(lines[1], r"epoch 2/2  train_loss \d\.\d{4}  train_acc .*%  val_loss")
        self.assertEqual(lines[2], "nothing to do: 2 epochs are done")

    def test_callbacks_come_after_the_step_and_after_the_epoch(self) -> None:
        seen: list[tuple[str, int, int]] = []
        trainer = make_trainer(
            accumulate=2,
            on_step_end=[lambda t: seen.append(("step", t.step, t.batch))],
            on_epoch_end=[lambda t: seen.append(("epoch", t.epoch, len(t.history["val_loss"])))],
        )
        trainer.fit(batches(16, 16, 8), batches(40), 1, verbose=False)
        self.assertEqual(seen, [("step", 1, 2), ("step", 2, 3), ("epoch", 1, 1)])


class AccumulationTest(unittest.TestCase):
    def test_a_window_of_unequal_batches_equals_one_batch(self) -> None:
        weighted = nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 0.2]), ignore_index=2)
        for criterion in (nn.CrossEntropyLoss(), weighted, nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1)):
            parts = make_trainer(criterion=criterion, accumulate=4)
            parts.fit(batches(4, 7, 9, 20), None, 5, verbose=False)
            whole = train_by_hand(batches(40), 5, criterion)
            self.assertLess(largest_difference(parts.model, whole), 1e-6)

    def test_the_last_window_is_shorter_and_windows_never_span_epochs(self) -> None:
        for accumulate, steps in ((4, [[(0, 4), (4, 7)]] * 2), (10, [[(0, 7)]] * 2)):
            trainer = make_trainer(accumulate=accumulate)
            loader = batches(6, 6, 6, 6, 6, 6, 4)
            trainer.fit(loader, None, 2, verbose=False)
            model = make_model()
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            for first, last in (window for epoch in steps for window in epoch):
                inputs, targets = (torch.cat(part) for part in zip(*loader[first:last], strict=True))
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
            self.assertLess(largest_difference(trainer.model, model), 1e-6)
            self.assertEqual(trainer.step, sum(map(len, steps)))

    def test_a_batch_that_counts_nothing_contributes_nothing(self) -> None:
        ignored = (X[:10] * 1000, torch.full((10,), -100))
        trainer = make_trainer(accumulate=2)
        trainer.fit([ignored, *batches(40)], None, 2, verbose=False)
        self.assertTrue(same_weights(trainer.model, train_by_hand(batches(40), 2)))

    def test_a_window_that_counts_nothing_takes_no_step_and_warns(self) -> None:
        ignored = (X[:10], torch.full((10,), -100))
        trainer = make_trainer()
        with self.assertWarnsRegex(UserWarning, "no target counts"):
            trainer.fit([ignored, *batches(40)], None, 1, verbose=False)
        self.assertEqual(trainer.step, 1)
        with self.assertRaisesRegex(ValueError, "target that counts"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_trainer().fit([ignored], None, 1, verbose=False)

    def test_a_count_that_is_not_the_loss_s_is_refused_also_if_padding_comes_late(self) -> None:
        class Text(tb.Trainer):
            def compute_loss(self, batch: Any) -> tuple[Tensor, Any, Any]:
                outputs = self.model(batch["x"])
                return self.criterion(outputs, batch["y"]), outputs, batch["y"]

        padded = Y.clone()
        padded[:3] = -100
        model = make_model()
        trainer = Text(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1))
        with self.assertRaisesRegex(ValueError, "mean over 37 targets, but .* returned 40; override count_targets"):
            trainer.fit([{"x": X, "y": Y}, {"x": X, "y": padded}], None, 1, verbose=False)


class OwnLossTest(unittest.TestCase):
    def test_compute_loss_serves_training_and_validation(self) -> None:
        class Autoencoder(tb.Trainer):
            def compute_loss(self, batch: Any) -> tuple[Tensor, Any, Any]:
                return F.mse_loss(self.model(batch), batch), None, None

        torch.manual_seed(0)
        model = nn.Linear(6, 6)
        before = copy.deepcopy(model)
        trainer = Autoencoder(model, None, torch.optim.SGD(model.parameters(), 0.1))
        history = trainer.fit(list(X.split(20)), list(X.split(20)), 2, verbose=False)
        optimizer = torch.optim.SGD(before.parameters(), 0.1)
        for batch in list(X.split(20)) * 2:
            optimizer.zero_grad()
            F.mse_loss(before(batch), batch).backward()
            optimizer.step()
        self.assertTrue(same_weights(model, before))
        self.assertAlmostEqual(history["val_loss"][1], F.mse_loss(before(X), X).item(), places=6)
        self.assertEqual(history["val_acc"], [None, None])

    def test_count_targets_weighs_the_tokens_of_padded_text(self) -> None:
        class Tokens(tb.Trainer):
            def compute_loss(self, batch: Any) -> tuple[Tensor, Any, Any]:
                outputs = self.model(batch["x"]).transpose(1, 2)  # (B, C, T)
                return self.criterion(outputs, batch["y"]), outputs, batch["y"]

            def count_targets(self, batch: Any) -> Tensor:
                return (batch["y"] != -100).sum()

        x, y = torch.randn(8, 5, 6), torch.randint(0, 3, (8, 5))
        for i in range(8):
            y[i, i % 5 :] = -100
        results = []
        for accumulate, parts in ((1, [slice(0, 8)]), (3, [slice(0, 3), slice(3, 4), slice(4, 8)])):
            model = make_model()
            sgd = torch.optim.SGD(model.parameters(), 0.1)
            trainer = Tokens(model, nn.CrossEntropyLoss(), sgd, accumulate=accumulate)
            trainer.fit([{"x": x[part], "y": y[part]} for part in parts], None, 4, verbose=False)
            results.append((model, trainer.history["train_acc"]))
        self.assertLess(largest_difference(results[0][0], results[1][0]), 1e-6)
        self.assertEqual(results[0][1], results[1][1])

    def test_a_criterion_with_parameters_is_trained_and_resumed(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))

            def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
                return F.cross_entropy(outputs * self.scale, targets)

        def trainer(folder: str) -> tb.Trainer:
            model, criterion = make_model(), Scaled()
            optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], 0.1)
            return tb.Trainer(model, criterion, optimizer, checkpoint_dir=folder)

        with tempfile.TemporaryDirectory() as folder:
            first = trainer(folder)
            first.fit(batches(40), batches(40), 2, verbose=False)
            self.assertNotEqual(float(first.criterion.scale), 1.0)
            second = trainer(folder)
            second.resume()
            self.assertEqual(float(second.criterion.scale), float(first.criterion.scale))


class StepTest(unittest.TestCase):
    def test_the_gradient_is_clipped_by_norm_as_by_hand_and_its_mean_norm_is_recorded(self) -> None:
        trainer = make_trainer(clip_norm=0.1)
        history = trainer.fit(batches(20, 20), None, 2, verbose=False)
        model, norms = make_model(), []
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for inputs, targets in batches(20, 20) * 2:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
            optimizer.step()
        self.assertTrue(same_weights(trainer.model, model))
        self.assertEqual(history["grad_norm"], [sum(norms[:2]) / 2, sum(norms[2:]) / 2])

    def test_the_gradient_is_clipped_by_value(self) -> None:
        trainer = make_trainer(clip_value=0.01)
        before = copy.deepcopy(trainer.model)
        trainer.fit(batches(40), None, 1, verbose=False)
        self.assertAlmostEqual(largest_difference(trainer.model, before), 0.1 * 0.01, places=7)

    def test_fp16_clips_after_unscaling(self) -> None:
        trainer = make_trainer(precision="fp16", clip_norm=0.1)
        history = trainer.fit(batches(40), None, 1, verbose=False)
        model = make_model()
        F.cross_entropy(model(X), Y).backward()
        norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        self.assertAlmostEqual(history["grad_norm"][0], norm, delta=0.01 * norm)

    def test_a_schedule_is_stepped_per_epoch_or_per_step_as_its_kind_says(self) -> None:
        def rates(make_schedule: Any, **options: Any) -> list[float | None]:
            model = make_model()
            optimizer = torch.optim.SGD(model.parameters(), 1.0)
            trainer = tb.Trainer(model, nn.CrossEntropyLoss(), optimizer, scheduler=make_schedule(optimizer), **options)
            return trainer.fit(batches(20, 20), None, 2, verbose=False)["lr"]

        schedules = torch.optim.lr_scheduler
        self.assertEqual(rates(lambda o: schedules.ExponentialLR(o, 0.5)), [1.0, 0.5])
        self.assertEqual(rates(lambda o: schedules.ExponentialLR(o, 0.5), scheduler_interval="step"), [0.25, 0.0625])
        self.assertAlmostEqual(rates(lambda o: tb.warmup_lr_scheduler(o, 4, 0.2))[0], 0.6)
        one_cycle = rates(lambda o: schedules.OneCycleLR(o, 1.0, 5, cycle_momentum=False))
        self.assertLess(one_cycle[1], 0.1)

    def test_schedule_and_averages_do_not_move_when_fp16_skips_a_step(self) -> None:
        class Overflow(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                outputs = super().forward(x)
                if x[0, 0] > 100:
                    outputs.register_hook(lambda gradient: gradient * torch.inf)
                return outputs

        torch.manual_seed(0)
        model = Overflow(6, 3)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        averages = tb.averaged_copy(model, 0.9)
        options = {"scheduler": schedule, "scheduler_interval": "step", "precision": "fp16", "averages": averages}
        trainer = tb.Trainer(model, nn.MSELoss(), optimizer, **options)
        large = X.clone()
        large[0, 0] = 101.0
        weight = model.weight.detach().clone()
        trainer.fit([(X, torch.zeros(40, 3))], None, 1, verbose=False)
        step, updated = trainer.step, averages.updates
        self.assertFalse(torch.equal(weight, model.weight))
        self.assertFalse(trainer.train_step([((large, torch.zeros(40, 3)), 40.0)], 40.0))
        self.assertEqual((trainer.step, averages.updates, optimizer.param_groups[0]["lr"]), (step, updated, 0.5))

    def test_averages_are_the_mean_over_steps_and_are_validated_and_kept_as_best(self) -> None:
        seen = []
        model = make_model()
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(model, averages=tb.averaged_copy(model, 0.5), checkpoint_dir=folder)
            trainer.on_step_end.append(lambda t: seen.append(t.model[0].weight.detach().clone()))
            trainer.fit(batches(20, 20), batches(40), 1, verbose=False)
            best = tb.load_checkpoint(Path(folder, "best.pt"))["model_state_dict"]
        expected = seen[0] + (1 - min(0.5, 1 - 2 / 3)) * (seen[1] - seen[0])
        torch.testing.assert_close(trainer.averages.module[0].weight, expected)
        torch.testing.assert_close(best["0.weight"], expected)
        loss = F.cross_entropy(trainer.averages.module(X), Y).item()
        self.assertAlmostEqual(trainer.history["val_loss"][0], loss, places=6)


class ModelTest(unittest.TestCase):
    def test_submodules_in_eval_stay_there_and_a_model_in_eval_as_a_whole_is_trained(self) -> None:
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        model[1].eval()
        mean = model[1].running_mean.clone()
        make_trainer(model).fit(batches(40), batches(40), 2, verbose=False)
        self.assertEqual([m.training for m in model], [True, False, True, True])
        self.assertTrue(torch.equal(mean, model[1].running_mean))
        make_trainer(model.eval()).fit(batches(40), batches(40), 1, verbose=False)
        self.assertTrue(model[2].training)

    def test_validation_changes_no_mode_buffer_or_random_state(self) -> None:
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
        trainer = make_trainer(model)
        before, random_state = copy.deepcopy(model), torch.get_rng_state()
        generator = torch.Generator().manual_seed(3)
        data = torch.utils.data.TensorDataset(X, Y)
        loader = torch.utils.data.DataLoader(data, 8, shuffle=True, generator=generator)
        state = generator.get_state()
        trainer.validate(loader)
        self.assertTrue(same_weights(model, before))
        self.assertTrue(model[2].training)
        self.assertTrue(torch.equal(random_state, torch.get_rng_state()))
        self.assertTrue(torch.equal(state, generator.get_state()))

    def test_validating_the_training_data_in_mid_epoch_leaves_their_epoch_alone(self) -> None:
        class Data(torch.utils.data.TensorDataset):
            def set_epoch(self, epoch: int) -> None:
                self.epoch = epoch

        def validate(trainer: tb.Trainer) -> None:
            trainer.validate(other)
            seen.append(data.epoch)

        data = Data(X, Y)
        for part in (data, torch.utils.data.Subset(data, range(40))):  # a part of the data knows the epoch too
            seen: list[int] = []
            loader, other = (torch.utils.data.DataLoader(part, 20) for _ in range(2))
            make_trainer(on_step_end=[validate]).fit(loader, None, 2, verbose=False)
            self.assertEqual(seen, [0, 0, 1, 1])

    def test_a_criterion_that_is_replaced_counts_by_its_own_class_weights(self) -> None:
        trainer = make_trainer(criterion=nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0])))
        trainer.validate(batches(40))
        weight = torch.tensor([5.0, 1.0, 0.5])
        trainer.criterion = nn.CrossEntropyLoss(weight)
        self.assertAlmostEqual(float(trainer.count_targets((X, Y))), float(weight[Y].sum()), places=4)

    def test_buffers_that_appear_or_grow_survive_averages_and_resume(self) -> None:
        class Counting(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                if self.training:
                    seen = getattr(self, "seen", torch.zeros(0)).numel() + 1
                    self.register_buffer("seen", torch.full((seen,), torch.inf))
                return super().forward(x)

        model = Counting(6, 3)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(model, averages=tb.averaged_copy(model, 0.9), checkpoint_dir=folder)
            trainer.fit(batches(20, 20), batches(40), 2, verbose=False)
            self.assertEqual(trainer.averages.module.seen.shape, (4,))

    def test_a_compiled_model_is_saved_under_the_names_of_the_plain_one(self) -> None:
        model = make_model()
        compiled = torch.compile(model, backend="eager")
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(compiled, checkpoint_dir=folder).fit(batches(40), batches(40), 1, verbose=False)
            saved = tb.load_checkpoint(Path(folder, "best.pt"))["model_state_dict"]
            again = make_trainer(checkpoint_dir=folder)
            again.resume()
        self.assertEqual(list(saved), list(make_model().state_dict()))
        self.assertTrue(same_weights(again.model, model))

    def test_batches_may_be_nested_and_hold_anything(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(6, 3)

            def forward(self, pair: Any) -> Tensor:
                (left, right), names = pair["parts"], pair["names"]
                assert len(names) == len(left)
                return self.linear(left + right)

        loader = [({"parts": (x, x), "names": [str(i) for i in range(len(x))]}, y) for x, y in batches(20, 20)]
        history = make_trainer(Two()).fit(loader, loader, 1, verbose=False)
        self.assertIsNotNone(history["val_acc"][0])


class MetricsTest(unittest.TestCase):
    def test_metrics_per_target_and_means_are_weighted_by_targets(self) -> None:
        def per_target(outputs: Tensor, targets: Tensor) -> Tensor:
            values = (outputs.argmax(1) == targets).float()
            return torch.where(targets == 0, torch.nan, values)  # class 0 does not count

        def mean(outputs: Tensor, targets: Tensor) -> float:
            return float((outputs.argmax(1) == targets).float().mean())

        trainer = make_trainer(metrics={"others": per_target, "mean": mean})
        trainer.fit(batches(16, 16, 8), batches(16, 16, 8), 1, verbose=False)
        right = (trainer.model(X).argmax(1) == Y).float()
        self.assertAlmostEqual(trainer.history["val_others"][0], right[Y != 0].mean().item(), places=6)
        self.assertAlmostEqual(trainer.history["val_mean"][0], right.mean().item(), places=6)
        self.assertEqual(trainer.history["val_acc"][0], int(right.sum()) / 40)

    def test_ignored_targets_and_class_weights_do_not_change_metrics(self) -> None:
        targets = Y.clone()
        targets[:10] = -100
        criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 9.0, 1.0]))
        top1 = {"top1": lambda outputs, targets: (outputs.argmax(1) == targets).float()}
        column = {"column": lambda outputs, targets: top1["top1"](outputs, targets)[:, None]}  # (B, 1) for (B,)
        trainer = make_trainer(criterion=criterion, metrics=top1 | column)
        trainer.fit([(X, targets)], [(X[:25], targets[:25]), (X[25:], targets[25:])], 1, verbose=False)
        right = (trainer.model(X).argmax(1) == Y)[10:].float().mean().item()
        for name in ("val_top1", "val_column", "val_acc"):
            self.assertAlmostEqual(trainer.history[name][0], right, places=6)

    def test_a_metric_can_decide_which_epoch_is_best(self) -> None:
        values = iter([0.1, 0.1, 0.7, 0.7, 0.3, 0.3])
        trainer = make_trainer(metrics={"f1": lambda outputs, targets: next(values)}, monitor=("val_f1", "max"))
        trainer.fit(batches(40), batches(40), 3, verbose=False)
        self.assertEqual((trainer.best_epoch, round(trainer.best_score, 6)), (1, 0.7))

    def test_a_metric_that_is_always_nan_warns(self) -> None:
        trainer = make_trainer(metrics={"never": lambda outputs, targets: torch.full((len(targets),), torch.nan)})
        with self.assertWarnsRegex(UserWarning, "'never' had no value"):
            trainer.fit(batches(40), None, 1, verbose=False)

    def test_accuracy_is_none_for_other_criteria_and_shapes(self) -> None:
        targets = torch.rand(40, 3)
        history = make_trainer(criterion=nn.MSELoss()).fit([(X, targets)], [(X, targets)], 1, verbose=False)
        self.assertEqual(history["train_acc"] + history["val_acc"], [None, None])


class StoppingTest(unittest.TestCase):
    def test_early_stopping_follows_the_trainer_s_direction(self) -> None:
        values = iter([0.1] * 2 + [0.9] * 2 + [0.2] * 4)
        stopping = tb.EarlyStopping(patience=2)
        metrics = {"f1": lambda outputs, targets: next(values)}
        trainer = make_trainer(metrics=metrics, monitor=("val_f1", "max"), early_stopping=stopping)
        trainer.fit(batches(40), batches(40), 9, verbose=False)
        self.assertEqual((trainer.epoch, trainer.best_epoch, stopping.mode), (4, 1, "max"))

    def test_a_contradicting_direction_is_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "EarlyStopping has mode='min'.*'max'"):
            make_trainer(monitor="val_acc", early_stopping=tb.EarlyStopping(mode="min"))
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        with self.assertRaisesRegex(ValueError, "ReduceLROnPlateau has mode='min'"):
            tb.Trainer(model, nn.CrossEntropyLoss(), optimizer, scheduler=plateau, monitor="val_acc")

    def test_a_nan_validation_loss_warns_and_is_never_best(self) -> None:
        nan = [(X * torch.nan, Y)]
        trainer = make_trainer()
        with self.assertWarnsRegex(UserWarning, "validation loss is nan"):
            trainer.fit(batches(40), nan, 1, verbose=False)
        self.assertIsNone(trainer.best_epoch)
        trainer.fit(batches(40), batches(40), 2, verbose=False)
        self.assertEqual(trainer.best_epoch, 1)

    def test_a_fallback_to_the_training_loss_warns_if_it_decides_something(self) -> None:
        with self.assertWarnsRegex(UserWarning, "train_loss is monitored instead of val_loss"):
            make_trainer(early_stopping=tb.EarlyStopping()).fit(batches(40), None, 1, verbose=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_trainer().fit(batches(40), None, 1, verbose=False)

    def test_a_nan_loss_names_the_place_and_the_module_and_is_not_saved(self) -> None:
        class Root(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return (x - 5).sqrt()

        model = nn.Sequential(nn.Linear(6, 3), Root())
        nn.init.constant_(model[0].weight, 0.0)
        nn.init.constant_(model[0].bias, 5.5)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(model, rate=5.0, checkpoint_dir=folder)
            with self.assertRaisesRegex(tb.NonFiniteLoss, r"the loss is nan in batch \d; .*1.*Root"):
                trainer.fit(batches(8, 8, 8, 8, 8), batches(40), 20, verbose=False)
            for path in Path(folder).glob("*.pt"):
                weights = tb.load_checkpoint(path)["model_state_dict"].values()
                self.assertTrue(all(weight.isfinite().all() for weight in weights))

    def test_a_nan_weight_from_a_finite_loss_is_never_saved(self) -> None:
        class InfiniteSlope(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                outputs = super().forward(x)
                return outputs + (outputs - outputs).abs().sqrt()  # finite, with a slope of NaN

        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(InfiniteSlope(6, 3), checkpoint_dir=folder)
            with self.assertRaisesRegex(tb.NonFiniteLoss, "weight is NaN"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer.fit(batches(40), batches(40), 1, verbose=False)
            self.assertEqual(list(Path(folder).glob("step*")), [])

    def test_any_failure_says_which_save_it_can_be_repeated_from(self) -> None:
        def fail(trainer: tb.Trainer) -> None:
            if trainer.step == 3:
                raise KeyError("mine")

        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(checkpoint_dir=folder, save_every=2, on_step_end=[fail])
            with self.assertRaises(KeyError) as caught:
                trainer.fit(batches(8, 8, 8, 8, 8), batches(40), 1, verbose=False)
            saved = Path(folder, "step-00000002.pt")
            self.assertEqual(caught.exception.__notes__, ["epoch 1, after 3 steps", f"saved 1 steps before: {saved}"])

    @unittest.skipUnless(hasattr(signal, "SIGCHLD"), "needs SIGCHLD")
    def test_a_worker_that_ends_late_does_not_break_into_the_report_of_a_failure(self) -> None:
        def fail(*_: Any) -> None:  # as torch's handler, which looks for a worker that was killed
            raise RuntimeError("worker killed")

        self.addCleanup(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, fail))
        with self.assertRaisesRegex(KeyError, "first"):
            make_trainer(on_step_end=[lambda _: {}["first"]]).fit(batches(40), None, 1, verbose=False)
        os.kill(os.getpid(), signal.SIGCHLD)  # raises nothing

    def test_a_failing_validation_and_a_failing_save_after_a_signal_say_it_too(self) -> None:
        with self.assertRaises(IndexError) as caught, tempfile.TemporaryDirectory() as folder:
            make_trainer(checkpoint_dir=folder).fit(batches(40), [(X, Y + 3)], 1, verbose=False)
        self.assertEqual(caught.exception.__notes__, ["epoch 1, after 1 steps"])
        with self.assertRaises(OSError) as failed, tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(checkpoint_dir=folder, save_every=1)
            trainer.on_step_end += [lambda trainer: trainer.step == 3 and signal.raise_signal(signal.SIGTERM)]
            with mock.patch("torchbasics.checkpoint.save_step", side_effect=[None, None, OSError("full")]):
                trainer.fit(batches(10, 10, 10, 10), batches(40), 1, verbose=False)
        self.assertEqual(failed.exception.__notes__[0], "epoch 1, after 3 steps")
        self.assertIn("saved 1 steps before", failed.exception.__notes__[1])


class SignalTest(unittest.TestCase):
    def interrupt(self, signum: int, folder: str | None) -> None:
        def kill(trainer: tb.Trainer) -> None:
            if trainer.step == 2:
                os.kill(os.getpid(), signum)

        trainer = make_trainer(checkpoint_dir=folder, on_step_end=[kill])
        trainer.fit(batches(10, 10, 10, 10), batches(40), 2, verbose=False)

    def test_sigint_sigterm_and_sigusr1_save_after_the_step_and_raise_interrupted(self) -> None:
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            before = signal.getsignal(getattr(signal, name))
            saved = self.assertRaisesRegex(tb.Interrupted, f"{name}: saved .*02.pt")
            with tempfile.TemporaryDirectory() as folder, saved:
                self.interrupt(getattr(signal, name), folder)
            self.assertEqual(signal.getsignal(getattr(signal, name)), before)

    def test_without_checkpoints_ctrl_c_is_python_s_own(self) -> None:
        with self.assertRaises(KeyboardInterrupt):
            self.interrupt(signal.SIGINT, None)

    def test_a_signal_that_the_process_ignores_stays_ignored(self) -> None:
        before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.interrupt(signal.SIGUSR1, folder)  # raises nothing
        finally:
            signal.signal(signal.SIGUSR1, before)


class RefusalTest(unittest.TestCase):
    def test_what_cannot_be_trained_is_refused_with_a_reason(self) -> None:
        model, other = make_model(), make_model()
        sgd, lbfgs = torch.optim.SGD(model.parameters(), 0.1), torch.optim.LBFGS(model.parameters())
        cases: list[tuple[str, Any]] = [
            ("holds none of the model's parameters", lambda: tb.Trainer(other, nn.CrossEntropyLoss(), sgd)),
            ("LBFGS needs a closure", lambda: tb.Trainer(model, nn.CrossEntropyLoss(), lbfgs)),
            ("reduction='mean', got 'sum'", lambda: tb.Trainer(model, nn.CrossEntropyLoss(reduction="sum"), sgd)),
            ("criterion=None needs", lambda: tb.Trainer(model, None, sgd)),
            ("accumulate must be positive", lambda: make_trainer(accumulate=0)),
            ("clip_norm must be positive", lambda: make_trainer(clip_norm=math.inf)),
            ("save_every=5 needs a checkpoint_dir", lambda: make_trainer(save_every=5)),
            ("scheduler_interval must be", lambda: make_trainer(scheduler_interval="batch")),
            ("say what is better", lambda: make_trainer(monitor="val_f1")),
            ("'v_loss' will have no value; there are grad_norm, train_acc", lambda: make_trainer(monitor="v_loss")),
            ("'val_acc' will have no", lambda: make_trainer(criterion=nn.MSELoss(), monitor="val_acc")),
            ("cannot be named 'loss'", lambda: make_trainer(metrics={"loss": lambda o, t: 0.0})),
            ("unknown precision", lambda: make_trainer(precision="fp8")),
        ]
        for message, call in cases:
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                call()

    def test_what_comes_in_the_first_batch_is_checked(self) -> None:
        def fit(trainer: tb.Trainer, batch: Any) -> None:
            trainer.fit([batch], None, 1, verbose=False)

        frozen = make_model().requires_grad_(False)
        frozen[0].bias.requires_grad_(True)

        class Detached(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).detach()

        class TwoResults(tb.Trainer):
            def compute_loss(self, batch: Any) -> Any:
                return super().compute_loss(batch)[:2]

        model = make_model()
        parts = model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1)
        regression = make_trainer(nn.Linear(6, 1), nn.MSELoss())
        cases = [
            ("expected a batch .inputs, targets., got a tensor of shape .2, 6.", make_trainer(), X[:2]),
            ("got a tuple of 3 parts", make_trainer(), (X, Y, Y)),
            ("got a dict with the keys x, y;", make_trainer(), {"x": X, "y": Y}),
            ("must return .loss, outputs, targets., got a tuple of 2 parts", TwoResults(*parts), (X, Y)),
            ("must have the same shape.*40, 1", regression, (X, Y.float())),
            ("must have the same shape.*40, 1", make_trainer(nn.Linear(6, 1), F.l1_loss), (X, Y.float())),
            ("no parameter that requires a gradient", make_trainer(Detached(6, 3)), (X, Y)),
            ("a loss of one number", make_trainer(criterion=lambda o, t: o.sum(1)), (X, Y)),
        ]
        for message, trainer, batch in cases:
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                fit(trainer, batch)

    def test_shapes_that_the_criterion_may_broadcast_are_warned_of(self) -> None:
        trainer = make_trainer(nn.Linear(6, 1), lambda outputs, targets: ((outputs - targets) ** 2).mean())
        with self.assertWarnsRegex(UserWarning, r"outputs \(40, 1\) and targets \(40,\) differ in shape"):
            trainer.fit([(X, Y.float())], None, 1, verbose=False)

    def test_metadata_that_cannot_be_saved_are_refused_before_the_first_step(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(checkpoint_dir=folder, metadata={"where": Path("data")})
            with self.assertRaisesRegex(tb.CheckpointError, "metadata: not saved: it holds pathlib"):
                trainer.fit(batches(40), batches(40), 1, verbose=False)
            self.assertEqual(trainer.step, 0)

    def test_the_training_loader_is_not_validated_in_the_middle_of_its_epoch(self) -> None:
        loader = tb.TensorLoader(X, Y, 16)
        trainer = make_trainer(on_step_end=[lambda trainer: trainer.validate(loader)])
        with self.assertRaisesRegex(ValueError, "in the middle of an epoch the training loader cannot be"):
            trainer.fit(loader, None, 1, verbose=False)

    def test_a_metric_that_was_broadcast_is_refused(self) -> None:
        errors = {"mae": lambda outputs, targets: (outputs - targets[:, 0]).abs()}  # (40, 1) - (40,): (40, 40)
        trainer = make_trainer(nn.Linear(6, 1), nn.MSELoss(), metrics=errors)
        with self.assertRaisesRegex(ValueError, "'mae' gave a tensor of shape .40, 40..*for targets .40, 1."):
            trainer.fit([(X, Y.float()[:, None])], None, 1, verbose=False)

    def test_several_processes_without_a_group_are_refused(self) -> None:
        os.environ["WORLD_SIZE"] = "2"
        try:
            with self.assertRaisesRegex(ValueError, "WORLD_SIZE is 2, but there is no process group"):
                make_trainer().fit(batches(40), None, 1, verbose=False)
        finally:
            del os.environ["WORLD_SIZE"]

    def test_a_rate_of_zero_for_the_whole_first_epoch_warns(self) -> None:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
        trainer = tb.Trainer(model, nn.CrossEntropyLoss(), optimizer, scheduler=schedule)
        with self.assertWarnsRegex(UserWarning, "rate was 0 in the whole first epoch"):
            trainer.fit(batches(40), None, 1, verbose=False)
