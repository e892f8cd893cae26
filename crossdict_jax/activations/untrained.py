"""The untrained control: every model with redrawn weights, read at the rows of a run."""

import os
from dataclasses import replace

import numpy as np

from crossdict_jax import models
from crossdict_jax.activations.extract import digests_of, meta_of_models, read_models
from crossdict_jax.activations.plan import Reading
from crossdict_jax.activations.store import BLOCK, Column, Sites, Store, finish, open_store
from crossdict_jax.config import Config, controlled_layers
from crossdict_jax.errors import UserError
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.training.stage import timed
from crossdict_jax.workdir import Workdir, model_names

KEYS = ("document", "window", "byte_end", "split", "keep")  # what a row is, in any model


def extract_untrained(config: Config, work: Workdir, store: Store) -> Store:
    """Returns the store in ``work.controls``: the run's models and their re-initialised ones.

    A re-initialised model reads the same windows and rows, norm outliers of the trained models
    included. The trained models' shards stay where they are. Interrupted, it goes on with the
    first missing shard.

    Raises:
      UserError: a model has changed, the stores do not agree, or the disk has no room.
    """
    directory = work.controls.activations
    if (directory / "meta.json").exists():
        return open_controls(config, work, store)
    with timed(work.controls, "extract_activations") as figures:
        trained = enumerate(map(store.load_model, store.models))
        drawn = (draw_again(lm, config.seed, i) for i, lm in trained)
        lms = dict(zip(untrained_names(store), drawn))
        reading = Reading(
            text=store.meta["text"]["sha256"],
            table=store.table,
            rows=store.rows,
            bos=tuple(store.has_bos(name) for name in store.models),
            shard_starts=np.asarray(store.meta["shard_starts"]),
        )
        sites = untrained_sites(config, store)
        digests = digests_of(lms, reading)
        counts, shards = read_models(config.extract, directory, lms, sites, reading, digests)
        figures |= counts
        elsewhere = os.path.relpath(store.directory, directory)
        about = {name: m | {"directory": elsewhere} for name, m in store.meta["models"].items()}
        about |= meta_of_models(store.paths, reading, lms, sites, digests)
        # Positions and tokens of re-initialised models are those of their models.
        columns, width = {}, 2 * len(store.models)
        for name in ("position", "token"):
            columns[name] = Column(directory, np.int32, width=width)
            for at in range(0, len(store.rows), BLOCK):
                columns[name].append(np.tile(getattr(store.rows, name)[at : at + BLOCK], 2))
        rows = replace(store.rows, **{name: column.array() for name, column in columns.items()})
        table = replace(store.table, offsets=2 * store.table.offsets, ids=2 * store.table.ids)
        finish(directory, rows, table, store.meta | {"models": about}, shards)
    return open_controls(config, work, store)


def untrained_names(store: Store) -> list[str]:
    """Returns the names of the re-initialised models."""
    names = [f"{name}-untrained" for name in store.models]
    return model_names([*store.models, *names])[len(names) :]


def untrained_sites(config: Config, store: Store) -> Sites:
    """Returns the sites that dictionaries of re-initialised models read and write.

    A dictionary that writes its own model writes the re-initialised one; other outputs stay.
    """
    names, writes = untrained_names(store), {}
    for name, model, layers in zip(names, store.models, controlled_layers(config)):
        for site in (Site(i, config.site) for i in layers):
            other, output = store.output_of(model, site)
            writes[name, site] = name if other == model else other, output
    return Sites(writes)


def draw_again(lm: LanguageModel, seed: int, number: int) -> LanguageModel:
    """Returns a model of the same shape with all parameters redrawn.

    Matrices and embeddings are normal at the scales of GPT-2's start; biases and norms are where
    training starts them. ``number`` is the model's in its run, so that equal models differ.
    """
    entropy = np.random.SeedSequence([seed, number, 0x756E])  # apart from seeds that users choose
    drawn = models.init(lm.config, seed=int(entropy.generate_state(1)[0]))
    drawn.name, drawn.path = lm.name, lm.path
    return drawn


def open_controls(config: Config, work: Workdir, store: Store) -> Store:
    """Returns the store that controls read, with re-initialised models if the run asks for them.

    Raises:
      UserError: it is missing, damaged, or has other rows than ``store``.
    """
    if "untrained" not in config.controls:
        return store
    controls = open_store(work.controls.activations)
    same = all(np.array_equal(*(getattr(s.rows, key) for s in (controls, store))) for key in KEYS)
    if not same or controls.models[: len(store.models)] != store.models:
        raise UserError(
            f"{controls.directory} has other rows than {store.directory}; delete "
            f"{work.controls.root} and run extract_activations again."
        )
    return controls
