"""Scores maps on held-out rows: one way for the maps of a run, for their controls and for studies.

A bench holds the paired rows of one direction and pair of sites; every map is scored on the same.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from crossdict_jax import maps
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import EvaluationConfig, MapConfig
from crossdict_jax.evaluation.codes import Moments, SideCodes
from crossdict_jax.evaluation.transfer import (
    HeldOut,
    Score,
    TokenMeans,
    hold_out,
    measure,
    normalized,
    verdict,
)
from crossdict_jax.maps import Map, Pairs, Problem, Task
from crossdict_jax.maps.base import slices
from crossdict_jax.maps.fit import Loader
from crossdict_jax.maps.kinds import token
from crossdict_jax.results import PAIR

CONTEXT_ROWS = 2**14  # training rows, evenly spread, that the means of context_gain are taken from
CORRELATION_EDGES = np.linspace(-1, 1, 41).round(2)
FREQUENCY_EDGES = np.array([0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1])

Scores = dict[str, Score]  # by kind of map


@dataclasses.dataclass(frozen=True)
class Bench:
    """Paired rows on which maps are scored."""

    splits: dict[str, Pairs]  # train, validation, test
    held_out: HeldOut  # the test pairs' target features
    l0_source: float  # mean active source features per test row
    context: Pairs  # training pairs whose source token occurs in the test pairs, token by token
    by_token: sparse.csc_array  # [tokens, context rows], 1 where a row ends in the token
    token_index: np.ndarray  # int [n], each test row's row of ``by_token``; -1 where it has none
    token_features: np.ndarray  # [tokens, width], means of the target's features after each token
    batch_size: int  # rows per forward


def make_bench(
    splits: dict[str, Pairs], settings: EvaluationConfig, *, seed: int, codes: SideCodes
) -> Bench:
    """Returns a bench of paired rows {"train", "validation", "test": pairs}.

    Args:
      codes: keeps what is encoded, for benches that share sides.
    """
    train, test = splits["train"], splits["test"]
    held_out = hold_out(
        codes(test.target).toarray(),
        train_mean=Moments.of(codes(train.target)).mean,
        documents=test.documents,
        pool=settings.pool,
        bootstrap=settings.bootstrap,
        seed=seed,
    )
    rows = np.flatnonzero(np.isin(train.source.tokens, test.source.tokens))
    if len(rows) > CONTEXT_ROWS:
        rows = rows[np.linspace(0, len(rows) - 1, CONTEXT_ROWS).astype(np.int64)]
    rows = rows[np.argsort(train.source.tokens[rows], kind="stable")]
    ids, index = np.unique(train.source.tokens[rows], return_inverse=True)
    once = np.ones(len(rows)), index, np.arange(len(rows) + 1)
    by_token = sparse.csc_array(once, shape=(len(ids), len(rows)))
    sums = (by_token @ codes(train.target)[rows]).toarray()
    position = np.minimum(np.searchsorted(ids, test.source.tokens), max(len(ids) - 1, 0))
    seen = ids[position] == test.source.tokens if len(ids) else np.zeros(len(test), bool)
    return Bench(
        splits=splits,
        held_out=held_out,
        l0_source=np.count_nonzero(codes(test.source).data > 0) / len(test),
        context=take(train, rows),
        by_token=by_token,
        token_index=np.where(seen, position, -1),
        token_features=sums / by_token.sum(axis=1)[:, None],
        batch_size=settings.batch_size,
    )


def take(pairs: Pairs, rows: np.ndarray | slice) -> Pairs:
    """Returns some of the rows of pairs."""
    return Pairs(pairs.source.take(rows), pairs.target.take(rows), pairs.documents[rows])


def score(m: Map, bench: Bench, shown: tuple[Pairs, Pairs] | None = None) -> Score:
    """Returns the score of a map.

    Args:
      shown: (test, context) pairs that the map reads in place of the bench's own.
    """
    test, context = shown or (bench.splits["test"], bench.context)
    sums = np.zeros(bench.token_features.shape)
    for rows in slices(len(context)):
        predicted = maps.predict(m, take(context, rows), bench.batch_size)
        sums += bench.by_token[:, rows] @ predicted
    return measure(
        maps.predict(m, test, bench.batch_size),
        bench.held_out,
        l0_source=bench.l0_source,
        token_means=TokenMeans(
            index=bench.token_index,
            target=bench.token_features,
            predicted=sums / bench.by_token.sum(axis=1)[:, None],
        ),
    )


def score_token_table(bench: Bench, settings: MapConfig, *, of_target: bool = False) -> Score:
    """Returns the score of the token map, fitted on the bench's training and validation rows.

    Args:
      of_target: whether it reads the target's own tokens, which no map knows.
    """

    def read(pairs: Pairs) -> Pairs:
        tokens = (pairs.target if of_target else pairs.source).tokens
        return dataclasses.replace(pairs, source=dataclasses.replace(pairs.source, tokens=tokens))

    problem = Problem("token table", *(read(bench.splits[s]) for s in ("train", "validation")))
    (fitted,) = token.fit([problem], settings, seed=0, directory=Path())
    return score(fitted.map, bench, (read(bench.splits["test"]), read(bench.context)))


# ---------------------------------------------------------------- the maps of a layer pair


@dataclasses.dataclass(frozen=True)
class Scored:
    """The maps of one direction and pair of sites, scored."""

    task: Task  # one of its maps
    bench: Bench  # of the aligned pairs
    maps: dict[str, Map]  # the aligned ones, by kind
    scores: dict[str, Scores]  # by pairing; of aligned pairs also "token_target", see below
    tokens: dict[str, Score]  # by pairing, the token map's, whether or not the run has that map

    def rows(self, ceiling: Scores) -> list[dict]:
        """Returns the rows of transfer.jsonl.

        "token_target" is the table of the target's own tokens, which no map knows.

        Args:
          ceiling: the maps' scores from the target's own second dictionary, where there are any.
        """
        rows = []
        for pairing, scores in self.scores.items():
            for kind, value in scores.items():
                row = columns(self.task, kind, pairing) | value.row()
                row["verdict"] = verdict(value, self.tokens[pairing])
                if pairing == "aligned":
                    null = self.scores["shuffled"].get(kind)
                    row |= normalized(value, null, ceiling.get(kind))
                rows.append(row)
        return rows

    def correlation_rows(self) -> list[dict]:
        """Returns the rows of features.jsonl: correlations of live features, and by frequency."""
        held_out, rows = self.bench.held_out, []
        frequency = (held_out.target > 0).mean(axis=0)[held_out.live]
        for kind, value in self.scores["aligned"].items():
            r = value.correlations[held_out.live]
            counts, _ = np.histogram(r, CORRELATION_EDGES)
            bins = []
            for low, high in itertools.pairwise(FREQUENCY_EDGES.tolist()):
                inside = r[(frequency > low) & (frequency <= high)]
                mean = float(inside.mean()) if len(inside) else None
                bins.append({"low": low, "high": high, "n": len(inside), "mean": mean})
            histogram = {"edges": CORRELATION_EDGES.tolist(), "counts": counts.tolist()}
            row = {"correlation_histogram": histogram, "correlation_by_frequency": bins}
            rows.append(columns(self.task, kind) | row)
        return rows


def score_maps(
    tasks: Sequence[Task],
    loader: Loader,
    map_settings: MapConfig,
    *,
    settings: EvaluationConfig,
    seed: int,
    codes: SideCodes,
) -> Scored:
    """Returns the scores of every map of one direction and pair of sites.

    Args:
      tasks: all maps of this direction and these sites, aligned and shuffled.
    """
    benches, scores, tokens, loaded = {}, {}, {}, {}
    for pairing in ("aligned", "shuffled"):
        task = dataclasses.replace(tasks[0], pairing=pairing)
        splits = {split: loader.pairs(task, split) for split in SPLITS}
        bench = benches[pairing] = make_bench(splits, settings, seed=seed, codes=codes)
        loaded[pairing] = {
            task.kind: maps.load(task.path(loader.work), splits["test"].target.dictionary)
            for task in tasks
            if task.pairing == pairing
        }
        scores[pairing] = {kind: score(m, bench) for kind, m in loaded[pairing].items()}
        tokens[pairing] = scores[pairing].get("token") or score_token_table(bench, map_settings)
    bench = benches["aligned"]
    scores["aligned"]["token_target"] = score_token_table(bench, map_settings, of_target=True)
    return Scored(tasks[0], bench, loaded["aligned"], scores, tokens)


def pair_columns(pair) -> dict[str, str]:
    """Returns the columns that name a direction and its sites, of a task or a dictionary pair."""
    return {name: str(getattr(pair, name)) for name in PAIR}


def columns(task: Task, kind: str, pairing: str = "aligned") -> dict[str, str]:
    """Returns the columns that say what a row is about."""
    return pair_columns(task) | {"map": kind, "pairing": pairing}
