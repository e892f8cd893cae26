"""Scores every rung of one direction and pair of sites on the same held-out rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crossdict_jax import maps, stats
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config
from crossdict_jax.evaluation.transfer import (
    HeldOut,
    Score,
    TokenMeans,
    hold_out,
    measure,
    normalized,
    verdict,
)
from crossdict_jax.maps import Map, Pairs, Problem, Side, Task
from crossdict_jax.maps.base import encode_rows, slices
from crossdict_jax.maps.kinds import token
from crossdict_jax.maps.moments import token_sums
from crossdict_jax.workdir import Workdir

CONTEXT_ROWS = 2**14  # training rows, evenly spread, that the means of context_gain are taken from
CORRELATION_EDGES = np.linspace(-1, 1, 41).round(2)
FREQUENCY_EDGES = np.array([0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1])

Splits = dict[str, Pairs]
Scores = dict[str, Score]  # by rung


@dataclasses.dataclass(frozen=True)
class Ladder:
    """One direction and pair of sites, scored.

    Attributes:
      bench: the aligned pairs.
      aligned, shuffled: the rungs' scores; ``aligned`` has ``token_target``, the table of the
        target's own tokens, which knows what no map can, as well.
      token_aligned, token_shuffled: the token rung's score, whether or not it is on the ladder.
    """

    task: Task
    bench: Bench
    aligned: Scores
    shuffled: Scores
    token_aligned: Score
    token_shuffled: Score

    def rows(self, skyline: Scores) -> list[dict]:
        """Returns the rows of transfer.jsonl.

        Args:
          skyline: the rungs' scores from the target's own second dictionary, where there are any.
        """
        rows = []
        for kind, score in self.aligned.items():
            row = where(self.task, kind, "aligned") | score.row()
            row |= {"verdict": verdict(score, self.token_aligned)}
            placed = normalized(score, self.shuffled.get(kind), skyline.get(kind))
            for name, estimate in placed.items():
                row |= stats.columns(name, estimate)
            rows.append(row)
        for kind, score in self.shuffled.items():
            row = where(self.task, kind, "shuffled") | score.row()
            rows.append(row | {"verdict": verdict(score, self.token_shuffled)})
        return rows

    def figures(self) -> list[dict]:
        """Returns the rows of features.jsonl: correlations of single features, aligned pairs."""
        return [
            where(self.task, kind, "aligned") | _correlation_figures(score, self.bench.held_out)
            for kind, score in self.aligned.items()
        ]


def score_ladder(
    tasks: Sequence[Task], config: Config, store: Store, work: Workdir, progress
) -> Ladder:
    """Returns the scores of every rung of one direction and pair of sites.

    Args:
      tasks: all maps of this direction and these sites, aligned and shuffled.
      progress: a tqdm bar, updated by one for every task.
    """
    splits = _load(tasks[0], store, work)
    train_mean, _ = splits["train"].target.feature_moments
    benches, scores, tokens = {}, {}, {}
    for pairing in ("aligned", "shuffled"):
        splits = splits if pairing == "aligned" else _shuffled(splits, config.seed)
        bench = Bench.make(splits, train_mean=train_mean, config=config)
        here = [task for task in tasks if task.pairing == pairing]
        benches[pairing], scores[pairing] = bench, bench.score_all(here, work, progress)
        tokens[pairing] = scores[pairing].get("token") or bench.score_source_tokens(config)
    scores["aligned"]["token_target"] = benches["aligned"].score_target_tokens(config)
    return Ladder(
        task=tasks[0],
        bench=benches["aligned"],
        **scores,
        token_aligned=tokens["aligned"],
        token_shuffled=tokens["shuffled"],
    )


@dataclasses.dataclass(frozen=True)
class Bench:
    """One set of pairs on which all rungs are scored.

    Attributes:
      splits: {"train", "validation", "test": pairs}.
      held_out: the test pairs' target features.
      l0_source: mean active source features per test row.
      context: training pairs whose source token occurs in the test pairs.
      token_ids: int32 [tokens], the source tokens of ``context``.
      token_features: [tokens, width], the means of the target's features after each of them.
      batch_size: rows per forward.
    """

    splits: Splits
    held_out: HeldOut
    l0_source: float
    context: Pairs
    token_ids: np.ndarray
    token_features: np.ndarray
    batch_size: int

    @classmethod
    def make(cls, splits: Splits, *, train_mean: np.ndarray, config: Config) -> Bench:
        test, settings = splits["test"], config.evaluation
        held_out = hold_out(
            encode(test.target),
            train_mean=train_mean,
            documents=test.documents,
            pool=settings.pool,
            bootstrap=settings.bootstrap,
            seed=config.seed,
        )
        context = _context(splits["train"], test.source.tokens)
        target = context.target
        sums = token_sums(
            context.source.tokens,
            lambda rows: encode_rows(target.dictionary, target.x[rows]),
            size=target.dictionary.width,
        )
        return cls(
            splits=splits,
            held_out=held_out,
            l0_source=_l0(test.source),
            context=context,
            token_ids=sums.ids,
            token_features=sums.shrunk(0.0)[:-1],
            batch_size=settings.batch_size,
        )

    def score(self, m: Map, read: Callable[[Pairs], Pairs] = lambda pairs: pairs) -> Score:
        """Returns the score of a map that is shown ``read(pairs)``."""
        test, context = self.splits["test"], self.context
        means = token_sums(
            context.source.tokens,
            lambda rows: maps.predict(m, read(take(context, rows)), self.batch_size),
            size=self.held_out.target.shape[1],
        )
        return measure(
            maps.predict(m, read(test), self.batch_size),
            self.held_out,
            l0_source=self.l0_source,
            token_means=TokenMeans(
                index=_places(test.source.tokens, self.token_ids),
                target=self.token_features,
                predicted=means.shrunk(0.0)[:-1],
            ),
        )

    def score_all(
        self,
        tasks: Sequence[Task],
        work: Workdir,
        progress,
        read: Callable[[Task, Pairs], Pairs] = lambda task, pairs: pairs,
    ) -> Scores:
        """Returns the score of every task's map, each shown ``read(task, pairs)``."""
        scores = {}
        for task in tasks:
            progress.set_postfix_str(f"{task.kind}: {task.label}", refresh=False)
            scores[task.kind] = self.score(maps.load(task.path(work)), partial(read, task))
            progress.update()
        return scores

    def score_source_tokens(self, config: Config) -> Score:
        """Returns the score of the token rung, fitted here."""
        return self.score(_token_table(self.splits, config))

    def score_target_tokens(self, config: Config) -> Score:
        """Returns the score of the token table of the target's own tokens."""
        splits = {name: _read_target_tokens(pairs) for name, pairs in self.splits.items()}
        return self.score(_token_table(splits, config), read=_read_target_tokens)


