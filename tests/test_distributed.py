"""One process: nothing happens. Many: the values, ranks, limits and messages are right, on each.

The functions whose first argument is `rank` run in each process of a group (tests/processes.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.processes import SHARES_MEMORY, in_processes, needs_processes, outcomes
from torchbasics import distributed
from torchbasics.distributed import OtherRankFailed
from torchbasics.evaluation import RunningMeans

CPU = torch.device("cpu")


@contextlib.contextmanager
def launched(**more: Any) -> Iterator[None]:
    """torchrun's variables, for process 0 of 2 if nothing else is given; None takes one away."""
    own = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", **more}
    names = {*own, "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "OMP_NUM_THREADS"}
    rest = {name: value for name, value in os.environ.items() if name not in names}
    given = {name: str(value) for name, value in own.items() if value is not None}
    with mock.patch.dict(os.environ, rest | given, clear=True):
        yield


@contextlib.contextmanager
def taken_port(listening: bool = True) -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        if listening:
            other.listen()
        yield other.getsockname()[1]


def free_port() -> int:
    with taken_port() as port:
        return port


class OneProcess(unittest.TestCase):
    def test_it_is_main_of_one(self) -> None:
        self.assertFalse(distributed.is_distributed())
        self.assertEqual((distributed.rank(), distributed.world_size(), distributed.is_main()), (0, 1, True))
        found = (distributed.rank_in_environment(), distributed.local_rank(), distributed.local_world_size())
        self.assertEqual(found, (0, 0, 1))
        self.assertEqual((distributed.is_launched(), distributed.restarts()), (False, 0))

    def test_nothing_is_exchanged(self) -> None:
        distributed.barrier()
        distributed.introduce_host()
        values = torch.tensor([1.0, 2.0])
        self.assertIs(distributed.all_reduce_sums(values), values)
        self.assertEqual(distributed.all_gather([1, 2.5]), [[1, 2.5]])
        self.assertEqual(distributed.gather_objects("mine"), ["mine"])
        self.assertEqual(distributed.broadcast_object("mine"), "mine")
        self.assertEqual(distributed.on_main(lambda: 7), 7)
        with self.assertRaises(KeyError):
            distributed.on_main(lambda: os.environ["NO_SUCH_VARIABLE"])
        self.assertEqual(distributed.first_cause(RuntimeError("gloo"), "text"), "text")

    def test_the_group_is_none(self) -> None:
        with distributed.process_group(CPU):
            self.assertFalse(distributed.is_distributed())

    def test_the_environment_alone_makes_no_group(self) -> None:
        with launched(RANK=3, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4, TORCHELASTIC_RESTART_COUNT=2):
            self.assertEqual((distributed.rank(), distributed.world_size()), (0, 1))
            found = (distributed.rank_in_environment(), distributed.local_rank(), distributed.local_world_size())
            self.assertEqual(found, (3, 1, 4))
            self.assertEqual((distributed.is_launched(), distributed.restarts()), (True, 2))

    def test_a_group_of_one_under_torchrun(self) -> None:
        with launched(WORLD_SIZE=1, LOCAL_WORLD_SIZE=1, MASTER_PORT=free_port()):
            with self.assertRaisesRegex(KeyError, "of the caller"), distributed.process_group(CPU, 5.0):
                self.assertTrue(distributed.is_distributed())
                self.assertEqual((distributed.rank(), distributed.world_size()), (0, 1))
                raise KeyError("of the caller")
            self.assertFalse(distributed.is_distributed())  # ended, whatever happened in it
            self.assertIsNone(distributed._store)


class SetUp(unittest.TestCase):
    def refused(self, error: type[Exception], pattern: str, timeout: float = 1.0, device: str = "cpu") -> None:
        began = time.monotonic()
        with self.assertRaisesRegex(error, pattern), distributed.process_group(torch.device(device), timeout):
            self.fail("it must not begin")
        self.assertLess(time.monotonic() - began, timeout + 4)
        self.assertFalse(distributed.is_distributed())

    def test_what_is_missing_is_named(self) -> None:
        with launched(LOCAL_RANK=None, MASTER_ADDR=None):
            self.refused(ValueError, "but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start with torchrun, or unset RANK")
        with launched():
            self.refused(ValueError, "but not MASTER_PORT;")

    def test_the_port_is_taken(self) -> None:
        with taken_port() as port, launched(MASTER_PORT=port):
            self.refused(OSError, f"^127.0.0.1:{port}: .*the port is taken; choose another MASTER_PORT")

    @needs_processes
    def test_the_others_do_not_come(self) -> None:
        """Of three processes the first is alone, and of three others the second, with nobody at the address."""
        variables = {"WORLD_SIZE": "3", "TORCHELASTIC_USE_AGENT_STORE": "False"}
        for found in in_processes(2, alone, group=False, **variables):
            self.assertRegex(found, "the processes did not find each other .not all came within 1 s; .*raise --timeout")

    def test_nonsense_in_the_environment_is_one_line(self) -> None:
        with launched(RANK="first", MASTER_PORT=free_port()):
            self.refused(OSError, "^127.0.0.1:.*first[^\n]*$")
            self.assertEqual(distributed.rank_in_environment(), 0)  # so that one process says it

    def test_devices_that_one_process_only_can_use(self) -> None:
        with launched(MASTER_PORT=free_port()):
            self.refused(ValueError, "mps cannot be used by several processes; use --device cpu or cuda", device="mps")


def alone(rank: int) -> str:
    os.environ["MASTER_PORT"] = str(free_port())
    began = time.monotonic()
    try:
        with distributed.process_group(CPU, 1.0):
            return "it began"
    except OSError as error:
        return f"{error}" if time.monotonic() - began < 6 else "too late"


class OwnDevice(unittest.TestCase):
    """With two CUDA devices that are not there."""

    def setUp(self) -> None:
        for patch in (
            mock.patch.object(torch.cuda, "device_count", lambda: 2),
            mock.patch.object(torch.cuda, "set_device", lambda device: self.chosen.append(device)),
        ):
            patch.start()
            self.addCleanup(patch.stop)
        self.chosen: list[torch.device] = []

    def test_one_process_has_what_it_names(self) -> None:
        for name in ("cpu", "cuda", "cuda:1"):
            self.assertEqual(distributed.own_device(torch.device(name)), torch.device(name))
        with launched(WORLD_SIZE=1, LOCAL_WORLD_SIZE=1):
            self.assertEqual(distributed.own_device(torch.device("cuda:1")), torch.device("cuda:1"))

    def test_many_have_one_each(self) -> None:
        with launched(LOCAL_RANK=1, RANK=5, WORLD_SIZE=8):  # by its number on the machine
            self.assertEqual(distributed.own_device(torch.device("cuda")), torch.device("cuda:1"))
            self.assertEqual(self.chosen, [torch.device("cuda:1")])
            self.assertEqual(distributed.own_device(CPU), CPU)

    def test_too_few(self) -> None:
        with (
            launched(LOCAL_RANK=2),
            self.assertRaisesRegex(
                ValueError, r"process 2 of this machine has no cuda device \(2 there\); start --nproc-per-node=2"
            ),
        ):
            distributed.own_device(torch.device("cuda"))

    def test_one_for_all(self) -> None:
        with launched(), self.assertRaisesRegex(ValueError, "cuda:0 is one device for 2 processes; leave the index"):
            distributed.own_device(torch.device("cuda:0"))


class Threads(unittest.TestCase):
    def setUp(self) -> None:
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(2)

    def chosen(self, cores: int, by_user: bool, **variables: Any) -> tuple[str, int]:
        with (
            launched(**variables),
            mock.patch.object(os, "sched_getaffinity", lambda _: set(range(cores)), create=True),
            mock.patch.object(distributed, "_user_has_set", lambda name: by_user),
        ):
            return distributed.set_threads(), torch.get_num_threads()

    def test_a_share_of_the_cores(self) -> None:
        self.assertEqual(self.chosen(8, False), ("4 of 8 cores each", 4))
        self.assertEqual(self.chosen(7, False), ("3 of 7 cores each", 3))
        self.assertEqual(self.chosen(1, False, LOCAL_WORLD_SIZE=3), ("1 of 1 cores each", 1))
        # torchrun sets it for several processes: not the user's will
        self.assertEqual(self.chosen(6, False, OMP_NUM_THREADS=1), ("3 of 6 cores each", 3))

    def test_the_user_is_respected(self) -> None:
        self.assertEqual(self.chosen(8, True, OMP_NUM_THREADS=2), ("2 threads each (OMP_NUM_THREADS)", 2))

    def test_one_process_keeps_what_torch_chose(self) -> None:
        self.assertEqual(self.chosen(8, False, LOCAL_WORLD_SIZE=1), ("2 threads each", 2))
        torch.set_num_threads(1)
        self.assertEqual(self.chosen(8, False, LOCAL_WORLD_SIZE=1), ("1 thread each", 1))

    def test_whose_will_it_is_stands_in_the_environment_of_the_launcher(self) -> None:
        for content, expected in (
            (b"HOME=/\0OMP_NUM_THREADS=1\0", True),
            (b"HOME=/\0NOT_OMP_NUM_THREADS=1\0", False),
            (b"", False),
        ):
            with mock.patch.object(Path, "read_bytes", lambda path, content=content: content):
                self.assertEqual(distributed._user_has_set("OMP_NUM_THREADS"), expected)
        with mock.patch.object(Path, "read_bytes", side_effect=PermissionError):  # where that cannot be seen
            for value, expected in ((None, False), (1, False), (4, True)):
                with launched(OMP_NUM_THREADS=value):
                    self.assertEqual(distributed._user_has_set("OMP_NUM_THREADS"), expected)


# ----------------------------------------------------------------------------------------------------- many processes


def exchange(rank: int) -> dict[str, Any]:
    """Each function once."""
    values = torch.tensor([1.0 + rank, 10.0 * rank], dtype=torch.float64)
    means = RunningMeans(0.1 * (rank + 1), 2**51 + rank, rank, 2 * rank)
    reduced = means.reduced()
    return {
        "who": [distributed.is_distributed(), distributed.rank(), distributed.world_size(), distributed.is_main()],
        "sums": distributed.all_reduce_sums(values).tolist(),
        "values": values.tolist(),
        "counts": distributed.all_reduce_sums(torch.tensor([2**60 + rank])).tolist(),
        "gathered": distributed.all_gather([rank, 2**53 - 1, 0.1]),
        "many": distributed.all_gather([rank + i for i in range(1000)]),
        "shares memory": distributed.shared_rows(100) is not None,
        "objects": distributed.gather_objects({"rank": rank, "tensor": torch.full((2,), rank)}),
        "broadcast": distributed.broadcast_object(["of", rank]),
        "on_main": distributed.on_main(lambda: f"by {rank}"),
        "means": reduced.state_dict(),
        "own": means.samples,
        "backend": dist.get_backend(),
    }


def late(rank: int, mark: str) -> bool:
    if rank == 1:
        time.sleep(0.3)  # who does not wait is through by now
        Path(mark).touch()
    distributed.barrier()
    return Path(mark).exists()


def failing_main(rank: int) -> list[Any]:
    """Rank 0 raises in what it does for all; afterwards all are still together."""

    def work() -> None:
        raise KeyError(f"of {rank}")

    caught = "nothing"
    try:
        distributed.on_main(work)
    except (KeyError, OtherRankFailed) as error:
        caught = f"{type(error).__name__}: {error}"
        time.sleep(0.2 * (rank == 0))  # the others would have the time to speak first
        said = distributed.first_cause(error, "text")
    return [caught, said, distributed.all_gather([rank])]


def leaving(rank: int, noticed: str) -> str:
    """Rank 1 leaves the group by an exception, and lives on until that is `noticed`."""
    began = time.monotonic()
    try:
        with distributed.process_group(CPU, 20.0):
            distributed.barrier()
            if rank == 1:
                raise KeyError("of rank 1")
            distributed.barrier()
    except KeyError:
        while not Path(noticed).exists() and time.monotonic() < began + 6:
            time.sleep(0.02)
    except RuntimeError as error:
        Path(noticed).touch()
        return f"{'soon' if time.monotonic() - began < 3 else 'late'}: {distributed.is_lost_contact(error)}"
    return "nothing failed"


def lost_at_the_start(rank: int) -> list[Any]:
    """What a process says if another is killed before all share memory."""
    gone = mock.patch.object(distributed, "share_rows", side_effect=RuntimeError("Connection closed by peer"))
    try:
        with gone, distributed.process_group(CPU, 20.0):
            return ["it began"]
    except OSError as error:
        return [str(error).partition(": ")[2], distributed.is_distributed(), distributed._store is None]


@needs_processes
class ManyProcesses(unittest.TestCase):
    def test_who_leaves_is_not_waited_for(self) -> None:
        for local in ("2", "1"):
            with tempfile.TemporaryDirectory() as folder:
                found = in_processes(2, leaving, f"{folder}/noticed by 0", group=False, LOCAL_WORLD_SIZE=local)
            self.assertEqual(found, ["soon: True", "nothing failed"])

    def test_who_is_lost_at_the_start(self) -> None:
        expected = ["the processes did not find each other (Connection closed by peer)", False, True]
        self.assertEqual(in_processes(2, lost_at_the_start, group=False), [expected] * 2)

    def test_values(self) -> None:
        for world_size, local in ((2, 2), (3, 3), (2, 1)):  # the last as if on two machines
            for rank, found in enumerate(in_processes(world_size, exchange, LOCAL_WORLD_SIZE=str(local))):
                ranks = range(world_size)
                self.assertEqual(found["shares memory"], local == world_size and SHARES_MEMORY)
                self.assertEqual(found["many"], [[r + i for i in range(1000)] for r in ranks])
                self.assertEqual(found["who"], [True, rank, world_size, rank == 0])
                self.assertEqual(found["sums"], [sum(1.0 + r for r in ranks), sum(10.0 * r for r in ranks)])
                self.assertEqual(found["values"], [1.0 + rank, 10.0 * rank], "the caller's values stay")
                self.assertEqual(found["counts"], [world_size * 2**60 + sum(ranks)])  # whole numbers, exactly
                self.assertEqual(found["gathered"], [[r, 2**53 - 1, 0.1] for r in ranks])
                self.assertEqual([one["rank"] for one in found["objects"]], list(ranks))
                self.assertEqual([one["tensor"].tolist() for one in found["objects"]], [[r, r] for r in ranks])
                self.assertEqual((found["broadcast"], found["on_main"]), (["of", 0], "by 0"))
                self.assertEqual(found["means"]["samples"], world_size * 2**51 + sum(ranks))
                self.assertEqual(
                    (found["means"]["correct"], found["means"]["predictions"]), (sum(ranks), 2 * sum(ranks))
                )
                self.assertAlmostEqual(found["means"]["loss_sum"], sum(0.1 * (r + 1) for r in ranks), places=15)
                self.assertEqual(found["own"], 2**51 + rank)
                self.assertEqual(found["backend"], "gloo")

    def test_the_barrier_waits(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.assertEqual(in_processes(2, late, f"{folder}/written by 1"), [True, True])

    def test_what_fails_on_rank_0_fails_on_all(self) -> None:
        here = f"rank 0 of 3 ({socket.gethostname()}): text"
        found = in_processes(3, failing_main)
        self.assertEqual(found[0][:2], ["KeyError: 'of 0'", here])
        self.assertEqual([one[:2] for one in found[1:]], [["OtherRankFailed: rank 0 failed", None]] * 2)
        self.assertEqual([one[2] for one in found], [[[0], [1], [2]]] * 3)


# ---------------------------------------------------------------------------------------------------- who failed first


def fail(rank: int, how: str) -> str | None:
    """Rank 1 fails; what each that is left says of it."""
    distributed.introduce_host()
    pids = distributed.gather_objects(os.getpid())
    said: str | None = "nothing failed"
    try:
        if rank == 1 and how == "raise":
            raise ValueError("of rank 1")
        if rank == 1 and how in ("SIGKILL", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, how))
        distributed.barrier()
        if how == "together":
            raise RuntimeError("Connection closed by peer")
    except Exception as error:
        said = distributed.first_cause(error, str(error).splitlines()[0][:40], patience=1.0)
    finally:
        if rank == 0 and how == "SIGSTOP":
            os.kill(pids[1], signal.SIGKILL)
    return said


def lose_store(rank: int) -> str | None:
    """Rank 0, in which the store is, is killed."""
    distributed.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        distributed.barrier()
    except RuntimeError as error:
        return distributed.first_cause(error, "text", patience=0.2)
    return "nothing failed"


@needs_processes
class FirstCause(unittest.TestCase):
    HOST = f"({socket.gethostname()})"

    def said(self, count: int, how: str, **options: Any) -> list[str | None]:
        began = time.monotonic()
        found = outcomes(count, fail, how, **options)
        self.assertLess(time.monotonic() - began, 25)
        for rank, one in enumerate(found):
            killed = rank == 1 and how.startswith("SIG")
            self.assertEqual(one.code, -signal.SIGKILL if killed else 0, one.said)
        return [one.result for one in found]

    def test_who_raises_says_so_and_nobody_else(self) -> None:
        self.assertEqual(self.said(3, "raise"), [None, f"rank 1 of 3 {self.HOST}: of rank 1", None])

    def test_who_was_killed_is_named_once(self) -> None:
        spoken = [text for text in self.said(3, "SIGKILL") if text is not None]
        self.assertEqual(len(spoken), 1)
        self.assertRegex(spoken[0], rf"^rank [02] of 3 \S+: no answer from rank 1 \({socket.gethostname()}\)$")

    def test_who_hangs_is_named(self) -> None:
        found = self.said(2, "SIGSTOP", timeout=2.5)
        self.assertEqual(found, [f"rank 0 of 2 {self.HOST}: no answer from rank 1 {self.HOST}", None])

    def test_contact_is_lost_but_all_are_there(self) -> None:
        spoken = [text for text in self.said(2, "together") if text is not None]
        self.assertEqual(len(spoken), 1)
        self.assertRegex(spoken[0], "lost contact with the other processes .Connection closed by peer")

    def test_the_store_is_gone(self) -> None:
        first, second = outcomes(2, lose_store, TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(free_port()))
        self.assertEqual((first.code, second.code), (-signal.SIGKILL, 0), second.said)
        self.assertRegex(second.result, "^rank 1 of 2 .*: .*; the job's store is gone as well$")

    def test_what_is_a_consequence_only(self) -> None:
        for error, expected in (
            (RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2"), True),
            (RuntimeError("NCCL error: remote process exited"), True),
            (dist.DistNetworkError("broken"), True),
            (dist.DistBackendError("broken"), True),
            (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
            (ValueError("the folder gloo is empty"), False),
        ):
            self.assertEqual(distributed.is_lost_contact(error), expected, error)


if __name__ == "__main__":
    unittest.main()
