"""Puts planted rows where the pipeline looks for a run's: a store, dictionaries, fitted rungs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from crossdict_jax import dictionaries
from crossdict_jax.activations.store import (
    Rows,
    Store,
    WindowTable,
    digest,
    open_store,
    save_rows,
    save_table,
    shard_name,
)
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import Config, EvaluationConfig, MapConfig, SAEConfig
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.dictionaries.base import find, from_arrays
from crossdict_jax.evaluation import transfer_metrics
from crossdict_jax.evaluation.scoring import score_ladder
from crossdict_jax.evaluation.transfer import TokenMeans
from crossdict_jax.maps import (
    ActivationMap,
    Pairs,
    Problem,
    Side,
    Task,
    fit_maps,
    load_pairs,
    predict_activations,
    rung,
    save,
    shuffle_seed,
    shuffled,
    tasks,
)
from crossdict_jax.maps.base import encode_rows, slices
from crossdict_jax.maps.moments import token_sums
from crossdict_jax.models import Site
from crossdict_jax.verify.planted import Views
from crossdict_jax.workdir import Workdir, write_json

SITE = Site(0)
NAMES = ("a", "b", "c", "d")  # of planted models
FRACTIONS = (0.7, 0.85)  # of the documents: where validation and test begin


def planted_config(*, kinds: Sequence[str] = ("ridge",), seed: int = 0, **map_settings) -> Config:
    """Returns the settings of a run over a planted store."""
    return Config(
        models=NAMES[:2],
        layers=(SITE.layer,),
        seed=seed,
        sae=SAEConfig(),
        map=MapConfig(kinds=tuple(kinds), **map_settings),
        evaluation=EvaluationConfig(bootstrap=100),
    )


def write_store(views: Views, directory: Path) -> Store:
    """Writes planted rows as ``extract`` would have, split by document; returns the open store."""
    names, n = NAMES[: len(views.x)], len(views)
    share = views.document / (views.document.max() + 1)
    rows = Rows(
        document=views.document,
        window=views.document,
        byte_end=np.arange(n, dtype=np.int32),
        position=np.ones((n, len(names)), np.int32),
        token=np.stack(views.tokens, axis=-1),
        split=np.searchsorted(FRACTIONS, share, side="right").astype(np.int8),
        keep=np.ones(n, bool),
    )
    directory.mkdir(parents=True)
    save_rows(directory / "rows.npz", rows)
    save_table(directory / "windows.npz", _table(views))
    for name, x in zip(names, views.x):
        path = directory / shard_name(name, str(SITE), 0)
        path.parent.mkdir(parents=True)
        np.save(path, x.astype(ml_dtypes.bfloat16).view(np.uint16))
    write_json(directory / "meta.json", _meta(views, names, directory))
    return open_store(directory)


def _table(views: Views) -> WindowTable:
    documents = int(views.document.max()) + 1
    stops = np.searchsorted(views.document, np.arange(documents + 1))
    return WindowTable(
        document=np.arange(documents, dtype=np.int32),
        offsets=(stops,) * len(views.x),
        ids=views.tokens,
    )


def _meta(views: Views, names: Sequence[str], directory: Path) -> dict:
    files = ("rows.npz", "windows.npz", *(shard_name(name, str(SITE), 0) for name in names))
    return {
        "models": {
            name: {"path": name, "d_model": x.shape[1], "bos": None, "sites": [str(SITE)]}
            for name, x in zip(names, views.x)
        },
        "rows": len(views),
        "dtype": "bfloat16",
        "shard_starts": [0, len(views)],
        "documents": [f"planted-{i}" for i in range(int(views.document.max()) + 1)],
        "text": {"source": "planted"},
        "checksums": {name: digest(directory / name) for name in files},
    }


def lossless(d_model: int) -> Dictionary:
    """Returns the dictionary whose features are the positive and the negative part of a row."""
    both = np.concatenate([np.eye(d_model), -np.eye(d_model)])
    return _linear(both.T, both)


def positive(d_model: int) -> Dictionary:
    """Returns the dictionary whose features are a row's positive entries, each one itself."""
    return _linear(np.eye(d_model), np.eye(d_model))


def _linear(W_enc: np.ndarray, W_dec: np.ndarray) -> Dictionary:
    d_model, width = W_enc.shape
    biases = {"b_enc": np.zeros(width), "b_dec": np.zeros(d_model)}
    return from_arrays(find("relu"), {"W_enc": W_enc, "W_dec": W_dec, **biases})


def exact(directions: np.ndarray, *, threshold: float = 0.2) -> Dictionary:
    """Returns the dictionary whose features are the codes behind ``codes @ directions``.

    Only without superposition: as many dimensions as features or more.

    Args:
      directions: [features, d_model].
      threshold: what noise must not pass.
    """
    features, d_model = directions.shape
    arrays = {
        "W_enc": np.linalg.pinv(directions),
        "W_dec": directions,
        "b_enc": np.zeros(features),
        "b_dec": np.zeros(d_model),
        "threshold": np.full(features, threshold),
    }
    return from_arrays(find("jumprelu"), arrays)


