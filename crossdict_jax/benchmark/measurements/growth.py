"""The stages after training: seconds and memory, at more rows and wider dictionaries."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crossdict_jax.benchmark.harness import Bench, timed
from crossdict_jax.benchmark.workloads import made_up_rows
from crossdict_jax.config import EvaluationConfig, MapConfig
from crossdict_jax.dictionaries.base import build
from crossdict_jax.evaluation.matching import confirm, match
from crossdict_jax.evaluation.scoring import make_bench, score
from crossdict_jax.maps import Pairs, Problem, Side, map_class
from crossdict_jax.training.stage import free_memory

RESET = Path("/proc/self/clear_refs")  # of the largest memory; only on Linux
TOKENS, DOCUMENT = 5000, 200  # distinct tokens; rows of a document
D_MODEL, K, STEPS = 256, 32, 20  # the last: of the trained map
KINDS = ("token_ridge", "ridge_codes", "mlp")  # that read activations, codes, and are trained
WIDTHS = (1024, 4096, 16_384)
SIZES = dict.fromkeys(("cpu", "gpu"), ((10_000, 40_000, 160_000), WIDTHS))  # training rows, widths
WIDEST_CODES = 4096  # of ridge_codes, an eigendecomposition: four times as wide is 64 times as long


def benchmark(bench: Bench) -> Iterator[dict]:
    """Yields a row per stage and size, run once: what compiles counts.

    The first stage that reads features encodes them. Held-out rows, a fifth as many as training
    rows, are scored and confirm the matches.
    """
    sizes, widths = SIZES[bench.suite]
    for width, n in ((width, n) for width in widths for n in sizes):
        splits = _splits(n, width, bench.seed)
        problem = Problem("made-up", splits["train"], splits["validation"])
        config = MapConfig(steps=STEPS, batch_size=min(MapConfig().batch_size, n))
        options = {"seed": bench.seed, "directory": bench.folder / f"{width}-{n}"}
        stages: dict[str, Callable[[], Any]] = {
            f"fit {kind}": partial(map_class(kind).fit, [problem], config, **options)
            for kind in KINDS
            if kind != "ridge_codes" or width <= WIDEST_CODES
        }
        (fitted,) = map_class("mean").fit([problem], config)

        def scored(splits=splits, m=fitted.map):
            return score(m, make_bench(splits, EvaluationConfig(), seed=bench.seed))

        def matched(splits=splits):
            codes = [[p.source.codes, p.target.codes] for p in splits.values()]
            pairs = match(*codes[0])
            return confirm(pairs, *codes[2], documents=splits["test"].documents)

        for name, stage in (stages | {"score a map": scored, "match features": matched}).items():
            free_memory()
            if RESET.exists():
                RESET.write_text("5")  # the largest memory is what is held now
                held = _largest_memory()
            seconds = timed(lambda _, stage=stage: stage() and None, 1).seconds
            row = {"benchmark": bench.name, "case": f"width {width:,}, rows {n:,}"}
            row |= {"contender": name, "seconds": seconds, "unit": "rows", "per_s": n / seconds}
            yield row | ({"memory": _largest_memory() - held} if RESET.exists() else {})


def _splits(n: int, width: int, seed: int) -> dict[str, Pairs]:
    """Paired made-up rows, n of training, with random dictionaries."""
    rng, sides = np.random.default_rng(seed), []
    counts = {"train": n, "validation": n // 5, "test": n // 5}
    total, ends = sum(counts.values()), np.cumsum(list(counts.values()))
    tokens = (TOKENS * rng.random(total) ** 2).astype(np.int32)
    for key in (seed, seed + 1):
        d = build("topk", d_model=D_MODEL, width=width, k=K, key=jax.random.key(key))
        sides.append(Side(made_up_rows(total, D_MODEL, seed=key), tokens, d))
    pairs = Pairs(*sides, np.arange(total, dtype=np.int32) // DOCUMENT)
    starts = ends - list(counts.values())
    return {name: pairs.take(np.arange(a, b)) for name, a, b in zip(counts, starts, ends)}


def _largest_memory() -> float:
    """Returns the bytes that this process has held at most since ``RESET`` was written."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(s.split()[1]) for s in status if s.startswith("VmHWM"))
