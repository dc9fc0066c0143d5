"""What a run tells: images and seconds, rows without NaN, and the figures on the test set, counted by hand."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import sys
import tempfile
import time
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from tests.processes import in_processes, needs_processes
from torchbasics import report
from torchbasics.checkpoint import FORMAT, RunDirectory, save_checkpoint
from torchbasics.data import TensorLoader
from torchbasics.loaders import Loaders
from torchbasics.trainer import NonFiniteLoss, Trainer

CLASSES = ("cat", "dog", "ox", "owl")  # no owl among the test images
COUNT = 11


def setUpModule() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    unittest.addModuleCleanup(torch.set_num_threads, threads)


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(COUNT, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return inputs, torch.arange(COUNT) % 3


def best_model() -> nn.Linear:
    model = nn.Linear(4, 4).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(4) * 2)
        model.bias.zero_()
    return model


def judged(rank: int, folder: str) -> dict[str, Any]:
    """`judge` of a trainer that holds other weights than best.pt; in batches of 4, so that parts are unequal."""
    model = nn.Linear(4, 4).double()
    trainer = Trainer(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1))
    trainer.best_epoch = 0
    loader = TensorLoader(*examples(), 4)
    data = Loaders(loader, loader, loader, {"classes": CLASSES}, "")
    result, logits, targets = report.judge(trainer, data, Path(folder) / "best.pt")
    return {"result": result, "logits": logits, "targets": targets}


class Judge(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        state: dict[str, Any] = {
            "format": FORMAT,
            "epoch": 0,
            "loss": None,
            "optimizer_state_dict": {},
            "metrics": {},
            "metadata": {},
        }
        save_checkpoint({**state, "step": 1, "model_state_dict": best_model().state_dict()}, f"{self.folder}/best.pt")

    def check(self, result: dict[str, Any]) -> None:
        inputs, targets = examples()
        confusion = [[0] * 4 for _ in range(4)]
        loss = 0.0
        for image, target in zip((inputs * 2).tolist(), targets.tolist(), strict=True):
            confusion[target][max(range(4), key=image.__getitem__)] += 1
            loss += math.log(sum(math.exp(value) for value in image)) - image[target]
        right = sum(confusion[i][i] for i in range(4))
        self.assertEqual((result["confusion"], result["test_samples"]), (confusion, COUNT))
        self.assertAlmostEqual(result["test_accuracy"], right / COUNT, places=6)
        self.assertAlmostEqual(result["test_loss"], loss / COUNT, places=6)
        expected = {name: confusion[i][i] / sum(confusion[i]) for i, name in enumerate(CLASSES[:3])}
        self.assertEqual(result["accuracy_by_class"], {**expected, "owl": None})

    def test_by_hand(self) -> None:
        found = judged(0, self.folder)
        self.check(found["result"])
        self.assertEqual((found["logits"].shape, found["targets"].tolist()), ((COUNT, 4), examples()[1].tolist()))

    @needs_processes
    def test_of_all_processes(self) -> None:
        for world_size in (2, 3):
            every = in_processes(world_size, judged, self.folder)
            for found in every:
                self.check(found["result"])
            self.assertEqual(sum(len(found["targets"]) for found in every), COUNT)

    def test_without_a_best_epoch(self) -> None:
        trainer: Any = SimpleNamespace(best_epoch=None, epoch=3)
        with self.assertRaisesRegex(NonFiniteLoss, "no epoch of 3 had a finite validation loss"):
            report.judge(trainer, Loaders(None, None, None, {}, ""), Path("best.pt"))


class Figures(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def test_rows_have_no_nan(self) -> None:
        history = {"train_loss": [0.5, math.nan], "val_loss": [math.inf, 0.25], "val_acc": [None, 0.5], "step": [3, 6]}
        trainer: Any = SimpleNamespace(history=history)
        self.assertEqual(
            report.metrics(trainer),
            [
                {"epoch": 1, "train_loss": 0.5, "val_loss": None, "val_acc": None, "step": 3},
                {"epoch": 2, "train_loss": None, "val_loss": 0.25, "val_acc": 0.5, "step": 6},
            ],
        )

    def test_images_are_counted_once_over_the_sessions(self) -> None:
        """70 images in batches of 16: 5 batches an epoch, the last of 6."""
        args = argparse.Namespace(quiet=True, batch_size=16)
        data = Loaders(range(5), None, None, {"samples": (70, 10, 10)}, "")
        trainer: Any = SimpleNamespace(device=torch.device("cpu"))
        with RunDirectory(self.folder / "run") as run:
            first = report.Report(args, data, run, time.monotonic() - 5)
            time.sleep(0.02)
            self.assertEqual(first.count(trainer, 5)[0], 70)
            self.assertEqual(first.count(trainer, 2)[0], 32)  # stopped in the second epoch
            self.assertTrue(5 < run.info["sessions"][0]["total_seconds"] < 60)
            second = report.Report(args, data, run, time.monotonic() - 2)
            second.first_batch = 2  # where it goes on
            self.assertEqual(second.count(trainer, 5)[0], 38)
            self.assertEqual([session["samples"] for session in run.info["sessions"]], [102, 38])
            self.assertGreater(run.info["sessions"][0]["train_seconds"], 0.02)
            args = argparse.Namespace(epochs=2, model="mlp")
            model = best_model()
            trainer = SimpleNamespace(
                best_epoch=1, epoch=2, history={"val_acc": [0.5, 0.75]}, stopped_early=False, skipped=1, model=model
            )
            run.info["sessions"] = [{"train_seconds": 3.0, "total_seconds": 7.0, "samples": 102}, second.session]
            second.session |= {"train_seconds": 1.0, "samples": 38}
            named = Loaders(None, None, None, {"dataset": "digits"}, "")
            second.args, second.data = args, named
            found = second.summary(trainer)
        self.assertTrue(9 < found["total_seconds"] < 60)  # both sessions, the second up to now
        self.assertEqual((found["samples_per_second"], found["train_seconds"]), (35.0, 4.0))
        self.assertEqual((found["best_epoch"], found["best_val_accuracy"], found["skipped_steps"]), (2, 0.75, 1))
        self.assertEqual((found["parameters"], found["stopped_because"]), (20, "all 2 epochs done"))

    def test_nobody_may_hear_it(self) -> None:
        """Standard error is closed (`2>&-`)."""
        data = Loaders(range(5), None, None, {"samples": (70, 10, 10)}, "")
        with RunDirectory(self.folder / "run") as run, contextlib.redirect_stderr(None):
            self.assertFalse(report.Report(argparse.Namespace(quiet=False, batch_size=16), data, run, 0.0).live)

    def test_the_interpreter_by_its_name_only_where_that_finds_it(self) -> None:
        for executable, expected in (("/a/bin/python3", "python3"), ("/b/bin/python3", "/b/bin/python3")):
            with (
                mock.patch.object(sys, "executable", executable),
                mock.patch.object(report.shutil, "which", return_value="/a/bin/python3"),
            ):
                self.assertEqual(report.python_command(), expected)

    def test_a_directory_that_is_not_there_yet(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        with mock.patch.object(report, "datetime") as clock:
            clock.datetime.now.return_value = _Noon()
            for expected in ("digits-noon", "digits-noon-2", "digits-noon-3"):
                path = report.unused_directory("digits")
                self.assertEqual(path, Path("runs") / expected)
                path.mkdir(parents=True)

    def test_the_result_in_words(self) -> None:
        result = {
            "best_epoch": 2,
            "epochs_run": 3,
            "best_val_accuracy": 0.5,
            "test_accuracy": 0.25,
            "test_loss": 1.5,
            "dataset": "digits",
            "accuracy_by_class": {"cat": 0.125, "owl": None},
            "stopped_because": "all 3 epochs done",
            "train_seconds": 61.4,
            "samples_per_second": 12345.6,
        }
        said = []
        script = self.folder / "train_x.py"
        (self.folder / "predict.py").touch()  # beside the script; export.py is not
        with RunDirectory(self.folder / "my run") as run, mock.patch("sys.argv", [str(script)]):
            for notice, kept in (("NOTICE: drawn", True), ("", False)):
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    report.print_result(result, run, notice, "torchrun x.py", kept=kept)
                said.append(out.getvalue().splitlines())
        lines = [
            "",
            "best epoch 2 of 3: validation 50.00%, test 25.00% (loss 1.5000) on digits",
            "by class: cat 12.5%",
            "stopped because: all 3 epochs done; training took 61 s, 12,346 images/s",
        ]
        path, best = f"{self.folder}/my run", f"'{self.folder}/my run/checkpoints/best.pt'"
        self.assertEqual(said[1], lines)
        self.assertEqual((said[0][:4], said[0][-1]), (lines, "NOTICE: drawn"))
        kept_lines = {line.partition(":")[0]: line.partition(":")[2].strip() for line in said[0][4:-1]}
        self.assertEqual(kept_lines.keys(), {"files", "weights", "continue", "predict"})
        self.assertEqual((kept_lines["files"], kept_lines["weights"]), (path, best))
        self.assertEqual(kept_lines["continue"], f"torchrun x.py --resume '{path}'")
        self.assertTrue(kept_lines["predict"].endswith(f"predict.py --checkpoint {best} digit.png"))

    def test_names_cannot_speak_to_the_terminal(self) -> None:
        evil = "\x1b[2J\u202e"
        result = dict.fromkeys(("best_epoch", "epochs_run"), 1)
        result |= dict.fromkeys(("best_val_accuracy", "test_accuracy", "test_loss", "train_seconds"), 1.0)
        result |= {"samples_per_second": 1.0, "dataset": "folder", "stopped_because": "all 1 epochs done"}
        result["accuracy_by_class"] = {f"cat{evil}": 1.0}
        out = io.StringIO()
        with contextlib.redirect_stdout(out), RunDirectory(self.folder / evil) as run:
            report.print_result(result, run, f"of {evil}", "train", kept=True)
            report.Report.say(argparse.Namespace(args=argparse.Namespace(quiet=False)), f"table {evil}")  # type: ignore[arg-type]
        said = out.getvalue()
        self.assertEqual([c for c in said if not c.isprintable() and c != "\n"], [])
        for text in ("cat\\x1b[2J\\u202e 100.0%", "of \\x1b", "table \\x1b", "files:    "):
            self.assertIn(text, said)


class _Noon:
    def __format__(self, how: str) -> str:
        return "noon"


if __name__ == "__main__":
    unittest.main()
