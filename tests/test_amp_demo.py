"""scripts/amp_demo.py: every lesson passes, and a lesson turns red when what it teaches is broken."""

from __future__ import annotations

import contextlib
import functools
import struct
import unittest
from typing import Any
from unittest import mock

import torch

import torchbasics as tb
from tests.common import load_script, run_main

script = load_script("amp_demo")


def setUpModule() -> None:
    unittest.addModuleCleanup(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)


class AmpDemo(unittest.TestCase):
    def refused(self, section: str, line: str) -> None:
        """Expect that the section fails at `line`."""
        code, out, _ = run_main(script.main, "--device", "cpu", "--section", section)
        self.assertEqual(code, 1, out)
        self.assertRegex(out, rf"{line}[^✓✗]*✗ expected")

    def test_every_section_passes_and_covers_p1(self) -> None:
        code, out, _ = run_main(script.main, "--device", "cpu", "--quiet")
        self.assertEqual(code, 0, out)
        self.assertRegex(out, r"\b8 of 8 sections passed")
        _, listed, _ = run_main(script.main, "--list")
        self.assertEqual([line.split()[1] for line in listed.splitlines()], ["P1"] * 8)

    def test_adding_in_fp16_stands_still_where_struct_rounds_the_same_way(self) -> None:
        total = 0.0
        for _ in range(4096):
            total = struct.unpack("<e", struct.pack("<e", total + 1 / 4096))[0]
        _, out, _ = run_main(script.main, "--section", "types.spacing")
        self.assertRegex(out, rf"sums +→ \[1.0, {total}, 0.0625\]   ✓")

    def test_a_type_with_other_limits_is_refused(self) -> None:
        finfo = torch.finfo
        with mock.patch.object(torch, "finfo", lambda dtype: finfo(torch.float32)):
            self.refused("types.range", "found")

    def test_a_small_number_that_becomes_zero_is_refused(self) -> None:
        tensor = torch.tensor
        with mock.patch.object(torch, "tensor", lambda value, **to: tensor(value * (value != 2.0**-25), **to)):
            self.refused("types.spacing", r"stored\(v, torch.bfloat16\) for v in")

    def test_autocast_that_casts_nothing_is_refused(self) -> None:
        def nothing(*_: Any, **__: Any) -> Any:
            return contextlib.nullcontext()

        with mock.patch.object(torch, "autocast", nothing):
            self.refused("autocast.dtypes", "dtypes")
            self.refused("scaler.underflow", "gradient\\(torch.float16, scale=1.0\\)")
        with mock.patch.object(script, "autocast", nothing):
            self.refused("training.memory", 'kept_bytes\\("bf16"\\)')
            self.refused("training.measured", "len\\(set\\(losses.values\\(\\)\\)\\)")
        with mock.patch("torchbasics.trainer.autocast", nothing):
            self.refused("training.losses", "10 \\* off")

    def test_fp32_trained_in_bf16_is_refused(self) -> None:
        def low(*args: Any, precision: str, **options: Any) -> tb.Trainer:
            return trainer(*args, precision="bf16" if precision == "fp32" else precision, **options)

        trainer = tb.Trainer
        with mock.patch.object(tb, "Trainer", low):
            self.refused("training.losses", "10 \\* off")

    def test_a_scaler_that_quarters_is_refused(self) -> None:
        quartering = functools.partial(torch.amp.GradScaler, backoff_factor=0.25)
        with mock.patch.object(torch.amp, "GradScaler", quartering):
            self.refused("scaler.trace", "scales")

    def test_a_schedule_that_moves_at_a_skipped_step_is_refused(self) -> None:
        update = tb.Trainer.update

        def careless(trainer: tb.Trainer) -> bool:
            done = update(trainer)
            if not done:
                trainer.scheduler.step()
            return done

        with mock.patch.object(tb.Trainer, "update", careless):
            self.refused("scaler.trace", "rates")


if __name__ == "__main__":
    unittest.main()
