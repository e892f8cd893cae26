"""Dictionaries of ours and of SAELens, trained on the same rows of a run and measured by one code.

Equal: training rows, their order, batch, steps, width, active features a row; and the learning
rate, which is that usual here, that usual for a TopK of the width, or the default of SAELens. All
else is as each library has it by default. What counts is ours at the rate usual here beside theirs
at whichever of these rates is best for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crossdict_jax import dictionaries
from crossdict_jax.activations.passages import train_mean
from crossdict_jax.activations.store import Store
from crossdict_jax.benchmark.harness import OURS
from crossdict_jax.benchmark.peer import Peer
from crossdict_jax.config import Config, SAEConfig, refuse_transcoders, unswept
from crossdict_jax.dictionaries.train import members, train_members, usual_rate
from crossdict_jax.evaluation.reconstruction import measure
from crossdict_jax.models import Site
from crossdict_jax.report.tables import Table, number, table
from crossdict_jax.studies.pareto.section import fvu_at
from crossdict_jax.training import checkpoint
from crossdict_jax.training.loop import epoch_order
from crossdict_jax.workdir import Workdir, read_json, write_json, write_jsonl

FILE = "saelens_train.py"
THEIR_RATE = 3e-4  # the default of SAETrainerConfig
THEIRS = {  # ours: the architecture of SAELens that trains the same kind
    "relu": "standard",
    "gated": "gated",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "matryoshka": "matryoshka_batchtopk",
    "jumprelu": "jumprelu",
}
# Where L0 follows from a penalty: our setting's values, and the name of theirs. Close together, for
# a chord of the curve lies above it: by up to 0.01 in FVU where values double.
PENALTIES = {
    "relu": ((0.5, 0.7, 1.0, 1.4, 2.0, 2.8), "l1_coefficient"),
    "gated": ((1.0, 1.4, 2.0, 2.8, 4.0), "l1_coefficient"),
    "jumprelu": ((0.25, 0.35, 0.5, 0.7, 1.0), "l0_coefficient"),
}


def compare_saelens(config: Config, store: Store, work: Workdir) -> list[dict[str, Any]]:
    """Writes benchmark_saelens.jsonl: a row per model, architecture, library and setting.

    Every model at its middle site. Rows hold library, architecture, learning_rate, coefficient (of
    the penalty, else null), l0 and fvu on the test rows, and fvu_at_k: the FVU at ``sae.k`` active
    features, interpolated in log L0 where a penalty decides L0; null if the penalties tried do not
    bracket it. Killed and run again, it goes on. Returns the rows.

    Raises:
      UserError: no interpreter with SAELens is named, or its training failed.
    """
    refuse_transcoders(config, "The comparison with SAELens")
    sae, train, test = unswept(config.sae), store.select("train"), store.select("test")
    config = dataclasses.replace(config, sae=dataclasses.replace(sae, seeds=1))
    rows = []
    for model in store.models:
        sites = store.sites_of(model)
        site, folder = sites[len(sites) // 2], work.root / "benchmark" / "saelens" / model
        x, mean = store.read(model, site, test), train_mean(store, model, site)
        trained = [*_ours(config, store, model, site, folder / "ours")]
        trained += _theirs(config.sae, store.read(model, site, train), folder / "theirs")
        for path, about in trained:
            dictionary = dictionaries.load(path)
            seen = measure(dictionary, x, mean=mean, size=config.evaluation.batch_size)
            row = {"model": model, "site": str(site)} | about
            row |= {"rows_train": len(train), "rows_test": len(test)}
            row |= {key: getattr(sae, key) for key in ("width", "k", "steps", "batch_size")}
            fvu = float(seen["error"].sum() / seen["variance"].sum())
            rows.append(row | {"l0": float(seen["l0"].mean()), "fvu": fvu})
    for row in rows:
        same = ("model", "library", "architecture", "learning_rate")
        curve = [r for r in rows if all(r[key] == row[key] for key in same)]
        on_curve = fvu_at([r["l0"] for r in curve], [r["fvu"] for r in curve], row["k"])
        row["fvu_at_k"] = on_curve if row["architecture"] in PENALTIES else row["fvu"]
    write_jsonl(work.result("benchmark_saelens.jsonl"), rows)
    return rows


def rates(architecture: str, width: int) -> tuple[float, ...]:
    """Returns the rates that both libraries train it at, that usual here first."""
    usual = (usual_rate(name, width=width) for name in (architecture, "topk"))
    return tuple(dict.fromkeys((*usual, THEIR_RATE)))


def _ours(
    config: Config, store: Store, model: str, site: Site, folder: Path
) -> Iterator[tuple[Path, dict]]:
    """Trains ours, all rates and all penalties of an architecture as one ensemble."""
    for architecture in THEIRS:
        coefficients, _ = PENALTIES.get(architecture, (config.sae.l1_coefficient, ""))
        sae = dataclasses.replace(
            config.sae,
            architecture=architecture,
            l1_coefficient=coefficients,
            learning_rate=rates(architecture, config.sae.width),
        )
        work, group = Workdir(folder / architecture), members(sae, [(model, site)])
        train_members(dataclasses.replace(config, sae=sae), store, work, group)
        for member in group:
            path = work.dictionary(model, site, member.name)
            meta = checkpoint.load_meta(path)
            coefficient = meta["l1_coefficient"] if architecture in PENALTIES else None
            yield (
                path,
                {
                    "library": OURS,
                    "architecture": architecture,
                    "name": f"{architecture} {member.name}",
                    "learning_rate": meta["learning_rate"],
                    "coefficient": coefficient,
                },
            )


def _theirs(sae: SAEConfig, rows: np.ndarray, folder: Path) -> Iterator[tuple[Path, dict]]:
    """Trains theirs in one process of its own; what it saved is read as any of its folders."""
    folder.mkdir(parents=True, exist_ok=True)
    order = epoch_order(0, start=0, count=sae.steps * sae.batch_size, n=len(rows))
    np.save(folder / "rows.npy", rows.astype(np.float32))
    np.save(folder / "order.npy", order.reshape(sae.steps, -1))
    # Scaled as ours, so that penalties mean the same.
    same = {"d_sae": sae.width, "normalize_activations": "expected_average_only_in"}
    nested = {round(share * sae.width) for share in sae.nested_fractions} | {sae.width}
    with Peer("sae-lens", FILE) as peer:
        for architecture, theirs in THEIRS.items():
            coefficients, penalty = PENALTIES.get(architecture, ((None,), "k"))
            for coefficient in coefficients:
                for rate in rates(architecture, sae.width):
                    chosen = {penalty: sae.k if coefficient is None else coefficient}
                    if architecture == "matryoshka":
                        chosen["matryoshka_widths"] = sorted(nested)
                    name = f"{architecture}-rate-{rate:.3g}"
                    name += "" if coefficient is None else f"-{coefficient:g}"
                    about = folder / name / "about.json"
                    if not about.exists():
                        trained = peer.make(
                            folder=str(folder),
                            name=name,
                            architecture=theirs,
                            dictionary=same | chosen,
                            trainer={"lr": rate, "steps": sae.steps, "batch": sae.batch_size},
                        )
                        write_json(about, trained)
                    yield (
                        folder / name,
                        {
                            "library": "sae-lens",
                            "architecture": architecture,
                            "name": name,
                            "learning_rate": rate,
                            "coefficient": coefficient,
                            **read_json(about),
                        },
                    )


def comparison(rows: list[dict[str, Any]]) -> Table:
    """Returns the table of ours at the usual rate beside theirs at the best of all rates."""
    lines = []
    for model, architecture in dict.fromkeys((r["model"], r["architecture"]) for r in rows):
        both = [r for r in rows if (r["model"], r["architecture"]) == (model, architecture)]
        ours, theirs = (
            [r for r in both if (r["library"] == OURS) is mine] for mine in (True, False)
        )
        usual, undefined = ours[0], {"fvu_at_k": None, "learning_rate": None}
        defined = [r for r in theirs if r["fvu_at_k"] is not None]
        best = min(defined, key=lambda r: r["fvu_at_k"], default=undefined)
        pair = (usual["fvu_at_k"], best["fvu_at_k"])
        lines.append(
            {
                "model": f"{model} {usual['site']}",
                "architecture": architecture,
                "rate": f"{usual['learning_rate']:.2g}",
                "FVU, ours": number(pair[0]),
                "best rate": "–" if pair[1] is None else f"{best['learning_rate']:.2g}",
                "FVU, sae-lens": number(pair[1]),
                "difference": number(None if None in pair else pair[0] - pair[1]),
            }
        )
    first = rows[0]
    return table(
        f"FVU of {number(first['rows_test'])} test rows at k = {first['k']}, width "
        f"{first['width']}, {number(first['steps'])} steps of {first['batch_size']}: ours at the "
        "usual rate, theirs at the best of those tried; below 0 ours leave less unexplained",
        lines,
    )
