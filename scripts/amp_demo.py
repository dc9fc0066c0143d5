"""Shows what a precision changes: one model, data and seed in fp32, bf16 and fp16 (on CUDA in TF32 too), side by side.

    python scripts/amp_demo.py
    python scripts/amp_demo.py --device cuda --dataset mnist --model mnistnet --batch-size 512 --steps 200

A claim that is not true here is not shown, but ends the script with exit code 1. Times are measured, not claimed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "torchbasics" / "__init__.py").is_file():  # in a checkout its own package comes first, installed or not
    sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchbasics as tb
from torchbasics import options
from torchbasics.data import NORMALISATION
from torchbasics.demo import Mismatch
from torchbasics.device import AUTOCAST_DTYPES, autocast, bf16_is_native, device_name, synchronize
from torchbasics.evaluation import forward

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
FORMATS = {"fp32": (torch.float32, 8, 23), "bf16": (torch.bfloat16, 8, 7), "fp16": (torch.float16, 5, 10)}
FIRST_LOSS_WITHIN = {"tf32": 0.005, "bf16": 0.02, "fp16": 0.005}  # relative to fp32's, from the same weights
# The scaler's trace, by hand: of eight batches the fourth overflows; the scale doubles after three good steps in a row.
SCALES, STEPS, BAD = [1024, 1024, 2048, 1024, 1024, 1024, 2048, 2048], [1, 2, 3, 3, 4, 5, 6, 7], 4
Section = tuple[dict[str, Any], list[str]]  # what was found, and the lines that show it


def claim(label: str, value: Any, expected: Any, within: float = 0.0) -> dict[str, Any]:
    """{label: value}, to be shown, once `value` is `expected` up to the relative error `within`; else Mismatch."""
    if not (abs(value - expected) <= within * abs(expected) if within else value == expected):
        raise Mismatch(f"{label}: expected {expected}, got {value}")
    return {label: str(value) if value == math.inf else value}  # JSON has no infinity


def claim_lines(claims: dict[str, Any]) -> list[str]:
    return [f"  {key:60} {f'{value:.8g}' if isinstance(value, float) else value}" for key, value in claims.items()]


def types(args: argparse.Namespace, device: torch.device) -> Section:
    """Range and spacing as the numbers of bits give them (IEEE 754), and as arithmetic on `device` has them."""
    table, tensor = {}, functools.partial(torch.tensor, device=device)
    claims: dict[str, Any] = {}
    lines = ["  bits: exponent  fraction        eps    largest  smallest normal   smallest"]
    for name, (dtype, exponent, fraction) in FORMATS.items():
        eps, bias, number = 2.0**-fraction, 2 ** (exponent - 1) - 1, functools.partial(tensor, dtype=dtype)
        largest, normal, info = (2 - eps) * 2.0**bias, 2.0 ** (1 - bias), torch.finfo(dtype)
        claim(f"{name}: torch.finfo", (info.eps, info.max, info.smallest_normal), (eps, largest, normal))
        table[name] = {"exponent_bits": exponent, "fraction_bits": fraction, "eps": eps, "largest": largest,
                       "smallest_normal": normal, "smallest": normal * eps}
        lines.append("  {}  {:8}  {:8}  {:9.3g}  {:9.4g}  {:15.4g}  {:9.3g}".format(name, *table[name].values()))
        total, small = number(0.0), number(1 / 4096)
        for _ in range(4096):  # stands still where half of its spacing is the addend
            total = total + small
        for label, result, expected in (
                ("1 + eps", number(1.0) + number(eps), 1 + eps),
                ("1 + eps / 2: half of the spacing is rounded away", number(1.0) + number(eps / 2), 1.0),
                ("largest * 2: beyond the range", number(largest) * 2, math.inf),
                ("smallest / 2: below the range", number(normal * eps) / 2, 0.0),
                ("1/4096 added 4096 times, one by one", total, min(1.0, 2.0 ** (fraction + 1) / 4096)),
                ("the same by torch.sum, which adds in fp32", small.repeat(4096).sum(), 1.0)):
            claims |= claim(f"{name}: {label}", float(result), expected)
    for text, value, name, expected in (
            ("65504, the largest,", 65504.0, "fp16", 65504.0), ("65520 (overflow)", 65520.0, "fp16", math.inf),
            ("65520 (no overflow, but coarse)", 65520.0, "bf16", 65536.0), ("2049", 2049.0, "fp16", 2048.0),
            ("2**-24, the smallest,", 2.0**-24, "fp16", 2.0**-24), ("2**-25 (underflow)", 2.0**-25, "fp16", 0.0),
            ("2**-25", 2.0**-25, "bf16", 2.0**-25), ("257", 257.0, "bf16", 256.0)):
        claims |= claim(f"{text} in {name}", float(tensor(value, dtype=FORMATS[name][0])), expected)
    note = "  TF32 is no type of tensors, but products of fp32 tensors whose factors keep 10 bits of their fraction."
    return {"table": table, "claims": claims}, [*lines, *claim_lines(claims), note]


def casts(args: argparse.Namespace, device: torch.device) -> Section:
    """The type in which autocast has each operation answer; all weights and inputs are fp32."""
    x, w, images, kernel, target = (t.to(device) for t in (
        torch.ones(8, 4), torch.ones(3, 4), torch.ones(2, 3, 8, 8), torch.ones(5, 3, 3, 3), torch.arange(8) % 3))
    operations: dict[str, tuple[Callable[[], Tensor], bool]] = {  # and whether it answers in fp32
        "linear": (lambda: F.linear(x, w), False), "conv2d": (lambda: F.conv2d(images, kernel), False),
        "relu of a linear layer's output: as it comes": (lambda: F.relu(F.linear(x, w)), False),
        "a linear layer's output + an fp32 tensor: the wider one": (lambda: F.linear(x, w) + x[:, :1], True),
        # here the lists of CUDA and of the CPU differ
        "softmax of a linear layer's output": (lambda: F.softmax(F.linear(x, w), 1), device.type == "cuda"),
        "mse_loss": (lambda: F.mse_loss(F.linear(x, w), F.linear(x, w)), True),
        "cross_entropy": (lambda: F.cross_entropy(F.linear(x, w), target), True)}
    table: dict[str, dict[str, Any]] = {name: {} for name in args.precision if name in AUTOCAST_DTYPES}
    for name, (label, (call, wide)) in itertools.product(table, operations.items()):
        with autocast(device, name):
            table[name] |= claim(label, str(call().dtype), str(torch.float32 if wide else AUTOCAST_DTYPES[name]))
    lines = [f"  {label:60} {'  '.join(f'{row[label]:14}' for row in table.values())}".rstrip() for label in operations]
    return table, [*lines, "  Weights and the optimizer's state stay fp32: compared after the training below."]


def scaling(args: argparse.Namespace, device: torch.device) -> Section:
    """Why fp16 needs a scaler, and what that does when a gradient overflows."""
    claims: dict[str, Any] = {}
    for label, name, scaled, expected in (
            ("fp16: a gradient of 2**-26, back through a layer in fp16", "fp16", False, 0.0),
            ("fp16: the loss times 65536, the gradient divided by it", "fp16", True, 2.0**-26),
            ("bf16: has the range of fp32, needs no scaler", "bf16", False, 2.0**-26)):
        layer, scaler = nn.Linear(1, 1, False, device), torch.amp.GradScaler(device.type, 65536.0, enabled=scaled)
        with autocast(device, name):
            output = layer(torch.ones(1, 1, device=device))
        scaler.scale(output.float().sum() * 2.0**-26).backward()
        scaler.unscale_(torch.optim.SGD(layer.parameters()))
        claims |= claim(label, float(layer.weight.grad), expected)  # type: ignore[arg-type]
    rows, head = trace(device, args.seed), "  batch       loss  scale  steps  moved  rate"
    lines = [f"  {row['batch']:5}  {row['loss']:9.4f}  {row['scale']:5.0f}  {row['steps']:5}  {row['moved']!s:>5}  "
             f"{row['rate']:.6f}{'  overflow: skipped' * (not row['moved'])}" for row in rows]
    note = "  Steps of a Trainer: the scale doubles after three good ones in a row."
    return {"claims": claims, "trace": rows}, [*claim_lines(claims), note, head, *lines]


def trace(device: torch.device, seed: int) -> list[dict[str, Any]]:
    """Steps of a real Trainer in fp16, one batch of them with outliers; what is to come is known by hand."""
    tb.set_seed(seed)
    model = nn.Linear(4, 3).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = tb.Trainer(model, nn.CrossEntropyLoss(), optimizer, device, scheduler_interval="step", precision="fp16",
                         scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    # in place of the Trainer's own (65536 and 2000), so that eight batches show all that it does
    trainer.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=3)
    rows: list[dict[str, Any]] = []
    for number in range(1, len(STEPS) + 1):
        inputs = torch.full((8, 4), 1e4) if number == BAD else torch.randn(8, 4)
        before = model.weight.detach().clone()
        loss, _ = trainer.train_one_epoch([(inputs, torch.arange(8) % 3)])
        rows.append({"batch": number, "loss": loss, "scale": trainer.scaler.get_scale(), "steps": trainer.step,
                     "moved": not torch.equal(before, model.weight), "rate": optimizer.param_groups[0]["lr"]})
    for key, expected in {"scale": SCALES, "steps": STEPS, "moved": [row["batch"] != BAD for row in rows],
                          "rate": [0.1 * 0.5**step for step in STEPS]}.items():
        claim(f"the scaler's trace: {key}", [row[key] for row in rows], expected)
    return rows


@contextlib.contextmanager
def float32_products(device: torch.device, precision: str) -> Iterator[None]:
    """On CUDA, TF32 for `tf32` only: in fp32, too, cuDNN's convolutions would use it by default."""
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv) if device.type == "cuda" else ()
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.fp32_precision = was


