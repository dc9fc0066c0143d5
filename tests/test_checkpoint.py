"""Saves that are whole or did not happen, loads that refuse whatever was changed, and the run directory."""

from __future__ import annotations

import collections
import contextlib
import enum
import errno
import hashlib
import io
import json
import math
import os
import pickle
import random
import signal
import stat
import sys
import tempfile
import threading
import unittest
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

from torchbasics import checkpoint
from torchbasics.checkpoint import (
    CheckpointError,
    CheckpointFolder,
    RunDirectory,
    bare_model,
    bare_state_dict,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    write_durably,
    write_json,
)

FORKS = hasattr(os, "fork")


def state(step: int = 1, **more: Any) -> dict[str, Any]:
    """A small checkpoint whose weights tell its step."""
    weights = {"weight": torch.full((3, 2), float(step)), "bias": torch.arange(2) + step}
    return {
        "format": 1,
        "epoch": step,
        "step": step,
        "model_state_dict": weights,
        "optimizer_state_dict": {"state": {}},
        "loss": 0.5,
        **more,
    }


def step_of(loaded: dict[str, Any]) -> int:
    """The step, after looking that the weights are that step's."""
    assert torch.equal(loaded["model_state_dict"]["weight"], torch.full((3, 2), float(loaded["step"])))
    return loaded["step"]


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of `call`, or the exception that it raises; fails if it takes longer (it hangs)."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "it hangs"
    return results[0]


