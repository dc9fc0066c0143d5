"""Data sets as tensors on the training device, batches cut from them, and the same guarantees for folders of images.

Which samples form a batch and how each is augmented are functions of (seed, epoch, position): the same whoever asks, in
whatever order, on one process or many, before or after a resume.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import multiprocessing
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate, random_split

from torchbasics import digits, distributed
from torchbasics.images import FORMATS, eight_bit, open_regular
from torchbasics.mnist import CLASSES, DataError, download_mnist, import_torchvision, missing_files, read_mnist

NORMALISATION = {"mnist": ((0.1307,), (0.3081,))}  # of the 60,000 training images; the others' are computed when loaded
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


# ------------------------------------------------------------------------------------------------- data sets as tensors


@dataclass(frozen=True)
class Images:
    """Labelled images: `inputs` uint8 (N, C, H, W), `targets` int64 (N,), the classes' names."""

    inputs: Tensor
    targets: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Tensor | slice) -> Images:
        """The images at `indices`, in that order."""
        return Images(self.inputs[indices], self.targets[indices], self.classes)


def load_images(name: str, data_dir: str | os.PathLike = "./data", train: bool = True, download: bool = True) -> Images:
    """Loads `mnist`, `fashion-mnist` or `kmnist` (downloaded if absent), or draws `digits`; all are (N, 1, 28, 28).

    60,000 images for training, 10,000 others for the test. Raises FileNotFoundError if the files are absent and not
    wanted from the network, ConnectionError if they cannot be had, DataError if one is damaged.
    """
    if name == "digits":
        inputs, targets = digits.draw_digits(60_000 if train else 10_000, seed=0 if train else 1)
        return Images(inputs, targets, CLASSES["mnist"])
    if download and missing_files(name, data_dir, train):
        download_mnist(name, data_dir)
    inputs, targets = read_mnist(name, data_dir, train)
    return Images(inputs, targets, CLASSES[name])


def load_splits(
    name: str, data_dir: str | os.PathLike = "./data", val_size: int = 5000, seed: int = 42
) -> tuple[Images, Images, Images]:
    """Training, validation and test images; the `val_size` validation images are a random part of the training ones."""
    full, test = (load_images(name, data_dir, train) for train in (True, False))
    if not 1 <= val_size < len(full):
        raise ValueError(f"val_size must lie between 1 and {len(full) - 1} for {name}, got {val_size}")
    shuffled = torch.randperm(len(full), generator=torch.Generator().manual_seed(seed))
    return full.subset(shuffled[val_size:]), full.subset(shuffled[:val_size]), test


def channel_statistics(inputs: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images (N, C, H, W), on the scale 0 to 1.

    Exact, from a histogram: no float copy of the data set is made.
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
    batch_size: int = 64,
    data_dir: str | os.PathLike = "./data",
    *,
    name: str = "mnist",
    augment: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 42,
    download: bool = True,
) -> tuple[TensorLoader, TensorLoader]:
    """Returns loaders of the training images (shuffled) and of the test images, normalised: (train, test)."""
    train, test = (load_images(name, data_dir, part, download) for part in (True, False))
    mean, std = NORMALISATION.get(name) or channel_statistics(train.inputs)
    options: dict[str, Any] = {"device": device, "mean": mean, "std": std}
    return (
        TensorLoader(
            train.inputs,
            train.targets,
            batch_size,
            shuffle=True,
            seed=seed,
            augment=RandomAffine() if augment else None,
            **options,
        ),
        TensorLoader(test.inputs, test.targets, batch_size, **options),
    )


