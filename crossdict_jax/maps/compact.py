"""Features of all rows, encoded once and kept as what is active in each."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compact:
    """The active features of rows, in equally many slots of each: rows can be taken out of it."""

    values: jax.Array  # float32 [batch, slots], never negative; 0 says that a slot is not used
    features: jax.Array  # int32 [batch, slots]; none twice in a row among the used
    width: int = dataclasses.field(metadata={"static": True})

    def dense(self) -> jax.Array:
        """Returns the features [batch, width]."""
        rows = jnp.arange(len(self.values))[:, None]
        return jnp.zeros((len(self.values), self.width)).at[rows, self.features].add(self.values)


def compact(batches: Iterable[np.ndarray], *, limit: int) -> Compact | None:
    """Returns the code of batches of features [m, width]; None if a row has more than ``limit``."""
    parts = []
    for f in batches:
        rows, features = np.nonzero(f)
        counts = np.bincount(rows, minlength=len(f))
        if counts.max() > limit:
            return None
        slot = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        shape = (len(f), max(1, counts.max()))
        values, index = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
        values[rows, slot], index[rows, slot] = f[rows, features], features
        parts.append(Compact(values, index, f.shape[1]))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *alike(parts))


def alike(codes: list[Compact]) -> list[Compact]:
    """Returns the codes with equally many slots, the new ones not used."""
    slots = max(code.features.shape[1] for code in codes)
    result = []
    for code in codes:
        more = ((0, 0), (0, slots - code.features.shape[1]))
        values, features = (np.pad(a, more) for a in (code.values, code.features))
        result.append(Compact(values, features, code.width))
    return result
