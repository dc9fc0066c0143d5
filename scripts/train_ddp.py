"""Trains what train_mnist trains, on one process, many processes or many machines, with the same results.

    torchrun --standalone --nproc-per-node=2 scripts/train_ddp.py --epochs 15
    torchrun --standalone --nproc-per-node=2 --max-restarts=3 scripts/train_ddp.py --output runs/ddp --save-every 100

Several machines, the same line on each (node0 is one of them; the data and --output lie where all can read them):

    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=node0:29400 --rdzv-id=1 \\
        scripts/train_ddp.py --output runs/ddp

Slurm, in a batch script with --nodes=2 --ntasks-per-node=1:

    srun torchrun --nnodes=$SLURM_NNODES --nproc-per-node=8 --rdzv-id=$SLURM_JOB_ID --rdzv-backend=c10d \\
        --rdzv-endpoint=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29400 \\
        scripts/train_ddp.py --output runs/ddp

Plain `python scripts/train_ddp.py` is one process. --batch-size is that of all processes together. A job that torchrun
has restarted goes on from its last checkpoint by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "torchbasics" / "__init__.py").is_file():  # in a checkout its own package comes first, installed or not
    sys.path.insert(0, str(ROOT))
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else 40 lines of C++ stand around each line of ours

import torch
from torch import nn

import torchbasics as tb
from torchbasics import distributed, options, parallel
from torchbasics.device import branched_random_state, device_name, random_state, set_random_state
from torchbasics.loaders import Loaders, make_loaders
from torchbasics.report import Report, judge, print_result, unused_directory

# -------------------------------------------------------------------------------------------------- model and trainer


def build_trainer(
    args: argparse.Namespace, data: Loaders, device: torch.device, checkpoints: Path
) -> tuple[tb.Trainer, parallel.GradientExchange | None]:
    """As in train_mnist, with the model replicated or sharded where there are several processes."""
    facts, many = data.facts, distributed.world_size() > 1
    model = tb.make_model(args.model, len(facts["classes"]), facts["in_channels"], facts["image_size"], args.dropout)
    precision, exchange, averages = tb.pick_precision(args.precision, device), None, None
    sharded = args.strategy == "fsdp" and many
    model.to(device)
    if sharded:
        model = parallel.shard(model, device, precision)
    else:
        model.to(memory_format=torch.channels_last)  # FSDP takes contiguous parameters only
    if args.ema:
        averages = tb.averaged_copy(model, args.ema)
    optimizer = tb.make_optimizer(args.optimizer, model.parameters(), args.lr, args.weight_decay,
                                  capturable=args.cuda_graph != "off")
    if many and not sharded:
        model = parallel.replicate(model, device, sync_bn=args.sync_bn, static=args.accumulate == 1)
        exchange = parallel.GradientExchange(model, device, args.bf16_gradients)
    steps_per_epoch = -(-len(data.train) // args.accumulate)
    schedule = tb.make_schedule(args.schedule, optimizer, args.epochs * steps_per_epoch,
                                round(args.warmup_epochs * steps_per_epoch))
    trainer = tb.Trainer(
        model, nn.CrossEntropyLoss(label_smoothing=args.label_smoothing), optimizer, device, schedule,
        precision=precision, channels_last=not sharded, compile=args.compile, cuda_graph=args.cuda_graph,
        accumulate=args.accumulate, clip_norm=args.clip_norm, clip_value=args.clip_value, averages=averages,
        nan_policy=args.nan_policy,
        early_stopping=tb.EarlyStopping(args.patience, args.min_delta) if args.patience else None,
        checkpoint_dir=checkpoints, save_every=args.save_every, keep=args.keep,
        metadata={"model": args.model, "dropout": args.dropout, **facts})
    # the same weights everywhere, but not the same dropout
    set_random_state(branched_random_state(random_state(device), distributed.rank(), device), device)
    return trainer, exchange


# ------------------------------------------------------------------------------------------------ what the user reads


class Communication:
    """Once an epoch: how long each process waited for the others, and which one was waited for."""

    def __init__(self, report: Report | None, exchange: parallel.GradientExchange | None) -> None:
        self.report, self.exchange, self.seconds = report, exchange, 0.0  # seconds of rank 0, over all epochs
        self.began, self.before = time.monotonic(), 0.0

    def on_epoch_end(self, trainer: tb.Trainer) -> None:
        """All processes take part; rank 0 prints."""
        total = trainer.waiting_seconds + (self.exchange.seconds if self.exchange else 0.0)
        own, self.before = total - self.before, total
        waited = [seconds for (seconds,) in distributed.all_gather([own])]
        took, self.began = time.monotonic() - self.began, time.monotonic()
        self.seconds += waited[0]
        if self.report is not None and (self.exchange is None or trainer.device.type != "cpu"):
            self.report.say(f"       waited {waited[0]:.1f} s between steps; what is sent within is not measured")
        elif self.report is not None:
            slowest = min(range(len(waited)), key=waited.__getitem__)  # who waits least is waited for
            mean = sum(waited) / len(waited)
            self.report.say(f"       communication {mean:.1f} s of {took:.1f} s (least, so the slowest: "
                            f"rank {slowest}, {waited[slowest]:.1f} s; most: {max(waited):.1f} s)")


def name_processes(device: torch.device, threads: str) -> str:
    """One line on all processes: which ranks are where."""
    places = distributed.gather_objects(f"{socket.gethostname()} {device}")
    ranks = [f"rank {rank}: {place}" for rank, place in enumerate(places)]
    shown = ranks if len(ranks) <= 16 else [*ranks[:8], f"… {len(ranks) - 9} more …", ranks[-1]]
    name = device_name(device) if device.type != "cpu" else device_name(device).rpartition(", ")[0]
    return f"{len(places)} process{'es' * (len(places) > 1)} ({', '.join(shown)}); {name}, {threads}"


# -------------------------------------------------------------------------------------------------------- command line


def make_parser() -> options.Parser:
    parser = options.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    options.add_data_options(parser)
    options.add_model_options(parser)
    options.add_optimisation_options(parser)
    options.add_speed_options(parser)
    add = parser.add_argument_group("processes").add_argument
    add("--strategy", choices=parallel.STRATEGIES, default="ddp",
        help="ddp: a copy of the model a process; fsdp: its parts spread over all (default: ddp)")
    add("--sync-bn", action="store_true",
        help="BatchNorm over the batches of all processes; accelerators only (default: off)")
    add("--bf16-gradients", action="store_true",
        help="ddp: send gradients in bfloat16, for slow networks (default: off)")
    add("--timeout", type=options.RATE, default=60.0, metavar="SECONDS",
        help="give up when another process says nothing for so long (default: 60)")
    options.add_stopping_options(parser)
    options.add_run_options(parser, tb.__version__)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    with contextlib.ExitStack() as stack:
        if distributed.rank_in_environment():  # help and errors come once, from rank 0
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        args = options.parse_with_preset(parser, argv)
        check_strategy(parser, args)
        args = options.check_resume(parser, args)
    return args


def check_strategy(parser: options.Parser, args: argparse.Namespace) -> None:
    if args.strategy == "fsdp":
        for name, value in (("--sync-bn", args.sync_bn), ("--bf16-gradients", args.bf16_gradients),
                            ("--compile", args.compile), ("--precision fp16", args.precision == "fp16")):
            if value:
                parser.error(f"{name} does not go with --strategy fsdp; use --strategy ddp or leave it out")
        if args.ema:  # perhaps from a preset
            parser.error("--ema does not go with --strategy fsdp; use --strategy ddp or --ema 0")


def main(argv: list[str] | None = None) -> int:
    """Returns 0 done, 1 failed, 2 bad input, 3 optional package missing, 128 + signal when interrupted and saved."""
    debug = False
    try:
        args = parse_args(argv)
        debug = args.debug
        device = tb.pick_device(args.device)
        if args.device == "auto" and distributed.is_launched() and device.type not in distributed.ACCELERATORS:
            device = torch.device("cpu")  # a Mac's GPU serves one process only
        device = distributed.own_device(device)
        with options.quiet_ends(debug), distributed.process_group(device, args.timeout):
            return run_together(args, argv, device)
    except KeyboardInterrupt:
        print("\ninterrupted; what was saved stays", file=sys.stderr)
        return 130
    except Exception as error:  # before the processes were together: each for itself
        if debug:
            raise
        if distributed.rank_in_environment() == 0 or isinstance(error, OSError):
            print(f"error: {options.one_line(error, options.GO_ON)}", file=sys.stderr)
        return options.exit_code(error)


def run_together(args: argparse.Namespace, argv: list[str] | None, device: torch.device) -> int:
    """`train`, with its end told once for all processes."""
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            setattr(warnings, "showwarning", options.print_warning)  # noqa: B010 (mypy forbids to assign to a function)
            if not distributed.is_main():
                warnings.simplefilter("ignore")
            return train(args, argv, device, stack)
    except tb.Interrupted as stop:
        if distributed.is_main():
            hint = f"interrupted: {stop}; continue with --resume {stop.checkpoint.parents[1]}"
            print("\n" + options.printable(hint), file=sys.stderr)
        return 128 + stop.signum
    except BrokenPipeError:
        return options.reader_left()
    except Exception as error:
        line = distributed.first_cause(error, options.one_line(error, options.GO_ON))
        if line is not None:
            print(f"error: {line}", file=sys.stderr, flush=True)
            if args.debug:
                traceback.print_exc()
        if device.type != "cpu":  # nccl's orderly end would wait for those that have failed
            sys.stdout.flush()
            os._exit(options.exit_code(error))
        return options.exit_code(error)


def train(args: argparse.Namespace, argv: list[str] | None, device: torch.device, stack: contextlib.ExitStack) -> int:
    """The recipe."""
    began = time.monotonic()
    threads = distributed.set_threads()
    if device.type == "cpu":
        tb.cache_cpu_memory()
    distributed.introduce_host()
    run = None
    if distributed.is_main():  # which alone writes
        run, args = open_run(args, argv, stack)
    args = distributed.broadcast_object(args)
    checkpoints = Path(args.output) / "checkpoints"
    tb.set_seed(args.seed, args.deterministic)
    data = load_data(args, device)
    trainer, exchange = build_trainer(args, data, device, checkpoints)
    start = trainer.resume() if args.resume else None
    processes = name_processes(device, threads)
    report = None
    if run is not None:
        report = Report(args, data, run, began)
        report.begin(trainer, start, tb.__version__, processes)
    communication = Communication(report, exchange)
    if distributed.world_size() > 1:
        trainer.on_epoch_end += (communication.on_epoch_end,)
    try:
        trainer.fit(data.train, data.val, args.epochs, verbose=False)
    except tb.Interrupted:
        if report is not None:
            report.count(trainer, trainer.batch)  # a part of an epoch is time too
            report.run.write_info()
        raise
    result: dict[str, Any] = judge(trainer, data, checkpoints / "best.pt", args.tta)[0]
    if report is not None:
        result |= report.summary(trainer) | {"communication_seconds": communication.seconds}
        report.run.write_info(result=result)
        here = distributed.local_world_size()
        alone = "--standalone " * (here == distributed.world_size())
        launcher = f"torchrun {alone}--nproc-per-node={here} {shlex.quote(sys.argv[0])}"
        print_result(result, report.run, report.data.notice, launcher)
    distributed.barrier()
    return 0


def open_run(
    args: argparse.Namespace, argv: list[str] | None, stack: contextlib.ExitStack) -> tuple[tb.RunDirectory, Any]:
    """The run's directory, and the options of the run that is continued, or those given."""
    earlier = distributed.recall("run")
    if earlier is not None:  # torchrun has started this job again: never from the beginning, whatever was asked for
        args.output, args.resume, args.overwrite = earlier, True, False
    output = Path(args.output or unused_directory("ddp" if args.dataset == "auto" else args.dataset))
    resume = bool(args.resume) if earlier is None else (output / "run.json").is_file()
    run = stack.enter_context(tb.RunDirectory(output, resume=resume, overwrite=args.overwrite))
    distributed.remember("run", str(output))
    args.output = str(output)
    return run, options.recorded_options(make_parser(), argv, args, run) if resume else args


def load_data(args: argparse.Namespace, device: torch.device) -> Loaders:
    """The same data set on all processes, however long a download takes; rank 0 decides what `auto` is."""
    def load() -> Loaders:
        return make_loaders(
            args.dataset, args.data_dir, args.batch_size, val_size=args.val_size, augment=args.augment,
            rotation=args.rotation, shift=args.shift, scaling=args.scaling,
            image_size=args.image_size, num_workers=args.num_workers, seed=args.seed,
            limit_batches=args.limit_batches, device=device)

    data = load() if distributed.is_main() else None
    args.dataset = distributed.tell("dataset", data.facts["dataset"] if data else args.dataset)
    data = data or load()
    distributed.wait_for_all("data")
    for rank, facts in enumerate(distributed.gather_objects(data.facts)):
        if facts != data.facts:
            raise ValueError(f"{args.data_dir}: rank {rank} has other data there than rank {distributed.rank()}; "
                             "give all machines the same files")
    return data


if __name__ == "__main__":
    options.leave(main())
