"""Names what is in image files: class, confidence and runners-up, by checkpoints of train_mnist or exported files.

    python scripts/predict.py --checkpoint runs/mnist-20260102-030405/checkpoints/best.pt digit.png more/*.png
    python scripts/predict.py --artifact exported/model.pt2 --json --top 5 photo.jpg

A picture for an MNIST model may have any size, be dark on light or light on dark; it is cropped, scaled and centred as
MNIST was made. A file that can run code when loaded is loaded only if `model.json` beside it lists its SHA-256. That
proves that the two belong together, not who made them: for a stranger's folder it means nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import logging
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "torchbasics" / "__init__.py").is_file():  # in a checkout its own package comes first, installed or not
    sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchbasics as tb
from torchbasics import images, options
from torchbasics.checkpoint import fitting_weights, load_weights_file
from torchbasics.data import NORMALISATION
from torchbasics.mnist import CLASSES
from torchbasics.models import MODELS

DIGITS = ("mnist", "digits")  # centred by mass in a box of 20 pixels; images of other data sets are only resized
# A word in a quantised program, and the module that registers its operators: without it torch cannot load the program.
OPERATORS = ((b"quantized_decomposed", "torch.ao.quantization.fx._decomposed"),
             (b"quantized_decomposed", "torchao.quantization.pt2e.quantize_pt2e"))
BATCH, MOST_SHOWN = 64, 400
Seen = tuple[dict[str, Any], Tensor | None, Any]  # an image's row of the result, the network's input, a thumbnail


class Facts(NamedTuple):
    """What a model expects and means."""

    dataset: str | None
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]  # height and width in pixels
    mean: tuple[float, ...]  # of pixel values on the scale 0 to 1
    std: tuple[float, ...]
    batch: int | None = None  # the one batch size of a model that was exported so


class Member(nn.Module):
    """A model that takes pixels from 0 to 1, (B, C, H, W), and normalises them itself; returns logits (B, classes)."""

    def __init__(self, run: Callable[[Tensor], Tensor], facts: Facts, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.run, self.facts, self.device = run, facts, torch.device(device)
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (facts.mean, facts.std))

    def forward(self, pixels: Tensor) -> Tensor:
        inputs, count = (pixels - self.mean) / self.std, len(pixels)
        if self.facts.batch:  # exported for one batch size: the last batch is filled up
            inputs = F.pad(inputs, (0, 0, 0, 0, 0, 0, 0, -count % self.facts.batch))
        outputs = [self.run(part.to(self.device)) for part in inputs.split(self.facts.batch or count)]
        logits = torch.cat(outputs)[:count].float().cpu()
        if logits.shape != (count, len(self.facts.classes)) or not logits.isfinite().all():
            raise tb.CheckpointError(f"the model's output is not {len(self.facts.classes)} finite numbers an image; "
                                     "use another checkpoint or artifact")
        return logits


def check_facts(where: Path, values: dict[str, Any]) -> Facts:
    """Facts from a file's own words, which may be anything; CheckpointError names what is wrong with them."""
    plain: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    facts = Facts(**plain)

    def numbers(values: Any, kind: Any, low: float, high: float) -> bool:
        return isinstance(values, tuple) and all(type(x) in kind and low <= x <= high for x in values)

    for name, good in {
        "dataset": isinstance(facts.dataset, (str, type(None))),
        "classes": isinstance(facts.classes, tuple) and facts.classes and all(type(x) is str for x in facts.classes),
        "channels (1 or 3)": facts.channels in (1, 3),
        "image size (1 to 4096)": numbers(facts.size, (int,), 1, 4096) and len(facts.size) == 2,
        "mean": numbers(facts.mean, (int, float), -1e6, 1e6) and len(facts.mean) in (1, facts.channels),
        "std": numbers(facts.std, (int, float), 1e-6, 1e6) and len(facts.std) in (1, facts.channels),
        "batch": facts.batch is None or numbers((facts.batch,), (int,), 1, 65536),
    }.items():
        if not good:
            raise tb.CheckpointError(f"{where}: its {name} cannot be right; use another file")
    return facts


