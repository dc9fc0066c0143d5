"""scripts/env_check.py: rules against hand-made cases, broken installations made of fake packages, one real run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "env_check.py"
spec = importlib.util.spec_from_file_location("env_check", SCRIPT)
assert spec is not None and spec.loader is not None
env_check: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(env_check)
NO_TORCH = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"


@contextlib.contextmanager
def folder(files: dict[str, str], python_path: bool = False) -> Iterator[str]:
    """A temporary folder with these files; with `python_path`, child processes import from it first."""
    with tempfile.TemporaryDirectory() as root:
        root = os.path.realpath(root)
        for name, text in files.items():
            path = Path(root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        with mock.patch.dict(os.environ, {"PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"} if python_path else {}):
            yield root


def call(*argv: str) -> tuple[int, str]:
    """Run main in this process and return (exit code, stdout)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = env_check.main(list(argv))
    return code, out.getvalue()


def healthy(group: str, command: list[str], timeout: float) -> tuple[list[Any], list[str]]:
    """Stand in for the child processes of a machine with a CPU only."""
    facts = ["torch", "CUDA"] if group == "torch" else [f"{group}: speed"]
    return [env_check.result(name, f"{name} is fine") for name in facts], ["cpu"] if group == "torch" else []


def checks(*statuses: str) -> Any:
    """Replace everything by these statuses, so that exit codes depend on nothing else."""
    lines = [env_check.Result(status, f"line {i}", "found | <it>", "" if status == "PASS" else "do it")
             for i, status in enumerate(statuses)]  # fmt: skip
    return mock.patch.object(env_check, "collect", lambda args: iter(lines))


def gone(pid: str) -> bool:
    """Say whether a process ends within 5 s (Z: dead, and nobody has asked for its exit code)."""
    stat = Path("/proc", pid, "stat")
    for _ in range(100):
        with contextlib.suppress(OSError):
            if ") Z" not in stat.read_text():
                time.sleep(0.05)
                continue
        return True
    return False


