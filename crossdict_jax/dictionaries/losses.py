"""Shared by the losses of several architectures: explained variance, and dead features."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from crossdict_jax.ops import keep_top_k, matmul

AUXK_COEFFICIENT = 1 / 32  # weight of the dead features' reconstruction (Gao et al. 2024)


@dataclasses.dataclass(frozen=True)
class Hyper:
    """What a loss reads of the settings and of the state at one step.

    The last four describe a batch that comes in parts; else None.

    Attributes:
      l1_coefficient: weight of the sparsity penalty at this step (after warm-up; traced).
      revived: how many dead features ``auxk`` makes room for; 0: none is dead (static).
      k_aux: how many of them take part in the reconstruction of a row.
      l0_target: active features a row to aim for; 0 for none.
      nested_fractions: of the width, nested dictionaries beside that of all features.
      rows: of the whole batch (static).
      products: of sparse codes, see ``ops.sparse_code`` (static).
      variance: [], of the rows to reconstruct.
      residual_variance: [], of their residuals.
      threshold: [], of architectures that choose features over the batch: the least value kept.
      l0: [], active features a row.
    """

    l1_coefficient: jax.Array | float
    revived: int
    k_aux: int
    l0_target: float = 0.0
    nested_fractions: tuple[float, ...] = ()
    rows: int = 0
    products: str | None = None
    variance: jax.Array | None = None
    residual_variance: jax.Array | None = None
    threshold: jax.Array | None = None
    l0: jax.Array | None = None


def power(x: jax.Array) -> jax.Array:
    """Returns the mean squared norm [] of rows x [batch, d_model]."""
    return jnp.mean(jnp.sum(jnp.square(x), axis=1))


def fvu(x: jax.Array, x_hat: jax.Array, variance: jax.Array | None = None) -> jax.Array:
    """Returns the fraction [] of the variance of x [batch, d] that x_hat leaves unexplained.

    ``variance`` [] is the rows' mean squared distance to their mean; None: that of x.
    """
    if variance is None:
        variance = power(x - x.mean(axis=0, keepdims=True))
    return power(x - x_hat) / jnp.maximum(variance, 1e-8)


def auxk(
    dictionary: Any,
    rows: jax.Array,
    residual: jax.Array,
    *,
    dead: jax.Array,
    hyper: Hyper,
    dtype=None,
) -> jax.Array:
    """Returns the share [] of the residual that the k_aux strongest dead features leave; else 0.

    Divided by the residual's variance (Gao et al. 2024, arXiv 2406.04093, section A.2). Of more
    dead features than there is room for, n, the first n are revived; costs 10 B d n operations.

    Args:
      dictionary: gives ``encoder()``, W_dec and width.
      rows: what the encoder reads, scaled [batch, d].
      residual: scaled rows less their reconstruction [batch, d_out]; gets no gradient.
      dead: bool [width].
    """
    n, width, used = hyper.revived, dictionary.width, dead
    if not n:
        return jnp.zeros(())
    (W_enc, bias), W_dec = dictionary.encoder(), dictionary.W_dec[...]
    if n < width:
        used = jnp.arange(n) < jnp.sum(dead)
        features = jnp.nonzero(dead, size=n, fill_value=0)[0]
        W_enc, bias, W_dec = W_enc[:, features], bias[features], W_dec[features]
    z = matmul(rows, W_enc, dtype) + bias[None, :]
    f = keep_top_k(jnp.where(used[None, :], z, 0.0), min(hyper.k_aux, n))
    left = fvu(jax.lax.stop_gradient(residual), matmul(f, W_dec, dtype), hyper.residual_variance)
    return jnp.where(dead.any(), left, 0.0)
