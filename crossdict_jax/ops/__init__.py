"""Matrix products and sparse codes: references, and lists or kernels where these are faster."""

from crossdict_jax.ops.codes import Code, activity, decode, decode_parts, sparse_code
from crossdict_jax.ops.products import EXACT, exact, matmul
from crossdict_jax.ops.selection import fastest_products, keep_top_k, kth_largest, nth_largest

__all__ = [
    "EXACT",
    "Code",
    "activity",
    "decode",
    "decode_parts",
    "exact",
    "fastest_products",
    "keep_top_k",
    "kth_largest",
    "matmul",
    "nth_largest",
    "sparse_code",
]
