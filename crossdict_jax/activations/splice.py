"""Runs a language model on stored windows with its activations replaced at paired positions.

The clean pass reads the activations once; every edited pass then starts from a changed copy of
them, so nothing below the site is computed again, and every replacement is an argument of one
compiled program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import models, modules
from crossdict_jax.activations.store import Store
from crossdict_jax.errors import UserError
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.stats import Estimate, Resamples
from crossdict_jax.training.mesh import DATA, make_mesh, put, shard

LEAST_DAMAGE = 0.05  # nats: where zeros do less harm than this, no share of it is reported


@dataclass(frozen=True)
class Passages:
    """Windows that a model reads, and the paired positions at which it is edited.

    Attributes:
      tokens: per window int32 [length], with the BOS in front where the model wants one.
      rows: int64 [n], row numbers of the store.
      window: int [n], index into ``tokens``.
      position: int [n], index into the window's tokens.
      document: int [n].
      first: int [n], the first token of what is edited up to the position; without it the
        position alone.
    """

    tokens: tuple[np.ndarray, ...]
    rows: np.ndarray
    window: np.ndarray
    position: np.ndarray
    document: np.ndarray
    first: np.ndarray | None = None

    @property
    def scored(self) -> np.ndarray:
        """bool [n]: the window holds the token after the position, so its loss is known."""
        lengths = np.array([len(t) for t in self.tokens])
        return self.position + 1 < lengths[self.window]


@dataclass(frozen=True)
class Effect:
    """What an edit does to the prediction of the token after each scored position.

    Attributes:
      ce: float64 [scored], cross-entropy in nats.
      kl: float64 [scored], KL(clean || edited) in nats.
    """

    ce: np.ndarray
    kl: np.ndarray


def select_passages(
    store: Store, model: str, *, documents: int, seed: int, split: str = "test"
) -> Passages:
    """Returns the windows and kept rows of at most ``documents`` documents of a split.

    Which documents is a function of the seed, the same for every model of the store.
    """
    if documents < 1:
        raise UserError(f"intervention.documents={documents} must be at least 1.")
    rows = store.select(split)
    present = np.unique(store.rows.document[rows])
    generator = np.random.Generator(np.random.Philox(key=seed))
    rows = rows[np.isin(store.rows.document[rows], generator.permutation(present)[:documents])]
    if not len(rows):
        raise UserError(f"No {split} document holds a paired position; use more text.")
    return passages_of(store, model, rows)


def passages_of(store: Store, model: str, rows: np.ndarray) -> Passages:
    """Returns the windows that a model reads at row numbers [n] of the store, and where."""
    windows, window = np.unique(store.rows.window[rows], return_inverse=True)
    bos = store.has_bos(model)
    front = [] if bos is None else [bos]
    position = store.rows.position[rows, store.models.index(model)] + len(front)
    tokens = (np.concatenate([front, store.window_tokens(model, w)]) for w in windows)
    return Passages(
        tokens=tuple(t.astype(np.int32) for t in tokens),
        rows=rows,
        window=window.reshape(-1),
        position=position,
        document=store.rows.document[rows],
    )


def whole_spans(store: Store, model: str, passages: Passages) -> Passages:
    """Returns the passages with all of each span edited, back to the common end before it.

    The tokens inside a span belong to one model alone; left as they are, they would let what was
    there before shine through. They take what is put at the span's end. Common ends that were
    dropped as outliers bound spans too, and a window's first token is never edited.
    """
    position = store.rows.position[:, store.models.index(model)]
    same = store.rows.window[1:] == store.rows.window[:-1]
    before = np.zeros(len(position), np.int64)
    before[1:][same] = position[:-1][same]
    front = passages.position - position[passages.rows]  # 1 where there is a BOS
    first = np.minimum(before[passages.rows] + 1 + front, passages.position)
    return dataclasses.replace(passages, first=first)


def train_mean(store: Store, model: str, site: Site) -> np.ndarray:
    """Returns the mean activation float32 [d_model] over the kept training rows."""
    x = store.read(model, site, store.select("train"))
    return np.mean(x, axis=0, dtype=np.float64).astype(np.float32)


@dataclass(frozen=True)
class Batch:
    """Windows of similar length as one padded array, and the paired positions among them."""

    tokens: np.ndarray  # int32 [batch, seq]
    rows: np.ndarray  # int [m], places among the passages' rows
    at: tuple[np.ndarray, np.ndarray]  # (place in the batch [m], position [m])
    edited: tuple[np.ndarray, np.ndarray]  # (place in the batch, position), of every edited token
    edited_by: np.ndarray  # int, among the passages' rows: whose replacement it takes
    n_windows: int  # the rest is padding


class Splicer:
    """A language model, its passages, and its clean activations at some sites."""

    def __init__(
        self,
        lm: LanguageModel,
        passages: Passages,
        *,
        sites: tuple[Site, ...],
        batch_size: int,
        dtype: str = "float32",
    ):
        """Runs the model once, as deep as its highest site.

        Args:
          batch_size: windows per forward, at most (but for one on every device).
          dtype: of the inputs of matrix products.
        """
        if batch_size < 1:
            raise UserError(f"intervention.batch_size={batch_size} must be at least 1.")
        self.passages = passages
        self._mesh = make_mesh()
        self._batches = batches(passages, size=batch_size, devices=self._mesh.size)
        self._graphdef, params = modules.split(lm)
        self._params = jax.device_put(params, shard(self._mesh))
        self._dtype = jnp.dtype(dtype)
        for site in sites:
            models.check_site(lm.config, site, lm.name)
        self._clean = {site: [] for site in sites}
        for batch in self._batches:
            seen = _read(self._graphdef, sites, self._dtype, self._params, self._put(batch.tokens))
            for site, x in zip(sites, seen):
                self._clean[site].append(np.asarray(x))

    def clean(self, site: Site) -> np.ndarray:
        """Returns the model's own activations at the paired positions, float32 [n, d_model]."""
        d_model = self._clean[site][0].shape[-1]
        out = np.empty((len(self.passages.rows), d_model), np.float32)
        for batch, x in zip(self._batches, self._clean[site]):
            out[batch.rows] = x[batch.at]
        return out

    def effects(
        self,
        site: Site | tuple[Site, ...],
        replacements: Mapping[str, np.ndarray | Mapping[Site, np.ndarray]],
        progress=None,
    ) -> dict[str, Effect]:
        """Returns what each replacement does, and under "clean" what no edit does.

        Several sites are replaced in one pass, in the order of execution: what an earlier
        replacement makes of a later site at the paired positions is replaced there in its turn,
        and lives on at the other positions alone.

        Args:
          site: where activations are replaced; a tuple for several places at once.
          replacements: {name: [n, d_model]}, the activation at every paired position; everything
            else of the activations stays as it was. A vector [d_model] stands for all rows. For a
            tuple of sites, {name: {site: one of these}}.
          progress: a tqdm bar, updated by the number of windows for every replacement.
        """
        n = len(self.passages.rows)
        ce = {name: np.empty(n) for name in ("clean", *replacements)}
        kl = {name: np.zeros(n) for name in ("clean", *replacements)}
        if isinstance(site, Site):
            replacements = {name: {site: values} for name, values in replacements.items()}
            site = (site,)
        lowest, *above = sorted(site, key=lambda s: (s.layer, models.KINDS.index(s.kind)))
        for place, batch in enumerate(self._batches):
            x = self._clean[lowest][place]
            how = (self._graphdef, lowest, self._dtype, self._params, self._put(batch.tokens))
            loss, *clean = _clean_pass(*how, self._put(x))
            ce["clean"][batch.rows] = np.asarray(loss)[batch.at]
            for name, values in replacements.items():
                edits = self._edits(place, {s: values[s] for s in above})
                loss, divergence = _edited_pass(
                    *how, self._put(_edit(x, batch, values[lowest])), *clean, edits
                )
                ce[name][batch.rows] = np.asarray(loss)[batch.at]
                kl[name][batch.rows] = np.asarray(divergence)[batch.at]
                if progress is not None:
                    progress.update(batch.n_windows)
        scored = self.passages.scored
        return {name: Effect(ce[name][scored], kl[name][scored]) for name in ce}

    def _edits(self, place: int, values: Mapping[Site, np.ndarray]) -> dict[str, tuple]:
        """{site: (bool [batch, seq], what is put there [batch, seq, d_model])} of one batch."""
        batch, edits = self._batches[place], {}
        for site, rows in values.items():
            edited = np.zeros(batch.tokens.shape, bool)
            edited[batch.edited] = True
            given = _edit(np.zeros_like(self._clean[site][place]), batch, rows)
            edits[str(site)] = (self._put(edited), self._put(given))
        return edits

    def _put(self, array: np.ndarray) -> jax.Array:
        return put(array, shard(self._mesh, DATA))


