"""NaN tracing: models whose culprit is known, because the test has built it in."""

from __future__ import annotations

import contextlib
import io
import math
import random
import unittest
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchbasics.nonfinite import check_nan_inf, describe, find_nonfinite, trace_nonfinite


def setUpModule() -> None:
    torch.set_num_threads(1)


class Do(nn.Module):
    """A module that does `function`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def normalised(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)  # a sample of zeros: 0 / 0


def linear() -> nn.Linear:
    return nn.Linear(4, 4, bias=False)


def hooks(model: nn.Module) -> int:
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    return count + sum(len(p._backward_hooks or ()) for p in model.parameters())


def inputs() -> Tensor:
    torch.manual_seed(0)
    x = torch.rand(8, 4) + 0.1
    x[5] = 0
    return x


class Case(unittest.TestCase):
    def culprit(self, model: nn.Module, x: Any = None, loss: Callable | None = None) -> Any:
        """Forward, and backward if `loss`, in a trace; returns its culprit."""
        torch.manual_seed(1)
        with trace_nonfinite(model) as trace:
            outputs = model(inputs() if x is None else x)
            if loss is not None:
                loss(outputs).backward()
        self.assertEqual(hooks(model), 0)
        return trace.culprit

    def assert_culprit(self, culprit: Any, module: str, phase: str = "forward") -> None:
        self.assertIsNotNone(culprit)
        self.assertEqual((culprit.module, culprit.phase), (module, phase), str(culprit))


class Forward(Case):
    def test_layer_seven_of_twelve_divides_by_zero_for_one_sample(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(*[Do(normalised) if i == 6 else linear() for i in range(12)])
        culprit = self.culprit(model)
        self.assert_culprit(culprit, "6")
        self.assertIn("4 NaN and 0 inf, the first at (5, 0), in 1 of 8 samples", culprit.outputs[0])
        self.assertTrue(culprit.inputs[0].startswith("(8, 4) float32 from "), culprit.inputs)
        self.assertNotIn("NaN", culprit.inputs[0])

    def test_inside_nested_modules_tuples_and_dicts(self) -> None:
        class Block(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.parts = nn.ModuleDict({"first": nn.Identity(), "inner": inner})

            def forward(self, batch: dict) -> dict:
                value = self.parts["inner"](self.parts["first"](batch["x"][1][0]))
                return {"x": (None, [value]), "note": "text"}

        blocks = [Block(Do(normalised) if i == 3 else nn.ReLU()) for i in range(6)]
        model = nn.Sequential(nn.Sequential(*blocks[:2]), nn.Sequential(*blocks[2:]))
        self.assert_culprit(self.culprit(model, {"x": (None, [inputs()])}), "1.1.parts.inner")

    def test_a_container_is_named_for_what_it_does_between_its_modules(self) -> None:
        class Between(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.ReLU(), nn.ReLU()

            def forward(self, x: Tensor) -> Tensor:
                return self.b(normalised(self.a(x)))

        self.assert_culprit(self.culprit(nn.Sequential(nn.ReLU(), nn.Sequential(Between()))), "1.0")
        self.assert_culprit(self.culprit(Between()), "")

    def test_keyword_arguments_are_inputs(self) -> None:
        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bad, self.passing = nn.ReLU(), Do(lambda *, value: value * 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.passing(value=normalised(self.bad(x)))

        self.assert_culprit(self.culprit(Outer()), "")  # not `passing`, which was given it

    def test_a_module_that_changes_its_input_in_place(self) -> None:
        self.assert_culprit(self.culprit(nn.Sequential(nn.ReLU(), Do(lambda x: x.div_(0)))), "1")

    def test_the_second_call_of_a_module(self) -> None:
        shared = Do(lambda x: x * 1e30)  # finite once, infinite twice
        culprit = self.culprit(nn.Sequential(shared, nn.ReLU(), shared))
        self.assert_culprit(culprit, "0")
        self.assertEqual(culprit.call, 2)
        self.assertIn("in its call 2", str(culprit))

    def test_masks_that_end_inside_are_meant(self) -> None:
        mask = Do(lambda x: x.masked_fill(x < 0.5, -math.inf))
        attention = nn.Sequential(mask, nn.Softmax(dim=1))
        x = inputs().clamp(min=0.3)
        x[:, 0] = 1
        self.assertIsNone(self.culprit(nn.Sequential(attention, nn.ReLU()), x))
        self.assert_culprit(self.culprit(nn.Sequential(attention, Do(lambda x: x / 0)), x), "1")

    def test_weights_that_are_not_finite_are_named(self) -> None:
        model = nn.Sequential(linear(), linear(), linear())
        with torch.no_grad():
            model[1].weight[2, 3] = math.nan
        culprit = self.culprit(model)
        self.assert_culprit(culprit, "1")
        self.assertIn("whose own values are not finite (weight (4, 4)", str(culprit))

    def test_what_comes_into_the_model(self) -> None:
        x = inputs()
        x[3, 1] = math.inf
        culprit = self.culprit(nn.Sequential(linear(), linear()), x)
        self.assert_culprit(culprit, "", "input")
        self.assertIn("0 NaN and 1 inf, the first at (3, 1), in 1 of 8 samples", str(culprit))

    def test_nothing_to_find(self) -> None:
        model = nn.Sequential(linear(), nn.BatchNorm1d(4), nn.Embedding(5, 4))
        self.assertIsNone(self.culprit(model[:2], loss=lambda y: y.sum()))
        self.assertIsNone(self.culprit(model[2], torch.tensor([1, 2])))

    def test_exceptions_leave_no_hooks(self) -> None:
        def fail(x: Tensor) -> Tensor:
            raise KeyError("from inside")

        model = nn.Sequential(linear(), Do(fail))
        with self.assertRaises(KeyError), trace_nonfinite(model):
            model(inputs())
        self.assertEqual(hooks(model), 0)

    def test_an_exception_that_the_model_catches(self) -> None:
        class Careful(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.wrong = nn.Sequential(nn.Linear(7, 7))

            def forward(self, x: Tensor) -> Tensor:
                with contextlib.suppress(RuntimeError):
                    return self.wrong(x)
                return normalised(x)

        self.assert_culprit(self.culprit(nn.Sequential(Careful(), nn.ReLU())), "0")

    def test_hooks_of_others_stay(self) -> None:
        model = linear()
        model.register_forward_hook(lambda *args: None)
        with trace_nonfinite(model):
            model(inputs())
        self.assertEqual(hooks(model), 1)

    def test_wrappers_do_not_show_in_names(self) -> None:
        model = nn.DataParallel(nn.Sequential(linear(), Do(normalised)))
        self.assert_culprit(self.culprit(model), "1")


def root(x: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True).sqrt().expand(-1, 4)  # finite, but without a slope at zero


class Backward(Case):
    @staticmethod
    def total(outputs: Tensor) -> Tensor:
        return outputs.sum()

    def test_the_module_that_makes_the_first_bad_gradient(self) -> None:
        model = nn.Sequential(linear(), nn.Sequential(nn.ReLU(), Do(root), nn.Identity()), linear())
        culprit = self.culprit(model, loss=self.total)
        self.assert_culprit(culprit, "1.1", "backward")
        self.assertIn("(8, 4) float32", str(culprit))

    def test_modules_that_share_its_tensor(self) -> None:
        first_inside = nn.Sequential(linear(), nn.Sequential(nn.Sequential(Do(root)), linear()))
        self.assert_culprit(self.culprit(first_inside, loss=self.total), "1.0.0", "backward")
        after_identities = nn.Sequential(linear(), nn.Sequential(nn.Identity()), Do(root), linear())
        self.assert_culprit(self.culprit(after_identities, loss=self.total), "2", "backward")

    def test_a_branch_beside_it_is_not_blamed(self) -> None:
        class Branches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.beside, self.c = linear(), linear(), linear()

            def forward(self, x: Tensor) -> Tensor:
                shared = self.a(x)
                return self.beside(shared) + root(self.c(shared))

        self.assert_culprit(self.culprit(Branches(), loss=self.total), "", "backward")

    def test_a_residual_connection_around_it(self) -> None:
        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.bad = linear(), nn.ReLU(), Do(root)

            def forward(self, x: Tensor) -> Tensor:
                return x + self.bad(self.b(self.a(x)))

        model = nn.Sequential(linear(), Residual(), Residual())
        model[1].bad = nn.Identity()
        self.assert_culprit(self.culprit(model, loss=self.total), "2.bad", "backward")

    def test_a_container_between_its_modules(self) -> None:
        class Between(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = linear(), nn.Identity()

            def forward(self, x: Tensor) -> Tensor:
                return self.b(root(self.a(x)))

        self.assert_culprit(
            self.culprit(nn.Sequential(linear(), Between(), linear()), loss=self.total), "1", "backward"
        )
        self.assert_culprit(self.culprit(Between(), loss=self.total), "", "backward")

    def test_changes_in_place(self) -> None:
        model = nn.Sequential(linear(), Do(root), Do(lambda x: x + 1), nn.ReLU(inplace=True), linear())
        self.assert_culprit(self.culprit(model, loss=self.total), "1", "backward")

    def test_the_loss(self) -> None:
        culprit = self.culprit(nn.Sequential(linear(), linear()), loss=lambda y: (y * 0).sum().sqrt())
        self.assert_culprit(culprit, "", "loss")

    def test_a_first_layer_whose_weights_gradient_overflows(self) -> None:
        model = nn.Sequential(linear(), Do(lambda x: x * 1e30), Do(lambda x: x * 1e-30))
        with torch.no_grad():
            model[0].weight.fill_(1e-30)
        x = torch.full((8, 4), 1e20)
        culprit = self.culprit(model, x, loss=lambda y: (y * 1e25).sum())
        self.assert_culprit(culprit, "0", "backward")

    def test_a_parameter_that_is_used_without_its_module(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = linear()

            def forward(self, x: Tensor) -> Tensor:
                return x @ (self.head.weight * 0).sqrt()

        self.assert_culprit(self.culprit(Tied(), loss=self.total), "head", "backward")

    def test_no_hooks_are_left_on_the_graph(self) -> None:
        model = nn.Sequential(linear(), Do(root))
        with trace_nonfinite(model) as trace:
            outputs = model(inputs())
        outputs.sum().backward()
        self.assertIsNone(trace.culprit)


class Replay(unittest.TestCase):
    def test_names_the_culprit_and_changes_nothing(self) -> None:
        def jitter(x: Tensor) -> Tensor:
            return x * random.random()

        torch.manual_seed(0)
        model = nn.Sequential(linear(), nn.BatchNorm1d(4), nn.Dropout(0.5), Do(normalised), Do(jitter))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        drawn, python = torch.get_rng_state(), random.getstate()
        message = find_nonfinite(model, nn.MSELoss(), torch.zeros(8, 4), torch.zeros(8, 4))
        self.assertIn("module '3' (Do) made the first non-finite value", message or "")
        for name, value in model.state_dict().items():
            self.assertTrue(torch.equal(value, state[name]), name)
        self.assertTrue(all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters()))
        self.assertTrue(torch.equal(torch.get_rng_state(), drawn))
        self.assertEqual(random.getstate(), python)
        self.assertEqual((hooks(model), model.training), (0, True))

    def test_what_the_criterion_learns_is_as_before_too(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))

            def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
                return ((outputs * self.scale - targets) ** 2).mean()

        criterion = Scaled()
        for before in (None, torch.tensor(3.0)):
            criterion.scale.grad = before
            self.assertIsNone(find_nonfinite(nn.Linear(4, 8), criterion, torch.ones(8, 4), torch.zeros(8, 8)))
            self.assertIs(criterion.scale.grad, before)

    def test_also_after_an_exception(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(7, 7))
        with self.assertRaises(RuntimeError):
            find_nonfinite(model, nn.MSELoss(), torch.ones(8, 4), torch.zeros(8, 4))
        self.assertEqual((hooks(model), int(model[0].num_batches_tracked)), (0, 0))

    def test_the_backward_the_loss_and_nobody(self) -> None:
        torch.manual_seed(0)
        x, targets = inputs(), torch.zeros(8, 4)
        slope = find_nonfinite(nn.Sequential(linear(), Do(root)), nn.MSELoss(), x, targets)
        self.assertIn("module '1' (Do) made the first non-finite gradient", slope or "")
        loss = find_nonfinite(linear(), nn.MSELoss(), x, targets / 0)
        self.assertTrue((loss or "").startswith("the loss, () float32"), loss)
        self.assertIsNone(find_nonfinite(linear(), nn.MSELoss(), x, targets))

    def test_without_gradients_around_it(self) -> None:
        with torch.no_grad():
            message = find_nonfinite(nn.Sequential(linear(), Do(root)), nn.MSELoss(), inputs(), torch.zeros(8, 4))
        self.assertIn("non-finite gradient", message or "")

    def test_in_the_precision_of_the_training(self) -> None:
        model = nn.Sequential(linear(), linear())
        with torch.no_grad():
            model[0].weight.fill_(3e4)  # beyond 65504 in half precision
            model[1].weight.fill_(1e-6)
        x, targets = torch.ones(8, 4), torch.zeros(8, 4)
        self.assertIsNone(find_nonfinite(model, nn.MSELoss(), x, targets))
        self.assertIn("module '0' (Linear)", find_nonfinite(model, nn.MSELoss(), x, targets, "fp16") or "")

    def test_a_loss_of_several_outputs_is_not_taken_in_half_precision(self) -> None:
        """As in Trainer, where autocast takes it to float32: 300² is infinite in float16."""

        class Named(nn.Linear):
            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return {"value": super().forward(x)}

        criterion = lambda outputs, y: nn.functional.mse_loss(outputs["value"], y.to(outputs["value"].dtype))  # noqa: E731
        targets = torch.full((4, 1), 300.0)
        self.assertIsNone(find_nonfinite(Named(2, 1), criterion, torch.ones(4, 2), targets, "fp16"))


class Check(unittest.TestCase):
    def check(self, tensor: Tensor) -> tuple[bool, str]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            found = check_nan_inf(tensor, "x")
        return found, out.getvalue()

    def test_counts_and_the_first(self) -> None:
        x = torch.zeros(2, 3)
        self.assertEqual(self.check(x), (False, ""))
        x[0, 2], x[1, 0], x[1, 1] = math.nan, math.inf, -math.inf
        self.assertEqual(self.check(x), (True, "x: 1 NaN and 2 infinite of 6 values, the first at (0, 2)\n"))

    def test_other_kinds_of_tensors(self) -> None:
        bad = torch.tensor([0.0, math.nan])
        for tensor, expected in (
            (torch.tensor(math.nan), True),
            (bad.half(), True),
            (bad.double(), True),
            (bad.to(torch.complex64), True),
            (bad.to_sparse(), True),
            (torch.tensor([1, 2]), False),
            (torch.tensor([True]), False),
            (torch.empty(0, 3), False),
            (torch.ones(2, requires_grad=True), False),
        ):
            self.assertEqual(self.check(tensor)[0], expected, tensor)

    def test_only_tensors(self) -> None:
        with self.assertRaisesRegex(TypeError, "expected a tensor to check, got float"):
            check_nan_inf(math.nan, "x")  # type: ignore[arg-type]

    def test_describe(self) -> None:
        x = torch.tensor([[1.0, 2.0], [6.0, math.nan]])
        self.assertEqual(
            describe(x), "(2, 2) float32 from 1 to 6, mean 3, 1 NaN and 0 inf, the first at (1, 1), in 1 of 2 samples"
        )
        self.assertEqual(describe(torch.tensor([1, 2])), "(2,) int64")
        self.assertIn("none finite, 1 NaN", describe(torch.tensor(math.nan)))


if __name__ == "__main__":
    unittest.main()
