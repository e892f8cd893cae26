"""Products whose gradients lie as their operands do: the same numbers as JAX's own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax.ops import matmul


def operands(seed, *, members=()):
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = [(7, 5), (5, 3), (7, 3)]
    return [jax.random.normal(key, (*members, *size)) for key, size in zip(keys, sizes)]


def test_value_and_gradients_are_those_of_jax():
    """Of members of an ensemble, and of a loss that is not linear in the product."""

    def slopes(product, a, b, weight):
        loss = lambda a, b: jnp.sum(weight * jnp.square(product(a, b)))  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(a, b)

    results = (
        jax.vmap(partial(slopes, p))(*operands(1, members=(2,))) for p in (matmul, jnp.matmul)
    )
    for ours, true in zip(*map(jax.tree.leaves, results)):
        assert np.abs(true).max() > 0.1
        np.testing.assert_allclose(ours, true, rtol=1e-5, atol=1e-5)


def test_all_three_products_take_rounded_inputs():
    """What autodiff makes of a product of rounded inputs would multiply the gradient unrounded."""
    a, b, g = operands(2)
    value, backward = jax.vjp(lambda a, b: matmul(a, b, jnp.bfloat16), a, b)

    def rounded(x):
        return np.asarray(x.astype(jnp.bfloat16), np.float64)

    exact = (rounded(a) @ rounded(b), rounded(g) @ rounded(b).T, rounded(a).T @ rounded(g))
    for ours, true in zip((value, *backward(g)), exact):
        assert ours.dtype == jnp.float32  # sums are not rounded
        np.testing.assert_allclose(ours, true, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(value) - np.asarray(a) @ np.asarray(b)).max() > 1e-3
