"""A row of memory for each process of one machine, which all of them read: they exchange values by copying them.

    rows = share_rows(1024, timeout=60)  # called by all processes of the group; None where they share no memory
    rows.begin()                         # waits until all have read what was written last
    rows.of(torch.float32, 3)[rows.rank].copy_(own)
    rows.publish()                       # waits until all have written
    total = rows.of(torch.float32, 3).sum(0)
    rows.end()                           # read, and may be written again

One machine of Linux and x86-64, whose cores see each other's stores in their order: first the values, then the count
that says they are there. Waiting is looking, for to be woken takes longer; who ends, or hangs, is noticed all the same.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import select
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LINE = 64  # bytes that cores exchange at once: what two processes write lies in different ones
WRITTEN, READ, LEFT = 0, 1, 2  # a process's counts of rounds, and whether it has left; 8 bytes each, in its line
LOOKING = 1e-3  # seconds of waiting after which a process sleeps between looks, for others may need its core


class SharedRows:
    """Made by `share_rows`. `rank` is this process's row; a round is begin → write → publish → read → end."""

    def __init__(self, memory: mmap.mmap, pids: Sequence[int], rank: int, timeout: float) -> None:
        self.rank, self.timeout, self._pids = rank, timeout, pids
        begin = LINE * (1 + len(pids))
        self._rows = torch.frombuffer(memory, dtype=torch.uint8, offset=begin).view(len(pids), -1)
        self._counts = memoryview(memory)[LINE:begin].cast("q", (len(pids), LINE // 8))

    def of(self, dtype: torch.dtype, count: int, offset: int = 0) -> Tensor:
        """(processes, count): what lies `offset` bytes (`whole_lines`) from the start of each row."""
        return self._rows[:, offset : offset + count * dtype.itemsize].view(dtype)

    def begin(self) -> None:
        """Waits until all have read the last round, whose rows are then free. Raises as `publish` does."""
        self._wait(READ, self._counts[self.rank, WRITTEN])

    def publish(self) -> None:
        """Shows this process's row, and waits for those of all.

        Raises torch.distributed.DistNetworkError if one of them has left, or lets `timeout` seconds pass.
        """
        self._counts[self.rank, WRITTEN] += 1
        self._wait(WRITTEN, self._counts[self.rank, WRITTEN])

    def end(self) -> None:
        """What was read may be overwritten."""
        self._counts[self.rank, READ] = self._counts[self.rank, WRITTEN]

    def leave(self) -> None:
        """Nobody is to wait for this process any more."""
        self._counts[self.rank, LEFT] = 1

    def _wait(self, which: int, value: int) -> None:
        """Until `which` of all others is `value`."""
        for rank in range(len(self._pids)):
            if rank != self.rank and self._counts[rank, which] < value:
                self._wait_for(rank, which, value)

    def _wait_for(self, rank: int, which: int, value: int) -> None:
        began = asked = time.monotonic()
        while self._counts[rank, which] < value:
            now = time.monotonic()
            if now - began > LOOKING:
                time.sleep(min((now - began) / 20, 1e-3))
            if now - asked > 0.05:
                asked = now
                left = self._counts[rank, LEFT] or not _is_running(self._pids[rank])
                # looked at again: it may have written before it left
                if self._counts[rank, which] < value and (left or now - began > self.timeout):
                    how = "has left" if left else f"gave no sign for {self.timeout:g} s"
                    raise dist.DistNetworkError(f"rank {rank} {how}")


def whole_lines(size: int) -> int:
    """`size` in bytes, up to where what follows may begin."""
    return -(-size // LINE) * LINE


def share_rows(size: int, timeout: float) -> SharedRows | None:
    """Rows of at least `size` bytes for all processes of the process group, which call this together.

    None, for all of them, where they are not on one machine that can do this, or where there is too little memory.
    """
    rank = dist.get_rank()
    whole = LINE + dist.get_world_size() * (LINE + whole_lines(size))
    token = secrets.token_bytes(LINE)
    file = _new_memory(whole, token) if rank == 0 else None
    try:
        pids, files, tokens = zip(*_of_all((os.getpid(), file, token)), strict=True)
        memory = None if files[0] is None else _map(f"/proc/{pids[0]}/fd/{files[0]}", whole, tokens[0])
        usable = memory is not None and all(_is_running(pid) for pid in pids)
        if not all(_of_all(usable)) or memory is None:
            return None
        return SharedRows(memory, pids, rank, timeout)
    finally:
        if file is not None:
            os.close(file)  # the memory stays for as long as one process maps it


def _of_all(value: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def _new_memory(size: int, token: bytes) -> int | None:
    """A file in memory without a name, which nothing can leave behind; taken at once, not by a SIGBUS later."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    if not (hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")):  # of a Python built for an old C library
        return None
    file = None
    try:
        os.close(os.pidfd_open(os.getpid()))  # not on every kernel
        file = os.memfd_create("torchbasics")
        os.posix_fallocate(file, 0, size)
        os.write(file, token)
        return file
    except OSError:
        if file is not None:
            os.close(file)
        return None


def _map(path: str, size: int, token: bytes) -> mmap.mmap | None:
    """The memory behind `path`, if this process sees what its maker sees there; in another container it does not."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        memory = mmap.mmap(file, size)
        return memory if memory[: len(token)] == token else None
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)


def _is_running(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    if sys.platform != "linux":
        return False
    try:
        file = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    except OSError:  # too many files are open: that says nothing of the other
        return True
    try:
        ended = select.poll()
        ended.register(file, select.POLLIN)
        return not ended.poll(0)
    finally:
        os.close(file)
