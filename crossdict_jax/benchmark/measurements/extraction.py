"""Reading layers of a language model: ours beside torch, the whole model and cut short."""

from collections.abc import Iterator

import numpy as np

from crossdict_jax import models
from crossdict_jax.benchmark.harness import Bench
from crossdict_jax.benchmark.peer import contest, peers

KINDS = {"torch": False, "torch, cut short": True}  # only the layers below the highest one read
MODEL = models.known_config("openai-community/gpt2-medium")  # with random weights
LAYERS = [5, 6, 7]  # what the large preset reads
# Suite: windows of text, tokens of the longest, windows per forward, the dtype of our products'
# inputs (others: float32).
SIZES = {"cpu": (8, 256, 4, "float32"), "gpu": (1024, 256, 64, "bfloat16")}


def benchmark(bench: Bench) -> Iterator[dict]:
    """Yields rows: windows of equal length, then of mixed lengths, in the order of a text.

    All read the same tokens and layers with the same random weights. Ours sorts windows by length;
    every batch is as long as its longest.
    """
    n, longest, batch_size, dtype = SIZES[bench.suite]
    folder, rng = bench.folder, np.random.default_rng(bench.seed)
    lm = models.init(MODEL, seed=bench.seed)
    models.save(lm, folder / "model")
    mixed = rng.permutation(np.linspace(max(1, longest // 4), longest, n).astype(int))
    shared = {"layers": LAYERS, "batch_size": batch_size}
    ours = shared | {"matmul_dtype": dtype}
    theirs = {name: shared | {"cut": cut} for name, cut in KINDS.items()}
    with peers({name: "transformers_forward.py" for name in KINDS}) as running:
        for case, lengths in {"equal lengths": np.full(n, longest), "mixed lengths": mixed}.items():
            amount = int(lengths.sum())
            tokens = rng.integers(0, lm.config.vocab_size, amount)
            np.savez(folder / "windows.npz", tokens=tokens, lengths=lengths)
            yield from contest(bench, case, "Extraction", ours, running, theirs, amount, "tokens")
