"""From effects of many directions to what is specific: doses, controls, p-values, discoveries."""

from __future__ import annotations

import numpy as np


def at_budget(kl: np.ndarray, values: np.ndarray, budget: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns (values, KL) of every direction at the dose that spends a KL budget.

    The dose curve starts at no dose, no KL and no effect, and is taken to be straight between
    doses. A direction that never spends the budget is taken at its largest dose.

    Args:
      kl: [directions, doses, n], nats; its mean over n is what is spent.
      values: [directions, doses, n].
      budget: nats.

    Returns:
      [directions, n] and [directions].
    """
    kl, values = (np.pad(a, ((0, 0), (1, 0), (0, 0))) for a in (kl, values))
    spent = kl.mean(-1)  # [directions, 1 + doses]
    reached = spent >= budget
    after = np.where(reached.any(1), reached.argmax(1), spent.shape[1] - 1)
    rows = np.arange(len(kl))
    low, high = spent[rows, after - 1], spent[rows, after]
    share = np.clip((budget - low) / np.maximum(high - low, 1e-30), 0, 1)
    share = np.where(reached.any(1), share, 1.0)
    mixed = values[rows, after - 1] + share[:, None] * (
        values[rows, after] - values[rows, after - 1]
    )
    return mixed, low + share * (high - low)


def pooled_p(effects: np.ndarray, nulls: np.ndarray) -> np.ndarray:
    """Returns one-sided p-values [features]: how often a control does as much.

    Each feature's effect is standardised by its own controls, each control by the other ones of
    its feature; these are then pooled over features, so that p can be small: (1 + how many
    controls reach the effect) / (1 + controls).

    Args:
      effects: [features].
      nulls: [features, controls], 3 controls or more.
    """
    n = nulls.shape[1]
    total, square = nulls.sum(1, keepdims=True), np.square(nulls).sum(1, keepdims=True)
    others = (total - nulls) / (n - 1)
    spread = (square - np.square(nulls)) / (n - 1) - np.square(others)
    pooled = np.sort(_standardised(nulls - others, spread * (n - 1) / (n - 2)).ravel())
    own = _standardised(effects - nulls.mean(1), nulls.var(1, ddof=1))
    at_least = len(pooled) - np.searchsorted(pooled, own, side="left")
    return (1 + at_least) / (1 + len(pooled))


def _standardised(difference: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return difference / np.sqrt(np.maximum(variance, 1e-20))
