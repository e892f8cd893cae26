"""The stage that measures a finished run: dictionaries, maps and controls on held-out documents."""

import dataclasses
import itertools
from collections.abc import Callable
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
from crossdict_jax.maps.fit import Loader, control_tasks
from crossdict_jax.results import pair_columns
from crossdict_jax.training.checkpoint import is_finished
from crossdict_jax.training.stage import Stage, input_digests, progress_bar
from crossdict_jax.workdir import Workdir

FILES = (
    *("reconstruction.jsonl", "transfer.jsonl", "features.jsonl", "feature_transfer.jsonl"),
    *("matching.jsonl", "matches.jsonl", "similarity.jsonl"),
)


def evaluate(config: Config, work: Workdir) -> None:
    """Writes the scores of dictionaries, maps and their controls into ``work.results``.

    Files: FILES, and controls.jsonl and crosscoder.jsonl where the run has these. Equal inputs give
    equal files.

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
    run, every = Loader(config, store, work), open_controls(config, work, store)
    meta, loader = [store.meta, every.meta], Loader(config, every, work)
    settings = identity(config, features=False)
    inputs = input_digests(work, settings=settings, store_meta=meta, folders=folders)
    stage = Stage(work, "evaluate", files=files, inputs=inputs)
    if stage.finished:
        return
    rows: dict[str, list[dict]] = {file: [] for file in files}

    def add(key: tuple, make: Callable[[], dict[str, list[dict]]]) -> None:
        """Adds the rows by file of a part of the stage, new or kept."""
        for file, made in stage.part(key, make).items():
            rows.get(file, []).extend(made)

    add(("dictionaries",), lambda: reconstruct(run))

    @cache  # directions share ceilings
    def score_controls(*some: Task) -> scoring.Scored:
        scored = scoring.score_tasks(some, loader)
        return dataclasses.replace(scored, bench=None, maps={})  # their rows are not kept

    groups = [list(group) for _, group in itertools.groupby(tasks, key=pair_columns)]
    for group in progress_bar(groups, desc="evaluate maps", unit="layer pair"):
        make = partial(layer_pair, group, controls, loader, score_controls)
        add(("maps", *pair_columns(group[0]).values()), make)
    pairs = dictionary_pairs(config, store)
    for pair in progress_bar(pairs, desc="match features", unit="layer pair"):
        add(("matches", *pair_columns(pair).values()), partial(shared_features, pair, loader))
    matches = rows["matches.jsonl"]
    add(("similarity",), lambda: {"similarity.jsonl": representation_rows(run, pairs, matches)})
    if joint:
        add(("crosscoders",), lambda: {"crosscoder.jsonl": crosscoder_rows(run)})
    stage.finish(rows, rows=len(store.select("test")), maps=len(tasks))


def layer_pair(
    group: list[Task], controls: list[Task], loader: Loader, score_controls: Callable
) -> dict[str, list[dict]]:
    """Returns the rows by file of all maps of one direction and pair of sites.

    Args:
      controls: those that the run has.
      score_controls: directions may share its results.
    """
    scored = scoring.score_maps(group, loader)
    aligned = [task for task in group if task.pairing == "aligned"]
    made = {
        name: [c for task in aligned if (c := task.controlled(name)) in controls]
        for name in ("ceiling", "untrained", "reseeded")
    }
    by_control = {n: score_controls(*made[n]) for n in ("ceiling", "untrained") if made[n]}
    nowhere = normalized(None, None, None)  # controls have no null and ceiling of their own
    control_rows = [  # each named by its map
        {"control": name} | value.row(task.kind, task) | nowhere
        for task in aligned
        for name, value in by_control.items()
        if task.kind in value.scores
    ]
    return {
        "transfer.jsonl": scoring.transfer_rows(scored, by_control.get("ceiling")),
        "features.jsonl": scored["aligned"].correlation_rows(),
        "feature_transfer.jsonl": feature_rows(scored["aligned"], made["reseeded"], loader),
        "controls.jsonl": control_rows,
    }
