"""Every architecture on planted features and on a run's activations: recovery, L0 against FVU."""

import dataclasses

import numpy as np

from crossdict_jax import results
from crossdict_jax.activations.store import open_store
from crossdict_jax.config import Config, SAEConfig, refuse_transcoders
from crossdict_jax.studies.pareto.measure import curves
from crossdict_jax.training.stage import timed
from crossdict_jax.verify.lab import NAMES, SITE, planted_config, save_store
from crossdict_jax.verify.planted import PlantedConfig, best_cosines, views
from crossdict_jax.workdir import Workdir

# Twice as many features as dimensions, the rarest in one row of 40; eight pairs of which the second
# fires in half of the rows of the first.
PLANTED = PlantedConfig(
    rows=30_000, documents=300, widths=(32,), exclusive=0, zipf=0.7, correlated=8
)
SETTINGS = SAEConfig(width=64, k=4, steps=2000, batch_size=256, seeds=3)


def measure_pareto(config: Config, work: Workdir) -> list[dict]:
    """Writes pareto.jsonl, a row per dictionary of every architecture's curve; returns the rows.

    Columns are those of ``studies.pareto.measure.curves`` and, on planted features, the active ones
    a row (``planted``) and the mean cosine to the nearest decoder row. On activations of the first
    model at its middle site the settings are the run's but for architecture and what decides L0.
    Dictionaries are kept in WORKDIR/pareto.

    Raises:
      UserError: the store is missing, or a setting is impossible.
    """
    refuse_transcoders(config, "The curve of L0 against FVU")
    store, folder = open_store(work.activations), work.root / "pareto"
    with timed(work, "pareto") as figures:
        rows = []
        planted, of_planted = views(PLANTED, seed=config.seed), Workdir(folder / "planted")
        settings = dataclasses.replace(
            planted_config(config.seed),
            sae=dataclasses.replace(SETTINGS, matmul_dtype=config.sae.matmul_dtype),
            pareto=dataclasses.replace(config.pareto, k=()),  # pareto.k is for the run's width
        )
        made = save_store(planted, of_planted)
        for row, d in curves(settings, made, of_planted, model=NAMES[0], site=SITE):
            best, _ = best_cosines(np.asarray(d.W_dec[...]), planted.truth.directions[0])
            truth = {"planted": PLANTED.active, "cosine": float(best.mean())}
            rows.append({"data": "planted"} | row | truth)
        model = store.models[0]
        sites, of_run = store.sites_of(model), Workdir(folder / "activations")
        for row, _ in curves(config, store, of_run, model=model, site=sites[len(sites) // 2]):
            rows.append({"data": "activations"} | row | {"planted": None, "cosine": None})
        results.write(work, "pareto.jsonl", rows)
        figures["dictionaries"] = len(rows)
    return rows
