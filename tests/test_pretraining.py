"""Training small language models: baselines, both shapes, exact resume, what is written."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from planted_store import kill_in_save

from crossdict_jax import models
from crossdict_jax.activations.plan import bos_id
from crossdict_jax.config import PretrainConfig, TextConfig
from crossdict_jax.pretraining import bigram_loss, train_language_model, unigram_loss

SHAPE = {"d_model": 16, "n_layers": 1, "n_heads": 2, "context": 16, "vocab_size": 280}
QUICK = {"steps": 60, "batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 20}


def test_baselines_are_their_formulas():
    train, test = np.array([0, 1, 0, 1, 0, 2]), np.array([0, 1, 2, 0])
    counts = np.array([3, 2, 1, 0]) + 1  # vocabulary of 4, one token never seen
    by_hand = -np.log(counts[test] / counts.sum()).mean()
    assert unigram_loss(train, test, vocab_size=4) == pytest.approx(by_hand)
    p = counts / counts.sum()
    after_0 = (2 + 2 * p[1]) / 5  # 0 -> 1 twice of three times, two kinds of successors
    after_1 = (0 + 1 * p[2]) / 3  # 1 -> 0 twice, one kind; 1 -> 2 never
    after_2 = p[0]  # 2 was never followed by anything
    by_hand = -np.log([after_0, after_1, after_2]).mean()
    assert bigram_loss(train, test, vocab_size=4) == pytest.approx(by_hand)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rows = [{"text": text} for text in tiny_run.make_texts(80)]
    file = tiny_run.write_rows(tmp_path_factory.mktemp("text") / "text.jsonl", rows)
    return TextConfig(source=file, documents=80)


def tiny(text, model_type="gpt2", **changes):
    how = SHAPE | QUICK | {"save_dtype": "float32", "model_type": model_type}  # compiles fast
    return PretrainConfig(text=text, **how | changes)


@pytest.fixture(scope="module", params=["gpt2", tiny_run.slow("gpt_neox")])
def trained(request, text, tmp_path_factory):
    """A shape of models, the folder of one that was trained, and what the training returned."""
    directory = tmp_path_factory.mktemp("whole")
    return request.param, directory, train_language_model(tiny(text, request.param), directory)


def test_a_trained_model_is_a_folder_that_beats_the_unigram(trained):
    model_type, directory, result = trained
    assert result["loss"] < result["unigram_loss"] < math.log(280) + 1
    lm = models.load(str(directory / "model"))
    assert lm.config.model_type == model_type and lm.config.vocab_size == 280
    ids = lm.tokenizer("abc cab", add_special_tokens=False)["input_ids"]
    assert lm.tokenizer.decode(ids) == "abc cab" and bos_id(lm.tokenizer) is None
    assert lm.logits(np.array([ids])).shape == (1, len(ids), 280)
    recorded = json.loads((directory / "model" / "training.json").read_text())
    assert recorded["loss"] == result["loss"] and recorded["text"]["sha256"]
    losses = [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").open()]
    assert losses[-1] < losses[0]


def test_killed_and_resumed_writes_the_same_bits(trained, text, tmp_path):
    model_type, directory, _ = trained
    config, file = tiny(text, model_type), "model/model.safetensors"
    kill_in_save(2, lambda: train_language_model(config, tmp_path))
    train_language_model(config, tmp_path)
    assert (tmp_path / file).read_bytes() == (directory / file).read_bytes()
    other = Path(shutil.copy(text.source, tmp_path / "as it was"))
    Path(text.source).write_text(other.read_text().replace("a", "b", 1))
    tiny_run.refused("other settings or data", train_language_model, config, tmp_path)
    other.replace(text.source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type=llama cannot be trained; use gpt2 or gpt_neox"),
        ({"n_heads": 7}, "does not divide into 7 heads"),
        ({"vocab_size": 100_000}, "vocab_size=100000 needs more text"),
        ({"context": 100_000}, "fewer than one window of 100000"),
    ],
)
def test_settings_that_cannot_work_are_refused(text, changes, message, tmp_path):
    tiny_run.refused(message, train_language_model, tiny(text, **changes), tmp_path)
    assert (tmp_path / "tokenizer.json").exists() == ("context" in changes)  # told beforehand


def test_the_embedded_models_are_what_their_records_say():
    """Each beats the bigram by far, has layers 5 to 7, and both fit the size agreed on."""
    sizes = 0
    for name in models.EMBEDDED:
        lm = models.load(name)
        record = json.loads((models.ASSETS / name / "training.json").read_text())
        assert lm.config.n_layers >= 8
        assert record["loss"] < record["bigram_loss"] - 0.5 < record["unigram_loss"]
        sizes += sum(f.stat().st_size for f in (models.ASSETS / name).rglob("*") if f.is_file())
    shapes = {(lm.config.model_type, lm.config.d_model) for lm in map(models.load, models.EMBEDDED)}
    assert len(shapes) == 2 and sizes < 16e6
