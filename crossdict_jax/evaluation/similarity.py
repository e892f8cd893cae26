"""How alike two representations of the same rows are: CKA, SVCCA, RSA, mutual nearest neighbours.

All are 1 for a representation against itself. CKA, SVCCA and the neighbours do not change when a
representation is rotated or scaled, RSA hardly: they cannot tell a copy from a rotated copy, so a
high score says nothing about single features or directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax.errors import UserError
from crossdict_jax.maps.base import exact_matmul, slices

ROWS = 4096  # rows that are summed at a time
RDM_ROWS = 500  # rows whose distances RSA ranks: 124,750 pairs
VARIANCE = 0.99  # share of it that SVCCA's directions keep
NEIGHBOURS = 10
ROUNDING = 1e-10  # a direction with less than this share of the largest variance has none
LEAST_ROWS = 4  # the unbiased estimate divides by n - 3
MEASURES = ("cka", "svcca", "rsa", "mutual_knn")


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the linear CKA of x [n, d_x] and y [n, d_y], streamed, at most 1.

    CKA is the normalised HSIC (Kornblith et al. 2019), HSIC here the unbiased estimate (Song et
    al. 2012), so that independent rows give 0 on average however many columns there are. With
    centred columns, k_i = |x_i|^2 and l_i = |y_i|^2 it is

      ||X'Y||^2 + sum k sum l / ((n-1)(n-2)) - n / (n-2) sum k l,  over n (n-3),

    which needs no n x n matrix: n d_x d_y multiply-adds, and memory for X'Y.

    Raises:
      UserError: other than equally many rows, at least 4, all finite.
    """
    x, y = _checked(x, y)
    own = _hsic(x, x) * _hsic(y, y)
    return float(_hsic(x, y) / np.sqrt(own)) if own > 0 else 0.0


