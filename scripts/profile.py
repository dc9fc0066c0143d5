"""Profile a training step: what sets its pace, which option to change first, and where the time and the memory go.

    python scripts/profile.py --model mnistnet --batch-size 128
    python scripts/profile.py --model torchvision.models:resnet18 --input-shape 3,224,224 --batch-size 8 --memory

The verdict is the first of these that holds:

loader, transfer  with one batch kept on the device a step takes at least 25% less; the longer of the two is named
overhead          half the batch takes at least 80% of the time: the rest is starting operators and the optimizer
compute           at least half of the operators' time goes into matrix products, convolutions and attention
memory-bound      it does not: most operators only read and write memory

It trains AdamW on the batches of --loader, or on random inputs of --input-shape, which take no time to load.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.machinery
import importlib.util
import itertools
import os
import re
import statistics
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# This file hides the standard library's `profile`, which cProfile imports, and torch imports cProfile. Whoever imports
# `profile` gets the real module.
if __name__ == "profile":
    spec: Any = importlib.machinery.PathFinder.find_spec(__name__, [sysconfig.get_path("stdlib")])
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
else:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would report its progress on stderr,
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and memory that is older than its start

    import torch
    from torch import Tensor, nn
    from torch.profiler import record_function
    from torch.utils.checkpoint import checkpoint

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/
    import torchbasics as tb
    from torchbasics import cli
    from torchbasics.device import autocast, bf16_is_native, device_name, synchronize
    from torchbasics.evaluation import evaluation_mode, in_float32, to_device

PHASES = ("data", "transfer", "forward", "backward", "optimizer")
PRODUCTS = re.compile(r"mm|conv|attention|linear|lstm|gru|rnn", re.IGNORECASE)  # in the names of operators
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
REPEATS, WARMUP, TRACED = 3, 3, 3  # timed passes, steps before them, steps in the trace
BUSY = 0.3  # the spread of equal passes that only other programs explain
OUT_OF_MEMORY = "use half the --batch-size (in training with --accumulate 2), then --precision bf16"
MIB = 2**20


class Work(NamedTuple):
    """What a training step needs besides its batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    criterion: Callable[[Any, Any], Tensor]
    scaler: torch.amp.GradScaler
    device: torch.device
    precision: str


def make_work(model: nn.Module, batch: tuple[Tensor, Tensor], device: torch.device, precision: str) -> Work:
    model.to(device).train()
    if batch[0].dim() == 4:  # images
        model.to(memory_format=torch.channels_last)
    criterion = nn.MSELoss() if batch[1].is_floating_point() else nn.CrossEntropyLoss()
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # as in training
    return Work(model, optimizer, criterion, scaler, device, precision)


def train_step(
    work: Work, batches: Iterator, phase: Callable[[str], Any] = contextlib.nullcontext, accumulate: int = 1
) -> None:
    """Take one optimizer step on `accumulate` batches of equal size; run each part inside `phase(its name)`."""
    work.optimizer.zero_grad()
    for _ in range(accumulate):
        with phase("data"):
            batch = next(batches)
        with phase("transfer"):
            inputs, targets = to_device(batch, work.device)
        with phase("forward"), autocast(work.device, work.precision):
            loss = work.criterion(in_float32(work.model(inputs)), targets) / accumulate
        with phase("backward"):
            work.scaler.scale(loss).backward()
    with phase("optimizer"):
        work.scaler.step(work.optimizer)
        work.scaler.update()


def time_steps(work: Work, batches: Iterator, steps: int, accumulate: int = 1) -> float:
    """Return the mean seconds of a step. The device is waited for at the end only, as in training."""
    synchronize(work.device)
    began = time.perf_counter()
    for _ in range(steps):
        train_step(work, batches, accumulate=accumulate)
    synchronize(work.device)
    return (time.perf_counter() - began) / steps


