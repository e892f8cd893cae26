"""The controls of a run's maps, scored by the code that scores the maps themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from crossdict_jax import maps
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import EvaluationConfig, MapConfig
from crossdict_jax.evaluation.codes import SideCodes
from crossdict_jax.evaluation.scoring import Scores, columns, make_bench, score, score_token_table
from crossdict_jax.evaluation.transfer import Score, normalized, verdict
from crossdict_jax.maps import Task
from crossdict_jax.maps.controls import ControlLoader, shown


@dataclasses.dataclass(frozen=True)
class ControlScores:
    """The scores of one control at one direction and pair of sites."""

    scores: Scores
    token: Score  # the token map's on the same rows

    def row(self, control: str, task: Task) -> dict[str, Any]:
        """Returns the row of controls.jsonl of the map that is controlled.

        The source of a ceiling is the target's own second dictionary, the target of an untrained
        row the re-initialised model, whatever models the row is named after. Neither has a
        position between a null and a ceiling of its own.
        """
        value = self.scores[task.kind]
        row = {"control": control} | columns(task, task.kind) | value.row()
        return row | {"verdict": verdict(value, self.token)} | normalized(value, None, None)


def score_control(
    tasks: Sequence[Task],
    loader: ControlLoader,
    map_settings: MapConfig,
    *,
    settings: EvaluationConfig,
    seed: int,
    codes: SideCodes,
) -> ControlScores:
    """Returns the scores of one control's maps between the same two sides.

    Raises:
      UserError: a checkpoint or the store of the re-initialised models is missing or damaged.
    """
    splits = {split: loader.rows(tasks[0], split) for split in SPLITS}
    bench = make_bench(splits, settings, seed=seed, codes=codes)
    dictionary, scores, read = splits["test"].target.dictionary, {}, {}
    for task in tasks:
        m = maps.load(task.path(loader.work), dictionary)
        if m.reads not in read:  # what maps are shown depends on what they read
            read[m.reads] = tuple(shown(task, p) for p in (splits["test"], bench.context))
        scores[task.kind] = score(m, bench, read[m.reads])
    return ControlScores(scores, scores.get("token") or score_token_table(bench, map_settings))
