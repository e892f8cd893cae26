"""Earlier names of what ``ops.codes`` does."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from crossdict_jax.ops.codes import batch_top_k_code as batch_top_k
from crossdict_jax.ops.codes import decode, decode_parts
from crossdict_jax.ops.codes import threshold_code as all_from
from crossdict_jax.ops.codes import top_k_code as top_k
from crossdict_jax.ops.lists import Entries as Code
from crossdict_jax.ops.selection import nth_largest

__all__ = ["Code", "all_from", "batch_top_k", "decode", "decode_parts", "nth_largest", "top_k"]


def encode(u, W_enc, bias, given, select, dtype=None):
    return select(u, W_enc, bias, *given, dtype=dtype)


def active_rows(f) -> jax.Array:
    if not isinstance(f, Code):
        return jnp.sum(f > 0, axis=0, dtype=jnp.int32)
    return jnp.zeros(f.width, jnp.int32).at[f.features].add(f.values > 0)
