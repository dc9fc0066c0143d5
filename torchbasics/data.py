"""Data sets as tensors in memory and batches cut from them; images, splits, padding and transforms.

Which samples form a batch, and how each is augmented, are functions of (seed, epoch, position): the same on one process
or many, before or after a resume, whatever else draws random numbers.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, random_split

from . import digits, distributed, mnist
from .mnist import DataError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

NORMALISATION = {"mnist": ((0.1307,), (0.3081,))}  # mean and std of the training images; others' are computed
# What PIL may decode: not all that it can, since some of its formats start another program (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


@dataclass(frozen=True)
class Images:
    """Labelled images: `inputs` uint8 (N, C, H, W), `targets` int64 (N,), and the names of the classes."""

    inputs: Tensor
    targets: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Tensor | slice) -> Images:
        """Return the images at `indices`, in that order."""
        return Images(self.inputs[indices], self.targets[indices], self.classes)


class Splits(NamedTuple):
    """The three parts of a data set, its name, and a notice to print if it is not the one that was wanted (else "")."""

    train: Images
    val: Images
    test: Images
    name: str
    notice: str


def load_images(name: str, data_dir: str | os.PathLike = "./data", train: bool = True, download: bool = True) -> Images:
    """Load `mnist`, `fashion-mnist` or `kmnist` (downloaded if absent), or draw `digits`: (N, 1, 28, 28).

    60,000 images are for training and 10,000 for the test. Raises FileNotFoundError if they are absent and `download`
    is False, ConnectionError if they cannot be downloaded, DataError if a file is damaged.
    """
    if name == "digits":
        inputs, targets = digits.draw_digits(60_000 if train else 10_000, seed=0 if train else 1)
        return Images(inputs, targets, mnist.CLASSES["mnist"])
    return Images(*mnist.read_mnist(name, data_dir, train, download), mnist.CLASSES[name])


def load_splits(
    name: str = "auto", data_dir: str | os.PathLike = "./data", val_size: int = 5000, seed: int = 42
) -> Splits:
    """Load training, validation and test images; `val_size` random training images are held out for validation.

    `auto` is MNIST, or drawn digits if no file of it is there or can be downloaded; the notice then says so. Of
    several processes that call it at once, one downloads and the others wait. Raises what `load_images` raises.
    """
    name, notice = _choose(name, data_dir)
    full = load_images(name, data_dir)
    if not 1 <= val_size < len(full):
        raise ValueError(f"val_size must lie between 1 and {len(full) - 1} for {name}, got {val_size}")
    shuffled = torch.randperm(len(full), generator=torch.Generator().manual_seed(seed))
    train, val = full.subset(shuffled[val_size:]), full.subset(shuffled[:val_size])
    return Splits(train, val, load_images(name, data_dir, train=False), name, notice)


def _choose(name: str, data_dir: str | os.PathLike) -> tuple[str, str]:
    """Return the name of the data set that `name` stands for, and a notice if drawn digits replace MNIST."""
    if name != "auto":
        return name, ""
    try:
        if not mnist.is_present("mnist", data_dir):  # incomplete or damaged files are an error for `load_images`
            mnist.download_mnist("mnist", data_dir)
    except OSError as error:  # no network, or no place for the files
        reason = str(error).partition(";")[0]
        return "digits", (
            f"NOTICE: no MNIST in {data_dir} ({reason}); using digits drawn by torchbasics instead. "
            "Accuracies are on drawn digits, not on MNIST."
        )
    return "mnist", ""


def channel_statistics(inputs: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 images (N, C, H, W), on the scale 0 to 1.

    They come from a histogram, without a float copy of the data set. A channel of one colour gets deviation 1.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in inputs.unbind(1):
        share = torch.bincount(channel.reshape(-1), minlength=256).cpu().double() / channel.numel()
        mean = float(share @ values)
        means.append(mean)
        stds.append(math.sqrt(float(share @ (values - mean) ** 2)) or 1.0)
    return tuple(means), tuple(stds)


def load_mnist(
    batch_size: int = 64, data_dir: str | os.PathLike = "./data", *, name: str = "mnist",
    device: torch.device | str = "cpu", seed: int = 42,
) -> tuple[TensorLoader, TensorLoader]:  # fmt: skip
    """Return loaders of the normalised training images (shuffled) and test images: (train, test).

    `name` is one that `load_images` knows, or `auto`, as in `load_splits`; its notice is printed.
    """
    name, notice = _choose(name, data_dir)
    if notice:
        print(notice)
    train, test = load_images(name, data_dir), load_images(name, data_dir, train=False)
    mean, std = NORMALISATION.get(name) or channel_statistics(train.inputs)
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "mean": mean, "std": std}
    return (
        TensorLoader(train.inputs, train.targets, shuffle=True, seed=seed, **options),
        TensorLoader(test.inputs, test.targets, **options),
    )


class RandomAffine:
    """Rotate each image by up to ±`degrees`, shift it by up to ±`shift` of its size, and resize it.

    Width and height change independently by up to ±`scale`, a share below 1. Bilinear, black outside. It works in two
    steps, as an augmentation of your own must: `draw` for a whole batch, then the call for this process's part of it.
    """

    def __init__(self, degrees: float = 10.0, shift: float = 0.1, scale: float = 0.0) -> None:
        if not 0 <= scale < 1:
            raise ValueError(f"scale must be at least 0 and below 1, got {scale}")
        self.radians = math.radians(degrees)
        self.shift = shift
        self.scale = scale

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return angle, shift right, shift down (and width, height) of each sample, (count, 3 or 5), from -1 to 1."""
        size = (count, 5 if self.scale else 3)
        return torch.rand(size, generator=generator, device=generator.device, dtype=torch.float32) * 2 - 1

    def __call__(self, inputs: Tensor, draws: Tensor) -> Tensor:
        """Return images (B, C, H, W), float32 from 0 to 255, changed as `draws` (B, 3 or 5) say."""
        height, width = inputs.shape[-2:]
        cos, sin = torch.cos(draws[:, 0] * self.radians), torch.sin(draws[:, 0] * self.radians)  # (B,)
        # For each pixel of the output, where it comes from. Coordinates run from -1 to 1 across the image.
        shift = draws[:, 1:3] * (2 * self.shift)  # (B, 2)
        across = torch.stack([cos, sin * (width / height)], dim=1)[:, :, None, None]  # (B, 2, 1, 1)
        down = torch.stack([-sin * (height / width), cos], dim=1)[:, :, None, None]
        if self.scale:
            size = (1 + self.scale * draws[:, 3:5])[:, :, None, None]  # of the part that the output shows
            across, down = across * size, down * size
        # The centres of the output's pixels, x (W,) and y (H,).
        x, y = (torch.arange(1, 2 * n, 2, device=inputs.device).float() / n - 1 for n in (width, height))
        # F.affine_grid makes the same grid, but takes three times as long as grid_sample.
        grid = torch.addcmul(torch.addcmul(shift[:, :, None, None], down, y[:, None]), across, x)  # (B, 2, H, W)
        return F.grid_sample(inputs, grid.permute(0, 2, 3, 1), padding_mode="zeros", align_corners=False)


