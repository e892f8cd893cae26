"""A feature of A: named by its number or found by a text, and what it promotes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crossdict_jax.activations.passages import Contexts, passages_of
from crossdict_jax.causal.directions import feature_directions, strengths
from crossdict_jax.causal.effects import (
    choose_contexts,
    dose_norms,
    mean_change,
    most_promoted,
    normalised,
)
from crossdict_jax.causal.feature_transfer import positions_of
from crossdict_jax.causal.finished_run import TRAIN_ROWS, FinishedRun
from crossdict_jax.causal.inject import Injector
from crossdict_jax.causal.vocabulary import Translation
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Task
from crossdict_jax.maps.base import encode_rows, slices
from crossdict_jax.training.stage import progress_bar

CANDIDATES = 8  # features that a search lists
STRONGEST = 20  # rows by which a search judges a feature
LEAST_FIRINGS = 4  # rows, for a feature to be judged at all
AT_ONCE = 256  # features between two moves of the progress bar
SHOWN = 3  # strongest contexts of the feature


@dataclass(frozen=True)
class Source:
    """A at a site, and how its features are looked at: on rows of the store, in words."""

    run: FinishedRun
    task: Task
    words: Translation

    @cached_property
    def dictionary(self) -> Dictionary:
        return self.run.dictionary(self.task.source, self.task.site_source)

    @cached_property
    def contexts(self) -> Contexts:
        return Contexts(self.run.store, self.task.source, self.words.pieces_a)

    @cached_property
    def test(self) -> np.ndarray:
        """Held-out rows, at most TRAIN_ROWS."""
        rows = self.run.store.select("test")
        generator = np.random.Generator(np.random.Philox(key=self.run.config.seed))
        return np.sort(generator.permutation(rows)[:TRAIN_ROWS])

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.run.store.read(self.task.source, self.task.site_source, rows)

    def codes(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The features on some rows, in blocks."""
        for block in slices(len(rows)):
            yield encode_rows(self.dictionary, self.read(rows[block]))

    def strength(self, rows: np.ndarray, feature: int) -> np.ndarray:
        """One feature's activations on some rows, float32 [n]."""
        return strengths(self.dictionary, self.read(rows), np.array([feature]))[:, 0]

    def injector(self, rows: np.ndarray) -> Injector:
        """The model on the windows of some rows, ascending."""
        config, store, model = self.run.config, self.run.store, self.task.source
        passages = passages_of(store, model, rows)
        return Injector(
            self.run.lm(model),
            self.task.site_source,
            passages.tokens,
            positions_of(store, model, passages),
            batch_size=config.intervention.batch_size,
            dtype=config.extract.matmul_dtype,
        )


@dataclass(frozen=True)
class Feature:
    """A feature of A that is put into B.

    Attributes:
      strength: float32 [n], its activations on the training rows.
      direction: float32 [d_a], what a unit of it adds to A.
      median_norm: of A's activations where it was measured.
      promoted: {token of A: change of its log p, nats}.
      mapped: the same in B's tokens.
      contexts: text around the rows where it is strongest.
      candidates: all that the search found, this one first; empty without a search.
    """

    id: int
    strength: np.ndarray
    direction: np.ndarray
    median_norm: float
    promoted: dict[int, float]
    mapped: dict[int, float]
    contexts: list[dict]
    candidates: list[dict]


def choose(source: Source) -> Feature:
    """Returns the feature that was named, or the first of those that a search finds.

    It is added to A at the middle dose where it fires in held-out text: the tokens that become
    likelier are what it promotes.

    Raises:
      UserError: it does not exist, or fires nowhere; the search finds nothing.
    """
    config, task, train = source.run.config, source.task, source.run.train
    settings, candidates = config.steer, []
    feature = settings.feature
    if settings.search:
        candidates = search(source, settings.search)
        feature = candidates[0]["feature"]
    elif feature >= source.dictionary.width:
        raise UserError(
            f"steer.feature={feature}: {task.source} at {task.site_source} has features 0 to "
            f"{source.dictionary.width - 1}."
        )
    strength, held_out = (source.strength(rows, feature) for rows in (train, source.test))
    where = f"feature {feature} of {task.source} at {task.site_source}"
    if not strength.any():
        raise UserError(
            f"steer.feature={feature}: {where} is dead, it fires at none of the {len(train)} "
            "training positions read; choose another, or find one by steer.search."
        )
    if not held_out.any():
        raise UserError(
            f"steer.feature={feature}: {where} fires at none of the {len(source.test)} held-out "
            "positions read, so nobody can say what it promotes; choose another."
        )
    generator = np.random.Generator(np.random.Philox(key=[config.seed, feature]))
    documents = source.run.store.rows.document[source.test]
    count = config.intervention.contexts
    rows = choose_contexts(held_out, documents, count, generator)
    injector = source.injector(source.test[rows])
    direction = feature_directions(source.dictionary, np.array([feature]))[0]
    norm, _ = dose_norms(
        settings.norm,
        (injector.median_norm, injector.median_norm),
        strength=float(held_out[rows].mean()),
        direction=direction,
        mapped=direction,
    )
    dose = norm * middle_dose(settings.alphas) * normalised(direction)
    change = mean_change(injector, injector.ready(size=count, span=1), dose)
    promoted = most_promoted(change, source.words.has_text)
    below = source.run.lm(task.target).config.vocab_size
    mapped, _ = source.words.weights_in_b(promoted, below=below)
    top = [row for row in np.argsort(-strength, kind="stable")[:SHOWN] if strength[row] > 0]
    contexts = [
        source.contexts.snippet(train[row]) | {"activation": float(strength[row])} for row in top
    ]
    median = injector.median_norm
    return Feature(feature, strength, direction, median, promoted, mapped, contexts, candidates)


