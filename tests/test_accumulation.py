"""Gradient accumulation: a batch in parts trains as the batch in one piece."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossdict_jax import modules
from crossdict_jax.config import Config, SAEConfig
from crossdict_jax.config.settings import validate
from crossdict_jax.dictionaries import accumulation, base, train
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site
from crossdict_jax.training import parts
from crossdict_jax.training.mesh import make_mesh

KEY = jax.random.key(0)
WIDTH, ROWS = 20, 24
every = pytest.mark.parametrize("architecture", base.architectures())


def trainable_of(architecture, *, d_out=0, mesh=None, **sae):
    """What trains two members, on one device unless there is a mesh."""
    sae = SAEConfig(
        architecture=architecture,
        width=WIDTH,
        k=3,
        batch_size=ROWS,
        dead_after_rows=50,
        auxk_coefficient=0.5,
        **sae,
    )
    group = train.members(sae, [("a", Site(0)), ("b", Site(0))])
    sizes = {"d_model": 6, "d_out": d_out}
    graphdef, _ = modules.abstract(lambda: train._build(sae, sizes, group[0], KEY))
    normal = np.random.default_rng(0).normal
    starts = {"scale": np.ones(2), "mean": np.ones((2, 6)), "rows": normal(size=(2, 9, 6))}
    if d_out:
        starts |= {"scale_out": np.full(2, 2), "mean_out": np.zeros((2, d_out))}
        starts |= {"rows_out": normal(size=(2, 9, d_out))}
        starts["predictor"] = normal(size=(2, 6, d_out))
    starts = {name: np.asarray(value, np.float32) for name, value in starts.items()}
    mesh = mesh or make_mesh(members=2, devices=jax.devices()[:1])
    return train._trainable(sae, graphdef, group, sizes, starts, mesh)


def batch(seed, d=6):
    """Rows of different size, so that parts differ in variance and in how much they keep."""
    rows = 1 + jax.random.normal(jax.random.key(seed), (2, ROWS, d))
    return rows * jnp.linspace(0.3, 2, ROWS)[None, :, None]


def stepped(trainable, *, d_out=0, steps=3, dead=True):
    """The state and the metrics after some steps, the first of them with dead features."""
    state = trainable.init(KEY)
    if dead:
        silent = jnp.tile(jnp.where(jnp.arange(WIDTH) < 8, 100, 0), (2, 1))
        state = state | {"train": state["train"] | {"silent": silent}}
    step = jax.jit(trainable.step)
    for number in range(steps):
        rows = batch(number), batch(100 + number, d_out) if d_out else None
        state, metrics = step(state, rows, number, KEY)
    return state, metrics


def assert_same(one, other, **tolerance):
    places = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other))
    for (path, a), b in places:
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, err_msg=name, **tolerance)


@every
def test_parts_train_as_the_whole_batch(architecture):
    options = {"l0_target": 4.0} if architecture == "jumprelu" else {}
    whole = stepped(trainable_of(architecture, **options))
    parts = stepped(trainable_of(architecture, accumulate=4, **options))
    assert_same(parts, whole, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_a_part_alone_is_another_batch(architecture):
    """What the test above would miss: taking every part for a batch of its own."""
    sae = {"l0_target": 4.0} if architecture == "jumprelu" else {}
    graphdef, params = modules.split(base.build(architecture, d_model=6, width=WIDTH, k=3, key=KEY))
    x, dead = batch(0)[0], jnp.arange(WIDTH) < 8
    hyper = train.hyper_of(SAEConfig(auxk_coefficient=0.5, **sae), 1.0, d_out=6, most_dead=99)
    d = modules.merge(graphdef, params)
    whole = accumulation.whole_of(d, (x, None), hyper=hyper, parts=4)

    def loss_of(hyper, params, x, y):
        d = modules.merge(graphdef, params)
        loss, terms, f = d.losses(x, y=y, hyper=hyper, dead=dead)
        return loss, (terms, f)

    def error(hyper):
        ours = accumulation.gradients(partial(loss_of, hyper), params, (x, None), 4)[-1]
        return max(np.abs(ours[n] - true[n]).max() for n in ("W_enc", "W_dec", "b_dec"))

    true = accumulation.gradients(partial(loss_of, hyper), params, (x, None), 1)[-1]
    assert error(dataclasses.replace(hyper, whole=whole)) < 1e-5
    assert error(hyper) > 1e-3


def test_transcoders_too():
    whole = stepped(trainable_of("batchtopk", d_out=4), d_out=4)
    parts = stepped(trainable_of("batchtopk", d_out=4, accumulate=3), d_out=4)
    assert_same(parts, whole, rtol=2e-4, atol=2e-5)


def test_rows_come_back_in_order():
    x = jnp.arange(24.0).reshape(12, 2)
    split = parts.split(x, 3)
    assert split.shape == (3, 4, 2)
    np.testing.assert_array_equal(split[1], x[1::3])
    np.testing.assert_array_equal(parts.join(split), x)


@pytest.mark.mesh
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_rows_stay_on_their_devices(architecture):
    mesh = make_mesh(members=2)
    trainable = trainable_of(architecture, accumulate=3, mesh=mesh)
    member = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("member"))
    both = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("member", "data"))
    state = jax.eval_shape(trainable.init, KEY)
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=member), state)
    x = jax.ShapeDtypeStruct((2, ROWS, 6), jnp.float32, sharding=both)
    text = jax.jit(trainable.step).lower(state, (x, None), 0, KEY).compile().as_text()
    gathered = re.findall(r"= (\S+) all-gather", text)
    assert not [g for g in gathered if f"{ROWS // 3}," in g or f"{ROWS}," in g], gathered


def test_memory_is_predicted_to_shrink():
    whole, parts = (
        train.member_bytes(
            SAEConfig(architecture="topk", batch_size=4096, accumulate=n), d_model=64, width=4096
        )
        for n in (1, 8)
    )
    assert parts < 0.4 * whole


def test_parts_of_unequal_size_are_refused():
    sae = SAEConfig(batch_size=100, accumulate=3)
    with pytest.raises(UserError, match=r"sae\.accumulate=3 must divide sae\.batch_size=100"):
        validate(Config(models=("a", "b"), sae=sae))
