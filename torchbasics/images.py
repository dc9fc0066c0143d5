"""A picture of a digit, of any size and mode, as MNIST's were made; and other image files, read with care.

    pixels, dark_on_light = to_mnist(to_grey(load_image("photo.jpg")))  # (28, 28) from 0 to 1

PIL images come in and tensors go out; PIL, which comes with torchvision, is imported when first needed.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.nn import functional as F

# What PIL may decode: not all that it knows, since some of its formats start another program (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
PANEL = 140  # pixels of one picture on the sheet that `draw_sheet` writes


class ImageError(ValueError):
    """An image that cannot be used; says why."""


# -------------------------------------------------------------------------------------- image files, and what PIL holds


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file only: a pipe would wait for ever, /dev/zero would never end. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")


def load_image(path: str | os.PathLike, max_pixels: int = 80_000_000) -> Any:
    """The decoded PIL image, of an animation its first frame; one of more than `max_pixels` is not decoded.

    Raises ImageError or OSError; PIL raises nearly anything on a broken file.
    """
    from PIL import Image

    path = Path(path)
    if path.is_dir():
        raise ImageError(f"is a directory; give its images: {path / '*.png'}")
    if path.is_symlink() and not path.exists():
        raise ImageError("is a symbolic link to nothing")
    with open_regular(path) as file:
        try:
            image = Image.open(file, formats=FORMATS)  # reads the header only
        except Image.UnidentifiedImageError:
            raise ImageError(f"not an image of a known format ({', '.join(FORMATS)})") from None
        except Image.DecompressionBombError as error:  # PIL's own limit stays, whatever `max_pixels` says
            raise ImageError(str(error).partition(", could")[0]) from None
        if image.width * image.height > max_pixels:
            raise ImageError(f"{image.width:,}×{image.height:,} pixels are more than --max-pixels {max_pixels:,}")
        image.load()
    return image


def eight_bit(image: Any) -> Any:
    """`image` with 8 bits a channel. PIL itself clips 16-bit values at 255: white paper and grey ink alike.

    White is 1, 255, 4095 (12 bits) or 65535: the least of these that no value exceeds, else the highest value.
    """
    from PIL import Image

    if image.mode[0] not in "IF":  # the modes of 16 and 32 bits: I;16, I;16B, I, F
        return image
    values = torch.frombuffer(bytearray(image.convert("F").tobytes()), dtype=torch.float32)
    values = values.nan_to_num(nan=0, posinf=0, neginf=0)
    most = float(values.max())
    white = next((white for white in (1, 255, 4095, 65535) if most <= white), most)
    scaled = (values / white * 255).clamp(0, 255).round().byte()
    return Image.frombytes("L", image.size, scaled.numpy().tobytes())


def plane(image: Any) -> Tensor:
    """A PIL image in mode L as float32 (H, W) from 0 to 1."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width).float() / 255


def resize(image: Any, size: Sequence[int], channels: int) -> Tensor:
    """A PIL image as training sees one of a folder: float32 (channels, *size) from 0 to 1, bit for bit.

    That is torchvision's Resize, ToImage and ToDtype(scale=True), without the seconds that its import takes.
    """
    from PIL import Image

    image = eight_bit(image).convert("L" if channels == 1 else "RGB")
    image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, channels)
    return values.permute(2, 0, 1).contiguous().float() * (1 / 255)


def to_grey(image: Any, longest: int = 512) -> Tensor:
    """A PIL image upright, in grey, float32 (H, W) from 0 to 1; reduced until no side is above `longest`.

    What is transparent becomes white, or black if what is drawn is bright; a small part, like the rest.
    """
    from PIL import ImageOps

    image = eight_bit(ImageOps.exif_transpose(image))
    seen = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "L")
    seen = seen.reduce(math.ceil(max(seen.size) / longest))
    grey = plane(seen.convert("L"))
    if seen.mode == "L":
        return grey
    alpha = plane(seen.getchannel("A"))
    opaque = grey[alpha > 0.5]
    if not len(opaque) or len(opaque) < 0.8 * grey.numel():  # a drawing on nothing
        empty = 0.0 if len(opaque) and opaque.mean() > 0.5 else 1.0
    else:  # a picture with some holes or soft corners
        empty = float(opaque.median())
    return grey * alpha + empty * (1 - alpha)


# ---------------------------------------------------------------------------------------------------- as MNIST was made


def background(grey: Tensor) -> Tensor:
    """The lighting of the paper, (H, W): a quadratic surface through the 40% of pixels that lie nearest to it.

    Least trimmed squares by concentration steps (Rousseeuw & Van Driessen, 2006), begun at the median of the margin.
    """
    height, width = grey.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    terms = torch.stack([torch.ones_like(x), x, y, x * y, x * x, y * y], dim=-1).double()  # (H, W, 6)
    step = math.ceil(max(height, width) / 128)  # every pixel of a small image, enough of a large one
    points, values = terms[::step, ::step].flatten(0, 1), grey[::step, ::step].reshape(-1).double()
    margin = torch.cat([grey[0], grey[-1], grey[:, 0], grey[:, -1]]).median().double()
    away = (values - margin).abs()
    for _ in range(10):
        near = away <= away.quantile(0.4) + 1e-6
        surface = torch.linalg.lstsq(points[near], values[near, None], driver="gelsd").solution  # (6, 1)
        away = (values - points @ surface[:, 0]).abs()
    return (terms @ surface[:, 0]).float()


