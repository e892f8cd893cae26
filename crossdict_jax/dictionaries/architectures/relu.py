"""ReLU dictionaries with an L1 penalty weighted by decoder norms."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from crossdict_jax.dictionaries.base import Dictionary, Hyper
from crossdict_jax.dictionaries.losses import by_activity
from crossdict_jax.ops import sparse
from crossdict_jax.ops.products import computed, matmul


class ReLU(Dictionary):
    """f = relu(z);  loss = mean ||u - u_hat||^2 + l1 * mean sum_i f_i ||W_dec_i||.

    Decoder rows are free: because the penalty is weighted by their norms, shrinking features and
    growing rows gains nothing (Conerly et al. 2024, "Update on how we train SAEs"; gradients are
    clipped to norm 1 as there).

    Where L1 has left few features active, four of a step's five products go through a list of
    those (``losses.by_activity``): the same function, in another order of float32 sums.
    """

    saelens = "standard"
    pace = 2.0  # L1 silences features only step by step: faster, fewer are left at an equal FVU

    def activate(self, z: jax.Array) -> jax.Array:
        return jax.nn.relu(z)

    def losses(self, x, *, hyper: Hyper, dead, y=None, dtype=None):
        u_in, u = self.scaled_pair(x, y)
        f = jax.lax.stop_gradient(self.activate(self.pre_activations(u_in, dtype)))
        parameters = (*self.encoder(), self.W_dec[...], self.b_dec[...])
        data = (u_in, u, f, jnp.asarray(hyper.l1_coefficient))
        ways = (partial(_dense, dtype=dtype), partial(_listed, dtype=dtype))
        loss, parts = by_activity(*ways, f, parameters, data)
        return loss, parts, f


def _dense(parameters, data, *, dtype):
    (W_enc, bias, W_dec, b_dec), (u_in, u, f, l1_coefficient) = parameters, data
    f = jax.nn.relu(computed(f, u_in, W_enc, bias, dtype))
    mse = _error(u, matmul(f, W_dec, dtype), b_dec)
    l1 = jnp.mean(f @ jnp.linalg.norm(W_dec, axis=1))
    return mse + l1_coefficient * l1, {"mse": mse, "l1": l1}


def _listed(parameters, data, *, dtype):
    (W_enc, bias, W_dec, b_dec), (u_in, u, f, l1_coefficient) = parameters, data
    code = sparse.selected(f, u_in, W_enc, bias, (), sparse.positive)
    mse = _error(u, sparse.decode(code, W_dec, dtype), b_dec)
    l1 = jnp.sum(code.values * jnp.linalg.norm(W_dec, axis=1)[code.features]) / len(u)
    return mse + l1_coefficient * l1, {"mse": mse, "l1": l1}


def _error(u, decoded, b_dec) -> jax.Array:
    return jnp.mean(jnp.sum(jnp.square(u - (decoded + b_dec[None, :])), axis=1))
