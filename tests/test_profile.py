"""scripts/profile.py: it hides no standard module, its figures against hand calculation and a clock of our own."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.util
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import torchbasics as tb

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "profile.py"
SPEEDS = {"matmul_flops_per_second": 100.0, "copy_bytes_per_second": 10.0}
SETTINGS = {"device": "cpu", "precision": "fp32", "native_precision": "fp32", "compile": False, "batch_size": 32,
            "loader_delay_ms": 0.0, "dataset": "mnist", "num_workers": 0, "channels_last": True}


def load(name: str) -> Any:
    """The script imported as `name`; the environment and the path stay as they are."""
    spec = importlib.util.spec_from_file_location(name, SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(os.environ), mock.patch.object(sys, "path", [*sys.path]):
        spec.loader.exec_module(module)
    return module


script = load("profile_under_test")


class Clock:
    """A clock that moves only when told: so that every time in the report is known beforehand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Slow(nn.Module):
    """A layer that takes `seconds` of the clock in forward, and twice as long in backward."""

    def __init__(self, clock: Clock, seconds: float, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.clock, self.seconds, self.inner = clock, seconds, inner or nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.clock.sleep(self.seconds)
        out = self.inner(x)
        if out.requires_grad:
            out.register_hook(lambda _: self.clock.sleep(2 * self.seconds))
        return out


def work_of(model: nn.Module) -> Any:
    return script.Work(model, tb.make_optimizer("sgd", model.parameters(), 0.01), nn.CrossEntropyLoss(),
                       torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu"), "fp32", torch.preserve_format)


def batch_of(size: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, *(shape or (1, 28, 28)), generator=generator), torch.arange(size) % 10


def span(name: str, began: float, took: float, kind: str = "user_annotation") -> dict[str, Any]:
    return {"name": name, "cat": kind, "ts": began, "dur": took}


def memory(instant: float, size: int, device: int = 0) -> dict[str, Any]:
    return {"name": "[memory]", "ts": instant, "args": {"Bytes": size, "Device Type": device}}


class InFolder(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    if not hasattr(unittest.TestCase, "enterContext"):  # Python 3.10

        def enterContext(self, manager: contextlib.AbstractContextManager) -> Any:
            value = manager.__enter__()
            self.addCleanup(manager.__exit__, None, None, None)
            return value


BESIDE = '''
import sys
import torch
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        import cProfile, profile
        return torch.tensor(float(hasattr(profile, "run") and hasattr(cProfile, "run")))


def main():
    import torch.distributed.checkpoint  # noqa
    torch.optim.AdamW([torch.ones(1, requires_grad=True)]).step()
    with torch.profiler.profile() as profiler:
        torch.ones(2) + 1
    assert profiler.key_averages()
    batches = list(DataLoader(Numbers(), batch_size=2, num_workers=1, multiprocessing_context="spawn"))
    print(torch.cat(batches).sum().item(), sys.modules["profile"].__file__ if "profile" in sys.modules else "")


if __name__ == "__main__":
    main()
'''


class HandsOver(InFolder):
    """Whoever imports `profile` beside this script gets the standard module."""

    def start(self, *command: str) -> subprocess.Popen:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, cwd=self.folder, env=env)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def test_fresh_processes(self) -> None:
        shutil.copy(SCRIPT, self.folder)
        (self.folder / "beside.py").write_text(BESIDE, encoding="utf-8")
        code = (f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import cProfile, profile; "
                "cProfile.run('1+1'); profile.run('1+1'); "
                "print(profile.__file__, profile.__name__, 'torch' in sys.modules)")
        started = {"cProfile": self.start("-c", code), "beside": self.start(str(self.folder / "beside.py"))}
        started |= {name: self.start(str(SCRIPT.parent / f"{name}.py"), "--help")
                    for name in ("train_mnist", "env_check", "profile")}
        out = {}
        for name, process in started.items():
            out[name], errors = process.communicate(timeout=180)
            self.assertEqual(process.returncode, 0, f"{name}: {errors}")
        self.assertIn("function calls", out["cProfile"])
        path, *rest = out["cProfile"].split("\n")[-2].split()
        self.assertEqual((Path(path).name, rest), ("profile.py", ["profile", "False"]))
        self.assertNotEqual(Path(path).parent, SCRIPT.parent)
        self.assertTrue(out["beside"].startswith("4.0"), out["beside"])
        self.assertNotIn(str(self.folder), out["beside"])
        self.assertIn("--checkpoint-activations", out["profile"])

    def test_a_standard_library_in_a_zip_and_one_without_the_module(self) -> None:
        archive = self.folder / "python.zip"
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("profile.py", "origin = 'zip'")
        with mock.patch("sysconfig.get_path", return_value=str(self.folder)), mock.patch.dict(sys.modules):
            with mock.patch.object(sys, "path", [str(SCRIPT.parent), str(archive)]):
                load("profile")
                self.assertEqual(sys.modules["profile"].origin, "zip")
            with mock.patch.object(sys, "path", [str(SCRIPT.parent)]), self.assertRaises(ModuleNotFoundError):
                load("profile")


class Verdict(unittest.TestCase):
    def measured(self, **changes: float) -> dict[str, float]:
        """Of a step of 1 s: 60 FLOPs of 100 a second, 4 bytes of 10 a second."""
        return {"step": 1.0, "step_without_data": 1.0, "launch_share": 0.1, "flops": 60, "bytes": 4, "data": 0.0,
                "transfer": 0.0, "split_step": 1.0, **SPEEDS, **changes}

    def verdict(self, **changes: float) -> str:
        return script.judge(self.measured(**changes), SETTINGS)["verdict"]

    def test_each_rule_and_its_border(self) -> None:
        self.assertEqual(self.verdict(), "compute-bound")  # 0.6 s against 0.4 s
        self.assertEqual(self.verdict(bytes=6.1), "memory-bound")
        self.assertEqual(self.verdict(launch_share=0.39), "compute-bound")
        self.assertEqual(self.verdict(launch_share=0.4), "launch-bound")
        self.assertEqual(self.verdict(step_without_data=0.75, data=0.1, transfer=0.15), "data-bound")
        self.assertEqual(self.verdict(step_without_data=0.76, data=0.5), "compute-bound")
        self.assertEqual(self.verdict(step_without_data=0.5, data=0.2), "compute-bound")  # a busy machine, not the data
        self.assertEqual(self.verdict(step_without_data=0.5, data=0.5, launch_share=0.9), "data-bound")
        self.assertEqual(self.verdict(flops=0), "memory-bound")

    def test_the_figure_is_in_it(self) -> None:
        data = script.judge(self.measured(step_without_data=0.3, data=0.9), SETTINGS)["figure"]
        self.assertTrue("300.00 ms instead of 1000.00 ms" in data and "70%" in data, data)
        launch = script.judge(self.measured(launch_share=0.55), SETTINGS)["figure"]
        self.assertIn("calling operators takes 55% of the 1000.00 ms", launch)
        on_cuda = script.judge(self.measured(launch_share=0.55), SETTINGS | {"device": "cuda"})["figure"]
        self.assertIn("no kernel runs in 55%", on_cuda)
        compute = script.judge(self.measured(), SETTINGS)["figure"]
        self.assertTrue("60%" in compute and "40%" in compute, compute)

    def test_the_option_to_change(self) -> None:
        data = {"step_without_data": 0.1, "data": 0.6, "transfer": 0.1}
        for changes, settings, expected, absent in (
            (data, {}, "num_workers", "pin_memory"),
            (data, {"dataset": "folder", "num_workers": 1}, "--num-workers 3", "TensorLoader"),
            (data, {"loader_delay_ms": 5.0}, "--loader-delay 0", "num_workers"),
            (data | {"data": 0.1, "transfer": 0.6}, {}, "pin_memory", "num_workers"),
            ({"launch_share": 0.9}, {}, "--batch-size 128, or --compile (", "bf16"),
            ({"launch_share": 0.9}, {"device": "cuda"}, "--compile reduce-overhead", "bf16"),
            ({"launch_share": 0.9}, {"compile": True}, "--batch-size", "--compile"),
            ({}, {"native_precision": "bf16"}, "--precision bf16", "--compile"),
            ({"flops": 49, "bytes": 1}, {}, "--compile", "bf16"),
            ({}, {"precision": "bf16", "native_precision": "bf16"}, "no option", "bf16"),
            ({"bytes": 9}, {}, "--compile", "bf16"),
            ({"bytes": 9}, {"compile": True, "channels_last": False}, "--channels-last", "--compile"),
        ):
            change = script.judge(self.measured(**changes), SETTINGS | settings)["change"]
            with self.subTest(changes=changes, settings=settings, change=change):
                self.assertIn(expected, change)
                self.assertNotIn(absent, change)


class FromTheTrace(unittest.TestCase):
    def test_busy_time_counts_overlaps_once(self) -> None:
        events = [span("a", 0, 10, "kernel"), span("b", 5, 10, "gpu_memcpy"), span("c", 6, 2, "kernel"),
                  span("d", 100, 1, "gpu_memset"), span("step.forward", 0, 500), span("aten::mm", 0, 500, "cpu_op")]
        self.assertAlmostEqual(script.busy_seconds(events), 16e-6)
        self.assertEqual(script.busy_seconds([]), 0.0)

    def test_memory_peaks(self) -> None:
        """Two steps, each with phases of 10 µs; before the second one 100 bytes stay that are no part of its peak."""
        events = [span(f"step.{name}", start + 10 * i, 9) for start in (0, 100) for i, name in enumerate(script.PHASES)]
        events += [memory(1, 8), memory(21, 50), memory(22, -30), memory(28, 7), memory(31, 60), memory(32, -95)]
        events += [memory(60, 100), memory(101, 8), memory(121, 40), memory(130.5, 300), memory(142, -348)]
        events += [memory(22, 10**9, device=1), {"ph": "M", "name": "process_name"}]
        self.assertEqual(script.memory_peaks(reversed(events), on_cpu=True),
                         {"data": 8, "transfer": 8, "forward": 58, "backward": 348, "optimizer": 348})
        self.assertEqual(script.memory_peaks(iter(events), on_cpu=False)["forward"], 10**9)


class Timed(unittest.TestCase):
    """All by a clock of our own, so the expected times are exact."""

    def setUp(self) -> None:
        self.clock = Clock()
        patch = mock.patch.object(script, "time", self.clock)
        patch.start()
        self.addCleanup(patch.stop)
        self.work = work_of(Slow(self.clock, 0.01))
        self.batch = torch.zeros(3, 2), torch.tensor([0, 1, 0])

    def test_split(self) -> None:
        after = self.work.optimizer.register_step_post_hook(lambda *_: self.clock.sleep(0.005))
        self.addCleanup(after.remove)
        zero = mock.patch.object(self.work.optimizer, "zero_grad", side_effect=lambda **_: self.clock.sleep(0.002))
        move = mock.patch.object(script, "to_device", side_effect=lambda batch, *_: self.clock.sleep(0.003) or batch)
        with zero, move:
            split = script.split_pass(self.work, script.endless([self.batch], 0.04), 4)
        expected = {"data": 0.04, "transfer": 0.003, "forward": 0.01, "backward": 0.02, "optimizer": 0.005,
                    "rest": 0.002, "step": 0.08}
        self.assertEqual(list(split), list(expected))
        for name, seconds in expected.items():
            self.assertAlmostEqual(split[name], seconds, places=9, msg=name)
        self.assertAlmostEqual(sum(split.values()) - split["step"], split["step"], places=12)

    def test_throughput_and_percentiles(self) -> None:
        def batches() -> Iterator:
            for i in range(1, 21):  # steps of 0.03 s and 1 to 19 s more in a mixed order, the last one 100 s more
                self.clock.sleep(7 * i % 20 or 100)
                yield self.batch

        timed = script.timed_pass(self.work, batches(), 20)
        self.assertAlmostEqual(timed["p50"], 10.53)
        self.assertAlmostEqual(timed["p95"], 19.03)
        self.assertAlmostEqual(timed["samples_per_second"], 60 / (190 + 100 + 20 * 0.03))

    def test_modules_without_their_children(self) -> None:
        inner = Slow(self.clock, 0.5)
        model = Slow(self.clock, 0.25, nn.Sequential(inner, inner))  # the same layer twice
        seconds = script.module_times(work_of(model), self.batch, 3)
        self.assertAlmostEqual(seconds[""], 0.25)
        self.assertAlmostEqual(seconds["inner.0"], 1.0)
        self.assertAlmostEqual(seconds["inner"], 0.0)
        self.assertFalse([m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks])

    def test_endless(self) -> None:
        self.assertEqual(len(list(itertools.islice(script.endless([self.batch] * 2, 0.5), 5))), 5)
        self.assertAlmostEqual(self.clock.now, 1002.5)
        for wrong in ([], iter([]), [torch.zeros(2)], [(torch.zeros(2), [1, 2])]):
            with self.assertRaises(ValueError):
                next(script.endless(wrong))


class Counted(unittest.TestCase):
    def test_flops_by_hand(self) -> None:
        """A Linear: 2·B·in·out forward, as much again for the weights, and for the inputs where they need it."""
        size, model = 6, tb.SimpleNet()
        flops, _ = script.count_work(work_of(model), batch_of(size))
        products = {"hidden.0": 784 * 128, "hidden.1": 128 * 64, "output": 64 * 10}
        times = {"hidden.0": 2, "hidden.1": 3, "output": 3}  # the images need no gradient
        expected = {name: times[name] * 2 * size * product for name, product in products.items()}
        self.assertEqual({name: flops[name] for name in expected}, expected)
        self.assertEqual(flops[""], sum(expected.values()))

    def test_table_adds_up(self) -> None:
        for name in ("mnistnet", "mlp"):
            model = tb.make_model(name)
            flops, _ = script.count_work(work_of(model), batch_of(4))
            rows = script.module_table(model, flops, {})
            self.assertEqual(sum(row["parameters"] for row in rows), tb.count_parameters(model))
            self.assertEqual(sum(row["flops"] for row in rows), flops[""])
            self.assertGreater(min(row["flops"] for row in rows), -1)
            self.assertGreater(flops[""], 0)

    def test_what_a_module_does_between_its_children_is_its_own(self) -> None:
        model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ReLU())
        rows = script.module_table(model, {"": 100, "0": 70, "0.0": 10, "0.1": 20}, {"1": 0.5})
        self.assertEqual({row["module"]: row["flops"] for row in rows}, {"": 30, "0": 40, "0.0": 10, "0.1": 20, "1": 0})
        self.assertEqual([row["forward_seconds"] for row in rows if row["module"] == "1"], [0.5])

    def test_bytes_grow_with_the_batch_and_views_cost_nothing(self) -> None:
        class Scaled(nn.Module):
            def __init__(self, views: int) -> None:
                super().__init__()
                self.scale, self.views = nn.Parameter(torch.ones(())), views

            def forward(self, x: Tensor) -> Tensor:
                for _ in range(self.views):
                    x = x.view(-1).view(-1, 10)
                return x * self.scale

        def traffic(size: int, views: int = 0) -> int:
            return script.count_work(work_of(Scaled(views)), batch_of(size, 10))[1]

        one, two, three = (traffic(8 * n) for n in (1, 2, 3))
        self.assertEqual(two - one, three - two)
        # at least: read and write (8, 10) floats for the product, the log-softmax and the gradients of both
        self.assertGreaterEqual(two - one, 4 * 2 * 8 * 10 * 4)
        self.assertEqual(traffic(8, views=3), one)


class Checkpointed(unittest.TestCase):
    def test_blocks(self) -> None:
        model = tb.MNISTNet()
        self.assertEqual(script.blocks(model), [model.block1, model.block2, model.classifier])
        layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))
        self.assertEqual(script.blocks(nn.ModuleDict({"stem": nn.Linear(2, 2), "layers": layers})), list(layers))
        simple = tb.SimpleNet()
        self.assertEqual(script.blocks(simple), [simple])

    def test_gradients_leave_no_trace_and_are_those_of_autograd(self) -> None:
        torch.manual_seed(0)
        model, (inputs, targets) = tb.CNN(dropout=0.0), batch_of(4)
        found = script.gradients(work_of(model), (inputs, targets))
        before = model.state_dict()
        self.assertTrue(all(p.grad is None for p in model.parameters()))
        self.assertEqual(int(before["features.1.num_batches_tracked"]), 0)
        expected = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), list(model.parameters()))
        torch.testing.assert_close(found[:len(expected)], list(expected))

    def test_equal_gradients_and_less_memory(self) -> None:
        """With dropout and BatchNorm, whose running statistics must not see the batch twice."""
        torch.manual_seed(0)
        work = work_of(tb.MNISTNet(dropout=0.3))
        found = script.try_checkpointing(work, batch_of(16), argparse.Namespace(active=1))
        self.assertTrue(found["gradients_identical"], found)
        self.assertEqual((found["blocks"], found["largest_difference"]), (3, 0.0))
        without, with_it = found["peak_bytes"]
        self.assertLess(with_it, 0.9 * without)
        norm = work.model.block1[1]
        self.assertEqual((norm.momentum, norm.training), (0.1, True))
        # three steps before the change and three after it; comparing gradients counts for none
        self.assertEqual(int(norm.num_batches_tracked), 2 * (1 + 2 + 1))


