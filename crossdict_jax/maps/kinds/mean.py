"""The training mean of B's features, whatever A says: what every map must beat."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import Fitted, Map, Problem, check_rows


class Mean(Map):
    """``f_B = mean``; its inputs only say how many rows there are."""

    kind = "mean"
    reads = "tokens"

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        return jnp.broadcast_to(self.mean[...][None, :], (len(inputs), self.mean.shape[0]))


def fit(problems: Sequence[Problem], config: MapConfig, **training) -> list[Fitted]:
    """Returns the mean predictor of each problem."""
    fitted = []
    for problem in problems:
        check_rows(problem, Mean.kind, train=1, validation=0)
        target = problem.train.target
        fitted.append(Fitted(Mean(target.dictionary, {"mean": target.feature_moments[0]})))
    return fitted
