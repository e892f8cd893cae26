"""Steering: the right feature goes in at the right norm, counts are counts, mistakes are named."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import tiny_run
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from crossdict_jax import dictionaries, maps, models, results, workdir
from crossdict_jax.activations.pairing import token_bytes
from crossdict_jax.activations.store import open_store
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.causal.vocabulary import translation
from crossdict_jax.config import SteerConfig
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.studies.steering import answers, measure, prompts, section, source_feature
from crossdict_jax.studies.steering.measure import steer
from crossdict_jax.studies.steering.source_feature import Source
from launch import command
from launch import steer as launched

PROMPTS = "abc def\ngh ab\n"
ENDS = {"token_rate_over_random_low", "token_rate_over_random_high"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, work directory) of a run that may be written into; two prompts in a file."""
    config, work = tiny_run.private_run(tmp_path_factory)
    file = work.root / "prompts.txt"
    file.write_text(PROMPTS)
    few = SteerConfig(prompts=str(file), samples=2, tokens=6, alphas=(0.5,))
    return tiny_run.changed(config, steer=few), work


def asked(config, **changes):
    return tiny_run.changed(config, **{f"steer__{name}": v for name, v in changes.items()})


@pytest.fixture(scope="module")
def answered(run):
    """Of a feature that often fires: the settings, the answer's name, and its bytes."""
    config, work = run
    store = open_store(work.activations)
    d = dictionaries.load(work.dictionary("a", tiny_run.SITE))
    f = d.encode(store.read("a", tiny_run.SITE, store.select("test")).astype(np.float32))
    config = asked(config, feature=int((np.asarray(f) > 0).sum(0).argmax()))
    name = steer(config, work)
    return config, name, work.result(f"steering/{name}.jsonl").read_bytes()


@pytest.fixture(scope="module")
def chosen(run, answered):
    """What is known of A, and its feature."""
    _, work = run
    config, _, _ = answered
    finished = FinishedRun(config, work)
    group = measure.chosen_maps(config, finished.store)
    source = Source(finished, group, translation(*finished.tokenizers.values()))
    return source, source_feature.choose(source)


def test_every_edit_has_its_texts_and_rates(answered):
    _, _, data = answered
    edits = [("none", 0.0), ("mapped", 0.5), ("random", 0.5), ("match", 0.5)]
    rows = [json.loads(line) for line in data.splitlines()]
    conditions, texts = ([r for r in rows if r["row"] == kind] for kind in ("condition", "text"))
    assert [(r["condition"], r["alpha"]) for r in conditions] == edits
    assert len(texts) == 4 * 2 * 2
    for condition in conditions:
        own = [t for t in texts if t["condition"] == condition["condition"]]
        for rate in ("token_rate", "nll"):
            assert condition[rate] == pytest.approx(np.mean([t[rate] for t in own]))
        assert condition["tokens"] == sum(t["tokens"] for t in own)
    none, mapped, random, _ = conditions
    assert none["nll_more"] is None and random["nll_over_random"] is None
    assert mapped["nll_more"] == pytest.approx(mapped["nll"] - none["nll"])
    assert mapped["nll_over_random"] == pytest.approx(mapped["nll"] - random["nll"])
    assert mapped["nll_low"] <= mapped["nll"] <= mapped["nll_high"]


