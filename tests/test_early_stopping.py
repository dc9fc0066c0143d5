"""EarlyStopping against tables worked out by hand."""

from __future__ import annotations

import math
import unittest
from typing import Any

import torch

from torchbasics.early_stopping import EarlyStopping

NAN, INF = math.nan, math.inf

# Options, scores, the answers (S: stop), best score, its index, scores since.
ROWS: tuple[tuple[dict[str, Any], list[float], str, float | None, int | None, int], ...] = (
    ({"patience": 2}, [3, 2, 1], "---", 1, 2, 0),
    ({"patience": 2}, [1, 2, 3], "--S", 1, 0, 2),
    ({"patience": 2}, [1, 1, 1], "--S", 1, 0, 2),  # equal is no improvement
    ({"patience": 2}, [1, 2, 0.5, 2, 3], "----S", 0.5, 2, 2),  # the count starts anew
    ({"patience": 1}, [1, 2], "-S", 1, 0, 1),
    ({"patience": 0}, [3, 2, 2], "--S", 2, 1, 1),  # no patience: stop at the first that is no improvement
    # delta: strictly more than it, compared with the best and not with the last
    ({"patience": 1, "delta": 0.5}, [2, 1.5], "-S", 2, 0, 1),
    ({"patience": 1, "delta": 0.5}, [2, 1.25], "--", 1.25, 1, 0),
    ({"patience": 2, "delta": 0.5}, [2, 1.75, 1.25, 1], "----", 1.25, 2, 1),
    # negative scores: delta is an amount, not a share, so its sign cannot turn around
    ({"patience": 1, "delta": 0.5}, [-2, -2.25], "-S", -2, 0, 1),
    ({"patience": 1, "delta": 0.5}, [-2, -2.75], "--", -2.75, 1, 0),
    ({"patience": 1, "delta": 0.5, "mode": "max"}, [-2, -1.75], "-S", -2, 0, 1),
    ({"patience": 1, "delta": 0.5, "mode": "max"}, [-2, -1.25], "--", -1.25, 1, 0),
    ({"patience": 1, "delta": 0.5, "mode": "max"}, [-2, -3.0], "-S", -2, 0, 1),
    ({"patience": 2, "mode": "max"}, [0.5, 0.6, 0.6, 0.55], "---S", 0.6, 1, 2),
    # what is not finite is never best, and counts as no improvement
    ({"patience": 2}, [NAN, 1, 2, 0.5], "----", 0.5, 3, 0),
    ({"patience": 3}, [NAN, -INF, INF], "--S", None, None, 3),
    ({"patience": 2}, [1, -INF, 0.5], "---", 0.5, 2, 0),
    ({"patience": 2}, [1, NAN, NAN], "--S", 1, 0, 2),
    ({"patience": 2, "mode": "max"}, [NAN, INF, 2], "-S-", 2, 2, 0),
    # before min_epochs there is no stop, and none is kept for later
    ({"patience": 1, "min_epochs": 4}, [1, 2, 3, 4], "---S", 1, 0, 3),
    ({"patience": 1, "min_epochs": 4}, [1, 2, 3, 0.5, 0.6], "----S", 0.5, 3, 1),
    ({"patience": 3, "min_epochs": 2}, [1, 2, 3, 4], "---S", 1, 0, 3),
)


def answers(stopper: EarlyStopping, scores: list[Any]) -> list[bool]:
    return [stopper(score) for score in scores]


class Stopping(unittest.TestCase):
    def test_each_row_of_the_table(self) -> None:
        for options, scores, expected, best, index, counter in ROWS:
            with self.subTest(options=options, scores=scores):
                stopper = EarlyStopping(**options)
                self.assertEqual("".join("-S"[answer] for answer in answers(stopper, scores)), expected)
                self.assertEqual((stopper.best_score, stopper.best_epoch, stopper.counter), (best, index, counter))
                self.assertEqual(stopper.early_stop, expected[-1] == "S")
                self.assertEqual(bool(stopper.reason), stopper.early_stop)

    def test_the_defaults_are_those_of_the_tutorial(self) -> None:
        self.assertEqual(answers(EarlyStopping(), [1.0] * 8), [False] * 7 + [True])
        self.assertEqual(answers(EarlyStopping(7, 0), [1.0] * 8), [False] * 7 + [True])

    def test_a_mode_set_before_the_first_score_counts(self) -> None:
        stopper = EarlyStopping(patience=1)
        self.assertIsNone(stopper.mode)  # which tells the Trainer to set it
        stopper.mode = "max"
        self.assertEqual(answers(stopper, [0.5, 0.6, 0.55]), [False, False, True])

    def test_the_reason_is_in_words(self) -> None:
        stopper = EarlyStopping(patience=1)
        answers(stopper, [0.25, 0.5])
        self.assertEqual(stopper.reason, "no improvement on 0.25 (epoch 1) for 1 epochs")
        stopper = EarlyStopping(patience=2)
        answers(stopper, [NAN, NAN])
        self.assertEqual(stopper.reason, "no finite score in 2 epochs")

    def test_a_tensor_is_a_score(self) -> None:
        stopper = EarlyStopping(patience=1)
        self.assertEqual(answers(stopper, [*torch.tensor([1.0, 0.5, 0.75])]), [False, False, True])
        self.assertIs(type(stopper.best_score), float)

    def test_wrong_arguments_are_errors(self) -> None:
        for options, words in (
            ({"mode": "low"}, "mode must be 'min', 'max' or None, got 'low'"),
            ({"patience": -1}, "not be negative, got -1"),
            ({"delta": -0.1}, "not be negative, got 7 and -0.1"),
            ({"delta": NAN}, "delta"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                EarlyStopping(**options)  # type: ignore[arg-type]


class Resuming(unittest.TestCase):
    def test_resumed_after_any_score_the_rest_is_the_same(self) -> None:
        for options, scores, *_ in ROWS:
            whole = EarlyStopping(**options)
            expected = [(whole(score), whole.state_dict()) for score in scores]
            for done in range(len(scores) + 1):
                first, second = EarlyStopping(**options), EarlyStopping(**options)
                answers(first, scores[:done])
                second.load_state_dict(first.state_dict())
                rest = [(second(score), second.state_dict()) for score in scores[done:]]
                self.assertEqual(rest, expected[done:])

    def test_a_stopped_run_stays_stopped_unless_given_more_patience(self) -> None:
        stopped = EarlyStopping(patience=2)
        answers(stopped, [1, 2, 3])
        same, patient = EarlyStopping(patience=2), EarlyStopping(patience=4)
        for stopper in (same, patient):
            stopper.load_state_dict(stopped.state_dict())
        self.assertTrue(same.early_stop)  # without one more score
        self.assertFalse(patient.early_stop)
        self.assertEqual(answers(patient, [2, 2]), [False, True])


if __name__ == "__main__":
    unittest.main()
