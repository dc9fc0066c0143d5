"""GradientMonitor against plain PyTorch, hand-made gradients, and runs that are known to be healthy or broken."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import unittest
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchbasics.digits import draw_digits
from torchbasics.models import MNISTNet, SimpleNet
from torchbasics.monitors import PROBLEMS, VERDICTS, GradientMonitor
from torchbasics.optim import averaged_copy
from torchbasics.trainer import Trainer


def setUpModule() -> None:
    torch.set_num_threads(1)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def batches(count: int = 4, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def backward(model: nn.Module, batch: tuple[Tensor, Tensor] | None = None) -> None:
    inputs, targets = batch or batches(1)[0]
    nn.functional.cross_entropy(model(inputs), targets).backward()


def digits(samples: int, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    images, labels = draw_digits(samples, seed=0)
    images = images.reshape(-1, 1, 28, 28).float()
    images = (images - images.mean()) / images.std()
    return list(zip(images.split(size), labels.split(size), strict=True))


def given(gradient: Tensor, weight: Tensor | None = None) -> tuple[nn.ParameterDict, GradientMonitor]:
    """A model of one parameter `w` with that gradient, and a monitor of it."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones_like(gradient) if weight is None else weight)})
    model["w"].grad = gradient
    return model, GradientMonitor(model)


