"""Figures as inline SVG, coloured by CSS variables: one drawing serves light and dark."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
import textwrap
from collections.abc import Callable

from crossdict_jax.report.results import (
    Comparison,
    Curves,
    Line,
    Stitching,
    ladder_place,
    site_words,
)
from crossdict_jax.report.tables import dictionary_name, number, verdict_style

# Stand-ins that matplotlib can write, and what the page replaces them by.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
STRONG, WEAK, NONE = "#050501", "#050502", "#050503"
SERIES = ("#060601", "#060602", "#060603", "#060604", "#060605", "#060606", "#060607")
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--rule",
    PAPER: "--paper",
    STRONG: "--strong",
    WEAK: "--weak",
    NONE: "--none",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES)},
}
VERDICT_COLOURS = {"strong": STRONG, "weak": WEAK, "none": NONE}
# Fixed places, so that a rung has the same colour in every figure of every run.
RUNG_COLOURS = {
    "token": MUTED,
    "procrustes": SERIES[0],
    "ridge": SERIES[1],
    "ridge_codes": SERIES[5],
    "low_rank": SERIES[6],
    "token_ridge": SERIES[2],
    "mlp": SERIES[3],
    "token_mlp": INK,
    "hypernetwork": SERIES[4],
    "crosscoder": SERIES[5],
}
DASHES = ("-", "--", "-.", ":")
MAX_POINTS = 200  # of a curve: more cannot be seen
MAX_NAMES = 24  # in a legend: more cannot be read
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 8.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.3,
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """One panel: the drawing, and the same in words for who cannot see it."""

    svg: str
    words: str


# ---------------------------------------------------------------- drawing


@dataclasses.dataclass(frozen=True)
class _Margins:
    """Inches around the axes: fixed, so that neighbouring panels line up."""

    left: float = 0.85
    right: float = 0.12
    top: float = 0.26
    bottom: float = 0.42


def draw(
    paint: Callable, *, name: str, width=3.4, height=2.0, margins: _Margins = _Margins()
) -> str:
    """Returns the SVG that ``paint(axes)`` draws; ``name`` keeps its inner ids apart from others.

    Args:
      width, height: of the whole drawing, in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        canvas = Canvas(figsize=(width, height))
        axes = canvas.subplots()
        canvas.subplots_adjust(
            left=margins.left / width,
            right=1 - margins.right / width,
            top=1 - margins.top / height,
            bottom=margins.bottom / height,
        )
        paint(axes)
        file = io.StringIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue())


OPEN = _Margins(left=0.52)  # panels without names at their left


