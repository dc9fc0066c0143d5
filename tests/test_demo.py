"""The runner of the demos: it prints a lesson's own code with the values, and a wrong value fails."""

from __future__ import annotations

import importlib.util
import io
import os
import signal
import tempfile
import unittest
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.common import run_main
from torchbasics.demo import Sections, show, show_error, skip

CPU = ("--device", "cpu")

PAGE = """\
Behind → is a value. A tick: as expected, by another calculation (= ...).

autograd.accumulate: Gradients add up until they are cleared.

A training loop must clear them.

    w = torch.tensor(2.0, requires_grad=True)
    (3 * w).backward()
    w.grad                       → tensor(3.)   ✓
    # backward adds to .grad
    w.grad.add_(1)               → tensor(4.)   ✓  # as this does
    torch.eye(2)                 → tensor([[1., 0.],
                                           [0., 1.]])   ✓
    w.view(3)
        → RuntimeError: shape '[3]' is invalid for input of size 1   ✓
    for power in range(1, 3):
        print("power", power)
        show(w**power, 2**power)
    power 1
    w**power                     → tensor(2.)   ✓ = 2**power
    power 2
    w**power                     → tensor(4.)   ✓ = 2**power
    with torch.no_grad():
        (w * 2).requires_grad    → False   ✓

1 of 1 sections passed, 7 values as expected

Try: something else.
"""


def accumulate() -> None:
    """Gradients add up until they are cleared.

    A training loop must clear them."""
    w = torch.tensor(2.0, requires_grad=True)
    (3 * w).backward()
    show(w.grad, 3.0)
    # backward adds to .grad
    show(w.grad.add_(1), 4.0)  # type: ignore[union-attr]  # as this does
    show(
        torch.eye(2),
        [[1, 0], [0, 1]],
    )
    show_error(lambda: w.view(3), RuntimeError, "invalid for input")
    for power in range(1, 3):
        print("power", power)
        show(w**power, 2**power)
    with torch.no_grad():
        show((w * 2).requires_grad, False)


