"""Injects every fault of the matrix and prints a table of what came of it.

    python -m tests.faults --full
    python -m tests.faults --quick
    python -m tests.faults --row 3 --row 8

A count is the number of faults injected; a failure is a run that ended otherwise than the undisturbed one, or a file,
message or exit code that is not as it must be. Exit code 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork has no threads but one; before torch is imported

import torch

from tests.faults import files, kills, runs, saves
from tests.faults.runs import Row

ROWS: dict[int, tuple[str, Callable[[Row], None]]] = {
    1: ("SIGKILL at a random step or time", kills.killed_and_resumed),
    2: ("20 kills within one run", kills.killed_many_times),
    3: ("SIGKILL before each system call of a save", saves.killed_in_a_save),
    4: ("ENOSPC, EIO, full file systems, RLIMIT_FSIZE", saves.failing_saves),
    5: ("newest checkpoint truncated or replaced", saves.damaged),
    6: ("single bits flipped", saves.flipped_bits),
    7: ("keys, shapes, NaN, model, future format", saves.of_something_else),
    8: ("hostile files", files.hostile),
    9: ("SIGTERM and SIGINT, once and twice", kills.signalled),
    10: ("a loader's worker killed, its parent killed", kills.workers_killed),
    11: ("20 starts at once on one directory", kills.started_together),
    12: ("no room, rights, memory or descriptors", kills.too_little),
    13: ("IDX files damaged; also under python -O", files.damaged_data),
    14: ("images cut, empty, huge, odd; links, pipes", files.bad_images),
    15: ("NaN and Inf in batch, loss, metric, gradient", files.not_finite),
    16: ("clock a year off, equal file times", kills.clock_set),
    17: ("8 downloads at once, lying server", files.downloads),
    18: ("names: HTML, ANSI, newlines, not UTF-8", files.strange_names),
}


def work_folder() -> Path:
    """In memory where there is some: a killed process loses nothing that it wrote, on whatever file system."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30
    return Path(tempfile.mkdtemp(prefix="faults-", dir=memory if roomy else None))


def run_row(number: int, quick: bool, seed: int, folder: Path) -> Row:
    """One row, whatever it raises."""
    fault, function = ROWS[number]
    row = Row(number, fault, seed + number, quick, folder / str(number))
    row.folder.mkdir()
    began = time.monotonic()
    try:
        function(row)
    except Exception:
        row.failures.append("the row itself failed: " + traceback.format_exc())
    finally:
        runs.end_children()
        row.seconds = time.monotonic() - began
        shutil.rmtree(row.folder, ignore_errors=True)
    return row


def print_rows(rows: list[Row]) -> None:
    """The table."""
    print("\nrow  fault                                          count  failures  seconds  seed")
    for row in rows:
        print(f"{row.number:3}  {row.fault:45}  {row.count:5}  {len(row.failures):8}  {row.seconds:7.1f}  {row.seed:4}")
        for reason in row.skipped:
            print(f"     skipped: {reason}")
    failures, count = sum(len(row.failures) for row in rows), sum(row.count for row in rows)
    print(f"all  {'':45}  {count:5}  {failures:8}  {sum(row.seconds for row in rows):7.1f}")


def main() -> int:
    """Returns 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the whole matrix: minutes (default: off)")
    parser.add_argument("--quick", action="store_true", help="a sample of every row: seconds (default: off)")
    parser.add_argument("--row", type=int, action="append", choices=sorted(ROWS), help="this row (default: all)")
    parser.add_argument("--seed", type=int, default=700, help="added to the row's number (default: 700)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON (default: off)")
    args = parser.parse_args()
    if not (args.full or args.quick or args.row):
        parser.error("give --full, --quick or --row N")
    torch.set_num_threads(1)
    runs.prepare()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder, rows = work_folder(), []
    try:
        for number in sorted(args.row or ROWS):
            rows.append(run_row(number, args.quick, args.seed, folder))
            for failure in rows[-1].failures:
                print(f"row {number}: {failure}", file=sys.stderr, flush=True)
            print(f"row {number}: {rows[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    finally:
        runs.end_children()
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        names = ("number", "fault", "seed", "count", "seconds", "failures", "skipped")
        print(json.dumps([{name: getattr(row, name) for name in names} for row in rows]))
    else:
        print_rows(rows)
    return int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())
