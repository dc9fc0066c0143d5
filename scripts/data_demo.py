"""From single samples to batches on the device: every value shown here is also checked.

python scripts/data_demo.py --data-dir ./data --output ./data_demo
python scripts/data_demo.py --section collate.padding --section split.stratified
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "torchbasics" / "__init__.py").is_file():  # in a checkout its own package comes first, installed or not
    sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, get_worker_info, random_split

from torchbasics.data import (
    CustomDataset,
    TensorLoader,
    channel_statistics,
    get_transforms,
    load_images,
    pad_collate,
    read_image,
    split_dataset,
)
from torchbasics.demo import Parser, Sections, show, show_error, skip
from torchbasics.digits import draw_digits
from torchbasics.mnist import FOLDERS, DataError, mnist_files

# torchvision takes seconds to import, and a spawned worker imports this file again: so it is imported where it is used.

section = Sections(__doc__)
options = argparse.Namespace(output=None, data_dir=Path("data"))  # what main() was asked for

# Mean and standard deviation of the training images as they are usually given. For KMNIST two pairs are in use
# (0.1918, 0.3483 and 0.1904, 0.3475): compute them.
PUBLISHED = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


# -------------------------------------------------------------------------------------------------------------- dataset
# Datasets, and functions given to them, stand at the top level of a module: only there can a spawned worker find them.


class Squares(Dataset):
    """The map-style data set of this page: inputs 0, 1, 2, ... and their squares as targets."""

    def __init__(self, count: int, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.inputs = torch.arange(count, dtype=torch.float32)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.inputs[index]  # raises IndexError past the end, by which `for sample in dataset` knows where to stop
        return (x if self.transform is None else self.transform(x)), x**2


def halve(x: Tensor) -> Tensor:
    return x / 2


def add_noise(x: Tensor) -> Tensor:
    return x + torch.rand(())


@section("dataset.map_style", "D1")
def dataset_map_style() -> None:
    """A map-style dataset answers len(dataset) and dataset[i]; that is all a DataLoader needs."""
    dataset = Squares(4)
    show("len(dataset)", len(dataset), 4)
    show("dataset[3]: input and target", dataset[3], (3.0, 9.0))
    show("all targets", [dataset[i][1].item() for i in range(4)], [0.0, 1.0, 4.0, 9.0])
    show_error("dataset[4]", lambda: dataset[4], IndexError, "out of bounds")
    # For tensors, and for lists, the class need not be written.
    inputs, targets = torch.arange(4.0), torch.arange(4.0) ** 2
    show("TensorDataset(inputs, targets)[3]", TensorDataset(inputs, targets)[3], (3.0, 9.0))
    show("torchbasics.CustomDataset(...)[3]", CustomDataset(inputs, targets)[3], (3.0, 9.0))


@section("dataset.transform", "D1")
def dataset_transform() -> None:
    """A transform runs each time an item is asked for, so a random one gives another value in every epoch."""
    show("Squares(4, transform=halve)[3]", Squares(4, transform=halve)[3], (1.5, 9.0))
    noisy = Squares(4, transform=add_noise)
    first, second = noisy[3][0].item(), noisy[3][0].item()
    show("noisy[3] twice: equal?", first == second, False)
    show("both between 3 and 4", min(first, second) >= 3 and max(first, second) <= 4, True)
    show("the stored input is unchanged", noisy.inputs, [0, 1, 2, 3])


class Numbers(IterableDataset):
    """0, 1, 2, ... as a stream: for data that can be read in order but not looked up, such as a log or a socket."""

    def __init__(self, stop: int, split: bool = True) -> None:
        self.stop, self.split = stop, split

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()  # None in the main process
        if worker is None or not self.split:
            return iter(range(self.stop))
        return iter(range(worker.id, self.stop, worker.num_workers))


@section("dataset.iterable", "D1")
def dataset_iterable() -> None:
    """An iterable dataset is a stream: it has no length and no index, and cannot be shuffled by the loader."""
    stream = Numbers(5)
    show("list(stream)", list(stream), [0, 1, 2, 3, 4])
    show("in batches of 2", [batch.tolist() for batch in DataLoader(stream, batch_size=2)], [[0, 1], [2, 3], [4]])
    show_error("len(stream)", lambda: len(stream), TypeError, "has no len()")  # type: ignore[arg-type]
    show_error("shuffle=True", lambda: DataLoader(stream, shuffle=True), ValueError, "unspecified shuffle option")


@section("dataset.iterable_workers", "D1")
def dataset_iterable_workers() -> None:
    """Every worker gets a copy of the stream: unless it is split by worker, each sample comes once per worker."""
    repeated = torch.cat(list(DataLoader(Numbers(10, split=False), batch_size=4, num_workers=2)))
    show("not split, 2 workers: samples of 10", len(repeated), 2 * 10)
    show("how often each", repeated.bincount(), [2] * 10)
    batches = list(DataLoader(Numbers(10), batch_size=4, num_workers=2))
    show("split by worker: how often each", torch.cat(batches).bincount(), [1] * 10)
    # Each worker fills batches of its own, so there are two short last ones.
    expected = [[0, 2, 4, 6], [1, 3, 5, 7], [8], [9]]
    show("its batches: even numbers and odd in turn", [batch.tolist() for batch in batches], expected)


# --------------------------------------------------------------------------------------------------------------- loader


@section("loader.batch_size", "D2")
def loader_batch_size() -> None:
    """batch_size says how many samples are stacked; drop_last leaves out the shorter batch at the end."""
    dataset = Squares(10)
    inputs, targets = next(iter(DataLoader(dataset, batch_size=4)))
    show("first batch: inputs", inputs, [0, 1, 2, 3])
    show("first batch: targets", targets, [0, 1, 4, 9])
    show("sizes by default: one each", _sizes(DataLoader(dataset)), [1] * 10)
    show("sizes with batch_size=4", _sizes(DataLoader(dataset, batch_size=4)), [4, 4, 2])
    show("and drop_last=True", _sizes(DataLoader(dataset, batch_size=4, drop_last=True)), [4, 4])
    # The mean of batch means is not the mean, for the short last batch counts as much as the others.
    means = [batch.mean() for batch, _ in DataLoader(dataset, batch_size=4)]
    show("mean of 0..9, as the mean of batch means", torch.stack(means).mean(), (1.5 + 5.5 + 8.5) / 3)
    show("each batch weighted by its size", (4 * means[0] + 4 * means[1] + 2 * means[2]) / 10, 4.5)


def _sizes(loader: DataLoader) -> list[int]:
    return [len(inputs) for inputs, _ in loader]


@section("loader.collate", "D2")
def loader_collate() -> None:
    """Samples become a batch by stacking: tuples and dicts keep their form, numbers become tensors, text a list."""
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    samples: Any = [{"x": first, "y": 0, "name": "a"}, {"x": second, "y": 1, "name": "b"}]
    [batch] = DataLoader(samples, batch_size=2)
    show("x: tensors (2,) stacked to (2, 2)", batch["x"], [[1, 2], [3, 4]])
    show("y: integers become int64", batch["y"].dtype, torch.int64)
    show("name: text stays a list", batch["name"], ["a", "b"])
    # Python floats become float64, which a float32 model refuses: make samples tensors.
    numbers: Any = [0.5, 1.5]
    [floats] = DataLoader(numbers, batch_size=2)
    show("Python floats become", floats.dtype, torch.float64)
    show("batch_size=None: samples as they are", list(DataLoader(numbers, batch_size=None)), [0.5, 1.5])


@section("loader.shuffle", "D2")
def loader_shuffle() -> None:
    """shuffle=True draws a new order every epoch; a generator makes the sequence of orders repeatable."""
    dataset = Squares(20)
    loader = DataLoader(dataset, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))
    epochs = [_order(loader), _order(loader)]
    show("shuffled: the order changes", epochs[0] != list(range(20)), True)
    show("every sample is still there once", sorted(epochs[0]) == list(range(20)), True)
    show("the second epoch has another order", epochs[0] != epochs[1], True)
    again = DataLoader(dataset, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))
    show("a generator with the same seed: same epochs", [_order(again), _order(again)] == epochs, True)
    # Without a generator the loader draws from the global one, even unshuffled, and so changes all later draws.
    before = torch.get_rng_state()
    _order(again)
    show("a generator leaves the global state alone", torch.equal(before, torch.get_rng_state()), True)
    _order(DataLoader(dataset))
    show("does a loader without one, unshuffled?", torch.equal(before, torch.get_rng_state()), False)


def _order(loader: DataLoader) -> list[int]:
    return [int(x) for inputs, _ in loader for x in inputs]


class WhoLoads(Dataset):
    """Samples that tell where they were loaded: index, number of the worker (-1: main process), process id."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        worker = get_worker_info()
        return index, -1 if worker is None else worker.id, os.getpid()


