"""Memory of a training: the most that was held, beside what is predicted at its start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossdict_jax.activations.store import open_store
from crossdict_jax.benchmark import steps
from crossdict_jax.benchmark.harness import apart
from crossdict_jax.benchmark.rows import make_store
from crossdict_jax.benchmark_config import BenchmarkConfig
from crossdict_jax.config import SAEConfig
from crossdict_jax.dictionaries.train import member_bytes

LEAST_WIDTH = 64  # of the training that shows what Python, JAX and the rows take


def benchmark(config: BenchmarkConfig, folder: Path, ceilings: dict) -> Iterator[dict[str, Any]]:
    """Yields a row per width, each trained for two steps in a fresh process.

    ``memory`` is beyond that of a width of 64; ``ratio`` is of it to what is ``predicted``.
    """
    own = config.memory
    make_store(folder, own.batch_size, own.d_model, seed=config.seed)

    def settings(width: int) -> SAEConfig:
        shape = {"width": width, "k": min(own.k, width), "batch_size": own.batch_size}
        return SAEConfig(architecture=own.architecture, steps=steps.MANY, **shape)

    _, least = apart(_train, settings(LEAST_WIDTH), folder)
    few = member_bytes(settings(LEAST_WIDTH), d_model=own.d_model, width=LEAST_WIDTH)
    for width in own.widths:
        _, most = apart(_train, settings(width), folder)
        predicted = member_bytes(settings(width), d_model=own.d_model, width=width) - few
        yield {
            "benchmark": "memory",
            "case": f"width {width:,}",
            "contender": "ours",
            "memory": most - least,
            "predicted": predicted,
            "ratio": (most - least) / predicted,
        }


def _train(sae: SAEConfig, folder: Path) -> None:
    steps.dictionary_steps(sae, open_store(folder)).run(2)
