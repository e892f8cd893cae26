"""Gives the problems of a run the joint codes of its crosscoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config, JointSettings, crosscoder_settings
from crossdict_jax.dictionaries import crosscoder
from crossdict_jax.dictionaries.crosscoder_training import (
    Rows,
    fit_crosscoders,
    joint_sites,
    train_crosscoders,
)
from crossdict_jax.maps.base import Problem
from crossdict_jax.models import Site
from crossdict_jax.workdir import Workdir

if TYPE_CHECKING:
    from crossdict_jax.maps.fit import Task


def with_codes(
    problems: Sequence[Problem],
    tasks: Sequence[Task],
    config: Config,
    store: Store,
    work: Workdir,
    *,
    directory: Path,
) -> list[Problem]:
    """Returns the problems with the way from A to B through a joint code.

    One crosscoder of all models for each layer tuple serves all directions of the ladder; shuffled
    problems get the one that was trained on shuffled rows. Those that are not there yet are
    trained. A control has two sides of its own, and gets a code of these two.

    Args:
      directory: for what training the controls' codes keeps on the way.
    """
    of_controls = [p for p, t in zip(problems, tasks) if t.control]
    settings = crosscoder_settings(config)
    own = iter(with_own_codes(of_controls, settings, seed=config.seed, directory=directory))
    if len(of_controls) < len(problems):
        train_crosscoders(config, store, work)
    loaded: dict = {}
    return [
        next(own)
        if task.control
        else dataclasses.replace(problem, joint=_way(task, config, store, work, loaded))
        for problem, task in zip(problems, tasks)
    ]


def with_own_codes(
    problems: Sequence[Problem], config: JointSettings, *, seed: int, directory: Path
) -> list[Problem]:
    """Returns the problems with the way from A to B through a code of their two sides alone.

    It is trained on their training rows.

    Raises:
      UserError: these are fewer than a batch.
    """
    own = fit_crosscoders(
        [Rows(p.label, (p.train.source.x, p.train.target.x), seed) for p in problems],
        config,
        directory=directory / "crosscoder",
    )
    return [dataclasses.replace(p, joint=one.between(0, 1)) for p, one in zip(problems, own)]


def _way(task: Task, config: Config, store: Store, work: Workdir, loaded: dict) -> dict:
    """The way of a task through the run's crosscoder; each is loaded once."""
    place = sites_of(task, config, store), task.pairing
    if place not in loaded:
        loaded[place] = crosscoder.load(work.crosscoder(*place))
    return loaded[place].between(*_ends(task, store))


def sites_of(task: Task, config: Config, store: Store) -> tuple[Site, ...]:
    """Returns the first layer tuple of the run that holds both sites of a task."""
    source, target = _ends(task, store)
    wanted = task.site_source, task.site_target
    return next(s for s in joint_sites(config, store) if (s[source], s[target]) == wanted)


def _ends(task: Task, store: Store) -> tuple[int, int]:
    return store.models.index(task.source), store.models.index(task.target)
