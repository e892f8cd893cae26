"""Timing that is fair on a busy machine: contenders in turn, every ratio within one round."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

OURS = "ours"
Timed = Callable[[], float]  # does its work once, to the end, and returns the seconds it took


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


def alternate(contenders: dict[str, Timed], *, repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each contender in ``repeats`` rounds, of which each runs once in each.

    One run each goes before and does not count: it compiles. Every second round goes backwards,
    so that none always follows the same one.
    """
    order = list(contenders)
    for name in order:
        contenders[name]()
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(repeats):
        for name in order:
            seconds[name].append(contenders[name]())
        order.reverse()
    return {name: seconds[name] for name in contenders}


def compared(
    benchmark: str,
    case: str,
    seconds: dict[str, list[float]],
    need: Need,
    *,
    ceilings: dict[str, float],
    reference: str = OURS,
    about: dict[str, dict] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields a result row per contender.

    ``seconds`` is the median and ``seconds_least`` what the quietest round took. ``ratio`` is the
    median over rounds of the contender's seconds over those of ``reference`` (above 1: the
    reference is faster), with the least and the most. Fractions are of the ceilings: what the
    counted work would take at full speed, over what it took.
    """
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[reference])]
        median = statistics.median(own)
        yield {
            "benchmark": benchmark,
            "case": case,
            "contender": name,
            **((about or {}).get(name) or {}),
            "repeats": len(own),
            "seconds": median,
            "seconds_least": min(own),
            "unit": need.unit,
            "per_s": need.amount / median,
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "flops": need.flops or None,
            "bytes": need.bytes or None,
            "flop_fraction": fraction(need.flops, ceilings.get(need.dtype), median),
            "byte_fraction": fraction(need.bytes, ceilings.get("copy"), median),
        }


def fraction(work: float, ceiling: float | None, seconds: float) -> float | None:
    """Returns the share of a ceiling (work a second) that was reached; None without either."""
    return work / seconds / ceiling if work and ceiling else None


def timed(run: Callable[[], Any]) -> Timed:
    """Returns ``run`` as a contender; what it returns is waited for."""

    def measure() -> float:
        started = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - started

    return measure


def apart(function: Callable, *arguments) -> tuple[Any, int]:
    """Returns (what ``function`` returns in a fresh process, the most memory it held, in bytes)."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_with_peak, function, arguments).result()


def _with_peak(function: Callable, arguments: tuple) -> tuple[Any, int]:
    result = function(*arguments)
    return result, peak_memory()


def peak_memory() -> int:
    """Returns the most bytes this process has held: on the device if it tells, else on the host."""
    statistics_ = jax.devices()[0].memory_stats() or {}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return statistics_.get("peak_bytes_in_use", host)
