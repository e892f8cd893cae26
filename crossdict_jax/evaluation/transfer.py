"""How well features predicted from model A fit model B's own, on held-out documents.

Every number is defined over the whole split, from sums; none is a mean of per-batch ratios. A
feature is *active* where it is above zero, and *live* if it is active in some row and varies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np

from crossdict_jax import stats
from crossdict_jax.errors import UserError
from crossdict_jax.evaluation import retrieval
from crossdict_jax.evaluation.correlation import Moments, correlation, mean_over
from crossdict_jax.results import BEATS_MEAN, BEATS_TOKEN, NO_BETTER
from crossdict_jax.stats import Estimate, Resamples

CHUNK_ELEMENTS = 2**17  # of a block of rows: its temporaries stay in the processor's cache
ROUNDING = 1e-5  # a vector within this share of the mean's length from the mean is the mean

NORMALIZED = ("r2", "cosine_centered", "top1", "feature_correlation")  # that have a null near 0
MARGIN = 0.05  # a skyline less than this above the null leaves no room to place a score in


@dataclasses.dataclass(frozen=True)
class TokenMeans:
    """Means over training rows that end in the same source token: what token identity explains.

    Attributes:
      index: int [n], each held-out row's place in the tables; -1 if no training row has its token.
      target: [tokens, width], means of B's features.
      predicted: [tokens, width], means of the map's predictions.
    """

    index: np.ndarray
    target: np.ndarray
    predicted: np.ndarray


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """B's features on held-out rows, and everything that all predictions share.

    Attributes:
      target: [n, width].
      train_mean: float64 [width], the mean of B's features over training rows.
      resamples: of the documents of these rows.
      pool: the retrieval candidates.
    """

    target: np.ndarray
    train_mean: np.ndarray
    resamples: Resamples
    pool: retrieval.Pool

    @cached_property
    def live(self) -> np.ndarray:
        """bool [width]: active in some row, and not constant."""
        return (self.target > 0).any(0) & (self.target != self.target[:1]).any(0)


@dataclasses.dataclass(frozen=True)
class Score:
    """All metrics of one prediction.

    Attributes:
      plain: {key: number or None}, without intervals.
      estimates: {key: Estimate or None}, with them.
      correlations: [width], per feature, NaN where the target is not live.
      feature_r2: [width], likewise.
    """

    plain: dict[str, Any]
    estimates: dict[str, Estimate | None]
    correlations: np.ndarray
    feature_r2: np.ndarray

    def row(self) -> dict[str, Any]:
        """Returns the columns of transfer.jsonl: every estimate with its _low and _high."""
        row = dict(self.plain)
        for name, estimate in self.estimates.items():
            row |= stats.columns(name, estimate)
        return row


def transfer_metrics(
    predicted,
    target,
    *,
    train_mean,
    documents=None,
    pool: int = 0,
    bootstrap: int = 200,
    seed: int = 0,
    l0_source=None,
    token_means: TokenMeans | None = None,
) -> dict[str, float | int | None]:
    """Returns every metric of transfer.jsonl for features predicted on held-out rows.

    With p and t the rows of ``predicted`` and ``target`` and m the training mean:

    - fvu = sum ||t - p||^2 / sum ||t - m||^2 over all rows, r2 = 1 - fvu (variance-weighted). If
      every target equals m, fvu is 0 for a perfect prediction and 1 (r2 = 0) for any other.
    - r2_per_feature_median: the same per feature, median over the n_live live features.
    - cosine, and cosine_mean_predictor, that of m; cosine_centered of p - m and t - m. A zero
      vector has cosine 0, and so has a p that equals m up to float32 rounding.
    - top1, mean_rank (from 1): of a row's target among a fixed pool of targets, by cosine to p;
      ties count against the prediction, bit-identical targets count as the true one.
    - feature_correlation: mean Pearson correlation over live features, 0 for a constant
      prediction; rate_correlation: correlation over features of the firing rates.
    - l0_source, l0_target, l0_predicted: active features per row; sparsity_similarity: mean
      Jaccard index of the active sets, 1 where both are empty.
    - context_gain = 1 - sum ||(t - T) - (p - P)||^2 / sum ||t - T||^2, with T and P the training
      means of target and prediction for the row's source token, over the rows whose source token
      occurs in training. Mean and token tables gain exactly 0.

    The main ones come with _low and _high: 95 % bootstrap percentiles over documents, None with
    fewer than two documents. A number that is undefined is None; r2 is always finite.

    Args:
      predicted: numpy or jax array [n, width].
      target: [n, width].
      train_mean: [width], of the target over the training rows.
      documents: [n], the document of each row; by default every row is its own.
      pool: retrieval candidates; 0 means min(8192, n).
      bootstrap: resamples.
      seed: of the resamples and of the pool.
      l0_source: [n], active source features per row (or their mean), only copied to the result.
      token_means: needed for context_gain.

    Raises:
      UserError: shapes disagree, there is no row, a value is not finite, or the pool is larger
        than n.
    """
    predicted, target = _floats("predicted", predicted), _floats("target", target)
    documents = np.arange(len(target)) if documents is None else np.asarray(documents)
    held_out = hold_out(
        target,
        train_mean=train_mean,
        documents=documents,
        pool=pool,
        bootstrap=bootstrap,
        seed=seed,
    )
    return measure(predicted, held_out, l0_source=l0_source, token_means=token_means).row()


def hold_out(target, *, train_mean, documents, pool: int, bootstrap: int, seed: int) -> HeldOut:
    """Returns what all predictions of ``target`` share; arguments as in ``transfer_metrics``."""
    target, train_mean = _floats("target", target), _floats("train_mean", train_mean)
    if target.ndim != 2 or not target.size:
        raise UserError(
            f"target has shape {list(target.shape)}; it must be [rows, width], not empty."
        )
    n, width = target.shape
    _check_shape("train_mean", train_mean, (width,), "one number per feature")
    _check_shape("documents", documents, (n,), "one document per row")
    if not 0 <= pool <= n:
        raise UserError(f"pool={pool} is not between 1 and the {n} rows; lower it, or 0 for all.")
    size = pool or min(retrieval.LARGEST_DEFAULT_POOL, n)
    return HeldOut(
        target=target,
        train_mean=train_mean.astype(np.float64),
        resamples=_resamples(documents, bootstrap, seed),
        pool=retrieval.make_pool(target, size=size, seed=seed),
    )


def _resamples(documents: np.ndarray, count: int, seed: int) -> Resamples:
    if count < 0:
        raise UserError(f"bootstrap={count} must not be negative; 0 leaves intervals out.")
    return stats.draw(documents, count=count, seed=seed)


def _floats(name: str, values) -> np.ndarray:
    """``values`` as float32 or float64; UserError if one is not finite."""
    values = np.asarray(values)
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds NaN or infinite values; look at what made it.")
    return values


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...], meaning: str) -> None:
    if array.shape != shape:
        raise UserError(f"{name} has shape {list(array.shape)}, not {list(shape)} ({meaning}).")


def measure(
    predicted, held_out: HeldOut, *, l0_source=None, token_means: TokenMeans | None = None
) -> Score:
    """Returns all metrics of ``predicted`` [n, width]; see ``transfer_metrics``."""
    predicted = _floats("predicted", predicted)
    _check_shape("predicted", predicted, held_out.target.shape, "that of the target")
    draws, live = held_out.resamples, held_out.live
    rows, columns, moments = _sums(predicted, held_out)
    rank = retrieval.ranks(predicted, held_out.pool)
    correlations = moments.correlations()
    fvu = draws.estimate(rows["error"], rows["variance"])
    feature_r2 = np.where(live, 1 - stats.ratio(columns["error"], columns["variance"]), np.nan)
    in_pool = dataclasses.replace(draws, index=draws.index[held_out.pool.rows])
    estimates = {
        "fvu": fvu,
        "r2": 1.0 - fvu,
        "cosine": draws.mean(rows["cosine"]),
        "cosine_mean_predictor": draws.mean(rows["cosine_mean_predictor"]),
        "cosine_centered": draws.mean(rows["cosine_centered"]),
        "top1": in_pool.mean(rank == 1),
        "mean_rank": in_pool.mean(rank),
        "feature_correlation": mean_over(correlations, live),
        "l0_target": draws.mean(rows["l0_target"]),
        "l0_predicted": draws.mean(rows["l0_predicted"]),
        "sparsity_similarity": draws.mean(rows["jaccard"]),
        "context_gain": _context_gain(predicted, held_out, token_means),
    }
    plain = {
        "n_rows": len(predicted),
        "n_documents": draws.n_documents,
        "n_live": int(live.sum()),
        "pool": len(held_out.pool.rows),
        "l0_source": None if l0_source is None else float(np.mean(l0_source)),
        "r2_per_feature_median": float(np.median(feature_r2[live])) if live.any() else None,
        "rate_correlation": correlation(columns["active_predicted"], columns["active_target"]),
        "n_context_rows": 0 if token_means is None else int((token_means.index >= 0).sum()),
    }
    return Score(plain, estimates, np.where(live, correlations[0], np.nan), feature_r2)


def verdict(score: Score, token: Score | None) -> str:
    """Returns what may be said of a map, from paired bootstrap differences over documents.

    It beats the mean if both its R^2 (the mean's is 0) and its centred cosine are surely above
    0, and the token rung if moreover its R^2 is surely above the token rung's.

    Args:
      token: the token rung's score on the same held-out rows and resamples; None if there is none,
        and then nothing can be said to beat it.
    """
    r2, centered = score.estimates["r2"], score.estimates["cosine_centered"]
    if not (r2.surely_positive and centered.surely_positive):
        return NO_BETTER
    if token is not None and (r2 - token.estimates["r2"]).surely_positive:
        return BEATS_TOKEN
    return BEATS_MEAN


def normalized(
    score: Score, null: Score | None, skyline: Score | None
) -> dict[str, Estimate | None]:
    """Returns {key_normalized: (score - null) / (skyline - null)} of the NORMALIZED keys.

    None where the null or the skyline is not there, or the skyline is not MARGIN above the null.
    All three must come from the same resamples.
    """
    return {f"{name}_normalized": _placed(name, score, null, skyline) for name in NORMALIZED}


def _placed(name: str, score: Score, *ends: Score | None) -> Estimate | None:
    if None in ends:
        return None
    here, low, high = (s.estimates[name] for s in (score, *ends))
    if None in (here, low, high) or high.value - low.value < MARGIN:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = (here.samples - low.samples) / (high.samples - low.samples)
    return Estimate((here.value - low.value) / (high.value - low.value), samples)


def _sums(predicted: np.ndarray, held_out: HeldOut) -> tuple[dict, dict, Moments]:
    """Per-row values {name: [n]}, per-feature sums {name: [width]} and moments, in float64.

    Blocks are worked on by threads and added up in their order: the same bits on any machine size.
    """
    mean, moments = held_out.train_mean, Moments(held_out.resamples, predicted.shape[1])
    rows, columns = [], []

    def look(block: slice):
        p, t = (x[block].astype(np.float64) for x in (predicted, held_out.target))
        p_c, t_c = p - mean[None, :], t - mean[None, :]
        values = _row_values(p, t, p_c, t_c, mean=mean)
        return values, _column_sums(p, t, t_c), moments.by_document(block, p_c, t_c)

    with ThreadPoolExecutor() as threads:
        for row, column, sums in threads.map(look, _blocks(*predicted.shape)):
            rows.append(row)
            columns.append(column)
            moments.add(*sums)
    return (
        {name: np.concatenate([r[name] for r in rows]) for name in rows[0]},
        {name: np.sum([c[name] for c in columns], axis=0) for name in columns[0]},
        moments,
    )


def _blocks(n: int, width: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // width)
    for at in range(0, n, size):
        yield slice(at, min(at + size, n))


def _row_values(p, t, p_c, t_c, *, mean: np.ndarray) -> dict[str, np.ndarray]:
    """What each row gives; p_c and t_c are p and t less the training mean."""
    length_p, length_t, length_m = _length(p), _length(t), np.sqrt(mean @ mean)
    length_p_c, variance = _length(p_c), _dot(t_c, t_c)
    active_p, active_t = p > 0, t > 0
    l0_p, l0_t = active_p.sum(1), active_t.sum(1)
    both = (active_p & active_t).sum(1)
    rounding = ROUNDING * length_m
    return {
        "error": _dot(t - p, t - p),
        "variance": variance,
        "cosine": _cosine(_dot(p, t), length_p, length_t),
        "cosine_mean_predictor": _cosine(t @ mean, length_m, length_t),
        "cosine_centered": _cosine(_dot(p_c, t_c), length_p_c, np.sqrt(variance), zero=rounding),
        "l0_target": l0_t,
        "l0_predicted": l0_p,
        "jaccard": _jaccard(both, l0_p + l0_t - both),
    }


def _column_sums(p, t, t_c) -> dict[str, np.ndarray]:
    error = t - p
    return {
        "error": np.einsum("ij,ij->j", error, error),
        "variance": np.einsum("ij,ij->j", t_c, t_c),
        "active_predicted": (p > 0).sum(0),
        "active_target": (t > 0).sum(0),
    }


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", a, b)


def _length(a: np.ndarray) -> np.ndarray:
    return np.sqrt(_dot(a, a))


def _cosine(dot: np.ndarray, length_a, length_b, zero: float = 0.0) -> np.ndarray:
    """Cosine of each row; 0 where a length is at most ``zero``."""
    defined = (length_a > zero) & (length_b > zero)
    return np.where(defined, dot / np.where(defined, length_a * length_b, 1.0), 0.0)


def _jaccard(both: np.ndarray, either: np.ndarray) -> np.ndarray:
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def _context_gain(
    predicted: np.ndarray, held_out: HeldOut, means: TokenMeans | None
) -> Estimate | None:
    if means is None or not (means.index >= 0).any():
        return None
    known = np.flatnonzero(means.index >= 0)
    error, variance = np.zeros(len(predicted)), np.zeros(len(predicted))
    for block in _blocks(len(known), predicted.shape[1]):
        rows = known[block]
        token = means.index[rows]
        t = held_out.target[rows].astype(np.float64) - means.target[token]
        p = predicted[rows].astype(np.float64) - means.predicted[token]
        error[rows], variance[rows] = _dot(t - p, t - p), _dot(t, t)
    return 1.0 - held_out.resamples.estimate(error, variance)
