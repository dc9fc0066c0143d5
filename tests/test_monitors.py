"""GradientMonitor against plain PyTorch, gradients made by hand, and runs known to be healthy or broken; models whose
NaN has a known maker, because the test has built it in."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import types
import unittest
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from torchbasics.monitors import PROBLEMS, GradientMonitor, check_nan_inf, find_nonfinite

NAN, INF = math.nan, math.inf


def setUpModule() -> None:
    torch.set_num_threads(1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def batches(count: int, features: int = 6, classes: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Return (inputs, targets): a cluster per class, noisy enough not to be learned at once."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(classes, features, generator=generator)
    targets = torch.randint(classes, (count, size), generator=generator)
    inputs = 0.3 * centres[targets] + torch.randn(count, size, features, generator=generator)
    return list(zip(inputs, targets, strict=True))


def train(model: nn.Module, optimizer: Any, data: list, *callbacks: Callable[[Any], object]) -> None:
    """Train as Trainer does."""
    trainer = types.SimpleNamespace(model=model, optimizer=optimizer, step=0)
    for inputs, targets in data:
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        trainer.step += 1
        for callback in callbacks:
            callback(trainer)


def given(gradient: Tensor, weight: Tensor | None = None, **options: Any) -> tuple[nn.ParameterDict, GradientMonitor]:
    """Return a model of one parameter `w` with that gradient, and a monitor of it."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones_like(gradient) if weight is None else weight)})
    model["w"].grad = gradient
    return model, GradientMonitor(model, **options)


def verdict(gradient: Tensor, weight: Tensor | None = None, **options: Any) -> str:
    return given(gradient, weight, **options)[1].check_gradients()["w"]["verdict"]


def printed(function: Callable[[], Any]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        function()
    return out.getvalue()


class Numbers(unittest.TestCase):
    def test_they_are_those_of_plain_torch(self) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        watching, alone = GradientMonitor(model, optimizer), GradientMonitor(model)
        inputs, targets = batches(1)[0]
        cross_entropy(model(inputs), targets).backward()
        expected = {}
        for name, parameter in model.named_parameters():
            grad, weight = parameter.grad, parameter.detach()
            assert grad is not None
            record = {key: float(getattr(grad, key)()) for key in ("mean", "std", "max", "min", "norm")}
            record |= {"weight_norm": float(weight.norm()), "grad_weight_ratio": float(grad.norm() / weight.norm())}
            expected[name] = record
        report = alone.check_gradients()
        optimizer.step()
        for name, record in expected.items():
            self.assertEqual([report[name][key] for key in ("has_nan", "has_inf", "verdict")], [False, False, "ok"])
            self.assertIsNone(report[name]["update_ratio"])
            torch.testing.assert_close({key: report[name][key] for key in record}, record, rtol=1e-5, atol=1e-9)
            update_ratio = watching.check_gradients()[name]["update_ratio"]
            self.assertAlmostEqual(update_ratio, 0.3 * record["grad_weight_ratio"], places=6)

    def test_nan_and_inf_are_told_apart_even_together(self) -> None:
        for values, has_nan, has_inf in (
            ([3e38, 3e38], False, False),  # their sum is infinite in float32, they are not
            ([1.0, NAN], True, False),
            ([-INF, 1.0], False, True),
            ([INF, -INF], False, True),
            ([NAN, INF], True, True),
            ([NAN, NAN], True, False),
        ):
            _, monitor = given(torch.tensor(values))
            record = monitor.check_gradients()["w"]
            self.assertEqual((record["has_nan"], record["has_inf"]), (has_nan, has_inf), values)
            self.assertEqual(record["verdict"] == "non-finite", has_nan or has_inf, values)
            printed(monitor.print_gradient_report)

    def test_no_gradient_is_not_a_gradient_of_zero(self) -> None:
        model = nn.ParameterDict({name: nn.Parameter(torch.ones(3)) for name in ("none", "zero", "frozen", "used")})
        model["zero"].grad, model["used"].grad = torch.zeros(3), torch.ones(3)
        model["frozen"].requires_grad_(False)
        report = GradientMonitor(model).check_gradients()
        verdicts = {name: record["verdict"] for name, record in report.items()}
        expected = {"none": "no gradient", "zero": "zero so far", "frozen": "frozen", "used": "ok"}
        self.assertEqual(verdicts, expected)
        self.assertEqual((report["zero"]["norm"], report["none"]["norm"]), (0.0, None))
        self.assertIn("after backward", GradientMonitor(network()).verdict)

    def test_parameters_of_several_types_and_norms_beyond_half_precision(self) -> None:
        kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
        model = nn.ParameterDict({f"w{i}": nn.Parameter(torch.ones(100, 100, dtype=k)) for i, k in enumerate(kinds)})
        model["sparse"], model["empty"] = nn.Parameter(torch.ones(100, 100)), nn.Parameter(torch.empty(0))
        for parameter in model.values():
            parameter.grad = torch.full_like(parameter, 1024j if parameter.is_complex() else 1024)
        model["sparse"].grad = torch.full((100, 100), 1024.0).to_sparse()
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-10)
        monitor = GradientMonitor(model, optimizer)
        optimizer.step()
        for name in model.keys() - {"empty"}:
            record = monitor.check_gradients()[name]
            self.assertEqual((record["norm"], record["has_inf"], record["update_ratio"]), (102_400, False, 1.0), name)

    def test_a_report_reads_the_device_once_however_many_parameters(self) -> None:
        class Reads(TorchFunctionMode):
            count = 0

            def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
                names = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"}
                self.count += getattr(func, "__name__", "") in names
                return func(*args, **(kwargs or {}))

        for layers in (1, 25):
            model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(layers)])
            model(torch.randn(4, 6)).sum().backward()
            with Reads() as reads:
                report = GradientMonitor(model).check_gradients()
            self.assertEqual((len(report), reads.count), (2 * layers, 1))
        with Reads() as reads:
            float(torch.ones(2).sum())
        self.assertEqual(reads.count, 1, "this test sees what it looks for")