def batches(passages: Passages, *, size: int, devices: int) -> list[Batch]:
    """Returns windows by length, in at most two groups of equally large and equally long batches.

    Each group is compiled once, so there is a second one only where it saves much padding.
    """
    size = math.ceil(size / devices) * devices
    lengths = np.array([len(t) for t in passages.tokens])
    by_length = np.argsort(lengths, kind="stable")
    n_short = _short(lengths[by_length])
    batches = []
    for group in (by_length[:n_short], by_length[n_short:]):
        parts = np.array_split(group, math.ceil(len(group) / size)) if len(group) else []
        rows = math.ceil(max(map(len, parts), default=0) / devices) * devices
        batches += [_batch(passages, part, (rows, lengths[group].max())) for part in parts]
    return batches


def _short(lengths: np.ndarray) -> int:
    """How many of the windows, by length, to pad to less than the longest; often 0."""
    n = len(lengths)
    short = np.arange(1, n + 1)
    padded = short * lengths + (n - short) * lengths[-1]  # tokens, if the first ``short`` are apart
    best = int(padded.argmin())
    return int(short[best]) if padded[best] < 0.8 * n * lengths[-1] else 0


def _batch(passages: Passages, windows: np.ndarray, shape: tuple[int, int]) -> Batch:
    tokens = np.zeros(shape, np.int32)
    place = np.full(len(passages.tokens), -1)
    place[windows] = np.arange(len(windows))
    for row, window in zip(tokens, windows):
        row[: len(passages.tokens[window])] = passages.tokens[window]
    rows = np.flatnonzero(place[passages.window] >= 0)
    at = place[passages.window[rows]], passages.position[rows]
    first = at[1] if passages.first is None else passages.first[rows]
    lengths = at[1] - first + 1
    edited_by = np.repeat(rows, lengths)
    steps = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    edited = place[passages.window[edited_by]], np.repeat(first, lengths) + steps
    return Batch(tokens, rows, at, edited, edited_by, n_windows=len(windows))