def run(*lessons: Callable[..., None], argv: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Run the functions as sections named a.NAME, each covering X1; return (exit code, stdout, stderr)."""
    section = Sections("Lessons.")
    for lesson in lessons:
        section(f"a.{lesson.__name__}", "X1")(lesson)
    return run_main(section.run, *(CPU if on_device in lessons else ()), *argv)


def right() -> None:
    """One and one."""
    show(torch.tensor(1) + 1, 2)


def wrong() -> None:
    """A wrong expectation."""
    show(1 + 2, 4)
    show(2 + 2, 4)


def raises() -> None:
    """An error that nobody expected."""
    numbers: list[int] = []
    if not numbers:
        print(numbers[3])
    show(1, 1)


def skips() -> None:
    """Cannot run here."""
    skip("needs a file")


def on_device(device: torch.device) -> None:
    """Gets the device."""
    show(device.type, "cpu")


def empty() -> None:
    """Shows nothing."""
    print("hello")


class Page(unittest.TestCase):
    maxDiff = None

    def test_the_code_is_printed_as_it_ran_with_the_value_of_each_show(self) -> None:
        section = Sections("Lessons.\n\nTry: something else.\n\nMore.")
        section("autograd.accumulate", "A2")(accumulate)
        self.assertEqual(run_main(section.run), (0, PAGE, ""))

    def test_how_an_expected_value_was_computed_follows_or_stands_below(self) -> None:
        def origins() -> None:
            """Two."""
            numbers = [1.0, 2.0, 3.0]
            show(sum(numbers), 6.0)
            show(sum(numbers), len(numbers) * 2.0)
            show(sum(numbers) + 0 * sum(numbers), (numbers[0] + numbers[1] + numbers[2]) / 3 * len(numbers) + 0.0)

        code, out, _ = run(origins)
        self.assertEqual(code, 0)
        self.assertIn("sum(numbers)                 → 6.0   ✓\n", out)
        self.assertIn("sum(numbers)                 → 6.0   ✓ = len(numbers) * 2.0\n", out)
        self.assertRegex(out, r"→ 6\.0   ✓\n {30,}= \(numbers\[0\] \+ numbers\[1\]")
        self.assertLessEqual(max(map(len, out.splitlines())), 80)

    def test_a_demo_in_a_file_elsewhere_prints_its_own_code(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "my_demo.py")
            path.write_text(
                "from torchbasics.demo import Sections, show\nsection = Sections()\n\n"
                '@section("my.own")\ndef own():\n    """Mine."""\n    x = 40\n    show(x + 2, 42)\n'
            )
            spec = importlib.util.spec_from_file_location("my_demo", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            code, out, _ = run_main(module.section.run)
        self.assertEqual(code, 0)
        self.assertRegex(out, r"my.own: Mine\.\n\n    x = 40\n    x \+ 2 +→ 42   ✓\n")

    def test_a_terminal_gets_dimmed_code_and_bold_values_unless_NO_COLOR_is_set(self) -> None:
        for no_color in ("", "1"):
            out = io.StringIO()
            out.isatty = lambda: True  # type: ignore[method-assign]
            with mock.patch.dict(os.environ, NO_COLOR=no_color), redirect_stdout(out):
                section = Sections()
                section("a.wrong")(wrong)
                section.run([])
            dimmed, bold = "\033[2m    2 + 2", "\033[1m4\033[0m   \033[32m✓"
            for part in (dimmed, bold, "\033[31;1m✗ expected 4"):
                self.assertEqual(part in out.getvalue(), not no_color)
            self.assertEqual("\033" in out.getvalue(), not no_color)

    def test_a_terminal_without_the_marks_gets_escapes(self) -> None:
        terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        with redirect_stdout(terminal):
            section = Sections()
            section("a.right")(right)
            self.assertEqual(section.run([]), 0)
        terminal.seek(0)
        self.assertIn(r"tensor(2)   \u2713", terminal.read())


class Compare(unittest.TestCase):
    def agree(self, value: Any, expected: Any, **tolerance: float) -> bool:
        def compare() -> None:
            show(value, expected, **tolerance)

        code, out, _ = run(compare)
        self.assertEqual((code, "✓" in out, "✗" in out), (0, True, False) if code == 0 else (1, False, True))
        return code == 0

    def test_equal_values_pass(self) -> None:
        for value, expected in (
            (torch.tensor([[1.0, 2.0]], requires_grad=True), [[1, 2]]),
            ([torch.tensor([1, 2]), torch.tensor(3)], [[1, 2], 3]),
            (torch.tensor(1 / 3), 1 / 3),
            (torch.tensor(1.0).bfloat16(), 1.01),  # the tolerance is that of the dtype
            (torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64)),
            (torch.tensor([True, False]), [True, False]),
            (torch.tensor(float("nan")), float("nan")),
            (torch.zeros(2, 3).shape, (2, 3)),
            (0.1 + 0.2, 0.3),
            (3, torch.tensor(3)),
            ("text", "text"),
        ):
            with self.subTest(value=value):
                self.assertTrue(self.agree(value, expected))

    def test_different_values_fail(self) -> None:
        for value, expected in (
            (torch.tensor([1.0, 2.0]), [1, 2.1]),
            (torch.ones(3), 1),  # nothing is broadcast
            (torch.ones(3), [1, 1]),
            (torch.tensor(1.0, dtype=torch.float64), 1 + 5e-6),
            (torch.tensor(1_000_000), 1_000_001),
            (torch.tensor(1), 1.7),
            (torch.tensor(float("nan")), 0),
            (torch.tensor(0), None),
            (0.5, None),
            ((2, 3), (3, 2)),
            ([1], [1, 2]),
            (None, False),
        ):
            with self.subTest(value=value):
                self.assertFalse(self.agree(value, expected))

    def test_tolerances_replace_those_of_the_dtype(self) -> None:
        self.assertTrue(self.agree(torch.tensor(1000.0), 1010, rtol=0.02))
        self.assertTrue(self.agree(torch.tensor(1000.0), 1010, atol=11))
        self.assertFalse(self.agree(torch.tensor(1.0), 1 + 1e-6, atol=1e-8))

    def test_an_error_must_be_of_the_kind_and_say_the_words(self) -> None:
        def check(call: Callable[[], Any], error: type[Exception]) -> int:
            def lesson() -> None:
                show_error(call, error, "division")

            return run(lesson)[0]

        self.assertEqual(check(lambda: 1 / 0, ArithmeticError), 0)
        self.assertEqual(check(lambda: 1 / 0, TypeError), 1)
        self.assertEqual(check(lambda: 1.0 // 0, OverflowError), 1)
        self.assertEqual(check(lambda: 1, ArithmeticError), 1)


class Prints(unittest.TestCase):
    def test_what_a_helper_prints_follows_the_line_that_called_it(self) -> None:
        def lesson() -> None:
            """A helper prints."""

            def double(x: int) -> int:
                print("doubling", x)
                return 2 * x

            y = double(1)
            show(double(y), 4)

        code, out, _ = run(lesson)
        self.assertEqual(code, 0)
        self.assertRegex(out, r"\n    y = double\(1\)\n    doubling 1\n    doubling 2\n    double\(y\) +→ 4   ✓\n")

    def test_values_are_printed_short_and_without_their_history(self) -> None:
        w = torch.tensor(2.0, requires_grad=True)

        def lesson() -> None:
            """Numbers and tensors."""
            show(0.1 + 0.2, 0.3)
            show([1 / 3, 1e-05, "a"], [1 / 3, 1e-05, "a"])
            show((w, w * w), (2.0, 4.0))

        out = run(lesson)[1]
        for text in ("0.3", "[0.333333, 1e-05, 'a']", "(tensor(2.), tensor(4.))"):
            self.assertIn(f" → {text}   ✓\n", out)


class Run(unittest.TestCase):
    def test_a_wrong_lesson_fails_alone_and_the_exit_code_is_1(self) -> None:
        code, out, err = run(right, wrong, raises, on_device)
        self.assertEqual((code, err), (1, ""))
        self.assertRegex(out, r"1 \+ 2 +→ 3   ✗ expected 4\n    2 \+ 2 +→ 4   ✓\n")
        # the code ends where it stopped, and says why
        self.assertRegex(out, r"\n        print\(numbers\[3\]\)\n +→ IndexError: .*✗ expected no error\n\na.on_device")
        self.assertRegex(out, r"2 of 4 sections passed, 3 values as expected\nfailed: a.wrong, a.raises\n$")

    def test_a_section_that_shows_nothing_fails_unless_it_says_why_it_cannot_run(self) -> None:
        code, out, _ = run(empty, skips)
        self.assertEqual(code, 1)
        self.assertRegex(out, r"\nskipped: a.skips\nfailed: a.empty\n$")
        code, out, _ = run(skips)
        self.assertEqual(code, 0)
        self.assertIn('    skip("needs a file")\n    skipped: needs a file\n', out)
        self.assertIn("0 of 1 sections passed", out)

    def test_quiet_prints_a_line_per_section_and_failures_in_full(self) -> None:
        code, out, _ = run(right, skips, argv=("--quiet",))
        self.assertEqual(code, 0)
        self.assertEqual(out.splitlines()[:2], ["a.right: passed, values: 1", "a.skips: skipped: needs a file"])
        code, out, _ = run(right, wrong, argv=("--quiet",))
        self.assertEqual(code, 1)
        self.assertIn("✗ expected 4", out)
        self.assertIn("a.wrong: FAILED", out)

    def test_sections_can_be_chosen(self) -> None:
        code, out, _ = run(right, wrong, on_device, argv=("--section", "a.on_device", "--section", "a.right"))
        self.assertEqual(code, 0)
        self.assertIn("2 of 2 sections passed", out)
        self.assertNotIn("a.wrong", out)

    def test_list_gives_each_section_with_its_ids_and_title(self) -> None:
        code, out, _ = run(right, wrong, argv=("--list",))
        self.assertEqual(code, 0)
        self.assertRegex(out, r"^a\.right +X1 +One and one\.\na\.wrong +X1 +A wrong expectation\.\n$")

    def test_bad_arguments_are_exit_code_2_and_name_what_would_do(self) -> None:
        for argv, words in (
            (("--section", "a.rigth"), "a.right"),
            (("--sec", "a.right"), "--sec"),  # options are not abbreviated
            (("--device", "cuda:99"), "'cuda:99' is not available here"),
            (("--device", "toaster"), "'toaster' is not available here"),
            (("--section=--",), "--section: expected a value"),
            (("--device=--",), "--device: expected a value"),
            (("--section", "x" * 100_000), "did you mean one of --list?"),
            (("x" * 100_000,), "unrecognized arguments"),
        ):
            with self.subTest(argv):
                code, out, err = run(right, on_device, argv=argv)
                self.assertEqual((code, out, err.count("\n")), (2, "", 1))
                self.assertIn(words, err)
                self.assertLess(len(err), 130)

    def test_a_device_is_offered_only_if_a_lesson_takes_one(self) -> None:
        code, _, err = run(right, argv=CPU)
        self.assertEqual((code, err), (2, "error: unrecognized arguments: --device cpu\n"))

    def test_each_section_starts_from_the_same_seed(self) -> None:
        def one() -> None:
            draws.append(torch.rand(1).item())
            show(1, 1)

        def two() -> None:
            draws.append(torch.rand(1).item())
            show(1, 1)

        draws: list[float] = []
        run(one, two)
        self.assertEqual(draws[0], draws[1])

    def test_a_name_cannot_be_used_twice(self) -> None:
        with self.assertRaisesRegex(ValueError, "'a.right' twice"):
            section = Sections()
            section("a.right")(right)
            section("a.right")(wrong)

    def test_ctrl_c_is_quiet_with_exit_code_130(self) -> None:
        def stop() -> None:
            signal.raise_signal(signal.SIGINT)

        code, _, err = run(stop)
        self.assertEqual((code, err), (130, ""))

    def test_a_reader_that_has_gone_ends_the_run_quietly(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)  # as `| head` does
        section = Sections()
        section("a.right")(right)
        with open(writer, "w") as out, redirect_stdout(out):
            self.assertEqual(section.run([]), 141)


if __name__ == "__main__":
    unittest.main()