def load(args: argparse.Namespace, device: torch.device) -> list[tb.TensorLoader]:
    """Loaders of training and of held-out images; of digits no more are drawn than needed."""
    if args.dataset == "digits":
        images = tb.Images(*tb.draw_digits(1000 + min(args.steps * args.batch_size, 60_000)), tuple("0123456789"))
        train, val = images.subset(slice(1000, None)), images.subset(slice(1000))
    else:
        train, val, _ = tb.load_splits(args.dataset, args.data_dir, seed=args.seed)
    mean, std = NORMALISATION["mnist"]  # near enough for all of them
    return [tb.TensorLoader(part.inputs, part.targets, size, shuffle=part is train, drop_last=part is train,
                            seed=args.seed, device=device, mean=mean, std=std)
            for part, size in ((train, args.batch_size), (val, 1000))]


def build_trainer(args: argparse.Namespace, device: torch.device, precision: str) -> tb.Trainer:
    """From the same weights whatever the precision, and without dropout: only the arithmetic differs."""
    tb.set_seed(args.seed)
    model = tb.make_model(args.model, dropout=0.0).to(device)
    return tb.Trainer(model, nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters(), lr=1e-3), device,
                      precision="fp32" if precision == "tf32" else precision, channels_last=True)


def side_by_side(data: list[tb.TensorLoader], args: argparse.Namespace, device: torch.device) -> Section:
    """Trains all precisions in turn, a step of each (A B C A B C): what else the machine does hits all alike."""
    train, val = data
    trainers = {name: build_trainer(args, device, name) for name in args.precision}
    steps: dict[str, list[tuple]] = {name: [] for name in args.precision}
    matrix = torch.ones(2 * [4096 if device.type == "cuda" else 256], device=device)
    batches = itertools.chain.from_iterable(itertools.repeat(train))
    for number, batch in enumerate(itertools.islice(batches, args.steps), start=1):
        for name, trainer in trainers.items():
            factor = matrix.to(AUTOCAST_DTYPES.get(name, torch.float32))
            with float32_products(device, name):
                (loss, _), *rest = timed(functools.partial(trainer.train_one_epoch, [batch]), device)
                steps[name].append((loss, *rest, timed(functools.partial(torch.mm, factor, factor), device)[1]))
        if sys.stderr.isatty():
            print(f"step {number}/{args.steps}", end="\r", file=sys.stderr, flush=True)
    runs: dict[str, dict[str, Any]] = {}
    for name, trainer in trainers.items():
        losses, seconds, peaks, products = zip(*steps[name], strict=True)
        reference = runs.get("fp32", {"losses": losses})["losses"]
        claim(f"{name}: the first loss", losses[0], reference[0], FIRST_LOSS_WITHIN.get(name, 0.0))
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
        kept_in = {t.dtype for t in (*trainer.model.parameters(), *states) if torch.is_tensor(t)}
        claim(f"{name}: types of the weights and of the optimizer's state", kept_in, {torch.float32})
        with float32_products(device, name):
            accuracy = trainer.validate(val)[1]
        runs[name] = {"losses": losses, "accuracy": accuracy, "skipped": trainer.skipped,
                      "step_seconds": statistics.median(seconds[min(2, args.steps - 1):]),  # the first two warm up
                      "product_seconds": statistics.median(products[min(2, args.steps - 1):]),
                      "kept_bytes": kept_bytes(trainer, batch), "peak_bytes": peaks[-1],
                      "apart": max(abs(a - b) for a, b in zip(losses, reference, strict=True))}
        slower = [runs[name][key] / runs["fp32"][key] for key in ("step_seconds", "product_seconds")]
        runs[name]["why"] = "" if name == "fp32" else why(name, device, *slower)
    return runs, run_lines(runs)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float, int]:
    """What `call` returns, the seconds until all of it is done, the peak of CUDA's memory beyond what was there."""
    cuda = device.type == "cuda"
    synchronize(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    there, began = torch.cuda.memory_allocated(device) if cuda else 0, time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - began, torch.cuda.max_memory_allocated(device) - there if cuda else 0


def kept_bytes(trainer: tb.Trainer, batch: tuple[Tensor, Tensor]) -> int:
    """What the forward of one batch keeps for backward, by saved-tensor hooks, without the weights and the batch."""
    model = copy.deepcopy(trainer.model).train()  # BatchNorm would count this batch
    inputs, saved = batch[0].to(memory_format=trainer.memory_format), []  # type: ignore[var-annotated]

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())  # holds the storage, so that no address stands for two
        return saved[-1]

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward(model, trainer.criterion, inputs, batch[1], trainer.precision)
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), inputs, batch[1])}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(size for address, size in sizes.items() if address not in there)


