"""Steps through a list of active features equal those through dense products, and are taken."""

import dataclasses
import re
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dictionaries import HYPER

from crossdict_jax import modules
from crossdict_jax.dictionaries import accumulation, base, losses
from crossdict_jax.dictionaries.architectures import relu
from crossdict_jax.ops import sparse
from crossdict_jax.training.mesh import DATA, MEMBER, make_mesh

ROWS, D, WIDTH, SHARE = 40, 6, 48, 8
ROOM = ROWS * (WIDTH // SHARE)
MARK = 1000.0
P = jax.sharding.PartitionSpec


@contextmanager
def taken(lists: bool):
    """Lists pay at the sizes of these tests, or nowhere; a loss through them has MARK added."""
    plain = relu._listed

    def marked(*arguments, **options):
        loss, parts = plain(*arguments, **options)
        return loss + MARK, parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "LARGE", 0 if lists else 2**30)
        patch.setattr(sparse, "SHARE", SHARE)
        patch.setattr(relu, "_listed", marked)
        yield


def problem(active, *, seed=0, d_out=None):
    """A dictionary's parameters and rows of which exactly so many features are active."""
    keys = jax.random.split(jax.random.key(seed), 5)
    d = base.build("relu", d_model=D, width=WIDTH, k=3, key=keys[0], d_out=d_out)
    d.W_enc[...] = jax.random.normal(keys[1], (D, WIDTH))
    d.b_dec[...] = jax.random.normal(keys[2], (d.d_out,))
    d.W_dec[...] *= jnp.linspace(0.5, 2, WIDTH)[:, None]
    x = 1 + jax.random.normal(keys[3], (ROWS, D))
    z = np.sort(np.asarray(d.pre_activations(x)).reshape(-1))[::-1]
    d.b_enc[...] -= (z[active - 1] + z[active]) / 2 if active else z[0] + 1.0
    y = jax.random.normal(keys[4], (ROWS, d_out)) if d_out else None
    return modules.split(d), x, y


@partial(jax.jit, static_argnames=("graphdef", "lists", "dtype", "parts"))
def slope(graphdef, params, x, y=None, *, lists=True, dtype=None, parts=1, l1=0.1):
    """(loss, its parts, what fired, gradients) of one batch; ``lists``: whether they may be taken.

    Args:
      parts: that the batch comes in.
    """
    hyper = dataclasses.replace(HYPER, l1_coefficient=l1)

    def loss_of(params, x, y):
        d = modules.merge(graphdef, params)
        dead = jnp.zeros(WIDTH, bool)
        loss, terms, f = d.losses(x, y=y, hyper=hyper, dead=dead, dtype=dtype)
        return loss, (terms, f)

    with taken(lists):
        return accumulation.gradients(loss_of, params, (x, y), parts)


def assert_equal_but_for_marks(ours, true, *, marks, tolerance=1e-5):
    np.testing.assert_allclose(ours[0] - true[0], MARK * marks, atol=1e-2)
    assert_close(ours[1:], true[1:], tolerance=tolerance)


