"""Features of all rows, encoded once and stored sparsely."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

ROUNDING = 1e-9  # a variance below this share of the second moment is rounding

Codes = sparse.csr_array  # float32 [n, width], on the host


def compress(features: np.ndarray | Codes) -> Codes:
    """Returns features [n, width] as codes: 8 bytes for each active feature."""
    return Codes(features, dtype=np.float32)


def sparse_pays(a: Codes, b: Codes, cost: float) -> bool:
    """Whether ``a.T @ b`` is faster sparse: one multiply-add takes the time of ``cost`` dense."""
    pairs = np.diff(a.indptr).astype(np.int64) @ np.diff(b.indptr)
    return pairs * cost < a.shape[0] * a.shape[1] * b.shape[1]


def sums_of_runs(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns sums of consecutive rows of values [n, width], float64 [runs, width].

    A run ends where the next one starts. Ten times as fast as ``np.add.reduceat``.
    """
    n = len(values)
    belongs = Codes((np.ones(n), np.arange(n), np.append(starts, n)), shape=(len(starts), n))
    return belongs @ values


class Moments(NamedTuple):
    """Moments of n rows of codes, [width] each."""

    n: int
    firings: np.ndarray  # int64, rows in which a feature is active
    mean: np.ndarray  # float64
    variance: np.ndarray  # float64; 0 for a constant feature

    @classmethod
    def of(cls, codes: Codes) -> Moments:
        n, width = codes.shape
        values = codes.data.astype(np.float64)
        firings, total, square = (
            np.bincount(codes.indices, weights=weights, minlength=width)
            for weights in (values != 0, values, values**2)
        )
        mean, square = total / max(n, 1), square / max(n, 1)
        variance = square - mean**2
        variance = np.where(variance > ROUNDING * square, variance, 0.0)
        return cls(n, firings.astype(np.int64), mean, variance)

    @property
    def scale(self) -> np.ndarray:
        """1 / the norm of a centred feature; 0 for a constant one."""
        norm = np.sqrt(self.n * self.variance)
        return np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)

    def standardised(self, codes: Codes) -> np.ndarray:
        """Returns rows of the codes, dense float32, centred, over the features' norms."""
        return ((codes.toarray() - self.mean[None, :]) * self.scale[None, :]).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compact:
    """The active features of rows, in equally many slots each."""

    values: jax.Array  # float32 [batch, slots], >= 0; 0: unused
    features: jax.Array  # int32 [batch, slots]; used ones are distinct in a row
    width: int = dataclasses.field(metadata={"static": True})

    def dense(self) -> jax.Array:
        """Returns the features [batch, width]."""
        rows = jnp.arange(len(self.values))[:, None]
        return jnp.zeros((len(self.values), self.width)).at[rows, self.features].add(self.values)


def compact(codes: Codes, slots: int) -> Compact:
    """Returns codes with ``slots`` slots a row, at least the active features of any row."""
    counts = np.diff(codes.indptr)
    slot = np.arange(codes.nnz) - np.repeat(codes.indptr[:-1], counts)
    at = np.repeat(np.arange(len(counts)), counts), slot
    values = np.zeros((len(counts), max(1, slots)), np.float32)
    features = np.zeros(values.shape, np.int32)
    values[at], features[at] = codes.data, codes.indices
    return Compact(values, features, codes.shape[1])
