"""Timing that is fair on a busy machine: contenders in turn, every ratio within one round."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax

OURS = "ours"


class Spent(NamedTuple):
    """Seconds of one run: on the clock, and of all processor cores together."""

    seconds: float
    cpu_seconds: float


Run = Callable[[int], Any]  # does its work so many times, to the end; others return their Spent


@dataclass(frozen=True)
class Bench:
    """One benchmark of a run: its empty folder, its suite, and the number of rounds."""

    name: str
    folder: Path
    suite: str = "cpu"
    repeats: int = 5
    seed: int = 0

    def compare(
        self,
        case: str,
        contenders: dict[str, Run],
        amount: float,
        unit: str = "rows",
        *,
        count: int = 1,
        reference: str = OURS,
        about: dict[str, dict] | None = None,
    ) -> list[dict]:
        """Returns a result row per contender; each runs once a round, every second round backwards.

        One run each goes before and does not count: it compiles. ``ratio`` is the median over
        rounds of the contender's seconds over those of ``reference`` (above 1: the reference is
        faster), with its least and greatest; ``cpu_ratio`` is the same of processor seconds, which
        other work disturbs less.

        Args:
          amount: how much of ``unit`` one run does.
          count: how often a run does its work.
          about: further columns of a contender.
        """
        spent, order = {name: [] for name in contenders}, list(contenders)
        for name in order:
            contenders[name](count)
        for _ in range(self.repeats):
            for name in order:
                spent[name].append(timed(contenders[name], count))
            order.reverse()
        rows = []
        for name, runs in spent.items():
            both = list(zip(runs, spent[reference]))
            ratios = [a.seconds / b.seconds for a, b in both]
            cpu_ratios = [a.cpu_seconds / max(b.cpu_seconds, 1e-9) for a, b in both]
            seconds = median(run.seconds for run in runs)
            row = {"benchmark": self.name, "case": case, "contender": name}
            row |= {"seconds": seconds, "unit": unit, "per_s": amount / seconds}
            row |= {"ratio": median(ratios), "cpu_ratio": median(cpu_ratios)}
            row |= {"ratio_low": min(ratios), "ratio_high": max(ratios)}
            rows.append(row | (about or {}).get(name, {}))
        return rows


def timed(run: Run, count: int) -> Spent:
    """Returns what ``run(count)`` takes, or says that it took."""
    started, cpu_started = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(run(count))
    spent = Spent(time.perf_counter() - started, time.process_time() - cpu_started)
    return result if isinstance(result, Spent) else spent
