"""Takes measurements, one file each, and writes them down as they come."""

import importlib
import os
import platform
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
UNITS = {"seconds": "s", "memory": "B"}
COLUMNS = {
    "seconds": "time",
    "memory": "memory",
    "per_s": "a second",
    "ratio": "ratio",
    "cpu_ratio": "of CPU time",
}


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
    names, package = config.benchmarks or measurements(), f"{__package__}.measurements"
    modules = {name: importlib.import_module(f"{package}.{name}") for name in names}
    sized = {name: m for name, m in modules.items() if config.suite in m.SIZES}
    for name in config.benchmarks:
        if name not in sized:
            suites = ", ".join(modules[name].SIZES)
            raise UserError(f"{name} has no sizes for suite={config.suite}, only for {suites}.")
    rows, failed = [], {}
    outcome = {"machine": describe(), "suite": config.suite, "rows": rows, "failed": failed}
    print(heading(outcome))
    for name, module in sized.items():
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
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return device_figures() | {
        "processor": names[0] if names else platform.processor(),
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

    def cell(row: dict, key: str) -> str:
        value = row.get(key)
        if value is None:
            return "–"
        if key in UNITS or key == "per_s":
            return si(value) + (UNITS.get(key) or row["unit"])
        low, high = row["ratio_low"], row["ratio_high"]
        return f"{value:.2f}" + (f" [{low:.2f}, {high:.2f}]" if key == "ratio" else "")

    made = []
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        chosen = [row for row in rows if row["benchmark"] == name]
        columns = {k: v for k, v in COLUMNS.items() if any(k in row for row in chosen)}
        lines = [
            {
                "case": row["case"],
                "contender": f"{row['contender']} {row.get('version', '')}".strip(),
            }
            | {title: cell(row, key) for key, title in columns.items()}
            for row in chosen
        ]
        made.append(table(name, lines))
    return made


def si(value: float) -> str:
    """Returns a number with three digits and the prefix of its size, as in ``1.23 G``."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value / 1e-6:.3g} µ"
