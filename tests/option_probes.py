"""Probes: what a config makes of a run, seen through small functions of the library.

Probes of training look at what the loop is asked to do, not at its result: the traced first state
and step with their constants, the order of rows, steps, seed and checkpoints. That takes no
compilation.
"""

import hashlib
import re
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_run
from map_problems import fit_one, make_problem

from crossdict_jax import maps, models, modules
from crossdict_jax.activations import extract as extraction
from crossdict_jax.activations.masking import masked
from crossdict_jax.activations.plan import make_plan
from crossdict_jax.activations.store import Rows, Store, shard_name
from crossdict_jax.activations.text import load_corpus
from crossdict_jax.causal.directions import map_groups
from crossdict_jax.config import Config, crosscoder_settings, settings
from crossdict_jax.dictionaries import crosscoder_training, train
from crossdict_jax.evaluation import reconstruction
from crossdict_jax.evaluation.transfer import hold_out
from crossdict_jax.maps import ensemble
from crossdict_jax.maps.controls import control_tasks
from crossdict_jax.maps.kinds import hypernetwork
from crossdict_jax.models import Site
from crossdict_jax.models.base import captured
from crossdict_jax.pretraining import language_model
from crossdict_jax.training.mesh import make_mesh
from crossdict_jax.workdir import Workdir

# ---------------------------------------------------------------- what is compared


class Asked(Exception):
    """Ends a stage at the training loop; holds what the loop was asked to do."""


def traced(function, *shapes) -> list:
    """A function's program and its constants; addresses of objects are left out of it."""
    closed = jax.make_jaxpr(function)(*shapes)
    consts = [hashlib.sha256(np.asarray(c).tobytes()).hexdigest() for c in closed.consts]
    return [re.sub(r"0x[0-9a-f]+", "", str(closed)), *consts]


def what_is_asked(trainable, *, feed, steps, seed, checkpoint_every, meta, **_):
    """Stands in for the training loop. Of ``meta``, which holds all settings, members alone."""
    order = feed.indices(0, 2)
    one = jax.tree.map(lambda a: np.asarray(a)[0], order)
    batch = jax.eval_shape(feed.select, feed.resident, one)
    key = jax.random.key(0)
    state = jax.eval_shape(trainable.init, key)
    raise Asked(
        traced(trainable.init, key),
        traced(trainable.step, state, batch, 0, key),
        [np.asarray(a).tolist() for a in jax.tree.leaves(order)],
        (steps, seed, checkpoint_every, meta.get("members")),
    )


def asked(module, stage, *arguments):
    """What a stage asks of the loop that its module imports, on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", what_is_asked)
        if hasattr(module, "make_mesh"):
            patch.setattr(module, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        with pytest.raises(Asked) as caught:
            stage(*arguments)
    return caught.value.args


HOME: list[Path] = []  # a folder for what probes read, while there is one


def place() -> Path:
    return HOME[0]


@contextmanager
def at(folder: Path):
    """Probes read and write below this folder."""
    HOME.append(folder)
    yield
    HOME.clear()
    tiny.cache_clear()
    problem.cache_clear()


@cache
def tiny() -> Config:
    """Two small models, and a text of which every line is a document of two columns."""
    config = tiny_run.make_config(place())
    lines = [f'{{"text": "{t}", "other": "{t[::-1]}"}}\n' for t in tiny_run.make_texts(60)]
    (place() / "lines.jsonl").write_text("".join(lines))
    (place() / "others.jsonl").write_text("".join(lines[::-1]))
    return config


def corpus(config):
    """The documents, and which split each is of."""
    return [(d.text, d.split) for d in load_corpus(config.text).documents]


def plan(config):
    """Which windows are read, by which tokens, and how they are stored."""
    made = make_plan(config, [loaded(path) for path in config.models], place())
    columns = [*made.table.ids, *made.table.offsets, made.rows.byte_end]
    return [column[:] for column in columns], made.shard_starts


loaded = cache(models.load)


def sites(config):
    """The models that are read, the sites they are read at, and what dictionaries write."""
    reads = []

    def stop(*_):
        raise Asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction.models, "load", loaded)
        patch.setattr(extraction.models, "check_site", lambda c, s, name: reads.append((name, s)))
        patch.setattr(extraction, "make_plan", stop)
        with pytest.raises(Asked):
            extraction.extract(config, Workdir(place() / "nowhere"))
    return reads


def reader(config):
    """How a model is read: windows per forward, and the program."""
    lm = loaded(tiny().models[0])
    made = extraction.Reader(config.extract, lm, [Site(1)], None)
    tokens = jax.ShapeDtypeStruct((8, 16), np.int32)
    read = partial(made._runner.dispatch, captured, static=((Site(1),),))
    return made._runner._size(), traced(read, tokens)


def mask(config):
    """Which of 40 rows are left out: one is 20 times as long as most, one is not finite."""
    x = np.ones((40, 4))
    x[7], x[9] = 20, np.nan
    path = place() / "masked" / shard_name("a", "resid_pre.1", 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, x.astype(ml_dtypes.bfloat16).view(np.uint16))
    n = np.arange(40, dtype=np.int32)
    rows = Rows(n, n, n, n[:, None], n[:, None], np.zeros(40, np.int8), n >= 0)
    how = {"shards": 1, "documents": [str(i) for i in n]}
    try:
        return masked(config.extract, place() / "masked", {"a": [Site(1)]}, rows, **how).keep[:]
    except settings.UserError as error:
        return str(error)


class Four(Store):
    """Four layers of two models, 64 rows of 6 numbers each."""

    def __init__(self):
        pass

    models = ("a", "b")
    sites_of = staticmethod(lambda model: tuple(map(Site, range(4))))
    output_of = staticmethod(lambda model, site: (model, site))
    d_model = staticmethod(lambda model: 6)
    select = staticmethod(lambda split: np.arange(64))

    def read(self, model, site, rows):
        seed = ("ab".index(model), site.layer)
        x = np.random.default_rng(seed).normal(size=(64, 6))
        return x[rows].astype(ml_dtypes.bfloat16)


def dictionaries(config):
    """What is asked of the loop for the run's dictionaries (the first group of equal shape)."""
    return asked(train, train.train_dictionaries, config, Four(), Workdir(place() / "d"))


