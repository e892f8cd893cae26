"""Moved dictionaries of a run: rows against slow formulas, nulls, and training from them."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_run

from crossdict_jax import dictionaries, maps
from crossdict_jax.activations.store import open_store
from crossdict_jax.config import Config, SAEConfig
from crossdict_jax.dictionaries import train as training
from crossdict_jax.dictionaries.base import build
from crossdict_jax.evaluation.reconstruction import _figures
from crossdict_jax.maps import Pairs, Problem, Side
from crossdict_jax.maps.kinds import procrustes
from crossdict_jax.studies.dictionary_transfer import measure, warm_start
from crossdict_jax.studies.dictionary_transfer.section import savings_table, section, tables
from crossdict_jax.training.mesh import make_mesh
from crossdict_jax.workdir import Workdir, read_jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.shared_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def rows(run):
    config, work = run
    found = measure.score_dictionary_transfer(config, open_store(work.activations), work)
    return {(r["source"], r["target"], r["dictionary"]): r for r in found}


def test_every_direction_has_its_ways(rows):
    ways = ("own", "transferred", "orthogonal", "rotated", "stitch")
    assert list(rows) == [(s, t, w) for s, t in (("a", "b"), ("b", "a")) for w in ways]
    for row in rows.values():
        json.dumps(row, allow_nan=False)
        assert row["fvu_low"] <= row["fvu"] <= row["fvu_high"]
    for source, target in (("a", "b"), ("b", "a")):
        here = {way: rows[source, target, way] for way in ways}
        clean = [here[way]["ce"] - here[way]["delta_ce"] for way in ways[:-1]]
        np.testing.assert_allclose(clean, clean[0], rtol=1e-6)
        assert here["stitch"]["l0"] is here["stitch"]["ce"] is here["stitch"]["delta_ce"] is None


def test_the_own_row_is_the_reconstruction(run, rows):
    config, work = run
    store = open_store(work.activations)
    d = dictionaries.load(work.dictionary("b", tiny_run.SITE))
    figures, _ = _figures(config, store, "b", tiny_run.SITE, d)
    for key in ("fvu", "fvu_low", "l0", "n_rows", "n_documents"):
        assert rows["a", "b", "own"][key] == pytest.approx(figures[key], rel=1e-4)


def test_the_moved_row_is_there_and_back_through_both_maps(run, rows):
    _, work = run
    store, site = open_store(work.activations), tiny_run.SITE
    there, back = (
        maps.load(work.map(*ends, site, site, "ridge")) for ends in (("a", "b"), ("b", "a"))
    )
    x = store.read("b", site, store.select("test")).astype(np.float32)
    mean = store.read("b", site, store.select("train")).astype(np.float32).mean(0)
    d = dictionaries.load(work.dictionary("a", site))
    total = np.square(x - mean).sum()
    for name, between in (("transferred", d), ("stitch", lambda x: x)):
        x_hat = np.asarray(there.activation(between(back.activation(x))))
        expected = np.square(x - x_hat).sum() / total
        assert rows["a", "b", name]["fvu"] == pytest.approx(expected, rel=1e-3)
    assert rows["a", "b", "stitch"]["fvu"] < rows["a", "b", "transferred"]["fvu"]


def test_the_random_stitch_keeps_means_and_power_and_is_random():
    rng = np.random.default_rng(0)
    x_a, x_b = rng.normal(3, 2, (500, 6)), rng.normal(-1, 5, (500, 9))
    d = [build("relu", d_model=w, width=4, k=2, key=jax.random.key(0)) for w in (6, 9)]
    sides = [Side(x, np.zeros(500, np.int32), one) for x, one in zip((x_a, x_b), d)]
    stitch = measure.random_stitch(Pairs(*sides, np.zeros(500)), seed=1)
    moved_rows = stitch.there(x_a)
    np.testing.assert_allclose(moved_rows.mean(0), x_b.mean(0), atol=1e-9)
    assert moved_rows.var(0).sum() == pytest.approx(x_b.var(0).sum())
    np.testing.assert_allclose(stitch.back(moved_rows), x_a, atol=1e-6)  # into more dimensions
    other = measure.random_stitch(Pairs(*sides, np.zeros(500)), seed=2)
    assert np.abs(other.there.W - stitch.there.W).max() > 0.1


def test_a_planted_affine_pair_moves_without_loss():
    """B is an affine image of A: the fitted stitch moves A's dictionary to B's own quality."""
    rng = np.random.default_rng(0)
    x_a = rng.normal(size=(900, 6)).astype(np.float32) + 2
    Q = np.linalg.qr(rng.normal(size=(8, 8)))[0][:6]
    x_b = (3 * x_a @ Q - 1).astype(np.float32)
    d = [build("topk", d_model=w, width=20, k=3, key=jax.random.key(0)) for w in (6, 8)]

    def pairs(part):
        tokens = np.zeros(900, np.int32)[part]
        sides = [Side(x[part], tokens, one) for x, one in zip((x_a, x_b), d)]
        return Pairs(*sides, np.arange(900)[part])

    problem = Problem("A to B", pairs(slice(0, 600)), pairs(slice(600, 900)))
    config = Config()
    config.map.ridge_penalties = (1e-9,)
    stitch = measure.fit_stitch(problem, config)
    moved_dictionary = measure.transferred(d[0], to_source=stitch.back, to_target=stitch.there)

    def fvu(d, x):
        return np.square(x - np.asarray(d(x))).sum() / np.square(x - x.mean(0)).sum()

    assert fvu(moved_dictionary, x_b) == pytest.approx(fvu(d[0], x_a), abs=1e-5)


def test_a_rotated_copy_needs_the_rotation_and_nothing_else(tmp_path):
    """B is a rotation of A: A's dictionary fails on it as it is, and not through Procrustes."""
    rng = np.random.default_rng(0)
    x_a = rng.normal(size=(600, 6)).astype(np.float32)
    Q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    x_b = (x_a @ Q).astype(np.float32)
    d = build("topk", d_model=6, width=60, k=2, key=jax.random.key(0))
    sides = [Side(x, np.zeros(600, np.int32), d) for x in (x_a, x_b)]
    pairs = Pairs(*sides, np.arange(600))
    problem = Problem("A to B", pairs, pairs)

    def fvu(stitch):
        moved_d = measure.transferred(d, to_source=stitch.back, to_target=stitch.there)
        return np.square(x_b - np.asarray(moved_d(x_b))).sum() / np.square(x_b).sum()

    own = np.square(x_a - np.asarray(d(x_a))).sum() / np.square(x_a).sum()
    orthogonal = measure.fit_stitch(problem, Config(), procrustes)
    assert fvu(orthogonal) == pytest.approx(own, abs=1e-3)
    one_space = measure.unstitched(6)
    np.testing.assert_array_equal(one_space.there(one_space.back(x_a)), x_a)