def _edit(x: np.ndarray, batch: Batch, values: np.ndarray) -> np.ndarray:
    """A copy of x [batch, seq, d_model] with the edited tokens replaced."""
    x = x.copy()
    x[batch.edited] = values if values.ndim == 1 else values[batch.edited_by]
    return x


@partial(jax.jit, static_argnums=(0, 1, 2))
def _read(graphdef, sites, dtype, params, tokens) -> tuple[jax.Array, ...]:
    """The activations at the sites, each float32 [batch, seq, d_model]."""
    seen = {}

    def tap(site, x):
        seen[site] = x
        return x

    modules.merge(graphdef, params).logits(tokens, tap=tap, dtype=dtype)
    return tuple(seen[site] for site in sites)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _clean_pass(graphdef, site, dtype, params, tokens, x):
    """(loss [batch, seq], probabilities [batch, seq, vocab], sum p log p [batch, seq])."""
    logits = _from_site(graphdef, site, dtype, params, tokens, x)
    loss, normaliser = _loss(logits, tokens)
    p = jnp.exp(logits - normaliser[..., None])
    return loss, p, jnp.sum(p * logits, axis=-1) - normaliser


@partial(jax.jit, static_argnums=(0, 1, 2))
def _edited_pass(graphdef, site, dtype, params, tokens, x, p, negative_entropy, edits):
    """(loss, KL(clean || edited)), both [batch, seq]; ``edits`` are of sites above."""
    logits = _from_site(graphdef, site, dtype, params, tokens, x, edits)
    loss, normaliser = _loss(logits, tokens)
    kl = negative_entropy - jnp.sum(p * logits, axis=-1) + normaliser
    return loss, jnp.maximum(kl, 0.0)  # below zero it is rounding


def _from_site(graphdef, site, dtype, params, tokens, x, edits=None) -> jax.Array:
    """Logits with x in place of the site's activations: what made those is not computed.

    ``edits`` replace positions of sites above, {site: (bool [batch, seq], [batch, seq, d_model])}.
    """
    edits = edits or {}

    def tap(here, y):
        if here == site:
            return x
        if str(here) in edits:
            edited, values = edits[str(here)]
            return jnp.where(edited[..., None], values, y)
        return y

    return modules.merge(graphdef, params).logits(tokens, tap=tap, dtype=dtype)


def _loss(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(-log p(next token), log of the softmax's denominator), both [batch, seq].

    The last position has no next token in the array; its loss means nothing and is never read.
    """
    following = jnp.roll(tokens, -1, axis=1)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    return normaliser - chosen, normaliser


def loss_recovered(
    edited: Effect, *, clean: Effect, baseline: Effect, resamples: Resamples
) -> Estimate | None:
    """Returns (CE_baseline - CE_edited) / (CE_baseline - CE_clean): 1 is harmless, 0 the baseline.

    None if the baseline (zeros, or the mean) does less than LEAST_DAMAGE nats of harm.
    """
    if resamples.mean(baseline.ce - clean.ce).value < LEAST_DAMAGE:
        return None
    return resamples.estimate(baseline.ce - edited.ce, baseline.ce - clean.ce)
