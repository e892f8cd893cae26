"""Memory of extraction against the number of documents: what is read is not kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crossdict_jax.activations.extract import extract
from crossdict_jax.benchmark.harness import apart
from crossdict_jax.benchmark_config import BenchmarkConfig
from crossdict_jax.config import Config, EvaluationConfig, TextConfig, to_dict
from crossdict_jax.models import EMBEDDED
from crossdict_jax.workdir import open_workdir, write_text

WORDS = 400  # different ones, of which made-up text is


def benchmark(config: BenchmarkConfig, folder: Path, ceilings: dict) -> Iterator[dict[str, Any]]:
    """Yields two rows: some documents, and many times as many, each in a fresh process.

    ``memory`` is all that the process held, Python and JAX among it; ``ratio`` is to the first.
    """
    own = config.documents
    counts = (own.documents, own.documents * own.times)
    first = None
    for count in counts:
        place = folder / str(count)
        write_text(place / "text.txt", made_up_text(count, own.bytes, seed=config.seed))
        rows, memory = apart(_extract, place, count, own.bytes)
        first = first or memory
        yield {
            "benchmark": "documents",
            "case": f"{count:,} documents of {own.bytes:,} bytes, {rows:,} rows",
            "contender": "ours",
            "memory": memory,
            "predicted": None,
            "ratio": memory / first,
        }


def made_up_text(documents: int, size: int, *, seed: int) -> str:
    """Returns so many documents of ``size`` bytes of made-up words, with blank lines between."""
    rng = np.random.default_rng(seed)
    letters = np.asarray(list("etaoinshrdlu"))
    words = ["".join(rng.choice(letters, n)) for n in rng.integers(2, 9, WORDS)]
    texts = (" ".join(rng.choice(words, size // 3))[: size - 1] + "." for _ in range(documents))
    return "\n\n".join(texts) + "\n"


def _extract(place: Path, documents: int, size: int) -> int:
    """Reads the text with the embedded models; returns the rows."""
    config = Config(
        models=EMBEDDED,
        layers=(2,),  # a low one: it is memory that is measured
        text=TextConfig(
            source=str(place / "text.txt"),
            documents=documents,
            max_bytes=size,
            validation_fraction=0.3,  # a few documents leave no split without any
            test_fraction=0.3,
        ),
        evaluation=EvaluationConfig(pool=1),
    )
    return len(extract(config, open_workdir(place / "run", to_dict(config))).rows)