class ExitCodes(unittest.TestCase):
    def test_statuses_decide(self) -> None:
        for statuses, argv, wanted in (
            (["PASS", "SKIP"], [], 0), (["PASS", "WARN"], [], 0), (["PASS", "WARN"], ["--strict"], 1),
            (["PASS", "SKIP"], ["--strict"], 0), (["FAIL", "PASS"], [], 1), (["FAIL", "WARN"], ["--json"], 1),
        ):  # fmt: skip
            with self.subTest(statuses=statuses, argv=argv), checks(*statuses):
                self.assertEqual(call(*argv)[0], wanted)

    def test_wrong_usage_is_2(self) -> None:
        for argv in (["--timeout", "0"], ["--timeout", "nan"], ["--min-gpus", "-1"], ["--require", "tpu"],
                     ["--json", "--markdown"], ["extra"]):  # fmt: skip
            with self.subTest(argv=argv), contextlib.redirect_stderr(io.StringIO()) as err:
                with self.assertRaises(SystemExit) as stopped:
                    env_check.main(argv)
                self.assertEqual(stopped.exception.code, 2)
                self.assertIn("error:", err.getvalue())

    def test_require_and_min_gpus(self) -> None:
        with mock.patch.object(env_check, "HOST_CHECKS", []), mock.patch.object(env_check, "run_group", healthy):
            self.assertEqual(call("--require", "cpu")[0], 0)
            code, text = call("--require", "cuda", "--quick")
            self.assertEqual(code, 1)
            self.assertIn("FAIL  --require", text)
            self.assertEqual(call("--min-gpus", "1")[0], 1)
        two = list(env_check.check_wanted("cuda", 2, ["cpu", "cuda:0", "cuda:1"], healthy("torch", [], 1)[0]))
        self.assertEqual([line.status for line in two], ["PASS", "PASS"])

    def wanted(self, require: str, build: str, gpus: list[str], driver: str, hidden: bool, on: str = "Linux") -> str:
        """What --require says to do on a machine with only a CPU for torch."""
        facts = [env_check.result("torch", "2.15.0 at /x"), env_check.result("CUDA", f"{build}, whatever", "mend CUDA")]
        with (
            mock.patch.object(env_check, "nvidia_gpus", lambda: (gpus, driver)),
            mock.patch.object(env_check, "hides_all_gpus", lambda: hidden),
            mock.patch("platform.system", lambda: on),
        ):
            [line] = env_check.check_wanted(require, 0, ["cpu"], facts)
            [count] = env_check.check_wanted("", 1, ["cpu"], facts)
        self.assertEqual((line.status, line.found), ("FAIL", f"{require}; usable: cpu"))
        if require == "cuda" and on == "Linux":
            self.assertEqual(count.todo, line.todo)
        return str(line.todo)

    def test_require_tells_the_causes_apart(self) -> None:
        cpu_only, hides, no_gpu = "built for the CPU only: pip install", "CUDA_VISIBLE_DEVICES hides", "--gpus all"
        for build, gpus, driver, hidden, causes in (
            ("CPU build", ["H200"], "580.65", False, [cpu_only, "/whl/cu130"]),
            ("CPU build", ["H200"], "570.10", False, [cpu_only, "/whl/cu126"]),  # too old for CUDA 13
            ("CPU build", [], "", False, [cpu_only, "/whl/cu130", no_gpu]),
            ("CUDA 13.2 build", [], "", False, [no_gpu, "no NVIDIA GPU is found"]),
            ("CUDA 13.2 build", ["an NVIDIA GPU"], "", False, [no_gpu, "no NVIDIA driver works"]),
            ("CUDA 13.2 build", ["H200"], "580.65", True, [hides, "unset it"]),
            ("CPU build", ["H200"], "580.65", True, [cpu_only, "/whl/cu130", hides, "unset it"]),
            ("CUDA 13.2 build", ["H200"], "580.65", False, ["mend CUDA"]),  # all there, and it does not work
            ("ROCm 7.1 build", [], "", False, ["--device=/dev/kfd"]),
        ):
            with self.subTest(build=build, gpus=gpus, driver=driver, hidden=hidden):
                todo = self.wanted("cuda", build, gpus, driver, hidden)
                for word in {cpu_only, hides, no_gpu, "mend CUDA", "/whl/cu130", "/whl/cu126", "unset it", *causes}:
                    self.assertEqual(word in todo, word in causes, (word, todo))
        self.assertIn("--require mps", self.wanted("cuda", "CPU build", [], "", False, "Darwin"))
        self.assertIn("arm64", self.wanted("mps", "CPU build", [], "", False, "Darwin"))
        self.assertIn("this is no Mac", self.wanted("mps", "CPU build", [], "", False))
        self.assertIn("/whl/xpu", self.wanted("xpu", "CPU build", [], "", False))
        [line] = env_check.check_wanted("cuda", 0, [], [env_check.result("torch", "no", "pip install it", "FAIL")])
        self.assertEqual(line.todo, "mend torch first: pip install it")
        [line] = env_check.check_wanted("", 2, ["cpu", "cuda:0"], [env_check.result("torch", "2.15.0")])
        self.assertIn("CUDA_VISIBLE_DEVICES", line.todo)

    def test_a_raising_check_is_one_line(self) -> None:
        def check_nothing_good() -> None:
            raise OSError("first\nsecond")

        host = mock.patch.object(env_check, "HOST_CHECKS", [check_nothing_good])
        with host, mock.patch.object(env_check, "run_group", healthy):
            code, text = call("--quick")
        self.assertEqual(code, 1)
        self.assertIn(f"FAIL  {'nothing good':<24} OSError: first second\n      -> ", text)


