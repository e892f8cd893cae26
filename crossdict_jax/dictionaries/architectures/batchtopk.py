"""BatchTopK dictionaries: k features a row on average, one threshold at inference."""

from crossdict_jax.dictionaries.base import BatchSelected


class BatchTopK(BatchSelected):
    """f = the batch * k largest of relu(z) in the whole batch;  loss = FVU + auxk, as of TopK.

    A row takes as many features as it needs. At inference no row may depend on the others:
    f = relu(z) 1[z > threshold] (Bussmann et al. 2024, arXiv 2412.06410).
    """

    reads = ("k", "products")
    saelens = "jumprelu"
