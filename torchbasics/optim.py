"""Optimizers and learning-rate schedules by name: torch's own, with chosen arguments; and a step without overhead."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
SCHEDULES = ("constant", "step", "cosine", "onecycle", "plateau")
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
CAPTURABLE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)
TORCHS = sys.modules[Optimizer.__module__]  # where torch keeps the hooks of all optimizers
# The code of what torch puts around each optimizer's step; somebody else's wrapper may copy all of that but its code.
NOTING = Optimizer.profile_hook_step(lambda _: None).__code__ if hasattr(Optimizer, "profile_hook_step") else object()


def make_optimizer(
    name: str,
    params: Iterable[torch.nn.Parameter],
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    *,
    capturable: bool = False,
) -> Optimizer:
    """Returns torch's optimizer `name` over those of `params` that require gradients.

    The fused implementation is used on the CPU and CUDA; it takes no sparse gradients (for `Embedding(sparse=True)`
    make torch's own SGD or Adagrad). `momentum` is for `sgd` (with Nesterov's
    correction if it is not 0) and `rmsprop`. `capturable` lets a CUDA graph hold its step: all its state lies on the
    device. That of the fused ones does anyway, `adagrad` cannot be captured, and on other devices it changes nothing.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")
    for what, value in (("lr", lr), ("weight_decay", weight_decay), ("momentum", momentum)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{what} must be finite and not negative, got {value}")
    params = list(params)
    for given in params:
        if not isinstance(given, torch.Tensor):
            raise TypeError(f"expected parameters, got a {type(given).__name__}; for groups or names use torch.optim")
    trainable = [p for p in params if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter requires a gradient; unfreeze at least one layer")
    kind = OPTIMIZERS[name]
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if name in ("sgd", "rmsprop"):
        options["momentum"] = momentum
    if name == "sgd" and momentum:
        options["nesterov"] = True
    if kind in FUSED and _can_fuse(kind, trainable):
        options["fused"] = True
    elif capturable and kind in CAPTURABLE and all(p.device.type == "cuda" for p in trainable):
        options["capturable"] = True
    return kind(trainable, **options)


def _can_fuse(optimizer: Callable[..., Optimizer], params: list[torch.nn.Parameter]) -> bool:
    kinds = {p.device.type if p.is_floating_point() else "complex" for p in params}
    return kinds == {"cpu"} or (kinds == {"cuda"} and optimizer is not torch.optim.Adagrad)  # fused Adagrad: CPU only


def make_schedule(
    name: str, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0
) -> LRScheduler | ReduceLROnPlateau | None:
    """Returns a schedule of the rate over `total_steps` optimizer steps, starting from the optimizer's own rate.

    `constant`; `step`: × 0.1 after each third; `cosine`: down to 0; `onecycle`: up to the rate in the first 30% and
    down to nearly 0 (Smith and Topin, arXiv:1708.07120; torch's OneCycleLR); `plateau`: × 0.1 at the
    fourth epoch in a row without a lower validation loss, to be stepped once per epoch with that loss; all others once
    per optimizer step, which `Trainer` does of itself. `warmup_steps` raises the rate linearly from a hundredth first
    (for `onecycle`: the length of its rise).
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"need total_steps >= 1 and 0 <= warmup_steps <= total_steps, got {total_steps} and {warmup_steps}"
        )
    if name == "plateau":
        if warmup_steps:
            raise ValueError("schedule 'plateau' has no warm-up; choose another schedule or warmup_steps=0")
        return ReduceLROnPlateau(optimizer, patience=3, threshold=0)
    if name == "onecycle":
        return _onecycle(optimizer, total_steps, warmup_steps)
    if name == "cosine":
        return warmup_cosine_scheduler(optimizer, warmup_steps, total_steps)
    if name == "constant":
        return warmup_lr_scheduler(optimizer, warmup_steps, 0.01) if warmup_steps else None

    def factor(step: int) -> float:
        return _rise(step, warmup_steps) * 0.1 ** min(3 * step // total_steps, 2)

    return _by_step(LambdaLR(optimizer, factor))


def _by_step(schedule: LRScheduler) -> LRScheduler:
    """`schedule`, marked for Trainer as one that is stepped after each optimizer step."""
    schedule.scheduler_interval = "step"  # type: ignore[attr-defined]
    return schedule


def _onecycle(optimizer: Optimizer, total_steps: int, warmup_steps: int) -> OneCycleLR:
    rates = [group["lr"] for group in optimizer.param_groups]
    # cycle_momentum off: the gain is small, and it would overwrite Adam's betas.
    # One step more than will be taken: torch's counts the first rate as a step and raises after the last.
    share = (warmup_steps + 1) / (total_steps + 1) if warmup_steps else 0.3
    return OneCycleLR(optimizer, rates, total_steps + 1, pct_start=min(share, 0.99), cycle_momentum=False)


def warmup_lr_scheduler(optimizer: Optimizer, warmup_iters: int, warmup_factor: float) -> LRScheduler:
    """The rate grows linearly from `warmup_factor` times its value to its value in `warmup_iters` steps (LinearLR)."""
    if warmup_iters < 1 or not 0 < warmup_factor <= 1:
        raise ValueError(f"need warmup_iters >= 1 and 0 < warmup_factor <= 1, got {warmup_iters} and {warmup_factor}")
    return _by_step(LinearLR(optimizer, start_factor=warmup_factor, total_iters=warmup_iters))


def warmup_cosine_scheduler(
    optimizer: Optimizer, warmup_iters: int, total_iters: int, min_factor: float = 0.0
) -> LRScheduler:
    """Linear warm-up from a hundredth of the rate, then half a cosine down to `min_factor` times the rate.

    With t of T steps done since the warm-up: min + (1 - min) · (1 + cos(πt/T)) / 2 (SGDR, arXiv:1608.03983).
    """
    if not 0 <= warmup_iters <= total_iters or total_iters < 1 or not 0 <= min_factor <= 1:
        raise ValueError(
            "need 0 <= warmup_iters <= total_iters, total_iters >= 1 and 0 <= min_factor <= 1, "
            f"got {warmup_iters}, {total_iters} and {min_factor}"
        )

    def factor(step: int) -> float:
        if step < warmup_iters:
            return _rise(step, warmup_iters)
        done = min((step - warmup_iters) / max(total_iters - warmup_iters, 1), 1.0)
        return min_factor + (1 - min_factor) * (1 + math.cos(math.pi * done)) / 2

    return _by_step(LambdaLR(optimizer, factor))


def _rise(step: int, warmup_steps: int, start: float = 0.01) -> float:
    return start + (1 - start) * step / warmup_steps if step < warmup_steps else 1.0


def averaged_copy(model: torch.nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` to hold the exponential moving average of its weights and buffers (torch's AveragedModel).

    The decay of the t-th update is min(decay, 1 - 2 / (t + 1)): the first copies, and until `decay` is reached (0.999
    after 1,999 updates) later weights count in proportion to their number, so that the random start is soon forgotten;
    with 0.999 throughout it would still be two thirds of the average after 400. (The rise is the polynomial-decay
    averaging of Shamir and Zhang, arXiv:1212.1824, with η = 1.)

    Buffers are averaged too, so that BatchNorm's statistics belong to the weights beside them; but for those of whole
    numbers and those that hold an infinity now, as a mask does: they are `model`'s.
    """
    if not 0 < decay < 1:
        raise ValueError(f"the decay of averaged weights must lie between 0 and 1, got {decay}")
    return _Averages(model, decay)


class _Averages(AveragedModel):
    """torch's, but for the update: its own knows no rise of the decay, rounds indices, makes -inf NaN, and copies its
    count to the device, which makes the host wait for it."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay
        self._copied = [False for _ in model.parameters()] + [
            not b.is_floating_point() or (not b.is_meta and not bool(b.isfinite().all())) for b in model.buffers()
        ]

    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        self.n_averaged += 1
        number = int(self.n_averaged)
        averages, values = [], []
        pairs = zip(_parameters_and_buffers(self.module), _parameters_and_buffers(model), self._copied, strict=True)
        for own, new, copied in pairs:
            if copied or number == 1:
                own.copy_(new)
            else:
                averages.append(own)
                values.append(new.to(own.device))
        if averages:
            get_ema_multi_avg_fn(min(self.decay, 1 - 2 / (number + 1)))(averages, values, None)


def _parameters_and_buffers(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


# ------------------------------------------------------------------------------- a step without its note to profilers


def take_step(optimizer: Optimizer) -> None:
    """`optimizer.step()` without its note to profilers, 6% of a small step, where no profiler runs and no hook waits.

    A `step` that was put on the object or into its class is called as it is, but for that of a schedule, which only
    notes the call. (An ExecutionTraceObserver alone is not taken for a profiler: its trace lacks the note.)
    """
    noted, own = getattr(type(optimizer), "step", None), getattr(optimizer, "__dict__", {}).get("step")
    of_schedule = getattr(own, "_wrapped_by_lr_sched", False) and getattr(own, "__wrapped__", None) is noted
    torchs = getattr(noted, "__code__", None) is NOTING
    watched = torch.autograd._profiler_enabled() or has_step_hooks(optimizer)
    if (own is None or of_schedule) and torchs and not watched:
        noted.__wrapped__(optimizer)  # type: ignore[union-attr]
        if of_schedule:
            optimizer._opt_called = True  # type: ignore[attr-defined]
    else:
        optimizer.step()


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether something is to be called around its step: hooks of its own, or of all optimizers."""
    return bool(
        getattr(optimizer, "_optimizer_step_pre_hooks", True)
        or getattr(optimizer, "_optimizer_step_post_hooks", True)
        or getattr(TORCHS, "_global_optimizer_pre_hooks", True)
        or getattr(TORCHS, "_global_optimizer_post_hooks", True)
    )


def clear_gradients(optimizer: Optimizer) -> None:
    """`optimizer.zero_grad()` without its note to profilers, 2% of a small step; an optimizer's own one is called."""
    if getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad:
        optimizer.zero_grad(set_to_none=True)
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
