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
    from torch.profiler import ProfilerActivity, record_function
    from torch.utils.checkpoint import checkpoint

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/
    import torchbasics as tb
    from torchbasics import cli
    from torchbasics.device import autocast, bf16_is_native, device_name, preserved_random_state, synchronize
    from torchbasics.evaluation import evaluation_mode, in_float32, to_device

PHASES = ("data", "transfer", "forward", "backward", "optimizer")
PRODUCTS = re.compile(r"mm|conv|attention|linear|lstm|gru", re.IGNORECASE)  # in the names of operators
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
REPEATS, WARMUP, TRACED, BUSY = 3, 3, 3, 0.3  # timed passes, steps before them, steps in the trace, spread of repeats
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


def time_repeats(work: Work, batches: Iterator, steps: int) -> list[float]:
    """Return the mean seconds of a step in each of REPEATS passes, after WARMUP steps."""
    time_steps(work, batches, WARMUP)
    return [time_steps(work, batches, steps) for _ in range(REPEATS)]


def busy(*passes: list[float]) -> str:
    """Return a warning if passes that should take equally long did not, else an empty string."""
    largest = max(max(times) / min(times) - 1 for times in passes)
    return f"the machine is busy: one pass took {largest:.0%} longer than another" if largest > BUSY else ""


def time_phases(work: Work, batches: Iterator, steps: int) -> dict[str, float]:
    """Return the mean seconds of each phase and of the whole "step", waiting for the device after each phase.

    Without waiting, an accelerator's work would be counted where the program happens to wait for it.
    """
    seconds = dict.fromkeys((*PHASES, "step"), 0.0)

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        synchronize(work.device)
        seconds[name] += (time.perf_counter() - began) / steps

    synchronize(work.device)
    for _ in range(steps):
        with phase("step"):
            train_step(work, batches, phase)
    return seconds


def time_modules(work: Work, batch: Any, steps: int) -> tuple[dict[str, float], float]:
    """Return the mean seconds of each module's forward without its children's, and those of the steps they are part of.

    These spans never overlap, so their sum is less than the step's. The device is waited for at both ends of each.
    """
    seconds = dict.fromkeys((name for name, _ in work.model.named_modules()), 0.0)
    running: list[list[float]] = []  # of each module that runs: when it began, and the seconds of its children

    def before(*_: Any) -> None:
        synchronize(work.device)
        running.append([time.perf_counter(), 0.0])

    def after(name: str, *_: Any) -> None:
        synchronize(work.device)
        began, children = running.pop()
        took = time.perf_counter() - began
        seconds[name] += (took - children) / steps
        if running:
            running[-1][1] += took

    handles = []
    for name, module in work.model.named_modules():
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(functools.partial(after, name), always_call=True))
    try:
        step = time_steps(work, itertools.repeat(batch), steps)
    finally:
        for handle in handles:
            handle.remove()
    return seconds, step


def time_operators(work: Work, batches: Iterator, trace: str | None) -> list[tuple[str, float, float]]:
    """Return (name, calls, own seconds) of each operator per step, the longest first; write a Chrome trace.

    Seconds are the accelerator's, or the CPU's if there is none.
    """
    on_cpu = work.device.type == "cpu"
    activities = [ProfilerActivity.CPU]
    if not on_cpu and hasattr(ProfilerActivity, work.device.type.upper()):  # CUDA and XPU
        activities.append(getattr(ProfilerActivity, work.device.type.upper()))
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        for _ in range(TRACED):
            train_step(work, batches, lambda name: record_function(f"step.{name}"))
        synchronize(work.device)
    if trace:
        profiler.export_chrome_trace(trace)
    rows = []
    for row in profiler.key_averages():
        if row.device_type == torch.autograd.DeviceType.CPU and not row.is_user_annotation:
            own = row.self_cpu_time_total if on_cpu else row.self_device_time_total  # µs
            rows.append((row.key, row.count / TRACED, own / 1e6 / TRACED))
    return sorted(rows, key=lambda row: -row[2])


