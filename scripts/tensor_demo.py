"""Tensors from the first one to the accelerator: every value shown here is also checked.

python scripts/tensor_demo.py
python scripts/tensor_demo.py --section shape.view --section shape.permute
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "torchbasics" / "__init__.py").is_file():  # in a checkout its own package comes first, installed or not
    sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import Tensor

from torchbasics.demo import Sections, show, show_error

section = Sections(__doc__)


@section("create.lists", "T1")
def create_from_lists() -> None:
    """A number makes a 0-D tensor, a list 1-D, a list of lists 2-D; a NumPy array keeps its shape."""
    scalar, vector, matrix = torch.tensor(7), torch.tensor([1, 2, 3]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    show("torch.tensor(7)", scalar, 7)
    show("its dimensions, and as a Python number", (scalar.dim(), scalar.item()), (0, 7))
    show("torch.tensor([1, 2, 3])", vector, [1, 2, 3])
    show("torch.tensor([[1., 2.], [3., 4.]])", matrix, [[1, 2], [3, 4]])
    show("dimensions of the two", (vector.dim(), matrix.dim()), (1, 2))
    cube = torch.tensor(np.arange(8).reshape(2, 2, 2))
    show("from a NumPy array (2, 2, 2)", cube, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    show_error("rows of different length", lambda: torch.tensor([[1, 2], [3]]), ValueError, "sequence of length")


@section("create.sharing", "T1")
def create_sharing() -> None:
    """torch.tensor copies; from_numpy and .numpy() share memory: change one and the other changes."""
    array = np.array([1.0, 2.0, 3.0])
    copied, shared = torch.tensor(array), torch.from_numpy(array)
    array[0] = 100.0
    show("torch.tensor(array) after array[0] = 100", copied, [1, 2, 3])
    show("torch.from_numpy(array) after the same", shared, [100, 2, 3])
    shared[1] = -5.0
    show("array after shared[1] = -5", array.tolist(), [100, -5, 3])
    back = shared.numpy()
    back[2] = 0.0
    show("shared after shared.numpy()[2] = 0", shared, [100, -5, 0])
    # NumPy's default is float64, torch's float32: a float32 network refuses the former until it is converted.
    show("dtype from NumPy", shared.dtype, torch.float64)
    show("dtype after .float()", shared.float().dtype, torch.float32)


@section("create.tensor_or_Tensor", "T1")
def create_tensor_or_tensor() -> None:
    """torch.tensor takes data and infers the dtype; torch.Tensor takes sizes or data, and has the default dtype."""
    show("torch.tensor(3): the number 3", torch.tensor(3), 3)
    show("torch.Tensor(3).shape: 3 arbitrary values", torch.Tensor(3).shape, (3,))
    show("torch.tensor([3]), its dtype", (torch.tensor([3]), torch.tensor([3]).dtype), ([3], torch.int64))
    show("torch.Tensor([3]), its dtype", (torch.Tensor([3]), torch.Tensor([3]).dtype), ([3], torch.float32))
    torch.set_default_dtype(torch.float64)
    show("torch.Tensor([3]) with the default float64", torch.Tensor([3]).dtype, torch.float64)
    show("torch.tensor([3]) infers int64 all the same", torch.tensor([3]).dtype, torch.int64)


@section("create.filled", "T2")
def create_filled(device: torch.device) -> None:
    """Constant and regular tensors, made from a shape or a range."""
    show("torch.zeros(2, 3)", torch.zeros(2, 3, device=device), [[0, 0, 0], [0, 0, 0]])
    show("torch.ones(2)", torch.ones(2, device=device), [1, 1])
    show("torch.full((2,), 7.5)", torch.full((2,), 7.5, device=device), [7.5, 7.5])
    # `empty` only reserves memory: its values are whatever lay there, so only its shape can be shown.
    show("torch.empty(2, 3).shape", torch.empty(2, 3, device=device).shape, (2, 3))
    show("torch.eye(2)", torch.eye(2, device=device), [[1, 0], [0, 1]])
    diagonal = torch.diag(torch.tensor([1, 2], device=device))
    show("torch.diag of [1, 2]", diagonal, [[1, 0], [0, 2]])
    show("torch.diag of that matrix", torch.diag(diagonal), [1, 2])
    show("torch.arange(0, 10, 3): without the end", torch.arange(0, 10, 3, device=device), [0, 3, 6, 9])
    show("torch.linspace(0, 1, 5): with the end", torch.linspace(0, 1, 5, device=device), [0, 0.25, 0.5, 0.75, 1])
    like = torch.tensor([[1, 2, 3]], dtype=torch.int16, device=device)
    show("torch.zeros_like(int16 tensor)", torch.zeros_like(like), [[0, 0, 0]])
    show("its dtype", torch.zeros_like(like).dtype, torch.int16)


@section("create.random", "T2")
def create_random(device: torch.device) -> None:
    """Random tensors by distribution; 100,000 draws come close to its mean and spread."""
    n = 100_000
    uniform, normal = torch.rand(n, device=device), torch.randn(n, device=device)
    show("torch.rand: mean", uniform.mean(), 0.5, atol=0.01)
    show("torch.rand: spread 1/sqrt(12)", uniform.std(), 1 / math.sqrt(12), atol=0.01)
    show("torch.rand: all in [0, 1)", bool(((uniform >= 0) & (uniform < 1)).all()), True)
    show("torch.randn: mean", normal.mean(), 0.0, atol=0.02)
    show("torch.randn: spread", normal.std(), 1.0, atol=0.02)
    dice = torch.randint(1, 7, (n,), device=device)  # the upper end is excluded
    show("torch.randint(1, 7): the values", dice.unique(), [1, 2, 3, 4, 5, 6])
    coins = torch.bernoulli(torch.full((n,), 0.3, device=device))
    show("torch.bernoulli(0.3): share of ones", coins.mean(), 0.3, atol=0.01)
    show("torch.randn_like(2x3).shape", torch.randn_like(torch.zeros(2, 3, device=device)).shape, (2, 3))


@section("create.seed", "T2")
def create_seed(device: torch.device) -> None:
    """The same seed makes the same draws; a generator of one's own leaves the global one alone."""
    torch.manual_seed(42)
    first, second = torch.rand(3, device=device), torch.rand(3, device=device)
    torch.manual_seed(42)
    show("first draw repeats after the seed", bool(torch.equal(first, torch.rand(3, device=device))), True)
    show("and differs from the second draw", bool(torch.equal(first, second)), False)
    private = torch.Generator(device=device).manual_seed(1)
    torch.rand(3, device=device, generator=private)
    show("second draw, undisturbed by a generator", bool(torch.equal(second, torch.rand(3, device=device))), True)


