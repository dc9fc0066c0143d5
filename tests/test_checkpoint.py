"""Saves that are whole or did not happen, and loads that refuse whatever was changed."""

from __future__ import annotations

import collections
import datetime
import errno
import hashlib
import math
import os
import pickle
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import unittest
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

from tests.common import ROOT
from torchbasics import checkpoint
from torchbasics.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_latest,
    save_checkpoint,
    save_step,
    saved_steps,
    step_path,
    weights_hash,
    write_durably,
)


def state(step: int = 1, **more: Any) -> dict[str, Any]:
    """Return a small checkpoint whose weights tell its step."""
    return {"step": step, "model_state_dict": {"weight": torch.full((3, 2), float(step))}, **more}


def step_of(loaded: dict[str, Any]) -> int:
    assert torch.equal(loaded["model_state_dict"]["weight"], torch.full((3, 2), float(loaded["step"])))
    return loaded["step"]


class CheckpointCase(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        self.path = self.root / "best.pt"

    def names(self, folder: Path | None = None) -> list[str]:
        return sorted(os.listdir(folder or self.root))

    def refused(self, *words: str, **options: bool) -> None:
        """Check that the file at `self.path` is a CheckpointError of one line that never says how to load it anyway."""
        with self.assertRaises(CheckpointError) as caught:
            load_checkpoint(self.path, **options)
        for word in (str(self.path), *words):
            self.assertIn(word, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))
        self.assertNotIn("weights_only=False", str(caught.exception))


class Seal(CheckpointCase):
    def test_the_seal_is_the_sha256_of_all_bytes_before_it_and_the_comment_of_the_archive(self) -> None:
        save_checkpoint(state(), self.path)
        content = self.path.read_bytes()
        self.assertEqual(content[-64:].decode(), hashlib.sha256(content[:-64]).hexdigest())
        with zipfile.ZipFile(self.path) as archive:
            self.assertEqual(archive.comment, content[-64:])
            self.assertIsNone(archive.testzip())

    def test_plain_torch_reads_a_sealed_file(self) -> None:
        save_checkpoint(state(7), self.path)
        for options in ({}, {"mmap": True}, {"map_location": "meta"}):
            loaded = torch.load(self.path, weights_only=True, **options)
            self.assertEqual(loaded["step"] if options.get("map_location") else step_of(loaded), 7)

    def test_every_flipped_bit_is_noticed_before_torch_reads_the_file(self) -> None:
        save_checkpoint({"w": torch.ones(2)}, self.path)
        content = self.path.read_bytes()
        with open(self.path, "r+b", buffering=0) as file, mock.patch.object(torch, "load") as load:
            for position, byte in enumerate(content):
                for bit in range(8):
                    os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), position)
                    with self.assertRaises(CheckpointError, msg=(position, bit)):
                        load_checkpoint(self.path)
                os.pwrite(file.fileno(), bytes([byte]), position)
            load.assert_not_called()
        self.assertEqual(load_checkpoint(self.path)["w"].tolist(), [1, 1])

    def test_every_other_length_is_noticed(self) -> None:
        save_checkpoint({"w": torch.ones(2)}, self.path)
        content = self.path.read_bytes()
        self.path.write_bytes(content + b"\0")
        self.refused("damaged")
        for length in reversed(range(len(content))):  # that of the archive without its seal is one of them
            os.truncate(self.path, length)
            with self.assertRaises(CheckpointError, msg=length):
                load_checkpoint(self.path)

    def test_a_file_of_plain_torch_save_loads_with_a_warning_unless_a_seal_is_required(self) -> None:
        torch.save(state(3), self.path)
        with self.assertWarnsRegex(UserWarning, "best.pt: has no seal"):
            self.assertEqual(step_of(load_checkpoint(self.path)), 3)
        self.refused("has no seal", require_seal=True)


