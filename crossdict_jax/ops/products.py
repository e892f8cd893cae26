"""Matrix products of training, forward and backward in a chosen dtype."""

from functools import partial

import jax
import jax.numpy as jnp

# Of float32 inputs. Each product states it: accelerators would round the others, so that a notebook
# showed other numbers than the commands.
EXACT = jax.lax.Precision.HIGHEST
exact = partial(jnp.matmul, precision=EXACT)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(a: jax.Array, b: jax.Array, dtype=None) -> jax.Array:
    """Returns a b, float32 [n, m], of a [n, l] and b [l, m].

    Gradients have the memory layout of their arrays; JAX's own rule transposes that of ``b``, which
    every use by an optimizer would turn around again.

    Args:
      dtype: of the inputs of all three products (None: as they are); sums are float32.
    """
    return _product(a, b, dtype, axes=(1, 0))


def _product(a: jax.Array, b: jax.Array, dtype, *, axes: tuple[int, int]) -> jax.Array:
    """Returns the product, summed over axis ``axes[0]`` of a and ``axes[1]`` of b."""
    if dtype is not None:
        a, b = a.astype(dtype), b.astype(dtype)
    contracted = tuple((axis,) for axis in axes)
    options = {"precision": EXACT, "preferred_element_type": jnp.float32}
    return jax.lax.dot_general(a, b, (contracted, ((), ())), **options)


matmul.defvjp(
    lambda a, b, dtype: (matmul(a, b, dtype), (a, b)),
    lambda dtype, saved, gradient: (
        _product(gradient, saved[1], dtype, axes=(1, 1)),
        _product(saved[0], gradient, dtype, axes=(0, 0)),
    ),
)
