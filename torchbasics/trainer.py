"""Trainer: the loop of train, validate, save and stop, that can be interrupted anywhere and goes on exactly there.

The way of one batch is `Trainer._train_epoch` → `_train_window` → `_gradient` → `_optimizer_step` → `_follow_step`.
Under several processes each has its part of every batch, perhaps an empty one; all take the same steps and decisions.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from torchbasics import distributed, parallel
from torchbasics.checkpoint import FORMAT, CheckpointError, CheckpointFolder, bare_model, bare_name
from torchbasics.cuda_graph import GRAPH_MODES, StepGraph, graph_refusal
from torchbasics.device import branched_random_state, pick_precision, random_state, set_random_state
from torchbasics.evaluation import (
    BatchResult,
    RunningMeans,
    evaluate,
    forward,
    model_device,
    outputs_of,
    to_device,
    with_empty_batches,
    without_samples,
)
from torchbasics.interrupts import Interrupted, SignalNote
from torchbasics.nonfinite import find_nonfinite
from torchbasics.optim import clear_gradients, take_step
from torchbasics.position import LoaderPosition, go_to, preserved_generators

MONITORS = ("train_loss", "train_acc", "val_loss", "val_acc")
NAN_POLICIES = ("stop", "skip", "ignore")
# What a DataLoader raises when a worker has ended: torch's own error, or that of reading from nobody.
WORKER_ENDED = (RuntimeError, EOFError, OSError)
# What `resume` needs beside the keys of every checkpoint.
SAVED: dict[str, type] = dict.fromkeys(("step", "batch", "first_epoch", "skipped"), int) | dict.fromkeys(
    ("history", "running", "random_state", "position"), dict
)


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; says where."""


