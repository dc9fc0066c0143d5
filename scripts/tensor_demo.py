"""Tensors, from the first number to the accelerator: lessons that print their code, and check every value they show.

python scripts/tensor_demo.py
python scripts/tensor_demo.py --section shape.view --section shape.permute

Try: in math.inplace write `a = a + 10` instead of `a.add_(10)`. The first check fails, because `alias` still is the old
tensor.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/

import numpy as np
import torch

from torchbasics.demo import Sections, show, show_error, skip

section = Sections(__doc__)


@section("create.lists", "T1")
def create_from_lists() -> None:
    """A number makes a 0-D tensor, a list a 1-D one, a list of lists a 2-D one.

    A tensor is an array of numbers of one type, like NumPy's. It can also live on a GPU and know its derivatives."""
    scalar = torch.tensor(7)
    show(scalar, 7)
    show(scalar.dim(), 0)  # the number of dimensions
    show(type(scalar.item()), int)  # a Python number
    vector = torch.tensor([1, 2, 3])
    show(vector.shape, (3,))
    show(vector.tolist(), [1, 2, 3])
    show(torch.tensor([[1.5, 2.0], [3.0, 4.0]]), [[1.5, 2], [3, 4]])
    cube = torch.tensor(np.arange(8).reshape(2, 2, 2))
    show(cube, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    show_error(lambda: torch.tensor([[1, 2], [3]]), ValueError, "sequence of length")


@section("create.filled", "T2")
def create_filled() -> None:
    """Constants and regular sequences are made from a shape or a range."""
    show(torch.zeros(2, 3), [[0, 0, 0], [0, 0, 0]])
    show(torch.ones(2), [1, 1])
    show(torch.full((2,), 7.5), [7.5, 7.5])
    # empty only reserves memory: its values are whatever lay there
    show(torch.empty(2, 3).shape, (2, 3))
    show(torch.eye(2), [[1, 0], [0, 1]])
    # diag makes a diagonal matrix of a vector, and reads it from a matrix
    show(torch.diag(torch.tensor([1, 2])), [[1, 0], [0, 2]])
    show(torch.diag(torch.tensor([[1, 2], [3, 4]])), [1, 4])
    # arange leaves out the end, linspace includes it
    show(torch.arange(0, 9, 3), [0, 3, 6])
    show(torch.linspace(0, 1, 5), [0, 0.25, 0.5, 0.75, 1])
    # zeros_like takes the shape and the type of numbers from another tensor
    show(torch.zeros_like(torch.tensor([[1, 2, 3]])), [[0, 0, 0]])


@section("attributes.basic", "T4")
def attributes_basic() -> None:
    """A tensor knows its shape, the type of its numbers, its device and its layout in memory."""
    x = torch.zeros(2, 3, 4)
    show(x.shape, (2, 3, 4))
    show(x.size(-1), 4)  # of the last dimension; x.size() is the shape
    show(x.dim(), 3)
    show(x.numel(), 2 * 3 * 4)  # the number of elements
    show(x.dtype, torch.float32)
    show(x.nbytes, 2 * 3 * 4 * 4)  # a float32 takes 4 bytes
    show(x.device, torch.device("cpu"))  # where it lives
    show(x.layout, torch.strided)  # dense; there are sparse layouts too
    show(x.requires_grad, False)  # autograd_demo explains it


@section("dtype.kinds", "T1", "T3")
def dtype_kinds() -> None:
    """Integers become int64, floats float32 and booleans bool, unless a dtype is given.

    Note the difference from NumPy, whose floats are float64."""
    show(torch.tensor([1, 2]).dtype, torch.int64)
    show(torch.tensor([1.0, 2.0]).dtype, torch.float32)
    show(torch.tensor([True]).dtype, torch.bool)
    show(torch.tensor([1, 2], dtype=torch.float16).dtype, torch.float16)
    # a smaller dtype saves memory, but has a smaller range and precision
    show(torch.float16.itemsize, 2)  # bytes
    show(torch.tensor(70_000.0, dtype=torch.float16), math.inf)  # beyond its maximum, 65,504
    show(torch.tensor(250, dtype=torch.uint8) + 10, (250 + 10) % 256)  # begins again at 0
    # the older torch.Tensor takes sizes or data, and makes float32: avoid it
    show(torch.Tensor(3).shape, (3,))  # three arbitrary values
    show(torch.Tensor([3]).dtype, torch.float32)


@section("dtype.convert", "T3")
def dtype_convert() -> None:
    """`.to(dtype)` converts, and so does the older `.type()`. Conversion to an integer cuts off the fraction."""
    x = torch.tensor([1.7, -1.7])
    show(x.to(torch.int64), [1, -1])
    show(x.type(torch.int64), [1, -1])
    show(x.to(torch.float32) is x, True)  # nothing to do, no copy
    # prefer .to: it also moves to a device, in the same call if need be
    show(x.to("cpu", torch.float64).dtype, torch.float64)


@section("math.elementwise", "T5")
def math_elementwise() -> None:
    """Operators work element by element, and each has a function of the same meaning."""
    a = torch.tensor([1.0, 2.0, 3.0])
    b = torch.tensor([4.0, 5.0, 6.0])
    show(a + b, [5, 7, 9])
    show(torch.add(a, b), [5, 7, 9])
    show(a - b, [-3, -3, -3])
    show(torch.sub(a, b), [-3, -3, -3])
    show(a * b, [4, 10, 18])
    show(torch.mul(a, b), [4, 10, 18])
    show(a / b, [1 / 4, 2 / 5, 1 / 2])
    show(torch.div(a, b), [1 / 4, 2 / 5, 1 / 2])
    show(a**3, [1, 8, 27])
    show(torch.pow(a, 3), [1, 8, 27])


@section("math.inplace", "T5")
def math_inplace() -> None:
    """A trailing underscore changes the tensor itself, and so every other name of it."""
    a = torch.tensor([1.0, 2.0])
    alias = a
    a.add_(10)
    show(alias, [11, 12])
    a += 1  # also in place
    show(alias, [12, 13])
    a = a + 1  # a new tensor, which takes over the name a
    show(alias, [12, 13])
    show(a, [13, 14])


@section("dtype.promotion", "T3")
def dtype_promotion() -> None:
    """When dtypes meet, the higher kind wins: bool, integer, float, complex.

    Within one kind, a Python number does not widen a tensor, so `x + 0.5` keeps a float16 tensor small."""
    whole = torch.tensor([1, 2])
    real = torch.tensor([0.5, 0.5])
    show(whole + real, [1.5, 2.5])
    show((real + real.double()).dtype, torch.float64)  # the wider
    show((whole + 0.5).dtype, torch.float32)  # a higher kind
    show((real.to(torch.float16) + 0.5).dtype, torch.float16)  # the same kind
    show(whole / 2, [0.5, 1.0])
    show(torch.tensor([-3, 3]) // 2, [-2, 1])  # rounds down
    # in place the dtype cannot change
    show_error(lambda: whole.add_(real), RuntimeError, "can't be cast")


@section("create.sharing", "T1")
def create_sharing() -> None:
    """`torch.tensor` copies. `from_numpy` and `.numpy()` share memory: change one and the other changes."""
    array = np.array([1.0, 2.0, 3.0])
    copied = torch.tensor(array)
    shared = torch.from_numpy(array)
    array[0] = 100.0
    show(copied, [1, 2, 3])
    show(shared, [100, 2, 3])
    shared.numpy()[2] = 0.0
    show(array.tolist(), [100, 2, 0])
    # NumPy's numbers are float64, which a float32 network refuses
    show(shared.float().dtype, torch.float32)  # .float() is .to(torch.float32)


@section("index.slices", "T8")
def index_slices() -> None:
    """Rows, columns, ranges and negative positions are as in NumPy, but there are no negative steps."""
    x = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    show(x[1], [4, 5, 6, 7])  # a row
    show(x[:, 2], [2, 6, 10])  # a column
    show(x[0:2, 1:3], [[1, 2], [5, 6]])
    show(x[-1, -1], 11)
    show_error(lambda: x[3], IndexError, "out of bounds")
    show_error(lambda: x[::-1], ValueError, "step must be greater than zero")
    show(x.flip(0), [[8, 9, 10, 11], [4, 5, 6, 7], [0, 1, 2, 3]])


@section("index.masks", "T8")
def index_masks() -> None:
    """A boolean mask picks where it is true, a list picks by position, `where` chooses between two tensors."""
    x = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    show(x[1] > 5, [False, False, True, True])
    show(x[(x > 2) & (x % 2 == 0)], [4, 6, 8, 10])  # & | ~, with parentheses
    show(x[[0, 2]], [[0, 1, 2, 3], [8, 9, 10, 11]])
    # two lists are read in pairs: elements (0, 1) and (2, 3), not a block
    show(x[[0, 2], [1, 3]], [1, 11])
    show(torch.where(x > 8, x, -1)[2], [-1, 9, 10, 11])
    x[x < 10] = 0
    show(x, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 10, 11]])


