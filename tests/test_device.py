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
from typing import Any
from unittest import mock

import torch

from tests.common import ROOT, run_main
from torchbasics import device as devices
from torchbasics.device import (
    autocast,
    bf16_is_native,
    busy_cores,
    cache_cpu_memory,
    check_pytorch_environment,
    cpu_seconds,
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


@contextlib.contextmanager
def machine_with(count: int = 0, kind: str = "cuda") -> Any:
    """Act as if torch had found `count` accelerators of that kind."""
    found = torch.device(kind) if count else None
    with (
        mock.patch.object(torch.accelerator, "current_accelerator", lambda check_available=False: found),
        mock.patch.object(torch.accelerator, "device_count", lambda: count),
    ):
        yield


class PickDevice(unittest.TestCase):
    def test_auto_takes_the_accelerator_and_else_the_cpu(self) -> None:
        with machine_with():
            self.assertEqual(pick_device(), CPU)
        for kind in ("cuda", "mps", "xpu"):
            with machine_with(2, kind):
                self.assertEqual(pick_device("auto"), torch.device(kind))

    def test_a_device_can_be_named_with_its_index(self) -> None:
        with machine_with(2):
            for name in ("cpu", "cuda", "cuda:1"):
                self.assertEqual(pick_device(name), torch.device(name))

    def test_a_device_that_is_unknown_or_absent_is_an_error_of_one_line(self) -> None:
        with machine_with(2):
            for name, words in (
                ("gpu", "unknown device 'gpu'; use auto, cpu, cuda"),
                ("", "unknown device ''"),
                ("meta", r"'meta' is not available here \(0 of that kind\)"),
                ("cuda:2", r"'cuda:2' is not available here \(2 of that kind\)"),
                ("mps", r"'mps' is not available here \(0 of that kind\); use auto"),
                ("cpu:1", "'cpu:1' is not available"),
            ):
                with self.assertRaisesRegex(ValueError, words) as caught:
                    pick_device(name)
                self.assertNotIn("\n", str(caught.exception))

    def test_the_name_is_that_of_the_hardware(self) -> None:
        self.assertRegex(device_name(CPU), rf"\S.*, {torch.get_num_threads()} threads?$")
        with mock.patch.object(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}"):
            self.assertEqual(device_name(torch.device("cuda:1")), "GPU 1")

    def test_the_environment_of_a_cpu_is_printed_without_other_devices(self) -> None:
        returned = []
        with machine_with():
            _, printed, _ = run_main(lambda _: returned.append(check_pytorch_environment()))
        self.assertEqual(returned, [CPU])
        self.assertIn(torch.__version__, printed)
        self.assertIn(device_name(CPU), printed)
        for word in ("others", "none\n", "GiB"):
            self.assertNotIn(word, printed)

    def test_the_environment_names_a_gpu_with_its_memory(self) -> None:
        with (
            machine_with(4),
            mock.patch.object(torch.cuda, "get_device_name", lambda device: "NVIDIA H100"),
            mock.patch.object(
                torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=79 * 2**30)
            ),
            mock.patch.object(torch.cuda, "is_bf16_supported", lambda including_emulation: True),
        ):
            _, printed, _ = run_main(lambda _: check_pytorch_environment() is None)
        self.assertIn("cuda: NVIDIA H100, 79 GiB (1 of 4)", printed)
        self.assertIn("bf16 (bf16 is native)", printed)


