"""Name what is in image files by trained checkpoints, or judge the checkpoints on a data set's test images.

    python scripts/predict.py --checkpoint runs/mnist-20260102-030405/checkpoints/best.pt digit.png more/*.png
    python scripts/predict.py --checkpoint a/best.pt --checkpoint b/best.pt --dataset mnist --tta

Several checkpoints vote: their mean probability counts. For a model of digits (28×28, grey) a picture may have any
size, be dark on light or light on dark; it is cropped, scaled and centred as MNIST was made. For other models it is
scaled to their image size.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/
import torchbasics as tb
from torchbasics import cli
from torchbasics.report import Judgement

# What a checkpoint's metadata must say, or else the option of that name.
FACTS = ("model", "classes", "in_channels", "image_size", "mean", "std")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = cli.number(int, 1)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", action="append", required=True, type=cli.path_argument, metavar="FILE",
        help="a checkpoint; repeat the option to let several vote")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
    add("--tta", action="store_true", help="average over nine shifted views of each image")
    add = parser.add_argument_group("what checkpoints of your own script do not say").add_argument
    add("--model", metavar="NAME", help=f"{', '.join(tb.MODELS)}, or module:callable, called without arguments")
    add("--classes", type=lambda text: tuple(text.split(",")), metavar="A,B,…", help="names of the classes, in order")
    add("--in-channels", type=int, choices=(1, 3), help="1: grey, 3: colour")
    add("--image-size", type=positive, metavar="N", help="height and width in pixels")
    add("--mean", type=numbers, metavar="M,…", help="subtracted from pixels between 0 and 1; one, or one per channel")
    add("--std", type=numbers, metavar="S,…", help="what they are divided by then")
    add = parser.add_argument_group("image files").add_argument
    add("--invert", action=argparse.BooleanOptionalAction, default=None,
        help="they are dark on light, or --no-invert: light on dark (default: found out for digits, else as they are)")
    add("--top", type=positive, metavar="N", help="classes to print for each image (default: 3)")
    add = parser.add_argument_group("judging").add_argument
    add("--dataset", choices=("mnist", "fashion-mnist", "kmnist", "digits"), help="judge on its test images")
    add("--data-dir", type=cli.path_argument, metavar="DIR", help="where it is (default: ./data)")
    add("--report", type=cli.path_argument, metavar="FILE", help="new HTML page for confusion, classes and mistakes")
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print one JSON object")
    add("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if bool(args.images) == bool(args.dataset):
        parser.error("give image files, or --dataset NAME to judge on its test images")
    if args.images and (args.data_dir or args.report):
        parser.error("--data-dir and --report go with --dataset, not with image files")
    if args.dataset and (args.invert is not None or args.top):
        parser.error("--invert and --top go with image files, not with --dataset")
    if args.dataset == "digits" and args.data_dir:
        parser.error("--dataset digits is drawn; leave --data-dir out")
    if args.report and Path(args.report).exists():
        parser.error(f"--report {args.report}: give a file that does not exist yet")
    args.top, args.data_dir = args.top or 3, args.data_dir or "./data"
    return args


def numbers(text: str) -> tuple[float, ...]:
    return tuple(cli.number(float, -1e6, 1e6)(part) for part in text.split(","))


def load_member(path: str, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model in the checkpoint at `path`, for pixels from 0 to 1, and what metadata and options say of it."""
    try:
        checkpoint = tb.load_checkpoint(path)
    except tb.CheckpointError as error:
        raise ValueError(f"{error} (a file of export.py is run by the lines that it printed)") from error
    given = {name: getattr(args, name) for name in FACTS if getattr(args, name) is not None}
    facts = {**checkpoint.get("metadata", {}), **given}
    missing = [name for name in FACTS if name not in facts]
    if missing:
        options = " ".join("--" + name.replace("_", "-") for name in missing)
        raise ValueError(f"{path}: its metadata has no {', '.join(missing)}; "
                         f"train with Trainer(metadata={{{missing[0]!r}: …}}), or give {options}")  # fmt: skip
    facts |= {"classes": tuple(facts["classes"]), "num_classes": len(facts["classes"])}
    model = make_model(facts, own=args.model)
    member = nn.Sequential(v2.Normalize(facts["mean"], facts["std"]), model).eval()
    try:
        model.load_state_dict(checkpoint.get("model_state_dict", checkpoint))
        with torch.no_grad():
            logits = member(torch.zeros(1, facts["in_channels"], facts["image_size"], facts["image_size"]))
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights and facts do not fit {facts['model']}: {error}") from error
    if logits.shape != (1, facts["num_classes"]) or not logits.isfinite().all():
        raise ValueError(f"{path}: the model does not give {facts['num_classes']} finite logits for an image")
    return member, facts


