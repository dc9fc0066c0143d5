"""One process: nothing happens. Several: values, gradients, weights and states are those of one process.

The functions whose first argument is `rank` run in each process of a group (`in_processes` of tests/common.py).
"""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import socket
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
import torch.distributed as dist
from torch import Tensor, nn

from tests.common import ROOT, in_processes, needs_processes, new_store, outcomes
from torchbasics import distributed

CPU = torch.device("cpu")


@contextlib.contextmanager
def launched(**variables: Any) -> Iterator[None]:
    """Set torchrun's variables, by default those of process 0 of 2; None takes one away."""
    names = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    own = {**names, "MASTER_PORT": None, "OMP_NUM_THREADS": None, "TORCHELASTIC_USE_AGENT_STORE": None, **variables}
    rest = {name: value for name, value in os.environ.items() if name not in own}
    given = {name: str(value) for name, value in own.items() if value is not None}
    with mock.patch.dict(os.environ, rest | given, clear=True):
        yield


def free_port() -> int:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        return other.getsockname()[1]


class OneProcess(unittest.TestCase):
    def test_it_is_rank_0_of_1_and_exchanges_nothing(self) -> None:
        self.assertEqual((distributed.rank(), distributed.world_size(), distributed.local_rank()), (0, 1, 0))
        self.assertEqual((distributed.is_main(), distributed.is_launched()), (True, False))
        with launched(RANK=3, WORLD_SIZE=8, LOCAL_RANK=1):  # by torchrun, but not in a group yet
            self.assertEqual((distributed.is_main(), distributed.is_launched()), (False, True))
            self.assertEqual(distributed.local_rank(), 1)
        with distributed.process_group(CPU):
            self.assertFalse(dist.is_initialized())
            distributed.barrier()
            distributed.set_job_note("run", "runs/a")
            self.assertIsNone(distributed.job_note("run"))
            self.assertEqual(distributed.all_gather([1, 2.5]), [[1, 2.5]])
            self.assertEqual(distributed.gather_objects("own"), ["own"])
            self.assertEqual(distributed.broadcast_object("own"), "own")
            self.assertEqual(distributed.on_main(lambda: 7), 7)
            with self.assertRaises(KeyError):
                distributed.on_main(lambda: {}["missing"])

    def test_a_model_is_itself_in_either_strategy(self) -> None:
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.assertIs(distributed.replicate(model, CPU, sync_bn=True), model)
        self.assertIs(distributed.shard(model, CPU, "bf16"), model)
        self.assertEqual((distributed.is_wrapped(model), distributed.is_sharded(model)), (False, False))
        with distributed.gradient_sync(model, wanted=False), distributed.shared_buffers(model):
            model(torch.ones(4, 2)).sum().backward()
        self.assertIsNotNone(model[0].weight.grad)
        self.assertEqual(model[1].num_batches_tracked.item(), 1)


