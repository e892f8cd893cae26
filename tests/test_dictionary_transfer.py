"""Moved dictionaries: exact in every architecture, scored by slow formulas, and trained from."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx
from test_exchange import F, K, trained
from tiny_run import changed, refused

from crossdict_jax import dictionaries, maps, ops
from crossdict_jax.activations.store import open_store
from crossdict_jax.config import Config, SAEConfig
from crossdict_jax.dictionaries import base
from crossdict_jax.dictionaries import train as training
from crossdict_jax.evaluation import reconstruction
from crossdict_jax.maps import Pairs, Problem, Side
from crossdict_jax.studies.dictionary_transfer import TABLE, TRAINING, measure, section
from crossdict_jax.studies.dictionary_transfer import transferred as moving
from crossdict_jax.studies.dictionary_transfer.transferred import Affine, Stitch, transferred
from crossdict_jax.workdir import Workdir, read_jsonl

every = pytest.mark.parametrize("architecture", base.architectures())
D_A, D_B, SITE = 6, 9, tiny_run.SITE
fresh = functools.partial(trained, d_model=D_A)


def random_affine(d_in, d_out, seed):
    rng = np.random.default_rng(seed)
    return Affine(rng.normal(size=(d_in, d_out)) / 2, rng.normal(size=d_out))


STITCH = Stitch(forth=random_affine(D_A, D_B, 2), back=random_affine(D_B, D_A, 1))


def normal_rows(d, n=50, seed=5):
    return (1 + np.random.default_rng(seed).normal(size=(n, d))).astype(np.float32)


def fvu(d, x):
    return np.square(x - np.asarray(d(x))).sum() / np.square(x - x.mean(0)).sum()


@every
@pytest.mark.parametrize("scale", [None, 2.5])
def test_every_architecture_is_moved_exactly(architecture, scale):
    d, x = fresh(architecture), normal_rows(D_B)
    moved = transferred(d, STITCH, scale)
    assert type(moved) is type(d) and (moved.d_model, moved.width, moved.k) == (D_B, d.width, d.k)
    f = np.asarray(d.encode(STITCH.back(x).astype(np.float32)))
    np.testing.assert_allclose(moved.encode(x), f, atol=2e-5)
    assert (f > 0).any()
    np.testing.assert_allclose(moved.decode(f), STITCH.forth(np.asarray(d.decode(f))), atol=2e-5)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
def test_unit_rows_change_no_reconstruction_where_features_do_not_compete(architecture):
    d, x = fresh(architecture), normal_rows(D_A)
    unit = moving.with_unit_rows(d)
    np.testing.assert_allclose(jnp.linalg.norm(unit.W_dec[...], axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(unit(x), d(x), atol=2e-5)


def test_unit_rows_let_features_compete_by_what_they_reconstruct():
    d, x = fresh("topk"), normal_rows(D_A)
    z = jax.nn.relu(d.pre_activations(d.scaled_pair(x)[0]))
    contribution = z * jnp.linalg.norm(d.W_dec[...], axis=1)[None, :]
    unit = moving.with_unit_rows(d)
    np.testing.assert_allclose(unit.encode(x), ops.keep_top_k(contribution, 3), atol=2e-5)


def test_dictionaries_of_others_are_told_apart():
    class Foreign(base.find("relu")):
        """As imported ones that fit none of our formulas."""

    d = Foreign(d_model=D_A, width=20, k=0, rngs=nnx.Rngs(params=0))
    assert moving.is_ours(fresh("relu")) and not moving.is_ours(d)
    refused("no checkpoint of their own", transferred, d, STITCH)


def problem(x_a, x_b, width, k):
    """All rows for training, the last third for validation, with random dictionaries."""
    none, shape = np.zeros(len(x_a), np.int32), {"width": width, "k": k, "key": jax.random.key(0)}
    sides = [Side(x, none, base.build("topk", d_model=x.shape[1], **shape)) for x in (x_a, x_b)]
    pairs = Pairs(*sides, np.arange(len(x_a)))
    return Problem("A to B", pairs, pairs.take(slice(len(x_a) * 2 // 3, None)))


@pytest.mark.parametrize(
    ("kind", "stretch", "offset", "d_b", "error"),
    [("ridge", 3, -1, 8, 1e-5), ("procrustes", 1, 0, 6, 1e-3)],
)
def test_a_planted_map_moves_without_loss(kind, stretch, offset, d_b, error):
    """B is A, turned, stretched and moved; a rotated copy needs the rotation and nothing else."""
    rng = np.random.default_rng(0)
    x_a = rng.normal(size=(900, 6)).astype(np.float32)
    Q = np.linalg.qr(rng.normal(size=(d_b, d_b)))[0][:6]
    x_b = (stretch * x_a @ Q + offset).astype(np.float32)
    planted, settings = problem(x_a, x_b, 20, 3), Config().map
    settings.ridge_penalties = (1e-9,)
    d = planted.train.source.dictionary
    moved = transferred(d, moving.fit_stitch(planted, settings, kind))
    assert fvu(moved, x_b) == pytest.approx(fvu(d, x_a), abs=error)


def test_the_random_stitch_keeps_means_and_power_and_is_random():
    rng = np.random.default_rng(0)
    x_a, x_b = rng.normal(3, 2, (500, 6)), rng.normal(-1, 5, (500, 9))
    train = problem(x_a, x_b, 4, 2).train
    stitch, other = (moving.random_stitch(train, seed) for seed in (1, 2))
    moved = stitch.forth(x_a)
    np.testing.assert_allclose(moved.mean(0), x_b.mean(0), atol=1e-9)
    assert moved.var(0).sum() == pytest.approx(x_b.var(0).sum())
    np.testing.assert_allclose(stitch.back(moved), x_a, atol=1e-6)  # into more dimensions
    assert np.abs(other.forth.W - stitch.forth.W).max() > 0.1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, store, work) of the study in a copy of the run."""
    config, copy = tiny_run.private_run(tmp_path_factory)
    config = changed(config, sae__steps=60, sae__batch_size=64)
    measure.run(config, copy)
    return config, open_store(copy.activations), copy


