"""Compiles programs and estimates what they take of a machine."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax

from crossdict_jax.compile import hlo
from crossdict_jax.compile.machines import INSTALL, Machine
from crossdict_jax.compile.programs import Program
from crossdict_jax.errors import UserError

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Estimate:
    """What one run of a program, or one step of a training, takes of each device."""

    program: Program
    memory: float  # bytes at its peak
    held: float  # bytes of arguments and results
    flops: float = 0.0  # of matrix products
    bytes: float = 0.0  # through the memory
    # By the roofline: "compute", "memory", "operations" one after another, "network".
    ms: Counter[str] = field(default_factory=Counter)
    sent: dict[str, float] = field(default_factory=dict)  # {kind of collective: bytes}
    host: tuple[str, ...] = ()  # exchanges with the host

    @property
    def total_ms(self) -> float:
        """The longest of the concurrent parts, plus the network."""
        ms = self.ms
        return max(ms["compute"], ms["memory"], ms["operations"]) + ms["network"]

    @property
    def bound(self) -> str:
        """The largest part; "operations" where none takes two fifths."""
        first = max("compute", "memory", "network", key=self.ms.__getitem__)
        return first if self.ms[first] > 0.4 * self.total_ms else "operations"

    @property
    def run_s(self) -> float:
        """Seconds of all its runs."""
        return self.total_ms / 1e3 * self.program.steps * self.program.runs


def estimate(program: Program, machine: Machine) -> Estimate:
    """Returns what a program takes of the machine for which it is compiled.

    If the compiler finds it too large only a part of its memory is known.
    """
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"(?:[Uu]sed |temporaries \()([\d.]+)([KMGT])", str(error))
        if not needed:
            raise
        size = max(float(needed[1]) * UNITS[needed[2]], machine.device.memory + 1)
        return Estimate(program, size, min(size, program.beside + 4 * program.parameters))
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--machine={machine.name}: this JAX cannot read what its compiler wrote; run "
            f"{INSTALL[machine.device.platform][1]}, which brings the version that belongs to it."
        ) from error
    sizes, device, beside = compiled.memory_analysis(), machine.device, program.beside
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    cost = hlo.cost(text, machine, program.steps)
    host = tuple(k.removeprefix("host ") for k in cost if k.startswith("host "))
    cost = Counter({name: value / program.steps for name, value in cost.items()})
    sent = {k.removeprefix("sent "): v for k, v in cost.items() if k.startswith("sent ")}
    hops = sum(size * (1 + (kind == "all-reduce")) for kind, size in sent.items())
    seconds = {"compute": cost["compute"], "memory": cost["bytes"] / device.bandwidth}
    seconds["operations"] = cost["busy"] + cost["waits"] * device.wait
    seconds["network"] = hops / machine.network
    return Estimate(
        program,
        memory=max(held + sizes.temp_size_in_bytes, sizes.peak_memory_in_bytes) + beside,
        held=held + beside,
        flops=cost["flops"],
        bytes=cost["bytes"],
        ms=Counter({name: 1e3 * value for name, value in seconds.items()}),
        sent=sent,
        host=host,
    )


def largest(e: Estimate, machine: Machine) -> dict[str, int]:
    """Returns the largest power of two of each setting that fits: by proportion, not compiled.

    A batch scales temporaries; a width all but resident rows.
    """
    result = {}
    for name, value in e.program.changes.items():
        fixed = e.program.rows if name.endswith(".width") else e.held
        share = (machine.device.memory - fixed) / max(e.memory - fixed, 1.0)
        share = max(0.0, share) ** (1 / 2 if e.program.square else 1)
        result[name] = 2 ** int(value * share).bit_length() // 2
    return result


def refuse_too_large(estimates: Sequence[Estimate], machine: Machine) -> None:
    """Raises UserError with the settings to lower where a program does not fit."""
    for e in estimates:
        if e.memory <= machine.device.memory:
            continue
        smaller = {n: v for n, v in largest(e, machine).items() if 0 < v < e.program.changes[n]}
        mends = [f"{name}={value}" for name, value in smaller.items()]
        if e.program.square:
            mends.append(f"map.kinds without {e.program.square}")
        other = "fewer text.documents" if e.program.rows else "a smaller model"
        size, has = (f"{n / 1e9:.3g} GB" for n in (e.memory, machine.device.memory))
        raise UserError(
            f"{e.program.stage}, {e.program.name}: {size}{'' if e.ms else ' or more'} are needed "
            f"on each device, and those of {machine.name} give {has}; try "
            f"{' or '.join(mends) or f'{other} or larger devices'}."
        )
