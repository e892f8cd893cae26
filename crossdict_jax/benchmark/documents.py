"""Memory of extraction against the number of documents: what is read is not kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crossdict_jax.activations.extract import extract
from crossdict_jax.benchmark.harness import apart
from crossdict_jax.benchmark_config import BenchmarkConfig, DocumentBenchmark
from crossdict_jax.config import Config, EvaluationConfig, ExtractConfig, TextConfig, to_dict
from crossdict_jax.models import EMBEDDED
from crossdict_jax.workdir import open_workdir, write_text

WORDS = 400  # different ones, of which made-up text is


def benchmark(config: BenchmarkConfig, folder: Path, ceilings: dict) -> Iterator[dict[str, Any]]:
    """Yields a row per number of documents, each read in a fresh process.

    ``memory`` is all that the process held, Python, JAX and what was compiled among it; ``ratio``
    is to the first. ``index`` are the bytes of the files that tell where rows are and which tokens
    were read. From the second on, ``growth`` is in bytes a row and ``rows_per_s`` in rows
    a second, of the rows that the one before had not: starting and compiling are not in them.
    """
    own = config.documents
    first = before = None
    for times in own.times:
        count = times * own.documents
        place = folder / str(count)
        write_text(place / "text.txt", made_up_text(count, own.bytes, seed=config.seed))
        read, memory = apart(_extract, place, count, own)
        first, further = first or memory, further_than(before, read | {"memory": memory})
        before = read | {"memory": memory}
        yield {
            "benchmark": "documents",
            "case": f"{count:,} documents of {own.bytes:,} bytes, {read['rows']:,} rows",
            "contender": "ours",
            "memory": memory,
            "predicted": None,
            "ratio": memory / first,
            **read,
            **further,
        }


def further_than(before: dict | None, now: dict) -> dict[str, float | None]:
    """Returns what a row more cost, in bytes and in rows a second.

    None without one before, and where more rows took no longer.
    """
    if before is None:
        return {"growth": None, "rows_per_s": None}
    more = {name: now[name] - before[name] for name in ("memory", "rows", "seconds")}
    rate = more["rows"] / more["seconds"] if more["seconds"] > 0 else None
    return {"growth": more["memory"] / more["rows"], "rows_per_s": rate}


def made_up_text(documents: int, size: int, *, seed: int) -> str:
    """Returns so many documents of ``size`` bytes of made-up words, with blank lines between."""
    rng = np.random.default_rng(seed)
    letters = np.asarray(list("etaoinshrdlu"))
    words = ["".join(rng.choice(letters, n)) for n in rng.integers(2, 9, WORDS)]
    texts = (" ".join(rng.choice(words, size // 3))[: size - 1] + "." for _ in range(documents))
    return "\n\n".join(texts) + "\n"


def _extract(place: Path, documents: int, own: DocumentBenchmark) -> dict[str, float]:
    """Reads the text with the embedded models; returns rows, bytes of their index, and seconds."""
    config = settings(place, documents, own)
    started = time.perf_counter()
    store = extract(config, open_workdir(place / "run", to_dict(config)))
    seconds = time.perf_counter() - started
    index = sum((store.directory / name).stat().st_size for name in ("rows.npz", "windows.npz"))
    return {"rows": store.meta["rows"], "index": index, "seconds": seconds}


def settings(place: Path, documents: int, own: DocumentBenchmark) -> Config:
    """Returns the run that reads so many documents of the text in a folder."""
    return Config(
        models=EMBEDDED,
        layers=(2,),  # a low one: it is memory that is measured
        text=TextConfig(
            source=str(place / "text.txt"),
            documents=documents,
            max_bytes=own.bytes,
            validation_fraction=0.3,  # a few documents leave no split without any
            test_fraction=0.3,
        ),
        extract=ExtractConfig(batch_size=own.batch_size, shard_windows=own.shard_windows),
        evaluation=EvaluationConfig(pool=1),
    )
