"""Timing that is fair on a busy machine: contenders in turn, every ratio within one round."""

from __future__ import annotations

import multiprocessing
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator
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


Timed = Callable[[], Spent]  # does its work once, to the end


@dataclass(frozen=True)
class Need:
    """What one run of every contender amounts to, counted from the maths, not from what ran.

    Attributes:
      amount: how much of ``unit`` is done (rows, tokens, bytes).
      flops: floating point operations, a multiply-add being two.
      bytes: of memory traffic: what must be read and written at least.
      dtype: of the matrix products' inputs: which ceiling the flops are held against.
    """

    amount: float
    unit: str = "rows"
    flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "float32"


def alternate(contenders: dict[str, Timed], *, repeats: int) -> dict[str, list[Spent]]:
    """Returns what each contender spent in each of ``repeats`` rounds; all run once in a round.

    One run each goes before and does not count: it compiles. Every second round goes backwards,
    so that none always follows the same one.
    """
    order = list(contenders)
    for name in order:
        contenders[name]()
    spent: dict[str, list[Spent]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name in order:
            spent[name].append(contenders[name]())
        order.reverse()
    return spent


def compared(
    benchmark: str,
    case: str,
    spent: dict[str, list[Spent]],
    need: Need,
    *,
    ceilings: dict[str, float],
    reference: str = OURS,
    about: dict[str, dict] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields a result row per contender.

    ``seconds`` and ``cpu_seconds`` are medians. ``ratio`` is the median over rounds of the
    contender's seconds over those of ``reference`` (above 1: the reference is faster), with the
    least and the most; ``cpu_ratio`` the same of processor seconds, which other work on the machine
    disturbs less. Fractions are of the ceilings: what the counted work would take at full speed,
    over what it took.
    """
    for name, own in spent.items():
        ratios, cpu_ratios = zip(*(_ratios(*both) for both in zip(own, spent[reference])))
        median = statistics.median(run.seconds for run in own)
        yield {
            "benchmark": benchmark,
            "case": case,
            "contender": name,
            **((about or {}).get(name) or {}),
            "repeats": len(own),
            "seconds": median,
            "cpu_seconds": statistics.median(run.cpu_seconds for run in own),
            "unit": need.unit,
            "per_s": need.amount / median,
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "cpu_ratio": statistics.median(cpu_ratios),
            "flops": need.flops or None,
            "bytes": need.bytes or None,
            "flop_fraction": fraction(need.flops, ceilings.get(need.dtype), median),
            "byte_fraction": fraction(need.bytes, ceilings.get("copy"), median),
        }


def _ratios(one: Spent, other: Spent) -> tuple[float, float]:
    return one.seconds / other.seconds, one.cpu_seconds / max(other.cpu_seconds, 1e-9)


def fraction(work: float, ceiling: float | None, seconds: float) -> float | None:
    """Returns the share of a ceiling (work a second) that was reached; None without either."""
    return work / seconds / ceiling if work and ceiling else None


def timed(run: Callable[[], Any]) -> Spent:
    """Returns what ``run()`` takes; arrays that it returns are waited for."""
    started, cpu_started = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return Spent(time.perf_counter() - started, time.process_time() - cpu_started)


def apart(function: Callable, *arguments) -> tuple[Any, int]:
    """Returns (what ``function`` returns in a fresh process, the most memory it held, in bytes).

    Raises:
      UserError: the process was ended from outside.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_with_peak, function, arguments).result()
    except BrokenProcessPool as error:
        raise UserError(
            "The process that was measured has been killed; if memory has run out, ask for less."
        ) from error


def _with_peak(function: Callable, arguments: tuple) -> tuple[Any, int]:
    result = function(*arguments)
    return result, peak_memory()


def peak_memory() -> int:
    """Returns the most bytes this process has held: on the device if it tells, else on the host."""
    on_device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    # Not getrusage: a process inherits the peak of the one that started it.
    status = Path("/proc/self/status").read_text()
    return on_device or 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


def memory() -> int:
    """Returns the bytes this process holds now, counted where ``peak_memory`` counts."""
    on_device = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() if on_device is None else on_device
