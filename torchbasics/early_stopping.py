"""EarlyStopping: say when training no longer improves."""

from __future__ import annotations

import math


class EarlyStopping:
    """Called once per epoch with a score; answers whether to stop.

    A score improves if it beats the best so far by more than `delta` (below `best - delta` for `mode="min"`, above
    `best + delta` for `mode="max"`). After `patience` scores in a row without an improvement the answer is True.
    A NaN or infinite score never is an improvement. No stop is given before `min_epochs` scores were seen.

    Attributes: `best_score` and `best_epoch` (index of the call, from 0), `counter` (scores since the best),
    `improved` (whether the last score was the best), `early_stop`, `reason` (the stop in words, else "").

    >>> stopper = EarlyStopping(patience=2)
    >>> [stopper(loss) for loss in (1.0, 0.9, 0.95, 0.9)]
    [False, False, False, True]
    >>> stopper.reason
    'no improvement on 0.9 (epoch 2) for 2 epochs'
    """

    def __init__(self, patience: int = 7, delta: float = 0, mode: str = "min", *, min_epochs: int = 0) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        if patience < 0 or min_epochs < 0:
            raise ValueError(f"patience and min_epochs must not be negative, got {patience} and {min_epochs}")
        if not (delta >= 0 and math.isfinite(delta)):
            raise ValueError(f"delta must be finite and not negative, got {delta}")
        self.patience, self.delta, self.mode, self.min_epochs = patience, delta, mode, min_epochs
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self.counter = 0
        self.epochs_seen = 0
        self.improved = False

    def __call__(self, score: float) -> bool:
        """Takes the next score; returns whether to stop."""
        score = float(score)
        self.improved = math.isfinite(score) and (self.best_score is None or self._beats(score, self.best_score))
        if self.improved:
            self.best_score, self.best_epoch, self.counter = score, self.epochs_seen, 0
        else:
            self.counter += 1
        self.epochs_seen += 1
        return self.early_stop

    def _beats(self, score: float, best: float) -> bool:
        return score < best - self.delta if self.mode == "min" else score > best + self.delta

    # Derived from the counts, never latched: so a run resumed with more patience goes on, and one that had stopped
    # stays stopped without training one epoch more.
    @property
    def early_stop(self) -> bool:
        """Whether to stop now."""
        return self.counter > 0 and self.counter >= self.patience and self.epochs_seen >= max(self.min_epochs, 1)

    @property
    def reason(self) -> str:
        """Why it stops, in words; empty as long as it does not."""
        if not self.early_stop:
            return ""
        if self.best_score is None:
            return f"no finite score in {self.epochs_seen} epochs"
        assert self.best_epoch is not None
        return f"no improvement on {self.best_score:.6g} (epoch {self.best_epoch + 1}) for {self.counter} epochs"

    def state_dict(self) -> dict:
        """What was seen so far; patience, delta and mode are the constructor's and are not part of it."""
        names = ("best_score", "best_epoch", "counter", "epochs_seen", "improved")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from `state`; raises ValueError if it is not the state of an EarlyStopping."""
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"not the state of an EarlyStopping: expected the keys {sorted(self.state_dict())}, "
                f"got {sorted(map(str, state))}"
            )
        for name, value in state.items():
            setattr(self, name, value)
