"""Which features transfer best: single features of B, their contexts, and what drives them."""

import itertools
from collections.abc import Sequence

import numpy as np

from crossdict_jax import maps, models
from crossdict_jax.activations.pairing import token_bytes
from crossdict_jax.activations.passages import Contexts
from crossdict_jax.evaluation import attribution
from crossdict_jax.evaluation.codes import correlations
from crossdict_jax.evaluation.scoring import FREQUENCY_EDGES, Scored
from crossdict_jax.maps import Task
from crossdict_jax.maps.base import predictions
from crossdict_jax.maps.fit import Loader
from crossdict_jax.results import pair_columns

SHOWN = 5  # features of each end of the ranking: as many as a reader looks at
MIN_FIRINGS = 20  # held-out rows on which a feature must fire for its R^2 to say something
CONTEXTS = 3  # of each feature, from different documents
SHARE_EDGES = (None, 0.0, 0.25, 0.5, 0.75, 1.0)  # of variance that the feature's token explains


def feature_rows(scored: Scored, reseeded: Sequence[Task], loader: Loader) -> list[dict]:
    """Returns the rows of feature_transfer.jsonl of one direction and pair of sites.

    The map is the aligned one with the highest R^2 on validation rows. Features are ranked by R^2
    on test rows; the extremes of many, they come with R^2 on validation rows too. token_share is
    the R^2 of the table of the target's own tokens.

    Args:
      reseeded: the same maps fitted from another seed, if the run has them. Kinds that learn
        from all problems learned from those of the layers with controls.
    """
    pairs, held_out = scored.bench.splits["validation"], scored.bench.held_out
    moments = pairs.target.feature_moments
    variance = moments.n * (moments.variance + (moments.mean - held_out.train_mean) ** 2)
    errors = {
        kind: sum(
            np.square(pairs.target.features(rows) - p).sum(axis=0, dtype=np.float64)
            for rows, p in predictions(m, pairs, scored.bench.batch_size)
        )
        for kind, m in scored.maps.items()
    }
    best = min(errors, key=lambda kind: errors[kind].sum())
    firings = (held_out.target > 0).sum(axis=0)
    columns = {
        "r2": scored.scores[best].feature_r2,
        "r2_validation": 1 - errors[best] / np.where(variance > 0, variance, np.nan),
        "correlation": scored.scores[best].correlations,
        "token_share": scored.scores["token_target"].feature_r2,
        "firings": firings,
        "frequency": firings / held_out.target.shape[0],
    }
    ranked = np.flatnonzero(np.isfinite(columns["r2"]) & (firings >= MIN_FIRINGS))
    ranked = ranked[np.argsort(-columns["r2"][ranked], kind="stable")]
    count = min(SHOWN, len(ranked) // 2)
    ends = {"most": ranked[:count], "least": ranked[::-1][:count]}
    shown = [(i, rank) for rank, end in ends.items() for i in end.tolist()]
    described = _described(scored, best, [i for i, _ in shown], reseeded, loader) if shown else []
    rows = [
        {"row": "feature", "rank": rank, "feature": i}
        | {name: values[i].item() for name, values in columns.items()}
        | more
        for (i, rank), more in zip(shown, described)
    ]
    for name, edges in (("frequency", FREQUENCY_EDGES.tolist()), ("token_share", SHARE_EDGES)):
        values = columns[name][ranked]
        for low, high in itertools.pairwise(edges):
            inside = ranked[(values <= high) & (values > (-np.inf if low is None else low))]
            if len(inside):
                median = float(np.median(columns["r2"][inside]))
                summary = {"n_features": len(inside), "r2_median": median}
                rows.append({"row": name, "low": low, "high": high} | summary)
    start = pair_columns(scored.task) | {"map": best, "pairing": scored.task.pairing}
    return [start | row for row in rows]


def _described(
    scored: Scored, best: str, features: list[int], reseeded: Sequence[Task], loader: Loader
) -> list[dict]:
    """The columns of each feature that need text or a Jacobian."""
    store, splits = loader.store, scored.bench.splits
    train, test, index = splits["train"], splits["test"], np.asarray(features)
    on_train, on_test = (
        np.concatenate(
            [r for _, r in correlations(pairs.target.codes[:, index], pairs.source.codes)]
        )
        for pairs in (train, test)
    )
    deviations = (np.sqrt(s.feature_moments.variance) for s in (train.source, train.target))
    a, b = deviations  # a source feature that never varies drives nothing
    scale = a[None, :] / np.where(b > 0, b, 1.0)[index][:, None]
    # Maps that read features show their drivers, and so does the best map, but for token tables and
    # for activations of a transcoder, whose decoder writes elsewhere.
    seen = {"features"} if test.source.dictionary.transcodes else {"features", "activations"}
    of_run = {
        kind: m
        for kind, m in scored.maps.items()
        if m.reads == "features" or (kind == best and m.reads in seen)
    }
    ends = test.target.dictionary, test.source.dictionary
    of_other_seed = {task.kind: maps.load(task.path(loader.work), *ends) for task in reseeded}
    attributed, again = (
        {kind: attribution.drivers(m, test.source, index, scale=scale) for kind, m in some.items()}
        for some in (of_run, of_other_seed)
    )
    path = store.paths[store.models.index(scored.task.target)]
    around = Contexts(store, scored.task.target, token_bytes(models.load_tokenizer(path)))
    numbers, described = store.select("test"), []
    for i, feature in enumerate(features):
        f = scored.bench.held_out.target[:, [feature]].toarray()[:, 0]
        strongest: dict[int, int] = {}  # document -> its strongest row
        for row in np.argsort(-f, kind="stable"):
            if len(strongest) == CONTEXTS or f[row] <= 0:
                break
            strongest.setdefault(int(test.documents[row]), int(row))
        match = int(on_train[i].argmax())
        contexts = [
            around.snippet(numbers[row]) | {"activation": float(f[row])}
            for row in strongest.values()
        ]
        attributions = [
            {"map": kind} | attribution.describe(of_map, i, again.get(kind))
            for kind, of_map in attributed.items()
        ]
        correlation = {"feature": match, "correlation": float(on_test[i, match])}
        described.append({"match": correlation, "attributions": attributions, "contexts": contexts})
    return described
