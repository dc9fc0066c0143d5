"""Runnable lessons: a script is a list of sections, and each section checks what it shows.

A script makes one `Sections`, decorates its functions with it, and hands its arguments to `run`:

    section = Sections(__doc__)

    @section("autograd.accumulate", "A2")
    def accumulate() -> None:
        \"\"\"Gradients add up until they are cleared.\"\"\"
        w = torch.tensor(2.0, requires_grad=True)
        (3 * w).backward()
        show("w.grad after one backward", w.grad, 3.0)

    def main(argv: list[str] | None = None) -> int:
        return section.run(argv)

A section that shows nothing fails; one that cannot run here calls `skip` and says why. This file imports nothing but
torch and can be copied away alone.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import io
import json
import math
import os
import random
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn
from unittest import SkipTest

import torch
from torch import Tensor

__all__ = ["Mismatch", "Parser", "Section", "Sections", "show", "show_error", "skip"]

# Relative and absolute tolerances, those of torch.testing.assert_close; Python floats count as float32.
_RTOL = {torch.float16: 1e-3, torch.bfloat16: 1.6e-2, torch.float32: 1.3e-6, torch.float64: 1e-7}
_ATOL = {torch.float16: 1e-5, torch.bfloat16: 1e-5, torch.float32: 1e-5, torch.float64: 1e-7}
_shown: list[dict[str, Any]] = []  # what the running section has shown


class Mismatch(AssertionError):
    """A shown value is not the expected one."""


def show(label: str, value: Any, expected: Any, *, rtol: float | None = None, atol: float | None = None) -> None:
    """Compare a value with the expected one, then print it; raise Mismatch, and print nothing, if they differ.

    Tensors, numbers, and nested lists of them are compared by shape and within a tolerance for the value's dtype, which
    `rtol` (relative) and `atol` (absolute) replace; integers, booleans and all else must be equal. Dtype and device of
    tensors are not compared: show `x.dtype` for that.
    """
    if not _agree(value, expected, rtol, atol):
        raise Mismatch(f"{label}: expected {_plain(expected)}, got {_plain(value)}")  # all digits
    _record(label, value, expected)


def show_error(label: str, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """Call, and print the first line of the error; raise Mismatch unless it is an `error` that says `message`."""
    expected = f"{error.__name__}: ...{message}..."
    try:
        call()
    except Exception as caught:
        actual = f"{type(caught).__name__}: {caught}"
        if not isinstance(caught, error) or message not in str(caught):
            raise Mismatch(f"{label}: expected {expected}, got {actual}") from caught
    else:
        raise Mismatch(f"{label}: expected {expected}, got no error")
    _record(label, textwrap.shorten(actual.strip().splitlines()[0], 150, placeholder=" ..."), expected)


def skip(reason: str) -> NoReturn:
    """Leave the running section, which cannot run here; the reason says what is absent and how to get it."""
    raise SkipTest(reason)


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line: for the options that a script hands to `Sections.run`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


@dataclass(frozen=True)
class Section:
    """One lesson: its name ("topic.thing"), coverage IDs, and function, which gets the device if it takes one."""

    name: str
    covers: tuple[str, ...]
    function: Callable[..., None]

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").partition("\n")[0]


@dataclass
class Sections:
    """The sections of one script, in order of definition; calling it returns the decorator that adds a section."""

    description: str | None = None
    sections: dict[str, Section] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # lines that the summary of a run ends with

    def __call__(self, name: str, *covers: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
        def add(function: Callable[..., None]) -> Callable[..., None]:
            if name in self.sections:
                raise ValueError(f"expected a new section name, got {name!r} twice")
            self.sections[name] = Section(name, covers, function)
            return function

        return add

    def run(self, argv: list[str] | None = None, parents: Sequence[argparse.ArgumentParser] = ()) -> int:
        """Run the sections that the arguments name and return the exit code.

        0: none failed; 1: one failed; 2: bad arguments; 130: Ctrl-C; 141: the reader of the output has gone. `parents`
        are argparse's: parsers of options that the script itself looks at.
        """
        try:
            try:
                return self._run(self._parse_args(argv, parents))
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except KeyboardInterrupt:
            return 130
        except OSError as error:  # the output takes no more: say none, to the last flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):  # such as `| head`
                return 141
            print(f"error: {error.filename or 'standard output'}: {error.strerror or error}", file=sys.stderr)
            return 1

    def _run(self, args: argparse.Namespace) -> int:
        try:
            chosen, device = self._choose(args.section), _find_device(args.device)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if args.list:
            rows = [{"name": s.name, "covers": s.covers, "summary": s.summary} for s in chosen]
            lines = [f"{s.name:<26}  {' '.join(s.covers):<8}  {s.summary}" for s in chosen]
            print(json.dumps({"sections": rows}) if args.json else "\n".join(lines))
            return 0
        self.notes.clear()
        with contextlib.redirect_stdout(io.StringIO()) if args.json else contextlib.nullcontext():
            results = [_run_one(section, device, args.seed, args.debug) for section in chosen]
        passed = all(r["passed"] for r in results)
        if args.json:
            print(json.dumps({"passed": passed, "sections": results, "notes": self.notes}))
        else:
            _print_summary(results, self.notes)
        return 0 if passed else 1

    def _parse_args(self, argv: list[str] | None, parents: Sequence[argparse.ArgumentParser]) -> argparse.Namespace:
        parser = Parser(description=self.description, parents=list(parents), allow_abbrev=False)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("--list", action="store_true", help="list sections and their IDs (default: run them)")
        parser.add_argument("--section", action="append", metavar="NAME", help="only this; repeatable (default: all)")
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
        parser.add_argument("--seed", type=int, default=0, help="random seed of every section (default: 0)")
        parser.add_argument("--json", action="store_true", help="print the results as JSON (default: as text)")
        parser.add_argument("--debug", action="store_true", help="print tracebacks of failures (default: one line)")
        args = parser.parse_args(argv)
        if not 0 <= args.seed < 2**32:
            parser.error(f"--seed must be from 0 to {2**32 - 1}, got {args.seed}")
        return args

    def _choose(self, names: list[str] | None) -> list[Section]:
        for name in names or []:
            if name not in self.sections:
                near = difflib.get_close_matches(name, self.sections, cutoff=0.4)
                hint = f"did you mean {' or '.join(near)}?" if near else "see --list"
                raise ValueError(f"--section: expected a section of this script, got {name!r}; {hint}")
        return [section for name, section in self.sections.items() if not names or name in names]


def _run_one(section: Section, device: torch.device, seed: int, debug: bool) -> dict[str, Any]:
    """Run one section and return its result; whatever it raises fails this section only."""
    print(f"{section.name}  {' '.join(section.covers)}\n  {section.summary}")
    _shown.clear()
    failure = skipped = None
    try:
        with _isolated(device, seed):
            section.function(*[device] if inspect.signature(section.function).parameters else [])
        if not _shown:
            raise Mismatch("expected a value from show(), or skip(); got neither")
    except SkipTest as reason:
        skipped = str(reason)
        print(f"    skipped: {skipped}")
    except Exception as error:
        if debug:
            traceback.print_exc()
        failure = " ".join(f"{type(error).__name__}: {error}".split()).removeprefix("Mismatch: ")
        print(f"    FAILED {failure}")
    print()
    outcome = {"passed": failure is None, "error": failure, "skipped": skipped, "values": list(_shown)}
    return {"name": section.name, "covers": section.covers, **outcome}


def _print_summary(results: list[dict[str, Any]], notes: list[str]) -> None:
    failed = [r["name"] for r in results if r["error"] is not None]
    skipped = [r["name"] for r in results if r["skipped"] is not None]
    passed, values = len(results) - len(failed) - len(skipped), sum(len(r["values"]) for r in results)
    count = f"{len(skipped)} skipped, " if skipped else ""
    print(f"{passed} of {len(results)} sections passed, {count}{values} values checked")
    for kind, names in (("skipped", skipped), ("failed", failed)):
        if names:
            print(f"{kind}: {', '.join(names)}")
    for line in notes:
        print(line)


@contextlib.contextmanager
def _isolated(device: torch.device, seed: int) -> Iterator[None]:
    """Start from the seed, and put back the global state that a section may change."""
    dtype, default_device = torch.get_default_dtype(), torch.get_default_device()
    threads, python_state = torch.get_num_threads(), random.getstate()
    devices = [] if device.type == "cpu" else [device.index or 0]
    anomaly = torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled())
    with torch.random.fork_rng(devices, device_type=device.type), torch.set_grad_enabled(True), anomaly:
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            if torch.get_default_device() != default_device:
                torch.set_default_device(None if default_device.type == "cpu" else default_device)
            torch.set_num_threads(threads)
            random.setstate(python_state)


def _find_device(name: str) -> torch.device:
    """Return the device; "auto" is the accelerator, if there is one. Raises ValueError if the device is not here."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    here = "cpu" if accelerator is None else f"cpu and {accelerator.type}"
    with contextlib.suppress(RuntimeError, AssertionError):
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type in here.split():
            return device
    raise ValueError(f"--device: {name!r} is not available here; use auto or one of: {here}")


