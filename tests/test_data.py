"""Batches and their order against plain PyTorch and hand calculation; splits, folders, transforms."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import select
import shutil
import signal
import struct
import tempfile
import threading
import time
import unittest
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from tests.test_mnist import idx, write_set
from torchbasics import data, digits
from torchbasics.data import (
    BatchOrder,
    CustomDataset,
    Images,
    RandomAffine,
    SeededImageFolder,
    TensorLoader,
    _pixel_centres,
    channel_statistics,
    folder_loader,
    get_transforms,
    load_images,
    load_mnist,
    load_splits,
    mix_seed,
    pad_collate,
    seeded,
    split_dataset,
)
from torchbasics.mnist import DataError


def images(count: int, channels: int = 1, height: int = 6, width: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def epoch_of(loader: Any) -> list[tuple[Tensor, Tensor]]:
    return [(inputs.clone(), targets.clone()) for inputs, targets in loader]


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(
        x.shape == u.shape and torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


class TempCase(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)


class Values(unittest.TestCase):
    def test_equals_a_plain_dataloader(self) -> None:
        inputs, targets = torch.randn(23, 3, generator=torch.Generator().manual_seed(1)), torch.arange(23)
        for drop_last in (False, True):
            loader = TensorLoader(inputs, targets, 5, drop_last=drop_last)
            plain = DataLoader(TensorDataset(inputs, targets), 5, drop_last=drop_last)
            self.assertEqual(len(loader), len(plain))
            self.assertTrue(same(epoch_of(loader), [tuple(batch) for batch in plain]))

    def test_shuffled_equals_a_plain_dataloader_of_the_same_order(self) -> None:
        inputs, targets = torch.randn(23, 3, generator=torch.Generator().manual_seed(1)), torch.arange(23)
        loader = TensorLoader(inputs, targets, 5, shuffle=True, seed=9)
        plain = DataLoader(TensorDataset(inputs, targets), 5, sampler=loader.batches.order().tolist())
        self.assertTrue(same(epoch_of(loader), [tuple(batch) for batch in plain]))

    def test_uint8_is_scaled_and_normalised(self) -> None:
        inputs = torch.tensor([[0, 51, 255], [102, 204, 1]], dtype=torch.uint8).view(2, 3, 1, 1)
        mean, std = (0.5, 0.25, 0.1), (0.5, 2.0, 0.1)
        ((batch, targets),) = TensorLoader(inputs, torch.tensor([4, 7]), 2, mean=mean, std=std)
        by_hand = [
            [(0 - 0.5) / 0.5, (0.2 - 0.25) / 2, (1 - 0.1) / 0.1],
            [(0.4 - 0.5) / 0.5, (0.8 - 0.25) / 2, (1 / 255 - 0.1) / 0.1],
        ]
        torch.testing.assert_close(batch.view(2, 3), torch.tensor(by_hand))
        self.assertEqual((batch.dtype, targets.tolist()), (torch.float32, [4, 7]))

    def test_default_normalisation_is_the_scale_from_0_to_1(self) -> None:
        ((batch, _),) = TensorLoader(images(4), torch.arange(4), 4)
        torch.testing.assert_close(batch, images(4).float() / 255)

    def test_other_types_pass_as_they_are(self) -> None:
        for inputs in (torch.randn(4, 2).double(), torch.arange(8).view(4, 2), torch.randn(4, 1, 3, 3).half()):
            ((batch, _),) = TensorLoader(inputs, torch.arange(4), 4)
            self.assertEqual(batch.dtype, inputs.dtype)
            self.assertTrue(torch.equal(batch, inputs))

    def test_the_data_stay_as_they_are(self) -> None:
        inputs = images(10)
        before, targets = inputs.clone(), torch.arange(10)
        for batch, labels in TensorLoader(inputs, targets, 4, mean=(0.3,), std=(0.2,), augment=RandomAffine()):
            batch.zero_()
            labels.zero_()
        self.assertTrue(torch.equal(inputs, before))
        self.assertEqual(targets.tolist(), list(range(10)))

    def test_wrong_arguments(self) -> None:
        x, y = images(10), torch.arange(10)
        for call, words in (
            (lambda: TensorLoader(x, y[:9]), "10 inputs for 9 targets"),
            (lambda: TensorLoader(x[:0], y[:0]), "empty"),
            (lambda: TensorLoader(x, y, 0), "batch_size.* got 0"),
            (lambda: TensorLoader(x, y, 11, drop_last=True), "batch of 11 is larger than the data set of 10"),
            (lambda: TensorLoader(x, y, limit_batches=0), "limit_batches"),
            (lambda: TensorLoader(x, y, rank=2, world_size=2), "rank must be between 0 and world_size - 1, got 2 of 2"),
            (lambda: TensorLoader(x.flatten(1), y, augment=RandomAffine()), r"\(N, C, H, W\), got shape \(10, 30\)"),
            (lambda: TensorLoader(x, y, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0)), "one a channel; got 3 and 3"),
            (lambda: TensorLoader(x, y, std=(0.0,)), "std must be positive"),
            (lambda: TensorLoader(x.float(), y, std=(0.3,)), "are for uint8 images, got torch.float32"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                call()


class Order(unittest.TestCase):
    def samples(self, loader: TensorLoader) -> list[int]:
        return [int(label) for _, targets in loader for label in targets]

    def loader(self, **options: Any) -> TensorLoader:
        return TensorLoader(images(57), torch.arange(57), 8, **{"shuffle": True, "seed": 3, **options})

    def test_every_sample_once_per_epoch(self) -> None:
        loader = self.loader()
        for _ in range(4):
            self.assertEqual(sorted(self.samples(loader)), list(range(57)))

    def test_reshuffled_each_epoch_and_repeatable(self) -> None:
        one, other = self.loader(), self.loader()
        epochs = [self.samples(one) for _ in range(3)]
        self.assertEqual(epochs, [self.samples(other) for _ in range(3)])
        self.assertEqual(len({tuple(epoch) for epoch in [*epochs, list(range(57))]}), 4)
        self.assertNotEqual(epochs[0], self.samples(self.loader(seed=4)))
        other.set_epoch(1)
        self.assertEqual(self.samples(other), epochs[1])

    def test_nobody_elses_draws_matter(self) -> None:
        expected = epoch_of(self.loader(augment=RandomAffine()))
        torch.manual_seed(123)
        torch.rand(17)
        loader, got = self.loader(augment=RandomAffine()), []
        for batch in loader:
            torch.rand(3)
            random.random()
            list(self.loader(seed=9))
            got.append(batch)
        self.assertTrue(same(got, expected))

    def test_nobody_elses_draws_are_disturbed(self) -> None:
        before = torch.get_rng_state(), random.getstate()
        list(self.loader(augment=RandomAffine()))
        self.assertTrue(torch.equal(before[0], torch.get_rng_state()))
        self.assertEqual(before[1], random.getstate())

    def test_not_shuffled(self) -> None:
        loader = self.loader(shuffle=False)
        for _ in range(2):
            self.assertEqual(self.samples(loader), list(range(57)))

    def test_drop_last_and_limit(self) -> None:
        loader = self.loader(drop_last=True)
        self.assertEqual((len(loader), [len(y) for _, y in loader]), (7, [8] * 7))
        loader = self.loader(limit_batches=3)
        whole = self.samples(self.loader())
        self.assertEqual((len(loader), self.samples(loader)), (3, whole[:24]))
        self.assertEqual((loader.batches.epoch, len(self.loader(limit_batches=100))), (1, 8))

    def test_seeds_that_are_near_give_unrelated_orders(self) -> None:
        self.assertEqual(len({mix_seed(seed, epoch) for seed in range(30) for epoch in range(30)}), 900)
        self.assertNotEqual(mix_seed(1, 23), mix_seed(12, 3))
        self.assertTrue(all(0 <= mix_seed(n) < 2**63 for n in range(100)))

    def test_order_is_uniform(self) -> None:
        # Each of 4 samples is first in a quarter of 2000 epochs, with a standard deviation of 19.4.
        order = BatchOrder(4, 1, shuffle=True, seed=0)
        first: Counter[int] = Counter()
        for epoch in range(2000):
            order.set_epoch(epoch)
            first[int(order.order()[0])] += 1
        self.assertLess(max(abs(first[i] - 500) for i in range(4)), 5 * 19.4)


class Position(unittest.TestCase):
    def loader(self) -> TensorLoader:
        return TensorLoader(images(30), torch.arange(30), 7, shuffle=True, seed=5, augment=RandomAffine())

    def test_resumed_anywhere_equals_the_uninterrupted(self) -> None:
        reference = self.loader()
        whole = [batch for _ in range(3) for batch in epoch_of(reference)]
        for done in range(1, 15):
            loader, states, count = self.loader(), [], 0
            while count < done:
                for _ in loader:
                    count += 1
                    if count == done:
                        states.append(loader.state_dict())
                        break
            resumed, rest = self.loader(), []
            resumed.load_state_dict(states[0])
            for _ in range(3):
                if resumed.batches.epoch < 3:
                    rest += epoch_of(resumed)
            self.assertTrue(same(rest, whole[done:]), done)

    def test_the_state_counts_what_was_given_out(self) -> None:
        loader = self.loader()
        seen = [loader.state_dict()]
        for _ in loader:
            seen.append(loader.state_dict())
        self.assertEqual(seen, [{"epoch": 0, "batch": i} for i in range(6)])
        self.assertEqual(loader.state_dict(), {"epoch": 1, "batch": 0})

    def test_leaving_an_iteration_then_iterating_anew_starts_the_epoch_again(self) -> None:
        loader = self.loader()
        expected = epoch_of(self.loader())
        for _ in loader:
            break
        self.assertTrue(same(epoch_of(loader), expected))
        self.assertEqual(loader.batches.epoch, 1)

    def test_loading_a_state_forgets_a_begun_iteration(self) -> None:
        loader = self.loader()
        expected = epoch_of(self.loader())
        next(iter(loader))
        loader.load_state_dict({"epoch": 0, "batch": 3})
        self.assertTrue(same(epoch_of(loader), expected[3:]))

    def test_a_loaded_position_counts_once(self) -> None:
        loader, expected = self.loader(), epoch_of(self.loader())
        loader.load_state_dict({"epoch": 0, "batch": 3})
        next(iter(loader))
        self.assertTrue(same(epoch_of(loader), expected))

    def test_a_position_beyond_the_epoch(self) -> None:
        for batch in (6, -1):
            with self.assertRaisesRegex(ValueError, f"position {batch} lies beyond the 5 batches"):
                self.loader().load_state_dict({"epoch": 0, "batch": batch})


class ManyProcesses(unittest.TestCase):
    def test_the_parts_make_the_batch_of_one_process_bit_for_bit(self) -> None:
        for count in (1, 5, 7, 100):
            inputs, targets = images(count), torch.arange(count)
            options: dict[str, Any] = {
                "shuffle": True,
                "seed": 2,
                "augment": RandomAffine(),
                "mean": (0.2,),
                "std": (0.3,),
            }
            for _ in range(2):
                alone = TensorLoader(inputs, targets, 6, world_size=1, rank=0, **options)
                whole = epoch_of(alone) + epoch_of(alone)
                for world_size in (1, 2, 3):
                    loaders = [
                        TensorLoader(inputs, targets, 6, rank=rank, world_size=world_size, **options)
                        for rank in range(world_size)
                    ]
                    parts = [epoch_of(loader) + epoch_of(loader) for loader in loaders]
                    self.assertEqual({len(part) for part in parts}, {len(whole)})  # as many steps on each, none waits
                    together = [
                        (torch.cat([x for x, _ in step]), torch.cat([y for _, y in step]))
                        for step in zip(*parts, strict=True)
                    ]
                    self.assertTrue(same(together, whole), (count, world_size))
                    sizes = [[len(y) for _, y in step] for step in zip(*parts, strict=True)]
                    self.assertTrue(all(max(size) - min(size) <= 1 for size in sizes), sizes)

    def test_rank_and_world_size_default_to_those_of_the_process(self) -> None:
        with (
            mock.patch("torchbasics.distributed.rank", lambda: 1),
            mock.patch("torchbasics.distributed.world_size", lambda: 2),
        ):
            loader = TensorLoader(images(10), torch.arange(10), 10)
        self.assertEqual([y.tolist() for _, y in loader], [[5, 6, 7, 8, 9]])


class Affine(unittest.TestCase):
    """RandomAffine against torchvision's transforms and against what needs no interpolation."""

    def picture(self, height: int, width: int) -> Tensor:
        return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))

    def test_draws_of_nought_are_the_identity(self) -> None:
        for size in ((28, 28), (5, 9)):
            picture = self.picture(*size)
            torch.testing.assert_close(RandomAffine()(picture, torch.zeros(2, 3)), picture, rtol=0, atol=1e-5)

    def test_shift_by_whole_pixels_is_a_roll_with_black_coming_in(self) -> None:
        for height, width in ((20, 20), (10, 20)):
            picture = self.picture(height, width)
            for right, down in ((2, 0), (0, 1), (-4, 3)):
                draws = torch.tensor([[0.0, -right / width / 0.2, -down / height / 0.2]] * 2)
                moved = RandomAffine(10, 0.2)(picture, draws)
                expected = torch.zeros_like(picture)
                source = picture[..., max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
                expected[..., max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = source
                torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4)

    def test_a_quarter_turn_is_rot90(self) -> None:
        picture = self.picture(16, 16)
        for draw in (1.0, -1.0):
            turned = RandomAffine(degrees=90)(picture, torch.tensor([[draw, 0.0, 0.0]] * 2))
            torch.testing.assert_close(turned, torch.rot90(picture, int(draw), (2, 3)), rtol=0, atol=1e-4)
        half = RandomAffine(degrees=180)(self.picture(7, 12), torch.tensor([[1.0, 0.0, 0.0]] * 2))
        torch.testing.assert_close(half, self.picture(7, 12).flip(2, 3), rtol=0, atol=1e-4)

    def test_equals_torchvision_on_any_shape(self) -> None:
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as tv

        for height, width in ((28, 28), (15, 24), (24, 15)):
            picture = self.picture(height, width)
            for draw in (1.0, -0.5, 0.3):
                ours = RandomAffine(30)(picture, torch.tensor([[draw, 0.0, 0.0]] * 2))
                theirs = tv.rotate(picture, 30 * draw, interpolation=InterpolationMode.BILINEAR)  # black outside
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)

    def test_shift_and_rotation_are_those_of_the_draws(self) -> None:
        """A bright dot on a black ground, followed: where it lands is computed with complex numbers."""
        height, width = 41, 61
        picture = torch.zeros(1, 1, height, width)
        picture[0, 0, 25, 40] = 1.0  # 10 right of the middle, 5 below it
        draws = torch.tensor([[0.7, 0.5, -0.8]])
        moved = RandomAffine(20, 0.1)(picture, draws)[0, 0]
        rows, columns = torch.arange(height).view(-1, 1) - 20, torch.arange(width) - 30
        found = complex(float((moved * columns).sum() / moved.sum()), float((moved * rows).sum() / moved.sum()))
        turn = complex(math.cos(math.radians(14)), math.sin(math.radians(14)))
        # output p shows input turn·p + shift
        expected = (complex(10, 5) - complex(0.5 * 0.1 * width, -0.8 * 0.1 * height)) / turn
        self.assertLess(abs(found - expected), 0.3)

    def test_resizing_against_interpolation(self) -> None:
        """Twice as wide and half as high a part of the picture, by torch's own interpolation of its middle."""
        picture = self.picture(16, 16)
        affine = RandomAffine(scale=0.5)
        shown = affine(picture, torch.tensor([[0.0, 0.0, 0.0, -1.0, -1.0]] * 2))  # the middle half, enlarged
        larger = torch.nn.functional.interpolate(picture, scale_factor=2, mode="bilinear", align_corners=False)
        torch.testing.assert_close(shown, larger[..., 8:24, 8:24], rtol=0, atol=1e-4)
        dot = torch.zeros(1, 1, 41, 61)
        dot[0, 0, 30, 50] = 1.0  # 20 right of the middle, 10 below it
        moved = affine(dot, torch.tensor([[0.0, 0.0, 0.0, 0.5, -0.4]]))[0, 0]
        rows, columns = torch.arange(41).view(-1, 1) - 20, torch.arange(61) - 30
        self.assertAlmostEqual(float((moved * columns).sum() / moved.sum()), 20 / 1.25, delta=0.3)  # a narrower picture
        self.assertAlmostEqual(float((moved * rows).sum() / moved.sum()), 10 / 0.8, delta=0.3)
        self.assertEqual(tuple(affine.draw(7, torch.Generator().manual_seed(0)).shape), (7, 5))
        with self.assertRaisesRegex(ValueError, "scale .* got 1"):
            RandomAffine(scale=1)

    def test_samples_are_changed_independently(self) -> None:
        picture = self.picture(12, 12)
        affine = RandomAffine(45, 0.3, 0.2)
        draws = affine.draw(2, torch.Generator().manual_seed(0))
        both = affine(picture, draws)
        alone = torch.cat([affine(picture[i : i + 1], draws[i : i + 1]) for i in range(2)])
        self.assertTrue(torch.equal(both, alone))
        twins = affine(picture[:1].expand(2, -1, -1, -1), draws)
        self.assertFalse(torch.equal(twins[0], twins[1]))

    def test_draws_are_uniform_between_minus_1_and_1(self) -> None:
        draws = RandomAffine().draw(30_000, torch.Generator().manual_seed(0))
        self.assertEqual(tuple(draws.shape), (30_000, 3))
        self.assertLessEqual(float(draws.abs().max()), 1)
        # mean 0 ± 5 / sqrt(3 n), mean square 1/3
        self.assertLess(float(draws.mean(0).abs().max()), 5 / math.sqrt(90_000))
        self.assertLess(float((draws.square().mean(0) - 1 / 3).abs().max()), 0.01)

    def test_augmentation_differs_by_epoch_and_stays_near(self) -> None:
        inputs = images(6, height=28, width=28)
        loader = TensorLoader(inputs, torch.arange(6), 6, augment=RandomAffine())
        ((first, _),) = loader
        ((second, _),) = loader
        self.assertFalse(torch.equal(first, second))

    def test_no_samples(self) -> None:
        self.assertEqual(tuple(RandomAffine()(torch.zeros(0, 1, 28, 28), torch.zeros(0, 3)).shape), (0, 1, 28, 28))

    def test_what_torch_makes_by_default_changes_nothing(self) -> None:
        def epoch() -> list[Tensor]:
            _pixel_centres.cache_clear()
            data = torch.full((6, 1, 8, 8), 100, dtype=torch.uint8, device="cpu"), torch.arange(6, device="cpu")
            return [x for x, _ in TensorLoader(*data, 3, shuffle=True, augment=RandomAffine(scale=0.1))]

        expected = epoch()
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        self.assertTrue(all(map(torch.equal, epoch(), expected)))
        torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            self.assertTrue(all(map(torch.equal, epoch(), expected)))


