"""The page of a run: what the template needs, gathered, and the html file written."""

from __future__ import annotations

import importlib.metadata
import operator
import platform
import shlex
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from crossdict_jax.config import Config, to_dict
from crossdict_jax.config.settings import spell
from crossdict_jax.report import (
    answer,
    causal_features,
    crosscoder,
    moved,
    plots,
    shared,
    tables,
    together,
)
from crossdict_jax.report.features import feature_tables
from crossdict_jax.report.html import fill
from crossdict_jax.report.results import (
    PLACE,
    Comparison,
    Results,
    Stitching,
    ladder_place,
    read_results,
)
from crossdict_jax.studies.efficiency import section as efficiency
from crossdict_jax.studies.loss_ablation import section as ablation
from crossdict_jax.studies.pareto import section as pareto
from crossdict_jax.workdir import Workdir, read_jsonl, write_text

HERE = Path(__file__).parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
RUNG_WORDS = {
    "mean": "The training mean of the target’s features, the same for every row.",
    "token": "The mean of the target’s features given the source’s token that ends there; tokens "
    "never seen fall back to the mean.",
    "token_target": "The same table, by the target’s own token.",
    "procrustes": "A rotation of the source’s centred, scaled activations, then the target’s "
    "encoder.",
    "ridge": "An affine map of the source’s activations, then the target’s encoder.",
    "ridge_codes": "An affine map of the source’s features.",
    "low_rank": "An affine map of limited rank, then the target’s encoder.",
    "token_ridge": "The token table, then ridge on what the table leaves over.",
    "mlp": "A three-layer network on the source’s features, trained with four losses; known to "
    "users as the hypernetwork.",
    "token_mlp": "The token table, then such a network on what the table leaves over of features.",
    "hypernetwork": "A network that writes the weights of a map from descriptions of both "
    "dictionaries.",
    "crosscoder": "One sparse code shared by all models, computed here from the source alone.",
}


def write_pareto(work: Workdir) -> Path:
    """Writes ``report/pareto.html``, complete in itself, and returns its path.

    Raises:
      UserError: results/pareto.jsonl is missing or damaged.
    """
    page = work.report / "pareto.html"
    section = pareto.section(read_jsonl(work.result("pareto.jsonl")))
    write_text(page, _fill("pareto_page.html.j2", name=work.root.resolve().name, pareto=section))
    return page


def write_report(config: Config, work: Workdir, sections: Sequence[tuple[str, str]] = ()) -> Path:
    """Writes ``report/index.html``, complete in itself, and returns its path.

    Args:
      config: the settings of the run.
      work: its directory; needs results/{pairing.json, reconstruction.jsonl, transfer.jsonl},
        shows what else is there.
      sections: (title, html) of what others have to say of the run: its studies.

    Raises:
      UserError: a needed file is missing (the stage to run is named) or any file is damaged.
    """
    page = work.report / "index.html"
    html = render(config, read_results(work), root=work.root, sections=sections)
    write_text(page, html)
    return page


def render(
    config: Config,
    results: Results,
    *,
    root: Path,
    sections: Sequence[tuple[str, str]] = (),
) -> str:
    """Returns the html of the run in the folder ``root``, with the sections of its studies."""
    return _fill(
        "template.html.j2",
        name=root.resolve().name,
        **_introduction(config, results, root),
        **_inputs(results),
        **_transfer(results),
        **_effects(results),
        shared=shared.section(results),
        joint=crosscoder.section(results.crosscoders),
        feature_causes=causal_features.section(
            results.feature_causal, results.feature_causal_summary
        ),
        moved=moved.section(results.moved, results.warm_starts),
        ablation=ablation.section(results.ablation),
        efficiency=efficiency.section(results.efficiency),
        pareto=pareto.section(results.pareto),
        sections=sections,
        timing=tables.timing_table(results.timing),
        rungs={k: v for k, v in RUNG_WORDS.items() if k in {r["map"] for r in results.transfer}},
        verdicts=tables.VERDICTS,
    )


def _fill(template: str, **fields) -> str:
    """Returns a page of this folder with the house's style and these fields."""
    style = (HERE / "style.css").read_text(encoding="utf-8")
    return fill(HERE / template, style=style, **fields)


# ---------------------------------------------------------------- the head and what was run


def _introduction(config: Config, results: Results, root: Path) -> dict:
    models = list(dict.fromkeys(row["model"] for row in results.reconstruction))
    return {
        "models": answer.names(models),
        "question": answer.question(models),
        "answer": [
            *answer.answer(results),
            *causal_features.answer(results.feature_causal_summary),
            *shared.answer(results),
        ],
        "cautions": answer.cautions(results),
        "facts": _facts(config, results, models),
        "again": _again(root),
        "flags": _flags(config),
        "settings": _settings(config),
    }


def _facts(config: Config, results: Results, models: list[str]) -> list[tuple[str, str]]:
    sae = config.sae
    return [
        ("Models", ", ".join(models)),
        ("Sites", ", ".join(dict.fromkeys(str(r["site"]) for r in results.reconstruction))),
        ("Text", _text(config, results.pairing)),
        ("Rows, where all tokenizers meet", _by_split(results.pairing.get("rows"))),
        ("Scored on", _held_out(results.transfer)),
        (
            "Dictionaries",
            f"{sae.architecture}, width {spell(sae.width)}, k {spell(sae.k)}, {sae.seeds} per "
            f"model and site; {sae.steps:,} steps of {sae.batch_size:,} rows",
        ),
        ("Maps", ", ".join(sorted({r["map"] for r in results.transfer}, key=ladder_place))),
        ("Seed", str(config.seed)),
        ("Intervals", f"95 %, {config.evaluation.bootstrap} resamples of held-out documents"),
        ("Devices", _devices(results.timing)),
        ("Versions, where this page was made", _versions()),
    ]


