"""Stores whose rows have planted directions, ensembles trained on them, and a kill in between."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossdict_jax import dictionaries, modules
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config, SAEConfig, architectures
from crossdict_jax.dictionaries import train
from crossdict_jax.models import Site
from crossdict_jax.training import checkpoint, loop
from crossdict_jax.workdir import Workdir

KEY = jax.random.key(0)


def slow_but(*quick):
    """Every architecture, those that are not named in the slow tests."""
    marks = {a: [] if a in quick else [pytest.mark.slow] for a in architectures()}
    cases = [pytest.param(a, marks=mark) for a, mark in marks.items()]
    return pytest.mark.parametrize("architecture", cases)


class PlantedStore(Store):
    """Rows x [n, d_model], 1, 2, ... times at the sites of one model; y is what those write."""

    models = paths = ("planted",)

    def __init__(self, x, *, sites=1, y=None):
        self.x, self.y, self.n_sites = x, y, sites

    def sites_of(self, model):
        return tuple(map(Site, range(self.n_sites)))

    def output_of(self, model, site):
        return (model, site) if self.y is None else ("other", Site(site.layer, "mlp_out"))

    def d_model(self, model):
        return (self.x if model == "planted" else self.y).shape[1]

    def select(self, split):
        return np.arange(len(self.x))

    def read(self, model, site, rows):
        x = self.x if model == "planted" else self.y
        return (x[rows] * (1 + site.layer)).astype(jnp.bfloat16)


def planted_rows(*, n=6000, d_model=16, features=24, active=2):
    """Rows that are sums of a few planted directions, and the directions."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(features, d_model))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    codes = np.zeros((n, features))
    for row in codes:
        row[rng.choice(features, active, replace=False)] = rng.uniform(1, 2, active)
    return (codes @ directions).astype(np.float32), directions


def train_on(store, work, *, checkpoint_every=500, **sae):
    """Trains dictionaries with these settings into a folder."""
    config = Config(models=("planted", "other"), sae=SAEConfig(**sae), controls=())
    config.checkpoint_every = checkpoint_every
    train.train_dictionaries(config, store, Workdir(work))
    return Workdir(work)


def trained(work, *, site=0, name="seed-0"):
    return dictionaries.load(work.dictionary("planted", Site(site), name))


def arrays(module):
    return jax.tree.map(np.asarray, modules.split(module)[1])


def run_steps(ensemble, steps, *, change=lambda state: state, chunk=None):
    """(state, metrics) after the first steps of a training, from a changed initial state."""
    size, state, metrics = chunk or steps, change(loop.initial(ensemble, KEY)), []
    run = loop.Chunks(ensemble, KEY, steps=steps, limit=size)
    for first in range(0, steps, size):
        state, new = run(state, first, size)
        metrics.append(jax.device_get(new))
    return jax.device_get(state), jax.tree.map(lambda *all_: np.concatenate(all_), *metrics)


def step_program(ensemble, steps=30):
    """What one step computes, as text: every number that it uses."""
    feed, state = ensemble.feed, jax.eval_shape(ensemble.init, KEY)
    rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), feed.indices(0, 1))
    batch = jax.eval_shape(feed.select, feed.resident, rows)
    step = functools.partial(ensemble.step, steps=steps)
    return f"{jax.make_jaxpr(step)(state, batch, 0, KEY)} {ensemble.fixed}"


def gathered(ensemble, steps, variant):
    """The shapes that devices gather from each other in one step."""
    feed = ensemble.feed
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=ensemble.layout),
        jax.eval_shape(ensemble.init, KEY),
    )

    def step(state, held, rows):
        return ensemble.step(state, feed.select(held, rows), 0, KEY, variant, steps=steps)

    rows = jax.tree.map(lambda a: a[0], feed.indices(0, 1))
    text = jax.jit(step).lower(state, feed.resident, rows).compile().as_text()
    return re.findall(r"= (\S+) all-gather", text)


def kill_in_save(number, function, module=checkpoint, name="save"):
    """Runs a function that dies at a call of that number, from 1 on: of ``save``, or another."""
    saves, save = [], getattr(module, name)

    def dying(*args, **kwargs):
        saves.append(1)
        if len(saves) == number:
            raise KeyboardInterrupt
        return save(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, dying)
        function()


def assert_close(one, other, **tolerance):
    """Compares two trees of arrays of the same names; without a tolerance, to the bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other)):
        name = jax.tree_util.keystr(path)
        if tolerance:
            np.testing.assert_allclose(a, b, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)
