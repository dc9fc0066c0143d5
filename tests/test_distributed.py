"""One process: nothing happens. Two processes: the sums and the ranks are right, on each."""

from __future__ import annotations

import os
import signal
import tempfile
import time
import unittest
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from torchbasics import distributed


class OneProcess(unittest.TestCase):
    def test_it_is_main_of_one(self) -> None:
        self.assertFalse(distributed.is_distributed())
        self.assertEqual((distributed.rank(), distributed.world_size(), distributed.is_main()), (0, 1, True))
        distributed.barrier()
        values = torch.tensor([1.0, 2.0])
        self.assertIs(distributed.all_reduce_sums(values), values)

    def test_the_environment_alone_makes_no_group(self) -> None:
        with mock.patch.dict(os.environ, {"RANK": "3", "WORLD_SIZE": "8"}):
            self.assertEqual((distributed.rank(), distributed.world_size()), (0, 1))


def in_processes(count: int, folder: str, work: Callable[[int], None]) -> list[int]:
    """Runs `work(rank)` in `count` forked processes of one gloo group; returns their exit codes."""
    children = []
    for rank in range(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of forking with threads
            child = os.fork()
        if not child:
            code = 1
            try:
                signal.alarm(30)
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{folder}/store",
                    rank=rank,
                    world_size=count,
                    timeout=timedelta(seconds=20),
                )
                work(rank)
                dist.destroy_process_group()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@unittest.skipUnless(hasattr(os, "fork") and dist.is_available() and dist.is_gloo_available(), "needs fork and gloo")
class ManyProcesses(unittest.TestCase):
    def test_ranks_and_sums(self) -> None:
        with tempfile.TemporaryDirectory() as folder:

            def work(rank: int) -> None:
                assert distributed.is_distributed()
                assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (rank, 2, rank == 0)
                values = torch.tensor([1.0 + rank, 10.0 * rank], dtype=torch.float64)
                sums = distributed.all_reduce_sums(values)
                assert sums.tolist() == [3.0, 10.0], sums
                assert values.tolist() == [1.0 + rank, 10.0 * rank], "the caller's values stay"

            self.assertEqual(in_processes(2, folder, work), [0, 0])

    def test_the_barrier_waits(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            mark = Path(folder) / "written by 1"

            def work(rank: int) -> None:
                if rank == 1:
                    time.sleep(0.3)  # who does not wait is through by now
                    mark.touch()
                distributed.barrier()
                assert mark.exists()

            self.assertEqual(in_processes(2, folder, work), [0, 0])


if __name__ == "__main__":
    unittest.main()
