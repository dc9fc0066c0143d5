"""Exports a trained network to files that run without its Python class, and proves that each computes the same.

    python scripts/export.py --checkpoint runs/mnist-20260102-030405/checkpoints/best.pt --verify-data data
    python scripts/export.py --checkpoint best.pt --format all --verify-data data --benchmark --threads 1

Each file is loaded in a fresh process that never imports this project, and compared with the network at batch sizes 1,
2, 7 and 64. A file that computes something else is not kept. `model.json` beside the files says what goes in and what
comes out. All runs on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "torchbasics" / "__init__.py").is_file():  # in a checkout its own package comes first, installed or not
    sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn

import torchbasics as tb
from torchbasics import options
from torchbasics.checkpoint import fitting_weights, load_weights_file, write_durably, write_json
from torchbasics.data import NORMALISATION
from torchbasics.loaders import make_loaders
from torchbasics.mnist import CLASSES, FOLDERS, missing_files
from torchbasics.models import MODELS

SIZES = (1, 2, 7, 64)  # batch sizes that are compared; an export sees a batch of two only
EXACT = 1e-4  # largest difference of a float format, as a share of the image's largest logit
SAME, LOST, ROUGH = 0.98, 0.01, 0.5  # of int8: least share of equal classes, most accuracy lost, largest difference
DRAWN = 2000  # test images where drawn digits stand for, or are, the data set
PATIENCE = 900  # seconds for the process that checks one file
EXTRAS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torchao": ("torchao",)}


class Skip(ImportError):
    """Something that a format needs is absent; the text says what, and how to get it."""


class Facts(NamedTuple):
    """What the network is, expects and means."""

    model: str
    dataset: str | None
    classes: list[str]
    shape: tuple[int, ...]  # of one input, without the batch
    mean: list[float]  # of pixel values on the scale 0 to 1
    std: list[float]
    source: dict[str, str | None]


class Data(NamedTuple):
    """Inputs to compare on and, where there are any, labels and training images."""

    inputs: Tensor  # float32 (N, …), as the network takes them
    targets: Tensor | None  # int64 (N,); None where an accuracy would mean nothing
    calibration: Tensor  # float32 (M, …)
    train: Any  # loader for --fine-tune, or None
    what: str


class Task(NamedTuple):
    """What every format starts from."""

    model: nn.Module
    facts: Facts
    data: Data
    args: argparse.Namespace


class Made(NamedTuple):
    """A written file, what the reader must know of it, and what it is compared with."""

    file: Path
    note: str = ""
    exact: bool = True  # the same numbers, not only the same classes
    model: nn.Module | None = None  # None: the network itself


# ------------------------------------------------------- in the fresh process: the source text of these functions alone


def open_artifact(file: str, threads: int) -> Callable[[Tensor], Tensor]:
    """The function that a file of this script holds: logits (B, classes) for inputs (B, …)."""
    if file.endswith(".onnx"):
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])
    if file.endswith(".aoti.pt2"):
        importlib.import_module("torch._inductor.codecache")  # torch 2.10 forgets to
        return torch._inductor.aoti_load_package(file)
    if file.endswith(".pt"):
        return torch.jit.load(file, map_location="cpu").eval()
    with open(file, "rb") as opened:
        content = opened.read()
    for word, registers_operators in (
            (b"torchao", "torchao"), (b"quantized_decomposed", "torch.ao.quantization.fx._decomposed"),
            (b"quantized_decomposed", "torchao.quantization.pt2e.quantize_pt2e")):
        if word in content:
            with contextlib.suppress(ImportError):
                importlib.import_module(registers_operators)
    return torch.export.load(file).module()


def outputs_for(run: Callable[[Tensor], Tensor], inputs: Tensor, size: int) -> Tensor:
    """Outputs for all inputs, in batches of exactly `size`: the last one is filled up."""
    filled = torch.cat([inputs, inputs[:1].expand(-len(inputs) % size, *inputs.shape[1:])])
    return torch.cat([run(part) for part in filled.split(size)])[: len(inputs)]


def time_calls(run: Callable[[Tensor], Tensor], inputs: Tensor) -> list[float]:
    """Median and 95th percentile in milliseconds of one call; the first calls are not counted."""
    calls, seconds = 400 if len(inputs) == 1 else 80, []
    for _ in range(calls + calls // 8):
        start = time.perf_counter()
        run(inputs)
        seconds.append(time.perf_counter() - start)
    ordered = sorted(seconds[calls // 8 :])
    return [1000 * ordered[calls // 2], 1000 * ordered[calls * 95 // 100]]


def run_artifact(job: dict[str, Any]) -> dict[str, Any]:
    """Writes the outputs of an artefact to job["outputs"]; returns load time, latencies, and what was imported."""
    torch.set_num_threads(job["threads"])
    start = time.perf_counter()
    run = open_artifact(job["file"], job["threads"])
    result: dict[str, Any] = {"load_ms": 1000 * (time.perf_counter() - start)}
    inputs = torch.load(job["inputs"], weights_only=True)
    with torch.no_grad():
        outputs = {str(size): outputs_for(run, inputs[:size], size) for size in job["sizes"]}
        outputs["all"] = outputs_for(run, inputs, job["step"])
        torch.save(outputs, job["outputs"])
        result["latency_ms"] = {str(size): time_calls(run, inputs[torch.arange(size) % len(inputs)])
                                for size in job["timed"]}
    result["imported"] = [name for name in job["unwanted"] if name in sys.modules]
    return result


RUNNER = """
from __future__ import annotations
import contextlib, importlib, json, logging, sys, time, warnings
import torch
{functions}
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
print(json.dumps(run_artifact(json.loads(sys.argv[1]))))
"""


def run_fresh(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`run_artifact(job)` in a process of its own, started in the empty `folder`; RuntimeError says why it failed."""
    functions: tuple[Any, ...] = (open_artifact, outputs_for, time_calls, run_artifact)
    program = RUNNER.replace("{functions}", "\n\n".join(map(inspect.getsource, functions)))
    try:
        done = subprocess.run([sys.executable, "-c", program, json.dumps(job)], cwd=folder, timeout=PATIENCE,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"did not finish within {PATIENCE} seconds in a fresh process") from None
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"does not run in a fresh process: {reason[:300]}")
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------------------- the formats


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def need(extra: str) -> None:
    """Skip, with the command that installs it, if an extra is absent."""
    if not installed(*EXTRAS[extra]):
        raise Skip(f"needs another package: pip install {' '.join(EXTRAS[extra])}")


