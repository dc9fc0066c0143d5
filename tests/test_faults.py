"""A small sample of the faults that `python -m tests.faults --full` injects into real training runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unittest

from .common import ROOT

# The names that the table must have.
ROWS = ("kill", "save-kill", "save-fail", "damage", "foreign", "signal", "worker", "rank", "together")
# A harness that cannot fail proves nothing: a package with a fault of its own must not pass.
SABOTAGE = """
import sys
from torchbasics import checkpoint
{sabotage}
from tests.faults import __main__
sys.exit(__main__.main())
"""


def inject(*argv: str, sabotage: str = "") -> subprocess.CompletedProcess:
    """Return the ended process of `tests.faults` with these options, in a package that `sabotage` has changed."""
    command = [sys.executable, "-m", "tests.faults", *argv]
    if sabotage:
        command[1:3] = ["-c", SABOTAGE.format(sabotage=sabotage)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@unittest.skipUnless(sys.platform.startswith("linux"), "faults are injected through Linux's own means")
class Faults(unittest.TestCase):
    def test_no_fault_of_the_sample_changes_where_a_run_ends(self) -> None:
        done = inject()
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        rows = re.findall(r"^(\S+) +.+? +(\d+) +(\d+) +[\d.]+$", done.stdout, re.MULTILINE)
        self.assertEqual([name for name, _, _ in rows], list(ROWS), done.stdout)
        for name, faults, failures in rows:
            self.assertGreater(int(faults), 0, name)
            self.assertEqual(int(failures), 0, name)

    def test_a_package_that_does_not_check_its_seals_fails(self) -> None:
        done = inject("--row", "damage", sabotage="checkpoint._is_sealed = lambda file: True")
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn("torch has read it", done.stderr)


if __name__ == "__main__":
    unittest.main()
