"""G4: a crosscoder tells planted features that two views share from those that one view owns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from crossdict_jax.verify.gate import Gate, at_least, shown
from crossdict_jax.verify.ownership import L1, SETTINGS, ownership
from crossdict_jax.verify.planted import PlantedConfig

SEEDS = 5
# 64 features, a quarter of them exclusive, in 24 and 32 dimensions.
PLANTED = PlantedConfig(rows=16_000, documents=160)


def gate(*, seed: int, directory: Path) -> Gate:
    batchtopk, l1 = (
        _medians(settings, seed, directory / settings.variant)
        for settings in (SETTINGS, dataclasses.replace(SETTINGS, **L1))
    )
    return Gate(
        "G4",
        f"shared and exclusive features in superposition, median of {SEEDS} seeds",
        (
            *(at_least(f"BatchTopK: {_words(n)}", value, 0.9) for n, value in batchtopk.items()),
            *(shown(f"L1: {_words(name)}", value) for name, value in l1.items()),
        ),
        note=f"{PLANTED.features} features in {PLANTED.widths} dimensions",
    )


def _medians(settings, seed: int, directory: Path) -> dict[str, float]:
    """Returns the median over seeds of precision and recall of either kind of feature."""
    found = ownership(settings, PLANTED, range(seed, seed + SEEDS), directory=directory)
    return {name: float(np.median([one[name] for one in found])) for name in found[0]}


def _words(name: str) -> str:
    kind, _, what = name.partition("_")
    return f"{what} of {kind} features"
