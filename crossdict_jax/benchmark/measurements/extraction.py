"""Reading layers of a language model: ours beside torch, the whole model and cut short."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossdict_jax import models
from crossdict_jax.benchmark.harness import Bench
from crossdict_jax.benchmark.peer import contest, peers

KINDS = {"torch": False, "torch, cut short": True}  # only the layers below the highest one read


@dataclass(frozen=True)
class Sizes:
    """A GPT-2 of GPT-2 Medium's sizes with random weights."""

    n_layers: int = 24
    d_model: int = 1024
    n_heads: int = 16
    vocab_size: int = 50_257
    layers: tuple[int, ...] = (5, 6, 7)  # what the large preset reads
    windows: int = 8  # of text: two batches, seconds on two cores
    window_tokens: int = 256  # of the longest
    batch_size: int = 4  # windows per forward
    matmul_dtype: str = "float32"  # of our products' inputs; others: float32


SIZES = {"cpu": Sizes(), "gpu": Sizes(windows=1024, batch_size=64, matmul_dtype="bfloat16")}


def benchmark(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields rows: windows of equal length, then of mixed lengths, in the order of a text.

    All read the same tokens with the same random weights and keep the same layers. Ours sorts
    windows by length; every batch is as long as its longest.
    """
    sizes, folder, rng = SIZES[bench.suite], bench.folder, np.random.default_rng(bench.seed)
    shape = {
        "model_type": "gpt2",
        "n_embd": sizes.d_model,
        "n_layer": sizes.n_layers,
        "n_head": sizes.n_heads,
        "n_positions": max(1024, sizes.window_tokens),
        "vocab_size": sizes.vocab_size,
    }
    lm = models.init(shape, seed=bench.seed)
    models.save(lm, folder / "model")
    longest, n = sizes.window_tokens, sizes.windows
    mixed = rng.permutation(np.linspace(max(1, longest // 4), longest, n).astype(int))
    shared = {"layers": list(sizes.layers), "batch_size": sizes.batch_size}
    ours = shared | {"matmul_dtype": sizes.matmul_dtype}
    theirs = {name: shared | {"cut": cut} for name, cut in KINDS.items()}
    with peers({name: "transformers_forward.py" for name in KINDS}) as running:
        for case, lengths in {"equal lengths": np.full(n, longest), "mixed lengths": mixed}.items():
            tokens = rng.integers(0, sizes.vocab_size, lengths.sum())
            np.savez(folder / "windows.npz", tokens=tokens, lengths=lengths)
            amount = int(lengths.sum())
            yield from contest(bench, case, "Extraction", ours, running, theirs, amount, "tokens")
