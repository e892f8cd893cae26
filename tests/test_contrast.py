"""Contrast sets: files of pairs, planted causes of a preference, the study, and what is shown."""

import copy

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import changed, refused, write_rows

from crossdict_jax import models, results
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.config import Config, ContrastConfig, EvaluationConfig
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.models.run import Passages, Runner
from crossdict_jax.studies.contrast import TABLE, preference, section, sentences, tables
from crossdict_jax.studies.contrast import measure as study
from crossdict_jax.studies.contrast.preference import Cut, Reader, read_pairs
from crossdict_jax.studies.contrast.sets import ContrastSet, read_sets
from crossdict_jax.studies.probe import measure as probe
from crossdict_jax.studies.reading import Reading
from crossdict_jax.studies.steering.measure import steer
from crossdict_jax.verify import planted_causal
from crossdict_jax.verify.planted_causal import FEATURES, LINKED, SITE, WORDS

CAUSES = [0, 1, 2]


@pytest.fixture(scope="module")
def planted():
    return planted_causal.plant(texts=2)


def triggered(triggers, planted, n=24, seed=0) -> Reading:
    """Pairs "words trigger target" and "words trigger another word"; the words are triggers too."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in rng.choice(triggers, n):
        others = [t for t in range(FEATURES) if t not in triggers]
        front = [*rng.choice(others, 2), i]
        rows += [[*front, FEATURES + i], [*front, rng.integers(2 * FEATURES, WORDS)]]
    words = np.array(rows, np.int32)
    text, position = np.divmod(np.arange(2 * len(words)), 2)
    position = position + 1  # the first position is never paired, the last one moves nothing
    tokens = {"a": list(words), "b": list(planted.words[words].astype(np.int32))}
    passages = {name: Passages(of_model, text, position) for name, of_model in tokens.items()}
    return Reading(np.arange(len(words)), passages)


def reader_of(planted, reading, name, batch_size=32) -> Reader:
    runner = Runner(planted.lms["ab".index(name)], batch_size=batch_size)
    return Reader(runner, reading.passages[name])


@pytest.fixture(scope="module")
def readers(planted):
    reading = triggered(CAUSES, planted)
    return {name: reader_of(planted, reading, name) for name in "ab"}


def test_attribution_finds_the_features_that_cause_a_preference(planted, readers):
    reader, dictionary = readers["a"], planted.dictionaries[0]
    attribution = reader.attribution(SITE, dictionary)
    assert attribution.shape == (24, FEATURES)
    mean = attribution.mean(0)
    assert sorted(np.argsort(-mean)[:3]) == CAUSES
    assert np.abs(np.delete(mean, CAUSES)).max() < 0.2 * mean[CAUSES].min()
    features = np.arange(FEATURES)
    cut = Cut(reader.strength(SITE, dictionary, features), dictionary.W_dec[...], FEATURES)
    exact = preference.singles(reader, SITE, cut)
    assert np.corrcoef(mean, exact.mean(1))[0, 1] > 0.99 and (exact[CAUSES].mean(1) > 0.03).all()


def transferred(planted, readers, vectors, features) -> dict:
    """What is lost in B when vectors stand for A's features, as strongly as these fire in A."""
    order = np.array([*features, *np.setdiff1d(np.arange(FEATURES), features)])
    at = readers["a"].passages
    x = readers["a"].x(SITE)[at.window, at.position]
    f = np.asarray(planted.dictionaries[0].encode(x))
    cut = Cut(readers["b"].spread(f[:, order]), np.asarray(vectors)[order], len(features))
    asked = ContrastConfig(controls=24)
    config = Config(contrast=asked, evaluation=EvaluationConfig(bootstrap=100))
    return preference.ablate(readers["b"], SITE, cut, config)[1]


def test_mapped_directions_of_causes_bear_the_preference_of_the_other_model(planted, readers):
    true = decoder_rows(planted.dictionaries[1], np.arange(FEATURES))
    row = transferred(planted, readers, true, CAUSES)
    assert row["moves"] is True
    assert row["effect"] > 0.15 and row["accuracy"] > row["accuracy_ablated"]
    assert max(row[f"p_{family}"] for family in ("random", "shuffled", "others")) <= 0.05
    few = {n: reader_of(planted, triggered(CAUSES, planted, n=5), n) for n in "ab"}
    assert transferred(planted, few, true, CAUSES)["moves"] is None