def _inline(svg: str) -> str:
    """Returns matplotlib's file as an element of the page: no prologue, no addresses, no ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg, count=5)
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    # Inside tags only: a number that is printed keeps its digits.
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()


def _rungs(axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _height(lines: int) -> float:
    return 0.75 + 0.24 * lines


def _bounds(row: dict, key: str) -> tuple[float, float] | None:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return None if low is None or high is None else (low, high)


def _colour(line: Line) -> str:
    return VERDICT_COLOURS.get(verdict_style(line), MUTED)


def _values(lines, *keys: str) -> list[float]:
    found = [row.get(k) for n in lines for row in (n.aligned, n.shuffled) if row for k in keys]
    return [value for value in found if value is not None]


# ---------------------------------------------------------------- R² of every rung


def r2_limits(group: list[Comparison]) -> tuple[float, float]:
    """Returns one x axis for all panels of a direction; far below zero is cut, and marked."""
    values = _values((n for c in group for n in c.lines), "r2", "r2_low", "r2_high") or [0.0]
    low, high = max(min(*values, 0.0), -0.5), max(*values, 0.1)
    room = 0.06 * (high - low)
    return low - room, high + room


def r2_figure(comparison: Comparison, limits: tuple[float, float]) -> Figure:
    """Returns R² with its interval per rung, the shuffled null as a cross, token as a line."""
    lines = comparison.lines

    def paint(axes):
        _rungs(axes, [line.kind for line in lines])
        axes.set_xlim(*limits)
        axes.axvline(0, color=MUTED, linewidth=0.9)
        token = comparison.line("token")
        if token and token.value("r2") is not None:
            axes.axvline(token.value("r2"), color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)))
        for place, line in enumerate(lines):
            _dot(axes, place, line, "r2", limits)
        axes.set_title(comparison.sites)
        axes.set_xlabel("R² on held-out documents")

    svg = draw(
        paint, name=f"r2 {comparison.direction} {comparison.sites}", height=_height(len(lines))
    )
    return Figure(svg, _in_words(comparison, "r2", "R²"))


def _dot(axes, place: int, line: Line, key: str, limits: tuple[float, float]) -> None:
    value, null = line.value(key), line.null(key)
    if null is not None:
        axes.plot(max(null, limits[0]), place, "x", color=MUTED, markersize=4.5, clip_on=False)
    if value is None:
        return
    if value < limits[0]:
        axes.text(limits[0], place, f" ◂ {number(value, 1)}", va="center", color=_colour(line))
        return
    if bounds := _bounds(line.aligned, key):
        axes.hlines(place, max(bounds[0], limits[0]), bounds[1], color=_colour(line), linewidth=2)
    axes.plot(value, place, "o", color=_colour(line), markersize=5)


def _in_words(comparison: Comparison, key: str, name: str) -> str:
    scores = ", ".join(
        f"{line.kind} {number(line.value(key), 2)} (shuffled {number(line.null(key), 2)})"
        for line in comparison.lines
    )
    return f"{name} from {comparison.source} to {comparison.target}, {comparison.sites}: {scores}."


# ---------------------------------------------------------------- the trap of the cosine


def cosine_figure(comparison: Comparison) -> Figure:
    """Returns cosine (dot), shuffled (cross), centred (ring); the mean predictor is the line."""
    lines = comparison.lines

    def paint(axes):
        _rungs(axes, [line.kind for line in lines])
        low = min([*_values(lines, "cosine", "cosine_centered"), 0.0])
        axes.set_xlim(low - 0.05, 1.02)
        means = _values(lines, "cosine_mean_predictor")
        if means:
            axes.axvspan(low - 0.05, means[0], color=GRID, alpha=0.45, linewidth=0)
            axes.axvline(means[0], color=INK, linewidth=1)
        for place, line in enumerate(lines):
            _cosines(axes, place, line)
        axes.set_title(comparison.sites)
        axes.set_xlabel("cosine to the target’s features")

    svg = draw(
        paint, name=f"cosine {comparison.direction} {comparison.sites}", height=_height(len(lines))
    )
    words = _in_words(comparison, "cosine", "Cosine")
    return Figure(svg, f"{words} {_in_words(comparison, 'cosine_centered', 'Centred cosine')}")


def _cosines(axes, place: int, line: Line) -> None:
    raw, centred = line.value("cosine"), line.value("cosine_centered")
    if line.null("cosine") is not None:
        axes.plot(line.null("cosine"), place, "x", color=MUTED, markersize=4.5)
    if raw is not None and centred is not None:
        axes.hlines(place, *sorted((raw, centred)), color=_colour(line), linewidth=0.8)
    if centred is not None:
        axes.plot(centred, place, "o", color=_colour(line), markerfacecolor=PAPER, markersize=5)
    if raw is not None:
        axes.plot(raw, place, "o", color=_colour(line), markersize=5)


# ---------------------------------------------------------------- stitching


def stitching_figure(stitching: Stitching) -> Figure:
    """Returns bars of the loss recovered per rung; where it can be done in two ways, two bars."""
    kinds = list(dict.fromkeys(line.kind for line in stitching.lines))

    def paint(axes):
        _rungs(axes, kinds)
        keys = ("loss_recovered", "loss_recovered_low", "loss_recovered_high")
        values = [*_values(stitching.lines, *keys), 0.0, 1.0]
        axes.set_xlim(max(min(values), -0.6) - 0.04, max(values) + 0.06)
        _reference_lines(axes, stitching)
        for place, kind in enumerate(kinds):
            ways = stitching.ways(kind)
            for i, line in enumerate(ways):
                _bar(axes, place + 0.36 * (i - (len(ways) - 1) / 2), line, stitching)
        axes.set_title(stitching.sites, pad=21)
        axes.set_xlabel("loss recovered")

    name = f"stitching {stitching.source} {stitching.target} {stitching.sites}"
    height = _height(len(kinds)) * 1.25
    svg = draw(paint, name=name, height=height, margins=_Margins(top=0.5))
    return Figure(svg, _stitching_words(stitching))


def _reference_lines(axes, stitching: Stitching) -> None:
    marks = {"zero": 0.0, "clean": 1.0, "mean": stitching.reference("mean")}
    marks["own dictionary"] = stitching.reference("own_sae")
    known = {name: value for name, value in marks.items() if value is not None}
    for i, (name, value) in enumerate(sorted(known.items(), key=lambda mark: mark[1])):
        solid = name in ("zero", "clean")
        axes.axvline(value, color=MUTED, linewidth=0.9, linestyle="-" if solid else (0, (3, 2)))
        axes.annotate(
            name,
            (value, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2 if i % 2 else 10),  # two storeys: neighbours may stand close
            textcoords="offset points",
            ha="right" if value > 0.6 else "center",
            fontsize=7,
            color=MUTED,
        )


def _bar(axes, place: float, line: Line, stitching: Stitching) -> None:
    value, null = line.value("loss_recovered"), line.null("loss_recovered")
    if value is not None:
        colour = STRONG if stitching.surely_above_controls(line) else NONE
        axes.barh(
            place, value, height=0.32, color=colour, alpha=0.45 if line.way == "features" else 0.85
        )
        if bounds := _bounds(line.aligned, "loss_recovered"):
            axes.hlines(place, *bounds, color=INK, linewidth=1.2)
    if null is not None:
        axes.plot(max(null, axes.get_xlim()[0]), place, "x", color=INK, markersize=4)


def _stitching_words(stitching: Stitching) -> str:
    scores = ", ".join(
        f"{n.kind} {n.way} {number(n.value('loss_recovered'), 2)} "
        f"(shuffled {number(n.null('loss_recovered'), 2)})"
        for n in stitching.lines
    )
    return (
        f"Loss recovered in {stitching.target} {stitching.site_target} from {stitching.source} "
        f"{stitching.site_source}: {scores}; own dictionary "
        f"{number(stitching.reference('own_sae'), 2)}, mean "
        f"{number(stitching.reference('mean'), 2)}."
    )


# ---------------------------------------------------------------- single features


def correlation_figure(rows: list[dict]) -> Figure:
    """Returns one histogram of per-feature correlations above the other, a rung each."""
    rows = _by_ladder(rows)

    def paint(axes):
        _rungs(axes, [row["map"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -1.1)
        axes.set_xlim(min(map(_lowest, rows)), 1)
        for place, row in enumerate(rows):
            _hill(axes, place, row["correlation_histogram"])
        axes.axvline(0, color=MUTED, linewidth=0.9)
        axes.set_title(_sites(rows[0]))
        axes.set_xlabel("correlation of a feature, predicted and true")

    svg = draw(paint, name=f"correlation {_place(rows[0])}", height=0.75 + 0.34 * len(rows))
    means = ", ".join(f"{r['map']} {number(_mean(r['correlation_histogram']), 2)}" for r in rows)
    return Figure(svg, f"Histograms of feature correlations, {_place(rows[0])}; means {means}.")


def _lowest(row: dict) -> float:
    """Returns the left end of a histogram's first bin that is not empty, 0 at most."""
    histogram = row["correlation_histogram"]
    filled = [edge for edge, n in zip(histogram["edges"], histogram["counts"]) if n]
    return min([*filled, 0.0])


