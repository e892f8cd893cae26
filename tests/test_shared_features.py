"""What two models' features and layers share, in the files of a finished run in miniature."""

import dataclasses
import itertools

import numpy as np
import pytest
import tiny_run

from crossdict_jax import dictionaries
from crossdict_jax.activations.store import open_store
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.evaluation import evaluate, matching
from crossdict_jax.evaluation.representations import representation_rows
from crossdict_jax.evaluation.shared_features import dictionary_pairs, shared_features
from crossdict_jax.evaluation.similarity import MEASURES, Geometry
from crossdict_jax.maps import Task
from crossdict_jax.maps.fit import Loader
from crossdict_jax.models import Site
from crossdict_jax.results import pair_columns, read_matches
from crossdict_jax.workdir import Workdir

SITE = tiny_run.SITE
PAIR = Task("a", "b", SITE, SITE, "", "aligned")


@dataclasses.dataclass
class Run:
    config: tiny_run.Config
    work: Workdir

    def __post_init__(self):
        self.store = open_store(self.work.activations)
        self.loader = Loader(self.config, self.store, self.work)

    def matched(self, **changes):
        """The rows by file, under other settings."""
        self.loader.config = self.settings(**({"minimum_firings": 10} | changes))
        return shared_features(PAIR, self.loader)

    def settings(self, **changes):
        settings = dataclasses.replace(self.config.evaluation, **changes)
        return dataclasses.replace(self.config, evaluation=settings)

    def similar(self, matches, pair=PAIR, **changes):
        config = self.settings(**{"similarity_rows": 150} | changes)
        return representation_rows(Loader(config, self.store, self.work), [pair], matches)


@pytest.fixture(scope="module")
def run(shared):
    return Run(*shared)


@pytest.fixture(scope="module")
def matched(run):
    return run.matched()


def test_every_pair_of_dictionaries_has_its_funnel(matched, run):
    rows = matched["matching.jsonl"]
    assert [row["pairing"] for row in rows] == ["aligned", "shuffled"]
    for row in rows:
        assert pair_columns(PAIR).items() <= row.items()
        assert (row["width_source"], row["width_target"]) == (32, 32)
        steps = [min(row["live_source"], row["live_target"])]
        steps += [row[name] for name in ("matched", "significant", "strong", "confirmed")]
        assert steps == sorted(steps, reverse=True)
        assert row["n_rows_test"] == len(run.store.select("test"))
        settings = row["fdr"], row["minimum_firings"], row["minimum_r"]
        assert settings == (0.05, 10, matching.LEAST_R)
    assert rows[0]["null"] == rows[1]["null"] == rows[1]["confirmed"] == 0
    assert rows[0]["significant"] > 0  # both read the same tokens, at an early layer
    assert rows[1]["significant"] == 0 and abs(rows[1]["r_test"]) < 0.1 < rows[0]["r_test"]


def test_without_a_shift_that_leaves_the_documents_nothing_is_confirmed_nor_refuted(run):
    rows = dataclasses.replace(run.store.rows, document=np.zeros_like(run.store.rows.document))
    one = Loader(run.config, dataclasses.replace(run.store, rows=rows), run.work)
    rows = shared_features(PAIR, one)
    counts = ("significant", "strong", "confirmed", "null", "r_test_confirmed")
    assert {row[name] for row in rows["matching.jsonl"] for name in counts} == {None}
    assert {row["p"] for row in rows["matches.jsonl"]} == {None}


def test_matches_say_what_the_dictionaries_do(matched, run):
    rows, funnel = matched["matches.jsonl"], matched["matching.jsonl"][0]
    assert len(rows) == funnel["matched"] == len({row["feature_source"] for row in rows})
    assert sum(row["confirmed"] for row in rows) == funnel["confirmed"]
    sides = {m: dictionaries.load(run.work.dictionary(m, SITE)) for m in "ab"}
    f = {}
    for m, split in itertools.product(sides, ("train", "test")):
        x = run.store.read(m, SITE, run.store.select(split)).astype(np.float32)
        f[m, split] = np.asarray(sides[m].encode(x))
    for row in rows:
        a, b = row["feature_source"], row["feature_target"]
        for split in ("train", "test"):
            r = np.corrcoef(f["a", split][:, a], f["b", split][:, b])[0, 1]
            assert row[f"r_{split}"] == pytest.approx(0 if np.isnan(r) else r, abs=1e-4)
        sure = row["p_adjusted"] <= 0.05 and row["r_test"] >= 0.3 and row["beyond_token"]
        assert row["confirmed"] == sure