def example(task: Task) -> Tensor:
    """A batch of two (of one, a program may keep the size for ever) without content: .pt2 files keep their example."""
    return torch.zeros(task.args.batch or 2, *task.facts.shape)


def export_program(task: Task, model: nn.Module) -> Any:
    """The ExportedProgram of a model, with a free batch unless --batch says a size; without paths of this machine."""
    shapes = None if task.args.batch else ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (example(task),), dynamic_shapes=shapes)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def to_pt2(task: Task, folder: Path) -> Made:
    torch.export.save(export_program(task, task.model), folder / "model.pt2")
    return Made(folder / "model.pt2")


def to_aoti(task: Task, folder: Path) -> Made:
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if not shutil.which(compiler.split()[0]):
        raise Skip(f"needs a C++ compiler, and there is no {compiler}: apt-get install g++, or set CXX")
    file = folder / "model.aoti.pt2"
    torch._inductor.aoti_compile_and_package(export_program(task, task.model), package_path=str(file))
    return Made(file, f"machine code: for {platform.machine()} processors like this one and torch {torch.__version__}")


def to_onnx(task: Task, folder: Path) -> Made:
    need("onnx")
    import onnx

    file = folder / "model.onnx"
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its steps
        torch.onnx.export(export_program(task, task.model), (example(task),), str(file), dynamo=True,
                          input_names=["input"], output_names=["logits"], external_data=False, verbose=False)
    onnx.checker.check_model(str(file), full_check=True)
    return Made(file)


def trace(model: nn.Module, inputs: Tensor, file: Path) -> Path:
    """Writes a TorchScript archive; torch announces the end of torch.jit at each step, the notes say it once."""
    with torch.no_grad():
        torch.jit.trace(model, inputs, check_trace=False).save(str(file))
    return file


def to_torchscript(task: Task, folder: Path) -> Made:
    return Made(trace(task.model, example(task), folder / "model.torchscript.pt"),
                "legacy: torch.jit has no future and no Python 3.14; for programs that load nothing newer")


