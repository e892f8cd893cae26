"""TopK dictionaries with the AuxK loss against dead features."""

from __future__ import annotations

import jax

from crossdict_jax.dictionaries.base import Dictionary, Hyper, keep_top_k, matmul, unit_rows
from crossdict_jax.dictionaries.losses import auxk, fvu


class TopK(Dictionary):
    """f = the k largest of relu(z);  loss = FVU + auxk * (residual FVU of k_aux dead features).

    Unit decoder rows. Both terms are divided by a variance, the first by the batch's, the second
    by the residual's, so the coefficient has no unit (Gao et al. 2024, arXiv 2406.04093).
    """

    def activate(self, z: jax.Array) -> jax.Array:
        return keep_top_k(z, self.k)

    def losses(self, x, *, hyper: Hyper, dead, y=None, dtype=None):
        u = self._targets(x, y)
        z = self.pre_activations(self._scaled(x), dtype)
        f = self.activate(z)
        u_hat = matmul(f, self.W_dec[...], dtype) + self.b_dec[...][None, :]
        parts = {
            "fvu": fvu(u, u_hat, hyper.whole),
            "auxk": auxk(self, z, u - u_hat, dead=dead, hyper=hyper, dtype=dtype),
        }
        return parts["fvu"] + hyper.auxk_coefficient * parts["auxk"], parts, f

    def after_update(self) -> None:
        self.W_dec[...] = unit_rows(self.W_dec[...])
