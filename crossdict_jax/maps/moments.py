"""Streamed moments: covariances of paired rows, and sums of rows by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax.maps.base import (
    ROWS,
    Pairs,
    Side,
    encode_rows,
    exact_matmul,
    find_tokens,
    padded,
    slices,
)


@dataclass(frozen=True)
class Products:
    """Sums over ``n`` paired rows of products of what each side differs from its baseline by.

    Attributes:
      n: rows.
      aa: sum a a', [d_a, d_a].
      ab: sum a b', [d_a, d_b].
      bb: sum |b|^2.
    """

    n: int
    aa: np.ndarray
    ab: np.ndarray
    bb: float

    def error(self, W: np.ndarray) -> float:
        """Returns the mean over rows and dimensions of (b - a W)^2."""
        total = self.bb - 2 * np.sum(W * self.ab) + np.sum(W * (self.aa @ W))
        return float(total / (self.n * self.ab.shape[1]))


@dataclass(frozen=True)
class Moments(Products):
    """Products about one centre for each side, in float64.

    Attributes:
      centre_a, centre_b: [d_a], [d_b]; as first made, the means.
      sum_a, sum_b: sum of what rows differ from the centres by; 0 about the means.
    """

    centre_a: np.ndarray
    centre_b: np.ndarray
    sum_a: np.ndarray
    sum_b: np.ndarray

    def about(self, centre_a: np.ndarray, centre_b: np.ndarray) -> Moments:
        """Returns the moments of the same rows about other centres."""
        shift_a, shift_b = self.centre_a - centre_a, self.centre_b - centre_b
        sum_a, sum_b = self.sum_a + self.n * shift_a, self.sum_b + self.n * shift_b
        return Moments(
            n=self.n,
            aa=self.aa + np.outer(self.sum_a, shift_a) + np.outer(shift_a, sum_a),
            ab=self.ab + np.outer(self.sum_a, shift_b) + np.outer(shift_a, sum_b),
            bb=self.bb + float((self.sum_b + sum_b) @ shift_b),
            centre_a=centre_a,
            centre_b=centre_b,
            sum_a=sum_a,
            sum_b=sum_b,
        )


def moments(batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Moments:
    """Returns the moments about the means of batches a [m, d_a], b [m, d_b], m at most ROWS.

    Products are float32 on the device, about the first batch's means, so that nothing cancels;
    sums over batches are float64 on the host.
    """
    total, centres, n = None, None, 0
    for a, b in batches:
        if centres is None:
            centres = tuple(np.asarray(rows, np.float32).mean(0) for rows in (a, b))
        sums = _products(padded(a, ROWS), padded(b, ROWS), len(a), *centres)
        sums = [np.asarray(s, np.float64) for s in sums]
        total = sums if total is None else [t + s for t, s in zip(total, sums)]
        n += len(a)
    aa, ab, bb, sum_a, sum_b = total
    start_a, start_b = (c.astype(np.float64) for c in centres)
    raw = Moments(n, aa, ab, float(bb), start_a, start_b, sum_a, sum_b)
    return raw.about(start_a + sum_a / n, start_b + sum_b / n)


@jax.jit
def _products(a, b, count, centre_a, centre_b) -> tuple[jax.Array, ...]:
    real = (jnp.arange(len(a)) < count)[:, None]  # padding counts for nothing
    a = jnp.where(real, a.astype(jnp.float32) - centre_a[None, :], 0.0)
    b = jnp.where(real, b.astype(jnp.float32) - centre_b[None, :], 0.0)
    return exact_matmul(a.T, a), exact_matmul(a.T, b), jnp.sum(b * b), a.sum(0), b.sum(0)


def activation_moments(a: np.ndarray, b: np.ndarray) -> Moments:
    """Returns the moments of paired activations [n, d_a] and [n, d_b]."""
    return moments((a[rows], b[rows]) for rows in slices(len(a)))


def feature_moments(pairs: Pairs) -> Moments:
    """Returns the moments of both sides' features, encoded a batch at a time."""
    sides = pairs.source, pairs.target
    return moments(
        tuple(encode_rows(side.dictionary, side.x[rows]) for side in sides)
        for rows in slices(len(pairs))
    )


