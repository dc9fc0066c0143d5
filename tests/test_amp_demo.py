"""scripts/amp_demo.py: what it shows is right, its float64 training is torch's own, and wrong values are not shown."""

from __future__ import annotations

import contextlib
import functools
import json
import struct
import unittest
from typing import Any
from unittest import mock

import torch
from torch import nn

import torchbasics as tb
from tests.common import load_script, run_main

script = load_script("amp_demo")


def setUpModule() -> None:
    unittest.addModuleCleanup(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)


def run(*argv: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the sections by name."""
    code, out, _ = run_main(script.main, "--device", "cpu", "--json", *argv)
    return code, {found["name"]: found for found in json.loads(out)["sections"]}


class AllSections(unittest.TestCase):
    code: int
    sections: dict[str, Any]
    random_state_kept: bool

    @classmethod
    def setUpClass(cls) -> None:
        state = torch.get_rng_state()
        cls.code, cls.sections = run()
        cls.random_state_kept = torch.equal(state, torch.get_rng_state())

    def values(self, section: str) -> dict[str, Any]:
        return {value["label"]: value["value"] for value in self.sections[section]["values"]}

    def test_every_section_passes_and_covers_p1(self) -> None:
        self.assertEqual([found["error"] for found in self.sections.values()], [None] * len(self.sections))
        self.assertEqual({*map(tuple, (found["covers"] for found in self.sections.values()))}, {("P1",)})
        self.assertTrue(all(found["values"] for found in self.sections.values()))
        self.assertEqual((self.code, self.random_state_kept), (0, True))

    def test_range_and_spacing_are_those_of_the_bit_patterns(self) -> None:
        def value(code: str, bits: int) -> float:
            return struct.unpack(code, struct.pack({"<e": "<H", "<f": "<I"}[code], bits))[0]

        # one beyond 1.0, the last finite, the first normal, the first of all; a bf16 is the upper half of an fp32
        patterns = {
            "fp16": [value("<e", bits) for bits in (0x3C01, 0x7BFF, 0x0400, 0x0001)],
            "bf16": [value("<f", bits << 16) for bits in (0x3F81, 0x7F7F, 0x0080, 0x0001)],
            "fp32": [value("<f", bits) for bits in (0x3F800001, 0x7F7FFFFF, 0x00800000, 0x00000001)],
        }
        shown = self.values("types.range")
        for name, (above_one, *rest) in patterns.items():
            found = [shown[f"{name}: {what}"] for what in ("eps", "largest", "smallest normal", "smallest")]
            self.assertEqual(found, [above_one - 1, *rest], name)

    def test_adding_4096_times_in_fp16_is_what_struct_rounds_to(self) -> None:
        total = 0.0
        for _ in range(4096):
            total = struct.unpack("<e", struct.pack("<e", total + 1 / 4096))[0]
        self.assertEqual(self.values("types.spacing")["fp16: 1/4096, added 4096 times"], total)
        self.assertEqual(total, 0.5)

    def test_the_scale_follows_the_rule_of_the_scaler(self) -> None:
        shown = self.values("scaler.trace")
        self.assertEqual(shown["did the weights move?"].count(False), 1)
        scale, good, scales = 1024.0, 0, []
        for moved in shown["did the weights move?"]:
            good = good + 1 if moved else 0
            scale = scale if moved else scale / 2
            if good == 3:
                scale, good = scale * 2, 0
            scales.append(scale)
        self.assertEqual(shown["scale after each batch"], scales)


class Float64(unittest.TestCase):
    def test_the_training_by_formula_is_that_of_torchs_layers_and_adamw(self) -> None:
        batches = script.digits()
        tb.set_seed(0)
        model = tb.SimpleNet().double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        expected = []
        for images, labels in batches:
            loss = nn.functional.cross_entropy(model(images.double()), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
        torch.testing.assert_close(script.losses_in_float64(batches), expected, rtol=1e-9, atol=0)
        self.assertLess(expected[-1], 0.9 * expected[0])


class WrongValues(unittest.TestCase):
    """A lesson that is not true here ends with exit code 1, and the wrong value is not shown."""

    def refused(self, section: str, label: str) -> None:
        code, sections = run("--section", section)
        self.assertEqual(code, 1)
        self.assertTrue(sections[section]["error"].startswith(label), sections[section]["error"])
        self.assertNotIn(label, [value["label"] for value in sections[section]["values"]])

    def test_a_format_with_other_bits(self) -> None:
        wrong = script.FORMATS | {"bf16": script.Format(torch.bfloat16, 8, 8)}
        with mock.patch.object(script, "FORMATS", wrong):
            self.refused("types.range", "bf16: bits of sign, exponent, fraction")
            self.refused("types.spacing", "bf16: 1 + eps")

    def test_autocast_that_casts_nothing(self) -> None:
        with mock.patch.object(script, "autocast", lambda *_: contextlib.nullcontext()):
            self.refused("autocast.dtypes", "bf16: linear")
            self.refused("training.memory", "bf16: bytes kept for backward")
            self.refused("scaler.underflow", "fp16")
        with mock.patch("torchbasics.trainer.autocast", lambda *_: contextlib.nullcontext()):
            self.refused("training.losses", "bf16: losses other than those in fp32")

    def test_a_scaler_that_quarters(self) -> None:
        quartering = functools.partial(torch.amp.GradScaler, backoff_factor=0.25)
        with mock.patch.object(torch.amp, "GradScaler", quartering):
            self.refused("scaler.trace", "scale after each batch")

    def test_a_schedule_that_moves_at_a_skipped_step(self) -> None:
        update = tb.Trainer.update

        def careless(trainer: tb.Trainer) -> bool:
            done = update(trainer)
            if not done:
                trainer.scheduler.step()
            return done

        with mock.patch.object(tb.Trainer, "update", careless):
            self.refused("scaler.trace", "learning rate")

    def test_weights_in_bf16_and_another_training(self) -> None:
        make = script.make_trainer

        def low(device: torch.device, precision: str) -> tb.Trainer:
            trainer = make(device, precision)
            if precision == "bf16":
                trainer.model.bfloat16()
            return trainer

        def faster(device: torch.device, precision: str) -> tb.Trainer:
            trainer = make(device, precision)
            trainer.optimizer.param_groups[0]["lr"] *= 1.2
            return trainer

        with mock.patch.object(script, "make_trainer", low):
            self.refused("training.losses", "bf16: dtypes of weights and optimizer")
        with mock.patch.object(script, "make_trainer", faster):
            self.refused("training.losses", "fp32: losses")


if __name__ == "__main__":
    unittest.main()
