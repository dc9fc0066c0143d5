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
        self.lessons: dict[str, Lesson] = {}
        self.covers: dict[str, tuple[str, ...]] = {}  # coverage IDs, for --list

    def __call__(self, name: str, *covers: str) -> Callable[[Lesson], Lesson]:
        def add(function: Lesson) -> Lesson:
            if name in self.lessons:
                raise ValueError(f"expected a new section name, got {name!r} twice")
            self.lessons[name], self.covers[name] = function, covers
            return function

        return add

    def run(self, argv: list[str] | None = None) -> int:
        """Run the sections. Return 0, 1 if one failed, 2 for bad arguments, 130 after Ctrl-C, 141 after `| head`."""
        parser = _Parser(description=self.description, allow_abbrev=False)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("--list", action="store_true", help="list the sections and their coverage IDs")
        parser.add_argument("--section", action="append", metavar="NAME", help="run only this one; repeatable")
        parser.add_argument("--quiet", action="store_true", help="print one line per section, and failures in full")
        parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, xpu (default: auto)")
        args = parser.parse_args(argv)
        names = args.section or list(self.lessons)
        for name in names:
            if name not in self.lessons:
                near = difflib.get_close_matches(name, self.lessons, cutoff=0.4)
                parser.error(f"--section: there is no {name!r}; did you mean {' or '.join(near) or 'one of --list'}?")
        try:
            device = _find_device(args.device)
        except (RuntimeError, AssertionError):  # the latter from a torch without CUDA
            parser.error(f"--device: {args.device!r} is not available here; use auto or cpu")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal must not stop the lessons
        try:
            code = self._list(names) if args.list else self._run(names, device, args.quiet)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the last flush must not fail again
            return 141

    def _list(self, names: list[str]) -> int:
        for name in names:
            title = (inspect.getdoc(self.lessons[name]) or "").partition("\n")[0]
            print(f"{name:<26}  {' '.join(self.covers[name]):<8}  {title}")
        return 0

    def _run(self, names: list[str], device: torch.device, quiet: bool) -> int:
        pages = {}
        for name in names:
            page = pages[name] = _Page(self.lessons[name])
            if not quiet:  # before the code runs: it may take seconds
                title, _, reason = (inspect.getdoc(self.lessons[name]) or "").partition("\n")
                print(_color("1", _fill(f"{name}: {title}")), end="\n\n", flush=True)
                print(_fill(reason.strip()), end="\n\n" if reason else "", flush=True)
            page.run(device)
            if not quiet or page.failed:
                print(page.text(), end="\n\n")
            if quiet:
                print(f"{name}: {page.verdict()}", flush=True)
        failed = [name for name in names if pages[name].failed]
        skipped = [name for name in names if pages[name].skipped]
        passed = len(names) - len(failed) - len(skipped)
        values = sum(page.right for page in pages.values())
        print(f"{passed} of {len(names)} sections passed, {values} values as expected")
        for label, found in (("skipped", skipped), ("failed", failed)):
            if found:
                print(f"{label}: {', '.join(found)}")
        for paragraph in self.description.split("\n\n"):
            if paragraph.startswith("Try:") and not quiet and len(names) == len(self.lessons):
                print(f"\n{_fill(paragraph)}")
        return 1 if failed else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")  # one line, without the usage


class _Page:
    """One run of a lesson: its code, and what each line of it showed or printed."""

    now: _Page  # the one that runs

    def __init__(self, function: Lesson) -> None:
        self.function = inspect.unwrap(function)
        lines, self.start = inspect.getsourcelines(self.function)
        self.source = textwrap.dedent(re.sub(r" +# (type: ignore(\[[^]]*\])?|noqa.*)", "", "".join(lines)))
        self.lines = ["", *self.source.splitlines()]  # counted from 1, as ast does
        self.owner: dict[int, Any] = {}  # for each line, the statement or loop that its results follow
        self.shown: dict[int, tuple[str, str]] = {}  # for each line of a show(...), its expression and comment
        definition: Any = ast.parse(self.source).body[0]
        for statement in definition.body:
            self._read(statement, in_loop=False)
        documented = ast.get_docstring(definition) is not None
        self.first = definition.body[0].end_lineno + 1 if documented else definition.body[0].lineno
        self.last = len(self.lines) - 1
        self.results: list[tuple[int, str, str | None]] = []  # line, text, what was expected instead (None: no check)
        self.right, self.failed, self.skipped = 0, False, ""

    def _read(self, node: Any, in_loop: bool) -> None:
        if isinstance(node, ast.stmt):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            if not in_loop:
                self.owner.update(dict.fromkeys(lines, node))
            if _is_show(node):
                shown = node.value.args[0]  # type: ignore[attr-defined]
                expression = shown.body if isinstance(shown, ast.Lambda) else shown
                comment = "".join(re.findall(r"\)  # (.*)$", self.lines[lines[-1]]))
                text = ast.get_source_segment(self.source, expression) or ""
                self.shown.update(dict.fromkeys(lines, (text, comment)))
        for child in ast.iter_child_nodes(node):
            self._read(child, in_loop or isinstance(node, ast.For | ast.While | ast.FunctionDef))

    def run(self, device: torch.device) -> None:
        """Run the lesson from a fixed seed; whatever it raises fails this lesson only."""
        _Page.now = self
        torch.manual_seed(0)
        random.seed(0)
        try:
            with contextlib.redirect_stdout(_Printed()):
                self.function(*[device] if inspect.signature(self.function).parameters else [])
            if not self.right and not self.failed:
                self.add("nothing was shown", "a call of show()")
        except Exception as error:
            frames = list(traceback.walk_tb(error.__traceback__))[::-1]
            if isinstance(error, SkipTest):
                self.skipped = str(error)
                self.add(f"skipped: {error}", None, frames)
            else:
                self.add(f"{type(error).__name__}: {error}", "no error", frames)
            self.last = self.owner[self.results[-1][0]].end_lineno  # the rest has not run

    def add(self, text: str, wrong: str | None, frames: Any = None) -> None:
        """Note a result of the line that runs, or of the one that raised (`frames`, the innermost first)."""
        for frame, number in frames or traceback.walk_stack(sys._getframe()):
            line = number - self.start + 1
            if frame.f_code.co_filename == self.function.__code__.co_filename and line in self.owner:
                break
        else:
            line = max(self.owner)  # nothing was shown, or another thread prints
        self.results.append((line, text, wrong))
        self.right += wrong == ""
        self.failed |= bool(wrong)

    def verdict(self) -> str:
        """Return the outcome in a few words."""
        if self.failed:
            return "FAILED"
        return f"skipped: {self.skipped}" if self.skipped else f"passed, values: {self.right}"

    def text(self) -> str:
        """Return the code, with the results after the statement or loop that they belong to."""
        printed = []
        number = self.first
        while number <= self.last:
            owner = self.owner.get(number)
            end = owner.end_lineno if owner and _is_show(owner) else number
            code = self.lines[number : end + 1]
            results = [result for result in self.results if self.owner[result[0]].end_lineno == end]
            if not (_is_show(owner) and results):  # otherwise the value stands beside the expression
                printed += [_color("2", line) for line in code]
            for line, text, wrong in results:
                indent = " " * self.owner[line].col_offset
                printed.append(_layout(indent, *self.shown.get(line, ("", "")), text, wrong))
            number = end + 1
        return "\n".join(printed).strip("\n")


