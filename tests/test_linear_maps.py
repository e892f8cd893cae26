"""Closed forms: moments as of whole arrays, planted truths found, grids as computed directly."""

import dataclasses
import itertools

import map_problems
import numpy as np
import pytest
from map_problems import CONFIG, ROWS, feature_r2, fit_one, identity_dictionary, make_problem
from tiny_run import refused

from crossdict_jax import maps
from crossdict_jax.maps import base, moments
from crossdict_jax.maps.kinds import low_rank

N = sum(ROWS.values())


def test_streamed_products_equal_those_of_the_whole_array():
    rng = np.random.default_rng(0)
    a = (rng.normal(size=(9000, 5)) + 300).astype(np.float32)
    b = (a[:, :3] + rng.normal(size=(9000, 3))).astype(np.float32)
    other = rng.normal(size=5) + 300, rng.normal(size=3) + 300
    for means, coded in itertools.product((None, other), (False, True)):
        batches = ((a[rows], b[rows]) for rows in moments.slices(9000))
        codes = moments.Codes(a), moments.Codes(b)
        products, used = moments.moments(codes if coded else batches, means)
        expected = means or (a.mean(0, np.float64), b.mean(0, np.float64))
        ca, cb = a - expected[0][None, :], b - expected[1][None, :]
        assert products.n == 9000
        for ours, theirs in zip(used, expected):
            np.testing.assert_allclose(ours, theirs, rtol=1e-7)
        np.testing.assert_allclose(products.aa, ca.T @ ca, rtol=1e-5, atol=0.05)
        np.testing.assert_allclose(products.ab, ca.T @ cb, rtol=1e-5, atol=0.05)
        np.testing.assert_allclose(products.bb, np.sum(cb**2), rtol=1e-5)
        W = rng.normal(size=(5, 3))
        np.testing.assert_allclose(products.error(W), np.mean((cb - ca @ W) ** 2), rtol=1e-5)


@pytest.mark.parametrize("d_a, d_b", [(12, 12), (10, 14)])
def test_procrustes_finds_a_planted_rotation(tmp_path, d_a, d_b):
    rng = np.random.default_rng(1)
    Q = np.linalg.qr(rng.normal(size=(d_b, d_b)))[0][:d_a]
    x_a = map_problems.rows_like_a_stream(rng, d_a)
    x_b = 2.5 * (x_a - x_a.mean(0)) @ Q + rng.normal(size=d_b)
    both = identity_dictionary(d_a), map_problems.random_dictionary("topk", d_b, 30)
    problem, test = make_problem(x_a, x_b, dictionaries_ab=both)
    fitted = fit_one("procrustes", problem, tmp_path)
    assert fitted.record["scale"] == pytest.approx(2.5, rel=0.02)
    np.testing.assert_allclose(fitted.map.W[...], 2.5 * Q, atol=0.05)
    assert map_problems.activation_r2(fitted.map, problem, test) > 0.99
    assert feature_r2(fitted.map, problem, test) > 0.9  # TopK may pick another feature at a tie


def test_procrustes_to_a_narrower_model_is_semi_orthogonal(tmp_path):
    rng = np.random.default_rng(1)
    x_a = map_problems.rows_like_a_stream(rng, 14)
    problem, _ = make_problem(x_a, x_a[:, :9])
    fitted = fit_one("procrustes", problem, tmp_path)
    Q = np.asarray(fitted.map.W[...]) / fitted.record["scale"]
    np.testing.assert_allclose(Q.T @ Q, np.eye(9), atol=1e-5)


def assert_chosen_on_validation(record):
    scores = {row["penalty"]: row["mse"] for row in record["validation_mse"]}
    assert set(scores) == set(CONFIG.ridge_penalties)
    assert scores[record["penalty"]] == min(scores.values())


def test_ridge_finds_a_planted_affine_map(tmp_path):
    rng = np.random.default_rng(2)
    x_a, W = map_problems.rows_like_a_stream(rng, 12), rng.normal(size=(12, 7))
    x_b = x_a @ W + 5 + 0.1 * rng.normal(size=(len(x_a), 7))
    problem, test = make_problem(x_a, x_b)
    ridge, rotation = (fit_one(kind, problem, tmp_path) for kind in ("ridge", "procrustes"))
    assert map_problems.activation_r2(ridge.map, problem, test) > 0.99
    assert map_problems.activation_r2(rotation.map, problem, test) < 0.9
    assert_chosen_on_validation(ridge.record)


