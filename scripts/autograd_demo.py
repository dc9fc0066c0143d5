"""Automatic differentiation from the first slope to second derivatives: every value shown here is also checked.

python scripts/autograd_demo.py
python scripts/autograd_demo.py --section slope.scalar --section accumulate.add
"""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "torchbasics" / "__init__.py").is_file():  # in a checkout its own package comes first, installed or not
    sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor
from torch.nn import functional as F

from torchbasics.demo import Sections, show, show_error

section = Sections(__doc__)


@section("slope.scalar", "A1")
def slope_scalar(device: torch.device) -> None:
    """backward() computes dy/dx and leaves it in x.grad: y = x^2 + 3x + 1 has the slope 2x + 3."""
    x = torch.tensor(2.0, requires_grad=True, device=device)
    y = x**2 + 3 * x + 1
    show("y at x = 2", y, 4 + 6 + 1)
    show("x.grad before backward", x.grad, None)
    y.backward()
    show("x.grad = 2x + 3", x.grad, 7)


@section("slope.polynomial", "A1")
def slope_polynomial(device: torch.device) -> None:
    """x^3 + 2x^2 + 3x + 4 has the slope 3x^2 + 4x + 3."""
    x = torch.tensor(2.0, requires_grad=True, device=device)
    y = x**3 + 2 * x**2 + 3 * x + 4
    y.backward()
    show("y at x = 2", y, 8 + 8 + 6 + 4)
    show("x.grad", x.grad, 12 + 8 + 3)


@section("slope.several", "A1")
def slope_several(device: torch.device) -> None:
    """One backward serves all inputs: y = wx + b has the slopes x, w and 1."""
    x, w, b = (torch.tensor(value, requires_grad=True, device=device) for value in (3.0, 2.0, 1.0))
    y = w * x + b
    y.backward()
    show("y", y, 7)
    show("w.grad = x", w.grad, 3)
    show("x.grad = w", x.grad, 2)
    show("b.grad = 1", b.grad, 1)


@section("slope.vector", "A1")
def slope_vector(device: torch.device) -> None:
    """A gradient has the shape of its tensor: the sum of squares has the gradient 2x."""
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True, device=device)
    (x**2).sum().backward()
    show("x.grad = 2x", x.grad, [2, -4, 6])
    whole = torch.tensor([1, 2])
    show_error("integers have no slope", lambda: whole.requires_grad_(), RuntimeError, "floating point")


@section("accumulate.add", "A2")
def accumulate_add(device: torch.device) -> None:
    """Gradients add up until they are cleared, which is why a training step begins with zero_grad()."""
    w = torch.tensor(1.0, requires_grad=True, device=device)
    (2 * w).backward()
    show("w.grad after the slope 2", w.grad, 2)
    (3 * w).backward()
    show("w.grad after the slope 3 as well", w.grad, 2 + 3)
    assert w.grad is not None
    w.grad.zero_()
    show("w.grad after w.grad.zero_()", w.grad, 0)
    (4 * w).backward()
    show("w.grad after the slope 4", w.grad, 4)


@section("accumulate.clear", "A2")
def accumulate_clear() -> None:
    """`grad = None` frees the memory, and tells "no gradient" from "gradient zero": optimizers skip the first."""
    w = torch.tensor(1.0, requires_grad=True)
    (2 * w).backward()
    w.grad = None
    show("w.grad", w.grad, None)
    optimizer = torch.optim.SGD([w], lr=1.0, weight_decay=0.5)
    optimizer.step()
    show("w after a step without gradient", w, 1)
    w.grad = torch.zeros(())
    optimizer.step()
    show("w after a step with gradient zero: decayed", w, 1 - 0.5)
    optimizer.zero_grad()  # sets to None, unless told set_to_none=False
    show("w.grad after optimizer.zero_grad()", w.grad, None)


@section("vector.product", "A3")
def vector_product(device: torch.device) -> None:
    """Only a scalar has *the* gradient; for a vector y, backward(v) computes v times the Jacobian."""
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True, device=device)
    y = x**2  # the Jacobian is diagonal: 2x
    show_error("y.backward()", y.backward, RuntimeError, "only for scalar outputs")
    y.backward(torch.tensor([1.0, 10.0, 100.0], device=device), retain_graph=True)
    show("x.grad = v * 2x", x.grad, [2, 40, 600])
    x.grad = None
    y.backward(torch.ones_like(y))
    show("with ones: the gradient of y.sum()", x.grad, [2, 4, 6])


