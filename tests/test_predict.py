"""scripts/predict.py: what the model sees of a picture, what is printed, how a checkpoint is judged."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import math
import os
import re
import shutil
import struct
import sys
import tempfile
import types
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import torchbasics as tb
from tests.common import load_script, run_main, run_script
from torchbasics import cli
from torchbasics.report import wilson_interval

script = load_script("predict")
MEAN, STD = (0.15,), (0.3,)
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGITS: Tensor  # (40, 28, 28) from 0 to 1
LABELS: Tensor
MODEL: nn.Module


def setUpModule() -> None:
    """Train a small model on drawn digits in about a second."""
    global DIGITS, LABELS, MODEL
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MODEL = tb.make_model({"model": "simplenet"})
    loader = tb.TensorLoader(*tb.draw_digits(2000, seed=3), 50, shuffle=True, mean=MEAN, std=STD)
    optimizer = torch.optim.Adam(MODEL.parameters(), 3e-3)
    for _ in range(6):
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(MODEL(inputs), targets).backward()
            optimizer.step()
    MODEL.eval().requires_grad_(False)
    drawn, LABELS = tb.draw_digits(40, seed=4)
    DIGITS = drawn[:, 0].float() / 255


def image_of(grey: Tensor) -> Image.Image:
    return Image.fromarray((grey * 255).round().byte().numpy())


def enlarged(digit: Tensor, height: int = 400, width: int = 300, size: int = 260) -> Tensor:
    """Return `digit` (28, 28) `size` pixels large, somewhere on an empty (height, width)."""
    large = F.interpolate(digit[None, None], (size, size), mode="bicubic").clamp(0, 1)[0, 0]
    top, left = (height - size) * 3 // 4, (width - size) // 4
    return F.pad(large, (left, width - size - left, top, height - size - top))


def photographed(digit: Tensor, dark: bool) -> Tensor:
    """Return `digit` as (900, 700) with uneven light, soft strokes and noise."""
    ink = enlarged(digit, 900, 700, 450)
    y, x = torch.meshgrid(torch.linspace(0, 1, 900), torch.linspace(0, 1, 700), indexing="ij")
    light = 0.5 + 0.25 * x - 0.15 * y - 0.1 * (x - 0.5) ** 2
    noise = 0.03 * torch.randn(ink.shape, generator=torch.Generator().manual_seed(0))
    return ((light * (1 - 0.6 * ink) if dark else 0.1 + 0.3 * light + 0.45 * ink) + noise).clamp(0.02, 0.98)


def neighbours(image: Tensor) -> list[Tensor]:
    """Return the image and its eight shifts by one pixel."""
    return [torch.roll(image, (dy, dx), (-2, -1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


def correlation(a: Tensor, b: Tensor) -> float:
    """Return the best correlation of `b` and a neighbour of `a`, as seen through a lens of 3×3 pixels."""
    soft = F.avg_pool2d(torch.stack([*neighbours(a), b]), 3, stride=1).flatten(1)  # (10, 26 * 26)
    return float(torch.corrcoef(soft)[-1, :-1].max())


class WhatTheModelSees(unittest.TestCase):
    def test_a_digit_fits_20_pixels_and_its_centre_of_mass_lies_in_the_middle_of_28(self) -> None:
        places = torch.arange(28.0)
        for digit in DIGITS[:10]:
            seen = script.to_mnist(enlarged(digit))
            self.assertEqual(max(int((seen.sum(axis) > 0).sum()) for axis in (0, 1)), 20)
            for axis in (0, 1):
                self.assertAlmostEqual(float(seen.sum(axis) @ places / seen.sum()), 14, delta=0.501)

    def test_images_of_mnist_stay_as_they_are_within_a_pixel(self) -> None:
        for digit in DIGITS:
            seen = script.to_mnist(digit)
            self.assertLess(min(float((seen - one / digit.max()).abs().max()) for one in neighbours(digit)), 0.12)

    def test_photographs_of_either_polarity_look_like_the_digit_without_noise_or_shadow(self) -> None:
        for digit in DIGITS[:8]:
            for dark in (True, False):
                seen = script.to_mnist(script.to_grey(image_of(photographed(digit, dark))))
                self.assertGreater(correlation(seen, digit), 0.9)
                far = F.max_pool2d(digit[None], 7, stride=1, padding=3)[0] == 0
                self.assertLess(float(seen[far].max()), 0.1)

    def test_specks_do_not_count(self) -> None:
        digit = enlarged(DIGITS[0])
        specked = digit.clone()
        specked[2, 3] = specked[395, 297] = specked[390, 5] = 1.0
        torch.testing.assert_close(script.to_mnist(specked), script.to_mnist(digit), rtol=0, atol=0.02)

    def test_thin_strokes_do_not_grow_pale(self) -> None:
        cross = torch.zeros(400, 400)
        cross[50:350, 200] = cross[200, 50:350] = 1.0
        self.assertGreater(float(script.to_mnist(cross)[14].median()), 0.4)

    def test_polarity_can_be_given(self) -> None:
        torch.testing.assert_close(script.to_mnist(1 - DIGITS[0], True), script.to_mnist(DIGITS[0]), rtol=0, atol=1e-5)
        with self.assertRaisesRegex(ValueError, "nothing is drawn"):
            script.to_mnist(1 - DIGITS[0], False)

    def test_an_image_without_a_drawing_is_an_error(self) -> None:
        noise = 0.5 + 0.005 * torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
        for empty in (torch.ones(28, 28), torch.zeros(1, 1), torch.zeros(1, 3000), noise, torch.full((3, 4), 0.5)):
            with self.assertRaisesRegex(ValueError, "nothing is drawn"):
                script.to_mnist(script.to_grey(image_of(empty)))

    def test_transparent_becomes_the_other_shade_around_a_drawing_and_the_same_in_corners(self) -> None:
        ink = image_of(enlarged(DIGITS[0]))
        for shade, paper in ((0, 1.0), (255, 0.0)):
            grey = script.to_grey(Image.merge("LA", [Image.new("L", ink.size, shade), ink]))
            self.assertEqual(float(grey[0, 0]), paper)
            self.assertAlmostEqual(float((grey - paper).abs().max()), 1.0, delta=0.01)
        photo, corner = image_of(photographed(DIGITS[0], dark=True)).convert("RGBA"), Image.new("L", (700, 900), 255)
        corner.paste(0, (0, 0, 40, 40))
        photo.putalpha(corner)
        self.assertGreater(correlation(script.to_mnist(script.to_grey(photo)), DIGITS[0]), 0.9)


class MeanColour(nn.Module):
    """A model of one's own: its logits are the mean of each channel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


