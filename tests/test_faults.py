"""A small sample of the faults that `python -m tests.faults --full` injects into real training runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unittest

from .common import ROOT

ROWS = ["kill", "save-kill", "save-fail", "damage", "foreign", "signal", "worker", "rank", "together"]


@unittest.skipUnless(sys.platform.startswith("linux"), "faults are injected through Linux's own means")
class Faults(unittest.TestCase):
    def test_no_fault_of_the_sample_changes_where_a_run_ends(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        rows = re.findall(r"^(\S+) +.+? +(\d+) +(\d+) +[\d.]+$", done.stdout, re.MULTILINE)
        self.assertEqual([name for name, _, _ in rows], ROWS, done.stdout)
        for name, faults, failures in rows:
            self.assertGreater(int(faults), 0, name)
            self.assertEqual(int(failures), 0, name)


if __name__ == "__main__":
    unittest.main()
