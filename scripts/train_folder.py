"""Train a classifier on your own photographs, one folder per class: photos/cat/1.jpg, photos/dog/2.png, …

    python scripts/train_folder.py photos
    python scripts/train_folder.py photos --model resnet18 --pretrained --freeze --epochs 5

A folder may also be divided already: photos/train/cat/1.jpg, photos/val/…, photos/test/…. What is missing of val and
test is split off. Linked folders are not followed. To train on other data than images on disk, replace `Photos` and
`make_datasets`, and `make_model` where the inputs are no images: docs/your-own-data.md shows three examples.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import importlib
import itertools
import os
import pickle
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import models
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/
import torchbasics as tb
from torchbasics import cli
from torchbasics.data import mix_seed
from torchbasics.device import preserved_random_state
from torchbasics.report import Judgement, Report

PARTS = ("train", "val", "test")
TEST_SHARE = 0.1  # of all images, split off if there is no test folder; as many for validation
SMALLEST_CROP = 0.35  # augmentation shows a random part of the image, at least this share of its area, maybe mirrored
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for red, green, blue
BODY_RATE = 0.1  # the learning rate of weights that were trained before, as a share of --lr
TORCHVISION = {*models.list_models(module=models)} - {"googlenet", "inception_v3"}  # these return several outputs
# These may change when a run is resumed. All others decide its course.
FREE_ON_RESUME = {"output", "resume", "quiet", "debug", "folder", "workers", "patience", "anomaly", "save_every"}
OUT_OF_MEMORY = "use half the --batch-size with --accumulate 2, then --precision bf16, then a smaller --image-size"


def make_parser() -> cli.Parser:
    positive, fraction, rate = cli.number(int, 1), cli.number(float, 0, 0.999999), cli.number(float, 0, strict=True)
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=cli.path_argument, metavar="FOLDER", help="one folder per class")
    add = parser.add_argument_group("data").add_argument
    add("--image-size", type=cli.number(int, 1, 4096), metavar="N",
        help="height and width that the model sees (default: 64, of torchvision's models 224, or as pretrained)")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="crop and mirror (default: on)")
    add("--balance", action=argparse.BooleanOptionalAction, default=False,
        help="weight the classes in the loss, so that rare ones count as much (default: off)")
    add("--workers", type=cli.number(int, 0), default=2, metavar="N", help="processes that read (default: 2)")
    add = parser.add_argument_group("model").add_argument
    add("--model", type=model_name, default="smallvgg", metavar="NAME",
        help=f"{', '.join(tb.MODELS)}; one of torchvision, such as resnet18; or module:callable (default: smallvgg)")
    add("--pretrained", action="store_true", help="start from torchvision's weights, with their size of images")
    add("--freeze", action="store_true", help="train the last layer only")
    add("--init-from", type=cli.path_argument, metavar="FILE", help="start from the weights in a checkpoint")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=15, metavar="N", help="passes over the training images (default: 15)")
    add("--batch-size", type=positive, default=32, metavar="N", help="images per batch (default: 32)")
    add("--lr", type=rate, default=1e-3, metavar="RATE",
        help=f"highest learning rate (default: 0.001); pretrained layers get {BODY_RATE:g} of it")
    add("--weight-decay", type=cli.number(float, 0), default=1e-2, metavar="W", help="(default: 0.01)")
    add("--schedule", choices=("constant", "cosine", "onecycle"), default="onecycle", metavar="NAME",
        help="constant, cosine, onecycle (default: onecycle)")
    add("--label-smoothing", type=fraction, default=0.0, metavar="S", help="(default: 0)")
    add("--clip-norm", type=rate, metavar="NORM", help="limit of the gradient's norm (default: none)")
    add("--accumulate", type=positive, default=1, metavar="N", help="batches per optimizer step (default: 1)")
    add("--ema", type=fraction, default=0.0, metavar="DECAY", help="average the weights, e.g. 0.999 (default: off)")
    add("--patience", type=cli.number(int, 0), default=0, metavar="N",
        help="stop after N epochs without a lower validation loss (default: 0, never)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 where the hardware computes in it (default: auto)")
    add("--compile", action="store_true", help="torch.compile")
    add("--threads", type=positive, metavar="N", help="CPU threads; other numbers give other last digits")
    add = parser.add_argument_group("run").add_argument
    add("--output", type=cli.path_argument, metavar="DIR", help="new directory (default: runs/folder-DATE-TIME)")
    add("--resume", type=cli.path_argument, metavar="DIR", help="continue the run in DIR with its own options")
    add("--save-every", type=positive, metavar="N", help="save every N steps (default: after each epoch)")
    add("--seed", type=cli.number(int, 0, 2**32 - 1), default=42, metavar="N", help="(default: 42)")
    add("--deterministic", action="store_true", help="deterministic kernels only")
    add("--dry-run", action="store_true", help="two batches of everything, nothing kept")
    add("--quiet", action="store_true", help="print the result only")
    add("--anomaly", action="store_true", help="name the forward line of a NaN gradient; slow")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def model_name(text: str) -> str:
    """Return `text`. As an argparse type it refuses what is neither module:callable nor a classifier by name."""
    if ":" in text or text in tb.MODELS or text in TORCHVISION:
        return text
    if text in models.list_models():
        raise argparse.ArgumentTypeError(f"{text} is no classifier of images with one output; choose another, such as "
                                         "resnet18")  # fmt: skip
    near = difflib.get_close_matches(text, [*tb.MODELS, *TORCHVISION], n=3) or ["resnet18"]
    raise argparse.ArgumentTypeError(f"no model has the name {text!r}; did you mean {' or '.join(near)}?")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the options, those of a resumed run included."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        if args.output or args.dry_run or args.init_from:
            parser.error("--resume does not go with --output, --dry-run or --init-from")
        return resumed_args(args, argv)
    if not args.folder:
        parser.error("give the folder of your images, which has one folder per class")
    if args.pretrained and args.model not in TORCHVISION:
        parser.error(f"--pretrained: there are weights for torchvision's models only, not for {args.model}")
    if args.freeze and not (args.pretrained or args.init_from or ":" in args.model):
        parser.error("--freeze would train on random features; add --pretrained or --init-from FILE")
    if args.dry_run:
        args.epochs = 1
    args.threads = args.threads or torch.get_num_threads()
    args.command = shlex.join(sys.argv)
    args.fingerprint = None  # of the data, set by `make_datasets`
    return args


def resumed_args(args: argparse.Namespace, argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the run in `args.resume`, with those given now as far as they may differ."""
    found = tb.load_latest(Path(args.resume) / "checkpoints")
    if found is None:
        raise ValueError(f"{args.resume}: no checkpoint to resume from; start a new run")
    saved = found[1]["metadata"]["options"]
    parser = make_parser()
    parser.set_defaults(**saved)
    merged = parser.parse_args(argv)
    for name, before in saved.items():
        now = getattr(merged, name)
        if name in FREE_ON_RESUME or now == before:
            continue
        option = "--" + name.replace("_", "-")
        if name != "epochs":
            raise ValueError(f"{option} {now} differs from the run's {before}; leave it out, or start a new run")
        if saved["schedule"] != "constant":
            raise ValueError(f"--epochs {now}: the run's {saved['schedule']} schedule ends after {before} epochs")
    return merged


