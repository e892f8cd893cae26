"""What maps are worth in paired rows: a study in miniature, its honesty, and its page."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from tiny_run import SHAPES, make_config

from crossdict_jax import dictionaries, maps
from crossdict_jax.activations.extract import extract
from crossdict_jax.config import (
    CrosscoderConfig,
    EfficiencyConfig,
    HypernetworkConfig,
    MapConfig,
    to_dict,
)
from crossdict_jax.dictionaries.base import build
from crossdict_jax.errors import UserError
from crossdict_jax.maps.fit import Loader
from crossdict_jax.models import Site
from crossdict_jax.studies.efficiency import measure
from crossdict_jax.studies.efficiency.section import (
    curves,
    figure,
    print_table,
    section,
    table,
    worth,
)
from crossdict_jax.workdir import open_workdir, read_jsonl

RUNGS = ("mean", "procrustes", "ridge", "crosscoder")
SMALL = HypernetworkConfig(
    rank=4, profile_rank=4, hidden=8, steps=12, batch_size=16, checkpoint_every=6
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two layers of two random models, with random dictionaries; (config, work, result rows)."""
    root = tmp_path_factory.mktemp("efficiency")
    config = dataclasses.replace(
        make_config(root),
        layers=(0, 1),
        map=MapConfig(kinds=(*RUNGS, "hypernetwork"), hypernetwork=SMALL),
        crosscoder=CrosscoderConfig(width=8, k=2, steps=4, batch_size=16),
        efficiency=EfficiencyConfig(rows=(8, 64), layer_pair="0:0", hidden_features=0.25),
    )
    work = open_workdir(root / "run", to_dict(config))
    store = extract(config, work)
    for i, name in enumerate(SHAPES):
        for layer in config.layers:
            shape = {"d_model": store.d_model(name), "width": 32, "k": 6}
            d = build("topk", **shape, key=jax.random.key(2 * i + layer))
            dictionaries.save(d, work.dictionary(name, Site(layer)))
    measure.measure_efficiency(config, work)
    return config, work, store, read_jsonl(work.result("efficiency.jsonl"))


def test_every_map_is_scored_at_every_number_of_rows(run):
    _, _, store, rows = run
    n = len(store.select("train"))
    found = {(r["source"], r["map"], r["n"], r["held_out"], r["scored"]) for r in rows}
    expected = set()
    for source in SHAPES:
        for kind in RUNGS:
            # Turning d_model dimensions takes more rows than that.
            for count in (64, n) if kind == "procrustes" else (8, 64, n):
                expected |= {(source, kind, count, None, what) for what in ("all", "hidden")}
        expected |= {
            (source, "token_profiles", 0, "layer", "all"),
            (source, "token_profiles", 0, "features", "hidden"),
            (source, "ridge_elsewhere", 0, "layer", "all"),
            (source, "hypernetwork", 0, "layer", "all"),
            (source, "hypernetwork", 0, "features", "hidden"),
            (source, "hypernetwork", n, None, "all"),
        }
    assert found == expected
    assert len(rows) == len(expected)
    assert {(r["site_source"], r["site_target"]) for r in rows} == {("resid_pre.0", "resid_pre.0")}
    assert {r["n_features"] for r in rows if r["scored"] == "hidden"} == {8}  # a quarter of 32
    assert all(r["zero_shot"] == (r["n"] == 0) for r in rows)
    assert all(r["r2_low"] <= r["r2"] <= r["r2_high"] for r in rows)


def test_rungs_on_all_rows_are_those_of_the_ladder(run):
    config, work, store, rows = run
    loader = Loader(store, work, config.seed)
    task = next(t for t in maps.tasks(config, store) if t.site_source.layer == 0)
    (fitted,) = maps.rung("ridge").fit(
        [loader.problem(task)], config.map, seed=0, directory=work.root
    )
    test = loader.pairs(task, "test")
    truth = maps.base.encode_rows(test.target.dictionary, test.target.x)
    mean = loader.problem(task).train.target.feature_moments[0]
    error = np.square(truth - maps.predict(fitted.map, test)).sum()
    (row,) = (
        r
        for r in rows
        if (r["source"], r["map"], r["scored"]) == (task.source, "ridge", "all")
        and r["n"] == len(store.select("train"))
    )
    assert row["r2"] == pytest.approx(1 - error / np.square(truth - mean).sum(), abs=1e-5)
    assert row["fvu"] == pytest.approx(1 - row["r2"])


