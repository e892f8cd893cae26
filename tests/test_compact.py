"""Codes of all rows are the features that encoding gives; maps train on either alike."""

import functools

import jax
import jax.numpy as jnp
import map_problems
import numpy as np
import pytest

from crossdict_jax.config import MapConfig
from crossdict_jax.dictionaries import base as dictionaries
from crossdict_jax.maps import compact, ensemble
from crossdict_jax.maps.base import Side
from crossdict_jax.maps.compact import Compact
from crossdict_jax.maps.kinds import mlp
from crossdict_jax.training.loop import initial


def features(rng, counts, width=11):
    f = np.zeros((len(counts), width), np.float32)
    for row, count in zip(f, counts):
        row[rng.choice(width, count, replace=False)] = rng.uniform(0.1, 2.0, count)
    return f


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0], [11]], ids=["some", "none", "all"])
def test_codes_hold_the_features(counts):
    batches = [features(np.random.default_rng(seed), counts) for seed in range(3)]
    code = compact.compact(batches, limit=11)
    assert code.features.shape == (3 * len(counts), max(1, *counts))
    np.testing.assert_array_equal(jax.tree.map(jnp.asarray, code).dense(), np.concatenate(batches))


def test_a_row_with_too_many_features_has_no_code():
    f = features(np.random.default_rng(0), [2, 4, 1])
    assert compact.compact([f], limit=4) is not None
    assert compact.compact([f, f], limit=3) is None


def test_codes_alike_have_equal_places_and_the_same_features():
    rng = np.random.default_rng(1)
    all_features = [features(rng, counts) for counts in ([2, 1], [0, 4])]
    codes = compact.alike([compact.compact([f], limit=11) for f in all_features])
    assert {code.values.shape for code in codes} == {(2, 4)}
    for code, f in zip(codes, all_features):
        np.testing.assert_array_equal(jax.tree.map(jnp.asarray, code).dense(), f)


def side(*, d_model: int) -> Side:
    rng = np.random.default_rng(2)
    shape = {"d_model": d_model, "width": 40, "k": 5}
    d = dictionaries.build("topk", key=jax.random.key(0), **shape)
    x = rng.standard_normal((30, d_model)).astype(np.float32)
    return Side(x=x, tokens=np.arange(30, dtype=np.int32), dictionary=d)


def test_a_side_has_codes_where_they_take_less_memory_than_rows():
    one = side(d_model=10)
    dense = jax.tree.map(jnp.asarray, one.code).dense()
    np.testing.assert_allclose(dense, one.dictionary.encode(one.x), atol=1e-6)
    assert side(d_model=9).code is None


def test_codes_follow_rows_that_are_reordered_and_taken():
    one = side(d_model=10)
    order = np.random.default_rng(3).permutation(30)
    moved = one.reordered(order)
    np.testing.assert_array_equal(moved.code.features, one.code.features[order])
    taken = moved.take(np.arange(4, 9))
    np.testing.assert_array_equal(taken.code.features, one.code.features[order[4:9]])
    mean, _ = taken.feature_moments
    np.testing.assert_allclose(mean, taken.dictionary.encode(taken.x).mean(axis=0), atol=1e-6)


def problem():
    """Rows of two models with TopK dictionaries, in a batch that eight devices can share."""
    rng = np.random.default_rng(4)
    sizes = {"a": (24, 50), "b": (20, 40)}
    both = [map_problems.random_dictionary("topk", d, width) for d, width in sizes.values()]
    x_a, x_b = (
        rng.standard_normal((sum(map_problems.ROWS.values()), d)) for d, _ in sizes.values()
    )
    return map_problems.make_problem(x_a, x_b, dictionaries_ab=both)[0]


def one_step(given, *, batch: int = 64):
    config = MapConfig(hidden=16, batch_size=batch, steps=10)
    made, _ = ensemble.prepare(mlp.MLP, [given], config, seed=0)
    trainable, feed = made.trainable(10), made.feed
    state = initial(trainable, jax.random.key(0), made.layout)
    chosen = feed.indices(0, 1)[0]
    step = jax.jit(lambda s, r, i: trainable.step(s, feed.select(r, i), 1, jax.random.key(1)))
    return functools.partial(step, state, feed.resident, chosen), feed.resident["data"]["rows"]


def test_a_step_on_codes_is_one_on_rows(monkeypatch):
    given = problem()
    on_codes, held = one_step(given)
    assert isinstance(held["a"], Compact) and isinstance(held["b"], Compact)
    monkeypatch.setattr(Side, "code", None)
    on_rows, held = one_step(problem())
    assert held["a"].shape == given.train.source.x[None].shape
    (state, metrics), (state_of_rows, metrics_of_rows) = on_codes(), on_rows()
    for ours, plain in zip(jax.tree.leaves(metrics), jax.tree.leaves(metrics_of_rows), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-6)
    moments = (s["train"]["optimizer"] for s in (state, state_of_rows))
    for ours, plain in zip(*map(jax.tree.leaves, moments), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4 * max(1e-6, float(np.abs(plain).max())))