@section("reduce.basic", "T10")
def reduce_basic() -> None:
    """A reduction takes away the dimension that is named, or all of them."""
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    show(x.sum(), 21)
    show(x.sum(dim=0), [5, 7, 9])  # dimension 0 goes: down the columns
    show(x.mean(dim=1), [2, 5])  # along the rows
    # keepdim leaves a size of 1, so that the result still fits x
    show(x / x.sum(dim=1, keepdim=True), [[1 / 6, 2 / 6, 3 / 6], [4 / 15, 5 / 15, 6 / 15]])
    # std divides by n - 1 unless told otherwise, NumPy's by n
    show(x[0].std(), math.sqrt((1 + 0 + 1) / 2))
    show(x[0].std(correction=0), math.sqrt((1 + 0 + 1) / 3))
    show_error(lambda: torch.tensor([1, 2]).mean(), RuntimeError, "floating")


@section("reduce.extremes", "T10")
def reduce_extremes() -> None:
    """Along a dimension `max` and `min` give values and positions, `argmax` and `argmin` the positions alone."""
    x = torch.tensor([[1.0, 3.0, 9.0], [7.0, 5.0, 6.0]])
    show(x.max(dim=1), ([9, 7], [2, 0]))
    show(x.min(dim=0).values, [1, 3, 6])
    show(x.argmax(dim=1), [2, 0])  # of class scores: the predicted classes
    show(x.argmin(dim=1), [0, 1])
    show(x.argmax(), 2)  # the position counts row after row


