"""EarlyStopping: say when training no longer improves."""

from __future__ import annotations

import math
from typing import Any


class EarlyStopping:
    """Take one score per epoch and answer whether to stop.

    A score improves if it beats the best so far by more than `delta`: below `best - delta` if `mode` is "min", above
    `best + delta` if it is "max". With `mode=None` the Trainer sets the direction of what it monitors; used alone,
    "min". The answer is True after `patience` scores in a row without an improvement, but not before `min_epochs`
    scores. A NaN or infinite score is never an improvement.

    Attributes: `best_score` and `best_epoch` (the index of its call, from 0), `counter` (scores since the best),
    `early_stop`, `reason` (why it stops, else "").

    >>> stopper = EarlyStopping(patience=2)
    >>> [stopper(loss) for loss in (1.0, 0.9, 0.95, 0.9)]
    [False, False, False, True]
    >>> stopper.reason
    'no improvement on 0.9 (epoch 2) for 2 epochs'
    """

    def __init__(
        self, patience: int = 7, delta: float = 0, mode: str | None = None, *, min_epochs: int = 0
    ) -> None:
        if mode not in (None, "min", "max"):
            raise ValueError(f"mode must be 'min', 'max' or None, got {mode!r}")
        if patience < 0 or not delta >= 0:  # also refuses NaN
            raise ValueError(f"patience and delta must not be negative, got {patience} and {delta}")
        self.patience = patience
        self.delta = delta
        self.mode = mode
        self.min_epochs = min_epochs
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self.counter = 0
        self.epochs_seen = 0

    def __call__(self, score: float) -> bool:
        """Take the next score and return whether to stop."""
        score = float(score)
        sign = -1 if self.mode == "max" else 1
        self.counter += 1
        if math.isfinite(score) and (self.best_score is None or sign * (self.best_score - score) > self.delta):
            self.best_score = score
            self.best_epoch = self.epochs_seen
            self.counter = 0
        self.epochs_seen += 1
        return self.early_stop

    # Derived from the counts, never stored: a run that stopped stays stopped when it is resumed, and goes on if it is
    # given more patience.
    @property
    def early_stop(self) -> bool:
        """Whether to stop now."""
        return self.counter > 0 and self.counter >= self.patience and self.epochs_seen >= self.min_epochs

    @property
    def reason(self) -> str:
        """Why it stops, in words; empty as long as it does not."""
        if not self.early_stop:
            return ""
        if self.best_epoch is None:
            return f"no finite score in {self.epochs_seen} epochs"
        return f"no improvement on {self.best_score:.6g} (epoch {self.best_epoch + 1}) for {self.counter} epochs"

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen so far. Patience, delta and mode are the constructor's and not part of it."""
        return {key: getattr(self, key) for key in ("best_score", "best_epoch", "counter", "epochs_seen")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, which `state_dict` returned."""
        self.best_score = state["best_score"]
        self.best_epoch = state["best_epoch"]
        self.counter = state["counter"]
        self.epochs_seen = state["epochs_seen"]
