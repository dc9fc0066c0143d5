"""Lessons that print their own code, with each value beside the line that made it, and check these values.

    section = Sections(__doc__)

    @section("autograd.accumulate", "A2")
    def accumulate() -> None:
        \"\"\"Gradients add up until they are cleared.\"\"\"
        w = torch.tensor(2.0, requires_grad=True)
        (3 * w).backward()
        show(w.grad, 3.0)  # printed as: w.grad    → tensor(3.)   ✓

    def main(argv: list[str] | None = None) -> int:
        return section.run(argv)

Running a section prints its docstring and its code. What the code prints follows its line. A section fails if a value
is wrong, if it raises, and if it shows nothing. A full run ends with the paragraph "Try: ..." of the description.
This file imports nothing but torch and can be copied alone.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import inspect
import io
import os
import random
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import Any, NoReturn
from unittest import SkipTest

import torch
from torch import Tensor

__all__ = ["Sections", "show", "show_error", "skip"]

WIDTH = 80  # columns
Lesson = Callable[..., None]


def show(value: Any, expected: Any, *, rtol: float | None = None, atol: float | None = None) -> None:
    """Print the value beside its expression, with ✓ if it is the expected one. Otherwise the section fails.

    Tensors and floats, also in lists and tuples, are compared by torch.testing.assert_close with the tolerances of the
    value's dtype, or with `rtol` (relative) and `atol` (absolute); if only one is given, the other is 0. Dtype and
    device may differ: show `x.dtype` for that. Everything else is compared by `==`.
    """
    if rtol is not None or atol is not None:
        rtol, atol = rtol or 0.0, atol or 0.0
    _Page.now.add(_text(value), "" if _agree(value, expected, rtol, atol) else _text(expected))


def show_error(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """Call, and print the first line of the error, with ✓ if it is an `error` that contains `message`."""
    wrong, text = f"{error.__name__}: ...{message}...", "no error"
    try:
        call()
    except Exception as caught:
        text = f"{type(caught).__name__}: {str(caught).strip()}".partition("\n")[0]
        if isinstance(caught, error) and message in str(caught):
            wrong = ""
    _Page.now.add(text, wrong)


def skip(reason: str) -> NoReturn:
    """Leave the running section, which cannot run here; the reason says what is missing."""
    raise SkipTest(reason)


class Sections:
    """The sections of one script, in order of definition. Calling it returns the decorator that adds one."""

    def __init__(self, description: str | None = None) -> None:
        self.description = description or ""
        self.pages: dict[str, _Page] = {}

    def __call__(self, name: str, *covers: str) -> Callable[[Lesson], Lesson]:
        def add(lesson: Lesson) -> Lesson:
            if name in self.pages:
                raise ValueError(f"expected a new section name, got {name!r} twice")
            self.pages[name] = _Page(name, covers, lesson)
            return lesson

        return add

    def run(self, argv: list[str] | None = None) -> int:
        """Run the sections. Return 0, 1 if one failed, 2 for bad arguments, 130 after Ctrl-C, 141 after `| head`."""
        parser = _Parser(description=self.description, allow_abbrev=False)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("--list", action="store_true", help="list the sections and their coverage IDs")
        parser.add_argument("--section", action="append", metavar="NAME", help="run only this one; repeatable")
        parser.add_argument("--quiet", action="store_true", help="print one line per section, and failures in full")
        parser.set_defaults(device="cpu")  # an accelerator would take seconds to start, for nothing
        if any(page.takes_device for page in self.pages.values()):
            parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, xpu (default: auto)")
        args = parser.parse_args(argv)
        for name in args.section or []:
            if name not in self.pages:
                near = difflib.get_close_matches(name, self.pages, cutoff=0.4)
                parser.error(f"--section: there is no {name!r}; did you mean {' or '.join(near) or 'one of --list'}?")
        try:
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device = torch.device(args.device if args.device != "auto" else accelerator or "cpu")
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError):  # the latter from a torch without CUDA
            parser.error(f"--device: {args.device!r} is not available here; use auto or cpu")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal must not stop the lessons
        pages = [self.pages[name] for name in args.section or self.pages]
        try:
            if args.list:
                print("\n".join(page.entry for page in pages))
                return 0
            return self._run(pages, device, args.quiet)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the last flush must not fail again
            return 141

    def _run(self, pages: list[_Page], device: torch.device, quiet: bool) -> int:
        whole = len(pages) == len(self.pages) and not quiet
        if whole:
            print("Behind → is a value. A tick: as expected, by another calculation (= ...).\n")
        for page in pages:
            if not quiet:  # before the code runs: it may take seconds
                print(*(textwrap.fill(part, WIDTH) + "\n" for part in page.heading), sep="\n", flush=True)
            page.run(device)
            if not quiet or page.failed:
                print("\n".join(page.printed).strip("\n"), end="\n\n")
            if quiet:
                verdict = "FAILED" if page.failed else page.skipped or f"passed, values: {page.right}"
                print(f"{page.name}: {verdict}", flush=True)
        failed = [page.name for page in pages if page.failed]
        skipped = [page.name for page in pages if page.skipped]
        passed = len(pages) - len(failed) - len(skipped)
        print(f"{passed} of {len(pages)} sections passed, {sum(page.right for page in pages)} values as expected")
        for label, names in (("skipped", skipped), ("failed", failed)):
            if names:
                print(f"{label}: {', '.join(names)}")
        for paragraph in self.description.split("\n\n"):
            if paragraph.startswith("Try:") and whole:
                print(f"\n{textwrap.fill(paragraph, WIDTH)}")
        sys.stdout.flush()
        return 1 if failed else 0


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but refuse `--option=--`, for which argparse would give an empty list."""
        args = sys.argv[1:] if args is None else list(args)
        for word in args:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word[:-3]}: expected a value, got '--'")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print `message`, or both ends of a long one, in one line without the usage."""
        if len(message) > 200:  # it quotes a long value
            message = f"{message[:60]}...{message[-40:]}"
        self.exit(2, f"error: {message}\n")


