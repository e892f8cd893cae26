"""G7: ridge wins or ties where the truth is linear, the network where it is not, on equal rows."""

import dataclasses
from pathlib import Path

import numpy as np

from crossdict_jax import stats
from crossdict_jax.verify import lab
from crossdict_jax.verify.gate import Check
from crossdict_jax.verify.planted import PlantedConfig, views

INPUTS, HIDDEN, OUTPUTS = 24, 48, 32
PLANTED = PlantedConfig(
    rows=6000, documents=100, features=INPUTS, widths=(1,), active=8.0, zipf=0.0
)
KINDS = ("ridge", "mlp")
# Of the network; both see all rows. The dense truth needs no selection.
BUDGET = {"steps": 800, "hidden": 96, "batch_size": 128, "head": "relu"}


def gate(*, seed: int, directory: Path) -> list[Check]:
    rng = stats.generator(seed)
    codes = views(PLANTED, seed)
    x = codes.codes
    W, W_in, V = map(rng.standard_normal, ((INPUTS, OUTPUTS), (INPUTS, HIDDEN), (HIDDEN, OUTPUTS)))
    W, V = np.abs(W), np.abs(V)
    made, scores = [lab.positive(INPUTS), lab.positive(OUTPUTS)], []
    for name, y in {"linear": x @ W, "bent": np.maximum(x @ W_in, 0) @ V}.items():
        both = dataclasses.replace(codes, x=(x, y.astype(np.float32)), tokens=codes.tokens * 2)
        rows = lab.planted_rows(both, made, directory / name, seed=seed, kinds=KINDS, **BUDGET)
        scores.append({kind: lab.pick(rows, kind) for kind in KINDS})
    linear, bent = scores
    lead = linear["ridge"]["r2"] - linear["mlp"]["r2"]
    network_lead = bent["mlp"]["r2_low"] - bent["ridge"]["r2_high"]
    return [
        Check("R² of ridge, linear truth", linear["ridge"]["r2"]),
        Check("less R² of the network, linear truth", lead, ">=", 0.0),
        Check("R² of ridge, bent truth", bent["ridge"]["r2"]),
        Check("R² of the network, bent truth", bent["mlp"]["r2"]),
        Check("low end of the network less high end of ridge", network_lead, ">=", 0.0),
    ]
