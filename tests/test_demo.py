"""The section registry and show(): right lessons pass, wrong ones fail alone."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch
from torch import Tensor

from torchbasics.demo import Mismatch, Parser, Sections, show, show_error, skip


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
        self.accepts(torch.tensor(1 + 2j), 1 + 5e-6 + 2j)
        self.rejects(torch.tensor(1 + 2j, dtype=torch.complex128), 1 + 5e-6 + 2j)
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

    def test_a_section_that_shows_nothing_fails(self) -> None:
        section = lessons()
        section("nothing.shown")(lambda: None)
        code, out, _ = run(section, "--device", "cpu", "--section", "add.right", "--section", "nothing.shown")
        self.assertEqual(code, 1)
        self.assertRegex(out, r"FAILED .*show\(\).*skip\(\)")
        self.assertIn("1 of 2 sections passed, 1 values checked\nfailed: nothing.shown\n", out)

    def test_a_skip_is_said_counted_and_no_failure(self) -> None:
        section = lessons()

        @section("skip.first")
        def first() -> None:
            skip("no file data/x; get it")
            raise AssertionError("skip() leaves the section")

        @section("skip.later")
        def later() -> None:
            show("1", 1, 1)
            skip("no extra: pip install extra")

        argv = [part for name in ("add.right", "skip.first", "skip.later") for part in ("--section", name)]
        code, out, _ = run(section, "--device", "cpu", *argv)
        self.assertEqual(code, 0)
        self.assertIn("    skipped: no file data/x; get it\n", out)
        self.assertIn("1 of 3 sections passed, 2 skipped, 2 values checked\nskipped: skip.first, skip.later\n", out)
        self.assertNotIn("failed", out.lower())
        code, out, _ = run(section, "--device", "cpu", "--json", *argv)
        result = json.loads(out)
        self.assertEqual((code, result["passed"]), (0, True))
        reasons = ["no file data/x; get it", "no extra: pip install extra"]
        self.assertEqual([s["skipped"] for s in result["sections"]], [None, *reasons])
        self.assertEqual([s["error"] for s in result["sections"]], [None] * 3)
        self.assertEqual([len(s["values"]) for s in result["sections"]], [1, 0, 1])

    def test_notes_end_the_summary_and_are_those_of_one_run(self) -> None:
        section = Sections()

        @section("note.taken")
        def taken() -> None:
            show("1", 1, 1)
            section.notes.append("images are in x")

        for _ in range(2):
            self.assertRegex(run(section, "--device", "cpu")[1], r"checked\nimages are in x\n\Z")
        self.assertEqual(json.loads(run(section, "--device", "cpu", "--json")[1])["notes"], ["images are in x"])

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

    def test_options_are_not_abbreviated_and_errors_take_one_line(self) -> None:
        own = Parser(add_help=False, allow_abbrev=False)
        own.add_argument("--size", type=int)
        for argv, said in (
            (["--sec", "add.right"], "--sec"),
            (["--lis"], "--lis"),
            (["--siz", "1"], "--siz"),
            (["--size", "x"], "--size"),
            (["--seed"], "--seed"),
            (["--seed", "-1"], "--seed must be from 0"),
            (["--seed", str(2**32)], "--seed must be from 0"),
        ):
            with self.subTest(argv), contextlib.redirect_stdout(io.StringIO()) as out:
                with contextlib.redirect_stderr(io.StringIO()) as err, self.assertRaises(SystemExit) as stop:
                    lessons().run(argv, parents=[own])
                self.assertEqual((stop.exception.code, out.getvalue()), (2, ""))
                self.assertRegex(err.getvalue(), rf"\Aerror: .*{said}.*\n\Z")

    @unittest.skipUnless(os.path.exists("/dev/full"), "no full disk here")
    def test_an_output_that_takes_nothing_is_one_line(self) -> None:
        err = io.StringIO()
        with open("/dev/full", "w") as full, contextlib.redirect_stdout(full), contextlib.redirect_stderr(err):
            self.assertEqual(lessons().run(["--section", "add.right"]), 1)
        self.assertRegex(err.getvalue(), r"\Aerror: standard output: No space left on device\n\Z")
        with contextlib.redirect_stdout(None):  # closed: >&-
            self.assertEqual(lessons().run(["--section", "add.right"]), 0)

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

    def test_list_honours_section_and_json(self) -> None:
        code, out, err = run(lessons(), "--list", "--section", "add.rigth")
        self.assertEqual((code, out), (2, ""))
        self.assertIn("did you mean add.right", err)
        code, out, _ = run(lessons(), "--list", "--section", "add.wrong")
        self.assertEqual((code, len(out.splitlines()), out[:9]), (0, 1, "add.wrong"))
        code, out, _ = run(lessons(), "--list", "--json", "--section", "add.wrong")
        listed = {"name": "add.wrong", "covers": ["X1", "X2"], "summary": "A wrong expectation."}
        self.assertEqual((code, json.loads(out)), (0, {"sections": [listed]}))

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
            show("device", device.type, "cpu")

        @section("device.not_asked")
        def not_asked() -> None:
            devices.append(None)
            show("1", 1, 1)

        self.assertEqual(run(section, "--device", "cpu")[0], 0)
        self.assertEqual(devices, [torch.device("cpu"), None])


class Isolation(unittest.TestCase):
    def test_every_section_starts_from_the_seed(self) -> None:
        section, draws = Sections(), []

        def draw() -> None:
            draws.append((torch.rand(1).item(), random.random()))
            show("draws", len(draws) > 0, True)

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
            show("1", 1, 1)

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


LONG = """
import sys, time
from torchbasics.demo import Sections, show
section = Sections()

@section("print.much")
def much():
    show("1", 1, 1)
    print("x" * 100_000, flush=True)
    time.sleep({seconds})
    print("x" * 100_000, flush=True)

@section("print.after")
def after():
    print("after", file=sys.stderr)
    show("1", 1, 1)

sys.exit(section.run())
"""


@unittest.skipUnless(os.name == "posix", "closes a pipe, sends a signal")
class Stopped(unittest.TestCase):
    def start(self, seconds: int, *argv: str) -> subprocess.Popen:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        script = Path(folder.name) / "long.py"
        script.write_text(LONG.format(seconds=seconds), encoding="utf-8")
        root = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": ""}
        command = [sys.executable, str(script), "--device", "cpu", *argv]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def test_ctrl_c_is_quiet(self) -> None:
        process = self.start(60)
        assert process.stdout is not None
        process.stdout.read(1000)  # it is in the section
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, err), (130, b""))

    def test_a_reader_that_leaves_is_no_failure_of_a_section(self) -> None:
        started = {argv: self.start(0, argv) for argv in ("--debug", "--help")}  # both at once
        for process in started.values():
            assert process.stdout is not None
            process.stdout.close()
            process.stdout = None
        for argv, process in started.items():
            with self.subTest(argv):
                _, err = process.communicate(timeout=60)
                self.assertEqual((process.returncode, err), (141, b""))


if __name__ == "__main__":
    unittest.main()
