"""The run directory that one process holds and nothing overwrites, and what a run prints."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.common import ROOT
from torchbasics import run as run_module
from torchbasics.checkpoint import save_step
from torchbasics.run import RunDirectory, print_line
from torchbasics.trainer import Trainer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def loader_of(samples: int, batch_size: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(samples)), batch_size)


class RunCase(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        self.path = self.root / "a"

    def used(self) -> None:
        """Make a run at `self.path` that has saved."""
        with RunDirectory(self.path) as run:
            run.write_info(seed=1)
            save_step({"step": 1}, run.checkpoints, 1)

    def refused(self, text: str, path: Path | None, **options: Any) -> None:
        """Check for a ValueError before anything is changed."""
        before = sorted((path, path.stat().st_mtime_ns) for path in self.root.rglob("*"))
        with self.assertRaisesRegex(ValueError, text):
            RunDirectory(path, **options)
        self.assertEqual(sorted((path, path.stat().st_mtime_ns) for path in self.root.rglob("*")), before)


class Directory(RunCase):
    def test_two_starts_in_one_second_take_different_names(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.root)
        with mock.patch.object(run_module, "datetime") as clock:
            clock.datetime.now.return_value.__format__ = lambda self, how: "20260102-030405"
            paths = []
            for _ in range(3):
                with RunDirectory(name="mnist") as run:
                    paths.append(str(run.path))
        self.assertEqual(paths, [f"runs/mnist-20260102-030405{end}" for end in ("", "-2", "-3")])
        with RunDirectory() as run:
            self.assertRegex(str(run.path), r"^runs/run-\d{8}-\d{6}$")

    def test_a_directory_that_exists_is_never_overwritten(self) -> None:
        self.used()
        self.refused("a exists; choose another --output, or continue that run with --resume", self.path)
        (self.root / "file").write_text("mine")
        self.refused("file exists", self.root / "file")
        (self.root / "empty").mkdir()
        for _ in range(2):  # also one whose run failed before it wrote anything
            RunDirectory(self.root / "empty").__exit__()

    def test_a_run_that_comes_and_goes_between_the_check_and_the_lock_is_not_overwritten(self) -> None:
        other = self.path / "run.json"
        make = mock.patch.object(run_module, "make_folder", lambda path: path.mkdir() or other.write_text("kept"))
        with make, self.assertRaisesRegex(ValueError, "a exists"):
            RunDirectory(self.path)
        self.assertEqual(other.read_text(), "kept")

    def test_a_resume_needs_checkpoints_and_a_restart_does_not(self) -> None:
        self.refused("a: no checkpoint to resume from", self.path, resume=True)
        with RunDirectory(self.path, restart=True) as run:
            run.write_info(attempt=1)
        self.refused("a: no checkpoint to resume from", self.path, resume=True)
        with RunDirectory(self.path, restart=True) as run:
            save_step({"step": 1}, run.checkpoints, 1)
        for resume, restart in ((True, False), (False, True)):
            with RunDirectory(self.path, resume=resume, restart=restart) as run:
                self.assertEqual((run.path, run.checkpoints), (self.path, self.path / "checkpoints"))
            self.refused("which run should be continued", None, resume=resume, restart=restart)

    def test_what_killed_saves_left_is_removed_at_the_next_start(self) -> None:
        self.used()
        (self.path / ".run.json.5.unfinished").touch()
        (self.path / ".mine.5.tmp").touch()
        RunDirectory(self.path, resume=True).__exit__()
        names = {path.name for path in self.path.iterdir()}
        self.assertEqual(names, {".lock", ".mine.5.tmp", "checkpoints", "run.json"})

    def test_run_json_holds_all_values_and_is_never_read_back(self) -> None:
        with RunDirectory(self.path) as run:
            run.write_info(options={"output": Path("x"), "lr": 0.1}, device=torch.device("cpu"))
            run.write_info(loss=math.nan, figures=(1, -math.inf))
            save_step({"step": 1}, run.checkpoints, 1)
        expected = {"options": {"output": "x", "lr": 0.1}, "device": "cpu", "loss": None, "figures": [1, None]}
        self.assertEqual(json.loads((self.path / "run.json").read_text()), expected)
        (self.path / "run.json").write_text("{damaged")
        with RunDirectory(self.path, resume=True) as run:
            self.assertEqual(run.info, {})

    def test_a_directory_that_was_moved_stops_its_run(self) -> None:
        with RunDirectory(self.path) as run:
            self.path.rename(self.root / "b")
            with self.assertRaisesRegex(OSError, "a was moved or removed during the run"):
                run.write_info(a=1)
            with RunDirectory(self.path), self.assertRaisesRegex(OSError, "moved"):  # under the old name, another run
                run.write_info(a=1)


class Lock(RunCase):
    def test_one_process_holds_it_until_it_dies_even_if_its_workers_live(self) -> None:
        child = (
            "import os, sys, time\n"
            "from torchbasics.run import RunDirectory\n"
            "run = RunDirectory(sys.argv[1], resume=True)\n"
            "worker = os.fork()\n"
            "if worker: print(worker, flush=True)\n"
            "time.sleep(60)\n"
        )
        self.used()
        command = [sys.executable, "-c", child, str(self.path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                worker = int(process.stdout.readline())
                with self.assertRaisesRegex(ValueError, "another process is using this run"):
                    RunDirectory(self.path, resume=True)
            finally:
                process.kill()
            os.kill(worker, 0)  # it lives
            process.wait(10)
            RunDirectory(self.path, resume=True).__exit__()
            os.kill(worker, signal.SIGKILL)

    def test_one_process_cannot_hold_it_twice(self) -> None:
        self.used()
        with RunDirectory(self.path, resume=True):
            self.refused("another process", self.path, restart=True)
        (self.root / "link").symlink_to(self.path)
        with RunDirectory(self.root / "link", resume=True):
            self.refused("another process", self.path, resume=True)

    def test_without_fcntl_it_is_locked_as_on_windows(self) -> None:
        windows = mock.Mock(LK_NBLCK=2)
        with mock.patch.dict(sys.modules, {"fcntl": None, "msvcrt": windows}):
            RunDirectory(self.path).__exit__()
            self.assertEqual(windows.locking.call_args.args[1:], (2, 1))
            windows.locking.side_effect = PermissionError(13, "Permission denied")
            with self.assertRaisesRegex(ValueError, "another process"):
                RunDirectory(self.path)

    def test_a_file_system_that_cannot_lock_is_reported_and_used(self) -> None:
        unsupported = OSError(38, "Function not implemented")
        with mock.patch("fcntl.lockf", side_effect=unsupported), self.assertWarnsRegex(UserWarning, "cannot be locked"):
            self.used()


class Watch(RunCase):
    def setUp(self) -> None:
        super().setUp()
        self.directory = RunDirectory(self.path)
        self.addCleanup(self.directory.__exit__)
        self.clock = 100.0
        clock = mock.patch.object(run_module.time, "monotonic", lambda: self.clock)
        self.addCleanup(clock.stop)
        clock.start()

    def trainer(self, **more: Any) -> Any:
        names = ("train_loss", "train_acc", "val_loss", "val_acc", "lr")
        standard: dict[str, Any] = {"epoch": 0, "batch": 0, "best_epoch": None, "last_loss": None}
        lists: dict[str, Any] = {name: [] for name in ("epoch_records", "on_step_end", "on_epoch_end", "before_save")}
        history: dict[str, Any] = {name: [] for name in names}
        standard |= {"history": history, "metrics": {}, "criterion": nn.NLLLoss()}
        return SimpleNamespace(**standard | lists | more)

    def train(self, trainer: Any, batches: int, seconds: float = 0.5, **values: Any) -> None:
        """Take the steps up to `batches` of an epoch; with `values`, end it."""
        while trainer.batch < batches:
            trainer.batch += 1
            self.clock += seconds
            for callback in trainer.on_step_end:
                callback(trainer)
        if values:
            trainer.epoch, trainer.batch = trainer.epoch + 1, 0
            for name in trainer.history:
                trainer.history[name].append(values.get(name))
            trainer.epoch_records.append({"step": 3 * trainer.epoch, "weights": "ab"})
            for callback in trainer.on_epoch_end:
                callback(trainer)

    def watched(self, trainer: Any, loader: Any, *options: Any, out: io.StringIO, err: io.StringIO) -> Any:
        streams = contextlib.ExitStack()
        self.addCleanup(streams.close)
        self.addCleanup(self.directory.__exit__)
        streams.enter_context(contextlib.redirect_stdout(out))
        streams.enter_context(contextlib.redirect_stderr(err))
        self.directory.watch(trainer, 3, loader, *options)
        return trainer

    def test_the_table_has_a_row_for_each_epoch(self) -> None:
        out, err = io.StringIO(), io.StringIO()
        trainer = self.watched(self.trainer(metrics={"top5": None}), loader_of(10), out=out, err=err)
        trainer.history |= {"train_top5": [], "val_top5": [], "grad_norm": []}
        trainer.best_epoch = 0
        self.train(trainer, 3, train_loss=0.51239, train_acc=0.8, val_loss=0.25, val_acc=1.0, val_top5=0.5, lr=1e-3)
        self.train(trainer, 3, train_loss=12345.6, val_loss=math.nan, lr=0.0)
        self.assertEqual(
            out.getvalue(),
            "epoch  train loss  train acc  val loss  val acc  train top5  val top5       lr  samples/s     sec\n"
            "    1      0.5124     80.00%    0.2500  100.00%           -    0.5000  1.0e-03          7     1.5 best\n"
            "    2    1.23e+04          -       nan        -           -         -  0.0e+00          7     1.5\n",
        )
        self.assertEqual(err.getvalue(), "")

    def test_a_narrow_terminal_gets_fewer_columns_and_an_ordinary_one_all(self) -> None:
        for width, last in ((80, "sec"), (79, "samples/s"), (43, "val loss"), (42, "train acc"), (3, "epoch")):
            out = Terminal()
            with mock.patch.dict(os.environ, {"COLUMNS": str(width)}):
                trainer = self.watched(self.trainer(best_epoch=0), loader_of(10), out=out, err=io.StringIO())
                self.train(trainer, 3, train_loss=1.0, lr=0.1)
            header, row = out.getvalue().splitlines()
            self.assertTrue(header.endswith(last), header)
            self.assertTrue(row.endswith(" best"))
            self.assertLessEqual(len(row), max(width, 10))

    def test_samples_are_those_trained_here_since_the_start_or_resume(self) -> None:
        sampler: Any = SimpleNamespace(num_replicas=2)  # as of a DistributedSampler
        distributed = DataLoader(TensorDataset(torch.zeros(16)), 4, sampler=sampler)
        resumed_in_validation = (loader_of(10), 3, "-")
        for loader, batch, rate in (
            (loader_of(10), 2, "4"), resumed_in_validation, (distributed, 0, "11"), ([1, 2, 3], 0, "-"),
        ):  # fmt: skip
            out = io.StringIO()
            trainer = self.watched(self.trainer(batch=batch), loader, out=out, err=io.StringIO())
            self.train(trainer, 3, train_loss=1.0, lr=0.1)
            self.assertEqual(out.getvalue().split()[-2], rate)  # 2, 16 and unknown samples in 0.5, 1.5 and 1.5 s

    def test_progress_is_shown_on_a_terminal_at_most_five_times_a_second(self) -> None:
        err = Terminal()
        trainer = self.watched(self.trainer(last_loss=0.125), loader_of(40), out=io.StringIO(), err=err)
        self.train(trainer, 5, seconds=0.25)
        lines = err.getvalue().split("\r\033[K")[1:]
        self.assertEqual(lines[1], "epoch 1/3  batch 2/10  loss 0.1250  16 samples/s  7 s left")
        self.assertEqual(len(lines), 5)
        self.train(trainer, 10, seconds=0.01)
        self.assertEqual(len(err.getvalue().split("\r\033[K")[1:]), 5)
        self.directory.__exit__()
        self.assertTrue(err.getvalue().endswith("\r\033[K"))  # an error that follows stands on its own line

    def test_progress_of_a_loader_without_length_fits_a_narrow_terminal(self) -> None:
        class Endless(IterableDataset):
            def __iter__(self) -> Any:
                return itertools.count()

        err = Terminal()
        with mock.patch.dict(os.environ, {"COLUMNS": "24"}):
            trainer = self.watched(self.trainer(), DataLoader(Endless(), 4), out=io.StringIO(), err=err)
            self.train(trainer, 1)
        self.assertEqual(err.getvalue(), "\r\033[Kepoch 1/3  batch 1")  # what does not fit is left out, not cut

    def test_metrics_hold_what_was_resumed_and_each_new_epoch(self) -> None:
        (self.path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')  # what a killed run left
        trainer = self.trainer(history={"train_loss": [0.5], "val_acc": [None]}, epoch=1)
        trainer.epoch_records.append({"step": 3, "weights": "aa"})
        out = io.StringIO()
        self.watched(trainer, loader_of(10), True, out=out, err=Terminal())
        rows = [{"epoch": 1, "train_loss": 0.5, "val_acc": None, "step": 3, "weights": "aa"}]
        content = (self.path / "metrics.jsonl").read_text()
        self.assertEqual([json.loads(line) for line in content.splitlines()], rows)
        self.train(trainer, 3, train_loss=math.nan, val_acc=0.75)
        rows.append({"epoch": 2, "train_loss": None, "val_acc": 0.75, "step": 6, "weights": "ab"})
        content = (self.path / "metrics.jsonl").read_text()
        self.assertEqual([json.loads(line) for line in content.splitlines()], rows)
        self.assertEqual(out.getvalue(), "")  # quiet

    def test_a_run_stops_at_the_next_step_after_its_directory_was_moved(self) -> None:
        trainer = self.watched(self.trainer(), loader_of(10), True, out=io.StringIO(), err=io.StringIO())
        self.train(trainer, 1)
        self.path.rename(self.root / "b")
        self.path.mkdir()
        (self.path / ".lock").touch()  # as of another run that was started under the old name
        with self.assertRaisesRegex(OSError, "a was moved or removed during the run"):
            self.train(trainer, 2)
        self.assertEqual(os.listdir(self.path), [".lock"])

    def test_a_run_saves_nothing_after_its_directory_was_moved_in_a_validation(self) -> None:
        def move(outputs: torch.Tensor, targets: torch.Tensor) -> float:
            if not torch.is_grad_enabled() and self.path.exists() and trainer.batch == 0 and trainer.epoch == 1:
                self.path.rename(self.root / "b")
            return 0.0

        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, checkpoint_dir=self.directory.checkpoints,
                          metrics={"moved": move})  # fmt: skip
        batches = [(torch.zeros(2, 2), torch.tensor([0, 1]))]
        self.directory.watch(trainer, 1, batches, True)
        with self.assertRaisesRegex(OSError, "a was moved or removed during the run"):
            trainer.fit(batches, batches, 1, verbose=False)
        self.assertFalse(self.path.exists())

    def test_a_printed_line_cannot_speak_to_the_terminal(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            print_line("cat\x1b[2J\n\u202e 猫")
        self.assertEqual(out.getvalue(), "cat\\x1b[2J\\n\\u202e 猫\n")


if __name__ == "__main__":
    unittest.main()
