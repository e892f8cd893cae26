"""What two dictionaries share and how alike two models' layers are, for the page and terminal."""

from __future__ import annotations

import dataclasses
from itertools import groupby

from crossdict_jax.report.plots import INK, MUTED, OPEN, PAPER, STRONG, WEAK, Figure, draw
from crossdict_jax.report.results import PLACE, Results, site_words
from crossdict_jax.report.tables import Cell, Column, Table, flat_table, number, percent

MEASURES = {  # column of similarity.jsonl: its name
    "cka": "CKA",
    "svcca": "SVCCA",
    "rsa": "RSA",
    "mutual_knn": "mutual kNN",
}
MOST_NUMBERS = 12  # layers of a model beyond which a heat map prints no numbers
Funnel = tuple[dict, dict]  # the rows of aligned and of shuffled pairs


def section(results: Results) -> dict:
    """Returns the tables, figures and proposals that the page shows; empty ones where none are."""
    kinds = {
        kind: [row for row in results.similarity if row.get("kind") == kind]
        for kind in ("layers", "proposal", "decoders")
    }
    pairs = groupby(kinds["layers"], key=lambda row: (row["source"], row["target"]))
    layers = [list(rows) for _, rows in pairs]
    funnels = _funnels(results.matching)
    return {
        "funnels": _funnel_table(funnels) if funnels else None,
        "matching_raw": _raw(results.matching, "Every column of matching.jsonl"),
        "decoders": _decoder_table(kinds["decoders"]) if kinds["decoders"] else None,
        "maps": [[heat_map(rows, m, _marks(rows, results)) for m in MEASURES] for rows in layers],
        "proposals": kinds["proposal"],
        "similarity_raw": _raw(kinds["layers"], "Every pair of layers"),
    }


def _raw(rows: list[dict], caption: str) -> Table | None:
    return flat_table(rows, caption, PLACE) if rows else None


# ---------------------------------------------------------------- matched features


