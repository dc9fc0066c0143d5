"""scripts/train_ddp.py: one process does what train_mnist does, several do the same, and no fault costs anything.

Functions whose first argument is `rank` run in each process of a job.
"""

from __future__ import annotations

import html
import os
import re
import shlex
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import torchbasics as tb
from torchbasics import cli, distributed
from torchbasics.checkpoint import saved_steps

from . import test_train_mnist as single
from .common import ROOT, in_processes, load_script, needs_processes
from .test_train_mnist import SMALL

script = load_script("train_ddp")
setUpModule = single.setUpModule
# What torchrun starts: the script's `main`. In the first attempt one process is killed, in the second torchrun stopped.
DRIVER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import torchbasics as tb
from torchbasics import cli, distributed
from tests.common import load_script

def fault(trainer):
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), distributed.rank()
    if (attempt, trainer.step, rank) == (0, 15, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if (attempt, trainer.step, rank) == (1, 18, 0):
        os.kill(os.getppid(), signal.SIGTERM)
    if attempt == 1 and trainer.step >= 18:
        time.sleep(1)  # torchrun passes the signal on

fit = tb.Trainer.fit
tb.Trainer.fit = lambda trainer, *args, **options: (trainer.on_step_end.append(fault), fit(trainer, *args, **options))
sys.exit(cli.run(load_script("train_ddp").main, sys.argv[1:]))
"""


def run_rank(rank: int, argv: list[str]) -> int:
    """Return the exit code of the script, run as one process of a job that torchrun started."""
    return cli.run(script.main, argv)


class DdpCase(single.ScriptCase):
    def setUp(self) -> None:
        super().setUp()
        patch = mock.patch("faulthandler.enable")  # which torchrun's `record` calls: the tests' stderr is no file
        patch.start()
        self.addCleanup(patch.stop)

    def run_processes(self, count: int, name: str, *more: Any, code: int = 0, resume: bool = False) -> Path:
        where = ("--resume", self.folder / name) if resume else (*SMALL, "--output", self.folder / name)
        argv = [str(word) for word in (*where, *more)]
        self.assertEqual(in_processes(count, run_rank, argv, timeout=None), [code] * count)
        return self.folder / name

    def assert_near_run(self, one: Path, other: Path) -> None:
        rows, expected = single.rows_of(one), single.rows_of(other)
        self.assertEqual(len(rows), len(expected))
        for row, wanted in zip(rows, expected, strict=True):
            self.assertEqual((row["step"], row["lr"], set(row)), (wanted["step"], wanted["lr"], set(wanted)))
            for name in ("train_loss", "val_loss"):
                self.assertAlmostEqual(row[name], wanted[name], delta=1e-6)
        best, others = (tb.load_checkpoint(run / "checkpoints" / "best.pt") for run in (one, other))
        for name, value in best["model_state_dict"].items():
            torch.testing.assert_close(value, others["model_state_dict"][name], rtol=0, atol=1e-4)
        for name in ("test_loss", "test_accuracy"):
            self.assertAlmostEqual(single.result_of(one)[name], single.result_of(other)[name], delta=1e-5)


class OneProcess(DdpCase):
    def test_one_process_trains_bit_for_bit_what_train_mnist_trains(self) -> None:
        hard = "--model cnn --epochs 1 --limit-batches 4 --accumulate 3 --ema 0.5 --clip-norm 1"
        for name, more in (("simple", "--weight-decay 0.1 --seed 7"), ("hard", hard)):
            options = more.split()
            with self.subTest(name):
                expected = self.run_small(f"{name} mnist", *options)
                code, out, err = single.call(*SMALL, *options, "--output", name, main=script.main)
                self.assertEqual((code, err), (0, ""))
                self.assertRegex(out, "^fashion-mnist: 1 processes\n.*\n.*, 1 thread; fp32\n")
                self.assertRegex(out, r"\nby class: t-shirt \d+\.\d%  trouser ")
                self.assertIn("<h2>Training images</h2>", Path(name, "report.html").read_text())
                self.assertEqual(*[Path(run, "metrics.jsonl").read_text() for run in (expected, name)])
                results = [single.result_of(Path(run)) for run in (expected, name)]
                for key in results[1].keys() - {"train_seconds"}:
                    self.assertAlmostEqual(results[0][key], results[1][key], places=6, msg=key)

    def test_the_command_that_continues_starts_as_many_processes_on_as_many_machines(self) -> None:
        two_machines = "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT --nproc-per-node=4"
        for local, expected in (("4", two_machines), ("8", one := "--standalone --nproc-per-node=8"), (None, one)):
            with mock.patch.dict(os.environ), mock.patch.object(distributed, "world_size", lambda: 8):
                os.environ.pop("LOCAL_WORLD_SIZE", None)  # as where something else than torchrun starts the processes
                os.environ.update({"LOCAL_WORLD_SIZE": local} if local else {})
                self.assertEqual(script.launcher_command(), f"torchrun {expected}")

    def test_a_run_stopped_by_sigterm_ends_as_if_never_stopped(self) -> None:
        first, resume = [*SMALL, "--output", "a"], ["--resume", "a"]
        start = "torchrun --standalone --nproc-per-node=1 train_ddp.py "
        with single.watched(single.stop_at(14)), mock.patch.object(sys, "argv", ["train_ddp.py", *first]):
            code, _, err = single.call(*first, main=script.main)
        saved = f"SIGTERM: saved a/checkpoints/step-00000014.pt; continue with: {start}--resume a\n"
        self.assertEqual((code, err), (143, saved))
        self.refused(*resume, "--lr", 1, main=script.main, text="--lr 1.0 differs from the run's 0.003")
        self.refused(*resume, "--fsdp", main=script.main, text="--fsdp True differs from the run's False")
        torch.set_num_threads(2)  # the run's is 1
        with mock.patch.object(sys, "argv", ["train_ddp.py", *resume]):
            self.assertEqual(single.call(*resume, "--save-every", 5, "--anomaly", main=script.main)[0], 0)
        self.assertEqual(torch.get_num_threads(), 1)
        page = html.unescape(Path("a", "report.html").read_text())
        printed = [shlex.split(options) for options in re.findall(rf"{start}(.*?)<", page)]
        self.assertEqual(printed, [[*SMALL, "--output", "a-again"], resume])
        for options in printed:
            self.assertEqual(script.parse_args(options).model, "simplenet")
        single.call(*SMALL, "--output", "b", main=script.main)
        self.assert_same_run(Path("a"), Path("b"))

    def test_what_is_wrong_is_refused_in_one_line_with_exit_code_2(self) -> None:
        bad = {**single.BAD_VALUES, "--timeout": "0 -1 nan"}
        options = {action.option_strings[0] for action in script.make_parser()._actions} & set(bad)
        self.assertGreater(len(options), 15)
        for option in options:
            with self.subTest(option):
                value = bad[option].partition(" ")[0]
                self.refused(*SMALL, f"{option}={value}", text=option.strip("-"), main=script.main)
        self.refused(*SMALL, "--fsdp", "--ema", 0.5, text="--fsdp does not go with --ema", main=script.main)
        self.refused(*SMALL, "--timeout=86401", text="--timeout: expected a number above 0 to 86400", main=script.main)
        self.refused(*SMALL, "--sync-bn", text="--sync-bn needs CUDA, the device is cpu", main=script.main)
        self.refused("--resume", "a", "--output", "b", text="--resume does not go with --output", main=script.main)
        self.refused("--resume", "a", text="no checkpoint to resume from", main=script.main)
        Path("a").write_text("mine")
        self.refused(*SMALL, "--output", "a", text="a exists", main=script.main)
        self.assertEqual(os.listdir(), ["a"])

    def test_torchrun_learns_why_a_process_failed(self) -> None:
        with mock.patch.dict(os.environ, TORCHELASTIC_ERROR_FILE="error.json"):
            self.refused("--resume", "a", text="no checkpoint to resume from", main=script.main)
        self.assertIn("no checkpoint to resume from", Path("error.json").read_text())

    def test_the_help_names_what_is_left_out_of_train_mnist(self) -> None:
        theirs, ours = (
            {action.option_strings[0] for action in module.make_parser()._actions}
            for module in (single.script, script)
        )
        self.assertEqual(set(re.findall(r"--[\w-]+", script.__doc__.partition("leaves out")[2])), theirs - ours)

    def test_each_process_gets_its_share_of_the_cores_unless_a_number_is_given(self) -> None:
        with mock.patch.object(distributed, "set_threads", lambda: 3):
            self.assertEqual(script.parse_args([]).threads, 3)
            self.assertEqual(script.parse_args(["--threads", "2"]).threads, 2)

    def test_help_ends_with_the_memory_that_each_strategy_takes(self) -> None:
        for billions, size in ((1, 31_623), (7, 83_666)):
            with torch.device("meta"):
                model = torch.nn.Linear(size, size, bias=False)  # size² parameters
            needed = tb.MemoryTracker.estimate_model_memory(model, torch.optim.AdamW(model.parameters()))["total"]
            self.assertAlmostEqual(needed / 16e9, billions, delta=0.001)  # whole copy
        copy, part = "16 and 112 GB", "2 and 14 GB on 8 devices"
        for strategy, figures in (("DDP", copy), ("FSDP", part), ("model parallelism", part), ("DataParallel", copy)):
            self.assertRegex(script.make_parser().format_help(), rf"\n  {strategy} .* {figures}")


@needs_processes
class SeveralProcesses(DdpCase):
    def test_two_processes_with_ddp_or_fsdp_train_what_one_trains_and_a_second_time_the_same_bits(self) -> None:
        one, ddp = self.run_small("one"), self.run_processes(2, "ddp")
        self.assert_same_run(ddp, self.run_processes(2, "again"))
        self.assert_near_run(one, ddp)
        self.assert_near_run(one, self.run_processes(2, "fsdp", "--fsdp"))

    def test_what_rank_0_refuses_ends_all_processes_and_changes_nothing(self) -> None:
        Path("a").write_text("mine")
        codes = in_processes(2, run_rank, [*SMALL, "--output", "a"], timeout=None)
        self.assertEqual((codes, os.listdir()), ([2, 2], ["a"]))
        self.refused(*SMALL, "--batch-size", 401, text="401", main=script.main)

    def test_a_job_in_which_a_process_is_killed_and_torchrun_stopped_ends_as_if_undisturbed(self) -> None:
        Path("driver.py").write_text(DRIVER.format(root=str(ROOT)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["--max-restarts=1", "driver.py", *SMALL, "--save-every", "4", "--output", "run"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
        self.assertNotEqual(done.returncode, 0)
        self.assertEqual(done.stdout.count("train loss"), 2, done.stderr)  # it was restarted
        step, path = saved_steps(Path("run", "checkpoints"))[-1]
        self.assertIn(f"SIGTERM: saved {path}", done.stderr)
        self.assertIn(step, range(18, 24))
        self.run_processes(2, "run", resume=True)
        self.assert_same_run(self.run_processes(2, "undisturbed"), self.folder / "run")


if __name__ == "__main__":
    unittest.main()
