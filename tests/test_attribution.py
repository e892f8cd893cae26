"""What drives a feature, planted; and which features transfer, against slow definitions."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx
from map_problems import signed_dictionary

from crossdict_jax import dictionaries, maps
from crossdict_jax.activations.store import open_store
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.evaluation import attribution, evaluate, features, scoring
from crossdict_jax.maps import Map, Pairs, Side
from crossdict_jax.maps.fit import Loader
from crossdict_jax.workdir import read_jsonl

D, N = 5, 700  # activations' dimensions, and rows that fill no whole number of blocks
SCALE = np.ones((3, 2 * D))  # what effects are measured in
signed = functools.partial(signed_dictionary, D)


class Affine(Map):
    """f_B = relu(f_A W - 0.1)."""

    kind, reads = "affine", "features"

    def __init__(self, dictionary, W):
        super().__init__(dictionary)
        self.W = nnx.Param(jnp.asarray(W, jnp.float32))

    def __call__(self, inputs, *, tokens=None):
        return jax.nn.relu(inputs @ self.W[...] - 0.1)


class Squared(Affine):
    """f_B = relu(f_A^2 W - 0.1)."""

    def __call__(self, inputs, *, tokens=None):
        return jax.nn.relu(jnp.square(inputs) @ self.W[...] - 0.1)


class OfActivations(Affine):
    """f_B = relu(x_A W - 0.1)."""

    reads = "activations"


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D)).astype(np.float32)
    tokens = np.zeros(N, np.int32)
    target = rng.normal(size=(N, D)).astype(np.float32)
    return Pairs(Side(x, tokens, signed()), Side(target, tokens, signed()), np.arange(N))


def planted_weights() -> np.ndarray:
    """Every feature of B is driven by two features of A, with weights 1 and -0.5."""
    W = np.zeros((2 * D, 2 * D))
    for j in range(2 * D):
        W[j, j], W[(j + 3) % (2 * D), j] = 1.0, -0.5
    return W


def test_the_drivers_of_a_planted_affine_map_are_found_exactly(pairs):
    W, index = planted_weights(), np.array([7, 0, 4])
    scale = np.random.default_rng(2).random((3, 2 * D))
    drivers = attribution.drivers(Affine(signed(), W), pairs.source, index, scale=scale)
    assert np.allclose(drivers.weight, W.T[index], atol=1e-6)
    assert np.allclose(drivers.effect, scale * W.T[index], atol=1e-6) and drivers.exact.all()
    on = np.asarray(signed().encode(pairs.source.x)) @ W[:, index] > 0.1
    assert drivers.rows.tolist() == on.sum(0).tolist()


def test_the_jacobian_of_a_curved_map_is_averaged_over_rows_where_it_is_on(pairs):
    W, index = np.abs(planted_weights()), np.array([2, 9, 1])
    drivers = attribution.drivers(Squared(signed(), W), pairs.source, index, scale=SCALE)
    f = np.asarray(signed().encode(pairs.source.x), np.float64)
    for i, j in enumerate(index):
        on = np.square(f) @ W[:, j] > 0.1
        assert np.allclose(drivers.weight[i], (2 * f[on] * W[:, j][None, :]).mean(0), atol=1e-5)
    assert not drivers.exact.any()


def test_maps_of_activations_are_seen_through_the_decoder(pairs):
    W = np.random.default_rng(1).normal(size=(D, 2 * D))
    m = OfActivations(signed(), W)
    drivers = attribution.drivers(m, pairs.source, np.arange(3), scale=SCALE)
    assert np.allclose(drivers.weight, np.concatenate([W, -W])[:, :3].T, atol=1e-5)
    assert drivers.exact.all()


def test_rows_say_how_stable_drivers_are(pairs):
    def of(weights):
        m = Affine(signed(), weights)
        return attribution.drivers(m, pairs.source, np.arange(3), scale=SCALE)

    W = planted_weights()
    others = (2 * W, np.roll(W, 1, axis=0))
    same, moved = (attribution.describe(of(W), 0, of(other)) for other in others)
    assert same["stability"] == pytest.approx(1) and abs(moved["stability"]) < 0.5
    assert [d["feature"] for d in same["drivers"]][:2] == [0, 3]
    assert attribution.describe(of(W), 0, None)["stability"] is None
    never = attribution.describe(of(-np.ones((2 * D, 2 * D))), 1, of(W))
    assert never == {"exact": None, "drivers": [], "stability": None}


def test_a_dead_source_feature_drives_nothing(tmp_path_factory):
    """Of 32 features one never fires, and the network reads it ten times as much as others."""
    config, work = tiny_run.private_run(tmp_path_factory)
    config, store = tiny_run.changed(config, map__kinds=("mlp",)), open_store(work.activations)
    source, target = (work.dictionary(model, tiny_run.SITE) for model in "ab")
    d, m = dictionaries.load(source), tiny_run.network(target)
    d.b_enc[...] = d.b_enc[...].at[3].set(-1e3)
    m.network.first.kernel[...] = m.network.first.kernel[...].at[3].multiply(10)
    m.network.last.kernel[...] = jax.random.normal(jax.random.key(0), (8, 32))
    task = next(t for t in maps.tasks(config, store) if t.source == "a")
    for folder in (source, task.path(work)):
        shutil.rmtree(folder)
    dictionaries.save(d, source)
    maps.save(m, task.path(work), dictionary=target)
    loader = Loader(config, store, work)
    rows = features.feature_rows(scoring.score_maps([task], loader)["aligned"], (), loader)
    driven = [row["attributions"][0]["drivers"] for row in rows if row["row"] == "feature"]
    named = [each["feature"] for some in driven for each in some if each["effect"]]
    assert len(named) == sum(map(len, driven)) > 12 and 3 not in named


@pytest.fixture(scope="module")
def run(shared):
    evaluate(*shared)
    return *shared, read_jsonl(shared[1].result("feature_transfer.jsonl"))


@pytest.mark.parametrize(("source", "target"), ["ab", "ba"])
def test_shown_features_are_the_extremes_of_the_best_map(run, source, target):
    config, work, rows = run
    store, rows = open_store(work.activations), [r for r in rows if r["source"] == source]
    (kind,) = {r["map"] for r in rows}
    where = (source, target, tiny_run.SITE, tiny_run.SITE)
    train, validation, test = (maps.load_pairs(store, *where, s, work) for s in SPLITS)
    tasks = [t for t in maps.tasks(config, store) if (t.source, t.pairing) == (source, "aligned")]
    loaded = {t.kind: maps.load(t.path(work)) for t in tasks}

    def error(k):
        return np.square(encoded(validation.target) - maps.predict(loaded[k], validation)).sum()

    assert kind == min(loaded, key=error)
    t, p = encoded(test.target), maps.predict(loaded[kind], test)
    spread = np.square(t - encoded(train.target).mean(0)).sum(0)
    r2 = 1 - np.square(t - p).sum(0) / np.where(spread > 0, spread, np.nan)
    enough = np.flatnonzero((t > 0).sum(0) >= features.MIN_FIRINGS)
    order = enough[np.argsort(-r2[enough])]
    shown, n = [r for r in rows if r["row"] == "feature"], min(features.SHOWN, len(order) // 2)
    assert [r["feature"] for r in shown] == [*order[:n], *order[::-1][:n]]
    assert [r["rank"] for r in shown] == ["most"] * n + ["least"] * n
    both = ((encoded(p.target).T, encoded(p.source).T) for p in (train, test))
    r_train, r_test = (np.corrcoef(*f)[: len(r2), len(r2) :] for f in both)
    for r in shown:
        j = r["feature"]
        assert r["r2"] == pytest.approx(r2[j], abs=1e-3)
        assert r["correlation"] == pytest.approx(np.corrcoef(t[:, j], p[:, j])[0, 1], abs=1e-3)
        assert r["firings"] == (t[:, j] > 0).sum()
        match = r["match"]["feature"]
        assert match == np.nanargmax(r_train[j])
        assert r["match"]["correlation"] == pytest.approx(r_test[j, match], abs=1e-4)
    for name in ("frequency", "token_share"):
        assert sum(r["n_features"] for r in rows if r["row"] == name) == len(enough)


def encoded(side) -> np.ndarray:
    return np.asarray(side.dictionary.encode(side.x.astype(np.float32)))


def test_contexts_are_texts_around_the_strongest_rows(run):
    _, work, rows = run
    texts, store = tiny_run.make_texts(60), open_store(work.activations)
    for row in (r for r in rows if r["row"] == "feature"):
        strengths = [c["activation"] for c in row["contexts"]]
        assert strengths == sorted(strengths, reverse=True) and min(strengths) > 0
        snippets = [c["before"] + c["token"] + c["after"] for c in row["contexts"]]
        assert all(any(snippet in text for text in texts) for snippet in snippets)
        assert "mlp" in [a["map"] for a in row["attributions"]]
        assert len(snippets) == features.CONTEXTS and all(c["token"] for c in row["contexts"])
        d = dictionaries.load(work.dictionary(row["target"], tiny_run.SITE))
        x = store.read(row["target"], tiny_run.SITE, store.select("test")).astype(np.float32)
        strongest = np.asarray(d.encode(x))[:, row["feature"]].max()
        assert strengths[0] == pytest.approx(float(strongest), rel=1e-4)