# ---------------------------------------------------------------------------------------------------- order and batches


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, such as (seed, epoch, step); near ones give unrelated seeds."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class BatchOrder:
    """Which of `count` samples form which batch: a function of (seed, epoch).

    `batch_size` is that of all processes together; each takes its part of every batch, without padding (the last parts
    may be empty). Iterating yields (number of the batch, indices of all its samples, slice of this process's part),
    starts at the position given to `load_state_dict`, and moves on to the next epoch at its end.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        limit_batches: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if count < 1:
            raise ValueError("the data set is empty")
        if batch_size < 1 or (limit_batches is not None and limit_batches < 1):
            raise ValueError(f"batch_size and limit_batches must be at least 1, got {batch_size} and {limit_batches}")
        if drop_last and batch_size > count:
            raise ValueError(
                f"a batch of {batch_size} is larger than the data set of {count} samples; choose a smaller batch_size"
            )
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be between 0 and world_size - 1, got {self.rank} of {self.world_size}")
        batches = count // batch_size if drop_last else -(-count // batch_size)
        self.batches = min(batches, limit_batches or batches)
        self.epoch = self._position = self._start = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[int, Tensor, slice]]:
        order, epoch = self.order(), self.epoch
        self._position, self._start = self._start, 0
        for number in range(self._position, self.batches):
            samples = order[number * self.batch_size : (number + 1) * self.batch_size]
            self.epoch, self._position = epoch, number + 1  # whatever another iteration has done meanwhile
            yield number, samples, self._part(len(samples))
        self.set_epoch(epoch + 1)

    def order(self) -> Tensor:
        """The samples' indices in the order of this epoch, int64 (count,)."""
        if not self.shuffle:
            return torch.arange(self.count, device="cpu")
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        return torch.randperm(self.count, generator=generator, device="cpu")

    def _part(self, size: int) -> slice:
        return slice(size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of `epoch`."""
        self.epoch, self._position, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch, and how many of its batches were given out."""
        return {"epoch": self.epoch, "batch": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration starts at `state`, without touching the data before it."""
        if not 0 <= state["batch"] <= self.batches:
            raise ValueError(
                f"position {state['batch']} lies beyond the {self.batches} batches of an epoch; is it another data set?"
            )
        self.set_epoch(state["epoch"])
        self._position = self._start = state["batch"]


class Augmentation(Protocol):
    """Random changes of a batch, in two parts, so that a batch split among processes is changed as a whole one."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random numbers for `count` samples, (count, …), on the generator's device."""

    def __call__(self, inputs: Tensor, draws: Tensor) -> Tensor:
        """`inputs` float (B, …), of images from 0 to 255, changed as `draws` (B, …) say."""


class RandomAffine:
    """Rotates each image by up to ±`degrees`, shifts it by up to ±`shift` of its size, and resizes it.

    Width and height change each by up to ±`scale`, a share below 1. Bilinear, black outside.
    """

    def __init__(self, degrees: float = 10.0, shift: float = 0.1, scale: float = 0.0) -> None:
        if not 0 <= scale < 1:
            raise ValueError(f"scale must be at least 0 and below 1, got {scale}")
        self.radians, self.shift, self.scale = math.radians(degrees), shift, scale

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Angle, shift right, shift down (and width, height) of each sample, (count, 3 or 5), between -1 and 1."""
        size = count, 5 if self.scale else 3
        return torch.rand(size, generator=generator, device=generator.device, dtype=torch.float32) * 2 - 1

    def __call__(self, inputs: Tensor, draws: Tensor) -> Tensor:
        """Returns the changed images, float (B, C, H, W)."""
        if not len(inputs):  # a process's part of a small batch may be empty; affine_grid refuses that
            return inputs
        height, width = inputs.shape[-2:]
        cos, sin = torch.cos(draws[:, 0] * self.radians), torch.sin(draws[:, 0] * self.radians)
        # the map from output to input, in coordinates where the image reaches from -1 to 1
        shift = draws[:, 1:3] * (2 * self.shift)
        across = torch.stack([cos, sin * (width / height)], dim=1)[:, :, None, None]  # (B, 2, 1, 1)
        down = torch.stack([-sin * (height / width), cos], dim=1)[:, :, None, None]
        if self.scale:
            size = (1 + self.scale * draws[:, 3:5])[:, :, None, None]  # of the part that the output shows
            across, down = across * size, down * size
        x, y = _pixel_centres(height, width, inputs.device)
        # F.affine_grid makes the same grid, but takes three times as long as grid_sample
        grid = torch.addcmul(torch.addcmul(shift[:, :, None, None], down, y), across, x)  # (B, 2, H, W)
        return F.grid_sample(
            inputs, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode="zeros", align_corners=False
        )


@functools.lru_cache(maxsize=8)
def _pixel_centres(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x (1, W) and y (H, 1) of the pixels' centres."""
    x, y = (torch.arange(1, 2 * size, 2, device=device).float() / size - 1 for size in (width, height))
    return x[None, :], y[:, None]


class TensorLoader:
    """Batches of a data set that lies in memory, on the training device, as two tensors.

    Yields `(inputs, targets)`. uint8 inputs are taken as images: made float32 from 0 to 255, augmented, brought to the
    scale 0 to 1 and normalised by `mean` and `std` (one number a channel); others pass as they are. A whole batch is
    cut by one indexing operation: no worker, no collating, no copy from the host. `rank` and `world_size` default to
    those of the process.

    >>> loader = TensorLoader(torch.zeros(10, 1, 28, 28, dtype=torch.uint8), torch.arange(10), batch_size=4)
    >>> [tuple(inputs.shape) for inputs, targets in loader]
    [(4, 1, 28, 28), (4, 1, 28, 28), (2, 1, 28, 28)]
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int = 64,
        *,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        augment: Augmentation | None = None,
        drop_last: bool = False,
        limit_batches: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs for {len(targets)} targets; expected as many")
        if augment is not None and inputs.dim() != 4:
            raise ValueError(f"augmentation needs images (N, C, H, W), got shape {tuple(inputs.shape)}")
        if len(mean) != len(std) or len(mean) not in {1, *inputs.shape[1:2]}:
            raise ValueError(
                f"mean and std need one number, or one a channel; got {len(mean)} and {len(std)} "
                f"for inputs {tuple(inputs.shape)}"
            )
        if min(std) <= 0:
            raise ValueError(f"std must be positive, got {tuple(std)}")
        if inputs.dtype != torch.uint8 and (any(mean) or set(std) != {1.0}):
            raise ValueError(f"mean and std are for uint8 images, got {inputs.dtype}; normalise those yourself")
        self.device = torch.device(device)
        self.inputs, self.targets, self.augment = inputs.to(self.device), targets.to(self.device), augment
        self.batches = BatchOrder(
            len(inputs),
            batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            limit_batches=limit_batches,
            rank=rank,
            world_size=world_size,
        )
        shape = (-1, *[1] * (inputs.dim() - 2))
        self._shift = torch.tensor(mean, dtype=torch.float32, device=self.device).mul(255).view(shape)
        self._scale = torch.tensor(std, dtype=torch.float32, device=self.device).mul(255).reciprocal().view(shape)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, samples, part in self.batches:
            own = samples[part].to(self.device, non_blocking=True)
            yield self._inputs(number, own, len(samples), part), self.targets.index_select(0, own)

    def _inputs(self, number: int, own: Tensor, count: int, part: slice) -> Tensor:
        """Of batch `number` of `count` samples the inputs of this process, which are the `part` at indices `own`."""
        inputs = self.inputs.index_select(0, own)  # (B, C, H, W)
        if inputs.dtype == torch.uint8:
            inputs = inputs.float()
        if self.augment is not None:
            generator = torch.Generator(self.device).manual_seed(
                mix_seed(self.batches.seed, self.batches.epoch, number)
            )
            inputs = self.augment(inputs, self.augment.draw(count, generator)[part])
        return inputs.sub_(self._shift).mul_(self._scale) if self.inputs.dtype == torch.uint8 else inputs

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of `epoch`; by itself every full iteration is followed by the next epoch."""
        self.batches.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch, and how many of its batches were given out."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration starts at `state`, without touching the data before it."""
        self.batches.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------- folders of images


class SeededImageFolder(Dataset):
    """Images in one folder per class, at any depth, whose random transforms depend on (seed, epoch, sample) alone.

    An item is `(transform(image), class index)`; it is asked for by its index (epoch 0) or by `(index, epoch)`. `image`
    is a PIL image in mode `mode` (by default grey or colour, as the first image is), a deeper one scaled to 8 bits
    (`images.eight_bit`). Raises DataError if there is nothing to read, or, naming it, for an unreadable image.
    """

    def __init__(
        self, root: str | os.PathLike, transform: Callable | None = None, *, seed: int = 0, mode: str | None = None
    ) -> None:
        self.root, self.transform, self.seed = Path(root), transform, seed
        folders = sorted(path for path in _entries(self.root) if path.is_dir() and not path.name.startswith("."))
        self.classes = tuple(path.name for path in folders)
        self.samples = [
            (path, index)
            for index, folder in enumerate(folders)
            for path in _images(folder, [self.root.resolve()])
        ]
        if not self.samples:
            raise DataError(
                f"{self.root}: no images; expected one folder per class with {', '.join(IMAGE_ENDINGS[:3])} … in it"
            )
        self.targets = torch.tensor([label for _, label in self.samples])
        self.mode = mode or ("L" if self._open(0).mode in ("1", "L", "LA") else "RGB")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, int]:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        index = range(len(self))[index]  # an int whatever kind it was, and -1 is the same sample as the last
        image = self._open(index).convert(self.mode)
        if self.transform is not None:
            with seeded(mix_seed(self.seed, epoch, index)):
                image = self.transform(image)
        return image, self.samples[index][1]

    def _open(self, index: int) -> Any:
        from PIL import Image

        path = self.samples[index][0]
        try:
            with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
                image.load()
                return eight_bit(image)
        except Exception as error:  # PIL raises nearly anything on a broken file
            raise DataError(
                f"{path}: not a readable image ({str(error) or type(error).__name__}); repair or remove it"
            ) from None


def _images(folder: Path, above: list[Path]) -> Iterator[Path]:
    """The image files in `folder` and the folders in it, but for hidden ones: macOS puts a `._a.png` beside a.png.

    A link to one of the folders `above` would lead round for ever, and is left out.
    """
    here = folder.resolve()
    for path in sorted(_entries(folder)) if here not in above else ():
        if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith("."):
            yield path
        elif path.is_dir() and not path.name.startswith("."):
            yield from _images(path, [*above, here])


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read as a folder ({error.strerror}); give a folder with one folder per class"
        ) from None


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's CPU generator, Python's `random` and NumPy's (if loaded) draw from `seed`.

    Afterwards they stand where they stood.
    """
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would also reseed the accelerators
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


class FolderBatches:
    """A `batch_sampler` for DataLoader: the keys `(index, epoch)` of this process's part of every batch."""

    def __init__(self, indices: Sequence[int], batches: BatchOrder) -> None:
        self.indices, self.batches = list(indices), batches
        self.set_epoch, self.state_dict, self.load_state_dict = (
            batches.set_epoch,
            batches.state_dict,
            batches.load_state_dict,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for _, samples, part in self.batches:
            yield [(self.indices[i], self.batches.epoch) for i in samples[part].tolist()]


def folder_loader(
    folder: SeededImageFolder,
    batch_size: int = 64,
    *,
    indices: Sequence[int] | None = None,
    shuffle: bool = False,
    seed: int = 0,
    limit_batches: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """A DataLoader over `folder` (or those of its samples at `indices`) that a Trainer can resume exactly."""
    indices = range(len(folder)) if indices is None else indices
    order = BatchOrder(len(indices), batch_size, shuffle=shuffle, seed=seed, limit_batches=limit_batches)
    return DataLoader(
        folder,
        batch_sampler=FolderBatches(indices, order),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_end_with_parent,
        collate_fn=functools.partial(_collate_part, folder),
    )


def _end_with_parent(worker: int) -> None:
    """In a worker: a thread that ends it with the process it works for, however that ends.

    torch itself looks every five seconds, not while an image is read, never at one that ended before its first look.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: Any) -> None:
    while parent.is_alive() and os.getppid() == parent.pid:  # the first alone waits for later workers too
        parent.join(1)
    os._exit(1)


def _collate_part(folder: SeededImageFolder, samples: list) -> Any:
    """default_collate; for a process whose part of a batch is empty, tensors of no samples."""
    return default_collate(samples) if samples else [part[:0] for part in default_collate([folder[0]])]


# ----------------------------------------------------------------------------- splits, collating, transforms, a Dataset


def split_dataset(
    dataset: Dataset,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 42,
    labels: Sequence[int] | Tensor | None = None,
) -> list[Subset]:
    """Splits `dataset` into disjoint parts by torch's random_split; with `labels`, each class alike (stratified).

    The parts' sizes are their `fractions` of the whole, to less than one sample; in each class, to a sample or two.
    """
    if min(fractions, default=0) <= 0 or not math.isclose(sum(fractions), 1):
        raise ValueError(f"fractions must be positive and add up to 1, got {tuple(fractions)}")
    if labels is None:
        return random_split(dataset, fractions, generator=torch.Generator().manual_seed(seed))
    labels = torch.as_tensor(labels)
    if len(labels) != len(dataset):  # type: ignore[arg-type]
        raise ValueError(f"{len(labels)} labels for {len(dataset)} samples; expected as many")  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    by_class = [(labels == label).nonzero().flatten() for label in labels.unique()]
    shuffled = torch.cat([members[torch.randperm(len(members), generator=generator)] for members in by_class])
    parts: list[list[int]] = [[] for _ in fractions]
    for count, index in enumerate(shuffled.tolist(), start=1):
        # To the part furthest behind its share. Splitting class by class would give all roundings to the first part.
        behind = [count * fraction - len(part) for fraction, part in zip(fractions, parts, strict=True)]
        parts[behind.index(max(behind))].append(index)
    return [Subset(dataset, sorted(part)) for part in parts]


def pad_collate(samples: Sequence[tuple[Tensor, Any]], padding_value: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Collates sequences of different length: `(sequence (T, …), target)` each.

    Returns the sequences padded at their end, (B, max T, …), their lengths int64 (B,), and the targets (B, …).
    """
    sequences, targets = zip(*samples, strict=True)
    padded = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=padding_value)
    return (
        padded,
        torch.tensor([len(sequence) for sequence in sequences]),
        torch.as_tensor(targets) if not isinstance(targets[0], Tensor) else torch.stack(targets),
    )


def get_transforms(train: bool, size: int = 224) -> Callable:
    """torchvision's usual pipeline for colour photographs: PIL image or uint8 tensor in, float32 (3, size, size) out.

    Training: random crop and scale, flip, colour jitter. Evaluation: the middle, after scaling to 256/224 of `size`.
    Normalised with ImageNet's mean and standard deviation.
    """
    import_torchvision()
    from torchvision.transforms import v2

    steps: list[Callable] = [v2.ToImage()]
    if train:
        steps += [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2)]
    else:
        steps += [v2.Resize(size * 256 // 224, antialias=True), v2.CenterCrop(size)]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    return v2.Compose(steps)


class CustomDataset(Dataset):
    """The map-style data set of the tutorials: `data[i]`, through `transform` if given, with `labels[i]`."""

    def __init__(self, data: Sequence | Tensor, labels: Sequence | Tensor, transform: Callable | None = None) -> None:
        if len(data) != len(labels):
            raise ValueError(f"{len(data)} samples for {len(labels)} labels; expected as many")
        self.data, self.labels, self.transform = data, labels, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        sample = self.data[index]
        return (self.transform(sample) if self.transform is not None else sample), self.labels[index]
