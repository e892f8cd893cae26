"""Linear probes: multinomial logistic regression, its penalty chosen by cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

FOLDS = 4
STEPS = 300  # of accelerated gradient descent, on rows of mean square norm 1


@dataclass(frozen=True)
class Probe:
    """``argmax(x W + b)``: W [d, classes], b [classes], and the penalty that was chosen."""

    W: np.ndarray
    b: np.ndarray
    penalty: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Returns the class int [n] of each row [n, d]."""
        return np.argmax(x @ self.W + self.b[None, :], axis=1)


def train(
    x: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    penalties: Sequence[float],
    seed: int,
) -> list[Probe]:
    """Returns a probe for each row of labels.

    Least mean cross-entropy + penalty / 2 ||W||^2, where rows are scaled to a mean square norm of
    1. The penalty is the one of least held-out cross-entropy over FOLDS folds of the same
    examples; no others are needed.

    Args:
      x: [n, d].
      labels: int [variants, n].
    """
    n = len(x)
    scale = 1 / max(np.sqrt(np.square(x.astype(np.float64)).sum(1).mean()), 1e-30)
    # The solution lies in the span of the rows: n columns say as much as d do.
    U, s, V = np.linalg.svd(x.astype(np.float64) * scale, full_matrices=False)
    fold = np.random.Generator(np.random.Philox(key=seed)).permutation(n) % FOLDS
    held_out = np.concatenate([fold == i for i in range(FOLDS)] + [np.zeros(n, bool)])
    held_out = held_out.reshape(FOLDS + 1, n)  # the last one trains on everything
    W, losses = _fit(
        jnp.asarray(U * s, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        jnp.asarray(held_out),
        jnp.asarray(penalties, jnp.float32),
        classes=classes,
    )
    W, losses = np.asarray(W, np.float64), np.asarray(losses, np.float64)
    best = losses[:, :, :FOLDS].sum(2).argmin(1)  # [variants]
    chosen = W[np.arange(len(labels)), best, FOLDS]  # [variants, r + 1, classes]
    return [Probe(scale * (V.T @ w[:-1]), w[-1], float(penalties[i])) for w, i in zip(chosen, best)]


@partial(jax.jit, static_argnames="classes")
def _fit(z, labels, held_out, penalties, *, classes):
    """(W [variants, penalties, folds, r + 1, classes], held-out losses without the last axes)."""
    z = jnp.concatenate([z, jnp.ones((len(z), 1))], axis=1)  # [n, r + 1]
    penalised = jnp.ones((z.shape[1], 1)).at[-1].set(0.0)  # all but the constant

    def one(y, out, penalty):
        target = jax.nn.one_hot(y, classes)
        weight = jnp.where(out, 0.0, 1.0)
        weight = weight / weight.sum()
        rate = 1 / (0.5 * jnp.sum(weight * jnp.square(z).sum(1)) + penalty)

        def gradient(W):
            error = jax.nn.softmax(z @ W, axis=1) - target
            return z.T @ (weight[:, None] * error) + penalty * penalised * W

        def step(_, state):
            W, ahead, t = state
            new = ahead - rate * gradient(ahead)
            t_new = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
            return new, new + (t - 1) / t_new * (new - W), t_new

        W = jnp.zeros((z.shape[1], classes))
        W, _, _ = jax.lax.fori_loop(0, STEPS, step, (W, W, 1.0))
        loss = -jnp.sum(target * jax.nn.log_softmax(z @ W, axis=1), axis=1)
        return W, jnp.sum(jnp.where(out, loss, 0.0))

    over_folds = jax.vmap(one, (None, 0, None))
    over_penalties = jax.vmap(over_folds, (None, None, 0))
    return jax.vmap(over_penalties, (0, None, None))(labels, held_out, penalties)
