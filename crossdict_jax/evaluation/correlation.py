"""Pearson correlations from weighted sums, of the whole split and of every resample at once."""

from __future__ import annotations

import numpy as np

from crossdict_jax.stats import Estimate, Resamples

ROUNDING = 1e-12  # a variance below this share of the second moment is float64 rounding
DOCUMENTS = 256  # whose sums wait to be added to all resamples in one product


class Moments:
    """Sums of p, t, p^2, t^2 and p t per feature, float64 [5, 1 + count, width].

    Row 0 is the whole split, the others are the bootstrap resamples. Memory does not grow with
    the number of rows or documents.
    """

    def __init__(self, resamples: Resamples, width: int):
        whole = np.ones((1, resamples.n_documents))
        self._index = resamples.index
        self._weights = np.concatenate([whole, resamples.weights])  # [1 + count, documents]
        self._rows = self._weights @ resamples.per_document(np.ones(len(resamples.index)))
        self._sums = np.zeros((5, len(self._weights), width))
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []  # documents, their sums
        self._n_waiting = 0

    def by_document(self, rows: slice, p: np.ndarray, t: np.ndarray) -> tuple:
        """Returns a block's (documents, sums [5, documents, width]) for ``add``.

        Args:
          rows: which rows of the split p and t [block, width] are; each feature of either may be
            less a constant, the same in every block.
        """
        documents, place = np.unique(self._index[rows], return_inverse=True)
        which = (place[None, :] == np.arange(len(documents))[:, None]).astype(np.float64)
        return documents, np.stack([which @ z for z in (p, t, p * p, t * t, p * t)])

    def add(self, documents: np.ndarray, sums: np.ndarray) -> None:
        """Adds what ``by_document`` returned, once for every block."""
        self._waiting.append((documents, sums))
        self._n_waiting += len(documents)
        if self._n_waiting >= DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        documents = np.concatenate([documents for documents, _ in self._waiting])
        sums = np.concatenate([sums for _, sums in self._waiting], axis=1)
        self._sums += self._weights[:, documents] @ sums
        self._waiting, self._n_waiting = [], 0

    def correlations(self) -> np.ndarray:
        """Returns [1 + count, width]: 0 for a constant p, NaN for a constant t."""
        if self._waiting:
            self._flush()
        with np.errstate(invalid="ignore", divide="ignore"):
            p, t, pp, tt, pt = self._sums / self._rows[None, :, None]
        variance_p, variance_t = pp - p * p, tt - t * t
        varies_p, varies_t = variance_p > ROUNDING * pp, variance_t > ROUNDING * tt
        both = varies_p & varies_t
        scale = np.sqrt(np.where(both, variance_p * variance_t, 1.0))
        r = np.where(both, np.clip((pt - p * t) / scale, -1, 1), 0.0)
        return np.where(varies_t, r, np.nan)


def mean_over(correlations: np.ndarray, live: np.ndarray) -> Estimate | None:
    """Returns the mean over the live features [width], or None if there is none.

    In a resample, features whose target is constant there are left out.
    """
    if not live.any():
        return None
    r = correlations[:, live]
    defined = np.isfinite(r)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(defined, r, 0.0).sum(axis=1) / defined.sum(axis=1)
    return Estimate(float(means[0]), means[1:])


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Returns the Pearson correlation of two vectors, or None where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / scale, -1, 1)) if scale else None
