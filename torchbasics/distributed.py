"""One process or many. With one process every function here is a no-op, so that callers need no `if`.

    with distributed.process_group(device):   # torchrun has set RANK, WORLD_SIZE, …; plain python: one process
        train()

Small values (counts, flags) travel on the CPU, whatever the device, and never wait for it: over gloo, or through shared
memory where all processes train on the CPU of one machine.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from torchbasics.shared_memory import SharedRows, share_rows

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ACCELERATORS = ("cuda", "xpu")  # those that several processes can use together
_store: Any = None  # of this attempt of the job, while `process_group` lasts
_job_store: Any = None  # of the job, whatever torchrun restarts
_rows: SharedRows | None = None  # for small values, where the processes share memory
_all_rows: weakref.WeakSet[SharedRows] = weakref.WeakSet()  # and for what else
SMALL = 64  # values that go into a row


class OtherRankFailed(RuntimeError):
    """Another process failed first and has said why; nothing more is to be said here."""


# ------------------------------------------------------------------------------------------------------ who is there


def is_distributed() -> bool:
    """Whether a process group of torch.distributed is up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number among all of the job, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes the job has."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this is the one process that writes and speaks (global rank 0, not local rank 0)."""
    return rank() == 0


def rank_in_environment() -> int:
    """The rank that this process will have, or had, also while there is no process group."""
    number = os.environ["RANK"] if is_launched() else "0"
    return int(number) if number.isdecimal() else 0  # nonsense is told by `process_group`


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_launched() else 0


def local_world_size() -> int:
    """How many processes of the job run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_launched() else 1


def is_launched() -> bool:
    """Whether torchrun, or whatever sets its variables, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarts() -> int:
    """How often torchrun has restarted the job's processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


# ------------------------------------------------------------------------------------------------ set-up and shutdown


@contextlib.contextmanager
def process_group(device: torch.device, timeout: float = 60.0) -> Iterator[None]:
    """The job's process group while it lasts: nccl (xccl) for tensors on an accelerator, gloo for those on the CPU.

    A process that hears nothing of another for `timeout` seconds gives up. Raises ValueError if torchrun's variables
    are incomplete, OSError if the processes do not find each other.
    """
    global _store, _job_store, _rows
    if not is_launched():
        yield
        return
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(f"RANK is set, but not {', '.join(missing)}; start with torchrun, or unset RANK")
    limit = datetime.timedelta(seconds=timeout)
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{_backend_for(device)}"
    bound: dict[str, Any] = {} if device.type == "cpu" else {"device_id": device}
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=limit))
        _store = dist.PrefixStore(f"torchbasics/{restarts()}", store)  # the last attempt's keys are still in it
        _job_store = dist.PrefixStore("torchbasics/job", store)
        dist.init_process_group(backend, store=_store, rank=number, world_size=size, timeout=limit, **bound)
        if device.type == "cpu" and local_world_size() == size > 1:
            _rows = _share(8 * SMALL, timeout)
    except (RuntimeError, ValueError) as error:
        _store = _job_store = None
        if is_distributed():
            dist.destroy_process_group()
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise OSError(f"{where}: the processes did not find each other ({_reason(error, timeout)})") from error
    try:
        yield
    finally:
        for rows in _all_rows:
            rows.leave()
        _store = _job_store = _rows = None
        dist.destroy_process_group()


def _backend_for(device: torch.device) -> str:
    if device.type not in ACCELERATORS:
        raise ValueError(f"{device.type} cannot be used by several processes; use --device cpu or cuda")
    return dist.get_default_backend_for_device(device)


def _reason(error: Exception, timeout: float) -> str:
    text = str(error)
    if "EADDRINUSE" in text or "already in use" in text:
        return "the port is taken; choose another MASTER_PORT, or torchrun --standalone"
    if "timed out" in text.lower() or "timeout" in text.lower():
        return f"not all came within {timeout:g} s; see that all are started with one address, or raise --timeout"
    return " ".join(text.split())[:200]


def own_device(device: torch.device) -> torch.device:
    """`device` with this process's index: the local rank's accelerator. ValueError if there are too few."""
    if device.type == "cpu" or not is_launched():
        return device
    if device.index is not None and local_world_size() > 1:
        raise ValueError(f"--device {device} is one device for {local_world_size()} processes; leave the index out")
    if device.type not in ACCELERATORS:
        raise ValueError(f"{device.type} cannot be used by several processes; use --device cpu or cuda")
    backend = getattr(torch, device.type)
    if local_rank() >= backend.device_count():
        raise ValueError(
            f"process {local_rank()} of this machine has no {device.type} device ({backend.device_count()} there); "
            f"start --nproc-per-node={backend.device_count()} processes, or use --device cpu"
        )
    own = torch.device(device.type, local_rank() if device.index is None else device.index)
    backend.set_device(own)
    return own


def set_threads() -> str:
    """Gives each local process its share of the cores, unless the user has set OMP_NUM_THREADS; says what was chosen.

    torchrun itself sets OMP_NUM_THREADS=1 for several processes; that is not taken for the user's will.
    """
    processes = local_world_size()
    if processes > 1 and not _user_has_set("OMP_NUM_THREADS"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes))
        return f"{torch.get_num_threads()} of {cores} cores each"
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count != 1)} each" + (
        " (OMP_NUM_THREADS)" if "OMP_NUM_THREADS" in os.environ else ""
    )


def _user_has_set(name: str) -> bool:
    """Whether the variable was set before the launcher started; where that cannot be seen, 1 is the launcher's."""
    try:
        launcher = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        return any(line.startswith(name.encode() + b"=") for line in launcher)
    except OSError:
        return os.environ.get(name, "1") != "1"


