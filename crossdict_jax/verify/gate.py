"""What a gate is, and the run of all of them: known answers, each a number with its bound."""

from __future__ import annotations

import importlib
import math
import operator
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdict_jax.config import VerifyConfig, gate_files
from crossdict_jax.report.tables import show, table
from crossdict_jax.workdir import Workdir, write_json

RELATIONS = {">=": operator.ge, "<=": operator.le, "==": operator.eq}


@dataclass(frozen=True)
class Check:
    """One number of a gate.

    Attributes:
      label: the number in words.
      value: None where it could not be had, which keeps no bound.
      relation: one of RELATIONS; "" for a number that is shown and bounds nothing.
      bound: what the value is compared with.
    """

    label: str
    value: float | None
    relation: str = ""
    bound: float | None = None

    @property
    def passed(self) -> bool:
        if not self.relation:
            return True
        defined = self.value is not None and not math.isnan(self.value)
        return defined and bool(RELATIONS[self.relation](float(self.value), self.bound))


@dataclass(frozen=True)
class Gate:
    """A gate's outcome: all its numbers.

    Attributes:
      name: G1 to G10.
      title: what must come out, in words.
      checks: at least one of them with a bound.
      note: what a reader should know beside the numbers.
    """

    name: str
    title: str
    checks: tuple[Check, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        return any(c.relation for c in self.checks) and all(c.passed for c in self.checks)

    def row(self) -> dict[str, Any]:
        """Returns the gate as JSON values, its bounds with it."""
        checks = [
            {
                "what": check.label,
                "value": None if check.value is None else float(check.value),
                "relation": check.relation,
                "bound": check.bound,
                "passed": check.passed,
            }
            for check in self.checks
        ]
        row = {"gate": self.name, "what": self.title, "passed": self.passed}
        return row | {"checks": checks, "note": self.note}


# ---------------------------------------------------------------- the run


def verify(config: VerifyConfig, work: Workdir) -> list[Gate]:
    """Runs the gates that the settings name, in their order, and returns their outcomes.

    Every gate is a file gNN_*.py of this folder with a function ``gate(seed, directory)``; the
    directory is empty and thrown away. Every run computes everything anew, because a kept answer
    would say nothing about the code as it is now; equal seeds give equal answers. A gate that
    raises is a gate that misses: the others still run. Writes results/verify.json with every number
    and its bound, and the seconds to results/timing.json.
    """
    files, outcomes, seconds = gate_files(), [], {}
    for name in config.gates:
        print(f"{name} ...", flush=True)
        started = time.perf_counter()
        module = importlib.import_module(f"{__package__}.{files[name]}")
        with tempfile.TemporaryDirectory(prefix="crossdict-") as directory:
            try:
                outcome = module.gate(seed=config.seed, directory=Path(directory))
            except Exception as error:
                traceback.print_exc()
                note = f"raised {type(error).__name__}: {error}"
                outcome = Gate(name, "an answer", (), note=note)
        outcomes.append(outcome)
        seconds[name] = time.perf_counter() - started
        print(f"{name} {'passes' if outcome.passed else 'MISSES'}, {seconds[name]:.1f} s")
    rows = [outcome.row() for outcome in outcomes]
    write_json(work.result("verify.json"), {"seed": config.seed, "gates": rows})
    work.record_timing("verify", wall_s=sum(seconds.values()), **seconds)
    show([table("gates", _lines(outcomes))])
    return outcomes


def _lines(outcomes: list[Gate]) -> list[dict[str, str]]:
    """Returns the lines of the table: a head for every gate, its numbers, its note."""

    def line(name: str, label: str, passed: bool | None, value: str = "", bound: str = "") -> dict:
        verdict = {True: "yes", False: "MISS", None: ""}[passed]
        return {"gate": name, "number": label, "value": value, "bound": bound, "pass": verdict}

    lines = []
    for outcome in outcomes:
        lines.append(line(outcome.name, outcome.title, outcome.passed))
        for check in outcome.checks:
            value = "–" if check.value is None else f"{check.value:.4g}"
            bound = f"{check.relation} {check.bound:.4g}" if check.relation else ""
            passed = check.passed if check.relation else None
            lines.append(line("", f"  {check.label}", passed, value, bound))
        if outcome.note:
            lines.append(line("", f"  {outcome.note}", None))
    return lines