class JoiningTheGroup(unittest.TestCase):
    def refused(self, error: type[Exception], pattern: str, **variables: Any) -> None:
        began = time.monotonic()
        with launched(**variables), self.assertRaisesRegex(error, pattern), distributed.process_group(CPU, 30.0):
            self.fail("it must not begin")
        self.assertLess(time.monotonic() - began, 10)
        self.assertFalse(dist.is_initialized())

    def test_a_missing_variable_is_named(self) -> None:
        for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            self.refused(ValueError, f"{name} expected", **{"MASTER_PORT": 1, name: None})

    def test_a_port_that_another_program_serves_is_an_error_with_advice(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            self.refused(ConnectionError, r"not find each other .*in use.*; give .* free MASTER_PORT", MASTER_PORT=port)

    @unittest.skipUnless(Path("/proc/self/task").exists(), "threads are counted in /proc")
    def test_no_thread_of_the_group_is_left_if_its_models_are_gone(self) -> None:
        # one that drops a tensor while Python exits would abort the process
        work = (
            "import gc, torch\n"
            "from pathlib import Path\n"
            "from torchbasics import distributed\n"
            "def threads(): return sum('gloo' in path.read_text() for path in Path('/proc/self/task').glob('*/comm'))\n"
            "def train():\n"
            "    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))\n"
            "    model.cycle = [model]\n"
            "    model(torch.ones(3, 2)).sum().backward()\n"
            "gc.disable()\n"
            "with distributed.process_group(torch.device('cpu'), 20):\n"
            "    train()\n"
            "    print(threads() > 0)\n"
            "print(threads())"
        )
        with launched(WORLD_SIZE=1, MASTER_PORT=free_port()):
            command = [sys.executable, "-W", "ignore", "-c", work]
            found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        self.assertEqual((found.stdout, found.stderr), ("True\n0\n", ""))

    def assert_ends_with_torchrun(self, processes: int, work: str) -> None:
        """Kill the parent of rank 0 when this, running `work`, prints "begun"."""
        rank = f"import threading, time, torch\nfrom torchbasics import distributed\n{work}"
        torchrun = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
        command = [sys.executable, "-c", torchrun, rank]
        with (
            launched(WORLD_SIZE=processes, MASTER_PORT=free_port(), TORCHELASTIC_RUN_ID="job"),
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
        ):
            assert process.stdout is not None
            try:
                said = next((line for line in process.stdout if line == "begun\n"), "")
            finally:
                process.kill()
            began = time.monotonic()
            said += process.stdout.read()  # until the last process has closed it
            self.assertLess(time.monotonic() - began, 3)  # torch's workers look for their parent every 5 s
        self.assertEqual(said, "begun\ntorchrun is gone, so this process ends too\n")

    def test_a_rank_and_its_workers_end_soon_after_torchrun_was_killed(self) -> None:
        self.assert_ends_with_torchrun(
            1,
            "with distributed.process_group(torch.device('cpu'), 20):\n"
            "    batches = iter(torch.utils.data.DataLoader(range(9), num_workers=1))\n"
            "    print('begun', flush=True)\n"
            "    time.sleep(60)\n",
        )

    def test_a_rank_that_waits_for_another_ends_too(self) -> None:
        self.assert_ends_with_torchrun(
            2,
            "threading.Timer(1, lambda: print('begun', flush=True)).start()\n"
            "with distributed.process_group(torch.device('cpu'), 20):\n"
            "    pass\n",
        )

    def test_a_group_of_one_under_torchrun_ends_whatever_happens_in_it(self) -> None:
        with (
            launched(WORLD_SIZE=1, MASTER_PORT=free_port()),
            self.assertRaisesRegex(KeyError, "caller's"),
            distributed.process_group(CPU, 5.0),
        ):
            self.assertEqual((dist.is_initialized(), distributed.world_size()), (True, 1))
            self.assertTrue(distributed.is_wrapped(torch.compile(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)))))
            raise KeyError("caller's")
        self.assertFalse(dist.is_initialized())


