"""Sparse codes: lists and kernels equal dense products, which equal plain code."""

import contextlib
import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import slow

from crossdict_jax import modules, ops
from crossdict_jax.dictionaries import base
from crossdict_jax.ops import codes, kernels, selection, sums
from crossdict_jax.training.mesh import DATA, MEMBER, make_mesh

# batch, d, width, k: no even number, several turns of terms and lanes; groups of neighbours
SHAPES = [(40, 7, 21, 5), (30, 5, 128, 3)]
HYPER = base.Hyper(0.1, k_aux=4, dead=jnp.zeros(64, bool), nested_fractions=(0.2, 0.5))
WAYS = ("dense", "lists", "kernels")
# Compiling is what takes long here; code that runs once need not be fast.
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@contextlib.contextmanager
def traced(products):
    """What is traced inside takes these products; of few terms a turn, which compile faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "uses_lists", lambda size, **minimum: products == "lists")
        patch.setattr(codes, "fastest_products", lambda size, n: products)
        for module in (sums, kernels):
            patch.setattr(module, "TERMS", 2)
        patch.setattr(kernels, "COLUMNS", 4)
        patch.setattr(sums, "LANES", 4)
        yield


def problem(shape, *, seed=0):
    """Two members' rows, encoder, bias, decoder, and what the error is weighted with."""
    batch, d, width, _ = shape
    keys = jax.random.split(jax.random.key(seed), 5)
    sizes = [(batch, d), (d, width), (width,), (width, d), (batch, d)]
    return [np.array(jax.random.normal(key, (2, *size))) for key, size in zip(keys, sizes)]


def slopes(u, W_enc, bias, W_dec, weight, lowest, *, k, dtype=None):
    """A loss of rows' code of what reaches ``lowest``, in parts of the width; three gradients."""
    width = len(bias)

    def loss(W_enc, bias, W_dec):
        n = k * len(u)
        code = ops.sparse_code(u, W_enc, bias, lambda z: lowest, n, dtype)
        parts = ops.decode_parts(code, W_dec, (1, 6, width - 1, width), dtype).cumsum(axis=1)
        error = jnp.sum(weight * jnp.square(parts - u[:, None]).sum(axis=1))
        return error, (parts, ops.activity(code))

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(W_enc, bias, W_dec)


@functools.cache
def compiled(products, shape, dtype=None):
    """``slopes`` of two members, compiled once for all rows."""
    arguments = problem(shape)
    lowest = jax.ShapeDtypeStruct(arguments[0].shape[:2], jnp.float32)
    with traced(products):
        one = jax.vmap(partial(slopes, k=shape[3], dtype=dtype))
        return fast_jit(one).lower(*arguments, lowest).compile()


def least_of_rows(arguments, k):
    """Each row's k-th largest pre-activation, or the smallest number above 0."""
    u, W_enc, bias = (a.astype(np.float64) for a in arguments[:3])
    z = np.sort(u @ W_enc + bias[:, None, :], axis=2)[:, :, -k]
    return np.maximum(z - 1e-5, 1e-30).astype(np.float32)  # as it comes out in float32


