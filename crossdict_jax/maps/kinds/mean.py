"""The training mean of B's features, whatever A says: what every map must beat."""

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import Map, Problem


class Mean(Map):
    """``f_B = mean``; only the number of inputs matters."""

    kind = "mean"
    reads = "tokens"
    fewest_rows = 1

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        return jnp.broadcast_to(self.mean[...][None, :], (len(inputs), self.mean.shape[0]))

    @classmethod
    def solve(cls, problem: Problem, config: MapConfig):
        mean, held_out = (p.target.feature_moments for p in (problem.train, problem.validation))
        mean = mean.mean
        error = float(np.mean(held_out.variance + (held_out.mean - mean) ** 2))
        return {(): error}, lambda: {"mean": mean}
