"""Train a classifier on your own photographs, one folder per class: photos/cat/1.jpg, photos/dog/2.png, …

    python scripts/train_folder.py photos
    python scripts/train_folder.py photos --model resnet18 --pretrained --freeze --epochs 5

The folder may already be divided: photos/train/cat/1.jpg, photos/val/…, photos/test/…. The script splits off val and
test where they are missing. It does not follow linked folders. To train on other data than images on disk, replace
`Photos` and `make_datasets`, and `build_model` if the inputs are not images: see the examples in docs/your-own-data.md.

For brevity this script leaves out some options of train_mnist.py: presets, other optimizers and schedules, --dropout,
--label-smoothing, --ema, --patience, --tta, --compile, --deterministic, --limit-batches, dry runs and TensorBoard.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import shlex
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import models
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/
import torchbasics as tb
from torchbasics import cli
from torchbasics.data import end_with_parent, mix_seed
from torchbasics.report import Judgement, Report

PARTS = ("train", "val", "test")
TEST_SHARE = 0.1  # of all images, split off if there is no test folder; as many for validation
SMALLEST_CROP = 0.35  # augmentation shows a random part of the image, at least this share of its area, maybe mirrored
BODY_RATE = 0.1  # the learning rate of weights that were trained before, as a share of --lr
TORCHVISION = {*models.list_models(module=models)} - {"googlenet", "inception_v3"}  # these return several outputs
# These may change when a run is resumed. All others decide its course.
FREE_ON_RESUME = {"output", "resume", "quiet", "debug", "folder", "workers", "anomaly", "save_every"}
# Pillow warns of odd files, which are used, or reported, all the same. This line reaches the workers, too.
warnings.filterwarnings("ignore", module="PIL")
OUT_OF_MEMORY = "use half the --batch-size with --accumulate 2, then --precision bf16, then a smaller --image-size"


def make_parser() -> cli.Parser:
    positive, rate = cli.number(int, 1), cli.number(float, 0, strict=True)
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=cli.path_argument, metavar="FOLDER", help="one folder per class")
    add = parser.add_argument_group("data").add_argument
    add("--image-size", type=cli.number(int, 1, 4096), metavar="N",
        help="height and width that the model sees (default: 64, of torchvision's models 224, or as pretrained)")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="crop and mirror (default: on)")
    add("--balance", action="store_true", help="weight the classes in the loss, so that rare ones count as much")
    add("--workers", type=cli.number(int, 0), default=2, metavar="N", help="processes that read (default: 2)")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="smallvgg", metavar="NAME",
        help=f"{', '.join(tb.MODELS)}; one of torchvision, such as resnet18; or module:callable (default: smallvgg)")
    add("--pretrained", action="store_true", help="start from torchvision's weights, with their size of images")
    add("--freeze", action="store_true", help="train the last layer only")
    add("--init-from", type=cli.path_argument, metavar="FILE", help="start from the weights in a checkpoint")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=15, metavar="N", help="passes over the training images (default: 15)")
    add("--batch-size", type=positive, default=32, metavar="N", help="images per batch (default: 32)")
    add("--lr", type=rate, default=1e-3, metavar="RATE",
        help=f"highest learning rate (default: 0.001); pretrained layers get {BODY_RATE:g} of it")
    add("--weight-decay", type=cli.number(float, 0), default=1e-2, metavar="W",
        help="pull of the weights to zero (default: 0.01)")
    add("--clip-norm", type=rate, metavar="NORM", help="limit of the gradient's norm (default: none)")
    add("--accumulate", type=positive, default=1, metavar="N", help="batches per optimizer step (default: 1)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 where the hardware computes in it (default: auto)")
    add("--threads", type=positive, metavar="N", help="CPU threads; other numbers give other last digits")
    add = parser.add_argument_group("run").add_argument
    add("--output", type=cli.path_argument, metavar="DIR", help="new directory (default: runs/folder-DATE-TIME)")
    add("--resume", type=cli.path_argument, metavar="DIR", help="continue the run in DIR with its own options")
    add("--save-every", type=positive, metavar="N", help="save every N steps (default: after each epoch)")
    add("--seed", type=cli.number(int, 0, 2**32 - 1), default=42, metavar="N",
        help="seed of all random numbers (default: 42)")
    add("--quiet", action="store_true", help="print the result only")
    add("--anomaly", action="store_true", help="name the forward line of a NaN gradient; slow")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the options, those of a resumed run included."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        if args.output or args.init_from:
            parser.error("--resume does not go with --output or --init-from")
        return parser.parse_resumed(argv, tb.saved_options(args.resume), FREE_ON_RESUME)
    if not args.folder:
        parser.error("give the folder of your images, which has one folder per class")
    if ":" not in args.model and args.model not in {*tb.MODELS, *TORCHVISION}:
        parser.error(f"--model {args.model}: no classifier with one output has that name; choose one of ours, "
                     "one of torchvision, such as resnet18, or module:callable")  # fmt: skip
    if args.pretrained and args.model not in TORCHVISION:
        parser.error(f"--pretrained: there are weights for torchvision's models only, not for {args.model}")
    if args.freeze and not (args.pretrained or args.init_from or ":" in args.model):
        parser.error("--freeze would train on random features; add --pretrained or --init-from FILE")
    args.threads = args.threads or torch.get_num_threads()
    args.command = shlex.join(sys.argv)
    args.fingerprint = None  # of the data, set by `make_datasets`
    return args


class Photo(NamedTuple):
    """A file in the folder of a class, and what `examine` finds in it."""

    path: str
    part: str  # one of PARTS
    label: str  # the name of its class
    digest: str = ""  # of its content; empty if no image can be read
    shorter_side: int = 0
    is_colour: bool = False


class Photos(Dataset):
    """Images on disk and their classes. To train on other data, replace this class by one that provides the same:

    - `len(dataset)`, and `dataset[i]`: a pair (input, target), here a float32 image (C, H, W) and the index of its
      class. In a regression the target is `torch.tensor([value])`, because the outputs are (B, 1).
    - `classes`, their names, and `targets`, the targets of all samples. Only --balance reads them.
    - `set_epoch(epoch)`, if samples change at random. Trainer calls it before each epoch. Let the changes depend on
      (seed, epoch, sample) alone: then a resumed run repeats them, with any number of workers.
    """

    def __init__(self, photos: list[Photo], facts: dict[str, Any], augment: bool, seed: int) -> None:
        self.photos = photos
        self.classes = facts["classes"]
        self.targets = [self.classes.index(photo.label) for photo in photos]
        self.mode = "RGB" if facts["in_channels"] == 3 else "L"
        self.transform = make_transform(facts, augment)
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


def find_files(folder: str) -> tuple[list[Photo], set[str], list[str]]:
    """Return the files below folder/CLASS or folder/PART/CLASS, the names of all classes, and the linked folders."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder; it should hold one folder of images per class")
    is_divided = any(Path(folder).glob("train/*/*"))  # else `train` may be a class, beside `bus`
    files: list[Photo] = []
    labels: set[str] = set()
    links: list[str] = []
    for path in sorted(Path(folder).rglob("*")):  # this does not enter linked folders, which may lead round in circles
        names = path.relative_to(folder).parts if is_divided else ("train", *path.relative_to(folder).parts)
        if any(name.startswith(".") for name in names):
            continue
        if path.is_dir():
            labels.update(names[1:2])
            if path.is_symlink():
                links.append(str(path))
        elif len(names) > 2:
            files.append(Photo(str(path), names[0], names[1]))
    return files, labels, links


