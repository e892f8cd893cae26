"""The network of the trained rungs, and what is measured, not trained, beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.config import MapConfig
from crossdict_jax.maps import heads
from crossdict_jax.maps.base import Map, Problem
from crossdict_jax.ops import matmul

RARE = 0.01  # of the mean variance, added to each: keeps a rare input from drowning its row
TRAINED = ("network", "head")  # parameters of a map that are trained; the others are measured


class Network(nnx.Module):
    """What is trained: ``h -> LN -> ReLU -> dropout``, twice, then a linear layer."""

    def __init__(self, *, width_a: int, hidden: int, width_b: int, dropout: float, rngs: nnx.Rngs):
        xavier = nnx.initializers.xavier_uniform()
        self.first = nnx.Linear(width_a, hidden, kernel_init=xavier, rngs=rngs)
        self.norm_1 = nnx.LayerNorm(hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, kernel_init=xavier, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(hidden, rngs=rngs)
        # Zeros, so that the map starts at its baseline and every live output has a gradient.
        zeros = nnx.initializers.zeros_init()
        self.last = nnx.Linear(hidden, width_b, kernel_init=zeros, rngs=rngs)
        self.dropout = dropout

    def __call__(self, h: jax.Array, key: jax.Array | None) -> jax.Array:
        keys = (None, None) if key is None else jax.random.split(key)
        h = _dropped(jax.nn.relu(self.norm_1(_linear(self.first, h))), self.dropout, keys[0])
        h = _dropped(jax.nn.relu(self.norm_2(_linear(self.second, h))), self.dropout, keys[1])
        return _linear(self.last, h)


def _linear(layer: nnx.Linear, h: jax.Array) -> jax.Array:
    return matmul(h, layer.kernel[...]) + layer.bias[...][None, :]


def _dropped(h: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share of h and scales the rest up; without a key (evaluation) nothing is dropped."""
    if key is None or rate == 0:
        return h
    return jnp.where(jax.random.bernoulli(key, 1 - rate, h.shape), h / (1 - rate), 0.0)


class NetworkMap(Map):
    """``f_B = head(base_b + scale_b * network((f_A - base_a) / scale_a))``.

    The network sees and gives standard units. Baselines and scales are measured on the training
    rows, not trained; what the baselines are is what a subclass says. It starts at base_b.
    """

    reads = "features"
    fits_together = True

    def __init__(
        self,
        dictionary,
        *,
        width_a: int,
        hidden: int,
        dropout: float,
        head: str = "relu",
        key: jax.Array | int = 0,
    ):
        super().__init__(dictionary)
        shape = {"width_a": width_a, "hidden": hidden, "width_b": dictionary.width}
        self.network = Network(**shape, dropout=dropout, rngs=nnx.Rngs(params=key))
        self.head = heads.build(head, dictionary)
        self.scale_a = nnx.Variable(jnp.ones(width_a))
        self.scale_b = nnx.Variable(jnp.ones(dictionary.width))

    @property
    def arguments(self) -> dict:
        width_a, hidden = self.network.first.kernel.shape
        shape = {"width_a": width_a, "hidden": hidden, "dropout": self.network.dropout}
        return shape | {"head": self.head.name}

    def baselines(self, tokens: jax.Array | None, batch: int) -> tuple[jax.Array, jax.Array]:
        """Returns what f_A and f_B are taken to differ from, [batch or 1, width] each."""
        raise NotImplementedError

    @classmethod
    def standards(cls, problem: Problem, config: MapConfig) -> Standards:
        """Returns what a problem's training rows fix: baselines, scales and their shapes."""
        raise NotImplementedError

    @classmethod
    def alike(cls, standards: list[Standards]) -> list[Standards]:
        """Returns the same baselines in arrays of equal shapes, for one compiled step."""
        return standards

    def estimate(
        self, f: jax.Array, *, tokens: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        """Returns what the head selects from [batch, width_b]; with a key, units are dropped."""
        base_a, base_b = self.baselines(tokens, len(f))
        out = self.network((f - base_a) / self.scale_a[...][None, :], key)
        return base_b + self.scale_b[...][None, :] * out

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        return self.head(self.estimate(inputs, tokens=tokens, key=None), self.scale_b[...])


@dataclasses.dataclass(frozen=True)
class Standards:
    """The measured parameters of a map, the constructor's arguments that they need, a record."""

    values: modules.Params
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


def damped_scale(variance: np.ndarray) -> np.ndarray:
    """Returns the standard units [width] of features with these variances; 1 if none varies."""
    damped = np.sqrt(variance + RARE * variance.mean())
    return np.where(damped > 0, damped, 1.0).astype(np.float32)
