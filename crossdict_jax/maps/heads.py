"""Heads of trained maps: from a network's estimates to features that can be exactly zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.dictionaries.base import keep_top_k
from crossdict_jax.errors import UserError

INITIAL_THRESHOLD = 1.0  # in standard units of a feature: near where most of them end
BANDWIDTH = 0.5  # in the same units, of the kernel that trains thresholds


class Head(nnx.Module):
    """``f = relu(z)``; z [batch, width] estimates the mean of each feature given A's side.

    The best prediction of a sparsity under squared error keeps the largest estimates and drops
    the rest, so the network is trained on what comes before the selection, ``rectified(z)``.
    """

    name = "relu"

    def __init__(self, dictionary: Dictionary):
        self.k = dictionary.k

    def __call__(self, z: jax.Array, scale: jax.Array) -> jax.Array:
        """Returns features [batch, width], >= 0, of estimates in raw units.

        Args:
          scale: [width], the standard unit of each feature.
        """
        return jax.nn.relu(z)

    def fires(self, z: jax.Array, scale: jax.Array) -> jax.Array | None:
        """Returns 1 where a feature fires and 0 elsewhere, with a gradient; None: by its value."""
        return None


class TopK(Head):
    """``f`` = the k largest of relu(z) in a row, k of the target's dictionary."""

    name = "topk"

    def __call__(self, z: jax.Array, scale: jax.Array) -> jax.Array:
        return keep_top_k(z, self.k)


class JumpReLU(Head):
    """``f = z 1[z > threshold scale]``; the loss of firing rates alone trains the thresholds.

    Squared error would have them at 0, where the estimates of the whole target are kept.

    Attributes:
      threshold: float32 [width], in standard units, so that one rate of learning suits all.
    """

    name = "jumprelu"

    def __init__(self, dictionary: Dictionary):
        super().__init__(dictionary)
        self.threshold = nnx.Param(jnp.full(dictionary.width, INITIAL_THRESHOLD, jnp.float32))

    def __call__(self, z: jax.Array, scale: jax.Array) -> jax.Array:
        above = z > self.threshold[...][None, :] * scale[None, :]
        return jnp.where(above, jax.nn.relu(z), 0.0)

    def fires(self, z: jax.Array, scale: jax.Array) -> jax.Array:
        return gate(z / scale[None, :], self.threshold[...][None, :]) * (z > 0)


HEADS = {head.name: head for head in (Head, TopK, JumpReLU)}


def build(name: str, dictionary: Dictionary) -> Head:
    """Returns a fresh head of that name for the features of the target's dictionary."""
    return HEADS[name](dictionary)


def check(name: str, dictionary: Dictionary, label: str) -> None:
    """Raises UserError if a head is unknown or does not fit the target's dictionary."""
    if name not in HEADS:
        raise UserError(f"map.head={name} is no head; use {', '.join(HEADS)}.")
    if name == TopK.name and not dictionary.has_k:
        raise UserError(
            f"map.head=topk keeps as many features as the target's dictionary, and that of {label} "
            f"({type(dictionary).__name__}) fixes no number; use jumprelu."
        )


def rectified(z: jax.Array) -> jax.Array:
    """Returns relu(z) with the gradient of z: a feature that is off can still be switched on.

    Against a target, the gradient relu(z) - t in z belongs to a convex loss whose minimum is the
    mean of the target (Auer, Herbster and Warmuth 1996; Kakade et al. 2011). The rectifier's own
    gradient, 0 where z < 0, loses every feature that once is below 0 on all rows.
    """
    return z + jax.lax.stop_gradient(jax.nn.relu(z) - z)


def gate(z: jax.Array, threshold: jax.Array) -> jax.Array:
    """Returns 1[z > threshold] [batch, width] with an estimated gradient.

    That is the density of a rectangular kernel, 1[|z - threshold| < BANDWIDTH / 2] / BANDWIDTH, in
    z, and its negative in the threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).
    """
    fixed = jax.lax.stop_gradient
    distance = z - threshold
    near = jnp.abs(fixed(distance)) < BANDWIDTH / 2
    return (distance > 0) + near / BANDWIDTH * (distance - fixed(distance))