def assert_alike(ours, true, *, tolerance=2e-5):
    for a, b in zip(*map(jax.tree.leaves, (ours, true)), strict=True):
        scale = float(np.abs(np.where(np.isfinite(b), b, 0)).max())
        np.testing.assert_allclose(a, b, atol=tolerance * scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("products", ["lists", "kernels"])
@pytest.mark.parametrize("rows", ["busy", "few"])
def test_sparse_products_equal_dense_ones_in_value_and_gradients(shape, rows, products):
    """Of two members: a feature of one is active in every row, or two are left, not everywhere."""
    arguments, width = problem(shape), shape[2]
    arguments[2][0, 0] += 100.0
    if rows == "few":
        arguments[2] -= np.where(np.arange(width) < width - 2, 1e3, 3.0).astype(np.float32)
    arguments.append(least_of_rows(arguments, shape[3]))
    true = compiled("dense", shape)(*arguments)
    assert_alike(compiled(products, shape)(*arguments), true)
    assert all(np.abs(g).max() > 0 for g in true[1])
    active, l0, _ = true[0][1][1]
    if rows == "few":
        assert (l0 > 0).all() and (l0 < 2).all() and active[:, : width - 2].sum() == 0
    else:
        np.testing.assert_allclose(l0, shape[3])


def test_equals_of_the_last_are_all_kept_while_there_is_room():
    arguments, (batch, _, width, k) = problem(SHAPES[0]), SHAPES[0]
    arguments[0][:], arguments[2][:] = 0.0, 1.0
    lowest = np.ones((2, batch), np.float32)
    parts = compiled("lists", SHAPES[0])(*arguments, lowest)[0][1][0]
    kept = np.arange(batch * width).reshape(batch, width) < (k + 1) * batch  # the first rows'
    np.testing.assert_allclose(parts[0, :, -1], kept @ arguments[3][0], atol=1e-4)


@pytest.mark.parametrize("products", WAYS)
def test_what_is_not_a_number_stays_visible(products):
    arguments = problem(SHAPES[1])
    lowest = least_of_rows(arguments, SHAPES[1][3])
    for sign in (1, -1):
        arguments[2][:, 3] = np.copysign(np.nan, sign)
        assert np.isnan(compiled(products, SHAPES[1])(*arguments, lowest)[0][0]).all()


def test_bfloat16_rounds_what_is_multiplied_and_no_sum():
    shape = (40, 32, 20, 20)  # all features: rounding changes no choice
    arguments = [*problem(shape), np.zeros((2, 40), np.float32)]
    exact = compiled("dense", shape)(*arguments)[0][0]
    near = [compiled(products, shape, jnp.bfloat16)(*arguments) for products in WAYS]
    assert_alike(near[0], near[1], tolerance=3e-2)
    assert_alike(near[0], near[2], tolerance=3e-3)  # kernels round gradients, as dense products do
    for (value, _), _ in near:
        change = np.abs(value / exact - 1)
        assert (change > 1e-6).all() and (change < 3e-2).all()


@pytest.mark.parametrize("architecture", ["topk", "matryoshka"])
def test_architectures_train_alike(architecture, monkeypatch):
    def step(key, x):
        d = base.build(architecture, d_model=6, width=64, k=4, key=key)
        graphdef, params = modules.split(d)

        def loss(params):
            error, parts, code = modules.merge(graphdef, params).losses(x, HYPER)
            return error, (parts, ops.activity(code))

        return jax.value_and_grad(loss, has_aux=True)(params)

    keys, x = jax.random.split(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 40, 6))
    results = []
    for products, on in (*((way, "cpu") for way in reversed(WAYS)), ("dense", "gpu")):
        monkeypatch.setattr(codes, "platform", lambda on=on: on)
        with traced(products):
            results.append(fast_jit(jax.vmap(lambda *given: step(*given)))(keys, x))
    for sparse in results[:2]:
        assert_alike(sparse, results[2])
    jax.tree.map(np.testing.assert_array_equal, *results[2:])


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


SIZES = [("lists", *sizes) for sizes in [(21, 5), (48, 2), (96, 40), (1024, 4)]]


@pytest.mark.parametrize(("way", "width", "k"), [*SIZES, ("bits", 21, 5), ("accelerator", 48, 2)])
def test_thresholds_are_exact(monkeypatch, way, width, k):
    monkeypatch.setattr(selection, "platform", lambda: "gpu" if way == "accelerator" else "cpu")
    batch, cases = 30, awkward(30, width, k)

    def largest(z):
        return ops.kth_largest(z, k), ops.nth_largest(z, k * batch)

    with traced(way):
        results = fast_jit(jax.vmap(largest))(jnp.stack(list(cases.values())))
    for i, (name, z) in enumerate(cases.items()):
        z = np.maximum(z, 0)
        for ours, true in zip(results, (np.sort(z)[:, -k], np.sort(z, axis=None)[-k * batch])):
            np.testing.assert_array_equal(ours[i], true, err_msg=name)


