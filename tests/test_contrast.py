"""Contrast sets: files of pairs, planted causes of a preference, the stage, its page, bad input."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_run

from crossdict_jax import dictionaries, models, stats
from crossdict_jax.activations.store import open_store
from crossdict_jax.causal.directions import feature_directions
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.config import ContrastConfig, identity
from crossdict_jax.dictionaries.base import find, from_arrays
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site
from crossdict_jax.studies.contrast import ablation, preference
from crossdict_jax.studies.contrast import measure as stage
from crossdict_jax.studies.contrast.ablation import Cut, measure, singles
from crossdict_jax.studies.contrast.measure import measure_contrast
from crossdict_jax.studies.contrast.preference import (
    Reader,
    Reading,
    Readings,
    read,
    unigram_preference,
)
from crossdict_jax.studies.contrast.section import circuits, section, sentences, tables
from crossdict_jax.studies.contrast.sets import ContrastSet, read_sets
from crossdict_jax.training.mesh import make_mesh
from crossdict_jax.verify import planted_causal
from crossdict_jax.verify.planted_causal import FEATURES, LINKED, SITE, WORDS
from crossdict_jax.workdir import Workdir, read_jsonl


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Programs for eight devices take long to compile; one test runs on all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preference, "make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))
        yield


# ---------------------------------------------------------------- planted causes


@pytest.fixture(scope="module")
def planted():
    return planted_causal.plant(texts=2)


def triggered(triggers, planted, n=24, seed=0) -> Readings:
    """Pairs "words trigger target" against "words trigger another word", as both models read them.

    The words in front are other triggers: their features fire, and are not what matters.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i in rng.choice(triggers, n):
        others = [t for t in range(FEATURES) if t not in triggers]
        front = [*rng.choice(others, 2), i]
        rows += [[*front, FEATURES + i], [*front, rng.integers(2 * FEATURES, WORDS)]]
    words = np.array(rows, np.int32)
    text, position = np.divmod(np.arange(2 * len(words)), 2)
    position = position + 1  # the first position is never paired, the last one moves nothing
    scored = np.zeros(words.shape, bool)
    scored[:, -1] = True
    of = {
        name: Reading(tokens.astype(np.int32), scored, position, position)
        for name, tokens in (("a", words), ("b", planted.words[words]))
    }
    return Readings(text, of)


def reader_of(planted, readings, name, **how) -> Reader:
    return Reader(planted.lms["ab".index(name)], readings, name, **({"batch_size": 16} | how))


CAUSES = [0, 1, 2]


@pytest.fixture(scope="module")
def readers(planted):
    readings = triggered(CAUSES, planted)
    return {name: reader_of(planted, readings, name) for name in "ab"}


def test_attribution_finds_the_features_that_cause_a_preference(planted, readers):
    reader, dictionary = readers["a"], planted.dictionaries[0]
    attribution = reader.attribution(SITE, dictionary, steps=8)
    assert attribution.shape == (24, FEATURES)
    mean = attribution.mean(0)
    assert sorted(np.argsort(-mean)[:3]) == CAUSES
    assert np.abs(np.delete(mean, CAUSES)).max() < 0.2 * mean[CAUSES].min()
    assert not np.allclose(attribution, reader.attribution(SITE, dictionary, steps=1))
    features = np.arange(FEATURES)
    cut = Cut(reader.own_strength(SITE, dictionary, features), dictionary.W_dec[...], FEATURES)
    exact = singles(reader, SITE, cut, reader.preference())
    assert np.corrcoef(mean, exact.mean(1))[0, 1] > 0.99
    assert (exact[CAUSES].mean(1) > 0.03).all()


def test_one_step_is_the_slope_of_the_preference(planted, readers):
    reader, dictionary = readers["a"], planted.dictionaries[0]
    slope = reader.attribution(SITE, dictionary, steps=1)
    small = 1e-2
    strength = small * reader.own_strength(SITE, dictionary, np.arange(FEATURES))
    cut = Cut(strength, np.asarray(dictionary.W_dec[...]), FEATURES)
    found = singles(reader, SITE, cut, reader.preference()).T / small
    np.testing.assert_allclose(found, slope, atol=0.02 * np.abs(slope).max())


