"""The ladder's controls: every rung from a second dictionary of B, and into an untrained B."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from crossdict_jax import dictionaries, modules
from crossdict_jax.activations.store import Store
from crossdict_jax.activations.untrained import open_controls, untrained_names
from crossdict_jax.config import Config, controlled_layers
from crossdict_jax.dictionaries.train import CEILING_SEED
from crossdict_jax.maps import fit
from crossdict_jax.maps.base import ROWS, Pairs, Side, map_class
from crossdict_jax.maps.fit import MEMBER, Loader, Task, load_side
from crossdict_jax.workdir import Workdir


def control_tasks(config: Config, store: Store) -> list[Task]:
    """Returns every control of the run's aligned maps, of the rungs and layers that have them.

    - skyline: from B to B at the target's site, once for every rung; the source is B's dictionary
      of another seed.
    - untrained: from A to B's re-initialised model; the task keeps the name of B.
    - reseeded: the map itself, from another seed; only of rungs that are trained by gradient steps
      and read features, since there is nothing random in the others or nothing to attribute.
    """
    layers = dict(zip(store.models, controlled_layers(config)))
    ladder = [
        task
        for task in fit.tasks(config, store)
        if task.pairing == "aligned"
        and task.site_target.layer in layers[task.target]
        and task.kind in (config.control_kinds or config.map.kinds)
    ]
    made = []
    if "ceiling" in config.controls:
        made += dict.fromkeys(ceiling_task(task) for task in ladder)
    if "untrained" in config.controls:
        made += [dataclasses.replace(task, control="untrained") for task in ladder]
    if "reseeded" in config.controls:
        made += [dataclasses.replace(t, control="reseeded") for t in ladder if _reseeds(t.kind)]
    return made


def _reseeds(kind: str) -> bool:
    cls = map_class(kind)
    return cls.fits_together and cls.reads == "features"


def ceiling_task(task: Task) -> Task:
    """Returns the skyline of a map of the ladder: into the same features, from their own model."""
    return Task(task.target, task.target, *2 * (task.site_target,), task.kind, "aligned", "ceiling")


def fit_controls(config: Config, store: Store, work: Workdir) -> None:
    """Fits every control into ``work.controls``, as ``fit_maps`` does the ladder.

    Raises:
      UserError: the re-initialised models or the dictionaries of controls are missing or damaged,
        or see ``fit_maps``.
    """
    todo = control_tasks(config, store)
    if not todo:
        return
    loader = ControlLoader(config, store, work)
    for name in config.controls:  # apart, since some rungs learn from all that they are fitted on
        fit.fit_tasks(
            [task for task in todo if task.control == name],
            dataclasses.replace(config, seed=(config.seed + (name == "reseeded")) % 2**32),
            loader,
            work,
            directory=work.controls.maps / "training" / name,
            stage=f"train_hypernetworks_{name}",
        )


class ControlLoader(Loader):
    """Makes the problems of controls from the run's store and that of its re-initialised models."""

    def __init__(self, config: Config, store: Store, work: Workdir):
        super().__init__(open_controls(config, work, store), work, config.seed)
        self._own_second = config.sae.seeds > CEILING_SEED  # the run has that seed itself
        self._twins = dict(zip(store.models, untrained_names(store)))
        self._replaced: dict[tuple, Side] = {}

    def pairs(self, task: Task, split: str) -> Pairs:
        return shown(task, self.rows(task, split)) if task.control else super().pairs(task, split)

    def rows(self, task: Task, split: str) -> Pairs:
        """Returns the paired rows of a split, with B's own activations as a skyline's source."""
        documents = self.store.rows.document[self.store.select(split)]
        if task.control == "ceiling":
            target = self.side(task.target, task.site_target, split)
            return Pairs(self._second(task, split), target, documents)
        source = self.side(task.source, task.site_source, split)
        if task.control == "reseeded":
            return Pairs(source, self.side(task.target, task.site_target, split), documents)
        return Pairs(source, self._twin(task, split), documents)

    def target_dictionary(self, task: Task) -> Path:
        if task.control != "untrained":
            return super().target_dictionary(task)
        return self.work.controls.dictionary(self._twins[task.target], task.site_target, MEMBER)

    def _second(self, task: Task, split: str) -> Side:
        """B's rows, with B's dictionary of another seed."""
        home = self.work if self._own_second else self.work.controls
        folder = home.dictionary(task.target, task.site_target, f"seed-{CEILING_SEED}")

        def make() -> Side:
            side = self.side(task.target, task.site_target, split)
            return dataclasses.replace(side, dictionary=dictionaries.load(folder))

        return self._kept(("second", task.target, task.site_target, split), make)

    def _twin(self, task: Task, split: str) -> Side:
        """The rows of B's re-initialised model, with a dictionary of its own."""
        place = self._twins[task.target], task.site_target, split
        return self._kept(place, lambda: load_side(self.store, *place, self.work.controls))

    def _kept(self, key: tuple, make: Callable[[], Side]) -> Side:
        if key not in self._replaced:
            self._replaced[key] = make()
        return self._replaced[key]


def shown(task: Task, pairs: Pairs) -> Pairs:
    """Returns a control's rows as its rung reads them.

    The source of a skyline is what its dictionary makes of B: its features and, in place of B's
    own activations, their reconstruction. Rows of two models stay as they are.
    """
    if task.control != "ceiling" or map_class(task.kind).reads != "activations":
        return pairs
    source = pairs.source
    x = modules.over_rows(source.dictionary, source.x, method="__call__", size=ROWS)
    return dataclasses.replace(pairs, source=dataclasses.replace(source, x=x))