class OtherFiles(CheckpointCase):
    def test_what_is_no_archive_is_refused(self) -> None:
        torch.save(state(), self.path, _use_new_zipfile_serialization=False)
        for content in (self.path.read_bytes(), b"", b"text", b"PK\5\6", bytes(1000), pickle.dumps({"a": 1})):
            self.path.write_bytes(content)
            self.refused("damaged, or not a checkpoint")

    def test_a_missing_file_is_not_a_damaged_one(self) -> None:
        with self.assertRaisesRegex(FileNotFoundError, "best.pt"):
            load_checkpoint(self.path)

    def test_archives_without_a_dict_of_torch_are_refused(self) -> None:
        with zipfile.ZipFile(self.path, "w") as archive:
            archive.writestr("a.txt", "text")
        self.refused("not loaded")
        torch.save(torch.ones(2), self.path)
        self.refused("holds a Tensor, expected a dict")

    def test_a_torchscript_program_is_refused_and_not_run(self) -> None:
        torch.save(state(), self.path)
        with zipfile.ZipFile(self.path, "a") as archive:
            archive.writestr("best/constants.pkl", b"")  # what tells a program from a checkpoint
        with mock.patch("torch.jit.load") as run, self.assertWarnsRegex(UserWarning, "TorchScript"):
            self.refused("TorchScript")
        run.assert_not_called()

    def test_a_hostile_pickle_does_nothing(self) -> None:
        target = self.root / "owned"

        class Hostile:
            def __reduce__(self) -> tuple:
                return Path.touch, (target,)

        torch.save({"extra": Hostile()}, self.path)
        self.refused("it holds builtins.getattr, pathlib.Path")
        self.assertFalse(target.exists())
        torch.load(self.path, weights_only=False)
        self.assertTrue(target.exists())  # it does work where it is let

    def test_a_device_that_is_absent_is_named(self) -> None:
        save_checkpoint(state(), self.path)
        with self.assertRaisesRegex(ValueError, "(?i)not loaded: .*(nowhere|device)"):
            load_checkpoint(self.path, map_location="nowhere")


