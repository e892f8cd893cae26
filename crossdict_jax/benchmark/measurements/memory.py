"""Memory of a training: the most that was held, beside what is predicted at its start."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossdict_jax.benchmark import workloads
from crossdict_jax.benchmark.harness import OURS, Bench, apart, memory

# Suite: (d_model, batch, widths): the largest fill a laptop's memory, and a GPU's.
SIZES = {
    "cpu": (512, 1024, (4096, 16_384, 65_536)),
    "gpu": (1024, 4096, (4096, 32_768, 131_072)),
}
ARCHITECTURES = ("topk", "relu", "batchtopk")  # sparse, dense, and chosen over all rows
SMALL = 64  # features of the dictionary whose compilation is not counted


def benchmark(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields a row per architecture and width, each trained for two steps in a fresh process.

    ``predicted`` is what a training prints at its start; ``memory`` is beyond what the process held
    after training a small dictionary and compiling the large one. ``ratio`` is of it to
    ``predicted``.
    """
    d_model, batch_size, widths = SIZES[bench.suite]
    workloads.made_up_store(bench.folder, batch_size, d_model, seed=bench.seed)
    for architecture, width in itertools.product(ARCHITECTURES, widths):
        sae = {"architecture": architecture, "batch_size": batch_size}
        (before, predicted), peak = apart(train, bench.folder, width, sae)
        row = {"benchmark": bench.name, "case": f"{architecture}, width {width:,}"}
        row |= {"contender": OURS, "memory": peak - before, "predicted": predicted}
        yield row | {"ratio": (peak - before) / predicted}


def train(folder: Path, width: int, sae: dict) -> tuple[int, int]:
    """Trains for two steps; returns the bytes that are not the training's, and those predicted."""
    workloads.dictionary_steps(folder, width=SMALL, k=min(32, SMALL), **sae).run(2)
    before = memory()
    training = workloads.dictionary_steps(folder, width=width, k=min(32, width), **sae)
    begun = memory()
    predicted = training.memory()
    compiled = memory() - begun
    training.run(2)
    return before + compiled, predicted
