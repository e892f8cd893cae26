"""How alike two representations of the same rows are: CKA, SVCCA, RSA, mutual nearest neighbours.

They do not change (RSA hardly) when a representation is rotated or scaled, so a high score says
nothing about single features or directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from crossdict_jax.errors import UserError
from crossdict_jax.maps.base import exact_matmul

RDM_ROWS = 500  # rows whose distances RSA ranks: 124,750 pairs
VARIANCE = 0.99  # share of it that SVCCA's directions keep
NEIGHBOURS = 10
ROUNDING = 1e-10  # a direction with less than this share of the largest variance has none
LEAST_ROWS = 4  # the unbiased estimate divides by n - 3
MEASURES = ("cka", "svcca", "rsa", "mutual_knn")
TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Geometry:
    """Where the rows of a representation [n, d] lie to each other: all that is compared, n x n."""

    gram: np.ndarray  # float32 [n, n], inner products centred without bias, of norm 1 (or all 0)
    directions: np.ndarray  # float64 [n, r], the leading principal directions
    ranks: np.ndarray  # [m, m], of dissimilarities of RDM_ROWS rows, less their mean, of norm 1
    near: np.ndarray  # bool [n, n], the nearest neighbours of each row

    @classmethod
    def of(cls, x: np.ndarray) -> Geometry:
        """Returns the geometry of x [n, d], whose order should be random for RSA."""
        x = np.asarray(x, np.float32)
        if x.ndim != 2 or len(x) < LEAST_ROWS:
            raise UserError(
                f"Representation {list(x.shape)} cannot be compared; it must be [rows, size] with "
                f"{LEAST_ROWS} rows or more."
            )
        if not np.isfinite(x).all():
            raise UserError("A representation holds a number that is not finite; leave it out.")
        some = x[:RDM_ROWS]
        unit = _unit(some - some.mean(axis=1, keepdims=True))
        i, j = np.triu_indices(len(some), 1)
        rank = rankdata(np.round(1 - (unit @ unit.T)[i, j], 6))  # what rounding sets apart is equal
        rank -= rank.mean()
        ranks = np.zeros((len(some), len(some)))
        ranks[i, j] = ranks[j, i] = rank / max(np.sqrt(2 * rank @ rank), TINY)
        k, unit = min(NEIGHBOURS, len(x) - 1), _unit(x)
        cosine = unit @ unit.T
        np.fill_diagonal(cosine, -np.inf)  # a row is no neighbour of itself
        near = np.zeros(cosine.shape, bool)
        np.put_along_axis(near, np.argpartition(-cosine, k - 1, axis=1)[:, :k], True, axis=1)
        n = len(x)  # U-centred, inner products of two Gram matrices are unbiased HSIC (Song et al.)
        centred = (x - x.mean(axis=0, dtype=np.float64)[None, :]).astype(np.float32)
        gram = np.asarray(exact_matmul(centred, centred.T), np.float64)
        np.fill_diagonal(gram, 0)
        rows = gram.sum(axis=0) / (n - 2)
        gram += rows.sum() / (n - 1) - rows[:, None] - rows[None, :]
        np.fill_diagonal(gram, 0)
        gram = (gram / max(np.linalg.norm(gram), TINY)).astype(np.float32)
        return cls(gram, directions(x), ranks, near)

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

        - cka: linear CKA (Kornblith et al. 2019) of the unbiased HSIC (Song et al. 2012):
          independent rows give 0 on average however many columns there are.
        - svcca: mean canonical correlation of the fewest principal directions that hold VARIANCE
          (Raghu et al. 2017), over as many as the smaller side has. Not corrected for chance: with
          r_x and r_y directions, independent rows give up to (sqrt(r_x) + sqrt(r_y)) / sqrt(n).
        - rsa: Spearman correlation of the rows' dissimilarities, 1 minus the Pearson correlation of
          two rows over columns (Kriegeskorte et al. 2008).
        - mutual_knn: mean share of a row's nearest rows by cosine in x that are so in y (Huh et
          al. 2024); independent representations share NEIGHBOURS / (n - 1).
        """
        u, v = self.directions, other.directions
        product = u.T @ v if u.shape[1] <= v.shape[1] else v.T @ u
        squares = np.linalg.eigvalsh(product @ product.T) if product.size else np.zeros(1)
        return {
            "cka": float(np.vdot(self.gram, other.gram)),
            "svcca": float(np.sqrt(squares.clip(0, 1)).mean()),
            "rsa": float(np.vdot(self.ranks, other.ranks)),
            "mutual_knn": np.count_nonzero(self.near & other.near) / np.count_nonzero(self.near),
        }


def directions(x: np.ndarray) -> np.ndarray:
    """Returns orthonormal columns [n, r]: the scores of the leading principal directions."""
    x = x - x.mean(axis=0, keepdims=True, dtype=np.float64)
    variances, axes = np.linalg.eigh(x.T @ x if len(x) > x.shape[1] else x @ x.T)
    variances, axes = np.maximum(variances[::-1], 0), axes[:, ::-1]
    share = np.cumsum(variances) / max(variances.sum(), TINY)
    kept = int(np.searchsorted(share, VARIANCE * (1 - 1e-12))) + 1
    kept = min(kept, int((variances > ROUNDING * variances[0]).sum()))
    if len(x) <= x.shape[1]:
        return axes[:, :kept]
    return (x @ axes[:, :kept]) / np.sqrt(variances[:kept])[None, :]


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)