@section("create.random", "T2")
def create_random() -> None:
    """Random tensors by distribution: the mean and spread of 100,000 draws are close to the true ones."""
    n = 100_000
    uniform = torch.rand(n)  # between 0 and 1
    show(uniform.mean(), 0.5, atol=0.01)
    show(uniform.std(), 1 / math.sqrt(12), atol=0.01)
    normal = torch.randn(n)  # the bell curve
    show(normal.mean(), 0, atol=0.02)
    show(normal.std(), 1, atol=0.02)
    dice = torch.randint(1, 7, (n,))  # the upper end is left out
    show(dice.unique(), [1, 2, 3, 4, 5, 6])
    coins = torch.bernoulli(torch.full((n,), 0.3))  # 1 with probability 0.3
    show(coins.unique(), [0, 1])
    show(coins.mean(), 0.3, atol=0.01)
    like = torch.randn_like(uniform)  # its shape and dtype, the bell curve
    show(like.std(), 1, atol=0.02)


@section("create.seed", "T2")
def create_seed() -> None:
    """The same seed makes the same draws. A generator of your own leaves the global one alone."""
    torch.manual_seed(42)
    first = torch.rand(3)
    show(torch.equal(first, torch.rand(3)), False)
    torch.manual_seed(42)
    private = torch.Generator().manual_seed(1)
    torch.rand(3, generator=private)
    show(torch.rand(3), first)  # repeated, and undisturbed by private


