"""Takes measurements, one file each, and writes them down as they come."""

import importlib
import os
import platform
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import jax

from crossdict_jax.benchmark.harness import Bench
from crossdict_jax.config import BenchmarkConfig, measurements
from crossdict_jax.errors import UserError
from crossdict_jax.report.docs import commit, markdown
from crossdict_jax.report.tables import Table, show, table
from crossdict_jax.training.stage import device_figures
from crossdict_jax.workdir import Workdir, write_json, write_text

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")
PREFIXES = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: "", 1e-3: "m", 1e-6: "µ"}


def run_benchmarks(config: BenchmarkConfig, work: Workdir) -> dict:
    """Measures anew what ``config.benchmarks`` names, and returns what benchmark.json then holds.

    A measurement is a file of ``measurements`` with ``SIZES`` by suite and ``benchmark(bench)``,
    which yields rows. benchmark.json and .md are written after every row; one that fails does not
    stop the others.

    Raises:
      UserError: a measurement has no sizes for the suite; or, at the end, one has failed.
    """
    # Contenders in other processes need room on the device too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    package, modules = f"{__package__}.measurements", {}
    for name in config.benchmarks or measurements():
        module = importlib.import_module(f"{package}.{name}")
        if config.suite in module.SIZES:
            modules[name] = module
        elif config.benchmarks:
            suites = ", ".join(module.SIZES)
            raise UserError(f"{name} has no sizes for suite={config.suite}, only for {suites}.")
    rows, failed = [], {}
    outcome = {"machine": describe(), "suite": config.suite, "rows": rows, "failed": failed}
    print(heading(outcome))
    for name, module in modules.items():
        folder = work.root / "benchmark" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(f"{name}: {module.__doc__.splitlines()[0]}", flush=True)
        bench = Bench(name, folder, config.suite, config.repeats, config.seed)
        try:
            for row in module.benchmark(bench):
                rows.append(row)
                _write(work, outcome)
        except (UserError, jax.errors.JaxRuntimeError) as error:  # such as no memory for a width
            failed[name] = str(error).splitlines()[0]
            _write(work, outcome)
        shutil.rmtree(folder)
        show(tables([row for row in rows if row["benchmark"] == name]))
    if failed:
        raise UserError("; ".join(f"{name} failed: {why}" for name, why in failed.items()))
    return outcome


def _write(work: Workdir, outcome: dict) -> None:
    write_json(work.result("benchmark.json"), outcome)
    parts = [f"**{t.caption}**\n\n{markdown(t)}" for t in tables(outcome["rows"])]
    write_text(work.result("benchmark.md"), "\n\n".join([heading(outcome), *parts]) + "\n")


def describe() -> dict:
    """Returns the device, the host, its load, versions, and the commit of this code."""
    info = Path("/proc/cpuinfo")
    named = re.search("model name.*: (.*)", info.read_text() if info.exists() else "")
    return device_figures() | {
        "processor": named[1] if named else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # processes that wanted to run in the last minute
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "commit": commit(Path(__file__).parent),
    }


def heading(outcome: dict) -> str:
    """Returns the machine and the versions in one paragraph."""
    about = outcome["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    return (
        f"{about['devices']} x {about['device']} ({about['processor']}, {about['cores']} cores, "
        f"load {about['load']:.1f}), Python {about['python']}, {versions}, commit "
        f"{about['commit']}, suite {outcome['suite']}."
    )


def tables(rows: list[dict]) -> list[Table]:
    """Returns a table for each benchmark, with the columns that some of its rows have."""
    cells = {  # key of a row: title, its text
        "seconds": ("time", lambda row: si(row["seconds"]) + "s"),
        "memory": ("memory", lambda row: si(row["memory"]) + "B"),
        "per_s": ("a second", lambda row: si(row["per_s"]) + row["unit"]),
        "ratio": ("ratio", "{ratio:.2f} [{ratio_low:.2f}, {ratio_high:.2f}]".format_map),
        "cpu_ratio": ("of CPU time", "{cpu_ratio:.2f}".format_map),
    }
    made = []
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        chosen, lines = [row for row in rows if row["benchmark"] == name], []
        columns = {key: cells[key] for key in cells if any(key in row for row in chosen)}
        for row in chosen:
            contender = f"{row['contender']} {row.get('version', '')}".strip()
            line = {
                title: text(row) if key in row else "–" for key, (title, text) in columns.items()
            }
            lines.append({"case": row["case"], "contender": contender} | line)
        made.append(table(name, lines))
    return made


def si(value: float) -> str:
    """Returns a number with three digits and the prefix of its size, as in ``1.23 G``."""
    size = next((size for size in PREFIXES if abs(value) >= size), 1e-6)
    return f"{value / size:.3g} {PREFIXES[size]}"
