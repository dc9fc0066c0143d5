"""Trains a digit classifier to above 99.6% on MNIST, resumable at any moment; without data on digits drawn for it.

    python scripts/train_mnist.py --epochs 15
    python scripts/train_mnist.py --resume runs/mnist-20260102-030405
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "torchbasics" / "__init__.py").is_file():  # in a checkout its own package comes first, installed or not
    sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn

import torchbasics as tb
from torchbasics.data import NORMALISATION, channel_statistics
from torchbasics.device import device_name, preserved_random_state, synchronize
from torchbasics.evaluation import to_device
from torchbasics.mnist import FOLDERS, import_torchvision, is_present
from torchbasics.models import MODELS
from torchbasics.optim import OPTIMIZERS, SCHEDULES

# Options that may differ when a run is resumed; all others decide its course, and are refused.
FREE_ON_RESUME = {"output", "resume", "overwrite", "quiet", "debug", "data_dir", "keep", "patience", "tensorboard",
                  "anomaly", "num_workers", "save_every"}


class Data(NamedTuple):
    """Loaders of the three parts, and what a model and a reader must know of them."""

    train: Any
    val: Any
    test: Any
    facts: dict[str, Any]  # dataset, classes, in_channels, image_size, mean, std, samples of each part
    notice: str


# ---------------------------------------------------------------------------------------------------------------- data


def load_data(args: argparse.Namespace, device: torch.device) -> Data:
    if args.dataset == "folder":
        return load_folder(args, device)
    name, notice, (train, val, test) = load_images(args)
    check_batch_size(args, len(train))
    mean, std = NORMALISATION.get(name) or channel_statistics(train.inputs)
    common: dict[str, Any] = {"device": device, "mean": mean, "std": std}
    limit = args.limit_batches if args.dry_run else None
    augment = tb.RandomAffine(degrees=10, shift=0.1) if args.augment else None
    facts = {"dataset": name, "classes": train.classes, "in_channels": 1, "image_size": 28, "mean": mean, "std": std,
             "samples": (len(train), len(val), len(test))}
    return Data(
        tb.TensorLoader(train.inputs, train.targets, args.batch_size, shuffle=True, seed=args.seed, augment=augment,
                        limit_batches=args.limit_batches, **common),
        tb.TensorLoader(val.inputs, val.targets, 1000, limit_batches=limit, **common),
        tb.TensorLoader(test.inputs, test.targets, 1000, limit_batches=limit, **common), facts, notice)


def load_images(args: argparse.Namespace) -> tuple[str, str, tuple[tb.Images, tb.Images, tb.Images]]:
    """The data set's name, what to say if it isn't the wanted one, and its parts. A damaged file is never passed by."""
    name = "mnist" if args.dataset == "auto" else args.dataset
    if name in FOLDERS and not is_present(name, args.data_dir) and sys.stderr.isatty():
        print(f"{name}: not in {args.data_dir}; downloading", file=sys.stderr)
    try:
        return name, "", tb.load_splits(name, args.data_dir, args.val_size, args.seed)
    except ConnectionError:
        if args.dataset != "auto" or is_present("mnist", args.data_dir):  # a part of it is there: say what is missing
            raise
    notice = (f"NOTICE: no MNIST in {args.data_dir} and no network: training on digits drawn by this program instead. "
              "The accuracy below is on drawn digits, not on MNIST.")
    return "digits", notice, tb.load_splits("digits", val_size=args.val_size, seed=args.seed)


def load_folder(args: argparse.Namespace, device: torch.device) -> Data:
    """train/, val/ and test/ under --data-dir as far as they are there; one folder of classes is split."""
    import_torchvision()
    from torchvision.transforms import v2

    root, size, notice = Path(args.data_dir), args.image_size, ""
    first = tb.SeededImageFolder(root / "train" if (root / "train").is_dir() else root)
    to_tensor = [v2.Resize((size, size)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                 v2.Normalize([0.5], [0.5])]
    shake = [v2.RandomAffine(degrees=10, translate=(0.1, 0.1))] if args.augment else []
    folders = {part: tb.SeededImageFolder(root / part, v2.Compose(to_tensor), mode=first.mode)
               for part in ("val", "test") if (root / part).is_dir()}
    if any(folder.classes != first.classes for folder in folders.values()):
        raise ValueError(f"{root}: train/, val/ and test/ have different classes; give each the same folders")
    train = tb.SeededImageFolder(first.root, v2.Compose(shake + to_tensor), seed=args.seed, mode=first.mode)
    indices: dict[str, Any] = {"train": range(len(train))}
    if "val" not in folders:
        fits = args.val_size <= len(train) // 2
        share = args.val_size / len(train) if fits else 0.1
        if not fits:
            notice += f"NOTICE: --val-size {args.val_size} is too much of {len(train)} images: a tenth is held out. "
        indices["train"], indices["val"] = (
            subset.indices for subset in tb.split_dataset(train, (1 - share, share), args.seed, train.targets))
        folders["val"] = tb.SeededImageFolder(first.root, v2.Compose(to_tensor), mode=first.mode)
    if not len(indices["train"]) or not len(indices.get("val", folders["val"])):
        raise ValueError(f"{root}: {len(train)} images are too few to split into training and validation")
    if "test" not in folders:
        notice += "NOTICE: no test/ folder: the last figures are on the validation images."
    check_batch_size(args, len(indices["train"]))
    options: dict[str, Any] = {"num_workers": args.num_workers, "pin_memory": device.type == "cuda"}
    val = tb.folder_loader(folders["val"], args.batch_size, indices=indices.get("val"), **options)
    test = tb.folder_loader(folders["test"], args.batch_size, **options) if "test" in folders else val
    loader = tb.folder_loader(train, args.batch_size, indices=indices["train"], shuffle=True, seed=args.seed,
                              limit_batches=args.limit_batches, **options)
    facts = {"dataset": "folder", "classes": train.classes, "in_channels": 1 if train.mode == "L" else 3,
             "image_size": size, "mean": (0.5,), "std": (0.5,),
             "samples": (len(indices["train"]), len(indices.get("val", folders["val"])),
                         len(folders["test"]) if "test" in folders else len(indices.get("val", folders["val"])))}
    return Data(loader, val, test, facts, notice.strip())


def check_batch_size(args: argparse.Namespace, samples: int) -> None:
    if args.batch_size > samples:
        raise ValueError(f"--batch-size {args.batch_size} is larger than the {samples} training samples; "
                         "choose a smaller one")


# ---------------------------------------------------------------------------------------------------- model and trainer


def build_trainer(args: argparse.Namespace, data: Data, device: torch.device, checkpoints: Path) -> tb.Trainer:
    facts = data.facts
    model = tb.make_model(args.model, len(facts["classes"]), facts["in_channels"], facts["image_size"], args.dropout)
    model.to(device)
    optimizer = tb.make_optimizer(args.optimizer, model.parameters(), args.lr, args.weight_decay)
    steps_per_epoch = -(-len(data.train) // args.accumulate)
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    schedule = tb.make_schedule(args.schedule, optimizer, args.epochs * steps_per_epoch, warmup_steps)
    return tb.Trainer(
        model, nn.CrossEntropyLoss(label_smoothing=args.label_smoothing), optimizer, device, schedule,
        scheduler_interval="epoch" if args.schedule == "plateau" else "step", precision=args.precision,
        channels_last=True, compile=args.compile, accumulate=args.accumulate, clip_norm=args.clip_norm,
        clip_value=args.clip_value, averages=tb.averaged_copy(model, args.ema) if args.ema else None,
        nan_policy=args.nan_policy,
        early_stopping=tb.EarlyStopping(args.patience, args.min_delta) if args.patience else None,
        checkpoint_dir=checkpoints, save_every=args.save_every, keep=args.keep,
        metadata={"model": args.model, "dropout": args.dropout, **data.facts})


# ------------------------------------------------------------------------------------------------- what the user reads


class Report:
    """The table, a line per epoch; on a terminal a progress line below it; metrics.jsonl and run.json beside it."""

    def __init__(self, args: argparse.Namespace, data: Data, run: tb.RunDirectory) -> None:
        self.args, self.run, self.samples = args, run, data.facts["samples"][0]
        self.session: dict[str, Any] = {
            "started": now(), "command": shlex.join(sys.argv), "train_seconds": 0.0, "samples": 0}
        run.info.setdefault("sessions", []).append(self.session)
        self.steps_per_epoch = len(data.train)
        self.live = sys.stderr.isatty() and not args.quiet
        self.epoch_began = self.drawn = time.monotonic()
        self.first_batch = 0

    def begin(self, trainer: tb.Trainer) -> None:
        self.epoch_began, self.first_batch = time.monotonic(), trainer.batch
        self.say("epoch  train loss  train acc  val loss  val acc       lr  images/s  seconds")

    def say(self, line: str) -> None:
        if not self.args.quiet:
            print(line, flush=True)

    def on_step_end(self, trainer: tb.Trainer) -> None:
        instant = time.monotonic()
        if self.live and instant - self.drawn > 0.2:
            self.drawn = instant
            rate = (trainer.batch - self.first_batch) / (instant - self.epoch_began)
            left = (self.args.epochs - trainer.epoch) * self.steps_per_epoch - trainer.batch
            line = (f"epoch {trainer.epoch + 1}/{self.args.epochs}  batch {trainer.batch}/{self.steps_per_epoch}  "
                    f"{rate * self.args.batch_size:,.0f} images/s  {left / rate:.0f} s left")
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    def on_epoch_end(self, trainer: tb.Trainer) -> None:
        samples, seconds = self.count(trainer, self.steps_per_epoch)
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        last = {name: values[-1] for name, values in trainer.history.items()}
        best = "  best" if trainer.best_epoch == trainer.epoch - 1 else ""
        self.say(f"{trainer.epoch:5}  {last['train_loss']:10.4f}  {last['train_acc']:9.2%}  "
                 f"{last['val_loss']:8.4f}  {last['val_acc']:7.2%}  {last['lr']:7.1e}  "
                 f"{samples / seconds:8,.0f}  {seconds:7.1f}{best}")
        self.run.write_metrics(metrics(trainer))
        self.run.write_info()


    def count(self, trainer: tb.Trainer, batch: int) -> tuple[int, float]:
        """Adds what was done since the last count, up to `batch` of the epoch: images and seconds."""
        synchronize(trainer.device)
        seconds = time.monotonic() - self.epoch_began
        done, before = (min(count * self.args.batch_size, self.samples) for count in (batch, self.first_batch))
        samples = max(done - before, 0)
        self.session["train_seconds"] += seconds
        self.session["samples"] += samples
        self.epoch_began, self.first_batch = time.monotonic(), 0
        return samples, seconds


def metrics(trainer: tb.Trainer) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl: the history, without clock times, so that a resumed run's are the same."""
    rows = (dict(zip(trainer.history, values, strict=True)) for values in zip(*trainer.history.values(), strict=True))
    return [{"epoch": i, **{key: plain(value) for key, value in row.items()}} for i, row in enumerate(rows, start=1)]


def plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None  # JSON has no NaN


def judge(trainer: tb.Trainer, data: Data, run: tb.RunDirectory) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The best model on the test set, looked at once: the figures of the result, the logits and the targets."""
    if trainer.best_epoch is None:
        raise tb.NonFiniteLoss(f"no epoch of {trainer.epoch} had a finite validation loss, so there is no best model; "
                               "lower --lr or set --clip-norm 1")
    best = tb.load_checkpoint(run.checkpoints / "best.pt")
    tb.load_weights(trainer.evaluated_model, best["model_state_dict"], "best.pt")
    logits = trainer.predict(data.test)
    targets = torch.cat([targets for _, targets in data.test]).cpu()
    predicted, number = logits.argmax(1), len(data.facts["classes"])
    confusion = torch.bincount(targets * number + predicted, minlength=number**2).view(number, number)
    result = {
        "test_accuracy": float((predicted == targets).double().mean()),
        "test_loss": float(nn.functional.cross_entropy(logits, targets)),
        "accuracy_by_class": {name: (float(row[i]) / float(row.sum()) if row.sum() else None)
                              for i, (name, row) in enumerate(zip(data.facts["classes"], confusion, strict=True))},
        "confusion": confusion.tolist(),
    }
    return result, logits, targets


def draw_mistakes(logits: Tensor, targets: Tensor, data: Data, path: Path, most: int = 40) -> None:
    """Writes the test images whose true class got the lowest probability, worst first, eight in a row."""
    true_probability = logits.softmax(1).gather(1, targets[:, None])[:, 0]
    wrong = (logits.argmax(1) != targets).nonzero()[:, 0]
    worst = wrong[true_probability[wrong].argsort()][:most].tolist()
    if worst:
        images: dict[int, Tensor] = {}
        start = 0
        for inputs, _ in data.test:
            images |= {i: inputs[i - start].cpu() for i in worst if start <= i < start + len(inputs)}
            start += len(inputs)
        import_torchvision()
        from torchvision.utils import save_image

        save_image(torch.stack([images[i] for i in worst]), path, nrow=8, normalize=True, scale_each=True)


def describe(args: argparse.Namespace, data: Data, trainer: tb.Trainer, run: tb.RunDirectory) -> None:
    """run.json: everything needed to know, and to repeat, what was done."""
    run.write_info(
        command=run.info.get("command") or shlex.join(sys.argv), seed=args.seed, dataset=data.facts["dataset"],
        notice=data.notice, model=args.model, parameters=tb.count_parameters(trainer.model),
        arguments={**vars(args), "dataset": data.facts["dataset"], "output": str(run.path)},
        device=str(trainer.device), device_name=device_name(trainer.device), precision=trainer.precision,
        threads=torch.get_num_threads(), versions={
            "torchbasics": tb.__version__, "torch": torch.__version__, "python": platform.python_version()},
        git_commit=git_commit())


def git_commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=10)
        return found.stdout.strip() or None
    return None


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def print_result(result: dict[str, Any], run: tb.RunDirectory, notice: str, kept: bool = True) -> None:
    print(f"\nbest epoch {result['best_epoch']} of {result['epochs_run']}: "
          f"validation {result['best_val_accuracy']:.2%}, test {result['test_accuracy']:.2%} "
          f"(loss {result['test_loss']:.4f}) on {result['dataset']}")
    shares = {name: share for name, share in result["accuracy_by_class"].items() if share is not None}
    print("by class: " + "  ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    print(f"stopped because: {result['stopped_because']}; training took {result['train_seconds']:.0f} s, "
          f"{result['samples_per_second']:,.0f} images/s")
    script = shlex.join([Path(sys.executable).name, sys.argv[0] if sys.argv[0].endswith(".py") else __file__])
    if kept:
        print(f"files:    {run.path}\ncontinue: {script} --resume {shlex.quote(str(run.path))}")
        print(f"weights:  {run.checkpoints / 'best.pt'}")
    if notice:
        print(notice)


# --------------------------------------------------------------------------------------------------------- TensorBoard


def tensorboard(run: tb.RunDirectory, trainer: tb.Trainer, data: Data) -> Any:
    """Writes losses, accuracies, rate, the graph and a grid of training images; returns the call-back."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("--tensorboard needs another package: pip install 'torchbasics[tensorboard]'") from None
    from torchvision.utils import make_grid

    writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=trainer.step + 1)
    with preserved_random_state(trainer.device):  # a DataLoader draws a seed for its workers
        inputs = to_device(next(iter(data.val))[0], trainer.device, trainer.memory_format)
    writer.add_image("images", make_grid(inputs[:64].cpu(), normalize=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the graph is drawn by torch.jit.trace, which announces its own end
        writer.add_graph(trainer.evaluated_model, inputs[:1])

    def write(trainer: tb.Trainer) -> None:
        for name, values in trainer.history.items():
            if name != "step":
                writer.add_scalar(name, values[-1], trainer.step)
        writer.flush()

    return write


class MissingExtra(ImportError):
    """An optional package is absent."""


# --------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}; see --help\n")


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
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_data_options(parser.add_argument_group("data"), parser.add_argument_group("model"))
    add_training_options(parser.add_argument_group("optimisation"), parser.add_argument_group("precision and speed"))
    add_run_options(parser.add_argument_group("stopping"), parser.add_argument_group("run"))
    return parser


def add_data_options(data: Any, model: Any) -> None:
    data.add_argument("--dataset", choices=("auto", *FOLDERS, "digits", "folder"), default="auto",
                      help="auto: MNIST if it is there or can be downloaded, else drawn digits (default: auto)")
    data.add_argument("--data-dir", default="./data", metavar="DIR",
                      help="where data sets are or go; for --dataset folder the images (default: ./data)")
    data.add_argument("--val-size", type=COUNT, default=5000, metavar="N",
                      help="training images held out for validation (default: 5000; of a small folder a tenth)")
    data.add_argument("--augment", action=argparse.BooleanOptionalAction, default=True,
                      help="rotate by up to 10 degrees and shift by up to a tenth (default: on)")
    data.add_argument("--num-workers", type=number(int, 0), default=0, metavar="N",
                      help="loader processes, for --dataset folder only (default: 0)")
    data.add_argument("--image-size", type=COUNT, default=28, metavar="PIXELS",
                      help="size that --dataset folder scales images to, divisible by 4 (default: 28)")
    model.add_argument("--model", choices=MODELS, default="mnistnet",
                       help="network (default: mnistnet)")
    model.add_argument("--dropout", type=SHARE, default=0.25, metavar="P",
                       help="probability of dropping, where the model has dropout (default: 0.25)")


def add_training_options(optimisation: Any, speed: Any) -> None:
    add = optimisation.add_argument
    add("--epochs", type=COUNT, default=15, metavar="N", help="passes over the training images (default: 15)")
    add("--batch-size", type=COUNT, default=128, metavar="N", help="images a batch (default: 128)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="optimizer (default: adamw)")
    add("--lr", type=RATE, default=3e-3, metavar="RATE", help="highest learning rate, per step (default: 0.003)")
    add("--weight-decay", type=number(float, 0), default=1e-4, metavar="W", help="weight decay (default: 0.0001)")
    add("--schedule", choices=SCHEDULES, default="onecycle", help="course of the learning rate (default: onecycle)")
    add("--warmup-epochs", type=number(float, 0), default=0.0, metavar="E",
        help="epochs of linear warm-up (default: 0; onecycle: 30%% of all)")
    add("--label-smoothing", type=SHARE, default=0.0, metavar="S",
        help="share of the target spread over all classes (default: 0)")
    add("--clip-norm", type=RATE, metavar="NORM", help="largest norm of the gradient (default: none)")
    add("--clip-value", type=RATE, metavar="V", help="largest entry of the gradient (default: none)")
    add("--accumulate", type=COUNT, default=1, metavar="N", help="batches whose gradients make one step (default: 1)")
    add("--ema", type=number(float, 0, 0.999999), default=0.0, metavar="DECAY",
        help="judge and keep averaged weights with this decay, e.g. 0.999 (default: 0, none)")
    speed.add_argument("--device", default="auto", metavar="NAME",
                       help="auto, cpu, cuda, cuda:1, mps or xpu (default: auto)")
    speed.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                       help="auto: bf16 where the hardware computes in it, else fp32 (default: auto)")
    speed.add_argument("--compile", nargs="?", const=True, default=False, choices=(True, *COMPILE_MODES),
                       metavar="MODE", help=f"torch.compile, in a mode of {', '.join(COMPILE_MODES)} (default: off)")


def add_run_options(stopping: Any, run: Any) -> None:
    stopping.add_argument("--patience", type=number(int, 0), default=0, metavar="EPOCHS",
                          help="stop after so many epochs without a lower validation loss (default: 0, never)")
    stopping.add_argument("--min-delta", type=number(float, 0), default=0.0, metavar="D",
                          help="how much lower counts as lower (default: 0)")
    stopping.add_argument("--nan-policy", choices=("stop", "skip", "ignore"), default="stop",
                          help="what a NaN or infinite loss does (default: stop)")
    add = run.add_argument
    add("--output", metavar="DIR", help="the run's directory (default: runs/DATASET-DATE-TIME)")
    add("--resume", nargs="?", const=True, default=False, metavar="DIR",
        help="continue the run in DIR (or in --output) with its own options (default: off)")
    add("--overwrite", action="store_true", help="replace an earlier run in the directory (default: off)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, metavar="N", help="of every random choice (default: 42)")
    add("--deterministic", action="store_true", help="deterministic kernels only (default: off)")
    add("--save-every", type=COUNT, metavar="N", help="save every N optimizer steps (default: once per epoch)")
    add("--keep", type=COUNT, default=3, metavar="N", help="checkpoints to keep beside the best (default: 3)")
    add("--limit-batches", type=COUNT, metavar="N", help="train on the first N batches of each epoch (default: all)")
    add("--dry-run", action="store_true", help="two batches of everything, nothing kept (default: off)")
    add("--tensorboard", action="store_true", help="write TensorBoard files too; needs that package (default: off)")
    add("--anomaly", action="store_true", help="name the forward line of a NaN gradient; slow (default: off)")
    add("--quiet", action="store_true", help="print the result only (default: off)")
    add("--debug", action="store_true", help="show tracebacks (default: off)")
    add("--version", action="version", version=f"torchbasics {tb.__version__}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; for --resume those of the run that is continued, where the command line doesn't give another."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        if args.resume is not True:
            if args.output and Path(args.output) != Path(args.resume):
                parser.error(f"--resume {args.resume} and --output {args.output} differ; give one directory")
            args.output = args.resume
        if not args.output:
            parser.error("--resume needs the run's directory: --resume DIR")
        if args.overwrite or args.dry_run:
            parser.error("--resume cannot go with --overwrite or --dry-run")
    return args


def recorded_args(argv: list[str] | None, args: argparse.Namespace, run: tb.RunDirectory) -> argparse.Namespace:
    """The options recorded in run.json, and those given now; one that would change the run's course is refused."""
    recorded = run.info.get("arguments")
    if not isinstance(recorded, dict) or recorded.keys() != vars(args).keys():
        raise ValueError(f"{run.path / 'run.json'}: holds the options of another version of this script; "
                         "resume with that one, or start a new run")
    parser = make_parser()
    parser.set_defaults(**recorded)
    merged = parser.parse_args(argv)
    for name, value in recorded.items():
        if name not in FREE_ON_RESUME and getattr(merged, name) != value:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(merged, name)} differs from the run's {value}; "
                             "leave it out to continue, or start a new run")
    merged.output, merged.resume = args.output, True
    return merged


def main(argv: list[str] | None = None) -> int:
    """Returns 0 done, 1 failed, 2 bad input, 3 optional package missing, 128 + signal when interrupted and saved."""
    args = parse_args(argv)
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            setattr(warnings, "showwarning", print_warning)  # noqa: B010 (mypy forbids to assign to a function)
            return train(args, argv, stack)
    except tb.Interrupted as stop:
        hint = "" if args.dry_run else f"; continue with --resume {stop.checkpoint.parents[1]}"
        print(f"\ninterrupted: {stop}{hint}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("\ninterrupted; what was saved stays", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read our output has left; nothing saved is lost
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except Exception as error:
        if args.debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        if isinstance(error, MissingExtra):
            return 3
        return 2 if isinstance(error, (ValueError, FileNotFoundError)) or type(error) is ConnectionError else 1


def print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def one_line(error: Exception) -> str:
    text = str(error).strip()
    if "Original Traceback" in text:  # from a loader's worker: its last line is the error
        text = text.splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split()) or type(error).__name__
    if type(error) is ConnectionError:  # of a download; not a broken pipe
        text += "; connect to the network, put the files under --data-dir, or use --dataset digits"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        text = (f"{error.filename or 'the output directory'}: {error.strerror}; older checkpoints are intact, "
                "make room or permit writing, then --resume")
    if isinstance(error, (ValueError, OSError, ImportError, tb.NonFiniteLoss)):
        return text
    return f"{type(error).__name__}: {text[:300]} (--debug shows where)"


def train(args: argparse.Namespace, argv: list[str] | None, stack: contextlib.ExitStack) -> int:
    """The recipe."""
    began = time.monotonic()
    if args.dry_run:
        args.epochs, args.limit_batches = 1, 2
        args.output = stack.enter_context(tempfile.TemporaryDirectory())
    run = None
    if args.output and not args.overwrite:  # what is wrong with it is said before the data is loaded
        run = stack.enter_context(tb.RunDirectory(args.output, resume=bool(args.resume)))
        args = recorded_args(argv, args, run) if args.resume else args
    device = tb.pick_device(args.device)
    tb.set_seed(args.seed, args.deterministic)
    stack.enter_context(torch.autograd.set_detect_anomaly(args.anomaly))
    data = load_data(args, device)
    output = Path(args.output or unused_directory(data.facts["dataset"]))
    trainer = build_trainer(args, data, device, output / "checkpoints")
    if run is None:  # an earlier run is replaced only now, when the new one can start
        run = stack.enter_context(tb.RunDirectory(output, overwrite=args.overwrite))
    data = data._replace(notice=run.info.get("notice") or data.notice)  # resumed: the data set that was chosen then
    start = trainer.resume() if args.resume else None
    metrics_file = run.path / "metrics.jsonl"
    if args.resume and start is None and metrics_file.is_file() and metrics_file.stat().st_size:
        raise tb.CheckpointError(f"{run.checkpoints}: the run was further, and its checkpoints are gone; "
                                 "--overwrite starts it again")
    report = Report(args, data, run)
    describe(args, data, trainer, run)
    run.write_metrics(metrics(trainer))
    trainer.on_step_end, trainer.on_epoch_end = (report.on_step_end,), (report.on_epoch_end,)
    if args.tensorboard:
        trainer.on_epoch_end += (tensorboard(run, trainer, data),)
    introduce(report, args, data, trainer, start)
    try:
        trainer.fit(data.train, data.val, args.epochs, verbose=False)
    except tb.Interrupted:
        report.count(trainer, trainer.batch)  # a part of an epoch is time too
        run.write_info()
        raise
    result, logits, targets = judge(trainer, data, run)
    result |= summary(args, data, trainer, run) | {"total_seconds": time.monotonic() - began}
    run.write_info(result=result)
    print_result(result, run, data.notice, kept=not args.dry_run)
    try:
        draw_mistakes(logits, targets, data, run.path / "mistakes.png")
    except (ImportError, OSError) as error:  # a picture must not cost a result
        print(f"warning: {run.path / 'mistakes.png'} was not drawn: {error}", file=sys.stderr)
    return 0


def summary(args: argparse.Namespace, data: Data, trainer: tb.Trainer, run: tb.RunDirectory) -> dict[str, Any]:
    """What run.json says of the training itself, over all sessions of the run."""
    assert trainer.best_epoch is not None  # judge has seen to that
    seconds = sum(session["train_seconds"] for session in run.info["sessions"])
    samples = sum(session["samples"] for session in run.info["sessions"])
    return {
        "best_val_accuracy": trainer.history["val_acc"][trainer.best_epoch], "best_epoch": trainer.best_epoch + 1,
        "epochs_run": trainer.epoch, "train_seconds": seconds,
        "samples_per_second": samples / seconds if seconds else 0.0,
        "stopped_because": trainer.early_stopping.reason if trainer.stopped_early else f"all {args.epochs} epochs done",
        "skipped_steps": trainer.skipped, "dataset": data.facts["dataset"], "notice": data.notice, "model": args.model,
        "parameters": tb.count_parameters(trainer.model)}


def introduce(report: Report, args: argparse.Namespace, data: Data, trainer: tb.Trainer, start: Path | None) -> None:
    if data.notice:
        report.say(data.notice)
    train, val, test = data.facts["samples"]
    report.say(f"{data.facts['dataset']}: {train:,} training, {val:,} validation, {test:,} test images; {args.model}, "
               f"{tb.count_parameters(trainer.model):,} parameters; {device_name(trainer.device)}; {trainer.precision}")
    if args.resume:
        report.say(f"resumed from {start.name}: epoch {trainer.epoch + 1}, batch {trainer.batch + 1}" if start
                   else "nothing was saved before the interruption: starting at step 0")
    report.begin(trainer)


def unused_directory(dataset: str) -> Path:
    name = f"{dataset}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    paths = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, 1000))
    return next(path for path in paths if not path.exists())


if __name__ == "__main__":
    sys.exit(main())
