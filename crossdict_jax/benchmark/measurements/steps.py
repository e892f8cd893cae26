"""One training step of a dictionary: ours, through the loop, beside three other libraries'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossdict_jax.benchmark import workloads
from crossdict_jax.benchmark.harness import Bench
from crossdict_jax.benchmark.peer import contest, peers
from crossdict_jax.training.loop import epoch_order

PEERS = {  # library: its file
    "sae-lens": "saelens_steps.py",
    "sparsify": "sparsify_steps.py",
    "dictionary_learning": "dictionary_learning_steps.py",
}
ALONE = {"sparsify": ("topk",)}  # what a library can train where that is not everything


@dataclass(frozen=True)
class Sizes:
    """Of GPT-2 Small's residual stream, with eight features a dimension."""

    architectures: tuple[str, ...] = ("relu", "topk", "batchtopk", "jumprelu")  # that all have
    d_model: int = 768
    width: int = 6144
    k: int = 32  # active features a row
    batch_size: int = 4096  # the default of other libraries
    rows: int = 16_384  # of the store
    matmul_dtype: str = "float32"  # of our products' inputs; others: float32
    steps: int = 1  # in one measurement: seconds, on two cores


SIZES = {
    "cpu": Sizes(),
    "gpu": Sizes(  # of GPT-2 Medium; enough work for 20 steps to last as long as a dispatch
        d_model=1024, width=32_768, batch_size=8192, rows=65_536, matmul_dtype="bfloat16", steps=20
    ),
}


def benchmark(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields rows: each architecture against every peer."""
    sizes, folder = SIZES[bench.suite], bench.folder
    store = workloads.made_up_store(folder, sizes.rows, sizes.d_model, seed=bench.seed)
    # For the peers: the same rows in the same order.
    x = store.read(workloads.MODEL, workloads.SITE, store.select("train"))
    batches = len(x) // sizes.batch_size
    order = epoch_order(0, start=0, count=batches * sizes.batch_size, n=len(x))
    np.save(folder / "rows.npy", x.astype(np.float32))
    np.save(folder / "order.npy", order.reshape(batches, -1))
    with peers(PEERS) as running:
        for name in sizes.architectures:
            shape = {"architecture": name, "width": sizes.width, "k": sizes.k}
            ours = shape | {"batch_size": sizes.batch_size, "matmul_dtype": sizes.matmul_dtype}
            able = [p for p in PEERS if name in ALONE.get(p, sizes.architectures)]
            theirs, rows = dict.fromkeys(able, shape), sizes.steps * sizes.batch_size
            yield from contest(
                bench, name, "dictionary_steps", ours, running, theirs, rows, count=sizes.steps
            )
