"""Schedules against closed forms at every step, parameter groups by hand, averages against a loop by hand."""

from __future__ import annotations

import copy
import math
import unittest
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchbasics.optim import averaged_copy, param_groups, warmup_cosine_scheduler, warmup_lr_scheduler


def sgd(lr: float = 0.4) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr)


def rates(schedule_of: Callable[..., Any], steps: int) -> list[float]:
    """Return the rate that each of `steps` steps uses and the one after the last; a warning of torch is an error."""
    optimizer = sgd()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule, seen = schedule_of(optimizer), []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    return [*seen, optimizer.param_groups[0]["lr"]]


class Schedules(unittest.TestCase):
    def assert_close(self, got: list[float], expected: list[float]) -> None:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)

    def test_warm_up_is_linear_and_then_constant(self) -> None:
        expected = [0.4 * (0.1 + 0.9 * min(t / 4, 1)) for t in range(8)]
        self.assert_close(rates(lambda o: warmup_lr_scheduler(o, 4, 0.1), 7), expected)

    def test_warm_up_with_cosine_follows_its_closed_form_and_stays_at_zero(self) -> None:
        for total, warmup in ((10, 0), (10, 3), (1, 0), (5, 5), (7, 6)):
            rise = [0.4 * (0.01 + 0.99 * t / warmup) for t in range(warmup)]
            length = max(total - warmup, 1)
            fall = [0.2 * (1 + math.cos(math.pi * min(t / length, 1))) for t in range(total + 3 - warmup)]
            got = rates(lambda o, n=total, w=warmup: warmup_cosine_scheduler(o, w, n), total + 2)
            self.assert_close(got, rise + fall)

    def test_both_say_that_they_are_stepped_per_optimizer_step(self) -> None:
        for schedule in (warmup_lr_scheduler(sgd(), 4, 0.1), warmup_cosine_scheduler(sgd(), 1, 5)):
            self.assertEqual(getattr(schedule, "scheduler_interval", None), "step")

    def test_a_schedule_resumed_at_any_step_goes_on_exactly(self) -> None:
        for make in (lambda o: warmup_cosine_scheduler(o, 2, 8), lambda o: warmup_lr_scheduler(o, 5, 0.1)):
            whole = rates(make, 8)
            for done in range(9):
                first, second = sgd(), sgd()
                schedule = make(first)
                for _ in range(done):
                    first.step()
                    schedule.step()
                resumed = make(second)
                second.load_state_dict(copy.deepcopy(first.state_dict()))
                resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
                seen = [second.param_groups[0]["lr"]]
                for _ in range(8 - done):
                    second.step()
                    resumed.step()
                    seen.append(second.param_groups[0]["lr"])
                self.assertEqual(seen, whole[done:])

    def test_impossible_lengths_are_errors(self) -> None:
        for call, words in (
            (lambda: warmup_lr_scheduler(sgd(), 0, 0.1), "warmup_iters >= 1, got 0"),
            (lambda: warmup_lr_scheduler(sgd(), 1, 0.0), "multiplicative factor"),  # torch's own
            (lambda: warmup_cosine_scheduler(sgd(), 6, 5), "got 6 and 5"),
            (lambda: warmup_cosine_scheduler(sgd(), -1, 5), "got -1 and 5"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                call()


class ParameterGroups(unittest.TestCase):
    def setUp(self) -> None:
        norm = nn.BatchNorm2d(4)
        self.model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 3))

    def names(self, group: dict[str, Any]) -> set[str]:
        return {name for name, p in self.model.named_parameters() if any(p is q for q in group["params"])}

    def test_biases_and_norm_layers_are_not_decayed(self) -> None:
        decayed, rest = param_groups(self.model, 0.1)
        self.assertEqual((self.names(decayed), decayed["weight_decay"]), ({"0.weight", "4.weight"}, 0.1))
        expected = {"0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "4.bias"}
        self.assertEqual((self.names(rest), rest["weight_decay"]), (expected, 0.0))
        self.assertNotIn("lr", decayed)

    def test_the_head_has_its_own_rate(self) -> None:
        groups = param_groups(self.model, 0.1, head=self.model[4], head_lr=0.5)
        optimizer = torch.optim.SGD(groups, lr=0.25)
        found = {tuple(sorted(self.names(g))): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
        body = ("0.bias", "1.bias", "1.weight", "3.bias", "3.weight")
        expected = {("0.weight",): (0.25, 0.1), body: (0.25, 0.0), ("4.weight",): (0.5, 0.1), ("4.bias",): (0.5, 0.0)}
        self.assertEqual(found, expected)
        self.assertEqual(optimizer.param_groups[0]["lr"], 0.25)  # the first group is of the body

    def test_frozen_parameters_are_left_out(self) -> None:
        self.model[:4].requires_grad_(False)
        groups = param_groups(self.model, 0.1)
        self.assertEqual([self.names(group) for group in groups], [{"4.weight"}, {"4.bias"}])

    def test_groups_that_cannot_be_made_are_errors(self) -> None:
        for options, words in (
            ({"head": self.model[4]}, "head and head_lr go together"),
            ({"head_lr": 0.1}, "head and head_lr go together"),
            ({"head": nn.Linear(4, 3), "head_lr": 0.1}, "a module of the model"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                param_groups(self.model, 0.1, **options)
        with self.assertRaisesRegex(ValueError, "no parameter requires a gradient; unfreeze"):
            param_groups(self.model.requires_grad_(False), 0.1)


class Averages(unittest.TestCase):
    def test_weights_and_statistics_equal_a_loop_by_hand(self) -> None:
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        averages: Any = averaged_copy(model, 0.55)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        expected: dict[str, torch.Tensor] = {}
        for step in range(5):
            optimizer.zero_grad()
            (model(torch.randn(8, 3) + 2) ** 2).mean().backward()
            optimizer.step()
            averages.update_parameters(model)
            decay = min(0.55, 1 - 2 / (step + 2))  # 0, 1/3 and 1/2, then 0.55
            for name, now in model.state_dict().items():
                expected[name] = decay * expected.get(name, 0.0) + (1 - decay) * now.double()
        expected["1.num_batches_tracked"] = torch.tensor(5.0)  # an integer is copied
        for name, value in averages.module.state_dict().items():
            torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-7)
        self.assertFalse(torch.equal(averages.module[1].running_mean, model[1].running_mean))

    def test_it_is_a_copy_that_predicts_as_its_module_does(self) -> None:
        model = nn.Linear(2, 1)
        before = model.weight.detach().clone()
        averages: Any = averaged_copy(model, 0.5)
        with torch.no_grad():
            averages.module.weight.zero_()
        self.assertTrue(torch.equal(model.weight, before))
        x = torch.randn(3, 2)
        self.assertTrue(torch.equal(averages(x), averages.module(x)))

    def test_the_start_is_soon_forgotten(self) -> None:
        """Weights count by their number: 1 of 1 + 2 + … + 401, not the 0.999 ** 400 = 0.67 of a constant decay."""
        model = nn.Linear(1, 1)
        averages: Any = averaged_copy(model, 0.999)
        for value in [1.0] + [0.0] * 400:
            nn.init.constant_(model.weight, value)
            averages.update_parameters(model)
        self.assertAlmostEqual(averages.module.weight.item(), 2 / (401 * 402), delta=1e-8)

    def test_averages_resumed_from_their_state_go_on_exactly(self) -> None:
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(9)]
        whole = averaged_copy(models[0], 0.8)
        for model in models:
            whole.update_parameters(model)
        for done in range(9):
            first, second = (averaged_copy(models[0], 0.8) for _ in range(2))
            for model in models[:done]:
                first.update_parameters(model)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            for model in models[done:]:
                second.update_parameters(model)
            for name, value in whole.module.state_dict().items():
                self.assertTrue(torch.equal(value, second.module.state_dict()[name]), (done, name))

    def test_indices_are_copied_and_infinite_elements_stay_infinite(self) -> None:
        model: Any = nn.Linear(3, 2)
        model.register_buffer("index", torch.arange(512))
        model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        model.register_buffer("mean", torch.zeros(2))
        model.register_buffer("largest", torch.tensor(-math.inf))  # finite from the second update on
        averages: Any = averaged_copy(model, 0.1)
        for step in range(4):
            model.mean += 1
            model.index += 1
            averages.update_parameters(model)
            model.largest.fill_(2.5)
            self.assertEqual(averages.module.largest.item(), 2.5 if step else -math.inf)
        self.assertTrue(torch.equal(averages.module.index, torch.arange(4, 516)))
        self.assertEqual(averages.module.mask.tolist(), [0.0, -math.inf])
        expected = ((1.0 * 0.1 + 2 * 0.9) * 0.1 + 3 * 0.9) * 0.1 + 4 * 0.9
        torch.testing.assert_close(averages.module.mean, torch.full((2,), expected))

    def test_buffers_may_appear_and_grow(self) -> None:
        class Growing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(2, 2)
                self.register_buffer("cache", None)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if not hasattr(self.inner, "mask"):
                    self.inner.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1), persistent=False)
                self.cache = x.clone()
                return self.inner(x)

        model: Any = Growing()
        averages: Any = averaged_copy(model, 0.5)
        for length in (1, 1, 1, 3):
            model(torch.full((length, 2), float(length)))
            averages.update_parameters(model)
        self.assertEqual(averages.module.inner.mask.tolist(), [[0.0, -math.inf], [0.0, 0.0]])
        self.assertTrue(torch.equal(averages.module.cache, torch.full((3, 2), 3.0)))
        self.assertIsNot(averages.module.cache, model.cache)
        self.assertEqual(averages.module.state_dict().keys(), model.state_dict().keys())  # as persistent as there
        model.cache.fill_(6.0)
        averages.update_parameters(model)
        self.assertTrue(torch.equal(averages.module.cache, torch.full((3, 2), 4.5)))  # and averaged from then on

    def test_the_statistics_of_a_compiled_model_are_averaged_too(self) -> None:
        model = nn.BatchNorm1d(2)
        averages: Any = averaged_copy(torch.compile(model), 0.9)  # type: ignore[arg-type]
        for value in (1.0, 4.0):
            model.running_mean.fill_(value)
            averages.update_parameters(model)
        self.assertEqual(averages.module.running_mean.tolist(), [3.0, 3.0])

    def test_complex_parameters_are_averaged(self) -> None:
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        averages: Any = averaged_copy(model, 0.25)
        for value in (1 + 1j, 3 - 1j):
            model.weight.data.fill_(value)
            averages.update_parameters(model)
        self.assertEqual(averages.module.weight.tolist(), [2.5 - 0.5j] * 2)

    def test_a_half_precision_model_can_be_averaged_in_float32(self) -> None:
        model = nn.Linear(1, 1).bfloat16()
        averages: Any = averaged_copy(model, 0.5).float()
        for value in (1.0, 1.0, 1.0078125):  # the next number after 1 in bfloat16
            nn.init.constant_(model.weight, value)
            averages.update_parameters(model)
        self.assertEqual(averages.module.weight.item(), 1.00390625)  # which bfloat16 cannot hold

    def test_a_decay_outside_0_to_1_is_an_error(self) -> None:
        for decay in (0.0, 1.0, -0.1, 1.1, math.nan):
            with self.assertRaisesRegex(ValueError, "decay of averaged weights must lie between 0 and 1, got"):
                averaged_copy(nn.Linear(1, 1), decay)


if __name__ == "__main__":
    unittest.main()
