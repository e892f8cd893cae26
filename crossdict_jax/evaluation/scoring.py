"""Scores maps of runs, controls and studies on held-out rows."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from crossdict_jax import maps
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import EvaluationConfig, MapConfig
from crossdict_jax.evaluation import transfer
from crossdict_jax.evaluation.transfer import HeldOut, Score, TokenMeans
from crossdict_jax.maps import Map, Pairs, Problem, Task
from crossdict_jax.maps.base import predictions, slices
from crossdict_jax.maps.codes import sums_of_runs
from crossdict_jax.maps.fit import Loader, shown
from crossdict_jax.maps.kinds.token import Token
from crossdict_jax.results import pair_columns

CONTEXT_ROWS = 2**14  # training rows, evenly spread, for the means of context_gain
FREQUENCY_EDGES = np.array([0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1])


@dataclasses.dataclass(frozen=True)
class Bench:
    """Paired rows on which maps are scored."""

    splits: dict[str, Pairs]  # train, validation, test
    held_out: HeldOut  # the test pairs' target features
    l0_source: float  # mean active source features per test row
    context: Pairs  # training pairs whose source token occurs in the test pairs, token by token
    context_index: np.ndarray  # int [context], index of the row's token among these
    token_index: np.ndarray  # int [n], the same of test rows; -1 where the context has none
    token_features: np.ndarray  # [tokens, width], means of the target's features after each token
    batch_size: int  # rows per forward


def make_bench(splits: dict[str, Pairs], settings: EvaluationConfig, *, seed: int) -> Bench:
    """Returns a bench of paired rows {"train", "validation", "test": pairs}."""
    train, test = splits["train"], splits["test"]
    held_out = transfer.hold_out(
        test.target.codes,
        train_mean=train.target.feature_moments.mean,
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
    features = ((part, train.target.features(rows[part])) for part in slices(len(rows)))
    position = np.minimum(np.searchsorted(ids, test.source.tokens), max(len(ids) - 1, 0))
    seen = ids[position] == test.source.tokens if len(ids) else np.zeros(len(test), bool)
    return Bench(
        splits=splits,
        held_out=held_out,
        l0_source=test.source.codes.nnz / len(test),
        context=train.take(rows),
        context_index=index,
        token_index=np.where(seen, position, -1),
        token_features=means_by_token(index, features, held_out.target.shape[1]),
        batch_size=settings.batch_size,
    )


def means_by_token(index: np.ndarray, batches: Iterable[tuple], width: int) -> np.ndarray:
    """Returns float32 [tokens, width], means of rows of equal ``index`` [n], ascending.

    ``batches`` are (slice of the rows, their values [m, width]).
    """
    counts = np.bincount(index)
    sums = np.zeros((len(counts), width))
    for rows, values in batches:
        tokens, starts = np.unique(index[rows], return_index=True)
        sums[tokens] += sums_of_runs(values, starts)
    return (sums / counts[:, None]).astype(np.float32)


def score(m: Map, bench: Bench, reads: tuple[Pairs, Pairs] | None = None) -> Score:
    """Returns a map's score, on the bench's (test, context) pairs or as it reads others."""
    test, context = reads or (bench.splits["test"], bench.context)
    predicted = predictions(m, context, bench.batch_size)
    means = means_by_token(bench.context_index, predicted, bench.held_out.target.shape[1])
    return transfer.measure(
        predictions(m, test, bench.batch_size),
        bench.held_out,
        l0_source=bench.l0_source,
        token_means=TokenMeans(bench.token_index, bench.token_features, means),
    )


def score_token_table(bench: Bench, *, of_target: bool = False) -> Score:
    """Returns the score of the source's token table, or of the target's, which no map knows."""
    pairs = [*(bench.splits[split] for split in SPLITS), bench.context]
    if of_target:
        sides = (dataclasses.replace(p.source, tokens=p.target.tokens) for p in pairs)
        pairs = [dataclasses.replace(p, source=side) for p, side in zip(pairs, sides)]
    train, validation, test, context = pairs
    (fitted,) = Token.fit([Problem("token table", train, validation)], MapConfig())
    return score(fitted.map, bench, (test, context))


@dataclasses.dataclass(frozen=True)
class Scored:
    """Maps between the same two sides, scored on one bench."""

    task: Task  # one of them
    bench: Bench
    maps: dict[str, Map]  # by kind
    scores: dict[str, Score]  # by kind; "token_target" is no map
    token: Score  # of the token map, even where it is not among them

    def row(self, kind: str, task: Task) -> dict:
        """Returns a map's columns of a result row that is named by ``task``."""
        value = self.scores[kind]
        row = pair_columns(task) | {"map": kind, "pairing": task.pairing} | value.row()
        return row | {"verdict": transfer.verdict(value, self.token)}

    def correlation_rows(self) -> list[dict]:
        """Returns the rows of features.jsonl: correlations of live features by frequency."""
        held_out, rows = self.bench.held_out, []
        frequency = (held_out.target > 0).sum(axis=0)[held_out.live] / held_out.target.shape[0]
        for kind, value in self.scores.items():
            r, bins = value.correlations[held_out.live], []
            for low, high in itertools.pairwise(FREQUENCY_EDGES.tolist()):
                inside = r[(frequency > low) & (frequency <= high)]
                mean = float(inside.mean()) if len(inside) else None
                bins.append({"low": low, "high": high, "n": len(inside), "mean": mean})
            row = pair_columns(self.task) | {"map": kind, "pairing": self.task.pairing}
            rows.append(row | {"correlation_by_frequency": bins})
        return rows


def score_tasks(tasks: Sequence[Task], loader: Loader) -> Scored:
    """Returns the scores of maps, or of controls, between the same two sides."""
    splits = {split: loader.rows(tasks[0], split) for split in SPLITS}
    config, test = loader.config, splits["test"]
    bench = make_bench(splits, config.evaluation, seed=config.seed)
    loaded, scores, reads = {}, {}, {}
    for task in tasks:
        ends = test.target.dictionary, test.source.dictionary
        m = loaded[task.kind] = maps.load(task.path(loader.work), *ends)
        if m.reads not in reads:  # what a control is shown depends on what it reads
            reads[m.reads] = shown(task, test), shown(task, bench.context)
        scores[task.kind] = score(m, bench, reads[m.reads])
    token_score = scores.get("token") or score_token_table(bench)
    return Scored(tasks[0], bench, loaded, scores, token_score)


def score_maps(tasks: Sequence[Task], loader: Loader) -> dict[str, Scored]:
    """Returns, by pairing, the scores of every map of one direction and pair of sites.

    Aligned ones include "token_target", the table of the target's own tokens.
    """
    scored = {}
    for pairing, group in itertools.groupby(tasks, key=lambda task: task.pairing):
        scored[pairing] = score_tasks(list(group), loader)
    aligned = scored["aligned"]
    aligned.scores["token_target"] = score_token_table(aligned.bench, of_target=True)
    return scored


def transfer_rows(scored: dict[str, Scored], ceiling: Scored | None = None) -> list[dict]:
    """Returns the rows of transfer.jsonl, placed between shuffled pairs and the ceiling."""
    null, top = (other.scores if other else {} for other in (scored.get("shuffled"), ceiling))
    rows = []
    for pairing, some in scored.items():
        for kind, value in some.scores.items():
            rows.append(some.row(kind, some.task))
            if pairing == "aligned":
                rows[-1] |= transfer.normalized(value, null.get(kind), top.get(kind))
    return rows