def examine(file: Photo) -> Photo:
    """Read the whole image and return the file with what was found, or unchanged if it cannot be used."""
    try:
        image = tb.read_image(file.path)
    except tb.DataError:
        return file
    if max(image.size) > 100 * min(image.size):
        return file  # scaled until its shorter side fits, it would fill the memory
    digest = hashlib.sha256(Path(file.path).read_bytes()).hexdigest()
    return file._replace(digest=digest, shorter_side=min(image.size), is_colour=image.mode not in ("1", "L", "LA"))


def split_off(photos: list[Photo], missing: list[str], seed: int) -> list[Photo]:
    """Move a share of the training images to each of the `missing` parts, the same share of each class.

    Copies of an image stay together. Each class keeps a training image.
    """
    training = [photo for photo in photos if photo.part == "train"]
    originals = [*{photo.digest: photo for photo in training}.values()]
    classes = sorted({photo.label for photo in originals})
    numbers = [classes.index(photo.label) for photo in originals]
    shares = (1 - TEST_SHARE * len(missing), *[TEST_SHARE] * len(missing))
    subsets = tb.split_dataset(originals, shares, seed, numbers)  # type: ignore[arg-type]
    part_of: dict[str, str] = {}
    for part, subset in zip(("train", *missing), subsets, strict=True):
        part_of |= {originals[i].digest: part for i in subset.indices}
    kept = {photo.label for photo in training if part_of[photo.digest] == "train"}
    for photo in training:
        if photo.label not in kept:
            part_of[photo.digest] = "train"
            kept.add(photo.label)
    return [photo._replace(part=part_of[photo.digest]) if photo.part == "train" else photo for photo in photos]


