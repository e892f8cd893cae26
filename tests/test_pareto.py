"""Curves of L0 against FVU: every setting on held-out rows, nothing trained twice, and its page."""

import numpy as np
import pytest
import tiny_run
from tiny_run import changed

from crossdict_jax import dictionaries
from crossdict_jax.config import ParetoConfig, SAEConfig
from crossdict_jax.dictionaries import base
from crossdict_jax.models import Site
from crossdict_jax.studies.pareto import curves, fvu_at, measure, section, tables
from crossdict_jax.verify import recovery
from crossdict_jax.verify.planted import PlantedConfig
from crossdict_jax.workdir import Workdir, read_jsonl

pytestmark = pytest.mark.slow  # six ensembles are compiled and trained
PLANTED = PlantedConfig(rows=400, documents=40, features=8, widths=(6,), exclusive=0, active=2.0)
SETTINGS = SAEConfig(width=8, k=2, steps=4, batch_size=32, seeds=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, work, store, rows) of two architectures on both kinds of data."""
    root = tmp_path_factory.mktemp("pareto")
    config = tiny_run.make_config(root)
    config.sae = SAEConfig(width=24, k=4, steps=4, batch_size=64)
    config.pareto = ParetoConfig(architectures=("topk", "relu"), k=(2, 8), penalties=(0.1, 4.0))
    store, work = tiny_run.extracted(config, root / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "PLANTED", PLANTED)
        patch.setattr(recovery, "SETTINGS", SETTINGS)
        rows = recovery.measure_pareto(config, work)
    return config, work, store, rows


def test_every_setting_has_a_row(run):
    _, work, _, rows = run
    keys = ("data", "architecture", "seed", "k", "l1_coefficient")
    settings = [tuple(row[key] for key in keys) for row in rows]
    usual = base.find("relu").usual_l1
    expected = {("activations", "topk", 0, k, None) for k in (2, 8)}
    expected |= {("activations", "relu", 0, None, share * usual) for share in (0.1, 4.0)}
    for seed in range(2):  # the widths differ, so planted rows have values of k of their own
        expected |= {("planted", "topk", seed, k, None) for k in (1, 2, 4)}
        expected |= {("planted", "relu", seed, None, share * usual) for share in (0.1, 4.0)}
    assert set(settings) == expected and len(settings) == len(expected)
    assert read_jsonl(work.result("pareto.jsonl")) == rows
    for row in rows:
        planted = row["data"] == "planted"
        assert (row["cosine"] is not None) == planted == (row["planted"] == 2.0)
        assert row["fvu_low"] <= row["fvu"] <= row["fvu_high"]


def test_rows_are_of_the_dictionaries_on_test_rows(run):
    _, work, store, rows = run
    row = next(r for r in rows if r["data"] == "activations" and r["k"] == 8)
    folder = Workdir(work.root / "pareto" / "activations" / "topk")
    d = dictionaries.load(folder.dictionary("a", tiny_run.SITE, "seed-0-k-8"))
    x = store.read("a", tiny_run.SITE, store.select("test")).astype(np.float32)
    mean = store.read("a", tiny_run.SITE, store.select("train")).astype(np.float32).mean(0)
    assert d.k == 8 and row["n_rows"] == len(x)
    by_hand = ((x - d(x)) ** 2).sum() / ((x - mean) ** 2).sum()
    np.testing.assert_allclose(row["fvu"], by_hand, rtol=1e-4)
    np.testing.assert_allclose(row["l0"], (np.asarray(d.encode(x)) > 0).sum(1).mean(), rtol=1e-6)


def test_run_again_nothing_is_trained_and_new_points_are_added(run):
    config, work, store, rows = run
    config = changed(config, pareto__architectures=("topk",))
    folder, end = Workdir(work.root / "pareto" / "activations"), {"model": "a", "site": Site(1)}
    before = {p: p.stat().st_mtime_ns for p in folder.root.rglob("*.sha256.json")}
    again = {row["k"]: row["fvu"] for row, _ in measure.curves(config, store, folder, **end)}
    of_run = {r["k"]: r["fvu"] for r in rows if r["data"] == "activations"}
    assert again.items() <= of_run.items()
    config.pareto.k = (4,)
    (new,) = [row for row, _ in measure.curves(config, store, folder, **end)]
    assert new["k"] == 4 and {p: p.stat().st_mtime_ns for p in before} == before


def test_the_page_and_the_tables_show_every_point(run):
    html, groups = section(run[3]), curves(run[3])
    assert [g.planted for g in groups] == [2.0, None]
    assert [set(g.points) for g in groups] == [{"topk", "relu"}] * 2
    shown = tables(groups)
    assert len(shown) == html.count("<table>") == 5 and html.count("<svg") == 2
    assert "Recovery at an L0 near the 2 features" in html and "penalty 12" in html


def test_fvu_at_equal_sparsity_lies_on_the_curve():
    curves = ([40, 10], [0.1, 0.3], 20), ([10, 40], [0.3, 0.1], 10), ([0, 40], [0.9, 0.1], 40)
    assert [fvu_at(*curve) for curve in curves] == pytest.approx([0.2, 0.3, 0.1])
    assert fvu_at([10.0, 40.0], [0.3, 0.1], 41) is None
