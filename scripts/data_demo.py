"""From single samples to batches on the device: lessons that print their code and check what they show.

    python scripts/data_demo.py --data-dir ./data --output ./pictures
    python scripts/data_demo.py --section collate.padding --section split.stratified

--data-dir FOLDER is where MNIST and the like are, or are downloaded to (default: ./data). --output FOLDER is where
pictures are written (default: a temporary folder, which is removed).

Try: in loader.num_workers, change batch_size=2 to batch_size=4. Then each worker loads one batch of four, and the line
that shows who loaded what turns to ✗.
"""

# Lessons are checked by running them. mypy: torch types the attributes of layers as "Tensor | Module".
# mypy: ignore-errors

from __future__ import annotations

import argparse
import inspect
import math
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, get_worker_info, random_split

import torchbasics as tb
from torchbasics.demo import Sections, show, show_error, skip

# torchvision takes seconds to import, and a spawned worker imports this file again: so it is imported where it is used.

section = Sections(__doc__)
folders = argparse.Namespace(data=Path("data"), output=Path())  # set by main()

# Workers of a DataLoader may have to import this file and look for a dataset's class by its name, so these stand here
# and not in the lessons, which print them.


class Squares(Dataset):
    def __init__(self, count: int, transform=None) -> None:
        self.inputs = torch.arange(count, dtype=torch.float32)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.inputs[index]  # raises IndexError past the end
        y = x**2
        return (self.transform(x) if self.transform else x), y


class Stream(IterableDataset):
    def __init__(self, stop: int, split: bool) -> None:
        self.stop, self.split = stop, split

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()  # None in the main process
        if worker is None or not self.split:
            return iter(range(self.stop))
        return iter(range(worker.id, self.stop, worker.num_workers))


class WhoLoads(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[int, int, int, Tensor]:
        worker = get_worker_info()
        number = -1 if worker is None else worker.id
        return index, number, os.getpid(), torch.rand(())


class Slow(Dataset):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> int:
        time.sleep(0.005)  # as for reading and decoding a photograph
        return index


class Seeded(Dataset):
    def __init__(self, images: Tensor, transform, epoch: int = 0) -> None:
        self.images, self.transform, self.epoch = images, transform, epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_003 * self.epoch + index)
            return self.transform(self.images[index])


@section("dataset.map_style", "D1")
def dataset_map_style() -> None:
    """A dataset answers len(dataset) and dataset[i]; a loader needs no more.

    A transform runs each time a sample is asked for, so a random one gives
    another value in every epoch."""
    print(inspect.getsource(Squares))
    dataset = Squares(4)
    show(len(dataset), 4)
    show(dataset[3], (3.0, 9.0))  # input and target
    show([y.item() for x, y in dataset], [0.0, 1.0, 4.0, 9.0])
    show_error(lambda: dataset[4], IndexError, "out of bounds")
    noisy = Squares(4, transform=lambda x: x + torch.rand(()))
    first, second = noisy[3][0].item(), noisy[3][0].item()
    show((first != second, int(first), int(second)), (True, 3, 3))
    show(noisy.inputs, [0.0, 1.0, 2.0, 3.0])  # what is stored stays
    # For tensors, and for arrays, there are classes already.
    inputs, targets = torch.arange(4.0), torch.arange(4.0) ** 2
    show(TensorDataset(inputs, targets)[3], (3.0, 9.0))
    arrays = inputs.double().numpy(), targets.int().numpy()
    x, y = tb.CustomDataset(*arrays)[3]
    show((x.dtype, y.dtype, x, y), (torch.float32, torch.int64, 3.0, 9))


@section("loader.batches", "D2")
def loader_batches() -> None:
    """A DataLoader stacks samples to batches of batch_size.

    drop_last leaves out the last batch if it is smaller."""
    dataset = Squares(10)
    inputs, targets = next(iter(DataLoader(dataset, batch_size=4)))
    show(inputs, [0.0, 1.0, 2.0, 3.0])
    show(targets, [0.0, 1.0, 4.0, 9.0])
    show([len(x) for x, y in DataLoader(dataset, batch_size=4)], [4, 4, 2])
    dropped = DataLoader(dataset, batch_size=4, drop_last=True)
    show([len(x) for x, y in dropped], [4, 4])
    # The mean of batches' means is not the mean: the last one counts for 2.
    means = [x.mean().item() for x, y in DataLoader(dataset, batch_size=4)]
    show(sum(means) / 3, (1.5 + 5.5 + 8.5) / 3)
    show((4 * means[0] + 4 * means[1] + 2 * means[2]) / 10, sum(range(10)) / 10)


