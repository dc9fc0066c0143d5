"""Errors in one line with the right exit code, and the types of options."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
import warnings
from typing import Any

import torch

from torchbasics import cli
from torchbasics.checkpoint import CheckpointError


def run_and_raise(raised: BaseException, **options: Any) -> tuple[int, str]:
    """Return the exit code and the stderr of a `main` that raises."""

    def main(argv: Any) -> int:
        raise raised

    with contextlib.redirect_stderr(io.StringIO()) as err:
        return cli.run(main, **options), err.getvalue()


def parse(*argv: str) -> tuple[int, str]:
    """Return the exit code and the stderr of parsing `argv`."""
    parser = cli.Parser(prog="script")
    parser.add_argument("--epochs", type=cli.number(int, 1))
    parser.add_argument("--lr", type=cli.number(float, 0, strict=True))
    parser.add_argument("--dropout", type=cli.number(float, 0, 0.99))
    parser.add_argument("--model", choices=("mlp", "cnn"))
    parser.add_argument("--output", type=cli.path_argument)
    parser.add_argument("--quiet", action="store_true")
    with contextlib.redirect_stderr(io.StringIO()) as err:
        return cli.run(lambda argv: int(parser.parse_args(argv) is None), argv), err.getvalue()


INTERRUPTED = Exception("SIGTERM: saved a.pt")
INTERRUPTED.signum = 15  # type: ignore[attr-defined]
OURS = type("NonFiniteLoss", (RuntimeError,), {"__module__": "torchbasics.trainer"})


class Run(unittest.TestCase):
    def test_the_exit_code_is_that_of_main(self) -> None:
        self.assertEqual(cli.run(lambda argv: len(argv or ()), ["a", "b"]), 2)
        self.assertEqual([cli.run(lambda argv: None), run_and_raise(SystemExit(5))[0]], [0, 5])

    def test_each_error_has_its_code_and_takes_one_line(self) -> None:
        full = OSError(errno.ENOSPC, "No space left on device", "a.pt")
        rest = "make room, permit it, or choose another place"
        for raised, code, line in (
            (ValueError("a.png: damaged;\n  use another"), 2, "error: a.png: damaged; use another"),
            (CheckpointError("x: damaged"), 2, "error: x: damaged"),
            (FileNotFoundError(errno.ENOENT, "No such file", "a"), 2, "error: No such file: a"),
            (cli.MissingExtra("needs onnx; pip install onnx"), 3, "error: needs onnx; pip install onnx"),
            (full, 1, f"error: No space left on device: a.pt; {rest}"),
            (PermissionError(errno.EACCES, "Denied"), 1, f"error: Denied; {rest}"),
            (OSError("runs/a was moved"), 1, "error: runs/a was moved"),
            (OURS("the loss is nan"), 1, "error: the loss is nan"),
            (RuntimeError("shapes"), 1, "error: RuntimeError: shapes (--debug shows the traceback)"),
            (KeyError("x"), 1, "error: KeyError: 'x' (--debug shows the traceback)"),
            (ValueError(), 2, "error: ValueError:  (--debug shows the traceback)"),
            (INTERRUPTED, 143, "SIGTERM: saved a.pt"),
            (KeyboardInterrupt(), 130, "interrupted"),
            (ValueError("a\x1b[2Jb\u202ec"), 2, "error: a\\x1b[2Jb\\u202ec"),  # what a terminal would obey
        ):
            with self.subTest(raised):
                self.assertEqual(run_and_raise(raised), (code, f"{line}\n"))

    def test_what_was_noted_on_an_error_is_printed_in_its_line(self) -> None:
        error = OURS("the loss is nan")
        error.add_note("saved 3 steps before: a.pt")
        self.assertEqual(run_and_raise(error), (1, "error: the loss is nan; saved 3 steps before: a.pt\n"))

    def test_an_error_in_a_worker_of_a_loader_is_shown_as_its_last_line(self) -> None:
        class Broken(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return 1

            def __getitem__(self, index: int) -> torch.Tensor:
                raise ValueError("a.png: damaged")

        def main(argv: Any) -> int:
            return len(list(torch.utils.data.DataLoader(Broken(), num_workers=1)))

        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual(cli.run(main), 2)
        self.assertEqual(err.getvalue(), "error: a.png: damaged\n")

    def test_out_of_memory_ends_in_the_given_advice(self) -> None:
        cuda = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
        with self.assertRaises(RuntimeError) as real:
            torch.empty(10**15)
        for raised, what in (
            (torch.OutOfMemoryError(cuda), ": cannot allocate 2.00 GiB"),
            (real.exception, ": cannot allocate 4000000000000000 bytes"),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ""),
            (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
            (MemoryError(), ""),
        ):
            with self.subTest(raised):
                for advice in ("try --batch-size 64", ""):
                    line = f"error: out of memory{what}{'; ' * bool(advice)}{advice}\n"
                    self.assertEqual(run_and_raise(raised, out_of_memory=advice), (1, line))

    def test_debug_lets_errors_through_but_not_an_interruption_that_was_saved(self) -> None:
        for raised in (ZeroDivisionError(), ValueError("x"), MemoryError()):
            with self.assertRaises(type(raised)):
                run_and_raise(raised, debug=True)
        self.assertEqual(run_and_raise(INTERRUPTED, debug=True), (143, "SIGTERM: saved a.pt\n"))

    def test_a_long_value_is_not_quoted_whole(self) -> None:
        code, line = run_and_raise(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 100_000))
        self.assertEqual((code, line.count("\n")), (1, 1))
        self.assertIn("File name too long", line)
        self.assertLess(len(line), 200)
        line = run_and_raise(FileNotFoundError(errno.ENOENT, "No such file", "a folder/" * 60))[1]
        self.assertLess(len(line), 130)
        self.assertLess(len(run_and_raise(RuntimeError("many words " * 10_000))[1]), 700)

    def test_a_path_of_usual_length_is_shown_whole(self) -> None:
        path = "/tmp/" + "folder/" * 20 + "step-00000469.pt"
        self.assertEqual(run_and_raise(ValueError(f"{path}: damaged"))[1], f"error: {path}: damaged\n")

    def test_a_long_line_with_apostrophes_is_shown_whole(self) -> None:
        line = f"the run's best.pt is missing;{' it is needed:' * 10} the model's weights are in it"
        self.assertEqual(run_and_raise(ValueError(line))[1], f"error: {line}\n")

    def test_warnings_take_one_line_while_main_runs(self) -> None:
        before = warnings.showwarning
        with contextlib.redirect_stderr(io.StringIO()) as err, warnings.catch_warnings():
            warnings.simplefilter("always")
            cli.run(lambda argv: warnings.warn("be\nware", stacklevel=1))
        self.assertEqual(err.getvalue(), "warning: be ware\n")
        self.assertIs(warnings.showwarning, before)

    def test_characters_that_the_terminal_lacks_are_escaped(self) -> None:
        terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
        with contextlib.redirect_stdout(terminal):
            self.assertEqual(cli.run(lambda argv: print("2 × 3 猫")), 0)
        self.assertEqual(terminal.buffer.getvalue(), b"2 \\xd7 3 \\u732b\n")  # type: ignore[attr-defined]


class Alone(unittest.TestCase):
    """A copy of cli.py in a folder of its own, run in a fresh process."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        shutil.copy(str(cli.__file__), self.folder)

    def script(self, main: str, stdout: Any = subprocess.PIPE) -> subprocess.CompletedProcess:
        code = f"import sys; sys.path.insert(0, '.'); import cli; sys.exit(cli.run(lambda argv: {main}))"
        env = {**os.environ, "PYTHONUNBUFFERED": ""}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, cwd=self.folder, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )

    def test_it_needs_neither_the_package_nor_torch(self) -> None:
        done = self.script("print(sorted({'torch', 'torchbasics'} & {*sys.modules}))")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "[]\n", ""))

    def test_a_reader_that_has_gone_ends_the_script_quietly_with_code_141(self) -> None:
        for main in ("print('text')", "print('text' * 100_000)", "cli.Parser().parse_args(['--help'])"):
            reading, writing = os.pipe()
            os.close(reading)
            done = self.script(main, writing)
            os.close(writing)
            self.assertEqual((done.returncode, done.stderr), (141, ""))


