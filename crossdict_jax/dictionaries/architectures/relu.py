"""ReLU dictionaries with an L1 penalty weighted by decoder norms."""

import jax.numpy as jnp

from crossdict_jax.dictionaries.base import Dictionary, power
from crossdict_jax.ops import exact


class ReLU(Dictionary):
    """f = relu(z);  loss = mean ||u - u_hat||^2 + l1 * mean sum_i f_i ||W_dec_i||.

    Decoder rows are free: the penalty is weighted by their norms, so growing them gains nothing
    (Conerly et al. 2024, "Update on how we train SAEs"; gradients are clipped to norm 1 as there).
    """

    reads = ("l1_coefficient",)
    usual_l1 = 3.0
    saelens = "standard"
    unit_decoder = revives = False
    pace = 2.0  # L1 silences features only step by step: faster, fewer are left at an equal FVU

    def losses(self, x, hyper, y=None):
        u_in, u = self.scaled_pair(x, y)
        f = self.training_code(u_in, hyper)
        mse = power(u - self.reconstruction(f, hyper.dtype))
        l1 = jnp.mean(exact(f, jnp.linalg.norm(self.W_dec[...], axis=1)))
        return mse + hyper.l1_coefficient * l1, {"mse": mse, "l1": l1}, f