def _hill(axes, place: int, histogram: dict) -> None:
    highest = max(histogram["counts"]) or 1
    tops = [place + 0.3 - 1.1 * count / highest for count in histogram["counts"]]
    axes.stairs(
        tops,
        histogram["edges"],
        baseline=place + 0.3,
        fill=True,
        color=SERIES[1],
        alpha=0.55,
        linewidth=0,
    )
    if (mean := _mean(histogram)) is not None:
        axes.vlines(mean, place - 0.1, place + 0.3, color=INK, linewidth=1.4)


def _mean(histogram: dict) -> float | None:
    """Returns the mean of what a histogram counts, from the middles of its bins."""
    counts, edges = histogram["counts"], histogram["edges"]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    total = sum(counts)
    return sum(c * m for c, m in zip(counts, middles)) / total if total else None


def frequency_figure(rows: list[dict]) -> Figure:
    """Returns the mean correlation of features by how often they fire, one line per rung."""
    rows = _by_ladder(rows)

    def paint(axes):
        for row in rows:
            bins = [b for b in row["correlation_by_frequency"] if b["mean"] is not None]
            axes.plot(
                [_middle(b) for b in bins],
                [b["mean"] for b in bins],
                marker="o",
                markersize=3,
                **rung_line(row["map"]),
            )
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.set_title(_sites(rows[0]))
        open_axes(axes, "firing frequency of a feature", "mean correlation")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, columnspacing=1.4)

    under = 0.5 + 0.16 * -(-len(rows) // 3)
    margins = dataclasses.replace(OPEN, bottom=under)
    name = f"frequency {_place(rows[0])}"
    svg = draw(paint, name=name, height=1.7 + under, margins=margins)
    kinds = ", ".join(row["map"] for row in rows)
    return Figure(svg, f"Mean correlation by firing frequency, {_place(rows[0])}, for {kinds}.")


def plain_ticks(axis) -> None:
    """Writes the ticks of a logarithmic axis as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1,) if high > 50 * low else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _middle(b: dict) -> float:
    """Returns the geometric middle of a frequency bin (its upper end where it starts at 0)."""
    return (b["low"] * b["high"]) ** 0.5 if b["low"] > 0 else b["high"]


def _by_ladder(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: ladder_place(row["map"]))


def rung_line(kind: str) -> dict:
    return {
        "label": kind,
        "color": RUNG_COLOURS.get(kind, INK),
        "linestyle": DASHES[ladder_place(kind) % len(DASHES)],
    }


def open_axes(axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(axis="y", which="both", labelcolor=MUTED)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _sites(row: dict) -> str:
    return site_words(row["site_source"], row["site_target"])


def _place(row: dict) -> str:
    return f"{row['source']} to {row['target']}, {_sites(row)}"


# ---------------------------------------------------------------- dictionaries and training


def density_figure(row: dict) -> Figure:
    """Returns the histogram of log10 firing frequency of one dictionary's features."""
    return _histogram_figure(
        row, "log10_frequency_histogram", "density", "log10 of the firing frequency"
    )


def decoder_cosine_figure(row: dict) -> Figure:
    """Returns the histogram of the cosines of one dictionary's decoder rows to the nearest."""
    return _histogram_figure(
        row, "decoder_cosine_histogram", "cosine", "cosine to the nearest feature"
    )


def _histogram_figure(row: dict, key: str, kind: str, what: str) -> Figure:
    histogram = row[key]
    name = f"{row['model']} {row['site']} {dictionary_name(row)}"

    def paint(axes):
        axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=SERIES[1], alpha=0.7)
        axes.set_title(name)
        open_axes(axes, what, "features")

    total = number(int(sum(histogram["counts"])))
    words = f"Histogram of the {what} of {total} features of {name}."
    return Figure(draw(paint, name=f"{kind} {name}", width=2.6, height=1.7, margins=OPEN), words)