class RidgePath:
    """All ridge solutions of one problem: ``W = (aa + n v penalty I)^-1 ab``.

    v is the mean variance of a, so that a penalty means the same at any scale. One
    eigendecomposition of aa serves every penalty.
    """

    def __init__(self, products: Products):
        eigenvalues, self._basis = np.linalg.eigh(products.aa)
        self._eigenvalues = np.maximum(eigenvalues, 0.0)
        self._projected = self._basis.T @ products.ab
        self._mean = self._eigenvalues.mean()

    def solution(self, penalty: float) -> np.ndarray:
        """Returns W [d_a, d_b] for a penalty in multiples of the mean variance (above 0)."""
        return self._basis @ (self._projected / self._damped(penalty)[:, None])

    def errors(self, held_out: Products, penalties: Sequence[float]) -> list[float]:
        """Returns ``held_out.error(solution(p))`` of every penalty p.

        All of them share four products of matrices: with P the projected ab and D the damped
        eigenvalues, |a W|^2 sums to sum_ij (P P')_ij (V' aa V)_ij / (D_i D_j).
        """
        explained = np.sum(self._projected * (self._basis.T @ held_out.ab), axis=1)
        squared = self._basis.T @ held_out.aa @ self._basis
        squared *= self._projected @ self._projected.T
        errors = []
        for inverse in (1 / self._damped(p) for p in penalties):
            total = held_out.bb - 2 * (explained @ inverse) + inverse @ squared @ inverse
            errors.append(float(total / (held_out.n * held_out.ab.shape[1])))
        return errors

    def directions(self, penalty: float) -> np.ndarray:
        """Returns V [d_b, d_b], orthogonal: B's directions by how much of them the map fits.

        The right singular vectors of the fitted values, in descending order, with the penalty
        taken as rows of A: the eigenvectors of W' (aa + n v penalty I) W.
        """
        weighed = self._projected / np.sqrt(self._damped(penalty))[:, None]
        _, V = np.linalg.eigh(weighed.T @ weighed)
        return V[:, ::-1]

    def _damped(self, penalty: float) -> np.ndarray:
        return self._eigenvalues + (penalty * self._mean or 1.0)  # nothing varies: divide by 1


@dataclass(frozen=True)
class TokenSums:
    """Sums of rows [n, size] by token, in float64.

    Attributes:
      ids: int32 [seen], ascending.
      counts: [seen], rows of each token.
      sums: [seen, size].
      square: sum of |row|^2 over all rows.
    """

    ids: np.ndarray
    counts: np.ndarray
    sums: np.ndarray
    square: float

    @property
    def mean(self) -> np.ndarray:
        """The mean of all rows [size]."""
        return self.sums.sum(0) / self.counts.sum()

    def shrunk(self, pseudocount: float) -> np.ndarray:
        """Returns [seen + 1, size]: means with ``pseudocount`` extra rows of the overall mean.

        The last row is that mean, for tokens never seen.
        """
        counts = self.counts[:, None]
        rows = (self.sums + pseudocount * self.mean[None, :]) / (counts + pseudocount)
        return np.concatenate([rows, self.mean[None, :]])

    def places(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the row of ``shrunk`` for each token."""
        return np.asarray(find_tokens(self.ids, tokens))


def token_sums(
    tokens: np.ndarray, rows: Callable[[np.ndarray], np.ndarray], *, size: int
) -> TokenSums:
    """Returns the sums by token of ``rows(numbers)`` -> float32 [m, size], m at most ROWS.

    Rows are visited token by token, so each batch is a few runs and nothing is scattered.
    """
    order = np.argsort(tokens, kind="stable")
    ids, counts = np.unique(tokens, return_counts=True)
    sums, square = np.zeros((len(ids), size)), 0.0
    for part in slices(len(order)):
        batch, here = rows(order[part]), np.searchsorted(ids, tokens[order[part]])
        starts = np.flatnonzero(np.diff(here, prepend=-1))
        sums[here[starts]] += np.add.reduceat(batch, starts, axis=0, dtype=np.float64)
        square += float(np.sum(np.square(batch), dtype=np.float64))
    return TokenSums(ids.astype(np.int32), counts, sums, square)


def feature_sums(tokens: np.ndarray, side: Side) -> TokenSums:
    """Returns the sums of a side's features by the given tokens [n]."""
    return token_sums(
        tokens, lambda rows: encode_rows(side.dictionary, side.x[rows]), size=side.dictionary.width
    )


def table_error(table: np.ndarray, train: TokenSums, held_out: TokenSums) -> float:
    """Returns the mean over held-out rows and features of (f - table[token])^2.

    From sums by token alone: sum |f|^2 - 2 sum_t table_t . sum_t + sum_t n_t |table_t|^2.
    """
    rows = table[train.places(held_out.ids)]  # [tokens held out, width]
    total = held_out.square - 2 * np.sum(rows * held_out.sums)
    total += np.sum(held_out.counts * np.sum(np.square(rows), axis=1))
    return float(total / (held_out.counts.sum() * rows.shape[1]))
