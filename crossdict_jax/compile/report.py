"""Prints what the programs of a run take of a machine, the run's time, and what would fit."""

import time
from collections.abc import Sequence

from crossdict_jax.compile.estimate import Estimate, estimate, largest, refuse_too_large
from crossdict_jax.compile.machines import Machine, machine
from crossdict_jax.compile.programs import make_plan, programs
from crossdict_jax.config import Config
from crossdict_jax.report.tables import Table, number, show, table
from crossdict_jax.training.mesh import planned
from crossdict_jax.training.stage import progress_bar

ASSUMED = """
Estimates, all of them: nothing has been measured on this machine. A program takes the longest of
its matrix products, its memory traffic and its operations one after another, then what it sends.
Products reach {:.3g} TFLOP/s in bfloat16 and {:.3g} in float32, memory {:.0f}
GB/s, a ring {:.0f} GB/s; an operation takes {:.1f} us or more; of branches the shortest
counts, and of steps those that revive no dead feature. Not counted: compiling, text, disk, closed
forms and statistics, tests of single features, similarity of layers, the hypernetwork. Imported
dictionaries count as of sae.width.
"""


def compile_run(config: Config) -> list[Estimate]:
    """Prints and returns what every program of a run takes of ``config.machine``.

    Raises:
      UserError: the machine or the shape of a model is unknown, its compiler is not installed, or
        a program does not fit (after everything has been printed).
    """
    target, plan, estimates = machine(config.machine), make_plan(config), []
    began = time.perf_counter()
    with (
        planned(target.devices(), int(target.device.memory)),
        progress_bar(desc=f"compile for {target.name}", unit="program") as progress,
    ):
        for program in programs(plan):
            progress.set_postfix_str(program.name, refresh=True)
            estimates.append(estimate(program, target))
            progress.update()
    show([costs(estimates, target), limits(estimates, target)])
    minutes, seconds = sum(e.run_s for e in estimates) / 60, time.perf_counter() - began
    print(f"The run, of about {number(plan.rows['train'])} training rows: about {minutes:.1f} "
          f"minutes on these devices (estimate). Compiled in {seconds:.0f} s.")  # fmt: skip
    device = target.device
    rates = device.bfloat16 / 1e12, device.float32 / 1e12, device.bandwidth / 1e9
    print(ASSUMED.strip().format(*rates, target.network / 1e9, device.launch * 1e6))
    refuse_too_large(estimates, target)
    return estimates


def costs(estimates: Sequence[Estimate], machine: Machine) -> Table:
    """Returns a row per program: memory, work and time of one run or step."""
    rows = []
    for e in estimates:
        p, fits = e.program, e.memory <= machine.device.memory
        sent = [f"{kind} {size / 1e6:.3g}" for kind, size in e.sent.items()]
        cells = {"stage": p.stage, "program": p.name + (", a step" if p.steps > 1 else "")}
        cells |= {"GB": f"{e.memory / 1e9:.2f}", "GFLOP": f"{e.flops / 1e9:.3g}"}
        cells |= {"GB moved": f"{e.bytes / 1e9:.3g}", "est. ms": f"{e.total_ms:.3g}"}
        cells |= {"bound": e.bound if fits else "DOES NOT FIT"}
        cells |= {"runs": number(round(p.steps * p.runs)), "est. s": f"{e.run_s:.3g}"}
        rows.append(cells | {"MB sent": ", ".join(sent) or "–", "host": ", ".join(e.host) or "–"})
    has = f"{machine.count} of {machine.device.memory / 1e9:.1f} GB, {machine.shape}"
    return table(f"Each device of {machine.name} ({has}): compiled for it, not run", rows)


def limits(estimates: Sequence[Estimate], machine: Machine) -> Table:
    """Returns the largest settings, and the largest language model, that fit."""
    fits: dict[str, float] = {}
    for e in estimates:
        for name, value in largest(e, machine).items():
            fits[name] = min(value, fits.get(name, value))
        if e.program.parameters:  # all models grow alike
            name, free = "parameters of a model", machine.device.memory - (e.memory - e.held)
            value = e.program.parameters * max(0.0, free) / e.held
            fits[name] = min(value, fits.get(name, value))
    rows = [{"setting": name, "fits": number(round(value))} for name, value in fits.items()]
    return table("The largest that fit, each alone: by proportion, not compiled", rows)
