"""The largest values of each row or of a batch: found exactly, without a full sort.

Non-negative floats order as their bit patterns do, so a threshold is found as an integer, bit by
bit. On CPU a first bound leaves few candidates; accelerators have an operation for the largest
of a row, and find that of a batch some bits at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from crossdict_jax.training.mesh import GPUS, devices_of_rows, on_own_rows, platform

BITS = 31  # of a non-negative float
ROUGH = 16  # leading bits of a batch's first bound: two or three digits of a value
SPARSE = 400  # width / k from which kernels are faster on GPUs: an estimate, see docs/hardware.md
GROUP = 16  # neighbours of which that bound reads the largest only
LARGE = 2**20  # values of a batch; of fewer, lists save less time than compiling them takes
GROUPED = 2**19  # the same of groups, which compile faster
DIGIT = 4  # bits of a batch's threshold that accelerators find by reading it once
MASK = 32  # neighbours whose selection is written into one integer


def uses_lists(size: int, *, minimum: int = LARGE) -> bool:
    """Returns whether lists replace an array of ``size`` = batch x width values.

    On CPU large ones are up to 1.6 times faster, and compile in 10 seconds where dense products
    take one. On accelerators compilers estimate them several times slower, and rows shared by
    several devices would have to be gathered.
    """
    return size >= minimum and platform() == "cpu" and devices_of_rows() == 1


def fastest_products(size: int, n: int) -> str:
    """Returns which products of sparse codes are the fastest: "dense", "lists" or "kernels".

    Args:
      size: batch x width.
      n: active values among them.
    """
    if platform() in GPUS and devices_of_rows() == 1 and size >= SPARSE * n:
        return "kernels"
    return "lists" if uses_lists(size) else "dense"


def bits_of(z: jax.Array) -> jax.Array:
    """Returns int32 that order as relu(z) does, NaN greatest."""
    # The sign is dropped: -0.0 is a zero, and some NaN have one.
    return jax.lax.bitcast_convert_type(jax.nn.relu(z), jnp.int32) & (2**BITS - 1)


def kth_largest(z: jax.Array, k: int) -> jax.Array:
    """Returns the k-th largest value [batch] of each row of relu(z) [batch, width], exactly.

    With lists, rows are read in groups of about sqrt(width / k) neighbours. The k-th largest of
    their maxima is a lower bound; larger values lie in fewer than k groups.
    """
    if platform() != "cpu":
        return jax.nn.relu(on_own_rows(_by_top_k(k), z))
    batch, width = z.shape
    size = _group_size(width, limit=int((width / k) ** 0.5))
    if size < 4 or not uses_lists(z.size, minimum=GROUPED):
        return _by_bits(z, k)
    grouped = z.reshape(batch, width // size, size)
    maxima = grouped.max(axis=2)
    bound = _by_bits(maxima, k)
    above = jax.lax.bitcast_convert_type(bits_of(bound) + 1, jnp.float32)
    _, groups, counts = entries_from(maxima, above, limit=batch * k)
    index = (jnp.cumsum(counts) - counts)[:, None] + jnp.arange(k)[None, :]
    groups = groups[jnp.minimum(index, batch * k - 1)]
    candidates = jnp.take_along_axis(grouped, groups[:, :, None], axis=1)
    candidates = jnp.where(jnp.arange(k)[None, :, None] < counts[:, None, None], candidates, 0)
    return jnp.maximum(bound, _by_bits(candidates.reshape(batch, k * size), k))


def nth_largest(z: jax.Array, n: int) -> jax.Array:
    """Returns the n-th largest value [] of relu(z) [batch, width] in all rows, exactly.

    With lists, a first bound is the n-th largest of groups' maxima, raised while too many values
    exceed it to be listed.
    """
    if platform() != "cpu":
        return _by_digits(z, n)
    if not uses_lists(z.size):
        return _by_bits(z, n, axis=(0, 1))
    width, limit = z.shape[1], min(n + max(n, z.shape[1]), z.size)
    size = _group_size(width, limit=min(GROUP, z.size // (2 * n)))
    maxima = z.reshape(-1, width // size, size).max(axis=2)

    def raised(bounds):
        low, high, count = bounds  # n values or more (count) reach low, fewer reach high
        middle = low + (high - low) // 2
        new_count = _count(bits_of(z) >= middle).sum()
        enough = new_count >= n
        low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle)
        return low, high, jnp.where(enough, new_count, count)

    low = jnp.maximum(bits_of(_by_bits(maxima, n, axis=(0, 1), bits=ROUGH)), 1)
    start = low, jnp.int32(2**BITS - 1), _count(bits_of(z) >= low).sum()
    low, _, count = jax.lax.while_loop(
        lambda bounds: (bounds[2] > limit) & (bounds[1] - bounds[0] > 1), raised, start
    )
    low = jax.lax.bitcast_convert_type(low, jnp.float32)
    rows, features, counts = entries_from(z, low, limit=limit)
    values = jnp.where(jnp.arange(limit) < counts.sum(), z[rows, features], 0)
    # Too many to be listed are left only if the n-th and many others equal the bound.
    return jnp.where(count > limit, low, _by_bits(values[:, None], n, axis=(0, 1)))


def keep_top_k(z: jax.Array, k: int, *, over_rows: bool = False) -> jax.Array:
    """Returns relu(z) [batch, width] with all but each row's k largest values zeroed.

    Values equal to the k-th are all kept, so L0 can exceed k.

    Args:
      over_rows: keep the batch * k largest values of the batch instead.
    """
    z = jax.nn.relu(z)
    if k >= z.shape[1]:
        return z
    fixed = jax.lax.stop_gradient(z)
    threshold = nth_largest(fixed, k * len(z)) if over_rows else kth_largest(fixed, k)[:, None]
    return jnp.where(z < threshold, 0.0, z)  # NaN stays


def entries_from(
    z: jax.Array, threshold: jax.Array, *, limit: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the positions where z [batch, width] is positive and reaches the threshold.

    Args:
      threshold: of all rows [], or of each [batch].
      limit: entries at most; the last rows lose the rest.

    Returns:
      int32 rows and columns [limit], row by row and rising along each (after the last entry any
      that exist), and the number of entries of each row [batch].
    """
    batch, width = z.shape
    size = _group_size(width, limit=MASK)
    low = jnp.maximum(bits_of(jnp.broadcast_to(threshold, (batch,))), 1)
    reached = (bits_of(z) >= low[:, None]).reshape(batch, width // size, size)
    bits = reached.astype(jnp.uint32) << jnp.arange(size, dtype=jnp.uint32)[None, None, :]
    masks = jnp.sum(bits, axis=2, dtype=jnp.uint32).reshape(-1)
    ends = jnp.minimum(jnp.cumsum(jax.lax.population_count(masks).astype(jnp.int32)), limit)
    counts = jnp.diff(ends, prepend=0)
    group = jnp.repeat(jnp.arange(len(masks)), counts, total_repeat_length=limit)
    # Each entry finds its own bit in its group's mask: the lower or the upper half, and so on.
    mask, nth = masks[group], jnp.arange(limit) - (ends - counts)[group]
    position, half = jnp.zeros(limit, jnp.int32), size // 2
    while half:
        below = jax.lax.population_count(mask & jnp.uint32(2**half - 1)).astype(jnp.int32)
        upper = nth >= below
        position, nth = position + jnp.where(upper, half, 0), nth - jnp.where(upper, below, 0)
        mask, half = jnp.where(upper, mask >> half, mask), half // 2
    groups = width // size  # of a row
    columns = group % groups * size + position
    return group // groups, columns, counts.reshape(batch, groups).sum(axis=1)


def _by_top_k(k: int):
    """The k-th largest value [batch] of each row [batch, width], by accelerators' top k.

    Members' rows as one array: under vmap compilers would sort them whole.
    """

    @jax.custom_batching.custom_vmap
    def least(z):
        return jax.lax.top_k(z, k)[0][:, -1]

    least.def_vmap(lambda n, batched, z: (least(z.reshape(-1, z.shape[-1])).reshape(n, -1), True))
    return least


def _by_bits(z: jax.Array, k: int, *, axis: int | tuple[int, ...] = 1, bits=BITS) -> jax.Array:
    """The k-th largest of relu(z) along ``axis``, by halving the range of integers.

    Several times faster than a sort on CPU. With fewer leading ``bits`` it is a lower bound.
    """

    def halve(i, low):
        candidate = low | (jnp.int32(1) << (BITS - 1 - i))
        count = _count(bits_of(z) >= candidate)
        count = count if axis == 1 else count.sum(axis=0, keepdims=True)
        return jnp.where(count >= k, candidate, low)

    low = jax.lax.fori_loop(0, bits, halve, jnp.zeros((len(z) if axis == 1 else 1, 1), jnp.int32))
    return jax.lax.bitcast_convert_type(jnp.squeeze(low, axis), jnp.float32)


def _by_digits(z: jax.Array, n: int) -> jax.Array:
    """The n-th largest [] of relu(z) [batch, width], a digit of ``DIGIT`` bits a pass over z.

    A pass counts in one reduction what reaches each value of the digit.
    """
    # Row by row, else products that follow have z transposed, to which GPUs add no bias at once.
    low = jnp.int32(0)
    z = on_own_rows(lambda z: with_layout_constraint(z, Layout((0, 1))), z)
    for shift in reversed(range(0, BITS, DIGIT)):
        candidates = low + (jnp.arange(1, 2 ** min(DIGIT, BITS - shift)) << shift)
        reached = [(bits_of(z) >= candidate).astype(jnp.int32) for candidate in candidates]
        zeros, add = [jnp.int32(0)] * len(reached), partial(jax.tree.map, jnp.add)
        of_rows = jnp.stack(jax.lax.reduce(reached, zeros, add, (1,)))
        counts = jnp.sum(of_rows, axis=1)  # stacked: devices exchange them once
        low = low + (jnp.sum(counts >= n, dtype=jnp.int32) << shift)
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _count(chosen: jax.Array) -> jax.Array:
    # In two turns, the first of vectors: XLA's CPU backend materialises what it sums along a row in
    # one. The barrier keeps the two apart.
    batch, width = chosen.shape
    size = _group_size(width, limit=MASK)
    parts = jnp.sum(chosen.reshape(batch, size, width // size), axis=1, dtype=jnp.int32)
    return jnp.sum(jax.lax.optimization_barrier(parts), axis=1, keepdims=True)


def _group_size(width: int, *, limit: int) -> int:
    size = 1
    while width % (2 * size) == 0 and 2 * size <= limit:
        size *= 2
    return size