def median_step(work: Work, batches: Iterator, steps: int, accumulate: int = 1) -> float:
    """Return the seconds of a step, the median of REPEATS passes after WARMUP steps; warn if the passes differ much."""
    time_steps(work, batches, WARMUP, accumulate)
    times = [time_steps(work, batches, steps, accumulate) for _ in range(REPEATS)]
    if max(times) > (1 + BUSY) * min(times):
        text = f"the machine is busy: equal passes differ by more than {BUSY:.0%}; measure again later"
        warnings.warn(text, stacklevel=2)
    return statistics.median(times)


def time_spans(work: Work, batches: Iterator, steps: int, modules: Iterable[nn.Module] = ()) -> dict[Any, float]:
    """Return the mean seconds of each phase, of the forward of each of `modules`, and of the whole "step".

    Each is without the others inside it, so that their sum is less than the step. The device is waited for at both ends
    of each: without that, an accelerator's work would be counted where the program happens to wait for it.
    """
    seconds: dict[Any, float] = dict.fromkeys(modules, 0.0)
    running: list[list[float]] = []  # of each span that runs: when it began, and the seconds of those inside it

    def begin(*_: Any) -> None:
        synchronize(work.device)
        running.append([time.perf_counter(), 0.0])

    def end(name: Any, *_: Any) -> None:
        synchronize(work.device)
        began, inside = running.pop()
        took = time.perf_counter() - began
        seconds[name] = seconds.get(name, 0.0) + (took - inside) / steps
        if running:
            running[-1][1] += took

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        begin()
        yield
        end(name)

    handles = [module.register_forward_pre_hook(begin) for module in seconds]
    handles += [module.register_forward_hook(end, always_call=True) for module in seconds]
    for _ in range(steps):
        with phase("step"):
            train_step(work, batches, phase)
    for handle in handles:
        handle.remove()
    return seconds | {"step": sum(seconds.values())}


def time_operators(work: Work, batches: Iterator, trace: str | None) -> list[tuple[str, float, float]]:
    """Return (name, calls, own seconds) of each operator per step, the longest first; write a Chrome trace.

    Seconds are the accelerator's, or the CPU's if there is none.
    """
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        for _ in range(TRACED):
            train_step(work, batches, lambda name: record_function(f"step.{name}"))
        synchronize(work.device)
    if trace:
        profiler.export_chrome_trace(trace)
    rows = []
    for row in profiler.key_averages():
        if row.device_type == torch.autograd.DeviceType.CPU and not row.is_user_annotation:
            own = row.self_cpu_time_total if work.device.type == "cpu" else row.self_device_time_total  # µs
            rows.append((row.key, row.count / TRACED, own / 1e6 / TRACED))
    return sorted(rows, key=lambda row: -row[2])


def verdict(
    step: float, bare: float, half: float | None, split: dict[str, float], products: float,
    *, try_bf16: bool, try_compile: bool,
) -> tuple[str, str, str]:  # fmt: skip
    """Return (what bounds the step, the figure that shows it, what to change), by the rules at the top of this file.

    `step`, `bare` (without loading) and `half` (of the batch; None if not measured) are seconds, not synchronised.
    `split` has those of each phase, synchronised. `products` is their share of the operators' time.
    """
    fuse = "--compile, which fuses operators; then " if try_compile else ""
    bf16 = "--precision bf16; then " if try_bf16 else ""
    if bare <= 0.75 * step:
        figure = f"with one batch kept on the device a step takes {bare * 1e3:.2f} ms instead of {step * 1e3:.2f} ms"
        if split["transfer"] > split["data"]:
            return "transfer", figure, "DataLoader(pin_memory=True), or all data on the device in a TensorLoader"
        return "loader", figure, "DataLoader(num_workers=...); then a simpler transform, images stored smaller"
    if half is not None and half >= 0.8 * bare:
        figure = f"half the batch takes {half / bare:.0%} of the time"
        return "overhead", figure, f"{fuse}twice the --batch-size"
    figure = f"products, convolutions and attention take {products:.0%} of the operators' time"
    if products >= 0.5:
        return "compute", figure, f"{bf16}a smaller model, smaller images, or a faster device"
    return "memory-bound", figure, f"{fuse}{bf16}fewer or smaller activations"


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the children that hold several layers, also those in lists; the model itself if it has none."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += [block for block in blocks(child) if block is not child]
        elif any(True for _ in child.children()):
            found.append(child)
    return found or [model]