class Steps(unittest.TestCase):
    def test_it_reports_on_the_first_three_steps_and_every_fourth_until_detached(self) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watching, callback_only = GradientMonitor(model, optimizer, every=4), GradientMonitor(model, every=4)
        for monitor, expected in ((watching, [1, 2, 3, 4, 8]), (callback_only, [2, 3, 4, 8])):
            seen: list[tuple[int, dict]] = [(0, {})]

            def note(trainer: Any, monitor: Any = monitor, seen: list = seen) -> None:
                if monitor.report is not seen[-1][1] and monitor.report:
                    seen.append((trainer.step, monitor.report))

            train(model, optimizer, batches(9), monitor, note)
            self.assertEqual([step for step, _ in seen[1:]], expected)
            monitor.detach()
        self.assertEqual(watching.step, 9)

    def test_training_is_the_same_with_it(self) -> None:
        weights = []
        for watched in (True, False):
            model = network()
            callbacks = [GradientMonitor(model, every=1)] if watched else []
            train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(6), *callbacks)
            weights.append(nn.utils.parameters_to_vector(model.parameters()))
        self.assertTrue(torch.equal(*weights))

    def test_steps_that_a_scaler_skips_are_not_reported(self) -> None:
        for fused in (False, True):
            model = network()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
            monitor = GradientMonitor(model, optimizer)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            for value in (INF, 1.0):
                optimizer.zero_grad()
                scaler.scale(model(torch.full((1, 6), value)).sum()).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                self.assertEqual((bool(monitor.report), monitor.problems), (value == 1.0, {}), f"fused={fused}")

    def test_names_have_no_prefix_of_a_wrapper(self) -> None:
        plain: Any = network()
        names = [name for name, _ in plain.named_parameters()]
        averaged = torch.optim.swa_utils.AveragedModel(plain)
        compiled: Any = torch.compile(plain)
        for wrapped in (nn.DataParallel(plain), compiled, averaged, nn.DataParallel(compiled)):
            self.assertEqual(list(GradientMonitor(wrapped).check_gradients()), names)
        inner = nn.Module()
        inner.module = nn.Linear(2, 2)  # a part that has this name
        self.assertEqual(list(GradientMonitor(inner).check_gradients()), ["module.weight", "module.bias"])