def middle_dose(alphas: Iterable[float]) -> float:
    """Returns the dose at which what a feature promotes is measured."""
    sizes = sorted(map(abs, alphas))
    return sizes[len(sizes) // 2]


# ---------------------------------------------------------------- search


def search(source: Source, text: str) -> list[dict]:
    """Returns features that fire around a text in training text, or make its first token likelier.

    The latter all at one norm, the middle dose, at the same held-out positions; who does it the
    most comes first.

    Raises:
      UserError: no feature does either.
    """
    config, train = source.run.config, source.run.train
    share, live, base, token = around(text, source.contexts, train, source.codes(train))
    fires = np.any([(f > 0).any(0) for f in source.codes(source.test)], axis=0)
    live = np.flatnonzero(live & fires)
    generator = np.random.Generator(np.random.Philox(key=config.seed))
    count = config.intervention.contexts
    injector = source.injector(np.sort(generator.permutation(source.test)[:count]))
    ready = injector.ready(size=count, span=1)
    dose = injector.median_norm * middle_dose(config.steer.alphas)
    directions = dose * normalised(feature_directions(source.dictionary, live))
    effect: dict[int, float] = {}
    with progress_bar(desc="search", unit="feature", total=len(live)) as progress:
        for block in slices(len(live), AT_ONCE):
            change, _ = injector.changes(ready, directions[block], {token: 1.0}, limit=1)
            effect |= zip(live[block].tolist(), change.mean(1, dtype=np.float64).tolist())
            progress.update(len(change))
    by_share = sorted(effect, key=lambda i: -share[i])
    firing = [i for i in by_share[: CANDIDATES // 2] if share[i] > base]
    by_effect = [i for i in sorted(effect, key=lambda i: -effect[i]) if effect[i] > 0]
    rest = [i for i in by_effect if i not in firing][: CANDIDATES - len(firing)]
    if not firing and not rest:
        raise UserError(
            f"steer.search={text!r} finds no feature: none fires around it or makes it likelier; "
            "search for other text."
        )
    return [
        {
            "feature": i,
            "share": float(share[i]),
            "base": base,
            "token": source.words.text("a", token),
            "promotes": effect[i],
        }
        for i in sorted((*firing, *rest), key=lambda i: -effect[i])
    ]


def around(
    text: str, contexts: Contexts, rows: np.ndarray, codes: Iterable[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Returns which features fire around a text: (share, live, base, token).

    share [width]: of each feature's strongest rows, how many have the text around them; live
    [width]: it fires often enough to be judged; base: the share of all rows, what a feature that
    has nothing to do with the text would have; token: the commonest one in which the text begins.

    Args:
      rows: int [n], row numbers of the store.
      codes: the features [m, width] of these rows, in blocks.

    Raises:
      UserError: the text stands around none of the rows.
    """
    wanted = text.encode()
    holds = np.array([wanted in contexts.text(row) for row in rows])
    if not holds.any():
        raise UserError(
            f"steer.search={text!r} stands nowhere in the {len(rows)} training positions read; "
            "search for other text."
        )
    index, value = strongest(codes, STRONGEST)
    fires = value > 0  # [STRONGEST, width]
    firings = fires.sum(0)
    tokens = Counter(t for row in rows[holds] for t in contexts.first_tokens(wanted, row))
    share = (holds[index] & fires).sum(0) / np.maximum(firings, 1)
    return share, firings >= LEAST_FIRINGS, float(holds.mean()), tokens.most_common(1)[0][0]


def strongest(codes: Iterable[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (rows, activations) where each feature is strongest, both [count or fewer, width]."""
    index, value, start = None, None, 0
    for f in codes:
        rows = np.broadcast_to(np.arange(start, start + len(f))[:, None], f.shape)
        start += len(f)
        value = f if value is None else np.concatenate([value, f])
        index = rows if index is None else np.concatenate([index, rows])
        if len(value) > count:
            top = np.argpartition(-value, count - 1, axis=0)[:count]
            value, index = (np.take_along_axis(a, top, axis=0) for a in (value, index))
    order = np.argsort(-value, axis=0, kind="stable")
    return tuple(np.take_along_axis(a, order, axis=0) for a in (index, value))
