"""scripts/env_check.py: rules against cases made by hand, broken installations made of fake packages, one real run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.common import SCRIPTS, load_script, run_main

SCRIPT = SCRIPTS / "env_check.py"
env_check = load_script("env_check")
env_check.__file__ = str(SCRIPT)
NO_TORCH = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
GIB = 2**30


@contextlib.contextmanager
def packages(files: dict[str, str]) -> Iterator[str]:
    """Make a temporary folder with these files, from which child processes import before all else."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_text(text)
        with mock.patch.dict(os.environ, {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}):
            yield folder


def report(*checks: Any) -> tuple[int, dict[str, tuple[str, str]]]:
    """Run main with these checks of the machine; return its exit code, and (status, text) by the name of the line."""
    with mock.patch.object(env_check, "MACHINE", checks):
        code, out, _ = run_main(env_check.main)
    lines: dict[str, tuple[str, str]] = {}
    name = ""
    for line in out.splitlines()[:-1]:
        if line.startswith("      -> "):
            lines[name] = (lines[name][0], f"{lines[name][1]} {line.strip()}")
        else:
            status, name, text = line[:4], line[6:26].strip(), line[28:]
            lines[name] = (status, text)
    return code, lines


def fake_files(files: dict[str, str]) -> Any:
    """Replace what the script reads from /proc and /sys."""
    return mock.patch.object(env_check, "read", lambda path: files.get(str(path), ""))


class TestArguments(unittest.TestCase):
    def test_bad_ones_are_one_short_line_and_exit_code_2(self) -> None:
        code, out, err = run_main(env_check.main, "x\ny" * 50_000)
        self.assertEqual((code, out, err.count("\n")), (2, "", 1))
        self.assertIn("error: unrecognized arguments: x", err)
        self.assertLess(len(err), 130)


class TestMachine(unittest.TestCase):
    def test_a_check_that_raises_is_one_line_and_the_others_still_run(self) -> None:
        def check_nothing() -> Any:
            raise OSError("first\nsecond")

        with packages({"torch/__init__.py": NO_TORCH}):
            code, lines = report(check_nothing, env_check.check_python)
        self.assertEqual(code, 1)
        self.assertEqual(lines["check_nothing"][0], "FAIL")
        self.assertIn("OSError: first second", lines["check_nothing"][1])
        self.assertEqual(lines["Python"][0], "PASS")

    def test_threads_are_limited_by_the_affinity_and_by_the_quota_of_a_container(self) -> None:
        eight = mock.patch.object(os, "sched_getaffinity", lambda pid: set(range(8)), create=True)
        for quota, wanted in (("150000 100000", 2), ("max 100000", 8), ("", 8), ("5000 100000", 1)):
            with self.subTest(quota=quota), eight, fake_files({"/sys/fs/cgroup/cpu.max": quota}):
                self.assertEqual(env_check.usable_cpus(), wanted)

    def test_memory_is_that_of_the_container(self) -> None:
        files = {"/proc/meminfo": f"MemTotal:  {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {12 * 2**20} kB\n"}
        for limit, found, status in (
            ("max\n", "12.0 of 16.0 GiB free", "PASS"), (f"{4 * GIB}\n", "4.0 of 4.0 GiB free", "PASS"),
            (f"{GIB}\n", "1.0 of 1.0 GiB free", "WARN"),
        ):  # fmt: skip
            with self.subTest(limit=limit), fake_files({**files, "/sys/fs/cgroup/memory.max": limit}):
                line = env_check.check_memory()
            self.assertEqual((line.status, line.found), (status, found))

    def test_a_full_disk_and_a_small_shared_memory_warn(self) -> None:
        for free, wanted in ((64 * 2**20, {"WARN"}), (8 * GIB, {"PASS"})):
            usage = mock.patch("shutil.disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
            with usage, mock.patch("os.path.isdir", lambda path: True):
                lines = list(env_check.check_disks())
            self.assertEqual(lines[-1].name, "shared memory")
            self.assertEqual({line.status for line in lines}, wanted)

    def test_a_busy_machine_warns(self) -> None:
        for load, wanted in ((0.9, "PASS"), (1.1, "WARN")):
            with mock.patch("os.getloadavg", lambda load=load: (load, 0, 0)), mock.patch("os.cpu_count", lambda: 2):
                self.assertEqual(env_check.check_load().status, wanted)

    def test_packages_with_known_holes_warn(self) -> None:
        for versions, wanted in (
            ({"Pillow": "12.2.9", "onnx": "1.20.1"}, ["WARN", "WARN"]),
            ({"Pillow": "12.3.0", "onnx": "1.21.0"}, ["PASS", "PASS"]),
            ({"Pillow": "9.5", "onnx": ""}, ["WARN", "PASS"]),
        ):
            with mock.patch.object(env_check, "installed", versions.get):
                self.assertEqual([line.status for line in env_check.check_packages()], wanted)

    def test_a_missing_compiler_and_missing_headers_warn(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with mock.patch.dict(os.environ, {"CXX": "no-such-compiler"}):
                self.assertIn("no-such-compiler not found", env_check.check_compiler().found)
            compiler = Path(folder, "c++")
            compiler.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2; exit 1\n")
            compiler.chmod(0o755)
            with mock.patch.dict(os.environ, {"CXX": str(compiler)}):
                line = env_check.check_compiler()
            self.assertEqual(line.status, "WARN")
            self.assertIn("fatal error: Python.h", line.found)
            self.assertIn("python3-dev", line.todo)
            compiler.write_text("#!/bin/sh\ngrep -q Python.h\n")  # it gets the line of C++ on its standard input
            with mock.patch.dict(os.environ, {"CXX": str(compiler)}):
                self.assertEqual(env_check.check_compiler().status, "PASS")

    def test_left_over_torchrun_variables_fail(self) -> None:
        good = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
        for change, wanted in (
            ({}, "PASS"), ({"MASTER_ADDR": ""}, "FAIL"), ({"RANK": "4"}, "FAIL"), ({"WORLD_SIZE": "two"}, "FAIL"),
            ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, "PASS"),  # nothing waits for a mere address
        ):  # fmt: skip
            with self.subTest(change=change), mock.patch.dict(os.environ, good | change):
                self.assertEqual(env_check.check_processes().status, wanted)


def fake_torch(cuda: str | None = "13.0", count: int = 0, free: int = 70) -> Any:
    """Return what the checks of accelerators need of a torch with `count` GPUs of 80 GiB."""

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    properties = SimpleNamespace(name="H100", total_memory=80 * GIB, major=9, minor=0)
    functions = SimpleNamespace(
        init=init, get_device_properties=lambda index: properties, mem_get_info=lambda index: (free * GIB, 80 * GIB),
        is_bf16_supported=lambda including_emulation: True,
    )  # fmt: skip
    found = SimpleNamespace(type="cuda") if count else None
    accelerator = SimpleNamespace(current_accelerator=lambda check_available: found, device_count=lambda: count)
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=functions, accelerator=accelerator)