def test_matches_are_read_from_either_side(run):
    evaluate(run.config, run.work)
    forwards, backwards = (read_matches(run.work, *m, SITE, SITE) for m in ("ab", "ba"))
    assert len(forwards) == len(backwards) > 0
    for row, other in zip(forwards, backwards):
        assert row.keys() == other.keys() and row["feature_source"] == other["feature_target"]
        assert row["r_test"] == other["r_test"]
    assert read_matches(run.work, "a", "b", SITE, Site(0)) == []
    nowhere = Workdir(run.work.root / "nowhere"), "a", "b", SITE, SITE
    tiny_run.refused(r"matches\.jsonl is missing", read_matches, *nowhere)


def test_every_setting_matters(matched, run):
    changes = {"matched": {"matching": "hungarian"}, "live_source": {"minimum_firings": 400}}
    changes["significant"] = {"fdr": 1e-9}
    for column, change in changes.items():
        changed = run.matched(**change)["matching.jsonl"]
        assert changed[0][column] != matched["matching.jsonl"][0][column], column


def test_a_pair_of_dictionaries_is_compared_once(run):
    store = dataclasses.replace(run.store, models=("a", "b", "c"))
    config = dataclasses.replace(run.config, layer_pairs="0:1,1:1")
    pairs = [(p.source + p.target, p.site_source.layer) for p in dictionary_pairs(config, store)]
    assert pairs == [("ab", 0), ("ab", 1), ("ac", 0), ("ac", 1), ("bc", 1)]


def test_every_layer_is_compared_with_every_other(run, matched):
    similar = run.similar(matched["matches.jsonl"])
    rows = [row for row in similar if row["kind"] == "layers"]
    sites = ["resid_pre.0", "resid_pre.1"]
    ends = [(row["site_source"], row["site_target"]) for row in rows]
    assert ends == [(a, b) for b in sites for a in sites]
    for row in rows:
        assert row["n_rows"] == 150  # similarity_rows
        # Random models share the token alone; what is equal for RSA is little.
        assert row["cka"] > 0.02 > abs(row["cka_null"])
        assert all(row[m] > row[f"{m}_null"] for m in ("cka", "svcca", "mutual_knn"))
    numbers = np.random.Generator(np.random.Philox(key=0)).permutation(run.store.select("test"))
    x = (run.store.read(m, SITE, np.sort(numbers[:150])).astype(np.float32) for m in "ab")
    a, b = map(Geometry.of, x)
    assert rows[-1]["cka"] == pytest.approx(a.compared(b)["cka"], abs=5e-3)  # stored in bfloat16
    (proposal,) = (row for row in similar if row["kind"] == "proposal")
    table = dict(zip(ends, (row["cka"] for row in rows)))
    best = max((0, 1), key=lambda j: table["resid_pre.1", sites[j]])
    assert proposal["layer_pairs"] == f"1:{best}"
    assert proposal["cka"] == table["resid_pre.1", sites[best]]
    assert proposal["cka_of_run"] == table["resid_pre.1", "resid_pre.1"]
    # Decoders of few matches are not compared.
    (row,) = (row for row in similar if row["kind"] == "decoders")
    assert row["n_features"] == matched["matching.jsonl"][0]["confirmed"] < 12
    assert all(row[f"{m}{end}"] is None for m in MEASURES for end in ("", "_null", "_p"))


def test_decoders_of_one_dictionary_are_alike_beyond_chance(run):
    """Matches made by hand: every feature of a dictionary with itself, then with another."""
    pair, scores = Task("a", "a", SITE, SITE, "", "aligned"), []
    for shift in (0, 5):
        features = [{"feature_source": i, "feature_target": (i + shift) % 32} for i in range(32)]
        matches = [pair_columns(pair) | row | {"confirmed": True} for row in features]
        scores += run.similar(matches, pair, similarity_rows=0)  # no rows of layers
    same, other = scores
    for m in ("cka", "rsa", "mutual_knn"):
        assert same[m] == pytest.approx(1, abs=1e-5) and same[f"{m}_p"] == 0.05 < other[f"{m}_p"]
        assert abs(other[m] - other[f"{m}_null"]) < 0.3


def test_decoder_rows_are_what_a_feature_adds():
    d = dictionaries.base.build("relu", d_model=5, width=7, k=0, key=tiny_run.jax.random.key(0))
    d.scale[...] = tiny_run.jax.numpy.asarray(4.0)
    d.b_dec[...] = tiny_run.jax.numpy.arange(5.0)
    expected = np.asarray(d.W_dec[...])[[6, 2, 3]] / 4
    np.testing.assert_allclose(decoder_rows(d, np.array([6, 2, 3])), expected, atol=1e-6)
    assert decoder_rows(d, np.zeros(0, int)).shape == (0, 5)
