"""The stage that measures a finished run: dictionaries, maps and controls on held-out documents."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial

from crossdict_jax import maps
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import Config, identity
from crossdict_jax.dictionaries.crosscoder_training import planned
from crossdict_jax.errors import UserError
from crossdict_jax.evaluation import scoring
from crossdict_jax.evaluation.codes import SideCodes
from crossdict_jax.evaluation.crosscoder import crosscoder_rows
from crossdict_jax.evaluation.features import feature_rows
from crossdict_jax.evaluation.reconstruction import member_folders, reconstruct
from crossdict_jax.evaluation.representations import representation_rows
from crossdict_jax.evaluation.shared_features import dictionary_pairs, shared_features
from crossdict_jax.evaluation.transfer import normalized
from crossdict_jax.maps import Task
from crossdict_jax.maps.base import map_class
from crossdict_jax.maps.controls import ControlLoader, ceiling_task, control_tasks
from crossdict_jax.maps.fit import Loader
from crossdict_jax.results import pair_columns
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
    has crosscoders. Equal inputs give equal files.

    Raises:
      UserError: a language model, the store, a dictionary or a map is missing or damaged.
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
    if joint := any(map_class(kind).through_joint for kind in config.map.kinds):
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
    if joint:
        make = partial(crosscoder_rows, config, store, work)
        rows["crosscoder.jsonl"] = stage.part(("crosscoders",), make)
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
    work, codes = loader.work, SideCodes()
    scored_controls: dict[Task, scoring.Scored] = {}  # by a first map: directions share ceilings

    def score_controls(tasks: list[Task]) -> scoring.Scored | None:
        """The scores of those controls that the run has."""
        tasks = [task for task in tasks if task in controls]
        if tasks and tasks[0] not in scored_controls:
            splits = {split: loader.rows(tasks[0], split) for split in SPLITS}
            scored_controls[tasks[0]] = scoring.score_tasks(tasks, splits, work, config, codes)
        return scored_controls[tasks[0]] if tasks else None

    def layer_pair(group: list[Task]) -> Part:
        scored = scoring.score_maps(group, loader, config, codes)
        aligned = [task for task in group if task.pairing == "aligned"]
        reseeded = [dataclasses.replace(task, control="reseeded") for task in aligned]
        again = [task for task in reseeded if task in controls]
        untrained = [dataclasses.replace(task, control="untrained") for task in aligned]
        by_control = {
            "ceiling": score_controls([ceiling_task(task) for task in aligned]),
            "untrained": score_controls(untrained),
        }
        nowhere = normalized(None, None, None)  # controls have no null and ceiling of their own
        control_rows = [  # each named by the map that it controls
            {"control": control} | value.row(task.kind, task) | nowhere
            for task in aligned
            for control, value in by_control.items()
            if value and task.kind in value.scores
        ]
        features = feature_rows(scored["aligned"], again, loader, codes)
        return {
            "transfer.jsonl": scoring.transfer_rows(scored, by_control["ceiling"]),
            "features.jsonl": scored["aligned"].correlation_rows(),
            "feature_transfer.jsonl": features,
            "controls.jsonl": control_rows,
        }

    yield stage.part(("dictionaries",), lambda: reconstruct(config, store, work))
    groups = [list(group) for _, group in itertools.groupby(tasks, key=pair_columns)]
    for group in progress_bar(groups, desc="evaluate maps", unit="layer pair"):
        key = ("maps", *pair_columns(group[0]).values())
        yield stage.part(key, partial(layer_pair, group))
    pairs, matches = dictionary_pairs(config, store), []
    for pair in progress_bar(pairs, desc="match features", unit="layer pair"):
        measure = partial(shared_features, pair, loader, config, codes)
        part = stage.part(("matches", *pair_columns(pair).values()), measure)
        matches += part["matches.jsonl"]
        yield part
    similarity = partial(representation_rows, config, store, work, pairs, matches)
    yield {"similarity.jsonl": stage.part(("similarity",), similarity)}
