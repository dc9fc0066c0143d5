"""The Trainer against plain PyTorch loops, hand calculation and closed forms."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import math
import os
import random
import shutil
import signal
import tempfile
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from tests.processes import needs_processes, outcomes
from torchbasics.checkpoint import CheckpointError, load_checkpoint
from torchbasics.data import RandomAffine, TensorLoader
from torchbasics.early_stopping import EarlyStopping
from torchbasics.evaluation import compute_accuracy, evaluate, predict, without_samples
from torchbasics.optim import averaged_copy, make_schedule
from torchbasics.trainer import Interrupted, NonFiniteLoss, Trainer

Batches = list[tuple[Tensor, Tensor]]


def setUpModule() -> None:
    torch.set_num_threads(1)


def classes(samples: int = 40, batch_size: int = 8, seed: int = 0, width: int = 6) -> Batches:
    """Batches of a small problem with 3 classes that a linear model learns partly."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, width, generator=generator)
    targets = (inputs[:, :3] + 0.5 * torch.randn(samples, 3, generator=generator)).argmax(1)
    return list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))


def network(seed: int = 1, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(16, 3),
    )


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def whole(batches: Batches) -> tuple[Tensor, Tensor]:
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])


def gradient_of(model: nn.Module, window: Batches) -> list[Tensor]:
    """The gradient of the mean over all samples of `window`, as one batch."""
    inputs, targets = whole(window)
    model.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


class TrainerCase(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def assert_same_tensors(self, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        self.assertEqual(actual.keys(), expected.keys())
        for name, tensor in expected.items():
            self.assertTrue(torch.equal(actual[name], tensor), name)

    def assert_same_weights(self, actual: nn.Module, expected: nn.Module) -> None:
        self.assert_same_tensors(actual.state_dict(), expected.state_dict())


class PlainLoop(TrainerCase):
    """Bit for bit the same weights as a loop written by hand."""

    def compare(
        self, make_schedule: Callable | None = None, change_gradient: Callable | None = None, **options: Any
    ) -> Trainer:
        batches, epochs = classes(), 3
        mine, other = network(dropout=0.3, norm=True), network(dropout=0.3, norm=True)
        optimizer, twin = sgd(mine), sgd(other)
        schedule, twin_schedule = (make_schedule(o) if make_schedule else None for o in (optimizer, twin))
        trainer = Trainer(mine, nn.CrossEntropyLoss(), optimizer, "cpu", schedule, **options)
        torch.manual_seed(5)
        history = trainer.fit(batches, batches[:2], epochs, verbose=False)

        torch.manual_seed(5)
        losses, rates = [], []
        for _ in range(epochs):
            other.train()
            total = 0.0
            for inputs, targets in batches:
                twin.zero_grad()
                loss = nn.functional.cross_entropy(other(inputs), targets)
                loss.backward()
                if change_gradient:
                    change_gradient(other)
                twin.step()
                total += loss.item() * len(targets)
                if twin_schedule and trainer.scheduler_interval == "step":
                    twin_schedule.step()
            losses.append(total / 40)
            rates.append(twin.param_groups[0]["lr"])
            other.eval()
            with torch.no_grad():
                val = sum(nn.functional.cross_entropy(other(x), y).item() * len(y) for x, y in batches[:2]) / 16
            if twin_schedule and trainer.scheduler_interval == "epoch":
                twin_schedule.step(*[val] if isinstance(twin_schedule, ReduceLROnPlateau) else [])
        self.assert_same_weights(mine, other)
        self.assertEqual(history["train_loss"], losses)
        self.assertEqual(history["lr"], rates)
        self.assertEqual(optimizer.param_groups[0]["lr"], twin.param_groups[0]["lr"])
        return trainer

    def test_no_extras(self) -> None:
        self.compare()

    def test_onecycle_steps_per_step_by_default(self) -> None:
        trainer = self.compare(lambda o: OneCycleLR(o, 0.2, total_steps=16))
        self.assertEqual(trainer.scheduler_interval, "step")

    def test_any_schedule_per_step_if_asked(self) -> None:
        self.compare(lambda o: LambdaLR(o, lambda step: 1 / (1 + step)), scheduler_interval="step")

    def test_our_own_step_per_step_by_default_but_for_the_plateau(self) -> None:
        for name in ("step", "cosine", "onecycle", "constant"):
            with self.subTest(name):
                trainer = self.compare(lambda o, name=name: make_schedule(name, o, 16, 4))
                self.assertEqual(trainer.scheduler_interval, "step")
        plateau = make_schedule("plateau", optimizer := sgd(model := network()), 16)
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, scheduler=plateau)
        self.assertEqual(trainer.scheduler_interval, "epoch")

    def test_schedules_step_per_epoch_by_default(self) -> None:
        trainer = self.compare(lambda o: StepLR(o, 1, gamma=0.5))
        self.assertEqual(trainer.history["lr"], [0.1, 0.05, 0.025])

    def test_plateau_gets_the_validation_loss(self) -> None:
        trainer = self.compare(lambda o: ReduceLROnPlateau(o, patience=0, threshold=10.0, threshold_mode="abs"))
        self.assertAlmostEqual(
            trainer.optimizer.param_groups[0]["lr"], 0.1 * 0.1**2
        )  # the first is best, the others don't beat it by 10

    def test_clip_by_norm(self) -> None:
        trainer = self.compare(change_gradient=lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.05), clip_norm=0.05)
        self.assertGreater(float(trainer.grad_norm), 0.05)  # it really clipped

    def test_clip_by_value(self) -> None:
        self.compare(change_gradient=lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.01), clip_value=0.01)

    def test_clip_by_value_then_norm(self) -> None:
        def both(model: nn.Module) -> None:
            nn.utils.clip_grad_value_(model.parameters(), 0.02)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)

        self.compare(change_gradient=both, clip_value=0.02, clip_norm=0.05)

    def test_skip_policy_and_channels_last_change_nothing(self) -> None:
        self.compare(nan_policy="skip")
        self.compare(nan_policy="ignore", channels_last=True)

    def test_channels_last_is_the_layout_of_images_and_of_convolutions(self) -> None:
        seen: list[bool] = []
        for wanted in (False, True):
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))
            for tensor in (lambda inputs: inputs[0], lambda _, conv=model[0]: conv.weight):
                model.register_forward_pre_hook(
                    lambda _, inputs, tensor=tensor: seen.append(
                        tensor(inputs).is_contiguous(memory_format=torch.channels_last)
                    )
                )
            images = [(torch.randn(4, 3, 8, 8), torch.arange(4) % 3)]
            trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model), channels_last=wanted)
            trainer.fit(images, images, 1, verbose=False)
        self.assertEqual(seen, [False] * 4 + [True] * 4)  # image and weight, in training and in validation

    def test_fit_twice_trains_on(self) -> None:
        once, twice = network(), network()
        Trainer(once, nn.CrossEntropyLoss(), sgd(once)).fit(classes(), num_epochs=4, verbose=False)
        trainer = Trainer(twice, nn.CrossEntropyLoss(), sgd(twice))
        trainer.fit(classes(), num_epochs=1, verbose=False)
        history = trainer.fit(classes(), num_epochs=3, verbose=False)
        self.assert_same_weights(twice, once)
        self.assertEqual((len(history["train_loss"]), trainer.epoch), (4, 4))

    def test_train_one_epoch_then_fit(self) -> None:
        once, twice = network(), network()
        Trainer(once, nn.CrossEntropyLoss(), sgd(once)).fit(classes(), num_epochs=2, verbose=False)
        trainer = Trainer(twice, nn.CrossEntropyLoss(), sgd(twice))
        loss, accuracy = trainer.train_one_epoch(classes())
        self.assertTrue(math.isfinite(loss) and 0 <= accuracy <= 1)
        trainer.fit(classes(), num_epochs=1, verbose=False)
        self.assert_same_weights(twice, once)


class Accumulation(TrainerCase):
    def windows(self, batches: Batches, accumulate: int) -> list[list[Tensor]]:
        """The gradients that the optimizer was given, checked against those of one big batch per window."""
        model = network()
        given: list[list[Tensor]] = []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: given.append([p.grad.clone() for p in model.parameters()]))
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, accumulate=accumulate)
        twin = network()
        trainer.fit(batches, num_epochs=2, verbose=False)
        chunks = [
            batches[i : i + accumulate] for i in range(0, len(batches), accumulate)
        ] * 2  # an epoch begins a new window
        self.assertEqual(len(given), len(chunks))
        self.assertEqual(trainer.step, len(chunks))
        for found, chunk in zip(given, chunks, strict=True):
            expected = gradient_of(twin, chunk)
            for mine, big in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, big, rtol=1e-5, atol=1e-7)
            with torch.no_grad():
                for p, gradient in zip(twin.parameters(), found, strict=True):
                    p.sub_(0.1 * gradient)
        return given

    def test_five_batches_by_four(self) -> None:
        self.windows(classes(40, 8), 4)

    def test_seven_batches_by_four_are_windows_of_four_and_three(self) -> None:
        self.assertEqual(len(self.windows(classes(56, 8), 4)), 2 * 2)

    def test_window_larger_than_the_loader_is_one_step(self) -> None:
        self.assertEqual(len(self.windows(classes(24, 8), 10)), 2 * 1)

    def test_unequal_batches_count_by_their_samples(self) -> None:
        batches = classes(19, 8)
        self.assertEqual([len(targets) for _, targets in batches], [8, 8, 3])
        self.windows(batches, 3)
        self.windows(batches, 2)

    def test_callbacks_and_schedule_move_once_per_window(self) -> None:
        model, seen = network(), []
        optimizer = sgd(model)
        schedule = LambdaLR(optimizer, lambda step: 0.5**step)
        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(),
            optimizer,
            None,
            schedule,
            scheduler_interval="step",
            accumulate=4,
            on_step_end=[lambda t: seen.append((t.step, t.batch, t.optimizer.param_groups[0]["lr"]))],
        )
        trainer.fit(classes(56, 8), num_epochs=1, verbose=False)
        self.assertEqual(seen, [(1, 4, 0.05), (2, 7, 0.025)])


