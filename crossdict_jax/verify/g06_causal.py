"""G6: a planted cause, carried over by a fitted map, does its work in the other model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from crossdict_jax.causal.directions import mapped_directions
from crossdict_jax.causal.effects import Directions, Experiment, transfer
from crossdict_jax.config import Config, EvaluationConfig, InterventionConfig, MapConfig
from crossdict_jax.maps import Pairs, Problem, Side, rung
from crossdict_jax.verify.gate import Check, Gate, at_least, at_most, equal, shown
from crossdict_jax.verify.planted_causal import FEATURES, LINKED, Planted, plant

# A rung of codes: the words of so small a language say too little about activations to tell a
# feature's direction from its word's.
RUNG = "ridge_codes"
CONTEXTS, BOOTSTRAP = 24, 100
TEXTS = 48  # of 24 words: two thirds to fit the map, the rest to choose its penalty


def gate(*, seed: int, directory: Path) -> Gate:
    planted = plant(texts=TEXTS, seed=seed)
    experiment = _with_directions(planted, seed, directory)
    config = Config(
        seed=seed,
        evaluation=EvaluationConfig(bootstrap=BOOTSTRAP),
        intervention=InterventionConfig(contexts=CONTEXTS),
    )
    rows, summary = transfer(experiment, config)
    of = {one["direction"]: one for one in summary}
    hits = {
        name: [row["feature"] for row in rows if row["direction"] == name and row["transfers"]]
        for name in experiment.mapped
    }
    found = sum(feature < LINKED for feature in hits[RUNG])
    return Gate(
        "G6",
        "a planted cause in two models: mapped, it moves the planted target, others do not",
        (
            at_least(f"linked features that transfer by fitted {RUNG}, of {LINKED}", found, LINKED),
            equal("unlinked features that transfer by it", len(hits[RUNG]) - found, 0),
            *_above(of[RUNG], RUNG),
            *_nothing(of["random"], hits["random"], "random directions"),
            *_nothing(of["shuffled"], hits["shuffled"], "directions of other features"),
        ),
        note=f"{FEATURES} features; effects in nats on the target, intervals over features",
    )


def _above(one: dict, name: str) -> list[Check]:
    return [
        shown(f"effect of {name}", one["effect"]),
        at_least("low end of its lead over random directions", one["specific_random_low"], 0.01),
        at_least("low end of its lead over other features", one["specific_shuffled_low"], 0.01),
    ]


def _nothing(one: dict, hits: list, name: str) -> list[Check]:
    return [
        equal(f"features that transfer by {name}", len(hits), 0),
        shown(f"effect of {name}", one["effect"]),
        at_most("low end of their lead over random directions", one["specific_random_low"], 0.0),
    ]


def _with_directions(planted: Planted, seed: int, directory: Path) -> Experiment:
    """Returns the experiment with directions by a map that was fitted, and two that cannot work."""
    experiment = planted.experiment()
    side = _side(planted, experiment, 0)
    fitted = _fitted(planted, experiment, directory)
    features = np.arange(FEATURES)
    found = mapped_directions(fitted, side, features, experiment.strength, seed=seed)
    rng = np.random.Generator(np.random.Philox(key=seed))
    made = {
        RUNG: Directions(found),
        "random": Directions(rng.standard_normal(found.shape, np.float32)),
        "shuffled": Directions(np.roll(found, 1, axis=0)),
    }
    return dataclasses.replace(experiment, mapped=made)


def _fitted(planted: Planted, experiment: Experiment, directory: Path):
    """Returns the rung from A to B, fitted on both models at the same places."""
    sides = [_side(planted, experiment, which) for which in (0, 1)]
    documents = experiment.documents
    train = documents < TEXTS * 2 // 3

    def pairs(rows: np.ndarray) -> Pairs:
        one, other = (Side(s.x[rows], s.tokens[rows], s.dictionary) for s in sides)
        return Pairs(one, other, documents[rows])

    problem = Problem("planted causes", pairs(train), pairs(~train))
    (made,) = rung(RUNG).fit([problem], MapConfig(), seed=0, directory=directory)
    return made.map


def _side(planted: Planted, experiment: Experiment, which: int) -> Side:
    injector = (experiment.source, experiment.target)[which]
    positions = injector.positions
    words = planted.texts[positions.text, positions.last]
    tokens = words if which == 0 else planted.words[words].astype(np.int32)
    return Side(injector.clean, tokens, planted.dictionaries[which])
