"""G8: a high cosine between independent dense codes is called what it is."""

import dataclasses
from pathlib import Path

import numpy as np

from crossdict_jax import stats
from crossdict_jax.report import answer, results
from crossdict_jax.report.transfer import verdict
from crossdict_jax.results import NO_BETTER
from crossdict_jax.verify import lab
from crossdict_jax.verify.gate import Check
from crossdict_jax.verify.planted import PlantedConfig, views
from crossdict_jax.workdir import Workdir, write_json, write_jsonl

WIDTH, ROWS = 96, 9000
# Added to normal numbers before the ReLU: a little more than half of all codes are active.
SHIFT = 0.1
# Default loss weights; the head is the reference's, which keeps every estimate.
RECIPE = {"hidden": 96, "steps": 600, "batch_size": 128, "head": "relu"}


def gate(*, seed: int, directory: Path) -> list[Check]:
    # Codes of two dictionaries, about half dense and independent.
    rng = stats.generator(seed)
    base = views(PlantedConfig(rows=ROWS, documents=100, widths=(1, 1)), seed)
    scale = rng.lognormal(0.0, 0.5, (2, 1, WIDTH))
    codes = np.maximum(rng.standard_normal((2, len(base.codes), WIDTH)) + SHIFT, 0) * scale
    independent = dataclasses.replace(base, x=tuple(codes.astype(np.float32)))
    made, kinds, work = [lab.positive(WIDTH)] * 2, ("mean", "mlp"), Workdir(directory / "run")
    rows = lab.planted_rows(independent, made, work.root, seed=seed, kinds=kinds, **RECIPE)
    write_json(work.result("pairing.json"), {})
    write_jsonl(work.result("reconstruction.jsonl"), [])
    write_jsonl(work.result("transfer.jsonl"), rows)
    run = results.read_run(work)
    labels = [verdict(line)[2] for c in run.comparisons for line in c.fitted]
    words = dict(answer.answer(run))["Against what"]
    mlp = lab.pick(rows, "mlp")
    lead = mlp["cosine"] - mlp["cosine_mean_predictor"]
    return [
        Check("cosine", mlp["cosine"], ">=", 0.5),
        Check("cosine less that of the mean", lead, "<=", 0.01),
        Check("cosine of the mean", mlp["cosine_mean_predictor"]),
        Check("centred cosine", mlp["cosine_centered"]),
        Check("R²", mlp["r2"]),
        Check(f"labelled “{NO_BETTER}” by the report", labels == [NO_BETTER], "==", 1),
        Check("the report's answer is negative", words.startswith("Negative"), "==", 1),
    ]
