"""The network of the trained maps, and what is measured, not trained, beside it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.maps import heads
from crossdict_jax.maps.base import Map, Problem
from crossdict_jax.ops import matmul

RARE = 0.01  # of the mean variance, added to each: keeps a rare input from drowning its row


class NetworkMap(Map):
    """``f_B = head(base_b + scale_b * network((f_A - base_a) / scale_a))``.

    The network is ``h -> linear -> LN -> ReLU -> dropout``, twice, then linear. It sees and gives
    standard units. Baselines and scales are measured on the training rows, not trained; what the
    baselines are is what a subclass says. It starts at base_b.

    Trained are ``network`` and, of a jumprelu head, ``threshold`` [width], in standard units, so
    that one rate of learning suits all features: the loss of firing rates alone trains it, because
    squared error would have it at 0, where the estimates of the whole target are kept.
    """

    reads = "features"
    fits_together = True
    settings = ("head",)

    @classmethod
    def measure(cls, problem: Problem) -> tuple[modules.Params, dict]:
        """Returns what a problem's training rows fix, baselines and scales, and a record of it."""
        raise NotImplementedError

    @classmethod
    def alike(cls, measured: list[modules.Params]) -> list[modules.Params]:
        """Returns the same baselines in arrays of equal shapes, for one compiled step."""
        return measured

    def baselines(self, tokens: jax.Array | None, batch: int) -> tuple[jax.Array, jax.Array]:
        """Returns what f_A and f_B are taken to differ from, [batch or 1, width] each."""
        raise NotImplementedError

    def estimate(
        self,
        f: jax.Array,
        *,
        tokens: jax.Array | None = None,
        key: jax.Array | None = None,
        dropout: float = 0.0,
    ) -> jax.Array:
        """Returns what the head selects from [batch, width_b]; with a key, units are dropped."""
        base_a, base_b = self.baselines(tokens, len(f))
        h = (f - base_a) / self.scale_a[...][None, :]
        keys = (None, None) if key is None else jax.random.split(key)
        for linear, norm, own_key in zip(("first", "second"), ("norm_1", "norm_2"), keys):
            h, norm = _linear(self.network[linear], h), self.network[norm]
            variance = jnp.var(h, axis=-1, keepdims=True)
            h = jax.nn.standardize(h, variance=variance, epsilon=1e-6)
            h = jax.nn.relu(h * norm.scale[...][None, :] + norm.bias[...][None, :])
            h = dropped(h, dropout, own_key)
        return base_b + self.scale_b[...][None, :] * _linear(self.network.last, h)

    def fires(self, z: jax.Array) -> jax.Array | None:
        """Returns 1 where a feature fires and 0 elsewhere, with a gradient; None: by its value."""
        if self.head != "jumprelu":
            return None
        z_standard = z / self.scale_b[...][None, :]
        return heads.gate(z_standard, self.threshold[...][None, :]) * (z > 0)

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        raw = self.threshold[...] * self.scale_b[...] if self.head == "jumprelu" else None
        z = self.estimate(inputs, tokens=tokens)
        return heads.select(self.head, z, k=self.dictionary.k, threshold=raw)


def initial(
    key: jax.Array | int, *, width_a: int, hidden: int, width_b: int, head: str
) -> modules.Params:
    """Returns the trained parameters of a network map before the first step."""
    xavier, rngs = nnx.initializers.xavier_uniform(), nnx.Rngs(params=key)
    # Zeros, so that the map starts at its baseline and every live output has a gradient.
    zeros = nnx.initializers.zeros_init()
    network = {
        "first": nnx.Linear(width_a, hidden, kernel_init=xavier, rngs=rngs),
        "norm_1": nnx.LayerNorm(hidden, rngs=rngs),
        "second": nnx.Linear(hidden, hidden, kernel_init=xavier, rngs=rngs),
        "norm_2": nnx.LayerNorm(hidden, rngs=rngs),
        "last": nnx.Linear(hidden, width_b, kernel_init=zeros, rngs=rngs),
    }
    trained = {"network": {name: modules.split(layer)[1] for name, layer in network.items()}}
    if head == "jumprelu":
        trained["threshold"] = jnp.full(width_b, heads.INITIAL_THRESHOLD, jnp.float32)
    return trained


def _linear(layer: nnx.Dict, h: jax.Array) -> jax.Array:
    return matmul(h, layer.kernel[...]) + layer.bias[...][None, :]


def dropped(h: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share of h and scales the rest up; without a key (evaluation) nothing is dropped."""
    if key is None or rate == 0:
        return h
    return jnp.where(jax.random.bernoulli(key, 1 - rate, h.shape), h / (1 - rate), 0.0)


def damped_scale(variance: np.ndarray) -> np.ndarray:
    """Returns the standard units [width] of features with these variances; 1 if none varies."""
    damped = np.sqrt(variance + RARE * variance.mean())
    return np.where(damped > 0, damped, 1.0).astype(np.float32)
