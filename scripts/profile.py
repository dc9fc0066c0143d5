"""Profiles a training step: what sets its pace and what to change, where the time and the memory go, a trace.

    python scripts/profile.py --model mnistnet --data-dir ./data
    python scripts/profile.py --model torchvision.models:resnet18 --synthetic --input-shape 3,224,224 --batch-size 16

Three passes are timed: without synchronisation for the throughput, with it for the split, and with one batch kept on
the device, so without loading. The verdict is the first of these rules that holds, all figures measured in this run:

data-bound     without loading a step takes at least 25% less (medians), and data and transfer are as much of the split.
launch-bound   at least 40% of a step without loading goes into starting operators: on an accelerator the time in which
               no kernel runs; on a CPU operator calls × the cost of a call, taken from a chain of operators on one
               number. (So SimpleNet in fp32 spends 64% of a step of 2 samples, 43% of 32, 3% of 1024; one CPU core.)
compute-bound  FLOPs ÷ rate of a large matrix product take longer than bytes ÷ rate of a large copy, where bytes are
               what all operators read and write, as if there were no cache.
memory-bound   the other way round.

FLOPs are those of torch.utils.flop_counter: matrix products, convolutions and attention, of forward and backward.
Convolutions can beat the matrix product they are compared with (oneDNN against MKL on AMD processors): above 100%.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import functools
import gzip
import importlib.machinery
import importlib.util
import itertools
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "profile":  # cProfile wants the standard module, which this file hides: hand it over, load nothing else
    places = [sysconfig.get_path("stdlib"), *(place for place in sys.path if place.endswith(".zip"))]
    spec = importlib.machinery.PathFinder.find_spec(__name__, places)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {__name__!r} in the standard library", name=__name__)
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
else:
    ROOT = Path(__file__).resolve().parents[1]
    if (ROOT / "torchbasics" / "__init__.py").is_file():  # in a checkout its own package comes first, installed or not
        sys.path.insert(0, str(ROOT))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes its own progress to stderr,
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and that it can't know memory from before its beginning

    import torch
    from torch import Tensor, nn
    from torch.profiler import ProfilerActivity, record_function
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.checkpoint import checkpoint
    from torch.utils.flop_counter import FlopCounterMode

    import torchbasics as tb
    from torchbasics import options
    from torchbasics.device import device_name, preserved_random_state, synchronize
    from torchbasics.evaluation import evaluation_mode, forward, to_device
    from torchbasics.loaders import DATASETS, make_loaders
    from torchbasics.models import MODELS
    from torchbasics.optim import OPTIMIZERS
    from torchbasics.report import unused_directory

PHASES = ("data", "transfer", "forward", "backward", "optimizer")
DATA_SHARE, LAUNCH_SHARE = 0.25, 0.4
FORMAT = "torchbasics profile 1"


class Work(NamedTuple):
    """What a training step needs besides its batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    criterion: Callable
    scaler: torch.amp.GradScaler
    device: torch.device
    precision: str
    memory_format: torch.memory_format


# ------------------------------------------------------------------------------------------------------ the step, timed


def train_step(work: Work, batches: Iterator, phase: Callable[[str], Any] = contextlib.nullcontext) -> int:
    """One step like the Trainer's; each part runs inside `phase(its name)`. Returns the number of samples."""
    with phase("data"):
        batch = next(batches)
    with phase("transfer"):
        inputs, targets = to_device(batch, work.device, work.memory_format)
    with phase("forward"):
        loss, _ = forward(work.model, work.criterion, inputs, targets, work.precision)
    with phase("backward"):
        work.scaler.scale(loss).backward()
    with phase("optimizer"):
        work.scaler.step(work.optimizer)
        work.scaler.update()
    work.optimizer.zero_grad(set_to_none=True)
    return len(targets)