def accelerators(torch: Any, gpus: tuple[str, str] = ("", ""), visible: str | None = None) -> list[Any]:
    with mock.patch.dict(os.environ), mock.patch.object(env_check, "nvidia_gpus", lambda: gpus):
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        return list(env_check.find_accelerators(torch))


class TestAccelerators(unittest.TestCase):
    @mock.patch("platform.system", lambda: "Linux")
    def test_why_there_is_none_and_what_to_do(self) -> None:
        gpu = ("H100", "580.65")
        for torch_, gpus, visible, status, found, todo in (
            (fake_torch(), ("", ""), None, "PASS", "no NVIDIA GPU found", ""),
            (fake_torch(), ("", ""), "", "PASS", "CUDA_VISIBLE_DEVICES='' hides all GPUs", ""),
            (fake_torch(), gpu, "-1", "WARN", "hides all GPUs", "unset CUDA_VISIBLE_DEVICES"),
            (fake_torch(None), gpu, None, "WARN", "there is H100, but torch is built without CUDA", "get-started"),
            (fake_torch(), gpu, None, "FAIL", "driver on your system is too old", "update the driver (now 580.65)"),
        ):
            with self.subTest(found=found):
                [line] = accelerators(torch_, gpus, visible)
                self.assertEqual((line.status, line.name), (status, "accelerator"))
                self.assertIn(found, line.found)
                self.assertIn(todo, line.todo)
                self.assertEqual(line.todo == "", todo == "")

    def test_each_gpu_has_a_line_with_its_memory(self) -> None:
        lines = accelerators(fake_torch(count=2), visible="0,1")
        found = "H100, 80.0 GiB (70.0 free), compute capability 9.0, bf16 native"
        self.assertEqual(lines, [("PASS", "cuda:0", found, ""), ("PASS", "cuda:1", found, "")])
        self.assertEqual(accelerators(fake_torch(count=1, free=3))[0].status, "WARN")

    def test_a_gpu_named_in_vain_is_told(self) -> None:
        lines = accelerators(fake_torch(count=1), visible="0,7")
        self.assertEqual([line.name for line in lines], ["cuda:0", "CUDA_VISIBLE_DEVICES"])
        self.assertEqual([line.status for line in lines], ["PASS", "WARN"])


