"""The command line that the training scripts share: limits of values, what a resume may change, errors in one line."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import io
import json
import os
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from torchbasics import options
from torchbasics.checkpoint import CheckpointError, RunDirectory
from torchbasics.trainer import NonFiniteLoss


def make_parser(more: bool = False) -> options.Parser:
    """As the scripts make theirs; with an option that only one of them has."""
    parser = options.Parser(allow_abbrev=False)
    options.add_data_options(parser)
    options.add_model_options(parser)
    options.add_optimisation_options(parser)
    options.add_speed_options(parser)
    options.add_stopping_options(parser)
    group = options.add_run_options(parser, "1.2.3")
    if more:
        group.add_argument("--strategy", default="ddp", help="(default: ddp)")
    return parser


def ended(function: Any, *args: Any) -> tuple[int, str]:
    """Exit code and stderr of what ends the program."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            function(*args)
    except SystemExit as stop:
        return int(stop.code or 0), err.getvalue()
    raise AssertionError("it did not end")


class Presets(unittest.TestCase):
    def parse(self, *argv: str) -> dict[str, Any]:
        return vars(options.parse_with_preset(make_parser(), list(argv)))

    def test_a_preset_changes_defaults_and_nothing_else(self) -> None:
        plain = self.parse()
        for name, values in options.PRESETS.items():
            self.assertLessEqual(values.keys(), plain.keys())
            self.assertEqual(self.parse("--preset", name), plain | values | {"preset": name})
            self.assertEqual(self.parse(f"--preset={name}"), self.parse("--preset", name))

    def test_what_is_given_beside_it_wins(self) -> None:
        for argv in (
            ("--preset", "best", "--ema", "0.5", "--no-tta"),
            ("--ema", "0.5", "--no-tta", "--preset", "best"),
        ):
            args = self.parse(*argv)
            self.assertEqual((args["ema"], args["tta"], args["model"]), (0.5, False, "widevgg"))

    def test_help_says_what_it_sets_as_one_would_type_it(self) -> None:
        text = " ".join(make_parser().format_help().split())
        for name, values in options.PRESETS.items():
            flags = text.partition(f"--preset {name} sets ")[2].partition("--preset")[0].split()
            typed = self.parse(*flags)
            self.assertEqual(typed, self.parse("--preset", name) | {"preset": None})
            self.assertEqual(len([flag for flag in flags if flag.startswith("--")]), len(values))

    def test_another_name_takes_one_line(self) -> None:
        code, said = ended(options.parse_with_preset, make_parser(), ["--preset", "slow"])
        self.assertEqual((code, said.count("\n")), (2, 1))
        self.assertIn("speedrun", said)