class Transfers:
    """Counts what reads values from the device, by torch's functions and by its operations."""

    def __init__(self) -> None:
        self.count = 0
        names = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"}
        outer = self

        class Functions(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
                outer.count += getattr(func, "__name__", "") in names
                return func(*args, **(kwargs or {}))

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
                reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
                outer.count += func in reads
                return func(*args, **(kwargs or {}))

        self.modes = (Functions, Operations)

    def __enter__(self) -> Transfers:
        self.stack = contextlib.ExitStack()
        for mode in self.modes:
            self.stack.enter_context(mode())
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()


class Case(unittest.TestCase):
    def assert_close(self, actual: float | None, expected: Tensor | float, message: str = "") -> None:
        self.assertIsNotNone(actual, message)
        self.assertTrue(
            math.isclose(float(actual or 0.0), float(expected), rel_tol=1e-5, abs_tol=1e-9),
            f"{message}: {actual} is not {float(expected)}",
        )


class Numbers(Case):
    def test_against_plain_torch(self) -> None:
        model = network()
        backward(model)
        report = GradientMonitor(model).check_gradients()
        self.assertEqual(list(report), [name for name, _ in model.named_parameters()])
        for name, parameter in model.named_parameters():
            grad, record = parameter.grad, report[name]
            assert grad is not None
            for key in ("mean", "std", "max", "min", "norm"):
                self.assert_close(record[key], getattr(grad, key)(), f"{name} {key}")  # type: ignore[literal-required]
            self.assert_close(record["weight_norm"], parameter.norm(), name)
            self.assert_close(record["grad_weight_ratio"], grad.norm() / parameter.norm(), name)
            self.assertIsNone(record["update_ratio"])
            self.assertEqual((record["has_nan"], record["has_inf"], record["verdict"]), (False, False, "ok"))

    def test_the_update_ratio_of_sgd_by_hand(self) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        monitor = GradientMonitor(model, optimizer)
        backward(model)
        expected = {n: 0.3 * p.grad.norm() / p.norm() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        for name, record in monitor.check_gradients().items():
            self.assert_close(record["update_ratio"], expected[name], name)

    def test_one_value_and_equal_values_have_no_spread(self) -> None:
        for gradient in (torch.tensor([2.0]), torch.full((1000,), 2.0)):
            record = given(gradient)[1].check_gradients()["w"]
            self.assertEqual((record["mean"], record["std"], record["verdict"]), (2.0, 0.0, "ok"))

    def test_a_small_spread_around_a_large_mean(self) -> None:
        gradient = 100 + 1e-3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
        record = given(gradient)[1].check_gradients()["w"]
        self.assertAlmostEqual(record["std"] or 0.0, float(gradient.double().std()), delta=2e-5)

    def test_nan_and_inf_are_told_apart_even_together(self) -> None:
        nan, inf = math.nan, math.inf
        for values, has_nan, has_inf in (
            ([1.0, 2.0], False, False),
            ([3e38, 3e38], False, False),  # their sum is infinite in float32, they are not
            ([1.0, nan], True, False),
            ([1.0, inf], False, True),
            ([-inf, 1.0], False, True),
            ([inf, -inf], False, True),
            ([nan, inf], True, True),
            ([nan, nan], True, False),
        ):
            _, monitor = given(torch.tensor(values))
            record = monitor.check_gradients()["w"]
            self.assertEqual((record["has_nan"], record["has_inf"]), (has_nan, has_inf), values)
            self.assertEqual(record["verdict"] == "non-finite", has_nan or has_inf, values)
            monitor.format_report()

    def test_no_gradient_is_not_zero_gradient(self) -> None:
        model = nn.ParameterDict({name: nn.Parameter(torch.ones(3)) for name in ("none", "zero", "frozen", "used")})
        model["zero"].grad, model["used"].grad = torch.zeros(3), torch.ones(3)
        model["frozen"].requires_grad_(False)
        report = GradientMonitor(model).check_gradients()
        verdicts = {name: record["verdict"] for name, record in report.items()}
        expected = {"none": "no gradient", "zero": "zero so far", "frozen": "frozen", "used": "ok"}
        self.assertEqual(verdicts, expected)
        self.assertEqual((report["zero"]["norm"], report["none"]["norm"]), (0.0, None))

    def test_sparse_gradients_have_the_numbers_of_dense_ones(self) -> None:
        reports = []
        for sparse in (True, False):
            torch.manual_seed(0)
            model = nn.Embedding(20, 4, sparse=sparse)
            (model(torch.tensor([3, 5, 3])) ** 2).sum().backward()  # 3 twice: not coalesced
            reports.append(GradientMonitor(model).check_gradients()["weight"])
        for key in ("mean", "std", "max", "min", "norm", "weight_norm", "grad_weight_ratio"):
            self.assert_close(reports[0][key], reports[1][key], key)  # type: ignore[literal-required]

    def test_a_sparse_gradient_of_no_row_is_zero(self) -> None:
        empty = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.long), torch.empty(0, 4), (20, 4))
        record = given(empty, torch.ones(20, 4))[1].check_gradients()["w"]
        self.assertEqual((record["norm"], record["mean"], record["verdict"]), (0.0, 0.0, "zero so far"))

    def test_several_types_and_no_overflow_in_half(self) -> None:
        kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
        model = nn.ParameterDict(
            {f"w{i}": nn.Parameter(torch.ones(10_000, dtype=kind)) for i, kind in enumerate(kinds)}
        )
        for parameter in model.values():
            parameter.grad = torch.full_like(parameter, 1024)
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-10)
        monitor = GradientMonitor(model, optimizer)
        optimizer.step()
        for name, record in monitor.check_gradients().items():
            self.assert_close(record["norm"], 102_400, name)  # more than half precision can hold
            self.assertEqual((record["has_inf"], record["update_ratio"]), (False, 1.0), name)

    def test_a_complex_gradient_is_its_real_and_imaginary_parts(self) -> None:
        parts = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
        record = given(torch.view_as_complex(parts), torch.ones(40, dtype=torch.complex64))[1].check_gradients()["w"]
        self.assert_close(record["mean"], float(parts.mean()))
        self.assert_close(record["std"], float(parts.std()))

    def test_tiny_gradients_are_not_zero(self) -> None:
        record = given(torch.full((4, 4), 1e-30))[1].check_gradients()["w"]  # its square is zero in float32
        self.assertNotEqual(record["verdict"], "zero so far")
        self.assertGreater(record["norm"] or 0.0, 0.0)

    def test_a_parameter_without_elements(self) -> None:
        model = nn.ParameterDict({"empty": nn.Parameter(torch.empty(0)), "w": nn.Parameter(torch.ones(2))})
        for parameter in model.values():
            parameter.grad = torch.ones_like(parameter)
        self.assert_close(GradientMonitor(model).check_gradients()["w"]["norm"], math.sqrt(2))


