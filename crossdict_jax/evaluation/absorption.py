"""Feature absorption: parents that fall silent where one of their children is active."""

from __future__ import annotations

import numpy as np


def absorption(
    f: np.ndarray,
    W_dec: np.ndarray,
    *,
    codes: np.ndarray,
    directions: np.ndarray,
    parent: np.ndarray,
) -> dict[str, np.ndarray]:
    """Returns per planted child how often its parent's latent fails where the child is active.

    A child fires only where its parent does. A dictionary that saves a latent by letting the
    child's latent stand for both has absorbed the parent (Chanin et al. 2024, arXiv 2409.14507).
    The latent of a planted feature is the decoder row nearest to its direction. Misses on the
    parent's other rows are given beside, because a latent may also be merely bad.

    Args:
      f: [n, width], the dictionary's features of n rows.
      W_dec: [width, d].
      codes: [n, features], the planted activations of the same rows.
      directions: [features, d], planted.
      parent: int [features], -1 where a feature is no child.

    Returns:
      children: int [pairs]; rate [pairs]: share of the child's rows in which the parent's latent is
      silent; rate_alone [pairs]: the same of the parent's rows without that child; same_latent
      bool [pairs]: parent and child have one latent, so that absorption is not defined. A rate
      without rows is NaN.
    """
    latent = _nearest_rows(W_dec, directions)
    children = np.flatnonzero(parent >= 0)
    parents = parent[children]
    silent = f[:, latent[parents]] <= 0  # [n, pairs]
    child, own = codes[:, children] > 0, codes[:, parents] > 0
    return {
        "children": children,
        "rate": _share(silent, child),
        "rate_alone": _share(silent, own & ~child),
        "same_latent": latent[parents] == latent[children],
    }


def _nearest_rows(W_dec: np.ndarray, directions: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(W_dec, axis=1, keepdims=True)
    return (directions @ (W_dec / np.where(norms > 0, norms, 1)).T).argmax(axis=1)


def _share(event: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The share [pairs] of ``event`` [n, pairs] in the rows of ``among``."""
    rows = among.sum(axis=0)
    return np.where(rows > 0, (event & among).sum(axis=0) / np.maximum(rows, 1), np.nan)