class Means(TrainerCase):
    def frozen(self, batches: Batches) -> tuple[Trainer, float, float]:
        """A trainer whose rate is 0, and the true mean loss and accuracy over all samples."""
        model = network()
        inputs, targets = whole(batches)
        with torch.no_grad():
            outputs = model(inputs)
        return (
            Trainer(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.0)),
            float(nn.functional.cross_entropy(outputs, targets)),
            float((outputs.argmax(1) == targets).double().mean()),
        )

    def test_short_last_batch_counts_by_its_samples(self) -> None:
        batches = classes(17, 8)
        batches[-1] = (
            batches[-1][0] * 30,
            batches[-1][1],
        )  # one sample with a large loss: a mean of means would be far off
        trainer, loss, accuracy = self.frozen(batches)
        for found in (trainer.train_one_epoch(batches), trainer.validate(batches)):
            self.assertAlmostEqual(found[0], loss, places=5)
            self.assertEqual(found[1], accuracy)
        of_batches = sum(trainer.validate([batch])[0] for batch in batches) / 3
        self.assertNotAlmostEqual(of_batches, loss, places=2)

    def test_accumulation_keeps_them(self) -> None:
        batches = classes(19, 8)
        trainer, loss, accuracy = self.frozen(batches)
        trainer.accumulate = 2
        found = trainer.train_one_epoch(batches)
        self.assertAlmostEqual(found[0], loss, places=5)
        self.assertEqual(found[1], accuracy)

    def test_regression_has_no_accuracy(self) -> None:
        model = nn.Linear(3, 1)
        inputs = torch.randn(12, 3)
        batches = list(zip(inputs.split(5), inputs.sum(1, keepdim=True).split(5), strict=True))
        expected = nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True)).item()
        trainer = Trainer(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.05))
        loss, accuracy = trainer.validate(batches)
        self.assertAlmostEqual(loss, expected, places=5)
        self.assertIsNone(accuracy)
        history = trainer.fit(batches, batches, 30, verbose=False)
        self.assertEqual(history["train_acc"] + history["val_acc"], [None] * 60)
        self.assertLess(history["val_loss"][-1], 0.2 * expected)

    def test_binary_has_no_accuracy(self) -> None:
        model = nn.Linear(3, 1)
        inputs = torch.randn(10, 3)
        targets = (inputs[:, :1] > 0).float()
        trainer = Trainer(model, nn.BCEWithLogitsLoss(), sgd(model))
        loss, accuracy = trainer.validate([(inputs, targets)])
        self.assertAlmostEqual(
            loss, nn.functional.binary_cross_entropy_with_logits(model(inputs), targets).item(), places=6
        )
        self.assertIsNone(accuracy)

    def test_two_classes_as_indices_have_one(self) -> None:
        model = nn.Linear(3, 2)
        inputs, targets = torch.randn(9, 3), torch.arange(9) % 2
        _, accuracy = Trainer(model, nn.CrossEntropyLoss(), sgd(model)).validate([(inputs, targets)])
        self.assertEqual(accuracy, float((model(inputs).argmax(1) == targets).double().mean()))

    def test_class_probabilities_as_targets_have_none(self) -> None:
        model = nn.Linear(3, 2)
        self.assertIsNone(
            Trainer(model, nn.CrossEntropyLoss(), sgd(model)).validate([(torch.randn(4, 3), torch.full((4, 2), 0.5))])[
                1
            ]
        )

    def test_one_score_and_sequences_have_none(self) -> None:
        """The largest of one score says nothing; (B, T, V) is no (B, V, T)."""
        targets = torch.arange(8) % 2
        binary = nn.Linear(3, 1)
        loss = lambda outputs, y: nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], y.float())  # noqa: E731
        self.assertIsNone(Trainer(binary, loss, sgd(binary)).validate([(torch.randn(8, 3), targets)])[1])
        sequence = nn.Linear(3, 11)
        loss = lambda outputs, y: nn.functional.cross_entropy(outputs.flatten(0, 1), y.flatten())  # noqa: E731
        batch = (torch.randn(4, 5, 3), torch.randint(0, 11, (4, 5)))
        history = Trainer(sequence, loss, sgd(sequence)).fit([batch], [batch], 1, verbose=False)
        self.assertEqual((history["train_acc"], history["val_acc"]), ([None], [None]))

    def test_losses_of_one_element_and_the_mean_per_sample_of_a_divergence(self) -> None:
        batches = classes(16, 8)
        plain = nn.functional.cross_entropy
        for criterion in (lambda outputs, y: plain(outputs, y).view(1), nn.CrossEntropyLoss()):
            model = network()
            means = Trainer(model, criterion, sgd(model)).validate(batches)
            self.assertAlmostEqual(means[0], plain(model(whole(batches)[0]), whole(batches)[1]).item(), places=6)
        model = nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(1))
        wanted = torch.full((16, 3), 1 / 3)
        divergence = nn.KLDivLoss(reduction="batchmean")
        mean, _ = Trainer(model, divergence, sgd(model)).validate([(whole(batches)[0], wanted)])
        self.assertAlmostEqual(mean, divergence(model(whole(batches)[0]), wanted).item(), places=6)

    def test_segmentation_counts_pixels(self) -> None:
        model = nn.Conv2d(1, 3, 1)
        inputs, targets = torch.randn(5, 1, 4, 4), torch.randint(0, 3, (5, 4, 4))
        batches = list(zip(inputs.split(2), targets.split(2), strict=True))
        loss, accuracy = Trainer(model, nn.CrossEntropyLoss(), sgd(model)).validate(batches)
        outputs = model(inputs)
        self.assertAlmostEqual(loss, nn.functional.cross_entropy(outputs, targets).item(), places=5)
        self.assertEqual(accuracy, float((outputs.argmax(1) == targets).double().mean()))

    def test_targets_that_the_criterion_ignores_are_no_predictions(self) -> None:
        for shape, index in (((8,), -100), ((8, 3, 3), -100), ((8,), 0), ((8, 3, 3), 0), ((8, 4), 255)):
            with self.subTest(shape=shape, index=index):
                model = nn.Identity()
                outputs, targets = torch.randn(8, 3, *shape[1:]), torch.randint(0, 3, shape)
                targets[targets == targets.flatten()[0]] = index
                counted = targets != index
                self.assertFalse(bool(counted.all()))
                right = (outputs.argmax(1) == targets) & counted
                batches = list(zip(outputs.split(3), targets.split(3), strict=True))
                accuracy = evaluate(model, batches, nn.CrossEntropyLoss(ignore_index=index))[1]
                self.assertEqual(accuracy, int(right.sum()) / int(counted.sum()))
        nothing = [(torch.randn(2, 3), torch.full((2,), -100))]
        self.assertIsNone(evaluate(nn.Identity(), nothing, nn.CrossEntropyLoss())[1])

    def test_a_loss_without_mean_is_refused(self) -> None:
        each = lambda outputs, y: nn.functional.cross_entropy(outputs, y, reduction="none")  # noqa: E731
        trainer = Trainer(model := network(), each, sgd(model))
        for judge in (trainer.train_one_epoch, trainer.validate):
            with self.assertRaisesRegex(ValueError, r"one number, the batch's mean, got shape \(8,\)"):
                judge(classes(16, 8))

    def test_empty_loader_is_an_error(self) -> None:
        with self.assertRaisesRegex(ValueError, "no sample"):
            Trainer(model := network(), nn.CrossEntropyLoss(), sgd(model)).fit([], num_epochs=1, verbose=False)

    def test_tuple_and_dict_inputs_and_any_iterable(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(6, 3)

            def forward(self, parts: Any) -> Tensor:
                left, right = (parts["left"], parts["right"]) if isinstance(parts, dict) else parts
                return self.layer(torch.cat([left, right], dim=1))

        batches = classes(16, 8)
        torch.manual_seed(3)
        models = [Two() for _ in range(3)]
        for model in models[1:]:
            model.load_state_dict(models[0].state_dict())
        tuples = [((x[:, :2], x[:, 2:]), y) for x, y in batches]
        dicts = [({"left": x[:, :2], "right": x[:, 2:]}, y) for x, y in batches]
        histories = [
            Trainer(model, nn.CrossEntropyLoss(), sgd(model)).fit(loader, num_epochs=1, verbose=False)
            for model, loader in zip(models, (tuples, dicts, (batch for batch in tuples)), strict=True)
        ]
        self.assertEqual(histories[0], histories[1])
        self.assertEqual(histories[0], histories[2])
        plain = nn.Linear(6, 3)
        torch.manual_seed(3)
        plain = Two().layer
        Trainer(plain, nn.CrossEntropyLoss(), sgd(plain)).fit(batches, num_epochs=1, verbose=False)
        self.assert_same_weights(models[1].layer, plain)

    def test_named_tuples_and_packed_sequences_arrive_as_what_they_are(self) -> None:
        class Pair(NamedTuple):
            left: Tensor
            right: Tensor

        class Rnn(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList([nn.GRU(2, 3), nn.Linear(4, 3)])

            def forward(self, given: Any) -> Tensor:
                if isinstance(given, PackedSequence):
                    return self.layers[0](given)[1][0]
                return self.layers[1](torch.cat([given.left, given.right], 1))

        packed = pack_sequence([torch.randn(3, 2), torch.randn(5, 2)], enforce_sorted=False)
        pair = Pair(torch.randn(2, 1), torch.randn(2, 3))
        model, targets = Rnn(), torch.tensor([0, 2])
        expected = sum(nn.functional.cross_entropy(model(inputs), targets).item() for inputs in (packed, pair)) / 2
        none = without_samples((packed, pair, targets))  # who has less than other processes takes part with this
        self.assertIs(none[0], packed)
        self.assertEqual((len(none[1].left), none[1].right.shape, len(none[2])), (0, (0, 3), 0))
        loss, _ = Trainer(model, nn.CrossEntropyLoss(), sgd(model)).validate([(packed, targets), (pair, targets)])
        self.assertAlmostEqual(loss, expected, places=6)


class Precision(TrainerCase):
    def seen_by_criterion(self, precision: str) -> tuple[list, list]:
        inside, given = [], []

        class Spy(nn.Linear):
            def forward(self, inputs: Tensor) -> Tensor:
                outputs = super().forward(inputs)
                inside.append(outputs.dtype)
                return outputs

        def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
            given.append(outputs.dtype)
            return nn.functional.cross_entropy(outputs, targets)

        model = Spy(6, 3)
        trainer = Trainer(model, criterion, sgd(model), precision=precision)
        trainer.fit(classes(16, 8), classes(8, 8), 1, verbose=False)
        self.assertEqual(model.weight.dtype, torch.float32)
        return inside, given

    def test_criterion_sees_float32(self) -> None:
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
            inside, given = self.seen_by_criterion(precision)
            self.assertEqual(set(inside), {dtype}, precision)
            self.assertEqual(set(given), {torch.float32}, precision)

    def test_so_it_does_of_several_outputs_as_in_autocast(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(1)
                self.layer = nn.Linear(6, 3)

            def forward(self, inputs: Tensor) -> dict[str, Tensor]:
                return {"logits": self.layer(inputs)}

        (inputs, targets), *_ = classes(8, 8)
        for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            model = Two()
            with torch.autocast("cpu", dtype):
                outputs = model(inputs)["logits"]
            self.assertEqual(outputs.dtype, dtype)
            expected = nn.functional.cross_entropy(outputs.float(), targets).item()
            criterion = lambda outputs, y: nn.functional.cross_entropy(outputs["logits"], y)  # noqa: E731
            trainer = Trainer(model, criterion, sgd(model), precision=precision)
            self.assertEqual(trainer.validate([(inputs, targets)])[0], expected)
            self.assertEqual(trainer.train_one_epoch([(inputs, targets)])[0], expected)

    def test_bf16_equals_a_plain_autocast_loop(self) -> None:
        mine, other = network(), network()
        optimizer = sgd(other)
        Trainer(mine, nn.CrossEntropyLoss(), sgd(mine), precision="bf16").fit(classes(), num_epochs=2, verbose=False)
        for inputs, targets in classes() * 2:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                outputs = other(inputs)
            nn.functional.cross_entropy(outputs.float(), targets).backward()
            optimizer.step()
        self.assert_same_weights(mine, other)

    def scaled(self, bad: set[int], **options: Any) -> tuple[Trainer, list[tuple]]:
        """fp16 training where the gradient overflows in the batches `bad`; what was seen after each batch."""
        model = network()
        optimizer = sgd(model)
        seen: list[tuple] = []
        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(),
            optimizer,
            None,
            LambdaLR(optimizer, lambda step: 0.5**step),
            scheduler_interval="step",
            precision="fp16",
            averages=averaged_copy(model, 0.5),
            on_step_end=[
                lambda t: seen.append(
                    (
                        t.step,
                        t.skipped,
                        t.scaler.get_scale(),
                        t.optimizer.param_groups[0]["lr"],
                        int(t.averages.n_averaged),
                        copy.deepcopy(model.state_dict()),
                        copy.deepcopy(t.averages.module.state_dict()),
                    )
                )
            ],
            **options,
        )
        # the loss stays finite: only its gradient overflows, as a scale that is too high does
        model[0].weight.register_hook(lambda grad: grad + math.inf if trainer.batch in bad else grad)
        trainer.fit(classes(), num_epochs=1, verbose=False)
        return trainer, seen

    def test_overflow_moves_nothing_but_the_scale(self) -> None:
        trainer, seen = self.scaled({0, 2})
        self.assertEqual([entry[0] for entry in seen], [0, 1, 1, 2, 3])
        self.assertEqual([entry[1] for entry in seen], [1, 1, 2, 2, 2])
        self.assertEqual([entry[2] for entry in seen], [2.0**15, 2.0**15, 2.0**14, 2.0**14, 2.0**14])
        self.assertEqual([entry[3] for entry in seen], [0.1, 0.05, 0.05, 0.025, 0.0125])
        self.assertEqual([entry[4] for entry in seen], [0, 1, 1, 2, 3])
        self.assert_same_tensors(seen[0][5], network().state_dict())
        self.assert_same_tensors(seen[2][5], seen[1][5])
        self.assert_same_tensors(seen[2][6], seen[1][6])
        self.assertFalse(torch.equal(seen[3][5]["0.weight"], seen[2][5]["0.weight"]))
        self.assertEqual((trainer.step, trainer.skipped, trainer.batch, trainer.epoch), (3, 2, 0, 1))

    def test_overflow_under_accumulation_skips_the_window(self) -> None:
        _, seen = self.scaled({2}, accumulate=2)  # windows begin at 0, 2, 4
        self.assertEqual([entry[:2] for entry in seen], [(1, 0), (1, 1), (2, 1)])

    def test_all_skipped_trains_nothing_and_says_so(self) -> None:
        trainer, _ = self.scaled(set(range(5)))
        self.assertEqual((trainer.step, trainer.skipped), (0, 5))
        self.assertTrue(math.isfinite(trainer.history["train_loss"][0]))  # the losses were finite, and are counted

    def test_clipping_acts_on_unscaled_gradients(self) -> None:
        for name in ("clip_norm", "clip_value"):
            model = network()
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            given: list[Tensor] = []
            optimizer.register_step_pre_hook(
                lambda *_, m=model, g=given: g.append(torch.cat([p.grad.flatten() for p in m.parameters()]))
            )
            Trainer(model, nn.CrossEntropyLoss(), optimizer, precision="fp16", **{name: 1e-3}).fit(
                classes(8, 8), num_epochs=1, verbose=False
            )
            twin = network()
            with torch.autocast("cpu", torch.float16):
                outputs = twin(classes(8, 8)[0][0])
            nn.functional.cross_entropy(outputs.float(), classes(8, 8)[0][1]).backward()
            (nn.utils.clip_grad_norm_ if name == "clip_norm" else nn.utils.clip_grad_value_)(twin.parameters(), 1e-3)
            expected = torch.cat([p.grad.flatten() for p in twin.parameters()])
            torch.testing.assert_close(given[0], expected, rtol=2e-2, atol=2e-5)
            self.assertGreater(float(given[0].norm()), 5e-4, name)

    def test_fp16_loss_scale_is_undone(self) -> None:
        half, full = network(), network()
        for model, precision in ((half, "fp16"), (full, "fp32")):
            Trainer(model, nn.CrossEntropyLoss(), sgd(model), precision=precision).fit(
                classes(), num_epochs=2, verbose=False
            )
        torch.testing.assert_close(half.state_dict(), full.state_dict(), rtol=0.02, atol=5e-3)


class Averages(TrainerCase):
    def test_against_hand_computation(self) -> None:
        model, decay = network(), 0.3  # below the rise, which begins at 1/3
        averages = averaged_copy(model, decay)
        seen: list[dict[str, Tensor]] = []
        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(),
            sgd(model),
            averages=averages,
            on_step_end=[lambda _: seen.append(copy.deepcopy(model.state_dict()))],
        )
        trainer.fit(classes(), num_epochs=2, verbose=False)
        expected = seen[0]  # the first step's weights are taken as they are
        for state in seen[1:]:
            expected = {name: decay * expected[name] + (1 - decay) * state[name] for name in expected}
        torch.testing.assert_close(averages.module.state_dict(), expected, rtol=1e-5, atol=1e-7)

    def test_are_what_is_validated_predicted_and_kept(self) -> None:
        model, batches = network(), classes()
        trainer = Trainer(
            model, nn.CrossEntropyLoss(), sgd(model), averages=averaged_copy(model, 0.9), checkpoint_dir=self.folder
        )
        history = trainer.fit(batches, batches, 1, verbose=False)
        averaged = trainer.averages.module
        self.assertEqual(history["val_loss"], [evaluate(averaged, batches, nn.CrossEntropyLoss())[0]])
        self.assertNotEqual(history["val_loss"], [evaluate(model, batches, nn.CrossEntropyLoss())[0]])
        self.assert_same_tensors(load_checkpoint(self.folder / "best.pt")["model_state_dict"], averaged.state_dict())
        self.assert_same_tensors(
            load_checkpoint(trainer.checkpoints.steps()[-1][1])["model_state_dict"], model.state_dict()
        )
        with torch.no_grad():
            self.assertTrue(
                torch.equal(trainer.predict(batches), torch.cat([averaged(inputs) for inputs, _ in batches]))
            )


class ClearedGradients(TrainerCase):
    """As `zero_grad` does it, without calling torch's own."""

    def test_before_an_epoch_and_after_each_step(self) -> None:
        mine, other = network(), network()
        for parameter in mine.parameters():  # of a step that somebody broke off
            parameter.grad = torch.ones_like(parameter)
        seen: list[bool] = []
        trainer = Trainer(
            mine,
            nn.CrossEntropyLoss(),
            sgd(mine),
            on_step_end=[lambda _: seen.append(all(p.grad is None for p in mine.parameters()))],
        )
        trainer.fit(classes(), num_epochs=1, verbose=False)
        self.assertEqual(seen, [True] * len(classes()))
        Trainer(other, nn.CrossEntropyLoss(), sgd(other)).fit(classes(), num_epochs=1, verbose=False)
        self.assert_same_weights(mine, other)

    def test_an_optimizers_own_way_is_taken(self) -> None:
        class Counting(torch.optim.SGD):
            calls = 0

            def zero_grad(self, set_to_none: bool = True) -> None:
                self.calls += 1
                super().zero_grad(set_to_none)

        model, patched = network(), network()
        optimizer = Counting(model.parameters(), 0.1)
        Trainer(model, nn.CrossEntropyLoss(), optimizer).fit(classes(), num_epochs=1, verbose=False)
        self.assertEqual(optimizer.calls, 1 + len(classes()))
        plain = sgd(patched)
        with mock.patch.object(plain, "zero_grad", side_effect=plain.zero_grad) as of_the_object:
            Trainer(patched, nn.CrossEntropyLoss(), plain).fit(classes(), num_epochs=1, verbose=False)
        self.assertEqual(of_the_object.call_count, 1 + len(classes()))


class OneSampleLeft(TrainerCase):
    """BatchNorm1d has no statistics of a single sample."""

    def test_at_the_end_of_an_epoch_it_is_trained_on_with_the_statistics_of_before(self) -> None:
        model, twin, batches = network(norm=True), network(norm=True), classes(17, 8)
        Trainer(model, nn.CrossEntropyLoss(), sgd(model)).fit(batches, num_epochs=1, verbose=False)
        optimizer = sgd(twin)
        for inputs, targets in batches:
            twin[1].train(len(targets) > 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(inputs), targets).backward()
            optimizer.step()
        self.assert_same_weights(model, twin)
        self.assertTrue(model[1].training)

    def test_so_it_is_within_a_window(self) -> None:
        model, twin, batches = network(norm=True), network(norm=True), classes(17, 8)
        Trainer(model, nn.CrossEntropyLoss(), sgd(model), accumulate=3).fit(batches, num_epochs=1, verbose=False)
        optimizer = sgd(twin)
        for inputs, targets in batches:
            twin[1].train(len(targets) > 1)
            (nn.functional.cross_entropy(twin(inputs), targets) * (len(targets) / 17)).backward()
        optimizer.step()
        self.assert_same_weights(model, twin)

    def test_where_one_has_statistics_they_are_learnt(self) -> None:
        """Over its length, of BatchNorm1d after a convolution: as torch alone does it, in batches of one too."""
        for sizes in ([4, 4, 1], [1, 1, 1]):
            twins = []
            for _ in range(2):
                torch.manual_seed(1)
                twins.append(nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3)))
            batches = [(torch.randn(size, 2, 6), torch.randint(0, 3, (size,))) for size in sizes]
            Trainer(twins[0], nn.CrossEntropyLoss(), sgd(twins[0])).fit(batches, num_epochs=1, verbose=False)
            optimizer = sgd(twins[1])
            for inputs, targets in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(twins[1](inputs), targets).backward()
                optimizer.step()
            self.assert_same_weights(*twins)

    def test_a_batch_size_of_one_is_refused_by_torch_at_once(self) -> None:
        model = network(norm=True)
        for accumulate in (1, 2):
            with self.assertRaisesRegex(ValueError, "more than 1 value"):
                Trainer(model, nn.CrossEntropyLoss(), sgd(model), accumulate=accumulate).fit(
                    classes(4, 1), num_epochs=1, verbose=False
                )


