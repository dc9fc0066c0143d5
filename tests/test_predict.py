"""scripts/predict.py: what the network sees, what comes out, and what is refused without being run."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import torchbasics as tb
from tests.scripts import load_script
from tests.test_images import enlarged, image_of, photographed
from torchbasics import checkpoint as checkpoints
from torchbasics import images

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "predict.py"
MEAN, STD = (0.15,), (0.3,)


script = load_script("predict")
DIGITS: Tensor  # (40, 28, 28) from 0 to 1, drawn
LABELS: Tensor
MODEL: torch.nn.Module


def setUpModule() -> None:
    """A small network that knows drawn digits: trained in a second or two."""
    global DIGITS, LABELS, MODEL
    torch.set_num_threads(1)
    inputs, targets = tb.draw_digits(4000, seed=3)
    MODEL = trained(inputs, targets)
    drawn, LABELS = tb.draw_digits(40, seed=4)
    DIGITS = drawn[:, 0].float() / 255


def trained(inputs: Tensor, targets: Tensor) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tb.make_model("simplenet")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    pixels = (inputs.float() / 255 - MEAN[0]) / STD[0]
    for epoch in range(6):
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(epoch))
        for part in order.split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels[part]), targets[part]).backward()
            optimizer.step()
    return model.eval()


METADATA: dict[str, Any] = {
    "model": "simplenet",
    "dropout": 0.0,
    "dataset": "digits",
    "classes": tuple("0123456789"),
    "in_channels": 1,
    "image_size": 28,
    "mean": MEAN,
    "std": STD,
}


def save(path: Path, network: torch.nn.Module | None = None, **metadata: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    content = {"epoch": 1, "model_state_dict": (network or MODEL).state_dict(), "optimizer_state_dict": {}, "loss": 0.1}
    tb.save_checkpoint({**content, "metadata": {**METADATA, **metadata}}, path)
    return path


def forge_record(path: Path) -> Path:
    """The record that an attacker, too, can write: it matches the file."""
    entry = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    Path(f"{path}.json").write_bytes(checkpoints._record_bytes([entry]))
    return path


class Done(NamedTuple):
    code: Any
    out: str
    err: str

    @property
    def images(self) -> list[dict[str, Any]]:
        return json.loads(self.out)["images"]


class ScriptCase(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.checkpoint = save(self.folder / "best.pt")
        self.digit, self.label = self.folder / "digit.png", str(int(LABELS[0]))
        image_of(DIGITS[0]).save(self.digit)

    def main(self, *argv: Any) -> Done:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = script.main([str(arg) for arg in argv])
            except SystemExit as stop:
                code = stop.code
        return Done(code, out.getvalue(), err.getvalue())

    def refused(self, *argv: Any, code: int = 2) -> str:
        """Refuses with one line, and without a result; returns the line."""
        done = self.main(*argv)
        self.assertEqual((done.code, done.out), (code, ""), done)
        self.assertRegex(done.err, r"\Aerror: [^\n]{10,500}\n\Z")
        return done.err

    def expected(self, digit: Tensor, model: torch.nn.Module | None = None) -> Tensor:
        """The probabilities by plain PyTorch."""
        with torch.no_grad():
            pixels = images.to_mnist((digit * 255).round() / 255)[0][None, None]
            return (model or MODEL)((pixels - MEAN[0]) / STD[0]).softmax(1)[0]

    def probabilities(self, image: dict[str, Any]) -> Tensor:
        shares = {item["class"]: item["probability"] for item in image["top"]}
        return torch.tensor([shares[name] for name in "0123456789"])


class Results(ScriptCase):
    def test_table(self) -> None:
        done = self.main("--checkpoint", self.checkpoint, self.digit)
        self.assertEqual((done.code, done.err), (0, ""))
        head, row = done.out.splitlines()
        self.assertEqual(head.split(), ["image", "class", "confidence", "runners-up"])
        shares, classes = self.expected(DIGITS[0]).topk(3)
        runners = [f"{int(c)} {float(s):.2%}" for c, s in zip(classes[1:], shares[1:], strict=True)]
        self.assertEqual(row.split(maxsplit=3), [str(self.digit), self.label, f"{float(shares[0]):.2%}",
                                                 ", ".join(runners)])  # fmt: skip

    def test_json_holds_the_probabilities_of_plain_pytorch_in_order(self) -> None:
        paths = [self.folder / f"{i}.png" for i in range(10)]
        for path, digit in zip(paths, DIGITS, strict=False):
            image_of(digit).save(path)
        with mock.patch.object(script, "BATCH", 3):  # the last one is smaller
            done = self.main("--checkpoint", self.checkpoint, "--json", "--top", 99, *paths)
        self.assertEqual((done.code, done.err), (0, ""))
        self.assertEqual([image["file"] for image in done.images], [str(path) for path in paths])
        for image, digit in zip(done.images, DIGITS, strict=False):
            expected = self.expected(digit)
            torch.testing.assert_close(self.probabilities(image), expected, rtol=1e-4, atol=1e-6)
            self.assertEqual(image["class"], str(int(expected.argmax())))
            self.assertEqual(image["confidence"], max(item["probability"] for item in image["top"]))
            self.assertIs(image["dark_on_light"], False)

    def test_several_checkpoints_average_probabilities(self) -> None:
        torch.manual_seed(1)
        other = tb.make_model("mlp").eval()
        second = save(self.folder / "second.pt", other, model="mlp", mean=(0.5,), std=(0.5,))  # its own normalisation
        arguments = ("--checkpoint", self.checkpoint, "--checkpoint", second, "--json", "--top", 10, self.digit)
        pixels = images.to_mnist((DIGITS[0] * 255).round() / 255)[0][None, None]
        with torch.no_grad():
            expected = (self.expected(DIGITS[0]) + other((pixels - 0.5) / 0.5).softmax(1)[0]) / 2
        torch.testing.assert_close(self.probabilities(self.main(*arguments).images[0]), expected, rtol=1e-4, atol=1e-6)

    def test_an_ensemble_of_other_classes_is_refused(self) -> None:
        other = save(self.folder / "other.pt", classes=tuple("abcdefghij"))
        line = self.refused("--checkpoint", self.checkpoint, "--checkpoint", other, self.digit)
        self.assertIn("other.pt: its data set, classes or input size", line)

    def test_tta_averages_nine_shifts(self) -> None:
        done = self.main("--checkpoint", self.checkpoint, "--tta", "--json", "--top", 10, self.digit)
        seen = images.to_mnist((DIGITS[0] * 255).round() / 255)[0]
        self.assertEqual(float(F.pad(seen[1:-1, 1:-1], (1, 1, 1, 1)).sub(seen).abs().max()), 0)  # a roll loses nothing
        views = [torch.roll(seen, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        with torch.no_grad():
            expected = MODEL((torch.stack(views) - MEAN[0]) / STD[0]).softmax(1).mean(0)
        torch.testing.assert_close(self.probabilities(done.images[0]), expected, rtol=1e-4, atol=1e-6)
        self.assertGreater(float((expected - self.expected(DIGITS[0])).abs().max()), 1e-4)

    def test_models_of_folders_see_the_whole_image(self) -> None:
        facts = script.Facts("folder", ("a", "b"), 3, (20, 10), (0.5,), (0.5,))
        image = image_of(photographed(DIGITS[0], dark=True))
        pixels, dark = script.to_pixels(image, facts, None)
        self.assertIsNone(dark)
        torch.testing.assert_close(pixels, images.resize(image, (20, 10), 3), rtol=0, atol=0)
        inverted, dark = script.to_pixels(image, facts, True)
        self.assertIs(dark, True)
        torch.testing.assert_close(inverted, 1 - pixels, rtol=0, atol=0)
        large, _ = script.to_pixels(image, facts._replace(dataset="mnist"), None)  # not of MNIST's size
        torch.testing.assert_close(large, pixels, rtol=0, atol=0)

    def test_show(self) -> None:
        from PIL import Image

        large = self.folder / "large.png"
        image_of(1 - enlarged(DIGITS[1])).save(large)
        sheet = self.folder / "sheet.png"
        done = self.main(
            "--checkpoint", self.checkpoint, "--show", sheet, self.digit, large, self.folder / "absent.png"
        )
        self.assertEqual(done.code, 1)
        with Image.open(sheet) as image:
            drawn = torch.tensor(list(image.convert("L").tobytes())).view(image.height, image.width)
        panel, step = images.PANEL, images.PANEL + 8
        for i, digit in enumerate((DIGITS[0], images.to_grey(Image.open(large)))):
            left = 2 * i * step + 8 + panel + 4
            cells = drawn[8 : 8 + panel, left : left + panel][2::5, 2::5]  # the middle of each of the 28×28 cells
            torch.testing.assert_close(cells / 255, images.to_mnist(digit)[0], rtol=0, atol=0.01)
        inputs = drawn[8 : 8 + panel, 8 : 8 + panel][2::5, 2::5]
        torch.testing.assert_close(inputs / 255, DIGITS[0], rtol=0, atol=0.01)

    def test_show_overwrites_no_input(self) -> None:
        before = self.digit.read_bytes()
        (self.folder / "sub").mkdir()
        for name in (self.digit, self.folder / "sub" / ".." / "digit.png", self.checkpoint):
            self.assertIn("overwrite", self.refused("--checkpoint", self.checkpoint, "--show", name, self.digit))
        self.assertEqual(self.digit.read_bytes(), before)

    def test_a_model_that_answers_nan_is_an_error(self) -> None:
        broken = tb.make_model("simplenet")
        torch.nn.init.constant_(broken.get_parameter("output.bias"), float("nan"))
        path = save(self.folder / "nan.pt", broken)
        done = self.main("--checkpoint", path, "--json", self.digit)
        self.assertEqual((done.code, done.out), (2, ""))
        self.assertRegex(done.err, r"\Aerror: the model's output is not 10 finite numbers[^\n]*\n\Z")


def png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class Files(ScriptCase):
    def good_files(self) -> list[Path]:
        import numpy
        from PIL import Image

        ink = enlarged(DIGITS[0])
        black_on_white = image_of(1 - ink)
        transparent = Image.merge("LA", [Image.new("L", black_on_white.size, 0), image_of(ink)]).convert("RGBA")
        palette = black_on_white.convert("P")
        blank = Image.new("L", black_on_white.size, 255)
        exif = Image.Exif()
        exif[0x0112] = 3
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "white-on-black.png": (image_of(ink), {}),
            "black-on-white.png": (black_on_white, {}),
            "photo.jpg": (image_of(photographed(DIGITS[0], True)), {"quality": 80}),
            "transparent.png": (transparent, {}),
            "opaque.png": (black_on_white.convert("RGBA"), {}),
            "sixteen.png": (Image.fromarray((ink * 65535).round().numpy().astype(numpy.uint16)), {}),
            "one.png": (black_on_white.convert("1"), {}),
            "animated.gif": (black_on_white, {"save_all": True, "append_images": [blank, image_of(ink).rotate(90)]}),
            "palette.png": (palette, {"transparency": palette.getpixel((0, 0))}),
            "turned.jpg": (black_on_white.rotate(180), {"exif": exif}),
            "cmyk.tiff": (black_on_white.convert("CMYK"), {}),
        }
        for name, (image, options) in kinds.items():
            image.save(self.folder / name, **options)
        os.symlink("digit.png", self.folder / "link.png")
        return [self.folder / name for name in (*kinds, "link.png")]

    def bad_files(self) -> dict[Path, str]:
        """Names, and what the line on each says."""
        whole = self.digit.read_bytes()
        contents = {
            "truncated.png": (whole[: len(whole) // 2], "not readable: .*truncated"),
            "text.png": (b"I am text\n", "not an image of a known format"),
            "empty.png": (b"", "not an image of a known format"),
            "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
            "bomb.png": (png(30_000, 30_000, zlib.compress(bytes(1_000_000))), "900000000 pixels"),
            "large.png": (png(10_000, 10_000, zlib.compress(bytes(100_000))), "10,000×10,000 .* 80,000,000"),
            "header.png": (whole[:20], "not"),
        }
        for name, (content, _) in contents.items():
            (self.folder / name).write_bytes(content)
        (self.folder / "directory").mkdir()
        os.symlink("nowhere.png", self.folder / "dangling.png")
        image_of(torch.ones(50, 50)).save(self.folder / "blank.png")
        said = {name: text for name, (_, text) in contents.items()} | {
            "directory": r"is a directory; give its images: .*directory/\*\.png",
            "dangling.png": "symbolic link to nothing",
            "blank.png": "nothing is drawn",
            "absent.png": "No such file",
        }
        return {self.folder / name: text for name, text in said.items()}

    def test_every_kind_is_read_and_every_bad_one_named(self) -> None:
        good, bad = self.good_files(), self.bad_files()
        mixed = [path for pair in zip(good, [*bad, self.digit], strict=False) for path in pair]
        self.assertEqual(set(mixed), {*good, *bad, self.digit})
        for json_wanted in (True, False):
            done = self.main("--checkpoint", self.checkpoint, *(["--json"] if json_wanted else []), *mixed)
            self.assertEqual(done.code, 1)
            lines = done.err.splitlines()
            self.assertEqual(len(lines), len(bad), done.err)
            for line, (path, text) in zip(lines, bad.items(), strict=True):
                self.assertTrue(line.startswith(f"error: {path}: "), line)
                self.assertRegex(line, text)
            if json_wanted:
                found = {image["file"]: image.get("class") for image in done.images}
                self.assertEqual(list(found), [str(path) for path in mixed])
                self.assertEqual({found[str(path)] for path in bad}, {None})
            else:
                found = {row.split()[0]: row.split()[1] for row in done.out.splitlines()[1:]}
            for path in (*good, self.digit):
                self.assertEqual(found[str(path)], self.label, path.name)

    def test_a_bomb_is_refused_before_it_is_decoded(self) -> None:
        bombs = [path for path in self.bad_files() if path.name in ("bomb.png", "large.png")]
        with mock.patch("PIL.ImageFile.ImageFile.load", side_effect=AssertionError("decoded")) as load:
            done = self.main("--checkpoint", self.checkpoint, *bombs)
            self.assertEqual((done.code, done.err.count("error: ")), (1, 2), done.err)
            self.assertRegex(done.err, r"900000000 pixels[^\n]*\n.*10,000×10,000 pixels")
            self.assertFalse(load.called)
            lifted = self.main("--checkpoint", self.checkpoint, "--max-pixels", 10**12, bombs[0])
            self.assertRegex(lifted.err, r"bomb\.png: Image size \(900000000 pixels\) exceeds limit of \d+ pixels\n")
            self.assertIn("decoded", self.main("--checkpoint", self.checkpoint, self.digit).err)  # it would be seen
        done = self.main("--checkpoint", self.checkpoint, "--max-pixels", 28 * 28, self.digit)
        self.assertEqual(done.code, 0)
        done = self.main("--checkpoint", self.checkpoint, "--max-pixels", 28 * 28 - 1, self.digit)
        self.assertEqual(done.code, 1)
        self.assertIn("28×28 pixels are more than --max-pixels 783", done.err)

    def test_formats_that_start_another_program_are_not_known(self) -> None:
        path = next(path for path in self.bad_files() if path.name == "script.png")
        with mock.patch("PIL.EpsImagePlugin.Ghostscript", side_effect=AssertionError("started")) as ghostscript:
            self.assertEqual(self.main("--checkpoint", self.checkpoint, path).code, 1)
        self.assertFalse(ghostscript.called)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no pipes with names here")
    def test_pipes_and_devices_are_not_waited_for(self) -> None:
        os.mkfifo(self.folder / "pipe.png")
        done = self.main("--checkpoint", self.checkpoint, self.folder / "pipe.png", "/dev/zero", self.digit)
        self.assertEqual(done.code, 1)
        self.assertEqual(done.err.count("not a regular file"), 2)
        for option in ("--checkpoint", "--artifact"):
            self.refused(option, self.folder / "pipe.png", "--model", "simplenet", self.digit)

    def test_names_do_nothing_to_the_terminal(self) -> None:
        names = ["bad\x1b[31m\x1b]0;title\x07\n.png", "turned\u202egnp.png", 'quote".png']
        for name in names:
            shutil.copy(self.digit, self.folder / name)
        classes = tuple(f"\x1b[2J{i}" for i in range(10))
        model = save(self.folder / "odd\x1b[1m.pt", classes=classes)
        paths = [self.folder / name for name in names]
        done = self.main("--checkpoint", model, "--top", 10, *paths, self.folder / "\x1b[5mabsent.png")
        self.assertEqual(done.code, 1)
        for text in (done.out, done.err):
            self.assertTrue(all(c.isprintable() or c == "\n" for c in text), repr(text))
        self.assertEqual((len(done.out.splitlines()), len(done.err.splitlines())), (4, 1))
        self.assertEqual(done.out.count(r"\x1b[2J"), 30)
        self.assertIn(r"bad\x1b[31m\x1b]0;title\x07\n.png", done.out)
        as_json = self.main("--checkpoint", model, "--json", *paths)
        self.assertTrue(all(" " <= c <= "~" or c == "\n" for c in as_json.out))
        self.assertEqual([image["file"] for image in as_json.images], [str(path) for path in paths])
        self.assertEqual(json.loads(as_json.out)["classes"][0], classes[0])
        self.assertIn(r"\x1b[5mno.pt", self.refused("--checkpoint", self.folder / "\x1b[5mno.pt", self.digit))


class Payload:
    """Unpickled, it makes a file: the command of a hostile checkpoint."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


