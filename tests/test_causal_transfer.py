"""Feature transfer: planted causes are found, and vectors do what they do in the plain model."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import false_discovery_control
from test_models import NARROW_LLAMA
from tiny_run import changed, refused

from crossdict_jax import models, stats
from crossdict_jax.causal import effects
from crossdict_jax.causal.directions import mapped_directions
from crossdict_jax.causal.effects import MATCH, Directions, ModelAtSite, choose_contexts
from crossdict_jax.causal.vocabulary import Translation
from crossdict_jax.config import Config, EvaluationConfig, InterventionConfig
from crossdict_jax.maps.base import Side
from crossdict_jax.maps.kinds.ridge import Ridge
from crossdict_jax.models import Site
from crossdict_jax.models.run import Passages, Runner
from crossdict_jax.verify import planted_causal
from crossdict_jax.verify.planted_causal import FEATURES, LINKED

ASKED = InterventionConfig(contexts=24)
CONFIG = Config(evaluation=EvaluationConfig(bootstrap=100), intervention=ASKED)
MIDDLE = len(CONFIG.intervention.alphas) // 2


@pytest.fixture(scope="module")
def planted():
    return planted_causal.plant()


@pytest.fixture(scope="module")
def experiment(planted):
    """The directions of the true map, the match, and two that cannot work: noise, and another's."""
    (made, pairs), features = planted.experiment(), np.arange(FEATURES)
    (V_a, V_b), (d_a, d_b) = zip(*((d.W_dec[...], d.d_model) for d in planted.dictionaries))
    values = {"mean_a": np.zeros(d_a), "W": V_a.T @ V_b, "mean_b": np.zeros(d_b)}
    true_map = Ridge(planted.dictionaries[1], values)
    true = mapped_directions(true_map, pairs.source, features, made.strength, seed=0)
    noise = np.random.default_rng(3).normal(size=true.shape).astype(np.float32)
    fires = np.asarray(pairs.target.dictionary.encode(pairs.target.x))
    mapped = {"ridge": Directions(true), MATCH: Directions(np.asarray(V_b), fires)}
    rarely = fires * (np.arange(len(fires)) % 12 == 0)[:, None]
    another = Directions(np.roll(true, 1, axis=0), rarely)
    mapped |= {"noise": Directions(noise), "another": another}
    return dataclasses.replace(made, mapped=mapped)


@pytest.fixture(scope="module")
def outcome(experiment):
    """(rows, {direction: summary}, {feature: record})."""
    kept = {}

    def part(feature, make):
        kept[feature] = make()
        return kept[feature]

    rows, summary = effects.transfer(experiment, CONFIG, part=part)
    return rows, {s["direction"]: s for s in summary}, kept


def of(rows, direction):
    return {row["feature"]: row for row in rows if row["direction"] == direction}


def test_directions_of_shared_causes_transfer_and_no_others(outcome):
    rows, summary, *_ = outcome
    for direction in ("ridge", "match"):
        found = of(rows, direction)
        assert [i for i, row in found.items() if row["transfers"]] == list(range(LINKED))
        for i in range(LINKED):
            row = found[i]
            for key in ("specific_random", "specific_shuffled", "specific_random_at_kl"):
                assert row[f"{key}_low"] > 0, (i, key)
            assert row["promoted_source"][0] == row["promoted_target"][0] == f"word{FEATURES + i} "
        assert summary[direction]["share_transferring"] == LINKED / FEATURES
        assert summary[direction]["specific_random_low"] > 0
    for direction in ("noise", "another"):
        assert not [i for i, row in of(rows, direction).items() if row["transfers"]]
        low, high = (summary[direction][f"specific_random_{end}"] for end in ("low", "high"))
        assert low < 0.02 and high < summary["ridge"]["specific_random_low"]


def test_removing_a_shared_cause_does_the_same_in_both_models(outcome):
    rows, summary, *_ = outcome
    found = of(rows, "ridge")
    shared = [found[i]["ablation_r"] for i in range(LINKED)]
    others = [found[i]["ablation_r"] for i in range(LINKED, FEATURES)]
    assert np.median(shared) > 0.8 and np.mean(shared) > np.mean(others) + 0.3
    assert abs(summary["ridge"]["ablation_r_shuffled"]) < 0.2
    assert {row["ablation_r"] for row in of(rows, "another").values()} == {None}  # too few


def test_a_map_of_features_gives_what_it_adds(planted, experiment):
    """A map of features that doubles each: the direction is twice B's decoder row."""

    class Double(Ridge):
        reads = "features"
        predicts_activation = False

        def __call__(self, inputs, *, tokens=None):
            return 2 * inputs

    m = Double(planted.dictionaries[1], d_a=planted.lms[0].config.d_model)
    x = experiment.source.x
    side = Side(x, np.zeros(len(x), np.int32), planted.dictionaries[0])
    found = mapped_directions(m, side, np.arange(FEATURES), experiment.strength, seed=1)
    np.testing.assert_allclose(found, 2 * planted.dictionaries[1].W_dec[...], atol=1e-5)


