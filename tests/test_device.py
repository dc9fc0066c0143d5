"""Choice of device and precision; seeds and random states."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import random
import subprocess
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

import torch

from torchbasics import device as devices
from torchbasics.device import (
    autocast,
    bf16_is_native,
    cache_cpu_memory,
    check_pytorch_environment,
    device_name,
    pick_device,
    pick_precision,
    preserved_random_state,
    random_state,
    set_random_state,
    set_seed,
    synchronize,
)

CPU = torch.device("cpu")


def with_devices(**counts: int) -> contextlib.AbstractContextManager:
    """As if there were that many devices of each kind."""
    return mock.patch.object(devices, "_device_count", lambda kind: {"cpu": 1, **counts}.get(kind, 0))


class Picking(unittest.TestCase):
    def test_auto_takes_the_accelerator_that_is_there(self) -> None:
        for counts, expected in (
            ({}, "cpu"),
            ({"cuda": 2}, "cuda"),
            ({"mps": 1}, "mps"),
            ({"xpu": 1}, "xpu"),
            ({"cuda": 1, "xpu": 1}, "cuda"),
        ):
            with with_devices(**counts):
                self.assertEqual(pick_device().type, expected)
                self.assertEqual(pick_device("auto"), torch.device(expected))

    def test_by_name(self) -> None:
        self.assertEqual(pick_device("cpu"), CPU)
        with with_devices(cuda=2):
            self.assertEqual(pick_device("cuda:1"), torch.device("cuda:1"))
            self.assertEqual(pick_device("cuda"), torch.device("cuda"))

    def test_errors(self) -> None:
        with with_devices(cuda=2):
            for name, words in (
                ("gpu", "unknown device 'gpu'; choose one of auto, cpu, cuda, mps, xpu"),
                ("", "unknown device ''"),
                ("cuda:x", "unknown device"),
                ("meta", "unsupported device 'meta'"),
                ("cuda:2", r"'cuda:2' is not available here \(2 of"),
                ("mps", r"'mps' is not available here \(0 of that kind\); use --device auto"),
                ("cpu:1", "'cpu:1' is not available"),
            ):
                with self.assertRaisesRegex(ValueError, words) as caught:
                    pick_device(name)
                self.assertNotIn("\n", str(caught.exception))

    def test_counts_are_torchs(self) -> None:
        self.assertEqual(devices._device_count("cpu"), 1)
        self.assertEqual(devices._device_count("cuda"), torch.cuda.device_count() if torch.cuda.is_available() else 0)
        with (
            mock.patch.object(torch.cuda, "is_available", lambda: False),
            mock.patch.object(torch.cuda, "device_count", lambda: 3),
        ):
            self.assertEqual(devices._device_count("cuda"), 0)  # seen, but it doesn't work
        with mock.patch.object(torch.backends.mps, "is_available", lambda: True):
            self.assertEqual(devices._device_count("mps"), 1)

    def test_names(self) -> None:
        self.assertRegex(device_name(CPU), rf"\S.*, {torch.get_num_threads()} threads$")
        with mock.patch.object(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}"):
            self.assertEqual(device_name(torch.device("cuda:1")), "GPU 1")

    def test_environment(self) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), with_devices():
            self.assertEqual(check_pytorch_environment(), CPU)
        self.assertIn(torch.__version__, printed.getvalue())


class Precision(unittest.TestCase):
    def test_auto_is_bf16_only_where_it_is_native(self) -> None:
        for native, expected in ((True, "bf16"), (False, "fp32")):
            with mock.patch.object(devices, "bf16_is_native", lambda device, native=native: native):
                self.assertEqual(pick_precision("auto", "cpu"), expected)
                self.assertEqual(pick_precision(), expected)
                self.assertEqual([pick_precision(name) for name in ("fp32", "bf16", "fp16")], ["fp32", "bf16", "fp16"])
        with self.assertRaisesRegex(ValueError, "unknown precision 'fp8'; choose one of auto, fp32, bf16, fp16"):
            pick_precision("fp8")

    def test_what_the_hardware_says(self) -> None:
        asked = []

        def supported(including_emulation: bool = True) -> bool:
            asked.append(including_emulation)
            return including_emulation

        with mock.patch.object(torch.cuda, "is_bf16_supported", supported):
            self.assertFalse(bf16_is_native(torch.device("cuda")))
        self.assertEqual(asked, [False])  # emulation is slower than fp32
        self.assertFalse(bf16_is_native(torch.device("mps")))
        self.assertTrue(bf16_is_native(torch.device("xpu")))

    def test_of_a_cpu_under_any_name_of_the_test(self) -> None:
        yes, no = (lambda: True), (lambda: False)
        for cpu, expected in (
            (types.SimpleNamespace(), False),
            (types.SimpleNamespace(_is_avx512_bf16_supported=yes), True),
            (types.SimpleNamespace(_is_avx512_bf16_supported=no, _is_amx_tile_supported=no), False),
            (types.SimpleNamespace(_is_amx_tile_supported=yes), True),
            (types.SimpleNamespace(get_capabilities=lambda: {"avx512_bf16": True}), True),
            (types.SimpleNamespace(get_capabilities=lambda: {"avx512_bf16": False, "avx2": True}), False),
            (types.SimpleNamespace(get_capabilities=lambda: {"architecture": "arm", "bf16": True}), True),
        ):
            with mock.patch.object(torch, "cpu", cpu):
                self.assertIs(bf16_is_native(CPU), expected)

    def test_autocast(self) -> None:
        a = torch.randn(4, 4)
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
            with autocast(CPU, precision):
                self.assertEqual((a @ a).dtype, dtype)
        self.assertFalse(torch.is_autocast_enabled("cpu"))


class CpuMemory(unittest.TestCase):
    # Page faults of four rounds of a few blocks above 32 MiB, which glibc maps anew each time.
    ROUNDS = """
