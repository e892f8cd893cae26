"""Controls of maps: from a second dictionary of B, into a re-initialised B, from another seed."""

from crossdict_jax.activations.store import Store
from crossdict_jax.activations.untrained import open_controls
from crossdict_jax.config import Config, controlled_layers
from crossdict_jax.maps import fit
from crossdict_jax.maps.base import map_class
from crossdict_jax.maps.fit import Loader, Task
from crossdict_jax.workdir import Workdir


def control_tasks(config: Config, store: Store) -> list[Task]:
    """Returns every control of the run's aligned maps, of the kinds and layers that have them.

    - ceiling: B to B at the target's site, for every kind, from B's dictionary of another seed.
    - untrained: A to B's re-initialised model; the task keeps the name of B.
    - reseeded: the map from another seed, of trained kinds that read features: others are not
      random, or have nothing to attribute.
    """
    layers = dict(zip(store.models, controlled_layers(config)))
    controlled = [
        task
        for task in fit.tasks(config, store)
        if task.pairing == "aligned"
        and task.site_target.layer in layers[task.target]
        and task.kind in (config.control_kinds or config.map.kinds)
    ]
    result, classes = [], {task.kind: map_class(task.kind) for task in controlled}
    random = {k for k, c in classes.items() if c.fits_together and c.reads == "features"}
    for control in ("ceiling", "untrained", "reseeded"):
        if control in config.controls:
            kinds = random if control == "reseeded" else classes
            result += dict.fromkeys(t.controlled(control) for t in controlled if t.kind in kinds)
    return result


def fit_controls(config: Config, store: Store, work: Workdir) -> None:
    """Fits every control into ``work.controls``."""
    todo = control_tasks(config, store)
    loader = Loader(config, open_controls(config, work, store) if todo else store, work)
    for name in config.controls:  # apart: some kinds learn from all problems that they get
        seed = (config.seed + (name == "reseeded")) % 2**32
        fit.fit_tasks([task for task in todo if task.control == name], loader, seed=seed)