def in_child(work: Callable[[], Any], seconds: int = 20) -> int:
    """Runs `work` in a forked process and returns its exit code: 0, 1 if it raises, else what it exits with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forking with threads
        child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(seconds)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forget_ours() -> None:
    """In a forked process: it knows as little of the locks of this one as a process of its own would."""
    mock.patch.object(checkpoint, "_held", {}).start()


class TempCase(unittest.TestCase):
    REAL_FSYNC = False  # a thousand real ones take a minute; that each is called, and when, is looked at in Durability

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        if not self.REAL_FSYNC:
            patch = mock.patch.object(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)
            patch.start()
            self.addCleanup(patch.stop)
        self.root = Path(folder.name)
        self.path = self.root / "best.pt"
        self.record = self.root / "best.pt.json"

    def one_line(self, error: BaseException, *words: str) -> None:
        self.assertNotIn("\n", str(error))
        self.assertNotIn("\x1b", str(error))
        for word in words:
            self.assertIn(word, str(error))

    def names(self, folder: Path | None = None) -> list[str]:
        return sorted(path.name for path in (folder or self.root).iterdir())

    def refused(self, *words: str, path: Path | None = None) -> None:
        with self.assertRaises(CheckpointError) as caught:
            load_checkpoint(path or self.path)
        self.one_line(caught.exception, str(path or self.path), *words)
        self.assertNotIn("weights_only", str(caught.exception))  # never how to load it all the same


class RoundTrip(TempCase):
    REAL_FSYNC = True
    VALUES: ClassVar[dict[str, Any]] = {
        "text": "é\n",
        "int": 2**70,
        "float": 0.1,
        "inf": -math.inf,
        "flag": True,
        "none": None,
        "list": [1, [2.5, "x"]],
        "tuple": (1, ("a", None)),
        "dict": {"a": {1: 2}},
        "ordered": collections.OrderedDict(b=1, a=2),
        "counter": collections.Counter("aab"),
        "size": torch.Size([2, 3]),
        "empty": {},
        "no items": [],
    }

    def test_what_was_saved_is_loaded(self) -> None:
        tensors = {
            "float": torch.randn(3, 4),
            "int": torch.arange(3),
            "bool": torch.tensor([True]),
            "half": torch.ones(2).half(),
            "bf16": torch.ones(2).bfloat16(),
            "scalar": torch.tensor(1.5),
            "none": torch.zeros(0, 3),
            "parameter": nn.Parameter(torch.ones(2)),
        }
        save_checkpoint(state(7, values=self.VALUES, tensors=tensors), self.path)
        for loaded in (load_checkpoint(self.path), torch.load(self.path, weights_only=True)):
            self.assertEqual(step_of(loaded), 7)
            self.assertEqual(loaded["values"], self.VALUES)
            self.assertEqual(
                {key: type(value) for key, value in loaded["values"].items()},
                {key: type(value) for key, value in self.VALUES.items()},
            )
            for name, tensor in tensors.items():
                self.assertEqual(
                    (loaded["tensors"][name].dtype, loaded["tensors"][name].shape), (tensor.dtype, tensor.shape)
                )
                self.assertTrue(torch.equal(loaded["tensors"][name], tensor))
        self.assertEqual(self.names(), ["best.pt", "best.pt.json"])

    def test_the_keys_of_the_tutorial_suffice(self) -> None:
        save_checkpoint({"epoch": 3, "model_state_dict": {}, "optimizer_state_dict": {}, "loss": 1}, str(self.path))
        self.assertEqual(load_checkpoint(str(self.path))["epoch"], 3)

    def test_the_record_is_the_size_and_the_hash(self) -> None:
        save_checkpoint(state(), self.path)
        content = self.path.read_bytes()
        self.assertEqual(
            json.loads(self.record.read_bytes())["files"],
            [{"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}],
        )

    def test_the_states_of_optimizers_and_schedules_are_plain(self) -> None:
        for make in (
            lambda p: torch.optim.Adam(p),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
            lambda p: torch.optim.Adagrad(p),
            lambda p: torch.optim.RMSprop(p),
            lambda p: torch.optim.LBFGS(p),
        ):
            model = nn.Linear(2, 1)
            optimizer = make(model.parameters())

            def closure(model: nn.Module = model) -> torch.Tensor:
                model.zero_grad()
                loss = model(torch.ones(1, 2)).sum() ** 2
                loss.backward()
                return loss

            optimizer.step(closure)
            schedules = [
                lrs.LambdaLR(optimizer, lambda step: 1.0),
                lrs.OneCycleLR(optimizer, 0.1, 9, cycle_momentum=False),
                lrs.ReduceLROnPlateau(optimizer),
                lrs.MultiStepLR(optimizer, [3, 5]),
                lrs.LinearLR(optimizer),
                lrs.CosineAnnealingLR(optimizer, 5),
                lrs.SequentialLR(optimizer, [lrs.LinearLR(optimizer), lrs.StepLR(optimizer, 2)], [3]),
            ]
            states = [schedule.state_dict() for schedule in schedules]
            save_checkpoint(state(optimizer_state_dict=optimizer.state_dict(), schedules=states), self.path)
            loaded = load_checkpoint(self.path)
            self.assertEqual([s["last_epoch"] for s in loaded["schedules"]], [s["last_epoch"] for s in states])
            optimizer.load_state_dict(loaded["optimizer_state_dict"])

    def test_values_that_safe_loading_would_refuse_are_refused_at_once(self) -> None:
        import numpy as np

        save_checkpoint(state(1), self.path)
        pair = collections.namedtuple("pair", "a b")
        number = enum.IntEnum("number", "one")
        for bad, where in (
            ({"x": np.float64(1.0)}, "checkpoint['x'] is a float64"),
            ({"x": [1, np.str_("a")]}, "checkpoint['x'][1] is a str"),
            ({"x": {"y": ({1},)}}, "checkpoint['x']['y'][0] is a set"),
            ({"x": collections.defaultdict(list)}, "checkpoint['x'] is a defaultdict"),
            ({"x": pair(1, 2)}, "checkpoint['x'] is a pair"),
            ({"x": number.one}, "checkpoint['x'] is a number"),
            ({"x": Path("a")}, "checkpoint['x'] is a"),
            ({"x": object()}, "checkpoint['x'] is a object"),
            ({"x": b"a"}, "checkpoint['x'] is a bytes"),
            ({"x": {0.5: 1}}, "checkpoint['x']: a key must be a string or an int, got float"),
            ({"x": torch.float32}, "checkpoint['x'] is a dtype"),
            ({"x": {np.str_("k"): 1}}, "checkpoint['x']: a key must"),
            ({"x": nn.Linear(1, 1)}, "checkpoint['x'] is a Linear"),
            ({"x": torch.ones(2).as_subclass(TensorOfOurs)}, "checkpoint['x'] is a TensorOfOurs"),
            ({"x": torch.ones(2, device="meta")}, "checkpoint['x'] is a tensor that is"),
            ({"x": torch.ones(2).to_sparse()}, "checkpoint['x'] is a tensor that is"),
        ):
            with self.assertRaises(TypeError) as caught:
                save_checkpoint(state(2, **bad), self.path)
            self.one_line(caught.exception, where)
            self.assertEqual(step_of(load_checkpoint(self.path)), 1)
        self.assertEqual(self.names(), ["best.pt", "best.pt.json"])

    def test_a_missing_key_is_refused_at_the_save(self) -> None:
        for key in ("epoch", "model_state_dict", "optimizer_state_dict", "loss"):
            incomplete = state()
            del incomplete[key]
            with self.assertRaisesRegex(CheckpointError, f"the key '{key}' is missing"):
                save_checkpoint(incomplete, self.path)
        self.assertEqual(self.names(), [])

    def test_map_location(self) -> None:
        save_checkpoint(state(), self.path)
        self.assertEqual(
            load_checkpoint(self.path, map_location="meta")["model_state_dict"]["weight"].device.type, "meta"
        )
        for absent in ("cuda:77", torch.device("cuda:77"), "nowhere"):  # the machine's fault, not the file's
            with self.assertRaisesRegex(ValueError, f"map_location='{absent}': .*; use 'cpu'"):
                load_checkpoint(self.path, map_location=absent)


class TensorOfOurs(torch.Tensor):
    pass


class Durability(TempCase):
    """In which order a save reaches the disk, and what is left when it ends at any point between."""

    def events_of(self, work: Callable[..., Any]) -> list[str]:
        events: list[str] = []
        fsync, replace = os.fsync, os.replace

        def seen_fsync(descriptor: int) -> None:
            found = os.fstat(descriptor)
            inodes = {os.stat(self.root / name).st_ino: name for name in os.listdir(self.root)}
            name = "folder" if stat.S_ISDIR(found.st_mode) else inodes[found.st_ino].replace(str(os.getpid()), "PID")
            events.append(f"fsync {name} {'' if name == 'folder' else found.st_size}".strip())
            fsync(descriptor)

        def seen_replace(source: Any, target: Any) -> None:
            events.append(f"replace {Path(target).name} {os.stat(source).st_size}")
            replace(source, target)

        with mock.patch.object(os, "fsync", seen_fsync), mock.patch.object(os, "replace", seen_replace):
            work()
        return events

    @unittest.skipUnless(os.name == "posix", "a folder is synchronised on POSIX only")
    def test_the_order_of_a_save(self) -> None:
        for step in (1, 2):  # a new file, and one that takes the place of another
            events = self.events_of(lambda step=step: save_checkpoint(state(step), self.path))
            size, record = self.path.stat().st_size, self.record.stat().st_size
            self.assertEqual(
                events,
                [
                    f"fsync .best.pt.PID.tmp {size}",  # the whole content is on the disk before any name changes
                    f"fsync .best.pt.json.PID.tmp {record}",
                    f"replace best.pt.json {record}",
                    "fsync folder",  # then the record
                    f"replace best.pt {size}",
                    "fsync folder",
                ],
            )

    @unittest.skipUnless(os.name == "posix", "a folder is synchronised on POSIX only")
    def test_a_new_folder_is_synchronised_with_the_one_above(self) -> None:
        synced: list[int] = []
        with mock.patch.object(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino)):
            CheckpointFolder(self.root / "a" / "b").save(state())
        self.assertLessEqual({self.root.stat().st_ino, (self.root / "a").stat().st_ino}, set(synced))

    @contextlib.contextmanager
    def at_point(self, number: int, act: Callable[[], Any]) -> Iterator[list[str]]:
        """Calls `act` before the `number`th operation on the disk."""
        done: list[str] = []

        def counted(name: str, real: Callable) -> Callable:
            def operation(*args: Any, **options: Any) -> Any:
                done.append(name)
                if len(done) == number:
                    act()
                return real(*args, **options)

            return operation

        def counted_open(path: Any, mode: str = "r", **options: Any) -> Any:
            file = counted("open", open)(path, mode, **options)
            if "w" in mode:
                return CountedFile(file, counted("write", file.write))
            return file

        with contextlib.ExitStack() as stack:
            for name in ("fsync", "replace", "unlink"):
                stack.enter_context(mock.patch.object(os, name, counted(name, getattr(os, name))))
            stack.enter_context(mock.patch.object(checkpoint, "open", counted_open, create=True))
            yield done

    def saves(self) -> dict[str, tuple[Callable[[], Any], Callable[[], int]]]:
        """Two ways to save step 4 where step 3 is, each with what loads afterwards."""
        folder = CheckpointFolder(self.root, keep=2)

        def latest() -> int:
            found = folder.latest()
            assert found is not None
            return step_of(found[1])

        return {
            "step": (lambda: folder.save(state(4)), latest),
            "best": (lambda: folder.save_best(state(4)), lambda: step_of(load_checkpoint(folder.best))),
        }

    def prepare(self) -> None:
        for path in self.root.iterdir():
            path.unlink()
        folder = CheckpointFolder(self.root, keep=2)
        for step in (1, 2, 3):
            folder.save(state(step))
        folder.save_best(state(3))

    @unittest.skipUnless(FORKS, "needs fork")
    def test_killed_before_any_operation_the_old_or_the_new_one_loads(self) -> None:
        for kind, (save, load) in self.saves().items():
            codes, found = [], []
            for number in range(1, 60):
                self.prepare()

                def killed(number: int = number, save: Callable = save) -> None:
                    with self.at_point(number, lambda: os._exit(9)):
                        save()

                codes.append(in_child(killed))
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # nothing may even look damaged
                    found.append(load())
                if codes[-1] == 0:
                    break
                save()  # the next one works, and leaves nothing of the killed one
                self.assertEqual(load(), 4)
                CheckpointFolder(self.root, keep=2).save(state(5))
                self.assertEqual(
                    self.names(),
                    [
                        "best.pt",
                        "best.pt.json",
                        *(
                            f"step-0000000{step}.pt{end}"
                            for step in ((4, 5) if kind == "step" else (3, 5))
                            for end in ("", ".json")
                        ),
                    ],
                )
            self.assertEqual(set(codes[:-1]), {9}, kind)
            self.assertEqual(codes[-1], 0)
            self.assertGreater(
                len(codes), 8
            )  # open, write …, fsync, open, write, fsync, replace, fsync, replace, fsync
            self.assertEqual(found, sorted(found))  # old, old, …, new, new
            self.assertEqual(set(found), {3, 4})

    def test_a_full_disk_at_any_operation(self) -> None:
        for kind, (save, load) in self.saves().items():
            outcomes = []
            for number in range(1, 60):
                self.prepare()
                error = OSError(errno.ENOSPC, "No space left on device")

                def fail(error: OSError = error) -> None:
                    raise error

                with self.at_point(number, fail) as done:
                    try:
                        save()
                        outcomes.append("saved")
                    except OSError as caught:
                        self.assertEqual(caught.errno, errno.ENOSPC)
                        outcomes.append("refused")
                self.assertFalse([name for name in self.names() if name.endswith(".tmp")], (kind, number))
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    self.assertIn(load(), (3, 4))
                if len(done) < number:
                    break
            self.assertGreater(outcomes.count("refused"), 7)
            self.assertEqual(outcomes[-1], "saved")

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_real_full_device(self) -> None:
        for size in (2, 500_000):  # one that fits the buffer and fails at the flush, and one that doesn't
            save_checkpoint(state(1), self.path)

            def full(path: Any, mode: str = "r", **options: Any) -> Any:
                return open("/dev/full" if str(path).endswith(".tmp") else path, mode, **options)

            with mock.patch.object(checkpoint, "open", full, create=True), self.assertRaises(OSError) as caught:
                save_checkpoint(state(2, big=torch.zeros(size)), self.path)
            self.assertEqual(caught.exception.errno, errno.ENOSPC)
            self.assertEqual(step_of(load_checkpoint(self.path)), 1)
            self.assertEqual(self.names(), ["best.pt", "best.pt.json"])

    def test_an_interrupt_leaves_no_temporary_file(self) -> None:
        save_checkpoint(state(1), self.path)
        with mock.patch.object(torch, "save", side_effect=KeyboardInterrupt), self.assertRaises(KeyboardInterrupt):
            save_checkpoint(state(2), self.path)
        self.assertEqual(self.names(), ["best.pt", "best.pt.json"])
        self.assertEqual(step_of(load_checkpoint(self.path)), 1)

    def test_between_the_record_and_the_file_both_contents_are_allowed_and_no_third(self) -> None:
        save_checkpoint(state(1), self.path)
        first = self.path.read_bytes()
        save_checkpoint(state(2), self.path)
        self.path.write_bytes(first)  # as if the second replace had not come
        self.assertEqual(step_of(load_checkpoint(self.path)), 1)
        save_checkpoint(state(3), self.path)
        second = self.path.read_bytes()
        self.path.write_bytes(first)  # nor the third: what is there stays allowed, not what the record says first
        self.assertEqual(step_of(load_checkpoint(self.path)), 1)
        self.path.write_bytes(second)
        save_checkpoint(state(4), self.path)
        self.path.write_bytes(first)
        self.refused("SHA-256")
        self.path.write_bytes(second)
        self.assertEqual(step_of(load_checkpoint(self.path)), 3)

    def test_a_damaged_one_is_not_made_good_by_saving_over_it(self) -> None:
        save_checkpoint(state(1), self.path)
        damaged = bytearray(self.path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        self.path.write_bytes(damaged)
        save_checkpoint(state(2), self.path)
        self.assertEqual(step_of(load_checkpoint(self.path)), 2)
        self.path.write_bytes(damaged)
        self.refused("damaged")

    def test_write_durably_and_json(self) -> None:
        write_json(self.root / "a.json", {"b": [1, "é"]})
        self.assertEqual(json.loads((self.root / "a.json").read_text(encoding="utf-8")), {"b": [1, "é"]})
        with self.assertRaises(ValueError):
            write_json(self.root / "a.json", {"b": math.nan})
        with self.assertRaises(ZeroDivisionError):
            write_durably(self.root / "a.json", lambda file: 1 // 0)
        self.assertEqual(json.loads((self.root / "a.json").read_text(encoding="utf-8")), {"b": [1, "é"]})
        self.assertEqual(self.names(), ["a.json"])


class CountedFile(io.RawIOBase):
    """A file whose writes go through `counted_write`."""

    def __init__(self, file: Any, counted_write: Callable) -> None:
        self.file, self.counted_write = file, counted_write

    def write(self, data: Any) -> int:
        return self.counted_write(data)

    def flush(self) -> None:
        if not self.file.closed:
            self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()
        super().close()


class Damage(TempCase):
    """Whatever is not what was saved is refused, and torch never sees it."""

    def setUp(self) -> None:
        super().setUp()
        save_checkpoint(state(1, text="some words"), self.path)
        self.content, self.recorded = self.path.read_bytes(), self.record.read_bytes()
        patch = mock.patch.object(torch, "load")
        self.load = patch.start()
        self.addCleanup(patch.stop)
        self.addCleanup(lambda: self.load.assert_not_called())

    def test_single_bits_of_the_checkpoint(self) -> None:
        draw = random.Random(0)
        for position in [0, len(self.content) - 1, *draw.sample(range(len(self.content)), 300)]:
            flipped = bytearray(self.content)
            flipped[position] ^= 1 << draw.randrange(8)
            self.path.write_bytes(flipped)
            self.refused("damaged: its SHA-256 is not the recorded one")

    def test_bits_of_the_record_at_every_position(self) -> None:
        for position in range(len(self.recorded)):
            for bit in (position % 8, (position + 5) % 8):  # one of them makes another printable character, or may
                flipped = bytearray(self.recorded)
                flipped[position] ^= 1 << bit
                self.record.write_bytes(flipped)
                with self.assertRaises(CheckpointError, msg=(position, bit)):
                    load_checkpoint(self.path)

    def test_other_lengths(self) -> None:
        size = len(self.content)
        for length in (0, 1, size // 2, size - 1):
            self.path.write_bytes(self.content[:length])
            self.refused(f"damaged: {length:,} bytes, its record says {size:,}")
        self.path.write_bytes(self.content + b"\0")
        self.refused(f"damaged: {size + 1:,} bytes")

    def test_other_records(self) -> None:
        for content in (
            b"",
            b"{}",
            b"[]",
            b"null",
            b"\xff\xfe",
            self.recorded[:-1],
            self.recorded + b" ",
            b"[" * 90_000,
            b"{" * 200_000,
            json.dumps({"files": json.loads(self.recorded)["files"]}).encode(),
            b'{"files": 7, "sha256": ""}',
            self.recorded.replace(b'"size"', b'"SIZE"'),
        ):
            self.record.write_bytes(content)
            self.refused("damaged record")

    def test_no_record(self) -> None:
        self.record.unlink()
        self.refused("its record best.pt.json is missing")

    def test_anothers_record(self) -> None:
        save_checkpoint(state(2, text="other words"), self.root / "other.pt")
        self.record.write_bytes((self.root / "other.pt.json").read_bytes())
        self.refused("damaged")

    def test_no_checkpoint(self) -> None:
        self.path.unlink()
        with self.assertRaises(FileNotFoundError):
            load_checkpoint(self.path)

    def put(self, path: Path, kind: str) -> None:
        content = path.read_bytes()
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "dangling link":
            path.symlink_to(self.root / "nowhere")
        else:
            (self.root / "elsewhere").write_bytes(content)
            path.symlink_to(self.root / "elsewhere")

    @unittest.skipUnless(os.name == "posix", "needs pipes and links")
    def test_what_is_no_file(self) -> None:
        for path in (self.path, self.record):
            for kind in ("folder", "pipe", "link", "dangling link"):
                with self.subTest(path=path.name, kind=kind):
                    self.put(path, kind)
                    error = within(10, lambda: load_checkpoint(self.path))
                    self.assertIsInstance(error, CheckpointError)
                    self.one_line(error, str(self.path))
                    path.rmdir() if kind == "folder" else path.unlink()
                    self.path.write_bytes(self.content)
                    self.record.write_bytes(self.recorded)


class Content(TempCase):
    """Files whose record is right, but that don't hold a checkpoint."""

    def forge(self, content: bytes) -> None:
        self.path.write_bytes(content)
        self.record.write_bytes(
            checkpoint._record_bytes([{"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}])
        )

    def save(self, value: Any) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        self.forge(buffer.getvalue())

    def test_the_forgery_of_this_test_loads(self) -> None:
        self.save(state(3))
        self.assertEqual(step_of(load_checkpoint(self.path)), 3)

    def test_each_missing_key_is_named(self) -> None:
        for key in ("format", "epoch", "model_state_dict", "optimizer_state_dict", "loss"):
            value = state()
            del value[key]
            self.save(value)
            self.refused(f"the key {key!r} is missing")

    def test_each_wrong_type_is_named(self) -> None:
        wrong: tuple[tuple[str, Any], ...] = (
            ("epoch", "1"),
            ("epoch", 1.0),
            ("model_state_dict", []),
            ("optimizer_state_dict", None),
            ("loss", "low"),
            ("loss", torch.tensor(1.0)),
        )
        for key, value in wrong:
            self.save(state(**{key: value}))
            self.refused(f"{key!r} is a {type(value).__name__}")
        self.save(state(model_state_dict={"a": torch.ones(1), "b": 3}))
        self.refused("model_state_dict['b'] is a int, expected a tensor")
        for value in ([1, 2], torch.ones(2), None):
            self.save(value)
            self.refused(f"holds a {type(value).__name__}, expected a dict")

    def test_another_format_is_named(self) -> None:
        self.save(state(format=2))
        self.refused("format 2, this version of torchbasics reads 1")
        self.save({"format": 3, "all": "else is new"})
        self.refused("format 3, this version of torchbasics reads 1")
        self.save(state(format="1"))
        self.refused("format '1'")

    def test_no_torch_file_at_all(self) -> None:
        for content in (b"", b"PK\x03\x04 not a zip", b"\x80\x02."):
            self.forge(content)
            self.refused("unreadable")
        self.forge(bytes(1000))  # as an empty tar archive: torch's text says how to load such a file all the same
        self.refused("unreadable (not a file of save_checkpoint)")

    def test_a_torchscript_program_is_named_and_not_run(self) -> None:
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit announces its own end
            torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), file)
        self.forge(file.getvalue())
        with warnings.catch_warnings(record=True) as warned, mock.patch("torch.jit.load") as run:
            warnings.simplefilter("always")
            self.refused("is a TorchScript program, not a checkpoint")
        self.assertEqual((run.called, [str(warning.message) for warning in warned]), (False, []))

    def hostile(self, target: Path) -> Any:
        class Hostile:
            def __reduce__(self) -> tuple:
                return Path.touch, (target,)

        return Hostile()

    def test_hostile_pickles_do_nothing(self) -> None:
        target = self.root / "owned"
        legacy = pickle.dumps(self.hostile(target), protocol=2)
        pickle.loads(legacy)
        self.assertTrue(target.exists())  # it does work where it is let
        target.unlink()
        for value in (state(extra=self.hostile(target)), self.hostile(target)):
            self.save(value)
            self.refused("unreadable (holds more than tensors and plain values)")
        self.forge(legacy)
        self.refused("unreadable")
        self.record.unlink()
        self.refused("record")
        self.assertFalse(target.exists())

    def test_what_is_refused_before_torch_sees_it(self) -> None:
        class Call:
            def __reduce__(self) -> tuple:
                return bytearray, (100,)

        plain, called, newer, packed = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
        torch.save(state(weight=torch.zeros(1000)), plain)
        torch.save(state(extra=Call()), called)
        torch.save(state(extra=Call()), newer, pickle_protocol=4)  # names what it calls in another way
        with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
            names = old.namelist()
            for name in names:
                new.writestr(name, old.read(name))
        with warnings.catch_warnings(), zipfile.ZipFile(plain, "a") as twice:
            warnings.simplefilter("ignore")
            twice.writestr(next(name for name in names if "/data/" in name), b"other weights")
        for file, words in (
            (called, "holds more than tensors and plain values"),
            (newer, "holds more than tensors and plain values"),
            (packed, "would unpack to more than its own size"),
            (plain, "has two entries of one name"),
        ):
            self.forge(file.getvalue())
            with mock.patch.object(torch, "load", side_effect=AssertionError("torch has seen it")):
                self.refused(words)

    def test_there_is_no_second_try_with_less_safety(self) -> None:
        self.save(state())
        with mock.patch.object(torch, "load", side_effect=RuntimeError("no")) as load:
            self.refused("unreadable (no)")
        self.assertEqual([call.kwargs["weights_only"] for call in load.call_args_list], [True])


class Folder(TempCase):
    def setUp(self) -> None:
        super().setUp()
        self.folder = CheckpointFolder(self.root, keep=3)

    def fill(self, *steps: int) -> None:
        for step in steps:
            save_checkpoint(state(step), self.root / f"step-{step:08d}.pt")

    def damage(self, step: int) -> None:
        path = self.root / f"step-{step:08d}.pt"
        path.write_bytes(path.read_bytes()[:-1])

    def latest(self, warned: int = 0) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = self.folder.latest()
        self.assertEqual(len(caught), warned)
        assert found is not None
        self.assertEqual(found[0], self.root / f"step-{found[1]['step']:08d}.pt")
        self.messages = [str(warning.message) for warning in caught]
        return step_of(found[1])

    def test_none_and_no_folder(self) -> None:
        self.assertIsNone(self.folder.latest())
        self.assertIsNone(CheckpointFolder(self.root / "none").latest())
        self.assertEqual(CheckpointFolder(self.root / "none").steps(), [])

    def test_the_order_is_by_number(self) -> None:
        self.fill(9, 10, 8)
        self.assertEqual([step for step, _ in self.folder.steps()], [8, 9, 10])
        self.assertEqual(self.latest(), 10)
        self.fill(99_999_999, 100_000_000)
        os.utime(self.root / "step-00000009.pt", (2e9, 2e9))
        self.assertEqual(self.latest(), 100_000_000)

    def test_the_newest_intact_one_wins_with_one_warning_for_each_damaged(self) -> None:
        self.fill(1, 2, 3)
        self.damage(3)
        self.assertEqual(self.latest(warned=1), 2)
        self.assertIn("step-00000003.pt: damaged", self.messages[0])
        self.assertIn("going on from step-00000002.pt", self.messages[0])
        (self.root / "step-00000002.pt.json").unlink()
        self.assertEqual(self.latest(warned=2), 1)

    def test_all_damaged_is_not_none(self) -> None:
        self.fill(1, 2)
        self.damage(1)
        self.damage(2)
        with self.assertRaises(CheckpointError) as caught:
            self.folder.latest()
        self.one_line(caught.exception, "step-00000002.pt: damaged", "none of the 2 checkpoints", str(self.root))

    def test_a_folder_in_the_place_of_a_checkpoint(self) -> None:
        self.fill(1)
        (self.root / "step-00000002.pt").mkdir()
        self.assertEqual(self.latest(warned=1), 1)
        (self.root / "step-00000002.pt" / "notes.txt").write_text("kept")
        self.folder.save(state(2))  # put aside, not removed
        self.assertEqual(self.latest(warned=0), 2)
        self.assertEqual([path.read_text() for path in self.root.glob("step-00000002.pt.*.aside/notes.txt")], ["kept"])

    def test_the_last_few_and_the_best_stay_and_so_does_what_is_not_ours(self) -> None:
        foreign = [
            "notes.txt",
            "step-1.pt",
            "step-00000001.pt.bak",
            "step-00000001.pth",
            "best.pt.old",
            "xstep-00000001.pt",
            ".other.1.tmp",
            "step-00000001.json",
        ]
        for name in foreign:
            (self.root / name).write_text("mine")
        self.folder.save_best(state(1))
        paths = [self.folder.save(state(step)) for step in (1, 5, 9, 10, 11, 100)]
        self.assertEqual([path.name for path in paths][:2], ["step-00000001.pt", "step-00000005.pt"])
        ours = ["best.pt", *(f"step-{step:08d}.pt" for step in (10, 11, 100))]
        self.assertEqual(self.names(), sorted([*foreign, *ours, *(f"{name}.json" for name in ours)]))
        self.assertEqual(step_of(load_checkpoint(self.folder.best)), 1)
        self.assertEqual([(self.root / name).read_text() for name in foreign], ["mine"] * len(foreign))

    def test_damaged_newer_ones_do_not_push_out_the_intact(self) -> None:
        self.fill(1, 20, 30, 40)
        for step in (20, 30, 40):
            self.damage(step)
        self.assertEqual(self.latest(warned=3), 1)
        for step in (2, 3, 4, 5):  # the run goes on from 1
            self.folder.save(state(step))
            self.assertEqual(self.latest(warned=3), step)
        self.assertEqual([step for step, _ in self.folder.steps()], [3, 4, 5, 20, 30, 40])

    def test_what_killed_saves_left_is_removed(self) -> None:
        left = [
            ".step-00000003.pt.77.tmp",
            ".step-00000003.pt.json.77.tmp",
            ".best.pt.1.tmp",
            ".best.pt.json.1.tmp",
            "step-00000003.pt.json",
        ]
        kept = [".step-3.pt.77.tmp", ".step-00000003.pt.tmp", ".best.pt.x.tmp", "note.pt.json", ".a.1.tmp"]
        for name in (*left, *kept):
            (self.root / name).write_text("x")
        self.folder.save(state(4))
        self.assertEqual(self.names(), sorted([*kept, "step-00000004.pt", "step-00000004.pt.json"]))

    def test_keep(self) -> None:
        with self.assertRaisesRegex(ValueError, "keep must be at least 1, got 0"):
            CheckpointFolder(self.root, keep=0)
        for step in range(4):
            CheckpointFolder(self.root, keep=1).save(state(step))
        self.assertEqual(self.names(), ["step-00000003.pt", "step-00000003.pt.json"])


class Compiled(nn.Module):
    """What torch.compile returns, in the only thing that matters here: its attribute."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


class Named(nn.Module):
    """A model with names of its own that look like a wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.my_orig_mod = nn.Linear(2, 2)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 1)))


