"""The rung through a joint dictionary: a code that all models share, computed from A alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.config import MapConfig
from crossdict_jax.maps.base import (
    ROWS,
    ActivationMap,
    Fitted,
    Pairs,
    Problem,
    build,
    check_rows,
    exact_matmul,
)


class Crosscoder(ActivationMap):
    """``f = act(x_A W_enc + b_enc)``, ``x_B = f W_dec + b_dec``: A's way in, B's way out.

    act keeps what is above both 0 and ``threshold``. The joint code was trained with models left
    out of rows at random, so that it can be read from one of them (Lindsey et al. 2024).
    """

    kind = "crosscoder"
    through_joint = True
    fits_together = True  # where the joint codes are still to be trained, in one ensemble

    def __init__(self, dictionary, *, d_a: int, width: int):
        super().__init__(dictionary)
        d_b = dictionary.d_model
        self.W_enc = nnx.Param(jnp.zeros((d_a, width)))
        self.b_enc = nnx.Param(jnp.zeros(width))
        self.threshold = nnx.Variable(jnp.zeros(()))
        self.W_dec = nnx.Param(jnp.zeros((width, d_b)))
        self.b_dec = nnx.Param(jnp.zeros(d_b))

    @property
    def arguments(self) -> dict:
        d_a, width = self.W_enc.shape
        return {"d_a": d_a, "width": width}

    def code(self, inputs: jax.Array) -> jax.Array:
        """Returns the joint code [batch, width] of A's activations [batch, d_a]."""
        z = exact_matmul(inputs.astype(jnp.float32), self.W_enc[...]) + self.b_enc[...][None, :]
        return jnp.where(z > self.threshold[...], jax.nn.relu(z), 0.0)

    def activation(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        return exact_matmul(self.code(inputs), self.W_dec[...]) + self.b_dec[...][None, :]


def fit(
    problems: Sequence[Problem], config: MapConfig, *, seed: int, directory: Path
) -> list[Fitted]:
    """Returns each problem's way through its joint code; the code itself is trained before.

    Raises:
      ValueError: a problem has no joint code.
    """
    return [_fit(problem) for problem in problems]


def _fit(problem: Problem) -> Fitted:
    check_rows(problem, Crosscoder.kind)
    if problem.joint is None:
        raise ValueError(f"{problem.label} has no joint code")
    values = {name: np.asarray(value) for name, value in problem.joint.items()}
    d_a, width = values["W_enc"].shape
    shape = {"d_a": d_a, "width": width}
    m = build(Crosscoder, problem.train.target.dictionary, shape, values)
    return Fitted(m, {"validation": _validation(m, problem.validation)})


def _validation(m: Crosscoder, pairs: Pairs) -> dict[str, float]:
    """Returns the mean squared error of x_B, and how many latents are active a row."""
    x_b = modules.over_rows(m, pairs.source.x, method="activation", size=ROWS)
    code = modules.over_rows(m, pairs.source.x, method="code", size=ROWS)
    error = np.square(pairs.target.x.astype(np.float64) - x_b).mean()
    return {"mse": float(error), "l0": float((code > 0).sum(1).mean())}
