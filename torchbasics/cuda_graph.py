"""One optimizer step as a CUDA graph: captured once, then replayed by a single launch while all shapes stay the same.

What Python decides within the step (a branch, a random number of `random`) is decided at the capture, once for all.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchbasics.evaluation import tree_map
from torchbasics.optim import has_step_hooks

DEVICES = ("cuda",)
GRAPH_MODES = ("auto", "on", "off")
# Windows before a capture: by then the optimizer has its state, and cuDNN and cuBLAS their choices and workspaces.
WARM_UP = 3
MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
COMMON_HOOKS = tuple(f"_global{name}" for name in MODULE_HOOKS)  # of all modules there are


def graph_refusal(
    model: nn.Module,
    optimizer: Optimizer,
    device: torch.device,
    *,
    criterion: Any = None,
    precision: str = "fp32",
    nan_policy: str = "stop",
    scheduler: Any = None,
    compiled: bool = False,
    parallel: bool = False,
) -> str | None:
    """Why a step cannot be captured, in a few words; None if nothing that is known beforehand forbids it."""
    reasons = {
        f"it needs CUDA, and the device is {device.type}": device.type not in DEVICES,
        "several processes or a wrapped model exchange gradients within the step": parallel,
        "fp16 looks at each step's gradients to scale the loss (bf16 does not)": precision == "fp16",
        "nan_policy='skip' looks at each step's loss": nan_policy == "skip",
        "torch.compile has its own (mode 'reduce-overhead')": compiled,
        "anomaly detection looks at each gradient": torch.is_anomaly_enabled(),
        "the schedule changes the momentum too (cycle_momentum=False does not)": bool(
            getattr(scheduler, "cycle_momentum", False)
        ),
        f"{type(optimizer).__name__} is neither fused nor capturable": not all(
            group.get("fused") or group.get("capturable") for group in optimizer.param_groups
        ),
        "hooks on the model, its parameters, the loss or the optimizer run in each step": _has_hooks(
            [model, *([criterion] if isinstance(criterion, nn.Module) else [])], optimizer
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _has_hooks(roots: Sequence[nn.Module], optimizer: Optimizer) -> bool:
    owners = [
        (nn.modules.module, COMMON_HOOKS),
        *((module, MODULE_HOOKS) for root in roots for module in root.modules()),
        *((parameter, PARAMETER_HOOKS) for root in roots for parameter in root.parameters()),
    ]
    return has_step_hooks(optimizer) or any(getattr(owner, name, None) for owner, names in owners for name in names)


def signature(value: Any) -> Any:
    """What a captured step depends on: shape, strides and dtype of the tensors in `value`, and all else as it is."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, dict):
        return {key: signature(item) for key, item in value.items()}
    return [signature(item) for item in value] if isinstance(value, (list, tuple)) else value


