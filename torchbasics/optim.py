"""What torch.optim lacks: warm-up schedules, averages that start well, and groups that know what not to decay."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn


def warmup_lr_scheduler(optimizer: Optimizer, warmup_iters: int, warmup_factor: float) -> LRScheduler:
    """Return a schedule that raises the rate linearly, from `warmup_factor` times to once, in `warmup_iters` steps.

    It is torch's LinearLR, marked by `scheduler_interval = "step"` as one that Trainer steps after each optimizer step.
    """
    if warmup_iters < 1:
        raise ValueError(f"need warmup_iters >= 1, got {warmup_iters}")  # LinearLR would never leave the low rate
    return _per_step(LinearLR(optimizer, start_factor=warmup_factor, total_iters=warmup_iters))


def warmup_cosine_scheduler(optimizer: Optimizer, warmup_iters: int, total_iters: int) -> LRScheduler:
    """Return a schedule with a linear warm-up from a hundredth of the rate, then half a cosine down to 0.

    After t of the T steps that follow the warm-up the rate is (1 + cos(πt/T)) / 2 times the optimizer's own (SGDR,
    arXiv:1608.03983, without restarts). It carries `scheduler_interval = "step"` too.
    """
    if not 0 <= warmup_iters <= total_iters:
        raise ValueError(f"need 0 <= warmup_iters <= total_iters, got {warmup_iters} and {total_iters}")

    def factor(step: int) -> float:
        if step < warmup_iters:
            return 0.01 + 0.99 * step / warmup_iters
        done = min((step - warmup_iters) / max(total_iters - warmup_iters, 1), 1.0)
        return (1 + math.cos(math.pi * done)) / 2

    return _per_step(LambdaLR(optimizer, factor))


def _per_step(schedule: LRScheduler) -> LRScheduler:
    schedule.scheduler_interval = "step"  # type: ignore[attr-defined]
    return schedule


def param_groups(
    model: nn.Module, weight_decay: float, head: nn.Module | None = None, head_lr: float | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer: biases and parameters of norm layers are not decayed.

    These are recognised by their single dimension. Parameters of `head`, a module of `model`, get the rate `head_lr`;
    all others get the optimizer's own. Frozen parameters are left out. Raise ValueError if nothing is left.

    >>> torch.optim.AdamW(param_groups(model, 0.01, head=model.fc, head_lr=1e-2), lr=1e-3)  # doctest: +SKIP
    """
    if (head is None) != (head_lr is None):
        raise ValueError("head and head_lr go together; give both or neither")
    in_head = {id(p) for p in head.parameters()} if head is not None else set()
    if not in_head <= {id(p) for p in model.parameters()}:
        raise ValueError("head holds parameters that the model does not; give a module of the model")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter requires a gradient; unfreeze at least one layer")
    groups = []
    for of_head, rate in ((False, {}), (True, {"lr": head_lr})):
        for decayed in (True, False):
            params = [p for p in trainable if (id(p) in in_head) == of_head and (p.dim() > 1) == decayed]
            if params:
                groups.append({"params": params, "weight_decay": weight_decay if decayed else 0.0, **rate})
    return groups


def averaged_copy(model: nn.Module, decay: float) -> AveragedCopy:
    """Return a copy of `model` that holds an exponential moving average of its weights and buffers.

    Call `update_parameters(model)` after each optimizer step. The decay of the t-th update is min(decay, 1 - 2/(t+1)):
    the first copies, and later weights count more, so that the random start is soon forgotten. With 0.999 throughout it
    would still be two thirds of the average after 400 updates. (Until `decay` is reached this is the polynomial-decay
    averaging of Shamir and Zhang, arXiv:1212.1824, with η = 1.)
    """
    if not 0 < decay < 1:
        raise ValueError(f"the decay of averaged weights must lie between 0 and 1, got {decay}")
    return AveragedCopy(model, decay)


class AveragedCopy(nn.Module):
    """Averages of a model, with the interface of torch's AveragedModel, whose own update knows no rising decay.

    `module` is the averaged model; call it, or this, to predict. Buffers are averaged too, so that BatchNorm's
    statistics belong to the weights beside them. They are matched by name: one that appears or changes its shape is
    taken over as it is. Integers are copied, and so are elements whose average is not finite, as in a mask of -inf.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module: nn.Module = copy.deepcopy(getattr(model, "_orig_mod", model))  # without torch.compile's wrapper
        self.decay = decay
        self.updates = 0  # a number of the host, since reading it from an accelerator would wait for the step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the averages towards `model`, the bare one: without DDP or another wrapper around it."""
        self.updates += 1
        buffers = self._matched_buffers(model)
        averages, values = [], []
        for own, new in [*zip(self.module.parameters(), model.parameters(), strict=True), *buffers]:
            if self.updates > 1 and (own.is_floating_point() or own.is_complex()):
                averages.append(own)
                values.append(new.to(own))
            else:
                own.copy_(new)
        if averages:
            decay = min(self.decay, 1 - 2 / (self.updates + 1))
            get_ema_multi_avg_fn(decay)(averages, values, self.updates)
        for own, new in buffers:
            if own.is_floating_point():
                own.copy_(torch.where(own.isfinite(), own, new.to(own)))

    def _matched_buffers(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return (own buffer, `model`'s) by name, after taking over those that are new here or have another shape."""
        own_buffers = dict(self.module.named_buffers())
        pairs = []
        for name, new in model.named_buffers():
            own = own_buffers.get(name)
            if own is None or own.shape != new.shape:
                parent, _, leaf = name.rpartition(".")
                own = new.clone()
                self.module.get_submodule(parent).register_buffer(leaf, own, persistent=name in model.state_dict())
            pairs.append((own, new))
        return pairs

    def get_extra_state(self) -> int:
        """Return the number of updates, for `state_dict`."""
        return self.updates

    def set_extra_state(self, state: int) -> None:
        """Restore the number of updates, for `load_state_dict`."""
        self.updates = state
