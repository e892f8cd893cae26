"""TopK dictionaries with the AuxK loss against dead features."""

from __future__ import annotations

import jax

from crossdict_jax.dictionaries.base import (
    AUXK_COEFFICIENT,
    Dictionary,
    Hyper,
    keep_top_k,
    unit_rows,
)
from crossdict_jax.dictionaries.losses import auxk, fvu
from crossdict_jax.ops import decode, top_k_code


class TopK(Dictionary):
    """f = the k largest of relu(z);  loss = FVU + auxk * (residual FVU of k_aux dead features).

    Unit decoder rows. Both terms are divided by a variance, the first by the batch's, the second
    by the residual's, so the coefficient has no unit (Gao et al. 2024, arXiv 2406.04093).
    """

    has_k = True
    saelens = "topk"

    def activate(self, z: jax.Array) -> jax.Array:
        return keep_top_k(z, self.k)

    def losses(self, x, *, hyper: Hyper, dead, y=None, dtype=None):
        u_in, u = self.scaled_pair(x, y)
        f = top_k_code(u_in, *self.encoder(), self.k, dtype)
        u_hat = decode(f, self.W_dec[...], dtype) + self.b_dec[...][None, :]
        parts = {
            "fvu": fvu(u, u_hat, hyper.whole),
            "auxk": auxk(self, u_in, u - u_hat, dead=dead, hyper=hyper, dtype=dtype),
        }
        return parts["fvu"] + AUXK_COEFFICIENT * parts["auxk"], parts, f

    def after_update(self) -> None:
        self.W_dec[...] = unit_rows(self.W_dec[...])