class Compared(unittest.TestCase):
    def report(self, **changes: Any) -> dict[str, Any]:
        return {"format": script.FORMAT, "settings": dict(SETTINGS), "p50": 0.1, "samples_per_second": 320.0,
                "measured": {"flops": 1000}, "peak_bytes": dict.fromkeys(script.PHASES, 50),
                "split": dict.fromkeys((*script.PHASES, "rest", "step"), 0.02), **changes}

    def test_what_is_worse(self) -> None:
        old = self.report()
        for changes, tolerance, worse, named in (
            ({}, 0.0, False, "nothing changed"),
            ({"p50": 0.119}, 0.2, False, "nothing changed"),
            ({"p50": 0.121}, 0.2, True, "p50 (s): 0.1 → 0.121 (+21%, worse)"),
            ({"p50": 0.05}, 0.2, False, "-50%, better"),
            ({"samples_per_second": 160.0}, 0.2, True, "samples/s: 320 → 160 (-50%, worse)"),
            ({"samples_per_second": 640.0}, 0.2, False, "+100%, better"),
            ({"measured": {"flops": 2000}}, 0.2, True, "FLOPs"),
            ({"peak_bytes": dict.fromkeys(script.PHASES, 70)}, 0.2, True, "peak memory"),
            ({"split": old["split"] | {"data": 0.08}}, 0.2, False, "data (s): 0.02 → 0.08 (+300%, worse)"),
            ({"split": old["split"] | {"data": 0.0009}}, 0.2, False, "data (s): 0.02 → 0.0009 (-96%, better)"),
            ({"settings": SETTINGS | {"precision": "bf16"}}, 0.2, False, "precision: fp32 → bf16"),
        ):
            lines, found = script.compare(old, self.report(**changes), tolerance)
            with self.subTest(changes=changes, lines=lines):
                self.assertEqual(found, worse)
                self.assertTrue(any(named in line for line in lines))
        quick = [self.report(split=old["split"] | {"transfer": seconds}) for seconds in (0.0001, 0.0005)]
        self.assertEqual(script.compare(*quick, 0.2), (["nothing changed by more than 20%"], False))
        zero = self.report(peak_bytes=dict.fromkeys(script.PHASES, 0))
        self.assertTrue(script.compare(zero, old, 0.2)[1])
        self.assertFalse(script.compare(zero, zero, 0.2)[1])


