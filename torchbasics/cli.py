"""Run a script's `main`: errors and warnings in one line each, exit codes, and types for its options.

    parser = Parser(description=__doc__)
    parser.add_argument("--epochs", type=number(int, 1), default=15, help="passes over the data (default: 15)")
    …
    sys.exit(run(main, debug="--debug" in sys.argv, out_of_memory="try half the --batch-size with --accumulate 2"))

Exit codes: 0 success, 1 failure at run time, 2 bad arguments or input, 3 a missing optional package, 130 Ctrl-C,
141 standard output was closed by its reader, 128 + signal interrupted by a signal after everything was saved.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any


class MissingExtra(ImportError):
    """An optional package is absent. The text names the command that installs it."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors and without abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but refuse `--option=--`, for which argparse would give an empty list."""
        args = sys.argv[1:] if args is None else list(args)
        for word in args:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word[:-3]}: expected a value, got '--'")
        return super().parse_known_args(args, namespace)

    def parse_resumed(self, argv: Sequence[str] | None, saved: Mapping[str, Any], free: Container[str]) -> Any:
        """Parse the options of a resumed run: `saved` ones are the defaults, and only those in `free` may differ.

        Raises ValueError for another one that differs.
        """
        self.set_defaults(**saved)
        args = self.parse_args(argv)
        for name, before in saved.items():
            now = getattr(args, name)
            if name not in free and now != before:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} {now} differs from the run's {before}; leave it out, or start a new run")
        return args

    def error(self, message: str) -> Any:
        """Print `message` and exit with code 2."""
        self.exit(2, f"error: {shortened(message)}; see --help\n")


def number(kind: type, low: float, high: float = math.inf, strict: bool = False) -> Callable[[str], Any]:
    """Return an argparse type: a finite `kind` (int or float) from `low` to `high`, above `low` if `strict`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            valid = math.isfinite(value) and low <= value <= high and not (strict and value == low)
        except (ValueError, OverflowError):
            valid = False
        if not valid:
            limits = f"{'above' if strict else 'from'} {low:g}" + (f" to {high:g}" if high < math.inf else "")
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} {limits}, got {text!r}")
        return value

    return parse


def path_argument(text: str) -> str:
    """Return `text`. As an argparse type it refuses the empty path that an unset shell variable gives."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty one")
    return text


def call_by_name(text: str, option: str, kind: type = object) -> Any:
    """Return what the callable with the name `module:callable` returns, called without arguments: a `kind`.

    Modules in the current folder are found, after all others. Raises ValueError, which names `option`.
    """
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        value = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{option} {text}: {error}; expected module:callable, called without arguments") from error
    if not isinstance(value, kind):
        raise ValueError(f"{option} {text}: gave a {type(value).__name__}, expected a {kind.__name__}")
    return value


def printable(text: object) -> str:
    """Return `text` as one line, with control and other unprintable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def ends(text: str) -> str:
    """Return both ends of a long `text`: 100 characters."""
    return f"{text[:48]}...{text[-49:]}"


def shortened(text: str) -> str:
    """Return `text` as one line of at most 600 characters: its ends, with what the user gave cut if it is long."""
    quoted = r"(?<![\w\\])(['\"])(?:\\.|(?!\1)[^\\]){99,}\1"  # as repr() quotes; after a letter it is an apostrophe
    given = rf"{quoted}|(?<=unrecognized arguments: ).{{101,}}|\S{{200,}}"  # the last: a path, unquoted
    text = printable(re.sub(given, lambda match: ends(match[0]), text, flags=re.S))
    return text if len(text) <= 600 else f"{text[:298]} ... {text[-297:]}"


def run(
    main: Callable[..., int | None],
    argv: Sequence[str] | None = None,
    *,
    debug: bool = False,
    out_of_memory: str = "",
) -> int:
    """Return the exit code of `main(argv)`; print an error or a warning as one line on stderr.

    With `debug` an error propagates and shows its traceback. `out_of_memory` says what to do when memory runs out. An
    exception with a `signum` (a run that was interrupted and saved) prints its text and gives 128 + `signum`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # escape what the terminal cannot encode
    with warnings.catch_warnings():
        warnings.showwarning = lambda text, *args, **kwargs: print_error(f"warning: {' '.join(str(text).split())}")
        warnings.filterwarnings("once", category=UserWarning)
        try:
            try:
                code: Any = main(argv) or 0
            except SystemExit as stop:  # from --help and from the parser's errors
                code = stop.code or 0
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            print_error("interrupted")
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its exit
            return 141
        except Exception as error:
            if debug and not hasattr(error, "signum"):
                raise
            code, line = describe(error, out_of_memory)
            print_error("; ".join([line, *getattr(error, "__notes__", ())]))  # a Trainer notes what was saved before
            return code


def describe(error: Exception, out_of_memory: str) -> tuple[int, str]:
    """Return the exit code for `error`, and its line: what went wrong, where, and what to do."""
    text = str(error).strip()
    if "Original Traceback" in text:  # from a worker of a DataLoader: the last line is the error
        text = text.splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split())
    if hasattr(error, "signum"):
        return 128 + error.signum, text
    if isinstance(error, MissingExtra):
        return 3, f"error: {text}"
    if is_out_of_memory(error):
        size = re.search(r"allocate ([\d.,]+ \w+)", text)
        line = "error: out of memory" + (f": cannot allocate {size[1]}" if size else "")
        return 1, f"{line}; {out_of_memory}" if out_of_memory else line
    if isinstance(error, OSError) and error.strerror:
        name = str(error.filename or "")
        text = error.strerror + (f": {name if len(name) < 200 else ends(name)}" if name else "")
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            text += "; make room, permit it, or choose another place"
    code = 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1
    ours = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]  # such as NonFiniteLoss
    if text and (ours or isinstance(error, (ValueError, OSError))):
        return code, f"error: {text}"
    return code, f"error: {type(error).__name__}: {text} (--debug shows the traceback)"


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory was asked for that a CPU or an accelerator does not have."""
    said = r"out of memory|can't allocate memory|you tried to allocate|ALLOC_FAILED"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(re.search(said, str(error))))


def print_error(text: str) -> None:
    """Print `text` as one line on stderr."""
    print(shortened(text), file=sys.stderr, flush=True)
