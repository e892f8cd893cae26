"""The generated parts of README.md and docs/, between ``<!-- generated: NAME -->`` and
``<!-- end -->``. A block whose numbers are missing stays as it is.
"""

import contextlib
import re
import subprocess
from pathlib import Path

from crossdict_jax import models, results
from crossdict_jax.errors import UserError
from crossdict_jax.report.page import STYLE
from crossdict_jax.report.results import directions, read_run
from crossdict_jax.report.tables import Table, number, table
from crossdict_jax.report.terminal import gates_table, main_table
from crossdict_jax.report.transfer import r2_figure
from crossdict_jax.workdir import Workdir, read_json, write_text

BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def write_docs(work: Workdir, root: Path) -> list[Path]:
    """Writes docs/results.md, the chart and every generated block; returns the paths.

    Results of ``launch.verify`` and ``launch.benchmark`` are read from ``verify`` and ``benchmark``
    beside the run.

    Raises:
      UserError: a file of the run is missing or damaged, or ``root`` is no checkout.
    """
    if not (root / "README.md").is_file():
        raise UserError(f"{root} has no README.md to write; run this in a checkout of the project.")
    docs, code = root / "crossdict_jax/docs", f"commit {commit(root)}"  # before files change
    write_text(docs / "results.md", results.page())  # needs no run
    run = read_run(work)
    blocks = {
        "result": f"`python -m launch.experiment`, {code}; R² on held-out documents [95 %]:\n\n"
        f"{markdown(main_table(run))}",
        "models": markdown(models_table()),
    }
    measured = work.root.parent / "benchmark/results/benchmark.md"  # names its machine and commit
    if measured.exists():
        blocks["benchmark"] = measured.read_text("utf-8").strip()
    gates = work.root.parent / "verify/results/verify.json"
    if gates.exists():
        told = markdown(gates_table(read_json(gates)["gates"]))
        blocks["gates"] = f"`python -m launch.verify`, {code}:\n\n{told}"
    # R² of every map at the middle layer pair of the first direction.
    first, *_ = directions(run.comparisons).values()
    figure = r2_figure(first[len(first) // 2], first)
    style = STYLE.read_text(encoding="utf-8")
    colours = dict(re.findall(r"(--[\w-]+): light-dark\((#\w+),", style))
    svg = re.sub(r"var\((--[\w-]+)\)", lambda m: colours[m[1]], figure.svg)
    paper = f'style="background: {colours["--paper"]}" font-family="sans-serif" width="520"'
    svg = svg.replace("<svg", f'<svg xmlns="http://www.w3.org/2000/svg" {paper}', 1) + "\n"
    write_text(docs / "transfer.svg", svg)
    written = [docs / "results.md", docs / "transfer.svg"]
    for path in (root / "README.md", *sorted(docs.glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        filled, count = BLOCK.subn(
            lambda m: f"{m[1]}{blocks[m[2]]}\n{m[3]}" if m[2] in blocks else m[0], text
        )
        if count:
            write_text(path, filled)
            written.append(path)
    return written


def commit(folder: Path) -> str:
    """Returns the commit of a folder, marked if files differ from it; "unknown" outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    found = ""
    with contextlib.suppress(FileNotFoundError):  # no git
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found or "unknown"


def models_table() -> Table:
    """Returns the embedded language models: shapes, and losses beside those of counts."""
    rows = []
    for name in models.EMBEDDED:
        config = models.load_config(name)
        training = read_json(models.ASSETS / name / "training.json")
        rows.append(
            {
                "model": name,
                "shape": f"{config.n_layers} layers of {config.d_model}, "
                f"vocabulary {config.vocab_size}",
                "parameters": f"{training['parameters'] / 1e6:.2f} M",
                "tokens seen": f"{training['tokens_seen'] / 1e6:.2f} M",
                "held out": number(training["loss"]),
                "bigram": number(training["bigram_loss"]),
                "unigram": number(training["unigram_loss"]),
            }
        )
    return table("", rows)


def markdown(table: Table) -> str:
    """Returns a table in Markdown, intervals beside their values."""
    lines = [table.titles, ["---:" if numeric else "---" for numeric in table.numeric]]
    lines += [[f"{cell.text} {cell.note}".strip() for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(' '.join(t.split()) for t in line)} |" for line in lines)