@section("dtype.kinds", "T3")
def dtype_kinds() -> None:
    """Integers become int64, floats float32 and booleans bool if no dtype is given; dtypes differ in size and range."""
    show("torch.tensor([1, 2]).dtype", torch.tensor([1, 2]).dtype, torch.int64)
    show("torch.tensor([1., 2.]).dtype", torch.tensor([1.0, 2.0]).dtype, torch.float32)
    show("torch.tensor([True]).dtype", torch.tensor([True]).dtype, torch.bool)
    show("torch.tensor([1], dtype=torch.float16)", torch.tensor([1], dtype=torch.float16).dtype, torch.float16)
    kinds = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
    show("bytes of uint8, half, bfloat16, float, double", [kind.itemsize for kind in kinds], [1, 2, 2, 4, 8])
    show("largest float16", torch.finfo(torch.float16).max, (2 - 2**-10) * 2.0**15)
    show("float16 overflows beyond it", torch.tensor(70_000.0).half(), math.inf)
    show("uint8 wraps around: 250 + 10", torch.tensor(250, dtype=torch.uint8) + 10, (250 + 10) % 256)


@section("dtype.convert", "T3")
def dtype_convert() -> None:
    """`.to(dtype)` converts, and so does the older `.type()`; to an integer means cutting off, not rounding."""
    x = torch.tensor([1.7, -1.7])
    show("x.to(torch.int64)", x.to(torch.int64), [1, -1])
    show("x.type(torch.int64)", x.type(torch.int64), [1, -1])
    show("x.type() without argument names the type", x.type(), "torch.FloatTensor")
    show("x.to(torch.float32) is x: nothing to do", x.to(torch.float32) is x, True)
    # `.to` also moves to a device, alone or together with the dtype, which makes it the one to use.
    show('x.to("cpu", torch.float64).dtype', x.to("cpu", torch.float64).dtype, torch.float64)


