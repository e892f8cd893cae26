"""Which features do two language models share? Dictionaries, maps between them, and proof.

Rooms, from the bottom up: ``models``, ``training``, ``activations``, ``dictionaries``,
``maps``, ``evaluation`` and ``causal``; ``report`` shows what they wrote. They are imported
on first use, so that ``import crossdict_jax`` stays quick.
"""

import importlib

_ROOMS = (
    "activations",
    "causal",
    "dictionaries",
    "evaluation",
    "maps",
    "models",
    "pretraining",
    "report",
    "training",
)
__all__ = list(_ROOMS)


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
