"""NNX modules at jit boundaries: a static graph and a plain nested dict of arrays."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from functools import partial, wraps
from typing import Any

import jax
import numpy as np
from flax import nnx

Params = dict[str, Any]
SWITCHES = {  # of JAX: what every number here is defined by, whatever a caller has set
    "enable_x64": False,
    "numpy_dtype_promotion": "standard",
    "default_matmul_precision": None,
    "default_prng_impl": "threefry2x32",
    "threefry_partitionable": True,
    "transfer_guard": "allow",
}
SWITCHES = {n: v for n, v in SWITCHES.items() if hasattr(jax, n)}  # later versions lose some


def plain(function):
    """``function`` under ``SWITCHES``, for which numbers are float32 and the same."""

    @wraps(function)
    def call(*args, **kwargs):
        with contextlib.ExitStack() as stack:
            for name, value in SWITCHES.items():
                stack.enter_context(getattr(jax, name)(value))
            return function(*args, **kwargs)

    return call


class Plain(nnx.Module):
    """A module whose methods that compute are ``plain``, in subclasses too."""

    def __init_subclass__(cls, **settings):
        super().__init_subclass__(**settings)
        for name in {"__call__", "activation", "decode", "encode", "extend"} & vars(cls).keys():
            setattr(cls, name, plain(vars(cls)[name]))


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Returns (static graph, nested dict of arrays) for jit, optax and orbax."""
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Params) -> nnx.Module:
    """Returns the module of ``split``'s graph with these parameters."""
    return nnx.merge(graphdef, nnx.State(params))


def abstract(build) -> tuple[nnx.GraphDef, Params]:
    """Returns ``split(build())`` with shapes in place of arrays; nothing is computed."""
    return split(nnx.eval_shape(build))


def over_rows(module: nnx.Module, x: np.ndarray, *, method: str, size: int) -> np.ndarray:
    """Returns ``module.method(x)`` of rows x [n, ...] on the host, ``size`` rows at a time."""
    graphdef, params = split(module)
    batches = (padded(x[at : at + size], size) for at in range(0, len(x), size))
    dispatched = (call(graphdef, method, params, batch) for batch in batches)
    return np.concatenate([np.asarray(part) for part in ahead(dispatched)])[: len(x)]


def ahead(dispatched: Iterable) -> Iterator:
    """The same items; the next one is computed while one is used, and no more is in flight."""
    return (item for item, _ in itertools.pairwise(itertools.chain(dispatched, [None])))


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    """Returns ``rows`` padded to ``size`` with its last row: one compiled shape for all."""
    missing = size - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows


@partial(jax.jit, static_argnums=(0, 1))
def call(graphdef, method, params, x):
    return getattr(merge(graphdef, params), method)(x)