class Forms(unittest.TestCase):
    def test_json(self) -> None:
        with checks("PASS", "WARN"):
            data = json.loads(call("--json")[1])
        self.assertEqual((data["schema_version"], data["exit_code"]), (1, 0))
        self.assertEqual(data["checks"][1],
                         {"status": "WARN", "name": "line 1", "found": "found | <it>", "todo": "do it"})  # fmt: skip

    def test_markdown_escapes(self) -> None:
        with checks("WARN"):
            lines = call("--markdown")[1].splitlines()
        self.assertEqual(lines[2:], ["| WARN | line 0 | found \\| &lt;it&gt; | do it |"])
        self.assertEqual(lines[1].count("---"), 4)

    def test_redact(self) -> None:
        env = {"HOME": "/data/people/alice", "USER": "alice", "LOGNAME": "alice", "MASTER_ADDR": "node7.example"}
        with mock.patch.dict(os.environ, env), mock.patch("socket.gethostname", lambda: "wonder.land"):
            clean = env_check.redactor()
        for text, wanted in {
            "/data/people/alice/venv/bin/python": "~/venv/bin/python",
            "/data/people/alicia/x": "/data/people/alicia/x",
            "/home/bob/x, /Users/carol/y": "~/x, ~/y",
            "MASTER_ADDR='node7.example' on Wonder.land or wonder": "MASTER_ADDR='(host)' on (host) or (host)",
            "by alice; malice": "by (user); malice",
        }.items():
            self.assertEqual(clean(text), wanted)

    def test_redact_reaches_found_and_todo(self) -> None:
        line = env_check.Result("WARN", "x", "/data/alice/a", "see /data/alice/b")
        home = mock.patch.dict(os.environ, {"HOME": "/data/alice"})
        with home, mock.patch.object(env_check, "collect", lambda args: iter([line])):
            self.assertNotIn("alice", call("--redact")[1])
            self.assertIn("alice", call()[1])

    def test_home_at_the_root_is_left_alone(self) -> None:
        with mock.patch.dict(os.environ, {"HOME": "/"}):
            self.assertEqual(env_check.redactor()("/usr/bin/g++"), "/usr/bin/g++")

    def test_closed_stdout_leaves_no_traceback(self) -> None:
        with folder({"torch/__init__.py": NO_TORCH}, python_path=True):
            buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # else argparse itself hides that its help was not read
            for option in ("--quick", "--help"):
                command, pipe = [sys.executable, str(SCRIPT), option], subprocess.PIPE
                child = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=buffered)
                assert child.stdout is not None
                child.stdout.close()
                child.stdout = None
                _, err = child.communicate(timeout=60)
                self.assertEqual((child.returncode, err), (141, b""), option)

    @unittest.skipUnless(Path("/proc/self/stat").is_file(), "needs /proc")
    def test_interrupted_leaves_no_child_and_no_traceback(self) -> None:
        hanging = "import os, pathlib, time\npath = pathlib.Path(__file__).with_name('pid.part')\n" \
                  "path.write_text(str(os.getpid()))\npath.rename(path.with_name('pid'))\ntime.sleep(60)\n"  # fmt: skip
        for number, wanted in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with self.subTest(number=number), folder({"torch/__init__.py": hanging}, python_path=True) as root:
                command, pid = [sys.executable, str(SCRIPT), "--json"], Path(root, "torch", "pid")
                with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                    try:
                        for _ in range(600):
                            if pid.is_file() or process.poll() is not None:
                                break
                            time.sleep(0.05)
                        process.send_signal(number)
                        out, err = process.communicate(timeout=20)
                    finally:
                        process.kill()
                self.assertEqual((process.returncode, out, err), (wanted, b"", b""))
                self.assertTrue(gone(pid.read_text()))


