"""Memory of a training: the most that was held, beside what is predicted at its start."""

from __future__ import annotations

import dataclasses
import itertools
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

SMALL = 64  # features of the dictionary whose compilation is not counted


def benchmark(config: BenchmarkConfig, folder: Path, ceilings: dict) -> Iterator[dict[str, Any]]:
    """Yields a row per architecture and width, each trained for two steps in a fresh process.

    ``predicted`` is what a training prints at its start. ``memory`` is beyond what the process held
    after training a small dictionary, without what compiling the large one left behind: on a CPU
    JAX and its compiler live in the same memory. ``ratio`` is of it to ``predicted``. ``bound`` is
    what ensembles are cut to size by.
    """
    own = config.memory
    make_store(folder, own.batch_size, own.d_model, seed=config.seed)
    for architecture, width in itertools.product(own.architectures, own.widths):
        shape = {"width": width, "k": min(own.k, width), "batch_size": own.batch_size}
        sae = SAEConfig(architecture=architecture, steps=steps.MANY, **shape)
        (before, predicted), most = apart(_train, sae, folder)
        memory = most - before
        yield {
            "benchmark": "memory",
            "case": f"{architecture}, width {width:,}",
            "contender": "ours",
            "memory": memory,
            "predicted": predicted,
            "ratio": memory / predicted,
            "bound": member_bytes(sae, d_model=own.d_model, width=width),
        }


def _train(sae: SAEConfig, folder: Path) -> tuple[int, int]:
    """Trains for two steps; returns the bytes that are not the training's, and those predicted."""
    store = open_store(folder)
    small = dataclasses.replace(sae, width=SMALL, k=min(sae.k, SMALL))
    steps.dictionary_steps(small, store).run(2)
    before = memory()
    training = steps.dictionary_steps(sae, store)
    begun = memory()
    predicted = training.memory()
    compiled = memory() - begun
    training.run(2)
    return before + compiled, predicted
