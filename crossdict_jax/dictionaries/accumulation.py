"""Gradient accumulation: a step's rows in several parts, with the gradients of all at once.

Losses are not means over rows alone: they divide by the variance of a batch, choose features over
all of its rows, or compare its mean L0 with a target. So a first pass over the parts, without
gradients, takes these numbers of the whole batch (``whole_of``); given them, the loss of the whole
is the mean of the parts' losses, and so is its gradient. Equal to one batch but for the order of
float32 sums; of two values that tie for the last place in a batch's code the other may be kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crossdict_jax import modules
from crossdict_jax.dictionaries.base import Dictionary, Hyper, Whole
from crossdict_jax.ops.products import matmul
from crossdict_jax.ops.sparse import Code, active_rows
from crossdict_jax.training.parts import mapped, summed

Rows = tuple[jax.Array, jax.Array | None]  # x [batch, d_model], and y [batch, d_out] or None


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
    def of(cls, f: jax.Array | Code) -> Fired:
        """Returns it of features f [batch, width], or of their code."""
        rows = active_rows(f)
        values, batch = (f.values, f.batch) if isinstance(f, Code) else (f, len(f))
        least = jnp.min(jnp.where(values > 0, values, jnp.inf))
        return cls(rows > 0, rows.sum(dtype=jnp.float32) / batch, least)


def whole_of(d: Dictionary, rows: Rows, *, hyper: Hyper, parts: int, dtype=None) -> Whole:
    """Returns what losses need to know of a whole batch whose rows come in parts.

    Holds no [batch, width] array, but for architectures that choose features over the batch one.
    """
    graphdef, params = modules.split(d)
    u, t = d.scaled_pair(*rows)
    whole = Whole(len(u), _variance(t, parts), jnp.ones(()), jnp.zeros(()), jnp.zeros(()))

    def positive(u, params):
        return jax.nn.relu(modules.merge(graphdef, params).pre_activations(u, dtype))

    def code(u, params, whole):
        d = modules.merge(graphdef, params)
        return d.training_code(d.pre_activations(u, dtype), whole)

    def l0(u, params, whole):
        return Fired.of(code(u, params, whole)).l0, ()

    def residual(pair, params, whole):
        (u, t), d = pair, modules.merge(graphdef, params)
        return t - matmul(code(u, params, whole), d.W_dec[...], dtype) - d.b_dec[...][None, :]

    def left(_):
        return _variance(mapped(residual, (u, t), parts, params, whole), parts)

    if d.selects_over_rows:
        z = mapped(positive, u, parts, params)
        whole = dataclasses.replace(whole, threshold=d.batch_threshold(z))
    mean_l0 = summed(l0, u, parts, params, whole)[0] / parts
    left_variance = jax.lax.cond(hyper.most_dead > 0, left, lambda _: jnp.ones(()), None)
    return dataclasses.replace(whole, residual_variance=left_variance, l0=mean_l0)


def _variance(x: jax.Array, parts: int) -> jax.Array:
    """Returns the ``variance`` [] of rows [batch, d] that come in parts."""
    mean = summed(lambda x: (x.sum(axis=0), ()), x, parts)[0] / len(x)
    distances = summed(lambda x, mean: (jnp.sum(jnp.square(x - mean[None, :])), ()), x, parts, mean)
    return distances[0] / len(x)


def gradients(
    loss_of: Callable[..., tuple], params: Any, rows: Rows, parts: int, *given: Any
) -> tuple[jax.Array, dict[str, jax.Array], Fired, Any]:
    """Returns (loss, its parts, what fired, gradients) of a batch that comes in parts.

    Args:
      loss_of: (params, x, y, *given) -> (loss, (its parts, features)); reads traced values through
        its arguments alone.
    """
    slope = jax.value_and_grad(loss_of, has_aux=True)

    def one(rows, params, *given):
        (loss, (terms, f)), grads = slope(params, *rows, *given)
        return loss, terms, Fired.of(f), grads

    if parts == 1:
        return one(rows, params, *given)

    def part(rows, *given):
        loss, terms, fired, grads = one(rows, *given)
        return (loss, terms, fired.l0, grads), fired

    total, fired = summed(part, rows, parts, params, *given)
    loss, terms, l0, grads = jax.tree.map(lambda a: a / parts, total)
    return loss, terms, Fired(fired.active.any(axis=0), l0, fired.least.min()), grads