def crosscoders(config):
    """What is asked of the loop for one joint code of two models."""
    x = np.random.default_rng(0).normal(size=(64, 9)).astype(np.float32)
    rows = [crosscoder_training.Rows("a", (x[:, :4], x[:, 4:]), config.seed)]
    fit = partial(crosscoder_training.fit_crosscoders, directory=place() / "c")
    return asked(crosscoder_training, fit, rows, crosscoder_settings(config))


@cache
def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2300, 5))
    tokens = rng.integers(0, 9, len(x))
    return make_problem(x, np.maximum(x[:, :4] + x[:, 1:], 0), tokens=tokens)[0]


def trained_map(config):
    """What is asked of the loop for the `mlp`."""
    fit = partial(maps.map_module("mlp").fit, seed=config.seed, directory=place() / "m")
    return asked(ensemble, fit, [problem()], config.map)


def network(config):
    """What is asked of the loop for the `hypernetwork`."""
    fit = partial(maps.map_module("hypernetwork").fit, seed=config.seed, directory=place() / "h")
    return asked(hypernetwork, fit, [problem()], config.map)


def closed_forms(config):
    """The parameters of the rungs that have one to choose."""
    fitted = [fit_one(kind, problem(), place(), config.map) for kind in ("ridge", "low_rank")]
    fitted += [fit_one("token", problem(), place(), config.map)]
    return [np.asarray(a) for f in fitted for a in jax.tree.leaves(modules.split(f.map)[1])]


def ladder(config):
    """The maps of the run, and their controls."""
    return maps.tasks(config, Four()), control_tasks(config, Four())


def resampled(config):
    """How documents are drawn for intervals."""
    rows, settings = np.arange(6.0)[:, None], config.evaluation
    bench = {"documents": np.arange(6), "bootstrap": settings.bootstrap, "pool": 0, "seed": 0}
    return hold_out(rows, train_mean=np.zeros(1), **bench).resamples.weights


def batches(config):
    """How many rows of a dictionary are measured at a time."""
    sizes = []

    def measure(*_, size, **__):
        sizes.append(size)
        raise Asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "measure", measure)
        plain = type("Plain", (), {"transcodes": False})()
        with pytest.raises(Asked):
            reconstruction.figures(plain, Four(), "a", Site(0), config.evaluation, seed=0)
    return sizes


def preferences(config):
    """The directions, layer pairs and rungs of contrast sets."""
    asked = config.contrast
    return map_groups(config, Four(), layers="middle", kinds=asked.maps)


def probed(config):
    """The directions, layer pairs and rungs of probes."""
    asked = config.probe
    return map_groups(config, Four(), layers="middle", kinds=asked.maps, of_tokens=True)


def pretraining(config):
    """What is asked of the loop for a language model."""
    tokens = np.arange(4000, dtype=np.int32) % 300
    return asked(language_model, language_model._train, config, tokens, place() / "lm")
