"""Columns: arrays that lie in a file, longer than memory; they grow, and are read in slices."""

from __future__ import annotations

import math
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from crossdict_jax.errors import UserError

STRETCH = 2**16  # entries that are read at a time by who goes through a whole column


def nameless_file(directory: Path | None) -> IO[bytes]:
    """Returns a file to write and read, gone with the process however that ends.

    Args:
      directory: where it takes its room; None: where temporary files lie.
    """
    return tempfile.TemporaryFile(dir=directory)


class Column:
    """An array in a file.

    Attributes:
      dtype: of its numbers.
      shape: (n,) or (n, numbers of an entry).
    """

    def __init__(self, file: IO[bytes], dtype, shape: tuple[int, ...], *, offset: int = 0):
        """Args:
        offset: byte of the file at which the array begins.
        """
        self.dtype, self.shape = np.dtype(dtype), shape
        self._file, self._offset = file, offset

    def append(self, array: np.ndarray) -> None:
        """Adds entries at the end, turned into the column's type; for a file that has no other."""
        self._file.seek(0, 2)
        self._file.write(array.astype(self.dtype).tobytes())
        self.shape = (len(self) + len(array), *self.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, here: slice) -> np.ndarray:
        """Returns consecutive entries as an array of its own."""
        start, stop, _ = here.indices(len(self))
        numbers = math.prod(self.shape[1:])
        self._file.seek(self._offset + start * numbers * self.dtype.itemsize)
        count = max(stop - start, 0) * numbers
        return np.fromfile(self._file, self.dtype, count).reshape(-1, *self.shape[1:])


def new_column(directory: Path, dtype, *, width: int | None = None) -> Column:
    """Returns an empty column in a nameless file: [0], or [0, width]."""
    return Column(nameless_file(directory), dtype, (0,) if width is None else (0, width))


def columns_of(path: Path) -> dict[str, Column]:
    """Returns the arrays of a file that np.savez wrote: where they lie, none of them read.

    Raises:
      UserError: an array does not lie entry by entry.
    """
    columns = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                np.lib.format.read_magic(file)
                shape, by_number, dtype = np.lib.format.read_array_header_1_0(file)
                header = file.tell()
            if by_number:
                raise UserError(
                    f"{path}: {member.filename} does not lie row by row; write it with np.savez of "
                    "np.ascontiguousarray."
                )
            raw = path.open("rb")
            raw.seek(member.header_offset + 26)  # lengths of the name and the field before the data
            lengths = struct.unpack("<HH", raw.read(4))
            offset = member.header_offset + 30 + sum(lengths) + header
            columns[member.filename.removesuffix(".npy")] = Column(raw, dtype, shape, offset=offset)
    return columns


def equal(a: Column, b: Column) -> bool:
    """Whether two columns hold the same numbers."""
    return a.shape == b.shape and all(np.array_equal(a[h], b[h]) for h in stretches(len(a)))


def stretches(length: int) -> Iterator[slice]:
    """Yields slices that together are all of so many entries."""
    return (slice(at, min(at + STRETCH, length)) for at in range(0, length, STRETCH))
