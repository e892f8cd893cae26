"""A language model on texts of interest, into which vectors are added at positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import jax
import numpy as np

from crossdict_jax import modules
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.models.base import captured
from crossdict_jax.models.run import Held, Passages, Runner, pad


class Positions(NamedTuple):
    """Where texts are edited; all int [n].

    Attributes:
      text: index into the texts.
      first: the first token that is edited.
      last: the last one; the prediction after it is read.
      end: the last token of the continuation, ``last`` where there is none.
    """

    text: np.ndarray
    first: np.ndarray
    last: np.ndarray
    end: np.ndarray

    def take(self, rows: np.ndarray) -> Positions:
        return Positions(*(column[rows] for column in self))


class Injector:
    """A language model, a site, texts, the site's activations in them, and positions of interest.

    Attributes:
      tokens: int32 [texts, seq].
      x: [texts, seq, d_model], the activations at the site.
      clean: float32 [n, d_model], those at the last edited token of each position.
    """

    def __init__(
        self,
        lm: LanguageModel,
        site: Site,
        texts: Sequence[np.ndarray],
        positions: Positions,
        *,
        batch_size: int,
        dtype: str = "float32",
    ):
        self.positions, self.vocab_size, self.site = positions, lm.config.vocab_size, site
        self.runner = Runner(lm, batch_size=batch_size, dtype=dtype)
        text, first, last, end = positions
        self.passages = Passages(texts, text, last, first=first, end=end)
        self.tokens, self.x = pad(texts), self.runner.read(texts, [site])[site]
        self.clean = self.x[text, last]

    @cached_property
    def median_norm(self) -> float:
        """The median norm of the activations at the positions."""
        return float(np.median(np.linalg.norm(self.clean, axis=1)))

    def ready(self, rows: np.ndarray | slice = slice(None), **settings) -> Held:
        """See ``Runner.hold``."""
        return self.runner.hold(self.site, self.passages.take(rows), self.x, **settings)

    def log_probs(self, ready: Held, vectors: np.ndarray) -> np.ndarray:
        """See ``Runner.log_probs``."""
        return self.runner.log_probs(ready, vectors)

    def changes(
        self, ready: Held, vectors: np.ndarray, watched: Mapping[int, float], *, limit: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """See ``Runner.changes``."""
        return self.runner.changes(ready, vectors, watched, limit=limit)

    def continuations(self, ready: Held, vectors: np.ndarray, strength: np.ndarray) -> np.ndarray:
        """See ``Runner.continuations``."""
        return self.runner.continuations(ready, vectors, strength)


@partial(jax.jit, static_argnums=(0, 1, 2))
def read_site(graphdef, site, dtype, params, tokens) -> jax.Array:
    """Returns the activations [batch, seq, d_model] at a site."""
    return captured(modules.merge(graphdef, params), (site,), tokens, dtype)[0]