@section("dtype.promotion", "T3")
def dtype_promotion() -> None:
    """The higher kind wins (bool, integer, float, complex); within one kind a Python number does not widen a tensor."""
    whole, real = torch.tensor([1, 2]), torch.tensor([0.5, 0.5])
    show("int64 + float32", whole + real, [1.5, 2.5])
    show("its dtype", (whole + real).dtype, torch.float32)
    show("(float32 + float64).dtype: the wider", (real + real.double()).dtype, torch.float64)
    # A Python float gives an integer tensor the default dtype; a number of the same or a lower kind changes nothing.
    show("(int64 + 0.5).dtype: a higher kind", (whole + 0.5).dtype, torch.float32)
    show("(float32 + 2).dtype: a lower kind", (real + 2).dtype, torch.float32)
    show("(float16 + 0.5).dtype: the same kind", (real.half() + 0.5).dtype, torch.float16)
    show("int64 / 2 is a true division", whole / 2, [0.5, 1.0])
    show("int64 // 2 rounds down", torch.tensor([-3, 3]) // 2, [-2, 1])
    show_error("in place the dtype cannot change", lambda: whole.add_(real), RuntimeError, "can't be cast")


@section("attributes.basic", "T4")
def attributes_basic(device: torch.device) -> None:
    """What a tensor says of itself."""
    x = torch.zeros(2, 3, 4, device=device)
    show("x.shape", x.shape, (2, 3, 4))
    show("x.size(), and x.size(-1) of one dimension", (x.size(), x.size(-1)), ((2, 3, 4), 4))
    show("x.dim()", x.dim(), 3)
    show("x.numel()", x.numel(), 2 * 3 * 4)
    show("x.nbytes: 4 per float32", x.nbytes, 24 * 4)
    show("x.dtype", x.dtype, torch.float32)
    show("x.device.type", x.device.type, device.type)
    show("x.requires_grad", x.requires_grad, False)
    show("x.layout", x.layout, torch.strided)


@section("attributes.stride", "T4")
def attributes_stride() -> None:
    """The stride is the step in memory to the next element along a dimension; transposing moves no value."""
    x = torch.arange(6).reshape(2, 3)
    show("x", x, [[0, 1, 2], [3, 4, 5]])
    show("x.stride(): next row 3 on, next column 1 on", x.stride(), (3, 1))
    show("x.t().stride()", x.t().stride(), (1, 3))
    show("is x, is x.t() contiguous?", (x.is_contiguous(), x.t().is_contiguous()), (True, False))
    show("x.t().contiguous() copies: its stride", x.t().contiguous().stride(), (2, 1))


@section("math.elementwise", "T5")
def math_elementwise(device: torch.device) -> None:
    """Operators work element by element; each has a function of the same meaning."""
    a, b = torch.tensor([1.0, 2.0, 3.0], device=device), torch.tensor([4.0, 5.0, 6.0], device=device)
    show("a + b, torch.add", [a + b, torch.add(a, b)], [[5, 7, 9]] * 2)
    show("a - b, torch.sub", [a - b, torch.sub(a, b)], [[-3, -3, -3]] * 2)
    show("a * b, torch.mul", [a * b, torch.mul(a, b)], [[4, 10, 18]] * 2)
    show("a / b, torch.div", [a / b, torch.div(a, b)], [[1 / 4, 2 / 5, 1 / 2]] * 2)
    show("a ** 2, torch.pow", [a**2, torch.pow(a, 2)], [[1, 4, 9]] * 2)
    show("exp and log undo each other", a.exp().log(), [1, 2, 3])
    show("a.clamp(1.5, 2.5)", a.clamp(1.5, 2.5), [1.5, 2, 2.5])


@section("math.inplace", "T5")
def math_inplace(device: torch.device) -> None:
    """A trailing underscore changes the tensor itself, and so every name and view of it."""
    a = torch.tensor([1.0, 2.0], device=device)
    alias = a
    a.add_(10)
    show("alias after a.add_(10)", alias, [11, 12])
    a += 1  # also in place
    show("alias after a += 1", alias, [12, 13])
    a = a + 1  # a new tensor gets the old name
    show("alias after a = a + 1", alias, [12, 13])


@section("math.dot", "T5")
def math_dot(device: torch.device) -> None:
    """The product of two vectors is a number: 1*4 + 2*5 + 3*6."""
    a, b = torch.tensor([1.0, 2.0, 3.0], device=device), torch.tensor([4.0, 5.0, 6.0], device=device)
    show("torch.dot(a, b)", torch.dot(a, b), 32)
    show("a @ b", a @ b, 32)
    show("(a * b).sum()", (a * b).sum(), 32)
    show_error("lengths must agree", lambda: a @ b[:2], RuntimeError, "size")


@section("matrix.product", "T6")
def matrix_product(device: torch.device) -> None:
    """Row times column: mm is for matrices only, matmul (or @) also for vectors and batches."""
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    b = torch.tensor([[5.0, 6.0], [7.0, 8.0]], device=device)
    by_hand = [[1 * 5 + 2 * 7, 1 * 6 + 2 * 8], [3 * 5 + 4 * 7, 3 * 6 + 4 * 8]]
    show("torch.mm(a, b)", torch.mm(a, b), by_hand)
    show("torch.matmul(a, b)", torch.matmul(a, b), by_hand)
    show("a @ b", a @ b, by_hand)
    show("a * b is not the matrix product", a * b, [[5, 12], [21, 32]])
    show("matrix @ vector", a @ torch.tensor([1.0, 10.0], device=device), [21, 43])
    show("torch.addmm(c, a, b) = c + a @ b, c ones", torch.addmm(torch.ones_like(a), a, b), [[20, 23], [44, 51]])
    tall = torch.ones(3, 2, device=device)
    show_error("(2, 2) @ (3, 2)", lambda: a @ tall, RuntimeError, "shapes cannot be multiplied")


@section("matrix.batched", "T6")
def matrix_batched(device: torch.device) -> None:
    """Leading dimensions are a batch of matrices: bmm wants exactly one, matmul broadcasts any number."""
    a, b = torch.randn(3, 2, 4, device=device), torch.randn(3, 4, 5, device=device)
    one_by_one = torch.stack([a[i] @ b[i] for i in range(3)])  # (3, 2, 5)
    show("torch.bmm(a, b).shape", torch.bmm(a, b).shape, (3, 2, 5))
    show("largest error against a loop", (torch.bmm(a, b) - one_by_one).abs().max(), 0.0)
    show("a @ b does the same", (a @ b - one_by_one).abs().max(), 0.0)
    wide = torch.ones(7, 1, 2, 3, device=device) @ torch.ones(6, 3, 4, device=device)
    show("(7, 1, 2, 3) @ (6, 3, 4)", wide.shape, (7, 6, 2, 4))
    show("each value is a sum of three ones", wide.unique(), [3])


@section("shape.view", "T7")
def shape_view(device: torch.device) -> None:
    """A view shows the same memory in another shape, and needs that memory in order; reshape copies if it must."""
    x = torch.arange(6, device=device)
    grid = x.view(2, 3)
    show("x.view(2, 3)", grid, [[0, 1, 2], [3, 4, 5]])
    show("x.reshape(3, -1): -1 is worked out", x.reshape(3, -1), [[0, 1], [2, 3], [4, 5]])
    show_error("view of a transposed matrix", lambda: grid.t().view(6), RuntimeError, "view size is not compatible")
    show("reshape of it copies", grid.t().reshape(6), [0, 3, 1, 4, 2, 5])
    show("so does .contiguous().view", grid.t().contiguous().view(6), [0, 3, 1, 4, 2, 5])
    show_error("6 values do not fill 4 places", lambda: x.reshape(2, 2), RuntimeError, "invalid for input of size 6")


@section("shape.permute", "T7")
def shape_permute(device: torch.device) -> None:
    """t and transpose swap two dimensions, permute orders all: an image's (H, W, C) becomes (C, H, W)."""
    x = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device)
    show("x.t()", x.t(), [[1, 4], [2, 5], [3, 6]])
    show("x.transpose(0, 1)", x.transpose(0, 1), [[1, 4], [2, 5], [3, 6]])
    image = torch.arange(2 * 4 * 3, device=device).reshape(2, 4, 3)  # (H, W, C)
    channels_first = image.permute(2, 0, 1)
    show("image.permute(2, 0, 1).shape", channels_first.shape, (3, 2, 4))
    show("pixel (1, 2), channel 0, in both", [channels_first[0, 1, 2], image[1, 2, 0]], [18, 18])
    # A common mistake: reshape gives the wanted shape as well, but the pixels are scrambled.
    show("image.reshape(3, 2, 4)[0, 1, 2] is another", image.reshape(3, 2, 4)[0, 1, 2], 6)


