"""Held-out metrics: against slow definitions, on planted answers, and from a finished run."""

import dataclasses
import importlib
import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from planted_store import kill_in_save
from scipy.spatial.distance import jaccard
from test_matching import codes, slow_correlations
from tiny_run import refused

from crossdict_jax import dictionaries, maps, stats
from crossdict_jax.activations.store import open_store
from crossdict_jax.evaluation import evaluate, reconstruction, transfer_metrics
from crossdict_jax.evaluation.transfer import NORMALIZED, TokenMeans, hold_out, measure, verdict
from crossdict_jax.maps.base import slices
from crossdict_jax.maps.codes import Compact
from crossdict_jax.results import BEATS_MEAN, BEATS_TOKEN, NO_BETTER, PAIR, SCORES
from crossdict_jax.workdir import read_jsonl

NORMALIZED_COLUMNS = {
    f"{name}_normalized{end}" for name in NORMALIZED for end in ("", "_low", "_high")
}
COLUMNS = {name for column in SCORES for name in column.names} - NORMALIZED_COLUMNS - {"verdict"}
SPLITS = ("train", "test")


def example(seed, n=60, width=9, share=0.3):
    """(predicted, target, train_mean, documents) with a bit of everything in them."""
    rng = np.random.default_rng(seed)
    target = codes(rng, n, width, share)
    predicted = np.maximum(target + 0.3 * rng.normal(size=target.shape), 0).astype(np.float32)
    predicted[:, 0] = 0.25  # constant
    target[:, -1] = 0  # dead
    predicted[3] = 0
    target[4] = 0
    predicted[5] = target[5] = 0
    target[7] = target[6]
    return predicted, target, codes(rng, 500, width, share).mean(0), rng.integers(0, 7, n)


def slow_cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = math.sqrt(sum(a * a)) * math.sqrt(sum(b * b))
    return float(sum(a * b)) / lengths if lengths else 0.0


def slow_rank(predicted, target, i):
    """Candidates at least as similar as the true one, but for copies of it, plus one."""
    own = slow_cosine(predicted[i], target[i])
    others = [j for j in range(len(target)) if (target[j] != target[i]).any()]
    return 1 + sum(slow_cosine(predicted[i], target[j]) >= own - 1e-7 for j in others)


def slow(predicted, target, mean):
    p, t, m = (np.asarray(x, np.float64) for x in (predicted, target, mean))
    n = range(len(t))
    live = [j for j in range(t.shape[1]) if (t[:, j] > 0).any()]
    ranks = [slow_rank(p, t, i) for i in n]
    feature_r2 = [1 - sum((t - p)[:, j] ** 2) / sum((t - m)[:, j] ** 2) for j in live]
    fvu = sum(sum((t[i] - p[i]) ** 2) for i in n) / sum(sum((t[i] - m) ** 2) for i in n)
    counts = {"n_rows": len(t), "n_live": len(live), "pool": len(t), "fvu": fvu, "r2": 1 - fvu}
    means = {  # over rows
        "cosine": [slow_cosine(p[i], t[i]) for i in n],
        "cosine_mean_predictor": [slow_cosine(m, t[i]) for i in n],
        "cosine_centered": [slow_cosine(p[i] - m, t[i] - m) for i in n],
        "top1": [rank == 1 for rank in ranks],
        "mean_rank": ranks,
        "feature_correlation": np.diag(slow_correlations(p, t))[t.std(0) > 0],
        "l0_target": [(t[i] > 0).sum() for i in n],
        "l0_predicted": [(p[i] > 0).sum() for i in n],
        "sparsity_similarity": [1 - jaccard(p[i] > 0, t[i] > 0) for i in n],
    }
    counts["rate_correlation"] = np.corrcoef((p > 0).mean(0), (t > 0).mean(0))[0, 1]
    counts["r2_per_feature_median"] = np.median(feature_r2)
    return counts | {name: np.mean(values) for name, values in means.items()}


@pytest.mark.parametrize(("seed", "width", "share"), [(0, 9, 0.3), (1, 9, 0.3), (2, 400, 0.04)])
def test_every_metric_is_its_definition(seed, width, share):
    predicted, target, mean, documents = example(seed, width=width, share=share)
    pool = hold_out(target, train_mean=mean, documents=documents, pool=0, bootstrap=0, seed=0).pool
    assert isinstance(pool.units, Compact) == (share < 0.1)  # ranked by slots
    found = transfer_metrics(predicted, target, train_mean=mean, documents=documents, bootstrap=5)
    expected = slow(predicted, target, mean)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert found["n_documents"] == len(set(documents))


