"""Timing that is fair on a busy machine: contenders in turn, every ratio within one round."""

import multiprocessing
import os
import re
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from crossdict_jax.errors import UserError

OURS = "ours"


class Spent(NamedTuple):
    """What one run took: seconds on the clock, and of all processor cores together."""

    seconds: float
    cpu_seconds: float


Run = Callable[[int], Any]  # does its work so many times, to the end; others say what it took


@dataclass(frozen=True)
class Bench:
    """One benchmark of a run: its empty folder, which of its sizes, and how many rounds."""

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
    ) -> list[dict[str, Any]]:
        """Returns a result row per contender; all run once in each round, every second backwards.

        One run each goes before and does not count: it compiles. ``ratio`` is the median over
        rounds of the contender's seconds over those of ``reference`` (above 1: the reference is
        faster), with its least and its greatest; ``cpu_ratio`` that of processor seconds, which
        other work disturbs less.

        Args:
          amount: how much of ``unit`` one run of every contender does.
          count: how often a run does its work.
          about: further columns of a contender.
        """
        spent: dict[str, list[Spent]] = {name: [] for name in contenders}
        order = list(contenders)
        for name in order:
            contenders[name](count)
        for _ in range(self.repeats):
            for name in order:
                spent[name].append(timed(lambda name=name: contenders[name](count)))
            order.reverse()
        rows = []
        for name, runs in spent.items():
            both = list(zip(runs, spent[reference]))
            ratios = [a.seconds / b.seconds for a, b in both]
            cpu_ratios = [a.cpu_seconds / max(b.cpu_seconds, 1e-9) for a, b in both]
            seconds = statistics.median(run.seconds for run in runs)
            row = {"benchmark": self.name, "case": case, "contender": name}
            row |= {"seconds": seconds, "unit": unit, "per_s": amount / seconds}
            row |= {"ratio": statistics.median(ratios), "cpu_ratio": statistics.median(cpu_ratios)}
            row |= {"ratio_low": min(ratios), "ratio_high": max(ratios)}
            rows.append(row | (about or {}).get(name, {}))
        return rows


def timed(run: Callable[[], Any]) -> Spent:
    """Returns what ``run()`` takes with all that it starts, or what it says that it took."""
    started, cpu_started = time.perf_counter(), time.process_time() + sum(os.times()[2:4])
    result = jax.block_until_ready(run())
    cpu_seconds = time.process_time() + sum(os.times()[2:4]) - cpu_started  # children's too
    spent = Spent(time.perf_counter() - started, cpu_seconds)
    return result if isinstance(result, Spent) else spent


# ---------------------------------------------------------------- memory


def apart(function: Callable, *arguments) -> tuple[Any, int]:
    """Returns (what ``function`` returns in a fresh process, the most memory it held, in bytes).

    Raises:
      UserError: the process was ended from outside.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            result = pool.submit(function, *arguments).result()
            return result, pool.submit(memory, peak=True).result()
    except BrokenProcessPool as error:
        raise UserError(
            "The process that was measured has been killed; if memory has run out, ask for less."
        ) from error


def memory(*, peak: bool = False) -> int:
    """Returns the bytes this process holds: on the device if it tells, else on the host.

    Args:
      peak: the most that it has held, instead of what it holds now.
    """
    statistics_ = jax.devices()[0].memory_stats() or {}
    on_device = statistics_.get("peak_bytes_in_use" if peak else "bytes_in_use")
    if on_device is not None:
        return on_device
    if not peak:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    # Not getrusage: a process inherits the peak of the one that started it.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
