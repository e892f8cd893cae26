"""Extraction and the store: rows are the right positions, resume, checksums, masks, provenance."""

import contextlib
import copy
import gc
import re
import shutil
import tracemalloc
import types

import jax
import numpy as np
import pytest
import tiny_run
from planted_store import kill_in_save
from tiny_run import changed, extracted, refused
from tokenizers import normalizers

from crossdict_jax import models
from crossdict_jax.activations import extract as stage
from crossdict_jax.activations import pairing
from crossdict_jax.activations import plan as planning
from crossdict_jax.activations.pairing import pair
from crossdict_jax.activations.store import open_store
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import Workdir, read_json, write_text


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = tiny_run.make_config(tmp_path_factory.mktemp("text"))
    config.extract.batch_size = 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "SHARD_WINDOWS", 16)
        yield config


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return extracted(config, tmp_path_factory.mktemp("run") / "w")


def everything(store):
    rows = np.arange(len(store.rows))
    return {m: store.read(m, tiny_run.SITE, rows) for m in store.models}


def test_rows_of_splits_are_apart_and_counted(finished):
    store, work = finished
    assert (np.diff(store.rows.split) >= 0).all()
    documents = [set(store.rows.document[store.select(s)]) for s in ("train", "validation", "test")]
    assert all(documents) and not documents[0] & documents[2] and not documents[0] & documents[1]
    pairing = read_json(work.result("pairing.json"))
    assert sum(pairing["rows"].values()) + pairing["dropped"]["norm_outliers"] == len(store.rows)
    assert pairing["pairs"] == len(store.rows)
    assert pairing["common_ends"] - pairing["dropped"]["first_position"] == len(store.rows)
    assert set(pairing["models"]) == set(store.models)
    refused("has no nobody at", store.read, "nobody", tiny_run.SITE, np.arange(2))