@section("shape.squeeze", "T7")
def shape_squeeze(device: torch.device) -> None:
    """unsqueeze adds a dimension of size 1, squeeze takes it away; flatten and ravel leave a single one."""
    x = torch.tensor([1, 2, 3], device=device)
    show("x.unsqueeze(0): a row", x.unsqueeze(0), [[1, 2, 3]])
    show("x.unsqueeze(1): a column", x.unsqueeze(1), [[1], [2], [3]])
    y = torch.zeros(1, 3, 1, 2, device=device)
    show("(1, 3, 1, 2).squeeze()", y.squeeze().shape, (3, 2))
    # Without an argument, squeeze also removes a batch dimension that happens to be 1: name the one that is meant.
    show("(1, 3, 1, 2).squeeze(2)", y.squeeze(2).shape, (1, 3, 2))
    images = torch.zeros(5, 1, 28, 28, device=device)
    show("images.flatten(1): the batch stays", images.flatten(1).shape, (5, 784))
    show("images.flatten()", images.flatten().shape, (5 * 784,))
    show("images.ravel()", images.ravel().shape, (5 * 784,))


@section("shape.storage", "T7")
def shape_storage(device: torch.device) -> None:
    """Views share storage, so writing to one changes the other; reshape, flatten and ravel copy only if they must."""
    x = torch.zeros(2, 3, device=device)
    views = {
        "view": x.view(6),
        "reshape": x.reshape(3, 2),
        "t": x.t(),
        "transpose": x.transpose(0, 1),
        "permute": x.permute(1, 0),
        "unsqueeze": x.unsqueeze(0),
        "squeeze": x[:1].squeeze(0),
        "slice": x[:, 1:],
        "expand": x[:1].expand(2, 3),
        "flatten": x.flatten(),
        "ravel": x.ravel(),
    }
    show("these share", [name for name, y in views.items() if _shares(x, y)], list(views))
    copies = {
        "t().reshape": x.t().reshape(6),
        "t().flatten": x.t().flatten(),
        "t().ravel": x.t().ravel(),
        "clone": x.clone(),
        "mask": x[x == 0],
        "list": x[[0, 1]],
    }
    show("these copy", [name for name, y in copies.items() if not _shares(x, y)], list(copies))
    x.view(6)[5] = 1
    show("x after x.view(6)[5] = 1", x, [[0, 0, 0], [0, 0, 1]])


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@section("index.slices", "T8")
def index_slices(device: torch.device) -> None:
    """Rows, columns, ranges and negative positions are as in NumPy, but there are no negative steps."""
    x = torch.arange(12, device=device).reshape(3, 4)
    show("x", x, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    show("x[1]: a row", x[1], [4, 5, 6, 7])
    show("x[:, 2]: a column", x[:, 2], [2, 6, 10])
    show("x[0:2, 1:3]", x[0:2, 1:3], [[1, 2], [5, 6]])
    show("x[-1, -1]: the last", x[-1, -1], 11)
    show("x[:, ::2]: every second column", x[:, ::2], [[0, 2], [4, 6], [8, 10]])
    show("x[..., 0]", x[..., 0], [0, 4, 8])
    show_error("x[3] of three rows", lambda: x[3], IndexError, "out of bounds")
    show_error("x[::-1]", lambda: x[::-1], ValueError, "step must be greater than zero")
    show("x.flip(0)[0]: the last row comes first", x.flip(0)[0], [8, 9, 10, 11])


@section("index.masks", "T8")
def index_masks(device: torch.device) -> None:
    """A boolean mask picks where it is true, a list picks by position; `where` chooses between two tensors."""
    x = torch.arange(12, device=device).reshape(3, 4)
    show("x[x > 8]", x[x > 8], [9, 10, 11])
    show("x[(x > 2) & (x % 2 == 0)]", x[(x > 2) & (x % 2 == 0)], [4, 6, 8, 10])
    show("x[[0, 2]]: rows", x[[0, 2]], [[0, 1, 2, 3], [8, 9, 10, 11]])
    # Two lists are read in pairs: elements (0, 1) and (2, 3), not a block of 2 x 2.
    show("x[[0, 2], [1, 3]]: pairs", x[[0, 2], [1, 3]], [1, 11])
    show("torch.where(x > 8, x, -1)[2]", torch.where(x > 8, x, -1)[2], [-1, 9, 10, 11])
    y = x.clone()
    y[y < 10] = 0
    show("y after y[y < 10] = 0", y, [[0] * 4, [0] * 4, [0, 0, 10, 11]])


@section("index.gather", "T8")
def index_gather(device: torch.device) -> None:
    """gather picks in each row a position of its own; index_select picks the same positions in all rows."""
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]], device=device)
    targets = torch.tensor([1, 0], device=device)
    show("gather: each row's own target", scores.gather(1, targets.unsqueeze(1)), [[0.7], [0.5]])
    show("the same by pairs", scores[[0, 1], targets], [0.7, 0.5])
    show("index_select: columns 1 and 0 of all", scores.index_select(1, targets), [[0.7, 0.1], [0.3, 0.5]])


