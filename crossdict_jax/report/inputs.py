"""Sections about what was run: settings, pairing, dictionaries, training, time, limits, words."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

from crossdict_jax.config import Config, to_dict
from crossdict_jax.config.settings import spell
from crossdict_jax.dictionaries.base import find
from crossdict_jax.report.blocks import Block, Code, Details, Facts, Panels
from crossdict_jax.report.plots import SERIES, histogram_figure, line_figure
from crossdict_jax.report.results import DIVERGED, Run
from crossdict_jax.report.tables import Cell, Table, heading, number, score, scores, share, table
from crossdict_jax.results import SCORES, SPINE, map_order
from crossdict_jax.workdir import flatten

MAX_POINTS = 200  # of a curve: more cannot be seen
LIMITS = (
    "A high score says that the target’s features can be computed from the source, not that both "
    "models use them alike; stitching comes closer, for whole activations.",
    "Token identity explains much of small models and early layers. What beats the mean but not "
    "the token map may be the word and nothing else; the context gain is the part beyond it.",
    "Only features that the dictionaries found are compared. Another seed or width finds others; "
    "the ceiling, where it was run, says how many.",
    "The best map named at the top was chosen on the held-out documents, which flatters it a bit.",
    "Intervals are over documents of one text source. They do not cover other text, other training "
    "runs of the models or other seeds of the dictionaries.",
    "Positions at which only one tokenizer ends a token are not compared; neither are first "
    "positions and rows with outlying norms.",
)


def run_section(config: Config, run: Run, root: Path) -> list[Block]:
    """Returns what was run, and how to run it again."""
    sae, text, stages, held_out = config.sae, run.pairing["text"], run.timing.values(), []
    for name in ("rows", "documents"):
        counts = [row[f"n_{name}"] or 0 for row in run.rows["transfer"]] or [0]
        ends = sorted({min(counts), max(counts)})
        held_out.append(f"{' to '.join(map(number, ends))} {name}")
    sizes = [f"{kind} {_by_split(text[kind])}" for kind in ("documents", "bytes")]
    devices = sorted({f"{stage['devices']} × {stage['device']}" for stage in stages})
    k = f"k {spell(sae.k)}, " * ("k" in find(sae.architecture).reads)
    trained = f"{sae.architecture}, width {spell(sae.width)}, {k}{sae.seeds} per model and site; "
    trained += f"{sae.steps:,} steps of {sae.batch_size:,} rows"
    sources = dict.fromkeys(sae.sources or ["train"])
    missing = [t.file for t in SPINE if not run.rows[t.file.removesuffix(".jsonl")]]
    missing += [] if run.curves else ["metrics.jsonl of trainings"]
    missing += [] if stages else ["timing.json"]
    facts = {
        "Models": ", ".join(run.models),
        "Text": "; ".join([config.text.source, *sizes]),
        "Rows, where all tokenizers end a token": _by_split(run.pairing["rows"]),
        "Scored on": f"{' of '.join(held_out)} of the test split",
        "Dictionaries": "; ".join(s if s != "train" else trained for s in sources),
        "Devices": ", ".join(devices) or "not recorded",
        "Not there or empty, so not shown": ", ".join(missing) or "nothing",
    }
    stored, folder = (shlex.quote(s) for s in (f"configs/stored.py:{root}", f"{root}-again"))
    again = f"python -m launch.experiment --config={stored} --workdir={folder}"
    return [Facts(facts.items()), "To run it again with the same settings:", Code(again)]


def _by_split(counts: dict[str, int]) -> str:
    """Returns "900 (630 train, 90 validation, 180 test)"."""
    parts = ", ".join(f"{number(n)} {split}" for split, n in counts.items())
    return f"{number(sum(counts.values()))} ({parts})"


def settings(config: Config) -> list[tuple[str, str]]:
    """Returns every setting as it is written on a command line."""
    return [(name, spell(value)) for name, value in flatten(to_dict(config))]


def coverage(pairing: dict) -> Table:
    """Returns how many token ends each model has, and how many all models share."""
    rows = [
        {"model": name, "token ends": score(m, "ends"), "coverage": share(m, "coverage", 1)}
        for name, m in pairing["models"].items()
    ]
    return table("Token ends that every model shares", rows)


def pairing_section(run: Run) -> Iterator[Block]:
    yield (
        "A row of the data is a position in a document at which every model’s tokenizer ends a "
        "token, so that all have read the same text. Coverage: how many of a model’s token ends "
        "are such positions."
    )
    yield coverage(run.pairing)
    # "texts" are windows again.
    counts = flatten({k: v for k, v in run.pairing.items() if k not in ("models", "texts")})
    facts = [(name.replace("_", " "), number(value)) for name, value in counts]
    yield Details("Counts of texts, rows kept and rows dropped", [Facts(facts)])


def fvu(row: dict) -> Cell:
    """Returns the FVU of a dictionary, with a warning where it is far above that of the mean."""
    value = row.get("fvu") or 0
    if value <= DIVERGED:
        return score(row, "fvu")
    return Cell(f"{number(value, 1)} ⚠", "far above 1", style="weak")


def dictionaries_section(run: Run) -> Iterator[Block]:
    yield (
        "Each model’s activations are written as sparse sums of features. CE is the cross-entropy "
        "in nats a token of the model that is written when its activation is untouched, zeroed, "
        "replaced by its mean, or by the dictionary’s reconstruction. What a dictionary misses no "
        "map into it can show."
    )
    sites = itemgetter("site", "site_output")  # two of a transcoder
    quality = [
        {"model": row["model"], "site": " to ".join(dict.fromkeys(sites(row)))}
        | {"dictionary": row["member"]}
        | scores(row, "width", "l0")
        | {"FVU": fvu(row), "dead": share(row, "dead_fraction", 1)}
        | scores(row, "ce_clean", "ce_zero", "ce_mean", "ce_sae", "kl_sae")
        | scores(row, "loss_recovered", "loss_recovered_mean")
        for row in run.rows["reconstruction"]
    ]
    yield table("Every dictionary on held-out text", quality)
    for key, axis, caption in (
        (
            "log10_frequency_histogram",
            "log10 of the firing frequency",
            "How often features fire on rows of training and test (log10 of the share). A hump far "
            "left is nearly dead, one near 0 fires on almost every row. Dead ones are left out.",
        ),
        (
            "decoder_cosine_histogram",
            "cosine to the nearest feature",
            "How alike features are: the cosine of each decoder row to the one most like it. A "
            "hump near 1 means that features were learned twice.",
        ),
    ):
        figures = [
            histogram_figure(row[key], "{model} {site} {member}".format(**row), axis)
            for row in run.rows["features"]
            if key in row
        ]
        if figures:
            yield Panels(figures, caption, "small")


def training_section(run: Run) -> Iterator[Block]:
    figures = []
    for title, labels, metrics in run.curves:
        steps, losses = [row["step"] for row in metrics], [*zip(*(row["loss"] for row in metrics))]
        every = -(-len(steps) // MAX_POINTS)
        stems = [re.sub(r"[ -]\(?shuffled\)?", "", label) for label in labels]
        order, lines = list(dict.fromkeys(stems)), {}
        for label, stem, curve in zip(labels, stems, losses):
            style = {"color": SERIES[order.index(stem) % len(SERIES)], "linewidth": 1}
            style["linestyle"] = "-" if stem == label else "--"
            lines[label] = (steps[::every], curve[::every], style)
        low, high = min(map(min, losses)), max(map(max, losses))
        ends = ", ".join(f"{n} {number(v[-1])}" for n, v in zip(labels, losses))
        words = f"{title}: last training loss {ends}."
        legend, log = 2 if max(map(len, lines)) < 36 else 1, "y" if 0 < 5 * low < high else ""
        shape = {"title": title, "words": words, "log": log, "legend": legend}
        figures.append(line_figure(lines, x="step", y="loss", **shape))
    if figures:
        caption = "Training losses, one line per member; dashed: shuffled pairs."
        yield Panels(figures, caption, "large")


def time_section(run: Run) -> Iterator[Block]:
    rows = [
        {"stage": name, "seconds": number(stage["wall_s"], 1)}
        | {f"{unit} a second": number(stage.get(f"{unit}_per_s"), 0) for unit in ("rows", "tokens")}
        for name, stage in run.timing.items()
    ]
    if rows:
        total = number(sum(stage["wall_s"] for stage in run.timing.values()), 1)
        yield table(f"Wall time of each stage: {total} s in all", rows)


def words_section(run: Run) -> Iterator[Block]:
    meanings = {heading(column.name): f"{column.meaning}." for column in SCORES if column.interval}
    meanings["loss recovered"] = "(CE zero − CE edited) / (CE zero − CE clean)."
    meanings["A, B"] = "the source and the target of a map."
    meanings["map token_target"] = "Means of the target’s own tokens: no map, but what a word says."
    for kind in sorted({row["map"] for row in run.rows["transfer"]}, key=map_order):
        module = f"crossdict_jax.maps.kinds.{kind}"
        if importlib.util.find_spec(module):
            words = importlib.import_module(module).__doc__ or kind  # python -OO has no docstrings
            meanings[f"map {kind}"] = words.partition("\n")[0]
    yield Facts(meanings.items(), "words")
