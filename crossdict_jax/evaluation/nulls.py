"""Nulls of correlations: circular shifts, and shuffles within equal tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.fft import prev_fast_len

from crossdict_jax import stats
from crossdict_jax.evaluation.codes import paired_products
from crossdict_jax.maps.base import slices
from crossdict_jax.maps.codes import Codes, Moments

BINS = 2048  # of correlations in [-1, 1]; nulls in the observed bin count against it
POOLS = 32  # octaves of how many rows a feature fires in
NULL_VALUES = 2**24  # correlations of shifted pairs that a pool needs: p down to 6e-8
BATCH = 2**21  # values of each side that are transformed at a time
SHUFFLES = 99  # within equal tokens: beating them all by chance has p = 0.01
TIES = 1e-9  # relative difference of two orders of summation


def shifts(documents: np.ndarray, n: int) -> range:
    """Returns the circular shifts of n rows that are longer than any of the documents [rows]."""
    longest = np.unique(documents, return_counts=True)[1].max(initial=0)
    return range(longest, n - longest + 1) if n else range(0)


def fast_length(n: int) -> int:
    """Returns how many of n rows ``shift_p_values`` takes: FFTs have fast lengths."""
    return prev_fast_len(n, real=True) if n else 0


def shift_p_values(r: np.ndarray, a: Codes, b: Codes, documents: np.ndarray) -> np.ndarray:
    """Returns the p-value of each pair's correlation under circular shifts, float64 [pairs].

    Shifting b by more than a document keeps the firing patterns (bursts, long silences) and removes
    their relation. One FFT gives all shifts. Pairs that fire similarly often (the rarer feature's
    count, by octaves) share one null, so p can be far below 1 / rows. Where no shift is admissible
    (one document) p is 1.

    Args:
      r: the correlations [pairs] of the columns of a with those of b.
      a, b: [n, pairs], rows in the order of the text, of documents [n].
    """
    firings = np.minimum(Moments.of(a).firings, Moments.of(b).firings)
    pool = np.log2(np.maximum(firings, 1)).astype(np.int64)
    n = fast_length(len(documents))
    allowed = np.isin(np.arange(n), shifts(documents, n))
    members = [np.flatnonzero(pool == p) for p in np.unique(pool)]
    enough = -(-NULL_VALUES // max(n, 1))  # pairs of a pool, evenly spread
    spread = [m[np.linspace(0, len(m) - 1, min(len(m), enough)).astype(np.int64)] for m in members]
    drawn = np.concatenate([np.zeros(0, np.int64), *spread])
    size = max(1, min(BATCH // max(n, 1), 2 ** int(np.ceil(np.log2(max(len(drawn), 1))))))
    counts = np.zeros((POOLS, BINS), np.int64)
    for batch in slices(len(drawn), size):
        x, y = np.zeros((2, size, n), np.float32)  # rows of 0 fill up the last batch
        for out, codes in ((x, a), (y, b)):
            part = codes[:n, drawn[batch]]
            out[: part.shape[1]] = Moments.of(part).standardised(part).T
        of = np.full(size, POOLS)
        of[: batch.stop - batch.start] = pool[drawn[batch]]
        counts += np.asarray(_shifted_bins(x, y, allowed, of))[:-1]
    as_large = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
    return (1 + as_large[pool, np.asarray(_bin(r))]) / (1 + counts.sum(axis=1)[pool])


def _bin(r):
    return jnp.clip(jnp.floor((jnp.asarray(r) + 1) * (BINS / 2)), 0, BINS - 1).astype(jnp.int32)


@jax.jit
def _shifted_bins(x, y, allowed, pool) -> jax.Array:
    """Counts [POOLS + 1, BINS] of the correlations of x [pairs, n] with y at allowed shifts."""
    product = jnp.fft.rfft(x) * jnp.conj(jnp.fft.rfft(y))
    flat = pool[:, None] * BINS + _bin(jnp.fft.irfft(product, n=x.shape[1]))
    weight = jnp.broadcast_to(allowed[None, :], flat.shape).astype(jnp.int32)
    return jnp.zeros((POOLS + 1) * BINS, jnp.int32).at[flat].add(weight).reshape(-1, BINS)


def token_shuffles(
    a: Codes, b: Codes, tokens: np.ndarray, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what is left when rows of b are permuted among rows with the same tokens.

    Per pair of columns: the mean of the shuffled sums of products, float64 [pairs], and whether the
    true sum exceeds all SHUFFLES. A pair that co-fires because of the token alone loses nothing.
    tokens are [n] or [n, models].
    """
    generator = stats.generator(seed)
    tokens = tokens.reshape(len(tokens), -1)
    _, group = np.unique(tokens, axis=0, return_inverse=True)
    by_group = np.argsort(group.reshape(-1), kind="stable")
    a, b = (codes.astype(np.float64)[by_group] for codes in (a, b))
    group = group.reshape(-1)[by_group]
    true = paired_products(a, b)
    total, beaten = np.zeros(a.shape[1]), np.ones(a.shape[1], bool)
    for _ in range(SHUFFLES):
        order = np.argsort(group + generator.random(len(group)))  # within every group
        shuffled = paired_products(a, b[order])
        total += shuffled / SHUFFLES
        beaten &= true > shuffled + TIES * abs(true)
    return total, beaten