class ScriptCase(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.checkpoint = self.save("best.pt")
        self.digit, self.label = self.folder / "digit.png", str(int(LABELS[0]))
        image_of(DIGITS[0]).save(self.digit)
        own = types.ModuleType("own_predict_models")
        own.mean_colour, own.three = MeanColour, lambda: 3  # type: ignore[attr-defined]
        sys.modules[own.__name__] = own  # patch.dict would also take out what torch imports meanwhile
        self.addCleanup(sys.modules.pop, own.__name__)
        path = mock.patch.object(sys, "path", [*sys.path])
        path.start()
        self.addCleanup(path.stop)

    def save(self, name: str, network: nn.Module | None = None, **changes: Any) -> Path:
        metadata = {"model": "simplenet", "dropout": 0.2, "dataset": "digits", "classes": tuple("0123456789"),
                    "num_classes": 10, "in_channels": 1, "image_size": 28, "mean": MEAN, "std": STD}  # fmt: skip
        state = (network or MODEL).state_dict()
        tb.save_checkpoint({"model_state_dict": state, "metadata": metadata | changes}, self.folder / name)
        return self.folder / name

    def main(self, *argv: Any) -> tuple[int, str, str]:
        return run_main(functools.partial(cli.run, script.main), *map(str, argv))

    def json(self, *argv: Any) -> dict[str, Any]:
        code, out, err = self.main(*argv, "--json")
        self.assertEqual((code, err), (0, ""))
        return json.loads(out)

    def refused(self, *argv: Any) -> str:
        """Return the one line with which this is refused, without a result."""
        code, out, err = self.main(*argv)
        self.assertEqual((code, out), (2, ""), err)
        self.assertRegex(err, r"\Aerror: [^\n]{10,1000}\n\Z")
        return err

    def seen(self, digit: Tensor) -> Tensor:
        """Return what the model sees of the file of `digit`, (1, 1, 28, 28)."""
        return script.to_mnist((digit * 255).round() / 255)[None, None]

    def assert_shares(self, top: dict[str, float], expected: Tensor) -> None:
        torch.testing.assert_close(torch.tensor([top[name] for name in "0123456789"]), expected, rtol=1e-4, atol=1e-6)


class Files(ScriptCase):
    def test_a_table_of_class_confidence_and_runners_up(self) -> None:
        code, out, err = self.main("--checkpoint", self.checkpoint, self.digit)
        self.assertEqual((code, err), (0, ""))
        shares, classes = MODEL((self.seen(DIGITS[0]) - MEAN[0]) / STD[0]).softmax(1)[0].topk(3)
        runners = ", ".join(f"{int(c)} {float(s):.2%}" for c, s in zip(classes[1:], shares[1:], strict=True))
        head, row = out.splitlines()
        self.assertEqual(head.split(), ["image", "class", "confidence", "runners-up"])
        self.assertEqual(row.split(maxsplit=3), [str(self.digit), self.label, f"{float(shares[0]):.2%}", runners])

    def test_the_class_column_is_as_wide_as_the_longest_class_name(self) -> None:
        for classes in (tuple("abcdefghij"), FASHION, tuple(letter * 30 for letter in "abcdefghij")):
            head, row = self.main("--checkpoint", self.save("wide.pt", classes=classes), self.digit)[1].splitlines()
            self.assertEqual(head.index("confidence") + len("confidence"), row.index("%") + 1)

    def test_probabilities_are_those_of_plain_pytorch(self) -> None:
        paths = [self.folder / f"{i}.png" for i in range(5)]
        for path, digit in zip(paths, DIGITS, strict=False):
            image_of(digit).save(path)
        rows = self.json("--checkpoint", self.checkpoint, "--top", 99, *paths)["images"]
        self.assertEqual([row["file"] for row in rows], [str(path) for path in paths])
        for row, digit in zip(rows, DIGITS, strict=False):
            expected = MODEL((self.seen(digit) - MEAN[0]) / STD[0]).softmax(1)[0]
            self.assert_shares(row["top"], expected)
            self.assertEqual(row["class"], str(int(expected.argmax())))
            self.assertAlmostEqual(row["confidence"], float(expected.max()), places=5)

    def test_several_checkpoints_vote_by_mean_probability_each_with_its_own_normalisation(self) -> None:
        other = tb.make_model({"model": "mlp"}).eval().requires_grad_(False)
        second = self.save("second.pt", other, model="mlp", mean=(0.5,), std=(0.5,))
        found = self.json("--checkpoint", self.checkpoint, "--checkpoint", second, "--top", 10, self.digit)["images"][0]
        pixels = self.seen(DIGITS[0])
        first = MODEL((pixels - MEAN[0]) / STD[0]).softmax(1)[0]
        self.assert_shares(found["top"], (first + other((pixels - 0.5) / 0.5).softmax(1)[0]) / 2)
        third = self.save("third.pt", classes=tuple("abcdefghij"))
        line = self.refused("--checkpoint", self.checkpoint, "--checkpoint", third, self.digit)
        self.assertIn("third.pt: cannot vote", line)

    def test_tta_averages_nine_shifts(self) -> None:
        found = self.json("--checkpoint", self.checkpoint, "--tta", "--top", 10, self.digit)["images"][0]
        views = torch.cat(neighbours(self.seen(DIGITS[0])))  # its margin is empty, so that a roll is a shift
        self.assert_shares(found["top"], MODEL((views - MEAN[0]) / STD[0]).softmax(1).mean(0))

    def test_images_of_all_kinds_are_read_and_each_bad_one_is_named_while_the_others_go_on(self) -> None:
        ink = image_of(enlarged(DIGITS[0]))
        paper, exif = image_of(1 - enlarged(DIGITS[0])), Image.Exif()
        exif[0x0112] = 3  # turned by 180 degrees
        palette = paper.convert("P")
        good: dict[str, tuple[Image.Image, dict[str, Any]]] = {
            "light.png": (ink, {}),
            "dark.png": (paper, {}),
            "photo.jpg": (image_of(photographed(DIGITS[0], True)).convert("RGB"), {"quality": 80}),
            "transparent.png": (Image.merge("LA", [Image.new("L", ink.size, 0), ink]).convert("RGBA"), {}),
            "palette.png": (palette, {"transparency": palette.getpixel((0, 0))}),
            "sixteen.png": (Image.frombytes("I;16", ink.size, bytes(b for v in ink.tobytes() for b in (v, v))), {}),
            "one.png": (paper.convert("1"), {}),
            "turned.jpg": (paper.rotate(180), {"exif": exif}),
            "cmyk.tiff": (paper.convert("CMYK"), {}),
        }
        for name, (image, options) in good.items():
            image.save(self.folder / name, **options)
        (self.folder / "cut.png").write_bytes(self.digit.read_bytes()[:100])
        (self.folder / "bad\x1b[31m\n.png").write_text("text")
        (self.folder / "folder.png").mkdir()
        Image.new("L", (50, 50), 255).save(self.folder / "blank.png")
        bad = ["cut.png", "bad\x1b[31m\n.png", "folder.png", "blank.png", "absent.png"]
        paths = [self.folder / name for pair in zip(good, [*bad, *bad], strict=False) for name in pair]
        code, out, err = self.main("--checkpoint", self.checkpoint, "--json", *paths)
        self.assertEqual(code, 1)
        rows = json.loads(out)["images"]
        self.assertEqual([row["file"] for row in rows], [str(path) for path in paths])
        for row in rows[::2]:
            self.assertEqual(row.get("class"), self.label, row)
        self.assertTrue(all("error" in row for row in rows[1::2]))
        lines = err.splitlines()
        self.assertEqual(len(lines), len(rows[1::2]))
        for line, row in zip(lines, rows[1::2], strict=True):
            self.assertTrue(line.isprintable())
            self.assertTrue(line.startswith(f"error: {cli.printable(row['file'])}: "), line)

    def test_names_do_nothing_to_the_terminal(self) -> None:
        model = self.save("odd.pt", classes=tuple(f"\x1b[2J{i}" for i in range(10)))
        path = shutil.copy(self.digit, self.folder / "\x1b]0;title\x07.png")
        _, out, _ = self.main("--checkpoint", model, "--top", 10, path)
        self.assertTrue(all(line.isprintable() for line in out.splitlines()), repr(out))
        self.assertEqual((len(out.splitlines()), out.count(r"\x1b[2J")), (2, 10))

    def test_as_a_program_from_another_directory(self) -> None:
        done = run_script("predict", "--checkpoint", "best.pt", "digit.png", cwd=self.folder)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(done.stdout.splitlines()[1].split()[:2], ["digit.png", self.label])


class Checkpoints(ScriptCase):
    OWN = ("--model", "own_predict_models:mean_colour", "--classes", "red,green,blue", "--in-channels", 3,
           "--image-size", 8, "--mean", "0.5,0.5,0.5", "--std", "0.25")  # fmt: skip

    def test_a_model_of_ones_own_sees_the_whole_image_at_its_size(self) -> None:
        tb.save_checkpoint({"model_state_dict": {}}, self.folder / "own.pt")
        Image.new("RGB", (50, 31), (255, 0, 51)).save(self.folder / "photo.png")
        for extra, colour in ((), (1, 0, 0.2)), (("--invert",), (0, 1, 0.8)):
            found = self.json("--checkpoint", self.folder / "own.pt", *self.OWN, *extra, self.folder / "photo.png")
            exps = [math.exp((value - 0.5) / 0.25) for value in colour]
            for name, value in zip(("red", "green", "blue"), exps, strict=True):
                self.assertAlmostEqual(found["images"][0]["top"][name], value / sum(exps), places=5)

    def test_a_checkpoint_without_our_metadata_gets_a_line_that_names_what_is_missing_and_what_to_do(self) -> None:
        tb.save_checkpoint({"model_state_dict": MODEL.state_dict()}, self.folder / "own.pt")
        line = self.refused("--checkpoint", self.folder / "own.pt", self.digit)
        self.assertIn("own.pt: its metadata has no model, classes, in_channels, image_size, mean, std;", line)
        self.assertIn("Trainer(metadata={'model': …})", line)
        options = ("--model", "simplenet", "--classes", ",".join("0123456789"), "--in-channels", 1, "--image-size", 28,
                   "--mean", MEAN[0], "--std", STD[0])  # fmt: skip
        for word in options[::2]:
            self.assertIn(str(word), line)
        given = self.json("--checkpoint", self.folder / "own.pt", *options, self.digit)
        self.assertEqual(given, self.json("--checkpoint", self.checkpoint, self.digit))
        torch.save(MODEL.state_dict(), self.folder / "plain.pt")  # the bare weights, without a seal
        code, out, err = self.main("--checkpoint", self.folder / "plain.pt", *options, "--json", self.digit)
        self.assertEqual((code, json.loads(out)), (0, given))
        self.assertRegex(err, r"\Awarning: .*no seal.*\n\Z")

    def test_a_file_alone_cannot_have_a_module_imported(self) -> None:
        path = self.save("hostile.pt", model="antigravity:fly")
        self.assertIn("not one of ours or torchvision's", self.refused("--checkpoint", path, self.digit))
        self.assertNotIn("antigravity", sys.modules)

    def test_what_is_no_model_is_refused_by_name(self) -> None:
        for name, text in {
            "own_predict_models:other": "no attribute 'other'",
            "own_predict_models:three": "gave a int",
            "no_such_module:f": "No module named",
            "resnet": "not one of ours or torchvision's",
        }.items():
            self.assertIn(text, self.refused("--checkpoint", self.checkpoint, "--model", name, self.digit))

    def test_weights_of_another_model_and_damaged_or_absent_files_are_refused(self) -> None:
        other = self.save("other.pt", tb.make_model({"model": "mlp"}))  # its metadata says simplenet
        self.assertIn("do not fit simplenet: ", self.refused("--checkpoint", other, self.digit))
        wrong = ("--checkpoint", self.checkpoint, "--image-size", 24, self.digit)
        self.assertIn("do not fit simplenet: ", self.refused(*wrong))
        content = bytearray(self.checkpoint.read_bytes())
        content[len(content) // 2] ^= 4
        (self.folder / "flipped.pt").write_bytes(content)
        self.assertIn("damaged", self.refused("--checkpoint", self.folder / "flipped.pt", self.digit))
        self.refused("--checkpoint", self.folder / "absent.pt", self.digit)

    def test_a_model_that_answers_nan_or_for_other_classes_is_refused(self) -> None:
        broken = tb.make_model({"model": "simplenet"})
        nn.init.constant_(broken.get_parameter("output.bias"), math.nan)
        self.assertIn("10 finite logits", self.refused("--checkpoint", self.save("nan.pt", broken), self.digit))
        two = self.save("two.pt", MeanColour(), classes=("a", "b"), in_channels=3)
        argv = ("--checkpoint", two, "--model", "own_predict_models:mean_colour", self.digit)
        self.assertIn("2 finite logits", self.refused(*argv))


class Judging(ScriptCase):
    """On the test images of a data set that is written here: drawn digits under the names of Fashion-MNIST."""

    def setUp(self) -> None:
        super().setUp()
        self.inputs, self.targets = tb.draw_digits(200, seed=5)
        raw = self.folder / "data" / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        images = struct.pack(">4I", 0x803, 200, 28, 28) + bytes(self.inputs.flatten().tolist())
        (raw / "t10k-images-idx3-ubyte").write_bytes(images)
        (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 200) + bytes(self.targets.tolist()))
        self.data = ("--dataset", "fashion-mnist", "--data-dir", self.folder / "data")
        self.pixels = self.inputs.float() / 255

    def test_accuracy_with_its_interval_and_the_three_worst_confusions(self) -> None:
        path = self.save("fashion.pt", classes=FASHION)
        predicted = MODEL((self.pixels - MEAN[0]) / STD[0]).argmax(1)
        correct = int((predicted == self.targets).sum())
        pairs = zip(self.targets.tolist(), predicted.tolist(), strict=True)
        mistakes = collections.Counter((true, taken) for true, taken in pairs if true != taken)
        code, out, err = self.main("--checkpoint", path, *self.data)
        self.assertEqual((code, err), (0, ""))
        low, high = wilson_interval(correct, 200)
        self.assertIn(f"accuracy {correct / 200:.2%} (95% interval {low:.2%} to {high:.2%})", out)
        self.assertIn(f"{200 - correct} mistakes", out)
        found = self.json("--checkpoint", path, *self.data)
        self.assertEqual((found["images"], found["correct"]), (200, correct))
        self.assertEqual([row[2] for row in found["confusions"]], [times for _, times in mistakes.most_common(3)])
        for true, taken, times in found["confusions"]:
            self.assertEqual(mistakes[FASHION.index(true), FASHION.index(taken)], times)
            self.assertIn(f"{true} taken for {taken} {times} times", out)

    def test_a_vote_with_nine_views_is_judged_as_computed_by_hand(self) -> None:
        other = tb.make_model({"model": "mlp"}).eval().requires_grad_(False)
        paths = self.save("a.pt", classes=FASHION), self.save("b.pt", other, model="mlp", classes=FASHION, mean=(0.5,))
        found = self.json("--checkpoint", paths[0], "--checkpoint", paths[1], "--tta", *self.data)
        padded, shares = F.pad(self.pixels, (1, 1, 1, 1), mode="replicate"), torch.zeros(200, 10)
        for top in range(3):
            for left in range(3):
                view = padded[..., top : top + 28, left : left + 28]
                shares += (MODEL((view - MEAN[0]) / STD[0]).softmax(1) + other((view - 0.5) / STD[0]).softmax(1)) / 18
        self.assertEqual(found["correct"], int((shares.argmax(1) == self.targets).sum()))

    def test_a_page_with_the_confusion_and_the_mistakes_is_written_once(self) -> None:
        path, page = self.save("fashion.pt", classes=FASHION), self.folder / "page.html"
        code, out, err = self.main("--checkpoint", path, *self.data, "--report", page)
        self.assertEqual((code, err), (0, ""))
        content = page.read_text()
        interval = re.search(r"accuracy (.*? \(95% interval .*?\))", out)
        self.assertTrue(f"{interval and interval[1]} of 200 fashion-mnist test images" in content, interval)
        number = out.split(" mistakes")[0].split()[-1]  # fewer than the 24 that are shown
        self.assertTrue(f"{number} of {number}: true → predicted class" in content)
        self.assertEqual(content.count("<figure>"), int(number))
        self.assertIn("does not exist yet", self.refused("--checkpoint", path, *self.data, "--report", page))
        self.assertIn("--dataset", self.refused("--checkpoint", path, self.digit, "--report", self.folder / "b.html"))
        self.assertEqual(page.read_text(), content)

    def test_a_data_set_of_other_classes_is_refused(self) -> None:
        self.assertIn("not those of the model", self.refused("--checkpoint", self.checkpoint, *self.data))


class CommandLine(ScriptCase):
    def test_images_or_a_data_set_but_not_both_or_none(self) -> None:
        for extra in ((), (self.digit, "--dataset", "mnist")):
            self.assertIn("give image files, or --dataset", self.refused("--checkpoint", self.checkpoint, *extra))
        for text, extra in (
            ("--data-dir and --report go with --dataset", (self.digit, "--data-dir", self.folder)),
            ("--invert and --top go with image files", ("--dataset", "mnist", "--top", 2)),
            ("--invert and --top go with image files", ("--dataset", "mnist", "--no-invert")),
        ):
            self.assertIn(text, self.refused("--checkpoint", self.checkpoint, *extra))
        self.assertIn("--checkpoint", self.refused(self.digit))
        self.assertIn("--mean", self.refused("--checkpoint", self.checkpoint, "--mean", "a,b", self.digit))

    def test_help_fits_on_two_screens(self) -> None:
        with mock.patch.dict(os.environ, {"COLUMNS": "80"}), contextlib.suppress(SystemExit):
            _, out, _ = self.main("--help")
        self.assertLessEqual(len(out.splitlines()), 100)
        self.assertIn("--checkpoint", out)


if __name__ == "__main__":
    unittest.main()
