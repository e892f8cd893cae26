"""The trained rival of token_ridge: the token's mean, and a network on what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import Fitted, Problem, Side, TokenTable, check_grid
from crossdict_jax.maps.ensemble import fit_together
from crossdict_jax.maps.moments import TokenSums, feature_sums, table_error
from crossdict_jax.maps.network import NetworkMap, Standards, damped_scale

NO_TOKEN = np.iinfo(np.int32).max  # fills up tables to one length; found by no token


class TokenMLP(NetworkMap):
    """``f_B = head(T_B[token_A] + scale_b * network((f_A - T_A[token_A]) / scale_a))``.

    T_A and T_B hold the training means of f_A and f_B after each token of A, shrunk to the overall
    means by one pseudocount; scales are those of what the tables leave. It starts as the token
    rung. Without tokens both tables give their back-off, the overall means.
    """

    kind = "token_mlp"

    def __init__(self, dictionary, *, width_a: int, seen: int, **how):
        super().__init__(dictionary, width_a=width_a, **how)
        self.table_a = TokenTable(seen, width_a)
        self.table_b = TokenTable(seen, dictionary.width)

    @property
    def arguments(self) -> dict:
        return super().arguments | {"seen": self.table_a.ids.shape[0]}

    def baselines(self, tokens: jax.Array | None, batch: int) -> tuple[jax.Array, jax.Array]:
        return self.table_a(tokens, batch), self.table_b(tokens, batch)

    @classmethod
    def standards(cls, problem: Problem, config: MapConfig) -> Standards:
        """The pseudocount is chosen by validation MSE of the target's table."""
        tokens, source, target = (
            problem.train.source.tokens,
            problem.train.source,
            problem.train.target,
        )
        a, b = feature_sums(tokens, source), feature_sums(tokens, target)
        held_out = feature_sums(problem.validation.source.tokens, problem.validation.target)
        counts = config.token_pseudocounts
        scores = {c: table_error(b.shrunk(c), b, held_out) for c in counts}
        best = min(scores, key=scores.get)
        values = {
            "table_a": {"ids": a.ids, "rows": a.shrunk(best).astype(np.float32)},
            "table_b": {"ids": b.ids, "rows": b.shrunk(best).astype(np.float32)},
            "scale_a": damped_scale(_variance_left(a, source, best)),
            "scale_b": damped_scale(_variance_left(b, target, best)),
        }
        return Standards(values, {"seen": len(a.ids)}, {"pseudocount": best})

    @classmethod
    def alike(cls, standards: list[Standards]) -> list[Standards]:
        seen = max(s.arguments["seen"] for s in standards)
        return [Standards(_lengthened(s.values, seen), {"seen": seen}) for s in standards]


def fit(
    problems: Sequence[Problem], config: MapConfig, *, seed: int, directory: Path
) -> list[Fitted]:
    """Trains the maps of all problems as ensembles; see ``fit_together``."""
    check_grid("map.token_pseudocounts", config.token_pseudocounts, positive=False)
    return fit_together(TokenMLP, problems, config, seed=seed, directory=directory)


def _variance_left(sums: TokenSums, side: Side, pseudocount: float) -> np.ndarray:
    """Returns the mean square [width] of what the table leaves of a side's training features.

    From sums alone: sum f^2 - 2 sum_t T_t S_t + sum_t n_t T_t^2.
    """
    mean, variance = side.feature_moments
    table, counts = sums.shrunk(pseudocount)[:-1], sums.counts[:, None]
    explained = np.sum(table * (2 * sums.sums - counts * table), axis=0)
    return np.maximum(variance + mean**2 - explained / len(side.x), 0.0)


def _lengthened(values: dict, seen: int) -> dict:
    """The same tables with ``seen`` tokens: the new ones are found by no token."""

    def longer(table: dict) -> dict:
        ids, rows = table["ids"], table["rows"]
        more = seen - len(ids)
        return {
            "ids": np.concatenate([ids, np.full(more, NO_TOKEN, ids.dtype)]),
            "rows": np.concatenate([rows, np.repeat(rows[-1:], more, axis=0)]),
        }

    return values | {name: longer(values[name]) for name in ("table_a", "table_b")}
