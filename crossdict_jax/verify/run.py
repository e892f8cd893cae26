"""Runs the gates, each a file of this room found by its name, and prints what came out."""

from __future__ import annotations

import importlib
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from crossdict_jax.config import VerifyConfig
from crossdict_jax.config.settings import gate_files
from crossdict_jax.verify.gate import Check, Gate
from crossdict_jax.workdir import Workdir, write_json

Run = Callable[..., Gate]  # (seed, directory) -> Gate; the directory is empty and thrown away
PIPE_WIDTH = 120  # columns when the output is no terminal


def gates() -> dict[str, Run]:
    """Returns {G1: its function, ...} of every file gNN_*.py of this room."""
    return {
        name: importlib.import_module(f"{__package__}.{file}").gate
        for name, file in gate_files().items()
    }


def verify(config: VerifyConfig, work: Workdir) -> list[Gate]:
    """Runs the gates that the settings name, in their order, and returns their outcomes.

    Every run computes everything anew, because a kept answer would say nothing about the code as
    it is now; equal seeds give equal answers. Writes results/verify.json with every number and its
    bound, and the seconds to results/timing.json. A gate that raises is a gate that misses: the
    others still run.
    """
    known, outcomes, seconds = gates(), [], {}
    for name in config.gates:
        print(f"{name} ...", flush=True)
        started = time.perf_counter()
        outcomes.append(_run(name, known[name], config.seed))
        seconds[name] = time.perf_counter() - started
        print(f"{name} {'passes' if outcomes[-1].passed else 'MISSES'}, {seconds[name]:.1f} s")
    rows = [outcome.row() for outcome in outcomes]
    write_json(work.result("verify.json"), {"seed": config.seed, "gates": rows})
    work.record_timing("verify", wall_s=sum(seconds.values()), **seconds)
    print_table(outcomes, seconds)
    return outcomes


def _run(name: str, run: Run, seed: int) -> Gate:
    with tempfile.TemporaryDirectory(prefix="crossdict-") as directory:
        try:
            return run(seed=seed, directory=Path(directory))
        except Exception as error:
            traceback.print_exc()
            return Gate(name, "an answer", (), note=f"raised {type(error).__name__}: {error}")


def print_table(outcomes: list[Gate], seconds: dict[str, float]) -> None:
    """Prints every number beside its bound."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, title="gates", title_justify="left")
    for header in ("gate", "what", "value", "bound", "pass", "seconds"):
        numeric = header in ("value", "bound", "seconds")
        table.add_column(header, justify="right" if numeric else "left", no_wrap=header != "what")
    for outcome in outcomes:
        took = f"{seconds[outcome.name]:.1f}"
        name, what = Text(outcome.name, style="bold"), Text(outcome.what, style="bold")
        table.add_row(name, what, "", "", _sign(outcome.passed), took)
        for check in outcome.checks:
            table.add_row("", Text(f"  {check.what}"), *_cells(check))
        if outcome.note:
            table.add_row("", Text(f"  {outcome.note}", style="dim"))
    console = Console()
    (console if console.is_terminal else Console(width=PIPE_WIDTH)).print(table)


def _sign(passed: bool):
    from rich.text import Text

    return Text("yes", style="green") if passed else Text("MISS", style="bold red")


def _cells(check: Check) -> tuple:
    value = "–" if check.value is None else f"{check.value:.4g}"
    if not check.relation:
        return value, "", ""
    return value, f"{check.relation} {check.bound:.4g}", _sign(check.passed)
