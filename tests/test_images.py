"""torchbasics.images: what the network sees of a picture, and what a person sees of that."""

from __future__ import annotations

import io
import itertools
import math
import struct
import tempfile
import unittest
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import torchbasics as tb
from torchbasics import images

DIGITS: Tensor  # (40, 28, 28) from 0 to 1, drawn
LABELS: Tensor


def setUpModule() -> None:
    global DIGITS, LABELS
    torch.set_num_threads(1)
    drawn, LABELS = tb.draw_digits(40, seed=4)
    DIGITS = drawn[:, 0].float() / 255


def image_of(grey: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray((grey * 255).round().byte().numpy())


def enlarged(digit: Tensor, height: int = 400, width: int = 300, size: int = 260) -> Tensor:
    """`digit` (28, 28) `size` pixels large, somewhere on an empty (height, width)."""
    large = F.interpolate(digit[None, None], (size, size), mode="bicubic").clamp(0, 1)[0, 0]
    top, left = (height - size) * 3 // 4, (width - size) // 4
    return F.pad(large, (left, width - size - left, top, height - size - top))


def correlation(a: Tensor, b: Tensor) -> float:
    """Of the images as seen with a lens of 3×3 pixels: thin strokes that lie half a pixel apart still agree."""
    softened = F.avg_pool2d(torch.stack([a, b]), 3, stride=1)
    return float(torch.corrcoef(softened.flatten(1))[0, 1])


def centre(image: Tensor) -> Tensor:
    """The centre of mass (y, x), in pixels from that of pixel 0."""
    height, width = image.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([(image * y).sum(), (image * x).sum()]) / image.sum()


def photographed(digit: Tensor, dark: bool) -> Tensor:
    """(900, 700): uneven light, soft strokes, noise; no value is 0 or 1."""
    ink = enlarged(digit, 900, 700, 450)
    y, x = torch.meshgrid(torch.linspace(0, 1, 900), torch.linspace(0, 1, 700), indexing="ij")
    light = 0.5 + 0.25 * x - 0.15 * y - 0.1 * (x - 0.5) ** 2
    noise = 0.03 * torch.randn(ink.shape, generator=torch.Generator().manual_seed(0))
    return ((light * (1 - 0.6 * ink) if dark else 0.1 + 0.3 * light + 0.45 * ink) + noise).clamp(0.02, 0.98)


class WhatTheNetworkSees(unittest.TestCase):
    def test_centre_by_mass_by_hand(self) -> None:
        ink = torch.zeros(4, 6)
        ink[0, 0], ink[2, 3] = 1.0, 3.0  # centre: row (0 + 3 * 2) / 4 = 1.5, column (0 + 3 * 3) / 4 = 2.25
        expected = torch.zeros(28, 28)
        expected[12, 12], expected[14, 15] = 1.0, 3.0  # 14 - 1.5 = 12.5 → 12 (to even), 14 - 2.25 → 12
        torch.testing.assert_close(images.centre_by_mass(ink), expected, rtol=0, atol=0)

    def test_what_is_heavy_at_one_end_stays_inside(self) -> None:
        ink = torch.full((28, 20), 1e-6)
        ink[-1], ink[:, -1] = 1.0, 1.0
        placed = images.centre_by_mass(ink)
        self.assertEqual(placed.shape, (28, 28))
        torch.testing.assert_close(placed.sum(), ink.sum())

    def test_images_as_mnist_has_them_stay_within_a_pixel(self) -> None:
        for digit in DIGITS:
            seen, dark = images.to_mnist(digit)
            self.assertFalse(dark)
            shifted = (torch.roll(digit, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
            self.assertLess(min(float((seen - one / digit.max()).abs().max()) for one in shifted), 0.12)

    def test_a_digit_on_a_large_canvas_is_the_same_to_the_pixel(self) -> None:
        for digit in DIGITS[:10]:
            alone, _ = images.to_mnist(digit)
            moved, _ = images.to_mnist(F.pad(digit, (5, 27, 18, 3)))
            torch.testing.assert_close(moved, alone, rtol=0, atol=1e-6)

    def test_large_black_on_white_rgba_agrees_with_the_original(self) -> None:
        for digit in DIGITS:
            seen, dark = images.to_mnist(images.to_grey(image_of(1 - enlarged(digit)).convert("RGBA")))
            self.assertTrue(dark)
            self.assertGreater(correlation(seen, digit), 0.9)
            self.assertLess(float((centre(seen) - centre(digit)).abs().max()), 1.0)

    def test_a_photograph_agrees_with_the_original(self) -> None:
        for digit in DIGITS[:12]:
            for dark in (True, False):
                seen, found = images.to_mnist(images.to_grey(image_of(photographed(digit, dark))))
                self.assertEqual(found, dark)
                moved = (torch.roll(seen, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
                self.assertGreater(max(correlation(one, digit) for one in moved), 0.9)
                self.assertLess(float((centre(seen) - centre(digit)).abs().max()), 1.0)
                far = F.max_pool2d(digit[None], 7, stride=1, padding=3)[0] == 0
                self.assertLess(float(seen[far].max()), 0.1)  # no noise and no shadow where there is no ink

    def test_the_lighting_is_found_under_the_ink(self) -> None:
        y, x = torch.meshgrid(torch.linspace(-1, 1, 200), torch.linspace(-1, 1, 300), indexing="ij")
        light = 0.6 + 0.2 * x - 0.1 * y + 0.05 * x * y - 0.1 * x * x
        grey = light.clone()
        grey[60:160, 100:220] -= 0.4  # a fifth of the image
        torch.testing.assert_close(images.background(grey), light, rtol=0, atol=1e-4)

    def test_polarity_can_be_given(self) -> None:
        digit = DIGITS[0]
        right, dark = images.to_mnist(1 - digit, True)
        torch.testing.assert_close(right, images.to_mnist(digit)[0], rtol=0, atol=1e-5)
        self.assertTrue(dark)
        with self.assertRaisesRegex(images.ImageError, "nothing is drawn"):
            images.to_mnist(1 - digit, False)

    def test_a_digit_that_fills_its_picture(self) -> None:
        zero = DIGITS[LABELS == 0][0]
        ink = (enlarged(zero, 280, 280, 280) > 0.2).float()
        part = images.crop(ink)
        self.assertGreater(float(part.mean()), 0.25)
        seen, dark = images.to_mnist(1 - F.pad(part, (2, 2, 2, 2)))
        self.assertTrue(dark)
        self.assertGreater(correlation(seen, zero), 0.85)

    def test_specks_do_not_count(self) -> None:
        digit = enlarged(DIGITS[0])
        specked = digit.clone()
        specked[2, 3] = specked[395, 297] = specked[390, 5] = 1.0
        torch.testing.assert_close(images.to_mnist(specked)[0], images.to_mnist(digit)[0], rtol=0, atol=0.02)

    def test_box_keeps_proportions(self) -> None:
        for shape, expected in (((100, 50), (20, 10)), ((7, 14), (10, 20)), ((300, 2), (20, 1)), ((20, 20), (20, 20))):
            self.assertEqual(images.fit_box(torch.ones(shape), 20).shape, expected)

    def test_thin_strokes_do_not_grow_pale(self) -> None:
        cross = torch.zeros(400, 400)
        cross[50:350, 200] = cross[200, 50:350] = 1.0
        seen, _ = images.to_mnist(cross)
        self.assertEqual(float(seen.max()), 1.0)
        self.assertGreater(float(seen[14].median()), 0.4)

    def test_one_glaring_pixel_leaves_the_rest_visible(self) -> None:
        digit = enlarged(DIGITS[0])
        glaring = 0.3 * digit
        glaring[int(centre(digit)[0]), int(centre(digit)[1])] = 0.9
        self.assertGreater(correlation(images.to_mnist(glaring)[0], images.to_mnist(digit)[0]), 0.97)

    def test_nothing_drawn_is_an_error(self) -> None:
        noise = 0.5 + 0.005 * torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
        for empty in (torch.ones(28, 28), torch.zeros(1, 1), torch.zeros(1, 5000), noise, torch.full((3, 4), 0.5)):
            with self.assertRaisesRegex(images.ImageError, "nothing is drawn"):
                images.to_mnist(images.to_grey(image_of(empty)))

    def test_every_depth_gives_the_same_grey(self) -> None:
        import numpy
        from PIL import Image

        values = (enlarged(DIGITS[0]) * 255).round()
        expected = images.to_grey(image_of(values / 255))
        eight = values.numpy()
        for image in (
            Image.fromarray((eight * 257).astype(numpy.uint16)),
            Image.fromarray((eight * 257).astype(numpy.int32)),
            Image.fromarray((eight / 255).astype(numpy.float32)),
            Image.fromarray(eight.astype(numpy.uint8)).convert("RGB"),
            Image.fromarray(eight.astype(numpy.uint8)).convert("LA"),
            Image.fromarray(eight.astype(numpy.uint8)).convert("P"),
            Image.fromarray(eight.astype(numpy.uint8)).convert("CMYK"),
        ):
            torch.testing.assert_close(images.to_grey(image), expected, rtol=0, atol=0.005)
        twelve = Image.fromarray((eight * 16).round().astype(numpy.uint16))
        torch.testing.assert_close(images.to_grey(twelve), expected, rtol=0, atol=0.01)

    def test_transparent_becomes_the_other_shade(self) -> None:
        from PIL import Image

        ink = image_of(enlarged(DIGITS[0]))
        for shade, paper in ((0, 1.0), (255, 0.0)):
            image = Image.merge("LA", [Image.new("L", ink.size, shade), ink]).convert("RGBA")
            grey = images.to_grey(image)
            self.assertEqual(float(grey[0, 0]), paper)
            self.assertAlmostEqual(float((grey - paper).abs().max()), 1.0, delta=0.01)
        photo = image_of(photographed(DIGITS[0], dark=True)).convert("RGBA")
        corner = Image.new("L", photo.size, 255)
        corner.paste(0, (0, 0, 40, 40))
        photo.putalpha(corner)
        self.assertGreater(correlation(images.to_mnist(images.to_grey(photo))[0], DIGITS[0]), 0.9)

    def test_orientation(self) -> None:
        from PIL import Image

        upright = image_of(enlarged(DIGITS[0]))
        turned = upright.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise for display
        file = io.BytesIO()
        turned.save(file, "PNG", exif=exif)
        torch.testing.assert_close(images.to_grey(Image.open(file)), images.to_grey(upright), rtol=0, atol=0)

    def test_folder_models_see_what_training_saw(self) -> None:
        import numpy
        from PIL import Image
        from torchvision.transforms import v2

        noise = torch.rand(37, 53, 3, generator=torch.Generator().manual_seed(0)).numpy()
        colour = Image.fromarray((noise * 255).astype(numpy.uint8))
        deep = Image.fromarray((noise[..., 0] * 65535).astype(numpy.uint16))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a" / "0.png"
            path.parent.mkdir()
            for image in (colour, colour.convert("L"), colour.convert("RGBA"), deep):
                image.save(path)
                for (mode, channels), size in itertools.product((("RGB", 3), ("L", 1)), ((20, 20), (64, 31), (37, 53))):
                    steps = [v2.Resize(size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
                    expected, _ = tb.SeededImageFolder(folder, v2.Compose(steps), mode=mode)[0]
                    seen = images.resize(images.load_image(path), size, channels)
                    torch.testing.assert_close(seen, expected.as_subclass(Tensor), rtol=0, atol=0)


class EightBit(unittest.TestCase):
    def grey(self, mode: str, code: str, values: Sequence[float]) -> list[int]:
        from PIL import Image

        content = b"".join(struct.pack(code, value) for value in values)
        image = images.eight_bit(Image.frombytes(mode, (len(values), 1), content))
        self.assertEqual((image.mode, image.size), ("L", (len(values), 1)))
        return list(image.tobytes())

    def test_by_hand(self) -> None:
        sixteen = [0, 255, 257, 25700, 65535]  # 257 is one step of 255
        for mode, code in (("I;16", "<H"), ("I;16B", ">H"), ("I", "=i")):
            self.assertEqual(self.grey(mode, code, sixteen), [0, 1, 1, 100, 255])
            self.assertEqual(self.grey(mode, code, [0, 1606, 4095]), [0, 100, 255])  # 12 bits
            self.assertEqual(self.grey(mode, code, [0, 100, 255]), [0, 100, 255])
        self.assertEqual(self.grey("I", "=i", [-5, 50_000, 100_000]), [0, 128, 255])  # 127.5, to even
        self.assertEqual(self.grey("F", "=f", [0.0, 0.2, 1.0, math.nan, math.inf, -math.inf]), [0, 51, 255, 0, 0, 0])
        self.assertEqual(self.grey("F", "=f", [0.0, 0.0]), [0, 0])

    def test_what_has_eight_bits_is_left_alone(self) -> None:
        from PIL import Image

        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
            image = Image.new(mode, (2, 2))
            self.assertIs(images.eight_bit(image), image)


class Loading(unittest.TestCase):
    def test_what_is_no_image_is_named_and_too_large_a_one_not_decoded(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "digit.png"
            image_of(DIGITS[0]).save(path)
            self.assertEqual(images.load_image(str(path), 28 * 28).size, (28, 28))
            (Path(folder) / "text.png").write_text("I am text")
            for name, most, text in (
                ("digit.png", 28 * 28 - 1, "28×28 pixels are more than --max-pixels 783"),
                ("text.png", 100, "not an image of a known format"),
                ("", 100, "is a directory"),
            ):
                with self.assertRaisesRegex(images.ImageError, text):
                    images.load_image(Path(folder) / name, most)
            with self.assertRaises(FileNotFoundError):
                images.load_image(Path(folder) / "absent.png")


if __name__ == "__main__":
    unittest.main()