import resource, torch
from torchbasics import cache_cpu_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        blocks = [torch.ones(9 << 20) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain, took, _, cached = faults(), cache_cpu_memory(), faults(), faults()
print(plain, took, cached)
"""

    @unittest.skipUnless(platform.libc_ver()[0] == "glibc", "only glibc's malloc can be told so")
    def test_freed_memory_is_used_again(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in devices.MALLOC_VARIABLES}
        done = subprocess.run(
            [sys.executable, "-c", self.ROUNDS],
            cwd=Path(__file__).parents[1],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        self.assertEqual(done.stderr, "")
        plain, took, cached = done.stdout.split()
        self.assertEqual(took, "True")
        self.assertLess(int(cached), int(plain) / 10)

    def test_the_users_variables_win(self) -> None:
        for name in devices.MALLOC_VARIABLES:
            with mock.patch.dict(os.environ, {name: "1"}), mock.patch.object(devices.ctypes, "CDLL") as library:
                self.assertFalse(cache_cpu_memory())
                library.assert_not_called()

    def test_where_it_cannot_be(self) -> None:
        """No such function on macOS and with musl; no C library under the name None on Windows."""
        unset = {name: value for name, value in os.environ.items() if name not in devices.MALLOC_VARIABLES}
        with mock.patch.dict(os.environ, unset, clear=True):
            with mock.patch.object(devices.ctypes, "CDLL", return_value=object()):
                self.assertFalse(cache_cpu_memory())
            with mock.patch.object(devices.ctypes, "CDLL", side_effect=TypeError):
                self.assertFalse(cache_cpu_memory())


class Seeds(unittest.TestCase):
    def setUp(self) -> None:
        self.enter = contextlib.ExitStack()
        self.addCleanup(self.enter.close)
        self.enter.enter_context(preserved_random_state(CPU))
        self.addCleanup(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        self.addCleanup(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        self.enter.enter_context(mock.patch.dict(os.environ))

    def draws(self) -> tuple:
        import numpy as np

        return (
            torch.rand(3).tolist(),
            torch.randn(2).tolist(),
            random.random(),
            random.gauss(0, 1),
            np.random.rand(3).tolist(),
            np.random.randn(),
        )

    def test_a_seed_makes_draws_repeat(self) -> None:
        set_seed(7)
        first = self.draws()
        self.assertNotEqual(self.draws(), first)
        set_seed(7)
        self.assertEqual(self.draws(), first)
        set_seed(8)
        self.assertNotEqual(self.draws(), first)
        set_seed()
        default = self.draws()
        set_seed(42)
        self.assertEqual(self.draws(), default)

    def test_it_is_the_seed_of_each_library(self) -> None:
        set_seed(7)
        self.assertEqual(torch.rand(1).item(), torch.rand(1, generator=torch.Generator().manual_seed(7)).item())
        self.assertEqual(random.random(), random.Random(7).random())

    def test_deterministic(self) -> None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        torch.backends.cudnn.benchmark = True
        set_seed(1, deterministic=True)
        self.assertTrue(torch.are_deterministic_algorithms_enabled())
        self.assertFalse(torch.backends.cudnn.benchmark)
        self.assertEqual(os.environ["CUBLAS_WORKSPACE_CONFIG"], ":4096:8")
        set_seed(1)
        self.assertFalse(torch.are_deterministic_algorithms_enabled())
        with mock.patch.object(torch, "use_deterministic_algorithms") as call:
            set_seed(1)
        call.assert_not_called()  # it would import the whole compiler
        torch.use_deterministic_algorithms(True, warn_only=True)
        set_seed(1, deterministic=True)
        self.assertFalse(torch.is_deterministic_algorithms_warn_only_enabled())

    def test_wrong_seeds(self) -> None:
        for seed in (-1, 2**32):
            with self.assertRaisesRegex(ValueError, rf"seed must be between 0 and 2\*\*32 - 1, got {seed}"):
                set_seed(seed)

    def test_the_state_survives_a_file_and_safe_loading(self) -> None:
        set_seed(3)
        random.gauss(0, 1)  # Python and NumPy keep a second normal number for the next call
        self.draws()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.pt"
            torch.save(random_state(CPU), path)
            expected = [self.draws() for _ in range(3)]
            set_seed(99)
            set_random_state(torch.load(path, weights_only=True), CPU)
        self.assertEqual([self.draws() for _ in range(3)], expected)

    def test_the_state_is_not_shared(self) -> None:
        state = random_state(CPU)
        before = self.draws()
        self.draws()
        set_random_state(state, CPU)
        self.assertEqual(self.draws(), before)
        set_random_state(state, CPU)
        self.assertEqual(self.draws(), before)

    def test_preserved(self) -> None:
        set_seed(5)
        expected = self.draws()
        set_seed(5)
        with preserved_random_state(CPU):
            self.draws()
            set_seed(77)
        self.assertEqual(self.draws(), expected)
        set_seed(5)
        with self.assertRaises(ZeroDivisionError), preserved_random_state(CPU):
            self.draws()
            _ = 1 / 0
        self.assertEqual(self.draws(), expected)

    def test_the_state_of_the_device_that_is_used(self) -> None:
        """`cuda:1` need not be the current device; MPS takes no device."""
        calls: list[tuple] = []

        def get(*args: torch.device) -> torch.Tensor:
            calls.append(("get", *args))
            return torch.tensor([1, 2], dtype=torch.uint8)

        for kind in ("cuda", "xpu", "mps"):
            target = torch.device(kind, 1) if kind != "mps" else torch.device("mps")
            fake = types.SimpleNamespace(
                get_rng_state=get,
                synchronize=lambda *args: calls.append(("wait", *args)),
                set_rng_state=lambda new, *args: calls.append(("set", new.tolist(), *args)),
            )
            with mock.patch.object(torch, kind, fake):
                saved = random_state(target)
                set_random_state(saved, target)
                synchronize(target)
            argument = () if kind == "mps" else (target,)
            self.assertEqual(calls, [("get", *argument), ("set", [1, 2], *argument), ("wait", *argument)])
            calls.clear()
            set_random_state(saved, CPU)  # a state of another kind of device is left out
            set_random_state({key: value for key, value in saved.items() if key != kind}, target)
        synchronize(CPU)


if __name__ == "__main__":
    unittest.main()
