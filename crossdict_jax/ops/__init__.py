"""Matrix products and sparse codes: references, and lists of entries where these are faster."""

from crossdict_jax.ops.codes import (
    Code,
    activity,
    batch_top_k_code,
    decode,
    decode_parts,
    threshold_code,
    top_k_code,
)
from crossdict_jax.ops.products import matmul
from crossdict_jax.ops.selection import kth_largest, nth_largest

__all__ = [
    "Code",
    "activity",
    "batch_top_k_code",
    "decode",
    "decode_parts",
    "kth_largest",
    "matmul",
    "nth_largest",
    "threshold_code",
    "top_k_code",
]
