"""The mean of B's features after the source's token: what token identity alone says."""

import jax.numpy as jnp

from crossdict_jax.maps.base import Map, look_up


class Token(Map):
    """``f_B = table[token_A]``, the training mean of B's features after that token, shrunk.

    A token seen n times weighs its own mean by n and the overall mean by the pseudocount, which is
    chosen by validation MSE of f_B.
    """

    kind = "token"
    reads = "tokens"
    chosen = ("pseudocount",)
    fewest_rows = 1

    def __call__(self, inputs, *, tokens=None):
        return look_up(self.table, inputs, jnp.size(inputs))

    @classmethod
    def solve(cls, problem, config):
        train, validation = (p.target_by_token for p in (problem.train, problem.validation))
        errors = {(p,): mse for p, mse in train.table_errors(validation).items()}
        return errors, lambda pseudocount: {"table": train.table(pseudocount)}