def images_in_b(planted, readers) -> np.ndarray:
    return feature_directions(planted.dictionaries[0], np.arange(FEATURES)) @ planted.map.W[...]


def transferred(planted, readers, vectors, features) -> dict:
    """What is lost in B when vectors stand for A's features, as strongly as these fire in A."""
    order = np.array([*features, *np.setdiff1d(np.arange(FEATURES), features)])
    f = np.asarray(planted.dictionaries[0].encode(readers["a"].row_activations(SITE)))
    cut = Cut(readers["b"].spread(f[:, order]), np.asarray(vectors)[order], len(features))
    clean = readers["b"].preference()
    draws = stats.draw(np.arange(len(clean)), count=100, seed=0)
    return measure(readers["b"], SITE, cut, clean=clean, controls=24, draws=draws, seed=0).row


def test_images_of_causes_bear_the_preference_of_the_other_model(planted, readers):
    row = transferred(planted, readers, images_in_b(planted, readers), CAUSES)
    assert row["moves"] is True
    assert row["effect"] > 0.15 and row["accuracy"] > row["accuracy_ablated"]
    assert max(row[f"p_{family}"] for family in ablation.FAMILIES) <= 0.05


@pytest.mark.parametrize("wrong", ["random", "another"])
def test_other_directions_do_not(planted, readers, wrong):
    true = images_in_b(planted, readers)
    noise = np.random.default_rng(5).normal(size=true.shape) / true.shape[1] ** 0.5
    vectors = noise if wrong == "random" else np.roll(true, 5, axis=0)
    assert transferred(planted, readers, vectors, CAUSES)["moves"] is False


def test_features_that_do_nothing_in_the_other_model_move_nothing(planted):
    unlinked = list(range(LINKED, LINKED + 3))
    readings = triggered(unlinked, planted)
    own = {name: reader_of(planted, readings, name) for name in "ab"}
    assert own["a"].preference().mean() > 0.3 > np.abs(own["b"].preference().mean())
    assert transferred(planted, own, images_in_b(planted, own), unlinked)["effect"] < 0.1


def test_edges_follow_the_way_from_one_layer_to_the_next(planted):
    """Where a block adds nothing, the gradient between two dictionaries is known."""
    lm = models.init(planted_causal.SHAPES[0], seed=0)
    planted_causal.write_features(
        lm, np.asarray(planted.dictionaries[0].W_dec[...]), np.arange(WORDS), pushing=FEATURES
    )
    block = lm.blocks[0]
    for linear in (block.attention.out, block.mlp.down):
        linear.W[...], linear.b[...] = 0 * linear.W[...], 0 * linear.b[...]
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(FEATURES, FEATURES)))[0]
    upper = planted.dictionaries[0]
    V = np.asarray(upper.W_dec[...])
    arrays = {"W_enc": (turn @ V).T, "b_enc": np.zeros(FEATURES), "W_dec": turn @ V}
    lower = from_arrays(find("relu"), arrays | {"b_dec": np.zeros(V.shape[1])})
    readings = triggered(CAUSES, planted)
    at_trigger = {
        name: dataclasses.replace(r, first=r.first[1::2], position=r.position[1::2])
        for name, r in readings.of.items()
    }
    readings = Readings(readings.text[1::2], at_trigger)  # one row a text
    reader = Reader(lm, readings, "a", batch_size=16)
    found = reader.edges((Site(0), lower), (Site(1), upper), CAUSES)
    assert found.shape == (24, 3, FEATURES)
    whole = reader.attribution(Site(1), upper, steps=1)[:, CAUSES]
    f_upper = np.asarray(upper.encode(reader.row_activations(Site(1))))[::2, CAUSES]
    f_lower = np.asarray(lower.encode(reader.row_activations(Site(0))))[::2]
    weight = np.divide(whole, f_upper, out=np.zeros_like(whole), where=f_upper > 0)
    expected = weight[:, :, None] * turn.T[None, CAUSES] * f_lower[:, None, :]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found).max() > 0.05


