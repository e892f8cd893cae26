"""Scores the controls of the ladder by the code that scores the ladder itself."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from crossdict_jax import stats
from crossdict_jax.activations.store import Store
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import Config
from crossdict_jax.evaluation.scoring import Bench, Scores, where
from crossdict_jax.evaluation.transfer import Score, normalized, verdict
from crossdict_jax.maps import Task, tasks
from crossdict_jax.maps.controls import ControlLoader, control_tasks, shown, skyline_of
from crossdict_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Controls:
    """The scores of all controls.

    Attributes:
      ladder: the aligned maps of the run.
      scores: by control task.
      tokens: by control task, the token rung's score on the same rows.
    """

    ladder: tuple[Task, ...]
    scores: dict[Task, Score]
    tokens: dict[Task, Score]

    def skyline(self, task: Task) -> Scores:
        """Returns the skyline of every rung at the target site of a task, where it was run."""
        like = [dataclasses.replace(task, kind=t.kind) for t in self.ladder]
        found = {t.kind: self.scores.get(skyline_of(t)) for t in like}
        return {kind: score for kind, score in found.items() if score}

    def rows(self) -> list[dict]:
        """Returns the rows of controls.jsonl, each with the place of the map that it controls.

        The source of a skyline is the target's own second dictionary, the target of an untrained
        row the untrained twin, whatever models the row is named after. Neither has a place
        between a null and a skyline of its own.
        """
        rows = []
        for task in self.ladder:
            stands_for = {"ceiling": skyline_of(task)}
            stands_for["untrained"] = dataclasses.replace(task, control="untrained")
            for name, control in stands_for.items():
                if control in self.scores:
                    rows.append({"control": name} | self._row(task, control))
        return rows

    def _row(self, task: Task, control: Task) -> dict[str, Any]:
        score = self.scores[control]
        row = where(task, task.kind, "aligned") | score.row()
        row["verdict"] = verdict(score, self.tokens[control])
        for name, estimate in normalized(score, None, None).items():
            row |= stats.columns(name, estimate)
        return row


def score_controls(config: Config, store: Store, work: Workdir) -> Controls:
    """Returns the scores of all controls of a run, of none if it asks for none.

    Raises:
      UserError: a checkpoint or the store of the untrained twins is missing or damaged.
    """
    from tqdm import tqdm

    ladder = tuple(task for task in tasks(config, store) if task.pairing == "aligned")
    todo = [t for t in control_tasks(config, store) if t.control in ("ceiling", "untrained")]
    controls = Controls(ladder, {}, {})
    if not todo:
        return controls
    loader = ControlLoader(config, store, work)
    with tqdm(total=len(todo), desc="evaluate controls", unit="map") as progress:
        for _, group in itertools.groupby(todo, key=lambda t: dataclasses.replace(t, kind="")):
            group = list(group)
            splits = {split: loader.rows(group[0], split) for split in SPLITS}
            train_mean, _ = splits["train"].target.feature_moments
            bench = Bench.make(splits, train_mean=train_mean, config=config)
            scores = bench.score_all(group, work, progress, read=shown)
            token = scores.get("token") or bench.score_source_tokens(config)
            controls.scores.update({task: scores[task.kind] for task in group})
            controls.tokens.update(dict.fromkeys(group, token))
    return controls