@section("loader.num_workers", "D2")
def loader_num_workers() -> None:
    """num_workers processes load batches in turn and ahead of the training loop; the order of batches stays."""
    indices, workers, processes = _who_loads(num_workers=0)
    show("0 workers: loaded in the main process", (set(workers), set(processes)), ({-1}, {os.getpid()}))
    indices, workers, processes = _who_loads(num_workers=2)
    show("2 workers: the order of the samples", indices, [0, 1, 2, 3, 4, 5, 6, 7])
    show("who loaded each, in batches of 2", workers, [0, 0, 1, 1, 0, 0, 1, 1])
    show("processes, this one not among them", (len(set(processes)), os.getpid() in processes), (2, False))


@section("loader.persistent_workers", "D2")
def loader_persistent_workers() -> None:
    """Workers end with the epoch and are started anew for the next one, unless persistent_workers keeps them."""
    show("2 workers, 2 epochs: processes started", len(set(_who_loads(2, epochs=2)[2])), 4)
    kept = _who_loads(2, epochs=2, persistent_workers=True)
    show("with persistent_workers=True", len(set(kept[2])), 2)
    # Their copy of the dataset lives as long: what the main process changes in it afterwards they do not see.
    keeps_none = partial(DataLoader, WhoLoads(8), persistent_workers=True)
    show_error("without workers to keep", keeps_none, ValueError, "needs num_workers > 0")


def _who_loads(num_workers: int, epochs: int = 1, **kwargs: Any) -> list[list[int]]:
    """Return three lists, of all samples' indices, worker numbers and process ids."""
    loader = DataLoader(WhoLoads(8), batch_size=2, num_workers=num_workers, **kwargs)
    batches = [torch.stack(batch) for _ in range(epochs) for batch in loader]  # each (3, 2)
    return torch.cat(batches, dim=1).tolist()


class Draws(Dataset):
    """Samples that are nothing but a random number: what an augmentation would draw."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(())


@section("loader.worker_seeds", "D2")
def loader_worker_seeds() -> None:
    """Each worker draws from its own seed, taken from the generator: repeatable for the same number of workers only."""
    two, again, none = _draws(2), _draws(2), _draws(0)
    show("2 workers: different numbers of 8", len(two.unique()), 8)
    show("same generator seed, 2 workers: equal", torch.equal(two, again), True)
    # SeededPaths (transforms.seeded, below) makes augmentation independent of the number of workers.
    show("0 workers instead of 2: equal", torch.equal(two, none), False)


def _draws(num_workers: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(7)  # without workers the samples draw from the global generator
    return torch.cat(list(DataLoader(Draws(), batch_size=2, num_workers=num_workers, generator=generator)))


@section("loader.start_methods", "D2")
def loader_start_methods() -> None:
    """fork copies the process; spawn (macOS, Windows) starts one that imports the script and unpickles the dataset."""
    for method in ("fork", "spawn"):
        if method in multiprocessing.get_all_start_methods():
            loader = DataLoader(Squares(4, halve), batch_size=2, num_workers=1, multiprocessing_context=method)
            show(f"inputs from a worker started by {method}", torch.cat([x for x, _ in loader]), [0, 0.5, 1, 1.5])
    # That is why a script needs `if __name__ == "__main__":`, and a dataset top-level functions in place of lambdas.
    show_error("a lambda in a dataset", lambda: ForkingPickler.dumps(lambda x: x), Exception, "local object")


@section("loader.pin_memory", "D2")
def loader_pin_memory() -> None:
    """pin_memory puts batches into page-locked memory, from which a GPU copies while the CPU goes on."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    pins = accelerator is not None and accelerator.type != "mps"  # which shares the CPU's memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without an accelerator the loader warns, and does nothing
        pinned, _ = next(iter(DataLoader(Squares(4), batch_size=4, pin_memory=True)))
    plain, _ = next(iter(DataLoader(Squares(4), batch_size=4)))
    show("pinned by default", plain.is_pinned(), False)
    show(f"pinned with pin_memory=True ({accelerator or 'CPU only'})", pinned.is_pinned(), pins)
    show("the values are the same", pinned, [0, 1, 2, 3])


# -------------------------------------------------------------------------------------------------------------- collate


