"""Sparse dictionaries of a residual stream: architectures, training, exchange.

An architecture is one file of ``architectures``, found by its name.
"""

from crossdict_jax.dictionaries.base import Dictionary, architectures, save
from crossdict_jax.dictionaries.formats import load
from crossdict_jax.dictionaries.formats.saelens import save as save_saelens

__all__ = ["Dictionary", "architectures", "load", "save", "save_saelens"]
