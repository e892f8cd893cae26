"""How alike two representations of the same rows are: CKA, SVCCA, RSA, mutual nearest neighbours.

Rotating or scaling does not change them (RSA hardly): they say nothing about single features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.stats import rankdata

from crossdict_jax.errors import UserError
from crossdict_jax.stats import normalised

RDM_ROWS = 500  # rows whose distances RSA ranks: 124,750 pairs
VARIANCE = 0.99  # share of it that SVCCA's directions keep
NEIGHBOURS = 10
ROUNDING = 1e-10  # a direction with less than this share of the largest variance has none
EQUIDISTANT = 1e-5  # of the sum of squared products: an HSIC below it is rounding
LEAST_ROWS = 4  # the unbiased estimate divides by n - 3
MEASURES = ("cka", "svcca", "rsa", "mutual_knn")
TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Geometry:
    """Where the rows of a representation [n, d] lie to each other."""

    scores: np.ndarray  # float32 [n, min(n, d)], the centred rows in their principal directions
    norms: np.ndarray  # [r], of the leading scores, which hold VARIANCE
    ranks: np.ndarray  # [m, m], of dissimilarities of RDM_ROWS rows, centred, of norm 1
    near: np.ndarray  # int32 [n, k], the nearest neighbours of each row

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
        unit = normalised(some - some.mean(axis=1, keepdims=True))
        i, j = np.triu_indices(len(some), 1)
        rank = rankdata(np.round(1 - (unit @ unit.T)[i, j], 6))  # ties up to rounding
        rank -= rank.mean()
        ranks = np.zeros((len(some), len(some)))
        ranks[i, j] = ranks[j, i] = rank / max(np.sqrt(2 * rank @ rank), TINY)
        k, unit = min(NEIGHBOURS, len(x) - 1), normalised(x)
        cosine = unit @ unit.T
        np.fill_diagonal(cosine, -np.inf)  # a row is no neighbour of itself
        near = np.argpartition(-cosine, k - 1, axis=1)[:, :k].astype(np.int32)  # not a view
        x = x - x.mean(axis=0, keepdims=True, dtype=np.float64)
        variances, axes = np.linalg.eigh(x.T @ x if len(x) > x.shape[1] else x @ x.T)
        variances, axes = np.maximum(variances[::-1], 0), axes[:, ::-1]
        scores = x @ axes if len(x) > x.shape[1] else axes * np.sqrt(variances)[None, :]
        share = np.cumsum(variances) / max(variances.sum(), TINY)
        kept = int(np.searchsorted(share, VARIANCE * (1 - 1e-12))) + 1
        kept = min(kept, int((variances > ROUNDING * variances[0]).sum()))
        return cls(scores.astype(np.float32), np.sqrt(variances[:kept]), ranks, near)

    def reordered(self, order: np.ndarray) -> Geometry:
        """Returns the geometry of ``x[order]``; RSA's rows stay among themselves."""
        first = order[order < len(self.ranks)]
        ranks, near = self.ranks[first][:, first], np.argsort(order)[self.near[order]]
        return replace(self, scores=self.scores[order], ranks=ranks, near=near)

    def compared(self, other: Geometry) -> dict[str, float]:
        """Returns {measure of MEASURES: number} of two representations of the same rows.

        - cka: linear CKA (Kornblith et al. 2019) of the unbiased HSIC (Song et al. 2012):
          independent rows give 0 on average however many columns there are.
        - svcca: mean canonical correlation of the fewest principal directions that hold VARIANCE
          (Raghu et al. 2017), over as many as the smaller side has. Not corrected for chance: with
          r_x and r_y directions, independent rows give up to (sqrt(r_x) + sqrt(r_y)) / sqrt(n).
        - rsa: Spearman correlation of the rows' dissimilarities, 1 minus the Pearson correlation of
          two rows (Kriegeskorte et al. 2008).
        - mutual_knn: mean share of a row's nearest rows by cosine that both sides share (Huh et al.
          2024); independent representations share NEIGHBOURS / (n - 1).
        """
        product = self.scores.T @ other.scores
        u, v = len(self.norms), len(other.norms)
        canonical = product[:u, :v] / self.norms[:, None] / other.norms[None, :]
        square = canonical @ canonical.T if u <= v else canonical.T @ canonical
        squares = np.linalg.eigvalsh(square) if square.size else np.zeros(1)
        length = np.sqrt(self.power * other.power)
        shared = self.near[:, :, None] == other.near[:, None, :]
        return {
            "cka": float(self._hsic(other, product) / length) if length else 0.0,
            "svcca": float(np.sqrt(squares.clip(0, 1)).mean()),
            "rsa": float(np.vdot(self.ranks, other.ranks)),
            "mutual_knn": float(shared.sum() / self.near.size),
        }

    @cached_property
    def power(self) -> float:
        """The HSIC with itself, or 0 where it is below or rounding: of rows equally far apart."""
        product = self.scores.T @ self.scores
        value = self._hsic(self, product)
        return value if value > EQUIDISTANT * np.sum(np.square(product), dtype=np.float64) else 0.0

    def _hsic(self, other: Geometry, product: np.ndarray) -> float:
        """The unbiased HSIC, times n (n - 3), of centred rows, without a matrix [n, n].

        Gram matrices without their diagonals sum to minus the rows' squared lengths in each row.
        """
        n = len(self.near)
        a, b = (np.sum(np.square(g.scores), axis=1, dtype=np.float64) for g in (self, other))
        total = np.sum(np.square(product), dtype=np.float64) - (1 + 2 / (n - 2)) * (a @ b)
        return float(total + a.sum() * b.sum() / ((n - 1) * (n - 2)))
