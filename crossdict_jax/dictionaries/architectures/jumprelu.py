"""JumpReLU dictionaries: a learnt threshold per feature, and an L0 penalty that can train it."""

import jax
import jax.numpy as jnp
from flax import nnx

from crossdict_jax.dictionaries.base import AUXK_COEFFICIENT, Dictionary, power

# Rows have mean norm sqrt(d_model), so pre-activations start near 1, within a kernel's reach.
INITIAL_THRESHOLD = 0.5
BANDWIDTH = 0.5  # of that kernel, in pre-activations


class JumpReLU(Dictionary):
    """f = z 1[z > threshold];  loss = mean ||u - u_hat||^2 + l1 * mean L0(f) + d_out * auxk.

    With an L0 target t the penalty is d_out (mean L0 / t - 1)^2, on the scale of an unexplained
    row. The threshold's gradient is estimated with a rectangular kernel (Rajamanoharan et al. 2024,
    arXiv 2407.14435, sections 3 and F). AuxK, as of TopK but times a row's weight here, revives
    dead features, which the kernel alone never finds again. Unit decoder rows.

    Attributes:
      threshold: [width], never below 0. Learnt directly, so that exchange changes no bit of it.
    """

    reads = ("l1_coefficient", "l0_target")
    usual_l1 = 0.75
    saelens = "jumprelu"

    def __init__(self, **shape):
        super().__init__(**shape)
        self.threshold = nnx.Param(jnp.full(self.width, INITIAL_THRESHOLD))

    def losses(self, x, hyper, y=None):
        (u_in, u), threshold = self.scaled_pair(x, y), self.threshold[...][None, :]
        z = self.pre_activations(u_in, hyper.dtype)
        gate = step(z, threshold, bandwidth=BANDWIDTH)
        fixed = jax.lax.stop_gradient
        f = z * fixed(gate) + fixed(threshold) * (gate - fixed(gate))  # the second is 0
        residual = u - self.reconstruction(f, hyper.dtype)
        l0 = penalty = jnp.mean(jnp.sum(gate, axis=1))
        if hyper.l0_target:
            if hyper.l0 is not None:  # the L0 of the batch, with the gradient of this part's
                l0 = hyper.l0 + l0 - fixed(l0)
            penalty = self.d_out * jnp.square(l0 / hyper.l0_target - 1)
        parts = {
            "mse": power(residual),
            "l0_penalty": penalty,
            "auxk": self.auxk(u_in, residual, hyper),
        }
        revival = AUXK_COEFFICIENT * self.d_out * parts["auxk"]
        return parts["mse"] + hyper.l1_coefficient * penalty + revival, parts, f

    def after_update(self, smallest: jax.Array) -> None:
        super().after_update(smallest)
        self.threshold[...] = jnp.maximum(self.threshold[...], 0.0)


def step(z: jax.Array, threshold: jax.Array, *, bandwidth: float) -> jax.Array:
    """Returns 1[z > threshold] [batch, width], with an estimated gradient in the threshold.

    -1[|z - threshold| < bandwidth / 2] / bandwidth; z gets none.
    """
    fixed = jax.lax.stop_gradient
    near = jnp.abs(fixed(z - threshold)) < bandwidth / 2
    nothing = threshold - fixed(threshold)  # 0, but for its gradient
    return (z > threshold) - near / bandwidth * nothing
