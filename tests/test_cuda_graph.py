"""The step as a CUDA graph, on a CPU: a stand-in for torch.cuda's graphs records operators and does them again.

As on the device, a capture computes nothing, reading a value within it is an error, and what was a Python number at the
capture stays what it was. So a replay equals the Trainer without a graph only if the step was captured rightly.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import shutil
import tempfile
import unittest
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.scripts import load_script
from torchbasics.checkpoint import load_checkpoint
from torchbasics.cuda_graph import WARM_UP, StepGraph, graph_refusal
from torchbasics.evaluation import tree_map
from torchbasics.monitors import GradientMonitor
from torchbasics.optim import averaged_copy, make_optimizer
from torchbasics.options import print_warning
from torchbasics.trainer import NonFiniteLoss, Trainer

ROOT = Path(__file__).resolve().parents[1]
NOT_CAPTURED = "operation not permitted when stream is capturing"


def setUpModule() -> None:
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------- graphs without a device


class Graph(TorchDispatchMode):
    """In the place of torch.cuda.CUDAGraph: the operators of a capture, with the memory they read and write."""

    made: list[Graph] = []  # noqa: RUF012 (emptied by each test)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.before: dict[int, tuple[Any, Any]] = {}  # what was in each piece of memory that the capture has seen
        self.replays = 0
        Graph.made.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError(NOT_CAPTURED)
        kwargs = kwargs or {}
        for tensor in tensors((args, kwargs)):
            memory = tensor.untyped_storage()
            self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        outputs = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, outputs))
        return outputs

    def undo(self) -> None:
        """A capture computes nothing: all memory is as it was."""
        for memory, content in self.before.values():
            memory.copy_(content)

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, outputs in self.calls:
                for old, new in zip(tensors(outputs), tensors(func(*args, **kwargs)), strict=True):
                    # the same memory: a view, or an operator in place
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def capture(graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
    """In the place of torch.cuda.graph."""
    random_state = torch.get_rng_state()
    log.append(f"capture on {stream.name}")
    before, streams[-1] = streams[-1], stream
    try:
        with graph:
            yield
        torch.set_rng_state(random_state)
        streams[-1] = before
    except RuntimeError as error:  # random numbers stay out of order, as the device's generator does, and its stream
        raise RuntimeError("operation failed due to a previous error during capture") from error
    finally:
        graph.undo()


log: list[str] = []  # what was asked of the streams


class Stream:
    def __init__(self, device: Any = None, name: str = "side") -> None:
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        log.append(f"{self.name} waits for {other.name}")


streams = [Stream(name="main")]  # the last is the current one


@contextlib.contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    log.append(f"on {stream.name}")
    before, streams[-1] = streams[-1], stream
    try:
        yield
    finally:
        streams[-1] = before


def stand_ins() -> list[Any]:
    generator = SimpleNamespace(graphsafe_set_state=lambda fresh: torch.set_rng_state(fresh.get_state()))
    return [
        mock.patch("torchbasics.cuda_graph.DEVICES", ("cuda", "cpu")),
        mock.patch.multiple(
            torch.cuda, CUDAGraph=Graph, graph=capture, Stream=Stream, stream=on_stream, current_device=lambda: 0,
            current_stream=lambda device: streams[-1], get_rng_state=lambda device: torch.get_rng_state(),
            default_generators={0: generator},
        ),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------- a small problem


def batches(count: int = 7, size: int = 8, last: int = 5, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """`count` batches of `size` samples of 3 classes, and a shorter `last` one."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count * size + last, 6, generator=generator)
    return list(zip(inputs.split(size), inputs[:, :3].argmax(1).split(size), strict=True))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def with_short_rates(optimizer: torch.optim.Optimizer) -> None:
    """Each step with the rate as float32 has it, as within a graph; outside it is as it was."""
    rates: list[float] = []

    def before(optimizer: Any, *_: Any) -> None:
        rates[:] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = float(torch.tensor(group["lr"]))

    def after(optimizer: Any, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


class GraphCase(unittest.TestCase):
    def setUp(self) -> None:
        Graph.made.clear()
        log.clear()
        for patch in stand_ins():
            patch.start()
            self.addCleanup(patch.stop)
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def trainer(self, graph: Any = "on", optimizer: str = "adamw", schedule: Callable | None = None,
                decay: float = 0.0, criterion: Any = None, **options: Any) -> Trainer:  # fmt: skip
        model = network()
        made = make_optimizer(optimizer, model.parameters(), 0.0123)
        if not graph:
            with_short_rates(made)
        return Trainer(
            model, criterion or nn.CrossEntropyLoss(label_smoothing=0.1), made, "cpu",
            schedule(made) if schedule else None, averages=averaged_copy(model, decay) if decay else None,
            cuda_graph=graph, **options,
        )  # fmt: skip

    def fit(self, trainer: Trainer, epochs: int = 3, loader: Any = None) -> Trainer:
        torch.manual_seed(5)
        loader = loader or batches()
        trainer.fit(loader, loader[-3:], epochs, verbose=False)
        return trainer

    def assert_same(self, actual: Any, expected: Any, where: str = "state") -> None:
        """Bit for bit, at any depth."""
        if isinstance(expected, Tensor):
            self.assertTrue(isinstance(actual, Tensor) and torch.equal(actual, expected), where)
        elif isinstance(expected, dict):
            self.assertEqual(actual.keys(), expected.keys(), where)
            for key, value in expected.items():
                self.assert_same(actual[key], value, f"{where}.{key}")
        elif isinstance(expected, (list, tuple)):
            self.assertEqual(len(actual), len(expected), where)
            for i, value in enumerate(expected):
                self.assert_same(actual[i], value, f"{where}[{i}]")
        else:
            self.assertIs(type(actual), type(expected), where)
            self.assertEqual(actual, expected, where)

    def assert_same_run(self, actual: Trainer, expected: Trainer) -> None:
        """The whole state: weights, optimizer, schedule, averages, history, random numbers."""
        self.assert_same(actual.state_dict(), expected.state_dict())
        self.assert_same(actual.grad_norm, expected.grad_norm, "grad_norm")


# --------------------------------------------------------------------------------------------------------- the tests


class AsWithout(GraphCase):
    def compare(self, replays: int = 3 * 7 - WARM_UP, loader: Any = None, **options: Any) -> Trainer:
        plain, replayed = (self.fit(self.trainer(graph, **options), loader=loader) for graph in (False, "on"))
        self.assert_same_run(replayed, plain)
        self.assertEqual([graph.replays for graph in Graph.made], [replays])  # one capture, for all epochs
        return replayed

    def test_each_fused_optimizer(self) -> None:
        for name in ("adamw", "adam", "sgd"):
            Graph.made.clear()
            self.compare(optimizer=name)

    def test_clipped(self) -> None:
        norms: list[Tensor | None] = []  # of both runs, one after the other
        self.compare(clip_norm=0.05, clip_value=0.02, on_step_end=(lambda trainer: norms.append(trainer.grad_norm),))
        self.assert_same(norms[24:], norms[:24])
        self.assertTrue(all(norm is not None and norm > 0.05 for norm in norms))  # it really clipped
        self.assertEqual(len({float(norm) for norm in norms if norm is not None}), 24)

    def test_rate_per_step_and_averages(self) -> None:
        self.compare(schedule=lambda o: OneCycleLR(o, 0.02, 24 + 1, cycle_momentum=False), decay=0.9)
        Graph.made.clear()
        self.compare(schedule=lambda o: LambdaLR(o, lambda t: 1 / (1 + t)), scheduler_interval="step")

    def test_rate_per_epoch(self) -> None:
        trainer = self.compare(schedule=lambda o: StepLR(o, 1, 0.3), optimizer="sgd")
        self.assertEqual(trainer.history["lr"][1], 0.0123 * 0.3)

    def test_windows_of_two(self) -> None:
        # six windows an epoch, the last of 8 and 5 samples, which weigh unequally
        self.compare(3 * 5 - WARM_UP, batches(11), accumulate=2, clip_norm=0.1)

    def test_bf16(self) -> None:
        self.compare(precision="bf16", nan_policy="ignore")

    def test_the_rate_is_a_plain_number_outside(self) -> None:
        seen = []
        trainer = self.trainer(schedule=lambda o: StepLR(o, 1, 0.5), checkpoint_dir=self.folder)
        trainer.on_step_end = (lambda t: seen.append(t.optimizer.param_groups[0]["lr"]),)
        self.fit(trainer, 2)
        self.assertEqual(seen, [0.0123] * 8 + [0.0123 * 0.5] * 8)
        saved = load_checkpoint(self.folder / "step-00000016.pt")
        (group,) = saved["optimizer_state_dict"]["param_groups"]
        self.assertEqual((type(group["lr"]), group["lr"], group["capturable"]), (float, 0.0123 * 0.25, False))
        self.assertEqual(saved["scheduler_state_dict"]["base_lrs"], [0.0123])
        self.assertTrue(all(type(rate) is float for rate in trainer.history["lr"]))
        self.assertEqual(trainer.step, 16)

    def test_inputs_in_a_dict(self) -> None:
        class Summed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = network()

            def forward(self, inputs: dict[str, Tensor]) -> Tensor:
                return self.layer(inputs["a"] + inputs["b"])

        runs = []
        for graph in (False, "on"):
            model = Summed()
            optimizer = make_optimizer("sgd", model.parameters(), 0.5)  # which float32 has exactly
            trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, cuda_graph=graph)
            runs.append(self.fit(trainer, loader=[({"a": x, "b": x * 2}, y) for x, y in batches()]))
        self.assert_same(runs[1].model.state_dict(), runs[0].model.state_dict())
        self.assertEqual(len(Graph.made), 1)


