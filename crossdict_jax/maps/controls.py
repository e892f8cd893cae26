"""Controls of maps: from a second dictionary of B, into a re-initialised B, from another seed."""

import dataclasses
from pathlib import Path

from crossdict_jax import modules
from crossdict_jax.activations.store import Store
from crossdict_jax.activations.untrained import open_controls, untrained_names
from crossdict_jax.config import Config, controlled_layers
from crossdict_jax.dictionaries.train import CEILING_SEED
from crossdict_jax.maps import fit
from crossdict_jax.maps.base import ROWS, Pairs, map_class
from crossdict_jax.maps.fit import MEMBER, Loader, Task
from crossdict_jax.workdir import Workdir


def control_tasks(config: Config, store: Store) -> list[Task]:
    """Returns every control of the run's aligned maps, of the kinds and layers that have them.

    - ceiling: from B to B at the target's site, once for every kind; the source is B's dictionary
      of another seed.
    - untrained: from A to B's re-initialised model; the task keeps the name of B.
    - reseeded: the map itself, from another seed; only of kinds that are trained by gradient steps
      and read features, since there is nothing random in the others or nothing to attribute.
    """
    layers = dict(zip(store.models, controlled_layers(config)))
    controlled = [
        task
        for task in fit.tasks(config, store)
        if task.pairing == "aligned"
        and task.site_target.layer in layers[task.target]
        and task.kind in (config.control_kinds or config.map.kinds)
    ]
    result = []
    if "ceiling" in config.controls:
        result += dict.fromkeys(ceiling_task(task) for task in controlled)
    if "untrained" in config.controls:
        result += [dataclasses.replace(task, control="untrained") for task in controlled]
    if "reseeded" in config.controls:
        classes = {task.kind: map_class(task.kind) for task in controlled}
        random = {k for k, c in classes.items() if c.fits_together and c.reads == "features"}
        again = [task for task in controlled if task.kind in random]
        result += [dataclasses.replace(task, control="reseeded") for task in again]
    return result


def ceiling_task(task: Task) -> Task:
    """Returns the ceiling of a map: into the same features, from their own model."""
    return Task(task.target, task.target, *2 * (task.site_target,), task.kind, "aligned", "ceiling")


def fit_controls(config: Config, store: Store, work: Workdir) -> None:
    """Fits every control into ``work.controls``, as ``fit_maps`` does the run's maps."""
    todo = control_tasks(config, store)
    if not todo:
        return
    loader = ControlLoader(config, store, work)
    for name in config.controls:  # apart, since some kinds learn from all that they are fitted on
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
        second = work if config.sae.seeds > CEILING_SEED else work.controls
        self._second = lambda *end: second.dictionary(*end, f"seed-{CEILING_SEED}")
        self._untrained = dict(zip(store.models, untrained_names(store)))

    def rows(self, task: Task, split: str) -> Pairs:
        """Returns the paired rows of a split; a ceiling's source are B's own activations."""
        pairs, site = super().rows(task, split), task.site_target
        if task.control == "ceiling":
            side = self.side(task.target, site, split, self._second(task.target, site))
            return dataclasses.replace(pairs, source=side)
        if task.control == "untrained":
            model, folder = self._untrained[task.target], self.target_dictionary(task)
            return dataclasses.replace(pairs, target=self.side(model, site, split, folder))
        return pairs

    def pairs(self, task: Task, split: str) -> Pairs:
        return shown(task, super().pairs(task, split))

    def target_dictionary(self, task: Task) -> Path:
        if task.control != "untrained":
            return super().target_dictionary(task)
        model = self._untrained[task.target]
        return self.work.controls.dictionary(model, task.site_target, MEMBER)


def shown(task: Task, pairs: Pairs) -> Pairs:
    """Returns a control's rows as its map reads them.

    The source of a ceiling is what its dictionary makes of B: its features and, instead of B's
    own activations, their reconstruction. Rows of two models stay as they are.
    """
    if task.control != "ceiling" or map_class(task.kind).reads != "activations":
        return pairs
    source = pairs.source
    x = modules.over_rows(source.dictionary, source.x, method="__call__", size=ROWS)
    return dataclasses.replace(pairs, source=dataclasses.replace(source, x=x))
