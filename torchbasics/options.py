"""The command line of the training scripts: their options in groups, errors in one line, exit codes."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import io
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from torchbasics.checkpoint import RunDirectory
from torchbasics.cuda_graph import GRAPH_MODES
from torchbasics.loaders import DATASETS
from torchbasics.models import MODELS
from torchbasics.optim import OPTIMIZERS, SCHEDULES
from torchbasics.trainer import NonFiniteLoss

# Options that may differ when a run is resumed; all others decide its course, and are refused.
FREE_ON_RESUME = {
    "output", "resume", "overwrite", "quiet", "debug", "data_dir", "keep", "patience", "tensorboard", "anomaly",
    "num_workers", "save_every", "timeout", "strategy",
}  # fmt: skip
# Options that only one of the scripts has; a run may be continued by the other.
OF_ONE_SCRIPT = {"dry_run", "ensemble", "tensorboard", "anomaly", "strategy", "sync_bn", "bf16_gradients", "timeout"}
# A preset is nothing but other defaults; what is given beside it wins. Tuned on held-out training images.
PRESETS: dict[str, dict[str, Any]] = {
    "speedrun": {
        "model": "fastnet", "epochs": 1, "batch_size": 224, "lr": 4e-2, "weight_decay": 0.1, "warmup_epochs": 0.15,
        "label_smoothing": 0.1, "augment": False,
    },
    "best": {"model": "widevgg", "epochs": 15, "ema": 0.999, "tta": True},
}  # fmt: skip
# What the system says of a disk that is full, forbidden or broken.
NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG)
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line, exit code 2. From here on a terminal of any encoding ends no run."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """What the terminal cannot show is printed as escapes, from `--help` on."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().parse_known_args(*args, **kwargs)

    def error(self, message: str) -> Any:
        """Ends the program."""
        self.exit(2, f"error: {printable(message)}; see --help\n")

    def exit(self, status: int = 0, message: str | None = None) -> Any:
        """Ends the program, after `--help` too."""
        super().exit(written_out(status), message)


def number(kind: type, low: float, high: float = math.inf, strict: bool = False) -> Any:
    """An argparse type: a finite `kind` between `low` (excluded if strict) and `high`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            float(value)
        except (ValueError, OverflowError):
            value = math.nan
        if not (math.isfinite(value) and (value > low if strict else value >= low) and value <= high):
            limits = f"{'above' if strict else 'from'} {low:g}" + (f" to {high:g}" if high < math.inf else "")
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} {limits}, got {text!r}")
        return value

    return parse


COUNT, RATE, SHARE = number(int, 1), number(float, 0, strict=True), number(float, 0, 0.99)


# fmt: off
# --------------------------------------------------------------------------------------------------- groups of options


def add_data_options(parser: Parser) -> None:
    """Which images, and where they are."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="auto",
        help="auto: MNIST if it is there or can be downloaded, else drawn digits (default: auto)")
    add("--data-dir", default="./data", metavar="DIR",
        help="where data sets are or go; for --dataset folder the images (default: ./data)")
    add("--val-size", type=COUNT, default=5000, metavar="N",
        help="training images held out for validation (default: 5000; of a small folder a tenth)")
    add("--augment", action=argparse.BooleanOptionalAction, default=True,
        help="rotate, shift and resize training images at random (default: on)")
    add("--rotation", type=number(float, 0, 180), default=10.0, metavar="DEGREES",
        help="augmentation: rotate by at most so much, either way (default: 10)")
    add("--shift", type=number(float, 0, 1), default=0.1, metavar="SHARE",
        help="augmentation: shift by at most this share of the size (default: 0.1)")
    add("--scaling", type=SHARE, default=0.1, metavar="SHARE",
        help="augmentation: resize by at most this share of the size (default: 0.1)")
    add("--num-workers", type=number(int, 0), default=0, metavar="N",
        help="loader processes, for --dataset folder only (default: 0)")
    add("--image-size", type=COUNT, default=28, metavar="PIXELS",
        help="size that --dataset folder scales images to, divisible by 4; at least 24 for smallvgg and widevgg, "
        "16 for fastnet (default: 28)")


def add_model_options(parser: Parser) -> None:
    """The network, and whole recipes."""
    parser.epilog = preset_help()
    parser.add_argument("--preset", choices=PRESETS,
        help="other defaults: speedrun, 99%% in seconds; best, for accuracy; see below (default: none)")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, default="smallvgg", help="network (default: smallvgg)")
    add("--dropout", type=SHARE, default=0.2, metavar="P",
        help="probability of dropping, where the model has dropout (default: 0.2)")
    add("--tta", action=argparse.BooleanOptionalAction, default=False,
        help="read each test image as the mean over nine views, shifted by up to a pixel (default: off)")


