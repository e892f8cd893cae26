"""Ridge regression of B's features on A's, in closed form: the linear map that reads codes."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import Fitted, Map, Problem, Side, exact_matmul, fit_closed_form


class RidgeCodes(Map):
    """``f_B = relu((f_A - mean_a) W + mean_b)``, W from squared error plus penalty |W|^2.

    The error that W minimises is that of the affine map; the rectifier, which can only come
    closer to features that are never negative, is put on afterwards.
    """

    kind = "ridge_codes"
    reads = "features"

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        f = inputs - self.mean_a[...][None, :]
        return jax.nn.relu(exact_matmul(f, self.W[...]) + self.mean_b[...][None, :])


def fit(problems: Sequence[Problem], config: MapConfig, **training) -> list[Fitted]:
    """Returns each problem's map, its penalty chosen by validation MSE of the affine map."""

    def solve(problem: Problem):
        regression = problem.regress(Side.features)
        errors = regression.path.errors(regression.validation, config.ridge_penalties)
        weights = regression.path.solution
        return {(p,): e for p, e in errors.items()}, lambda p: regression.affine(weights(p))

    return fit_closed_form(RidgeCodes, problems, solve, "penalty")