def choose_quantizer(task: Task) -> str:
    """torchao or torch, as --quantizer says; Skip if the wanted one is absent."""
    wanted = task.args.quantizer
    if wanted == "torchao" or (wanted == "auto" and installed("torchao")):
        need("torchao")
        return "torchao"
    if not installed("torch.ao.quantization"):
        raise Skip("this torch has no quantization of its own any more: pip install torchao")
    return "torch"


def to_int8_dynamic(task: Task, folder: Path) -> Made:
    """Weights of linear layers as int8, their inputs quantised anew in each call."""
    if not any(isinstance(module, nn.Linear) for module in task.model.modules()):
        raise ValueError("the network has no linear layer; use int8-static")
    model = copy.deepcopy(task.model)
    if choose_quantizer(task) == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        torch.export.save(export_program(task, model), folder / "model.int8-dynamic.pt2")
        return Made(folder / "model.int8-dynamic.pt2", "by torchao, which is needed to load it, too", exact=False)
    from torch.ao.quantization import quantize_dynamic

    model = quantize_dynamic(model, {nn.Linear}, torch.qint8)
    return Made(trace(model, example(task), folder / "model.int8-dynamic.pt"),
                "by torch.ao, as TorchScript: .pt2 cannot hold its packed weights", exact=False)


def to_int8_static(task: Task, folder: Path) -> Made:
    """Weights and activations of the whole network as int8, their ranges taken from training images."""
    use_torchao = choose_quantizer(task) == "torchao"
    with torch.no_grad():
        model = quantize_pt2e(task) if use_torchao else quantize_fx(task)
    if use_torchao:
        torch.export.save(export_program(task, model), folder / "model.int8-static.pt2")
        return Made(folder / "model.int8-static.pt2", "by torchao's PT2E; a plain .pt2 computes it step by step in "
                    "float32: small, not fast; --quantizer torch gives int8 kernels", exact=False)
    return Made(trace(model, example(task), folder / "model.int8-static.pt"),
                "by torch.ao with int8 kernels, as TorchScript: .pt2 cannot hold its packed weights", exact=False)


def quantize_pt2e(task: Task) -> nn.Module:
    """Post-training quantisation of the exported graph; weights as int8, one scale a channel."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config())
    free = task._replace(args=argparse.Namespace(**{**vars(task.args), "batch": None}))  # for calibration
    prepared = prepare_pt2e(export_program(free, task.model).module(), quantizer)
    for part in task.data.calibration.split(100):
        prepared(part)
    converted = convert_pt2e(prepared)
    used = {node.target for node in converted.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in converted.named_parameters() if name not in used]:  # the float32 weights
        owner, _, attribute = name.rpartition(".")
        delattr(converted.get_submodule(owner), attribute)
    return converted


def quantize_fx(task: Task) -> nn.Module:
    """torch's own quantisation of the traced graph, lowered to the kernels of this machine's engine."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    qconfig = get_default_qconfig_mapping(torch.backends.quantized.engine)
    prepared = prepare_fx(copy.deepcopy(task.model), qconfig, (example(task),))
    for part in task.data.calibration.split(100):
        prepared(part)
    return convert_fx(prepared)


def to_pruned(task: Task, folder: Path) -> Made:
    """The smallest weights set to zero, of all layers together or of one; compared with the pruned network itself."""
    from torch.nn.utils import prune

    args, model = task.args, copy.deepcopy(task.model)
    layers = prunable(model, args.prune_layer)
    before = accuracy_of(model, task)
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=args.sparsity)
    pruned = accuracy_of(model, task)
    if args.fine_tune:  # zeros stay zeros: the mask is applied in every forward pass
        optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=1e-4)
        tb.Trainer(model, nn.CrossEntropyLoss(), optimizer, "cpu", precision="fp32").fit(
            task.data.train, num_epochs=args.fine_tune, verbose=False)
    for layer in layers:
        prune.remove(layer, "weight")  # the mask is multiplied in, `weight` is a parameter again
    model.eval().requires_grad_(False)
    zero = share(torch.cat([layer.weight.flatten() for layer in layers]) == 0)
    torch.export.save(export_program(task, model), folder / "model.pruned.pt2")
    history = "" if before is None else f"; accuracy {before:.2%} before, {pruned:.2%} pruned"
    if args.fine_tune and before is not None:
        history += f", {accuracy_of(model, task):.2%} after {args.fine_tune} epochs more"
    return Made(folder / "model.pruned.pt2", f"{zero:.1%} of {args.prune_layer or 'all layers'}' weights are zero; "
                f"zeros take the same room and time: only compression gains{history}", model=model)