def add_optimisation_options(parser: Parser) -> None:
    """The recipe."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=COUNT, default=15, metavar="N", help="passes over the training images (default: 15)")
    add("--batch-size", type=COUNT, default=128, metavar="N",
        help="images a batch, of all processes together (default: 128)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="optimizer (default: adamw)")
    add("--lr", type=RATE, default=3e-3, metavar="RATE", help="highest learning rate, per step (default: 0.003)")
    add("--weight-decay", type=number(float, 0), default=1e-2, metavar="W", help="weight decay (default: 0.01)")
    add("--schedule", choices=SCHEDULES, default="onecycle", help="course of the learning rate (default: onecycle)")
    add("--warmup-epochs", type=number(float, 0), default=0.0, metavar="E",
        help="epochs of linear warm-up (default: 0; onecycle: 30%% of all)")
    add("--label-smoothing", type=SHARE, default=0.0, metavar="S",
        help="share of the target spread over all classes (default: 0)")
    add("--clip-norm", type=RATE, metavar="NORM", help="largest norm of the gradient (default: none)")
    add("--clip-value", type=RATE, metavar="V", help="largest entry of the gradient (default: none)")
    add("--accumulate", type=COUNT, default=1, metavar="N", help="batches whose gradients make one step (default: 1)")
    add("--ema", type=number(float, 0, 0.999999), default=0.0, metavar="DECAY",
        help="judge and keep averaged weights; the decay rises to this, e.g. 0.999 (default: 0, none)")


def add_speed_options(parser: Parser) -> None:
    """Where and in which precision."""
    add = parser.add_argument_group("precision and speed").add_argument
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps or xpu (default: auto)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 where the hardware computes in it, else fp32 (default: auto)")
    add("--compile", nargs="?", const=True, default=False, choices=(True, *COMPILE_MODES), metavar="MODE",
        help=f"torch.compile, in a mode of {', '.join(COMPILE_MODES)} (default: off)")
    add("--cuda-graph", choices=GRAPH_MODES, default="off",
        help="replay each training step as one CUDA graph, same results but for the learning rate's last bits; "
        "auto: where it can be (default: off)")


def add_stopping_options(parser: Parser) -> None:
    """When to stop."""
    add = parser.add_argument_group("stopping").add_argument
    add("--patience", type=number(int, 0), default=0, metavar="EPOCHS",
        help="stop after so many epochs without a lower validation loss (default: 0, never)")
    add("--min-delta", type=number(float, 0), default=0.0, metavar="D",
        help="how much lower counts as lower (default: 0)")
    add("--nan-policy", choices=("stop", "skip", "ignore"), default="stop",
        help="what a NaN or infinite loss does (default: stop)")


def add_run_options(parser: Parser, version: str) -> Any:
    """Where a run goes and how it is repeated; returns the group, for a script's own additions."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--output", metavar="DIR", help="the run's directory (default: runs/DATASET-DATE-TIME)")
    add("--resume", nargs="?", const=True, default=False, metavar="DIR",
        help="continue the run in DIR (or in --output) with its own options (default: off)")
    add("--overwrite", action="store_true", help="replace an earlier run in the directory (default: off)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, metavar="N", help="of every random choice (default: 42)")
    add("--deterministic", action="store_true", help="deterministic kernels only (default: off)")
    add("--save-every", type=COUNT, metavar="N", help="save every N optimizer steps (default: once per epoch)")
    add("--keep", type=COUNT, default=3, metavar="N", help="checkpoints to keep beside the best (default: 3)")
    add("--limit-batches", type=COUNT, metavar="N", help="train on the first N batches of each epoch (default: all)")
    add("--quiet", action="store_true", help="print the result only (default: off)")
    add("--debug", action="store_true", help="show tracebacks (default: off)")
    add("--version", action="version", version=f"torchbasics {version}")
    return group
# fmt: on


# ------------------------------------------------------------------------------------------------------------- presets


def as_flags(values: dict[str, Any]) -> str:
    """Options as one writes them on the command line."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        words.append(
            f"--{'' if value else 'no-'}{flag}"
            if isinstance(value, bool)
            else f"--{flag} {value:g}"
            if isinstance(value, (int, float))
            else f"--{flag} {value}"
        )
    return " ".join(words)


def preset_help() -> str:
    """What each preset sets, for the end of `--help`."""
    return "\n".join(
        textwrap.fill(f"--preset {name} sets {as_flags(values)}", 110, subsequent_indent="    ", break_on_hyphens=False)
        for name, values in PRESETS.items()
    )


def parse_with_preset(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """`parser.parse_args(argv)`, with the defaults of the preset that `argv` names; ends the program if they clash."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    preset = first.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args(argv)
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs:g} are more than --epochs {args.epochs}; choose fewer")
    return args


# --------------------------------------------------------------------------------------- the options of a continued run


