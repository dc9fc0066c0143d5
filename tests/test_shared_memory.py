"""What one process writes the others read, whole and in its round; who ends or hangs is noticed; nothing is left.

Threads stand for processes where that suffices: they share the memory all the same. The functions whose first argument
is `rank` run in each process of a group (tests/processes.py).
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import threading
import time
import types
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.processes import in_processes, needs_processes, needs_shared_memory, outcomes
from torchbasics import shared_memory
from torchbasics.shared_memory import LINE, READ, WRITTEN, SharedRows, share_rows


def rows_of(count: int, row: int = 2 * LINE, timeout: float = 10.0) -> list[SharedRows]:
    """As each of `count` processes has them."""
    memory = mmap.mmap(-1, LINE + count * (LINE + row))
    return [SharedRows(memory, [os.getpid()] * count, rank, timeout) for rank in range(count)]


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """What each of `works` returns, each in a thread; raises what one of them raises."""
    results: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            results[number] = works[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
        if thread.is_alive():
            raise AssertionError("a thread hangs")
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def gather(rows: SharedRows, value: float, before_reading: float = 0.0, before_writing: float = 0.0) -> list[float]:
    rows.begin()
    time.sleep(before_writing)
    shared = rows.of(torch.float64, 1)
    shared[rows.rank] = value
    rows.publish()
    time.sleep(before_reading)
    found = shared.flatten().tolist()
    rows.end()
    return found


@needs_shared_memory
class Rounds(unittest.TestCase):
    def test_who_is_late_is_waited_for(self) -> None:
        one, two = rows_of(2)
        found = at_once(lambda: gather(one, 1), lambda: gather(two, 2, before_writing=0.2))
        self.assertEqual(found, [[1, 2], [1, 2]])

    def test_what_is_not_read_yet_is_not_overwritten(self) -> None:
        one, two = rows_of(2)

        def quick() -> list[list[float]]:
            return [gather(two, 10 + i) for i in range(3)]

        def slow() -> list[list[float]]:
            return [gather(one, i, before_reading=0.1) for i in range(3)]

        expected = [[i, 10 + i] for i in range(3)]
        self.assertEqual(at_once(slow, quick), [expected, expected])

    def test_one_alone_waits_for_nobody(self) -> None:
        (one,) = rows_of(1)
        self.assertEqual([gather(one, i) for i in range(3)], [[0], [1], [2]])

    def test_a_round_that_was_broken_off_before_it_was_shown_begins_again(self) -> None:
        one, two = rows_of(2)
        one.begin()
        one.of(torch.float64, 1)[0] = 99
        self.assertEqual(at_once(lambda: gather(one, 1), lambda: gather(two, 2)), [[1, 2], [1, 2]])

    def test_parts_of_a_row(self) -> None:
        one, two = rows_of(2)
        for rows in (one, two):
            self.assertEqual(rows.of(torch.float32, 5, LINE).shape, (2, 5))
        one.of(torch.float32, 5, LINE)[0] = torch.arange(5.0)
        one.of(torch.float64, 8)[0] = 7
        two.of(torch.bfloat16, 3)[1] = 2
        self.assertEqual(two.of(torch.float32, 5, LINE)[0].tolist(), [0, 1, 2, 3, 4])
        self.assertEqual(two.of(torch.float64, 8)[0].tolist(), [7] * 8)
        self.assertEqual(one.of(torch.bfloat16, 3)[1].tolist(), [2] * 3)
        self.assertEqual(one.of(torch.float32, 5, LINE)[1].tolist(), [0] * 5)


@needs_shared_memory
class WhoIsGone(unittest.TestCase):
    def refused(self, rows: SharedRows, pattern: str) -> float:
        rows.begin()
        began = time.monotonic()
        with self.assertRaisesRegex(dist.DistNetworkError, pattern):
            at_once(rows.publish)
        return time.monotonic() - began

    def test_who_hangs(self) -> None:
        waited = self.refused(rows_of(3, timeout=0.3)[1], "^rank 0 gave no sign for 0.3 s$")
        self.assertTrue(0.25 < waited < 3, waited)

    def test_who_has_ended(self) -> None:
        """A child of this process, which has not been waited for: its number still exists."""
        child = os.posix_spawnp("true", ["true"], os.environ)
        try:
            rows = SharedRows(mmap.mmap(-1, 4096 - 4096 % LINE), [os.getpid(), child], 0, 20.0)
            self.assertLess(self.refused(rows, "^rank 1 has left$"), 5)
            self.assertFalse(shared_memory._is_running(child))
        finally:
            os.waitpid(child, 0)
        self.assertFalse(shared_memory._is_running(child))
        self.assertTrue(shared_memory._is_running(os.getpid()))

    def test_who_has_left_but_lives_on(self) -> None:
        one, two = rows_of(2)
        two.leave()
        self.assertLess(self.refused(one, "^rank 1 has left$"), 5)

    def test_want_of_descriptors_says_nothing_of_others(self) -> None:
        one, two = rows_of(2)
        with mock.patch("os.pidfd_open", side_effect=OSError(24, "Too many open files")):
            found = at_once(lambda: gather(one, 1), lambda: gather(two, 2, before_writing=0.3))
        self.assertEqual(found, [[1, 2], [1, 2]])

    def test_who_has_written_and_then_ended_is_read(self) -> None:
        one, two = rows_of(2)

        def just_ended(pid: int) -> bool:
            two._counts[1, WRITTEN] = 1  # between the look at its count and the question
            return False

        one.begin()
        with mock.patch.object(shared_memory, "_is_running", just_ended):
            one.publish()
        one.end()
        self.assertEqual(two._counts[0, READ], 1)

    def test_waiting_leaves_the_core_to_others(self) -> None:
        one, two = rows_of(2)

        def busy() -> float:
            before = time.thread_time()
            gather(one, 1)
            return time.thread_time() - before

        self.assertLess(at_once(lambda: gather(two, 2, before_writing=0.5), busy)[1], 0.2)


# ----------------------------------------------------------------------------------------------------- many processes


def many_rounds(rank: int, rounds: int) -> dict[str, Any]:
    """Whole numbers of every length and at every pace, so that a torn or early read shows."""
    files = len(os.listdir("/proc/self/fd"))
    rows = share_rows(8 * 1000, timeout=20.0)
    if rows is None:
        return {"shares": False}
    pace, wrong = random.Random(rank), 0
    for number in range(rounds):
        count = 1 + number * 37 % 1000
        shared = rows.of(torch.int64, count)
        rows.begin()
        shared[rank] = number * 10 + rank
        if pace.random() < 0.05:
            time.sleep(pace.random() * 2e-3)
        rows.publish()
        if pace.random() < 0.05:
            time.sleep(pace.random() * 2e-3)
        expected = number * 10 + torch.arange(dist.get_world_size()).unsqueeze(1)
        wrong += int((shared != expected).sum())
        rows.end()
    return {"shares": True, "wrong": wrong, "files": len(os.listdir("/proc/self/fd")) - files}


def refusing(rank: int, how: str) -> list[bool]:
    """Whether all share memory where one of them cannot."""
    files = len(os.listdir("/proc/self/fd"))
    patches = {
        "another machine": mock.patch("platform.machine", lambda: "aarch64"),
        "no memory": mock.patch("os.posix_fallocate", mock.Mock(side_effect=OSError(28, "No space left on device"))),
        "old kernel": mock.patch("os.pidfd_open", mock.Mock(side_effect=OSError(38, "Function not implemented"))),
        "old C library": mock.patch.object(shared_memory, "os", without(os, "memfd_create")),
        "not seen": mock.patch.object(shared_memory, "_map", lambda *args: None),
        "another's": mock.patch.object(shared_memory, "_map", of_another),
    }
    with patches[how] if rank == (1 if how in ("not seen", "another's") else 0) else mock.patch.dict(os.environ):
        found = share_rows(100, timeout=5.0)
    return [found is not None, len(os.listdir("/proc/self/fd")) != files]


def without(module: Any, name: str) -> Any:
    return types.SimpleNamespace(**{key: value for key, value in vars(module).items() if key != name})


def of_another(path: str, size: int, token: bytes) -> Any:
    """As in a container with process numbers of its own: the path leads to a file of somebody else."""
    other = os.memfd_create("other")
    try:
        os.truncate(other, size)
        return MAP(f"/proc/self/fd/{other}", size, token)
    finally:
        os.close(other)


MAP = shared_memory._map


def killed_in_round(rank: int) -> str:
    rows = share_rows(100, timeout=20.0)
    if rows is None:
        return "no rows"
    for number in range(5):
        rows.begin()
        if rank == 1 and number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            rows.publish()
        except dist.DistNetworkError as error:
            return f"{number}: {error}"
        rows.end()
    return "nothing"


@needs_processes
@needs_shared_memory
class ManyProcesses(unittest.TestCase):
    def test_what_is_written_is_read(self) -> None:
        for count, rounds in ((2, 3000), (3, 1000)):  # three on two cores: one of them always rests
            found = in_processes(count, many_rounds, rounds)
            self.assertEqual(found, [{"shares": True, "wrong": 0, "files": 1}] * count)  # mmap keeps one

    def test_none_of_them_where_one_cannot(self) -> None:
        for how in ("another machine", "no memory", "old kernel", "old C library", "not seen", "another's"):
            with self.subTest(how):
                self.assertEqual(in_processes(2, refusing, how), [[False, False]] * 2)

    def test_who_is_killed_is_named(self) -> None:
        first, second, third = outcomes(3, killed_in_round)
        self.assertEqual(second.code, -signal.SIGKILL)
        self.assertEqual([first.result, third.result], ["3: rank 1 has left"] * 2)


if __name__ == "__main__":
    unittest.main()
