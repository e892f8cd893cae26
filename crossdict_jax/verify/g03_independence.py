"""G3: independent views give chance: no score, no retrieval, no more confirmed matches than q."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from crossdict_jax.evaluation.matching import confirm, match
from crossdict_jax.results import NO_BETTER
from crossdict_jax.verify import lab
from crossdict_jax.verify.gate import Check, Gate, at_least, at_most, equal, shown
from crossdict_jax.verify.planted import PlantedConfig, Views, views

SEEDS = 24
FDR = 0.05
# Nothing is shared; features burst within documents, so that rows are no independent draws. No
# noise: what a rung knows nothing of then is the mean. Where the dictionary makes another constant
# of it, its centred cosine is not 0 (rows with few features count as much as others).
PLANTED = PlantedConfig(
    rows=12_000,
    documents=150,
    features=96,
    widths=(56, 64),
    exclusive=1.0,
    burstiness=0.7,
    noise=0.0,
)
KINDS = ("procrustes", "ridge")


def gate(*, seed: int, directory: Path) -> Gate:
    planted = views(PLANTED, seed)
    plain, strict = (
        _rows(planted, seed, threshold, directory / str(threshold)) for threshold in (0.0, 0.2)
    )
    ridge, shuffled = (lab.pick(strict, "ridge", pairing=p) for p in ("aligned", "shuffled"))
    null = shuffled["cosine_centered"]
    counts = np.array([_matches(views(PLANTED, seed + i)) for i in range(SEEDS)])
    bound = FDR + 2 * math.sqrt(FDR * (1 - FDR) / SEEDS)
    return Gate(
        "G3",
        "independent views: everything at chance",
        (
            *(check for kind in KINDS for check in _at_chance(lab.pick(plain, kind))),
            shown("cosine of the mean", lab.pick(plain, "ridge")["cosine_mean_predictor"]),
            shown("centred cosine of ridge through a threshold, shuffled pairs", null),
            at_most("aligned less shuffled, absolute", abs(ridge["cosine_centered"] - null), 0.02),
            shown("matches, mean over seeds", counts[:, 0].mean()),
            at_most("share of seeds with a match significant at q", _any(counts[:, 1]), bound),
            at_most("share of seeds with a confirmed match", _any(counts[:, 2]), bound),
        ),
        note=f"{SEEDS} seeds, q = {FDR}; the bound is q and two standard errors",
    )


def _rows(planted: Views, seed: int, threshold: float, directory: Path) -> list[dict]:
    """Returns the rows of transfer.jsonl; features must exceed the threshold to be active."""
    made = [
        lab.exact(d[planted.exclusive(v)], threshold=threshold)
        for v, d in enumerate(planted.directions)
    ]
    config = lab.planted_config(kinds=KINDS, seed=seed)
    both = ("aligned", "shuffled")
    return lab.planted_ladder(planted, made, config, directory, pairings=both)


def _at_chance(row: dict) -> list[Check]:
    kind = row["map"]
    return [
        at_most(f"centred cosine of {kind}, absolute", abs(row["cosine_centered"]), 0.02),
        at_most(f"R² of {kind}", row["r2"], 0.01),
        at_most(f"top-1 of {kind}, in multiples of chance", row["top1"] * row["pool"], 6.0),
        at_least(f"mean rank of {kind}, share of the pool", row["mean_rank"] / row["pool"], 0.45),
        equal(f"{kind} is labelled no better than the mean", row["verdict"] == NO_BETTER, 1),
    ]


def _any(counts: np.ndarray) -> float:
    return float((counts > 0).mean())


def _matches(planted: Views) -> tuple[int, int, int]:
    """Returns how many pairs of features match, are significant, and are confirmed."""
    first, second = planted.split(0.5)
    train, test = _features(first), _features(second)
    found = match(*train)
    tokens = np.stack(second.tokens, axis=-1)
    worth = confirm(found, *test, documents=second.document, tokens=tokens, fdr=FDR)
    significant = int((worth.p_adjusted <= FDR).sum())
    return len(found), significant, int(worth.confirmed.sum())


def _features(planted: Views) -> list[np.ndarray]:
    """Returns what each view's dictionary would find: the codes that the view sees."""
    return [planted.codes[:, planted.exclusive(view)] for view in (0, 1)]
