"""Retrieval: does a prediction find its own target among a fixed pool of targets?"""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import stats
from crossdict_jax.maps.base import padded, slices
from crossdict_jax.maps.codes import Codes
from crossdict_jax.ops import exact

CHUNK = 512  # predictions compared at once: the similarity matrix is CHUNK x pool
LARGEST_DEFAULT_POOL = 8192


@dataclasses.dataclass(frozen=True)
class Pool:
    """Candidate targets, one entry per distinct direction; zero rows pad to the pool's size."""

    rows: np.ndarray  # int [pool], rows of the candidates and queries
    units: jax.Array  # float32 [pool, width], distinct unit vectors
    entries: jax.Array  # float32 [pool], candidates of each direction
    direction: np.ndarray  # int32 [pool], the direction of each query's true target
    identical: np.ndarray  # int [pool], candidates bit-identical to the true target, with itself


def make_pool(target: Codes, *, size: int, seed: int) -> Pool:
    """Returns ``size`` rows of ``target`` [n, width] as candidates; all of them in order if n."""
    n = target.shape[0]
    rows = np.arange(n)
    if size < n:
        rows = np.sort(stats.generator(seed).choice(n, size, replace=False))
    candidates = target[rows].toarray()
    same, _, copies = _distinct(candidates)
    norms = np.sqrt(np.einsum("ij,ij->i", candidates, candidates, dtype=np.float64))[:, None]
    np.divide(candidates, np.where(norms == 0, 1.0, norms), out=candidates, casting="same_kind")
    direction, first, entries = _distinct(candidates)
    padding = size - len(first)
    return Pool(
        rows=rows,
        units=jnp.asarray(np.pad(candidates[first], ((0, padding), (0, 0)))),
        entries=jnp.asarray(np.pad(entries, (0, padding)), jnp.float32),
        direction=direction.astype(np.int32),
        identical=copies[same],
    )


def _distinct(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(each row's class, each class's first row, each class's size) by the rows' bits."""
    classes: dict[bytes, int] = {}
    digests = (hashlib.blake2b(row, digest_size=16).digest() for row in x)
    label = np.array([classes.setdefault(digest, len(classes)) for digest in digests])
    _, first, size = np.unique(label, return_index=True, return_counts=True)
    return label, first, size


def ranks(queries: np.ndarray, pool: Pool) -> np.ndarray:
    """Returns the rank, from 1, of each query's true target by cosine, int [pool].

    Queries [pool, width] are the predictions of the pool's rows. Ties count against the true
    target, unless they are the same vector.
    """
    size, counts = min(CHUNK, len(queries)), np.zeros(len(queries))
    for rows in slices(len(queries), size):
        similarity = similarities(padded(queries[rows], size), pool.units)
        direction = padded(pool.direction[rows], size)
        counted = at_least_as_similar(similarity, direction, pool.entries)
        counts[rows] = counted[: len(queries[rows])]
    return counts.astype(np.int64) - pool.identical + 1


@jax.jit
def similarities(queries, units):
    """Returns [chunk, directions]: cosines times the query's length, which changes no rank."""
    return exact(queries, units.T)


@jax.jit
def at_least_as_similar(similarity, direction, entries):
    """Returns how many candidates are at least as similar, [chunk], exact below 2^24."""
    own = jnp.take_along_axis(similarity, direction[:, None], axis=1)
    return jnp.sum(jnp.where(similarity >= own, entries[None, :], 0), axis=1)
