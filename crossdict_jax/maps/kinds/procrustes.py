"""Orthogonal Procrustes on activations: B's stream as A's, only rotated, moved and scaled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import AffineMap, Fitted, Problem, check_rows, fit_closed_form

NO_COVARIANCE = 1e-7  # of the largest: what rounding leaves of a covariance that is 0


class Procrustes(AffineMap):
    """``x_B = scale (x_A - mean_a) Q + mean_b``, Q semi-orthogonal (orthogonal if d_a = d_b).

    With the cross-covariance U S V', Q = U V' (Schönemann 1966); scale is the least-squares
    scalar given Q, sum S / tr(Q' C_aa Q); no covariance at all gives scale 0. Directions without
    any covariance, as those of dimensions that never vary, are left out of Q: where they are
    rotated to is not determined.
    """

    kind = "procrustes"


def fit(problems: Sequence[Problem], config: MapConfig, **training) -> list[Fitted]:
    """Returns each problem's Procrustes map; its scale is computed, not chosen.

    Raises:
      UserError: there are no more rows than dimensions, so that no rotation is determined.
    """

    def solve(problem: Problem):
        rotated = min(side.x.shape[1] for side in (problem.train.source, problem.train.target))
        check_rows(problem, Procrustes.kind, train=rotated + 1)
        regression = problem.regression
        U, S, Vt = np.linalg.svd(regression.train.ab, full_matrices=False)
        determined = S / max(S[0], 1e-300) > NO_COVARIANCE
        Q = U[:, determined] @ Vt[determined]
        power = float(np.sum(Q * (regression.train.aa @ Q)))
        scale = float(S.sum()) / power if power > 0 else 0.0
        errors = {(scale,): regression.validation.error(scale * Q)}
        return errors, lambda scale: regression.affine(scale * Q)

    return fit_closed_form(Procrustes, problems, solve, "scale")