def _load(task: Task, store: Store, work: Workdir) -> Splits:
    where = (task.source, task.target, task.site_source, task.site_target)
    return {s: maps.load_pairs(store, *where, s, work) for s in ("train", "validation", "test")}


def _shuffled(splits: Splits, seed: int) -> Splits:
    return {s: maps.shuffled(p, maps.shuffle_seed(seed, s)) for s, p in splits.items()}


def take(pairs: Pairs, rows: np.ndarray | slice) -> Pairs:
    """Returns some of the rows of pairs."""
    return Pairs(pairs.source.take(rows), pairs.target.take(rows), pairs.documents[rows])


def _context(train: Pairs, tokens: np.ndarray) -> Pairs:
    rows = np.flatnonzero(np.isin(train.source.tokens, tokens))
    if len(rows) > CONTEXT_ROWS:
        rows = rows[np.linspace(0, len(rows) - 1, CONTEXT_ROWS).astype(np.int64)]
    return take(train, rows)


def _read_target_tokens(pairs: Pairs) -> Pairs:
    source = dataclasses.replace(pairs.source, tokens=pairs.target.tokens)
    return dataclasses.replace(pairs, source=source)


def _token_table(splits: Splits, config: Config) -> Map:
    """The token rung of these pairs: fitted on training rows, tuned on validation rows."""
    problem = Problem("token table", splits["train"], splits["validation"])
    (fitted,) = token.fit([problem], config.map, seed=config.seed, directory=Path())
    return fitted.map


def _places(tokens: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns each token's place in the ascending ``ids``, -1 where it is absent."""
    place = np.minimum(np.searchsorted(ids, tokens), max(len(ids) - 1, 0))
    return np.where(ids[place] == tokens, place, -1) if len(ids) else np.full(len(tokens), -1)


def encode(side: Side) -> np.ndarray:
    """Returns the features float32 [n, width] of a side."""
    parts = [encode_rows(side.dictionary, side.x[rows]) for rows in slices(len(side.x))]
    return np.concatenate(parts)


def _l0(side: Side) -> float:
    active = [encode_rows(side.dictionary, side.x[rows]) > 0 for rows in slices(len(side.x))]
    return sum(int(a.sum()) for a in active) / len(side.x)


def where(task: Task, kind: str, pairing: str) -> dict[str, Any]:
    """Returns the columns that say what a row is about."""
    return {
        "source": task.source,
        "target": task.target,
        "site_source": str(task.site_source),
        "site_target": str(task.site_target),
        "map": kind,
        "pairing": pairing,
    }


def _correlation_figures(score: Score, held_out: HeldOut) -> dict[str, Any]:
    """Small tables of the correlations of live features, overall and by how often they fire."""
    live = held_out.live
    r, frequency = score.correlations[live], (held_out.target > 0).mean(axis=0)[live]
    counts, _ = np.histogram(r, CORRELATION_EDGES)
    bins = []
    for low, high in itertools.pairwise(FREQUENCY_EDGES):
        inside = r[(frequency > low) & (frequency <= high)]
        mean = float(inside.mean()) if len(inside) else None
        bins.append({"low": float(low), "high": float(high), "n": len(inside), "mean": mean})
    return {
        "correlation_histogram": {"edges": CORRELATION_EDGES.tolist(), "counts": counts.tolist()},
        "correlation_by_frequency": bins,
    }
