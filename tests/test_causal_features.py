"""The stage that puts features of one model into another: files, settings, resume, bad input."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_run
from planted_store import kill_in_save
from tiny_run import changed, refused

from crossdict_jax import dictionaries, models, results
from crossdict_jax.activations.passages import select_passages, with_continuations
from crossdict_jax.activations.store import open_store
from crossdict_jax.causal import effects, transfer_features
from crossdict_jax.causal import feature_transfer as stage
from crossdict_jax.causal.directions import map_groups
from crossdict_jax.config import Config
from crossdict_jax.workdir import Workdir, read_jsonl

SMALL = {"features": 2, "contexts": 6, "alphas": (0.3, 1.0), "maps": ("ridge", "mlp")}
PARTS = "transfer_features.parts.jsonl"


def settings(config: Config, **changes) -> Config:
    return changed(config, **{f"intervention__{k}": v for k, v in (SMALL | changes).items()})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config, work = tiny_run.private_run(tmp_path_factory)
    work.result("matches.jsonl").unlink(missing_ok=True)  # where others' tests have evaluated
    transfer_features(settings(config), work)
    return settings(config), work


def again(finished, tmp_path, **changes):
    """Runs the stage on a copy with changed settings; returns its rows."""
    config, copy = finished[0], Workdir(tmp_path / "run")
    if not copy.root.exists():
        tiny_run.copied(finished, tmp_path)
    transfer_features(settings(config, **changes), copy)
    return read_jsonl(copy.result(stage.ROWS))


def test_a_row_for_every_feature_and_direction(finished):
    _, work = finished
    rows, summary = (read_jsonl(work.result(name)) for name in (stage.ROWS, stage.SUMMARY))
    names = ["ridge", "mlp", "match"]
    for source, target in (("a", "b"), ("b", "a")):
        rows_of = [r for r in rows if (r["source"], r["target"]) == (source, target)]
        assert [r["direction"] for r in rows_of] == [name for name in names for _ in range(2)]
        assert len({r["feature"] for r in rows_of}) == 2
        assert {r["site_source"] for r in rows_of} == {str(tiny_run.SITE)}
        assert [s["direction"] for s in summary if s["source"] == source] == names
    assert all(s["n_features"] == 2 for s in summary) and not work.result(PARTS).exists()


def test_a_match_is_the_best_correlated_feature(finished):
    _, work = finished
    store = open_store(work.activations)
    x = {name: store.read(name, tiny_run.SITE, store.select("train")) for name in "ab"}
    f = {n: dictionaries.load(work.dictionary(n, tiny_run.SITE)).encode(x[n]) for n in "ab"}
    for row in read_jsonl(work.result(stage.ROWS)):
        columns = np.asarray(f[row["target"]]).T
        source = np.asarray(f[row["source"]])[:, row["feature"]]
        with np.errstate(invalid="ignore"):
            r = [np.corrcoef(source, column)[0, 1] if column.any() else 0 for column in columns]
        assert row["match"] == np.argmax(r) and row["match_r"] == pytest.approx(max(r), abs=1e-5)


def test_spans_lie_between_common_ends(finished):
    """Spans and continuations of both models stand for the same bytes."""
    _, work = finished
    store = open_store(work.activations)
    seen = 0
    for name in "ab":
        passages = select_passages(store, name, documents=4, seed=0)
        passages = with_continuations(store, name, passages)
        position = store.rows.position[:, store.models.index(name)]
        for i, row in enumerate(passages.rows):
            window = store.rows.window == store.rows.window[row]
            ends = np.sort(position[window])
            before, behind = ends[ends < position[row]], ends[ends > position[row]]
            assert passages.first[i] == (before[-1] + 1 if len(before) else position[row])
            assert passages.position[i] == position[row]
            assert passages.end[i] == (behind[0] if len(behind) else position[row])
            seen += passages.first[i] < passages.position[i]
    assert seen  # some spans are of several tokens


def test_a_killed_stage_goes_on_behind_its_last_feature(finished, tmp_path, monkeypatch):
    _, work = finished
    config, copy = tiny_run.copied(finished, tmp_path)
    for name in (stage.ROWS, stage.SUMMARY, "transfer_features.inputs.json"):
        copy.result(name).unlink()
    kill_in_save(4, lambda: transfer_features(config, copy), effects, "measure")
    with copy.result(PARTS).open("a") as file:
        file.write('{"key": "a cut-off li')
    measure, done = effects.measure, []
    monkeypatch.setattr(effects, "measure", lambda *given: done.append(1) or measure(*given))
    transfer_features(config, copy)
    assert len(done) == 1
    for name in (stage.ROWS, stage.SUMMARY):
        assert copy.result(name).read_bytes() == work.result(name).read_bytes()


def test_named_features_are_the_first_models(finished, tmp_path, monkeypatch, capsys):
    run = finished, tmp_path
    found = {r["feature"] for r in read_jsonl(finished[1].result(stage.ROWS))[:2]}
    rows = again(*run, feature_ids=tuple(found), features=0)
    assert {r["source"] for r in rows} == {"a"} and {r["feature"] for r in rows} == found
    refused(r"feature_ids=99: .*features 0 to 31, not 99", again, *run, feature_ids=(99,))
    monkeypatch.setattr(stage, "LEAST_FIRINGS", 10**6)
    refused(r"feature 3 of a at resid_pre.1 is dead", again, *run, feature_ids=(3,))
    assert again(*run, documents=4) == []  # a direction with nothing to test has no rows
    assert "No feature of a at resid_pre.1 fires" in capsys.readouterr().out


def test_matched_features_come_from_the_file(finished, tmp_path):
    """Confirmed ones first, then by correlation; matches have no direction."""
    _, work = finished
    live = [r["feature"] for r in read_jsonl(work.result(stage.ROWS)) if r["direction"] == "ridge"]
    (i, j), (k, m) = live[:2], live[2:]
    site = str(tiny_run.SITE)
    where = {"source": "a", "target": "b", "site_source": site, "site_target": site}
    listed = [(i, k, False, 0.9), (j, m, True, 0.5)]
    keys = ("feature_source", "feature_target", "confirmed", "r_train")
    refused(r"needs results/matches.jsonl", again, finished, tmp_path, choose="matched")
    rows = [where | dict(zip(keys, match)) for match in listed]
    results.write(Workdir(tmp_path / "run"), "matches.jsonl", rows)
    found = again(finished, tmp_path, choose="matched")
    assert [r["feature"] for r in found if r["direction"] == "ridge"] == [j, i, m, k]


def test_all_layer_pairs_or_the_middle_one(finished):
    config, work = finished
    store = open_store(work.activations)
    config = changed(config, layers=(0, 1, 2))
    meta = json.loads(json.dumps(store.meta))
    for model in meta["models"].values():
        model["sites"] = [str(models.Site(layer)) for layer in config.layers]
    store = dataclasses.replace(store, ends=type(store.ends).of_meta(meta["models"]))
    middle = map_groups(config, store, layers="middle", kinds=("all",))
    assert [(g.source, g.site_source.layer) for g in middle] == [("a", 1), ("b", 1)]
    assert len(map_groups(config, store, layers="all", kinds=("all",))) == 6
    assert all(task.pairing == "aligned" for group in middle for task in group.tasks)
