"""What maps are worth in paired rows: a study in miniature, its honesty, and its page."""

import pytest
from tiny_run import SHAPES, changed, extracted, make_config, refused, save_dictionaries

from crossdict_jax.config import CrosscoderConfig, EfficiencyConfig, HypernetworkConfig, MapConfig
from crossdict_jax.errors import UserError
from crossdict_jax.maps import map_class
from crossdict_jax.studies.efficiency import curves, figure, measure, r2_table, section, worth
from crossdict_jax.training import checkpoint
from crossdict_jax.workdir import read_jsonl

pytestmark = pytest.mark.slow  # three networks and their maps are compiled and trained
KINDS = ("mean", "procrustes", "ridge", "crosscoder")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two layers of two random models, with random dictionaries; (config, work, result rows)."""
    root = tmp_path_factory.mktemp("efficiency")
    config = changed(make_config(root), layers=(0, 1))
    config.map = MapConfig(kinds=(*KINDS, "hypernetwork"))
    config.map.hypernetwork = HypernetworkConfig(rank=4, steps=12)
    config.crosscoder = CrosscoderConfig(width=8, steps=4)
    config.efficiency = EfficiencyConfig(rows=(8, 64))
    store, work = extracted(config, root / "run")
    save_dictionaries(store, work)
    measure.run(config, work)
    return config, work, store, read_jsonl(work.result("efficiency.jsonl"))


def test_every_map_is_scored_at_every_number_of_rows(run):
    _, _, store, rows = run
    n = len(store.select("train"))
    scored = [(r["source"], r["map"], r["n"], r["held_out"], r["scored"]) for r in rows]
    expected = set()
    for source in SHAPES:
        for kind in KINDS:
            # Turning d_model dimensions takes more rows than that.
            for count in (64, n) if kind == "procrustes" else (8, 64, n):
                expected |= {(source, kind, count, None, what) for what in ("all", "hidden")}
        for kind in ("token_profiles", "hypernetwork"):
            expected |= {(source, kind, 0, "layer", "all"), (source, kind, 0, "features", "hidden")}
        expected |= {(source, "ridge_elsewhere", 0, "layer", "all")}
        expected |= {(source, "hypernetwork", n, None, "all")}
    assert set(scored) == expected and len(scored) == len(expected)
    # The middle layer pair is left out.
    assert {(r["site_source"], r["site_target"]) for r in rows} == {("resid_pre.1", "resid_pre.1")}
    assert {r["n_features"] for r in rows if r["scored"] == "hidden"} == {6}  # a fifth of 32
    assert all((r["held_out"] is not None) == (r["n"] == 0) for r in rows)
    assert all(r["r2_low"] <= r["r2"] <= r["r2_high"] for r in rows)


def test_the_networks_were_trained_on_nothing_that_they_are_asked_about(run):
    (folder,) = (run[1].root / "efficiency").iterdir()
    without = [folder / f"hypernetwork-without-{x}" for x in ("layer", "features", "nothing")]
    layer, features, nothing = (checkpoint.load_meta(path / "checkpoints") for path in without)
    assert len(layer["problems"]) == 2
    assert all("resid_pre.1" not in label for label in layer["problems"])
    assert len(features["problems"]) == len(nothing["problems"]) == 4
    assert {len(hidden) for hidden in features["unused"].values()} == {6}
    assert set(features["unused"]) == {"a 0", "a 1", "b 0", "b 1"}
    assert nothing["unused"] == layer["unused"] == {}


def test_what_cannot_be_asked_is_refused(run, monkeypatch):
    config, work, *_ = run
    one = changed(config, layers=(0,))
    refused("layer_pairs give one layer pair, 0:0: none can be left out", measure.run, one, work)
    many = changed(config, efficiency__rows=(8, 10**6))
    refused(r"rows=1000000 is more than the (\d+) .* up to \1\.", measure.run, many, work)

    def fails(*problems, **training):
        raise UserError("The disk is full.")

    monkeypatch.setattr(map_class("mean"), "fit", fails)  # is not taken for too few rows
    refused("The disk is full", measure.run, changed(config, evaluation__bootstrap=3), work)


def test_worth_is_read_off_the_curve():
    curve = [{"n": n, "r2": r2} for n, r2 in ((32, 0.1), (128, 0.3), (512, 0.35))]
    assert worth(0.2, curve) == "≈ 64"  # half way in the logarithm
    assert worth(0.3, curve) == "≈ 128" and worth(0.05, curve) == "< 32"
    assert worth(0.4, curve) == "> 512"


def test_run_again_it_only_prints_what_the_page_shows(run, capsys):
    config, work, _, rows = run
    stamp = work.result("efficiency.jsonl").stat().st_mtime_ns
    measure.run(config, work)
    assert work.result("efficiency.jsonl").stat().st_mtime_ns == stamp
    printed, groups = capsys.readouterr().out, curves(rows)
    assert len(groups) == printed.count("R², ") == 4 and "token profiles" in printed
    for group in groups:
        table, words = r2_table(group), figure(group).words
        assert len(table.rows) == len(group.none) + len(group.few)
        assert table.rows[0][1].text and "ridge " in table.rows[0][-1].text
        assert all(row["map"] in words for row in group.none)
    html = section(rows)
    assert html.count("<svg") == html.count("<table>") == 4
