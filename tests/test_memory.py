"""Memory: counts by hand, and torch's own profiler as the judge of estimates and peaks."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import mmap
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from torchbasics import memory
from torchbasics.memory import (
    LiveBytes,
    MemoryTracker,
    estimate_model_memory,
    find_batch_size,
    format_memory,
    get_memory_info,
)
from torchbasics.models import MLP, MNISTNet, SimpleNet

MIB = 2**20


def setUpModule() -> None:
    torch.set_num_threads(1)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def resnet18() -> nn.Module:
    try:
        from torchvision.models import resnet18 as make
    except (ImportError, RuntimeError) as error:
        raise unittest.SkipTest(f"needs torchvision: {error}") from error
    return make()


def profiled_peak(run: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator has given out at once during `run`, by its profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    now = peak = 0
    for _, change in sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"):
        now += change
        peak = max(peak, now)
    return peak


def training(make: Callable[[], nn.Module], optimizer: Callable, shape: tuple[int, ...]) -> Callable[[], None]:
    """A function that trains a new model two steps in a plain loop."""

    def run() -> None:
        model = make()
        stepper = optimizer(model)
        for _ in range(2):
            inputs, targets = torch.randn(shape), torch.zeros(shape[0], dtype=torch.long)
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            stepper.step()
            stepper.zero_grad()
            del inputs, targets, loss

    return run


class Estimate(unittest.TestCase):
    def test_the_parts_of_a_linear_layer_by_hand(self) -> None:
        model = nn.Linear(100, 50)  # 5,050 floats
        found = estimate_model_memory(model, adam(model), (20, 100))
        expected = {
            "parameters": 20_200,
            "buffers": 0,
            "gradients": 20_200,
            "optimizer_state": 2 * 20_200 + 2 * 4,  # two averages, and a step counter per parameter
            "inputs": 20 * 100 * 4,
        }
        self.assertEqual({name: found[name] for name in expected}, expected)
        outputs = 20 * 50 * 4
        self.assertEqual(found["activations"], outputs + 4)  # and the loss; square saves its input
        self.assertGreaterEqual(found["total"], sum(expected.values()) - 20_200)
        self.assertLessEqual(found["total"], sum(expected.values()) + 4 * 20_200)

    def test_without_input_the_sum_of_what_is_known(self) -> None:
        model = nn.Sequential(nn.Linear(100, 50), nn.BatchNorm1d(50))
        model[0].bias.requires_grad_(False)
        found = estimate_model_memory(model)
        parameters, buffers = 4 * (5050 + 100), 4 * 100 + 8
        expected = {
            "parameters": parameters,
            "buffers": buffers,
            "gradients": parameters - 200,
            "optimizer_state": 0,
            "total": 2 * parameters - 200 + buffers,
        }
        self.assertEqual(found, expected)

    def test_the_state_is_that_of_the_kind_of_optimizer(self) -> None:
        model = nn.Linear(100, 50, bias=False)
        one, optim = 20_000, torch.optim
        for make, expected in (
            (lambda p: optim.SGD(p, lr=0.1), 0),
            (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), one),
            (lambda p: optim.Adam(p), 2 * one + 4),
            (lambda p: optim.Adam(p, fused=True), 2 * one + 4),
            (lambda p: optim.Adam(p, amsgrad=True), 3 * one + 4),
            (lambda p: optim.AdamW(p, foreach=True), 2 * one + 4),
            (lambda p: optim.RMSprop(p), one + 4),
            (lambda p: optim.Adafactor(p), 4 * (100 + 50) + 4),
        ):
            optimizer = make(model.parameters())
            for shape in (None, (8, 100)):
                found = estimate_model_memory(model, optimizer, shape)["optimizer_state"]
                self.assertEqual(found, expected, type(optimizer).__name__)

    def test_within_ten_percent_of_what_torchs_profiler_measures(self) -> None:
        for name, make, shape in (
            ("MNISTNet", MNISTNet, (32, 1, 28, 28)),
            ("resnet18", resnet18, (4, 3, 128, 128)),
            ("MLP", lambda: MLP(784, 512, 10), (256, 784)),
        ):
            for optimizer in (sgd, momentum, adam):
                with self.subTest(f"{name} {optimizer.__name__}"):
                    measured = profiled_peak(training(make, optimizer, shape))
                    model = make()
                    estimated = estimate_model_memory(model, optimizer(model), shape)["total"]
                    self.assertLess(abs(estimated / measured - 1), 0.1, f"{estimated:,} for {measured:,}")

    def test_the_error_that_it_measures(self) -> None:
        model = MLP(784, 256, 10)
        found = estimate_model_memory(model, adam(model), (64, 784), measure=True)
        measured = profiled_peak(training(lambda: MLP(784, 256, 10), adam, (64, 784)))
        self.assertLess(abs(found["measured"] / measured - 1), 0.02)
        self.assertAlmostEqual(found["error"], found["total"] / found["measured"] - 1)

    def test_half_precision_halves_the_activations(self) -> None:
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(16)])
        full, half = (
            estimate_model_memory(model, input_shape=(4096, 64), precision=precision)["activations"]
            for precision in ("fp32", "bf16")
        )
        self.assertLess(half, 0.65 * full)

    def test_other_inputs_and_losses(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.words, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

            def forward(self, batch: dict) -> dict:
                return {"logits": self.head(self.words(batch["ids"]).mean(1))}

        found = estimate_model_memory(
            Two(),
            inputs={"ids": torch.zeros(16, 12, dtype=torch.long)},
            loss=lambda outputs: nn.functional.cross_entropy(outputs["logits"], torch.zeros(16, dtype=torch.long)),
        )
        self.assertEqual(found["inputs"], 16 * 12 * 8)
        logits = 16 * 3 * 4
        expected = (
            16 * 8 * 4 + 2 * logits + 16 * 8 + 2 * 4
        )  # means, logits, their log-softmax, targets, loss and weight
        self.assertEqual(found["activations"], expected)
        ids = estimate_model_memory(nn.Embedding(50, 8), input_shape=(4, 5), dtype=torch.long)
        self.assertEqual(ids["inputs"], 4 * 5 * 8)

    def test_nothing_is_changed(self) -> None:
        torch.manual_seed(0)
        model = MLP(20, 16, 3)
        optimizer = adam(model)
        torch.optim.lr_scheduler.StepLR(optimizer, 3)  # which puts a `step` of its own into the optimizer
        called: list[int] = []
        optimizer.register_step_post_hook(lambda *_: called.append(1))
        model.cache = None  # type: ignore[assignment]
        model.register_forward_hook(lambda module, args, output: setattr(module, "cache", output))
        before, keys, drawn = copy.deepcopy(model.state_dict()), set(vars(model)), torch.get_rng_state()
        for options in ({}, {"measure": True}):
            estimate_model_memory(model, optimizer, (8, 20), **options)
        for name, value in model.state_dict().items():
            self.assertTrue(torch.equal(value, before[name]), name)
        self.assertEqual((model.cache, called, dict(optimizer.state)), (None, [], {}))
        self.assertTrue(all(p.grad is None for p in model.parameters()))
        self.assertEqual(set(vars(model)), keys)
        self.assertTrue(torch.equal(torch.get_rng_state(), drawn))

    def test_nothing_is_allocated(self) -> None:
        model = nn.Linear(1000, 1000)
        found = {}
        peak = profiled_peak(lambda: found.update(estimate_model_memory(model, adam(model), (2_000_000, 1000))))
        self.assertGreater(found["total"], 16e9)  # inputs and outputs
        self.assertLess(peak, MIB)

    def test_wrapped_and_compiled_models(self) -> None:
        plain = SimpleNet()
        expected = estimate_model_memory(plain, None, (8, 784))
        self.assertEqual(estimate_model_memory(nn.DataParallel(plain), None, (8, 784)), expected)
        compiled = SimpleNet()
        compiled.compile(backend=self.fail)  # which is not asked
        self.assertEqual(estimate_model_memory(compiled, None, (8, 784)), expected)
        self.assertIsNotNone(compiled._compiled_call_impl)

    def test_what_cannot_be_estimated(self) -> None:
        model = nn.Linear(3, 3)
        with self.assertRaisesRegex(ValueError, "LBFGS needs a closure"):
            estimate_model_memory(model, torch.optim.LBFGS(model.parameters()))
        with self.assertRaisesRegex(ValueError, "none of the model's parameters"):
            estimate_model_memory(model, adam(nn.Linear(3, 3)))

        class Looks(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) if x.sum().item() > 0 else x

        with self.assertRaisesRegex(RuntimeError, "Looks looks at the values"):
            estimate_model_memory(Looks(3, 3), None, (2, 3))


class BatchSize(unittest.TestCase):
    def test_the_largest_that_fits(self) -> None:
        model = MLP(784, 64, 10)  # BatchNorm: a batch of one cannot be trained
        optimizer = adam(model)
        size = find_batch_size(model, (784,), optimizer, budget=10 * MIB)
        self.assertLessEqual(estimate_model_memory(model, optimizer, (size, 784))["total"], 10 * MIB)
        self.assertGreater(estimate_model_memory(model, optimizer, (size + 1, 784))["total"], 10 * MIB)

    def test_its_search(self) -> None:
        for most in (1, 2, 3, 7, 8, 100):
            for limit in (0, 1, 2, 3, 7, 8, 27, 64, 99):
                for total in (lambda size: size, lambda size: size**3, lambda size: size // 4 * 4):
                    expected = max([size for size in range(1, most + 1) if total(size) <= limit], default=0)
                    self.assertEqual(memory._largest(total, limit, most), expected, (limit, most))

    def test_few_estimates_are_enough(self) -> None:
        asked: list[int] = []
        self.assertEqual(memory._largest(lambda size: asked.append(size) or 1000 + 7 * size, 100_000, 65536), 14142)
        self.assertLess(len(asked), 7)

    def test_too_small_a_budget(self) -> None:
        with self.assertRaisesRegex(ValueError, "not even one sample fits into 1,000 bytes"):
            find_batch_size(nn.Linear(100, 100), (100,), budget=1000)

    def test_the_budget_by_default(self) -> None:
        model = nn.Linear(100, 100)
        with mock.patch.object(memory, "get_memory_info", return_value={"available": 1_000_000}):
            size = find_batch_size(model, (100,))
        budget = 900_000 + 40_400
        self.assertLessEqual(estimate_model_memory(model, None, (size, 100))["total"], budget)
        self.assertGreater(estimate_model_memory(model, None, (size + 1, 100))["total"], budget)
        with (
            mock.patch.object(memory, "get_memory_info", return_value={}),
            self.assertRaisesRegex(ValueError, "give a budget"),
        ):
            find_batch_size(model, (100,))

    def test_a_trial_that_runs_out_of_memory(self) -> None:
        class Needy(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                if len(x) > 50:
                    raise torch.OutOfMemoryError("out of memory")
                return super().forward(x)

        model = nn.Sequential(Needy(4, 4), nn.BatchNorm1d(4))
        before = copy.deepcopy(model.state_dict())
        plan = memory._Plan(model, None, None, memory._mean_square, "fp32")
        for size, expected in ((50, True), (51, False)):
            self.assertEqual(memory._runs(plan, torch.empty(size, 4, device="meta"), 1000), expected)
        self.assertTrue(all(torch.equal(value, before[name]) for name, value in model.state_dict().items()))
        self.assertTrue(all(p.grad is None for p in model.parameters()))


class Live(unittest.TestCase):
    def test_by_hand(self) -> None:
        with LiveBytes() as live:
            a = torch.zeros(1000)  # 4,000
            b = a + 1  # 8,000
            view = b[:10]  # of the same storage
            self.assertEqual((live.now, live.peak), (8000, 8000))
            del b
            self.assertEqual(live.now, 8000)
            del view
            self.assertEqual((live.now, live.peak), (4000, 8000))
            c = a.double()  # 12,000
            del a, c
        self.assertEqual((live.now, live.peak), (0, 12000))

    def test_what_was_there_before_counts_when_it_is_used(self) -> None:
        weight = torch.ones(1000)
        with LiveBytes() as live:
            torch.zeros(10)
            self.assertEqual(live.now, 0)
            weight.sum()
            self.assertEqual((live.now, live.peak), (4000, 4004))

    def test_blocks(self) -> None:
        with LiveBytes(block=512) as live:
            keep = [torch.zeros(1), torch.zeros(129)]  # 4 and 516 bytes
        self.assertEqual((live.now, len(keep)), (512 + 1024, 2))

    def test_sparse_tensors(self) -> None:
        with LiveBytes() as live:
            keep = torch.ones(9).to_sparse() * 2  # makes its parts inside
        self.assertEqual((live.now, keep.shape), (9 * 8 + 9 * 4, (9,)))


class Phases(unittest.TestCase):
    def test_peaks_by_hand(self) -> None:
        tracker = MemoryTracker("cpu")
        with tracker.phase("data"):
            x = torch.zeros(1000)
        with tracker.phase("work"):
            y = x * 2
            y.sum()
            del y
        with tracker.phase("rest"):
            x.add_(1)
        self.assertEqual(tracker.peaks, {"data": 4000, "work": 8004, "rest": 4000})
        self.assertEqual(format_memory(tracker.peaks), "data       3.9 KiB\nwork       7.8 KiB\nrest       3.9 KiB")

    def test_the_highest_of_all_rounds_and_after_exceptions(self) -> None:
        tracker = MemoryTracker("cpu")
        for size in (10, 1000, 100):
            with contextlib.suppress(KeyError), tracker.phase("work"):
                torch.zeros(size)
                raise KeyError
        self.assertEqual(tracker.peaks, {"work": 4000})

    def test_phases_within_phases(self) -> None:
        tracker = MemoryTracker("cpu")
        with tracker.phase("outer"):
            torch.zeros(1000)
            with tracker.phase("inner"):
                torch.zeros(10)
            with tracker.phase("second"):
                torch.zeros(100)
        self.assertEqual(tracker.peaks, {"inner": 40, "second": 400, "outer": 4000})
        with tracker.phase("around"):
            with tracker.phase("larger"):
                torch.zeros(5000)
            with tracker.phase("smaller"):
                torch.zeros(5)
        self.assertEqual(tracker.peaks["around"], 20_000)

    def test_a_training_step_against_torchs_profiler(self) -> None:
        tracker = MemoryTracker("cpu")

        def run() -> None:
            model = MNISTNet()
            optimizer = adam(model)
            for _ in range(2):
                with tracker.phase("data"):
                    inputs, targets = torch.randn(32, 1, 28, 28), torch.zeros(32, dtype=torch.long)
                with tracker.phase("forward"):
                    loss = nn.functional.cross_entropy(model(inputs), targets)
                with tracker.phase("backward"):
                    loss.backward()
                with tracker.phase("step"):
                    optimizer.step()
                    optimizer.zero_grad()
                del inputs, targets, loss

        measured = profiled_peak(run)
        self.assertEqual(list(tracker.peaks), ["data", "forward", "backward", "step"])
        self.assertLess(abs(max(tracker.peaks.values()) / measured - 1), 0.05, tracker.peaks)
        self.assertEqual(max(tracker.peaks, key=lambda name: tracker.peaks[name]), "backward")


class Leaks(unittest.TestCase):
    def test_kept_losses_leak(self) -> None:
        model, kept = nn.Linear(10, 10), []

        def step() -> None:
            kept.append(model(torch.ones(8, 10)).relu().sum())  # keeps its graph, with what relu has saved

        found = MemoryTracker("cpu").check_leak(step)
        self.assertTrue(found["leaking"])
        saved = 8 * 10 * 4
        self.assertEqual(found["bytes_per_step"], saved + saved + 4)  # inputs, relu's output, the loss
        self.assertIn("10 × 320 bytes by aten.relu.default", found["growing"])

    def test_equal_steps_do_not(self) -> None:
        model = nn.Linear(10, 10)
        optimizer = adam(model)

        def step() -> None:
            model(torch.ones(8, 10)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        found = MemoryTracker("cpu").check_leak(step)
        self.assertEqual((found["leaking"], set(found["readings"]), found["growing"]), (False, {0}, []))

    def test_what_is_made_once_or_in_a_cycle_is_none(self) -> None:
        calls: list[Any] = []

        def step() -> None:
            calls.append(torch.ones(1000) if len(calls) == 6 else None)
            cycle: list[Any] = [torch.ones(10)]
            cycle.append(cycle)

        found = MemoryTracker("cpu").check_leak(step)
        self.assertEqual((found["leaking"], found["readings"][-1]), (False, 4000))

    def test_too_few_steps(self) -> None:
        with self.assertRaisesRegex(ValueError, "steps >= 4"):
            MemoryTracker("cpu").check_leak(lambda: None, steps=3)


class Info(unittest.TestCase):
    @unittest.skipUnless(Path("/proc/self/status").exists(), "needs Linux")
    def test_the_process(self) -> None:
        before = get_memory_info("cpu")
        with mmap.mmap(-1, 64 * MIB) as block:
            for page in range(0, len(block), mmap.PAGESIZE):
                block[page] = 1  # written to, so resident
            after = get_memory_info("cpu")
        self.assertGreater(after["resident"] - before["resident"], 60 * MIB)
        self.assertGreaterEqual(after["peak_resident"], after["resident"] - MIB)
        self.assertLess(after["available"], after["total"])
        self.assertTrue(all(isinstance(value, int) and value > 0 for value in after.values()))

    def test_also_without_an_instance(self) -> None:
        self.assertEqual(MemoryTracker.get_memory_info("cpu").keys(), MemoryTracker("cpu").get_memory_info().keys())
        model = nn.Linear(3, 3)
        self.assertEqual(MemoryTracker.estimate_model_memory(model), MemoryTracker("cpu").estimate_model_memory(model))

    def test_printed(self) -> None:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            MemoryTracker("cpu").print_memory_info()
        self.assertIn("memory of cpu\n", out.getvalue())
        for size, expected in (
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (2**30, "1.0 GiB"),
            (2**52, "4096.0 TiB"),
        ):
            self.assertEqual(format_memory({"x": size}).split("  ")[-1].strip(), expected)
        text = format_memory({"a": 12, "long_name": 3 * MIB + MIB // 2, "error": -0.0123})
        self.assertEqual(text, "a                12 B\nlong name       3.5 MiB\nerror             -1.2%")

    def test_a_containers_limit(self) -> None:
        """What it has read from files counts as used there, and is given back when it is needed."""
        files = {"max": "1000000\n", "current": "1000000\n", "stat": "anon 400000\ninactive_file 600000\n"}
        texts = {f"/sys/fs/cgroup/memory.{name}": text for name, text in files.items()}
        with (
            mock.patch.object(memory, "_proc", return_value={"MemTotal": 10**9, "MemAvailable": 10**8}),
            mock.patch.object(Path, "read_text", lambda path: texts[str(path)]),
        ):
            info = get_memory_info("cpu")
        self.assertEqual((info["total"], info["available"]), (1_000_000, 600_000))

    def test_snapshots_need_cuda(self) -> None:
        with self.assertRaisesRegex(RuntimeError, "snapshot needs torch's CUDA allocator, and this tracker is for cpu"):
            MemoryTracker("cpu").snapshot("never.pickle")
        with self.assertRaisesRegex(RuntimeError, "history needs"):
            MemoryTracker("cpu", history=True)


class FakeAllocator:
    """Answers for torch.cuda on a machine that has none."""

    def __init__(self) -> None:
        self.allocated = self.peak = 0

    def use(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def reset(self, device: Any = None) -> None:
        self.peak = self.allocated

    def patch(self) -> Any:
        return mock.patch.multiple(
            torch.cuda,
            memory_allocated=lambda device: self.allocated,
            memory_reserved=lambda device: 5000,
            max_memory_allocated=lambda device: self.peak,
            max_memory_reserved=lambda device: 6000,
            mem_get_info=lambda device: (10_000, 20_000),
            reset_peak_memory_stats=self.reset,
        )


class OnCuda(unittest.TestCase):
    def test_the_allocators_numbers(self) -> None:
        allocator = FakeAllocator()
        allocator.use(3000)
        with allocator.patch():
            info = get_memory_info("cuda:0")
        expected = {
            "allocated": 3000,
            "reserved": 5000,
            "peak_allocated": 3000,
            "peak_reserved": 6000,
            "slack": 2000,
            "outside": 5000,  # 20,000 less 10,000 free, less 5,000 reserved
            "available": 12_000,
            "total": 20_000,
        }
        self.assertEqual(info, expected)

    def test_phases_and_the_peak_of_all(self) -> None:
        allocator = FakeAllocator()
        with allocator.patch():
            tracker = MemoryTracker("cuda:0")
            allocator.use(9000)
            allocator.use(-8000)
            with tracker.phase("outer"):
                allocator.use(4000)
                allocator.use(-4000)
                with tracker.phase("inner"):
                    allocator.use(500)
            self.assertEqual(tracker.peaks, {"inner": 1500, "outer": 5000})
            self.assertEqual(tracker.get_memory_info()["peak_allocated"], 9000)
            self.assertEqual(MemoryTracker.get_memory_info("cuda:0")["peak_allocated"], 1500)

    def test_snapshots(self) -> None:
        with (
            mock.patch.object(torch.cuda.memory, "_record_memory_history") as record,
            mock.patch.object(torch.cuda.memory, "_dump_snapshot") as dump,
        ):
            path = MemoryTracker("cuda:0", history=True).snapshot(Path("folder") / "s.pickle")
        record.assert_called_once()
        dump.assert_called_once_with(str(path))

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA")
    def test_estimates_on_a_gpu(self) -> None:
        for make, shape in ((MNISTNet, (512, 1, 28, 28)), (lambda: MLP(784, 2048, 10), (4096, 784))):
            for optimizer in (sgd, momentum, adam):
                model = make().cuda()
                found = estimate_model_memory(model, optimizer(model), shape, measure=True)
                self.assertLess(abs(found["error"]), 0.1, found)
        model = MLP(784, 2048, 10).cuda()
        self.assertGreater(find_batch_size(model, (784,), adam(model), 2**30), 1000)


if __name__ == "__main__":
    unittest.main()