def test_the_networks_were_trained_on_nothing_that_they_are_asked_about(run):
    from crossdict_jax.training import checkpoint

    _, work, _, _ = run
    (folder,) = (work.root / "efficiency").iterdir()

    def meta(name):
        return checkpoint.load_meta(folder / f"hypernetwork-without-{name}" / "checkpoints")

    assert all("resid_pre.0" not in label for label in meta("layer")["members"])
    assert len(meta("layer")["members"]) == 2
    assert len(meta("features")["members"]) == len(meta("nothing")["members"]) == 4
    assert {len(hidden) for hidden in meta("features")["unknown"].values()} == {8}
    assert set(meta("features")["unknown"]) == {"a 0", "a 1", "b 0", "b 1"}
    assert meta("nothing")["unknown"] == meta("layer")["unknown"] == {}


def test_run_again_gives_the_same_bytes(run):
    config, work, _, _ = run
    before = work.result("efficiency.jsonl").read_bytes()
    (folder,) = (work.root / "efficiency").iterdir()
    shutil.rmtree(folder / "hypernetwork-without-layer")
    measure.measure_efficiency(config, work)
    assert work.result("efficiency.jsonl").read_bytes() == before


def test_documents_come_whole_and_in_a_seeded_order():
    documents = np.repeat([3, 5, 9, 11], [2, 3, 1, 4])
    order = measure.document_order(documents, 0)
    assert sorted(order) == list(range(10))
    starts = np.flatnonzero(np.diff(documents[order], prepend=-1))
    assert len(starts) == 4
    assert any((measure.document_order(documents, s) != order).any() for s in (1, 2, 3))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (0,)}, "layers give one layer pair, 0:0: none can be left out"),
        (
            {"efficiency": EfficiencyConfig(layer_pair="0:1")},
            "pair=0:1 is no layer pair .*0:0",
        ),
        ({"efficiency": EfficiencyConfig(rows=(8, 10**6))}, "efficiency.rows=1000000 is more than"),
    ],
)
def test_what_is_not_there_is_refused(run, settings, message):
    config, work, *_ = run
    with pytest.raises(UserError, match=message) as caught:
        measure.measure_efficiency(dataclasses.replace(config, **settings), work)
    assert "\n" not in str(caught.value)


def test_the_middle_layer_pair_is_left_out_by_default(run):
    config, _, store, _ = run
    asked, others = measure._tasks(
        dataclasses.replace(config, efficiency=EfficiencyConfig()), store
    )
    assert {t.site_source.layer for t in asked} == {1}
    assert {t.site_source.layer for t in others} == {0}


# ---------------------------------------------------------------- the page


def points(*values: tuple[int, float]) -> list[dict]:
    return [{"n": n, "r2": r2} for n, r2 in values]


def test_worth_is_read_off_the_curve():
    curve = points((32, 0.1), (128, 0.3), (512, 0.35))
    assert worth(0.2, curve) == "≈ 64"  # half way in the logarithm
    assert worth(0.3, curve) == "≈ 128"
    assert worth(0.05, curve) == "< 32"
    assert worth(0.4, curve) == "> 512"


def test_tables_and_figures_show_every_row(run, capsys):
    _, work, _, rows = run
    groups = curves(rows)
    assert [(g.source, g.scored) for g in groups] == [
        (source, scored) for source in SHAPES for scored in ("all", "hidden")
    ]
    for group in groups:
        t, picture = table(group), figure(group)
        assert len(t.rows) == len(group.none) + len(group.few)
        assert t.rows[0][1].text and "ridge " in t.rows[0][-1].text
        assert picture.svg.startswith("<svg")
        for row in group.none:
            assert row["map"] in picture.words
    html = section(rows)
    assert html.count("<svg") == html.count("<table>") == 4
    print_table(work)
    printed = capsys.readouterr().out
    assert printed.count("R², ") == 4
    assert "token profiles" in printed