class Statistics(unittest.TestCase):
    def test_against_float64(self) -> None:
        inputs = images(40, channels=3, height=9, width=7)
        exact = inputs.double() / 255
        mean, std = channel_statistics(inputs)
        for channel in range(3):
            self.assertAlmostEqual(mean[channel], float(exact[:, channel].mean()), places=12)
            self.assertAlmostEqual(std[channel], float(exact[:, channel].std(correction=0)), places=12)

    def test_one_colour_has_no_zero_to_divide_by(self) -> None:
        self.assertEqual(channel_statistics(torch.full((3, 1, 2, 2), 51, dtype=torch.uint8)), ((0.2,), (1.0,)))

    def test_normalised_by_them_data_have_mean_0_and_deviation_1(self) -> None:
        inputs = images(50, channels=2)
        mean, std = channel_statistics(inputs)
        ((batch, _),) = TensorLoader(inputs, torch.arange(50), 50, mean=mean, std=std)
        torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-5, rtol=0)


class Loading(TempCase):
    def test_load_mnist(self) -> None:
        raw = write_set(self.root, "kmnist", train=20, test=6)
        train, test = load_mnist(8, self.root, name="kmnist", seed=1, download=False)
        self.assertEqual((len(train), len(test)), (3, 1))
        pixels = torch.frombuffer(
            bytearray((raw / "train-images-idx3-ubyte").read_bytes()[16:]), dtype=torch.uint8
        ).view(20, 1, 28, 28)
        mean, std = channel_statistics(pixels)
        got = sorted(
            ((int(y), x) for xs, ys in train for x, y in zip(xs, ys, strict=True)),
            key=lambda pair: (pair[0], float(pair[1][0, 0, 0])),
        )
        by_hand = (pixels.double() / 255 - mean[0]) / std[0]
        expected = sorted(
            ((i % 10, by_hand[i]) for i in range(20)), key=lambda pair: (pair[0], float(pair[1][0, 0, 0]))
        )
        for (label, picture), (right, value) in zip(got, expected, strict=True):
            self.assertEqual(label, right)
            torch.testing.assert_close(picture.double(), value, rtol=0, atol=1e-5)
        self.assertEqual([y.tolist() for _, y in test], [[0, 1, 2, 3, 4, 5]])  # not shuffled, nor augmented
        self.assertNotEqual([int(label) for _, y in train for label in y], [i % 10 for i in range(20)])

    def test_mnist_is_normalised_by_the_known_constants(self) -> None:
        fake = data.Images(images(4, height=28, width=28), torch.arange(4), data.CLASSES["mnist"])
        with mock.patch.object(data, "load_images", lambda *_: fake):
            _, test = load_mnist(4)
        ((batch, _),) = test
        torch.testing.assert_close(batch, (fake.inputs.float() / 255 - 0.1307) / 0.3081, rtol=0, atol=1e-5)

    def test_augmentation_is_for_training_only(self) -> None:
        write_set(self.root, "kmnist")
        train, test = load_mnist(8, self.root, name="kmnist", augment=True, download=False)
        self.assertIsInstance(train.augment, RandomAffine)
        self.assertIsNone(test.augment)

    def test_drawn_digits(self) -> None:
        asked = []

        def few(count: int, seed: int) -> tuple[Tensor, Tensor]:
            asked.append((count, seed))
            return real(40, seed)

        real = digits.draw_digits
        with mock.patch.object(digits, "draw_digits", few):
            train, test = load_images("digits"), load_images("digits", train=False)
        self.assertEqual(asked, [(60_000, 0), (10_000, 1)])
        for part in (train, test):
            self.assertEqual((tuple(part.inputs.shape), part.inputs.dtype), ((40, 1, 28, 28), torch.uint8))
            self.assertEqual((part.targets.dtype, len(part.classes), len(part)), (torch.int64, 10, 40))
        self.assertFalse(torch.equal(train.inputs, test.inputs))

    def test_subset(self) -> None:
        whole = data.Images(images(6), torch.arange(6), ("a",))
        for part, expected in ((whole.subset(torch.tensor([4, 0])), [4, 0]), (whole.subset(slice(2, 4)), [2, 3])):
            self.assertEqual(part.targets.tolist(), expected)
            self.assertTrue(torch.equal(part.inputs, whole.inputs[expected]))

    def test_a_part_that_is_there_needs_no_network(self) -> None:
        raw = write_set(self.root, "kmnist")
        for path in raw.glob("t10k*"):
            path.unlink()
        with mock.patch.object(data, "download_mnist") as download:
            self.assertEqual(len(load_images("kmnist", self.root)), 12)
            download.assert_not_called()
            with self.assertRaises(FileNotFoundError):
                load_images("kmnist", self.root, train=False)
            download.assert_called_once()
        (raw / "train-labels-idx1-ubyte").write_bytes(idx(0x0801, (12,), bytes([77] * 12)))
        with self.assertRaises(DataError):
            load_images("kmnist", self.root)


