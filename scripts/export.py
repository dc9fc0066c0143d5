"""Export a trained model to files that run without its Python class, and check that each computes the same.

    python scripts/export.py --checkpoint runs/mnist-20260102-030405/checkpoints/best.pt --data-dir data
    python scripts/export.py --model mymodule:make_model --input-shape 3,224,224 --format pt2 onnx

Each file is loaded in a fresh process and compared with the model at batch sizes that the export did not see. One that
computes something else is not kept. For each file the four lines of Python that load and run it are printed. They are
the lines that were checked. Everything runs on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import timeit
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/
import torchbasics as tb
from torchbasics import cli

SIZES = (1, 7, 64)  # batch sizes to compare at; an export sees a batch of two only
EXACT, ROUGH = 1e-4, 0.3  # largest difference, as a share of the largest output: of float formats, of int8
SAME_CLASS = 0.98  # smallest share of images to which an int8 file must give the model's class
DRAWN = 2000  # drawn digits to compare on
CALIBRATION = 512  # training images from which int8-static takes the ranges of activations
ROW = "{:<13}{:>9}{:>12}{:>12}{:>10}{:>9}"  # of the table


class Job(NamedTuple):
    """The model, and what to compare its files on."""

    model: nn.Module
    inputs: Tensor  # (N, …), as the model takes them
    targets: Tensor | None  # int64 (N,), if there are classes
    calibration: Tensor  # (M, …), from which int8-static takes the ranges of activations
    kind: str  # of the inputs
    args: argparse.Namespace

    @property
    def example(self) -> Tensor:
        return torch.zeros_like(self.inputs[:2])  # with a batch of one, an export may keep that size for ever

    @property
    def batches(self) -> list[Tensor]:
        """The inputs in batches of the sizes SIZES, the last size repeated; the last batch may be smaller."""
        *first, rest = self.inputs.split([*SIZES[:-1], len(self.inputs) - sum(SIZES[:-1])])
        return [*first, *rest.split(SIZES[-1])]


def export_program(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def to_pt2(job: Job, file: Path) -> None:
    torch.export.save(export_program(job.model, job.example), file)


def to_aoti(job: Job, file: Path) -> None:
    torch._inductor.aoti_compile_and_package(export_program(job.model, job.example), package_path=str(file))


def to_onnx(job: Job, file: Path) -> None:
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        raise cli.MissingExtra("needs other packages: pip install 'torchbasics[onnx]'")
    torch.onnx.export(
        job.model, (job.example,), str(file), input_names=["inputs"], output_names=["outputs"],
        dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, verbose=False)  # fmt: skip


def to_torchscript(job: Job, file: Path, model: nn.Module | None = None) -> None:
    """Trace `model`, by default that of the job."""
    with torch.no_grad():
        torch.jit.trace(model or job.model, job.example, check_trace=False).save(str(file))


def to_int8_dynamic(job: Job, file: Path) -> None:
    """Store the weights of linear layers as int8; their inputs are quantized anew in each call."""
    from torch.ao.quantization import quantize_dynamic

    if not any(isinstance(module, nn.Linear) for module in job.model.modules()):
        raise ValueError("the model has no linear layer; use int8-static")
    to_torchscript(job, file, quantize_dynamic(job.model, {nn.Linear}, torch.qint8))


def to_int8_static(job: Job, file: Path) -> None:
    """Compute all layers in int8; the ranges of their activations are those of training images."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    qconfig = get_default_qconfig_mapping(torch.backends.quantized.engine)
    with torch.no_grad():
        prepared = prepare_fx(copy.deepcopy(job.model), qconfig, (job.example,))
        for batch in job.calibration.split(64):
            prepared(batch)
        to_torchscript(job, file, convert_fx(prepared))


