"""Drawn digits are pure functions of their arguments, look like MNIST in numbers, and can be learnt."""

from __future__ import annotations

import doctest
import hashlib
import subprocess
import sys
import unittest

import torch
from torch import nn

from torchbasics import digits
from torchbasics.digits import draw_digits

from .common import ROOT


class Contract(unittest.TestCase):
    images: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def setUpClass(cls) -> None:
        cls.images, cls.labels = draw_digits(700, 5)

    def test_a_smaller_count_is_a_prefix(self) -> None:
        for count in (1, 499, 500, 501, 620):  # on both sides of the border between two chunks
            images, labels = draw_digits(count, 5)
            self.assertEqual((images.shape, images.dtype), ((count, 1, 28, 28), torch.uint8))
            self.assertEqual((labels.shape, labels.dtype), ((count,), torch.int64))
            self.assertTrue(torch.equal(images, self.images[:count]), count)
            self.assertTrue(torch.equal(labels, self.labels[:count]), count)

    def test_every_ten_images_hold_every_digit_in_a_random_order(self) -> None:
        tens = self.labels.view(-1, 10)
        self.assertTrue(torch.equal(tens.sort(-1).values, torch.arange(10).expand_as(tens)))
        self.assertGreater(len({tuple(ten) for ten in tens.tolist()}), 60)

    def test_global_random_state_is_neither_read_nor_changed(self) -> None:
        with torch.random.fork_rng(devices=[]):
            for seed in (1, 2):
                torch.manual_seed(seed)
                before = torch.get_rng_state()
                images, _ = draw_digits(20, 5)
                self.assertTrue(torch.equal(torch.get_rng_state(), before))
                self.assertTrue(torch.equal(images, self.images[:20]))

    def test_default_dtype_and_default_device_do_not_matter(self) -> None:
        program = (
            "import hashlib, torch; torch.set_default_dtype(torch.float64); torch.set_default_device('meta');"
            "from torchbasics.digits import draw_digits; images, _ = draw_digits(100, 5);"
            "print(hashlib.sha256(images.numpy().tobytes()).hexdigest())"
        )
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        self.assertEqual(done.stdout.strip(), hashlib.sha256(self.images[:100].numpy().tobytes()).hexdigest())

    def test_the_number_of_threads_does_not_matter(self) -> None:
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        for threads in (1, 2):
            torch.set_num_threads(threads)
            self.assertTrue(torch.equal(draw_digits(700, 5)[0], self.images), threads)

    def test_no_two_images_are_equal_for_any_seeds(self) -> None:
        drawn = torch.cat([self.images, *(draw_digits(50, seed)[0] for seed in (0, 6, -5, 2**40 + 5, 2**70))])
        self.assertEqual(len({image.numpy().tobytes() for image in drawn}), 950)

    def test_wrong_arguments_are_refused(self) -> None:
        cases = (
            ({"count": 0}, "count must be at least 1, got 0"),
            ({"count": 2, "seed": "a"}, "format code 'd'"),
            ({"count": 2, "seed": 1.0}, "format code 'd'"),
        )
        for arguments, message in cases:
            with self.subTest(arguments=arguments), self.assertRaisesRegex(ValueError, message):
                draw_digits(**arguments)

    def test_docstrings(self) -> None:
        result = doctest.testmod(digits)
        self.assertGreater(result.attempted, 0)
        self.assertEqual(result.failed, 0)


class Looks(unittest.TestCase):
    """The oracle: MNIST's training images have mean 0.1307, deviation 0.3081 and 19.2% of inked pixels."""

    images: torch.Tensor
    labels: torch.Tensor
    ink: torch.Tensor

    @classmethod
    def setUpClass(cls) -> None:
        cls.images, cls.labels = draw_digits(2000, 11)
        cls.ink = cls.images[:, 0].double() / 255

    def test_the_amount_of_ink_is_that_of_mnist(self) -> None:
        self.assertAlmostEqual(float(self.ink.mean()), 0.1307, delta=0.006)
        self.assertAlmostEqual(float(self.ink.std()), 0.3081, delta=0.008)
        self.assertAlmostEqual(float((self.ink > 0).double().mean()), 0.192, delta=0.012)
        self.assertGreater(int(self.images.amax((1, 2, 3)).min()), 150)  # the thinnest pen is still seen

    def test_the_centre_of_mass_is_at_pixel_14(self) -> None:
        place, mass = torch.arange(28.0, dtype=torch.float64), self.ink.sum((1, 2))
        for axis in (1, 2):
            centre = (self.ink.sum(3 - axis) * place).sum(1) / mass
            self.assertLessEqual(float((centre - 14).abs().max()), 1.0)  # whole pixels, and the frame's edge
            self.assertLess(float((centre - 14).abs().mean()), 0.3)  # uniform between -0.5 and 0.5: 0.25
            self.assertAlmostEqual(float(centre.mean()), 14.0, delta=0.04)

    def test_the_ink_fills_a_box_of_20_pixels(self) -> None:
        extents = []
        for lines in ((self.ink > 0).any(2), (self.ink > 0).any(1)):  # rows, columns
            first, last = lines.int().argmax(1), 27 - lines.flip(1).int().argmax(1)
            extents.append(last - first + 1)
        longer = torch.maximum(*extents)
        self.assertEqual(int(longer.max()), 20)
        self.assertGreater(float((longer >= 19).double().mean()), 0.98)

    def test_a_one_is_narrow_and_a_zero_has_a_hole(self) -> None:
        width = (self.ink > 0).any(1).sum(1).double()
        self.assertLess(float(width[self.labels == 1].mean()) + 5, float(width[self.labels != 1].mean()))
        middle = self.ink[:, 13:16, 13:16].mean((1, 2))
        self.assertLess(float(middle[self.labels == 0].mean()), 0.2)
        self.assertGreater(float(middle[self.labels == 1].mean()), 0.7)

    def test_a_small_network_learns_to_read_digits_that_it_has_not_seen(self) -> None:
        (images, labels), (others, wanted) = draw_digits(3000, 0), draw_digits(500, 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 10))
            optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
            for batch in torch.stack([torch.randperm(3000) for _ in range(8)]).view(-1, 100):
                loss = nn.functional.cross_entropy(model(images[batch].float() / 255), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            accuracy = (model(others.float() / 255).argmax(1) == wanted).double().mean()
        self.assertGreater(float(accuracy), 0.85)  # chance is 0.1


if __name__ == "__main__":
    unittest.main()