def write_images(root: Path, mode: str = "L") -> None:
    """Three classes of 3, 2 and 4 images, each of one grey that tells which it is."""
    from PIL import Image

    for label, (name, count) in enumerate((("b", 3), ("a", 2), ("c", 4))):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("L", (6, 4), 20 * label + i).convert(mode).save(root / name / f"{i}.png")


def random_pair(image: Any) -> Tensor:
    """A transform that draws from both of the generators that transforms use."""
    return torch.tensor([image.getpixel((0, 0)), float(torch.rand(())), random.random()], dtype=torch.float64)


def tuple_of(batches: Any) -> list[tuple[Tensor, Tensor]]:
    return [(x.clone(), y.clone()) for x, y in batches]


class Folders(TempCase):
    def setUp(self) -> None:
        super().setUp()
        write_images(self.root)

    def folder(self, **options: Any) -> SeededImageFolder:
        return SeededImageFolder(self.root, random_pair, **{"seed": 4, **options})

    def test_classes_and_samples(self) -> None:
        folder = self.folder()
        self.assertEqual(folder.classes, ("a", "b", "c"))
        self.assertEqual(folder.targets.tolist(), [0, 0, 1, 1, 1, 2, 2, 2, 2])
        self.assertEqual([int(folder[i][0][0]) for i in range(len(folder))], [20, 21, 0, 1, 2, 40, 41, 42, 43])
        self.assertEqual([folder[i][1] for i in range(len(folder))], folder.targets.tolist())

    def test_random_transforms_depend_on_seed_epoch_and_index_alone(self) -> None:
        folder = self.folder()
        keys = [(index, epoch) for epoch in range(3) for index in range(9)]
        first = {key: folder[key][0] for key in keys}
        random.Random(0).shuffle(keys)
        torch.manual_seed(99)
        for key in keys:
            torch.rand(2)
            self.assertTrue(torch.equal(self.folder()[key][0], first[key]))
        self.assertEqual(len({float(value[1]) for value in first.values()}), 27)
        self.assertEqual(len({float(value[2]) for value in first.values()}), 27)
        self.assertTrue(torch.equal(folder[3][0], first[3, 0]))
        self.assertFalse(torch.equal(self.folder(seed=5)[3][0], first[3, 0]))

    def test_an_index_is_the_same_in_any_form(self) -> None:
        folder = self.folder()
        forms: tuple[Any, ...] = (torch.tensor(8), -1)
        for form in forms:
            self.assertTrue(torch.equal(folder[form][0], folder[8][0]))
        with self.assertRaises(IndexError):
            folder[9]

    def test_images_at_any_depth_but_no_hidden_ones(self) -> None:
        write_images(self.root / "d" / "2024")
        (self.root / "a" / "._x.png").write_bytes(b"of macOS")
        (self.root / "b" / ".thumbnails").mkdir()
        shutil.copy(next((self.root / "a").glob("[!.]*.png")), self.root / "b" / ".thumbnails" / "small.png")
        folder = self.folder()
        self.assertEqual(folder.classes, ("a", "b", "c", "d"))
        self.assertEqual(folder.targets.bincount().tolist(), [2, 3, 4, 9])
        self.assertEqual(len([folder[i] for i in range(len(folder))]), 18)

    def test_a_transform_that_draws_from_numpy(self) -> None:
        try:
            import numpy
        except ImportError:
            self.skipTest("needs NumPy")
        folder = SeededImageFolder(self.root, lambda image: numpy.random.rand(), seed=2**40)
        numpy.random.seed(1)
        expected = numpy.random.rand(2).tolist()
        numpy.random.seed(1)
        found = [numpy.random.rand(), folder[0][0], folder[1, 3][0], folder[0][0], numpy.random.rand()]
        self.assertEqual(found[1], found[3])
        self.assertNotEqual(found[1], found[2])
        self.assertEqual([found[0], found[4]], expected)

    def test_the_global_generators_stay_where_they_are(self) -> None:
        folder = self.folder()
        before = torch.get_rng_state(), random.getstate()
        folder[0]
        self.assertTrue(torch.equal(before[0], torch.get_rng_state()))
        self.assertEqual(before[1], random.getstate())
        with self.assertRaises(ZeroDivisionError), seeded(1):
            torch.rand(5)
            _ = 1 / 0
        self.assertTrue(torch.equal(before[0], torch.get_rng_state()))

    def test_seeded_draws_what_a_seeded_generator_draws(self) -> None:
        with seeded(17):
            got = torch.rand(3), random.random()
        self.assertTrue(torch.equal(got[0], torch.rand(3, generator=torch.Generator().manual_seed(17))))
        self.assertEqual(got[1], random.Random(17).random())

    def test_workers_change_nothing(self) -> None:
        def epochs(workers: int) -> list[tuple[Tensor, Tensor]]:
            loader = folder_loader(self.folder(), 4, shuffle=True, seed=8, num_workers=workers)
            return tuple_of(loader) + tuple_of(loader)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of forking with threads
            alone, workers = epochs(0), epochs(2)
        self.assertTrue(same(alone, workers))
        self.assertEqual(len(alone), 6)
        self.assertFalse(same(alone[:3], alone[3:]))
        for part in (alone[:3], alone[3:]):
            self.assertEqual(
                sorted(int(x) for batch, _ in part for x in batch[:, 0]), [0, 1, 2, 20, 21, 40, 41, 42, 43]
            )

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_workers_end_with_a_process_that_is_killed(self) -> None:
        alive, written = os.pipe()  # at its end when the last process that may write is gone
        until, held = os.pipe()

        def read_slowly(image: Any) -> Any:
            if multiprocessing.parent_process() is not None:
                os.write(written, b"x")
                time.sleep(30)
            return random_pair(image)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of forking with threads
            child = os.fork()
        if not child:
            signal.alarm(20)
            try:
                os.close(held)
                batches = iter(folder_loader(SeededImageFolder(self.root, read_slowly), 2, num_workers=2))
                if not os.fork():  # one that lives on, and has inherited by what the workers see their parent's end
                    os.close(written)
                    os.read(until, 1)
                    os._exit(0)
                next(batches)
            finally:
                os._exit(1)
        os.close(written)
        os.close(until)
        try:
            self.assertEqual(os.read(alive, 1), b"x")
        finally:
            time.sleep(0.1)  # so that the fork has been
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        end = time.monotonic() + 10
        while select.select([alive], [], [], max(0.0, end - time.monotonic()))[0] and os.read(alive, 1):
            pass
        os.close(alive)
        os.close(held)
        self.assertLess(time.monotonic(), end, "a worker lives on")

    def test_the_loader_goes_on_at_a_position(self) -> None:
        def loader() -> DataLoader:
            return folder_loader(self.folder(), 2, shuffle=True, seed=8)

        reference = loader()
        whole = tuple_of(reference) + tuple_of(reference)
        for done in (0, 1, 4, 5, 7):
            resumed = loader()
            resumed.batch_sampler.load_state_dict({"epoch": done // 5, "batch": done % 5})  # type: ignore[union-attr]
            rest = tuple_of(resumed) + (tuple_of(resumed) if done < 5 else [])
            self.assertTrue(same(rest, whole[done:]), done)

    def test_some_of_the_samples(self) -> None:
        loader = folder_loader(self.folder(), 2, indices=[8, 0, 5], limit_batches=5)
        self.assertEqual([x[:, 0].tolist() for x, _ in loader], [[43, 20], [40]])
        self.assertEqual([y.tolist() for _, y in loader], [[2, 0], [2]])
        self.assertEqual(len(loader), 2)

    def test_the_parts_of_many_processes_make_the_batch_of_one(self) -> None:
        whole = tuple_of(folder_loader(self.folder(), 4, shuffle=True, seed=1))
        parts = []
        for rank in range(3):
            with (
                mock.patch("torchbasics.distributed.rank", lambda r=rank: r),
                mock.patch("torchbasics.distributed.world_size", lambda: 3),
            ):
                parts.append(tuple_of(folder_loader(self.folder(), 4, shuffle=True, seed=1)))
        self.assertEqual([len(y) for _, y in whole], [4, 4, 1])  # so two of three have nothing of the last
        together = [
            (torch.cat([x for x, _ in step]), torch.cat([y for _, y in step])) for step in zip(*parts, strict=True)
        ]
        self.assertTrue(same(together, whole))

    def test_modes(self) -> None:
        with tempfile.TemporaryDirectory() as other:
            write_images(Path(other), "RGB")
            for root, mode, expected in (
                (self.root, None, "L"),
                (other, None, "RGB"),
                (self.root, "RGB", "RGB"),
                (other, "L", "L"),
            ):
                folder = SeededImageFolder(root, lambda image: image.mode, mode=mode)
                self.assertEqual([folder[i][0] for i in range(9)], [expected] * 9)

    def test_sixteen_bits_are_scaled_not_clipped(self) -> None:
        from PIL import Image

        values = [0, 257, 25700, 65535]  # 257 is one step of 255
        for name, mode, order in (("0.png", "I;16", "<"), ("0.tif", "I;16", "<"), ("0.tif", "I;16B", ">")):
            path = self.root / "a" / name
            (self.root / "a" / "0.png").unlink(missing_ok=True)
            Image.frombytes(mode, (4, 1), struct.pack(f"{order}4H", *values)).save(path)
            with Image.open(path) as saved:
                self.assertEqual(saved.mode, mode)
            folder = SeededImageFolder(self.root)
            self.assertEqual((folder.mode, list(folder[0][0].tobytes())), ("L", [0, 1, 100, 255]))
            colour = SeededImageFolder(self.root, mode="RGB")[0][0]
            self.assertEqual(list(colour.tobytes()), [0, 0, 0, 1, 1, 1, 100, 100, 100, 255, 255, 255])

    def test_without_a_transform_an_item_is_an_image(self) -> None:
        image, label = SeededImageFolder(self.root)[2]
        self.assertEqual((image.size, image.mode, image.getpixel((5, 3)), label), ((6, 4), "L", 0, 1))

    def test_other_files_and_hidden_folders_are_passed_over(self) -> None:
        (self.root / "a" / "notes.txt").write_text("no image")
        (self.root / "readme.png").write_text("not in a class")
        (self.root / ".hidden").mkdir()
        (self.root / ".hidden" / "x.png").write_text("no image")
        self.assertEqual((len(self.folder()), self.folder().classes), (9, ("a", "b", "c")))

    def test_a_bad_image_is_named(self) -> None:
        for content in (b"no image", b"", (self.root / "c" / "1.png").read_bytes()[:-30]):
            path = self.root / "c" / "2.png"
            path.write_bytes(content)
            with self.assertRaises(DataError) as caught:
                self.folder()[7]
            self.assertIn(f"{path}: not a readable image", str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no pipes with names here")
    def test_what_would_wait_or_start_another_program_is_not_opened(self) -> None:
        path = self.root / "c" / "2.png"
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
        with self.assertRaisesRegex(DataError, "cannot identify"):  # PIL would have Ghostscript draw it
            self.folder()[7]
        path.unlink()
        os.mkfifo(path)
        found = []

        def read() -> None:
            try:
                self.folder()[7]
            except DataError as error:
                found.append(str(error))

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(10)
        self.assertIn("not a regular file", "".join(found))

    def test_nothing_to_read(self) -> None:
        with tempfile.TemporaryDirectory() as empty:
            for root, words in (
                (empty, "no images; expected one folder per class"),
                (Path(empty) / "x", "cannot be read as a folder"),
                (self.root / "a" / "0.png", "cannot be read as a folder"),
            ):
                with self.assertRaises(DataError) as caught:
                    SeededImageFolder(root)
                self.assertIn(f"{root}: {words}", str(caught.exception))


class Splits(unittest.TestCase):
    def indices(self, parts: list[Subset]) -> list[list[int]]:
        return [list(part.indices) for part in parts]

    def test_random(self) -> None:
        dataset = list(range(100))
        parts = split_dataset(dataset, seed=1)  # type: ignore[arg-type]
        self.assertEqual([len(part) for part in parts], [80, 10, 10])
        self.assertEqual(sorted(i for part in self.indices(parts) for i in part), dataset)
        self.assertEqual(self.indices(parts), self.indices(split_dataset(dataset, seed=1)))  # type: ignore[arg-type]
        self.assertNotEqual(self.indices(parts), self.indices(split_dataset(dataset, seed=2)))  # type: ignore[arg-type]
        self.assertNotEqual(sorted(self.indices(parts)[0]), list(range(80)))

    def test_stratified(self) -> None:
        labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[
            torch.randperm(100, generator=torch.Generator().manual_seed(0))
        ]
        parts = self.indices(split_dataset(list(range(100)), labels=labels, seed=3))  # type: ignore[arg-type]
        self.assertEqual(sorted(i for part in parts for i in part), list(range(100)))
        counts = [torch.bincount(labels[part], minlength=3).tolist() for part in parts]
        self.assertEqual(counts, [[40, 24, 16], [5, 3, 2], [5, 3, 2]])
        again = self.indices(split_dataset(list(range(100)), labels=labels.tolist(), seed=3))  # type: ignore[arg-type]
        self.assertEqual(parts, again)
        self.assertNotEqual(parts, self.indices(split_dataset(list(range(100)), labels=labels, seed=4)))  # type: ignore[arg-type]

    def test_stratified_counts_hold_for_small_classes_too(self) -> None:
        # Five samples a class and a tenth of each: rounding class by class would leave the smaller parts empty.
        labels = torch.arange(20).repeat_interleave(5)
        parts = split_dataset(list(range(100)), (0.8, 0.1, 0.1), labels=labels)  # type: ignore[arg-type]
        self.assertEqual([len(part) for part in parts], [80, 10, 10])
        for count in (1, 2, 7, 99, 1000):
            for fractions in ((0.8, 0.1, 0.1), (0.5, 0.5), (1.0,), (0.07, 0.93)):
                labels = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(count))
                found = self.indices(split_dataset(list(range(count)), fractions, labels=labels))  # type: ignore[arg-type]
                self.assertEqual(sorted(i for part in found for i in part), list(range(count)))
                for fraction, part in zip(fractions, found, strict=True):
                    self.assertLess(abs(len(part) - fraction * count), 1)
                    for label in range(4):
                        share = fraction * int((labels == label).sum())
                        self.assertLess(abs(int((labels[part] == label).sum()) - share), 2)

    def test_wrong_arguments(self) -> None:
        dataset = list(range(10))
        with self.assertRaisesRegex(ValueError, "9 labels for 10 samples"):
            split_dataset(dataset, labels=[0] * 9)  # type: ignore[arg-type]
        for fractions in ((0.5, 0.4), (1.5, -0.5), ()):
            for labels in (None, [0] * 10):
                with self.assertRaisesRegex(ValueError, "fractions must be positive and add up to 1"):
                    split_dataset(dataset, fractions, labels=labels)  # type: ignore[arg-type]


class Parts(unittest.TestCase):
    def test_pad_collate(self) -> None:
        padded, lengths, targets = pad_collate([(torch.tensor([1, 2, 3]), 5), (torch.tensor([4]), 6)], padding_value=-1)
        self.assertEqual(
            (padded.tolist(), lengths.tolist(), targets.tolist()), ([[1, 2, 3], [4, -1, -1]], [3, 1], [5, 6])
        )
        self.assertEqual(lengths.dtype, torch.int64)
        padded, _, targets = pad_collate(
            [(torch.ones(1, 2), torch.tensor([1.0])), (torch.ones(3, 2), torch.tensor([2.0]))]
        )
        self.assertEqual((tuple(padded.shape), targets.tolist()), ((2, 3, 2), [[1.0], [2.0]]))
        self.assertEqual(padded[0].tolist(), [[1, 1], [0, 0], [0, 0]])

    def test_pad_collate_in_a_dataloader(self) -> None:
        samples = [(torch.arange(n), n) for n in (2, 5, 1)]
        ((padded, lengths, targets),) = DataLoader(samples, 3, collate_fn=pad_collate)  # type: ignore[arg-type]
        self.assertEqual((tuple(padded.shape), lengths.tolist(), targets.tolist()), ((3, 5), [2, 5, 1], [2, 5, 1]))

    def test_transforms_for_evaluation(self) -> None:
        from PIL import Image

        transform = get_transforms(train=False)
        image = Image.new("RGB", (300, 400), (255, 0, 51))
        out = transform(image)
        self.assertEqual((tuple(out.shape), out.dtype), ((3, 224, 224), torch.float32))
        by_hand = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
        torch.testing.assert_close(out.mean((1, 2)), torch.tensor(by_hand), rtol=0, atol=1e-3)
        self.assertTrue(torch.equal(out, transform(image)))
        self.assertEqual(tuple(get_transforms(False, size=64)(image).shape), (3, 64, 64))
        self.assertEqual(tuple(transform(torch.zeros(3, 300, 250, dtype=torch.uint8)).shape), (3, 224, 224))

    def test_evaluation_sees_the_middle(self) -> None:
        picture = torch.zeros(3, 256, 256, dtype=torch.uint8)
        picture[:, 16:240, 16:240] = 255  # 224 of 256: so all that is left is white
        out = get_transforms(train=False)(picture)
        self.assertGreater(float(out.min()), 2.0)

    def test_transforms_for_training(self) -> None:
        picture = torch.randint(0, 256, (3, 300, 250), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        transform = get_transforms(train=True, size=96)
        with seeded(1):
            first, second = transform(picture), transform(picture)
        with seeded(1):
            again = transform(picture)
        self.assertEqual(tuple(first.shape), (3, 96, 96))
        self.assertTrue(torch.equal(first, again))
        self.assertFalse(torch.equal(first, second))

    def test_custom_dataset(self) -> None:
        dataset = CustomDataset([1, 2, 3], ["a", "b", "c"], transform=lambda x: 10 * x)
        self.assertEqual((len(dataset), [dataset[i] for i in range(3)]), (3, [(10, "a"), (20, "b"), (30, "c")]))
        self.assertEqual(CustomDataset([1], [2])[0], (1, 2))
        batches = list(DataLoader(CustomDataset(torch.arange(5.0), torch.arange(5)), 2))
        self.assertEqual([y.tolist() for _, y in batches], [[0, 1], [2, 3], [4]])
        with self.assertRaisesRegex(ValueError, "3 samples for 2 labels"):
            CustomDataset([1, 2, 3], [1, 2])


class Grid(unittest.TestCase):
    def test_it_samples_as_affine_grid_does(self) -> None:
        generator = torch.Generator().manual_seed(1)
        for height, width in ((28, 28), (8, 20), (1, 3)):
            images, draws = torch.rand(5, 2, height, width, generator=generator), torch.rand(5, 3, generator=generator)
            cos, sin = torch.cos(draws[:, 0] * math.radians(10)), torch.sin(draws[:, 0] * math.radians(10))
            rows = (cos, -sin * height / width, draws[:, 1] / 5, sin * width / height, cos, draws[:, 2] / 5)
            matrix = torch.stack(rows, dim=1).view(5, 2, 3)
            grid = torch.nn.functional.affine_grid(matrix, [5, 2, height, width], align_corners=False)
            expected = torch.nn.functional.grid_sample(images, grid, align_corners=False)
            torch.testing.assert_close(RandomAffine(10, 0.1)(images, draws), expected)


class LoadSplits(unittest.TestCase):
    def test_training_validation_and_test_images_are_disjoint_and_seeded(self) -> None:
        def few(name: str, data_dir: object, train: bool) -> Images:
            count = 30 if train else 10
            images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1) + (0 if train else 100)
            return Images(images, torch.zeros(count, dtype=torch.int64), ("a",))

        with mock.patch("torchbasics.data.load_images", few):
            train, val, test = load_splits("digits", val_size=8, seed=1)
            again, other = load_splits("digits", val_size=8, seed=1), load_splits("digits", val_size=8, seed=2)
            for size in (0, 30):
                with self.assertRaisesRegex(ValueError, f"between 1 and 29 for digits, got {size}"):
                    load_splits("digits", val_size=size)
        values = [part.inputs.flatten().tolist() for part in (train, val, test)]
        self.assertEqual([len(part) for part in values], [22, 8, 10])
        self.assertEqual(sorted(values[0] + values[1]), list(range(30)))
        self.assertEqual(values[2], list(range(100, 110)))
        self.assertEqual(values[1], again[1].inputs.flatten().tolist())
        self.assertNotEqual(values[1], other[1].inputs.flatten().tolist())


if __name__ == "__main__":
    unittest.main()
