"""Maps from one model's side to another's features, each kind of them one file.

A kind is found by its file's name: ``kinds/ridge.py`` is ``map.kinds=ridge``.
"""

from crossdict_jax.maps.base import (
    ActivationMap,
    Fitted,
    Map,
    Pairs,
    Problem,
    Side,
    load,
    map_kinds,
    map_module,
    predict,
    predict_activations,
    save,
)
from crossdict_jax.maps.fit import (
    Task,
    fit_maps,
    layer_pairs,
    load_pairs,
    shuffle_seed,
    shuffled,
    tasks,
)

__all__ = [
    "ActivationMap",
    "Fitted",
    "Map",
    "Pairs",
    "Problem",
    "Side",
    "Task",
    "fit_maps",
    "layer_pairs",
    "load",
    "load_pairs",
    "map_kinds",
    "map_module",
    "predict",
    "predict_activations",
    "save",
    "shuffle_seed",
    "shuffled",
    "tasks",
]
