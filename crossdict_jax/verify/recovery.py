"""Every architecture on planted features and on a run's activations: recovery, L0 against FVU."""

from __future__ import annotations

import dataclasses
import shutil
import time
from typing import Any

import numpy as np

from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.config import Config, ParetoConfig, SAEConfig
from crossdict_jax.config.settings import refuse_transcoders
from crossdict_jax.studies.pareto.measure import curves
from crossdict_jax.training.stage import device_figures
from crossdict_jax.verify.lab import NAMES, SITE, planted_config, write_store
from crossdict_jax.verify.planted import PlantedConfig, Views, best_cosines, views
from crossdict_jax.workdir import Workdir, write_jsonl

# Twice as many features as dimensions; frequencies as of words, the rarest in one row of 40; eight
# pairs of which the second fires in half of the rows of the first.
PLANTED = PlantedConfig(
    rows=30_000,
    documents=300,
    features=64,
    widths=(32,),
    exclusive=0,
    active=4.0,
    zipf=0.7,
    correlated=8,
)
SETTINGS = SAEConfig(width=64, k=4, steps=2000, batch_size=256, seeds=3)


def measure_pareto(config: Config, work: Workdir) -> list[dict[str, Any]]:
    """Writes pareto.jsonl: a row per dictionary of every architecture's curve; returns the rows.

    Columns are those of ``evaluation.pareto.curves``, and

    - data: "planted", or "activations" of the run's first model at its middle site;
    - planted: active features a row that were planted; null for activations;
    - cosine: mean over planted features of the cosine to the decoder row most like it; null for
      activations, whose features nobody knows.

    Dictionaries are kept in WORKDIR/pareto, so that nothing is trained twice. On activations they
    have the run's settings but for the architecture and what decides L0. Seconds go to timing.json.

    Raises:
      UserError: the store is missing, or a setting asks for what cannot be.
    """
    refuse_transcoders(config, "The curve of L0 against FVU")
    started = time.perf_counter()
    store = open_store(work.activations)
    known = {"planted": PLANTED, "sae": SETTINGS, "seed": config.seed}
    rows = recovery(config.pareto, _folder(work, "planted"), **known)
    model = store.models[0]
    sites = store.sites_of(model)
    where = {"model": model, "site": sites[len(sites) // 2]}
    found = curves(config, store, _folder(work, "activations"), **where)
    unknown = {"planted": None, "cosine": None}
    rows += [{"data": "activations"} | row | unknown for row, _ in found]
    write_jsonl(work.result("pareto.jsonl"), rows)
    wall = time.perf_counter() - started
    work.record_timing("pareto", wall_s=wall, dictionaries=len(rows), **device_figures())
    return rows


def recovery(
    pareto: ParetoConfig,
    work: Workdir,
    *,
    seed: int,
    planted: PlantedConfig,
    sae: SAEConfig,
) -> list[dict[str, Any]]:
    """Returns the rows of ``measure_pareto`` on planted features.

    Args:
      work: keeps the planted rows and the dictionaries.
      sae: settings that all architectures share.
    """
    truth = views(planted, seed=seed)
    store = _store(truth, work)
    pareto = dataclasses.replace(pareto, k=())  # which speaks of the run's width
    config = dataclasses.replace(planted_config(seed=seed), sae=sae, pareto=pareto)
    found = []
    for row, dictionary in curves(config, store, work, model=NAMES[0], site=SITE):
        best, _ = best_cosines(np.asarray(dictionary.W_dec[...]), truth.directions[0])
        known = {"planted": planted.active, "cosine": float(best.mean())}
        found.append({"data": "planted"} | row | known)
    return found


def _store(truth: Views, work: Workdir) -> Store:
    if not work.activations.exists():
        part = work.root / "activations.part"
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        write_store(truth, part)
        part.rename(work.activations)
    return open_store(work.activations)


def _folder(work: Workdir, name: str) -> Workdir:
    return Workdir(work.root / "pareto" / name)
