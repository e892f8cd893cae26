"""G4: a crosscoder tells planted features that two views share from those that one view owns."""

import dataclasses
from pathlib import Path

import numpy as np

from crossdict_jax.config import JointSettings
from crossdict_jax.dictionaries.crosscoder import Crosscoder, takes_part
from crossdict_jax.dictionaries.crosscoder_training import Rows, fit_crosscoders
from crossdict_jax.verify.gate import Check
from crossdict_jax.verify.planted import PlantedConfig, Views, views

SEEDS = 5
# 64 features, a quarter of them exclusive, in 24 and 32 dimensions.
PLANTED = PlantedConfig(rows=16_000, documents=160)
# 1.5 latents a feature. No model is left out of a row: a code of all views is asked for, and what
# one view owns cannot be read from another.
TRAINING = {"steps": 1000, "batch_size": 256, "learning_rate": 3e-3, "dead_after_rows": 5000}
SETTINGS = JointSettings(width=96, k=4, drop_probability=0.0, **TRAINING)
L1 = {"variant": "l1", "l1_coefficient": 0.3}  # SETTINGS with the published penalty
SAME = 0.5  # least correlation of a latent with its planted feature


def gate(*, seed: int, directory: Path) -> list[Check]:
    checks, seeds = [], range(seed, seed + SEEDS)
    splits = [views(PLANTED, s).split() for s in seeds]
    rows = [Rows(f"seed {s}", train.x, s) for s, (train, _) in zip(seeds, splits)]
    for name, changes in (("BatchTopK", {}), ("L1", L1)):
        settings = dataclasses.replace(SETTINGS, **changes)
        fitted = fit_crosscoders(rows, settings, directory=directory / name)  # one ensemble
        scores = [score_owners(joint, test) for joint, (_, test) in zip(fitted, splits)]
        for column in scores[0]:
            kind, _, score = column.partition("_")
            label = f"{name}: {score} of {kind} features"
            median = float(np.median([row[column] for row in scores]))
            checks.append(Check(label, median) if changes else Check(label, median, ">=", 0.9))
    return checks


def score_owners(joint: Crosscoder, test: Views) -> dict[str, float]:
    """Returns precision and recall of shared and of exclusive latents, on held-out rows.

    A latent stands for the planted feature with which it correlates most, if by SAME or more.
    Precision is of live latents that ``takes_part`` calls shared (exclusive), recall of features.
    """
    codes = np.asarray(joint.encode(test.x), np.float64)
    live = codes.std(axis=0) > 0
    centred = (z - z.mean(axis=0, keepdims=True) for z in (codes, test.codes.astype(np.float64)))
    unit = [z / np.maximum(np.linalg.norm(z, axis=0, keepdims=True), 1e-12) for z in centred]
    r = unit[0].T @ unit[1]  # [width, features]
    owners, seen = _owners(takes_part(joint) & live[None, :]), _owners(test.truth.seen)
    scores = {}
    for name, shared in (("shared", True), ("exclusive", False)):
        called = live & ((owners == -1) if shared else (owners >= 0))
        true = (seen == -1) if shared else (seen >= 0)
        right = (seen[r.argmax(axis=1)] == owners) & (r.max(axis=1) >= SAME)
        hit = (owners[r.argmax(axis=0)] == seen) & (r.max(axis=0) >= SAME)
        scores[f"{name}_precision"] = float(right[called].mean()) if called.any() else 0.0
        scores[f"{name}_recall"] = float(hit[true].mean()) if true.any() else 1.0
    return scores


def _owners(seen: np.ndarray) -> np.ndarray:
    """Returns int [n]: the only view of each column of bool [views, n]; -1 all views, -2 others."""
    alone = np.where(seen.sum(axis=0) == 1, seen.argmax(axis=0), -2)
    return np.where(seen.all(axis=0), -1, alone)
