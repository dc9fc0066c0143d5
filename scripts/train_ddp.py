"""Train a digit classifier on several processes, on one machine or many; compare it with train_mnist.py.

    torchrun --standalone --nproc-per-node=2 scripts/train_ddp.py --epochs 15
    torchrun --standalone --nproc-per-node=2 --max-restarts=3 scripts/train_ddp.py --output runs/ddp --save-every 100

Several machines, the same line on each; the data and --output lie where all of them can read and write:

    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=node0:29400 --rdzv-id=1 \\
        scripts/train_ddp.py --output runs/ddp

--batch-size is that of all processes together, so the batches are the same with any number of them. A job that
torchrun restarts continues from its last checkpoint. Plain `python scripts/train_ddp.py` is one process.

Options of train_mnist.py that this script leaves out for brevity: --preset, --optimizer, --schedule, --warmup-epochs,
--label-smoothing, --clip-value, --patience, --tta, --init-from, --compile, --deterministic, --tensorboard, --dry-run.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/
import torchbasics as tb
from torchbasics import cli, distributed
from torchbasics.report import Judgement, Report

# Augmentation: each training image is rotated by up to 10 degrees, shifted and resized by up to 10%, at random.
ROTATION, SHIFT, SCALING = 10.0, 0.1, 0.1
# These may change when a run is resumed. All others decide its course.
FREE_ON_RESUME = {"output", "resume", "quiet", "debug", "data_dir", "anomaly", "save_every", "timeout", "threads"}
STRATEGIES = """
which strategy, and when; the figures are what a model of 1 and of 7 billion parameters takes on each device for
float32 weights, gradients and AdamW's two averages, before activations (MemoryTracker.estimate_model_memory):
  DDP (default)      16 and 112 GB: every process holds a whole copy. Use it as long as one fits.
  FSDP (--fsdp)      2 and 14 GB on 8 devices: each holds its part, and a layer is gathered when it is needed.
  model parallelism  2 and 14 GB on 8 devices: each computes a part of the model (torch.distributed.pipelining,
                     torch.distributed.tensor.parallel). Use it when one layer is too large, or FSDP waits too long.
  DataParallel       16 and 112 GB: threads of one process. It is slower than DDP; torch keeps it for old code.