class Trainer:
    """Trains `model` with `optimizer` to lower `criterion(outputs, targets)`, a mean over the samples of a batch.

    A loader is any iterable of `(inputs, targets)`; inputs may be a tensor, or a tuple, list or dict of them. A loss
    whose mean is not over samples (class weights, ignored targets) is averaged over batches by their samples all the
    same: micro-batches and processes then change it a little. Accuracy is that of the targets which `criterion` does
    not ignore (its `ignore_index`).

    `model` may be wrapped for several processes (`parallel.replicate`, `parallel.shard`). On the CPU,
    `cache_cpu_memory()` beforehand makes the steps of a convolutional network about a quarter shorter.

    Args:
        device: where to train; the model's own device by default.
        scheduler: stepped per epoch, or per optimizer step with `scheduler_interval="step"` (the default for
            OneCycleLR, CyclicLR and what `make_schedule` makes); ReduceLROnPlateau gets the monitored value.
        precision: `fp32`, `bf16`, `fp16` (with loss scaling) or `auto`.
        channels_last: keep images and convolution weights as (N, H, W, C) in memory.
        compile: True or one of torch.compile's modes.
        cuda_graph: replay all tensor work of a step as one CUDA graph while shapes stay the same: `auto` (or True)
            warns where that cannot be and goes on without, `on` raises ValueError. See `cuda_graph.StepGraph`.
        accumulate: number of batches whose gradient makes one step, as if they were one batch.
        clip_norm, clip_value: bounds of the gradient's total norm and of its entries.
        averages: an AveragedModel (`optim.averaged_copy`), updated after each step; it is validated and kept as best.
        nan_policy: what a NaN or infinite loss does: `stop` (raises NonFiniteLoss; on an accelerator up to `log_every`
            steps late, but before anything is saved), `skip` the step (waits for the device at each step), or `ignore`.
        early_stopping: an EarlyStopping, called with the monitored value after each epoch.
        monitor: `val_loss` (default), `val_acc`, `train_loss` or `train_acc`: decides best epoch, plateau and stop.
        checkpoint_dir: where to save: the state after each epoch, or every `save_every` steps, of which the last `keep`
            stay; and `best.pt`. With it SIGINT and SIGTERM save at the next step, then raise Interrupted.
        log_every: number of batches whose losses wait on the device to be read in one transfer.
        metadata: plain values stored in every checkpoint; a checkpoint with others is refused by `resume`.
        on_step_end, on_epoch_end: functions called with this Trainer.

    Attributes: `history` (a list per name, an entry per epoch), `epoch` (epochs done), `step` (optimizer steps done),
    `batch` (batches done in this epoch), `skipped` (steps not taken), `best_score`, `best_epoch`, `grad_norm`.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Tensor], Tensor],
        optimizer: Optimizer,
        device: torch.device | str | None = None,
        scheduler: LRScheduler | ReduceLROnPlateau | None = None,
        *,
        scheduler_interval: str | None = None,
        precision: str = "fp32",
        channels_last: bool = False,
        compile: bool | str = False,
        cuda_graph: bool | str = False,
        accumulate: int = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        averages: AveragedModel | None = None,
        nan_policy: str = "stop",
        early_stopping: Any = None,
        monitor: str = "val_loss",
        checkpoint_dir: str | os.PathLike | None = None,
        save_every: int | None = None,
        keep: int = 3,
        metadata: dict[str, Any] | None = None,
        log_every: int = 50,
        on_step_end: Sequence[Callable[[Trainer], None]] = (),
        on_epoch_end: Sequence[Callable[[Trainer], None]] = (),
    ) -> None:
        _check_options(
            criterion, scheduler_interval, accumulate, clip_norm, clip_value, nan_policy, monitor, save_every, log_every
        )
        self.cuda_graph = cuda_graph if isinstance(cuda_graph, str) else "auto" if cuda_graph else "off"
        if self.cuda_graph not in GRAPH_MODES:
            raise ValueError(f"cuda_graph must be one of {', '.join(map(repr, GRAPH_MODES))}, got {cuda_graph!r}")
        if save_every and checkpoint_dir is None:
            raise ValueError(f"save_every={save_every} needs a checkpoint_dir to save in")
        _check_directions(scheduler, scheduler_interval, early_stopping, monitor)
        if averages is not None and parallel.is_sharded(model):
            raise ValueError("averages need the whole weights, and the model is sharded; use DDP, or no averages")
        self.device = torch.device(device) if device is not None else model_device(model)
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.model = model.to(self.device).to(memory_format=self.memory_format)
        self.averages = averages
        if averages is not None:
            count = averages.n_averaged.cpu()
            averages.to(self.device).to(memory_format=self.memory_format)
            averages.n_averaged = count  # each update reads its value
        if compile:
            bare_model(self.model).compile(mode=compile if isinstance(compile, str) else None)
        self.criterion, self.optimizer, self.scheduler = criterion, optimizer, scheduler
        # an infinity that is there from the start is meant, as in a mask
        buffers = bare_model(self.model).named_buffers()
        self._infinite_by_design = {name for name, b in buffers if not b.is_meta and not bool(b.isfinite().all())}
        by_step = isinstance(scheduler, (OneCycleLR, CyclicLR))
        usual: str = "step" if by_step else getattr(scheduler, "scheduler_interval", "epoch")
        self.scheduler_interval = scheduler_interval or usual
        self.precision = pick_precision(precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.accumulate, self.clip_norm, self.clip_value = accumulate, clip_norm, clip_value
        self.nan_policy, self.early_stopping, self.monitor, self.log_every = (
            nan_policy,
            early_stopping,
            monitor,
            log_every,
        )
        self.checkpoints = CheckpointFolder(checkpoint_dir, keep) if checkpoint_dir is not None else None
        self.save_every, self.metadata = save_every, metadata or {}
        self.on_step_end, self.on_epoch_end = tuple(on_step_end), tuple(on_epoch_end)

        self.history: dict[str, list] = {name: [] for name in (*MONITORS, "lr", "step")}
        self.epoch = self.step = self.batch = self.skipped = 0
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self.grad_norm: Tensor | None = None
        self._running = RunningMeans()
        self._position = LoaderPosition(self.device)
        self._signals = SignalNote(enabled=self.checkpoints is not None)
        self._agreed_signal, self._cut_off = 0, False  # what all processes know: a signal to one; one's loader is gone
        self._empty_batch: tuple[Any, Tensor] | None = None
        self.waiting_seconds = 0.0  # for the other processes, between two steps
        self._first_epoch = 0
        self._resumed_random_state: dict[str, Any] | None = None
        self._saved_at: tuple[int, int, int] | None = None  # step, epoch, batch
        self._saved_path = Path()
        self._compiled = bool(compile)
        self._graph_refusal: str | None = None  # what was said
        self._graph: StepGraph | None = None
        self._settle_graph()

    # ------------------------------------------------------------------------------------------- the way of one batch

    def fit(
        self, train_loader: Iterable, val_loader: Iterable | None = None, num_epochs: int = 10, verbose: bool = True
    ) -> dict[str, list]:
        """Trains for `num_epochs` epochs (after `resume`: for what is left of them); returns `history`.

        Raises Interrupted, NonFiniteLoss; OSError if a checkpoint cannot be written (older ones stay).
        """
        if self._resumed_random_state is None:
            self._check_unused()
            self._first_epoch = self.epoch
        else:  # what was done since `resume`, such as drawing a graph, may have drawn random numbers
            set_random_state(self._resumed_random_state, self.device)
            self._resumed_random_state = None
        with self._signals:
            while self.epoch < self._first_epoch + num_epochs and not self.stopped_early:
                train = self._train_epoch(self._position.batches(train_loader, self.epoch, self.batch))
                val = self._validate_epoch(val_loader) if val_loader is not None else (None, None)
                self._leave_if_signalled()
                self._end_epoch(*train, *val)
                if verbose and distributed.is_main():
                    print(self._epoch_line(self._first_epoch + num_epochs))
            if self.checkpoints and self._saved_at != (self.step, self.epoch, self.batch):
                self.save()
            self._leave_if_signalled()
        return self.history

    def train_one_epoch(self, loader: Iterable) -> tuple[float, float | None]:
        """Trains on all of `loader`; returns (mean loss per sample, accuracy between 0 and 1 or None)."""
        self.batch, self._running = 0, RunningMeans()
        means = self._train_epoch(iter(loader))
        self.batch, self._running = 0, RunningMeans()  # a later `fit` begins at the start of its epoch
        return means

    def _train_epoch(self, batches: Iterator) -> tuple[float, float | None]:
        self.model.train()
        self._settle_graph()
        clear_gradients(self.optimizer)  # of a step that was broken off, or the caller's own
        for window, samples in self._windows(batches):
            stepped = self._train_window(window, samples)
            self.batch += len(window)
            if len(self._running.pending) >= self.log_every:
                self._read_losses()
            for callback in self.on_step_end:
                callback(self)
            if stepped and self.save_every and self.step % self.save_every == 0:
                self.save()
            self._leave_if_signalled()
        self._read_losses()
        return self._running.reduced().means()

    def _train_window(self, window: list[tuple[Any, Tensor]], samples: int) -> bool:
        """One optimizer step by the gradient of the mean loss over all `samples` of the windows of all processes.

        False if it was skipped.
        """
        if self._graph is not None:
            results, self.grad_norm = self._graph(window, samples)
            self._running.add(results)
            self._follow_step()
            return True
        buffers = [buffer.clone() for buffer in self.model.buffers()] if self.nan_policy == "skip" else []
        results = self._gradient(window, samples)
        if self._finite_now(results, window):
            self._running.add(results)
            if self._optimizer_step():
                self._follow_step()
                return True
        clear_gradients(self.optimizer)
        for buffer, before in zip(self.model.buffers(), buffers, strict=False):  # BatchNorm has seen the bad batch
            buffer.copy_(before)
        self.skipped += 1
        return False

    def _gradient(self, window: list[tuple[Any, Tensor]], samples: int) -> list[BatchResult]:
        """Forward → loss → backward of each batch."""
        results = []
        for i, (inputs, targets) in enumerate(window, start=1):
            first = self.batch == 0 and i == 1
            with parallel.part_of_step(self.model, targets.shape[0], first=first, last=i == len(window)):
                loss, result = forward(self.model, self.criterion, inputs, targets, self.precision)
                # DDP takes the mean over the processes
                share = result.samples * distributed.world_size() / max(samples, 1)
                if share != 1:  # micro-batches and processes' parts may be unequal: each counts by its samples
                    loss = loss * share
                self.scaler.scale(loss).backward()
            results.append(result)
        return results

    def _optimizer_step(self) -> bool:
        """Unscale → clip → optimizer. False if the step was skipped."""
        self.scaler.unscale_(self.optimizer)
        if self.nan_policy == "skip" and not self.scaler.is_enabled():
            # before clipping makes an infinite one finite
            norm = nn.utils.get_total_norm([p.grad for p in self._with_gradient()])  # type: ignore[misc]
            if not bool(norm.isfinite()):
                return False
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(self._with_gradient(), self.clip_value)
        if self.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self._with_gradient(), self.clip_norm)
            self.grad_norm = norm.full_tensor() if parallel.is_sharded(self.model) else norm  # type: ignore[attr-defined]
        if self.scaler.is_enabled():
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() < scale:  # it lowers its scale only when it skipped the step
                return False
        else:
            take_step(self.optimizer)
        clear_gradients(self.optimizer)
        return True

    def _follow_step(self) -> None:
        """What follows a step that was taken: its count → schedule → averages."""
        self.step += 1
        if self.scheduler is not None and self.scheduler_interval == "step":
            self.scheduler.step()  # type: ignore[call-arg]
        if self.averages is not None:
            self.averages.update_parameters(bare_model(self.model))

    def _end_epoch(
        self, train_loss: float, train_acc: float | None, val_loss: float | None, val_acc: float | None
    ) -> None:
        """Plateau schedule → early stopping → save → call-backs."""
        values = dict(zip(MONITORS, (train_loss, train_acc, val_loss, val_acc), strict=True))
        for name, value in (values | {"lr": float(self.optimizer.param_groups[0]["lr"]), "step": self.step}).items():
            self.history[name].append(value)
        score = self._score(values)
        if self.scheduler is not None and self.scheduler_interval == "epoch":
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(score)
            else:
                self.scheduler.step()
        if self.early_stopping is not None:
            self.early_stopping(score)
        improved = math.isfinite(score) and (
            self.best_score is None
            or (score > self.best_score if self.monitor.endswith("acc") else score < self.best_score)
        )
        if improved:
            self.best_score, self.best_epoch = score, self.epoch
        self.epoch, self.batch, self._running = self.epoch + 1, 0, RunningMeans()
        if self.checkpoints and improved:
            best = self._best_state(values)
            if distributed.is_main():
                self.checkpoints.save_best(best)
        if self.checkpoints and not self.save_every:
            self.save()
        for callback in self.on_epoch_end:
            callback(self)
        self._leave_if_signalled()

    def validate(self, loader: Iterable) -> tuple[float, float | None]:
        """(Mean loss per sample, accuracy or None) of the averaged model if there is one, else of the model.

        Of all processes' samples together. Changes no weight and no random state.
        """
        model = self.evaluated_model
        with parallel.shared_buffers(model):
            return evaluate(model, self._in_step(loader), self.criterion, self.device, reduce=True, **self._formats)

    def predict(self, loader: Iterable, wrap: Callable[[nn.Module], nn.Module] | None = None) -> Tensor:
        """The outputs for all batches of `loader`, (N, …) float32 on the CPU, from the model that is validated.

        `wrap` makes the model that is asked out of that one (`ShiftedViews`). Of several processes each gets those of
        its own part.
        """
        model = self.evaluated_model
        with parallel.shared_buffers(model):
            return outputs_of(wrap(model) if wrap else model, self._in_step(loader), self.device, **self._formats)

    # ------------------------------------------------------------------------------------------------------- its parts

    def _windows(self, batches: Iterator) -> Iterator[tuple[list[tuple[Any, Tensor]], int]]:
        """The windows of accumulation, on the device, and the number of samples that all processes have in each.

        A process that has less of an epoch than others takes part with empty batches, until all are done.
        """
        alone = distributed.world_size() == 1
        if not alone and not parallel.is_wrapped(self.model):
            raise ValueError("several processes train one model: wrap it by parallel.replicate or parallel.shard first")
        if not alone and self._learning_criterion is not None:
            raise ValueError(
                "several processes do not exchange the gradients of a criterion; put its part in the model"
            )
        distributed.check_group()
        while True:
            window = [to_device(batch, self.device, self.memory_format) for batch in self._next_window(batches)]
            samples, length = sum(targets.shape[0] for _, targets in window), len(window)
            if not alone:
                samples, length = self._agree_on(samples, length)
                if self._cut_off:
                    self._leave_if_signalled()
                if window:
                    self._empty_batch = without_samples(window[-1])
                if len(window) < length and self._empty_batch is None:
                    raise ValueError("the loader of this process gave no batch at all; give every process a part")
                window += [self._empty_batch] * (length - len(window))  # type: ignore[list-item]
            if not length:
                return
            yield window, samples

    def _in_step(self, loader: Iterable) -> Iterable:
        """`loader`; a sharded model needs all processes at each forward, so there who has less gets empty batches."""
        return with_empty_batches(loader) if parallel.is_sharded(self.model) else loader

    def _agree_on(self, samples: int, length: int) -> tuple[int, int]:
        """Of all processes: samples in their windows, length of the longest, and a signal that one of them noted."""
        began = time.perf_counter()
        every = distributed.all_gather([samples, length, self._signals.signum, self._cut_off])
        self.waiting_seconds += time.perf_counter() - began
        counts, lengths, signums, cut_off = zip(*every, strict=True)
        self._agreed_signal, self._cut_off = int(max(signums)), any(cut_off)
        return int(sum(counts)), int(max(lengths))

    def _next_window(self, batches: Iterator) -> list:
        try:
            return list(itertools.islice(batches, self.accumulate))
        except WORKER_ENDED as error:  # a signal to the whole process group also ends the loader's workers
            if self._signals.signum and self.batch == 0:
                self._position.rewind()
            if self._signals.signum and distributed.world_size() > 1:
                self._cut_off = True  # all leave before this window, in which a part would be missing
                return []
            self._leave_if_signalled()
            _name_worker(error)
            raise

    def _settle_graph(self) -> str | None:
        """Decides whether the steps to come are replayed; if not, says and returns why, or with `on` refuses."""
        if self.cuda_graph == "off":
            return None
        reason = graph_refusal(
            self.model,
            self.optimizer,
            self.device,
            criterion=self.criterion,
            precision=self.precision,
            nan_policy=self.nan_policy,
            scheduler=self.scheduler,
            compiled=self._compiled,
            parallel=distributed.world_size() > 1 or parallel.is_wrapped(self.model),
        )
        if reason and self.cuda_graph == "on":
            raise ValueError(f"cuda_graph='on' is impossible here: {reason}; use 'auto' or 'off'")
        if reason and reason != self._graph_refusal:  # once, not at each epoch
            warnings.warn(f"no CUDA graph: {reason}; each step runs without", stacklevel=2)
        self._graph_refusal = reason
        if reason:
            self._graph = None
        elif self._graph is None:
            self._graph = StepGraph(
                self._tensor_work,
                self.optimizer,
                self.device,
                strict=self.cuda_graph == "on",
                refusal=self._settle_graph,  # again, before each capture: hooks may have come since
            )
        return reason

    def _tensor_work(self, window: list[tuple[Any, Tensor]], samples: int) -> tuple[list[BatchResult], Tensor | None]:
        """All of a step that a graph can hold: the device's part, in which nothing is read."""
        results = self._gradient(window, samples)
        self._optimizer_step()
        return results, self.grad_norm

    def _with_gradient(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged model if there is one, else the model, without wrappers."""
        return self.averages.module if self.averages is not None else bare_model(self.model)

    @property
    def _learning_criterion(self) -> nn.Module | None:
        """The criterion if it has parameters of its own."""
        criterion = self.criterion
        return criterion if isinstance(criterion, nn.Module) and any(True for _ in criterion.parameters()) else None

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping has ended the training."""
        return bool(self.early_stopping is not None and self.early_stopping.early_stop)

    def _score(self, values: dict[str, float | None]) -> float:
        name = self.monitor if values[self.monitor] is not None else self.monitor.replace("val_", "train_")
        if values[name] is None:
            raise ValueError(
                f"monitor={self.monitor!r} has no value: accuracy exists for class targets only; use monitor='val_loss'"
            )
        return float(values[name])  # type: ignore[arg-type]

    @property
    def _formats(self) -> dict[str, Any]:
        return {"precision": self.precision, "memory_format": self.memory_format}

    def _validate_epoch(self, loader: Iterable) -> tuple[float, float | None]:
        """`validate`, cut short by a signal: after the resume all of it is done again."""
        go_to(loader, self.epoch, 0)
        try:
            with preserved_generators(loader):
                if distributed.world_size() > 1:  # all do all of it, then all know of a signal to one
                    means = self.validate(loader)
                    self._agree_on(0, 0)
                    return means
                return self.validate(self._signals.until(loader))
        except (*WORKER_ENDED, ValueError) as error:  # by the signal, perhaps before the first batch
            self._leave_if_signalled()
            _name_worker(error)
            raise

    def _finite_now(self, results: list[BatchResult], window: list[tuple[Any, Tensor]]) -> bool:
        """Looks at the losses at once where that costs nothing (CPU), or where the policy needs it; else later."""
        if self.nan_policy == "ignore" or (self.nan_policy == "stop" and self.device.type != "cpu"):
            return True
        finite = True
        for i, result in enumerate(results):
            if not math.isfinite(value := float(result.loss)):
                if self.nan_policy == "stop":
                    raise self._non_finite(value, -i, window[i])
                finite = False
        return all(flag for (flag,) in distributed.all_gather([finite])) if self.nan_policy == "skip" else finite

    def _read_losses(self) -> None:
        """The one transfer from the device: all losses since the last. NaN is found here, before it is saved."""
        bad = self._running.read()
        if bad is not None and self.nan_policy == "stop":
            raise self._non_finite(*bad)

    def _non_finite(self, value: float, batches_ago: int, batch: tuple[Any, Tensor] | None = None) -> NonFiniteLoss:
        """What to raise; where the `batch` is still at hand it is passed once more, to name the module to blame."""
        culprit = None
        if batch is not None and not parallel.is_sharded(self.model):
            with contextlib.suppress(Exception):  # what is already found is worth more than who did it
                culprit = find_nonfinite(bare_model(self.model), self.criterion, *batch, self.precision)
        return NonFiniteLoss(
            f"the loss is {value} at epoch {self.epoch + 1}, batch {self.batch + 1 - batches_ago}, "
            f"after {self.step} steps{f' ({culprit})' if culprit else ''}; lower the learning rate, clip the gradient "
            "(clip_norm=1) or look for bad values in the data"
        )

    def _epoch_line(self, num_epochs: int) -> str:
        parts = [f"epoch {self.epoch}/{num_epochs}"]
        for name, value in ((name, self.history[name][-1]) for name in MONITORS):
            if value is not None:
                parts.append(f"{name} {value:.2%}" if name.endswith("acc") else f"{name} {value:.4f}")
        return "  ".join(parts)

    # -------------------------------------------------------------------------------------------------- save and resume

    def state_dict(self) -> dict[str, Any]:
        """All that the run depends on, as tensors and plain values; `load_state_dict` goes on from it exactly."""
        self._read_losses()
        weights, optimizer = parallel.full_state(self.model, self.optimizer)
        own: dict[str, Any] = {
            "random_state": random_state(self.device),
            "running": self._running.state_dict(),
            "position": self._position.state_dict(),
            "buffers": [b.clone() for b in bare_model(self.model).buffers()] if distributed.world_size() > 1 else [],
        }
        ranks = distributed.gather_objects(own)
        optional = {
            "scheduler_state_dict": self.scheduler,
            "scaler_state_dict": self.scaler if self.scaler.is_enabled() else None,
            "criterion_state_dict": self._learning_criterion,
            "early_stopping_state_dict": self.early_stopping if hasattr(self.early_stopping, "state_dict") else None,
        }
        return {
            "format": FORMAT,
            "epoch": self.epoch,
            "step": self.step,
            "batch": self.batch,
            "first_epoch": self._first_epoch,
            "loss": self._latest_loss(),
            "skipped": self.skipped,
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
            "model_state_dict": weights,
            "optimizer_state_dict": optimizer,
            "averages_state_dict": None if self.averages is None else self.averages.state_dict(),
            **{key: None if part is None else part.state_dict() for key, part in optional.items()},
            "history": self.history,
            "running": RunningMeans.sum_of([own["running"] for own in ranks]).state_dict(),
            "metadata": self.metadata,
            "random_state": ranks[0]["random_state"],
            "ranks": ranks if len(ranks) > 1 else [],  # for a resume with as many processes
            "position": ranks[0]["position"],
            "kinds": self._kinds(),
        }

    def load_state_dict(self, state: dict[str, Any], where: str = "checkpoint") -> None:
        """Goes on from `state`. Raises CheckpointError if it belongs to another model, data set or set-up."""
        kinds = self._kinds()
        for here, there in ((self.metadata, state.get("metadata", {})), (kinds, state.get("kinds", kinds))):
            for key in sorted(here.keys() | there.keys()):
                if here.get(key) != there.get(key):
                    raise CheckpointError(
                        f"{where}: of another run: {key} is {there.get(key)!r} there, {here.get(key)!r} here; "
                        "resume with the same set-up"
                    )
        wrong = next((key for key, kind in SAVED.items() if not isinstance(state.get(key), kind)), None)
        if wrong is not None:
            raise CheckpointError(
                f"{where}: {wrong!r} is missing or no {SAVED[wrong].__name__}; use another checkpoint"
            )
        by_design = {bare_name(name) for name in self._infinite_by_design}  # as they are saved
        weights = {name: w for name, w in state["model_state_dict"].items() if name not in by_design}
        bad = next((k for k, w in weights.items() if w.is_floating_point() and not bool(w.isfinite().all())), None)
        if bad is not None and self.nan_policy == "stop":
            raise CheckpointError(f"{where}: {bad!r} is NaN or infinite; use another checkpoint")
        parts = {
            "scheduler_state_dict": self.scheduler,
            "averages_state_dict": self.averages,
            "scaler_state_dict": self.scaler if self.scaler.is_enabled() else None,
            "criterion_state_dict": self._learning_criterion,
        }
        for key, part in parts.items():
            if (part is None) != (state.get(key) is None):
                raise CheckpointError(
                    f"{where}: {key} is {'not used here' if part is None else 'missing'}; resume with the same options"
                )
        sizes, saved = _group_sizes(vars(self.optimizer)), _group_sizes(state["optimizer_state_dict"])
        if sizes != saved:  # before anything is changed
            raise CheckpointError(
                f"{where}: its optimizer has groups of {saved} parameters, this one of {sizes}; "
                "resume with the same options"
            )
        parallel.load_full_weights(self.model, state["model_state_dict"], where)
        try:
            parallel.load_optimizer(self.model, self.optimizer, state["optimizer_state_dict"])
            for key, part in parts.items():  # after the optimizer, whose rate the schedule goes on from
                if part is not None:
                    part.load_state_dict(state[key])
            if state.get("early_stopping_state_dict") and hasattr(self.early_stopping, "load_state_dict"):
                self.early_stopping.load_state_dict(state["early_stopping_state_dict"])
            own = self._own_part(state)
            self._running = RunningMeans(**own["running"])
            self.history = {name: list(values) for name, values in state["history"].items()}
            for name in ("epoch", "step", "batch", "skipped", "best_score", "best_epoch"):
                setattr(self, name, state[name])
            for buffer, saved in zip(bare_model(self.model).buffers(), own.get("buffers", []), strict=False):
                buffer.copy_(saved)
            self._first_epoch, self._resumed_random_state = state["first_epoch"], own["random_state"]
            self._position.load_state_dict(own["position"])
            set_random_state(own["random_state"], self.device)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{where}: does not fit this trainer ({type(error).__name__}: {error}); resume with the same options"
            ) from error

    def _own_part(self, state: dict[str, Any]) -> dict[str, Any]:
        """What this process goes on from: exactly its own where as many processes saved, else a part of the whole."""
        number, ranks = distributed.rank(), state.get("ranks", [])
        if max(len(ranks), 1) == distributed.world_size():
            return ranks[number] if ranks else state
        running = state["running"] if number == 0 else RunningMeans().state_dict()
        if number and number >= len(ranks):  # nobody has drawn as this process: begin a stream of its own
            random = branched_random_state(state["random_state"], number, self.device)
        else:
            random = ranks[number]["random_state"] if ranks else state["random_state"]
        return {"running": running, "random_state": random, "position": state["position"]}

    def load_evaluated(self, weights: dict[str, Tensor], where: str = "checkpoint") -> None:
        """Loads `weights` (of a `best.pt`) into the model that `validate` and `predict` use."""
        parallel.load_full_weights(self.evaluated_model, weights, where)

    def _check_unused(self) -> None:
        """Two runs in one folder would be mixed: `resume` would take the one with the higher step."""
        if self.checkpoints and distributed.is_main() and self._saved_at is None and self.checkpoints.steps():
            raise ValueError(
                f"{self.checkpoints.folder}: holds the checkpoints of an earlier run; "
                "call resume(), or give another folder"
            )

    def _kinds(self) -> dict[str, str]:
        return {"optimizer": type(self.optimizer).__name__, "scheduler": type(self.scheduler).__name__}

    def save(self) -> Path:
        """Saves the state under its step number in `checkpoint_dir`; returns the path."""
        if self.checkpoints is None:
            raise ValueError("Trainer was made without checkpoint_dir; give one to save")
        state = self.state_dict()
        weights = parallel.own_parameters(self.model)
        named = bare_model(self.model).named_buffers() if distributed.is_main() else ()  # rank 0's are saved
        statistics = [buffer for name, buffer in named if name not in self._infinite_by_design]
        finite = torch.stack([tensor.isfinite().all() for tensor in (*weights, *statistics)]).tolist()
        # a part of a sharded weight is seen by one process only, and rank 0 must not save the rest
        everywhere = all(flag for (flag,) in distributed.all_gather([all(finite)]))
        if self.nan_policy == "stop" and not everywhere:
            # from an infinite gradient of a finite loss: the next loss would tell, too late for this checkpoint
            which = "running statistic" if all(finite[: len(weights)]) else "weight"
            raise NonFiniteLoss(
                f"a {which} is NaN or infinite at epoch {self.epoch + 1}, batch {self.batch}, after {self.step} steps; "
                "not saved; lower the learning rate or clip the gradient (clip_norm=1)"
            )
        if distributed.is_main():
            self.checkpoints.save(state)
        self._saved_path = self.checkpoints.path(self.step)
        self._saved_at = (self.step, self.epoch, self.batch)
        return self._saved_path

    def resume(self) -> Path | None:
        """Goes on from the newest intact checkpoint of `checkpoint_dir`; returns its path, or None if there is none.

        Raises CheckpointError if there are some and none is intact, or if it belongs to something else.
        """
        if self.checkpoints is None:
            raise ValueError("Trainer was made without checkpoint_dir; give one to resume from")
        found = distributed.on_main(self.checkpoints.latest)
        if found is None:
            return None
        path, state = found
        self.load_state_dict(state, where=str(path))
        self._saved_at, self._saved_path = (self.step, self.epoch, self.batch), path
        return path

    def _latest_loss(self) -> float | None:
        latest = (self.history[name][-1] for name in ("val_loss", "train_loss") if self.history[name])
        return next((loss for loss in latest if loss is not None), None)

    def _best_state(self, values: dict[str, float | None]) -> dict[str, Any]:
        """For use, not for resuming: the weights as they were judged. `epoch` counts the epochs done, as everywhere."""
        weights, optimizer = parallel.full_state(self.model, self.optimizer)
        return {
            "format": FORMAT,
            "epoch": self.epoch,
            "step": self.step,
            "loss": self._latest_loss(),
            "metrics": values,
            "model_state_dict": weights if self.averages is None else parallel.full_weights(self.evaluated_model),
            "optimizer_state_dict": optimizer,
            "metadata": self.metadata,
        }

    def _leave_if_signalled(self) -> None:
        if not (self._signals.signum or self._agreed_signal):
            return
        signum = self._signals.signum if distributed.world_size() == 1 else self._agreed_signal
        if signum:
            saved = self._saved_at == (self.step, self.epoch, self.batch)
            raise Interrupted(signum, self._saved_path if saved else self.save())