def test_intervals_are_percentiles_of_the_metric_on_resampled_documents():
    predicted, target, mean, documents = example(4, n=40)
    how = {"documents": documents, "bootstrap": 30, "seed": 7}
    found = transfer_metrics(predicted, target, train_mean=mean, **how)
    names, samples = np.unique(documents), []
    for counts in stats.draw(documents, count=30, seed=7).weights.astype(int):
        each = [np.tile(np.flatnonzero(documents == d), c) for d, c in zip(names, counts)]
        rows = np.concatenate(each)
        p, t = predicted[rows].astype(np.float64), target[rows].astype(np.float64)
        ranks = np.mean([slow_rank(predicted, target, i) for i in rows])  # of the whole pool
        samples.append(slow(p, t, mean) | {"mean_rank": ranks})
    for name in ("r2", "cosine", "feature_correlation", "mean_rank", "sparsity_similarity"):
        low, high = np.percentile([s[name] for s in samples], (2.5, 97.5))
        assert found[f"{name}_low"] == pytest.approx(low, abs=1e-6)
        assert found[f"{name}_high"] == pytest.approx(high, abs=1e-6)


def test_a_rare_feature_of_the_first_row_has_its_correlation():
    rng = np.random.default_rng(0)
    target = np.zeros((100_000, 1), np.float32)
    target[rng.choice(100_000, 20)] = rng.random((20, 1))
    target[0] = 20
    predicted = target * (1 + 0.3 * rng.normal(size=target.shape)).astype(np.float32)
    predicted[rng.choice(100_000, 20)] = 3
    found = transfer_metrics(predicted, target, train_mean=target.mean(0))["feature_correlation"]
    assert found == pytest.approx(np.corrcoef(predicted[:, 0], target[:, 0])[0, 1], abs=1e-4)


def test_context_gain_is_its_definition():
    rng = np.random.default_rng(0)
    predicted, target, mean, _ = example(2)
    index = rng.integers(-1, 5, len(target))
    T, P = rng.random((5, 9)), rng.random((5, 9))
    means = TokenMeans(index, T, P)
    found = transfer_metrics(predicted, target, train_mean=mean, token_means=means)
    error = variance = 0.0
    for i in np.flatnonzero(index >= 0):
        t, p = target[i] - T[index[i]], predicted[i] - P[index[i]]
        error, variance = error + sum((t - p) ** 2), variance + sum(t**2)
    assert found["context_gain"] == pytest.approx(1 - error / variance, abs=1e-6)
    assert found["n_context_rows"] == (index >= 0).sum()


def test_all_columns_are_plain_numbers_or_none():
    predicted, target, mean, documents = example(0)
    found = transfer_metrics(predicted, target, train_mean=mean, documents=documents)
    assert set(found) == COLUMNS
    assert all(v is None or type(v) in (int, float) for v in found.values())
    json.dumps(found, allow_nan=False)
    none = {name for name, value in found.items() if value is None}
    assert none == {"l0_source", "context_gain", "context_gain_low", "context_gain_high"}


def test_the_mean_predictor_scores_nothing_but_cosine():
    rng = np.random.default_rng(0)
    target = np.maximum(rng.normal(1, 1, (400, 30)), 0).astype(np.float32)
    mean = target.mean(0, dtype=np.float64)
    predicted = np.broadcast_to(mean.astype(np.float32), target.shape)
    found = transfer_metrics(predicted, target, train_mean=mean)
    assert found["r2"] == pytest.approx(0, abs=1e-6)
    assert found["cosine"] == pytest.approx(found["cosine_mean_predictor"])
    assert found["cosine"] > 0.7 and found["cosine_centered"] == 0
    assert found["feature_correlation"] == 0 and found["top1"] <= 2 / 400
    assert found["mean_rank"] == pytest.approx(200.5, abs=1)
    nearly = np.broadcast_to((mean * (1 + 3e-7)).astype(np.float32), target.shape)  # by rounding
    assert transfer_metrics(nearly, target, train_mean=mean)["cosine_centered"] == 0


