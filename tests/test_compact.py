"""Codes of all rows are the features that encoding gives; maps train on either alike."""

import functools

import jax
import jax.numpy as jnp
import map_problems
import numpy as np
import pytest

from crossdict_jax.config import MapConfig
from crossdict_jax.maps import Pairs, Problem, network
from crossdict_jax.maps.base import Side
from crossdict_jax.maps.codes import Compact, compact, compress
from crossdict_jax.maps.kinds import mlp
from crossdict_jax.training.loop import initial


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0], [11]], ids=["some", "none", "all"])
def test_codes_hold_the_features(counts):
    rng, f = np.random.default_rng(0), np.zeros((len(counts), 11), np.float32)
    for row, count in zip(f, counts):
        row[rng.choice(11, count, replace=False)] = rng.uniform(0.1, 2.0, count)
    for slots in (max(counts), 11):
        code = compact(compress(f), slots)
        assert code.features.shape == (len(counts), max(1, slots))
        np.testing.assert_array_equal(jax.tree.map(jnp.asarray, code).dense(), f)


def test_codes_follow_rows_that_are_reordered_and_taken():
    rng = np.random.default_rng(2)
    d, x = map_problems.random_dictionary("topk", 10, 40), rng.standard_normal((30, 10))
    one = Side(x=x.astype(np.float32), tokens=np.arange(30, dtype=np.int32), dictionary=d)
    np.testing.assert_allclose(one.codes.toarray(), d.encode(one.x), atol=1e-6)
    order = rng.permutation(30)
    moved = one.reordered(order)
    np.testing.assert_array_equal(moved.codes.toarray(), one.codes.toarray()[order])
    taken = moved.take(np.arange(4, 9))
    np.testing.assert_allclose(taken.codes.toarray(), one.codes.toarray()[order[4:9]], atol=1e-6)


def one_step(given):
    config = MapConfig(hidden=16, batch_size=64, steps=10)
    made, _ = network.prepare(mlp.MLP, [given], config, seed=0)
    feed, state = made.feed, initial(made, jax.random.key(0))
    chosen, one = feed.indices(0, 1)[0], functools.partial(made.step, steps=10)
    step = jax.jit(lambda s, r, i: one(s, feed.select(r, i), 1, jax.random.key(1)))
    return functools.partial(step, state, feed.resident, chosen), feed.resident["data"]["rows"]


def test_a_step_on_codes_is_one_on_rows(monkeypatch):
    rng, n = np.random.default_rng(4), sum(map_problems.ROWS.values())
    both = [map_problems.random_dictionary("topk", *sizes) for sizes in ((24, 50), (20, 40))]
    x_a, x_b = (rng.standard_normal((n, d)) for d in (24, 20))
    given = map_problems.make_problem(x_a, x_b, dictionaries_ab=both)[0]
    on_codes, held = one_step(given)
    assert isinstance(held["a"], Compact) and isinstance(held["b"], Compact)
    monkeypatch.setattr(network, "SLOTS", 0)  # as where rows have too many active features
    on_rows, held = one_step(given)
    assert held["a"].shape == given.train.source.x[None].shape
    (state, metrics), (state_of_rows, metrics_of_rows) = on_codes(), on_rows()
    for ours, plain in zip(jax.tree.leaves(metrics), jax.tree.leaves(metrics_of_rows), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-6)
    moments = (s["train"]["optimizer"] for s in (state, state_of_rows))
    for ours, plain in zip(*map(jax.tree.leaves, moments), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4 * max(1e-6, float(np.abs(plain).max())))


def test_a_side_that_is_source_and_target_is_held_once():
    rng, n = np.random.default_rng(5), sum(map_problems.ROWS.values())
    both = [map_problems.random_dictionary("topk", d, 40) for d in (24, 20)]
    x = [rng.standard_normal((n, d)) for d in (24, 20)]
    ab = map_problems.make_problem(*x, dictionaries_ab=both)[0]
    turned = [Pairs(p.target, p.source, p.documents) for p in (ab.train, ab.validation)]
    given = ab, map_problems.shuffled_problem(Problem("B to A", *turned))
    made, _ = network.prepare(mlp.MLP, given, MapConfig(hidden=16, batch_size=64), seed=0)
    feed, index = made.feed, made.feed.indices(0, 1)[0]
    held = feed.resident["data"]["rows"].values()
    assert [len(rows.values) for rows in held if isinstance(rows, Compact)] == [2]
    batch = feed.select(feed.resident, index)["rows"]
    for i, problem in enumerate(given):
        for name, side in (("a", problem.train.source), ("b", problem.train.target)):
            rows = jax.tree.map(lambda array, i=i: array[i], batch[name])
            np.testing.assert_array_equal(rows.dense(), side.features(index[0]))