# ------------------------------------------------------------------------------------------------ small values together


def barrier() -> None:
    """Waits for all processes."""
    all_gather([0])


def all_gather(values: Sequence[float]) -> list[list[float]]:
    """The `values` of all processes, by rank; as float64, which holds whole numbers exactly up to 2**53."""
    if world_size() == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.float64)
    if _rows is not None and len(values) <= SMALL:
        shared = _rows.of(torch.float64, len(values))
        _rows.begin()
        shared[_rows.rank] = own
        _rows.publish()
        found: list[list[float]] = shared.tolist()
        _rows.end()
        return found
    every = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(every, own)
    return [part.tolist() for part in every]


def all_reduce_sums(values: torch.Tensor) -> torch.Tensor:
    """Returns the sums of `values` over all processes; `values` itself if there is one."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_objects(value: T) -> list[T]:
    """The values of all processes, by rank, on all of them: plain values and tensors."""
    if world_size() == 1:
        return [value]
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, value)
    return every


def broadcast_object(value: T) -> T:
    """Rank 0's `value` on all processes."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def on_main(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on all processes. If it raises there, the others raise OtherRankFailed."""
    if world_size() == 1:
        return function()
    outcome: tuple[bool, Any] = (False, None)
    try:
        if is_main():
            outcome = (True, function())
    finally:
        done, result = broadcast_object(outcome)
    if not done:
        raise OtherRankFailed("rank 0 failed")
    return result


def shared_rows(size: int) -> SharedRows | None:
    """Rows of `size` bytes more, by all processes together; None where they do not share memory."""
    return None if _rows is None else _share(size, _rows.timeout)


def _share(size: int, timeout: float) -> SharedRows | None:
    """`share_rows`, which this process leaves with the group."""
    rows = share_rows(size, timeout)
    if rows is not None:
        _all_rows.add(rows)
    return rows


def check_group() -> None:
    """ValueError if the process group, which the caller may have made, cannot carry values of the CPU."""
    if world_size() > 1 and "cpu:" not in dist.get_backend_config():
        raise ValueError(
            f"the process group is {dist.get_backend_config()!r} and carries no values of the CPU; use "
            "torchbasics.distributed.process_group, or init_process_group('cpu:gloo,cuda:nccl')"
        )


# ----------------------------------------------------------------------------- what lasts longer than a collective may


def remember(key: str, value: str) -> None:
    """Writes a note for the job's later attempts, after torchrun has restarted it."""
    if _job_store is not None:
        _job_store.set(key, value)


def recall(key: str) -> str | None:
    """The note that an earlier attempt of this job has written."""
    return _job_store.get(key).decode() if _job_store is not None and _job_store.check([key]) else None


def tell(key: str, value: str | None = None) -> str | None:
    """Rank 0's `value` on all processes, which wait for it as long as it takes, unless one fails."""
    if _store is None:
        return value
    if is_main():
        _store.set(f"told/{key}", value or "")
    _until(lambda: _store.check([f"told/{key}"]))
    return _store.get(f"told/{key}").decode()


def wait_for_all(key: str) -> None:
    """Waits for all processes, as long as it takes, unless one fails."""
    if _store is None:
        return
    _store.add(f"came/{key}", 1)
    _until(lambda: _store.add(f"came/{key}", 0) >= world_size())


def _until(done: Callable[[], bool]) -> None:
    while not done():
        if _store.check(["cause"]):
            raise OtherRankFailed("another rank failed")
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------- who failed first


def first_cause(error: Exception, text: str, patience: float = 2.0) -> str | None:
    """What this process is to say of `error`: `text` with its rank; None if another process has spoken already.

    Where `error` is that contact to others was lost, it names those that do not answer within `patience` seconds.
    """
    if world_size() == 1 or _store is None:
        return text
    if isinstance(error, OtherRankFailed):
        return None
    found: list[str | None] = []
    asking = threading.Thread(target=lambda: found.append(_ask(error, text, patience)), daemon=True)
    asking.start()  # on a machine that is cut off, the store waits for ever
    asking.join(patience + 3)
    said = found[0] if found else f"{text}; the job's store does not answer either"
    return None if said is None else f"rank {rank()} of {world_size()} ({socket.gethostname()}): {said}"


def _ask(error: Exception, text: str, patience: float) -> str | None:
    try:
        if is_lost_contact(error):
            silent = _silent_ranks(patience)
            names = ", ".join(f"rank {number} ({host})" for number, host in silent)
            text = f"no answer from {names}" if silent else f"lost contact with the other processes ({text})"
        return text if _store.add("cause", 1) == 1 else None
    except RuntimeError:  # the store was in a process that is gone
        return f"{text}; the job's store is gone as well"


def is_lost_contact(error: BaseException) -> bool:
    """Whether `error` is of the network between the processes, and so a consequence of something else."""
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def introduce_host() -> None:
    """Lets the other processes know this one's machine, for messages when it no longer answers."""
    if _store is not None:
        _store.set(f"host/{rank()}", socket.gethostname())


def _silent_ranks(patience: float) -> list[tuple[int, str]]:
    """Ranks that, unlike this one, do not notice the failure too: killed, stopped or hanging."""
    _store.set(f"alive/{rank()}", "1")
    time.sleep(patience)
    silent = [number for number in range(world_size()) if not _store.check([f"alive/{number}"])]
    known = [number for number in silent if _store.check([f"host/{number}"])]
    return [(number, _store.get(f"host/{number}").decode() if number in known else "?") for number in silent]
