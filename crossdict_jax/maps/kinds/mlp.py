"""The trained rung, called hypernetwork by its users: a three-layer MLP on features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import Fitted, Problem
from crossdict_jax.maps.ensemble import fit_together
from crossdict_jax.maps.network import NetworkMap, Standards, damped_scale


class MLP(NetworkMap):
    """``f_B = head(mean_b + scale_b * network((f_A - mean_a) / scale_a))``.

    Means and scales are those of the training rows. It starts as the mean predictor, and can never
    give a negative feature.
    """

    kind = "mlp"

    def __init__(self, dictionary, *, width_a: int, **how):
        super().__init__(dictionary, width_a=width_a, **how)
        self.mean_a = nnx.Variable(jnp.zeros(width_a))
        self.mean_b = nnx.Variable(jnp.zeros(dictionary.width))

    def baselines(self, tokens: jax.Array | None, batch: int) -> tuple[jax.Array, jax.Array]:
        return self.mean_a[...][None, :], self.mean_b[...][None, :]

    @classmethod
    def standards(cls, problem: Problem, config: MapConfig) -> Standards:
        values = {}
        for name, side in (("a", problem.train.source), ("b", problem.train.target)):
            mean, variance = side.feature_moments
            values[f"mean_{name}"] = mean.astype(np.float32)
            values[f"scale_{name}"] = damped_scale(variance)
        return Standards(values)


def fit(
    problems: Sequence[Problem], config: MapConfig, *, seed: int, directory: Path
) -> list[Fitted]:
    """Trains the maps of all problems as ensembles; see ``fit_together``."""
    return fit_together(MLP, problems, config, seed=seed, directory=directory)
