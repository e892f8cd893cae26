"""Matrix products and sparse codes: references, and lists of entries where these are faster."""

from crossdict_jax.ops.codes import Code, activity, decode, decode_parts, sparse_code
from crossdict_jax.ops.products import EXACT, exact, matmul
from crossdict_jax.ops.selection import keep_top_k, kth_largest, nth_largest, uses_lists

__all__ = [
    "EXACT",
    "Code",
    "activity",
    "decode",
    "decode_parts",
    "exact",
    "keep_top_k",
    "kth_largest",
    "matmul",
    "nth_largest",
    "sparse_code",
    "uses_lists",
]