class NonFinite(TrainerCase):
    def test_the_module_that_made_it_is_named_and_nothing_is_changed_by_looking(self) -> None:
        class Divide(nn.Module):
            def forward(self, values: Tensor) -> Tensor:
                return values / (values[:, :1] - values[:, :1])

        model = nn.Sequential(nn.Linear(4, 3), Divide(), nn.Linear(3, 2))
        before = copy.deepcopy(model.state_dict())
        trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model))
        with self.assertRaisesRegex(NonFiniteLoss, r"epoch 1, batch 1, after 0 steps \(module '1' \(Divide\) made"):
            trainer.fit([(torch.ones(5, 4), torch.zeros(5, dtype=torch.int64))], num_epochs=1, verbose=False)
        for name, tensor in model.state_dict().items():
            self.assertTrue(torch.equal(tensor, before[name]), name)

    def poisoned(self, where: int = 3) -> Batches:
        batches = classes(64, 8)
        batches[where] = (batches[where][0] * math.nan, batches[where][1])
        return batches

    def test_stop_names_epoch_and_batch_and_keeps_the_weights(self) -> None:
        model = network(norm=True)
        trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model), checkpoint_dir=self.folder, save_every=1, keep=9)
        with self.assertRaisesRegex(NonFiniteLoss, r"nan at epoch 1, batch 4, after 3 steps"):
            trainer.fit(self.poisoned(), num_epochs=1, verbose=False)
        twin = network(norm=True)
        Trainer(twin, nn.CrossEntropyLoss(), sgd(twin)).fit(classes(64, 8)[:3], num_epochs=1, verbose=False)
        for name, parameter in model.named_parameters():
            self.assertTrue(torch.equal(parameter, twin.get_parameter(name)))
        self.assertEqual([step for step, _ in trainer.checkpoints.steps()], [1, 2, 3])
        self.assertFalse((self.folder / "best.pt").exists())

    def test_after_it_the_same_trainer_goes_on_from_the_last_checkpoint(self) -> None:
        """The gradient of the bad step, NaN, must not enter the next one."""
        model = network()
        trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model), checkpoint_dir=self.folder)
        trainer.fit(classes(64, 8), num_epochs=1, verbose=False)
        with self.assertRaises(NonFiniteLoss):
            trainer.fit(self.poisoned(), num_epochs=1, verbose=False)
        trainer.resume()
        trainer.fit(classes(64, 8), num_epochs=3, verbose=False)  # of which one is done
        twin = network()
        Trainer(twin, nn.CrossEntropyLoss(), sgd(twin)).fit(classes(64, 8), num_epochs=3, verbose=False)
        self.assert_same_weights(model, twin)

    def test_stop_in_a_later_epoch_and_a_window(self) -> None:
        good, calls = classes(48, 8), []

        def loader() -> Iterator:
            calls.append(None)
            return iter(good if len(calls) < 2 else self.poisoned(4)[:6])

        class Changing:
            def __iter__(self) -> Iterator:
                return loader()

        model = network()
        with self.assertRaisesRegex(NonFiniteLoss, r"epoch 2, batch 5, after 3 steps"):
            Trainer(model, nn.CrossEntropyLoss(), sgd(model), accumulate=3).fit(Changing(), num_epochs=2, verbose=False)

    def test_found_late_it_still_names_the_batch_and_is_not_saved(self) -> None:
        """As on an accelerator, where losses are read together: the check of the CPU is switched off."""
        model = network()
        trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model), checkpoint_dir=self.folder, save_every=5)
        trainer._finite_now = lambda results, window: True
        with self.assertRaisesRegex(NonFiniteLoss, r"nan at epoch 1, batch 4,"):
            trainer.fit(self.poisoned(), num_epochs=1, verbose=False)
        self.assertEqual(trainer.checkpoints.steps(), [])

    def test_non_finite_weights_are_not_saved(self) -> None:
        """A finite loss can have an infinite gradient: √ at 0."""
        model = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(model.weight)
        trainer = Trainer(
            model,
            lambda outputs, targets: outputs.abs().sqrt().mean() + targets.mean(),
            sgd(model),
            checkpoint_dir=self.folder,
        )
        with self.assertRaisesRegex(NonFiniteLoss, "a weight is NaN or infinite at epoch"):
            trainer.fit([(torch.ones(2, 2), torch.ones(2))], num_epochs=1, verbose=False)
        self.assertEqual(trainer.checkpoints.steps(), [])

    def test_skip_is_as_if_the_batch_were_not_there(self) -> None:
        for where in (0, 3, 7):
            model, twin = network(norm=True), network(norm=True)
            trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model), nan_policy="skip")
            history = trainer.fit(self.poisoned(where), num_epochs=1, verbose=False)
            other = Trainer(twin, nn.CrossEntropyLoss(), sgd(twin))
            expected = other.fit([b for i, b in enumerate(classes(64, 8)) if i != where], num_epochs=1, verbose=False)
            self.assert_same_weights(model, twin)  # BatchNorm's statistics among them
            self.assertEqual(history["train_loss"], expected["train_loss"])
            self.assertEqual((trainer.step, trainer.skipped), (7, 1))

    def test_skip_also_for_an_infinite_gradient_of_a_finite_loss(self) -> None:
        model = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(model.weight)
        trainer = Trainer(
            model,
            lambda outputs, targets: (outputs.abs().sqrt() if targets.sum() else (outputs - 1) ** 2).mean(),
            torch.optim.SGD(model.parameters(), lr=0.1),
            nan_policy="skip",
        )
        trainer.fit(
            [(torch.ones(2, 2), torch.ones(2)), (torch.ones(2, 2), torch.zeros(2))], num_epochs=1, verbose=False
        )
        self.assertEqual((trainer.step, trainer.skipped), (1, 1))
        self.assertTrue(torch.allclose(model.weight, torch.full((1, 2), 0.2)))  # -0.1 · 2(0 - 1)

    def test_ignore_goes_on(self) -> None:
        model = network()
        trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model), nan_policy="ignore", checkpoint_dir=self.folder)
        history = trainer.fit(self.poisoned(), classes(8, 8), 1, verbose=False)
        self.assertEqual((trainer.step, trainer.skipped), (8, 0))
        self.assertTrue(math.isnan(history["train_loss"][0]) and math.isnan(history["val_loss"][0]))
        self.assertEqual((trainer.best_score, trainer.best_epoch), (None, None))
        self.assertFalse((self.folder / "best.pt").exists())

    def test_nan_validation_loss_is_never_best(self) -> None:
        model, good = network(), classes(16, 8)
        bad = [(good[0][0] * math.nan, good[0][1])]
        scripts = iter([bad, good, bad, good])

        class Val:
            def __iter__(self) -> Iterator:
                return iter(next(scripts))

        trainer = Trainer(
            model, nn.CrossEntropyLoss(), sgd(model), early_stopping=EarlyStopping(9), checkpoint_dir=self.folder
        )
        trainer.fit(classes(), Val(), 1, verbose=False)
        self.assertIsNone(trainer.best_score)
        self.assertFalse((self.folder / "best.pt").exists())
        history = trainer.fit(classes(), Val(), 3, verbose=False)
        self.assertEqual([math.isnan(loss) for loss in history["val_loss"]], [True, False, True, False])
        self.assertEqual(trainer.best_score, min(history["val_loss"][1], history["val_loss"][3]))
        self.assertEqual(trainer.early_stopping.best_score, trainer.best_score)


