"""The median of more numbers than are held, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

Read = Callable[[], Iterator[np.ndarray]]


def median_of(read: Read) -> np.float32 | None:
    """Returns what np.median says of all float32 numbers, none below 0, that ``read()`` yields.

    None if there are none. Such numbers are in the order of their bits: one reading counts upper
    halves, and a further one the lower halves of those whose upper half is the median's.
    """
    upper = _histogram(bits >> 16 for bits in _bits(read))
    count = int(upper.sum())
    if not count:
        return None
    middle = sorted({(count - 1) // 2, count // 2})  # two of an even count
    return np.mean([_in_order(read, upper, rank) for rank in middle], dtype=np.float32)


def _in_order(read: Read, upper: np.ndarray, rank: int) -> np.float32:
    """The number that comes after ``rank`` others."""
    half = int(np.searchsorted(np.cumsum(upper), rank, side="right"))
    lower = _histogram(bits[bits >> 16 == half] & 0xFFFF for bits in _bits(read))
    left = rank - int(upper[:half].sum())
    rest = int(np.searchsorted(np.cumsum(lower), left, side="right"))
    return np.uint32(half << 16 | rest).view(np.float32)


def _bits(read: Read) -> Iterator[np.ndarray]:
    return (numbers.view(np.uint32) for numbers in read())


def _histogram(halves: Iterable[np.ndarray]) -> np.ndarray:
    return sum((np.bincount(h, minlength=2**16) for h in halves), np.zeros(2**16, np.int64))
