"""Similarity of representations: against slow formulas, known answers, and a planted alignment."""

import itertools

import numpy as np
import pytest
from scipy.stats import spearmanr

from crossdict_jax.errors import UserError
from crossdict_jax.evaluation import similarity
from crossdict_jax.evaluation.representations import monotone_assignment
from crossdict_jax.evaluation.similarity import MEASURES, Geometry, cka, mutual_knn, rsa, svcca


def rotation(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def related(seed, n=80, d_x=12, d_y=9):
    """Two representations that share half of their variance or so."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 5))
    x, y = (z @ rng.normal(size=(5, d)) + rng.normal(size=(n, d)) for d in (d_x, d_y))
    return x + 3, y - 1  # means must not matter to CKA and SVCCA


FUNCTIONS = {"cka": cka, "svcca": svcca, "rsa": rsa, "mutual_knn": mutual_knn}


# ---------------------------------------------------------------- slow formulas


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
        z = z - z.mean(0)
        u, s, _ = np.linalg.svd(z, full_matrices=False)
        r = next(r for r in range(1, len(s) + 1) if (s[:r] ** 2).sum() >= 0.99 * (s**2).sum())
        return u[:, :r] * s[:r]

    a, b = (np.linalg.qr(leading(z))[0] for z in (x, y))
    return np.linalg.svd(a.T @ b, compute_uv=False).mean()


def slow_rsa(x, y):
    pairs = list(itertools.combinations(range(len(x)), 2))
    dissimilarity = [[1 - np.corrcoef(z[i], z[j])[0, 1] for i, j in pairs] for z in (x, y)]
    return spearmanr(*np.round(dissimilarity, 6)).statistic


def slow_mutual_knn(x, y, k=10):
    def near(z, i):
        cosine = [z[i] @ z[j] / np.linalg.norm(z[i]) / np.linalg.norm(z[j]) for j in range(len(z))]
        return set(sorted(set(range(len(z))) - {i}, key=lambda j: -cosine[j])[:k])

    return np.mean([len(near(x, i) & near(y, i)) / k for i in range(len(x))])


SLOW = {"cka": slow_cka, "svcca": slow_svcca, "rsa": slow_rsa, "mutual_knn": slow_mutual_knn}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", [(80, 12, 9), (30, 40, 35)])  # more rows than columns, or fewer
def test_measures_are_their_formulas(measure, shape):
    x, y = related(0, *shape)
    assert FUNCTIONS[measure](x, y) == pytest.approx(SLOW[measure](x, y), abs=2e-5)


def test_a_geometry_gives_the_same_numbers_and_can_be_reordered():
    x, y = related(1, 60)
    order = np.random.default_rng(0).permutation(60)
    a, b = Geometry.of(x), Geometry.of(y)
    for other, rows in ((b, np.arange(60)), (b.reordered(order), order)):
        for measure, value in a.compared(other).items():
            assert value == pytest.approx(FUNCTIONS[measure](x, y[rows]), abs=2e-5)


def test_cka_is_summed_over_blocks_of_rows(monkeypatch):
    x, y = related(2)
    whole = cka(x, y)
    monkeypatch.setattr(similarity, "ROWS", 7)
    assert cka(x, y) == pytest.approx(whole, abs=1e-6)


def test_equal_dissimilarities_share_their_rank():
    rng = np.random.default_rng(3)
    x = rng.integers(0, 2, (40, 4)).astype(float)  # many ties
    x[:, 0], x[:, 1] = 0, 1
    y = rng.normal(size=(40, 6))
    assert rsa(x, y) == pytest.approx(slow_rsa(x, y), abs=1e-4)
    assert len(set(np.corrcoef(x)[np.triu_indices(40, 1)].round(6))) < 10


# ---------------------------------------------------------------- known answers


@pytest.mark.parametrize("measure", MEASURES)
def test_a_rotated_and_scaled_copy_is_the_same_to_them(measure):
    rng = np.random.default_rng(4)
    x, _ = related(4)
    x = x - x.mean(0)
    assert FUNCTIONS[measure](x, x) == pytest.approx(1, abs=1e-5)
    if measure != "rsa":  # correlation over columns is no rotation invariant
        turned = 5 * x @ rotation(rng, x.shape[1])
        assert FUNCTIONS[measure](x, turned) == pytest.approx(1, abs=1e-4)


def test_rsa_survives_scaling_and_nearly_a_rotation_of_many_columns():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(60, 400))
    assert rsa(x, -3 * x) == pytest.approx(1, abs=1e-6)
    assert rsa(x, x @ rotation(rng, 400)) > 0.95


def test_svcca_sees_through_any_invertible_map_but_cka_does_not():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(200, 6))
    y = x @ np.diag([1, 1, 1, 10, 10, 10]) @ rotation(rng, 6)
    assert svcca(x, y) == pytest.approx(1, abs=0.01)
    assert cka(x, y) < 0.9


def test_independent_representations_score_their_chance():
    """The unbiased CKA is 0 on average, where the usual one of as many columns as rows is 0.5."""
    scores = {m: [] for m in MEASURES}
    for seed in range(30):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(2, 60, 60))
        for m in MEASURES:
            scores[m].append(FUNCTIONS[m](x, y))
    for m, chance in (("cka", 0), ("rsa", 0), ("mutual_knn", 10 / 59)):
        error = np.std(scores[m]) / np.sqrt(30)
        assert abs(np.mean(scores[m]) - chance) < 3 * error + 1e-4
    assert np.mean(scores["svcca"]) > 0.5  # not corrected: its null must be read beside it


def test_constant_representations_are_like_nothing():
    x, _ = related(7)
    for measure in ("cka", "svcca", "rsa"):
        assert FUNCTIONS[measure](x, np.ones((80, 3))) == 0


# ---------------------------------------------------------------- layers


def test_a_planted_alignment_of_layers_is_proposed():
    """Ten layers of a random walk; the other model has every second one, rotated, with noise."""
    rng = np.random.default_rng(8)
    walk = np.cumsum(rng.normal(size=(10, 120, 20)), axis=0)
    fast = [walk[i] @ rotation(rng, 20) + 0.5 * rng.normal(size=(120, 20)) for i in (1, 3, 5, 7, 9)]
    slow, fast = ([Geometry.of(x) for x in layers] for layers in (walk, fast))
    table = np.array([[a.compared(b)["cka"] for b in slow] for a in fast])
    assert monotone_assignment(table).tolist() == [1, 3, 5, 7, 9]
    assert monotone_assignment(table.T).tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 4, 4] or (
        abs(monotone_assignment(table.T) - np.arange(10) / 2).max() <= 1
    )


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 6), (5, 3)])
def test_the_assignment_is_the_best_of_all(shape):
    scores = np.random.default_rng(9).normal(size=shape)
    rows, columns = shape
    choose = itertools.combinations if rows <= columns else itertools.combinations_with_replacement
    best = max(choose(range(columns), rows), key=lambda c: scores[np.arange(rows), c].sum())
    assert monotone_assignment(scores).tolist() == list(best)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((9, 2)), np.zeros((8, 2)), r"\[9, 2\] and \[8, 2\] cannot be compared"),
        (np.zeros((3, 2)), np.zeros((3, 2)), "4 rows or more"),
        (np.zeros(9), np.zeros(9), r"must be \[rows, size\]"),
        (np.full((9, 2), np.nan), np.zeros((9, 2)), "not finite"),
    ],
)
def test_bad_representations_are_refused(measure, x, y, message):
    with pytest.raises(UserError, match=message):
        FUNCTIONS[measure](x, y)


@pytest.mark.parametrize("k", [0, 80])
def test_bad_numbers_of_neighbours_are_refused(k):
    with pytest.raises(UserError, match=f"k={k} neighbours among 80 rows"):
        mutual_knn(*related(0), k=k)