class Weights(unittest.TestCase):
    def equal(self, a: nn.Module, b: nn.Module) -> bool:
        one, two = bare_model(a).state_dict(), bare_model(b).state_dict()
        return all(torch.equal(x, y) for x, y in zip(one.values(), two.values(), strict=True))

    def test_prefixes_at_any_nesting(self) -> None:
        source = network()
        names = list(source.state_dict())
        for change in (
            lambda n: n,
            lambda n: f"module.{n}",
            lambda n: f"_orig_mod.{n}",
            lambda n: f"module._orig_mod.{n}",
            lambda n: f"_orig_mod.module.module.{n}",
            lambda n: n.replace("2.0", "2._orig_mod.0"),
            lambda n: n.replace("2.0", "2.module.0"),
            lambda n: "module." + n.replace("0.", "0._orig_mod.", 1),
        ):
            state = {change(name): tensor for name, tensor in source.state_dict().items()}
            for target in (
                network(),
                nn.DataParallel(network()),
                Compiled(network()),
                nn.DataParallel(Compiled(nn.DataParallel(network()))),
                nn.Sequential(
                    nn.Linear(2, 3), Compiled(nn.BatchNorm1d(3)), nn.DataParallel(nn.Sequential(nn.Linear(3, 1)))
                ),
            ):
                self.assertFalse(self.equal(source, target))
                load_weights(target, state)
                self.assertTrue(self.equal(source, target), list(state))
        for wrapped in (nn.DataParallel(source), Compiled(source), Compiled(nn.DataParallel(Compiled(source)))):
            self.assertIs(bare_model(wrapped), source)
            self.assertEqual(list(bare_state_dict(wrapped)), names)
        inner = nn.Sequential(source[0], Compiled(source[1]), source[2])
        self.assertEqual(list(bare_state_dict(inner)), names)

    def test_real_wrapper_of_torch_compile(self) -> None:
        source, target = network(), network()
        compiled: Any = torch.compile(target)  # compiles nothing before its first call
        self.assertEqual(list(bare_state_dict(compiled)), list(source.state_dict()))
        load_weights(compiled, torch.nn.DataParallel(source).state_dict())
        self.assertTrue(self.equal(source, target))

    def test_a_models_own_names_stay(self) -> None:
        source, target = Named(), Named()
        self.assertEqual(
            list(bare_state_dict(source)), ["module.weight", "module.bias", "my_orig_mod.weight", "my_orig_mod.bias"]
        )
        for state in (
            bare_state_dict(source),
            {f"_orig_mod.{n}": t for n, t in source.state_dict().items()},
            {f"module.{n}": t + 1 for n, t in source.state_dict().items()},
        ):
            load_weights(target, state)
            torch.testing.assert_close(list(target.state_dict().values()), list(state.values()), rtol=0, atol=0)

    def test_names_that_would_collide_stay(self) -> None:
        source = nn.ModuleDict({"module": nn.Linear(1, 1)})
        source.add_module("weight_owner", nn.Linear(1, 1))
        state = {"module.weight": torch.ones(1), "weight": torch.zeros(1)}
        self.assertEqual(checkpoint._without(("module",), state), state)

    def test_a_module_may_have_a_state_of_its_own(self) -> None:
        class Counter(nn.Linear):
            count = 0

            def get_extra_state(self) -> torch.Tensor:
                return torch.tensor(self.count)

            def set_extra_state(self, state: torch.Tensor) -> None:
                self.count = int(state)

        source, target = nn.Sequential(Counter(2, 2)), Compiled(nn.Sequential(Counter(2, 2)))
        source[0].count = 7
        load_weights(target, bare_state_dict(source))
        self.assertEqual(bare_model(target)[0].count, 7)

    def test_differences_are_named_and_nothing_is_loaded(self) -> None:
        source, target = network(), network()
        before = [tensor.clone() for tensor in target.state_dict().values()]
        good = source.state_dict()
        for change, words in (
            (lambda s: s.pop("2.0.bias"), "w.pt: of another model: '2.0.bias' is missing"),
            (lambda s: s.update({"2.0.bias": torch.ones(4)}), r"'2.0.bias' has shape \(4,\), expected \(1,\)"),
            (
                lambda s: s.update({"2.0.bias": torch.ones(1).double()}),
                "'2.0.bias' is torch.float64, expected torch.float32",
            ),
            (lambda s: s.update({"3.bias": torch.ones(1)}), "'3.bias' is unknown"),
            (lambda s: s.clear(), "'0.weight' is missing"),
        ):
            state = dict(good)
            change(state)
            with self.assertRaisesRegex(CheckpointError, words):
                load_weights(target, state, "w.pt")
            self.assertTrue(all(torch.equal(a, b) for a, b in zip(before, target.state_dict().values(), strict=True)))

    def test_loading_keeps_the_parameters_that_an_optimizer_holds(self) -> None:
        target = network()
        held = list(target.parameters())
        load_weights(target, network().state_dict())
        self.assertTrue(all(a is b for a, b in zip(held, target.parameters(), strict=True)))