class Photo(NamedTuple):
    """An image file that can be read."""

    path: str
    part: str  # one of PARTS
    label: str  # the name of its class
    digest: str  # of the file's content
    size: tuple[int, int]  # width and height
    is_colour: bool


class Photos(Dataset):
    """Images on disk and their classes. To train on other data, replace this class by one that has as much:

    `len(dataset)`, and `dataset[i]`: (input, target), here a float32 image (C, H, W) and the number of its class.
    `classes`: their names. `targets`: all targets, for class weights and reports. `set_epoch(epoch)`, which Trainer
    calls before each epoch: random changes of a sample depend on (seed, epoch, sample) alone, so that a resumed run
    repeats them, whatever the number of workers. A data set without random changes needs no `set_epoch`. Targets are
    ints; of a regression `torch.tensor([value])`, since outputs are (B, 1).
    """

    def __init__(
        self, photos: list[Photo], classes: tuple[str, ...], mode: str, transform: Callable[[Any], Tensor], seed: int
    ) -> None:
        self.photos = photos
        self.classes = classes
        numbers = {name: number for number, name in enumerate(classes)}
        self.targets = [numbers[photo.label] for photo in photos]
        self.mode = mode  # "L" (grey) or "RGB"
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.photos)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = tb.read_image(self.photos[index].path, self.mode)
        with torch.random.fork_rng(devices=[]):  # afterwards the random state is what it was
            torch.default_generator.manual_seed(mix_seed(self.seed, self.epoch, index))
            return self.transform(image), self.targets[index]


