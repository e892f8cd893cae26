"""Streamed moments: covariances of paired rows, ridge regression from them, sums by token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax.maps.codes import Codes, sums_of_runs
from crossdict_jax.modules import padded
from crossdict_jax.ops import exact

ROWS = 4096  # rows per dispatch


def slices(n: int, size: int = ROWS) -> Iterator[slice]:
    """Yields consecutive slices that cover ``n`` rows."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


Means = tuple[np.ndarray, np.ndarray]  # of both sides, float64 [d_a] and [d_b]
Batches = Iterable[tuple[np.ndarray, np.ndarray]]  # a [m, d_a], b [m, d_b], m at most ROWS


@dataclass(frozen=True)
class Products:
    """Sums over ``n`` paired rows of products of both sides, each less its baseline."""

    n: int
    aa: np.ndarray  # sum a a', float64 [d_a, d_a]
    ab: np.ndarray  # sum a b', float64 [d_a, d_b]
    bb: float  # sum |b|^2

    def error(self, W: np.ndarray) -> float:
        """Returns the mean over rows and dimensions of (b - a W)^2."""
        total = self.bb - 2 * np.sum(W * self.ab) + np.sum(W * (self.aa @ W))
        return float(total / (self.n * self.ab.shape[1]))


def moments(
    rows: Batches | tuple[Codes, Codes], means: Means | None = None
) -> tuple[Products, Means]:
    """Returns the products of rows about ``means`` (default: their own), and these means.

    Products of batches are float32 about means of similar rows, so nothing cancels; sums are
    float64, as is all of codes, of which only the active features are multiplied.
    """
    total, centres, n = None, None, 0
    if isinstance(rows, tuple):
        a, b = (codes.astype(np.float64) for codes in rows)
        total = (a.T @ a).toarray(), (a.T @ b).toarray(), b.data @ b.data, a.sum(0), b.sum(0)
        centres, n, rows = [np.zeros(codes.shape[1]) for codes in (a, b)], a.shape[0], ()
    for a, b in rows:
        if centres is None:
            centres = means or (rows.mean(0, np.float64) for rows in (a, b))
            centres = [np.float32(mean) for mean in centres]
        sums = _products(padded(a, ROWS), padded(b, ROWS), len(a), *centres)
        sums = [np.asarray(s, np.float64) for s in sums]
        total = sums if total is None else [t + s for t, s in zip(total, sums)]
        n += len(a)
    aa, ab, bb, sum_a, sum_b = total
    centres = [np.float64(c) for c in centres]
    means = means or (centres[0] + sum_a / n, centres[1] + sum_b / n)
    # From the float32 centres to the means.
    s_a, s_b = (mean - centre for mean, centre in zip(means, centres))
    aa = aa - np.outer(sum_a, s_a) - np.outer(s_a, sum_a) + n * np.outer(s_a, s_a)
    ab = ab - np.outer(sum_a, s_b) - np.outer(s_a, sum_b) + n * np.outer(s_a, s_b)
    return Products(n, aa, ab, float(bb - 2 * sum_b @ s_b + n * s_b @ s_b)), means


@jax.jit
def _products(a, b, count, centre_a, centre_b) -> tuple[jax.Array, ...]:
    real = (jnp.arange(len(a)) < count)[:, None]  # padding counts for nothing
    a = jnp.where(real, a.astype(jnp.float32) - centre_a[None, :], 0.0)
    b = jnp.where(real, b.astype(jnp.float32) - centre_b[None, :], 0.0)
    return exact(a.T, a), exact(a.T, b), jnp.sum(b * b), a.sum(0), b.sum(0)


_spectra: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
SPECTRA = 6  # matrices of a pair of sides: of activations, codes, and each pseudocount's residuals


