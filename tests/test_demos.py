"""The demos: every lesson is right, and every coverage ID has one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import torchbasics as tb
from tests.common import ROOT, SCRIPTS, load_script, run_main

CPU = ("--device", "cpu")
COVERS = {
    "tensor": {f"T{number}" for number in range(1, 14)},
    "autograd": {f"A{number}" for number in range(1, 11)},
    "nn": {f"N{number}" for number in range(1, 12)} | {"M1", "M2", "M3", "M4", "M5", "L14", "P4", "W7"},
    "data": {f"D{number}" for number in range(1, 9)} | {"M6"},
    "amp": {"P1"},
}


class Demos(unittest.TestCase):
    def check_list(self, name: str) -> int:
        """Check that `--list` has all coverage IDs and no other, and return the number of sections."""
        main = load_script(f"{name}_demo").main
        code, listed, _ = run_main(main, "--list")
        self.assertEqual(code, 0)
        ids: set[str] = set()
        for line in listed.splitlines():
            self.assertRegex(line, r"^[a-z]+\.\w+  +([A-Z]\d+ ?)+  +\S.*[.?]$")  # name, IDs, one sentence
            ids.update(re.split(r"  +", line)[1].split())
        self.assertEqual(ids, COVERS[name])
        return len(listed.splitlines())

    def check(self, name: str) -> None:
        sections, main = self.check_list(name), load_script(f"{name}_demo").main
        takes_device = name != "autograd"
        code, out, _ = run_main(main, *CPU if takes_device else ())
        self.assertEqual(code, 0, out[-2000:])
        self.assertIn(f"of {sections} sections passed", out)
        self.assertRegex(out, r"\nTry: .+(\n.+)*\n$")
        self.assertEqual([line for line in out.splitlines() if len(line) > 80], [])
        if torch.accelerator.is_available() and takes_device:
            code, out, _ = run_main(main)
            self.assertEqual(code, 0, out)

    def test_every_lesson_on_tensors_is_right(self) -> None:
        self.check("tensor")

    def test_every_lesson_on_autograd_is_right(self) -> None:
        self.check("autograd")

    def test_every_lesson_on_networks_is_right(self) -> None:
        self.check("nn")

    def test_a_lesson_on_networks_whose_subject_is_broken_turns_red(self) -> None:
        class Deaf(nn.GRU):
            def forward(self, x: Any, h: Any = None) -> Any:
                return super().forward(torch.zeros_like(x), h)

        class Alike(nn.Dropout2d):
            def forward(self, x: Any) -> Any:
                return super().forward(x[:1]).expand_as(x)

        def zeros(_: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 10)

        optim, main = torch.optim, load_script("nn_demo").main
        for owner, name, wrong, section, line in (
            (optim, "Adam", partial(optim.Adam, betas=(0.0, 0.1)), "optimizer.steps", r"descend\(torch.optim.Adam\)"),
            (optim, "AdamW", optim.SGD, "optimizer.steps", r"descend\(torch.optim.AdamW\)"),
            (optim, "AdamW", optim.SGD, "optimizer.decay", r"gradient=5.0\)"),
            (nn, "GRU", Deaf, "layer.recurrent", r"gru\(x\)"),
            (nn, "Dropout2d", Alike, "layer.dropout", r"unique\(dim=0\)\)"),
            (tb.MNISTNet, "forward", zeros, "model.package", r"check\(tb.MNISTNet\(\)"),
            (tb.SimpleNet, "forward", zeros, "model.package", r"model\(x\) - "),
        ):
            with self.subTest(section, name=name), mock.patch.object(owner, name, wrong):
                code, out, _ = run_main(main, *CPU, "--section", section)
                self.assertEqual(code, 1, out)
                self.assertRegex(out, rf"{line}[^✓✗]*✗ expected")

    def test_the_lessons_on_data_cover_all_ids(self) -> None:
        self.check_list("data")  # test_data_demo runs them, without a network

    def test_every_lesson_on_precision_is_right(self) -> None:
        self.check("amp")

    def test_a_lesson_alone_shows_what_it_shows_in_a_full_run(self) -> None:
        main = load_script("tensor_demo").main
        _, alone, _ = run_main(main, *CPU, "--section", "create.random")
        _, full, _ = run_main(main, *CPU)
        self.assertIn(alone.partition("\n1 of 1 sections")[0], full)

    def test_a_demo_runs_copied_beside_a_copy_of_the_package_and_leaves_nothing(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            project, elsewhere = Path(folder, "project"), Path(folder, "elsewhere")
            elsewhere.mkdir()
            shutil.copytree(ROOT / "torchbasics", project / "torchbasics", ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(SCRIPTS / "tensor_demo.py", project)
            command = [sys.executable, str(project / "tensor_demo.py"), *CPU, "--section", "create.lists"]
            environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            environment["PYTHONIOENCODING"] = "utf-8"
            done = subprocess.run(
                command, cwd=elsewhere, env=environment, capture_output=True, encoding="utf-8", timeout=120
            )
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertIn("    scalar = torch.tensor(7)\n", done.stdout)
            self.assertIn("1 of 1 sections passed", done.stdout)
            self.assertEqual(os.listdir(elsewhere), [])


if __name__ == "__main__":
    unittest.main()