class _Page(io.TextIOBase):
    """A lesson as it is printed: its code, and after each statement its results. Also the lesson's standard output."""

    now: _Page  # the one that runs
    rest = ""  # of a line that the lesson has not printed completely

    def __init__(self, name: str, covers: tuple[str, ...], lesson: Lesson) -> None:
        self.name = name
        self.lesson = lesson
        self.takes_device = bool(inspect.signature(lesson).parameters)
        title, *reasons = (inspect.getdoc(lesson) or "").split("\n\n")
        self.entry = f"{name:<26}  {' '.join(covers):<8}  {title}"  # in --list
        self.heading = [f"{name}: {title}", *reasons]
        lines, self.start = inspect.getsourcelines(lesson)
        self.source = textwrap.dedent(re.sub(r" +# type: ignore\S*", "", "".join(lines)))
        self.lines = ["", *self.source.splitlines()]  # counted from 1, as ast does
        # outer ones before inner ones; the first two are the function and its docstring
        self.statements: list[Any] = [node for node in ast.walk(ast.parse(self.source)) if isinstance(node, ast.stmt)]

    def run(self, device: torch.device) -> None:
        """Run the lesson from a fixed seed. Whatever it raises fails this lesson only."""
        _Page.now = self
        self.printed: list[str] = []
        self.next = self.statements[1].end_lineno + 1  # the first line that isn't printed yet
        self.right = 0
        self.failed = False
        self.skipped = ""
        self.plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
        torch.manual_seed(0)
        random.seed(0)
        try:
            with contextlib.redirect_stdout(self):
                self.lesson(*[device] if self.takes_device else [])
            self.add_code(len(self.lines))
            if not self.right and not self.failed:
                self.add("nothing was shown", "a call of show()")
        except SkipTest as reason:
            self.skipped = f"skipped: {reason}"
            self.add(self.skipped, None, reason)
        except Exception as error:
            self.add(f"{type(error).__name__}: {error}", "no error", error)

    def write(self, text: str) -> int:
        """Add each complete line that the lesson prints."""
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.add(line, None)
        return len(text)

    def add(self, text: str, wrong: str | None, error: Exception | None = None) -> None:
        """Add the code up to the statement that runs, or that raised `error`, and its result.

        `wrong` is what was expected instead: "" if the text is right, None if nothing was expected.
        """
        frames = traceback.walk_tb(error.__traceback__) if error else traceback.walk_stack(sys._getframe())
        numbers = [number - self.start + 1 for frame, number in frames if frame.f_code is self.lesson.__code__]
        line = numbers[0] if numbers else self.next - 1  # the latter after the lesson's end, and in other threads
        around = [statement for statement in self.statements if statement.lineno <= line <= statement.end_lineno]
        loops = [statement for statement in around if isinstance(statement, ast.For | ast.While)]
        owner = [*loops, around[-1]][0]  # what the result follows
        expression = origin = ""
        match around[-1]:
            case ast.Expr(ast.Call(ast.Name(name), [ast.Lambda(body=shown) | shown, other, *_])) if "show" in name:
                expression = ast.get_source_segment(self.source, shown) or ""
                names = {node.id for node in ast.walk(other) if isinstance(node, ast.Name)}
                if name == "show" and names - {"torch"}:  # the expected value was computed: say how
                    origin = " = " + " ".join((ast.get_source_segment(self.source, other) or "").split())
        comment = "".join(re.findall(r"\)  # (.*)$", self.lines[around[-1].end_lineno])) if expression else ""
        self.add_code(owner.lineno if expression and not loops else owner.end_lineno + 1)
        indent = " " * owner.col_offset
        if wrong is None:
            self.printed.append(indent + self.style("1", text))
            return
        self.printed.append(self.layout(indent, expression, comment, text, wrong, origin))
        self.next = max(self.next, owner.end_lineno + 1)  # a result replaces its show
        self.right += wrong == ""
        self.failed |= wrong != ""

    def add_code(self, end: int) -> None:
        self.printed += [self.style("2", line) for line in self.lines[self.next : end]]
        self.next = max(self.next, end)

    def layout(self, indent: str, expression: str, comment: str, text: str, wrong: str, origin: str) -> str:
        """Return `expression  → text   ✓ = origin  # comment`, on several lines if that is too long."""
        above = []
        start = f"{indent}{expression}".ljust(32) + " → "
        values = text.splitlines() or [""]
        room = WIDTH - len(start) - max(map(len, values)) - len("   ✓")
        note = f"  # {comment}" if comment else ""
        if len(note) > max(room, 0):
            above.append(f"{indent}# {comment}")
            note = ""
        if room < 0:
            above.append(f"{indent}{expression}")
            start = f"{indent}    → "
            if len(values) == 1:  # a table keeps its lines
                values = textwrap.wrap(text, WIDTH - len(start) - len("   ✓"))
        value = textwrap.indent("\n".join(values), " " * len(start)).lstrip()
        mark = self.style("31;1", f"✗ expected {wrong}") if wrong else self.style("32", "✓")
        if len(origin) > max(room - len(note), 0):
            origin = "\n" + textwrap.indent(textwrap.fill(origin.strip(), WIDTH - len(start)), " " * len(start))
        result = f"{self.style('2', start)}{self.style('1', value)}   {mark}{self.style('2', origin + note)}"
        return "\n".join([*(self.style("2", line) for line in above if line.strip()), result])

    def style(self, code: str, text: str) -> str:
        """Return the text in an ANSI style: 1 bold, 2 dim, 31 red, 32 green; unchanged unless this is a terminal."""
        return text if self.plain or not text else f"\033[{code}m{text}\033[0m"


def _agree(value: Any, expected: Any, rtol: float | None, atol: float | None) -> bool:
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        pairs = zip(value, expected, strict=False)
        return len(value) == len(expected) and all(_agree(*pair, rtol, atol) for pair in pairs)
    if isinstance(value, float):
        value = torch.tensor(value, dtype=torch.float64)
    if not isinstance(value, Tensor):
        return bool(value == expected)
    try:
        # whole numbers keep their dtype: 1.7 isn't 1
        wanted = torch.as_tensor(expected, dtype=value.dtype if value.is_floating_point() else None)
        torch.testing.assert_close(value.cpu(), wanted.cpu(), rtol=rtol, atol=atol, equal_nan=True, check_dtype=False)
    except (AssertionError, TypeError, ValueError, RuntimeError):  # the last three: not numbers, or a ragged list
        return False
    return True


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.detach())
    if type(value) in (list, tuple):
        value = type(value)(item.detach() if isinstance(item, Tensor) else item for item in value)
    return re.sub(r"\d+\.\d{7,}(e-?\d+)?", lambda number: f"{float(number[0]):.6g}", str(value))