def test_other_directions_and_features_that_do_nothing_there_do_not(planted, readers):
    true = decoder_rows(planted.dictionaries[1], np.arange(FEATURES))
    noise = np.random.default_rng(5).normal(size=true.shape) / true.shape[1] ** 0.5
    for wrong in (noise, np.roll(true, 5, axis=0)):
        assert transferred(planted, readers, wrong, CAUSES)["moves"] is False
    unlinked = list(range(LINKED, LINKED + 3))
    both = {n: reader_of(planted, triggered(unlinked, planted), n) for n in "ab"}
    assert both["a"].preference.mean() > 0.3 > np.abs(both["b"].preference.mean())
    assert transferred(planted, both, true, unlinked)["effect"] < 0.1


def test_controls_have_the_norm_of_the_cut():
    rng = np.random.default_rng(0)
    strength = np.abs(rng.normal(size=(4, 5, 7))).astype(np.float32)
    cut = Cut(strength, rng.normal(size=(7, 3)).astype(np.float32), 2)
    random, shuffled, others = preference.draw_controls(cut, 6, rng).values()
    for family in (random, shuffled):
        norms = np.linalg.norm(family, axis=2)
        expected = np.tile(np.linalg.norm(cut.vectors[:2], axis=1), (6, 1))
        np.testing.assert_allclose(norms[:, :2], expected, rtol=1e-5)
        assert not norms[:, 2:].any()
    itself = np.concatenate([cut.vectors[:2], np.zeros((5, 3))])
    cuts = (np.einsum("tsf,fd->tsd", strength, v) for v in (itself, *others))
    size, *sizes = map(np.linalg.norm, cuts)
    np.testing.assert_allclose(sizes, size, rtol=1e-4)
    assert not others[:, :2].any()
    strength[:, :, 4:] = 0  # two others fire: every draw would be the same edit
    assert not len(preference.draw_controls(cut, 6, rng)["others"])


LINES = [
    {"clean_prefix": "The dogs", "clean_answer": " are", "patch_answer": " is", "case": "x"},
    {"sentence_good": "The dogs are", "sentence_bad": "The dogs is", "UID": "x"},
    {"prefix": "The dogs", "good": " are", "bad": " is"},
    {"good": "The dogs are", "bad": "The dogs is"},
]


def test_every_spelling_of_a_pair_is_the_same_and_a_folder_is_all_its_files(tmp_path):
    for i, line in enumerate(LINES):
        write_rows(tmp_path / f"{i}.{('json', 'jsonl')[i % 2]}", [line, line])
    write_rows(tmp_path / "SOURCE.txt", LINES)
    good, bad = ("The dogs are",), ("The dogs is",)
    expected = [ContrastSet(str(i), good, bad, duplicates=1) for i in range(len(LINES))]
    assert read_sets([str(tmp_path)]) == expected


BAD = (  # what is written, what the line names
    ([{"yes": "a", "no": "b"}], "line 1 has fields yes, no; known are clean_prefix"),
    ([{"good": "a", "bad": "a"}], "good and bad are the same text"),
    ([{"good": "a", "bad": " "}], "line 1: bad is not text, or blank"),
    ([{"good": "a\ud800", "bad": "a"}], "good has half a character"),
    ([], "holds no pair"),
)


