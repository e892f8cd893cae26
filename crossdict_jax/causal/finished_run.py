"""What questions to a finished run share: its models, tokenizers, dictionaries, training rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from crossdict_jax import dictionaries, models
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config, identity
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.maps import Side, Task
from crossdict_jax.maps.base import encode_rows, slices
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.training.stage import input_digests
from crossdict_jax.workdir import Workdir

TRAIN_ROWS = 20_000  # at most, for mapped directions and matches


class FinishedRun:
    """Language models, tokenizers, dictionaries and training rows of a run, each read once."""

    def __init__(self, config: Config, work: Workdir, store: Store):
        self.config, self.work, self.store = config, work, store
        self._lms: dict[str, LanguageModel] = {}
        self._dictionaries: dict[tuple, Dictionary] = {}
        self._live: dict[tuple, np.ndarray] = {}
        train = store.select("train")
        generator = np.random.Generator(np.random.Philox(key=config.seed))
        self.train = np.sort(generator.permutation(train)[:TRAIN_ROWS])

    def path(self, model: str) -> str:
        return self.store.paths[self.store.models.index(model)]

    def lm(self, model: str) -> LanguageModel:
        if model not in self._lms:
            self._lms[model] = models.load(self.path(model))
        return self._lms[model]

    @cached_property
    def tokenizers(self) -> dict[str, object]:
        return {model: models.load_tokenizer(self.path(model)) for model in self.store.models}

    @cached_property
    def token_counts(self) -> dict[str, np.ndarray]:
        """How often each model reads each token in the run's training text."""
        counts = {}
        for model in self.store.models:
            windows = np.unique(self.store.rows.window[self.store.select("train")])
            tokens = np.concatenate([self.store.window_tokens(model, w) for w in windows])
            counts[model] = np.bincount(tokens, minlength=self.lm(model).config.vocab_size)
        return counts

    def dictionary(self, model: str, site: Site) -> Dictionary:
        if (model, site) not in self._dictionaries:
            self._dictionaries[model, site] = dictionaries.load(self.work.dictionary(model, site))
        return self._dictionaries[model, site]

    def side(self, model: str, site: Site) -> Side:
        """A model's side of the training rows."""
        x = self.store.read(model, site, self.train)
        return Side(x, self.store.tokens(model, self.train), self.dictionary(model, site))

    def codes(self, model: str, site: Site) -> Iterator[np.ndarray]:
        """A model's features on the training rows, in blocks."""
        side = self.side(model, site)
        for block in slices(len(side.x)):
            yield encode_rows(side.dictionary, side.x[block])

    def live(self, model: str, site: Site) -> np.ndarray:
        """The features that fire on training rows, int [m]."""
        if (model, site) not in self._live:
            fires = sum((f > 0).any(0) for f in self.codes(model, site))
            self._live[model, site] = np.flatnonzero(fires)
        return self._live[model, site]

    def inputs(self, groups: list[list[Task]], question: Any) -> dict[str, str]:
        """Returns {input: digest} of a stage that asks these maps a question (a JSON value).

        Args:
          groups: of ``map_groups``.

        Raises:
          UserError: a checkpoint is missing or altered.
        """
        return input_digests(
            self.work,
            settings=[identity(self.config), question],
            store_meta=self.store.meta,
            folders=[f for _, *tasks in groups for task in tasks for f in task.folders(self.work)],
        )