def test_what_is_counted_stands_in_the_texts(run, chosen):
    """Texts that were not written, so that everything about them is known."""
    config, _ = run
    source, feature = chosen
    finished, words = source.run, source.words
    lm, pieces = models.load(finished.store.paths[1]), words.pieces_b
    logits = jax.jit(lm.logits)
    ends = {*finished.tokenizers["b"].all_special_ids}
    promoted, end = next(iter(feature.mapped)), next(iter(ends))
    others = [i for i in range(100, 200) if i not in {*feature.mapped, *ends}]
    tokens = np.resize(np.array(others, np.int32), (4, 6))
    tokens[0, 2] = tokens[0, 4] = promoted
    tokens[0, 5] = tokens[1, 3] = end
    texts = prompts.read_prompts(config, finished.store, "b", finished.tokenizers["b"])
    starts = measure.make_starts(texts, 2, [np.zeros(lm.config.d_model)])
    scored = measure.score_texts(source, feature, starts, tokens)
    assert [text["tokens"] for text in scored] == [5, 3, 6, 6]
    assert scored[0]["token_rate"] == pytest.approx(2 / 5) and scored[2]["token_rate"] == 0
    assert scored[0]["text"] == b"".join(pieces[t] for t in tokens[0, :5]).decode(errors="replace")
    assert scored[0]["before"] == "abc def"
    for row, n in ((1, 4), (2, 6)):  # an end is predicted too
        front = starts.tokens[row, : starts.length[row]]
        ids = np.concatenate([front, tokens[row, :n]])
        log_p = jax.nn.log_softmax(logits(ids[None])[0], axis=-1)
        log_p = np.take_along_axis(np.asarray(log_p)[:-1], ids[1:, None], axis=1)
        assert scored[row]["nll"] == pytest.approx(-log_p[len(front) - 1 :].mean(), abs=1e-4)


def test_the_same_question_has_the_same_answer_bit_for_bit(run, answered):
    _, work = run
    config, name, data = answered
    path = work.result(f"steering/{name}.jsonl")
    path.unlink()
    assert steer(config, work) == name and path.read_bytes() == data
    assert json.loads(work.timing.read_text())["steer"]["tokens"] == 4 * 2 * 2 * 6
    assert not re.search(r"_s\"", data.decode())


def test_the_mapped_direction_is_put_in_at_the_asked_norm(run, chosen):
    _, work = run
    source, feature = chosen
    directions, _ = measure.edits(source, feature, n=4)
    ridge = maps.load(work.map("a", "b", tiny_run.SITE, tiny_run.SITE, "ridge"))
    d_a = dictionaries.load(work.dictionary("a", tiny_run.SITE))
    direction = decoder_rows(d_a, np.array([feature.id]))[0] @ np.asarray(ridge.W[...])
    store = open_store(work.activations)
    x = store.read("b", tiny_run.SITE, store.select("test")).astype(np.float32)
    norm = np.median(np.linalg.norm(x, axis=1))
    expected = norm * direction / np.linalg.norm(direction)
    np.testing.assert_allclose(directions["mapped"], expected, rtol=1e-3, atol=1e-3)
    assert len(np.unique(directions["random"].round(4), axis=0)) == 4  # another one for every text
    np.testing.assert_allclose(np.linalg.norm(directions["random"], axis=1), norm, rtol=1e-5)