def _checked(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < LEAST_ROWS:
        raise UserError(
            f"Representations {list(x.shape)} and {list(y.shape)} cannot be compared; both must "
            f"be [rows, size] with the same {LEAST_ROWS} rows or more."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UserError("A representation holds a number that is not finite; leave its row out.")
    return x, y


def _hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased HSIC of linear kernels, times n (n - 3)."""
    n = len(x)
    mean_x, mean_y = (z.mean(axis=0, dtype=np.float64).astype(np.float32) for z in (x, y))
    product, sums = np.zeros((x.shape[1], y.shape[1])), np.zeros(3)
    for rows in slices(n, ROWS):
        step = _hsic_sums(x[rows] - mean_x[None, :], y[rows] - mean_y[None, :])
        product += step[0]
        sums += step[1]
    k, l_, kl = sums
    return float((product**2).sum() + k * l_ / ((n - 1) * (n - 2)) - n / (n - 2) * kl)


@jax.jit
def _hsic_sums(x, y) -> tuple[jax.Array, jax.Array]:
    k, l_ = jnp.sum(x * x, axis=1), jnp.sum(y * y, axis=1)
    return exact_matmul(x.T, y), jnp.stack([k.sum(), l_.sum(), (k * l_).sum()])


def svcca(x: np.ndarray, y: np.ndarray, *, variance: float = VARIANCE) -> float:
    """Returns the mean canonical correlation of the leading directions (Raghu et al. 2017).

    Of x [n, d_x] and y [n, d_y] are kept the fewest principal directions that hold ``variance``
    of it; the mean is over as many correlations as the smaller side has directions. It is not
    corrected for chance: with r_x and r_y directions, independent rows give up to about
    (sqrt(r_x) + sqrt(r_y)) / sqrt(n), and 1 where r_x + r_y > n. Read it beside its null.

    Raises:
      UserError: as for ``cka``.
    """
    x, y = _checked(x, y)
    return _canonical(directions(x, variance), directions(y, variance))


def directions(x: np.ndarray, variance: float = VARIANCE) -> np.ndarray:
    """Returns orthonormal columns [n, r]: the scores of the leading principal directions."""
    x = x - x.mean(axis=0, keepdims=True, dtype=np.float64)
    variances, axes = np.linalg.eigh(x.T @ x if len(x) > x.shape[1] else x @ x.T)
    variances, axes = np.maximum(variances[::-1], 0), axes[:, ::-1]
    share = np.cumsum(variances) / max(variances.sum(), np.finfo(np.float64).tiny)
    kept = int(np.searchsorted(share, variance * (1 - 1e-12))) + 1
    kept = min(kept, int((variances > ROUNDING * variances[0]).sum()))
    if len(x) <= x.shape[1]:
        return axes[:, :kept]
    return (x @ axes[:, :kept]) / np.sqrt(variances[:kept])[None, :]


def _canonical(u: np.ndarray, v: np.ndarray) -> float:
    """The mean singular value of u'v, by the smaller side's directions."""
    if not min(u.shape[1], v.shape[1]):
        return 0.0  # a side that never varies
    product = u.T @ v if u.shape[1] <= v.shape[1] else v.T @ u
    squares = np.linalg.eigvalsh(product @ product.T)
    return float(np.sqrt(np.clip(squares, 0, 1)).mean())


def rsa(x: np.ndarray, y: np.ndarray, *, seed: int = 0) -> float:
    """Returns the Spearman correlation of the dissimilarities of rows (Kriegeskorte et al. 2008).

    The dissimilarity of two rows is 1 minus their Pearson correlation over columns. Of more than
    RDM_ROWS rows of x [n, d_x] and y [n, d_y], as many are drawn by the seed.

    Raises:
      UserError: as for ``cka``.
    """
    x, y = _checked(x, y)
    drawn = _draw(len(x), RDM_ROWS, seed)
    return float(np.vdot(*(ranked(z[drawn]) for z in (x, y))))


def _draw(n: int, most: int, seed: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=seed))
    return np.sort(generator.permutation(n)[:most])


def ranked(x: np.ndarray) -> np.ndarray:
    """Returns the ranks [n, n] of the dissimilarities of rows, less their mean, of norm 1.

    Ties share their mean rank; the diagonal is 0. The product of two such sums up to Spearman's
    correlation.
    """
    x = _unit(x - x.mean(axis=1, keepdims=True))
    i, j = np.triu_indices(len(x), 1)
    dissimilarity = np.round(1 - (x @ x.T)[i, j], 6)  # what rounding sets apart is equal
    _, place, counts = np.unique(dissimilarity, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - counts / 2)[place]
    rank -= rank.mean()
    ranks = np.zeros((len(x), len(x)))
    ranks[i, j] = ranks[j, i] = rank / max(np.sqrt(2 * rank @ rank), np.finfo(np.float64).tiny)
    return ranks


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def mutual_knn(x: np.ndarray, y: np.ndarray, *, k: int = NEIGHBOURS) -> float:
    """Returns the mean share of a row's k nearest rows in x that are so in y (Huh et al. 2024).

    Nearest by cosine. Independent representations share k / (n - 1).

    Raises:
      UserError: as for ``cka``, or k is not between 1 and n - 1.
    """
    x, y = _checked(x, y)
    if not 1 <= k < len(x):
        raise UserError(f"k={k} neighbours among {len(x)} rows; k must be 1 to {len(x) - 1}.")
    return _shared(nearest(x, k), nearest(y, k))


def nearest(x: np.ndarray, k: int) -> np.ndarray:
    """Returns bool [n, n]: whether row j is among the k nearest of row i, itself left out."""
    x = _unit(x)
    cosine = x @ x.T
    np.fill_diagonal(cosine, -np.inf)
    chosen = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
    among = np.zeros(cosine.shape, bool)
    np.put_along_axis(among, chosen, True, axis=1)
    return among


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.count_nonzero(a & b) / np.count_nonzero(a))


@dataclass(frozen=True)
class Geometry:
    """Where the rows of a representation [n, d] lie to each other: all that is compared.

    n x n matrices, so for some thousand rows; comparing two costs n^2 whatever their sizes.

    Attributes:
      gram: float32 [n, n], inner products centred without bias, of norm 1 (0 if all are equal).
      directions: float64 [n, r], the leading principal directions.
      ranks: float64 [m, m], of dissimilarities, of the first RDM_ROWS rows.
      near: bool [n, n], the nearest neighbours of each row.
    """

    gram: np.ndarray
    directions: np.ndarray
    ranks: np.ndarray
    near: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> Geometry:
        """Returns the geometry of x [n, d]; for RSA its rows should be in random order.

        Raises:
          UserError: too few rows, or numbers that are not finite.
        """
        x, _ = _checked(x, x)
        near = nearest(x, min(NEIGHBOURS, len(x) - 1))
        return cls(_centred_gram(x), directions(x), ranked(x[:RDM_ROWS]), near)

    def reordered(self, order: np.ndarray) -> Geometry:
        """Returns the geometry of ``x[order]``; the rows that RSA reads stay among themselves."""
        first = order[order < len(self.ranks)]
        return Geometry(
            self.gram[order][:, order],
            self.directions[order],
            self.ranks[first][:, first],
            self.near[order][:, order],
        )

    def compared(self, other: Geometry) -> dict[str, float]:
        """Returns {measure: number} of two representations of the same rows, as in MEASURES.

        CKA, SVCCA and mutual kNN are those of the functions of that name, RSA that of the first
        RDM_ROWS rows.
        """
        return {
            "cka": float(np.vdot(self.gram, other.gram)),
            "svcca": _canonical(self.directions, other.directions),
            "rsa": float(np.vdot(self.ranks, other.ranks)),
            "mutual_knn": _shared(self.near, other.near),
        }


def _centred_gram(x: np.ndarray) -> np.ndarray:
    """The Gram matrix, U-centred: inner products of two such are unbiased HSIC (Song et al.)."""
    n = len(x)
    x = (x - x.mean(axis=0, dtype=np.float64)[None, :]).astype(np.float32)
    gram = np.asarray(exact_matmul(x, x.T), np.float64)
    np.fill_diagonal(gram, 0)
    rows = gram.sum(axis=0) / (n - 2)
    gram += rows.sum() / (n - 1) - rows[:, None] - rows[None, :]
    np.fill_diagonal(gram, 0)
    return (gram / max(np.linalg.norm(gram), np.finfo(np.float64).tiny)).astype(np.float32)