def _group_sizes(optimizer: dict[str, Any]) -> list[int] | None:
    """How many parameters each of an optimizer's `param_groups` has; None if there are no such things."""
    try:
        return [len(group["params"]) for group in optimizer["param_groups"]]
    except (KeyError, TypeError):
        return None


def _name_worker(error: Exception) -> None:
    """Where `error` is of reading from a loader's worker that is gone, raises one that says so."""
    if isinstance(error, (EOFError, ConnectionError)):
        raise RuntimeError("a worker process of the loader has ended: killed, perhaps for want of memory") from error


def _check_options(
    criterion: Any,
    scheduler_interval: str | None,
    accumulate: int,
    clip_norm: float | None,
    clip_value: float | None,
    nan_policy: str,
    monitor: str,
    save_every: int | None,
    log_every: int,
) -> None:
    if getattr(criterion, "reduction", "mean") not in ("mean", "batchmean"):
        raise ValueError(
            f"criterion.reduction must be 'mean' or 'batchmean', got {criterion.reduction!r}: "
            "the Trainer weights by samples itself"
        )
    for name, value, allowed in (
        ("scheduler_interval", scheduler_interval, (None, "step", "epoch")),
        ("nan_policy", nan_policy, NAN_POLICIES),
        ("monitor", monitor, MONITORS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    for name, number in (("accumulate", accumulate), ("save_every", save_every), ("log_every", log_every)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    for name, bound in (("clip_norm", clip_norm), ("clip_value", clip_value)):
        if bound is not None and not (bound > 0 and math.isfinite(bound)):
            raise ValueError(f"{name} must be positive and finite, got {bound}")


def _check_directions(scheduler: Any, scheduler_interval: str | None, early_stopping: Any, monitor: str) -> None:
    """A plateau schedule steps once per epoch, and who watches the monitored value must know whether less is better."""
    mode, plateau = "max" if monitor.endswith("acc") else "min", isinstance(scheduler, ReduceLROnPlateau)
    if plateau and scheduler_interval == "step":
        raise ValueError("ReduceLROnPlateau needs the value of an epoch; use scheduler_interval='epoch'")
    for watcher in (early_stopping, scheduler if plateau else None):
        found = getattr(watcher, "mode", mode)
        if found != mode:
            raise ValueError(
                f"{type(watcher).__name__} has mode={found!r}, but monitor={monitor!r} needs mode={mode!r}"
            )
