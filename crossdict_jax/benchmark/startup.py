"""Starting a command: its help beside Python's own start, and a run with and without the cache."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossdict_jax.benchmark.harness import Need, Spent, alternate, compared
from crossdict_jax.benchmark.rows import make_store
from crossdict_jax.benchmark_config import BenchmarkConfig
from crossdict_jax.config import Config, SAEConfig, to_dict
from crossdict_jax.workdir import Workdir, write_json

ROOT = Path(__file__).parents[2]
HELP, BARE = "train_saes --help", "python -c pass"
FIRST, AGAIN = "first run", "with compiled programs kept"
SETTINGS = Config(
    models=("a", "b"),  # never read: the store is there
    controls=(),
    sae=SAEConfig(width=256, k=8, steps=1, batch_size=64),
)


def benchmark(config: BenchmarkConfig, folder: Path, ceilings: dict) -> Iterator[dict[str, Any]]:
    """Yields rows: ``--help``, then one training step from the command line to the checkpoint.

    The ratio of the second is of a run that compiles everything to one that finds it compiled.
    """
    helps = {HELP: ["-m", "launch.train_saes", "--help"], BARE: ["-c", "pass"]}
    contenders = {name: lambda a=a: command(a, folder / "kept") for name, a in helps.items()}
    spent = alternate(contenders, repeats=config.repeats)
    yield from compared("startup", "help", spent, Need(1, "runs"), ceilings={}, reference=BARE)
    make_store(folder / "store", 256, 32, seed=config.seed)
    numbers = itertools.count()

    def first() -> Spent:
        shutil.rmtree(folder / "empty", ignore_errors=True)
        return train_once(folder, f"run-{next(numbers)}", cache=folder / "empty")

    def again() -> Spent:
        return train_once(folder, f"run-{next(numbers)}", cache=folder / "kept")

    spent = alternate({FIRST: first, AGAIN: again}, repeats=config.repeats)
    need = Need(1, "runs")
    yield from compared("startup", "one step", spent, need, ceilings={}, reference=AGAIN)


def train_once(folder: Path, name: str, *, cache: Path) -> Spent:
    """Runs ``launch.train_saes`` for a step on the store of ``folder``, in a new work directory.

    Args:
      cache: where the command keeps compiled programs (and everything else that it keeps).
    """
    work = Workdir(folder / name)
    shutil.copytree(folder / "store", work.activations)
    write_json(work.root / "config.json", to_dict(SETTINGS))
    return command(["-m", "launch.train_saes", f"--workdir={work.root}"], cache)


def command(arguments: list[str], cache: Path) -> Spent:
    """Runs Python with arguments; returns what it took, from its start to its end."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(seconds, used)
