"""Dictionaries of other tools that fit no architecture of ours."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.dictionaries.base import Dictionary
from crossdict_jax.ops import exact, kth_largest

LAYER_NORM_EPSILON = 1e-5


class AbsTopK(Dictionary):
    """f = the k of z that are largest in magnitude, with their signs."""

    reads = ("k",)

    def activate(self, z: jax.Array) -> jax.Array:
        size = jnp.abs(z)
        return jnp.where(size < kth_largest(size, self.k)[:, None], 0.0, z)


class Skip(Dictionary):
    """A transcoder with y_hat = decode(f) + x W_skip'; only ``d(x)`` knows x and adds its part.

    Attributes:
      W_skip: [d_out, d_model].
    """

    def __init__(self, **shape):
        super().__init__(**shape)
        self.W_skip = nnx.Param(jnp.zeros((self.d_out, self.d_model)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) + exact(jnp.asarray(x, jnp.float32), self.W_skip[...].T)


class Normed(Dictionary):
    """A dictionary of rows that are normalised one by one; only ``d(x)`` can undo that.

    ``encode`` takes raw rows; ``decode`` returns normalised ones. Subclasses define ``row_norm(x)``
    -> per row [batch, 1] what is subtracted, then multiplied, and what undoes that.
    """

    def encode(self, x: jax.Array) -> jax.Array:
        mean, factor, _ = self.row_norm(x := modules.rows(x, self.d_model))
        return super().encode((x - mean) * factor)

    def __call__(self, x: jax.Array) -> jax.Array:
        mean, _, undo = self.row_norm(modules.rows(x, self.d_model))
        return self.decode(self.encode(x)) * undo + mean


class LayerNormed(Normed):
    """u = (x - mean) / (std + 1e-5) with the unbiased std, undone as u std + mean."""

    def row_norm(self, x):
        std = jnp.std(x, axis=1, keepdims=True, ddof=1)
        return jnp.mean(x, axis=1, keepdims=True), 1 / (std + LAYER_NORM_EPSILON), std


class ConstantNormed(Normed):
    """u = x sqrt(d_model) / ||x||."""

    def row_norm(self, x):
        norm = jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-30)
        root = jnp.sqrt(jnp.float32(self.d_model))
        return jnp.zeros_like(norm), root / norm, norm / root


@functools.cache  # a class of its own for every call would be compiled again and again
def around(wrapper: type[Dictionary], architecture: type[Dictionary]) -> type[Dictionary]:
    """Returns the class of ``wrapper`` around an architecture."""
    return type(wrapper.__name__, (wrapper, architecture), {"__module__": __name__})