def test_rows_are_what_the_model_computes_at_the_paired_positions(finished):
    """Each stored row against a forward pass of its own over its window alone, and ``pair``."""
    store, _ = finished
    lms = [models.load(path) for path in store.paths]
    for window in (0, len(store.table) // 2, len(store.table) - 1):
        rows, texts = np.flatnonzero(store.rows.window == window), []
        for m, (name, lm) in enumerate(zip(store.models, lms)):
            tokens, position = store.table.tokens(m, window), store.rows.position[rows, m]
            x = models.capture(lm, tokens[None], [tiny_run.SITE])[tiny_run.SITE][0]
            stored = store.read(name, tiny_run.SITE, rows).astype(np.float32)
            np.testing.assert_allclose(stored, np.asarray(x)[position], rtol=1e-2, atol=1e-2)
            np.testing.assert_array_equal(store.rows.token[rows, m], tokens[position])
            texts.append(lm.tokenizer.decode(tokens))
        assert texts[0] == texts[1]
        wanted = pair(texts[0], *(lm.tokenizer for lm in lms))
        expected = np.stack([wanted.position_a, wanted.position_b], axis=1)
        np.testing.assert_array_equal(store.rows.position[rows], expected)


def arrays(plan):
    """All that a plan knows of rows and windows, as arrays."""
    table = [plan.table.document, *plan.table.offsets, *plan.table.ids]
    return [np.array(a) for a in [*vars(plan.rows).values(), *table, plan.shard_starts]]


def test_how_much_text_is_tokenized_at_a_time_changes_nothing(config, tmp_path, monkeypatch):
    lms = [models.load(path) for path in config.models]
    whole = planning.make_plan(config, lms, tmp_path)
    for size in (1, 7):
        monkeypatch.setattr(planning, "BLOCK_DOCUMENTS", size)
        plan = planning.make_plan(config, lms, tmp_path)
        jax.tree.map(np.testing.assert_array_equal, arrays(plan), arrays(whole))
        others = ("documents", "provenance", "statistics", "not_rebuilt", "too_long", "bos")
        assert all(getattr(plan, name) == getattr(whole, name) for name in others)


WORD = tiny_run.make_texts(1)[0].split()[0]


@pytest.mark.parametrize("text, words", [("e", "No window can be read: "), (WORD, "")])
def test_windows_that_a_tokenizer_changes_are_told(text, words, config, tmp_path, capsys):
    a, b = map(models.load, config.models)
    other = types.SimpleNamespace(name="b", config=b.config, tokenizer=copy.deepcopy(b.tokenizer))
    other.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(text, "?")
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext() as caught:
        planning.make_plan(config, [a, other], tmp_path)
    told = str(caught.value) if words else capsys.readouterr().out
    assert re.search(words + r"the tokenizer of b changes the text of \d+ windows .*are kept", told)


def test_memory_does_not_grow_with_documents(config, tmp_path, monkeypatch):
    """Rows, tokens and text are not held; a name and hashes are, of each document."""
    monkeypatch.setattr(planning, "BLOCK_DOCUMENTS", 8)
    lms = [models.load(path) for path in config.models]
    cut = pairing.windows

    def windows(*args, **settings):
        gc.collect()  # or Python's own lists of free objects would count
        return cut(*args, **settings)

    monkeypatch.setattr(planning.pairing, "windows", windows)

    def held(documents):
        source = tmp_path / str(documents) / "long.txt"
        write_text(source, "\n\n".join(tiny_run.make_texts(documents)))
        how = {"text__source": str(source), "text__documents": documents, "text__max_bytes": 150}
        tracemalloc.start()
        plan = planning.make_plan(changed(config, **how), lms, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, len(plan.rows)

    gc.freeze()
    try:
        held(20)  # libraries, and what they keep
        (few, few_rows), (many, many_rows) = held(20), held(300)
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    assert many_rows > few_rows + 12_000  # of which each would be 37 bytes and more
    assert many - few < 500 * (300 - 20)


def test_killed_and_resumed_gives_the_same_store(config, finished, tmp_path):
    store, _ = finished
    kill_in_save(4, lambda: extracted(config, tmp_path / "w"), stage, "save_shard")
    refused("no finished store", open_store, tmp_path / "w" / "activations")
    again, work = extracted(config, tmp_path / "w")
    assert again.meta == store.meta
    for name, x in everything(store).items():
        np.testing.assert_array_equal(everything(again)[name].view(np.uint16), x.view(np.uint16))
    pairing = read_json(work.result("pairing.json"))
    work.result("pairing.json").unlink()  # results may be deleted, to be made again
    extracted(config, tmp_path / "w")
    assert read_json(work.result("pairing.json")) == pairing != {}


@pytest.mark.parametrize("name", ["a/resid_pre.1/shard-00001", "rows-keep", "windows-ids-1"])
@pytest.mark.parametrize("damage", ["truncate", "alter", "remove"])
def test_damage_is_named(finished, tmp_path, name, damage):
    shutil.copytree(finished[1].activations, tmp_path / "a")
    victim = tmp_path / "a" / f"{name}.npy"
    data = bytearray(victim.read_bytes())
    data[-3] ^= 4
    victim.write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
    if damage == "remove":
        victim.unlink()
    assert str(victim) in refused("missing|altered", lambda: everything(open_store(tmp_path / "a")))


@pytest.mark.parametrize(("name", "value"), [("norm_mask", 1e-9), ("control_tokens", "skip")])
def test_a_split_without_rows_is_refused_and_why(name, value, config, tmp_path, monkeypatch):
    monkeypatch.setattr(pairing, "control_ids", lambda tokenizer: tuple(range(290)))
    asked = changed(config, **{f"extract__{name}": value})
    words = rf"none is left in the split train or .*\d dropped by extract\.{name}={value}"
    refused(words, extracted, asked, tmp_path / "w")
    refused("no finished store", open_store, tmp_path / "w" / "activations")


def test_changed_texts_and_models_and_lost_shards_are_refused(config, tmp_path):
    shutil.copytree(config.models[0], tmp_path / "a")
    config, work = changed(config, models=(f"{tmp_path}/a", config.models[1])), tmp_path / "w"
    kill_in_save(1, lambda: extracted(config, work), stage, "masked")
    refused("text has changed", stage.extract, changed(config, text__max_bytes=100), Workdir(work))
    shard, lm = next(work.glob("*/a/*/shard-00000.npy")), models.load(tmp_path / "a")
    models.save(models.init(lm.config, seed=9), tmp_path / "a")
    refused("model a has changed", stage.extract, config, Workdir(work))
    models.save(lm, tmp_path / "a")
    shard.unlink()
    assert str(shard) in refused("is damaged", stage.extract, config, Workdir(work))
    store, work = extracted(config, tmp_path / "finished")
    models.save(models.init(lm.config, seed=9), tmp_path / "a")
    refused("a has changed since .*activations was extracted", store.load_model, "a")
    shutil.rmtree(work.activations)
    work.dictionaries.mkdir()
    refused("model a has changed since dictionaries in", stage.extract, config, work)
    work.dictionaries.rmdir()
    stage.extract(config, work).load_model("a")