Beyond these, DeepSpeed moves parameters and optimizer state to the host's memory or to disks.
"""
OUT_OF_MEMORY = "use half the --batch-size with --accumulate 2, then --precision bf16, then --fsdp or more processes"


def make_parser() -> cli.Parser:
    positive, fraction, rate = cli.number(int, 1), cli.number(float, 0, 0.999999), cli.number(float, 0, strict=True)
    parser = cli.Parser(
        description=__doc__, epilog=STRATEGIES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="auto", choices=("auto", "mnist", "fashion-mnist", "kmnist", "digits"),
        help="auto: MNIST, or drawn digits without it (default: auto)")
    add("--data-dir", default="./data", type=cli.path_argument, metavar="DIR", help="where it is (default: ./data)")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="rotate, shift, resize (default: on)")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="smallvgg", choices=tuple(tb.MODELS), metavar="NAME",
        help=f"{', '.join(tb.MODELS)} (default: smallvgg)")
    add("--dropout", type=fraction, default=0.2, metavar="P", help="where the model has it (default: 0.2)")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=15, metavar="N", help="passes over the training images (default: 15)")
    add("--batch-size", type=positive, default=128, metavar="N", help="images of all processes together (default: 128)")
    add("--lr", type=rate, default=3e-3, metavar="RATE", help="highest learning rate (default: 0.003)")
    add("--weight-decay", type=cli.number(float, 0), default=1e-2, metavar="W",
        help="pull of the weights to zero (default: 0.01)")
    add("--clip-norm", type=rate, metavar="NORM", help="limit of the gradient's norm (default: none)")
    add("--accumulate", type=positive, default=1, metavar="N", help="batches per optimizer step (default: 1)")
    add("--ema", type=fraction, default=0.0, metavar="DECAY", help="average the weights, e.g. 0.999 (default: off)")
    add = parser.add_argument_group("processes").add_argument
    add("--fsdp", action="store_true", help="split the model among the processes (default: DDP, a copy for each)")
    add("--sync-bn", action="store_true", help="BatchNorm over the batches of all processes (CUDA only)")
    add("--timeout", type=cli.number(float, 0, 86400, strict=True), default=60.0, metavar="SECONDS",
        help="give up when another process is silent for so long (default: 60)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda (default: auto)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 where the hardware computes in it (default: auto)")
    add("--threads", type=positive, metavar="N", help="CPU threads of each process; others give other last digits")
    add = parser.add_argument_group("run").add_argument
    add("--output", type=cli.path_argument, metavar="DIR", help="new directory (default: runs/DATASET-DATE-TIME)")
    add("--resume", type=cli.path_argument, metavar="DIR", help="continue the run in DIR with its own options")
    add("--save-every", type=positive, metavar="N", help="save every N steps (default: after each epoch)")
    add("--seed", type=cli.number(int, 0, 2**32 - 1), default=42, metavar="N",
        help="of all random numbers (default: 42)")
    add("--limit-batches", type=positive, metavar="N", help="train on N batches per epoch only")
    add("--quiet", action="store_true", help="print the result only")
    add("--anomaly", action="store_true", help="name the forward line of a NaN gradient; slow")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the options, those of a resumed run included."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.fsdp and (args.ema or args.sync_bn):
        parser.error("--fsdp does not go with --ema or --sync-bn; use DDP")
    if args.resume:
        if args.output:
            parser.error("--resume does not go with --output")
        return parser.parse_resumed(argv, tb.saved_options(args.resume), FREE_ON_RESUME)
    args.threads = args.threads or distributed.set_threads()
    args.command = shlex.join(sys.argv)
    return args


def make_loaders(args: argparse.Namespace, device: torch.device) -> tuple[list[Any], dict[str, Any], str]:
    """Return loaders for training, validation and test, facts about the data, and a notice for the user.

    A TensorLoader gives each process its part of every batch. Of a sharded model every process judges everything.
    """
    # One process of a machine downloads, while the others wait for its lock.
    train, val, test, name, notice = tb.load_splits(args.dataset, args.data_dir, val_size=5000, seed=args.seed)
    names = distributed.gather_objects(name)
    if len({*names}) > 1:
        raise ValueError(f"the processes found different data: {', '.join(names)}; choose one with --dataset")
    mean, std = tb.channel_statistics(train.inputs)
    if name == "mnist":
        mean, std = (0.1307,), (0.3081,)  # of all 60,000 training images
    augment = tb.RandomAffine(ROTATION, SHIFT, SCALING) if args.augment else None
    common: dict[str, Any] = {"device": device, "mean": mean, "std": std}
    train_loader = tb.TensorLoader(
        train.inputs, train.targets, args.batch_size, shuffle=True, seed=args.seed, augment=augment, drop_last=True,
        limit_batches=args.limit_batches, **common,
    )  # fmt: skip
    common |= {"batch_size": 250 * distributed.world_size(), "world_size": 1 if args.fsdp else None}
    val_loader = tb.TensorLoader(val.inputs, val.targets, **common)
    test_loader = tb.TensorLoader(test.inputs, test.targets, **common)
    facts = {"dataset": name, "classes": train.classes, "num_classes": len(train.classes), "in_channels": 1,
             "image_size": 28, "mean": mean, "std": std}  # fmt: skip
    return [train_loader, val_loader, test_loader], facts, notice


def open_run(args: argparse.Namespace, name: str, stack: contextlib.ExitStack) -> tb.RunDirectory | None:
    """Open the run's directory on rank 0; tell the others its path, and torchrun's next attempts too."""
    opened: list[tb.RunDirectory] = []

    def open_directory() -> str:
        earlier = distributed.job_note("run")  # this job was started before, and torchrun has restarted it
        path, resume = earlier or args.resume or args.output, bool(args.resume) and earlier is None
        run = stack.enter_context(tb.RunDirectory(path, name=name, resume=resume, restart=earlier is not None))
        distributed.set_job_note("run", str(run.path))
        opened.append(run)
        return str(run.path)

    args.output = distributed.on_main(open_directory)
    return opened[0] if opened else None


def evaluate_best(trainer: tb.Trainer, best: Path, loader: Any) -> tuple[dict[str, Any], Judgement]:
    """Look at the test set, once, with the best weights; return the figures, and all else that the report shows."""
    if trainer.best_epoch is None:
        raise tb.NonFiniteLoss("no epoch had a finite validation loss; lower --lr or set --clip-norm 1")
    distributed.load_weights(trainer.evaluated_model, tb.load_checkpoint(best)["model_state_dict"])
    logits, targets = tb.predict_all(trainer.evaluated_model, loader, trainer.device, precision=trainer.precision)
    if not distributed.is_sharded(trainer.model):  # each process has judged its part of the images
        parts = distributed.gather_objects((logits, targets))
        logits, targets = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    judgement = Judgement(logits, targets, trainer.metadata["classes"])
    return {
        "test_accuracy": judgement.accuracy,
        "test_loss": float(F.cross_entropy(logits.double(), targets)),
        "test_samples": judgement.count,
        "best_val_accuracy": trainer.history["val_acc"][trainer.best_epoch],
        "best_epoch": trainer.best_epoch + 1,
        "epochs_run": trainer.epoch,
    }, judgement


def launcher_command() -> str:
    """Return the torchrun command that starts as many processes on as many machines as this job has."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))  # without torchrun: one machine
    machines = distributed.world_size() // processes
    place = "--standalone" if machines == 1 else f"--nnodes={machines} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT"
    return f"torchrun {place} --nproc-per-node={processes}"


