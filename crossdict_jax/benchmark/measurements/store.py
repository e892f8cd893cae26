"""Reading the store: all rows of a site, in order and shuffled, beside a copy in memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from crossdict_jax.activations.store import open_store
from crossdict_jax.benchmark.harness import OURS, Bench
from crossdict_jax.benchmark.workloads import MODEL, SITE, made_up_store

SIZES = {"cpu": (131_072, 768), "gpu": (524_288, 1024)}  # rows and d_model: larger than any cache


def benchmark(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields rows: as training reads it, verified anew, and in random order.

    The files are in the page cache. The ratio is of the copy's time to ours: 1 is as fast.
    """
    store = made_up_store(bench.folder, *SIZES[bench.suite], seed=bench.seed)
    rows = store.select("train")
    shuffled = np.random.default_rng(bench.seed).permutation(rows)
    x = store.read(MODEL, SITE, rows)
    cases = {
        "in order": lambda: store.read(MODEL, SITE, rows),
        "in order, checksums": lambda: open_store(bench.folder).read(MODEL, SITE, rows),
        "shuffled": lambda: store.read(MODEL, SITE, shuffled),
    }
    for case, read in cases.items():
        contenders = {OURS: lambda _, read=read: read(), "numpy copy": lambda _: x.copy()}
        yield from bench.compare(case, contenders, x.nbytes, "B")
