"""Automatic differentiation, from the first slope to second derivatives: lessons that print their code and check it.

python scripts/autograd_demo.py
python scripts/autograd_demo.py --section slope.scalar --section accumulate.add

Try: in regression.by_hand delete the line that clears the gradients. Old slopes then add up, w and b swing to and fro
instead of settling, and the checks fail.
"""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a checkout, use the package beside scripts/

import torch
from torch import Tensor
from torch.nn import functional as F

from torchbasics.demo import Sections, show, show_error

section = Sections(__doc__)


@section("slope.scalar", "A1")
def slope_scalar() -> None:
    """`y.backward()` computes the slope dy/dx and leaves it in `x.grad`.

    requires_grad=True makes torch record what is computed from x. backward walks through that record in reverse and
    applies the chain rule, so nobody has to derive a formula. Here we do, to check it: the slope is 2x + 3."""
    x = torch.tensor(2.0, requires_grad=True)
    y = x**2 + 3 * x + 1
    show(y, 4 + 6 + 1)
    show(x.grad, None)
    y.backward()
    show(x.grad, 2 * 2 + 3)
    # x^3 + 2x^2 + 3x + 4 has the slope 3x^2 + 4x + 3
    x = torch.tensor(2.0, requires_grad=True)
    y = x**3 + 2 * x**2 + 3 * x + 4
    y.backward()
    show(y, 8 + 8 + 6 + 4)
    show(x.grad, 12 + 8 + 3)


@section("slope.several", "A1")
def slope_several() -> None:
    """One call of backward fills in all slopes. For y = wx + b: dy/dw = x, dy/dx = w and dy/db = 1."""
    x = torch.tensor(3.0, requires_grad=True)
    w = torch.tensor(2.0, requires_grad=True)
    b = torch.tensor(1.0, requires_grad=True)
    y = w * x + b
    y.backward()
    show(y, 7)
    show(w.grad, 3)
    show(x.grad, 2)
    show(b.grad, 1)


@section("slope.vector", "A1")
def slope_vector() -> None:
    """The gradient of a tensor has its shape: one slope per element. The sum of squares has the gradient 2x."""
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    (x**2).sum().backward()
    show(x.grad, [2, -4, 6])
    # integers have no slope: they cannot change a little
    whole = torch.tensor([1, 2])
    show_error(lambda: whole.requires_grad_(), RuntimeError, "floating point")


@section("accumulate.add", "A2")
def accumulate_add() -> None:
    """Gradients add up until they are cleared.

    That helps when a weight serves several outputs, and means that each step of a training must begin by clearing."""
    w = torch.tensor(1.0, requires_grad=True)
    (2 * w).backward()
    show(w.grad, 2)
    (3 * w).backward()
    show(w.grad, 2 + 3)
    w.grad.zero_()  # type: ignore[union-attr]
    (4 * w).backward()
    show(w.grad, 4)
    # None frees the memory; it is what optimizer.zero_grad() does
    w.grad = None
    (5 * w).backward()
    show(w.grad, 5)


@section("vector.product", "A3")
def vector_product() -> None:
    """`y.backward()` needs a single number y. For a vector, say how much each element of y counts.

    The derivatives of all y by all x form a table, the Jacobian. `y.backward(v)` computes v times this table, which is
    the gradient of (v * y).sum(); the table itself is never built. Here it is diagonal, with 2x."""
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    y = x**2
    show_error(lambda: y.backward(), RuntimeError, "only for scalar outputs")
    y.backward(torch.tensor([1.0, 10.0, 100.0]))
    show(x.grad, [1 * 2, 10 * 4, 100 * 6])
    x.grad = None
    y = x**2
    y.backward(torch.ones_like(y))
    show(x.grad, [2, 4, 6])  # the gradient of y.sum()


@section("off.no_grad", "A4")
def off_no_grad() -> None:
    """Under `no_grad` nothing is recorded.

    It saves time and memory in evaluation, and it is needed to change a weight: the change is not part of the model."""
    w = torch.ones(2, requires_grad=True)
    show((w * 2).requires_grad, True)  # results inherit it
    with torch.no_grad():
        show((w * 2).requires_grad, False)
        w -= 0.5
    show(w, [0.5, 0.5])
    # Outside no_grad the same change is an error (sub_ is -= as a function).
    # A leaf is a tensor made directly, not computed from others.
    show_error(lambda: w.sub_(0.5), RuntimeError, "leaf Variable that requires grad")

    @torch.no_grad()  # for a whole function
    def double(t: Tensor) -> Tensor:
        return t * 2

    show(double(w).requires_grad, False)