def to_pruned(job: Job, file: Path) -> nn.Module:
    """Set the smallest weights to zero, of all layers together or of one; return the pruned model."""
    from torch.nn.utils import prune

    model, wanted = copy.deepcopy(job.model), job.args.prune_layer
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    chosen = [(module, "weight") for name, module in layers.items() if wanted in (None, name)]
    if not chosen:
        raise ValueError(f"--prune-layer {wanted}: expected one of {', '.join(layers) or '(the model has none)'}")
    prune.global_unstructured(chosen, prune.L1Unstructured, amount=job.args.sparsity)
    for module, _ in chosen:
        prune.remove(module, "weight")  # multiplies the mask in: `weight` is a parameter again
    torch.export.save(export_program(model.requires_grad_(False), job.example), file)
    return model


class Format(NamedTuple):
    """A file's name, and the function that makes it and may return another model that the file must equal."""

    file: str
    make: Callable[[Job, Path], nn.Module | None]
    note: str = ""
    limit: float = EXACT


FORMATS = {
    "pt2": Format("model.pt2", to_pt2),
    "aoti": Format("model.aoti.pt2", to_aoti, "machine code for processors like this one, and for this torch"),
    "onnx": Format("model.onnx", to_onnx),
    "torchscript": Format("model.torchscript.pt", to_torchscript, "for old programs; torch.jit is deprecated"),
    "int8-dynamic": Format("model.int8-dynamic.pt", to_int8_dynamic, "by torch.ao, as TorchScript", ROUGH),
    "int8-static": Format(
        "model.int8-static.pt", to_int8_static, "by torch.ao, as TorchScript, calibrated on {calibration}", ROUGH
    ),
    "pruned": Format("model.pruned.pt2", to_pruned, "{sparsity:.0%} zeros take as much room and time as before"),
}


def python_lines(file: Path, example: Tensor) -> list[str]:
    """Return the four lines of Python that load `file` and run it on `inputs`."""
    shape, dtype, name = [1, *example.shape[1:]], str(example.dtype).removeprefix("torch."), repr(str(file))
    lines = ["import torch", f"model = torch.jit.load({name})", f"inputs = torch.zeros({shape}, dtype=torch.{dtype})",
             "outputs = model(inputs)"]  # fmt: skip
    if file.name.endswith(".aoti.pt2"):
        lines[1] = f"model = torch._inductor.aoti_load_package({name})"
    elif file.suffix == ".pt2":
        lines[1] = f"model = torch.export.load({name}).module()"
    elif file.suffix == ".onnx":
        lines = ["import numpy, onnxruntime", f"session = onnxruntime.InferenceSession({name})",
                 f"inputs = numpy.zeros({shape}, numpy.{dtype})",
                 "outputs = session.run(None, {'inputs': inputs})[0]"]  # fmt: skip
    return lines


# What the fresh process runs: the four lines, with each batch in place of the third.
CHECK = """
import json, statistics, sys, timeit, torch

def run(batch):
    variables["inputs"] = batch.numpy() if "numpy" in first else batch
    exec(call, variables)
    return torch.as_tensor(variables["outputs"])

first, load, _, call = json.loads(sys.argv[1])
batches, variables = torch.load("batches", weights_only=True), {}
exec(first, variables)
exec(load, variables)
with torch.no_grad():
    torch.save([run(batch) for batch in batches], "outputs")
    print(statistics.median(timeit.repeat("run(batches[0])", number=5, repeat=9, globals=globals())) / 5)
"""


def run_fresh(lines: list[str], batches: list[Tensor], folder: Path) -> tuple[list[Tensor], float]:
    """Run the four `lines` on each batch in a fresh process; return the outputs, and the seconds of a call.

    The process starts in `folder`, through which the batches and outputs pass. Raises RuntimeError if it fails.
    """
    torch.save([batch.clone() for batch in batches], folder / "batches")  # a view would be saved with its whole
    done = subprocess.run([sys.executable, "-c", CHECK, json.dumps(lines)], cwd=folder,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"does not run in a fresh process: {reason}")
    return torch.load(folder / "outputs", weights_only=True), float(done.stdout.splitlines()[-1])