def test_token_finds_a_target_that_the_token_determines(tmp_path):
    rng = np.random.default_rng(3)
    tokens = 40_000 + rng.integers(0, 30, sum(ROWS.values()))
    table = rng.exponential(size=(30, 8))
    x_b = table[tokens - 40_000] + 0.05 * rng.normal(size=(len(tokens), 8))
    problem, test = make_problem(rng.normal(size=(len(tokens), 5)), x_b, tokens=tokens)
    fitted = fit_one("token", problem, tmp_path)
    assert feature_r2(fitted.map, problem, test) > 0.99
    assert feature_r2(fit_one("mean", problem, tmp_path).map, problem, test) <= 0
    assert fitted.record["pseudocount"] == 0  # 50 clean rows a token want no shrinking
    unseen = fitted.map(np.array([7, 40_000], np.int32))
    np.testing.assert_allclose(unseen[0], problem.train.target.x.astype(np.float32).mean(0), 0.02)
    np.testing.assert_allclose(unseen[1], table[0], atol=0.1)


def test_token_tables_shrink_where_rows_are_few_and_noisy(tmp_path):
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 800, sum(ROWS.values()))  # two rows a token
    x_a, x_b = rng.normal(size=(len(tokens), 5)), 3 + rng.normal(size=(len(tokens), 8))
    problem, _ = make_problem(x_a, x_b, tokens=tokens)
    record = fit_one("token", problem, tmp_path).record
    assert record["pseudocount"] == max(moments.PSEUDOCOUNTS)
    scores = {row["pseudocount"]: row["mse"] for row in record["validation_mse"]}
    assert list(scores) == list(moments.PSEUDOCOUNTS) and scores[0.0] > 1.2 * scores[16.0]


def test_token_ridge_beats_token_and_ridge_where_both_matter(tmp_path):
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, 40, sum(ROWS.values()))
    x_a = rng.normal(size=(len(tokens), 8)) + rng.normal(size=(40, 8))[tokens]
    left = x_a - np.array([x_a[tokens == t].mean(0) for t in range(40)])[tokens]
    x_b = 2 * rng.normal(size=(40, 6))[tokens] + left @ rng.normal(size=(8, 6))
    problem, test = make_problem(x_a, x_b, tokens=tokens)
    fitted = (fit_one(kind, problem, tmp_path) for kind in ("token", "ridge", "token_ridge"))
    token, ridge, both = (feature_r2(one.map, problem, test) for one in fitted)
    assert both > 0.98 and max(token, ridge) < 0.8


def test_token_ridge_fits_no_rounding_where_the_token_determines_the_source(tmp_path):
    rng = np.random.default_rng(4)
    tokens = np.append(rng.integers(0, 40, sum(ROWS.values()) - 1), 40)  # the last unseen before
    x_b = 2 * rng.normal(size=(41, 6))[tokens] + rng.normal(size=(len(tokens), 6))
    problem, test = make_problem(rng.normal(size=(41, 8))[tokens], x_b, tokens=tokens)
    fitted = fit_one("token_ridge", problem, tmp_path)
    assert not np.asarray(fitted.map.W[...]).any() and feature_r2(fitted.map, problem, test) > 0.5
    assert min(row["mse"] for row in fitted.record["validation_mse"]) > 0.5


def test_low_rank_finds_the_planted_rank_and_map(tmp_path, monkeypatch):
    """12 dimensions of which 3 carry over to 9, under noise."""
    rng = np.random.default_rng(3)
    x_a = rng.normal(size=(N, 12)) + 5
    planted = rng.normal(size=(12, 3)) @ rng.normal(size=(3, 9))
    problem, _ = make_problem(x_a, x_a @ planted + 3 * rng.normal(size=(N, 9)))
    monkeypatch.setattr(low_rank, "RANKS", (*range(1, 10), 64))  # of which 64 cannot be
    fitted = fit_one("low_rank", problem, tmp_path)
    assert fitted.record["rank"] == 3
    W = np.asarray(fitted.map.W[...])
    assert np.linalg.matrix_rank(W, tol=1e-4) == 3
    full = np.asarray(fit_one("ridge", problem, tmp_path).map.W[...])
    error = np.linalg.norm(W - planted)
    assert error < 0.05 * np.linalg.norm(planted)
    assert error < 0.75 * np.linalg.norm(full - planted)  # the other directions are noise
    scores = {(r["penalty"], r["rank"]): r["mse"] for r in fitted.record["validation_mse"]}
    assert len(scores) == 9 * len(CONFIG.ridge_penalties)
    assert scores[fitted.record["penalty"], 3] == min(scores.values())


