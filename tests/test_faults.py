"""A quick sample of every row of the fault matrix; `python -m tests.faults --full` runs the whole of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROWS = range(1, 19)
found: dict[int, dict[str, Any]] = {}


def setUpModule() -> None:
    """The rows in two processes of their own, each half of the seconds: they fork their runs, which one that has
    trained must not."""
    if not sys.platform.startswith("linux"):
        raise unittest.SkipTest("faults are injected through Linux's own means")
    with contextlib.ExitStack() as stack:
        halves = [stack.enter_context(start(rows)) for rows in (ROWS[:8], ROWS[8:])]
        for process in halves:
            try:
                out, err = process.communicate(timeout=300)
            except subprocess.TimeoutExpired:
                for each in halves:
                    each.terminate()  # it ends its children, and removes its folder
                raise AssertionError(f"the sample hangs: {process.communicate(timeout=30)[1][-2000:]}") from None
            if not out:
                raise AssertionError(f"no result: {err[-2000:]}")
            found.update({row["number"]: row for row in json.loads(out)})


def start(rows: range) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults", "--quick", "--json", *(f"--row={number}" for number in rows)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class EveryRow(unittest.TestCase):
    def test_all_are_there(self) -> None:
        self.assertEqual(sorted(found), list(ROWS))


def add_test(number: int) -> None:
    """One test a row, so that each has its name in the report."""

    def test(self: unittest.TestCase) -> None:
        row = found[number]
        self.assertEqual(row["failures"], [], f"seed {row['seed']}: python -m tests.faults --quick --row {number}")
        if not row["count"]:
            self.assertTrue(row["skipped"], "nothing was injected")
            self.skipTest("; ".join(row["skipped"]))

    test.__doc__ = f"Row {number} of the matrix."
    setattr(EveryRow, f"test_row_{number:02}", test)


for _number in ROWS:
    add_test(_number)


if __name__ == "__main__":
    unittest.main()
