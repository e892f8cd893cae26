"""The map through a crosscoder: one joint code for all directions of a run, saved and loaded."""

import dataclasses
import json

import numpy as np
import pytest
from map_problems import FakeStore
from tiny_run import save_dictionaries

from crossdict_jax import maps
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import Config, CrosscoderConfig, MapConfig, SAEConfig
from crossdict_jax.dictionaries import crosscoder
from crossdict_jax.dictionaries.crosscoder_training import planned
from crossdict_jax.maps import fit
from crossdict_jax.maps.fit import with_codes
from crossdict_jax.models import Site
from crossdict_jax.training import checkpoint
from crossdict_jax.workdir import Workdir, read_json

WIDTHS = {"a": 8, "b": 6, "c": 5}
SETTINGS = CrosscoderConfig(width=24, steps=120, learning_rate=1e-2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, store, work) of a finished stage of three models."""
    rng, n = np.random.default_rng(0), 2400
    codes = (rng.random((n, 10)) < 0.2) * rng.uniform(0.5, 1.5, (n, 10))
    store = FakeStore(WIDTHS, counts=(1600, 400, 400), codes=codes)
    work = Workdir(tmp_path_factory.mktemp("joint"))
    save_dictionaries(store, work, width=12, k=3)
    settings = {"map": MapConfig(kinds=("crosscoder",)), "sae": SAEConfig(k=3, batch_size=128)}
    config = Config(models=store.models, layer_pairs="1:2", crosscoder=SETTINGS, **settings)
    fit.fit_maps(config, store, work)
    return config, store, work


def score(run, source, target, pairing="aligned"):
    """R^2 of x_B on held-out rows, of a map between two models at the run's layers."""
    config, store, work = run
    ends = (source, target, pairing)
    task = next(t for t in maps.tasks(config, store) if (t.source, t.target, t.pairing) == ends)
    where = (task.source, task.target, task.site_source, task.site_target)
    pairs = maps.load_pairs(store, *where, "test", work)
    m = maps.load(task.path(work))
    x, x_b = pairs.target.x.astype(np.float32), maps.predict_activations(m, pairs)
    return 1 - np.square(x - x_b).sum() / np.square(x - x.mean(0)).sum(), m, pairs


@pytest.mark.parametrize(("source", "target"), [("a", "b"), ("b", "a"), ("c", "b")])
def test_one_code_of_three_models_serves_every_direction(source, target, run):
    r2, m, pairs = score(run, source, target)
    shuffled, *_ = score(run, source, target, "shuffled")
    assert r2 > 0.4 and shuffled < 0.05
    assert (m.reads, m.predicts_activation) == ("activations", True)
    f = maps.predict(m, pairs)
    assert f.shape == (400, 12) and f.min() >= 0 and f.dtype == np.float32
    np.testing.assert_allclose(m(pairs.source.x), f, atol=1e-3)
    encoded = m.dictionary.encode(m.activation(pairs.source.x))
    np.testing.assert_allclose(encoded, m(pairs.source.x), atol=1e-6)


def test_a_map_is_its_crosscoder_given_one_model_alone(run):
    _, _, work = run
    _, m, pairs = score(run, "c", "a")
    joint = crosscoder.load(work.crosscoder((Site(1), Site(2), Site(2))))
    assert joint.d_models == (8, 6, 5)
    x = pairs.source.x.astype(np.float32)
    np.testing.assert_allclose(m.activation(x), joint([None, None, x])[0], atol=1e-4)


def test_every_crosscoder_of_the_run_lies_in_its_own_folder(run, tmp_path):
    config, store, work = run
    folders = {str(p.parent.relative_to(work.crosscoders)) for p in work.crosscoders.glob("*/*/0")}
    three = "resid_pre.1--resid_pre.2--resid_pre.2"
    assert folders == {f"{three}/aligned", f"{three}/shuffled"}
    nulls = dataclasses.replace(config, crosscoder=dataclasses.replace(SETTINGS, self_nulls=1))
    own = ((Site(1), Site(1)), "self"), ((Site(1), Site(1)), "rotated")
    assert planned(nulls, store) == [*planned(config, store), *own]
    (lost := work.crosscoder((Site(1), Site(2), Site(2)), "shuffled")).rename(tmp_path / "lost")
    fit.fit_maps(config, store, work)  # whose maps are all there
    assert checkpoint.is_finished(lost)
    assert not list((work.crosscoders / "training").glob("*/checkpoints"))
    assert read_json(work.timing)["train_crosscoders"]["crosscoders"] == 2
    record = checkpoint.load_meta(maps.tasks(config, store)[0].path(work))["record"]
    assert record["validation_mse"][0]["mse"] > 0
    json.dumps(record, allow_nan=False)


def test_a_control_needs_a_code_and_gets_that_of_its_own_two_sides(run, tmp_path):
    """What has no place in the run's layer tuples is trained on its own rows."""
    config, store, work = run
    where = ("a", "b", Site(1), Site(1))  # a pair of sites that no crosscoder of the run has
    train, held_out = (maps.load_pairs(store, *where, split, work) for split in SPLITS[:2])
    problem = maps.Problem("a to b (control)", train, held_out)
    with pytest.raises(ValueError, match=r"a to b \(control\) has no joint code"):
        maps.map_class("crosscoder").fit([problem], config.map, seed=0, directory=tmp_path)
    task = dataclasses.make_dataclass("Control", ["control"])("ceiling")
    (joined,) = with_codes([problem], [task], fit.Loader(config, store, work), 0, tmp_path)
    (fitted,) = maps.map_class("crosscoder").fit([joined], config.map, seed=0, directory=tmp_path)
    x, x_b = held_out.target.x.astype(np.float32), maps.predict_activations(fitted.map, held_out)
    assert np.square(x - x_b).sum() < 0.6 * np.square(x - x.mean(0)).sum()