class Checkpoints(ScriptCase):
    def test_hostile_and_damaged_files_are_refused_in_one_line(self) -> None:
        marker = self.folder / "the-command-ran"
        content = self.checkpoint.read_bytes()
        record = Path(f"{self.checkpoint}.json").read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 4
        for name, data in {"truncated": content[:-1000], "flipped": bytes(flipped)}.items():
            path = self.folder / f"{name}.pt"
            path.write_bytes(data)
            Path(f"{path}.json").write_bytes(record)
            self.assertIn("damaged", self.refused("--checkpoint", path, self.digit))
        forge_record(path.with_name("truncated.pt"))
        self.refused("--checkpoint", path.with_name("truncated.pt"), self.digit)
        for zipped in (True, False):  # the present format and the one of before 1.6, which is a bare pickle
            path = self.folder / f"pickle{zipped}.pt"
            hostile = {"epoch": 1, "model_state_dict": MODEL.state_dict(), "optimizer_state_dict": {}, "loss": 0.0,
                       "metadata": METADATA, "x": Payload(marker)}  # fmt: skip
            torch.save(hostile, path, _use_new_zipfile_serialization=zipped)
            self.assertIn("its record", self.refused("--checkpoint", path, self.digit))
            self.assertIn("damaged, or no state_dict",
                          self.refused("--checkpoint", path, "--model", "simplenet", self.digit))  # fmt: skip
            refusal = "more than tensors" if zipped else "not a file of save_checkpoint"
            self.assertIn(refusal, self.refused("--checkpoint", forge_record(path), self.digit))
        self.assertFalse(marker.exists())
        torch.load(path, weights_only=False)  # the payload works
        self.assertTrue(marker.exists())

    def test_torchscript_named_pt(self) -> None:
        path = self.folder / "script.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(MODEL, torch.zeros(1, 1, 28, 28)).save(path)
        with mock.patch("torch.jit.load", side_effect=AssertionError("loaded")) as load:
            for extra in ((), ("--model", "simplenet")):
                self.refused("--checkpoint", path, *extra, self.digit)
            line = self.refused("--checkpoint", forge_record(path), self.digit)
        self.assertFalse(load.called)
        self.assertIn("script.pt: is a TorchScript program, not a checkpoint", line)

    def test_another_models(self) -> None:
        other = save(self.folder / "other.pt", tb.make_model("mlp"))  # its metadata says simplenet
        self.assertIn("of another model", self.refused("--checkpoint", other, self.digit))
        self.assertIn("of another model", self.refused("--checkpoint", self.checkpoint, "--model", "cnn", self.digit))

    def test_a_plain_state_dict_needs_the_models_name(self) -> None:
        path = self.folder / "plain.pt"
        torch.save(MODEL.state_dict(), path)
        line = self.refused("--checkpoint", path, self.digit)
        self.assertIn("--model NAME", line)
        os.symlink(path, self.folder / "link.pt")
        self.assertEqual(self.main("--checkpoint", self.folder / "link.pt", "--model", "simplenet", self.digit).code, 0)
        for state in (MODEL.state_dict(), {"model_state_dict": MODEL.state_dict(), "epoch": 3}):
            torch.save(state, path)
            done = self.main("--checkpoint", path, "--model", "simplenet", "--json", "--top", 10, self.digit)
            self.assertEqual((done.code, done.err), (0, ""))
            pixels = images.to_mnist((DIGITS[0] * 255).round() / 255)[0][None, None]
            with torch.no_grad():
                expected = MODEL((pixels - 0.1307) / 0.3081).softmax(1)[0]
            torch.testing.assert_close(self.probabilities(done.images[0]), expected, rtol=1e-4, atol=1e-6)
        for wrong in ([1, 2], {}, {"a": 1}, MODEL.state_dict()["output.bias"]):
            torch.save(wrong, path)
            self.refused("--checkpoint", path, "--model", "simplenet", self.digit)

    def test_metadata_is_not_believed(self) -> None:
        wrong: dict[str, Any] = {
            "classes": [1, 2], "mean": "0", "std": (0.0,), "in_channels": 2, "image_size": 10**9, "dataset": 3,
        }  # fmt: skip
        for key, value in (*wrong.items(), ("classes", ()), ("mean", (float("nan"),)), ("mean", (0.1, 0.2))):
            path = save(self.folder / "odd.pt", **{key: value})
            self.assertRegex(self.refused("--checkpoint", path, self.digit), r"odd\.pt: its .* cannot be right")
        odd: list[dict[str, Any]] = [
            {"model": "resnet50"}, {"model": None}, {"classes": ("a", "b")}, {"image_size": 4096},
        ]  # fmt: skip
        for metadata in odd:
            self.refused("--checkpoint", save(self.folder / "odd.pt", **metadata), self.digit)

    def test_sizes_are_compared_before_memory_is_taken(self) -> None:
        path = save(self.folder / "huge.pt", model="mlp", image_size=512)  # 268 MB, by its own words
        places: list[str] = []

        def noting(*args: Any) -> torch.nn.Module:
            model = make_model(*args)
            places.append(next(model.parameters()).device.type)
            return model

        make_model = tb.make_model
        with mock.patch.object(tb, "make_model", noting):
            self.assertIn("of another model", self.refused("--checkpoint", path, self.digit))
            self.assertEqual(places, ["meta"])
            self.main("--checkpoint", self.checkpoint, self.digit)
            self.assertEqual(places, ["meta", "meta", "cpu"])

    def test_missing(self) -> None:
        self.assertIn("no such checkpoint", self.refused("--checkpoint", self.folder / "no.pt", self.digit))
        self.refused("--checkpoint", self.folder, self.digit)


