"""The four losses of a trained map, of predicted and true features [batch, width].

Each is a mean, so that weights hold at any batch size and width, and 0 for a perfect prediction.
"""

import jax
import jax.numpy as jnp

from crossdict_jax.config import LossWeights
from crossdict_jax.ops import exact

SOFT_FIRING = 0.1  # of the target's typical active value: where a feature counts as firing


def mse(p: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the squared error, mean over batch and features."""
    return jnp.mean(jnp.square(p - t))


def cosine(p: jax.Array, t: jax.Array) -> jax.Array:
    """Returns 1 - mean_i cos(p_i, t_i); a row of zeros has cosine 0, two of them 1."""
    p_square, t_square = jnp.sum(p * p, -1), jnp.sum(t * t, -1)
    defined = (p_square > 0) & (t_square > 0)
    p_norm, t_norm = (jnp.sqrt(jnp.where(defined, s, 1.0)) for s in (p_square, t_square))
    both_zero = (p_square == 0) & (t_square == 0)
    return 1 - jnp.mean(jnp.where(defined, jnp.sum(p * t, -1) / (p_norm * t_norm), both_zero))


def correlation(p: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the mean over feature pairs (j, k) of (corr(p)_jk - corr(t)_jk)^2.

    With Z the standardised columns over sqrt(batch), corr = Z'Z and
    |Zp'Zp - Zt'Zt|^2 = |Zp Zp'|^2 + |Zt Zt'|^2 - 2 |Zp Zt'|^2: batch x batch products, never
    width x width. A constant column correlates 0 with every column, itself included.
    """

    def standardised(x):  # norm 1, or 0 where a column varies only by rounding
        centred = x - jnp.mean(x, 0, keepdims=True)
        square = jnp.sum(jnp.square(centred), 0, keepdims=True)
        varies = square > 1e-12 * jnp.sum(jnp.square(x), 0, keepdims=True)
        norm = jnp.sqrt(jnp.where(varies, square, 1.0))
        return jnp.where(varies, centred / norm, 0.0)

    Z_p, Z_t = standardised(p), standardised(t)
    pp, tt, pt = (
        jnp.sum(jnp.square(exact(a, b.T))) for a, b in ((Z_p, Z_p), (Z_t, Z_t), (Z_p, Z_t))
    )
    return (pp + tt - 2 * pt) / p.shape[1] ** 2


def sparsity(p: jax.Array, t: jax.Array, *, fires: jax.Array | None = None) -> jax.Array:
    """Returns the mismatch of firing: of per-feature rates and of per-row L0, each relative.

    sum_j (rate_j(p) - rate_j(t))^2 / sum_j rate_j(t)^2
    + mean_i (L0_i(p) - L0_i(t))^2 / mean_i L0_i(t)^2, about 2 where nothing fires.

    Args:
      fires: [batch, width], 1 where p fires, else 0, with its own gradient. Without it both sides
        use the surrogate 2 sigmoid(2 x / s) - 1 = tanh(x / s), 0 at 0 and 1 well above s, a tenth
        of the target's mean active value.
    """
    active = t > 0
    if fires is None:
        typical = jnp.sum(jnp.maximum(t, 0.0)) / jnp.maximum(jnp.sum(active), 1)
        scale = SOFT_FIRING * jnp.where(active.any(), typical, 1.0)
        fires, active = jnp.tanh(p / scale), jnp.tanh(t / scale)
    mismatch = 0.0
    for axis in (0, 1):  # rates, then L0, in plain units where nothing fires in the target
        p, t = fires.mean(axis), active.astype(jnp.float32).mean(axis)
        length = jnp.sum(jnp.square(t))
        mismatch += jnp.sum(jnp.square(p - t)) / jnp.where(length > 0, length, 1.0)
    return mismatch


def transfer_loss(
    p: jax.Array,
    t: jax.Array,
    weights: LossWeights,
    *,
    variance: jax.Array | float,
    fires: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (weighted sum, terms) of the four losses.

    Args:
      p, t: predicted and true features [batch, width].
      variance: mean variance of the target's features, the unit of the squared error in the sum
        (term ``nmse``; ``mse`` is raw), so that weights hold at any scale of the activations.
      fires: see ``sparsity``.
    """
    error = mse(p, t)
    terms = {
        "mse": error,
        "nmse": error / variance,
        "cosine": cosine(p, t),
        "correlation": correlation(p, t),
        "sparsity": sparsity(p, t, fires=fires),
    }
    weighted = (w * terms[name.replace("mse", "nmse")] for name, w in vars(weights).items())
    return sum(weighted), terms
