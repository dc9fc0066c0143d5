"""What several test files share: running scripts and processes, and comparing weights."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"


def load_script(name: str) -> Any:
    """Return `scripts/NAME.py` as a fresh module; leave `sys.path` as it was."""
    spec = importlib.util.spec_from_file_location(f"{name}_under_test", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and inspect look for it there
    before = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


def run_main(main: Any, *argv: str) -> tuple[int, str, str]:
    """Call `main(list(argv))` in this process; return (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(argv))
        except SystemExit as stop:
            code = stop.code
    return int(code or 0), out.getvalue(), err.getvalue()


def run_script(name: str, *argv: str, timeout: float = 120, cwd: Any = None, **env: str) -> subprocess.CompletedProcess:
    """Run `scripts/NAME.py` in a fresh process from `cwd`; return the finished process with its text output."""
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, argv)]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=timeout, check=False
    )


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Return whether two models have the same state, bit for bit."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


needs_processes = unittest.skipUnless(
    "forkserver" in multiprocessing.get_all_start_methods() and dist.is_available() and dist.is_gloo_available(),
    "needs multiprocessing's forkserver, and torch.distributed with gloo",
)


class Outcome(NamedTuple):
    """The end of one process."""

    result: Any  # what the function returned: tensors and plain values
    code: int | None  # 0, 1 if it raised, minus the signal that killed it
    output: str  # its stdout and stderr, with the traceback of its exception


def in_processes(count: int, work: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """Return what `work(rank, *args)` returns in each of `count` processes; AssertionError if one fails.

    `work` is a function of a test module. `options` are those of `outcomes`.
    """
    found = outcomes(count, work, *args, **options)
    bad = [f"rank {rank}: exit code {one.code}\n{one.output}" for rank, one in enumerate(found) if one.code]
    if bad:
        raise AssertionError("\n".join(bad))
    return [one.result for one in found]


def outcomes(
    count: int,
    work: Callable[..., Any],
    *args: Any,
    timeout: float | None = 30.0,
    store: dist.TCPStore | None = None,
    **environment: str,
) -> list[Outcome]:
    """Return the end of each of `count` processes that call `work(rank, *args)` in a process group of that timeout.

    With `timeout=None` only torchrun's variables are set; `environment` adds to them. `store` stands for that of
    torchrun, which outlives the processes. After 60 seconds all are killed: AssertionError with their outputs.
    """
    store = store or new_store()
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    variables |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), **environment}
    context = multiprocessing.get_context("forkserver")  # a fork of the tests' own process would lack its threads
    context.set_forkserver_preload(
        ["torch._dynamo", "torch.distributed.fsdp", "tests.test_distributed", "tests.test_trainer"]
    )
    with tempfile.TemporaryDirectory() as folder:
        bases = [Path(folder, str(rank)) for rank in range(count)]
        children = [
            context.Process(target=_child, args=(base, work, args, variables, timeout), daemon=True) for base in bases
        ]
        try:
            for child in children:
                child.start()
            deadline = time.monotonic() + 60
            for child in children:
                child.join(max(deadline - time.monotonic(), 0))
            outputs = [base.with_suffix(".txt").read_text(errors="replace") for base in bases]
            if any(child.is_alive() for child in children):
                raise AssertionError("not all processes ended in time\n" + "\n".join(outputs))
            return [
                Outcome(torch.load(base, weights_only=True) if child.exitcode == 0 else None, child.exitcode, output)
                for child, base, output in zip(children, bases, outputs, strict=True)
            ]
        finally:
            for child in children:
                child.kill()
                child.join()


def new_store() -> dist.TCPStore:
    """Return a store as torchrun makes one for its processes."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


def _child(
    base: Path, work: Callable[..., Any], args: tuple[Any, ...], variables: dict[str, str], timeout: float | None
) -> None:
    from torchbasics import distributed

    output = os.open(base.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.dump_traceback_later(50, file=output)  # where it waits, should it hang
    os.environ.update({"RANK": base.name, "LOCAL_RANK": base.name, **variables})
    torch.set_num_threads(1)
    group = contextlib.nullcontext() if timeout is None else distributed.process_group(torch.device("cpu"), timeout)
    with group:
        result = work(int(base.name), *args)
    torch.save(result, base)
