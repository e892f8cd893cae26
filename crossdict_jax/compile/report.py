"""Prints what the programs of a run take of a machine, the run's time, and what would fit."""

from collections.abc import Iterator, Sequence

from crossdict_jax.compile.estimate import Estimate, estimate, largest, refuse_too_large
from crossdict_jax.compile.machines import Machine, devices, parse
from crossdict_jax.compile.programs import Plan, make_plan, programs
from crossdict_jax.config import Config
from crossdict_jax.report.tables import Table, number, show, table
from crossdict_jax.training.mesh import planned
from crossdict_jax.training.stage import progress_bar

ASSUMED = (
    "Estimates: nothing has been measured on this machine. A program takes the longest of its "
    "matrix products, its memory traffic and its operations one after another, then what is sent.",
    "Products reach {bfloat16:.3g} TFLOP/s in bfloat16 and {float32:.3g} in float32, memory "
    "{bandwidth:.0f} GB/s, a ring {network:.0f} GB/s, an operation takes {launch:.1f} us or more; "
    "of branches the shortest counts.",
    "Texts have {rows} training rows or fewer. Not counted: compiling, text, disk, closed forms "
    "and statistics on the host, tests of single features.",
)


def compile_run(config: Config) -> list[Estimate]:
    """Prints and returns what every program of a run takes of ``config.machine``.

    Raises:
      UserError: there is no such machine, its compiler is not installed, the shape of a model is
        not known, or a program does not fit (after everything has been printed).
    """
    machine, plan = parse(config.machine), make_plan(config)
    with planned(devices(machine), int(machine.device.memory)):
        estimates = list(_estimated(plan, machine))
    show([costs(estimates, machine), limits(plan, estimates, machine)], 150)
    total = sum(e.total_s for e in estimates)
    spent = sum(e.seconds for e in estimates)
    print(f"The run: about {total / 60:.1f} minutes of its devices' time (estimate). Compiled in "
          f"{spent:.0f} s.")  # fmt: skip
    device = machine.device
    figures = {n: getattr(device, n) / 1e12 for n in ("bfloat16", "float32")}
    figures |= {"bandwidth": device.bandwidth / 1e9, "network": machine.network / 1e9}
    figures |= {"launch": device.launch * 1e6, "rows": number(plan.rows["train"])}
    print(*(line.format(**figures) for line in ASSUMED), sep="\n")
    refuse_too_large(estimates, machine)
    return estimates


def _estimated(plan: Plan, machine: Machine) -> Iterator[Estimate]:
    with progress_bar(desc=f"compile for {machine.name}", unit="program") as progress:
        for program in programs(plan):
            progress.set_postfix_str(program.name, refresh=True)
            yield estimate(program, machine)
            progress.update()


def costs(estimates: Sequence[Estimate], machine: Machine) -> Table:
    """Returns a row for each program: memory, work and time of one run of it, or of one step."""
    rows = []
    for e in estimates:
        sent = (f"{kind} {size / 1e6:.3g}" for kind, size in e.collectives.items() if size > 1e4)
        fits = e.memory <= machine.device.memory
        rows.append({
            "stage": e.program.stage,
            "program": e.program.name + (" (a step)" if e.program.steps else ""),
            "GB": f"{e.memory / 1e9:.2f}" + ("" if fits else " !"),
            "GFLOP": f"{e.flops / 1e9:.3g}",
            "GB moved": f"{e.bytes / 1e9:.3g}",
            "MB sent": ", ".join(sent) or "none",
            "est. ms": f"{e.ms:.3g}",
            "bound": e.bound if fits else "does not fit",
            "runs": number(max(1, e.program.steps) * e.program.runs, 0),
            "est. s": f"{e.total_s:.3g}",
            "host": ", ".join(e.host) or "none",
        })  # fmt: skip
    has = f"{machine.device.memory / 1e9:.1f} GB each"
    where = f"{machine.name}: {machine.count} devices ({machine.topology}), {has}"
    return table(f"On each device of {where}; compiled, not run", rows)


def limits(plan: Plan, estimates: Sequence[Estimate], machine: Machine) -> Table:
    """Returns the largest settings and model that fit, by proportion."""
    found: dict[str, int] = {}
    for e in estimates:
        for name, value in largest(e, machine).items():
            found[name] = min(value, found.get(name, value))
    rows = [{"setting": name, "fits": f"{value:,}"} for name, value in found.items()]
    beside = [e.memory - e.held for e in estimates if e.program.stage == "extract_activations"]
    if beside:
        parameters = (machine.device.memory - max(beside)) / 4e9
        model = {"setting": "parameters of a language model", "fits": f"{parameters:.1f} billion"}
        rows.append(model)
    return table("The largest that fit, each alone (estimates by proportion, not compiled)", rows)
