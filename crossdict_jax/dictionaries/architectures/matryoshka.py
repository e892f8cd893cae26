"""Matryoshka dictionaries: nested BatchTopK, whose first features must do without the later."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from crossdict_jax.dictionaries.base import AUXK_COEFFICIENT, BatchSelected, Hyper
from crossdict_jax.dictionaries.losses import auxk, fvu
from crossdict_jax.ops import Code, decode_parts

NESTED_BALANCE = 0.25  # weight of a nested loss relative to that of the next wider one


class Matryoshka(BatchSelected):
    """loss = sum over nested widths m of w_m FVU(b_dec + f[:m] W_dec[:m]) + auxk;  f as BatchTopK.

    The early features cannot leave parts of what they mean to later ones: no feature absorption
    (Bussmann et al. 2025, arXiv 2503.17547). With equal weights w the narrow ones mix features
    that they have no room for (hedging); so each width weighs NESTED_BALANCE times the next
    wider (Chanin et al. 2025, arXiv 2505.11756), and all w sum to 1. At 0.25 little is left of
    the protection: on planted hierarchies parents are absorbed about as often as by BatchTopK, at
    1 seldom. The dictionary is used whole, as a BatchTopK one.
    """

    has_k = True
    saelens = "jumprelu"

    def losses(self, x, *, hyper: Hyper, dead, y=None, dtype=None):
        u_in, u = self.scaled_pair(x, y)
        f = self.sparse_code(u_in, hyper.whole, dtype)
        nested = list(self._nested(f, hyper, dtype))
        parts = {
            "fvu": fvu(u, nested[-1], hyper.whole),
            "nested_fvu": _weighted(
                [fvu(u, u_hat, hyper.whole) for u_hat in nested], NESTED_BALANCE
            ),
            "auxk": auxk(self, u_in, u - nested[-1], dead=dead, hyper=hyper, dtype=dtype),
        }
        return parts["nested_fvu"] + AUXK_COEFFICIENT * parts["auxk"], parts, f

    def _nested(self, f: Code, hyper: Hyper, dtype) -> Iterator[jax.Array]:
        """Yields the reconstruction [batch, d_out] of each nested width, the whole one last.

        Each adds its own slice to the one before: together as dear as one decode.
        """
        slices = decode_parts(f, self.W_dec[...], self._widths(hyper), dtype)
        u_hat = self.b_dec[...][None, :]
        for i in range(slices.shape[1]):
            u_hat = u_hat + slices[:, i]
            yield u_hat

    def _widths(self, hyper: Hyper) -> tuple[int, ...]:
        parts = {max(1, round(share * self.width)) for share in hyper.nested_fractions}
        return tuple(sorted(parts | {self.width}))


def _weighted(losses: list[jax.Array], balance: float) -> jax.Array:
    """Returns the mean of losses, each weighing ``balance`` times the next one."""
    weights = [balance**i for i in reversed(range(len(losses)))]
    return sum(w * loss for w, loss in zip(weights, losses)) / sum(weights)