def describe_problems(photos: list[Photo], left_out: list[str], labels: set[str], balance: bool) -> list[str]:
    """Return a line for each problem of the images that the user should know before a long training."""
    first = {photo.digest: photo for photo in reversed(photos)}  # of each content
    copies = [(first[photo.digest], photo) for photo in photos if photo is not first[photo.digest]]
    within = [f"{one.path} = {other.path}" for one, other in copies if one.part == other.part]
    across = [f"{one.path} = {other.path}" for one, other in copies if one.part != other.part]
    counts = Counter(photo.label for photo in photos if photo.part == "train")
    tiny = [f"{label}: {counts[label]}" for label in sorted(labels) if counts[label] < 10]
    lines = []
    for text, found in (
        ("files that cannot be read and linked folders, which are left out", left_out),
        ("images that are in the same part twice", within),
        ("images in more than one of train, val and test (they make the result look better)", across),
        ("classes with fewer than 10 training images (empty ones are left out)", tiny),
    ):
        if found:
            lines.append(f"{text}: {len(found):,} ({', '.join(found[:3])}{', …' if len(found) > 3 else ''})")
    (large, most), (small, least) = counts.most_common()[0], counts.most_common()[-1]
    if most > 3 * least and not balance:
        lines.append(f"classes differ in size, from {least:,} training images ({small}) to {most:,} ({large}); "
                     "--balance weights them in the loss")  # fmt: skip
    return lines


def image_facts(args: argparse.Namespace, is_colour: bool) -> dict[str, Any]:
    """Return how an image becomes an input, which predict.py repeats: as the pretrained or ResNet's weights want it."""
    name = args.model if args.pretrained else "resnet18"
    preset = models.get_model_weights(name).DEFAULT.transforms()
    size = args.image_size or (preset.crop_size[0] if args.model in TORCHVISION else 64)
    resize = round(size * preset.resize_size[0] / preset.crop_size[0])
    if not (args.augment or args.pretrained):
        resize = size  # random crops would have shown things larger than whole images do
    facts = {"in_channels": 3, "image_size": size, "resize": resize, "interpolation": preset.interpolation.value,
             "mean": tuple(preset.mean), "std": tuple(preset.std)}  # fmt: skip
    if not is_colour and args.model not in TORCHVISION:
        facts |= {"in_channels": 1, "mean": (0.449,), "std": (0.226,)}  # the averages of the three
    return facts


def make_transform(facts: dict[str, Any], augment: bool) -> Callable[[Any], Tensor]:
    """Return a function that makes a float32 tensor (C, H, W) of a PIL image: of a random part of it, or the middle."""
    size, interpolation = facts["image_size"], v2.InterpolationMode(facts["interpolation"])
    if augment:
        crop = [v2.RandomResizedCrop(size, (SMALLEST_CROP, 1), interpolation=interpolation), v2.RandomHorizontalFlip()]
    else:
        crop = [v2.Resize(facts["resize"], interpolation), v2.CenterCrop(size)]
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(facts["mean"], facts["std"])]
    return v2.Compose([*crop, *finish])