def test_bad_pairs_and_missing_sources_are_named(tmp_path):
    for lines, words in BAD:
        refused(words, read_sets, [write_rows(tmp_path / "set.jsonl", lines)])
    refused("source is empty; name files", read_sets, [])
    refused("nowhere", read_sets, [str(tmp_path / "nowhere.jsonl")])
    (tmp_path / "x").mkdir()
    refused("holds no file ending in", read_sets, [str(tmp_path / "x")])
    twice = [write_rows(tmp_path / name, [LINES[3]]) for name in ("s.json", "x/s.jsonl")]
    refused("two sets called s", read_sets, twice)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished study of made-up pairs on the run that all tests share; (config, work)."""
    config, work = tiny_run.private_run(tmp_path_factory)
    words = sorted({word for text in tiny_run.make_texts(20) for word in text.split()})
    rng = np.random.default_rng(1)
    pairs = []
    for _ in range(30):
        *front, good, bad = rng.choice(words, 6, replace=False)
        pairs.append({"prefix": " ".join(front), "good": f" {good} x", "bad": f" {bad} y"})
    pairs.append({"good": "abc " * 40 + "a", "bad": "abc " * 40 + "b"})  # longer than a context
    few = {"pairs": 16, "features": 2, "controls": 19, "maps": ("ridge",)}
    asked = ContrastConfig(source=(write_rows(work.root / "pairs.jsonl", pairs),), **few)
    config = changed(config, contrast=asked)
    study.run(config, work)
    return config, work


def rows_of(work, kind):
    return [row for row in results.read(work, TABLE.file) if row["what"] == kind]


@pytest.fixture(scope="module")
def finished(run):
    return FinishedRun(*run)


PAIRS = ContrastSet("s", ("abc de fgh a", "bad cab ab"), ("abc de fgh bb", "bad dab ab"))


def test_preference_is_the_difference_of_log_probabilities(finished):
    reading, _ = read_pairs(finished, PAIRS)

    def log_p(logits, tokenizer, text) -> float:
        """Of a text behind its first token."""
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
        filled = np.pad(ids, (0, 32 - len(ids)))[None]  # one program for all texts
        out = jax.nn.log_softmax(logits(filled)[0], axis=-1)
        return float(sum(out[i, t] for i, t in enumerate(ids[1:])))

    for name, path in zip("ab", finished.store.paths):
        model = jax.jit(models.load(path).logits), finished.tokenizers[name]
        pairs = zip(PAIRS.good, PAIRS.bad)
        expected = [log_p(*model, good) - log_p(*model, bad) for good, bad in pairs]
        reader = Reader(finished.runner(name), reading.passages[name])
        np.testing.assert_allclose(reader.preference, expected, atol=1e-4)


def test_pairs_that_say_nothing_or_do_not_fit_are_counted(finished):
    pairs = ContrastSet("s", ("ab cd", "ab cd ef", "ab " * 70), ("ab ce", "ab cd", "cd " * 70))
    reading, nested = read_pairs(finished, pairs)
    assert (reading.kept.tolist(), nested, reading.too_long) == ([0, 1], 1, 1)


@pytest.mark.mesh
def test_batches_and_devices_change_nothing(planted):
    """Two texts a device in one batch of sixteen, or all pairs in one."""
    reading = triggered(CAUSES, planted, n=9)
    d = planted.dictionaries[0]
    both = (reader_of(planted, reading, "a", batch_size=size) for size in (2, 64))
    parts = (reader.attribution(SITE, d) for reader in both)
    np.testing.assert_allclose(*parts, atol=1e-5)


def test_rows_of_every_kind(run):
    _, work = run
    preferences = rows_of(work, "preference")
    assert [row["model"] for row in preferences] == ["a", "b"]
    accuracy = study._share("accuracy", np.array([True] * 4))  # resamples of four of four agree
    assert 0.39 < accuracy["accuracy_low"] < 0.4 and accuracy["accuracy_high"] == 1
    for row in preferences:
        assert row["prefers"] == (row["accuracy_low"] > 0.5)
        assert (row["n_pairs"], row["n_in_file"]) == (16, 31)
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    sites = [(model, "resid_pre.1") for model in "ab"]
    assert [(row["model"], row["site"]) for row in rows_of(work, "ablation")] == sites
    for site in sites:
        features = [r for r in rows_of(work, "feature") if (r["model"], r["site"]) == site]
        assert len(features) == 2
        assert features[0]["attribution_train"] >= features[1]["attribution_train"] > 0
    transfers = rows_of(work, "transfer")
    assert [row["direction"] for row in transfers] == ["ridge", "match", "own"] * 2
    assert {(row["set"], row["site_target"]) for row in transfers} == {("pairs", "resid_pre.1")}
    ablated = {row["model"]: row for row in rows_of(work, "ablation")}
    prefers = {row["model"]: row["prefers"] for row in preferences}
    for row in transfers:
        if row["direction"] == "own":
            assert row["effect"] == ablated[row["target"]]["effect"]
            assert row["share_of_own"] in (None, 1.0)
        judged = prefers[row["source"]] and prefers[row["target"]]
        assert (row["moves"] is None) == (not judged)  # no verdict without a preference


def test_whole_spans_are_ablated_where_that_is_asked(run, finished):
    config, _ = run
    pairs = read_sets(config.contrast.source)[0]
    edited = [study.Halves(finished, pairs).readers("a")[1].edited]
    finished.config = changed(config, contrast__span="whole")
    edited.append(study.Halves(finished, pairs).readers("a")[1].edited)
    finished.config = config
    assert (edited[0] <= edited[1]).all() and edited[0].sum() < edited[1].sum()


def test_a_study_that_cannot_be_made_is_refused(run, tmp_path, capsys):
    config, work = run
    long = [{"good": "abc " * 40 + x, "bad": "abc " * 40 + y} for x, y in ("ab", "cd", "ef", "gh")]
    source = (write_rows(tmp_path / "long.jsonl", long),)
    words = r"no set of which every model can read 4 distinct pairs .0 of 4"
    refused(words, study.run, changed(config, contrast__source=source), work)
    assert "long is left out: of 4 pairs every model can read 0 (4 l" in capsys.readouterr().out
    moved = changed(config, sae__output_site="mlp_out")
    refused(r"contrast set needs dictionaries that write .*=mlp_out", study.run, moved, work)


def test_tokens_beyond_a_models_vocabulary_are_refused(run, tmp_path, monkeypatch):
    """By every study of a user's texts."""
    wider = {path: copy.deepcopy(models.load_tokenizer(path)) for path in run[0].models}
    for tokenizer in wider.values():
        tokenizer.add_tokens("<|new|>")
    monkeypatch.setattr(models, "load_tokenizer", wider.get)

    def ask(call, words, **settings):
        refused(words, call, changed(run[0], **settings), run[1])

    pairs = [{"good": f"<|new|> {word} a", "bad": f"<|new|> {word} b"} for word in "cdefgh"]
    texts = [{"text": f"<|new|> {i}", "label": i % 2} for i in range(20)]
    source = write_rows(tmp_path / "pairs.jsonl", pairs)
    ask(study.run, "which every model can read 4 distinct", contrast__source=(source,))
    source = write_rows(tmp_path / "texts.jsonl", texts)
    ask(probe.run, r"0 of 20 texts are left \(.* 20 not rebuilt", probe__source=source)
    ask(steer, "Token id 310 is outside b", steer__feature=1, steer__prompts="ab <|new|>")


def test_tables_show_costs_controls_and_verdicts(run, capsys):
    config, work = run
    rows = results.read(work, TABLE.file)
    assert len(tables(rows)) == 1 + 2 + 2 and len(tables(rows, ["feature"])) == 2
    study.run(config, work)
    printed, html = capsys.readouterr().out, section(rows)
    assert "pairs: which text of a pair is likelier" in printed and "own" in printed
    assert "pairs: top features of b" in html
    assert "directions of b’s top features taken out of a" in html


def transfer(direction, moves):
    sites = {"source": "a", "target": "b", "site_source": "x.1", "site_target": "x.1"}
    return sites | {"what": "transfer", "direction": direction, "moves": moves}


def test_the_sentence_names_directions_and_admits():
    rows = [transfer(name, moves) for name, moves in zip(("ridge", "mlp", "own"), (1, 0, 1))]
    (sentence,) = sentences(rows)
    assert "the ridge directions of" in sentence and "mlp" not in sentence
    (sentence,) = sentences(rows[1:])
    assert sentence.startswith("Negative result") and "own top features do" in sentence
    assert not list(sentences([transfer("ridge", None)]))
