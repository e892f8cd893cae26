"""Gated dictionaries: one path decides which features are active, another how strongly."""

import jax
import jax.numpy as jnp
from flax import nnx

from crossdict_jax.dictionaries.base import Dictionary, power
from crossdict_jax.ops import exact


class Gated(Dictionary):
    """f = 1[z > 0] relu((z - b_enc) exp(r_mag) + b_mag);  b_enc is the bias of the gate.

    loss = mean ||u - u_hat||^2 + l1 * mean sum_i relu(z_i) ||W_dec_i||
           + mean ||u - u_hat(relu(z))||^2.

    The penalty acts on the gate alone, so magnitudes need not shrink; the last term trains the
    gate, which has no gradient through f (Rajamanoharan et al. 2024, arXiv 2404.16014). Unit
    decoder rows. Unlike there, the last term trains the decoder too, as in SAELens: on real
    activations that leaves a quarter less unexplained at an equal L0.

    Attributes:
      r_mag, b_mag: [width], log scale and bias of the magnitudes.
    """

    reads = ("l1_coefficient",)
    usual_l1 = 4.0
    revives = False
    saelens = "gated"
    pace = 2.0  # as of ReLU

    def __init__(self, **shape):
        super().__init__(**shape)
        self.r_mag = nnx.Param(jnp.zeros(self.width))
        self.b_mag = nnx.Param(jnp.zeros(self.width))

    def activate(self, z: jax.Array) -> jax.Array:
        magnitude = (z - self.b_enc[...][None, :]) * jnp.exp(self.r_mag[...])[None, :]
        return jnp.where(z <= 0, 0.0, jax.nn.relu(magnitude + self.b_mag[...][None, :]))

    def losses(self, x, hyper, y=None):
        u_in, u = self.scaled_pair(x, y)
        z = self.pre_activations(u_in, hyper.dtype)
        f, gate = self.activate(z), jax.nn.relu(z)
        parts = {
            "mse": power(u - self.reconstruction(f, hyper.dtype)),
            "l1": jnp.mean(exact(gate, jnp.linalg.norm(self.W_dec[...], axis=1))),
            "gate_mse": power(u - self.reconstruction(gate, hyper.dtype)),
        }
        loss = parts["mse"] + hyper.l1_coefficient * parts["l1"] + parts["gate_mse"]
        return loss, parts, f
