"""Starting a command: its help beside Python's own start, and a run with and without the cache."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossdict_jax.benchmark.harness import Bench
from crossdict_jax.benchmark.workloads import made_up_store
from crossdict_jax.config import Config, SAEConfig, to_dict
from crossdict_jax.workdir import Workdir, write_json

ROOT = Path(__file__).parents[3]
SIZES = dict.fromkeys(("cpu", "gpu"), (256, 32))  # rows and d_model: it is the start that counts
SETTINGS = Config(
    models=("a", "b"),  # never read: the store is there
    controls=(),
    sae=SAEConfig(width=256, k=8, steps=1, batch_size=64),
)


def benchmark(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields rows: ``--help``, then one training step from the command line to the checkpoint.

    The ratio of the second is of a run that compiles everything to one that finds it compiled.
    """
    folder, bare = bench.folder, "python -c pass"
    contenders = {
        "train_saes --help": lambda _: command(["-m", "launch.train_saes", "--help"], folder),
        bare: lambda _: command(["-c", "pass"], folder),
    }
    yield from bench.compare("help", contenders, 1, "runs", reference=bare)
    made_up_store(folder / "store", *SIZES[bench.suite], seed=bench.seed)
    numbers, kept = itertools.count(), "with compiled programs kept"

    def first(_) -> None:
        shutil.rmtree(folder / "empty", ignore_errors=True)
        train_once(folder, f"run-{next(numbers)}", cache=folder / "empty")

    contenders = {
        "first run": first,
        kept: lambda _: train_once(folder, f"run-{next(numbers)}", cache=folder / "kept"),
    }
    yield from bench.compare("one step", contenders, 1, "runs", reference=kept)


def train_once(folder: Path, name: str, *, cache: Path) -> None:
    """Runs ``launch.train_saes`` for a step on the store of ``folder``, in a new work directory.

    Args:
      cache: where the command keeps compiled programs (and everything else that it keeps).
    """
    work = Workdir(folder / name)
    shutil.copytree(folder / "store", work.activations)
    write_json(work.root / "config.json", to_dict(SETTINGS))
    command(["-m", "launch.train_saes", f"--workdir={work.root}"], cache)


def command(arguments: list[str], cache: Path) -> None:
    """Runs Python with arguments to its end."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # which would be used in its place
    subprocess.run([sys.executable, *arguments], check=True, env=environment, capture_output=True)