class Precision(unittest.TestCase):
    def test_auto_is_bf16_only_on_a_cpu_that_computes_in_it(self) -> None:
        for found, expected in (
            ({"avx512_bf16": True}, "bf16"),
            ({"amx_bf16": True}, "bf16"),
            ({"architecture": "aarch64", "bf16": True}, "bf16"),
            ({"avx512_bf16": False, "avx2": True, "amx_tile": True}, "fp32"),
            ({}, "fp32"),
        ):
            cpu = types.SimpleNamespace(get_capabilities=lambda found=found: found)
            wide = mock.patch("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
            with self.subTest(found), mock.patch.object(torch, "cpu", cpu), wide:
                self.assertEqual(pick_precision(), expected)
                self.assertEqual(pick_precision("auto", CPU), expected)

    def test_auto_is_not_bf16_on_a_cpu_restricted_to_avx2(self) -> None:
        cpu = types.SimpleNamespace(get_capabilities=lambda: {"avx512_bf16": True, "amx_bf16": True})
        for capability, native in (("AVX512", True), ("AVX2", False), ("DEFAULT", False)):
            with (
                mock.patch("torch.cpu", cpu),
                mock.patch("torch.backends.cpu.get_cpu_capability", lambda found=capability: found),
            ):
                self.assertEqual(bf16_is_native(torch.device("cpu")), native, capability)

    def test_emulated_bf16_on_a_gpu_is_not_native(self) -> None:
        with mock.patch.object(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation):
            self.assertFalse(bf16_is_native(torch.device("cuda")))
        self.assertFalse(bf16_is_native(torch.device("mps")))
        self.assertTrue(bf16_is_native(torch.device("xpu")))

    def test_a_named_precision_is_taken_at_its_word(self) -> None:
        self.assertEqual([pick_precision(name) for name in ("fp32", "bf16", "fp16")], ["fp32", "bf16", "fp16"])
        with self.assertRaisesRegex(ValueError, "unknown precision 'fp8'; choose one of auto, fp32, bf16, fp16"):
            pick_precision("fp8")

    def test_autocast_computes_in_the_precision_within_the_block_only(self) -> None:
        a = torch.randn(4, 4)
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
            with autocast(CPU, precision):
                self.assertEqual((a @ a).dtype, dtype)
        self.assertEqual((a @ a).dtype, torch.float32)


class Load(unittest.TestCase):
    def test_what_other_programs_use_counts_but_not_this_one_nor_those_that_give_way(self) -> None:
        tick = os.sysconf("SC_CLK_TCK")
        readings = [f"cpu  {user * tick} {nice * tick} {system * tick} 7 7\n" for user, nice, system in
                    ((100, 50, 30), (106, 90, 32))]  # fmt: skip
        with (
            mock.patch.object(devices, "open", lambda *_, **__: io.StringIO(readings.pop(0)), create=True),
            mock.patch.object(devices.time, "monotonic", iter((5.0, 9.0)).__next__),
            mock.patch.object(devices.time, "process_time", iter((1.0, 3.0)).__next__),
        ):
            since = cpu_seconds()
            self.assertEqual(busy_cores(since), (6 + 2 - 2) / 4)

    def test_where_the_system_does_not_tell_nobody_is_busy(self) -> None:
        with mock.patch.object(devices, "open", mock.Mock(side_effect=FileNotFoundError), create=True):
            self.assertEqual(busy_cores(cpu_seconds()), 0.0)


class CpuMemory(unittest.TestCase):
    # Count the page faults of four rounds of blocks above 32 MiB, which glibc maps anew each time.
    ROUNDS = """
import resource, torch
from torchbasics import cache_cpu_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        blocks = [torch.ones(9 << 20) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain, agreed, _, cached = faults(), cache_cpu_memory(), faults(), faults()
print(plain, agreed, cached)
"""

    @unittest.skipUnless(platform.libc_ver()[0] == "glibc", "only glibc's malloc has these settings")
    def test_freed_memory_is_used_again(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in devices.MALLOC_VARIABLES}
        command = [sys.executable, "-c", self.ROUNDS]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        self.assertEqual(done.stderr, "")
        plain, agreed, cached = done.stdout.split()
        self.assertEqual(agreed, "True")
        self.assertLess(int(cached), int(plain) / 10)

    def test_the_users_own_malloc_variables_win(self) -> None:
        for name in devices.MALLOC_VARIABLES:
            with mock.patch.dict(os.environ, {name: "1"}), mock.patch("ctypes.CDLL") as library:
                self.assertFalse(cache_cpu_memory())
                library.assert_not_called()

    def test_a_system_without_mallopt_declines(self) -> None:
        unset = {key: value for key, value in os.environ.items() if key not in devices.MALLOC_VARIABLES}
        with mock.patch.dict(os.environ, unset, clear=True):
            with mock.patch("ctypes.CDLL", return_value=object()):  # macOS, musl
                self.assertFalse(cache_cpu_memory())
            with mock.patch("ctypes.CDLL", side_effect=TypeError):  # Windows has no library called None
                self.assertFalse(cache_cpu_memory())


class Seeds(unittest.TestCase):
    def setUp(self) -> None:
        cleanup = contextlib.ExitStack()
        self.addCleanup(cleanup.close)
        cleanup.enter_context(preserved_random_state(CPU))
        cleanup.enter_context(mock.patch.dict(os.environ))
        self.addCleanup(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        self.addCleanup(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)

    def draws(self) -> tuple:
        import numpy as np

        # One normal number each of Python and NumPy: both keep a second one for the next call.
        return torch.randn(2).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()

    def test_a_seed_makes_all_draws_repeat(self) -> None:
        set_seed(7)
        first = self.draws()
        self.assertNotEqual(self.draws(), first)
        set_seed(7)
        self.assertEqual(self.draws(), first)
        set_seed()
        default = self.draws()
        self.assertNotEqual(default, first)
        set_seed(42)
        self.assertEqual(self.draws(), default)

    def test_a_seed_out_of_range_is_an_error(self) -> None:
        import numpy  # noqa: F401

        for seed in (-1, 2**32):
            with self.assertRaisesRegex(ValueError, r"Seed must be between 0 and 2\*\*32 - 1"):
                set_seed(seed)

    def test_deterministic_kernels_can_be_switched_on_and_off(self) -> None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        torch.backends.cudnn.benchmark = True
        set_seed(1, deterministic=True)
        self.assertTrue(torch.are_deterministic_algorithms_enabled())
        self.assertFalse(torch.backends.cudnn.benchmark)
        self.assertEqual(os.environ["CUBLAS_WORKSPACE_CONFIG"], ":4096:8")
        set_seed(1)
        self.assertFalse(torch.are_deterministic_algorithms_enabled())

    def test_the_random_state_survives_a_file_and_safe_loading(self) -> None:
        set_seed(3)
        self.draws()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.pt"
            torch.save(random_state(CPU), path)
            expected = [self.draws() for _ in range(3)]
            set_seed(99)
            for _ in range(2):  # a state can be restored twice
                set_random_state(torch.load(path, weights_only=True), CPU)
                self.assertEqual([self.draws() for _ in range(3)], expected)

    def test_draws_inside_preserved_random_state_change_nothing_outside(self) -> None:
        set_seed(5)
        expected = self.draws()
        for error in (contextlib.nullcontext(), self.assertRaises(ZeroDivisionError)):
            set_seed(5)
            with error, preserved_random_state(CPU):
                self.draws()
                set_seed(77)
                if not isinstance(error, contextlib.nullcontext):
                    _ = 1 / 0
            self.assertEqual(self.draws(), expected)

    def test_the_state_is_that_of_the_device_in_use(self) -> None:
        """`cuda:1` need not be the current device, and MPS takes no device."""
        calls: list[tuple] = []

        def get(*args: torch.device) -> torch.Tensor:
            calls.append(("get", *args))
            return torch.tensor([1, 2], dtype=torch.uint8)

        fake = types.SimpleNamespace(
            get_rng_state=get, set_rng_state=lambda new, *args: calls.append(("set", new.tolist(), *args))
        )
        for name in ("cuda:1", "xpu:1", "mps"):
            target, calls[:] = torch.device(name), []
            with (
                mock.patch.object(torch, "get_device_module", lambda device: fake),
                mock.patch.object(torch.accelerator, "synchronize", lambda *args: calls.append(("wait", *args))),
            ):
                saved = random_state(target)
                set_random_state(saved, target)
                synchronize(target)
                argument = () if name == "mps" else (target,)
                self.assertEqual(calls, [("get", *argument), ("set", [1, 2], *argument), ("wait", target)])
                set_random_state(saved, CPU)  # the state of a device of another kind is ignored
                del saved[target.type]
                set_random_state(saved, target)
                synchronize(CPU)
                self.assertEqual(len(calls), 3)


if __name__ == "__main__":
    unittest.main()