class Guarded(unittest.TestCase):
    def end(self, raised: BaseException, **options_given: Any) -> tuple[int, str]:
        def work() -> int:
            raise raised

        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            return options.guarded(work, False, **options_given), err.getvalue()

    def test_each_end_has_its_code_and_its_line(self) -> None:
        self.assertEqual(options.guarded(lambda: 7, False), 7)
        self.assertEqual(self.end(ValueError("x: bad; use y")), (2, "error: x: bad; use y\n"))
        self.assertEqual(self.end(KeyboardInterrupt(), interrupted="stopped here"), (130, "\nstopped here\n"))
        self.assertEqual(self.end(options.MissingExtra("pip install x")), (3, "error: pip install x\n"))
        full = OSError(errno.ENOSPC, "No space left on device", "a.pt")
        self.assertEqual(self.end(full, not_written="make room"),
                         (1, "error: a.pt: No space left on device; make room\n"))  # fmt: skip
        with mock.patch.object(options, "reader_left", return_value=141):
            self.assertEqual(self.end(BrokenPipeError()), (141, ""))

    def test_a_terminal_of_any_encoding_ends_no_run(self) -> None:
        """From the parser on: `--help` and all that is printed later."""
        terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
        with contextlib.redirect_stdout(terminal):
            parser = options.Parser(description="2 × 3 …")
            parser.add_argument("--x")
            parser.parse_args([])
            print(parser.format_help(), "猫", flush=True)
        self.assertRegex(terminal.buffer.getvalue().decode("ascii"), r"2 \\xd7 3 \\u2026[^\0]*\\u732b")

    def test_debug_raises_the_error_itself(self) -> None:
        with self.assertRaises(ZeroDivisionError):
            options.guarded(lambda: 1 // 0, True)


class Numbers(unittest.TestCase):
    def test_limits(self) -> None:
        for parse, good, bad in (
            (options.COUNT, ("1", "007"), ("0", "-1", "1.0", "", "x", "inf", "nan")),
            (options.RATE, ("1e-9", "3", "1e308"), ("0", "-1", "inf", "nan", "1e999", "")),
            (options.SHARE, ("0", "0.99"), ("-0.01", "0.991", "nan")),
            (options.number(int, 0, 5), ("0", "5"), ("6", "10**400", "1" * 400)),
        ):
            for text in good:
                self.assertEqual(parse(text), float(text))
            for text in bad:
                with self.assertRaisesRegex(argparse.ArgumentTypeError, "expected a .*number (from|above) .* got"):
                    parse(text)

    def test_what_is_expected_is_said(self) -> None:
        for parse, text in (
            (options.COUNT, "expected a whole number from 1, got 'x'"),
            (options.RATE, "expected a number above 0, got 'x'"),
            (options.SHARE, "expected a number from 0 to 0.99, got 'x'"),
        ):
            with self.assertRaises(argparse.ArgumentTypeError) as caught:
                parse("x")
            self.assertEqual(str(caught.exception), text)

    def test_errors_take_one_line_and_exit_code_2(self) -> None:
        self.assertEqual(
            ended(make_parser().parse_args, ["--epochs", "0"]),
            (2, "error: argument --epochs: expected a whole number from 1, got '0'; see --help\n"),
        )
        code, said = ended(make_parser().parse_args, ["\x1b[2J\n1"])
        self.assertEqual((code, said.count("\n"), "\x1b" in said), (2, 1, False), said)


class Resume(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.run_path = Path(folder.name) / "run"

    def recorded(self, argv: list[str], arguments: Any, more: bool = False) -> argparse.Namespace:
        """What `recorded_options` makes of `argv` and the `arguments` of run.json."""
        self.run_path.mkdir(exist_ok=True)
        (self.run_path / "run.json").write_text(json.dumps({"arguments": arguments}))
        parser = make_parser(more)
        args = options.check_resume(parser, parser.parse_args([*argv, "--resume", str(self.run_path)]))
        with RunDirectory(self.run_path, resume=True) as run:
            return options.recorded_options(make_parser(more), [*argv, "--resume", str(self.run_path)], args, run)

    def test_which_directory(self) -> None:
        parser = make_parser()
        for argv, output in (
            (["--resume", "a"], "a"),
            (["--resume", "--output", "a"], "a"),
            (["--resume", "a", "--output", "./a"], "a"),
        ):
            self.assertEqual(options.check_resume(parser, parser.parse_args(argv)).output, output)
        for argv, said in (
            (["--resume"], "--resume needs the run's directory"),
            (["--resume", "a", "--output", "b"], "--resume a and --output b differ"),
            (["--resume", "a", "--overwrite"], "--resume cannot go with --overwrite"),
        ):
            code, err = ended(options.check_resume, parser, parser.parse_args(argv))
            self.assertEqual((code, err.splitlines()), (2, [err.strip()]))
            self.assertIn(said, err)

    def test_the_recorded_options_hold(self) -> None:
        then = vars(make_parser().parse_args(["--epochs", "3", "--lr", "0.1", "--keep", "5", "--output", "elsewhere"]))
        args = self.recorded(["--keep", "1"], then)
        self.assertEqual((args.epochs, args.lr, args.keep, args.seed), (3, 0.1, 1, 42))
        self.assertEqual((args.output, args.resume), (str(self.run_path), True))
        self.assertEqual(self.recorded(["--lr", "0.1"], then).lr, 0.1)  # the same is no change

    def test_what_would_change_the_course_is_refused(self) -> None:
        then = vars(make_parser().parse_args(["--epochs", "3"]))
        for argv, said in (
            (["--lr", "0.5"], "--lr 0.5 differs from the run's 0.003; leave it out to continue"),
            (["--batch-size", "7"], "--batch-size 7 differs from the run's 128"),
            (["--no-augment"], "--augment False differs from the run's True"),
        ):
            with self.assertRaisesRegex(ValueError, said):
                self.recorded(argv, then)

    def test_options_of_the_other_script(self) -> None:
        ddp = vars(make_parser(more=True).parse_args(["--epochs", "3", "--strategy", "fsdp"]))
        mnist = vars(make_parser().parse_args(["--epochs", "3"]))
        self.assertNotIn("strategy", vars(self.recorded([], ddp)))
        self.assertEqual(self.recorded([], mnist, more=True).strategy, "ddp")
        self.assertEqual(self.recorded([], ddp, more=True).strategy, "fsdp")
        self.assertEqual(self.recorded(["--strategy", "ddp"], ddp, more=True).strategy, "ddp")  # free

    def test_records_of_another_version_are_refused(self) -> None:
        then = vars(make_parser().parse_args([]))
        without = {name: value for name, value in then.items() if name != "seed"}
        for arguments in ({**then, "hidden_size": 3}, without, None, ["--epochs", "3"]):
            with self.assertRaisesRegex(ValueError, "run.json: holds the options of another version of this script"):
                self.recorded([], arguments)


class Errors(unittest.TestCase):
    def test_one_line(self) -> None:
        worker = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        for error, line in (
            (ValueError(" two\n  lines "), "two lines"),
            (ValueError(""), "ValueError"),
            (NonFiniteLoss("the loss is nan"), "the loss is nan"),
            (KeyError("x"), "KeyError: 'x' (--debug shows where)"),
            (ValueError("a\x1b[2Jb\u202ec"), "a\\x1b[2Jb\\u202ec"),  # what a terminal would obey
            (ValueError(worker + '  File "a.py", line 1\nValueError: a.png: damaged'), "a.png: damaged"),
            (BrokenPipeError(errno.EPIPE, "Broken pipe"), "[Errno 32] Broken pipe"),
        ):
            self.assertEqual(options.one_line(error), line)
        self.assertRegex(
            options.one_line(ConnectionError("no route")), "^no route; connect .* or use --dataset digits$"
        )
        self.assertEqual(len(options.one_line(RuntimeError("x" * 999))), len("RuntimeError: ") + 300 + 22)
        self.assertEqual(options.one_line(OSError(errno.ENOENT, "No such file", "a.png")), "a.png: No such file")
        full = options.one_line(OSError(errno.ENOSPC, "No space left on device", "a/step-1.pt"), options.GO_ON)
        self.assertRegex(full, "^a/step-1.pt: No space left on device; older checkpoints are intact, .*--resume$")
        for number in (errno.EROFS, errno.EIO, errno.EFBIG, errno.EDQUOT, errno.EACCES):
            said = options.one_line(OSError(number, "Not written"))
            self.assertEqual(said, "the output directory or standard output: Not written; make room or permit it")

    def left(self, code: int, writing: int | None = None) -> tuple[int, str]:
        """Exit code and stderr of a process that prints, into `writing` or nowhere, and leaves with `code`."""
        if not hasattr(os, "fork"):
            self.skipTest("needs fork")
        with tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if not child:
                try:
                    os.dup2(errors.fileno(), 2)
                    sys.stdout, sys.stderr = None, open(2, "w", closefd=False)  # type: ignore[assignment]  # noqa: SIM115
                    if writing is not None:
                        os.dup2(writing, 1)
                        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (with a buffer of its own)
                        atexit._clear()
                        atexit.register(print, ", then this", end="")
                        print("said", end="")
                    options.leave(code)
                finally:
                    os._exit(99)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            errors.seek(0)
            return ended, errors.read()

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_output_that_is_not_taken_to_its_end(self) -> None:
        """It waits in a buffer, and is written after the work; the interpreter's own end must find nothing left."""

        def to_parse() -> int:
            options.Parser(prog="x").parse_args(["--help"])
            return 0

        reading, writing = os.pipe()
        os.close(reading)
        self.addCleanup(os.close, writing)
        full = os.open("/dev/full", os.O_WRONLY)
        self.addCleanup(os.close, full)
        for number, codes, lines in ((writing, (141, 2), 0), (full, (1, 2), 1)):
            for work, code in ((lambda: print("said") or 0, codes[0]), (lambda: print("said") or 2, codes[1]),
                               (to_parse, codes[0])):  # fmt: skip
                with (
                    self.subTest(code=code, full=number == full),
                    open(os.dup(number), "w", encoding="utf-8") as out,
                    contextlib.redirect_stdout(out),
                    contextlib.redirect_stderr(io.StringIO()) as err,
                ):
                    try:
                        found = options.guarded(work, False)
                    except SystemExit as stop:
                        found = stop.code
                    self.assertEqual(found, code)
                    self.assertEqual(err.getvalue().count("\n"), 0 if code == 2 else lines)
                    print("more", flush=True)  # into nothing

    def test_leaving_at_once(self) -> None:
        with tempfile.TemporaryFile("w+") as file:
            self.assertEqual(self.left(3, file.fileno()), (3, ""))
            file.seek(0)
            self.assertEqual(file.read(), "said, then this")
        self.assertEqual(self.left(0), (0, ""))  # started without an output

    def test_leaving_where_nobody_reads(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        self.addCleanup(os.close, writing)
        self.assertEqual([self.left(0, writing), self.left(2, writing)], [(141, ""), (2, "")])

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_leaving_where_nothing_can_be_written(self) -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        self.addCleanup(os.close, full)
        code, said = self.left(0, full)
        self.assertEqual((code, said.count("\n")), (1, 1))
        self.assertIn("No space left", said)
        self.assertEqual(self.left(2, full)[0], 2)

    def test_exit_codes(self) -> None:
        for error, code in (
            (ValueError(), 2),
            (CheckpointError(), 2),
            (FileNotFoundError(), 2),
            (ConnectionError(), 2),  # of a download
            (ConnectionResetError(), 1),
            (OSError(), 1),
            (NonFiniteLoss(), 1),
            (KeyError(), 1),
            (options.MissingExtra(), 3),
            (ImportError(), 1),
        ):
            self.assertEqual(options.exit_code(error), code, error)

    def test_a_warning_is_one_line(self) -> None:
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            options.print_warning(UserWarning("beware"), UserWarning, "file.py", 3)
            options.print_warning("a\nb\x1b[1m")
        self.assertEqual(err.getvalue(), "warning: beware\nwarning: a\\nb\\x1b[1m\n")

    def test_what_nobody_can_catch_is_told_with_debug_only(self) -> None:
        class Ends:
            def __del__(self) -> None:
                raise RuntimeError("a worker was killed")

        before = sys.unraisablehook, sys.excepthook
        for debug in (False, True):
            err = io.StringIO()
            with contextlib.redirect_stderr(err), options.quiet_ends(debug):
                Ends()
            self.assertEqual("a worker was killed" in err.getvalue(), debug)
            self.assertEqual(err.getvalue() != "", debug)
            self.assertEqual((sys.unraisablehook, sys.excepthook), before)


if __name__ == "__main__":
    unittest.main()
