"""scripts/benchmark.py: its figures against hand calculation, on a clock of our own; its comparisons are fair."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import torchbasics as tb
from tests.scripts import load_script
from torchbasics import options

ROOT = Path(__file__).resolve().parents[1]
script = load_script("benchmark")

CPU = torch.device("cpu")
SCORES = {"parameters": 19610, "test_accuracy": 0.9925, "train_seconds": 1.0, "process_seconds": 6.0}


class Clock:
    """A clock that moves only when told, so that every figure is known beforehand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> Any:
        self.now += seconds


class WithSetting(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.setting = script.Setting(True, 2, 1, self.folder / "absent", CPU, "fp32", self.folder)
        self.setting.cache["images"] = tb.draw_digits(256)

    if not hasattr(unittest.TestCase, "enterContext"):  # Python 3.10

        def enterContext(self, manager: contextlib.AbstractContextManager) -> Any:
            value = manager.__enter__()
            self.addCleanup(manager.__exit__, None, None, None)
            return value

    def patch(self, **replacements: Any) -> None:
        for name, value in replacements.items():
            self.enterContext(mock.patch.object(script, name, value))

    def on_clock(self) -> Clock:
        clock = Clock()
        self.patch(time=clock)
        return clock


class Figures(WithSetting):
    def test_a_ratio_is_the_median_of_the_pairs(self) -> None:
        found = script.row("x", "y", "as fast", "s", [1.0, 2.0, 4.0], [3.0, 20.0, 4.0])
        self.assertEqual(found["ratio"], {"median": 3.0, "min": 1.0, "max": 10.0})  # 3, 10 and 1
        self.assertEqual(found["ours"], {"median": 2.0, "min": 1.0, "max": 4.0})
        self.assertEqual(found["peers"], {"median": 4.0, "min": 3.0, "max": 20.0})
        self.assertEqual((found["runs"], found["ratio_unit"], found["goal"]), (3, "×", None))

    def test_of_unequal_numbers_it_is_that_of_the_medians(self) -> None:
        found = script.row("x", "y", "as fast", "s", [1.0, 2.0, 4.0], [100.0])
        self.assertEqual(found["ratio"], {"median": 50.0, "min": 50.0, "max": 50.0})

    def test_what_each_kind_is_and_which_direction_is_good(self) -> None:
        for kind, expected, unit in (
            ("as fast", 4.0, "×"), ("the rate", 0.25, "×"), ("as long", 0.25, "×"),
            ("reached", 4.0, "%"), ("of it", 0.25, "%"), ("seconds more", -6.0, "+s"),
            ("points more", -6.0, "points"),
        ):
            found = script.row("x", "y", kind, "s", [2.0], [8.0])
            self.assertEqual((found["ratio"]["median"], found["ratio_unit"]), (expected, unit), kind)
        alone = script.row("x", "", "seconds", "s", [2.0, 3.0, 7.0])
        self.assertEqual((alone["ratio"]["median"], alone["peers"]), (3.0, None))

    def test_goals_at_and_beside_the_border(self) -> None:
        for sign, number, met in (("≥", 2.0, True), ("≥", 2.01, False), ("≤", 2.0, True), ("≤", 1.99, False),
                                  (">", 2.0, False), (">", 1.99, True)):
            found = script.row("x", "y", "as long", "s", [2.0], [1.0], script.Goal(sign, number))
            self.assertEqual(found["goal"], {"text": f"{sign} {number:g}×", "number": number, "met": met})
        found = script.row("x", "y", "seconds more", "s", [2.0], [1.0], script.Goal("≤", 10e-6))
        self.assertEqual(found["goal"]["text"], "≤ +10 µs")
        found = script.row("x", "y", "as long", "s", [2.0], [1.0], script.Goal("≤", 3, "at most so"))
        self.assertEqual(found["goal"]["text"], "at most so")

    def test_values_as_people_write_them(self) -> None:
        for value, unit, text in (
            (3600.0, "s", "3,600 s"), (1.0, "s", "1 s"), (0.0334, "s", "33.4 ms"), (0.25, "s", "250 ms"),
            (480e-6, "s", "480 µs"), (1.5e-6, "s", "1.5 µs"), (-10e-6, "+s", "-10 µs"), (0.05, "+s", "+50 ms"),
            (0.99123, "%", "99.12%"), (0.0011, "points", "+0.11 points"), (190123.4, "images/s", "190,123 images/s"),
            (1.013, "×", "1.01×"), (20.0, "×", "20×"), (140.0, "×", "140×"), (2.5, "×", "2.5×"), (0.0, "", "0"),
        ):
            self.assertEqual(script.quantity(value, unit), text)


class Turns(WithSetting):
    def test_they_take_turns_after_one_round_to_warm_up(self) -> None:
        order: list[str] = []
        numbers = itertools.count()

        def contender(name: str) -> Any:
            def turn() -> float:
                order.append(name)
                return float(next(numbers))

            return turn

        found = script.interleaved(3, contender("A"), contender("B"))
        self.assertEqual("".join(order), "ABABABAB")
        self.assertEqual(found, [[2.0, 4.0, 6.0], [3.0, 5.0, 7.0]])

    def test_known_sleeps(self) -> None:
        clock = self.on_clock()
        ours, peers = script.interleaved(
            3, *(lambda seconds=seconds: script.timed(lambda: clock.sleep(seconds), CPU) for seconds in (0.25, 0.75)))
        found = script.row("x", "y", "as fast", "s", ours, peers, script.Goal("≥", 3))
        self.assertEqual((found["ours"]["median"], found["ratio"]["median"], found["goal"]["met"]), (0.25, 3.0, True))

    def test_images_a_second_after_those_passed_over(self) -> None:
        clock = self.on_clock()

        def loader() -> Iterator[Any]:
            for seconds in (100.0, 0.5, 0.5, 0.5, 50.0):
                clock.sleep(seconds)
                yield torch.zeros(4, 1), torch.zeros(4)

        self.assertEqual(script.loading(loader(), CPU, batches=3, passed_over=1), 8.0)
        with mock.patch.object(script, "synchronize", lambda device: clock.sleep(0.5)):  # until the device has done it
            self.assertEqual(script.loading(loader(), torch.device("cuda"), batches=3, passed_over=1), 6.0)

    def test_seconds_of_a_step(self) -> None:
        clock = self.on_clock()
        job = script.Job(None, None, None, [1, 2, 3, 4], CPU, "fp32", torch.preserve_format)
        self.assertEqual(script.per_step(lambda: clock.sleep(2.0), job)(), 0.5)
        self.assertEqual(script.per_step(lambda: clock.sleep(2.0) or 0.4, job)(), 0.1)  # it has timed itself


class Fair(WithSetting):
    def test_trainer_and_hand_written_loop_end_with_identical_weights(self) -> None:
        """The same model, batches, augmentation, dropout, precision and optimizer: so only the loop differs."""
        for tiny, precision in ((True, "fp32"), (False, "fp32"), (False, "bf16")):
            self.setting.precision = precision
            ends = []
            for start in (script.by_trainer, lambda job: lambda: script.by_hand(job)):
                job = script.make_job(self.setting, tiny, 1)
                began = [p.clone() for p in job.model.parameters()]
                epoch = start(job)
                torch.manual_seed(1)
                epoch()
                epoch()
                self.assertFalse(all(map(torch.equal, began, job.model.parameters())))
                ends.append(job.model.state_dict())
            for name, value in ends[0].items():
                self.assertTrue(torch.equal(value, ends[1][name]), (tiny, precision, name))

    def test_the_products_alone_are_those_of_a_step(self) -> None:
        """Their FLOPs are those of a whole step, as torch counts them."""
        model, inputs = tb.MNISTNet(), torch.randn(4, 1, 28, 28)
        with FlopCounterMode(display=False) as whole:
            nn.functional.cross_entropy(model(inputs), torch.arange(4)).backward()
        before = [p.clone() for p in model.parameters()]
        alone = script.products(model, inputs, "bf16")
        with FlopCounterMode(display=False) as counted:
            alone()
        self.assertEqual(counted.get_total_flops(), whole.get_total_flops())
        self.assertTrue(all(map(torch.equal, before, model.parameters())))
        self.assertFalse(any(layer._forward_hooks for layer in model.modules()))

    def test_each_step_alone(self) -> None:
        """Only ours is the Trainer's, and fused; only the newcomer's does not keep its memory."""
        self.patch(images=lambda _: self.setting.cache["images"])
        how = {"steps": 1, "repeats": 2, "data_dir": "absent", "device": "cpu", "quick": True}
        for whose, layout, fused in (("ours", torch.channels_last, True), ("products", torch.channels_last, True),
                                     ("plain", torch.contiguous_format, None)):
            work = {name: mock.Mock() for name in ("by_trainer", "by_hand", "products")}
            with contextlib.ExitStack() as stack:
                for name, function in work.items():
                    stack.enter_context(mock.patch.object(script, name, function))
                measured = stack.enter_context(mock.patch.object(script, "per_step", return_value=lambda: 0.5))
                kept = stack.enter_context(mock.patch.object(script.tb, "cache_cpu_memory"))
                self.assertEqual(list(script.seconds_of_a_step(whose, **how)), [0.5, 0.5])
                measure, job = measured.call_args.args
                measure()
            ran = [name for name, function in work.items() if (function if name == "by_hand" else function()).called]
            self.assertEqual(ran, [{"ours": "by_trainer", "plain": "by_hand"}.get(whose, whose)])
            self.assertEqual((kept.called, job.memory_format), (whose != "plain", layout))
            self.assertEqual(job.precision, "fp32" if whose == "plain" else tb.pick_precision("auto"))
            self.assertEqual(job.optimizer.defaults["fused"], fused)

    def test_steps_are_compared(self) -> None:
        seconds = {"ours": [0.02, 0.01, 0.03], "plain": [0.06], "products": [0.015]}
        found: list[str] = []

        def child(command: Any, _: Any) -> str:
            name, how = command[-2], json.loads(command[-1])
            found.append(how["whose"])
            self.assertEqual(name, "step")
            return "\n".join(map(str, seconds[how["whose"]]))

        self.patch(child=child)
        fast, rate = script.step(self.setting)
        self.assertEqual(found, ["ours", "plain", "products"])
        self.assertAlmostEqual(fast["ratio"]["median"], 3.0)
        self.assertAlmostEqual(rate["ratio"]["median"], 0.75)
        self.assertTrue(fast["goal"]["met"] and rate["goal"]["met"])

    def test_torchvision_reads_the_same_images(self) -> None:
        found = script.torchvision_mnist(script.idx_folder(self.setting))
        inputs, targets = self.setting.cache["images"]
        self.assertTrue(torch.equal(found.data, inputs[:, 0]) and torch.equal(found.targets, targets))
        loader = tb.TensorLoader(inputs, targets, 256, mean=script.MEAN, std=script.STD)
        torch.testing.assert_close(torch.stack([found[i][0] for i in range(5)]), next(iter(loader))[0][:5])

    def test_an_import_is_timed_beside_torchs_from_bytecode(self) -> None:
        seen: list[dict[str, str]] = []

        def child(command: list[str], setting: Any, environment: dict[str, str]) -> str:
            seen.append(environment)
            return f"{len(seen) + 0.25} {len(seen)}\n"

        self.patch(child=child)
        (row,) = script.import_time(self.setting)
        self.assertEqual((row["ours"]["median"], row["peers"]["median"]), (2.75, 2.5))  # the first warms up
        self.assertEqual(row["ratio"], {"median": 0.25, "min": 0.25, "max": 0.25})
        for environment in seen:
            self.assertEqual(environment["PYTHONDONTWRITEBYTECODE"], "")
            home = Path(environment["PYTHONPATH"].split(os.pathsep)[0])
            self.assertEqual(home.parent, self.folder)  # removed with it
            self.assertTrue((home / "torchbasics" / "trainer.py").is_file())

    def test_the_monitor_watches_one_of_two_loops_over_one_model(self) -> None:
        steps: list[int] = []

        def interleaved(runs: int, *contenders: Any) -> list[list[float]]:
            for contender in (*contenders, *contenders):
                before = looks.call_count
                contender()
                steps.append(looks.call_count - before)
            return [[1.0]] * len(contenders)

        self.patch(interleaved=interleaved)
        look, watch = tb.GradientMonitor._before_step, tb.GradientMonitor.__call__
        with mock.patch.object(tb.GradientMonitor, "_before_step", autospec=True, side_effect=look) as looks, \
                mock.patch.object(tb.GradientMonitor, "__call__", autospec=True, side_effect=watch) as calls:
            list(script.monitor(self.setting))
        self.assertEqual(steps, [1, 0, 1, 0])  # of two steps the first is that at which it begins to watch
        (watched,) = {id(call.args[0].model) for call in calls.call_args_list}
        self.assertEqual({id(call.args[1].model) for call in calls.call_args_list}, {watched})

    def test_peers_that_are_not_installed(self) -> None:
        self.patch(interleaved=lambda runs, *contenders: [[2e-3] * runs] * len(contenders))
        with mock.patch("importlib.util.find_spec", return_value=None):
            rows = list(script.loop(self.setting))
        self.assertEqual([row["kind"] for row in rows[:2]], ["as long", "seconds more"])
        self.assertEqual([row["peer"] for row in rows[2:]], list(script.PEERS))
        self.assertEqual([row["skipped"].split("pip install ")[1] for row in rows[2:]],
                         ["lightning", "accelerate", "pytorch-ignite", "lightning"])


class Classic(WithSetting):
    def test_the_network(self) -> None:
        net = script.classic_net().eval()
        self.assertEqual(tb.count_parameters(net), 1_199_882)
        shapes = [tuple(net[:depth](torch.zeros(2, 1, 28, 28)).shape) for depth in (1, 3, 5, 7, 8, 12)]
        self.assertEqual(shapes, [(2, 32, 26, 26), (2, 64, 24, 24), (2, 64, 12, 12), (2, 9216), (2, 128), (2, 10)])
        torch.testing.assert_close(net(torch.randn(3, 1, 28, 28)).exp().sum(1), torch.ones(3))
        self.assertEqual([layer.p for layer in net if isinstance(layer, nn.Dropout)], [0.25, 0.5])

    def test_the_recipe(self) -> None:
        clock, seen = Clock(), []

        def epoch(model: nn.Module, optimizer: Any, train: Any, limit: int | None) -> None:
            optimizer.step()  # without gradients: nothing, but the schedule wants to see it
            seen.append((type(optimizer).__name__, round(optimizer.param_groups[0]["lr"], 3), train.batch_size,
                         type(train.sampler).__name__, limit))
            clock.sleep(10.0)

        accuracies = mock.Mock(side_effect=[0.95, 0.989, 0.99, 0.995])
        self.patch(classic_epoch=epoch, classic_accuracy=accuracies)
        root = str(script.idx_folder(self.setting))
        with mock.patch.object(script.time, "perf_counter", clock.perf_counter):
            found = list(script.classic_example(root, stop_at=0.99, limit=7))
        self.assertEqual([(e["epoch"], e["accuracy"], e["train_seconds"]) for e in found],
                         [(1, 0.95, 10.0), (2, 0.989, 20.0), (3, 0.99, 30.0)])
        self.assertEqual(seen, [("Adadelta", rate, 64, "RandomSampler", 7) for rate in (1.0, 0.7, 0.49)])
        test = accuracies.call_args.args[1]
        self.assertEqual((test.batch_size, type(test.sampler).__name__, test.dataset.train),
                         (1000, "SequentialSampler", False))

    def test_it_trains_and_the_command_prints_a_line_for_each_epoch(self) -> None:
        how = {"root": str(script.idx_folder(self.setting)), "epochs": 2, "limit": 1, "began": script.time.time() - 50}
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            self.assertEqual(script.main(["--alone", "classic", json.dumps(how)]), 0)
        first, second = map(json.loads, out.getvalue().splitlines())
        self.assertEqual((first["epoch"], second["epoch"]), (1, 2))
        self.assertTrue(0 < first["train_seconds"] < second["train_seconds"] < 50 < second["process_seconds"], second)

    def test_accuracy_and_a_step_as_by_hand(self) -> None:
        torch.manual_seed(0)
        layer, inputs, targets = nn.Linear(3, 2), torch.randn(4, 3), torch.ones(4)
        model = nn.Sequential(layer, nn.LogSoftmax(1))
        batches = [(inputs, targets.long()), (inputs, torch.zeros(4).long())]
        right = int((model(inputs).argmax(1) == 1).sum())
        self.assertEqual(script.classic_accuracy(model, batches, 1), right / 4)
        self.assertEqual(script.classic_accuracy(model, batches, None), 0.5)
        weight = layer.weight
        loss = nn.functional.nll_loss(model(inputs), targets.long())
        expected = weight.detach() - 0.1 * torch.autograd.grad(loss, weight)[0]
        script.classic_epoch(model, torch.optim.SGD(model.parameters(), 0.1), batches, 1)
        torch.testing.assert_close(weight.detach(), expected)


class LongRuns(WithSetting):
    def setUp(self) -> None:
        super().setUp()
        self.patch(has_mnist=lambda _: True, idx_folder=lambda _: self.folder)
        self.epochs = [{"epoch": i, "accuracy": accuracy, "train_seconds": 100.0 * i, "process_seconds": 120.0 * i + 2}
                       for i, accuracy in enumerate((0.98, 0.9901, 0.9915), start=1)]
        self.commands: list[Any] = []

    def child(self, command: Any, setting: Any, **_: Any) -> str:
        self.commands.append(command)
        return "\n".join(map(json.dumps, self.epochs))

    def test_run_and_speedrun_share_one_training_of_the_classic(self) -> None:
        trained: list[tuple] = []

        def train(setting: Any, *arguments: Any) -> dict[str, Any]:
            trained.append(arguments)
            return SCORES | {"train_seconds": 50.0 if "--preset" not in arguments else 1.25}

        self.patch(child=self.child, train=train)
        accuracy, training = script.run(self.setting)
        self.assertAlmostEqual(accuracy["ratio"]["median"], 0.9925 - 0.9915)
        self.assertTrue(accuracy["goal"]["met"])
        self.assertEqual((training["ratio"]["median"], training["goal"]["met"]), (6.0, True))
        fast, seconds, whole, mean = script.speedrun(self.setting)
        self.assertEqual(len(self.commands), 1)
        self.assertIsNone(json.loads(self.commands[0][-1])["stop_at"])
        self.assertEqual((fast["ratio"]["median"], fast["goal"]["met"]), (160.0, True))  # 200 s at 99.01%
        self.assertEqual((seconds["ratio"]["median"], seconds["goal"]["text"]), (1.25, "≤ 1.5 s"))
        self.assertAlmostEqual(whole["ratio"]["median"], 242 / 6)
        self.assertIn("99.01%", fast["peer"])
        self.assertEqual((mean["ratio"]["median"], mean["goal"]["met"]), (0.9925, True))
        self.assertIn("speedrun", trained[-1])

    def test_alone_the_classic_stops_at_99(self) -> None:
        self.setting.quick, self.setting.runs, self.setting.long_runs = False, 3, 2
        values = iter((1.0, 5.0, 2.0))
        self.patch(child=self.child, train=lambda *_: SCORES | {"train_seconds": next(values)})
        fast = next(script.speedrun(self.setting))
        hows = [json.loads(command[-1]) for command in self.commands]
        self.assertEqual([(how["stop_at"], how["seed"], how["limit"], how["epochs"]) for how in hows],
                         [(0.99, 1, None, 14), (0.99, 2, None, 14)])
        self.assertEqual((fast["ratio"]["median"], fast["runs"]), (100.0, 3))  # 200 s against the median of 1, 5 and 2

    def test_without_mnist(self) -> None:
        self.patch(has_mnist=lambda _: False)
        for section in (script.run, script.speedrun):
            with self.assertRaisesRegex(script.Skip, "--data-dir"):
                next(section(self.setting))


class OtherSections(WithSetting):
    def test_the_result_of_a_training_and_the_rates_of_its_table(self) -> None:
        table = ("epoch  train loss  train acc  val loss  val acc       lr  images/s  seconds\n"
                 "    1      0.9522     68.58%    0.1211   96.20%  4.6e-04     2,747     20.0  best\n"
                 "   15      0.0216     99.37%    0.0077   99.72%  1.2e-08     4,012     13.7\n\nbest epoch 15 of 15\n")
        commands: list[list[str]] = []

        @contextlib.contextmanager
        def started(command: Any, setting: Any, environment: Any = None) -> Iterator[str]:
            commands.append([str(part) for part in command])
            output = Path(commands[-1][commands[-1].index("--output") + 1])
            output.mkdir()
            (output / "run.json").write_text(json.dumps({"result": {"test_accuracy": 0.5}}), encoding="utf-8")
            yield table

        self.patch(started=started, output_of=lambda process, _: process)
        with script.training(self.setting, "--seed", 3, launcher=("-m", "x")) as result:
            found = result()
        self.assertEqual((found["epoch_rates"], found["test_accuracy"]), ([2747.0, 4012.0], 0.5))
        self.assertEqual(commands[0][1:4], ["-m", "x", str(ROOT / "scripts" / "train_mnist.py")])

    def test_ddp(self) -> None:
        rates = {"--nproc-per-node=2": 1900.0, "--nproc-per-node=1": 1000.0, "": 1020.0}
        running: list[int] = []

        @contextlib.contextmanager
        def training(setting: Any, *arguments: Any, launcher: Any, script: str, environment: Any, device: str) -> Any:
            self.assertEqual((environment, device), ({"OMP_NUM_THREADS": "1"}, "cpu"))
            self.assertEqual(script, "train_ddp.py" if launcher else "train_mnist.py")
            images = arguments[arguments.index("--batch-size") + 1]
            self.assertEqual(images * arguments[arguments.index("--limit-batches") + 1], 768 // images * images)
            rate = rates[launcher[-1] if launcher else ""]

            def result() -> dict[str, Any]:
                self.assertEqual(running, [images, images] if images in (64, 256) else [images])  # at once, or alone
                value = 1000.0 if images in (64, 256) else rate if images == 128 else rate ** 0.5
                return {"epoch_rates": [7.0, value]}  # of the first one is warming up

            running.append(images)
            yield result
            running.remove(images)

        self.patch(training=training)
        two, of_free, larger, larger_of_free, one = script.ddp(self.setting)
        self.assertEqual((two["ratio"]["median"], two["goal"]["met"]), (1.9, True))
        self.assertAlmostEqual(larger["ratio"]["median"], 1.9 ** 0.5)
        self.assertFalse(larger["goal"]["met"])
        self.assertEqual(of_free["ratio"]["median"], 0.95)
        self.assertIn("are 2.00 times one process", of_free["note"])
        self.assertAlmostEqual(larger_of_free["ratio"]["median"], 1900 ** 0.5 / 2000)
        self.assertAlmostEqual(one["ratio"]["median"], 1.02)
        self.assertTrue(one["goal"]["met"])

    def test_inference(self) -> None:
        def entry(name: str, result: str, *latency: list[float]) -> dict[str, Any]:
            return {"format": name, "result": result, "latency_ms": dict(zip(("1", "64"), latency, strict=False))}

        rows = [entry("eager", "", [2.0, 3.0], [20.0, 30.0]), entry("aoti", "ok", [0.5, 0.6], [10.0, 11.0]),
                entry("onnx", "SKIP: needs another package: pip install onnx")]
        self.patch(train=lambda *_, **__: {"output": self.folder}, child=lambda *_, **__: json.dumps({"rows": rows}))
        small, large, *absent = script.inference(self.setting)
        self.assertEqual((small["ratio"]["median"], large["ratio"]["median"]), (4.0, 2.0))
        self.assertEqual(small["ours"], {"median": 0.0005, "min": 0.0005, "max": 0.0006})
        self.assertEqual([row["skipped"] for row in absent], ["needs another package: pip install onnx"] * 2)

    def test_saving_is_judged_by_both_terms(self) -> None:
        for ours, met in ((0.0649, True), (0.0651, False)):  # 1.5 × 10 ms + 50 ms
            self.patch(interleaved=mock.Mock(side_effect=[[[0.03]], [[ours] * 3, [0.01] * 3]]))
            (self.folder / "ours.pt").write_bytes(b"x" * 10)
            found, part = script.save(self.setting)
            self.assertEqual((found["goal"]["met"], found["goal"]["text"]), (met, "≤ 1.5× + 50 ms"))
            self.assertAlmostEqual(part["ratio"]["median"], 2 * ours / (430 * 0.03))

    def test_gpu(self) -> None:
        with self.assertRaisesRegex(script.Skip, "needs CUDA"):
            next(script.gpu(self.setting))
        self.setting.device = torch.device("cuda")
        graphs: list[Any] = []  # "on" everywhere: with "auto" a figure without a graph might stand there

        def train(setting: Any, *arguments: Any) -> dict[str, Any]:
            graphs.append(arguments[arguments.index("--cuda-graph") + 1])
            return SCORES | {"train_seconds": 4.0}

        self.patch(train=train, host_waits=lambda _: "called a synchronizing operation", make_job=mock.Mock(),
                   by_trainer=lambda job, **options: graphs.append(options.get("cuda_graph")),
                   interleaved=lambda runs, *contenders: [[0.25] * runs, [1.5] * runs])
        waits, graph, whole = script.gpu(self.setting)
        self.assertEqual(graphs, ["on", None, "on"])
        self.assertEqual((waits["goal"]["met"], waits["note"]), (False, "called a synchronizing operation"))
        self.assertEqual((graph["ratio"]["median"], graph["goal"]["met"]), (6.0, True))
        self.assertEqual((whole["ratio"]["median"], whole["goal"]["text"]), (4.0, "≤ 5 s"))

    def test_waiting_is_forbidden_in_ten_steps_and_then_allowed_again(self) -> None:
        modes: list[str] = []
        self.setting.cache["images"] = tb.draw_digits(128)[0].repeat(20, 1, 1, 1), torch.arange(2560) % 10
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        with (mock.patch("torch.cuda.set_sync_debug_mode", modes.append),
              mock.patch.object(tb, "MNISTNet", lambda: model)):
            self.assertEqual(script.host_waits(self.setting), "")
            self.assertEqual(modes, ["error", "default", "default"])
            with mock.patch.object(model, "forward", side_effect=RuntimeError("called a synchronizing CUDA operation")):
                self.assertEqual(script.host_waits(self.setting), "called a synchronizing CUDA operation")
            with (mock.patch.object(model, "forward", side_effect=RuntimeError("no memory")),
                  self.assertRaisesRegex(RuntimeError, "no memory")):
                script.host_waits(self.setting)
        self.assertEqual(modes[-1], "default")


class Children(WithSetting):
    def run_child(self, code: str, **more: Any) -> str:
        return script.child([sys.executable, "-S", "-c", code], self.setting, **more)

    def test_output_environment_and_errors(self) -> None:
        code = "import os; print(os.environ['ONE'], os.path.samefile('.', os.environ['HERE']))"
        self.assertEqual(self.run_child(code, environment={"ONE": "1", "HERE": str(self.folder)}), "1 True\n")
        self.assertEqual(self.run_child("import sys; print('x'); sys.exit(3)", codes=(0, 3)), "x\n")
        with self.assertRaisesRegex(RuntimeError, "code 1: ZeroDivisionError"):
            self.run_child("1 / 0")

    @unittest.skipUnless(hasattr(os, "killpg"), "needs process groups")
    def test_after_its_time_it_is_ended_with_its_own_children(self) -> None:
        """All of them hold the pipe's end: it is closed only when the last of them is gone."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.patch(die_with_parent=lambda: lambda: os.dup2(writer, 2))
        code = "import os, time; os.fork(); os.write(2, b'.'); time.sleep(60)"
        with mock.patch.object(script.Setting, "few", lambda *_: 1), self.assertRaisesRegex(RuntimeError, "within 1 s"):
            self.run_child(code)
        os.close(writer)
        parts = [b"."]
        while parts[-1]:
            self.assertTrue(select.select([reader], [], [], 10)[0], "one of them still holds the pipe")
            parts.append(os.read(reader, 10))
        self.assertEqual(b"".join(parts), b"...")

    @unittest.skipUnless(sys.platform == "linux", "by a call that Linux has")
    def test_a_child_dies_with_its_parent_however_that_dies(self) -> None:
        code = "\n".join([
            "from __future__ import annotations", "import ctypes, functools, os, signal, subprocess, sys",
            inspect.getsource(script.die_with_parent),
            "sleeper = [sys.executable, '-S', '-c', 'import time; print(1, flush=True); time.sleep(60)']",
            "child = subprocess.Popen(sleeper, preexec_fn=die_with_parent(), stderr=2, stdout=subprocess.PIPE)",
            "child.stdout.readline()", "os.kill(os.getpid(), signal.SIGKILL)"])
        done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=30)  # the sleeper holds it
        self.assertEqual((done.returncode, done.stderr), (-signal.SIGKILL, b""))


def sections() -> dict[str, Any]:
    def good(setting: Any) -> Iterator[dict[str, Any]]:
        print("what a peer says")
        yield script.row("a step", "a loop", "as fast", "s", [0.02, 0.02], [0.01, 0.03], script.Goal("≥", 2.5))
        yield script.skipped("a step", "Fabric", "not installed: pip install lightning")

    def broken(setting: Any) -> Iterator[dict[str, Any]]:
        yield script.row("half", "", "seconds", "s", [1.0])
        raise RuntimeError("it\nbroke")

    def lacking(setting: Any) -> Iterator[dict[str, Any]]:
        raise options.MissingExtra("pip install torchvision")
        yield

    return {"good": good, "broken": broken, "lacking": lacking}


class Command(WithSetting):
    def setUp(self) -> None:
        super().setUp()
        self.patch(SECTIONS=sections())
        self.enterContext(mock.patch.object(tempfile, "tempdir", str(self.folder)))

    def run_main(self, *argv: str) -> tuple[int, str, str]:
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                code = script.main(["--data-dir", str(self.folder / "absent"), "--device", "cpu", *argv])
            except SystemExit as stop:
                code = int(str(stop.code))
        return code, out.getvalue(), errors.getvalue()

    def test_one_section_fails_and_the_others_go_on(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        code, out, errors = self.run_main("--json")
        report = json.loads(out)  # and nothing else
        self.assertEqual(code, 1)
        self.assertEqual(errors, "what a peer says\nerror: broken: RuntimeError: it broke (--debug shows where)\n")
        self.assertEqual([found["result"].partition(":")[0] for found in report["sections"]], ["ok", "FAILED", "SKIP"])
        self.assertEqual(len(report["sections"][1]["rows"]), 1)
        self.assertIs(signal.getsignal(signal.SIGTERM), before)

    def test_exit_codes(self) -> None:
        for argv, expected in ((["--only", "good"], 0),  # its goal is not met
                               (["--only", "lacking"], 3), (["--only", "good", "--only", "lacking"], 3),
                               (["--only", "broken", "--only", "lacking"], 1)):
            self.assertEqual(self.run_main(*argv)[0], expected, argv)
        script.SECTIONS.pop("broken")
        self.assertEqual(self.run_main()[0], 0)  # what is missing was not asked for by name
        with mock.patch.object(script, "measure", side_effect=KeyboardInterrupt):
            self.assertEqual(self.run_main()[0], 130)
        with mock.patch.object(script, "measure", side_effect=lambda *_: os.kill(os.getpid(), signal.SIGTERM)):
            self.assertEqual(self.run_main()[0], 143)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_the_schema(self) -> None:
        report = json.loads(self.run_main("--json", "--only", "good", "--runs", "3", "--quick")[1])
        self.assertEqual((report["format"], report["schema"], report["quick"]), ("torchbasics benchmark", 1, True))
        self.assertEqual(set(report["machine"]), {
            "cpu", "device", "device_name", "cores", "threads", "load", "system", "versions", "native_bf16",
            "precision", "data", "started"})
        self.assertEqual(report["machine"]["versions"]["torch"], torch.__version__)
        self.assertEqual((report["machine"]["threads"], report["arguments"]["runs"]), (torch.get_num_threads(), 3))
        measured, absent = report["sections"][0]["rows"]
        self.assertEqual(absent, {"section": "good", "what": "a step", "peer": "Fabric",
                                  "skipped": "not installed: pip install lightning"})
        self.assertEqual(measured, {
            "section": "good", "what": "a step", "peer": "a loop", "unit": "s", "kind": "as fast", "note": "",
            "ours": {"median": 0.02, "min": 0.02, "max": 0.02}, "peers": {"median": 0.02, "min": 0.01, "max": 0.03},
            "ratio": {"median": 1.0, "min": 0.5, "max": 1.5}, "ratio_unit": "×", "runs": 2,
            "goal": {"text": "≥ 2.5×", "number": 2.5, "met": False}})

    def test_the_table_and_what_is_said_of_it(self) -> None:
        notices = [
            script.QUICK, "NOTICE: the goals are those of two cores with native bf16, and here it is emulated",
            "NOTICE: something else was running when this began: take the figures from a quiet machine"]
        for native, load, shown in ((True, 0.0, notices[:1]), (False, 50.0, notices)):
            with mock.patch("os.getloadavg", return_value=(load, 0.0, 0.0)), \
                    mock.patch.object(script, "bf16_is_native", return_value=native):
                code, out, _ = self.run_main("--only", "good", "--quick")
            self.assertEqual(code, 0)
            lines = out.splitlines()
            self.assertIn(f"load {load:.2f}", lines[0])
            self.assertEqual(lines[1:2 + len(shown)], [*shown, ""])
        self.assertEqual(lines[6:], [
            "  a step: 20 ms", "      against a loop: 20 ms (10 ms to 30 ms)",
            "      1× (0.5× to 1.5×) as fast; goal ≥ 2.5×: not met", "  a step", "      against Fabric",
            "      SKIP: not installed: pip install lightning"])

    def test_a_saved_run_is_shown_again_as_readmes_table(self) -> None:
        out = self.run_main("--json", "--only", "good", "--only", "lacking")[1]
        saved = self.folder / "saved.json"
        saved.write_text(out, encoding="utf-8")
        code, table, _ = self.run_main("--from", str(saved), "--markdown")
        self.assertEqual(code, 0)
        self.assertEqual(table.splitlines()[2:], [
            "| Section | What | Ours | Peer | Ratio | Goal | Runs |",
            "|---|---|---|---|---|---|---|",
            "| `good` | a step | 20 ms | a loop: 20 ms (10 ms to 30 ms) | 1× (0.5× to 1.5×) as fast | "
            "≥ 2.5×: not met | 2 |",
            "| `good` | a step |  | Fabric | SKIP: not installed: pip install lightning |  |  |",
            "| `lacking` |  |  |  | SKIP: pip install torchvision |  |  |"])
        self.assertIn(f"torch {torch.__version__}", table.splitlines()[0])
        shown = self.run_main("--from", str(saved))[1]
        self.assertIn("goal ≥ 2.5×: not met", shown)

    def test_bad_input(self) -> None:
        wrong = self.folder / "wrong.json"
        wrong.write_text('{"format": "torchbasics benchmark", "schema": 1}', encoding="utf-8")
        for argv, text in (
            (["--only", "goood"], "no section 'goood', did you mean good? there are good, broken, lacking"),
            (["--runs", "0"], "expected a whole number from 1"), (["--json", "--markdown"], "leave out --markdown"),
            (["--from", str(wrong)], "not what --json of this version prints"), (["--from", "absent"], "No such file"),
            (["--device", "nope"], "unknown device"),
        ):
            code, out, errors = self.run_main(*argv)
            self.assertEqual((code, out), (2, ""), errors)
            self.assertTrue(errors.startswith("error: ") and text in errors and errors.count("\n") == 1, errors)


class Whole(WithSetting):
    def test_the_order_is_that_of_the_claims(self) -> None:
        self.assertEqual(list(script.SECTIONS), [
            "import", "loader", "loop", "step", "run", "speedrun", "save", "monitor", "ddp", "inference", "gpu"])
        with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit):
            script.parse_args(["--only", "spedrun"])
        self.assertIn("did you mean speedrun?", said.getvalue())

    def test_sections_that_need_no_other_process_run(self) -> None:
        self.setting.runs = 1
        self.patch(alone=lambda _, name, **how: list(script.CONTENDERS[name](**how)))  # in this one instead
        found = {name: script.measure(name, self.setting) for name in ("loader", "step", "save", "gpu")}
        self.assertEqual({name: each["result"].partition(":")[0] for name, each in found.items()},
                         {"loader": "ok", "step": "ok", "save": "ok", "gpu": "SKIP"}, found)
        for row in itertools.chain.from_iterable(each["rows"] for each in found.values()):
            self.assertTrue(0 < row["ours"]["min"] <= row["ours"]["median"] <= row["ours"]["max"], row)
            self.assertTrue(0 < row["ratio"]["median"] < float("inf"), row)
        files = {path.name for path in self.folder.iterdir()}
        self.assertLessEqual({"idx", "ours.pt", "ours.pt.json", "plain.pt"}, files)

    def test_median_of_an_even_number(self) -> None:
        self.assertEqual(script.spread([4.0, 1.0, 2.0, 9.0])["median"], statistics.median([1.0, 2.0, 4.0, 9.0]))


if __name__ == "__main__":
    unittest.main()
