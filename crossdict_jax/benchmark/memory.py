"""Memory of a training: the most that was held, beside what is predicted at its start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossdict_jax.activations.store import open_store
from crossdict_jax.benchmark import steps
from crossdict_jax.benchmark.harness import apart, memory
from crossdict_jax.benchmark.rows import make_store
from crossdict_jax.benchmark_config import BenchmarkConfig
from crossdict_jax.config import SAEConfig
from crossdict_jax.dictionaries.train import member_bytes


def benchmark(config: BenchmarkConfig, folder: Path, ceilings: dict) -> Iterator[dict[str, Any]]:
    """Yields a row per width, each trained for two steps in a fresh process.

    ``memory`` is beyond what the process held before; on a CPU, compiling is part of it.
    ``ratio`` is of it to what is ``predicted``.
    """
    own = config.memory
    make_store(folder, own.batch_size, own.d_model, seed=config.seed)
    for width in own.widths:
        shape = {"width": width, "k": min(own.k, width), "batch_size": own.batch_size}
        sae = SAEConfig(architecture=own.architecture, steps=steps.MANY, **shape)
        before, most = apart(_train, sae, folder)
        predicted = member_bytes(sae, d_model=own.d_model, width=width)
        yield {
            "benchmark": "memory",
            "case": f"width {width:,}",
            "contender": "ours",
            "memory": most - before,
            "predicted": predicted,
            "ratio": (most - before) / predicted,
        }


def _train(sae: SAEConfig, folder: Path) -> int:
    """Trains for two steps; returns the bytes that were held before."""
    store, before = open_store(folder), memory()
    steps.dictionary_steps(sae, store).run(2)
    return before