def make_datasets(args: argparse.Namespace) -> tuple[list[Any], dict[str, Any], str]:
    """Return data sets for training, validation and test, facts about them, and lines for the user."""
    files, labels, left_out = find_files(args.folder)
    for file in files:
        if file.part not in PARTS:
            raise ValueError(f"{file.path}: its part is {file.part!r}; beside train there may be val and test only")
    with ThreadPoolExecutor() as pool:  # decoding leaves Python free for other threads
        found = [*pool.map(examine, files)]
    photos = [photo for photo in found if photo.digest]
    left_out += [photo.path for photo in found if not photo.digest]
    classes = tuple(sorted({photo.label for photo in photos if photo.part == "train"}))
    if len(classes) < 2:
        raise ValueError(f"{args.folder}: training images of {len(classes)} classes, at least 2 are needed (as "
                         f"{args.folder}/CLASS/*.jpg); left out: {', '.join(left_out[:3]) or 'none'}")  # fmt: skip
    lacking = sorted({photo.label for photo in photos} - {*classes})
    if lacking:
        raise ValueError(f"{args.folder}: classes of val or test without training images: {', '.join(lacking)}")
    fingerprint = hashlib.sha256(repr([photo[1:4] for photo in photos]).encode()).hexdigest()
    if args.fingerprint not in (None, fingerprint):
        raise ValueError(f"{args.folder}: its images are not those that the run began with; restore them, or start a "
                         f"new run with --init-from {args.resume}/checkpoints/best.pt")  # fmt: skip
    args.fingerprint = fingerprint

    missing = [part for part in PARTS[1:] if all(photo.part != part for photo in photos)]
    photos = split_off(photos, missing, args.seed)
    parts = {part: [photo for photo in photos if photo.part == part] for part in PARTS}
    if not all(parts.values()):
        raise ValueError(f"{args.folder}: {len(photos)} images are too few to split off val and test; add images")
    facts = {"dataset": "folder", "classes": classes, "num_classes": len(classes),
             **image_facts(args, any(photo.is_colour for photo in photos))}  # fmt: skip
    lines = describe_problems(photos, left_out, labels, args.balance)
    if missing:
        counts = " and ".join(f"{len(parts[part]):,} for {part}" for part in missing)
        lines.append(f"split off, of {len(photos):,} images: {counts}")
    side, size = statistics.median(photo.shorter_side for photo in photos), facts["image_size"]
    if not size / 2 <= side <= size * 8:
        advice = "the model sees them enlarged" if side < size else "reading them takes long: shrink them once"
        lines.append(f"the shorter side of a typical image has {side:g} pixels, --image-size is {size}: {advice}")
    datasets = [Photos(parts[part], facts, args.augment and part == "train", args.seed) for part in PARTS]
    return datasets, facts, "\n".join(f"note: {cli.printable(line)}" for line in lines)


def make_loaders(args: argparse.Namespace, device: torch.device) -> tuple[list[Any], dict[str, Any], str]:
    """Return loaders for training, validation and test, facts about the data, and a notice for the user.

    The facts are stored in each checkpoint: `evaluate_best` needs the classes, predict.py and export.py all of them.
    """
    datasets, facts, notice = make_datasets(args)
    train, val, test = datasets
    common: dict[str, Any] = {"num_workers": args.workers, "worker_init_fn": end_with_parent}
    common["pin_memory"] = device.type == "cuda"
    # Use this sampler in a single process too: its order depends on (seed, epoch) alone.
    order: Any = DistributedSampler(train, num_replicas=1, rank=0, seed=args.seed)
    train_loader = DataLoader(train, min(args.batch_size, len(train)), sampler=order, drop_last=True, **common)
    val_loader = DataLoader(val, args.batch_size, **common)
    test_loader = DataLoader(test, args.batch_size, **common)
    return [train_loader, val_loader, test_loader], facts, notice


def make_model(args: argparse.Namespace, facts: dict[str, Any], device: torch.device) -> nn.Module:
    """Return the model on its device. Load the weights of --init-from; with --freeze, freeze all but the last layer."""
    model = build_model(args, facts)
    left: list[str] = []
    if args.init_from and not args.resume:
        left = tb.load_initial_weights(model, args.init_from)
        print(f"initial weights from {args.init_from}; left as they were: {', '.join(left) or 'none'}")
    if args.freeze:
        name, head = find_head(model)
        frozen = [other for other in left if not other.startswith(f"{name}.")]
        if frozen:
            raise ValueError(f"--freeze: {args.init_from} has no weights for {frozen[0]}, which would stay random; "
                             "leave --freeze out, or give a file of the same --model")  # fmt: skip
        tb.freeze(model)
        tb.unfreeze(head)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # its statistics stay too; Trainer leaves it in this mode
    return model.to(device).to(memory_format=torch.channels_last)