@section("shape.view", "T4", "T7")
def shape_view() -> None:
    """A view shows the same memory in another shape, and needs it in order. `reshape` copies if it must.

    The stride is the step in memory to the next element along a dimension. `t()` only swaps the strides, and then rows
    no longer follow each other in memory."""
    x = torch.arange(6)
    grid = x.view(2, 3)
    show(grid, [[0, 1, 2], [3, 4, 5]])
    show(x.reshape(3, -1), [[0, 1], [2, 3], [4, 5]])  # -1 is worked out
    show_error(lambda: x.reshape(2, 2), RuntimeError, "invalid for input of size 6")
    show(grid.stride(), (3, 1))  # next row: 3 on, next column: 1 on
    show(grid.t(), [[0, 3], [1, 4], [2, 5]])  # rows and columns swapped
    show(grid.t().stride(), (1, 3))
    show((grid.is_contiguous(), grid.t().is_contiguous()), (True, False))
    show_error(lambda: grid.t().view(6), RuntimeError, "view size is not compatible")
    show(grid.t().reshape(6), [0, 3, 1, 4, 2, 5])
    show(grid.t().contiguous().stride(), (2, 1))  # copies into order


@section("shape.permute", "T7")
def shape_permute() -> None:
    """`transpose` swaps two dimensions, `permute` puts all in a new order.

    Image files have the order (height, width, channel), networks want (channel, height, width)."""
    image = torch.arange(2 * 4 * 3).reshape(2, 4, 3)  # (2, 4, 3 channels)
    channels_first = image.permute(2, 0, 1)
    show(channels_first.shape, (3, 2, 4))
    show(image[1, 2], [18, 19, 20])  # the three channels of pixel (1, 2)
    show(channels_first[:, 1, 2], [18, 19, 20])
    # a common mistake: reshape gives this shape too, but scrambles the pixels
    show(image.reshape(3, 2, 4)[:, 1, 2], [6, 14, 22])
    show(image.transpose(0, 2)[:, 2, 1], [18, 19, 20])  # (3, 4, 2)


@section("shape.squeeze", "T7")
def shape_squeeze() -> None:
    """`unsqueeze` adds a dimension of size 1 and `squeeze` removes it. `flatten` and `ravel` leave a single one."""
    x = torch.tensor([1, 2, 3])
    show(x.unsqueeze(0), [[1, 2, 3]])  # a row
    show(x.unsqueeze(1), [[1], [2], [3]])  # a column
    y = torch.zeros(1, 3, 1, 2)
    show(y.squeeze().shape, (3, 2))
    # without an argument, squeeze also removes a batch of size 1: name one
    show(y.squeeze(2).shape, (1, 3, 2))
    pair = torch.arange(8).reshape(2, 2, 2)
    show(pair.flatten(1), [[0, 1, 2, 3], [4, 5, 6, 7]])  # dimension 0 stays
    show(pair.ravel(), [0, 1, 2, 3, 4, 5, 6, 7])  # as flatten()


@section("shape.storage", "T7")
def shape_storage() -> None:
    """Views share storage, so writing to one changes all. `reshape`, `flatten` and `ravel` copy only if they must."""
    x = torch.zeros(2, 3)
    # the memory is out of order, or the elements are picked
    copies = [x.t().reshape(6), x.t().flatten(), x.t().ravel()]
    copies += [x.clone(), x[x == 0], x[[0, 1]]]
    for copy in copies:
        copy += 1
    show(x, [[0, 0, 0], [0, 0, 0]])
    views = [x.view(6), x.reshape(6), x.flatten(), x.ravel(), x.squeeze()]
    views += [x.t(), x.transpose(0, 1), x.permute(1, 0), x.unsqueeze(0), x[:]]
    for view in views:
        view += 1
    show(x, [[10, 10, 10], [10, 10, 10]])  # all ten write to x


