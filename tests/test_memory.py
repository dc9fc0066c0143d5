"""Memory: counts by hand, and torch's own profiler as the judge of estimates."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchbasics.memory import MemoryTracker

MIB = 2**20
estimate = MemoryTracker.estimate_model_memory
find_batch_size = MemoryTracker.find_batch_size


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layers, self.head = kind(16, 32, 2, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    """Return small classifiers of five classes, with inputs."""
    pool = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    layer = nn.TransformerEncoderLayer(32, 4, 128, batch_first=True)
    convolution = nn.Sequential(*pool, nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 5))
    transformer = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(16 * 32, 5))
    embedding = nn.Sequential(nn.Embedding(1000, 32), nn.Flatten(), nn.Linear(10 * 32, 5))
    return {
        "convolution": (convolution, torch.ones(32, 3, 16, 16)),
        "transformer": (transformer, torch.ones(32, 16, 32)),
        "LSTM": (Recurrent(nn.LSTM), torch.ones(32, 16, 16)),
        "GRU": (Recurrent(nn.GRU), torch.ones(32, 16, 16)),
        "embedding": (embedding, torch.ones(128, 10, dtype=torch.long)),
    }


def bytes_left_by(run: Callable[[], Any]) -> int:
    """Return the bytes that torch's profiler sees allocated and not freed by `run`, whose result is kept."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no progress of the profiler in the report
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    del kept
    return sum(event.self_cpu_memory_usage for event in profiler.events())


def train_two_steps(model: nn.Module, inputs: Tensor, kind: Any) -> None:
    """Train copies of `model` and `inputs`, so that these are allocated too."""
    model, inputs = copy.deepcopy(model), inputs.clone()
    optimizer = kind(model.parameters(), lr=0.01)
    for _ in range(2):
        nn.functional.cross_entropy(model(inputs), torch.zeros(len(inputs), dtype=torch.long)).backward()
        optimizer.step()
        optimizer.zero_grad()


