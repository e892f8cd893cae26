"""NNX modules at jit boundaries: a static graph and a plain nested dict of arrays."""

import contextlib
import hashlib
import itertools
import weakref
from collections.abc import Iterable, Iterator
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax.errors import UserError

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
FINGERPRINTS = weakref.WeakKeyDictionary()  # {module: (its arrays, their checksum)}


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


def fingerprint(module: nnx.Module) -> str:
    """Returns a checksum of a module's parameters, names and shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(split(module)[1])
    arrays, checksum = FINGERPRINTS.get(module, ([], ""))
    if len(arrays) == len(leaves) and all(a is leaf for a, (_, leaf) in zip(arrays, leaves)):
        return checksum
    digest = hashlib.sha256()
    for path, leaf in leaves:
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    if all(isinstance(leaf, jax.Array) for _, leaf in leaves):  # which do not change
        FINGERPRINTS[module] = [leaf for _, leaf in leaves], digest.hexdigest()
    return digest.hexdigest()


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


def rows(x: Any, size: int, name: str = "x") -> jax.Array:
    """Returns x as float32 [batch, size]; UserError for another shape."""
    if (shape := jnp.shape(x))[1:] != (size,):
        raise UserError(f"{name} must be [batch, {size}], not {list(shape)}; reshape it.")
    return jnp.asarray(x, jnp.float32)


@partial(jax.jit, static_argnums=(0, 1))
def call(graphdef, method, params, x):
    return getattr(merge(graphdef, params), method)(x)