@section("off.detach", "A4")
def off_detach() -> None:
    """`detach` gives the value without its history: backward treats it as a constant."""
    x = torch.tensor(3.0, requires_grad=True)
    (x * x.detach()).backward()
    show(x.grad, 3)  # the slope of x times the constant 3; that of x * x is 6
    show(x.detach().requires_grad, False)
    # NumPy knows no derivatives, so it gets the detached value only
    show_error(lambda: x.numpy(), RuntimeError, "Use tensor.detach().numpy()")
    show(x.detach().numpy().tolist(), 3.0)


@section("regression.by_hand", "A7")
def regression_by_hand() -> None:
    """Fit a line to noisy points of y = 3x + 2: step against the slope of the loss until it is flat.

    This is all of training: predict, measure the loss, get its slopes, change the weights a little."""
    x = torch.linspace(-1, 1, 100)
    y = 3 * x + 2 + 0.1 * torch.randn(100)
    w = torch.zeros((), requires_grad=True)  # a single number: its shape is ()
    b = torch.zeros((), requires_grad=True)
    for _ in range(200):
        loss = ((w * x + b - y) ** 2).mean()  # the mean squared error
        w.grad = b.grad = None
        loss.backward()
        with torch.no_grad():
            w -= 0.2 * w.grad  # type: ignore[operator]
            b -= 0.2 * b.grad  # type: ignore[operator]
    show((w, b), (3, 2), atol=0.05)
    # the line with the smallest squared error has a formula; the mean of x is 0
    show((w, b), ((x * y).sum() / (x * x).sum(), y.mean()))


@section("vector.doubling", "A3")
def vector_doubling() -> None:
    """Torch records what really runs, so loops and conditions need no special treatment."""
    x = torch.tensor([3.0, 4.0], requires_grad=True)  # of length 5
    y = x * 2
    while y.detach().norm() < 1000:  # its length: 10, 20, 40, ... 1280
        y = y * 2
    show(y, [3 * 2**8, 4 * 2**8])
    y.backward(torch.tensor([1.0, 0.01]))
    show(x.grad, [2**8, 0.01 * 2**8])


@section("graph.walk", "A6")
def graph_walk() -> None:
    """Every result knows the operation that made it, and that operation its inputs: this record is the graph.

    Its ends are the leaves: tensors made directly, not computed from others. AccumulateGrad is the step that adds to
    the `.grad` of a leaf."""
    x = torch.tensor(1.0, requires_grad=True)
    w = torch.tensor(2.0, requires_grad=True)
    b = torch.tensor(3.0, requires_grad=True)
    y = torch.relu(w * x + b)  # relu(z) is z, or 0 where z is negative
    show(str(y), "tensor(5., grad_fn=<ReluBackward0>)")  # as print(y) has it
    show(x.grad_fn, None)
    relu: Any = y.grad_fn
    show(relu.name(), "ReluBackward0")
    add = relu.next_functions[0][0]
    show(add.name(), "AddBackward0")
    multiply, to_b = (function for function, _ in add.next_functions)
    show(multiply.name(), "MulBackward0")
    show(to_b.name(), "torch::autograd::AccumulateGrad")
    to_w, to_x = (function for function, _ in multiply.next_functions)
    show((to_w.variable is w, to_x.variable is x, to_b.variable is b), (True, True, True))