def test_a_search_lists_features_and_takes_the_first(run, capsys):
    config, work = run
    tokenizer = models.load_tokenizer(open_store(work.activations).paths[0])
    word = tiny_run.make_texts(1)[0].split()[3]
    measure.run(asked(config, search=word, prompts=""), work)
    printed = capsys.readouterr().out
    newest = max(work.result("steering").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    rows = results.read(work, f"steering/{newest.name}")
    made_of = workdir.read_json(newest.with_suffix(".inputs.json"))
    assert any(name.startswith("maps/a-to-b/") for name in made_of)  # the page tells changes
    (answer,) = answers(rows)
    candidates = answer.feature["candidates"]
    assert answer.feature["feature"] == candidates[0]["feature"]
    assert candidates[0]["promotes"] == max(c["promotes"] for c in candidates)
    assert candidates[0]["token"].encode() in token_bytes(tokenizer)
    assert len({t["before"] for t in answer.texts}) > 1  # held-out beginnings
    assert answer.conditions[0]["search_rate"] is not None
    for shown in (printed, section(rows)):
        for words in ("random direction", "no edit", "nats a token", f"Features around ‘{word}’"):
            assert words in " ".join(shown.split())
    one = [r | dict.fromkeys(r.keys() & ENDS, None) for r in answer.conditions]
    told = measure.sentence(dataclasses.replace(answer, conditions=one))
    assert "shows nothing). It costs" in told


class Rows:
    """Contexts of rows that are texts themselves."""

    texts = tuple(b"a cat sat" if i % 10 == 0 else b"a dog ran" for i in range(100))

    def text(self, row):
        return self.texts[row]

    def first_tokens(self, text, row):
        return [7] if text in self.texts[row] else []


def test_a_feature_that_fires_around_the_text_is_found():
    f = np.random.default_rng(1).random((100, 4))
    f[:, 2] = np.arange(100) % 10 == 0
    f[:, 3] = np.arange(100) < 3  # too seldom to be judged
    blocks = (f[:64], f[64:])
    share, base, token = source_feature.around("cat", Rows(), np.arange(100), blocks)
    assert base == pytest.approx(0.1) and token == 7
    assert share[2] == 1 and share[3] == 0 and (share[:2] < 0.2).all()
    words = r"steer\.search='cow' stands nowhere in the 100"
    tiny_run.refused(words, source_feature.around, "cow", Rows(), np.arange(100), blocks)


def test_prompts_are_one_text_or_the_lines_of_a_file(run, tmp_path, monkeypatch):
    config, work = run
    store = open_store(work.activations)
    tokenizer = models.load_tokenizer(store.paths[1])
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.TXT").write_bytes(b"\xef\xbb\xbfab\xe2\x80\xa8c\r\nde")
    files = {config.steer.prompts: PROMPTS.splitlines(), "~/p.TXT": ["ab\u2028c", "de"]}
    for text, expected in (files | {"ab|cd": ["ab|cd"]}).items():
        read = prompts.read_prompts(asked(config, prompts=text), store, "b", tokenizer)
        assert [tokenizer.decode(tokens) for tokens in read] == expected
    assert [prompts.new_tokens(n, [np.zeros(3), np.zeros(5)], 32, "b") for n in (0, 9)] == [27, 9]


def test_characters_that_the_vocabulary_lacks_are_named():
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert prompts.tokens_of("abba", "b", letters).tolist() == [1, 2, 2, 1]
    words = "vocabulary of b has no tokens for 'ü', '!' in 'abü!'"
    tiny_run.refused(words, prompts.tokens_of, "abü!", "b", letters)


def test_a_folder_that_cannot_be_written_is_told_before_any_work(run, monkeypatch):
    monkeypatch.setattr(measure, "FOLDER", "pairing.json")
    settings = asked(run[0], feature=99)  # which would be told next
    tiny_run.refused("pairing.json cannot be written", steer, settings, run[1])


MISTAKES = [  # settings of steer, what the line names
    ("feature=1 search=ab", "steer.feature and steer.search: give one"),
    ("feature=99", "steer.feature=99: a at resid_pre.1 has features 0 to 31"),
    ("feature=1 alphas=0", "steer.alphas=0.0: 0.0 must be -1000 to 1000, other than 0"),
    ("feature=1 alphas=1e20", "alphas=1e+20: 1e+20 must be -1000 to 1000, other than 0"),
    ("feature=1 source=c", "steer.source=c is no model of this run; use one of a, b."),
    ("feature=1 source=b target=b", "are both b; name two models"),
    ("feature=1 layer_pair=0:1", "steer.layer_pair=0:1 is no layer pair from a to b"),
    ("feature=1 map=procrustes", "use one of ridge, mlp, match"),
    ("feature=1 tokens=70 prompts=ab", "(steer.tokens=70) do not fit into the 64 positions"),
    (f"feature=1 prompts={'abcd ' * 40}", "and 1 behind it (steer.tokens=0) do not fit"),
    ("feature=1 prompts=nowhere.txt", "steer.prompts=nowhere.txt cannot be read"),
    ("search=zebra", "steer.search='zebra' stands nowhere in the"),
]


@pytest.mark.parametrize(("settings", "named"), MISTAKES, ids=[m[:30] for m, _ in MISTAKES])
def test_mistakes_are_told_in_one_line(run, settings, named, capfd):
    _, work = run
    words = re.findall(r"(\w+)=(.*?)(?= \w+=|$)", settings)
    asked_for = [f"--config.steer.{name}={value}" for name, value in words]
    assert command.execute(launched.main, ["test", f"--workdir={work.root}", *asked_for]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert named in line