def prunable(model: nn.Module, name: str | None) -> list[Any]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))}
    if not layers or (name is not None and name not in layers):
        raise ValueError(f"--prune-layer {name}: expected one of {', '.join(layers) or '(the network has none)'}")
    return list(layers.values()) if name is None else [layers[name]]


def share(flags: Tensor) -> float:
    return int(flags.sum()) / flags.numel()


def accuracy_of(model: nn.Module, task: Task) -> float | None:
    with torch.no_grad():
        classes = outputs_for(model, task.data.inputs, task.args.batch or 500).argmax(1)
    return None if task.data.targets is None else share(classes == task.data.targets)


FORMATS: dict[str, Callable[[Task, Path], Made]] = {
    "pt2": to_pt2, "aoti": to_aoti, "onnx": to_onnx, "torchscript": to_torchscript,
    "int8-dynamic": to_int8_dynamic, "int8-static": to_int8_static, "pruned": to_pruned,
}


# ----------------------------------------------------------------------------------------------- the network, the data


def load_source(args: argparse.Namespace) -> tuple[nn.Module, Facts]:
    """The network in evaluation mode, and its facts; the file verified, or with --model a plain state_dict."""
    path = Path(args.checkpoint) if args.checkpoint else None
    checkpoint = load_weights_file(path, plain=args.model is not None) if path else {}
    state, metadata = checkpoint.get("model_state_dict", {}), checkpoint.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    facts = read_facts(path, metadata) if "classes" in metadata else None
    name = str(args.model or metadata.get("model"))
    if ":" in name:
        model = build_own(name)
    elif name in MODELS:
        channels, *_, size = facts.shape if facts else args.input_shape
        classes = len(facts.classes) if facts else next((len(t) for t in reversed(state.values()) if t.dim() == 1), 1)
        with torch.device("meta"):  # compared before memory is taken: the sizes are the file's own words
            fitting_weights(tb.make_model(name, classes, channels, size), state, str(path))
        model = tb.make_model(name, classes, channels, size)
    else:
        raise tb.CheckpointError(f"{path}: its metadata names no model of {', '.join(MODELS)}; give --model NAME")
    if path:
        tb.load_weights(model, state, str(path))
    model = model.float().cpu().eval().requires_grad_(False)
    facts = check_output(model, facts, args.input_shape)
    content = path.read_bytes() if path else state_bytes(model)
    source = {"checkpoint": path.name if path else None, "sha256": hashlib.sha256(content).hexdigest()}
    return model, facts._replace(model=name, source=source)


def build_own(name: str) -> nn.Module:
    """The network that `module:callable` returns; the module is also looked for in the current folder."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        model = operator.attrgetter(attribute)(importlib.import_module(module))()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"--model {name}: {error}; expected module:callable, called without arguments") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name}: returned a {type(model).__name__}, expected an nn.Module")
    return model


def read_facts(path: Path | None, metadata: dict[str, Any]) -> Facts:
    """Facts from the metadata that train_mnist writes."""
    try:
        classes, dataset = [str(name) for name in metadata["classes"]], str(metadata["dataset"])
        shape = tuple(int(metadata[key]) for key in ("in_channels", "image_size", "image_size"))
        mean, std = ([float(value) for value in metadata[key]] for key in ("mean", "std"))
        if max(shape) > 4096 or len(mean) != len(std) or len(mean) not in (1, shape[0]) or min(std) <= 0:
            raise ValueError("out of range")
    except (KeyError, TypeError, ValueError, OverflowError):
        raise tb.CheckpointError(f"{path}: its metadata (classes, image size, mean, std) cannot be right; "
                                 "use another checkpoint") from None
    return Facts("", dataset, classes, shape, mean, std, {})


def check_output(model: nn.Module, facts: Facts | None, shape: tuple[int, ...]) -> Facts:
    """The facts, if the network fits them; where there are none MNIST's, if it fits those, else numbered classes."""
    shape = facts.shape if facts else shape
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *shape))
    except Exception as error:
        raise ValueError(f"the network takes no input of shape {('batch', *shape)} "
                         f"({' '.join(str(error).split())[:200]}); give --input-shape") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2:
        raise ValueError("the network's output is not one tensor of logits (batch, classes); wrap it in one that is")
    if facts is None and shape == (1, 28, 28) and logits.shape[1] == 10:
        mean, std = NORMALISATION["mnist"]
        facts = Facts("", "mnist", list(CLASSES["mnist"]), shape, list(mean), list(std), {})
    facts = facts or Facts("", None, [str(i) for i in range(logits.shape[1])], shape, [0.0], [1.0], {})
    if logits.shape[1] != len(facts.classes):
        raise ValueError(f"the network has {logits.shape[1]} outputs, its checkpoint {len(facts.classes)} classes")
    return facts


