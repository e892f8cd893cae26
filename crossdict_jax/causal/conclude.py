"""From the records of single features to rows with p-values, and to what holds for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crossdict_jax.causal import scores
from crossdict_jax.stats import benjamini_hochberg, columns, draw, wilson

FAMILIES = ("random", "shuffled")  # of controls
NULLS = tuple(f"null_{family}" for family in FAMILIES)


def conclude(
    records: Sequence[dict], *, fdr: float, bootstrap: int, seed: int
) -> tuple[list[dict], list[dict]]:
    """Returns (a row per feature and image, a summary row per image).

    A feature transfers where its image beats both families of controls: its p is the larger of
    the two p-values, and the false discovery rate over all features of the image is at most fdr.

    Args:
      records: what ``transfer`` finds about every tested feature.
    """
    rows, summary = [], []
    for name in dict.fromkeys(name for record in records for name in record["directions"]):
        own = [_row(record, name) for record in records if name in record["directions"]]
        _judge(own, fdr)
        rows += [{k: v for k, v in row.items() if k not in NULLS} for row in own]
        summary.append(_summary(name, own, len(records), bootstrap, seed))
    match = next((s for s in summary if s["direction"] == "match"), None)
    for one in summary:
        one["of_match"] = _share(one, match)
    return rows, summary


def _row(record: dict, name: str) -> dict:
    general = {key: value for key, value in record.items() if key != "directions"}
    return {"direction": name} | general | record["directions"][name]


def _judge(rows: list[dict], fdr: float) -> None:
    """Adds p, q and the verdict to the rows of one image."""
    effects = np.array([row["effect"] for row in rows])
    p = {
        family: scores.pooled_p(effects, np.array([row[f"null_{family}"] for row in rows]))
        for family in FAMILIES
    }
    worst = np.maximum(*p.values())
    q = benjamini_hochberg(worst)
    for i, row in enumerate(rows):
        row |= {f"p_{family}": float(values[i]) for family, values in p.items()}
        row |= {"p": float(worst[i]), "q": float(q[i]), "transfers": bool(q[i] <= fdr)}


def _summary(name: str, rows: list[dict], tested: int, bootstrap: int, seed: int) -> dict:
    """What holds over features; intervals of means are over features."""
    hits = sum(row["transfers"] for row in rows)
    low, high = wilson(hits, tested)
    out = {
        "direction": name,
        "n_features": tested,
        "n_scored": len(rows),
        "n_transferring": hits,
        "share_transferring": hits / tested,
        "share_transferring_low": low,
        "share_transferring_high": high,
    }
    for key in (
        "effect",
        "kl",
        *(f"{kind}_{family}" for kind in ("effect", "specific") for family in FAMILIES),
        *(f"specific_{family}_at_kl" for family in FAMILIES),
        "ablation_r",
        "ablation_r_shuffled",
    ):
        values = np.array([row[key] for row in rows if row.get(key) is not None])
        features = np.arange(len(values))
        known = draw(features, count=bootstrap, seed=seed).mean(values) if len(values) else None
        out |= columns(key, known)
    return out


def _share(one: dict, match: dict | None) -> float | None:
    """The specific effect of an image as a share of that of B's own matched features."""
    if match is None or match["specific_random"] is None or match["specific_random"] <= 0:
        return None
    return one["specific_random"] / match["specific_random"]
