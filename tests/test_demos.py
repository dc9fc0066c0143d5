"""The demo scripts: every lesson is right, every coverage ID has one, and no lesson depends on another."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
CPU = ("--device", "cpu")


def load(name: str) -> ModuleType:
    """Import a script by its path, without putting scripts/ on the module path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, *argv: str) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = module.main(list(argv))
    return code, out.getvalue()


class DemoTests:
    """The checks of one demo; a test case below names the script, the IDs and the number of sections."""

    name: str
    ids: tuple[str, ...]
    sections: int
    module: ModuleType
    results: dict[str, Any]
    code: int

    @classmethod
    def setUpClass(cls) -> None:
        cls.module = load(cls.name)
        cls.code, out = run(cls.module, *CPU, "--json")
        cls.results = {section["name"]: section for section in json.loads(out)["sections"]}

    def test_every_lesson_is_right(self: Any) -> None:
        errors = {name: section["error"] for name, section in self.results.items() if not section["passed"]}
        self.assertEqual(errors, {})
        self.assertEqual(self.code, 0)
        self.assertEqual(len(self.results), self.sections)

    @unittest.skipUnless(torch.accelerator.is_available(), "needs an accelerator")
    def test_on_the_accelerator(self: Any) -> None:
        code, out = run(self.module)
        self.assertEqual(code, 0, out)

    def test_every_section_checks_something(self: Any) -> None:
        self.assertEqual([name for name, section in self.results.items() if not section["values"]], [])

    def test_coverage_ids_are_all_there_and_none_is_invented(self: Any) -> None:
        covered = [set(section["covers"]) for section in self.results.values()]
        self.assertEqual(set().union(*covered), set(self.ids))
        self.assertTrue(all(covered), "a section without an ID")
        code, listed = run(self.module, "--list")
        self.assertEqual(code, 0)
        self.assertEqual(set(re.findall(r"\b[A-Z]\d+\b", "\n".join(_ids_column(listed)))), set(self.ids))

    def test_names_and_docstrings(self: Any) -> None:
        for name, section in self.module.section.sections.items():
            self.assertRegex(name, r"^[a-z_]+\.[A-Za-z_]+$")
            doc = section.function.__doc__ or ""
            self.assertNotIn("\n", doc.strip(), name)
            self.assertTrue(doc.endswith("."), name)

    def test_sections_share_no_state(self: Any) -> None:
        """Alone and in reverse order, each section shows the same values as in the whole run."""
        for name in reversed(self.results):
            code, out = run(self.module, *CPU, "--json", "--section", name)
            self.assertEqual(code, 0, name)
            self.assertEqual(json.loads(out)["sections"], [self.results[name]], name)

    def test_global_state_is_unchanged(self: Any) -> None:
        rng = torch.get_rng_state()
        code, out = run(self.module, *CPU, "--seed", "3")
        self.assertEqual(code, 0, out)
        self.assertIn(f"{self.sections} of {self.sections} sections passed", out)
        self.assertTrue(out.isascii(), "output must print on every terminal")
        self.assertTrue(torch.equal(torch.get_rng_state(), rng))
        self.assertTrue(torch.is_grad_enabled())
        self.assertEqual(torch.get_default_dtype(), torch.float32)

    def test_a_typo_names_the_near_one(self: Any) -> None:
        first = next(iter(self.results))
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            code, _ = run(self.module, "--section", first + "x")
        self.assertEqual(code, 2)
        self.assertIn(f"did you mean {first}", err.getvalue())


def _ids_column(listed: str) -> list[str]:
    """Return the second column of --list: whatever stands between the name and the summary."""
    return [re.split(r"  +", line)[1] for line in listed.splitlines()]


class TensorDemo(DemoTests, unittest.TestCase):
    name = "tensor_demo"
    ids = tuple(f"T{i}" for i in range(1, 14))
    sections = 32


class AutogradDemo(DemoTests, unittest.TestCase):
    name = "autograd_demo"
    ids = tuple(f"A{i}" for i in range(1, 11))
    sections = 27


class NnDemo(DemoTests, unittest.TestCase):
    name = "nn_demo"
    ids = tuple(f"N{i}" for i in range(1, 12))
    sections = 40


class AnyPlace(unittest.TestCase):
    """As a program: from any directory, and copied beside a copy of the package; all are started at once."""

    folder: Path
    started: dict[str, subprocess.Popen]

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        copied = cls.folder / "project"
        copied.mkdir()
        shutil.copy(ROOT / "scripts" / "tensor_demo.py", copied)
        shutil.copytree(ROOT / "torchbasics", copied / "torchbasics", ignore=shutil.ignore_patterns("__pycache__"))
        cls.started = {}
        cls.start("bare", ROOT / "scripts" / "autograd_demo.py", *CPU, "--section", "slope.scalar")
        cls.start("left", ROOT / "scripts" / "tensor_demo.py", "--list")  # short: fails at the last flush
        cls.start("copied", copied / "tensor_demo.py", *CPU, "--section", "create.lists")
        cls.started["left"].stdout.close()  # type: ignore[union-attr]
        cls.started["left"].stdout = None

    @classmethod
    def start(cls, name: str, script: Path, *argv: str) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": ""}
        elsewhere = cls.folder / f"elsewhere-{name}"
        elsewhere.mkdir()
        process = subprocess.Popen(
            [sys.executable, str(script), *argv],
            cwd=elsewhere,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        cls.started[name] = process
        cls.addClassCleanup(process.communicate)
        cls.addClassCleanup(process.kill)

    def output(self, name: str) -> str:
        out, err = self.started[name].communicate(timeout=120)
        self.assertEqual(os.listdir(self.folder / f"elsewhere-{name}"), [])
        self.assertEqual(self.started[name].returncode, 0, err)
        return out

    def test_from_a_bare_checkout(self) -> None:
        self.assertIn("1 of 1 sections passed, 3 values checked", self.output("bare"))

    @unittest.skipUnless(os.name == "posix", "closes a pipe")
    def test_a_reader_that_leaves_early(self) -> None:
        _, err = self.started["left"].communicate(timeout=120)
        self.assertEqual((self.started["left"].returncode, err), (141, ""))

    def test_copied_beside_a_copy_of_the_package(self) -> None:
        self.assertIn("1 of 1 sections passed", self.output("copied"))


if __name__ == "__main__":
    unittest.main()
