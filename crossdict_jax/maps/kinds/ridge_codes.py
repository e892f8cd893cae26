"""Ridge regression of B's features on A's, in closed form: the linear rung that reads codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import (
    Fitted,
    Map,
    Problem,
    build,
    check_grid,
    check_rows,
    exact_matmul,
)
from crossdict_jax.maps.moments import RidgePath, feature_moments


class RidgeCodes(Map):
    """``f_B = relu((f_A - mean_a) W + mean_b)``, W from squared error plus penalty |W|^2.

    The error that W minimises is that of the affine map; the rectifier, which can only come
    closer to features that are never negative, is put on afterwards.
    """

    kind = "ridge_codes"
    reads = "features"

    def __init__(self, dictionary, *, width_a: int):
        super().__init__(dictionary)
        self.mean_a = nnx.Param(jnp.zeros(width_a))
        self.W = nnx.Param(jnp.zeros((width_a, dictionary.width)))
        self.mean_b = nnx.Param(jnp.zeros(dictionary.width))

    @property
    def arguments(self) -> dict:
        return {"width_a": self.W.shape[0]}

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        f = inputs - self.mean_a[...][None, :]
        return jax.nn.relu(exact_matmul(f, self.W[...]) + self.mean_b[...][None, :])


def fit(
    problems: Sequence[Problem], config: MapConfig, *, seed: int, directory: Path
) -> list[Fitted]:
    """Returns each problem's map, its penalty chosen by validation MSE of the affine map."""
    check_grid("map.ridge_penalties", config.ridge_penalties, positive=True)
    return [_fit(problem, config) for problem in problems]


def _fit(problem: Problem, config: MapConfig) -> Fitted:
    check_rows(problem, RidgeCodes.kind)
    train = feature_moments(problem.train)
    validation = feature_moments(problem.validation).about(train.centre_a, train.centre_b)
    path = RidgePath(train)
    scores = dict(zip(config.ridge_penalties, path.errors(validation, config.ridge_penalties)))
    best = min(scores, key=scores.get)
    values = {"mean_a": train.centre_a, "W": path.solution(best), "mean_b": train.centre_b}
    record = {
        "penalty": best,
        "validation_mse": [{"penalty": p, "mse": score} for p, score in scores.items()],
    }
    arguments = {"width_a": len(train.centre_a)}
    m = build(RidgeCodes, problem.train.target.dictionary, arguments, values)
    return Fitted(m, record)
