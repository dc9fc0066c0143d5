"""Trainer: train, validate, save and stop, with exact resume after an interruption at any moment.

Read it from top to bottom, in the order in which things happen to a batch:

    fit → train_one_epoch → windows → train_step → forward → compute_loss → backward → update (unscale, clip, step)
        → schedule, averages → on_step_end → save
        → validate → end_epoch: history, schedule, early stopping, best → on_epoch_end → save

To train on other batches or with another loss, override `compute_loss`.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import multiprocessing
import os
import secrets
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import Subset

from . import checkpoint, distributed, evaluation
from .device import autocast, pick_precision, preserved_random_state, random_state, set_random_state
from .evaluation import Figure, Means
from .monitors import find_nonfinite

ADVICE = "lower the learning rate, clip the gradient (clip_norm=1) or look for bad values in the data"
Window = list[tuple[Any, float]]  # batches on the device, each with the number of targets that its loss averages


class NonFiniteLoss(RuntimeError):
    """The loss, or a weight, became NaN or infinite. The message says where."""


class Interrupted(Exception):
    """A signal came. `fit` has saved everything at `checkpoint`; the usual exit code is 128 + `signum`."""

    def __init__(self, signum: int, checkpoint: Path | None = None) -> None:
        super().__init__(signum, checkpoint)
        self.signum = signum
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return f"{signal.Signals(self.signum).name}: " + (f"saved {self.checkpoint}" if self.checkpoint else "stopped")


class Trainer:
    """Train `model` with `optimizer` to lower `criterion(outputs, targets)`, over any iterable of batches.

    By default a batch is a pair (inputs, targets), and inputs are one argument of the model. For everything else
    override `compute_loss`, and `count_targets` if the loss is a mean over something other than samples.

    Args:
        model: trained where it stands; for several processes wrapped by `distributed.replicate` or `shard`. Memory
            format and compilation are yours: `model.to(memory_format=torch.channels_last)`, `model.compile()`.
        criterion: a mean over the targets of a batch (`reduction="mean"`); None if `compute_loss` does without.
        device: where to train (default: where the model is).
        scheduler: stepped once per epoch; once per optimizer step if it is OneCycleLR or CyclicLR, has the attribute
            `scheduler_interval = "step"`, or `scheduler_interval` says so. ReduceLROnPlateau gets the monitored value.
        precision: "fp32", "bf16", "fp16" (with loss scaling) or "auto" (bf16 where the hardware computes in it).
        accumulate: how many batches make one optimizer step, as if they were one batch.
        clip_norm, clip_value: limits for the gradient's total norm and for its entries. With `clip_norm` the history
            has the mean norm before clipping as "grad_norm".
        averages: an averaged model (`optim.averaged_copy`), updated after each step; it is validated and kept as best.
        metrics: functions by name; `metric(outputs, targets)` returns one value per target (NaN does not count) or
            their mean. {"top5": top5} appears in the history as train_top5 and val_top5.
        monitor: the value that decides best epoch, plateau and early stopping. Names that end in "loss" are minimised,
            in "acc" maximised; others are given as (name, "min") or (name, "max").
        early_stopping: an EarlyStopping, called with the monitored value after each epoch.
        checkpoint_dir: where the state is saved after each epoch, or every `save_every` steps, with the best weights as
            best.pt. SIGINT, SIGTERM and SIGUSR1 then save after the step at hand and raise Interrupted.
        metadata: plain values to store in every checkpoint.
        log_every: how many batches' losses wait on an accelerator to be read at once. On a CPU each is looked at.
        on_step_end, on_epoch_end: functions called with this Trainer.

    Attributes: `history` (a list per name, one entry per epoch), `epoch` (epochs done), `batch` (batches done in this
    epoch), `step` (optimizer steps done), `best_score`, `best_epoch` (from 0), `last_loss`, `model`, `evaluated_model`,
    `validation_means` (its `values()` are all figures of the last `validate`, those of `metrics` too).
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None,
        optimizer: torch.optim.Optimizer,
        device: torch.device | str | None = None,
        scheduler: Any = None,
        *,
        scheduler_interval: str | None = None,
        precision: str = "fp32",
        accumulate: int = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        averages: Any = None,
        metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
        monitor: str | tuple[str, str] = "val_loss",
        early_stopping: Any = None,
        checkpoint_dir: str | os.PathLike | None = None,
        save_every: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        log_every: int = 50,
        on_step_end: Iterable[Callable[[Trainer], None]] = (),
        on_epoch_end: Iterable[Callable[[Trainer], None]] = (),
    ) -> None:
        self.device = torch.device(device) if device is not None else evaluation.model_device(model)
        self.model = model.to(self.device)
        self.criterion = criterion.to(self.device) if isinstance(criterion, nn.Module) else criterion
        self.optimizer = optimizer
        self.scheduler = scheduler
        by_step = isinstance(scheduler, (OneCycleLR, CyclicLR))
        default_interval = getattr(scheduler, "scheduler_interval", "step" if by_step else "epoch")
        self.scheduler_interval = scheduler_interval or default_interval
        self.precision = pick_precision(precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.clip_value = clip_value
        self.averages = averages.to(self.device) if averages is not None else None
        self.metrics = dict(metrics or {})
        self.monitor, self.mode = monitored(monitor)
        self.early_stopping = early_stopping
        self.checkpoint_dir = Path(checkpoint_dir) if checkpoint_dir is not None else None
        self.save_every = save_every
        self.metadata = dict(metadata or {})
        self.log_every = log_every
        self.on_step_end = list(on_step_end)
        self.on_epoch_end = list(on_epoch_end)
        self.before_save: list[Callable[[Trainer], None]] = []  # called on rank 0, which writes; may raise OSError

        self.history: dict[str, list[float | None]] = {}
        self.epoch_records: list[dict[str, Any]] = []  # of each epoch its last step and a hash of the weights
        self.epoch = 0
        self.batch = 0
        self.step = 0
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self.last_loss: float | None = None
        self.skipped_in_a_row = 0  # steps that fp16 did not take
        self.means = Means()  # of the training epoch at hand
        self.validation_means = Means()  # of the last `validate`
        self.pending: dict[str, float] | None = None  # training means of an epoch that awaits validation
        self.run_id = secrets.token_hex(8)  # in each of this run's checkpoints, best.pt too
        self.saved_at: tuple[Path, int, int, int] | None = None  # the last save: path and position
        self.signum = 0  # a signal that this process has got
        self.agreed_signum = 0  # a signal that all processes know of

        # Where the training loader stands, to start it there again.
        self.loader: Any = None
        self.num_batches: int | None = None  # of an epoch, to notice another data set
        self.epoch_start: dict[str, Any] | None = None  # random state when the epoch began; None between epochs
        self.exhausted = False  # the loader has no more batch in this epoch
        self.resumed: dict[str, Any] | None = None  # this process's part of a loaded state, until training goes on

        self.class_weight: tuple[Any, Any] = (None, None)  # of the criterion, and its copy on the host
        self.counts: list[tuple[Any, float]] = []  # (count of the class targets, count_targets(batch)), to be compared
        self.check_setup()

    def fit(
        self, train_loader: Iterable, val_loader: Iterable | None = None, num_epochs: int = 10, verbose: bool = True
    ) -> dict[str, list[float | None]]:
        """Train until `num_epochs` epochs are done, those before a resume included, and return the history.

        Raise Interrupted after a signal (with `checkpoint_dir`, everything is saved), NonFiniteLoss, ValueError for
        batches that cannot be trained, OSError if a checkpoint cannot be written (older ones stay).
        """
        self.check_fit(val_loader)
        self.restore_random_state(train_loader)
        done = self.pending is None and (self.epoch >= num_epochs or self.stopped)
        if done and verbose and distributed.is_main():
            print(f"nothing to do: {self.epoch} epochs are done" + ", early stopping ended the training" * self.stopped)
        with self.noted_failures(), self.noted_signals():
            try:
                while self.pending is not None or (self.epoch < num_epochs and not self.stopped):
                    if self.pending is None:  # else the run was stopped while it validated
                        self.train_one_epoch(train_loader)
                        means = self.means.values()
                        self.pending = {n if n == "grad_norm" else f"train_{n}": value for n, value in means.items()}
                    values = dict(self.pending)
                    if val_loader is not None:
                        self.validate(val_loader)
                        values |= {f"val_{name}": value for name, value in self.validation_means.values().items()}
                    self.end_epoch(values)
                    if verbose and distributed.is_main():
                        print(self.epoch_line(num_epochs))
                    self.stop_if_signalled()
                if self.checkpoint_dir and not self.is_saved():
                    self.save()
            except Interrupted as stop:
                raise Interrupted(stop.signum, self.save()) from None
        return self.history

    def train_one_epoch(self, loader: Iterable) -> tuple[float, float | None]:
        """Train on what is left of this epoch; return (mean loss, accuracy or None). The next call is the next epoch.

        After a resume this is called for the rest of an epoch: a subclass that extends it checks `self.batch == 0`.
        """
        refuse_together(self.check_training_loader, loader)
        self.restore_random_state(loader)
        if self.batch == 0:
            self.means = Means()
        if not self.model.training:
            self.model.train()  # the model is in eval() as a whole; submodules that the user put there stay there
        for window, total in self.windows(loader):
            stepped = self.train_step(window, total)
            self.batch += len(window)
            if stepped:
                for callback in self.on_step_end:
                    callback(self)
                if self.save_every and self.step % self.save_every == 0:
                    self.save()
            self.stop_if_signalled()
        self.read_losses(self.batch)
        means = Means.sum_of(distributed.gather_objects(self.means.sums))
        if not means.sums.get("loss", (0, 0))[1]:
            raise ValueError("the training loader gave no batch with a target that counts; is drop_last too much?")
        self.means = means
        self.epoch += 1
        self.batch = 0
        self.epoch_start = None
        self.exhausted = False
        return means.values()["loss"], means.values().get("acc")

    def windows(self, loader: Iterable) -> Iterator[tuple[Window, float]]:
        """Yield what is left of this epoch, `accumulate` batches at a time, with the count of all processes.

        A window is drawn only when the one before is done, so a saved state has read no batch that is not trained yet.
        """
        batches = self.start_loader(loader)
        while not self.exhausted:
            drawn, broken = self.draw(batches)
            counts = [float(self.count_targets(batch)) for batch in drawn]  # before it moves to the device
            total = sum(counts)
            if distributed.world_size() > 1:
                total = self.agree(total, len(drawn), broken)
            if not drawn:
                break
            self.exhausted = len(drawn) < self.accumulate
            yield [(evaluation.to_device(b, self.device), c) for b, c in zip(drawn, counts, strict=True)], total

    def train_step(self, window: Window, total: float) -> bool:
        """Take one optimizer step on the mean loss over the `total` targets of the windows of all processes.

        Return whether it was taken: not if every target is ignored, nor if fp16 overflowed.
        """
        if not total:
            where = f"epoch {self.epoch + 1}, batch {self.batch + 1}"
            warnings.warn(f"no step taken, since no target counts: {where}", stacklevel=2)
            return False
        self.optimizer.zero_grad()
        for i, (batch, count) in enumerate(window, start=1):
            if not count and distributed.world_size() == 1:
                self.means.add([Figure("loss", 0.0, factor=0.0, weight=0.0)])  # nothing to learn from
                continue
            with distributed.gradient_sync(self.model, wanted=i == len(window)):
                loss, figures = self.forward(batch, count)
                self.means.add(figures)
                if self.note_loss(loss) or len(self.means.waiting) >= self.log_every:
                    self.read_losses(self.batch + i, batch)
                # Unequal batches count by their targets. DDP and FSDP average over processes: their number makes a sum.
                loss_weight = count / total * distributed.world_size() if count else 1.0
                self.scaler.scale(loss if loss_weight == 1 else loss * loss_weight).backward()
        if not self.update():
            return False
        self.step += 1
        if self.scheduler is not None and self.scheduler_interval == "step":
            self.scheduler.step()
        if self.averages is not None:
            self.averages.update_parameters(distributed.unwrap(self.model))
        return True

    def forward(self, batch: Any, count: float) -> tuple[Tensor, list[Figure]]:
        """Return the loss of one batch on the device, and what it adds to the means."""
        with autocast(self.device, self.precision), equal_shapes() if self.step == 0 else contextlib.nullcontext():
            result = self.compute_loss(batch)
        if not (isinstance(result, (tuple, list)) and len(result) == 3):
            raise ValueError(f"compute_loss must return (loss, outputs, targets), got {describe(result)}")
        loss, outputs, targets = result
        if self.step == 0:
            self.check_loss(loss, outputs, targets)
        if not count:  # other processes have targets: run backward with a zero loss, so that gradients synchronise
            parts = [part for part in evaluation.tensors(outputs) if part.requires_grad]
            zero = sum(((0 * part).sum() for part in parts), loss.new_zeros(()))
            return zero, [Figure("loss", zero.detach(), factor=0.0, weight=0.0)]
        loss = loss.sum() if loss.dim() else loss  # of one element
        figures = [Figure("loss", loss.detach(), factor=count, weight=count)]
        if evaluation.is_classification(self.criterion) and isinstance(targets, Tensor):
            if not self.is_counted(batch, targets):
                self.counts.append((evaluation.count_classes(targets, self.criterion), count))
            if "acc" not in self.metrics:
                known = count if self.criterion.weight is None else None  # type: ignore[union-attr]
                figures += evaluation.accuracy_figures(self.criterion, outputs, targets, known)
        if self.metrics and targets is not None:
            figures += self.metric_figures(outputs, targets)
        return loss, figures

    def compute_loss(self, batch: Any) -> tuple[Tensor, Any, Any]:
        """Return (loss, outputs, targets) of one batch on the device, in training and in validation. Override me.

        The loss is a mean over `count_targets(batch)` terms. Outputs and targets go to the metrics (None for none),
        which may also report parts of the loss from whatever `outputs` holds.
        `self.model` is the model in training, the bare or averaged one in `validate`.
        """
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError(f"expected a batch (inputs, targets), got {describe(batch)}; else override compute_loss")
        inputs, targets = batch
        outputs = evaluation.in_float32(self.model(inputs))
        return self.criterion(outputs, targets), outputs, targets  # type: ignore[misc]

    def count_targets(self, batch: Any) -> float | Tensor:
        """Return how many terms the loss of `batch` is a mean over. `batch` is as the loader made it.

        Of a pair (inputs, targets) under CrossEntropyLoss or NLLLoss: the targets that are not ignored, times their
        class weights. Of other batches the samples. So four unequal batches of padded text equal one batch of all.
        """
        weight = getattr(self.criterion, "weight", None)
        if isinstance(weight, Tensor) and weight is not self.class_weight[0]:
            self.class_weight = weight, weight.cpu()  # once, since copying waits for an accelerator
        return evaluation.count_targets(batch, self.criterion, self.class_weight[1])

    def is_counted(self, batch: Any, targets: Tensor) -> bool:
        """Return whether `count_targets` is the default and has counted these very targets."""
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and targets is batch[1]
        return pair and type(self).count_targets is Trainer.count_targets

    @torch.no_grad()
    def metric_figures(self, outputs: Any, targets: Any) -> list[Figure]:
        """Return the figures of `metrics`, which are weighted by targets, never by class weights."""
        first = evaluation.first_tensor(targets)
        counted = torch.ones(len(first), dtype=torch.bool, device=self.device)
        if evaluation.is_classification(self.criterion) and isinstance(targets, Tensor):
            counted = torch.as_tensor(targets != self.criterion.ignore_index)  # type: ignore[union-attr]
        figures: list[Figure] = []
        for name, metric in self.metrics.items():
            values = torch.as_tensor(metric(outputs, targets), device=self.device).float()
            if values.numel() not in (1, len(first), first.numel()):  # such as (B, 1) and (B,), broadcast to (B, B)
                raise ValueError(
                    f"the metric {name!r} gave {describe(values)} for targets {tuple(first.shape)}; expected one value "
                    "per target, or their mean"
                )
            # One value per target, or their mean, which then stands for each of them. NaN does not count.
            if values.numel() == counted.numel():
                values = values.reshape(counted.shape)
            kept = counted if values.dim() == 0 or values.shape == counted.shape else True
            weights = (~values.isnan() & kept).float()
            total = (values.nan_to_num() * weights).sum()
            figures.append(Figure(name, total, factor=1.0, weight=weights.sum()))
        return figures

    def update(self) -> bool:
        """Unscale and clip the gradient, then step the optimizer. Return whether the step was taken."""
        self.scaler.unscale_(self.optimizer)
        norm = None
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(self.trained_parameters(), self.clip_value)
        if self.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.trained_parameters(), self.clip_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:  # it lowers its scale only when it skipped the step
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= 20:
                raise NonFiniteLoss(f"fp16 skipped 20 steps in a row: each gradient is NaN or infinite; {ADVICE}")
            return False
        self.skipped_in_a_row = 0
        if norm is not None:
            norm = norm.full_tensor() if distributed.is_sharded(self.model) else norm  # type: ignore[attr-defined]
            self.means.add([Figure("grad_norm", norm, factor=1.0, weight=1.0)])
        return True

    def trained_parameters(self) -> list[Tensor]:
        """Return the parameters that the optimizer holds, those of a criterion that learns included."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def validate(self, loader: Iterable) -> tuple[float, float | None]:
        """Return (mean loss, accuracy or None) of the averaged model if there is one, else of the model, over `loader`.

        Change no weight, buffer, mode or random state. Of several processes each judges its part of the samples (under
        FSDP all of them) and all get the means. Raise Interrupted after a signal.
        """
        refuse_together(self.check_validation_loader, loader)
        means = Means()
        training_model, self.model = self.model, self.evaluated_model
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(distributed.shared_buffers(self.model))
                stack.enter_context(evaluation.evaluation_mode(self.model))
                stack.enter_context(preserved_random_state(self.device))
                stack.enter_context(preserved_generators(loader))
                set_epoch(loader, 0)
                for batch in loader:
                    if self.signalled_in_validation():
                        break
                    count = float(self.count_targets(batch))
                    if count:
                        means.add(self.forward(evaluation.to_device(batch, self.device), count)[1])
        finally:
            self.model = training_model
            dataset = data_set(self.loader)
            if self.epoch_start is not None and hasattr(dataset, "set_epoch"):
                dataset.set_epoch(self.epoch)  # in the middle of an epoch, and both loaders may share the data set
        means.read()
        self.compare_counts()
        parts = distributed.gather_objects((means.sums, self.signum))
        if self.checkpoint_dir and any(signum for _, signum in parts):
            self.agreed_signum = max(signum for _, signum in parts)
            raise Interrupted(self.agreed_signum)
        if not distributed.is_sharded(self.model):
            means = Means.sum_of(sums for sums, _ in parts)
        if not means.sums.get("loss", (0, 0))[1]:
            raise ValueError("the validation loader gave no target that counts; an iterator can be read only once")
        self.validation_means = means
        values = means.values()
        if not math.isfinite(values["loss"]):
            warnings.warn(
                f"epoch {self.epoch}: the validation loss is {values['loss']}, which is never best", stacklevel=2
            )
        return values["loss"], values.get("acc")

    def end_epoch(self, values: dict[str, float]) -> None:
        """Record the epoch; then schedule, early stopping, best, callbacks and save, in this order."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.pending = None
        self.record(values | {"lr": rate})
        score = self.score(values)
        if self.scheduler is not None and self.scheduler_interval == "epoch":
            if self.epoch == 1 and rate == 0:
                warnings.warn("the rate was 0 in the whole first epoch; use scheduler_interval='step'?", stacklevel=2)
            self.scheduler.step(*[score] if isinstance(self.scheduler, ReduceLROnPlateau) else ())
        if self.early_stopping is not None:
            self.early_stopping(score)
        if self.is_best(score):
            self.best_score = score
            self.best_epoch = self.epoch - 1
            if self.checkpoint_dir:
                self.save_best(values)
        for callback in self.on_epoch_end:
            callback(self)
        if self.checkpoint_dir and not self.save_every:
            self.save()

    def record(self, values: Mapping[str, float | None]) -> None:
        """Append one entry to every list of the history, None where there is no value."""
        for name in dict.fromkeys(("train_loss", "train_acc", "val_loss", "val_acc", *values, *self.history)):
            entries = self.history.setdefault(name, [])
            entries += [None] * (self.epoch - 1 - len(entries))  # epochs before the name, or trained by hand
            entries.append(values.get(name))
        for name in self.metrics:
            found = [values.get(f"{part}_{name}", math.nan) for part in ("train", "val") if f"{part}_loss" in values]
            if any(map(math.isnan, found)):  # type: ignore[arg-type]
                text = f"the metric {name!r} had no value in epoch {self.epoch}"
                warnings.warn(f"{text}: the targets were None, or it was NaN for each", stacklevel=3)
        weights = checkpoint.weights_hash(distributed.full_weights(self.model)) if self.checkpoint_dir else None
        self.epoch_records += [{"step": None, "weights": None}] * (self.epoch - 1 - len(self.epoch_records))
        self.epoch_records.append({"step": self.step, "weights": weights})

    def score(self, values: dict[str, float]) -> float:
        """Return the monitored value; without validation that of training, of which `check_fit` has warned."""
        name = self.monitor if "val_loss" in values else self.monitor.replace("val_", "train_")
        if name not in values:
            raise ValueError(f"monitor={self.monitor!r} has no value; there are {', '.join(sorted(values))}")
        return values[name]

    def is_best(self, score: float) -> bool:
        """Return whether `score` beats the best so far; NaN and infinity never do."""
        if self.best_score is None or not math.isfinite(score):
            return math.isfinite(score)
        return score > self.best_score if self.mode == "max" else score < self.best_score

    @property
    def stopped(self) -> bool:
        """Whether early stopping has ended the training."""
        return bool(self.early_stopping is not None and self.early_stopping.early_stop)

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged model if there is one, else the model, without wrappers."""
        return self.averages.module if self.averages is not None else distributed.unwrap(self.model)

    def epoch_line(self, num_epochs: int) -> str:
        """Return one line on the last epoch."""
        parts = [f"epoch {self.epoch}/{num_epochs}"]
        for name, values in self.history.items():
            if values[-1] is not None and name != "lr":
                parts.append(f"{name} {values[-1]:.2%}" if name.endswith("acc") else f"{name} {values[-1]:.4f}")
        return "  ".join(parts)

    # What fit and train_one_epoch call: losses, processes, the loader's position, signals.

    def note_loss(self, loss: Tensor) -> bool:
        """Note the loss on a CPU, where that is free; return whether to look closer: it is bad, or counts wait."""
        if self.device.type != "cpu":
            return False
        self.last_loss = loss.item()
        return bool(self.counts) or not math.isfinite(self.last_loss)

    def read_losses(self, number: int, batch: Any = None) -> None:
        """Read the losses that wait on the device, up to that of batch `number`; raise NonFiniteLoss if one is."""
        losses = self.means.read()
        self.compare_counts()
        for position, loss in enumerate(losses, start=number - len(losses) + 1):
            if not math.isfinite(loss):
                raise NonFiniteLoss(f"the loss is {loss} in batch {position}{self.blame(batch)}; {ADVICE}")
        self.last_loss = next((loss for loss in reversed(losses) if loss), self.last_loss)

    def blame(self, batch: Any) -> str:
        """Return which module made the first NaN or infinite value, or nothing if that is not found."""
        if batch is None or distributed.is_sharded(self.model):
            return ""
        wrapped, self.model = self.model, distributed.unwrap(self.model)

        def loss() -> Tensor:
            with autocast(self.device, self.precision):
                return self.compute_loss(batch)[0]

        try:
            with contextlib.suppress(Exception):  # the search for the cause must not hide the error itself
                culprit = find_nonfinite(self.model, loss)
                return f"; {culprit}" if culprit else ""
        finally:
            self.model = wrapped
        return ""

    @contextlib.contextmanager
    def noted_failures(self) -> Iterator[None]:
        """Note on an error when it came, and from which save it can be repeated."""
        try:
            yield
        except Interrupted:
            raise
        except Exception as error:
            ignore_dead_workers()  # of a worker that was killed the system may tell only now
            error.add_note(f"epoch {len(self.epoch_records) + 1}, after {self.step} steps")
            if self.saved_at is not None:
                error.add_note(f"saved {self.step - self.saved_at[1]} steps before: {self.saved_at[0]}")
            raise

    def compare_counts(self) -> None:
        """Raise ValueError if `count_targets` differs from the class targets that `compute_loss` returned."""
        counts, self.counts = self.counts, []
        numbers = evaluation.fetch([tensor for tensor, _ in counts])
        for expected, (_, given) in zip(numbers, counts, strict=True):
            if not math.isclose(expected, given, rel_tol=1e-5):
                raise ValueError(
                    f"the loss of this batch is a mean over {expected:g} targets, but count_targets(batch) returned "
                    f"{given:g}; override count_targets to return the former"
                )

    def agree(self, count: float, batches: int, broken: bool) -> float:
        """Exchange counts and signals with the other processes; return the count of all."""
        parts = distributed.all_gather([count, batches, self.signum, broken])
        counts, lengths, signums, breaks = zip(*parts, strict=True)
        self.agreed_signum = int(max(signums))
        if any(breaks):
            raise Interrupted(self.agreed_signum)  # before this window, in which a part is missing
        if len(set(lengths)) > 1:
            raise ValueError(
                f"the processes' loaders gave {', '.join(f'{n:g}' for n in lengths)} batches for one step in epoch "
                f"{self.epoch + 1}; give every process equally many"
            )
        return math.fsum(counts)

    def draw(self, batches: Iterator) -> tuple[list[Any], bool]:
        """Return the next `accumulate` batches, or fewer at the end, and whether a signal broke the loader."""
        try:
            return list(itertools.islice(batches, self.accumulate)), False
        except (RuntimeError, EOFError, OSError) as error:
            if self.signum:  # sent to the whole process group, it has ended the loader's workers too
                if distributed.world_size() == 1:
                    raise Interrupted(self.signum) from None
                if not hasattr(self.loader, "load_state_dict"):  # such a loader would be ahead on other processes
                    return [], True
            if isinstance(error, (EOFError, ConnectionError)):
                raise RuntimeError("a worker of the loader was killed, perhaps for want of memory") from error
            raise

    def start_loader(self, loader: Iterable) -> Iterator:
        """Return an iterator over `loader` from the batch at which this epoch stands."""
        size = evaluation.length(loader)
        if self.num_batches not in (None, size):
            warnings.warn(
                f"the loader has {size} batches, it had {self.num_batches}: is it the same data set?", stacklevel=5
            )
        self.num_batches = size
        set_epoch(loader, self.epoch)
        here = {**random_state(self.device), "generators": [g.get_state() for g in own_generators(loader)]}
        if self.epoch_start is None:
            self.epoch_start = here
            return iter(loader)
        position = self.epoch_start.get("position")
        if self.exhausted:
            return iter(())
        if position is not None:
            loader.load_state_dict(position)  # type: ignore[attr-defined]
            batches = iter(loader)
        else:  # draw the epoch's batches again, and leave out those that are done
            self.set_random_states(self.epoch_start, loader)
            batches = iter(loader)
            if self.batch == 0:
                return batches
            if sum(1 for _ in itertools.islice(batches, self.batch)) < self.batch:
                raise ValueError(
                    f"the run stopped after batch {self.batch}, the loader has fewer; is it the same data set?"
                )
        self.set_random_states(here, loader)
        return batches

    def restore_random_state(self, loader: Iterable) -> None:
        """Put back the random state of the save; not at the load, since what is done in between may draw."""
        self.loader = loader
        if self.resumed is not None:
            self.set_random_states(self.resumed["random_state"], loader)
            self.resumed = None

    def set_random_states(self, state: dict[str, Any], loader: Iterable) -> None:
        """Set the global generators, and those of `loader`."""
        set_random_state(state, self.device)
        for generator, own in zip(own_generators(loader), state["generators"], strict=False):
            generator.set_state(own)

    @contextlib.contextmanager
    def noted_signals(self) -> Iterator[None]:
        """Note the first signal, to be obeyed between two steps; a second one ends the process at once.

        Without `checkpoint_dir` there is nothing to save, and outside the main thread Python allows no handlers. A
        signal that the process ignores stays ignored.
        """
        owner = os.getpid()

        def note(signum: int, frame: object) -> None:
            if os.getpid() != owner:  # a loader's forked worker: its parent decides when it ends
                return
            if self.signum:
                for worker in multiprocessing.active_children():  # alone they would notice seconds later
                    worker.kill()
                signal.signal(signum, signal.SIG_DFL)
                os.kill(owner, signum)
            self.signum = signum
            ignore_dead_workers()  # the signal may have ended them too; torch would raise amid a step

        before = {}
        if self.checkpoint_dir and threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
                number = getattr(signal, name, None)
                if number is None or signal.getsignal(number) in (None, signal.SIG_IGN):
                    continue
                before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            self.signum = self.agreed_signum = 0
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_if_signalled(self) -> None:
        """Raise Interrupted if a signal was noted; of several processes all do so after the same step."""
        signum = self.signum if distributed.world_size() == 1 else self.agreed_signum
        if signum:
            raise Interrupted(signum)

    def signalled_in_validation(self) -> bool:
        """Return whether to break off validation; a sharded model needs all processes in each batch, so they agree."""
        if distributed.is_sharded(self.model):
            self.signum = int(max(signum for (signum,) in distributed.all_gather([self.signum])))
        return bool(self.signum)

    # Save and resume.

    def save(self) -> Path:
        """Save the state under its step in `checkpoint_dir`; return the path. All processes call it, one writes."""
        if self.checkpoint_dir is None:
            raise ValueError("give the Trainer a checkpoint_dir to save in")
        self.read_losses(self.batch)
        self.check_weights()
        state = self.state_dict()
        path = self.write(lambda folder: checkpoint.save_step(state, folder, self.step))
        self.saved_at = (path, *self.position())
        return path

    def save_best(self, values: dict[str, float]) -> None:
        """Save the judged weights as best.pt: for use, not for a resume."""
        weights, optimizer = distributed.full_state(self.model, self.optimizer)
        best = {
            "epoch": self.epoch,
            "step": self.step,
            "run_id": self.run_id,
            "loss": values.get("val_loss", values["train_loss"]),
            "metrics": values,
            "model_state_dict": weights if self.averages is None else distributed.full_weights(self.evaluated_model),
            "optimizer_state_dict": optimizer,
            "metadata": self.metadata,
        }
        self.write(lambda folder: checkpoint.save_checkpoint(best, folder / "best.pt"))

    def write(self, save: Callable[[Path], Any]) -> Any:
        """Call `save(checkpoint_dir)` on rank 0, after `before_save`; return its result or raise its error on all."""
        assert self.checkpoint_dir is not None
        folder = self.checkpoint_dir

        def checked() -> Any:
            for check in self.before_save:
                check(self)
            checkpoint.make_folder(folder)
            return save(folder)

        return distributed.on_main(checked)

    def is_saved(self) -> bool:
        """Return whether the state at hand is saved already."""
        return self.saved_at is not None and self.saved_at[1:] == self.position() and self.pending is None

    def position(self) -> tuple[int, int, int]:
        """Return how far the training is: steps, epochs that were validated, batches of this epoch."""
        return self.step, len(self.epoch_records), self.batch

    def resume(self) -> Path | None:
        """Load the newest intact checkpoint of `checkpoint_dir`; return its path, or None if there is none.

        Raise CheckpointError if there are some and none is intact, if it does not fit this Trainer, or if best.pt is
        missing, damaged or another run's.
        """
        if self.checkpoint_dir is None:
            raise ValueError("give the Trainer a checkpoint_dir to resume from")
        folder = self.checkpoint_dir
        found = distributed.on_main(lambda: checkpoint.load_latest(folder))
        if found is None:
            return None
        distributed.on_main(lambda: check_best(folder / "best.pt", found[1]))
        path, state = found
        try:
            self.load_state_dict(state)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            text = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise checkpoint.CheckpointError(f"{path}: does not fit: {text}; resume with the same set-up") from error
        self.saved_at = (path, *self.position())
        return path

    def state_dict(self) -> dict[str, Any]:
        """Return everything the run depends on, as tensors and plain values. A subclass adds what it keeps.

        Of several processes all must call it; the weights of a sharded model are gathered on rank 0.
        """
        weights, optimizer = distributed.full_state(self.model, self.optimizer)
        losses = [values[-1] for name in ("val_loss", "train_loss") if (values := self.history.get(name))]
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "run_id": self.run_id,
            "loss": next((loss for loss in losses if loss is not None), self.last_loss),
            "history": {name: list(values) for name, values in self.history.items()},
            "epoch_records": list(self.epoch_records),
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
            "skipped_in_a_row": self.skipped_in_a_row,
            "exhausted": self.exhausted,
            "num_batches": self.num_batches,
            "pending": self.pending,
            "model_state_dict": weights,
            "optimizer_state_dict": optimizer,
            "parts": {name: part.state_dict() for name, part in self.parts().items()},
            "early_stopping": self.early_stopping.state_dict() if self.early_stopping is not None else None,
            "kinds": self.kinds(),
            "metadata": self.metadata,
            "ranks": distributed.gather_objects(self.rank_state()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state` exactly, whatever draws random numbers before `fit`. Raise if it does not fit."""
        if state["kinds"] != self.kinds():
            raise ValueError(f"it was saved with {state['kinds']}, this Trainer has {self.kinds()}")
        weights, optimizer = state["model_state_dict"], state["optimizer_state_dict"]
        distributed.load_full_state(self.model, self.optimizer, weights, optimizer)
        for name, part in self.parts().items():
            part.load_state_dict(state["parts"][name])
        if self.early_stopping is not None and state["early_stopping"] is not None:
            self.early_stopping.load_state_dict(state["early_stopping"])
        self.epoch = state["epoch"]
        self.batch = state["batch"]
        self.step = state["step"]
        self.run_id = state["run_id"]
        self.history = {name: list(values) for name, values in state["history"].items()}
        self.epoch_records = list(state["epoch_records"])
        self.best_score = state["best_score"]
        self.best_epoch = state["best_epoch"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.exhausted = state["exhausted"]
        self.num_batches = state["num_batches"]
        self.pending = state["pending"]
        self.load_rank_state(state["ranks"])

    def rank_state(self) -> dict[str, Any]:
        """Return what differs between processes: means, random state, the loader's position, BatchNorm's statistics."""
        if self.resumed is not None:  # nothing was trained since the load
            return self.resumed
        start = self.epoch_start
        if start is not None and hasattr(self.loader, "state_dict") and hasattr(self.loader, "load_state_dict"):
            start = {"position": self.loader.state_dict()}
        generators = [g.get_state() for g in own_generators(self.loader)]
        several = distributed.world_size() > 1 and not distributed.is_sharded(self.model)
        buffers = distributed.unwrap(self.model).named_buffers() if several else ()
        return {
            "means": self.means.sums,
            "random_state": {**random_state(self.device), "generators": generators},
            "epoch_start": start,
            "buffers": {name: buffer.clone() for name, buffer in buffers},
        }

    def load_rank_state(self, ranks: list[dict[str, Any]]) -> None:
        """Load this process's part, exactly if as many processes saved; else begin new random streams and say so."""
        rank = distributed.rank()
        if len(ranks) == distributed.world_size():
            self.resumed = ranks[rank]
            self.means = Means(self.resumed["means"])
        else:
            if distributed.is_main():
                warnings.warn(
                    f"saved by {len(ranks)} processes, continued by {distributed.world_size()}: the batches stay the "
                    "same, the random numbers drawn by the model do not",
                    stacklevel=4,
                )
            self.means = Means.sum_of(part["means"] for part in ranks) if rank == 0 else Means()
            self.resumed = ranks[0] | {"buffers": {}, "means": self.means.sums}
            if rank:
                torch.manual_seed(torch.initial_seed() + rank)
                self.resumed["random_state"] = self.resumed["random_state"] | random_state(self.device)
        self.epoch_start = self.resumed["epoch_start"]
        own = dict(distributed.unwrap(self.model).named_buffers())
        for name, buffer in self.resumed["buffers"].items():
            own[name].copy_(buffer)

    def parts(self) -> dict[str, Any]:
        """Return what else has a state: scheduler, averages, loss scaler, a criterion that learns."""
        learning = isinstance(self.criterion, nn.Module) and any(True for _ in self.criterion.parameters())
        parts = {
            "scheduler": self.scheduler,
            "averages": self.averages,
            "scaler": self.scaler if self.scaler.is_enabled() else None,
            "criterion": self.criterion if learning else None,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def kinds(self) -> dict[str, str]:
        """Return the kinds of the optimizer and of `parts`, which must be the same at a resume."""
        return {name: type(part).__name__ for name, part in {"optimizer": self.optimizer, **self.parts()}.items()}

    # Checks, with messages that say what was expected and what came.

    def check_setup(self) -> None:
        """Raise ValueError for arguments that cannot be trained with."""
        default_loss = type(self).compute_loss is Trainer.compute_loss
        reduction = getattr(self.criterion, "reduction", "mean")
        if default_loss and reduction not in ("mean", "batchmean"):
            raise ValueError(f"the criterion must have reduction='mean', got {reduction!r}; else override compute_loss")
        if default_loss and self.criterion is None:
            raise ValueError("criterion=None needs a subclass that overrides compute_loss")
        for name in self.metrics.keys() & {"loss", "grad_norm"}:
            raise ValueError(f"a metric cannot be named {name!r}; choose another name")
        if self.scheduler_interval not in ("step", "epoch"):
            raise ValueError(f"scheduler_interval must be 'step' or 'epoch', got {self.scheduler_interval!r}")
        for name in ("accumulate", "clip_norm", "clip_value", "save_every", "log_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.save_every and self.checkpoint_dir is None:
            raise ValueError(f"save_every={self.save_every} needs a checkpoint_dir to save in")
        judged = self.metrics.keys() | ({"loss", "acc"} if evaluation.is_classification(self.criterion) else {"loss"})
        names = {"grad_norm", *(f"{part}_{name}" for part in ("train", "val") for name in judged)}
        if self.monitor not in names:
            raise ValueError(f"monitor={self.monitor!r} will have no value; there are {', '.join(sorted(names))}")
        self.check_optimizer()
        plateau = self.scheduler if isinstance(self.scheduler, ReduceLROnPlateau) else None
        if plateau is not None and self.scheduler_interval == "step":
            raise ValueError("ReduceLROnPlateau needs the value of an epoch; use scheduler_interval='epoch'")
        if self.early_stopping is not None and getattr(self.early_stopping, "mode", "") is None:
            self.early_stopping.mode = self.mode
        for watcher in (self.early_stopping, plateau):
            mode = getattr(watcher, "mode", self.mode)
            if mode != self.mode:
                raise ValueError(f"{type(watcher).__name__} has mode={mode!r}, {self.monitor} needs mode={self.mode!r}")
        if distributed.is_sharded(self.model) and (self.averages is not None or self.precision == "fp16"):
            raise ValueError("averages and fp16 do not work with a sharded model; use DDP, or leave them out")

    def check_optimizer(self) -> None:
        """Raise ValueError for an optimizer that trains something else, or that needs a closure."""
        own = {id(parameter) for parameter in self.model.parameters()}
        if not any(id(parameter) in own for parameter in self.trained_parameters()):
            raise ValueError("the optimizer holds none of the model's parameters; make it from model.parameters()")
        closure = inspect.signature(type(self.optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(f"{type(self.optimizer).__name__} needs a closure for each step; use another optimizer")

    def check_fit(self, val_loader: Iterable | None) -> None:
        """Warn if the monitored value will be one of training; refuse what could not be saved, and a run's folder."""
        plateau = isinstance(self.scheduler, ReduceLROnPlateau)
        decides = plateau or self.early_stopping is not None or self.checkpoint_dir is not None
        if val_loader is None and self.monitor.startswith("val_") and decides:
            name = self.monitor.replace("val_", "train_")
            warnings.warn(f"there is no validation loader: {name} is monitored instead of {self.monitor}", stacklevel=3)
        folder = self.checkpoint_dir
        if folder and self.saved_at is None:  # not before the second of two fits
            if distributed.on_main(lambda: bool(checkpoint.saved_steps(folder))):
                raise ValueError(f"{folder}: holds an earlier run; call resume(), or give another folder")
            with tempfile.TemporaryDirectory() as trial:  # to refuse now what a save would refuse after an epoch
                checkpoint.save_checkpoint({"metadata": self.metadata}, Path(trial, "metadata"))

    def check_training_loader(self, loader: Any) -> None:
        """Raise ValueError for an iterator, and for what would train several processes wrongly."""
        if isinstance(loader, Iterator):
            raise ValueError(
                "the training loader is an iterator, which can be read only once; give a DataLoader or list"
            )
        processes = distributed.world_size()
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 and processes == 1:
            raise ValueError(f"WORLD_SIZE is {started}, but there is no process group; use distributed.process_group")
        if processes == 1:
            return
        if not distributed.is_wrapped(self.model):
            raise ValueError("several processes train one model: wrap it with distributed.replicate or shard")
        if "criterion" in self.parts():
            raise ValueError("processes do not exchange gradients of a criterion; move its parameters into the model")
        sampler = distributed_sampler(loader)
        if sampler is None and not getattr(loader, "sharded", False):
            raise ValueError(
                "every process would train on the same batches; use TensorLoader or a DataLoader with a "
                "DistributedSampler, or set loader.sharded = True"
            )
        size = getattr(loader, "batch_size", None)
        samples = evaluation.length(getattr(loader, "dataset", None))
        if size and samples and not getattr(loader, "drop_last", False):
            whole = size * (processes if sampler is not None else 1)
            if samples % whole:
                raise ValueError(f"{samples} samples are no whole number of batches of {whole}; use drop_last=True")

    def check_validation_loader(self, loader: Any) -> None:
        """Raise ValueError for what would judge several processes wrongly."""
        if isinstance(loader, Iterator):
            raise ValueError(
                "the validation loader is an iterator, which can be read only once; give a DataLoader or list"
            )
        if loader is self.loader and self.epoch_start is not None:
            raise ValueError("in the middle of an epoch the training loader cannot be validated; give another one")
        sampler = distributed_sampler(loader)
        if sampler is not None and len(loader.dataset) % sampler.num_replicas:
            raise ValueError(
                "the validation sampler counts samples twice or not at all; use TensorLoader, or one subset each"
            )
        if distributed.is_sharded(self.model) and (sampler is not None or getattr(loader, "world_size", 1) > 1):
            raise ValueError(
                "with a sharded model every process reads all validation data: TensorLoader(…, world_size=1)"
            )

    def check_loss(self, loss: Any, outputs: Any, targets: Any) -> None:
        """Raise ValueError if the loss cannot be trained; warn if outputs (B, 1) may be broadcast with targets (B,)."""
        both = isinstance(outputs, Tensor) and isinstance(targets, Tensor) and targets.is_floating_point()
        if both and outputs.numel() == targets.numel() and outputs.shape != targets.shape:
            warnings.warn(
                f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in shape; the criterion may "
                "broadcast them to all pairs",
                stacklevel=4,
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise ValueError(f"compute_loss must return a loss of one number, got {describe(loss)}")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError("the loss depends on no parameter that requires a gradient; is everything frozen?")

    def check_weights(self) -> None:
        """Raise NonFiniteLoss if a trainable weight is NaN or infinite: such a state is never saved."""
        weights = [p.detach() for p in self.model.parameters() if p.requires_grad]
        if distributed.is_sharded(self.model):
            weights = [weight.to_local() for weight in weights]  # type: ignore[attr-defined]
        finite = bool(torch.stack([weight.isfinite().all() for weight in weights]).all())
        if not all(flag for (flag,) in distributed.all_gather([finite])):
            raise NonFiniteLoss(f"a weight is NaN or infinite, so nothing is saved; {ADVICE}")


def check_best(path: Path, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless `path` holds the best weights that a run with this saved state relies on."""
    if state["best_epoch"] is None:
        return
    if not path.exists():
        raise checkpoint.CheckpointError(f"{path}: missing, the run's best weights; put it back, or start a new run")
    if checkpoint.load_checkpoint(path).get("run_id") != state["run_id"]:
        raise checkpoint.CheckpointError(f"{path}: from another run; put this run's back, or start a new one")


def monitored(monitor: str | tuple[str, str]) -> tuple[str, str]:
    """Return the monitored name and its direction, "min" or "max"."""
    if isinstance(monitor, str):
        if monitor.endswith("loss"):
            return monitor, "min"
        if monitor.endswith("acc"):
            return monitor, "max"
        raise ValueError(f"monitor={monitor!r}: say what is better: ({monitor!r}, 'min') or ({monitor!r}, 'max')")
    name, mode = monitor
    if mode not in ("min", "max"):
        raise ValueError(f"monitor must be (name, 'min') or (name, 'max'), got {monitor!r}")
    return name, mode


@contextlib.contextmanager
def equal_shapes() -> Iterator[None]:
    """Raise ValueError where torch only warns that outputs (B, 1) and targets (B,) are broadcast to (B, B)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Using a target size")
        try:
            yield
        except UserWarning as warning:
            raise ValueError(f"outputs and targets must have the same shape: {warning}") from None


def ignore_dead_workers() -> None:
    """Take away the handler by which torch raises an error when a worker of a loader has ended."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return
    if callable(signal.getsignal(signal.SIGCHLD)):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def refuse_together(check: Callable[[Any], None], loader: Any) -> None:
    """Call `check(loader)`. If it raises ValueError in one of several processes, raise that in all."""
    problem = ""
    try:
        check(loader)
    except ValueError as error:
        problem = str(error)
    for text in distributed.gather_objects(problem):
        if text:
            raise ValueError(text)


def own_generators(loader: Any) -> list[torch.Generator]:
    """Return the torch generators of `loader` and of its samplers, each once."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    found = [getattr(part, "generator", None) for part in (loader, getattr(loader, "sampler", None), sampler)]
    return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))


@contextlib.contextmanager
def preserved_generators(loader: Any) -> Iterator[None]:
    """Draw inside from the loader's own generators; afterwards they are where they were."""
    states = [(generator, generator.get_state()) for generator in own_generators(loader)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the epoch to `loader`, its samplers and its data set, as far as they want to know it."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    parts: tuple[Any, ...] = (loader, *samplers, data_set(loader))
    for part in parts:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def data_set(loader: Any) -> Any:
    """Return the data set of `loader`, or that of which it is a Subset; None if it has none."""
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def distributed_sampler(loader: Any) -> Any:
    """Return the DistributedSampler (or one like it) of a DataLoader, or None."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        if hasattr(sampler, "num_replicas"):
            return sampler
    return None


def describe(value: Any) -> str:
    """Return a short description of `value` for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)} parts"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(str, value)):.80}"
    return f"{type(value).__name__} {value!s:.80}"
