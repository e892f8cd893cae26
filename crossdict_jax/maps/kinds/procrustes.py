"""Orthogonal Procrustes on activations: B's stream as A's, only rotated, moved and scaled."""

import numpy as np

from crossdict_jax.maps.base import AffineMap, check_rows

NO_COVARIANCE = 1e-7  # of the largest: what rounding leaves of a zero covariance


class Procrustes(AffineMap):
    """``x_B = scale (x_A - mean_a) Q + mean_b``, Q semi-orthogonal (orthogonal if d_a = d_b).

    With the cross-covariance U S V', Q = U V' (Schönemann 1966); scale is the least-squares
    scalar given Q, sum S / tr(Q' C_aa Q), 0 without any covariance. Directions without covariance
    (as of constant dimensions) are left out of Q: their rotation is not determined. With no more
    rows than dimensions no rotation is.
    """

    kind = "procrustes"
    chosen = ("scale",)

    @classmethod
    def solve(cls, problem, config):
        rotated = min(side.x.shape[1] for side in (problem.train.source, problem.train.target))
        check_rows(problem, cls.kind, rotated + 1)
        regression = problem.regression
        U, S, Vt = np.linalg.svd(regression.train.ab, full_matrices=False)
        determined = S / max(S[0], 1e-300) > NO_COVARIANCE
        Q = U[:, determined] @ Vt[determined]
        power = float(np.sum(Q * (regression.train.aa @ Q)))
        scale = float(S.sum()) / power if power > 0 else 0.0
        errors = {(scale,): regression.validation.error(scale * Q)}
        return errors, lambda scale: regression.affine(scale * Q)
