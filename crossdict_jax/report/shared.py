"""Sections about what dictionaries share: matched features, layers, crosscoders."""

from crossdict_jax.report.blocks import Block, Code, Panels, hidden
from crossdict_jax.report.plots import INK, PAPER, STRONG, Figure, draw
from crossdict_jax.report.results import Run
from crossdict_jax.report.tables import (
    Cell,
    flat_table,
    number,
    percent,
    score,
    scores,
    share,
    table,
)
from crossdict_jax.results import PAIR, pair_of, site_words

MEASURES = {"cka": "CKA", "svcca": "SVCCA", "rsa": "RSA", "mutual_knn": "mutual kNN"}
LATENTS = ("shared", "shared_confirmed", "exclusive", "exclusive_refuted", "exclusive_missed")
MAX_LABELS = 12  # layers of a model beyond which a heat map prints no numbers
INVENTED = 0.2  # share of latents that pass as shared on shuffled rows, from which on it is told


def pair_name(row: dict) -> str:
    sites = site_words(row["site_source"], row["site_target"])
    return f"{row['source']} ↔ {row['target']}, {sites}"


def funnels(run: Run) -> list[dict]:
    """Returns the rows of matching.jsonl of aligned pairs, the null of KEY as ``shuffled.KEY``."""
    rows = run.rows["matching"]
    nulls = {pair_of(row): row for row in rows if row["pairing"] == "shuffled"}
    merged = []
    for row in rows:
        if row["pairing"] == "aligned":
            live = min(row["live_source"], row["live_target"])  # as many as could be matched
            null = nulls.get(pair_of(row), {})
            beside = {f"shuffled.{key}": entry for key, entry in null.items()}
            shares = {"share": row["confirmed"] / live if live else None}
            if null and live:
                shares["shuffled.share"] = null["confirmed"] / live
            merged.append(row | beside | shares)
    return merged


def answer(run: Run) -> list[tuple[str, str]]:
    """Returns one sentence with its heading, none without matching.jsonl."""
    rows = funnels(run)
    if not rows:
        return []
    row = max(rows, key=lambda row: row["confirmed"])
    confirmed, by_luck = row["confirmed"], row.get("shuffled.confirmed", 0)
    if confirmed <= by_luck:
        text = (
            "Negative result: held-out text confirms no more one-to-one pairs of features than "
            f"shuffled pairs give ({number(confirmed)} against {number(by_luck)})."
        )
    else:
        text = (
            f"At {site_words(row['site_source'], row['site_target'])}, with the highest count, "
            f"{number(confirmed)} features of {row['source']} have a partner in {row['target']} "
            f"that held-out text confirms beyond the token, {percent(row['share'], 0)} of those "
            f"that could (shuffled pairs: {number(by_luck)}); their mean correlation is "
            f"{number(row['r_test_confirmed'], 2)}."
        )
    return [("Which features", text)]


# ---------------------------------------------------------------- matched features


def matching_section(run: Run) -> list[Block]:
    """Returns how many features are matched one to one, and what is left on held-out text."""
    rows = funnels(run)
    if not rows:
        return []
    row = rows[0]
    titles = {
        "matched": f"matched|{row['method'].replace('_', ' ')}",
        "significant": f"dependent|FDR {percent(row['fdr'], 0)}",
        "strong": f"strong|r ≥ {number(row['minimum_r'], 1)}",
        "confirmed": "confirmed|beyond the token",
    }
    correlations = {"r_train": "r, training", "r_test": "r, held out", "r_token": "r by the token"}
    counts = [
        {
            "dictionaries": pair_name(row),
            "features": f"{number(row['width_source'])} / {number(row['width_target'])}",
            "live": f"{number(row['live_source'])} / {number(row['live_target'])}",
            **{t: score(row, key, 2, null=f"shuffled.{key}") for key, t in titles.items()},
        }
        | {
            "of live": share(row, "share", null="shuffled.share"),
            **{t: score(row, key, 2, null=f"shuffled.{key}") for key, t in correlations.items()},
        }
        for row in rows
    ]
    caption = (
        f"From all features to confirmed pairs: matched on {number(row['n_rows_train'])} training "
        f"rows, confirmed on {number(row['n_rows_test'])} held-out rows; ×: shuffled pairs"
    )
    raw = flat_table(run.rows["matching"], "Every column of matching.jsonl", PAIR)
    blocks: list[Block] = [
        "Two features of two dictionaries are matched when each is the other’s partner by their "
        "correlation over the same rows of training text. On held-out text a match is dependent "
        "when its correlation beats circular shifts of one feature against the other, at the "
        "stated false discovery rate; strong when it also reaches the stated size; and confirmed "
        "when, besides, it beats every shuffle among rows with the same tokens.",
        table(caption, counts),
        hidden(raw),
    ]
    if decoders := [row for row in run.rows["similarity"] if row["kind"] == "decoders"]:
        directions = [
            {"dictionaries": pair_name(row), "confirmed pairs": score(row, "n_features")}
            | {
                title: Cell(
                    number(row[key], 2),
                    f"p {number(row[f'{key}_p'], 2)}",
                    number(row[f"{key}_null"], 2),
                )
                for key, title in MEASURES.items()
            }
            for row in decoders
        ]
        caption = "Decoder directions of confirmed pairs; ×: the mean of random matchings of them"
        blocks += [
            "Do the directions that confirmed pairs write lie alike in both models? With fewer "
            "pairs than dimensions SVCCA is near 1 whatever is compared: only its distance to "
            "random matchings counts.",
            table(caption, directions),
        ]
    return blocks


