"""Text that a language model writes while a vector is added to its activations at a site."""

from __future__ import annotations

import numpy as np

from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.models.run import Runner, Starts

BATCH_SIZE = 64  # texts at once


class Writer:
    """A language model that continues texts."""

    def __init__(
        self,
        lm: LanguageModel,
        site: Site,
        *,
        batch_size: int = BATCH_SIZE,
        dtype: str = "float32",
    ):
        self._runner, self._site = Runner(lm, batch_size=batch_size, dtype=dtype), site

    def write(self, starts: Starts, **settings) -> np.ndarray:
        """See ``Runner.generate``."""
        return self._runner.generate(starts, self._site, **settings)

    def surprise(self, tokens: np.ndarray) -> np.ndarray:
        """See ``Runner.token_losses``."""
        return self._runner.token_losses(tokens)
