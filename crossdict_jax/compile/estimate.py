"""Compiles programs and estimates what they take of a machine."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax

from crossdict_jax.compile import hlo
from crossdict_jax.compile.machines import Machine
from crossdict_jax.compile.programs import Program
from crossdict_jax.errors import UserError

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Estimate:
    """What one run of a program, or one step of a training, takes on each device.

    Attributes:
      memory: bytes at its peak; ``held`` are those of its arguments.
      flops, bytes: of matrix products, and through the memory.
      ms: estimated; the largest of what ``compute_ms`` and ``memory_ms`` would take alone and of
        the operations one after another, and then what is sent and waited for.
      bound: "compute", "memory", "network", or "operations": many small ones.
      collectives: {kind: bytes}.
      host: operations that send to the host or receive from it.
      seconds: of compiling.
    """

    program: Program
    memory: float
    held: float
    flops: float = 0.0
    bytes: float = 0.0
    ms: float = 0.0
    compute_ms: float = 0.0
    memory_ms: float = 0.0
    network_ms: float = 0.0
    collectives: Mapping[str, float] | None = None
    host: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def bound(self) -> str:
        parts = {"compute": self.compute_ms, "memory": self.memory_ms, "network": self.network_ms}
        largest = max(parts, key=parts.get)
        return largest if parts[largest] > 0.4 * self.ms else "operations"

    @property
    def total_s(self) -> float:
        """Seconds of all its runs."""
        return self.ms / 1e3 * max(1, self.program.steps) * self.program.runs


def estimate(program: Program, machine: Machine) -> Estimate:
    """Returns what a program takes of a machine, for which it is compiled.

    Of one that the compiler finds too large only its memory is known.
    """
    began = time.perf_counter()
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of", str(error))
        if not needed:
            raise
        size = float(needed[1]) * UNITS[needed[2]]
        return Estimate(program, size, size, seconds=time.perf_counter() - began)
    seconds, sizes = time.perf_counter() - began, compiled.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    steps = max(1, program.steps)
    cost = hlo.cost(compiled.as_text(), machine, steps)
    device = machine.device
    sent = sum(size * (2 if kind == "all-reduce" else 1) for kind, size in cost.sent.items())
    memory_s, network_s = cost.bytes / device.bandwidth, sent / machine.network
    busy = max(cost.compute, memory_s, cost.busy) + network_s + cost.waits * device.wait
    return Estimate(
        program,
        memory=max(held + sizes.temp_size_in_bytes, sizes.peak_memory_in_bytes),
        held=held,
        flops=cost.flops / steps,
        bytes=cost.bytes / steps,
        ms=1e3 * busy / steps,
        compute_ms=1e3 * cost.compute / steps,
        memory_ms=1e3 * memory_s / steps,
        network_ms=1e3 * network_s / steps,
        collectives={kind: size / steps for kind, size in cost.sent.items()},
        host=tuple(cost.host),
        seconds=seconds,
    )


def largest(e: Estimate, machine: Machine) -> dict[str, int]:
    """Returns the largest power of two of each setting that fits: by proportion, not compiled.

    With a batch grows what is neither argument nor result; with a width all but resident rows.
    """
    result = {}
    for name, value in e.program.changes.items():
        fixed = e.program.rows if name.endswith((".width", ".hidden")) else e.held
        share = (machine.device.memory - fixed) / max(e.memory - fixed, 1.0)
        result[name] = 2 ** int(value * max(0.0, share)).bit_length() // 2
    return result


def refuse_too_large(estimates: Sequence[Estimate], machine: Machine) -> None:
    """Raises UserError with the settings that mend it where a program does not fit."""
    for e in estimates:
        if e.memory <= machine.device.memory:
            continue
        smaller = {n: v for n, v in largest(e, machine).items() if 0 < v < e.program.changes[n]}
        mend = " or ".join(f"{name}={value}" for name, value in smaller.items())
        raise UserError(
            f"{e.program.stage}, {e.program.name}: {e.memory / 1e9:.1f} GB are needed on each "
            f"device, and those of {machine.name} give {machine.device.memory / 1e9:.1f} GB; try "
            f"{mend or 'fewer text.documents or larger devices'}."
        )
