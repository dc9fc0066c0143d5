"""scripts/train_mnist.py: what a run leaves and says, that it resumes exactly, and how it refuses what is wrong."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import types
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

import torchbasics as tb
from torchbasics import cli
from torchbasics.checkpoint import saved_steps, weights_hash
from torchbasics.report import wilson_interval

from .common import load_script, run_main

script = load_script("train_mnist")
TRAINING_IMAGES = 5400  # of which 5,000 are held out: 12 batches of 32 an epoch
TEST_IMAGES = 100
SMALL = ("--dataset", "fashion-mnist", "--data-dir", "../data", "--model", "simplenet", "--epochs", "2",
         "--batch-size", "32", "--threads", "1", "--device", "cpu", "--precision", "fp32")  # fmt: skip
root = ""


def setUpModule() -> None:
    """Write drawn digits as a small data set, in the files of Fashion-MNIST. The tests run in folders beside it."""
    global root
    unittest.addModuleCleanup(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)
    root = tempfile.mkdtemp()
    unittest.addModuleCleanup(shutil.rmtree, root)
    raw = Path(root, "data", "FashionMNIST", "raw")
    raw.mkdir(parents=True)
    for part, count, seed in (("train", TRAINING_IMAGES, 0), ("t10k", TEST_IMAGES, 1)):
        images, labels = tb.draw_digits(min(count, 400), seed)
        indices = torch.arange(count) % len(images)
        for kind, values in (("images-idx3", images[indices, 0]), ("labels-idx1", labels[indices].byte())):
            header = struct.pack(f">{1 + values.dim()}I", 0x0800 + values.dim(), *values.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + values.numpy().tobytes())


def call(*argv: Any, main: Any = script.main) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of the script, run in this process."""
    return run_main(lambda words: cli.run(main, words), *map(str, argv))


