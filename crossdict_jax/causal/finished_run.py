"""A finished run's models, tokenizers, dictionaries, rows and texts."""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np

from crossdict_jax import dictionaries, maps, models, stats
from crossdict_jax.activations.passages import passages_of, select_passages, with_continuations
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.causal.directions import MapGroup, best_matches, mapped_directions, strengths
from crossdict_jax.causal.effects import ModelAtSite
from crossdict_jax.config import Config, identity
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.maps import Side, Task
from crossdict_jax.maps.base import encode_rows, slices
from crossdict_jax.models import Site
from crossdict_jax.models.run import Passages, Runner
from crossdict_jax.training.stage import input_digests
from crossdict_jax.workdir import Workdir

SOME_ROWS = 20_000  # for mapped directions and matches


class FinishedRun:
    """Language models, tokenizers, dictionaries and training rows of a run, each read once."""

    def __init__(self, config: Config, work: Workdir, store: Store | None = None):
        self.config, self.work, self.store = config, work, store or open_store(work.activations)
        self._read: dict[tuple, Any] = {}

    def _once(self, *key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._read:
            self._read[key] = make()
        return self._read[key]

    def runner(self, model: str) -> Runner:
        config, load = self.config, self.store.load_model
        asked = {"batch_size": config.intervention.batch_size, "dtype": config.extract.matmul_dtype}
        return self._once("runner", model, make=lambda: Runner(load(model), **asked))

    def dictionary(self, model: str, site: Site) -> Dictionary:
        path = self.work.dictionary(model, site)
        return self._once("dictionary", model, site, make=lambda: dictionaries.load(path))

    def live(self, model: str, site: Site) -> np.ndarray:
        """The features that fire on training rows, int [m]."""
        fires = ((f > 0).any(0) for f in self.codes(model, site))
        return self._once("live", model, site, make=lambda: np.flatnonzero(sum(fires)))

    @cached_property
    def tokenizers(self) -> dict[str, object]:
        return dict(zip(self.store.models, map(models.load_tokenizer, self.store.paths)))

    def rows(self, split: str) -> np.ndarray:
        """Returns at most SOME_ROWS row numbers of a split, ascending."""
        drawn = stats.generator(self.config.seed).permutation(self.store.select(split))
        return np.sort(drawn[:SOME_ROWS])

    def passages(self, model: str) -> Passages:
        """Returns the test text of ``intervention.documents`` documents, as a model reads it."""
        asked = {"documents": self.config.intervention.documents, "seed": self.config.seed}
        make = partial(select_passages, self.store, model, **asked)
        return self._once("passages", model, make=make)

    def at_site(self, model: str, site: Site, rows: np.ndarray | None = None) -> ModelAtSite:
        """Returns a model at a site, on the windows of store rows (default: on the test text)."""
        if rows is not None:
            passages = passages_of(self.store, model, rows)
            passages = with_continuations(self.store, model, passages)
            return ModelAtSite(self.runner(model), site, passages)
        rows = self.passages(model).rows
        return self._once("at", model, site, make=lambda: self.at_site(model, site, rows))

    def side(self, model: str, site: Site, rows: np.ndarray | None = None) -> Side:
        """Returns a model's side of store rows (default: training rows)."""
        rows = self.rows("train") if rows is None else rows
        x, tokens = self.store.read(model, site, rows), self.store.tokens(model, rows)
        return Side(x, tokens, self.dictionary(model, site))

    def codes(self, model: str, site: Site, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Yields a model's features on store rows (default: training rows), in blocks."""
        rows = self.rows("train") if rows is None else rows
        for block in slices(len(rows)):
            x = self.store.read(model, site, rows[block])
            yield encode_rows(self.dictionary(model, site), x)

    def map_features(
        self, group: MapGroup, features: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Returns ({map kind: A's features in B, float32 [features, d_b]}, matches, their r).

        See ``mapped_directions`` and ``best_matches``.
        """
        side, seed = self.side(*group.ends[0]), self.config.seed
        strength = strengths(side.dictionary, side.x, features)
        mapped = {}
        for task in group.tasks:
            m = maps.load(task.path(self.work), self.dictionary(*group.ends[1]), side.dictionary)
            mapped[task.kind] = mapped_directions(m, side, features, strength, seed=seed)
        return mapped, *best_matches(self.codes(*group.ends[1]), strength)

    def inputs(
        self, tasks: Iterable[Task], question: Any = None, *, features: bool = True
    ) -> dict[str, str]:
        """Returns {input: digest} of a stage that asks these maps a question (a JSON value).

        ``features``: whether it tests single ones, see ``identity``.
        """
        return input_digests(
            self.work,
            settings=[identity(self.config, features=features), question],
            store_meta=self.store.meta,
            folders=[folder for task in tasks for folder in task.folders(self.work)],
        )