class Resume(GraphCase):
    def test_in_the_middle_of_an_epoch(self) -> None:
        options: dict[str, Any] = {"schedule": lambda o: OneCycleLR(o, 0.02, 25, cycle_momentum=False), "decay": 0.9}
        whole = self.fit(self.trainer(**options))

        def stop(trainer: Trainer) -> None:
            if trainer.step == 13:
                trainer.save()
                raise KeyboardInterrupt

        cut = self.trainer(**options, checkpoint_dir=self.folder, on_step_end=(stop,))
        with self.assertRaises(KeyboardInterrupt):
            self.fit(cut)
        torch.manual_seed(99)
        resumed = self.trainer(**options, checkpoint_dir=self.folder)
        resumed.resume()
        resumed.fit(batches(), batches()[-3:], 3, verbose=False)
        self.assert_same_run(resumed, whole)
        self.assertEqual([graph.replays > 0 for graph in Graph.made], [True] * 3)

    def test_another_state_in_the_optimizer_is_captured_anew(self) -> None:
        runs = []
        for graph in (False, "on"):
            trainer = self.fit(self.trainer(graph), 1)
            state = copy.deepcopy(trainer.optimizer.state_dict())
            self.fit(trainer, 1)
            trainer.optimizer.load_state_dict(state)
            runs.append(self.fit(trainer, 1))
        self.assert_same(runs[1].state_dict(), runs[0].state_dict())
        self.assertEqual([graph.replays for graph in Graph.made], [7 - WARM_UP + 7, 7 - WARM_UP])


