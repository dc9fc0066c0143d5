"""scripts/train_ddp.py: one process does what train_mnist does, many do the same, and each fault is told once.

The functions whose first argument is `rank` run in each process of a group (tests/processes.py).
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from tests import test_train_mnist
from tests.processes import in_processes, needs_processes, outcomes
from tests.scripts import load_script
from tests.test_train_mnist import MNIST_LIKE, ROOT, Done, differences, few_digits, last_checkpoint, write_fashion
from torchbasics import distributed, parallel
from torchbasics.loaders import make_loaders
from torchbasics.trainer import Trainer

SCRIPT = ROOT / "scripts" / "train_ddp.py"
HOST = socket.gethostname()


script = load_script("train_ddp")
SMALL = (*test_train_mnist.ScriptCase.SMALL, "--device", "cpu", "--precision", "fp32")
THREADS = torch.get_num_threads()


def setUpModule() -> None:
    torch.set_num_threads(1)


def tearDownModule() -> None:
    torch.set_num_threads(THREADS)


def call(module: Any, argv: list[str]) -> Done:
    """`main` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = module.main(argv)
        except SystemExit as stop:
            code = stop.code
    return Done(code, out.getvalue(), err.getvalue())


def run(rank: int, argv: list[str], fault: str = "", where: str = ".") -> tuple[int, str, str]:
    """`main` in a process of a group that it makes itself; `fault` is what happens to rank 1, or to all."""
    os.chdir(where)
    patches: list[Any] = [mock.patch("torchbasics.digits.draw_digits", few_digits)]
    original = Trainer._optimizer_step
    real_first_cause = distributed.first_cause

    def step(trainer: Trainer) -> bool:
        if trainer.step == 4:
            if fault == "raises" and rank == 1:
                raise KeyError("of the step")
            if fault == "killed" and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "signalled" and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer)

    def full_disk(folder: Any, state: Any) -> None:
        raise OSError(28, "No space left on device", "checkpoints/step-00000007.pt")

    patches.append(mock.patch.object(Trainer, "_optimizer_step", step))
    patches.append(mock.patch.object(distributed, "first_cause", lambda e, text: real_first_cause(e, text, 1.0)))
    if fault == "disk":
        patches.append(mock.patch("torchbasics.checkpoint.CheckpointFolder.save", full_disk))
    if fault == "other machine" and rank == 1:
        patches.append(mock.patch("socket.gethostname", lambda: "node1"))
    if "EARLIER_RUN" in os.environ:
        patches.append(mock.patch.object(distributed, "recall", lambda key: os.environ["EARLIER_RUN"]))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        return tuple(call(script, argv))  # type: ignore[return-value]


class DdpCase(test_train_mnist.ScriptCase):
    """`main` and `small` are those of train_ddp; `mnist` is train_mnist's."""

    def setUp(self) -> None:
        super().setUp()
        ours = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"}
        rest = {name: value for name, value in os.environ.items() if name not in ours}
        patch = mock.patch.dict(os.environ, rest, clear=True)
        patch.start()
        self.addCleanup(patch.stop)

    SMALL = SMALL  # type: ignore[assignment]

    def main(self, *argv: Any) -> Done:
        return call(script, [str(arg) for arg in argv])

    def mnist(self, *argv: Any, code: int = 0) -> Done:
        done = call(test_train_mnist.script, [str(arg) for arg in argv])
        self.assertEqual(done.code, code, done.err)
        return done

    def together(self, count: int, name: str, *more: Any, fault: str = "", code: int = 0, **options: Any) -> list[Done]:
        """A run of `count` processes in `self.folder / name`."""
        argv = [str(arg) for arg in (*SMALL, "--output", self.folder / name, *more)]
        found = [Done(*each) for each in in_processes(count, run, argv, fault, group=False, **options)]
        self.assertEqual({done.code for done in found}, {code}, [done.err for done in found])
        return found

    def assert_same_run(self, one: Path, other: Path) -> None:
        self.assertEqual((one / "metrics.jsonl").read_bytes(), (other / "metrics.jsonl").read_bytes())
        self.assertEqual(differences(last_checkpoint(one), last_checkpoint(other)), [])

    def assert_near_run(self, one: Path, other: Path) -> None:
        """The same to the rounding of float32."""
        rows, expected = self.rows(one), self.rows(other)
        self.assertEqual(len(rows), len(expected))
        for row, wanted in zip(rows, expected, strict=True):
            for name in ("train_loss", "val_loss", "lr"):
                self.assertTrue(math.isclose(row[name], wanted[name], rel_tol=1e-4), (name, row, wanted))
        weights, there = (last_checkpoint(run)["model_state_dict"] for run in (one, other))
        for name, tensor in there.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5)


