"""Dictionaries moved through affine maps: exact in every architecture, and warm starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.dictionaries import base
from crossdict_jax.errors import UserError
from crossdict_jax.studies.dictionary_transfer.transferred import (
    Affine,
    is_ours,
    transferred,
    with_unit_rows,
)

every = pytest.mark.parametrize("architecture", base.architectures())
D_A, D_B, WIDTH = 6, 9, 24


def fresh(architecture, *, seed=0):
    """A dictionary none of whose parameters is at its first value."""
    d = base.build(architecture, d_model=D_A, width=WIDTH, k=3, key=jax.random.key(seed))
    graphdef, params = modules.split(d)
    keys = iter(jax.random.split(jax.random.key(seed + 1), len(params)))
    moved = {n: a + 0.1 * jax.random.normal(next(keys), a.shape) for n, a in params.items()}
    moved |= {"scale": jnp.asarray(0.7)}
    return modules.merge(graphdef, moved)


def stitch(d_in, d_out, seed):
    rng = np.random.default_rng(seed)
    return Affine(rng.normal(size=(d_in, d_out)) / 2, rng.normal(size=d_out))


def rows(d, n=50, seed=5):
    return (1 + np.random.default_rng(seed).normal(size=(n, d))).astype(np.float32)


@every
@pytest.mark.parametrize("scale", [None, 2.5])
def test_every_architecture_is_moved_exactly(architecture, scale):
    d, back, there = fresh(architecture), stitch(D_B, D_A, 1), stitch(D_A, D_B, 2)
    moved, x = transferred(d, to_source=back, to_target=there, scale=scale), rows(D_B)
    assert type(moved) is type(d) and (moved.d_model, moved.width, moved.k) == (D_B, WIDTH, d.k)
    f = np.asarray(d.encode(back(x).astype(np.float32)))
    np.testing.assert_allclose(moved.encode(x), f, atol=2e-5)
    assert (f > 0).any()
    np.testing.assert_allclose(moved.decode(f), there(np.asarray(d.decode(f))), atol=2e-5)


@every
def test_an_exact_map_keeps_the_share_that_is_explained(architecture):
    """B is A, turned, stretched and moved: the dictionary explains of it what it explains of A."""
    d, x = fresh(architecture), rows(D_A, n=400)
    Q = np.linalg.qr(np.random.default_rng(3).normal(size=(D_B, D_B)))[0][:D_A]
    there = Affine(3.0 * Q, np.arange(D_B) - 4.0)
    back = Affine(Q.T / 3.0, -there.b @ Q.T / 3.0)
    x_b = there(x).astype(np.float32)
    moved = transferred(d, to_source=back, to_target=there)

    def fvu(d, x):
        return np.square(x - np.asarray(d(x))).sum() / np.square(x - x.mean(0)).sum()

    assert fvu(moved, x_b) == pytest.approx(fvu(d, x), abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
def test_unit_rows_change_no_reconstruction_where_features_do_not_compete(architecture):
    d, x = fresh(architecture), rows(D_A)
    unit = with_unit_rows(d)
    np.testing.assert_allclose(jnp.linalg.norm(unit.W_dec[...], axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(unit(x), d(x), atol=2e-5)


def test_unit_rows_let_features_compete_by_what_they_reconstruct():
    d, x = fresh("topk"), rows(D_A)
    unit = with_unit_rows(d)
    z = jax.nn.relu(d.pre_activations(d._scaled(x)))
    contribution = z * jnp.linalg.norm(d.W_dec[...], axis=1)[None, :]
    np.testing.assert_allclose(unit.encode(x), base.keep_top_k(contribution, 3), atol=2e-5)


def test_dictionaries_of_others_are_told_apart():
    class Foreign(base.find("relu")):
        """As imported ones that fit none of our formulas."""

    d = Foreign(d_model=D_A, width=WIDTH, k=0, rngs=nnx.Rngs(params=0))
    assert is_ours(fresh("relu")) and not is_ours(d)
    with pytest.raises(UserError, match="no checkpoint of their own"):
        transferred(d, to_source=stitch(D_B, D_A, 1), to_target=stitch(D_A, D_B, 2))