@section("join.cat_stack", "T9")
def join_cat_stack(device: torch.device) -> None:
    """cat joins along a dimension that exists; stack makes a new one."""
    a, b = torch.tensor([[1, 2]], device=device), torch.tensor([[3, 4]], device=device)
    show("torch.cat([a, b], dim=0)", torch.cat([a, b], dim=0), [[1, 2], [3, 4]])
    show("torch.cat([a, b], dim=1)", torch.cat([a, b], dim=1), [[1, 2, 3, 4]])
    show("torch.stack([a, b]).shape", torch.stack([a, b]).shape, (2, 1, 2))
    show("torch.stack([a, b], dim=1)", torch.stack([a, b], dim=1), [[[1, 2], [3, 4]]])
    wide = torch.ones(1, 3, device=device)
    show_error("stack needs equal shapes", lambda: torch.stack([a, wide]), RuntimeError, "equal size")


@section("join.split_chunk", "T9")
def join_split_chunk(device: torch.device) -> None:
    """split takes the size of a piece, chunk the number of pieces; the last piece may be smaller."""
    x = torch.arange(7, device=device)
    show("x.split(3)", x.split(3), [[0, 1, 2], [3, 4, 5], [6]])
    show("x.split([2, 5])", x.split([2, 5]), [[0, 1], [2, 3, 4, 5, 6]])
    show("x.chunk(3)", x.chunk(3), [[0, 1, 2], [3, 4, 5], [6]])
    # chunk rounds the size up, so there may be fewer pieces than asked for; tensor_split keeps the number.
    show("pieces of arange(6).chunk(4)", len(x[:6].chunk(4)), 3)
    show("pieces of arange(6).tensor_split(4)", len(x[:6].tensor_split(4)), 4)


