"""Reading the store: all rows of a site, in order and shuffled, beside a copy in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crossdict_jax.activations.store import open_store
from crossdict_jax.benchmark.harness import OURS, Need, alternate, compared, timed
from crossdict_jax.benchmark.rows import MODEL, SITE, make_store
from crossdict_jax.benchmark_config import BenchmarkConfig

COPY = "numpy copy"


def benchmark(config: BenchmarkConfig, folder: Path, ceilings: dict) -> Iterator[dict[str, Any]]:
    """Yields rows: as training reads it, verified anew, and in random order.

    The files are in the page cache. The ratio is of the copy's time to ours: 1 is as fast.
    """
    own = config.store
    store = make_store(folder, own.rows, own.d_model, seed=config.seed)
    rows = store.select("train")
    shuffled = np.random.default_rng(config.seed).permutation(rows)
    x = store.read(MODEL, SITE, rows)
    need = Need(x.nbytes, "B", bytes=2 * x.nbytes)
    cases = {
        "in order": lambda: store.read(MODEL, SITE, rows),
        "in order, checksums": lambda: open_store(folder).read(MODEL, SITE, rows),
        "shuffled": lambda: store.read(MODEL, SITE, shuffled),
    }
    for case, read in cases.items():
        contenders = {OURS: lambda read=read: timed(read), COPY: lambda: timed(x.copy)}
        spent = alternate(contenders, repeats=config.repeats)
        yield from compared("store", case, spent, need, ceilings={"copy": ceilings["host_copy"]})
