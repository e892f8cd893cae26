"""The runner of language models: edits reach the positions alone, and do what they do there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import refused

from crossdict_jax import models, stats
from crossdict_jax.activations.passages import select_passages
from crossdict_jax.activations.store import open_store
from crossdict_jax.models import Site, attention, run
from crossdict_jax.models.base import LayerNorm
from crossdict_jax.models.run import Passages, Runner

call = run.run_model
SHAPE = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 8, "n_layer": 3, "n_head": 2}
SHAPE |= {"n_positions": 16, "initializer_range": 0.3}
LENGTHS = (12, 3, 9, 1, 12)


@pytest.fixture(scope="module")
def lm():
    return models.init(SHAPE, seed=0)


@pytest.fixture(scope="module")
def passages():
    """Five windows; every other position is paired, and the last one of each window."""
    rng = np.random.default_rng(0)
    tokens = tuple(rng.integers(0, 40, n).astype(np.int32) for n in LENGTHS)
    positions = [(w, p) for w, n in enumerate(LENGTHS) for p in range(n) if p % 2 or p == n - 1]
    window, position = np.array(positions).T
    return Passages(tokens=tokens, window=window, position=position)


def test_logits_that_overflow_are_refused(passages):
    lm = models.init(SHAPE, seed=0)
    lm.final_norm.scale[...] *= 1e38
    splice = Runner(lm, batch_size=2).splice
    refused("logits of gpt2 overflow", splice, passages, Site(1), {})


@pytest.fixture(scope="module")
def runner(lm):
    return Runner(lm, batch_size=2)


def slow(lm, passages, values):
    """{"ce", "kl"} of the scored rows, a window at a time, with values {site: [n, d_model]} in."""
    length = max(len(t) for t in passages.tokens)

    @jax.jit
    def log_p(tokens, edit, x):
        def tap(site, y):
            return jnp.where(edit[None, :, None], x[site][None], y) if site in x else y

        return lm.logits(tokens[None])[0], lm.logits(tokens[None], tap=tap)[0]

    ce, kl = [], []
    for w, tokens in enumerate(passages.tokens):
        rows = np.flatnonzero(passages.window == w)
        at = passages.position[rows]
        edit = np.isin(np.arange(length), at)
        x = {site: np.zeros((length, v.shape[1]), np.float32) for site, v in values.items()}
        for site, v in values.items():
            x[site][at] = v[rows]
        both = log_p(np.pad(tokens, (0, length - len(tokens))), edit, x)
        clean, edited = (jax.nn.log_softmax(np.asarray(logits, np.float64)) for logits in both)
        for p in at[at + 1 < len(tokens)]:
            ce.append(-edited[p, tokens[p + 1]])
            kl.append(np.sum(np.exp(clean[p]) * (clean[p] - edited[p])))
    return {"ce": np.array(ce), "kl": np.array(kl)}


def values_of(passages, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(len(passages.position), 8)).astype(np.float32)


@pytest.mark.parametrize("layers", [(1,), (2, 0)])  # several in any order
@pytest.mark.parametrize("kind", ["resid_pre", "mlp_out"])
def test_effects_are_those_of_the_plain_model(lm, runner, passages, kind, layers):
    sites = tuple(Site(layer, kind) for layer in layers)
    values = {site: values_of(passages, site.layer) for site in sites}
    effect = runner.splice(passages, sites, {"noise": values})["noise"]
    expected = slow(lm, passages, values)
    np.testing.assert_allclose(effect.ce, expected["ce"], atol=1e-4)
    np.testing.assert_allclose(effect.kl, expected["kl"], atol=1e-4)
    assert effect.kl.max() > 0.1
    for site in sites if len(sites) > 1 else ():
        alone = runner.splice(passages, site, {"noise": values[site]})["noise"]
        assert np.abs(alone.ce - effect.ce).max() > 0.05


def test_the_models_activations_change_nothing(runner, passages, monkeypatch):
    site, passes, dispatch = Site(1), [], runner.dispatch
    x = runner.read_at(passages, [site])[0]
    counted = lambda f, *a, **k: passes.append(f) or dispatch(f, *a, **k)  # noqa: E731
    monkeypatch.setattr(runner, "dispatch", counted)
    replacements = {"clean again": x, "zero": np.zeros(8, np.float32), "equal": x.copy()}
    effects = runner.splice(passages, site, replacements)
    clean = effects["clean"]
    assert passes.count(run._edited) == 2 * passes.count(run._clean) > 0  # equal ones are read once
    assert (effects["equal"].kl == effects["clean again"].kl).all()
    np.testing.assert_allclose(effects["clean again"].ce, clean.ce, atol=1e-6)
    np.testing.assert_allclose(effects["clean again"].kl, 0, atol=1e-6)
    assert np.abs(effects["zero"].ce - clean.ce).max() > 0.1 and (clean.kl == 0).all()
    ends = sum(passages.position == np.array(LENGTHS)[passages.window] - 1)
    assert len(clean.ce) == len(passages.position) - ends  # there no next token is known


def test_whole_spans_take_what_is_put_at_their_end(runner, passages):
    """As passages with one more row for every token inside a span."""
    site, position, n = Site(1), passages.position, len(passages.position)
    first = np.where(position % 2 == 1, np.maximum(position - 1, 1), position)
    inner = np.flatnonzero(first < position)
    rows = np.concatenate([np.arange(n), inner])
    positions = np.concatenate([position, first[inner]])
    more = dataclasses.replace(passages, window=passages.window[rows], position=positions)
    spans, values = dataclasses.replace(passages, first=first), values_of(passages, 3)
    effects = runner.splice(spans, site, {"x": values, "v": values[0]})
    expected = runner.splice(more, site, {"x": values[rows], "v": values[0]})
    for name, effect in effects.items():
        np.testing.assert_allclose(effect.ce, expected[name].ce[: len(effect.ce)], atol=1e-5)
    alone = runner.splice(passages, site, {"x": values})["x"]
    assert len(inner) > 5 and np.abs(effects["x"].ce - alone.ce).max() > 0.01


def scaled(lm, factor, norm, shift, tokens):
    return {"x": shift[None, None] + factor * norm(lm.logits(tokens))}


def differences(lm, tokens):
    logits = lm.logits(tokens)[:, 0]
    return logits[::2] - logits[1::2]


def test_a_function_of_texts_sees_them_in_batches_and_gives_a_row_for_each(lm, runner):
    tokens = np.random.default_rng(3).integers(0, 40, (5, 6)).astype(np.int32)
    norm = LayerNorm(40, eps=1e-5)
    shared = norm, np.ones(40, np.float32)
    x = runner.run(scaled, tokens, static=(3,), shared=shared)["x"]
    logits = lm.logits(tokens)
    np.testing.assert_allclose(x, 1 + 3 * norm(logits), atol=1e-4)
    pairs = Runner(lm, batch_size=3).run(differences, tokens[:4], group=2)
    np.testing.assert_allclose(pairs, logits[[0, 2], 0] - logits[[1, 3], 0], atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_stream_gives_each_text_its_activations(lm, runner, device, monkeypatch):
    texts = [np.arange(n, dtype=np.int32) for n in LENGTHS]
    sites = (Site(0, "mlp_out"), Site(2))
    window = np.repeat(np.arange(len(texts)), LENGTHS)
    every = Passages(texts, window, np.concatenate(texts))
    order = np.random.default_rng(0).permutation(len(window))[: len(window) // 2]
    monkeypatch.setattr(run, "platform", lambda: device)
    whole, some = (runner.read_at(p, sites, length_step=8) for p in (every, every.take(order)))
    together = runner.read(texts, sites)
    index, parts = zip(*runner.stream(every.take(order), sites))
    assert sorted(np.concatenate(index)) == list(range(len(order)))
    for s, site in enumerate(sites):
        np.testing.assert_array_equal(some[s], whole[s][order])
        assert {part[s].dtype.name for part in parts} == {"bfloat16"}
        for i, text in enumerate(texts):
            x = whole[s][window == i]
            alone = models.capture(lm, text[None], sites)
            np.testing.assert_allclose(x, alone[site][0], atol=1e-5)
            np.testing.assert_allclose(together[site][i, : len(text)], x, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "size", "shapes"),
    [
        ([10] * 9, 4, [(3, 10)] * 3),  # as equal as they can be, not 4, 4, 1
        ([10, 3, 10, 4, 3], 4, [(3, 4), (2, 10)]),  # short ones apart
        ([10, 7, 10, 7], 4, [(4, 10)]),  # little to save
        ([7], 4, [(1, 7)]),
    ],
)
def test_windows_are_padded_little(lm, lengths, size, shapes):
    texts = [np.full(n, i, np.int32) for i, n in enumerate(lengths)]
    batches = Runner(lm, batch_size=size).batches(texts)
    assert max(len(b.texts) for b in Runner(lm, batch_size=size).batches(texts, limit=2)) <= 2
    more = Runner(lm, batch_size=size).batches(texts, worth=0.1)
    assert len(more) == len(batches) + (lengths == [10, 7, 10, 7])
    assert [b.tokens.shape for b in batches] == shapes
    assert sorted(np.concatenate([b.texts for b in batches])) == list(range(len(lengths)))
    for batch in batches:
        assert (batch.tokens[: len(batch.texts), 0] == batch.texts).all()


@pytest.mark.mesh
def test_no_large_array_is_gathered_across_devices(runner, passages, monkeypatch):
    called = []
    for name in ("BLOCK", "SCORES"):  # as if texts were long
        monkeypatch.setattr(attention, name, 1)
    jax.clear_caches()
    monkeypatch.setattr(run, "run_model", lambda *args: called.append(args) or call(*args))
    runner.splice(passages, Site(1), {"zero": np.zeros(8, np.float32)})
    x, at = runner.put(np.zeros((16, 12, 8), np.float32)), runner.put(np.zeros((16, 4), np.int32))
    assert "all-" not in run._at_positions.lower((x,), at).compile().as_text()
    assert jax.device_count() > 1 and len(called) > 1
    for args in called[:2]:
        assert "all-gather" not in call.lower(*args).compile().as_text()


def test_loss_recovered_is_a_share_and_undefined_where_nothing_is_lost():
    clean, zero, edited = np.array([1.0, 2, 3]), np.full(3, 4.0), np.array([1.0, 3, 4])
    draws = stats.draw(np.array([0, 0, 1]), count=20, seed=0)
    found = stats.loss_recovered(edited, clean=clean, baseline=zero, resamples=draws)
    assert found.value == pytest.approx((12 - 8) / (12 - 6))
    assert set(np.round(found.samples, 9)) <= {0.0, round(4 / 5, 9), round(4 / 6, 9)}
    harmless = clean + 0.04
    assert stats.loss_recovered(edited, clean=clean, baseline=harmless, resamples=draws) is None


def test_passages_are_test_rows_with_the_tokens_that_end_there(shared, monkeypatch):
    store = open_store(shared[1].activations)
    for name in store.models:
        found = select_passages(store, name, documents=4, seed=0)
        assert len(set(found.document)) == 4 and set(found.rows) <= set(store.select("test"))
        assert (store.rows.document[found.rows] == found.document).all()
        ended = [found.tokens[w][p] for w, p in zip(found.window, found.position)]
        assert ended == store.tokens(name, found.rows).tolist()
    first, second = (select_passages(store, n, documents=4, seed=0) for n in "ab")
    assert (first.rows == second.rows).all()
    other = select_passages(store, "a", documents=4, seed=1)
    assert set(other.document) != set(first.document)
    monkeypatch.setattr(type(store), "has_bos", lambda self, model: 7)
    with_bos = select_passages(store, "a", documents=4, seed=0)  # in front of every window
    for tokens, plain in zip(with_bos.tokens, first.tokens):
        assert tokens[0] == 7 and (tokens[1:] == plain).all()
    assert (with_bos.position == first.position + 1).all()


def test_rounded_weights_give_what_rounding_products_gives():
    lm = models.init(SHAPE | {"tie_word_embeddings": False})
    tokens, site = np.arange(12, dtype=np.int32).reshape(2, 6), Site(1)
    runner = Runner(lm, batch_size=2, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(runner._params)} == {"bfloat16", "float32"}
    read = runner.read(list(tokens), [site])[site]
    np.testing.assert_array_equal(read, models.capture(lm, tokens, [site], dtype="bfloat16")[site])