@section("collate.padding", "D3")
def collate_padding() -> None:
    """Sequences of different length cannot be stacked: a collate_fn pads them, and hands on their lengths."""
    samples: Any = [(torch.tensor([1.0, 2.0, 3.0]), 0), (torch.tensor([4.0]), 1), (torch.tensor([5.0, 6.0]), 0)]
    show_error("the default collate", lambda: next(iter(DataLoader(samples, batch_size=3))), RuntimeError, "equal size")
    [((padded, lengths), targets)] = DataLoader(samples, batch_size=3, collate_fn=pad_collate)
    show("padded (B, longest)", padded, [[1, 2, 3], [4, 0, 0], [5, 6, 0]])
    show("lengths", lengths, [3, 1, 2])
    show("targets", targets, [0, 1, 0])
    show("the same by PyTorch's pad_sequence", padded, pad_sequence([x for x, _ in samples], batch_first=True))
    [((first, _), _), ((second, _), _)] = DataLoader(samples, batch_size=2, collate_fn=pad_collate)
    show("shapes by 2: as long as each batch needs", (first.shape, second.shape), ((2, 3), (1, 2)))
    (filled, _), _ = partial(pad_collate, padding_value=-1.0)(samples)  # a partial can be pickled, a lambda cannot
    show("with padding_value=-1", filled[1], [4, -1, -1])
    (vectors, _), _ = pad_collate([(torch.ones(2, 5), 0), (torch.ones(7, 5), 1)])
    show("sequences of vectors (2, 5) and (7, 5)", vectors.shape, (2, 7, 5))


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Return whether there are as many tensors in both, and all are equal."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


@section("collate.mask", "D3")
def collate_mask() -> None:
    """Padding must not count: the lengths give the mask that leaves it out."""
    (padded, lengths), _ = pad_collate([(torch.tensor([1.0, 2.0, 3.0]), 0), (torch.tensor([4.0]), 1)])
    mask = torch.arange(padded.shape[1]) < lengths[:, None]  # (B, longest)
    show("mask", mask, [[True, True, True], [True, False, False]])
    show("mean over the padded rows: the 2nd is wrong", padded.mean(dim=1), [2, 4 / 3])
    show("mean over what is there", (padded * mask).sum(dim=1) / lengths, [2, 4])
    packed = pack_padded_sequence(padded, lengths, batch_first=True)  # what an LSTM or GRU takes
    show("packed: step by step, no padding", packed.data, [1, 4, 2, 3])


# ---------------------------------------------------------------------------------------------------------------- split


@section("split.random", "D4")
def split_random() -> None:
    """random_split cuts a dataset into random parts that share no sample; a generator makes them repeatable."""
    dataset = Squares(100)
    parts = random_split(dataset, [0.8, 0.1, 0.1], generator=torch.Generator().manual_seed(42))
    show("80/10/10 of 100", [len(part) for part in parts], [80, 10, 10])
    show("each sample in exactly one part", sorted(i for part in parts for i in part.indices) == list(range(100)), True)
    again = random_split(dataset, [0.8, 0.1, 0.1], generator=torch.Generator().manual_seed(42))
    show("same seed: same parts", [a.indices == b.indices for a, b in zip(parts, again, strict=True)], [True] * 3)
    other = random_split(dataset, [0.8, 0.1, 0.1], generator=torch.Generator().manual_seed(43))
    show("another seed: same test part", parts[2].indices == other[2].indices, False)
    show("split_dataset(dataset) is this split", split_dataset(dataset)[2].indices == parts[2].indices, True)
    # Fractions are rounded down; what is left over goes to the parts in turn, beginning with the first.
    show("80/10/10 of 25", [len(part) for part in split_dataset(Squares(25))], [20 + 1, 2, 2])
    show_error("lengths that do not add up", lambda: random_split(dataset, [80, 10]), ValueError, "Sum of input")


@section("split.stratified", "D4")
def split_stratified() -> None:
    """A stratified split keeps the share of every class; a plain one may leave a rare class out of the test part."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    dataset = TensorDataset(torch.arange(100), labels)
    parts = split_dataset(dataset, (0.8, 0.1, 0.1), labels=labels)
    show("classes in the parts: 80/10/10 of 90 and 10", [_classes(part) for part in parts], [[72, 8], [9, 1], [9, 1]])
    show("each sample in exactly one part", sorted(i for part in parts for i in part.indices) == list(range(100)), True)
    plain = [_classes(split_dataset(dataset, seed=seed)[2])[1] for seed in range(50)]
    show("50 plain splits: always 1 in the test part?", set(plain) == {1}, False)
    print(f"    rare samples in the test part of a plain split: {min(plain)} to {max(plain)}")


def _classes(part: Subset) -> list[int]:
    return torch.stack([part[i][1] for i in range(len(part))]).bincount(minlength=2).tolist()


@section("split.transforms", "D4")
def split_transforms() -> None:
    """The parts of a split share one dataset and so one transform: validation needs a second dataset, same indices."""
    train, validation = random_split(Squares(10, transform=halve), [8, 2])
    index = validation.indices[0]
    show("validation sample: halved, as training's are", validation[0][0], index / 2)
    plain = Subset(Squares(10), validation.indices)
    show("same index of a dataset without transform", plain[0][0], index)
    show("samples in common with training", len(set(train.indices) & set(plain.indices)), 0)


# --------------------------------------------------------------------------------------------------------------- images


def output_folder() -> Path:
    """Return the folder for images, which the summary names: --output, or a temporary one, which is not removed."""
    if options.output is None:
        options.output = Path(tempfile.mkdtemp(prefix="data_demo-"))
    section.notes[:] = [f"images are in {options.output}"]
    return options.output


def photo(shape: str, number: int) -> Tensor:
    """A yellow circle or square on a coloured ground, uint8 (3, 48, 60); the red of its ground is 40 * number."""
    y, x = torch.meshgrid(torch.arange(48), torch.arange(60), indexing="ij")
    image = torch.stack([torch.full_like(x, 40 * number), 4 * x, torch.full_like(x, 120)]).to(torch.uint8)
    distance = torch.hypot(x - 30.0, y - 24.0) if shape == "circle" else torch.maximum((x - 30).abs(), (y - 24).abs())
    image[:, distance <= 15] = torch.tensor([255, 200, 0], dtype=torch.uint8)[:, None]
    return image


def write_photos() -> Path:
    """Write three squares and three circles as PNG files, one folder per class, and return their folder."""
    from torchvision.transforms.v2.functional import to_pil_image

    root = output_folder() / "photos"
    for shape in ("square", "circle"):
        (root / shape).mkdir(parents=True, exist_ok=True)
        for number in range(3):
            to_pil_image(photo(shape, number)).save(root / shape / f"{number}.png")
    return root


class ImagePaths(Dataset):
    """Images from a list of paths with a list of labels: for any layout of folders, or a table of file names."""

    def __init__(
        self, paths: Sequence[Path], labels: Sequence[int], transform: Callable[[Any], Any] | None = None
    ) -> None:
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = read_image(self.paths[index], "RGB")  # whatever the file holds: grey, a palette, transparency
        return (image if self.transform is None else self.transform(image)), self.labels[index]


@section("images.folder", "D5")
def images_folder() -> None:
    """ImageFolder takes one folder per class: the classes are the folders' names in alphabetical order."""
    from torchvision import datasets
    from torchvision.transforms import v2

    root = write_photos()
    print(f"    written: {root}")
    folder = datasets.ImageFolder(root)
    show("classes: sorted, though squares came first", folder.classes, ["circle", "square"])
    show("their numbers", list(folder.class_to_idx.items()), [("circle", 0), ("square", 1)])
    show("labels", folder.targets, [0, 0, 0, 1, 1, 1])
    image, label = folder[4]
    show("folder[4] is square/1.png", (Path(folder.samples[4][0]).name, label), ("1.png", 1))
    # PIL says (width, height), a tensor (channels, height, width).
    show("PIL size and mode", (image.size, image.mode), ((60, 48), "RGB"))
    pixels = datasets.ImageFolder(root, transform=v2.ToImage())[4][0]
    show("as a tensor", (pixels.shape, pixels.dtype), ((3, 48, 60), torch.uint8))
    show("its first pixel", pixels[:, 0, 0], [40 * 1, 4 * 0, 120])
    show("PNG loses nothing: all pixels as drawn", torch.equal(pixels, photo("square", 1)), True)


