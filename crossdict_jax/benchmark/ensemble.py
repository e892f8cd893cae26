"""Several dictionaries in one step, beside the same one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossdict_jax.benchmark import steps
from crossdict_jax.benchmark.harness import OURS, alternate, compared, timed
from crossdict_jax.benchmark.rows import make_store
from crossdict_jax.benchmark_config import BenchmarkConfig
from crossdict_jax.config import SAEConfig

ALONE = "one after another"


def benchmark(config: BenchmarkConfig, folder: Path, ceilings: dict) -> Iterator[dict[str, Any]]:
    """Yields two rows; the rows of all members count."""
    own = config.ensemble
    store = make_store(folder, own.rows, own.d_model, seed=config.seed)
    shape = {name: getattr(own, name) for name in ("width", "k", "batch_size", "matmul_dtype")}
    one = SAEConfig(architecture=own.architecture, steps=steps.MANY, **shape)
    all_ = dataclasses.replace(one, seeds=own.members)
    together, alone = (steps.dictionary_steps(sae, store) for sae in (all_, one))
    contenders = {
        OURS: lambda: together.run(own.steps),
        ALONE: lambda: timed(lambda: [alone.run(own.steps) for _ in range(own.members)]),
    }
    spent = alternate(contenders, repeats=config.repeats)
    need = steps.need(one, own.d_model, steps=own.steps, count=own.members)
    case = f"{own.members} of width {own.width:,}"
    yield from compared("ensemble", case, spent, need, ceilings=ceilings)