@section("graph.leaves", "A6")
def graph_leaves() -> None:
    """Only leaves keep their gradient. `retain_grad` asks for that of a tensor in between."""
    x = torch.tensor(2.0, requires_grad=True)
    between = x * 3
    kept = between**2
    kept.retain_grad()
    (kept * 5).backward()
    show((x.is_leaf, between.is_leaf, kept.is_leaf), (True, False, False))
    show(x.grad, 5 * (2 * 6) * 3)  # the chain rule: 5 * (2 * between) * 3
    show(kept.grad, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it has none
        show(between.grad, None)
    # converting or moving makes a new tensor, which is no leaf: ask after that
    show(torch.ones(2, requires_grad=True).double().is_leaf, False)
    show(torch.ones(2).double().requires_grad_().is_leaf, True)


@section("graph.hooks", "A6")
def graph_hooks() -> None:
    """A hook is called with the gradient of its tensor when backward has it, and may return another one."""
    x = torch.tensor(2.0, requires_grad=True)
    seen: list[float] = []
    handle = x.register_hook(lambda grad: seen.append(grad.item()))
    (x**2).backward()
    show(seen, [4.0])
    handle.remove()
    x.grad = None
    x.register_hook(lambda grad: grad.clamp(max=1.0))
    (x**2).backward()
    show(x.grad, 1)
    show(seen, [4.0])  # the removed hook was not called again


@section("logistic.grad", "A5")
def logistic_grad() -> None:
    """Logistic regression with one weight: the slope of its loss is (prediction - target) times the input.

    sigmoid(z) = 1 / (1 + e^-z) turns any number into a probability. The loss is -log of the probability given to the
    right answer, the cross-entropy (F is torch.nn.functional).
    `autograd.grad` returns the slopes, `backward` stores them in `.grad`."""
    x = torch.tensor(1.1)
    y = torch.tensor(1.0)  # the target: yes
    w = torch.tensor(2.2, requires_grad=True)
    b = torch.tensor(0.0, requires_grad=True)
    loss = F.binary_cross_entropy(torch.sigmoid(w * x + b), y)
    probability = 1 / (1 + math.exp(-2.2 * 1.1))  # in plain Python
    show(loss, -math.log(probability))
    # going back frees what was saved for it, unless retain_graph=True
    slopes = torch.autograd.grad(loss, [w, b], retain_graph=True)
    show(slopes, ((probability - 1) * 1.1, probability - 1))
    show((w.grad, b.grad), (None, None))  # left alone
    loss.backward()
    show((w.grad, b.grad), ((probability - 1) * 1.1, probability - 1))
    show_error(lambda: loss.backward(), RuntimeError, "backward through the graph a second time")


@section("off.inference_mode", "A4")
def off_inference_mode() -> None:
    """`inference_mode` is a stricter no_grad: faster still, but its results cannot take part in training later."""
    x = torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        y = x * 2
    show((y.requires_grad, y.is_inference()), (False, True))
    # the slope of x * y along x is y, so backward would have to save y
    show_error(lambda: x * y, RuntimeError, "Inference tensors cannot be saved for backward")
    show(x * y.clone(), [2, 2])  # a copy is a normal tensor


@section("inplace.error", "A9")
def inplace_error() -> None:
    """Changing in place what backward needs is noticed: each tensor counts its changes."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = torch.exp(x)  # the slope of e^x is e^x itself, so backward saves y
    show(y._version, 0)
    y.add_(1)
    show(y._version, 1)
    show_error(lambda: y.sum().backward(), RuntimeError, "modified by an inplace operation")
    y = torch.exp(x)
    y = y + 1  # a new tensor: the saved one stays as it was
    y.sum().backward()
    show(x.grad, [math.e, math.e**2])


@section("inplace.anomaly", "A9")
def inplace_anomaly() -> None:
    """Anomaly mode shows the line whose result backward needed; look for the change after that line.

    It is slow, so switch it on only to look for a fault. The report comes as a warning, which is caught here."""

    def forward_with_a_fault() -> Tensor:
        x = torch.ones(2, requires_grad=True)
        y = torch.exp(x)
        y.mul_(2)
        return y.sum()

    recorded = warnings.catch_warnings(record=True)
    with recorded as caught, torch.autograd.detect_anomaly():
        warnings.simplefilter("always")
        show_error(lambda: forward_with_a_fault().backward(), RuntimeError, "inplace operation")
    text = "".join(str(warning.message) for warning in caught)
    show("in forward_with_a_fault\n    y = torch.exp(x)" in text, True)
    show("y.mul_(2)" in text, False)  # it does not see the change itself


@section("inplace.nan", "A9")
def inplace_nan() -> None:
    """Anomaly mode also stops at a NaN (not a number) in a gradient, though not at a NaN loss: check the loss yourself.

    The slope of sqrt at 0 is infinite, and infinity times 0 is NaN."""
    x = torch.tensor(0.0, requires_grad=True)
    (0 * torch.sqrt(x)).backward()
    show(x.grad, math.nan)  # without anomaly mode: silently
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            show_error(lambda: (0 * torch.sqrt(x)).backward(), RuntimeError, "returned nan values")
            loss = x + math.nan
            loss.backward()  # no complaint: its slope is 1
    show(loss.isfinite(), False)


@section("function.own", "A8")
def function_own() -> None:
    """A function of your own states its forward and its backward; gradcheck compares the two.

    gradcheck changes each input a little and looks at the output. That needs float64: in float32 the small differences
    drown in rounding. `ctx` (context) carries what backward needs."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(x):  # type: ignore
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):  # type: ignore
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_output):  # type: ignore
            (x,) = ctx.saved_tensors
            # the chain rule: grad_output is the slope of all that follows
            return grad_output * 3 * x**2

    class WrongCube(Cube):
        @staticmethod
        def backward(ctx, grad_output):  # type: ignore
            (x,) = ctx.saved_tensors
            return grad_output * 2 * x**2

    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    show(Cube.apply(x), [1, -8, 27])
    (10 * Cube.apply(x)).sum().backward()
    show(x.grad, [10 * 3, 10 * 12, 10 * 27])
    show(torch.autograd.gradcheck(Cube.apply, x), True)
    show_error(lambda: torch.autograd.gradcheck(WrongCube.apply, x), RuntimeError, "Jacobian mismatch")


