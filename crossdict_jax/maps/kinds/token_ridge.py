"""The strongest linear rung: the token's mean, and ridge on what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import (
    ActivationMap,
    Fitted,
    Pairs,
    Problem,
    TokenTable,
    build,
    check_grid,
    check_rows,
    exact_matmul,
)
from crossdict_jax.maps.moments import (
    Moments,
    Products,
    RidgePath,
    TokenSums,
    activation_moments,
    token_sums,
)


class TokenRidge(ActivationMap):
    """``x_B = T_B[token_A] + (x_A - T_A[token_A]) W``.

    T_A and T_B hold the training means of x_A and x_B after each token of A, shrunk to the
    overall means by one pseudocount. Without tokens both take their back-off, the overall means.
    """

    kind = "token_ridge"

    def __init__(self, dictionary, *, d_a: int, seen: int):
        super().__init__(dictionary)
        self.table_a = TokenTable(seen, d_a)
        self.table_b = TokenTable(seen, dictionary.d_model)
        self.W = nnx.Param(jnp.zeros((d_a, dictionary.d_model)))

    @property
    def arguments(self) -> dict:
        return {"d_a": self.W.shape[0], "seen": self.table_a.ids.shape[0]}

    def activation(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        left = inputs.astype(jnp.float32) - self.table_a(tokens, len(inputs))
        return self.table_b(tokens, len(inputs)) + exact_matmul(left, self.W[...])


def fit(
    problems: Sequence[Problem], config: MapConfig, *, seed: int, directory: Path
) -> list[Fitted]:
    """Returns each problem's map; pseudocount and penalty are chosen by validation MSE of x_B."""
    check_grid("map.token_pseudocounts", config.token_pseudocounts, positive=False)
    check_grid("map.ridge_penalties", config.ridge_penalties, positive=True)
    return [_fit(problem, config) for problem in problems]


def _fit(problem: Problem, config: MapConfig) -> Fitted:
    check_rows(problem, TokenRidge.kind)
    train = _statistics(problem.train)
    held_out = _statistics(problem.validation)
    scores = {}  # (pseudocount, penalty) -> validation MSE
    for pseudocount in config.token_pseudocounts:
        path = RidgePath(_residual(train, train, pseudocount))
        left = _residual(held_out, train, pseudocount)
        errors = path.errors(left, config.ridge_penalties)
        scores |= {(pseudocount, p): mse for p, mse in zip(config.ridge_penalties, errors)}
    pseudocount, penalty = min(scores, key=scores.get)
    W = RidgePath(_residual(train, train, pseudocount)).solution(penalty)
    ids = train.a.ids
    values = {
        "table_a": {"ids": ids, "rows": train.a.shrunk(pseudocount)},
        "table_b": {"ids": ids, "rows": train.b.shrunk(pseudocount)},
        "W": W,
    }
    grid = [{"pseudocount": c, "penalty": p, "mse": score} for (c, p), score in scores.items()]
    record = {"pseudocount": pseudocount, "penalty": penalty, "validation_mse": grid}
    arguments = {"d_a": len(W), "seen": len(ids)}
    m = build(TokenRidge, problem.train.target.dictionary, arguments, values)
    return Fitted(m, record)


@dataclass(frozen=True)
class _Statistics:
    """All that fitting reads of a split: moments, and sums of both sides by A's token."""

    moments: Moments
    a: TokenSums
    b: TokenSums


def _statistics(pairs: Pairs) -> _Statistics:
    def sums(x: np.ndarray) -> TokenSums:
        return token_sums(
            pairs.source.tokens, lambda rows: x[rows].astype(np.float32), size=x.shape[1]
        )

    a, b = pairs.source.x, pairs.target.x
    return _Statistics(activation_moments(a, b), sums(a), sums(b))


def _residual(rows: _Statistics, train: _Statistics, pseudocount: float) -> Products:
    """Returns the products of what the training tables leave of a split's rows.

    With S the sums by token and T the tables, both about the training means, and n the counts:
    sum (a - T_a)(b - T_b)' = ab - S_a' T_b - T_a' (S_b - n T_b).
    """
    centres = train.a.mean, train.b.mean
    moments = rows.moments.about(*centres)
    S, T, left = [], [], []
    for sums, fitted, centre in zip((rows.a, rows.b), (train.a, train.b), centres):
        counts = sums.counts[:, None]
        S.append(sums.sums - counts * centre[None, :])
        T.append(fitted.shrunk(pseudocount)[fitted.places(sums.ids)] - centre[None, :])
        left.append(S[-1] - counts * T[-1])
    return Products(
        n=moments.n,
        aa=moments.aa - S[0].T @ T[0] - T[0].T @ left[0],
        ab=moments.ab - S[0].T @ T[1] - T[0].T @ left[1],
        bb=moments.bb - float(np.sum((S[1] + left[1]) * T[1])),
    )
