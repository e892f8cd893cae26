"""A dictionary of B made from A's and two affine maps, in closed form."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import modules
from crossdict_jax.config.settings import architectures
from crossdict_jax.dictionaries import base
from crossdict_jax.dictionaries.base import Dictionary
from crossdict_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Affine:
    """x W + b, from raw activations [batch, d_in] to raw activations [batch, d_out].

    Attributes:
      W: [d_in, d_out].
      b: [d_out].
    """

    W: np.ndarray
    b: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x @ self.W + self.b[None, :]


def is_ours(dictionary: Dictionary) -> bool:
    """Whether a dictionary is of an architecture of this project, and can be transferred."""
    return (
        not dictionary.transcodes
        and type(dictionary).__module__.rsplit(".", 1)[-1] in architectures()
    )


def transferred(
    dictionary: Dictionary, *, to_source: Affine, to_target: Affine, scale: float | None = None
) -> Dictionary:
    """Returns the dictionary of B with ``encode(x_B) = dictionary.encode(to_source(x_B))`` and
    ``decode(f) = to_target(dictionary.decode(f))``, of the same architecture (Chen et al. 2025,
    arXiv 2506.06609).

    W_enc' = W_ba W_enc and W_dec' = W_dec W_ab, in scaled units; biases take up the constants, and
    pre-activations, thresholds and features are those of A's dictionary. Its decoder rows need
    not have length 1 (see ``with_unit_rows``).

    Args:
      dictionary: of A.
      to_source: from B to A.
      to_target: from A to B.
      scale: of B's activations inside the new dictionary; None: as in A's. No number that callers
        see depends on it; training does.

    Raises:
      UserError: the dictionary is none of ours, or a transcoder.
    """
    architecture = base.architecture_of(dictionary)
    if dictionary.transcodes:
        raise UserError("A transcoder reads one site and writes another: it cannot be transferred.")
    graphdef, params = modules.split(dictionary)
    old = {name: np.asarray(params[name], np.float64) for name in ("W_enc", "W_dec", "b_enc")}
    s, b_dec = float(params["scale"]), np.asarray(params["b_dec"], np.float64)
    new_s = s if scale is None else float(scale)
    W_ba, W_ab = to_source.W.astype(np.float64), to_target.W.astype(np.float64)
    W_enc = s / new_s * W_ba @ old["W_enc"]
    W_dec = new_s / s * old["W_dec"] @ W_ab
    new_b_dec = new_s * (b_dec / s @ W_ab + to_target.b)
    # z = u W_enc + (b_enc - b_dec W_enc): the constant of to_source, and the old bias, are added.
    constant = s * to_source.b.astype(np.float64) - b_dec
    b_enc = old["b_enc"] + constant @ old["W_enc"] + new_b_dec @ W_enc
    changed = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": new_b_dec, "scale": new_s}
    if "b_mag" in params:  # magnitudes of gated ones start from z - b_enc
        moved = (b_enc - old["b_enc"]) * np.exp(np.asarray(params["r_mag"], np.float64))
        changed["b_mag"] = np.asarray(params["b_mag"], np.float64) + moved
    shape = {"d_model": W_ba.shape[0], "width": dictionary.width, "k": dictionary.k}
    graphdef, _ = modules.abstract(lambda: base.build(architecture, **shape, key=jax.random.key(0)))
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in changed.items()}
    return modules.merge(graphdef, params | arrays)


def with_unit_rows(dictionary: Dictionary) -> Dictionary:
    """Returns the dictionary with decoder rows of length 1 and features as much larger.

    What reaches the reconstruction stays, except where features compete (k largest) or share one
    threshold: those are then compared by how much they reconstruct.
    """
    graphdef, params = modules.split(dictionary)
    length = jnp.linalg.norm(params["W_dec"], axis=1)
    length = jnp.where(length > 0, length, 1.0)
    scaled = {"W_dec": params["W_dec"] / length[:, None]}
    scaled["W_enc"] = params["W_enc"] * length[None, :]
    for name in ("b_enc", "b_mag", "threshold"):
        if name in params and params[name].shape == length.shape:
            scaled[name] = params[name] * length
    return modules.merge(graphdef, params | scaled)
