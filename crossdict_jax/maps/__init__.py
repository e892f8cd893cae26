"""Maps from one model's side to another's features: the ladder of rungs, each one file.

A rung is found by its file's name: ``ridge.py`` is ``map.kinds=ridge``.
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
    save,
)

_OF_THE_STAGE = (
    "Task",
    "fit_maps",
    "layer_pairs",
    "load_pairs",
    "load_side",
    "predict",
    "predict_activations",
    "shuffle_seed",
    "shuffled",
    "source_inputs",
    "tasks",
)
__all__ = [
    "ActivationMap",
    "Fitted",
    "Map",
    "Pairs",
    "Problem",
    "Side",
    "map_kinds",
    "load",
    "map_module",
    "save",
    *_OF_THE_STAGE,
]


def __getattr__(name: str):
    if name in _OF_THE_STAGE:  # imported late: the stage needs the store, loading a map does not
        from crossdict_jax.maps import fit

        return getattr(fit, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
