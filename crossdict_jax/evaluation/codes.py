"""The Pearson correlations of pairs of features, and of all of them by tiles."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from crossdict_jax.maps.base import slices
from crossdict_jax.maps.codes import Codes, Moments, sparse_pays
from crossdict_jax.ops import exact

ROWS = 4096  # rows that are dense at a time
TILE = 2**24  # correlations held at a time
SPARSE_COST = 30  # multiply-adds of a dense product in the time of one sparse one, two CPU cores


def paired_products(a: Codes, b: Codes) -> np.ndarray:
    """Returns the sum over rows of column j of a times column j of b, float64 [width]."""
    a, b = (codes.astype(np.float64, copy=False) for codes in (a, b))
    return np.asarray(a.multiply(b).sum(axis=0))


def paired_correlations(a: Codes, b: Codes, products: np.ndarray | None = None) -> np.ndarray:
    """Returns the correlation of column j of a with column j of b, float64 [width]; 0 if constant.

    ``products``: ``paired_products`` of rows in another order.
    """
    products = paired_products(a, b) if products is None else products
    of_a, of_b = Moments.of(a), Moments.of(b)
    centred = products - a.shape[0] * of_a.mean * of_b.mean
    return np.clip(centred * of_a.scale * of_b.scale, -1, 1)


def correlations(a: Codes, b: Codes) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (columns of a, their correlations with all columns of b, float32 [tile, width_b]).

    0 for a constant feature. Products are sparse or, where that costs more, dense on the device.
    """
    of_b, columns = Moments.of(b), sparse.csc_array(a)
    few = sparse_pays(a, b, SPARSE_COST)
    for at in slices(a.shape[1], max(1, TILE // max(1, b.shape[1]))):
        x = sparse.csr_array(columns[:, at])
        of_a = Moments.of(x)
        if few:
            products = (columns[:, at].T.astype(np.float64) @ b).toarray()  # float32 would cancel
            products -= a.shape[0] * of_a.mean[:, None] * of_b.mean[None, :]
            products *= of_a.scale[:, None] * of_b.scale[None, :]
            products = products.astype(np.float32)
        else:
            products = 0.0
            for rows in slices(a.shape[0], ROWS):
                block = of_a.standardised(x[rows]), of_b.standardised(b[rows])
                products += np.asarray(exact(jnp.asarray(block[0]).T, block[1]))
        yield at, products