def test_controls_have_the_norm_of_the_cut():
    rng = np.random.default_rng(0)
    strength = np.abs(rng.normal(size=(4, 5, 7))).astype(np.float32)
    cut = Cut(strength, rng.normal(size=(7, 3)).astype(np.float32), 2)
    random, shuffled, others = ablation._controls(cut, 6, rng)

    def added(vectors):
        return np.linalg.norm(np.einsum("tsf,fd->tsd", strength, vectors))

    for family in (random, shuffled):
        norms = np.linalg.norm(family, axis=2)
        np.testing.assert_allclose(
            norms[:, :2], np.tile(np.linalg.norm(cut.vectors[:2], axis=1), (6, 1)), rtol=1e-5
        )
        assert not norms[:, 2:].any()
    own = np.concatenate([cut.vectors[:2], np.zeros((5, 3))])
    np.testing.assert_allclose([added(v) for v in others], added(own), rtol=1e-4)
    assert not others[:, :2].any()


# ---------------------------------------------------------------- files of pairs

LINES = [
    {
        "clean_prefix": "The dogs",
        "patch_prefix": "The dog",
        "clean_answer": " are",
        "patch_answer": " is",
    },
    {"sentence_good": "The dogs are", "sentence_bad": "The dogs is", "UID": "x"},
    {"prefix": "The dogs", "good": " are", "bad": " is"},
    {"good": "The dogs are", "bad": "The dogs is"},
    {"clean": "The dogs are", "corrupt": "The dogs is"},
    {"correct": "The dogs are", "incorrect": "The dogs is", "label": 1},
]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("line", LINES, ids=lambda line: next(iter(line)))
def test_every_spelling_of_a_pair_is_the_same(line, tmp_path):
    (found,) = read_sets([write(tmp_path / "dogs.json", [line, line])])
    assert found == ContrastSet("dogs", ("The dogs are",), ("The dogs is",), duplicates=1)


def test_a_folder_is_all_its_files(tmp_path):
    for name in ("b.jsonl", "a.json", "SOURCE.txt"):
        write(tmp_path / name, [LINES[3]])
    assert [s.name for s in read_sets([str(tmp_path)])] == ["a", "b"]