def build_model(args: argparse.Namespace, facts: dict[str, Any]) -> nn.Module:
    """Return the model, and add its name to the facts, from which predict.py and export.py build it.

    Raises ValueError unless it gives a score for each class of such images.
    """
    facts["model"] = args.model
    images = torch.zeros(2, facts["in_channels"], facts["image_size"], facts["image_size"])
    expected = (2, facts["num_classes"])
    try:
        model = create_model(args, facts)
        with torch.no_grad():
            shape = tuple(model.eval()(images).shape)
        if shape != expected:
            raise ValueError(f"got {shape}")
    except Exception as error:  # of any kind, in a model of one's own
        if isinstance(error, OSError) or cli.is_out_of_memory(error):
            raise
        what = f"scores {expected} for images {tuple(images.shape)}"
        raise ValueError(f"--model {args.model}, --image-size {images.shape[2]}: expected {what}: {error}") from error
    return model.train()


def create_model(args: argparse.Namespace, facts: dict[str, Any]) -> nn.Module:
    """Return a model of ours, of module:callable, or of torchvision with its last layer replaced."""
    if args.model in tb.MODELS:
        return tb.make_model(facts)
    if ":" in args.model:
        return cli.call_by_name(args.model, "--model", nn.Module)
    weights = models.get_model_weights(args.model).DEFAULT if args.pretrained and not args.resume else None
    try:
        model = models.get_model(args.model, weights=weights, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # no network, or a damaged file
        if weights is None or cli.is_out_of_memory(error):
            raise
        raise OSError(f"--pretrained: no weights ({error}); download {weights.url} and put it into "
                      f"{torch.hub.get_dir()}/checkpoints") from error  # fmt: skip
    name, head = find_head(model)
    bias = head.bias is not None  # that of maxvit_t has none
    if isinstance(head, nn.Linear):
        model.set_submodule(name, nn.Linear(head.in_features, facts["num_classes"], bias))
    else:
        model.set_submodule(name, nn.Conv2d(head.in_channels, facts["num_classes"], 1, bias=bias))
    return model


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


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    if (args.pretrained or args.init_from) and not args.freeze:  # the last layer has more to learn than the others
        groups = tb.param_groups(model, args.weight_decay, head=find_head(model)[1], head_lr=args.lr)
        return torch.optim.AdamW(groups, lr=args.lr * BODY_RATE, fused=True)
    return torch.optim.AdamW(tb.param_groups(model, args.weight_decay), lr=args.lr, fused=True)


def make_criterion(args: argparse.Namespace, train: Any) -> nn.Module:
    """Return the loss; with --balance each class has the same weight in it, however few its images are."""
    if not args.balance:
        return nn.CrossEntropyLoss()
    counts = torch.bincount(torch.as_tensor(train.targets), minlength=len(train.classes))
    return nn.CrossEntropyLoss(len(train) / (len(train.classes) * counts.clamp(min=1)))  # 1 for classes of equal size


def top5(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return for each sample whether its class is among the five of highest score, float32 (B,)."""
    return (outputs.topk(5).indices == targets[:, None]).any(1).float()


def evaluate_best(trainer: tb.Trainer, best: Path, loader: Any) -> tuple[dict[str, Any], Judgement]:
    """Evaluate the best weights on the test set, once; return the figures, and what else the report shows."""
    if trainer.best_epoch is None:
        raise tb.NonFiniteLoss("no epoch had a finite validation loss; lower --lr or set --clip-norm 1")
    model = trainer.evaluated_model
    model.load_state_dict(tb.load_checkpoint(best)["model_state_dict"])
    logits, targets = tb.predict_all(model, loader, trainer.device, precision=trainer.precision)
    judgement = Judgement(logits, targets, trainer.metadata["classes"], images=loader.dataset)
    return {
        "test_accuracy": judgement.accuracy,
        "test_balanced_accuracy": statistics.mean(row["recall"] for row in judgement.by_class() if row["support"]),
        **{f"test_{name}": float(metric(logits, targets).mean()) for name, metric in trainer.metrics.items()},
        "test_loss": float(F.cross_entropy(logits.double(), targets)),
        "test_samples": judgement.count,
        "accuracy_by_class": {row["name"]: row["recall"] for row in judgement.by_class()},
        "confusion": judgement.confusion.tolist(),
        "best_val_accuracy": trainer.history["val_acc"][trainer.best_epoch],
        "best_epoch": trainer.best_epoch + 1,
        "epochs_run": trainer.epoch,
    }, judgement


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = tb.pick_device(args.device)
    if device.type == "cpu":
        tb.cache_cpu_memory()  # a quarter of a step on a CPU would be page faults
    tb.set_seed(args.seed)
    warnings.filterwarnings("ignore", module="PIL")  # again, since `cli.run` has added filters

    loaders, facts, notice = make_loaders(args, device)
    train_loader, val_loader, test_loader = loaders
    model = make_model(args, facts, device)
    optimizer = make_optimizer(args, model)
    total = args.epochs * math.ceil(len(train_loader) / args.accumulate)  # one step more than will be taken:
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total + 1, cycle_momentum=False)
    criterion = make_criterion(args, train_loader.dataset)

    directory = tb.RunDirectory(args.resume or args.output, name=facts["dataset"], resume=bool(args.resume))
    with torch.autograd.set_detect_anomaly(args.anomaly), directory as run:
        trainer = tb.Trainer(
            model, criterion, optimizer, device, schedule, precision=args.precision, accumulate=args.accumulate,
            clip_norm=args.clip_norm, metrics={"top5": top5} if facts["num_classes"] > 10 else None,
            checkpoint_dir=run.checkpoints, save_every=args.save_every, metadata={**facts, "options": vars(args)},
        )  # fmt: skip
        if args.resume:
            trainer.resume()
        versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                    "torchvision": torchvision.__version__, "torchbasics": tb.__version__}  # fmt: skip
        run.write_info(command=args.command, options=vars(args), **facts, notice=notice,
                       device=tb.device_name(device), precision=trainer.precision, versions=versions)  # fmt: skip
        if not args.quiet:
            training, validation, test = (f"{len(loader.dataset):,}" for loader in loaders)
            print(f"{notice}\n{facts['dataset']}: {training} training, {validation} validation, {test} test images\n"
                  f"{type(model).__name__}, {tb.count_parameters(model):,} trained parameters\n"
                  f"{tb.device_name(device)}; {trainer.precision}".strip())  # fmt: skip
        run.watch(trainer, args.epochs, train_loader, quiet=args.quiet)
        train = train_loader.dataset
        samples = train_loader.collate_fn([train[i] for i in range(0, len(train), math.ceil(len(train) / 12))])
        defaults = vars(make_parser().parse_args([]))
        del defaults["folder"]  # no option
        report = Report(run.path, run.info, trainer, defaults=defaults, samples=samples)
        started = time.monotonic()
        hint = f"continue with: python {sys.argv[0]} --resume {shlex.quote(str(run.path))}"
        try:
            with report:  # report.html is written now, after each epoch and at the end
                trainer.fit(train_loader, val_loader, args.epochs, verbose=False)
                seconds = time.monotonic() - started
                result, report.judgement = evaluate_best(trainer, run.checkpoints / "best.pt", test_loader)
                result |= {"train_seconds": seconds, "total_seconds": time.monotonic() - began}
                run.write_info(result=result)
        except tb.Interrupted as stop:
            print(f"{stop}; {hint}", file=sys.stderr)
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
          f"validation {result['best_val_accuracy']:.2%}\n"
          f"test {result['test_accuracy']:.2%}{top} (loss {result['test_loss']:.4f})\n"
          f"mean over classes {result['test_balanced_accuracy']:.2%}")  # fmt: skip
    if report.judgement:
        print("\n".join(report.judgement.by_class_lines()))
    print(f"training took {result['train_seconds']:.1f} s")
    for line in report.advice():
        print(f"advice: {cli.printable(line)}")
    print(f"report:   {shlex.quote(str(report.path))}")
    if "mean" in report.info:  # the inputs are images
        best = shlex.quote(str(report.folder / "checkpoints" / "best.pt"))
        own = f" --model {shlex.quote(args.model)}" if ":" in args.model else ""
        print(f"predict:  python {Path(sys.argv[0]).with_name('predict.py')} --checkpoint {best}{own} photo.jpg")


if __name__ == "__main__":
    sys.exit(cli.run(main, debug="--debug" in sys.argv, out_of_memory=OUT_OF_MEMORY))
