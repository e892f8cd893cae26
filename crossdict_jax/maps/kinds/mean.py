"""The floor of the ladder: the training mean of B's features, whatever A says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import Fitted, Map, Problem, build, check_rows


class Mean(Map):
    """``f_B = mean``; its inputs only say how many rows there are."""

    kind = "mean"
    reads = "tokens"

    def __init__(self, dictionary):
        super().__init__(dictionary)
        self.mean = nnx.Param(jnp.zeros(dictionary.width))

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        return jnp.broadcast_to(self.mean[...][None, :], (len(inputs), self.mean.shape[0]))


def fit(
    problems: Sequence[Problem], config: MapConfig, *, seed: int, directory: Path
) -> list[Fitted]:
    """Returns the mean predictor of each problem."""
    return [_fit(problem) for problem in problems]


def _fit(problem: Problem) -> Fitted:
    check_rows(problem, Mean.kind, train=1, validation=0)
    target = problem.train.target
    return Fitted(build(Mean, target.dictionary, {}, {"mean": target.feature_moments[0]}))