class Machine(unittest.TestCase):
    def test_cgroup_limits(self) -> None:
        inf = float("inf")
        for files, groups, wanted in (
            ({"a/cpu.max": "150000 100000", "a/memory.max": "max"}, "0::/a\n", (1.5, inf)),
            ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000", "a/memory.max": "1024"}, "0::/a/b\n",
             (4, 1024)),
            ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "1:cpu:/docker/1\n",
             (0.5, inf)),
            ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n",
              "memory/memory.limit_in_bytes": "9223372036854771712\n"}, "1:cpu:/\n2:memory:/\n", (inf, inf)),
        ):  # fmt: skip
            with self.subTest(files=files), folder({**files, "self": groups}) as root:
                self.assertEqual(env_check.cgroup_limits(root, f"{root}/self"), wanted)
        self.assertEqual(env_check.cgroup_limits("/none", "/none"), (inf, inf))

    def test_threads_against_cpus_and_quota(self) -> None:
        quota = mock.patch.object(env_check, "cgroup_limits", lambda: (1.5, float("inf")))
        affinity = mock.patch.object(os, "sched_getaffinity", lambda pid: set(range(8)), create=True)
        cases = {"64": "WARN", "3": "WARN", "2": "PASS", "two": "WARN", "0": "WARN", "2,1": "PASS"}
        for value, wanted in cases.items():
            with self.subTest(value=value), quota, affinity, mock.patch.dict(os.environ, {"OMP_NUM_THREADS": value}):
                self.assertEqual(env_check.check_thread_settings().status, wanted)

    def test_affinity_is_a_line_of_its_own(self) -> None:
        with (
            mock.patch.object(env_check, "cgroup_limits", lambda: (1.5, float("inf"))),
            mock.patch.object(os, "sched_getaffinity", lambda pid: {0, 2, 3, 4}, create=True),
            mock.patch.object(os, "cpu_count", lambda: 16),
            mock.patch.object(env_check, "read", lambda path: "Name:\tpython\nCpus_allowed_list:\t0,2-4\n"),
        ):
            line = env_check.check_CPU_affinity()
        self.assertEqual((line.status, line.name), ("PASS", "CPU affinity"))
        self.assertEqual(line.found, "16 CPUs in the machine, 4 allowed for this process (0,2-4), "
                         "container quota 1.5, so 2 usable")  # fmt: skip
        self.assertIn(env_check.check_CPU_affinity, env_check.HOST_CHECKS)

    def test_distributed_variables(self) -> None:
        good = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
        self.assertEqual(env_check.distributed_problem(good), "")
        for change, word in (
            ({"MASTER_ADDR": ""}, "MASTER_ADDR missing"), ({"RANK": "4"}, "RANK 4 is not below WORLD_SIZE 4"),
            ({"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK 1"), ({"MASTER_PORT": "70000"}, "MASTER_PORT"),
            ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"), ({"LOCAL_WORLD_SIZE": "8"}, "above WORLD_SIZE"),
        ):  # fmt: skip
            with self.subTest(change=change):
                self.assertIn(word, env_check.distributed_problem({**good, **change}))
        with mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "RANK": "0"}):
            self.assertEqual(env_check.check_distributed_variables().status, "FAIL")
        with mock.patch.dict(os.environ, {"MASTER_ADDR": "h"}):
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                os.environ.pop(name, None)
            self.assertEqual(env_check.check_distributed_variables().status, "PASS")

    def test_visible_devices(self) -> None:
        for value, gpus, wanted in (
            ("", 0, "PASS"), ("", 1, "WARN"), ("-1", 1, "WARN"), ("0,1", 2, "PASS"), ("0,2", 2, "WARN"),
            ("0,0", 2, "WARN"), ("cuda:0", 0, "WARN"), ("GPU-ab12", 1, "PASS"),
        ):  # fmt: skip
            present = mock.patch.object(env_check, "nvidia_gpus", lambda gpus=gpus: (["GPU"] * gpus, "580"))
            with self.subTest(value=value), present, mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": value}):
                self.assertEqual(env_check.check_visible_devices().status, wanted)

    def test_hidden_modules(self) -> None:
        handing_over = (
            "import importlib.util, os, sys, sysconfig\n"
            "path = os.path.join(sysconfig.get_path('stdlib'), 'profile.py')\n"
            "spec = importlib.util.spec_from_file_location('profile', path)\n"
            "sys.modules[__name__] = module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
        )
        with mock.patch.object(env_check, "HERE", "/nonexistent"):
            for files, wanted in (
                ({"profile.py": handing_over, "mine.py": "", "json/readme": ""}, "PASS"),
                ({"profile.py": "x = 1"}, "WARN"), ({"queue.py": "raise SystemExit"}, "WARN"),
                ({"email/__init__.py": ""}, "WARN"), ({"torch.py": ""}, "WARN"), ({"sys.py": ""}, "PASS"),
            ):  # fmt: skip
                with self.subTest(files=list(files)), folder(files, python_path=True):
                    self.assertEqual(env_check.check_hidden_modules().status, wanted)

    def test_files_that_hide_modules_are_named_and_never_run(self) -> None:
        with tempfile.TemporaryDirectory() as root:
            marker = Path(root, "marker")
            harm = f"open({str(marker)!r}, 'a').write(__name__)\nraise SystemExit(7)\n"
            on_path = {"random.py": harm, "argparse.py": harm, "json/__init__.py": harm, "torch/__init__.py": NO_TORCH}
            beside = {"env_check.py": SCRIPT.read_text(), "secrets.py": harm, "typing.py": harm}
            with (
                folder(on_path, python_path=True) as path,
                folder({"queue.py": harm, "numpy.py": harm}) as cwd,
                folder(beside) as own,  # the folder that Python puts first
            ):
                if hasattr(os, "mkfifo"):
                    os.mkfifo(f"{cwd}/cmd.py")  # reading it would never end
                for python_path in (path, os.pathsep + path):  # an empty entry stands for the current folder
                    os.environ["PYTHONPATH"] = python_path
                    done = subprocess.run([sys.executable, f"{own}/env_check.py", "--quick", "--json"],
                                          cwd=cwd, capture_output=True, text=True, timeout=60)  # fmt: skip
                    self.assertEqual((done.returncode, done.stderr), (1, ""))
                    self.assertFalse(marker.exists(), marker.is_file() and marker.read_text())
                    lines = {line["name"]: line for line in json.loads(done.stdout)["checks"]}
                    self.assertEqual(lines["torch"]["found"], "not installed")  # it comes before site-packages still
                    self.assertEqual(lines["hidden modules"]["status"], "WARN")
                    for name in (f"{path}/random.py", f"{path}/argparse.py", f"{path}/json/__init__.py",
                                 f"{cwd}/queue.py", f"{cwd}/numpy.py", f"{own}/secrets.py"):  # fmt: skip
                        self.assertIn(name, lines["hidden modules"]["found"])


