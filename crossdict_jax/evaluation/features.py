"""Which features transfer best: single features of B, their contexts, and what drives them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from crossdict_jax import maps, models
from crossdict_jax.activations.pairing import token_bytes
from crossdict_jax.activations.passages import Contexts
from crossdict_jax.evaluation import attribution
from crossdict_jax.evaluation.codes import Moments, SideCodes, correlation_matrix
from crossdict_jax.evaluation.scoring import FREQUENCY_EDGES, Scored, pair_columns, take
from crossdict_jax.maps import Task
from crossdict_jax.maps.base import slices
from crossdict_jax.maps.fit import Loader

SHOWN = 5  # features of each end of the ranking: as many as a reader looks at
MIN_FIRINGS = 20  # held-out rows on which a feature must fire for its R^2 to say something
CONTEXTS = 3  # of each feature, from different documents
SHARE_EDGES = (None, 0.0, 0.25, 0.5, 0.75, 1.0)  # of variance that the feature's token explains


@dataclasses.dataclass(frozen=True)
class FeatureScores:
    """Numbers of every feature of B, [width] each, for the best map; n_rows are test rows."""

    r2: np.ndarray
    r2_validation: np.ndarray
    correlation: np.ndarray
    token_share: np.ndarray
    firings: np.ndarray
    n_rows: int

    @property
    def ranking(self) -> np.ndarray:
        """The features that are live and fire often enough, by R^2, highest first."""
        enough = np.flatnonzero(np.isfinite(self.r2) & (self.firings >= MIN_FIRINGS))
        return enough[np.argsort(-self.r2[enough], kind="stable")]

    def extremes(self, count: int) -> list[tuple[int, str]]:
        """Returns (feature, "most" or "least") of at most ``count`` at either end."""
        order = self.ranking
        count = min(count, len(order) // 2)
        ends = (("most", order[:count]), ("least", order[::-1][:count]))
        return [(int(i), rank) for rank, features in ends for i in features]

    def row(self, i: int, rank: str) -> dict[str, Any]:
        """Returns the columns of one feature."""
        names = ("r2", "r2_validation", "correlation", "token_share")
        numbers = {name: float(getattr(self, name)[i]) for name in names}
        fires = int(self.firings[i])
        numbers |= {"firings": fires, "frequency": fires / self.n_rows}
        return {"row": "feature", "rank": rank, "feature": i, **numbers}

    def binned(self) -> list[dict[str, Any]]:
        """Returns means and medians of the ranked features by frequency and by token share."""
        ranked, rows = self.ranking, []
        for name, edges, values in (
            ("frequency", FREQUENCY_EDGES.tolist(), self.firings[ranked] / self.n_rows),
            ("token_share", SHARE_EDGES, self.token_share[ranked]),
        ):
            for low, high in itertools.pairwise(edges):
                inside = ranked[(values <= high) & (values > (-np.inf if low is None else low))]
                if len(inside):
                    summary = {
                        "n_features": len(inside),
                        "r2_mean": float(np.mean(self.r2[inside])),
                        "r2_median": float(np.median(self.r2[inside])),
                        "correlation_mean": float(np.mean(self.correlation[inside])),
                    }
                    rows.append({"row": name, "low": low, "high": high} | summary)
        return rows


def feature_rows(
    scored: Scored, reseeded: Sequence[Task], loader: Loader, codes: SideCodes
) -> list[dict]:
    """Returns the rows of feature_transfer.jsonl of one direction and pair of sites.

    The map is the aligned one with the highest R^2 on validation rows. Features are live, fire on
    at least MIN_FIRINGS test rows, and are ranked by their own R^2 there: the extremes of many, so
    each comes with its R^2 on validation rows as well. token_share is the R^2 of the table of the
    target's own tokens. Beside them, all such features in bins of firing frequency and of
    token_share.

    Args:
      reseeded: the same maps fitted from another seed, where the run has them.
    """
    pairs, held_out = scored.bench.splits["validation"], scored.bench.held_out
    variance, errors = 0.0, dict.fromkeys(scored.maps, 0.0)
    for rows in slices(len(pairs)):
        t = codes(pairs.target)[rows].toarray().astype(np.float64)
        variance = variance + np.square(t - held_out.train_mean[None, :]).sum(axis=0)
        for kind, m in scored.maps.items():
            predicted = maps.predict(m, take(pairs, rows), scored.bench.batch_size)
            errors[kind] = errors[kind] + np.square(t - predicted).sum(axis=0)
    best = min(errors, key=lambda kind: errors[kind].sum())
    scores = FeatureScores(
        r2=scored.scores[best].feature_r2,
        r2_validation=1 - errors[best] / np.where(variance > 0, variance, np.nan),
        correlation=scored.scores[best].correlations,
        token_share=scored.scores["token_target"].feature_r2,
        firings=(held_out.target > 0).sum(axis=0),
        n_rows=len(held_out.target),
    )
    shown = scores.extremes(SHOWN)
    described = _described(scored, best, [i for i, _ in shown], reseeded, loader, codes)
    rows = [scores.row(i, rank) | more for (i, rank), more in zip(shown, described)]
    start = pair_columns(scored.task) | {"map": best, "pairing": scored.task.pairing}
    return [start | row for row in rows + scores.binned()]


def _described(
    scored: Scored,
    best: str,
    features: list[int],
    reseeded: Sequence[Task],
    loader: Loader,
    codes: SideCodes,
) -> list[dict[str, Any]]:
    """The columns of each feature that need text or a Jacobian."""
    if not features:
        return []
    store, splits = loader.store, scored.bench.splits
    test, index = splits["test"], np.asarray(features)
    on_train, on_test = (
        correlation_matrix(codes(splits[s].target)[:, index], codes(splits[s].source))
        for s in ("train", "test")
    )
    matches = on_train.argmax(axis=1)
    norms = [Moments.of(codes(s)).norm for s in (splits["train"].source, splits["train"].target)]
    a, b = (np.where(n > 0, n / np.sqrt(len(splits["train"])), 1.0) for n in norms)
    scale = a[None, :] / b[index][:, None]  # of standard deviations, 1 where one is 0
    # Maps that read features say directly what drives them; the best one does in any case.
    attributed = {
        kind: attribution.drivers(m, test.source, index, scale=scale)
        for kind, m in scored.maps.items()
        if m.reads == "features"
        or (kind == best and attribution.can_attribute(m, test.source.dictionary))
    }
    again = {
        task.kind: attribution.drivers(
            maps.load(task.path(loader.work), test.target.dictionary),
            *(test.source, index),
            scale=scale,
        )
        for task in reseeded
    }
    path = store.paths[store.models.index(scored.task.target)]
    around = Contexts(store, scored.task.target, token_bytes(models.load_tokenizer(path)))
    numbers, described = store.select("test"), []
    for i, feature in enumerate(features):
        f = scored.bench.held_out.target[:, feature]
        chosen: dict[int, int] = {}  # document -> its strongest row
        for row in np.argsort(-f, kind="stable"):
            if len(chosen) == CONTEXTS or f[row] <= 0:
                break
            chosen.setdefault(int(test.documents[row]), int(row))
        rows = np.array([*chosen.values()])
        predicted = maps.predict(scored.maps[best], take(test, rows), scored.bench.batch_size)
        match = int(matches[i])
        described.append(
            {
                "match": {"feature": match, "correlation": float(on_test[i, match])},
                "attributions": [
                    {"map": kind} | attribution.describe(drivers, i, match, again.get(kind))
                    for kind, drivers in attributed.items()
                ],
                "contexts": [
                    around.snippet(numbers[row])
                    | {"activation": float(f[row]), "predicted": float(p)}
                    for row, p in zip(rows, predicted[:, feature])
                ],
            }
        )
    return described
