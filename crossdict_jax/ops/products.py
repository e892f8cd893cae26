"""Matrix products of training, forward and backward in the number format that is asked for."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(a: jax.Array, b: jax.Array, dtype=None) -> jax.Array:
    """Returns a b, float32 [n, m], of a [n, l] and b [l, m].

    The two products of the gradient take inputs in the same format. Gradients lie in memory as what
    they belong to; by JAX's own rule that of ``b`` comes out transposed, and is then turned around
    once for every use that an optimizer makes of it.

    Args:
      dtype: of the inputs of all three products (None: as they are); sums are float32.
    """
    return _product(a, b, dtype, over=(1, 0))


def _forward(a, b, dtype):
    return matmul(a, b, dtype), (a, b)


def _backward(dtype, kept, gradient):
    a, b = kept
    return _product(gradient, b, dtype, over=(1, 1)), _product(a, gradient, dtype, over=(0, 0))


matmul.defvjp(_forward, _backward)


def _product(a: jax.Array, b: jax.Array, dtype, *, over: tuple[int, int]) -> jax.Array:
    """Returns the sum over axis ``over[0]`` of a [., .] and ``over[1]`` of b [., .]."""
    if dtype is not None:
        a, b = a.astype(dtype), b.astype(dtype)
    contracted = tuple((axis,) for axis in over)
    return jax.lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def computed(z, a, b, bias, dtype=None) -> jax.Array:
    """Returns z, which is ``matmul(a, b, dtype)`` + bias [m], computed before; with its gradients.

    z itself gets none.
    """
    return z


def _computed_forward(z, a, b, bias, dtype):
    return z, (a, b)


def _computed_backward(dtype, kept, gradient):
    return None, *_backward(dtype, kept, gradient), jnp.sum(gradient, axis=0)


computed.defvjp(_computed_forward, _computed_backward)