class Verdicts(unittest.TestCase):
    def test_healthy_runs_are_healthy_and_rates_1000_times_too_high_are_too_high(self) -> None:
        makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "Adam": lambda p, scale: torch.optim.Adam(p, lr=1e-3 * scale),
            "SGD": lambda p, scale: torch.optim.SGD(p, lr=0.05 * scale),
            "momentum": lambda p, scale: torch.optim.SGD(p, lr=0.02 * scale, momentum=0.9),
        }
        for scale, steps, pattern in ((1, 100, "^healthy$"), (1000, 12, "too high")):
            for name, make in makers.items():
                torch.manual_seed(0)
                layers = nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
                model = nn.Sequential(*layers)
                optimizer = make(model.parameters(), scale)
                monitors = [GradientMonitor(model, known) for known in (None, optimizer)]
                with contextlib.redirect_stderr(io.StringIO()):
                    train(model, optimizer, batches(steps, 100, 10, 32), *monitors)
                for monitor in monitors:
                    self.assertRegex(monitor.verdict, pattern, name)

    def test_one_step_is_too_high_only_above_ten_times_the_limit(self) -> None:
        # the limit is 0.2, for the median of three or more; biases begin near zero, and may grow fast
        for ratio, shape, expected in ((1.9, (4, 4), "ok"), (2.1, (4, 4), "too high"), (2.1, (16,), "ok")):
            model, _ = given(torch.ones(shape))
            optimizer = torch.optim.SGD(model.parameters(), lr=ratio)
            monitor = GradientMonitor(model, optimizer)
            optimizer.step()
            self.assertAlmostEqual(monitor.report["w"]["update_ratio"], ratio, places=5)
            self.assertEqual(monitor.report["w"]["verdict"], expected)

    def test_weights_that_begin_at_zero_may_grow(self) -> None:
        model, _ = given(torch.ones(3, 3), torch.zeros(3, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        monitor = GradientMonitor(model, optimizer, every=1)
        for _ in range(4):
            optimizer.step()
        self.assertEqual(monitor.verdict, "healthy")

    def test_weights_that_are_nan_are_non_finite(self) -> None:
        self.assertEqual(verdict(torch.ones(2), torch.tensor([1.0, NAN])), "non-finite")

    def test_fifty_sigmoids_vanish(self) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(50) for layer in (nn.Linear(16, 16), nn.Sigmoid())]
        model = nn.Sequential(*layers, nn.Linear(16, 3))
        cross_entropy(model(torch.randn(8, 16)), torch.zeros(8, dtype=torch.long)).backward()
        monitor = GradientMonitor(model)
        report = monitor.check_gradients()
        self.assertEqual((report["20.weight"]["verdict"], report["100.weight"]["verdict"]), ("vanishing", "ok"))
        self.assertTrue(monitor.verdict.startswith("vanishing (0.weight and "), monitor.verdict)

    def test_a_spike_is_ten_times_the_median_and_the_highest(self) -> None:
        model, monitor = given(torch.ones(4))

        def after(size: float) -> str:
            model["w"].grad = torch.full((4,), size)
            return monitor.check_gradients()["w"]["verdict"]

        self.assertEqual([after(size) for size in (1.0, 1.0, 1.0, 50.0)], ["ok"] * 4, "too few to compare with")
        self.assertEqual({after(1.0 + i / 100) for i in range(10)}, {"ok"})
        self.assertEqual([after(5.0), after(40.0), after(60.0), after(1.0)], ["ok", "ok", "spike", "ok"])
        self.assertEqual(monitor.verdict, "healthy; seen in this run: spike (w)")

    def test_a_gradient_is_zero_after_three_reports_of_exactly_zero(self) -> None:
        model, monitor = given(torch.zeros(4))
        verdicts = []
        for value in (0.0, 0.0, 0.0, 1e-30, 0.0):  # the square of 1e-30 is zero in float32
            model["w"].grad = torch.full((4,), value)
            verdicts.append(monitor.check_gradients()["w"]["verdict"])
        self.assertEqual(verdicts, ["zero so far", "zero so far", "zero", "ok", "zero so far"])

    def test_dead_units_are_rows_without_a_gradient_in_all_reports(self) -> None:
        for layer in (nn.Linear(3, 20), nn.Conv2d(2, 20, 3)):
            monitor = GradientMonitor(layer)
            for silent, expected in ((18, 0.0), (19, 0.0), (18, 0.9), (17, 0.85)):
                layer.weight.grad = torch.ones_like(layer.weight)
                layer.weight.grad[:silent] = 0
                record = monitor.check_gradients()["weight"]
                self.assertAlmostEqual(record["dead_share"], expected, places=6)
                self.assertEqual(record["verdict"], "dead units" if expected >= 0.9 else "ok")
        embedding = nn.Embedding(100, 4)  # the rows of its weight are not units
        embedding(torch.tensor([1])).sum().backward()
        monitor = GradientMonitor(embedding)
        self.assertEqual([monitor.check_gradients()["weight"]["verdict"] for _ in range(3)], ["ok"] * 3)

    def test_the_absolute_threshold_of_tutorials_is_off_by_default(self) -> None:
        self.assertEqual(verdict(torch.tensor([200.0])), "ok")
        self.assertEqual(verdict(torch.tensor([200.0]), max_norm=100), "exploding")
    def test_the_table_shows_the_worst_first(self) -> None:
        model = nn.ParameterDict({name: nn.Parameter(torch.ones(2, 2)) for name in ("fine", "bad", "low", "none")})
        for name, size in (("fine", 1.0), ("bad", NAN), ("low", 1e-20)):
            model[name].grad = torch.full((2, 2), size)
        lines = printed(GradientMonitor(model).print_gradient_report).splitlines()
        self.assertEqual([line.split()[0] for line in lines], ["parameter", "bad", "low", "fine", "none", "model:"])
        expected = f"model: non-finite (bad): {PROBLEMS['non-finite']}; seen in this run: vanishing (low)"
        self.assertEqual(lines[-1], expected)

    def test_a_change_of_the_verdict_is_printed_once(self) -> None:
        model, err = network(), io.StringIO()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
        monitor = GradientMonitor(model, optimizer)
        with contextlib.redirect_stderr(err):
            train(model, optimizer, batches(1), monitor, monitor)
        self.assertEqual(err.getvalue().count("gradients at step 1: too high"), 1, err.getvalue())


class Do(nn.Module):
    """A module that calls `function` with its parts and its input."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*self.children(), *args, **kwargs)


def normalised(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)  # a sample of zeros: 0 / 0


def root(x: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True).sqrt().expand(-1, 4)  # finite at zero, but without a slope


def linear() -> nn.Linear:
    return nn.Linear(4, 4, bias=False)


def inputs() -> Tensor:
    x = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    x[5] = 0
    return x


class FindNonfinite(unittest.TestCase):
    def find(self, start: str, model: Any, x: Any = None, loss: Callable[[Any], Tensor] = torch.sum) -> str:
        """Return what is found, after a check of how it begins."""
        torch.manual_seed(1)
        text = find_nonfinite(model, lambda: loss(model(inputs() if x is None else x))) or "nobody"
        self.assertTrue(text.startswith(start), text)
        return text

    def test_layer_seven_of_twelve_divides_by_zero_for_one_sample(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(*[Do(normalised) if i == 6 else linear() for i in range(12)])
        text = self.find("module '6' (Do) made the first NaN or infinite value: it was given (8, 4) float32", model)
        self.assertIn(" and gave (8, 4) float32 with 4 NaN and 0 infinite of 32 values, the first at (5, 0)", text)

    def test_modules_inside_others_that_take_and_give_dicts_and_tuples(self) -> None:
        def block(inner: nn.Module) -> nn.Module:
            return Do(lambda inner, batch: {"x": (None, [inner(batch["x"][1][0])]), "note": "text"}, inner=inner)

        def loss(batch: dict) -> Tensor:
            return batch["x"][1][0].sum()

        model = nn.Sequential(nn.Sequential(block(nn.ReLU()), block(Do(lambda x: x / 0))), block(nn.ReLU()))
        self.find("module '0.1.inner' (Do)", model, {"x": (None, [inputs()])}, loss)
        model = nn.Sequential(block(linear()), block(Do(root)), block(linear()))
        self.find("module '1.inner' (Do) made the first gradient", model, {"x": (None, [inputs()])}, loss)

    def test_a_container_is_named_for_what_it_does_between_its_modules(self) -> None:
        for function in (normalised, root):
            parts = {"a": linear(), "b": Do(lambda *, value: value)}
            between = Do(lambda a, b, x, f=function: b(value=f(a(x))), **parts)
            self.find("module '1' (Do) made", nn.Sequential(linear(), between, nn.ReLU()))
            self.find("the model itself (Do) made", between)

    def test_a_module_that_is_called_several_times(self) -> None:
        shared = Do(lambda x: x * 1e30)  # finite once, infinite twice
        self.assertIn("e+30 and gave", self.find("module '0' (Do) made", nn.Sequential(shared, nn.ReLU(), shared)))
        functions = iter([torch.relu, root, torch.relu])
        shared = Do(lambda x: next(functions)(x))
        model = nn.Sequential(linear(), shared, linear(), shared, linear(), shared, linear())
        self.find("module '1' (Do) made the first gradient", model)
    def test_masks_of_minus_infinity_are_intended(self) -> None:
        x = inputs() + 1
        mask = Do(lambda x: x.masked_fill(torch.arange(4) == 0, -INF))
        attention = nn.Sequential(mask, nn.Softmax(dim=1), linear())
        self.find("module '1' (Do)", nn.Sequential(attention, Do(lambda x: x.abs() / 0)), x)
        logits = nn.Sequential(linear(), mask)  # they stay infinite, the loss is finite
        self.find("nobody", logits, x, lambda y: cross_entropy(y, torch.ones(8, dtype=torch.long)))
    def test_a_mask_that_is_given_is_not_blamed(self) -> None:
        causal = torch.full((8, 8), -INF).triu(1)
        a: Any = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        b: Any = copy.deepcopy(a)
        model = Do(lambda a, b, x: b(a(x, causal), causal), a=a, b=b)
        self.find("nobody", model, torch.randn(2, 8, 4))
        nn.init.constant_(b.linear1.weight, NAN)
        self.find("module 'b.linear1' (Linear), which holds", model, torch.randn(2, 8, 4))
        nn.init.constant_(b.self_attn.out_proj.weight, NAN)  # a module that is never called
        found = self.find("module 'b.self_attn' (MultiheadAttention)", model, torch.randn(2, 8, 4))
        self.assertIn("which holds NaN or infinity in out_proj.weight, made", found)

    def test_an_infinite_value_is_named_and_not_the_nan_made_of_it(self) -> None:
        model = nn.Sequential(linear(), Do(lambda x: x.abs() / 0), nn.ReLU(), nn.LayerNorm(4))
        self.find("module '1' (Do) made the first NaN or infinite value", model, torch.ones(8, 4))
    def test_parameters_and_buffers_that_are_nan_are_named(self) -> None:
        model: Any = nn.Sequential(linear(), nn.BatchNorm1d(4), linear())
        model[2].register_buffer("mask", torch.tensor(-INF))
        nn.init.constant_(model[2].weight, NAN)
        self.find("module '2' (Linear), which holds NaN or infinity in weight, made the first NaN or", model)
        model[1].running_var[1] = NAN
        self.find("module '1' (BatchNorm1d), which holds NaN or infinity in running_var, made", model.eval())

    def test_bad_inputs_and_a_bad_loss(self) -> None:
        model = nn.Sequential(linear(), linear())
        given = self.find("the loss is not finite: the model itself (Sequential) was given ", model, inputs() * NAN)
        self.assertIn("was given (8, 4) float32 with 32 NaN and 0 infinite of 32 values, the first at (0, 0)", given)
        self.assertNotIn("NaN", self.find("the loss is not finite: ", model, loss=lambda y: y.sum() / 0))
        self.find("the loss, or what else follows", model, loss=lambda y: (y * 0).sum().sqrt())

    def test_the_innermost_module_that_makes_the_first_bad_gradient(self) -> None:
        inside = nn.Sequential(linear(), nn.Sequential(nn.ReLU(), nn.Sequential(Do(root)), nn.Identity()), linear())
        self.find("module '1.1.0' (Do) made the first gradient", inside)
        self.find("module '2' (Do)", nn.Sequential(linear(), nn.Sequential(nn.Identity()), Do(root), linear()))

    def test_a_branch_beside_the_culprit_is_not_blamed(self) -> None:
        residual = Do(lambda a, b, bad, x: a(x) + bad(b(x)), a=linear(), b=nn.ReLU(), bad=Do(root))
        self.find("module '1.bad'", nn.Sequential(linear(), residual, linear()))
        shared = Do(lambda a, beside, c, x: beside(a(x)) + root(c(a(x))), a=linear(), beside=linear(), c=linear())
        self.find("the model itself", shared)
        self.find("module '1' (Do)", nn.Sequential(linear(), Do(lambda beside, x: beside(x) + root(x), a=linear())))

    def test_modules_that_work_in_place(self) -> None:
        self.find("module '1'", nn.Sequential(nn.ReLU(), Do(lambda x: x.div_(0))))
        model = nn.Sequential(linear(), Do(root), Do(lambda x: x + 1), nn.ReLU(inplace=True), linear())
        self.find("module '1' (Do) made the first gradient", model)

    def test_a_gradient_that_overflows_in_one_parameter_alone(self) -> None:
        model: Any = nn.Sequential(linear(), Do(lambda x: x * 1e30), Do(lambda x: x * 1e-30))
        nn.init.constant_(model[0].weight, 1e-30)
        overflow = torch.full((8, 4), 1e20), lambda y: (y * 1e25).sum()
        self.find("the gradients of 0.weight alone are not finite", model, *overflow)

    def test_models_that_are_checkpointed_or_compiled(self) -> None:
        block = nn.Sequential(linear(), Do(root), linear())
        model = Do(lambda block, x: checkpoint(block, x, use_reentrant=False), block=block)
        self.find("module 'block.1' (Do) made the first gradient", model)
        compiled = torch.compile(nn.Sequential(linear(), Do(normalised)), backend="eager")
        compiled(inputs())  # hooks that come after this are not called by compiled code
        self.find("module '1' (Do)", compiled)
    def test_sparse_inputs_no_parameters_and_a_caller_without_gradients(self) -> None:
        layer = Do(lambda x, adjacency: torch.mm(adjacency, x) / 0)
        graph = torch.eye(8).to_sparse()
        self.find("module 'layer'", Do(lambda layer, x: layer(x, graph), layer=layer))
        self.find("nobody", nn.Sequential(nn.ReLU(), Do(root)))
        with torch.no_grad():
            self.find("module '1' (Do) made the first gradient", nn.Sequential(linear(), Do(root)))

    def test_it_changes_nothing(self) -> None:
        def broken(x: Tensor) -> Tensor:
            raise KeyError("from inside")

        seen: list[int] = []
        scale = nn.Parameter(torch.ones(()))  # of the criterion
        for last, start in ((linear(), "None"), (Do(normalised), "module '4'"), (Do(root), "module"), (Do(broken), "")):
            model: Any = nn.Sequential(linear(), nn.BatchNorm1d(4), nn.Dropout(0.5), linear().eval(), last)
            model[0].register_forward_hook(lambda *args: seen.append(1))  # a hook of the user's
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
            with contextlib.suppress(KeyError):
                text = find_nonfinite(model, lambda model=model: (model(torch.zeros(8, 4)) * scale).sum())
                self.assertTrue(str(text).startswith(start), text)
            self.assertTrue(torch.equal(torch.get_rng_state(), state))
            torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
            self.assertIsNone(scale.grad)
            self.assertTrue(all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters()))
            hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
            self.assertEqual(hooks, [0, 1, 0, 0, 0, 0])
        self.assertEqual(len(seen), 4)


class CheckNanInf(unittest.TestCase):
    def test_it_counts_and_says_where_the_first_is(self) -> None:
        x = torch.zeros(2, 3)
        self.assertEqual((check_nan_inf(x, "x"), printed(lambda: check_nan_inf(x, "x"))), (False, ""))
        x[0, 2], x[1, 0], x[1, 1] = NAN, INF, -INF
        expected = "x: 1 NaN and 2 infinite of 6 values, the first at (0, 2)\n"
        self.assertEqual(printed(lambda: self.assertTrue(check_nan_inf(x, "x"))), expected)

    def test_it_takes_tensors_of_any_kind(self) -> None:
        bad = torch.tensor([0.0, NAN])
        for tensor in (torch.tensor(NAN), bad.half(), bad.double(), bad.to(torch.complex64), bad.to_sparse()):
            self.assertIn("x: 1 NaN", printed(functools.partial(check_nan_inf, tensor, "x")))
        for tensor in (torch.tensor([1, 2]), torch.tensor([True]), torch.empty(0, 3), torch.ones(2).requires_grad_()):
            self.assertFalse(check_nan_inf(tensor, "x"), tensor)


if __name__ == "__main__":
    unittest.main()
