"""Controls of maps: ceiling and re-initialised models, planted, and turned off."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_run
from map_problems import inputs_of, signed_dictionary
from test_models import EACH_FAMILY, GOLDENS
from tiny_run import changed, copied, refused

from crossdict_jax import dictionaries, maps, models, modules
from crossdict_jax.activations.extract import extract
from crossdict_jax.activations.passages import passages_of
from crossdict_jax.activations.store import open_store
from crossdict_jax.activations.untrained import KEYS, draw_again, extract_untrained, open_controls
from crossdict_jax.config import Config, controlled_layers
from crossdict_jax.dictionaries import train
from crossdict_jax.dictionaries.architectures import relu
from crossdict_jax.dictionaries.base import from_arrays
from crossdict_jax.evaluation import evaluate
from crossdict_jax.evaluation.scoring import score_tasks
from crossdict_jax.evaluation.transfer import MARGIN, NORMALIZED
from crossdict_jax.maps.fit import Loader, control_tasks, fit_controls, shown
from crossdict_jax.models.run import Runner
from crossdict_jax.training.checkpoint import is_finished
from crossdict_jax.workdir import Workdir, file_digest, read_jsonl

BOTH = ("ceiling", "untrained")
SITE = tiny_run.SITE


@pytest.fixture(scope="module")
def begun(shared):
    """(config, work directory) of a run whose controls have not been begun."""
    few = {"sae__steps": 4, "sae__batch_size": 64, "checkpoint_every": 2}
    return changed(shared[0], controls=BOTH, **few), shared[1]


@pytest.fixture(scope="module")
def finished(begun, tmp_path_factory):
    """After all that the commands do for controls, but that networks are not trained."""
    config, work = copied(begun, tmp_path_factory.mktemp("finished"))
    store = open_store(work.activations)
    controls = extract_untrained(config, work, store)
    train.train_dictionaries(config, store, work, controls)
    loader = Loader(config, open_controls(config, work, store), work)
    for task in control_tasks(config, store):
        if task.kind == "mlp" and not is_finished(task.path(work)):
            folder = loader.ends(task)[1][2]
            maps.save(tiny_run.network(folder), task.path(work), dictionary=folder)
    fit_controls(config, store, work)
    evaluate(config, work)
    return config, work


def rows_of(work: Workdir, name: str = "controls.jsonl") -> list[dict]:
    return read_jsonl(work.result(name))


def test_every_parameter_of_a_re_initialised_model_is_drawn_anew():
    drawn = {}
    for variant in EACH_FAMILY:
        lm = models.load(GOLDENS / variant)
        fresh = draw_again(lm, 0, 0)
        before, after = (modules.split(m)[1] for m in (lm, fresh))
        same = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), before, after)
        assert not any(jax.tree.leaves(same))
        assert jax.tree.map(np.shape, before) == jax.tree.map(np.shape, after)
        assert fresh.config == lm.config
        assert float(np.std(after["W_E"])) == pytest.approx(lm.config.init_std, rel=0.05)
    for seeds in ((0, 0), (1, 0), (0, 1)):  # of the run, and of the model in it
        drawn[seeds] = np.asarray(draw_again(lm, *seeds).W_E[...])
    assert (drawn[0, 0] == np.asarray(fresh.W_E[...])).all()
    assert not (drawn[0, 0] == drawn[1, 0]).any() and not (drawn[0, 0] == drawn[0, 1]).any()


def test_re_initialised_models_are_read_at_the_rows_of_the_run(finished):
    config, work = finished
    store, controls = open_store(work.activations), open_store(work.controls.activations)
    assert controls.models == (*store.models, "a-untrained", "b-untrained")
    for key in KEYS:
        assert (getattr(controls.rows, key) == getattr(store.rows, key)).all()
    rows = store.select("test")[:50]
    for i, (name, redrawn) in enumerate(zip(store.models, controls.models[2:])):
        assert (controls.tokens(redrawn, rows) == store.tokens(name, rows)).all()
        assert (controls.read(name, SITE, rows) == store.read(name, SITE, rows)).all()
        lm = draw_again(models.load(store.paths[i]), config.seed, i)
        passages = passages_of(store, name, rows)
        expected = Runner(lm, batch_size=8).read_at(passages, [SITE])[0]
        there = controls.read(redrawn, SITE, rows).astype(np.float32)
        assert np.allclose(there, expected, rtol=2e-2, atol=2e-3)  # bfloat16
        assert abs(there - store.read(name, SITE, rows).astype(np.float32)).max() > 0.05


def test_a_store_with_other_rows_is_refused(finished, tmp_path):
    config, work = copied(finished, tmp_path)
    path = work.controls.activations / "rows-keep.npy"
    np.save(path, ~np.load(path))
    meta = json.loads((work.controls.activations / "meta.json").read_text())
    meta["checksums"]["rows-keep.npy"] = file_digest(path)
    del meta["seal"]
    (work.controls.activations / "meta.json").write_text(json.dumps(meta))
    refused("has other rows than", evaluate, config, work)


def planted(begun, root, second) -> dict[tuple, dict]:
    """{(target, map): scores of its ceiling} where second dictionaries are ``second(d_model)``."""
    config, work = begun
    kinds = ("mean", "token", "ridge", "ridge_codes", "token_ridge")
    config = changed(config, controls=("ceiling",), map__kinds=kinds)
    shutil.copytree(work.root, root, ignore=shutil.ignore_patterns("maps"))
    work, store = Workdir(root), open_store(work.activations)
    for name in store.models:
        d_model = store.d_model(name)
        shutil.rmtree(work.dictionary(name, SITE))
        dictionaries.save(signed_dictionary(d_model), work.dictionary(name, SITE))
        dictionaries.save(second(d_model), work.controls.dictionary(name, SITE, "seed-1"))
    fit_controls(config, store, work)
    tasks, loader, rows = control_tasks(config, store), Loader(config, store, work), {}
    for target in "ab":
        scored = score_tasks([t for t in tasks if t.target == target], loader)
        rows |= {(target, kind): score.row() for kind, score in scored.scores.items()}
    return rows


def test_two_seeds_that_are_one_dictionary_reordered_share_everything(begun, tmp_path):
    rng = np.random.default_rng(0)
    rows = planted(begun, tmp_path / "run", lambda d: signed_dictionary(d, rng.permutation(2 * d)))
    for target in "ab":
        for kind in ("ridge", "ridge_codes", "token_ridge"):
            assert rows[target, kind]["r2"] == pytest.approx(1, abs=1e-3)
            assert rows[target, kind]["top1"] == 1
        assert rows[target, "mean"]["r2"] == pytest.approx(0, abs=0.02)


def test_two_seeds_that_have_nothing_to_do_with_each_other_share_nothing(begun, tmp_path):
    def blind(d_model):  # its features are the same for every row
        arrays = {"W_enc": np.zeros((d_model, 8)), "W_dec": np.ones((8, d_model))}
        return from_arrays(relu.ReLU, arrays | {"b_enc": np.ones(8), "b_dec": np.zeros(d_model)})

    rows = planted(begun, tmp_path / "run", blind)
    for target in "ab":
        assert abs(rows[target, "ridge"]["cosine_centered"]) < 0.05
        assert rows[target, "ridge"]["r2"] < 0.02
        assert abs(rows[target, "ridge_codes"]["r2"]) < 0.02
        beside = rows[target, "token"]["r2"]
        assert rows[target, "token_ridge"]["r2"] == pytest.approx(beside, abs=0.2)


def test_a_ceiling_reads_what_the_second_dictionary_makes_of_the_target(finished):
    config, work = finished
    store = open_store(work.activations)
    loader = Loader(config, open_controls(config, work, store), work)
    second = dictionaries.load(work.controls.dictionary("b", SITE, "seed-1"))
    x = store.read("b", SITE, store.select("test")).astype(np.float32)
    for task in control_tasks(config, store):
        if task.control != "ceiling" or task.target != "b":
            continue
        pairs = shown(task, loader.rows(task, "test"))
        inputs = inputs_of(maps.load(task.path(work)), pairs)
        expected = {"activations": second(x), "features": second.encode(x)}
        expected["tokens"] = store.tokens("b", store.select("test"))
        assert np.allclose(inputs, expected[maps.base.map_class(task.kind).reads], atol=1e-4)


def test_every_aligned_map_has_its_controls_with_the_same_columns(finished):
    _, work = finished
    aligned = [r for r in rows_of(work, "transfer.jsonl") if r["pairing"] == "aligned"]
    of_maps = [r for r in aligned if r["map"] != "token_target"]
    keys = ("source", "target", "site_source", "site_target", "map", "pairing")
    expected = [(control, *(r[k] for k in keys)) for r in of_maps for control in BOTH]
    found = rows_of(work)
    assert [(r["control"], *(r[k] for k in keys)) for r in found] == expected
    assert all(set(r) == {*of_maps[0], "control"} for r in found)
    untrained = [r for r in found if (r["control"], r["map"]) == ("untrained", "ridge")]
    assert max(r["context_gain"] for r in untrained) < 0.3  # no context is shared
    assert len(rows_of(work, "reconstruction.jsonl")) == 2
    assert [p.name for p in work.dictionaries.glob("*/*/*") if "seed" in p.name] == ["seed-0"] * 2


def test_scores_are_placed_between_null_and_ceiling(finished):
    _, work = finished
    transfer = rows_of(work, "transfer.jsonl")
    key = ("source", "target", "map")
    nulls = {tuple(r[k] for k in key): r for r in transfer if r["pairing"] == "shuffled"}
    ceilings = {tuple(r[k] for k in key): r for r in rows_of(work) if r["control"] == "ceiling"}
    placed = 0
    for row in transfer:
        if row["pairing"] == "shuffled":
            assert not [name for name in row if "normalized" in name]
            continue
        low, high = (rows.get(tuple(row[k] for k in key)) for rows in (nulls, ceilings))
        for name in NORMALIZED:
            share = row[f"{name}_normalized"]
            if row["map"] == "token_target" or high[name] - low[name] < MARGIN:
                assert share is row[f"{name}_normalized_low"] is None
            else:
                expected = (row[name] - low[name]) / (high[name] - low[name])
                assert share == pytest.approx(expected, rel=1e-6)
                assert row[f"{name}_normalized_low"] <= share <= row[f"{name}_normalized_high"]
                placed += 1
    assert placed > 4


def test_a_run_with_two_seeds_needs_no_other_second_dictionary(finished):
    config, work = finished
    controls = open_store(work.controls.activations)

    def named(config):
        return [f"{m.model} {m.site} {m.name}" for m in train.control_members(config, controls)]

    untrained = [f"{m}-untrained {SITE} seed-0" for m in "ab"]
    assert named(config) == [f"{m} {SITE} seed-1" for m in "ab"] + untrained
    assert named(changed(config, sae__seeds=2)) == untrained
    swept = train.control_members(changed(config, sae__k=(6, 3)), controls)
    assert {m.k for m in swept} == {6}


def test_controls_at_some_pairs_of_layers():
    def layers(models="ab", **settings):
        return controlled_layers(Config(models=tuple(models), **settings))

    assert layers(layers=(5, 6)) == layers(layers=(5, 6), control_pairs=9) == ((5, 6), (5, 6))
    assert layers(layers=(5, 6, 7), control_pairs=1) == ((6,), (6,))
    assert layers(layers=(5, 6, 7), control_pairs=2) == ((5, 7), (5, 7))
    assert layers("abc", layer_pairs="5:9", control_pairs=1) == ((5,), (9,), (9,))


def test_only_the_controls_asked_for_are_made(finished):
    config, work = finished
    store = open_store(work.activations)
    kinds = len(config.map.kinds)
    for asked in ((), ("ceiling",), ("untrained",), BOTH):
        found = control_tasks(changed(config, controls=asked), store)
        assert [t.control for t in found] == [c for c in asked for _ in range(2 * kinds)]
    some = changed(config, control_kinds=("ridge", "procrustes"))
    made = {(t.control, t.kind) for t in control_tasks(some, store)}
    assert made == {(control, "ridge") for control in BOTH}


def test_a_pool_larger_than_the_test_rows_is_refused_before_anything_is_trained(begun, tmp_path):
    big = changed(begun[0], evaluation__pool=1_000_000)
    refused(r"evaluation\.pool=1000000 is more than the", extract, big, Workdir(tmp_path / "run"))
    assert not (tmp_path / "run/activations/meta.json").exists()


def test_missing_parts_of_controls_are_one_line(finished, tmp_path):
    config, work = copied(finished, tmp_path)
    shutil.rmtree(work.controls.maps)
    refused("holds no finished map; run train_hypernetworks", evaluate, config, work)
    shutil.rmtree(work.controls.dictionaries)
    refused("is no dictionary folder", fit_controls, config, open_store(work.activations), work)
    shutil.rmtree(work.controls.activations)
    refused("run extract_activations", fit_controls, config, open_store(work.activations), work)
