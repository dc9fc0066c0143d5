"""docs/your-own-data.md is true: each of its diffs applies to scripts/train_folder.py, and what it shows learns."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

import torch

from torchbasics import cli

from .common import ROOT, SCRIPTS, run_main

PAGE = (ROOT / "docs" / "your-own-data.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, re.S)
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def apply(diff: str, text: str) -> str:
    """Return `text` with each hunk's old lines, which must be there once, replaced by its new lines."""
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        if text.count(old) != 1:
            raise AssertionError(f"found {text.count(old)} times:\n{old}")
        text = text.replace(old, new)
    return text


class YourOwnData(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        self.addCleanup(torch.set_rng_state, torch.get_rng_state())
        self.addCleanup(sys.path.remove, folder.name)
        os.chdir(folder.name)
        sys.path.insert(0, folder.name)

    def train(self, number: int, *argv: Any) -> tuple[int, str, str]:
        """Apply the diff of that number and train; return (exit code, stdout, stderr)."""
        diff = DIFFS[number]
        self.assertLessEqual(len(re.findall(r"^[+-]", diff, re.M)), 15)
        Path("changed.py").write_text(apply(diff, (SCRIPTS / "train_folder.py").read_text(encoding="utf-8")), "utf-8")
        spec = importlib.util.spec_from_file_location("changed", "changed.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        before = list(sys.path)
        spec.loader.exec_module(module)
        sys.path[:] = before
        small = ("--workers", 0, "--threads", 1, "--device", "cpu", "--precision", "fp32", "--lr", 0.01)
        return run_main(lambda words: cli.run(module.main, words), *map(str, (*argv, *small)))

    def accuracy(self, number: int, *argv: Any) -> float:
        """Apply the diff of that number, train, and return the accuracy on the test set."""
        code, out, err = self.train(number, *argv)
        self.assertEqual((code, err), (0, ""))
        self.assertEqual("predict:" in out, number != 2)  # predict.py can read images only
        found = re.search(r"test ([\d.]+)%", out)
        assert found is not None
        return float(found[1])

    def test_images_from_a_table(self) -> None:
        from PIL import Image

        with open("images.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["file", "class"])
            for i in range(40):
                name, colour = ("red", (255, i, 0)) if i % 2 else ("blue", (0, i, 255))
                Image.new("RGB", (20, 20), colour).save(f"{i}.png")
                table.writerow([f"{i}.png", name])
        options = ("--model", "fastnet", "--image-size", 16, "--epochs", 3, "--batch-size", 8)
        self.assertEqual(self.accuracy(0, "images.csv", *options), 100)
        Path("parts.csv").write_text("file,class,part\n0.png,blue,train\n1.png,red,valid\n", "utf-8")
        code, _, err = self.train(0, "parts.csv", *options)
        self.assertEqual(code, 2)
        self.assertRegex(err, r"^error: 1.png: its part is 'valid'; beside train there may be val and test only\n$")

    def test_tensors(self) -> None:
        targets = torch.arange(60) % 3
        inputs = torch.rand(60, 3, 8, 8)
        inputs[torch.arange(60), targets] += 2
        torch.save({"inputs": inputs, "targets": targets, "classes": ["low", "middle", "high"]}, "data.pt")
        self.assertEqual(self.accuracy(1, "data.pt", "--model", "simplenet", "--epochs", 20, "--batch-size", 8), 100)

    def test_text(self) -> None:
        words = {"de": "der die und nicht ist zu", "en": "the of and not is to"}
        lines = [f"{label}\t{' '.join(words[label].split()[: 2 + i % 5])} {i}" for i in range(40) for label in words]
        Path("lines.txt").write_text("\n".join(lines), "utf-8")
        Path("text_model.py").write_text(PROGRAMS[0], "utf-8")
        self.addCleanup(sys.modules.pop, "text_model", None)
        self.assertEqual(self.accuracy(2, "lines.txt", "--epochs", 15, "--batch-size", 8, "--output", "run"), 100)
        self.assertNotIn("model", json.loads(Path("run/run.json").read_text("utf-8")))  # it is not smallvgg

    def test_the_program_for_a_table_of_numbers_learns(self) -> None:
        torch.manual_seed(0)
        self.assertEqual(len(PROGRAMS[1].splitlines()), 12)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(PROGRAMS[1], {})
        *epochs, last = out.getvalue().splitlines()
        self.assertEqual(len(epochs), 20)
        self.assertLess(float(last.rpartition(" ")[2]), 2)  # guessing the mean gives 11.8


if __name__ == "__main__":
    unittest.main()
