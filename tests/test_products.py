"""Products whose gradients lie as their operands do: the same numbers as JAX's own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.config import architectures
from crossdict_jax.dictionaries import base
from crossdict_jax.maps.kinds.hypernetwork import TargetTower, Tower
from crossdict_jax.ops import matmul


@pytest.mark.parametrize("architecture", architectures())
def test_products_say_their_precision_whatever_the_process_says(architecture):
    """Encoding, decoding, the loss and its gradients, as in a notebook on an accelerator."""
    shape = {"d_model": 6, "width": 16, "k": 4, "key": jax.random.key(0)}
    graphdef, params = modules.abstract(lambda: base.build(architecture, **shape))
    known = {"l1_coefficient": 0.1, "revived": 16, "k_aux": 4, "nested_fractions": (0.5,)}

    def everything(params, x, dead):
        hyper = base.Hyper(**known, dead=dead)
        loss = lambda p: modules.merge(graphdef, p).losses(x, hyper)[0]  # noqa: E731
        return modules.merge(graphdef, params)(x), jax.grad(loss)(params)

    arrays = jnp.ones((8, 6)), jnp.ones(16, bool)
    assert len(exact_products(everything, params, *arrays)) > 5


def exact_products(function, *arguments) -> list[str]:
    """The products of a program, which must state that they are float32."""
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(function).lower(*arguments).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert all("precision = [HIGHEST, HIGHEST]" in dot for dot in dots)
    return dots


def test_a_written_map_is_exact_too():
    sizes = {"d_model": 6, "layers": 2, "rank": 3}
    source, target = (tower(**sizes, rngs=nnx.Rngs(0)) for tower in (Tower, TargetTower))
    shapes = {"moves": (8, 6), "reads": (8, 6), "writes": (8, 6), "facts": (8, 4), "nearness": (2,)}
    side = {name: jnp.ones(shape) for name, shape in shapes.items()}
    graphs, params = zip(*map(modules.split, (source, target)))

    def write(params, side):
        source, target = map(modules.merge, graphs, params)
        return source.rows(side["moves"], side["nearness"]), target(side, None)

    assert len(exact_products(write, params, side)) > 7


def operands(seed, *, members=()):
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = [(7, 5), (5, 3), (7, 3)]
    return [jax.random.normal(key, (*members, *size)) for key, size in zip(keys, sizes)]


def test_value_and_gradients_are_those_of_jax():
    """Of members of an ensemble, and of a loss that is not linear in the product."""

    def slopes(product, a, b, weight):
        loss = lambda a, b: jnp.sum(weight * jnp.square(product(a, b)))  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(a, b)

    ways = (jax.vmap(partial(slopes, product)) for product in (matmul, jnp.matmul))
    results = (slopes_of(*operands(1, members=(2,))) for slopes_of in ways)
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
