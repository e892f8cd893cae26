"""One training step of a topk dictionary with each kind of products of its sparse code."""

from collections.abc import Iterator

from crossdict_jax.benchmark import workloads
from crossdict_jax.benchmark.harness import Bench

GPU = {"d_model": 1024, "k": 32, "batch_size": 4096, "rows": 65_536}
# Suite: (sizes, widths, the dtype of products' inputs, steps in one measurement).
SIZES = {"gpu": (GPU, (4096, 16_384, 65_536), "bfloat16", 20)}
REFERENCE = "dense"


def benchmark(bench: Bench) -> Iterator[dict]:
    """Yields rows: every width with each kind of products."""
    sizes, widths, dtype, steps = SIZES[bench.suite]
    workloads.made_up_store(bench.folder, sizes["rows"], sizes["d_model"], seed=bench.seed)
    sae = {name: sizes[name] for name in ("k", "batch_size")} | {"matmul_dtype": dtype}
    for width in widths:
        contenders = {
            name: workloads.dictionary_steps(
                bench.folder, longest=steps, width=width, products=name, **sae
            ).run
            for name in (REFERENCE, "lists", "kernels")
        }
        case, rows = f"width {width:,}", steps * sizes["batch_size"]
        yield from bench.compare(case, contenders, rows, count=steps, reference=REFERENCE)
