"""Crosscoders: planted shared and exclusive latents, formulas, partitions, options, resume."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted_store import arrays, assert_close, gathered, kill_in_save, run_steps, step_program
from tiny_run import refused

from crossdict_jax.config import Config, CrosscoderConfig, SAEConfig, crosscoder_settings
from crossdict_jax.config.fields import JointSettings
from crossdict_jax.dictionaries import base, crosscoder
from crossdict_jax.dictionaries import crosscoder_training as training
from crossdict_jax.dictionaries.crosscoder_training import Rows, fit_crosscoders, joint_ensemble
from crossdict_jax.training import checkpoint

KEY = jax.random.key(0)
D_MODELS = (4, 6, 5)
HYPER = base.Hyper(l1_coefficient=0.3, k_aux=3, revived=14)
every = pytest.mark.parametrize("variant", ("batchtopk", "l1"))


def fresh(variant, *, d_models=D_MODELS, width=14, k=3, shared_fraction=1.0):
    """A crosscoder none of whose parameters is at its first value."""
    shape = {"d_models": d_models, "width": width, "k": k, "shared_fraction": shared_fraction}
    c = crosscoder.Crosscoder(variant, **shape, key=KEY)
    keys = jax.random.split(KEY, 5)
    c.b_enc[...] = 0.1 * jax.random.normal(keys[0], (width,))
    c.b_dec[...] = jax.random.normal(keys[1], c.b_dec.shape)
    c.center[...] = jax.random.normal(keys[2], c.center.shape)
    c.scale[...] = 0.5 + jax.random.uniform(keys[3], c.scale.shape)
    c.W_dec[...] = c.W_dec[...] * 1.3 * c.allowed().T
    c.threshold[...] = jnp.asarray(0.2 if variant == "batchtopk" else 0.0)
    return c


def views(n=40, d_models=D_MODELS, seed=1):
    keys = jax.random.split(jax.random.key(seed), len(d_models))
    return [1 + jax.random.normal(key, (n, d)) for key, d in zip(keys, d_models)]


def by_hand(c, x, given):
    """The code and every reconstruction, model after model, in float64."""
    array = lambda v: np.asarray(v[...], np.float64)  # noqa: E731
    z = array(c.b_enc)[None, :]
    for m in given:
        u = array(c.scale)[m] * np.asarray(x[m], np.float64) - array(c.center)[c.part(m)][None, :]
        z = z + len(x) / len(given) * u @ array(c.W_enc)[c.part(m)]
    f = np.where(z > max(array(c.threshold), 0), z, 0)
    whole = f @ array(c.W_dec) + array(c.b_dec)[None, :]
    return f, [whole[:, c.part(m)] / array(c.scale)[m] for m in range(len(x))]


@every
@pytest.mark.parametrize("given", [(0, 1, 2), (1,), (0, 2)])
def test_codes_from_some_models_reconstruct_all_in_raw_units(variant, given):
    c, x = fresh(variant), views()
    f, x_hat = by_hand(c, x, given)
    seen = [rows if m in given else None for m, rows in enumerate(x)]
    np.testing.assert_allclose(c.encode(seen), f, atol=1e-5)
    for ours, theirs in zip(c(seen), x_hat):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert (f > 0).any() and (f == 0).any()


@every
def test_training_sees_what_encode_sees(variant):
    """Rows whose models are dropped have the pre-activations of those that are given."""
    c, x = fresh(variant), views()
    present = np.zeros((40, 3), bool)
    present[:20, 1] = present[20:] = True
    z = c.pre_activations(c.scaled_pair(jnp.concatenate(x, axis=1), jnp.asarray(present))[0])
    f = c.activate(z)
    np.testing.assert_allclose(f[:20], c.encode([None, x[1], None])[:20], atol=1e-5)
    np.testing.assert_allclose(f[20:], c.encode(x)[20:], atol=1e-5)


def test_the_l1_loss_is_its_formula():
    c, x = fresh("l1"), views()
    hyper = dataclasses.replace(HYPER, dead=jnp.zeros(14, bool))
    loss, _, f = c.losses(jnp.concatenate(x, axis=1), hyper, jnp.ones((40, 3), bool))
    code, x_hat = by_hand(c, x, (0, 1, 2))
    np.testing.assert_allclose(f, code, atol=1e-5)
    expected = 0
    for m in range(3):
        error = float(c.scale[...][m]) * (np.asarray(x[m]) - x_hat[m])
        norms = np.linalg.norm(np.asarray(c.W_dec[...])[:, c.part(m)], axis=1)
        expected += np.square(error).sum(1).mean() + 0.3 * (code @ norms).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@every
def test_saved_and_loaded_gives_the_same_bits(variant, tmp_path):
    c, x = fresh(variant, shared_fraction=0.5), views()
    base.save(c, tmp_path / "c", meta={"note": "kept"})
    again = crosscoder.load(tmp_path / "c")
    assert type(again) is type(c) and again.d_models == D_MODELS and again.shared_fraction == 0.5
    for ours, theirs in zip(again(x), c(x)):
        np.testing.assert_array_equal(ours, theirs)
    assert checkpoint.load_meta(tmp_path / "c")["note"] == "kept"


def test_classes_follow_the_decoder_norms():
    c = fresh("l1", d_models=(2, 2), width=5)
    lengths = np.asarray([[1, 1], [1, 0.3], [1, 0.2], [0, 2], [0, 0]])
    c.W_dec[...] = jnp.asarray(np.repeat(lengths, 2, axis=1) / np.sqrt(2), jnp.float32)
    expected = [[1, 1], [1, 1], [1, 0], [0, 1], [0, 0]]
    np.testing.assert_array_equal(crosscoder.takes_part(c).T, np.asarray(expected, bool))
    shares = [[0.5, 0.5], [1 / 1.3, 0.3 / 1.3], [1 / 1.2, 0.2 / 1.2], [0, 1], [0, 0]]
    np.testing.assert_allclose(crosscoder.relative_norms(c).T, shares, atol=1e-6)


TINY = JointSettings(width=8, k=2, steps=30, batch_size=32, learning_rate=3e-3)
WIDTH = 48  # half as many again as the 32 features of two views
SMALL = JointSettings(width=WIDTH, k=4, steps=1000, batch_size=128, learning_rate=1e-2)
SMALL = dataclasses.replace(SMALL, drop_probability=0.0, dead_after_rows=3000)


def sparse_rows(seed, *, n=2048, active=4, features=16, d=14):
    """Rows with about ``active`` of 16 features in 14 dimensions."""
    rng = np.random.default_rng(seed)
    codes = (rng.random((n, features)) < active / features) * rng.uniform(0.5, 1.5, (n, features))
    directions = rng.standard_normal((features, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return (codes @ directions + 3.0).astype(np.float32)


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    """{name: (crosscoder, views)} of planted pairs, trained as one ensemble."""
    x, one, other = sparse_rows(0), sparse_rows(1, active=2), sparse_rows(2, active=2)
    pairs = {
        "self": training.copies(x, "self", 5),
        "rotated": training.copies(x, "rotated", 5),
        "rescaled": (x, (7.0 * training.copies(x, "rotated", 5)[1] - 20.0).astype(np.float32)),
        "unrelated": (one, other),
        "shuffled": (one, one),
    }
    orders = {"shuffled": training.shuffles(len(x), models=2, seed=3)}
    rows = [Rows(name, pair, 0, orders.get(name)) for name, pair in pairs.items()]
    fitted = fit_crosscoders(rows, SMALL, directory=tmp_path_factory.mktemp("recovered"))
    return {name: (c, pairs[name]) for name, c in zip(pairs, fitted)}


def classes(c, x):
    """The shares of the latents that fire which are shared, and exclusive to each of two models."""
    live = (np.asarray(c.encode(x)) > 0).mean(axis=0) > 0.005
    part = crosscoder.takes_part(c)[:, live]
    return part.all(0).mean(), (part[0] & ~part[1]).mean(), (part[1] & ~part[0]).mean()


@pytest.mark.parametrize("name", ["self", "rotated", "rescaled"])
def test_copies_share_every_latent(name, recovered):
    c, x = recovered[name]
    assert classes(c, x)[0] == 1.0
    norms = crosscoder.relative_norms(c)[:, (np.asarray(c.encode(x)) > 0).any(axis=0)]
    assert np.abs(norms - 0.5).max() < 0.1
    for rows, x_hat in zip(x, c(x)):
        assert np.square(rows - x_hat).sum() < 0.1 * np.square(rows - rows.mean(0)).sum()


@pytest.mark.parametrize("name", ["unrelated", "shuffled"])
def test_unrelated_and_shuffled_rows_share_no_latent(name, recovered):
    c, x = recovered[name]
    if name == "shuffled":
        x = [x[0], x[1][training.shuffles(2048, models=2, seed=3)[1]]]
    shared, first, second = classes(c, x)
    assert shared <= 0.05 and 0.3 < first < 0.7 and 0.3 < second < 0.7


def test_scales_make_unequal_models_equal():
    views = (sparse_rows(0), 9 * sparse_rows(0)[:, :4] + 5)
    fixed = joint_ensemble([Rows("unequal", views, 0)], TINY).fixed
    u = np.concatenate([s * view for s, view in zip(fixed["scale"][0], views)], axis=1)
    np.testing.assert_allclose(u.mean(0), fixed["center"][0], atol=1e-3)
    centred = np.square(u - u.mean(0))
    np.testing.assert_allclose(centred[:, :14].sum(1).mean(), 9.0, rtol=1e-4)  # mean d_model
    np.testing.assert_allclose(centred[:, 14:].sum(1).mean(), 9.0, rtol=1e-4)


@pytest.mark.parametrize(("models", "drop"), [(2, 0.5), (3, 0.3), (3, 0.0)])
def test_one_model_always_stays_and_others_drop_as_asked(models, drop):
    joint = JointSettings(width=8, k=2, drop_probability=drop)
    rows = {str(m): jnp.zeros((20_000, 1)) for m in range(models)}
    objective = training.CrosscoderObjective(joint, (1,) * models)
    present = np.asarray(objective.pair(rows, SimpleNamespace(key=KEY))[1])
    assert present.shape == (20_000, models)
    assert present.any(axis=1).all()
    expected = 1 - drop * (models - 1) / models
    np.testing.assert_allclose(present.mean(axis=0), expected, atol=0.015)


def tiny_rows(**changes):
    x = sparse_rows(0, n=96, features=6, d=4)
    y = sparse_rows(1, n=96, features=6, d=5)
    return dataclasses.replace(Rows("tiny", (x, y), 0), **changes)


def program(**changes):
    """What one training step computes of one member, as text."""
    return step_program(joint_ensemble([tiny_rows()], dataclasses.replace(TINY, **changes)))


OPTIONS = {"width": 12, "k": 3, "drop_probability": 0.25, "learning_rate": 1e-3, "batch_size": 64}
OPTIONS |= {"steps": 60, "dead_after_rows": 60_000, "matmul_dtype": "bfloat16"}
OPTIONS |= {"products": "lists", "variant": "l1", "l1_coefficient": 9.0}


def test_every_option_changes_what_a_step_computes():
    plain = program()
    fields = {f.name for f in dataclasses.fields(TINY)}
    assert program() == plain and set(OPTIONS) == fields - {"shared_fraction"}
    for field, value in OPTIONS.items():
        assert program(**{field: value}) != plain, field


@pytest.mark.parametrize("variant", ["batchtopk", "l1"])
def test_dedicated_latents_stay_dedicated_through_training(variant):
    settings = dataclasses.replace(TINY, shared_fraction=0.5, variant=variant)
    ensemble = joint_ensemble([tiny_rows()], settings)
    params = run_steps(ensemble, 3)[0]["params"]  # 4 shared latents, 2 of each model
    for W in (params["W_dec"][0], params["W_enc"][0].T):
        np.testing.assert_array_equal(W[4:6, 4:], 0)
        np.testing.assert_array_equal(W[6:, :4], 0)
        assert (np.abs(W[:4]).max(axis=1) > 0).all() and (np.abs(W[4:6, :4]) > 0).all()
        assert (np.abs(W[6:, 4:]) > 0).all()


def test_what_is_0_follows_the_dictionaries():
    sae = SAEConfig(width=(64, 128), k=80, learning_rate=2e-3, steps=7, batch_size=33)
    settings = crosscoder_settings(Config(sae=sae))
    assert (settings.width, settings.k) == (64, 64)  # no more active ones than there are
    assert (settings.learning_rate, settings.steps, settings.batch_size) == (2e-3, 7, 33)
    own = CrosscoderConfig(width=10, learning_rate=1.0, steps=1)
    settings = crosscoder_settings(Config(sae=sae, crosscoder=own))
    assert (settings.width, settings.learning_rate, settings.steps) == (10, 1.0, 1)


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path):
    def fit(name):
        how = {"directory": tmp_path / name, "checkpoint_every": 15}
        return arrays(fit_crosscoders([tiny_rows()], TINY, **how)[0])

    kill_in_save(2, lambda: fit("killed"))
    assert checkpoint.latest_step(tmp_path / "killed" / "0" / "checkpoints") == 15
    assert_close(fit("killed"), fit("whole"))


@pytest.mark.mesh
@every
def test_no_device_gathers_rows(variant):
    x, y = sparse_rows(0, n=512, d=4), sparse_rows(1, n=512, d=5)
    members = [Rows("one", (x, y), 0), Rows("other", (x, y), 1)]
    joint = dataclasses.replace(TINY, variant=variant, batch_size=256)
    shapes = gathered(joint_ensemble(members, joint), TINY.steps, TINY.width)
    assert not [shape for shape in shapes if "256" in shape or "64,8" in shape], shapes


def test_what_cannot_work_or_be_read_is_refused_in_one_line(tmp_path):
    refused("is no crosscoder", crosscoder.load, tmp_path / "nowhere")
    checkpoint.save(tmp_path / "d", params={"a": np.zeros(2)}, meta={"architecture": "topk"})
    refused("another checkpoint", crosscoder.load, tmp_path / "d")
    refused("checkpoint 0 already", checkpoint.save, tmp_path / "d", params={"a": np.zeros(2)})
    large = dataclasses.replace(TINY, batch_size=128)
    words = "sae.batch_size=128 is more than the 96"
    refused(words, fit_crosscoders, [tiny_rows()], large, directory=tmp_path)
