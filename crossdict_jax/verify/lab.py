"""The pipeline at a gate's size: planted rows as a store, and short real runs."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from crossdict_jax import dictionaries, maps
from crossdict_jax.activations.store import Store, write_store
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import (
    Config,
    EvaluationConfig,
    ExtractConfig,
    MapConfig,
    SAEConfig,
    TextConfig,
)
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.dictionaries.base import find, from_arrays
from crossdict_jax.evaluation import scoring, transfer_metrics
from crossdict_jax.evaluation.transfer import TokenMeans
from crossdict_jax.maps import Problem
from crossdict_jax.maps.fit import Loader, fit_tasks
from crossdict_jax.maps.moments import find_tokens, token_sums
from crossdict_jax.models import Site
from crossdict_jax.verify.planted import Views
from crossdict_jax.workdir import Workdir

SITE = Site(0)  # of planted models
NAMES = ("a", "b")  # of planted models
FRACTIONS = (0.7, 0.85)  # of the documents: where validation and test begin
BOOTSTRAP = 100
LM_SITE = Site(6)  # of 8 layers: late enough for context, early enough to be changed by later ones


def planted_config(seed: int, kinds: Sequence[str] = (), **map_settings) -> Config:
    """Returns the settings of a run over a planted store."""
    return Config(
        models=NAMES,
        layers=(SITE.layer,),
        seed=seed,
        map=MapConfig(kinds=tuple(kinds), **map_settings),
        evaluation=EvaluationConfig(bootstrap=BOOTSTRAP),
    )


def lm_config(
    models: Sequence[str], *, documents: int, kinds: Sequence[str] = ("ridge",), seed: int, **sae
) -> Config:
    """Returns the settings of a short run of language models on docstrings at one site.

    ``sae`` are changes to small and short dictionary settings.
    """
    return dataclasses.replace(
        planted_config(seed, kinds),
        models=tuple(models),
        layers=(LM_SITE.layer,),
        text=TextConfig(documents=documents, max_bytes=700, window_tokens=128),
        extract=ExtractConfig(batch_size=32),
        sae=SAEConfig(**{"width": 256, "k": 16, "steps": 200, "batch_size": 512} | sae),
    )


def save_store(views: Views, work: Workdir, made: Sequence[Dictionary] = ()) -> Store:
    """Writes planted rows as ``extract`` would, split by document; returns the open store.

    ``made`` are the planted models' dictionaries, saved where maps read them.
    """
    for name, dictionary in zip(NAMES, made):
        dictionaries.save(dictionary, work.dictionary(name, SITE))
    share = views.document / (views.document.max() + 1)
    return write_store(
        work.activations,
        dict(zip(NAMES, views.x)),
        site=SITE,
        document=views.document,
        tokens=views.tokens,
        split=np.searchsorted(FRACTIONS, share, side="right").astype(np.int8),
    )


def exact(directions: np.ndarray, *, threshold: float = 0.2) -> Dictionary:
    """Returns the dictionary whose features are the codes behind ``codes @ directions``.

    Only without superposition: ``directions`` is [features, d_model], features <= d_model, and
    noise must stay below the threshold.
    """
    arrays = {"W_enc": np.linalg.pinv(directions), "W_dec": directions}
    width, d_model = directions.shape
    arrays |= {"b_enc": np.zeros(width), "b_dec": np.zeros(d_model)}
    return from_arrays(find("jumprelu"), arrays | {"threshold": np.full(width, threshold)})


def positive(d_model: int) -> Dictionary:
    """Returns the dictionary whose features are the positive entries of a row."""
    return exact(np.eye(d_model), threshold=0.0)


def transfer_rows(
    config: Config, store: Store, work: Workdir, chosen: Callable = lambda task: True
) -> list[dict]:
    """Fits the chosen maps of a run, and returns their rows of transfer.jsonl."""
    tasks = [task for task in maps.tasks(config, store) if chosen(task)]
    loader = Loader(config, store, work)
    fit_tasks(tasks, loader, seed=config.seed)
    rows = []
    for _, group in itertools.groupby(tasks, key=lambda t: (t.source, t.target)):
        rows += scoring.transfer_rows(scoring.score_maps(list(group), loader))
    return rows


def planted_rows(
    views: Views,
    made: Sequence[Dictionary],
    directory: Path,
    *,
    seed: int,
    kinds: Sequence[str] = ("ridge",),
    pairings: Sequence[str] = ("aligned",),
    **map_settings,
) -> list[dict]:
    """Returns the rows of transfer.jsonl from the first planted model to the second."""
    work, config = Workdir(directory), planted_config(seed, kinds, **map_settings)
    store = save_store(views, work, made)
    return transfer_rows(
        config, store, work, lambda t: t.source == NAMES[0] and t.pairing in pairings
    )


def pick(rows: list[dict], kind: str, *, pairing: str = "aligned", source: str = "a") -> dict:
    """Returns the row of one map, by default from the first model to the second."""
    wanted = {"map": kind, "pairing": pairing, "source": source}
    (row,) = (row for row in rows if wanted.items() <= row.items())
    return row


def activation_scores(store: Store, work: Workdir, source: str, target: str) -> dict:
    """Returns the columns of transfer.jsonl of ridge onto B's activations in place of features.

    The dictionaries of both models must exist, though they are not used.
    """
    train, validation, test = (
        maps.load_pairs(store, source, target, LM_SITE, LM_SITE, split, work) for split in SPLITS
    )
    (fitted,) = maps.map_class("ridge").fit([Problem("ridge", train, validation)], MapConfig())
    x = np.asarray(train.target.x, np.float32)
    target, predicted = (
        token_sums(train.source.tokens, rows)
        for rows in (x, maps.predict_activations(fitted.map, train))
    )
    index = find_tokens(target.ids, test.source.tokens, np)
    index = np.where(index < len(target.ids), index, -1)
    return transfer_metrics(
        maps.predict_activations(fitted.map, test),
        np.asarray(test.target.x, np.float32),
        train_mean=x.mean(0, dtype=np.float64),
        documents=test.documents,
        bootstrap=BOOTSTRAP,
        token_means=TokenMeans(index, target.shrunk(0.0), predicted.shrunk(0.0)),
    )
