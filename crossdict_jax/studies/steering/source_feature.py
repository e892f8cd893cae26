"""A feature of A that is looked for: by its number or by a text, and what it promotes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from crossdict_jax import dictionaries, models
from crossdict_jax.activations.contexts import Contexts
from crossdict_jax.activations.splice import passages_of
from crossdict_jax.activations.store import Store
from crossdict_jax.causal.directions import feature_directions, strengths
from crossdict_jax.causal.effects import (
    choose_contexts,
    dose_norms,
    mean_change,
    most_promoted,
    normalised,
)
from crossdict_jax.causal.feature_transfer import positions_of
from crossdict_jax.causal.finished_run import TRAIN_ROWS
from crossdict_jax.causal.inject import Injector
from crossdict_jax.causal.vocabulary import Translation
from crossdict_jax.config import Config
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Task
from crossdict_jax.maps.base import encode_rows, slices
from crossdict_jax.studies.steering.search import around
from crossdict_jax.workdir import Workdir

CANDIDATES = 8  # features that a search lists
AT_ONCE = 256  # features between two moves of the progress bar
SHOWN = 3  # strongest contexts of the feature


@dataclass(frozen=True)
class Feature:
    """A feature of A that is put into B.

    Attributes:
      strength: float32 [n], its activations on the training rows that are read.
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


