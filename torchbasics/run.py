"""The directory of one training run, and what a run prints: a table with a row for each epoch, and a progress line.

    with RunDirectory(args.output, name="mnist") as run:
        run.write_info(command=sys.argv, options=vars(args))
        trainer = Trainer(model, criterion, optimizer, checkpoint_dir=run.checkpoints)
        run.watch(trainer, args.epochs, train_loader)
        trainer.fit(train_loader, val_loader, args.epochs, verbose=False)
"""

from __future__ import annotations

import datetime
import errno
import json
import math
import os
import shutil
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from .checkpoint import load_latest, make_folder, remove_unfinished, saved_steps, write_durably
from .cli import printable
from .evaluation import is_classification, length


class RunDirectory:
    """The directory of a run: `run.json`, `metrics.jsonl`, `checkpoints/`. Only one process at a time can use it.

    Without `path` a new one is made, runs/NAME-YYYYMMDD-HHMMSS; the second of two starts in one second takes the next
    name. A `path` that exists must be empty, with `resume` it must hold checkpoints. `restart` is for the next attempt
    of a job whose first attempt made `path`: it continues there, whatever was saved. Raises ValueError if it cannot.
    """

    def __init__(
        self, path: str | os.PathLike | None = None, *, name: str = "run", resume: bool = False, restart: bool = False
    ) -> None:
        if path is None and (resume or restart):
            raise ValueError("which run should be continued? give its directory, as --resume DIR")
        self.info: dict[str, Any] = {}
        self.path = _make_new(name) if path is None else Path(path)
        self.checkpoints = self.path / "checkpoints"
        if path is not None and not restart:
            self._check(resume)
        make_folder(self.path)
        self._lock = _lock(self.path)
        try:
            if not restart:
                self._check(resume)  # again: another run may have come and gone in between
            remove_unfinished(self.path)
        except BaseException:
            self._lock.close()
            raise
        self._table: _Table | None = None

    def _check(self, resume: bool) -> None:
        if resume and not saved_steps(self.checkpoints):
            raise ValueError(f"{self.path}: no checkpoint to resume from; give the directory of an earlier run")
        if not resume and self.path.exists() and (not self.path.is_dir() or {*os.listdir(self.path)} - {".lock"}):
            raise ValueError(f"{self.path} exists; choose another --output, or continue that run with --resume")

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Release the directory."""
        if self._table is not None:
            self._table.clear_progress()
        self._lock.close()

    def write_info(self, **values: Any) -> None:
        """Add `values` to `self.info` and write that to `run.json`, with NaN as null and other objects as text."""
        self.info.update(values)
        self._write("run.json", json.dumps(_without_nan(self.info), indent=2, default=str) + "\n")

    def write_metrics(self, trainer: Any) -> None:
        """Make `metrics.jsonl` hold the finished epochs of `trainer`: one JSON object a line, without clock times."""
        rows = [
            {"epoch": i + 1, **{name: values[i] for name, values in trainer.history.items()}, **record}
            for i, record in enumerate(trainer.epoch_records)
        ]
        self._write("metrics.jsonl", "".join(json.dumps(_without_nan(row)) + "\n" for row in rows))

    def check_place(self, *_: Any) -> None:
        """Raise OSError if `path` no longer leads to the directory that this run has locked."""
        lock = self.path / ".lock"
        if not (lock.exists() and os.path.samestat(lock.stat(), os.fstat(self._lock.fileno()))):
            raise OSError(f"{self.path} was moved or removed during the run; resume it from where it is now")

    def _write(self, name: str, text: str) -> None:
        self.check_place()
        write_durably(self.path / name, lambda file: file.write(text.encode()))

    def watch(self, trainer: Any, num_epochs: int, train_loader: Iterable, quiet: bool = False) -> None:
        """Print a table on stdout while `trainer` trains, and on a terminal a progress line; keep `metrics.jsonl`.

        Call it after the trainer's state was loaded and before `fit`. With `quiet` nothing is printed.
        """
        self.write_metrics(trainer)
        trainer.on_step_end.append(self.check_place)
        trainer.before_save.append(self.check_place)
        trainer.on_epoch_end.append(self.write_metrics)
        if not quiet:
            self._table = _Table(trainer, num_epochs, train_loader)
            trainer.on_step_end.append(self._table.on_step_end)
            trainer.on_epoch_end.append(self._table.on_epoch_end)


def saved_options(folder: str | os.PathLike) -> dict[str, Any]:
    """Return the options of the run in `folder`: `metadata["options"]` of its newest intact checkpoint.

    Raises ValueError if there is no checkpoint, CheckpointError if none is intact.
    """
    found = load_latest(Path(folder) / "checkpoints")
    if found is None:
        raise ValueError(f"{folder}: no checkpoint to resume from; start a new run")
    return found[1]["metadata"]["options"]


class _Table:
    """The table of one training run, and the progress line below it."""

    def __init__(self, trainer: Any, num_epochs: int, loader: Any) -> None:
        self.num_epochs = num_epochs
        self.loader = loader
        self.num_batches = length(loader)
        self.live = sys.stderr is not None and sys.stderr.isatty()
        self.drawn = 0.0  # when the progress line was last drawn
        self.shown = False
        self.columns: dict[str, tuple[int, Callable[[Any], str]]] = {  # name: width, and how a value is written
            "epoch": (5, str),
            "train_loss": (10, _figure),
            "train_acc": (9, "{:.2%}".format),
            "val_loss": (8, _figure),
            "val_acc": (7, "{:.2%}".format),
        }
        if not (is_classification(trainer.criterion) or "acc" in trainer.metrics):
            del self.columns["train_acc"], self.columns["val_acc"]
        for name in [f"{part}_{metric}" for metric in trainer.metrics for part in ("train", "val")]:
            self.columns.setdefault(name, (max(len(name), 7), _figure))
        self.columns |= {
            "lr": (7, "{:.1e}".format),
            "samples/s": (9, "{:,.0f}".format),
            "sec": (6, "{:.1f}".format),
        }
        while sys.stdout is not None and sys.stdout.isatty() and len(self.columns) > 1:
            if len(self.row({})) + len(" best") <= shutil.get_terminal_size().columns:
                break
            self.columns.popitem()
        print_line("  ".join(f"{name.replace('_', ' ', 1):>{width}}" for name, (width, _) in self.columns.items()))
        self.start_epoch(trainer.batch)

    def start_epoch(self, batch: int) -> None:
        self.began = time.monotonic()
        self.first_batch = batch  # not 0 in an epoch that is resumed
        self.batch = batch

    def row(self, values: dict[str, Any]) -> str:
        cells = []
        for name, (width, write) in self.columns.items():
            value = values.get(name)
            cells.append(f"{'-' if value is None else write(value):>{width}}")
        return "  ".join(cells)

    def on_step_end(self, trainer: Any) -> None:
        self.batch = trainer.batch
        now = time.monotonic()
        if self.live and now - self.drawn > 0.2:
            self.drawn = now
            self.draw_progress(trainer, now - self.began)

    def draw_progress(self, trainer: Any, seconds: float) -> None:
        of_all = "" if self.num_batches is None else f"/{self.num_batches}"
        parts = [f"epoch {trainer.epoch + 1}/{self.num_epochs}", f"batch {self.batch}{of_all}"]
        if trainer.last_loss is not None:
            parts.append(f"loss {_figure(trainer.last_loss)}")
        if (samples := self.count_samples()) is not None:
            parts.append(f"{samples / seconds:,.0f} samples/s")
        if self.num_batches is not None:
            batches_left = (self.num_epochs - trainer.epoch) * self.num_batches - self.batch
            parts.append(f"{batches_left * seconds / (self.batch - self.first_batch):.0f} s left")
        while len("  ".join(parts)) >= shutil.get_terminal_size().columns and len(parts) > 1:
            parts.pop()  # half a number would be another number
        print(f"\r\033[K{'  '.join(parts)}", end="", file=sys.stderr, flush=True)
        self.shown = True

    def clear_progress(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self.shown = False

    def count_samples(self) -> int | None:
        """Return how many samples were trained in this epoch since it began or was resumed; None if not known."""
        size = getattr(self.loader, "batch_size", None)
        if size is None:
            return None
        # A DataLoader's batch size is that of one process.
        size *= getattr(getattr(self.loader, "sampler", None), "num_replicas", 1)
        total = length(getattr(self.loader, "dataset", None))
        now, before = self.batch * size, self.first_batch * size
        return now - before if total is None else min(now, total) - min(before, total)

    def on_epoch_end(self, trainer: Any) -> None:
        self.clear_progress()
        seconds = time.monotonic() - self.began  # validation included
        samples = self.count_samples()
        values = {name: values[-1] for name, values in trainer.history.items()}
        values |= {"epoch": trainer.epoch, "samples/s": samples / seconds if samples else None, "sec": seconds}
        print_line(self.row(values) + (" best" if trainer.best_epoch == trainer.epoch - 1 else ""))
        self.start_epoch(0)


def print_line(text: object) -> None:
    """Print `text` as one line, with control characters escaped."""
    print(printable(text), flush=True)


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.2e}"


def _without_nan(value: Any) -> Any:
    """Return `value` with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _make_new(name: str) -> Path:
    """Make a directory that did not exist before, runs/NAME-DATE-TIME, and return its path."""
    first = path = Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    make_folder(first.parent)
    number = 1
    while True:
        try:
            make_folder(path, exist_ok=False)
            return path
        except FileExistsError:
            number += 1
            path = first.with_name(f"{first.name}-{number}")


_locks: weakref.WeakValueDictionary[tuple[int, int], TextIO] = weakref.WeakValueDictionary()


def _lock(folder: Path) -> TextIO:
    """Lock `folder` until the returned file is closed or this process dies. ValueError if it is locked already."""
    busy = ValueError(f"{folder}: another process is using this run; wait for it, or choose another --output")
    found = folder.stat()
    key = (found.st_dev, found.st_ino)  # the same by whatever name or link it is reached
    if key in _locks and not _locks[key].closed:  # the lock below keeps out other processes only
        raise busy
    file = open(folder / ".lock", "a", encoding="utf-8")  # noqa: SIM115 (it stays open as long as the lock is held)
    try:
        _lock_file(file)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            file.close()
            raise busy from None
        warnings.warn(f"{folder} cannot be locked ({error.strerror}); start no second run there", stacklevel=3)
    _locks[key] = file
    return file


def _lock_file(file: TextIO) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        # Unlike `flock`, it is not inherited by forked workers of a loader, which may outlive a killed run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
