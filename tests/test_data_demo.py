"""scripts/data_demo.py: it passes without a network, writes where it is told, and turns red for wrong values."""

from __future__ import annotations

import importlib
import multiprocessing.util
import sys
import tempfile
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.utils.data import Subset
from torchvision import datasets
from torchvision.transforms import v2

import torchbasics as tb
from tests.common import SCRIPTS, run_main

demo: ModuleType


def setUpModule() -> None:
    """Import the script by its name, as a spawned worker does; last on the path: scripts/profile.py hides another."""
    global demo
    multiprocessing.util.get_temp_dir()  # made now, not in the folder that a test removes
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
        offline = mock.Mock(side_effect=ConnectionError("no network here"))
        for patch in (
            mock.patch.object(tempfile, "tempdir", str(self.folder)),  # what stays behind shows up here
            mock.patch.object(tb, "load_images", offline),
            mock.patch.object(datasets, "CIFAR10", offline),
        ):
            patch.start()
            self.addCleanup(patch.stop)

    def run_section(self, name: str) -> tuple[int, str]:
        code, out, _ = run_main(demo.main, "--device", "cpu", "--section", name)
        return code, out

    def test_all_passes_without_a_network_and_leaves_nothing_but_the_output(self) -> None:
        output = self.folder / "new" / "pictures"
        code, out, _ = run_main(demo.main, "--device", "cpu", "--output", str(output))
        self.assertEqual(code, 0, out)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["new"])
        self.assertLessEqual({"transforms.png", "photos", "damaged"}, {path.name for path in output.iterdir()})
        self.assertIn("kmnist is not here: no network here", out)
        self.assertIn("skipped: not in data and not downloaded: no network here", out)
        wide = [line for line in out.splitlines() if len(line) > 80 and "written: " not in line]  # paths may be long
        self.assertEqual(wide, [])

    def test_pictures_go_to_a_temporary_folder_by_default(self) -> None:
        code, out = self.run_section("images.folder")
        self.assertEqual((code, list(self.folder.iterdir())), (0, []), out)

    def test_an_output_that_cannot_be_a_folder_is_one_line_and_exit_code_2(self) -> None:
        (self.folder / "file").touch()
        for argv, words in (
            (("--output", str(self.folder / "file" / "below")), str(self.folder / "file")),
            (("--output", "x" * 100_000), "File name too long"),
            (("--output", ""), "expected a path"),
            (("--data-dir=",), "expected a path"),
            (("--data-dir=--",), "expected a value"),
        ):
            with self.subTest(argv):
                code, out, err = run_main(demo.main, *argv, "--list")
                self.assertEqual((code, out, err.count("\n")), (2, "", 1))
                self.assertIn(words, err)
                self.assertLess(len(err), 200)

    def test_a_data_set_is_looked_for_in_data_dir_and_its_constants_are_checked(self) -> None:
        images = torch.zeros(60_000, 1, 28, 28, dtype=torch.uint8)
        images[:, :, :14] = 255  # half of the pixels are white: mean and deviation 0.5
        data = tb.Images(images, torch.zeros(60_000), ("a", "b"))

        def load(name: str, folder: Path, train: bool = True) -> tb.Images:
            self.assertEqual(folder, self.folder)
            return data if train else data.subset(slice(10_000))

        argv = ("--section", "builtin.mnist", "--data-dir", str(self.folder))
        with mock.patch.object(tb, "load_images", load):
            code, out, _ = run_main(demo.main, *argv)
        self.assertEqual(code, 1)  # these are not MNIST's
        self.assertIn("✗ expected (0.1307, 0.3081)", out)
        self.assertEqual(out.count("(0.5, 0.5)   ✓"), 3)  # as all pixels give them

    def test_a_damaged_data_set_fails_and_is_named(self) -> None:
        damaged = tb.DataError("train-images is damaged; delete the file")
        with mock.patch.object(tb, "load_images", side_effect=damaged):
            code, out = self.run_section("builtin.mnist")
        self.assertEqual(code, 1)
        self.assertIn("train-images is damaged", out)

    def test_a_lesson_whose_subject_is_broken_turns_red(self) -> None:
        def overlapping(dataset: Any, *_: Any, **__: Any) -> list[Subset]:
            return [Subset(dataset, list(part)) for part in (range(80), range(80, 90), range(89, 99))]

        def slow(loader: tb.TensorLoader) -> Iterator[Any]:
            for batch in iterate(loader):
                time.sleep(0.05)
                yield batch

        def unpadded(samples: Any, padding_value: float = 0.0) -> Any:
            (padded, lengths), targets = pad(samples)
            return (padded, lengths.new_full(lengths.shape, padded.shape[1])), targets

        def plain(train: bool) -> Any:
            pipeline = transforms(train)
            pipeline.transforms = [step for step in pipeline.transforms if not isinstance(step, v2.ColorJitter)]
            return pipeline

        def other_constants(train: bool) -> Any:
            pipeline = transforms(train)
            if train:
                pipeline.transforms[-1] = v2.Normalize([0.5] * 3, [0.5] * 3)
            return pipeline

        transforms, iterate, pad = tb.get_transforms, tb.TensorLoader.__iter__, tb.pad_collate
        for owner, name, wrong, section, line in (
            (demo, "random_split", overlapping, "split.random", r"everything == list\(range\(100\)\)"),
            (tb, "split_dataset", overlapping, "split.stratified", "counts"),
            (tb, "pad_collate", unpadded, "collate.padding", r"\(lengths, targets\)"),
            (tb, "get_transforms", lambda train: transforms(True), "transforms.pipelines", "torch.equal"),
            (tb, "get_transforms", plain, "transforms.pipelines", "names"),
            (tb, "get_transforms", other_constants, "transforms.pipelines", r"\(last.mean, last.std\)"),
            (tb, "channel_statistics", lambda _: ((0.25,), (0.5,)), "transforms.to_tensor", r"\(mean, std\)"),
            (demo, "get_worker_info", lambda: None, "dataset.iterable", r"\[batch.tolist\(\)"),
            (tb.TensorLoader, "__iter__", slow, "speed.tensor_loader", "speed_up > 10"),
        ):
            with self.subTest(section), mock.patch.object(owner, name, wrong):
                code, out = self.run_section(section)
                self.assertEqual(code, 1, out)
                self.assertRegex(out, rf"{line}[^✓✗]*✗ expected")

    def test_pinned_memory_is_used_where_there_is_a_gpu_and_else_said_to_be_skipped(self) -> None:
        code, out = self.run_section("loader.pin_memory")
        self.assertEqual(code, 0, out)
        self.assertEqual("pin_memory was not run" in out, not torch.cuda.is_available())


if __name__ == "__main__":
    unittest.main()
