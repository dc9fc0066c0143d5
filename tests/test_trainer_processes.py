"""Trainer on several processes: the same as one process, and refusals instead of hangs."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torchbasics as tb
from torchbasics import cli, distributed

from .common import in_processes, needs_processes, outcomes

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (48,), generator=torch.Generator().manual_seed(2))
Y[24:30] = -100  # in batches of 12, the second process's part of one batch is wholly ignored
Y[18:24] = -100
CPU = torch.device("cpu")


def make_trainer(strategy: str, folder: str | None = None, **options: Any) -> tb.Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    averages = tb.averaged_copy(model, 0.9) if strategy == "ddp" else None
    wrapped = distributed.shard(model, CPU) if strategy == "fsdp" else distributed.replicate(model, CPU)
    optimizer = torch.optim.AdamW(wrapped.parameters(), 0.01)
    criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64))
    return tb.Trainer(
        wrapped,
        criterion,
        optimizer,
        CPU,
        accumulate=3,
        clip_norm=0.5,
        averages=averages,
        checkpoint_dir=folder,
        **options,
    )


class ValidationLoader(tb.TensorLoader):
    """Calls `on_start` when a validation begins."""

    def __iter__(self) -> Any:
        self.on_start()
        return super().__iter__()


def train(rank: int, strategy: str, folder: str | None = None, stop: int = -1, place: str = "step") -> dict[str, Any]:
    """Train three epochs. The last process gets SIGTERM after the step `stop`, or in the validation after it."""
    trainer = make_trainer(strategy, folder)
    if folder is not None:
        trainer.resume()
    loader = tb.TensorLoader(X, Y, 12, drop_last=True)
    val_loader = ValidationLoader(X, Y, 12, world_size=1 if strategy == "fsdp" else None)

    def kill(where: str) -> None:
        if (where, trainer.step, rank) == (place, stop, distributed.world_size() - 1):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.on_step_end.append(lambda _: kill("step"))
    val_loader.on_start = lambda: kill("validation")
    trainer.fit(loader, val_loader, 3, verbose=False)
    return {"weights": distributed.full_weights(trainer.model), "history": trainer.history}


def run_script(rank: int, *args: Any) -> None:
    """Do `train` as a script does, and exit with the script's code."""

    def main(argv: Any) -> None:
        with distributed.process_group(CPU, 30.0):
            train(rank, *args)

    sys.exit(cli.run(main))


def refused(rank: int, case: str) -> str:
    options: dict[str, Any] = {"shuffle": False}
    data = TensorDataset(X[:47], Y[:47])
    trainer = make_trainer("ddp")
    loader: Any = tb.TensorLoader(X, Y, 12, drop_last=True)
    val_loader: Any = None
    if case == "not wrapped":
        model = nn.Linear(6, 3).double()
        trainer = tb.Trainer(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1))
    elif case == "not sharded":
        loader = DataLoader(TensorDataset(X, Y), 6)
    elif case == "incomplete batch":
        loader = DataLoader(data, 6, sampler=DistributedSampler(data, **options))
    elif case == "padding sampler":
        val_loader = DataLoader(data, 6, sampler=DistributedSampler(data, **options))
    elif case == "other shards":
        loader = DataLoader(TensorDataset(X[: 24 + 2 * rank], Y[: 24 + 2 * rank]), 6)
        loader.sharded = True
    elif case == "different lengths":
        loader = Sharded([(X[:6], Y[:6])] * (3 + rank))
    elif case == "sharded validation":
        trainer = make_trainer("fsdp")
        val_loader = tb.TensorLoader(X, Y, 12)
    try:
        trainer.fit(loader, val_loader, 1, verbose=False)
    except ValueError as error:
        return str(error)
    return "not refused"


class Sharded(list):
    """Batches that the user has divided among the processes."""

    sharded = True


def validate_parts(rank: int, count: int) -> tuple[float, float | None]:
    trainer = make_trainer("ddp")
    return trainer.validate(tb.TensorLoader(X[:count], Y[:count].clamp(min=0), 6))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 3).double(), nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.a(x), "b": self.b(x)}