class Options(unittest.TestCase):
    def test_errors_take_one_line_and_code_2(self) -> None:
        self.assertEqual(parse("--epochs", "3", "--model=cnn", "--output", "a b", "--quiet"), (0, ""))
        for argv, line in (
            (["--epochs", "0"], "argument --epochs: expected a whole number from 1, got '0'"),
            (["--epochs", "\x1b[2J\n"], "argument --epochs: expected a whole number from 1, got '\\x1b[2J\\n'"),
            (["--lr", "0"], "argument --lr: expected a number above 0, got '0'"),
            (["--dropout", "x"], "argument --dropout: expected a number from 0 to 0.99, got 'x'"),
            (["--epochs=--"], "argument --epochs: expected a value, got '--'"),
            (["--model=--"], "argument --model: expected a value, got '--'"),
            (["--output", ""], "argument --output: expected a path, got an empty one"),
            (["--output="], "argument --output: expected a path, got an empty one"),
            (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
            (["--epochs"], "argument --epochs: expected one argument"),
        ):
            with self.subTest(argv):
                self.assertEqual(parse(*argv), (2, f"error: {line}; see --help\n"))

    def test_long_values_are_quoted_in_part(self) -> None:
        long = "x y" * 50_000
        for argv, said in (
            (["--epochs", long], "--epochs: expected a whole number"),
            (["--epochs", "it's \\ 3\" " * 50_000], "--epochs: expected a whole number"),
            (["--model", long], "'mlp', 'cnn'"),
            (["--model", long.replace(" ", "\n")], "--model: invalid choice"),
            ([f"--quiet={long}"], "--quiet: ignored explicit argument"),
            (["x\ny" * 50_000], "unrecognized arguments"),
            (["word"] * 50_000, "unrecognized arguments"),
        ):
            code, line = parse(*argv)
            self.assertEqual((code, line.count("\n")), (2, 1))
            self.assertIn(said, line.replace('"', "'"))
            self.assertLess(len(line), 250)

    def test_numbers_have_limits(self) -> None:
        for number, good, bad in (
            (cli.number(int, 1), ("1", "007"), ("0", "-1", "1.0", "", "x", "inf", "nan")),
            (cli.number(float, 0, strict=True), ("1e-9", "3", "1e308"), ("0", "-1", "inf", "nan", "1e999", "")),
            (cli.number(float, 0, 0.99), ("0", "0.99"), ("-0.01", "0.991", "nan")),
            (cli.number(int, 0, 5), ("0", "5"), ("6", "1" * 400, "1" * 5000)),
        ):
            for text in good:
                self.assertEqual(number(text), float(text))
            for text in bad:
                with self.assertRaises(argparse.ArgumentTypeError, msg=text):
                    number(text)


if __name__ == "__main__":
    unittest.main()
