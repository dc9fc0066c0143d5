"""Trains a digit classifier to above 99.6% on MNIST, resumable at any moment; without data on digits drawn for it.

    python scripts/train_mnist.py --epochs 15
    python scripts/train_mnist.py --resume runs/mnist-20260102-030405
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shlex
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "torchbasics" / "__init__.py").is_file():  # in a checkout its own package comes first, installed or not
    sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn

import torchbasics as tb
from torchbasics import options
from torchbasics.device import preserved_random_state
from torchbasics.evaluation import to_device
from torchbasics.loaders import Loaders, make_loaders
from torchbasics.mnist import import_torchvision
from torchbasics.report import Report, judge, print_result, python_command, score, unused_directory


def load_data(args: argparse.Namespace, device: torch.device) -> Loaders:
    return make_loaders(
        args.dataset, args.data_dir, args.batch_size, val_size=args.val_size, augment=args.augment,
        rotation=args.rotation, shift=args.shift, scaling=args.scaling,
        image_size=args.image_size, num_workers=args.num_workers, seed=args.seed, limit_batches=args.limit_batches,
        limit_evaluation=args.limit_batches if args.dry_run else None, device=device)


def build_trainer(args: argparse.Namespace, data: Loaders, device: torch.device, checkpoints: Path) -> tb.Trainer:
    facts = data.facts
    model = tb.make_model(args.model, len(facts["classes"]), facts["in_channels"], facts["image_size"], args.dropout)
    model.to(device)
    optimizer = tb.make_optimizer(args.optimizer, model.parameters(), args.lr, args.weight_decay,
                                  capturable=args.cuda_graph != "off")
    steps_per_epoch = -(-len(data.train) // args.accumulate)
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    schedule = tb.make_schedule(args.schedule, optimizer, args.epochs * steps_per_epoch, warmup_steps)
    return tb.Trainer(
        model, nn.CrossEntropyLoss(label_smoothing=args.label_smoothing), optimizer, device, schedule,
        precision=args.precision, channels_last=True, compile=args.compile, cuda_graph=args.cuda_graph,
        accumulate=args.accumulate, clip_norm=args.clip_norm, clip_value=args.clip_value, nan_policy=args.nan_policy,
        averages=tb.averaged_copy(model, args.ema) if args.ema else None,
        early_stopping=tb.EarlyStopping(args.patience, args.min_delta) if args.patience else None,
        checkpoint_dir=checkpoints, save_every=args.save_every, keep=args.keep,
        metadata={"model": args.model, "dropout": args.dropout, **data.facts})


def draw_mistakes(logits: Tensor, targets: Tensor, data: Loaders, path: Path, most: int = 40) -> None:
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


def summary_writer() -> Any:
    """TensorBoard's class of that name."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise options.MissingExtra(
            "--tensorboard needs another package: pip install 'torchbasics[tensorboard]'") from None
    return SummaryWriter


def tensorboard(run: tb.RunDirectory, trainer: tb.Trainer, data: Loaders) -> Any:
    """Writes losses, accuracies, rate, the graph and a grid of training images; returns the call-back."""
    from torchvision.utils import make_grid

    writer = summary_writer()(str(run.path / "tensorboard"), purge_step=trainer.step + 1)
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


def launcher() -> str:
    """The command that started this script, without its options."""
    return shlex.join([python_command(), sys.argv[0] if sys.argv[0].endswith(".py") else __file__])