def mix_seed(*numbers: int) -> int:
    """Return one 63-bit seed for several numbers, such as (seed, epoch, batch); near ones give unrelated seeds."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class TensorLoader:
    """Cut batches `(inputs, targets)` from a data set that fits into memory, as two tensors of the same length.

    The inputs lie on `device`, so that a batch is one indexing operation, without workers and copies. The targets stay
    on the host, where they can be counted without waiting for the device. uint8 inputs are images: they become float32
    from 0 to 255, are augmented, scaled to 0 to 1 and normalised by `mean` and `std` (one number, or one per channel).
    Other inputs pass as they are. Each whole iteration is an epoch, with `shuffle` in another order than the last.

    `batch_size` is that of all processes together: each gets its equal part, so the batches do not depend on how many
    there are. A process whose part of a smaller last batch is empty gets no batch for it. With `world_size=1` every
    process reads the whole data set.

    >>> loader = TensorLoader(torch.zeros(10, 1, 28, 28, dtype=torch.uint8), torch.arange(10), batch_size=4)
    >>> [tuple(inputs.shape) for inputs, targets in loader]
    [(4, 1, 28, 28), (4, 1, 28, 28), (2, 1, 28, 28)]
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, batch_size: int = 64, *,
        shuffle: bool = False, seed: int = 0, drop_last: bool = False, limit_batches: int | None = None,
        device: torch.device | str = "cpu", mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,),
        augment: RandomAffine | None = None, world_size: int | None = None,
    ) -> None:  # fmt: skip
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs for {len(targets)} targets; expected as many")
        self.is_image = inputs.dtype == torch.uint8
        if not self.is_image and (any(mean) or set(std) != {1.0}):
            raise ValueError(f"mean and std are for uint8 images, got {inputs.dtype}; normalise those yourself")
        self.world_size = distributed.world_size() if world_size is None else world_size
        self.rank = distributed.rank() if self.world_size > 1 else 0
        if batch_size < 1 or batch_size % self.world_size:
            raise ValueError(f"batch_size must be a multiple of the {self.world_size} processes, got {batch_size}")
        self.num_batches = len(inputs) // batch_size if drop_last else -(-len(inputs) // batch_size)
        if limit_batches is not None:
            self.num_batches = min(self.num_batches, limit_batches)
        if self.num_batches < 1:
            raise ValueError(f"{len(inputs)} samples, batch_size {batch_size}, limit_batches {limit_batches}: no batch")
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.shuffle = shuffle
        self.seed = seed
        self.augment = augment
        self.device = torch.device(device)
        self.inputs = inputs.to(self.device)
        self.targets = targets.cpu()
        self.dataset = TensorDataset(self.inputs, self.targets)
        shape = (-1, *[1] * (inputs.dim() - 2))  # (C, 1, 1)
        self._shift = torch.tensor(mean, dtype=torch.float32, device=self.device).mul(255).view(shape)
        self._scale = torch.tensor(std, dtype=torch.float32, device=self.device).mul(255).reciprocal().view(shape)
        self.epoch = 0
        self._given = 0  # batches of this epoch that were given out
        self._start = 0  # the batch with which the next iteration starts

    @property
    def sharded(self) -> bool:
        """Return whether the processes of this job divide every batch among themselves."""
        return self.world_size == distributed.world_size()

    def __len__(self) -> int:
        """Return how many batches of an epoch this process gets."""
        last = self._part(len(self.targets) - (self.num_batches - 1) * self.batch_size)
        return self.num_batches - (last.start == last.stop)

    def _part(self, size: int) -> slice:
        """Return which of the `size` samples of a batch belong to this process."""
        return slice(size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.epoch
        order = torch.arange(len(self.targets), device="cpu")
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            order = torch.randperm(len(self.targets), generator=generator, device="cpu")
        self._given, self._start = self._start, 0
        for number in range(self._given, self.num_batches):
            samples = order[number * self.batch_size : (number + 1) * self.batch_size]  # of all processes
            self._given = number + 1
            part = self._part(len(samples))
            own = samples[part]
            if len(own):
                inputs = self.inputs.index_select(0, own.to(self.device, non_blocking=True))  # (B, C, H, W)
                if self.is_image:
                    inputs = inputs.float()
                if self.augment is not None:
                    generator = torch.Generator(self.device).manual_seed(mix_seed(self.seed, epoch, number))
                    inputs = self.augment(inputs, self.augment.draw(len(samples), generator)[part])
                if self.is_image:
                    inputs = inputs.sub_(self._shift).mul_(self._scale)
                yield inputs, self.targets.index_select(0, own)
        self.set_epoch(epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`."""
        self.epoch = epoch
        self._given = self._start = 0

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and how many of its batches were given out."""
        return {"epoch": self.epoch, "batch": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration at the position `state`, without touching the data before it."""
        if not 0 <= state["batch"] <= self.num_batches:
            raise ValueError(f"position {state['batch']} lies beyond the {self.num_batches} batches of an epoch")
        self.set_epoch(state["epoch"])
        self._given = self._start = state["batch"]


def end_with_parent(worker: int) -> None:
    """End this worker of a DataLoader as soon as the process that reads from it is killed: give as `worker_init_fn`.

    Torch notices that after five seconds if the worker was forked, but never if it comes from a forkserver, which is
    the default from Python 3.14 on.
    """

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def read_image(path: str | os.PathLike, mode: str | None = None) -> Image.Image:
    """Return the image in the file at `path` as a PIL image with 8 bits per channel, turned upright as its EXIF says.

    `mode` is "L" (grey), "RGB", or None for its own. Raises DataError, which names the file, if this is not a regular
    file that holds a whole image in one of FORMATS, or if it has more pixels than PIL allows (179 million).
    """
    from PIL import Image, ImageOps

    try:
        if not Path(path).is_file():  # a pipe would wait for ever
            raise ValueError("no such file" if not Path(path).exists() else "not a regular file")
        with Image.open(path, formats=FORMATS) as image:
            upright = _to_eight_bits(ImageOps.exif_transpose(image))
    except Exception as error:  # PIL raises nearly anything on a broken file
        raise DataError(f"{path}: not a readable image ({str(error) or type(error).__name__})") from error
    return upright.convert(mode) if mode else upright


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of 16 or 32 bits with 8. PIL itself would clip at 255: white paper and grey ink alike.

    White is 1, 255, 4095 (12 bits) or 65535: the least of these that no value exceeds, else the highest value.
    """
    if image.mode[0] not in "IF":  # I;16, I;16B, I, F
        return image
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image.convert("F")), nan=0, posinf=0, neginf=0)  # float32 (H, W)
    white = next((white for white in (1, 255, 4095, 65535) if values.max() <= white), values.max())
    return Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8))


def split_dataset(
    dataset: Dataset, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 42,
    labels: Sequence[int] | Tensor | None = None,
) -> list[Subset]:  # fmt: skip
    """Split `dataset` at random into disjoint parts; with `labels`, the classes of its samples, each class alike.

    The sizes of the parts are their `fractions` of the whole to less than one sample, of each class to less than two.
    """
    if min(fractions, default=0) <= 0 or not math.isclose(sum(fractions), 1):
        raise ValueError(f"fractions must be positive and add up to 1, got {tuple(fractions)}")
    generator = torch.Generator().manual_seed(seed)
    if labels is None:
        return random_split(dataset, fractions, generator=generator)
    labels, size = torch.as_tensor(labels), len(dataset)  # type: ignore[arg-type]
    if len(labels) != size:
        raise ValueError(f"{len(labels)} labels for {size} samples; expected as many")
    by_class = [(labels == label).nonzero().flatten() for label in labels.unique()]
    shuffled = torch.cat([members[torch.randperm(len(members), generator=generator)] for members in by_class])
    parts: list[list[int]] = [[] for _ in fractions]
    for count, index in enumerate(shuffled.tolist(), start=1):
        # To the part furthest behind its share. Splitting class by class would give all roundings to the first part.
        behind = [count * fraction - len(part) for fraction, part in zip(fractions, parts, strict=True)]
        parts[behind.index(max(behind))].append(index)
    return [Subset(dataset, sorted(part)) for part in parts]


def pad_collate(
    samples: Sequence[tuple[Tensor, Any]], padding_value: float = 0.0
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Collate pairs of a sequence (T, ...) and a target: ((padded (B, longest T, ...), lengths int64 (B,)), targets).

    The tutorials return three values; this is a pair (inputs, targets), which a Trainer takes.
    """
    sequences, targets = zip(*samples, strict=True)
    padded = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=padding_value)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return (padded, lengths), torch.stack([torch.as_tensor(target) for target in targets])


def get_transforms(train: bool = True, size: int = 224) -> Callable:
    """Return the usual steps for colour photographs: PIL image or uint8 tensor in, float32 (3, size, size) out.

    Training: random crop and scale, flip, colour jitter. Evaluation: the middle, after scaling to 256/224 of `size`.
    Both are normalised with ImageNet's mean and standard deviation.
    """
    mnist.import_torchvision()
    from torchvision.transforms import v2

    steps: list[Callable] = [v2.ToImage()]
    if train:
        steps += [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2, 0.1)]
    else:
        steps += [v2.Resize(size * 256 // 224), v2.CenterCrop(size)]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    return v2.Compose(steps)


class CustomDataset(Dataset):
    """Give `(data[i], labels[i])`, the sample through `transform` if there is one.

    NumPy arrays and numbers (after `transform`) become tensors: float64 as float32. Integer labels become int64.
    """

    def __init__(
        self, data: Sequence | Tensor | np.ndarray, labels: Sequence | Tensor | np.ndarray,
        transform: Callable | None = None,
    ) -> None:  # fmt: skip
        if len(data) != len(labels):
            raise ValueError(f"{len(data)} samples for {len(labels)} labels; expected as many")
        self.data = data
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        sample = _from_numpy(self.data[index] if self.transform is None else self.transform(self.data[index]))
        label = _from_numpy(self.labels[index])
        if isinstance(label, Tensor) and not label.is_floating_point():
            label = label.long()
        return sample, label


def _from_numpy(value: Any) -> Any:
    """Return a tensor for a NumPy array or number, float32 for float64, and any other value as it is."""
    import numpy as np

    if not isinstance(value, (np.ndarray, np.number, np.bool_)):
        return value
    tensor = torch.tensor(value)
    return tensor.float() if tensor.dtype == torch.float64 else tensor
