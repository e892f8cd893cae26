"""How the cost of a training step grows with width, d, k, batch, members and the store's size."""

import shutil
from collections.abc import Iterator

from crossdict_jax.benchmark import workloads
from crossdict_jax.benchmark.harness import OURS, Bench

# A topk dictionary of half of GPT-2 Medium's residual stream; on two cores, a step in a second.
CPU = {"d_model": 512, "width": 4096, "k": 32, "batch_size": 1024, "seeds": 1, "rows": 8192}
SIZES = {  # suite: (the base, the dtype of its products' inputs, steps in one measurement)
    "cpu": (CPU, "float32", 1),
    "gpu": (CPU | {"d_model": 1024, "batch_size": 4096, "rows": 65_536}, "bfloat16", 10),
}
POINTS = {  # differences from the base: smaller and larger by factors of about four
    "width": (1024, 8192, 32_768, 131_072),
    "d_model": (256, 1024, 2048),
    "k": (8, 128),
    "batch_size": (256, 4096),
    "seeds": (2, 6),  # dictionaries in one step
    "rows": (65_536, 524_288),  # of the store, on the device and on the host
}


def benchmark(bench: Bench) -> Iterator[dict]:
    """Yields a row per point, timed in turns with the base, from which one thing differs.

    The ratio is of seconds a step, the point's to the base's; rows of all members count.
    """
    sizes, dtype, steps = SIZES[bench.suite]

    def training(*, d_model: int, rows: int, resident: bool | None = None, **sae):
        """Returns the training of a point, on a store of its own."""
        folder = bench.folder / "store"
        shutil.rmtree(folder, ignore_errors=True)
        workloads.made_up_store(folder, rows, d_model, seed=bench.seed)
        sae |= {"resident": resident, "longest": steps, "matmul_dtype": dtype}
        return workloads.dictionary_steps(folder, **sae)

    base = training(**sizes)
    points = [(name, value, None) for name, values in POINTS.items() for value in values]
    points += [("rows", value, False) for value in POINTS["rows"]]
    for name, value, resident in points:
        point = sizes | {name: value}
        contenders = {"base": base.run, OURS: training(**point, resident=resident).run}
        case = f"{name} {value:,}" + (", on the host" if resident is False else "")
        rows = steps * point["seeds"] * point["batch_size"]
        yield bench.compare(case, contenders, rows, count=steps, reference="base")[1]
        del contenders  # frees memory for the next
