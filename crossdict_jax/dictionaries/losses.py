"""Parts of the losses that several architectures share: explained variance, dead features."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from crossdict_jax.dictionaries.base import Dictionary, Hyper, Whole, keep_top_k
from crossdict_jax.ops.products import matmul

FEW = 8  # dead features are few up to this part of the width


def power(x: jax.Array) -> jax.Array:
    """Returns the mean squared norm [] of rows x [batch, d_model]."""
    return jnp.mean(jnp.sum(jnp.square(x), axis=1))


def variance(x: jax.Array) -> jax.Array:
    """Returns the mean squared distance [] of rows x [batch, d_model] to their mean."""
    return power(x - x.mean(axis=0, keepdims=True))


def fvu(x: jax.Array, x_hat: jax.Array, whole: Whole | None = None) -> jax.Array:
    """Returns the fraction [] of the batch's variance that x_hat leaves unexplained.

    Args:
      whole: of the batch that the rows are a part of.
    """
    return share_left(x, x_hat, variance(x) if whole is None else whole.variance)


def share_left(x: jax.Array, x_hat: jax.Array, spread: jax.Array) -> jax.Array:
    """Returns the mean squared error [] of rows over a variance [] that is not quite 0."""
    return power(x - x_hat) / jnp.maximum(spread, 1e-8)


def auxk(
    dictionary: Dictionary,
    rows: jax.Array,
    residual: jax.Array,
    *,
    dead: jax.Array,
    hyper: Hyper,
    dtype=None,
) -> jax.Array:
    """Returns the share [] of the residual that the k_aux strongest dead features leave; else 0.

    Divided by the residual's variance (Gao et al. 2024, arXiv 2406.04093, section A.2). Costs
    nothing while everything is alive, 10 B d n operations while at most n = width / FEW features
    are dead, and as much as a dense step while more are.

    Args:
      dictionary: gives ``encoder()``, W_dec and width.
      rows: what the encoder reads, scaled [batch, d].
      residual: scaled rows less their reconstruction [batch, d_out]; gets no gradient.
    """
    residual, whole = jax.lax.stop_gradient(residual), hyper.whole
    spread = variance(residual) if whole is None else whole.residual_variance
    parameters = (*dictionary.encoder(), dictionary.W_dec[...])
    few = dictionary.width // FEW
    shares = [_no_share, *(_share_of(n, hyper.k_aux, dtype) for n in (few, dictionary.width))]
    most = jnp.asarray(hyper.most_dead)
    which = jnp.where(most > few, 2, jnp.minimum(most, 1))
    return one_of(shares, which, parameters, (rows, residual, dead, spread))[0]


def _no_share(parameters, data) -> tuple[jax.Array, None]:
    return jnp.zeros(()), None


def _share_of(n: int, k_aux: int, dtype):
    """The loss where at most n features are dead: of those alone, unless n is the width."""

    def share(parameters, data):
        (W_enc, bias, W_dec), (rows, residual, dead, spread) = parameters, data
        taken = dead
        if n < len(dead):
            taken = jnp.arange(n) < jnp.sum(dead)
            features = jnp.nonzero(dead, size=n, fill_value=0)[0]
            W_enc, bias, W_dec = W_enc[:, features], bias[features], W_dec[features]
        z = matmul(rows, W_enc, dtype) + bias[None, :]
        f = keep_top_k(jnp.where(taken[None, :], z, 0.0), min(k_aux, n))
        left = share_left(residual, matmul(f, W_dec, dtype), spread)
        return jnp.where(dead.any(), left, 0.0), None

    return share


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def one_of(functions, which, parameters, data) -> tuple[jax.Array, Any]:
    """Returns functions[which](parameters, data): a loss [] and more, of equal shapes in all.

    The loss has a gradient in the parameters, and nothing else has any. It is computed with the
    value, inside the branch. Else both branches would have to hand over what the dearer one needs
    for its gradient, arrays [batch, width], at every step.

    Args:
      which: int []. One for all members of an ensemble: a branch on it stays a branch under vmap.
    """
    return jax.lax.switch(which, functions, parameters, data)


def _one_of_forward(functions, which, parameters, data):
    slopes = [jax.value_and_grad(f, has_aux=True) for f in functions]
    return jax.lax.switch(which, slopes, parameters, data)


def _one_of_backward(functions, of_parameters, gradient):
    return None, jax.tree.map(lambda g: gradient[0] * g, of_parameters), None


one_of.defvjp(_one_of_forward, _one_of_backward)
