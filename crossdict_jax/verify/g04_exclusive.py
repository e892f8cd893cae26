"""G4: a crosscoder tells planted features that two views share from those that one view owns."""

import dataclasses
from pathlib import Path

import numpy as np

from crossdict_jax.config import JointSettings
from crossdict_jax.dictionaries.crosscoder import Crosscoder, takes_part
from crossdict_jax.dictionaries.crosscoder_training import Rows, fit_crosscoders
from crossdict_jax.evaluation.codes import correlations
from crossdict_jax.maps.codes import Moments, compress
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
        bound = () if changes else (">=", 0.9)
        for column in scores[0]:
            median = float(np.median([row[column] for row in scores]))
            checks.append(Check(f"{name}: {column} features", median, *bound))
    return checks


def score_owners(joint: Crosscoder, test: Views) -> dict[str, float]:
    """Returns precision and recall of shared and of exclusive latents, on held-out rows.

    A latent stands for the planted feature with which it correlates most, if by SAME or more.
    Precision is of live latents that ``takes_part`` calls shared (exclusive), recall of features.
    """
    codes = compress(joint.encode(test.x))
    owners = takes_part(joint) & (Moments.of(codes).variance > 0)[None, :]  # [views, width]
    seen = test.truth.seen  # [views, features]
    r = np.concatenate([tile for _, tile in correlations(codes, compress(test.codes))])
    right = (seen[:, r.argmax(axis=1)] == owners).all(axis=0) & (r.max(axis=1) >= SAME)
    hit = (owners[:, r.argmax(axis=0)] == seen).all(axis=0) & (r.max(axis=0) >= SAME)
    scores = {}
    for name, n_views in (("shared", len(seen)), ("exclusive", 1)):
        called = owners.sum(axis=0) == n_views
        scores[f"precision of {name}"] = float(right[called].sum() / max(called.sum(), 1))
        scores[f"recall of {name}"] = float(hit[seen.sum(axis=0) == n_views].mean())
    return scores