def checkpoint_activations(model: nn.Module) -> nn.Module:
    """Make each block of `model` drop its activations after forward and compute them again in backward; return it.

    Gradients stay the same, dropout included. The running statistics of BatchNorm see each batch twice.
    """
    for block in blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return model


class Measured(NamedTuple):
    """One way of taking a step."""

    peak: int  # bytes, with the model and the batch
    seconds: float
    gradients: list[Tensor]  # of the first step


def measure(work: Work, batch: tuple[Tensor, Tensor], steps: int, accumulate: int = 1) -> Measured:
    """Measure a step of a copy of the model on `batch`, cut into `accumulate` equal parts."""
    work = make_work(copy.deepcopy(work.model), batch, work.device, work.precision)
    batches = itertools.cycle(list(zip(*(tensor.chunk(accumulate) for tensor in batch), strict=True)))
    tb.set_seed()  # so that dropout draws the same in all that are compared
    train_step(work, batches, accumulate=accumulate)
    gradients = [p.grad.detach().clone() for p in work.model.parameters() if p.grad is not None]
    work.optimizer.zero_grad()
    state = [value for values in work.optimizer.state.values() for value in values.values()]
    held = sum(tensor.nbytes for tensor in (*work.model.parameters(), *work.model.buffers(), *state, *batch))
    tracker = tb.MemoryTracker(work.device)
    with tracker.phase("step"):
        train_step(work, batches, accumulate=accumulate)
        synchronize(work.device)
    return Measured(held + tracker.peaks["step"], median_step(work, batches, steps, accumulate), gradients)


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference of two lists of gradients, relative to the largest expected entry."""
    largest = max(float(b.abs().max()) for b in expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / largest


def estimate(work: Work, inputs: Tensor) -> dict[str, int]:
    """Return the parts of MemoryTracker's estimate for training on `inputs`, in bytes."""
    with autocast(work.device, work.precision):
        return tb.MemoryTracker.estimate_model_memory(work.model, work.optimizer, inputs.shape, dtype=inputs.dtype)


def estimate_checkpointed(work: Work, inputs: Tensor) -> int:
    """Return the estimate in bytes if blocks keep their inputs only, and one block at a time is computed again."""
    calls: list[tuple[nn.Module, Tensor]] = []
    handles = [b.register_forward_pre_hook(lambda b, args: calls.append((b, args[0]))) for b in blocks(work.model)]
    with torch.no_grad(), evaluation_mode(work.model), autocast(work.device, work.precision):
        work.model(inputs)
    for handle in handles:
        handle.remove()
    activations = [estimate(work._replace(model=block), received)["activations"] for block, received in calls]
    kept = sum(received.nbytes for _, received in calls)
    return estimate(work, inputs)["total"] - sum(activations) + max(activations) + kept


