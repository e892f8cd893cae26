"""Dictionaries of ours and of SAELens, trained on the same rows of a run and measured by one code.

Equal: training rows, their order, batch, steps, width, active features a row; and the learning
rate, which is that usual here, that usual for a TopK of the width, or the default of SAELens. All
else is as each library has it by default. What counts is ours at the rate usual here beside theirs
at whichever of these rates is best for them.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crossdict_jax import dictionaries
from crossdict_jax.activations.passages import train_mean
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config, unswept
from crossdict_jax.config.settings import refuse_transcoders
from crossdict_jax.dictionaries.train import train_dictionaries, usual_rate
from crossdict_jax.errors import UserError
from crossdict_jax.evaluation.reconstruction import measure
from crossdict_jax.report.tables import Cell, Column, Table, number
from crossdict_jax.studies.pareto.section import fvu_at
from crossdict_jax.training import checkpoint
from crossdict_jax.training.loop import epoch_order
from crossdict_jax.workdir import Workdir, read_json, write_json, write_jsonl

PYTHON = "CROSSDICT_SAELENS_PYTHON"  # environment variable: an interpreter that has sae-lens
THEIR_RATE = 3e-4  # the default of SAETrainerConfig
THEIRS = {  # ours: the architecture of SAELens that trains the same kind
    "relu": "standard",
    "gated": "gated",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "matryoshka": "matryoshka_batchtopk",
    "jumprelu": "jumprelu",
}
LIBRARIES = ("ours", "sae-lens")
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
    bracket it. Seconds of training go to timing.json, ours of a whole ensemble shared out evenly.
    Killed and run again, it goes on. Returns the rows, with their seconds.

    Raises:
      UserError: no interpreter with SAELens is named, or its training failed.
    """
    refuse_transcoders(config, "The comparison with SAELens")
    python = os.environ.get(PYTHON)
    if not python:
        raise UserError(f"{PYTHON} is not set; name the python of an environment with sae-lens.")
    found = []
    for model in store.models:
        bench = _Bench(config, store, work, model)
        rows = [*bench.ours(), *bench.theirs(python)]
        _fill_at_k(rows, k=bench.sae.k)
        found += rows
    seconds = [row.pop("seconds") for row in found]
    write_jsonl(work.result("benchmark_saelens.jsonl"), found)
    names = (" ".join(row[key] for key in ("model", "library", "name")) for row in found)
    work.record_timing("benchmark_saelens", **dict(zip(names, seconds)))
    return [row | {"seconds": value} for row, value in zip(found, seconds)]


