"""Several processes of one gloo group, as torchrun starts them: run a function in each, and see what became of it.

    def work(rank: int, factor: int) -> float:  # of a module: it is found there by its name
        return factor * distributed.all_gather([rank])[-1][0]

    in_processes(2, work, 10)  # [10.0, 10.0]

They are forked from a small process of their own that has only imported: a fork of the tests' process would have
no threads of OpenMP, of autograd's engine or of CUDA, where these have run before. The store is in the tests' process,
as that of torchrun is in its agent, so that it outlives every rank.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
import unittest
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from torchbasics import distributed

AVAILABLE = "forkserver" in multiprocessing.get_all_start_methods() and dist.is_available() and dist.is_gloo_available()
needs_processes = unittest.skipUnless(AVAILABLE, "needs multiprocessing's forkserver, and torch.distributed with gloo")


def _shares_memory() -> bool:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    try:
        os.close(os.memfd_create("test"))
        os.close(os.pidfd_open(os.getpid()))
        return True
    except (AttributeError, OSError):
        return False


SHARES_MEMORY = _shares_memory()
needs_shared_memory = unittest.skipUnless(SHARES_MEMORY, "needs Linux on x86-64, with memfd_create and pidfd_open")
# what the functions need anyway, so that it is imported once: an optimizer's first step imports torch._dynamo, and the
# modules that they are in are most of what is left
PRELOAD = ["torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
           *(f"tests.test_{name}" for name in (
               "distributed", "parallel", "shared_memory", "train_ddp", "trainer"))]  # fmt: skip


class Outcome(NamedTuple):
    """What became of one process."""

    result: Any  # what the function returned: tensors and plain values
    code: int | None  # 0, 1 if it raised, minus the signal that killed it
    said: str  # its stdout and stderr, with the traceback of its exception


def in_processes(count: int, work: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """What `work(rank, *args)` returns in each of `count` processes; AssertionError with what they said if one fails.

    `options` are those of `outcomes`.
    """
    found = outcomes(count, work, *args, **options)
    bad = [f"rank {rank}: exit code {one.code}\n{one.said}" for rank, one in enumerate(found) if one.code]
    if bad:
        raise AssertionError("\n".join(bad))
    return [one.result for one in found]


def outcomes(
    count: int,
    work: Callable[..., Any],
    *args: Any,
    limit: float = 60.0,
    timeout: float = 30.0,
    group: bool = True,
    **environment: str,
) -> list[Outcome]:
    """The same, whatever becomes of them. After `limit` seconds all are killed: AssertionError says where they were.

    `timeout` is that of the process group; without `group` only its variables are set, and `environment` on top.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=limit))
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        **environment,
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        children = []
        try:
            for rank in range(count):
                reader, writer = context.Pipe(duplex=False)
                own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                path = Path(folder, str(rank))
                child = context.Process(
                    target=_child, args=(rank, work, args, own, limit, timeout, group, str(path), writer)
                )
                child.start()
                writer.close()
                children.append((child, reader, path))
            deadline = time.monotonic() + limit
            return [_outcome(*each, deadline) for each in children]
        finally:
            for child, reader, _ in children:
                child.kill()
                child.join()
                child.close()
                reader.close()


def _child(
    rank: int,
    work: Callable[..., Any],
    args: tuple,
    variables: dict[str, str],
    limit: float,
    timeout: float,
    group: bool,
    path: str,
    writer: Connection,
) -> None:
    said = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    faulthandler.dump_traceback_later(limit * 0.9, file=said)  # where it waits, should it hang
    os.environ.update(variables)
    torch.set_num_threads(1)
    code = 1
    try:
        with distributed.process_group(torch.device("cpu"), timeout) if group else nullcontext():
            result = work(rank, *args)
        box = io.BytesIO()
        torch.save(result, box)
        writer.send_bytes(box.getvalue())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _outcome(child: Any, reader: Connection, path: Path, deadline: float) -> Outcome:
    result = None
    if not reader.poll(max(deadline - time.monotonic(), 0)):
        said = "\n".join(f"rank {other.name}:\n{other.read_text()}" for other in sorted(path.parent.iterdir()))
        raise AssertionError(f"not all were done in time; what they said, and where they were:\n{said}")
    with contextlib.suppress(EOFError):  # it raised, or was killed
        result = torch.load(io.BytesIO(reader.recv_bytes()), weights_only=True)
    child.join(max(deadline - time.monotonic(), 1))
    return Outcome(result, child.exitcode, path.read_text(errors="replace") if path.exists() else "")
