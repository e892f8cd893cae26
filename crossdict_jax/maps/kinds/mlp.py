"""A three-layer network on features, trained by gradient steps; at times called a hypernetwork."""

import jax.numpy as jnp
import numpy as np

from crossdict_jax.maps.network import NetworkMap, damped_scale


class MLP(NetworkMap):
    """``f_B = head(mean_b + scale_b * network((f_A - mean_a) / scale_a))``, never negative.

    Means and scales are those of the training rows. It starts as the mean predictor.
    """

    kind = "mlp"

    def baselines(self, tokens, batch):
        return self.mean_a[...][None, :], self.mean_b[...][None, :]

    @classmethod
    def unmeasured(cls, width_a, width_b, tokens):
        sizes = {"a": width_a, "b": width_b}
        return {f"{v}_{name}": jnp.zeros(n) for name, n in sizes.items() for v in ("mean", "scale")}

    @classmethod
    def measure(cls, problem):
        values = {}
        for name, side in (("a", problem.train.source), ("b", problem.train.target)):
            values[f"mean_{name}"] = side.feature_moments.mean.astype(np.float32)
            values[f"scale_{name}"] = damped_scale(side.feature_moments.variance)
        return values, {}