class Checkpoints(TrainerCase):
    def trainer(self, **options: Any) -> Trainer:
        model = network()
        return Trainer(model, nn.CrossEntropyLoss(), sgd(model), **{"checkpoint_dir": self.folder, **options})

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.pt"))

    def test_the_last_k_and_the_best_stay(self) -> None:
        trainer = self.trainer(keep=2)
        trainer.fit(classes(), classes(seed=1), 4, verbose=False)
        self.assertEqual(self.names(), ["best.pt", "step-00000015.pt", "step-00000020.pt"])

    def test_save_every_counts_steps_and_the_end_is_saved(self) -> None:
        saved: list[int] = []
        trainer = self.trainer(save_every=3, keep=9, on_step_end=[lambda t: saved.append(t.step)])
        trainer.fit(classes(), num_epochs=2, verbose=False)
        self.assertEqual([step for step, _ in trainer.checkpoints.steps()], [3, 6, 9, 10])
        last = load_checkpoint(trainer.checkpoints.steps()[-1][1])
        self.assertEqual((last["epoch"], last["batch"]), (2, 0))

    def test_keys_of_the_tutorial_and_more(self) -> None:
        trainer = self.trainer(metadata={"model": "net"})
        history = trainer.fit(classes(), classes(8, 8), 2, verbose=False)
        state = torch.load(trainer.checkpoints.steps()[-1][1], weights_only=True)
        self.assertLessEqual(
            {"epoch", "model_state_dict", "optimizer_state_dict", "loss", "step", "history", "random_state"},
            state.keys(),
        )
        self.assertEqual((state["epoch"], state["step"], state["metadata"]), (2, 10, {"model": "net"}))
        self.assertEqual(state["loss"], history["val_loss"][-1])
        self.assertEqual(state["history"], history)
        self.assertEqual(set(history), {"train_loss", "train_acc", "val_loss", "val_acc", "lr", "step"})
        self.assertEqual({len(values) for values in history.values()}, {2})
        self.assertEqual(history["step"], [5, 10])

    def test_best_is_the_epoch_with_the_lowest_monitored_value(self) -> None:
        kept: list[dict] = []
        trainer = self.trainer(on_epoch_end=[lambda t: kept.append(copy.deepcopy(t.model.state_dict()))])
        trainer.optimizer.param_groups[0]["lr"] = 2.0  # so high that the loss goes up and down
        history = trainer.fit(classes(), classes(seed=1), 6, verbose=False)
        lowest = min(range(6), key=history["val_loss"].__getitem__)
        self.assertNotEqual(lowest, 5)
        self.assertEqual((trainer.best_epoch, trainer.best_score), (lowest, history["val_loss"][lowest]))
        best = load_checkpoint(self.folder / "best.pt")
        self.assert_same_tensors(best["model_state_dict"], kept[lowest])
        self.assertEqual((best["epoch"], best["metrics"]["val_loss"]), (lowest + 1, history["val_loss"][lowest]))

    def test_best_by_accuracy_is_the_highest(self) -> None:
        trainer = self.trainer(monitor="val_acc")
        history = trainer.fit(classes(), classes(seed=1), 4, verbose=False)
        self.assertEqual(trainer.best_score, max(history["val_acc"]))
        self.assertEqual(trainer.best_epoch, history["val_acc"].index(max(history["val_acc"])))

    def test_without_validation_the_training_loss_decides(self) -> None:
        trainer = self.trainer()
        history = trainer.fit(classes(), num_epochs=3, verbose=False)
        self.assertEqual(trainer.best_score, min(history["train_loss"]))
        self.assertEqual(history["val_loss"], [None] * 3)

    def test_early_stopping_ends_and_a_finished_run_trains_nothing(self) -> None:
        def make(patience: int) -> Trainer:
            trainer = self.trainer(early_stopping=EarlyStopping(patience))
            trainer.optimizer.param_groups[0]["lr"] = 0.0  # nothing improves after the first epoch
            return trainer

        first = make(2)
        first.fit(classes(), classes(8, 8), 10, verbose=False)
        self.assertEqual(first.epoch, 3)
        self.assertIn("no improvement", first.early_stopping.reason)
        files = {path.name: path.stat().st_mtime_ns for path in self.folder.iterdir()}

        again = make(2)
        again.resume()
        again.fit(classes(), classes(8, 8), 10, verbose=False)
        self.assertEqual((again.epoch, again.step), (3, 15))
        self.assertEqual({path.name: path.stat().st_mtime_ns for path in self.folder.iterdir()}, files)

        patient = make(5)
        patient.resume()
        patient.fit(classes(), classes(8, 8), 10, verbose=False)
        self.assertEqual(patient.epoch, 6)

    def test_fit_after_resume_trains_what_is_left(self) -> None:
        whole_run = self.trainer(checkpoint_dir=None)
        whole_run.fit(classes(), num_epochs=5, verbose=False)
        self.trainer().fit(classes(), num_epochs=2, verbose=False)
        rest = self.trainer()
        rest.resume()
        rest.fit(classes(), num_epochs=5, verbose=False)
        self.assertEqual(rest.epoch, 5)
        self.assert_same_weights(rest.model, whole_run.model)
        self.assertEqual(rest.history, whole_run.history)
        rest.fit(classes(), num_epochs=2, verbose=False)  # and then on
        self.assertEqual(rest.epoch, 7)

    def test_save_and_resume_need_a_directory(self) -> None:
        trainer = self.trainer(checkpoint_dir=None)
        for method in (trainer.save, trainer.resume):
            with self.assertRaisesRegex(ValueError, "checkpoint_dir"):
                method()

    def test_failed_save_raises_and_older_ones_stay(self) -> None:
        trainer = self.trainer()
        trainer.fit(classes(), num_epochs=1, verbose=False)
        real = os.fsync

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        os.fsync = full
        try:
            with self.assertRaises(OSError):
                trainer.fit(classes(), num_epochs=1, verbose=False)
        finally:
            os.fsync = real
        again = self.trainer()
        self.assertEqual(again.resume().name, "step-00000005.pt")