class StepGraph:
    """Does `step(*arguments)`, the tensor work of one optimizer step; returns its tensors, as copies where replayed.

    The first WARM_UP steps of the same shapes in a row run as without a graph, and count as any others. Then the step
    is captured on inputs of its own; from there on inputs are copied in and the graph is replayed. A step of other
    shapes (a short last batch) runs as without; so does one after hyperparameters other than the rate were changed or
    weights moved, until WARM_UP of its kind have come in a row: then these are captured instead.

    What Trainer does around this stays as it is, and waits for nothing: the loader's work (augmentation), the schedule,
    the averages.

    The rate is a float32 tensor on the device within the step, replayed or not, and the schedule's number outside: so
    results differ from those without a graph by the rate's last bits, if its number has more than 24 of them.

    Args:
        step: free of transfers to the host; arguments and results are tensors, and lists, tuples and dicts of them.
        strict: whether a capture that fails is a ValueError; otherwise a warning, and all goes on without.
        refusal: asked before each capture; what it returns, unless None, forbids that one.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        optimizer: Optimizer,
        device: torch.device,
        strict: bool = False,
        refusal: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.step, self.optimizer, self.device, self.strict, self.refusal = step, optimizer, device, strict, refusal
        self.failed = False
        self._stream = torch.cuda.Stream(device)
        self._rates: list[Tensor] = []  # of each group of parameters, on the device
        self._filled: list[Any] = []  # what they hold
        self._recent: tuple[Any, int] = (None, 0)  # kind of the last step, and how many of it in a row
        self.forget()
        # which puts other tensors in the place of those that a graph has learnt to update; the hook keeps none alive
        own = weakref.ref(self)
        hook = optimizer.register_load_state_dict_post_hook(lambda _: own().forget())  # type: ignore[union-attr]
        weakref.finalize(self, hook.remove)

    def forget(self) -> None:
        """Drops the graph and its memory; the next steps warm up for another."""
        self._graph: Any = None
        self._kind: Any = None
        self._inputs: list[Tensor] = []
        self._outputs: Any = None
        self._recent = (None, 0)

    def __call__(self, *arguments: Any) -> Any:
        self._fill_rates()
        kind = self._kind_of(arguments)
        if kind != self._kind and not self._capture(arguments, kind):
            return self._without(arguments)
        self._recent = (None, 0)
        for own, given in zip(self._inputs, _tensors(arguments), strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return tree_map(torch.clone, self._outputs)  # the next replay overwrites them

    def _kind_of(self, arguments: tuple) -> Any:
        """What must stay the same for a replay: shapes, hyperparameters but the rate, what is frozen, where it lies."""
        groups = self.optimizer.param_groups
        fixed = [{k: signature(v) for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        weights = [(p.requires_grad, p.data_ptr()) for group in groups for p in group["params"]]
        return signature(arguments), fixed, weights

    def _without(self, arguments: tuple) -> Any:
        """A step without graph, on the capture's stream: what torch keeps per stream is then there.

        It finds and leaves the gradients None, as the capture did; a replay writes its own, in the graph's memory, so
        neither sees the other's.
        """
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream), self._rates_on_device():
            outputs = self.step(*arguments)
        here.wait_stream(self._stream)
        return outputs

    def _capture(self, arguments: tuple, kind: Any) -> bool:
        """Records the step without doing it; False if it is too early for that, or cannot be."""
        before, count = self._recent
        self._recent = (kind, count + 1 if kind == before else 1)
        if self.failed or self._recent[1] <= WARM_UP or self.refusal():
            return False
        self.forget()
        self.optimizer.zero_grad(set_to_none=True)  # a gradient that was there would be added to by each replay
        graph, random_state = torch.cuda.CUDAGraph(), torch.cuda.get_rng_state(self.device)
        try:
            inputs = tree_map(torch.clone, arguments)
            # thread_local: a loader's thread that pins memory meanwhile does no harm
            with (
                _no_garbage_collection(),
                self._rates_on_device(capturable=True),
                torch.cuda.stream(torch.cuda.current_stream(self.device)),  # a capture that fails leaves another
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                outputs = self.step(*inputs)
        except (RuntimeError, TypeError) as error:  # TypeError: what cannot be copied, such as a PackedSequence
            self._give_up(error, random_state)
            return False
        self._graph, self._kind, self._inputs, self._outputs = graph, kind, _tensors(inputs), outputs
        return True

    def _give_up(self, error: BaseException, random_state: Tensor) -> None:
        """Nothing was computed; what the capture left behind is put right."""
        self.failed = True
        self.optimizer.zero_grad(set_to_none=True)
        # The device's generator still takes itself for captured, and would refuse to draw: it gets another inside.
        index = self.device.index if self.device.index is not None else torch.cuda.current_device()
        fresh = torch.Generator(self.device)
        fresh.set_state(random_state)
        torch.cuda.default_generators[index].graphsafe_set_state(fresh)
        while error.__context__ is not None:  # the first cause; the end of a broken capture raises too
            error = error.__context__
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if self.strict:
            raise ValueError(f"cuda_graph='on': the step cannot be captured: {reason}; use 'auto' or 'off'") from error
        warnings.warn(f"no CUDA graph: the capture failed: {reason}; each step runs without", stacklevel=2)

    def _fill_rates(self) -> None:
        """The rates of now onto the device, without waiting for it."""
        for i, group in enumerate(self.optimizer.param_groups):
            if i == len(self._rates):
                self._rates.append(torch.zeros((), device=self.device))
                self._filled.append(None)
            rate = group["lr"]
            if isinstance(rate, Tensor):
                self._rates[i].copy_(rate.squeeze(), non_blocking=True)
            elif rate != self._filled[i]:
                self._rates[i].fill_(rate)
            self._filled[i] = rate

    @contextlib.contextmanager
    def _rates_on_device(self, capturable: bool = False) -> Iterator[None]:
        """Inside, the optimizer reads its rates on the device, where a replay finds them; schedules see numbers.

        With `capturable` it is told that it is captured; a fused one computes the same either way.
        """
        groups = self.optimizer.param_groups
        before: list[dict[str, Any]] = [{n: group[n] for n in ("lr", "capturable") if n in group} for group in groups]
        # else one made with capturable=True warns of a step without capture
        self.optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
        for group, rate in zip(groups, self._rates, strict=False):
            group["lr"] = rate
            if capturable and "capturable" in group:
                group["capturable"] = True
        try:
            yield
        finally:
            for group, values in zip(groups, before, strict=True):
                group.update(values)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Another graph that is collected, and so destroyed, during a capture would break it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in `value`, in their order."""
    found: list[Tensor] = []
    tree_map(lambda tensor: found.append(tensor) or tensor, value)  # type: ignore[func-returns-value]
    return found
