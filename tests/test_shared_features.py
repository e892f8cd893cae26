"""The stages that compare two models' features and layers, on a finished run in miniature."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_run

from crossdict_jax import dictionaries, models
from crossdict_jax.activations.passages import passages_of
from crossdict_jax.activations.store import open_store
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.errors import UserError
from crossdict_jax.evaluation import matching
from crossdict_jax.evaluation.funnel import dictionary_pairs, match_dictionaries
from crossdict_jax.evaluation.representations import compare_representations
from crossdict_jax.evaluation.similarity import MEASURES, cka
from crossdict_jax.models import Site
from crossdict_jax.models.run import Runner
from crossdict_jax.results import read_matches
from crossdict_jax.workdir import Workdir, read_jsonl

PLACE = {
    "source": "a",
    "target": "b",
    "site_source": str(tiny_run.SITE),
    "site_target": str(tiny_run.SITE),
}


def with_settings(config, **changes):
    """The config with other settings of the evaluation."""
    evaluation = dataclasses.replace(config.evaluation, **changes)
    return dataclasses.replace(config, evaluation=evaluation)


@dataclasses.dataclass
class Run:
    config: tiny_run.Config
    work: Workdir

    def __post_init__(self):
        self.store = open_store(self.work.activations)

    def rows(self, name, **changes):
        """The rows of a result file under other settings, written to a folder of its own."""
        work = self.beside("-".join(map(str, changes.values())) or "as-it-is")
        config = with_settings(self.config, **changes)
        match_dictionaries(config, self.store, work)
        compare_representations(config, self.store, work)
        return read_jsonl(work.result(name))

    def beside(self, name):
        """The run with results of its own."""
        root = self.work.root.with_name(f"shared-{name}")
        root.mkdir(exist_ok=True)
        for part in ("activations", "dictionaries"):
            if not (root / part).exists():
                (root / part).symlink_to(self.work.root / part)
        return Workdir(root)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(*tiny_run.shared_run(tmp_path_factory.getbasetemp()))
    run.config = with_settings(run.config, minimum_firings=10, similarity_rows=150)
    return run


@pytest.fixture(scope="module")
def written(run):
    """The rows of {file: rows}, and its folder."""
    run.rows("matching.jsonl")
    work = run.beside("as-it-is")
    return {p.name: read_jsonl(p) for p in work.results.glob("*.jsonl")}, work


# ---------------------------------------------------------------- matches


def test_every_pair_of_dictionaries_has_its_funnel(written, run):
    rows = written[0]["matching.jsonl"]
    assert [row["pairing"] for row in rows] == ["aligned", "shuffled"]
    for row in rows:
        assert {key: row[key] for key in PLACE} == PLACE
        widths, live = (
            (row["width_source"], row["width_target"]),
            (
                row["live_source"],
                row["live_target"],
            ),
        )
        assert widths == (32, 32)
        steps = [min(live), *(row[k] for k in ("matched", "significant", "strong", "confirmed"))]
        assert steps == sorted(steps, reverse=True)
        assert row["n_rows_test"] == len(run.store.select("test"))
        assert row["fdr"] == 0.05 and row["minimum_firings"] == 10
        assert row["minimum_r"] == matching.LEAST_R
    assert rows[0]["null"] == rows[1]["null"] == rows[1]["confirmed"] == 0
    assert rows[0]["significant"] > 0  # both read the same tokens, at an early layer
    assert rows[1]["significant"] == 0
    assert abs(rows[1]["r_test"]) < 0.1 < rows[0]["r_test"]


def test_matches_say_what_the_dictionaries_do(written, run):
    rows, funnel = written[0]["matches.jsonl"], written[0]["matching.jsonl"][0]
    assert len(rows) == funnel["matched"]
    assert sum(row["confirmed"] for row in rows) == funnel["confirmed"]
    sides = {m: dictionaries.load(run.work.dictionary(m, tiny_run.SITE)) for m in "ab"}
    f = {
        (m, split): np.asarray(
            d.encode(run.store.read(m, tiny_run.SITE, run.store.select(split)).astype(np.float32))
        )
        for m, d in sides.items()
        for split in ("train", "test")
    }
    for row in rows:
        a, b = row["feature_source"], row["feature_target"]
        for split in ("train", "test"):
            r = np.corrcoef(f["a", split][:, a], f["b", split][:, b])[0, 1]
            assert row[f"r_{split}"] == pytest.approx(0 if np.isnan(r) else r, abs=1e-4)
        assert row["firings_source"] == (f["a", "train"][:, a] > 0).sum() >= 10
        norm = np.linalg.norm(np.asarray(sides["b"].W_dec[...])[b]) / float(sides["b"].scale[...])
        assert row["decoder_norm_target"] == pytest.approx(norm, rel=1e-4)
        assert row["confirmed"] == (
            row["p_adjusted"] <= 0.05 and row["r_test"] >= 0.3 and row["beyond_token"]
        )
    assert len({row["feature_source"] for row in rows}) == len(rows)


def test_matches_are_read_from_either_side(written):
    _, work = written
    forwards = read_matches(work, **PLACE)
    site = tiny_run.SITE
    backwards = read_matches(work, "b", "a", site, site)
    assert len(forwards) == len(backwards) > 0
    for one, other in zip(forwards, backwards):
        assert one.keys() == other.keys()
        assert one["feature_source"] == other["feature_target"]
        assert one["decoder_norm_target"] == other["decoder_norm_source"]
        assert one["r_test"] == other["r_test"]
    assert read_matches(work, "a", "b", site, Site(0)) == []
    with pytest.raises(UserError, match=r"matches\.jsonl is missing"):
        read_matches(Workdir(work.root / "nowhere"), **PLACE)


@pytest.mark.parametrize(
    ("setting", "value", "column"),
    [
        ("matching", "hungarian", "matched"),
        ("minimum_firings", 400, "live_source"),
        ("fdr", 1e-9, "significant"),
    ],
)
def test_every_setting_matters(written, run, setting, value, column):
    changed = run.rows("matching.jsonl", **{setting: value})
    assert changed[0][column] != written[0]["matching.jsonl"][0][column]


def test_a_pair_of_dictionaries_is_compared_once(run):
    store = dataclasses.replace(run.store, models=("a", "b", "c"))
    config = dataclasses.replace(run.config, layer_pairs="0:1,1:1")
    found = [(p.source, p.target, p.site_source.layer) for p in dictionary_pairs(config, store)]
    assert found == [("a", "b", 0), ("a", "b", 1), ("a", "c", 0), ("a", "c", 1), ("b", "c", 1)]


def test_decoder_rows_are_what_a_feature_adds():
    d = dictionaries.base.build("relu", d_model=5, width=7, k=0, key=tiny_run.jax.random.key(0))
    d.scale[...] = tiny_run.jax.numpy.asarray(4.0)
    d.b_dec[...] = tiny_run.jax.numpy.arange(5.0)
    expected = np.asarray(d.W_dec[...])[[6, 2, 3]] / 4
    np.testing.assert_allclose(decoder_rows(d, np.array([6, 2, 3]), size=2), expected, atol=1e-6)
    assert decoder_rows(d, np.zeros(0, int)).shape == (0, 5)


# ---------------------------------------------------------------- layers and decoders


def test_every_layer_is_compared_with_every_other(written):
    rows = [row for row in written[0]["similarity.jsonl"] if row["kind"] == "layers"]
    places = [(row["site_source"], row["site_target"]) for row in rows]
    sites = ["resid_pre.0", "resid_pre.1"]
    assert places == [(a, b) for b in sites for a in sites]
    for row in rows:
        assert row["n_rows"] == 150
        # Random models share the token alone; what is equal for RSA is little.
        assert row["cka"] > 0.02 > abs(row["cka_null"])
        assert all(row[m] > row[f"{m}_null"] for m in ("cka", "svcca", "mutual_knn"))
        assert {f"{m}{end}" for m in MEASURES for end in ("", "_null")} <= row.keys()


def test_a_row_of_layers_is_its_formula(written, run):
    store = run.store
    rows = np.sort(
        np.random.Generator(np.random.Philox(key=0)).permutation(store.select("test"))[:150]
    )
    x, y = (store.read(m, tiny_run.SITE, rows).astype(np.float32) for m in "ab")
    found = next(
        row
        for row in written[0]["similarity.jsonl"]
        if (row["kind"], row.get("site_source"), row.get("site_target"))
        == ("layers", "resid_pre.1", "resid_pre.1")
    )
    assert found["cka"] == pytest.approx(cka(x, y), abs=5e-3)  # the store is bfloat16


def test_layer_pairs_are_proposed(written):
    (row,) = (row for row in written[0]["similarity.jsonl"] if row["kind"] == "proposal")
    table = {
        (r["site_source"], r["site_target"]): r["cka"]
        for r in written[0]["similarity.jsonl"]
        if r["kind"] == "layers"
    }
    best = max((0, 1), key=lambda j: table["resid_pre.1", f"resid_pre.{j}"])
    assert row["layer_pairs"] == f"1:{best}"
    assert row["cka"] == table["resid_pre.1", f"resid_pre.{best}"]
    assert row["cka_of_run"] == table["resid_pre.1", "resid_pre.1"]


def test_decoders_of_few_matches_are_not_compared(written):
    (row,) = (row for row in written[0]["similarity.jsonl"] if row["kind"] == "decoders")
    confirmed = written[0]["matching.jsonl"][0]["confirmed"]
    assert row["n_features"] == confirmed < 12
    assert row["cka"] is None and row["svcca_p"] is None


def test_decoders_of_a_rotated_dictionary_are_alike_beyond_chance(run):
    """Matches written by hand: every feature of a dictionary with itself, then with another."""
    work = run.beside("by-hand")
    work.results.mkdir(exist_ok=True)
    folder = work.dictionary("a", tiny_run.SITE)
    scores = []
    for shift in (0, 5):
        matches = [
            PLACE
            | {
                "target": "a",
                "feature_source": i,
                "feature_target": (i + shift) % 32,
                "confirmed": True,
            }
            for i in range(32)
        ]
        work.result("matches.jsonl").write_text("".join(json.dumps(m) + "\n" for m in matches))
        config = with_settings(run.config, similarity_rows=0)
        store = dataclasses.replace(run.store, models=("a", "a"))
        compare_representations(config, store, work)
        scores += read_jsonl(work.result("similarity.jsonl"))
    assert folder.is_dir()
    same, other = scores  # no rows of layers with similarity_rows=0
    for m in ("cka", "rsa", "mutual_knn"):
        assert same[m] == pytest.approx(1, abs=1e-5)
        assert same[f"{m}_p"] == 0.05 < other[f"{m}_p"]
        assert abs(other[m] - other[f"{m}_null"]) < 0.3


def test_layers_read_at_some_rows_are_those_of_the_store(run):
    store = run.store
    rows = store.select("test")[3::7]
    for name, path in zip(store.models, store.paths):
        sites = [Site(0), tiny_run.SITE]
        x = Runner(models.load(path), batch_size=3).read_at(passages_of(store, name, rows), sites)
        stored = store.read(name, tiny_run.SITE, rows).astype(np.float32)
        assert x.shape == (2, *stored.shape)
        np.testing.assert_allclose(x[1], stored, rtol=2**-7, atol=1e-6)  # they are bfloat16
        assert abs(x[0] - x[1]).max() > 0.1


def test_equal_runs_write_equal_files(written, run):
    _, work = written
    files = sorted(work.results.glob("*.jsonl"))
    before = [file.read_bytes() for file in files]
    run.rows("matching.jsonl")
    assert [file.read_bytes() for file in files] == before
    for text in before:
        assert str(work.root).encode() not in text
        for line in text.decode().splitlines():
            json.loads(line, parse_constant=pytest.fail)
