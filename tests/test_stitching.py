"""Splicing and stitching: edits reach the paired positions alone, and losses are what they say."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from crossdict_jax import dictionaries, maps, models, stats
from crossdict_jax.activations import splice
from crossdict_jax.activations.splice import Effect, Passages, Splicer, loss_recovered
from crossdict_jax.activations.store import open_store
from crossdict_jax.causal import intervene, stitching
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site
from crossdict_jax.workdir import Workdir, read_json, read_jsonl

SHAPE = {
    "model_type": "gpt2",
    "vocab_size": 40,
    "n_embd": 8,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 16,
    "initializer_range": 0.3,
}
LENGTHS = (12, 3, 9, 1, 12)


@pytest.fixture(scope="module")
def lm():
    return models.init(SHAPE, seed=0)


@pytest.fixture(scope="module")
def passages():
    """Five windows; every other position is paired, and the last one of each window."""
    rng = np.random.default_rng(0)
    tokens = tuple(rng.integers(0, 40, n).astype(np.int32) for n in LENGTHS)
    places = [(w, p) for w, n in enumerate(LENGTHS) for p in range(n) if p % 2 or p == n - 1]
    window, position = np.array(places).T
    return Passages(
        tokens=tokens,
        rows=np.arange(len(places)) + 100,
        window=window,
        position=position,
        document=window // 2,
    )


def splicer(lm, passages, site, batch_size=2):
    return Splicer(lm, passages, sites=(site,), batch_size=batch_size)


def slow(lm, passages, values):
    """{"ce", "kl"} of the scored rows, one window at a time through the plain model.

    Args:
      values: {site: float32 [n, d_model]}, what is put in.
    """
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
    return rng.normal(size=(len(passages.rows), 8)).astype(np.float32)


@pytest.mark.parametrize("kind", ["resid_pre", "mlp_out"])
def test_effects_are_those_of_the_plain_model(lm, passages, kind):
    site = Site(1, kind)
    values = values_of(passages, 1)
    found = splicer(lm, passages, site).effects(site, {"noise": values})["noise"]
    expected = slow(lm, passages, {site: values})
    np.testing.assert_allclose(found.ce, expected["ce"], atol=1e-4)
    np.testing.assert_allclose(found.kl, expected["kl"], atol=1e-4)
    assert found.kl.max() > 0.1


def test_its_own_activations_change_nothing(lm, passages):
    site = Site(1)
    run = splicer(lm, passages, site)
    found = run.effects(site, {"own": run.clean(site), "zero": np.zeros(8, np.float32)})
    np.testing.assert_allclose(found["own"].ce, found["clean"].ce, atol=1e-6)
    np.testing.assert_allclose(found["own"].kl, 0, atol=1e-6)
    assert np.abs(found["zero"].ce - found["clean"].ce).max() > 0.1
    assert (found["clean"].kl == 0).all()


def test_clean_activations_are_those_at_the_paired_positions(lm, passages):
    site = Site(2)
    found = splicer(lm, passages, site).clean(site)
    for w, tokens in enumerate(passages.tokens):
        padded = np.pad(tokens, (0, max(LENGTHS) - len(tokens)))
        x = models.capture(lm, padded[None], [site])[site][0]
        rows = passages.window == w
        np.testing.assert_allclose(found[rows], x[passages.position[rows]], atol=1e-5)


def test_only_paired_positions_are_edited(lm, passages):
    """What comes before the first edit of a window stays; an edit of no row is no edit."""
    site = Site(1)
    run = splicer(lm, passages, site)
    values = run.clean(site)
    last = np.flatnonzero((passages.window == 0) & (passages.position == 9))
    values[last, 0] += 3  # one direction alone: a norm would take out a shift of all
    effect = run.effects(site, {"one": values})["one"]
    scored = np.flatnonzero(passages.scored)
    reached = (passages.window == 0) & (passages.position >= 9)
    np.testing.assert_allclose(effect.kl[~reached[scored]], 0, atol=1e-6)
    assert effect.kl[reached[scored]].min() > 1e-4


def test_whole_spans_take_what_is_put_at_their_end(lm, passages):
    """The plain model with one more row for every token inside a span."""
    site = Site(1)
    first = np.where(
        passages.position % 2 == 1, np.maximum(passages.position - 1, 1), passages.position
    )
    spans = dataclasses.replace(passages, first=first)
    values = np.random.default_rng(3).normal(size=(len(first), 8)).astype(np.float32)
    found = splicer(lm, spans, site).effects(site, {"x": values, "v": values[0]})
    inner = np.flatnonzero(first < passages.position)
    assert len(inner) > 5
    more = Passages(
        tokens=passages.tokens,
        rows=np.arange(len(first) + len(inner)),
        window=np.concatenate([passages.window, passages.window[inner]]),
        position=np.concatenate([passages.position, first[inner]]),
        document=np.concatenate([passages.document, passages.document[inner]]),
    )
    each = np.concatenate([values, values[inner]])
    expected = splicer(lm, more, site).effects(site, {"x": each, "v": values[0]})
    for name in ("x", "v"):
        own = expected[name].ce[: len(found[name].ce)]
        np.testing.assert_allclose(found[name].ce, own, atol=1e-5)
    alone = splicer(lm, passages, site).effects(site, {"x": values})["x"]
    assert np.abs(found["x"].ce - alone.ce).max() > 0.01


def test_positions_without_a_next_token_are_not_scored(lm, passages):
    site = Site(1)
    effect = splicer(lm, passages, site).effects(site, {})["clean"]
    ends = sum(passages.position == np.array(LENGTHS)[passages.window] - 1)
    assert len(effect.ce) == len(passages.rows) - ends == passages.scored.sum()


def test_the_size_of_a_batch_changes_nothing(lm, passages):
    site, values = Site(1), np.zeros(8, np.float32)
    small, large = (
        splicer(lm, passages, site, size).effects(site, {"zero": values})["zero"]
        for size in (1, 20)
    )
    np.testing.assert_allclose(small.ce, large.ce, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "size", "shapes"),
    [
        ([10] * 9, 4, [(3, 10)] * 3),  # as equal as they can be, not 4, 4, 1
        ([10, 3, 10, 4, 3], 4, [(3, 4), (2, 10)]),  # short ones apart
        ([10, 9, 10, 10], 4, [(4, 10)]),  # nothing to save
        ([7], 4, [(1, 7)]),
    ],
)
def test_windows_are_padded_little(lengths, size, shapes):
    tokens = tuple(np.full(n, i, np.int32) for i, n in enumerate(lengths))
    window, position = np.array([(i, 0) for i in range(len(lengths))]).T
    passages = Passages(tokens, np.arange(len(lengths)), window, position, window)
    batches = splice.batches(passages, size=size, devices=1)
    assert [b.tokens.shape for b in batches] == shapes
    assert sorted(np.concatenate([b.rows for b in batches])) == list(range(len(lengths)))
    for batch in batches:
        assert (batch.tokens[batch.at] == batch.rows).all()


@pytest.mark.mesh
def test_no_large_array_is_gathered_across_devices(lm, passages):
    run = splicer(lm, passages, Site(1))
    tokens, x = run._put(run._batches[-1].tokens), run._put(run._clean[Site(1)][-1])
    how = (run._graphdef, Site(1), run._dtype, run._params, tokens, x)
    assert jax.device_count() > 1
    assert "all-gather" not in splice._clean_pass.lower(*how).compile().as_text()


def test_loss_recovered_is_a_share_and_undefined_where_nothing_is_lost():
    clean, zero = Effect(np.array([1.0, 2, 3]), np.zeros(3)), Effect(np.full(3, 4.0), np.ones(3))
    edited = Effect(np.array([1.0, 3, 4]), np.ones(3))
    draws = stats.draw(np.array([0, 0, 1]), count=20, seed=0)
    found = loss_recovered(edited, clean=clean, baseline=zero, resamples=draws)
    assert found.value == pytest.approx((12 - 8) / (12 - 6))
    assert set(np.round(found.samples, 9)) <= {0.0, round(4 / 5, 9), round(4 / 6, 9)}
    harmless = Effect(clean.ce + 0.04, np.zeros(3))
    assert loss_recovered(edited, clean=clean, baseline=harmless, resamples=draws) is None


# ---------------------------------------------------------------- several sites at once


@pytest.mark.parametrize("kind", ["resid_pre", "mlp_out"])
def test_several_sites_are_those_of_the_plain_model(lm, passages, kind):
    sites = (Site(2, kind), Site(0, kind))  # in any order
    values = {site: values_of(passages, site.layer) for site in sites}
    run = Splicer(lm, passages, sites=sites, batch_size=2)
    found = run.effects(sites, {"noise": values})["noise"]
    expected = slow(lm, passages, values)
    np.testing.assert_allclose(found.ce, expected["ce"], atol=1e-4)
    for site in sites:
        alone = run.effects(site, {"noise": values[site]})["noise"]
        assert np.abs(alone.ce - found.ce).max() > 0.05


def test_where_all_positions_are_paired_the_highest_layer_decides(lm):
    rng = np.random.default_rng(2)
    tokens = tuple(rng.integers(0, 40, n).astype(np.int32) for n in (9, 5))
    window, position = np.array([(w, p) for w, t in enumerate(tokens) for p in range(len(t))]).T
    every = Passages(tokens, np.arange(len(window)), window, position, window)
    sites = (Site(0), Site(1), Site(2))
    values = {site: values_of(every, site.layer) for site in sites}
    run = Splicer(lm, every, sites=sites, batch_size=2)
    together = run.effects(sites, {"noise": values})["noise"]
    highest = run.effects(sites[-1], {"noise": values[sites[-1]]})["noise"]
    np.testing.assert_allclose(together.ce, highest.ce, atol=1e-5)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    """Rows of causal.jsonl of a run with two layer pairs, and the run."""
    config = tiny_run.make_config(tmp_path_factory.mktemp("two"))
    config = dataclasses.replace(
        config, layers=(0, 1), map=dataclasses.replace(config.map, kinds=("mean", "ridge"))
    )
    work = tiny_run.open_workdir(tmp_path_factory.mktemp("run") / "run", tiny_run.to_dict(config))
    store = tiny_run.extract(config, work)
    for i, (name, site) in enumerate((n, Site(layer)) for n in "ab" for layer in (0, 1)):
        size = {"d_model": store.d_model(name), "width": 32, "k": 6, "key": jax.random.key(i)}
        dictionaries.save(tiny_run.build("topk", **size), work.dictionary(name, site))
    maps.fit_maps(config, store, work)
    intervene(config, work)
    return read_jsonl(work.result("causal.jsonl")), config, work


def test_all_layers_are_stitched_together_too(two_layers):
    rows, _, _ = two_layers
    single = [row for row in rows if "sites" not in row]
    together = [row for row in rows if "sites" in row]
    assert rows == single + together
    assert {r["intervention"] for r in single} == {"stitching", "control"}
    assert {r["intervention"] for r in together} == {"stitching_together", "control_together"}
    assert len(single) == 2 * len(together)
    for row in together:
        assert row["sites"] == ["resid_pre.0", "resid_pre.1"]
        assert row["site_target"] == "resid_pre.0+resid_pre.1"
        assert row["ce_low"] <= row["ce"] <= row["ce_high"]
    clean = {(r["target"], r["ce"]) for r in rows if r["control"] == "clean"}
    assert len(clean) == 2  # one for each model, whatever the sites


def test_together_every_layer_takes_its_own_prediction(two_layers):
    rows, config, work = two_layers
    store = open_store(work.activations)
    passages = splice.select_passages(store, "b", documents=6, seed=config.seed)
    values = {}
    for site in (Site(0), Site(1)):
        m = maps.load(work.map("a", "b", site, site, "ridge"))
        x = store.read("a", site, passages.rows).astype(np.float32)
        values[site] = np.asarray(m.activation(x))
    expected = slow(models.load(store.paths[1]), passages, values)
    wanted = {"source": "a", "map": "ridge", "pairing": "aligned", "stitch_kind": "activation"}
    (row,) = [r for r in rows if "sites" in r and wanted.items() <= r.items()]
    assert row["ce"] == pytest.approx(expected["ce"].mean(), abs=1e-3)


def test_of_pairs_into_one_site_the_first_counts():
    task = functools.partial(maps.Task, "a", "b", kind="ridge", pairing="aligned")
    tasks = [task(Site(i), Site(j)) for i, j in ((4, 7), (5, 7), (3, 6))]
    store = types.SimpleNamespace(output_of=lambda model, site: (model, site))
    *single, (sites, (bundle,)) = stitching.bundles_by_sites(tasks, store)["b"].items()
    assert [len(bundles) for _, bundles in single] == [2, 1]
    assert sites == (Site(6), Site(7))
    assert [(t.site_source.layer, t.site_target.layer) for t in bundle] == [(3, 6), (4, 7)]
    assert len(stitching.bundles_by_sites(tasks[:2], store)["b"]) == 1


# ---------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config, work = tiny_run.shared_run(tmp_path_factory.getbasetemp())
    intervene(config, work)
    return config, work


@pytest.fixture
def copy(finished, tmp_path):
    config, work = finished
    shutil.copytree(work.root, tmp_path / "run")
    return config, Workdir(tmp_path / "run")


def test_passages_are_test_rows_with_the_tokens_that_end_there(finished):
    _, work = finished
    store = open_store(work.activations)
    for name in store.models:
        found = splice.select_passages(store, name, documents=4, seed=0)
        assert len(set(found.document)) == 4
        assert set(found.rows) <= set(store.select("test"))
        assert (store.rows.document[found.rows] == found.document).all()
        ended = [found.tokens[w][p] for w, p in zip(found.window, found.position)]
        assert ended == store.tokens(name, found.rows).tolist()
    first, second = (splice.select_passages(store, n, documents=4, seed=0) for n in "ab")
    assert (first.rows == second.rows).all()
    other = splice.select_passages(store, "a", documents=4, seed=1)
    assert set(other.document) != set(first.document)


def test_a_bos_stands_in_front_of_every_window(finished, monkeypatch):
    _, work = finished
    store = open_store(work.activations)
    plain = splice.select_passages(store, "a", documents=2, seed=0)
    monkeypatch.setattr(type(store), "has_bos", lambda self, model: 7)
    with_bos = splice.select_passages(store, "a", documents=2, seed=0)
    assert all(t[0] == 7 for t in with_bos.tokens)
    assert all((t[1:] == u).all() for t, u in zip(with_bos.tokens, plain.tokens))
    assert (with_bos.position == plain.position + 1).all()


def test_every_map_is_stitched_aligned_and_shuffled(finished):
    config, work = finished
    rows = read_jsonl(work.result("causal.jsonl"))
    kinds = [
        ("mean", "features"),
        ("token", "features"),
        ("ridge", "activation"),
        ("ridge", "features"),
        ("mlp", "features"),
    ]
    for source, target in (("a", "b"), ("b", "a")):
        controls = [r for r in rows if r["control"] and r["target"] == target]
        assert [r["control"] for r in controls] == ["clean", "zero", "mean", "own_sae"]
        stitched = [r for r in rows if r["source"] == source]
        assert [(r["pairing"], r["map"], r["stitch_kind"]) for r in stitched] == [
            (pairing, *kind) for pairing in ("aligned", "shuffled") for kind in kinds
        ]
        assert {(r["target"], r["site_source"], r["site_target"]) for r in stitched} == {
            (target, str(tiny_run.SITE), str(tiny_run.SITE))
        }
    assert len(rows) == 2 * (4 + 10)
    assert {r["n_documents"] for r in rows} == {config.intervention.documents}


def test_numbers_hang_together(finished):
    _, work = finished
    rows = read_jsonl(work.result("causal.jsonl"))
    controls = {(r["target"], r["control"]): r for r in rows if r["control"]}
    for row in rows:
        clean, zero = (controls[row["target"], name]["ce"] for name in ("clean", "zero"))
        assert (row["loss_recovered"] is None) == (zero - clean < 0.05)
        if row["loss_recovered"] is not None:
            assert row["loss_recovered"] == pytest.approx((zero - row["ce"]) / (zero - clean))
        assert row["ce_low"] <= row["ce"] <= row["ce_high"]
        assert row["kl"] == 0 if row["control"] == "clean" else row["kl"] > 0


def test_the_rows_put_in_what_the_map_says(finished):
    """One map again, through the plain model, both ways of stitching."""
    config, work = finished
    store = open_store(work.activations)
    passages = splice.select_passages(
        store, "b", documents=config.intervention.documents, seed=config.seed
    )
    m = maps.load(work.map("a", "b", tiny_run.SITE, tiny_run.SITE, "ridge"))
    x = store.read("a", tiny_run.SITE, passages.rows).astype(np.float32)
    own = dictionaries.load(work.dictionary("b", tiny_run.SITE))
    lm = models.load(store.paths[1])
    rows = [r for r in read_jsonl(work.result("causal.jsonl")) if r["source"] == "a"]
    for stitch_kind, values in (("activation", m.activation(x)), ("features", own.decode(m(x)))):
        expected = slow(lm, passages, {tiny_run.SITE: np.asarray(values)})
        wanted = {"map": "ridge", "pairing": "aligned", "stitch_kind": stitch_kind}
        row = next(r for r in rows if wanted.items() <= r.items())
        assert row["ce"] == pytest.approx(expected["ce"].mean(), abs=1e-3)
        assert row["kl"] == pytest.approx(expected["kl"].mean(), abs=1e-3)
        assert row["n_positions"] == len(expected["ce"])


def test_a_shuffled_map_is_shown_shuffled_rows(finished):
    """The token table of shuffled pairs knows nothing: it is as far off as the mean."""
    _, work = finished
    rows = read_jsonl(work.result("causal.jsonl"))
    kl = {(r["source"], r["pairing"], r["map"]): r["kl"] for r in rows if not r["control"]}
    for source in "ab":
        mean = kl[source, "shuffled", "mean"]
        assert kl[source, "shuffled", "token"] == pytest.approx(mean, rel=0.2)
        assert kl[source, "aligned", "token"] < 0.9 * mean


def test_a_finished_file_is_left_and_a_changed_input_is_seen(copy):
    config, work = copy
    path = work.result("causal.jsonl")
    before, time = path.read_bytes(), path.stat().st_mtime_ns
    intervene(config, work)
    assert path.stat().st_mtime_ns == time
    stamp = work.result("intervene.inputs.json")
    stamp.write_text(json.dumps(read_json(stamp) | {"store": "another"}))
    intervene(config, work)
    assert path.stat().st_mtime_ns > time
    assert path.read_bytes() == before


def test_an_altered_map_is_named_even_if_the_results_are_there(copy):
    config, work = copy
    folder = work.map("a", "b", tiny_run.SITE, tiny_run.SITE, "ridge")
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(UserError, match="altered or cut short"):
        intervene(config, work)


def test_spans_are_edited_as_asked(tmp_path_factory):
    """Stitching's own passages: the last token of every span, or all of them."""
    config, work = tiny_run.shared_run(tmp_path_factory.getbasetemp())
    store = open_store(work.activations)
    changed = dataclasses.replace(config.intervention, span="whole")
    asked = dataclasses.replace(config, intervention=changed)
    plain, whole = (stitching.passages_of_test(c, store, "a") for c in (config, asked))
    assert plain.first is None
    assert (whole.first <= whole.position).all() and (whole.first < whole.position).any()


@pytest.mark.parametrize("field", ["documents", "batch_size"])
def test_settings_of_nothing_are_refused(finished, field, tmp_path):
    config, work = finished
    shutil.copytree(work.root, tmp_path / "run")
    given = tiny_run.Config(**vars(config))
    given.intervention = tiny_run.InterventionConfig(**{field: 0})
    with pytest.raises(UserError, match=f"intervention.{field}=0"):
        intervene(given, Workdir(tmp_path / "run"))
