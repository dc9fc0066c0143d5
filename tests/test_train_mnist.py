"""scripts/train_mnist.py: what a run leaves, how it says what, how it refuses, and that it resumes exactly."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from tests.scripts import load_script
from torchbasics import mnist
from torchbasics.models import make_model

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "train_mnist.py"
MNIST_LIKE = {"train": 240, "t10k": 80}


script = load_script("train_mnist")


def setUpModule() -> None:
    torch.set_num_threads(1)


def few_digits(count: int, seed: int = 0, **_: Any) -> tuple[Tensor, Tensor]:
    """In the place of draw_digits: a bright bar, whose place is the class, on noise; few and fast."""
    count = MNIST_LIKE["train" if count == 60_000 else "t10k"]
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 10
    inputs = torch.randint(0, 120, (count, 1, 28, 28), generator=generator)
    inputs[torch.arange(count), 0, 2 + targets * 2] += 130
    return inputs.to(torch.uint8), targets


def idx_bytes(tensor: Tensor) -> bytes:
    return struct.pack(f">{1 + tensor.dim()}I", 0x0800 + tensor.dim(), *tensor.shape) + bytes(
        tensor.to(torch.uint8).flatten().tolist()
    )


def write_fashion(folder: Path, counts: dict[str, int] | None = None) -> Path:
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for seed, (part, count) in enumerate((counts or MNIST_LIKE).items()):
        inputs, targets = few_digits(60_000, seed)
        times = -(-count // len(targets))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(inputs[:, 0].repeat(times, 1, 1)[:count]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(targets.repeat(times)[:count]))
    return raw


def write_images(folder: Path, count: int = 40, classes: int = 2, seed: int = 0, mode: str = "L") -> None:
    from PIL import Image  # comes with torchvision

    inputs, _ = few_digits(60_000, seed)
    for i in range(count):
        path = folder / f"class{i % classes}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes(
            "L", (28, 28), bytes(inputs[(i % classes + 10 * (i // classes)) % len(inputs)].flatten().tolist())
        ).convert(mode).save(path)


class Done(NamedTuple):
    code: int
    out: str
    err: str


class ScriptCase(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        no_network = ConnectionError("mnist could not be downloaded: no route to host")
        for patch in (
            mock.patch("torchbasics.digits.draw_digits", few_digits),
            mock.patch("torchbasics.data.download_mnist", side_effect=no_network),
        ):
            patch.start()
            self.addCleanup(patch.stop)
        self.addCleanup(torch.use_deterministic_algorithms, False)

    def main(self, *argv: Any) -> Done:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = script.main([str(arg) for arg in argv])
            except SystemExit as stop:
                code = stop.code
        return Done(code, out.getvalue(), err.getvalue())

    SMALL = ("--dataset", "digits", "--model", "simplenet", "--epochs", 2, "--val-size", 40, "--batch-size", 32)

    def small(self, name: str, *more: Any, code: int = 0) -> Path:
        """A run of seconds in `self.folder / name`: 200 training images, 7 batches an epoch."""
        done = self.main(*self.SMALL, "--output", self.folder / name, *more)
        self.assertEqual(done.code, code, done.err)
        return self.folder / name

    def interrupted(self, name: str, step: int, *more: Any) -> Path:
        """The same, ended by SIGTERM at `step`."""
        with self.killed_at(step):
            done = self.main(*self.SMALL, "--output", self.folder / name, *more)
        self.assertEqual(done.code, 143, done.err)
        self.assertIn(f"--resume {self.folder / name}", done.err)
        return self.folder / name

    def killed_at(self, step: int) -> Any:
        return mock.patch.object(
            script.Report, "on_step_end", lambda report, t: t.step == step and os.kill(os.getpid(), signal.SIGTERM)
        )

    def check_options(self, module: Any) -> None:
        """What `build_trainer` of a training script makes of each option of the recipe."""
        argv = (
            "--dataset digits --val-size 40 --batch-size 32 --device cpu --label-smoothing 0.1 --clip-norm 2 "
            "--clip-value 0.5 --weight-decay 0.01 --lr 0.02 --optimizer sgd --schedule step --accumulate 2 --ema 0.9 "
            "--precision bf16 --compile max-autotune --nan-policy skip --patience 4 --min-delta 0.1 --save-every 3 "
            "--keep 5"
        )
        args = module.parse_args(argv.split())
        data, cpu = module.load_data(args, torch.device("cpu")), torch.device("cpu")
        with mock.patch.object(torch.nn.Module, "compile") as compiled:
            made = module.build_trainer(args, data, cpu, self.folder / "checkpoints")
        trainer = made[0] if isinstance(made, tuple) else made
        compiled.assert_called_once_with(mode="max-autotune")
        group = trainer.optimizer.param_groups[0]
        self.assertIsInstance(trainer.optimizer, torch.optim.SGD)
        self.assertEqual((group["initial_lr"], group["weight_decay"], trainer.scheduler_interval), (0.02, 0.01, "step"))
        self.assertEqual(
            (trainer.criterion.label_smoothing, trainer.clip_norm, trainer.clip_value, trainer.accumulate),
            (0.1, 2.0, 0.5, 2),
        )
        self.assertEqual((trainer.precision, trainer.memory_format), ("bf16", torch.channels_last))
        self.assertEqual((trainer.nan_policy, trainer.save_every, trainer.checkpoints.keep), ("skip", 3, 5))
        self.assertEqual((trainer.early_stopping.patience, trainer.early_stopping.delta), (4, 0.1))
        self.assertIsNotNone(trainer.averages)

    def info(self, run: Path) -> dict[str, Any]:
        return json.loads((run / "run.json").read_text())

    def rows(self, run: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    def assert_refused(self, done: Done, pattern: str, code: int = 2) -> None:
        lines = done.err.splitlines()
        self.assertEqual(len(lines), 1, done.err)
        self.assertTrue(lines[0].startswith("error: "), done.err)
        self.assertRegex(lines[0], pattern)
        self.assertNotIn("Traceback", done.err)
        self.assertEqual(done.code, code, done.err)


def last_checkpoint(run: Path) -> dict[str, Any]:
    path = max((run / "checkpoints").glob("step-*.pt"))
    return {"name": path.name, **torch.load(path, weights_only=True)}


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    if isinstance(a, Tensor):
        return [] if isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            found for key in a.keys() | b.keys() for found in differences(a.get(key), b.get(key), f"{where}[{key!r}]")
        ]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [
            found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{where}[{i}]")
        ]
    return [] if a == b else [f"{where}: {a!r} and {b!r}"]


class ARun(ScriptCase):
    def test_what_it_leaves(self) -> None:
        run = self.small("run", "--model", "mlp", "--seed", 7)
        names = sorted(path.name for path in run.rglob("*") if path.is_file())
        self.assertEqual(
            [n for n in names if not n.startswith(".")],
            [
                "best.pt",
                "best.pt.json",
                "metrics.jsonl",
                *(["mistakes.png"] if "mistakes.png" in names else []),
                "run.json",
                "step-00000007.pt",
                "step-00000007.pt.json",
                "step-00000014.pt",
                "step-00000014.pt.json",
            ],
        )
        rows = self.rows(run)
        self.assertEqual([row["epoch"] for row in rows], [1, 2])
        self.assertEqual([row["step"] for row in rows], [7, 14])
        self.assertLessEqual({"train_loss", "train_acc", "val_loss", "val_acc", "lr"}, rows[0].keys())
        info = self.info(run)
        self.assertLessEqual(
            {"command", "arguments", "seed", "versions", "device", "git_commit", "result"}, info.keys()
        )
        self.assertEqual((info["seed"], info["arguments"]["seed"], info["arguments"]["batch_size"]), (7, 7, 32))
        self.assertEqual(info["versions"]["torch"], torch.__version__)

        result, kinds = (
            info["result"],
            {
                "test_accuracy": float,
                "test_loss": float,
                "best_val_accuracy": float,
                "best_epoch": int,
                "epochs_run": int,
                "train_seconds": float,
                "total_seconds": float,
                "samples_per_second": float,
                "stopped_because": str,
                "dataset": str,
                "model": str,
                "parameters": int,
            },
        )
        for key, kind in kinds.items():
            self.assertIs(type(result[key]), kind, key)
        self.assertEqual((result["dataset"], result["model"], result["epochs_run"]), ("digits", "mlp", 2))
        best = min(rows, key=lambda row: row["val_loss"])
        self.assertEqual((result["best_epoch"], result["best_val_accuracy"]), (best["epoch"], best["val_acc"]))
        self.assertTrue(0 <= result["test_accuracy"] <= 1)
        self.assert_result_is_of_the_best_model(run, result)

    def assert_result_is_of_the_best_model(self, run: Path, result: dict[str, Any]) -> None:
        """The figures again, from best.pt and the test images, by hand."""
        train, _ = few_digits(60_000)
        inputs, targets = few_digits(10_000, seed=1)
        order = torch.randperm(240, generator=torch.Generator().manual_seed(7))
        pixels = train[order[40:]].double() / 255
        model = make_model("mlp").eval()
        model.load_state_dict(torch.load(run / "checkpoints" / "best.pt", weights_only=True)["model_state_dict"])
        with torch.no_grad():
            logits = model(((inputs / 255 - float(pixels.mean())) / float(pixels.std(correction=0))).float())
        self.assertAlmostEqual(
            result["test_loss"], float(torch.nn.functional.cross_entropy(logits, targets)), delta=0.02
        )  # it may be bf16
        self.assertAlmostEqual(
            result["test_accuracy"], float((logits.argmax(1) == targets).double().mean()), delta=0.02
        )
        confusion = torch.tensor(result["confusion"])
        self.assertEqual(confusion.sum(1).tolist(), [8] * 10)
        self.assertAlmostEqual(float(confusion.diag().sum()) / 80, result["test_accuracy"])
        self.assertEqual(list(result["accuracy_by_class"]), list("0123456789"))
        self.assertAlmostEqual(sum(result["accuracy_by_class"].values()) / 10, result["test_accuracy"])

    def test_what_it_says(self) -> None:
        done = self.main(*self.SMALL, "--output", self.folder / "run")
        self.assertEqual(done.err, "")
        lines = done.out.splitlines()
        self.assertIn("200 training, 40 validation, 80 test images", lines[0])
        row = self.rows(self.folder / "run")[0]
        self.assertTrue(lines[2].split()[0] == "1" and f"{row['val_acc']:.2%}" in lines[2], lines[2])
        self.assertIn("all 2 epochs done", done.out)
        self.assertIn(f"--resume {self.folder / 'run'}", done.out)
        self.assertNotIn("NOTICE", done.out)
        quiet = self.main(*self.SMALL, "--output", self.folder / "quiet", "--quiet")
        self.assertNotIn("train loss", quiet.out)
        self.assertIn("test ", quiet.out)

    def test_each_option_reaches_the_trainer(self) -> None:
        self.check_options(script)

    def test_anomaly_mode_is_on_in_the_training(self) -> None:
        seen: list[bool] = []
        with mock.patch.object(script.Report, "on_step_end", lambda *_: seen.append(torch.is_anomaly_enabled())):
            self.small("plain", "--epochs", 1)
            self.small("watched", "--epochs", 1, "--anomaly")
        self.assertEqual(seen, [False] * 7 + [True] * 7)

    def test_all_options_together_train(self) -> None:
        run = self.small(
            "run",
            "--model",
            "mnistnet",
            "--limit-batches",
            3,
            "--optimizer",
            "sgd",
            "--schedule",
            "cosine",
            "--warmup-epochs",
            1,
            "--label-smoothing",
            0.1,
            "--clip-norm",
            1,
            "--clip-value",
            0.1,
            "--accumulate",
            2,
            "--ema",
            0.9,
            "--precision",
            "fp32",
            "--patience",
            5,
            "--min-delta",
            0.001,
            "--deterministic",
            "--save-every",
            1,
            "--keep",
            2,
            "--no-augment",
            "--device",
            "cpu",
        )
        self.assertEqual([row["step"] for row in self.rows(run)], [2, 4])
        self.assertEqual(
            sorted(path.name for path in (run / "checkpoints").glob("step-*.pt")),
            ["step-00000003.pt", "step-00000004.pt"],
        )
        self.assertTrue(torch.are_deterministic_algorithms_enabled())

    def test_same_seed_same_run(self) -> None:
        runs = [self.small(name, "--seed", seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
        self.assertEqual(self.rows(runs[0]), self.rows(runs[1]))
        self.assertNotEqual(self.rows(runs[0]), self.rows(runs[2]))

    def test_early_stopping_says_why(self) -> None:
        run = self.small("run", "--patience", 1, "--min-delta", 100, "--epochs", 9)
        result = self.info(run)["result"]
        self.assertEqual(result["epochs_run"], 2)
        self.assertRegex(result["stopped_because"], "no improvement")

    def test_dry_run_leaves_nothing(self) -> None:
        here = os.getcwd()
        os.chdir(self.folder)
        try:
            done = self.main(
                "--dry-run", "--dataset", "digits", "--model", "simplenet", "--val-size", 40, "--batch-size", 32
            )
        finally:
            os.chdir(here)
        self.assertEqual(done.code, 0, done.err)
        self.assertEqual(list(self.folder.iterdir()), [])
        self.assertNotIn("--resume", done.out)

    def test_dry_run_of_a_recipe_with_a_long_warm_up(self) -> None:
        done = self.main(*self.SMALL, "--dry-run", "--epochs", 15, "--warmup-epochs", 2)
        self.assertEqual(done.code, 0, done.err)

    def test_it_keeps_the_memory_of_each_step_for_the_next(self) -> None:
        with mock.patch.object(script.tb, "cache_cpu_memory") as called:
            self.assertEqual(self.main(*self.SMALL, "--limit-batches", 1, "--dry-run").code, 0)
        called.assert_called_once_with()

    def test_without_output_it_names_a_directory_itself(self) -> None:
        here = os.getcwd()
        os.chdir(self.folder)
        try:
            for _ in range(2):
                done = self.main(*self.SMALL, "--limit-batches", 1)
                self.assertEqual(done.code, 0, done.err)
        finally:
            os.chdir(here)
        runs = [path.name for path in (self.folder / "runs").iterdir()]
        self.assertEqual(len(runs), 2)
        for name in runs:
            self.assertRegex(name, r"^digits-\d{8}-\d{6}(-2)?$")

    def test_fashion_mnist_from_files(self) -> None:
        write_fashion(self.folder / "data")
        run = self.small("run", "--dataset", "fashion-mnist", "--data-dir", self.folder / "data")
        self.assertEqual(list(self.info(run)["result"]["accuracy_by_class"])[9], "ankle boot")

    def test_folder_of_images(self) -> None:
        write_images(self.folder / "one")
        run = self.small(
            "a", "--dataset", "folder", "--data-dir", self.folder / "one", "--batch-size", 8, "--limit-batches", 2
        )
        self.assertEqual(list(self.info(run)["result"]["accuracy_by_class"]), ["class0", "class1"])
        self.assertIn("no test/ folder", self.info(run)["notice"])
        for part, seed in (("train", 0), ("val", 1), ("test", 2)):
            write_images(self.folder / "three" / part, 20, seed=seed)
        run = self.small(
            "b",
            "--dataset",
            "folder",
            "--data-dir",
            self.folder / "three",
            "--batch-size",
            8,
            "--model",
            "mnistnet",
            "--limit-batches",
            2,
        )
        self.assertEqual(self.info(run)["notice"], "")
        self.assertEqual(sum(map(sum, self.info(run)["result"]["confusion"])), 20)

    def test_tensorboard_missing_names_the_command(self) -> None:
        with mock.patch.dict(sys.modules, {"torch.utils.tensorboard": None}):
            done = self.main(*self.SMALL, "--output", self.folder / "run", "--tensorboard")
            self.assert_refused(done, "pip install", code=3)
            self.assertFalse((self.folder / "run").exists())
            run = self.small("run")
            best = (run / "checkpoints" / "best.pt").read_bytes()
            for more in ((), ("--ensemble", 2)):  # said before the earlier run is replaced
                done = self.main(*self.SMALL, "--output", run, "--overwrite", "--tensorboard", *more)
                self.assert_refused(done, "pip install", code=3)
                self.assertEqual((run / "checkpoints" / "best.pt").read_bytes(), best)


def nine_views(inputs: Tensor) -> list[Tensor]:
    wide = torch.nn.functional.pad(inputs, (1, 1, 1, 1), mode="replicate")
    return [wide[..., y : y + 28, x : x + 28] for y in range(3) for x in range(3)]


class Recipes(ScriptCase):
    def test_a_preset_trains_and_is_recorded(self) -> None:
        run = self.small("run", "--preset", "best", "--epochs", 1)
        arguments = self.info(run)["arguments"]
        self.assertEqual((arguments["preset"], arguments["model"], arguments["tta"]), ("best", "simplenet", True))
        self.assertEqual((arguments["ema"], arguments["epochs"]), (script.options.PRESETS["best"]["ema"], 1))

    def test_tta_judges_by_the_mean_of_nine_views(self) -> None:
        run = self.small("run", "--tta", "--precision", "fp32")
        model = make_model("simplenet")
        model.load_state_dict(torch.load(run / "checkpoints" / "best.pt", weights_only=True)["model_state_dict"])
        loaders = script.make_loaders("digits", batch_size=32, val_size=40)
        (inputs, targets), *_ = list(loaders.test)
        with torch.no_grad():
            mean = torch.stack([model(view).softmax(1) for view in nine_views(inputs)]).mean(0)
        loss = float(torch.nn.functional.nll_loss(mean.log(), targets))
        result = self.info(run)["result"]
        self.assertAlmostEqual(result["test_loss"], loss, places=5)
        self.assertEqual(result["test_accuracy"], float((mean.argmax(1) == targets).double().mean()))
        plain = self.small("plain", "--precision", "fp32")
        self.assertNotAlmostEqual(self.info(plain)["result"]["test_loss"], loss, places=5)
        self.assertEqual(self.rows(plain), self.rows(run))  # validation is as without


class Ensemble(ScriptCase):
    def probabilities(self, run: Path, inputs: Tensor) -> Tensor:
        model = make_model("simplenet")
        model.load_state_dict(torch.load(run / "checkpoints" / "best.pt", weights_only=True)["model_state_dict"])
        with torch.no_grad():
            return model(inputs).softmax(1)

    def loaders(self, seed: int) -> Any:
        return script.make_loaders("digits", batch_size=32, val_size=40, seed=seed)

    def test_its_result_is_that_of_the_mean_probability_of_runs_with_seeds_of_their_own(self) -> None:
        done = self.main(
            *self.SMALL, "--precision", "fp32", "--seed", 5, "--ensemble", 2, "--output", self.folder / "two"
        )
        self.assertEqual(done.code, 0, done.err)
        run, alone = self.folder / "two", self.small("alone", "--precision", "fp32", "--seed", 6)
        self.assertEqual(differences(last_checkpoint(run / "member-2"), last_checkpoint(alone)), [])
        (first, targets), (second, _) = (next(iter(self.loaders(seed).test)) for seed in (5, 6))  # normalised by each
        mean = (self.probabilities(run / "member-1", first) + self.probabilities(alone, second)) / 2
        result = self.info(run)["result"]
        self.assertEqual(result["test_accuracy"], float((mean.argmax(1) == targets).double().mean()))
        self.assertAlmostEqual(result["test_loss"], float(torch.nn.functional.nll_loss(mean.log(), targets)), places=5)
        self.assertEqual(result["members"][1]["test_accuracy"], self.info(alone)["result"]["test_accuracy"])
        self.assertEqual((len(result["members"]), result["epochs_run"]), (2, 4))
        self.assertRegex(done.out, r"ensemble of 2: test \d+\.\d\d% .* alone \d+\.\d\d%  \d+\.\d\d%")

    def test_with_tta_each_member_reads_nine_views(self) -> None:
        run = self.small("two", "--precision", "fp32", "--seed", 5, "--ensemble", 2, "--tta", "--epochs", 1)
        found = []
        for i, seed in ((1, 5), (2, 6)):
            inputs, targets = next(iter(self.loaders(seed).test))
            views = [self.probabilities(run / f"member-{i}", view) for view in nine_views(inputs)]
            found.append(torch.stack(views).mean(0))
        loss = float(torch.nn.functional.nll_loss(torch.stack(found).mean(0).log(), targets))
        self.assertAlmostEqual(self.info(run)["result"]["test_loss"], loss, places=5)

    def test_interrupted_and_resumed(self) -> None:
        options = (*self.SMALL, "--ensemble", 2)
        self.assertEqual(self.main(*options, "--output", self.folder / "whole").code, 0)
        with mock.patch.object(script.Report, "on_step_end", self.killer(at=7 * 2 + 3)):
            done = self.main(*options, "--output", self.folder / "cut")
        self.assertEqual(done.code, 143, done.err)
        self.assertIn(f"continue with --resume {self.folder / 'cut'}\n", done.err)
        self.assertTrue((self.folder / "cut" / "member-2" / "checkpoints" / "step-00000003.pt").exists())
        before = (self.folder / "cut" / "member-1" / "run.json").read_bytes()
        done = self.main("--resume", self.folder / "cut")
        self.assertEqual(done.code, 0, done.err)
        self.assertEqual((self.folder / "cut" / "member-1" / "run.json").read_bytes(), before)  # not trained again
        results = [self.info(self.folder / name)["result"] for name in ("whole", "cut")]
        self.assertEqual(results[0]["test_loss"], results[1]["test_loss"])
        self.assertEqual(results[0]["confusion"], results[1]["confusion"])

    def test_one_that_overwrote_goes_on_too(self) -> None:
        """What was asked for at its start must not delete a member's checkpoints at its resume."""
        options = (*self.SMALL, "--ensemble", 2, "--overwrite")
        self.assertEqual(self.main(*options, "--output", self.folder / "cut", "--epochs", 1).code, 0)
        with mock.patch.object(script.Report, "on_step_end", self.killer(at=7 * 2 + 3)):
            self.assertEqual(self.main(*options, "--output", self.folder / "cut").code, 143)
        done = self.main("--resume", self.folder / "cut")
        self.assertEqual(done.code, 0, done.err)
        self.assertIn("resumed from step-00000003.pt", done.out)

    def killer(self, at: int) -> Callable[[Any, Any], None]:
        steps: list[int] = []

        def on_step_end(_: Any, trainer: Any) -> None:
            steps.append(trainer.step)
            if len(steps) == at:
                os.kill(os.getpid(), signal.SIGTERM)

        return on_step_end

    def test_what_may_change_at_a_resume_changes_for_a_member_that_has_begun(self) -> None:
        with mock.patch.object(script.Report, "on_step_end", self.killer(at=3)):
            done = self.main(*self.SMALL, "--ensemble", 2, "--keep", 3, "--output", self.folder / "cut")
        self.assertEqual(done.code, 143, done.err)
        self.assertEqual(self.main("--resume", self.folder / "cut", "--keep", 1).code, 0)
        for member in ("member-1", "member-2"):
            self.assertEqual(self.info(self.folder / "cut" / member)["arguments"]["keep"], 1)
            self.assertEqual(len(list((self.folder / "cut" / member / "checkpoints").glob("step-*.pt"))), 1)

    def test_it_needs_test_images_that_are_the_same_for_all(self) -> None:
        write_images(self.folder / "one")
        data = ("--dataset", "folder", "--data-dir", self.folder / "one", "--batch-size", 8)
        done = self.main(*data, "--ensemble", 2, "--output", self.folder / "run")
        self.assert_refused(done, "--ensemble needs a test/ folder")
        self.assertFalse((self.folder / "run").exists())

    def test_seeds_beyond_the_last_are_refused_at_once(self) -> None:
        done = self.main(*self.SMALL, "--ensemble", 2, "--seed", 2**32 - 1, "--output", self.folder / "run")
        self.assert_refused(done, "--seed 4294967295: each of 2 models takes the next one")
        self.assertFalse((self.folder / "run").exists())

    def test_overwrite_trains_all_members_again_and_a_used_directory_is_refused(self) -> None:
        options = (*self.SMALL, "--epochs", 1, "--ensemble", 2, "--output", self.folder / "run")
        self.assertEqual(self.main(*options, "--seed", 1).code, 0)
        self.assert_refused(self.main(*options), "holds an earlier run")
        self.assertEqual(self.main(*options, "--seed", 2, "--overwrite").code, 0)
        self.assertEqual([self.info(self.folder / "run" / f"member-{i}")["seed"] for i in (1, 2)], [2, 3])

    def test_dry_run_leaves_nothing(self) -> None:
        with mock.patch.object(script, "make_loaders", wraps=script.make_loaders) as made:
            done = self.main(*self.SMALL, "--ensemble", 2, "--dry-run")
        self.assertEqual((done.code, list(self.folder.iterdir())), (0, []), done.err)
        limits = {(call.kwargs["limit_batches"], call.kwargs["limit_evaluation"]) for call in made.call_args_list}
        self.assertEqual(limits, {(2, 2)})
        for word in ("continue:", "files:", "weights:", tempfile.gettempdir()):
            self.assertNotIn(word, done.out)


