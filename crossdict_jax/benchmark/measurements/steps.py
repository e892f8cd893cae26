"""One training step of a dictionary: ours, through the loop, beside three other libraries'."""

from collections.abc import Iterator

from crossdict_jax.benchmark import workloads
from crossdict_jax.benchmark.harness import Bench
from crossdict_jax.benchmark.peer import contest, peers, save_rows

PEERS = {  # library: its file
    "sae-lens": "saelens.py",
    "sparsify": "sparsify_steps.py",
    "dictionary_learning": "dictionary_learning_steps.py",
}
ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu")  # that all have
ALONE = {"sparsify": ("topk",)}  # what a library can train if not all
# GPT-2 Small's residual stream, eight features a dimension, the batch of other libraries.
CPU = {"d_model": 768, "width": 6144, "k": 32, "batch_size": 4096, "rows": 16_384}
GPU = CPU | {"d_model": 1024, "width": 32_768, "batch_size": 8192, "rows": 65_536}
# Suite: (sizes, the dtype of our products' inputs, steps in one measurement, which on a GPU must
# last longer than a dispatch).
SIZES = {"cpu": (CPU, "float32", 1), "gpu": (GPU, "bfloat16", 20)}


def benchmark(bench: Bench) -> Iterator[dict]:
    """Yields rows: each architecture against every peer."""
    (sizes, dtype, steps), folder = SIZES[bench.suite], bench.folder
    store = workloads.made_up_store(folder, sizes["rows"], sizes["d_model"], seed=bench.seed)
    batch_size = sizes["batch_size"]
    x = store.read(workloads.MODEL, workloads.SITE, store.select("train"))
    save_rows(folder, x, steps=len(x) // batch_size, batch_size=batch_size)
    with peers(PEERS) as running:
        for name in ARCHITECTURES:
            shape = {"architecture": name, "width": sizes["width"], "k": sizes["k"]}
            ours = shape | {"batch_size": batch_size, "matmul_dtype": dtype}
            theirs = {p: shape for p in PEERS if name in ALONE.get(p, ARCHITECTURES)}
            amount = steps * batch_size
            yield from contest(
                bench, name, "dictionary_steps", ours, running, theirs, amount, count=steps
            )
