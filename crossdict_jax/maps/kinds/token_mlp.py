"""The token's mean, and a network on what it leaves: the trained rival of token_ridge."""

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax.maps.base import look_up
from crossdict_jax.maps.moments import token_sums
from crossdict_jax.maps.network import NetworkMap, damped_scale

NO_TOKEN = np.iinfo(np.int32).max  # pads tables to one length; no token equals it


class TokenMLP(NetworkMap):
    """``f_B = head(T_B[token_A] + scale_b * network((f_A - T_A[token_A]) / scale_a))``.

    T_A and T_B are the training means of f_A and f_B after each token of A, shrunk to the overall
    means by one pseudocount (the best for T_B on validation rows); scales are those of the
    residuals. It starts as the token map. Without tokens the tables give the overall means.
    """

    kind = "token_mlp"

    def baselines(self, tokens, batch):
        return look_up(self.table_a, tokens, batch), look_up(self.table_b, tokens, batch)

    @classmethod
    def unmeasured(cls, width_a, width_b, tokens):
        values = {}
        for name, n in (("a", width_a), ("b", width_b)):
            rows = jnp.zeros((tokens + 1, n))
            values[f"table_{name}"] = {"ids": jnp.zeros(tokens, jnp.int32), "rows": rows}
            values[f"scale_{name}"] = jnp.zeros(n)
        return values

    @classmethod
    def measure(cls, problem):
        train, values = problem.train, {}
        errors = train.target_by_token.table_errors(problem.validation.target_by_token)
        best = min(errors, key=errors.get)
        by_token = token_sums(train.source.tokens, train.source.codes), train.target_by_token
        for name, side, sums in zip("ab", (train.source, train.target), by_token):
            table = values[f"table_{name}"] = sums.table(best)
            # Squared residuals: sum f^2 - 2 sum_t T_t S_t + sum_t n_t T_t^2, over rows.
            moments = side.feature_moments
            rows, counts = table["rows"][:-1], sums.counts[:, None]
            explained = np.sum(rows * (2 * sums.sums - counts * rows), axis=0) / len(side.x)
            left = np.maximum(moments.variance + moments.mean**2 - explained, 0.0)
            values[f"scale_{name}"] = damped_scale(left)
        values = jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == float else a, values)
        return values, {"pseudocount": best}

    @classmethod
    def alike(cls, measured):
        """Pads tables to the longest; the padding is never looked up."""
        seen, result = max(len(values["table_a"]["ids"]) for values in measured), []
        for values in measured:
            tables = {name: values[name] for name in ("table_a", "table_b")}
            missing = 0, seen - len(tables["table_a"]["ids"])
            for name, table in tables.items():
                ids = np.pad(table["ids"], missing, constant_values=NO_TOKEN)
                rows = np.pad(table["rows"], (missing, (0, 0)), mode="edge")
                tables[name] = {"ids": ids, "rows": rows}
            result.append(values | tables)
        return result
