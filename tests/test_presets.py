"""The large presets: every stage's shapes at full size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import pythia410m_gpt2medium, pythia410m_gpt2medium_small
from crossdict_jax import models, modules
from crossdict_jax.dictionaries import train as dictionaries
from crossdict_jax.dictionaries.base import build
from crossdict_jax.maps import Pairs, Problem, Side, ensemble
from crossdict_jax.maps.kinds import mlp
from crossdict_jax.models import Site
from crossdict_jax.models.base import captured
from crossdict_jax.training.ensemble import Ensemble
from crossdict_jax.training.mesh import make_mesh

MODELS = ("EleutherAI/pythia-410m-deduped", "openai-community/gpt2-medium")
ARCHITECTURES = {name.partition("/")[2]: models.known_config(name) for name in MODELS}
PRESETS = {
    "small": pythia410m_gpt2medium_small.get_config(),
    "full": pythia410m_gpt2medium.get_config(),
}
preset = pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS.keys())
architecture = pytest.mark.parametrize("shape", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())


@architecture
def test_parameters_are_as_many_as_published(shape):
    _, params = modules.abstract(lambda: models.init(shape))
    millions = sum(np.prod(p.shape) for p in jax.tree.leaves(params)) / 1e6
    published = {"gpt_neox": 405.3, "gpt2": 354.8}[shape.model_type]
    assert millions == pytest.approx(published, abs=0.1)


@preset
@architecture
def test_language_models_at_full_size(shape, config):
    graphdef, params = modules.abstract(lambda: models.init(shape))
    tokens = jax.ShapeDtypeStruct((config.extract.batch_size, config.text.window_tokens), np.int32)
    sites = tuple(Site(layer, config.site) for layer in config.layers)

    def read(params, tokens):
        lm = modules.merge(graphdef, params)
        return captured(lm, sites, tokens, config.extract.matmul_dtype), lm.logits(tokens)

    x, logits = jax.eval_shape(read, params, tokens)
    assert [a.shape for a in x] == [(*tokens.shape, 1024)] * 3
    assert logits.shape == (*tokens.shape, shape.vocab_size)


@preset
def test_all_dictionaries_in_one_step_at_full_size(config):
    sites = [(m, Site(layer)) for m in ARCHITECTURES for layer in config.layers]
    members = dictionaries.members(config.sae, sites)
    assert len(members) == 6
    fixed = {"id": np.arange(6, dtype=np.uint32)}
    fixed |= {name: np.ones(6, np.float32) for name in ("rate", "penalty")}
    start = {"scale": np.ones(6), "mean": np.zeros((6, 1024)), "rows": np.ones((6, 4, 1024))}
    fixed["start"] = {name: value.astype(np.float32) for name, value in start.items()}
    shape = {"d_model": 1024, "d_out": None, "width": members[0].width, "k": members[0].k}
    objective = dictionaries.DictionaryObjective(config.sae, **shape)
    mesh = make_mesh(members=6, devices=jax.devices()[:1])
    trainable = Ensemble(objective, None, fixed, (), mesh).trainable(config.sae.steps)
    state = jax.eval_shape(trainable.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((6, config.sae.batch_size, 1024), jnp.float32)
    batch = {"rows": {"x": x}, "fixed": fixed}
    after, metrics = jax.eval_shape(trainable.step, state, batch, 0, jax.random.key(0))
    assert after == state and metrics["loss"].shape == (6,)
    assert state["params"]["W_enc"].shape == (6, 1024, 4096)


@preset
def test_the_trained_map_at_full_size(config):
    def side(seed):
        x = np.ones((config.map.batch_size, 1024), np.float32)
        make = partial(build, config.sae.architecture, d_model=1024, k=config.sae.k)
        d = make(width=config.sae.width, key=jax.random.key(seed))
        return Side(x=x, tokens=np.zeros(len(x), np.int32), dictionary=d)

    pairs = Pairs(side(0), side(1), np.zeros(config.map.batch_size, np.int32))
    alone, _ = ensemble.prepare(mlp.MLP, [Problem("a to b", pairs, pairs)], config.map, seed=0)
    trainable, feed = alone.trainable(config.map.steps), alone.feed
    state = jax.eval_shape(trainable.init, jax.random.key(0))
    rows = feed.indices(0, 1)[0]
    batch = jax.eval_shape(feed.select, feed.resident, rows)
    after, metrics = jax.eval_shape(trainable.step, state, batch, 0, jax.random.key(0))
    assert after == state and np.isfinite(metrics["loss"].size)
    last = state["params"]["network"]["last"]["kernel"]
    assert last.shape == (1, config.map.hidden, config.sae.width)