@section("vector.doubling", "A3")
def vector_doubling(device: torch.device) -> None:
    """The graph follows Python's control flow: y is doubled as often as this input needs."""
    x = torch.randn(3, requires_grad=True, device=device)
    y = x * 2
    while y.detach().norm() < 1000:
        y = y * 2
    doublings = max(1, math.ceil(math.log2(1000 / x.detach().norm().item())))
    v = torch.tensor([0.1, 1.0, 0.0001], device=device)
    y.backward(v)
    show("doublings until the norm passes 1000", round(math.log2((y / x)[0].item())), doublings)
    show("x.grad = v * 2^doublings", x.grad, [0.1 * 2**doublings, 2**doublings, 0.0001 * 2**doublings])


@section("off.no_grad", "A4")
def off_no_grad(device: torch.device) -> None:
    """Under no_grad nothing is recorded: faster, with less memory, and right for evaluation and for updates."""
    x = torch.ones(2, requires_grad=True, device=device)

    @torch.no_grad()
    def double(t: Tensor) -> Tensor:
        return t * 2

    show("(x * 2).requires_grad", (x * 2).requires_grad, True)
    with torch.no_grad():
        show("inside `with torch.no_grad()`", (x * 2).requires_grad, False)
        show("x itself keeps it", x.requires_grad, True)
        with torch.enable_grad():
            show("inside enable_grad() again", (x * 2).requires_grad, True)
        x -= 0.5  # an update by hand
    show("from a function decorated with it", double(x).requires_grad, False)
    show("x after an update under no_grad", x, [0.5, 0.5])

    def update_without() -> None:
        nonlocal x
        x -= 0.5

    show_error("the same update outside", update_without, RuntimeError, "leaf Variable that requires grad")


@section("off.inference_mode", "A4")
def off_inference_mode(device: torch.device) -> None:
    """inference_mode is a stricter no_grad: backward cannot save the tensors that are made in it."""
    x = torch.ones(2, requires_grad=True, device=device)
    with torch.inference_mode():
        y = x * 2
    show("y.requires_grad, y.is_inference()", (y.requires_grad, y.is_inference()), (False, True))
    (x + y).sum().backward()
    show("x + y passes, as its slopes need no values", x.grad, [1, 1])
    # The slope of x * y along x is y, which would have to be saved.
    show_error("x * y", lambda: x * y, RuntimeError, "Inference tensors cannot be saved for backward")
    show("x * y.clone(): a normal tensor again", x * y.clone(), [2, 2])


@section("off.detach", "A4")
def off_detach(device: torch.device) -> None:
    """detach cuts one tensor out of the graph: what lies behind it counts as a constant."""
    x = torch.tensor(3.0, requires_grad=True, device=device)
    (x * x.detach()).backward()
    show("the slope of x * constant 3", x.grad, 3)
    x.grad = None
    (x * x).backward()
    show("the slope of x * x", x.grad, 6)
    show("x.detach().requires_grad", x.detach().requires_grad, False)
    show_error("x.numpy()", lambda: x.cpu().numpy(), RuntimeError, "Use tensor.detach().numpy()")


@section("graph.walk", "A6")
def graph_walk() -> None:
    """Every result knows the operation that made it, and that operation its inputs, back to the leaves."""
    x, w, b = (torch.tensor(value, requires_grad=True) for value in (1.0, 2.0, 3.0))
    y = torch.relu(w * x + b)
    assert y.grad_fn is not None
    show("y.grad_fn", y.grad_fn.name(), "ReluBackward0")
    show("x.grad_fn: x was made by the user", x.grad_fn, None)
    steps = []
    nodes: list[tuple[Any, int]] = [(y.grad_fn, 0)]
    while nodes:
        node, depth = nodes.pop(0)
        steps.append("  " * depth + node.name())
        nodes = [(parent, depth + 1) for parent, _ in node.next_functions if parent is not None] + nodes
    tree = [
        "ReluBackward0",
        "  AddBackward0",
        "    MulBackward0",
        "      torch::autograd::AccumulateGrad",
        "      torch::autograd::AccumulateGrad",
        "    torch::autograd::AccumulateGrad",
    ]
    show("walked back along next_functions", "\n".join(steps), "\n".join(tree))
    add: Any = y.grad_fn.next_functions[0][0]
    last = add.next_functions[1][0]
    show("the last AccumulateGrad holds b", last.variable is b, True)