@section("reduce.basic", "T10")
def reduce_basic(device: torch.device) -> None:
    """A reduction takes one dimension away, the one that is named, or all."""
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], device=device)
    show("x.sum()", x.sum(), 21)
    show("x.sum(dim=0): down the columns", x.sum(dim=0), [5, 7, 9])
    show("x.sum(dim=1): along the rows", x.sum(dim=1), [6, 15])
    show("x.mean(dim=1)", x.mean(dim=1), [2, 5])
    show("x.sum(dim=1, keepdim=True)", x.sum(dim=1, keepdim=True), [[6], [15]])
    # keepdim lets the result broadcast against x.
    shares = x / x.sum(dim=1, keepdim=True)
    show("x / x.sum(dim=1, keepdim=True)", shares, [[1 / 6, 2 / 6, 3 / 6], [4 / 15, 5 / 15, 6 / 15]])
    # std divides by n - 1 unless told otherwise; NumPy's divides by n.
    show("x[0].std() with n - 1", x[0].std(), math.sqrt((1 + 0 + 1) / 2))
    show("x[0].std(correction=0) with n", x[0].std(correction=0), math.sqrt((1 + 0 + 1) / 3))
    show_error("the mean of integers", lambda: torch.tensor([1, 2]).mean(), RuntimeError, "floating")


