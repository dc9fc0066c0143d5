"""scripts/data_demo.py: it passes, writes where it is told, and turns red for wrong values."""

from __future__ import annotations

import importlib
import json
import struct
import sys
import tempfile
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from torch.utils.data import Subset

from tests.common import SCRIPTS, run_main

demo: ModuleType


def setUpModule() -> None:
    """Import the script by its name, as a spawned worker does; last on the path: scripts/profile.py hides another."""
    global demo
    sys.path.append(str(SCRIPTS))
    demo = importlib.import_module("data_demo")


def tearDownModule() -> None:
    sys.path.remove(str(SCRIPTS))
    sys.modules.pop("data_demo", None)


class DataDemo(unittest.TestCase):
    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        # What the demo puts into the temporary folder by default shows up here.
        environment = mock.patch.object(tempfile, "tempdir", str(self.folder))
        environment.start()
        self.addCleanup(environment.stop)

    def run_section(self, name: str) -> tuple[int, dict[str, Any]]:
        argv = ("--device", "cpu", "--json", "--data-dir", str(self.folder), "--section", name)
        code, out, _ = run_main(demo.main, *argv)
        return code, json.loads(out)["sections"][0]

    def test_all_passes_and_files_are_written_under_output_only(self) -> None:
        output = self.folder / "new" / "images"
        argv = ("--device", "cpu", "--output", str(output), "--data-dir", str(self.folder / "none"))
        code, out, _ = run_main(demo.main, *argv)
        self.assertEqual(code, 0, out)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["new"])
        self.assertLessEqual({"transforms.png", "pipeline.png", "photos"}, {path.name for path in output.iterdir()})
        for name in ("MNIST", "FashionMNIST", "KMNIST", "cifar-10-batches-py"):
            self.assertRegex(out, rf"skipped: \S*\b{name}\b.* is not there; get it: python -c .*download=True")
        self.assertIn(" 4 skipped", out)
        self.assertTrue(out.endswith(f"\nimages are in {output}\n"), out[-300:])

    def test_images_stay_in_a_temporary_folder_that_is_named(self) -> None:
        _, out, _ = run_main(demo.main, "--device", "cpu", "--section", "split.random")
        self.assertEqual(list(self.folder.iterdir()), [])  # no image, no folder
        _, out, _ = run_main(demo.main, "--device", "cpu", "--section", "images.folder")
        [folder] = self.folder.iterdir()
        self.assertTrue(out.endswith(f"\nimages are in {folder}\n"), out[-300:])
        self.assertTrue((folder / "photos" / "circle" / "0.png").is_file())

    def test_an_output_that_cannot_be_a_folder_is_one_line_and_exit_code_2(self) -> None:
        (self.folder / "file").touch()
        code, out, err = run_main(demo.main, "--output", str(self.folder / "file" / "below"))
        self.assertEqual((code, out, err.count("\n")), (2, "", 1))
        self.assertIn("is not a folder", err)

    def test_a_wrong_value_gives_exit_code_1(self) -> None:
        def overlapping(dataset: Any, *_: Any, **__: Any) -> list[Subset]:
            return [Subset(dataset, list(part)) for part in (range(80), range(80, 90), range(89, 99))]

        transforms = demo.get_transforms
        for name, wrong, section, words in (
            ("random_split", overlapping, "split.random", "each sample in exactly one part"),
            ("get_transforms", lambda train: transforms(True), "transforms.pipelines", "evaluation twice"),
            ("channel_statistics", lambda images: ((0.25,), (0.5,)), "builtin.constants", "standard deviation"),
            ("get_worker_info", lambda: None, "dataset.iterable_workers", "how often each"),
        ):
            with self.subTest(section), mock.patch.object(demo, name, wrong):
                code, result = self.run_section(section)
                self.assertEqual((code, result["passed"]), (1, False))
                self.assertIn(words, result["error"])

    def test_a_data_set_on_disk_is_checked_and_a_damaged_file_named(self) -> None:
        raw = self.folder / "KMNIST" / "raw"
        raw.mkdir(parents=True)
        for part, count in (("train", 60_000), ("t10k", 10_000)):
            pixels = bytes(range(256)) * (count * 784 // 256)
            (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 28, 28) + pixels)
            labels = bytes(range(10)) * (count // 10)
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels)
        code, result = self.run_section("builtin.kmnist")
        self.assertEqual((code, result["error"], result["skipped"]), (0, None, None))
        images = raw / "train-images-idx3-ubyte"
        images.write_bytes(images.read_bytes()[:1000])
        code, result = self.run_section("builtin.kmnist")
        self.assertEqual(code, 1)
        self.assertIn(str(images), result["error"])


if __name__ == "__main__":
    unittest.main()
