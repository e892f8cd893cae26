"""Dictionaries of ours and of SAELens, trained on the same rows of a run and measured by one code.

Equal: training rows, their order, batch, steps, width, active features a row. All else is as each
library has it by default, but that SAELens may also use our learning rate: its better one counts.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crossdict_jax import dictionaries
from crossdict_jax.activations.splice import train_mean
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config, unswept
from crossdict_jax.dictionaries.train import train_dictionaries, usual_rate
from crossdict_jax.errors import UserError
from crossdict_jax.evaluation.reconstruction import measure
from crossdict_jax.models import Site
from crossdict_jax.report.pareto import fvu_at
from crossdict_jax.settings import refuse_transcoders
from crossdict_jax.training import checkpoint
from crossdict_jax.training.loop import epoch_order
from crossdict_jax.workdir import Workdir, read_json, write_json, write_jsonl

PYTHON = "CROSSDICT_SAELENS_PYTHON"  # environment variable: an interpreter that has sae-lens
THEIR_RATE = 3e-4  # the default of SAETrainerConfig
THEIRS = {  # ours: the architecture of SAELens that trains the same kind
    "relu": "standard",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "matryoshka": "matryoshka_batchtopk",
    "jumprelu": "jumprelu",
}
PENALTIES = {  # where L0 follows from a penalty: our setting's values, and the name of theirs
    "relu": ((1.0, 2.0, 4.0, 8.0), "l1_coefficient"),
    "jumprelu": ((0.25, 0.5, 1.0, 2.0), "l0_coefficient"),
}


def compare_saelens(config: Config, store: Store, work: Workdir) -> list[dict[str, Any]]:
    """Writes benchmark_saelens.jsonl: a row per architecture, library and setting; returns them.

    The first model and site of the store serve. Rows hold library, architecture, learning_rate,
    coefficient (of the penalty, else null), l0 and fvu on the test rows, and fvu_at_k: the FVU at
    ``sae.k`` active features, interpolated in log L0 where a penalty decides L0; null if the
    penalties tried do not bracket it. Seconds of training go to timing.json.

    Raises:
      UserError: no interpreter with SAELens is named, or its training failed.
    """
    refuse_transcoders(config, "The comparison with SAELens")
    python = os.environ.get(PYTHON)
    if not python:
        raise UserError(f"{PYTHON} is not set; name the python of an environment with sae-lens.")
    bench = _Bench(config, store, work)
    found = [*bench.ours(), *bench.theirs(python)]
    _fill_at_k(found, k=bench.sae.k)
    seconds = {f"{r['library']} {r['name']}": r.pop("seconds") for r in found}
    write_jsonl(work.result("benchmark_saelens.jsonl"), found)
    work.record_timing("benchmark_saelens", **seconds)
    return [row | {"seconds": seconds[f"{row['library']} {row['name']}"]} for row in found]


class _Bench:
    """One model and site, the settings in common, and a folder beside the run's other files."""

    def __init__(self, config: Config, store: Store, work: Workdir):
        self.model = store.models[0]
        self.site: Site = store.sites_of(self.model)[0]
        self.config, self.store = config, store
        self.folder = work.root / "benchmark" / "saelens"
        self.sae = dataclasses.replace(unswept(config.sae), seeds=1, learning_rate=0.0)
        self.test = store.read(self.model, self.site, store.select("test"))
        self.mean = train_mean(store, self.model, self.site)
        self.train = store.select("train")

    def ours(self) -> Iterator[dict[str, Any]]:
        """Trains ours; an architecture with a penalty as one ensemble over its values."""
        for architecture in THEIRS:
            values, _ = PENALTIES.get(architecture, (self.sae.l1_coefficient, ""))
            sae = dataclasses.replace(self.sae, architecture=architecture, l1_coefficient=values)
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
                for rate in (THEIR_RATE, usual_rate(self.sae.width)):
                    penalty = {} if value is None else {name: value}
                    yield {
                        "name": f"{ours}-rate-{rate:.3g}" + (f"-{value:g}" if penalty else ""),
                        "ours": ours,
                        "architecture": theirs,
                        "coefficient": value,
                        "dictionary": self._their_dictionary(ours) | penalty,
                        "trainer": {
                            "lr": rate,
                            "lr_end": rate / 10,
                        },  # the end as their runner has it
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
        return dataclasses.replace(
            self.store, models=(self.model,), paths=self.store.paths[:1], meta=meta
        )

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


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a line per architecture: the best fvu_at_k of each library, and their seconds."""
    lines = []
    for architecture in THEIRS:
        line = {"architecture": architecture}
        for library in ("ours", "sae-lens"):
            some = [
                r
                for r in rows
                if (r["architecture"], r["library"]) == (architecture, library)
                and r["fvu_at_k"] is not None
            ]
            chosen = min(some, key=lambda r: r["fvu_at_k"], default={})
            line |= {f"{library} {key}": chosen.get(key) for key in ("fvu_at_k", "l0", "seconds")}
        lines.append(line)
    return lines