def mnist_facts(classes: int = 10) -> Facts:
    """For files that don't say: MNIST's."""
    names = CLASSES["mnist"] if classes == 10 else tuple(map(str, range(classes)))
    return Facts("mnist", names, 1, (28, 28), *NORMALISATION["mnist"])


def load_member(path: Path, name: str | None, device: torch.device) -> Member:
    """The model of a checkpoint, its file verified; with `name` also that of a plain state_dict without a record."""
    checkpoint = load_weights_file(path, plain=name is not None)
    state, metadata = checkpoint["model_state_dict"], checkpoint.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    name = name or metadata.get("model")
    if name not in MODELS:
        raise tb.CheckpointError(f"{path}: its metadata names no model of {', '.join(MODELS)}; give --model NAME")
    facts = mnist_facts(len(next((tensor for tensor in reversed(state.values()) if tensor.dim() == 1), ())))
    if "classes" in metadata:
        known = {key: metadata.get(key) for key in ("dataset", "classes", "mean", "std")}
        facts = check_facts(path, {**known, "channels": metadata.get("in_channels"),
                                   "size": (metadata.get("image_size"),) * 2})
    shape = len(facts.classes), facts.channels, facts.size[0]
    with torch.device("meta"):  # compared before memory is taken: the sizes are the file's own words
        fitting_weights(tb.make_model(name, *shape), state, str(path))
    model = tb.make_model(name, *shape)
    tb.load_weights(model, state, str(path))
    return Member(model.to(device).eval(), facts, device)


def load_artifact(path: Path, trust: bool) -> Member:
    """An exported model. What is hashed is what is loaded: the file is read once."""
    try:
        with images.open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise tb.CheckpointError(f"{path}: {error.strerror}; give a file that export.py wrote") from None
    hashes, facts = read_manifest(path.with_name("model.json"))
    is_onnx = path.suffix == ".onnx"  # a graph of known operators; all others can run code
    listed = hashes.get(path.name)
    if not trust and listed != hashlib.sha256(content).hexdigest() and (listed or not is_onnx):
        reason = "is not the file that model.json lists" if listed else "can run code, and no model.json lists it"
        raise tb.CheckpointError(f"{path}: {reason}; export it again, or give --trust if you know who made it")
    logging.disable(logging.WARNING)  # of a file that it cannot read torch would show a traceback
    try:
        return Member(open_onnx(content) if is_onnx else open_program(content), facts)
    except options.MissingExtra:
        raise
    except Exception as error:
        loader = "onnxruntime" if is_onnx else "torch"
        raise tb.CheckpointError(f"{path}: {loader} cannot load it ({str(error)[:200]}); export it again") from error
    finally:
        logging.disable(logging.NOTSET)


def read_manifest(path: Path) -> tuple[dict[str, str], Facts]:
    """The SHA-256 by file name, and the facts, of `model.json`; no hash, and MNIST's facts, if there is none."""
    if not os.path.lexists(path):
        return {}, mnist_facts()
    try:
        with images.open_regular(path) as file:
            manifest = json.loads(file.read(10_000_000))
        if manifest["schema"] != 1:
            raise ValueError("another schema")
        (batch, channels, *size), normalisation = manifest["input"]["shape"], manifest["normalisation"]
        hashes = {str(entry["file"]): str(entry["sha256"]) for entry in manifest["artifacts"]}
        facts = {"dataset": manifest["dataset"], "classes": manifest["classes"], "channels": channels, "size": size,
                 **{key: normalisation[key] for key in ("mean", "std")}, "batch": None if batch == "batch" else batch}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise tb.CheckpointError(f"{path}: not a model.json of export.py, schema 1; export the model again") from None
    return hashes, check_facts(path, facts)


def open_onnx(content: bytes) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
    except ImportError:
        raise options.MissingExtra("a .onnx file needs another package: pip install 'torchbasics[onnx]'") from None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])