@section("loader.collate", "D2")
def loader_collate() -> None:
    """Tuples and dicts keep their form; numbers become tensors, text a list."""
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    samples = [{"x": first, "y": 0, "name": "a"},
               {"x": second, "y": 1, "name": "b"}]
    [batch] = DataLoader(samples, batch_size=2)
    show(batch["x"], [[1.0, 2.0], [3.0, 4.0]])
    show((batch["y"], batch["y"].dtype), ([0, 1], torch.int64))
    show(batch["name"], ["a", "b"])
    # Python floats become float64, which a model in float32 refuses.
    [floats] = DataLoader([0.5, 1.5], batch_size=2)
    show((floats, floats.dtype), ([0.5, 1.5], torch.float64))
    show(list(DataLoader([0.5, 1.5], batch_size=None)), [0.5, 1.5])  # as they are


@section("loader.shuffle", "D2")
def loader_shuffle() -> None:
    """shuffle=True draws a new order for every epoch.

    A generator with a seed makes the orders repeatable."""

    def epochs(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(Squares(20), 8, shuffle=True, generator=generator)
        return [torch.cat([x for x, _ in loader]).tolist() for _ in range(2)]

    first, second = epochs(1)
    print(f"{first[:10]} ...")
    show((first == list(range(20)), first == second), (False, False))
    show((sorted(first), sorted(second)), (list(range(20)), list(range(20))))
    show((epochs(1) == [first, second], epochs(2) == [first, second]), (True, False))
    # Without a generator a loader draws from the global one, even without
    # shuffling, and so changes what is drawn later.
    before = torch.get_rng_state()
    epochs(1)
    show(torch.equal(before, torch.get_rng_state()), True)
    list(DataLoader(Squares(20)))
    show(torch.equal(before, torch.get_rng_state()), False)


@section("loader.num_workers", "D2")
def loader_num_workers() -> None:
    """Workers are processes that load batches ahead, while the model trains.

    They take the batches in turn; the order of the batches stays."""
    print(inspect.getsource(WhoLoads))
    for index, worker, process, _ in DataLoader(WhoLoads(), batch_size=8):
        show((index, worker), (list(range(8)), [-1] * 8))
        show(set(process.tolist()) == {os.getpid()}, True)  # no worker
    batches = list(DataLoader(WhoLoads(), batch_size=2, num_workers=2))
    index, worker, process, _ = map(torch.cat, zip(*batches, strict=True))
    show(index, [0, 1, 2, 3, 4, 5, 6, 7])
    show(worker, [0, 0, 1, 1, 0, 0, 1, 1])
    show((len(process.unique()), os.getpid() in process), (2, False))


@section("loader.persistent_workers", "D2")
def loader_persistent_workers() -> None:
    """Workers end with the epoch, unless persistent_workers=True keeps them.

    Starting them takes time. But what you change in the dataset afterwards
    does not reach the copies that kept workers have."""

    def processes(**options) -> int:
        loader = DataLoader(WhoLoads(), batch_size=2, num_workers=2, **options)
        seen = [batch[2] for epoch in range(2) for batch in loader]
        return len(torch.cat(seen).unique())

    show(processes(), 4)  # two epochs, two workers each
    show(processes(persistent_workers=True), 2)
    keep_none = partial(DataLoader, WhoLoads(), persistent_workers=True)
    show_error(lambda: keep_none(), ValueError, "needs num_workers > 0")


@section("loader.worker_seeds", "D2")
def loader_worker_seeds() -> None:
    """Each worker draws from its own seed, which the generator gives.

    So augmentation repeats for the same number of workers only."""

    def draws(num_workers: int) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        loader = DataLoader(WhoLoads(), 2, num_workers=num_workers,
                            generator=generator)
        return torch.cat([batch[3] for batch in loader])

    show(len(draws(2).unique()), 8)  # no number twice
    show(torch.equal(draws(2), draws(2)), True)
    show(torch.equal(draws(2), draws(1)), False)
    # Without workers samples draw from the global generator, which has moved.
    show(torch.equal(draws(0), draws(0)), False)


@section("loader.start_methods", "D2")
def loader_start_methods() -> None:
    """fork copies this process; spawn starts a new one, which imports the script.

    spawn is used by macOS and Windows. It needs `if __name__ == "__main__":`
    in the script, and datasets that can be pickled: no lambda in them."""
    for method in ("fork", "spawn"):
        if method in multiprocessing.get_all_start_methods():
            loader = DataLoader(Squares(4, torch.neg), 2, num_workers=1,
                                multiprocessing_context=method)
            show(torch.cat([x for x, _ in loader]), [0.0, -1.0, -2.0, -3.0])
    dataset = Squares(4, lambda x: -x)
    show_error(lambda: ForkingPickler.dumps(dataset), Exception, "local object")


@section("loader.workers_measured", "M6")
def loader_workers_measured() -> None:
    """Do workers gain anything here? Measure, for your own dataset.

    With workers loading goes on while the model trains. Try more of them
    until it is no faster: for data in memory that is 0."""
    print(inspect.getsource(Slow))
    seconds = {}
    for workers in (0, 1, 2):
        loader = DataLoader(Slow(), batch_size=8, num_workers=workers,
                            persistent_workers=workers > 0)
        total = sum(int(batch.sum()) for batch in loader)  # starts the workers
        show(total, 47 * 48 // 2)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            for _batch in loader:
                time.sleep(0.02)  # as for a step of the model
            times.append(time.perf_counter() - start)
        seconds[workers] = min(times)
        print(f"{workers} workers: {seconds[workers]:.3f} s")
    # Alone: 48 * 5 ms of loading + 6 * 20 ms of training. One worker loads
    # meanwhile, and two halve the loading, less what moving batches costs.
    show(seconds[0] >= 0.36, True)
    show(seconds[2] < 0.85 * seconds[0], True)


@section("loader.pin_memory", "D2", "M6")
def loader_pin_memory() -> None:
    """Pinned memory never moves, so a GPU can copy from it while the CPU goes on."""
    plain, _ = next(iter(DataLoader(Squares(4), batch_size=4)))
    show(plain.is_pinned(), False)
    if not torch.cuda.is_available():
        skip("needs a CUDA GPU; pin_memory was not run")
    pinned, _ = next(iter(DataLoader(Squares(4), batch_size=4, pin_memory=True)))
    show((pinned.is_pinned(), pinned), (True, [0.0, 1.0, 2.0, 3.0]))
    # non_blocking=True returns at once. 256 MB each, the fastest of three:
    sources = {"plain": torch.ones(64_000_000), "pinned": torch.ones(64_000_000).pin_memory()}
    for name, source in sources.items():
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            copied = source.to("cuda", non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        show(copied.sum(), 64_000_000.0)
        print(f"{name}: {1000 * min(times):.1f} ms")


@section("dataset.iterable", "D1")
def dataset_iterable() -> None:
    """A stream has no length and no index: a log, a socket, a huge file.

    Each worker gets a copy of it. Unless it is split among them, each sample
    comes once per worker."""
    print(inspect.getsource(Stream))
    alone = DataLoader(Stream(5, split=True), batch_size=2)
    show([batch.tolist() for batch in alone], [[0, 1], [2, 3], [4]])
    show_error(lambda: DataLoader(Stream(5, True), shuffle=True), ValueError, "shuffle option")
    twice = list(DataLoader(Stream(5, split=False), 2, num_workers=2))
    show(torch.cat(twice).bincount(), [2, 2, 2, 2, 2])
    once = list(DataLoader(Stream(5, split=True), 2, num_workers=2))
    # even numbers from one worker, odd ones from the other
    show([batch.tolist() for batch in once], [[0, 2], [1, 3], [4]])


@section("collate.padding", "D3")
def collate_padding() -> None:
    """Sequences of different lengths are padded; their lengths go along.

    Padding must not count, and the lengths give the mask that leaves it out."""
    samples = [(torch.tensor([1.0, 2.0, 3.0]), 0), (torch.tensor([4.0]), 1),
               (torch.tensor([5.0, 6.0]), 0)]
    stacked = DataLoader(samples, batch_size=3)
    show_error(lambda: next(iter(stacked)), RuntimeError, "equal size")
    loader = DataLoader(samples, batch_size=3, collate_fn=tb.pad_collate)
    [((padded, lengths), targets)] = loader
    show(padded, [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [5.0, 6.0, 0.0]])
    show((lengths, targets), ([3, 1, 2], [0, 1, 0]))
    mask = torch.arange(3) < lengths[:, None]  # (B, longest)
    show(mask, [[True, True, True], [True, False, False], [True, True, False]])
    show(padded.mean(dim=1), [2.0, 4 / 3, 11 / 3])  # wrong but for the first
    show((padded * mask).sum(dim=1) / lengths, [2.0, 4.0, 5.5])
    # Each batch is as long as it must be. A partial gives another padding; it
    # can be pickled for workers, a lambda cannot.
    with_minus_1 = partial(tb.pad_collate, padding_value=-1.0)
    last = list(DataLoader(samples, batch_size=2, collate_fn=with_minus_1))[1]
    show(last[0][0], [[5.0, 6.0]])
    show(with_minus_1(samples)[0][0][1], [4.0, -1.0, -1.0])
    # Packed, as an LSTM takes it: step by step, without any padding.
    packed = pack_padded_sequence(padded, lengths, batch_first=True,
                                  enforce_sorted=False)
    show(packed.data, [1.0, 5.0, 4.0, 2.0, 6.0, 3.0])


@section("split.random", "D4")
def split_random() -> None:
    """Split off data that the model never trains on: random, repeatable, disjoint."""
    dataset = Squares(100)
    generator = torch.Generator().manual_seed(42)
    parts = random_split(dataset, [0.8, 0.1, 0.1], generator=generator)
    show([len(part) for part in parts], [80, 10, 10])
    everything = sorted(i for part in parts for i in part.indices)
    show(everything == list(range(100)), True)  # each sample in one part only
    show(parts[2][0][0], parts[2].indices[0])  # a part is a dataset, too
    again = random_split(dataset, [0.8, 0.1, 0.1], generator.manual_seed(42))
    other = random_split(dataset, [0.8, 0.1, 0.1], generator.manual_seed(43))
    show([part[2].indices == parts[2].indices for part in (again, other)], [True, False])
    # Fractions are rounded down; what is left goes to the first parts.
    show([len(part) for part in random_split(Squares(25), [0.8, 0.1, 0.1])], [21, 2, 2])
    show_error(lambda: random_split(dataset, [80, 10]), ValueError, "Sum of input")


@section("split.stratified", "D4")
def split_stratified() -> None:
    """A stratified split keeps each class's share; a plain one may miss a rare class."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    dataset = TensorDataset(torch.arange(100), labels)
    parts = tb.split_dataset(dataset, (0.8, 0.1, 0.1), labels=labels)
    counts = [labels[part.indices].bincount().tolist() for part in parts]
    show(counts, [[72, 8], [9, 1], [9, 1]])
    everything = sorted(i for part in parts for i in part.indices)
    show(everything == list(range(100)), True)
    rare = set()
    for seed in range(50):
        plain = tb.split_dataset(dataset, (0.8, 0.1, 0.1), seed=seed)
        rare.add(int(labels[plain[2].indices].sum()))
    print(f"rare samples in the third part: {min(rare)} to {max(rare)}")
    show((0 in rare, max(rare) > 1), (True, True))


@section("split.transforms", "D4")
def split_transforms() -> None:
    """The parts of a split share one dataset, and so its transform.

    For validation make a second dataset, and take the same indices of it."""
    halved = Squares(10, transform=lambda x: x / 2)
    train, validation = random_split(halved, [8, 2])
    index = validation.indices[0]
    show(validation[0][0], index / 2)  # transformed like the training data
    plain = Subset(Squares(10), validation.indices)
    show(plain[0][0], float(index))
    show(set(train.indices) & set(plain.indices), set())


@section("images.folder", "D5")
def images_folder() -> None:
    """ImageFolder takes one folder per class, named by the folders.

    Or take a list of paths: then labels may come from anywhere, and nothing
    is read before it is asked for."""
    from PIL import Image
    from torchvision import datasets
    from torchvision.transforms import v2

    root = folders.output / "photos"
    for name, colour in (("red", (250, 0, 0)), ("blue", (0, 0, 250))):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            picture = Image.new("RGB", (60, 48), colour)  # (width, height)
            picture.putpixel((0, i), (255, 255, 255))
            picture.save(root / name / f"{i}.png")
    folder = datasets.ImageFolder(root)
    show(folder.class_to_idx, {"blue": 0, "red": 1})  # in alphabetical order
    show(folder.targets, [0, 0, 0, 1, 1, 1])
    image, label = folder[4]
    show((image.size, image.mode, label), ((60, 48), "RGB", 1))
    pixels = datasets.ImageFolder(root, transform=v2.ToImage())[4][0]
    show((pixels.shape, pixels.dtype), ((3, 48, 60), torch.uint8))  # (C, H, W)
    show(pixels[:, :3, 0].T, [[250, 0, 0], [255, 255, 255], [250, 0, 0]])

    class Paths(Dataset):
        def __init__(self, paths, labels, transform) -> None:
            self.paths, self.labels, self.transform = paths, labels, transform

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int):
            image = tb.read_image(self.paths[index], "RGB")  # grey ones too
            return self.transform(image), self.labels[index]

    paths = sorted(root.glob("*/*.png"))  # sorted: folders have no fixed order
    labels = [int(path.parent.name == "red") for path in paths]
    dataset = Paths(paths, labels, v2.ToImage())
    [(images, targets)] = DataLoader(dataset, batch_size=6)
    show((images.shape, targets), ((6, 3, 48, 60), [0, 0, 0, 1, 1, 1]))
    show(torch.equal(images[4], pixels), True)


@section("images.damaged", "D5")
def images_damaged() -> None:
    """One damaged file stops an epoch: its error must name the file.

    Better still, find all of them before the training."""
    from PIL import Image
    from torchvision import datasets

    root = folders.output / "damaged"
    (root / "cat").mkdir(parents=True, exist_ok=True)
    path = root / "cat" / "0.png"
    Image.effect_noise((64, 64), 50).save(path)
    (root / "cat" / "1.png").write_bytes(path.read_bytes()[:2000])  # cut short
    (root / "cat" / "2.png").write_text("no image")
    folder = datasets.ImageFolder(root)
    show(len(folder), 3)  # it looks whole
    show_error(lambda: folder[1], OSError, "truncated")  # but which file?
    show_error(lambda: tb.read_image(folder.samples[1][0]), tb.DataError, "1.png: not a readable image")
    damaged = []
    for name, _ in folder.samples:
        try:
            tb.read_image(name)
        except tb.DataError:
            damaged.append(Path(name).name)
    show(damaged, ["1.png", "2.png"])
    (folders.output / "empty" / "dog").mkdir(parents=True, exist_ok=True)
    show_error(lambda: datasets.ImageFolder(folders.output / "empty"), FileNotFoundError, "dog")


@section("transforms.to_tensor", "D6", "D7")
def transforms_to_tensor() -> None:
    """From a picture to the network: tensor, scale, normalise.

    ToImage and ToDtype(scale=True) replace the old ToTensor. Normalize
    subtracts the data's mean and divides by its standard deviation."""
    from PIL import Image
    from torchvision.transforms import v2

    picture = Image.new("RGB", (60, 48), (51, 0, 255))
    image = v2.ToImage()(picture)
    show((image.shape, image.dtype), ((3, 48, 60), torch.uint8))
    show(image[:, 0, 0], [51, 0, 255])
    x = v2.ToDtype(torch.float32, scale=True)(image)
    show(x[:, 0, 0], [0.2, 0.0, 1.0])
    # Without scale=True the values stay, 255 times too large for a network.
    show(v2.ToDtype(torch.float32)(image)[:, 0, 0], [51.0, 0.0, 255.0])
    z = v2.Normalize(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.5))(x)
    show(z[:, 0, 0], [(0.2 - 0.5) / 0.25, -2.0, 1.0])
    show_error(lambda: v2.Normalize((0.5,), (0.25,))(image), TypeError, "float tensor")
    # The constants are those of all training pixels. One white pixel of 4:
    pixels = torch.tensor([0, 0, 0, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    mean, std = tb.channel_statistics(pixels)
    show((mean, std), ((1 / 4,), (math.sqrt(1 / 4 * 3 / 4),)))


@section("transforms.crop", "D6")
def transforms_crop() -> None:
    """Crops show another part each time; RandomResizedCrop also scales it.

    That is augmentation: more variety than there are pictures."""
    from torchvision.transforms import v2

    image = torch.arange(36.0).view(1, 6, 6)  # 6 * row + column: its place
    show(v2.CenterCrop(2)(image)[0], [[14.0, 15.0], [20.0, 21.0]])
    crops = [v2.RandomCrop(3)(image)[0] for _ in range(400)]
    window = torch.tensor([[0.0, 1, 2], [6, 7, 8], [12, 13, 14]])
    show(all(torch.equal(crop - crop[0, 0], window) for crop in crops), True)
    # The window's corner can be in rows 0 to 3 and columns 0 to 3.
    corners = {int(crop[0, 0]) for crop in crops}
    show(sorted(corners), [6 * row + column for row in range(4) for column in range(4)])
    # With padding the window may reach over the edge, by 2 here.
    padded = [v2.RandomCrop(6, padding=2)(image + 1) for _ in range(400)]
    left = [int(crop.count_nonzero()) for crop in padded]
    show((min(left), max(left)), (4 * 4, 6 * 6))
    show_error(lambda: v2.RandomCrop(7)(image), ValueError, "Required crop size")

    # In a picture of coordinates, steps between pixels tell what was cut out.
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    crop = v2.RandomResizedCrop(32, antialias=False)  # for exact steps
    crops = torch.stack([crop(torch.stack([x, y])) for _ in range(400)])
    show(crops.shape, (400, 2, 32, 32))
    width = 32 * (crops[:, 0, 16, 17] - crops[:, 0, 16, 16])
    height = 32 * (crops[:, 1, 17, 16] - crops[:, 1, 16, 16])
    area = width * height / 64**2  # from 8% to all of the picture
    show((area.min(), area.max()), (0.08, 1.0), rtol=0, atol=0.15)
    ratio = width / height  # from 3 : 4 to 4 : 3, to a pixel of about 20
    show((ratio.min(), ratio.max()), (3 / 4, 4 / 3), rtol=0.1, atol=0)
    show(len(crops[:, :, 0, 0].unique(dim=0)) > 100, True)  # places differ


@section("transforms.flip", "D6")
def transforms_flip() -> None:
    """Flips mirror the picture and keep the label.

    That suits photographs. Digits and letters become others by it."""
    from torchvision.transforms import v2

    image = torch.tensor([[[1, 2], [3, 4]]])
    show(v2.RandomHorizontalFlip(p=1)(image), [[[2, 1], [4, 3]]])
    show(v2.RandomVerticalFlip(p=1)(image), [[[3, 4], [1, 2]]])
    flip = v2.RandomHorizontalFlip()  # p=0.5
    flipped = [int(flip(image)[0, 0, 0]) == 2 for _ in range(2000)]
    show(sum(flipped) / 2000, 0.5, rtol=0, atol=0.06)
    two = torch.tensor([[1, 1, 1], [0, 0, 1], [1, 1, 1], [1, 0, 0], [1, 1, 1]])
    five = [[1, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 1], [1, 1, 1]]
    show(v2.RandomHorizontalFlip(p=1)(two), five)


@section("transforms.rotation", "D6")
def transforms_rotation() -> None:
    """RandomRotation(d) turns by -d to d degrees and fills with black."""
    from torchvision.transforms import InterpolationMode, v2

    image = torch.tensor([[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]])
    quarter = v2.RandomRotation((90, 90))  # a pair fixes the range
    show(quarter(image)[0], [[3.0, 6, 9], [2, 5, 8], [1, 4, 7]])
    show(v2.RandomRotation((45, 45))(torch.ones(1, 9, 9))[0, 0, 0], 0.0)
    wide = torch.ones(1, 2, 4)
    larger = v2.RandomRotation((90, 90), expand=True)
    show((quarter(wide).shape, larger(wide).shape), ((1, 2, 4), (1, 4, 2)))
    # The angles: where does a dot go, 28 pixels to the right of the centre?
    dot = torch.zeros(1, 65, 65)
    dot[0, 31:34, 59:62] = 1
    turn = v2.RandomRotation(10, interpolation=InterpolationMode.BILINEAR)
    offsets, angles = torch.arange(65.0) - 32, []
    for _ in range(300):
        turned = turn(dot)[0]
        up, right = -turned.sum(1) @ offsets, turned.sum(0) @ offsets
        angles.append(math.degrees(math.atan2(up, right)))
    show((min(angles), max(angles)), (-10.0, 10.0), rtol=0, atol=1)


@section("transforms.colour", "D6")
def transforms_colour() -> None:
    """ColorJitter changes brightness, contrast, saturation and hue at random.

    GaussianBlur mixes in the neighbours at distance d, each by the weight
    exp(-d * d / (2 sigma * sigma))."""
    from torchvision.transforms import v2

    x = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 0.0]]])  # red, green
    show(v2.ColorJitter(brightness=(0.5, 0.5))(x)[:2, 0], [[0.5, 0.0], [0.0, 0.5]])
    # Grey as the eye sees it: red gives 0.299, green 0.587, blue 0.114.
    grey = v2.ColorJitter(saturation=(0, 0))(x)
    show(grey[:, 0, 0], [0.299, 0.299, 0.299], rtol=0, atol=1e-3)
    flat = v2.ColorJitter(contrast=(0, 0))(x)
    show(flat[0, 0], [(0.299 + 0.587) / 2] * 2, rtol=0, atol=1e-3)
    # half way around the circle of colours: cyan and magenta
    show(v2.ColorJitter(hue=(0.5, 0.5))(x)[:, 0].T, [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    jitter, half = v2.ColorJitter(brightness=0.2), torch.full((3, 1, 1), 0.5)
    factors = [jitter(half)[0, 0, 0].item() / 0.5 for _ in range(500)]
    show((min(factors), max(factors)), (0.8, 1.2), rtol=0, atol=0.02)

    point = torch.zeros(1, 9, 9)
    point[0, 4, 4] = 1
    blurred = v2.GaussianBlur(kernel_size=5, sigma=1.5)(point)[0]
    weights = [math.exp(-d * d / (2 * 1.5**2)) for d in (-2, -1, 0, 1, 2)]
    weights = [w / sum(weights) for w in weights]
    show(blurred[2:7, 4], [w * weights[2] for w in weights])
    show((blurred[2, 2], blurred.sum()), (weights[0] ** 2, 1.0))


@section("transforms.pipelines", "D6")
def transforms_pipelines() -> None:
    """Training augments, evaluation does not. Sizes and constants are the same."""
    train = tb.get_transforms(train=True)
    evaluation = tb.get_transforms(train=False)
    for pipeline in (train, evaluation):
        print(*[type(step).__name__ for step in pipeline.transforms])
    image = torch.randint(0, 256, (3, 48, 60), dtype=torch.uint8)
    show((train(image).shape, train(image).dtype), ((3, 224, 224), torch.float32))
    show(torch.equal(train(image), train(image)), False)
    result = evaluation(image)
    show(torch.equal(result, evaluation(image)), True)
    # By hand: the shorter side to 256 pixels, the middle 224 x 224, the scale
    # 0 to 1, and the constants of ImageNet.
    resized = F.interpolate(image[None].float(), (256, 320), mode="bilinear",
                            antialias=True)[0]
    middle = resized[:, 16 : 16 + 224, 48 : 48 + 224] / 255
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    by_hand = (middle - mean) / std
    # pixels are rounded to 1 / 255 in between, and then divided by 0.224
    show((result - by_hand).abs().max(), 0.0, rtol=0, atol=1.02 / 255 / 0.224)


@section("transforms.grid", "D6")
def transforms_grid() -> None:
    """Look at what the network will see: six draws of each transform."""
    from torchvision.io import read_image
    from torchvision.transforms import v2
    from torchvision.utils import make_grid, save_image

    y, x = torch.meshgrid(torch.arange(48), torch.arange(60), indexing="ij")
    image = torch.stack([5 * y, 4 * x, 2 * x]).to(torch.uint8)  # (3, 48, 60)
    image[:, 2:10, 2:10] = 255  # a mark, to see flips and turns
    size = (48, 60)
    steps = [v2.RandomResizedCrop(size), v2.RandomCrop(size, padding=12),
             v2.RandomHorizontalFlip(), v2.RandomRotation(30),
             v2.ColorJitter(0.5, 0.5, 0.5, 0.2), v2.GaussianBlur(9, (0.1, 4.0))]
    draws = [step(image) for step in steps for _ in range(6)]
    grid = make_grid(draws, nrow=6, padding=2)  # a row for each transform
    show(grid.shape, (3, 6 * (48 + 2) + 2, 6 * (60 + 2) + 2))
    path = folders.output / "transforms.png"
    save_image(grid / 255, path)  # takes values from 0 to 1
    print(f"written: {path}")
    saved = read_image(str(path))
    # the second draw of the third transform, as it stands in the file
    row, column = 2 + 2 * (48 + 2), 2 + 1 * (60 + 2)
    show(torch.equal(saved[:, row : row + 48, column : column + 60], draws[13]), True)
    rows = torch.stack(draws).flatten(1).split(6)
    kinds = [len(row.unique(dim=0)) for row in rows]  # of six draws
    print(f"different pictures in each row: {kinds}")
    show(min(kinds) > 1, True)


@section("transforms.seeded", "D2", "D6")
def transforms_seeded() -> None:
    """Draw augmentation from (epoch, sample): the same with any workers."""
    from torchvision.transforms import v2

    print(inspect.getsource(Seeded))
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    dataset = Seeded(images, v2.RandomCrop(16))
    alone = torch.cat(list(DataLoader(dataset, 4)))
    helped = torch.cat(list(DataLoader(dataset, 4, num_workers=2)))
    show((alone.shape, torch.equal(alone, helped)), ((6, 3, 16, 16), True))
    dataset.epoch = 1
    later = torch.cat(list(DataLoader(dataset, 4)))
    show(torch.equal(alone, later), False)


@section("builtin.fake_data", "D7")
def builtin_fake_data() -> None:
    """FakeData stands in while the real pictures are not here yet."""
    from torchvision import datasets
    from torchvision.transforms import v2

    fake = datasets.FakeData(40, image_size=(3, 32, 48), num_classes=5,
                             transform=v2.ToImage())
    [(images, labels)] = DataLoader(fake, batch_size=40)
    show((images.shape, images.dtype), ((40, 3, 32, 48), torch.uint8))
    show(labels.unique(), [0, 1, 2, 3, 4])
    show(torch.equal(fake[7][0], images[7]), True)  # a sample stays the same
    show(len({image.sum().item() for image in images}) > 20, True)  # all differ


@section("builtin.mnist", "D7")
def builtin_mnist() -> None:
    """MNIST, Fashion-MNIST and KMNIST: 60,000 pictures, and 10,000 for the test.

    They are downloaded if they are missing. torchbasics checks the files, and
    names a damaged one; torchvision takes a truncated one."""
    published = {"mnist": (0.1307, 0.3081), "fashion-mnist": (0.2860, 0.3530)}
    missing = []
    for name in ("mnist", "fashion-mnist", "kmnist"):
        try:
            test = tb.load_images(name, folders.data, train=False)
            train = tb.load_images(name, folders.data)
        except OSError as error:  # no network
            missing.append(name)
            print(f"{name} is not here: {str(error).partition(':')[0]}")
            continue
        print(f"{name} in {folders.data}: {', '.join(train.classes)}")
        show((train.inputs.shape, len(test)), ((60_000, 1, 28, 28), 10_000))
        show(train.targets.unique(), list(range(10)))
        mean, std = tb.channel_statistics(train.inputs)
        # from the sums of x and of x * x, in whole numbers
        parts = [part.long() for part in train.inputs.split(5000)]
        count, total = 60_000 * 28 * 28, sum(int(part.sum()) for part in parts)
        squares = sum(int((part * part).sum()) for part in parts)
        by_hand = math.sqrt(squares / count - (total / count) ** 2) / 255
        show((mean[0], std[0]), (total / count / 255, by_hand))
        if name in published:  # for KMNIST two pairs are in use: compute it
            show((round(mean[0], 4), round(std[0], 4)), published[name])
    if len(missing) == 3:
        skip("needs one of the data sets; none was shown")


@section("builtin.cifar10", "D7")
def builtin_cifar10() -> None:
    """CIFAR-10: colour pictures of ten classes, 32 x 32, with three constants.

    It is downloaded if it is missing (170 MB)."""
    from torchvision import datasets

    waited = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds, or a silent server is waited for
    try:
        train = datasets.CIFAR10(folders.data, train=True, download=True)
    except (OSError, RuntimeError) as error:
        skip(f"not in {folders.data} and not downloaded: {error}")
    finally:
        socket.setdefaulttimeout(waited)
    show(train.data.shape, (50_000, 32, 32, 3))  # NumPy, channels last
    show(torch.tensor(train.targets).bincount(), [5_000] * 10)
    images = torch.from_numpy(train.data).permute(0, 3, 1, 2)  # (N, C, H, W)
    mean, std = tb.channel_statistics(images)
    show([round(m, 4) for m in mean], [0.4914, 0.4822, 0.4465])  # published
    show([round(s, 4) for s in std], [0.2470, 0.2435, 0.2616])


@section("speed.tensor_loader", "D8")
def speed_tensor_loader(device: torch.device) -> None:
    """TensorLoader gives a DataLoader's batches, cut from tensors at once.

    For data that fit into memory: no worker, no Python for each sample. The
    order is a function of (seed, epoch), so it can go on in mid-epoch."""
    from torchvision.transforms import v2

    images = torch.randint(0, 256, (3000, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(3000)  # each sample's number, to recognise it
    steps = [v2.ToDtype(torch.float32, scale=True),
             v2.Normalize((0.13,), (0.31,))]
    dataset = tb.CustomDataset(images, labels, v2.Compose(steps))
    usual = DataLoader(dataset, batch_size=128, shuffle=True)

    def tensor_loader() -> tb.TensorLoader:
        return tb.TensorLoader(images, labels, batch_size=128, shuffle=True,
                               mean=(0.13,), std=(0.31,), device=device)

    fast = tensor_loader()

    def epoch(loader) -> tuple[Tensor, Tensor]:
        inputs, targets = zip(*loader, strict=True)
        return torch.cat(inputs).cpu(), torch.cat(targets)

    inputs, order = epoch(fast)
    show([len(y) for _, y in fast] == [len(y) for _, y in usual], True)
    show(torch.equal(order.sort().values, labels), True)  # each sample once
    show((torch.equal(order, labels), torch.equal(order, epoch(fast)[1])), (False, False))
    by_hand = (images[order] / 255 - 0.13) / 0.31
    show((inputs - by_hand).abs().max(), 0.0, rtol=0, atol=1e-5)
    x, y = epoch(usual)
    show((inputs[order.argsort()] - x[y.argsort()]).abs().max(), 0.0, rtol=0, atol=1e-5)

    # Stop after 20 of 24 batches; another loader gives the rest.
    stopped, other = tensor_loader(), tensor_loader()
    batches = iter(stopped)
    start = torch.cat([next(batches)[1] for _ in range(20)])
    other.load_state_dict(stopped.state_dict())
    show(torch.equal(torch.cat([start, epoch(other)[1]]), order), True)

    def seconds(loader) -> float:
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            for x, _ in loader:
                x = x.to(device)
            x.sum().item()  # waits for the device
            times.append(time.perf_counter() - begin)
        return min(times)

    speed_up = seconds(usual) / seconds(fast)
    print(f"on {tb.device_name(device)}: {speed_up:.0f} times as fast")
    show(speed_up > 10, True)


def main(argv: list[str] | None = None) -> int:
    """Run the lessons that the arguments name and return the exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path)
    own, rest = parser.parse_known_args(argv)
    folders.data = own.data_dir
    with tempfile.TemporaryDirectory() as temporary:
        folders.output = own.output or Path(temporary)
        try:
            folders.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"error: --output: {folders.output}: {error.strerror}; name another folder", file=sys.stderr)
            return 2
        return section.run(rest)


if __name__ == "__main__":
    sys.exit(main())
