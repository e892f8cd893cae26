"""Which rows of a store are left out: norm outliers, and rows that hold NaN or infinity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from crossdict_jax.activations import pairing
from crossdict_jax.activations.store import Rows, shard_name
from crossdict_jax.config import ExtractConfig
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site


@dataclass(frozen=True)
class Masked:
    """What is left out of a store, by model and site.

    Attributes:
      outliers: {"model site": bool [n]}, rows of a norm far above the median.
      nonfinite: {"model site": bool [n]}, rows that hold NaN or infinity.
    """

    outliers: dict[str, np.ndarray]
    nonfinite: dict[str, np.ndarray]

    @property
    def keep(self) -> np.ndarray:
        """bool [n]: rows that are left out at no site of no model."""
        return ~np.any([*self.outliers.values(), *self.nonfinite.values()], axis=0)

    def to_json(self) -> dict:
        """What pairing.json says of it: each row once, outliers first, and then by site."""
        outlier = np.any(list(self.outliers.values()), axis=0)
        return {
            "norm_outliers": int(outlier.sum()),
            "norm_outliers_by_site": {k: int(v.sum()) for k, v in self.outliers.items()},
            "nonfinite": int((~self.keep & ~outlier).sum()),
            "nonfinite_by_site": {k: int(v.sum()) for k, v in self.nonfinite.items()},
        }


def masked(
    settings: ExtractConfig,
    directory: Path,
    sites: dict[str, Sequence[Site]],
    rows: Rows,
    *,
    shards: int,
    documents: Sequence[str],
) -> Masked:
    """Returns which of the rows in a directory of shards are left out.

    Outliers are so against the median norm of the training rows that are finite.

    Args:
      sites: {model: the sites at which it was read}.
      documents: their names.

    Raises:
      UserError: a row is not finite and ``extract.nonfinite`` says refuse (it is named), or no
        training row is finite.
    """
    train = rows.split == 0
    outliers, nonfinite = {}, {}
    for model, of_model in sites.items():
        for site in of_model:
            files = (directory / shard_name(model, str(site), i) for i in range(shards))
            norms, finite = map(np.concatenate, zip(*map(_norms, files)))
            place = f"{model} {site}"
            if not finite.all() and settings.nonfinite == "refuse":
                raise UserError(_refusal(place, finite, rows, documents))
            if not (train & finite).any():
                raise UserError(f"{place}: no training row is finite; look at the model's weights.")
            high = pairing.norm_outliers(
                np.where(finite, norms, 0.0), factor=settings.norm_mask, reference=train & finite
            )
            outliers[place], nonfinite[place] = high, ~finite
    return Masked(outliers, nonfinite)


def _refusal(place: str, finite: np.ndarray, rows: Rows, documents: Sequence[str]) -> str:
    first, count = int(np.argmin(finite)), int((~finite).sum())
    return (
        f"{place}: row {first} (document {documents[rows.document[first]]}, byte "
        f"{rows.byte_end[first]}) holds NaN or infinity, the first of {count} such rows of "
        f"{len(finite)}; extract.nonfinite=skip leaves them out (in a new --workdir)."
    )


def _norms(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(norms [n], which rows are finite [n]) of one shard."""
    x = np.load(path, allow_pickle=False).view(ml_dtypes.bfloat16).astype(np.float32)
    finite = np.isfinite(x).all(axis=1)
    return np.linalg.norm(x, axis=1), finite
