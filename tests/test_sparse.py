"""Sparse codes: lists equal the reference of dense products, which equals plain code."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossdict_jax import ops
from crossdict_jax.dictionaries import base, losses
from crossdict_jax.dictionaries.architectures import batchtopk, matryoshka, topk
from crossdict_jax.ops import codes, selection, sums
from crossdict_jax.training.mesh import DATA, MEMBER, make_mesh

# batch, d, width, k: one index; no even number; several blocks of terms; groups of neighbours
SHAPES = [(3, 1, 1, 1), (40, 7, 21, 5), (300, 6, 64, 37), (30, 5, 128, 3)]
CHOICES = {
    "per_row": lambda k, n: (lambda z: ops.kth_largest(z, k), k * n),
    "over_rows": lambda k, n: (lambda z: ops.nth_largest(z, k * n), k * n),
    "threshold": lambda k, n: (lambda z: jnp.float32(1.0), 64 * n),
}
HYPER = base.Hyper(l1_coefficient=0.1, most_dead=1, k_aux=4, nested_fractions=(0.2, 0.5))
each_choice = pytest.mark.parametrize("choice", CHOICES)


def use_lists(monkeypatch, lists):
    for module in (selection, codes):
        monkeypatch.setattr(module, "uses_lists", lambda size, **minimum: lists)


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


def slopes(choice, weight, k, ends=None, dtype=None):
    """A function of rows, encoder, bias and decoder: a loss of their code, and four gradients."""

    def loss(u, W_enc, bias, W_dec):
        code = ops.sparse_code(u, W_enc, bias, *CHOICES[choice](k, len(u)), dtype)
        parts = ops.decode_parts(code, W_dec, ends or (len(W_dec),), dtype).cumsum(axis=1)
        error = jnp.sum(weight * jnp.square(parts - u[:, None]).sum(axis=1))
        return error, (parts, ops.activity(code))

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)


def dense(code, width):
    """The features [batch, width] of a code."""
    return np.asarray(ops.decode(code, jnp.eye(width)))


def assert_lists_are_the_reference(monkeypatch, function, arguments, *, tolerance=2e-5):
    results = []
    for lists_ in (True, False):
        use_lists(monkeypatch, lists_)
        results.append(jax.jit(lambda *given: function(*given))(*arguments))
    for ours, true in zip(*map(jax.tree.leaves, results), strict=True):
        scale = float(np.abs(np.where(np.isfinite(true), true, 0)).max())
        np.testing.assert_allclose(ours, true, atol=tolerance * scale)
    return results[1]


@each_choice
@pytest.mark.parametrize("shape", SHAPES)
def test_lists_equal_dense_products_in_value_and_gradients(monkeypatch, shape, choice):
    arguments, weight, k = problem(shape, busy=100.0)
    true = assert_lists_are_the_reference(monkeypatch, slopes(choice, weight, k), arguments)
    assert all(np.abs(g).max() > 0 for g in true[1])


@each_choice
def test_members_of_an_ensemble_in_parts_of_the_width(monkeypatch, choice):
    many = [problem(SHAPES[1], seed=s)[0] for s in range(2)]
    stacked = [jnp.stack(one) for one in zip(*many)]
    _, weight, k = problem(SHAPES[1])
    function = jax.vmap(slopes(choice, weight, k, ends=(1, 6, 20, 21)))
    assert_lists_are_the_reference(monkeypatch, function, stacked)


@each_choice
def test_rows_with_few_or_no_positive_values(monkeypatch, choice):
    (u, W_enc, bias, W_dec), weight, k = problem(SHAPES[1])
    bias = bias - jnp.where(jnp.arange(21) < 19, 1e3, 3.0)  # two features are left, not everywhere
    arguments = (u, W_enc, bias, W_dec)
    (_, (_, (active, l0, _))), _ = assert_lists_are_the_reference(
        monkeypatch, slopes(choice, weight, k), arguments
    )
    assert 0 < l0 < 2 and active[:19].sum() == 0


@each_choice
def test_bfloat16_rounds_what_is_multiplied_and_no_sum(monkeypatch, choice):
    arguments, weight, k = problem((40, 32, 20, 20))  # all features: rounding changes no choice
    rounded = slopes(choice, weight, k, dtype=jnp.bfloat16)
    assert_lists_are_the_reference(monkeypatch, rounded, arguments, tolerance=3e-2)
    for lists_ in (True, False):
        use_lists(monkeypatch, lists_)
        exact, near = (jax.jit(f)(*arguments)[0][0] for f in (slopes(choice, weight, k), rounded))
        assert 1e-6 < abs(near / exact - 1) < 3e-2


@pytest.mark.parametrize("architecture", [topk.TopK, batchtopk.BatchTopK, matryoshka.Matryoshka])
def test_architectures_train_alike(monkeypatch, architecture):
    """The loss and all gradients of two members, with and without dead features."""

    def step(key, x, dead):
        d = architecture(d_model=6, width=64, k=4, rngs=base.nnx.Rngs(params=key))
        graphdef, params = base.modules.split(d)

        def loss(params):
            d = base.modules.merge(graphdef, params)
            loss, parts, _ = d.losses(x, hyper=HYPER, dead=dead)
            return loss, parts

        return jax.value_and_grad(loss, has_aux=True)(params)

    keys, x = jax.random.split(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 40, 6))
    dead = jnp.zeros((2, 64), bool).at[1, 9].set(True)
    assert_lists_are_the_reference(monkeypatch, jax.vmap(step), (keys, x, dead))


# ---------------------------------------------------------------- thresholds


def awkward(batch, width, k):
    """Pre-activations [batch, width] that a search for thresholds may stumble over."""
    z = jax.random.normal(jax.random.key(7), (batch, width))
    rows = jnp.arange(batch)[:, None]
    return {
        "random": z,
        "few positive": z - 2.5,
        "none positive": -jnp.abs(z),
        "all in two rows": jnp.where((rows == 1) | (rows == batch - 1), jnp.abs(z) + 9, z),
        "neighbours": jnp.where(jnp.arange(width)[None, :] < 2 * k, z + 3, z / 9),
        "few values": jnp.round(2 * z) / 2,
        "one value": jnp.full((batch, width), 2.0).at[batch - 1, width - 1].set(5.0),
        "tiny ones": z * 1e-39,
        "far apart": jnp.exp(9 * z),
        "pairs of rows": z[rows[:, 0] // 2],
    }


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize(("width", "k"), [(21, 5), (48, 2), (96, 40), (1024, 4)])
def test_thresholds_are_exact(monkeypatch, width, k, lists):
    use_lists(monkeypatch, lists)
    batch = 30

    def largest(z):
        kept = [ops.keep_top_k(z, k, over_rows=over_rows) for over_rows in (False, True)]
        return ops.kth_largest(z, k), ops.nth_largest(z, k * batch), *kept

    cases = awkward(batch, width, k)
    results = jax.jit(jax.vmap(largest))(jnp.stack(list(cases.values())))
    for i, (name, z) in enumerate(cases.items()):
        z = np.maximum(z, 0)
        of_rows, of_batch = np.sort(z)[:, -k], np.sort(z, axis=None)[-k * batch]
        kept = [np.where(z >= least, z, 0) for least in (of_rows[:, None], of_batch)]
        for ours, true in zip(results, (of_rows, of_batch, *kept)):
            np.testing.assert_array_equal(ours[i], true, err_msg=name)


def test_equals_of_the_last_are_all_kept_while_there_is_room(monkeypatch):
    use_lists(monkeypatch, True)
    z, identity = awkward(30, 48, 4)["pairs of rows"], jnp.eye(48)
    largest = lambda z, n: ops.sparse_code(  # noqa: E731
        z, identity, jnp.zeros(48), lambda z: ops.nth_largest(z, n), n
    )
    code = largest(z, 119)  # the 119th has an equal
    kept = dense(code, 48)
    assert (kept > 0).sum() == 120
    np.testing.assert_array_equal(kept, np.where(z >= np.sort(z, axis=None)[-119], z, 0))
    full = dense(largest(jnp.ones((30, 48)), 120), 48)
    assert (full.sum(axis=1) > 0).tolist() == [True] * 4 + [False] * 26  # the first rows'


@pytest.mark.parametrize("lists", [True, False])
def test_what_is_not_a_number_stays_visible(monkeypatch, lists):
    use_lists(monkeypatch, lists)
    for sign, choice in zip((1, -1, 1), CHOICES):
        (u, W_enc, bias, W_dec), weight, k = problem(SHAPES[3])
        arguments = (u, W_enc, bias.at[3].set(jnp.copysign(jnp.nan, sign)), W_dec)
        assert np.isnan(jax.jit(slopes(choice, weight, k))(*arguments)[0][0])


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("big", [1, 2**20])
@pytest.mark.parametrize("summed", [sums.sum_by_group, sums.sum_by_key])
def test_groups_of_any_size_are_summed(summed, big):
    """Also where an entry and its key do not fit into one integer; some entries have no group."""
    counts = np.asarray([0, 1, 500, 16, 17, 0, 64, 65, 0, *[3] * 1200])
    n_groups = max(big, len(counts))
    group = np.append(np.repeat(np.arange(len(counts)), counts), [n_groups] * 5)
    rng, n = np.random.default_rng(0), len(group)
    if summed is sums.sum_by_key:
        rng.shuffle(group)
    index, weights = rng.integers(0, 50, n), rng.normal(size=n).astype(np.float32)
    table = rng.normal(size=(50, 3)).astype(np.float32)
    expected = np.zeros((n_groups + 1, 3))
    np.add.at(expected, group, weights[:, None] * table[index])
    ours = jax.jit(summed, static_argnums=1)(jnp.asarray(group), n_groups, weights, index, table)
    np.testing.assert_allclose(ours, expected[:-1], atol=1e-4)


@pytest.mark.parametrize("d", [1, 300])
def test_inner_products_of_rows_of_any_length(d):
    rng, n = np.random.default_rng(0), 2000
    a, b = (rng.normal(size=(rows, d)).astype(np.float32) for rows in (50, 30))
    a_index, b_index = rng.integers(0, 50, n), rng.integers(0, 30, n)
    ours = sums.dots(*map(jnp.asarray, (a, a_index, b, b_index)))
    np.testing.assert_allclose(ours, np.einsum("nd,nd->n", a[a_index], b[b_index]), atol=1e-4)


# ---------------------------------------------------------------- several devices, dead features


@pytest.mark.mesh
@each_choice
def test_rows_stay_on_their_devices_and_the_sums_are_the_same(choice):
    mesh = make_mesh(members=2)
    shape = (64, 8, 32, 4)
    many = [problem(shape, seed=s)[0] for s in range(2)]
    stacked = [jnp.stack(one) for one in zip(*many)]
    _, weight, k = problem(shape)
    over_members = jax.vmap(slopes(choice, weight, k), spmd_axis_name=MEMBER)
    P, sharding = jax.sharding.PartitionSpec, partial(jax.sharding.NamedSharding, mesh)
    specs = [P(MEMBER, DATA), P(MEMBER), P(MEMBER), P(MEMBER)]
    arguments = [jax.device_put(a, sharding(s)) for a, s in zip(stacked, specs)]

    def spread(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            assert not selection.uses_lists(selection.LARGE)
            return over_members(*arguments)

    compiled = jax.jit(spread).lower(*arguments).compile()
    gathered = re.findall(r"= (\S+) all-gather", compiled.as_text())
    assert not [g for g in gathered if "64" in g or "16,32" in g], gathered
    ours, true = compiled(*arguments), over_members(*stacked)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(true)):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()))


def test_few_dead_features_are_revived_as_among_all(monkeypatch):
    """AuxK of the dead alone against AuxK through all features: the loss and its gradients."""
    width, d = 64, 12
    key, *keys = jax.random.split(jax.random.key(3), 3)
    dictionary = base.build("topk", d_model=d, width=width, k=3, key=key)
    graphdef, params = base.modules.split(dictionary)
    rows, residual = (jax.random.normal(key, (40, d)) for key in keys)

    def share(params, dead, most_dead):
        hyper = base.Hyper(l1_coefficient=0.1, most_dead=most_dead, k_aux=5)
        d = base.modules.merge(graphdef, params)
        return losses.auxk(d, rows, residual, dead=dead, hyper=hyper)

    for positions in ([7], [0, 3, 31, 60, 63], [1, 2, 4, 8, 16, 32, 62, 63]):
        dead = jnp.zeros(width, bool).at[jnp.asarray(positions)].set(True)
        few, among_all = (jax.value_and_grad(share)(params, dead, n) for n in (8, 9))
        assert among_all[0] > 0 and np.abs(among_all[1]["W_dec"]).max() > 0
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), few, among_all)