def spectrum(aa: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the eigenvalues and eigenvectors of a symmetric matrix.

    Those of the last SPECTRA are kept: shuffled pairs, fitted next, have the same.
    """
    key = hashlib.sha256(np.ascontiguousarray(aa)).digest()
    if key not in _spectra:
        while len(_spectra) >= SPECTRA:
            del _spectra[next(iter(_spectra))]
        _spectra[key] = np.linalg.eigh(aa)
    return _spectra[key]


@dataclass(frozen=True)
class Regression:
    """All ridge solutions ``W = (aa + n v penalty I)^-1 ab`` of b on a, on the training rows.

    v is the mean variance of a: a penalty means the same at any scale. One eigendecomposition of aa
    serves every penalty. Products are about the training rows' means.
    """

    means: Means
    train: Products
    validation: Products

    @cached_property
    def _decomposed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Eigenvalues [d_a] and eigenvectors V of aa, and V' ab."""
        eigenvalues, basis = spectrum(self.train.aa)
        return np.maximum(eigenvalues, 0.0), basis, basis.T @ self.train.ab

    def _damped(self, penalty: float) -> np.ndarray:
        """The eigenvalues plus the penalty; 1 where nothing varies."""
        eigenvalues = self._decomposed[0]
        return eigenvalues + (penalty * eigenvalues.mean() or 1.0)

    def solution(self, penalty: float) -> np.ndarray:
        """Returns W [d_a, d_b] for a penalty in multiples of the mean variance (above 0)."""
        _, basis, projected = self._decomposed
        return basis @ (projected / self._damped(penalty)[:, None])

    def errors(self, penalties: Sequence[float]) -> dict[float, float]:
        """Returns {p: ``validation.error(solution(p))``} of every penalty p.

        With P the projected ab and D the damped eigenvalues, |a W|^2 sums to
        sum_ij (P P')_ij (V' aa V)_ij / (D_i D_j): four matrix products for all penalties.
        """
        (_, basis, projected), held_out, errors = self._decomposed, self.validation, {}
        explained = np.sum(projected * (basis.T @ held_out.ab), axis=1)
        squared = basis.T @ held_out.aa @ basis * (projected @ projected.T)
        for penalty in penalties:
            inverse = 1 / self._damped(penalty)
            total = held_out.bb - 2 * (explained @ inverse) + inverse @ squared @ inverse
            errors[penalty] = float(total / (held_out.n * held_out.ab.shape[1]))
        return errors

    def directions(self, penalty: float) -> np.ndarray:
        """Returns V [d_b, d_b], orthogonal: B's directions by how much of them the map fits.

        Right singular vectors of the fitted values, descending, the penalty counted as rows of A:
        the eigenvectors of W' (aa + n v penalty I) W.
        """
        weighted = self._decomposed[2] / np.sqrt(self._damped(penalty))[:, None]
        return np.linalg.eigh(weighted.T @ weighted)[1][:, ::-1]

    def ridge(self, penalties: Sequence[float]):
        """Returns ({(penalty,): validation MSE}, penalty -> the values of its affine map)."""
        errors = {(penalty,): error for penalty, error in self.errors(penalties).items()}
        return errors, lambda penalty: self.affine(self.solution(penalty))

    def affine(self, W: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the values of an affine map with these weights."""
        return {"mean_a": self.means[0], "W": W, "mean_b": self.means[1]}


# Tried numbers of rows of the overall mean that are added to a token's own rows.
PSEUDOCOUNTS = (0.0, 1.0, 4.0, 16.0)


@dataclass(frozen=True)
class TokenSums:
    """Sums of rows [n, size] by token, in float64."""

    ids: np.ndarray  # int32 [seen], ascending
    counts: np.ndarray  # [seen], rows of each token
    sums: np.ndarray  # [seen, size]
    square: float  # sum of |row|^2 over all rows

    def shrunk(self, pseudocount: float) -> np.ndarray:
        """Returns [seen + 1, size]: means with ``pseudocount`` extra rows of the overall mean.

        The last row is that mean, for tokens never seen.
        """
        counts, mean = self.counts[:, None], self.sums.sum(0) / self.counts.sum()
        rows = (self.sums + pseudocount * mean[None, :]) / (counts + pseudocount)
        return np.concatenate([rows, mean[None, :]])

    def table(self, pseudocount: float) -> dict[str, np.ndarray]:
        """Returns the values of a token table; see ``maps.base.look_up``."""
        return {"ids": self.ids, "rows": self.shrunk(pseudocount)}

    def table_errors(self, validation: TokenSums) -> dict[float, float]:
        """Returns, by pseudocount, the mean over validation rows and features of (f - table)^2.

        From sums by token: sum |f|^2 - 2 sum_t table_t . sum_t + sum_t n_t |table_t|^2.
        """
        errors, positions = {}, find_tokens(self.ids, validation.ids, np)
        for pseudocount in PSEUDOCOUNTS:
            rows = self.shrunk(pseudocount)[positions]  # [validation tokens, size]
            total = validation.square - 2 * np.sum(rows * validation.sums)
            total += validation.counts @ np.sum(np.square(rows), axis=1)
            errors[pseudocount] = float(total / (validation.counts.sum() * rows.shape[1]))
        return errors


def find_tokens(ids, tokens, xp=jnp):
    """Returns the index of each token in the ascending ``ids``, or ``len(ids)`` if it is absent."""
    index = xp.searchsorted(ids, tokens)
    present = xp.asarray(ids)[xp.minimum(index, len(ids) - 1)] == tokens
    return xp.where(present, index, len(ids))


def token_sums(tokens: np.ndarray, rows: np.ndarray | Codes) -> TokenSums:
    """Returns the sums by token [n] of rows [n, size], an array or codes.

    An array is read token by token: each batch is a few runs, and nothing is scattered.
    """
    ids, index, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    if isinstance(rows, Codes):
        rows, n = rows.astype(np.float64), len(tokens)
        belongs = Codes((np.ones(n), (index, np.arange(n))), shape=(len(ids), n))
        sums, square = (belongs @ rows).toarray(), float(rows.data @ rows.data)
        return TokenSums(ids.astype(np.int32), counts, sums, square)
    order, sums, square = np.argsort(index, kind="stable"), np.zeros((len(ids), rows.shape[1])), 0.0
    for part in slices(len(order)):
        batch = rows[order[part]].astype(np.float32)
        runs, starts = np.unique(index[order[part]], return_index=True)
        sums[runs] += sums_of_runs(batch, starts)
        square += float(np.sum(np.square(batch), dtype=np.float64))
    return TokenSums(ids.astype(np.int32), counts, sums, square)
