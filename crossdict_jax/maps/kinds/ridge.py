"""Ridge regression of B's activations on A's, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import AffineMap, Fitted, Problem, fit_closed_form


class Ridge(AffineMap):
    """``x_B = (x_A - mean_a) W + mean_b``, W from squared error plus penalty |W|^2."""

    kind = "ridge"


def fit(problems: Sequence[Problem], config: MapConfig, **training) -> list[Fitted]:
    """Returns each problem's ridge map, its penalty chosen by validation MSE of x_B."""

    def solve(problem: Problem):
        regression = problem.regression
        errors = regression.path.errors(regression.validation, config.ridge_penalties)
        weights = regression.path.solution
        return {(p,): e for p, e in errors.items()}, lambda p: regression.affine(weights(p))

    return fit_closed_form(Ridge, problems, solve, "penalty")
