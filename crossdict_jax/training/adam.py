"""Adam behind a limit to the gradient's norm, as optax has it, but for how it divides.

Where arrays are divided by one number and then by another, a compiler chooses among forms that
differ in the last bit, by what else is in the program: on one device otherwise than on two. Here
such numbers become factors before they meet an array.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

MOMENTS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}


def adam(clip: float) -> optax.GradientTransformation:
    """Returns what is to be times the rate; the norm of all gradients together is at most ``clip``.

    As ``optax.chain(clip_by_global_norm(clip), scale_by_adam(**MOMENTS))``, with the same state.
    """
    return optax.chain(
        optax.stateless(lambda gradients, _: _clipped(gradients, clip)),
        optax.GradientTransformation(optax.scale_by_adam(**MOMENTS).init, _update),
    )


def _clipped(gradients: optax.Updates, most: float) -> optax.Updates:
    factor = jnp.minimum(1.0, most / optax.tree.norm(gradients))
    return optax.tree.scale(jax.lax.optimization_barrier(factor), gradients)


def _update(gradients, state, params=None):
    b1, b2, eps = MOMENTS.values()
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(gradients, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(gradients, state.nu, b2, 2)
    factors = 1 / (1 - b1**count), 1 / (1 - b2**count)
    of_mu, of_nu = jax.lax.optimization_barrier(factors)
    updates = jax.tree.map(lambda m, v: (m * of_mu) / (jnp.sqrt(v * of_nu) + eps), mu, nu)
    return updates, optax.ScaleByAdamState(count, mu, nu)