class Transfers(TrainerCase):
    """Between two log points nothing goes from the device to the host."""

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def test_none_per_step_and_few_per_log_point(self) -> None:
        model = network(norm=True)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        counts: list[int] = []
        counter = self.Count()
        real = torch.Tensor.tolist

        def tolist(tensor: Tensor) -> list:  # reads all values without that operation
            counter.count += 1
            return real(tensor)

        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(),
            optimizer,
            None,
            OneCycleLR(optimizer, 0.1, total_steps=99),
            nan_policy="ignore",
            log_every=10,
            clip_norm=1.0,
            clip_value=0.5,
            accumulate=2,
            on_step_end=[lambda t: counts.append(counter.count)],
        )
        batches = classes(256, 8)  # 32 batches: log points after 10, 20 and 30
        with counter, mock.patch.object(torch.Tensor, "tolist", tolist):
            trainer.train_one_epoch(batches)
        self.assertEqual(len(counts), 16)
        self.assertEqual(counts[3], 0)
        logs = [i for i, (before, after) in enumerate(zip([0, *counts], counts, strict=False)) if after > before]
        self.assertEqual(logs, [4, 9, 14])

    def test_the_step_runs_where_reading_is_impossible(self) -> None:
        """Tensors on the `meta` device have no values: any read of one raises, where an accelerator would wait."""
        model = network(norm=True).to("meta")
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        ended: list[int] = []

        class Enough(Exception):
            pass

        def end(trainer: Trainer) -> None:
            ended.append(trainer.step)
            if trainer.step == 4:
                raise Enough

        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(),
            optimizer,
            "meta",
            StepLR(optimizer, 2),
            scheduler_interval="step",
            averages=averaged_copy(model, 0.9),
            clip_value=1.0,
            log_every=1000,
            on_step_end=[end],
        )
        no_autocast = mock.patch(
            "torchbasics.evaluation.autocast", lambda *_: contextlib.nullcontext()
        )  # it doesn't know this device
        with self.assertRaises(Enough), no_autocast:
            trainer.train_one_epoch(classes())
        self.assertEqual(ended, [1, 2, 3, 4])
        with self.assertRaises((RuntimeError, NotImplementedError)):  # that reading is impossible there
            float(torch.zeros((), device="meta"))


