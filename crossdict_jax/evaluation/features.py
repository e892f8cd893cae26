"""Which features transfer best: single features of B, their contexts, and what drives them."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any

import numpy as np

from crossdict_jax import maps, models
from crossdict_jax.activations.pairing import token_bytes
from crossdict_jax.activations.passages import Contexts
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config
from crossdict_jax.evaluation import attribution
from crossdict_jax.evaluation.scoring import FREQUENCY_EDGES, Ladder, encode, take, where
from crossdict_jax.maps import Map, Pairs, Task
from crossdict_jax.maps.base import slices
from crossdict_jax.maps.controls import control_tasks
from crossdict_jax.workdir import Workdir

MIN_FIRINGS = 20  # held-out rows on which a feature must fire for its R^2 to say something
CONTEXTS = 3  # of each feature, from different documents
SHARE_EDGES = (None, 0.0, 0.25, 0.5, 0.75, 1.0)  # of variance that the feature's token explains


def feature_rows(
    ladder: Ladder, tasks: list[Task], config: Config, store: Store, work: Workdir
) -> list[dict]:
    """Returns the rows of feature_transfer.jsonl of one direction and pair of sites.

    The map is the aligned rung with the highest R^2 on validation rows. Features are live, fire on
    at least MIN_FIRINGS test rows, and are ranked by their own R^2 there: the extremes of many, so
    each comes with its R^2 on validation rows as well. token_share is the R^2 of the table of the
    target's own tokens. Beside them, all such features in bins of firing frequency and of
    token_share.

    Args:
      tasks: the maps of this direction and these sites.
    """
    aligned = {task.kind: task for task in tasks if task.pairing == "aligned"}
    loaded = {kind: maps.load(task.path(work)) for kind, task in aligned.items()}
    validation = ladder.bench.splits["validation"]
    on_validation = _feature_r2(loaded, validation, ladder.bench)
    best = max(on_validation, key=lambda kind: on_validation[kind][0])
    table = _Table.make(ladder, best, on_validation[best][1])
    start = where(ladder.task, best, "aligned")
    rows = [start | row for row in table.binned()]
    shown = table.extremes(config.evaluation.features_shown)
    if not len(shown):
        return rows
    reseeded = {kind: dataclasses.replace(t, control="reseeded") for kind, t in aligned.items()}
    controls = set(control_tasks(config, store))
    again = {k: maps.load(t.path(work)) for k, t in reseeded.items() if t in controls}
    described = _Described(ladder, loaded, best, again, store, [i for i, _ in shown])
    return [start | table.row(i, rank) | described.row(i) for i, rank in shown] + rows


def _feature_r2(loaded: dict[str, Map], pairs: Pairs, bench) -> dict[str, tuple[float, np.ndarray]]:
    """{rung: (R^2 over all features, R^2 of each [width])} on some rows."""
    spread, errors = 0.0, dict.fromkeys(loaded, 0.0)
    for block in map(partial(take, pairs), slices(len(pairs))):
        target = encode(block.target).astype(np.float64)
        spread = spread + np.square(target - bench.held_out.train_mean[None, :]).sum(axis=0)
        for kind, m in loaded.items():
            predicted = maps.predict(m, block, bench.batch_size)
            errors[kind] = errors[kind] + np.square(target - predicted).sum(axis=0)
    safe, whole = np.where(spread > 0, spread, np.nan), max(spread.sum(), 1e-30)
    return {kind: (1 - e.sum() / whole, 1 - e / safe) for kind, e in errors.items()}


@dataclasses.dataclass(frozen=True)
class _Table:
    """One number of every feature of B each, [width]."""

    r2: np.ndarray
    r2_validation: np.ndarray
    correlation: np.ndarray
    token_share: np.ndarray
    firings: np.ndarray
    rows: int

    @classmethod
    def make(cls, ladder: Ladder, best: str, r2_validation: np.ndarray) -> _Table:
        target, score = ladder.bench.held_out.target, ladder.aligned[best]
        return cls(
            r2=score.feature_r2,
            r2_validation=r2_validation,
            correlation=score.correlations,
            token_share=ladder.aligned["token_target"].feature_r2,
            firings=(target > 0).sum(axis=0),
            rows=len(target),
        )

    @property
    def candidates(self) -> np.ndarray:
        """The features that are live and fire often enough, by R^2, highest first."""
        enough = np.flatnonzero(np.isfinite(self.r2) & (self.firings >= MIN_FIRINGS))
        return enough[np.argsort(-self.r2[enough], kind="stable")]

    def extremes(self, count: int) -> list[tuple[int, str]]:
        """Returns (feature, "most" or "least") of at most ``count`` at either end."""
        order = self.candidates
        count = min(count, len(order) // 2)
        ends = (("most", order[:count]), ("least", order[::-1][:count]))
        return [(int(i), rank) for rank, some in ends for i in some]

    def row(self, i: int, rank: str) -> dict[str, Any]:
        """Returns the columns of one feature."""
        return {
            "row": "feature",
            "rank": rank,
            "feature": i,
            "r2": float(self.r2[i]),
            "r2_validation": float(self.r2_validation[i]),
            "correlation": float(self.correlation[i]),
            "token_share": float(self.token_share[i]),
            "firings": int(self.firings[i]),
            "frequency": float(self.firings[i] / self.rows),
        }

    def binned(self) -> list[dict[str, Any]]:
        """Returns means and medians of the candidates by firing frequency and by token share."""
        some = self.candidates
        frequency, share = self.firings[some] / self.rows, self.token_share[some]
        return [
            *self._bins("frequency", FREQUENCY_EDGES.tolist(), frequency, some),
            *self._bins("token_share", SHARE_EDGES, share, some),
        ]

    def _bins(self, name: str, edges, values: np.ndarray, some: np.ndarray) -> list[dict]:
        rows = []
        for low, high in itertools.pairwise(edges):
            inside = some[(values <= high) & (values > (-np.inf if low is None else low))]
            if len(inside):
                rows.append({"row": name, "low": low, "high": high} | self._summary(inside))
        return rows

    def _summary(self, some: np.ndarray) -> dict[str, Any]:
        return {
            "n_features": len(some),
            "r2_mean": float(np.mean(self.r2[some])),
            "r2_median": float(np.median(self.r2[some])),
            "correlation_mean": float(np.mean(self.correlation[some])),
        }


class _Described:
    """Contexts and drivers of the features that are shown."""

    def __init__(self, ladder, loaded, best, again, store: Store, features: list[int]):
        self._bench, self._store, self._target = ladder.bench, store, ladder.task.target
        self._place = {feature: i for i, feature in enumerate(features)}
        which = np.asarray(features)
        test, train = (ladder.bench.splits[split] for split in ("test", "train"))
        self._map = loaded[best]
        self._match = attribution.correlations(train, which).argmax(axis=1)
        self._correlations = attribution.correlations(test, which)
        path = store.paths[store.models.index(self._target)]
        self._around = Contexts(store, self._target, token_bytes(models.load_tokenizer(path)))
        scales = attribution.scales(train)
        # Rungs that read features say directly what drives them; the best one does in any case.
        self._drivers = {
            kind: attribution.drivers(m, test, which, scales=scales)
            for kind, m in loaded.items()
            if m.reads == "features"
            or (kind == best and attribution.can_attribute(m, test.source.dictionary))
        }
        self._again = {
            kind: attribution.drivers(m, test, which, scales=scales) for kind, m in again.items()
        }

    def row(self, feature: int) -> dict[str, Any]:
        """Returns the columns of one feature that need text or a Jacobian."""
        i = self._place[feature]
        match = int(self._match[i])
        return {
            "match": {"feature": match, "correlation": float(self._correlations[i, match])},
            "attributions": [
                attribution.describe(kind, found, i, match, self._again.get(kind))
                for kind, found in self._drivers.items()
            ],
            "contexts": self._contexts(feature),
        }

    def _contexts(self, feature: int) -> list[dict[str, Any]]:
        """The strongest test rows, at most one of each document, as text around the token."""
        f = self._bench.held_out.target[:, feature]
        documents = self._bench.splits["test"].documents
        rows: dict[int, int] = {}  # of each document
        for row in np.argsort(-f, kind="stable"):
            if len(rows) == CONTEXTS or f[row] <= 0:
                break
            rows.setdefault(int(documents[row]), int(row))
        chosen = np.array([*rows.values()])
        shown = take(self._bench.splits["test"], chosen)
        predicted = maps.predict(self._map, shown, self._bench.batch_size)[:, feature]
        numbers = self._store.select("test")[chosen]
        return [
            self._around.snippet(number) | {"activation": float(f[row]), "predicted": float(p)}
            for number, row, p in zip(numbers, chosen, predicted)
        ]