class TwoHeadsTrainer(tb.Trainer):
    def compute_loss(self, batch: Any) -> Any:
        outputs = self.model(batch[0])
        loss = sum(self.criterion(scores, batch[1]) for scores in outputs.values())  # type: ignore[misc]
        return loss, outputs, batch[1]


def train_two_heads(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = distributed.replicate(TwoHeads(), CPU)
    trainer = TwoHeadsTrainer(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1), CPU)
    trainer.fit(tb.TensorLoader(X, Y, 12, drop_last=True), None, 1, verbose=False)
    return distributed.full_weights(model)


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@needs_processes
class ProcessesTest(unittest.TestCase):
    def assert_same_training(self, a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
        self.assertLessEqual(largest_difference(a["weights"], b["weights"]), tolerance)
        for name, values in a["history"].items():
            for first, second in zip(values, b["history"][name], strict=True):
                self.assertAlmostEqual(first, second, delta=max(tolerance, 0), msg=name)

    def test_two_processes_equal_one_with_accumulation_class_weights_and_ignored_targets(self) -> None:
        for strategy in ("ddp", "fsdp"):
            with self.subTest(strategy):
                [one] = in_processes(1, train, strategy)
                first, second = in_processes(2, train, strategy)
                self.assert_same_training(one, first, 1e-12)
                self.assertEqual(first["history"], second["history"])

    def test_a_part_without_targets_reaches_every_output_of_the_model(self) -> None:
        [one] = in_processes(1, train_two_heads)
        for weights in in_processes(2, train_two_heads):
            self.assertLessEqual(largest_difference(one, weights), 1e-12)

    def test_a_signal_to_one_process_makes_all_leave_after_the_same_step_with_one_save(self) -> None:
        for strategy in ("ddp", "fsdp"):
            straight = in_processes(2, train, strategy)
            # a signal in a step is exchanged before the next window, which is trained; then all leave
            for place, stop in (("step", 3), ("validation", 4)):
                with self.subTest(strategy, place=place), tempfile.TemporaryDirectory() as folder:
                    ends = outcomes(2, run_script, strategy, folder, stop, place, timeout=None)
                    self.assertEqual([end.code for end in ends], [143, 143], ends)
                    last = f"{folder}/step-00000004.pt"
                    self.assertEqual([end.output for end in ends], [f"SIGTERM: saved {last}\n"] * 2)
                    self.assertEqual(str(max(Path(folder).glob("step*"))), last)
                    resumed = in_processes(2, train, strategy, folder)
                    self.assert_same_training(straight[0], resumed[0], 0.0)

    def test_a_refusal_of_one_process_is_the_error_of_all(self) -> None:
        message = "26 samples are no whole number of batches of 6; use drop_last=True"
        self.assertEqual(in_processes(2, refused, "other shards"), [message] * 2)

    def test_a_run_of_two_processes_is_continued_by_one_with_the_same_batches(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            outcomes(2, train, "ddp", folder, 3)
            [one] = in_processes(1, train, "ddp", folder)
        [straight] = in_processes(1, train, "ddp")
        self.assert_same_training(straight, one, 1e-12)

    def test_validation_counts_every_sample_once_whatever_the_parts(self) -> None:
        for count in (1, 5, 7, 48):
            [one] = in_processes(1, validate_parts, count)
            for loss, accuracy in in_processes(2, validate_parts, count):
                self.assertAlmostEqual(loss, one[0], places=12)
                self.assertEqual(accuracy, one[1])

    def test_what_would_train_or_judge_wrongly_is_refused_by_all_processes(self) -> None:
        cases = {
            "not wrapped": "wrap it with distributed.replicate or shard",
            "not sharded": "every process would train on the same batches",
            "incomplete batch": "use drop_last=True",
            "padding sampler": "counts samples twice or not at all",
            "different lengths": "loaders gave 0, 1 batches for one step|loaders gave 3, 1 batches",
            "sharded validation": "every process reads all validation data",
        }
        for case, message in cases.items():
            with self.subTest(case):
                for text in in_processes(2, refused, case):
                    self.assertRegex(text, message)