@pytest.mark.parametrize("cost", [0, 10**9])  # sparse, dense
def test_ridge_codes_finds_a_planted_map_of_codes(cost, tmp_path, monkeypatch):
    """The truth is linear in codes, and not in the activations that they come from."""
    monkeypatch.setattr(base, "SPARSE_COST", cost)
    rng = np.random.default_rng(4)
    z = rng.normal(size=(N, 16)) - 0.3  # f_A = relu(z)
    W = np.maximum(rng.normal(size=(16, 10)), 0)
    f_b = np.maximum(z, 0) @ W
    both = identity_dictionary(16), identity_dictionary(10)
    problem, test = make_problem(z, f_b + 0.05 * rng.normal(size=f_b.shape), dictionaries_ab=both)
    fitted = fit_one("ridge_codes", problem, tmp_path)
    np.testing.assert_allclose(fitted.map.W[...], W, atol=0.05)
    assert feature_r2(fitted.map, problem, test) > 0.98
    assert feature_r2(fit_one("ridge", problem, tmp_path).map, problem, test) < 0.9
    assert_chosen_on_validation(fitted.record)


def test_ridge_scores_are_held_out_errors_of_what_it_predicts(tmp_path):
    rng = np.random.default_rng(2)
    x_a = map_problems.rows_like_a_stream(rng, 6)
    problem, _ = make_problem(x_a, x_a @ rng.normal(size=(6, 5)) + rng.normal(size=(len(x_a), 5)))
    for kind in ("ridge", "procrustes", "low_rank", "token_ridge"):
        fitted = fit_one(kind, problem, tmp_path)
        predicted = maps.predict_activations(fitted.map, problem.validation)
        error = np.mean((predicted - problem.validation.target.x.astype(np.float32)) ** 2)
        best = min(row["mse"] for row in fitted.record["validation_mse"])
        assert best == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("kind", ["ridge", "ridge_codes", "low_rank"])
def test_fewer_rows_than_dimensions_are_what_a_penalty_is_for(kind, tmp_path):
    rng = np.random.default_rng(6)
    x_a = map_problems.rows_like_a_stream(rng, 40)
    both = [map_problems.random_dictionary("topk", *sizes) for sizes in ((40, 64), (30, 48))]
    problem, test = make_problem(x_a, x_a[:, :30], dictionaries_ab=both)
    few = dataclasses.replace(problem, train=problem.train.take(slice(25)))
    m = fit_one(kind, few, tmp_path).map
    assert np.isfinite(maps.predict(m, test)).all() and feature_r2(m, few, test) > 0.1
    if m.predicts_activation:
        assert map_problems.activation_r2(m, few, test) > 0.5


@pytest.mark.parametrize("kind", ["ridge", "ridge_codes", "low_rank", "procrustes"])
def test_constant_features_and_dimensions_do_no_harm(kind, tmp_path, monkeypatch):
    rng = np.random.default_rng(7)
    x_a = rng.exponential(size=(N, 8)) * (rng.random((N, 8)) < 0.3)
    x_b = x_a[:, :6] + 1.0
    x_a[:, 7], x_b[:, 5] = 0.0, 2.0
    problem, test = make_problem(x_a, x_b)
    monkeypatch.setattr(low_rank, "RANKS", (1, 5))  # five vary
    m = fit_one(kind, problem, tmp_path).map
    predicted = maps.predict(m, test)
    np.testing.assert_allclose(predicted[:, 5], 2.0, atol=0.02)
    assert feature_r2(m, problem, test) > 0.9


def test_a_rotation_needs_more_rows_than_dimensions(tmp_path):
    rng = np.random.default_rng(8)
    problem, _ = make_problem(*(map_problems.rows_like_a_stream(rng, d) for d in (9, 30)))
    train = problem.train
    fit_one("procrustes", dataclasses.replace(problem, train=train.take(slice(10))), tmp_path)
    few = dataclasses.replace(problem, train=train.take(slice(9)))
    words = "has 9 paired train rows and procrustes needs 10 or more"
    refused(words, fit_one, "procrustes", few, tmp_path)
