"""The gates: known answers, each a number with its bound, and how they are run."""

import importlib
import math
import operator
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from absl import logging

from crossdict_jax.config import VerifyConfig, gate_files
from crossdict_jax.report.tables import show
from crossdict_jax.report.terminal import gates_table
from crossdict_jax.workdir import Workdir, write_json

RELATIONS = {">=": operator.ge, "<=": operator.le, "==": operator.eq}


@dataclass(frozen=True)
class Check:
    """One number of a gate."""

    label: str  # the number in words
    value: float | None  # None where it could not be had, which keeps no bound
    relation: str = ""  # to the bound, one of RELATIONS; "" for a number that bounds nothing
    bound: float | None = None

    @property
    def passed(self) -> bool:
        if not self.relation:
            return True
        defined = self.value is not None and not math.isnan(self.value)
        return defined and bool(RELATIONS[self.relation](float(self.value), self.bound))


def verify(config: VerifyConfig, work: Workdir) -> list[str]:
    """Runs the gates that the settings name, and returns those that miss.

    A gate is a file gNN_*.py here whose ``gate(seed, directory)`` returns its checks, at least one
    with a bound; the directory is thrown away. Everything is computed anew. A gate that raises
    misses, and the others still run. Writes results/verify.json, and seconds to
    results/timing.json.
    """
    files, rows, seconds = gate_files(), [], {}
    for name in config.gates:
        print(f"{name} ... ", end="", flush=True)
        started = time.perf_counter()
        module = importlib.import_module(f"{__package__}.{files[name]}")
        title, checks, note = module.__doc__.splitlines()[0].partition(": ")[2], [], ""
        level = logging.get_verbosity()
        logging.set_verbosity(level if level >= logging.INFO else logging.ERROR)  # stages inside
        with tempfile.TemporaryDirectory(prefix="crossdict-") as directory:
            try:
                checks = module.gate(seed=config.seed, directory=Path(directory))
            except Exception as error:
                traceback.print_exc()
                note = f"raised {type(error).__name__}: {error}"
            finally:
                logging.set_verbosity(level)
        seconds[name] = time.perf_counter() - started
        passed = any(c.relation for c in checks) and all(c.passed for c in checks)
        print(f"{'passes' if passed else 'MISSES'}, {seconds[name]:.1f} s")
        numbers = [
            {"what": c.label, "value": c.value, "relation": c.relation}
            | {"bound": c.bound, "passed": c.passed}
            for c in checks
        ]
        rows.append(
            {"gate": name, "what": title, "passed": passed, "checks": numbers, "note": note}
        )
    write_json(work.result("verify.json"), {"seed": config.seed, "gates": rows})
    work.record_timing("verify", wall_s=sum(seconds.values()), **seconds)
    show([gates_table(rows, missed=True)])
    print(f"Every number and its bound: {work.result('verify.json')}")
    return [row["gate"] for row in rows if not row["passed"]]