@pytest.mark.parametrize("over_rows", [False, True])
def test_what_equals_the_least_is_kept(over_rows):
    z = awkward(30, 21, 5)["few values"]
    least = np.sort(z, axis=None)[-150] if over_rows else np.sort(z)[:, -5:-4]
    kept = np.where((z >= least) & (z > 0), z, 0)
    np.testing.assert_array_equal(ops.keep_top_k(z, 5, over_rows=over_rows), kept)
    np.testing.assert_array_equal(ops.keep_top_k(z, 21), np.maximum(z, 0))


@pytest.mark.parametrize(("module", "big"), [(sums, 1), (kernels, 1), slow(sums, 2**20)])
@pytest.mark.parametrize("name", ["sum_by_group", "sum_by_key"])
def test_groups_of_any_size_are_summed(module, name, big):
    """Also where an entry and its key do not fit into one integer; some entries have no group."""
    counts = np.asarray([0, 1, 500, 16, 17, 0, 64, 65, 0, *[3] * 1200])
    n_groups = max(big, len(counts))
    group = np.append(np.repeat(np.arange(len(counts)), counts), [n_groups] * 5)
    rng, n = np.random.default_rng(0), len(group)
    if name == "sum_by_key":
        rng.shuffle(group)
    index, weights = rng.integers(0, 50, n), rng.normal(size=n).astype(np.float32)
    table = rng.normal(size=(50, 3)).astype(np.float32)
    expected = np.zeros((n_groups + 1, 3))
    np.add.at(expected, group, weights[:, None] * table[index])
    summed = jax.jit(getattr(module, name), static_argnums=1)
    ours = summed(jnp.asarray(group), n_groups, weights, index, table)
    if name == "sum_by_key":
        ours, totals = ours
        of_weights = np.bincount(group, weights, minlength=n_groups + 1)
        np.testing.assert_allclose(totals, of_weights[:-1], atol=1e-4)
    np.testing.assert_allclose(ours, expected[:-1], atol=1e-4)


@pytest.mark.parametrize("module", [sums, kernels])
@pytest.mark.parametrize("d", [1, 700])
def test_inner_products_of_rows_of_any_length(d, module):
    rng, n = np.random.default_rng(0), 2000
    a, b = (rng.normal(size=(rows, d)).astype(np.float32) for rows in (50, 30))
    a_index, b_index = rng.integers(0, 50, n), rng.integers(0, 30, n)
    ours = fast_jit(module.dots)(*map(jnp.asarray, (a, a_index, b, b_index)))
    np.testing.assert_allclose(ours, np.einsum("nd,nd->n", a[a_index], b[b_index]), atol=1e-4)


def test_what_is_fastest_depends_on_the_machine_and_on_what_is_active(monkeypatch):
    fastest = {}
    for on in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(selection, "platform", lambda on=on: on)
        sizes = (2**22, 2**22 // 128), (2**22, 2**22 // 512), (2**12, 2**3)
        fastest[on] = [ops.fastest_products(*size) for size in sizes]
    assert fastest["cpu"] == ["lists", "lists", "dense"] and fastest["tpu"] == ["dense"] * 3
    assert fastest["gpu"] == ["dense", "kernels", "kernels"]


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="a later JAX asks for the GPU itself")
@pytest.mark.parametrize("d", [7, 1024])
def test_kernels_are_written_for_gpus(d, monkeypatch):
    """Of two members, in the compiler's language, which knows blocks of powers of two alone."""
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    step = jax.jit(jax.vmap(partial(slopes, k=3, dtype=jnp.bfloat16)))
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in problem((16, d, 128, 3))]
    lowest = jax.ShapeDtypeStruct((2, 16), jnp.float32)
    with traced("kernels"):
        text = step.trace(*shapes, lowest).lower(lowering_platforms=("cuda",)).as_text()
    # Starts of features are found once for both weights.
    assert text.count("__gpu$xla.gpu.triton") == 6