@section("images.paths", "D5")
def images_paths() -> None:
    """A dataset over a list of paths opens a file only when its sample is asked for, so millions fit."""
    from torchvision import datasets
    from torchvision.transforms import v2

    root = write_photos()
    paths = sorted(root.glob("*/*.png"))  # sorted: the order of a folder differs from machine to machine
    labels = [["circle", "square"].index(path.parent.name) for path in paths]
    dataset = ImagePaths(paths, labels, transform=v2.ToImage())
    show("labels from the paths", labels, [0, 0, 0, 1, 1, 1])
    folder = datasets.ImageFolder(root, transform=v2.ToImage())
    same = [torch.equal(dataset[i][0], folder[i][0]) and dataset[i][1] == folder[i][1] for i in range(6)]
    show("same samples as ImageFolder", same, [True] * 6)
    images, targets = next(iter(DataLoader(dataset, batch_size=6)))
    show("one batch", (images.shape, targets.tolist()), ((6, 3, 48, 60), [0, 0, 0, 1, 1, 1]))


def write_damaged() -> Path:
    """Write a folder of one class: a whole image, one cut short, a text file that calls itself an image."""
    whole = (write_photos() / "circle" / "0.png").read_bytes()
    folder = output_folder() / "damaged" / "circle"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "0.png").write_bytes(whole)
    (folder / "1.png").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "2.png").write_text("no image")
    return folder.parent


@section("images.bad", "D5")
def images_bad() -> None:
    """One damaged file stops an epoch: the error must name it, and better still it is found before."""
    from torchvision import datasets
    from torchvision.transforms import v2

    root = write_damaged()
    folder = datasets.ImageFolder(root)
    show("the folder looks whole", len(folder), 3)
    show_error("ImageFolder: which file?", lambda: folder[1], OSError, "truncated")
    # PIL speaks of the content only: among a million files that does not help, so a dataset should add the name.
    show("does the message name 1.png?", "1.png" in _failure(lambda: folder[1]), False)
    paths = sorted(root.glob("*/*.png"))
    dataset = ImagePaths(paths, [0, 0, 0], transform=v2.ToImage())
    show_error("ImagePaths names it", lambda: dataset[1], DataError, f"{paths[1]}: not a readable image")
    in_worker = _failure(lambda: list(DataLoader(dataset, num_workers=1)))  # begins with the worker's traceback
    said = f"torchbasics.mnist.DataError: {_failure(lambda: dataset[1])}"
    show("from a worker: the last line", in_worker.splitlines()[-1], said)
    show("all bad files, found before training", [path.name for path in unreadable(paths)], ["1.png", "2.png"])
    empty = output_folder() / "empty"
    (empty / "cat").mkdir(parents=True, exist_ok=True)
    show_error("a class without images", lambda: datasets.ImageFolder(empty), FileNotFoundError, "cat")


def _failure(call: Callable[[], Any]) -> str:
    """Return the message of the error that the call raises."""
    try:
        call()
    except (OSError, ValueError) as error:
        error.__traceback__ = None  # it holds the loader, whose worker would wait for the next garbage collection
        return str(error).strip()
    return "no error"


def unreadable(paths: Sequence[Path]) -> list[Path]:
    """Return those of the files that cannot be read as images; reads all of every file."""
    bad = []
    for path in paths:
        try:
            read_image(path)
        except DataError:
            bad.append(path)
    return bad


# ----------------------------------------------------------------------------------------------------------- transforms


@section("transforms.to_tensor", "D6")
def transforms_to_tensor() -> None:
    """ToImage makes a picture a uint8 tensor, ToDtype(scale=True) brings 0..255 to 0..1: together the new ToTensor."""
    from torchvision.transforms import ToTensor, v2

    picture = v2.functional.to_pil_image(photo("circle", 1))
    image = v2.ToImage()(picture)
    show("ToImage: a kind of tensor", (type(image).__name__, isinstance(image, Tensor)), ("Image", True))
    show("its dtype", image.dtype, torch.uint8)
    x = v2.ToDtype(torch.float32, scale=True)(image)
    show("scaled: first pixel", x[:, 0, 0], [40 / 255, 0, 120 / 255])
    # scale=False, the default, only changes the dtype: the network would get inputs 255 times too large.
    show("not scaled", v2.ToDtype(torch.float32)(image)[:, 0, 0], [40, 0, 120])
    show("difference from the old ToTensor", (x - ToTensor()(picture)).abs().max(), 0)