def _funnels(rows: list[dict]) -> list[Funnel]:
    """Aligned and shuffled rows of each pair of dictionaries."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in PLACE), {})[row["pairing"]] = row
    return [(g["aligned"], g.get("shuffled", {})) for g in groups.values() if "aligned" in g]


def _funnel_table(funnels: list[Funnel]) -> Table:
    row = funnels[0][0]
    columns = [
        Column("dictionaries", numeric=False),
        Column("features"),
        Column("live", hint=f"{number(row['minimum_firings'])} firings"),
        Column("matched", hint=row["method"].replace("_", " ")),
        Column("dependent", hint=f"FDR {percent(row['fdr'], 0)}"),
        Column("strong", hint=f"r ≥ {number(row['minimum_r'], 1)}"),
        Column("confirmed", hint="beyond the token"),
        Column("of live"),
        Column("r, training"),
        Column("r, held out"),
        Column("r by the token"),
    ]
    caption = (
        f"From all features to confirmed pairs: matched on {number(row['n_rows_train'])} training "
        f"rows, confirmed on {number(row['n_rows_test'])} held-out rows; ×: shuffled pairs"
    )
    return Table(caption, columns, [_funnel(*funnel) for funnel in funnels])


def _funnel(row: dict, null: dict) -> list[Cell]:
    return [
        Cell(_places(row)),
        *(Cell(f"{number(row[f'{n}_source'])} / {number(row[f'{n}_target'])}") for n in SIDES),
        *(_counted(row, null, key) for key in ("matched", "significant", "strong", "confirmed")),
        Cell(percent(_share(row), 0), null=percent(_share(null), 0) if null else ""),
        *(_counted(row, null, key) for key in ("r_train", "r_test", "r_token")),
    ]


SIDES = ("width", "live")  # columns that both dictionaries have


def _counted(row: dict, null: dict, key: str) -> Cell:
    return Cell(number(row[key], 2), null=number(null[key], 2) if null else "")


def _share(row: dict) -> float | None:
    """Confirmed pairs, of as many as there could be."""
    live = min(row["live_source"], row["live_target"])
    return row["confirmed"] / live if live else None


def _places(row: dict) -> str:
    return (
        f"{row['source']} ↔ {row['target']}, {site_words(row['site_source'], row['site_target'])}"
    )


def answer(results: Results) -> list[tuple[str, str]]:
    """Returns one sentence with its heading, none without matching.jsonl."""
    funnels = _funnels(results.matching)
    if not funnels:
        return []
    row, null = max(funnels, key=lambda funnel: funnel[0]["confirmed"])
    by_luck = null.get("confirmed", 0)
    if row["confirmed"] <= by_luck:
        text = (
            "Negative result: held-out text confirms no more one-to-one pairs of features than "
            f"shuffled pairs give ({number(row['confirmed'])} against {number(by_luck)})."
        )
        return [("Which features", text)]
    text = (
        f"At {site_words(row['site_source'], row['site_target'])}, where most are, "
        f"{number(row['confirmed'])} features of {row['source']} have a partner in "
        f"{row['target']} that held-out text confirms beyond the token, {percent(_share(row), 0)} "
        f"of those that could (shuffled pairs: {number(by_luck)}); their mean correlation is "
        f"{number(row['r_test_confirmed'], 2)}."
    )
    return [("Which features", text)]


# ---------------------------------------------------------------- layers and directions


def _decoder_table(rows: list[dict]) -> Table:
    columns = [Column("dictionaries", numeric=False), Column("confirmed pairs")]
    columns += [Column(name) for name in MEASURES.values()]
    body = [
        [
            Cell(_places(row)),
            Cell(number(row["n_features"])),
            *(_against_random(row, m) for m in MEASURES),
        ]
        for row in rows
    ]
    caption = "Decoder directions of confirmed pairs; ×: the mean of random matchings of them"
    return Table(caption, columns, body)


def _against_random(row: dict, measure: str) -> Cell:
    if row[measure] is None:
        return Cell(number(None))
    p = f"p {number(row[f'{measure}_p'], 2)}"
    return Cell(number(row[measure], 2), note=p, null=number(row[f"{measure}_null"], 2))


def _marks(rows: list[dict], results: Results) -> tuple[set, set]:
    """Pairs of sites that the run compares, and those that are proposed, of two models."""
    pair = rows[0]["source"], rows[0]["target"]
    run = {
        (row["site_source"], row["site_target"])
        for row in results.matching
        if (row["source"], row["target"]) == pair
    }
    kind = rows[0]["site_source"].rpartition(".")[0]
    proposed = {
        tuple(f"{kind}.{layer}" for layer in words.split(":"))
        for row in results.similarity
        if row.get("kind") == "proposal" and (row["source"], row["target"]) == pair
        for words in row["layer_pairs"].split(",")
    }
    return run, proposed


def heat_map(rows: list[dict], measure: str, marks: tuple[set, set]) -> Figure:
    """Returns one measure of every layer of the source (down) and of the target (across)."""
    source, target = (
        list(dict.fromkeys(r[f"site_{s}"] for r in rows)) for s in ("source", "target")
    )
    name, (a, b) = MEASURES[measure], (rows[0]["source"], rows[0]["target"])
    null = sum(row[f"{measure}_null"] for row in rows) / len(rows)

    def paint(axes):
        for row in rows:
            place = target.index(row["site_target"]), source.index(row["site_source"])
            _cell(axes, place, row[measure], numbers=max(len(source), len(target)) <= MOST_NUMBERS)
        for sites, colour in zip(marks, (MUTED, WEAK)):
            for site_a, site_b in sites:
                _outline(axes, target.index(site_b), source.index(site_a), colour)
        _layer_axes(axes, source, target)
        axes.set_title(f"{name} (shuffled rows {number(null, 2)})")
        axes.set_xlabel(f"{b}, layer")
        axes.set_ylabel(f"{a}, layer")

    height = 0.7 + 2.5 * len(source) / len(target)
    margins = dataclasses.replace(OPEN, right=0.4)
    svg = draw(paint, name=f"heat {a} {b} {measure}", height=height, margins=margins)
    best = max(rows, key=lambda row: row[measure])
    words = (
        f"{name} of every layer of {a} with every layer of {b}: highest {number(best[measure], 2)} "
        f"at {site_words(best['site_source'], best['site_target'])}; shuffled rows "
        f"{number(null, 2)} on average."
    )
    return Figure(svg, words)


def _cell(axes, place: tuple[int, int], value: float, *, numbers: bool) -> None:
    """A square whose opacity is the value, so that one drawing serves light and dark."""
    from matplotlib.patches import Rectangle

    x, y = place
    strength = min(max(value, 0.0), 1.0)
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=STRONG, alpha=strength, linewidth=0))
    if numbers:
        colour = PAPER if strength > 0.65 else INK
        axes.text(
            x,
            y,
            number(value, 2).replace("0.", ".", 1),
            ha="center",
            va="center",
            size=6,
            color=colour,
        )


def _outline(axes, x: int, y: int, colour: str) -> None:
    from matplotlib.patches import Rectangle

    inset = 0.44 if colour == WEAK else 0.36  # both can be seen where they meet
    corner = x - inset, y - inset
    axes.add_patch(Rectangle(corner, 2 * inset, 2 * inset, fill=False, edgecolor=colour))


def _layer_axes(axes, source: list[str], target: list[str]) -> None:
    for axis, sites in ((axes.xaxis, target), (axes.yaxis, source)):
        every = -(-len(sites) // MOST_NUMBERS)
        axis.set_ticks(range(0, len(sites), every), [s.rpartition(".")[2] for s in sites[::every]])
        axis.set_tick_params(length=0)
    axes.set_xlim(-0.5, len(target) - 0.5)
    axes.set_ylim(len(source) - 0.5, -0.5)
    axes.spines["bottom"].set_visible(False)


def flag(proposal: dict) -> str:
    """Returns the setting that takes up a proposal."""
    return f"--config.layer_pairs={proposal['layer_pairs']}"


def lines(results: Results) -> list[str]:
    """Returns what the terminal says of confirmed pairs and of layers."""
    words = [
        f"{_places(row)}: {number(row['matched'])} features matched, {number(row['confirmed'])} "
        f"confirmed (shuffled pairs: {number(null.get('confirmed'))}), "
        f"{percent(_share(row), 0)} of live ones"
        for row, null in _funnels(results.matching)
    ]
    words += [
        f"{row['source']} ↔ {row['target']}: layers most alike by CKA, {number(row['cka'], 2)} "
        f"(this run's {number(row['cka_of_run'], 2)}): {flag(row)}"
        for row in results.similarity
        if row.get("kind") == "proposal"
    ]
    return words