def compare(outputs: Tensor, expected: Tensor) -> tuple[float, float | None]:
    """Return the largest difference as a share of the largest output, and the share of equal classes.

    The difference is NaN for other shapes. The second is None unless the outputs are class scores (N, C).
    """
    if outputs.shape != expected.shape:
        return math.nan, None
    difference = (outputs.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-12)
    is_classifier = expected.dim() == 2 and expected.shape[1] > 1
    return float(difference), accuracy(outputs, expected.argmax(1)) if is_classifier else None


def accuracy(outputs: Tensor, targets: Tensor | None) -> float | None:
    return None if targets is None else float((outputs.argmax(1) == targets).double().mean())


def load_model(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of the checkpoint or of module:callable in evaluation mode, and the checkpoint's metadata."""
    checkpoint = tb.load_checkpoint(args.checkpoint) if args.checkpoint else {}
    metadata = checkpoint.get("metadata", {})
    name = args.model or metadata.get("model")
    if name is None:
        raise ValueError(f"{args.checkpoint}: its metadata has no model; train with Trainer(metadata={{'model': …}}), "
                         "or give --model")  # fmt: skip
    if args.model and ":" in args.model:
        model = cli.call_by_name(args.model, "--model", nn.Module)
    elif name in tb.MODELS:
        model = tb.make_model(metadata | {"model": name})
    else:  # of train_folder
        from torchvision import models

        if name not in models.list_models(module=models):
            raise ValueError(f"--model {name}: not one of ours or torchvision's; give module:callable")
        model = models.get_model(name, weights=None, num_classes=metadata.get("num_classes", 1000))
    if checkpoint:
        try:
            model.load_state_dict(checkpoint.get("model_state_dict", checkpoint))
        except RuntimeError as error:
            raise ValueError(f"{args.checkpoint}: its weights are not those of {name}: {error}") from error
    return model.cpu().eval().requires_grad_(False), metadata


def make_job(model: nn.Module, metadata: dict[str, Any], args: argparse.Namespace) -> Job:
    """Compare on normalised images of the model's data set; on drawn digits or noise if they are not at hand."""
    shape, name = args.input_shape, metadata.get("dataset")
    if shape is None and not {"in_channels", "image_size"} <= metadata.keys():
        raise ValueError("the checkpoint does not say what the inputs are; give --input-shape, such as 3,224,224")
    shape = shape or (metadata["in_channels"], metadata["image_size"], metadata["image_size"])
    if not args.data_dir and (shape != (1, 28, 28) or not {"mean", "std"} <= metadata.keys()):
        noise = make_noise(model, shape, getattr(torch, args.input_dtype))
        return Job(model, noise, None, noise, "noise", args)
    if args.input_dtype != "float32":
        raise ValueError(f"--input-dtype {args.input_dtype}: the images that this model is compared on are float32")
    targets: Tensor | None
    if not args.data_dir:
        inputs, classes = tb.draw_digits(DRAWN, seed=1)
        targets, kind = classes if name == "digits" else None, "drawn digits"
        calibration, _ = tb.draw_digits(CALIBRATION, seed=0)
    elif name in ("mnist", "fashion-mnist", "kmnist"):
        test, train = (tb.load_images(name, args.data_dir, part, download=False) for part in (False, True))
        inputs, targets, kind = test.inputs, test.targets, f"{name} test images"
        calibration = train.inputs[:CALIBRATION]
    else:
        raise ValueError(f"--data-dir: the model's data set, {name}, has no files there; leave it out")
    mean, std = (torch.tensor(metadata[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return Job(model, (inputs / 255 - mean) / std, targets, (calibration / 255 - mean) / std, kind, args)


def make_noise(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return random inputs (N, *shape); integers are valid for every embedding of the model."""
    generator, size = torch.Generator().manual_seed(0), (2 * sum(SIZES), *shape)
    if dtype.is_floating_point:
        return torch.randn(size, generator=generator, dtype=dtype)
    tables = [layer.num_embeddings for layer in model.modules() if isinstance(layer, (nn.Embedding, nn.EmbeddingBag))]
    return torch.randint(min(tables, default=2), size, generator=generator).to(dtype)


def run_model(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """Return the model's outputs (N, …); raise ValueError if it cannot take the batches, or gives no tensor."""
    try:
        with torch.no_grad():
            outputs = [model(batch) for batch in batches]
    except Exception as error:
        shape, dtype = ", ".join(map(str, batches[0].shape[1:])), str(batches[0].dtype).removeprefix("torch.")
        raise ValueError(f"the model does not take {dtype} inputs of shape (batch, {shape}): {error}; "
                         "see --input-shape and --input-dtype") from error  # fmt: skip
    if not all(isinstance(part, Tensor) for part in outputs):
        raise ValueError(f"the model returns a {type(outputs[0]).__name__}; export a module that returns one tensor")
    return torch.cat(outputs)


def make_file(name: str, job: Job, file: Path) -> nn.Module | None:
    """Make `file` in the format `name`; return the model that it must equal if that is not the job's."""
    logging.disable(logging.CRITICAL)  # exporters announce their own future and print graphs of what they cannot export
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return FORMATS[name].make(job, file)
    except Exception as error:
        if type(error) in (ValueError, cli.MissingExtra):  # ours, not one of torch's subclasses
            raise
        raise RuntimeError(f"torch cannot make it of this model ({describe(error)})") from error
    finally:
        logging.disable(logging.NOTSET)


def export_one(name: str, job: Job, expected: Tensor) -> list[str]:
    """Make one file, check it, print its row, and put it into --output; return the lines that run it."""
    target, limit = Path(job.args.output, FORMATS[name].file), FORMATS[name].limit
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unfinished-") as folder:
        file = Path(folder).resolve() / target.name
        other = make_file(name, job, file)
        parts, seconds = run_fresh(python_lines(file, job.example), job.batches, file.parent)
        outputs = torch.cat(parts)
        difference, same = compare(outputs, expected if other is None else run_model(other, job.batches))
        wrong_class = limit == ROUGH and job.kind != "noise" and same is not None and same < SAME_CLASS
        if not difference <= limit or wrong_class:  # a NaN is not, either
            raise RuntimeError(f"differs from the model by {difference:.2g} of the largest output, "
                               f"gives the same class to {percent(same)}; not kept")  # fmt: skip
        cells = f"{difference:.1e}", percent(same), percent(accuracy(outputs, job.targets)), f"{1000 * seconds:.2f}"
        print(ROW.format(name, f"{file.stat().st_size / 1e6:.2f}", *cells), flush=True)
        os.replace(file, target)
    return python_lines(target, job.example)


def describe(error: Exception) -> str:
    """Return the first line of an exporter's error, which may be followed by pages for torch's developers."""
    while isinstance(error.__cause__, Exception):  # the exporter of ONNX wraps that of torch.export
        error = error.__cause__
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return "which branch it takes depends on the values of its inputs: use torch.where or torch.cond"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def shape_argument(text: str) -> tuple[int, ...]:
    return tuple(cli.number(int, 1)(part) for part in text.split(","))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", type=cli.path_argument, metavar="FILE", help="weights, and metadata that describes the model")
    add("--model", metavar="NAME",
        help=f"{', '.join(tb.MODELS)}, or module:callable, called without arguments (default: as the checkpoint says)")
    add("--input-shape", type=shape_argument, metavar="C,H,W", help="of one input (default: as the checkpoint says)")
    add("--input-dtype", default="float32", choices=("float32", "float64", "int32", "int64", "uint8"), metavar="TYPE",
        help="float32, float64, int32, int64, uint8 (default: float32)")
    add = parser.add_argument_group("files").add_argument
    add("--format", nargs="+", default=["pt2"], choices=(*FORMATS, "all"), metavar="NAME",
        help=f"{', '.join(FORMATS)}, or all (default: pt2)")
    add("--output", default="exported", type=cli.path_argument, metavar="DIR", help="folder (default: exported)")
    add("--sparsity", type=cli.number(float, 0, 1), metavar="S",
        help="share of weights that pruning sets to zero (default: 0.3)")
    add("--prune-layer", metavar="NAME", help="prune this layer only (default: the smallest weights of all)")
    add = parser.add_argument_group("comparison").add_argument
    add("--data-dir", type=cli.path_argument, metavar="DIR",
        help="compare on the test images of the model's data set in DIR (default: on drawn digits, or noise)")
    add("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if not args.checkpoint and ":" not in (args.model or ""):
        parser.error("give --checkpoint FILE, or a model of your own by --model module:callable")
    args.format = list(FORMATS) if "all" in args.format else list(dict.fromkeys(args.format))
    if "pruned" not in args.format and (args.sparsity is not None or args.prune_layer):
        parser.error("--sparsity and --prune-layer are for --format pruned")
    if args.input_shape and args.data_dir:
        parser.error("--input-shape does not go with --data-dir, whose images have their own shape")
    args.sparsity = 0.3 if args.sparsity is None else args.sparsity
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    output = Path(args.output)
    for name in args.format:
        if os.path.lexists(output / FORMATS[name].file):
            raise ValueError(f"{output / FORMATS[name].file} exists; remove it, or choose another --output")
    model, metadata = load_model(args)
    job = make_job(model, metadata, args)
    expected = run_model(model, job.batches)
    output.mkdir(parents=True, exist_ok=True)

    print(f"compared on {len(job.inputs):,} {job.kind}; a difference is a share of the largest output")
    print(ROW.format("format", "MB", "difference", "same class", "accuracy", "call ms"))
    size = sum(value.nbytes for value in model.state_dict().values() if isinstance(value, Tensor))
    with torch.no_grad():
        seconds = statistics.median(timeit.repeat(lambda: model(job.batches[0]), number=5, repeat=9)) / 5
    cells = percent(accuracy(expected, job.targets)), f"{1000 * seconds:.2f}"
    print(ROW.format("model", f"{size / 1e6:.2f}", "-", "-", *cells), flush=True)
    texts, codes = [], [0]
    for name in args.format:
        try:
            lines = export_one(name, job, expected)
        except Exception as error:
            if args.debug or isinstance(error, BrokenPipeError):
                raise
            codes.append(3 if isinstance(error, cli.MissingExtra) else 1)
            print(f"error: {name}: {cli.printable(' '.join(str(error).split()))[:500]}", file=sys.stderr)
        else:
            calibration = job.kind.replace("test images", "training images")
            note = FORMATS[name].note.format(sparsity=args.sparsity, calibration=calibration)
            texts += [f"\n# {name}: {note}".rstrip(": "), *lines]
    if {"mean", "std"} <= metadata.keys():
        line = f"inputs are (pixels / 255 - mean) / std, with mean {metadata['mean']} and std {metadata['std']}"
        if "resize" in metadata:  # of train_folder
            line += (f"; first resize the shorter side to {metadata['resize']} ({metadata['interpolation']}), "
                     f"then crop the middle {metadata['image_size']}×{metadata['image_size']}")  # fmt: skip
        print(line)
    if "classes" in metadata:
        classes = [cli.printable(name) for name in metadata["classes"]]
        more = ", …" if len(classes) > 10 else ""
        print(f"outputs are scores of {len(classes)} classes: {', '.join(classes[:10])}{more}")
    print("\n".join(texts))
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    sys.exit(cli.run(main, debug="--debug" in sys.argv, out_of_memory="export a smaller model"))
