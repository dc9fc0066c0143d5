"""digits.py: drawn digits are pure functions of their arguments, look like MNIST in numbers, and can be learnt."""

from __future__ import annotations

import re
import unittest

import torch
from torch import nn

from torchbasics import digits
from torchbasics.digits import draw_digits


class TestContract(unittest.TestCase):
    """Shapes, purity, balance, errors."""

    images: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def setUpClass(cls) -> None:
        cls.images, cls.labels = draw_digits(700, 5)

    def test_shape_and_dtype(self) -> None:
        for count in (1, 3, 700):
            images, labels = draw_digits(count, 5)
            self.assertEqual((images.shape, images.dtype), ((count, 1, 28, 28), torch.uint8))
            self.assertEqual((labels.shape, labels.dtype), ((count,), torch.int64))

    def test_a_smaller_count_is_a_prefix(self) -> None:
        for count in (1, 499, 500, 501, 620):  # on both sides of the border between two chunks
            images, labels = draw_digits(count, 5)
            self.assertTrue(torch.equal(images, self.images[:count]), count)
            self.assertTrue(torch.equal(labels, self.labels[:count]), count)

    def test_every_ten_images_hold_every_digit_in_a_random_order(self) -> None:
        tens = self.labels.view(-1, 10)
        self.assertTrue(torch.equal(tens.sort(-1).values, torch.arange(10).expand_as(tens)))
        self.assertGreater(len({tuple(ten) for ten in tens.tolist()}), 60)

    def test_global_random_state_is_neither_read_nor_changed(self) -> None:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        images, _ = draw_digits(20, 5)
        self.assertTrue(torch.equal(torch.get_rng_state(), before))
        torch.manual_seed(2)
        self.assertTrue(torch.equal(draw_digits(20, 5)[0], images))

    def test_the_default_dtype_does_not_matter(self) -> None:
        before = torch.get_default_dtype()
        self.addCleanup(torch.set_default_dtype, before)
        torch.set_default_dtype(torch.float64)
        digits._families.cache_clear()
        self.addCleanup(digits._families.cache_clear)
        self.assertTrue(torch.equal(draw_digits(100, 5)[0], self.images[:100]))

    def test_the_number_of_threads_does_not_matter(self) -> None:
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        for threads in (1, 2):
            torch.set_num_threads(threads)
            self.assertTrue(torch.equal(draw_digits(700, 5)[0], self.images), threads)

    def test_no_two_images_are_equal(self) -> None:
        both = torch.cat([self.images, draw_digits(700, 6)[0]])
        self.assertEqual(len({image.numpy().tobytes() for image in both}), 1400)

    def test_seeds_differ_also_negative_and_large_ones(self) -> None:
        first = [draw_digits(10, seed)[0] for seed in (0, 1, -1, 2**40, 2**70)]
        self.assertEqual(len({images.numpy().tobytes() for images in first}), 5)

    def test_giving_the_labels_that_would_be_drawn_changes_nothing(self) -> None:
        self.assertTrue(torch.equal(draw_digits(700, 5, labels=self.labels)[0], self.images))

    def test_given_labels_are_drawn(self) -> None:
        wanted = torch.tensor([7] * 3 + [1] * 600, dtype=torch.uint8)
        images, labels = draw_digits(603, 5, labels=wanted)
        self.assertEqual(labels.dtype, torch.int64)
        self.assertTrue(torch.equal(labels, wanted.long()))
        ink = images.float().mean((1, 2, 3)) / 255
        self.assertLess(float(ink[3:].mean()), 0.10)  # a 1 has little ink, on both sides of the border of a chunk
        self.assertGreater(float(draw_digits(200, 5, labels=torch.zeros(200).long())[0].float().mean()) / 255, 0.14)

    def test_errors_say_what_was_expected(self) -> None:
        cases = (
            ({"count": 0}, "count must be at least 1, got 0"),
            ({"count": 2.0}, "count must be an integer, got 2.0"),
            ({"count": True}, "count must be an integer"),
            ({"count": 2, "seed": "a"}, "seed must be an integer, got 'a'"),
            ({"count": 2, "labels": torch.tensor([1])}, r"shape \(2,\).*got \(1,\)"),
            ({"count": 2, "labels": torch.tensor([1.0, 2.0])}, "integers, got torch.float32"),
            ({"count": 2, "labels": [1, 2]}, "integers, got list"),
            ({"count": 2, "labels": torch.tensor([3, 10])}, r"0\.\.9, got 3\.\.10"),
            ({"count": 2, "labels": torch.tensor([-1, 9])}, r"0\.\.9, got -1\.\.9"),
        )
        for arguments, message in cases:
            with self.subTest(arguments=arguments), self.assertRaisesRegex(ValueError, message):
                draw_digits(**arguments)


