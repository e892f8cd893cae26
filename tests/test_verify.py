"""The planted benchmark has the truth it claims."""

import numpy as np
import pytest

from crossdict_jax.verify import planted
from crossdict_jax.verify.planted import PlantedConfig, best_cosines, plant, streams, views

RELATED = PlantedConfig(rows=40_000, correlated=8, children=8)
SPOKEN = PlantedConfig(documents=60, from_token=0.5, exclusive=0.0)


@pytest.fixture(scope="module")
def related():
    return views(RELATED, seed=3)


def test_features_are_active_as_often_as_planted(related):
    frequency = related.truth.frequency
    error = np.sqrt(frequency * (1 - frequency) / len(related.codes))
    assert (np.abs((related.codes > 0).mean(0) - frequency) < 5 * error).all()
    assert frequency.sum() == pytest.approx(RELATED.active)
    assert frequency[3] / frequency[12] == pytest.approx((13 / 4) ** RELATED.zipf)
    active = related.codes[related.codes > 0]
    assert active.mean() == pytest.approx(1, abs=0.02)
    capped = plant(PlantedConfig(active=10, zipf=2.0), seed=0).frequency
    assert capped.max() == 0.5 and capped.sum() == pytest.approx(10)


def test_views_are_superpositions_of_their_codes(related):
    for x, directions, width in zip(related.x, related.truth.directions, RELATED.widths):
        assert x.shape == (len(related.codes), width) and RELATED.features > width
        error = x - related.codes @ directions
        assert error.std() == pytest.approx(RELATED.noise, rel=0.01)
        assert np.abs(error.mean(0)).max() < 5 * RELATED.noise / np.sqrt(len(related.codes))


def test_an_exclusive_feature_leaves_no_trace_in_the_other_view(related):
    truth = related.truth
    assert truth.seen.any(0).all() and [int(truth.exclusive(v).sum()) for v in (0, 1)] == [8, 8]
    assert truth.seen.all(0).sum() == 48
    for view in (0, 1):
        length = np.linalg.norm(related.truth.directions[view], axis=1)
        np.testing.assert_allclose(length, truth.seen[view], atol=1e-6)
        hidden = truth.exclusive(1 - view)
        # Beside those seen: hidden codes may follow or be born of features that this view sees.
        free = hidden & (truth.parent < 0) & (truth.partner < 0)
        free[truth.parent[truth.parent >= 0]] = free[truth.partner[truth.partner >= 0]] = False
        r = np.corrcoef(related.codes[:, free].T, related.x[view].T)[: free.sum(), free.sum() :]
        assert free.any() and np.abs(r).max() < 5 / np.sqrt(len(related.codes))


def test_a_child_fires_only_with_its_parent_and_partners_together_and_strangers_not(related):
    truth, active = related.truth, related.codes > 0
    children = np.flatnonzero(truth.parent >= 0)
    assert len(children) == RELATED.children and active[:, children].any(0).all()
    assert not (active[:, children] & ~active[:, truth.parent[children]]).any()
    second = np.flatnonzero(truth.partner >= 0)
    first = truth.partner[second]
    p, q = truth.frequency[first], truth.frequency[second]
    expected = planted.FOLLOWS * np.minimum(p, q) + (1 - planted.FOLLOWS) * p * q
    together = (active[:, first] & active[:, second]).mean(0)
    assert len(second) == RELATED.correlated
    assert (np.abs(together - expected) < 5 * np.sqrt(expected / len(related.codes))).all()
    strangers = np.roll(second, 1)
    apart = (active[:, first] & active[:, strangers]).mean(0)
    assert (np.abs(apart - p * truth.frequency[strangers]) < 0.02).all()


def test_bursts_are_between_documents():
    def spread(burstiness):
        v = views(PlantedConfig(rows=64_000, documents=64, burstiness=burstiness), seed=0)
        by_document = np.stack([(v.codes[v.document == d] > 0).mean(0) for d in range(64)])
        return (by_document.std(0) / by_document.mean(0)).mean()

    assert spread(0.5) > 0.45 > 0.15 > spread(0.0)


def test_equal_seeds_give_equal_bits_and_others_do_not():
    config = PlantedConfig(rows=500, documents=10, burstiness=0.3, from_token=0.2)
    drawn = (views(config, seed) for seed in (5, 5, 6))
    for a, b, c in zip(*((*made.x, made.codes) for made in drawn)):
        assert (a == b).all() and (a != c).any()


@pytest.fixture(scope="module")
def spoken():
    return streams(SPOKEN, seed=1)


def test_pairs_are_the_ends_of_words_some_within_and_rows_with_one_truth(spoken):
    rows, words = np.bincount(spoken.document), planted.WORDS_PER_DOCUMENT
    assert len(rows) == SPOKEN.documents  # the first token of a text is never paired
    assert (rows >= words - 1).all() and (rows < planted.PIECES * words).all()
    assert rows.mean() > 1.05 * words
    for x, directions in zip(spoken.x, spoken.truth.directions):
        assert np.abs(x - spoken.codes @ directions).max() < 6 * SPOKEN.noise
    late = streams(SPOKEN, seed=1, shift=1)
    error = late.x[1] - late.codes @ late.truth.directions[1]
    assert error.std() > 10 * SPOKEN.noise


def test_the_token_determines_its_features_and_says_nothing_of_others(spoken):
    codes, varies = spoken.codes, spoken.codes.std(0) > 0
    for tokens in spoken.tokens:
        _, index, counts = np.unique(tokens, return_inverse=True, return_counts=True)
        means = np.zeros((len(counts), codes.shape[1]))
        np.add.at(means, index, codes / counts[index][:, None])
        # Of each feature's variance, what the means of tokens explain, in-sample.
        share = 1 - (codes - means[index]).var(0) / np.maximum(codes.var(0), 1e-12)
        token, context = spoken.truth.from_token & varies, ~spoken.truth.from_token
        np.testing.assert_allclose(share[token], 1, atol=1e-5)
        chance = len(counts) / len(spoken.codes)  # what so many means explain of noise
        assert share[context].mean() == pytest.approx(chance, rel=0.3)


def test_best_cosines_find_planted_directions_in_any_order():
    directions = plant(PlantedConfig(exclusive=0.5), seed=0).directions[0]
    order = np.random.default_rng(0).permutation(len(directions))
    cosine, row = best_cosines(3.0 * directions[order], directions)
    seen = np.linalg.norm(directions, axis=1) > 0
    np.testing.assert_allclose(cosine[seen], 1, atol=1e-6)
    assert (order[row[seen]] == np.flatnonzero(seen)).all()
    assert np.isnan(cosine[~seen]).all() and (row[~seen] == -1).all()