class OneTransfer(Case):
    def test_per_report_however_many_parameters(self) -> None:
        for layers in (1, 25):
            torch.manual_seed(0)
            model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(layers)])
            model(torch.randn(4, 6)).sum().backward()
            monitor = GradientMonitor(model)
            with Transfers() as transfers:
                report = monitor.check_gradients()
            self.assertEqual((len(report), transfers.count), (2 * layers, 1))

    def test_per_watched_step_and_none_in_the_others(self) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = GradientMonitor(model, optimizer, every=5)
        counts = []
        for batch in batches(10):
            backward(model, batch)
            with Transfers() as transfers:
                monitor._before_step(optimizer)
                monitor._after_step(optimizer)
            counts.append(transfers.count)
        self.assertEqual(counts, [1, 1, 1, 0, 1, 0, 0, 0, 0, 1])

    def test_this_test_sees_transfers(self) -> None:
        value = torch.ones(2)
        for read in (lambda: value[0].item(), lambda: value.tolist(), lambda: bool(value[0]), lambda: float(value[0])):
            with Transfers() as transfers:
                read()
            self.assertGreaterEqual(transfers.count, 1)


class Steps(Case):
    """What the optimizer really used."""

    def fit(self, model: nn.Module, data: list, monitor_options: dict | None = None, **options: Any) -> GradientMonitor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = GradientMonitor(model, optimizer, verbose=False, **(monitor_options or {}))
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, "cpu", on_step_end=[monitor], **options)
        trainer.fit(data, None, 1, verbose=False)
        self.trainer = trainer
        return monitor

    def norms(self, model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        other = copy.deepcopy(model)
        backward(other, (torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])))
        return {name: p.grad.norm() for name, p in other.named_parameters() if p.grad is not None}

    def test_after_clipping(self) -> None:
        report = self.fit(network(), batches(1), clip_norm=0.01).report
        self.assertAlmostEqual(math.hypot(*[record["norm"] or 0.0 for record in report.values()]), 0.01, places=5)

    def test_whole_windows_of_accumulation(self) -> None:
        model = network()
        expected = self.norms(model, batches(4))
        report = self.fit(model, batches(4), accumulate=4).report
        for name, record in report.items():
            self.assert_close(record["norm"], expected[name], name)

    def test_after_unscaling(self) -> None:
        model = network()
        expected = self.norms(model, batches(1))
        report = self.fit(model, batches(1), precision="fp16").report
        for name, record in report.items():
            self.assertAlmostEqual(record["norm"] or 0.0, float(expected[name]), delta=0.02, msg=name)  # half precision

    def test_a_fused_optimizer_that_unscales_by_itself(self) -> None:
        model = network()
        expected = self.norms(model, batches(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        monitor = GradientMonitor(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(nn.functional.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1])).backward()
        scaler.step(optimizer)
        for name, record in monitor.report.items():
            self.assert_close(record["norm"], expected[name], name)
            self.assertLess(abs(record["max"] or 0.0), 1.0, name)

    def test_skipped_steps_are_not_reported(self) -> None:
        for fused in (False, True):
            model = network()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
            monitor = GradientMonitor(model, optimizer)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            scaler.scale(model(torch.full((1, 6), math.inf)).sum()).backward()
            scaler.step(optimizer)
            self.assertEqual((monitor.report, monitor.problems), ({}, {}), f"fused={fused}")

    def test_the_trainings_weights_are_the_same_with_it(self) -> None:
        with_it, without = network(), network()
        self.fit(with_it, batches(6), {"every": 1})
        optimizer = torch.optim.SGD(without.parameters(), lr=0.1)
        Trainer(without, nn.CrossEntropyLoss(), optimizer, "cpu").fit(batches(6), None, 1, verbose=False)
        for mine, other in zip(with_it.parameters(), without.parameters(), strict=True):
            self.assertTrue(torch.equal(mine, other))

    def test_as_a_call_back_alone(self) -> None:
        model = network()
        monitor = GradientMonitor(model, every=4, verbose=False)
        seen: list[tuple[int, float | None]] = []

        def note(trainer: Trainer) -> None:
            first = next(iter(monitor.report.values()), None)
            seen.append((trainer.step, first["update_ratio"] if first else None))

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, "cpu", on_step_end=[monitor, note])
        trainer.fit(batches(9), None, 1, verbose=False)
        changes = [
            step for (step, ratio), (_, before) in zip(seen, [(0, None), *seen], strict=False) if ratio != before
        ]
        self.assertEqual(changes, [2, 3, 4, 8])
        self.assertEqual(monitor.step, trainer.step)

    def test_averages_are_left_alone(self) -> None:
        model = network()
        monitor = self.fit(model, batches(4), averages=averaged_copy(model, 0.99))
        self.assertEqual(list(monitor.report), [name for name, _ in model.named_parameters()])

    def test_detach_leaves_no_hooks(self) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = GradientMonitor(model, optimizer)
        monitor.detach()
        self.assertFalse(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)

    def test_wrappers_do_not_show_in_names(self) -> None:
        plain = network()
        names = [name for name, _ in plain.named_parameters()]
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(network())
            backward(parallel)
            report = GradientMonitor(parallel).check_gradients()
        finally:
            torch.distributed.destroy_process_group()
        self.assertEqual(list(report), names)
        self.assertTrue(all(record["verdict"] == "ok" for record in report.values()))
        for wrapped in (nn.DataParallel(plain), torch.compile(plain), torch.optim.swa_utils.AveragedModel(plain)):
            self.assertEqual(list(GradientMonitor(wrapped).check_gradients()), names)
        inner = nn.Module()
        inner.module = nn.Linear(2, 2)  # a part that has this name
        self.assertEqual(list(GradientMonitor(inner).check_gradients()), ["module.weight", "module.bias"])