class _Printed(io.TextIOBase):
    """The standard output of a running lesson."""

    rest = ""  # of a line that isn't complete

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            _Page.now.add(line, None)
        return len(text)


def _is_show(node: Any) -> bool:
    """Return whether a statement of the source is a call of show or show_error."""
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("show", "show_error")


def _fill(text: str) -> str:
    """Break the lines of a paragraph anew if one of them is too long."""
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(textwrap.fill(p, WIDTH) if max(map(len, p.split("\n"))) > WIDTH else p for p in paragraphs)


def _layout(indent: str, expression: str, comment: str, text: str, wrong: str | None) -> str:
    """Return one result as printed: `expression  → text   ✓  # comment`, with line breaks if that is too long."""
    if wrong is None:
        return indent + _color("1", text)
    mark = _color("31;1", f"✗ expected {wrong}") if wrong else _color("32", "✓")
    *above, last = f"{indent}{expression}".split("\n")
    last, lines = last.ljust(32) if expression else indent, text.splitlines() or [""]
    margin = len(last) + len(" → ")
    if margin + max(map(len, lines)) + len("   ✓") <= WIDTH:
        start = f"{_color('2', last)} → "
    else:
        start, margin = f"{_color('2', last.rstrip())}\n{indent}    → ", len(indent) + len("    → ")
        if len(lines) == 1:  # a table keeps its lines
            lines = textwrap.wrap(text, WIDTH - margin - len("   ✓"))
    if margin + len(lines[-1]) + len("   ✓  # ") + len(comment) <= WIDTH:
        mark += _color("2", f"  # {comment}" if comment else "")
    elif comment:
        above.insert(0, f"{indent}# {comment}")
    value = "\n".join([lines[0], *(" " * margin + line if line else "" for line in lines[1:])])
    return "\n".join([*(_color("2", line) for line in above), f"{start}{_color('1', value)}   {mark}"])


def _color(code: str, text: str) -> str:
    """Return the text in an ANSI style: 1 bold, 2 dim, 31 red, 32 green; unchanged unless this is a terminal."""
    plain = not text or not sys.stdout.isatty() or os.environ.get("NO_COLOR")
    return text if plain else f"\033[{code}m{text}\033[0m"


def _find_device(name: str) -> torch.device:
    """Return the device; "auto" is the accelerator, if there is one. Raises if the device is not here."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device(name) if name != "auto" else accelerator or torch.device("cpu")
    torch.empty(1, device=device)
    return device


def _agree(value: Any, expected: Any, rtol: float | None, atol: float | None) -> bool:
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        pairs = zip(value, expected, strict=False)
        return len(value) == len(expected) and all(_agree(*pair, rtol, atol) for pair in pairs)
    if not isinstance(value, Tensor | float) and not isinstance(expected, Tensor):
        return type(value == expected) is bool and value == expected
    try:
        actual = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64).detach().cpu()
        if actual.is_floating_point():  # expected numbers in the value's precision
            expected = torch.as_tensor(expected, dtype=actual.dtype)
        torch.testing.assert_close(
            actual, torch.as_tensor(expected).cpu(), rtol=rtol, atol=atol, equal_nan=True, check_dtype=False
        )
    except (AssertionError, TypeError, ValueError, RuntimeError):  # the last three: not numbers, or a ragged list
        return False
    return True


def _text(value: Any) -> str:
    if isinstance(value, float):
        return str(value) if len(str(value)) < 10 else f"{value:.6g}"
    if type(value) in (list, tuple):
        items = ", ".join(repr(item) if isinstance(item, str) else _text(item) for item in value)
        return f"[{items}]" if type(value) is list else f"({items}{',' * (len(value) == 1)})"
    return str(value.detach() if isinstance(value, Tensor) else value)
