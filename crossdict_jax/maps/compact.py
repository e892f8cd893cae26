"""Features of all rows, encoded once and kept as what is active in each."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import numpy as np

from crossdict_jax.dictionaries.sparse import Code


def compact(batches: Iterable[np.ndarray], *, most: int) -> Code | None:
    """Returns the code, on the host, of features [m, width] that come in batches.

    None where a row has more than ``most`` active features. Places are used in the features' order.
    """
    parts = []
    for f in batches:
        parts.append(_code(f))
        if _places(parts[-1]) > most:
            return None
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *alike(parts))


def alike(codes: list[Code]) -> list[Code]:
    """Returns the codes with equally many places, the new ones not used."""
    return [_with_places(code, max(map(_places, codes))) for code in codes]


def _places(code: Code) -> int:
    return code.features.shape[1]


def _code(f: np.ndarray) -> Code:
    rows, features = np.nonzero(f)
    counts = np.bincount(rows, minlength=len(f))
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (len(f), max(1, counts.max()))
    values, index = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    values[rows, place], index[rows, place] = f[rows, features], features
    return Code(values, index, f.shape[1])


def _with_places(code: Code, places: int) -> Code:
    more = ((0, 0), (0, places - _places(code)))
    return Code(np.pad(code.values, more), np.pad(code.features, more), code.width)