class OneProcess(DdpCase):
    def test_each_option_reaches_the_trainer(self) -> None:
        self.check_options(script)

    def test_it_trains_what_train_mnist_trains(self) -> None:
        """Bit for bit, with dropout, BatchNorm, augmentation, averages, accumulation."""
        more = ("--model", "mlp", "--ema", 0.9, "--accumulate", 2, "--clip-norm", 1, "--patience", 4)
        mine = self.small("ddp", *more)
        self.mnist(*SMALL, *more, "--output", self.folder / "mnist")
        self.assert_same_run(mine, self.folder / "mnist")
        results = [self.info(run)["result"] for run in (mine, self.folder / "mnist")]
        for key in results[1].keys() - {"train_seconds", "total_seconds", "samples_per_second"}:
            self.assertEqual(results[0][key], results[1][key], key)
        self.assertLessEqual({"command", "seed", "arguments", "processes"}, self.info(mine).keys())

    def test_what_it_says(self) -> None:
        memory = mock.patch.object(script.tb, "cache_cpu_memory")
        with mock.patch.object(sys, "argv", [str(SCRIPT)]), memory as kept:
            done = self.main(*SMALL, "--output", self.folder / "run")
        self.assertEqual((done.code, done.err), (0, ""))
        kept.assert_called_once_with()
        self.assertRegex(done.out, rf"; 1 process \(rank 0: {HOST} cpu\); .*, 1 thread each.*; fp32")
        self.assertIn("test_accuracy", self.info(self.folder / "run")["result"])
        self.assertNotIn("communication", done.out)
        self.assertRegex(done.out, r"continue: torchrun --standalone --nproc-per-node=1 \S+train_ddp.py --resume ")
        quiet = self.main(*SMALL, "--output", self.folder / "quiet", "--quiet")
        self.assertNotIn("process", quiet.out)

    def test_a_signal(self) -> None:
        straight = self.small("straight")
        run = self.interrupted("cut", 3)
        done = self.main("--resume", run)
        self.assertEqual(done.code, 0, done.err)
        self.assert_same_run(run, straight)

    def test_each_continues_what_the_other_began(self) -> None:
        more = ("--model", "mlp")
        straight = self.small("straight", *more)
        mine = self.interrupted("mine", 9, *more)
        self.mnist("--resume", mine)
        self.assert_same_run(mine, straight)
        with self.killed_at(9):
            self.mnist(*SMALL, *more, "--output", self.folder / "theirs", code=143)
        done = self.main("--resume", self.folder / "theirs", "--timeout", 9)
        self.assertEqual(done.code, 0, done.err)
        self.assertIn("resumed from step-00000009.pt: epoch 2, batch 3", done.out)
        self.assert_same_run(self.folder / "theirs", straight)


class NoNetwork(DdpCase):
    def test_a_resumed_run_still_says_what_it_is_trained_on(self) -> None:
        auto = (*test_train_mnist.NoNetwork.AUTO, "--data-dir", self.folder / "none")
        with self.killed_at(9):
            self.assertEqual(self.main(*auto, "--output", self.folder / "run").code, 143)
        done = self.main("--resume", self.folder / "run")
        self.assertEqual(done.out.count("NOTICE: no MNIST"), 2)
        for part in (self.info(self.folder / "run"), self.info(self.folder / "run")["result"]):
            self.assertTrue(part["notice"].startswith("NOTICE"))


