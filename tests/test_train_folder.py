"""scripts/train_folder.py: what it makes of a folder, that it resumes exactly, and what it reports and refuses."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import unittest
import urllib.error
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import datasets, models
from torchvision.transforms import v2

import torchbasics as tb
from torchbasics.checkpoint import weights_hash

from . import test_train_mnist as single
from .common import load_script, run_main

script = load_script("train_folder")
SMALL = ("--model", "fastnet", "--image-size", "16", "--epochs", "2", "--batch-size", "8", "--threads", "1",
         "--device", "cpu", "--precision", "fp32", "--workers", "0")  # fmt: skip
TUNED = ("--model", "shufflenet_v2_x0_5", *SMALL[2:])
COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}
root = ""


def setUpModule() -> None:
    """Make the folder `photos`: three classes of 14 images, each of one colour with noise. Tests work on copies."""
    global root
    unittest.addModuleCleanup(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)
    root = tempfile.mkdtemp()
    unittest.addModuleCleanup(shutil.rmtree, root)
    for i, (name, colour) in enumerate(COLOURS.items()):
        for j in range(14):
            write(Path(root, "photos", name, f"{j:02}.png"), noisy(colour, 100 * i + j))


def noisy(colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (20, 24)) -> Image.Image:
    noise = torch.randint(-40, 41, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((torch.tensor(colour) + noise).clamp(0, 255).byte().numpy())


def write(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def call(*argv: Any) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of the script, run in this process."""
    return single.call(*argv, main=script.main)


def after_step(step: int, action: Any) -> Any:
    """Call `action()` after that step of the runs in this `with` block, which gives the list of their trainers."""
    return single.watched(lambda trainer: action() if trainer.step == step else None)


def info_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