def save_dictionaries(made: Sequence[Dictionary], work: Workdir) -> None:
    """Puts one dictionary of each planted model where maps look for it."""
    for name, dictionary in zip(NAMES, made):
        dictionaries.save(dictionary, work.dictionary(name, SITE))


def ladder(config: Config, work: Workdir) -> list[dict]:
    """Fits every rung of a run and returns the rows of its transfer.jsonl."""
    from tqdm import tqdm

    store = open_store(work.activations)
    fit_maps(config, store, work)
    rows = []
    groups = itertools.groupby(tasks(config, store), key=lambda t: (t.source, t.target))
    with tqdm(disable=True) as progress:
        for _, group in groups:
            rows += score_ladder(list(group), config, store, work, progress).rows({})
    return rows


def planted_ladder(
    views: Views,
    made: Sequence[Dictionary],
    config: Config,
    directory: Path,
    *,
    pairings: Sequence[str] = ("aligned",),
) -> list[dict]:
    """Returns the rows of transfer.jsonl from the first planted model to the second alone."""
    from tqdm import tqdm

    work = Workdir(directory)
    store = write_store(views, work.activations)
    save_dictionaries(made, work)
    chosen = [
        task
        for task in tasks(config, store)
        if task.source == NAMES[0] and task.pairing in pairings
    ]
    for task in chosen:
        _fit(task, config, store, work)
    with tqdm(disable=True) as progress:
        return score_ladder(chosen, config, store, work, progress).rows({})


def _fit(task: Task, config: Config, store: Store, work: Workdir) -> None:
    """Fits one map, as ``fit_maps`` does for all of a run, and saves it."""
    ends = (task.source, task.target, task.site_source, task.site_target)
    splits = {s: load_pairs(store, *ends, s, work) for s in ("train", "validation")}
    if task.pairing == "shuffled":
        splits = {s: shuffled(p, shuffle_seed(config.seed, s)) for s, p in splits.items()}
    problem = Problem(task.label, **splits)
    (fitted,) = rung(task.kind).fit(
        [problem], config.map, seed=config.seed, directory=work.maps / "training" / task.kind
    )
    save(
        fitted.map,
        task.path(work),
        dictionary=work.dictionary(task.target, task.site_target),
        record=fitted.record,
    )


def pick(rows: list[dict], kind: str, *, pairing: str = "aligned", source: str = "a") -> dict:
    """Returns the row of one rung, from the first model to the second unless told otherwise."""
    (row,) = (
        row
        for row in rows
        if (row["map"], row["pairing"], row["source"]) == (kind, pairing, source)
    )
    return row


def activation_metrics(m: ActivationMap, train: Pairs, test: Pairs, *, seed: int = 0) -> dict:
    """Returns the columns of transfer.jsonl for x_B itself in place of B's features.

    Args:
      m: a map that predicts activations, fitted on ``train``.
      test: held-out pairs.
    """
    fitted, target = predict_activations(m, train), np.asarray(train.target.x, np.float32)
    sums = [
        token_sums(train.source.tokens, lambda rows, x=x: x[rows], size=x.shape[1])
        for x in (target, fitted)
    ]
    place = sums[0].places(test.source.tokens)
    return transfer_metrics(
        predict_activations(m, test),
        np.asarray(test.target.x, np.float32),
        train_mean=target.mean(0, dtype=np.float64),
        documents=test.documents,
        bootstrap=100,
        seed=seed,
        token_means=TokenMeans(
            index=np.where(place < len(sums[0].ids), place, -1),
            target=sums[0].shrunk(0.0)[:-1],
            predicted=sums[1].shrunk(0.0)[:-1],
        ),
    )


def features(side: Side) -> np.ndarray:
    """Returns the features [n, width] of one model's rows."""
    parts = [encode_rows(side.dictionary, side.x[rows]) for rows in slices(len(side.x))]
    return np.concatenate(parts)


def closed_form(
    kind: str, store: Store, work: Workdir, source: str, target: str, site: Site
) -> dict:
    """Returns ``activation_metrics`` of a rung between two models of a store at a site."""
    splits = {s: _unread(store, source, target, site, s) for s in SPLITS}
    problem = Problem(kind, splits["train"], splits["validation"])
    (fitted,) = rung(kind).fit([problem], MapConfig(), seed=0, directory=work.maps)
    return activation_metrics(fitted.map, splits["train"], splits["test"])


def _unread(store: Store, source: str, target: str, site: Site, split: str) -> Pairs:
    """Returns pairs of activations; their dictionaries are never asked for features."""
    rows = store.select(split)

    def side(model: str) -> Side:
        x = store.read(model, site, rows)
        return Side(x, store.tokens(model, rows), lossless(x.shape[1]))

    return Pairs(side(source), side(target), store.rows.document[rows])