class ChangesNoWeight(TrainerCase):
    """How often one validates, logs or saves."""

    def weights(self, val: Any = None, validate_in_between: bool = False, **options: Any) -> dict[str, Tensor]:
        model = network(dropout=0.5, norm=True)
        torch.manual_seed(9)
        random.seed(9)
        inputs, targets = whole(classes())
        train = DataLoader(TensorDataset(inputs, targets), 8, shuffle=True)
        hooks = [lambda t: t.validate(val)] if validate_in_between else []
        Trainer(model, nn.CrossEntropyLoss(), sgd(model), on_step_end=hooks, **options).fit(
            train, val, 3, verbose=False
        )
        return model.state_dict()

    def test_all_ways_give_the_same_weights(self) -> None:
        val = DataLoader(TensorDataset(*whole(classes(seed=1))), 8, shuffle=True)
        plain = self.weights()
        for name, options in {
            "validation": {"val": val},
            "validation at each step": {"val": val, "validate_in_between": True},
            "log": {"log_every": 1},
            "save": {"checkpoint_dir": self.folder / "a", "save_every": 1},
            "save per epoch": {"checkpoint_dir": self.folder / "b"},
        }.items():
            with self.subTest(name):
                self.assert_same_tensors(self.weights(**options), plain)

    def test_validation_may_share_the_generator_of_the_training_loader(self) -> None:
        found = []
        for validate_in_between in (False, True):
            generator, model = torch.Generator().manual_seed(3), network()
            train, val = (
                DataLoader(TensorDataset(*whole(classes(seed=seed))), 8, shuffle=True, generator=generator)
                for seed in (0, 1)
            )
            hooks = [lambda t, val=val: t.validate(val)] if validate_in_between else []
            trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model), on_step_end=hooks)
            trainer.fit(train, val if validate_in_between else None, 3, verbose=False)
            found.append(model.state_dict())
        self.assert_same_tensors(*found)

    def test_validation_may_use_the_training_loader_within_its_epoch(self) -> None:
        found = []
        for hooks in ([], [lambda t: t.validate(t.loader)]):
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
            nn.init.zeros_(model[1].weight)
            nn.init.zeros_(model[1].bias)
            images = torch.arange(16 * 64, dtype=torch.uint8).view(16, 1, 8, 8)
            trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model), on_step_end=hooks)
            trainer.loader = TensorLoader(images, torch.arange(16) % 3, 4, shuffle=True, augment=RandomAffine())
            trainer.fit(trainer.loader, None, 2, verbose=False)
            found.append(model.state_dict())
        self.assert_same_tensors(*found)

    def test_losses_do_not_depend_on_when_they_are_read(self) -> None:
        histories = []
        for log_every in (1, 3, 50):
            model = network()
            histories.append(
                Trainer(model, nn.CrossEntropyLoss(), sgd(model), log_every=log_every).fit(
                    classes(), num_epochs=2, verbose=False
                )
            )
        self.assertEqual(histories[0], histories[1])
        self.assertEqual(histories[0], histories[2])

    def test_validate_restores_modes_and_random_state(self) -> None:
        model = network(dropout=0.5, norm=True)
        model.train()
        model[1].eval()  # a frozen BatchNorm
        trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model))
        before, state, python = torch.get_rng_state(), copy.deepcopy(model.state_dict()), random.getstate()

        class Drawing:
            def __iter__(self) -> Iterator:
                torch.rand(3), random.random()
                return iter(classes())

        for use in (trainer.validate, trainer.predict, lambda loader: evaluate(model, loader, nn.CrossEntropyLoss())):
            use(Drawing())
            self.assertEqual([module.training for module in model], [True, False, True, True, True])
            self.assertTrue(model.training)
            self.assertTrue(torch.equal(torch.get_rng_state(), before))
            self.assertEqual(random.getstate(), python)
            self.assert_same_tensors(model.state_dict(), state)

    def test_modes_are_restored_after_an_error(self) -> None:
        model = network(dropout=0.5).train()
        with self.assertRaises(RuntimeError):
            Trainer(model, nn.CrossEntropyLoss(), sgd(model)).validate([(torch.zeros(2, 99), torch.zeros(2).long())])
        self.assertTrue(all(module.training for module in model.modules()))


class Functions(TrainerCase):
    def test_evaluate_and_compute_accuracy(self) -> None:
        model, batches = network(dropout=0.5, norm=True), classes(21, 8)
        inputs, targets = whole(batches)
        model.eval()
        with torch.no_grad():
            outputs = model(inputs)
        expected = float((outputs.argmax(1) == targets).double().mean())
        model.train()
        loss, accuracy = evaluate(model, batches, nn.CrossEntropyLoss(), "cpu")
        self.assertAlmostEqual(loss, float(nn.functional.cross_entropy(outputs, targets)), places=5)
        self.assertEqual(accuracy, expected)
        self.assertEqual(compute_accuracy(model, batches), expected)
        self.assertTrue(model.training)

    def test_compute_accuracy_wants_classes(self) -> None:
        with self.assertRaisesRegex(ValueError, "integer class targets"):
            compute_accuracy(nn.Linear(3, 2), [(torch.randn(4, 3), torch.full((4, 2), 0.5))])

    def test_predict_one_and_many(self) -> None:
        model = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(9, 4))
        images = torch.randn(5, 1, 3, 3)
        probabilities = (images.flatten(1) @ model[2].weight.T + model[2].bias).softmax(1)
        found, confidences = predict(model, images, "cpu")
        self.assertTrue(torch.equal(found, probabilities.argmax(1)))
        torch.testing.assert_close(confidences, probabilities.amax(1))
        one, confidence = predict(model, images[2])
        self.assertIsInstance(one, int)
        self.assertIsInstance(confidence, float)
        self.assertEqual(one, int(found[2]))
        self.assertAlmostEqual(confidence, probabilities[2].amax().item(), places=5)
        self.assertTrue(model.training)
        for shape in ((3, 3), (1, 5, 1, 3, 3)):
            with self.assertRaisesRegex(ValueError, "shape"):
                predict(model, torch.zeros(shape))

    def test_trainer_predict(self) -> None:
        model = network(dropout=0.5).train()
        trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model), precision="bf16")
        batches = classes(19, 8)
        outputs = trainer.predict(batches)
        self.assertEqual((outputs.shape, outputs.dtype), ((19, 3), torch.float32))
        self.assertTrue(torch.equal(outputs, trainer.predict([inputs for inputs, _ in batches])))
        with self.assertRaisesRegex(ValueError, "no batch"):
            trainer.predict([])

    def test_callbacks_in_order(self) -> None:
        model, seen = network(), []
        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(),
            sgd(model),
            on_step_end=[lambda t: seen.append(("step", t.step, t.batch, t.epoch))],
            on_epoch_end=[lambda t: seen.append(("epoch", t.step, t.batch, t.epoch, len(t.history["train_loss"])))],
        )
        trainer.fit(classes(16, 8), num_epochs=2, verbose=False)
        self.assertEqual(
            seen,
            [
                ("step", 1, 1, 0),
                ("step", 2, 2, 0),
                ("epoch", 2, 0, 1, 1),
                ("step", 3, 1, 1),
                ("step", 4, 2, 1),
                ("epoch", 4, 0, 2, 2),
            ],
        )

    def test_verbose_prints_a_line_per_epoch(self) -> None:
        model, out = network(), io.StringIO()
        with contextlib.redirect_stdout(out):
            history = Trainer(model, nn.CrossEntropyLoss(), sgd(model)).fit(classes(), classes(8, 8), 2)
        lines = out.getvalue().splitlines()
        self.assertEqual(len(lines), 2)
        self.assertTrue(lines[1].startswith("epoch 2/2"))
        self.assertIn(f"{history['val_acc'][1]:.2%}", lines[1])

    def test_wrong_options(self) -> None:
        model = network()
        plateau = ReduceLROnPlateau(sgd(model))
        for options in (
            {"accumulate": 0},
            {"clip_norm": 0.0},
            {"clip_norm": -1.0},
            {"clip_norm": math.nan},
            {"clip_value": math.inf},
            {"nan_policy": "no"},
            {"monitor": "loss"},
            {"save_every": 0},
            {"log_every": 0},
            {"scheduler_interval": "batch"},
            {"precision": "fp8"},
            {"checkpoint_dir": self.folder, "keep": 0},
            {"scheduler": plateau, "scheduler_interval": "step"},
            {"monitor": "val_acc", "early_stopping": EarlyStopping(3)},
            {"monitor": "val_acc", "scheduler": plateau},
        ):
            with self.subTest(options), self.assertRaises(ValueError):
                Trainer(model, nn.CrossEntropyLoss(), sgd(model), **options)
        with self.assertRaisesRegex(ValueError, "reduction"):
            Trainer(model, nn.CrossEntropyLoss(reduction="sum"), sgd(model))

    def test_accuracy_as_monitor_needs_classes(self) -> None:
        model = nn.Linear(3, 1)
        with self.assertRaisesRegex(ValueError, "monitor"):
            Trainer(model, nn.MSELoss(), sgd(model), monitor="val_acc").fit(
                [(torch.ones(2, 3), torch.ones(2, 1))], num_epochs=1, verbose=False
            )