class TestLooks(unittest.TestCase):
    """Numbers of MNIST's training images (mean 0.1307, deviation 0.3081, 19.2% of the pixels inked) as the oracle."""

    images: torch.Tensor
    labels: torch.Tensor
    ink: torch.Tensor

    @classmethod
    def setUpClass(cls) -> None:
        cls.images, cls.labels = draw_digits(2000, 11)
        cls.ink = cls.images[:, 0].double() / 255

    def test_amount_of_ink(self) -> None:
        self.assertAlmostEqual(float(self.ink.mean()), 0.1307, delta=0.006)
        self.assertAlmostEqual(float(self.ink.std()), 0.3081, delta=0.008)
        self.assertAlmostEqual(float((self.ink > 0).double().mean()), 0.192, delta=0.012)
        self.assertEqual(int(self.images.amax((1, 2, 3)).min() > 150), 1)  # the thinnest pen is still seen

    def test_centre_of_mass_is_pixel_14(self) -> None:
        place, mass = torch.arange(28.0, dtype=torch.float64), self.ink.sum((1, 2))
        for axis in (1, 2):
            centre = (self.ink.sum(3 - axis) * place).sum(1) / mass
            self.assertLessEqual(float((centre - 14).abs().max()), 1.0)  # whole pixels, and the frame's edge
            self.assertLess(float((centre - 14).abs().mean()), 0.3)  # uniform between -0.5 and 0.5: 0.25
            self.assertAlmostEqual(float(centre.mean()), 14.0, delta=0.04)

    def test_ink_fills_a_box_of_20_pixels(self) -> None:
        rows, columns = (self.ink > 0).any(2), (self.ink > 0).any(1)
        extents = []
        for lines in (rows, columns):
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


class TestParts(unittest.TestCase):
    """Small steps against hand calculations."""

    def test_ink_of_a_straight_stroke_is_the_area_of_a_stadium(self) -> None:
        path = torch.stack([torch.linspace(5, 15, digits.POINTS), torch.full((digits.POINTS,), 10.0)], -1)
        for radius in (1.0, 2.0, 3.0):
            ink = digits._ink(path[None], torch.full((1, digits.POINTS), radius), torch.ones(1))
            area = 2 * radius * 10 + torch.pi * radius**2
            self.assertAlmostEqual(float(ink.sum()) / area, 1.0, delta=0.03)

    def test_a_pen_of_radius_zero_leaves_no_ink(self) -> None:
        path = torch.stack([torch.linspace(5, 15, digits.POINTS), torch.full((digits.POINTS,), 10.0)], -1)
        radius = torch.where(torch.arange(digits.POINTS) < digits.POINTS // 2, 1.0, 0.0)
        ink = digits._ink(path[None], radius[None], torch.ones(1))[0]
        self.assertGreater(float(ink[9:11, 5:10].min()), 0.4)
        self.assertEqual(float(ink[:, 12:].max()), 0.0)

    def test_weights_of_a_path_reproduce_a_line_and_end_at_its_ends(self) -> None:
        table = digits._families()
        torch.testing.assert_close(table.ways.sum(-1), torch.ones_like(table.ways[..., 0]))
        for way in range(3):
            pen = table.ways[way, 0] @ table.shapes[0, 0]
            torch.testing.assert_close(pen[0], table.shapes[0, 0, 0])

    def test_skeletons_of_a_family_can_be_mixed(self) -> None:
        self.assertEqual(sorted(digits.SKELETONS), list(range(10)))
        for digit, families in digits.SKELETONS.items():
            for _, shapes in families:
                patterns = {re.sub(r"-?\d+", "", shape) for shape in shapes}  # what is left: commas, corners, strokes
                self.assertEqual(len(patterns), 1, f"{digit}: {shapes}")


class TestLearning(unittest.TestCase):
    """A small net that has seen 3,000 drawn digits reads others; chance is 10%."""

    def test_held_out_digits_are_read(self) -> None:
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
        self.assertGreater(float(accuracy), 0.85)


if __name__ == "__main__":
    unittest.main()