def test_what_is_said_of_a_row_hangs_together(outcome):
    rows = outcome[0]
    for row in rows:
        middle = row["doses"][MIDDLE]
        assert middle["alpha"] == sorted(CONFIG.intervention.alphas)[MIDDLE]
        assert row["effect"] == pytest.approx(middle["effect"])
        assert row["specific_random"] == pytest.approx(row["effect"] - middle["random"])
        assert row["p"] == max(row["p_random"], row["p_shuffled"]) <= row["q"]
        assert row["effect_low"] <= row["effect"] <= row["effect_high"]
        spent = [dose["kl"] for dose in row["doses"]]
        assert spent == sorted(spent)
    nulls = outcome[2][2]["directions"]["ridge"]
    n = effects.controls_at(0.05)
    lone = stats.pooled_p(1e3 * np.eye(12)[0], np.random.default_rng(0).normal(size=(12, n)))
    assert false_discovery_control(lone)[0] < 0.05
    assert len(nulls["null_random"]) == n and len(nulls["null_shuffled"]) == FEATURES - 1 < n
    # Only tokens that become likelier are promoted: at most so many.
    assert max(len(row["promoted_source"]) for row in rows) == effects.PROMOTED
    json.dumps(rows, allow_nan=False)


SHAPE = NARROW_LLAMA | {"vocab_size": 30, "max_position_embeddings": 32, "initializer_range": 0.3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(0, 30, n).astype(np.int32) for n in (12, 7, 12, 3)]
VECTORS = RNG.normal(size=(3, 16)).astype(np.float32)
AT = np.array([[0, 4, 4, 7], [0, 8, 10, 11], [1, 1, 3, 3], [2, 2, 9, 10], [3, 1, 1, 2]])


@pytest.fixture(scope="module")
def lm():
    return models.init(SHAPE, seed=0)


def held(lm, site, **settings):
    text, first, position, end = AT.T
    passages = Passages(TEXTS, text, position, first=first, end=end)
    return ModelAtSite(Runner(lm, batch_size=2), site, passages).hold(size=8, **settings)


@functools.cache
def plain(lm, site):
    @jax.jit
    def logits(tokens, edited, vector):
        def tap(at, x):
            return x + edited[None, :, None] * vector[None, None, :] if at == site else x

        return lm.logits(tokens[None], tap=tap)[0]

    return logits


def slow(lm, site, row, vector, span):
    """log p [seq, vocab] of one text with a vector added, by the plain model."""
    text, first, last, _ = row
    at = np.arange(12)
    edited = (at >= max(first, last - span + 1)) & (at <= last)
    tokens = np.pad(TEXTS[text], (0, len(at) - len(TEXTS[text])))
    logits = np.asarray(plain(lm, site)(tokens, edited, jnp.asarray(vector)), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


SPANS = [(Site(1), 4), (Site(1), 12), (Site(1, "resid_post"), 4), (Site(0, "mlp_out"), 4)]


@pytest.mark.parametrize(("site", "span"), SPANS, ids=str)
def test_changes_are_those_of_the_plain_model(lm, site, span):
    ready = held(lm, site, span=span)
    change, kl = ready.changes(VECTORS, {3: 0.5, 17: 1.5}, limit=5)
    log_probs = ready.log_probs(VECTORS)
    for n, row in enumerate(AT):
        clean, *edited = (slow(lm, site, row, v, span)[row[2]] for v in [np.zeros(16), *VECTORS])
        np.testing.assert_allclose(log_probs[:, n], [clean, *edited], atol=2e-5)
        for v, log_p in enumerate(edited):
            expected = (log_p - clean)[[3, 17]] @ [0.25, 0.75]
            assert change[v, n] == pytest.approx(expected, abs=5e-5)
            assert kl[v, n] == pytest.approx(np.exp(clean) @ (clean - log_p), abs=5e-5)
    assert np.abs(change).max() > 0.1
    alone = ready.changes(VECTORS[1:2], {3: 0.5, 17: 1.5}, limit=5)[0]
    np.testing.assert_allclose(alone[0], change[1], atol=1e-6)


def test_continuations_are_those_of_the_plain_model(lm):
    strength = np.random.default_rng(2).normal(size=(3, 5)).astype(np.float32)
    ready = held(lm, Site(1), span=3, reads=4)
    changes = ready.continuations(VECTORS, strength)

    def continuation(row, vector):
        """log p of the tokens after the position up to the end, the last 3 tokens edited."""
        text, _, last, end = row
        log_p = slow(lm, Site(1), row, vector, 3)
        return sum(log_p[at, TEXTS[text][at + 1]] for at in range(last, end))

    for n, row in enumerate(AT):
        clean = continuation(row, np.zeros(16))
        for v, vector in enumerate(VECTORS):
            expected = continuation(row, strength[v, n] * vector) - clean
            assert changes[v, n] == pytest.approx(expected, abs=5e-5)
    assert (changes[:, 2] == 0).all()  # a position without a continuation


def test_norms_are_what_they_say_and_a_budget_is_found_on_the_dose_curve():
    """A dose of 1: the median norm, the feature's share of it, or what the map brings."""
    for norm, expected in {"residual": (10, 20), "feature": (6, 12), "mapped": (6, 8)}.items():
        assert effects.dose_norms(norm, (10.0, 20.0), 6.0, 8.0) == expected
    kl = np.array([[[0.1, 0.1], [0.4, 0.6]], [[0.01, 0.01], [0.02, 0.02]]])
    effect = np.array([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [5.0, 7.0]]])
    values = effects.at_budget(kl[:1], effect[:1], 0.3)
    np.testing.assert_allclose(values, [[2.0, 3.0]])
    values = effects.at_budget(kl, effect, 0.02)  # between no dose and the first; and the last
    np.testing.assert_allclose(values, [[0.2, 0.4], [5.0, 7.0]])
    itself, control = np.stack([effect[:1], kl[:1]]), np.stack([effect[1:], kl[1:]])
    draws = stats.draw(np.arange(2), count=10, seed=0)  # a control spends 0.02 nats at most
    row = effects._effects(itself[:, 0], {"random": control}, np.array([1.0, 2.0]), draws)
    assert row["kl_budget"] == pytest.approx(0.02)
    assert row["specific_random_at_kl"] == pytest.approx(0.2 * 1.5 - 6)


