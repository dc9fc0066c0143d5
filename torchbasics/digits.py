"""Handwritten digits drawn by a program: a data set that needs no download.

`draw_digits` writes digits the way a hand does. It takes a skeleton (the path of the pen, a few points per stroke, at
the end of this file), moves every point a little, bends, slants and stretches the whole, and follows it with a pen of
varying width. Then it does what was done to make MNIST (LeCun, Cortes, Burges; http://yann.lecun.com/exdb/mnist): it
fits the ink into a box of 20x20 pixels, keeping its aspect ratio, and moves its centre of mass to the centre of 28x28
pixels. No image of a real digit is used. This file imports only torch and can be copied alone.
"""

from __future__ import annotations

import hashlib
import math
import re
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

SIDE = 28  # width and height of an image, in pixels
BOX = 20  # width and height of the box that the ink fills, in pixels
CHUNK = 500  # images drawn from one random generator
POSITIONS = 96  # pen positions along a digit


def draw_digits(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw `count` handwritten digits in the format of MNIST.

    Return images, uint8 (count, 1, 28, 28), white ink (255) on black (0), and labels, int64 (count,), on the CPU. Every
    ten images in a row are the ten digits in a random order. The result depends on the arguments alone: global random
    state is neither read nor changed, and `draw_digits(1000, s)` is the beginning of `draw_digits(5000, s)`.

    Raises ValueError for a count below 1 and for a seed that is not an integer.

    >>> images, labels = draw_digits(20, seed=1)
    >>> images.shape, images.dtype, labels.bincount().tolist()
    (torch.Size([20, 1, 28, 28]), torch.uint8, [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    images, labels = [], []
    with torch.device("cpu"):  # whatever the default device is
        for start in range(0, count, CHUNK):
            noise = _Noise(seed, start // CHUNK)
            keys = torch.rand(CHUNK // 10, 10, generator=noise.generator, dtype=torch.float64)
            digits = keys.argsort(-1).view(-1)  # (CHUNK,): the ten digits in one random order after another
            images.append(_draw(digits, noise)[: count - start])
            labels.append(digits[: count - start])
    return torch.cat(images), torch.cat(labels)


class _Noise:
    """Random numbers for the images of one chunk, always all CHUNK of them, so that fewer images are a prefix."""

    def __init__(self, seed: int, chunk: int) -> None:
        digest = hashlib.sha256(f"torchbasics digits {seed:d} {chunk}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(CHUNK, *shape, generator=self.generator, dtype=torch.float32)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(CHUNK, *shape, generator=self.generator, dtype=torch.float32)


def _draw(labels: Tensor, noise: _Noise) -> Tensor:
    """Return images, uint8 (CHUNK, 1, SIDE, SIDE), of the digits `labels` (CHUNK,)."""
    path = _bend(_path(labels, noise), labels, noise)  # (CHUNK, POSITIONS, 2)
    path, radius = _fit(path, _pen(labels, noise))
    softness = 0.9 + 0.4 * noise.uniform()
    # Render 50 images at a time: the distances stay in the processor's cache, which saves a third of the whole.
    parts = zip(path.split(50), radius.split(50), softness.split(50), strict=True)
    ink = torch.cat([_ink(*part) for part in parts])  # (CHUNK, BOX, BOX)
    return _centre((ink * 255).round().to(torch.uint8))


def _path(labels: Tensor, noise: _Noise) -> Tensor:
    """Return pen positions (B, POSITIONS, 2) of the digits `labels` (B,), in units of the height."""
    table = _skeletons()
    share = table.share[labels].cumsum(-1)
    family = (share < noise.uniform(1) * share[:, -1:]).sum(-1).clamp(max=share.shape[1] - 1)  # (B,)
    one, two = ((noise.uniform() * table.members[family]).long() for _ in range(2))
    mix = noise.uniform(1, 1) * 1.3 - 0.15  # a little beyond both
    points = torch.lerp(table.shapes[family, one], table.shapes[family, two], mix)  # (B, K, 2)
    care = (noise.normal(1, 1) * 0.45).exp()  # some people write with more care than others
    points = points + noise.normal(*points.shape[1:]) * care * 0.028
    inner = points.gather(1, table.inner[family].unsqueeze(-1).expand_as(points))
    points = points + (points - inner) * noise.normal(points.shape[1], 1) * 0.18  # strokes end too soon or too late
    blend = noise.uniform(3, 1, 1) ** 3 * torch.tensor([0.7, 1.0, 0.7], dtype=torch.float32).view(3, 1, 1)
    blend = blend / blend.sum(1, keepdim=True)
    curve = (table.curves[family] * blend).sum(1)  # (B, POSITIONS, K)
    return (curve.unsqueeze(-1) * points.unsqueeze(1)).sum(2)


def _bend(path: Tensor, labels: Tensor, noise: _Noise) -> Tensor:
    """Deform, stretch, slant and turn a path (B, POSITIONS, 2)."""
    x, y = path.unbind(-1)
    grow, lean = noise.normal(2, 1).unbind(1)
    x, y = x * (1 + 0.30 * grow * y), y + 0.20 * lean * (y * y - 0.25)
    for _ in range(2):  # smooth waves
        wave = noise.normal(2, 2, 1) * 4.0
        shift = noise.uniform(2, 1) * 2 * math.pi
        size = noise.normal(2, 1) * 0.028
        x, y = (
            x + size[:, 0] * (wave[:, 0, 0] * x + wave[:, 0, 1] * y + shift[:, 0]).sin(),
            y + size[:, 1] * (wave[:, 1, 0] * x + wave[:, 1, 1] * y + shift[:, 1]).sin(),
        )
    slant, spread, width = STYLE[:3, labels].unsqueeze(-1)  # (B, 1) each
    x = x * width * (noise.normal(1) * 0.23).exp()
    x = x - (slant + noise.normal(1) * spread) * y
    angle = noise.normal(1) * 0.08
    return torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=-1)


def _pen(labels: Tensor, noise: _Noise) -> Tensor:
    """Return the radius of the pen (B, POSITIONS) in pixels, 0 where the ink fails."""
    radius = STYLE[3, labels].unsqueeze(-1) * (noise.normal(1) * 0.25).exp()
    along = torch.linspace(0, 1, POSITIONS, dtype=torch.float32) * (0.5 + 2 * noise.uniform(1)) + noise.uniform(1)
    wave = noise.normal(1) * (2 * math.pi * along).sin()
    radius = radius * (1 + 0.12 * wave) * (1 + 0.05 * noise.normal(POSITIONS))  # the hand's pressure, the paper's grain
    start = noise.uniform(1) * POSITIONS
    length = (noise.uniform(1) < 0.04) * (1 + noise.uniform(1) * 5)
    position = torch.arange(POSITIONS)
    return radius.clamp(0.45, 3.6).masked_fill((position >= start) & (position < start + length), 0.0)


def _fit(path: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Scale a path so that the longer side of its ink fills the box; return it and the radius, in pixels of the box."""
    path = path * ((BOX - 2 * radius.mean(-1)) / (path.amax(1) - path.amin(1)).amax(-1))[:, None, None]
    low = (path - radius.unsqueeze(-1)).amin(1)  # (B, 2)
    high = (path + radius.unsqueeze(-1)).amax(1)
    scale = BOX / (high - low).amax(-1)
    path = (path - ((low + high) / 2).unsqueeze(1)) * scale[:, None, None] + BOX / 2
    return path, radius * scale.unsqueeze(-1)


def _ink(path: Tensor, radius: Tensor, softness: Tensor) -> Tensor:
    """Return ink (B, BOX, BOX) in [0, 1]: what a disc of `radius` covers as it follows the path."""
    pixel = torch.arange(BOX, dtype=torch.float32) + 0.5
    across = (pixel[:, None] - path[:, None, :, 0]).square()  # (B, BOX, POSITIONS)
    down = (pixel[:, None] - path[:, None, :, 1]).square() - radius.square().unsqueeze(1)
    down = down.masked_fill(radius.unsqueeze(1) == 0, math.inf)
    power = (across.unsqueeze(1) + down.unsqueeze(2)).amin(-1)  # squared distance minus squared radius, (B, BOX, BOX)
    mean = radius.mean(-1)[:, None, None]
    outside = (power + mean.square()).clamp(min=0).sqrt() - mean  # pixels from the edge of the ink
    return (0.5 - outside / softness[:, None, None]).clamp(0, 1)


def _centre(boxes: Tensor) -> Tensor:
    """Put boxes of ink (B, BOX, BOX) into images (B, 1, SIDE, SIDE), the centre of mass at pixel 14 as in MNIST."""
    ink = boxes.long()
    place = torch.arange(BOX)
    mass = ink.sum((1, 2)).clamp(min=1)
    row = (ink.sum(2) * place).sum(1).double() / mass  # (B,) the centre of mass, counted from the box's corner
    column = (ink.sum(1) * place).sum(1).double() / mass
    tops = (SIDE // 2 - row).round().long().clamp(0, SIDE - BOX)
    lefts = (SIDE // 2 - column).round().long().clamp(0, SIDE - BOX)
    images = torch.zeros(len(boxes), 1, SIDE, SIDE, dtype=torch.uint8)
    for image, box, top, left in zip(images, boxes, tops.tolist(), lefts.tolist(), strict=True):
        image[0, top : top + BOX, left : left + BOX] = box
    return images


class _Skeletons(NamedTuple):
    """SKELETONS as tensors: F families of at most M shapes of at most K points."""

    share: Tensor  # (10, F) how often a digit is drawn with a family
    members: Tensor  # (F,) number of shapes
    shapes: Tensor  # (F, M, K, 2)
    curves: Tensor  # (F, 3, POSITIONS, K) weights of the points at the pen positions, for each of three curves
    inner: Tensor  # (F, K) the neighbour of a point that ends a stroke; any other point itself


@cache
def _skeletons() -> _Skeletons:
    """Return SKELETONS as tensors, padded with zeros."""
    count, most_shapes, most_points = len(SKELETONS), 6, 14  # large enough for all of SKELETONS
    share = torch.zeros(10, count, dtype=torch.float32)
    members = torch.tensor([len(shapes) for _, _, shapes in SKELETONS])
    shapes = torch.zeros(count, most_shapes, most_points, 2, dtype=torch.float32)
    curves = torch.zeros(count, 3, POSITIONS, most_points, dtype=torch.float32)
    inner = torch.arange(most_points).repeat(count, 1)
    for f, (digit, family_share, texts) in enumerate(SKELETONS):
        share[digit, f] = family_share
        numbers = [[float(n) for n in re.findall(r"-?\d+", text)] for text in texts]
        points = torch.tensor(numbers, dtype=torch.float32).view(len(texts), -1, 2) / 100  # (M, K, 2)
        points = points - torch.tensor([0.35, 0.5], dtype=torch.float32)  # about the middle
        shapes[f, : points.shape[0], : points.shape[1]] = points
        strokes = [stroke.split() for stroke in texts[0].split("/")]
        parts = points.mean(0).split([len(stroke) for stroke in strokes])  # the mean shape of each stroke
        # A stroke gets a part of the pen positions in proportion to its length.
        ends = torch.stack([part.diff(dim=0).norm(dim=-1).double().sum() for part in parts]).cumsum(0)
        rows = [0, *(POSITIONS * ends / ends[-1]).round().int().tolist()]
        first = 0
        for stroke, part, (top, bottom) in zip(strokes, parts, pairwise(rows), strict=True):
            last = first + len(stroke) - 1
            corners = torch.tensor(["!" in word for word in stroke])
            curves[f, :, top:bottom, first : last + 1] = _curves(part, corners, bottom - top)
            inner[f, first], inner[f, last] = first + 1, last - 1
            first = last + 1
    return _Skeletons(share, members, shapes, curves, inner)


def _curves(points: Tensor, corners: Tensor, rows: int) -> Tensor:
    """Return the weights (3, rows, K) of a stroke's points (K, 2) at `rows` pen positions, equally far apart.

    The three curves are a polyline and two splines (Catmull and Rom, 1974), of which the first keeps the `corners`,
    bool (K,), and the second is smooth everywhere.
    """
    knots = torch.cat([torch.zeros(1), points.diff(dim=0).norm(dim=-1)]).double().cumsum(0)  # distance of each point
    distance = torch.arange(rows) * knots[-1] / (rows - 1)  # of each pen position
    segment = (torch.searchsorted(knots, distance) - 1).clamp(0, len(points) - 2)  # (rows,)
    t = ((distance - knots[segment]) / (knots[segment + 1] - knots[segment])).clamp(max=1)  # place within the segment
    t2, t3 = t * t, t * t * t
    spline = torch.stack([(-t + 2 * t2 - t3) / 2, (2 - 5 * t2 + 3 * t3) / 2, (t + 4 * t2 - 3 * t3) / 2, (t3 - t2) / 2])
    line = torch.stack([torch.zeros_like(t), 1 - t, t, torch.zeros_like(t)])  # (4, rows)
    smooth = (segment + torch.arange(-1, 3)[:, None]).clamp(0, len(points) - 1)  # (4, rows) points with these weights
    cornered = smooth.clone()  # a corner hides the points behind it
    cornered[0] = torch.where(corners[segment], segment, smooth[0])
    cornered[3] = torch.where(corners[segment + 1], segment + 1, smooth[3])
    weights = torch.zeros(3, rows, len(points), dtype=torch.float32)
    weights[0].scatter_add_(1, smooth.T, line.T.float())
    weights[1].scatter_add_(1, cornered.T, spline.T.float())
    weights[2].scatter_add_(1, smooth.T, spline.T.float())
    return weights


# How each digit is written on average, 0 to 9.
STYLE = torch.tensor(
    [
        [0.17, 0.24, 0.13, 0.10, 0.25, 0.16, 0.05, 0.03, 0.12, 0.12],  # slant, pixels to the right for each pixel up
        [0.20, 0.25, 0.28, 0.26, 0.30, 0.29, 0.20, 0.22, 0.24, 0.24],  # spread of the slant between people
        [1.10, 1.00, 1.16, 1.04, 1.00, 1.14, 1.00, 1.04, 1.02, 0.98],  # width relative to the skeleton
        [1.37, 1.32, 1.22, 1.20, 1.14, 1.12, 1.22, 1.25, 1.14, 1.12],  # radius of the pen, pixels
    ],
    dtype=torch.float32,
    device="cpu",
)

# Skeletons, written by hand: digit, how often it is drawn like this, shapes. A shape is "x,y x,y ... / x,y ...": x runs
# right and y down, 100 is the height of a digit, "/" lifts the pen, and "!" marks a corner. All shapes of a row (a
# family) have the same points in the same order, so that anything between two of them is a digit too.
# fmt: off
SKELETONS: list[tuple[int, float, list[str]]] = [
    (0, 6, ["40,0 18,10 3,38 5,70 25,97 50,98 70,75 75,45 65,12 42,0",  # closed
            "30,5 10,22 2,50 6,80 25,98 48,95 65,70 68,35 55,8 30,2",
            "48,5 25,5 6,30 0,62 15,95 42,98 64,75 72,40 62,14 38,2",  # the end runs over the start
            "62,8 35,4 10,28 3,62 18,94 45,97 68,74 76,40 70,16 50,14"]),  # starts at the right
    (0, 1, ["55,10 30,0 5,30 2,65 20,98 48,98 70,70 74,35 62,8 45,4",  # open
            "30,12 12,25 3,50 8,82 28,98 50,95 66,70 70,40 60,10 40,5"]),
    (0, 0.3, ["40,2 16,14 2,50 8,84 32,99 58,88 70,52 60,14 36,10 30,34 26,60",  # ends inside
              "36,4 14,20 4,54 10,86 36,98 60,82 68,46 54,6 30,4 36,30 50,54"]),
    (1, 9, ["30,0 30,35 30,65 30,100", "28,0 32,35 32,65 28,100", "32,0 28,35 29,65 33,100"]),
    (1, 1.2, ["10,22 30,0! 31,50 30,100", "16,12 32,0! 31,50 31,100", "2,38 34,0! 32,50 33,100"]),
    (1, 1, ["10,22 30,0! 31,50 30,100 / 5,98 30,100 58,98", "14,16 32,0! 30,50 30,100 / 10,100 32,99 52,100"]),
    (2, 5, ["6,24 18,5 42,0 60,14 58,36 38,66 4,97! 36,95 72,96", "2,18 22,2 48,3 58,20 50,42 28,70 2,96! 36,96 68,92",
            "12,30 14,6 40,0 62,12 62,36 40,64 6,94! 38,90 76,98", "2,16 12,2 28,0 40,10 40,34 26,64 2,92! 20,92 44,94",
            "18,22 22,6 38,0 52,12 46,40 26,70 4,92! 54,84 100,84"]),  # a corner at the foot
    (2, 5, ["6,22 22,3 46,2 58,20 50,48 30,78 10,96 2,86 14,76 38,88 76,94",  # a loop at the foot
            "10,28 20,4 48,0 64,18 56,48 32,78 10,98 0,88 12,74 40,84 80,90",
            "2,14 24,2 48,8 54,28 44,54 24,84 6,94 8,86 20,84 42,92 74,86"]),
    (2, 1.5, ["4,6 22,4 58,4! 48,28 26,66 4,96! 34,95 66,95", "2,10 20,6 54,2! 44,30 24,64 2,94! 34,92 70,90"]),  # Z
    (2, 2.5, ["8,30 14,6 40,0 56,16 50,46 32,76 12,88 0,76 8,62 32,72 62,98",  # the tail falls
            "2,18 18,2 44,6 52,22 44,50 28,80 10,86 6,72 18,64 40,76 60,100",
            "14,16 20,2 40,0 50,18 42,56 26,88 8,92 2,76 14,66 34,74 50,84",
            "4,14 16,0 34,4 38,26 32,56 20,84 6,92 2,78 12,66 26,74 38,88",
            "14,16 20,4 34,0 42,14 38,46 28,80 10,100 0,88 6,74 28,68 62,56"]),
    (2, 2, ["38,26 14,30 10,10 32,0 54,14 52,40 30,74 10,96 0,84 14,74 42,86 74,92",  # curls at both ends
            "26,34 8,24 18,4 42,0 60,18 54,46 32,78 8,98 2,86 16,78 44,90 80,84",
            "30,22 12,34 2,18 20,0 46,6 50,36 34,72 12,92 2,82 12,68 36,80 60,96",
            "20,34 6,20 12,6 34,0 56,14 50,44 28,78 8,98 0,82 14,70 40,82 52,100"]),
    (3, 6, ["5,14 24,1 50,6 54,26 38,42 20,47! 46,50 64,68 54,92 28,100 2,88",
            "8,10 28,0 52,8 50,28 34,42 22,46! 44,50 58,66 52,88 28,99 4,94",
            "2,8 26,2 56,8 58,24 42,38 24,44! 52,48 66,66 56,92 30,100 0,92"]),
    (3, 1.5, ["5,14 24,1 50,6 54,26 40,42 24,50 18,46 44,50 62,66 54,92 28,100 2,88",  # a loop in the middle
              "6,12 26,0 50,8 50,26 36,44 18,54 16,46 44,48 60,66 50,92 26,100 2,92"]),
    (3, 1, ["5,4 30,4 60,4! 46,24 28,42! 50,48 64,68 54,92 28,100 2,90",  # flat top
            "4,6 30,2 58,2! 42,22 26,38! 52,46 62,68 52,94 26,99 4,94"]),
    (3, 1.5, ["0,10 28,4 54,6! 38,26 20,42! 42,48 50,66 40,86 18,98",  # short below
              "4,14 22,0 48,6! 36,28 18,46! 42,50 54,68 52,82 44,98",
              "0,16 16,2 40,0! 36,22 22,40! 36,48 42,66 34,86 16,94"]),
    (4, 5, ["12,2 8,26 6,52! 34,50 74,46 / 60,4 56,50 52,100", "8,6 4,30 4,56! 34,58 66,54 / 54,12 50,52 44,100",
            "18,0 10,22 2,48! 34,50 70,50 / 58,18 54,56 52,100"]),  # open
    (4, 3, ["10,4 6,26 4,48! 30,52 52,44 60,4! 56,50 50,100", "16,4 8,24 4,46! 28,54 50,46 64,8! 58,50 50,98",
            "6,10 4,30 6,50! 28,56 48,48 56,12! 54,56 52,100"]),  # open, one stroke
    (4, 2, ["50,0 28,32 4,62! 36,63 78,62 / 52,0 52,50 51,100",  # closed
            "46,2 22,30 2,54! 36,57 70,54 / 50,2 50,50 48,100"]),
    (4, 1, ["46,100 48,54 52,2! 28,30 4,58! 34,60 76,56", "50,98 50,54 50,0! 26,26 2,52! 36,56 70,56"]),
    (5, 5, ["64,2 44,4 22,5! 17,24 12,44! 38,40 58,56 56,82 32,100 2,92",
            "72,0 48,4 28,8! 20,26 12,46! 36,44 52,60 48,84 26,98 0,94",
            "60,4 40,4 14,4! 14,24 14,44! 42,38 62,58 56,86 32,99 4,88",
            "64,6 42,4 20,4! 16,24 12,46! 38,40 60,56 58,84 34,99 8,84",
            "90,0 60,6 36,10! 26,26 18,42! 36,46 46,60 40,82 22,98 0,88",
            "50,2 32,4 16,6! 12,22 10,38! 30,40 44,56 42,78 26,98 6,96"]),
    (5, 3, ["18,6 15,24 12,42! 38,38 58,56 56,82 32,100 2,90 / 18,6 40,4 66,2",  # the bar is a stroke of its own
            "24,10 18,28 12,46! 38,44 54,62 50,86 28,100 0,92 / 26,8 52,4 80,0",
            "16,6 14,24 14,44! 40,42 60,60 56,84 30,100 4,92 / 24,4 46,0 70,0"]),
    (5, 2, ["78,2 52,2 34,8 26,26 26,40 46,54 54,70 44,90 24,98 2,92",  # nearly an S
            "66,4 46,2 26,8 16,24 20,40 42,50 54,68 46,90 24,99 0,90"]),
    (6, 5, ["50,0 28,18 10,48 4,76 18,98 42,97 56,80 48,62 28,62 8,80",
            "40,0 20,24 8,52 6,78 22,98 44,98 58,76 46,56 24,60 8,78",
            "62,0 34,22 12,54 4,82 16,99 36,96 46,82 38,68 20,72 6,88",
            "34,0 16,26 4,56 4,80 20,98 46,98 62,78 52,58 26,58 8,74"]),
    (6, 2, ["54,2 30,18 12,48 6,78 22,98 46,94 58,74 48,60 32,68 26,80",  # the loop stays open
            "42,0 22,22 8,52 6,80 24,98 46,96 56,78 46,64 30,66 20,72"]),
    (6, 3, ["20,0 6,34 2,66 18,94 44,98 66,80 66,54 46,44 26,56 22,84",  # a wide loop
            "34,0 10,28 0,62 14,92 44,98 72,78 70,54 48,46 30,60 30,88",
            "12,0 4,30 4,66 22,96 52,96 66,72 60,46 36,42 18,56 10,76"]),
    (6, 1.5, ["30,0 12,28 4,60 8,86 30,97 54,88 60,70 46,60 30,70 32,92",  # a small loop at the right
              "44,0 20,28 6,58 4,82 22,92 48,88 66,72 56,62 40,68 34,86"]),
    (7, 5, ["0,8 30,6 62,4! 50,34 36,66 26,100", "2,12 30,6 60,8! 54,34 48,66 44,100",
            "0,6 34,8 70,2! 50,34 30,66 10,98"]),
    (7, 2, ["2,24 4,6! 32,6 62,6! 50,36 36,66 26,100", "6,20 8,8! 32,4 60,4! 52,34 42,66 36,100",  # a serif
            "0,44 10,8! 32,12 60,2! 48,34 38,66 28,100", "2,38 12,4! 30,22 62,8! 46,38 30,68 16,100"]),
    (7, 1.5, ["0,8 30,6 62,4! 50,34 36,66 26,100 / 18,52 42,50 66,48",  # a bar
              "2,12 30,6 60,8! 54,34 48,66 44,100 / 22,56 44,52 70,50",
            "0,10 30,6 58,2! 48,34 30,66 14,98 / 12,60 44,60 84,62"]),
    (7, 2, ["0,18 14,4 40,2 58,14 54,44 44,72 36,100", "0,12 20,2 46,4 60,16 52,44 40,72 26,100"]),  # round
    (7, 0.5, ["0,10 30,4 60,6! 46,34 26,70 24,94 44,98", "2,22 20,6 54,4! 44,40 30,72 32,92 50,92"]),  # a hooked foot
    (8, 5, ["58,12 36,0 14,12 18,32 42,50 56,74 40,98 14,96 6,78 22,56 48,34 60,14",  # one S-shaped loop
            "62,20 42,2 18,8 16,30 40,50 50,74 34,98 10,94 6,76 24,54 54,34 66,16",
            "70,20 44,2 14,8 18,32 42,48 58,70 46,96 10,98 2,80 18,60 34,50 44,40",
            "46,14 38,4 28,14 32,34 48,54 56,76 42,97 20,98 8,80 18,60 38,40 50,18",
            "50,8 30,0 10,14 16,36 40,50 54,72 44,96 20,99 4,80 16,58 42,36 52,12"]),
    (8, 2, ["36,0 14,10 12,34 34,46 56,34 56,10 36,0 / 34,46 10,62 6,86 32,100 58,86 56,62 36,46",  # two circles
            "38,2 18,12 16,32 36,44 54,30 54,10 38,2 / 36,46 14,60 8,84 30,100 54,86 54,62 36,48"]),
    (8, 2, ["38,46 16,32 18,8 40,0 58,14 50,36 26,56 8,78 20,98 44,97 56,78 48,56 30,42",  # begun in the middle
            "36,48 14,34 14,10 36,0 56,10 54,34 30,54 8,74 14,97 40,99 58,80 50,58 30,46"]),
    (8, 3, ["56,16 40,2 16,8 10,28 28,46 44,64 40,90 24,100 12,88 20,66 44,40 70,6",  # narrow below, open above
            "60,10 36,4 14,16 16,36 34,50 40,72 30,96 16,98 12,84 24,64 50,40 76,14",
            "50,22 34,4 12,10 8,34 28,48 46,66 46,90 26,100 10,86 18,62 38,46 58,30",
            "52,10 30,8 12,22 24,38 42,54 46,78 32,98 18,92 18,74 30,54 48,34 84,2",
            "50,10 30,0 8,14 10,36 34,44 44,66 42,92 34,100 30,88 32,66 46,40 58,14"]),
    (8, 2, ["36,6 12,4 2,24 18,42 38,58 42,84 28,100 14,88 22,64 44,44 54,22 38,4",  # a large head
            "44,8 18,0 0,18 10,40 36,52 44,76 34,98 20,94 20,74 40,50 60,26 46,6"]),
    (9, 4, ["54,12 34,0 12,12 6,34 22,48 44,38 56,10! 54,40 50,70 46,100",  # a straight tail
            "56,10 34,2 10,20 6,42 24,50 46,34 58,8! 52,40 42,70 34,100",
            "50,16 32,2 14,10 8,30 20,42 40,32 54,10! 50,40 46,70 44,100"]),
    (9, 2, ["54,12 34,0 12,12 6,34 22,48 44,38 56,10! 58,46 48,86 10,94",  # a curved tail
            "52,12 32,0 10,14 8,38 26,46 46,32 56,10! 56,50 40,92 14,90"]),
    (9, 2, ["56,30 48,6 28,0 8,14 6,36 24,48 44,40 56,26 54,44 48,72 40,100",  # round
            "52,34 50,8 30,0 10,10 6,32 22,46 44,40 56,20 56,46 52,72 50,100"]),
    (9, 2, ["40,10 22,6 4,22 2,42 18,52 42,38 56,8! 52,40 46,70 42,100",  # the head stays open
            "50,2 26,8 8,26 4,44 20,50 40,42 54,24! 52,48 46,74 38,100",
            "36,14 20,12 4,28 6,46 22,54 44,44 54,0! 54,40 52,70 52,100"]),
    (9, 1.5, ["64,14 42,0 14,10 0,40 10,62 36,54 60,20! 58,48 58,74 66,98",  # a large head
              "60,8 34,0 8,16 2,46 18,60 42,48 60,12! 56,44 56,72 58,100"]),
    (9, 1.5, ["58,6 30,4 6,24 10,44 32,46 52,34! 52,54 48,76 42,98",  # the tail begins below the head's start
              "66,10 40,2 10,18 6,40 30,46 56,28! 54,50 44,76 34,100",
              "50,4 26,4 10,18 12,34 30,40 46,36! 52,54 46,80 20,98"]),
]
# fmt: on
