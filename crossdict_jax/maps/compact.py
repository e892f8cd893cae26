"""Features of all rows, encoded once and kept as what is active in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compact:
    """The active features of rows, in equally many places of each: rows can be taken out of it.

    Attributes:
      values: float32 [batch, places], never negative; 0 says that a place is not used.
      features: int32 [batch, places], which feature; none twice in a row among the used.
      width: how many features there are (static).
    """

    values: jax.Array
    features: jax.Array
    width: int = dataclasses.field(metadata={"static": True})

    def dense(self) -> jax.Array:
        """Returns the features [batch, width]."""
        rows = jnp.arange(len(self.values))[:, None]
        return jnp.zeros((len(self.values), self.width)).at[rows, self.features].add(self.values)


def compact(batches: Iterable[np.ndarray], *, most: int) -> Compact | None:
    """Returns the code, on the host, of features [m, width] that come in batches.

    None where a row has more than ``most`` active features. Places are used in the features' order.
    """
    parts = []
    for f in batches:
        parts.append(_code(f))
        if _places(parts[-1]) > most:
            return None
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *alike(parts))


def alike(codes: list[Compact]) -> list[Compact]:
    """Returns the codes with equally many places, the new ones not used."""
    return [_with_places(code, max(map(_places, codes))) for code in codes]


def _places(code: Compact) -> int:
    return code.features.shape[1]


def _code(f: np.ndarray) -> Compact:
    rows, features = np.nonzero(f)
    counts = np.bincount(rows, minlength=len(f))
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (len(f), max(1, counts.max()))
    values, index = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    values[rows, place], index[rows, place] = f[rows, features], features
    return Compact(values, index, f.shape[1])


def _with_places(code: Compact, places: int) -> Compact:
    more = ((0, 0), (0, places - _places(code)))
    return Compact(np.pad(code.values, more), np.pad(code.features, more), code.width)