# From here to `preprocessing`: what only folders of images need.


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in `folder`, in order; not the hidden ones, and not links, which may lead round in circles."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith("."))


def find_files(folder: str) -> tuple[list[tuple[str, str, str]], set[str]]:
    """Return (path, part, class) of all files below folder/CLASS or folder/PART/CLASS, and the names of all classes."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder; it should hold one folder of images per class")
    roots = {"train": Path(folder)}
    if os.path.isdir(Path(folder, "train")) and subfolders(Path(folder, "train")):
        roots = {root.name: root for root in subfolders(Path(folder))}
        if not roots.keys() <= {*PARTS}:
            raise ValueError(f"{folder}: holds {', '.join(roots)}; beside train there may be val and test only")
    files, labels = [], set()
    for part, root in roots.items():
        for label in subfolders(root):
            labels.add(label.name)
            for path in sorted(label.rglob("*")):
                hidden = any(name.startswith(".") for name in path.relative_to(label).parts)
                if not (hidden or path.is_dir()):
                    files.append((str(path), part, label.name))
    return files, labels


def examine(file: tuple[str, str, str]) -> Photo | str:
    """Read an image file whole; return what is known of it, or, if it cannot be used, its path."""
    path, part, label = file
    try:
        image = tb.read_image(path)
        if max(image.size) > 100 * min(image.size):
            return path  # scaled until its shorter side fits, it would fill the memory
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (tb.DataError, OSError):
        return path
    return Photo(path, part, label, digest, image.size, image.mode not in ("1", "L", "LA"))


def split_off(photos: list[Photo], missing: list[str], seed: int) -> list[Photo]:
    """Give the `missing` parts their share of the training images, of each class alike. Copies stay together."""
    labels = {photo.digest: photo.label for photo in photos if photo.part == "train"}
    order = {label: number for number, label in enumerate(sorted({*labels.values()}))}
    numbers = [order[label] for label in labels.values()]
    shares = (1 - TEST_SHARE * len(missing), *[TEST_SHARE] * len(missing))
    subsets = tb.split_dataset([*labels], shares, seed, numbers)  # type: ignore[arg-type]
    digests, part_of = [*labels], {}
    for part, subset in zip(("train", *missing), subsets, strict=True):
        part_of.update({digests[i]: part for i in subset.indices})
    return [photo._replace(part=part_of[photo.digest]) if photo.part == "train" else photo for photo in photos]


def listed(names: Iterable[Any]) -> str:
    """Return the number of names and the first three of them."""
    names = [*names]
    return f"{len(names):,} ({', '.join(map(str, names[:3]))}{', …' if len(names) > 3 else ''})"


def describe_problems(photos: list[Photo], classes: tuple[str, ...], image_size: int, balance: bool) -> list[str]:
    """Return a line on each thing about the images that one should know before a long training."""
    by_content: dict[str, list[Photo]] = {}
    for photo in photos:
        by_content.setdefault(photo.digest, []).append(photo)
    copies = [pair for same in by_content.values() for pair in itertools.pairwise(same)]
    within = [(a, b) for a, b in copies if a.part == b.part]
    across = [(a, b) for a, b in copies if a.part != b.part]
    contradictions = [(a, b) for a, b in copies if a.label != b.label]
    lines = []
    for text, pairs in (
        ("images that are in the same part twice", within),
        ("images that are in two of train, val and test, which flatters the result", across),
        ("images that are in two classes, of which one is wrong", contradictions),
    ):
        if pairs:
            lines.append(f"{text}: {listed(f'{a.path} = {b.path}' for a, b in pairs)}")
    counts = Counter(photo.label for photo in photos if photo.part == "train")
    sizes = sorted((counts[label], label) for label in classes)
    tiny = [f"{label}: {count}" for count, label in sizes if count < 10]
    if tiny:
        lines.append(f"classes with fewer than 10 training images: {listed(tiny)}; find more, or merge classes")
    (least, small), (most, large) = sizes[0], sizes[-1]
    if most > 3 * least and not balance:
        lines.append(f"classes differ in size, from {least:,} training images ({small}) to {most:,} ({large}); "
                     "--balance weights them in the loss")  # fmt: skip
    side = statistics.median(min(photo.size) for photo in photos)
    if not image_size / 2 <= side <= image_size * 8:
        advice = "the model sees them enlarged" if side < image_size else "reading them takes long: shrink them once"
        lines.append(f"the shorter side of a typical image has {side:g} pixels, --image-size is {image_size}: {advice}")
    return lines


def preprocessing(args: argparse.Namespace) -> dict[str, Any]:
    """Return how images become inputs, which predict.py repeats: as the pretrained weights want it, or as we do."""
    if not args.pretrained:
        size = args.image_size or (224 if args.model in TORCHVISION else 64)
        resize = round(size / 0.875) if args.augment else size  # crops have shown things larger than whole images do
        return {"image_size": size, "resize": resize, "interpolation": "bilinear", "mean": MEAN, "std": STD}
    preset = models.get_model_weights(args.model).DEFAULT.transforms()
    size = args.image_size or preset.crop_size[0]
    resize = round(size * preset.resize_size[0] / preset.crop_size[0])
    return {"image_size": size, "resize": resize, "interpolation": preset.interpolation.value,
            "mean": tuple(preset.mean), "std": tuple(preset.std)}  # fmt: skip


def make_transforms(args: argparse.Namespace, facts: dict[str, Any]) -> tuple[Callable, Callable]:
    """Return functions that make a float32 tensor (C, H, W) of a PIL image: in training at random, else the middle."""
    size, interpolation = facts["image_size"], v2.InterpolationMode(facts["interpolation"])
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(facts["mean"], facts["std"])]
    middle = v2.Compose([v2.Resize(facts["resize"], interpolation), v2.CenterCrop(size), *finish])
    crop = v2.RandomResizedCrop(size, (SMALLEST_CROP, 1), interpolation=interpolation)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *finish]) if args.augment else middle, middle


def make_datasets(args: argparse.Namespace) -> tuple[list[Any], dict[str, Any], str]:
    """Return data sets for training, validation and test, facts about them, and lines for the user.

    The facts are stored in each checkpoint: `judge` needs the classes, predict.py and export.py all of them.
    """
    files, labels = find_files(args.folder)
    with ThreadPoolExecutor() as pool:  # decoding leaves Python free for other threads
        found = [*pool.map(examine, files)]
    photos = [photo for photo in found if isinstance(photo, Photo)]
    unreadable = [path for path in found if isinstance(path, str)]
    lines = [f"files that cannot be read and are left out: {listed(unreadable)}"] if unreadable else []
    links = [path for path in Path(args.folder).rglob("*") if path.is_symlink() and path.is_dir()]
    lines += [f"linked folders, which are not followed: {listed(links)}"] if links else []
    classes = tuple(sorted({photo.label for photo in photos if photo.part == "train"}))
    if len(classes) < 2:
        raise ValueError("; ".join([f"{args.folder}: training images of {len(classes)} classes, at least 2 are needed "
                                    f"(as {args.folder}/CLASS/*.jpg)", *lines]))  # fmt: skip
    strange = [photo.path for photo in photos if photo.label not in classes]
    if strange:
        raise ValueError(f"images of classes that have none for training: {listed(strange)}")
    empty = sorted(labels - {*classes})
    lines += [f"empty classes, which are left out: {listed(empty)}"] if empty else []
    fingerprint = hashlib.sha256(repr([photo[1:4] for photo in photos]).encode()).hexdigest()
    if args.fingerprint not in (None, fingerprint):
        raise ValueError(f"{args.folder}: its images are not those that the run began with; restore them, or start a "
                         f"new run with --init-from {args.resume}/checkpoints/best.pt")  # fmt: skip
    args.fingerprint = fingerprint

    missing = [part for part in PARTS[1:] if all(photo.part != part for photo in photos)]
    photos = split_off(photos, missing, args.seed)
    parts = {part: [photo for photo in photos if photo.part == part] for part in PARTS}
    if missing:
        counts = " and ".join(f"{len(parts[part]):,} for {part}" for part in missing)
        lines.append(f"split off, of {len(photos):,} images: {counts}")
    if not all(parts.values()):
        raise ValueError(f"{args.folder}: {len(photos)} images are too few to split off val and test; add images")
    facts = {"dataset": "folder", "classes": classes, "num_classes": len(classes), **preprocessing(args)}
    lines += describe_problems(photos, classes, facts["image_size"], args.balance)
    if args.model in TORCHVISION or any(photo.is_colour for photo in photos):
        facts["in_channels"], mode = 3, "RGB"
    else:
        facts["in_channels"], mode = 1, "L"
        facts["mean"], facts["std"] = (statistics.mean(MEAN),), (statistics.mean(STD),)
    at_random, middle = make_transforms(args, facts)
    datasets = [
        Photos(parts[part], classes, mode, at_random if part == "train" else middle, args.seed) for part in PARTS
    ]
    return datasets, facts, "\n".join(f"note: {cli.printable(line)}" for line in lines)


def make_loaders(args: argparse.Namespace, device: torch.device) -> tuple[list[Any], dict[str, Any], str]:
    """Return loaders for training, validation and test, facts about the data, and lines for the user."""
    datasets, facts, notice = make_datasets(args)
    batch_size = min(args.batch_size, len(datasets[0]))
    left_out = len(datasets[0]) % batch_size  # of each epoch, since the last batch is incomplete
    if left_out > len(datasets[0]) / 10:
        notice += f"\nnote: each epoch leaves {left_out} training images out; a smaller --batch-size would use more"
    common: dict[str, Any] = {"num_workers": args.workers, "pin_memory": device.type == "cuda"}
    # Of one process, too, this is the sampler of torch whose order depends on (seed, epoch) alone.
    order: Any = DistributedSampler(datasets[0], num_replicas=1, rank=0, seed=args.seed)
    samplers = [order, None, None]
    if args.dry_run:
        samplers = [range(min(2 * batch_size, len(dataset))) for dataset in datasets]
    loaders = [
        DataLoader(dataset, batch_size, sampler=sampler, drop_last=dataset is datasets[0],
                   worker_init_fn=ignore_warnings_of_pil, **common)
        for dataset, sampler in zip(datasets, samplers, strict=True)
    ]  # fmt: skip
    return loaders, facts, notice


def ignore_warnings_of_pil(worker: int = 0) -> None:
    """Keep Pillow quiet about odd files, which are used, or reported, all the same."""
    warnings.filterwarnings("ignore", module="PIL")


def make_model(args: argparse.Namespace, facts: dict[str, Any], device: torch.device) -> nn.Module:
    """Return the model, and add to the facts how predict.py and export.py build it."""
    facts["model"] = args.model
    model = build_model(args, facts)
    check_model(model, args, facts)
    if args.init_from and not args.resume:
        load_initial_weights(model, args.init_from)
    if args.freeze:
        tb.freeze(model)
        tb.unfreeze(find_head(model)[1])
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # its statistics stay too; Trainer leaves it in this mode
    return model.to(device).to(memory_format=torch.channels_last)


def build_model(args: argparse.Namespace, facts: dict[str, Any]) -> nn.Module:
    """Return a model of ours, of torchvision, or of module:callable, for as many classes as there are."""
    if args.model in tb.MODELS:
        try:
            return tb.make_model(facts)
        except ValueError as error:
            raise ValueError(f"--model {args.model}, --image-size {facts['image_size']}: {error}") from error
    if args.model in TORCHVISION:
        weights = models.get_model_weights(args.model).DEFAULT if args.pretrained and not args.resume else None
        try:
            model = models.get_model(args.model, weights=weights, progress=sys.stderr.isatty())
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # no network, or a damaged file
            raise OSError(f"--pretrained: no weights ({error}); download {getattr(weights, 'url', '')} and put it into "
                          f"{torch.hub.get_dir()}/checkpoints") from error  # fmt: skip
        name, head = find_head(model)
        bias = head.bias is not None
        if isinstance(head, nn.Linear):
            model.set_submodule(name, nn.Linear(head.in_features, facts["num_classes"], bias))
        else:
            model.set_submodule(name, nn.Conv2d(head.in_channels, facts["num_classes"], 1, bias=bias))
        return model
    module, _, attribute = args.model.partition(":")
    sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--model {args.model}: {error}; expected module:callable that takes no arguments") from error


def find_head(model: nn.Module) -> tuple[str, Any]:
    """Return the name and the module of the last linear layer or 1×1 convolution, which gives the classes' scores."""
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no last layer to train; leave --freeze and --init-from out")
    return layers[-1]


