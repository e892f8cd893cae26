"""The training mean of B's features, whatever A says: what every map must beat."""

import jax.numpy as jnp
import numpy as np

from crossdict_jax.errors import UserError
from crossdict_jax.maps.base import Map


class Mean(Map):
    """``f_B = mean``; only the number of inputs matters."""

    kind = "mean"
    reads = "tokens"
    fewest_rows = 1

    def __call__(self, inputs, *, tokens=None):
        if jnp.ndim(inputs) != 1:
            raise UserError(f"inputs must be tokens [batch], not {list(jnp.shape(inputs))}.")
        return jnp.broadcast_to(self.mean[...][None, :], (len(inputs), self.mean.shape[0]))

    @classmethod
    def solve(cls, problem, config):
        mean, held_out = (p.target.feature_moments for p in (problem.train, problem.validation))
        mean = mean.mean
        error = float(np.mean(held_out.variance + (held_out.mean - mean) ** 2))
        return {(): error}, lambda: {"mean": mean}
