"""SIGINT and SIGTERM as a wish that is noted, to be answered at a safe point."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class Interrupted(Exception):
    """SIGINT or SIGTERM came; everything was saved at `checkpoint`. The usual exit code is 128 + `signum`."""

    def __init__(self, signum: int, checkpoint: Path) -> None:
        super().__init__(f"{signal.Signals(signum).name}: saved {checkpoint}")
        self.signum, self.checkpoint = signum, checkpoint


class SignalNote:
    """As a context: the first SIGINT or SIGTERM is only noted in `signum`; a second one ends the process at once.

    One that the process ignores stays ignored, as SIGINT is in a script's background job: Ctrl-C is then for others.
    Outside the main thread, where Python allows no handlers, and with `enabled=False` it does nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalNote:
        self.signum, self._owner = 0, os.getpid()
        if self.enabled and threading.current_thread() is threading.main_thread():
            others = (None, signal.SIG_IGN)  # None: not Python's, and could not be put back
            ours = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) not in others]
            self._before = {signum: signal.signal(signum, self._note) for signum in ours}
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.signum = 0
        if self._before and exc_info[0] is not None:  # perhaps a dead worker: torch's handler would say it again
            _ignore_ended_workers()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _note(self, signum: int, frame: object) -> None:
        if os.getpid() != self._owner:  # a loader's forked worker: the main process decides when it ends
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        if self.signum:
            for worker in multiprocessing.active_children():  # alone they would notice seconds later
                worker.kill()
            signal.signal(signum, signal.SIG_DFL)
            os.kill(self._owner, signum)
        self.signum = signum
        if signum == signal.SIGTERM:
            # Sent to the whole process group it ends a loader's workers too, and torch's handler of that would raise
            # anywhere, in mid-step. Not put back: the process is about to end.
            _ignore_ended_workers()

    def until(self, batches: Iterable) -> Iterator:
        """The batches, until a signal is noted."""
        for batch in batches:
            yield batch
            if self.signum:
                return


def _ignore_ended_workers() -> None:
    if hasattr(signal, "SIGCHLD") and callable(signal.getsignal(signal.SIGCHLD)):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
