"""Ridge on codes and reduced-rank regression: planted maps and ranks found, grids as direct."""

import dataclasses

import numpy as np
import pytest
from map_problems import (
    CONFIG,
    ROWS,
    activation_r2,
    feature_r2,
    fit_one,
    identity_dictionary,
    make_problem,
    random_dictionary,
    rows_like_a_stream,
)

from crossdict_jax import maps
from crossdict_jax.errors import UserError
from crossdict_jax.maps import base, moments
from crossdict_jax.maps.kinds import low_rank

N = sum(ROWS.values())


def centred(rng, n=50, d_a=7, d_b=5, rank=None):
    a, b = rng.normal(size=(n, d_a)) * np.arange(1, d_a + 1), rng.normal(size=(n, d_b))
    a, b = a - a.mean(0), b - b.mean(0)
    return a, b, moments.Products(n=n, aa=a.T @ a, ab=a.T @ b, bb=float(np.sum(b**2)))


# ------------------------------------------------------------------------ the ridge path


def test_all_penalties_together_give_each_ones_error():
    rng = np.random.default_rng(0)
    path = moments.RidgePath(centred(rng)[2])
    held_out, penalties = centred(rng, n=30)[2], (1e-3, 0.1, 5.0)
    one_by_one = [held_out.error(path.solution(p)) for p in penalties]
    np.testing.assert_allclose(path.errors(held_out, penalties), one_by_one, rtol=1e-9)


def test_a_constant_source_says_nothing():
    _, _, products = centred(np.random.default_rng(0))
    nothing = dataclasses.replace(products, aa=0 * products.aa, ab=0 * products.ab)
    path = moments.RidgePath(nothing)
    assert not path.solution(0.1).any()
    variance = products.bb / (products.n * 5)
    np.testing.assert_allclose(path.errors(products, [0.1]), [variance])


def test_directions_are_those_of_the_fitted_values_with_the_penalty_as_rows():
    a, b, products = centred(np.random.default_rng(1))
    path, penalty = moments.RidgePath(products), 0.3
    strength = penalty * np.trace(products.aa) / 7
    rows = np.vstack([a, np.sqrt(strength) * np.eye(7)])  # ridge is least squares on these
    fitted = rows @ np.linalg.lstsq(rows, np.vstack([b, np.zeros((7, 5))]), rcond=None)[0]
    expected = np.linalg.svd(fitted)[2].T
    found = path.directions(penalty)
    np.testing.assert_allclose(np.abs(np.sum(found * expected, axis=0)), 1, rtol=1e-6)


def test_errors_of_all_ranks_equal_those_of_the_products():
    rng = np.random.default_rng(2)
    path = moments.RidgePath(centred(rng)[2])
    held_out = centred(rng, n=30)[2]
    W, V = path.solution(0.2), path.directions(0.2)
    direct = [held_out.error(W @ V[:, :r] @ V[:, :r].T) for r in range(6)]
    np.testing.assert_allclose(low_rank._errors(W, V, held_out), direct, rtol=1e-9)


# ------------------------------------------------------------------------------ low_rank


@pytest.fixture(scope="module")
def three_shared_directions():
    """12 dimensions of which 3 carry over to 9, under noise."""
    rng = np.random.default_rng(3)
    x_a = rng.normal(size=(N, 12)) + 5
    planted = rng.normal(size=(12, 3)) @ rng.normal(size=(3, 9))
    return planted, *make_problem(x_a, x_a @ planted + 3 * rng.normal(size=(N, 9)))


def test_low_rank_finds_the_planted_rank_and_map(three_shared_directions, tmp_path):
    planted, problem, _ = three_shared_directions
    config = dataclasses.replace(CONFIG, ranks=tuple(range(1, 10)))
    fitted = fit_one("low_rank", problem, tmp_path, config)
    assert fitted.record["rank"] == 3
    W = np.asarray(fitted.map.W[...])
    assert np.linalg.matrix_rank(W, tol=1e-4) == 3
    full = np.asarray(fit_one("ridge", problem, tmp_path).map.W[...])
    error = np.linalg.norm(W - planted)
    assert error < 0.05 * np.linalg.norm(planted)
    assert error < 0.75 * np.linalg.norm(full - planted)  # the other directions are noise
    scores = {(r["penalty"], r["rank"]): r["mse"] for r in fitted.record["validation_mse"]}
    assert len(scores) == 9 * len(config.ridge_penalties)
    assert scores[fitted.record["penalty"], 3] == min(scores.values())


def test_the_score_of_a_rank_is_the_held_out_error_of_what_it_predicts(
    three_shared_directions, tmp_path
):
    _, problem, _ = three_shared_directions
    fitted = fit_one("low_rank", problem, tmp_path)
    predicted = maps.predict_activations(fitted.map, problem.validation)
    error = np.mean((predicted - problem.validation.target.x.astype(np.float32)) ** 2)
    best = min(row["mse"] for row in fitted.record["validation_mse"])
    assert best == pytest.approx(error, rel=1e-3)


