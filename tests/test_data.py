"""Batches and their order against plain PyTorch and hand calculation; data sets, images, splits, transforms."""

from __future__ import annotations

import contextlib
import doctest
import hashlib
import io
import itertools
import math
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from tests.test_mnist import write_set
from torchbasics import data, digits, mnist
from torchbasics.data import (
    CustomDataset,
    DataError,
    Images,
    RandomAffine,
    TensorLoader,
    channel_statistics,
    get_transforms,
    load_images,
    load_mnist,
    load_splits,
    mix_seed,
    pad_collate,
    read_image,
    split_dataset,
)

Batches = list[tuple[Tensor, Tensor]]


def images(count: int, channels: int = 1, height: int = 6, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def same(a: Batches, b: Batches) -> bool:
    """Return whether the batches are equal, bit for bit."""
    pairs = zip(a, b, strict=True)
    return len(a) == len(b) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


def labels_of(loader: Any) -> list[int]:
    return [int(label) for _, targets in loader for label in targets]


class TempCase(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)


class Values(unittest.TestCase):
    def test_batches_equal_those_of_a_plain_dataloader(self) -> None:
        inputs, targets = torch.randn(23, 3, generator=torch.Generator().manual_seed(1)), torch.arange(23)
        for drop_last in (False, True):
            loader = TensorLoader(inputs, targets, 5, drop_last=drop_last)
            plain = DataLoader(TensorDataset(inputs, targets), 5, drop_last=drop_last)
            self.assertEqual(len(loader), len(plain))
            self.assertTrue(same(list(loader), [tuple(batch) for batch in plain]))
            self.assertEqual((len(loader.dataset), loader.batch_size), (23, 5))
            self.assertEqual(loader.drop_last, drop_last)

    def test_uint8_images_are_scaled_and_normalised_per_channel(self) -> None:
        inputs = torch.tensor([[0, 51, 255], [102, 204, 1]], dtype=torch.uint8).view(2, 3, 1, 1)
        ((batch, _),) = TensorLoader(inputs, torch.arange(2), mean=(0.5, 0.25, 0.1), std=(0.5, 2.0, 0.1))
        by_hand = [
            [(0 - 0.5) / 0.5, (0.2 - 0.25) / 2, (1 - 0.1) / 0.1],
            [(0.4 - 0.5) / 0.5, (0.8 - 0.25) / 2, (1 / 255 - 0.1) / 0.1],
        ]
        torch.testing.assert_close(batch.view(2, 3), torch.tensor(by_hand))
        ((batch, _),) = TensorLoader(images(4), torch.arange(4))
        torch.testing.assert_close(batch, images(4).float() / 255)

    def test_inputs_of_other_types_pass_as_they_are(self) -> None:
        for inputs in (torch.randn(4, 2).double(), torch.arange(8).view(4, 2), torch.randn(4, 1, 3, 3).half()):
            ((batch, _),) = TensorLoader(inputs, torch.arange(4))
            self.assertEqual(batch.dtype, inputs.dtype)
            self.assertTrue(torch.equal(batch, inputs))

    def test_changing_a_batch_in_place_leaves_the_data_set_alone(self) -> None:
        for inputs in (images(10), images(10).float()):
            before, targets = inputs.clone(), torch.arange(10)
            for batch, labels in TensorLoader(inputs, targets, 4):
                batch.zero_()
                labels.zero_()
            self.assertTrue(torch.equal(inputs, before))
            self.assertEqual(targets.tolist(), list(range(10)))

    def test_inputs_are_on_the_device_and_targets_on_the_host(self) -> None:
        loader = TensorLoader(images(10), torch.arange(10), 4, device="meta")
        self.assertEqual([x.device.type for x, _ in loader], ["meta"] * 3)
        self.assertEqual([y.tolist() for _, y in loader], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])

    def test_wrong_arguments_are_explained(self) -> None:
        x, y = images(10), torch.arange(10)
        for call, words in (
            (lambda: TensorLoader(x, y[:9]), "10 inputs for 9 targets"),
            (lambda: TensorLoader(x[:0], y[:0]), "0 samples, .* no batch"),
            (lambda: TensorLoader(x, y, 0), "batch_size must be .* got 0"),
            (lambda: TensorLoader(x, y, 5, world_size=2), "multiple of the 2 processes, got 5"),
            (lambda: TensorLoader(x, y, 11, drop_last=True), "10 samples, batch_size 11, .* no batch"),
            (lambda: TensorLoader(x, y, limit_batches=0), "limit_batches 0: no batch"),
            (lambda: TensorLoader(x.float(), y, std=(0.3,)), "are for uint8 images, got torch.float32"),
            (lambda: RandomAffine(scale=1), "scale must be at least 0 and below 1, got 1"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                call()

    def test_the_example_in_the_documentation_is_right(self) -> None:
        self.assertEqual(doctest.testmod(data).failed, 0)


class Order(unittest.TestCase):
    def loader(self, **options: Any) -> TensorLoader:
        return TensorLoader(images(57), torch.arange(57), 8, **{"shuffle": True, "seed": 3, **options})

    def test_every_sample_comes_once_per_epoch_with_its_target(self) -> None:
        inputs = torch.arange(57.0)[:, None]
        loader = TensorLoader(inputs, torch.arange(57), 8, shuffle=True)
        for _ in range(3):
            epoch = list(loader)
            self.assertEqual(sorted(labels_of(epoch)), list(range(57)))
            self.assertTrue(all(torch.equal(x[:, 0], y.float()) for x, y in epoch))

    def test_each_epoch_has_another_order_and_the_seed_repeats_them(self) -> None:
        one, other = self.loader(), self.loader()
        epochs = [labels_of(one) for _ in range(3)]
        self.assertEqual(epochs, [labels_of(other) for _ in range(3)])
        self.assertEqual(len({tuple(epoch) for epoch in [*epochs, list(range(57))]}), 4)
        self.assertNotEqual(epochs[0], labels_of(self.loader(seed=4)))
        other.set_epoch(1)
        self.assertEqual(labels_of(other), epochs[1])

    def test_drop_last_and_limit_batches_shorten_an_epoch(self) -> None:
        whole = labels_of(self.loader())
        for options, batches in (({"drop_last": True}, 7), ({"limit_batches": 3}, 3), ({"limit_batches": 100}, 8)):
            loader = self.loader(**options)
            self.assertEqual((len(loader), labels_of(loader)), (batches, whole[: 8 * batches]))
            self.assertEqual(loader.epoch, 1)

    def test_the_draws_of_others_change_nothing_and_are_not_changed(self) -> None:
        expected = list(self.loader(augment=RandomAffine()))
        torch.manual_seed(123)
        got = []
        for batch in self.loader(augment=RandomAffine()):
            torch.rand(3)
            list(self.loader(seed=9))
            got.append(batch)
        self.assertTrue(same(got, expected))
        before = torch.get_rng_state(), random.getstate()
        list(self.loader(augment=RandomAffine()))
        self.assertTrue(torch.equal(before[0], torch.get_rng_state()))
        self.assertEqual(before[1], random.getstate())

    def test_default_dtype_and_device_change_nothing(self) -> None:
        inputs, targets = images(6, height=8, width=8), torch.arange(6)

        def epoch() -> Batches:
            affine = RandomAffine(scale=0.1)
            loaders = [TensorLoader(inputs, targets, 3, shuffle=shuffle, augment=affine) for shuffle in (False, True)]
            return [batch for loader in loaders for batch in loader]

        expected = epoch()
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        self.assertTrue(same(epoch(), expected))
        with torch.device("meta"):
            self.assertTrue(same(epoch(), expected))


class Position(unittest.TestCase):
    def loader(self) -> TensorLoader:
        return TensorLoader(images(30), torch.arange(30), 7, shuffle=True, seed=5, augment=RandomAffine())

    def test_a_resume_after_any_batch_equals_the_uninterrupted_run(self) -> None:
        loader = self.loader()
        whole, states = [], []
        for _ in range(3):
            for batch in loader:
                whole.append(batch)
                states.append(loader.state_dict())
        for done, state in enumerate(states, start=1):
            resumed, rest = self.loader(), []
            resumed.load_state_dict(state)
            while resumed.epoch < 3:
                rest += list(resumed)
            self.assertTrue(same(rest, whole[done:]), done)

    def test_an_iteration_that_was_left_starts_the_epoch_again(self) -> None:
        loader, expected = self.loader(), list(self.loader())
        next(iter(loader))
        self.assertTrue(same(list(loader), expected))
        self.assertEqual(loader.epoch, 1)

    def test_a_loaded_position_counts_for_one_iteration(self) -> None:
        loader, expected = self.loader(), list(self.loader())
        next(iter(loader))  # a begun iteration is forgotten
        loader.load_state_dict({"epoch": 0, "batch": 3})
        self.assertEqual(loader.state_dict(), {"epoch": 0, "batch": 3})
        self.assertTrue(torch.equal(next(iter(loader))[0], expected[3][0]))
        self.assertTrue(same(list(loader), expected))
        loader.load_state_dict({"epoch": 0, "batch": 3})
        loader.set_epoch(0)  # goes to the start
        self.assertTrue(same(list(loader), expected))

    def test_a_position_beyond_the_epoch_is_refused(self) -> None:
        for batch in (6, -1):
            with self.assertRaisesRegex(ValueError, f"position {batch} lies beyond the 5 batches"):
                self.loader().load_state_dict({"epoch": 0, "batch": batch})


@contextlib.contextmanager
def process(rank: int, world_size: int) -> Any:
    """Act as one of several processes."""
    with (
        mock.patch("torchbasics.distributed.rank", lambda: rank),
        mock.patch("torchbasics.distributed.world_size", lambda: world_size),
    ):
        yield


def loaders_of(world_size: int, *args: Any, **options: Any) -> list[TensorLoader]:
    """Return the loader that each of several processes makes with the same arguments."""
    loaders = []
    for rank in range(world_size):
        with process(rank, world_size):
            loaders.append(TensorLoader(*args, **options))
    return loaders


class ManyProcesses(unittest.TestCase):
    def test_the_parts_of_all_processes_make_the_batch_of_one(self) -> None:
        options: dict[str, Any] = {"shuffle": True, "seed": 2, "augment": RandomAffine(), "mean": (0.2,), "std": (0.3,)}
        for count in (1, 5, 7, 100):
            alone = TensorLoader(images(count), torch.arange(count), 6, **options)
            whole = [*alone, *alone]
            for world_size in (2, 3):
                loaders = loaders_of(world_size, images(count), torch.arange(count), 6, **options)
                epochs = [[list(loader) for loader in loaders] for _ in range(2)]
                for batch, (x, y) in enumerate(whole):
                    epoch, number = divmod(batch, len(alone))
                    parts = [part[number] for part in epochs[epoch] if number < len(part)]
                    together = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
                    self.assertTrue(same([together], [(x, y)]), (count, world_size, batch))
                    sizes = [len(y) for _, y in parts]
                    self.assertLessEqual(max(sizes) - min(sizes), 1)
                self.assertEqual([len(loader) for loader in loaders], [len(part) for part in epochs[0]])

    def test_a_process_whose_part_is_empty_gets_no_batch_for_it(self) -> None:
        loaders = loaders_of(3, torch.zeros(7), torch.arange(7), 6)
        found = [[y.tolist() for _, y in loader] for loader in loaders]
        self.assertEqual(found, [[[0, 1]], [[2, 3]], [[4, 5], [6]]])
        self.assertEqual([len(loader) for loader in loaders], [1, 1, 2])
        self.assertEqual([loader.state_dict() for loader in loaders], [{"epoch": 1, "batch": 0}] * 3)

    def test_rank_and_world_size_are_those_of_the_process(self) -> None:
        early = TensorLoader(images(10), torch.arange(10), 10)  # made before there is a process group
        self.assertTrue(early.sharded)
        with process(rank=1, world_size=2):
            loader = TensorLoader(images(10), torch.arange(10), 10)
            whole = TensorLoader(images(10), torch.arange(10), 10, world_size=1)
            self.assertEqual((labels_of(loader), labels_of(whole)), ([5, 6, 7, 8, 9], list(range(10))))
            self.assertEqual((loader.sharded, whole.sharded, early.sharded), (True, False, False))


class Affine(unittest.TestCase):
    """RandomAffine against torchvision and against what needs no interpolation."""

    def picture(self, height: int, width: int) -> Tensor:
        return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))

    def test_shifting_by_whole_pixels_moves_them_and_black_comes_in(self) -> None:
        for height, width in ((20, 20), (10, 20)):
            picture = self.picture(height, width)
            for right, down in ((0, 0), (2, 0), (0, 1), (-4, 3)):
                draws = torch.tensor([[0.0, -right / width / 0.2, -down / height / 0.2]] * 2)
                expected = torch.zeros_like(picture)
                source = picture[..., max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
                expected[..., max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = source
                torch.testing.assert_close(RandomAffine(10, 0.2)(picture, draws), expected, rtol=0, atol=1e-4)

    def test_rotation_equals_torchvision_on_any_shape(self) -> None:
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as tv

        for height, width in ((28, 28), (15, 24), (24, 15)):
            picture = self.picture(height, width)
            for draw in (1.0, -0.5, 0.3):
                ours = RandomAffine(30)(picture, torch.tensor([[draw, 0.0, 0.0]] * 2))
                theirs = tv.rotate(picture, 30 * draw, interpolation=InterpolationMode.BILINEAR)  # black outside
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)

    def test_resizing_equals_interpolation_of_a_part_of_the_image(self) -> None:
        picture = self.picture(16, 16)
        for draws, factors, rows, columns in (((0, -1), (2, 1), (8, 24), (0, 16)), ((-1, 0), (1, 2), (0, 16), (8, 24))):
            shown = RandomAffine(scale=0.5)(picture, torch.tensor([[0.0, 0.0, 0.0, *draws]] * 2))  # half of one side
            larger = torch.nn.functional.interpolate(picture, scale_factor=factors, mode="bilinear")
            torch.testing.assert_close(shown, larger[..., slice(*rows), slice(*columns)], rtol=0, atol=1e-4)

    def test_draws_are_uniform_between_minus_1_and_1(self) -> None:
        for scale, numbers in ((0.0, 3), (0.1, 5)):
            draws = RandomAffine(scale=scale).draw(30_000, torch.Generator().manual_seed(0))
            self.assertEqual(tuple(draws.shape), (30_000, numbers))
            self.assertLessEqual(float(draws.abs().max()), 1)
            self.assertLess(float(draws.mean(0).abs().max()), 5 / math.sqrt(90_000))  # five standard deviations
            self.assertLess(float((draws.square().mean(0) - 1 / 3).abs().max()), 0.01)

    def test_each_batch_of_each_epoch_is_augmented_differently(self) -> None:
        twins = images(3, height=28, width=28).repeat(2, 1, 1, 1)
        loader = TensorLoader(twins, torch.arange(6), 3, augment=RandomAffine())
        self.assertEqual(len({x.numpy().tobytes() for _ in range(2) for x, _ in loader}), 4)


class Statistics(unittest.TestCase):
    def test_mean_and_deviation_equal_those_in_float64(self) -> None:
        inputs = images(40, channels=3, height=9, width=7)
        mean, std = channel_statistics(inputs)
        for channel, exact in enumerate((inputs.double() / 255).unbind(1)):
            self.assertAlmostEqual(mean[channel], float(exact.mean()), places=12)
            self.assertAlmostEqual(std[channel], float(exact.std(correction=0)), places=12)

    def test_a_single_colour_can_be_divided_by(self) -> None:
        self.assertEqual(channel_statistics(torch.full((3, 1, 2, 2), 51, dtype=torch.uint8)), ((0.2,), (1.0,)))


def few_digits(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return images(40 if count == 60_000 else 10, height=28, width=28), torch.arange(40 if count == 60_000 else 10) % 10


class DataSets(TempCase):
    def setUp(self) -> None:
        super().setUp()
        patches = mock.patch.object(mnist, "download_mnist"), mock.patch.object(digits, "draw_digits")
        self.download, self.draw = (patch.start() for patch in patches)
        self.addCleanup(mock.patch.stopall)
        self.download.side_effect = ConnectionError("mnist could not be downloaded: no route to host")
        self.draw.side_effect = few_digits

    def test_load_mnist_shuffles_and_normalises_the_training_images(self) -> None:
        raw = write_set(self.root, "kmnist", train=20, test=6)
        train, test = load_mnist(8, self.root, name="kmnist", seed=1)
        self.assertEqual(([len(y) for _, y in train], [y.tolist() for _, y in test]), ([8, 8, 4], [[0, 1, 2, 3, 4, 5]]))
        self.assertEqual((len(train.dataset), len(test.dataset), train.batch_size), (20, 6, 8))
        pixels = torch.tensor(list((raw / "train-images-idx3-ubyte").read_bytes()[16:]), dtype=torch.float64) / 255
        by_hand = (pixels - pixels.mean()) / pixels.std(correction=0)
        ((batch, labels),) = load_mnist(20, self.root, name="kmnist", seed=1)[0]
        self.assertNotEqual(labels.tolist(), [i % 10 for i in range(20)])
        expected = by_hand.view(20, 28, 28)[torch.randperm(20, generator=torch.Generator().manual_seed(mix_seed(1, 0)))]
        torch.testing.assert_close(batch[:, 0].double(), expected, rtol=0, atol=1e-5)

    def test_mnist_is_normalised_by_the_known_constants(self) -> None:
        fake = Images(images(4, height=28, width=28), torch.arange(4), mnist.CLASSES["mnist"])
        with mock.patch.object(data, "load_images", lambda *_, **__: fake):
            ((batch, _),) = load_mnist(4)[1]
        torch.testing.assert_close(batch, (fake.inputs.float() / 255 - 0.1307) / 0.3081, rtol=0, atol=1e-5)

    def test_digits_are_drawn_differently_for_training_and_test(self) -> None:
        part = load_images("digits", train=False)
        load_images("digits")
        self.assertEqual(self.draw.mock_calls, [mock.call(10_000, seed=1), mock.call(60_000, seed=0)])
        self.assertEqual((len(part), part.classes), (10, tuple("0123456789")))

    def test_splits_are_disjoint_and_follow_the_seed(self) -> None:
        def few(name: str, data_dir: object, train: bool = True) -> Images:
            inputs = torch.arange(30 if train else 10, dtype=torch.uint8).view(-1, 1, 1, 1) + (0 if train else 100)
            return Images(inputs, inputs.flatten().long(), ("a",))

        with mock.patch.object(data, "load_images", few):
            splits, again, other = (load_splits("kmnist", val_size=8, seed=seed) for seed in (1, 1, 2))
            for size in (0, 30):
                with self.assertRaisesRegex(ValueError, f"between 1 and 29 for kmnist, got {size}"):
                    load_splits("kmnist", val_size=size)
        values = [part.inputs.flatten().tolist() for part in splits[:3]]
        self.assertEqual(values, [part.targets.tolist() for part in splits[:3]])
        self.assertEqual([len(part) for part in splits[:3]], [22, 8, 10])
        self.assertEqual((sorted(values[0] + values[1]), values[2]), (list(range(30)), list(range(100, 110))))
        self.assertEqual(values[1], again.val.targets.tolist())
        self.assertNotEqual(values[1], other.val.targets.tolist())
        self.assertEqual((splits.name, splits.notice), ("kmnist", ""))

    def test_auto_draws_digits_if_mnist_is_absent_and_cannot_be_downloaded(self) -> None:
        for error in (ConnectionError("no route to host"), PermissionError(13, "Permission denied")):
            self.download.side_effect = error
            splits = load_splits("auto", self.root, val_size=10)
            self.assertEqual((splits.name, len(splits.train), len(splits.val)), ("digits", 30, 10))
            self.assertIn(f"NOTICE: no MNIST in {self.root}", splits.notice)
            self.assertIn(str(error), splits.notice)

    def test_auto_is_mnist_if_it_is_there_or_comes(self) -> None:
        self.download.side_effect = lambda *_: write_set(self.root, "mnist")
        raw = write_set(Path(tempfile.mkdtemp(dir=self.root)), "mnist")
        sums = {name: hashlib.md5((raw / name).read_bytes()).hexdigest() for name in mnist.MNIST_MD5}
        with mock.patch.object(mnist, "MNIST_MD5", sums):
            for _ in range(2):
                splits = load_splits("auto", self.root, val_size=2)
                self.assertEqual((splits.name, splits.notice, len(splits.train)), ("mnist", "", 10))

    def test_auto_never_passes_by_damaged_or_incomplete_files(self) -> None:
        raw = write_set(self.root, "mnist")  # not the published files
        with self.assertRaisesRegex(DataError, "train-images-idx3-ubyte is damaged"):
            load_splits("auto", self.root, val_size=2)
        for path in list(raw.iterdir())[1:]:
            path.unlink()
        with self.assertRaisesRegex(ConnectionError, "no route to host"):
            load_splits("auto", self.root, val_size=2)

    def test_a_data_set_that_was_named_is_never_replaced(self) -> None:
        with self.assertRaises(ConnectionError):
            load_splits("mnist", self.root)

    def test_load_mnist_prints_the_notice_of_auto(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            train, _ = load_mnist(8, self.root, name="auto")
        self.assertIn("NOTICE: no MNIST in", printed.getvalue())
        self.assertEqual(len(train.dataset), 40)


class Reading(TempCase):
    def save(self, image: Any, name: str = "a.png", **options: Any) -> Path:
        image.save(self.root / name, **options)
        return self.root / name

    def test_an_image_has_the_mode_that_was_asked_for(self) -> None:
        from PIL import Image

        for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
            path = self.save(Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode))
            self.assertEqual(read_image(path).mode, mode)
            for wanted, white in (("L", 255), ("RGB", (255, 255, 255))):
                image = read_image(str(path), wanted)
                self.assertEqual((image.mode, image.size, image.getpixel((2, 1))), (wanted, (3, 2), white))

    def test_deep_images_are_scaled_not_clipped(self) -> None:
        from PIL import Image

        sixteen = ([0, 255, 257, 25700, 65535], [0, 1, 1, 100, 255])  # 257 is one step of 255
        for name, mode, code, (values, expected) in (
            ("a.png", "I;16", "<H", sixteen),
            ("a.tif", "I;16", "<H", sixteen),
            ("a.tif", "I;16B", ">H", sixteen),
            ("a.tif", "I", "=i", sixteen),
            ("a.png", "I;16", "<H", ([0, 1606, 4095], [0, 100, 255])),  # 12 bits
            ("a.png", "I;16", "<H", ([0, 100, 255], [0, 100, 255])),
            ("a.tif", "I", "=i", ([-50_000, 50_000, 100_000], [0, 128, 255])),  # 127.5, to even
            ("a.tif", "F", "=f", ([0.0, 0.2, 1.0, math.nan, math.inf, -math.inf], [0, 51, 255, 0, 0, 0])),
            ("a.tif", "F", "=f", ([0.0, 0.0], [0, 0])),
        ):
            content = b"".join(struct.pack(code, value) for value in values)
            path = self.save(Image.frombytes(mode, (len(values), 1), content), name)
            self.assertEqual((list(read_image(path, "L").tobytes()), read_image(path).mode), (expected, "L"))

    def test_a_photograph_is_turned_upright(self) -> None:
        from PIL import Image

        upright = Image.frombytes("L", (3, 2), bytes([1, 2, 3, 4, 5, 6]))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise for display
        path = self.save(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
        image = read_image(path)
        self.assertEqual((image.size, image.tobytes()), ((3, 2), upright.tobytes()))

    def test_what_cannot_be_read_is_named_in_one_line(self) -> None:
        from PIL import Image

        whole = self.save(Image.effect_noise((40, 40), 50), "whole.png").read_bytes()
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"  # PIL would start Ghostscript
        for content, words in ((b"text", "identify"), (b"", "identify"), (whole[:-300], ""), (eps, "identify")):
            path = self.root / "bad.png"
            path.write_bytes(content)
            with self.assertRaisesRegex(DataError, f"{path}: not a readable image .*{words}") as caught:
                read_image(path)
            self.assertNotIn("\n", str(caught.exception))
        for path, words in ((self.root / "absent.png", "no such file"), (self.root, "not a regular file")):
            with self.assertRaisesRegex(DataError, f"{path}: .*{words}"):
                read_image(path)

    def test_an_image_of_too_many_pixels_is_not_decoded(self) -> None:
        from PIL import Image

        path = self.save(Image.new("L", (28, 28)))
        with mock.patch.object(Image, "MAX_IMAGE_PIXELS", 784):
            self.assertEqual(read_image(path).size, (28, 28))
        with (
            mock.patch.object(Image, "MAX_IMAGE_PIXELS", 391),
            mock.patch("PIL.ImageFile.ImageFile.load") as decode,
            self.assertRaisesRegex(DataError, f"{path}: not a readable image .*784 pixels.* limit of 782"),
        ):
            read_image(path)
        decode.assert_not_called()

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no pipes with names here")
    def test_a_pipe_is_not_waited_for(self) -> None:
        os.mkfifo(self.root / "pipe.png")
        found: list[str] = []

        def read() -> None:
            try:
                read_image(self.root / "pipe.png")
            except DataError as error:
                found.append(str(error))

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(10)
        self.assertIn("not a regular file", "".join(found))


class Splits(unittest.TestCase):
    def indices(self, parts: list[Subset]) -> list[list[int]]:
        return [list(part.indices) for part in parts]

    def test_random_parts_are_disjoint_and_follow_the_seed(self) -> None:
        dataset: Any = range(100)
        parts, again, other = (self.indices(split_dataset(dataset, seed=seed)) for seed in (1, 1, 2))
        self.assertEqual([len(part) for part in parts], [80, 10, 10])
        self.assertEqual(sorted(itertools.chain(*parts)), list(range(100)))
        self.assertEqual(parts, again)
        self.assertNotEqual(parts, other)
        self.assertNotEqual(sorted(parts[0]), list(range(80)))

    def test_stratified_parts_have_each_class_in_proportion(self) -> None:
        dataset: Any = range(100)
        labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[
            torch.randperm(100, generator=torch.Generator().manual_seed(0))
        ]
        parts = self.indices(split_dataset(dataset, labels=labels, seed=3))
        self.assertEqual(sorted(itertools.chain(*parts)), list(range(100)))
        counts = [torch.bincount(labels[part], minlength=3).tolist() for part in parts]
        self.assertEqual(counts, [[40, 24, 16], [5, 3, 2], [5, 3, 2]])
        self.assertEqual(parts, self.indices(split_dataset(dataset, labels=labels.tolist(), seed=3)))
        self.assertNotEqual(parts, self.indices(split_dataset(dataset, labels=labels, seed=4)))

    def test_stratified_sizes_hold_for_small_classes_too(self) -> None:
        # Five samples a class and a tenth of each: rounding class by class would leave the smaller parts empty.
        dataset: Any = range(100)
        parts = split_dataset(dataset, labels=torch.arange(20).repeat_interleave(5))
        self.assertEqual([len(part) for part in parts], [80, 10, 10])
        for count in (1, 7, 1000):
            for fractions in ((0.8, 0.1, 0.1), (1.0,), (0.07, 0.93)):
                labels = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(count))
                numbers: Any = range(count)
                found = self.indices(split_dataset(numbers, fractions, labels=labels))
                self.assertEqual(sorted(itertools.chain(*found)), list(range(count)))
                for fraction, part in zip(fractions, found, strict=True):
                    self.assertLess(abs(len(part) - fraction * count), 1)
                    for label in range(4):
                        share = fraction * int((labels == label).sum())
                        self.assertLess(abs(int((labels[part] == label).sum()) - share), 2)

    def test_wrong_arguments_are_explained(self) -> None:
        dataset: Any = range(10)
        with self.assertRaisesRegex(ValueError, "9 labels for 10 samples"):
            split_dataset(dataset, labels=[0] * 9)
        for fractions in ((0.5, 0.4), (1.5, -0.5), ()):
            for labels in (None, [0] * 10):
                with self.assertRaisesRegex(ValueError, "fractions must be positive and add up to 1"):
                    split_dataset(dataset, fractions, labels=labels)


class Workers(TempCase):
    PROGRAM = """
import multiprocessing, sys, time
from torch.utils.data import DataLoader
from torchbasics.data import end_with_parent

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    batches = iter(DataLoader(range(100), 1, num_workers=1, worker_init_fn=end_with_parent))
    next(batches)
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(60)
"""

    @unittest.skipUnless(Path("/proc/self").exists(), "reads the state of a process in /proc")
    def test_a_worker_that_was_not_forked_ends_when_the_training_is_killed(self) -> None:
        program = self.root / "program.py"
        program.write_text(self.PROGRAM)
        environment = os.environ | {"PYTHONPATH": os.getcwd()}
        with subprocess.Popen([sys.executable, program], env=environment, stdout=subprocess.PIPE, text=True) as process:
            self.addCleanup(process.kill)
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            process.kill()
        worker = Path(f"/proc/{pid}/stat")
        deadline = time.monotonic() + 3
        while worker.exists() and " Z " not in worker.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self.assertLess(time.monotonic(), deadline)


class Parts(unittest.TestCase):
    def test_sequences_are_padded_at_their_end(self) -> None:
        (padded, lengths), targets = pad_collate([(torch.tensor([1, 2, 3]), 5), (torch.tensor([4]), 6)], -1)
        self.assertEqual((padded.tolist(), lengths.tolist()), ([[1, 2, 3], [4, -1, -1]], [3, 1]))
        self.assertEqual((targets.tolist(), lengths.dtype, targets.dtype), ([5, 6], torch.int64, torch.int64))
        samples = [(torch.ones(n, 2), torch.tensor([float(n)])) for n in (1, 3)]
        (((padded, lengths), targets),) = DataLoader(samples, 2, collate_fn=pad_collate)  # type: ignore[arg-type]
        self.assertEqual((padded[0].tolist(), lengths.tolist()), ([[1, 1], [0, 0], [0, 0]], [1, 3]))
        self.assertEqual(targets.tolist(), [[1.0], [3.0]])

    def test_evaluation_sees_the_normalised_middle(self) -> None:
        from PIL import Image

        image = Image.new("RGB", (300, 400), (255, 0, 51))
        out = get_transforms(train=False)(image)
        self.assertEqual((tuple(out.shape), out.dtype), ((3, 224, 224), torch.float32))
        by_hand = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
        torch.testing.assert_close(out.mean((1, 2)), torch.tensor(by_hand), rtol=0, atol=1e-3)
        self.assertEqual(tuple(get_transforms(False, size=64)(image).shape), (3, 64, 64))
        picture = torch.zeros(3, 256, 256, dtype=torch.uint8)
        picture[:, 16:240, 16:240] = 255  # 224 of 256: so all that is left is white
        self.assertGreater(float(get_transforms(train=False)(picture).min()), 2.0)

    def test_training_is_the_default_and_changes_place_colour_and_hue(self) -> None:
        picture = torch.randint(0, 256, (3, 300, 250), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        transform = get_transforms(size=96)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            first, second = transform(picture), transform(picture)
            torch.manual_seed(1)
            self.assertTrue(torch.equal(first, transform(picture)))
            self.assertFalse(torch.equal(first, second))
            # green with no red or blue: brightness, contrast and saturation keep red and blue equal, hue does not
            green = torch.zeros(3, 20, 20, dtype=torch.uint8)
            green[1] = 200
            shown = get_transforms(size=8)(green) * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
            shown += torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        self.assertEqual(tuple(first.shape), (3, 96, 96))
        self.assertGreater(float((shown[0] - shown[2]).abs().min()), 0.05)

    def test_a_custom_dataset_gives_samples_and_labels(self) -> None:
        dataset = CustomDataset([1, 2, 3], ["a", "b", "c"], transform=lambda x: 10 * x)
        self.assertEqual([dataset[i] for i in range(len(dataset))], [(10, "a"), (20, "b"), (30, "c")])
        batches = list(DataLoader(CustomDataset(torch.arange(5.0), torch.arange(5)), 2))
        self.assertEqual([y.tolist() for _, y in batches], [[0, 1], [2, 3], [4]])
        with self.assertRaisesRegex(ValueError, "3 samples for 2 labels"):
            CustomDataset([1, 2, 3], [1, 2])

    def test_a_custom_dataset_turns_arrays_into_tensors_that_train(self) -> None:
        import numpy as np

        for labels, label_dtype in ((np.array([1, 2], np.int32), torch.int64), (np.array([0.5, 1.5]), torch.float32)):
            dataset = CustomDataset(np.arange(6.0).reshape(2, 3), labels)
            x, y = dataset[1]
            self.assertEqual((x.tolist(), y.item()), ([3, 4, 5], labels[1]))
            self.assertEqual((x.dtype, y.dtype), (torch.float32, label_dtype))
            ((x, y),) = DataLoader(dataset, 2)
            self.assertEqual((x.dtype, y.dtype, tuple(y.shape)), (torch.float32, label_dtype, (2,)))
        # a transform gets the array, whose last dimension is the channels for torchvision
        dataset = CustomDataset(np.zeros((2, 48, 40, 3), np.uint8), [0, 1], get_transforms(size=32))
        self.assertEqual(tuple(dataset[0][0].shape), (3, 32, 32))


if __name__ == "__main__":
    unittest.main()
