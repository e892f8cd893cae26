"""Made-up activations in a real store: sparse sums of directions, and noise."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from crossdict_jax.activations.store import (
    Rows,
    Store,
    WindowTable,
    digest,
    open_store,
    save_rows,
    save_table,
    shard_name,
)
from crossdict_jax.models import Site
from crossdict_jax.workdir import write_json

MODEL, SITE = "made-up", Site(0)
DIRECTIONS, SHARE, NOISE = 512, 0.05, 0.1  # how many, how often one is there, noise per direction
SHARD_ROWS = 16_384


def made_up_rows(n: int, d_model: int, *, seed: int) -> np.ndarray:
    """Returns bfloat16 rows [n, d_model] with about 26 of 512 directions each."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(DIRECTIONS, d_model)).astype(np.float32) / d_model**0.5
    parts = []
    for start in range(0, n, SHARD_ROWS):
        size = min(SHARD_ROWS, n - start)
        there = rng.random((size, DIRECTIONS), np.float32) < SHARE
        codes = there * rng.standard_exponential((size, DIRECTIONS), np.float32)
        noise = NOISE * rng.standard_normal((size, d_model), np.float32)
        parts.append((codes @ directions + noise).astype(ml_dtypes.bfloat16))
    return np.concatenate(parts)


def make_store(directory: Path, n: int, d_model: int, *, seed: int) -> Store:
    """Writes n training rows of one model and site as a store, and opens it."""
    starts = [*range(0, n, SHARD_ROWS), n]
    x = made_up_rows(n, d_model, seed=seed)
    names = [shard_name(MODEL, str(SITE), i) for i in range(len(starts) - 1)]
    for name, start, stop in zip(names, starts, starts[1:]):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(directory / name, x[start:stop].view(np.uint16))
    zeros = np.zeros(n, np.int32)
    column = zeros[:, None]
    save_rows(
        directory / "rows.npz",
        Rows(zeros, zeros, zeros, column, column, zeros.astype(np.int8), np.ones(n, bool)),
    )
    nothing = np.zeros(0, np.int32)
    save_table(directory / "windows.npz", WindowTable(nothing, (np.zeros(1, int),), (nothing,)))
    names += ["rows.npz", "windows.npz"]
    about = {"path": "", "d_model": d_model, "bos": None, "sites": [str(SITE)]}
    meta = {
        "models": {MODEL: about},
        "rows": n,
        "dtype": "bfloat16",
        "shard_starts": starts,
        "documents": [MODEL],
        "text": {},
        "checksums": {name: digest(directory / name) for name in names},
    }
    write_json(directory / "meta.json", meta)
    return open_store(directory)
