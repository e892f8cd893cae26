"""Which rows of a store are left out: norm outliers, and rows that hold NaN or infinity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from crossdict_jax.activations.column import Column, new_column, stretches
from crossdict_jax.activations.median import median_of
from crossdict_jax.activations.store import Rows, shard_name
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import ExtractConfig
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site

BLOCK = 8192  # rows at a time


@dataclass(frozen=True)
class Masked:
    """What is left out of a store.

    Attributes:
      keep: bool [n], rows that are left out at no site of no model.
      outliers: rows of a norm far above the median at some site of some model.
      nonfinite: the others that hold NaN or infinity at some.
      outliers_by_site: {"model site": how many rows}.
      nonfinite_by_site: {"model site": how many rows}.
    """

    keep: Column
    outliers: int
    nonfinite: int
    outliers_by_site: dict[str, int]
    nonfinite_by_site: dict[str, int]

    def to_json(self) -> dict:
        """What pairing.json says of it: each row once, outliers first, and then by site."""
        return {
            "norm_outliers": self.outliers,
            "norm_outliers_by_site": self.outliers_by_site,
            "nonfinite": self.nonfinite,
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

    Outliers are so against the median norm of the training rows that are finite. Attention sinks
    have such norms, tens of times the others'.

    Args:
      sites: {model: the sites at which it was read}.
      documents: their names.

    Raises:
      UserError: a row is not finite and ``extract.nonfinite`` says refuse (it is named), or no
        training row is finite.
    """
    norms, highest, nonfinite_by_site = {}, {}, {}
    for model, site in ((model, site) for model, of_model in sites.items() for site in of_model):
        place = f"{model} {site}"
        files = (directory / shard_name(model, str(site), i) for i in range(shards))
        norms[place] = _norms(files, directory)
        bad = _count_bad(norms[place])
        if bad and settings.nonfinite == "refuse":
            raise UserError(_refusal(place, norms[place], bad, rows, documents))
        median = median_of(partial(_finite_training, norms[place], rows))
        if median is None:
            raise UserError(f"{place}: no training row is finite; look at the model's weights.")
        highest[place], nonfinite_by_site[place] = settings.norm_mask * median, bad
    keep, counts = new_column(directory, bool), Counter()
    for here in stretches(len(rows)):
        of_places = {place: column[here] for place, column in norms.items()}
        high = {place: x > highest[place] for place, x in of_places.items()}
        outlier = np.any(list(high.values()), axis=0)
        bad = np.any(np.isnan(list(of_places.values())), axis=0)
        keep.append(~(outlier | bad))
        counts.update({place: int(x.sum()) for place, x in high.items()})
        counts.update(outliers=int(outlier.sum()), nonfinite=int((bad & ~outlier).sum()))
    return Masked(
        keep=keep,
        outliers=counts["outliers"],
        nonfinite=counts["nonfinite"],
        outliers_by_site={place: counts[place] for place in norms},
        nonfinite_by_site=nonfinite_by_site,
    )


def _norms(files: Iterable[Path], directory: Path) -> Column:
    """float32 [n], the norm of every row of these shards; NaN: the row is not finite."""
    norms = new_column(directory, np.float32)
    for file in files:
        x = np.load(file, mmap_mode="r", allow_pickle=False).view(ml_dtypes.bfloat16)
        for at in range(0, len(x), BLOCK):
            block = x[at : at + BLOCK].astype(np.float32)
            finite = np.isfinite(block).all(axis=1)
            norms.append(np.where(finite, np.linalg.norm(block, axis=1), np.nan))
    return norms


def _count_bad(norms: Column) -> int:
    return sum(int(np.isnan(norms[here]).sum()) for here in stretches(len(norms)))


def _refusal(place: str, norms: Column, bad: int, rows: Rows, documents: Sequence[str]) -> str:
    numbers = (here.start + np.flatnonzero(np.isnan(norms[here])) for here in stretches(len(norms)))
    first = int(next(found[0] for found in numbers if len(found)))
    row = slice(first, first + 1)
    return (
        f"{place}: row {first} (document {documents[rows.document[row][0]]}, byte "
        f"{rows.byte_end[row][0]}) holds NaN or infinity, the first of {bad} such rows of "
        f"{len(norms)}; extract.nonfinite=skip leaves them out (in a new --workdir)."
    )


def _finite_training(norms: Column, rows: Rows) -> Iterator[np.ndarray]:
    for here in stretches(len(norms)):
        found = norms[here][rows.split[here] == SPLITS.index("train")]
        yield found[~np.isnan(found)]