def check_resume(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """Settles which directory `--resume` means; ends the program if that is contradictory."""
    if args.resume:
        if args.resume is not True:
            if args.output and Path(args.output) != Path(args.resume):
                parser.error(f"--resume {args.resume} and --output {args.output} differ; give one directory")
            args.output = args.resume
        if not args.output:
            parser.error("--resume needs the run's directory: --resume DIR")
        if args.overwrite or getattr(args, "dry_run", False):
            parser.error("--resume cannot go with --overwrite or --dry-run")
    return args


def recorded_options(
    parser: Parser, argv: list[str] | None, args: argparse.Namespace, run: RunDirectory
) -> argparse.Namespace:
    """Those recorded in run.json, and those given now; ValueError for one that would change the run's course."""
    recorded = run.info.get("arguments")
    if not isinstance(recorded, dict) or not (recorded.keys() ^ vars(args).keys()) <= OF_ONE_SCRIPT:
        raise ValueError(
            f"{run.path / 'run.json'}: holds the options of another version of this script; "
            "resume with that one, or start a new run"
        )
    if recorded.get("ensemble", 1) != 1 and "ensemble" not in vars(args):
        raise ValueError(
            f"{run.path}: holds an ensemble; continue it with train_mnist, or one of its members here: "
            f"--resume {run.path / 'member-1'}"
        )
    recorded = {name: value for name, value in recorded.items() if name in vars(args)}
    parser.set_defaults(**recorded)
    merged = parser.parse_args(argv)
    for name, value in recorded.items():
        if name == "dataset" and merged.dataset == "auto":
            merged.dataset = value  # the one that was chosen then
        if name not in FREE_ON_RESUME and getattr(merged, name) != value:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(merged, name)} differs from the run's {value}; "
                "leave it out to continue, or start a new run"
            )
    merged.output, merged.resume, merged.overwrite = args.output, True, False  # what is there is gone on with
    return merged


# ------------------------------------------------------------------------------------------------- errors in one line


class MissingExtra(ImportError):
    """An optional package is absent; the text names the command that installs it."""


def printable(text: object) -> str:
    """One line of `text` that no terminal obeys: control characters, and those that turn the line round, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Takes the place of `warnings.showwarning`: one line."""
    print(f"warning: {printable(message)}", file=sys.stderr)


@contextlib.contextmanager
def quiet_ends(debug: bool) -> Iterator[None]:
    """No traceback, unless `debug`, of what is raised where nobody can catch it.

    A loader's end raises so when its worker was killed or a second Ctrl-C comes; the error itself is told elsewhere.
    """
    before = sys.unraisablehook, sys.excepthook
    if not debug:
        sys.unraisablehook = lambda unraisable: None
        sys.excepthook = lambda *exc_info: None  # called by threads of multiprocessing, in a loader's workers too
    try:
        yield
    finally:
        sys.unraisablehook, sys.excepthook = before


# what to do about a disk that is full or forbidden; and where a run writes
PERMIT = "make room or permit it"
GO_ON = "older checkpoints are intact, make room or permit writing, then --resume"


def guarded(work: Callable[[], int], debug: bool, interrupted: str = "interrupted", not_written: str = PERMIT) -> int:
    """The exit code of `work()`. An error takes one line on stderr, with `debug` its traceback; Ctrl-C says so."""
    try:
        code = work()
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = reader_left()
    except Exception as error:
        if debug:
            raise
        print(f"error: {one_line(error, not_written)}", file=sys.stderr)
        code = exit_code(error)
    return written_out(code)


def written_out(code: int) -> int:
    """`code`, when all output is written; if that cannot be, an error's code, and nothing more is written."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()  # stderr is written line by line
    except BrokenPipeError:
        left = reader_left()
        return code or left
    except OSError as error:  # a full disk under a redirected output
        reader_left()
        if not code:
            error.filename = "standard output"
            print(f"error: {one_line(error, 'make room for it')}", file=sys.stderr, flush=True)
        return code or 1
    return code


def leave(code: int) -> NoReturn:
    """Ends the process at once, when what `atexit` knows of is done and all output written.

    It stands last in the training scripts. Python's own end would take torch apart, a tenth of a short run; and threads
    of a process group may outlive it and abort ("terminate called without an active exception"), which torchrun takes
    for a failed job.
    """
    atexit._run_exitfuncs()
    os._exit(written_out(code))


def reader_left() -> int:
    """The exit code where who read our output has gone; nothing more is flushed into the closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13


def one_line(error: Exception, not_written: str = PERMIT) -> str:
    """What, where and what to do, in one line; `not_written` is what to do about a full or forbidden disk."""
    text = str(error).strip()
    if "Original Traceback" in text:  # from a loader's worker: its last line is the error
        text = text.splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split()) or type(error).__name__
    if type(error) is ConnectionError:  # of a download; not a broken pipe
        text += "; connect to the network, put the files under --data-dir, or use --dataset digits"
    elif isinstance(error, OSError) and error.errno in NOT_WRITTEN:
        text = f"{error.filename or 'the output directory or standard output'}: {error.strerror}; {not_written}"
    elif isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    if not isinstance(error, (ValueError, OSError, ImportError, NonFiniteLoss)):
        text = f"{type(error).__name__}: {text[:300]} (--debug shows where)"
    return printable(text)


def exit_code(error: Exception) -> int:
    """2 for bad input, 3 for an optional package that is missing, 1 for what failed at run time."""
    if isinstance(error, MissingExtra):
        return 3
    return 2 if isinstance(error, (ValueError, FileNotFoundError)) or type(error) is ConnectionError else 1
