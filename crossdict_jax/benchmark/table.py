"""Benchmark rows as tables: for the terminal, and in Markdown."""

from __future__ import annotations

from typing import Any

SPEED = ("case", "contender", "time", "a second", "ratio", "of CPU time", "flops", "bytes")
MEMORY = ("case", "contender", "memory", "predicted", "ratio")
GROWTH = ("case", "contender", "memory", "ratio", "bytes a row more", "rows a second more")
TIME = ("case", "contender", "time")


def heading(found: dict[str, Any]) -> str:
    """Returns the machine, the versions and the ceilings in a few lines."""
    about, ceilings = found["machine"], found["ceilings"]
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    flops = ", ".join(
        f"{dtype} {si(value)}flop/s"
        for dtype, value in ceilings.items()
        if not dtype.endswith("copy")
    )
    return (
        f"{about['devices']} x {about['device']} ({about['processor']}, {about['cores']} cores, "
        f"load {about['load']:.1f}), Python {about['python']}, {versions}, commit "
        f"{about['commit']}.\nMeasured ceilings: matrix products {flops}; copies "
        f"{si(ceilings['copy'])}B/s read and written, by numpy {si(ceilings['host_copy'])}B/s."
    )


def text(rows: list[dict[str, Any]]) -> str:
    """Returns the rows of one benchmark as lines of equal columns, for the terminal."""
    lines = _lines(rows)
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = ((cell.ljust(width) for cell, width in zip(line, widths)) for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def markdown(found: dict[str, Any]) -> str:
    """Returns everything measured: the heading, and a table for each benchmark."""
    parts = [heading(found).replace("\n", " ")]
    for name in dict.fromkeys(row["benchmark"] for row in found["rows"]):
        columns, *lines = _lines([row for row in found["rows"] if row["benchmark"] == name])
        table = [f"| {' | '.join(cells)} |" for cells in (columns, *lines)]
        parts.append(
            "\n".join([f"**{name}**\n", table[0], "|---" * len(columns) + "|", *table[1:]])
        )
    return "\n\n".join(parts) + "\n"


def _lines(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The heads of the columns, and the cells of every row of one benchmark."""
    if "growth" in rows[0]:
        return [GROWTH, *map(_growth_cells, rows)]
    if "memory" in rows[0]:
        return [MEMORY, *map(_memory_cells, rows)]
    if "ratio" not in rows[0]:
        return [TIME, *((row["case"], row["contender"], f"{si(row['seconds'])}s") for row in rows)]
    return [SPEED, *map(_speed_cells, rows)]


def _speed_cells(row: dict[str, Any]) -> tuple[str, ...]:
    version = row.get("version")
    return (
        row["case"],
        row["contender"] + (f" {version}" if version else ""),
        f"{si(row['seconds'])}s",
        f"{si(row['per_s'])}{row['unit']}",
        f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
        f"{row['cpu_ratio']:.2f}",
        _share(row["flop_fraction"]),
        _share(row["byte_fraction"]),
    )


def _memory_cells(row: dict[str, Any]) -> tuple[str, ...]:
    predicted = row["predicted"]
    return (
        row["case"],
        row["contender"],
        f"{si(row['memory'])}B",
        "–" if predicted is None else f"{si(predicted)}B",
        f"{row['ratio']:.2f}",
    )


def _growth_cells(row: dict[str, Any]) -> tuple[str, ...]:
    further = [row["growth"], row["rows_per_s"]]
    return (
        row["case"],
        row["contender"],
        f"{si(row['memory'])}B",
        f"{row['ratio']:.2f}",
        *("–" if value is None else si(value).strip() for value in further),
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def si(value: float) -> str:
    """Returns a number with three digits and the prefix of its size, as in ``1.23 G``."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value / 1e-6:.3g} µ"