class ControlFlow(GraphCase):
    def step_graph(self) -> tuple[StepGraph, Tensor]:
        weight = nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.SGD([weight], 0.5, fused=True)

        def step(inputs: Tensor) -> tuple[Tensor, None]:
            loss = (weight * inputs.sum(0)).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach(), None

        return StepGraph(step, optimizer, torch.device("cpu"), strict=True), weight

    def test_by_hand(self) -> None:
        graph, weight = self.step_graph()
        losses = []
        for i in range(1, 7):
            loss, nothing = graph(torch.full((2, 3), float(i)))
            losses.append(loss)
            self.assertIsNone(nothing)
        # each step moves each weight by -0.5 · 2i; its loss was 3 · 2i · weight
        done = [-sum(range(i)) for i in range(1, 7)]
        self.assertEqual([float(loss) for loss in losses], [3 * 2 * i * w for i, w in enumerate(done, start=1)])
        self.assertEqual(weight.tolist(), [-21.0] * 3)
        self.assertEqual([made.replays for made in Graph.made], [3])
        self.assertIsNone(weight.grad)

    def test_streams_wait_for_each_other_around_each_step_without(self) -> None:
        graph, _ = self.step_graph()
        for _ in range(WARM_UP + 2):
            graph(torch.ones(2, 3))
        around = ["side waits for main", "on side", "main waits for side"]
        self.assertEqual(log, around * WARM_UP + ["on main", "capture on side"])

    def test_an_odd_shape_runs_without_and_a_new_usual_one_is_captured(self) -> None:
        graph, weight = self.step_graph()
        shapes = [2] * 5 + [1] + [2] * 2 + [1] * 5 + [2]
        for rows in shapes:
            graph(torch.ones(rows, 3))
        self.assertEqual(weight.tolist(), [-0.5 * sum(shapes)] * 3)
        self.assertEqual([made.replays for made in Graph.made], [2 + 2, 2])

    def test_a_gradient_left_by_others_is_not_captured(self) -> None:
        graph, weight = self.step_graph()
        for _ in range(WARM_UP):
            graph(torch.ones(2, 3))
        weight.grad = torch.ones(3)
        for _ in range(2):
            graph(torch.ones(2, 3))
        self.assertEqual(weight.tolist(), [-(WARM_UP + 2.0)] * 3)

    def test_what_holds_only_while_it_is_captured(self) -> None:
        weight = nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.AdamW([weight], 0.5, fused=True)
        (group,) = optimizer.param_groups
        seen = []
        look = lambda x: seen.append((group["capturable"], type(group["lr"]), gc.isenabled()))  # noqa: E731
        graph = StepGraph(look, optimizer, weight.device)
        for _ in range(WARM_UP + 3):
            graph(torch.ones(1))
            self.assertEqual((group["capturable"], group["lr"], gc.isenabled()), (False, 0.5, True))
        # nor is garbage collected while it is captured: a graph among it would end this one
        self.assertEqual(seen, [(False, Tensor, True)] * WARM_UP + [(True, Tensor, False)])

    def test_a_capture_that_fails_late_leaves_no_gradient(self) -> None:
        weight = nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.SGD([weight], 0.5, fused=True)
        read = []

        def step(inputs: Tensor) -> None:
            (weight * inputs).sum().backward()
            read.append(weight.grad.sum().item())  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

        graph = StepGraph(step, optimizer, weight.device)
        with self.assertWarnsRegex(UserWarning, f"the capture failed: {NOT_CAPTURED}; each step runs without"):
            for _ in range(WARM_UP + 3):
                graph(torch.ones(3))
        self.assertEqual((read, weight.tolist()), ([3.0] * (WARM_UP + 3), [-0.5 * (WARM_UP + 3)] * 3))
        self.assertEqual(streams[-1].name, "main")  # where torch leaves the capture's

    def test_weights_in_other_memory_are_captured_anew(self) -> None:
        """As after `model.to(…)` there and back: the graph would go on writing where nobody reads."""
        graph, weight = self.step_graph()
        for i in range(12):
            if i == 5:
                weight.data = weight.data.clone()
            graph(torch.ones(2, 3))
        self.assertEqual(weight.tolist(), [-12.0] * 3)
        self.assertEqual([made.replays for made in Graph.made], [2, 7 - WARM_UP])

    def test_it_goes_with_its_last_user_and_the_optimizer_forgets_it(self) -> None:
        """At once, not at a garbage collection: its memory is the device's."""
        weight = nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.SGD([weight], 0.5, fused=True)
        graph = StepGraph(lambda x: None, optimizer, weight.device)
        seen, hooks = weakref.ref(graph), optimizer._optimizer_load_state_dict_post_hooks
        self.assertEqual(len(hooks), 1)
        gc.disable()
        self.addCleanup(gc.enable)
        del graph
        self.assertIsNone(seen())
        self.assertEqual(len(hooks), 0)
        optimizer.load_state_dict(optimizer.state_dict())

    def test_what_is_changed_between_steps_counts(self) -> None:
        def change(trainer: Trainer) -> None:
            (group,) = trainer.optimizer.param_groups
            if trainer.step == 6:
                group["weight_decay"] = 0.5
            if trainer.step == 14:
                next(trainer.model.children()).requires_grad_(False)
            if trainer.step == 20:
                group["lr"] = 0.25

        runs = [self.trainer(graph, "sgd", on_step_end=(change,)) for graph in (False, "on")]
        self.assert_same_run(*(self.fit(trainer, 4) for trainer in reversed(runs)))
        self.assertEqual(len(Graph.made), 3)

    def test_nan_is_found_when_losses_are_read(self) -> None:
        loader = batches()
        loader[5][0][3] = torch.nan
        trainer = self.trainer(log_every=100)
        with self.assertRaisesRegex(NonFiniteLoss, "epoch 1, batch 6, after 8 steps"):
            self.fit(trainer, loader=loader)
        trainer = self.trainer(log_every=1)
        with self.assertRaisesRegex(NonFiniteLoss, "epoch 1, batch 6, after 6 steps"):
            self.fit(trainer, loader=loader)

    def test_no_step_reads_a_value(self) -> None:
        class Forbidden(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
                if func is torch.ops.aten._local_scalar_dense.default:
                    raise AssertionError("a value was read")
                return func(*args, **(kwargs or {}))

        schedule = lambda o: OneCycleLR(o, 0.02, 25, cycle_momentum=False)  # noqa: E731
        trainer = self.trainer(schedule=schedule, clip_norm=0.1, accumulate=2, log_every=100)
        with Forbidden():
            for window, samples in trainer._windows(iter(batches(16, last=0))):
                trainer._train_window(window, samples)
        self.assertEqual((trainer.step, Graph.made[0].replays), (8, 8 - WARM_UP))
        with Forbidden(), self.assertRaisesRegex(AssertionError, "was read"):
            float(torch.ones(()))


class Fallback(GraphCase):
    def lines(self, run: Callable[[], Any]) -> list[str]:
        """What a script would print."""
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()) as err:
            warnings.simplefilter("default")
            warnings.showwarning = print_warning
            run()
        return err.getvalue().splitlines()

    def assert_falls_back(self, words: str, **options: Any) -> None:
        found: list[Trainer] = []
        lines = self.lines(lambda: found.append(self.fit(self.trainer(True, **options), 2)))
        self.assertEqual(len(lines), 1, lines)
        self.assertRegex(lines[0], rf"\Awarning: no CUDA graph: .*{words}.*; each step runs without\Z")
        plain = self.trainer("off", **options)
        self.assert_same_run(found[0], self.fit(plain, 2))
        refused = rf"\Acuda_graph='on' is impossible here: .*{words}.*; use 'auto' or 'off'\Z"
        with self.assertRaisesRegex(ValueError, refused):
            self.trainer("on", **options)
        self.assertEqual(Graph.made, [])

    def test_each_reason(self) -> None:
        for words, options in (
            ("fp16 looks at", {"precision": "fp16"}),
            ("nan_policy='skip' looks at", {"nan_policy": "skip"}),
            ("RMSprop is neither fused nor capturable", {"optimizer": "rmsprop"}),
            (r"changes the momentum too \(cycle_momentum=False", {"schedule": lambda o: OneCycleLR(o, 0.02, 25)}),
        ):
            self.assert_falls_back(words, **options)

    def test_not_cuda(self) -> None:
        with mock.patch("torchbasics.cuda_graph.DEVICES", ("cuda",)):
            self.assert_falls_back("it needs CUDA, and the device is cpu")

    def test_reasons_that_need_more_than_a_trainer(self) -> None:
        model, criterion = network(), nn.Sequential(nn.CrossEntropyLoss())
        optimizer, cpu = make_optimizer("sgd", model.parameters()), torch.device("cpu")
        self.assertIsNone(graph_refusal(model, optimizer, cpu))
        self.assertIn("torch.compile has its own", str(graph_refusal(model, optimizer, cpu, compiled=True)))
        self.assertIn("several processes", str(graph_refusal(model, optimizer, cpu, parallel=True)))
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            self.assertIn("anomaly", str(graph_refusal(model, optimizer, cpu)))
        for register in (
            model[0].register_forward_hook,
            model[0].register_full_backward_pre_hook,
            model[0].weight.register_hook,
            model[0].weight.register_post_accumulate_grad_hook,
            criterion[0].register_forward_hook,
            optimizer.register_step_pre_hook,
            register_optimizer_step_post_hook,
            nn.modules.module.register_module_forward_hook,
            nn.modules.module.register_module_forward_pre_hook,
            nn.modules.module.register_module_full_backward_hook,
            nn.modules.module.register_module_full_backward_pre_hook,
        ):
            with self.subTest(register.__qualname__):
                handle = register(lambda *_: None)  # type: ignore[operator]
                self.addCleanup(handle.remove)
                self.assertIn("hooks", str(graph_refusal(model, optimizer, cpu, criterion=criterion)))
                handle.remove()
                self.assertIsNone(graph_refusal(model, optimizer, cpu, criterion=criterion))
        optimizer.param_groups[0] |= {"fused": None, "capturable": True}
        self.assertIsNone(graph_refusal(model, optimizer, cpu))

    def test_the_trainer_passes_what_it_knows(self) -> None:
        two = mock.patch("torchbasics.distributed.world_size", lambda: 2)
        with two, self.assertRaisesRegex(ValueError, "several processes"):
            self.trainer("on")
        with mock.patch.object(nn.Module, "compile"), self.assertRaisesRegex(ValueError, "torch.compile"):
            self.trainer("on", compile=True)
        criterion = nn.CrossEntropyLoss()
        criterion.register_forward_hook(lambda *_: None)
        with self.assertRaisesRegex(ValueError, "hooks on the model"):
            self.trainer("on", criterion=criterion)
        with self.assertRaisesRegex(ValueError, "cuda_graph must be one of 'auto', 'on', 'off', got 'yes'"):
            self.trainer("yes")

    def test_a_hook_is_called_from_the_next_epoch_on(self) -> None:
        calls = []
        trainer = self.trainer("auto")

        def watch(trainer: Trainer) -> None:
            if trainer.epoch == 1:
                next(trainer.model.children()).register_forward_pre_hook(lambda *_: calls.append(trainer.epoch))

        trainer.on_epoch_end = (watch,)
        lines = self.lines(lambda: self.fit(trainer, 3))
        self.assertEqual(len(lines), 1)
        self.assertEqual([calls.count(epoch) for epoch in range(3)], [0, 8 + 3, 8 + 3])  # validation has three

    def test_a_hook_that_comes_before_the_capture(self) -> None:
        """GradientMonitor attaches itself to the optimizer after the first step."""
        runs = []
        for graph in ("off", "auto"):
            trainer = self.trainer(graph)
            trainer.optimizer.param_groups[0]["lr"] = 2**-6  # which float32 has exactly
            trainer.on_step_end = (GradientMonitor(trainer.model, every=2, verbose=False),)
            lines = self.lines(lambda trainer=trainer: self.fit(trainer, 2))
            runs.append(trainer)
        self.assert_same_run(runs[1], runs[0])
        reason = "hooks on the model, its parameters, the loss or the optimizer run in each step"
        self.assertEqual(lines, [f"warning: no CUDA graph: {reason}; each step runs without"])
        self.assertEqual(Graph.made, [])
        trainer = self.trainer("on")
        trainer.on_step_end = (GradientMonitor(trainer.model, every=2, verbose=False),)
        with self.assertRaisesRegex(ValueError, f"impossible here: {reason}"):
            self.fit(trainer, 1)

    def test_a_step_that_cannot_be_captured(self) -> None:
        class Reading(nn.CrossEntropyLoss):
            def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
                return super().forward(outputs, targets) / max(outputs.detach().abs().max().item(), 1.0)

        plain = self.fit(self.trainer(False, criterion=Reading()))
        trainer = self.trainer("auto", criterion=Reading())
        lines = self.lines(lambda: self.fit(trainer))
        self.assertEqual(lines, [f"warning: no CUDA graph: the capture failed: {NOT_CAPTURED}; each step runs without"])
        self.assert_same_run(trainer, plain)
        self.assertEqual([graph.replays for graph in Graph.made], [0])
        with self.assertRaisesRegex(ValueError, f"'on': the step cannot be captured: {NOT_CAPTURED}; use 'auto'"):
            self.fit(self.trainer("on", criterion=Reading()))

    def test_off_touches_nothing_of_cuda(self) -> None:
        with mock.patch("torchbasics.trainer.StepGraph", side_effect=AssertionError):
            self.assertEqual(self.lines(lambda: self.fit(self.trainer("off"), 1)), [])
            with self.assertRaises(AssertionError):
                self.trainer("on")