class Torch(unittest.TestCase):
    def setUp(self) -> None:
        patch = mock.patch.object(env_check, "torch", None)
        patch.start()
        self.addCleanup(patch.stop)

    def run_with(self, files: dict[str, str], *argv: str) -> tuple[int, dict[str, dict[str, str]]]:
        with folder(files, python_path=True), mock.patch.object(env_check, "HOST_CHECKS", []):
            code, text = call("--json", *argv)
        return code, {line["name"]: line for line in json.loads(text)["checks"]}

    def test_torch_missing_broken_or_not_torch(self) -> None:
        for text, found, todo in (
            (NO_TORCH, "not installed", "pip install torch torchvision"),
            ("raise ImportError('libcudart.so.13: cannot open')", "libcudart.so.13", "--force-reinstall"),
            ("", "no attribute '__version__'", "no file named torch"),
            ("import sys; sys.exit(3)", "SystemExit", "new virtual environment"),
            ("__version__ = '2.9.1'", "2.9.1", "pip install -U"),
            ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "Segmentation fault", "new virtual"),
        ):
            with self.subTest(text=text):
                code, lines = self.run_with({"torch/__init__.py": text})
                self.assertEqual((code, lines["torch"]["status"], lines["live checks"]["status"]), (1, "FAIL", "SKIP"))
                self.assertIn(found, lines["torch"]["found"])
                self.assertIn(todo, lines["torch"]["todo"])

    def test_hanging_import_ends(self) -> None:
        start = time.monotonic()
        code, lines = self.run_with({"torch/__init__.py": "import time; time.sleep(60)"}, "--timeout", "0.5")
        self.assertLess(time.monotonic() - start, 30)
        self.assertEqual((code, lines["torch"]["found"][:21]), (1, "no answer within 0.5 "))

    def test_a_hang_keeps_the_results_before_it(self) -> None:
        code = (
            "import sys, time, subprocess\n"
            "mark = sys.argv[1]\n"
            "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"  # keeps the pipe open
            'print(mark + \'{"results": [["PASS", "first", "%d", ""]]}\' % worker.pid)\n'
            "print('noise of a library')\n"
            'print(mark + \'{"running": "second"}\', flush=True)\n'
            "print(mark + '{\"torn', end='', flush=True)\n"
            "time.sleep(60)\n"
        )
        start = time.monotonic()
        lines, devices = env_check.run_group("cpu", [sys.executable, "-c", code, env_check.MARK], 1)
        self.assertLess(time.monotonic() - start, 30)
        self.assertEqual([(line.status, line.name) for line in lines], [("PASS", "first"), ("FAIL", "second")])
        self.assertEqual(devices, [])
        self.assertTrue(gone(lines[0].found))  # the worker too

    def torchvision(self, torch_version: str, requires: str, error: str) -> Any:
        files = {
            "torchvision/__init__.py": error,
            "torchvision/version.py": "__version__ = '0.28.0+cu130'",
            "torchvision/_C.so": "no library",
            "torchvision-0.28.0.dist-info/METADATA": f"Name: torchvision\nVersion: 0.28.0\nRequires-Dist: {requires}\n",
        }
        kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] != "torchvision"}
        modules = mock.patch.dict(sys.modules, kept, clear=True)
        with folder(files) as root, mock.patch.object(sys, "path", [root, *sys.path]), modules:
            env_check.torch = SimpleNamespace(__version__=torch_version)
            importlib.invalidate_caches()
            return env_check.check_torchvision()

    def test_torchvision_causes(self) -> None:
        nms = "raise RuntimeError('operator torchvision::nms does not exist')"
        line = self.torchvision("2.13.0+cpu", "torch (==2.13.0)", nms)  # the right version, but another build
        self.assertEqual(line.status, "FAIL")
        self.assertIn("a cu130 build of torchvision beside a cpu build of torch", line.found)
        self.assertIn("operator torchvision::nms does not exist", line.found)
        self.assertIn("torchvision==0.28.0 --index-url https://download.pytorch.org/whl/cpu", line.todo)
        line = self.torchvision("2.15.0+cu130", "torch (==2.13.0)", nms)
        self.assertIn("asks for torch (==2.13.0), but torch is 2.15.0+cu130", line.found)
        line = self.torchvision("2.13.0+cu130", "torch>=2.13.0", nms)
        self.assertIn("does not fit", line.found)
        self.assertIn("_C.so", line.found)  # what the loader says of the library itself
        line = self.torchvision("2.13.0+cu130", "torch>=2.13.0", "import PIL_of_nobody")
        self.assertEqual(line.todo, "pip install PIL_of_nobody")

    def test_satisfies(self) -> None:
        for version, requires, wanted in (
            ("2.13.0+cpu", "torch (==2.13.0)", True), ("2.13.1", "torch==2.13.0", False),
            ("2.15.0", "torch>=2.14.0", True), ("2.9.0", "torch>=2.14.0", False), ("2.9.0", "", True),
        ):  # fmt: skip
            self.assertIs(env_check.satisfies(version, requires), wanted, (version, requires))

    def test_architectures(self) -> None:
        built = ["sm_75", "sm_80", "sm_90", "sm_100", "compute_100"]
        for capability, arches, wanted in (
            ((7, 0), built, "FAIL"), ((7, 5), built, "PASS"), ((8, 9), built, "PASS"), ((9, 0), built, "PASS"),
            ((10, 3), built, "PASS"), ((12, 0), built, "WARN"), ((12, 0), built[:-1], "FAIL"),
            ((9, 0), ["sm_90a"], "PASS"), ((10, 3), ["sm_100a"], "FAIL"), ((8, 6), ["compute_80"], "WARN"),
        ):  # fmt: skip
            self.assertEqual(env_check.architecture_verdict(capability, arches)[0], wanted, (capability, arches))

    def test_each_child_works_on_its_own_device(self) -> None:
        events: list[object] = []

        def work_nothing(device: str, dtype: Any) -> None:
            events.append("work")

        module = SimpleNamespace(set_device=lambda device: events.append(("set", device)))
        fake = SimpleNamespace(cuda=module, xpu=module, mps=SimpleNamespace(), cpu=SimpleNamespace())
        for group, first in (("cuda:1", [("set", 1)]), ("xpu:2", [("set", 2)]), ("mps", []), ("cpu", [])):
            events.clear()
            with (
                self.subTest(group=group),
                mock.patch.object(env_check, "check_torch", lambda: setattr(env_check, "torch", fake)),
                mock.patch.object(env_check, "WORK", [work_nothing]),
                mock.patch.object(env_check, "compare", lambda device, work: work(device, None)),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                env_check.run_child(group, False)
            self.assertEqual(events, [*first, "work"])

    def test_speed_waits_for_the_device_that_works(self) -> None:
        import torch

        waits: list[tuple[object, ...]] = []
        module = SimpleNamespace(synchronize=lambda *device: waits.append(device))
        env_check.torch = SimpleNamespace(
            randn=lambda *shape, device: torch.zeros(8, 8), ones=lambda count, device: torch.ones(8),
            empty_like=torch.empty_like, cuda=module, mps=module,
        )  # fmt: skip
        for device, wanted in (("cuda:1", ("cuda:1",)), ("mps", ())):
            waits.clear()
            with self.subTest(device=device), mock.patch("time.perf_counter", iter(range(10**6)).__next__):
                self.assertEqual(env_check.live_speed(device).status, "PASS")
            self.assertEqual(set(waits), {wanted})

    def test_tf32_of_products_and_convolutions(self) -> None:
        import torch

        env_check.torch, backends = torch, cast(Any, torch.backends)
        conv = backends.cudnn.conv
        self.addCleanup(setattr, conv, "fp32_precision", conv.fp32_precision)
        with mock.patch.object(torch.backends.cuda, "is_built", lambda: True), warnings.catch_warnings():
            warnings.simplefilter("error")
            for value, word in (("tf32", "yes"), ("ieee", "no")):  # these two differ from the products, which are mixed
                conv.fp32_precision = value
                with (
                    mock.patch.object(torch.backends.cudnn, "version", lambda: 92600),
                    mock.patch.object(torch.distributed, "is_nccl_available", lambda: False),
                    mock.patch.object(torch.backends.cuda, "is_flash_attention_available", lambda: True),
                ):
                    found = env_check.check_libraries().found
                self.assertIn(f"TF32 products no, TF32 convolutions {word}", found)

    def test_an_unusable_gpu_is_told_once(self) -> None:
        env_check.torch = self.gpu_torch("13.2", False)
        env_check.torch.cuda.device_count = lambda: 1  # as NVML counts beside a driver that is too old
        env_check.torch.cuda.mem_get_info = mock.Mock(side_effect=RuntimeError("CUDA driver version is insufficient"))
        self.assertEqual(list(env_check.check_GPUs()), [])

    def gpu_torch(self, cuda: str | None, usable: bool, free: int = 70) -> Any:
        def init() -> None:
            raise RuntimeError("CUDA unknown error")

        properties = SimpleNamespace(name="H200", major=9, minor=0)
        functions = SimpleNamespace(
            is_available=lambda: usable, device_count=lambda: int(usable), init=init, get_arch_list=lambda: ["sm_90"],
            get_device_properties=lambda i: properties, mem_get_info=lambda i: (free * 2**30, 80 * 2**30),
        )  # fmt: skip
        return SimpleNamespace(version=SimpleNamespace(cuda=cuda, hip=None), cuda=functions)

    def test_cuda_against_driver(self) -> None:
        for cuda, usable, gpus, driver, wanted, word in (
            ("13.2", False, [], (), "PASS", "work runs on the CPU"),
            ("13.2", True, ["H200"], (13, 0), "PASS", "1 GPU"),
            ("13.2", False, ["H200"], (12, 8), "FAIL", "CUDA unknown error"),
            ("13.2", False, ["H200"], (), "WARN", "H200"),
            (None, False, ["H200"], (13, 0), "WARN", "CPU build"), (None, False, [], (), "PASS", "CPU build"),
        ):  # fmt: skip
            with self.subTest(cuda=cuda, usable=usable, gpus=gpus, driver=driver):
                env_check.torch = self.gpu_torch(cuda, usable)
                with (
                    mock.patch.object(env_check, "nvidia_gpus", lambda gpus=gpus: (gpus, "")),
                    mock.patch.object(env_check, "driver_cuda", lambda driver=driver: driver),
                    mock.patch.object(env_check, "hides_all_gpus", lambda: False),
                ):
                    line = env_check.check_CUDA()
                self.assertEqual(line.status, wanted)
                self.assertIn(word, line.found)
                if driver == (12, 8):
                    self.assertIn("update the NVIDIA driver", line.todo)

    def test_gpu_lines(self) -> None:
        env_check.torch = self.gpu_torch("13.2", True)
        found = "H200, 80.0 GiB, 70.0 free, capability 9.0, sm_90 in the wheel, bf16 native"
        self.assertEqual(list(env_check.check_GPUs()), [env_check.Result("PASS", "cuda:0", found, "")])
        env_check.torch = self.gpu_torch("13.2", True, free=3)
        self.assertEqual(next(iter(env_check.check_GPUs())).status, "WARN")

    def test_xpu_lines(self) -> None:
        def mem_get_info(i: int) -> tuple[int, int]:
            if i:
                raise RuntimeError("this device does not support querying the available free memory")
            return 12 * 2**30, 16 * 2**30

        properties = SimpleNamespace(name="Arc", total_memory=16 * 2**30)
        env_check.torch = self.gpu_torch(None, False)
        env_check.torch.xpu = SimpleNamespace(
            is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda i: properties,
            mem_get_info=mem_get_info,
        )  # fmt: skip
        found = [(line.status, line.name, line.found) for line in env_check.check_GPUs()]
        self.assertEqual(found, [("PASS", "xpu:0", "Arc, 16.0 GiB, 12.0 free"), ("PASS", "xpu:1", "Arc, 16.0 GiB")])

    def test_wrong_numbers_fail(self) -> None:
        import torch

        env_check.torch = torch

        def work_off_by_a_percent(device: str, dtype: Any) -> Any:
            return torch.ones(3, dtype=dtype) * (1.0 if dtype == torch.float64 else 1.01)

        def work_nan(device: str, dtype: Any) -> Any:
            return torch.ones(3, dtype=dtype) * (1.0 if dtype == torch.float64 else float("nan"))

        self.assertEqual(env_check.compare("cpu", work_off_by_a_percent).status, "FAIL")
        self.assertEqual(env_check.compare("cpu", work_nan).status, "FAIL")
        torch.testing.assert_close(env_check.work_optimizer_step("cpu", torch.float64).detach(),
                                   torch.tensor([0.8, -1.6], dtype=torch.float64))  # fmt: skip
        q, k, v = torch.randn(3, 2, 4, 64, 32, generator=torch.Generator().manual_seed(0)).double()
        torch.testing.assert_close(env_check.work_attention("cpu", torch.float64),
                                   torch.softmax(q @ k.transpose(-2, -1) / 32**0.5, dim=-1) @ v)  # fmt: skip


class RealRun(unittest.TestCase):
    def test_alone_in_an_empty_folder(self) -> None:
        with folder({"env_check.py": SCRIPT.read_text()}) as root:  # two of its children import the real torch
            done = subprocess.run([sys.executable, "env_check.py", "--json", "--require", "cpu", "--timeout", "100"],
                                  cwd=root, capture_output=True, text=True, timeout=240)  # fmt: skip
            self.assertEqual(os.listdir(root), ["env_check.py"])
        self.assertEqual(done.stderr, "")
        lines = {line["name"]: line for line in json.loads(done.stdout)["checks"]}
        import torch

        self.assertIn(torch.__version__, lines["torch"]["found"])
        for name in ("torch", "torchvision", "--require", "cpu: matrix product", "cpu: convolution", "cpu: attention",
                     "cpu: optimizer step", "cpu: speed", "cpu: data loader worker",
                     "cpu: gloo all-reduce"):  # fmt: skip
            self.assertEqual(lines[name]["status"], "PASS", lines[name])
        for line in lines.values():
            self.assertEqual(line["status"] == "PASS", line["todo"] == "", line)  # and every other one says what to do

    def test_names_no_package(self) -> None:
        text = SCRIPT.read_text()
        self.assertNotIn("torchbasics", text)
        self.assertNotIn("import torch\n", text)  # only through importlib, in a child


if __name__ == "__main__":
    unittest.main()
