"""scripts/amp_demo.py: its losses, its scaler and its bytes against plain loops and hand calculation."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import struct
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchbasics as tb
from tests.scripts import load_script
from torchbasics.demo import Mismatch

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--model", "simplenet", "--batch-size", "8", "--steps", "3"]


script = load_script("amp_demo")


def setUpModule() -> None:
    unittest.addModuleCleanup(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)


def run(*argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `main`, in this process and leaving its random state alone."""
    out, err = io.StringIO(), io.StringIO()
    with torch.random.fork_rng([]), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = script.main(list(argv))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@functools.cache
def report(*argv: str) -> Any:
    """What `--json` prints; strict: JSON knows no Infinity."""
    code, out, err = run(*argv, "--json")
    if (code, err) != (0, ""):
        raise AssertionError(f"exit code {code}: {err}")
    return json.loads(out, parse_constant=lambda name: unittest.TestCase().fail(f"{name} is no JSON"))


def batches(count: int, size: int, seed: int = 42) -> list[tuple[Tensor, Tensor]]:
    """The batches that the script must train on, cut and normalised by hand: the first 1000 digits are held out."""
    images, labels = tb.draw_digits(1000 + count * size)
    images, labels = images[1000:], labels[1000:]
    order = tb.BatchOrder(len(images), size, shuffle=True, seed=seed).order()
    parts = [order[i * size : (i + 1) * size] for i in range(count)]
    return [((images[part] / 255 - 0.1307) / 0.3081, labels[part]) for part in parts]