class ScriptCase(unittest.TestCase):
    """Tests that run in a directory of their own, `folder`, without a network."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=root)).resolve()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        no_network = ConnectionError("mnist could not be downloaded: no route to host; check the network")
        patch = mock.patch("torchbasics.mnist.download_mnist", side_effect=no_network)
        patch.start()
        self.addCleanup(patch.stop)

    def run_small(self, name: str, *more: Any) -> Path:
        """Run the script on the small data set into the directory `name`, and return its path."""
        code, _, err = call(*SMALL, "--output", self.folder / name, *more)
        self.assertEqual(code, 0, err)
        return self.folder / name

    def run_interrupted(self, name: str, step: int, *more: Any) -> Path:
        with watched(stop_at(step)):
            code, _, err = call(*SMALL, "--output", self.folder / name, *more)
        self.assertEqual(code, 128 + signal.SIGTERM, err)
        saved, command = err.split("; continue with: ")
        self.assertEqual(saved, f"SIGTERM: saved {self.folder}/{name}/checkpoints/step-{step:08}.pt")
        self.assertEqual(shlex.split(command)[-2:], ["--resume", str(self.folder / name)])
        return self.folder / name

    def refused(self, *argv: Any, text: str = "", code: int = 2, main: Any = script.main) -> None:
        """Check that the script ends with `code` and one line that holds `text`."""
        found, _, err = call(*argv, main=main)
        self.assertEqual(found, code, (argv, err))
        self.assertRegex(err, r"^error: [^\n]+\n$", argv)
        self.assertIn(text, err)

    def assert_same_run(self, one: Path, other: Path) -> None:
        self.assertEqual((one / "metrics.jsonl").read_text(), (other / "metrics.jsonl").read_text())
        best = [tb.load_checkpoint(run / "checkpoints" / "best.pt")["model_state_dict"] for run in (one, other)]
        self.assertEqual(weights_hash(best[0]), weights_hash(best[1]))
        results = [result_of(run) for run in (one, other)]
        self.assertEqual(*[{k: v for k, v in result.items() if not k.endswith("seconds")} for result in results])


def stop_at(step: int) -> Any:
    """Return a callback that sends this process SIGTERM after `step`."""

    def stop(trainer: tb.Trainer) -> None:
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


@contextlib.contextmanager
def watched(callback: Any) -> Any:
    """Call `callback` after each step of the runs in this `with` block; return the list of their trainers."""
    trainers: list[tb.Trainer] = []
    fit = tb.Trainer.fit

    def watch(trainer: tb.Trainer, *args: Any, **options: Any) -> Any:
        trainer.on_step_end.append(callback)
        trainers.append(trainer)
        return fit(trainer, *args, **options)

    with mock.patch.object(tb.Trainer, "fit", watch):
        yield trainers


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())["result"]


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Run(ScriptCase):
    def test_a_run_prints_a_table_and_leaves_its_metrics_result_and_checkpoints(self) -> None:
        rough = "--tta --epochs 9 --patience 1 --schedule constant --lr 0.06"  # so the last epoch is not the best
        code, out, err = call(*SMALL, "--output", "a run", *rough.split())
        self.assertEqual((code, err), (0, ""))
        run = self.folder / "a run"
        rows = rows_of(run)
        table = re.findall(r"^ *(epoch|\d+)  .*$", out, re.M)
        self.assertEqual(table, ["epoch", *[str(row["epoch"]) for row in rows]])
        left = {".lock", "run.json", "metrics.jsonl", "report.html", "checkpoints"}
        self.assertEqual({path.name for path in run.iterdir()}, left)
        for epoch, row in enumerate(rows, start=1):
            self.assertEqual(" ".join(row), "epoch train_loss train_acc val_loss val_acc lr step weights")  # no times
            self.assertEqual((row["epoch"], row["step"]), (epoch, 12 * epoch))
        for row, (step, path) in zip(rows[-3:], saved_steps(run / "checkpoints"), strict=True):
            weights = tb.load_checkpoint(path)["model_state_dict"]
            self.assertEqual((row["step"], row["weights"]), (step, weights_hash(weights)))

        info = json.loads((run / "run.json").read_text())
        self.assertLess({"command", "options", "versions", "device", "precision", "dataset", "classes"}, set(info))
        result = info["result"]
        self.assertEqual(
            " ".join(result),
            "test_accuracy test_loss test_samples accuracy_by_class confusion best_val_accuracy best_epoch epochs_run "
            "stopped_because train_seconds total_seconds",
        )
        best = min(rows, key=lambda row: row["val_loss"])
        self.assertEqual((result["best_epoch"], result["best_val_accuracy"]), (best["epoch"], best["val_acc"]))
        self.assertEqual((result["epochs_run"], len(rows)), (best["epoch"] + 1,) * 2)
        self.assertRegex(result["stopped_because"], r"^no improvement on .* \(epoch \d\) for 1 epochs$")

        # The test set is judged by the best weights, which are not the last: here by hand.
        state = tb.load_checkpoint(run / "checkpoints" / "best.pt")
        model = tb.ShiftedViews(tb.make_model(state["metadata"])).eval()
        model.model.load_state_dict(state["model_state_dict"])
        images, labels = tb.draw_digits(TEST_IMAGES, 1)
        facts = state["metadata"]
        with torch.no_grad():
            outputs = model((images.float() / 255 - facts["mean"][0]) / facts["std"][0])
        predicted = outputs.argmax(1)
        self.assertAlmostEqual(result["test_accuracy"], (predicted == labels).float().mean().item(), places=6)
        self.assertAlmostEqual(result["test_loss"], F.cross_entropy(outputs, labels).item(), places=3)
        confusion = [[int(((labels == i) & (predicted == j)).sum()) for j in range(10)] for i in range(10)]
        self.assertEqual((result["confusion"], result["test_samples"]), (confusion, TEST_IMAGES))
        page = (run / "report.html").read_text()
        low, high = wilson_interval(int((predicted == labels).sum()), TEST_IMAGES)
        verdict = f"{result['test_accuracy']:.2%} (95% interval {low:.2%} to {high:.2%}) of {TEST_IMAGES} fashion-mnist"
        self.assertIn(verdict, page)
        self.assertIn(f"best: epoch {result['best_epoch']}", page)
        changed = page[page.index("How it was made") : page.index("Options left at their defaults")]
        shown = re.findall(r"<th>(--[a-z-]+)</th>", changed)
        self.assertLess({"--tta", "--patience", "--schedule", "--lr", "--model", "--output"}, set(shown))
        self.assertNotIn("--dropout", shown)
        self.assertRegex(out, r"(?m)^report:   'a run/report.html'$")
        for i, share in enumerate(result["accuracy_by_class"].values()):
            self.assertAlmostEqual(share, confusion[i][i] / sum(confusion[i]), places=6)
        self.assertIn(f"test {result['test_accuracy']:.2%} (loss {result['test_loss']:.4f})", out)
        self.assertRegex(out, r"predict:  python \S*predict.py --checkpoint 'a run/checkpoints/best.pt' digit.png\n")

    def test_the_same_command_twice_gives_the_same_metrics_and_another_seed_others(self) -> None:
        one, two, three = (self.run_small(name, "--seed", seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
        self.assert_same_run(one, two)
        self.assertNotEqual(rows_of(one)[0]["weights"], rows_of(three)[0]["weights"])
        self.assertGreater(rows_of(one)[0]["train_loss"], rows_of(one)[1]["train_loss"])

    def test_without_mnist_and_network_it_says_before_and_after_the_table_that_digits_are_drawn(self) -> None:
        images, labels = tb.draw_digits(400)
        drawn = images.repeat(14, 1, 1, 1)[:TRAINING_IMAGES], labels.repeat(14)[:TRAINING_IMAGES]
        with mock.patch("torchbasics.digits.draw_digits", lambda *args, **options: drawn):
            code, out, _ = call(*SMALL, "--dataset", "auto", "--epochs", 1)
            self.refused(*SMALL, "--dataset", "mnist", text="no route to host", code=1)
        notice = json.loads(next(self.folder.glob("runs/digits-*/run.json")).read_text())["notice"]
        self.assertRegex(notice, r"^NOTICE: no MNIST in .*no route to host.*drawn")
        lines = out.splitlines()
        self.assertEqual((code, lines[0], lines[-1]), (0, notice, notice))

    def test_a_dry_run_trains_two_batches_and_leaves_nothing(self) -> None:
        temporary = self.folder / "tmp"
        temporary.mkdir()
        compiled = mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=tempfile.gettempdir())  # torch makes a folder
        with compiled, mock.patch.object(tempfile, "tempdir", str(temporary)), watched(lambda _: None) as trainers:
            code, out, err = call(*SMALL, "--dry-run", "--output", "a", "--warmup-epochs", 2)
        self.assertEqual((code, err, trainers[0].step), (0, "", 2))
        self.assertNotIn("report:", out)
        self.assertEqual([path.name for path in self.folder.rglob("*")], ["tmp"])

    def test_presets_are_other_defaults_and_what_is_given_beside_them_wins(self) -> None:
        args = script.parse_args(["--preset", "speedrun", "--lr", "0.01"])
        self.assertEqual((args.model, args.epochs, args.batch_size, args.augment), ("fastnet", 1, 224, False))
        self.assertEqual((args.lr, args.weight_decay, args.warmup_epochs, args.label_smoothing), (0.01, 0.1, 0.15, 0.1))
        args = script.parse_args(["--epochs", "3", "--preset", "best"])
        self.assertEqual((args.model, args.epochs, args.ema, args.tta, args.lr), ("widevgg", 3, 0.999, True, 3e-3))
        code, out, err = call(*SMALL[:4], *SMALL[8:], "--preset", "speedrun", "--dry-run")
        self.assertEqual((code, err), (0, ""))
        self.assertIn("FastNet", out)

    def test_each_option_reaches_the_training(self) -> None:
        seen: list[tuple[bool, bool]] = []
        self.addCleanup(torch.use_deterministic_algorithms, False)

        def note_modes(trainer: tb.Trainer) -> None:
            seen.append((torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled()))

        with watched(note_modes) as trainers:
            self.run_small(
                "a", "--clip-norm", 2, "--clip-value", 0.5, "--accumulate", 5, "--ema", 0.9, "--patience", 3,
                "--label-smoothing", 0.1, "--precision", "bf16", "--deterministic", "--anomaly", "--save-every", 2,
                "--lr", 0.01, "--weight-decay", 0.2, "--optimizer", "adam", "--model", "mlp", "--dropout", 0.4,
                "--limit-batches", 7, "--schedule", "cosine", "--warmup-epochs", 1, "--no-augment",
            )  # fmt: skip
        trainer = trainers[0]
        self.assertEqual((trainer.clip_norm, trainer.clip_value, trainer.accumulate), (2, 0.5, 5))
        self.assertEqual((trainer.precision, trainer.save_every, trainer.step), ("bf16", 2, 4))  # 2 steps an epoch
        self.assertEqual((trainer.averages.decay, trainer.early_stopping.patience), (0.9, 3))
        self.assertEqual(trainer.criterion.label_smoothing, 0.1)
        self.assertIs(type(trainer.optimizer), torch.optim.Adam)
        self.assertEqual(trainer.optimizer.defaults["weight_decay"], 0.2)
        self.assertEqual({module.p for module in trainer.model.modules() if isinstance(module, nn.Dropout)}, {0.4})
        self.assertEqual(trainer.history["lr"][0], 0.01)  # the top of the warm-up
        self.assertEqual(seen, [(True, True)] * 4)
        self.assertFalse(torch.is_anomaly_enabled())
        for option, augmented in (("--augment", True), ("--no-augment", False)):
            loaders, _, _ = script.make_loaders(script.parse_args([*SMALL, option]), torch.device("cpu"))
            self.assertEqual([loader.augment is not None for loader in loaders], [augmented, False, False])
            self.assertEqual([len(loader.dataset) for loader in loaders], [400, 5000, TEST_IMAGES])

    def test_init_from_starts_with_the_weights_that_fit_and_names_the_others(self) -> None:
        first = self.run_small("a", "--epochs", 1)
        best = first / "checkpoints" / "best.pt"
        with watched(lambda _: None) as trainers:
            _, out, _ = call(*SMALL, "--init-from", best, "--output", "b", "--lr", 1e-12)
        weights = tb.load_checkpoint(best)["model_state_dict"]
        for name, value in trainers[0].model.state_dict().items():
            torch.testing.assert_close(value, weights[name])
        self.assertIn(f"initial weights from {best}; left as they were: none\n", out)
        *_, bias = weights
        wider = torch.cat([weights[bias], torch.zeros(1)])
        tb.save_checkpoint({"model_state_dict": weights | {bias: wider}}, "wider.pt")
        _, out, _ = call(*SMALL, "--init-from", "wider.pt", "--output", "c", "--dry-run")
        self.assertIn(f"initial weights from wider.pt; left as they were: {bias}\n", out)
        self.refused(*SMALL, "--model", "cnn", "--init-from", best, text="none of its weights fits")
        tb.save_checkpoint({"epoch": 1}, "other.pt")
        self.refused(*SMALL, "--init-from", "other.pt", text="none of its weights fits")

    def test_tensorboard_gets_history_graph_and_images_and_its_absence_is_exit_code_3(self) -> None:
        stub: Any = types.ModuleType("torch.utils.tensorboard")
        stub.SummaryWriter = mock.MagicMock()
        self.addCleanup(sys.modules.pop, stub.__name__, None)
        sys.modules[stub.__name__] = None  # type: ignore[assignment]
        self.refused(*SMALL, "--output", "a", "--tensorboard", text="pip install 'torchbasics[tens", code=3)
        sys.modules[stub.__name__] = stub
        self.run_small("a", "--tensorboard")  # the refused run left nothing that is in the way
        writer = stub.SummaryWriter.return_value
        written = {(name, step): value for name, value, step in (each.args for each in writer.add_scalar.mock_calls)}
        for row, name in itertools.product(rows_of(self.folder / "a"), ("train_loss", "val_acc", "lr")):
            self.assertEqual(written[name, row["step"]], row[name])
        self.assertEqual((writer.add_graph.call_count, writer.add_image.call_count), (1, 1))

        writer.add_graph.side_effect = torch.jit.trace  # as TensorBoard draws it
        compiled = tb.SimpleNet(784, 8, 10)
        compiled.compile(backend="eager")
        trainer = types.SimpleNamespace(step=0, evaluated_model=compiled)
        script.tensorboard_callback(types.SimpleNamespace(path=self.folder), trainer, [(torch.zeros(2, 1, 28, 28),)])

    def test_the_result_ends_with_the_classes_the_advice_and_the_notice(self) -> None:
        result = {"best_epoch": 1, "epochs_run": 1, "best_val_accuracy": 1.0, "test_accuracy": 1.0, "test_loss": 0.0,
                  "stopped_because": "all done", "train_seconds": 1.0}  # fmt: skip
        judgement = types.SimpleNamespace(by_class_lines=lambda: ["by class: a 98.0%"])
        advice = ["Train\x1b[2J longer."]
        report = types.SimpleNamespace(info={"notice": "drawn"}, advice=lambda: advice, judgement=judgement)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            script.print_result(script.parse_args([*SMALL, "--dry-run"]), result, report)
        lines = out.getvalue().splitlines()
        self.assertEqual((lines[3], lines[6:]), ("by class: a 98.0%", ["advice: Train\\x1b[2J longer.", "drawn"]))

    def test_a_run_that_is_interrupted_or_fails_says_so_in_its_report_until_it_goes_on(self) -> None:
        run = self.run_interrupted("a", 13)
        page = (run / "report.html").read_text()
        self.assertIn("1 of 2 epochs are done; the best, epoch 1, has a validation accuracy of ", page)
        self.assertIn("<b>Interrupted: </b>SIGTERM: saved", page)
        self.assertNotIn("confused", page)
        self.assertEqual(call("--resume", run)[0], 0)
        page = (run / "report.html").read_text()
        self.assertNotIn("Interrupted", page)
        self.assertIn("(best epoch: 2 of 2).", page)
        self.assertNotIn("of training", page)  # the seconds since the resume are not those of the training
        self.assertEqual(call(*SMALL, "--lr", 1e30, "--schedule", "constant", "--output", "b")[0], 1)
        self.assertIn("<b>Failed: </b>the loss is", Path("b/report.html").read_text())

    def test_a_report_changes_nothing_in_the_training(self) -> None:
        with mock.patch.object(script, "Report", lambda *args, **options: contextlib.nullcontext(mock.MagicMock())), \
                mock.patch.object(script, "print_result"):  # fmt: skip
            without = self.run_small("a")
        self.assert_same_run(without, self.run_small("b"))


class Recipes(ScriptCase):
    def test_every_optimizer_and_schedule_trains(self) -> None:
        optimizers = ("adam", "adamw", "sgd", "rmsprop", "adagrad")
        for optimizer, schedule in zip(optimizers, ("constant", "step", "cosine", "onecycle", "plateau"), strict=True):
            with self.subTest(optimizer=optimizer, schedule=schedule), watched(lambda _: None) as trainers:
                code, _, err = call(*SMALL, "--optimizer", optimizer, "--schedule", schedule, "--dry-run")
                self.assertEqual((code, err, trainers[0].step), (0, "", 2))
                self.assertEqual(type(trainers[0].optimizer).__name__.lower(), optimizer)

    def rates(self, *argv: Any) -> list[float]:
        """Return the learning rates of all 30 steps: 3 epochs of 10."""
        args = script.parse_args(["--lr", "1", "--epochs", "3", *map(str, argv)])
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.lr)
        schedule, rates = script.make_schedule(args, optimizer, 10), []
        for _ in range(30):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if schedule is not None:
                schedule.step()
        return rates

    def check(self, rates: list[float], expected: dict[int, float]) -> None:
        for step, rate in expected.items():
            self.assertAlmostEqual(rates[step], rate, places=9, msg=f"step {step}")

    def test_the_rates_of_each_schedule_follow_its_closed_form(self) -> None:
        def half_cosine(done: float) -> float:
            return (1 + math.cos(math.pi * done)) / 2

        self.assertEqual(self.rates("--schedule", "constant"), [1.0] * 30)
        warm = {step: 0.01 + 0.99 * step / 10 for step in (0, 5, 10)}
        self.check(self.rates("--schedule", "constant", "--warmup-epochs", 1), {**warm, 29: 1.0})
        self.check(self.rates("--schedule", "step"), {0: 1, 9: 1, 10: 0.1, 19: 0.1, 20: 0.01, 29: 0.01})
        half = {0: 0.01, 4: 0.01 + 0.99 * 4 / 5, 5: 1, 9: 1, 10: 0.1, 29: 0.01}
        self.check(self.rates("--schedule", "step", "--warmup-epochs", 0.5), half)
        self.check(self.rates("--schedule", "cosine"), {0: 1, 15: 0.5, 29: half_cosine(29 / 30)})
        warmed = {**warm, 20: 0.5, 29: half_cosine(19 / 20)}
        self.check(self.rates("--schedule", "cosine", "--warmup-epochs", 1), warmed)

        # One cycle rises from 1/25 on a half cosine, and falls to 1/250,000 at the step after the last.
        low, lowest = 1 / 25, 1 / 250_000

        def rise(done: float) -> float:
            return 1 - (1 - low) * half_cosine(done)

        def fall(done: float) -> float:
            return lowest + (1 - lowest) * half_cosine(done)

        top = 0.3 * 31 - 1
        plain = {0: low, 4: rise(4 / top), 9: fall((9 - top) / (30 - top)), 29: fall((29 - top) / (30 - top))}
        self.check(self.rates("--schedule", "onecycle"), plain)
        warmed = {0: low, 5: rise(0.5), 10: 1, 20: fall(0.5), 29: fall(19 / 20)}
        self.check(self.rates("--schedule", "onecycle", "--warmup-epochs", 1), warmed)

class Resume(ScriptCase):
    def test_a_run_stopped_by_sigterm_and_moved_ends_as_if_never_stopped(self) -> None:
        hard = ("--model", "mlp", "--accumulate", 5, "--ema", 0.9, "--schedule", "plateau", "--clip-norm", 1)
        for options, steps in (((), (5, 12)), (hard, (5,))):  # of 12 and 3 steps an epoch
            straight = self.run_small(f"straight {bool(options)}", *options)
            for step in steps:
                with self.subTest(options=options, step=step):
                    stopped = self.run_interrupted(f"a {bool(options)} {step}", step, *options)
                    moved = stopped.rename(self.folder / f"b {bool(options)} {step}")
                    code, _, err = call("--resume", moved)
                    self.assertEqual((code, err), (0, ""))
                    self.assert_same_run(straight, moved)

    def test_what_decides_the_course_cannot_change_and_the_rest_can(self) -> None:
        run = self.run_interrupted("a", 5)
        before = (run / "run.json").read_text()
        for option in ("--batch-size 64", "--lr 0.1", "--model cnn", "--seed 1", "--ema 0.5", "--no-augment", "--tta",
                       "--preset best", "--dataset kmnist", "--deterministic", "--limit-batches 1", "--threads 2",
                       "--compile", "--precision bf16", "--epochs 3", "--epochs 1"):  # fmt: skip
            self.refused("--resume", run, *option.split(), text=option.split()[0].replace("no-", ""))
        self.refused("--resume", run, "--epochs", 3, text="the run's onecycle schedule ends after 2 epochs")
        self.assertEqual((run / "run.json").read_text(), before)
        free = "--quiet --debug --patience 9 --save-every 3 --anomaly --lr 3e-3 --data-dir"
        code, out, err = call("--resume", run, *free.split(), self.folder.parent / "data")
        self.assertEqual((code, err), (0, ""))
        self.assertRegex(out, r"^\nbest epoch ")
        self.assert_same_run(self.run_small("b"), run)

    def test_more_epochs_under_a_constant_rate_are_those_of_a_longer_run(self) -> None:
        constant = ("--schedule", "constant", "--warmup-epochs", 0.5)
        code, out, _ = call(*SMALL, *constant, "--output", "a b")
        self.assertIn("stopped because: all 2 epochs done", out)
        advice = re.search(r"^continue: python .*(--resume .*)$", out, re.M)
        self.assertEqual((code, advice and advice[1]), (0, "--resume 'a b' --epochs 4"))
        for epochs in (3, 4):
            self.assertEqual(call("--resume", "a b", "--epochs", epochs)[0], 0)
        self.assert_same_run(self.run_small("b", *constant, "--epochs", 4), self.folder / "a b")

    def test_a_finished_run_is_judged_again_and_nothing_is_trained(self) -> None:
        run = self.run_small("a")
        before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()}
        result = result_of(run)["test_loss"]
        with watched(lambda _: self.fail("a step")):
            self.assertEqual(call("--resume", run)[0], 0)
        self.assertEqual({path: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()}, before)
        self.assertEqual(result_of(run)["test_loss"], result)

    def test_a_run_that_began_with_given_weights_resumes_without_their_file(self) -> None:
        weights = self.run_small("w", "--epochs", 1) / "checkpoints" / "best.pt"
        straight = self.run_small("a", "--init-from", weights)
        stopped = self.run_interrupted("b", 5, "--init-from", weights)
        weights.unlink()
        code, out, err = call("--resume", stopped)
        self.assertEqual((code, err), (0, ""))
        self.assertNotIn("initial weights", out)
        self.assert_same_run(straight, stopped)

    def test_what_cannot_be_resumed_is_refused_in_one_line(self) -> None:
        run = self.run_interrupted("a", 1)
        self.refused("--resume", "b", text="b: no checkpoint to resume from")
        self.refused("--resume", self.folder, text="no checkpoint")
        for more in (("--output", "c"), ("--dry-run",), ("--init-from", "x.pt")):
            self.refused("--resume", run, *more, text=more[0])
        for _, path in saved_steps(run / "checkpoints"):
            path.write_bytes(path.read_bytes()[:-100])
        code, _, err = call("--resume", run)
        self.assertEqual(code, 2)
        self.assertRegex(err, r"(?m)^error: .*damaged")
        self.assertEqual([path.name for path in self.folder.iterdir()], ["a"])


BAD_VALUES = {
    "--epochs": "0 -1 1.5 x nan 1e400", "--batch-size": "0 two", "--lr": "0 -1 nan inf", "--weight-decay": "-1 nan",
    "--warmup-epochs": "-1 x", "--label-smoothing": "-0.1 1", "--dropout": "-0.1 1", "--clip-norm": "0 -1",
    "--clip-value": "0 nan", "--accumulate": "0", "--ema": "1 -0.5", "--patience": "-1", "--threads": "0",
    "--save-every": "0", "--limit-batches": "0", "--seed": "-1 4294967296 x", "--dataset": "cifar", "--model": "resnet",
    "--preset": "slow", "--optimizer": "lion", "--schedule": "exponential", "--precision": "fp8", "--compile": "fast",
    "--device": "abacus cuda:99 cuda:x", "--data-dir": "", "--output": "", "--resume": "", "--init-from": "",
}  # fmt: skip


class BadInput(ScriptCase):
    def test_a_bad_value_of_any_option_is_one_line_and_exit_code_2(self) -> None:
        takes_value = {a.option_strings[0] for a in script.make_parser()._actions if a.type or a.choices or a.metavar}
        self.assertEqual(takes_value, set(BAD_VALUES))
        for option, values in BAD_VALUES.items():
            for value in (*values.split(), ""):
                with self.subTest(option=option, value=value):
                    self.refused(*SMALL, f"{option}={value}", text=option.strip("-"))
        self.refused(*SMALL, "--init-from", "missing.pt", text="No such file or directory: missing.pt")
        for option in ("--epochs", "--output", "--preset"):
            self.refused(option, text=f"argument {option}")
        self.refused("--epoch", "3", text="--epoch")  # no abbreviations
        self.refused("digit.png", text="digit.png")
        self.assertEqual(os.listdir(), [])

    def test_values_that_contradict_each_other_are_refused(self) -> None:
        self.refused(*SMALL, "--warmup-epochs", 3, text="--warmup-epochs 3 is more than --epochs 2")
        self.refused(*SMALL, "--schedule", "plateau", "--warmup-epochs", 1, text="plateau has no warm-up")
        self.refused(*SMALL, "--batch-size", 401, text="400 samples, batch_size 401")

    def test_an_output_that_exists_is_kept(self) -> None:
        run = self.run_small("a", "--epochs", 1)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        self.refused(*SMALL, "--output", run, text=f"{run} exists; choose another --output")
        self.assertEqual({path: path.read_bytes() for path in run.rglob("*") if path.is_file()}, before)
        Path("file").write_text("mine")
        self.refused(*SMALL, "--output", "file", text="file exists")

    def test_a_loss_that_becomes_nan_names_the_batch_and_what_is_saved_and_can_be_repeated(self) -> None:
        diverging = (*SMALL, "--lr", 1e30, "--schedule", "cosine", "--warmup-epochs", 1, "--save-every", 1)
        code, _, first = call(*diverging, "--output", "a")
        self.assertEqual(code, 1)
        self.assertRegex(first, r"^error: .* is (nan|inf) in batch \d+; .*saved \d steps before: a/\S+\.pt.*\n$")
        code, _, again = call("--resume", "a", "--anomaly")
        self.assertEqual((code, again.partition("epoch")[0]), (1, first.partition("epoch")[0]))

    def test_anomaly_names_the_line_whose_gradient_is_nan(self) -> None:
        forward = tb.SimpleNet.forward

        def with_nan_gradient(self: Any, x: Any) -> Any:
            outputs = forward(self, x)
            return outputs + torch.sqrt(outputs * 0)  # finite, with a slope of NaN

        with mock.patch.object(tb.SimpleNet, "forward", with_nan_gradient):
            code, _, err = call(*SMALL, "--output", "a", "--anomaly")
        self.assertEqual(code, 1)
        self.assertRegex(err, r"warning: Error detected in MulBackward0.* in with_nan_gradient .*torch.sqrt\(outputs")
        self.assertIn("error: RuntimeError: Function 'MulBackward0' returned nan", err)


class Load(unittest.TestCase):
    def test_the_threads_that_would_be_faster_are_named_while_others_use_the_cores(self) -> None:
        cases = {(2, 0.1): "", (2, 1.0): "other programs use 1.0 of 2 cores; --threads 1", (1, 1.0): ""}
        for (threads, busy), expected in cases.items():
            args = types.SimpleNamespace(threads=threads)
            with mock.patch("os.cpu_count", return_value=2), contextlib.redirect_stdout(io.StringIO()) as out:
                script.print_load(args, busy)
            self.assertIn(expected, out.getvalue())
            self.assertEqual(out.getvalue() == "", expected == "")


class Help(unittest.TestCase):
    def test_help_fits_two_screens_and_lists_exactly_these_options(self) -> None:
        for columns in ("80", "100", "120"):
            with mock.patch.dict(os.environ, COLUMNS=columns):
                code, out, _ = call("--help")
            self.assertEqual(code, 0)
            self.assertLessEqual(len(out.splitlines()), 100)
            self.assertLessEqual(max(map(len, out.splitlines())), 120)
        listed = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", out, re.M))
        expected = """
            --help --dataset --data-dir --augment --model --dropout --tta --init-from --preset --epochs --batch-size
            --optimizer --lr --weight-decay --schedule --warmup-epochs --label-smoothing --clip-norm --clip-value
            --accumulate --ema --patience --device --precision --compile --threads --output --resume --save-every
            --seed --deterministic --dry-run --limit-batches --quiet --tensorboard --anomaly --debug
        """
        self.assertEqual(listed, set(expected.split()))


if __name__ == "__main__":
    unittest.main()
