"""The demo scripts on tensors, autograd and networks: every lesson is right. All demos: every coverage ID has one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch

from tests.common import ROOT, SCRIPTS, load_script, run_main

CPU = ("--device", "cpu")


class Demos(unittest.TestCase):
    def check(self, name: str) -> None:
        main, random_state = load_script(name).main, torch.get_rng_state()
        code, out, _ = run_main(main, *CPU, "--json")
        sections = json.loads(out)["sections"]
        self.assertEqual([(s["name"], s["error"]) for s in sections if not s["passed"] or not s["values"]], [])
        self.assertEqual((code, torch.equal(torch.get_rng_state(), random_state)), (0, True))
        code, out, _ = run_main(main, *CPU, "--json", "--section", sections[-1]["name"])
        self.assertEqual((code, json.loads(out)["sections"]), (0, sections[-1:]))  # alone it shows the same
        if torch.accelerator.is_available():
            code, out, _ = run_main(main)
            self.assertEqual(code, 0, out)

    def test_every_lesson_on_tensors_is_right(self) -> None:
        self.check("tensor_demo")

    def test_every_lesson_on_autograd_is_right(self) -> None:
        self.check("autograd_demo")

    def test_every_lesson_on_networks_is_right(self) -> None:
        self.check("nn_demo")

    def test_every_coverage_id_has_a_section_and_none_is_invented(self) -> None:
        for name, letter, count in (("tensor", "T", 13), ("autograd", "A", 10), ("nn", "N", 11), ("data", "D", 8)):
            code, listed, _ = run_main(load_script(f"{name}_demo").main, "--list")
            self.assertEqual(code, 0)
            ids: set[str] = set()
            for line in listed.splitlines():
                self.assertRegex(line, r"^[a-z]+\.\w+  +([A-Z]\d+ ?)+  +\S.*\.$")  # name, IDs, one sentence
                ids.update(re.split(r"  +", line)[1].split())
            self.assertEqual(ids, {f"{letter}{number + 1}" for number in range(count)})

    def test_a_demo_runs_copied_beside_a_copy_of_the_package_and_leaves_nothing(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            project, elsewhere = Path(folder, "project"), Path(folder, "elsewhere")
            elsewhere.mkdir()
            shutil.copytree(ROOT / "torchbasics", project / "torchbasics", ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(SCRIPTS / "tensor_demo.py", project)
            command = [sys.executable, str(project / "tensor_demo.py"), *CPU, "--section", "create.lists"]
            environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertIn("1 of 1 sections passed", done.stdout)
            self.assertEqual(os.listdir(elsewhere), [])


if __name__ == "__main__":
    unittest.main()
