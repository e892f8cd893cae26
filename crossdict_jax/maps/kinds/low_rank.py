"""Reduced-rank ridge regression on activations: how many directions do the models share?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crossdict_jax.config import MapConfig
from crossdict_jax.errors import UserError
from crossdict_jax.maps.base import AffineMap, Fitted, Problem, build, check_grid, check_rows
from crossdict_jax.maps.moments import Moments, RidgePath, activation_moments


class LowRank(AffineMap):
    """``x_B = (x_A - mean_a) W V V' + mean_b``, V [d_b, rank] the leading fitted directions.

    W is the ridge solution and V the leading right singular vectors of its fitted values, those
    of the rows that stand for the penalty included: the best map of its rank under squared error
    plus penalty (Izenman 1975; Mukherjee and Zhu 2011). Stored is the product W V V'.
    """

    kind = "low_rank"


def fit(
    problems: Sequence[Problem], config: MapConfig, *, seed: int, directory: Path
) -> list[Fitted]:
    """Returns each problem's map; penalty and rank are chosen by validation MSE of x_B.

    Ranks above the smaller d_model of a problem say nothing there and are left out.

    Raises:
      UserError: every rank is above it.
    """
    check_grid("map.ridge_penalties", config.ridge_penalties, positive=True)
    check_grid("map.ranks", config.ranks, positive=True)
    return [_fit(problem, config) for problem in problems]


def _fit(problem: Problem, config: MapConfig) -> Fitted:
    check_rows(problem, LowRank.kind)
    train, held_out = problem.train, problem.validation
    ranks = _possible(config.ranks, problem)
    moments = activation_moments(train.source.x, train.target.x)
    centres = moments.centre_a, moments.centre_b
    validation = activation_moments(held_out.source.x, held_out.target.x).about(*centres)
    path, scores = RidgePath(moments), {}  # (penalty, rank) -> validation MSE
    for penalty in config.ridge_penalties:
        errors = _errors(path.solution(penalty), path.directions(penalty), validation)
        scores |= {(penalty, rank): float(errors[rank]) for rank in ranks}
    penalty, rank = min(scores, key=scores.get)
    V = path.directions(penalty)[:, :rank]
    values = {"mean_a": centres[0], "W": path.solution(penalty) @ V @ V.T, "mean_b": centres[1]}
    grid = [{"penalty": p, "rank": r, "mse": score} for (p, r), score in scores.items()]
    record = {"penalty": penalty, "rank": rank, "validation_mse": grid}
    m = build(LowRank, train.target.dictionary, {"d_a": len(centres[0])}, values)
    return Fitted(m, record)


def _possible(ranks: Sequence[int], problem: Problem) -> list[int]:
    d_a, d_b = problem.train.source.x.shape[1], problem.train.target.x.shape[1]
    possible = [rank for rank in ranks if rank <= min(d_a, d_b)]
    if not possible:
        raise UserError(
            f"map.ranks={','.join(map(str, ranks))}: every rank is above the {min(d_a, d_b)} "
            f"dimensions that a map of {problem.label} can have; give a smaller one."
        )
    return possible


def _errors(W: np.ndarray, V: np.ndarray, held_out: Moments) -> np.ndarray:
    """Returns the MSE [d_b + 1] of W V_r V_r' on held-out rows for every rank r from 0.

    |b - W V_r V_r' a|^2 falls into one term a direction: |V'b|^2 less what each of them explains.
    """
    fitted = W @ V  # [d_a, d_b], one column a direction
    explained = 2 * np.sum(fitted * (held_out.ab @ V), axis=0)
    explained -= np.sum(fitted * (held_out.aa @ fitted), axis=0)
    left = held_out.bb - np.concatenate([[0.0], np.cumsum(explained)])
    return left / (held_out.n * len(V))
