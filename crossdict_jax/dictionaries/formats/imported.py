"""What all formats of other tools share: reading their files, and what ours cannot express."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax.dictionaries.base import Dictionary
from crossdict_jax.errors import UserError
from crossdict_jax.ops.selection import kth_largest

LAYER_NORM_EPSILON = 1e-5
NORMS = ("constant_norm_rescale", "layer_norm")


class AbsTopK(Dictionary):
    """f = the k of z that are largest in magnitude, with their signs."""

    def activate(self, z: jax.Array) -> jax.Array:
        size = jnp.abs(z)
        return jnp.where(size >= kth_largest(size, self.k)[:, None], z, 0.0)


class Wrapped(Dictionary):
    """A dictionary that does something of its own around another, whose weights it shows."""

    def __init__(self, inner: Dictionary):
        self.inner = inner
        self.d_model, self.width, self.k = inner.d_model, inner.width, inner.k
        self.d_out, self.transcodes = inner.d_out, inner.transcodes

    W_enc = property(lambda self: self.inner.W_enc)
    b_enc = property(lambda self: self.inner.b_enc)
    W_dec = property(lambda self: self.inner.W_dec)
    b_dec = property(lambda self: self.inner.b_dec)

    def encode(self, x: jax.Array) -> jax.Array:
        return self.inner.encode(x)

    def decode(self, f: jax.Array) -> jax.Array:
        return self.inner.decode(f)


class Skip(Wrapped):
    """A transcoder with y_hat = decode(f) + x W_skip'; only ``d(x)`` knows x and adds its part.

    Attributes:
      W_skip: [d_out, d_model].
    """

    def __init__(self, inner: Dictionary, W_skip: jax.Array):
        super().__init__(inner)
        self.W_skip = nnx.Param(jnp.asarray(W_skip, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) + jnp.asarray(x, jnp.float32) @ self.W_skip[...].T


class Normed(Wrapped):
    """A dictionary of rows that are normalised one by one; only ``d(x)`` can undo that.

    constant_norm_rescale: u = x sqrt(d_model) / ||x||. layer_norm: u = (x - mean) / (std + 1e-5)
    with the unbiased std, undone as u std + mean. ``encode`` takes raw rows; ``decode`` gives
    normalised ones, because features do not say what the norm of their row was.

    Attributes:
      inner: the dictionary of normalised rows.
      norm: one of ``NORMS``.
    """

    def __init__(self, inner: Dictionary, *, norm: str):
        super().__init__(inner)
        self.norm = norm

    def encode(self, x: jax.Array) -> jax.Array:
        mean, inwards, _ = self._row_norm(x)
        return self.inner.encode((x - mean) * inwards)

    def decode(self, f: jax.Array) -> jax.Array:
        """Returns normalised rows [batch, d_model] of features [batch, width]."""
        return self.inner.decode(f)

    def __call__(self, x: jax.Array) -> jax.Array:
        mean, _, outwards = self._row_norm(x)
        return self.decode(self.encode(x)) * outwards + mean

    def _row_norm(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns per row [batch, 1] what is subtracted, then multiplied, and multiplied back."""
        x = jnp.asarray(x, jnp.float32)
        if self.norm == "layer_norm":
            std = jnp.std(x, axis=1, keepdims=True, ddof=1)
            return jnp.mean(x, axis=1, keepdims=True), 1 / (std + LAYER_NORM_EPSILON), std
        norm = jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-30)
        root = jnp.sqrt(jnp.float32(self.d_model))
        return jnp.zeros_like(norm), root / norm, norm / root


def read_config(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a folder's cfg.json."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} lacks {file.name}; copy the whole folder.") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); copy it again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no JSON object; copy it again.")
    return config


def require(config: dict[str, Any], key: str, file: Path) -> Any:
    """Returns a value that a config must have."""
    if config.get(key) is None:
        raise UserError(f"{file} lacks the required key {key!r}; add it as it was in training.")
    return config[key]


def require_count(config: dict[str, Any], key: str, file: Path, *, most: int = 2**31) -> int:
    """Returns a whole number from 1 to ``most`` that a config must have."""
    value = require(config, key, file)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or value != int(value) or not 1 <= value <= most:
        limit = "or more" if most == 2**31 else f"to {most}"
        raise UserError(f"{file}: {key}={value!r} must be a whole number, 1 {limit}.")
    return int(value)


def read_safetensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file as float32, which must be exactly ``shapes``."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"{file.parent} lacks {file.name}; copy the whole folder.")
    try:
        with safe_open(file, framework="numpy") as tensors:
            names = list(tensors.keys())
            found = {name: tensors.get_tensor(name) for name in names}
    except (SafetensorError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); copy it again.") from error
    return check_arrays(found, shapes, file)


def check_arrays(
    found: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], file: Path
) -> dict[str, np.ndarray]:
    """Returns arrays as float32; UserError for one too many or few, a wrong shape, or a NaN."""
    if found.keys() != shapes.keys():
        missing, unknown = (
            sorted(shapes.keys() - found.keys()),
            sorted(found.keys() - shapes.keys()),
        )
        wrong = [f"lacks {', '.join(missing)}"] * bool(missing)
        wrong += [f"holds {', '.join(unknown)}, which it should not"] * bool(unknown)
        raise UserError(f"{file} {' and '.join(wrong)}; its weights must be {', '.join(shapes)}.")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise UserError(
                f"{file}: {name} has shape {found[name].shape}, where {shape} is expected; "
                "cfg.json or the weights are of another dictionary."
            )
        if not np.isfinite(found[name].astype(np.float32)).all():
            raise UserError(f"{file}: {name} holds NaN or infinity; copy it again.")
    return {name: np.asarray(found[name], np.float32) for name in shapes}
