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
import os
import pickle
import socket
import sys
import tempfile
import time
import timeit
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, get_worker_info, random_split
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image

import torchbasics as tb
from torchbasics import cli
from torchbasics.demo import Sections, show, show_error, skip

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
    noisy = Squares(4, transform=lambda x: x + torch.rand(()))
    first, second = noisy[3][0].item(), noisy[3][0].item()
    show((first != second, int(first), int(second)), (True, 3, 3))
    # For tensors, and for arrays, there are classes already.
    inputs, targets = torch.arange(4.0), torch.arange(4.0) ** 2
    show(TensorDataset(inputs, targets)[3], (3.0, 9.0))
    x, y = tb.CustomDataset(inputs.double().numpy(), targets.int().numpy())[3]
    show((x.dtype, y.dtype, x, y), (torch.float32, torch.int64, 3.0, 9))


@section("loader.batches", "D2")
def loader_batches() -> None:
    """A DataLoader stacks samples to batches of batch_size.

    drop_last leaves out the last batch if it is smaller. Tuples and dicts keep
    their form, numbers become tensors, and text a list."""
    dataset = Squares(10)
    show(next(iter(DataLoader(dataset, batch_size=4))), [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 4.0, 9.0]])
    show([len(x) for x, y in DataLoader(dataset, batch_size=4)], [4, 4, 2])
    show([len(x) for x, y in DataLoader(dataset, 4, drop_last=True)], [4, 4])
    samples = [{"x": torch.tensor([1.0, 2.0]), "y": 0.5, "name": "a"},
               {"x": torch.tensor([3.0, 4.0]), "y": 1.5, "name": "b"}]
    [batch] = DataLoader(samples, batch_size=2)
    show(batch["x"], [[1.0, 2.0], [3.0, 4.0]])
    show((batch["y"], batch["name"]), ([0.5, 1.5], ["a", "b"]))
    # A Python float is a float64, which a model in float32 refuses.
    show(batch["y"].dtype, torch.float64)


