"""Signals are noted, not obeyed; a second one ends the process and those that work for it."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
import time
import unittest
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

from torchbasics.interrupts import SignalNote


def forked(work: Callable[[], Any]) -> int:
    """Does `work` in a forked process of 20 seconds at most; the process's number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forking with threads
        child = os.fork()
    if not child:
        signal.alarm(20)
        code = 1
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return child


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class InOneProcess(unittest.TestCase):
    def test_the_first_is_noted_and_ends_what_goes_on(self) -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        for number in (signal.SIGINT, signal.SIGTERM):
            seen = []
            with SignalNote() as note:
                for batch in note.until(range(9)):
                    seen.append(batch)
                    if batch == 2:
                        os.kill(os.getpid(), number)
                self.assertEqual((seen, note.signum), ([0, 1, 2], number))
            self.assertEqual(note.signum, 0)
            self.assertEqual([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], before)

    @unittest.skipUnless(hasattr(signal, "SIGCHLD"), "no SIGCHLD here")
    def test_torchs_handler_of_dead_workers_raises_no_more_once_all_ends(self) -> None:
        def torchs(signum: int, frame: object) -> None:
            raise RuntimeError("a worker is killed by signal")

        self.addCleanup(signal.signal, signal.SIGCHLD, signal.getsignal(signal.SIGCHLD))
        for number, expected in ((signal.SIGINT, torchs), (signal.SIGTERM, signal.SIG_DFL)):
            signal.signal(signal.SIGCHLD, torchs)
            with SignalNote():
                os.kill(os.getpid(), number)
                self.assertEqual(signal.getsignal(signal.SIGCHLD), expected)
        signal.signal(signal.SIGCHLD, torchs)
        with self.assertRaises(KeyError), SignalNote():
            raise KeyError
        self.assertEqual(signal.getsignal(signal.SIGCHLD), signal.SIG_DFL)

    def test_a_handler_that_is_not_pythons_stays(self) -> None:
        """Of a program that Python is a part of: it could not be put back."""
        with (
            mock.patch.object(signal, "getsignal", side_effect={signal.SIGINT: None, signal.SIGTERM: 0}.get),
            mock.patch.object(signal, "signal", return_value=signal.SIG_DFL) as taken,SignalNote()
        ):
            pass
        self.assertEqual({call.args[0] for call in taken.call_args_list}, {signal.SIGTERM})

    def test_what_is_ignored_stays_ignored(self) -> None:
        """As SIGINT is in a background job of a script, whose Ctrl-C is not meant for it."""
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_IGN))
        with SignalNote() as note:
            os.kill(os.getpid(), signal.SIGINT)
            self.assertEqual((note.signum, signal.getsignal(signal.SIGINT)), (0, signal.SIG_IGN))
            os.kill(os.getpid(), signal.SIGTERM)
            self.assertEqual(note.signum, signal.SIGTERM)
        self.assertEqual(signal.getsignal(signal.SIGINT), signal.SIG_IGN)

    def test_no_handlers_where_none_are_allowed_or_wanted(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with SignalNote(enabled=False):
            self.assertEqual(signal.getsignal(signal.SIGTERM), before)
        found: list[Any] = []

        def elsewhere() -> None:
            with SignalNote():
                found.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(10)
        self.assertEqual(found, [before])


@unittest.skipUnless(hasattr(os, "fork"), "needs fork")
class InMany(unittest.TestCase):
    def test_a_worker_leaves_sigint_to_its_parent_and_obeys_sigterm(self) -> None:
        for number, code in ((signal.SIGINT, 0), (signal.SIGTERM, 143)):
            with SignalNote() as note:

                def work(note: SignalNote = note, number: int = number) -> int:
                    os.kill(os.getpid(), number)
                    return int(note.signum != 0)

                self.assertEqual(code_of(forked(work)), code)
                self.assertEqual(note.signum, 0)

    def test_a_second_one_ends_the_workers_too(self) -> None:
        alive, written = os.pipe()  # at its end when the last process that may write is gone

        def parent() -> None:
            with SignalNote():
                worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,), daemon=True)
                worker.start()
                os.kill(os.getpid(), signal.SIGINT)
                os.write(written, b"x")
                os.kill(os.getpid(), signal.SIGINT)
                os.write(written, b"still here")

        child = forked(parent)
        os.close(written)
        self.assertEqual(code_of(child), -signal.SIGINT)
        end, said = time.monotonic() + 5, b""
        while select.select([alive], [], [], max(0.0, end - time.monotonic()))[0] and (more := os.read(alive, 99)):
            said += more
        os.close(alive)
        self.assertLess(time.monotonic(), end, "the worker lives on")
        self.assertEqual(said, b"x")


if __name__ == "__main__":
    unittest.main()
