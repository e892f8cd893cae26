"""How well features predicted from model A fit model B's own, on held-out documents.

A feature is *active* where it is above zero, *live* if it is active in some row and varies.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import stats
from crossdict_jax.errors import UserError
from crossdict_jax.evaluation import retrieval
from crossdict_jax.maps.base import padded, slices
from crossdict_jax.maps.codes import Codes, compress
from crossdict_jax.modules import ahead, plain
from crossdict_jax.ops import exact
from crossdict_jax.results import BEATS_MEAN, BEATS_TOKEN, NO_BETTER
from crossdict_jax.stats import Estimate, Resamples

BLOCK = 2**19  # numbers compared at a time; twice as many, and glibc maps their memory anew
LARGEST = 1e15  # a value whose squares float32 can add up
DOCUMENTS = 256  # sums of documents, or of parts of them, that are kept before they are resampled
MEAN = 1e-5  # a vector within this share of the mean's length from the mean is the mean
ROUNDING = 1e-6  # a variance below this share of the second moment is float32 rounding

MEANS = (  # means over rows
    *("cosine", "cosine_mean_predictor", "cosine_centered"),
    *("l0_target", "l0_predicted", "sparsity_similarity"),
)
NORMALIZED = ("r2", "cosine_centered", "top1", "feature_correlation")  # with a null near 0
MARGIN = 0.05  # a ceiling less than this above the null leaves no room to place a score in


@dataclasses.dataclass(frozen=True)
class TokenMeans:
    """Means over training rows that end in the same source token: what token identity explains."""

    index: np.ndarray  # int [n], each held-out row's row in the tables; -1: no training row has it
    target: np.ndarray  # [tokens, width], means of B's features
    predicted: np.ndarray  # [tokens, width], means of the map's predictions


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """B's features on held-out rows, and all that predictions share."""

    target: Codes  # [n, width]
    train_mean: np.ndarray  # float64 [width], over training rows
    resamples: Resamples  # of the rows' documents
    pool: retrieval.Pool

    @cached_property
    def live(self) -> np.ndarray:
        """bool [width]: active in some row, and not constant."""
        highest, lowest = self.target.max(axis=0).toarray(), self.target.min(axis=0).toarray()
        return (highest > 0) & (highest > lowest)


@dataclasses.dataclass(frozen=True)
class Score:
    """All metrics of one prediction."""

    plain: dict  # without intervals
    estimates: dict[str, Estimate | None]  # with intervals
    correlations: np.ndarray  # [width], NaN where the target is not live
    feature_r2: np.ndarray  # [width], likewise

    def row(self) -> dict:
        """Returns the columns of transfer.jsonl: every estimate with its _low and _high."""
        row = dict(self.plain)
        for name, estimate in self.estimates.items():
            row |= stats.columns(name, estimate)
        return row


