"""Statistics: bootstrap intervals over documents, false discovery rates, shares."""

from __future__ import annotations

import dataclasses

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """Returns a random generator seeded by one or two whole numbers alone."""
    return np.random.Generator(np.random.Philox(key=key if len(key) > 1 else key[0]))


def normalised(rows: np.ndarray) -> np.ndarray:
    """Returns rows [..., d] at norm 1; a zero row stays zero."""
    norm = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1.0)


@dataclasses.dataclass(frozen=True)
class Resamples:
    """Bootstrap resamples of documents, and the document of each row.

    Attributes:
      index: int [n], each row's document, from 0 to n_documents - 1.
      weights: float64 [count, n_documents], how often a resample holds a document. Empty (count 0)
        with fewer than two documents, or if none was asked for.
    """

    index: np.ndarray
    weights: np.ndarray

    @property
    def n_documents(self) -> int:
        return self.weights.shape[1]

    def per_document(self, values: np.ndarray) -> np.ndarray:
        """Returns the sums of ``values`` [n] over each document, float64 [n_documents]."""
        return np.bincount(self.index, weights=values, minlength=self.n_documents)

    def estimate(self, numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
        """Returns the ratio of two sums over rows, from values [n]; see ``ratio`` for zeros."""
        top, bottom = self.per_document(numerator), self.per_document(denominator)
        samples = ratio(self.weights @ top, self.weights @ bottom)
        return Estimate(float(ratio(top.sum(), bottom.sum())), samples)

    def mean(self, values: np.ndarray) -> Estimate:
        """Returns the mean over rows of ``values`` [n]; NaN in a resample without a row."""
        top, rows = self.per_document(values), self.per_document(np.ones(len(self.index)))
        with np.errstate(invalid="ignore"):
            samples = (self.weights @ top) / (self.weights @ rows)
        return Estimate(float(top.sum() / rows.sum()), samples)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its bootstrap resamples [count]."""

    value: float
    samples: np.ndarray

    def __sub__(self, other: Estimate) -> Estimate:
        """The paired difference: both must come from the same resamples."""
        return Estimate(self.value - other.value, self.samples - other.samples)

    def __rsub__(self, number: float) -> Estimate:
        return Estimate(number - self.value, number - self.samples)

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """The 2.5 and 97.5 percentiles, or (None, None) without (finite) resamples."""
        if not len(self.samples) or not np.isfinite(self.samples).all():
            return None, None
        low, high = np.percentile(self.samples, (2.5, 97.5))
        return float(low), float(high)

    @property
    def surely_positive(self) -> bool:
        """Whether the whole interval lies above zero."""
        low, _ = self.interval
        return low is not None and low > 0


def draw(documents: np.ndarray, *, count: int, seed: int) -> Resamples:
    """Returns ``count`` resamples with replacement of the distinct values in ``documents`` [n]."""
    names, index = np.unique(documents, return_inverse=True)
    n = len(names)
    count = count if n > 1 else 0
    weights = generator(seed).multinomial(n, np.full(n, 1 / n), size=count).astype(np.float64)
    return Resamples(index.reshape(-1), weights.reshape(count, n))


def columns(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    """Returns ``{name: value, name_low: ..., name_high: ...}`` for a result row."""
    value, low, high = (estimate.value, *estimate.interval) if estimate else (None, None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def ratio(numerator, denominator):
    """Returns numerator / denominator; where the denominator is 0, 0 for 0 / 0 and 1 otherwise.

    So for unexplained variance a constant target is explained by a perfect prediction alone (0);
    any other gets 1, an R^2 of 0.
    """
    numerator, denominator = np.asarray(numerator), np.asarray(denominator)
    safe = np.where(denominator == 0, 1.0, denominator)
    return np.where(denominator == 0, (numerator != 0).astype(np.float64), numerator / safe)


LEAST_DAMAGE = 0.05  # nats: where zeros do less harm than this, no share of it is reported


def loss_recovered(
    edited: np.ndarray, *, clean: np.ndarray, baseline: np.ndarray, resamples: Resamples
) -> Estimate | None:
    """Returns (CE_baseline - CE_edited) / (CE_baseline - CE_clean): 1 is harmless, 0 the baseline.

    Cross-entropies in nats [n]; None if the baseline does less than LEAST_DAMAGE nats of harm.
    """
    if resamples.mean(baseline - clean).value < LEAST_DAMAGE:
        return None
    return resamples.estimate(baseline - edited, baseline - clean)


def correlation(draws: Resamples, a: np.ndarray, b: np.ndarray) -> Estimate | None:
    """Returns Pearson's r of a and b [n] over resamples of documents; None if one is constant."""
    if len(a) < 3:
        return None
    a, b = a - a.mean(), b - b.mean()
    if not a.any() or not b.any():
        return None
    sums = np.stack([draws.per_document(v) for v in (np.ones_like(a), a, b, a * a, b * b, a * b)])
    # Each [1 + count]: of all documents, then of every resample.
    n, sa, sb, aa, bb, ab = np.column_stack([sums.sum(1), sums @ draws.weights.T])
    spread = np.sqrt(np.maximum((n * aa - sa**2) * (n * bb - sb**2), 0))
    r = np.divide(n * ab - sa * sb, spread, out=np.zeros_like(spread), where=spread > 0)
    r = r.clip(-1, 1)  # beyond is rounding, of resamples with one distinct row
    return Estimate(float(r[0]), r[1:])


def pooled_p(effects: np.ndarray, nulls: np.ndarray) -> np.ndarray:
    """Returns one-sided p-values of effects [features] among nulls [features, 3 or more].

    Effects are standardised by their feature's controls, each control by its feature's others.
    Controls are then pooled over features, so that p can be small: (1 + controls that reach the
    effect) / (1 + controls).
    """
    n = nulls.shape[1]
    total, square = nulls.sum(1, keepdims=True), np.square(nulls).sum(1, keepdims=True)
    others = (total - nulls) / (n - 1)
    spread = (square - np.square(nulls)) / (n - 1) - np.square(others)
    variances = spread * (n - 1) / (n - 2), nulls.var(1, ddof=1)
    deviation, of_feature = (np.sqrt(np.maximum(v, 1e-20)) for v in variances)
    pooled = np.sort(((nulls - others) / deviation).ravel())
    scores = (effects - nulls.mean(1)) / of_feature
    at_least = len(pooled) - np.searchsorted(pooled, scores, side="left")
    return (1 + at_least) / (1 + len(pooled))