class NoNetwork(ScriptCase):
    AUTO = ("--dataset", "auto", "--model", "simplenet", "--epochs", 2, "--val-size", 40, "--batch-size", 32)

    def test_auto_says_so_before_and_after_the_table_and_in_run_json(self) -> None:
        done = self.main(*self.AUTO, "--data-dir", self.folder / "none", "--output", self.folder / "run")
        self.assertEqual(done.code, 0, done.err)
        lines = done.out.splitlines()
        notices = [i for i, line in enumerate(lines) if line.startswith("NOTICE: no MNIST")]
        table = next(i for i, line in enumerate(lines) if line.startswith("epoch "))
        self.assertEqual(len(notices), 2)
        self.assertTrue(notices[0] < table < table + 2 < notices[1])
        info = self.info(self.folder / "run")
        for part in (info, info["result"]):
            self.assertTrue(part["notice"].startswith("NOTICE"))
            self.assertEqual(part["dataset"], "digits")

    def test_a_resumed_run_still_says_so(self) -> None:
        with self.killed_at(9):
            done = self.main(*self.AUTO, "--data-dir", self.folder / "none", "--output", self.folder / "run")
        self.assertEqual(done.code, 143)
        done = self.main("--resume", self.folder / "run")
        self.assertEqual(done.code, 0, done.err)
        self.assertEqual(done.out.count("NOTICE: no MNIST"), 2)
        self.assertTrue(self.info(self.folder / "run")["result"]["notice"].startswith("NOTICE"))

    def test_mnist_insists(self) -> None:
        done = self.main(
            *self.SMALL, "--dataset", "mnist", "--data-dir", self.folder / "none", "--output", self.folder / "run"
        )
        self.assert_refused(done, "mnist could not be downloaded.*no route.*--dataset digits")
        self.assertEqual(done.out, "")

    def test_damaged_files_are_no_reason_to_draw(self) -> None:
        raw = write_fashion(self.folder / "data").parent
        raw.rename(raw.with_name("MNIST"))
        done = self.main(*self.AUTO, "--data-dir", self.folder / "data", "--output", self.folder / "run")
        self.assert_refused(done, "train-images-idx3-ubyte: damaged")

    def test_a_part_of_the_files_is_no_reason_to_draw(self) -> None:
        raw = write_fashion(self.folder / "data")
        (raw / "t10k-labels-idx1-ubyte").unlink()
        raw.parent.rename(raw.parent.with_name("MNIST"))
        done = self.main(*self.AUTO, "--data-dir", self.folder / "data", "--output", self.folder / "run")
        self.assertEqual((done.code, done.out), (2, ""))


