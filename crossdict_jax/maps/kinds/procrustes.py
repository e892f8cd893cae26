"""Orthogonal Procrustes on activations: B's stream as A's, only turned, moved and scaled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import AffineMap, Fitted, Problem, build, check_rows
from crossdict_jax.maps.moments import Moments, activation_moments

NO_COVARIANCE = 1e-7  # of the largest: what rounding leaves of a covariance that is 0


class Procrustes(AffineMap):
    """``x_B = scale (x_A - mean_a) Q + mean_b``, Q semi-orthogonal (orthogonal if d_a = d_b).

    With the cross-covariance U S V', Q = U V' (Schönemann 1966); scale is the least-squares
    scalar given Q, sum S / tr(Q' C_aa Q). Directions without any covariance, as those of
    dimensions that never vary, are left out of Q: where they are turned to is not determined.
    """

    kind = "procrustes"


def fit(
    problems: Sequence[Problem], config: MapConfig, *, seed: int, directory: Path
) -> list[Fitted]:
    """Returns each problem's Procrustes map; there is nothing to tune.

    Raises:
      UserError: there are no more rows than dimensions, so that no rotation is determined.
    """
    return [_fit(problem) for problem in problems]


def _fit(problem: Problem) -> Fitted:
    train, held_out = problem.train, problem.validation
    turned = min(train.source.x.shape[1], train.target.x.shape[1])
    check_rows(problem, Procrustes.kind, train=turned + 1)
    moments = activation_moments(train.source.x, train.target.x)
    Q, scale = rotation(moments)
    centres = moments.centre_a, moments.centre_b
    validation = activation_moments(held_out.source.x, held_out.target.x).about(*centres)
    values = {"mean_a": centres[0], "W": scale * Q, "mean_b": centres[1]}
    record = {"scale": scale, "validation_mse": [{"mse": validation.error(scale * Q)}]}
    return Fitted(build(Procrustes, train.target.dictionary, {"d_a": len(Q)}, values), record)


def rotation(moments: Moments) -> tuple[np.ndarray, float]:
    """Returns Q [d_a, d_b] and the scale; no covariance at all gives scale 0."""
    U, S, Vt = np.linalg.svd(moments.ab, full_matrices=False)
    determined = S / max(S[0], 1e-300) > NO_COVARIANCE
    Q = U[:, determined] @ Vt[determined]
    power = float(np.sum(Q * (moments.aa @ Q)))
    return Q, float(S.sum()) / power if power > 0 else 0.0
