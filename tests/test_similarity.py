"""Similarity of representations: against slow formulas, known answers, and a planted alignment."""

import itertools

import numpy as np
import pytest
from scipy.stats import spearmanr
from tiny_run import refused

from crossdict_jax.evaluation.representations import monotone_assignment
from crossdict_jax.evaluation.similarity import MEASURES, Geometry


def rotation(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def compared(x, y):
    return Geometry.of(x).compared(Geometry.of(y))


def related(seed, n=80, d_x=12, d_y=9):
    """Two representations that share half of their variance or so."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 5))
    x, y = (z @ rng.normal(size=(5, d)) + rng.normal(size=(n, d)) for d in (d_x, d_y))
    return x + 3, y - 1  # means must not matter to CKA and SVCCA


def slow_hsic(K, L):
    """Song et al. 2012, equation 5, with the diagonals taken out."""
    n = len(K)
    K, L, one = K - np.diag(np.diag(K)), L - np.diag(np.diag(L)), np.ones(len(K))
    return (
        np.trace(K @ L)
        + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ K @ L @ one)
    ) / (n * (n - 3))


def slow_cka(x, y):
    K, L = x @ x.T, y @ y.T
    return slow_hsic(K, L) / np.sqrt(slow_hsic(K, K) * slow_hsic(L, L))


def slow_svcca(x, y):
    def leading(z):
        u, s, _ = np.linalg.svd(z - z.mean(0), full_matrices=False)
        r = next(r for r in range(1, len(s) + 1) if (s[:r] ** 2).sum() >= 0.99 * (s**2).sum())
        return u[:, :r]

    return np.linalg.svd(leading(x).T @ leading(y), compute_uv=False).mean()


def slow_rsa(x, y):
    pairs = list(itertools.combinations(range(len(x)), 2))
    dissimilarity = [[1 - np.corrcoef(z[i], z[j])[0, 1] for i, j in pairs] for z in (x, y)]
    return spearmanr(*np.round(dissimilarity, 6)).statistic


def slow_mutual_knn(x, y, k=10):
    def near(z, i):
        cosine = [z[i] @ z[j] / np.linalg.norm(z[i]) / np.linalg.norm(z[j]) for j in range(len(z))]
        return set(sorted(set(range(len(z))) - {i}, key=lambda j: -cosine[j])[:k])

    return np.mean([len(near(x, i) & near(y, i)) / k for i in range(len(x))])


def slow(x, y):
    formulas = (slow_cka, slow_svcca, slow_rsa, slow_mutual_knn)
    return dict(zip(MEASURES, (formula(x, y) for formula in formulas)))


@pytest.mark.parametrize("shape", [(80, 12, 9), (30, 40, 35)])  # more rows than columns, or fewer
def test_measures_are_their_formulas_in_any_order_of_rows(shape):
    x, y = related(0, *shape)
    assert compared(x, y) == pytest.approx(slow(x, y), abs=2e-5)
    order = np.random.default_rng(0).permutation(len(x))
    reordered = Geometry.of(x).compared(Geometry.of(y).reordered(order))
    assert reordered == pytest.approx(slow(x, y[order]), abs=2e-5)


def test_a_rotated_and_scaled_copy_is_the_same_to_them():
    rng, ones = np.random.default_rng(4), dict.fromkeys(MEASURES, 1)
    x, _ = related(4)
    x = x - x.mean(0)
    assert compared(x, x) == pytest.approx(ones, abs=1e-5)
    turned = compared(x, 5 * x @ rotation(rng, x.shape[1]))
    turned.pop("rsa")  # correlation over columns is no rotation invariant
    assert turned == pytest.approx({m: 1 for m in turned}, abs=1e-4)
    scores = compared(related(7)[0], np.ones((80, 3)))  # what never varies is like nothing
    assert [scores[m] for m in ("cka", "svcca", "rsa")] == [0, 0, 0]
    x = rng.normal(size=(60, 400))
    assert compared(x, -3 * x)["rsa"] == pytest.approx(1, abs=1e-6)
    assert compared(x, x @ rotation(rng, 400))["rsa"] > 0.95  # nearly, with many columns


def test_independent_representations_score_their_chance():
    """The unbiased CKA is 0 on average, where the usual one of as many columns as rows is 0.5."""
    draws = (np.random.default_rng(seed).normal(size=(2, 60, 60)) for seed in range(30))
    rows = [compared(*both) for both in draws]
    scores = {m: np.array([row[m] for row in rows]) for m in MEASURES}
    for m, chance in (("cka", 0), ("rsa", 0), ("mutual_knn", 10 / 59)):
        error = scores[m].std() / np.sqrt(30)
        assert abs(scores[m].mean() - chance) < 3 * error + 1e-4
    assert scores["svcca"].mean() > 0.5  # not corrected: its null must be read beside it
    equidistant = (rotation(np.random.default_rng(seed), 16) for seed in (1, 2))
    assert compared(*equidistant)["cka"] == 0


def test_a_planted_alignment_of_layers_is_proposed():
    """Ten layers of a random walk; the other model has every second one, rotated, with noise."""
    rng = np.random.default_rng(8)
    walk = np.cumsum(rng.normal(size=(10, 120, 20)), axis=0)
    few = [walk[i] @ rotation(rng, 20) + 0.5 * rng.normal(size=(120, 20)) for i in (1, 3, 5, 7, 9)]
    many, few = ([Geometry.of(x) for x in layers] for layers in (walk, few))
    table = np.array([[a.compared(b)["cka"] for b in many] for a in few])
    assert monotone_assignment(table).tolist() == [1, 3, 5, 7, 9]
    assert abs(monotone_assignment(table.T) - np.arange(10) / 2).max() <= 1


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 6), (5, 3)])
def test_the_assignment_is_the_best_of_all(shape):
    scores = np.random.default_rng(9).normal(size=shape)
    rows, columns = shape
    choose = itertools.combinations if rows <= columns else itertools.combinations_with_replacement
    best = max(choose(range(columns), rows), key=lambda c: scores[np.arange(rows), c].sum())
    assert monotone_assignment(scores).tolist() == list(best)


def test_bad_representations_are_refused():
    refused(r"\[3, 2\] cannot be compared; .* with 4 rows or more", Geometry.of, np.zeros((3, 2)))
    refused(r"must be \[rows, size\]", Geometry.of, np.zeros(9))
    refused("not finite", Geometry.of, np.full((9, 2), np.nan))
