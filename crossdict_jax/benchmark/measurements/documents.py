"""Memory of extraction against the number of documents: what is read is not kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crossdict_jax.activations.extract import extract
from crossdict_jax.benchmark.harness import OURS, Bench, apart
from crossdict_jax.config import Config, ExtractConfig, TextConfig, to_dict
from crossdict_jax.models import EMBEDDED
from crossdict_jax.workdir import open_workdir, write_text

# Documents of 600 bytes: 200 windows, which the first shards and batches of 8 are filled by; then
# ten and a hundred times as many.
SIZES = dict.fromkeys(("cpu", "gpu"), (200, 2000, 20_000))
BYTES = 600
WORDS = 400  # different ones, of which made-up text is


def benchmark(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields a row per number of documents, each read in a fresh process.

    ``memory`` is all that the process held, Python, JAX and what was compiled among it; ``ratio``
    is to the first; ``growth`` is in bytes a row, of the rows that the one before had not.
    """
    rng = np.random.default_rng(bench.seed)
    letters = np.asarray(list("etaoinshrdlu"))
    words = ["".join(rng.choice(letters, n)) for n in rng.integers(2, 9, WORDS)]
    first = before = None
    for documents in SIZES[bench.suite]:
        folder = bench.folder / str(documents)
        texts = (" ".join(rng.choice(words, BYTES // 3))[: BYTES - 1] for _ in range(documents))
        write_text(folder / "text.txt", ".\n\n".join(texts) + ".\n")
        rows, memory = apart(extract_text, folder, documents)
        case = f"{documents:,} documents of {BYTES} bytes, {rows:,} rows"
        row = {"benchmark": bench.name, "case": case, "contender": OURS, "rows": rows}
        row |= {"memory": memory, "ratio": memory / (first or memory)}
        row["growth"] = before and (memory - before["memory"]) / (rows - before["rows"])
        first, before = first or memory, row
        yield row


def extract_text(folder: Path, documents: int) -> int:
    """Reads the text with the embedded models; returns the number of rows."""
    text = TextConfig(source=str(folder / "text.txt"), documents=documents, max_bytes=BYTES)
    text.validation_fraction = text.test_fraction = 0.3  # no split without any of a few documents
    extract_config = ExtractConfig(batch_size=8)
    # A low layer: it is memory that is measured.
    config = Config(models=EMBEDDED, layers=(2,), text=text, extract=extract_config)
    return extract(config, open_workdir(folder / "run", to_dict(config))).meta["rows"]