def test_every_map_has_its_own_norm_and_controls_of_it(experiment):
    config = changed(CONFIG, intervention__norm="mapped", intervention__alphas=(1.0,))
    kinds = {name: experiment.mapped[name] for name in ("ridge", "noise")}
    both, *alone = (
        effects.measure(dataclasses.replace(experiment, mapped=mapped), config, 0)["directions"]
        for mapped in (kinds, *({name: of_map} for name, of_map in kinds.items()))
    )
    for name, of_map in zip(kinds, alone):
        for key in ("effect", "kl", "null_random", "null_shuffled"):
            np.testing.assert_allclose(both[name][key], of_map[name][key], atol=1e-6)
    assert both["ridge"]["null_random"] != both["noise"]["null_random"]


def test_p_values_of_nothing_are_uniform():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(200, 12, 17))
    p = np.concatenate([stats.pooled_p(draw[:, 0], draw[:, 1:]) for draw in draws])
    for level in (0.01, 0.05, 0.3):
        assert np.mean(p <= level) == pytest.approx(level, abs=4 * (level / len(p)) ** 0.5 + 0.004)


def test_contexts_are_spread_over_documents():
    documents = np.array([0] * 10 + [1] * 2 + [2] * 5)
    strength = np.where(np.arange(17) == 10, 0, 1.0)
    rows = choose_contexts(strength, documents, 6, np.random.default_rng(0))
    assert np.bincount(documents[rows]).tolist() in ([3, 1, 2], [2, 1, 3])
    assert (strength[choose_contexts(strength, documents, 99, np.random.default_rng(0))] > 0).all()


def test_tokens_are_translated_by_their_bytes():
    a = (b"", b" cat", b"\xc3", b" zebra", b"<s>", b"\xff", b"qq")
    b = (b" z", b" cat", b"\xc3", b" ze", b" ", b" cat", b"<s>")
    first = {" zebra": 0, "qq": 4}.get
    found = Translation(a, b, frozenset({4}), frozenset({6}), first_token=first)
    assert [found.to_b(i) for i in range(8)] == [None, 1, 2, 0, None, None, None, None]
    assert Translation(a, b).to_b(3) == 3  # the longest that it begins with
    again = Translation((b"s", b"!"), (b"s", b"!", b"s"), fallback_b=frozenset({0, 1}))
    assert [again.to_b(i) for i in range(2)] == [2, 1]  # a byte is what is written
    assert Translation((b"\x1b[\x0em ",), b).text("a", 0) == "\\x1b[\\x0em "  # terminals obey them
    assert found.has_text.tolist() == [False, True, True, True, False, True, True]


def test_a_silent_feature_and_tokens_that_the_target_lacks_are_named(experiment):
    strength = experiment.strength.copy()
    strength[:, 0] = 0
    silent = dataclasses.replace(experiment, strength=strength)
    refused("Feature 0 does not fire", effects.transfer, silent, CONFIG)
    foreign = Translation(experiment.translation.pieces_a, tuple([b"?"] * 40))
    alone = dataclasses.replace(experiment, translation=foreign, tested=1)
    refused("No token that the features promote", effects.transfer, alone, CONFIG)
