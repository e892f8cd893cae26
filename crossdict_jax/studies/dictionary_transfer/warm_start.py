"""How many training steps a dictionary of B is spared that begins as A's, transferred."""

from __future__ import annotations

from typing import Any

import numpy as np

from crossdict_jax.activations.passages import train_mean
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config
from crossdict_jax.dictionaries.start import activation_scale
from crossdict_jax.dictionaries.train import members, train_from
from crossdict_jax.evaluation.reconstruction import measure
from crossdict_jax.evaluation.scoring import pair_columns
from crossdict_jax.maps import Problem, Task
from crossdict_jax.studies.dictionary_transfer.transferred import (
    fit_stitch,
    transferred,
    with_unit_rows,
)
from crossdict_jax.workdir import Workdir, read_jsonl

ERRORS = ("fvu", "mse")  # what the losses of an architecture log of their reconstruction


def compare_starts(
    problems: dict[Task, Problem], config: Config, store: Store, work: Workdir
) -> list[dict[str, Any]]:
    """Returns what dictionary_training.jsonl says of one target's directions and sites.

    The target's dictionary of seed 0 is trained from random parameters and from the source's, with
    the same rows in the same order, all in one ensemble.

    Args:
      problems: by any map of each direction and pair of sites; their targets are one model.
    """
    group, starts = [], []
    for task, problem in problems.items():
        stitch = fit_stitch(problem, config.map)
        scale = activation_scale(problem.train.target.x)
        start = with_unit_rows(transferred(problem.train.source.dictionary, stitch, scale))
        group += 2 * members(config.sae, [(task.target, task.site_target)])[:1]
        starts += [None, start]
    directory = work.dictionaries / "transfer" / group[0].model
    trained = train_from(config, store, group, starts, directory=directory)
    log = read_jsonl(directory / "metrics.jsonl")
    error = next(name for name in ERRORS if name in log[0])
    steps, rows = [row["step"] + 1 for row in log], []
    for i, task in enumerate(problems):
        random, moved = ([row[error][2 * i + j] for row in log] for j in (0, 1))
        x = store.read(task.target, task.site_target, store.select("test")).astype(np.float32)
        of = {"mean": train_mean(store, task.target, task.site_target)}
        seen = [
            measure(d, x, size=config.evaluation.batch_size, **of) for d in trained[2 * i :][:2]
        ]
        fvus = [float(sums["error"].sum() / sums["variance"].sum()) for sums in seen]
        rows.append(
            {
                **pair_columns(task),
                "error": error,
                "steps": steps,
                "random": random,
                "transferred": moved,
                "fvu_random": fvus[0],
                "fvu_transferred": fvus[1],
                **steps_saved(steps, random, moved),
            }
        )
    return rows


def steps_saved(steps: list[int], random: list[float], moved: list[float]) -> dict[str, Any]:
    """Returns when the moved start is first as good as the random one is in the end, if ever."""
    reached = np.flatnonzero(np.asarray(moved) <= random[-1])
    if not len(reached):
        return {"steps_to_reach": None, "saved": None}
    first = steps[int(reached[0])]
    return {"steps_to_reach": first, "saved": 1 - first / steps[-1]}
