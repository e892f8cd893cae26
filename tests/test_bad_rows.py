"""Rows that hold NaN or infinity, rows that never vary, and the narrowest dictionaries."""

import json
import shutil
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
import tiny_run
from planted_store import PlantedStore, train_on, trained
from tiny_run import changed, refused, slow

from crossdict_jax import models
from crossdict_jax.activations import extract as stage
from crossdict_jax.activations.extract import extract, masked
from crossdict_jax.activations.store import Rows, Sites, save_shard, shard_name
from crossdict_jax.config import ExtractConfig
from crossdict_jax.dictionaries import start
from crossdict_jax.models import Site
from crossdict_jax.workdir import Workdir

SITE = Site(2)
SKIP = ExtractConfig(nonfinite="skip")


def look(settings, directory, x):
    """What is masked of rows x [40, d], which are written as two shards."""
    for i, part in enumerate(np.split(x.astype(ml_dtypes.bfloat16), 2)):
        save_shard(directory, shard_name("a", str(SITE), i), part)
    each = np.arange(40, dtype=np.int32)
    split, keep = (each >= 20).astype(np.int8), np.ones(40, bool)
    rows = Rows(each // 10, each, 7 * each, each[:, None], each[:, None], split, keep)
    how = {"shards": 2, "documents": ["one", "two", "three", "four"]}
    return masked(settings, directory, Sites({("a", SITE): ("a", SITE)}), rows, **how)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_row_that_is_not_finite_is_named(bad, tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 5))
    x[23, 1] = x[31, 0] = bad
    words = r"a resid_pre\.2: row 23 \(document three, byte 161\) holds NaN or infinity, the first "
    words += r"of 2 such rows of 40; extract\.nonfinite=skip leaves them out"
    refused(words, look, ExtractConfig(), tmp_path, x)


def test_skipped_rows_are_left_out_and_counted_and_hide_no_outlier(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 5))
    x[3] *= 1000
    x[[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 25]] = np.nan
    keep, counts = look(SKIP, tmp_path, x)
    assert np.flatnonzero(~keep).tolist() == [*range(3, 15), 25]
    expected = {"norm_outliers": 1, "norm_outliers_by_site": {"a resid_pre.2": 1}}
    assert counts == expected | {"nonfinite": 12, "nonfinite_by_site": {"a resid_pre.2": 12}}


def test_how_many_rows_are_looked_at_at_a_time_changes_nothing(tmp_path, monkeypatch):
    x = np.random.default_rng(0).normal(size=(40, 5)) * np.arange(40)[:, None] ** 2
    x[[4, 33]] = np.nan
    settings = ExtractConfig(nonfinite="skip", norm_mask=1.5)
    keep, counts = look(settings, tmp_path, x)
    norms = np.linalg.norm(x.astype(ml_dtypes.bfloat16).astype(np.float32), axis=1)
    high = norms > 1.5 * np.nanmedian(norms[:20])
    assert keep.tolist() == (~high & ~np.isnan(norms)).tolist()
    assert counts["norm_outliers"] == high.sum() > 10 and counts["nonfinite"] == 2
    monkeypatch.setattr(stage, "BLOCK", 3)
    of_parts = look(settings, tmp_path, x)
    assert of_parts[1] == counts and (of_parts[0] == keep).all()
    refused(r"row 4 .* the first of 2 such rows of 40", look, ExtractConfig(), tmp_path, x)


def test_a_site_without_a_finite_training_row_is_refused(tmp_path):
    x = np.concatenate([np.full((20, 5), np.nan), np.ones((20, 5))])
    refused(r"a resid_pre\.2: no training row is finite", look, SKIP, tmp_path, x)


def test_a_model_that_gives_nan_after_a_rare_token(tmp_path):
    """Attention carries it to the end of the window: what stands before can still be used."""
    config = tiny_run.make_config(tmp_path)
    lm = models.load(config.models[0])
    counts = Counter(i for text in tiny_run.make_texts(60) for i in lm.tokenizer(text)["input_ids"])
    token = min(counts, key=lambda i: (counts[i] < 3, counts[i]))
    lm.W_E[...] = lm.W_E[...].at[token].set(np.nan)
    models.save(lm, tmp_path / "broken" / "a", dtype="float32")
    for file in (tmp_path / "a").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "broken" / "a")
    config.models, work = (str(tmp_path / "broken" / "a"), config.models[1]), Workdir(tmp_path)
    refused(r"a resid_pre\.1: row \d+ \(document \S+, byte \d+\)", extract, config, work)
    store = extract(changed(config, extract__nonfinite="skip"), work)
    dropped = json.loads(work.result("pairing.json").read_text())["dropped"]
    assert dropped["nonfinite"] > 0
    assert dropped["nonfinite"] + dropped["norm_outliers"] == (~store.rows.keep).sum()
    assert token not in store.rows.token[store.rows.keep, 0] and store.rows.keep.mean() > 0.5
    kept = store.read("a", tiny_run.SITE, np.flatnonzero(store.rows.keep))
    assert np.isfinite(kept.astype(np.float32)).all()


def train_rows(x, root, **sae):
    settings = {"width": 8, "k": 2, "steps": 4, "batch_size": 16} | sae
    return trained(train_on(PlantedStore(x), root, **settings))


def test_training_names_a_row_that_is_not_finite_and_rows_that_never_vary(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 5))
    x[17, 4] = np.inf
    words = r"planted resid_pre\.0: row 17 of the store holds NaN or infinity; extract again"
    refused(words, train_rows, x, tmp_path / "infinite")
    words = r"planted resid_pre\.0: all 50 training rows are equal, so there is nothing to explain"
    refused(words, train_rows, np.full((50, 5), 3.0), tmp_path / "equal")
    one_differs = np.full((start.BLOCK + 2, 1), 3.0)
    one_differs[-1] = 4
    start.check_rows(one_differs, "a", np.arange(len(one_differs)))


@pytest.mark.parametrize("architecture", ["topk", slow("matryoshka")])
def test_one_feature_is_enough(architecture, tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 5)) + 2
    d = train_rows(x, tmp_path, architecture=architecture, width=1, k=1)
    assert d.encode(x).shape == (50, 1) and np.isfinite(d(x)).all()
