"""Maps from one model's side to another's features: ``kinds/ridge.py`` is ``map.kinds=ridge``."""

from crossdict_jax.maps.base import (
    Map,
    Pairs,
    Problem,
    Side,
    load,
    map_class,
    map_kinds,
    predict,
    predict_activations,
    save,
)
from crossdict_jax.maps.fit import Task, fit_maps, load_pairs, shuffled, tasks

__all__ = [
    "Map",
    "Pairs",
    "Problem",
    "Side",
    "Task",
    "fit_maps",
    "load",
    "load_pairs",
    "map_class",
    "map_kinds",
    "predict",
    "predict_activations",
    "save",
    "shuffled",
    "tasks",
]
