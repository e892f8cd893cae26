"""Sparse codes: every fast sum equals the plain one, on random rows and on the awkward ones."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossdict_jax.dictionaries import losses
from crossdict_jax.dictionaries.base import keep_batch_top_k, keep_top_k
from crossdict_jax.ops import selection, sparse, sums
from crossdict_jax.training.mesh import DATA, MEMBER, make_mesh

# batch, d, width, k: one place; no even number; several blocks of terms and three levels
SHAPES = [(3, 1, 1, 1), (40, 7, 21, 5), (300, 6, 64, 37)]
# how the k are chosen: the fast selection of (k, batch), and the plain one
PER_ROW = (lambda k, batch: partial(sparse.top_k, k=k), keep_top_k)
OVER_ROWS = (lambda k, batch: partial(sparse.batch_top_k, n=k * batch), keep_batch_top_k)
both = pytest.mark.parametrize("choice", [PER_ROW, OVER_ROWS], ids=["per_row", "over_rows"])


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


def fast(choice, k, weight, u, W_enc, bias, W_dec, dtype=None):
    code = sparse.encode(u, W_enc, bias, (), choice[0](k, len(u)), dtype)
    return jnp.sum(weight * jnp.square(sparse.decode(code, W_dec, dtype) - u))


def plain(choice, k, weight, u, W_enc, bias, W_dec):
    f = choice[1](u @ W_enc + bias[None, :], k)
    return jnp.sum(weight * jnp.square(f @ W_dec - u))


def assert_same_slopes(choice, weight, k, arguments, *, tolerance=2e-5, how=lambda f: f, **options):
    """Value and gradients in rows, encoder, bias and decoder, each relative to its largest."""
    slopes = partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
    ours = jax.jit(how(slopes(partial(fast, choice, k, weight, **options))))(*arguments)
    true = jax.jit(how(slopes(partial(plain, choice, k, weight))))(*arguments)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(true), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=tolerance * float(np.abs(b).max()))


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_dense_products(shape, choice):
    arguments, weight, k = problem(shape, busy=100.0)
    assert_same_slopes(choice, weight, k, arguments)


@both
def test_rows_with_few_or_no_positive_values(choice):
    (u, W_enc, bias, W_dec), weight, k = problem(SHAPES[1])
    bias = bias - jnp.where(jnp.arange(21) < 19, 1e3, 3.0)  # two features are left, not everywhere
    f = choice[1](u @ W_enc + bias[None, :], k)
    assert set(np.asarray((f > 0).sum(axis=1))) == {0, 1, 2}
    assert_same_slopes(choice, weight, k, (u, W_enc, bias, W_dec))


def test_rows_with_most_of_the_batch():
    """Of a code over all rows two have all features that there are, and others none."""
    (u, W_enc, bias, W_dec), weight, _ = problem(SHAPES[2])
    u, bias = u.at[jnp.asarray([3, 299])].multiply(100), bias.at[5:].add(-20)
    W_enc = jnp.abs(W_enc)
    u = u.at[jnp.asarray([3, 299])].set(jnp.abs(u[jnp.asarray([3, 299])]))
    counts = (keep_batch_top_k(u @ W_enc + bias[None, :], 3) > 0).sum(axis=1)
    assert counts.max() == 64 and counts.min() == 0
    assert_same_slopes(OVER_ROWS, weight, 3, (u, W_enc, bias, W_dec))


@both
def test_an_ensemble_is_its_members(choice):
    many = [problem(SHAPES[1], seed=s)[0] for s in range(2)]
    stacked = [jnp.stack(each) for each in zip(*many)]
    _, weight, k = problem(SHAPES[1])
    assert_same_slopes(choice, weight, k, stacked, how=jax.vmap)


@both
def test_bfloat16_rounds_what_is_multiplied_and_no_sum(choice):
    arguments, weight, k = problem((40, 32, 20, 20))  # all features: rounding changes no choice
    assert_same_slopes(choice, weight, k, arguments, tolerance=3e-2, dtype=jnp.bfloat16)
    exact, rounded = (fast(choice, k, weight, *arguments, dtype=t) for t in (None, jnp.bfloat16))
    assert abs(exact - rounded) > 1e-6 * abs(exact)


@pytest.mark.parametrize(("width", "k"), [(21, 5), (64, 3), (96, 1), (48, 48), (1024, 4)])
def test_top_k_is_exact(width, k):
    z = jax.random.normal(jax.random.key(0), (30, width))
    code = sparse.top_k(z, k)
    np.testing.assert_array_equal(code.dense(), keep_top_k(z, k))
    assert (np.diff(code.features.reshape(30, k), axis=1) > 0).all()


@pytest.mark.parametrize(("width", "k"), [(21, 5), (64, 20), (48, 48), (1024, 4)])
def test_of_equal_values_the_first_features_are_taken(width, k):
    """Also beside rows without equals, and of zeros where fewer than k are positive."""
    z = jax.random.normal(jax.random.key(4), (30, width))
    z = z.at[:20].set(jnp.round(2 * z[:20]) / 2).at[10:15].add(-2.5).at[0].set(-1.0)
    code = jax.jit(partial(sparse.top_k, k=k))(z)
    positive = np.maximum(z, 0)
    first = np.sort(np.argsort(-positive, axis=1, kind="stable")[:, :k], axis=1)
    np.testing.assert_array_equal(code.features.reshape(30, k), first)
    np.testing.assert_array_equal(
        code.values.reshape(30, k), np.take_along_axis(positive, first, axis=1)
    )


def test_what_is_not_a_number_is_taken_and_no_negative_zero_is_lost():
    z = jnp.full((3, 21), -0.0).at[1, 7].set(-jnp.nan).at[2, 3].set(jnp.nan).at[2, 9].set(5.0)
    code = sparse.top_k(z, 2)
    np.testing.assert_array_equal(code.features.reshape(3, 2), [[0, 1], [0, 7], [3, 9]])
    nan = jnp.nan
    np.testing.assert_array_equal(code.values.reshape(3, 2), [[0, 0], [0, nan], [nan, 5]])


def awkward(name, batch, width, k):
    """Pre-activations [batch, width] that a selection over all rows may stumble over."""
    z = jax.random.normal(jax.random.key(7), (batch, width))
    rows = jnp.arange(batch)[:, None]
    return {
        "random": z,
        "few positive": z - 2.5,
        "none positive": -jnp.abs(z),
        "all in two rows": jnp.where((rows == 1) | (rows == batch - 1), jnp.abs(z) + 9, z),
        "neighbours": jnp.where(jnp.arange(width)[None, :] < 2 * k, z + 3, z / 9),
        "few values": jnp.round(2 * z) / 2,
        "tiny ones": z * 1e-39,
        "far apart": jnp.exp(9 * z),
        "pairs of rows": z[rows[:, 0] // 2],
    }[name]


NAMES = [
    "random",
    "few positive",
    "none positive",
    "all in two rows",
    "neighbours",
    "tiny ones",
    "far apart",
    "pairs of rows",
]


@pytest.mark.parametrize(("width", "k"), [(48, 4), (21, 1), (32, 32), (96, 40)])
def test_the_largest_of_all_rows_are_exact(width, k):
    batch = 30
    n = batch * k

    @jax.jit
    def chosen(z):
        code, least = sparse.batch_top_k(z, n), sparse.nth_largest(z, n)
        part = sparse.all_from(z[:10], least, n).dense()
        return code, code.dense(), least, part, keep_batch_top_k(z, k)

    for name in NAMES:
        z = awkward(name, batch, width, k)
        code, ours, least, part, dense = map(partial(jax.tree.map, np.asarray), chosen(z))
        np.testing.assert_array_equal(ours, dense, err_msg=name)
        np.testing.assert_array_equal(part, dense[:10], err_msg=name)
        at = code.rows[code.used], code.features[code.used]
        np.testing.assert_array_equal(at, np.nonzero(dense), err_msg=name)
        assert least == np.sort(np.maximum(z, 0), axis=None)[-n], name


@pytest.mark.parametrize(("width", "k"), [(48, 4), (21, 1)])
def test_of_too_many_equals_those_of_the_first_rows_are_taken(width, k):
    """All that is greater is kept, and of equals n or more, if not all."""
    batch = 40
    n, greater = batch * k, 3
    z = jnp.full((batch, width), 2.0).at[jnp.asarray([0, 7, 39]), width - 1].set(5.0)
    for code in (sparse.batch_top_k(z, n), sparse.all_from(z, jnp.float32(2.0), n)):
        dense = np.asarray(code.dense())
        assert n <= (dense > 0).sum() <= selection.room(n, batch, width)
        assert (dense == 5).sum() == greater and set(np.unique(dense)) == {0, 2, 5}
        counts = (dense == 2).sum(axis=1)
        full = np.flatnonzero(counts)
        np.testing.assert_array_equal(full, np.arange(len(full)))  # the first rows,
        assert (counts[full] >= width - 1).all()  # whole
    assert float(sparse.nth_largest(z, n)) == 2.0


def test_as_many_values_are_kept_as_equal_the_last():
    z = awkward("few values", 30, 48, 4)
    dense = keep_batch_top_k(z, 4)
    assert 120 < (dense > 0).sum() <= selection.room(120, 30, 48)
    np.testing.assert_array_equal(sparse.batch_top_k(z, 120).dense(), dense)


def test_members_of_an_ensemble_choose_for_themselves():
    """One needs its bound raised, one has equals without room, one neither."""
    z = jnp.stack(
        [awkward("all in two rows", 30, 48, 4), jnp.ones((30, 48)), awkward("random", 30, 48, 4)]
    )
    together = jax.vmap(partial(sparse.batch_top_k, n=120))(z)
    alone = [sparse.batch_top_k(one, 120) for one in z]
    stacked = jax.tree.map(lambda *members: jnp.stack(members), *alone)
    jax.tree.map(np.testing.assert_array_equal, together, stacked)


@pytest.mark.parametrize("ends", [(21,), (1, 6, 20, 21)])
def test_parts_of_a_width_are_decoded_one_by_one(ends):
    (u, W_enc, bias, W_dec), _, k = problem(SHAPES[1])
    weight = jax.random.normal(jax.random.key(9), (40, len(ends), 7))

    def by_entries(W_enc, W_dec):
        code = sparse.encode(u, W_enc, bias, (), OVER_ROWS[0](k, 40))
        return jnp.sum(weight * jnp.square(sparse.decode_parts(code, W_dec, ends) - 1))

    def by_products(W_enc, W_dec):
        f = keep_batch_top_k(u @ W_enc + bias[None, :], k)
        parts = [f[:, a:b] @ W_dec[a:b] for a, b in itertools.pairwise((0, *ends))]
        return jnp.sum(weight * jnp.square(jnp.stack(parts, axis=1) - 1))

    slopes = [jax.jit(jax.value_and_grad(f, (0, 1))) for f in (by_entries, by_products)]
    ours, true = (slope(W_enc, W_dec) for slope in slopes)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(true)):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()))


@both
def test_active_rows_of_codes_and_of_features_agree(choice):
    z = jax.random.normal(jax.random.key(1), (50, 30)) - 1.5
    code = choice[0](4, 50)(z)
    expected = (np.asarray(choice[1](z, 4)) > 0).sum(axis=0)
    assert 0 in expected
    np.testing.assert_array_equal(sparse.active_rows(code), expected)
    np.testing.assert_array_equal(sparse.active_rows(code.dense()), expected)


@pytest.mark.parametrize("width", [7, 2**16])
def test_entries_are_sorted_by_feature(width):
    """Also where an entry and its feature do not fit into one integer."""
    values = jax.random.uniform(jax.random.key(2), (2**16,)) - 0.1
    features = jax.random.randint(jax.random.key(3), (2**16,), 0, width)
    rows = jnp.arange(2**16)
    order, starts = sparse._by_feature(sparse.Code(values, features, rows, rows, width))
    flat = np.where(np.asarray(values) > 0, features, width)
    np.testing.assert_array_equal(order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(starts, np.searchsorted(np.sort(flat), np.arange(width + 1)))


@pytest.mark.parametrize("summed", [sums.sum_by_group, sums.sum_by_unequal_group])
def test_groups_of_any_size_are_summed(summed):
    counts = np.asarray([0, 1, 500, 16, 17, 0, 64, 65, 0, *[3] * 600])
    starts, n = np.cumsum(counts) - counts, counts.sum()
    rng = np.random.default_rng(0)
    index, weights = rng.integers(0, 50, n + 5), rng.normal(size=n + 5).astype(np.float32)
    table = rng.normal(size=(50, 9)).astype(np.float32)
    terms = weights[:, None] * table[index]
    expected = [terms[a : a + count].sum(axis=0) for a, count in zip(starts, counts)]
    ours = jax.jit(summed)(*map(jnp.asarray, (starts, counts, weights, index, table)))
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("d", [1, 300])
def test_inner_products_of_rows_of_any_length(d):
    rng, n = np.random.default_rng(0), 20_000
    a, b = (rng.normal(size=(rows, d)).astype(np.float32) for rows in (50, 30))
    of_a, of_b, used = rng.integers(0, 50, n), rng.integers(0, 30, n), np.arange(n) < 9_000
    ours = sums.dots(*map(jnp.asarray, (a, of_a, b, of_b, used)))
    expected = np.einsum("nd,nd->n", a[of_a], b[of_b])
    np.testing.assert_allclose(ours[:9_000], expected[:9_000], atol=1e-4)
    assert (np.asarray(ours[sums.ENTRIES * 2 :]) == 0).all()  # none of them is used


@pytest.mark.mesh
@both
def test_rows_stay_on_their_devices_and_the_sums_are_the_same(choice):
    mesh = make_mesh(members=2)
    shape = (64, 8, 32, 4)
    many = [problem(shape, seed=s)[0] for s in range(2)]
    stacked = [jnp.stack(each) for each in zip(*many)]
    stacked[0] = stacked[0].at[:, :8].multiply(3)  # so that one device has more of a batch's code
    _, weight, k = problem(shape)
    slopes = jax.value_and_grad(partial(fast, choice, k), argnums=(2, 3, 4))
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
            jax.value_and_grad(losses._share_of(n, k_aux, None), has_aux=True)(parameters, data)
            for n in (width // losses.FEW, width)
        )
        assert all_[0][0] > 0 and all(np.abs(g).max() > 0 for g in all_[1])
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), few, all_)


@pytest.mark.parametrize("n", [1, 2, 1000, 2**17 + 1])
@pytest.mark.parametrize("most", [1, 37, 2**20 - 1])
def test_integers_are_sorted_and_equals_stay_in_order(n, most):
    """In one pass or in two."""
    features = jax.random.randint(jax.random.key(n), (n,), 0, most + 1, jnp.int32).at[0].set(most)
    order = jax.jit(sparse._sorting, static_argnums=1)(features, most)
    np.testing.assert_array_equal(order, np.argsort(np.asarray(features), kind="stable"))
