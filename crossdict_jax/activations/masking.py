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

BLOCK = 8192  # rows at a time


@dataclass(frozen=True)
class Masked:
    """What is left out of a store.

    Attributes:
      outlier: bool [n], rows of a norm far above the median at some site of some model.
      nonfinite: bool [n], rows that hold NaN or infinity at some.
      outliers_by_site: {"model site": how many rows}.
      nonfinite_by_site: {"model site": how many rows}.
    """

    outlier: np.ndarray
    nonfinite: np.ndarray
    outliers_by_site: dict[str, int]
    nonfinite_by_site: dict[str, int]

    @property
    def keep(self) -> np.ndarray:
        """bool [n]: rows that are left out at no site of no model."""
        return ~(self.outlier | self.nonfinite)

    def to_json(self) -> dict:
        """What pairing.json says of it: each row once, outliers first, and then by site."""
        return {
            "norm_outliers": int(self.outlier.sum()),
            "norm_outliers_by_site": self.outliers_by_site,
            "nonfinite": int((self.nonfinite & ~self.outlier).sum()),
            "nonfinite_by_site": self.nonfinite_by_site,
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
    found = Masked(np.zeros(len(rows), bool), np.zeros(len(rows), bool), {}, {})
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
            found.outliers_by_site[place] = int(high.sum())
            found.nonfinite_by_site[place] = int((~finite).sum())
            found.outlier[high], found.nonfinite[~finite] = True, True
    return found


def _refusal(place: str, finite: np.ndarray, rows: Rows, documents: Sequence[str]) -> str:
    first, count = int(np.argmin(finite)), int((~finite).sum())
    return (
        f"{place}: row {first} (document {documents[rows.document[first]]}, byte "
        f"{rows.byte_end[first]}) holds NaN or infinity, the first of {count} such rows of "
        f"{len(finite)}; extract.nonfinite=skip leaves them out (in a new --workdir)."
    )


def _norms(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(norms [n], which rows are finite [n]) of one shard."""
    x = np.load(path, mmap_mode="r", allow_pickle=False).view(ml_dtypes.bfloat16)
    blocks = (x[at : at + BLOCK].astype(np.float32) for at in range(0, max(len(x), 1), BLOCK))
    of_blocks = [(np.linalg.norm(b, axis=1), np.isfinite(b).all(axis=1)) for b in blocks]
    norms, finite = map(np.concatenate, zip(*of_blocks))
    return norms, finite