class Run(TempCase):
    def setUp(self) -> None:
        super().setUp()
        self.path = self.root / "runs" / "a"

    def used(self) -> None:
        with RunDirectory(self.path) as run:
            run.write_info(seed=1)
            run.write_metrics([{"epoch": 1}])
            folder = CheckpointFolder(run.checkpoints)
            folder.save(state(1))
            folder.save_best(state(1))

    def snapshot(self) -> dict[str, Any]:
        return {
            str(path.relative_to(self.root)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in sorted(self.root.rglob("*"))
        }

    def refused(self, *words: str, path: Path | None = None, **options: bool) -> None:
        before = self.snapshot()
        with self.assertRaises(ValueError) as caught:
            RunDirectory(path or self.path, **options)
        self.one_line(caught.exception, str(path or self.path), *words)
        self.assertEqual(self.snapshot(), before)

    def test_a_new_one(self) -> None:
        self.used()
        self.assertEqual(self.names(self.path), [".lock", "checkpoints", "metrics.jsonl", "run.json"])
        self.assertEqual(json.loads((self.path / "run.json").read_text()), {"seed": 1})

    def test_an_empty_folder_and_one_with_other_files_are_new(self) -> None:
        self.path.mkdir(parents=True)
        (self.path / "notes.txt").write_text("mine")
        RunDirectory(self.path).close()
        self.assertEqual(self.names(self.path), [".lock", "notes.txt"])

    def test_a_used_one_is_refused(self) -> None:
        self.used()
        self.refused("holds an earlier run (run.json)", "--resume", "--overwrite", "--output")
        (self.path / "run.json").unlink()
        self.refused("holds an earlier run (metrics.jsonl)")
        (self.path / "metrics.jsonl").unlink()
        self.refused("holds an earlier run (checkpoints)")

    def test_overwrite_removes_our_names_only(self) -> None:
        self.used()
        foreign = [
            self.path / "notes.txt",
            *(
                self.path / "checkpoints" / name
                for name in (
                    "step-by-step.pt",
                    "best.pth",
                    "best.pt.bak",
                    "step-00000001.ptx",
                    "step-00000001.pt.json.bak",
                    "mine.pt",
                )
            ),
        ]
        for path in foreign:
            path.write_text("mine")
        with RunDirectory(self.path, overwrite=True) as run:
            self.assertEqual(run.info, {})
            self.assertIsNone(CheckpointFolder(run.checkpoints).latest())
            self.assertEqual(
                sorted(path for path in self.path.rglob("*") if path.is_file()), sorted([*foreign, self.path / ".lock"])
            )
        self.assertEqual([path.read_text() for path in foreign], ["mine"] * 7)

    def test_overwriting_leaves_an_unused_one(self) -> None:
        self.used()
        RunDirectory(self.path, overwrite=True).close()
        RunDirectory(self.path).close()  # and so it may be used without being told again

    def test_resume(self) -> None:
        self.used()
        with RunDirectory(self.path, resume=True) as run:
            self.assertEqual(run.info, {"seed": 1})
            run.write_info(result={"a": 1})
        self.assertEqual(json.loads((self.path / "run.json").read_text()), {"seed": 1, "result": {"a": 1}})
        self.assertEqual(json.loads((self.path / "metrics.jsonl").read_text()), {"epoch": 1})

    def test_nothing_to_resume(self) -> None:
        self.refused("nothing to resume here (no run.json)", resume=True)
        self.assertFalse(self.path.exists())
        self.used()
        (self.path / "run.json").unlink()
        self.refused("nothing to resume", resume=True)

    def test_unreadable_is_not_missing(self) -> None:
        self.used()
        for content in (b"", b"{", b"[]", b"\xff"):
            (self.path / "run.json").write_bytes(content)
            self.refused("run.json", "cannot resume this run", resume=True)

    def test_metrics_are_exactly_the_rows(self) -> None:
        self.used()
        with RunDirectory(self.path, resume=True) as run:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write('{"epoch": 2}\n{"epo')  # what a killed run left
            rows: list[dict[str, Any]] = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": None}]
            run.write_metrics(rows)
            lines = (self.path / "metrics.jsonl").read_text().splitlines()
            self.assertEqual([json.loads(line) for line in lines], rows)
            full = OSError(errno.ENOSPC, "full")
            with mock.patch.object(os, "replace", side_effect=full), self.assertRaises(OSError):
                run.write_metrics([{"epoch": 1}])
            lines = (self.path / "metrics.jsonl").read_text().splitlines()
            self.assertEqual([json.loads(line) for line in lines], rows)  # all or nothing
            run.write_metrics([])
            self.assertEqual((self.path / "metrics.jsonl").read_bytes(), b"")

    def test_what_killed_saves_left_is_removed_at_the_next_start(self) -> None:
        self.used()
        kept = self.path / ".mine.1.tmp"
        for path in (
            kept,
            self.path / ".run.json.5.tmp",
            self.path / ".metrics.jsonl.5.tmp",
            self.path / "checkpoints" / ".step-00000002.pt.5.tmp",
        ):
            path.write_text("x")
        RunDirectory(self.path, resume=True).close()
        self.assertEqual(list(self.path.rglob("*.tmp")), [kept])

    def test_one_that_was_not_used_goes_again(self) -> None:
        RunDirectory(self.path).close()
        self.assertEqual(self.names(), [])  # with the folder above that it made, too
        with self.assertRaises(ZeroDivisionError), RunDirectory(self.path):
            _ = 1 / 0
        self.assertEqual(self.names(), [])
        self.path.mkdir(parents=True)
        RunDirectory(self.path).close()
        self.assertEqual(self.names(self.path), [".lock"])  # one that was there stays

    def test_one_that_was_used_stays(self) -> None:
        with RunDirectory(self.path):
            (self.path / "anything").write_text("x")
        self.assertEqual(self.names(self.path), [".lock", "anything"])
        run = RunDirectory(self.root / "b")
        run.close()
        run.close()
        self.assertEqual(self.names(), ["runs"])

    def test_a_file_in_the_way(self) -> None:
        self.path.parent.mkdir()
        self.path.write_text("a file")
        self.refused("cannot write there", "--output")
        self.refused("cannot write there", path=self.path / "below")
        self.refused("nothing to resume", resume=True)

    def test_a_folder_in_the_place_of_the_lock(self) -> None:
        (self.path / ".lock").mkdir(parents=True)
        self.refused("cannot write there")


class Lock(TempCase):
    def setUp(self) -> None:
        super().setUp()
        self.path = self.root / "a"

    def taken(self, **options: bool) -> str:
        """What opening the directory says: '' or the error."""
        try:
            RunDirectory(self.path, **options).close()
            return ""
        except ValueError as error:
            return str(error)

    def test_held_in_this_process(self) -> None:
        with RunDirectory(self.path) as run:
            run.write_info(a=1)
            for path in (self.path, self.root / "x" / ".." / "a"):
                with self.assertRaisesRegex(
                    ValueError, "another run is using this directory; wait for it or choose another --output"
                ):
                    RunDirectory(path, overwrite=True)
            (self.root / "link").symlink_to(self.path)
            with self.assertRaises(ValueError):
                RunDirectory(self.root / "link", resume=True)
            self.assertEqual(json.loads((self.path / "run.json").read_text()), {"a": 1})
        self.assertEqual(self.taken(resume=True), "")

    @unittest.skipUnless(FORKS, "needs fork")
    def test_held_by_another_process(self) -> None:
        with RunDirectory(self.path) as run:
            run.write_info(a=1)
            before = [(path.name, path.stat().st_mtime_ns) for path in sorted(self.path.iterdir())]

            def other() -> None:
                forget_ours()
                for options in ({"resume": True}, {"overwrite": True}, {}):
                    assert "another run is using" in self.taken(**options)

            self.assertEqual(in_child(other), 0)
            self.assertEqual(in_child(other), 0)  # the end of that process did not free our lock
            self.assertEqual([(path.name, path.stat().st_mtime_ns) for path in sorted(self.path.iterdir())], before)
        self.assertEqual(in_child(lambda: self.assertEqual(self.taken(resume=True), "")), 0)

    @unittest.skipUnless(FORKS, "needs fork")
    def test_it_dies_with_its_holder(self) -> None:
        ready, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = os.fork()
        if not child:
            try:
                signal.alarm(20)
                RunDirectory(self.path).write_info(a=1)
                os.write(write, b"x")
                signal.pause()
            finally:
                os._exit(1)
        os.close(write)
        self.assertEqual(os.read(ready, 1), b"x")
        os.close(ready)
        self.assertIn("another run is using", self.taken(resume=True))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        self.assertEqual(self.taken(resume=True), "")

    @unittest.skipUnless(FORKS, "needs fork")
    def test_a_forked_worker_that_outlives_its_run_does_not_hold_it(self) -> None:
        run = RunDirectory(self.path)
        run.write_info(a=1)
        ready, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            worker = os.fork()
        if not worker:
            try:
                signal.alarm(20)
                os.close(write)
                os.read(ready, 1)
            finally:
                os._exit(0)
        run.close()

        def other() -> None:
            forget_ours()
            assert self.taken(resume=True) == ""

        try:
            self.assertEqual(in_child(other), 0)
        finally:
            os.close(write)
            os.close(ready)
            os.waitpid(worker, 0)

    @unittest.skipIf(sys.platform == "win32", "an open file cannot be removed there")
    def test_a_lock_file_that_was_just_removed_is_no_lock(self) -> None:
        self.path.mkdir()
        lock, real = self.path / ".lock", open

        def opened(path: Any, *args: Any, **options: Any) -> Any:
            handle = real(path, *args, **options)
            if Path(path) == lock:
                lock.unlink()  # its last holder does so between our opening and our locking
            return handle

        with mock.patch.object(checkpoint, "open", opened, create=True):
            self.assertIn("another run is using", self.taken())
        self.assertEqual(self.taken(), "")


if __name__ == "__main__":
    unittest.main()
