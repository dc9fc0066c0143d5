"""What a training run tells: the table, a line per epoch, metrics.jsonl, run.json, and the result on the test set."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchbasics.checkpoint import CheckpointError, RunDirectory, load_checkpoint
from torchbasics.device import device_name, synchronize
from torchbasics.distributed import all_reduce_sums, on_main
from torchbasics.loaders import Loaders
from torchbasics.models import ShiftedViews, count_parameters
from torchbasics.options import printable
from torchbasics.trainer import NonFiniteLoss, Trainer


class Report:
    """The table, a line per epoch; on a terminal a progress line below it; metrics.jsonl and run.json beside it."""

    def __init__(self, args: argparse.Namespace, data: Loaders, run: RunDirectory, began: float) -> None:
        # resumed: the notice is that of the data set which was chosen then, and is named now
        data = data._replace(notice=run.info.get("notice") or data.notice)
        self.args, self.data, self.run, self.began = args, data, run, began
        self.samples = data.facts["samples"][0]
        self.session: dict[str, Any] = {
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
            "train_seconds": 0.0,
            "total_seconds": 0.0,
            "samples": 0,
        }
        run.info.setdefault("sessions", []).append(self.session)
        self.steps_per_epoch = len(data.train)
        self.live = sys.stderr is not None and sys.stderr.isatty() and not args.quiet
        self.epoch_began = self.drawn = time.monotonic()
        self.first_batch = 0

    def begin(self, trainer: Trainer, resumed_from: Path | None, version: str, processes: str = "") -> None:
        """run.json, metrics.jsonl, what is trained on what, the table's head; `trainer` reports from here on.

        Raises CheckpointError for a run that was further than what it is resumed from.
        """
        metrics_file = self.run.path / "metrics.jsonl"
        if self.args.resume and resumed_from is None and metrics_file.is_file() and metrics_file.stat().st_size:
            raise CheckpointError(
                f"{self.run.checkpoints}: the run was further, and its checkpoints are gone; "
                "--overwrite starts it again"
            )
        more = {"processes": processes} if processes else {}
        write_description(self.args, self.data, trainer, self.run, version, **more)
        self.run.write_metrics(metrics(trainer))
        trainer.on_step_end, trainer.on_epoch_end = (self.on_step_end,), (self.on_epoch_end, *trainer.on_epoch_end)
        self._introduce(trainer, resumed_from, processes)

    def _introduce(self, trainer: Trainer, resumed_from: Path | None, processes: str) -> None:
        if self.data.notice:
            self.say(self.data.notice)
        train, val, test = self.data.facts["samples"]
        self.say(
            f"{self.data.facts['dataset']}: {train:,} training, {val:,} validation, {test:,} test images; "
            f"{self.args.model}, {count_parameters(trainer.model):,} parameters; "
            f"{processes or device_name(trainer.device)}; {trainer.precision}"
        )
        if self.args.resume:
            self.say(
                f"resumed from {resumed_from.name}: all {self.args.epochs} epochs are done already"
                if resumed_from and trainer.epoch >= self.args.epochs
                else f"resumed from {resumed_from.name}: epoch {trainer.epoch + 1}, batch {trainer.batch + 1}"
                if resumed_from
                else "nothing was saved before the interruption: starting at step 0"
            )
        self.epoch_began, self.first_batch = time.monotonic(), trainer.batch
        self.say("epoch  train loss  train acc  val loss  val acc       lr  images/s  seconds")

    def say(self, line: str) -> None:
        """Prints a line, unless `--quiet`."""
        if not self.args.quiet:
            print(printable(line), flush=True)

    def on_step_end(self, trainer: Trainer) -> None:
        """Draws the progress line anew, five times a second."""
        instant = time.monotonic()
        if self.live and instant - self.drawn > 0.2:
            self.drawn = instant
            rate = (trainer.batch - self.first_batch) / (instant - self.epoch_began)
            left = (self.args.epochs - trainer.epoch) * self.steps_per_epoch - trainer.batch
            line = (
                f"epoch {trainer.epoch + 1}/{self.args.epochs}  batch {trainer.batch}/{self.steps_per_epoch}  "
                f"{rate * self.args.batch_size:,.0f} images/s  {left / rate:.0f} s left"
            )
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """A line of the table; metrics.jsonl and run.json are brought up to date."""
        samples, seconds = self.count(trainer, self.steps_per_epoch)
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        last = {name: values[-1] for name, values in trainer.history.items()}
        best = "  best" if trainer.best_epoch == trainer.epoch - 1 else ""
        self.say(
            f"{trainer.epoch:5}  {last['train_loss']:10.4f}  {last['train_acc']:9.2%}  "
            f"{last['val_loss']:8.4f}  {last['val_acc']:7.2%}  {last['lr']:7.1e}  "
            f"{samples / seconds:8,.0f}  {seconds:7.1f}{best}"
        )
        self.run.write_metrics(metrics(trainer))
        self.run.write_info()

    def count(self, trainer: Trainer, batch: int) -> tuple[int, float]:
        """Adds what was done since the last count, up to `batch` of the epoch: images and seconds."""
        synchronize(trainer.device)
        seconds = time.monotonic() - self.epoch_began
        done, before = (min(count * self.args.batch_size, self.samples) for count in (batch, self.first_batch))
        samples = max(done - before, 0)
        self.session["train_seconds"] += seconds
        self.session["samples"] += samples
        self.session["total_seconds"] = time.monotonic() - self.began
        self.epoch_began, self.first_batch = time.monotonic(), 0
        return samples, seconds

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        """What run.json says of the training itself, over all sessions of the run."""
        assert trainer.best_epoch is not None  # judge has seen to that
        self.session["total_seconds"] = time.monotonic() - self.began
        sessions = self.run.info["sessions"]
        seconds, total, samples = (
            sum(session.get(name, 0) for session in sessions) for name in ("train_seconds", "total_seconds", "samples")
        )
        return {
            "best_val_accuracy": trainer.history["val_acc"][trainer.best_epoch],
            "best_epoch": trainer.best_epoch + 1,
            "epochs_run": trainer.epoch,
            "train_seconds": seconds,
            "total_seconds": total,
            "samples_per_second": samples / seconds if seconds else 0.0,
            "stopped_because": trainer.early_stopping.reason
            if trainer.stopped_early
            else f"all {self.args.epochs} epochs done",
            "skipped_steps": trainer.skipped,
            "dataset": self.data.facts["dataset"],
            "notice": self.data.notice,
            "model": self.args.model,
            "parameters": count_parameters(trainer.model),
        }


def metrics(trainer: Trainer) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl: the history, without clock times, so that a resumed run's are the same."""
    rows = (dict(zip(trainer.history, values, strict=True)) for values in zip(*trainer.history.values(), strict=True))
    return [{"epoch": i, **{key: _plain(value) for key, value in row.items()}} for i, row in enumerate(rows, start=1)]


