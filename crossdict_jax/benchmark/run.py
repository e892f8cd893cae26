"""Takes the measurements that are asked for, one file each, and writes them down as they come."""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax

from crossdict_jax.benchmark import machine, table
from crossdict_jax.benchmark_config import BenchmarkConfig
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import Workdir, write_json, write_text


def run_benchmarks(config: BenchmarkConfig, work: Workdir) -> dict[str, Any]:
    """Measures anew what ``config.benchmarks`` names, and returns what benchmark.json then holds.

    results/benchmark.json holds the machine, its ceilings, a row per contender, and what failed;
    results/benchmark.md the same as tables. Both are written after every row, so that whatever
    ends a run leaves the rows before. A measurement that fails does not keep the others from being
    taken.

    Raises:
      UserError: at the end, if any has failed.
    """
    # Contenders in other processes need room on the device too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = {"machine": machine.describe()}
    found["ceilings"] = machine.ceilings(config.ceilings, repeats=config.repeats)
    found |= {"rows": [], "failed": {}}
    print(table.heading(found))
    for name in config.benchmarks:
        try:
            for row in _rows(name, config, work, found["ceilings"]):
                found["rows"].append(row)
                _write(work, found)
        except (UserError, jax.errors.JaxRuntimeError) as error:  # such as no memory for a width
            found["failed"][name] = str(error).splitlines()[0]
            _write(work, found)
        if rows := [row for row in found["rows"] if row["benchmark"] == name]:
            print(table.text(rows), flush=True)
    if found["failed"]:
        raise UserError("; ".join(f"{name} failed: {why}" for name, why in found["failed"].items()))
    return found


def _rows(
    name: str, config: BenchmarkConfig, work: Workdir, ceilings: dict
) -> Iterator[dict[str, Any]]:
    """Yields the rows of one measurement as they come."""
    module = importlib.import_module(f"crossdict_jax.benchmark.{name}")
    folder = work.root / "benchmark" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"{name}: {module.__doc__.splitlines()[0]}", flush=True)
    started = time.perf_counter()
    yield from module.benchmark(config, folder, ceilings)
    print(f"{name}: done in {time.perf_counter() - started:.0f} s")
    shutil.rmtree(folder)


def _write(work: Workdir, found: dict[str, Any]) -> None:
    write_json(work.result("benchmark.json"), found)
    write_text(work.result("benchmark.md"), table.markdown(found))
