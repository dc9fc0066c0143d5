"""Train a digit classifier to above 99.6% on MNIST; stop it whenever you like, and resume it exactly.

    python scripts/train_mnist.py --epochs 15
    python scripts/train_mnist.py --resume runs/mnist-20260102-030405

Without MNIST and without a network it trains on digits that the program draws, and says so. To train on other data,
change `make_loaders`, `make_model` and `evaluate_best`, in `main` the criterion and `samples=`, and the last lines of
`print_result`. Then remove the options that only they used, from the parser, PRESETS and FREE_ON_RESUME too.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import os
import shlex
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/
import torchbasics as tb
from torchbasics import cli
from torchbasics.device import busy_cores, cpu_seconds
from torchbasics.report import Judgement, Report

# Augmentation: each training image is rotated by up to 10 degrees, shifted and resized by up to 10%, at random.
ROTATION, SHIFT, SCALING = 10.0, 0.1, 0.1
# A preset is nothing but other defaults, tuned on held-out training images. What is given beside it wins.
PRESETS: dict[str, dict[str, Any]] = {
    "speedrun": {"model": "fastnet", "epochs": 1, "batch_size": 224, "lr": 4e-2, "weight_decay": 0.1,
                 "warmup_epochs": 0.15, "label_smoothing": 0.1, "augment": False},
    "best": {"model": "widevgg", "epochs": 15, "ema": 0.999, "tta": True},
}  # fmt: skip
# These may change when a run is resumed. All others decide its course.
FREE_ON_RESUME = {"epochs", "output", "resume", "quiet", "debug", "data_dir", "patience", "tensorboard", "anomaly",
                  "save_every"}  # fmt: skip
OUT_OF_MEMORY = "use half the --batch-size with --accumulate 2, then --precision bf16, then a smaller --model"


def make_parser() -> cli.Parser:
    positive, fraction, rate = cli.number(int, 1), cli.number(float, 0, 0.999999), cli.number(float, 0, strict=True)
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="auto", choices=("auto", "mnist", "fashion-mnist", "kmnist", "digits"),
        help="auto: MNIST, or drawn digits without it (default: auto)")
    add("--data-dir", default="./data", type=cli.path_argument, metavar="DIR", help="where it is (default: ./data)")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="rotate, shift, resize (default: on)")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="smallvgg", choices=tuple(tb.MODELS), metavar="NAME",
        help=f"{', '.join(tb.MODELS)} (default: smallvgg)")
    add("--dropout", type=fraction, default=0.2, metavar="P", help="where the model has it (default: 0.2)")
    add("--tta", action=argparse.BooleanOptionalAction, default=False,
        help="judge each test image by nine shifted views (default: off)")
    add("--init-from", type=cli.path_argument, metavar="FILE", help="start from the weights in a checkpoint")
    add = parser.add_argument_group("training").add_argument
    add("--preset", choices=PRESETS, help="other defaults: speedrun (99%% in seconds), best (most accurate)")
    add("--epochs", type=positive, default=15, metavar="N", help="passes over the training images (default: 15)")
    add("--batch-size", type=positive, default=128, metavar="N", help="images per batch (default: 128)")
    add("--optimizer", choices=("adam", "adamw", "sgd", "rmsprop", "adagrad"), default="adamw", metavar="NAME",
        help="adam, adamw, sgd, rmsprop, adagrad (default: adamw)")
    add("--lr", type=rate, default=3e-3, metavar="RATE", help="highest learning rate (default: 0.003)")
    add("--weight-decay", type=cli.number(float, 0), default=1e-2, metavar="W",
        help="pull of the weights to zero (default: 0.01)")
    add("--schedule", choices=("constant", "step", "cosine", "onecycle", "plateau"), default="onecycle",
        metavar="NAME", help="constant, step, cosine, onecycle, plateau (default: onecycle)")
    add("--warmup-epochs", type=cli.number(float, 0), default=0.0, metavar="E",
        help="epochs in which the rate rises linearly (default: 0; onecycle: 30%% of all)")
    add("--label-smoothing", type=fraction, default=0.0, metavar="S",
        help="share of the target that is spread over all classes (default: 0)")
    add("--clip-norm", type=rate, metavar="NORM", help="limit of the gradient's norm (default: none)")
    add("--clip-value", type=rate, metavar="V", help="limit of the gradient's entries (default: none)")
    add("--accumulate", type=positive, default=1, metavar="N", help="batches per optimizer step (default: 1)")
    add("--ema", type=fraction, default=0.0, metavar="DECAY", help="average the weights, e.g. 0.999 (default: off)")
    add("--patience", type=cli.number(int, 0), default=0, metavar="N",
        help="stop after N epochs without a lower validation loss (default: 0, never)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 where the hardware computes in it (default: auto)")
    add("--compile", nargs="?", const="default", metavar="MODE",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        help="torch.compile (on a CPU seldom faster): default, reduce-overhead, max-autotune, "
             "max-autotune-no-cudagraphs")  # fmt: skip
    add("--threads", type=positive, metavar="N", help="CPU threads; other numbers give other last digits")
    add = parser.add_argument_group("run").add_argument
    add("--output", type=cli.path_argument, metavar="DIR", help="new directory (default: runs/DATASET-DATE-TIME)")
    add("--resume", type=cli.path_argument, metavar="DIR", help="continue the run in DIR with its own options")
    add("--save-every", type=positive, metavar="N", help="save every N steps (default: after each epoch)")
    add("--seed", type=cli.number(int, 0, 2**32 - 1), default=42, metavar="N",
        help="of all random numbers (default: 42)")
    add("--deterministic", action="store_true", help="deterministic kernels only")
    add("--dry-run", action="store_true", help="two batches of everything, nothing kept")
    add("--limit-batches", type=positive, metavar="N", help="train on N batches per epoch only")
    add("--quiet", action="store_true", help="print the result only")
    add("--tensorboard", action="store_true", help="write TensorBoard files too (needs that package)")
    add("--anomaly", action="store_true", help="name the forward line of a NaN gradient; slow")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the options, those of the preset and of a resumed run included."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        if args.output or args.dry_run or args.init_from:
            parser.error("--resume does not go with --output, --dry-run or --init-from")
        saved = tb.saved_options(args.resume)
        args = parser.parse_resumed(argv, saved, FREE_ON_RESUME)
        total = saved["epochs"]
        if args.epochs != total and args.schedule not in ("constant", "plateau"):
            parser.error(f"--epochs {args.epochs}: the run's {args.schedule} schedule ends after {total} epochs")
        return args
    parser.set_defaults(**PRESETS.get(args.preset, {}))
    args = parser.parse_args(argv)
    if args.dry_run:
        args.epochs, args.limit_batches, args.warmup_epochs = 1, 2, min(args.warmup_epochs, 1)
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}")
    if args.schedule == "plateau" and args.warmup_epochs:
        parser.error("--schedule plateau has no warm-up; leave --warmup-epochs out")
    args.threads = args.threads or torch.get_num_threads()
    args.command = shlex.join(sys.argv)
    return args


def make_loaders(args: argparse.Namespace, device: torch.device) -> tuple[list[Any], dict[str, Any], str]:
    """Return loaders for training, validation and test, facts about the data, and a notice for the user.

    A loader may be a DataLoader, also with shuffle=True and workers: it has a length and a `dataset`, and gives batches
    (images (B, C, H, W) float32, normalised; labels (B,) int64). --limit-batches would then be its
    `sampler=RandomSampler(dataset, num_samples=N * args.batch_size)`. The facts are stored in each checkpoint:
    `evaluate_best` needs the classes, predict.py and export.py all of them. Uses --dataset, --data-dir, --augment,
    --batch-size, --limit-batches and --seed.
    """
    train, val, test, name, notice = tb.load_splits(args.dataset, args.data_dir, val_size=5000, seed=args.seed)
    mean, std = tb.channel_statistics(train.inputs)
    if name == "mnist":
        mean, std = (0.1307,), (0.3081,)  # of all 60,000 training images
    augment = tb.RandomAffine(ROTATION, SHIFT, SCALING) if args.augment else None
    common: dict[str, Any] = {"device": device, "mean": mean, "std": std}
    train_loader = tb.TensorLoader(
        train.inputs, train.targets, args.batch_size, shuffle=True, seed=args.seed, augment=augment, drop_last=True,
        limit_batches=args.limit_batches, **common,
    )  # fmt: skip
    # On a CPU, larger batches would need more memory than training has taken already, and be slower for that.
    common |= {"batch_size": 250 if device.type == "cpu" else 1000}
    common |= {"limit_batches": args.limit_batches if args.dry_run else None}
    val_loader = tb.TensorLoader(val.inputs, val.targets, **common)
    test_loader = tb.TensorLoader(test.inputs, test.targets, **common)
    facts = {"dataset": name, "classes": train.classes, "num_classes": len(train.classes), "in_channels": 1,
             "image_size": 28, "mean": mean, "std": std}  # fmt: skip
    return [train_loader, val_loader, test_loader], facts, notice


def make_model(args: argparse.Namespace, facts: dict[str, Any], device: torch.device) -> nn.Module:
    """Return the model, and add to the facts how predict.py and export.py build it. Uses --model and --dropout."""
    facts |= {"model": args.model, "dropout": args.dropout}
    model = tb.make_model(facts).to(device).to(memory_format=torch.channels_last)
    if args.init_from and not args.resume:
        left = tb.load_initial_weights(model, args.init_from)
        print(f"initial weights from {args.init_from}; left as they were: {', '.join(left) or 'none'}")
    return model


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    options = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, fused=True, **options)
    if args.optimizer == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), momentum=0.9, **options)
    if args.optimizer == "adagrad":
        return torch.optim.Adagrad(model.parameters(), **options)
    kind = torch.optim.Adam if args.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), fused=True, **options)


def make_schedule(args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    """Return a schedule that Trainer steps after each optimizer step; plateau after each epoch."""
    total, warmup = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)
    if args.schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=3, threshold=0)
    if args.schedule == "onecycle":  # one step more than will be taken: torch raises after the last
        rise = min((warmup + 1) / (total + 1), 0.99) if warmup else 0.3
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, args.lr, total + 1, pct_start=rise, cycle_momentum=False
        )
    if args.schedule == "cosine":
        return tb.warmup_cosine_scheduler(optimizer, warmup, total)
    if args.schedule == "constant":
        return tb.warmup_lr_scheduler(optimizer, warmup, 0.01) if warmup else None

    def thirds(step: int) -> float:  # a tenth of the rate after each third
        return min(0.01 + 0.99 * step / warmup if warmup else 1.0, 1.0) * 0.1 ** min(3 * step // total, 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, thirds)
    schedule.scheduler_interval = "step"  # type: ignore[attr-defined]
    return schedule


def tensorboard_callback(run: tb.RunDirectory, trainer: tb.Trainer, loader: Any) -> Any:
    """Write a grid of images and the graph to TensorBoard; return a callback that writes the history."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise cli.MissingExtra("--tensorboard needs a package: pip install 'torchbasics[tensorboard]'") from None
    from torchvision.utils import make_grid

    writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=trainer.step + 1)
    images = next(iter(loader))[0]
    writer.add_image("images", make_grid(images[:64].cpu(), normalize=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the graph is drawn by torch.jit.trace, which is deprecated
        writer.add_graph(copy.deepcopy(trainer.evaluated_model), images[:1])  # a copy is not compiled

    def write(trainer: tb.Trainer) -> None:
        for name, values in trainer.history.items():
            if values[-1] is not None:
                writer.add_scalar(name, values[-1], trainer.step)
        writer.flush()

    return write


def evaluate_best(
    args: argparse.Namespace, trainer: tb.Trainer, best: Path, loader: Any
) -> tuple[dict[str, Any], Judgement]:
    """Look at the test set, once, with the best weights; return the figures, and all else that the report shows."""
    if trainer.best_epoch is None:
        raise tb.NonFiniteLoss("no epoch had a finite validation loss; lower --lr or set --clip-norm 1")
    model = trainer.evaluated_model
    model.load_state_dict(tb.load_checkpoint(best)["model_state_dict"])
    judged = tb.ShiftedViews(model) if args.tta else model
    logits, targets = tb.predict_all(judged, loader, trainer.device, precision=trainer.precision)
    judgement = Judgement(logits, targets, trainer.metadata["classes"], images=loader.dataset)
    return {
        "test_accuracy": judgement.accuracy,
        "test_loss": float(F.cross_entropy(logits.double(), targets)),
        "test_samples": judgement.count,
        "accuracy_by_class": {row["name"]: row["recall"] for row in judgement.by_class()},
        "confusion": judgement.confusion.tolist(),
        "best_val_accuracy": trainer.history["val_acc"][trainer.best_epoch],
        "best_epoch": trainer.best_epoch + 1,
        "epochs_run": trainer.epoch,
        "stopped_because": trainer.early_stopping.reason if trainer.stopped else f"all {args.epochs} epochs done",
    }, judgement


def main(argv: list[str] | None = None) -> int:
    began, load = time.monotonic(), cpu_seconds()
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = tb.pick_device(args.device)
    if device.type == "cpu":
        tb.cache_cpu_memory()  # a quarter of a step on a CPU would be page faults
    tb.set_seed(args.seed, args.deterministic)

    loaders, facts, notice = make_loaders(args, device)
    train_loader, val_loader, test_loader = loaders
    model = make_model(args, facts, device)
    averages = tb.averaged_copy(model, args.ema) if args.ema else None
    if args.compile:
        model.compile(mode=args.compile)
    optimizer = make_optimizer(args, model)
    schedule = make_schedule(args, optimizer, math.ceil(len(train_loader) / args.accumulate))
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autograd.set_detect_anomaly(args.anomaly))
        if args.dry_run:
            args.output = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run")
        directory = tb.RunDirectory(args.resume or args.output, name=facts["dataset"], resume=bool(args.resume))
        run = stack.enter_context(directory)
        trainer = tb.Trainer(
            model, criterion, optimizer, device, schedule, precision=args.precision, accumulate=args.accumulate,
            clip_norm=args.clip_norm, clip_value=args.clip_value, averages=averages,
            early_stopping=tb.EarlyStopping(args.patience) if args.patience else None,
            checkpoint_dir=run.checkpoints, save_every=args.save_every, metadata={**facts, "options": vars(args)},
        )  # fmt: skip
        if args.resume:
            trainer.resume()
        if args.tensorboard:
            trainer.on_epoch_end.append(tensorboard_callback(run, trainer, val_loader))
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "torchbasics": tb.__version__}
        run.write_info(command=args.command, options=vars(args), **facts, notice=notice,
                       device=tb.device_name(device), precision=trainer.precision, versions=versions)  # fmt: skip
        if not args.quiet:
            training, validation, test = (f"{len(loader.dataset):,}" for loader in loaders)
            print(f"{notice}\n{facts['dataset']}: {training} training, {validation} validation, {test} test images\n"
                  f"{type(model).__name__}, {tb.count_parameters(model):,} parameters\n"
                  f"{tb.device_name(device)}; {trainer.precision}".strip())  # fmt: skip
            if device.type == "cpu":
                print_load(args, busy_cores(load))
        run.watch(trainer, args.epochs, train_loader, quiet=args.quiet)  # prints a table, keeps metrics.jsonl
        report = Report(  # for loaders other than TensorLoader leave `samples` out
            run.path, run.info, trainer, defaults=vars(make_parser().parse_args([])), samples=next(iter(train_loader)),
        )  # fmt: skip
        started = time.monotonic()
        try:
            with report:  # report.html is written now, after each epoch and at the end
                trainer.fit(train_loader, val_loader, args.epochs, verbose=False)
                seconds = time.monotonic() - started
                result, report.judgement = evaluate_best(args, trainer, run.checkpoints / "best.pt", test_loader)
                result |= {"train_seconds": seconds, "total_seconds": time.monotonic() - began}
                run.write_info(result=result)
        except tb.Interrupted as stop:
            hint = f"; continue with: python {sys.argv[0]} --resume {shlex.quote(str(run.path))}"
            print(f"{stop}{'' if args.dry_run else hint}", file=sys.stderr)
            return 128 + stop.signum
        print_result(args, result, report)
    return 0