@section("broadcast.rules", "T11")
def broadcast_rules() -> None:
    """Shapes are compared from the right. A size of 1, or a missing one, stretches to fit."""
    column = torch.tensor([[0], [10], [20]])  # (3, 1)
    show(column + torch.tensor([1, 2, 3]), [[1, 2, 3], [11, 12, 13], [21, 22, 23]])
    show(torch.broadcast_shapes((5, 1, 4), (3, 1)), (5, 3, 4))
    show_error(lambda: torch.ones(2, 3) + torch.ones(2), RuntimeError, "must match")
    # the silent trap: predictions (3, 1) minus targets (3,) make a table, and
    # these predictions, all of them right, seem to be wrong
    targets = torch.tensor([0, 10, 20])
    show(column - targets, [[0, -10, -20], [10, 0, -10], [20, 10, 0]])
    show(column - targets.unsqueeze(1), [[0], [0], [0]])


@section("join.cat_split", "T9")
def join_cat_split() -> None:
    """`cat` joins along a dimension that exists, `stack` makes a new one. `split` and `chunk` cut into pieces."""
    a = torch.tensor([[1, 2]])
    b = torch.tensor([[3, 4]])
    show(torch.cat([a, b], dim=0), [[1, 2], [3, 4]])
    show(torch.cat([a, b], dim=1), [[1, 2, 3, 4]])
    show(torch.stack([a, b]), [[[1, 2]], [[3, 4]]])
    show_error(lambda: torch.stack([a, torch.ones(1, 3)]), RuntimeError, "equal size")
    # split takes the size of a piece, chunk the number of pieces
    x = torch.arange(6)
    show(x.split(4), ([0, 1, 2, 3], [4, 5]))
    show(x.split([1, 5]), ([0], [1, 2, 3, 4, 5]))
    # chunk rounds the size up, so there may be fewer pieces than asked for
    show(x.chunk(4), ([0, 1], [2, 3], [4, 5]))


@section("matrix.product", "T5", "T6")
def matrix_product() -> None:
    """Row times column: `mm` is for matrices only, `matmul` (or @) also for vectors and batches."""
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    b = torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    by_hand = [[1 * 5 + 2 * 7, 1 * 6 + 2 * 8], [3 * 5 + 4 * 7, 3 * 6 + 4 * 8]]
    show(torch.mm(a, b), by_hand)
    show(torch.matmul(a, b), by_hand)
    show(a @ b, by_hand)
    show(a * b, [[5, 12], [21, 32]])  # not the matrix product
    show(a @ torch.tensor([1.0, 10.0]), [21, 43])  # matrix and vector
    # of two vectors: a single number
    show(a[0] @ a[1], 1 * 3 + 2 * 4)
    show(torch.dot(a[0], a[1]), 1 * 3 + 2 * 4)
    # addmm(c, a, b) is c + a @ b in one step
    show(torch.addmm(torch.eye(2), a, b), [[20, 22], [43, 51]])
    show_error(lambda: a @ torch.ones(3, 2), RuntimeError, "shapes cannot be multiplied")


@section("matrix.batched", "T6")
def matrix_batched() -> None:
    """Leading dimensions are a batch of matrices: `bmm` wants exactly one, `matmul` broadcasts any number."""
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    b = torch.tensor([[[1.0, 1.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 3.0]]])
    show(torch.bmm(a, b), [[[1, 3], [3, 7]], [[10, 18], [14, 24]]])
    show(a @ b[0], [[[1, 3], [3, 7]], [[5, 11], [7, 15]]])  # b[0] for both
    show((torch.ones(7, 1, 2, 3) @ torch.ones(6, 3, 4)).shape, (7, 6, 2, 4))


@section("index.gather", "T8")
def index_gather() -> None:
    """`gather` picks another position in each row, `index_select` the same positions in all rows.

    `gather` is how a loss finds the score of each sample's own class."""
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
    targets = torch.tensor([1, 0])  # the class of each row
    show(scores.gather(1, targets.unsqueeze(1)), [[0.7], [0.5]])
    # columns 1 and 0 of all rows
    show(scores.index_select(1, targets), [[0.7, 0.1], [0.3, 0.5]])