# ---------------------------------------------------------------- training from a moved one


@pytest.fixture(scope="module")
def compared(run, tmp_path_factory):
    """(config, store, work, rows) of dictionaries trained from two starts, in a copy of the run."""
    config, work = run
    copy = Workdir(tmp_path_factory.mktemp("warm") / "run")
    shutil.copytree(work.root, copy.root)
    sae = SAEConfig(width=32, k=6, steps=60, batch_size=64, checkpoint_every=20)
    config, store = dataclasses.replace(config, sae=sae), open_store(copy.activations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", lambda members: make_mesh(devices=jax.devices()[:1]))
        rows = warm_start.compare_starts(config, store, copy)
    return config, store, copy, rows


def test_both_starts_are_trained_on_the_same_rows(compared):
    _, _, work, rows = compared
    assert [(r["source"], r["target"]) for r in rows] == [("b", "a"), ("a", "b")]
    assert read_jsonl(work.result("dictionary_training.jsonl")) == json.loads(json.dumps(rows))
    for row in rows:
        assert row["steps"] == [20, 40, 60] and row["error"] == "fvu"
        assert row["random"][-1] < row["random"][0]
        assert 0 < row["fvu_transferred"] < 2
        assert row["random"] != row["transferred"]


def test_the_random_start_is_that_of_the_run(compared, tmp_path, monkeypatch):
    """The same seeds and rows: what begins at random ends as train_saes would have it."""
    config, store, _, rows = compared
    monkeypatch.setattr(training, "make_mesh", lambda members: make_mesh(devices=jax.devices()[:1]))
    work = Workdir(tmp_path)
    training.train_dictionaries(config, store, work)
    d = dictionaries.load(work.dictionary("a", tiny_run.SITE))
    figures, _ = _figures(config, store, "a", tiny_run.SITE, d)
    assert rows[0]["fvu_random"] == pytest.approx(figures["fvu"], rel=1e-3)


def test_a_goal_is_reached_where_the_curve_first_gets_there():
    assert warm_start.first_reached([0.9, 0.5, 0.6, 0.4], 0.5) == 1
    assert warm_start.first_reached([0.9, 0.8], 0.5) is None
    place = ("a", "b", "resid_pre.1", "resid_pre.2")
    curves = {"random": [0.9, 0.5, 0.4, 0.3], "transferred": [0.35, 0.3, 0.2, 0.1]}
    row = warm_start._row(place, "fvu", [10, 20, 30, 40], curves, [0.3, 0.2])
    assert (row["steps_to_reach"], row["saved"]) == (20, 0.5)


def test_the_report_shows_every_way_and_what_is_saved(rows, compared):
    scores, training = list(rows.values()), compared[3]
    shown = tables(scores)
    assert [t.caption for t in shown] == [
        "Dictionaries of a, used for b",
        "Dictionaries of b, used for a",
    ]
    assert [row[1].text for row in shown[0].rows] == [
        *("own", "transferred", "orthogonal", "rotated", "stitch")
    ]
    assert len(savings_table(training).rows) == 2
    html = section(scores + training)
    assert html.count("<table>") == 3 and html.count(": the moved start saves") == 2