def timed_pass(work: Work, batches: Iterator, steps: int) -> dict[str, float]:
    """Throughput and the distribution of a step's time (s), without synchronising in between."""
    synchronize(work.device)
    marks, samples = [mark(work.device)], 0
    for _ in range(steps):
        samples += train_step(work, batches)
        marks.append(mark(work.device))
    synchronize(work.device)
    times = sorted(seconds_between(first, second) for first, second in itertools.pairwise(marks))
    return {"samples_per_second": samples / sum(times), "samples_per_step": samples / steps,
            "p50": statistics.median(times), "p95": times[-(-95 * steps // 100) - 1], "mean": sum(times) / steps}


def mark(device: torch.device) -> Any:
    """A moment in the device's own stream of work."""
    if device.type == "cpu":
        return time.perf_counter()
    event = getattr(torch, device.type).Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Any, second: Any) -> float:
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1000


def split_pass(work: Work, batches: Iterator, steps: int) -> dict[str, float]:
    """Mean seconds a step in each of PHASES, `rest` and `step`, waiting for the device after each phase."""
    seconds = dict.fromkeys((*PHASES, "rest", "step"), 0.0)

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
    seconds["rest"] = seconds["step"] - sum(seconds[name] for name in PHASES)
    return seconds


# -------------------------------------------------------------------------------------------------------- torch's trace


def trace(work: Work, batches: Iterator, args: argparse.Namespace, path: Path) -> tuple[list[dict], Any]:
    """Writes the Chrome trace of `args.active` steps; returns its events and the profiler's sums by operator."""
    activities = [ProfilerActivity.CPU, *(getattr(ProfilerActivity, kind) for kind in ("CUDA", "XPU")
                                          if kind.lower() == work.device.type)]
    plan = torch.profiler.schedule(wait=args.wait, warmup=args.warmup, active=args.active, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=plan, profile_memory=True, acc_events=True) as profiler:
        for _ in range(args.wait + args.warmup + args.active):
            train_step(work, batches, lambda name: record_function(f"step.{name}"))
            synchronize(work.device)  # the last kernels belong to this step
            profiler.step()
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        return json.load(file)["traceEvents"], profiler.key_averages()


def operators(sums: Any) -> list[Any]:
    """Those of the profiler's rows that are operators called on the host."""
    return [row for row in sums if row.device_type == torch.autograd.DeviceType.CPU and not row.is_user_annotation]


def top_operators(sums: Any, steps: int, on_cpu: bool, most: int = 10) -> list[dict[str, Any]]:
    """Calls and own seconds a step of the operators that take longest, on the device or, without one, on the CPU."""
    rows = [(row.self_cpu_time_total if on_cpu else row.self_device_time_total, row) for row in operators(sums)]
    total = sum(own for own, _ in rows) or 1.0
    rows.sort(key=lambda pair: -pair[0])
    return [{"operator": row.key, "calls": row.count / steps, "seconds": own / 1e6 / steps, "share": own / total}
            for own, row in rows[:most] if own]


def memory_peaks(events: Iterable[dict], on_cpu: bool) -> dict[str, int]:
    """The most bytes allocated during each phase, beyond what was when its step began; the highest of all steps."""
    events = list(events)
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events
                     if event.get("name") == "[memory]" and (event["args"]["Device Type"] == 0) == on_cpu)
    times = [instant for instant, _ in changes]
    levels = [0, *itertools.accumulate(size for _, size in changes)]
    spans = sorted((event["ts"], event["ts"] + event["dur"], event["name"].removeprefix("step.")) for event in events
                   if event.get("cat") == "user_annotation" and event["name"].startswith("step."))
    peaks, base = dict.fromkeys(PHASES, 0), 0
    for began, ended, name in spans:
        first, last = bisect.bisect_left(times, began), bisect.bisect_right(times, ended)
        base = levels[first] if name == "data" else base
        peaks[name] = max(peaks[name], max(levels[first:last + 1]) - base)
    return peaks


def busy_seconds(events: Iterable[dict]) -> float:
    """The time in which at least one kernel or copy ran on an accelerator (their union)."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events
                   if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))
    total, end = 0.0, float("-inf")
    for began, ended in spans:
        total += max(0.0, ended - max(began, end))
        end = max(end, ended)
    return total / 1e6


# -------------------------------------------------------------------------------------------- the model's work, counted


def count_work(work: Work, batch: Any) -> tuple[dict[str, int], int]:
    """FLOPs of one step under each module's name (whole model: ""), and bytes that its operators read and write."""

    untouched = ("aten::empty", "aten::new_empty", "aten::_unsafe_view")

    class Traffic(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if not func.is_view and not func.name().startswith(untouched):
                tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
                self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return result

    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        train_step(work, itertools.repeat(batch))
    root = type(work.model).__name__
    flops = {name.removeprefix(root).removeprefix("."): sum(kinds.values())
             for name, kinds in counter.get_flop_counts().items() if name != "Global"}
    return flops | {"": counter.get_total_flops()}, traffic.total


def module_times(work: Work, batch: Any, steps: int) -> dict[str, float]:
    """Mean seconds of forward in each module, less those in its children; the device is waited for at each border."""
    seconds: dict[str, float] = {}
    running: list[list[float]] = []  # of each module that is being run: when it began, and its children's seconds

    def before(*_: Any) -> None:
        synchronize(work.device)
        running.append([time.perf_counter(), 0.0])

    def after(name: str, *_: Any) -> None:
        synchronize(work.device)
        began, inside = running.pop()
        took = time.perf_counter() - began
        seconds[name] = seconds.get(name, 0.0) + (took - inside) / steps
        if running:
            running[-1][1] += took

    handles = [module.register_forward_pre_hook(before) for module in work.model.modules()]
    handles += [module.register_forward_hook(functools.partial(after, name))
                for name, module in work.model.named_modules()]
    inputs, targets = to_device(batch, work.device, work.memory_format)
    for _ in range(steps):
        forward(work.model, work.criterion, inputs, targets, work.precision)
    for handle in handles:
        handle.remove()
    return seconds


def module_table(model: nn.Module, flops: dict[str, int], seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Parameters, FLOPs and forward seconds that are each module's own, so that a column's sum is the model's."""
    parameters, own = tb.count_parameters_by_layer(model, verbose=False), dict(flops)
    for name in filter(None, flops):
        parent = name.rpartition(".")[0]
        while parent not in flops:
            parent = parent.rpartition(".")[0]
        own[parent] -= flops[name]
    rows = [{"module": name, "kind": type(module).__name__, "parameters": parameters.get(name, 0),
             "flops": own.get(name, 0), "forward_seconds": seconds.get(name, 0.0)}
            for name, module in model.named_modules(remove_duplicate=False)]
    return [row for row in rows if row["parameters"] or row["flops"] or row["forward_seconds"]]


def machine_rates(device: torch.device, precision: str) -> dict[str, float]:
    """What this machine reaches now: FLOP/s of a matrix product, bytes/s of a copy, seconds to call an operator."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size, values = (1024, 2**24) if device.type == "cpu" else (4096, 2**27)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source, target = (torch.ones(values, device=device) for _ in range(2))
    one = torch.ones(1, device=device, requires_grad=True)

    def chain() -> None:
        functools.reduce(lambda value, _: value * one, range(100), one).backward()

    with torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        chain()
    calls = sum(row.count for row in operators(profiler.key_averages()))
    return {"matmul_flops_per_second": 2 * size**3 / min(seconds_of(lambda: left @ right, device, 8)),
            "copy_bytes_per_second": 8 * values / min(seconds_of(lambda: target.copy_(source), device, 8)),
            "call_seconds": statistics.median(seconds_of(chain, device, 20)) / calls}


def seconds_of(function: Callable[[], Any], device: torch.device, times: int) -> list[float]:
    """What each of `times` runs took, after one to warm up."""
    taken = []
    for _ in range(times + 1):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return taken[1:]


# ---------------------------------------------------------------------------------------------------------- the verdict


def judge(measured: dict[str, float], settings: dict[str, Any]) -> dict[str, str]:
    """Verdict, its figure and the option to change, by the rules in the head of this file; a pure function.

    `measured`: step and step_without_data (s, medians), launch_share (of the latter), flops, bytes (of a step),
    matmul_flops_per_second, copy_bytes_per_second, data, transfer and split_step (s, synchronised).
    """
    step, bare, launch = (measured[name] for name in ("step", "step_without_data", "launch_share"))
    loading = min(1 - bare / step, (measured["data"] + measured["transfer"]) / measured["split_step"])
    compute = measured["flops"] / measured["matmul_flops_per_second"]
    memory = measured["bytes"] / measured["copy_bytes_per_second"]
    if loading >= DATA_SHARE:
        kind = "data-bound"
        figure = (f"with one batch kept on the device a step takes {bare * 1e3:.2f} ms instead of {step * 1e3:.2f} ms: "
                  f"loading is {loading:.0%} of it")
    elif launch >= LAUNCH_SHARE:
        kind, what = "launch-bound", "calling operators takes" if settings["device"] == "cpu" else "no kernel runs in"
        figure = f"{what} {launch:.0%} of the {bare * 1e3:.2f} ms of a step"
    else:
        kind = "compute-bound" if compute > memory else "memory-bound"
        figure = (f"the matrix products need {compute / bare:.0%} of a step at the machine's rate, "
                  f"the memory traffic {memory / bare:.0%}")
    return {"verdict": kind, "figure": figure, "change": advice(kind, measured, settings)}


def advice(kind: str, measured: dict[str, float], settings: dict[str, Any]) -> str:
    """The options to change, as far as they are not used already."""
    if kind == "data-bound":
        if settings["loader_delay_ms"]:
            return f"--loader-delay 0 (it is {settings['loader_delay_ms']:g} ms)"
        if settings["dataset"] == "folder":
            return f"--num-workers {settings['num_workers'] + 2} (more processes that decode images)"
        if measured["transfer"] > measured["data"]:
            return "DataLoader(pin_memory=True), or all data on the device: torchbasics.TensorLoader"
        return "DataLoader(num_workers=…) works ahead; --no-augment and --synthetic show what that can bring"
    slack = measured["flops"] / measured["matmul_flops_per_second"] < measured["step_without_data"] / 2
    found = []
    if kind == "launch-bound":
        found.append(f"--batch-size {4 * settings['batch_size']}")
    elif settings["precision"] == "fp32" and settings["native_precision"] == "bf16":
        found.append("--precision bf16")
    if not settings["compile"] and (slack or kind != "compute-bound"):
        found.append("--compile reduce-overhead" if settings["device"] == "cuda" and kind == "launch-bound"
                     else "--compile (fuses what is not a matrix product)")
    if not settings["channels_last"]:
        found.append("--channels-last")
    return ", or ".join(found) or "no option is left: a smaller model, or a faster device"


# --------------------------------------------------------------------------------------------- activation checkpointing


def blocks(model: nn.Module) -> list[nn.Module]:
    """The children that hold several layers, also in lists; where there is none, the model itself."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += [block for block in blocks(child) if block is not child]
        elif any(True for _ in child.children()):
            found.append(child)
    return found or [model]


@contextlib.contextmanager
def statistics_kept(block: nn.Module) -> Iterator[None]:
    """BatchNorm has learnt from this batch in the forward; computing it again must not count it twice."""
    norms: list[Any] = [norm for norm in block.modules() if getattr(norm, "num_batches_tracked", None) is not None]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)


def checkpoint_activations(model: nn.Module) -> None:
    """Makes each of `blocks(model)` give up its activations after forward, and compute them again in backward."""
    for block in blocks(model):
        def contexts(block: nn.Module = block) -> tuple[Any, Any]:
            return contextlib.nullcontext(), statistics_kept(block)

        setattr(block, "forward", functools.partial(  # noqa: B010 (mypy forbids to assign to a method)
            checkpoint, block.forward, use_reentrant=False, context_fn=contexts))


def gradients(work: Work, batch: Any) -> list[Tensor]:
    """Of one batch, by the global random state, and the buffers after it; the model and that state stay as they are."""
    before = [buffer.clone() for buffer in work.model.buffers()]
    inputs, targets = to_device(batch, work.device, work.memory_format)
    with preserved_random_state(work.device):
        forward(work.model, work.criterion, inputs, targets, work.precision)[0].backward()
    found = [p.grad.clone() for p in work.model.parameters() if p.grad is not None]
    found += [buffer.clone() for buffer in work.model.buffers()]
    work.optimizer.zero_grad(set_to_none=True)
    for buffer, old in zip(work.model.buffers(), before, strict=True):
        buffer.copy_(old)
    return found


def try_checkpointing(work: Work, batch: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes and seconds (p50) without and with checkpointed activations, which then stay; gradients compared."""

    def measure() -> tuple[int, float]:
        brief = argparse.Namespace(wait=0, warmup=1, active=2)
        with tempfile.TemporaryDirectory() as folder:
            events, _ = trace(work, itertools.repeat(batch), brief, Path(folder) / "trace.json.gz")
        peak = max(memory_peaks(events, work.device.type == "cpu").values())
        return peak, timed_pass(work, itertools.repeat(batch), args.active)["p50"]

    plain, expected = measure(), gradients(work, batch)
    checkpoint_activations(work.model)
    found = gradients(work, batch)
    with_it = measure()
    return {"blocks": len(blocks(work.model)), "peak_bytes": [plain[0], with_it[0]], "p50": [plain[1], with_it[1]],
            "gradients_identical": all(map(torch.equal, expected, found)),
            "largest_difference": max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))}


# ----------------------------------------------------------------------------------------------------- what is profiled


def made_by(text: str, option: str) -> Any:
    """What `module:callable` returns; the current folder's modules come last."""
    module, _, name = text.partition(":")
    sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"{option} {text}: {error}; expected module:callable, called without arguments") from error


def load_data(args: argparse.Namespace, device: torch.device) -> tuple[Any, dict[str, Any], str]:
    """The loader, the facts of its data that a model needs, and what is to be said of it."""
    facts = {"dataset": "synthetic", "classes": range(10), "in_channels": args.input_shape[0],
             "image_size": args.input_shape[-1]}
    if args.loader:
        return made_by(args.loader, "--loader"), facts | {"dataset": args.loader}, ""
    if args.synthetic:
        return None, facts, ""
    if args.dataset == "digits":  # drawn on the spot, no more than the steps need
        count = args.batch_size * max(4, -(-2048 // args.batch_size))
        augment = tb.RandomAffine(scale=0.1) if args.augment else None
        loader = tb.TensorLoader(*tb.draw_digits(count), args.batch_size, shuffle=True, device=device, augment=augment)
        return loader, facts | {"dataset": "digits"}, ""
    data = make_loaders(args.dataset, args.data_dir, args.batch_size, augment=args.augment,
                        num_workers=args.num_workers, device=device)
    return data.train, data.facts, data.notice


def load_model(args: argparse.Namespace, facts: dict[str, Any]) -> nn.Module:
    if ":" not in args.model:
        return tb.make_model(args.model, len(facts["classes"]), facts["in_channels"], facts["image_size"])
    model = made_by(args.model, "--model")
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {args.model}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def synthetic_batch(args: argparse.Namespace, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Random inputs, and random targets of as many classes as the model has scores."""
    inputs = torch.randn(args.batch_size, *args.input_shape)
    with evaluation_mode(model):
        outputs = model(inputs[:2])
    if not isinstance(outputs, Tensor) or outputs.dim() < 2:
        raise ValueError(f"--synthetic needs a model that returns scores (B, classes); {args.model} returns "
                         f"{tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__}; "
                         "give its batches by --loader")
    return inputs, torch.randint(outputs.shape[1], (args.batch_size, *outputs.shape[2:]))


def endless(loader: Iterable, delay: float = 0.0) -> Iterator:
    """Epoch after epoch, each batch after `delay` seconds more."""
    while True:
        batch = None
        for batch in loader:
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)):
                raise ValueError(f"a batch must be (inputs, targets), targets a tensor; got {type(batch).__name__}")
            if delay:
                time.sleep(delay)
            yield batch
        if batch is None:
            raise ValueError("the loader gave no batch; give one that can be iterated again for each epoch")


def prepare(args: argparse.Namespace) -> tuple[Work, Iterator, dict[str, Any]]:
    """The step, its batches for ever, and the settings as they go into the report."""
    device = tb.pick_device(args.device)
    precision = tb.pick_precision(args.precision, device)
    if device.type == "cpu":
        tb.cache_cpu_memory()  # as the training scripts do
    tb.set_seed()
    loader, facts, notice = load_data(args, device)
    model = load_model(args, facts)
    layout = torch.channels_last if args.channels_last else torch.preserve_format
    if loader is None:
        loader = [to_device(synthetic_batch(args, model), device, layout)]
    model.to(device).to(memory_format=layout).train()
    batches = endless(loader, args.loader_delay / 1000)
    _, targets = first = next(batches)
    work = Work(model, tb.make_optimizer(args.optimizer, model.parameters(), 1e-3, 1e-4),
                nn.MSELoss() if targets.is_floating_point() else nn.CrossEntropyLoss(),
                torch.amp.GradScaler(device.type, enabled=precision == "fp16"), device, precision, layout)
    settings = {name: getattr(args, name) for name in ("model", "optimizer", "augment", "num_workers", "compile",
                                                       "checkpoint_activations", "channels_last")}
    settings |= {"dataset": facts["dataset"], "batch_size": len(targets), "loader_delay_ms": args.loader_delay,
                 "device": device.type, "device_name": device_name(device), "precision": precision, "notice": notice,
                 "native_precision": tb.pick_precision("auto", device), "torch": torch.__version__}
    return work, itertools.chain([first], batches), settings


def profile(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures everything and writes the trace; the report."""
    work, batches, settings = prepare(args)
    on_cpu = work.device.type == "cpu"
    batch = to_device(next(batches), work.device, work.memory_format)
    say("the model's work")
    first_step(work, batch, args)
    flops, traffic = count_work(work, batch)
    modules = module_table(work.model, flops, module_times(work, batch, min(args.active, 5)))
    rates = machine_rates(work.device, work.precision)
    checkpointing = try_checkpointing(work, batch, args) if args.checkpoint_activations else None
    if args.compile:
        work.model.compile(mode=None if args.compile is True else args.compile)
    say("the timed passes")
    first = timed_pass(work, batches, 1)["p50"]
    timed_pass(work, batches, args.wait + args.warmup)
    timed = timed_pass(work, batches, args.active)
    split = split_pass(work, batches, args.active)
    bare = timed if args.synthetic else timed_pass(work, itertools.repeat(batch), args.active)
    say("the trace")
    folder.mkdir(parents=True, exist_ok=True)
    events, sums = trace(work, batches, args, folder / "trace.json.gz")
    calls = sum(row.count for row in operators(sums)) / args.active
    launching = calls * rates["call_seconds"] if on_cpu else bare["p50"] - busy_seconds(events) / args.active
    measured = {"step": timed["p50"], "step_without_data": bare["p50"], "launch_share": max(launching, 0) / bare["p50"],
                "flops": flops[""], "bytes": traffic, "data": split["data"], "transfer": split["transfer"],
                "split_step": split["step"], **rates}
    reached = flops[""] / timed["p50"]
    return {"format": FORMAT, **judge(measured, settings), "settings": settings, "measured": measured,
            "samples_per_second": timed["samples_per_second"], "p50": timed["p50"], "p95": timed["p95"],
            "first_step": first, "split": split, "flops_per_second": reached,
            "share_of_matmul": reached / rates["matmul_flops_per_second"], "operator_calls": calls,
            "operators": top_operators(sums, args.active, on_cpu), "modules": modules,
            "peak_bytes": memory_peaks(events, on_cpu), "checkpointing": checkpointing, "output": str(folder)}


def first_step(work: Work, batch: Any, args: argparse.Namespace) -> None:
    """Shows whether model and data fit; the optimizer makes its state."""
    try:
        train_step(work, itertools.repeat(batch))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not (":" in args.model or args.loader):
            raise
        raise ValueError(f"{args.model} can't train on these batches: {options.one_line(error)}; other batches come "
                         "from --loader, or from --synthetic --input-shape") from error


def say(what: str) -> None:
    """What is being measured, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[Kmeasuring {what}" if what else "\r\033[K", end="", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------- the report


def show(report: dict[str, Any]) -> None:
    """Prints it, the verdict first."""
    settings, split, measured = report["settings"], report["split"], report["measured"]
    print(f"verdict: {report['verdict']}: {report['figure']}\nchange:  {report['change']}\n")
    parts = [f"{settings['model']} on {settings['dataset']}", f"batches of {settings['batch_size']}",
             settings["precision"], settings["device_name"], settings["notice"]]
    print("; ".join(filter(None, parts)))
    print(f"{report['samples_per_second']:,.0f} samples/s; a step takes {report['p50'] * 1e3:.2f} ms (p50), "
          f"{report['p95'] * 1e3:.2f} ms (p95); the first took {report['first_step'] * 1e3:.0f} ms")
    print(f"{measured['flops'] / 1e9:.3f} GFLOP a step, {report['flops_per_second'] / 1e9:,.1f} GFLOP/s: "
          f"{report['share_of_matmul']:.0%} of the {measured['matmul_flops_per_second'] / 1e9:,.1f} GFLOP/s of a large "
          "matrix product here and now")
    print("\nphase          ms   share   peak MiB   (synchronised; memory beyond what a step begins with)")
    for name, seconds in split.items():
        peak = f"{report['peak_bytes'][name] / 2**20:9.1f}" if name in PHASES else ""
        print(f"{name:9}  {seconds * 1e3:8.3f}  {seconds / split['step']:6.1%}  {peak}".rstrip())
    print(f"\n{'operator':44}   calls        ms   share   ({report['operator_calls']:.0f} calls a step in all)")
    for row in report["operators"]:
        print(f"{row['operator'][-44:]:44}  {row['calls']:6.1f}  {row['seconds'] * 1e3:8.3f}  {row['share']:6.1%}")
    print(f"\n{'module':28}  {'kind':16}  parameters        MFLOP  forward ms   (each without its children)")
    for row in report["modules"]:
        print(f"{row['module'][-28:] or '(model)':28}  {row['kind'][:16]:16}  {row['parameters']:10,}  "
              f"{row['flops'] / 1e6:11,.2f}  {row['forward_seconds'] * 1e3:10.3f}")
    if report["checkpointing"]:
        show_checkpointing(report["checkpointing"])
    print(f"\nfiles: {report['output']}: report.json, trace.json.gz (open it at https://ui.perfetto.dev)")


def show_checkpointing(found: dict[str, Any]) -> None:
    (peak, less), (step, longer) = found["peak_bytes"], found["p50"]
    equal = "bit for bit the same" if found["gradients_identical"] else (
        f"equal up to {found['largest_difference']:.1e}")
    print(f"\ncheckpointed activations of {found['blocks']} blocks: peak {peak / 2**20:.1f} → {less / 2**20:.1f} MiB "
          f"({less / peak - 1:+.0%}), step {step * 1e3:.2f} → {longer * 1e3:.2f} ms ({longer / step - 1:+.0%}); "
          f"gradients and buffers {equal}")


def figures(report: dict[str, Any]) -> dict[str, float]:
    """The numbers that --compare looks at; the first four decide."""
    return {"p50 (s)": report["p50"], "samples/s": report["samples_per_second"], "FLOPs": report["measured"]["flops"],
            "peak memory (bytes)": max(report["peak_bytes"].values()),
            **{f"{name} (s)": report["split"][name] for name in PHASES}}


def load_report(path: str) -> dict[str, Any]:
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        good = report["format"] == FORMAT and all(value >= 0 for value in figures(report).values())
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError):
        good = False
    if not good:
        raise ValueError(f"--compare {path}: not a report.json of this version of scripts/profile.py; make a new one")
    return report


def compare(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> tuple[list[str], bool]:
    """Lines on what changed by more than the share `tolerance`, and whether one of the first four figures is worse.

    Phases of less than a hundredth of a step are left out.
    """
    lines = [f"{name}: {before} → {new['settings'].get(name)}" for name, before in old["settings"].items()
             if new["settings"].get(name) != before]
    worse, then = False, figures(old)
    for place, (name, now) in enumerate(figures(new).items()):
        change = now / then[name] - 1 if then[name] else float(now > 0)
        if abs(change) > tolerance and (place < 4 or max(now, then[name]) > new["p50"] / 100):
            bad = (change < 0) == (name == "samples/s")
            worse |= bad and place < 4
            lines.append(f"{name}: {then[name]:.5g} → {now:.5g} ({change:+.0%}, {'worse' if bad else 'better'})")
    return lines or [f"nothing changed by more than {tolerance:.0%}"], worse


# --------------------------------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    count, none = options.COUNT, "(default: off)"
    add = parser.add_argument_group("what").add_argument
    add("--model", default="mnistnet", metavar="NAME",
        help=f"{', '.join(MODELS)}, or module:callable that returns a model (default: mnistnet)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="optimizer (default: adamw)")
    add("--dataset", choices=DATASETS, help="(default: drawn digits; with --data-dir mnist)")
    add("--data-dir", metavar="DIR", help="where data sets are or go (default: ./data)")
    add("--loader", metavar="MODULE:CALLABLE", help="makes the batches (inputs, targets), without arguments "
        "(default: from --dataset)")
    add("--synthetic", action="store_true", help=f"one random batch, on the device: no loading {none}")
    add("--input-shape", type=shape, default=(1, 28, 28), metavar="C,H,W",
        help="of one sample, with --synthetic (default: 1,28,28)")
    add("--batch-size", type=count, default=128, metavar="N", help="samples a batch (default: 128)")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="as in training (default: on)")
    add("--num-workers", type=options.number(int, 0), default=0, metavar="N",
        help="loader processes, for --dataset folder only (default: 0)")
    add("--loader-delay", type=options.number(float, 0), default=0.0, metavar="MS",
        help="make each batch so many milliseconds late, to see what that does (default: 0)")
    add = parser.add_argument_group("how").add_argument
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps or xpu (default: auto)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 where the hardware computes in it, else fp32 (default: auto)")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="layout of images (default: on)")
    add("--compile", nargs="?", const=True, default=False, choices=(True, *options.COMPILE_MODES), metavar="MODE",
        help=f"torch.compile, in a mode of {', '.join(options.COMPILE_MODES)} {none}")
    add("--checkpoint-activations", action="store_true", help="compute the activations again in backward instead of "
        f"keeping them; shows what that saves and costs {none}")
    add("--wait", type=options.number(int, 0), default=1, metavar="STEPS", help="idle steps at first (default: 1)")
    add("--warmup", type=count, default=3, metavar="STEPS", help="steps to warm up (default: 3)")
    add("--active", type=count, default=20, metavar="STEPS", help="measured steps of each pass (default: 20)")
    add = parser.add_argument_group("result").add_argument
    add("--output", metavar="DIR", help="for report.json and trace.json.gz (default: runs/profile-MODEL-DATE-TIME)")
    add("--overwrite", action="store_true", help=f"replace an earlier report there {none}")
    add("--compare", metavar="FILE", help="an older report.json; exit code 1 if a step is slower, fewer samples/s, "
        "more memory or FLOPs (default: none)")
    add("--tolerance", type=options.number(float, 0), default=0.2, metavar="SHARE",
        help="how much worse is not worse yet (default: 0.2, a fifth)")
    add("--json", action="store_true", help="print the report as JSON (default: tables)")
    add("--debug", action="store_true", help=f"show tracebacks {none}")
    args = parser.parse_args(argv)
    if ":" not in args.model and args.model not in MODELS:
        parser.error(f"--model {args.model}: expected {', '.join(MODELS)} or module:callable")
    if ":" not in args.model and (len(args.input_shape) != 3 or args.input_shape[1] != args.input_shape[2]):
        sizes = ",".join(map(str, args.input_shape))
        parser.error(f"--input-shape {sizes}: {args.model} takes channels and two equal sides, such as 1,28,28")
    if args.compile and args.checkpoint_activations:
        parser.error("--compile chooses by itself what to compute again; leave out --checkpoint-activations")
    args.dataset = args.dataset or ("mnist" if args.data_dir else "digits")
    args.data_dir = args.data_dir or "./data"
    return args


def shape(text: str) -> tuple[int, ...]:
    return tuple(options.COUNT(size) for size in text.split(","))


def main(argv: list[str] | None = None) -> int:
    """Returns 0 done, 1 failed or worse than --compare, 2 bad input, 3 optional package missing, 130 interrupted."""
    args = parse_args(argv)
    return options.guarded(lambda: run(args), args.debug)


def run(args: argparse.Namespace) -> int:
    """The recipe."""
    old = load_report(args.compare) if args.compare else None
    folder = Path(args.output) if args.output else unused_directory(f"profile-{args.model.replace(':', '.')}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder}: is not a folder; choose another")
    if (folder / "report.json").exists() and not args.overwrite:
        raise ValueError(f"{folder}: has a report already; --overwrite replaces it, or name another --output")
    report = profile(args, folder)
    lines, worse = compare(old, report, args.tolerance) if old else ([], False)
    report["compared"] = lines
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    say("")
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
        print("\n".join([f"\nagainst {args.compare}:", *lines]) if old else "", end="\n" if old else "")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