def plain_losses(model_name: str, count: int, size: int, dtype: torch.dtype | None) -> list[float]:
    """The same training in plain PyTorch."""
    tb.set_seed(42)
    model = tb.make_model(model_name, dropout=0.0).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses = []
    for inputs, targets in batches(count, size):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            logits = model(inputs.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    return losses


def scales_by_hand(good: list[bool], scale: float, interval: int) -> list[float]:
    """The rule of torch.amp.GradScaler: halved at an overflow, doubled after `interval` good steps in a row."""
    scales, run_of_good = [], 0
    for fine in good:
        run_of_good = run_of_good + 1 if fine else 0
        scale = scale if fine else scale / 2
        if run_of_good == interval:
            scale, run_of_good = scale * 2, 0
        scales.append(scale)
    return scales


class Types(unittest.TestCase):
    def test_the_table_equals_the_bit_patterns(self) -> None:
        def value(code: str, bits: int) -> float:
            return struct.unpack(code, struct.pack({"<e": "<H", "<f": "<I"}[code], bits))[0]

        # one beyond 1.0, the last finite, the first normal, the first of all; a bf16 is the upper half of an fp32
        patterns = {
            "fp16": [value("<e", bits) for bits in (0x3C01, 0x7BFF, 0x0400, 0x0001)],
            "bf16": [value("<f", bits << 16) for bits in (0x3F81, 0x7F7F, 0x0080, 0x0001)],
            "fp32": [value("<f", bits) for bits in (0x3F800001, 0x7F7FFFFF, 0x00800000, 0x00000001)],
        }
        table = report(*QUICK)["types"]["table"]
        self.assertEqual(table.keys(), patterns.keys())
        for name, (above_one, *rest) in patterns.items():
            row = table[name]
            found = [row[key] for key in ("eps", "largest", "smallest_normal", "smallest")]
            self.assertEqual(found, [above_one - 1, *rest], name)

    def test_what_is_shown_of_rounding_and_range(self) -> None:
        claims = report(*QUICK)["types"]["claims"]
        half = 0.0
        for _ in range(4096):
            half = struct.unpack("<e", struct.pack("<e", half + 1 / 4096))[0]
        found = {key: value for key, value in claims.items() if "added 4096" in key}
        self.assertEqual(list(found.values()), [1.0, 0.0625, half])
        self.assertEqual(half, 0.5)
        for name in ("fp32", "bf16", "fp16"):
            self.assertEqual(claims[f"{name}: 1 + eps / 2: half of the spacing is rounded away"], 1.0)
            self.assertEqual(claims[f"{name}: largest * 2: beyond the range"], "inf")
        self.assertEqual(claims["65504, the largest, in fp16"], 65504.0)
        self.assertEqual(claims["65520 (overflow) in fp16"], "inf")
        self.assertEqual(claims["2**-24, the smallest, in fp16"], 2.0**-24)
        self.assertEqual(claims["2**-25 (underflow) in fp16"], 0.0)


class Scaling(unittest.TestCase):
    def test_the_trace_follows_the_rule(self) -> None:
        trace = report(*QUICK)["scaling"]["trace"]
        good = [row["moved"] for row in trace]
        self.assertEqual(good, [True, True, True, False, True, True, True, True])
        self.assertEqual([row["scale"] for row in trace], scales_by_hand(good, 1024.0, 3))

    def test_a_skipped_step_leaves_weights_and_schedule(self) -> None:
        third, fourth, fifth = report(*QUICK)["scaling"]["trace"][2:5]
        self.assertEqual((fourth["steps"], fourth["rate"], fourth["moved"]), (third["steps"], third["rate"], False))
        self.assertEqual((fifth["steps"], fifth["rate"]), (third["steps"] + 1, third["rate"] / 2))

    def test_the_trace_equals_a_plain_loop_without_the_bad_batch(self) -> None:
        """Trained in fp16 by hand on the seven good batches only: the losses are those of the trace."""
        tb.set_seed(42)
        model = nn.Linear(4, 3)
        losses: list[float] = []
        for number in range(1, 9):
            if number == 4:
                continue
            inputs = torch.randn(8, 4)
            with torch.autocast("cpu", torch.float16):
                outputs = model(inputs)
            loss = F.cross_entropy(outputs.float(), torch.arange(8) % 3)
            model.zero_grad()
            (loss * 1024).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * 0.5 ** len(losses) * p.grad / 1024  # type: ignore[operator,misc]
            losses.append(float(loss.detach()))
        trace = report(*QUICK)["scaling"]["trace"]
        torch.testing.assert_close([row["loss"] for row in trace if row["batch"] != 4], losses, rtol=1e-4, atol=1e-4)

    def test_a_tiny_gradient_needs_the_scaler_in_fp16_only(self) -> None:
        self.assertEqual(list(report(*QUICK)["scaling"]["claims"].values()), [0.0, 2.0**-26, 2.0**-26])


class SideBySide(unittest.TestCase):
    def test_losses_equal_those_of_a_plain_loop(self) -> None:
        runs = report("--device", "cpu", "--batch-size", "8", "--steps", "4")["runs"]  # the convolutional network
        for name, dtype in (("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
            with self.subTest(name):
                plain = plain_losses("cnn", 4, 8, dtype)
                torch.testing.assert_close(runs[name]["losses"], plain, rtol=1e-3 if dtype else 1e-5, atol=1e-5)
        self.assertNotEqual(runs["fp32"]["losses"], runs["bf16"]["losses"])

    def test_low_precision_stays_near_fp32(self) -> None:
        """Within 1% in bf16 and fp16, over 12 steps of a network without BatchNorm, in which the loss has fallen."""
        runs = report("--device", "cpu", "--model", "simplenet", "--steps", "12")["runs"]
        fp32 = runs["fp32"]["losses"]
        self.assertLess(fp32[-1], 0.9 * fp32[0])
        for name in ("bf16", "fp16"):
            losses = runs[name]["losses"]
            torch.testing.assert_close(losses, fp32, rtol=0.01, atol=0)
            self.assertEqual(runs[name]["apart"], max(abs(a - b) for a, b in zip(losses, fp32, strict=True)))

    def test_steps_are_interleaved_on_the_same_batches(self) -> None:
        seen: list[tuple[str, Tensor]] = []
        train = tb.Trainer.train_one_epoch

        def noted(trainer: tb.Trainer, loader: Any) -> Any:
            if isinstance(trainer.model, tb.SimpleNet):
                seen.append((trainer.precision, loader[0][0]))
            return train(trainer, loader)

        with mock.patch.object(tb.Trainer, "train_one_epoch", noted):
            self.assertEqual(run(*QUICK)[0], 0)
        self.assertEqual([precision for precision, _ in seen], ["fp32", "bf16", "fp16"] * 3)
        expected = [inputs for inputs, _ in batches(3, 8) for _ in range(3)]
        torch.testing.assert_close([inputs for _, inputs in seen], expected)

    def test_kept_bytes_by_hand(self) -> None:
        """simplenet, 784 → 128 → 64 → 10: a layer's backward needs its input and, but for the first, its weight."""
        runs = report(*QUICK)["runs"]
        in_fp32 = 4 * 8 * (128 + 64 + 10)  # two ReLUs' outputs and the log-probabilities
        casts = 2 * (128 * 64 + 64 * 10 + 8 * 784)  # of weights and of the batch
        in_bf16 = 2 * 8 * (128 + 64) + 4 * 8 * 10 + casts
        for name, expected in (("fp32", in_fp32), ("bf16", in_bf16), ("fp16", in_bf16)):
            self.assertLessEqual(abs(runs[name]["kept_bytes"] - expected), 16, name)  # the loss keeps a scalar, too

    def test_accuracy_is_that_of_the_held_out_images(self) -> None:
        args = script.parse_args([*QUICK, "--precision", "fp32"])
        device = script.settle(args)
        data = script.load(args, device)
        trainer = script.build_trainer(args, device, "fp32")
        with mock.patch.object(script, "build_trainer", return_value=trainer):
            runs, _ = script.side_by_side(data, args, device)
        images, labels = tb.draw_digits(1000)
        right = trainer.model.eval()((images / 255 - 0.1307) / 0.3081).argmax(1) == labels
        self.assertAlmostEqual(runs["fp32"]["accuracy"], float(right.float().mean()), delta=0.0021)


class Why(unittest.TestCase):
    def reason(self, precision: str, step: float, product: float, native: bool = False, **found: bool) -> str:
        with (
            mock.patch.object(script, "bf16_is_native", return_value=native),
            mock.patch.object(torch.cpu, "get_capabilities", return_value=found, create=True),
        ):
            return script.why(precision, CPU, step, product)

    def test_reasons(self) -> None:
        self.assertIn("a gain", self.reason("bf16", 0.5, 0.3, native=True))
        self.assertNotIn("no gain", self.reason("bf16", 0.5, 0.3, native=True))
        self.assertIn("no gain: this CPU emulates bf16", self.reason("bf16", 1.4, 1.3))
        self.assertIn("no gain: torch's products are no faster", self.reason("bf16", 1.4, 1.3, native=True))
        self.assertIn("no gain: casts and small operations", self.reason("bf16", 1.0, 0.3, native=True))
        self.assertIn("no gain: torch reports no fp16 units on this CPU", self.reason("fp16", 9.0, 40.0))
        self.assertIn("no gain: torch's products are no faster", self.reason("fp16", 9.0, 40.0, avx512_fp16=True))
        self.assertTrue(self.reason("fp16", 9.0, 40.0).startswith("9.00 of fp32's time for a step, 40.00 for"))


class OnCuda(unittest.TestCase):
    def test_tf32_is_switched_and_put_back(self) -> None:
        backends: Any = torch.backends
        places = (backends.cuda.matmul, backends.cudnn.conv)
        before = [place.fp32_precision for place in places]
        for name, expected in (("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
            with self.assertRaises(KeyError), script.float32_products(torch.device("cuda"), name):
                self.assertEqual([place.fp32_precision for place in places], [expected] * 2)
                raise KeyError
            self.assertEqual([place.fp32_precision for place in places], before)

    def test_the_peak_is_beyond_what_was_there(self) -> None:
        calls = mock.Mock()
        calls.memory_allocated.return_value, calls.max_memory_allocated.return_value = 1000, 1300
        synchronize = mock.patch.object(script, "synchronize", calls.synchronize)
        with mock.patch.object(script.torch, "cuda", calls), synchronize:
            result, seconds, peak = script.timed(lambda: "done", torch.device("cuda"))
        self.assertEqual((result, peak), ("done", 300))
        self.assertGreaterEqual(seconds, 0)
        order = [call[0] for call in calls.mock_calls]
        self.assertEqual(order[:2], ["synchronize", "reset_peak_memory_stats"])
        self.assertEqual(order[-2:], ["synchronize", "max_memory_allocated"])

    @unittest.skipUnless(torch.cuda.is_available(), "needs CUDA")
    def test_on_cuda(self) -> None:
        found = report("--device", "cuda", "--steps", "3")
        self.assertIn("softmax of a linear layer's output", found["autocast"]["bf16"])
        self.assertTrue(all(run["peak_bytes"] > 0 for run in found["runs"].values()))


class WrongClaims(unittest.TestCase):
    """A lesson that is not true here is not printed: exit code 1, one line."""

    def refused(self, *expected: str, shown: str | None = None, argv: tuple[str, ...] = ()) -> None:
        code, out, err = run(*QUICK, *argv)
        self.assertEqual((code, err.count("\n")), (1, 1), err)
        for text in ("error: ", *expected):
            self.assertIn(text, err)
        if shown is not None:
            self.assertNotIn(shown, out)

    def test_claim(self) -> None:
        self.assertEqual(script.claim("x", 2.0, 2.0), {"x": 2.0})
        self.assertEqual(script.claim("x", float("inf"), float("inf")), {"x": "inf"})
        self.assertEqual(script.claim("x", 1.019, 1.0, 0.02), {"x": 1.019})
        wrong = ((1.0, 1.0 + 1e-12, 0.0), (1.021, 1.0, 0.02), (float("nan"), 1.0, 0.02), (0, 1, 0))
        for value, expected, within in wrong:
            with self.assertRaisesRegex(Mismatch, f"^x: expected {expected}, got {value}$"):
                script.claim("x", value, expected, within)

    def test_a_wrong_format(self) -> None:
        wrong = script.FORMATS | {"bf16": (torch.bfloat16, 8, 8)}
        with mock.patch.object(script, "FORMATS", wrong):
            self.refused("bf16: torch.finfo", "expected", "got", shown="exponent")
            self.assertEqual(run(*QUICK, "--json")[:2], (1, ""))
            with self.assertRaises(Mismatch):
                run(*QUICK, "--debug")

    def test_a_sum_that_does_not_stand_still(self) -> None:
        wrong = script.FORMATS | {"fp16": (torch.float32, 8, 23), "bf16": script.FORMATS["bf16"]}
        with mock.patch.object(script, "FORMATS", wrong):
            self.refused("65520 (overflow) in fp16: expected inf, got 65520.0", shown="exponent")

    def test_autocast_that_casts_nothing(self) -> None:
        with mock.patch.object(script, "autocast", lambda *_: contextlib.nullcontext()):
            self.refused("linear: expected torch.bfloat16, got torch.float32", shown="conv2d")

    def test_a_schedule_that_moves_at_a_skipped_step(self) -> None:
        step = tb.Trainer._optimizer_step

        def careless(trainer: tb.Trainer) -> bool:
            done = step(trainer)
            if not done:
                trainer.scheduler.step()  # type: ignore[union-attr,call-arg]
            return done

        with mock.patch.object(tb.Trainer, "_optimizer_step", careless):
            self.refused("the scaler's trace: rate", shown="overflow: skipped")

    def test_a_scaler_that_quarters(self) -> None:
        quartering = functools.partial(torch.amp.GradScaler, backoff_factor=0.25)
        with mock.patch.object(torch.amp, "GradScaler", quartering):
            self.refused("the scaler's trace: scale", shown="overflow: skipped")

    def test_a_scaler_that_does_not_skip(self) -> None:
        with mock.patch.object(torch.amp.GradScaler, "step", lambda scaler, optimizer: optimizer.step()):
            self.refused(shown="overflow: skipped")

    def test_weights_in_bf16_and_a_first_loss_that_is_far_off(self) -> None:
        build = script.build_trainer

        def changed(change: Any, args: Any, device: torch.device, precision: str) -> tb.Trainer:
            trainer = build(args, device, precision)
            if precision == "bf16":
                change(trainer)
            return trainer

        def grow(trainer: tb.Trainer) -> None:
            with torch.no_grad():
                trainer.model.get_parameter("output.bias")[0] += 1

        for change, expected in (
            (lambda trainer: trainer.model.bfloat16(), "bf16: types of the weights"),
            (grow, "bf16: the first loss"),
        ):
            with mock.patch.object(script, "build_trainer", functools.partial(changed, change)):
                self.refused(expected, shown="Losses")


class CommandLine(unittest.TestCase):
    def test_text(self) -> None:
        code, out, err = run(*QUICK)
        self.assertEqual((code, err), (0, ""))
        self.assertIn("simplenet on digits, 3 steps of 8 images, seed 42", out)
        for title in ("Range and spacing", "What autocast", "Why fp16 needs a", "Side by side", "Losses of the same"):
            self.assertEqual(out.count(f"\n{title}"), 1)
        self.assertEqual(out.count("overflow: skipped"), 1)
        self.assertLessEqual(max(map(len, out.splitlines()[1:])), 120)  # the first names the device

    def test_json_holds_the_settings_and_every_step(self) -> None:
        found = report(*QUICK)
        self.assertEqual(list(found), ["settings", "types", "autocast", "scaling", "runs"])
        self.assertEqual(found["settings"]["precision"], ["fp32", "bf16", "fp16"])
        for run_of_one in found["runs"].values():
            self.assertEqual(len(run_of_one["losses"]), 3)
            self.assertGreater(min(run_of_one["step_seconds"], run_of_one["product_seconds"]), 0)
            self.assertEqual(run_of_one["peak_bytes"], 0)

    def test_a_subset_of_the_precisions(self) -> None:
        found = report(*QUICK, "--precision", "bf16")
        self.assertEqual((list(found["runs"]), list(found["autocast"])), (["fp32", "bf16"], ["bf16"]))
        self.assertNotIn("scaling", found)
        self.assertEqual(list(report(*QUICK, "--steps", "1", "--precision", "fp32")), ["settings", "types", "runs"])

    def test_the_seed_decides(self) -> None:
        losses = [report(*QUICK, "--seed", seed)["runs"]["bf16"]["losses"] for seed in ("1", "2")]
        self.assertNotEqual(*losses)
        again = json.loads(run(*QUICK, "--seed", "1", "--json")[1])["runs"]["bf16"]["losses"]
        self.assertEqual(again, losses[0])

    def test_bad_input_gets_one_line(self) -> None:
        refusals: list[tuple[list[str], str]] = [
            (["--precision", "tf32"], "tf32: cpu has none"),
            (["--precision", "fp64"], "invalid choice"),
            (["--batch-size", "7"], "from 8"),
            (["--batch-size", "60001", "--steps", "1"], "60000 samples"),
            (["--steps", "0"], "from 1"),
            (["--device", "abacus"], "abacus"),
        ]
        for argv, text in refusals:
            with self.subTest(argv), mock.patch.object(tb, "draw_digits", nothing_drawn):
                code, out, err = run("--device", "cpu", *argv)
                self.assertEqual((code, out, err.count("\n")), (2, "", 1), err)
                self.assertRegex(err, f"^error: .*{text}")

    def test_data_that_cannot_be_had(self) -> None:
        with mock.patch("torchbasics.data.download_mnist", side_effect=ConnectionError("mnist: no network")):
            code, out, err = run("--device", "cpu", "--data-dir", str(ROOT / "no such folder"))
        self.assertEqual((code, out), (2, ""))
        self.assertIn("--dataset digits", err)


def nothing_drawn(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.zeros(count, 1, 28, 28, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)


if __name__ == "__main__":
    unittest.main()