def test_ties_count_against_but_equal_targets_are_one():
    target = np.array([[1, 0], [1, 0], [2, 0], [0, 1]], np.float32)
    found = transfer_metrics(target, target, train_mean=np.zeros(2))
    # Row 2 points where rows 0 and 1 do; those two are each other's copies, row 2 is not.
    assert found["mean_rank"] == pytest.approx((2 + 2 + 3 + 1) / 4) and found["top1"] == 0.25
    many = codes(np.random.default_rng(0), 50, 9, 0.3)
    assert transfer_metrics(0 * many, many, train_mean=many.mean(0))["top1"] <= 0.02


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_target_that_never_varies_has_a_finite_r2(value):
    target = np.full((6, 3), value, np.float32)
    perfect = transfer_metrics(target, target, train_mean=target[0])
    wrong = transfer_metrics(target + 0.1, target, train_mean=target[0], documents=np.zeros(6))
    assert wrong["n_documents"] == 1 and wrong["r2_low"] is wrong["r2_high"] is None
    assert (perfect["r2"], perfect["fvu"]) == (1, 0) and (wrong["r2"], wrong["fvu"]) == (0, 1)
    assert wrong["feature_correlation"] is None and wrong["n_live"] == 0
    t = np.float32(1000) + np.random.default_rng(0).random((50, 2), np.float32)  # about 0: constant
    assert transfer_metrics(t, t, train_mean=np.zeros(2))["feature_correlation"] is None


def planted(*, token_share, context_share, n=1500, width=12, documents=30):
    """(target, token part, context part, token) of train and test rows together."""
    rng = np.random.default_rng(0)
    token = rng.integers(0, 10, n)
    by_token = rng.random((10, width))[token] * token_share
    context = rng.random((n, width)) * context_share
    return (by_token + context).astype(np.float32), by_token, context, token


def scored(predicted, target, token=None):
    """With the gain of context where tokens are given."""
    means = None
    if token is not None:
        means = TokenMeans(token[1000:], table(target, token), table(predicted, token))
    train_mean = target[:1000].mean(0)
    how = {"documents": np.arange(500) // 20, "pool": 100, "bootstrap": 60, "seed": 0}
    held_out = hold_out(target[1000:], train_mean=train_mean, **how)
    predicted = predicted[1000:].astype(np.float32)
    batches = ((rows, predicted[rows]) for rows in slices(len(predicted), 64))
    return measure(batches, held_out, token_means=means)


def table(values, token):
    return np.stack([values[:1000][token[:1000] == i].mean(0) for i in range(10)])


def test_the_verdict_needs_more_than_the_token():
    target, by_token, context, token = planted(token_share=1.0, context_share=0.5)
    tokens = scored(table(target, token)[token], target)
    better = scored(by_token + 0.15 + 0.5 * context, target)
    worse = scored(context + by_token.mean(0), target)
    mean = scored(np.broadcast_to(target[:1000].mean(0), target.shape), target)
    assert verdict(better, tokens) == BEATS_TOKEN and verdict(tokens, tokens) == BEATS_MEAN
    assert verdict(worse, tokens) == BEATS_MEAN and verdict(mean, tokens) == NO_BETTER
    one = better.estimates | {"r2": stats.Estimate(0.5, np.zeros(0))}  # of one document
    assert verdict(dataclasses.replace(better, estimates=one), tokens) is None


def test_where_the_token_determines_the_target_there_is_no_context_to_gain():
    target, by_token, _, token = planted(token_share=1.0, context_share=0.0)
    for predicted in (by_token, by_token + np.random.default_rng(1).random(target.shape)):
        found = scored(predicted, target, token)
        assert found.estimates["context_gain"] is found.row()["context_gain"] is None


def test_context_gain_sees_what_is_shared_beyond_the_token():
    """A map of the context alone loses to the token table and still gains all of the context."""
    target, by_token, context, token = planted(token_share=1.0, context_share=0.3)
    tokens = scored(table(target, token)[token], target, token)
    context_only = scored(context + by_token.mean(0), target, token)
    assert context_only.estimates["r2"].value < tokens.estimates["r2"].value
    assert context_only.estimates["context_gain"].value > 0.95
    assert tokens.estimates["context_gain"].value == pytest.approx(0, abs=1e-6)
    noise = np.random.default_rng(1).random(target.shape) * 0.3
    noisy = scored(by_token + noise, target, token)
    assert noisy.estimates["context_gain"].value < 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predicted": np.full((60, 9), np.nan)}, "predicted holds NaN"),
        ({"predicted": np.full((60, 9), -2e15)}, "or some above 1e.15, whose squares"),
        ({"train_mean": np.full(9, np.nan)}, "train_mean holds NaN"),
        ({"predicted": np.zeros((60, 8))}, r"predicted has shape \[60, 8\], not \[60, 9\]"),
        ({"target": np.zeros((0, 9))}, "not empty"),
        ({"documents": np.zeros(59)}, r"documents has shape \[59\]"),
        ({"pool": 61}, "pool=61 is not between 1 and the 60 rows"),
        ({"bootstrap": -1}, "bootstrap=-1 must be a whole number, 0 or more"),
        ({"pool": 10.5}, "pool=10.5 must be"),
    ],
)
def test_bad_input_is_refused(change, message):
    predicted, target, mean, _ = example(0)
    given = {"predicted": predicted, "target": target, "train_mean": mean} | change
    refused(message, transfer_metrics, given.pop("predicted"), given.pop("target"), **given)


