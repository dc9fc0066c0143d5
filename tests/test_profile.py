"""scripts/profile.py: it hides no standard module; its times by a clock of our own, its rules and figures by hand."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import torchbasics as tb
from tests.common import SCRIPTS, load_script, run_main

CPU = torch.device("cpu")
script = load_script("profile")


def setUpModule() -> None:
    unittest.addModuleCleanup(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)


class InFolder(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)


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
    batches = list(DataLoader(Numbers(), batch_size=2, num_workers=1, multiprocessing_context="spawn"))
    print(torch.cat(batches).sum().item(), sys.modules["profile"].__file__ if "profile" in sys.modules else "")


if __name__ == "__main__":
    main()
'''


class StandardModule(InFolder):
    """Whoever imports `profile` beside this script gets the standard module."""

    def run_python(self, *command: str) -> str:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=env, capture_output=True, text=True, timeout=180
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_cprofile_runs_with_scripts_first_on_the_path_and_torch_is_not_loaded(self) -> None:
        code = (
            f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import cProfile, profile; cProfile.run('1+1'); "
            "profile.run('1+1'); print(profile.__file__, profile.__name__, 'torch' in sys.modules)"
        )
        out = self.run_python("-c", code)
        self.assertIn("function calls", out)
        path, *rest = out.split("\n")[-2].split()
        self.assertEqual((Path(path).name, rest), ("profile.py", ["profile", "False"]))
        self.assertNotEqual(Path(path).parent, SCRIPTS)

    def test_a_script_beside_a_copy_can_train_and_spawn_workers(self) -> None:
        shutil.copy(SCRIPTS / "profile.py", self.folder)
        (self.folder / "beside.py").write_text(BESIDE, encoding="utf-8")
        out = self.run_python(str(self.folder / "beside.py"))
        self.assertTrue(out.startswith("4.0"), out)
        self.assertNotIn(str(self.folder), out)


class Verdict(unittest.TestCase):
    def verdict(self, data: float = 0.0, transfer: float = 0.0, **changes: Any) -> tuple[str, str, str]:
        """Return the verdict on a step of 1 s, which half the batch makes in 0.5 s."""
        split = {"data": data, "transfer": transfer, "step": 1.0}
        measured: dict[str, Any] = {"step": 1.0, "bare": 1.0, "half": 0.5, "products": 0.6}
        measured |= {"try_bf16": False, "try_compile": False}
        return script.verdict(split=split, **(measured | changes))

    def test_each_rule_and_its_border(self) -> None:
        for expected, changes in (
            ("compute", {}),
            ("compute", {"products": 0.5}),
            ("memory-bound", {"products": 0.49}),
            ("loader", {"bare": 0.75, "data": 0.15, "transfer": 0.1}),
            ("transfer", {"bare": 0.75, "data": 0.1, "transfer": 0.15}),
            ("compute", {"bare": 0.76, "data": 0.5}),
            ("loader", {"bare": 0.5, "data": 0.5, "half": 0.5}),
            ("overhead", {"half": 0.8}),
            ("compute", {"half": 0.79}),
            ("compute", {"half": None}),
        ):
            with self.subTest(changes):
                self.assertEqual(self.verdict(**changes)[0], expected)

    def test_the_figure_and_the_change_fit_the_case(self) -> None:
        for changes, figure, change, absent in (
            ({"bare": 0.3, "data": 0.9}, "300.00 ms instead of 1000.00 ms", "num_workers", "pin"),
            ({"bare": 0.3, "transfer": 0.9}, "instead of", "pin_memory", "num_workers"),
            ({"half": 0.9}, "half the batch takes 90%", "twice the --batch-size", "--compile"),
            ({"half": 0.9, "try_compile": True}, "90%", "--compile, which fuses operators; then twice", "bf16"),
            ({"try_bf16": True}, "60%", "--precision bf16", "--compile"),
            ({}, "60%", "smaller model", "--precision"),
            ({"products": 0.2}, "20%", "fewer or smaller activations", "--compile"),
            ({"products": 0.2, "try_compile": True}, "20%", "--compile, which fuses operators; then fewer", "bf16"),
            ({"products": 0.2, "try_bf16": True}, "20%", "--precision bf16", "smaller model"),
        ):
            with self.subTest(changes):
                _, found, advice = self.verdict(**changes)
                self.assertIn(figure, found)
                self.assertIn(change, advice)
                self.assertNotIn(absent, advice)


class Operators(unittest.TestCase):
    def test_products_are_known_by_their_names_also_those_inside_recurrent_layers(self) -> None:
        for name in ("addmm", "bmm", "convolution_backward", "_flash_attention_forward", "mkldnn_linear",
                     "mkldnn_rnn_layer", "mkldnn_rnn_layer_backward", "_cudnn_rnn", "gru"):  # fmt: skip
            self.assertRegex(f"aten::{name}", script.PRODUCTS)
        for name in ("relu", "native_batch_norm", "add_", "copy_", "_softmax", "max_pool2d_with_indices"):
            self.assertNotRegex(f"aten::{name}", script.PRODUCTS)


class Clock:
    """A clock that moves only when told, so that every time is known beforehand."""

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
        self.clock = clock
        self.seconds = seconds
        self.inner = inner or nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.clock.sleep(self.seconds)
        out = self.inner(x)
        out.register_hook(lambda _: self.clock.sleep(2 * self.seconds))
        return out


class Times(unittest.TestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        patch = mock.patch.object(script, "time", self.clock)
        patch.start()
        self.addCleanup(patch.stop)
        self.batch = torch.zeros(3, 2), torch.tensor([0, 1, 0])

    def slow_batches(self, seconds: float) -> Any:
        while True:
            self.clock.sleep(seconds)
            yield self.batch

    def test_a_step_is_split_into_its_phases(self) -> None:
        work = script.make_work(Slow(self.clock, 0.01), self.batch, CPU, "fp32")
        handle = work.optimizer.register_step_post_hook(lambda *_: self.clock.sleep(0.005))
        self.addCleanup(handle.remove)

        def move(batch: Any, device: torch.device) -> Any:
            self.clock.sleep(0.003)
            return batch

        with mock.patch.object(script, "to_device", move):
            split = script.time_spans(work, self.slow_batches(0.04), 4)
        expected = {"data": 0.04, "transfer": 0.003, "forward": 0.01, "backward": 0.02, "optimizer": 0.005}
        for name, seconds in (expected | {"step": sum(expected.values())}).items():
            self.assertAlmostEqual(split[name], seconds, places=9, msg=name)

    def test_a_module_has_its_own_time_without_its_children(self) -> None:
        inner = Slow(self.clock, 0.5)
        model = Slow(self.clock, 0.25, nn.Sequential(inner, inner))  # the same layer twice
        work = script.make_work(model, self.batch, CPU, "fp32")
        names = dict(model.named_modules())
        seconds = script.time_spans(work, itertools.repeat(self.batch), 3, names.values())
        expected = {"": 0.25, "inner": 0.0, "inner.0": 1.0, "inner.0.inner": 0.0}
        self.assertEqual({name: round(seconds[module], 9) for name, module in names.items()}, expected)
        self.assertAlmostEqual(seconds["step"], 3 * 1.25)  # backward included
        self.assertFalse([module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks])

    def test_repeats_come_after_a_warm_up_and_more_than_30_percent_between_them_mean_a_busy_machine(self) -> None:
        work = script.make_work(Slow(self.clock, 0.01), self.batch, CPU, "fp32")
        self.assertAlmostEqual(script.median_step(work, self.slow_batches(0.07), 2), 0.1)
        self.assertAlmostEqual(self.clock.now, 1000 + 0.1 * (script.WARMUP + 3 * 2))
        for times, warns in (((9.0, 1.0, 1.29, 1.1), False), ((9.0, 1.0, 1.31, 1.1), True)):  # the first is the warm-up
            steps = mock.patch.object(script, "time_steps", side_effect=times)
            with steps, warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                self.assertEqual(script.median_step(work, self.slow_batches(0.0), 2), 1.1)
            self.assertEqual(["the machine is busy" in str(one.message) for one in said], [True] * warns)

    def test_the_device_is_waited_for_after_each_phase_but_only_around_unsynchronised_steps(self) -> None:
        work = script.make_work(nn.Linear(2, 2), self.batch, CPU, "fp32")
        with mock.patch.object(script, "synchronize") as synchronize:
            script.time_steps(work, itertools.repeat(self.batch), 5)
            self.assertEqual(synchronize.call_count, 2)
            script.time_spans(work, itertools.repeat(self.batch), 5)
            self.assertEqual(synchronize.call_count, 2 + 2 * 5 * (len(script.PHASES) + 1))


class Memory(unittest.TestCase):
    def images(self, size: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(size, 1, 28, 28, generator=generator), torch.arange(size) % 10

    def test_blocks_are_the_children_with_layers(self) -> None:
        model = tb.MNISTNet()
        self.assertEqual(script.blocks(model), [model.block1, model.block2, model.classifier])
        layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))
        self.assertEqual(script.blocks(nn.ModuleDict({"stem": nn.Linear(2, 2), "layers": layers})), list(layers))
        flat = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.assertEqual(script.blocks(flat), [flat])

    def test_checkpointing_saves_memory_and_keeps_the_gradients_with_dropout_and_batchnorm(self) -> None:
        batch = self.images(16)
        work = script.make_work(tb.MNISTNet(dropout=0.3), batch, CPU, "fp32")
        before = script.measure(work, batch, 1)
        script.checkpoint_activations(work.model)
        after = script.measure(work, batch, 1)
        self.assertEqual(script.difference(after.gradients, before.gradients), 0.0)
        self.assertLess(after.peak, 0.95 * before.peak)

    def test_the_gradients_of_two_halves_are_those_of_the_batch_and_of_plain_pytorch(self) -> None:
        batch = self.images(8)
        model = tb.SimpleNet()
        expected = torch.autograd.grad(nn.functional.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))
        work = script.make_work(model, batch, CPU, "fp32")
        for parts in (1, 2):
            measured = script.measure(work, batch, 1, accumulate=parts)
            self.assertLess(script.difference(measured.gradients, list(expected)), 1e-5)
        doubled = [2 * gradient for gradient in expected]
        self.assertAlmostEqual(script.difference(doubled, list(expected)), 1.0)

    def test_each_option_has_an_estimate_near_the_measured_peak(self) -> None:
        batch = self.images(32)
        work = script.make_work(tb.CNN(dropout=0.0), batch, CPU, "fp32")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            script.print_options(work, argparse.Namespace(steps=1, model="cnn"), batch)
        found = re.findall(r"(?m)^  (\S.*?) {2,}([\d.]+)(?: +([\d.]+) .*)?$", out.getvalue())
        rows = {name: (float(estimate), float(peak or "nan")) for name, estimate, peak in found}  # MiB
        self.assertEqual(list(rows), ["as it is", "half the batch, --accumulate 2", "--precision bf16",
                                      "images of 12 x 12", "--checkpoint-activations", "2 processes, DDP",
                                      "2 processes, FSDP"])  # fmt: skip
        for name, (estimate, peak) in list(rows.items())[:5]:
            self.assertLess(abs(estimate / peak - 1), 0.4, name)
        self.assertLess(rows["half the batch, --accumulate 2"][1], rows["as it is"][1])
        self.assertLess(rows["images of 12 x 12"][0], rows["as it is"][0])
        parameters = 4 * tb.count_parameters(work.model) / 2**20  # as much again for gradients, twice for AdamW
        sharded = rows["2 processes, DDP"][0] - rows["2 processes, FSDP"][0]  # half of these four
        self.assertAlmostEqual(sharded, 2 * parameters, delta=0.11)


MINE = '''
import torch
from torch import nn


def model():
    return nn.Linear(4, 2)


def batches():
    return [(torch.ones(6, 4), torch.arange(6) % 2)]


def numbers():
    return [3]
'''


class Command(InFolder):
    def setUp(self) -> None:
        super().setUp()
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.folder)
        patch = mock.patch.object(sys, "path", [*sys.path])
        patch.start()
        self.addCleanup(patch.stop)
        self.addCleanup(sys.modules.pop, "mine_of_this_test", None)
        calm = mock.patch.object(script, "BUSY", math.inf)
        calm.start()
        self.addCleanup(calm.stop)
        (self.folder / "mine_of_this_test.py").write_text(MINE, encoding="utf-8")

    def profile(self, *argv: str) -> tuple[int, str, str]:
        def main(argv: list[str]) -> int:
            return script.cli.run(script.main, argv)

        return run_main(main, "--device", "cpu", "--precision", "fp32", "--steps", "2", *argv)

    def test_report_and_trace_of_simplenet(self) -> None:
        code, out, errors = self.profile("--model", "simplenet", "--batch-size", "16", "--trace", "trace.json.gz")
        self.assertEqual((code, errors), (0, ""))
        self.assertRegex(out.splitlines()[1], r"^bound by: (loader|transfer|overhead|compute|memory-bound): ")
        cells = dict(re.findall(r"(?m)^(\w+) +([\d.]+) +[\d.]+%$", out))
        phases = [float(cells[name]) for name in script.PHASES]  # ms
        self.assertLess(sum(phases), float(cells["step"]) + 0.01)
        modules = re.findall(r"(?m)^(\S+) +\w* +([\d,]+) +\d+\.\d\d +(\d+\.\d{3})$", out)
        sizes = [int(size.replace(",", "")) for _, size, _ in modules if size != "0"]
        layers = [784 * 128 + 128, 128 * 64 + 64, 64 * 10 + 10]
        self.assertEqual(sizes, [*layers, sum(layers)])
        step = float(re.findall(r"of a step of ([\d.]+) ms", out)[0])
        self.assertLess(sum(float(time) for name, _, time in modules if name != "all"), step)
        self.assertRegex(out, r"(?m)^aten::addmm +3\.0 ")  # one per Linear layer
        with gzip.open("trace.json.gz", "rt", encoding="utf-8") as file:
            names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
        for phase in script.PHASES:
            self.assertEqual(names.count(f"step.{phase}"), script.TRACED)
        with mock.patch.object(script, "checkpoint", side_effect=script.checkpoint) as used:
            code, _, errors = self.profile("--model", "simplenet", "--batch-size", "16", "--checkpoint-activations")
        self.assertEqual((code, errors, used.called), (0, "", True))
        with mock.patch.object(script, "median_step", return_value=1.0):  # half the batch takes as long: overhead
            _, out, _ = self.profile("--model", "simplenet", "--batch-size", "4")
        self.assertIn("\nchange:   twice the --batch-size\n", out)  # on a CPU without --compile

    def test_memory_of_your_own_model_and_batches(self) -> None:
        mine = ["--model", "mine_of_this_test:model", "--loader", "mine_of_this_test:batches", "--memory"]
        code, out, errors = self.profile(*mine)
        self.assertEqual((code, errors), (0, ""))
        self.assertIn("mine_of_this_test:model on mine_of_this_test:batches; batches of 6; fp32", out)
        for text in ("in use", "still fits", "half the batch, --accumulate 2", "2 processes, FSDP", "after del"):
            self.assertIn(text, out)

    def test_compile_modes_are_compared_with_none(self) -> None:
        with mock.patch.object(nn.Module, "compile") as compiled:
            code, out, _ = self.profile("--model", "simplenet", "--batch-size", "4", "--compile", "default",
                                        "max-autotune")  # fmt: skip
        self.assertEqual(code, 0)
        self.assertEqual(compiled.mock_calls, [mock.call(mode="default"), mock.call(mode="max-autotune")])
        table = out[out.index("first step ms") :].splitlines()[1:4]
        self.assertEqual([re.split("  +", row)[0] for row in table], ["not compiled", "default", "max-autotune"])

    def test_a_busy_machine_is_named_once_beside_the_times(self) -> None:
        mine = ["--model", "mine_of_this_test:model", "--loader", "mine_of_this_test:batches"]
        for report in ([], ["--memory"]):
            uneven = itertools.cycle([1.0, 1.0, 1.4])
            with mock.patch.object(script, "BUSY", 0.3), mock.patch.object(script, "time_steps", side_effect=uneven):
                code, _, errors = self.profile(*mine, *report)
            self.assertEqual((code, errors.count("\n")), (0, 1), errors)
            self.assertRegex(errors, "^warning: the machine is busy")

    def test_bad_input_gets_one_line(self) -> None:
        mine = "mine_of_this_test"
        for text, argv in (
            ("expected a model of mnistnet, ", ["--model", "nope"]),
            ("No module named 'nope_x'", ["--model", "nope_x:y"]),
            ("has no attribute 'y'", ["--model", f"{mine}:y"]),
            ("gave a list, expected a Module", ["--model", f"{mine}:batches"]),
            ("a batch must be two tensors", ["--model", f"{mine}:model", "--loader", f"{mine}:numbers"]),
            ("the loader gave no batch", ["--model", "simplenet", "--loader", "builtins:list"]),
            ("expected a whole number from 1", ["--steps", "0"]),
            ("mlp takes channels and two equal sides", ["--model", "mlp", "--input-shape", "3,32,64"]),
            ("--checkpoint-activations: not allowed with", ["--compile", "--checkpoint-activations"]),
            ("--memory: not allowed with", ["--checkpoint-activations", "--memory"]),
            ("--trace does not go with --memory", ["--trace", "x.json", "--memory"]),
            ("--trace does not go with --memory and --compile", ["--trace", "x.json", "--compile"]),
            ("--batch-size and --input-shape do not", ["--loader", f"{mine}:batches", "--batch-size", "8"]),
        ):
            with self.subTest(argv):
                code, _, errors = self.profile(*argv)
                self.assertEqual((code, errors.count("\n")), (2, 1), errors)
                self.assertIn(text, errors)


if __name__ == "__main__":
    unittest.main()
