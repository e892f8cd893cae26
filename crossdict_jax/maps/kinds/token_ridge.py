"""The token's mean, and ridge on what it leaves: the strongest linear map."""

from collections.abc import Sequence

import jax
import numpy as np

from crossdict_jax import modules
from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import ActivationMap, Problem, look_up
from crossdict_jax.maps.moments import (
    PSEUDOCOUNTS,
    Means,
    Products,
    Regression,
    TokenSums,
    find_tokens,
    token_sums,
)
from crossdict_jax.ops import exact

NOTHING_LEFT = 1e-5  # of A's squares about their mean: so much can be rounding of float32 products


class TokenRidge(ActivationMap):
    """``x_B = T_B[token_A] + (x_A - T_A[token_A]) W``.

    T_A and T_B are the training means of x_A and x_B after each token of A, shrunk to the overall
    means (used alone without tokens) by one pseudocount. Pseudocount and penalty are chosen by
    validation MSE of x_B.
    """

    kind = "token_ridge"
    chosen = ("pseudocount", "penalty")

    def activation(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        left = modules.rows(inputs, len(self.W[...])) - look_up(self.table_a, tokens, len(inputs))
        return look_up(self.table_b, tokens, len(inputs)) + exact(left, self.W[...])

    @classmethod
    def solve(cls, problem: Problem, config: MapConfig):
        regression, errors, left = problem.regression, {}, {}
        train, validation = (
            [token_sums(p.source.tokens, side.x) for side in (p.source, p.target)]
            for p in (problem.train, problem.validation)
        )
        for pseudocount in PSEUDOCOUNTS:
            tables = train, regression.means, pseudocount
            left[pseudocount] = Regression(
                regression.means,
                residual(regression.train, train, *tables),
                residual(regression.validation, validation, *tables),
            )
            for penalty, mse in left[pseudocount].errors(config.ridge_penalties).items():
                errors[pseudocount, penalty] = mse

        def values(pseudocount: float, penalty: float):
            tables = {f"table_{name}": s.table(pseudocount) for name, s in zip("ab", train)}
            return tables | {"W": left[pseudocount].solution(penalty)}

        return errors, values


def residual(
    products: Products,
    sums: Sequence[TokenSums],
    train: Sequence[TokenSums],
    means: Means,
    pseudocount: float,
) -> Products:
    """Returns the products of a split's residuals from the training tables.

    With S the sums by token and T the tables, both about the training means, and n the counts:
    sum (a - T_a)(b - T_b)' = ab - S_a' T_b - T_a' (S_b - n T_b).

    Args:
      products: of the split's rows about the training means.
      sums, train: of both sides by A's token, of the split and of the training rows.
    """
    S, T, left = [], [], []
    for split, fitted, mean in zip(sums, train, means):
        counts = split.counts[:, None]
        S.append(split.sums - counts * mean[None, :])
        index = find_tokens(fitted.ids, split.ids, np)
        T.append(fitted.shrunk(pseudocount)[index] - mean[None, :])
        left.append(S[-1] - counts * T[-1])
    aa = products.aa - S[0].T @ T[0] - T[0].T @ left[0]
    ab = products.ab - S[0].T @ T[1] - T[0].T @ left[1]
    if np.trace(aa) <= NOTHING_LEFT * np.trace(products.aa):  # as at the first layer of a Llama
        aa, ab = np.zeros_like(aa), np.zeros_like(ab)
    bb = products.bb - float(np.sum((S[1] + left[1]) * T[1]))
    return Products(n=products.n, aa=aa, ab=ab, bb=bb)