def _agree(value: Any, expected: Any, rtol: float | None, atol: float | None) -> bool:
    if isinstance(value, Tensor | float) or isinstance(expected, Tensor):
        return _numbers_agree(value, expected, rtol, atol)
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        pairs = zip(value, expected, strict=False)
        return len(value) == len(expected) and all(_agree(*pair, rtol, atol) for pair in pairs)
    return type(value == expected) is bool and value == expected


def _numbers_agree(value: Any, expected: Any, rtol: float | None, atol: float | None) -> bool:
    try:
        v, e = _double(value), _double(expected)
    except (TypeError, ValueError, RuntimeError):  # not numbers: a string, None, a ragged list
        return False
    dtype = value.dtype.to_real() if isinstance(value, Tensor) else torch.float32
    rtol, atol = _RTOL.get(dtype, 0.0) if rtol is None else rtol, _ATOL.get(dtype, 0.0) if atol is None else atol
    return v.shape == e.shape and v.dtype == e.dtype and torch.allclose(v, e, rtol=rtol, atol=atol, equal_nan=True)


def _double(value: Any) -> Tensor:
    tensor = torch.as_tensor(value, device="cpu").detach()  # to the CPU first: mps has no float64
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _record(label: str, value: Any, expected: Any) -> None:
    _shown.append({"label": label, "value": _plain(value), "expected": _plain(expected)})
    start = f"    {label:<44}  "
    print(start + textwrap.indent(_text(value), " " * len(start)).lstrip())


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    return str(value.detach() if isinstance(value, Tensor) else value)


def _plain(value: Any) -> Any:
    """Return the value as JSON can hold it: non-finite numbers, dtypes and the like become text."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    as_it_is = isinstance(value, int | str | None) or (isinstance(value, float) and math.isfinite(value))
    return value if as_it_is else str(value)
