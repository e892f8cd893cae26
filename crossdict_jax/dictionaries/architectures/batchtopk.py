"""BatchTopK dictionaries: k features a row on average, one threshold at inference."""

from __future__ import annotations

from crossdict_jax.dictionaries.base import AUXK_COEFFICIENT, BatchSelected, Hyper
from crossdict_jax.dictionaries.losses import auxk, fvu
from crossdict_jax.ops import decode


class BatchTopK(BatchSelected):
    """f = the batch * k largest of relu(z) in the whole batch;  loss = FVU + auxk, as of TopK.

    A row takes as many features as it needs. At inference no row may depend on the others:
    f = relu(z) 1[z > threshold] (Bussmann et al. 2024, arXiv 2412.06410).
    """

    has_k = True
    saelens = "jumprelu"

    def losses(self, x, *, hyper: Hyper, dead, y=None, dtype=None):
        u_in, u = self.scaled_pair(x, y)
        f = self.sparse_code(u_in, hyper.whole, dtype)
        u_hat = decode(f, self.W_dec[...], dtype) + self.b_dec[...][None, :]
        parts = {
            "fvu": fvu(u, u_hat, hyper.whole),
            "auxk": auxk(self, u_in, u - u_hat, dead=dead, hyper=hyper, dtype=dtype),
        }
        return parts["fvu"] + AUXK_COEFFICIENT * parts["auxk"], parts, f
