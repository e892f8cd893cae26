"""All layers of a language model at a few paired positions, without a store of their own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import modules
from crossdict_jax.activations.splice import batches, passages_of
from crossdict_jax.activations.store import Store
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.training.mesh import DATA, make_mesh, put, shard


def read_rows(
    lm: LanguageModel,
    store: Store,
    model: str,
    rows: np.ndarray,
    sites: Sequence[Site],
    *,
    batch_size: int,
    dtype: str = "float32",
) -> np.ndarray:
    """Returns a model's activations at row numbers of the store, float32 [sites, n, d_model].

    Only windows that hold one of the rows are read; of their positions only the rows leave the
    device.

    Args:
      rows: int64 [n], ascending.
      batch_size: windows per forward, over all devices.
      dtype: of the inputs of matrix products.
    """
    passages = passages_of(store, model, rows)
    mesh = make_mesh()
    graphdef, params = modules.split(lm)
    params = jax.device_put(params, shard(mesh))
    out = np.empty((len(sites), len(rows), lm.config.d_model), np.float32)
    all_batches = batches(passages, size=batch_size, devices=mesh.size)
    most = max(len(batch.rows) for batch in all_batches)
    for batch in all_batches:
        window, position = (np.resize(at, most) for at in batch.at)  # one shape for all batches
        tokens = put(batch.tokens, shard(mesh, DATA))
        x = _read(graphdef, tuple(sites), jnp.dtype(dtype), params, tokens, window, position)
        out[:, batch.rows] = np.asarray(x)[:, : len(batch.rows)]
    return out


@partial(jax.jit, static_argnums=(0, 1, 2))
def _read(graphdef, sites, dtype, params, tokens, window, position) -> jax.Array:
    seen = {}

    def tap(site, x):
        seen[site] = x[window, position]
        return x

    modules.merge(graphdef, params).logits(tokens, tap=tap, dtype=dtype)
    return jnp.stack([seen[site] for site in sites])
