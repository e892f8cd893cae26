"""G6: a planted cause, carried over by a fitted map, does its work in the other model."""

import dataclasses
from pathlib import Path

import numpy as np

from crossdict_jax import stats
from crossdict_jax.causal.directions import mapped_directions
from crossdict_jax.causal.effects import Directions, Experiment, transfer
from crossdict_jax.config import Config, EvaluationConfig, InterventionConfig, MapConfig
from crossdict_jax.maps import Problem, map_class
from crossdict_jax.verify.gate import Check
from crossdict_jax.verify.planted_causal import FEATURES, LINKED, plant

# A map of codes: in so small a language activations cannot tell a feature's direction from its
# word's.
KIND = "ridge_codes"
CONTEXTS, BOOTSTRAP = 24, 100
TEXTS = 48  # of 24 words: two thirds to fit the map, the rest to choose its penalty
CONTROLS = {"random": "random directions", "shuffled": "mapped directions of other features"}


def gate(*, seed: int, directory: Path) -> list[Check]:
    experiment = _experiment(seed)
    config = Config(
        seed=seed,
        evaluation=EvaluationConfig(bootstrap=BOOTSTRAP),
        intervention=InterventionConfig(contexts=CONTEXTS),
    )
    rows, summary = transfer(experiment, config)
    of = {row["direction"]: row for row in summary}
    hits = {
        name: [row["feature"] for row in rows if row["direction"] == name and row["transfers"]]
        for name in (KIND, *CONTROLS)
    }
    linked = sum(feature < LINKED for feature in hits[KIND])
    over_random, over_others = (of[KIND][f"specific_{name}_low"] for name in CONTROLS)
    checks = [
        Check(f"linked features that transfer by fitted {KIND}, of {LINKED}", linked, ">=", LINKED),
        Check("unlinked features that transfer by it", len(hits[KIND]) - linked, "==", 0),
        Check(f"effect of {KIND}", of[KIND]["effect"]),
        Check("low end of its lead over random directions", over_random, ">=", 0.01),
        Check("low end of its lead over other features", over_others, ">=", 0.01),
    ]
    for name, words in CONTROLS.items():
        lead = of[name]["specific_random_low"]
        checks += [
            Check(f"features that transfer by {words}", len(hits[name]), "==", 0),
            Check(f"effect of {words}", of[name]["effect"]),
            Check("low end of their lead over random directions", lead, "<=", 0.0),
        ]
    return checks


def _experiment(seed: int) -> Experiment:
    """Returns planted features with the directions of a map fitted at their positions, and the
    controls."""
    experiment, pairs = plant(texts=TEXTS, seed=seed).experiment()
    train = pairs.documents < TEXTS * 2 // 3
    problem = Problem("planted causes", pairs.take(train), pairs.take(~train))
    (fitted,) = map_class(KIND).fit([problem], MapConfig())
    features, strength = np.arange(FEATURES), experiment.strength
    vectors = mapped_directions(fitted.map, pairs.source, features, strength, seed=seed)
    rng = stats.generator(seed)
    mapped = {
        KIND: Directions(vectors),
        "random": Directions(rng.standard_normal(vectors.shape, np.float32)),
        "shuffled": Directions(np.roll(vectors, 1, axis=0)),
    }
    return dataclasses.replace(experiment, mapped=mapped)
