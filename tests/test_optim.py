"""Optimizers and their options; schedules against closed forms, at every step; averages against a loop by hand."""

from __future__ import annotations

import copy
import functools
import math
import unittest
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torchbasics.optim import (
    OPTIMIZERS,
    SCHEDULES,
    averaged_copy,
    clear_gradients,
    make_optimizer,
    make_schedule,
    take_step,
    warmup_cosine_scheduler,
    warmup_lr_scheduler,
)


def parameter(value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.tensor([value, -2.0, 0.5]))


class Optimizers(unittest.TestCase):
    def test_each_is_torchs_own_with_its_options(self) -> None:
        for name, kind, options in (
            ("adam", torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.999)}),
            ("adamw", torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
            ("sgd", torch.optim.SGD, {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.8, "nesterov": True}),
            ("rmsprop", torch.optim.RMSprop, {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.8}),
            ("adagrad", torch.optim.Adagrad, {"lr": 0.02, "weight_decay": 0.1}),
        ):
            optimizer = make_optimizer(name, [parameter()], 0.02, 0.1, momentum=0.8)
            self.assertIs(type(optimizer), kind)
            self.assertEqual({key: optimizer.defaults[key] for key in options}, options)
            self.assertEqual(optimizer.defaults.get("fused"), None if name == "rmsprop" else True)
        self.assertFalse(make_optimizer("sgd", [parameter()], momentum=0.0).defaults["nesterov"])

    def test_each_steps_as_the_plain_one(self) -> None:
        plain: dict[str, Callable[[list], Any]] = {
            "adam": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1, foreach=False),
            "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1, foreach=False),
            "sgd": lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=0.1, nesterov=True, foreach=False),
            "rmsprop": lambda p: torch.optim.RMSprop(p, 0.05, weight_decay=0.1, momentum=0.9, foreach=False),
            "adagrad": lambda p: torch.optim.Adagrad(p, 0.05, weight_decay=0.1, foreach=False),
        }
        self.assertEqual(set(plain), set(OPTIMIZERS))
        for name, make in plain.items():
            ours, theirs = parameter(), parameter()
            optimizers = make_optimizer(name, [ours], 0.05, 0.1), make([theirs])
            for step in range(5):
                for value, optimizer in zip((ours, theirs), optimizers, strict=True):
                    value.grad = (value.detach() * (step + 1)).sin()
                    optimizer.step()
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            self.assertFalse(torch.equal(ours, parameter()))

    def test_first_step_by_hand(self) -> None:
        for name, moved in (("sgd", 0.1 * 1.9 * 4.0), ("adam", 0.1), ("adagrad", 0.1)):
            value = nn.Parameter(torch.tensor([3.0]))
            value.grad = torch.tensor([4.0])  # SGD with Nesterov: g + 0.9 g; Adam and Adagrad: g / |g|
            make_optimizer(name, [value], 0.1).step()
            self.assertAlmostEqual(float(value.detach()), 3.0 - moved, places=5)

    def test_frozen_parameters_are_left_out(self) -> None:
        frozen, free = parameter(), parameter()
        frozen.requires_grad_(False)
        optimizer = make_optimizer("adamw", iter([frozen, free]))
        self.assertEqual(len(optimizer.param_groups[0]["params"]), 1)
        self.assertIs(optimizer.param_groups[0]["params"][0], free)

    def test_wrong_arguments(self) -> None:
        for name, params, options, words in (
            ("lion", [parameter()], {}, "unknown optimizer 'lion'; choose one of adam, adamw, sgd, rmsprop, adagrad"),
            ("adam", [], {}, "no parameter requires a gradient"),
            ("adam", [parameter().requires_grad_(False)], {}, "no parameter requires a gradient; unfreeze"),
            ("adam", [parameter()], {"lr": -1.0}, "lr must be finite and not negative, got -1.0"),
            ("adam", [parameter()], {"lr": math.nan}, "lr"),
            ("adam", [parameter()], {"weight_decay": math.inf}, "weight_decay"),
            ("sgd", [parameter()], {"momentum": -0.1}, "momentum must be finite and not negative, got -0.1"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                make_optimizer(name, params, **options)  # type: ignore[arg-type]
        model = nn.Linear(2, 2)
        for given, kind in (([{"params": model.parameters()}], "dict"), (model.named_parameters(), "tuple")):
            with self.assertRaisesRegex(TypeError, f"expected parameters, got a {kind}; for groups or names use torch"):
                make_optimizer("sgd", given)  # type: ignore[arg-type]

    def test_complex_parameters(self) -> None:
        for name in ("adam", "adamw", "sgd", "adagrad"):
            value = nn.Parameter(torch.ones(2, dtype=torch.complex64))
            optimizer = make_optimizer(name, [value], 0.1)
            value.abs().sum().backward()
            optimizer.step()
            self.assertTrue(bool((value.abs() < 1).all()))


def rates(make: Callable[..., Any], steps: int, lr: float = 0.4) -> list[float]:
    """The rate that each of `steps` steps uses, and the one after the last. Any warning of torch's is an error."""
    optimizer = torch.optim.SGD([parameter()], lr)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule, seen = make(optimizer), []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if schedule is not None:
                schedule.step()
    return [*seen, optimizer.param_groups[0]["lr"]]


def rise(step: int, warmup: int) -> float:
    return 0.01 + 0.99 * step / warmup if step < warmup else 1.0


class Schedules(unittest.TestCase):
    def equal(self, got: list[float], expected: list[float]) -> None:
        self.assertEqual(len(got), len(expected))
        for step, (a, b) in enumerate(zip(got, expected, strict=True)):
            self.assertAlmostEqual(a, b, places=9, msg=f"step {step}")

    def test_constant(self) -> None:
        self.assertIsNone(make_schedule("constant", torch.optim.SGD([parameter()], 0.1), 5))
        self.equal(rates(lambda o: make_schedule("constant", o, 10), 10), [0.4] * 11)
        self.equal(rates(lambda o: make_schedule("constant", o, 10, 4), 10), [0.4 * rise(t, 4) for t in range(11)])

    def test_step(self) -> None:
        self.equal(rates(lambda o: make_schedule("step", o, 9), 9), [0.4] * 3 + [0.04] * 3 + [0.004] * 4)
        self.equal(
            rates(lambda o: make_schedule("step", o, 10, 2), 10),
            [0.4 * rise(t, 2) for t in range(4)] + [0.04] * 3 + [0.004] * 4,
        )

    def test_cosine(self) -> None:
        for total, warmup in ((10, 0), (10, 3), (1, 0), (5, 5), (7, 6)):
            expected = [
                0.4
                * (
                    rise(t, warmup)
                    if t < warmup
                    else (1 + math.cos(math.pi * (t - warmup) / max(total - warmup, 1))) / 2
                )
                for t in range(total + 1)
            ]
            self.equal(rates(lambda o, n=total, w=warmup: make_schedule("cosine", o, n, w), total), expected)

    def test_warmup_cosine_with_a_floor(self) -> None:
        expected = (
            [0.4 * rise(t, 2) for t in range(2)]
            + [0.4 * (0.1 + 0.9 * (1 + math.cos(math.pi * t / 8)) / 2) for t in range(9)]
            + [0.04] * 3
        )  # and stays there
        self.equal(rates(lambda o: warmup_cosine_scheduler(o, 2, 10, min_factor=0.1), 13), expected)

    def test_warmup(self) -> None:
        self.equal(
            rates(lambda o: warmup_lr_scheduler(o, 4, 0.1), 7), [0.4 * (0.1 + 0.9 * min(t / 4, 1)) for t in range(8)]
        )

    def cycle(self, total: int, peak: float, lr: float = 0.4) -> list[float]:
        """By its definition: cosine from lr/25 up to lr at `peak`, cosine down to lr/25/10000 at `total`."""

        def between(a: float, b: float, share: float) -> float:
            return b + (a - b) * (1 + math.cos(math.pi * share)) / 2

        return [
            between(lr / 25, lr, t / peak) if t <= peak else between(lr, lr / 250_000, (t - peak) / (total - peak))
            for t in range(total + 1)
        ]

    def test_onecycle(self) -> None:
        for total in (10, 9, 100):
            got = rates(lambda o, n=total: make_schedule("onecycle", o, n), total)  # and the last step doesn't raise
            self.equal(got, self.cycle(total, 0.3 * (total + 1) - 1))
            for warmup in (1, 4, total - 1):
                got = rates(lambda o, n=total, w=warmup: make_schedule("onecycle", o, n, w), total)
                if (warmup + 1) / (total + 1) <= 0.99:
                    self.equal(got, self.cycle(total, warmup))
                self.assertAlmostEqual(max(got), 0.4, delta=1e-3)

    def test_onecycle_of_few_steps(self) -> None:
        for total in (1, 2, 3, 4):
            for warmup in range(total + 1):
                got = rates(lambda o, n=total, w=warmup: make_schedule("onecycle", o, n, w), total)
                self.assertTrue(all(0 < rate <= 0.4 + 1e-9 for rate in got), got)

    def test_onecycle_leaves_adams_betas(self) -> None:
        optimizer = make_optimizer("adam", [parameter()])
        schedule = make_schedule("onecycle", optimizer, 5)
        for _ in range(3):
            optimizer.step()
            schedule.step()  # type: ignore[union-attr,call-arg]
        self.assertEqual(optimizer.param_groups[0]["betas"], (0.9, 0.999))

    def test_plateau(self) -> None:
        optimizer = torch.optim.SGD([parameter()], 0.4)
        schedule: Any = make_schedule("plateau", optimizer, 100)
        self.assertIsInstance(schedule, ReduceLROnPlateau)
        seen = []
        for loss in (1.0, 0.5, 0.5, 0.6, 0.7, 0.5, 0.5):
            schedule.step(loss)
            seen.append(optimizer.param_groups[0]["lr"])
        self.equal(seen, [0.4] * 5 + [0.04] * 2)
        for i in range(10):  # a lower loss is a lower loss
            schedule.step(0.4 - i * 1e-6)
        self.equal([optimizer.param_groups[0]["lr"]], [0.04])

    def test_each_group_has_its_own_rate(self) -> None:
        for name in ("step", "cosine", "onecycle"):
            optimizer = torch.optim.SGD(
                [{"params": [parameter()], "lr": 0.1}, {"params": [parameter()], "lr": 0.4}], 1.0
            )
            schedule = make_schedule(name, optimizer, 10)
            for _ in range(6):
                optimizer.step()
                schedule.step()  # type: ignore[union-attr,call-arg]
                one, other = (group["lr"] for group in optimizer.param_groups)
                self.assertAlmostEqual(4 * one, other, places=9)

    def test_resumed_at_any_step(self) -> None:
        for name in ("constant", "step", "cosine", "onecycle"):
            whole = rates(lambda o, n=name: make_schedule(n, o, 8, 2), 8)
            for done in range(9):
                first, second = (torch.optim.SGD([parameter()], 0.4) for _ in range(2))
                one = make_schedule(name, first, 8, 2)
                for _ in range(done):
                    first.step()
                    one.step()  # type: ignore[union-attr,call-arg]
                other = make_schedule(name, second, 8, 2)
                second.load_state_dict(copy.deepcopy(first.state_dict()))
                other.load_state_dict(copy.deepcopy(one.state_dict()))  # type: ignore[union-attr,arg-type]
                seen = [second.param_groups[0]["lr"]]
                for _ in range(8 - done):
                    second.step()
                    other.step()  # type: ignore[union-attr,call-arg]
                    seen.append(second.param_groups[0]["lr"])
                self.assertEqual(seen, whole[done:], (name, done))

    def test_wrong_arguments(self) -> None:
        optimizer = torch.optim.SGD([parameter()], 0.1)
        for call, words in (
            (
                lambda: make_schedule("linear", optimizer, 5),
                f"unknown schedule 'linear'; choose one of {', '.join(SCHEDULES)}",
            ),
            (lambda: make_schedule("cosine", optimizer, 0), "total_steps >= 1"),
            (lambda: make_schedule("cosine", optimizer, 5, 6), "warmup_steps <= total_steps, got 5 and 6"),
            (lambda: make_schedule("plateau", optimizer, 5, 1), "'plateau' has no warm-up"),
            (lambda: warmup_lr_scheduler(optimizer, 0, 0.1), "warmup_iters >= 1"),
            (lambda: warmup_lr_scheduler(optimizer, 1, 0.0), "0 < warmup_factor <= 1"),
            (lambda: warmup_cosine_scheduler(optimizer, 6, 5), "got 6, 5 and 0.0"),
            (lambda: warmup_cosine_scheduler(optimizer, 1, 5, 1.5), "min_factor <= 1"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                call()


class TakenSteps(unittest.TestCase):
    """`take_step` does what `step` does, and leaves out torch's note to profilers only where nobody would miss it."""

    NOTE = "Optimizer.step#AdamW.step"

    @staticmethod
    def ready(kind: type[torch.optim.AdamW] = torch.optim.AdamW, **options: Any) -> torch.optim.AdamW:
        optimizer = kind([parameter()], 0.1, **options)
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([1.0, -1.0, 2.0])
        return optimizer

    def notes(self, act: Callable[[], Any]) -> int:
        """How many notes to profilers `act` makes of a step."""
        original = torch.autograd.profiler.record_function
        with mock.patch.object(torch.autograd.profiler, "record_function", wraps=original) as note:
            act()
        return sum(call.args == (self.NOTE,) for call in note.call_args_list)

    def test_the_same_values_and_no_note(self) -> None:
        for options in ({}, {"fused": True}, {"foreach": True}, {"amsgrad": True}):
            with self.subTest(options):
                mine, torchs = self.ready(**options), self.ready(**options)
                for _ in range(3):
                    self.assertEqual(self.notes(lambda optimizer=mine: take_step(optimizer)), 0)
                    self.assertEqual(self.notes(torchs.step), 1)
                (one,), (other,) = (each.param_groups[0]["params"] for each in (mine, torchs))
                self.assertTrue(torch.equal(one, other))
                self.assertFalse(torch.equal(one, parameter()))
                self.assertTrue(torch.equal(mine.state[one]["exp_avg_sq"], torchs.state[other]["exp_avg_sq"]))
                self.assertTrue(torch.is_grad_enabled())

    def test_a_profiler_that_runs_sees_the_step(self) -> None:
        optimizer = self.ready()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            take_step(optimizer)
        self.assertIn(self.NOTE, [event.key for event in profiler.key_averages()])

    def test_hooks_of_this_optimizer_and_of_all_are_called(self) -> None:
        optimizer = self.ready()
        for register in (
            optimizer.register_step_pre_hook, optimizer.register_step_post_hook,
            register_optimizer_step_pre_hook, register_optimizer_step_post_hook,
        ):  # fmt: skip
            with self.subTest(register.__name__):
                called: list[Any] = []
                handle = register(lambda which, *_, called=called: called.append(which))
                self.addCleanup(handle.remove)
                take_step(optimizer)
                handle.remove()
                take_step(optimizer)
                self.assertEqual(called, [optimizer])

    def test_a_schedule_is_told_and_keeps_the_order(self) -> None:
        optimizer = self.ready()
        schedule = StepLR(optimizer, 1, gamma=0.5)
        self.assertEqual(self.notes(lambda: take_step(optimizer)), 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns of a schedule that goes before its optimizer
            schedule.step()
        self.assertEqual(optimizer.param_groups[0]["lr"], 0.05)

    def test_a_step_of_the_objects_own_is_called(self) -> None:
        for scheduled in (False, True):
            with self.subTest(scheduled=scheduled):
                optimizer = self.ready()
                if scheduled:
                    StepLR(optimizer, 1)
                with mock.patch.object(optimizer, "step", wraps=optimizer.step) as own:
                    take_step(optimizer)
                self.assertEqual(own.call_count, 1)

    def test_one_beneath_that_of_a_schedule_is_called(self) -> None:
        optimizer, calls, torchs = self.ready(), [], torch.optim.AdamW.step

        def own(self: Any) -> None:
            calls.append(self)
            torchs(self)

        optimizer.step = own.__get__(optimizer)  # type: ignore[method-assign]
        StepLR(optimizer, 1)
        take_step(optimizer)
        self.assertEqual(calls, [optimizer])

    def test_a_class_of_ones_own_and_what_is_no_torch_optimizer(self) -> None:
        class Counting(torch.optim.AdamW):
            calls = 0

            def step(self, closure: Any = None) -> Any:
                self.calls += 1
                return super().step(closure)

        optimizer = self.ready(Counting)
        take_step(optimizer)  # type: ignore[arg-type]
        self.assertEqual(optimizer.calls, 1)  # type: ignore[attr-defined]
        self.assertFalse(torch.equal(optimizer.param_groups[0]["params"][0], parameter()))
        with mock.patch.object(Counting, "step", autospec=True) as put_in_later:
            take_step(optimizer)  # type: ignore[arg-type]
        put_in_later.assert_called_once_with(optimizer)
        wrapper = mock.Mock(spec=["step"])
        take_step(wrapper)
        wrapper.step.assert_called_once_with()

        class WithoutDict:
            __slots__ = ("taken",)

            def step(self) -> None:
                self.taken = True

        take_step(slim := WithoutDict())  # type: ignore[arg-type]
        self.assertTrue(slim.taken)

    def test_a_wrapper_that_copies_all_of_torchs_is_called(self) -> None:
        self.ready()  # torch marks the class's step when the first is made, and functools.wraps copies the mark
        torchs, calls = torch.optim.AdamW.step, []

        @functools.wraps(torchs)
        def watched(self: Any, closure: Any = None) -> Any:
            calls.append(self)
            return torchs(self, closure)

        self.assertTrue(watched.hooked)  # type: ignore[attr-defined]
        derived = type("Derived", (torch.optim.AdamW,), {"step": watched})
        take_step(mine := self.ready(derived))  # type: ignore[arg-type]
        with mock.patch.object(torch.optim.AdamW, "step", watched):
            take_step(patched := self.ready())
        self.assertEqual(calls, [mine, patched])

    def test_where_torch_keeps_its_hooks_elsewhere_its_own_step_is_taken(self) -> None:
        optimizer = self.ready()
        with mock.patch("torchbasics.optim.TORCHS", object()):
            self.assertEqual(self.notes(lambda: take_step(optimizer)), 1)


class ClearedGradients(unittest.TestCase):
    def test_all_are_gone_without_a_note(self) -> None:
        optimizer = TakenSteps.ready()
        name = "record_function"
        with mock.patch.object(torch.autograd.profiler, name, side_effect=AssertionError("a note")):
            clear_gradients(optimizer)
        self.assertIsNone(optimizer.param_groups[0]["params"][0].grad)


class Averages(unittest.TestCase):
    def test_against_a_loop_by_hand_with_the_buffers(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        averages = averaged_copy(model, 0.55)
        names = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
        self.assertIn("1.running_mean", names)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        expected: dict[str, torch.Tensor] = {}
        for step in range(5):
            optimizer.zero_grad()
            (model(torch.randn(8, 3) + 2) ** 2).mean().backward()
            optimizer.step()
            averages.update_parameters(model)
            for name in names:
                now = model.state_dict()[name].double()
                decay = min(0.55, 1 - 2 / (step + 2))  # 0, 1/3 and 1/2, then 0.55
                expected[name] = decay * expected.get(name, 0.0) + (1 - decay) * now
        for name in names:
            torch.testing.assert_close(
                averages.module.state_dict()[name].double(), expected[name], rtol=1e-5, atol=1e-7
            )
            if name != "0.bias":  # which BatchNorm takes away again: it has no gradient
                self.assertFalse(torch.equal(averages.module.state_dict()[name], model.state_dict()[name]), name)

    def test_whole_numbers_and_masks_are_the_models(self) -> None:
        model = nn.Linear(3, 2)
        model.register_buffer("index", torch.arange(512))
        model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        model.register_buffer("mean", torch.zeros(2))
        averages = averaged_copy(model, 0.1)  # below the rise, which begins at 1/3
        for _ in range(4):
            model.mean += 1
            averages.update_parameters(model)
        self.assertTrue(torch.equal(averages.module.index, torch.arange(512)))
        self.assertEqual(averages.module.mask.tolist(), [0.0, -math.inf])
        expected = ((1.0 * 0.1 + 2 * 0.9) * 0.1 + 3 * 0.9) * 0.1 + 4 * 0.9
        torch.testing.assert_close(averages.module.mean, torch.full((2,), expected))

    def test_the_start_is_forgotten_soon(self) -> None:
        """Weights count by their number: 1 of 1 + 2 + … + 401, not the 0.999 ** 400 = 0.67 of a constant decay."""
        model = nn.Linear(1, 1)
        averages = averaged_copy(model, 0.999)
        for value in [1.0] + [0.0] * 400:
            nn.init.constant_(model.weight, value)
            averages.update_parameters(model)
        self.assertAlmostEqual(averages.module.weight.item(), 2 / (401 * 402), delta=1e-8)

    def test_the_count_stays_where_it_is(self) -> None:
        """Copying it to an accelerator, as torch's own update does, would wait for all that this is still doing."""
        model = nn.BatchNorm1d(2)
        averages = averaged_copy(model, 0.9)
        moved: list[int] = []

        def to(tensor: torch.Tensor, *args: Any, real: Any = torch.Tensor.to, **kwargs: Any) -> torch.Tensor:
            moved.append(id(tensor))
            return real(tensor, *args, **kwargs)

        with mock.patch.object(torch.Tensor, "to", to):
            for _ in range(3):
                averages.update_parameters(model)
        self.assertNotIn(id(averages.n_averaged), moved)
        self.assertEqual(int(averages.n_averaged), 3)

    def test_it_is_a_copy(self) -> None:
        model = nn.Linear(1, 1)
        before = model.weight.detach().clone()
        averages = averaged_copy(model, 0.5)
        with torch.no_grad():
            next(averages.module.parameters()).zero_()
        self.assertTrue(torch.equal(model.weight, before))

    def test_decay(self) -> None:
        for decay in (0.0, 1.0, -0.1, 1.1, math.nan):
            with self.assertRaisesRegex(ValueError, "decay of averaged weights must lie between 0 and 1, got"):
                averaged_copy(nn.Linear(1, 1), decay)


if __name__ == "__main__":
    unittest.main()
