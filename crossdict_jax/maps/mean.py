"""The floor of the ladder: the training mean of B's features, whatever A says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import (
    Fitted,
    Map,
    Problem,
    Side,
    build,
    check_rows,
    encode_rows,
    slices,
)


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
    return Fitted(build(Mean, target.dictionary, {}, {"mean": feature_mean(target)}))


def feature_mean(side: Side) -> np.ndarray:
    """Returns the mean float64 [width] of a side's features, a batch at a time."""
    total = np.zeros(side.dictionary.width)
    for rows in slices(len(side.x)):
        total += encode_rows(side.dictionary, side.x[rows]).sum(0, dtype=np.float64)
    return total / len(side.x)