class FolderCase(unittest.TestCase):
    """Tests that run in a directory of their own, `folder`, with a copy of `photos`."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=root)).resolve()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        shutil.copytree(Path(root, "photos"), "photos")

    def run_small(self, name: str, *more: Any) -> Path:
        code, _, err = call("photos", *SMALL, "--output", self.folder / name, *more)
        self.assertEqual((code, err), (0, ""))
        return self.folder / name

    def refused(self, *argv: Any, text: str, code: int = 2) -> str:
        """Check that the script ends with `code` and one line that holds `text`; return that line."""
        found, _, err = call(*argv)
        self.assertEqual(found, code, (argv, err))
        self.assertRegex(err, r"^error: [^\n]+\n$", argv)
        self.assertIn(text, err)
        return err

    def notes(self, *more: Any, folder: str = "photos") -> str:
        """Return what the script says about the images before it would train."""
        return script.make_datasets(script.parse_args([folder, *SMALL, *map(str, more)]))[2]

    def assert_same_run(self, one: Path, other: Path) -> None:
        self.assertEqual((one / "metrics.jsonl").read_text(), (other / "metrics.jsonl").read_text())
        best = [tb.load_checkpoint(run / "checkpoints" / "best.pt")["model_state_dict"] for run in (one, other)]
        self.assertEqual(weights_hash(best[0]), weights_hash(best[1]))
        results = [info_of(run)["result"] for run in (one, other)]
        self.assertEqual(*[{k: v for k, v in result.items() if not k.endswith("seconds")} for result in results])


class Run(FolderCase):
    def test_a_run_learns_and_its_judgement_is_that_of_plain_pytorch_on_the_test_folder(self) -> None:
        for i, path in enumerate(sorted(Path("photos").rglob("*.png"))):
            part = ("test", "val", "train", "train")[i % 4] if path.parent.name != "red" else ("test", "train")[i % 2]
            target = Path("parts", part, path.parent.name, path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        write(Path("parts/val/red/x.png"), noisy(COLOURS["red"], 999))
        code, out, err = call("parts", *SMALL, "--epochs", 4, "--output", "run")
        self.assertEqual((code, err), (0, ""))
        result = info_of(Path("run"))["result"]

        state = tb.load_checkpoint("run/checkpoints/best.pt")
        facts = state["metadata"]
        steps = [v2.Resize(round(16 / 0.875)), v2.CenterCrop(16), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        oracle = datasets.ImageFolder("parts/test", v2.Compose([*steps, v2.Normalize(facts["mean"], facts["std"])]))
        model = tb.make_model(facts).eval()
        model.load_state_dict(state["model_state_dict"])
        targets = torch.tensor(oracle.targets)
        with torch.no_grad():
            outputs = model(torch.stack([image for image, _ in oracle]))
        right = outputs.argmax(1) == targets
        self.assertEqual((list(facts["classes"]), result["test_samples"]), (oracle.classes, len(oracle)))
        self.assertAlmostEqual(result["test_accuracy"], right.float().mean().item(), places=6)
        recalls = [right[targets == i].float().mean().item() for i in range(3)]
        self.assertAlmostEqual(result["test_balanced_accuracy"], sum(recalls) / 3, places=6)
        self.assertAlmostEqual(result["test_loss"], F.cross_entropy(outputs, targets).item(), places=4)
        self.assertGreater(result["test_accuracy"], 0.6)
        self.assertIn(f"test {result['test_accuracy']:.2%}", out)
        self.assertRegex(out, r"predict:  python \S*predict.py --checkpoint run/checkpoints/best.pt photo.jpg\n")
        self.assertNotIn("note: split off", out)

    def test_what_is_missing_is_split_off_each_class_alike_the_same_for_the_same_seed_copies_together(self) -> None:
        for i in range(14):
            shutil.copy(f"photos/red/{i:02}.png", f"photos/red/copy{i:02}.png")
        parsed = [script.parse_args(["photos", *SMALL, "--seed", str(seed)]) for seed in (1, 1, 2)]
        (train, val, test), _, notice = script.make_datasets(parsed[0])
        self.assertIn("split off, of 56 images:", notice)
        self.assertIn(f"{len(val)} for val and {len(test)} for test", notice)
        paths = [{photo.path for photo in part.photos} for part in (train, val, test)]
        self.assertEqual(len(set.union(*paths)), sum(map(len, paths)))
        for part in (val, test):
            self.assertTrue(all(1 <= part.targets.count(target) <= 4 for target in range(3)), part.targets)
        for part in paths:
            names = {Path(path).name for path in part if "red" in path}
            self.assertEqual({name for name in names if "copy" in name}, {"copy" + n for n in names if "copy" not in n})
        again, other = ([p.path for p in script.make_datasets(args)[0][2].photos] for args in parsed[1:])
        self.assertEqual(again, [photo.path for photo in test.photos])
        self.assertNotEqual(again, other)

    def test_each_class_keeps_a_training_image_when_val_and_test_are_split_off(self) -> None:
        photos = [script.Photo(f"{label}/{i}", "train", label, f"{label}{i}")
                  for label, number in (("blue", 13), ("rare", 1), ("z", 20)) for i in range(number)]  # fmt: skip
        photos.append(script.Photo("copy/0", "train", "copy", "z0"))
        for seed in range(20):
            split = script.split_off(photos, ["val", "test"], seed)
            self.assertEqual({photo.label for photo in split if photo.part == "train"}, {"blue", "rare", "z", "copy"})
            self.assertEqual({photo.part for photo in split}, {"train", "val", "test"})

    def test_the_number_of_workers_changes_nothing_and_the_random_changes_depend_on_the_epoch(self) -> None:
        one, two = self.run_small("a"), self.run_small("b", "--workers", 2)
        self.assert_same_run(one, two)
        train = script.make_datasets(script.parse_args(["photos", *SMALL]))[0][0]
        before = torch.get_rng_state()
        first, again = train[3][0], train[3][0]
        torch.testing.assert_close(first, again, rtol=0, atol=0)
        self.assertTrue(torch.equal(torch.get_rng_state(), before))
        train.set_epoch(1)
        self.assertFalse(torch.equal(train[3][0], first))
        with mock.patch.dict(sys.modules, {script.__name__: script}):  # other tests load it under the same name
            copy = pickle.loads(pickle.dumps(train))  # as a worker that is not forked gets it
        torch.testing.assert_close(copy[3], train[3], rtol=0, atol=0)

    def test_it_is_colour_if_any_image_is_and_grey_only_if_the_model_takes_it(self) -> None:
        for path in sorted(Path("photos").rglob("*.png"))[:-1]:
            Image.open(path).convert("L").save(path)
        for model, last, channels in (("fastnet", "RGB", 3), ("fastnet", "L", 1), ("resnet18", "L", 3)):
            path = Path("photos/red/13.png")
            Image.open(path).convert(last).save(path)
            (train, _, _), facts, _ = script.make_datasets(script.parse_args(["photos", *SMALL, "--model", model]))
            self.assertEqual((facts["in_channels"], len(facts["mean"]), len(facts["std"])), (channels,) * 3)
            self.assertEqual(train[0][0].shape, (channels, 16, 16))

    def test_top5_is_counted_where_there_are_more_than_ten_classes(self) -> None:
        for i in range(8):
            for j in range(3):
                write(Path(f"photos/extra{i}/{j}.png"), noisy((30 * i, 0, 90), 1000 + 10 * i + j))
        code, out, err = call("photos", *SMALL, "--output", "a")
        self.assertEqual((code, err), (0, ""))
        result = info_of(Path("a"))["result"]
        lines = [line for line in out.splitlines() if line.startswith(("test ", "mean over classes ", "by class: "))]
        self.assertEqual(len(lines), 3, out)
        self.assertRegex(lines[0], r"^test \S+%, \S+% in the first five \(loss \S+\)$")
        self.assertLessEqual(max(map(len, lines)), 60)
        row = json.loads(Path("a/metrics.jsonl").read_text().splitlines()[0])
        self.assertLessEqual(row["val_acc"], row["val_top5"])
        self.assertLessEqual(result["test_accuracy"], result["test_top5"])
        scores = torch.tensor([[0.0, 1, 2, 3, 4, 5], [0.0, 1, 2, 3, 4, 5]])
        self.assertEqual(script.top5(scores, torch.tensor([0, 1])).tolist(), [0, 1])

    def test_balance_weights_each_class_by_the_inverse_of_its_size(self) -> None:
        class Few:
            classes, targets = "abc", [0, 0, 0, 0, 0, 1, 2, 2]

            def __len__(self) -> int:
                return 8

        args = script.parse_args(["photos", "--balance"])
        weight = script.make_criterion(args, Few()).weight
        torch.testing.assert_close(weight, torch.tensor([8 / 15, 8 / 3, 8 / 6]))
        self.assertIsNone(script.make_criterion(script.parse_args(["photos"]), Few()).weight)
        with after_step(1, lambda: None) as trainers:
            self.run_small("a", "--balance")
        self.assertEqual(trainers[0].criterion.weight.shape, (3,))


class Tuning(FolderCase):
    """Pretrained and frozen models, with weights that are saved here as if they had been downloaded."""

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(torch.hub.set_dir, torch.hub.get_dir())
        torch.hub.set_dir(str(self.folder / "hub"))
        self.weights = models.get_model_weights("shufflenet_v2_x0_5").DEFAULT
        torch.manual_seed(5)
        self.downloaded = models.get_model("shufflenet_v2_x0_5").state_dict()

    def train(self, *more: Any) -> tuple[tb.Trainer, dict[str, Any], str]:
        """Train from the pretrained weights; return the trainer, its last weights, and what was printed."""
        file = Path(torch.hub.get_dir(), "checkpoints", Path(self.weights.url).name)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.downloaded, file)
        with after_step(1, lambda: None) as trainers:
            code, out, err = call("photos", *TUNED, "--pretrained", "--epochs", 1, *more)
        self.assertEqual((code, err), (0, ""))
        return trainers[0], trainers[0].model.state_dict(), out

    def test_frozen_only_the_last_layer_changes_not_even_statistics_of_batchnorm(self) -> None:
        _, after, out = self.train("--freeze", "--output", "a")
        body = [name for name in after if not name.startswith("fc.")]
        self.assertEqual([name for name in body if not torch.equal(after[name], self.downloaded[name])], [])
        self.assertEqual(len(body), len(after) - 2)
        self.assertIn(f" {1024 * 3 + 3:,} trained parameters", out)
        with after_step(1, lambda: None) as trainers:
            self.assertEqual(call("--resume", "a")[0], 0)
        self.assertEqual(trainers[0].model.stage2[0].branch1[1].training, False)

    def test_not_frozen_all_changes_and_the_last_layer_has_the_higher_rate(self) -> None:
        trainer, after, _ = self.train("--lr", 0.01)
        body = [name for name in after if not name.startswith("fc.")]
        self.assertEqual([name for name in body if torch.equal(after[name], self.downloaded[name])], [])
        rates = {
            name: group["max_lr"]  # the top of the schedule
            for group in trainer.optimizer.param_groups
            for name, parameter in trainer.model.named_parameters()
            if any(parameter is one for one in group["params"])
        }
        self.assertEqual(rates.keys(), dict(trainer.model.named_parameters()).keys())
        for name, rate in rates.items():
            self.assertAlmostEqual(rate, 0.01 if name.startswith("fc.") else 0.001, msg=name)

    def test_without_a_network_it_says_what_to_download_and_where_to_put_it(self) -> None:
        with mock.patch("torch.hub.download_url_to_file", side_effect=urllib.error.URLError("no route to host")):
            code, _, err = call("photos", *TUNED, "--pretrained")
        *before, line = err.splitlines()
        self.assertEqual((code, line[:7]), (1, "error: "))
        self.assertTrue(all(text.startswith("Downloading: ") for text in before), err)  # torch.hub announces it
        for text in ("no route to host", self.weights.url, f"{self.folder}/hub/checkpoints"):
            self.assertIn(text, line)
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["hub", "photos"])

    def test_only_missing_weights_are_called_missing_weights(self) -> None:
        for options, problem, expected in (
            ((), "broken", (2, "for images (2, 3, 16, 16): broken")),
            (("--pretrained",), "CUDA out of memory", (1, "out of memory")),
        ):
            with mock.patch.object(models, "get_model", side_effect=RuntimeError(problem)):
                code, line = expected
                self.assertNotIn("--pretrained", self.refused("photos", *TUNED, *options, text=line, code=code))

    def test_pretrained_models_see_images_as_their_weights_want_them(self) -> None:
        args = script.parse_args(["photos", "--model", "efficientnet_b1", "--pretrained"])
        expected = {"image_size": 240, "resize": 255, "interpolation": "bilinear", "mean": (0.485, 0.456, 0.406)}
        self.assertLessEqual(expected.items(), script.image_facts(args, True).items())
        args.image_size = 120
        facts = script.image_facts(args, True)
        self.assertEqual((facts["image_size"], facts["resize"]), (120, 128))
        args = script.parse_args(["photos", "--model", "efficientnet_v2_m", "--pretrained"])
        preset = models.EfficientNet_V2_M_Weights.DEFAULT.transforms()
        facts = {**script.image_facts(args, True), "image_size": 480}
        image = noisy((100, 150, 200), 1, (600, 500))
        middle = script.make_transform(facts, augment=False)
        torch.testing.assert_close(middle(image).as_subclass(torch.Tensor), preset(image), rtol=0, atol=1e-5)

    def test_the_last_layer_is_found_in_models_of_every_family(self) -> None:
        for name in ("squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0", "mnasnet0_5",
                     "maxvit_t"):  # fmt: skip
            args = script.parse_args(["photos", "--model", name])
            with torch.device("meta"):  # shapes only
                model = script.create_model(args, {"num_classes": 7})
                expected = models.get_model(name, weights=None, num_classes=7)  # as export.py builds it
            shapes = [{n: v.shape for n, v in one.state_dict().items()} for one in (model, expected)]
            self.assertEqual(*shapes)

    def test_init_from_starts_with_the_weights_that_fit_and_freeze_keeps_them(self) -> None:
        best = self.run_small("a") / "checkpoints" / "best.pt"
        shutil.rmtree("photos/red")
        with after_step(1, lambda: None) as trainers:
            code, out, err = call("photos", *SMALL, "--init-from", best, "--freeze")
        self.assertEqual((code, err), (0, ""))
        weights = tb.load_checkpoint(best)["model_state_dict"]
        self.assertIn(f"initial weights from {best}; left as they were: classifier.3.weight, classifier.3.bias\n", out)
        after = trainers[0].model.state_dict()
        changed = [name for name, value in after.items() if value.shape != weights[name].shape
                   or not torch.equal(value, weights[name])]  # fmt: skip
        self.assertEqual(changed, ["classifier.3.weight", "classifier.3.bias"])
        argv = ("photos", *SMALL, "--model", "cnn", "--init-from", best, "--freeze")
        self.refused(*argv, text=f"--freeze: {best} has no weights for ")


class Resume(FolderCase):
    def test_a_run_stopped_amid_an_epoch_with_workers_ends_as_if_never_stopped(self) -> None:
        options = ("--workers", 2, "--balance")
        straight = self.run_small("straight", *options)
        page = (straight / "report.html").read_text(encoding="utf-8")
        self.assertIn("--balance", page)
        self.assertNotIn("fingerprint", page)  # no option of the script
        self.assertNotIn("--folder", page)
        self.assertEqual(list(info_of(straight)["versions"]), ["python", "torch", "torchvision", "torchbasics"])
        with after_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            code, _, err = call("photos", *SMALL, *options, "--output", "a")
        self.assertEqual(code, 128 + signal.SIGTERM, err)
        self.assertRegex(err, r"^SIGTERM: saved a/checkpoints/step-00000002.pt; continue with: .* --resume a\n$")
        Path("photos").rename("moved")
        code, _, err = call("--resume", "a", "moved", "--workers", 1)
        self.assertEqual((code, err), (0, ""))
        self.assert_same_run(straight, Path("a"))

    def test_a_file_that_breaks_after_the_check_is_named_and_nothing_is_lost(self) -> None:
        straight = self.run_small("straight")
        files = {path: path.read_bytes() for path in Path("photos").rglob("*.png")}

        def damage() -> None:
            for path, content in files.items():
                path.write_bytes(content[:100])

        for workers in (0, 2):  # with 2 some batches are read ahead
            with after_step(1, damage):
                run = f"a{workers}"
                line = self.refused("photos", *SMALL, "--output", run, "--workers", workers, text="--resume", code=1)
            self.assertRegex(line, r"error: photos/\w+/\d\d.png: not a readable .*; all is saved: restore that file")
            found = tb.load_latest(f"{run}/checkpoints")
            assert found is not None
            self.assertIn(found[1]["step"], [1] if workers == 0 else range(1, 5))
            self.refused("--resume", run, text="training images of 0 classes")
            for path, content in files.items():
                path.write_bytes(content)
            self.assertEqual(call("--resume", run)[0], 0)
            self.assert_same_run(straight, Path(run))

    def test_a_run_is_resumed_with_the_same_images_and_options_only(self) -> None:
        run = self.run_small("a")
        for option in ("--batch-size 4", "--balance", "--model cnn", "--image-size 20", "--no-augment", "--freeze"):
            self.refused("--resume", run, *option.split(), text=option.split()[0].replace("no-", ""))
        self.refused("--resume", run, "--output", "b", text="--output")
        Path("photos/red/03.png").unlink()
        self.refused("--resume", run, text="its images are not those that the run began with")
        self.refused("--resume", "b", text="b: no checkpoint to resume from")


class Checks(FolderCase):
    def test_unreadable_files_are_left_out_and_named(self) -> None:
        whole = Path("photos/red/00.png").read_bytes()
        Path("photos/red/truncated.jpg").write_bytes(whole[:-300])
        Path("photos/red/empty.jpg").write_bytes(b"")
        Path("photos/blue/page.jpg").write_text("<html></html>")
        Path("photos/.DS_Store").write_bytes(b"not looked at")
        Path("photos/red/.hidden").write_bytes(b"not looked at")
        os.symlink("nowhere", "photos/red/nowhere.png")
        header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n"
        for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(b"\0"), b"IEND"):
            bomb += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        Path("photos/green/bomb.png").write_bytes(bomb)
        write(Path("photos/green/thread.png"), Image.new("L", (1, 30_000)))
        code, out, err = call("photos", *SMALL)
        self.assertEqual((code, err), (0, ""))
        self.assertIn("note: files that cannot be read and linked folders, which are left out: 6 "
                      "(photos/blue/page.jpg, photos/green/bomb.png, photos/green/thread.png, …)\n", out)  # fmt: skip
        self.assertIn("split off, of 42 images", out)

    def test_images_of_every_kind_are_used(self) -> None:
        shutil.rmtree("photos/red")
        image = noisy(COLOURS["red"], 1)
        for mode, name in (("CMYK", "a.jpg"), ("1", "b.png"), ("P", "c.gif"), ("RGBA", "d.webp"), ("F", "e.tif")):
            write(Path("photos/red", name), image.convert(mode))
        write(Path("photos/red/deep.png"), image.convert("L").convert("I").point(lambda v: v * 257).convert("I;16"))
        write(Path("photos/red/animated.gif"), image.convert("P"), save_all=True, append_images=[image.convert("P")])
        write(Path("photos/red/transparent.png"), image.convert("P"), transparency=bytes([0, 99]))
        exif = Image.Exif()
        exif[0x0112] = 6
        write(Path("photos/red/turned.jpg"), image, exif=exif)
        write(Path("photos/red/dot.png"), Image.new("RGB", (1, 1)))
        write(Path("photos/red/lies.png"), image).rename("photos/red/lies.jpg")
        name = "ю" * 120 + ".png"  # 244 bytes
        write(Path("photos/red/short.png"), image.rotate(90)).rename(Path("photos/red", name))
        code, out, err = call("photos", *SMALL)
        self.assertEqual((code, err), (0, ""))
        self.assertIn("split off, of 40 images", out)
        self.assertNotIn("cannot be read", out)

    def test_copies_are_counted_within_and_across_the_parts(self) -> None:
        for part in ("train", "val", "test"):
            shutil.copytree("photos", Path("parts", part))
            for i, path in enumerate(sorted(Path("parts", part).rglob("*.png"))):
                noisy((9, 9, 9), 7 * i + len(part) * 1000).save(path)
        self.assertNotIn(" twice", self.notes(folder="parts"))
        shutil.copy("parts/train/red/00.png", "parts/train/red/again.png")
        shutil.copy("parts/train/blue/05.png", "parts/test/blue/x.png")
        shutil.copy("parts/val/blue/05.png", "parts/val/green/y.png")
        notes = self.notes(folder="parts")
        self.assertIn("in the same part twice: 2 (parts/train/red/00.png = parts/train/red/again.png, "
                      "parts/val/blue/05.png = parts/val/green/y.png)", notes)  # fmt: skip
        self.assertIn("in more than one of train, val and test (they make the result look better): 1 "
                      "(parts/test/blue/x.png = parts/train/blue/05.png)", notes)  # fmt: skip

    def test_empty_tiny_and_unequal_classes_and_sizes_far_from_the_models_are_named(self) -> None:
        self.assertEqual(len(self.notes().splitlines()), 1)  # what was split off
        Path("photos/none").mkdir()
        os.symlink("red", "photos/linked")
        for path in sorted(Path("photos/blue").iterdir())[3:]:
            path.unlink()
        notes = self.notes()
        self.assertIn("linked folders, which are left out: 1 (photos/linked)", notes)
        self.assertNotIn("twice", notes)
        self.assertRegex(notes, r"fewer than 10 training images .*: 3 \(blue: [123], linked: 0, none: 0\)")
        self.assertRegex(notes, r"from [123] training images \(blue\) to 1\d \(\w+\); --balance weights")
        self.assertNotIn("--balance", self.notes("--balance"))
        self.assertIn("has 20 pixels, --image-size is 64: the model sees them enlarged", self.notes("--image-size", 64))
        for i, path in enumerate(Path("photos").rglob("*.png")):
            noisy((1, 1, 1), i, (150, 190)).save(path)
        self.assertIn("has 150 pixels, --image-size is 16: reading them takes long: shrink them once", self.notes())


class BadInput(FolderCase):
    def test_a_folder_that_cannot_be_trained_on_is_refused_in_one_line(self) -> None:
        Path("empty").mkdir()
        Path("flat").mkdir()
        shutil.copy("photos/red/00.png", "flat/00.png")
        Path("file").write_text("")
        write(Path("one/red/00.png"), noisy((1, 2, 3), 0))
        os.symlink(".", "one/loop")
        write(Path("two/red/00.png"), noisy((1, 2, 3), 0))
        write(Path("two/blue/00.png"), noisy((1, 2, 3), 1))
        shutil.copytree("photos", "parts/train")
        shutil.copytree("photos", "more/train")
        shutil.copytree("photos", "more/valid")
        write(Path("parts/val/yellow/00.png"), noisy((1, 2, 3), 0))
        for name, text in (
            ("absent", "absent: no such folder"), ("file", "file: no such folder"), ("x" * 300, "no such folder"),
            ("empty", "training images of 0 classes"), ("flat", "training images of 0 classes"),
            ("one", "training images of 1 classes, at least 2 are needed (as one/CLASS/*.jpg); left out: one/loop"),
            ("two", "too few to split off"), ("parts", "val or test without training images: yellow"),
            ("more", "more/valid/blue/00.png: its part is 'valid'; beside train there may be val and test only"),
        ):  # fmt: skip
            with self.subTest(name):
                self.refused(name, *SMALL, text=text)
        self.assertFalse(Path("runs").exists())

    def test_a_model_that_cannot_be_trained_is_refused_by_name(self) -> None:
        lines = "from torch import nn", "def wide(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 5))"
        greedy = "class Greedy(nn.Flatten): forward = lambda self, images: images.new_empty(10**15)"
        Path("mine_folder.py").write_text("\n".join((*lines, greedy)))
        self.addCleanup(sys.modules.pop, "mine_folder", None)
        self.addCleanup(sys.path.__setitem__, slice(None), list(sys.path))
        for name, text in (
            ("googlenet", "--model googlenet: no classifier with one output has that name"),
            ("inception_v3", "inception_v3: no classifier"), ("fasterrcnn_resnet50_fpn", "fpn: no classifier"),
            ("quantized_resnet18", "resnet18: no classifier"), ("resnt18", "or module:callable"), ("", "no classifier"),
            ("absent:make", "No module named 'absent'"), ("math:pi", "--model math:pi, --image-size 16: "),
            ("mine_folder:wide", "expected scores (2, 3) for images (2, 3, 16, 16): got (2, 5)"),
            ("squeezenet1_1", "--image-size 16: expected scores (2, 3) for images (2, 3, 16, 16): "),
            ("smallvgg", "--image-size 16: "), ("mnistnet --image-size 17", "--image-size 17: "),
            ("vit_b_16 --image-size 32", "Wrong image height"),
            ("fastnet --pretrained", "torchvision's models only"), ("fastnet --freeze", "--pretrained or --init-from"),
        ):  # fmt: skip
            with self.subTest(name):
                self.refused("photos", *SMALL, "--model", *(name.split() or [""]), text=text)
        line = "out of memory: cannot allocate 4000000000000000 bytes"
        self.refused("photos", *SMALL, "--model", "mine_folder:Greedy", text=line, code=1)
        self.assertFalse(Path("runs").exists())

    def test_bad_options_are_refused_in_one_line(self) -> None:
        self.refused(text="give the folder of your images")
        self.refused("", text="expected a path")
        self.refused("photos", "red", text="unrecognized arguments: red")
        for option in ("--image-size=0", "--image-size=4097", "--workers=-1", "--epochs=0", "--batch-size=x",
                       "--lr=0", "--seed=-1", "--device=abacus", "--init-from=missing.pt"):  # fmt: skip
            self.refused("photos", *SMALL, option, text=option.partition("=")[2])
        self.refused("photos", *SMALL, "--output", "photos", text="photos exists; choose another --output")

    def test_help_fits_two_screens(self) -> None:
        for columns in ("80", "120"):
            with mock.patch.dict(os.environ, COLUMNS=columns):
                code, out, _ = call("--help")
            self.assertEqual(code, 0)
            self.assertLessEqual(len(out.splitlines()), 100)


class OtherScripts(FolderCase):
    def test_the_printed_command_predicts_with_a_model_of_ones_own(self) -> None:
        Path("own_folder.py").write_text(
            "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 3))\n"
        )
        self.addCleanup(sys.modules.pop, "own_folder", None)
        self.addCleanup(sys.path.__setitem__, slice(None), list(sys.path))
        code, out, err = call("photos", *SMALL, "--model", "own_folder:make", "--output", "own", "--lr", 0.01)
        self.assertEqual((code, err), (0, ""))
        *_, line = out.splitlines()
        self.assertTrue(line.startswith("predict:  python "), line)
        words = [word if word != "photo.jpg" else "photos/red/00.png" for word in shlex.split(line)[3:]]
        code, out, err = run_main(load_script("predict").main, *words, "--device", "cpu")
        self.assertEqual((code, err), (0, ""))
        self.assertRegex(out, r"photos/red/00.png +red ")

    def test_predict_and_export_build_the_same_model_and_predict_sees_what_validation_saw(self) -> None:
        for path in Path("photos").rglob("*.png"):
            Image.open(path).resize((50, 37)).save(path)
        for training in (SMALL, TUNED):
            code, _, err = call("photos", *training, "--image-size", 32, "--epochs", 1, "--output", training[1])
            self.assertEqual((code, err), (0, ""))
            checkpoint = f"{training[1]}/checkpoints/best.pt"
            args = script.parse_args(["photos", *training, "--image-size", "32"])
            loaders, facts, _ = script.make_loaders(args, torch.device("cpu"))
            model = script.make_model(args, facts, torch.device("cpu"))
            model.load_state_dict(tb.load_checkpoint(checkpoint)["model_state_dict"])
            outputs, _ = tb.predict_all(model, loaders[2])
            paths = [photo.path for photo in loaders[2].dataset.photos]

            exporter = load_script("export")
            exported, _ = exporter.load_model(mock.Mock(checkpoint=checkpoint, model=None))
            same, _ = tb.predict_all(exported, loaders[2])
            torch.testing.assert_close(same, outputs)

            options = ("--checkpoint", checkpoint, "--json", "--top", "1")
            code, out, err = run_main(load_script("predict").main, *options, *paths)
            self.assertEqual((code, err), (0, ""))
            shares, indices = outputs.softmax(1).max(1)
            for row, share, index in zip(json.loads(out)["images"], shares, indices, strict=True):
                self.assertEqual(row["class"], facts["classes"][index])
                self.assertAlmostEqual(row["confidence"], float(share), places=5)


if __name__ == "__main__":
    unittest.main()
