"""Adam as optax has it, but for how it divides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crossdict_jax.training.adam import MOMENTS, adam


def gradients(step, size):
    rng = np.random.default_rng(step)
    return {"W": size * rng.normal(size=(5, 3)), "b": size * rng.normal(size=3)}


@pytest.mark.parametrize("size", [0.01, 30.0])
def test_updates_and_state_are_those_of_optax(size):
    """Gradients below the limit, and far above it."""
    ours = adam(1.0)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(**MOMENTS))
    params = jax.tree.map(jnp.zeros_like, gradients(0, size))
    state, true = ours.init(params), theirs.init(params)
    for step in range(20):
        given = jax.tree.map(jnp.asarray, gradients(step, size))
        update, state = jax.jit(ours.update)(given, state)
        expected, true = jax.jit(theirs.update)(given, true)
        assert jax.tree.structure(state) == jax.tree.structure(true)
        for a, b in zip(jax.tree.leaves((update, state)), jax.tree.leaves((expected, true))):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def test_no_gradient_gives_no_update():
    zeros = {"W": jnp.zeros((2, 2))}
    update, _ = adam(1.0).update(zeros, adam(1.0).init(zeros))
    np.testing.assert_array_equal(update["W"], 0)


def test_a_gradient_that_is_not_a_number_shows():
    bad = {"W": jnp.asarray([1.0, jnp.nan]), "b": jnp.ones(2)}
    update, _ = adam(1.0).update(bad, adam(1.0).init(bad))
    assert np.isnan(update["W"]).any()
