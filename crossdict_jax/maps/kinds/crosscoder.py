"""Through a joint dictionary: a code that all models share, computed from A alone."""

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import modules
from crossdict_jax.maps.base import ROWS, ActivationMap
from crossdict_jax.ops import exact


class Crosscoder(ActivationMap):
    """``f = act(x_A W_enc + b_enc)``, ``x_B = f W_dec + b_dec``: A's encoder, B's decoder.

    act keeps what is above both 0 and ``threshold``. Training left models out of rows at random, so
    that one model suffices for the code (Lindsey et al. 2024).
    """

    kind = "crosscoder"
    through_joint = True
    fits_together = True  # joint codes that are not trained yet, in one ensemble

    def activation(self, inputs, *, tokens=None):
        z = (
            exact(modules.rows(inputs, len(self.W_enc[...])), self.W_enc[...])
            + self.b_enc[...][None, :]
        )
        f = jnp.where(z <= self.threshold[...], 0.0, jax.nn.relu(z))
        return exact(f, self.W_dec[...]) + self.b_dec[...][None, :]

    @classmethod
    def solve(cls, problem, config):
        """ValueError if the problem has no joint code, which is trained before."""
        if problem.joint is None:
            raise ValueError(f"{problem.label} has no joint code")
        m, pairs = cls(problem.train.target.dictionary, problem.joint), problem.validation
        x_b = modules.over_rows(m, pairs.source.x, method="activation", size=ROWS)
        error = float(np.square(pairs.target.x.astype(np.float64) - x_b).mean())
        return {(): error}, lambda: problem.joint
