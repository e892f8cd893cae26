"""Which source features drive a predicted feature: the mean Jacobian of a map, over held-out rows.

An affine map's Jacobian is its weights, the same on every row where the feature is on, so one
method serves maps that are exact and maps that are not.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import modules
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.maps import Map, Pairs
from crossdict_jax.maps.base import encode_rows, padded, slices

ROWS = 2048  # held-out rows, evenly spread, that Jacobians are averaged over
BLOCK = 256  # rows of one backward pass for each feature
TOP = 3  # source features named
EXACT = 1e-4  # a Jacobian that varies by less than this share of its largest entry is constant


@dataclasses.dataclass(frozen=True)
class Drivers:
    """What k predicted features do when each source feature is turned up.

    Attributes:
      through: "features", or "decoder" where the map reads activations and source features reach
        it through the source's own decoder.
      weight: [k, width_a], mean of d f_B / d f_A over the rows on which the map predicts f_B > 0.
      effect: [k, width_a], the same in standard deviations of both.
      rows: [k], on how many rows that is.
      exact: bool [k], whether the Jacobian is the same on all of them.
    """

    through: str
    weight: np.ndarray
    effect: np.ndarray
    rows: np.ndarray
    exact: np.ndarray

    def order(self, i: int) -> np.ndarray:
        """Returns the source features by the size of their effect on feature i, largest first."""
        return np.argsort(-np.abs(self.effect[i]), kind="stable")


def can_attribute(m: Map, source: Dictionary) -> bool:
    """Whether source features reach a map at all: token tables read none.

    Maps of activations are reached through the decoder, which of a transcoder writes elsewhere.
    """
    return m.reads == "features" or (m.reads == "activations" and not source.transcodes)


def drivers(m: Map, pairs: Pairs, features: np.ndarray, *, scales: Scales) -> Drivers:
    """Returns what drives the given features [k] of B, from at most ROWS of the pairs.

    Args:
      scales: standard deviations of both sides' features.
    """
    graphs = modules.split(m), modules.split(pairs.source.dictionary)
    total, count, low, high = 0.0, 0, np.inf, -np.inf
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(ROWS, len(pairs))).astype(np.int64))
    for part in slices(len(chosen), BLOCK):
        rows = chosen[part]
        inputs = padded(pairs.source.x[rows], BLOCK), padded(pairs.source.tokens[rows], BLOCK)
        found = _jacobians(
            *(graph for graph, _ in graphs), *(p for _, p in graphs), *inputs, features, len(rows)
        )
        here, on, least, most = map(np.asarray, found)
        total, count = total + here.astype(np.float64), count + on.astype(np.int64)
        low, high = np.minimum(low, least), np.maximum(high, most)
    weight = total / np.maximum(count, 1)[:, None]
    varies = np.where(count > 0, (high - low).max(axis=1), 0.0)
    return Drivers(
        through="features" if m.reads == "features" else "decoder",
        weight=weight,
        effect=weight * scales.source[None, :] / scales.of_target(features)[:, None],
        rows=count,
        exact=varies <= EXACT * np.abs(weight).max(axis=1),
    )


@partial(jax.jit, static_argnums=(0, 1))
def _jacobians(graph, source_graph, params, source_params, x, tokens, features, count):
    """Over the rows with f_B > 0: sum [k, width_a], number [k], least and most [k, width_a]."""
    m, source = modules.merge(graph, params), modules.merge(source_graph, source_params)

    def predict(f):
        inputs = f if m.reads == "features" else source.decode(f)
        return m(inputs, tokens=tokens)[:, features]  # [batch, k]

    out, pull = jax.vjp(predict, source.encode(x.astype(jnp.float32)))
    on = (out > 0) & (jnp.arange(len(x)) < count)[:, None]

    def one(i):
        (row,) = pull(jnp.zeros_like(out).at[:, i].set(1.0))  # [batch, width_a]
        here = on[:, i][:, None]
        least = jnp.where(here, row, jnp.inf).min(axis=0)
        most = jnp.where(here, row, -jnp.inf).max(axis=0)
        return jnp.where(here, row, 0.0).sum(axis=0), least, most

    total, least, most = jax.lax.map(one, jnp.arange(len(features)))
    return total, on.sum(axis=0), least, most


# ---------------------------------------------------------------- beside correlation


@dataclasses.dataclass(frozen=True)
class Scales:
    """Standard deviations of features over rows: [width_a] and [width_b]; 1 where one is 0."""

    source: np.ndarray
    target: np.ndarray

    def of_target(self, features: np.ndarray) -> np.ndarray:
        return self.target[features]


def scales(pairs: Pairs) -> Scales:
    """Returns the standard deviations of both sides' features over the pairs."""
    deviations = (np.sqrt(side.feature_moments[1]) for side in (pairs.source, pairs.target))
    return Scales(*(np.where(d > 0, d, 1.0) for d in deviations))


def correlations(pairs: Pairs, features: np.ndarray) -> np.ndarray:
    """Returns the Pearson correlation of given features of B with all of A's, [k, width_a].

    0 where one of the two is constant.
    """
    product = 0.0
    for rows in slices(len(pairs)):
        a = encode_rows(pairs.source.dictionary, pairs.source.x[rows])
        b = encode_rows(pairs.target.dictionary, pairs.target.x[rows])[:, features]
        product = product + b.T.astype(np.float64) @ a.astype(np.float64)
    (mean_a, variance_a), (mean_b, variance_b) = (
        side.feature_moments for side in (pairs.source, pairs.target)
    )
    covariance = product / len(pairs) - mean_b[features][:, None] * mean_a[None, :]
    scale = np.sqrt(variance_b[features][:, None] * variance_a[None, :])
    return np.where(scale > 0, covariance / np.where(scale > 0, scale, 1.0), 0.0)


def describe(
    kind: str, found: Drivers, i: int, match: int, again: Drivers | None
) -> dict[str, Any]:
    """Returns what a result row says of feature i's drivers in one map.

    Args:
      match: the source feature that correlates best with feature i.
      again: the same of the map fitted from another seed.
    """
    order = found.order(i)
    known = found.rows[i] > 0
    stability = None
    if again is not None and known and again.rows[i] > 0:
        stability = _cosine(found.effect[i], again.effect[i])
    return {
        "map": kind,
        "through": found.through,
        "n_rows": int(found.rows[i]),
        "exact": bool(found.exact[i]) if known else None,
        "drivers": [
            {
                "feature": int(a),
                "weight": float(found.weight[i, a]),
                "effect": float(found.effect[i, a]),
            }
            for a in (order[:TOP] if known else ())
        ],
        "place_of_match": int(np.flatnonzero(order == match)[0]) + 1 if known else None,
        "stability": stability,
    }


def _cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    length = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / length) if length else None
