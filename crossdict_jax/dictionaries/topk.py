"""TopK dictionaries with the AuxK loss against dead features."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from crossdict_jax.dictionaries.base import Dictionary, Hyper, keep_top_k, matmul, unit_rows


class TopK(Dictionary):
    """f = the k largest of relu(z);  loss = FVU + auxk * (residual FVU of k_aux dead features).

    Unit decoder rows. Both terms are divided by a variance, the first by the batch's, the second
    by the residual's, so the coefficient has no unit (Gao et al. 2024, arXiv 2406.04093).
    """

    def activate(self, z: jax.Array) -> jax.Array:
        return keep_top_k(z, self.k)

    def losses(self, x, *, hyper: Hyper, dead, dtype=None):
        u = self._scaled(x)
        z = self.pre_activations(u, dtype)
        f = self.activate(z)
        u_hat = matmul(f, self.W_dec[...], dtype) + self.b_dec[...][None, :]
        residual = u - u_hat
        fvu = _power(residual) / _variance(u)
        auxk = self._auxk(z, jax.lax.stop_gradient(residual), dead, hyper, dtype)
        return fvu + hyper.auxk_coefficient * auxk, {"fvu": fvu, "auxk": auxk}, f

    def _auxk(self, z, residual, dead, hyper: Hyper, dtype):
        """The share of the residual that the k_aux strongest dead features leave; else 0.

        Skipped while everything is alive: it costs as much again as the rest of the loss.
        """

        def revive(_):
            f = keep_top_k(jnp.where(dead[None, :], z, 0.0), min(hyper.k_aux, self.width))
            missed = residual - matmul(f, self.W_dec[...], dtype)
            share = _power(missed) / jnp.maximum(_variance(residual), 1e-8)
            return jnp.where(dead.any(), share, 0.0)

        return jax.lax.cond(hyper.revive, revive, lambda _: jnp.zeros(()), None)

    def after_update(self) -> None:
        self.W_dec[...] = unit_rows(self.W_dec[...])


def _power(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(jnp.square(x), axis=1))


def _variance(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(jnp.square(x - x.mean(axis=0, keepdims=True)), axis=1))