def _text(config: Config, pairing: dict) -> str:
    read = pairing.get("text", {})
    sizes = [f"{kind} {_by_split(read[kind])}" for kind in ("documents", "bytes") if kind in read]
    return "; ".join([config.text.source, *sizes])


def _by_split(counts: dict | None) -> str:
    """Returns "900 (630 train, 90 validation, 180 test)"."""
    if not counts:
        return "–"
    parts = ", ".join(f"{tables.number(n)} {split}" for split, n in counts.items())
    return f"{tables.number(sum(counts.values()))} ({parts})"


def _held_out(rows: list[dict]) -> str:
    """Returns how many test rows and documents, or between which numbers it varies."""
    words = []
    for key, what in (("n_rows", "rows"), ("n_documents", "documents")):
        counts = [row[key] for row in rows if row.get(key) is not None] or [0]
        ends = dict.fromkeys((min(counts), max(counts)))
        words.append(f"{' to '.join(map(tables.number, ends))} {what}")
    return " of ".join(words) + " of the test split"


def _devices(timing: dict) -> str:
    stages = [stage for stage in timing.values() if isinstance(stage, dict)]
    found = {f"{s['devices']} × {s['device']}" for s in stages if {"device", "devices"} <= s.keys()}
    return ", ".join(sorted(found)) or "not recorded"


def _versions() -> str:
    words = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            words.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(words)


def _settings(config: Config) -> list[tuple[str, str]]:
    """Returns every setting as it is written on a command line."""
    return [
        (name, spell(operator.attrgetter(name)(config)))
        for name, _ in tables.nested(to_dict(config))
    ]


def _again(root: Path) -> str:
    """Returns the command that repeats a run from the settings that lie in its folder."""
    stored = shlex.quote(f"configs/stored.py:{root}")
    again = shlex.quote(f"{root}-again")
    return f"python -m launch.experiment --config={stored} --workdir={again}"


def _flags(config: Config) -> str:
    """Returns the same without its folder."""
    flags = [f"--config.{name}={shlex.quote(words)}" for name, words in _settings(config)]
    return " \\\n  ".join(["python -m launch.experiment --workdir=runs/again", *flags])


# ---------------------------------------------------------------- pairing and dictionaries


def _inputs(results: Results) -> dict:
    features = [r for r in results.features if "log10_frequency_histogram" in r]
    return {
        "pairing": [
            t
            for t in (tables.pairing_table(results.pairing), tables.spans_table(results.pairing))
            if t
        ],
        "pairing_facts": tables.pairing_facts(results.pairing),
        "dictionaries": tables.dictionaries_table(results.reconstruction),
        "dictionaries_raw": tables.flat_table(
            results.reconstruction, "Every column of reconstruction.jsonl", ("model", "site")
        ),
        "densities": [plots.density_figure(row) for row in features],
        "cosines": [
            plots.decoder_cosine_figure(row)
            for row in features
            if "decoder_cosine_histogram" in row
        ],
        "curves": [plots.curves_figure(curves) for curves in results.curves],
    }


# ---------------------------------------------------------------- transfer


def _transfer(results: Results) -> dict:
    groups = [
        list(g)
        for _, g in groupby(results.comparisons, key=lambda comparison: comparison.direction)
    ]
    return {
        "directions": [_direction(group, results) for group in groups],
        "features_shown": bool(results.feature_transfer),
        "transfer_raw": tables.flat_table(
            results.transfer, "Every column of transfer.jsonl", ("source", "target", "map")
        ),
        "controls": [tables.controls_table(c) for c in results.comparisons if c.controlled],
        "controls_raw": _optional_table(
            results.controls, "Every column of controls.jsonl", "control"
        ),
    }


def _direction(group: list[Comparison], results: Results) -> dict:
    limits = plots.r2_limits(group)
    single = [rows for c in group if (rows := _feature_rows(c, results.features))]
    return {
        "features": feature_tables(results.feature_transfer, *group[0].direction),
        "source": group[0].source,
        "target": group[0].target,
        "overview": tables.overview_table(group),
        "tables": [tables.transfer_table(c) for c in group],
        "r2": [plots.r2_figure(c, limits) for c in group],
        "cosine": [plots.cosine_figure(c) for c in group],
        "correlation": [plots.correlation_figure(rows) for rows in single],
        "frequency": [plots.frequency_figure(rows) for rows in single],
    }


def _feature_rows(comparison: Comparison, features: list[dict]) -> list[dict]:
    place = (*comparison.direction, comparison.site_source, comparison.site_target)
    found = [r for r in features if tuple(r.get(k) for k in PLACE) == place]
    return [r for r in found if r["map"] not in ("mean", "token_target")]


def _optional_table(rows: list[dict], caption: str, first: str) -> tables.Table | None:
    return tables.flat_table(rows, caption, (first,)) if rows else None


# ---------------------------------------------------------------- causal


def _effects(results: Results) -> dict:
    def direction(stitching):
        return stitching.source, stitching.target

    return {
        "stitching": [_stitched(list(g)) for _, g in groupby(results.stitchings, key=direction)],
        "together": together.section(results),
        "causal": _optional_table(results.causal, "Every row of causal.jsonl", "control"),
    }


def _stitched(group: list[Stitching]) -> dict:
    figures = [plots.stitching_figure(s) for s in group]
    return {"source": group[0].source, "target": group[0].target, "figures": figures}
