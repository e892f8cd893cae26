"""One training step of the mlp map: ours beside the loss in its direct form, on torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crossdict_jax.benchmark.harness import OURS, Need, alternate, compared
from crossdict_jax.benchmark.peer import Peer, absent
from crossdict_jax.benchmark.rows import made_up_rows
from crossdict_jax.benchmark.steps import MANY, Steps
from crossdict_jax.benchmark_config import BenchmarkConfig, MapBenchmark
from crossdict_jax.config import MapConfig
from crossdict_jax.dictionaries.base import build
from crossdict_jax.maps.base import Pairs, Problem, Side, encode_rows
from crossdict_jax.maps.ensemble import Ensemble
from crossdict_jax.maps.kinds.mlp import MLP

DIRECT = "correlations in full"
BATCHES = 8  # of training rows


def benchmark(config: BenchmarkConfig, folder: Path, ceilings: dict) -> Iterator[dict[str, Any]]:
    """Yields rows: our step, and one that builds both width x width correlation matrices.

    Ours is handed codes of both sides, the other features.
    """
    own = config.map
    pairs = _pairs(own, config.seed)
    settings = MapConfig(hidden=own.hidden, dropout=0.1, batch_size=own.batch_size, steps=MANY)
    # Validation is between the steps that are timed.
    settings.validate_every = MANY
    ensemble = Ensemble(MLP, [Problem("made-up", pairs, pairs)], settings, seed=config.seed)
    ours = Steps(ensemble.trainable(), ensemble.feed(), ensemble.by_member)
    contenders = {OURS: lambda: ours.run(own.steps)}
    about = {}
    with ExitStack() as stack:
        if line := absent("torch"):
            print(line)
        else:
            peer = stack.enter_context(Peer("torch", "direct_map.py"))
            sides = {"a": pairs.source, "b": pairs.target}
            features = {name: encode_rows(s.dictionary, s.x) for name, s in sides.items()}
            np.savez(folder / "features.npz", **features)
            how = {"hidden": own.hidden, "batch_size": own.batch_size}
            about[DIRECT] = peer.make(folder=str(folder), **how)
            contenders[DIRECT] = lambda: peer.run(own.steps)
        spent = alternate(contenders, repeats=config.repeats)
    case = f"{own.width} to {own.width}"
    yield from compared("map", case, spent, _need(own), ceilings=ceilings, about=about)


def _pairs(own: MapBenchmark, seed: int) -> Pairs:
    """Two sides of made-up rows, each with a random dictionary."""
    n = BATCHES * own.batch_size
    sides = [
        Side(
            x=made_up_rows(n, own.d_model, seed=seed + i),
            tokens=np.zeros(n, np.int32),
            dictionary=build(
                "topk",
                d_model=own.d_model,
                width=own.width,
                k=min(own.k, own.width),
                key=jax.random.key(seed + i),
            ),
        )
        for i in range(2)
    ]
    return Pairs(*sides, np.zeros(n, np.int32))


def _need(own: MapBenchmark) -> Need:
    """Forward and backward through the network, and the Gram products."""
    B, F, h = own.batch_size, own.width, own.hidden
    network = 6 * B * (F * h + h * h + h * F) - 2 * B * F * h  # no gradient for the inputs
    gram = 3 * 2 * B * B * F + 2 * 2 * B * B * F  # three products, two with a gradient
    parameters = 2 * F * h + h * h + 5 * h + F
    traffic = 4 * (8 * parameters + 6 * B * F)
    flops = network + gram
    return Need(own.steps * B, "rows", own.steps * flops, own.steps * traffic)
