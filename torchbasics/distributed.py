"""One process or many. With one process every function here is a no-op, so that callers need no `if`."""

from __future__ import annotations

import torch
import torch.distributed as dist


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


def barrier() -> None:
    """Waits for all processes."""
    if is_distributed():
        dist.barrier()


def all_reduce_sums(values: torch.Tensor) -> torch.Tensor:
    """Returns the sums of `values` over all processes; `values` itself if there is one."""
    if is_distributed():
        values = values.clone()
        dist.all_reduce(values)
    return values
