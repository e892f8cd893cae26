"""The untrained control: every model with its weights drawn anew, read at the rows of a run."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from crossdict_jax import models
from crossdict_jax.activations.column import equal, new_column, stretches
from crossdict_jax.activations.extract import (
    check_space,
    checksums_of,
    dictionary_places,
    read_models,
)
from crossdict_jax.activations.outputs import Place, to_read
from crossdict_jax.activations.plan import Reading
from crossdict_jax.activations.store import Rows, Store, open_store, save_rows, save_table
from crossdict_jax.config import Config, controlled_layers
from crossdict_jax.errors import UserError
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.training.stage import device_figures
from crossdict_jax.workdir import Workdir, model_names, write_json

KEYS = ("document", "window", "byte_end", "split", "keep")  # what a row is, in any model


def extract_untrained(config: Config, work: Workdir, store: Store) -> Store:
    """Returns the store in ``work.controls`` of the run's models and their untrained twins.

    A twin has its model's shape and tokenizer and reads the same windows; all its weights are
    drawn anew, as before any training. The rows are those of ``store`` to the byte, norm outliers
    of the trained models included; the trained models' shards stay where they are. Killed and run
    again, it goes on with the first shard that is not there.

    Raises:
      UserError: a model has changed, the stores do not agree, or the disk has no room.
    """
    directory = work.controls.activations
    if (directory / "meta.json").exists():
        return open_controls(config, work, store)
    started = time.perf_counter()
    names = untrained_names(store)
    lms = [draw_again(models.load(p), config.seed, i) for i, p in enumerate(store.paths)]
    inputs = [tuple(Site(i, config.site) for i in layers) for layers in controlled_layers(config)]
    written = _outputs(store, names, inputs)
    sites = [to_read(name, written) for name in names]
    read = _reading(config, store)
    check_space(directory, lms, sites, rows=len(read.rows))
    counts = read_models(config, directory, names, lms, sites, read)
    _finish(directory, store, read, dict(zip(names, lms)), written)
    seconds = time.perf_counter() - started
    figures = {"rows": len(read.rows), "tokens_per_s": counts["tokens"] / max(seconds, 1e-9)}
    work.controls.record_timing(
        "extract_activations", wall_s=seconds, **figures, **device_figures()
    )
    return open_controls(config, work, store)


def untrained_names(store: Store) -> list[str]:
    """Returns what the untrained twin of each model is called."""
    twins = [f"{name}-untrained" for name in store.models]
    return model_names([*store.models, *twins])[len(store.models) :]


def draw_again(lm: LanguageModel, seed: int, number: int) -> LanguageModel:
    """Returns a model of the same shape whose parameters are all drawn anew.

    Matrices and embeddings are normal at the scales that the family starts from (GPT-2's); biases
    and norms are where training starts them.

    Args:
      seed: of the run.
      number: of the model in its run, so that equal models get different twins.
    """
    entropy = np.random.SeedSequence([seed, number, 0x756E])  # apart from seeds that users choose
    twin = models.init(lm.config, seed=int(entropy.generate_state(1)[0]))
    twin.name, twin.path = lm.name, lm.path
    return twin


def open_controls(config: Config, work: Workdir, store: Store) -> Store:
    """Returns the store that controls read: with untrained twins where the run asks for them.

    Raises:
      UserError: it is missing, damaged, or has other rows than ``store``.
    """
    if "untrained" not in config.controls:
        return store
    controls = open_store(work.controls.activations)
    (own, _), (rows, _) = controls.columns(), store.columns()
    same = all(equal(getattr(own, key), getattr(rows, key)) for key in KEYS)
    if not same or controls.models[: len(store.models)] != store.models:
        raise UserError(
            f"{controls.directory} has other rows than {store.directory}; delete "
            f"{work.controls.root} and run extract_activations again."
        )
    return controls


def _reading(config: Config, store: Store) -> Reading:
    rows, table = store.columns()
    return Reading(
        text=store.meta["text"]["sha256"],
        table=table,
        rows=rows,
        bos=tuple(store.has_bos(name) for name in store.models),
        shard_windows=config.extract.shard_windows,
        shard_starts=np.asarray(store.meta["shard_starts"]),
    )


def _outputs(store: Store, twins: list[str], sites) -> dict[Place, Place]:
    """What twins' dictionaries write: as their models' do, in the twin where that is the model."""
    twin_of = dict(zip(store.models, twins))
    model_of = dict(zip(twins, store.models))
    written = {}
    for twin, of_twin in zip(twins, sites):
        for site in of_twin:
            model, out = store.output_of(model_of[twin], site)
            written[twin, site] = (twin_of[model] if model == model_of[twin] else model, out)
    return written


def _finish(
    directory: Path, store: Store, read: Reading, twins: dict[str, LanguageModel], written: dict
) -> None:
    """Writes rows and windows with columns for the twins as well and, last, meta.json."""
    save_rows(directory / "rows.npz", _doubled(read.rows, directory))
    table = read.table
    save_table(
        directory / "windows.npz",
        replace(table, offsets=2 * table.offsets, ids=2 * table.ids),
    )
    elsewhere = os.path.relpath(store.directory, directory)
    trained = {name: m | {"directory": elsewhere} for name, m in store.meta["models"].items()}
    own = {
        name: {
            "path": path,
            "d_model": lm.config.d_model,
            "bos": bos,
            **dictionary_places(name, written),
        }
        for path, bos, (name, lm) in zip(store.paths, read.bos, twins.items())
    }
    checksums = store.meta["checksums"] | checksums_of(directory, read)
    meta = store.meta | {"models": trained | own, "checksums": checksums}
    write_json(directory / "meta.json", meta)
    shutil.rmtree(directory / "shards")


def _doubled(rows: Rows, directory: Path) -> Rows:
    """Returns rows with columns for the twins: positions and tokens are those of their models."""
    twice = {}
    for name in ("position", "token"):
        of_models = getattr(rows, name)
        twice[name] = new_column(directory, of_models.dtype, width=2 * of_models.shape[1])
        for here in stretches(len(rows)):
            twice[name].append(np.tile(of_models[here], 2))
    return replace(rows, **twice)