class Signals(TrainerCase):
    def setUp(self) -> None:
        super().setUp()
        self.before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def tearDown(self) -> None:
        self.assertEqual([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], self.before)

    def run_until(self, number: int, **options: Any) -> tuple[Trainer, Interrupted]:
        model = network()
        folder = tempfile.mkdtemp(dir=self.folder)
        trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model), checkpoint_dir=folder, **options)
        with self.assertRaises(Interrupted) as caught:
            trainer.fit(classes(), options.pop("val", None), 3, verbose=False)
        self.assertEqual(caught.exception.signum, number)
        self.assertTrue(caught.exception.checkpoint.is_file())
        self.assertIn(str(caught.exception.checkpoint), str(caught.exception))
        return trainer, caught.exception

    def test_at_a_step(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            trainer, stop = self.run_until(
                number, on_step_end=[lambda t, n=number: t.step == 7 and os.kill(os.getpid(), n)]
            )
            state = load_checkpoint(stop.checkpoint)
            self.assertEqual((state["step"], state["epoch"], state["batch"], trainer.step), (7, 1, 2, 7))

    def test_within_a_step_the_step_is_finished_first(self) -> None:
        class Criterion(nn.CrossEntropyLoss):
            calls = itertools.count(1)

            def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
                if next(self.calls) == 4:  # in the first half of the second window
                    os.kill(os.getpid(), signal.SIGTERM)
                return super().forward(outputs, targets)

        model = network()
        trainer = Trainer(model, Criterion(), sgd(model), checkpoint_dir=self.folder, accumulate=3)
        with self.assertRaises(Interrupted) as caught:
            trainer.fit(classes(64, 8), num_epochs=3, verbose=False)
        state = load_checkpoint(caught.exception.checkpoint)
        self.assertEqual((state["step"], state["batch"]), (2, 6))

    def test_during_validation(self) -> None:
        asked: list[int] = []

        class Val:
            def __iter__(self) -> Iterator:
                for i, batch in enumerate(classes()):
                    asked.append(i)
                    if i == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    yield batch

        model = network()
        trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model), checkpoint_dir=self.folder)
        with self.assertRaises(Interrupted) as caught:
            trainer.fit(classes(), Val(), 3, verbose=False)
        self.assertEqual(asked, [0, 1])  # the rest of the validation is not waited for
        state = load_checkpoint(caught.exception.checkpoint)
        self.assertEqual((state["step"], state["epoch"], state["batch"], state["history"]["val_loss"]), (5, 0, 5, []))
        self.assertTrue(model.training)

    def test_during_a_save(self) -> None:
        model = network()
        trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model), checkpoint_dir=self.folder, save_every=2)
        real, saved = trainer.checkpoints.save, []

        def save(state: dict) -> Path:
            saved.append(state["step"])
            os.kill(os.getpid(), signal.SIGINT)
            return real(state)

        trainer.checkpoints.save = save
        with self.assertRaises(Interrupted) as caught:
            trainer.fit(classes(), num_epochs=3, verbose=False)
        self.assertEqual(load_checkpoint(caught.exception.checkpoint)["step"], 2)
        self.assertEqual(saved, [2])  # not a second time

    def test_at_the_end_of_an_epoch_and_of_all(self) -> None:
        for epoch in (1, 3):
            trainer, stop = self.run_until(
                signal.SIGTERM, on_epoch_end=[lambda t, e=epoch: t.epoch == e and os.kill(os.getpid(), signal.SIGTERM)]
            )
            state = load_checkpoint(stop.checkpoint)
            self.assertEqual((state["epoch"], state["batch"], trainer.epoch), (epoch, 0, epoch))

    def test_with_a_loader_whose_workers_got_the_signal_too(self) -> None:
        class Loader:
            def __iter__(self) -> Iterator:
                yield from classes()[:3]
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated")

        for train, val, where in ((Loader(), None, (3, 0, 3)), (classes(), Loader(), (5, 0, 5))):
            model = network()
            trainer = Trainer(model, nn.CrossEntropyLoss(), sgd(model), checkpoint_dir=self.folder / str(where[0]))
            with self.assertRaises(Interrupted) as caught:
                trainer.fit(train, val, 1, verbose=False)
            state = load_checkpoint(caught.exception.checkpoint)
            self.assertEqual((state["step"], state["epoch"], state["batch"]), where)

    def test_a_trainer_that_was_interrupted_can_go_on(self) -> None:
        trainer, _ = self.run_until(
            signal.SIGTERM, on_step_end=[lambda t: t.step == 7 and os.kill(os.getpid(), signal.SIGTERM)]
        )
        trainer.fit(classes(), num_epochs=2, verbose=False)
        twin = network()
        Trainer(twin, nn.CrossEntropyLoss(), sgd(twin)).fit(classes(), num_epochs=3, verbose=False)
        self.assert_same_weights(trainer.model, twin)

    def test_handlers_are_restored_after_errors_and_untouched_without_checkpoints(self) -> None:
        seen = []
        model = network()
        Trainer(
            model,
            nn.CrossEntropyLoss(),
            sgd(model),
            on_step_end=[lambda t: seen.append(signal.getsignal(signal.SIGTERM))],
        ).fit(classes(8, 8), num_epochs=1, verbose=False)
        self.assertEqual(seen, [self.before[1]])
        with self.assertRaises(ZeroDivisionError):
            Trainer(
                model, nn.CrossEntropyLoss(), sgd(model), checkpoint_dir=self.folder, on_step_end=[lambda t: 1 / 0]
            ).fit(classes(), num_epochs=1, verbose=False)

    @needs_processes
    def test_a_second_signal_ends_at_once(self) -> None:
        [done] = outcomes(1, signalled_twice, str(self.folder), group=False)
        self.assertEqual((done.code, done.said), (-signal.SIGTERM, ""))


def signalled_twice(rank: int, folder: str) -> None:
    """Trains in a process of its own, which gets SIGTERM twice after its first step."""

    def twice(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        print("still here", flush=True)

    model = nn.Linear(2, 2)
    batches = [(torch.zeros(4, 2), torch.zeros(4).long())] * 3
    sgd = torch.optim.SGD(model.parameters())
    Trainer(model, nn.CrossEntropyLoss(), sgd, checkpoint_dir=folder, on_step_end=[twice]).fit(batches)


class Refusals(TrainerCase):
    def test_state_of_something_else(self) -> None:
        def make(
            metadata: dict | None = None, model: nn.Module | None = None, kind: Any = torch.optim.SGD, **options: Any
        ) -> Trainer:
            model = model or network()
            return Trainer(
                model,
                nn.CrossEntropyLoss(),
                kind(model.parameters(), lr=0.1),
                metadata=metadata or {"data": "a"},
                **options,
            )

        source = make()
        source.fit(classes(), num_epochs=1, verbose=False)
        state = source.state_dict()
        cases = {
            "another model": make(model=nn.Linear(6, 3)),
            "metadata": make({"data": "b"}),
            "more metadata": make({"data": "a", "size": 3}),
            "another optimizer": make(kind=torch.optim.AdamW),
            "scaler": make(precision="fp16"),
        }
        averaged = network()
        cases["averages"] = make(model=averaged, averages=averaged_copy(averaged, 0.9))
        scheduled = network()
        optimizer = sgd(scheduled)
        cases["schedule"] = Trainer(
            scheduled, nn.CrossEntropyLoss(), optimizer, None, StepLR(optimizer, 1), metadata={"data": "a"}
        )
        for name, trainer in cases.items():
            before = copy.deepcopy(trainer.model.state_dict())
            with self.subTest(name), self.assertRaises(CheckpointError) as caught:
                trainer.load_state_dict(copy.deepcopy(state), "there.pt")
            self.assertTrue(str(caught.exception).startswith("there.pt: "), name)
            self.assertNotIn("\n", str(caught.exception))
            self.assert_same_tensors(trainer.model.state_dict(), before)
        state.pop("running")
        with self.assertRaisesRegex(CheckpointError, "running"):
            make().load_state_dict(state)
        trainer = make()
        with self.assertRaisesRegex(CheckpointError, "there.pt: 'batch' is missing or no int"):
            trainer.load_state_dict(source.state_dict() | {"batch": None}, "there.pt")
        self.assertEqual((trainer.epoch, trainer.step), (0, 0))


@unittest.skipUnless(
    shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"), "torch.compile needs a C++ compiler"
)
class Compiled(TrainerCase):
    def test_trains_as_the_plain_model_does(self) -> None:
        results = []
        for compile in (False, True):
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(6, 3))
            trainer = Trainer(
                model, nn.CrossEntropyLoss(), sgd(model), compile=compile, checkpoint_dir=self.folder / str(compile)
            )
            trainer.fit(classes(16, 8), num_epochs=1, verbose=False)
            results.append(trainer)
            self.assertEqual(model._compiled_call_impl is not None, compile)  # torch's own note that it is
        torch.testing.assert_close(results[1].model.state_dict(), results[0].model.state_dict())
        state = load_checkpoint(results[1].checkpoints.steps()[-1][1])
        self.assertEqual(state["model_state_dict"].keys(), results[0].model.state_dict().keys())