@section("graph.leaves", "A6")
def graph_leaves() -> None:
    """Only leaves keep their gradient; retain_grad asks for that of a tensor in between."""
    x = torch.tensor(2.0, requires_grad=True)
    middle = x * 3
    kept = middle**2
    kept.retain_grad()
    (kept * 5).backward()
    show("x.is_leaf, middle.is_leaf", (x.is_leaf, middle.is_leaf), (True, False))
    show("x.grad = 5 * 2 * 3x * 3", x.grad, 5 * 2 * 6 * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns whoever reads the .grad of a non-leaf
        show("middle.grad", middle.grad, None)
    show("kept.grad, after kept.retain_grad()", kept.grad, 5)
    # Moving or converting makes a non-leaf: create on the device, or ask for gradients after the move.
    show("ones(2, requires_grad=True).double()", torch.ones(2, requires_grad=True).double().is_leaf, False)
    show("ones(2).double().requires_grad_()", torch.ones(2).double().requires_grad_().is_leaf, True)


@section("graph.hooks", "A6")
def graph_hooks() -> None:
    """A hook sees a gradient on its way, and may replace it."""
    x = torch.tensor(2.0, requires_grad=True)
    seen: list[float] = []
    handle = x.register_hook(lambda grad: seen.append(grad.item()))
    (x**2).backward()
    show("the hook saw", seen, [4.0])
    handle.remove()
    x.grad = None
    x.register_hook(lambda grad: grad.clamp(max=1.0))
    (x**2).backward()
    show("x.grad with a clamping hook", x.grad, 1)
    show("the removed hook saw no more", seen, [4.0])


@section("logistic.loss", "A5")
def logistic_loss(device: torch.device) -> None:
    """Logistic regression with one weight: the loss is -log(sigmoid(wx + b)) for a target of 1."""
    x, y, w, b = _logistic_data(device)
    z = 1.1 * 2.2 + 0.0
    show("the loss", _logistic_loss(x, y, w, b), math.log(1 + math.exp(-z)))


@section("logistic.grad", "A5")
def logistic_grad(device: torch.device) -> None:
    """autograd.grad returns gradients; backward stores them in .grad; both follow the formula (a - y) x."""
    x, y, w, b = _logistic_data(device)
    a = 1 / (1 + math.exp(-1.1 * 2.2))
    loss = _logistic_loss(x, y, w, b)
    (grad_w,) = torch.autograd.grad(loss, w, retain_graph=True)
    (grad_b,) = torch.autograd.grad(loss, b, retain_graph=True)
    show("autograd.grad for w: (a - y) x", grad_w, (a - 1) * 1.1)
    show("autograd.grad for b: a - y", grad_b, a - 1)
    show("it left w.grad alone", w.grad, None)
    loss.backward()
    show("w.grad after backward", w.grad, grad_w)
    show("b.grad after backward", b.grad, grad_b)


@section("logistic.twice", "A5")
def logistic_twice(device: torch.device) -> None:
    """backward frees the graph as it goes; a second one needs retain_graph=True in the first."""
    x, y, w, b = _logistic_data(device)
    loss = _logistic_loss(x, y, w, b)
    torch.autograd.grad(loss, w)
    show_error("a second time", loss.backward, RuntimeError, "backward through the graph a second time")
    loss = _logistic_loss(x, y, w, b)
    loss.backward(retain_graph=True)
    first = w.grad.clone() if w.grad is not None else None
    loss.backward()
    assert first is not None
    show("with retain_graph=True: added twice", w.grad, 2 * first)


def _logistic_data(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = torch.tensor(1.1, device=device), torch.tensor(1.0, device=device)
    w = torch.tensor(2.2, requires_grad=True, device=device)
    b = torch.tensor(0.0, requires_grad=True, device=device)
    return x, y, w, b


def _logistic_loss(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.binary_cross_entropy(torch.sigmoid(w * x + b), y)


@section("regression.by_hand", "A7")
def regression_by_hand(device: torch.device) -> None:
    """Linear regression without an optimizer: step against the gradient until w is near 3 and b near 2."""
    x = torch.linspace(-1, 1, 100, device=device)
    y = 3 * x + 2 + 0.1 * torch.randn(100, device=device)
    w = torch.zeros((), requires_grad=True, device=device)
    b = torch.zeros((), requires_grad=True, device=device)
    for _ in range(200):
        loss = ((w * x + b - y) ** 2).mean()
        w.grad = b.grad = None
        loss.backward()
        assert w.grad is not None and b.grad is not None
        with torch.no_grad():  # the update is no part of the model
            w -= 0.2 * w.grad
            b -= 0.2 * b.grad
    # With x of mean 0, least squares has a closed form: w = sum(xy) / sum(xx), b = mean(y).
    show("w, against least squares", w, (x * y).sum() / (x * x).sum(), atol=1e-4)
    show("b, against least squares", b, y.mean(), atol=1e-4)
    show("w is near 3", w, 3, atol=0.1)
    show("b is near 2", b, 2, atol=0.1)


@section("function.own", "A8")
def function_own() -> None:
    """A function of one's own states its forward and its backward; gradcheck compares them by finite differences."""
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = Cube.apply(x)
    y.sum().backward()
    show("Cube.apply(x)", y, [1, -8, 27])
    show("x.grad = 3x^2", x.grad, [3, 12, 27])
    # gradcheck needs float64: in float32 the differences drown in rounding.
    show("gradcheck(Cube.apply, x)", torch.autograd.gradcheck(Cube.apply, x), True)
    check = torch.autograd.gradcheck
    show_error("gradcheck of a wrong backward", lambda: check(WrongCube.apply, x), RuntimeError, "Jacobian mismatch")


class Cube(torch.autograd.Function):
    """x^3, with the derivative 3x^2 written by hand."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x**3

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        (x,) = ctx.saved_tensors
        return grad_output * 3 * x**2


class WrongCube(Cube):
    """x^3 with a wrong derivative, for gradcheck to find."""

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        (x,) = ctx.saved_tensors
        return grad_output * 2 * x**2


@section("function.finite_differences", "A8")
def function_finite_differences() -> None:
    """(f(x + h) - f(x - h)) / 2h comes close to the slope, in float64; autograd errs by rounding only."""
    x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (analytic,) = torch.autograd.grad(torch.sin(x), x)
    show("autograd: cos(0.7)", analytic, math.cos(0.7))
    numeric = _central_difference(x.detach(), 1e-5)
    show("float64, h = 1e-5: the error is near 1e-11", abs(numeric - analytic).item() < 1e-9, True)
    rough = _central_difference(x.detach().float(), 1e-5)
    show("float32, h = 1e-5: the error is far larger", abs(rough - analytic).item() > 1e-5, True)
    # The error of the formula falls with h^2: the step ten times larger, the error a hundred times.
    errors = [abs(_central_difference(x.detach(), h) - analytic) for h in (1e-2, 1e-3)]
    show("error at h = 1e-2 over error at 1e-3", errors[0] / errors[1], 100, rtol=0.01)


def _central_difference(x: Tensor, h: float) -> Tensor:
    return (torch.sin(x + h) - torch.sin(x - h)) / (2 * h)


@section("inplace.error", "A9")
def inplace_error(device: torch.device) -> None:
    """Changing in place what backward needs is noticed: each tensor counts its changes."""
    x = torch.tensor([1.0, 2.0], requires_grad=True, device=device)
    y = torch.exp(x)  # the slope of exp is its own result, so backward needs y
    show("y's version", y._version, 0)
    y.add_(1)
    show("y's version after y.add_(1)", y._version, 1)
    show_error("backward", lambda: y.sum().backward(), RuntimeError, "modified by an inplace operation")
    z = torch.exp(x)
    (z + 1).sum().backward()  # out of place, all is well
    show("x.grad with z + 1 instead", x.grad, [math.e, math.e**2])


@section("inplace.anomaly", "A9")
def inplace_anomaly() -> None:
    """Anomaly mode points at the forward line whose backward failed; the guilty change in place comes after it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autograd.detect_anomaly():
            show_error("backward", _forward_with_a_fault().backward, RuntimeError, "modified by an inplace operation")
    text = "\n".join(str(warning.message) for warning in caught)
    show("its report names the function", "_forward_with_a_fault" in text, True)
    show("and shows the line whose result changed", "y = torch.exp(x)" in text, True)
    show("but not y.mul_(2), which changed it", "y.mul_(2)" in text, False)


def _forward_with_a_fault() -> Tensor:
    x = torch.ones(2, requires_grad=True)
    y = torch.exp(x)
    y.mul_(2)
    return y.sum()


@section("inplace.nan", "A9")
def inplace_nan() -> None:
    """Anomaly mode also stops at a NaN gradient, though not at a NaN loss: check that one with isfinite."""
    x = torch.tensor(0.0, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            # The slope of sqrt at 0 is infinite, and infinity times zero is no number.
            show_error("0 * sqrt(0)", lambda: (0 * torch.sqrt(x)).backward(), RuntimeError, "returned nan values")
            loss = x + math.nan
            loss.backward()  # no complaint: the slope is 1
    show("loss.isfinite() of x + nan", loss.isfinite(), False)
    x.grad = None
    (0 * torch.sqrt(x)).backward()
    show("without anomaly mode x.grad is silently", x.grad, math.nan)


@section("second.twice", "A10")
def second_twice(device: torch.device) -> None:
    """create_graph=True makes the gradient itself differentiable: x^3 has 3x^2, then 6x."""
    x = torch.tensor(2.0, requires_grad=True, device=device)
    (first,) = torch.autograd.grad(x**3, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    show("3x^2 at 2", first, 12)
    show("6x at 2", second, 12)
    show("without create_graph: requires_grad", torch.autograd.grad(x**3, x)[0].requires_grad, False)


@section("second.hessian", "A10")
def second_hessian(device: torch.device) -> None:
    """All second derivatives of x^2 y + y^3 form the matrix [[2y, 2x], [2x, 6y]]."""
    at = torch.tensor([2.0, 3.0], device=device)
    gradient = torch.func.grad(lambda p: p[0] ** 2 * p[1] + p[1] ** 3)
    show("the gradient (2xy, x^2 + 3y^2) at (2, 3)", gradient(at), [12, 31])
    show("its Jacobian: torch.func.jacrev", torch.func.jacrev(gradient)(at), [[6, 4], [4, 18]])


@section("func.grad_vmap", "A10")
def func_grad_vmap(device: torch.device) -> None:
    """torch.func.grad makes the derivative a function; vmap runs a function over a batch without a loop."""
    slope = torch.func.grad(torch.sin)
    show("grad(sin)(0)", slope(torch.tensor(0.0, device=device)), 1)
    show("grad(grad(sin))(1) = -sin(1)", torch.func.grad(slope)(torch.tensor(1.0, device=device)), -math.sin(1))
    points = torch.tensor([0.0, 1.0, 2.0], device=device)
    show("vmap(grad(sin)) of 0, 1, 2", torch.func.vmap(slope)(points), [math.cos(0), math.cos(1), math.cos(2)])


@section("func.per_sample", "A10")
def func_per_sample(device: torch.device) -> None:
    """Together they give one gradient per sample, where backward gives only their mean."""
    w = torch.tensor([1.0, -1.0], device=device)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device)  # (B, 2)
    y = torch.tensor([0.0, 1.0, -2.0], device=device)  # (B,)

    def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (x @ w - y) ** 2

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(w, x, y)  # (B, 2)
    # All three predictions are -1; the slope is 2 (prediction - y) x, with the errors -1, -2 and 1.
    show("one gradient per sample", per_sample, [[-2, -4], [-12, -16], [10, 12]])
    leaf = w.clone().requires_grad_()
    loss(leaf, x, y).mean().backward()
    show("their mean is what backward gives", leaf.grad, per_sample.mean(0))


def main(argv: list[str] | None = None) -> int:
    return section.run(argv)


if __name__ == "__main__":
    sys.exit(main())
