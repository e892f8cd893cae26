"""The stage that measures a finished run: dictionaries, maps and controls on held-out documents."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial

from crossdict_jax import maps
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.config import Config, identity
from crossdict_jax.dictionaries.crosscoder_training import planned
from crossdict_jax.errors import UserError
from crossdict_jax.evaluation.codes import SideCodes
from crossdict_jax.evaluation.controls import control_rows, score_controls
from crossdict_jax.evaluation.crosscoder import crosscoder_rows, joint_codes
from crossdict_jax.evaluation.features import feature_rows
from crossdict_jax.evaluation.reconstruction import member_folders, reconstruct
from crossdict_jax.evaluation.representations import representation_rows
from crossdict_jax.evaluation.scoring import Scored, pair_columns, score_maps, transfer_rows
from crossdict_jax.evaluation.shared_features import dictionary_pairs, shared_features
from crossdict_jax.maps import Task
from crossdict_jax.maps.controls import ControlLoader, control_tasks
from crossdict_jax.maps.fit import Loader
from crossdict_jax.training.checkpoint import is_finished
from crossdict_jax.training.stage import Stage, input_digests, progress_bar
from crossdict_jax.workdir import Workdir

FILES = (
    *("reconstruction.jsonl", "transfer.jsonl", "features.jsonl", "feature_transfer.jsonl"),
    *("matching.jsonl", "matches.jsonl", "similarity.jsonl"),
)

Part = dict[str, list[dict]]  # rows by file


def evaluate(config: Config, work: Workdir) -> None:
    """Writes what dictionaries, maps and their controls score into ``work.results``.

    The files are FILES, controls.jsonl where the run has controls, and crosscoder.jsonl where it
    has crosscoders. Reads the language models, the store and the checkpoints of dictionaries and
    maps, nothing else. Equal inputs give equal files. Interrupted, it goes on behind the last part
    that was done; finished, it does nothing until an input changes.

    Raises:
      UserError: one of them is missing or damaged.
    """
    store = open_store(work.activations)
    tasks, controls = maps.tasks(config, store), control_tasks(config, store)
    folders = [task.path(work) for task in tasks + controls]
    for folder in folders:
        if not is_finished(folder):
            raise UserError(f"{folder} holds no finished map; run train_hypernetworks first.")
    for model in store.models:
        for site in store.sites_of(model):
            folders += member_folders(work, model, site)
    files = [*FILES, *(["controls.jsonl"] if config.controls else [])]
    if joint_codes(config.map.kinds):
        files.append("crosscoder.jsonl")
        folders += [work.crosscoder(*ends) for ends in planned(config, store)]
    loader = ControlLoader(config, store, work) if controls else Loader(store, work, config.seed)
    meta = [store.meta, loader.store.meta]
    inputs = input_digests(work, settings=identity(config), store_meta=meta, folders=folders)
    stage = Stage(work, "evaluate", files=files, inputs=inputs)
    if stage.finished:
        return
    rows: Part = {file: [] for file in files}
    for part in _parts(config, store, stage, loader, tasks, controls):
        for file, made in part.items():
            rows.get(file, []).extend(made)
    stage.finish(rows, rows=len(store.select("test")), maps=len(tasks))


def _parts(
    config: Config,
    store: Store,
    stage: Stage,
    loader: Loader,
    tasks: Sequence[Task],
    controls: Sequence[Task],
) -> Iterator[Part]:
    """Yields what each part of the stage adds to the files, measured or kept from before."""
    settings = {"settings": config.evaluation, "seed": config.seed, "codes": SideCodes()}
    work = loader.work
    scored_controls: dict[Task, Scored] = {}

    def layer_pair(group: list[Task]) -> Part:
        scored = score_maps(group, loader, config.map, **settings)
        aligned = [task for task in group if task.pairing == "aligned"]
        reseeded = [dataclasses.replace(task, control="reseeded") for task in aligned]
        again = [task for task in reseeded if task in controls]
        of_run = aligned, controls, loader, config.map, scored_controls
        by_control = score_controls(*of_run, **settings)
        return {
            "transfer.jsonl": transfer_rows(scored, by_control.get("ceiling")),
            "features.jsonl": scored["aligned"].correlation_rows(),
            "feature_transfer.jsonl": feature_rows(
                scored["aligned"], again, loader, settings["codes"]
            ),
            "controls.jsonl": control_rows(aligned, by_control),
        }

    yield stage.part(("dictionaries",), lambda: reconstruct(config, store, work))
    groups = [list(group) for _, group in itertools.groupby(tasks, key=pair_columns)]
    for group in progress_bar(groups, desc="evaluate maps", unit="layer pair"):
        key = ("maps", *pair_columns(group[0]).values())
        yield stage.part(key, partial(layer_pair, group))
    pairs, matches = dictionary_pairs(config, store), []
    for pair in progress_bar(pairs, desc="match features", unit="layer pair"):
        measure = partial(shared_features, pair, loader, **settings)
        part = stage.part(("matches", *pair_columns(pair).values()), measure)
        matches += part["matches.jsonl"]
        yield part
    similarity = partial(representation_rows, config, store, work, pairs, matches)
    yield {"similarity.jsonl": stage.part(("similarity",), similarity)}
    if joint_codes(config.map.kinds):
        crosscoders = partial(crosscoder_rows, config, store, work)
        yield {"crosscoder.jsonl": stage.part(("crosscoders",), crosscoders)}