class Capturable(unittest.TestCase):
    def test_state_lies_on_the_device_where_it_must(self) -> None:
        class Elsewhere(nn.Parameter):
            device = torch.device("cuda")

        there, here = (kind(torch.ones(2)) for kind in (Elsewhere, nn.Parameter))
        for name, capturable in (("rmsprop", True), ("adagrad", None), ("sgd", None)):
            defaults = make_optimizer(name, [here], capturable=True).defaults
            self.assertFalse(defaults.get("capturable"), name)  # which would be an error on the CPU
            with mock.patch("torchbasics.optim._can_fuse", lambda *_: False):
                defaults = make_optimizer(name, [there], capturable=True).defaults
            self.assertEqual(defaults.get("capturable"), capturable, name)
        self.assertFalse(make_optimizer("rmsprop", [there]).defaults["capturable"])

    def test_trees_are_copied_in_the_same_order(self) -> None:
        found: list[Tensor] = []
        x, y = torch.ones(1), torch.zeros(2)
        tree_map(lambda tensor: found.append(tensor) or tensor, ([({"a": x}, y)], 3))  # type: ignore[func-returns-value]
        self.assertEqual([id(tensor) for tensor in found], [id(x), id(y)])


class CommandLine(unittest.TestCase):
    def run_on_cpu(self, name: str, choice: str) -> tuple[int, list[str]]:
        """Exit code and lines on stderr; training itself is left out."""
        digits = (torch.zeros(300, 1, 28, 28, dtype=torch.uint8), torch.arange(300) % 10)
        argv = f"--dataset digits --val-size 50 --model simplenet --device cpu --cuda-graph {choice} --output".split()
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch("torchbasics.digits.draw_digits", lambda *_, **__: digits),
            mock.patch.object(Trainer, "fit", side_effect=RuntimeError("trained")),
            contextlib.redirect_stderr(io.StringIO()) as err,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            code = load_script(name).main([*argv, f"{folder}/run"])
            self.assertEqual((Path(folder) / "run").exists(), choice != "on")
        return code, err.getvalue().splitlines()

    def test_both_scripts_pass_it_on(self) -> None:
        reason = "it needs CUDA, and the device is cpu"
        for name in ("train_mnist", "train_ddp"):
            refused = f"error: cuda_graph='on' is impossible here: {reason}; use 'auto' or 'off'"
            self.assertEqual(self.run_on_cpu(name, "on"), (2, [refused]))
            code, (warned, trained) = self.run_on_cpu(name, "auto")
            self.assertEqual((code, warned), (1, f"warning: no CUDA graph: {reason}; each step runs without"))
            self.assertIn("trained", trained)
            self.assertEqual(len(self.run_on_cpu(name, "off")[1]), 1)


if __name__ == "__main__":
    unittest.main()
