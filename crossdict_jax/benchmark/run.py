"""Takes the measurements that are asked for, one file each, and writes them down as they come."""

from __future__ import annotations

import importlib
import os
import shutil
from typing import Any

from crossdict_jax.benchmark import machine, table
from crossdict_jax.benchmark_config import BenchmarkConfig
from crossdict_jax.workdir import Workdir, write_json, write_text


def run_benchmarks(config: BenchmarkConfig, work: Workdir) -> dict[str, Any]:
    """Measures anew what ``config.benchmarks`` names, and returns what benchmark.json then holds.

    results/benchmark.json holds the machine, its ceilings and a row per contender;
    results/benchmark.md the same as tables. Both are written after every measurement.
    """
    # Contenders in other processes need room on the device too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = {"machine": machine.describe()}
    found["ceilings"] = machine.ceilings(config.ceilings, repeats=config.repeats)
    found["rows"] = []
    print(table.heading(found))
    for name in config.benchmarks:
        rows = _measured(name, config, work, found["ceilings"])
        found["rows"] += rows
        write_json(work.result("benchmark.json"), found)
        write_text(work.result("benchmark.md"), table.markdown(found))
        print(table.text(rows), flush=True)
    return found


def _measured(name: str, config: BenchmarkConfig, work: Workdir, ceilings: dict) -> list[dict]:
    module = importlib.import_module(f"crossdict_jax.benchmark.{name}")
    folder = work.root / "benchmark" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"{name}: {module.__doc__.splitlines()[0]}", flush=True)
    rows = list(module.benchmark(config, folder, ceilings))
    shutil.rmtree(folder)
    return rows
