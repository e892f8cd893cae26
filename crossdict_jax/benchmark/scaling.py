"""How the cost of a training step grows with width, d, k, batch, members and the store's size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossdict_jax.benchmark import steps
from crossdict_jax.benchmark.harness import OURS, alternate, compared
from crossdict_jax.benchmark.rows import make_store
from crossdict_jax.benchmark_config import BenchmarkConfig, ScalingBenchmark
from crossdict_jax.config import SAEConfig

BASE = "base"
GROWING = {  # what grows: the setting that holds its values, and the setting that they are of
    "width": ("widths", "width"),
    "d_model": ("d_models", "d_model"),
    "k": ("ks", "k"),
    "batch": ("batch_sizes", "batch_size"),
    "members": ("members", "seeds"),
    "store rows": ("store_rows", "rows"),
}


def benchmark(config: BenchmarkConfig, folder: Path, ceilings: dict) -> Iterator[dict[str, Any]]:
    """Yields a row per point: one thing differs from the base, with which the point takes turns.

    The ratio is of its seconds for a step to those of the base; rows of all members count.
    """
    own = config.scaling
    base = _training(own, folder, seed=config.seed)
    for case, changed, resident in _points(own):
        point = _training(own, folder, seed=config.seed, resident=resident, **changed)
        sae, d_model = _settings(own, **changed)
        need = steps.need(sae, d_model, steps=own.steps, count=sae.seeds)
        contenders = {
            BASE: lambda: base.run(own.steps),
            OURS: lambda point=point: point.run(own.steps),
        }
        spent = alternate(contenders, repeats=config.repeats)
        rows = compared("scaling", case, spent, need, ceilings=ceilings, reference=BASE)
        yield next(row for row in rows if row["contender"] == OURS)
        del point, contenders  # their memory, before the next is made


def _points(own: ScalingBenchmark) -> Iterator[tuple[str, dict[str, int], bool]]:
    """Yields (case, what differs from the base, whether rows are on the device)."""
    for what, (values, setting) in GROWING.items():
        for value in getattr(own, values):
            yield f"{what} {value:,}", {setting: value}, True
    for value in own.store_rows:
        yield f"store rows {value:,}, on the host", {"rows": value}, False


def _settings(own: ScalingBenchmark, **changed: int) -> tuple[SAEConfig, int]:
    """The settings of a point, and its d_model."""
    named = {name: changed.get(name, getattr(own, name)) for name in ("width", "k", "batch_size")}
    sae = SAEConfig(
        architecture=own.architecture,
        steps=steps.MANY,
        seeds=changed.get("seeds", 1),
        matmul_dtype=own.matmul_dtype,
        **named,
    )
    return dataclasses.replace(sae, k=min(sae.k, sae.width)), changed.get("d_model", own.d_model)


def _training(
    own: ScalingBenchmark, folder: Path, *, seed: int, resident: bool = True, **changed: int
) -> steps.Steps:
    sae, d_model = _settings(own, **changed)
    rows = max(changed.get("rows", own.rows), sae.batch_size)
    place = folder / f"{rows}-rows-of-{d_model}"
    store = make_store(place, rows, d_model, seed=seed)
    return steps.dictionary_steps(sae, store, resident=resident, most=own.steps)