class OwnDevice(unittest.TestCase):
    def test_it_is_numbered_by_the_local_rank_unless_it_is_named(self) -> None:
        current: list[torch.device] = []
        with (
            mock.patch.object(torch.cuda, "device_count", lambda: 2),
            mock.patch.object(torch.cuda, "set_device", current.append),
        ):
            for given, expected in (("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
                with launched(RANK=5, LOCAL_RANK=1, WORLD_SIZE=8):
                    self.assertEqual(distributed.own_device(torch.device(given)), torch.device(expected))
                self.assertEqual(distributed.own_device(torch.device(given)), torch.device(given))  # plain python
            with launched(LOCAL_RANK=2), self.assertRaisesRegex(ValueError, "are 2; start with --nproc-per-node=2"):
                distributed.own_device(torch.device("cuda"))
        self.assertEqual(current, [torch.device("cuda:1"), torch.device("cuda:0")])


class Threads(unittest.TestCase):
    def chosen(self, cores: int, **variables: Any) -> int:
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(2)
        affinity = mock.patch.object(os, "sched_getaffinity", lambda _: set(range(cores)), create=True)
        with launched(**variables), affinity:
            return distributed.set_threads()

    def test_each_process_gets_its_share_of_the_cores(self) -> None:
        self.assertEqual(self.chosen(8), 4)
        self.assertEqual(self.chosen(7), 3)
        self.assertEqual(self.chosen(1, LOCAL_WORLD_SIZE=3), 1)
        self.assertEqual(self.chosen(8, OMP_NUM_THREADS=1), 4)  # torchrun's, not the user's
        self.assertEqual(self.chosen(8, OMP_NUM_THREADS=2), 2)  # the user's
        self.assertEqual(self.chosen(8, LOCAL_WORLD_SIZE=1), 2)  # torch's


def exchange(rank: int) -> dict[str, Any]:
    try:
        failure = distributed.on_main(lambda: {}["missing"])
    except KeyError as error:
        failure = str(error)
    return {
        "failure": failure,  # after which they still reach each other
        "who": [distributed.rank(), distributed.world_size(), distributed.is_main()],
        "gathered": distributed.all_gather([rank, 2**53 - 1, 0.1]),
        "objects": distributed.gather_objects({"rank": rank, "tensor": torch.full((2,), rank)}),
        "broadcast": distributed.broadcast_object(["of", rank]),
        "on_main": distributed.on_main(lambda: f"by {rank}"),
    }


def join(rank: int) -> None:
    print(time.monotonic(), flush=True)
    with distributed.process_group(CPU, 1.0):
        pass


class Interrupted(Exception):
    signum = signal.SIGTERM


def leaving(rank: int, how: str, mark: str) -> bool:
    """Rank 1 ends half a second after rank 0; return whether it had ended when this process left the group."""
    errors = {"success": [], "interrupted": [Interrupted], "error": [KeyError]}[how]
    with distributed.process_group(CPU, 20.0):  # an earlier one
        distributed.barrier()
    with contextlib.suppress(Interrupted, KeyError), distributed.process_group(CPU, 20.0):
        distributed.barrier()
        if rank == 1:
            time.sleep(0.5)
            Path(mark).touch()
        for error in errors:
            raise error
    return Path(mark).exists()


def failing(rank: int, how: str) -> None:
    """Rank 1 fails while the others wait for it."""
    distributed.barrier()
    if rank == 1 and how == "raise":
        raise ValueError("rank 1 failed")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def attempt(rank: int, number: int) -> str | None:
    """The first attempt leaves a note and dies; the second reads it."""
    note = distributed.job_note("run")
    distributed.barrier()
    if number == 0:
        if distributed.is_main():
            distributed.set_job_note("run", "runs/a")
        distributed.barrier()
        os._exit(3)
    return note


@needs_processes
class SeveralProcesses(unittest.TestCase):
    def test_values_and_failures_of_rank_0_reach_all_ranks(self) -> None:
        for rank, found in enumerate(in_processes(3, exchange)):
            self.assertEqual(found["failure"], "'missing'")
            self.assertEqual(found["who"], [rank, 3, rank == 0])
            self.assertEqual(found["gathered"], [[r, 2**53 - 1, 0.1] for r in range(3)])
            self.assertEqual([one["rank"] for one in found["objects"]], [0, 1, 2])
            self.assertEqual([one["tensor"].tolist() for one in found["objects"]], [[0, 0], [1, 1], [2, 2]])
            self.assertEqual((found["broadcast"], found["on_main"]), (["of", 0], "by 0"))

    def test_they_leave_together_after_success_and_when_interrupted_but_not_after_an_error(self) -> None:
        for how, together in (("success", True), ("interrupted", True), ("error", False)):
            with tempfile.TemporaryDirectory() as folder:
                found = in_processes(2, leaving, how, f"{folder}/rank 1 ended", timeout=None)
            self.assertEqual(found, [together, True], how)

    def test_the_others_fail_soon_if_one_fails_or_is_killed(self) -> None:
        for how, code in (("raise", 1), ("kill", -signal.SIGKILL)):
            began = time.monotonic()
            found = outcomes(3, failing, how, timeout=30.0)
            self.assertLess(time.monotonic() - began, 20)
            self.assertEqual([one.code for one in found], [1, code, 1], found)  # no abort
            self.assertRegex(found[0].output, "RuntimeError: .*(closed|reset) by peer")

    def test_who_gets_no_answer_ends_after_the_timeout_in_one_line(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:  # it takes connections and never answers
            silent: Any = SimpleNamespace(port=other.getsockname()[1])
            absent: Any = SimpleNamespace(port=free_port())
            for store, alone in ((silent, {}), (absent, {"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "False"})):
                [found] = outcomes(1, join, store=store, timeout=None, **alone)
                began, error = found.output.splitlines()
                self.assertLess(time.monotonic() - float(began), 4)
                self.assertEqual(found.code, 1)
                self.assertRegex(error, "^error: the processes did not find each other within 1 s; give .*MASTER_PORT")

    def test_a_restarted_job_finds_its_processes_and_its_notes(self) -> None:
        store = new_store()  # torchrun's, which outlives the processes
        found = [one.code for one in outcomes(2, attempt, 0, store=store, TORCHELASTIC_RESTART_COUNT="0")]
        self.assertEqual(found, [3, 3])
        found = in_processes(2, attempt, 1, store=store, TORCHELASTIC_RESTART_COUNT="1", timeout=10.0)
        self.assertEqual(found, ["runs/a", "runs/a"])


class Net(nn.Module):
    """Blocks in a list, a frozen parameter, weights that depend on the seed."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(6, 3)
        self.first.bias.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def prepare(strategy: str, seed: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model in its strategy, and AdamW with two groups in another order than the model's."""
    model = Net(seed)
    wrapped = distributed.shard(model, CPU) if strategy == "fsdp" else distributed.replicate(model, CPU)
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith("bias")]
    return wrapped, torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": others, "lr": 0.02}], 0.01)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (12,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[list[Tensor]]:
    """Take one step for each batch, in two parts, each split among the processes; return the gradients."""
    gradients = []
    for step in steps:
        optimizer.zero_grad()
        for i, (inputs, targets) in enumerate(zip(*(tensor.chunk(2) for tensor in batch(step)), strict=True)):
            own = slice(distributed.rank(), None, distributed.world_size())
            with distributed.gradient_sync(model, wanted=i == 1):
                (nn.functional.cross_entropy(model(inputs[own]), targets[own]) / 2).backward()
        gradients.append([whole(p.grad).clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
    return gradients


def whole(tensor: Any) -> Tensor:
    """Return the tensor, of which FSDP keeps a part in each process."""
    return getattr(tensor, "full_tensor", lambda: tensor)().detach()


def plain_course(steps: range) -> tuple[list[list[Tensor]], nn.Module, torch.optim.Optimizer]:
    """Train on whole batches in plain PyTorch."""
    model, optimizer = prepare("plain")
    gradients = []
    for step in steps:
        optimizer.zero_grad()
        inputs, targets = batch(step)
        nn.functional.cross_entropy(model(inputs), targets).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
    return gradients, model, optimizer


def course(rank: int, path: str | None = None) -> dict[str, Any]:
    """Train each strategy by two steps: from the start, or from each of the states in the file."""
    found = {}
    states = {"start": None} if path is None else torch.load(path, weights_only=True)
    for name, state in states.items():
        for strategy in ("ddp", "fsdp"):
            model, optimizer = prepare(strategy, seed=1 if state is None else 2)
            if state is not None:
                distributed.load_full_state(model, optimizer, *copy.deepcopy(state))  # the optimizer keeps its tensors
            gradients = train(model, optimizer, range(2) if state is None else range(2, 4))
            found[f"{name} {strategy}"] = {"gradients": gradients, "state": distributed.full_state(model, optimizer)}
    return found


def replicas(rank: int) -> dict[str, Any]:
    """Each process starts with other weights and buffers, and sees other inputs."""
    torch.manual_seed(rank)
    linear, norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
    linear.low = nn.Linear(2, 2, dtype=torch.bfloat16)
    linear.conv = nn.Conv2d(2, 2, 2).to(memory_format=torch.channels_last)
    norm.running_mean.fill_(rank)
    linear.register_buffer("empty", torch.zeros(0))
    linear.register_buffer("expanded", torch.tensor([7.0]).expand(3))
    linear.register_buffer("mask", torch.tensor([rank == 0]))
    linear.register_buffer("cache", torch.full((2 + rank,), rank))  # of another shape on each rank
    model = distributed.replicate(nn.Sequential(linear, norm), CPU)
    start = copy.deepcopy(distributed.full_weights(model))
    with torch.no_grad():
        model(torch.randn(5, 4))
    means = [norm.running_mean.clone()]
    with contextlib.suppress(KeyError), distributed.shared_buffers(model):
        means.append(norm.running_mean.clone())
        raise KeyError
    means.append(norm.running_mean.clone())
    with distributed.gradient_sync(model, wanted=False):
        (model(torch.ones(2, 4)).sum() * 0 + linear.weight.sum() * rank).backward()
    kinds = [distributed.is_wrapped(model), distributed.is_sharded(model), distributed.is_wrapped(linear)]
    return {"start": start, "means": means, "kinds": kinds, "unsent gradient": linear.weight.grad[0, 0].item()}


class Tied(nn.Module):
    """A language model whose output layer shares its weight with the embedding, and that has a layer it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.unused = nn.Embedding(8, 6), nn.Linear(6, 6), nn.Linear(5, 5)
        self.output = nn.Linear(6, 8, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.hidden(self.embedding(tokens)))


def shards(rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)  # other weights on each rank
    model = distributed.shard(nn.Sequential(nn.Linear(20, 40), nn.BatchNorm1d(40), nn.Linear(40, 3)), CPU)
    own = sum(parameter.to_local().numel() for parameter in model.parameters())
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    half = distributed.shard(nn.Sequential(nn.Linear(4, 8), encoder, nn.LayerNorm(8), nn.Linear(8, 2)), CPU, "bf16")
    seen: dict[str, str] = {}
    for name in ("0", "1.norm1", "1.linear1", "2", "3"):
        half.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: str(module.weight.dtype)})
        )
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            half(torch.randn(3, 2, 4)).float().sum().backward()

    tied = distributed.shard(Tied(), CPU)
    optimizer = torch.optim.SGD(tied.parameters(), 0.1)
    sent = []
    for wanted in (False, True):
        with distributed.gradient_sync(tied, wanted):
            tied(torch.arange(4)).square().mean().backward()
        sent.append(tied.hidden.weight.grad is not None)
    optimizer.step()
    return {
        "own": own,
        "start": whole(model[0].weight).sum().item(),
        "kinds": [distributed.is_wrapped(model), distributed.is_sharded(model)],
        "units": [name for name, unit in distributed.shard(Net(), CPU).named_modules() if distributed.is_sharded(unit)],
        "seen": seen,
        "gradients": sorted({str(parameter.grad.dtype) for parameter in half.parameters()}),
        "tied": torch.equal(whole(tied.embedding.weight), whole(tied.output.weight)),
        "tied parameters": len(list(tied.parameters())),
        "sent": sent,
    }


def odd_states(rank: int) -> dict[str, Any]:
    """States of a sharded model before the first step, of parameters that were never used, and that do not fit."""
    model, optimizer = prepare("fsdp")
    distributed.full_state(model, optimizer)
    first = train(model, optimizer, range(1))
    unchanged = {float(entry["step"]) for entry in optimizer.state.values()}

    tied, other = (distributed.shard(Tied(), CPU) for _ in range(2))
    tied_optimizer, other_optimizer = (torch.optim.AdamW(one.parameters()) for one in (tied, other))
    tied(torch.arange(4)).square().mean().backward()
    tied_optimizer.step()
    state = distributed.broadcast_object(distributed.full_state(tied, tied_optimizer))
    distributed.load_full_state(other, other_optimizer, *state)
    again = distributed.full_state(other, other_optimizer)

    errors, good = [], Net().state_dict()
    for bad in (
        {name: value for name, value in good.items() if name != "head.bias"},
        {**good, "head.bias": torch.zeros(7)},
        {**good, "more": torch.zeros(1)},
    ):
        try:
            distributed.load_weights(model, bad)
        except RuntimeError as error:
            errors.append(str(error))
    return {"gradients": first, "steps": unchanged, "states": [state, again], "errors": errors}


@needs_processes
class Strategies(unittest.TestCase):
    def assert_close(self, actual: Any, expected: Any, message: str = "") -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, msg=lambda text: f"{message}: {text}")

    def test_gradients_and_states_are_those_of_one_process_and_load_into_any_strategy(self) -> None:
        gradients, model, optimizer = plain_course(range(4))
        _, half, half_optimizer = plain_course(range(2))
        every = in_processes(3, course)
        states = {"one": copy.deepcopy(distributed.full_state(half, half_optimizer))}
        for found in every:
            for strategy, end in found.items():
                self.assert_close(end["gradients"], gradients[:2], strategy)
                states.setdefault(strategy, end["state"])
        self.assertEqual([found["start fsdp"]["state"] for found in every[1:]], [({}, {})] * 2)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(states, f"{folder}/states.pt")
            ends = in_processes(2, course, f"{folder}/states.pt")[0]
        for name, state in states.items():
            self.assert_close(state, (dict(half.state_dict()), half_optimizer.state_dict()), name)
            one, one_optimizer = prepare("one", seed=2)
            distributed.load_full_state(one, one_optimizer, *state)
            train(one, one_optimizer, range(2, 4))
            ends[f"{name} one"] = {"state": distributed.full_state(one, one_optimizer)}
        self.assertEqual(len(ends), 9)
        for name, end in ends.items():
            self.assert_close(end["state"], (dict(model.state_dict()), optimizer.state_dict()), name)

    def test_replicas_start_as_rank_0_and_keep_their_own_running_statistics(self) -> None:
        first, second = in_processes(2, replicas)
        caches = [found["start"].pop("0.cache").tolist() for found in (first, second)]
        self.assertEqual(caches, [[0, 0], [1, 1, 1]])  # what has another shape is left alone
        self.assert_close(dict(second["start"]), dict(first["start"]))
        torch.manual_seed(0)
        self.assert_close(second["start"]["0.weight"], nn.Linear(4, 3).weight.detach())
        self.assert_close(second["start"]["1.running_mean"], torch.zeros(3))
        self.assertFalse(torch.equal(first["means"][0], second["means"][0]))
        for rank, found in enumerate((first, second)):
            self.assertEqual(found["kinds"], [True, False, False])
            own, shared, again = found["means"]
            self.assert_close([shared, again], [first["means"][0], own])
            self.assertEqual(found["unsent gradient"], rank)

    def test_shards_are_parts_of_rank_0s_model_in_the_dtypes_of_the_policy(self) -> None:
        every = in_processes(2, shards)
        torch.manual_seed(0)
        start = nn.Linear(20, 40).weight.sum().item()
        half = 20 * 21 + 40  # of the first two layers; the last has 3 rows
        self.assertEqual([found["own"] for found in every], [half + 2 * 41, half + 1 * 41])
        for found in every:
            self.assertAlmostEqual(found["start"], start, places=4)
            self.assertEqual(found["kinds"], [True, True])
            self.assertEqual(found["units"], ["", "first", "blocks.0", "blocks.1", "head"])
            dtypes = dict.fromkeys(("0", "1.linear1", "3"), "torch.bfloat16")
            self.assertEqual(found["seen"], dtypes | dict.fromkeys(("1.norm1", "2"), "torch.float32"))
            self.assertEqual(found["gradients"], ["torch.float32"])
            self.assertEqual((found["tied"], found["tied parameters"]), (True, 5))
            self.assertEqual(found["sent"], [False, True])

    def test_a_sharded_state_is_right_in_odd_cases_too(self) -> None:
        gradients, _, _ = plain_course(range(1))
        every = in_processes(2, odd_states)
        for found in every:
            self.assert_close(found["gradients"], gradients)
            self.assertEqual(found["steps"], {1.0})  # saving before the first step did not count as one
            self.assertEqual(len(found["errors"]), 3)
            for error, part in zip(found["errors"], ("Missing key", "size mismatch", "Unexpected key"), strict=True):
                self.assertIn(part, error)
        before, after = every[0]["states"]
        self.assertEqual(len(before[1]["state"]), 3)  # not of the unused layer
        self.assert_close(after, before)


class Versioned(nn.Module):
    """A module that loads states of its second version only, and adds a value of its own."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({prefix + "note": 7}))

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if (metadata.get("version"), state.pop(prefix + "note", None)) != (2, 7):
            raise ValueError(f"another version: {metadata}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Names(unittest.TestCase):
    def test_states_of_compiled_models_are_those_of_plain_ones(self) -> None:
        plain = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Versioned(), nn.BatchNorm1d(2)))
        block = nn.Sequential(torch.compile(Versioned()), nn.BatchNorm1d(2))
        inner = nn.Sequential(nn.Linear(2, 2), torch.compile(block))
        for model in (plain, inner, torch.compile(inner), torch.compile(nn.DataParallel(torch.compile(inner)))):
            self.assertIs(distributed.unwrap(model), plain if model is plain else inner)
            nn.init.normal_(plain[0].weight)
            weights = plain.state_dict()
            distributed.load_weights(model, weights)
            found = distributed.full_weights(model)
            torch.testing.assert_close(dict(found), dict(weights), rtol=0, atol=0)
            self.assertEqual(list(found), list(weights))
            plain.load_state_dict(found)  # needs the version, from `_metadata`
            distributed.load_weights(plain, distributed.unwrap(model).state_dict())  # saved without our functions
            del found["0.bias"]
            with self.assertRaisesRegex(RuntimeError, "Missing key.*0.bias"):
                distributed.load_weights(model, found)


if __name__ == "__main__":
    unittest.main()