class TestTorch(unittest.TestCase):
    def test_torch_that_is_missing_broken_old_or_crashes_is_one_line(self) -> None:
        for text, found, todo in (
            (NO_TORCH, "not installed", "pip install torch torchvision"),
            ("raise ImportError('libcudart.so.13: cannot open')", "libcudart.so.13", "--force-reinstall"),
            ("", "no attribute '__version__'", "--force-reinstall"),
            ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "Segmentation fault", "--force-reinstall"),
        ):
            with self.subTest(text=text), packages({"torch/__init__.py": text}):
                code, lines = report()
                self.assertEqual((code, list(lines), lines["torch"][0]), (1, ["torch"], "FAIL"))
                self.assertIn(found, lines["torch"][1])
                self.assertIn(todo, lines["torch"][1])

    def test_an_old_torch_fails(self) -> None:
        with mock.patch.object(torch, "__version__", "2.10.1"):
            line = next(env_check.check_torch())
        self.assertEqual((line.status, line.name), ("FAIL", "torch"))
        self.assertIn("--upgrade torch torchvision", line.todo)

    def test_an_import_that_hangs_ends(self) -> None:
        began = time.monotonic()
        hanging = packages({"torch/__init__.py": "import time; time.sleep(60)"})
        with hanging, mock.patch.object(env_check, "CHILD_SECONDS", 0.5):
            code, lines = report()
        self.assertLess(time.monotonic() - began, 30)
        self.assertEqual((code, lines["torch"][0]), (1, "FAIL"))
        self.assertIn("no answer within 0.5 s", lines["torch"][1])

    def test_more_threads_than_cpus_warn(self) -> None:
        for cpus, wanted in ((1, "WARN"), (2, "PASS")):
            with (
                mock.patch.object(torch, "get_num_threads", lambda: 2),
                mock.patch.object(env_check, "usable_cpus", lambda cpus=cpus: cpus),
            ):
                lines = {line.name: line for line in env_check.check_torch()}
            self.assertEqual(lines["threads"].status, wanted)

    def test_torchvision_of_another_build_is_named(self) -> None:
        files = {
            "torchvision/__init__.py": "raise RuntimeError('operator torchvision::nms does not exist')",
            "torchvision/version.py": "__version__ = '0.28.0+cu130'",
            "torchvision-0.28.0.dist-info/METADATA":
                "Name: torchvision\nVersion: 0.28.0\nRequires-Dist: numpy\nRequires-Dist: torch (==2.13.0)\n",
        }  # fmt: skip
        with packages(files):
            lines = list(env_check.in_child("torchvision"))
        self.assertEqual([(line.status, line.todo) for line in lines], [("FAIL", env_check.PAIR)])
        self.assertIn("0.28.0+cu130, which wants torch (==2.13.0)", lines[0].found)
        self.assertIn(f"beside torch {torch.__version__}", lines[0].found)
        self.assertIn("operator torchvision::nms does not exist", lines[0].found)

    def test_wrong_numbers_fail(self) -> None:
        convolve = torch.nn.functional.conv2d
        for factor, wanted in ((1.0, "PASS"), (1.02, "FAIL"), (float("nan"), "FAIL")):

            def wrong(*tensors: Any, factor: float = factor) -> Any:
                return convolve(*tensors) * factor

            with self.subTest(factor=factor), mock.patch.object(torch.nn.functional, "conv2d", wrong):
                self.assertEqual([line.status for line in env_check.check_step("cpu")], [wanted])


class TestRealRun(unittest.TestCase):
    def test_it_runs_alone_beside_files_that_hide_modules(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in {"env_check.py": SCRIPT.read_text(), "random.py": "raise SystemExit(7)"}.items():
                Path(folder, name).write_text(text)
            command = [sys.executable, "env_check.py"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
            self.assertEqual(sorted(os.listdir(folder)), ["env_check.py", "random.py"])
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        lines = {line[6:26].strip(): line for line in done.stdout.splitlines()}
        self.assertIn(torch.__version__, lines["torch"])
        for name in ("torch", "torchvision", "cpu computes"):
            self.assertTrue(lines[name].startswith("PASS"), lines[name])


if __name__ == "__main__":
    unittest.main()
