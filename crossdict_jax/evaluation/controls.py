"""The controls of a run's maps, scored by the code that scores the maps themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import MapConfig
from crossdict_jax.evaluation.scoring import Scored, score_tasks
from crossdict_jax.evaluation.transfer import normalized
from crossdict_jax.maps import Task
from crossdict_jax.maps.controls import ControlLoader, ceiling_task


def score_controls(
    aligned: Sequence[Task],
    controls: Sequence[Task],
    loader: ControlLoader,
    map_settings: MapConfig,
    scored: dict[Task, Scored],
    **settings,
) -> dict[str, Scored]:
    """Returns {"ceiling", "untrained": scores} of one direction's maps, of those that the run has.

    Args:
      aligned: the maps of one direction and pair of sites.
      controls: of all maps.
      scored: what is scored already, by a first map; it is added to. Directions share ceilings.
      settings: as for ``score_tasks``.

    Raises:
      UserError: a checkpoint or the store of the re-initialised models is missing or damaged.
    """
    wanted = {
        "ceiling": [ceiling_task(task) for task in aligned],
        "untrained": [dataclasses.replace(task, control="untrained") for task in aligned],
    }
    by_control = {}
    for control, tasks in wanted.items():
        tasks = [task for task in tasks if task in controls]
        if tasks and tasks[0] not in scored:
            splits = {split: loader.rows(tasks[0], split) for split in SPLITS}
            work = loader.work
            scored[tasks[0]] = score_tasks(tasks, splits, work, map_settings, **settings)
        if tasks:
            by_control[control] = scored[tasks[0]]
    return by_control


def control_rows(aligned: Sequence[Task], by_control: dict[str, Scored]) -> list[dict[str, Any]]:
    """Returns the rows of controls.jsonl, each named by the map that it controls.

    The source of a ceiling is the target's own second dictionary, the target of an untrained row
    the re-initialised model, whatever models the row is named after. Neither has a position
    between a null and a ceiling of its own.
    """
    return [
        {"control": control}
        | scored.row(task.kind, task)
        | normalized(scored.scores[task.kind], None, None)
        for task in aligned
        for control, scored in by_control.items()
        if task.kind in scored.scores
    ]