class Estimate(unittest.TestCase):
    def test_linear_and_normalisation_layers_agree_with_a_hand_calculation(self) -> None:
        model = nn.Linear(100, 50)  # 5,050 floats
        expected = {
            "parameters": 20_200,
            "buffers": 0,
            "gradients": 20_200,
            "optimizer": 2 * 20_200 + 2 * 4,  # two averages, and a step counter per parameter
            "inputs": 40 * 100 * 4,
            "activations": 40 * 50 * 4,  # the outputs; the saved inputs and weight are not counted again
            "temporary": 40_004 - 8_000,  # the state of the weight once more, where the activations were
        }
        found = estimate(model, torch.optim.Adam(model.parameters()), (40, 100))
        self.assertEqual(found, expected | {"total": sum(expected.values())})
        self.assertEqual(estimate(model, None, (40, 100))["temporary"], 2 * 40 * 50 * 4)
        norm = estimate(nn.BatchNorm1d(50), None, (40, 50))
        self.assertEqual(norm["activations"], 40 * 50 * 4 + 2 * 50 * 4)  # outputs and the batch's mean and deviation

    def test_without_an_input_shape_the_total_has_no_activations(self) -> None:
        model = nn.Sequential(nn.Linear(100, 50), nn.BatchNorm1d(50))
        model[0].bias.requires_grad_(False)
        sizes = {"parameters": 20_600, "buffers": 408, "gradients": 20_400, "optimizer": 0}
        unknown = {"inputs": 0, "activations": 0, "temporary": 0}
        self.assertEqual(estimate(model), sizes | unknown | {"total": 41_408})

    def test_optimizer_state_depends_on_the_kind_of_optimizer(self) -> None:
        layer, one, optim = nn.Linear(100, 50, bias=False), 20_000, torch.optim
        for make, expected in (
            (lambda p: optim.SGD(p, lr=0.1), 0),
            (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), one),
            (optim.Adam, 2 * one + 4),
            (optim.AdamW, 2 * one + 4),
            (optim.Adagrad, one + 4),
            (optim.Adafactor, 4 * (100 + 50) + 4),  # a row and a column
        ):
            optimizer = make(layer.parameters())
            for when in ("before", "after"):
                found = estimate(layer, optimizer)["optimizer"]
                self.assertEqual(found, expected, f"{type(optimizer).__name__} {when} its first step")
                layer(torch.ones(1, 100)).sum().backward()
                optimizer.step()
            optimizer.state[layer.weight]["more"] = torch.ones(10)  # what is there already is counted as it is
            self.assertEqual(estimate(layer, optimizer)["optimizer"], expected + 40)

    def test_activations_and_totals_are_within_1_3_times_of_torchs_profiler(self) -> None:
        for name, (model, inputs) in models().items():
            measure = functools.partial(estimate, model, input_shape=inputs.shape, dtype=inputs.dtype)
            measured = bytes_left_by(functools.partial(model, inputs))
            ratio = measure()["activations"] / measured
            self.assertTrue(0.95 < ratio < 1.05, f"activations of {name}: {ratio:.3f}")
            training = measure()
            model.eval()
            self.assertEqual(measure(), training, f"{name} in evaluation mode")
            model.train()
            for kind in (torch.optim.SGD, torch.optim.Adam):
                tracker = MemoryTracker("cpu")
                with tracker.phase("training"):
                    train_two_steps(model, inputs, kind)
                ratio = measure(optimizer=kind(model.parameters()))["total"] / tracker.peaks["training"]
                self.assertTrue(1 / 1.3 < ratio < 1.3, f"total of {name} with {kind.__name__}: {ratio:.3f}")

    def test_shared_storages_count_once_and_dropped_tensors_not_at_all(self) -> None:
        class Views(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                super().forward(x).exp().sum().detach()  # exp saves its output for a graph that goes
                y = super().forward(x)
                return {"whole": y, "parts": (y[:, :5], [y.t()])}

        self.assertEqual(estimate(Views(20, 10), None, (8, 20))["activations"], 8 * 10 * 4)

    def test_an_estimate_neither_copies_parameters_nor_leaves_memory_behind(self) -> None:
        model, tracker = nn.Sequential(nn.Linear(1000, 1000), nn.Sigmoid()), MemoryTracker("cpu")
        with tracker.phase("estimate"):
            estimate(model, None, (1000, 1000))
        self.assertLess(tracker.peaks["estimate"], 200_000)
        self.assertEqual(bytes_left_by(lambda: estimate(model, None, (8, 1000))), 0)

    def test_checkpointing_and_autocast_lower_the_estimate(self) -> None:
        class Checkpointed(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                for layer in self:
                    x = checkpoint(layer, x, use_reentrant=False)
                return x

        blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU()) for _ in range(6)]
        each = 1024 * 64 * 4  # bytes of one layer's outputs
        full = estimate(nn.Sequential(*blocks), None, (1024, 64))["activations"]
        self.assertEqual(full, 6 * 4 * each)
        self.assertEqual(estimate(Checkpointed(*blocks), None, (1024, 64))["activations"], 6 * each)
        with torch.autocast("cpu", torch.bfloat16):
            self.assertLess(estimate(nn.Sequential(*blocks), None, (1024, 64))["activations"], 0.6 * full)

    def test_the_estimate_is_of_training_but_a_submodule_in_eval_mode_stays_there(self) -> None:
        model = nn.Sequential(nn.Linear(8, 512), nn.Dropout())
        training = estimate(model, None, (512, 8))
        with torch.no_grad():
            self.assertEqual(estimate(model.eval(), None, (512, 8)), training)
        self.assertFalse(model.training or model[1].training)
        model.train()[1].eval()
        self.assertLess(estimate(model, None, (512, 8))["activations"], training["activations"])

    def test_an_estimate_changes_neither_model_nor_optimizer_nor_random_state(self) -> None:
        class Keeps(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                self.register_buffer("mask", torch.ones(len(x)))
                self.kept = x * 2
                return self.kept

        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), Keeps())
        optimizer, steps = torch.optim.Adam(model.parameters()), []
        torch.optim.lr_scheduler.StepLR(optimizer, 3)  # puts a `step` of its own into the optimizer
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        estimate(model, optimizer, (16, 8))
        after = model.state_dict()
        self.assertTrue(before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in after))
        self.assertTrue(torch.equal(torch.get_rng_state(), drawn))
        self.assertEqual((steps, dict(optimizer.state), hasattr(model[3], "kept")), ([], {}, False))
        self.assertTrue(all(p.grad is None for p in model.parameters()))

    def test_a_model_on_the_meta_device_has_the_same_estimate(self) -> None:
        model = models()["convolution"][0]
        expected = estimate(model, torch.optim.Adam(model.parameters()), (8, 3, 16, 16))
        meta = model.to("meta")
        self.assertEqual(estimate(meta, torch.optim.Adam(meta.parameters()), (8, 3, 16, 16)), expected)

    def test_a_lazy_module_that_has_not_run_is_an_error(self) -> None:
        with self.assertRaisesRegex(ValueError, "uninitialized parameter"):
            estimate(nn.LazyLinear(3), None, (2, 4))


