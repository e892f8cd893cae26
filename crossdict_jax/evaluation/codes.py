"""Sparse codes on the host, and the Pearson correlations of all pairs of features, by tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from crossdict_jax.maps.base import exact_matmul, slices

ROWS = 4096  # rows that are dense at a time
TILE = 2**24  # correlations on the device at a time
CHUNK = 2**20  # products of two active features that are added to a tile at a time
WIDTH_STEP = 256  # device shapes are multiples, so that few programs are compiled
PIECE = 16  # active features of a row that are taken together
SCATTER_COST = 80  # multiply-adds of a matrix product in the time of one scattered, on a CPU
ROUNDING = 1e-9  # a variance below this share of the second moment is rounding

Codes = sparse.csr_array  # float32 [n, width]


def compress(features: np.ndarray | Codes | Callable[[slice], np.ndarray], rows: int = 0) -> Codes:
    """Returns features as compressed rows: 8 bytes for each active feature of a row.

    Args:
      features: [n, width], or a function that gives the features of a slice of rows.
      rows: how many rows there are, for a function.
    """
    if sparse.issparse(features):
        return sparse.csr_array(features, dtype=np.float32)
    if not callable(features):
        return _compress(features[at] for at in slices(len(features), ROWS))
    return _compress(features(at) for at in slices(rows, ROWS))


def _compress(blocks: Iterator[np.ndarray]) -> Codes:
    parts = [sparse.csr_array(np.asarray(block, np.float32)) for block in blocks]
    return sparse.vstack(parts, format="csr")


@dataclass(frozen=True)
class Moments:
    """Per feature, each [width]: in how many rows it is active, its mean, its norm about it.

    The norm, the square root of n times the variance, is 0 for a feature that never varies.
    """

    firings: np.ndarray
    mean: np.ndarray
    norm: np.ndarray

    @classmethod
    def of(cls, codes: Codes) -> Moments:
        n, width = codes.shape
        value = codes.data.astype(np.float64)

        def total(weights):
            return np.bincount(codes.indices, weights=weights, minlength=width)

        mean, square = total(value) / max(n, 1), total(value**2)
        about = square - n * mean**2
        norm = np.sqrt(np.where(about > ROUNDING * square, about, 0.0))
        return cls(total(value != 0).astype(np.int64), mean, norm)

    def scale(self) -> np.ndarray:
        """Returns 1 / norm, 0 for a feature that never varies."""
        return np.divide(1.0, self.norm, out=np.zeros_like(self.norm), where=self.norm > 0)


def paired_correlations(a: Codes, b: Codes) -> np.ndarray:
    """Returns the correlation of column j of a with column j of b, float64 [width].

    0 where one of them never varies.
    """
    return as_correlations(paired_products(a, b), a, b)


def paired_products(a: Codes, b: Codes) -> np.ndarray:
    """Returns the sum over rows of column j of a times column j of b, float64 [width]."""
    a, b = (codes.astype(np.float64, copy=False) for codes in (a, b))
    return np.asarray(a.multiply(b).sum(axis=0))


def as_correlations(products: np.ndarray, a: Codes, b: Codes) -> np.ndarray:
    """Returns the correlations of columns whose products sum up to ``products`` [width]."""
    ours, theirs = Moments.of(a), Moments.of(b)
    centred = products - a.shape[0] * ours.mean * theirs.mean
    return np.clip(centred * ours.scale() * theirs.scale(), -1, 1)


def correlations(a: Codes, b: Codes) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (columns of a, their correlations with all columns of b, float32 [tile, width_b]).

    0 where one of two features never varies. Tiles of products are summed over blocks of rows:
    by a scatter of the pairs of features that are active together, or, where codes are so dense
    that this costs more, by matrix products.

    Memory, in bytes: 8 (a.nnz + b.nnz) for the codes, 8 a.nnz for a by columns, and at most
    4 * 4 TILE for tiles. Further, on the scattered way about 8 (b.nnz + n PIECE / 2) for b's rows
    in pieces, 24 for every active feature of a tile of a, and 3 * 4 CHUNK; on the dense way 8 ROWS
    (tile + width_b). Time: one scattered product for each pair of features that are active in a
    row, or n width_a width_b multiply-adds.
    """
    pieces = -(-np.diff(b.indptr) // PIECE)
    scattered = PIECE * int(np.diff(a.indptr).astype(np.int64) @ pieces) * SCATTER_COST
    dense = a.shape[0] * a.shape[1] * b.shape[1]
    width = _padded_width(b.shape[1])
    tile = min(_padded_width(a.shape[1]), max(1, TILE // width))
    sums = (_scattered if scattered < dense else _multiplied)(a, b, tile, width)
    for at, r in zip(slices(a.shape[1], tile), sums):
        yield at, np.asarray(r)[: at.stop - at.start, : b.shape[1]]


def _padded_width(width: int) -> int:
    return max(1, -(-width // WIDTH_STEP)) * WIDTH_STEP


def _scattered(a: Codes, b: Codes, tile: int, width: int) -> Iterator[jax.Array]:
    ours, theirs = Moments.of(a), Moments.of(b)
    pieces = _Pieces.of(b, theirs.scale())
    root = np.sqrt(a.shape[0])
    offset_b = _lengthened(root * theirs.mean * theirs.scale(), width)
    columns = sparse.csc_array(a)
    size = CHUNK // PIECE
    for at in slices(a.shape[1], tile):
        starts = columns.indptr[at.start : at.stop + 1]
        rows, value = (x[starts[0] : starts[-1]] for x in (columns.indices, columns.data))
        place = np.repeat(np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts))
        value = (value * ours.scale()[at].astype(np.float32)[place]).astype(np.float32)
        entry, piece = pieces.of_rows(rows)
        sums = jnp.zeros(tile * width, jnp.float32)
        for chunk in slices(len(entry), size):
            here = entry[chunk]
            lists = (_lengthened(x, size) for x in (piece[chunk], place[here], value[here]))
            sums = _scatter(sums, *lists, pieces.index, pieces.weight, width=width)
        offset_a = _lengthened((root * ours.mean * ours.scale())[at], tile)
        yield _less_means(sums, offset_a, offset_b)


@dataclass(frozen=True)
class _Pieces:
    """The active features of rows, in pieces of PIECE: rows differ much in how many they have.

    Attributes:
      index, weight: [pieces, PIECE], features and their scaled values; the last of a row ends in
        zeros.
      first: int32 [n], the first piece of every row.
      count: int32 [n], how many it has.
    """

    index: jax.Array
    weight: jax.Array
    first: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, codes: Codes, scale: np.ndarray) -> _Pieces:
        active = np.diff(codes.indptr)
        count = (-(-active // PIECE)).astype(np.int32)
        first = (np.cumsum(count) - count).astype(np.int32)
        within = _counting(active)
        place = np.repeat(first, active) + within // PIECE, within % PIECE
        shape = (-(-max(1, int(count.sum())) // ROWS) * ROWS, PIECE)  # few different shapes
        index, weight = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        index[place] = codes.indices
        weight[place] = codes.data * scale[codes.indices]
        return cls(jnp.asarray(index), jnp.asarray(weight), first, count)

    def of_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (place in ``rows``, piece) of every piece of the given rows."""
        count = self.count[rows]
        entry = np.repeat(np.arange(len(rows), dtype=np.int32), count)
        return entry, self.first[rows][entry] + _counting(count)


def _counting(counts: np.ndarray) -> np.ndarray:
    """0 .. count - 1 for every count, one after the other."""
    starts = np.cumsum(counts) - counts
    return (np.arange(counts.sum()) - np.repeat(starts, counts)).astype(np.int32)


def _lengthened(x: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([x, np.zeros(size - len(x), x.dtype)])


@partial(jax.jit, static_argnames="width", donate_argnums=0)
def _scatter(sums, piece, place, value, index, weight, *, width) -> jax.Array:
    flat = place[:, None] * width + index[piece]  # [entries, PIECE]
    return sums.at[flat].add(value[:, None] * weight[piece])


@jax.jit
def _less_means(sums, offset_a, offset_b) -> jax.Array:
    sums = sums.reshape(len(offset_a), len(offset_b))
    return sums - (offset_a[:, None] * offset_b[None, :]).astype(jnp.float32)


def _multiplied(a: Codes, b: Codes, tile: int, width: int) -> Iterator[jax.Array]:
    y_moments, columns = Moments.of(b), sparse.csc_array(a)
    for at in slices(a.shape[1], tile):
        part = sparse.csr_array(columns[:, at])
        x_moments = Moments.of(part)
        sums = jnp.zeros((tile, width), jnp.float32)
        for rows in slices(a.shape[0], ROWS):
            x = _standardised(part[rows], x_moments, (ROWS, tile))
            y = _standardised(b[rows], y_moments, (ROWS, width))
            sums = _add_product(sums, x, y)
        yield sums


def _standardised(block: Codes, moments: Moments, shape: tuple[int, int]) -> np.ndarray:
    """Columns less their mean and over their norm, filled up with zeros."""
    out = np.zeros(shape, np.float32)
    rows, width = block.shape
    out[:rows, :width] = (block.toarray() - moments.mean[None, :]) * moments.scale()[None, :]
    return out


@partial(jax.jit, donate_argnums=0)
def _add_product(sums, x, y) -> jax.Array:
    return sums + exact_matmul(x.T, y)