TINY = '''
import torch
from torch import nn


class Tiny(nn.Module):
    """Hundreds of operators on a handful of numbers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 2))

    def forward(self, x):
        x = x[:, :2]
        for _ in range(200):
            x = x * self.weight
        return x


def batches():
    return [(torch.ones(2, 4), torch.tensor([0, 1]))]


def broken():
    return nn.Linear(3, 2)
'''


class Command(InFolder):
    def setUp(self) -> None:
        super().setUp()
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.folder)
        self.enterContext(mock.patch.object(sys, "path", [*sys.path]))
        self.enterContext(mock.patch.dict(sys.modules))
        (self.folder / "tiny_of_this_test.py").write_text(TINY, encoding="utf-8")

    def run_main(self, *argv: str) -> tuple[int, str, str]:
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                code = script.main(["--device", "cpu", "--precision", "fp32", *argv])
            except SystemExit as stop:
                code = int(str(stop.code))
        return code, out.getvalue(), errors.getvalue()

    def test_a_slow_loader_the_files_and_the_comparison(self) -> None:
        slow = ["--model", "simplenet", "--batch-size", "16", "--loader-delay", "20", "--wait", "0", "--warmup", "1",
                "--active", "4"]
        code, out, errors = self.run_main(*slow, "--output", "first")
        self.assertEqual((code, errors), (0, ""))
        self.assertTrue(out.startswith("verdict: data-bound: "), out[:200])
        self.assertIn("--loader-delay 0", out.splitlines()[1])
        report = json.loads(Path("first/report.json").read_text(encoding="utf-8"))
        self.check_report(report)
        self.check_trace(report)

        halved = report | {"p50": report["p50"] / 2, "samples_per_second": report["samples_per_second"] * 2}
        Path("halved.json").write_text(json.dumps(halved), encoding="utf-8")
        with mock.patch.object(nn.Module, "compile") as compiled:
            code, out, _ = self.run_main(*slow, "--output", "second", "--compare", "halved.json", "--compile",
                                         "max-autotune", "--json")
        compiled.assert_called_once_with(mode="max-autotune")
        written, lines = json.loads(Path("second/report.json").read_text(encoding="utf-8")), json.loads(out)["compared"]
        self.assertEqual((code, json.loads(out)), (1, written))
        self.assertTrue(any(line.startswith("p50 (s)") and line.endswith("worse)") for line in lines), lines)
        self.assertTrue(any(line == "compile: False → max-autotune" for line in lines), lines)
        code, out, _ = self.run_main(*slow, "--output", "second", "--overwrite", "--compare", "first/report.json",
                                     "--tolerance", "100")
        self.assertEqual(code, 0)
        self.assertIn("against first/report.json:\nnothing changed by more than 10000%", out)

    def check_report(self, report: dict[str, Any]) -> None:
        self.assertGreaterEqual(report["p50"], 0.02)
        self.assertGreaterEqual(report["p95"], report["p50"])
        self.assertGreaterEqual(report["split"]["data"], 0.02)
        parts = sum(report["split"][name] for name in (*script.PHASES, "rest"))
        self.assertAlmostEqual(parts / report["split"]["step"], 1.0, places=6)
        self.assertGreaterEqual(report["split"]["rest"], 0.0)
        self.assertEqual(sum(row["parameters"] for row in report["modules"]), 109386)
        hand = 2 * 16 * (2 * 784 * 128 + 3 * 128 * 64 + 3 * 64 * 10)
        self.assertEqual((report["measured"]["flops"], sum(row["flops"] for row in report["modules"])), (hand, hand))
        self.assertAlmostEqual(report["flops_per_second"], hand / report["p50"])
        # the first hidden layer's output alone, at the end of forward; then its weight's gradient
        self.assertGreaterEqual(report["peak_bytes"]["forward"], 16 * 128 * 4)
        self.assertGreaterEqual(report["peak_bytes"]["backward"], 784 * 128 * 4)
        self.assertLess(report["peak_bytes"]["backward"], 10 * 109386 * 4)
        names = {row["operator"] for row in report["operators"]}
        self.assertTrue(names & {"aten::addmm", "aten::mm"}, names)
        self.assertFalse({name for name in names if name.startswith("step.")})

    def check_trace(self, report: dict[str, Any]) -> None:
        with gzip.open("first/trace.json.gz", "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        for phase in script.PHASES:
            self.assertEqual(names.count(f"step.{phase}"), 4)
        calls = [event["name"] for event in events if event.get("cat") == "cpu_op"]
        self.assertEqual(calls.count("aten::addmm"), 3 * 4)  # three Linear layers, four steps
        shown = {row["operator"]: row["calls"] for row in report["operators"]}
        self.assertEqual({shown.get("aten::addmm", 3.0), shown.get("aten::_fused_adamw_", 1.0)}, {3.0, 1.0})
        self.assertAlmostEqual(report["operator_calls"], len(calls) / 4, delta=0.05 * len(calls) / 4)

    def test_operators_on_next_to_nothing_are_launch_bound(self) -> None:
        threads = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, threads)
        torch.set_num_threads(1)  # a step that waits for a second thread on a busy core is bound by that
        code, out, errors = self.run_main("--model", "tiny_of_this_test:Tiny", "--loader", "tiny_of_this_test:batches",
                                          "--active", "20")
        self.assertEqual((code, errors), (0, ""))
        self.assertTrue(out.startswith("verdict: launch-bound: calling operators takes "), out[:200])
        self.assertIn("tiny_of_this_test:Tiny on tiny_of_this_test:batches; batches of 2", out)
        [report] = Path("runs").glob("profile-tiny_of_this_test.Tiny-*/report.json")
        self.assertIn(f"files: {report.parent}", out)

    def test_a_batch_that_stays_on_the_device_costs_no_data(self) -> None:
        code, out, _ = self.run_main("--model", "mlp", "--synthetic", "--batch-size", "8", "--active", "2", "--json")
        report = json.loads(out)
        self.assertEqual((code, report["settings"]["dataset"]), (0, "synthetic"))
        self.assertEqual(report["measured"]["step"], report["measured"]["step_without_data"])
        self.assertNotEqual(report["verdict"], "data-bound")

    def test_bad_input(self) -> None:
        Path("used").mkdir()
        Path("used/report.json").write_text("[]", encoding="utf-8")
        module = "tiny_of_this_test"
        for expected, text, argv in (
            (2, "--model nope: expected mnistnet", ["--model", "nope"]),
            (2, "No module named 'nope_x'", ["--model", "nope_x:y"]),
            (2, "has no attribute 'y'", ["--model", f"{module}:y"]),
            (2, "expected a torch.nn.Module, got list", ["--model", f"{module}:batches"]),
            (2, "other batches come from --loader", ["--model", f"{module}:broken", "--loader", f"{module}:batches"]),
            (2, "the loader gave no batch", ["--model", "simplenet", "--loader", "builtins:list"]),
            (2, "used: has a report already", ["--output", "used"]),
            (2, "not a report.json", ["--compare", "used/report.json"]),
            (2, "No such file", ["--compare", "absent.json"]),
            (2, "expected a whole number from 1", ["--active", "0"]),
            (2, "expected a whole number from 1", ["--input-shape", "3,x"]),
            (2, "mlp takes channels and two equal sides", ["--model", "mlp", "--input-shape", "784"]),
            (2, "mlp takes channels and two equal sides", ["--model", "mlp", "--input-shape", "3,32,64"]),
            (2, "is not a folder; choose another", ["--output", "used/report.json"]),
            (2, "leave out --checkpoint-activations", ["--compile", "--checkpoint-activations"]),
        ):
            with self.subTest(argv=argv):
                code, out, errors = self.run_main(*argv)
                self.assertEqual((code, out), (expected, ""), errors)
                self.assertTrue(errors.startswith("error: ") and text in errors and errors.count("\n") == 1, errors)
        self.assertEqual(sorted(path.name for path in self.folder.iterdir() if path.name != "__pycache__"),
                         [f"{module}.py", "used"])

    def test_how_it_ends(self) -> None:
        with mock.patch.object(script, "run", side_effect=KeyboardInterrupt):
            self.assertEqual(self.run_main()[0], 130)
        with mock.patch.object(script, "run", side_effect=RuntimeError("it\nbroke")):
            code, _, errors = self.run_main()
        self.assertEqual((code, errors), (1, "error: RuntimeError: it broke (--debug shows where)\n"))
        with mock.patch.object(script, "run", side_effect=RuntimeError), self.assertRaises(RuntimeError):
            self.run_main("--debug")


if __name__ == "__main__":
    unittest.main()