@section("function.finite_differences", "A8")
def function_finite_differences() -> None:
    """(f(x + h) - f(x - h)) / 2h is close to the slope, while autograd errs by rounding only.

    The error of the formula shrinks with h^2, but the smaller h is, the more rounding weighs."""

    def difference(x: Tensor, h: float) -> Tensor:
        return (torch.sin(x + h) - torch.sin(x - h)) / (2 * h)

    x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.sin(x), x)
    exact = math.cos(0.7)  # the slope of sin is cos
    show(slope - exact, 0, atol=1e-15)
    x = x.detach()
    # the error is h^2 / 6 times the slope, until rounding takes over
    show(difference(x, 1e-2) - exact, -1e-4 / 6 * exact, rtol=1e-4)
    show(difference(x, 1e-3) - exact, -1e-6 / 6 * exact, rtol=1e-4)
    show(difference(x, 1e-5) - exact, 0, atol=1e-10)
    show(1e-4 < abs(difference(x.float(), 1e-5) - exact) < 1e-2, True)  # float32


@section("second.twice", "A10")
def second_twice() -> None:
    """create_graph=True records the gradient too, so that it can be differentiated: x^4 has 4x^3, then 12x^2."""
    x = torch.tensor(2.0, requires_grad=True)
    (first,) = torch.autograd.grad(x**4, x, create_graph=True)
    show(first, 4 * 2**3)
    (second,) = torch.autograd.grad(first, x)
    show(second, 12 * 2**2)


@section("func.grad", "A10")
def func_grad() -> None:
    """`torch.func.grad` turns a function into its derivative; nothing needs requires_grad or backward."""
    slope = torch.func.grad(torch.sin)
    show(slope(torch.tensor(1.0)), math.cos(1))
    show(torch.func.grad(slope)(torch.tensor(1.0)), -math.sin(1))


@section("func.vmap", "A10")
def func_vmap() -> None:
    """`vmap` runs a function for one sample over a whole batch, without a loop. With grad: one gradient per sample."""
    points = torch.tensor([0.0, 1.0, 2.0])
    show(torch.func.vmap(torch.func.grad(torch.sin))(points), [math.cos(0), math.cos(1), math.cos(2)])

    def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (x @ w - y) ** 2  # of one sample

    w = torch.tensor([1.0, -1.0])
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])  # three samples
    y = torch.tensor([0.0, 1.0, -2.0])
    # in_dims: the same w for all, x and y one by one
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    # each prediction is -1, and the slope 2 (prediction - y) x
    show(per_sample(w, x, y), [[-2, -4], [-12, -16], [10, 12]])


def main(argv: list[str] | None = None) -> int:
    return section.run(argv)


if __name__ == "__main__":
    sys.exit(main())
