"""Dictionaries of ours and of SAELens, trained on the same rows of a run and measured by one code.

Equal: rows, batch, steps, width, active features a row. Theirs are trained at our usual learning
rate, at that of a TopK of the width and at their default; the best of them counts.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

import numpy as np

from crossdict_jax import dictionaries
from crossdict_jax.activations.passages import train_mean
from crossdict_jax.activations.store import Store
from crossdict_jax.benchmark.harness import OURS
from crossdict_jax.benchmark.peer import Peer, save_rows
from crossdict_jax.config import Config, ParetoConfig, SAEConfig, refuse_transcoders, unswept
from crossdict_jax.dictionaries.base import find
from crossdict_jax.dictionaries.train import usual_rate
from crossdict_jax.evaluation.reconstruction import measure
from crossdict_jax.report.tables import Table, number, table
from crossdict_jax.studies.pareto import fvu_at
from crossdict_jax.studies.pareto.measure import curves
from crossdict_jax.workdir import Workdir, read_json, write_json, write_jsonl

FILE, THEIR_RATE = "saelens.py", 3e-4  # of peers; the default of SAETrainerConfig
ARCHITECTURES = ("relu", "gated", "topk", "batchtopk", "matryoshka", "jumprelu")  # that both have
# Of the usual coefficient, where L0 follows from a penalty. Close together: a chord lies above the
# curve, by up to 0.01 in FVU where values double.
SHARES = (0.17, 0.24, 0.33, 0.47, 0.67, 0.95, 1.33)


def compare_saelens(config: Config, store: Store, work: Workdir) -> list[dict]:
    """Writes benchmark_saelens.jsonl and returns it: rows by model, architecture, library, setting.

    Every model at its middle site, on the test rows. ``fvu_at_k`` is the FVU at ``sae.k`` active
    features, interpolated in log L0 where a penalty decides L0; null where the tried penalties do
    not bracket it. A killed run goes on.

    Raises:
      UserError: no interpreter with SAELens is named, or its training failed.
    """
    refuse_transcoders(config, "The comparison with SAELens")
    sae = dataclasses.replace(unswept(config.sae), learning_rate=0.0, seeds=1)
    pareto = ParetoConfig(architectures=ARCHITECTURES, k=(sae.k,), penalties=SHARES)
    config = dataclasses.replace(config, sae=sae, pareto=pareto)
    shape = {key: getattr(sae, key) for key in ("width", "k", "steps", "batch_size")}
    rows = []
    for model in store.models:
        sites = store.sites_of(model)
        site, folder = sites[len(sites) // 2], work.root / "benchmark" / "saelens" / model
        x, mean = store.read(model, site, store.select("test")), train_mean(store, model, site)
        same = {"model": model, "site": str(site), **shape, "n_rows": len(x)}
        for row, _ in curves(config, store, Workdir(folder / "ours"), model=model, site=site):
            kept = {key: row[key] for key in ("architecture", "l1_coefficient", "l0", "fvu")}
            rate = usual_rate(row["architecture"], width=sae.width)
            rows.append(same | kept | {"library": OURS, "learning_rate": rate})
        train = store.read(model, site, store.select("train"))
        for path, about in _theirs(sae, train, folder / "theirs"):
            seen = measure(dictionaries.load(path), x, mean=mean, size=config.evaluation.batch_size)
            fvu = float(seen["error"].sum() / seen["variance"].sum())
            rows.append(same | about | {"l0": float(seen["l0"].mean()), "fvu": fvu})
    one_curve = itemgetter("model", "library", "architecture", "learning_rate")
    for row in rows:
        curve = [(r["l0"], r["fvu"]) for r in rows if one_curve(r) == one_curve(row)]
        fixed = "k" in find(row["architecture"]).reads
        row["fvu_at_k"] = row["fvu"] if fixed else fvu_at(*zip(*curve), sae.k)
    write_jsonl(work.result("benchmark_saelens.jsonl"), rows)
    return rows


def _theirs(sae: SAEConfig, rows: np.ndarray, folder: Path) -> Iterator[tuple[Path, dict]]:
    """Trains theirs in one process; what it saved is read as any of its folders."""
    save_rows(folder, rows, steps=sae.steps, batch_size=sae.batch_size)
    # Scaled as ours, so that penalties mean the same.
    shape = {"width": sae.width, "k": sae.k, "normalize_activations": "expected_average_only_in"}
    nested = sorted({round(share * sae.width) for share in sae.nested_fractions} | {sae.width})
    with Peer("sae-lens", FILE) as peer:
        for architecture in ARCHITECTURES:
            kind = find(architecture)
            penalty = "l0_coefficient" if architecture == "jumprelu" else "l1_coefficient"
            coefficients = [None] if "k" in kind.reads else [c * kind.usual_l1 for c in SHARES]
            usual = [usual_rate(name, width=sae.width) for name in (architecture, "topk")]
            rates = dict.fromkeys((*usual, THEIR_RATE))
            for rate, coefficient in itertools.product(rates, coefficients):
                about = {"library": "sae-lens", "architecture": architecture, "learning_rate": rate}
                about["l1_coefficient"] = coefficient
                name = f"{architecture}-rate-{rate:.3g}"
                settings = shape | {"training": {"lr": rate, "steps": sae.steps}}
                if coefficient is not None:
                    name += f"-{coefficient:g}"
                    settings[penalty] = coefficient
                if architecture == "matryoshka":
                    settings["matryoshka_widths"] = nested
                finished = folder / name / "about.json"
                if not finished.exists():
                    settings |= {"folder": str(folder), "architecture": architecture, "name": name}
                    write_json(finished, peer.make(**settings))
                yield folder / name, about | read_json(finished)


def comparison(rows: list[dict]) -> Table:
    """Returns the table of ours at the usual rate beside theirs at the best of all rates."""
    lines, first, compared = [], rows[0], itemgetter("model", "architecture")
    for key in dict.fromkeys(map(compared, rows)):
        both = [row for row in rows if compared(row) == key]
        ours = next(row for row in both if row["library"] == OURS)
        theirs = [r for r in both if r["library"] != OURS and r["fvu_at_k"] is not None]
        best = min(theirs, key=itemgetter("fvu_at_k"), default={"fvu_at_k": None})
        pair = ours["fvu_at_k"], best["fvu_at_k"]
        line = {"model": f"{ours['model']} {ours['site']}", "architecture": ours["architecture"]}
        line |= {"rate": f"{ours['learning_rate']:.2g}", "FVU, ours": number(pair[0])}
        line["best rate"] = f"{best['learning_rate']:.2g}" if theirs else "–"
        line["FVU, sae-lens"] = number(pair[1])
        line["difference"] = number(None if None in pair else pair[0] - pair[1])
        lines.append(line)
    return table(
        f"FVU of {number(first['n_rows'])} test rows at k = {first['k']}, width {first['width']}, "
        f"{number(first['steps'])} steps of {first['batch_size']}: ours at the usual rate, theirs "
        "at the best of those tried",
        lines,
    )
