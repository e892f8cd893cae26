"""Which source features drive a predicted feature: a map's mean Jacobian over rows."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import modules
from crossdict_jax.maps import Map, Side
from crossdict_jax.maps.base import padded, slices

ROWS = 2048  # held-out rows, evenly spread, in the mean Jacobian
BLOCK = 256  # rows of one backward pass per feature
TOP = 3  # source features named
EXACT = 1e-4  # a Jacobian that varies by less than this share of its largest entry is constant


@dataclasses.dataclass(frozen=True)
class Drivers:
    """What source features do to k predicted features."""

    weight: np.ndarray  # [k, width_a], mean of d f_B / d f_A over rows with a predicted f_B > 0
    effect: np.ndarray  # [k, width_a], the same in standard deviations of both
    rows: np.ndarray  # [k], number of these rows
    exact: np.ndarray  # bool [k], whether the Jacobian is the same on all of them


def drivers(m: Map, source: Side, features: np.ndarray, *, scale: np.ndarray) -> Drivers:
    """Returns what drives the features [k] of B, from at most ROWS of the source's rows.

    Source features reach a map of activations through the decoder. scale [k, width_a] turns weights
    into effects: standard deviations of source features per one of each feature of B.
    """
    graphs, params = zip(modules.split(m), modules.split(source.dictionary))
    total, count, low, high = 0.0, 0, np.inf, -np.inf
    n = len(source.x)
    chosen = np.unique(np.linspace(0, n - 1, min(ROWS, n)).astype(np.int64))
    for part in slices(len(chosen), BLOCK):
        rows = chosen[part]
        inputs = padded(source.x[rows], BLOCK), padded(source.tokens[rows], BLOCK)
        block = map(np.asarray, _jacobians(graphs, params, *inputs, features, len(rows)))
        sums, on, lowest, highest = block
        total, count = total + sums.astype(np.float64), count + on.astype(np.int64)
        low, high = np.minimum(low, lowest), np.maximum(high, highest)
    weight = total / np.maximum(count, 1)[:, None]
    varies = np.where(count > 0, (high - low).max(axis=1), 0.0)
    exact = varies <= EXACT * np.abs(weight).max(axis=1)
    return Drivers(weight, weight * scale, count, exact)


@partial(jax.jit, static_argnums=0)
def _jacobians(graphs, params, x, tokens, features, count):
    """Over the rows with f_B > 0: sum [k, width_a], number [k], lowest, highest [k, width_a]."""
    m, source = map(modules.merge, graphs, params)

    def predict(f):
        inputs = f if m.reads == "features" else source.decode(f)
        return m(inputs, tokens=tokens)[:, features]  # [batch, k]

    out, pull = jax.vjp(predict, source.encode(x.astype(jnp.float32)))
    on = (out > 0) & (jnp.arange(len(x)) < count)[:, None]

    def of_feature(i):
        (row,) = pull(jnp.zeros_like(out).at[:, i].set(1.0))  # [batch, width_a]
        mask = on[:, i][:, None]
        low = jnp.where(mask, row, jnp.inf).min(axis=0)
        high = jnp.where(mask, row, -jnp.inf).max(axis=0)
        return jnp.where(mask, row, 0.0).sum(axis=0), low, high

    total, low, high = jax.vmap(of_feature)(jnp.arange(len(features)))
    return total, on.sum(axis=0), low, high


def describe(of_map: Drivers, i: int, again: Drivers | None) -> dict:
    """Returns the columns of feature i's drivers, and of those from another seed."""
    effect, predicted, stability = of_map.effect[i], of_map.rows[i] > 0, None
    if again is not None and predicted and again.rows[i] > 0:
        other = again.effect[i]
        length = np.sqrt((effect @ effect) * (other @ other))
        stability = float(effect @ other / length) if length else None
    top = np.argsort(-np.abs(effect), kind="stable")[: TOP if predicted else 0]
    return {
        "exact": bool(of_map.exact[i]) if predicted else None,
        "drivers": [{"feature": int(a), "effect": float(effect[a])} for a in top],
        "stability": stability,
    }
