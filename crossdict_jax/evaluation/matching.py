"""Features that two dictionaries share: matched on one split, confirmed on another."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import false_discovery_control

from crossdict_jax.errors import UserError
from crossdict_jax.evaluation.codes import correlations, paired_correlations
from crossdict_jax.evaluation.nulls import shift_p_values, token_shuffles
from crossdict_jax.maps.codes import Codes, Moments, compress

HUNGARIAN_WIDTH = 8192  # live features a side: a dense problem of 0.5 GB, and minutes
LEAST_R = 0.3  # on held-out rows: independence alone is refuted by r = 0.015 at 10^5 rows
IDENTICAL = 1 - 1e-5  # correlation above which two features of one dictionary are duplicates


@dataclass(frozen=True)
class Matching:
    """Matched features on the rows of one split, each array [pairs].

    Live features are active in enough rows and not constant; duplicates may be merged.
    """

    features_a: np.ndarray  # columns of a; each occurs once
    features_b: np.ndarray  # of b
    r: np.ndarray  # float64, correlation
    width_a: int  # all features
    width_b: int
    live_a: int
    live_b: int


@dataclass(frozen=True)
class Confirmation:
    """The pairs of a matching on the rows of another split, each [pairs]."""

    r: np.ndarray  # float64, correlation
    p: np.ndarray  # float64, of r under circular shifts
    p_adjusted: np.ndarray  # lowest false discovery rate at which the pair is a discovery
    r_token: np.ndarray | None  # mean correlation after shuffles within equal tokens
    beyond_token: np.ndarray | None  # bool, whether r beats all those shuffles
    confirmed: np.ndarray  # bool, p_adjusted small enough, r at least LEAST_R, and beyond the token


def match(
    a: Any,
    b: Any,
    *,
    minimum_firings: int = 30,
    method: str = "mutual_best",
    merge_duplicates: bool = False,
) -> Matching:
    """Returns one-to-one pairs of features by their Pearson correlation over the same rows.

    "mutual_best" pairs features that are each other's best; "hungarian" maximises the sum of
    correlations. Only positive correlations count.

    Args:
      a, b: features [n, width] of two dictionaries, arrays or what ``compress`` returns.
      minimum_firings: active rows of a live feature. The best of thousands of independent
        candidates correlates 0.36 on average with a feature that fires 3 times.
      merge_duplicates: count features of one side that never differ once, as the first.

    Raises:
      UserError: the rows differ, the method is unknown, or "hungarian" has too many features.
    """
    a, b = compress(a), compress(b)
    if a.shape[0] != b.shape[0]:
        raise UserError(f"Features of {a.shape[0]} and of {b.shape[0]} rows are not paired rows.")
    if method not in METHODS:
        raise UserError(f"evaluation.matching={method} must be one of {', '.join(METHODS)}.")
    live_a, live_b = (_live(codes, minimum_firings, merge_duplicates) for codes in (a, b))
    i = j = np.zeros(0, np.int64)
    if len(live_a) and len(live_b):
        i, j = METHODS[method](a[:, live_a], b[:, live_b])
    i, j = live_a[i], live_b[j]
    r, widths = paired_correlations(a[:, i], b[:, j]), (a.shape[1], b.shape[1])
    return Matching(i, j, r, *widths, len(live_a), len(live_b))


def _live(codes: Codes, minimum: int, merge: bool) -> np.ndarray:
    moments = Moments.of(codes)
    live = np.flatnonzero((moments.firings >= minimum) & (moments.variance > 0))
    if merge and len(live):
        codes = codes[:, live]
        first = [np.argmax(r >= IDENTICAL, axis=1) for _, r in correlations(codes, codes)]
        live = live[np.concatenate(first) == np.arange(len(live))]  # no earlier one is identical
    return live


def mutual_best(a: Codes, b: Codes) -> tuple[np.ndarray, np.ndarray]:
    """Returns (columns of a, columns of b) that are each other's best."""
    best_b = np.zeros(a.shape[1], np.int64)
    best_a, top = np.zeros(b.shape[1], np.int64), np.full(b.shape[1], -np.inf, np.float32)
    for at, r in correlations(a, b):
        best_b[at], in_tile, value = r.argmax(axis=1), r.argmax(axis=0), r.max(axis=0)
        better = value > top
        best_a[better], top[better] = at.start + in_tile[better], value[better]
    i = np.arange(a.shape[1])
    mutual = (best_a[best_b] == i) & (top[best_b] > 0)
    return i[mutual], best_b[mutual]


def hungarian(a: Codes, b: Codes) -> tuple[np.ndarray, np.ndarray]:
    """Returns (columns of a, columns of b), the assignment with the largest sum of correlations."""
    widest = max(a.shape[1], b.shape[1])
    if widest > HUNGARIAN_WIDTH:
        raise UserError(
            f"evaluation.matching=hungarian takes at most {HUNGARIAN_WIDTH} live features and "
            f"there are {widest}; use mutual_best, or raise evaluation.minimum_firings."
        )
    r = np.concatenate([tile for _, tile in correlations(a, b)])
    i, j = linear_sum_assignment(r, maximize=True)
    positive = r[i, j] > 0
    return i[positive], j[positive]


METHODS = {"mutual_best": mutual_best, "hungarian": hungarian}


def confirm(
    matching: Matching,
    a: Any,
    b: Any,
    *,
    documents: np.ndarray,
    tokens: np.ndarray | None = None,
    fdr: float = 0.05,
    seed: int = 0,
) -> Confirmation:
    """Returns what a matching is worth on rows that it was not made on.

    Tests each pair against circular shifts, controls the false discovery rate (Benjamini and
    Hochberg 1995), and asks for r >= LEAST_R and, given tokens, for more than token identity.

    Args:
      a, b: features [n, width] as for ``match``, rows in the order of the text.
      documents: [n], of each row; a document's rows lie together.
      tokens: [n] or [n, models], the tokens that end at the rows.
      seed: of the shuffles.

    Raises:
      UserError: the rows of a, b, documents and tokens differ in number.
    """
    a, b = compress(a)[:, matching.features_a], compress(b)[:, matching.features_b]
    counts = [a.shape[0], b.shape[0], len(documents)]
    counts += [] if tokens is None else [len(tokens)]
    if len(set(counts)) > 1:
        raise UserError(
            f"Held-out features, documents and tokens have {', '.join(map(str, counts))} rows; "
            "one row stands for one text position in all of them."
        )
    r = paired_correlations(a, b)
    p = shift_p_values(r, a, b, documents)
    p_adjusted = false_discovery_control(p)
    confirmed = (p_adjusted <= fdr) & (r >= LEAST_R)
    r_token = beyond = None
    if tokens is not None:
        products, beyond = token_shuffles(a, b, tokens, seed=seed)
        r_token = paired_correlations(a, b, products)
        confirmed &= beyond
    return Confirmation(r, p, p_adjusted, r_token, beyond, confirmed)
