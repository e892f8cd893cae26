"""Stitching: every map and control has its row, and rows are what the plain model does."""

import functools
import types

import numpy as np
import pytest
import tiny_run
from test_run import slow
from tiny_run import changed

from crossdict_jax import dictionaries, maps, models
from crossdict_jax.activations.store import open_store
from crossdict_jax.causal import intervene, stitching
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.models import Site
from crossdict_jax.workdir import read_jsonl


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    """Rows of causal.jsonl of a run with two layer pairs, and the run."""
    config = tiny_run.make_config(tmp_path_factory.mktemp("two"))
    config = changed(config, layers=(0, 1), map__kinds=("ridge",))
    store, work = tiny_run.extracted(config, tmp_path_factory.mktemp("run") / "run")
    tiny_run.save_dictionaries(store, work)
    maps.fit_maps(config, store, work)
    intervene(config, work)
    return read_jsonl(work.result("causal.jsonl")), config, work


def test_all_layers_are_stitched_together_too_each_with_its_own_prediction(two_layers):
    rows, config, work = two_layers
    single = [row for row in rows if "sites" not in row]
    together = [row for row in rows if "sites" in row]
    assert rows == single + together and len(single) == 2 * len(together)
    assert {r["intervention"] for r in single} == {"stitching", "control"}
    assert {r["intervention"] for r in together} == {"stitching_together", "control_together"}
    for row in together:
        assert row["sites"] == ["resid_pre.0", "resid_pre.1"]
        assert row["site_target"] == "resid_pre.0+resid_pre.1"
        assert row["ce_low"] <= row["ce"] <= row["ce_high"]
    clean = {(r["target"], r["ce"]) for r in rows if r["control"] == "clean"}
    assert len(clean) == 2  # one for each model, whatever the sites
    store, values = open_store(work.activations), {}
    passages = FinishedRun(config, work).passages("b")
    for site in (Site(0), Site(1)):
        m = maps.load(work.map("a", "b", site, site, "ridge"))
        values[site] = np.asarray(m.activation(store.read("a", site, passages.rows)))
    expected = slow(models.load(store.paths[1]), passages, values)
    wanted = {"source": "a", "map": "ridge", "pairing": "aligned", "stitch_kind": "activation"}
    (row,) = [r for r in together if wanted.items() <= r.items()]
    assert row["ce"] == pytest.approx(expected["ce"].mean(), abs=1e-3)


def test_predictions_in_several_portions_give_the_same_rows(two_layers, monkeypatch):
    rows, config, work = two_layers
    monkeypatch.setattr(stitching, "PREDICTED", 1)  # each family of maps is a portion
    work.result("causal.jsonl").unlink()
    intervene(config, work)
    assert read_jsonl(work.result("causal.jsonl")) == rows


def test_of_pairs_into_one_site_the_first_counts():
    task = functools.partial(maps.Task, "a", "b", kind="ridge", pairing="aligned")
    tasks = [task(Site(i), Site(j)) for i, j in ((4, 7), (5, 7), (3, 6))]
    store = types.SimpleNamespace(output_of=lambda model, site: (model, site))
    *single, (sites, (bundle,)) = stitching.bundles_by_sites(tasks, store)["b"].items()
    assert [len(bundles) for _, bundles in single] == [2, 1] and sites == (Site(6), Site(7))
    assert [(t.site_source.layer, t.site_target.layer) for t in bundle] == [(3, 6), (4, 7)]
    assert len(stitching.bundles_by_sites(tasks[:2], store)["b"]) == 1


@pytest.fixture(scope="module")
def finished(shared):
    intervene(*shared)
    return shared


def test_every_map_is_stitched_aligned_and_shuffled(finished):
    config, work = finished
    rows = read_jsonl(work.result("causal.jsonl"))
    kinds = [(kind, "features") for kind in ("mean", "token", "ridge", "mlp")]
    kinds.insert(2, ("ridge", "activation"))
    for source, target in (("a", "b"), ("b", "a")):
        controls = [r for r in rows if r["control"] and r["target"] == target]
        assert [r["control"] for r in controls] == ["clean", "zero", "mean", "own_sae"]
        ways = [(r["pairing"], r["map"], r["stitch_kind"]) for r in rows if r["source"] == source]
        assert ways == [(pairing, *kind) for pairing in ("aligned", "shuffled") for kind in kinds]
    assert len(rows) == 2 * (4 + 10)
    assert {r["n_documents"] for r in rows} == {config.intervention.documents}


def test_numbers_hang_together_and_a_shuffled_map_is_shown_shuffled_rows(finished):
    rows = read_jsonl(finished[1].result("causal.jsonl"))
    controls = {(r["target"], r["control"]): r for r in rows if r["control"]}
    for row in rows:
        clean, zero = (controls[row["target"], name]["ce"] for name in ("clean", "zero"))
        assert (row["loss_recovered"] is None) == (zero - clean < 0.05)
        if row["loss_recovered"] is not None:
            assert row["loss_recovered"] == pytest.approx((zero - row["ce"]) / (zero - clean))
        assert row["ce_low"] <= row["ce"] <= row["ce_high"]
        assert row["kl"] == 0 if row["control"] == "clean" else row["kl"] > 0
    kl = {(r["source"], r["pairing"], r["map"]): r["kl"] for r in rows if not r["control"]}
    for source in "ab":  # the token table of shuffled pairs is as far off as the mean
        mean = kl[source, "shuffled", "mean"]
        assert kl[source, "shuffled", "token"] == pytest.approx(mean, rel=0.2)
        assert kl[source, "aligned", "token"] < 0.9 * mean


def test_the_rows_put_in_what_the_map_says(finished):
    """One map again, through the plain model, both ways of stitching."""
    config, work = finished
    store = open_store(work.activations)
    passages = FinishedRun(config, work).passages("b")
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


def test_spans_are_edited_as_asked(finished):
    """The last token of every span, or all of them."""
    config, work = finished
    asked = changed(config, intervention__span="whole")
    plain, whole = (stitching.Target(FinishedRun(c, work), "a").passages for c in (config, asked))
    assert plain.first is None
    assert (whole.first <= whole.position).all() and (whole.first < whole.position).any()
