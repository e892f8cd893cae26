"""Probes: logistic regression, labelled texts, planted labels carried over, the study's rows."""

import numpy as np
import pytest
import tiny_run
from scipy.optimize import minimize
from tiny_run import refused, write_rows

from crossdict_jax import models, results, studies
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.config import Config, ProbeConfig
from crossdict_jax.studies.probe import TABLE, logistic, tables
from crossdict_jax.studies.probe import measure as study
from crossdict_jax.studies.probe.labelled import Split, read_labelled, split
from crossdict_jax.workdir import Workdir


def planted(n: int, classes: int, d: int = 40, seed: int = 0):
    """Features [n, d], sparse and not negative, and labels that the first ones say."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(n, d)) - 0.5, 0).astype(np.float32)
    labels = rng.integers(0, classes, n)
    x[np.arange(n), labels] += 2
    return x, labels


def test_a_probe_is_the_minimum_of_its_loss(monkeypatch):
    x, y = planted(60, 3)
    monkeypatch.setattr(logistic, "PENALTIES", (0.03,))
    (probe,) = logistic.train(x, y[None], classes=3, seed=0)
    scale = 1 / np.sqrt(np.square(x).sum(1).mean())

    def loss(parameters):
        W, b = parameters[:-3].reshape(40, 3), parameters[-3:]
        z = scale * x @ W + b[None, :]
        log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
        return -log_p[np.arange(60), y].mean() + 0.015 * np.square(W).sum()

    best = minimize(loss, np.zeros(123), tol=1e-10)
    own = np.concatenate([(probe.W / scale).ravel(), probe.b])
    assert loss(own) == pytest.approx(best.fun, abs=1e-5)


def test_probes_find_planted_labels_and_nothing_in_shuffled_ones(monkeypatch):
    x, y = planted(400, 4)
    train = slice(0, 200)
    shuffled = np.random.default_rng(1).permutation(y[train])
    monkeypatch.setattr(logistic, "PENALTIES", (1e-3, 1e-1))
    true, null = logistic.train(x[train], np.stack([y[train], shuffled]), classes=4, seed=0)
    accuracy = [(probe(x[200:]) == y[200:]).mean() for probe in (true, null)]
    chance = np.bincount(y).max() / len(y)
    assert accuracy[0] > 0.85 and accuracy[1] < chance + 0.1
    assert null.penalty == 1e-1  # nothing to be learned


def test_texts_are_read_once_each(tmp_path):
    lines = [{"t": "a", "l": 1}, {"t": "b", "l": True}, {"t": "a", "l": "1"}, {"t": "c", "l": "x"}]
    found = read_labelled(write_rows(tmp_path / "x.jsonl", lines), text="t", label="l")
    assert found.texts == ("a", "b", "c")
    assert [found.classes[i] for i in found.labels] == ["1", "True", "x"]
    assert found.duplicates == 1


BAD = (  # what is written, what the line names
    ([{"words": "a", "label": 1}], "line 1 has no field text, only words, label; set probe.text"),
    ([{"text": "a", "kind": 1}], "no field label, only text, kind; set probe.label"),
    ([{"text": "a", "label": 0.5}], "label is not text or a whole number, or blank"),
    ([{"text": "a", "label": 1}, {"text": "b", "label": 1}], "every label is 1"),
    ([{"text": "a", "label": 1}, {"text": "a", "label": 2}], "line 2 has label 2 for .* label 1 a"),
    ([], "it is empty"),
)


def test_bad_texts_are_named(tmp_path):
    for lines, words in BAD:
        file = write_rows(tmp_path / "x.jsonl", lines)
        refused(words, read_labelled, file, text="text", label="label")


def test_examples_hold_every_label_and_no_held_out_text():
    labels = np.array([0] * 70 + [1] * 20)
    parts = split(labels, ("x", "y"), examples=(12,), seed=0, left="")
    assert len(parts.test) == 27 and not set(parts.test) & set(parts.train)
    for draw in range(3):
        rows = parts.examples(12, draw)
        assert len(set(rows)) == 12 and set(labels[rows]) == {0, 1}
        assert not set(rows) & set(parts.test)
    assert set(parts.examples(12, 0)) != set(parts.examples(12, 1))


def test_too_few_texts_are_refused():
    for labels, examples, words in (
        ([0, 1] * 45, (16, 500), "examples=500 is more than the 63 texts to train on: why"),
        (range(32), (16,), "examples=16 is less than the 32 different labels"),
    ):
        classes = tuple(map(str, sorted(set(labels))))
        refused(words, split, np.array(labels), classes, examples=examples, seed=0, left="why")


def test_a_label_that_stands_once_is_refused_in_either_part():
    words, given = set(), (split, np.array([0] * 99 + [1]), ("0", "1"))
    for seed in range(30):
        line = refused(r"label [01]: why; give more", *given, examples=(16,), seed=seed, left="why")
        words.add(line.partition(" have ")[0].partition(" has ")[0])
    assert words == {"No text to train on", "All held-out texts"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished study on the shared run; labelled by the first letter of the last word."""
    config, work = tiny_run.private_run(tmp_path_factory)
    words = [text.split()[:6] for text in tiny_run.make_texts(90)]
    lines = [{"text": " ".join(w), "label": "early" if w[-1] < "d" else "late"} for w in words]
    lines += [lines[0], {"text": "abc " * 40, "label": "late"}]
    few = {"examples": (12, 16), "maps": ("mean", "ridge")}
    asked = ProbeConfig(source=write_rows(work.root / "texts.jsonl", lines), **few)
    config = tiny_run.changed(config, probe=asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "DRAWS", 2)
        patch.setattr(logistic, "PENALTIES", (1e-2, 1e-1))
        study.run(config, work)
        yield config, work


