"""scripts/data_demo.py: all of it passes, covers D1 to D8, writes where it is told, and turns red for wrong values."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch.utils.data import DataLoader

from torchbasics import data

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = str(ROOT / "scripts")
IDS = {f"D{number}" for number in range(1, 9)}

demo: ModuleType


def setUpModule() -> None:
    """Import the script by its name, as a spawned worker does; last on the path: scripts/profile.py hides another."""
    global demo
    sys.path.append(SCRIPTS)
    demo = importlib.import_module("data_demo")


def tearDownModule() -> None:
    sys.path.remove(SCRIPTS)
    sys.modules.pop("data_demo", None)


class DemoTest(unittest.TestCase):
    def setUp(self) -> None:
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.folder = Path(self.temporary.name)
        # what the demo puts into the temporary folder by default shows up here
        environment = mock.patch.object(tempfile, "tempdir", str(self.folder))
        environment.start()
        self.addCleanup(environment.stop)

    def run_demo(self, *arguments: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = demo.main(["--device", "cpu", *arguments])
            except SystemExit as stop:  # argparse
                code = int(stop.code or 0)
        return code, out.getvalue(), err.getvalue()

    def run_sections(self, *names: str, data_dir: str = "no-such-folder") -> tuple[int, list[dict]]:
        selection = [part for name in names for part in ("--section", name)]
        code, out, _ = self.run_demo("--json", "--data-dir", data_dir, *selection)
        return code, json.loads(out)["sections"]


class WholeDemo(DemoTest):
    def test_every_section_passes_and_files_are_written_under_output_only(self) -> None:
        output = self.folder / "new" / "images"
        code, out, err = self.run_demo("--output", str(output), "--data-dir", str(self.folder / "none"))
        self.assertEqual(code, 0, out)
        self.assertNotIn("ResourceWarning", err)
        written = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
        photos = {f"photos/{shape}/{number}.png" for shape in ("circle", "square") for number in range(3)}
        damaged = {f"damaged/circle/{number}.png" for number in range(3)}
        self.assertEqual(
            {name.replace(os.sep, "/") for name in written}, photos | damaged | {"transforms.png", "pipeline.png"}
        )
        self.assertEqual([path.name for path in self.folder.iterdir()], ["new"])
        self.assertIn(str(output / "transforms.png"), out)
        for name in ("MNIST", "FashionMNIST", "KMNIST", "cifar-10-batches-py"):
            self.assertRegex(out, rf"skipped: \S*\b{name}\b.* is not there; get it: python -c .*download=True")
        count = len(demo.section.sections)
        self.assertIn(f"{count - 4} of {count} sections passed, 4 skipped", out)
        self.assertTrue(out.endswith(f"\nimages are in {output}\n"), out[-300:])
        self.assertEqual(multiprocessing.active_children(), [])

    def test_images_stay_in_a_temporary_folder_that_is_named(self) -> None:
        code, out, _ = self.run_demo("--section", "images.folder", "--section", "transforms.grid")
        self.assertEqual(code, 0, out)
        [folder] = self.folder.iterdir()
        self.assertTrue(out.endswith(f"\nimages are in {folder}\n"), out[-300:])
        self.assertIn(f"written: {folder / 'transforms.png'}", out)
        self.assertTrue((folder / "transforms.png").is_file() and (folder / "photos" / "circle" / "0.png").is_file())
        _, out, _ = self.run_demo("--json", "--section", "images.folder")
        [other] = set(self.folder.iterdir()) - {folder}
        self.assertEqual(json.loads(out)["notes"], [f"images are in {other}"])

    def test_without_images_no_folder_is_made(self) -> None:
        for arguments in (["--list"], ["--section", "split.random"], ["--help"], ["--no-such-option"]):
            self.run_demo(*arguments)
            self.assertEqual(list(self.folder.iterdir()), [], arguments)


class Options(DemoTest):
    def test_list_names_every_id_and_invents_none(self) -> None:
        code, out, _ = self.run_demo("--list")
        self.assertEqual(code, 0)
        rows = [line.split() for line in out.splitlines()]
        self.assertEqual({word for row in rows for word in row[1:] if word[0] == "D" and word[1:].isdigit()}, IDS)
        for row in rows:
            self.assertRegex(row[0], r"^[a-z]+\.[a-z0-9_]+$")
            self.assertIn(row[1], IDS)

    def test_sections_are_one_sentence_each(self) -> None:
        for name, section in demo.section.sections.items():
            with self.subTest(name):
                self.assertTrue(section.function.__doc__.endswith("."))
                self.assertNotIn("\n", section.function.__doc__)

    def test_bad_arguments_exit_2(self) -> None:
        file = self.folder / "file"
        file.touch()
        for arguments, said in (
            (["--section", "collate.paddin"], "collate.padding"),
            (["--output", str(file)], "is not a folder"),
            (["--output", str(file / "below")], "is not a folder"),
            (["--outptu", "x"], "--outptu"),
            (["--output"], "--output"),
            (["--outp", "x"], "--outp"),
            (["--data", "x"], "--data"),
        ):
            with self.subTest(arguments):
                code, out, err = self.run_demo(*arguments)
                self.assertEqual((code, out), (2, ""))
                self.assertRegex(err, rf"\Aerror: .*{re.escape(said)}.*\n\Z")

    def test_help_tells_of_its_own_options(self) -> None:
        code, out, _ = self.run_demo("--help")
        self.assertEqual(code, 0)
        for word in ("--output", "--data-dir", "--section", "default: ./data"):
            self.assertIn(word, out)


class WrongValues(DemoTest):
    """The demo compares with what it knows: spoil what it shows, and the section must fail."""

    def assert_fails(self, section: str, said: str) -> None:
        code, [result] = self.run_sections(section)
        self.assertEqual((code, result["passed"]), (1, False))
        self.assertIn(said, result["error"])

    def test_padding(self) -> None:
        def at_the_front(samples: list, padding_value: float = 0.0) -> tuple:
            padded, lengths, targets = data.pad_collate(samples)
            rows = [row.roll(len(row) - int(length)) for row, length in zip(padded, lengths, strict=True)]
            return torch.stack(rows), lengths, targets

        with mock.patch.object(demo, "pad_collate", at_the_front):
            self.assert_fails("collate.padding", "padded (B, longest)")

    def test_split_with_a_sample_twice(self) -> None:
        def overlapping(dataset: object, *_: object, **__: object) -> list:
            parts = [range(80), range(80, 90), range(89, 99)]
            return [torch.utils.data.Subset(dataset, list(part)) for part in parts]  # type: ignore[arg-type]

        with mock.patch.object(demo, "random_split", overlapping):
            self.assert_fails("split.random", "each sample in exactly one part")

    def test_evaluation_pipeline(self) -> None:
        real = demo.get_transforms
        with mock.patch.object(demo, "get_transforms", lambda train, size=224: real(True, size)):
            self.assert_fails("transforms.pipelines", "evaluation twice")

    def test_constants(self) -> None:
        with mock.patch.object(demo, "channel_statistics", lambda images: ((0.25,), (0.5,))):
            self.assert_fails("builtin.constants", "standard deviation")

    def test_an_error_that_is_not_the_truncated_image(self) -> None:
        """Other words than PIL's own, or the file's name in them: either would make the lesson wrong."""
        from torchvision import datasets

        for said, missed in (("cannot identify", "truncated"), ("1.png is truncated", "does the message name")):
            with mock.patch.object(datasets.ImageFolder, "__getitem__", side_effect=OSError(said)):
                self.assert_fails("images.bad", missed)

    def test_flips_that_do_not_mirror(self) -> None:
        from torchvision.transforms import v2

        with mock.patch.object(v2, "RandomHorizontalFlip", v2.RandomVerticalFlip):
            self.assert_fails("transforms.flip", "left to right")

    def test_tensor_loader(self) -> None:
        real = demo.tensor_loader

        def shuffled(dataset: object, batch_size: int, **kwargs: object) -> object:
            return real(dataset, batch_size, **{**kwargs, "shuffle": True})

        with mock.patch.object(demo, "tensor_loader", shuffled):
            self.assert_fails("speed.same_samples", "in order: targets equal")


class DatasetsOnDisk(DemoTest):
    """Data sets in the right format with other content: all but the published constants can be checked."""

    def write_idx(self, name: str) -> None:
        raw = self.folder / name / "raw"
        raw.mkdir(parents=True)
        for part, count in (("train", 60_000), ("t10k", 10_000)):
            pixels = bytes(range(256)) * (count * 784 // 256)
            (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 28, 28) + pixels)
            labels = bytes(range(10)) * (count // 10)
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels)

    def test_format_of_mnist(self) -> None:
        self.write_idx("KMNIST")
        code, [result] = self.run_sections("builtin.kmnist", data_dir=str(self.folder))
        self.assertEqual((code, result["error"], result["skipped"]), (0, None, None))
        values = {value["label"]: value["value"] for value in result["values"]}
        self.assertAlmostEqual(values["mean, and from the sum of x"][0], 0.5)
        # uniform on 0..255: variance (256^2 - 1) / 12
        self.assertAlmostEqual(values["deviation, and from the sum of x^2"][0], ((256**2 - 1) / 12) ** 0.5 / 255)

    def test_published_constants_are_compared(self) -> None:
        self.write_idx("FashionMNIST")
        code, [result] = self.run_sections("builtin.fashion_mnist", data_dir=str(self.folder))
        self.assertEqual(code, 1)
        self.assertIn("mean to 4 digits", result["error"])

    def test_damaged_file_is_named_and_incomplete_set_skipped(self) -> None:
        self.write_idx("KMNIST")
        images = self.folder / "KMNIST" / "raw" / "train-images-idx3-ubyte"
        with open(images, "r+b") as file:
            file.truncate(1000)
        code, [result] = self.run_sections("builtin.kmnist", data_dir=str(self.folder))
        self.assertEqual(code, 1)
        self.assertIn(str(images), result["error"])
        images.unlink()
        code, [result] = self.run_sections("builtin.kmnist", data_dir=str(self.folder))
        self.assertEqual((code, result["values"]), (0, []))
        self.assertIn(f"{images} is not there", result["skipped"])
        command = re.search(r"get it: python -c \"(.*)\"", result["skipped"])
        assert command is not None
        with mock.patch("torchvision.datasets.KMNIST") as kmnist:  # the command, without its network
            exec(command[1], {})
        kmnist.assert_called_once_with(str(self.folder), download=True)

    def test_cifar(self) -> None:
        """torchvision's own class over plain pictures; its check sums hold for no other files, so none are read."""
        import numpy as np
        from torchvision import datasets

        class Stand(datasets.CIFAR10):
            def __init__(self, root: Path, train: bool) -> None:
                count = 50_000 if train else 10_000
                self.data = np.zeros((count, 32, 32, 3), dtype=np.uint8)
                for channel in range(3):  # one picture in 2, 4 and 5 has all of a colour
                    self.data[:: (2, 4, 5)[channel], ..., channel] = 255
                self.targets, self.transform, self.target_transform = list(range(10)) * (count // 10), None, None

        (self.folder / datasets.CIFAR10.base_folder).mkdir()
        published = {"cifar-10": ((0.5, 0.25, 0.2), (0.5, 0.4330, 0.4))}  # p and sqrt(p (1 - p))
        with mock.patch.object(datasets, "CIFAR10", Stand), mock.patch.object(demo, "PUBLISHED", published):
            code, [result] = self.run_sections("builtin.cifar10", data_dir=str(self.folder))
        self.assertEqual((code, result["error"]), (0, None))
        self.assertEqual(len(result["values"]), 7)


class Lessons(DemoTest):
    def test_why_digits_and_letters_must_not_be_flipped(self) -> None:
        _, [result] = self.run_sections("transforms.flip")
        values = {value["label"]: value["value"] for value in result["values"]}
        self.assertIs(values["a mirrored 2 of seven segments is a 5"], True)
        self.assertIs(values["a mirrored b is a d, upside down a p"], True)
        doc = demo.section.sections["transforms.flip"].summary
        self.assertRegex(doc, "label.* digits and letters")

    def test_the_truncated_image(self) -> None:
        _, [result] = self.run_sections("images.bad")
        values = {value["label"]: value["value"] for value in result["values"]}
        self.assertRegex(values["ImageFolder: which file?"], "OSError: .*truncated")
        self.assertIs(values["does the message name 1.png?"], False)


class OtherPlaces(DemoTest):
    def test_copied_into_a_folder_without_a_parent(self) -> None:
        source = (ROOT / "scripts" / "data_demo.py").read_text(encoding="utf-8")
        names = {"__name__": "copied", "__file__": str(Path("/data_demo.py").resolve())}
        exec(compile(source, names["__file__"], "exec"), names)
        self.assertIn("main", names)

    def test_copied_beside_the_package_with_spawned_workers(self) -> None:
        copy = self.folder / "copy"
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "torchbasics", copy / "torchbasics", ignore=ignore)
        (copy / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "data_demo.py", copy / "scripts")
        environment = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(copy / "scripts" / "data_demo.py"), "--section", "loader.start_methods"]
        run = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120)
        self.assertEqual((run.returncode, run.stderr), (0, ""), run.stdout)
        self.assertIn("started by spawn", run.stdout)

    def test_iterable_dataset_is_whole_for_any_number_of_workers(self) -> None:
        for workers in (0, 1, 2):
            samples = torch.cat(list(DataLoader(demo.Numbers(11), batch_size=2, num_workers=workers)))
            self.assertEqual(sorted(samples.tolist()), list(range(11)), workers)


if __name__ == "__main__":
    unittest.main()