def print_options(work: Work, args: argparse.Namespace, batch: tuple[Tensor, Tensor]) -> None:
    """Print the step as it is, then the options that save memory in the order to try them."""

    def print_row(name: str, expected: int, found: Measured, comparable: bool = True) -> None:
        differ = f"{difference(found.gradients, as_it_is.gradients):.1e}" if comparable else "-"
        sizes = f"{expected / MIB:10,.1f}{found.peak / MIB:10,.1f}"
        print(f"  {name:32} {sizes}  {found.seconds * 1e3:10.2f}  {differ:>19}")

    inputs, targets = batch
    size, side, parts = len(inputs), max(inputs.shape[-1] // 8, 1) * 4, estimate(work, inputs)
    steps = max(1, args.steps // REPEATS)  # in each pass
    print("\nwhat saves memory, in this order   estimate  peak MiB   ms a step  gradients differ by")
    as_it_is = measure(work, batch, steps)
    print_row("as it is", parts["total"], as_it_is)
    if size % 2 == 0:
        halved = estimate(work, inputs[: size // 2])["total"]
        print_row("half the batch, --accumulate 2", halved, measure(work, batch, steps, accumulate=2))
    if work.precision == "fp32":
        low = work._replace(precision="bf16")
        print_row("--precision bf16", estimate(low, inputs)["total"], measure(low, batch, steps))
    if inputs.dim() == 4:  # images of about half the side; our models want a multiple of 4
        images = nn.functional.interpolate(inputs, (side, side))  # (B, C, side, side)
        try:
            model = load_model(args, tuple(images.shape[1:]))
            small = make_work(model, batch, work.device, work.precision)
            found = measure(small, (images, targets), steps)
            print_row(f"images of {side} x {side}", estimate(small, images)["total"], found, comparable=False)
        except (RuntimeError, ValueError) as error:
            print(f"  images of {side} x {side} do not go through this model: {cli.printable(error)[:100]}")
    checkpointed = work._replace(model=checkpoint_activations(copy.deepcopy(work.model)))
    print_row("--checkpoint-activations", estimate_checkpointed(work, inputs), measure(checkpointed, batch, steps))
    of_batch = parts["inputs"] + parts["activations"] + parts["temporary"]
    print(f"  {'2 processes, DDP':32} {(parts['total'] - of_batch // 2) / MIB:10,.1f}")
    print(f"  {'2 processes, FSDP':32} {(parts['total'] + parts['buffers']) / 2 / MIB:10,.1f}")
    print("  Peak: all that a step holds. Gradients: of the first step, relative to the largest; with BatchNorm and")
    print("  dropout those of an accumulated batch are others.")


def print_release(device: torch.device) -> None:
    """Print what `del` and `empty_cache` give back of a tensor of 256 MiB."""

    def held() -> str:
        info = tb.MemoryTracker.get_memory_info(device)
        return ", ".join(f"{k} {info[k] / MIB:,.0f}" for k in ("resident", "allocated", "reserved") if k in info)

    print(f"\nwhat del and empty_cache give back, in MiB\n  before: {held()}")
    tensor = torch.ones(64 * MIB, device=device)  # float32: 256 MiB
    print(f"  with a tensor of 256 MiB: {held()}")
    del tensor
    print(f"  after del: {held()}")
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        print(f"  after empty_cache(): {held()}")
    print("  del frees what nothing else refers to: not a tensor with a view, nor activations while a loss is kept.")
    print("  An accelerator's freed memory stays reserved for the next tensors. empty_cache() hands it to other")
    print("  programs; this one gains nothing. On a CPU the C library decides.")


def profile_memory(work: Work, args: argparse.Namespace, batch: tuple[Tensor, Tensor]) -> None:
    """Print where the memory goes and what saves it."""
    inputs = batch[0]
    in_use = tb.MemoryTracker.get_memory_info(work.device)
    parts = estimate(work, inputs)
    print("in use, in MiB:   " + ", ".join(f"{name} {size / MIB:,.1f}" for name, size in in_use.items()))
    print("estimate, in MiB: " + ", ".join(f"{name} {size / MIB:,.1f}" for name, size in parts.items()))
    try:
        with autocast(work.device, work.precision):
            fits = tb.MemoryTracker.find_batch_size(
                work.model, work.optimizer, tuple(inputs.shape[1:]), dtype=inputs.dtype, max_batch_size=2**30
            )
        print(f"by this estimate a batch of {fits:,} still fits into 90% of the available memory")
    except ValueError as error:  # not even one sample, or this system does not tell what is available
        print(f"the batch size that fits: {error}")
    print_options(work, args, batch)
    print_release(work.device)


def profile_compile(work: Work, args: argparse.Namespace, batch: tuple[Tensor, Tensor]) -> None:
    """Print the time of the first and of later steps, without torch.compile and in each mode."""
    print(f"{'compile':28}  first step ms  later steps ms")
    for mode in ("not compiled", *(args.compile or ["default"])):
        if mode != "not compiled":
            torch.compiler.reset()
            work.model.compile(mode=mode)
        first = time_steps(work, itertools.repeat(batch), 1)
        later = median_step(work, itertools.repeat(batch), args.steps)
        print(f"{mode:28}  {first * 1e3:13.1f}  {later * 1e3:14.3f}")


def profile_time(work: Work, args: argparse.Namespace, batches: Iterator, batch: tuple[Tensor, Tensor]) -> None:
    """Print what bounds a step, and its time by phase, operator and module."""
    modules = dict(work.model.named_modules())
    by_module = time_spans(work, itertools.repeat(batch), args.steps, modules.values())
    size, half = len(batch[0]), None
    if size > 3:  # BatchNorm refuses a single sample
        part = tuple(tensor[: size // 2] for tensor in batch)
        half = median_step(work, itertools.repeat(part), args.steps)
    step = median_step(work, batches, args.steps)
    bare = median_step(work, itertools.repeat(batch), args.steps)
    split = time_spans(work, batches, args.steps)
    operators = time_operators(work, batches, args.trace)

    total = sum(seconds for _, _, seconds in operators) or 1.0
    products = sum(seconds for name, _, seconds in operators if PRODUCTS.search(name)) / total
    try_bf16 = work.precision == "fp32" and bf16_is_native(work.device)
    try_compile = work.device.type != "cpu"  # on a CPU compiled steps are seldom faster
    bound, figure, change = verdict(step, bare, half, split, products, try_bf16=try_bf16, try_compile=try_compile)
    print(f"bound by: {bound}: {figure}\nchange:   {change}\n")
    print(f"{size / step:,.0f} samples/s; a step takes {step * 1e3:.2f} ms, without loading {bare * 1e3:.2f} ms "
          f"(medians of {REPEATS} passes, not synchronised)")  # fmt: skip
    print("\nphase            ms   share   (synchronised after each phase)")
    for name, seconds in split.items():
        print(f"{name:9}  {seconds * 1e3:8.3f}  {seconds / split['step']:6.1%}")
    print(f"\n{'operator':44}   calls        ms   share   (per step, without those it calls)")
    for name, calls, seconds in operators[:10]:
        print(f"{name[-44:]:44}  {calls:6.1f}  {seconds * 1e3:8.3f}  {seconds / total:6.1%}")
    print(f"\n{'module':28}  {'kind':16}  parameters   fp32 MiB  forward ms   (without its children)")

    def print_module(name: str, kind: str, parameters: Iterable[Tensor], seconds: float) -> None:
        count = sum(parameter.numel() for parameter in parameters)
        print(f"{name[-28:]:28}  {kind[:16]:16}  {count:10,}  {count * 4 / MIB:9.2f}  {seconds * 1e3:10.3f}")

    for name, module in modules.items():
        print_module(name or "(model)", type(module).__name__, module.parameters(recurse=False), by_module[module])
    print_module("all", "", work.model.parameters(), sum(by_module[module] for module in modules.values()))
    print(f"of a step of {by_module['step'] * 1e3:.3f} ms, synchronised before and after each module")


def load_model(args: argparse.Namespace, shape: tuple[int, ...]) -> nn.Module:
    """Return a new model for samples of `shape`, always with the same weights."""
    tb.set_seed()
    if ":" not in args.model:
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(f"--input-shape: {args.model} takes channels and two equal sides, such as 1,28,28")
        return tb.make_model({"model": args.model, "in_channels": shape[0], "image_size": shape[-1]})
    return cli.call_by_name(args.model, "--model", nn.Module)


def load_data(args: argparse.Namespace, model: nn.Module) -> tuple[Iterable, str]:
    """Return batches (inputs, targets), and what they are."""
    if args.loader:
        return cli.call_by_name(args.loader, "--loader"), args.loader
    inputs = torch.randn(args.batch_size, *args.input_shape)  # (B, C, H, W)
    with torch.no_grad(), evaluation_mode(model):
        outputs = model(inputs[:2])  # (2, classes, ...)
    if not isinstance(outputs, Tensor) or outputs.dim() < 2:
        raise ValueError(f"{args.model} does not return scores (B, classes); give its batches by --loader")
    return [(inputs, torch.randint(outputs.shape[1], (args.batch_size, *outputs.shape[2:])))], "random inputs"


def endless(loader: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of `loader` epoch after epoch. Raise ValueError if it has none."""
    while True:
        batch = None
        for batch in loader:
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
                raise ValueError(f"a batch must be two tensors (inputs, targets), got {type(batch).__name__}")
            yield batch[0], batch[1]
        if batch is None:
            raise ValueError("the loader gave no batch; give one that can be iterated again for each epoch")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, cli.number(int, 1)
    add("--model", default="mnistnet", metavar="NAME",
        help=f"{', '.join(tb.MODELS)}, or module:callable that returns a model (default: mnistnet)")
    add("--loader", metavar="MODULE:CALLABLE", help="returns your batches (inputs, targets); called without arguments")
    add("--input-shape", type=lambda text: tuple(map(count, text.split(","))), metavar="C,H,W",
        help="of one image (default: 1,28,28)")
    add("--batch-size", type=count, metavar="N", help="images per batch (default: 128)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 where the hardware computes in it (default: auto)")
    add("--steps", type=count, default=10, metavar="N", help="measured steps of each pass (default: 10)")
    add("--trace", type=cli.path_argument, metavar="FILE.json.gz",
        help="write a Chrome trace, for https://ui.perfetto.dev")
    add("--debug", action="store_true", help="show tracebacks")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--memory", action="store_true", help="profile the memory instead: what takes it, what fits, what saves it")
    add("--compile", nargs="*", choices=COMPILE_MODES, metavar="MODE",
        help=f"compare torch.compile in these modes with none: {', '.join(COMPILE_MODES)} (default: default)")
    add("--checkpoint-activations", action="store_true",
        help="compute activations again in backward instead of keeping them (--memory shows what that saves)")
    args = parser.parse_args(argv)
    if args.trace and (args.memory or args.compile is not None):
        parser.error("--trace does not go with --memory and --compile")
    if args.loader and (args.batch_size or (args.input_shape and ":" in args.model)):
        parser.error("--batch-size and --input-shape do not go with --loader: the batches come from there")
    args.batch_size, args.input_shape = args.batch_size or 128, args.input_shape or (1, 28, 28)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = tb.pick_device(args.device)
    precision = tb.pick_precision(args.precision, device)
    if device.type == "cpu" and not args.memory:
        tb.cache_cpu_memory()  # as in training
    model = load_model(args, args.input_shape)
    loader, source = load_data(args, model)
    if args.checkpoint_activations:
        checkpoint_activations(model)
    batches = endless(loader)
    batch = to_device(next(batches), device)
    work = make_work(model, batch, device, precision)
    train_step(work, itertools.repeat(batch))  # shows whether they fit; the optimizer makes its state
    print(f"{args.model} on {source}; batches of {len(batch[0])}; {precision}; {device_name(device)}")
    if args.memory:
        profile_memory(work, args, batch)
    elif args.compile is not None:
        profile_compile(work, args, batch)
    else:
        profile_time(work, args, batches, batch)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug="--debug" in sys.argv, out_of_memory=OUT_OF_MEMORY))
