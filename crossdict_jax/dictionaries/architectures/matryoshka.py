"""Matryoshka dictionaries: nested BatchTopK, whose first features must do without the later."""

import jax
import jax.numpy as jnp

from crossdict_jax.dictionaries.base import AUXK_COEFFICIENT, BatchSelected, fvu
from crossdict_jax.ops import decode_parts

NESTED_BALANCE = 0.25  # weight of a nested loss relative to that of the next wider one


class Matryoshka(BatchSelected):
    """loss = sum over nested widths m of w_m FVU(b_dec + f[:m] W_dec[:m]) + auxk;  f as BatchTopK.

    Early features must do without later ones: no feature absorption (Bussmann et al. 2025, arXiv
    2503.17547). With equal weights w narrow widths mix features that they have no room for
    (hedging); so each weighs NESTED_BALANCE times the next wider (Chanin et al. 2025, arXiv
    2505.11756), and all w sum to 1. At 0.25 little of the protection is left: on planted
    hierarchies parents are absorbed about as often as by BatchTopK, at 1 seldom.
    """

    reads = ("k", "nested_fractions", "products")
    saelens = "jumprelu"

    def losses(self, x, hyper, y=None):
        u_in, u = self.scaled_pair(x, y)
        f = self.training_code(u_in, hyper)
        shares = {max(1, round(share * self.width)) for share in hyper.nested_fractions}
        widths = tuple(sorted(shares | {self.width}))
        # Each width adds its slice to the reconstruction before: all cost one decode.
        slices = decode_parts(f, self.W_dec[...], widths, hyper.dtype)
        u_hat = self.b_dec[...][None, None, :] + jnp.cumsum(slices, axis=1)  # [batch, widths, d]
        nested = jax.vmap(lambda u_hat: fvu(u, u_hat, hyper.variance), in_axes=1)(u_hat)
        weights = NESTED_BALANCE ** jnp.arange(len(widths))[::-1]
        parts = {
            "fvu": nested[-1],
            "nested_fvu": jnp.average(nested, weights=weights),
            "auxk": self.auxk(u_in, u - u_hat[:, -1], hyper),
        }
        return parts["nested_fvu"] + AUXK_COEFFICIENT * parts["auxk"], parts, f
