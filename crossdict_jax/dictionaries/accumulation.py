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

from crossdict_jax.dictionaries.base import Dictionary, Hyper, Whole
from crossdict_jax.dictionaries.losses import variance
from crossdict_jax.dictionaries.sparse import Code, active_rows
from crossdict_jax.products import matmul

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


def split(rows: Any, parts: int) -> Any:
    """Returns rows [batch, d] as [parts, batch / parts, d]: part j has rows j, j + parts, ...

    So rows that are spread over devices stay where they are.
    """
    return jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), rows)


def join(split: jax.Array) -> jax.Array:
    """Returns what ``split`` took apart, [batch, d]."""
    return split.swapaxes(0, 1).reshape(-1, *split.shape[2:])


def whole_of(d: Dictionary, rows: Rows, *, hyper: Hyper, parts: int, dtype=None) -> Whole:
    """Returns what losses need to know of a whole batch whose rows come in parts.

    Holds no [batch, width] array, but for architectures that choose features over the batch one.
    """
    u, t = d.scaled_pair(*rows)
    chunks = split((u, t), parts)
    whole = Whole(len(u), variance(t), jnp.ones(()), jnp.zeros(()), jnp.zeros(()))
    if d.selects_over_rows:
        z = jax.lax.map(lambda u: jax.nn.relu(d.pre_activations(u, dtype)), chunks[0])
        whole = dataclasses.replace(whole, threshold=d.batch_threshold(join(z)))

    def code(u):
        return d.training_code(d.pre_activations(u, dtype), whole)

    def residual(chunk):
        u, t = chunk
        return t - matmul(code(u), d.W_dec[...], dtype) - d.b_dec[...][None, :]

    def left(_):
        return variance(join(jax.lax.map(residual, chunks)))

    l0 = jax.lax.map(lambda u: Fired.of(code(u)).l0, chunks[0]).mean()
    left_variance = jax.lax.cond(hyper.most_dead > 0, left, lambda _: jnp.ones(()), None)
    return dataclasses.replace(whole, residual_variance=left_variance, l0=l0)


def gradients(
    loss_of: Callable[..., tuple], params: Any, rows: Rows, parts: int
) -> tuple[jax.Array, dict[str, jax.Array], Fired, Any]:
    """Returns (loss, its parts, what fired, gradients) of a batch that comes in parts.

    Args:
      loss_of: (params, x, y) -> (loss, (its parts, features)).
    """
    slope = jax.value_and_grad(loss_of, has_aux=True)

    def one(rows):
        (loss, (terms, f)), grads = slope(params, *rows)
        return loss, terms, Fired.of(f), grads

    if parts == 1:
        return one(rows)

    def add(total, rows):
        *numbers, grads = one(rows)
        return jax.tree.map(jnp.add, total, grads), numbers

    nothing = jax.tree.map(jnp.zeros_like, params)
    total, (loss, terms, fired) = jax.lax.scan(add, nothing, split(rows, parts))
    fired = Fired(fired.active.any(axis=0), fired.l0.mean(), fired.least.min())
    terms = {name: term.mean() for name, term in terms.items()}
    return loss.mean(), terms, fired, jax.tree.map(lambda a: a / parts, total)