@section("reduce.extremes", "T10")
def reduce_extremes(device: torch.device) -> None:
    """max and min along a dimension give values and their positions; argmax and argmin the positions alone."""
    x = torch.tensor([[1.0, 9.0, 3.0], [7.0, 5.0, 6.0]], device=device)
    values, indices = x.max(dim=1)
    show("x.max(dim=1).values", values, [9, 7])
    show("x.max(dim=1).indices", indices, [1, 0])
    show("x.min(dim=0).values", x.min(dim=0).values, [1, 5, 3])
    show("x.max(), x.min()", [x.max(), x.min()], [9, 1])
    show("x.argmax(dim=1): the predicted classes", x.argmax(dim=1), [1, 0])
    # Without a dimension the position counts through the flattened tensor.
    show("x.argmax(), x.argmin()", [x.argmax(), x.argmin()], [1, 0])


@section("reduce.norm", "T10")
def reduce_norm(device: torch.device) -> None:
    """Lengths: use torch.linalg.norm; the old torch.norm is deprecated and may be removed."""
    x = torch.tensor([[3.0, 4.0], [6.0, 8.0]], device=device)
    show("linalg.norm of the first row", torch.linalg.norm(x[0]), 5)
    show("linalg.vector_norm along rows", torch.linalg.vector_norm(x, dim=1), [5, 10])
    show("1-norm of the first row", torch.linalg.norm(x[0], 1), 7)
    show("linalg.norm of a matrix: root of the squares", torch.linalg.norm(x), math.sqrt(9 + 16 + 36 + 64))
    show("the old torch.norm(x)", torch.norm(x), math.sqrt(125))
    # They part ways at ord=2: linalg means the matrix norm (largest singular value), the old one the vector norm.
    show("linalg.norm(eye(2), 2)", torch.linalg.norm(torch.eye(2), 2), 1)
    show("torch.norm(eye(2), 2)", torch.norm(torch.eye(2), 2), math.sqrt(2))


@section("broadcast.rules", "T11")
def broadcast_rules(device: torch.device) -> None:
    """Shapes are compared from the right; a size of 1, or a missing one, stretches to fit."""
    column, row = torch.tensor([[0], [10], [20]], device=device), torch.tensor([1, 2, 3], device=device)
    show("(3, 1) + (3,) gives (3, 3)", column + row, [[1, 2, 3], [11, 12, 13], [21, 22, 23]])
    show("broadcast_shapes((5, 1, 4), (3, 1))", torch.broadcast_shapes((5, 1, 4), (3, 1)), (5, 3, 4))
    wide = torch.ones(2, 3, device=device)
    show_error("(2, 3) + (2,)", lambda: wide + torch.ones(2, device=device), RuntimeError, "must match")
    show("(2, 3) + (2, 1) fits", (wide + torch.ones(2, 1, device=device)).shape, (2, 3))
    # The silent trap: predictions (3, 1) minus targets (3,) is a 3 x 3 table, and its mean is no loss at all.
    targets = torch.tensor([0, 10, 20], device=device)
    show("(3, 1) - (3,) of equal values is not 0", (column - targets).abs().sum(), 2 * (10 + 10 + 20))
    show("(3, 1) - (3, 1) is", (column - targets.unsqueeze(1)).abs().sum(), 0)


