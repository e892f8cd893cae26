"""What the losses of several architectures share: explained variance, dead features, parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crossdict_jax.dictionaries.base import Dictionary, Hyper, WholeBatch, keep_top_k
from crossdict_jax.ops import Code, activity, matmul

FEW = 8  # dead features are few up to this part of the width


def power(x: jax.Array) -> jax.Array:
    """Returns the mean squared norm [] of rows x [batch, d_model]."""
    return jnp.mean(jnp.sum(jnp.square(x), axis=1))


def variance(x: jax.Array) -> jax.Array:
    """Returns the mean squared distance [] of rows x [batch, d_model] to their mean."""
    return power(x - x.mean(axis=0, keepdims=True))


def fvu(x: jax.Array, x_hat: jax.Array, whole: WholeBatch | None = None) -> jax.Array:
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
    width, few = dictionary.width, dictionary.width // FEW

    def share(n, parameters, data):
        """Where at most n features are dead: of those alone, unless n is the width."""
        (W_enc, bias, W_dec), (rows, residual, dead, spread) = parameters, data
        used = dead
        if n < width:
            used = jnp.arange(n) < jnp.sum(dead)
            features = jnp.nonzero(dead, size=n, fill_value=0)[0]
            W_enc, bias, W_dec = W_enc[:, features], bias[features], W_dec[features]
        z = matmul(rows, W_enc, dtype) + bias[None, :]
        f = keep_top_k(jnp.where(used[None, :], z, 0.0), min(hyper.k_aux, n))
        left = share_left(residual, matmul(f, W_dec, dtype), spread)
        return jnp.where(dead.any(), left, 0.0), None

    branches = (
        lambda parameters, data: (jnp.zeros(()), None),
        partial(share, few),
        partial(share, width),
    )
    most_dead = jnp.asarray(hyper.most_dead)
    branch = jnp.where(most_dead > few, 2, jnp.minimum(most_dead, 1))
    parameters = (*dictionary.encoder(), dictionary.W_dec[...])
    return one_of(branches, branch, parameters, (rows, residual, dead, spread))[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def one_of(branches: tuple[Callable, ...], branch, parameters, data) -> tuple[jax.Array, Any]:
    """Returns branches[branch](parameters, data): a loss [] and more, of equal shapes in all.

    The loss has a gradient in the parameters, and nothing else has any. It is computed with the
    value, inside the branch. Else both branches would have to hand over what the dearer one needs
    for its gradient, arrays [batch, width], at every step.

    Args:
      branch: int []. Under vmap it must be the same for all members.
    """
    return jax.lax.switch(branch, branches, parameters, data)


def _one_of_forward(branches, branch, parameters, data):
    slopes = [jax.value_and_grad(f, has_aux=True) for f in branches]
    return jax.lax.switch(branch, slopes, parameters, data)


def _one_of_backward(branches, of_parameters, gradient):
    return None, jax.tree.map(lambda g: gradient[0] * g, of_parameters), None


one_of.defvjp(_one_of_forward, _one_of_backward)


class Fired(NamedTuple):
    """What a batch's features say beside their loss.

    Attributes:
      active: bool [width], whether a feature is active in some row.
      l0: [], active features a row.
      least: [], the smallest active value; infinity where there is none.
    """

    active: jax.Array
    l0: jax.Array
    least: jax.Array

    @classmethod
    def of(cls, code: Code) -> Fired:
        """Returns it of features [batch, width], or of their code."""
        return cls(*activity(code))

    def join(self) -> Fired:
        """Returns that of a batch from those of its parts, stacked on a leading axis."""
        return Fired(self.active.any(axis=0), self.l0.mean(), self.least.min())


def whole_batch(d: Dictionary, parts: tuple, *, hyper: Hyper, dtype=None) -> WholeBatch:
    """Returns what losses need to know of a whole batch whose rows come in parts.

    Losses are not means over rows alone: they divide by the variance of a batch, choose features
    over all of its rows, or compare its mean L0 with a target. Holds no [batch, width] array, but
    for architectures that choose features over the batch one.

    Args:
      parts: (x [parts, rows, d_model], y [parts, rows, d_out] or None), raw.
    """
    over = jax.lax.map
    u, t = over(lambda part: d.scaled_pair(*part), parts)
    rows = u.shape[0] * u.shape[1]

    def spread(x):
        mean = x.mean(axis=(0, 1))
        return over(lambda part: power(part - mean[None, :]), x).mean()

    zero = jnp.zeros(())
    whole = WholeBatch(rows, spread(t), jnp.ones(()), zero, zero)
    if d.selects_over_rows:
        z = over(lambda part: jax.nn.relu(d.pre_activations(part, dtype)), u)
        whole = whole.replace(threshold=d.batch_threshold(z.reshape(rows, d.width)))

    def code(part):
        return d.training_code(d.pre_activations(part, dtype), whole)

    def residual(pair):
        u, t = pair
        return t - matmul(code(u), d.W_dec[...], dtype) - d.b_dec[...][None, :]

    left = jax.lax.cond(
        jnp.asarray(hyper.most_dead) > 0,
        lambda: spread(over(residual, (u, t))),
        lambda: jnp.ones(()),
    )
    l0 = over(lambda part: Fired.of(code(part)).l0, u).mean()
    return whole.replace(residual_variance=left, l0=l0)
