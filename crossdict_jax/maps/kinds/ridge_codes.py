"""Ridge regression of B's features on A's, in closed form: the linear map that reads codes."""

import jax

from crossdict_jax import modules
from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import Map, Problem, Side
from crossdict_jax.ops import exact


class RidgeCodes(Map):
    """``f_B = relu((f_A - mean_a) W + mean_b)``, W from squared error plus penalty |W|^2.

    W and the penalty minimise the error of the affine map; the rectifier is added afterwards and
    can only come closer to features that are never negative.
    """

    kind = "ridge_codes"
    reads = "features"
    chosen = ("penalty",)

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        f = modules.rows(inputs, len(self.mean_a[...])) - self.mean_a[...][None, :]
        return jax.nn.relu(exact(f, self.W[...]) + self.mean_b[...][None, :])

    @classmethod
    def solve(cls, problem: Problem, config: MapConfig):
        return problem.regress(Side.features).ridge(config.ridge_penalties)