@record  # torchrun names the process that failed first
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = distributed.own_device(tb.pick_device(args.device))
    if args.sync_bn and device.type != "cuda":
        raise ValueError(f"--sync-bn needs CUDA, the device is {device}; leave it out")
    with distributed.process_group(device, args.timeout), contextlib.ExitStack() as stack:
        return train(args, device, stack)


def train(args: argparse.Namespace, device: torch.device, stack: contextlib.ExitStack) -> int:
    if device.type == "cpu":
        tb.cache_cpu_memory()  # a quarter of a step on a CPU would be page faults
    tb.set_seed(args.seed)

    loaders, facts, notice = make_loaders(args, device)
    train_loader, val_loader, test_loader = loaders
    facts |= {"model": args.model, "dropout": args.dropout}
    model = tb.make_model(facts).to(device)
    if not args.fsdp:  # which splits contiguous weights only
        model = model.to(memory_format=torch.channels_last)
    precision = tb.pick_precision(args.precision, device)
    averages = tb.averaged_copy(model, args.ema) if args.ema else None
    if args.fsdp:
        model = distributed.shard(model, device, precision)
    else:
        model = distributed.replicate(model, device, sync_bn=args.sync_bn, static=args.accumulate == 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    total = args.epochs * math.ceil(len(train_loader) / args.accumulate)  # one step more than will be taken:
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total + 1, cycle_momentum=False)
    if distributed.rank() > 0:
        tb.set_seed(args.seed + distributed.rank())  # all processes begin with rank 0's weights, not with its dropout

    stack.enter_context(torch.autograd.set_detect_anomaly(args.anomaly))
    run = open_run(args, facts["dataset"], stack)
    trainer = tb.Trainer(
        model, nn.CrossEntropyLoss(), optimizer, device, schedule, precision=precision, accumulate=args.accumulate,
        clip_norm=args.clip_norm, averages=averages, checkpoint_dir=Path(args.output) / "checkpoints",
        save_every=args.save_every, metadata={**facts, "options": vars(args)},
    )  # fmt: skip
    trainer.resume()
    report = None
    launcher = launcher_command()
    if run is not None:
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "torchbasics": tb.__version__}
        run.write_info(command=args.command, options=vars(args), **facts, notice=notice,
                       device=tb.device_name(device), precision=precision, versions=versions)  # fmt: skip
        if not args.quiet:
            print(f"{notice}\n{facts['dataset']}: {distributed.world_size()} processes\n"
                  f"{args.model}, {tb.count_parameters(model):,} parameters\n"
                  f"{tb.device_name(device)}; {precision}".strip())  # fmt: skip
        run.watch(trainer, args.epochs, train_loader, quiet=args.quiet)
        report = Report(
            run.path, run.info, trainer, defaults=vars(make_parser().parse_args([])), samples=next(iter(train_loader)),
            launcher=launcher,
        )  # fmt: skip
    started = time.monotonic()
    try:
        with report or contextlib.nullcontext():  # report.html is written now, after each epoch and at the end
            trainer.fit(train_loader, val_loader, args.epochs, verbose=False)
            seconds = time.monotonic() - started
            result, judgement = evaluate_best(trainer, Path(args.output) / "checkpoints" / "best.pt", test_loader)
            if run is not None and report is not None:
                report.judgement = judgement
                run.write_info(result=result | {"train_seconds": seconds})
    except tb.Interrupted as stop:
        if run is not None:
            hint = f"continue with: {launcher} {shlex.quote(sys.argv[0])} --resume {shlex.quote(args.output)}"
            print(f"{stop}; {hint}", file=sys.stderr)
        return 128 + stop.signum
    if report is not None:
        print(f"\nbest epoch {result['best_epoch']} of {result['epochs_run']}: "
              f"validation {result['best_val_accuracy']:.2%}\n"
              f"test {result['test_accuracy']:.2%} (loss {result['test_loss']:.4f})")  # fmt: skip
        print("\n".join(judgement.by_class_lines()))
        for line in report.advice():
            print(f"advice: {cli.printable(line)}")
        print(f"training took {seconds:.1f} s\nreport:   {shlex.quote(str(report.path))}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug="--debug" in sys.argv, out_of_memory=OUT_OF_MEMORY))