def assert_close(ours, true, *, tolerance=1e-5):
    """Each array relative to its largest value."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(true), strict=True):
        b = np.asarray(b, float)
        largest = np.abs(b[np.isfinite(b)]).max(initial=1e-6)
        np.testing.assert_allclose(a, b, atol=tolerance * largest)


@pytest.mark.parametrize("active", [0, 1, 17, ROOM // 2, ROOM, ROOM + 1, 3 * ROOM])
def test_a_list_gives_the_loss_and_gradients_of_dense_products(active):
    """And is taken up to its room."""
    (graphdef, params), x, _ = problem(active, seed=active)
    ours, true = (slope(graphdef, params, x, lists=lists) for lists in (True, False))
    assert float(ours[2].l0) * ROWS == pytest.approx(active)
    assert_equal_but_for_marks(ours, true, marks=active <= ROOM)
    assert np.abs(true[3]["b_dec"]).max() > 0
    if active:
        assert all(np.abs(true[3][name]).max() > 0 for name in ("W_enc", "b_enc", "W_dec"))


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_not_a_number_stays_visible(sign):
    (graphdef, params), x, _ = problem(17)
    params["W_enc"] = params["W_enc"].at[0, 3].set(jnp.copysign(jnp.nan, sign))
    assert np.isnan(slope(graphdef, params, x)[0])


@pytest.mark.parametrize("lists", [True, False])
def test_the_penalty_reaches_the_decoder(lists):
    """Its gradient alone: the penalty's weight is so large that the error's is next to nothing."""
    (graphdef, params), x, _ = problem(ROOM)
    gradients = slope(graphdef, params, x, lists=lists, l1=1e9)[3]
    f, W_dec = modules.merge(graphdef, params).encode(x), np.asarray(params["W_dec"])
    unit = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    assert_close(gradients["W_dec"], 1e9 * np.asarray(f).mean(axis=0)[:, None] * unit)


def test_transcoders_and_rounded_products():
    (graphdef, params), x, y = problem(ROOM - 9, d_out=4)
    rounded = {"dtype": jnp.bfloat16}
    ours, true = (slope(graphdef, params, x, y, lists=lists, **rounded) for lists in (True, False))
    assert_equal_but_for_marks(ours, true, marks=1, tolerance=2e-2)
    assert_close(ours[1], true[1], tolerance=2e-3)
    exact = slope(graphdef, params, x, y, lists=False)
    assert abs(ours[1]["mse"] - exact[1]["mse"]) > 1e-6 * exact[1]["mse"]


def test_parts_of_a_batch_choose_each_for_itself():
    """Gradient accumulation: of two parts one has many active features."""
    (graphdef, params), x, _ = problem(ROOM)
    x = x.at[: len(x) // 2].multiply(9)
    parts = slope(graphdef, params, x, parts=2)
    assert_equal_but_for_marks(parts, slope(graphdef, params, x, lists=False), marks=0.5)


# ---------------------------------------------------------------- ensembles and meshes


def stacked(*active):
    problems = [problem(n, seed=i) for i, n in enumerate(active)]
    (graphdef, _), *_ = problems[0]
    params = [params for (_, params), *_ in problems]
    x = jnp.stack([x for _, x, _ in problems])
    return graphdef, jax.tree.map(lambda *a: jnp.stack(a), *params), x


@pytest.mark.parametrize(("active", "listed"), [((5, ROOM), True), ((5, ROOM + 1), False)])
def test_members_take_lists_if_all_of_them_can(active, listed):
    graphdef, params, x = stacked(*active)
    ours, true = (
        jax.vmap(partial(slope, graphdef, lists=lists))(params, x) for lists in (True, False)
    )
    assert_equal_but_for_marks(ours, true, marks=listed)


def branches(function, *arguments) -> int:
    """How many real branches a program has: those on a flag per member became selections."""
    return str(jax.make_jaxpr(function)(*arguments)).count("= cond[")


def test_an_ensembles_branch_stays_a_branch():
    graphdef, params, x = stacked(5, 7)
    assert branches(jax.vmap(partial(slope, graphdef), spmd_axis_name=MEMBER), params, x) == 1

    def branch(of_all, flag):
        return jax.lax.cond(of_all(flag), jnp.sin, jnp.cos, 1.0)

    flags = jnp.asarray([True, False])
    assert branches(jax.vmap(partial(branch, losses.for_all)), flags) == 1
    assert branches(jax.vmap(partial(branch, lambda flag: flag)), flags) == 0


def test_flags_are_of_all_members():
    flags = jnp.asarray([[True, True], [True, False]])
    assert losses.for_all(flags[0, 0]) and not losses.for_all(flags[1, 1])
    np.testing.assert_array_equal(jax.vmap(losses.for_all)(flags[0]), [True, True])
    np.testing.assert_array_equal(jax.vmap(losses.for_all)(flags[1]), [False, False])
    np.testing.assert_array_equal(jax.vmap(jax.vmap(losses.for_all))(flags), np.zeros((2, 2)))


@pytest.mark.mesh
def test_every_device_has_room_of_its_own():
    """In all rows together few features are active; but in one device's, in the end, too many."""
    mesh = make_mesh(members=2)
    assert mesh.shape[DATA] == 4
    graphdef, params, x = stacked(ROOM // 4, ROOM // 4)
    place = partial(jax.sharding.NamedSharding, mesh)
    specs = place(P(MEMBER)), place(P(MEMBER, DATA))

    def step(params, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.vmap(partial(slope, graphdef), spmd_axis_name=MEMBER)(params, x)

    alone = jax.vmap(partial(slope, graphdef, lists=False))
    compiled = jax.jit(step, in_shardings=specs).lower(params, x).compile()
    gathered = re.findall(r"= (\S+) all-gather", compiled.as_text())
    assert not [g for g in gathered if f"{ROWS}," in g or f"{ROWS // 4}," in g], gathered
    for busy, marks in ((1, 1), (4, 0)):
        rows = x.at[1, : ROWS // 4].multiply(busy)
        ours, true = compiled(*jax.device_put((params, rows), specs)), alone(params, rows)
        assert float(true[2].l0.max()) < WIDTH // SHARE
        assert_equal_but_for_marks(ours, true, marks=marks)