def check_model(model: nn.Module, args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Raise ValueError unless the model makes a score for each class of images of this size."""
    size, channels = facts["image_size"], facts["in_channels"]
    where = f"--model {args.model}, --image-size {size}"
    try:
        with torch.no_grad():
            scores = model.eval()(torch.zeros(2, channels, size, size))
    except Exception as error:  # of any kind, in a model of one's own
        if cli.is_out_of_memory(error):
            raise
        raise ValueError(f"{where}: the model does not take images (N, {channels}, {size}, {size}): {error}") from error
    model.train()
    if getattr(scores, "shape", None) != (2, facts["num_classes"]):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"{where}: the model gives {found} for 2 images, expected (2, {facts['num_classes']})")


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": args.lr}
    groups: dict[str, Any] = {}
    if (args.pretrained or args.init_from) and not args.freeze:  # the last layer has more to learn than the others
        options["lr"] = args.lr * BODY_RATE
        groups = {"head": find_head(model)[1], "head_lr": args.lr}
    return torch.optim.AdamW(tb.param_groups(model, args.weight_decay, **groups), fused=True, **options)


def make_schedule(args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    """Return a schedule that Trainer steps after each optimizer step, or None."""
    total = args.epochs * steps_per_epoch
    if args.schedule == "onecycle":  # one step more than will be taken: torch raises after the last
        rates = [group["lr"] for group in optimizer.param_groups]
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total + 1, cycle_momentum=False)
    return tb.warmup_cosine_scheduler(optimizer, 0, total) if args.schedule == "cosine" else None


def make_criterion(args: argparse.Namespace, train: Any) -> nn.Module:
    """Return the loss; with --balance each class has the same weight in it, however few its images are."""
    weight = None
    if args.balance:
        counts = torch.bincount(torch.as_tensor(train.targets), minlength=len(train.classes))
        weight = len(train) / (len(train.classes) * counts.clamp(min=1))  # 1 for classes of equal size
    return nn.CrossEntropyLoss(weight, label_smoothing=args.label_smoothing)


def load_initial_weights(model: nn.Module, path: str) -> None:
    """Load what fits of the weights in the checkpoint at `path`, and print what does not."""
    loaded, own = tb.load_checkpoint(path), model.state_dict()
    weights = loaded.get("model_state_dict", loaded)  # or a bare state dict
    fitting = {name: value for name, value in weights.items() if name in own and value.shape == own[name].shape}
    if not fitting:
        raise ValueError(f"--init-from {path}: none of its weights fits the model")
    model.load_state_dict(fitting, strict=False)
    print(f"initial weights: {len(fitting)} of {len(own)} tensors from {path}")
    for name in [name for name in own if name not in fitting]:
        print(f"    not there, or of another shape: {name}")


def top5(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return for each sample whether its class is among the five of highest score, float32 (B,)."""
    return (outputs.topk(5).indices == targets[:, None]).any(1).float()


def judge(args: argparse.Namespace, trainer: tb.Trainer, best: Path, loader: Any) -> tuple[dict[str, Any], Judgement]:
    """Look at the test set, once, with the best weights; return the figures, and all else that the report shows."""
    if trainer.best_epoch is None:
        raise tb.NonFiniteLoss("no epoch had a finite validation loss; lower --lr or set --clip-norm 1")
    model = trainer.evaluated_model
    model.load_state_dict(tb.load_checkpoint(best)["model_state_dict"])
    logits, targets = tb.predict_all(model, loader, trainer.device, precision=trainer.precision)
    judgement = Judgement(logits, targets, trainer.metadata["classes"], images=loader.dataset)
    shares = {row["name"]: row["recall"] for row in judgement.by_class()}  # NaN for a class without test images
    return {
        "test_accuracy": judgement.accuracy,
        "test_balanced_accuracy": statistics.mean(share for share in shares.values() if share == share),
        **{f"test_{name}": float(metric(logits, targets).mean()) for name, metric in trainer.metrics.items()},
        "test_loss": float(F.cross_entropy(logits.double(), targets)),
        "test_samples": judgement.count,
        "accuracy_by_class": shares,
        "confusion": judgement.confusion.tolist(),
        "best_val_accuracy": trainer.history["val_acc"][trainer.best_epoch],
        "best_epoch": trainer.best_epoch + 1,
        "epochs_run": trainer.epoch,
        "stopped_because": trainer.early_stopping.reason if trainer.stopped else f"all {args.epochs} epochs done",
    }, judgement


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = tb.pick_device(args.device)
    if device.type == "cpu":
        tb.cache_cpu_memory()  # a quarter of a step on a CPU would be page faults
    tb.set_seed(args.seed, args.deterministic)
    ignore_warnings_of_pil()

    loaders, facts, notice = make_loaders(args, device)
    train_loader, val_loader, test_loader = loaders
    model = make_model(args, facts, device)
    averages = tb.averaged_copy(model, args.ema) if args.ema else None
    if args.compile:
        model.compile()
    optimizer = make_optimizer(args, model)
    schedule = make_schedule(args, optimizer, -(-len(train_loader) // args.accumulate))
    criterion = make_criterion(args, train_loader.dataset)

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autograd.set_detect_anomaly(args.anomaly))
        if args.dry_run:
            args.output = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run")
        directory = tb.RunDirectory(args.resume or args.output, name=facts["dataset"], resume=bool(args.resume))
        run = stack.enter_context(directory)
        trainer = tb.Trainer(
            model, criterion, optimizer, device, schedule, precision=args.precision, accumulate=args.accumulate,
            clip_norm=args.clip_norm, averages=averages, metrics={"top5": top5} if facts["num_classes"] > 10 else None,
            early_stopping=tb.EarlyStopping(args.patience) if args.patience else None,
            checkpoint_dir=run.checkpoints, save_every=args.save_every, metadata={**facts, "options": vars(args)},
        )  # fmt: skip
        if args.resume:
            trainer.resume()
        versions = {"torch": torch.__version__, "torchbasics": tb.__version__}
        run.write_info(command=args.command, options=vars(args), **facts, notice=notice,
                       device=tb.device_name(device), precision=trainer.precision, versions=versions)  # fmt: skip
        if not args.quiet:
            sizes = [f"{len(loader.dataset):,}" for loader in loaders]
            print(f"{notice}\n{facts['dataset']}: {' + '.join(sizes)} images for training, validation and test; "
                  f"{type(model).__name__}, {tb.count_parameters(model):,} trained parameters; "
                  f"{tb.device_name(device)}; {trainer.precision}".strip())  # fmt: skip
        run.watch(trainer, args.epochs, train_loader, quiet=args.quiet)
        with preserved_random_state(device):  # the images are cropped and mirrored at random
            collate = train_loader.collate_fn
            samples = next(iter(DataLoader(train_loader.dataset, 12, shuffle=True, collate_fn=collate)))
        report = Report(run.path, run.info, trainer, defaults=vars(make_parser().parse_args([])), samples=samples)
        started = time.monotonic()
        hint = f"continue with: python {sys.argv[0]} --resume {shlex.quote(str(run.path))}"
        try:
            with report:  # report.html is written now, after each epoch and at the end
                trainer.fit(train_loader, val_loader, args.epochs, verbose=False)
                seconds = time.monotonic() - started
                result, report.judgement = judge(args, trainer, run.checkpoints / "best.pt", test_loader)
                result |= {"train_seconds": seconds, "total_seconds": time.monotonic() - began}
                run.write_info(result=result)
        except tb.Interrupted as stop:
            print(f"{stop}{'' if args.dry_run else '; ' + hint}", file=sys.stderr)
            return 128 + stop.signum
        except tb.DataError as error:  # a file that could be read before the training
            if not trainer.is_saved():
                trainer.save()
            raise OSError(f"{str(error).strip()}; all is saved: restore that file, then {hint}") from error
        print_result(args, result, report)
    return 0


def print_result(args: argparse.Namespace, result: dict[str, Any], report: Report) -> None:
    top = f", {result['test_top5']:.2%} in the first five" if "test_top5" in result else ""
    print(f"\nbest epoch {result['best_epoch']} of {result['epochs_run']}: "
          f"validation {result['best_val_accuracy']:.2%}, test {result['test_accuracy']:.2%}{top}, "
          f"mean over classes {result['test_balanced_accuracy']:.2%} (loss {result['test_loss']:.4f})")  # fmt: skip
    print(f"stopped because: {result['stopped_because']}; training took {result['train_seconds']:.1f} s")
    for line in report.advice():
        print(f"advice: {cli.printable(line)}")
    if not args.dry_run:
        folder, best = shlex.quote(str(report.folder)), shlex.quote(str(report.folder / "checkpoints" / "best.pt"))
        print(f"report:   {shlex.quote(str(report.path))}")
        print(f"predict:  python {Path(sys.argv[0]).with_name('predict.py')} --checkpoint {best} photo.jpg")
        if args.schedule == "constant":
            print(f"continue: python {sys.argv[0]} --resume {folder} --epochs {2 * args.epochs}")


if __name__ == "__main__":
    sys.exit(cli.run(main, debug="--debug" in sys.argv, out_of_memory=OUT_OF_MEMORY))
