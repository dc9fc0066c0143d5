"""The section registry and show(): right lessons pass, wrong ones fail alone."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import unittest

import torch
from torch import Tensor

from torchbasics.demo import Mismatch, Sections, show, show_error


def run(section: Sections, *argv: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of one run."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = section.run(list(argv))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def lessons() -> Sections:
    """Three sections: right, wrong, and one that raises."""
    section = Sections("Three lessons.")

    @section("add.right", "X1")
    def right() -> None:
        """One and one."""
        show("1 + 1", torch.tensor(1) + 1, 2)

    @section("add.wrong", "X1", "X2")
    def wrong() -> None:
        """A wrong expectation."""
        show("2 + 2", torch.tensor(2) + 2, 4)
        show("1 + 2", torch.tensor(1) + 2, 4)
        show("never reached", 1, 1)

    @section("divide.zero", "X3")
    def zero() -> None:
        """An error that nobody expected."""
        raise ZeroDivisionError("by\nzero")

    @section("divide.right", "X3")
    def after() -> None:
        """Comes after the failures."""
        show("3 / 2", torch.tensor(3) / 2, 1.5)

    return section


class Show(unittest.TestCase):
    def accepts(self, value: object, expected: object, **tolerance: float) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            show("label", value, expected, **tolerance)
        self.assertIn("label", out.getvalue())

    def rejects(self, value: object, expected: object, **tolerance: float) -> None:
        out = io.StringIO()
        with self.assertRaisesRegex(Mismatch, "label: expected .* got "), contextlib.redirect_stdout(out):
            show("label", value, expected, **tolerance)
        self.assertEqual(out.getvalue(), "", "a wrong value must not be displayed")

    def test_tensors_and_numbers(self) -> None:
        self.accepts(torch.tensor([[1.0, 2.0]]), [[1, 2]])
        self.accepts(torch.tensor(2.0, requires_grad=True), 2)
        self.accepts([torch.tensor([1, 2]), torch.tensor(3)], [[1, 2], 3])
        self.accepts(1 / 3, 0.3333333)
        self.accepts(torch.tensor(1 + 2j), 1 + 2j)
        self.rejects(torch.tensor([1.0, 2.0]), [1, 2.1])
        self.rejects(torch.tensor([1, 2]), [1, 2.5])
        self.rejects(torch.tensor(1 + 2j), 1)
        self.rejects([torch.tensor(1)], [1, 1])
        self.rejects(0.5, 0.51)

    def test_shapes_must_agree_without_broadcasting(self) -> None:
        self.rejects(torch.ones(3), 1)
        self.rejects(torch.ones(1, 3), [1, 1, 1])
        self.rejects(torch.tensor(1), [1])

    def test_tolerance_follows_the_dtype(self) -> None:
        self.accepts(torch.tensor(1.0), 1 + 5e-6)
        self.rejects(torch.tensor(1.0, dtype=torch.float64), 1 + 5e-6)
        self.rejects(torch.tensor(1.0), 1.001)
        self.accepts(torch.tensor(1.0).bfloat16(), 1.01)
        self.accepts(torch.tensor(1.0), 1.001, atol=0.01)
        self.accepts(torch.tensor(1000.0), 1010, rtol=0.02)
        self.rejects(torch.tensor(1e-6), 2e-6, atol=0)
        self.rejects(torch.tensor(1_000_000), 1_000_001)

    def test_non_finite(self) -> None:
        self.accepts(torch.tensor(math.nan), math.nan)
        self.accepts(math.inf, math.inf)
        self.rejects(torch.tensor(math.inf), -math.inf)
        self.rejects(torch.tensor(math.nan), 0)

    def test_other_values(self) -> None:
        self.accepts(torch.float32, torch.float32)
        self.accepts(torch.zeros(2, 3).shape, (2, 3))
        self.accepts({"a": 1}, {"a": 1})
        self.accepts(None, None)
        self.rejects(torch.float32, torch.float64)
        self.rejects((2, 3), (3, 2))
        self.rejects("ab", "abc")
        self.rejects(None, 0)
        self.rejects(torch.tensor(0), None)
        self.rejects(torch.tensor(0), "0")
        self.rejects(True, False)

    def test_a_mismatch_shows_all_digits(self) -> None:
        with self.assertRaisesRegex(Mismatch, r"expected \[1\.0, 1\.0001\], got \[1\.0, 1\.0\]"):
            show("x", torch.ones(2), [1.0, 1.0001])

    def test_errors(self) -> None:
        def divide() -> float:
            return 1 / 0

        with contextlib.redirect_stdout(io.StringIO()) as out:
            show_error("1 / 0", divide, ZeroDivisionError, "division")
            show_error("1 / 0", divide, ArithmeticError, "by zero")
        self.assertIn("ZeroDivisionError: division by zero", out.getvalue())
        with self.assertRaisesRegex(Mismatch, "got ZeroDivisionError: division by zero"):
            show_error("1 / 0", divide, ZeroDivisionError, "overflow")
        with self.assertRaisesRegex(Mismatch, "expected TypeError.*got ZeroDivisionError"):
            show_error("1 / 0", divide, TypeError, "division")
        with self.assertRaisesRegex(Mismatch, "got no error"):
            show_error("fine", lambda: 1, ZeroDivisionError, "division")


class Run(unittest.TestCase):
    def test_a_wrong_lesson_fails_alone(self) -> None:
        code, out, err = run(lessons(), "--device", "cpu")
        self.assertEqual(code, 1)
        self.assertEqual(err, "")
        self.assertIn("FAILED 1 + 2: expected 4, got 3", out)
        self.assertIn("FAILED ZeroDivisionError: by zero", out)
        self.assertNotIn("never reached", out)
        self.assertRegex(out, r"3 / 2 +tensor\(1\.5000\)")
        self.assertIn("2 of 4 sections passed, 3 values checked\nfailed: add.wrong, divide.zero\n", out)

    def test_debug_adds_the_traceback(self) -> None:
        code, _, err = run(lessons(), "--device", "cpu", "--section", "divide.zero", "--debug")
        self.assertEqual(code, 1)
        self.assertIn("Traceback", err)

    def test_choice_of_sections(self) -> None:
        argv = ["--device", "cpu", "--section", "divide.right", "--section", "add.right"]
        code, out, _ = run(lessons(), *argv)
        self.assertEqual(code, 0)
        self.assertLess(out.index("add.right"), out.index("divide.right"))
        self.assertIn("2 of 2 sections passed", out)
        self.assertNotIn("add.wrong", out)

    def test_a_typo_is_answered_with_near_names(self) -> None:
        code, out, err = run(lessons(), "--section", "add.rigth")
        self.assertEqual((code, out), (2, ""))
        self.assertRegex(err, r"^error: --section: .*'add\.rigth'; did you mean add\.right or .*\?\n$")
        self.assertIn("see --list", run(lessons(), "--section", "~~~")[2])

    def test_a_missing_device_is_answered_in_one_line(self) -> None:
        for name in ("meta", "nonsense", "cuda:99"):
            code, out, err = run(lessons(), "--device", name)
            self.assertEqual((code, out), (2, ""))
            self.assertRegex(err, rf"^error: --device: '{name}' is not available here; use auto or one of: cpu.*\n$")

    def test_list(self) -> None:
        code, out, _ = run(lessons(), "--list")
        self.assertEqual(code, 0)
        rows = [line.split(maxsplit=1)[0] for line in out.splitlines()]
        self.assertEqual(rows, ["add.right", "add.wrong", "divide.zero", "divide.right"])
        self.assertRegex(out.splitlines()[1], r"^add\.wrong +X1 X2 +A wrong expectation\.$")

    def test_json(self) -> None:
        section = lessons()

        @section("odd.values")
        def odd() -> None:
            """Prints, and shows what JSON cannot hold."""
            print("not JSON")
            show("nan", torch.tensor([math.nan, 1.0]), [math.nan, 1])
            show("dtype", torch.int8, torch.int8)

        def forbid(constant: str) -> None:
            raise ValueError(f"{constant} is no JSON")

        code, out, _ = run(section, "--json", "--device", "cpu")
        self.assertEqual(code, 1)
        result = json.loads(out, parse_constant=forbid)
        self.assertFalse(result["passed"])
        by_name = {s["name"]: s for s in result["sections"]}
        self.assertEqual(list(by_name), list(section.sections))
        self.assertEqual([s["passed"] for s in result["sections"]], [True, False, False, True, True])
        self.assertEqual(by_name["add.right"]["values"], [{"label": "1 + 1", "value": 2, "expected": 2}])
        self.assertEqual(by_name["add.wrong"]["error"], "1 + 2: expected 4, got 3")
        self.assertEqual(by_name["odd.values"]["values"][0]["value"], ["nan", 1.0])
        self.assertEqual(by_name["odd.values"]["values"][1]["value"], "torch.int8")

    def test_registries_are_separate_and_names_unique(self) -> None:
        first, second = lessons(), lessons()
        first("only.here")(lambda: None)
        self.assertNotIn("only.here", second.sections)
        with self.assertRaisesRegex(ValueError, "add.right.*twice"):
            first("add.right")(lambda: None)

    def test_the_device_goes_to_those_who_ask(self) -> None:
        section = Sections()
        devices: list[torch.device | None] = []

        @section("device.asked")
        def asked(device: torch.device) -> None:
            devices.append(device)

        @section("device.not_asked")
        def not_asked() -> None:
            devices.append(None)

        self.assertEqual(run(section, "--device", "cpu")[0], 0)
        self.assertEqual(devices, [torch.device("cpu"), None])


class Isolation(unittest.TestCase):
    def test_every_section_starts_from_the_seed(self) -> None:
        section, draws = Sections(), []

        def draw() -> None:
            draws.append((torch.rand(1).item(), random.random()))

        section("draw.first")(draw)
        section("draw.second")(draw)
        self.assertEqual(run(section, "--seed", "5", "--device", "cpu")[0], 0)
        run(section, "--seed", "6", "--device", "cpu")
        self.assertEqual(draws[0], draws[1])
        self.assertNotEqual(draws[0], draws[2])
        torch.manual_seed(5)
        self.assertEqual(draws[0][0], torch.rand(1).item())

    def test_global_state_is_put_back_even_after_a_failure(self) -> None:
        section = Sections()
        seen: list[tuple[object, ...]] = []

        def state() -> tuple[object, ...]:
            return (
                torch.get_default_dtype(),
                torch.get_default_device(),
                torch.is_grad_enabled(),
                torch.is_anomaly_enabled(),
                torch.get_num_threads(),
            )

        @section("state.spoil")
        def spoil() -> None:
            torch.set_default_dtype(torch.float64)
            torch.set_default_device("meta")
            torch.set_grad_enabled(False)
            torch.autograd.set_detect_anomaly(True)
            torch.set_num_threads(3)
            torch.manual_seed(99)
            random.seed(99)
            raise RuntimeError("spoiled")

        @section("state.look")
        def look() -> None:
            seen.append(state())

        before, rng, python_rng = state(), torch.get_rng_state(), random.getstate()
        code, out, _ = run(section, "--device", "cpu")
        self.assertEqual(code, 1)
        self.assertIn("FAILED RuntimeError: spoiled", out)
        self.assertEqual(seen, [before])
        self.assertEqual(state(), before)
        self.assertTrue(torch.equal(torch.get_rng_state(), rng))
        self.assertEqual(random.getstate(), python_rng)

    def test_gradients_work_though_the_caller_switched_them_off(self) -> None:
        section = Sections()

        @section("grad.on")
        def on() -> None:
            w: Tensor = torch.tensor(2.0, requires_grad=True)
            (3 * w).backward()
            show("w.grad", w.grad, 3)

        with torch.no_grad():
            self.assertEqual(run(section, "--device", "cpu")[0], 0)
            self.assertFalse(torch.is_grad_enabled())


if __name__ == "__main__":
    unittest.main()