@pytest.fixture(scope="module")
def finished(shared):
    evaluate(*shared)
    return shared


def test_every_map_has_its_row_in_order(finished):
    config, work = finished
    rows = read_jsonl(work.result("transfer.jsonl"))
    kinds = config.map.kinds
    every = [("aligned", kind) for kind in (*kinds, "token_target")]
    every += [("shuffled", kind) for kind in kinds]
    found = [(r["source"], r["target"], r["pairing"], r["map"]) for r in rows]
    assert found == [(*d, *rest) for d in ("ab", "ba") for rest in every]
    for row in rows:
        placed = NORMALIZED_COLUMNS if row["pairing"] == "aligned" else set()
        assert set(row) - COLUMNS - placed == {*PAIR, "map", "pairing", "verdict"}
        assert all(row[name] is None for name in placed)  # this run has no ceiling
        assert row["site_source"] == row["site_target"] == str(tiny_run.SITE)
        assert row["pool"] == config.evaluation.pool


def test_rows_say_what_the_maps_predict(finished):
    """The row of one map, computed again from its checkpoint by other means."""
    config, work = finished
    store = open_store(work.activations)
    task = next(t for t in maps.tasks(config, store) if (t.kind, t.pairing) == ("ridge", "aligned"))
    where = (task.source, task.target, task.site_source, task.site_target)
    train, test = (maps.load_pairs(store, *where, split, work) for split in ("train", "test"))
    m = maps.load(task.path(work))

    def features(pairs):
        return np.asarray(m.dictionary.encode(pairs.target.x.astype(np.float32)))

    def predictions(pairs):
        return np.asarray(m(jnp.asarray(pairs.source.x, jnp.float32)))

    how = {"pool": config.evaluation.pool, "bootstrap": config.evaluation.bootstrap}
    how |= {"seed": config.seed, "documents": test.documents}
    ids = sorted(set(train.source.tokens) & set(test.source.tokens))
    index = np.array([ids.index(t) if t in ids else -1 for t in test.source.tokens])
    same = [train.source.tokens == i for i in ids]
    both = features(train), predictions(train)
    how["token_means"] = TokenMeans(index, *(np.stack([x[r].mean(0) for r in same]) for x in both))
    train_mean = features(train).mean(0)
    expected = transfer_metrics(predictions(test), features(test), train_mean=train_mean, **how)
    rows = read_jsonl(work.result("transfer.jsonl"))
    wanted = {"source": "a", "map": "ridge", "pairing": "aligned"}
    row = next(r for r in rows if wanted.items() <= r.items())
    del expected["l0_source"]
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert row["l0_source"] == pytest.approx(config.sae.k) and abs(row["context_gain"]) < 1


def test_baselines_and_nulls_of_the_run(finished):
    _, work = finished
    rows = read_jsonl(work.result("transfer.jsonl"))
    rows = {(r["source"], r["pairing"], r["map"]): r for r in rows}
    for source in "ab":
        mean, token = (rows[source, "aligned", kind] for kind in ("mean", "token"))
        assert mean["r2"] == pytest.approx(0, abs=0.02) and mean["cosine_centered"] == 0
        assert mean["context_gain"] == token["context_gain"] == 0
        assert mean["verdict"] == NO_BETTER
        assert token["verdict"] == BEATS_MEAN  # the site is one block after the embedding
        assert rows[source, "aligned", "token_target"]["r2"] > token["r2"] > 0.1
        for kind in ("mean", "token", "ridge", "mlp"):
            assert rows[source, "shuffled", kind]["verdict"] == NO_BETTER
            assert rows[source, "shuffled", kind]["mean_rank"] == pytest.approx(32, abs=8)


