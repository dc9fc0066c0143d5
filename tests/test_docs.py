"""The examples in the docstrings run and show what they say; the README's commands run, its file map is true."""

from __future__ import annotations

import contextlib
import doctest
import functools
import importlib
import importlib.util
import io
import os
import pkgutil
import re
import shlex
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

import torchbasics
from tests.scripts import load_script
from torchbasics.digits import draw_digits

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    """The doctests of every module of the package, beside this file's own tests."""
    for module in pkgutil.iter_modules(torchbasics.__path__, "torchbasics."):
        tests.addTests(doctest.DocTestSuite(importlib.import_module(module.name)))
    return tests


class Doctests(unittest.TestCase):
    def test_those_that_are_expected_are_found(self) -> None:
        finder = doctest.DocTestFinder(exclude_empty=True)
        for name in ("data", "device", "early_stopping"):
            found = [test for test in finder.find(importlib.import_module(f"torchbasics.{name}")) if test.examples]
            self.assertTrue(found, name)


@functools.cache  # a dozen commands draw the same ones
def few_digits(count: int, seed: int = 0, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return draw_digits(max(count // 50, 200), seed)


class Readme(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.folder)
        self.enterContext(mock.patch("torchbasics.digits.draw_digits", few_digits))
        self.enterContext(mock.patch("torchbasics.data.download_mnist", side_effect=ConnectionError("no network")))

    if not hasattr(unittest.TestCase, "enterContext"):  # Python 3.10

        def enterContext(self, manager: contextlib.AbstractContextManager) -> object:
            value = manager.__enter__()
            self.addCleanup(manager.__exit__, None, None, None)
            return value

    def run_main(self, name: str, *args: str) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(load_script(name).main(list(args)), 0, args)
        return out.getvalue()

    def test_every_command_runs(self) -> None:
        """Those of train_mnist, env_check and the demos run, made quick; the options of all others are understood."""
        commands = dict.fromkeys(re.findall(r"\bscripts/(\w+)\.py([^`\n&]*)", README))
        self.assertLessEqual({path.stem for path in (ROOT / "scripts").glob("*.py")}, {name for name, _ in commands})
        for name, options in commands:
            args = shlex.split(options)
            if name not in ("train_mnist", "env_check") and not name.endswith("_demo"):
                load_script(name).parse_args(args)  # ends the test if one is not understood
                continue
            if name == "amp_demo":
                args += ["--steps", "3", "--batch-size", "8"]
            elif name != "train_mnist":  # the demos and env_check run whole in their own tests
                args.append("--quick" if name == "env_check" else "--list")
            elif "--resume" in args:
                quick = ["--epochs", "1", "--limit-batches", "2", "--val-size", "100"]
                self.run_main("train_mnist", *quick, "--output", args[-1])
            elif "--dry-run" not in args:
                args.append("--dry-run")
            if "folder" in args:
                self.write_photos(Path(args[args.index("--data-dir") + 1]))
            if name == "train_mnist" and "--resume" not in args:
                args += ["--val-size", "2", "--batch-size", "4"]
            with self.subTest(name, args=args):
                self.assertTrue(self.run_main(name, *args))

    def write_photos(self, folder: Path) -> None:
        from PIL import Image

        for name in ("cat", "dog"):
            (folder / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (70, 50), (i * 20, 100, 200)).save(folder / name / f"{i}.png")

    def test_the_python_examples_run(self) -> None:
        blocks = re.findall(r"```python\n(.*?)```", README, re.S)
        self.assertTrue(blocks)
        for block in blocks:
            names: dict = {}
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block, "README.md", "exec"), names)
            self.assertEqual(len(names["history"]["train_loss"]), 2)
            self.assertGreater(names["history"]["train_acc"][-1], names["history"]["train_acc"][0])

    def test_the_file_map_names_every_module(self) -> None:
        named = set(re.findall(r"^\| `(\w+)\.py` \|", README, re.M))
        self.assertEqual(named, {path.stem for path in (ROOT / "torchbasics").glob("*.py")} - {"__init__"})

    def test_links_lead_somewhere(self) -> None:
        for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
            self.assertTrue((ROOT / target).is_file(), target)


if __name__ == "__main__":
    unittest.main()