@section("loader.shuffle", "D2")
def loader_shuffle() -> None:
    """shuffle=True draws a new order for every epoch.

    A generator with a seed makes the orders repeatable."""

    def epochs(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(Squares(8), 4, shuffle=True, generator=generator)
        return [torch.cat([x for x, _ in loader]).tolist() for _ in range(2)]

    first, second = epochs(1)
    print(first, second, sep="\n")
    show((first == sorted(first), first == second), (False, False))
    show([sorted(first), sorted(second)], [list(range(8))] * 2)  # each sample once
    show((epochs(1) == [first, second], epochs(2) == [first, second]), (True, False))


@section("loader.num_workers", "D2")
def loader_num_workers() -> None:
    """Workers are processes that load batches ahead, while the model trains.

    They take the batches in turn; the order of the batches stays."""
    print(inspect.getsource(WhoLoads))
    batches = list(DataLoader(WhoLoads(), batch_size=2, num_workers=2))
    index, worker, process, _ = map(torch.cat, zip(*batches, strict=True))
    show(index, [0, 1, 2, 3, 4, 5, 6, 7])
    show(worker, [0, 0, 1, 1, 0, 0, 1, 1])
    show((len(process.unique()), os.getpid() in process), (2, False))
    # On macOS, Windows, and from Python 3.14 on also on Linux, workers are new
    # processes that import the script and get the dataset pickled, so it must
    # not hold a lambda.
    dataset = Squares(4, transform=lambda x: -x)
    show_error(lambda: pickle.dumps(dataset), Exception, "local object")


@section("loader.persistent_workers", "D2")
def loader_persistent_workers() -> None:
    """Workers end with the epoch, unless persistent_workers=True keeps them.

    Starting them takes time. But what you change in the dataset afterwards
    does not reach the copies that kept workers have."""

    def processes(persistent: bool) -> int:
        loader = DataLoader(WhoLoads(), batch_size=2, num_workers=2,
                            persistent_workers=persistent)
        seen = [batch[2] for epoch in range(2) for batch in loader]
        return len(torch.cat(seen).unique())

    show(processes(persistent=False), 4)  # two epochs, two workers each
    show(processes(persistent=True), 2)


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
        times = []
        for _ in range(4):  # the first one also starts the workers
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
    loader = DataLoader(Squares(4), batch_size=4, pin_memory=True)
    pinned, _ = next(iter(loader))
    show((pinned.is_pinned(), pinned), (True, [0.0, 1.0, 2.0, 3.0]))
    # non_blocking=True returns at once. 256 MB each:
    source = torch.ones(64_000_000)
    memories = {"plain": source, "pinned": source.pin_memory()}
    for name, memory in memories.items():
        for _ in range(3):  # the last one counts
            torch.cuda.synchronize()
            start = time.perf_counter()
            copied = memory.to("cuda", non_blocking=True)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        show(copied.sum(), 64_000_000.0)
        print(f"{name}: {1000 * seconds:.1f} ms")


@section("dataset.iterable", "D1")
def dataset_iterable() -> None:
    """A stream has no length and no index: a log, a socket, a huge file.

    Each worker gets a copy of it. Unless it is split among them, each sample
    comes once per worker."""
    print(inspect.getsource(Stream))
    alone = DataLoader(Stream(5, split=True), batch_size=2)
    show([batch.tolist() for batch in alone], [[0, 1], [2, 3], [4]])
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
    show_error(lambda: list(DataLoader(samples, 3)), RuntimeError, "equal size")
    loader = DataLoader(samples, batch_size=3, collate_fn=tb.pad_collate)
    [((padded, lengths), targets)] = loader
    show(padded, [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [5.0, 6.0, 0.0]])
    show((lengths, targets), ([3, 1, 2], [0, 1, 0]))
    mask = torch.arange(3) < lengths[:, None]  # (B, longest)
    show(mask, [[True, True, True], [True, False, False], [True, True, False]])
    show((padded * mask).sum(dim=1) / lengths, [2.0, 4.0, 5.5])  # the means
    # As collate_fn for another padding, workers take a partial, but no lambda.
    (padded, _), _ = partial(tb.pad_collate, padding_value=-1.0)(samples)
    show(padded[1], [4.0, -1.0, -1.0])


@section("split.random", "D4")
def split_random() -> None:
    """Split off data that the model never trains on: random, repeatable, disjoint."""
    dataset = Squares(100)

    def split(seed: int) -> list[Subset]:
        generator = torch.Generator().manual_seed(seed)
        return random_split(dataset, [0.8, 0.1, 0.1], generator=generator)

    parts = split(seed=42)
    show([len(part) for part in parts], [80, 10, 10])
    everything = sorted(i for part in parts for i in part.indices)
    show(everything == list(range(100)), True)  # each sample in one part only
    show(split(seed=42)[2].indices == parts[2].indices, True)
    show(split(seed=43)[2].indices == parts[2].indices, False)
    # A part is a dataset, too. All of them share the first one's transform, so
    # for validation take the same indices of a dataset without augmentation.
    dataset.transform = torch.neg
    index = parts[2].indices[0]
    show(parts[2][0][0], -float(index))
    show(Subset(Squares(100), parts[2].indices)[0][0], float(index))


@section("split.stratified", "D4")
def split_stratified() -> None:
    """A stratified split keeps each class's share; a plain one may miss a rare class."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    dataset = TensorDataset(torch.arange(100), labels)
    fractions = (0.8, 0.1, 0.1)
    parts = tb.split_dataset(dataset, fractions, labels=labels)
    counts = [labels[part.indices].bincount().tolist() for part in parts]
    show(counts, [[72, 8], [9, 1], [9, 1]])
    everything = sorted(i for part in parts for i in part.indices)
    show(everything == list(range(100)), True)
    plain = [tb.split_dataset(dataset, fractions, seed=i) for i in range(50)]
    rare = [int(labels[parts[2].indices].sum()) for parts in plain]
    print(f"rare samples in the third part: {min(rare)} to {max(rare)}")
    show((min(rare), max(rare) > 1), (0, True))


@section("images.folder", "D5")
def images_folder() -> None:
    """ImageFolder takes one folder per class, named by the folders.

    Or take a list of paths: then labels may come from anywhere. (`v2` is
    torchvision.transforms.v2, `Image` is Pillow's.)"""
    root = folders.output / "photos"
    for name, colour in (("red", (250, 0, 0)), ("blue", (0, 0, 250))):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            Image.new("RGB", (60, 48), colour).save(root / name / f"{i}.png")
    folder = datasets.ImageFolder(root, transform=v2.ToImage())
    show(folder.class_to_idx, {"blue": 0, "red": 1})  # in alphabetical order
    show(folder.targets, [0, 0, 1, 1])
    image, label = folder[2]
    show((image.shape, image.dtype), ((3, 48, 60), torch.uint8))  # PIL's size is (60, 48)
    show((image[:, 0, 0], label), ([250, 0, 0], 1))

    class Paths(Dataset):
        def __init__(self, paths: list[Path]) -> None:
            self.paths = paths

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            path = self.paths[index]
            image = tb.read_image(path, "RGB")  # grey ones become RGB, too
            return v2.functional.to_image(image), int(path.parent.name == "red")

    paths = sorted(root.glob("*/*.png"))  # sorted: folders have no fixed order
    [(images, targets)] = DataLoader(Paths(paths), batch_size=4)
    show((images.shape, targets), ((4, 3, 48, 60), [0, 0, 1, 1]))
    show((images[0, :, 0, 0], images[3, :, 0, 0]), ([0, 0, 250], [250, 0, 0]))


@section("images.damaged", "D5")
def images_damaged() -> None:
    """One damaged file stops an epoch: its error must name the file.

    Better still, read all of them before the training, as train_folder does."""
    root = folders.output / "damaged"
    (root / "cat").mkdir(parents=True, exist_ok=True)
    path = root / "cat" / "0.png"
    Image.effect_noise((64, 64), 50).save(path)
    (root / "cat" / "1.png").write_bytes(path.read_bytes()[:2000])  # cut short
    folder = datasets.ImageFolder(root)
    show(len(folder), 2)  # it looks whole
    show_error(lambda: folder[1], OSError, "truncated")  # but which file?
    show_error(lambda: tb.read_image(folder.samples[1][0]), tb.DataError, "1.png: not a readable image")


@section("transforms.to_tensor", "D6", "D7")
def transforms_to_tensor() -> None:
    """From a picture to the network: tensor, scale, normalise.

    ToImage and ToDtype(scale=True) replace the old ToTensor. Normalize
    subtracts the data's mean and divides by its standard deviation."""
    image = v2.ToImage()(Image.new("RGB", (60, 48), (51, 0, 255)))
    show((image.shape, image.dtype), ((3, 48, 60), torch.uint8))
    x = v2.ToDtype(torch.float32, scale=True)(image)
    show(x[:, 0, 0], [0.2, 0.0, 1.0])
    # Without scale=True the values stay, 255 times too large for a network.
    show(v2.ToDtype(torch.float32)(image)[:, 0, 0], [51.0, 0.0, 255.0])
    show(v2.Normalize(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.5))(x)[:, 0, 0], [(0.2 - 0.5) / 0.25, -2.0, 1.0])
    # The constants are those of all training pixels. One white pixel of 4:
    pixels = torch.tensor([0, 0, 0, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    mean, std = tb.channel_statistics(pixels)
    show((mean, std), ((1 / 4,), (math.sqrt(1 / 4 * 3 / 4),)))


@section("transforms.crop", "D6")
def transforms_crop() -> None:
    """Crops show another part each time; RandomResizedCrop also scales it.

    That is augmentation: more variety than there are pictures."""
    image = torch.arange(36.0).view(1, 6, 6)  # 6 * row + column: its place
    crops = torch.cat([v2.RandomCrop(2)(image) for _ in range(400)])
    show(crops[0] - crops[0, 0, 0], [[0.0, 1.0], [6.0, 7.0]])  # neighbours
    corners = crops[:, 0, 0]  # in rows 0 to 4 and columns 0 to 4
    show((corners.min(), corners.max(), len(corners.unique())), (0.0, 28.0, 25))
    # RandomResizedCrop takes 8% to 100% of the area, of a width that is 3/4 to
    # 4/3 of the height. Here the values tell which columns were taken.
    columns = torch.arange(64.0).expand(1, 64, 64)
    crops = torch.stack([v2.RandomResizedCrop(32)(columns) for _ in range(400)])
    show(crops.shape, (400, 1, 32, 32))
    widths = crops.amax((1, 2, 3)) - crops.amin((1, 2, 3))
    show((widths.min(), widths.max()), (64 * math.sqrt(0.08 * 3 / 4), 64.0), atol=3)


@section("transforms.flip_turn", "D6")
def transforms_flip_turn() -> None:
    """Flips mirror the picture, RandomRotation(d) turns it by -d to d degrees.

    The label stays. That suits photographs, but a mirrored b is a d."""
    image = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    show(v2.RandomHorizontalFlip(p=1)(image), [[[2.0, 1.0], [4.0, 3.0]]])
    show(v2.RandomVerticalFlip(p=1)(image), [[[3.0, 4.0], [1.0, 2.0]]])
    flip = v2.RandomHorizontalFlip()  # p=0.5
    flipped = [int(flip(image)[0, 0, 0]) == 2 for _ in range(2000)]
    show(sum(flipped) / 2000, 0.5, atol=0.06)
    quarter = v2.RandomRotation((90, 90))  # a pair fixes the range
    show(quarter(image), [[[2.0, 4.0], [1.0, 3.0]]])
    show(v2.RandomRotation((45, 45))(torch.ones(1, 9, 9))[0, 0, 0], 0.0)  # black
    # Here each pixel's value is its row, counted from the centre. A turn by 10
    # degrees moves what is 30 pixels to the right by 30 * sin(10°) = 5.2 rows.
    rows = torch.arange(-32.0, 33.0).view(1, 65, 1).expand(1, 65, 65)
    turn = v2.RandomRotation(10)
    moves = [turn(rows)[0, 32, 32 + 30].item() for _ in range(300)]
    show((min(moves), max(moves)), (-5.2, 5.2), atol=0.5)


@section("transforms.colour", "D6")
def transforms_colour() -> None:
    """ColorJitter changes brightness, contrast, saturation and hue at random.

    GaussianBlur mixes in the neighbours at distance d, each by the weight
    exp(-d * d / (2 sigma * sigma))."""
    x = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 0.0]]])  # red, green
    # Grey as the eye sees it: red gives 0.299, green 0.587, blue 0.114.
    show(v2.ColorJitter(saturation=(0, 0))(x)[:, 0, 0], [0.299, 0.299, 0.299], atol=1e-3)
    show(v2.ColorJitter(contrast=(0, 0))(x)[0, 0], [(0.299 + 0.587) / 2] * 2, atol=1e-3)
    # half way around the circle of colours: cyan and magenta
    show(v2.ColorJitter(hue=(0.5, 0.5))(x)[:, 0].T, [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    jitter = v2.ColorJitter(brightness=0.2)
    factors = [jitter(x / 2)[0, 0, 0].item() / 0.5 for _ in range(500)]
    show((min(factors), max(factors)), (0.8, 1.2), atol=0.02)
    point = torch.zeros(1, 5, 5)
    point[0, 2, 2] = 1
    blurred = v2.GaussianBlur(kernel_size=3, sigma=1.5)(point)[0]
    near = math.exp(-1 / (2 * 1.5**2))
    total = near + 1 + near  # the weights are divided by their sum
    show(blurred[2, 1:4], [near / total**2, 1 / total**2, near / total**2])


@section("transforms.pipelines", "D6")
def transforms_pipelines() -> None:
    """Training augments, evaluation does not. Sizes and constants are the same."""
    train = tb.get_transforms(train=True)
    evaluation = tb.get_transforms(train=False)
    augment = ["RandomResizedCrop", "RandomHorizontalFlip", "ColorJitter"]
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
    for pipeline, steps in ((train, augment),
                            (evaluation, ["Resize", "CenterCrop"])):
        names = [type(step).__name__ for step in pipeline.transforms]
        show(names, ["ToImage", *steps, "ToDtype", "Normalize"])
        last = pipeline.transforms[-1]
        show((last.mean, last.std), (mean, std))
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
    mean, std = torch.tensor([mean, std]).view(2, 3, 1, 1)
    # pixels are rounded to 1 / 255 in between, and then divided by 0.224
    show((result - (middle - mean) / std).abs().max(), 0.0, atol=1.02 / 255 / 0.224)


@section("transforms.grid", "D6")
def transforms_grid() -> None:
    """Look at what the network will see: six draws of each transform."""
    y, x = torch.meshgrid(torch.arange(48), torch.arange(60), indexing="ij")
    image = torch.stack([5 * y, 4 * x, 2 * x]).to(torch.uint8)  # (3, 48, 60)
    image[:, 2:10, 2:10] = 255  # a mark, to see flips and turns
    steps = [v2.RandomResizedCrop((48, 60)), v2.RandomHorizontalFlip(),
             v2.RandomCrop((48, 60), padding=12), v2.RandomRotation(30),
             v2.ColorJitter(0.5, 0.5, 0.5, 0.2), v2.GaussianBlur(9, (0.1, 4.0))]
    draws = [step(image) for step in steps for _ in range(6)]
    rows = torch.stack(draws).split(6)
    show([len(row.unique(dim=0)) > 1 for row in rows], [True] * 6)
    grid = make_grid(draws, nrow=6, padding=2)  # a row for each transform
    show(grid.shape, (3, 6 * (48 + 2) + 2, 6 * (60 + 2) + 2))
    path = folders.output / "transforms.png"
    save_image(grid / 255, path)  # takes values from 0 to 1
    print(f"written: {path}")
    saved = v2.ToImage()(Image.open(path))
    show(torch.equal(saved[:, 2:50, 2:62], draws[0]), True)  # the first of them


@section("builtin.fake_data", "D7")
def builtin_fake_data() -> None:
    """FakeData stands in while the real pictures are not here yet."""
    fake = datasets.FakeData(40, image_size=(3, 32, 48), num_classes=5,
                             transform=v2.ToImage())
    [(images, labels)] = DataLoader(fake, batch_size=40)
    show((images.shape, images.dtype), ((40, 3, 32, 48), torch.uint8))
    show(labels.unique(), [0, 1, 2, 3, 4])
    show(len(images.unique(dim=0)), 40)  # all differ


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
        [mean], [std] = tb.channel_statistics(train.inputs)
        x = train.inputs / 255  # channel_statistics needs no such copy
        show((mean, std), (x.mean().item(), x.std().item()), rtol=1e-4)
        if name in published:  # for KMNIST two pairs are in use: compute it
            show((round(mean, 4), round(std, 4)), published[name])
    if len(missing) == 3:
        skip("needs one of the data sets; none was shown")


@section("builtin.cifar10", "D7")
def builtin_cifar10() -> None:
    """CIFAR-10: colour pictures of ten classes, 32 x 32, with three constants.

    It is downloaded if it is missing (170 MB)."""
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

    For data that fit into memory: no worker, no Python for each sample."""
    images = torch.randint(0, 256, (3000, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(3000)  # each sample's number, to recognise it
    steps = v2.Compose([v2.ToDtype(torch.float32, scale=True),
                        v2.Normalize((0.13,), (0.31,))])
    dataset = tb.CustomDataset(images, labels, steps)
    usual = DataLoader(dataset, batch_size=128, shuffle=True)
    fast = tb.TensorLoader(images, labels, batch_size=128, shuffle=True,
                           mean=(0.13,), std=(0.31,), device=device)

    def epoch(loader) -> tuple[Tensor, Tensor]:
        inputs, targets = zip(*loader, strict=True)
        return torch.cat(inputs).cpu(), torch.cat(targets)

    inputs, order = epoch(fast)
    show((len(list(fast)), len(list(usual))), (24, 24))  # 3000 / 128, rounded up
    show(torch.equal(order.sort().values, labels), True)  # each sample once
    show((torch.equal(order, labels), torch.equal(order, epoch(fast)[1])), (False, False))
    x, y = epoch(usual)  # the same samples, normalised in the same way
    show((inputs[order.argsort()] - x[y.argsort()]).abs().max(), 0.0, atol=1e-5)

    slow = min(timeit.repeat(lambda: epoch(usual), number=1, repeat=3))
    quick = min(timeit.repeat(lambda: epoch(fast), number=1, repeat=30))
    speed_up = slow / quick
    print(f"on {tb.device_name(device)}: {speed_up:.0f} times as fast")
    show(speed_up > 10, True)


def main(argv: list[str] | None = None) -> int:
    """Run the lessons that the arguments name and return the exit code."""
    parser = cli.Parser(add_help=False)
    parser.add_argument("--data-dir", type=cli.path_argument, default="data")
    parser.add_argument("--output", type=cli.path_argument)
    own, rest = parser.parse_known_args(argv)
    folders.data = Path(own.data_dir)
    with tempfile.TemporaryDirectory() as temporary:
        folders.output = Path(own.output or temporary)
        try:
            folders.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            cli.print_error(f"error: --output: {folders.output}: {error.strerror}; name another folder")
            return 2
        return section.run(rest)


if __name__ == "__main__":
    sys.exit(main())