def why(precision: str, device: torch.device, step: float, product: float) -> str:
    """Why a step takes `step` times as long as in fp32, where a large product takes `product` times as long."""
    here = "GPU" if device.type == "cuda" else "CPU"
    found = torch.cpu.get_capabilities() if here == "CPU" and hasattr(torch.cpu, "get_capabilities") else {}
    reason = f"torch's products are no faster on this {here}"
    if product < 0.9:
        reason = "casts and small operations outweigh the products"
    elif precision == "bf16" and not bf16_is_native(device):
        reason = f"this {here} emulates bf16"
    elif precision == "fp16" and here == "CPU" and not any(map(found.get, ("avx512_fp16", "amx_fp16", "fp16"))):
        reason = "torch reports no fp16 units on this CPU"
    verdict = "a gain" if step < 0.9 else f"no gain: {reason}"
    return f"{step:.2f} of fp32's time for a step, {product:.2f} for a product: {verdict}"


def run_lines(runs: dict[str, Any]) -> list[str]:
    lines = ["        ms a step   speed  ms product  kept MiB  peak MiB  skipped  accuracy"]
    for name, run in runs.items():
        seconds, speed = run["step_seconds"], runs["fp32"]["step_seconds"] / run["step_seconds"]
        lines.append(f"  {name}  {seconds * 1e3:9.3f}  {speed:6.2f}  {run['product_seconds'] * 1e3:10.3f}  "
                     f"{run['kept_bytes'] / 2**20:8.2f}  {run['peak_bytes'] / 2**20 or '-':>8.6}  "
                     f"{run['skipped']:7}  {run['accuracy']:8.2%}")
    lines += ["  ms: medians, synchronised, interleaved. kept: for backward, casts of weights too, counted by hooks.",
              "  peak: of a step beyond what was there (CUDA only). skipped: by the scaler, which begins at 65536.",
              *(f"  {name}: {run['why']}" for name, run in runs.items() if run["why"]), "",
              "Losses of the same batches, from the same weights", "   step " + "".join(f"{name:>10}" for name in runs)]
    steps = len(runs["fp32"]["losses"])
    for i in sorted({round(i * (steps - 1) / 9) for i in range(10)}):
        lines.append(f"  {i + 1:5} " + "".join(f"{run['losses'][i]:10.4f}" for run in runs.values()))
    return [*lines, "  apart " + "".join(f"{run['apart']:10.4f}" for run in runs.values()) + "   (at most, from fp32)"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:1 (default: auto)")
    add("--precision", nargs="+", choices=PRECISIONS, metavar="NAME",
        help="of fp32, tf32 (CUDA only), bf16, fp16; fp32 always comes along (default: all that there are)")
    add("--steps", type=options.COUNT, default=20, metavar="N", help="training steps of each precision (default: 20)")
    add("--batch-size", type=options.number(int, 8), default=32, metavar="N",
        help="images a batch, at least 8: BatchNorm of fewer enlarges what is rounded (default: 32)")
    add("--model", choices=options.MODELS, default="cnn", help="network (default: cnn)")
    add("--dataset", choices=[name for name in options.DATASETS if name not in ("auto", "folder")],
        help="images (default: drawn digits; with --data-dir mnist)")
    add("--data-dir", metavar="DIR", help="where data sets are or go (default: ./data)")
    add("--seed", type=options.number(int, 0, 2**32 - 1), default=42, metavar="N", help="(default: 42)")
    add("--json", action="store_true", help="print everything as JSON, and nothing else (default: tables)")
    add("--debug", action="store_true", help="show tracebacks (default: off)")
    args = parser.parse_args(argv)
    args.dataset, args.data_dir = args.dataset or ("mnist" if args.data_dir else "digits"), args.data_dir or "./data"
    return args


def settle(args: argparse.Namespace) -> torch.device:
    """The device; makes `args.precision` what there is of the wanted ones. ValueError for what there is not."""
    device = tb.pick_device(args.device if args.device != "auto" or torch.cuda.is_available() else "cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device}: this demo is for cpu and cuda; use one of these")
    tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if "tf32" in (args.precision or ()) and not tf32:
        raise ValueError(f"--precision tf32: {device} has none, only NVIDIA's GPUs since Ampere have; leave it out")
    wanted = {"fp32", *(args.precision or PRECISIONS)}
    args.precision = [name for name in PRECISIONS if name in wanted and (tf32 or name != "tf32")]
    return device


def main(argv: list[str] | None = None) -> int:
    """Returns 0 done, 1 a claim was wrong or something failed, 2 bad input, 130 interrupted, 141 the reader left."""
    args = parse_args(argv)
    return options.guarded(lambda: run(args), args.debug)


def run(args: argparse.Namespace) -> int:
    """The recipe."""
    device = settle(args)
    data = load(args, device)
    where = f"{device_name(device)}, torch {torch.__version__}"
    report: dict[str, Any] = {"settings": {**vars(args), "device": str(device), "device_name": where}}
    say: Callable = (lambda *_, **__: None) if args.json else print
    say(f"{args.model} on {args.dataset}, {args.steps} steps of {args.batch_size} images, seed {args.seed}; {where}")
    low = set(args.precision) & AUTOCAST_DTYPES.keys()
    for name, title, wanted, section in (
            ("types", "Range and spacing of the types", True, types),
            ("autocast", "What autocast has operations answer in", low, casts),
            ("scaling", "Why fp16 needs a scaler, and what it does", "fp16" in low, scaling),
            ("runs", "Side by side", True, functools.partial(side_by_side, data))):
        if wanted:
            report[name], lines = section(args, device)
            say("\n".join(["", title, *lines]), flush=True)
    if args.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