@pytest.mark.mesh
def test_kernels_stay_with_their_members():
    mesh, (u, W_enc, bias, W_dec, _) = make_mesh(members=8), problem((12, 4, 8, 2))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(MEMBER))
    members = [np.concatenate([a, a[::-1], 2 * a, -a]) for a in (u, W_enc, bias, W_dec)]

    def loss(W_dec, u, W_enc, bias, products):
        code = ops.sparse_code(u, W_enc, bias, lambda z: z.max(axis=1) / 2, 84, None, products)
        return jnp.square(ops.decode(code, W_dec)).sum()

    def gradients(u, W_enc, bias, W_dec, products):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            of_one = jax.grad(partial(loss, products=products), argnums=(0, 2, 3))
            return jax.vmap(of_one, spmd_axis_name=MEMBER)(W_dec, u, W_enc, bias)

    ours, true = (fast_jit(partial(gradients, products=way)) for way in ("kernels", "dense"))
    program = ours.lower(*jax.device_put(members, sharding)).compile()
    assert not re.findall("all-gather|all-reduce|all-to-all", program.as_text())
    assert_alike(program(*jax.device_put(members, sharding)), true(*members))


@pytest.mark.mesh
@pytest.mark.parametrize("on", ["cpu", "gpu"])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_rows_stay_on_their_devices_and_the_sums_are_the_same(architecture, on, monkeypatch):
    mesh, shape = make_mesh(members=2), (64, 8, 32, 4)
    monkeypatch.setattr(selection, "platform", lambda: on)
    W_dec, u = problem(shape)[3], problem(shape)[0]

    def code(u, W_dec):
        d = base.build(architecture, d_model=8, width=32, k=4, key=jax.random.key(0))
        d.W_enc[...] = W_dec.T
        return ops.decode(d.training_code(u), W_dec)

    P, sharding = jax.sharding.PartitionSpec, partial(jax.sharding.NamedSharding, mesh)
    arguments = [jax.device_put(u, sharding(P(MEMBER, DATA)))]
    arguments += [jax.device_put(W_dec, sharding(P(MEMBER)))]

    def spread(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            assert not selection.uses_lists(selection.LARGE)
            return jax.vmap(code, spmd_axis_name=MEMBER)(*arguments)

    program = jax.jit(spread).lower(*arguments).compile()
    gathered = re.findall(r"= (\S+) all-gather", program.as_text())
    assert not [g for g in gathered if "64" in g or "16,32" in g], gathered
    true = jax.vmap(code)(u, W_dec)
    np.testing.assert_allclose(program(*arguments), true, atol=2e-5 * float(np.abs(true).max()))


def test_few_dead_features_are_revived_as_among_all():
    """AuxK of the dead alone against AuxK through all features: the loss and its gradients."""
    width, d = 64, 12
    key, *keys = jax.random.split(jax.random.key(3), 3)
    dictionary = base.build("topk", d_model=d, width=width, k=3, key=key)
    graphdef, params = modules.split(dictionary)
    rows, residual = (jax.random.normal(key, (40, d)) for key in keys)

    @partial(fast_jit, static_argnums=2)
    @partial(jax.value_and_grad, argnums=0)
    def share(params, dead, revived):
        hyper = base.Hyper(l1_coefficient=0.1, revived=revived, k_aux=5, dead=dead)
        d = modules.merge(graphdef, params)
        return d.auxk(rows, residual, hyper)

    for positions in ([7], [0, 3, 31, 60, 63], [1, 2, 4, 8, 16, 32, 62, 63]):
        dead = jnp.zeros(width, bool).at[jnp.asarray(positions)].set(True)
        few, among_all = (share(params, dead, n) for n in (8, width))
        assert among_all[0] > 0 and np.abs(among_all[1]["W_dec"]).max() > 0
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), few, among_all)
