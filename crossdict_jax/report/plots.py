"""Figures as inline SVG, coloured by CSS variables: one drawing serves light and dark."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from crossdict_jax.report.tables import number
from crossdict_jax.results import map_order

# Colours that matplotlib can write, in place of these variables of the page's style sheet.
VARIABLES = ("ink", "muted", "rule", "paper", "strong", "weak", "none")
VARIABLES += tuple(f"series-{i}" for i in range(7))
STAND_INS = [f"#{i:06}" for i in range(1, 1 + len(VARIABLES))]
INK, MUTED, GRID, PAPER, STRONG, WEAK, NONE, *SERIES = STAND_INS
DASHES = ("-", "--", "-.", ":")
MAX_NAMES = 24  # in a legend: more cannot be read
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    **dict.fromkeys(("text.color", "axes.titlecolor"), INK),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GRID),
    **dict.fromkeys((f"axes.spines.{side}" for side in ("top", "right", "left")), False),
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "legend.frameon": False,
    **{"font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 7.5},
    **{"axes.linewidth": 0.8, "grid.linewidth": 0.6, "lines.linewidth": 1.3},
}


@dataclasses.dataclass
class Figure:
    """One panel."""

    words: str  # for who cannot see it
    svg: str = ""


@contextlib.contextmanager
def drawing(
    words: str, *, width: float = 3.4, height: float = 2.0, legend: int = 0
) -> Iterator[tuple]:
    """Yields (axes, figure): what is drawn on the axes is in the figure at the end of the block.

    ``words`` also keep its ids apart from others'; ``width`` and ``height`` are in inches. A legend
    of ``legend`` columns, if any, stands below the axes.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": words}):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        axes, figure = canvas.subplots(), Figure(words)
        yield axes, figure
        handles, _ = axes.get_legend_handles_labels()
        if legend and handles:
            canvas.set_figheight(height + 0.17 * -(-len(handles) // legend))
            canvas.legend(loc="outside lower center", ncols=legend, columnspacing=1.4)
        file = io.StringIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    # An element of the page: no prologue, no addresses, no ids that nothing uses.
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg, count=5)
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r"font(?:-size)?: ([\d.]+px)[^\"]*?sans-serif", r"font-size: \1", svg)
    # Inside tags only: printed numbers keep their digits.
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)
    for colour, variable in zip(STAND_INS, VARIABLES):
        svg = svg.replace(colour, f"var(--{variable})")
    figure.svg = svg.strip()


def map_line(kind: str) -> dict:
    """Returns the colour and dashes of a kind of map: the same in every figure of every run."""
    order = map_order(kind)
    return {"color": SERIES[order % len(SERIES)], "linestyle": DASHES[order // len(SERIES)]}


def line_figure(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float], dict]],
    *,
    title: str,
    x: str,
    y: str,
    words: str,
    log: str = "x",
    levels: Mapping[str, float] | None = None,
    bottom: float | None = None,
    legend: int = 3,
) -> Figure:
    """Returns lines in one panel, their names below it.

    Args:
      lines: name -> (x values, y values, further arguments of ``plot``).
      log: which of the axes are logarithmic: "x", "y", "xy" or "".
      levels: name -> y value of a level line.
      bottom: what lies below it is cut off.
    """
    from matplotlib.ticker import LogLocator

    levels = levels or {}
    legend = legend if len(lines) + len(levels) <= MAX_NAMES else 0
    with drawing(words, width=4.6, height=2.4, legend=legend) as (axes, figure):
        for name, (xs, ys, style) in lines.items():
            axes.plot(xs, ys, label=name, **style)
        for i, (name, level) in enumerate(levels.items()):
            axes.axhline(level, color=MUTED, linestyle=(0, (4, 1 + 2 * i)), label=name)
        for name in log:
            axes.set(**{f"{name}scale": "log"})
            axis = getattr(axes, f"{name}axis")
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1,) if high > 50 * low else (1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        axes.set(title=title, xlabel=x, ylabel=y)
        if bottom is not None:
            axes.set_ylim(bottom=max(bottom, min(0.0, axes.get_ylim()[0])))
        axes.grid(axis="y")
    return figure


def histogram_figure(histogram: dict, title: str, x: str) -> Figure:
    """Returns bars of a histogram of features {"edges": [n + 1], "counts": [n]}."""
    total = sum(histogram["counts"])
    words = f"Histogram of the {x} of {total:.0f} features of {title}."
    with drawing(words, width=2.6, height=1.7) as (axes, figure):
        axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=SERIES[1], alpha=0.7)
        axes.set(title=title, xlabel=x, ylabel="features")
        axes.grid(axis="y")
    return figure


def score_limits(lines: Iterable[dict], key: str, cut: float, top: float) -> tuple[float, float]:
    """Returns an x axis for scores, intervals and nulls; what lies below ``cut`` is left out."""
    keys = (key, f"{key}_low", f"{key}_high", f"shuffled.{key}")
    values = [line[k] for line in lines for k in keys if line.get(k) is not None]
    low, high = max(min([*values, 0.0]), cut), max([*values, top])
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def score_figure(
    scores: Mapping[str, tuple[dict, str]],
    key: str,
    *,
    title: str,
    x: str,
    words: str,
    limits: tuple[float, float],
    references: Mapping[str, float | None],
) -> Figure:
    """Returns scores with their intervals, one below the other, and their nulls as crosses.

    ``scores`` is name -> (row with the score, its interval and ``shuffled.KEY``; colour); a score
    below the x axis's ``limits`` is written at its edge. ``references`` are vertical lines.
    """
    keys, left = (key, f"shuffled.{key}", f"{key}_low", f"{key}_high"), limits[0]
    values = {name: [row.get(k) for k in keys] for name, (row, _) in scores.items()}
    told = [
        f"{n} {number(x, 2)} (shuffled {number(null, 2)})" for n, (x, null, *_) in values.items()
    ]
    told += [f"{name} at {number(level, 2)}" for name, level in references.items()]
    words, height = f"{words}: {', '.join(told)}.", 0.75 + 0.24 * len(scores)
    with drawing(words, height=height) as (axes, figure):
        for y, (name, (score, null, low, high)) in enumerate(values.items()):
            colour = scores[name][1]
            if null is not None:
                axes.plot(max(null, left), y, "x", color=MUTED, markersize=4.5, clip_on=False)
            if score is not None and score < left:
                axes.text(left, y, f" ◂ {number(score, 1)}", va="center", color=colour)
            elif score is not None:
                if low is not None:
                    axes.hlines(y, max(low, left), high, color=colour, linewidth=2)
                axes.plot(score, y, "o", color=colour, markersize=5)
        style = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        above, before = 2, float("-inf")  # the height of a name, in points
        for dash, (name, level) in zip(DASHES, references.items()):
            if level is not None:
                near = abs(level - before) < 0.4 * (limits[1] - limits[0])
                above, before = (above + 8 if near else 2), level
                axes.axvline(level, color=MUTED, linewidth=0.9, linestyle=dash)
                axes.annotate(name, (level, 1), (0, above), ha="center", fontsize=7, **style)
        axes.set(xlabel=x, xlim=limits, ylim=(len(scores) - 0.4, -0.6))
        axes.set_title(title, pad=10 + above).set_in_layout(False)  # it may be wider than the axes
        axes.set_yticks(range(len(scores)), list(scores), color=INK)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    return figure
