"""Retrieval: does a prediction find its own target among a fixed pool of targets?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import stats

CHUNK = 1024  # predictions compared at once: bounds the similarity matrix to CHUNK x pool
LARGEST_DEFAULT_POOL = 8192


@dataclasses.dataclass(frozen=True)
class Pool:
    """Candidate targets, one entry per distinct direction; zero rows fill up to the pool's size."""

    rows: np.ndarray  # int [pool], whose targets are candidates and whose predictions are queries
    units: np.ndarray  # float32 [pool, width], distinct unit vectors
    entries: np.ndarray  # float32 [pool], how many candidates point in each direction
    direction: np.ndarray  # int32 [pool], the direction of each query's true target
    identical: np.ndarray  # int [pool], candidates that are the true target to the bit (itself too)


def make_pool(target: np.ndarray, *, size: int, seed: int) -> Pool:
    """Returns ``size`` rows of ``target`` [n, width] as candidates; all of them in order if n."""
    n = len(target)
    generator = stats.generator(seed)
    rows = np.sort(generator.choice(n, size, replace=False)) if size < n else np.arange(n)
    candidates = target[rows] + 0.0  # -0.0 becomes 0.0
    units = unit_rows(candidates)
    direction, first, entries = _distinct(units)
    same, _, copies = _distinct(candidates)
    padding = size - len(first)
    return Pool(
        rows=rows,
        units=np.pad(units[first], ((0, padding), (0, 0))),
        entries=np.pad(entries, (0, padding)).astype(np.float32),
        direction=direction.astype(np.int32),
        identical=copies[same],
    )


def _distinct(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(each row's class, each class's first row, each class's size) by the rows' bits."""
    classes: dict[bytes, int] = {}
    label = np.array([classes.setdefault(row.tobytes(), len(classes)) for row in x])
    _, first, size = np.unique(label, return_index=True, return_counts=True)
    return label, first, size


def ranks(predicted: np.ndarray, pool: Pool) -> np.ndarray:
    """Returns the rank, from 1, of each query's true target by cosine, int [pool].

    Queries are rows of predicted [n, width]. Candidates that tie with the true target stand before
    it, unless they are the same vector.
    """
    queries = unit_rows(predicted[pool.rows])
    size = min(CHUNK, len(queries))
    units, entries = jnp.asarray(pool.units), jnp.asarray(pool.entries)
    counts = []
    for at in range(0, len(queries), size):
        chunk, direction = queries[at : at + size], pool.direction[at : at + size]
        short = size - len(chunk)
        padded = np.pad(chunk, ((0, short), (0, 0))), np.pad(direction, (0, short))
        counts.append(np.asarray(at_least_as_similar(*padded, units, entries))[: len(chunk)])
    return np.concatenate(counts).astype(np.int64) - pool.identical + 1


@jax.jit
def at_least_as_similar(queries, direction, units, entries):
    """Returns how many candidates are as similar as the true one, or more, [chunk].

    Exact below 2^24.
    """
    similarity = jnp.matmul(queries, units.T, precision="highest")  # [chunk, directions]
    true = similarity[jnp.arange(len(queries)), direction]
    above = similarity >= true[:, None]
    return jnp.matmul(above.astype(jnp.float32), entries, precision="highest")


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Returns the rows of ``x`` [n, width] at length 1, float32; zero rows stay zero."""
    out = np.empty(x.shape, np.float32)
    for at in range(0, len(x), CHUNK):
        chunk = x[at : at + CHUNK].astype(np.float64)
        norm = np.sqrt(np.einsum("ij,ij->i", chunk, chunk))[:, None]
        out[at : at + CHUNK] = chunk / np.where(norm == 0, 1.0, norm)
    return out
