"""Planted owners: crosscoders find shared and exclusive features; the scores are what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossdict_jax.dictionaries import crosscoder
from crossdict_jax.dictionaries import crosscoder_training as training
from crossdict_jax.training.mesh import make_mesh
from crossdict_jax.verify import ownership
from crossdict_jax.verify.planted import PlantedConfig, views


def perfect(test):
    """A crosscoder whose latents are the planted features, three of them moved to other owners."""
    width = test.codes.shape[1]
    c = crosscoder.build(
        "l1", d_models=(24, 32), width=width, k=0, shared_fraction=1.0, key=jax.random.key(0)
    )
    x = np.concatenate(test.x, axis=1)
    c.W_dec[...] = jnp.asarray(np.concatenate(test.directions, axis=1))
    c.W_enc[...] = jnp.asarray(np.linalg.lstsq(x, test.codes, rcond=None)[0])
    return c


def test_scores_count_what_is_called_shared_and_exclusive():
    test = views(PlantedConfig(widths=(24, 32), features=40, noise=0.0), seed=0)
    c = perfect(test)
    assert set(ownership.scores(c, test).values()) == {1.0}
    shared, only = np.flatnonzero(test.shared), np.flatnonzero(test.exclusive(0))
    wrong = np.asarray(c.W_dec[...]).copy()
    wrong[shared[:2], :24] = 0  # two of 30 shared ones are called exclusive to the second view
    wrong[only[0], 24:] = 0.2  # one of 10 exclusive ones is called shared
    c.W_dec[...] = jnp.asarray(wrong)
    found = ownership.scores(c, test)
    assert found["shared_precision"] == pytest.approx(28 / 29)
    assert found["shared_recall"] == pytest.approx(28 / 30)
    assert found["exclusive_precision"] == pytest.approx(9 / 11)
    assert found["exclusive_recall"] == pytest.approx(9 / 10)


def test_a_crosscoder_that_knows_nothing_scores_nothing():
    test = views(PlantedConfig(rows=2048), seed=0)
    c = crosscoder.build(
        "batchtopk", d_models=(24, 32), width=96, k=4, shared_fraction=0.5, key=jax.random.key(0)
    )
    found = ownership.scores(c, test)
    assert found["exclusive_recall"] < 0.5 and found["exclusive_precision"] < 0.5


def test_planted_owners_are_found_in_superposition(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "make_mesh", lambda members: make_mesh(devices=jax.devices()[:1]))
    settings = dataclasses.replace(ownership.SETTINGS, steps=800, checkpoint_every=800)
    found = ownership.ownership(settings, PlantedConfig(), range(3), directory=tmp_path)
    for name in found[0]:
        assert np.median([row[name] for row in found]) >= 0.9, name
