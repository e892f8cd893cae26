"""Features that have to do with a text: those that fire around it, in training text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from crossdict_jax.activations.contexts import Contexts
from crossdict_jax.errors import UserError

STRONGEST = 20  # rows by which a feature is judged
LEAST_FIRINGS = 4  # rows, for a feature to be judged at all


@dataclass(frozen=True)
class Around:
    """Where a text stands, and which features fire there.

    Attributes:
      share: float [width], of each feature's strongest rows, how many have the text around them.
      live: bool [width], fires often enough to be judged.
      base: the share of all rows: what a feature that has nothing to do with the text would have.
      token: the commonest token in which the text begins.
    """

    share: np.ndarray
    live: np.ndarray
    base: float
    token: int


def around(text: str, contexts: Contexts, rows: np.ndarray, codes: Iterator[np.ndarray]) -> Around:
    """Returns which features fire around a text.

    Args:
      rows: int [n], row numbers of the store.
      codes: the features [m, width] of these rows, in blocks.

    Raises:
      UserError: the text stands around none of the rows.
    """
    wanted = text.encode()
    holds = np.array([wanted in contexts.text(row) for row in rows])
    if not holds.any():
        raise UserError(
            f"steer.search={text!r} stands nowhere in the {len(rows)} training places read; search "
            "for other text."
        )
    place, value = strongest(codes, STRONGEST)
    fires = value > 0  # [STRONGEST, width]
    firings = fires.sum(0)
    tokens = Counter(t for row in rows[holds] for t in contexts.first_tokens(wanted, row))
    return Around(
        share=(holds[place] & fires).sum(0) / np.maximum(firings, 1),
        live=firings >= LEAST_FIRINGS,
        base=float(holds.mean()),
        token=tokens.most_common(1)[0][0],
    )


def strongest(codes: Iterator[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (rows, activations) where each feature is strongest, both [count or fewer, width]."""
    place, value, start = None, None, 0
    for f in codes:
        here = np.broadcast_to(np.arange(start, start + len(f))[:, None], f.shape)
        start += len(f)
        value = f if value is None else np.concatenate([value, f])
        place = here if place is None else np.concatenate([place, here])
        if len(value) > count:
            top = np.argpartition(-value, count - 1, axis=0)[:count]
            value, place = (np.take_along_axis(a, top, axis=0) for a in (value, place))
    order = np.argsort(-value, axis=0, kind="stable")
    return tuple(np.take_along_axis(a, order, axis=0) for a in (place, value))
