"""Retrieval: does a prediction find its own target among a fixed pool of targets?"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import norm

from crossdict_jax import stats
from crossdict_jax.maps.base import padded, slices
from crossdict_jax.maps.codes import Codes, Compact, compact
from crossdict_jax.ops import exact
from crossdict_jax.training.mesh import platform

CHUNK = 512  # predictions compared with all of the pool at once
IN_CACHE = 128  # the same, where sums of slots read and write these again and again
LARGEST_DEFAULT_POOL = 8192
TOGETHER = 8  # slots added up in one pass over the sums; of a rest XLA makes slow code
SPARSE_COST = 8  # multiply-adds of a dense product in the time of one by slots, two CPU cores


@dataclasses.dataclass(frozen=True)
class Pool:
    """Candidate targets, one entry per distinct direction; zero rows pad to the pool's size."""

    rows: np.ndarray  # int [pool], ascending, rows of the candidates and queries
    units: Compact | jax.Array  # float32 [pool, width], distinct unit vectors
    entries: jax.Array  # float32 [pool], candidates of each direction
    direction: np.ndarray  # int32 [pool], the direction of each query's true target
    identical: np.ndarray  # int [pool], candidates bit-identical to the true target, with itself


def make_pool(target: Codes, *, size: int, seed: int) -> Pool:
    """Returns ``size`` rows of ``target`` [n, width] as candidates; all of them in order if n."""
    n = target.shape[0]
    rows = np.arange(n)
    if size < n:
        rows = np.sort(stats.generator(seed).choice(n, size, replace=False))
    candidates = target[rows]
    same, _, copies = _distinct(candidates)
    counts = np.diff(candidates.indptr)
    norms = np.repeat(norm(candidates.astype(np.float64), axis=1), counts)
    candidates.data = (candidates.data / np.where(norms == 0, 1.0, norms)).astype(np.float32)
    direction, first, entries = _distinct(candidates)
    units, slots = candidates[first], -(-int(counts.max()) // TOGETHER) * TOGETHER
    units.resize(candidates.shape)
    few = platform() == "cpu" and slots * SPARSE_COST < units.shape[1]
    return Pool(
        rows=rows,
        units=compact(units, slots) if few else jnp.asarray(units.toarray()),
        entries=jnp.asarray(np.pad(entries, (0, size - len(entries))), jnp.float32),
        direction=direction.astype(np.int32),
        identical=copies[same],
    )


def _distinct(codes: Codes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(each row's class, each class's first row, each class's size) by the rows' bits."""
    classes: dict[tuple[bytes, bytes], int] = {}
    rows = zip(*(np.split(a, codes.indptr[1:-1]) for a in (codes.indices, codes.data)))
    bits = ((features.tobytes(), values.tobytes()) for features, values in rows)
    label = np.array([classes.setdefault(row, len(classes)) for row in bits])
    _, first, size = np.unique(label, return_index=True, return_counts=True)
    return label, first, size


def ranks(queries: np.ndarray, pool: Pool) -> np.ndarray:
    """Returns the rank, from 1, of each query's true target by cosine, int [pool].

    Queries [pool, width] are the predictions of the pool's rows. Ties count against the true
    target, unless they are the same vector.
    """
    size = min(IN_CACHE if isinstance(pool.units, Compact) else CHUNK, len(queries))

    def count(rows: slice) -> np.ndarray:
        some = (padded(a[rows], size) for a in (queries, pool.direction))
        counted = at_least_as_similar(*some, pool.units, pool.entries)
        return np.asarray(counted)[: rows.stop - rows.start]

    with ThreadPoolExecutor() as threads:  # sums of slots take one core each
        counts = np.concatenate(list(threads.map(count, slices(len(queries), size))))
    return counts.astype(np.int64) - pool.identical + 1


@jax.jit
def at_least_as_similar(queries, direction, units: Compact | jax.Array, entries):
    """Returns how many candidates are at least as similar, [chunk], exact below 2^24.

    Cosines are times the query's length, which changes no rank.
    """
    if isinstance(units, Compact):
        by_feature = queries.T  # of which each direction adds up a few rows

        def add(slot, total):
            weights, features = units.values[:, slot], units.features[:, slot]
            rows = by_feature.at[features].get(mode="promise_in_bounds")
            return total + weights[:, None] * rows

        start, slots = jnp.zeros((len(units.values), len(queries))), units.values.shape[1]
        similarity = jax.lax.fori_loop(0, slots, add, start, unroll=TOGETHER)
    else:
        similarity = exact(units, queries.T)
    own = jnp.take_along_axis(similarity, direction[None, :], axis=0)
    return jnp.sum(jnp.where(similarity >= own, entries[:, None], 0), axis=0)
