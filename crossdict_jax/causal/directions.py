"""Directions in B's activations that maps make of single features of A; and their matches."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import maps, modules, stats
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.maps import Task
from crossdict_jax.maps.base import Map, Side, encode_rows, map_class, padded, slices
from crossdict_jax.maps.fit import Direction

ROWS_EACH = 32  # rows of a feature that its mapped direction is the mean over
BLOCK = 1024  # rows per forward


@dataclass(frozen=True)
class MapGroup(Direction):
    """A site of one model, a site of another, and maps from the first to the second."""

    tasks: list[Task]


def map_groups(
    config: Config, store: Store, *, layers: str, kinds: tuple[str, ...], of_tokens: bool = False
) -> list[MapGroup]:
    """Returns the maps of a run, fitted on true pairs, by layer pair.

    Args:
      layers: "middle" | "all", of the layer pairs of every two models.
      kinds: "all", or kinds of maps among those of the run.
      of_tokens: include maps that read tokens alone; these map no direction.
    """
    by_models: dict[tuple, dict[tuple, MapGroup]] = {}
    for task in maps.tasks(config, store):
        models, sites = (task.source, task.target), (task.site_source, task.site_target)
        groups = by_models.setdefault(models, {})
        group = groups.setdefault(sites, MapGroup(*models, *sites, []))
        chosen = "all" in kinds or task.kind in kinds
        fits = of_tokens or map_class(task.kind).reads != "tokens"
        if chosen and task.pairing == "aligned" and fits:
            group.tasks.append(task)
    groups = [list(groups.values()) for groups in by_models.values()]
    if layers == "middle":
        groups = [[pairs[len(pairs) // 2]] for pairs in groups]
    return [group for pairs in groups for group in pairs]


def strengths(dictionary: Dictionary, x: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Returns these features' activations on rows x [n, d_model], float32 [n, features]."""
    parts = [encode_rows(dictionary, x[block])[:, features] for block in slices(len(x))]
    return np.concatenate([np.zeros((0, len(features)), np.float32), *parts])


def mapped_directions(
    m: Map, source: Side, features: np.ndarray, strength: np.ndarray, *, seed: int
) -> np.ndarray:
    """Returns features of A mapped to B, float32 [features, d_b] per unit of activation.

    The mean, over rows at which a feature fires (strength [n, features]), of the map's prediction
    less that without the feature: d W of an affine map and a direction d. Zero where a feature
    does not fire, and for maps of tokens alone.
    """

    firing = (np.flatnonzero(column > 0) for column in strength.T)
    rows = [stats.generator(seed).permutation(r)[:ROWS_EACH] for r in firing]
    directions = decoder_rows(source.dictionary, features)
    index = np.repeat(np.arange(len(features)), list(map(len, rows)))  # the feature of each row
    row = np.concatenate(rows)
    by = strength[row, index]
    graphs, params = zip(*map(modules.split, (m, source.dictionary)))
    total = np.zeros((len(features), m.dictionary.d_model))
    for block in slices(len(row), BLOCK):
        of, added = index[block], by[block, None] * directions[index[block]]
        inputs = source.x[row[block]], source.tokens[row[block]], added, features[of]
        inputs = (padded(a, BLOCK) for a in inputs)
        change = np.asarray(_contribution(graphs, params, *inputs))[: len(of)]
        np.add.at(total, of, change)
    sums = np.bincount(index, weights=by, minlength=len(features))
    return (total / np.maximum(sums, 1e-30)[:, None]).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def _contribution(graphs, params, x, tokens, added, feature) -> jax.Array:
    m, source = map(modules.merge, graphs, params)
    x = x.astype(jnp.float32)
    if m.predicts_activation and m.reads == "activations":
        return m.activation(x, tokens=tokens) - m.activation(x - added, tokens=tokens)
    if m.reads == "tokens":
        return jnp.zeros((len(x), m.dictionary.d_model))
    if m.reads == "activations":
        inputs, without = x, x - added
    else:
        inputs = source.encode(x)
        without = inputs.at[jnp.arange(len(x)), feature].set(0.0)
    decode = m.dictionary.decode
    return decode(m(inputs, tokens=tokens)) - decode(m(without, tokens=tokens))


def best_matches(
    codes: Iterable[np.ndarray], strength: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns each A feature's best-correlated B feature and the correlation, each [features].

    strength is A's [n, features]; codes are B's, in blocks of rows [m, width_b].
    """
    n, start, cross, total, square = len(strength), 0, 0.0, 0.0, 0.0
    centered = strength.astype(np.float64)
    centered -= centered.mean(0, keepdims=True)
    for f in codes:
        f = f.astype(np.float64)
        cross = cross + centered[start : start + len(f)].T @ f  # [features, width_b]
        total, square = total + f.sum(0), square + np.square(f).sum(0)
        start += len(f)
    variance = np.maximum(square / n - np.square(total / n), 0)
    spread = np.sqrt(variance[None, :] * centered.var(0)[:, None])
    r = np.divide(cross / n, spread, out=np.zeros_like(cross), where=spread > 1e-12)
    return r.argmax(1), r.max(1)