def make_model(facts: dict[str, Any], own: str | None) -> nn.Module:
    """Return one of our models, or what the module:callable `own` returns. A file alone cannot have code imported."""
    if own is None or ":" not in own:
        if facts["model"] in tb.MODELS:
            return tb.make_model(facts)
        if facts["model"] not in models.list_models(module=models):
            raise ValueError(f"--model {facts['model']}: not one of ours or torchvision's; give module:callable")
        return models.get_model(facts["model"], weights=None, num_classes=facts["num_classes"])
    return cli.call_by_name(own, "--model", nn.Module)


def to_grey(image: Image.Image) -> Tensor:
    """Return an image in grey, float32 (H, W) from 0 to 1, reduced until no side is above 512.

    What is transparent becomes as the rest if it is a small part, else white around a dark drawing, black around a
    bright one.
    """
    image = image.convert("RGBA")
    image = image.reduce(math.ceil(max(image.size) / 512))
    grey, alpha = (torch.from_numpy(np.array(part)) / 255 for part in (image.convert("L"), image.getchannel("A")))
    opaque = grey[alpha > 0.5]
    around = opaque.median() if len(opaque) > 0.8 * grey.numel() else (opaque.mean() < 0.5).float()
    return grey * alpha + around * (1 - alpha)


def background(grey: Tensor) -> Tensor:
    """Return the lighting of the paper, (H, W): a quadratic surface through the 40% of pixels that are nearest to it.

    Least trimmed squares by concentration steps (Rousseeuw & Van Driessen, 2006), begun at the median of the margin.
    """
    height, width = grey.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    terms = torch.stack([torch.ones_like(x), x, y, x * y, x * x, y * y], dim=-1).double()  # (H, W, 6)
    step = math.ceil(max(height, width) / 128)  # every pixel of a small image, enough of a large one
    points, values = terms[::step, ::step].flatten(0, 1), grey[::step, ::step].flatten().double()
    distance = (values - torch.cat([grey[0], grey[-1], grey[:, 0], grey[:, -1]]).median()).abs()
    for _ in range(10):
        near = distance <= distance.quantile(0.4) + 1e-6
        surface = torch.linalg.lstsq(points[near], values[near, None], driver="gelsd").solution  # (6, 1)
        distance = (values - points @ surface[:, 0]).abs()
    return (terms @ surface[:, 0]).float()


def find_ink(grey: Tensor, invert: bool | None) -> Tensor:
    """Return how much ink lies on each pixel, (H, W) from 0 to 1. `invert`: it is dark on light (None: find out).

    Ink is the minority that stands out on one side of the background. Raises ValueError if nothing stands out.
    """
    away = grey - background(grey)
    dark = bool((away**3).sum() < 0) if invert is None else invert
    noise = 5 * away.abs().quantile(0.4)  # about three standard deviations of what is no ink
    ink = (-away if dark else away) - noise
    if ink.max() < 0.05:
        raise ValueError("nothing is drawn on it: no pixel differs from the background by 5% or more")
    return (ink / ink.max()).clamp(0, 1)


