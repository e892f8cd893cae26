"""Every kind of map: its contract, exact resume, the stage that fits them, refused input."""

import dataclasses
import functools
import itertools
import json
import shutil

import jax
import map_problems
import numpy as np
import pytest
from map_problems import CONFIG, ROWS, feature_r2, fit_one, make_problem, shuffled_problem
from planted_store import kill_in_save
from tiny_run import refused, save_dictionaries, slow

from crossdict_jax import dictionaries, maps, modules
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import Config, MapConfig
from crossdict_jax.maps import Pairs, base, fit
from crossdict_jax.maps.kinds import mean, mlp
from crossdict_jax.models import Site
from crossdict_jax.workdir import Workdir, read_json

# Kinds that need a joint code besides their pairs have a file of their own.
KINDS = [kind for kind in maps.map_kinds() if not base.map_class(kind).through_joint]


@pytest.fixture(scope="module")
def nonlinear():
    """Features of B are relu(f_A W) V, sparsified: no affine map can follow; all sizes differ."""
    rng = np.random.default_rng(5)
    n = sum(ROWS.values())
    f_a = rng.exponential(size=(n, 24)) * (rng.random((n, 24)) < 0.3)
    hidden = np.maximum(f_a @ rng.normal(size=(24, 12)) - 0.5, 0)
    f_b = np.maximum(hidden @ rng.normal(size=(12, 16)) / 3 - 0.5, 0)
    x_a, x_b = np.hstack([f_a, rng.normal(size=(n, 4))]), np.hstack([f_b, rng.normal(size=(n, 3))])
    both = map_problems.identity_dictionary(28, 24), map_problems.identity_dictionary(19, 16)
    return make_problem(x_a, x_b, tokens=rng.integers(0, 20, n), dictionaries_ab=both)


@pytest.fixture(scope="module")
def fitted_on(nonlinear, tmp_path_factory):
    """kind -> (aligned, shuffled) maps of the problem, fitted once, and the directory."""
    problems = [nonlinear[0], shuffled_problem(nonlinear[0])]

    @functools.cache
    def fitted(kind):
        directory = tmp_path_factory.mktemp(kind)
        return maps.map_class(kind).fit(problems, CONFIG, seed=0, directory=directory), directory

    return fitted


