"""Ridge regression of B's activations on A's, in closed form."""

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import AffineMap, Problem


class Ridge(AffineMap):
    """``x_B = (x_A - mean_a) W + mean_b``, W from squared error plus penalty |W|^2.

    The penalty is chosen by validation MSE of x_B.
    """

    kind = "ridge"
    chosen = ("penalty",)

    @classmethod
    def solve(cls, problem: Problem, config: MapConfig):
        return problem.regression.ridge(config.ridge_penalties)
