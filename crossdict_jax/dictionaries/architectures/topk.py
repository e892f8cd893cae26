"""TopK dictionaries with the AuxK loss against dead features."""

from functools import partial

import jax

from crossdict_jax.dictionaries.base import Dictionary, Hyper
from crossdict_jax.ops import Code, keep_top_k, kth_largest, sparse_code


class TopK(Dictionary):
    """f = the k largest of relu(z);  loss = FVU + auxk (Gao et al. 2024, arXiv 2406.04093).

    Unit decoder rows.
    """

    reads = ("k", "products")
    saelens = "topk"

    def activate(self, z: jax.Array) -> jax.Array:
        return keep_top_k(z, self.k)

    def training_code(self, u: jax.Array, hyper: Hyper = Hyper()) -> Code:
        n, kth = self.k * len(u), partial(kth_largest, k=self.k)
        return sparse_code(u, *self.encoder(), kth, n, hyper.dtype, hyper.products)
