"""Sections about what dictionaries share: matched features, layers, crosscoders."""

from collections.abc import Iterator

from crossdict_jax.report.blocks import Block, Code, Panels
from crossdict_jax.report.plots import INK, PAPER, STRONG, Figure, drawing
from crossdict_jax.report.results import Run, highest
from crossdict_jax.report.tables import Cell, heading, number, percent, score, scores, share, table
from crossdict_jax.results import SIMILARITY, grouped, pair_of, pair_words, site_words

LATENTS = ("shared", "shared_confirmed", "exclusive", "exclusive_refuted", "exclusive_missed")
MAX_LABELS = 12  # layers of a model beyond which a heat map prints no numbers
INVENTED = 0.2  # least share of latents shared on shuffled rows that is told


def funnels(run: Run) -> list[dict]:
    """Returns the aligned rows of matching.jsonl, the null of KEY as ``shuffled.KEY``.

    ``share`` is confirmed matches over the live features that could be matched.
    """
    merged: dict[tuple, dict] = {}
    for row in run.rows["matching"]:
        live = min(row["live_source"], row["live_target"])
        confirmed = row["confirmed"]
        row = row | {"share": confirmed / live if live and confirmed is not None else None}
        prefix = "" if row["pairing"] == "aligned" else "shuffled."
        merged.setdefault(pair_of(row), {}).update({prefix + k: v for k, v in row.items()})
    return list(merged.values())


def answer(run: Run) -> str:
    """Returns the sentence about matched features, "" without matching.jsonl."""
    rows = funnels(run)
    row = highest(rows, "confirmed")
    if not row:
        untested = (
            "Matched features could not be put to the test: held-out text has one document, or one "
            "of half its length; raise text.documents or text.test_fraction."
        )
        return untested if rows else ""
    if all(each["share"] is None for each in rows):
        return (
            "No feature could be matched, as none of one side is live in the training rows; lower "
            "evaluation.minimum_firings or raise text.documents."
        )
    confirmed, by_luck = row["confirmed"], row.get("shuffled.confirmed", 0)
    if confirmed <= by_luck:
        return (
            "Negative result: held-out text confirms no more one-to-one pairs of features than "
            f"shuffled pairs give ({number(confirmed)} against {number(by_luck)})."
        )
    return (
        f"At {site_words(row['site_source'], row['site_target'])}, with the highest count, "
        f"{number(confirmed)} features of {row['source']} have a partner in {row['target']} "
        f"that held-out text confirms beyond the token, {percent(row['share'], 0)} of those "
        f"that could (shuffled pairs: {number(by_luck)}); their mean correlation is "
        f"{number(row['r_test_confirmed'], 2)}."
    )


def matching_section(run: Run) -> Iterator[Block]:
    rows = funnels(run)
    if not rows:
        return
    yield (
        "Features of two dictionaries are matched when each is the other’s partner by correlation "
        "over the same rows of training text. On held-out text a match is significant when its "
        "correlation beats circular shifts of one feature against the other; strong when it also "
        "reaches the stated size; confirmed when, besides, it beats every shuffle among rows with "
        "the same tokens."
    )
    row = rows[0]
    caption = (
        f"From live features to confirmed pairs ({row['method'].replace('_', ' ')}): matched on "
        f"{number(row['n_rows_train'])} training rows, confirmed on {number(row['n_rows_test'])} "
        f"held-out rows at a false discovery rate of {percent(row['fdr'], 0)}; strong from r "
        f"{number(row['minimum_r'], 1)}; ×: shuffled pairs"
    )
    counts = [
        {"dictionaries": pair_words(row, "↔")}
        | scores(row, "live_source", "live_target")
        | scores(row, "matched", "significant", "strong", "confirmed", null="shuffled.")
        | scores(row, "share", cell=share, null="shuffled.")
        | scores(row, "r_train", "r_test", "r_token", null="shuffled.")
        for row in rows
    ]
    yield table(caption, counts)
    directions = []
    for row in (row for row in run.rows["similarity"] if row["kind"] == "decoders"):
        cells = {"dictionaries": pair_words(row, "↔"), "confirmed pairs": score(row, "n_features")}
        for key in SIMILARITY:
            value, p, null = (number(row[f"{key}{end}"], 2) for end in ("", "_p", "_null"))
            cells[heading(key)] = Cell(value, f"p {p}", null)
        directions.append(cells)
    if directions:
        yield (
            "Do the directions that confirmed pairs write lie alike in both models? With fewer "
            "pairs than dimensions SVCCA is always near 1: only its distance to random matchings "
            "counts."
        )
        caption = "Decoder directions of confirmed pairs; ×: the mean of random matchings of them"
        yield table(caption, directions)


