"""The gates: known answers, each a number with its bound, and how they are run."""

import importlib
import operator
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
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

    what: str  # the number in words
    value: float | None  # None or NaN: it could not be had, and keeps no bound
    relation: str = ""  # to the bound, one of RELATIONS; "" for a number that bounds nothing
    bound: float | None = None

    @property
    def passed(self) -> bool:
        if not self.relation:
            return True
        return self.value is not None and RELATIONS[self.relation](float(self.value), self.bound)


def verify(config: VerifyConfig, work: Workdir) -> list[str]:
    """Runs the gates that the settings name, and returns those that miss.

    A gate is a file gNN_*.py here whose ``gate(seed, directory)`` returns its checks, at least one
    with a bound; the directory is thrown away. Everything is computed anew. A gate that raises
    misses, and the others still run; a full disk or memory ends the command. Writes
    results/verify.json, and seconds to results/timing.json.
    """
    files, rows, seconds = gate_files(), [], {}
    for name in config.gates:
        print(f"{name} ... ", end="", flush=True)
        started, level = time.perf_counter(), logging.get_verbosity()
        module, checks, note = importlib.import_module(f"{__package__}.{files[name]}"), [], ""
        logging.set_verbosity(level if level >= logging.INFO else logging.ERROR)  # stages inside
        try:
            with tempfile.TemporaryDirectory(prefix="crossdict-") as directory:
                checks = module.gate(seed=config.seed, directory=Path(directory))
        except (OSError, MemoryError):  # of the machine
            raise
        except Exception as error:
            traceback.print_exc()
            note = f"raised {type(error).__name__}: {error}"
        finally:
            logging.set_verbosity(level)
        seconds[name] = time.perf_counter() - started
        passed = any(c.relation for c in checks) and all(c.passed for c in checks)
        print(f"{'passes' if passed else 'MISSES'}, {seconds[name]:.1f} s")
        title = module.__doc__.splitlines()[0].partition(": ")[2]
        numbers = [asdict(check) | {"passed": check.passed} for check in checks]
        row = {"gate": name, "what": title, "passed": passed, "checks": numbers, "note": note}
        rows.append(row)
    write_json(work.result("verify.json"), {"seed": config.seed, "gates": rows})
    work.record_timing("verify", wall_s=sum(seconds.values()), **seconds)
    show([gates_table(rows, missed=True)])
    print(f"Every number and its bound: {work.result('verify.json')}")
    return [row["gate"] for row in rows if not row["passed"]]
