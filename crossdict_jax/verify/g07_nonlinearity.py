"""G7: ridge wins or ties where the truth is linear, the network where it is not, on equal rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crossdict_jax.verify import lab
from crossdict_jax.verify.gate import Gate, at_least, shown
from crossdict_jax.verify.planted import PlantedConfig, Views, views

INPUTS, HIDDEN, OUTPUTS = 24, 48, 32
PLANTED = PlantedConfig(
    rows=6000, documents=100, features=INPUTS, widths=(1,), active=8.0, zipf=0.0
)
# Of the network; both see all rows. Nothing of the dense truth is to be selected.
BUDGET = {"steps": 800, "hidden": 96, "batch_size": 128, "head": "relu"}


def gate(*, seed: int, directory: Path) -> Gate:
    rng = np.random.Generator(np.random.Philox(key=seed))
    codes = views(PLANTED, seed)
    x = codes.codes
    W, W_in, V = (
        np.abs(rng.standard_normal((INPUTS, OUTPUTS))),
        rng.standard_normal((INPUTS, HIDDEN)),
        np.abs(rng.standard_normal((HIDDEN, OUTPUTS))),
    )
    linear = _scores(codes, x @ W, seed, directory / "linear")
    bent = _scores(codes, np.maximum(x @ W_in, 0) @ V, seed, directory / "bent")
    return Gate(
        "G7",
        "ridge wins or ties on y = x W; the network wins on y = relu(x W) V",
        (
            shown("R² of ridge, linear truth", linear["ridge"]["r2"]),
            at_least("less R² of the network, linear truth", _ahead(linear, "ridge", "mlp"), 0.0),
            shown("R² of ridge, bent truth", bent["ridge"]["r2"]),
            shown("R² of the network, bent truth", bent["mlp"]["r2"]),
            at_least(
                "network less ridge, bent truth: low end less high end of their intervals",
                bent["mlp"]["r2_low"] - bent["ridge"]["r2_high"],
                0.0,
            ),
        ),
    )


def _ahead(rows: dict[str, dict], first: str, second: str) -> float:
    return rows[first]["r2"] - rows[second]["r2"]


def _scores(codes: Views, y: np.ndarray, seed: int, directory: Path) -> dict[str, dict]:
    """Returns the rows of ridge and of the network from codes x to y, both non-negative."""
    both = Views(
        x=(codes.codes, y.astype(np.float32)),
        codes=codes.codes,
        tokens=codes.tokens * 2,
        document=codes.document,
        truth=codes.truth,
    )
    made = [lab.positive(x.shape[1]) for x in both.x]
    config = lab.planted_config(kinds=("ridge", "mlp"), seed=seed, **BUDGET)
    rows = lab.planted_ladder(both, made, config, directory)
    return {kind: lab.pick(rows, kind) for kind in ("ridge", "mlp")}