def find_ink(grey: Tensor, invert: bool | None) -> tuple[Tensor, bool]:
    """How much ink lies on each pixel, (H, W) from 0 to 1; and whether it is dark on light (None: to be detected).

    Ink is the minority that stands out on one side of the background. ImageError if nothing stands out.
    """
    away = grey - background(grey)
    dark = bool((away**3).sum() < 0) if invert is None else invert
    noise = 5 * float(away.abs().quantile(0.4))  # about three standard deviations of what is no ink
    ink = (-away if dark else away) - noise
    top = float(ink.max())
    if top < 0.05:
        raise ImageError("nothing is drawn on it: no pixel differs from the background by 5% or more")
    return (ink / top).clamp(0, 1), dark


def crop(ink: Tensor) -> Tensor:
    """The part with ink in it. It is sought in cells, so that a speck on a large image does not count."""
    cell = math.ceil(max(ink.shape) / 64)
    cells = F.avg_pool2d(ink[None], cell, ceil_mode=True, count_include_pad=False)[0] > 0.1
    spans = []
    for axis, size in enumerate(ink.shape):
        found = cells.any(1 - axis).nonzero()
        if not len(found):
            raise ImageError("nothing is drawn on it but specks")
        spans.append(slice(max(int(found[0]) - 1, 0) * cell, min((int(found[-1]) + 2) * cell, size)))
    part = ink[spans[0], spans[1]]
    rows, columns = ((part > 0.1).any(1 - axis).nonzero() for axis in range(2))
    return part[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]


def fit_box(ink: Tensor, box: int) -> Tensor:
    """`ink` scaled, with its proportions, so that its longer side is `box` pixels; anti-aliased."""
    height, width = (max(1, round(side * box / max(ink.shape))) for side in ink.shape)
    if (height, width) == ink.shape:
        return ink
    scaled = F.interpolate(ink[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
    return scaled / scaled.max()  # thin strokes grow pale when scaled down


def centre_by_mass(ink: Tensor, size: int = 28) -> Tensor:
    """`ink` on an empty (size, size), moved by whole pixels so that its centre of mass lies on pixel size / 2."""
    before = []
    for axis, length in enumerate(ink.shape):
        centre = float(ink.sum(1 - axis) @ torch.arange(length).float() / ink.sum())
        before.append(min(max(round(size / 2 - centre), 0), size - length))  # not beyond the edge
    top, left = before
    return F.pad(ink, (left, size - ink.shape[1] - left, top, size - ink.shape[0] - top))


def to_mnist(grey: Tensor, invert: bool | None = None) -> tuple[Tensor, bool]:
    """A grey image (H, W) as an image of MNIST, (28, 28) from 0 to 1; and whether it was dark on light.

    As LeCun et al. (1998) made MNIST: the digit fits a box of 20 pixels, its centre of mass lies in the middle of 28.
    """
    ink, dark = find_ink(grey, invert)
    return centre_by_mass(fit_box(crop(ink), 20)), dark


# ----------------------------------------------------------------------------------------------- what a person looks at


def thumbnail(image: Any) -> Any:
    """A small PIL picture of `image`, its pixels kept apart where it is small itself; grey where it is transparent."""
    from PIL import Image, ImageOps

    small = eight_bit(image).convert("RGBA").reduce(math.ceil(max(image.size) / (2 * PANEL)))
    panel = Image.new("RGBA", (PANEL, PANEL), "grey")
    panel.alpha_composite(ImageOps.contain(small, (PANEL, PANEL), Image.Resampling.NEAREST))
    return panel.convert("RGB")


def draw_sheet(pairs: Sequence[tuple[Any, Tensor]], path: str | os.PathLike) -> None:
    """Writes a PNG of pairs, four in a row: a thumbnail; right of it, what the network saw, (C, H, W) from 0 to 1."""
    from PIL import Image

    columns, step = min(4, len(pairs)), PANEL + 8
    sheet = Image.new("RGB", (2 * columns * step + 8, math.ceil(len(pairs) / columns) * step + 8), "white")
    for i, (small, pixels) in enumerate(pairs):
        left, top = i % columns * 2 * step + 8, i // columns * step + 8
        values = (pixels * 255).round().byte().permute(1, 2, 0)  # (H, W, C)
        seen = Image.fromarray(values.squeeze(2).numpy()).convert("RGB")
        sheet.paste(small, (left, top))
        sheet.paste(seen.resize((PANEL, PANEL), Image.Resampling.NEAREST), (left + PANEL + 4, top))
    sheet.save(path, format="PNG")
