"""Heads of trained maps: from estimates z [batch, width] of features' means given A's side to
features that can be exactly zero. Training reads ``rectified(z)``, before the selection.
"""

import jax
import jax.numpy as jnp

from crossdict_jax.ops import keep_top_k

INITIAL_THRESHOLD = 1.0  # in standard units of a feature: near where training ends
BANDWIDTH = 0.5  # in the same units, of the kernel that trains thresholds


def select(head: str, z: jax.Array, *, k: int, threshold: jax.Array | None) -> jax.Array:
    """Returns features [batch, width], >= 0, of estimates in raw units; ``threshold`` is [width].

    relu: ``relu(z)``; topk: its k largest values in a row; jumprelu: ``z 1[z > threshold]``.
    """
    if head == "topk":
        return keep_top_k(z, k)
    f = jax.nn.relu(z)
    return f if head == "relu" else jnp.where(z > threshold[None, :], f, 0.0)


def rectified(z: jax.Array) -> jax.Array:
    """Returns relu(z) with the gradient of z: a feature that is off can still be switched on.

    The gradient relu(z) - t belongs to a convex loss whose minimum is the target's mean (Auer,
    Herbster and Warmuth 1996; Kakade et al. 2011). The rectifier's own gradient, 0 where z < 0,
    loses every feature that once is below 0 on all rows.
    """
    return z + jax.lax.stop_gradient(jax.nn.relu(z) - z)


def gate(z: jax.Array, threshold: jax.Array) -> jax.Array:
    """Returns 1[z > threshold] [batch, width] with an estimated gradient.

    A rectangular kernel, 1[|z - threshold| < BANDWIDTH / 2] / BANDWIDTH, in z, and its negative in
    the threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).
    """
    fixed = jax.lax.stop_gradient
    distance = z - threshold
    near = jnp.abs(fixed(distance)) < BANDWIDTH / 2
    return (distance > 0) + near / BANDWIDTH * (distance - fixed(distance))