class _Bench:
    """One model and site, the settings in common, and a folder beside the run's other files."""

    def __init__(self, config: Config, store: Store, work: Workdir, model: str):
        sites = store.sites_of(model)
        self.model, self.site = model, sites[len(sites) // 2]
        self.config, self.store = config, store
        self.folder = work.root / "benchmark" / "saelens" / model
        self.sae = dataclasses.replace(unswept(config.sae), seeds=1)
        self.test = store.read(self.model, self.site, store.select("test"))
        self.mean = train_mean(store, self.model, self.site)
        self.train = store.select("train")

    def rates(self, architecture: str) -> tuple[float, ...]:
        """Returns the rates that both libraries train it at, that usual here first."""
        usual = (usual_rate(name, width=self.sae.width) for name in (architecture, "topk"))
        return tuple(dict.fromkeys((*usual, THEIR_RATE)))

    def ours(self) -> Iterator[dict[str, Any]]:
        """Trains ours, all rates and all penalties of an architecture as one ensemble."""
        for architecture in THEIRS:
            values, _ = PENALTIES.get(architecture, (self.sae.l1_coefficient, ""))
            swept = {"l1_coefficient": values, "learning_rate": self.rates(architecture)}
            sae = dataclasses.replace(self.sae, architecture=architecture, **swept)
            work = Workdir(self.folder / "ours" / architecture)
            config = dataclasses.replace(self.config, sae=sae)
            train_dictionaries(config, self._one_site(), work)
            seconds = read_json(work.timing)["train_saes"]["wall_s"]
            folders = sorted(work.dictionary(self.model, self.site).parent.iterdir())
            for folder in folders:
                about = checkpoint.load_meta(folder)
                yield self._row("ours", architecture, folder, f"{architecture} {folder.name}") | {
                    "learning_rate": about["learning_rate"],
                    "coefficient": about["l1_coefficient"] if architecture in PENALTIES else None,
                    "seconds": seconds / len(folders),
                }

    def theirs(self, python: str) -> Iterator[dict[str, Any]]:
        """Trains theirs in one process, and reads what it saved as any of its folders."""
        folder = self.folder / "theirs"
        jobs = list(self._jobs())
        self._hand_over(folder, jobs)
        _run_peer(python, folder)
        for job in jobs:
            about = read_json(folder / job["name"] / "seconds.json")
            row = self._row("sae-lens", job["ours"], folder / job["name"], job["name"])
            yield row | {
                "version": about["version"],
                "learning_rate": job["trainer"]["lr"],
                "coefficient": job["coefficient"],
                "seconds": about["seconds"],
            }

    def _jobs(self) -> Iterator[dict[str, Any]]:
        for ours, theirs in THEIRS.items():
            values, name = PENALTIES.get(ours, ((None,), ""))
            for value in values:
                for rate in self.rates(ours):
                    penalty = {} if value is None else {name: value}
                    yield {
                        "name": f"{ours}-rate-{rate:.3g}" + (f"-{value:g}" if penalty else ""),
                        "ours": ours,
                        "architecture": theirs,
                        "coefficient": value,
                        "dictionary": self._their_dictionary(ours) | penalty,
                        "trainer": {"lr": rate, "lr_end": rate / 10},  # as their runner has it
                    }

    def _their_dictionary(self, ours: str) -> dict[str, Any]:
        width = self.sae.width
        # Scaled as ours, so that penalties mean the same.
        same = {"d_sae": width, "normalize_activations": "expected_average_only_in"}
        if ours not in PENALTIES:
            same["k"] = self.sae.k
        if ours == "matryoshka":
            nested = {round(share * width) for share in self.sae.nested_fractions} | {width}
            same["matryoshka_widths"] = sorted(nested)
        return same

    def _hand_over(self, folder: Path, jobs: list[dict]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        sae, rows = self.sae, self.store.read(self.model, self.site, self.train)
        count = sae.steps * sae.batch_size
        order = epoch_order(0, start=0, count=count, n=len(rows)).reshape(sae.steps, -1)
        np.save(folder / "rows.npy", rows.astype(np.float32))
        np.save(folder / "order.npy", order)
        write_json(folder / "jobs.json", jobs)

    def _one_site(self) -> Store:
        about = self.store.meta["models"][self.model] | {"sites": [str(self.site)]}
        meta = self.store.meta | {"models": {self.model: about}}
        path = self.store.paths[self.store.models.index(self.model)]
        return dataclasses.replace(self.store, models=(self.model,), paths=(path,), meta=meta)

    def _row(self, library: str, architecture: str, folder: Path, name: str) -> dict[str, Any]:
        size = self.config.evaluation.batch_size
        seen = measure(dictionaries.load(folder), self.test, mean=self.mean, size=size)
        return {
            "model": self.model,
            "site": str(self.site),
            "library": library,
            "architecture": architecture,
            "name": name,
            "rows_train": len(self.train),
            "rows_test": len(self.test),
            "width": self.sae.width,
            "k": self.sae.k,
            "steps": self.sae.steps,
            "batch_size": self.sae.batch_size,
            "l0": float(seen["l0"].mean()),
            "fvu": float(seen["error"].sum() / seen["variance"].sum()),
        }


def _run_peer(python: str, folder: Path) -> None:
    script = Path(__file__).with_name("saelens_peer.py")
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            [python, str(script), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise UserError(f"{PYTHON}={python} cannot be run ({error.strerror}).") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{PYTHON}={python}: training with sae-lens failed ({last}).")


def _fill_at_k(rows: list[dict[str, Any]], *, k: int) -> None:
    """Gives every row fvu_at_k: its own FVU, or that of its curve over penalties at L0 = k."""
    for row in rows:
        if row["architecture"] not in PENALTIES:
            row["fvu_at_k"] = row["fvu"]
            continue
        same = ("library", "architecture", "learning_rate")
        curve = [r for r in rows if all(r[key] == row[key] for key in same)]
        row["fvu_at_k"] = fvu_at([r["l0"] for r in curve], [r["fvu"] for r in curve], k)


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Returns two tables a model: both libraries at every rate; ours as it comes, theirs at best.

    Args:
      rows: of ``compare_saelens``, with their seconds.
    """
    models = (list(group) for _, group in itertools.groupby(rows, key=lambda r: r["model"]))
    return [table for group in models for table in (_every_rate(group), _best_rate(group))]


def _every_rate(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    columns = [Column("architecture", numeric=False), Column("rate")]
    columns += [Column(f"{what}, {who}") for what in ("L0", "FVU", "seconds") for who in LIBRARIES]
    lines = []
    for architecture in THEIRS:
        for rate, both in _rates(rows, architecture).items():
            cells = [Cell(architecture), Cell(f"{rate:.2g}")]
            cells += [Cell(_l0(curve, first["k"])) for curve in both]
            cells += [Cell(number(curve[0]["fvu_at_k"])) for curve in both]
            seconds = (sum(r["seconds"] for r in curve) / len(curve) for curve in both)
            lines.append(cells + [Cell(number(value, 1)) for value in seconds])
    return Table(
        f"{first['model']} {first['site']}: width {first['width']}, k {first['k']}, "
        f"{number(first['steps'])} steps of {first['batch_size']} of {number(first['rows_train'])} "
        f"rows; FVU of {number(first['rows_test'])} test rows, from a curve where L0 is one (–: "
        "the curve does not reach k)",
        columns,
        lines,
    )


def _best_rate(rows: list[dict[str, Any]]) -> Table:
    ours, theirs = LIBRARIES
    columns = [Column("architecture", numeric=False), Column("rate"), Column(f"FVU, {ours}")]
    columns += [Column("best rate"), Column(f"FVU, {theirs}"), Column("difference")]
    lines = []
    for architecture in THEIRS:
        found = {
            rate: [curve[0]["fvu_at_k"] for curve in both]
            for rate, both in _rates(rows, architecture).items()
        }
        usual, (own, _) = next(iter(found.items()))
        known = [(fvu, rate) for rate, (_, fvu) in found.items() if fvu is not None]
        best, rate = min(known, default=(None, None))
        difference = None if None in (own, best) else own - best
        texts = [f"{usual:.2g}", number(own), "–" if rate is None else f"{rate:.2g}"]
        texts += [number(best), number(difference)]
        lines.append([Cell(text) for text in (architecture, *texts)])
    first = rows[0]
    return Table(
        f"{first['model']} {first['site']}: {ours} at the usual rate, {theirs} at the best for it "
        "of the rates above; below 0 ours leave less unexplained",
        columns,
        lines,
    )


def _rates(rows: list[dict[str, Any]], architecture: str) -> dict[float, list[list[dict]]]:
    """Returns per learning rate, that usual here first, the rows of either library."""
    own = [r for r in rows if r["architecture"] == architecture]
    return {
        rate: [
            [r for r in own if (r["library"], r["learning_rate"]) == (library, rate)]
            for library in LIBRARIES
        ]
        for rate in dict.fromkeys(r["learning_rate"] for r in own)
    }


def _l0(curve: list[dict[str, Any]], k: int) -> str:
    if len(curve) == 1:
        return number(curve[0]["l0"], 1)
    ends = (number(edge(r["l0"] for r in curve), 1) for edge in (min, max))
    return f"{k} of {'–'.join(ends)}"