def _plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None  # JSON has no NaN


def write_description(
    args: argparse.Namespace, data: Loaders, trainer: Trainer, run: RunDirectory, version: str, **more: Any
) -> None:
    """run.json: everything needed to know, and to repeat, what was done."""
    run.write_info(
        command=run.info.get("command") or shlex.join(sys.argv),
        seed=args.seed,
        dataset=data.facts["dataset"],
        notice=data.notice,
        model=args.model,
        parameters=count_parameters(trainer.model),
        arguments={**vars(args), "dataset": data.facts["dataset"], "output": str(run.path)},
        device=str(trainer.device),
        device_name=device_name(trainer.device),
        precision=trainer.precision,
        threads=torch.get_num_threads(),
        versions={"torchbasics": version, "torch": torch.__version__, "python": platform.python_version()},
        git_commit=_git_commit(),
        **more,
    )


def _git_commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(sys.argv[0]).resolve().parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
        return found.stdout.strip() or None
    return None


def judge(trainer: Trainer, data: Loaders, best_path: Path, tta: bool = False) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The best model on the test set, looked at once: figures for the result; this process's logits and targets.

    With `tta` each image is read as the mean over nine shifted views.
    """
    if trainer.best_epoch is None:
        raise NonFiniteLoss(
            f"no epoch of {trainer.epoch} had a finite validation loss, so there is no best model; "
            "lower --lr or set --clip-norm 1"
        )
    best = on_main(lambda: load_checkpoint(best_path))
    trainer.load_evaluated(best["model_state_dict"], "best.pt")
    logits = trainer.predict(data.test, ShiftedViews if tta else None)
    targets = torch.cat([targets for _, targets in data.test]).cpu()
    return score(logits, targets, data.facts["classes"]), logits, targets


def score(logits: Tensor, targets: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Figures on the test set, from `logits` (N, classes) and `targets` (N,) of this process's part of it."""
    predicted, number = logits.argmax(1), len(classes)
    pairs = all_reduce_sums(torch.bincount(targets * number + predicted, minlength=number**2))
    loss = all_reduce_sums(F.cross_entropy(logits.double(), targets, reduction="sum"))
    confusion = pairs.view(number, number)
    return {
        "test_accuracy": int(confusion.trace()) / int(confusion.sum()),
        "test_loss": float(loss / confusion.sum()),
        "test_samples": int(confusion.sum()),
        "accuracy_by_class": {
            name: (int(row[i]) / int(row.sum()) if row.sum() else None)
            for i, (name, row) in enumerate(zip(classes, confusion, strict=True))
        },
        "confusion": confusion.tolist(),
    }


def print_result(result: dict[str, Any], run: RunDirectory, notice: str, launcher: str, kept: bool = True) -> None:
    """The result in words, and the commands that continue, predict and export; `launcher` is what starts the script."""
    print(
        f"\nbest epoch {result['best_epoch']} of {result['epochs_run']}: "
        f"validation {result['best_val_accuracy']:.2%}, test {result['test_accuracy']:.2%} "
        f"(loss {result['test_loss']:.4f}) on {result['dataset']}"
    )
    shares = {name: share for name, share in result["accuracy_by_class"].items() if share is not None}
    print("by class: " + "  ".join(f"{printable(name)} {share:.1%}" for name, share in shares.items()))
    print(
        f"stopped because: {result['stopped_because']}; training took {result['train_seconds']:.0f} s, "
        f"{result['samples_per_second']:,.0f} images/s"
    )
    if kept:
        best = shlex.quote(str(run.checkpoints / "best.pt"))
        lines = [f"files:    {run.path}", f"weights:  {best}"]
        lines.append(f"continue: {launcher} --resume {shlex.quote(str(run.path))}")
        for name, rest in (("predict", " digit.png"), ("export", "")):
            script = Path(sys.argv[0]).with_name(f"{name}.py")
            if script.is_file():  # not beside a copy of the training script alone
                command = shlex.join([python_command(), str(script), "--checkpoint"])
                lines.append(f"{name + ':':9} {command} {best}{rest}")
        print("\n".join(map(printable, lines)))
    if notice:
        print(printable(notice))


def python_command() -> str:
    """What starts this interpreter: its name where that finds it, else its path."""
    name = Path(sys.executable).name
    return name if shutil.which(name) == sys.executable else sys.executable


def unused_directory(dataset: str) -> Path:
    """runs/DATASET-DATE-TIME, with a number behind it if that is there already."""
    name = f"{dataset}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    paths = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, 1000))
    return next(path for path in paths if not path.exists())
