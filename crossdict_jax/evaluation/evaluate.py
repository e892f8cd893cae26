"""The stage that measures a finished run: dictionaries, and every map on held-out documents."""

from __future__ import annotations

import itertools
import time

from crossdict_jax import maps
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.config import Config
from crossdict_jax.errors import UserError
from crossdict_jax.evaluation.controls import Controls, score_controls
from crossdict_jax.evaluation.crosscoder import joint_codes, score_crosscoders
from crossdict_jax.evaluation.features import feature_rows
from crossdict_jax.evaluation.funnel import match_dictionaries
from crossdict_jax.evaluation.reconstruction import reconstruct
from crossdict_jax.evaluation.representations import compare_representations
from crossdict_jax.evaluation.scoring import score_ladder
from crossdict_jax.maps import Task
from crossdict_jax.maps.controls import control_tasks
from crossdict_jax.studies.dictionary_transfer.measure import score_dictionary_transfer
from crossdict_jax.training.checkpoint import is_finished
from crossdict_jax.training.stage import device_figures
from crossdict_jax.workdir import Workdir, write_jsonl


def evaluate(config: Config, work: Workdir) -> None:
    """Writes what dictionaries, maps and their controls score into ``work.results``.

    reconstruction.jsonl, transfer.jsonl, controls.jsonl, features.jsonl, feature_transfer.jsonl,
    matching.jsonl, matches.jsonl, similarity.jsonl, dictionary_transfer.jsonl, crosscoder.jsonl.

    Reads the language models, the store and the checkpoints of dictionaries and maps, nothing
    else. Equal inputs give equal files.

    Raises:
      UserError: one of them is missing or damaged.
    """
    started = time.perf_counter()
    store = open_store(work.activations)
    tasks = maps.tasks(config, store)
    _check_finished(tasks + control_tasks(config, store), work)
    dictionaries, densities = reconstruct(config, store, work)
    controls = score_controls(config, store, work)
    transfer, correlations, single = _transfer(config, store, work, tasks, controls)
    write_jsonl(work.result("reconstruction.jsonl"), dictionaries)
    write_jsonl(work.result("transfer.jsonl"), transfer)
    write_jsonl(work.result("features.jsonl"), densities + correlations)
    match_dictionaries(config, store, work)
    compare_representations(config, store, work)
    write_jsonl(work.result("feature_transfer.jsonl"), single)
    if config.controls:
        write_jsonl(work.result("controls.jsonl"), controls.rows())
    moved = score_dictionary_transfer(config, store, work)
    write_jsonl(work.result("dictionary_transfer.jsonl"), moved)
    if joint_codes(config):
        write_jsonl(work.result("crosscoder.jsonl"), score_crosscoders(config, store, work))
    wall, rows = time.perf_counter() - started, len(store.select("test"))
    work.record_timing(
        "evaluate",
        wall_s=wall,
        rows=rows,
        rows_per_s=rows * len(transfer) / wall,
        **device_figures(),
    )


def _check_finished(tasks: list[Task], work: Workdir) -> None:
    for task in tasks:
        if not is_finished(task.path(work)):
            raise UserError(
                f"{task.path(work)} holds no finished map; run train_hypernetworks first."
            )


def _transfer(
    config: Config, store: Store, work: Workdir, tasks: list[Task], controls: Controls
) -> tuple[list[dict], list[dict], list[dict]]:
    """The rows of transfer.jsonl, of features.jsonl and of feature_transfer.jsonl."""
    from tqdm import tqdm

    def direction(task: Task):
        return task.source, task.target, str(task.site_source), str(task.site_target)

    rows, figures, single = [], [], []
    with tqdm(total=len(tasks), desc="evaluate maps", unit="map") as progress:
        for _, group in itertools.groupby(tasks, key=direction):
            group = list(group)
            ladder = score_ladder(group, config, store, work, progress)
            rows += ladder.rows(controls.skyline(ladder.task))
            figures += ladder.figures()
            single += feature_rows(ladder, group, config, store, work)
    return rows, figures, single
