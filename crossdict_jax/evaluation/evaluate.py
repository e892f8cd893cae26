"""The stage that measures a finished run: dictionaries, maps and controls on held-out documents."""

import dataclasses
import itertools
from functools import cache, partial

from crossdict_jax import maps
from crossdict_jax.activations.store import open_store
from crossdict_jax.activations.untrained import open_controls
from crossdict_jax.config import Config, identity
from crossdict_jax.dictionaries.crosscoder_training import planned
from crossdict_jax.errors import UserError
from crossdict_jax.evaluation import scoring
from crossdict_jax.evaluation.crosscoder import crosscoder_rows
from crossdict_jax.evaluation.features import feature_rows
from crossdict_jax.evaluation.reconstruction import member_folders, reconstruct
from crossdict_jax.evaluation.representations import representation_rows
from crossdict_jax.evaluation.shared_features import dictionary_pairs, shared_features
from crossdict_jax.evaluation.transfer import normalized
from crossdict_jax.maps import Task
from crossdict_jax.maps.base import map_class
from crossdict_jax.maps.controls import ceiling_task, control_tasks
from crossdict_jax.maps.fit import Loader
from crossdict_jax.results import pair_columns
from crossdict_jax.training.checkpoint import is_finished
from crossdict_jax.training.stage import Stage, input_digests, progress_bar
from crossdict_jax.workdir import Workdir

FILES = (
    *("reconstruction.jsonl", "transfer.jsonl", "features.jsonl", "feature_transfer.jsonl"),
    *("matching.jsonl", "matches.jsonl", "similarity.jsonl"),
)


def evaluate(config: Config, work: Workdir) -> None:
    """Writes what dictionaries, maps and their controls score into ``work.results``.

    The files are FILES, controls.jsonl where the run has controls, and crosscoder.jsonl where it
    has crosscoders. Equal inputs give equal files.

    Raises:
      UserError: a language model, the store, a dictionary or a map is missing or damaged.
    """
    store, settings = open_store(work.activations), config.evaluation
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
    every = open_controls(config, work, store) if controls else store
    loader = Loader(every, work, config.seed)
    meta = [store.meta, every.meta]
    inputs = input_digests(work, settings=identity(config), store_meta=meta, folders=folders)
    stage = Stage(work, "evaluate", files=files, inputs=inputs)
    if stage.finished:
        return
    rows: dict[str, list[dict]] = {file: [] for file in files}

    def add(key: tuple, make) -> dict[str, list[dict]]:
        """Adds the rows by file that a part gives, now or as it was kept."""
        for file, made in (part := stage.part(key, make)).items():
            rows.get(file, []).extend(made)
        return part

    add(("dictionaries",), lambda: reconstruct(config, store, work))
    # Directions share ceilings.
    score_controls = cache(lambda *tasks: scoring.score_tasks(tasks, loader, settings))
    groups = [list(group) for _, group in itertools.groupby(tasks, key=pair_columns)]
    for group in progress_bar(groups, desc="evaluate maps", unit="layer pair"):

        def layer_pair(group: list[Task] = group) -> dict[str, list[dict]]:
            scored = scoring.score_maps(group, loader, settings)
            aligned = [task for task in group if task.pairing == "aligned"]
            of = {c: [dataclasses.replace(t, control=c) for t in aligned] for c in config.controls}
            of |= {"ceiling": [ceiling_task(task) for task in aligned]}
            of = {c: [task for task in some if task in controls] for c, some in of.items()}
            by_control = {c: score_controls(*of[c]) for c in ("ceiling", "untrained") if of.get(c)}
            nowhere = normalized(None, None, None)  # controls have no null and ceiling of their own
            return {
                "transfer.jsonl": scoring.transfer_rows(scored, by_control.get("ceiling")),
                "features.jsonl": scored["aligned"].correlation_rows(),
                "feature_transfer.jsonl": feature_rows(
                    scored["aligned"], of.get("reseeded", []), loader
                ),
                "controls.jsonl": [  # each named by the map that it controls
                    {"control": control} | value.row(task.kind, task) | nowhere
                    for task in aligned
                    for control, value in by_control.items()
                    if task.kind in value.scores
                ],
            }

        add(("maps", *pair_columns(group[0]).values()), layer_pair)
    pairs = dictionary_pairs(config, store)
    for pair in progress_bar(pairs, desc="match features", unit="layer pair"):
        make = partial(shared_features, pair, loader, settings)
        add(("matches", *pair_columns(pair).values()), make)

    def similarity() -> dict[str, list[dict]]:
        matches = rows["matches.jsonl"]
        return {"similarity.jsonl": representation_rows(config, store, work, pairs, matches)}

    add(("similarity",), similarity)
    if joint:
        make = partial(crosscoder_rows, config, store, work)
        add(("crosscoders",), lambda: {"crosscoder.jsonl": make()})
    stage.finish(rows, rows=len(store.select("test")), maps=len(tasks))
