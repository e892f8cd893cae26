"""Sparse codes on the host, and the Pearson correlations of all pairs of features, by tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from crossdict_jax.maps import Side
from crossdict_jax.maps.base import encode_rows, exact_matmul, slices

ROWS = 4096  # rows that are dense at a time
TILE = 2**24  # correlations held at a time
SPARSE_COST = 30  # multiply-adds of a dense product in the time of one sparse one, two CPU cores
ROUNDING = 1e-9  # a variance below this share of the second moment is rounding

Codes = sparse.csr_array  # float32 [n, width]


def compress(features: np.ndarray | Codes) -> Codes:
    """Returns features [n, width] as compressed rows: 8 bytes for each active feature of a row."""
    return sparse.csr_array(features, dtype=np.float32)


def encode(side: Side) -> Codes:
    """Returns the features [n, width] of a side."""
    blocks = (encode_rows(side.dictionary, side.x[rows]) for rows in slices(len(side.x), ROWS))
    return sparse.vstack([compress(block) for block in blocks], format="csr")


class SideCodes:
    """Features of sides, each encoded once: ``codes(side)`` is [n, width], in its order of rows."""

    def __init__(self):
        self._kept: dict[int, tuple[Side, Codes]] = {}  # the side is held: its id stays its own

    def __call__(self, side: Side) -> Codes:
        if side.reordered_from is not None:
            return self(side.reordered_from)[side.order]
        if id(side) not in self._kept:
            self._kept[id(side)] = side, encode(side)
        return self._kept[id(side)][1]


@dataclass(frozen=True)
class Moments:
    """Sums over the rows of codes, each [width]."""

    firings: np.ndarray  # in how many rows a feature is active
    mean: np.ndarray
    norm: np.ndarray  # the square root of n times the variance; 0 for one that never varies

    @classmethod
    def of(cls, codes: Codes) -> Moments:
        n, width = codes.shape
        values = codes.data.astype(np.float64)
        firings, total, square = (
            np.bincount(codes.indices, weights=weights, minlength=width)
            for weights in (values != 0, values, values**2)
        )
        mean = total / max(n, 1)
        about = square - n * mean**2
        norm = np.sqrt(np.where(about > ROUNDING * square, about, 0.0))
        return cls(firings.astype(np.int64), mean, norm)

    def scale(self) -> np.ndarray:
        """Returns 1 / norm, 0 for a feature that never varies."""
        return np.divide(1.0, self.norm, out=np.zeros_like(self.norm), where=self.norm > 0)

    def standardised(self, codes: Codes) -> np.ndarray:
        """Returns rows of the codes, dense float32, less their mean and over their norm."""
        dense = (codes.toarray() - self.mean[None, :]) * self.scale()[None, :]
        return dense.astype(np.float32)


def paired_products(a: Codes, b: Codes) -> np.ndarray:
    """Returns the sum over rows of column j of a times column j of b, float64 [width]."""
    a, b = (codes.astype(np.float64, copy=False) for codes in (a, b))
    return np.asarray(a.multiply(b).sum(axis=0))


def paired_correlations(a: Codes, b: Codes, products: np.ndarray | None = None) -> np.ndarray:
    """Returns the correlation of column j of a with column j of b, float64 [width]; 0 if constant.

    Args:
      products: what ``paired_products`` gives, for rows in another order than these.
    """
    products = paired_products(a, b) if products is None else products
    of_a, of_b = Moments.of(a), Moments.of(b)
    centred = products - a.shape[0] * of_a.mean * of_b.mean
    return np.clip(centred * of_a.scale() * of_b.scale(), -1, 1)


def correlation_matrix(a: Codes, b: Codes) -> np.ndarray:
    """Returns all of ``correlations`` at once, float32 [width_a, width_b]."""
    return np.concatenate([tile for _, tile in correlations(a, b)])


def correlations(a: Codes, b: Codes) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (columns of a, their correlations with all columns of b, float32 [tile, width_b]).

    0 where a feature never varies. Products are sparse, or, where codes are so dense that this
    costs more, dense ones of blocks of rows on the device.
    """
    of_a, of_b = Moments.of(a), Moments.of(b)
    pairs = np.diff(a.indptr).astype(np.int64) @ np.diff(b.indptr)
    few = pairs * SPARSE_COST < a.shape[0] * a.shape[1] * b.shape[1]
    columns = sparse.csc_array(a)
    for at in slices(a.shape[1], max(1, TILE // max(1, b.shape[1]))):
        part = Moments(of_a.firings[at], of_a.mean[at], of_a.norm[at])
        if few:
            products = (columns[:, at].T @ b).toarray()
            products -= (a.shape[0] * part.mean[:, None] * of_b.mean[None, :]).astype(np.float32)
            products *= part.scale()[:, None] * of_b.scale()[None, :]
        else:
            x, products = sparse.csr_array(columns[:, at]), 0.0
            for rows in slices(a.shape[0], ROWS):
                block = part.standardised(x[rows]), of_b.standardised(b[rows])
                products += np.asarray(exact_matmul(jnp.asarray(block[0]).T, block[1]))
        yield at, products
