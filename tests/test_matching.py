"""Matched features: planted answers, honest nulls, and the streamed sums against slow formulas."""

import numpy as np
import pytest
from scipy import sparse
from tiny_run import refused

from crossdict_jax.evaluation import codes as codes_module
from crossdict_jax.evaluation import matching, nulls
from crossdict_jax.evaluation.codes import correlations
from crossdict_jax.evaluation.matching import confirm, match
from crossdict_jax.maps.codes import compress


def codes(rng, n, width, share=0.05):
    """Independent sparse non-negative features [n, width]."""
    return (rng.exponential(size=(n, width)) * (rng.random((n, width)) < share)).astype(np.float32)


def bursty(rng, n_documents, rows, width, share=0.05):
    """Features that fire in a fifth of the documents, there five times as often; the documents."""
    on = np.repeat(rng.random((n_documents, width)) < 0.2, rows, axis=0)
    documents = np.repeat(np.arange(n_documents), rows)
    return codes(rng, n_documents * rows, width, 5 * share) * on, documents


def noisy(rng, f, amount=0.2):
    """The features with noise wherever they are active."""
    return (f * np.exp(amount * rng.normal(size=f.shape))).astype(np.float32)


@pytest.mark.parametrize("method", matching.METHODS)
def test_a_planted_permutation_is_recovered_between_unequal_widths(method):
    rng = np.random.default_rng(0)
    order = rng.permutation(40)
    splits = []
    for _ in range(2):
        a = codes(rng, 4000, 60)
        shared = noisy(rng, a[:, :40])[:, order]  # feature j of b is order[j] of a
        splits.append((a, np.hstack([shared, codes(rng, 4000, 50)])))
    found = match(*splits[0], method=method)
    assert (found.width_a, found.width_b, found.live_a, found.live_b) == (60, 90, 60, 90)
    worth = confirm(found, *splits[1], documents=np.arange(4000) // 50)
    got = dict(zip(found.features_b[worth.confirmed], found.features_a[worth.confirmed]))
    assert got == dict(enumerate(order)) and (worth.r[worth.confirmed] > 0.8).all()
    assert worth.r_token is None


def test_a_dictionary_matches_itself_but_for_duplicates_and_rare_features():
    rng = np.random.default_rng(1)
    f = codes(rng, 2000, 30)
    f[:, 7] = 3 * f[:, 2]  # the same feature twice, in another unit
    f[:, 9] = 0
    f[29:, 11] = 0
    f[:, 12] = 0.5  # constant
    expected = sorted(set(range(30)) - {7, 9, 11, 12})
    found = match(f, f, merge_duplicates=True)
    assert found.features_a.tolist() == found.features_b.tolist() == expected
    assert found.live_a == found.live_b == len(expected)
    np.testing.assert_allclose(found.r, 1, atol=1e-12)
    assert match(f, f).live_a == len(expected) + 1


def test_independent_features_are_not_confirmed():
    q, any_confirmed = 0.05, []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        (a, documents), (b, _) = bursty(rng, 40, 30, 40), bursty(rng, 40, 30, 50)
        found = match(a, b)
        (a, _), (b, _) = bursty(rng, 40, 30, 40), bursty(rng, 40, 30, 50)
        assert len(found.r) > 5
        any_confirmed.append(confirm(found, a, b, documents=documents, fdr=q).confirmed.any())
    assert np.mean(any_confirmed) <= q + 2 * np.sqrt(q * (1 - q) / 20)


def test_shared_bursts_alone_do_not_pass_the_threshold_of_effect():
    rng = np.random.default_rng(3)
    on = np.repeat(rng.random((200, 30)) < 0.3, 20, axis=0)  # both read the same documents
    a, b = (codes(rng, 4000, 30, 0.2) * on for _ in range(2))
    pairs = match(a, a)
    worth = confirm(pairs, a, b, documents=np.repeat(np.arange(200), 20))
    assert (worth.p_adjusted < 0.05).mean() > 0.9  # not independent
    assert not worth.confirmed.any()


def tokens_and_features(rng, n=3000):
    """Feature 0: a token's. Feature 1: half of a token's occurrences, the same half in a and b."""
    tokens = rng.integers(0, 30, n)
    context = rng.random(n) < 0.5
    both = np.stack([tokens == 3, (tokens == 5) & context], axis=1).astype(np.float32)
    a, b = (noisy(rng, both, 0.1) for _ in range(2))
    return a, b, tokens


def test_what_the_token_alone_explains_is_not_confirmed():
    rng = np.random.default_rng(4)
    a, b, _ = tokens_and_features(rng)
    found = match(a, b)
    assert found.features_a.tolist() == found.features_b.tolist() == [0, 1]
    a, b, tokens = tokens_and_features(rng)
    documents = np.arange(len(a)) // 30
    assert confirm(found, a, b, documents=documents).confirmed.tolist() == [True, True]
    worth = confirm(found, a, b, documents=documents, tokens=tokens)
    assert worth.beyond_token.tolist() == worth.confirmed.tolist() == [False, True]
    assert worth.r[0] > 0.9 and worth.r_token[0] > 0.9 and abs(worth.r_token[1] - 0.5) < 0.1
    pairs_of_tokens = np.stack([tokens, np.arange(len(tokens))], axis=1)  # every row its own group
    worth = confirm(found, a, b, documents=documents, tokens=pairs_of_tokens)
    assert not worth.beyond_token.any()


def slow_correlations(a, b):
    """Of all columns of a with all of b; what never varies correlates with nothing."""
    with np.errstate(invalid="ignore"):
        r = np.corrcoef(a, b, rowvar=False, dtype=np.float64)[: a.shape[1], a.shape[1] :]
    return np.nan_to_num(r)


@pytest.mark.parametrize("cost", [0, 10**9])  # sparse, dense
@pytest.mark.parametrize("sizes", [(2**24, 4096), (40, 64)])  # at once, in pieces
def test_streamed_correlations_are_those_of_the_formula(monkeypatch, cost, sizes):
    for name, value in zip(("TILE", "ROWS", "SPARSE_COST"), (*sizes, cost)):
        monkeypatch.setattr(codes_module, name, value)
    rng = np.random.default_rng(7)
    a, b = codes(rng, 150, 13, 0.3), codes(rng, 150, 11, 0.5)
    a[:, 4], b[:, 2] = 0, 2
    a[7], b[9] = 0, 0
    b[:, 3] = a[:, 3] + 300  # always active, and varies little: its square hides the variance
    b[:, 5] *= -1
    r = np.full((13, 11), np.nan)
    for at, tile in correlations(compress(a), compress(b)):
        r[at] = tile
    np.testing.assert_allclose(r, slow_correlations(a, b), atol=2e-6)
    np.testing.assert_array_equal(compress(sparse.csr_array(a)).toarray(), a)


def test_shift_p_values_are_those_of_every_shift():
    rng = np.random.default_rng(11)
    (a, documents), (b, _) = bursty(rng, 12, 10, 6, 0.08), bursty(rng, 12, 10, 6, 0.08)
    b[:, :3] = noisy(rng, a[:, :3])
    pairs = compress(a), compress(b)
    r = codes_module.paired_correlations(*pairs)
    pool = np.log2(np.minimum((a > 0).sum(0), (b > 0).sum(0)).clip(1)).astype(int)
    null = []  # of each pair
    for x, y in zip(a.T, b.T):
        null.append([np.corrcoef(x, np.roll(y, shift))[0, 1] for shift in range(10, 111)])
    p = nulls.shift_p_values(r, *pairs, documents)
    for j in range(6):
        values = np.concatenate([null[i] for i in range(6) if pool[i] == pool[j]])
        expected = (1 + (values >= r[j]).sum()) / (1 + len(values))
        near = (abs(values - r[j]) < 2 / nulls.BINS).sum() / len(values)  # in the same bin
        assert expected <= p[j] <= expected + near + 1e-9


def test_nothing_live_matches_nothing():
    empty = np.zeros((50, 4), np.float32)
    full = codes(np.random.default_rng(0), 50, 3, 0.8)
    for a, b in ((empty, full), (full, empty), (empty, empty)):
        found = match(a, b, merge_duplicates=True)
        assert len(found.r) == 0
        worth = confirm(found, a, b, documents=np.arange(50), tokens=np.arange(50))
        assert len(worth.confirmed) == 0


def test_wrong_inputs_are_named(monkeypatch):
    f = codes(np.random.default_rng(0), 50, 3, 0.8)
    refused("50 and of 49 rows", match, f, f[1:])
    refused(r"evaluation.matching=best must be one of mutual_best, h", match, f, f, method="best")
    monkeypatch.setattr(matching, "HUNGARIAN_WIDTH", 2)
    words = "at most 2 live features and there are 3; use mutual_best"
    refused(words, match, f, f, method="hungarian")
    unequal = {"documents": np.arange(49), "tokens": np.arange(50)}
    refused("50, 50, 49, 50 rows", confirm, match(f, f), f, f, **unequal)