def verdict(
    step: float, bare: float, half: float | None, split: dict[str, float], products: float, options: dict[str, Any]
) -> tuple[str, str, str]:
    """Return (what bounds the step, the figure that shows it, what to change), by the rules at the top of this file.

    `step`, `bare` (without loading) and `half` (of the batch; None if not measured) are seconds, not synchronised.
    `split` has those of each phase, synchronised. `products` is their share of the operators' time. `options` has
    `precision`, `bf16_is_native`, `compile` and `batch_size`.
    """
    compiling = "" if options["compile"] else "--compile, which fuses operators; then "
    bf16 = "--precision bf16; then " if options["precision"] == "fp32" and options["bf16_is_native"] else ""
    if bare <= 0.75 * step:
        figure = f"with one batch kept on the device a step takes {bare * 1e3:.2f} ms instead of {step * 1e3:.2f} ms"
        if split["transfer"] > split["data"]:
            return "transfer", figure, "DataLoader(pin_memory=True), or all data on the device in a TensorLoader"
        return "loader", figure, "DataLoader(num_workers=...); then a simpler transform, images stored smaller"
    if half is not None and half >= 0.8 * bare:
        figure = f"half the batch takes {half / bare:.0%} of the time"
        return "overhead", figure, f"{compiling}--batch-size {2 * options['batch_size']}"
    figure = f"products, convolutions and attention take {products:.0%} of the operators' time"
    if products >= 0.5:
        return "compute", figure, f"{bf16}a smaller model, smaller images, or a faster device"
    return "memory-bound", figure, f"{compiling}{bf16}fewer or smaller activations"


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
    times: list[float]  # seconds of a step, in each of REPEATS passes
    gradients: list[Tensor]