class RoundTrip(CheckpointCase):
    def test_plain_values_keep_value_and_type(self) -> None:
        values: dict[Any, Any] = {
            "text": "é\n", "int": 2**70, "float": 0.1, "inf": -math.inf, "flag": True, "none": None,
            "list": [1, [2.5, "x"]], "tuple": (1, ("a", None)), "dict": {"a": {1: 2}}, 7: "int key",
            "ordered": collections.OrderedDict(b=1, a=2), "counter": collections.Counter("aab"),
            "size": torch.Size([2, 3]), "dtype": torch.bfloat16, "bytes": b"\0a", "empty": {}, "no items": [],
        }  # fmt: skip
        save_checkpoint(values, self.path)
        loaded = load_checkpoint(self.path)
        self.assertEqual(loaded, values)
        self.assertEqual([type(value) for value in loaded.values()], [type(value) for value in values.values()])

    def test_tensors_keep_dtype_shape_and_bits(self) -> None:
        dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
        tensors = {str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in dtypes}
        tensors |= {"0-d": torch.tensor(0.5), "none": torch.zeros(0, 3), "nan": torch.tensor([math.nan])}
        tensors |= {"transposed": torch.arange(6).view(2, 3).t(), "parameter": nn.Parameter(torch.ones(2))}
        save_checkpoint({"loss": torch.tensor(0.5), "tensors": tensors}, self.path)
        loaded = load_checkpoint(self.path)
        self.assertEqual(loaded["loss"].item(), 0.5)
        for name, tensor in tensors.items():
            torch.testing.assert_close(loaded["tensors"][name], tensor, rtol=0, atol=0, equal_nan=True)

    def test_numpy_scalars_become_pythons_and_the_callers_dict_stays_as_it_was(self) -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=np.float64(0.1), momentum=np.float32(0.5))
        given: dict[str, Any] = {"optimizer": optimizer.state_dict()}
        given[np.str_("key")] = [np.int64(3), (np.bool_(True), np.str_("x"))]
        save_checkpoint(given, self.path)
        loaded = load_checkpoint(self.path)
        group = loaded["optimizer"]["param_groups"][0]
        self.assertEqual((type(group["lr"]), group["lr"], type(group["momentum"])), (float, 0.1, float))
        self.assertEqual(loaded["key"], [3, (True, "x")])
        self.assertEqual([type(value) for value in (*loaded["key"][1], loaded["key"][0])], [bool, str, int])
        self.assertIs(type(given["optimizer"]["param_groups"][0]["lr"]), np.float64)

    def test_the_metadata_of_a_state_dict_survives(self) -> None:
        state_dict: Any = nn.Sequential(nn.BatchNorm1d(2)).state_dict()
        for saved, find in (({"a": [{"b": state_dict}]}, lambda c: c["a"][0]["b"]), (state_dict, lambda c: c)):
            save_checkpoint(saved, self.path)
            self.assertEqual(find(load_checkpoint(self.path))._metadata["0"], {"version": 2})

    def test_the_states_of_optimizers_and_schedules_can_be_saved(self) -> None:
        for make in (torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop):
            weight = nn.Parameter(torch.ones(2))
            optimizer = make([weight])
            weight.grad = torch.ones(2)
            optimizer.step()
            schedules = [
                lrs.OneCycleLR(optimizer, 0.1, 9, cycle_momentum=False),
                lrs.ReduceLROnPlateau(optimizer),
                lrs.MultiStepLR(optimizer, [3, 5]),
                lrs.SequentialLR(optimizer, [lrs.LinearLR(optimizer), lrs.StepLR(optimizer, 2)], [3]),
            ]
            states = [schedule.state_dict() for schedule in schedules]
            save_checkpoint({"optimizer": optimizer.state_dict(), "schedules": states}, self.path)
            loaded = load_checkpoint(self.path)
            self.assertEqual(loaded["schedules"][2]["milestones"], collections.Counter({3: 1, 5: 1}))
            optimizer.load_state_dict(loaded["optimizer"])

    def test_what_could_not_be_loaded_is_not_saved_and_the_older_file_stays(self) -> None:
        class Subclass(torch.Tensor):
            pass

        save_checkpoint(state(1), self.path)
        for value, reason in (
            (Path("a"), "pathlib"),
            (datetime.date(2026, 1, 2), "datetime.date"),
            (np.ones(2), "numpy"),
            (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
            (collections.defaultdict(list), "defaultdict"),
            (torch.ones(2).as_subclass(Subclass), "Subclass"),
            (lambda: 0, "pickle"),
            (iter(()), "iter"),
        ):
            error = self.assertRaisesRegex(CheckpointError, f"best.pt: not saved: .*{reason}.*; convert")
            with self.subTest(reason), error:
                save_checkpoint(state(2, extra=[{"deep": value}]), self.path)
            self.assertEqual(step_of(load_checkpoint(self.path)), 1)
        self.assertEqual(self.names(), ["best.pt"])


class Durability(CheckpointCase):
    def events_of(self, work: Callable[[], object], before: Callable[[], object] = lambda: None) -> list[str]:
        """Return the operations on the disk that `work` does, in order; call `before` before each of them."""
        events = []
        fsync, replace = os.fsync, os.replace

        def seen_fsync(descriptor: int) -> None:
            before()
            found = os.fstat(descriptor)
            events.append("fsync folder" if stat.S_ISDIR(found.st_mode) else f"fsync file of {found.st_size}")
            fsync(descriptor)

        def seen_replace(source: Any, target: Any) -> None:
            before()
            events.append(f"replace {Path(target).name}")
            replace(source, target)

        with mock.patch.object(os, "fsync", seen_fsync), mock.patch.object(os, "replace", seen_replace):
            work()
        return events

    @unittest.skipUnless(os.name == "posix", "a folder is synchronised on POSIX only")
    def test_the_whole_content_is_on_the_disk_before_it_gets_its_name(self) -> None:
        for _ in range(2):  # a new file, and one that takes the place of another
            events = self.events_of(lambda: save_checkpoint(state(), self.path))
            size = self.path.stat().st_size
            self.assertEqual(events, [f"fsync file of {size}", "replace best.pt", "fsync folder"])
        synced = set()  # a new folder is synchronised in the one above
        with mock.patch.object(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino)):
            save_step(state(), self.root / "a" / "b", 1)
        self.assertLessEqual({path.stat().st_ino for path in (self.root, self.root / "a", self.root / "a/b")}, synced)

    def test_what_the_disk_holds_at_any_moment_of_a_save_is_the_old_or_the_new_checkpoint(self) -> None:
        """Copies of the folder, as a kill or a power cut would leave it."""
        folder = self.root / "run"
        save_step(state(3), folder, 3, keep=1)
        copies: list[Path] = []

        def copy() -> None:
            copies.append(Path(tempfile.mkdtemp(dir=self.root)) / "copy")
            shutil.copytree(folder, copies[-1])

        self.events_of(lambda: save_step(state(4), folder, 4, keep=1), copy)
        self.assertEqual(self.names(folder), ["step-00000004.pt"])
        for path, step in zip(copies, (3, 3, 4), strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nothing may even look damaged
                latest = load_latest(path)
            assert latest is not None
            self.assertEqual(step_of(latest[1]), step)
            save_step(state(5), path, 5, keep=1)  # the next save works, and leaves nothing of the killed one
            self.assertEqual(self.names(path), ["step-00000005.pt"])

    def test_a_process_killed_in_the_middle_of_writing_leaves_the_old_file(self) -> None:
        save_checkpoint(state(1), self.path)
        child = (
            "import os, signal, sys, torch\n"
            "from torchbasics import checkpoint\n"
            "def save(value, file):\n"
            "    file.write(b'half of it')\n"
            "    file.flush()\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "torch.save = save\n"
            "checkpoint.save_checkpoint({}, sys.argv[1])\n"
        )
        done = subprocess.run([sys.executable, "-c", child, str(self.path)], cwd=ROOT, timeout=60, check=False)
        self.assertEqual(done.returncode, -signal.SIGKILL)
        self.assertEqual(len(self.names()), 2)
        self.assertEqual(step_of(load_checkpoint(self.path)), 1)
        save_step(state(2), self.root, 2)
        self.assertEqual(self.names(), ["best.pt", "step-00000002.pt"])

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_leaves_the_old_file_and_is_named(self) -> None:
        def open_full(path: Any, *args: Any) -> Any:
            return open("/dev/full" if str(path).endswith(".unfinished") else path, *args)

        error = OSError(errno.ENOSPC, "No space left on device")
        save_checkpoint(state(1), self.path)
        for failing in (
            mock.patch.object(os, "fsync", side_effect=error),
            mock.patch.object(os, "replace", side_effect=error),
            mock.patch.object(checkpoint, "open", open_full, create=True),
        ):
            for numbers in (2, 100_000):  # content that fits in Python's buffer, and content that does not
                with failing, self.assertRaises(OSError) as caught:
                    save_checkpoint(state(2, big=torch.zeros(numbers)), self.path)
                self.assertEqual((caught.exception.errno, caught.exception.filename), (errno.ENOSPC, str(self.path)))
                self.assertEqual(step_of(load_checkpoint(self.path)), 1)
                self.assertEqual(self.names(), ["best.pt"])

    def test_an_interrupt_leaves_the_old_file_and_no_temporary_one(self) -> None:
        write_durably(self.root / "a.json", lambda file: file.write(b"{}"))
        with self.assertRaises(KeyboardInterrupt):
            write_durably(self.root / "a.json", mock.Mock(side_effect=KeyboardInterrupt))
        self.assertEqual((self.names(), (self.root / "a.json").read_bytes()), (["a.json"], b"{}"))


class Steps(CheckpointCase):
    def fill(self, *steps: int) -> None:
        for step in steps:
            save_checkpoint(state(step), step_path(self.root, step))

    def damage(self, *steps: int) -> None:
        for step in steps:
            os.truncate(step_path(self.root, step), 500)

    def latest(self, *warned: str) -> int:
        """Return the step that `load_latest` finds, after checking the file names that it warns of."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = load_latest(self.root)
        assert found is not None
        self.assertEqual(found[0], step_path(self.root, found[1]["step"]))
        self.assertEqual(len(caught), len(warned))
        for name, warning in zip(warned, caught, strict=True):
            self.assertIn(name, str(warning.message))
            self.assertIn(f"continuing from {found[0].name}", str(warning.message))
        return step_of(found[1])

    def test_without_a_checkpoint_there_is_no_latest(self) -> None:
        save_checkpoint(state(), self.path)
        for folder in (self.root, self.root / "none"):
            self.assertEqual((saved_steps(folder), load_latest(folder)), ([], None))

    def test_the_order_is_by_number_and_not_by_time_or_name(self) -> None:
        self.fill(9, 10, 8, 99_999_999, 100_000_000)
        os.utime(step_path(self.root, 9), (2e9, 2e9))
        self.assertEqual([step for step, _ in saved_steps(self.root)], [8, 9, 10, 99_999_999, 100_000_000])
        self.assertEqual(self.latest(), 100_000_000)

    def test_the_newest_intact_one_is_used_and_each_damaged_one_reported(self) -> None:
        self.fill(1, 2, 3)
        self.damage(3)
        self.assertEqual(self.latest("step-00000003.pt: damaged"), 2)
        torch.save(state(2), step_path(self.root, 2))  # intact perhaps, but nobody can tell
        self.assertEqual(self.latest("step-00000003.pt: damaged", "step-00000002.pt: has no seal"), 1)
        step_path(self.root, 4).mkdir()
        self.assertEqual(self.latest("step-00000004.pt", "step-00000003.pt", "step-00000002.pt"), 1)

    def test_damaged_ones_alone_are_an_error_and_not_a_new_start(self) -> None:
        self.fill(1, 2)
        self.damage(1, 2)
        with self.assertRaisesRegex(CheckpointError, "step-00000002.pt: damaged.*none of the 2 checkpoints"):
            load_latest(self.root)

    def test_the_last_few_stay_and_so_does_what_is_not_a_step(self) -> None:
        foreign = ["best.pt", "notes.txt", "step-1.pt", "step-00000001.pt.bak", "xstep-00000001.pt", ".other.1.tmp"]
        for name in foreign:
            (self.root / name).write_text("mine")
        paths = [save_step(state(step), self.root, step) for step in (1, 5, 9, 10, 11, 100)]
        self.assertEqual([path.name for path in paths][:2], ["step-00000001.pt", "step-00000005.pt"])
        ours = [f"step-{step:08d}.pt" for step in (10, 11, 100)]
        self.assertEqual(self.names(), sorted([*foreign, *ours]))
        save_step(state(101), self.root, 101, keep=1)
        self.assertEqual(self.names(), sorted([*foreign, "step-00000101.pt"]))

    def test_damaged_newer_ones_do_not_push_out_the_intact(self) -> None:
        self.fill(1, 20, 30)
        self.damage(20, 30)
        for step in (2, 3, 4):  # the run continues from 1
            save_step(state(step), self.root, step, keep=2)
            self.assertEqual(self.latest("step-00000030", "step-00000020"), step)
        self.assertEqual([step for step, _ in saved_steps(self.root)], [3, 4, 20, 30])


class WeightsHash(unittest.TestCase):
    def test_it_is_the_sha256_of_names_dtypes_shapes_and_bytes_in_order(self) -> None:
        expected = hashlib.sha256(
            b"a torch.float32 (2, 2)\n" + struct.pack("<4f", 1, 2, 3, 4) + b"b torch.int64 ()\n" + struct.pack("<q", -7)
        ).hexdigest()
        given = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(-7)}
        self.assertEqual(weights_hash(given), expected)
        self.assertNotEqual(weights_hash(dict(reversed(given.items()))), expected)

    def test_any_change_changes_it(self) -> None:
        ones = torch.ones(2, 3)
        flipped = ones.clone()
        flipped.view(torch.int32)[1, 2] ^= 1  # the lowest bit of the last weight
        states: list[dict[str, Any]] = [
            {"w": ones}, {"v": ones}, {"w": ones.double()}, {"w": ones.int()}, {"w": ones.t()}, {"w": flipped}, {},
            {"w": ones, "extra": {"count": 1}}, {"w": ones, "extra": {"count": 2}},
        ]  # fmt: skip
        self.assertEqual(len({weights_hash(state) for state in states}), len(states))

    def test_it_depends_on_values_and_not_on_their_layout(self) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int8, torch.complex64):
            whole = torch.arange(24).view(4, 6).to(dtype)
            views = {"t": whole.t(), "strided": whole[::2, 1], "0-d": whole[0, 1], "none": whole[:0]}
            copies = {name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()}
            self.assertEqual(weights_hash(views), weights_hash(copies))
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        before = weights_hash(model.state_dict())
        self.assertEqual(weights_hash(model.to(memory_format=torch.channels_last).state_dict()), before)


if __name__ == "__main__":
    unittest.main()
