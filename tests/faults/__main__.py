"""Inject faults into real runs, and print a table of what came of it.

    python -m tests.faults                      # a sample of every row
    python -m tests.faults --full
    python -m tests.faults --full --row kill --row signal --seed 7

A failure is a run that ends differently from the undisturbed one, or a file, message or exit code that is not as it
must be, or a process that is left. Exit code 1 if there is any.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process with more threads cannot be forked

import torch

from . import files, kills, runs
from .runs import Row

ROWS: dict[str, tuple[str, Callable[[Row], None]]] = {
    "kill": ("SIGKILL at a random step or time", kills.killed),
    "save-kill": ("SIGKILL before each system call of a save", files.killed_in_a_save),
    "save-fail": ("full disk or I/O error in a save", files.failing_saves),
    "damage": ("bits flipped, files cut short", files.damaged),
    "foreign": ("checkpoints deleted, unrelated files", files.foreign),
    "signal": ("SIGTERM, SIGINT, SIGUSR1, once and twice", kills.signalled),
    "worker": ("a loader's worker or its parent killed", kills.workers),
    "rank": ("one of two processes killed", kills.ranks),
    "together": ("many starts at once", kills.together),
}


def run_row(name: str, full: bool, seed: int, folder: Path) -> Row:
    """Return the row after its faults, whatever they raise."""
    title, function = ROWS[name]
    row = Row(name, title, seed, full, folder / name)
    row.folder.mkdir()
    began = time.monotonic()
    try:
        function(row)
    except Exception:
        row.failures.append("the row itself failed: " + traceback.format_exc())
    finally:
        row.failures += runs.end_children()
        row.seconds = time.monotonic() - began
        shutil.rmtree(row.folder, ignore_errors=True)
    return row


def work_folder() -> Path:
    """Return a new folder, in memory if there is room: a kill loses nothing that was written, on any file system."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30
    return Path(tempfile.mkdtemp(prefix="faults-", dir=memory if roomy else None))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the whole matrix (default: a sample)")
    parser.add_argument("--row", action="append", choices=ROWS, help="only this row; repeat it for more (default: all)")
    parser.add_argument("--seed", type=int, default=7, help="which random faults (default: 7)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs.adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder, failed = work_folder(), False
    print(f"{'row':9}  {'fault':42}  faults  failures  seconds", flush=True)
    try:
        for name in args.row or ROWS:
            row = run_row(name, args.full, args.seed, folder)
            print(f"{name:9}  {row.title:42}  {row.count:6}  {len(row.failures):8}  {row.seconds:7.1f}", flush=True)
            for reason in row.skipped:
                print(f"           skipped: {reason}", flush=True)
            for failure in row.failures:
                print(f"{name}: {failure}", file=sys.stderr, flush=True)
            failed |= bool(row.failures) or not row.count
    finally:
        runs.end_children()
        shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