def open_program(content: bytes) -> Callable[[Tensor], Tensor]:
    """An exported program, an AOTInductor package or a TorchScript archive: by its content, whatever its name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
    if any("aotinductor/" in name for name in names):
        importlib.import_module("torch._inductor.codecache")  # torch 2.10 forgets to
        return torch._inductor.aoti_load_package(io.BytesIO(content))
    if any(name.endswith("constants.pkl") for name in names):
        return torch.jit.load(io.BytesIO(content), map_location="cpu").eval()
    if b"torchao" in content:
        try:
            importlib.import_module("torchao")
        except ImportError:
            raise options.MissingExtra(
                "a file quantized by torchao needs that package: pip install 'torchbasics[quant]'") from None
    for word, registers_operators in OPERATORS:
        if word in content:
            with contextlib.suppress(ImportError):
                importlib.import_module(registers_operators)
    return torch.export.load(io.BytesIO(content)).module()


def load_models(args: argparse.Namespace) -> tuple[nn.Module, Facts]:
    """One model, or several as an ensemble that averages probabilities; (B, C, H, W) from 0 to 1 → log-probabilities.

    All must have the same classes and input; each keeps its own normalisation.
    """
    device = tb.pick_device(args.device)
    members = [load_member(Path(path), args.model, device) for path in args.checkpoint]
    members += [load_artifact(Path(path), args.trust) for path in args.artifact]
    first = members[0].facts
    for path, member in zip([*args.checkpoint, *args.artifact], members, strict=True):
        if member.facts[:4] != first[:4]:
            raise ValueError(f"{path}: its data set, classes or input size are not those of the first model; "
                             "an ensemble needs models for one task")
    return tb.EnsembleModel(members), first


def to_pixels(image: Any, facts: Facts, invert: bool | None) -> tuple[Tensor, bool | None]:
    """What the network sees of a PIL image, (C, H, W) from 0 to 1; and whether it was taken as dark on light."""
    if facts.dataset in DIGITS and (facts.channels, facts.size) == (1, (28, 28)):
        pixels, dark = images.to_mnist(images.to_grey(image), invert)
        return pixels[None], dark
    pixels = images.resize(image, facts.size, facts.channels)
    return 1 - pixels if invert else pixels, invert


def look(path: str, facts: Facts, args: argparse.Namespace) -> Seen:
    """Reads and prepares an image; of one that cannot be used the row says so under "error"."""
    try:
        image = images.load_image(path, args.max_pixels)
        pixels, dark = to_pixels(image, facts, args.invert)
        return {"file": path, "dark_on_light": dark}, pixels, images.thumbnail(image) if args.show else None
    except images.ImageError as error:
        text = str(error)
    except Exception as error:  # PIL raises nearly anything on a broken file
        text = getattr(error, "strerror", None) or f"not readable: {str(error) or type(error).__name__}"
    return {"file": path, "error": text}, None, None


def predict_files(model: nn.Module, facts: Facts, args: argparse.Namespace) -> Iterator[Seen]:
    """For each image in order what `look` returns, the prediction of `model` (log-probabilities) added to its row."""
    for start in range(0, len(args.images), BATCH):
        seen = [look(path, facts, args) for path in args.images[start : start + BATCH]]
        rows = [row for row, _, _ in seen if "error" not in row]
        inputs = [pixels for _, pixels, _ in seen if pixels is not None]
        if rows:
            best = model(torch.stack(inputs)).exp().topk(min(args.top, len(facts.classes)))
            for row, shares, indices in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
                row["top"] = [{"class": facts.classes[i], "probability": share}
                              for i, share in zip(indices, shares, strict=True)]
                row |= {"class": row["top"][0]["class"], "confidence": row["top"][0]["probability"]}
        yield from seen


def print_row(row: dict[str, Any], width: int) -> None:
    name, best = options.printable(row["file"]), options.printable(row["class"])
    others = ", ".join(f"{options.printable(item['class'])} {item['probability']:.2%}" for item in row["top"][1:])
    print(f"{name:<{width}}  {best:<5}  {row['confidence']:10.2%}  {others}".rstrip(), flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("images", nargs="+", metavar="IMAGE",
        help=f"image files ({', '.join(images.FORMATS)}; no default)")
    add = parser.add_argument_group("model (several: their probabilities are averaged)").add_argument
    add("--checkpoint", action="append", default=[], metavar="FILE", help="a checkpoint of train_mnist (default: none)")
    add("--artifact", action="append", default=[], metavar="FILE",
        help="a file of export.py: .pt2, .onnx, TorchScript (default: none)")
    add("--model", choices=MODELS, help="read a plain state_dict as this network, for 28×28 grey images normalised as "
        "MNIST's; its content cannot be verified (default: what the checkpoint says)")
    add("--trust", action="store_true",
        help="load an artefact that model.json doesn't list; it can run any code (default: off)")
    add("--device", default="auto", metavar="NAME",
        help="of checkpoints: auto, cpu, cuda, cuda:1, mps or xpu; artefacts run on the CPU (default: auto)")
    add = parser.add_argument_group("images").add_argument
    add("--invert", action=argparse.BooleanOptionalAction, default=None,
        help="take images as dark on light, or with --no-invert as light on dark (default: detected for digits, else "
        "as they are)")
    add("--tta", action="store_true", help="average over nine views, shifted by up to 1/28 of the size (default: off)")
    add("--max-pixels", type=options.COUNT, default=80_000_000, metavar="N",
        help="refuse to decode more pixels than this (default: 80000000)")
    add = parser.add_argument_group("output").add_argument
    add("--top", type=options.COUNT, default=3, metavar="K", help="classes to show for each image (default: 3)")
    add("--json", action="store_true", help="print one JSON object; probabilities from 0 to 1 (default: a table)")
    add("--show", metavar="FILE.png", help=f"write the first {MOST_SHOWN} inputs, and what the network saw of them, "
        "side by side (default: no file)")
    add("--debug", action="store_true", help="show tracebacks (default: off)")
    add("--version", action="version", version=f"torchbasics {tb.__version__}")
    args = parser.parse_args(argv)
    if not args.checkpoint and not args.artifact:
        parser.error("give a model: --checkpoint FILE or --artifact FILE")
    inputs = (*args.images, *args.checkpoint, *args.artifact)
    if args.show and os.path.exists(args.show) and any(
            os.path.exists(path) and os.path.samefile(path, args.show) for path in inputs):
        parser.error(f"--show {args.show} would overwrite an input; name another file")
    if args.show and (os.path.isdir(args.show) or not os.path.isdir(os.path.dirname(args.show) or ".")):
        parser.error(f"--show {args.show} cannot be written: name a file in a folder that is there")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns 0 done, 1 an image or something else failed, 2 bad arguments or model, 3 optional package missing."""
    args = parse_args(argv)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PIL's and torch's on files that they can read all the same
        return options.guarded(lambda: predict(args), args.debug)


def predict(args: argparse.Namespace) -> int:
    """The recipe."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise options.MissingExtra("images need Pillow, a part of torchvision: pip install torchvision") from None
    model, facts = load_models(args)
    width = min(60, max(len(options.printable(path)) for path in args.images))
    rows, pairs = [], list[tuple[Any, Tensor]]()
    if not args.json:
        print(f"{'image':<{width}}  class  confidence  runners-up")
    for row, pixels, small in predict_files(tb.ShiftedViews(model) if args.tta else model, facts, args):
        rows.append(row)
        if "error" in row:
            print(f"error: {options.printable(row['file'])}: {options.printable(row['error'])}", file=sys.stderr)
        elif not args.json:
            print_row(row, width)
        if pixels is not None and args.show and len(pairs) < MOST_SHOWN:
            pairs.append((small, pixels))
    if args.json:
        print(json.dumps({"dataset": facts.dataset, "classes": facts.classes, "models": args.checkpoint + args.artifact,
                          "tta": args.tta, "images": rows}, indent=2, allow_nan=False))
    if pairs:
        images.draw_sheet(pairs, args.show)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