@section("reduce.norm", "T10")
def reduce_norm() -> None:
    """`torch.linalg.norm` is the length of a vector. The old `torch.norm` is deprecated."""
    x = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    show(torch.linalg.norm(x, dim=1), [5, 10])  # the roots of 9 + 16 and 36 + 64
    show(torch.linalg.norm(x[0], 1), 7)  # 3 + 4
    # they part ways at 2: the matrix norm (largest stretch of a vector) against
    # the length of all elements
    show(torch.linalg.norm(torch.eye(2), 2), 1)
    show(torch.norm(torch.eye(2), 2), math.sqrt(2))


@section("copy.clone_detach_data", "T12")
def copy_clone_detach_data() -> None:
    """`clone` copies and keeps the gradient, `detach` shares without it, `.data` shares behind autograd's back.

    A tensor with requires_grad=True records what is computed from it, so that backward() can put the derivative into
    .grad; autograd_demo teaches this."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    clone = x.clone()
    detached = x.detach()
    detached[0] = 5.0
    show(x, [5, 2])
    show(clone, [1, 2])
    show(detached.requires_grad, False)
    (clone * 3).sum().backward()
    show(x.grad, [3, 3])  # the derivative came through the clone
    # the derivative of w * w at 2 is 4, but w changes before it is computed
    w = torch.tensor(2.0, requires_grad=True)
    y = w * w
    w.data.zero_()
    y.backward()
    show(w.grad, 0)  # silently wrong: forget .data
    y = w * w
    w.detach().zero_()  # the same through detach: backward notices
    show_error(lambda: y.backward(), RuntimeError, "modified by an inplace operation")


@section("device.move", "T13")
def device_move() -> None:
    """`.to(device)` copies a tensor to a device, and operations need their tensors on the same one.

    The device "meta" exists on every machine. Its tensors have a shape and no values: enough to plan a large model."""
    x = torch.tensor([1.0, 2.0])
    show(x.to("cpu") is x, True)  # no copy if it is there already
    moved = x.to("meta")
    show(moved.device, torch.device("meta"))
    show_error(lambda: moved.tolist(), NotImplementedError, "no data")
    huge = torch.ones(10**6, 10**6, device="meta")  # created there
    show(huge.nbytes, 4 * 10**12)  # 4 TB that nobody needs to have


@section("device.accelerator", "T13")
def device_accelerator(device: torch.device) -> None:
    """Create on the accelerator or move there, compute, and bring the result back for NumPy.

    Accelerators are "cuda" (NVIDIA, and AMD's ROCm), "mps" (Apple) and "xpu" (Intel). `device` is what --device says,
    or else the best one here."""
    best = torch.accelerator.current_accelerator(check_available=True)
    print(f"this computer's accelerator: {best}")
    if device.type == "cpu":
        skip("needs an accelerator as --device")
    moved = torch.tensor([1.0, 2.0]).to(device)
    show(moved.device.type, device.type)
    created = torch.ones(2, device=device)
    show_error(lambda: torch.ones(2) + created, RuntimeError, "same device")
    show_error(lambda: moved.numpy(), TypeError, "convert")
    show((moved + created).cpu().numpy().tolist(), [2.0, 3.0])


@section("device.speed", "T13")
def device_speed(device: torch.device) -> None:
    """A large matrix product on the CPU and on the accelerator, timed after synchronising.

    An accelerator only queues the work and returns at once. Without waiting, you would time the queueing."""
    n = 1000 if device.type == "cpu" else 5000
    for where in sorted({"cpu", str(device)}):
        column = torch.arange(float(n), device=where).unsqueeze(1)  # (n, 1)
        left = column.repeat(1, n) % 100  # row i holds n times i % 100
        right = torch.ones(n, n, device=where)
        for _ in range(3):  # the last one counts: the first ones warm up
            start = time.perf_counter()
            product = left @ right
            if where != "cpu":
                torch.accelerator.synchronize(where)
            seconds = time.perf_counter() - start
        rate = 2 * n**3 / seconds / 1e9  # n^3 products, as many additions
        print(f"{where}: {1000 * seconds:.1f} ms, {rate:,.0f} billion a second")
        show(product[3, :4], [3 * n, 3 * n, 3 * n, 3 * n])


def main(argv: list[str] | None = None) -> int:
    return section.run(argv)


if __name__ == "__main__":
    sys.exit(main())
