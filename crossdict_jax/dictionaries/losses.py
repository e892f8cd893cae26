"""What the losses of several architectures share: explained variance, and dead features."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from crossdict_jax.ops import keep_top_k, matmul

FEW = 8  # dead features are few up to this part of the width
AUXK_COEFFICIENT = 1 / 32  # weight of the dead features' reconstruction (Gao et al. 2024)


@dataclasses.dataclass(frozen=True)
class Hyper:
    """What a loss reads of the settings and of the state at one step.

    The last four are of a batch that comes in parts; else None.

    Attributes:
      l1_coefficient: weight of the sparsity penalty at this step (after warm-up; traced).
      most_dead: dead features of the member that has most. One scalar for the whole ensemble, so
        that a branch on it stays a branch under vmap (traced).
      k_aux: how many dead features take part in their reconstruction.
      l0_target: active features a row to aim for; 0 for none.
      nested_fractions: of the width, nested dictionaries beside that of all features.
      rows: of the batch that may come in parts (static).
      variance: [], of the rows to reconstruct.
      residual_variance: [], of what is left of them; 1 while nothing is dead.
      threshold: [], of architectures that choose features over the batch: the least value kept.
      l0: [], active features a row.
    """

    l1_coefficient: jax.Array | float
    most_dead: jax.Array | int
    k_aux: int
    l0_target: float = 0.0
    nested_fractions: tuple[float, ...] = ()
    rows: int = 0
    variance: jax.Array | None = None
    residual_variance: jax.Array | None = None
    threshold: jax.Array | None = None
    l0: jax.Array | None = None


def power(x: jax.Array) -> jax.Array:
    """Returns the mean squared norm [] of rows x [batch, d_model]."""
    return jnp.mean(jnp.sum(jnp.square(x), axis=1))


def fvu(x: jax.Array, x_hat: jax.Array, variance: jax.Array | None = None) -> jax.Array:
    """Returns the fraction [] of the variance of rows x [batch, d] that x_hat leaves unexplained.

    Args:
      variance: [], the mean squared distance of rows to their mean; None: that of x.
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

    Divided by the residual's variance (Gao et al. 2024, arXiv 2406.04093, section A.2). Costs
    nothing while all are alive, 10 B d n operations while at most n = width / FEW features are
    dead, and as much as a dense step while more are.

    Args:
      dictionary: gives ``encoder()``, W_dec and width.
      rows: what the encoder reads, scaled [batch, d].
      residual: scaled rows less their reconstruction [batch, d_out]; gets no gradient.
    """
    residual = jax.lax.stop_gradient(residual)
    width, few = dictionary.width, dictionary.width // FEW

    def share(n, parameters, data):
        """Where at most n features are dead: of those alone, unless n is the width."""
        (W_enc, bias, W_dec), (rows, residual, dead, variance) = parameters, data
        used = dead
        if n < width:
            used = jnp.arange(n) < jnp.sum(dead)
            features = jnp.nonzero(dead, size=n, fill_value=0)[0]
            W_enc, bias, W_dec = W_enc[:, features], bias[features], W_dec[features]
        z = matmul(rows, W_enc, dtype) + bias[None, :]
        f = keep_top_k(jnp.where(used[None, :], z, 0.0), min(hyper.k_aux, n))
        return jnp.where(dead.any(), fvu(residual, matmul(f, W_dec, dtype), variance), 0.0)

    branches = (lambda parameters, data: jnp.zeros(()), partial(share, few), partial(share, width))
    most_dead = jnp.asarray(hyper.most_dead)
    branch = jnp.where(most_dead > few, 2, jnp.minimum(most_dead, 1))
    parameters = (*dictionary.encoder(), dictionary.W_dec[...])
    return one_of(branches, branch, parameters, (rows, residual, dead, hyper.residual_variance))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def one_of(branches: tuple[Callable, ...], branch, parameters, data) -> jax.Array:
    """Returns branches[branch](parameters, data), a loss [] with a gradient in the parameters.

    That is computed with the value, inside the branch. Else all branches would have to hand over
    what the dearest needs for its gradient, arrays [batch, width], at every step.

    Args:
      branch: int []. Under vmap it must be the same for all members.
    """
    return jax.lax.switch(branch, branches, parameters, data)


one_of.defvjp(
    lambda branches, branch, parameters, data: jax.lax.switch(
        branch, [jax.value_and_grad(f) for f in branches], parameters, data
    ),
    lambda branches, slopes, gradient: (None, jax.tree.map(lambda g: gradient * g, slopes), None),
)