@section("transforms.normalize", "D6")
def transforms_normalize() -> None:
    """Normalize subtracts a mean and divides by a standard deviation, channel by channel."""
    from torchvision.transforms import v2

    x = torch.tensor([0.5, 0.25, 1.0]).view(3, 1, 1)
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.5)
    z = v2.Normalize(mean, std)(x)
    show("(x - mean) / std", z.flatten(), [0, -1, 1])
    show("undone, to look at: z * std + mean", z.flatten() * torch.tensor(std) + torch.tensor(mean), [0.5, 0.25, 1.0])
    whole = torch.rand(100, 3, 8, 8)
    own = v2.Normalize(whole.mean((0, 2, 3)).tolist(), whole.std((0, 2, 3), correction=0).tolist())(whole)
    show("by its own constants: means", own.mean((0, 2, 3)), [0, 0, 0])
    show("and standard deviations", own.std((0, 2, 3), correction=0), [1, 1, 1])
    show_error("on uint8", lambda: v2.Normalize(mean, std)(photo("circle", 0)), TypeError, "float tensor")


@section("transforms.crop", "D6")
def transforms_crop() -> None:
    """CenterCrop takes the middle, RandomCrop any window; padding first lets the window reach over the edge."""
    from torchvision.transforms import v2

    image = torch.arange(36.0).view(1, 6, 6)  # every value tells its place: 6 * row + column
    show("CenterCrop(2) of 6 x 6", v2.CenterCrop(2)(image)[0], [[14, 15], [20, 21]])
    crops = [v2.RandomCrop(3)(image) for _ in range(400)]
    corners = [divmod(int(crop[0, 0, 0]), 6) for crop in crops]  # (row, column) of the window's first pixel
    windows = [torch.equal(crop, image[:, r : r + 3, c : c + 3]) for crop, (r, c) in zip(crops, corners, strict=True)]
    show("400 RandomCrop(3): all are windows", all(windows), True)
    show("places reached, of (6 - 3 + 1) squared", len(set(corners)), 16)
    padded = [v2.RandomCrop(6, padding=2)(image + 1) for _ in range(400)]
    show("RandomCrop(6, padding=2): shape", padded[0].shape, (1, 6, 6))
    left = [int(crop.count_nonzero()) for crop in padded]  # a shift by 2 leaves 4 x 4 of the image, no shift all of it
    show("fewest and most pixels of the image left", (min(left), max(left)), (4 * 4, 6 * 6))
    show_error("a crop larger than the image", lambda: v2.RandomCrop(7)(image), ValueError, "Required crop size")


@section("transforms.resized_crop", "D6")
def transforms_resized_crop() -> None:
    """RandomResizedCrop cuts 8% to 100% of the area at a ratio of 3/4 to 4/3, and scales it to the size asked for."""
    from torchvision.transforms import v2

    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    crop = v2.RandomResizedCrop(32, antialias=False)  # for exact coordinates; pictures look better with antialias=True
    crops = torch.stack([crop(torch.stack([x, y])) for _ in range(400)])  # (400, 2, 32, 32)
    show("every result has the size", crops.shape, (400, 2, 32, 32))
    # In a picture of coordinates the step between neighbours tells how many pixels were cut: 32 steps make the width.
    width = 32 * (crops[:, 0, 16, 17] - crops[:, 0, 16, 16])
    height = 32 * (crops[:, 1, 17, 16] - crops[:, 1, 16, 16])
    share = width * height / 64**2
    # Width and height were rounded to whole pixels, so each may be half a pixel off.
    wide, tall = (width + 0.51) / (height - 0.51) > 3 / 4, (height + 0.51) / (width - 0.51) > 3 / 4
    show("smallest share of the area (about 0.08)", share.min(), 0.08, atol=0.04)
    show("largest share (near 1)", share.max(), 1.0, atol=0.15)
    show("all ratios from 3/4 to 4/3, to a pixel", bool((wide & tall).all()), True)
    show("places differ: distinct first pixels > 100", len(crops[:, :, 0, 0].unique(dim=0)) > 100, True)


@section("transforms.flip", "D6")
def transforms_flip() -> None:
    """Flips mirror the image and keep the label: right for most photographs, wrong for digits and letters."""
    from torchvision.transforms import v2

    image = torch.tensor([[[1, 2], [3, 4]]])
    mirror, turn_over, flip = v2.RandomHorizontalFlip(p=1), v2.RandomVerticalFlip(p=1), v2.RandomHorizontalFlip()
    show("RandomHorizontalFlip(p=1): left to right", mirror(image)[0], [[2, 1], [4, 3]])
    show("RandomVerticalFlip(p=1): upside down", turn_over(image)[0], [[3, 4], [1, 2]])
    flipped = [int(flip(image)[0, 0, 0]) == 2 for _ in range(2000)]
    show("share flipped of 2,000, p=0.5 by default", sum(flipped) / 2000, 0.5, atol=0.06)
    # A mirrored digit is another one, or none that anybody writes, and only few, such as 0 and 8, stay what they are.
    two, five, eight = _glyph("111 001 111 100 111"), _glyph("111 100 111 001 111"), _glyph("111 101 111 101 111")
    show("a mirrored 2 of seven segments is a 5", torch.equal(mirror(two), five), True)
    show("a mirrored 8 is an 8", torch.equal(mirror(eight), eight), True)
    b, d, p = _glyph("100 100 111 101 111"), _glyph("001 001 111 101 111"), _glyph("111 101 111 100 100")
    show("a mirrored b is a d, upside down a p", torch.equal(mirror(b), d) and torch.equal(turn_over(b), p), True)


def _glyph(rows: str) -> Tensor:
    """Return a digit or letter drawn in rows of zeros and ones, uint8 (1, H, W)."""
    return torch.tensor([[[int(pixel) for pixel in row] for row in rows.split()]], dtype=torch.uint8)


@section("transforms.rotation", "D6")
def transforms_rotation() -> None:
    """RandomRotation(d) turns by an angle between -d and d, counter-clockwise if positive, and fills with black."""
    from torchvision.transforms import InterpolationMode, v2

    image = torch.arange(9.0).view(1, 3, 3)
    quarter = v2.RandomRotation((90, 90))  # a pair fixes the range: always 90 degrees
    show("by 90 degrees: torch.rot90", quarter(image)[0], torch.rot90(image[0]).tolist())
    show("2 x 4 keeps its shape, and loses its ends", quarter(torch.ones(1, 2, 4)).shape, (1, 2, 4))
    show("expand=True gives 4 x 2", v2.RandomRotation((90, 90), expand=True)(torch.ones(1, 2, 4)).shape, (1, 4, 2))
    show("a white image by 45: a corner", v2.RandomRotation((45, 45))(torch.ones(1, 9, 9))[0, 0, 0], 0)
    dot = torch.zeros(1, 65, 65)
    dot[0, 31:34, 59:62] = 1  # 28 pixels to the right of the centre
    turn = v2.RandomRotation(10, interpolation=InterpolationMode.BILINEAR)  # the default, nearest, makes jagged edges
    angles = torch.tensor([_angle(turn(dot)[0]) for _ in range(300)])
    show("300 draws of RandomRotation(10): smallest", angles.min(), -10, atol=1)
    show("and largest angle of a dot", angles.max(), 10, atol=1)