@plain
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
      every target equals m, fvu is 0 for a perfect prediction and 1 for any other.
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
      means of target and prediction for the row's source token, where it occurs in training.

    The main ones have _low and _high: 95 % bootstrap percentiles over documents, None with fewer
    than two documents. Undefined numbers are None; r2 is always finite.

    Args:
      predicted, target: arrays [n, width].
      train_mean: [width], of the target over the training rows.
      documents: [n], the document of each row (default: one per row).
      pool: retrieval candidates; 0 means min(8192, n).
      bootstrap: resamples.
      seed: of the resamples and of the pool.
      l0_source: [n], active source features per row (or their mean), only copied to the result.
      token_means: needed for context_gain.

    Raises:
      UserError: shapes disagree, there is no row, a value is not finite, or the pool is above n.
    """
    documents = np.arange(len(target)) if documents is None else np.asarray(documents)
    settings = {"pool": pool, "bootstrap": bootstrap, "seed": seed}
    held_out = hold_out(target, train_mean=train_mean, documents=documents, **settings)
    predicted = _checked("predicted", predicted, held_out.target.shape, "that of the target")
    batches = ((rows, predicted[rows]) for rows in slices(len(predicted)))
    return measure(batches, held_out, l0_source=l0_source, token_means=token_means).row()


def _checked(name: str, values, shape: tuple[int, ...] | None = None, meaning: str = "") -> Any:
    """``values`` as float32 or float64; UserError if above LARGEST, or of another shape."""
    values = np.asarray(values)
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float32)
    if not np.maximum(values.max(initial=0), -values.min(initial=0)) <= LARGEST:  # NaN is not
        raise UserError(
            f"{name} holds NaN or infinite values, or some above {LARGEST:g}, whose squares "
            "overflow; look at what made it."
        )
    if shape is not None and values.shape != shape:
        raise UserError(f"{name} has shape {list(values.shape)}, not {list(shape)} ({meaning}).")
    return values


def hold_out(target, *, train_mean, documents, pool: int, bootstrap: int, seed: int) -> HeldOut:
    """Returns what all predictions of ``target``, an array or codes [n, width], share.

    The other arguments are those of ``transfer_metrics``.
    """
    if isinstance(target, Codes):
        _checked("target", target.data)
    else:
        target = _checked("target", target)
    if len(target.shape) != 2 or 0 in target.shape:
        raise UserError(
            f"target has shape {list(target.shape)}; it must be [rows, width], not empty."
        )
    n, width = target.shape
    train_mean = _checked("train_mean", train_mean, (width,), "one number per feature")
    if np.shape(documents) != (n,):
        raise UserError(f"documents has shape {list(np.shape(documents))}, not [{n}].")
    for name, value in {"pool": pool, "bootstrap": bootstrap, "seed": seed}.items():
        if not isinstance(value, int | np.integer) or value < 0:
            raise UserError(f"{name}={value} must be a whole number, 0 or more.")
    if pool > n:
        raise UserError(f"pool={pool} is not between 1 and the {n} rows; lower it, or 0 for all.")
    size = pool or min(retrieval.LARGEST_DEFAULT_POOL, n)
    target = compress(target)
    return HeldOut(
        target=target,
        train_mean=train_mean.astype(np.float64),
        resamples=stats.draw(documents, count=bootstrap, seed=seed),
        pool=retrieval.make_pool(target, size=size, seed=seed),
    )


def measure(
    batches: Iterable[tuple[slice, np.ndarray]],
    held_out: HeldOut,
    *,
    l0_source=None,
    token_means: TokenMeans | None = None,
) -> Score:
    """Returns all metrics of predictions; see ``transfer_metrics``.

    Args:
      batches: (rows, predicted [m, width]) in order, all but the last equally long. Each is read
        once and let go, so that memory does not grow with the rows.
    """
    draws, live, n = held_out.resamples, held_out.live, held_out.target.shape[0]
    rows, sums, queries = _sums(iter(batches), held_out, token_means)
    of_split = {name: values[0] for name, values in sums.items()}
    length_p, length_t, length_p_c, length_t_c = (
        np.sqrt(rows[name]) for name in ("pp", "tt", "pp_centred", "variance")
    )
    length_m = np.linalg.norm(held_out.train_mean)
    either = rows["l0_predicted"] + rows["l0_target"] - rows["both"]
    # A vector within rounding of the mean is the mean: centred cosine 0.
    rows |= {
        "cosine": _cosine(rows["pt"], length_p, length_t),
        "cosine_mean_predictor": _cosine(rows["mt"], length_m, length_t),
        "cosine_centered": _cosine(rows["pt_centred"], length_p_c, length_t_c, MEAN * length_m),
        "sparsity_similarity": np.where(either == 0, 1.0, rows["both"] / np.maximum(either, 1)),
    }
    rank, in_pool = retrieval.ranks(queries, held_out.pool), held_out.pool.rows
    in_pool = dataclasses.replace(draws, index=draws.index[in_pool])
    fvu, r = draws.estimate(rows["error"], rows["variance"]), _correlations(sums)
    feature_r2 = np.where(live, 1 - stats.ratio(of_split["error"], of_split["tt"]), np.nan)
    gain, seen = None, np.zeros(n, bool)
    if token_means is not None and (seen := token_means.index >= 0).any():
        left = rows["token_variance"] * seen
        if left.sum() > ROUNDING * (rows["tt"] * seen).sum():  # else the token says all there is
            gain = 1.0 - draws.estimate(rows["token_error"] * seen, left)
    correlation = None
    if np.isfinite(r[0, live]).any():  # in a resample, only features that vary there
        defined = np.isfinite(r[:, live])
        with np.errstate(invalid="ignore", divide="ignore"):
            means = np.where(defined, r[:, live], 0.0).sum(axis=1) / defined.sum(axis=1)
        correlation = Estimate(float(means[0]), means[1:])
    estimates = {
        "fvu": fvu,
        "r2": 1.0 - fvu,
        **{name: draws.mean(rows[name]) for name in MEANS},
        "top1": in_pool.mean(rank == 1),
        "mean_rank": in_pool.mean(rank),
        "feature_correlation": correlation,
        "context_gain": gain,
    }
    rates = np.stack([of_split["active_predicted"], of_split["active_target"]])
    vary = np.ptp(rates, axis=1).all()
    plain = {
        "n_rows": n,
        "n_documents": draws.n_documents,
        "n_live": int(live.sum()),
        "pool": len(rank),
        "l0_source": None if l0_source is None else float(np.mean(l0_source)),
        "r2_per_feature_median": float(np.median(feature_r2[live])) if live.any() else None,
        "rate_correlation": float(np.corrcoef(rates)[0, 1]) if vary else None,
        "n_context_rows": int(seen.sum()),
    }
    return Score(plain, estimates, np.where(live, r[0], np.nan), feature_r2)


def verdict(score: Score, token: Score) -> str | None:
    """Returns a map's verdict from paired bootstrap differences over documents; None without any.

    It beats the mean if its R^2 (the mean's is 0) and its centred cosine are surely above 0, and
    the token baseline if its R^2 is also surely above the token map's.
    """
    r2, centered = score.estimates["r2"], score.estimates["cosine_centered"]
    if r2.interval[0] is None:
        return None
    if not (r2.surely_positive and centered.surely_positive):
        return NO_BETTER
    return BEATS_TOKEN if (r2 - token.estimates["r2"]).surely_positive else BEATS_MEAN


def normalized(
    score: Score | None, null: Score | None, ceiling: Score | None
) -> dict[str, float | None]:
    """Returns the columns key_normalized = (score - null) / (ceiling - null) of NORMALIZED keys.

    None where one is missing, or the ceiling is not MARGIN above the null.
    """
    columns = {}
    for name in NORMALIZED:
        value, low, high = (s and s.estimates[name] for s in (score, null, ceiling))
        share = None
        if None not in (value, low, high) and high.value - low.value >= MARGIN:
            with np.errstate(divide="ignore", invalid="ignore"):
                samples = (value.samples - low.samples) / (high.samples - low.samples)
            share = Estimate((value.value - low.value) / (high.value - low.value), samples)
        columns |= stats.columns(f"{name}_normalized", share)
    return columns


def _sums(
    batches: Iterator[tuple[slice, np.ndarray]], held_out: HeldOut, means: TokenMeans | None
) -> tuple[dict, dict, np.ndarray]:
    """``_sums_of_block`` of each row, {name: [n]}, and of features, in float64; the pool's rows.

    Those of features are [1 + count, width]: the whole split, then every bootstrap resample.
    """
    draws, (n, width), pool = held_out.resamples, held_out.target.shape, held_out.pool.rows
    of_pool = np.zeros((len(pool), width), np.float32)
    weights = np.concatenate([np.ones((1, draws.n_documents)), draws.weights])
    _, first = first_batch = next(batches)
    origin = first.mean(axis=0, dtype=np.float64)
    size = -(-len(first) // -(-first.size // BLOCK))  # rows of a block, the same part of a batch
    documents = {  # of a block that starts there, and each row's number among them
        batch.start + part.start: np.unique(draws.index[batch][part], return_inverse=True)
        for batch in slices(n, len(first))
        for part in slices(batch.stop - batch.start, size)
    }
    longest = -(-max(len(numbers) for numbers, _ in documents.values()) // 8) * 8  # few shapes
    by_row, waiting = [], []
    totals = {"n": weights @ np.bincount(draws.index)[:, None]}

    def resample() -> None:
        numbers = np.concatenate([numbers for numbers, _ in waiting])
        for name in waiting[0][1]:
            sums = np.concatenate([sums[name] for _, sums in waiting])
            totals[name] = totals.get(name, 0.0) + weights[:, numbers] @ sums
        waiting.clear()

    def blocks() -> Iterator[tuple]:
        for batch, predicted in itertools.chain([first_batch], batches):
            _checked("predicted", predicted)
            start, stop = np.searchsorted(pool, (batch.start, batch.stop))  # ascending
            of_pool[start:stop] = predicted[pool[start:stop] - batch.start]
            for part in slices(len(predicted), size):
                block = slice(batch.start + part.start, batch.start + part.stop)
                numbers, local = documents[block.start]
                arrays = 2 * (predicted[part], held_out.target[block].toarray())
                if means and len(means.target):  # rows without their token are not used
                    index = means.index[block]
                    arrays = *arrays[:2], means.predicted[index], means.target[index]
                belongs = np.zeros((longest, size), np.float32)  # 0 for padding
                belongs[local, np.arange(len(local))] = 1
                arrays = [padded(a, size) for a in arrays]
                sums = _sums_of_block(*arrays, held_out.train_mean, origin, belongs)
                yield numbers, len(local), *sums

    for numbers, n_rows, of_rows, of_documents in ahead(blocks()):
        by_row.append({k: np.asarray(v, np.float64)[:n_rows] for k, v in of_rows.items()})
        kept = {k: np.asarray(v)[: len(numbers)] for k, v in of_documents.items()}
        waiting.append((numbers, kept))
        if sum(len(numbers) for numbers, _ in waiting) >= DOCUMENTS:
            resample()
    if waiting:
        resample()
    of_rows = {name: np.concatenate([rows[name] for rows in by_row]) for name in by_row[0]}
    return of_rows, totals, of_pool


@jax.jit
def _sums_of_block(p, t, P, T, mean, origin, belongs):
    """Sums over features of each row, {name: [batch]}, and over rows, {name: [documents, width]}.

    Centred: less the training mean.

    Args:
      p, t: predicted and target features [batch, width]; P, T: their means after the row's token.
      mean: of the target's training rows [width].
      origin: of predictions in correlations [width], near their means against cancellation.
      belongs: [documents, batch], 1 where a row is of a document.
    """
    mean = jnp.broadcast_to(mean[None, :], p.shape)
    p_c, t_c, error, active_p, active_t = p - mean, t - mean, t - p, p > 0, t > 0
    of_rows = {
        **{"pp": p * p, "tt": t * t, "pt": p * t, "mt": mean * t},
        **{"pp_centred": p_c * p_c, "pt_centred": p_c * t_c, "variance": t_c * t_c},
        **{"l0_predicted": active_p, "l0_target": active_t, "both": active_p & active_t},
        "error": error * error,
        "token_error": jnp.square((t - T) - (p - P)),
        "token_variance": jnp.square(t - T),
    }
    moved = p - origin[None, :]
    of_features = {
        **{"p": moved, "t": t_c},
        **{"pp": moved * moved, "tt": t_c * t_c, "pt": moved * t_c, "error": error * error},
        **{"active_predicted": active_p * 1.0, "active_target": active_t * 1.0},
    }
    return (
        {name: jnp.sum(values, axis=1) for name, values in of_rows.items()},
        {name: exact(belongs, values) for name, values in of_features.items()},
    )


def _cosine(dot: np.ndarray, length_a, length_b, zero=0.0) -> np.ndarray:
    """Cosine of each row; 0 where a length is at most ``zero``."""
    defined = (length_a > zero) & (length_b > zero)
    return np.where(defined, dot / np.where(defined, length_a * length_b, 1.0), 0.0)


def _correlations(sums: dict[str, np.ndarray]) -> np.ndarray:
    """Pearson's r of each feature by the sums of ``_sums``, [1 + count, width].

    0 for a constant prediction, NaN for a constant target.
    """
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may hold no row
        p, t, pp, tt, pt = (sums[name] / sums["n"] for name in ("p", "t", "pp", "tt", "pt"))
    variance_p, variance_t = pp - p * p, tt - t * t
    varies_p, varies_t = variance_p > ROUNDING * pp, variance_t > ROUNDING * tt
    both = varies_p & varies_t
    scale = np.sqrt(np.where(both, variance_p * variance_t, 1.0))
    return np.where(varies_t, np.where(both, np.clip((pt - p * t) / scale, -1, 1), 0.0), np.nan)