@pytest.fixture(scope="module")
def rows(run):
    scored = read_jsonl(run[2].result(TABLE.file))
    return {(r["source"], r["target"], r["dictionary"]): r for r in scored}


def test_every_direction_has_its_ways(rows):
    ways = ("own", "transferred", "orthogonal", "rotated", "stitch")
    assert list(rows) == [(s, t, w) for s, t in (("a", "b"), ("b", "a")) for w in ways]
    for row in rows.values():
        assert row["fvu_low"] <= row["fvu"] <= row["fvu_high"]
    for source, target in (("a", "b"), ("b", "a")):
        of = {way: rows[source, target, way] for way in ways}
        clean = [of[way]["ce"] - of[way]["delta_ce"] for way in ways[:-1]]
        np.testing.assert_allclose(clean, clean[0], rtol=1e-6)
        assert of["stitch"]["l0"] is of["stitch"]["ce"] is of["stitch"]["delta_ce"] is None


def test_rows_are_what_the_stitches_make_of_test_rows(run, rows):
    config, store, work = run
    d = {model: dictionaries.load(work.dictionary(model, SITE)) for model in "ab"}
    figures, _ = reconstruction.figures(d["b"], store, "b", SITE, config)
    for key in ("fvu", "fvu_low", "l0", "n_rows", "n_documents"):
        assert rows["a", "b", "own"][key] == pytest.approx(figures[key], rel=1e-4)
    forth, back = (maps.load(work.map(*ends, SITE, SITE, "ridge")) for ends in ("ab", "ba"))
    x = store.read("b", SITE, store.select("test")).astype(np.float32)
    mean = store.read("b", SITE, store.select("train")).astype(np.float32).mean(0)
    for name, between in (("transferred", d["a"]), ("stitch", lambda x: x)):
        x_hat = np.asarray(forth.activation(between(back.activation(x))))
        expected = np.square(x - x_hat).sum() / np.square(x - mean).sum()
        assert rows["a", "b", name]["fvu"] == pytest.approx(expected, rel=1e-3)
    assert rows["a", "b", "stitch"]["fvu"] < rows["a", "b", "transferred"]["fvu"]


@pytest.mark.slow
def test_both_starts_are_trained_on_the_rows_of_the_run(run, tmp_path):
    config, store, work = run
    rows = {row["target"]: row for row in read_jsonl(work.result(TRAINING.file))}
    assert set(rows) == {"a", "b"}
    for row in rows.values():
        assert row["steps"][-1] == 60 and row["error"] == "fvu"
        assert row["random"][-1] < row["random"][0]
        assert 0 < row["fvu_transferred"] < 2 and row["random"] != row["transferred"]
    # What begins at random ends as train_saes would have it.
    training.train_dictionaries(config, store, Workdir(tmp_path))
    d = dictionaries.load(Workdir(tmp_path).dictionary("a", SITE))
    figures, _ = reconstruction.figures(d, store, "a", SITE, config)
    assert rows["a"]["fvu_random"] == pytest.approx(figures["fvu"], rel=1e-3)


@pytest.mark.parametrize("settings", [{"width": F + 1}, {"k": K + 1}, {"architecture": "relu"}])
def test_dictionaries_of_another_kind_or_size_start_no_training(settings, capsys):
    train = SimpleNamespace(source=SimpleNamespace(dictionary=fresh("topk")))
    problems = {maps.Task("a", "b", SITE, SITE, "", "aligned"): SimpleNamespace(train=train)}
    config = Config(sae=SAEConfig(**{"width": F, "k": K} | settings))
    assert measure.compare_starts(problems, config, None, None) == []
    assert "no start of a training" in capsys.readouterr().out


def test_a_goal_is_reached_where_the_curve_first_gets_there():
    steps = [10, 20, 30, 40]
    saved = measure.steps_saved(steps, [0.9, 0.5, 0.4, 0.3], [0.35, 0.3, 0.2, 0.1])
    assert saved == {"steps_to_reach": 20, "saved": 0.5}
    never = measure.steps_saved(steps, [0.9, 0.5, 0.4, 0.3], [0.9, 0.8, 0.7, 0.6])
    assert never == {"steps_to_reach": None, "saved": None}


def test_the_report_shows_every_way_and_what_is_saved(run, rows, capsys):
    config, _, work = run
    measure.run(config, work)  # finished: it only prints
    printed = capsys.readouterr().out
    assert all(way in printed for way in ("orthogonal", "stitch", "Steps until the moved start"))
    html = section([*rows.values(), *read_jsonl(work.result(TRAINING.file))])
    assert html.count("<table>") == 3 and html.count(": the moved start saves") == 2