def crop(ink: Tensor) -> Tensor:
    """Return the part of `ink` (H, W) that holds the drawing. Specks that fill no cell of 1/64 do not count."""
    cell = math.ceil(max(ink.shape) / 64)
    cells = F.avg_pool2d(ink[None], cell, ceil_mode=True, count_include_pad=False)[0] > 0.1
    rows, columns = cells.nonzero().unbind(1)
    if not len(rows):
        raise ValueError("nothing is drawn on it but specks")
    # one cell more on each side, then as tight as the pixels allow
    part = ink[max(int(rows.min()) - 1, 0) * cell : (int(rows.max()) + 2) * cell,
               max(int(columns.min()) - 1, 0) * cell : (int(columns.max()) + 2) * cell]  # fmt: skip
    rows, columns = (part > 0.1).nonzero().unbind(1)
    return part[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def to_mnist(grey: Tensor, invert: bool | None = None) -> Tensor:
    """Return a grey image (H, W) as one of MNIST, (28, 28) from 0 to 1.

    As LeCun et al. (1998) made MNIST: the digit fits a box of 20×20 pixels, its centre of mass lies in the middle of
    28×28. Raises ValueError if nothing is drawn.
    """
    ink = crop(find_ink(grey, invert))
    height, width = (max(1, round(side * 20 / max(ink.shape))) for side in ink.shape)
    ink = F.interpolate(ink[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
    ink = ink / ink.max()  # thin strokes grow pale when scaled down
    centre_y = float(ink.sum(1) @ torch.arange(height).float() / ink.sum())
    centre_x = float(ink.sum(0) @ torch.arange(width).float() / ink.sum())
    top, left = min(max(round(14 - centre_y), 0), 28 - height), min(max(round(14 - centre_x), 0), 28 - width)
    return F.pad(ink, (left, 28 - width - left, top, 28 - height - top))


def look(path: str, facts: dict[str, Any], invert: bool | None) -> Tensor:
    """Return what the model sees of the image in a file, float32 (C, H, W) from 0 to 1. Raises DataError."""
    channels, size = facts["in_channels"], facts["image_size"]
    if (channels, size, facts["classes"]) == (1, 28, tuple("0123456789")):
        image = tb.read_image(path)
        try:
            return to_mnist(to_grey(image), invert)[None]
        except ValueError as error:
            raise tb.DataError(f"{path}: {error}") from error
    image = tb.read_image(path, "L" if channels == 1 else "RGB")
    if "resize" in facts:  # of train_folder: the middle of the image, as its validation saw it
        resize = v2.Resize(facts["resize"], v2.InterpolationMode(facts["interpolation"]))
        image = v2.CenterCrop(size)(resize(image))
    else:
        image = image.resize((size, size), resample=2)  # bilinear
    pixels = torch.from_numpy(np.array(image)).view(size, size, channels).permute(2, 0, 1) / 255
    return 1 - pixels if invert else pixels


def predict_files(model: nn.Module, facts: dict[str, Any], args: argparse.Namespace, device: torch.device) -> int:
    """Print class, confidence and runners-up of each image file; return 1 if one of them cannot be used, else 0."""
    width = min(60, max(len(path) for path in args.images))
    class_width = min(30, max(len(str(name)) for name in (*facts["classes"], "class")))
    rows: list[dict[str, Any]] = []
    if not args.json:
        print(f"{'image':<{width}}  {'class':<{class_width}}  confidence  runners-up")
    for path in args.images:
        try:
            pixels = look(path, facts, args.invert)  # (C, H, W)
        except tb.DataError as error:
            print(f"error: {cli.printable(error)}", file=sys.stderr)
            rows.append({"file": path, "error": str(error)})
            continue
        with torch.no_grad():
            shares, indices = model(pixels[None].to(device)).softmax(1)[0].topk(min(args.top, len(facts["classes"])))
        classes = [facts["classes"][index] for index in indices.tolist()]
        top = dict(zip(classes, shares.tolist(), strict=True))
        rows.append({"file": path, "class": classes[0], "confidence": top[classes[0]], "top": top})
        if not args.json:
            runners = ", ".join(f"{name} {share:.2%}" for name, share in list(top.items())[1:])
            print(cli.printable(f"{path:<{width}}  {classes[0]:<{class_width}}  {top[classes[0]]:10.2%}  {runners}"))
    if args.json:
        print(json.dumps({"classes": facts["classes"], "images": rows}, indent=2))
    return 1 if any("error" in row for row in rows) else 0


def evaluate_on(model: nn.Module, facts: dict[str, Any], args: argparse.Namespace, device: torch.device) -> None:
    """Print the accuracy on the test images of a data set, its interval, and the worst confusions."""
    test = tb.load_images(args.dataset, args.data_dir, train=False)
    shape, classes = (facts["in_channels"], facts["image_size"], facts["image_size"]), facts["classes"]
    if (test.inputs.shape[1:], test.classes) != (shape, classes):
        raise ValueError(f"--dataset {args.dataset}: its classes or image size are not those of the model")
    loader = tb.TensorLoader(test.inputs, test.targets, 250, device=device)  # from 0 to 1: members normalise
    outputs, targets = tb.predict_all(model, loader, device)  # (N, classes), (N,)
    judgement = Judgement(outputs, targets, classes, test.inputs)
    count, correct, (low, high) = judgement.count, judgement.correct, judgement.interval
    confused = [(true, taken, times) for true, taken, times, _ in judgement.worst_pairs(3)]
    if args.report:
        shown = {"dataset": args.dataset, "mean": facts["mean"], "std": facts["std"]}
        judgement.write(args.report, f"{', '.join(args.checkpoint)} on {args.dataset}", shown)
    if args.json:
        print(json.dumps({"dataset": args.dataset, "images": count, "correct": correct, "accuracy": correct / count,
                          "interval": (low, high), "confusions": confused}, indent=2))  # fmt: skip
        return
    views = ", nine views of each image" if args.tta else ""
    print(f"{args.dataset}: {count:,} test images, {len(args.checkpoint)} checkpoint(s){views}")
    print(f"accuracy {correct / count:.2%} (95% interval {low:.2%} to {high:.2%}), {count - correct:,} mistakes")
    if confused:
        print("worst: " + ", ".join(f"{true} taken for {taken} {times:,} times" for true, taken, times in confused))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = tb.pick_device(args.device)
    members, facts = zip(*[load_member(path, args) for path in args.checkpoint], strict=True)
    for path, other in zip(args.checkpoint, facts, strict=True):
        if any(other[name] != facts[0][name] for name in ("classes", "in_channels", "image_size")):
            raise ValueError(f"{path}: cannot vote: its classes or image size are not those of {args.checkpoint[0]}")
    model: nn.Module = tb.EnsembleModel(members)  # log of the mean probability
    if args.tta:
        model = tb.ShiftedViews(model)
    model.to(device).eval()
    if args.dataset:
        evaluate_on(model, facts[0], args, device)
        return 0
    return predict_files(model, facts[0], args, device)


if __name__ == "__main__":
    sys.exit(cli.run(main, debug="--debug" in sys.argv, out_of_memory="use --device cpu"))