def test_the_whole_rank_is_ridge(three_shared_directions, tmp_path):
    _, problem, _ = three_shared_directions
    config = dataclasses.replace(CONFIG, ranks=(9,), ridge_penalties=(0.1,))
    ours, ridge = (fit_one(kind, problem, tmp_path, config).map for kind in ("low_rank", "ridge"))
    np.testing.assert_allclose(ours.W[...], ridge.W[...], atol=1e-5)


def test_ranks_that_no_map_can_have_are_left_out_or_refused(three_shared_directions, tmp_path):
    _, problem, _ = three_shared_directions
    config = dataclasses.replace(CONFIG, ranks=(2, 64))
    record = fit_one("low_rank", problem, tmp_path, config).record
    assert {row["rank"] for row in record["validation_mse"]} == {2}
    config = dataclasses.replace(CONFIG, ranks=(10, 64))
    with pytest.raises(UserError, match=r"map\.ranks=10,64: every rank is above the 9 dimensions"):
        fit_one("low_rank", problem, tmp_path, config)


# --------------------------------------------------------------------------- ridge_codes


def codes(rng, n, width, rate=0.3):
    return rng.exponential(size=(n, width)) * (rng.random((n, width)) < rate)


def test_ridge_codes_finds_a_planted_map_of_codes(tmp_path):
    """The truth is linear in codes, and not in the activations that they come from."""
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
    scores = {row["penalty"]: row["mse"] for row in fitted.record["validation_mse"]}
    assert set(scores) == set(CONFIG.ridge_penalties)
    assert scores[fitted.record["penalty"]] == min(scores.values())


def test_ridge_codes_is_the_rectified_direct_solution(tmp_path):
    rng = np.random.default_rng(5)
    f_a, f_b = codes(rng, N, 6), codes(rng, N, 4)
    problem, test = make_problem(f_a, f_b)
    config = dataclasses.replace(CONFIG, ridge_penalties=(0.5,))
    m = fit_one("ridge_codes", problem, tmp_path, config).map
    sides = problem.train.source, problem.train.target, test.source
    a, b, held_out = (s.x.astype(np.float64) for s in sides)
    aa = (a - a.mean(0)).T @ (a - a.mean(0))
    W = np.linalg.solve(
        aa + 0.5 * np.trace(aa) / 6 * np.eye(6), (a - a.mean(0)).T @ (b - b.mean(0))
    )
    expected = np.maximum((held_out - a.mean(0)) @ W + b.mean(0), 0)
    np.testing.assert_allclose(maps.predict(m, test), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["ridge", "ridge_codes", "low_rank"])
def test_fewer_rows_than_dimensions_are_what_a_penalty_is_for(kind, tmp_path):
    rng = np.random.default_rng(6)
    x_a = rows_like_a_stream(rng, 40)
    both = random_dictionary("topk", 40, 64), random_dictionary("topk", 30, 48)
    problem, test = make_problem(x_a, x_a[:, :30], dictionaries_ab=both)
    few = dataclasses.replace(problem, train=first(problem.train, 25))
    m = fit_one(kind, few, tmp_path).map
    assert np.isfinite(maps.predict(m, test)).all()
    assert feature_r2(m, few, test) > 0.1
    if m.predicts_activation:
        assert activation_r2(m, few, test) > 0.5


@pytest.mark.parametrize("kind", ["ridge", "ridge_codes", "low_rank", "procrustes"])
def test_constant_features_and_dimensions_do_no_harm(kind, tmp_path):
    rng = np.random.default_rng(7)
    x_a = codes(rng, N, 8)
    x_b = x_a[:, :6] + 1.0
    x_a[:, 7], x_b[:, 5] = 0.0, 2.0
    problem, test = make_problem(x_a, x_b)
    config = dataclasses.replace(CONFIG, ranks=(1, 5))  # five vary
    m = fit_one(kind, problem, tmp_path, config).map
    predicted = maps.predict(m, test)
    np.testing.assert_allclose(predicted[:, 5], 2.0, atol=0.02)
    assert feature_r2(m, problem, test) > 0.9


def first(pairs, n):
    sides = (
        dataclasses.replace(side, x=side.x[:n], tokens=side.tokens[:n])
        for side in (pairs.source, pairs.target)
    )
    return base.Pairs(*sides, pairs.documents[:n])


def test_a_rotation_needs_more_rows_than_dimensions(tmp_path):
    problem, _ = make_problem(*(rows_like_a_stream(np.random.default_rng(8), d) for d in (9, 30)))
    fit_one("procrustes", dataclasses.replace(problem, train=first(problem.train, 10)), tmp_path)
    few = dataclasses.replace(problem, train=first(problem.train, 9))
    with pytest.raises(UserError, match="has 9 paired train rows and procrustes needs 10 or more"):
        fit_one("procrustes", few, tmp_path)
