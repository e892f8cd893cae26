"""E[f_B | the source's token]: what token identity alone says about B's features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import Fitted, Map, Problem, TokenTable, build, check_grid, check_rows
from crossdict_jax.maps.moments import feature_sums, table_error


class Token(Map):
    """``f_B = table[token_A]``, the training mean of B's features after that token, shrunk.

    A token seen n times weighs its own mean by n and the overall mean by the pseudocount.
    """

    kind = "token"
    reads = "tokens"

    def __init__(self, dictionary, *, seen: int):
        super().__init__(dictionary)
        self.table = TokenTable(seen, dictionary.width)

    @property
    def arguments(self) -> dict:
        return {"seen": self.table.ids.shape[0]}

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        return self.table(inputs, len(inputs))


def fit(
    problems: Sequence[Problem], config: MapConfig, *, seed: int, directory: Path
) -> list[Fitted]:
    """Returns each problem's token table, its pseudocount chosen by validation MSE of f_B."""
    check_grid("map.token_pseudocounts", config.token_pseudocounts, positive=False)
    return [_fit(problem, config) for problem in problems]


def _fit(problem: Problem, config: MapConfig) -> Fitted:
    check_rows(problem, Token.kind, train=1)
    train = feature_sums(problem.train.source.tokens, problem.train.target)
    validation = feature_sums(problem.validation.source.tokens, problem.validation.target)
    scores = {p: table_error(train.shrunk(p), train, validation) for p in config.token_pseudocounts}
    best = min(scores, key=scores.get)
    record = {
        "pseudocount": best,
        "validation_mse": [{"pseudocount": p, "mse": score} for p, score in scores.items()],
        "tokens_seen": len(train.ids),
    }
    values = {"table": {"ids": train.ids, "rows": train.shrunk(best)}}
    arguments = {"seen": len(train.ids)}
    return Fitted(build(Token, problem.train.target.dictionary, arguments, values), record)
