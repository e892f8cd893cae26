"""Columns: arrays that lie in a file, longer than memory; they grow, and are read in slices."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

STRETCH = 2**16  # entries that are read at a time by who goes through a whole column


def nameless_file(directory: Path | None) -> IO[bytes]:
    """Returns a file to write and read, gone with the process however that ends.

    Args:
      directory: where it takes its room; None: where temporary files lie.
    """
    return tempfile.TemporaryFile(dir=directory)


class Column:
    """An array in a nameless file.

    Args:
      directory: where the file takes its room.
      dtype: of its entries.
      width: numbers of an entry, [n, width]; None: [n].
    """

    def __init__(self, directory: Path, dtype, *, width: int | None = None):
        self._file = nameless_file(directory)
        self.dtype = np.dtype(dtype)
        self._entry = () if width is None else (width,)
        self._length = 0

    def append(self, array: np.ndarray) -> None:
        """Adds entries at the end, turned into the column's type."""
        self._file.seek(0, 2)
        self._file.write(array.astype(self.dtype).tobytes())
        self._length += len(array)

    def __len__(self) -> int:
        return self._length

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._length, *self._entry)

    def __getitem__(self, here: slice) -> np.ndarray:
        """Returns consecutive entries as an array of its own."""
        start, stop, _ = here.indices(self._length)
        numbers = int(np.prod(self._entry))
        self._file.seek(start * numbers * self.dtype.itemsize)
        count = max(stop - start, 0) * numbers
        return np.fromfile(self._file, self.dtype, count).reshape(-1, *self._entry)


def stretches(length: int) -> Iterator[slice]:
    """Yields slices that together are all of so many entries."""
    return (slice(at, min(at + STRETCH, length)) for at in range(0, length, STRETCH))
