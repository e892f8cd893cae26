"""G3: independent views give chance: no score, no retrieval, no more confirmed matches than q."""

import math
from pathlib import Path

import numpy as np

from crossdict_jax.evaluation.matching import confirm, match
from crossdict_jax.results import NO_BETTER, PAIRINGS
from crossdict_jax.verify import lab
from crossdict_jax.verify.gate import Check
from crossdict_jax.verify.planted import PlantedConfig, views

SEEDS = 24
FDR = 0.05
# Nothing is shared; features burst within documents, so rows are not independent draws. No noise:
# then an ignorant map predicts the mean. Where the dictionary makes another constant of it, its
# centred cosine is not 0 (rows with few features count as much as others).
PLANTED = PlantedConfig(
    rows=12_000, documents=150, features=96, widths=(56, 64), exclusive=1.0, burstiness=0.7, noise=0
)
KINDS = ("procrustes", "ridge")


def gate(*, seed: int, directory: Path) -> list[Check]:
    planted, checks = views(PLANTED, seed), []
    settings = {"seed": seed, "kinds": KINDS, "pairings": PAIRINGS}
    own = [d[planted.truth.exclusive(view)] for view, d in enumerate(planted.truth.directions)]
    plain, strict = (
        lab.planted_rows(
            planted, [lab.exact(d, threshold=t) for d in own], directory / str(t), **settings
        )
        for t in (0.0, 0.2)  # thresholds of active features
    )
    for row in (lab.pick(plain, kind) for kind in KINDS):
        kind, pool, labelled = row["map"], row["pool"], row["verdict"] == NO_BETTER
        checks += [
            Check(f"centred cosine of {kind}, absolute", abs(row["cosine_centered"]), "<=", 0.02),
            Check(f"R² of {kind}", row["r2"], "<=", 0.01),
            Check(f"top-1 of {kind}, in multiples of chance", row["top1"] * pool, "<=", 6.0),
            Check(f"mean rank of {kind}, share of the pool", row["mean_rank"] / pool, ">=", 0.45),
            Check(f"{kind} is labelled no better than the mean", labelled, "==", 1),
        ]
    aligned, shuffled = (lab.pick(strict, "ridge", pairing=p)["cosine_centered"] for p in PAIRINGS)
    found = []  # by seed: whether any match of what each view sees is significant, and confirmed
    for i in range(SEEDS):
        train, test = views(PLANTED, seed + i).split(0.5)
        a, b = ([half.codes[:, half.truth.exclusive(v)] for half in (train, test)] for v in (0, 1))
        options = {"documents": test.document, "tokens": np.stack(test.tokens, axis=-1)}
        worth = confirm(match(a[0], b[0]), a[1], b[1], fdr=FDR, **options)
        found.append([(worth.p_adjusted <= FDR).any(), worth.confirmed.any()])
    significant, confirmed = np.mean(found, axis=0)  # shares of the seeds
    bound = FDR + 2 * math.sqrt(FDR * (1 - FDR) / SEEDS)  # q and two standard errors
    return [
        *checks,
        Check("cosine of the mean", lab.pick(plain, "ridge")["cosine_mean_predictor"]),
        Check("centred cosine of ridge through a threshold, shuffled pairs", shuffled),
        Check("aligned less shuffled, absolute", abs(aligned - shuffled), "<=", 0.02),
        Check("share of seeds with a match significant at q", significant, "<=", bound),
        Check("share of seeds with a confirmed match", confirmed, "<=", bound),
    ]
