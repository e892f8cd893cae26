"""Ridge regression of B's activations on A's, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import AffineMap, Fitted, Problem, build, check_grid, check_rows
from crossdict_jax.maps.moments import RidgePath, activation_moments


class Ridge(AffineMap):
    """``x_B = (x_A - mean_a) W + mean_b``, W from squared error plus penalty |W|^2."""

    kind = "ridge"


def fit(
    problems: Sequence[Problem], config: MapConfig, *, seed: int, directory: Path
) -> list[Fitted]:
    """Returns each problem's ridge map, its penalty chosen by validation MSE of x_B."""
    check_grid("map.ridge_penalties", config.ridge_penalties, positive=True)
    return [_fit(problem, config) for problem in problems]


def _fit(problem: Problem, config: MapConfig) -> Fitted:
    check_rows(problem, Ridge.kind)
    train, held_out = problem.train, problem.validation
    moments = activation_moments(train.source.x, train.target.x)
    centres = moments.centre_a, moments.centre_b
    validation = activation_moments(held_out.source.x, held_out.target.x).about(*centres)
    path = RidgePath(moments)
    scores = dict(zip(config.ridge_penalties, path.errors(validation, config.ridge_penalties)))
    best = min(scores, key=scores.get)
    values = {"mean_a": centres[0], "W": path.solution(best), "mean_b": centres[1]}
    record = {
        "penalty": best,
        "validation_mse": [{"penalty": p, "mse": score} for p, score in scores.items()],
    }
    arguments = {"d_a": len(centres[0])}
    return Fitted(build(Ridge, train.target.dictionary, arguments, values), record)