def _angle(image: Tensor) -> float:
    """Return the direction, in degrees, in which the brightness of a (65, 65) image lies from its centre."""
    offsets = torch.arange(65.0) - 32
    return math.degrees(math.atan2(-float(image.sum(1) @ offsets), float(image.sum(0) @ offsets)))


@section("transforms.color", "D6")
def transforms_color() -> None:
    """ColorJitter changes brightness, contrast, saturation and hue, each by a random factor, in random order."""
    from torchvision.transforms import v2

    x = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 0.0]]])  # (3, 1, 2): a red and a green pixel
    grey = (0.2989, 0.5870)  # brightness of red and of green to the eye; blue's is 0.1140
    show("brightness x 0.5", v2.ColorJitter(brightness=(0.5, 0.5))(x), (x / 2).tolist())
    show("contrast x 0: the mean grey", v2.ColorJitter(contrast=(0, 0))(x)[0], [[sum(grey) / 2] * 2], atol=1e-4)
    show("saturation x 0: each pixel's grey", v2.ColorJitter(saturation=(0, 0))(x)[0], [list(grey)], atol=1e-4)
    half_turn = v2.ColorJitter(hue=(0.5, 0.5))(x)
    show("hue + 0.5: red becomes cyan", half_turn[:, 0, 0], [0, 1, 1])
    show("and green becomes magenta", half_turn[:, 0, 1], [1, 0, 1])
    jitter = v2.ColorJitter(brightness=0.2)  # one number b means factors from 1 - b to 1 + b
    factors = torch.stack([jitter(torch.full((3, 1, 1), 0.5))[0, 0, 0] / 0.5 for _ in range(500)])
    show("500 draws, brightness=0.2: smallest factor", factors.min(), 0.8, atol=0.02)
    show("largest", factors.max(), 1.2, atol=0.02)


@section("transforms.blur", "D6")
def transforms_blur() -> None:
    """GaussianBlur weighs the neighbours at distance d by exp(-d^2 / (2 sigma^2)), scaled to the sum 1."""
    from torchvision.transforms import v2

    point = torch.zeros(1, 9, 9)
    point[0, 4, 4] = 1
    blurred = v2.GaussianBlur(kernel_size=5, sigma=1.5)(point)[0]
    weights = torch.tensor([math.exp(-(d**2) / (2 * 1.5**2)) for d in (-2, -1, 0, 1, 2)])
    weights /= weights.sum()
    show("a point, blurred: its middle row", blurred[4, 2:7], (weights[2] * weights).tolist())
    show("5 x 5 - outer product of the weights", (blurred[2:7, 2:7] - torch.outer(weights, weights)).abs().max(), 0)
    show("brightness is kept", blurred.sum(), 1)
    random = v2.GaussianBlur(5, sigma=(0.1, 2.0))  # a pair is a range from which each call draws
    peaks = torch.stack([random(point).max() for _ in range(100)])
    show("sigma from 0.1 to 2: distinct blurs of 100", len(peaks.unique()) > 50, True)


@section("transforms.pipelines", "D6")
def transforms_pipelines() -> None:
    """Training augments, evaluation does not: the same sizes and constants, but nothing random."""
    from torchvision.transforms import v2

    train, evaluation = get_transforms(train=True), get_transforms(train=False)
    print(f"    training: {train}\n    evaluation: {evaluation}")
    image = photo("circle", 2)
    picture = v2.functional.to_pil_image(image)
    show("training: shape and dtype", (train(picture).shape, train(picture).dtype), ((3, 224, 224), torch.float32))
    show("training twice: equal", torch.equal(train(picture), train(picture)), False)
    result = evaluation(picture)
    show("evaluation: shape", result.shape, (3, 224, 224))
    show("evaluation twice: equal", torch.equal(result, evaluation(picture)), True)
    show("PIL image or tensor: equal", torch.equal(result, evaluation(image)), True)
    expected = _evaluate_by_hand(image)
    # uint8 images are resized in whole numbers, in two passes: up to a step of 1/255 off, divided by the smallest std
    show("evaluation by hand: largest difference", (result - expected).abs().max(), 0, atol=1.02 / 255 / 0.224)


def _evaluate_by_hand(image: Tensor) -> Tensor:
    """Return the evaluation pipeline for a (3, 48, 60) image: shorter side to 256, middle 224, scale, normalise."""
    resized = F.interpolate(image[None].float(), (256, 320), mode="bilinear", antialias=True)[0]  # 60 * 256 / 48 = 320
    middle = resized[:, 16 : 16 + 224, 48 : 48 + 224]  # (256 - 224) / 2 = 16, (320 - 224) / 2 = 48
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (middle / 255 - mean[:, None, None]) / std[:, None, None]


class SeededPaths(ImagePaths):
    """Images whose transform draws from (seed, epoch, index): the same in any process, after any other draws."""

    seed = 3
    epoch = 0

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with torch.random.fork_rng(devices=[]):  # the transforms of v2 draw from torch's global generator
            torch.manual_seed(1_000_003 * (1_000_003 * self.seed + self.epoch) + index)
            return super().__getitem__(index)


@section("transforms.seeded", "D5", "D6")
def transforms_seeded() -> None:
    """Augmentation that is drawn from (seed, epoch, sample) does not depend on the number of workers."""
    paths = sorted(write_photos().glob("*/*.png"))
    dataset = SeededPaths(paths, [0, 0, 0, 1, 1, 1], get_transforms(train=True, size=32))
    before = dataset[0][0]
    show("the same sample twice: equal", torch.equal(before, dataset[0][0]), True)
    alone, helped = (list(DataLoader(dataset, batch_size=4, num_workers=workers)) for workers in (0, 1))
    show("0 and 1 workers: equal inputs", _equal([x for x, _ in alone], [x for x, _ in helped]), True)
    dataset.epoch = 1
    show("in another epoch: equal", torch.equal(before, dataset[0][0]), False)