BAD = {  # what is written, what the line names
    "fields": ([{"yes": "a", "no": "b"}], "line 1 has fields yes, no; known are clean_prefix"),
    "equal": ([{"good": "a", "bad": "a"}], "good and bad are the same text"),
    "blank": ([{"good": "a", "bad": " "}], "line 1: bad is not text, or blank"),
    "number": ([{"good": 1, "bad": "a"}], "good is not text"),
    "surrogate": ([{"good": "a\ud800", "bad": "a"}], "good has half a character"),
    "list": ([[1]], "line 1 is a JSON list"),
    "empty": ([], "holds no pair"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pairs_are_named(name, tmp_path):
    lines, words = BAD[name]
    with pytest.raises(UserError, match=words):
        read_sets([write(tmp_path / "set.jsonl", lines)])


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(UserError, match="source is empty; name files"):
        read_sets([])
    with pytest.raises(UserError, match="nowhere"):
        read_sets([str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(UserError, match="holds no file ending in"):
        read_sets([str(tmp_path)])
    (tmp_path / "x").mkdir()
    twice = [write(tmp_path / name, [LINES[3]]) for name in ("s.json", "x/s.jsonl")]
    with pytest.raises(UserError, match="two sets called s"):
        read_sets(twice)


# ---------------------------------------------------------------- what models read of them


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished study of made-up pairs on the run that all tests share; (config, work)."""
    config, work = tiny_run.shared_run(tmp_path_factory.getbasetemp())
    root = tmp_path_factory.mktemp("contrast")
    shutil.copytree(work.root, root / "run")
    words = sorted({word for text in tiny_run.make_texts(20) for word in text.split()})
    rng = np.random.default_rng(1)
    pairs = []
    for _ in range(30):
        *front, good, bad = rng.choice(words, 6, replace=False)
        pairs.append({"prefix": " ".join(front), "good": f" {good} x", "bad": f" {bad} y"})
    pairs.append({"good": "abc " * 40 + "a", "bad": "abc " * 40 + "b"})  # longer than a context
    asked = ContrastConfig(
        source=(write(root / "pairs.jsonl", pairs),),
        pairs=16,
        features=2,
        steps=2,
        controls=19,
        rungs=("ridge", "mlp"),
        edges=2,
        batch_size=8,
    )
    config, work = dataclasses.replace(config, contrast=asked), Workdir(root / "run")
    measure_contrast(config, work)
    return config, work


def rows_of(work, what):
    return [row for row in read_jsonl(work.result(stage.ROWS)) if row["what"] == what]


@pytest.fixture(scope="module")
def tokenizers(run):
    return dict(zip("ab", map(models.load_tokenizer, run[0].models)))


def test_preference_is_the_difference_of_log_probabilities(run, tokenizers):
    pairs = ContrastSet("s", ("abc de fgh a", "bad cab ab"), ("abc de fgh bb", "bad dab ab"))
    readings = read(pairs, tokenizers, bos={"a": None, "b": None}, contexts={"a": 64, "b": 64})
    for name, path in zip("ab", run[0].models):
        lm = models.load(path)
        read_by = jax.jit(lm.logits), tokenizers[name]
        expected = [
            log_p(*read_by, good) - log_p(*read_by, bad) for good, bad in zip(pairs.good, pairs.bad)
        ]
        found = Reader(lm, readings, name, batch_size=3).preference()
        np.testing.assert_allclose(found, expected, atol=1e-4)


def log_p(logits, tokenizer, text) -> float:
    """The log-probability of a text behind its first token."""
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    filled = np.pad(ids, (0, 32 - len(ids)))[None]  # one program for all texts
    out = jax.nn.log_softmax(logits(filled)[0], axis=-1)
    return float(sum(out[i, t] for i, t in enumerate(ids[1:])))


def test_rows_are_the_same_places_of_the_text(tokenizers):
    pairs = ContrastSet("s", ("abc de fgh a",), ("abc de fgh bb",))
    readings = read(pairs, tokenizers, bos={"a": None, "b": 7}, contexts={"a": 64, "b": 64})
    a, b = readings.of["a"], readings.of["b"]
    assert (b.tokens[:, 0] == 7).all()
    for text, whole in ((0, pairs.good[0]), (1, pairs.bad[0])):
        rows = np.flatnonzero(readings.text == text)
        for row in rows:
            heads = [
                tokenizers[name].decode(r.tokens[text, front : r.position[row] + 1])
                for name, r, front in (("a", a, 0), ("b", b, 1))
            ]
            assert heads[0] == heads[1] and whole.startswith(heads[0])
        assert (b.first[rows] <= b.position[rows]).all()
        assert (b.first[rows][1:] == b.position[rows][:-1] + 1).all()
        assert rows.size and not (a.position[rows] == 0).any()


def test_whole_spans_are_edited_on_wish(tokenizers, run):
    pairs = ContrastSet("s", ("abc de fgh a",), ("abc de fgh bb",))
    readings = read(pairs, tokenizers, bos={"a": None, "b": None}, contexts={"a": 64, "b": 64})
    lm = models.load(run[0].models[1])
    last, whole = (
        Reader(lm, readings, "b", batch_size=2, whole_span=wish).edited for wish in (False, True)
    )
    assert last.sum() == len(readings.text)
    assert (whole & last == last).all() and not whole[:, 0].any()


def test_pairs_that_say_nothing_or_do_not_fit_are_counted(tokenizers):
    pairs = ContrastSet("s", ("ab cd", "ab cd ef", "ab " * 70), ("ab ce", "ab cd", "cd " * 70))
    how = {"bos": {"a": None, "b": None}, "contexts": {"a": 64, "b": 64}}
    found = read(pairs, tokenizers, **how)
    assert (found.n_pairs, found.nested, found.too_long) == (1, 1, 1)


def test_unigram_preference_counts_tokens():
    reading = Reading(np.array([[1, 2], [1, 3]]), np.array([[False, True]] * 2), None, None)
    found = unigram_preference(reading, np.array([0, 0, 5, 1]))
    assert found == pytest.approx([np.log(6 / 2)])


# ---------------------------------------------------------------- the stage


def test_rows_of_every_kind(run):
    _, work = run
    preferences = rows_of(work, "preference")
    assert [row["model"] for row in preferences] == ["a", "b"]
    for row in preferences:
        assert (row["n_pairs"], row["n_in_file"], row["n_too_long"]) == (16, 31, 1)
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert row["accuracy_swapped_low"] < 0.5 < row["accuracy_swapped_high"]
    sites = [(model, "resid_pre.1") for model in "ab"]
    assert [(row["model"], row["site"]) for row in rows_of(work, "ablation")] == sites
    features = rows_of(work, "feature")
    for place in sites:
        here = [row for row in features if (row["model"], row["site"]) == place]
        assert [row["chosen"] for row in here] == ["top"] * 2 + ["random"] * 2
        assert here[0]["attribution_train"] >= here[1]["attribution_train"] > 0
        assert len({row["feature"] for row in here}) == 4
    assert not rows_of(work, "edge")  # of one layer
    transfers = rows_of(work, "transfer")
    assert [row["direction"] for row in transfers] == ["ridge", "mlp", "match", "own"] * 2
    assert {row["site_target"] for row in transfers} == {"resid_pre.1"}
    assert {row["set"] for row in transfers} == {"pairs"}
    own = {row["model"]: row for row in rows_of(work, "ablation")}
    for row in transfers:
        if row["direction"] == "own":
            assert row["effect"] == own[row["target"]]["effect"]
            assert row["share_of_own"] in (None, 1.0)


def test_no_verdict_without_a_preference(run):
    _, work = run
    prefers = {row["model"]: row["prefers"] for row in rows_of(work, "preference")}
    for row in rows_of(work, "transfer"):
        known = prefers[row["source"]] and prefers[row["target"]]
        assert (row["moves"] is None) == (not known)


def test_finished_rows_are_left_and_other_questions_are_no_other_run(run, monkeypatch):
    config, work = run
    before = work.result(stage.ROWS).read_bytes()
    monkeypatch.setattr(stage, "_rows", None)
    measure_contrast(config, work)
    assert work.result(stage.ROWS).read_bytes() == before
    other = dataclasses.replace(config, contrast=ContrastConfig())
    assert identity(other) == identity(config)


@pytest.fixture
def copy(run, tmp_path):
    _, work = run
    shutil.copytree(work.root, tmp_path / "run")
    return Workdir(tmp_path / "run")


def test_a_killed_stage_goes_on_behind_its_last_part(run, copy, monkeypatch):
    config, work = run
    copy.result(stage.ROWS).unlink()
    done, make = [], stage._Study._transfer

    def killed(self, tasks, known):
        if done and done[-1] != "again":
            raise KeyboardInterrupt
        done.append(tasks[0].source)
        return make(self, tasks, known)

    monkeypatch.setattr(stage._Study, "_transfer", killed)
    with pytest.raises(KeyboardInterrupt):
        measure_contrast(config, copy)
    with copy.result(stage.PROGRESS).open("a") as file:
        file.write('{"key": ["cut o')
    done.append("again")
    monkeypatch.setattr(stage._Study, "_rests_on", None)  # those are known
    measure_contrast(config, copy)
    assert done == ["a", "again", "b"]
    assert copy.result(stage.ROWS).read_bytes() == work.result(stage.ROWS).read_bytes()
    assert not copy.result(stage.PROGRESS).exists()


def test_edges_between_the_chosen_features_of_two_sites(run, copy):
    config, _ = run
    low, high = Site(1), Site(1, "resid_post")
    shutil.copytree(copy.dictionary("a", low), copy.dictionary("a", high))
    (pairs,) = read_sets(config.contrast.source)
    study = stage._Study(FinishedRun(config, copy, open_store(copy.activations)), pairs)
    (row, *_) = [r for r in rows_of(copy, "ablation") if r["model"] == "a"]
    known = {("pairs", "site", "a", str(site)): {"top": row["features"]} for site in (low, high)}
    rows = study._edges("a", low, high, known)["rows"]
    ids = row["features"]
    assert [(r["feature_upper"], r["feature_lower"]) for r in rows] == [
        (b, a) for b in ids for a in ids
    ]
    assert any(r["attribution"] for r in rows)
    assert {(r["site_lower"], r["site_upper"]) for r in rows} == {("resid_pre.1", "resid_post.1")}


@pytest.mark.parametrize("change", [{"features": 1}, {"span": "whole"}, {"pairs": 12}])
def test_settings_change_the_rows(run, copy, change):
    config, work = run
    asked = dataclasses.replace(config.contrast, **change)
    measure_contrast(dataclasses.replace(config, contrast=asked), copy)
    assert read_jsonl(copy.result(stage.ROWS)) != read_jsonl(work.result(stage.ROWS))


def test_texts_that_no_model_can_read_are_refused(run, copy, tmp_path, capsys):
    config, _ = run
    long = [{"good": "abc " * 40 + x, "bad": "abc " * 40 + y} for x, y in ("ab", "cd", "ef", "gh")]
    asked = dataclasses.replace(config.contrast, source=(write(tmp_path / "long.jsonl", long),))
    with pytest.raises(UserError, match=r"no set of which every model can read 4 pairs"):
        measure_contrast(dataclasses.replace(config, contrast=asked), copy)
    assert (
        "long is left out: of 4 pairs every model can read 0 (4 longer" in capsys.readouterr().out
    )


def test_transcoders_are_refused(run):
    config, work = run
    moved = dataclasses.replace(config, sae=dataclasses.replace(config.sae, output_site="mlp_out"))
    with pytest.raises(UserError, match=r"contrast set needs dictionaries that write .*=mlp_out"):
        measure_contrast(moved, work)


def test_batches_and_devices_change_nothing(run, tokenizers, monkeypatch):
    pairs = ContrastSet(
        "s", ("abc de fgh a", "bad cab ab", "ab ba c"), ("abc de fgh bb", "bad dab ab", "ab ba d")
    )
    readings = read(pairs, tokenizers, bos={"a": None, "b": None}, contexts={"a": 64, "b": 64})
    lm, d = models.load(run[0].models[0]), dictionaries.load(run[1].dictionary("a", Site(1)))
    one = Reader(lm, readings, "a", batch_size=2).attribution(Site(1), d, steps=2)
    monkeypatch.setattr(preference, "make_mesh", make_mesh)
    many = Reader(lm, readings, "a", batch_size=3).attribution(Site(1), d, steps=2)
    np.testing.assert_allclose(one, many, atol=1e-5)


# ---------------------------------------------------------------- what is shown


def test_tables_show_costs_controls_and_verdicts(run, capsys):
    config, work = run
    rows = read_jsonl(work.result(stage.ROWS))
    made = tables(rows), circuits(rows)
    assert len(made[0]) == 1 + 2 + 2 and len(made[1]) == 2
    assert all(len(row) == len(t.columns) for t in [*made[0], *made[1]] for row in t.rows)
    stage.run(config, work)
    out = capsys.readouterr().out
    assert "pairs: which text of a pair is likelier" in out and "own" in out


def test_the_section_shows_circuits_and_every_direction(run):
    html = section(read_jsonl(run[1].result(stage.ROWS)))
    assert "pairs: circuit of the top features of b" in html
    assert "directions of b’s top features taken out of a" in html


def transfer(direction, moves):
    sites = {"source": "a", "target": "b", "site_source": "x.1", "site_target": "x.1"}
    return sites | {"direction": direction, "moves": moves}


def test_the_sentence_names_directions_and_admits():
    rows = [transfer(name, moves) for name, moves in zip(("ridge", "mlp", "own"), (1, 0, 1))]
    (sentence,) = sentences(rows)
    assert "the ridge directions of" in sentence and "mlp" not in sentence
    (sentence,) = sentences(rows[1:])
    assert sentence.startswith("Negative result") and "own top features do" in sentence
    assert sentences([transfer("ridge", None)]) == []