class Source:
    """A: its dictionary and the rows on which features are looked at."""

    def __init__(self, config: Config, work: Workdir, store: Store, task: Task):
        self.config, self.store, self.task, self.work = config, store, task, work
        self.dictionary = dictionaries.load(work.dictionary(task.source, task.site_source))
        self._path = store.paths[store.models.index(task.source)]
        self.tokenizer = models.load_tokenizer(self._path)
        self.train, self.test = (self._some(split) for split in ("train", "test"))

    def _some(self, split: str) -> np.ndarray:
        rows = self.store.select(split)
        generator = np.random.Generator(np.random.Philox(key=self.config.seed))
        return np.sort(generator.permutation(rows)[:TRAIN_ROWS])

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.store.read(self.task.source, self.task.site_source, rows)

    def choose(self, words: Translation) -> Feature:
        """Returns the feature that was named, or the first of those that the search finds."""
        self.words = words
        self._contexts = Contexts(self.store, self.task.source, words.pieces_a)
        if not self.config.steer.search:
            return self._described(self._named(self.config.steer.feature), [])
        listed = self._found(self.config.steer.search)
        return self._described(listed[0]["feature"], listed)

    def _found(self, text: str) -> list[dict]:
        """Features that fire around a text in training text, or make its first token likelier.

        The latter all at one norm, at the same held-out places; who does it the most comes first.
        """
        found = around(text, self._contexts, self.train, self._codes(self.train))
        live = np.flatnonzero(found.live & self._fires(self.test))
        effect = dict(zip(live.tolist(), self._promotes(live, found.token).tolist()))
        by_share = sorted(effect, key=lambda i: -found.share[i])
        fires = [i for i in by_share[: CANDIDATES // 2] if found.share[i] > found.base]
        by_effect = [i for i in sorted(effect, key=lambda i: -effect[i]) if effect[i] > 0]
        rest = [i for i in by_effect if i not in fires][: CANDIDATES - len(fires)]
        if not fires and not rest:
            raise UserError(
                f"steer.search={text!r} finds no feature: none fires around it or makes it "
                "likelier; search for other text."
            )
        return [
            {
                "feature": i,
                "share": float(found.share[i]),
                "base": found.base,
                "token": self.words.text("a", found.token),
                "promotes": effect[i],
            }
            for i in sorted((*fires, *rest), key=lambda i: -effect[i])
        ]

    def _fires(self, rows: np.ndarray) -> np.ndarray:
        """bool [width]: which features fire on some of the rows."""
        return np.any([(f > 0).any(0) for f in self._codes(rows)], axis=0)

    def _promotes(self, features: np.ndarray, token: int) -> np.ndarray:
        """By how much each feature raises log p of a token, [features] in nats.

        All are added at one norm, the middle dose, at the same held-out places.
        """
        from tqdm import tqdm

        count = self.config.intervention.contexts
        generator = np.random.Generator(np.random.Philox(key=self.config.seed))
        injector = self._reader(np.sort(generator.permutation(self.test)[:count]))
        ready = injector.ready(size=count, span=1)
        dose = injector.median_norm * _middle(self.config.steer.alphas)
        directions = normalised(feature_directions(self.dictionary, features))
        parts = [np.zeros(0)]
        with tqdm(desc="search", unit="feature", total=len(features)) as progress:
            for block in slices(len(features), AT_ONCE):
                change, _ = injector.changes(ready, dose * directions[block], {token: 1.0}, limit=1)
                parts.append(change.mean(1, dtype=np.float64))
                progress.update(len(change))
        return np.concatenate(parts)

    def _named(self, feature: int) -> int:
        if feature >= self.dictionary.width:
            raise UserError(
                f"steer.feature={feature}: {self.task.source} at {self.task.site_source} has "
                f"features 0 to {self.dictionary.width - 1}."
            )
        return feature

    def _codes(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        for block in slices(len(rows)):
            yield encode_rows(self.dictionary, self.read(rows[block]))

    def _strength(self, rows: np.ndarray, feature: int) -> np.ndarray:
        return strengths(self.dictionary, self.read(rows), np.array([feature]))[:, 0]

    def _described(self, feature: int, candidates: list[dict]) -> Feature:
        strength = self._strength(self.train, feature)
        where = f"feature {feature} of {self.task.source} at {self.task.site_source}"
        if not strength.any():
            raise UserError(
                f"steer.feature={feature}: {where} is dead, it fires at none of the "
                f"{len(strength)} training places read; choose another, or find one by "
                "steer.search."
            )
        direction = feature_directions(self.dictionary, np.array([feature]))[0]
        change, median = self._measured(feature, direction, where)
        promoted = most_promoted(change, self.words.has_text, count=self.config.steer.promoted)
        mapped: dict[int, float] = {}
        for token, by in promoted.items():
            found = self.words.to_b(token)
            if found is not None:
                mapped[found] = mapped.get(found, 0.0) + by
        top = [row for row in np.argsort(-strength, kind="stable")[:SHOWN] if strength[row] > 0]
        return Feature(
            id=feature,
            strength=strength,
            direction=direction,
            median_norm=median,
            promoted=promoted,
            mapped=mapped,
            contexts=[
                self._contexts.snippet(self.train[row]) | {"activation": float(strength[row])}
                for row in top
            ],
            candidates=candidates,
        )

    def _measured(
        self, feature: int, direction: np.ndarray, where: str
    ) -> tuple[np.ndarray, float]:
        """(mean change of log p of every token [vocabulary], median norm of the activations) in A.

        The feature is added, at the middle dose, where it fires in held-out text.
        """
        settings, strength = self.config.intervention, self._strength(self.test, feature)
        if not strength.any():
            raise UserError(
                f"steer.feature={feature}: {where} fires at none of the {len(self.test)} held-out "
                "places read, so nobody can say what it promotes; choose another."
            )
        generator = np.random.Generator(np.random.Philox(key=[self.config.seed, feature]))
        documents = self.store.rows.document[self.test]
        rows = choose_contexts(strength, documents, settings.contexts, generator)
        injector = self._reader(self.test[rows])
        median = injector.median_norm
        own, _ = dose_norms(
            self.config.steer.norm,
            (median, median),
            strength=float(strength[rows].mean()),
            direction=direction,
            mapped=direction,
        )
        ready = injector.ready(size=settings.contexts, span=1)
        dose = own * _middle(self.config.steer.alphas) * normalised(direction)
        return mean_change(injector, ready, dose), median

    def _reader(self, rows: np.ndarray) -> Injector:
        """The model on the windows of some rows of the store, ascending, and where these are."""
        passages = passages_of(self.store, self.task.source, rows)
        return Injector(
            models.load(self._path),
            self.task.site_source,
            passages.tokens,
            positions_of(self.store, self.task.source, passages),
            batch_size=self.config.intervention.batch_size,
            dtype=self.config.extract.matmul_dtype,
        )


def _middle(alphas: Sequence[float]) -> float:
    return sorted(map(abs, alphas))[len(alphas) // 2]