def measure(work: Work, batch: tuple[Tensor, Tensor], steps: int, accumulate: int = 1) -> Measured:
    """Measure a step of a copy of the model on `batch`, cut into `accumulate` equal parts."""
    work = make_work(copy.deepcopy(work.model), batch, work.device, work.precision)
    batches = itertools.cycle(list(zip(*(tensor.chunk(accumulate) for tensor in batch), strict=True)))
    with preserved_random_state(work.device):
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
    steps = -(-steps // REPEATS)  # at least one in each pass
    times = [time_steps(work, batches, steps, accumulate) for _ in range(REPEATS)]
    return Measured(held + tracker.peaks["step"], times, gradients)


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference of two lists of gradients, relative to the largest expected entry."""
    largest = max(float(b.abs().max()) for b in expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / largest


def estimate(work: Work, inputs: Tensor, size: int) -> dict[str, int]:
    """Return the parts of MemoryTracker's estimate, in bytes, for a batch of `size` samples like `inputs`."""
    shape = (size, *inputs.shape[1:])
    with autocast(work.device, work.precision):
        return tb.MemoryTracker.estimate_model_memory(work.model, work.optimizer, shape, dtype=inputs.dtype)


def estimate_checkpointed(work: Work, inputs: Tensor) -> int:
    """Return the estimate in bytes if blocks keep their inputs only, and one block at a time is computed again."""
    calls: list[tuple[nn.Module, Tensor]] = []
    handles = [b.register_forward_pre_hook(lambda b, args: calls.append((b, args[0]))) for b in blocks(work.model)]
    parts = estimate(work, inputs[:1], len(inputs))
    with torch.no_grad(), evaluation_mode(work.model), autocast(work.device, work.precision):
        calls.clear()  # of the estimate's own forward passes
        work.model(inputs)
        for handle in handles:
            handle.remove()
    inside = [estimate(work._replace(model=block), received, len(received)) for block, received in calls]
    activations = [one["activations"] for one in inside]
    kept = sum(one["inputs"] for one in inside)
    return parts["total"] - sum(activations) + max(activations) + kept


def print_options(work: Work, args: argparse.Namespace, batch: tuple[Tensor, Tensor]) -> None:
    """Print the step as it is, then the options that save memory in the order to try them."""
    inputs, targets = batch
    size, parts = len(inputs), estimate(work, inputs, len(inputs))
    ways: list[tuple[str, int, Work, tuple[Tensor, Tensor], int]] = [("as it is", parts["total"], work, batch, 1)]
    if size % 2 == 0:
        ways.append(("half the batch, --accumulate 2", estimate(work, inputs, size // 2)["total"], work, batch, 2))
    if work.precision == "fp32":
        low = work._replace(precision="bf16")
        ways.append(("--precision bf16", estimate(low, inputs, size)["total"], low, batch, 1))
    if inputs.dim() == 4:
        side = max(inputs.shape[-1] // 8, 1) * 4  # about half; our models want a multiple of 4
        images = nn.functional.interpolate(inputs, (side, side))  # (B, C, side, side)
        try:
            small = make_work(load_model(args, tuple(images.shape[1:])), batch, work.device, work.precision)
            expected = estimate(small, images, size)["total"]
            ways.append((f"images of {side} x {side}", expected, small, (images, targets), 1))
        except (RuntimeError, ValueError) as error:
            print(f"images of {side} x {side} do not go through this model: {cli.printable(error)[:100]}")
    expected = estimate_checkpointed(work, inputs)
    checkpointed = work._replace(model=checkpoint_activations(copy.deepcopy(work.model)))
    ways.append(("--checkpoint-activations", expected, checkpointed, batch, 1))

    print("\nwhat saves memory, in this order   estimate  peak MiB   ms a step  gradients differ by")
    gradients: list[Tensor] = []
    for name, expected, way, data, accumulate in ways:
        found = measure(way, data, args.steps, accumulate)
        gradients = gradients or found.gradients
        differ = f"{difference(found.gradients, gradients):.1e}" if data is batch else "-"
        print(f"  {name:32} {expected / MIB:10,.1f}{found.peak / MIB:10,.1f}  "
              f"{statistics.median(found.times) * 1e3:10.2f}  {differ:>19}  {busy(found.times)}".rstrip())  # fmt: skip
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
    parts = estimate(work, inputs, len(inputs))
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


def compile_modes(work: Work, batch: Any, args: argparse.Namespace) -> list[str]:
    """Return lines with the time of the first and of later steps, eager and in each mode. The last mode stays."""
    lines = [f"{'compile':28}  first step ms  later steps ms"]
    for mode in (None, *args.compile):
        if mode is not None:
            torch.compiler.reset()
            work.model.compile(mode=mode)
        first = time_steps(work, itertools.repeat(batch), 1)
        later = time_repeats(work, itertools.repeat(batch), args.steps)
        times = f"{first * 1e3:13.1f}  {statistics.median(later) * 1e3:14.3f}"
        lines.append(f"{mode or 'not compiled':28}  {times}  {busy(later)}".rstrip())
    return lines


def profile_time(work: Work, args: argparse.Namespace, batches: Iterator, batch: tuple[Tensor, Tensor]) -> None:
    """Print what bounds a step, and its time by phase, operator and module."""
    by_module, step_with_hooks = time_modules(work, batch, args.steps)
    half = tuple(tensor[: len(tensor) // 2] for tensor in batch)
    halves = []
    if len(half[0]) > 1 and not args.compile:  # BatchNorm refuses a single sample; another size is compiled again
        halves = time_repeats(work, itertools.repeat(half), args.steps)
    modes = compile_modes(work, batch, args) if args.compile else []
    passes = [time_repeats(work, batches, args.steps), time_repeats(work, itertools.repeat(batch), args.steps)]
    split = time_phases(work, batches, args.steps)
    operators = time_operators(work, batches, args.trace)

    total = sum(seconds for _, _, seconds in operators) or 1.0
    products = sum(seconds for name, _, seconds in operators if PRODUCTS.search(name)) / total
    step, bare = map(statistics.median, passes)
    options = {**vars(args), "precision": work.precision, "bf16_is_native": bf16_is_native(work.device)}
    bound, figure, change = verdict(step, bare, statistics.median(halves) if halves else None, split, products, options)
    print(f"bound by: {bound}: {figure}\nchange:   {change}\n")
    print(f"{len(batch[1]) / step:,.0f} samples/s; a step takes {step * 1e3:.2f} ms, without loading "
          f"{bare * 1e3:.2f} ms (medians of {REPEATS} passes, not synchronised)")  # fmt: skip
    if warning := busy(*passes, *([halves] if halves else [])):
        print(f"{warning}; measure again later")
    print("\nphase            ms   share   (synchronised after each phase)")
    for name, seconds in split.items():
        print(f"{name:9}  {seconds * 1e3:8.3f}  {seconds / split['step']:6.1%}")
    print(f"\n{'operator':44}   calls        ms   share   (per step, without those it calls)")
    for name, calls, seconds in operators[:10]:
        print(f"{name[-44:]:44}  {calls:6.1f}  {seconds * 1e3:8.3f}  {seconds / total:6.1%}")
    print(f"\n{'module':28}  {'kind':16}  parameters   fp32 MiB  forward ms   (without its children)")
    rows = [
        (name or "(model)", type(module).__name__, sum(p.numel() for p in module.parameters(recurse=False)))
        for name, module in work.model.named_modules()
    ]
    times = [*by_module.values(), sum(by_module.values())]
    for (name, kind, count), seconds in zip([*rows, ("all", "", sum(row[2] for row in rows))], times, strict=True):
        print(f"{name[-28:]:28}  {kind[:16]:16}  {count:10,}  {count * 4 / MIB:9.2f}  {seconds * 1e3:10.3f}")
    print(f"of a step of {step_with_hooks * 1e3:.3f} ms, synchronised before and after each module")
    if modes:
        print("", *modes, sep="\n")


def made_by(text: str, option: str) -> Any:
    """Return what `module:callable` returns. Modules of the current folder are found, too, but after all others."""
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"{option} {text}: {error}; expected module:callable, called without arguments") from error


def load_model(args: argparse.Namespace, shape: tuple[int, ...]) -> nn.Module:
    """Return a new model for samples of `shape`, always with the same weights."""
    tb.set_seed()
    if ":" not in args.model:
        return tb.make_model({"model": args.model, "in_channels": shape[0], "image_size": shape[-1]})
    model = made_by(args.model, "--model")
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {args.model}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def load_data(args: argparse.Namespace, model: nn.Module) -> tuple[Iterable, str]:
    """Return batches (inputs, targets), and what they are."""
    if args.loader:
        return made_by(args.loader, "--loader"), args.loader
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
        help=f"compare torch.compile in these modes with none, then profile the last: {', '.join(COMPILE_MODES)}")
    add("--checkpoint-activations", action="store_true",
        help="compute activations again in backward instead of keeping them (--memory shows what that saves)")
    args = parser.parse_args(argv)
    if args.memory and args.trace:
        parser.error("--trace does not go with --memory")
    if args.loader and (args.batch_size or (args.input_shape and ":" in args.model)):
        parser.error("--batch-size and --input-shape do not go with --loader: the batches come from there")
    args.batch_size, args.input_shape = args.batch_size or 128, args.input_shape or (1, 28, 28)
    if ":" not in args.model:
        if args.model not in tb.MODELS:
            parser.error(f"--model {args.model}: expected {', '.join(tb.MODELS)} or module:callable")
        if len(args.input_shape) != 3 or args.input_shape[1] != args.input_shape[2]:
            parser.error(f"--input-shape: {args.model} takes channels and two equal sides, such as 1,28,28")
    args.compile = ["default"] if args.compile == [] else args.compile
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
    args.batch_size = len(batch[0])
    work = make_work(model, batch, device, precision)
    train_step(work, itertools.repeat(batch))  # shows whether they fit; the optimizer makes its state
    print(f"{args.model} on {source}; batches of {args.batch_size}; {precision}; {device_name(device)}")
    if args.memory:
        profile_memory(work, args, batch)
    else:
        profile_time(work, args, batches, batch)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, debug="--debug" in sys.argv, out_of_memory=OUT_OF_MEMORY))
