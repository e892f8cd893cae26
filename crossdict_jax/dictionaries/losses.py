"""Parts of the losses that several architectures share: explained variance, dead features."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from crossdict_jax.dictionaries.base import Dictionary, Hyper, Whole, keep_top_k, matmul


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
    z: jax.Array,
    residual: jax.Array,
    *,
    dead: jax.Array,
    hyper: Hyper,
    dtype=None,
) -> jax.Array:
    """Returns the share [] of the residual that the k_aux strongest dead features leave; else 0.

    Divided by the residual's variance (Gao et al. 2024, arXiv 2406.04093, section A.2). Skipped
    while everything is alive: it costs as much again as the rest of the loss.

    Args:
      z: pre-activations [batch, width].
      residual: scaled rows less their reconstruction [batch, d_out]; gets no gradient.
    """
    residual = jax.lax.stop_gradient(residual)

    def revive(_):
        strongest = min(hyper.k_aux, dictionary.width)
        f = keep_top_k(jnp.where(dead[None, :], z, 0.0), strongest)
        whole = hyper.whole
        spread = variance(residual) if whole is None else whole.residual_variance
        share = share_left(residual, matmul(f, dictionary.W_dec[...], dtype), spread)
        return jnp.where(dead.any(), share, 0.0)

    return jax.lax.cond(hyper.revive, revive, lambda _: jnp.zeros(()), None)