@section("copy.clone_detach_data", "T12")
def copy_clone_detach_data() -> None:
    """clone copies and stays in the graph; detach shares and leaves it; .data shares behind autograd's back."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    clone, detached = x.clone(), x.detach()
    show("clone shares memory, requires grad", (_shares(x, clone), clone.requires_grad), (False, True))
    show("detach shares memory, requires grad", (_shares(x, detached), detached.requires_grad), (True, False))
    show("data shares memory, requires grad", (_shares(x, x.data), x.data.requires_grad), (True, False))
    (clone * 3).sum().backward()
    show("gradients flow through the clone", x.grad, [3, 3])
    show("a copy outside the graph", x.detach().clone().requires_grad, False)

    def slope_of_square(change: Callable[[Tensor], Tensor]) -> Tensor | None:
        w = torch.tensor([2.0], requires_grad=True)
        y = w * w  # backward needs w: the slope is 2w
        change(w)
        y.sum().backward()
        return w.grad

    # Changed behind autograd's back: it says 0, where 2w was 4. This is why .data is best forgotten.
    show("slope 2w at 2 after w.data.zero_(): wrong", slope_of_square(lambda w: w.data.zero_()), [0])
    noticed = "modified by an inplace operation"
    show_error("w.detach().zero_()", lambda: slope_of_square(lambda w: w.detach().zero_()), RuntimeError, noticed)


@section("device.move", "T13")
def device_move(device: torch.device) -> None:
    """Choose a device, move a tensor there or create it there, and bring results back."""
    available = torch.accelerator.is_available()  # cuda, mps, xpu or another
    accelerator = torch.accelerator.current_accelerator() if available else None
    by_hand = (
        "cuda"  # also AMD's
        if torch.cuda.is_available()
        else "mps"  # Apple's
        if torch.backends.mps.is_available()
        else "xpu"  # Intel's
        if torch.xpu.is_available()
        else "cpu"
    )
    show("the best device here", by_hand, accelerator.type if accelerator else "cpu")
    x = torch.tensor([1.0, 2.0])
    moved, created = x.to(device), torch.ones(2, device=device)
    show("x.to(device).device.type", moved.device.type, device.type)
    show("x.to(device) is x", moved is x, device.type == "cpu")  # no copy if it is there already
    show("torch.ones(2, device=device).device.type", created.device.type, device.type)
    show("the sum, back on the CPU", (moved + created).cpu(), [2, 3])
    show("and as Python numbers", (moved + created).tolist(), [2.0, 3.0])
    if device.type != "cpu":
        show_error("tensors of two devices do not mix", lambda: x + created, RuntimeError, "same device")
        show_error("NumPy reads the CPU's memory only", lambda: moved.numpy(), TypeError, "convert")


@section("device.speed", "T13")
def device_speed(device: torch.device) -> None:
    """A large matrix product on the CPU and on the accelerator, 2n**3 operations, timed after synchronising."""
    cpu = torch.device("cpu")
    n = 1000 if device.type == "cpu" else 5000
    for where in [cpu] if device.type == "cpu" else [cpu, device]:
        seconds, product = _time_product(n, where)
        print(f"    {n} x {n} product on {where.type}: {seconds * 1e3:.1f} ms, {2 * n**3 / seconds / 1e9:,.0f} GFLOP/s")
        # Row 3 of the left matrix holds 3, the right matrix holds ones: row 3 of the product holds n * 3.
        show("row 3 holds 3 * n", [product[3, 0], product[3, -1]], [3 * n, 3 * n])


def _time_product(n: int, device: torch.device) -> tuple[float, Tensor]:
    """Return seconds of the faster of two products (n, n), and the product, whose row i holds n * (i % 100)."""
    left = (torch.arange(n, device=device, dtype=torch.float32) % 100).unsqueeze(1).expand(n, n).contiguous()
    right = torch.ones(n, n, device=device)
    seconds = []
    for _ in range(3):  # the first one warms up
        _synchronize(device)
        start = time.perf_counter()
        product = left @ right
        _synchronize(device)  # an accelerator only queues the work; without waiting one times the queueing
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]), product


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def main(argv: list[str] | None = None) -> int:
    return section.run(argv)


if __name__ == "__main__":
    sys.exit(main())
