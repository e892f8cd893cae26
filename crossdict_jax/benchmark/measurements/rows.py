"""Rows that stay on the host: batches of a chunk of steps gathered and put on the device."""

import itertools
from collections.abc import Iterator

import jax
import ml_dtypes
import numpy as np

from crossdict_jax.benchmark.harness import OURS, Bench
from crossdict_jax.training.ensemble import Objective, Stream, make_ensemble
from crossdict_jax.training.loop import epoch_order

SIZES = {  # suite: rows, d_model, rows of a batch, steps of a chunk
    "cpu": (1_000_000, 1024, 4096, 10),
    "gpu": (8_000_000, 1024, 4096, 50),
}


def benchmark(bench: Bench) -> Iterator[dict]:
    """Yields bytes a second: as training does, and with every row looked up alone in one thread."""
    n, d_model, batch_size, steps = SIZES[bench.suite]
    rows = np.zeros((1, n, d_model), ml_dtypes.bfloat16)
    rows[...] = np.arange(n)[:, None] % 256  # or a page of zeros would be all that is read
    source, size = np.zeros(1, np.int64), batch_size * steps
    settings = {"seeds": [0], "batch_size": batch_size, "setting": "batch_size"}
    streams = {"x": Stream(rows, source)}
    feed = make_ensemble(
        Objective(), fixed={}, labels=["0"], streams=streams, resident=False, **settings
    ).feed
    first = itertools.count(step=steps)

    def alone(count: int) -> jax.Array:
        order = epoch_order(0, start=next(first) * batch_size, count=size, n=n)
        at = order.reshape(steps, 1, batch_size)
        return jax.device_put(rows.view(np.uint16)[source[:, None], at])

    contenders = {OURS: lambda count: feed.indices(next(first), steps), "rows alone": alone}
    yield from bench.compare("gather and send", contenders, 2 * d_model * size, "B")