def print_load(args: argparse.Namespace, busy: float) -> None:
    """Say so if other programs use the cores that this one would need: its threads wait for the slowest of them."""
    cores = os.cpu_count() or 1
    free = max(1, int(cores - busy + 0.5))
    if free < args.threads and busy > cores - args.threads + 0.4:
        print(f"note: other programs use {busy:.1f} of {cores} cores; --threads {free} would be faster now")


def print_result(args: argparse.Namespace, result: dict[str, Any], report: Report) -> None:
    print(f"\nbest epoch {result['best_epoch']} of {result['epochs_run']}: "
          f"validation {result['best_val_accuracy']:.2%}\n"
          f"test {result['test_accuracy']:.2%} (loss {result['test_loss']:.4f})")  # fmt: skip
    assert report.judgement is not None
    print("\n".join(report.judgement.by_class_lines()))
    print(f"stopped because: {result['stopped_because']}\ntraining took {result['train_seconds']:.1f} s")
    for line in report.advice():
        print(f"advice: {cli.printable(line)}")
    if not args.dry_run:
        folder, best = shlex.quote(str(report.folder)), shlex.quote(str(report.folder / "checkpoints" / "best.pt"))
        print(f"report:   {shlex.quote(str(report.path))}")
        print(f"predict:  python {Path(sys.argv[0]).with_name('predict.py')} --checkpoint {best} digit.png")
        if args.schedule in ("constant", "plateau") and not report.trainer.stopped:
            print(f"continue: python {sys.argv[0]} --resume {folder} --epochs {2 * args.epochs}")
    if report.info["notice"]:
        print(report.info["notice"])


if __name__ == "__main__":
    sys.exit(cli.run(main, debug="--debug" in sys.argv, out_of_memory=OUT_OF_MEMORY))
