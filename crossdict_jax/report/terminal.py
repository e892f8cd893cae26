"""The numbers of a run as a table on the terminal."""

from __future__ import annotations

from crossdict_jax.report import shared, together
from crossdict_jax.report.results import Comparison, Line, Stitching, read_results
from crossdict_jax.report.tables import VERDICTS, interval, number, percent, printable, verdict_text
from crossdict_jax.workdir import Workdir

COLOURS = {"strong": "bold blue", "weak": "yellow", "none": "dim", "": ""}
PIPE_WIDTH = 140  # columns when the output is no terminal


def summary_table(work: Workdir) -> None:
    """Prints every rung of every layer pair and direction, its controls and its verdict.

    ``untr.`` is the context gain into an untrained target, ``norm.`` where R² lies between the
    shuffled pairs (0) and the skyline (1). Below them, several layers stitched at once.

    Raises:
      UserError: a result file that it needs is missing or damaged.
    """
    from rich.console import Console

    results = read_results(work)
    effects = {(s.source, s.target, s.sites): s for s in results.stitchings}
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    for comparison in results.comparisons:
        effect = effects.get((*comparison.direction, comparison.sites))
        console.print(_table(comparison, effect))
    for table in together.section(results):
        console.print(printable(table))
    for line in shared.lines(results):
        console.print(line, markup=False, highlight=False)


def _table(comparison: Comparison, effect: Stitching | None):
    from rich.table import Table
    from rich.text import Text

    place = f"{comparison.source} {comparison.site_source} → {comparison.target} "
    table = Table(title=Text(place + comparison.site_target), title_justify="left", box=None)
    table.add_column("map", no_wrap=True)
    for name in (
        "R²",
        "shuffled",
        "gain",
        "untr.",
        "norm.",
        "cosine",
        "of mean",
        "top-1",
        "loss rec.",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for line in comparison.lines:
        table.add_row(*map(Text, _cells(line, effect)), _verdict(line))
    return table


def _cells(line: Line, effect: Stitching | None) -> list[str]:
    stitched = effect.ways(line.kind) if effect else []
    return [
        line.kind,
        f"{number(line.value('r2'))} {interval(line.aligned or {}, 'r2', 2)}".strip(),
        number(line.null("r2")),
        number(line.value("context_gain")),
        number(line.control("untrained", "context_gain"), 2),
        number(line.value("r2_normalized"), 2),
        number(line.value("cosine")),
        number(line.value("cosine_mean_predictor")),
        number(line.value("top1")),
        percent(stitched[0].value("loss_recovered"), 0) if stitched else "–",
    ]


def _verdict(line: Line):
    from rich.text import Text

    words = verdict_text(line)
    style, sign = VERDICTS.get(words, ("", ""))
    return Text(f"{sign} {words}".strip(), style=COLOURS[style])