def test_mlp_beats_ridge_where_the_truth_is_not_linear(nonlinear, fitted_on):
    problem, test = nonlinear
    trained, ridge = (fitted_on(kind)[0][0] for kind in ("mlp", "ridge"))
    assert trained.map.network.second.kernel.shape == (CONFIG.hidden, CONFIG.hidden)
    score = feature_r2(trained.map, problem, test)
    assert score > 0.7 and score > feature_r2(ridge.map, problem, test) + 0.1
    assert trained.record["validation"]["nmse"] == pytest.approx(1 - score, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_shuffled_pairs_teach_nothing(nonlinear, fitted_on, kind):
    problem, test = nonlinear
    assert -0.3 < feature_r2(fitted_on(kind)[0][1].map, problem, test) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind, nonlinear, fitted_on):
    fitted, test = fitted_on(kind)[0][0], nonlinear[1]
    m = fitted.map
    assert m.kind == kind and m.reads in ("features", "activations", "tokens")
    inputs = map_problems.inputs_of(m, test)
    predicted = maps.predict(m, test, batch_size=128)
    assert predicted.shape == (len(test), 16) and predicted.dtype == np.float32
    assert predicted.min() >= 0 and predicted.std() > 0
    np.testing.assert_allclose(m(inputs, tokens=test.source.tokens), predicted, atol=1e-3)
    graphdef, params = modules.split(m)  # and as a function of its parameters, in larger programs
    call = jax.jit(lambda params, x, ids: modules.merge(graphdef, params)(x, tokens=ids))
    compiled = call(params, inputs, test.source.tokens)
    np.testing.assert_allclose(compiled, predicted, atol=1e-3)
    listed = m(np.asarray(inputs[:3]).tolist())  # tokens beside the inputs are optional
    np.testing.assert_array_equal(listed, m(inputs[:3]))
    refused("must be", m, inputs[None])
    if kind != "mean":
        refused("must be", m, np.float32(inputs[0] if m.reads != "tokens" else inputs))
    if kind.startswith("token_"):
        refused("tokens must be 3 whole", lambda: m(inputs[:3], tokens=[1, 2]))
    json.dumps(fitted.record, allow_nan=False)
    if m.predicts_activation:
        x_b = m.activation(inputs, tokens=test.source.tokens)
        assert x_b.shape == (len(test), 19)
        np.testing.assert_allclose(m.dictionary.encode(x_b), predicted, atol=1e-3)
        np.testing.assert_allclose(maps.predict_activations(m, test), x_b, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_gives_the_same_bits(kind, nonlinear, fitted_on, tmp_path):
    m, test = fitted_on(kind)[0][0].map, nonlinear[1]
    target = tmp_path / "dictionaries" / "b"
    dictionaries.save(test.target.dictionary, target)
    maps.save(m, tmp_path / "maps" / "one", dictionary=target, record={"chosen": 1})
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    shutil.move(tmp_path, moved)  # the pointer is relative
    (moved / "link").symlink_to("maps/one")
    loaded = maps.load(moved / "link")
    assert type(loaded) is type(m)
    for before, after in zip(*(jax.tree.leaves(modules.split(x)[1]) for x in (m, loaded))):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(maps.predict(loaded, test), maps.predict(m, test))


def test_a_map_shares_no_memory_with_what_it_was_made_of():
    array = np.ones(2**10 + 16, np.float32)
    aligned = array[-array.ctypes.data % 64 // 4 :][: 2**10]  # as a device would take it over
    kept, array[:] = base._parameters(aligned), 0
    assert np.all(kept[...])


@pytest.mark.mesh
def test_a_few_validation_rows_are_shared_by_the_devices(nonlinear, tmp_path):
    few = dataclasses.replace(nonlinear[0], validation=nonlinear[0].validation.take(np.arange(13)))
    (fitted,) = mlp.MLP.fit([few], MapConfig(batch_size=16, steps=2), seed=0, directory=tmp_path)
    assert fitted.record["validation"]["nmse"] > 0


@pytest.mark.parametrize("kind", ["mlp", slow("hypernetwork")])
def test_killed_and_resumed_ends_with_the_same_bits(kind, nonlinear, fitted_on, tmp_path):
    def fit_both(problem=nonlinear[0]):
        problems = [problem, shuffled_problem(problem)]
        how = {"seed": 0, "directory": tmp_path, "checkpoint_every": 30}
        return maps.map_class(kind).fit(problems, CONFIG, **how)

    whole, _ = fitted_on(kind)
    kill_in_save(2, fit_both)
    assert list(tmp_path.rglob("*.sha256.json"))
    for first, second in zip(whole, fit_both()):
        trees = (modules.split(fitted.map)[1] for fitted in (first, second))
        jax.tree.map(np.testing.assert_array_equal, *trees)
        assert first.record == second.record
    d = map_problems.random_dictionary("relu", 28, 24, seed=2)
    source = dataclasses.replace(nonlinear[0].train.source, dictionary=d)
    train = dataclasses.replace(nonlinear[0].train, source=source)
    refused("other settings or data", fit_both, dataclasses.replace(nonlinear[0], train=train))


def stage(root, widths, *, kinds, layers=(1, 2), steps=4):
    """A store, its dictionaries on disk, a config and a work directory."""
    store, work = map_problems.FakeStore(widths, layers=layers), Workdir(root)
    save_dictionaries(store, work, width=20, k=4)
    settings = MapConfig(kinds=kinds, steps=steps, batch_size=32, hidden=8)
    return Config(models=store.models, layers=layers, map=settings), store, work


def test_the_stage_fits_every_map_both_ways_and_goes_on(tmp_path, monkeypatch):
    calls = []

    def untrained_maps(problems, config, *, directory, **how):
        calls.append([problem.label for problem in problems])
        assert directory == tmp_path / "maps" / "training"
        return mean.Mean.fit(problems, config)

    monkeypatch.setattr(mlp.MLP, "fit", untrained_maps)
    config, store, work = stage(tmp_path, {"a": 6, "b": 6}, kinds=("ridge", "mlp"), layers=(1,))
    fit.fit_maps(config, store, work)
    ends = "a resid_pre.1 to b resid_pre.1", "b resid_pre.1 to a resid_pre.1"
    together = [label + pairing for label in ends for pairing in ("", " (shuffled)")]
    assert calls == [together]  # both directions, aligned and shuffled, in one call
    tasks = maps.tasks(config, store)
    assert len(tasks) == 2 * 2 * 2
    timing = read_json(work.timing)["train_hypernetworks"]
    assert timing["maps"] == len(tasks) and timing["wall_s"] > 0

    site = Site(1)
    test = maps.load_pairs(store, "b", "a", site, site, "test", work)
    folders = (work.map("b", "a", site, site, kind) for kind in ("ridge", "ridge-shuffled"))
    ours, null = (maps.predict(maps.load(folder), test) for folder in folders)
    assert not np.allclose(ours, null)

    gone = work.map("b", "a", site, site, "ridge")
    shutil.rmtree(gone)
    kept = {p: p.stat().st_mtime_ns for p in work.maps.glob("*-to-*/*/*/*.sha256.json")}
    assert len(kept) == len(tasks) - 1
    fit.fit_maps(config, store, work)
    fit.fit_maps(config, store, work)  # now there is nothing left to do
    assert all(p.stat().st_mtime_ns == then for p, then in kept.items())
    assert read_json(work.timing)["train_hypernetworks"]["maps"] == 1 and len(calls) == 1
    np.testing.assert_array_equal(maps.predict(maps.load(gone), test), ours)


def test_the_tasks_of_three_models_and_unequal_layers(tmp_path):
    store = map_problems.FakeStore({"a": 6, "b": 5, "c": 4}, layers=(1, 2))
    config = Config(layer_pairs="1:2", map=MapConfig(kinds=("mean",)))
    aligned = (t for t in maps.tasks(config, store) if t.pairing == "aligned")
    found = {(t.source, t.site_source.layer, t.target, t.site_target.layer) for t in aligned}
    assert found == {
        *(("a", 1, "b", 2), ("a", 1, "c", 2), ("b", 2, "a", 1)),
        *(("c", 2, "a", 1), ("b", 2, "c", 2), ("c", 2, "b", 2)),
    }
    folder = tmp_path / "maps" / "a-to-b" / "resid_pre.1--resid_pre.2"
    paths = [task.path(Workdir(tmp_path)) for task in maps.tasks(config, store)[:2]]
    assert paths == [folder / "mean", folder / "mean-shuffled"]


def test_pairs_are_the_rows_of_their_split(tmp_path):
    _, store, work = stage(tmp_path, {"a": 6, "b": 5}, kinds=("mean",))
    pairs = maps.load_pairs(store, "a", "b", Site(1), Site(2), "validation", work)
    rows = store.select("validation")
    for side, model, site in ((pairs.source, "a", 1), (pairs.target, "b", 2)):
        np.testing.assert_array_equal(side.x, store.read(model, Site(site), rows))
        np.testing.assert_array_equal(side.tokens, store.tokens(model, rows))
    np.testing.assert_array_equal(pairs.documents, store.rows.document[rows])


def test_shuffling_moves_whole_target_rows_and_nothing_else(nonlinear):
    pairs = nonlinear[0].train
    moved = maps.shuffled(pairs, 3)
    assert moved.source is pairs.source
    assert np.mean(moved.target.x[:, -1] == pairs.target.x[:, -1]) < 0.05
    both = ([p.target.tokens, p.target.x.astype(np.float32)] for p in (pairs, moved))
    together, others = (sorted(map(tuple, np.column_stack(columns))) for columns in both)
    assert together == others
    np.testing.assert_array_equal(moved.target.x, maps.shuffled(pairs, 3).target.x)
    assert not np.array_equal(moved.target.x, maps.shuffled(pairs, 4).target.x)
    for ours, theirs in zip(moved.target.feature_moments, pairs.target.feature_moments):
        np.testing.assert_array_equal(ours, theirs)
    f = base.encode_rows(pairs.target.dictionary, pairs.target.x)
    np.testing.assert_allclose(pairs.target.feature_moments.mean, f.mean(0), rtol=1e-5)
    np.testing.assert_allclose(pairs.target.feature_moments.variance, f.var(0), rtol=1e-4)
    ways = itertools.product(range(4), SPLITS)
    assert len({tuple(maps.shuffled(pairs, *way).target.order) for way in ways}) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_a_problem_without_rows_is_refused(nonlinear, tmp_path, kind):
    nothing = dataclasses.replace(nonlinear[0], train=nonlinear[0].train.take(slice(0)))
    refused(f"A to B has 0 paired train rows and {kind} needs", fit_one, kind, nothing, tmp_path)


def test_a_map_without_its_dictionary_is_refused(nonlinear, fitted_on, tmp_path):
    folder = tmp_path / "dictionary"
    dictionaries.save(nonlinear[1].target.dictionary, folder)
    own, other = nonlinear[1].source.dictionary, nonlinear[1].target.dictionary
    maps.save(fitted_on("ridge")[0][0].map, tmp_path / "map", dictionary=folder, source=own)
    refused("with another dictionary of the source", maps.load, tmp_path / "map", None, other)
    refused("another checkpoint than a dictionary's", dictionaries.load, tmp_path / "map")
    refused("holds another checkpoint than a map's", maps.load, folder)
    shutil.rmtree(folder)
    refused(r"needs the target's dictionary .*missing; restore", maps.load, tmp_path / "map")
    dictionaries.save(map_problems.random_dictionary("relu", 19, 16, seed=2), folder)
    refused("with another dictionary of the target", maps.load, tmp_path / "map")


def test_an_unknown_kind_and_a_batch_larger_than_the_rows_are_refused(nonlinear, tmp_path):
    words = r"map.kinds=rigde is no map; use .*ridge, ridge_codes, token"
    refused(words, fit.fit_maps, *stage(tmp_path, {"a": 6, "b": 5}, kinds=("mean", "rigde")))
    config = dataclasses.replace(CONFIG, batch_size=4096)
    words = r"map\.batch_size=4096 is larger than the 1600"
    refused(words, fit_one, "mlp", nonlinear[0], tmp_path, config)


def keyed(pairs: Pairs, shift: int) -> Pairs:
    keys = np.stack([pairs.documents, np.arange(len(pairs))], axis=1)
    source = dataclasses.replace(pairs.source, keys=keys)
    target = dataclasses.replace(pairs.target, keys=keys + [[0, shift]])
    return Pairs(source, target, pairs.documents)


def test_pairs_of_other_places_are_refused(nonlinear):
    same = keyed(nonlinear[0].train, 0)
    assert len(same) == len(nonlinear[0].train)
    refused("Row 0 is document 0, byte 0 in the source and", keyed, nonlinear[0].train, 1)
    assert maps.shuffled(same, 0).target.keys is None  # which is no mistake
    np.testing.assert_array_equal(same.take(np.array([3, 9])).source.keys, [[0, 3], [0, 9]])
    one = same.target.keys.copy()
    one[40] = 7, 3
    target, words = dataclasses.replace(same.target, keys=one), "Row 40 is document 2, byte 40 .*"
    refused(f"{words} document 7, byte 3 in", Pairs, same.source, target, same.documents)
    refused("equally many rows: .*take both", Pairs, same.source, target, same.documents[:9])


@pytest.mark.parametrize("kind", maps.map_kinds())
def test_a_row_that_is_not_finite_is_named(nonlinear, kind, tmp_path):
    x = nonlinear[0].train.target.x.copy()
    x[57, 2] = np.nan
    target = dataclasses.replace(nonlinear[0].train.target, x=x)
    train = dataclasses.replace(nonlinear[0].train, target=target)
    bad = dataclasses.replace(nonlinear[0], train=train)
    message = r"row 57 of the target's train rows \(document 2\) holds NaN or infinity"
    for one in (bad, shuffled_problem(bad)):
        refused(message, fit_one, kind, one, tmp_path)
