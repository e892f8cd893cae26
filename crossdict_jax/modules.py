"""NNX modules at jit boundaries: a static graph and a plain nested dict of arrays."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Returns (static graph, nested dict of arrays); the dict is what jit, optax and orbax see."""
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Params) -> nnx.Module:
    """Returns the module that ``split`` took apart, with these parameters."""
    return nnx.merge(graphdef, nnx.State(params))


def abstract(build) -> tuple[nnx.GraphDef, Params]:
    """Returns ``split(build())`` with shapes in place of arrays; nothing is computed."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    return graphdef, jax.tree.map(lambda a: a, nnx.to_pure_dict(state))