class CachingLayer(nn.Module):
    """Keeps a tensor that it made in its first forward, as rotary embeddings and masks are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.cached: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cached is None:
            self.cached = torch.ones(2)
        return self.linear(x) * self.cached


class WhatAReviewFound(unittest.TestCase):
    def batches(self, *values: float) -> list:
        return [(torch.full((4, 4), value), torch.tensor([0, 1, 0, 1])) for value in values]

    def trainer(self, model: nn.Module | None = None, **options: Any) -> Trainer:
        model = model or nn.Linear(4, 2)
        return Trainer(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1), **options)

    def test_validating_first_does_not_forbid_training(self) -> None:
        trainer = self.trainer(CachingLayer())
        trainer.validate(self.batches(1.0))
        trainer.fit(self.batches(1.0, 2.0), None, 1, verbose=False)
        self.assertEqual(trainer.step, 2)

    def test_skip_looks_at_the_gradient_before_it_is_clipped_by_value(self) -> None:
        trainer = self.trainer(nan_policy="skip", clip_value=1.0)
        before = trainer.model.weight.detach().clone()
        inf = lambda grad: torch.full_like(grad, math.inf)  # noqa: E731
        trainer.model.weight.register_hook(inf)
        trainer.fit(self.batches(1.0, 2.0), None, 1, verbose=False)
        self.assertEqual((trainer.step, trainer.skipped), (0, 2))
        self.assertTrue(torch.equal(trainer.model.weight, before))

    def test_a_nan_loss_is_found_where_the_scaler_skips_its_step(self) -> None:
        trainer = self.trainer(precision="fp16", log_every=50)
        trainer._finite_now = lambda results, window: True  # as on an accelerator, where losses are read later
        with self.assertRaisesRegex(NonFiniteLoss, "batch 2"):
            trainer.fit(self.batches(1.0, math.nan, 1.0), None, 1, verbose=False)

    def test_a_model_that_takes_no_empty_batch_is_told_how_to(self) -> None:
        class Viewing(nn.Linear):
            def forward(self, inputs: Tensor) -> Tensor:
                return super().forward(inputs.view(len(inputs), -1))

        trainer, (inputs, targets) = self.trainer(Viewing(4, 2)), self.batches(1.0)[0]
        for loader in ([(inputs[:0], targets[:0])], [(inputs, targets), (inputs[:0], targets[:0])]):
            with self.assertRaisesRegex(RuntimeError, r"takes? a batch of no samples.*x.flatten\(1\)"):
                trainer.train_one_epoch(loader)
        with self.assertRaisesRegex(RuntimeError, "^(addmm: )?mat1 and mat2"):  # any other error is torch's own
            trainer.train_one_epoch([(inputs[:, :3], targets)])

    def test_an_infinity_that_is_meant_is_saved_and_resumed(self) -> None:
        """A mask; a running statistic that became infinite is still refused."""
        for persistent in (False, True):
            with tempfile.TemporaryDirectory() as folder, self.subTest(persistent=persistent):
                trainers = []
                for _ in range(2):
                    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
                    model.register_buffer("mask", torch.tensor([0.0, -math.inf]), persistent=persistent)
                    trainers.append(self.trainer(model, checkpoint_dir=folder, averages=averaged_copy(model, 0.9)))
                trainers[0].fit(self.batches(1.0, 2.0, 3.0), None, 2, verbose=False)
                self.assertTrue(trainers[1].resume())
                for trainer in trainers:
                    self.assertEqual(trainer.evaluated_model.mask.tolist(), [0.0, -math.inf])
                trainers[1].model[1].running_mean[0] = math.inf
                with self.assertRaisesRegex(NonFiniteLoss, "a running statistic is NaN or infinite"):
                    trainers[1].save()

    def test_so_is_that_of_a_compiled_part(self) -> None:
        class Masked(nn.Linear):
            def __init__(self) -> None:
                super().__init__(4, 2)
                self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

        with tempfile.TemporaryDirectory() as folder:
            first, second = (
                self.trainer(nn.Sequential(torch.compile(Masked(), backend="eager")), checkpoint_dir=folder)
                for _ in range(2)
            )
            self.assertTrue(any("_orig_mod" in name for name, _ in first.model.named_buffers()))
            first.save()
            self.assertTrue(second.resume())

    def test_a_refused_resume_changes_no_weight(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.trainer(nn.Linear(4, 2), checkpoint_dir=folder).save()
            model = nn.Linear(4, 2)
            optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 1.0}], 0.1)
            other = Trainer(model, nn.CrossEntropyLoss(), optimizer, checkpoint_dir=folder)
            before = copy.deepcopy(model.state_dict())
            with self.assertRaisesRegex(CheckpointError, r"has groups of \[2\] parameters, this one of \[1, 1\]"):
                other.resume()
            self.assertTrue(all(torch.equal(before[name], value) for name, value in model.state_dict().items()))

    def test_metadata_of_any_name_is_compared(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.trainer(checkpoint_dir=folder, metadata={"optimizer": "rate 0.1"}).save()
            with self.assertRaisesRegex(CheckpointError, "optimizer is 'rate 0.1' there, 'rate 9' here"):
                self.trainer(checkpoint_dir=folder, metadata={"optimizer": "rate 9"}).resume()
            self.assertTrue(self.trainer(checkpoint_dir=folder, metadata={"optimizer": "rate 0.1"}).resume())

    def test_a_signal_after_the_last_save_is_told_too(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(checkpoint_dir=folder)
            late = mock.patch.object(trainer, "_epoch_line", lambda _: os.kill(os.getpid(), signal.SIGTERM))
            with late, contextlib.redirect_stdout(io.StringIO()), self.assertRaises(Interrupted) as raised:
                trainer.fit(self.batches(1.0, 2.0), None, 1)
            self.assertEqual(raised.exception.checkpoint.name, "step-00000002.pt")

    def test_parameters_of_the_criterion_are_saved_and_resumed(self) -> None:
        class Weighted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(()))

            def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
                return nn.functional.cross_entropy(outputs * self.weight.exp(), targets) + self.weight**2

        def trainer(folder: Path) -> Trainer:
            torch.manual_seed(2)
            model, criterion = nn.Linear(4, 2), Weighted()
            optimizer = torch.optim.Adam([*model.parameters(), *criterion.parameters()], 0.1)
            return Trainer(model, criterion, optimizer, checkpoint_dir=folder)

        batches = self.batches(1.0, 2.0, 3.0)
        with tempfile.TemporaryDirectory() as folder:
            straight = trainer(Path(folder) / "straight")
            straight.fit(batches, None, 4, verbose=False)
            first = trainer(Path(folder) / "cut")
            first.fit(batches, None, 2, verbose=False)
            second = trainer(Path(folder) / "cut")
            second.resume()
            second.fit(batches, None, 4, verbose=False)
            self.assertTrue(torch.equal(second.criterion.weight, straight.criterion.weight))
            self.assertTrue(torch.equal(second.model.weight, straight.model.weight))
            self.assertFalse(torch.equal(second.criterion.weight, first.criterion.weight))

    def test_two_runs_in_one_folder_are_refused(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            first = self.trainer(checkpoint_dir=folder)
            first.fit(self.batches(1.0), None, 2, verbose=False)
            first.fit(self.batches(1.0), None, 1, verbose=False)  # its own may go on
            second = self.trainer(checkpoint_dir=folder)
            with self.assertRaisesRegex(ValueError, "earlier run"):
                second.fit(self.batches(1.0), None, 1, verbose=False)
            self.assertEqual((second.epoch, second.step), (0, 0))
            second.resume()
            second.fit(self.batches(1.0), None, 3, verbose=False)

    def test_saving_needs_a_place(self) -> None:
        with self.assertRaisesRegex(ValueError, "save_every=2 needs a checkpoint_dir"):
            self.trainer(save_every=2)


if __name__ == "__main__":
    unittest.main()
