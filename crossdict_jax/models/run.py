"""The runner of language models: reads texts, replaces or adds to activations, generates.

What varies from call to call is an argument of a compiled program, so few are compiled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.errors import UserError
from crossdict_jax.models.base import (
    KINDS,
    LanguageModel,
    Past,
    Site,
    captured,
    check_sites,
    check_tokens,
    matmul,
    rounded,
)
from crossdict_jax.training.mesh import DATA, make_mesh, platform, product_dtype, put, shard

AT_ONCE = 16  # added vectors that are measured together, at most
LOGITS = 2**24  # of edited texts, made at once on a device: 64 MiB
CLEAN = 2**27  # probabilities of unedited texts, kept on a device: 512 MiB
LONG = 2**38  # tokens times parameters, from which less padding is worth two more programs
LENGTH_STEP = 32  # of lengths in a stream: few programs for texts of any length
PyTree = Any


@dataclass(frozen=True)
class Passages:
    """Texts that a model reads, and the positions in them at which it is read or edited."""

    tokens: Sequence[np.ndarray]  # per text int32 [length], with a BOS where the model wants one
    window: np.ndarray  # int [n], index into ``tokens``
    position: np.ndarray  # int [n], index into the text's tokens
    first: np.ndarray | None = None  # int [n], where an edit begins; None: at the position
    end: np.ndarray | None = None  # int [n], last token of the continuation; ``position`` for none
    rows: np.ndarray | None = None  # int64 [n], row numbers of the store, if they come from one
    document: np.ndarray | None = None  # int [n]

    @property
    def scored(self) -> np.ndarray:
        """bool [n]: the text holds the token after the position."""
        lengths = np.array([len(t) for t in self.tokens])
        return self.position + 1 < lengths[self.window]

    def take(self, index: np.ndarray | slice) -> Passages:
        """Returns the same texts with some of the positions."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        del values["tokens"]
        return replace(self, **{name: value[index] for name, value in values.items()})

    def within(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (index among the positions, row of the batch, position), int [m] each.

        Of those that lie in a batch of texts, text by text.
        """
        in_batch = np.full(len(self.tokens), -1)
        in_batch[texts] = np.arange(len(texts))
        row = in_batch[self.window]
        index = np.argsort(row, kind="stable")[np.sum(row < 0) :]
        return index, row[index], self.position[index]

    def sources(self, texts: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Returns whose replacement each token of a batch of texts takes, int ``shape``.

        The index among the positions; -1 for tokens that are not edited.
        """
        source, (index, row, position) = np.full(shape, -1), self.within(texts)
        first = position if self.first is None else self.first[index]
        for back in range(np.max(position - first, initial=0) + 1):
            inside = position - back >= first
            source[row[inside], position[inside] - back] = index[inside]
        return source


class Batch(NamedTuple):
    """Texts of similar length as one array, padded on the right and below."""

    texts: np.ndarray  # int [m], which ones; the rows behind them are padding
    tokens: np.ndarray  # int32 [batch, seq]


@dataclass(frozen=True)
class Effect:
    """What an edit does to the next-token prediction at each scored position, in nats."""

    ce: np.ndarray  # float64 [scored], cross-entropy
    kl: np.ndarray  # float64 [scored], KL(clean || edited)


class Chunk(NamedTuple):
    """The few tokens at every position that are read again for each added vector."""

    tokens: jax.Array  # int32 [n, seq], from the first edited one on
    x: jax.Array  # [n, seq, d_model], the site's activations without an edit
    edited: jax.Array  # float32 [n, seq], 1 where the vector is added
    start: jax.Array  # int32 [n], position of the first token
    read: jax.Array  # int32 [n, reads], indices into the chunk
    following: jax.Array  # int32 [n, reads], the token after each
    scored: jax.Array  # float32 [n, reads], 1 where that token belongs to the continuation


@dataclass(frozen=True)
class Held:
    """A model that has read texts up to n positions, to measure vectors added there.

    The keys of the texts are kept: a vector costs a few tokens and not a text.
    """

    runner: Runner
    n: int
    site: Site
    layers: dict  # keys and values
    chunk: Chunk

    def log_probs(self, vectors: np.ndarray) -> np.ndarray:
        """Returns next-token log p after each position, float32 [1 + vectors, n, vocab].

        Entry 0 is without an edit, each other one with a vector [d_model] added.
        """
        return self._added(_log_p, np.pad(vectors, ((1, 0), (0, 0))), at_once=1)

    def changes(
        self, vectors: np.ndarray, watched: Mapping[int, float], *, limit: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (mean change of log p of the watched tokens, KL(clean || edited)).

        Both float32 [vectors, n], in nats, of the prediction after each position.

        Args:
          vectors: [vectors, d_model], each added alone.
          watched: {token: weight in the mean}, 1 to ``limit`` of them.
          limit: ``watched`` is filled up to it, so that all features share a program.
        """
        ids = np.resize(np.array(list(watched), np.int32), limit)
        weight = np.zeros(limit, np.float32)
        weight[: len(watched)] = list(watched.values())
        return self._added(_watched_change, vectors, extra=(ids, weight / weight.sum()))

    def continuations(self, vectors: np.ndarray, strength: np.ndarray) -> np.ndarray:
        """Returns the change of log p of each position's continuation, float32 [vectors, n].

        ``strength`` [vectors, n] multiplies a vector [d_model] at each position.
        """
        return self._added(_continuation_change, vectors, strength)

    def _added(self, measure, vectors, strength=None, *, extra=(), at_once=AT_ONCE) -> PyTree:
        n, (size, reads) = len(vectors), self.chunk.read.shape
        logits = size * reads * self.runner.config.vocab_size // self.runner.mesh.size
        at_once = max(1, min(at_once, LOGITS // logits))
        strength = np.ones((n, self.n)) if strength is None else strength
        more = -n % at_once  # one program for any few vectors
        vectors = np.pad(vectors.astype(np.float32), ((0, more), (0, 0)))
        strength = np.pad(strength.astype(np.float32), ((0, more), (0, size - self.n)))
        static, shared = (self.site, measure, at_once), (vectors, strength, extra)
        arrays = self.layers, self.chunk
        out = self.runner.dispatch(_measured, *arrays, static=static, shared=shared)
        return jax.tree.map(lambda a: np.asarray(a)[:n, : self.n], out)


class Starts(NamedTuple):
    """Texts to be continued, as arrays with a row for each."""

    tokens: np.ndarray  # int32 [n, longest], the prompts, filled up on the right with any tokens
    length: np.ndarray  # int32 [n], tokens of each prompt, 1 or more
    vector: np.ndarray  # float32 [n, d_model], added from the prompt's last token on
    prompt: np.ndarray  # int32 [n]; equal prompts and samples draw equal random numbers
    sample: np.ndarray  # int32 [n]


class Runner:
    """A language model on all devices, which share the texts of a batch."""

    def __init__(self, lm: LanguageModel, *, batch_size: int, dtype: str = "float32"):
        """
        Args:
          batch_size: texts per forward on each device, at most.
          dtype: of the inputs of matrix products and of the weights that they read; or "auto".
        """
        self.config, self.name, self.mesh = lm.config, lm.name, make_mesh()
        graphdef, params = modules.split(lm)
        self._model = graphdef, product_dtype(dtype), self.mesh.abstract_mesh
        self._params = put(rounded(params, self._model[1]), shard(self.mesh))
        self._batch_size = batch_size

    # Batches and programs

    def dispatch(self, function: Callable, *arrays, static=(), shared=()) -> PyTree:
        """Returns ``function(lm, *static, *shared, *arrays)``, still on the devices.

        Args:
          function: of a module: one made anew for each call would be compiled for each.
          arrays: pytrees as ``put`` returns them, split among the devices.
          static: hashable; other values are another program.
          shared: pytrees of arrays, and modules, that every device holds whole.
        """
        return run_model(*self.arguments(function, arrays, static, shared))

    def arguments(self, function: Callable, arrays=(), static=(), shared=()) -> tuple:
        """Returns the arguments of ``run_model``; see ``dispatch``."""
        split = [modules.split(s) if isinstance(s, nnx.Module) else (None, s) for s in shared]
        everywhere = shard(self.mesh)
        values = jax.tree.map(lambda a: put(a, everywhere), tuple(value for _, value in split))
        graphs = tuple(graph for graph, _ in split)
        return function, self._model, tuple(static), graphs, self._params, values, arrays

    def run(
        self, function: Callable, *arrays: np.ndarray, static=(), shared=(), group: int = 1
    ) -> PyTree:
        """Returns ``dispatch`` of arrays [n, ...] as numpy, a batch at a time.

        Args:
          function: its results have a row for each row of the arrays, or for each group.
          group: rows that must lie in one batch, as the two texts of a pair.
        """
        n, size = len(arrays[0]), self._size(len(arrays[0]), group)
        dispatch = partial(self.dispatch, function, static=static, shared=shared)
        batches = (np.minimum(np.arange(at, at + size), n - 1) for at in range(0, n, size))
        dispatched = (dispatch(*(self.put(a[rows]) for a in arrays)) for rows in batches)
        parts = [jax.tree.map(np.asarray, batch) for batch in modules.ahead(dispatched)]
        per_result = size // len(jax.tree.leaves(parts[0])[0])  # rows of the arrays
        return jax.tree.map(lambda *p: np.concatenate(p)[: n // per_result], *parts)

    def batches(
        self,
        tokens: Sequence[np.ndarray],
        *,
        length_step: int = 0,
        limit: int | None = None,
        worth: float = 0.2,
    ) -> list[Batch]:
        """Returns texts by length, in batches of few shapes (each is compiled once).

        All batches are equally large and long, or in two groups where that saves the share
        ``worth`` of all tokens. With a ``length_step``, for texts that come in many portions, a
        batch is as long as its longest text, up to a multiple. No more than ``limit`` texts are in
        one.
        """
        lengths = np.array([len(t) for t in tokens])
        order, size = np.argsort(lengths, kind="stable"), self._size(limit)
        if length_step:
            parts = [order[at : at + size] for at in range(0, len(order), size)]
            longest = (math.ceil(lengths[p].max() / length_step) * length_step for p in parts)
            shapes = [(size, min(length, self.config.context)) for length in longest]
        else:
            short, by_length = np.arange(1, len(order) + 1), lengths[order]
            # Tokens with padding, if the first ``short`` texts are a group of their own.
            padded = short * by_length + (len(order) - short) * by_length[-1]
            best = int(padded.argmin())
            cut = best + 1 if padded[best] < (1 - worth) * len(order) * by_length[-1] else 0
            parts, shapes = [], []
            for group in filter(len, (order[:cut], order[cut:])):
                parts += (new := np.array_split(group, math.ceil(len(group) / size)))
                rows = self._size(max(map(len, new)))
                shapes += [(rows, lengths[group].max())] * len(new)
        return [Batch(p, pad([tokens[i] for i in p], s)) for p, s in zip(parts, shapes)]

    def put(self, array: np.ndarray) -> jax.Array:
        """Returns an array [batch, ...] with its rows split among the devices."""
        return put(array, shard(self.mesh, DATA))

    def _size(self, n: int | None = None, group: int = 1) -> int:
        """Rows of a batch: no more than asked or needed, equally many for each device."""
        size, unit = self._batch_size * self.mesh.size, group * self.mesh.size
        return math.ceil((size if n is None else min(size, n)) / unit) * unit

    # Reading

    def read(self, tokens: Sequence[np.ndarray], sites: Iterable[Site]) -> dict[Site, np.ndarray]:
        """Returns {site: activations, float32 [texts, seq, d_model]}, padded as ``pad`` does."""
        sites = check_sites(self.config, sites, self.name)
        return dict(zip(sites, self.run(captured, pad(tokens), static=(sites,))))

    def read_at(
        self, passages: Passages, sites: Sequence[Site], *, dtype=np.float32, length_step: int = 0
    ) -> list[np.ndarray]:
        """Returns per site its activations at the positions, [n, d_model]; see ``stream``."""
        out = [np.empty((len(passages.position), self.config.d_model), dtype) for _ in sites]
        for index, x in self.stream(passages, sites, dtype=dtype, length_step=length_step):
            for array, of_site in zip(out, x):
                array[index] = of_site
        return out

    def stream(
        self,
        passages: Passages,
        sites: Iterable[Site],
        *,
        dtype=jnp.bfloat16,
        length_step: int = LENGTH_STEP,
    ) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """Yields (index of positions int [m], per site their activations [m, d_model]), by batch.

        Other activations do not leave the devices. ``length_step``: see ``batches``.
        """
        static = check_sites(self.config, sites, self.name), jnp.dtype(dtype)

        def read(batch: Batch) -> tuple:
            index, row, position = passages.within(batch.texts)
            x = self.dispatch(_captured, self.put(batch.tokens), static=static)
            if platform() == "cpu":  # from which nothing travels
                return index, (row, position), x
            longest = math.ceil(np.bincount(row).max(initial=1) / LENGTH_STEP) * LENGTH_STEP
            at, real = _by_text(row, position, (len(batch.tokens), longest))
            return index, real, _at_positions(x, self.put(at))

        batches = self.batches(passages.tokens, length_step=length_step)
        for index, at, x in modules.ahead(map(read, batches)):
            yield index, [np.asarray(of_site)[at] for of_site in x]

    # Replacing

    def splice(
        self,
        passages: Passages,
        site: Site | tuple[Site, ...],
        replacements: Mapping[Any, np.ndarray | Mapping[Site, np.ndarray]],
    ) -> dict[Any, Effect]:
        """Returns the effect of each replacement of activations, and under "clean" of no edit.

        The text is read once; edited passes start from the clean activations at the lowest site.
        Several sites are replaced in one pass, in execution order: a later site is replaced, at
        the positions, in what an earlier replacement makes of it. Of equal replacements one is
        read: low-rank maps may have all ranks, and shuffled pairs have the same mean.

        Args:
          site: where activations are replaced; a tuple for several sites at once.
          replacements: {name: [n, d_model]}, the activation at every position, or a vector
            [d_model] for all. For a tuple of sites, {name: {site: one of these}}.
        """
        if isinstance(site, Site):
            replacements = {name: {site: values} for name, values in replacements.items()}
            site = (site,)
        sites = check_sites(self.config, site, self.name)
        sites = tuple(sorted(sites, key=lambda s: (s.layer, KINDS.index(s.kind))))
        most = np.bincount(passages.window).max(initial=1)  # positions of a text
        first: dict[tuple[bytes, ...], Any] = {}
        alike = {"clean": "clean"}
        for name, by_site in replacements.items():
            digests = (hashlib.sha256(np.ascontiguousarray(by_site[s])).digest() for s in sites)
            alike[name] = first.setdefault(tuple(digests), name)
        n = len(passages.position)
        ce, kl = ({name: np.zeros(n) for name in alike.values()} for _ in range(2))
        fit = max(1, CLEAN // (most * self.config.vocab_size)) * self.mesh.size
        parameters = sum(a.size for a in jax.tree.leaves(self._params))
        worth = 0.1 if sum(map(len, passages.tokens)) * parameters > LONG else 0.2
        for batch in self.batches(passages.tokens, limit=fit, worth=worth):
            index, row, position = passages.within(batch.texts)
            rows, reads = len(batch.tokens) // self.mesh.size, min(most, batch.tokens.shape[1])
            chunks = math.ceil(reads / max(1, LOGITS // (rows * self.config.vocab_size)))
            step = math.ceil(reads / chunks)
            read, real = _by_text(row, position, (len(batch.tokens), chunks * step))
            tokens, read = self.put(batch.tokens), self.put(read)
            loss, *clean = self.dispatch(_clean, tokens, read, static=(sites[0], step))
            arrays = tokens, read, *clean
            ce["clean"][index] = np.asarray(loss)[real]
            if not np.isfinite(ce["clean"][index]).all():
                raise UserError(f"The logits of {self.name} overflow; copy its weights again.")
            source = passages.sources(batch.texts, batch.tokens.shape)
            edited = source >= 0
            for name in first.values():
                edits = [self.put(edited)]
                for values in (replacements[name][s] for s in sites):
                    x = np.zeros((*edited.shape, values.shape[-1]), np.float32)
                    x[edited] = values if values.ndim == 1 else values[source[edited]]
                    edits.append(self.put(x))
                results = self.dispatch(_edited, *arrays, *edits, static=(sites, step))
                for values, result in zip((ce, kl), results):
                    values[name][index] = np.asarray(result)[real]
            del clean, arrays  # before the next batch has its own: a probability for every token
        scored = passages.scored
        return {name: Effect(ce[of][scored], kl[of][scored]) for name, of in alike.items()}

    # Adding

    def hold(
        self,
        site: Site,
        passages: Passages,
        x: np.ndarray,
        *,
        size: int,
        span: int | None,
        reads: int = 1,
        same_texts: Held | None = None,
    ) -> Held:
        """Reads the texts up to the positions, to add vectors at the site.

        Args:
          passages: with ``first`` and ``end``; the prediction after ``position`` is read.
          x: [texts, seq, d_model], activations of all texts at the site (``read``).
          size: the positions are filled up to this number: one program for all features.
          span: edited tokens of a position, at most (the last ones of more); None: all of the text
            before it but its first token.
          reads: predictions read from ``position`` on, at most.
          same_texts: of the same positions and size with another span or reads, to reuse.
        """
        tokens = pad(passages.tokens)
        n, length = len(passages.position), tokens.shape[1]
        size = math.ceil(size / self.mesh.size) * self.mesh.size
        filled = passages.take(np.minimum(np.arange(size), n - 1))
        text, first, last, end = filled.window, filled.first, filled.position, filled.end
        if span is None:
            first, span = np.minimum(1, last), length
        first = np.maximum(first, last - span + 1)
        at = first[:, None] + np.arange(span + reads - 1)[None, :]
        inside = np.minimum(at, length - 1)
        after = last[:, None] + np.arange(reads)[None, :]
        chunk = Chunk(
            tokens=tokens[text[:, None], inside],
            x=x[text[:, None], inside],
            edited=(at <= last[:, None]).astype(np.float32),
            start=first.astype(np.int32),
            read=(after - first[:, None]).astype(np.int32),
            following=tokens[text[:, None], np.minimum(after + 1, length - 1)],
            scored=(after < end[:, None]).astype(np.float32),
        )
        layers = same_texts and same_texts.layers
        if layers is None:
            arrays = self.put(tokens[text]), self.put(x[text])
            layers = self.dispatch(_look_back, *arrays, static=(site,))
        return Held(self, n, site, layers, Chunk(*map(self.put, chunk)))

    # Generating

    def generate(
        self, starts: Starts, site: Site, *, count: int, temperature: float, top_p: float, seed: int
    ) -> np.ndarray:
        """Returns continuations with a vector added at the site, int32 [n, count].

        The draw of a text depends on the seed, its prompt, its sample and its own logits alone,
        not on the texts beside it.

        Args:
          count: new tokens of every text; with the prompt no more than the model reads.
          temperature: 0 takes the likeliest token.
          top_p: tokens are drawn among the likeliest that hold this share of the probability
            (Holtzman et al. 2020, section 3.1).
        """
        (site,) = check_sites(self.config, [site], self.name)
        check_tokens(self.config, starts.tokens, self.name)
        sampling = np.float32(temperature), np.float32(top_p), np.uint32(seed)
        return self.run(_generate, *starts, static=(site, count), shared=sampling)


def pad(tokens: Sequence[np.ndarray], shape: tuple[int, int] | None = None) -> np.ndarray:
    """Returns texts as one int32 array, [texts, seq] or ``shape``, zeros right and below."""
    out = np.zeros(shape or (len(tokens), max(map(len, tokens), default=0)), np.int32)
    for row, text in zip(out, tokens):
        row[: len(text)] = text
    return out


def _by_text(row: np.ndarray, position: np.ndarray, shape: tuple[int, int]) -> tuple:
    """``Passages.within`` as (positions int32 [batch, most of a text], mask of real ones)."""
    real = np.arange(shape[1])[None, :] < np.bincount(row, minlength=shape[0])[:, None]
    read = np.zeros(shape, np.int32)
    read[real] = position
    return read, real


# Compiled programs


@partial(jax.jit, static_argnums=(0, 1, 2, 3), keep_unused=True)  # which lie there, too
def run_model(function, model, static, graphs, params, shared, arrays) -> PyTree:
    """See ``Runner.dispatch``."""
    graphdef, dtype, mesh = model
    lm = modules.merge(graphdef, params)
    lm.dtype = dtype
    shared = [s if g is None else modules.merge(g, s) for g, s in zip(graphs, shared)]
    with jax.sharding.use_abstract_mesh(mesh):
        return function(lm, *static, *shared, *arrays)


def _captured(lm, sites, dtype, tokens) -> tuple[jax.Array, ...]:
    return tuple(x.astype(dtype) for x in captured(lm, sites, tokens))


@jax.jit
def _at_positions(x: PyTree, at: jax.Array) -> PyTree:
    """Arrays [batch, m, d_model] at positions [batch, m] of arrays [batch, seq, d_model]."""
    return jax.tree.map(lambda a: jnp.take_along_axis(a, at[:, :, None], axis=1), x)


def token_losses(lm, tokens, tap=None) -> jax.Array:
    """Returns -log p of every token after the first, [n, seq - 1] nats, of tokens [n, seq]."""
    return _next_token_loss(lm.logits(tokens, tap=tap)[:, :-1], tokens[:, 1:])[0]


def _clean(lm, site, step, tokens, read):
    """(loss [batch, reads], x at the site, next-token probabilities, sum p log p).

    The last two are [reads, batch, ...], of positions ``read`` [batch, reads].
    """
    seen: dict[Site, jax.Array] = {}
    stream, _ = lm.final_stream(tokens, tap=seen.setdefault)
    loss, *clean = _predictions(lm, step, tokens, read, stream)
    return loss, seen[site], *clean


def _edited(lm, sites, step, tokens, read, x, p, negative_entropy, edited, *values):
    """(loss, KL(clean || edited)), both [batch, reads], with values where ``edited`` says so.

    x are the clean activations at the lowest site; nothing before it is computed.
    """
    new = dict(zip(sites, values))

    def tap(at, y):
        y = x if at == sites[0] else y
        return jnp.where(edited[..., None], new[at], y) if at in new else y

    stream, _ = lm.final_stream(tokens, tap=tap)
    loss, kl = _predictions(lm, step, tokens, read, stream, p, negative_entropy)
    return loss, kl.T


def _predictions(lm, step, tokens, read, stream, *clean):
    """(loss [batch, reads], p [reads, batch, vocab], sum p log p) at positions [batch, reads].

    Beside the last two of a clean pass, (loss, KL(clean || this)). Logits are made of ``step``
    positions of every text at a time. The loss of a text's last token means nothing: the next one
    is not in the array.
    """

    def predict(at):
        x, following, *clean = at
        logits = lm.unembed(x[None])[0]
        loss, normaliser = _next_token_loss(logits, following)
        if clean:
            p, negative_entropy = clean
            kl = negative_entropy - jnp.sum(p * logits, axis=-1) + normaliser
            return loss, jnp.maximum(kl, 0.0)  # below zero it is rounding
        p = jnp.exp(logits - normaliser[:, None])
        return loss, p, jnp.sum(p * logits, axis=-1) - normaliser

    x = jnp.take_along_axis(stream, read[:, :, None], axis=1)
    following = jnp.take_along_axis(jnp.roll(tokens, -1, axis=1), read, axis=1)
    arrays = jnp.swapaxes(x, 0, 1), following.T, *clean
    loss, *others = jax.lax.map(predict, arrays, batch_size=step)
    return loss.T, *others


def _next_token_loss(logits, following) -> tuple[jax.Array, jax.Array]:
    """(-log p of the following token, log of the softmax's denominator), of logits [..., vocab]."""
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    return normaliser - chosen, normaliser


def _look_back(lm, site, tokens, x) -> dict:
    """Keys and values of every layer that an edit at the site can reach."""
    _, layers = lm.extend(tokens, tap=lambda at, y: x if at == site else y)
    lowest = {"resid_pre": site.layer, "resid_post": site.layer + 1}.get(site.kind, 0)
    return {layer: kept for layer, kept in layers.items() if layer >= lowest}


def _edited_at(lm, tokens, past: Past | None, site: Site, edit: Callable, read: jax.Array):
    """Logits at ``read`` [batch, reads] alone with ``edit(x)`` at the site, and keys and values."""
    top = Site(lm.config.n_layers - 1, "resid_post")

    def tap(at, y):
        if at == site:
            y = edit(y)
        if at == top:  # what is not read needs no logits
            y = jnp.take_along_axis(y, read[:, :, None], axis=1)
        return y

    return lm.extend(tokens, past, tap=tap)


def _measured(lm, site, measure, at_once, vectors, strength, extra, layers, chunk: Chunk):
    """``measure(log p, clean log p [n, reads, vocab], chunk, *extra)`` of every added vector."""
    past = Past(layers, chunk.start) if layers else None

    def edit(vector, strength):
        delta = (chunk.edited * strength[:, None])[:, :, None] * vector[None, None, :]
        logits, _ = _edited_at(lm, chunk.tokens, past, site, lambda y: chunk.x + delta, chunk.read)
        return jax.nn.log_softmax(logits, axis=-1)

    clean = edit(jnp.zeros_like(vectors[0]), jnp.zeros_like(strength[0]))
    return jax.lax.map(
        lambda pair: measure(edit(*pair), clean, chunk, *extra),
        (vectors, strength),
        batch_size=at_once,
    )


def _log_p(log_p, clean, chunk) -> jax.Array:
    return log_p[:, 0]


def _watched_change(log_p, clean, chunk, watched, weight) -> tuple[jax.Array, jax.Array]:
    difference = log_p[:, 0] - clean[:, 0]
    kl = -jnp.sum(jnp.exp(clean[:, 0]) * difference, axis=-1)
    change = matmul(difference[:, watched], weight, jnp.float32)
    return change, jnp.maximum(kl, 0.0)  # below zero it is rounding


def _continuation_change(log_p, clean, chunk) -> jax.Array:
    chosen = jnp.take_along_axis(log_p - clean, chunk.following[..., None], axis=-1)[..., 0]
    return jnp.sum(chosen * chunk.scored, axis=-1)


def _generate(lm, site, count, temperature, top_p, seed, *starts) -> jax.Array:
    starts = Starts(*starts)
    fold_in = jax.vmap(jax.random.fold_in)
    root = jax.random.key(seed)
    keys = fold_in(jax.vmap(partial(jax.random.fold_in, root))(starts.prompt), starts.sample)
    row = jnp.arange(len(starts.length))

    def read(tokens, position, past, last):
        """Logits [n, vocab] after one token of each row, and the keys of all of them."""
        edited = position >= starts.length[:, None] - 1
        added = edited[..., None] * starts.vector[:, None, :]
        logits, layers = _edited_at(lm, tokens, past, site, lambda y: y + added, last[:, None])
        return logits[:, 0], layers

    def step(carry, i):
        logits, layers, length = carry
        token = draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, i), temperature, top_p)
        past = Past(layers, length)
        logits, new = read(token[:, None], length[:, None], past, jnp.zeros_like(length))
        layers = {
            layer: tuple(old.at[row, length].set(k[:, 0]) for old, k in zip(both, new[layer]))
            for layer, both in layers.items()
        }
        return (logits, layers, length + 1), token

    positions = jnp.arange(starts.tokens.shape[1])[None, :]
    logits, layers = read(starts.tokens, positions, None, starts.length - 1)
    room = ((0, 0), (0, count), (0, 0), (0, 0))
    layers = jax.tree.map(lambda kept: jnp.pad(kept, room), layers)
    _, tokens = jax.lax.scan(step, (logits, layers, starts.length), jnp.arange(count))
    return tokens.T


def draw(logits: jax.Array, keys: jax.Array, temperature, top_p) -> jax.Array:
    """Returns a token int32 [n] of logits [n, vocab]; see ``Runner.generate``."""

    def sample():
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
        p = jax.nn.softmax(ranked, axis=-1)
        ranked = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, ranked, -jnp.inf)
        rank = jax.vmap(jax.random.categorical)(keys, ranked)
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)

    return jax.lax.cond(
        temperature == 0, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32), sample
    )