def layers_section(run: Run) -> Iterator[Block]:
    rows = [row for row in run.rows["similarity"] if row["kind"] == "layers"]
    if not rows:
        return
    yield (
        "How alike are the models’ activations at the same held-out positions, layer by layer? "
        "These measures need no dictionary and no map, and do not change (RSA hardly) when a "
        "model’s space is rotated. A high score is no promise that features match."
    )
    for group in grouped(rows, "source", "target").values():
        yield Panels(
            [heat_map(group, measure) for measure in SIMILARITY],
            "Every layer of one model (down) with every layer of the other (across); the darker, "
            "the more alike, up to 1. CKA and RSA are 0 for independent rows, SVCCA and mutual kNN "
            "are not: compare with the shuffled rows.",
        )
    alone = " these two models" if len(run.pairing["models"]) > 2 else ""
    for row in better_layers(run):
        yield (
            f"The layers of {row['target']} that suit those of {row['source']} best by CKA, in "
            f"their order, have a mean CKA of {number(row['cka'], 2)}; those of this run "
            f"{number(row['cka_of_run'], 2)}. To run{alone} with them:"
        )
        yield Code(f"--config.layer_pairs={row['layer_pairs']}")


def better_layers(run: Run) -> list[dict]:
    """Returns the proposals of layer pairs that are more alike than the run's own."""
    rows = (row for row in run.rows["similarity"] if row["kind"] == "proposal")
    return [row for row in rows if row["cka"] > row["cka_of_run"]]


def heat_map(rows: list[dict], measure: str) -> Figure:
    """Returns one measure of every layer of the source (down) and of the target (across)."""
    from matplotlib.colors import ListedColormap, to_rgb

    values = {pair_of(row)[2:]: row[measure] for row in rows}
    source, target = (list(dict.fromkeys(sites)) for sites in zip(*values))
    (a, b), name = pair_of(rows[0])[:2], heading(measure)
    null = number(sum(row[f"{measure}_null"] for row in rows) / len(rows), 2)
    # One colour, the value as opacity: one drawing for light and dark.
    shades = ListedColormap([(*to_rgb(STRONG), i / 100) for i in range(101)])
    best = max(values, key=values.get)
    told = (
        f"{name} of every layer of {a} with every layer of {b}: highest {number(values[best], 2)} "
        f"at {site_words(*best)}; shuffled rows {null} on average."
    )
    with drawing(told, height=0.7 + 2.5 * len(source) / len(target)) as (axes, figure):
        grid = [[values[s, t] for t in target] for s in source]
        axes.pcolormesh(grid, cmap=shades, vmin=0, vmax=1)
        if max(len(source), len(target)) <= MAX_LABELS:
            style = {"ha": "center", "va": "center", "size": 6}
            for (s, t), value in values.items():
                text = number(value, 2).replace("0.", ".", 1)
                colour = PAPER if value > 0.65 else INK
                axes.text(target.index(t) + 0.5, source.index(s) + 0.5, text, color=colour, **style)
        axes.invert_yaxis()
        for axis, sites in ((axes.xaxis, target), (axes.yaxis, source)):
            shown = range(0, len(sites), -(-len(sites) // MAX_LABELS))
            axis.set_ticks([i + 0.5 for i in shown], [sites[i].rpartition(".")[2] for i in shown])
            axis.set_tick_params(length=0)
        axes.set(title=f"{name} (shuffled rows {null})", xlabel=f"{b}, layer", ylabel=f"{a}, layer")
    return figure


def crosscoder_section(run: Run) -> Iterator[Block]:
    rows = run.rows["crosscoder"]
    if not rows:
        return
    yield (
        "A crosscoder writes the activations of all models as one sparse code. FVU is what it "
        "leaves of a model’s held-out variance when it is shown all models, this one, or all "
        "others. A latent is shared when its decoder norm in every model is at least a quarter of "
        "its largest, exclusive when only one model’s is. By Latent Scaling against circular "
        "shifts a shared latent is confirmed when it explains every model, an exclusive one "
        "refuted when another model shows it too. On shuffled rows nothing is shared, between a "
        "model and its copy everything: what those rows say besides is what the method invents."
    )
    for (all_sites,), of_sites in grouped(rows, "sites").items():
        sites = ", ".join(dict.fromkeys(all_sites.split()))
        invented = max((r["shared"] for r in of_sites if r["pairing"] == "shuffled"), default=0)
        if invented > INVENTED:
            yield (
                f"Trained on shuffled rows, where nothing is shared, {percent(invented, 0)} of the "
                f"latents still pass as shared ({sites}): decoder norms say little here. More "
                "steps, or a lower drop probability, separate them."
            )
        codes = [
            {"model": row["model"], "trained on": row["pairing"]}
            | scores(row, "fvu", "fvu_alone", "fvu_from_others", "l0")
            | scores(row, "dead_fraction", *LATENTS, cell=share)
            for row in of_sites
        ]
        yield table(f"One code of all models, {sites}", codes)
