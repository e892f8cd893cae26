"""Sparse dictionaries of a residual stream: architectures, training, exchange.

An architecture is one file here, found by its name: ``relu.py`` is ``sae.architecture=relu``.
"""

from crossdict_jax.dictionaries.base import Dictionary, architectures, save
from crossdict_jax.dictionaries.formats import load
from crossdict_jax.dictionaries.formats.saelens import save as save_saelens

__all__ = [
    "Dictionary",
    "architectures",
    "load",
    "save",
    "save_saelens",
    "train_dictionaries",
]


def __getattr__(name: str):
    if name == "train_dictionaries":  # imported late: it needs the store, loading does not
        from crossdict_jax.dictionaries.train import train_dictionaries

        return train_dictionaries
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