class BatchSize(unittest.TestCase):
    model = nn.Linear(100, 100, bias=False)  # 80,000 bytes, and per sample 400 of inputs and 1,200 for its outputs

    def test_the_largest_batch_that_fits(self) -> None:
        for budget, expected in ((240_000, 100), (241_599, 100), (241_600, 101), (81_600, 1), (10**9, 5000)):
            self.assertEqual(find_batch_size(self.model, None, (100,), budget, max_batch_size=5000), expected)
        with self.assertRaisesRegex(ValueError, "not even one sample fits into 81,599 bytes"):
            find_batch_size(self.model, None, (100,), 81_599)

    def test_the_default_budget_is_what_is_available(self) -> None:
        with mock.patch.object(MemoryTracker, "get_memory_info", return_value={"available": 1_000_000}):
            size = find_batch_size(self.model, None, (100,))
        self.assertEqual(size, (900_000 + 40_000 - 80_000) // 1600)  # the weight is there already
        with mock.patch.object(MemoryTracker, "get_memory_info", return_value={}):
            self.assertRaisesRegex(ValueError, "give a budget", find_batch_size, self.model, None, (100,))


class InUse(unittest.TestCase):
    def test_the_peaks_of_phases_agree_with_a_hand_calculation(self) -> None:
        tracker = MemoryTracker("cpu")
        with tracker.phase("data"):
            x = torch.zeros(1000)
        for size in (10, 1000, 100):
            with tracker.phase("work"):  # its highest peak is kept
                y = x[:size].neg()
                z = y.neg()
                del y, z
        with tracker.phase("in place"):
            x.neg_()
        self.assertEqual(tracker.peaks, {"data": 4000, "work": 8000, "in place": 0})

    def test_a_phase_that_raises_or_overlaps_leaves_the_tracker_usable(self) -> None:
        tracker = MemoryTracker("cpu")
        with contextlib.suppress(KeyError), tracker.phase("fails"):
            raise KeyError
        with tracker.phase("outer"):
            with self.assertRaisesRegex(RuntimeError, "'inner' begins inside another"), tracker.phase("inner"):
                self.fail("entered")
            torch.zeros(1000)
        self.assertEqual(tracker.peaks, {"outer": 4000})

    def test_on_cuda_the_allocator_counts(self) -> None:
        held = {"now": 3000, "peak": 9000}
        fakes: dict[str, Any] = {
            "memory_allocated": lambda device: held["now"],
            "memory_reserved": lambda device: 5000,
            "max_memory_allocated": lambda device: held["peak"],
            "mem_get_info": lambda device: (10_000, 20_000),
            "reset_peak_memory_stats": lambda device: held.update(peak=held["now"]),
        }
        tracker = MemoryTracker("cuda")
        with mock.patch.multiple(torch.cuda, **fakes):
            info = MemoryTracker.get_memory_info("cuda")
            with tracker.phase("work"):
                held.update(now=3500, peak=max(held["peak"], 7000))
        expected = {"allocated": 3000, "peak_allocated": 9000, "reserved": 5000, "available": 12_000, "total": 20_000}
        self.assertEqual((info, tracker.peaks), (expected, {"work": 4000}))

    @unittest.skipUnless(Path("/proc/self/status").exists(), "needs Linux")
    def test_memory_that_is_written_to_becomes_resident(self) -> None:
        before = MemoryTracker.get_memory_info("cpu")
        block = bytearray(b"1") * (64 * MIB)
        after = MemoryTracker.get_memory_info("cpu")
        self.assertGreater(after["resident"] - before["resident"], len(block) - 4 * MIB)
        self.assertTrue(0 < after["available"] < after["total"])

    def test_the_printed_summary_has_device_and_phases(self) -> None:
        tracker, out = MemoryTracker("cpu"), io.StringIO()
        tracker.peaks = {"forward": 3 * MIB + MIB // 2, "all_steps": 2000 * MIB}
        with contextlib.redirect_stdout(out):
            tracker.print_memory_info()
        expected = (
            "peak of each phase on cpu\n"
            "  forward                   3.50 MiB\n"
            "  all steps             2,000.00 MiB\n"
        )
        self.assertRegex(out.getvalue(), rf"(?s)^in use on cpu\n.*{expected}$")