def make_parser() -> options.Parser:
    parser = options.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    options.add_data_options(parser)
    options.add_model_options(parser)
    options.add_optimisation_options(parser)
    options.add_speed_options(parser)
    options.add_stopping_options(parser)
    add = options.add_run_options(parser, tb.__version__).add_argument
    add("--ensemble", type=options.COUNT, default=1, metavar="N",
        help="train N models, with seeds from --seed on, and average their probabilities (default: 1)")
    add("--dry-run", action="store_true", help="two batches of everything, nothing kept (default: off)")
    add("--tensorboard", action="store_true", help="write TensorBoard files too; needs that package (default: off)")
    add("--anomaly", action="store_true", help="name the forward line of a NaN gradient; slow (default: off)")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = options.check_resume(parser, options.parse_with_preset(parser, argv))
    if args.seed + args.ensemble > 2**32:
        parser.error(f"--seed {args.seed}: each of {args.ensemble} models takes the next one; the highest is 2**32 - 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns 0 done, 1 failed, 2 bad input, 3 optional package missing, 128 + signal when interrupted and saved."""
    args = parse_args(argv)
    with options.quiet_ends(args.debug):
        return options.guarded(lambda: open_and_train(args, argv), args.debug, "interrupted; what was saved stays",
                               options.GO_ON)


def open_and_train(args: argparse.Namespace, argv: list[str] | None) -> int:
    """`train`, or `train_ensemble`; a signal is told with what continues the run."""
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            setattr(warnings, "showwarning", options.print_warning)  # noqa: B010 (mypy forbids to assign to a function)
            args, run = open_run(args, argv, stack)
            return (train_ensemble if args.ensemble > 1 else train)(args, run, stack)
    except tb.Interrupted as stop:
        folder = stop.checkpoint.parents[1 if args.ensemble == 1 else 2]
        hint = "" if args.dry_run else f"; continue with --resume {folder}"
        print("\n" + options.printable(f"interrupted: {stop}{hint}"), file=sys.stderr)
        return 128 + stop.signum


def open_run(
    args: argparse.Namespace, argv: list[str] | None, stack: contextlib.ExitStack
) -> tuple[argparse.Namespace, tb.RunDirectory | None]:
    """The options, of a resumed run its own; and the run's directory, unless that is chosen or replaced later."""
    if args.tensorboard:
        summary_writer()  # what is missing is said before anything is replaced
    if args.dry_run:
        args.epochs, args.limit_batches, args.warmup_epochs = 1, 2, min(args.warmup_epochs, 1)
        args.output = stack.enter_context(tempfile.TemporaryDirectory())
    if not args.output or args.overwrite:
        return args, None
    run = stack.enter_context(tb.RunDirectory(args.output, resume=bool(args.resume)))
    return options.recorded_options(make_parser(), argv, args, run) if args.resume else args, run


def train(args: argparse.Namespace, run: tb.RunDirectory | None, stack: contextlib.ExitStack) -> int:
    """The recipe."""
    began = time.monotonic()
    device = tb.pick_device(args.device)
    if device.type == "cpu":
        tb.cache_cpu_memory()
    tb.set_seed(args.seed, args.deterministic)
    stack.enter_context(torch.autograd.set_detect_anomaly(args.anomaly))
    data = load_data(args, device)
    output = Path(args.output or unused_directory(data.facts["dataset"]))
    trainer = build_trainer(args, data, device, output / "checkpoints")
    if run is None:  # an earlier run is replaced only now, when the new one can start
        run = stack.enter_context(tb.RunDirectory(output, overwrite=args.overwrite))
    start = trainer.resume() if args.resume else None
    report = Report(args, data, run, began)
    if args.tensorboard:
        trainer.on_epoch_end = (tensorboard(run, trainer, data),)
    report.begin(trainer, start, tb.__version__)
    try:
        trainer.fit(data.train, data.val, args.epochs, verbose=False)
    except tb.Interrupted:
        report.count(trainer, trainer.batch)  # a part of an epoch is time too
        run.write_info()
        raise
    result, logits, targets = judge(trainer, data, run.checkpoints / "best.pt", args.tta)
    result |= report.summary(trainer)
    run.write_info(result=result)
    print_result(result, run, report.data.notice, launcher(), kept=not args.dry_run)
    try:
        draw_mistakes(logits, targets, data, run.path / "mistakes.png")
    except (ImportError, OSError) as error:  # a picture must not cost a result
        options.print_warning(f"{run.path / 'mistakes.png'} was not drawn: {error}")
    return 0


# ------------------------------------------------------------------------------------------------------------- ensemble


def train_ensemble(args: argparse.Namespace, run: tb.RunDirectory | None, stack: contextlib.ExitStack) -> int:
    """Each member is a run of its own, in a folder of this one; a finished one is not trained again after a resume."""
    data = load_data(args, tb.pick_device(args.device))
    if data.test is data.val:
        raise ValueError(f"{args.data_dir}: --ensemble needs a test/ folder: each model holds out other images, "
                         "and has seen those of the others")
    if run is None:
        output = args.output or unused_directory(f"{data.facts['dataset']}-ensemble")
        run = stack.enter_context(tb.RunDirectory(output, overwrite=args.overwrite))
    args.dataset = data.facts["dataset"]
    run.write_info(command=run.info.get("command") or shlex.join(sys.argv), notice=run.info.get("notice", data.notice),
                   arguments={**vars(args), "output": str(run.path)})
    members = [train_member(args, run.path / f"member-{i + 1}", args.seed + i) for i in range(args.ensemble)]
    result = judge_ensemble(args, run, members)
    run.write_info(result=result)
    alone = "  ".join(f"{member['test_accuracy']:.2%}" for member in members)
    print(f"\nensemble of {args.ensemble}: test {result['test_accuracy']:.2%} (loss {result['test_loss']:.4f}) on "
          f"{result['dataset']}; alone {alone}")
    if not args.dry_run:
        print(f"files:    {options.printable(run.path)}")
    if run.info["notice"]:
        print(options.printable(run.info["notice"]))
    return 0


def train_member(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """Trains the member in `folder`, or what is left of its training; returns its result."""
    described = folder / "run.json"
    begun = bool(args.resume) and described.is_file()
    if not (begun and "result" in json.loads(described.read_text(encoding="utf-8"))):
        changes = {"ensemble": 1, "seed": seed, "output": str(folder), "resume": begun}
        free = ["--data-dir", args.data_dir, *(["--quiet"] if args.quiet else [])]
        with contextlib.ExitStack() as stack:
            member, run = argparse.Namespace(**vars(args) | changes), None
            if not args.dry_run:  # whose folder is chosen already
                member, run = open_run(member, free, stack)
                for name in options.FREE_ON_RESUME - changes.keys() & vars(args).keys():
                    setattr(member, name, getattr(args, name))
            train(member, run, stack)
    return json.loads(described.read_text(encoding="utf-8"))["result"]


def judge_ensemble(args: argparse.Namespace, run: tb.RunDirectory, members: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of the mean probability of all members' best weights on the test set.

    Each member has held out other images for validation, so there is no validation accuracy of all together.
    """
    began, outputs = time.monotonic(), []
    for i in range(len(members)):
        own = argparse.Namespace(**vars(args) | {"seed": args.seed + i})  # its own split, and so its normalisation
        device = tb.pick_device(args.device)
        data = load_data(own, device)
        checkpoints = run.path / f"member-{i + 1}" / "checkpoints"
        trainer, best = build_trainer(own, data, device, checkpoints), checkpoints / "best.pt"
        trainer.load_evaluated(tb.load_checkpoint(best)["model_state_dict"], str(best))
        outputs.append(trainer.predict(data.test, tb.ShiftedViews if args.tta else None).log_softmax(1))
    logits = torch.stack(outputs).logsumexp(0) - math.log(len(outputs))
    targets = torch.cat([targets for _, targets in data.test]).cpu()
    seconds, total = (sum(member[name] for member in members) for name in ("train_seconds", "total_seconds"))
    images = sum(member["samples_per_second"] * member["train_seconds"] for member in members)
    return score(logits, targets, data.facts["classes"]) | {
        "best_val_accuracy": None, "best_epoch": None, "epochs_run": sum(member["epochs_run"] for member in members),
        "train_seconds": seconds, "total_seconds": total + time.monotonic() - began,
        "samples_per_second": images / seconds if seconds else 0.0,
        "stopped_because": f"all {len(members)} members done", "dataset": data.facts["dataset"], "notice": data.notice,
        "model": args.model, "parameters": sum(member["parameters"] for member in members), "members": members}


if __name__ == "__main__":
    options.leave(main())
