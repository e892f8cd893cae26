"""What is computed of a batch in parts is the same on one device and on several, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from crossdict_jax.training import parts
from crossdict_jax.training.mesh import DATA, MEMBER, in_turn, make_mesh

pytestmark = pytest.mark.mesh
ROWS = 48
MESHES = [1, 2, 4, 8]


def mesh_of(devices):
    return make_mesh(devices=jax.devices()[:devices])


def spread_out(mesh, x):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(DATA)))


def under(mesh, function, x, *given):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function)(spread_out(mesh, x), *given)


def rows(seed=0):
    """Of very different size, so that sums in another order have other bits."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(ROWS, 5)) * 10.0 ** rng.integers(-4, 5, (ROWS, 1))).astype(np.float32)


def sums(n):
    return lambda x, shift: parts.summed(lambda x, s: (x[0] + s, x[1]), x, n, shift)


@pytest.mark.parametrize("n", [8, 16, 24])
def test_sums_have_the_same_bits_on_every_mesh(n):
    x, shift = rows(), np.float32(0.3)
    total, rest = under(mesh_of(1), sums(n), x, shift)
    firsts = x.reshape(n, -1, 5)
    np.testing.assert_allclose(total, (firsts[:, 0] + shift).sum(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(rest, firsts[:, 1])
    for devices in MESHES[1:]:
        there, kept = under(mesh_of(devices), sums(n), x, shift)
        np.testing.assert_array_equal(there, total)
        np.testing.assert_array_equal(kept, rest)


def test_the_order_of_a_sum_matters_here():
    x = rows()
    other = jnp.sum(x.reshape(16, -1, 5)[:, 0], axis=0)
    total = under(mesh_of(1), sums(16), x, np.float32(0))[0]
    assert (np.asarray(other) != np.asarray(total)).any()


@pytest.mark.parametrize("n", [3, 6])
def test_fewer_parts_than_devices_are_spread_over_them(n):
    total, rest = under(mesh_of(8), sums(n), rows(), np.float32(0.3))
    pieces = parts.split(rows(), n)
    np.testing.assert_allclose(total, (pieces[:, 0] + np.float32(0.3)).sum(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(rest, pieces[:, 1])


@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("n", [3, 8])
def test_rows_that_parts_make_come_back_in_order(devices, n):
    doubled = under(
        mesh_of(devices), lambda x: parts.mapped(lambda x, by: x * by, x, n, 2.0), rows()
    )
    np.testing.assert_array_equal(doubled, 2 * rows())


@pytest.mark.parametrize("devices", MESHES)
def test_members_in_turn_are_as_members_at_once(devices):
    def step(state, x, rate):
        state = {"w": state["w"] + rate * x.sum(axis=0), "n": state["n"] + 1}
        return state, {"norm": jnp.abs(x).sum()}

    mesh = make_mesh(members=4, devices=jax.devices()[:devices])
    state = {"w": np.ones((4, 5), np.float32), "n": np.arange(4, dtype=np.int32)}
    x, rates = np.stack([rows(i) for i in range(4)]), np.arange(4, dtype=np.float32)
    sharded = NamedSharding(mesh, PartitionSpec(MEMBER))
    given = jax.device_put((state, x, rates), sharded)
    ours, true = jax.jit(in_turn(step, mesh))(*given), jax.vmap(step)(state, x, rates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, true)
    np.testing.assert_array_equal(ours[0]["n"], state["n"] + 1)