@section("transforms.grid", "D6")
def transforms_grid() -> None:
    """Look at what the network will see: one row for each transform, six draws of it."""
    from torchvision.transforms import v2
    from torchvision.utils import make_grid

    image = photo("square", 3)
    image[:, 2:10, 2:10] = 255  # a mark in one corner, so that flips and turns can be seen
    steps = [
        v2.RandomResizedCrop((48, 60), antialias=True),
        v2.RandomCrop((48, 60), padding=12),
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        v2.RandomRotation(30),
        v2.ColorJitter(0.5, 0.5, 0.5, 0.2),
        v2.GaussianBlur(9, sigma=(0.1, 4.0)),
    ]
    grid = make_grid([step(image) for step in steps for _ in range(6)], nrow=6, padding=2)
    show("rows of 48 + 2 pixels, columns of 60 + 2", grid.shape, (3, 7 * (48 + 2) + 2, 6 * (60 + 2) + 2))
    show("transforms.png holds these pixels", torch.equal(_save(grid, "transforms.png"), grid), True)
    pipeline = get_transforms(train=True)
    batch = torch.stack([pipeline(image) for _ in range(8)])  # (8, 3, 224, 224), normalised
    std, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
    visible = (batch * std[:, None, None] + mean[:, None, None]) * 255  # undo the normalisation, or it looks odd
    show("undone, values lie from 0 to 255", bool(((visible > -0.01) & (visible < 255.01)).all()), True)
    grid = make_grid(visible.round().clamp(0, 255).to(torch.uint8), nrow=4)
    show("pipeline.png holds these pixels", torch.equal(_save(grid, "pipeline.png"), grid), True)


def _save(image: Tensor, name: str) -> Tensor:
    """Write a uint8 (3, H, W) image as PNG, say where, and return what the file holds."""
    from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

    path = output_folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(image).save(path)
    print(f"    written: {path}")
    return pil_to_tensor(read_image(path))


# -------------------------------------------------------------------------------------------------------------- builtin


@section("builtin.fake_data", "D7")
def builtin_fake_data() -> None:
    """FakeData makes random pictures: a stand-in with the right shapes while the real data is not here yet."""
    from torchvision import datasets
    from torchvision.transforms import v2

    fake = datasets.FakeData(size=6, image_size=(3, 32, 48), num_classes=10, transform=v2.ToImage())
    image, label = fake[5]
    show("len(fake)", len(fake), 6)
    show("an image", (image.shape, image.dtype), ((3, 32, 48), torch.uint8))
    show("the same sample twice: equal", torch.equal(image, fake[5][0]), True)
    show("two samples: equal", torch.equal(image, fake[4][0]), False)
    generator = torch.Generator().manual_seed(5)  # the index is the seed: first the image is drawn, then the label
    torch.randn(3, 32, 48, generator=generator)
    show("label of sample 5", label, int(torch.randint(10, (1,), generator=generator)))
    images, labels = next(iter(DataLoader(fake, batch_size=4)))
    show("a batch", (images.shape, labels.shape), ((4, 3, 32, 48), (4,)))


@section("builtin.constants", "D7")
def builtin_constants() -> None:
    """Normalisation constants are the mean and standard deviation of all training pixels, on the scale 0 to 1."""
    black_and_white = torch.tensor([0, 0, 0, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    mean, std = channel_statistics(black_and_white)
    show("one white pixel of four: mean", mean, (1 / 4,))
    show("standard deviation sqrt(p (1 - p))", std, (math.sqrt(1 / 4 * 3 / 4),))
    images, _ = draw_digits(300)  # uint8 (300, 1, 28, 28)
    mean, std = channel_statistics(images)
    show("300 drawn digits: mean, and in float64", mean, _two_sums(images)[0])
    show("standard deviation, and in float64", std, _two_sums(images)[1])
    # The mean of the images' means is right (all have the same size), the mean of their deviations is not.
    each = images.double() / 255
    show("mean of the images' means", float(each.mean((1, 2, 3)).mean()), mean[0])
    wrong = float(each.std((1, 2, 3)).mean())
    show("mean of the images' deviations: right?", math.isclose(wrong, std[0], rel_tol=1e-3), False)


def _two_sums(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel from the sums of x and x^2, as sqrt(E[x^2] - E[x]^2)."""
    total, squares = 0.0, 0.0
    for part in images.split(2000):  # never the whole data set in float64
        x = part.double() / 255
        total, squares = total + x.sum((0, 2, 3)), squares + (x * x).sum((0, 2, 3))
    count = images.numel() // images.shape[1]
    mean, square = torch.as_tensor(total) / count, torch.as_tensor(squares) / count
    return tuple(mean.tolist()), tuple((square - mean**2).sqrt().tolist())


@section("builtin.mnist", "D7")
def builtin_mnist() -> None:
    """MNIST: 60,000 handwritten digits for training and 10,000 for the test; mean 0.1307, deviation 0.3081."""
    _show_idx("mnist")


@section("builtin.fashion_mnist", "D7")
def builtin_fashion_mnist() -> None:
    """Fashion-MNIST: pieces of clothing in the format of MNIST, and harder; mean 0.2860, deviation 0.3530."""
    _show_idx("fashion-mnist")


@section("builtin.kmnist", "D7")
def builtin_kmnist() -> None:
    """KMNIST: cursive Japanese characters in the format of MNIST; its constants are computed."""
    _show_idx("kmnist")


def _show_idx(name: str) -> None:
    """Show a data set in the format of MNIST, or say why not."""
    from torchvision import datasets

    files = [path for train in (True, False) for path in mnist_files(name, options.data_dir, train)]
    _need(FOLDERS[name], *files)
    # torchbasics verifies the files and names a damaged one; torchvision would take a truncated one.
    verified = load_images(name, options.data_dir, train=True, download=False)
    train, test = (getattr(datasets, FOLDERS[name])(options.data_dir, train=part) for part in (True, False))
    show("images for training and for the test", (len(train), len(test)), (60_000, 10_000))
    image, label = train[0]
    show("a sample: size, mode, label", (image.size, image.mode, label), ((28, 28), "L", int(verified.targets[0])))
    show("all images as torchbasics reads them", torch.equal(train.data, verified.inputs[:, 0]), True)
    show("all labels", torch.equal(train.targets, verified.targets), True)
    _show_constants(name, verified.inputs)


@section("builtin.cifar10", "D7")
def builtin_cifar10() -> None:
    """CIFAR-10: 60,000 colour pictures of ten classes, 32 x 32, with constants for each channel."""
    from torchvision import datasets

    folder = options.data_dir / datasets.CIFAR10.base_folder
    _need("CIFAR10", folder)
    train, test = (datasets.CIFAR10(options.data_dir, train=part) for part in (True, False))
    show("images for training and for the test", (len(train), len(test)), (50_000, 10_000))
    show("a sample: size, mode", (train[0][0].size, train[0][0].mode), ((32, 32), "RGB"))
    show("pictures of each class", torch.tensor(train.targets).bincount(), [5_000] * 10)
    _show_constants("cifar-10", torch.from_numpy(train.data).permute(0, 3, 1, 2))  # stored as (N, H, W, C)


def _show_constants(name: str, images: Tensor) -> None:
    mean, std = channel_statistics(images)
    by_hand = _two_sums(images)
    show("mean, and from the sum of x", mean, by_hand[0])
    show("deviation, and from the sum of x^2", std, by_hand[1])
    if name in PUBLISHED:
        show("mean to 4 digits, and as published", [round(m, 4) for m in mean], PUBLISHED[name][0])
        show("deviation to 4 digits, and as published", [round(s, 4) for s in std], PUBLISHED[name][1])


def _need(name: str, *paths: Path) -> None:
    """Skip the section, and say how to get torchvision's data set `name`, unless all its paths are there."""
    command = f'python -c "from torchvision.datasets import {name}; {name}({str(options.data_dir)!r}, download=True)"'
    for path in paths:
        if not path.exists():
            skip(f"{path} is not there; get it: {command}, or name the folder that has it with --data-dir")


# ---------------------------------------------------------------------------------------------------------------- speed


def usual_dataset(count: int) -> CustomDataset:
    """MNIST-like random images with the transforms that convert and normalise them one by one."""
    from torchvision.transforms import v2

    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8)
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.1307,), (0.3081,))])
    return CustomDataset(images, torch.randint(0, 10, (count,)), transform)


