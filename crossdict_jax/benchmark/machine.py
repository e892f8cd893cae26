"""What the machine is and what it can do at most: its name, versions, and measured ceilings."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax.benchmark_config import CeilingBenchmark
from crossdict_jax.training.stage import device_figures

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")
LEAST_SECONDS = 0.1  # that a measurement takes: shorter ones would time the dispatch


def describe() -> dict[str, Any]:
    """Returns the device, the host, how busy it is, versions, and the commit of this code."""
    return device_figures() | {
        "platform": jax.default_backend(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # processes that wanted to run in the last minute
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "commit": _commit(),
    }


def _processor() -> str:
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """The commit of the source that runs, marked if files differ from it; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def ceilings(config: CeilingBenchmark, *, repeats: int) -> dict[str, float]:
    """Returns the most this machine does: flops a second per dtype, and bytes copied a second.

    ``float32`` and ``bfloat16`` are square matrix products of ``matmul_size`` (bfloat16 inputs,
    float32 sums); ``copy`` counts bytes read and bytes written, on the device; ``host_copy`` the
    same for numpy. Each is the median of ``repeats``.
    """
    found = {dtype: _matmul(config.matmul_size, dtype, repeats=repeats) for dtype in config.dtypes}
    host = _host_copy(config.copy_bytes, repeats=repeats)
    device = _copy(config.copy_bytes, repeats=repeats)
    if jax.default_backend() == "cpu":
        device = max(device, host)  # one memory: whichever way is faster shows what it can do
    return found | {"copy": device, "host_copy": host}


def _matmul(size: int, dtype: str, *, repeats: int) -> float:
    """Flops a second of [size, size] products, each of the one before."""

    @jax.jit
    def run(x, W, count):
        def product(_, x):
            y = jnp.matmul(x, W, precision="highest", preferred_element_type=jnp.float32)
            return y.astype(dtype)

        return jax.lax.fori_loop(0, count, product, x)

    keys = jax.random.split(jax.random.key(0))
    x, W = (jax.random.normal(key, (size, size)).astype(dtype) for key in keys)
    W = (W / size**0.5).astype(dtype)  # products keep their scale
    return 2 * size**3 * _rate(lambda n: run(x, W, n), repeats=repeats)


def _copy(size: int, *, repeats: int) -> float:
    """Bytes a second, read and written, of an array turned into another of its size."""

    @jax.jit
    def run(x, count):
        return jax.lax.fori_loop(0, count, lambda _, x: -x, x)

    x = jnp.ones(size // 4, jnp.float32)
    return 2 * size * _rate(lambda n: run(x, n), repeats=repeats)


def _host_copy(size: int, *, repeats: int) -> float:
    source, target = np.ones((2, size // 4), np.float32)

    def run(count: int) -> None:
        for _ in range(count):
            np.copyto(target, source)

    return 2 * size * _rate(run, repeats=repeats)


def _rate(run: Callable[[int], Any], *, repeats: int) -> float:
    """Times a second that ``run(n)`` does what it does n times: the median."""

    def seconds(count: int) -> float:
        started = time.perf_counter()
        jax.block_until_ready(run(count))
        return time.perf_counter() - started

    seconds(1)
    count = max(1, round(LEAST_SECONDS / seconds(1)))
    return count / statistics.median(seconds(count) for _ in range(repeats))