class BadInput(DdpCase):
    def test_values(self) -> None:
        for pattern, argv in (
            ("--strategy.*invalid choice: 'dp'", ("--strategy", "dp")),
            ("--timeout.*expected a number above 0, got '0'", ("--timeout", 0)),
            ("--batch-size.*expected a whole number from 1", ("--batch-size", 0)),
            ("unrecognized arguments: --dry-run", ("--dry-run",)),
            ("unrecognized arguments: --batch", ("--batch", 3)),
            ("--resume needs the run's directory", ("--resume",)),
            ("larger than the 200 training samples", ("--batch-size", 300)),
            ("nothing to resume", ("--resume", self.folder / "none")),
        ):
            with self.subTest(argv):
                self.assert_refused(
                    self.main("--dataset", "digits", "--val-size", 40, "--device", "cpu", *argv), pattern
                )

    def test_what_does_not_go_with_fsdp(self) -> None:
        for argv in (("--ema", 0.9), ("--sync-bn",), ("--bf16-gradients",), ("--compile",), ("--precision", "fp16")):
            with self.subTest(argv):
                named = argv[0] if argv[0] != "--precision" else "--precision fp16"
                self.assert_refused(self.main(*argv, "--strategy", "fsdp"), f"{named} does not go with --strategy fsdp")

    def test_an_earlier_run_is_kept(self) -> None:
        run = self.small("run")
        self.assert_refused(self.main(*SMALL, "--output", run), "holds an earlier run")
        done = self.main("--resume", run, "--lr", 0.5)
        self.assert_refused(done, "--lr 0.5 differs from the run's 0.003")

    def test_the_environment(self) -> None:
        variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        with mock.patch.dict(os.environ, variables):
            self.assert_refused(self.main(*SMALL), "RANK is set, but not MASTER_ADDR, MASTER_PORT; start with")
            with (
                mock.patch("torchbasics.device.pick_device", return_value=torch.device("cuda")),
                mock.patch.object(script.tb, "pick_device", return_value=torch.device("cuda:1")),
            ):
                self.assert_refused(self.main(*SMALL), "cuda:1 is one device for 2 processes")
        with mock.patch.dict(os.environ, {**variables, "RANK": "1"}):  # said by rank 0 alone
            self.assertEqual(self.main(*SMALL), (2, "", ""))

    def test_the_port_is_taken(self) -> None:
        with socket.socket() as other:
            other.bind(("0.0.0.0", 0))
            other.listen()
            port = other.getsockname()[1]
            variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
            with mock.patch.dict(os.environ, {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}):
                self.assert_refused(self.main(*SMALL), f"127.0.0.1:{port}: .*the port is taken; choose", 1)


