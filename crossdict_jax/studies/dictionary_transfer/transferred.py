"""A dictionary of B made from A's and a stitch, two affine maps, in closed form."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from crossdict_jax import modules
from crossdict_jax.config import MapConfig, architectures
from crossdict_jax.dictionaries import base
from crossdict_jax.dictionaries.base import Dictionary
from crossdict_jax.dictionaries.crosscoder_training import moments, rotation
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Pairs, Problem
from crossdict_jax.maps.base import map_class


class Affine(NamedTuple):
    """x W + b, from raw activations [batch, d_in] to raw activations [batch, d_out]."""

    W: np.ndarray
    b: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x @ self.W + self.b[None, :]


class Stitch(NamedTuple):
    """The affine maps from A to B and from B to A."""

    forth: Affine
    back: Affine


def fit_stitch(problem: Problem, settings: MapConfig, kind: str = "ridge") -> Stitch:
    """Returns the affine maps of a kind (ridge or procrustes)."""
    train, validation = (
        dataclasses.replace(pairs, source=pairs.target, target=pairs.source)
        for pairs in (problem.train, problem.validation)
    )
    both = [problem, Problem(problem.label, train, validation)]
    closed_forms = map_class(kind).fit(both, settings, seed=0, directory=Path())
    affine = []
    for m in (fitted.map for fitted in closed_forms):
        W, mean_a, mean_b = (np.asarray(p[...], np.float64) for p in (m.W, m.mean_a, m.mean_b))
        affine.append(Affine(W, mean_b - mean_a @ W))
    return Stitch(*affine)


def random_stitch(train: Pairs, seed: int) -> Stitch:
    """Returns a random rotation and its inverse that keep means and mean power."""
    (mean_a, power_a), (mean_b, power_b) = (moments(s.x) for s in (train.source, train.target))
    d_a, d_b = len(mean_a), len(mean_b)
    Q = rotation(max(d_a, d_b), seed).astype(np.float64)[:d_a, :d_b]
    stretch = np.sqrt(max(power_b, 1e-12) / max(power_a, 1e-12))
    forth, back = stretch * Q, Q.T / stretch
    return Stitch(Affine(forth, mean_b - mean_a @ forth), Affine(back, mean_a - mean_b @ back))


def is_ours(dictionary: Dictionary) -> bool:
    """Whether a dictionary is of an architecture of this project, and can be transferred."""
    return type(dictionary).__module__.rsplit(".", 1)[-1] in architectures()


def transferred(dictionary: Dictionary, stitch: Stitch, scale: float | None = None) -> Dictionary:
    """Returns the dictionary of B with ``encode(x_B) = dictionary.encode(stitch.back(x_B))`` and
    ``decode(f) = stitch.forth(dictionary.decode(f))``, of the same architecture (Chen et al. 2025,
    arXiv 2506.06609). Its decoder rows need not have length 1.

    Args:
      scale: of B's activations inside the new dictionary (default: as in A's); matters in training.

    Raises:
      UserError: the dictionary is imported, or a transcoder.
    """
    base.architecture_of(dictionary)  # which is one of ours
    if dictionary.transcodes:
        raise UserError("A transcoder reads one site and writes another: it cannot be transferred.")
    old = {n: np.asarray(a, np.float64) for n, a in modules.split(dictionary)[1].items()}
    s, (ba, ab) = float(old["scale"]), (stitch.back, stitch.forth)
    new = old | {"scale": np.float64(s if scale is None else scale)}
    new["W_enc"] = s / new["scale"] * ba.W @ old["W_enc"]
    new["W_dec"] = new["scale"] / s * old["W_dec"] @ ab.W
    new["b_dec"] = new["scale"] * (old["b_dec"] / s @ ab.W + ab.b)
    # z = u W_enc + (b_enc - b_dec W_enc): the map back adds its constant, and the old bias goes.
    constant = (s * ba.b - old["b_dec"]) @ old["W_enc"]
    new["b_enc"] = old["b_enc"] + constant + new["b_dec"] @ new["W_enc"]
    if "b_mag" in old:  # gated magnitudes start from z - b_enc
        new["b_mag"] = old["b_mag"] + (new["b_enc"] - old["b_enc"]) * np.exp(old["r_mag"])
    return base.from_arrays(type(dictionary), new, k=dictionary.k)


def with_unit_rows(dictionary: Dictionary) -> Dictionary:
    """Returns the dictionary with decoder rows of length 1 and features scaled up accordingly.

    The reconstruction stays, except where features compete (k largest) or share one threshold:
    these are then compared by how much they reconstruct.
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
