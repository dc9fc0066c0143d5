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

This file imports nothing but torch and can be copied away alone.
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

import torch
from torch import Tensor

__all__ = ["Mismatch", "Section", "Sections", "show", "show_error"]

# Relative and absolute tolerance, those of torch.testing.assert_close; Python floats count as float32.
_TOLERANCES = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
    torch.complex64: (1.3e-6, 1e-5),
    torch.complex128: (1e-7, 1e-7),
}
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


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

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

    def run(self, device: torch.device, seed: int) -> None:
        with _isolated(device, seed):
            self.function(*[device] if inspect.signature(self.function).parameters else [])


@dataclass
class Sections:
    """The sections of one script, in order of definition; calling it returns the decorator that adds a section."""

    description: str | None = None
    sections: dict[str, Section] = field(default_factory=dict)

    def __call__(self, name: str, *covers: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
        def add(function: Callable[..., None]) -> Callable[..., None]:
            if name in self.sections:
                raise ValueError(f"expected a new section name, got {name!r} twice")
            self.sections[name] = Section(name, covers, function)
            return function

        return add

    def run(self, argv: list[str] | None = None, parents: Sequence[argparse.ArgumentParser] = ()) -> int:
        """Run the sections that the arguments name; return 0 if all passed, 1 if one failed, 2 for bad arguments.

        `parents` are argparse's: parsers of options that the script itself looks at.
        """
        args = self._parse_args(argv, parents)
        try:
            code = self._run(args)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of our output, such as `head`, has gone: say no more, to the last flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return code

    def _run(self, args: argparse.Namespace) -> int:
        if args.list:
            self._print_list()
            return 0
        try:
            chosen, device = self._choose(args.section), _find_device(args.device)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        quiet = contextlib.redirect_stdout(io.StringIO()) if args.json else contextlib.nullcontext()
        with quiet:
            results = [_run_one(section, device, args.seed, args.debug) for section in chosen]
            _print_summary(results)
        if args.json:
            print(json.dumps({"passed": all(r["passed"] for r in results), "sections": results}))
        return 0 if all(r["passed"] for r in results) else 1

    def _parse_args(self, argv: list[str] | None, parents: Sequence[argparse.ArgumentParser]) -> argparse.Namespace:
        parser = _Parser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter, parents=list(parents)
        )
        parser.add_argument("--list", action="store_true", help="list the sections with their coverage IDs, and stop")
        parser.add_argument(
            "--section", action="append", metavar="NAME", help="run this section only; repeatable (default: all)"
        )
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
        parser.add_argument("--seed", type=int, default=0, help="random seed of every section (default: 0)")
        parser.add_argument("--json", action="store_true", help="print the results as JSON (default: as text)")
        parser.add_argument("--debug", action="store_true", help="print tracebacks of failures (default: one line)")
        return parser.parse_args(argv)

    def _print_list(self) -> None:
        width = max((len(name) for name in self.sections), default=0)
        for name, section in self.sections.items():
            print(f"{name:<{width}}  {' '.join(section.covers):<8}  {section.summary}")

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
    failure = None
    try:
        section.run(device, seed)
    except Exception as error:
        if debug:
            traceback.print_exc()
        kind = "" if isinstance(error, Mismatch) else f"{type(error).__name__}: "
        failure = kind + " ".join(str(error).split())
        print(f"    FAILED {failure}")
    print()
    return {
        "name": section.name,
        "covers": list(section.covers),
        "passed": failure is None,
        "error": failure,
        "values": list(_shown),
    }


def _print_summary(results: list[dict[str, Any]]) -> None:
    failed = [r["name"] for r in results if not r["passed"]]
    values = sum(len(r["values"]) for r in results)
    print(f"{len(results) - len(failed)} of {len(results)} sections passed, {values} values checked")
    if failed:
        print(f"failed: {', '.join(failed)}")


@contextlib.contextmanager
def _isolated(device: torch.device, seed: int) -> Iterator[None]:
    """Start from the seed, and put back the global state that a section may change."""
    dtype, default_device = torch.get_default_dtype(), torch.get_default_device()
    threads, python_state = torch.get_num_threads(), random.getstate()
    devices = [] if device.type == "cpu" else [device.index or 0]
    device_type = "cuda" if device.type == "cpu" else device.type
    anomaly = torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled())
    with torch.random.fork_rng(devices, device_type=device_type), torch.set_grad_enabled(True), anomaly:
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
    try:
        device = torch.device(name)
        if device.type not in here.split():
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device: {name!r} is not available here; use auto or one of: {here}") from None
    return device


def _agree(value: Any, expected: Any, rtol: float | None, atol: float | None) -> bool:
    if isinstance(value, Tensor) or isinstance(expected, Tensor):
        return _tensors_agree(value, expected, rtol, atol)
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        pairs = zip(value, expected, strict=False)
        return len(value) == len(expected) and all(_agree(v, e, rtol, atol) for v, e in pairs)
    if isinstance(value, float) and isinstance(expected, float | int):
        return _tensors_agree(value, expected, rtol, atol)
    return type(value == expected) is bool and value == expected


def _tensors_agree(value: Any, expected: Any, rtol: float | None, atol: float | None) -> bool:
    try:
        v, e = _double(value), _double(expected)
    except (TypeError, ValueError, RuntimeError):  # not numbers: a string, None, a ragged list
        return False
    default_rtol, default_atol = _TOLERANCES.get(getattr(value, "dtype", torch.float32), (0.0, 0.0))
    rtol, atol = default_rtol if rtol is None else rtol, default_atol if atol is None else atol
    same_kind = v.shape == e.shape and v.dtype == e.dtype
    return same_kind and torch.allclose(v, e, rtol=rtol, atol=atol, equal_nan=True)


def _double(value: Any) -> Tensor:
    tensor = torch.as_tensor(value, device="cpu").detach()  # to the CPU first: mps has no float64
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _record(label: str, value: Any, expected: Any) -> None:
    _shown.append({"label": label, "value": _plain(value), "expected": _plain(expected)})
    start = f"    {label:<44}  "
    print(start + textwrap.indent(_text(value), " " * len(start)).lstrip())


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.detach())
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    return str(value)


def _plain(value: Any) -> Any:
    """Return the value as JSON can hold it: non-finite numbers, dtypes and the like become text."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)