def curves_figure(curves: Curves) -> Figure:
    """Returns the training losses of a group, one line per member, shuffled ones dashed."""
    names = curves.labels if len(curves.labels) <= MAX_NAMES else []
    columns = 2 if max(map(len, names), default=0) < 36 else 1

    def paint(axes):
        _losses(axes, curves)
        axes.set_title(textwrap.shorten(curves.what.replace("-", " "), 56, placeholder=" …"))
        open_axes(axes, "step", "loss")
        if names:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)

    under = 0.45 + 0.17 * -(-len(names) // columns)
    margins = dataclasses.replace(OPEN, bottom=under)
    svg = draw(paint, name=f"curves {curves.what}", width=4.6, height=2 + under, margins=margins)
    ends = ", ".join(f"{n} {number(v[-1])}" for n, v in zip(curves.labels, curves.losses))
    return Figure(svg, f"{curves.what}: last training loss {ends}.")


def _losses(axes, curves: Curves) -> None:
    every = -(-len(curves.steps) // MAX_POINTS)
    stems = [re.sub(r"[ -]\(?shuffled\)?", "", label) for label in curves.labels]
    order = list(dict.fromkeys(stems))
    for label, stem, losses in zip(curves.labels, stems, curves.losses):
        axes.plot(
            curves.steps[::every],
            losses[::every],
            "-" if stem == label else "--",
            label=label,
            color=SERIES[order.index(stem) % len(SERIES)],
            linewidth=1,
        )
    low, high = min(map(min, curves.losses)), max(map(max, curves.losses))
    if 0 < 5 * low < high:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