# ---------------------------------------------------------------- layers


def layers_section(run: Run) -> list[Block]:
    """Returns how alike the layers of two models are, and which pairs of layers to take."""
    rows = [row for row in run.rows["similarity"] if row["kind"] == "layers"]
    if not rows:
        return []
    blocks: list[Block] = [
        "How alike are the models’ activations at the same held-out positions, layer by layer? "
        "These measures need no dictionary and no map. They do not change (RSA hardly) when a "
        "model’s space is rotated, and a high score is no promise that features match."
    ]
    for models in dict.fromkeys((row["source"], row["target"]) for row in rows):
        group = [row for row in rows if (row["source"], row["target"]) == models]
        blocks.append(
            Panels(
                [heat_map(group, measure) for measure in MEASURES],
                "Every layer of one model (down) with every layer of the other (across); the "
                "darker, the more alike, up to 1. CKA and RSA are 0 for independent rows, SVCCA "
                "and mutual kNN are not: compare with the shuffled rows.",
            )
        )
    for row in proposals(run):
        blocks += [
            f"The layers of {row['target']} that suit those of {row['source']} best by CKA, in "
            f"their order, have a mean CKA of {number(row['cka'], 2)}; those of this run "
            f"{number(row['cka_of_run'], 2)}. To run with them:",
            Code(f"--config.layer_pairs={row['layer_pairs']}"),
        ]
    raw = flat_table(rows, "Every pair of layers", PAIR)
    return [*blocks, hidden(raw)]


def proposals(run: Run) -> list[dict]:
    """Returns the rows of similarity.jsonl that propose pairs of layers."""
    return [row for row in run.rows["similarity"] if row["kind"] == "proposal"]


def heat_map(rows: list[dict], measure: str) -> Figure:
    """Returns one measure of every layer of the source (down) and of the target (across)."""
    from matplotlib.colors import ListedColormap, to_rgb

    source, target = (
        list(dict.fromkeys(row[f"site_{side}"] for row in rows)) for side in ("source", "target")
    )
    (a, b), name = pair_of(rows[0])[:2], MEASURES[measure]
    grid = [[0.0] * len(target) for _ in source]
    for row in rows:
        grid[source.index(row["site_source"])][target.index(row["site_target"])] = row[measure]
    null = number(sum(row[f"{measure}_null"] for row in rows) / len(rows), 2)
    # One colour whose opacity is the value, so that one drawing serves light and dark.
    shades = ListedColormap([(*to_rgb(STRONG), i / 100) for i in range(101)])

    def paint(axes):
        axes.pcolormesh(grid, cmap=shades, vmin=0, vmax=1)
        if max(len(source), len(target)) <= MAX_LABELS:
            style = {"ha": "center", "va": "center", "size": 6}
            for y, line in enumerate(grid):
                for x, entry in enumerate(line):
                    text = number(entry, 2).replace("0.", ".", 1)
                    axes.text(x + 0.5, y + 0.5, text, color=PAPER if entry > 0.65 else INK, **style)
        axes.invert_yaxis()
        for axis, sites in ((axes.xaxis, target), (axes.yaxis, source)):
            every = -(-len(sites) // MAX_LABELS)
            at = range(0, len(sites), every)
            axis.set_ticks([i + 0.5 for i in at], [sites[i].rpartition(".")[2] for i in at])
            axis.set_tick_params(length=0)
        axes.set(title=f"{name} (shuffled rows {null})", xlabel=f"{b}, layer", ylabel=f"{a}, layer")

    best = max(rows, key=lambda row: row[measure])
    told = (
        f"{name} of every layer of {a} with every layer of {b}: highest {number(best[measure], 2)} "
        f"at {site_words(*pair_of(best)[2:])}; shuffled rows {null} on average."
    )
    return draw(paint, told, height=0.7 + 2.5 * len(source) / len(target))


# ---------------------------------------------------------------- crosscoders


def crosscoder_section(run: Run) -> list[Block]:
    """Returns what joint codes of all models explain, and whose their latents are."""
    rows = run.rows["crosscoder"]
    if not rows:
        return []
    worst = {
        row["sites"]: row["shared"]
        for row in rows
        if row["pairing"] == "shuffled" and row["shared"] > INVENTED
    }
    blocks: list[Block] = [
        "A crosscoder writes the activations of all models as one sparse code. FVU is what it "
        "leaves of a model’s held-out variance when all models are shown to it, the model alone, "
        "or all others. A latent is shared when its decoder norm in every model is at least a "
        "quarter of its largest, exclusive when only one model’s is. By Latent Scaling against "
        "circular shifts a shared latent is confirmed when it explains every model, an exclusive "
        "one refuted when another model shows it too. On shuffled rows nothing is shared, between "
        "a model and its copy everything is: what those rows say besides is what the method "
        "invents."
    ]
    blocks += [
        f"Trained on shuffled rows, where nothing is shared, {percent(invented, 0)} of the latents "
        f"still pass as shared ({sites}): decoder norms say little here. More steps, or a lower "
        "drop probability, separate them."
        for sites, invented in worst.items()
    ]
    for sites in dict.fromkeys(row["sites"] for row in rows):
        codes = [
            {
                "model": row["model"],
                "trained on": row["pairing"],
                **scores(row, "fvu", "fvu_alone", "fvu_from_others", "l0"),
                **scores(row, "dead_fraction", *LATENTS, cell=share),
            }
            for row in rows
            if row["sites"] == sites
        ]
        caption = f"One code of all models, {', '.join(dict.fromkeys(sites.split()))}"
        blocks.append(table(caption, codes))
    return blocks
