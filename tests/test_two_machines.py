"""Two machines: network namespaces joined by a cable of their own, each with a torchrun; and one that is cut off.

Needs Linux, root and `ip`; elsewhere it is skipped, and says so.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

import torch

import torchbasics as tb
from tests.test_train_ddp import script
from tests.test_train_mnist import write_fashion

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = ("10.201.77.1", "10.201.77.2")
OPTIONS = ("--dataset=fashion-mnist", "--val-size=500", "--model=simplenet", "--dropout=0", "--precision=fp32",
           "--batch-size=127", "--epochs=2", "--timeout=8", "--quiet")  # fmt: skip


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


def why_not() -> str:
    """Why two machines cannot be had here; empty if they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None:
        return "two machines need Linux, root and `ip`"
    try:
        ip("netns", "add", f"tbtry{os.getpid()}")
        ip("netns", "del", f"tbtry{os.getpid()}")
    except (OSError, subprocess.SubprocessError) as error:
        return f"no network namespaces here: {getattr(error, 'stderr', error)}"
    return ""


REASON = why_not()


@unittest.skipIf(REASON, REASON)
class TwoMachines(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        write_fashion(self.folder / "data", {"train": 4400, "t10k": 500})  # drawing 70,000 digits would take seconds
        self.options = (*OPTIONS, f"--data-dir={self.folder / 'data'}")
        self.names = [f"tb{os.getpid()}x{number}" for number in range(2)]
        for name in self.names:
            ip("netns", "add", name)
            self.addCleanup(subprocess.run, ["ip", "netns", "del", name], capture_output=True, timeout=20)
        cables = [f"tbv{os.getpid() % 100000}{end}" for end in "ab"]
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(self.names, cables, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        self.cables = cables

    def start(self, machine: int, *options: str) -> subprocess.Popen:
        command = [
            "ip", "netns", "exec", self.names[machine], sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
            "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29431", "--rdzv-id=7",
            f"--local-addr={ADDRESSES[machine]}", f"--rdzv-conf=is_host={int(machine == 0)}",
            str(ROOT / "scripts" / "train_ddp.py"), *self.options, *options,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.cables[machine]}
        log = open(self.folder / f"log{machine}", "w")  # noqa: SIM115
        self.addCleanup(log.close)
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, env=environment,
                                   start_new_session=True)  # fmt: skip
        self.addCleanup(self.end, process)
        return process

    def end(self, process: subprocess.Popen) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)

    def logs(self) -> str:
        return "\n".join((self.folder / f"log{machine}").read_text()[-3000:] for machine in range(2))

    def test_the_same_as_one_machine_and_the_cut_cable_is_noticed(self) -> None:
        both = [self.start(machine, "--limit-batches=30", "--output=two") for machine in range(2)]
        codes = [process.wait(120) for process in both]
        self.assertEqual(codes, [0, 0], self.logs())
        info = json.loads((self.folder / "two" / "run.json").read_text())
        self.assertIn("2 processes", info["processes"])
        with contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(script.main([*self.options, "--limit-batches=30", f"--output={self.folder / 'one'}"]), 0)
        weights = [tb.load_checkpoint(self.folder / run / "checkpoints" / "step-00000060.pt")["model_state_dict"]
                   for run in ("one", "two")]  # fmt: skip
        for name, tensor in weights[0].items():
            torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)

        endless = ("--save-every=10", "--epochs=1000", "--timeout=5", "--output=cut")
        both = [self.start(machine, *endless) for machine in range(2)]
        checkpoints = self.folder / "cut" / "checkpoints"
        limit = time.monotonic() + 90
        while not list(checkpoints.glob("step-*.pt")) and time.monotonic() < limit:
            time.sleep(0.05)
        ip("-n", self.names[1], "link", "set", self.cables[1], "down")
        cut = time.monotonic()
        while "no answer from rank 1" not in (self.folder / "log0").read_text():
            self.assertLess(time.monotonic() - cut, 5 + 10, self.logs())  # torchrun itself ends later
            time.sleep(0.1)
        newest = sorted(checkpoints.glob("step-*.pt"))[-1]
        self.assertGreater(tb.load_checkpoint(newest)["step"], 0)


if __name__ == "__main__":
    unittest.main()
