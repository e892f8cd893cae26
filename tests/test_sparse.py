"""Sparse codes: every fast sum equals the plain one, on random rows and on the awkward ones."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossdict_jax.dictionaries import losses, sparse
from crossdict_jax.dictionaries.base import keep_top_k
from crossdict_jax.training.mesh import DATA, MEMBER, make_mesh

# batch, d, width, k: one place; no even number; several blocks of terms and three levels
SHAPES = [(3, 1, 1, 1), (40, 7, 21, 5), (300, 6, 64, 37)]


def problem(shape, *, seed=0, busy=0.0):
    """Rows, encoder, bias, decoder and what the reconstruction's error is weighted with.

    Args:
      busy: added to the bias of the first feature; if large, it is active in every row.
    """
    batch, d, width, k = shape
    keys = jax.random.split(jax.random.key(seed), 5)
    sizes = [(batch, d), (d, width), (width,), (width, d), (batch, d)]
    u, W_enc, bias, W_dec, weight = (jax.random.normal(*one) for one in zip(keys, sizes))
    return (u, W_enc, bias.at[0].add(busy), W_dec), weight, k


def fast(k, weight, u, W_enc, bias, W_dec, dtype=None):
    code = sparse.encode(u, W_enc, bias, partial(sparse.top_k, k=k), dtype)
    return jnp.sum(weight * jnp.square(sparse.decode(code, W_dec, dtype) - u))


def plain(k, weight, u, W_enc, bias, W_dec):
    f = keep_top_k(u @ W_enc + bias[None, :], k)
    return jnp.sum(weight * jnp.square(f @ W_dec - u))


def assert_same_slopes(weight, k, arguments, *, tolerance=2e-5, how=lambda f: f, **options):
    """Value and gradients in rows, encoder, bias and decoder, each relative to its largest."""
    slopes = partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
    ours = jax.jit(how(slopes(partial(fast, k, weight, **options))))(*arguments)
    true = jax.jit(how(slopes(partial(plain, k, weight))))(*arguments)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(true), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=tolerance * float(np.abs(b).max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_dense_products(shape):
    arguments, weight, k = problem(shape, busy=100.0)
    assert_same_slopes(weight, k, arguments)


def test_rows_with_few_or_no_positive_values():
    (u, W_enc, bias, W_dec), weight, k = problem(SHAPES[1])
    bias = bias - jnp.where(jnp.arange(21) < 19, 1e3, 3.0)  # two features are left, not everywhere
    f = keep_top_k(u @ W_enc + bias[None, :], k)
    assert set(np.asarray((f > 0).sum(axis=1))) == {0, 1, 2}
    assert_same_slopes(weight, k, (u, W_enc, bias, W_dec))


def test_an_ensemble_is_its_members():
    many = [problem(SHAPES[1], seed=s)[0] for s in range(2)]
    stacked = [jnp.stack(each) for each in zip(*many)]
    _, weight, k = problem(SHAPES[1])
    assert_same_slopes(weight, k, stacked, how=jax.vmap)


def test_bfloat16_rounds_what_is_multiplied_and_no_sum():
    arguments, weight, k = problem((40, 32, 20, 20))  # all features: rounding changes no choice
    assert_same_slopes(weight, k, arguments, tolerance=3e-2, dtype=jnp.bfloat16)
    exact, rounded = fast(k, weight, *arguments), fast(k, weight, *arguments, dtype=jnp.bfloat16)
    assert abs(exact - rounded) > 1e-6 * abs(exact)


@pytest.mark.parametrize(("width", "k"), [(21, 5), (64, 3), (96, 1), (48, 48), (1024, 4)])
def test_top_k_is_exact(width, k):
    z = jax.random.normal(jax.random.key(0), (30, width))
    code = sparse.top_k(z, k)
    np.testing.assert_array_equal(code.dense(), keep_top_k(z, k))
    assert code.values.shape == (30, k) and (np.diff(code.values, axis=1) <= 0).all()


def test_of_equal_values_the_first_features_are_taken():
    z = jnp.tile(jnp.asarray([[1.0, 3.0, 2.0, 2.0]]), (2, 16))
    code = sparse.top_k(z, 20)  # sixteen threes, and four of the 32 twos
    assert set(np.asarray(code.features)[0, 16:]) == {2, 3, 6, 7}
    np.testing.assert_array_equal(np.asarray(code.values)[0], [3.0] * 16 + [2.0] * 4)


def test_active_rows_of_codes_and_of_features_agree():
    z = jax.random.normal(jax.random.key(1), (50, 30)) - 1.5
    code = sparse.top_k(z, 4)
    expected = (np.asarray(keep_top_k(z, 4)) > 0).sum(axis=0)
    assert 0 in expected
    np.testing.assert_array_equal(sparse.active_rows(code), expected)
    np.testing.assert_array_equal(sparse.active_rows(code.dense()), expected)


@pytest.mark.parametrize("width", [7, 2**16])
def test_places_are_sorted_by_feature(width):
    """Also where a place and its feature do not fit into one integer."""
    values = jax.random.uniform(jax.random.key(2), (64, 1024)) - 0.1
    features = jax.random.randint(jax.random.key(3), (64, 1024), 0, width)
    order, starts = sparse._by_feature(sparse.Code(values, features, width))
    flat = np.where(np.asarray(values) > 0, features, width).reshape(-1)
    np.testing.assert_array_equal(order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(starts, np.searchsorted(np.sort(flat), np.arange(width + 1)))


def test_rows_stay_on_their_devices_and_the_sums_are_the_same():
    mesh = make_mesh(members=2)
    shape = (64, 8, 32, 4)
    many = [problem(shape, seed=s)[0] for s in range(2)]
    stacked = [jnp.stack(each) for each in zip(*many)]
    _, weight, k = problem(shape)
    slopes = jax.value_and_grad(partial(fast, k), argnums=(2, 3, 4))
    over_members = jax.vmap(slopes, in_axes=(None, 0, 0, 0, 0), spmd_axis_name=MEMBER)
    P, place = jax.sharding.PartitionSpec, partial(jax.sharding.NamedSharding, mesh)
    specs = [P(DATA), P(MEMBER, DATA), P(MEMBER), P(MEMBER), P(MEMBER)]
    arguments = [jax.device_put(a, place(s)) for a, s in zip((weight, *stacked), specs)]

    def spread(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return over_members(*arguments)

    compiled = jax.jit(spread).lower(*arguments).compile()
    gathered = re.findall(r"= (\S+) all-gather", compiled.as_text())
    assert not [g for g in gathered if "64" in g or "16,32" in g], gathered
    ours, true = compiled(*arguments), over_members(weight, *stacked)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(true)):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()))


def test_few_dead_features_are_revived_as_among_all():
    """AuxK of the dead alone against AuxK through all features: the loss and its gradients."""
    width, d, k_aux = 64, 12, 5
    keys = jax.random.split(jax.random.key(3), 5)
    W_enc, W_dec = jax.random.normal(keys[0], (d, width)), jax.random.normal(keys[1], (width, d))
    parameters = (W_enc, jax.random.normal(keys[2], (width,)), W_dec)
    rows, residual = (jax.random.normal(key, (40, d)) for key in keys[3:])
    for places in ([7], [0, 3, 31, 60, 63], [1, 2, 4, 8, 16, 32, 62, 63]):
        dead = jnp.zeros(width, bool).at[jnp.asarray(places)].set(True)
        data = (rows, residual, dead, jnp.float32(d))
        few, all_ = (
            jax.value_and_grad(losses._share_of(n, k_aux, None))(parameters, data)
            for n in (width // losses.FEW, width)
        )
        assert all_[0] > 0 and all(np.abs(g).max() > 0 for g in all_[1])
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), few, all_)
