"""One training step of the mlp map: ours, beside that of another checkout."""

from collections.abc import Iterator

from crossdict_jax.benchmark.harness import Bench
from crossdict_jax.benchmark.peer import contest, peers

# The large preset's, with 32 active features a row.
SHAPE = {"d_model": 1024, "width": 4096, "k": 32, "hidden": 512, "batch_size": 128}
SIZES = {"cpu": (SHAPE, 5), "gpu": (SHAPE, 50)}  # and the steps in one measurement


def benchmark(bench: Bench) -> Iterator[dict]:
    """Yields a row per contender; each encodes the rows itself."""
    shape, steps = SIZES[bench.suite]
    settings, rows = shape | {"seed": bench.seed}, steps * shape["batch_size"]
    case = f"{shape['width']} to {shape['width']}"
    with peers({}) as running:
        yield from contest(bench, case, "map_steps", settings, running, {}, rows, count=steps)
