"""TopK dictionaries with the AuxK loss against dead features."""

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

    def training_code(self, u: jax.Array, hyper: Hyper | None = None, dtype=None) -> Code:
        n, products = self.k * len(u), hyper and hyper.products
        return sparse_code(u, *self.encoder(), lambda z: kth_largest(z, self.k), n, dtype, products)