class Artifacts(ScriptCase):
    """Exported once: torch.export takes seconds to be imported."""

    exported: dict[str, bytes]

    @classmethod
    def setUpClass(cls) -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dynamic = {0: torch.export.Dim("batch", min=1)}
            example = torch.zeros(2, 1, 28, 28)
            torch.export.save(torch.export.export(MODEL, (example,), dynamic_shapes=(dynamic,)), f"{folder}/model.pt2")
            torch.jit.trace(MODEL, example).save(f"{folder}/model.ts")
            cls.exported = {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def write(self, name: str, content: bytes | None = None, **changes: Any) -> Path:
        path = self.folder / name
        path.write_bytes(self.exported[name] if content is None else content)
        entry = {"file": name, "format": path.suffix[1:], "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        manifest = {
            "schema": 1, "model": "simplenet", "dataset": "digits", "classes": list("0123456789"),
            "input": {"shape": ["batch", 1, 28, 28], "dtype": "float32"},
            "normalisation": {"mean": list(MEAN), "std": list(STD)}, "versions": {}, "source": {}, "artifacts": [entry],
        }  # fmt: skip
        (self.folder / "model.json").write_text(json.dumps({**manifest, **changes}))
        return path

    @contextlib.contextmanager
    def nothing_loaded(self) -> Any:
        with contextlib.ExitStack() as stack:
            loaders = [stack.enter_context(mock.patch(name, side_effect=AssertionError("loaded"))) for name in (
                "torch.export.load", "torch.jit.load", "torch._inductor.aoti_load_package", "torch.load")]  # fmt: skip
            yield
            self.assertFalse(any(loader.called for loader in loaders))

    def test_listed_files_answer_as_the_checkpoint(self) -> None:
        expected = self.main("--checkpoint", self.checkpoint, "--json", "--top", 10, self.digit).images[0]
        for name in self.exported:
            path = self.write(name)
            done = self.main("--artifact", path, "--json", "--top", 10, self.digit)
            self.assertEqual((done.code, done.err), (0, ""))
            torch.testing.assert_close(self.probabilities(done.images[0]), self.probabilities(expected),
                                       rtol=1e-4, atol=1e-6)  # fmt: skip
        both = self.main("--artifact", path, "--checkpoint", self.checkpoint, "--json", "--top", 10, self.digit)
        torch.testing.assert_close(self.probabilities(both.images[0]), self.probabilities(expected))

    def test_a_file_quantized_by_torchao_names_that_package(self) -> None:
        path = self.write("model.pt2", self.exported["model.pt2"] + b"torchao.quantize_affine")
        with mock.patch.dict(sys.modules, {"torchao": None}):
            done = self.main("--artifact", path, self.digit)
        self.assertEqual(done.code, 3)
        self.assertEqual(done.err.count("\n"), 1)
        self.assertIn("pip install 'torchbasics[quant]'", done.err)

    def test_what_is_not_listed_is_not_loaded(self) -> None:
        for name, content in self.exported.items():
            path = self.write(name)
            with self.nothing_loaded():
                changed = bytearray(content)
                changed[len(content) // 2] ^= 1
                path.write_bytes(changed)
                self.assertIn("not the file that model.json lists", self.refused("--artifact", path, self.digit))
                path.write_bytes(content)
                copy = shutil.copy(path, self.folder / f"other{path.suffix}")
                self.assertIn("can run code", self.refused("--artifact", copy, self.digit))
                (self.folder / "model.json").unlink()
                self.assertIn("--trust", self.refused("--artifact", path, self.digit))
            done = self.main("--artifact", path, "--trust", "--json", self.digit)  # taken as MNIST's
            self.assertEqual((done.code, done.err, json.loads(done.out)["dataset"]), (0, "", "mnist"))

    def test_a_program_does_not_pass_as_onnx(self) -> None:
        path = self.write("model.pt2")
        renamed = path.rename(self.folder / "program.onnx")
        with self.nothing_loaded(), mock.patch.dict(sys.modules, {"onnxruntime": None}):
            self.refused("--artifact", renamed, self.digit, code=3)

    def test_trusted_rubbish_is_one_line(self) -> None:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("model/archive_format", "pt2")
        for content in (b"PK\x03\x04", b"", b"\x80\x04.", archive.getvalue()):
            path = self.write("model.pt2", content)
            with self.assertNoLogs("torch", "WARNING"):  # they would show a traceback
                self.assertIn("torch cannot load it", self.refused("--artifact", path, self.digit))

    def test_a_model_json_that_is_none(self) -> None:
        path = self.write("model.pt2")
        manifest = json.loads((self.folder / "model.json").read_text())
        changes: list[dict[str, Any]] = [
            {"schema": 2}, {"classes": [1]}, {"classes": None}, {"input": {"shape": [1, 2]}}, {"artifacts": 3},
            {"artifacts": ["x"]}, {"input": {"shape": ["batch", 1, 28, 10**9]}}, {"input": {"shape": "abcd"}},
            {"normalisation": {"mean": [0.1], "std": [0]}}, {"normalisation": []}, {"input": {"shape": [0, 1, 28, 28]}},
        ]  # fmt: skip
        texts = [json.dumps({**manifest, **change}) for change in changes]
        with self.nothing_loaded():
            for text in (*texts, "", "[]", "[" * 100_000, "\x00"):
                (self.folder / "model.json").write_text(text)
                self.assertIn("model.json: ", self.refused("--artifact", path, self.digit))

    def test_other_classes_and_shape_come_from_model_json(self) -> None:
        path = self.write("model.pt2", classes=[f"class {i}" for i in range(10)])
        image = self.main("--artifact", path, "--json", self.digit).images[0]
        self.assertEqual(image["class"], f"class {self.label}")
        few = self.write("model.pt2", classes=["a", "b"])
        done = self.main("--artifact", few, self.digit)
        self.assertEqual(done.code, 2)
        self.assertIn("not 2 finite numbers", done.err)

    def test_one_batch_size(self) -> None:
        sizes = []

        def four_only(inputs: Tensor) -> Tensor:
            sizes.append(len(inputs))
            return MODEL(inputs)

        facts = script.Facts("digits", tuple("0123456789"), 1, (28, 28), MEAN, STD, batch=4)
        with torch.no_grad():
            for count in (1, 4, 6):
                found = script.Member(four_only, facts)(DIGITS[:count, None])
                torch.testing.assert_close(found, MODEL((DIGITS[:count, None] - MEAN[0]) / STD[0]))
        self.assertEqual(sizes, [4, 4, 4, 4])

    def test_onnx(self) -> None:
        path = self.write("model.onnx", b"graph")
        with mock.patch.dict(sys.modules, {"onnxruntime": None}):
            line = self.refused("--artifact", path, self.digit, code=3)
        self.assertIn("pip install 'torchbasics[onnx]'", line)
        given = []

        class Session:  # of onnxruntime: takes the bytes, gives and takes numpy arrays
            def __init__(self, content: bytes, providers: list[str]) -> None:
                given.append((content, providers))

            def get_inputs(self) -> list[Any]:
                return [SimpleNamespace(name="pixels")]

            def run(self, outputs: None, inputs: dict[str, Any]) -> list[Any]:
                return [MODEL(torch.from_numpy(inputs["pixels"])).detach().numpy()]

        with mock.patch.dict(sys.modules, {"onnxruntime": SimpleNamespace(InferenceSession=Session)}):
            done = self.main("--artifact", path, "--json", "--top", 10, self.digit)
            self.assertEqual((done.code, done.err), (0, ""))
            torch.testing.assert_close(self.probabilities(done.images[0]), self.expected(DIGITS[0]), rtol=1e-4,
                                       atol=1e-6)  # fmt: skip
            path.write_bytes(b"another")
            self.assertIn("not the file", self.refused("--artifact", path, self.digit))
        self.assertEqual(given, [(b"graph", ["CPUExecutionProvider"])])


class CommandLine(ScriptCase):
    def test_bad_arguments(self) -> None:
        for arguments in (
            (self.digit,),
            ("--checkpoint", self.checkpoint),
            ("--checkpoint", self.checkpoint, "--top", "0", self.digit),
            ("--checkpoint", self.checkpoint, "--top", "x\x1b[1m", self.digit),
            ("--checkpoint", self.checkpoint, "--max-pixels", "0", self.digit),
            ("--checkpoint", self.checkpoint, "--model", "resnet", self.digit),
            ("--checkpoint", self.checkpoint, "--device", "abacus", self.digit),
        ):
            line = self.refused(*arguments)
            self.assertNotIn("\x1b", line)
        self.assertIn(r"\x1b", self.refused("--checkpoint", self.checkpoint, self.digit, "--no\x1b[1m"))

    def test_a_sheet_that_cannot_be_is_refused_before_an_image_is_read(self) -> None:
        for path in (self.folder, self.folder / "not there" / "sheet.png"):
            self.assertIn("cannot be written", self.refused("--checkpoint", self.checkpoint, "--show", path, "x.png"))

    @unittest.skipUnless(os.path.exists("/dev/full"), "no full disk here")
    def test_a_full_disk_is_one_line(self) -> None:
        os.symlink("/dev/full", self.folder / "sheet.png")
        done = self.main("--checkpoint", self.checkpoint, "--show", self.folder / "sheet.png", self.digit)
        self.assertEqual(done.code, 1)
        self.assertRegex(done.err, r"\Aerror: [^\n]*No space left on device; make room or permit it\n\Z")

    def test_help_says_every_default(self) -> None:
        done = self.main("--help")
        self.assertEqual(done.code, 0)
        listed = " ".join(done.out.partition("positional arguments:")[2].split())
        listed = listed.replace("--invert, --no-invert", "--invert").replace("with --no-invert", "")
        options = [part for part in listed.split(" --")[1:] if not part.startswith(("help", "version"))]
        self.assertGreater(len(options), 10)
        for option in options:
            self.assertIn("default", option)

    def test_without_pillow(self) -> None:
        with mock.patch.dict(sys.modules, {"PIL": None}):
            self.assertIn("pip install torchvision",
                          self.refused("--checkpoint", self.checkpoint, self.digit, code=3))  # fmt: skip

    def test_slow_imports_are_late(self) -> None:
        names: set[str] = set()
        for node in ast.parse(SCRIPT.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).split(".")[0])
        self.assertIn("torch", names)
        self.assertEqual(names & {"PIL", "torchvision", "numpy", "onnxruntime"}, set())

    def test_as_a_program_from_another_directory(self) -> None:
        command = [sys.executable, str(SCRIPT), "--checkpoint", str(self.checkpoint), "digit.png", "é.png"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
        shutil.copy(self.digit, self.folder / "é.png")
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=120, env=environment)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual([row.split()[:2] for row in done.stdout.splitlines()[1:]],
                         [["digit.png", self.label], [r"\xe9.png", self.label]])  # fmt: skip


if __name__ == "__main__":
    unittest.main()