class Verdicts(Case):
    def train(
        self,
        model: nn.Module,
        make: Callable[..., torch.optim.Optimizer],
        data: list | None = None,
        epochs: int = 1,
        know_optimizer: bool = True,
    ) -> GradientMonitor:
        optimizer = make(model.parameters())
        monitor = GradientMonitor(model, optimizer if know_optimizer else None, verbose=False)
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, "cpu", on_step_end=[monitor], nan_policy="ignore")
        trainer.fit(data or self.data, None, epochs, verbose=False)
        return monitor

    @classmethod
    def setUpClass(cls) -> None:
        cls.data = digits(1024)

    OPTIMIZERS = (
        ("Adam", lambda scale: lambda p: torch.optim.Adam(p, lr=1e-3 * scale)),
        ("SGD", lambda scale: lambda p: torch.optim.SGD(p, lr=0.1 * scale)),
        ("momentum", lambda scale: lambda p: torch.optim.SGD(p, lr=0.05 * scale, momentum=0.9)),
    )

    def test_nothing_on_healthy_runs(self) -> None:
        for name, make in self.OPTIMIZERS:
            torch.manual_seed(0)
            self.assertEqual(self.train(SimpleNet(), make(1), epochs=3).verdict, "healthy", name)
        torch.manual_seed(0)
        make = self.OPTIMIZERS[0][1]
        self.assertEqual(self.train(MNISTNet(), make(1), self.data[:12]).verdict, "healthy", "MNISTNet")

    def test_too_high_on_rates_1000_times_too_high(self) -> None:
        for know_optimizer in (True, False):
            for name, make in self.OPTIMIZERS:
                torch.manual_seed(0)
                monitor = self.train(SimpleNet(), make(1000), self.data[:12], know_optimizer=know_optimizer)
                self.assertIn("too high", monitor.verdict, f"{name} {know_optimizer}")

    def test_one_step_is_too_high_above_ten_times_the_limit_only(self) -> None:
        for ratio, verdict in ((1.9, "ok"), (2.1, "too high")):  # the limit is 0.2, for the median of three or more
            model, _ = given(torch.ones(4, 4))
            optimizer = torch.optim.SGD(model.parameters(), lr=ratio)
            monitor = GradientMonitor(model, optimizer)
            optimizer.step()
            record = monitor.check_gradients()["w"]
            self.assert_close(record["update_ratio"], ratio)
            self.assertEqual(record["verdict"], verdict)

    def test_a_dead_relu_net(self) -> None:
        torch.manual_seed(0)
        model = SimpleNet()
        with torch.no_grad():
            model.hidden[0].bias.fill_(-100.0)  # type: ignore[union-attr,operator]
        monitor = self.train(model, self.OPTIMIZERS[1][1](1), self.data[:3])
        self.assertEqual(monitor.report["hidden.0.weight"]["verdict"], "zero")
        self.assertEqual(monitor.report["output.weight"]["verdict"], "ok")
        self.assertTrue(monitor.verdict.startswith("zero (hidden.0.weight and 2 more)"), monitor.verdict)

    def test_fifty_sigmoids(self) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(50) for layer in (nn.Linear(16, 16), nn.Sigmoid())]
        model = nn.Sequential(*layers, nn.Linear(16, 3))
        nn.functional.cross_entropy(model(torch.randn(8, 16)), torch.zeros(8, dtype=torch.long)).backward()
        monitor = GradientMonitor(model)
        report = monitor.check_gradients()
        self.assertEqual(report["20.weight"]["verdict"], "vanishing")
        self.assertEqual(report["100.weight"]["verdict"], "ok")
        self.assertTrue(monitor.verdict.startswith("vanishing"), monitor.verdict)

    def test_nan_weights(self) -> None:
        model = network()
        with torch.no_grad():
            model[2].weight[0, 0] = math.nan
        backward(model)
        monitor = GradientMonitor(model)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            monitor.print_gradient_report()
        self.assertIn("non-finite (gradient and weights)", out.getvalue())
        self.assertTrue(monitor.verdict.startswith("non-finite"))

    def test_a_spike_is_ten_times_the_median_and_the_highest(self) -> None:
        model, monitor = given(torch.ones(4))

        def verdict(size: float) -> str:
            model["w"].grad = torch.full((4,), size)
            return monitor.check_gradients()["w"]["verdict"]

        first = [verdict(50.0)] + [verdict(1.0 + i / 100) for i in range(10)]
        self.assertEqual(set(first), {"ok"})
        self.assertEqual([verdict(5.0), verdict(40.0), verdict(60.0), verdict(1.0)], ["ok", "ok", "spike", "ok"])
        self.assertIn("spike (w)", monitor.verdict)

    def test_no_spike_after_few_reports(self) -> None:
        model, monitor = given(torch.ones(4))
        for size in (1.0, 1.0, 1.0, 100.0):
            model["w"].grad = torch.full((4,), size)
            self.assertEqual(monitor.check_gradients()["w"]["verdict"], "ok")

    def test_exactly_zero_for_some_reports(self) -> None:
        model, monitor = given(torch.zeros(4))
        verdicts = []
        for value in (0.0, 0.0, 0.0, 1.0, 0.0):
            model["w"].grad = torch.full((4,), value)
            verdicts.append(monitor.check_gradients()["w"]["verdict"])
        self.assertEqual(verdicts, ["zero so far", "zero so far", "zero", "ok", "zero so far"])

    def test_the_same_gradients_count_once(self) -> None:
        model, monitor = given(torch.zeros(4))
        for _ in range(5):
            self.assertEqual(monitor.check_gradients()["w"]["verdict"], "zero so far")
        assert model["w"].grad is not None
        model["w"].grad += 1  # the same tensor with other values
        self.assertEqual(monitor.check_gradients()["w"]["norm"], 2.0)

    def test_dead_units_are_rows_without_gradient_in_all_reports(self) -> None:
        model = nn.Linear(3, 20)
        monitor = GradientMonitor(model, dead_share=0.9)
        for silent, expected in ((18, 0.0), (19, 0.0), (18, 0.9), (17, 0.85)):
            model.weight.grad = torch.ones(20, 3)
            model.weight.grad[:silent] = 0
            record = monitor.check_gradients()["weight"]
            self.assert_close(record["dead_share"], expected, f"{silent}")
            self.assertEqual(record["verdict"], "dead units" if expected >= 0.9 else "ok")

    def test_embeddings_have_no_units(self) -> None:
        model = nn.Embedding(100, 4)
        monitor = GradientMonitor(model, patience=1)
        model(torch.tensor([1])).sum().backward()
        record = monitor.check_gradients()["weight"]
        self.assertEqual((record["dead_share"], record["verdict"]), (None, "ok"))

    def test_the_tutorials_absolute_thresholds(self) -> None:
        for size, expected in ((200.0, "exploding"), (1.0, "ok"), (1e-9, "vanishing")):
            model, _ = given(torch.tensor([size]))
            self.assertEqual(GradientMonitor(model).check_gradients()["w"]["verdict"], "ok")
            monitor = GradientMonitor(model, max_norm=100, min_norm=1e-7)
            self.assertEqual(monitor.check_gradients()["w"]["verdict"], expected)

    def test_weights_that_begin_at_zero_may_grow(self) -> None:
        model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(3, 3))})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        monitor = GradientMonitor(model, optimizer, every=1)
        for _ in range(4):
            model["w"].grad = torch.ones(3, 3)
            optimizer.step()
        self.assertEqual(monitor.verdict, "healthy")

    def test_worst_first(self) -> None:
        model = nn.ParameterDict({name: nn.Parameter(torch.ones(2, 2)) for name in ("fine", "bad", "low", "none")})
        model["fine"].grad, model["bad"].grad = torch.ones(2, 2), torch.full((2, 2), math.nan)
        model["low"].grad = torch.full((2, 2), 1e-20)
        lines = GradientMonitor(model).format_report().splitlines()
        self.assertEqual([line.split()[0] for line in lines], ["parameter", "bad", "low", "fine", "none", "model:"])
        self.assertEqual(
            lines[-1], f"model: non-finite (bad): {PROBLEMS['non-finite']}; seen in this run: vanishing (low)"
        )
        self.assertEqual(list(PROBLEMS), list(VERDICTS[: len(PROBLEMS)]))

    def test_before_backward_it_says_so(self) -> None:
        self.assertIn("after backward", GradientMonitor(network()).format_report())

    def test_a_change_is_told_once(self) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
        monitor = GradientMonitor(model, optimizer)
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            Trainer(
                model, nn.CrossEntropyLoss(), optimizer, "cpu", on_step_end=[monitor, monitor], nan_policy="ignore"
            ).fit(batches(1), None, 1, verbose=False)
        self.assertEqual(err.getvalue().count("gradients at step 1: too high"), 1, err.getvalue())

    def test_options_that_make_no_sense(self) -> None:
        for options in ({"every": 0}, {"patience": 0}, {"window": -1}):
            with self.assertRaisesRegex(ValueError, f"{next(iter(options))} must be at least 1"):
                GradientMonitor(network(), **options)


if __name__ == "__main__":
    unittest.main()