class Resume(ScriptCase):
    def assert_same_run(self, resumed: Path, straight: Path) -> None:
        self.assertEqual((resumed / "metrics.jsonl").read_bytes(), (straight / "metrics.jsonl").read_bytes())
        self.assertEqual(differences(last_checkpoint(resumed), last_checkpoint(straight)), [])
        results = [self.info(run)["result"] for run in (resumed, straight)]
        for key in results[0].keys() - {"train_seconds", "total_seconds", "samples_per_second"}:
            self.assertEqual(results[0][key], results[1][key], key)

    def compare(self, steps: list[int], *options: Any) -> None:
        straight = self.small("straight", *options)
        for i, step in enumerate(steps):
            run = self.interrupted(f"run{i}", step, *options)
            self.assertNotIn("result", self.info(run))
            done = self.main("--resume", run)
            self.assertEqual(done.code, 0, done.err)
            self.assertIn("resumed from", done.out)
            self.assert_same_run(run, straight)

    def test_exact_with_tensors_accumulation_and_averages(self) -> None:
        self.compare(
            [2, 4, 5],
            "--model",
            "mlp",
            "--accumulate",
            2,
            "--ema",
            0.9,
            "--clip-norm",
            1,
            "--patience",
            3,
            "--label-smoothing",
            0.1,
        )

    def test_exact_with_mnistnet_and_saves_in_between(self) -> None:
        self.compare(
            [3], "--model", "mnistnet", "--limit-batches", 2, "--save-every", 2, "--keep", 1, "--schedule", "plateau"
        )

    def test_exact_with_a_folder_and_two_workers(self) -> None:
        write_images(self.folder / "images", 40)
        self.compare(
            [1, 3],
            "--dataset",
            "folder",
            "--data-dir",
            self.folder / "images",
            "--batch-size",
            8,
            "--model",
            "mlp",
            "--num-workers",
            2,
            "--accumulate",
            2,
            "--ema",
            0.9,
        )

    def test_twice_and_over_output(self) -> None:
        straight = self.small("straight", "--model", "mlp")
        run = self.interrupted("run", 3, "--model", "mlp")
        with self.killed_at(10):
            self.assertEqual(self.main("--resume", "--output", run).code, 143)
        self.assertEqual(len(self.rows(run)), 1)
        self.assertEqual(self.main("--resume", "--output", run).code, 0)
        self.assert_same_run(run, straight)

    def test_metrics_lines_of_a_killed_run_are_put_right(self) -> None:
        straight = self.small("straight")
        run = self.interrupted("run", 9)
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"epoch": 2, "of": "a future that did not come"}\n{"torn')
        self.assertEqual(self.main("--resume", run).code, 0)
        self.assert_same_run(run, straight)
        (run / "metrics.jsonl").write_text("")  # also when nothing is left to train
        self.assertEqual(self.main("--resume", run).code, 0)
        self.assert_same_run(run, straight)

    def test_a_changed_course_is_refused(self) -> None:
        run = self.interrupted("run", 9)
        before = {
            path.name: path.read_bytes()
            for path in run.rglob("*")
            if path.is_file() and path.suffix in (".pt", ".jsonl")
        }
        for option, value in (
            ("--lr", 0.5),
            ("--batch-size", 16),
            ("--seed", 1),
            ("--epochs", 3),
            ("--model", "mlp"),
            ("--ema", 0.9),
            ("--dataset", "fashion-mnist"),
            ("--accumulate", 2),
            ("--precision", "fp16"),
        ):
            self.assert_refused(self.main("--resume", run, option, value), f"{option} {value} differs")
        self.assert_refused(self.main("--resume", run, "--no-augment"), "--augment False differs")
        self.assertEqual(
            {
                path.name: path.read_bytes()
                for path in run.rglob("*")
                if path.is_file() and path.suffix in (".pt", ".jsonl")
            },
            before,
        )
        self.assertEqual(
            self.main("--resume", run, "--lr", 0.003, "--keep", 1, "--quiet").code, 0
        )  # the same, and free ones

    def test_a_finished_run_trains_nothing(self) -> None:
        run = self.small("run")
        before = {path.name: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()}
        metrics, result = (run / "metrics.jsonl").read_bytes(), self.info(run)["result"]
        done = self.main("--resume", run)
        self.assertEqual(done.code, 0, done.err)
        self.assertEqual({path.name: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()}, before)
        self.assertEqual((run / "metrics.jsonl").read_bytes(), metrics)
        again = self.info(run)["result"]
        self.assertEqual({**again, "total_seconds": 0}, {**result, "total_seconds": 0})
        self.assertGreater(again["total_seconds"], result["total_seconds"])  # of both sessions
        self.assertIn("all 2 epochs are done already", done.out)

    def test_more_patience_goes_on(self) -> None:
        options = ("--min-delta", 100, "--epochs", 6)
        straight = self.small("straight", "--patience", 3, *options)
        run = self.small("run", "--patience", 1, *options)
        self.assertEqual((len(self.rows(run)), len(self.rows(straight))), (2, 4))
        self.assertEqual(self.main("--resume", run, "--patience", 3).code, 0)
        self.assert_same_run(run, straight)

    def test_damaged_newest_checkpoint(self) -> None:
        straight = self.small("straight")
        run = self.interrupted("run", 9)
        (run / "checkpoints" / "step-00000009.pt").write_bytes(b"nonsense")
        done = self.main("--resume", run)
        self.assertEqual(done.code, 0)
        self.assertRegex(done.err, r"^warning: .*step-00000009.pt.*going on from step-00000007.pt\n$")
        self.assert_same_run(run, straight)

    def test_what_cannot_be_resumed(self) -> None:
        self.assert_refused(self.main("--resume"), "--resume DIR")
        self.assert_refused(self.main("--resume", self.folder / "none"), "nothing to resume")
        self.assert_refused(self.main("--resume", self.folder, "--output", self.folder / "other"), "differ")
        self.assert_refused(self.main("--resume", self.folder, "--overwrite"), "cannot go with")
        run = self.interrupted("run", 3)
        for path in (run / "checkpoints").glob("step-*.pt"):
            path.write_bytes(b"nonsense")
        self.assert_refused(self.main("--resume", run), "damaged")
        other = self.interrupted("other", 3, "--model", "mlp")
        shutil.rmtree(run / "checkpoints")
        shutil.copytree(other / "checkpoints", run / "checkpoints")
        self.assert_refused(self.main("--resume", run), "model is 'mlp' there, 'simplenet' here")
        shutil.rmtree(run / "checkpoints")
        write_fashion(self.folder / "data")
        with self.killed_at(3):
            foreign = self.folder / "foreign"
            self.main(
                *self.SMALL, "--dataset", "fashion-mnist", "--data-dir", self.folder / "data", "--output", foreign
            )
        shutil.copytree(foreign / "checkpoints", run / "checkpoints")
        self.assert_refused(self.main("--resume", run), "of another run: classes is")
        (run / "run.json").write_text("{")
        self.assert_refused(self.main("--resume", run), "run.json")

    def test_interrupted_before_the_first_save(self) -> None:
        straight = self.small("straight")
        run = self.interrupted("run", 3)
        shutil.rmtree(run / "checkpoints")
        done = self.main("--resume", run)
        self.assertIn("starting at step 0", done.out)
        self.assert_same_run(run, straight)

    def test_another_ctrl_c_while_the_first_is_told(self) -> None:
        stop = script.tb.Interrupted(signal.SIGINT, Path("run/checkpoints/step-00000003.pt"))
        with (
            mock.patch.object(script, "train", side_effect=stop),
            mock.patch.object(script.options, "printable", side_effect=KeyboardInterrupt),
        ):
            done = self.main("--dataset", "digits")
        self.assertEqual((done.code, done.err), (130, "\ninterrupted; what was saved stays\n"))

    def test_an_interruption_is_told_without_obeying_its_path(self) -> None:
        stop = script.tb.Interrupted(signal.SIGTERM, Path("a\x1b[2J/checkpoints/step-00000003.pt"))
        with mock.patch.object(script, "train", side_effect=stop):
            done = self.main("--dataset", "digits")
        self.assertEqual(done.code, 143)
        self.assertRegex(done.err, r"^\ninterrupted: SIGTERM: saved a\\x1b.*; continue with --resume a\\x1b\[2J\n$")


class BadInput(ScriptCase):
    def refused(self, pattern: str, *argv: Any, code: int = 2) -> None:
        with self.subTest(argv):
            done = self.main(*self.SMALL, "--output", self.folder / "new", *argv)
            self.assert_refused(done, pattern, code)
            self.assertEqual(list((self.folder / "new").glob("checkpoints/*")), [])

    def test_more_warm_up_than_epochs(self) -> None:
        self.refused("--warmup-epochs 2.5 are more than --epochs 2", "--epochs", 2, "--warmup-epochs", 2.5)

    def test_values(self) -> None:
        for option, value in (
            ("--model", "vgg"),
            ("--dataset", "cifar"),
            ("--optimizer", "lion"),
            ("--schedule", "sawtooth"),
            ("--precision", "fp8"),
            ("--nan-policy", "hope"),
            ("--compile", "fastest"),
            ("--epochs", 0),
            ("--epochs", -1),
            ("--epochs", 1.5),
            ("--epochs", "9" * 400),
            ("--batch-size", 0),
            ("--batch-size", -8),
            ("--val-size", 0),
            ("--val-size", -1),
            ("--num-workers", -1),
            ("--image-size", 0),
            ("--lr", "nan"),
            ("--lr", "inf"),
            ("--lr", 0),
            ("--lr", -1),
            ("--lr", "fast"),
            ("--weight-decay", -1),
            ("--dropout", 1),
            ("--dropout", -0.1),
            ("--label-smoothing", 1),
            ("--clip-norm", 0),
            ("--clip-value", "nan"),
            ("--accumulate", 0),
            ("--ema", 1),
            ("--patience", -1),
            ("--min-delta", "nan"),
            ("--warmup-epochs", -1),
            ("--save-every", 0),
            ("--keep", 0),
            ("--limit-batches", 0),
            ("--seed", -1),
            ("--seed", 2**32),
        ):
            self.refused(f"{option}: ", option, value)
        self.refused("device 'abacus'", "--device", "abacus")
        self.refused("device 'cuda:99'", "--device", "cuda:99")
        self.refused("--unheard-of", "--unheard-of")
        self.assertFalse((self.folder / "new" / "run.json").exists())

    def test_values_that_do_not_fit_together(self) -> None:
        self.refused("--batch-size 201 is larger than the 200 training", "--batch-size", 201)
        self.refused("val_size must lie between 1 and 239", "--val-size", 240)
        self.refused("warm-up|warmup", "--warmup-epochs", 5)
        self.refused("plateau", "--warmup-epochs", 1, "--schedule", "plateau")

    def test_data_files(self) -> None:
        def change(name: str, new: Callable[[bytes], bytes], pattern: str) -> None:
            data = self.folder / "data"
            shutil.rmtree(data, ignore_errors=True)
            raw = write_fashion(data)
            (raw / name).write_bytes(new((raw / name).read_bytes()))
            self.refused(re.escape(str(raw / name)) + ".*" + pattern, "--dataset", "fashion-mnist", "--data-dir", data)

        images, labels = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
        change(images, lambda b: b[:-100], "damaged")
        change(images, lambda b: b[:7], "header")
        change(images, lambda b: b"\x89PNG" + b[4:], "magic number")
        change(images, lambda b: struct.pack(">4I", 0x0803, 240, 14, 56) + b[16:], "14×56, expected 28×28")
        change(labels, lambda b: b[:20] + b"\x0b" + b[21:], "label 11 at index 12, expected 0 to 9")
        change(labels, lambda b: struct.pack(">2I", 0x0801, 239) + b[9:], "239 labels for 240 images")
        change("t10k-images-idx3-ubyte", lambda b: b + b"!", "damaged")
        shutil.rmtree(self.folder / "data")
        raw = write_fashion(self.folder / "data")
        (raw / labels).unlink()
        self.refused("could not be downloaded", "--dataset", "fashion-mnist", "--data-dir", self.folder / "data")

    def test_folders(self) -> None:
        folder = ("--dataset", "folder", "--batch-size", 8, "--data-dir")
        self.refused("none: cannot be read as a folder", *folder, self.folder / "none")
        (self.folder / "file").write_text("")
        self.refused("file: cannot be read", *folder, self.folder / "file")
        (self.folder / "empty").mkdir()
        self.refused("empty: no images", *folder, self.folder / "empty")
        write_images(self.folder / "images", 20)
        self.refused(
            "--batch-size 32 is larger", "--dataset", "folder", "--data-dir", self.folder / "images", "--batch-size", 32
        )
        self.refused(
            "divisible by 4|image_size", *folder, self.folder / "images", "--model", "mnistnet", "--image-size", 30
        )
        small = ("--model", "smallvgg", "--image-size", 16)
        self.refused("image_size to be at least 24.*mnistnet", *folder, self.folder / "images", *small)
        write_images(self.folder / "parts" / "train", 20)
        write_images(self.folder / "parts" / "val", 20, classes=3)
        self.refused("different classes", *folder, self.folder / "parts")
        with mock.patch(
            "torchbasics.data.download_mnist", mnist.download_mnist
        ):  # the real one, which gets no further than the folder
            self.refused("file: cannot be written", "--dataset", "mnist", "--data-dir", self.folder / "file")

    def test_an_unreadable_image_is_named(self) -> None:
        write_images(self.folder / "images", 40)
        bad = self.folder / "images" / "class1" / "007.png"
        bad.write_bytes(bad.read_bytes()[:50])
        for workers in (0, 2):
            shutil.rmtree(self.folder / "new", ignore_errors=True)
            done = self.main(
                *self.SMALL,
                "--output",
                self.folder / "new",
                "--dataset",
                "folder",
                "--data-dir",
                self.folder / "images",
                "--batch-size",
                8,
                "--num-workers",
                workers,
            )
            self.assertIn(done.code, (1, 2))
            self.assert_refused(done, f"^error: {re.escape(str(bad))}: not a readable image", done.code)

    def test_directories(self) -> None:
        run = self.small("new")
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        done = self.main(*self.SMALL, "--output", run)
        self.assert_refused(done, "earlier run.*--resume.*--overwrite")
        self.assertEqual({path: path.read_bytes() for path in run.rglob("*") if path.is_file()}, before)
        result = self.info(run)["result"]
        for wrong in (
            ("--batch-size", 201),
            ("--warmup-epochs", 9),
            ("--dataset", "mnist"),
        ):  # the new run cannot start: the old one stays
            self.assertEqual(self.main(*self.SMALL, "--output", run, "--overwrite", *wrong).code, 2)
        self.assertEqual({path: path.read_bytes() for path in run.rglob("*") if path.is_file()}, before)
        self.small("new", "--overwrite", "--epochs", 1)
        self.assertNotEqual(self.info(run)["result"], result)
        self.assertEqual(
            [path.name for path in sorted((run / "checkpoints").glob("*.pt"))], ["best.pt", "step-00000007.pt"]
        )
        (self.folder / "file").write_text("")
        self.assert_refused(self.main(*self.SMALL, "--output", self.folder / "file" / "run"), "cannot write there")

    @unittest.skipIf(os.name != "posix" or os.geteuid() == 0, "needs a user whom permissions bind")
    def test_read_only_directory(self) -> None:
        (self.folder / "locked").mkdir(mode=0o500)
        self.assert_refused(self.main(*self.SMALL, "--output", self.folder / "locked" / "run"), "cannot write there")

    def test_full_disk(self) -> None:
        """From the second checkpoint on: what is there before stays, and the run can be continued."""
        straight = self.small("straight")
        real, calls = os.fsync, []

        def fsync(descriptor: int) -> None:
            calls.append(descriptor)
            if os.path.exists(self.folder / "new" / "checkpoints" / "step-00000007.pt.json") and len(calls) > 14:
                raise OSError(28, "No space left on device")
            real(descriptor)

        with mock.patch("os.fsync", fsync):
            done = self.main(*self.SMALL, "--output", self.folder / "new")
        self.assert_refused(done, "No space left on device.*--resume", code=1)
        self.assertEqual(self.main("--resume", self.folder / "new").code, 0)
        self.assertEqual(
            (self.folder / "new" / "metrics.jsonl").read_bytes(), (straight / "metrics.jsonl").read_bytes()
        )
        self.assertEqual(differences(last_checkpoint(self.folder / "new"), last_checkpoint(straight)), [])

    def test_diverging_says_where(self) -> None:
        done = self.main(
            *self.SMALL, "--output", self.folder / "new", "--optimizer", "sgd", "--lr", "1e30", "--precision", "fp32"
        )
        self.assert_refused(done, r"the loss is (nan|inf) at epoch 1, batch \d.*lower the learning rate", code=1)
        self.assertNotIn("Traceback", done.err)

    def test_no_finite_validation_loss_at_all(self) -> None:
        done = self.main(
            *self.SMALL,
            "--output",
            self.folder / "new",
            "--optimizer",
            "sgd",
            "--lr",
            "1e30",
            "--precision",
            "fp32",
            "--nan-policy",
            "ignore",
        )
        self.assert_refused(done, "no epoch of 2 had a finite validation loss", code=1)

    def test_debug_shows_the_traceback(self) -> None:
        with self.assertRaisesRegex(ValueError, "larger than"):
            self.main(*self.SMALL, "--output", self.folder / "new", "--batch-size", 201, "--debug")


class Help(ScriptCase):
    def test_every_option_says_its_default(self) -> None:
        parser = script.make_parser()
        for action in parser._actions:
            if action.dest in ("help", "version"):
                continue
            with self.subTest(action.option_strings):
                self.assertRegex(action.help, r"\(default: .+\)")
                default = action.default
                said = re.search(r"\(default: ([^,;)]+)", action.help)[1]
                if isinstance(default, (int, float)) and not isinstance(default, bool):
                    self.assertEqual(float(said), default)
                elif isinstance(default, str):
                    self.assertEqual(said, default)
                elif isinstance(default, bool):
                    self.assertEqual(said, "on" if default else "off")

    def test_defaults_of_the_issue(self) -> None:
        args = script.parse_args([])
        self.assertEqual(
            (
                args.epochs,
                args.batch_size,
                args.val_size,
                args.seed,
                args.dataset,
                args.data_dir,
                args.model,
                args.dropout,
                args.device,
                args.precision,
                args.augment,
                args.save_every,
            ),
            (15, 128, 5000, 42, "auto", "./data", "smallvgg", 0.2, "auto", "auto", True, None),
        )

    def test_help_and_version_run(self) -> None:
        done = self.main("--help")
        self.assertEqual((done.code, done.err), (0, ""))
        for group in ("data:", "model:", "optimisation:", "precision and speed:", "stopping:", "run:"):
            self.assertIn(group, done.out)
        self.assertRegex(self.main("--version").out, r"^torchbasics \d")


class Copied(ScriptCase):
    """The script in a directory of its own beside the package folder, run from elsewhere, as a killed process."""

    def test_killed_and_resumed(self) -> None:
        home, elsewhere, data = (self.folder / name for name in ("home", "elsewhere", "data"))
        home.mkdir(), elsewhere.mkdir()
        shutil.copy(SCRIPT, home)
        shutil.copytree(ROOT / "torchbasics", home / "torchbasics", ignore=shutil.ignore_patterns("__pycache__"))
        write_fashion(data, {"train": 2000, "t10k": 80})
        options = [
            "--dataset",
            "fashion-mnist",
            "--data-dir",
            str(data),
            "--model",
            "mlp",
            "--epochs",
            "2",
            "--val-size",
            "200",
            "--batch-size",
            "16",
            "--precision",
            "fp32",
            "--save-every",
            "2",
            "--accumulate",
            "2",
            "--ema",
            "0.9",
        ]
        command = [sys.executable, str(home / "train_mnist.py")]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "OMP_NUM_THREADS": "1"
        }
        run = elsewhere / "run"
        process = subprocess.Popen(
            [*command, *options, "--output", "run"],
            cwd=elsewhere,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            deadline = time.monotonic() + 60
            while (
                not (run / "checkpoints" / "step-00000004.pt").exists()
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.01)
            process.terminate()
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        self.assertEqual(process.returncode, 143, err)
        self.assertIn("SIGTERM: saved", err)
        state = last_checkpoint(run)
        self.assertTrue(0 < state["batch"] < 113 or state["epoch"] == 1, "it was to be killed in mid-epoch")
        self.assertEqual(self.info(run)["command"].split()[0], str(home / "train_mnist.py"))

        done = subprocess.run(
            [*command, "--resume", "run"], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        straight = self.main(*options, "--output", self.folder / "straight")
        self.assertEqual(straight.code, 0, straight.err)
        self.assert_same_files(run, self.folder / "straight")

    @unittest.skipUnless(hasattr(os, "killpg"), "needs process groups")
    def test_a_signal_to_the_whole_group_ends_the_workers_but_not_the_save(self) -> None:
        write_images(self.folder / "images", 80)
        options = ["--dataset", "folder", "--data-dir", str(self.folder / "images"), "--model", "mlp", "--epochs", "8"]
        options += ["--batch-size", "4", "--num-workers", "2", "--save-every", "3", "--accumulate", "2", "--ema", "0.9"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = self.folder / "run"
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *options, "--output", str(run)],
            env=environment,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            deadline = time.monotonic() + 60
            first = run / "checkpoints" / "step-00000006.pt"
            while not first.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGTERM)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        self.assertEqual(process.returncode, 143, err)
        self.assertIn("SIGTERM: saved", err)
        self.assertEqual(self.main("--resume", run).code, 0)
        self.assertEqual(self.main(*options, "--output", self.folder / "straight").code, 0)
        self.assert_same_files(run, self.folder / "straight")

    def assert_same_files(self, run: Path, straight: Path) -> None:
        self.assertEqual((run / "metrics.jsonl").read_bytes(), (straight / "metrics.jsonl").read_bytes())
        found, expected = last_checkpoint(run), last_checkpoint(straight)
        for state in (found, expected):  # NumPy's state is there only if something loaded NumPy in that process
            for part in (state["random_state"], state["position"]["epoch_start"]):
                part.pop("numpy", None)
        self.assertEqual(differences(found, expected), [])


class WhatAReviewFound(ScriptCase):
    def test_a_run_whose_checkpoints_are_gone_does_not_start_over(self) -> None:
        run = self.small("run")
        for path in (run / "checkpoints").glob("step-*"):
            path.unlink()
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.json"}
        self.assert_refused(self.main("--resume", run), "its checkpoints are gone")
        self.assertEqual(before, {path: path.read_bytes() for path in before})

    def test_a_run_killed_before_its_first_save_may_start_again(self) -> None:
        run = self.small("run")
        shutil.rmtree(run / "checkpoints")
        (run / "metrics.jsonl").write_bytes(b"")
        done = self.main("--resume", run)
        self.assertEqual(done.code, 0, done.err)
        self.assertIn("nothing was saved before the interruption: starting at step 0", done.out)

    def test_a_broken_torchvision_costs_the_picture_only(self) -> None:
        broken = ImportError("torchvision does not work with torch 2.15")
        with mock.patch.object(script, "import_torchvision", side_effect=broken):
            done = self.main(*self.SMALL, "--output", self.folder / "run")
        self.assertEqual(done.code, 0, done.err)
        self.assertRegex(done.err, r"^warning: .*mistakes.png was not drawn: torchvision does not work")
        self.assertIn("test_accuracy", self.info(self.folder / "run")["result"])
        self.assertFalse((self.folder / "run" / "mistakes.png").exists())

    def test_val_size_of_a_folder(self) -> None:
        write_images(self.folder / "images", 40)
        common = (
            "--dataset",
            "folder",
            "--data-dir",
            self.folder / "images",
            "--model",
            "simplenet",
            "--batch-size",
            8,
            "--epochs",
            1,
        )
        for name, options, held_out in (("tenth", (), 4), ("own", ("--val-size", 10), 10)):
            done = self.main(*common, *options, "--output", self.folder / name)
            self.assertEqual(done.code, 0, done.err)
            self.assertIn(f"{40 - held_out} training, {held_out} validation", done.out)
            self.assertEqual("--val-size 5000 is too much of 40 images: a tenth" in done.out, name == "tenth")

    def test_time_and_images_of_an_interrupted_epoch_count(self) -> None:
        run = self.interrupted("run", 3)
        [session] = self.info(run)["sessions"]
        self.assertEqual(session["samples"], 3 * 32)
        self.assertGreater(session["train_seconds"], 0)
        self.assertEqual(self.main("--resume", run).code, 0)
        info = self.info(run)
        self.assertEqual(sum(session["samples"] for session in info["sessions"]), 2 * 200)
        self.assertNotIn("--resume", info["command"])

    def test_the_directory_bears_the_name_of_what_was_trained_on(self) -> None:
        before = os.getcwd()
        os.chdir(self.folder)
        self.addCleanup(os.chdir, before)
        options = ("--model", "simplenet", "--epochs", 1, "--val-size", 40, "--data-dir", self.folder / "none")
        done = self.main(*options)
        self.assertEqual(done.code, 0, done.err)
        [run] = (self.folder / "runs").iterdir()
        self.assertTrue(run.name.startswith("digits-"), run)


if __name__ == "__main__":
    unittest.main()