def tensor_loader(dataset: CustomDataset, batch_size: int, **kwargs: Any) -> TensorLoader:
    images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.labels)
    return TensorLoader(images, labels, batch_size, mean=(0.1307,), std=(0.3081,), **kwargs)


@section("speed.same_samples", "D8")
def speed_same_samples(device: torch.device) -> None:
    """TensorLoader gives the batches of a DataLoader, whole and on the device, for data sets that fit in memory."""
    dataset = usual_dataset(1000)
    fast = tensor_loader(dataset, 128, device=device)
    _show_equal("in order", fast, DataLoader(dataset, 128))
    # Targets 0, 1, 2, ... tell the order in which the samples come.
    numbered = TensorLoader(torch.zeros(1000, 1), torch.arange(1000), 128, shuffle=True, seed=5)
    order, second = (torch.cat([targets for _, targets in numbered]).tolist() for _ in range(2))
    show("shuffled: every sample once", sorted(order) == list(range(1000)) and order != list(range(1000)), True)
    shuffled = tensor_loader(dataset, 128, device=device, shuffle=True, seed=5)
    _show_equal("shuffled", shuffled, DataLoader(dataset, 128, sampler=order))
    show("second epoch: in the same order", second == order, False)


def _show_equal(label: str, fast: TensorLoader, usual: DataLoader) -> None:
    ours, theirs = list(fast), list(usual)
    show(f"{label}: sizes of the batches", [len(y) for _, y in ours], [len(y) for _, y in theirs])
    show(f"{label}: targets equal", _equal([y.cpu() for _, y in ours], [y for _, y in theirs]), True)
    largest = max(float((a.cpu() - b).abs().max()) for (a, _), (b, _) in zip(ours, theirs, strict=True))
    show(f"{label}: largest difference of inputs", largest, 0, atol=2e-6)


@section("speed.resume", "D8")
def speed_resume() -> None:
    """Its order is a function of (seed, epoch), so it goes on in the middle of an epoch where another one stopped."""
    dataset = usual_dataset(100)
    whole = [targets for _, targets in tensor_loader(dataset, 16, shuffle=True, seed=9)]
    first = tensor_loader(dataset, 16, shuffle=True, seed=9)
    batches = iter(first)
    next(batches), next(batches)
    show("position after 2 batches", sorted(first.state_dict().items()), [("batch", 2), ("epoch", 0)])
    second = tensor_loader(dataset, 16, shuffle=True, seed=9)
    second.load_state_dict(first.state_dict())
    rest = [targets for _, targets in second]
    show("batches of the rest, of 7", len(rest), 7 - 2)
    show("equal to the uninterrupted epoch's", _equal(rest, whole[2:]), True)


@section("speed.measured", "D8")
def speed_measured(device: torch.device) -> None:
    """A DataLoader handles samples one by one in Python, a TensorLoader a batch at once: measured, not promised."""
    dataset = usual_dataset(3000)
    loaders: dict[str, Any] = {
        "DataLoader, 0 workers": DataLoader(dataset, 128, shuffle=True),
        "DataLoader, 2 workers": DataLoader(dataset, 128, shuffle=True, num_workers=2, persistent_workers=True),
        f"TensorLoader on {device.type}": tensor_loader(dataset, 128, shuffle=True, device=device),
    }
    rates = {}
    for name, loader in loaders.items():
        samples = sum(len(targets) for _, targets in loader)  # the first epoch also warms up, and starts the workers
        show(f"{name}: samples", samples, 3000)
        rates[name] = 3000 / min(_seconds(loader, device) for _ in range(2))
    slowest = rates["DataLoader, 0 workers"]
    for name, rate in rates.items():
        print(f"    {name:<24} {rate:>12,.0f} samples/s  {rate / slowest:>6.1f} x")


def _seconds(loader: Any, device: torch.device) -> float:
    """Return the time of one epoch whose batches arrive on the device."""
    start = time.perf_counter()
    for inputs, targets in loader:
        inputs.to(device), targets.to(device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


# ----------------------------------------------------------------------------------------------------------------- main


def own_options() -> argparse.ArgumentParser:
    """Return the parser of the options that this script has beside those of every demo."""
    parser = Parser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("folders of this script")
    help_output = "write images here (default: a new temporary folder, which stays)"
    group.add_argument("--output", type=Path, metavar="FOLDER", help=help_output)
    help_data = "where torchvision keeps MNIST and the like; nothing is downloaded (default: ./data)"
    group.add_argument("--data-dir", type=Path, default=Path("data"), metavar="FOLDER", help=help_data)
    return parser


def unwritable(folder: Path) -> str | None:
    """Return why images cannot be written to `folder`, which need not exist yet, or None if they can."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return f"{existing} is not a folder"
    return None if os.access(existing, os.W_OK) else f"{existing} cannot be written to"


def main(argv: list[str] | None = None) -> int:
    own = own_options()
    chosen, _ = own.parse_known_args(argv)
    problem = unwritable(chosen.output) if chosen.output else None
    if problem:
        print(f"error: --output: {problem}; name another folder", file=sys.stderr)
        return 2
    options.output, options.data_dir = chosen.output, chosen.data_dir
    return section.run(argv, parents=[own])


if __name__ == "__main__":
    sys.exit(main())
