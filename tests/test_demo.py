"""The runner of the demos: right lessons pass, wrong ones fail alone."""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import signal
import unittest

import torch

from tests.common import run_main
from torchbasics.demo import Mismatch, Sections, show, show_error, skip


def lessons() -> Sections:
    """Return sections that are right, wrong, and raise."""
    section = Sections("Some lessons.")

    @section("add.right", "X1")
    def right() -> None:
        """One and one."""
        show("1 + 1", torch.tensor(1) + 1, 2)

    @section("add.wrong", "X1", "X2")
    def wrong() -> None:
        """A wrong expectation."""
        show("1 + 2", torch.tensor(1) + 2, 4)
        show("never reached", 1, 1)

    @section("divide.zero", "X3")
    def zero() -> None:
        """An error that nobody expected."""
        raise ZeroDivisionError("by\nzero")

    @section("divide.right", "X3")
    def after(device: torch.device) -> None:
        """Comes after the failures."""
        show("3 / 2", torch.tensor(3, device=device) / 2, 1.5)

    return section


class Show(unittest.TestCase):
    def test_equal_values_are_printed(self) -> None:
        for value, expected, tolerance in (
            (torch.tensor([[1.0, 2.0]], requires_grad=True), [[1, 2]], {}),
            ([torch.tensor([1, 2]), torch.tensor(3)], [[1, 2], 3], {}),
            (1 / 3, 0.3333333, {}),
            (torch.tensor(1.0).bfloat16(), 1.01, {}),  # the tolerance is that of the dtype
            (torch.tensor(1000.0), 1010, {"rtol": 0.02}),
            (torch.tensor(math.nan), math.nan, {}),
            (torch.zeros(2, 3).shape, (2, 3), {}),
        ):
            with self.subTest(value=value), contextlib.redirect_stdout(io.StringIO()) as out:
                show("label", value, expected, **tolerance)
                self.assertIn("label", out.getvalue())

    def test_different_values_are_errors_and_are_not_printed(self) -> None:
        for value, expected in (
            (torch.tensor([1.0, 2.0]), [1, 2.1]),
            (torch.ones(3), 1),  # nothing is broadcast
            (torch.tensor(1.0, dtype=torch.float64), 1 + 5e-6),
            (torch.tensor(1_000_000), 1_000_001),
            (torch.tensor(math.nan), 0),
            ((2, 3), (3, 2)),
            (torch.tensor(0), None),
        ):
            with self.subTest(value=value), contextlib.redirect_stdout(io.StringIO()) as out:
                with self.assertRaisesRegex(Mismatch, "label: expected .* got "):
                    show("label", value, expected)
                self.assertEqual(out.getvalue(), "")

    def test_an_error_must_be_of_the_kind_and_say_the_words(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            show_error("1 / 0", lambda: 1 / 0, ArithmeticError, "by zero")
        self.assertIn("ZeroDivisionError: division by zero", out.getvalue())
        for call, error in ((lambda: 1 / 0, OverflowError), (lambda: 1 / 0, TypeError), (lambda: 1, ArithmeticError)):
            with self.assertRaises(Mismatch):
                show_error("label", call, error, "division")


class Run(unittest.TestCase):
    def test_a_wrong_lesson_fails_alone_and_the_exit_code_is_1(self) -> None:
        code, out, err = run_main(lessons().run, "--device", "cpu")
        self.assertEqual((code, err), (1, ""))
        self.assertIn("1 + 2: expected 4, got 3", out)
        self.assertIn("ZeroDivisionError: by zero", out)
        self.assertNotIn("never reached", out)
        self.assertRegex(out, r"3 / 2 +tensor\(1\.5000\)")
        self.assertRegex(out, r"2 of 4 sections passed.*\nfailed: add.wrong, divide.zero")

    def test_sections_can_be_chosen(self) -> None:
        code, out, _ = run_main(lessons().run, "--device", "cpu", "--section", "divide.right", "--section", "add.right")
        self.assertEqual(code, 0)
        self.assertIn("2 of 2 sections passed", out)
        self.assertNotIn("add.wrong", out)

    def test_a_section_that_shows_nothing_fails_unless_it_says_why_it_cannot_run(self) -> None:
        section = Sections()
        section("nothing.shown")(lambda: None)
        section("file.absent")(lambda: skip("no file data/x; get it"))
        code, out, _ = run_main(section.run, "--device", "cpu")
        self.assertEqual(code, 1)
        self.assertIn("0 of 2 sections passed, 1 skipped", out)
        code, out, _ = run_main(section.run, "--device", "cpu", "--section", "file.absent")
        self.assertEqual(code, 0)
        self.assertIn("skipped: no file data/x; get it", out)

    def test_list_gives_each_section_with_its_ids_and_summary(self) -> None:
        code, out, _ = run_main(lessons().run, "--list")
        self.assertEqual(code, 0)
        names = [line.split()[0] for line in out.splitlines()]
        self.assertEqual(names, ["add.right", "add.wrong", "divide.zero", "divide.right"])
        self.assertRegex(out.splitlines()[1], r"^add\.wrong +X1 X2 +A wrong expectation\.$")

    def test_bad_arguments_are_one_line_and_exit_code_2(self) -> None:
        for argv, words in (
            (["--section", "add.rigth"], "did you mean add.right"),
            (["--sec", "add.right"], "--sec"),  # options are not abbreviated
            (["--seed", "-1"], "--seed must be from 0"),
            (["--device", "cuda:99"], "'cuda:99' is not available here"),
        ):
            with self.subTest(argv):
                code, out, err = run_main(lessons().run, *argv)
                self.assertEqual((code, out, err.count("\n")), (2, "", 1))
                self.assertIn(words, err)

    def test_each_section_starts_from_the_seed_and_leaves_no_trace(self) -> None:
        section, draws = Sections(), []

        def spoil() -> None:
            draws.append((torch.rand(1).item(), random.random()))
            show("gradients and dtype", (torch.is_grad_enabled(), torch.get_default_dtype()), (True, torch.float32))
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(False)

        section("first.one")(spoil)
        section("second.one")(spoil)
        before = torch.get_rng_state(), random.getstate()
        self.assertEqual(run_main(section.run, "--seed", "5", "--device", "cpu")[0], 0)
        self.assertEqual(draws[0], draws[1])
        self.assertTrue(torch.equal(before[0], torch.get_rng_state()))
        self.assertEqual((random.getstate(), torch.is_grad_enabled()), (before[1], True))
        run_main(section.run, "--seed", "6", "--device", "cpu")
        self.assertTrue(draws[0][0] != draws[2][0] and draws[0][1] != draws[2][1])

    def test_ctrl_c_is_quiet_with_exit_code_130(self) -> None:
        section = Sections()
        section("stopped.here")(lambda: signal.raise_signal(signal.SIGINT))
        code, _, err = run_main(section.run, "--device", "cpu")
        self.assertEqual((code, err), (130, ""))

    @unittest.skipUnless(os.path.exists("/dev/full"), "no full disk here")
    def test_an_output_that_takes_nothing_ends_the_run_in_one_line_at_most(self) -> None:
        section = Sections()
        section("print.much")(lambda: show("x" * 100_000, 1, 1))
        reader, writer = os.pipe()
        os.close(reader)  # as `| head` does
        for target, expected, said in ((writer, 141, ""), ("/dev/full", 1, "error: standard output: No space left")):
            err = io.StringIO()
            with open(target, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                self.assertEqual(section.run([]), expected)
            self.assertEqual(err.getvalue()[: len(said) or None], said)


if __name__ == "__main__":
    unittest.main()