def test_a_row_for_every_probe_and_number_of_examples(run):
    config, work = run
    rows = results.read(work, TABLE.file)
    probes = [*config.probe.maps, "own", "source", "tokens", "majority"]
    expected = [(a, b, n, p) for a, b in ("ab", "ba") for n in (12, 16) for p in probes]
    assert [(r["source"], r["target"], r["n"], r["probe"]) for r in rows] == expected
    for row in rows:
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert row["n_texts"] == 27
        assert row["probe"] != "own" or row["behind_own"] == 0.0
        assert row["probe"] != "tokens" or row["lead_tokens"] == 0.0
    of = {(r["source"], r["n"], r["probe"]): r["accuracy"] for r in rows}
    for n in (12, 16):  # a model's own probe is the source one of the other direction
        assert of["a", n, "own"] == of["b", n, "source"]
        assert of["a", n, "mean"] == of["a", n, "majority"]  # which says the same of every text


def test_what_is_learned_of_the_predicted_features_is_used_on_the_true_ones():
    """Planted: labels that the target's features say, and a map that predicts these."""
    f, y = planted(90, 2)
    noise = np.random.default_rng(2).normal(scale=0.1, size=f.shape)
    useless = np.zeros((90, 3), np.float32)
    features = {"own": (f, f), "tokens": (useless, useless)}
    features |= {"right": (np.maximum(f + noise, 0), f), "wrong": (np.roll(f, 7, axis=1), f)}
    parts = Split(y, np.arange(63), np.arange(63, 90), seed=0)
    rows = study.probe_rows(features, parts, 32, Config())
    rows = {row["probe"]: row for row in rows}
    assert rows["own"]["accuracy"] > 0.8
    assert rows["right"]["accuracy"] > rows["own"]["accuracy"] - 0.1
    assert rows["right"]["lead_tokens_low"] > 0
    assert rows["wrong"]["accuracy"] < 0.7 and rows["wrong"]["behind_own_low"] > 0
    assert rows["own"]["accuracy_shuffled"] < 0.7


def test_rows_are_what_the_models_read_there(run):
    config, work = run
    finished = FinishedRun(config, work)
    texts = read_labelled(config.probe.source, text="text", label="label")
    reading, reasons = study.read(finished, texts)
    assert reasons == "1 duplicates, 1 too long, 0 not rebuilt, 0 unpaired"
    side = study.side_of(finished, reading, "b", tiny_run.SITE)
    assert reading.text.tolist() == list(range(90))  # the last position of each
    lm, passages = models.load(finished.store.paths[1]), reading.passages["b"]
    for i, tokens in enumerate(passages.tokens[:3]):
        assert passages.position[i] == len(tokens) - 1  # the end of a text is a pair
        alone = models.capture(lm, tokens[None], [tiny_run.SITE])[tiny_run.SITE][0, -1]
        np.testing.assert_allclose(side.x[i], alone, atol=1e-5)
        assert side.tokens[i] == tokens[-1]


def test_tables_and_the_page_show_every_probe_and_its_null(run, tmp_path, capsys):
    config, work = run
    rows = results.read(work, TABLE.file)
    made = tables(rows)
    assert len(made) == 2
    for table in made:
        assert len(table.rows) == len(config.probe.maps) + 4
        assert table.rows[1][1].note and not table.rows[-1][1].note  # a majority learns nothing
    study.run(config, work)
    assert "Accuracy of probes, a → b" in capsys.readouterr().out
    copy = Workdir(tmp_path / "run")
    assert "Probes" not in dict(studies.sections(copy))
    results.write(copy, TABLE.file, rows)
    shown = dict(studies.sections(copy))["Probes"]
    assert "Accuracy of probes, b → a" in shown and "<svg" in shown
