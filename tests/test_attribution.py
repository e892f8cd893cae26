"""What drives a feature, planted; and which features transfer, against slow definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx

from crossdict_jax import dictionaries, maps
from crossdict_jax.activations.store import open_store
from crossdict_jax.dictionaries.architectures.relu import ReLU
from crossdict_jax.dictionaries.base import from_arrays
from crossdict_jax.evaluation import attribution, evaluate, features
from crossdict_jax.maps import Map, Pairs, Side
from crossdict_jax.workdir import read_jsonl

D, N = 5, 700  # activations' dimensions, and rows that fill no whole number of blocks


def signed(d_model: int = D):
    """The dictionary f = relu([x, -x]): its features are the signed coordinates."""
    W_enc = np.concatenate([np.eye(d_model), -np.eye(d_model)], axis=1)
    zeros = {"b_enc": np.zeros(2 * d_model), "b_dec": np.zeros(d_model)}
    return from_arrays(ReLU, {"W_enc": W_enc, "W_dec": W_enc.T} | zeros)


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
    W, which = planted_weights(), np.array([7, 0, 4])
    m = Affine(signed(), W)
    found = attribution.drivers(m, pairs, which, scales=attribution.scales(pairs))
    assert np.allclose(found.weight, W.T[which], atol=1e-6)
    assert found.exact.all() and found.through == "features"
    for i, j in enumerate(which):
        assert found.order(i)[:2].tolist() == [j, (j + 3) % (2 * D)]
    f = np.asarray(signed().encode(pairs.source.x))
    on = f @ W[:, which] > 0.1
    assert found.rows.tolist() == on.sum(0).tolist()
    std_b = np.asarray(signed().encode(pairs.target.x)).std(0)
    expected = W[:, which] * f.std(0)[:, None] / std_b[which][None, :]
    assert np.allclose(found.effect, expected.T, rtol=1e-4, atol=1e-6)


def test_the_jacobian_of_a_curved_map_is_averaged_over_rows_where_it_is_on(pairs):
    W, which = np.abs(planted_weights()), np.array([2, 9])
    m = Squared(signed(), W)
    found = attribution.drivers(m, pairs, which, scales=attribution.scales(pairs))
    f = np.asarray(signed().encode(pairs.source.x), np.float64)
    for i, j in enumerate(which):
        on = np.square(f) @ W[:, j] > 0.1
        slow = (2 * f[on] * W[:, j][None, :]).mean(0)
        assert np.allclose(found.weight[i], slow, atol=1e-5)
    assert not found.exact.any()


def test_maps_of_activations_are_seen_through_the_decoder(pairs):
    W = np.random.default_rng(1).normal(size=(D, 2 * D))
    m = OfActivations(signed(), W)
    found = attribution.drivers(m, pairs, np.arange(3), scales=attribution.scales(pairs))
    expected = np.concatenate([W, -W])[:, :3].T
    assert np.allclose(found.weight, expected, atol=1e-5)
    assert found.exact.all() and found.through == "decoder"


def test_a_feature_that_is_never_predicted_has_no_drivers(pairs):
    m = Affine(signed(), -np.ones((2 * D, 2 * D)))
    found = attribution.drivers(m, pairs, np.arange(2), scales=attribution.scales(pairs))
    said = attribution.describe("affine", found, 1, 0, found)
    assert said["n_rows"] == 0 and said["drivers"] == []
    assert said["exact"] is said["place_of_match"] is said["stability"] is None


def test_stability_compares_two_maps(pairs):
    scales, which = attribution.scales(pairs), np.arange(2)
    W = planted_weights()
    other = np.roll(W, 1, axis=0)

    def of(weights):
        return attribution.drivers(Affine(signed(), weights), pairs, which, scales=scales)

    first = of(W)
    same = attribution.describe("affine", first, 0, 0, of(2 * W))
    moved = attribution.describe("affine", first, 0, 0, of(other))
    assert same["stability"] == pytest.approx(1)
    assert abs(moved["stability"]) < 0.5
    assert same["place_of_match"] == 1
    assert attribution.describe("affine", first, 0, 0, None)["stability"] is None


def test_correlations_are_their_definition(pairs):
    found = attribution.correlations(pairs, np.array([3, 1]))
    a, b = (np.asarray(signed().encode(s.x)) for s in (pairs.source, pairs.target))
    slow = [[np.corrcoef(b[:, j], a[:, i])[0, 1] for i in range(2 * D)] for j in (3, 1)]
    assert np.allclose(found, slow, atol=1e-5)


# ---------------------------------------------------------------- the file of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config, work = tiny_run.shared_run(tmp_path_factory.getbasetemp())
    evaluate(config, work)
    return config, work, read_jsonl(work.result("feature_transfer.jsonl"))


def test_shown_features_are_the_extremes_of_the_best_map(run):
    config, work, rows = run
    store = open_store(work.activations)
    for source, target in ("ab", "ba"):
        here = [r for r in rows if r["source"] == source]
        (kind,) = {r["map"] for r in here}
        pairs, validation = (
            maps.load_pairs(store, source, target, *2 * (tiny_run.SITE,), split, work)
            for split in ("test", "validation")
        )
        loaded = {
            t.kind: maps.load(t.path(work))
            for t in maps.tasks(config, store)
            if (t.source, t.pairing) == (source, "aligned")
        }
        assert kind == max(loaded, key=lambda k: -squared_error(loaded[k], validation))
        t, p = features_of(pairs), maps.predict(loaded[kind], pairs)
        train = maps.load_pairs(store, source, target, *2 * (tiny_run.SITE,), "train", work)
        spread = np.square(t - features_of(train).mean(0)).sum(0)
        r2 = 1 - np.square(t - p).sum(0) / np.where(spread > 0, spread, np.nan)
        enough = np.flatnonzero((t > 0).sum(0) >= features.MIN_FIRINGS)
        order = enough[np.argsort(-r2[enough])]
        shown = [r for r in here if r["row"] == "feature"]
        n = min(config.evaluation.features_shown, len(order) // 2)
        assert [r["feature"] for r in shown] == [*order[:n], *order[::-1][:n]]
        assert [r["rank"] for r in shown] == ["most"] * n + ["least"] * n
        for r in shown:
            j = r["feature"]
            assert r["r2"] == pytest.approx(r2[j], abs=1e-3)
            assert r["correlation"] == pytest.approx(np.corrcoef(t[:, j], p[:, j])[0, 1], abs=1e-3)
            assert r["firings"] == (t[:, j] > 0).sum()
        for name in ("frequency", "token_share"):
            binned = [r for r in here if r["row"] == name]
            assert sum(r["n_features"] for r in binned) == len(enough)


def features_of(pairs) -> np.ndarray:
    return np.asarray(pairs.target.dictionary.encode(pairs.target.x.astype(np.float32)))


def squared_error(m, pairs) -> float:
    return float(np.square(features_of(pairs) - maps.predict(m, pairs)).sum())


def test_contexts_are_text_of_the_run_with_the_token_that_fires(run):
    _, _, rows = run
    texts = tiny_run.make_texts(60)
    for row in (r for r in rows if r["row"] == "feature"):
        strengths = [c["activation"] for c in row["contexts"]]
        assert strengths == sorted(strengths, reverse=True) and min(strengths) > 0
        found = [c["before"] + c["token"] + c["after"] for c in row["contexts"]]
        homes = [{i for i, text in enumerate(texts) if snippet in text} for snippet in found]
        assert all(homes) and len(found) == features.CONTEXTS
        assert all(c["token"] for c in row["contexts"])


def test_the_strongest_context_is_the_strongest_row(run):
    _, work, rows = run
    store = open_store(work.activations)
    row = next(r for r in rows if r["row"] == "feature")
    d = dictionaries.load(work.dictionary(row["target"], tiny_run.SITE))
    x = store.read(row["target"], tiny_run.SITE, store.select("test")).astype(np.float32)
    strongest = np.asarray(d.encode(x))[:, row["feature"]].max()
    assert row["contexts"][0]["activation"] == pytest.approx(float(strongest), rel=1e-4)


def test_every_shown_feature_has_its_drivers(run):
    config, _, rows = run
    for row in (r for r in rows if r["row"] == "feature"):
        kinds = [a["map"] for a in row["attributions"]]
        assert "mlp" in kinds
        assert -1 <= row["match"]["correlation"] <= 1
        for said in row["attributions"]:
            effects = [abs(d["effect"]) for d in said["drivers"]]
            assert effects == sorted(effects, reverse=True)
            assert all(0 <= d["feature"] < config.sae.width for d in said["drivers"])


@pytest.mark.parametrize("count", [0, 2, 1000])
def test_as_many_features_are_shown_as_asked(count):
    table = features._Table(
        r2=np.array([0.1, np.nan, 0.9, 0.5, 0.3, 0.7]),
        r2_validation=np.zeros(6),
        correlation=np.zeros(6),
        token_share=np.zeros(6),
        firings=np.array([30, 30, 30, 30, 30, 3]),
        rows=100,
    )
    shown = table.extremes(count)
    expected = [(2, "most"), (3, "most"), (0, "least"), (4, "least")]
    assert shown == (expected if count else [])