def state_bytes(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


def load_data(facts: Facts, args: argparse.Namespace) -> Data:
    """Test images to compare on and training images to calibrate with; without data, drawn digits or noise."""
    if args.verify_data and facts.dataset != "digits":
        return real_data(facts, args)
    if facts.shape == (1, 28, 28):
        mean, std = torch.tensor(facts.mean), torch.tensor(facts.std)
        counts = 60_000 if args.fine_tune and facts.dataset == "digits" else args.calibration, DRAWN
        (images, labels), (test, targets) = (tb.draw_digits(count, seed) for seed, count in enumerate(counts))
        inputs, calibration = ((part.float() / 255 - mean) / std for part in (test, images[: args.calibration]))
        if facts.dataset != "digits":
            return Data(inputs, None, calibration, None, "drawn digits, for want of --verify-data")
        train = tb.TensorLoader(images, labels, 128, shuffle=True, mean=facts.mean, std=facts.std)
        return Data(inputs, targets, calibration, train, "drawn digits")
    noise = torch.randn(1024 + args.calibration, *facts.shape, generator=torch.Generator().manual_seed(0))
    return Data(noise[:1024], None, noise[1024:], None, "inputs of noise, for want of real ones")


def real_data(facts: Facts, args: argparse.Namespace) -> Data:
    """The network's own data set, normalised as in training; ValueError if it cannot be that one.

    Without test images there are no targets: which images training held out is not known here.
    """
    if facts.dataset is None:
        raise ValueError(f"--verify-data {args.verify_data}: the network's data set is unknown; leave it out")
    missing = [path for part in (True, False) if facts.dataset in FOLDERS
               for path in missing_files(facts.dataset, args.verify_data, part)]
    if missing:  # nothing is downloaded into a folder that may be the wrong one
        raise FileNotFoundError(f"{missing[0]}: is missing; give the folder of {facts.dataset} as --verify-data")
    loaders = make_loaders(facts.dataset, args.verify_data, 32, augment=bool(args.fine_tune),
                           image_size=facts.shape[-1])
    if list(loaders.facts["classes"]) != facts.classes or loaders.facts["in_channels"] != facts.shape[0]:
        raise ValueError(f"--verify-data {args.verify_data}: has other classes or channels than the network; give its "
                         "own data")
    inputs, targets = (torch.cat(parts) for parts in zip(*loaders.test, strict=True))
    some = torch.cat([batch for batch, _ in itertools.islice(loaders.train, -(-args.calibration // 32))])
    if loaders.test is loaders.val:
        return Data(inputs, None, some[: args.calibration], loaders.train,
                    f"{facts.dataset} images; there is no test/ folder to judge on")
    return Data(inputs, targets, some[: args.calibration], loaders.train, f"{facts.dataset} test images")


# ------------------------------------------------------------------------------------------------ comparing and keeping


def difference(outputs: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and largest as a share of the image's largest logit; inf if not comparable."""
    if outputs.shape != expected.shape or not outputs.isfinite().all():
        return float("inf"), float("inf")
    away = (outputs - expected).abs().amax(1)
    return float(away.max()), float((away / expected.abs().amax(1).clamp_min(1e-12)).max())


def job_sizes(args: argparse.Namespace) -> dict[str, Any]:
    """Batch sizes to compare at, to judge all inputs with, and to time."""
    if args.batch:
        return {"sizes": [args.batch], "step": args.batch, "timed": [args.batch] if args.benchmark else []}
    return {"sizes": list(SIZES), "step": 500, "timed": [1, 64] if args.benchmark else []}


def eager_row(task: Task) -> dict[str, Any]:
    """What the others are compared with: the network in this process; its file is its state_dict."""
    content = state_bytes(task.model)
    with torch.no_grad():
        latency = {str(n): time_calls(task.model, task.data.inputs[torch.arange(n) % len(task.data.inputs)])
                   for n in job_sizes(task.args)["timed"]}
    return {"format": "eager", "result": "", "size": len(content), "size_ratio": 1.0,
            "gzip": len(gzip.compress(content)), "accuracy": accuracy_of(task.model, task), "latency_ms": latency}


def check(made: Made, task: Task, eager: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs the file in a fresh process; its row of the table, whose "result" is ok or says what differs."""
    inputs, targets, reference = task.data.inputs, task.data.targets, made.model or task.model
    job = {"file": str(made.file), "inputs": str(folder / "inputs"), "outputs": str(folder / "outputs"),
           "threads": torch.get_num_threads(), "unwanted": ["torchbasics", task.facts.model.partition(":")[0]],
           **job_sizes(task.args)}
    torch.save(inputs.clone(), job["inputs"])
    told = run_fresh(job, folder)
    if told.pop("imported"):
        raise RuntimeError("imports the network's Python class")
    outputs = torch.load(job["outputs"], weights_only=True)
    with torch.no_grad():
        expected = {str(n): outputs_for(reference, inputs[:n], n) for n in job["sizes"]}
        expected["all"] = outputs_for(reference, inputs, job["step"])
    apart = [difference(outputs[name], expected[name]) for name in expected]
    absolute, relative = (max(values) for values in zip(*apart, strict=True))
    classes = outputs["all"].argmax(1) if math.isfinite(absolute) else torch.full((len(inputs),), -1)
    same, accuracy = share(classes == expected["all"].argmax(1)), None if targets is None else share(classes == targets)
    change = None if accuracy is None else accuracy - eager["accuracy"]
    lost = 0 if made.model or change is None else -change
    good = relative <= EXACT if made.exact else same >= SAME and lost <= LOST and max(r for _, r in apart[:-1]) <= ROUGH
    size, numbers = made.file.stat().st_size, (absolute, relative)
    return {"result": "ok" if good else f"FAILED: differs by {relative:.2g} of the largest logit, {same:.2%} of the "
            f"classes agree, accuracy {-100 * lost:+.2f} points; not kept", "file": made.file.name, "size": size,
            "size_ratio": size / eager["size"], "gzip": len(gzip.compress(made.file.read_bytes())),
            **{f"max_{kind}_difference": number if math.isfinite(number) else None
               for kind, number in zip(("abs", "rel"), numbers, strict=True)},
            "agreement": same, "accuracy": accuracy, "accuracy_change": change, **told, "note": made.note}


def old_artifacts(task: Task, output: Path) -> list[dict[str, Any]]:
    """What `model.json` lists of the same network already; ValueError if it is another's: one folder, one network."""
    path = output / "model.json"
    if not os.path.lexists(path):
        return []
    try:
        manifest = json.loads(path.read_bytes())
        listed = [entry for entry in manifest["artifacts"] if (output / entry["file"]).is_file()]
        differs = [key for key, value in manifest_of(task).items() if key != "versions" and manifest[key] != value]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a model.json of this script; choose another --output") from None
    if differs:
        raise ValueError(f"{path}: is of another export ({', '.join(differs)}); choose another --output or remove it")
    return listed


def manifest_of(task: Task) -> dict[str, Any]:
    facts, names = task.facts, ("onnx", "onnxruntime", "torchao")
    return {
        "schema": 1, "model": facts.model, "dataset": facts.dataset, "classes": facts.classes,
        "input": {"shape": [task.args.batch or "batch", *facts.shape], "dtype": "float32"},
        "normalisation": {"mean": facts.mean, "std": facts.std},  # of pixel values on the scale 0 to 1
        "versions": {"torchbasics": tb.__version__, "torch": torch.__version__, "python": platform.python_version(),
                     **{name: version(name) for name in names if name in sys.modules and installed(name)}},
        "source": facts.source,
    }


def keep(row: dict[str, Any], file: Path, task: Task, artifacts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Puts a checked file into --output, durably, then lists it in `model.json`: until then no one loads it."""
    output, content = Path(task.args.output), file.read_bytes()
    write_durably(output / file.name, lambda opened: opened.write(content))
    known = ("format", "size", "max_abs_difference", "max_rel_difference", "agreement", "accuracy", "note")
    entry = {"file": file.name, "sha256": hashlib.sha256(content).hexdigest(), **{key: row[key] for key in known}}
    artifacts = [*(old for old in artifacts if old["file"] != file.name), entry]
    write_json(output / "model.json", {**manifest_of(task), "artifacts": artifacts})
    return artifacts


# -------------------------------------------------------------------------------------------------- what the user reads


def cells(row: dict[str, Any]) -> list[str]:
    def show(key: str, form: str, factor: float = 1) -> str:
        return form.format(row[key] * factor) if row.get(key) is not None else "–"

    latency = row.get("latency_ms") or {}
    return [row["format"], show("size", "{:.2f}", 1e-6), show("size_ratio", "{:.2f}×"), show("gzip", "{:.2f}", 1e-6),
            show("max_abs_difference", "{:.1e}"), show("max_rel_difference", "{:.1e}"), show("agreement", "{:.2%}"),
            show("accuracy", "{:.2%}"), show("accuracy_change", "{:+.2f}", 100), show("load_ms", "{:.0f}"),
            *(f"{p50:.2f} / {p95:.2f}" for p50, p95 in latency.values())]


def print_table(rows: list[dict[str, Any]], task: Task) -> None:
    timed = [f"batch {n} ms, p50 / p95" for n in job_sizes(task.args)["timed"]]
    head = ["format", "MB", "size", "gzip MB", "abs diff", "rel diff", "agree", "accuracy", "change", "load ms", *timed]
    lines = [head, *(cells(row) for row in rows if row["result"] in ("", "ok"))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(text.ljust(w) if i == 0 else text.rjust(w)
                        for i, (text, w) in enumerate(zip(line, widths, strict=True))).rstrip())
    for row in rows:
        if row["result"] == "ok" and row["note"]:
            print(f"{row['format']}: {row['note']}")
    print(f"compared on {len(task.data.inputs):,} {task.data.what}, in fresh processes; change in percentage points")


def fastest(rows: list[dict[str, Any]]) -> Iterator[str]:
    """For each batch size which file is fastest, and by how much."""
    good = [row for row in rows if row["result"] in ("", "ok") and row.get("latency_ms")]
    for size in good[0]["latency_ms"] if good else ():
        best = min(good, key=lambda row: row["latency_ms"][size][0])
        times = good[0]["latency_ms"][size][0] / best["latency_ms"][size][0]
        yield (f"fastest at batch {size}, threads {torch.get_num_threads()}: {best['format']}, "
               f"{best['latency_ms'][size][0]:.2f} ms, {times:.1f} times as fast as eager")


# --------------------------------------------------------------------------------------------------------- command line


def batch(text: str) -> int | None:
    return None if text == "dynamic" else options.number(int, 1, 1024)(text)


def shape(text: str) -> tuple[int, ...]:
    return tuple(options.number(int, 1, 65536)(part) for part in text.split(","))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("network").add_argument
    add("--checkpoint", metavar="FILE", help="a checkpoint of train_mnist; with --model also a plain state_dict "
        "(default: none; needed unless --model is module:callable)")
    add("--model", metavar="NAME", help=f"{', '.join(MODELS)}, or module:callable, which is imported and called "
        "without arguments (default: what the checkpoint says)")
    add("--input-shape", type=shape, default=(1, 28, 28), metavar="C,H,W",
        help="of one input, where the file does not say (default: 1,28,28)")
    add = parser.add_argument_group("files").add_argument
    add("--format", action="append", choices=(*FORMATS, "all"), metavar="NAME", help=f"{', '.join(FORMATS)}, or all; "
        "may be given several times (default: pt2, and onnx if its packages are there)")
    add("--output", default="exported", metavar="DIR", help="folder of the files and of model.json (default: exported)")
    add("--batch", type=batch, metavar="N", help="dynamic, or the one batch size of the files, at most 1024 (default: "
        "dynamic)")
    add = parser.add_argument_group("int8 and pruning").add_argument
    add("--quantizer", choices=("auto", "torchao", "torch"), default="auto",
        help="who quantises; auto: torchao if it is there, else torch itself (default: auto)")
    add("--calibration", type=options.COUNT, default=512, metavar="N",
        help="training images that the ranges of int8-static are taken from (default: 512)")
    add("--sparsity", type=options.SHARE, default=0.3, metavar="S",
        help="share of weights that pruning sets to zero, the smallest of all layers (default: 0.3)")
    add("--prune-layer", metavar="NAME", help="prune this layer only (default: all)")
    add("--fine-tune", type=options.number(int, 0), default=0, metavar="EPOCHS",
        help="train on after pruning, AdamW at rate 0.0001 (default: 0 epochs)")
    add = parser.add_argument_group("checks and output").add_argument
    add("--verify-data", metavar="DIR", help="where the network's data set is (default: none, compare on drawn digits)")
    add("--benchmark", action="store_true", help="measure load time and latency at batch 1 and 64 (default: off)")
    add("--threads", type=options.COUNT, metavar="N", help="threads of one operation (default: as torch chooses)")
    add("--json", action="store_true", help="print one JSON object; times in ms, sizes in bytes (default: a table)")
    add("--debug", action="store_true", help="show tracebacks (default: off)")
    add("--version", action="version", version=f"torchbasics {tb.__version__}")
    args = parser.parse_args(argv)
    if not args.checkpoint and ":" not in (args.model or ""):
        parser.error("give --checkpoint FILE, or a network of your own: --model module:callable")
    if args.model and ":" not in args.model and args.model not in MODELS:
        parser.error(f"--model {args.model}: expected {', '.join(MODELS)}, or module:callable")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns 0 done, 1 a file differs or failed, 2 bad arguments or input, 3 a wanted format's package is missing."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default" if args.debug else "ignore")  # exporters announce their own changes
            logging.disable(logging.NOTSET if args.debug else logging.WARNING)
            return options.guarded(lambda: export(args), args.debug, "interrupted; what model.json lists is whole")
    finally:
        logging.disable(logging.NOTSET)


def export_one(name: str, task: Task, eager: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Path | None]:
    """One format's row and, if it is good, its file. What goes wrong with one does not stop the others."""
    if sys.stderr.isatty():
        print(f"{name} …", file=sys.stderr)
    try:
        made = FORMATS[name](task, folder)
        row = {"format": name, **check(made, task, eager, folder)}
    except Skip as error:
        return {"format": name, "result": f"SKIP: {error}"}, None
    except Exception as error:
        if task.args.debug:
            raise
        return {"format": name, "result": f"FAILED: {' '.join(str(error).split())[:300] or type(error).__name__}"}, None
    return row, made.file if row["result"] == "ok" else None


def export(args: argparse.Namespace) -> int:
    """The recipe."""
    model, facts = load_source(args)
    task = Task(model, facts, load_data(facts, args), args)
    named = list(dict.fromkeys(name for name in args.format or () if name != "all"))
    wanted = list(FORMATS) if "all" in (args.format or ()) else named
    wanted = wanted or ["pt2", *(["onnx"] if installed(*EXTRAS["onnx"]) else [])]
    if "pruned" in wanted:
        prunable(model, args.prune_layer)
        if args.fine_tune and task.data.train is None:
            raise ValueError("--fine-tune needs the network's training images: give --verify-data DIR")
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: is not a folder; choose another")
    output.mkdir(parents=True, exist_ok=True)
    artifacts = old_artifacts(task, output)
    eager = eager_row(task)
    rows = [eager]
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            row, file = export_one(name, task, eager, Path(folder))
            rows.append(row)
            artifacts = keep(row, file, task, artifacts) if file else artifacts
    if args.json:
        print(json.dumps({"model": facts.model, "output": str(output), "inputs": len(task.data.inputs),
                          "data": task.data.what, "threads": torch.get_num_threads(), "rows": rows}, indent=2))
    else:
        print_table(rows, task)
        print("\n".join([*fastest(rows), f"written: {output / 'model.json'}" if artifacts else "nothing was written"]))
    bad, skipped = ([row["format"] for row in rows if row["result"].startswith(word)] for word in ("FAILED", "SKIP"))
    for row in rows:
        if row["format"] in (*bad, *skipped):
            print(f"{row['format']}: {row['result']}", file=sys.stderr)
    by_name = [name for name in skipped if name in named or (args.quantizer != "auto" and name.startswith("int8"))]
    return 1 if bad else 3 if by_name else 0


if __name__ == "__main__":
    sys.exit(main())