def test_reconstruction_rows(finished):
    config, work = finished
    rows = read_jsonl(work.result("reconstruction.jsonl"))
    ends = [("a", str(tiny_run.SITE), 0), ("b", str(tiny_run.SITE), 0)]
    assert [(r["model"], r["site"], r["seed"]) for r in rows] == ends
    store = open_store(work.activations)
    d = dictionaries.load(work.dictionary("a", tiny_run.SITE))
    x = {s: store.read("a", tiny_run.SITE, store.select(s)).astype(np.float32) for s in SPLITS}
    f = {s: np.asarray(d.encode(x[s])) for s in SPLITS}
    error, spread = (x["test"] - a for a in (np.asarray(d.decode(f["test"])), x["train"].mean(0)))
    dead = 1 - ((f["train"] > 0).any(0) | (f["test"] > 0).any(0)).mean()
    assert rows[0]["fvu"] == pytest.approx(np.sum(error**2) / np.sum(spread**2), rel=1e-4)
    assert rows[0]["dead_fraction"] == pytest.approx(dead, rel=1e-4)
    for row in rows:
        assert row["n_rows"] == len(store.select("test"))
        assert row["l0"] == pytest.approx(config.sae.k)
        assert 0 < row["fvu_low"] < row["fvu"] < row["fvu_high"] and row["kl_sae"] > 0
        assert all(row[f"kl_recovered{suffix}"] <= 1 for suffix in ("", "_mean"))
        for name, baseline in (("loss_recovered", "ce_zero"), ("loss_recovered_mean", "ce_mean")):
            gap = row[baseline] - row["ce_clean"]
            assert (row[name] is None) == (gap < 0.05)
            if gap >= 0.05:
                assert row[name] == pytest.approx((row[baseline] - row["ce_sae"]) / gap)


def test_nearest_cosines_are_those_of_the_whole_matrix():
    W = np.random.default_rng(0).normal(size=(70, 9)).astype(np.float32)
    W[3], W[5] = 2 * W[4], 0  # a duplicate, and a row of zeros
    unit = W / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), 1e-9)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    for block in (7, 70, 1024):
        found = reconstruction.nearest_cosines(W, block=block)
        np.testing.assert_allclose(found, cosines.max(1), atol=1e-6)
    assert found[3] == pytest.approx(1) and found[5] == 0
    assert reconstruction.nearest_cosines(W[:1]).shape == (0,)


def test_feature_tables_count_every_live_feature(finished):
    config, work = finished
    aligned = (r for r in read_jsonl(work.result("transfer.jsonl")) if r["pairing"] == "aligned")
    transfer = {(r["source"], r["map"]): r for r in aligned}
    rows = read_jsonl(work.result("features.jsonl"))
    densities = [r for r in rows if "log10_frequency_histogram" in r]
    assert [r["model"] for r in densities] == ["a", "b"]
    for row, dictionary in zip(densities, read_jsonl(work.result("reconstruction.jsonl"))):
        alive = config.sae.width * (1 - dictionary["dead_fraction"])
        assert sum(row["log10_frequency_histogram"]["counts"]) == pytest.approx(alive)
        assert sum(row["decoder_cosine_histogram"]["counts"]) == config.sae.width
    for row in (r for r in rows if "map" in r):
        n_live = transfer.pop((row["source"], row["map"]))["n_live"]
        assert sum(b["n"] for b in row["correlation_by_frequency"]) == n_live
    assert not transfer


def test_killed_it_goes_on_behind_the_last_part(finished, tmp_path, monkeypatch):
    config, work = tiny_run.copied(finished, tmp_path)
    stage = importlib.import_module("crossdict_jax.evaluation.evaluate")
    files = {file.name: file.read_bytes() for file in work.results.glob("*.jsonl")}
    shutil.rmtree(work.results)

    kill_in_save(1, lambda: evaluate(config, work), stage, "shared_features")
    monkeypatch.setattr(stage.scoring, "score_maps", pytest.fail)  # which is not done again
    evaluate(config, work)
    assert {file.name: file.read_bytes() for file in work.results.glob("*.jsonl")} == files
