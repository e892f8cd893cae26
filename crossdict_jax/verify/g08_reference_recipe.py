"""G8: a high cosine between independent dense codes is called what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crossdict_jax.config import to_dict
from crossdict_jax.report import answer, results
from crossdict_jax.report.transfer import verdict
from crossdict_jax.results import NO_BETTER
from crossdict_jax.verify import lab
from crossdict_jax.verify.gate import Gate, at_least, at_most, equal, shown
from crossdict_jax.verify.planted import PlantedConfig, Views, views
from crossdict_jax.workdir import open_workdir, write_json, write_jsonl

WIDTH, ROWS = 96, 9000
SHIFT = (
    0.1  # of the normal numbers before the ReLU: a little more than half of all codes are active
)
# The losses' weights are the defaults; the head is the reference's, which keeps every estimate.
RECIPE = {"hidden": 96, "steps": 600, "batch_size": 128, "head": "relu"}


def gate(*, seed: int, directory: Path) -> Gate:
    config = lab.planted_config(kinds=("mean", "mlp"), seed=seed, **RECIPE)
    work = open_workdir(directory / "run", to_dict(config))
    codes = _independent(seed)
    rows = lab.planted_ladder(codes, [lab.positive(WIDTH)] * 2, config, work.root)
    write_json(work.result("pairing.json"), {})
    write_jsonl(work.result("reconstruction.jsonl"), [])
    write_jsonl(work.result("transfer.jsonl"), rows)
    run = results.read_run(work)
    labels = [verdict(line)[2] for c in run.comparisons for line in c.fitted]
    words = dict(answer.answer(run))["Against what"]
    mlp = lab.pick(rows, "mlp")
    return Gate(
        "G8",
        "a network on independent codes: cosine about 0.6, labelled no better than the mean",
        (
            at_least("cosine", mlp["cosine"], 0.5),
            at_most(
                "cosine less that of the mean", mlp["cosine"] - mlp["cosine_mean_predictor"], 0.01
            ),
            shown("cosine of the mean", mlp["cosine_mean_predictor"]),
            shown("centred cosine", mlp["cosine_centered"]),
            shown("R²", mlp["r2"]),
            equal(f"maps that the report labels “{NO_BETTER}”, of 1", labels.count(NO_BETTER), 1),
            equal("the report's answer is a negative result", words.startswith("Negative"), 1),
        ),
    )


def _independent(seed: int) -> Views:
    """Returns codes of two dictionaries, about half dense, that know nothing of each other."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    base = views(PlantedConfig(rows=ROWS, documents=100, widths=(1, 1)), seed)
    scale = rng.lognormal(0.0, 0.5, (2, 1, WIDTH))
    codes = np.maximum(rng.standard_normal((2, len(base), WIDTH)) + SHIFT, 0) * scale
    x = tuple(codes.astype(np.float32))
    return Views(x, base.codes, base.tokens, base.document, base.truth)