class Restart(DdpCase):
    """A note in the launcher's store is all that tells a restarted job of its past."""

    def restarted(self, run: Path | None = None) -> Any:
        return mock.patch.object(distributed, "recall", lambda key: None if run is None else str(run))

    def test_it_goes_on_by_itself(self) -> None:
        straight = self.small("straight")
        run = self.interrupted("cut", 9)
        (run / "checkpoints" / "step-00000009.pt").unlink()  # killed, it had no time to save that
        with self.restarted(run):
            done = self.main(*SMALL, "--output", run, "--overwrite")  # which is of the first start only
        self.assertEqual(done.code, 0, done.err)
        self.assertIn("resumed from step-00000007.pt: epoch 2, batch 1", done.out)
        self.assert_same_run(run, straight)

    def test_killed_before_it_wrote_anything_it_begins(self) -> None:
        straight = self.small("straight")
        (self.folder / "begun").mkdir()
        with self.restarted(self.folder / "begun"):
            self.assert_same_run(self.small("begun"), straight)

    def test_a_restart_is_no_leave_to_go_on_with_anothers_run(self) -> None:
        other = self.interrupted("other", 9)
        before = (other / "run.json").read_bytes()
        with mock.patch.dict(os.environ, {"TORCHELASTIC_RESTART_COUNT": "1"}):
            self.assert_refused(self.main(*SMALL, "--output", other), "holds an earlier run")
        self.assertEqual((other / "run.json").read_bytes(), before)

    def test_killed_before_the_first_checkpoint_it_begins(self) -> None:
        straight = self.small("straight")
        run = self.interrupted("cut", 3)
        shutil.rmtree(run / "checkpoints")
        with self.restarted(run):
            done = self.main(*SMALL, "--output", run)
        self.assertEqual(done.code, 0, done.err)
        self.assertIn("nothing was saved before the interruption", done.out)
        self.assert_same_run(run, straight)

    def test_without_output_it_finds_its_directory(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        straight = self.small("straight")
        with self.killed_at(9):
            self.assertEqual(self.main(*SMALL).code, 143)
        (own,) = (self.folder / "runs").iterdir()
        with self.restarted(own):
            done = self.main(*SMALL, "--dataset", "auto")  # what auto was then
        self.assertEqual(done.code, 0, done.err)
        self.assert_same_run(own, straight)

    @needs_processes
    def test_on_another_machine_too(self) -> None:
        """Which of the processes are on the machine of the one that wrote the directory does not matter."""
        self.small("straight")
        argv = [str(arg) for arg in (*SMALL, "--timeout", 10)]
        common = {"group": False}
        first = in_processes(2, run, argv, "signalled", str(self.folder), **common)
        self.assertEqual([code for code, _, _ in first], [143, 143], first)
        (own,) = (self.folder / "runs").iterdir()
        again = in_processes(2, run, argv, "other machine", str(self.folder), EARLIER_RUN=str(own), **common)
        self.assertEqual([code for code, _, _ in again], [0, 0], again)
        self.assertEqual(len(list((self.folder / "runs").iterdir())), 1)


# ------------------------------------------------------------------------------------------------------ many processes


@needs_processes
class ManyProcesses(DdpCase):
    def test_two_and_three_train_what_one_trains(self) -> None:
        more = ("--accumulate", 2, "--clip-norm", 1, "--batch-size", 33)  # the last batch has 2 images
        alone = self.small("alone", *more)
        for count, strategy in ((2, "ddp"), (3, "ddp"), (2, "fsdp")):
            name = f"{strategy} {count}"
            first, *others = self.together(count, name, *more, "--strategy", strategy)
            self.assert_near_run(self.folder / name, alone)
            result, expected = (self.info(self.folder / run)["result"] for run in (name, "alone"))
            self.assertEqual(result["test_samples"], MNIST_LIKE["t10k"])
            self.assertAlmostEqual(result["test_loss"], expected["test_loss"], places=4)
            self.assertEqual({(done.out, done.err) for done in others}, {("", "")})  # only rank 0 speaks
            self.assertEqual(first.err, "")
            names = ", ".join(f"rank {rank}: {HOST} cpu" for rank in range(count))
            self.assertIn(f"{count} processes ({names})", first.out)
            self.assertEqual(
                len([line for line in first.out.splitlines() if line.startswith("       ")]), 2
            )  # an epoch
            if strategy == "ddp":
                self.assertRegex(
                    first.out, r"communication \d+\.\d s of \d+\.\d s \(least, so the slowest: rank [0-2], "
                )
            self.assertRegex(first.out, f"continue: torchrun --standalone --nproc-per-node={count} ")

    def test_an_ensemble_is_not_gone_on_with_as_one_model(self) -> None:
        folder = self.folder / "two"
        self.mnist(*SMALL, "--epochs", 1, "--ensemble", 2, "--output", folder)
        before = (folder / "run.json").read_bytes()
        self.assert_refused(self.main("--resume", folder), r"holds an ensemble.*--resume \S+member-1")
        self.assertEqual((folder / "run.json").read_bytes(), before)

    def test_resumed_by_others(self) -> None:
        """Two processes are stopped, one of them by a signal; one, two or three go on, and train_mnist."""
        alone = self.small("alone")
        straight = self.together(2, "straight")[0]
        first, second = self.together(2, "cut", fault="signalled", code=143)
        step = last_checkpoint(self.folder / "cut")["step"]
        self.assertEqual(step, 6)  # noted in the fifth step, answered by all after the sixth
        self.assertEqual(second.err, "")
        self.assertRegex(
            first.err, rf"^\ninterrupted: SIGTERM: saved \S+step-{step:08}.pt; continue with --resume \S+\n$"
        )
        for name in ("by two", "by three", "by fsdp", "by mnist", "by one"):
            shutil.copytree(self.folder / "cut", self.folder / name)
        self.together(2, "by two", "--resume")
        self.assert_same_run(self.folder / "by two", self.folder / "straight")
        self.together(3, "by three", "--resume")
        self.together(2, "by fsdp", "--resume", "--strategy", "fsdp")
        self.mnist("--resume", self.folder / "by mnist")
        self.assertEqual(self.main("--resume", self.folder / "by one").code, 0)
        for name in ("by two", "by three", "by fsdp", "by mnist", "by one"):
            self.assert_near_run(self.folder / name, alone)
        self.assertIn("validation", straight.out)

    def test_restarted(self) -> None:
        """Ends with the weights of the undisturbed run, bit for bit, with dropout."""
        more = ("--model", "mlp", "--save-every", 3)
        self.together(2, "straight", *more)
        argv = [str(arg) for arg in (*SMALL, *more, "--output", self.folder / "cut")]
        survivor, killed = outcomes(2, run, argv, "killed", group=False)
        self.assertEqual((killed.code, survivor.result[0]), (-signal.SIGKILL, 1), survivor)
        self.assertEqual(last_checkpoint(self.folder / "cut")["step"], 3)
        first = self.together(2, "cut", *more, EARLIER_RUN=str(self.folder / "cut"))[0]
        self.assertIn("resumed from step-00000003.pt", first.out)
        self.assert_same_run(self.folder / "cut", self.folder / "straight")

    def test_streams_and_weights(self) -> None:
        found = in_processes(2, built)
        self.assertEqual(found[0]["weights"], found[1]["weights"])
        self.assertNotEqual(found[0]["drawn"], found[1]["drawn"])
        self.assertEqual(found[0]["drawn"], built(0)["drawn"])  # rank 0 draws what one process draws
        for one in found:
            self.assertEqual(one["kinds"], ["DistributedDataParallel", True, "shards", False])


def built(rank: int) -> dict[str, Any]:
    """What build_trainer makes of ddp and fsdp."""
    with mock.patch("torchbasics.digits.draw_digits", few_digits):
        data = make_loaders("digits", batch_size=20, val_size=20)
    many, kinds = distributed.world_size() > 1, []
    for strategy in ("ddp", "fsdp"):
        torch.manual_seed(5)
        args = script.parse_args(["--strategy", strategy, "--device", "cpu", "--model", "mlp", "--precision", "fp32"])
        trainer, clock = script.build_trainer(args, data, torch.device("cpu"), Path("never written"))
        model: nn.Module = trainer.model
        kinds += ["shards" if parallel.is_sharded(model) else type(model).__name__, clock is not None]
        if strategy == "ddp" or not many:
            weights = [float(p.detach().sum()) for p in model.parameters()]
            drawn = torch.rand(4).tolist()
    return {"weights": weights, "drawn": drawn, "kinds": kinds}


@needs_processes
class Faults(DdpCase):
    """All are gone within the time limit and 5 s; the first cause is told once, with its rank, in one line."""

    def faulty(self, fault: str, count: int = 2, *more: Any) -> list[Any]:
        argv = [str(arg) for arg in (*SMALL, *more, "--output", self.folder / fault, "--timeout", 5)]
        began = time.monotonic()
        found = outcomes(count, run, argv, fault, group=False)
        self.assertLess(time.monotonic() - began, 5 + 5 + 5)  # and the start
        return found

    def test_who_raises_in_a_step(self) -> None:
        first, second = self.faulty("raises")
        self.assertEqual((first.result[0], second.result[0]), (1, 1))
        self.assertEqual(first.result[2], "")
        self.assertEqual(
            second.result[2], f"error: rank 1 of 2 ({HOST}): KeyError: 'of the step' (--debug shows where)\n"
        )

    def test_who_was_killed(self) -> None:
        found = self.faulty("killed", 3)
        self.assertEqual(found[1].code, -signal.SIGKILL)
        self.assertEqual([found[0].result[0], found[2].result[0]], [1, 1])
        said = "".join(one.result[2] for one in (found[0], found[2]))
        self.assertRegex(said, rf"^error: rank [02] of 3 \({HOST}\): no answer from rank 1 \({HOST}\)\n$")

    def test_who_cannot_save(self) -> None:
        first, second = self.faulty("disk")
        self.assertEqual((first.result[0], second.result[0], second.result[2]), (1, 1, ""))
        self.assertRegex(
            first.result[2], rf"^error: rank 0 of 2 \({HOST}\): checkpoints/step-00000007.pt: No space left"
        )
        self.assertEqual(len(first.result[2].splitlines()), 1)

    def test_what_rank_0_refuses(self) -> None:
        first, second = self.faulty("nothing", 2, "--resume")
        self.assertEqual((first.result[0], second.result[2]), (2, ""))
        self.assertNotEqual(second.result[0], 0)
        self.assertRegex(first.result[2], r"^error: rank 0 of 2 .*nothing to resume here[^\n]*\n$")

    def test_what_all_refuse(self) -> None:
        found = self.faulty("all", 2, "--batch-size", 300)
        said = "".join(one.result[2] for one in found)
        self.assertEqual(found[0].result[0], 2)
        self.assertTrue(all(one.result[0] for one in found))
        self.assertRegex(said, r"^error: rank [01] of 2 .*--batch-size 300 is larger than the 200[^\n]*\n$")


# ------------------------------------------------------------------------------------------------------------ torchrun


def ranks_of(launcher: int) -> dict[int, int]:
    """Process numbers of a launcher's children, by RANK."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                variables = (folder / "environ").read_bytes().split(b"\0")
                found |= {int(line[5:]): int(folder.name) for line in variables if line.startswith(b"RANK=")}
    return found


@needs_processes
@unittest.skipUnless(Path("/proc/self/environ").exists(), "needs /proc")
class Torchrun(DdpCase):
    def test_a_killed_worker_costs_nothing_but_time(self) -> None:
        """SIGKILL of rank 1 in mid-epoch: torchrun restarts both, and the end is that of the undisturbed run."""
        write_fashion(self.folder / "data", {"train": 1000, "t10k": 80})
        data = ("--dataset", "fashion-mnist", "--data-dir", self.folder / "data", "--model", "mlp", "--val-size", 200)
        more = (*data, "--batch-size", 16, "--save-every", 4, "--quiet")
        straight = self.together(2, "straight", *more)[0]
        self.assertEqual(straight.err, "")
        argv = [str(arg) for arg in (*SMALL, *more, "--output", "cut")]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        process = subprocess.Popen(
            [*command, "--max-restarts=1", "--monitor-interval=0.1", str(SCRIPT), *argv],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 60
            while (
                not (self.folder / "cut" / "checkpoints" / "step-00000008.pt").exists()
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.01)
            os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
            out, err = process.communicate(timeout=90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        self.assertEqual(process.returncode, 0, err)
        self.assertRegex(err, r"exitcode: -9\) local_rank: 1")  # torchrun's own line; it ends the other soon
        self.assertLessEqual(err.count("error: "), 1, err)
        self.assertIn("validation", out)
        info = self.info(self.folder / "cut")
        self.assertEqual((len(info["sessions"]), info["threads"]), (2, 1))
        self.assertIn("(OMP_NUM_THREADS)", info["processes"])
        self.assert_same_run(self.folder / "cut", self.folder / "straight")


if __name__ == "__main__":
    unittest.main()
