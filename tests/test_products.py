"""Products whose gradients lie as their operands do: the same numbers as JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossdict_jax.ops import matmul


def operands(seed, *, members=()):
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = [(7, 5), (5, 3), (7, 3)]
    return [jax.random.normal(key, (*members, *size)) for key, size in zip(keys, sizes)]


def slopes(product, a, b, weight):
    """Value and both gradients of a loss that is not linear in the product."""
    return jax.value_and_grad(lambda a, b: jnp.sum(weight * jnp.square(product(a, b))), (0, 1))(
        a, b
    )


@pytest.mark.parametrize("members", [(), (2,)], ids=["one", "ensemble"])
def test_value_and_gradients_are_those_of_jax(members):
    given = operands(len(members), members=members)

    def of(product):
        one = lambda *each: slopes(product, *each)  # noqa: E731
        return jax.vmap(one)(*given) if members else one(*given)

    for ours, true in zip(jax.tree.leaves(of(matmul)), jax.tree.leaves(of(jnp.matmul))):
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
