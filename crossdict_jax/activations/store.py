"""The store: paired rows of bfloat16 activations on disk, with checksums and provenance."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np

from crossdict_jax.activations.column import Column, columns_of, stretches
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site
from crossdict_jax.workdir import read_json, write_json


@dataclass(frozen=True)
class Rows:
    """One entry per paired text position; train rows come first, then validation, then test.

    Arrays, or columns on the disk while they are made.
    """

    document: np.ndarray  # int32 [n], index into Store.document_names
    window: np.ndarray  # int32 [n], index into Windows
    byte_end: np.ndarray  # int32 [n], in the document's UTF-8 bytes
    position: np.ndarray  # int32 [n, models], token in the window, a BOS not counted
    token: np.ndarray  # int32 [n, models], the token that ends there
    split: np.ndarray  # int8 [n], index into SPLITS
    keep: np.ndarray  # bool [n], False: a norm outlier in some model at some site

    def __len__(self) -> int:
        return len(self.document)


@dataclass(frozen=True)
class WindowTable:
    """The stretches of text that the models read, as their tokens; as arrays or as columns."""

    document: np.ndarray  # int32 [windows]
    offsets: tuple[np.ndarray, ...]  # per model int64 [windows + 1], into ids
    ids: tuple[np.ndarray, ...]  # per model int32 [all tokens]

    def __len__(self) -> int:
        return len(self.document)

    def tokens(self, model: int, window: int) -> np.ndarray:
        """Returns the token ids [tokens] of one window for the model of that index."""
        start, stop = self.span(model, window, window + 1)
        return self.ids[model][start:stop]

    def span(self, model: int, first: int, last: int) -> tuple[int, int]:
        """Returns where the tokens of the windows from ``first`` to before ``last`` lie."""
        offsets = self.offsets[model]
        return int(offsets[first : first + 1][0]), int(offsets[last : last + 1][0])


@dataclass(frozen=True)
class Store:
    """Activations of several models at several sites, on the same rows (text positions).

    ``rows`` and ``table`` are read when they are first asked for, and then held.
    """

    directory: Path
    models: tuple[str, ...]  # folder names
    paths: tuple[str, ...]  # the paths or ids that were read
    meta: dict
    _verified: set = field(default_factory=set, repr=False)

    @cached_property
    def rows(self) -> Rows:
        with np.load(self.directory / "rows.npz", allow_pickle=False) as file:
            return _rows(file)

    @cached_property
    def table(self) -> WindowTable:
        with np.load(self.directory / "windows.npz", allow_pickle=False) as file:
            return _table(file)

    def columns(self) -> tuple[Rows, WindowTable]:
        """Returns rows and windows as they lie on the disk, to be gone through a part at a time."""
        rows = columns_of(self.directory / "rows.npz")
        return _rows(rows), _table(columns_of(self.directory / "windows.npz"))

    @property
    def document_names(self) -> list[str]:
        return self.meta["documents"]

    @property
    def window_document(self) -> np.ndarray:
        return self.table.document

    def select(self, split: str) -> np.ndarray:
        """Returns the numbers int64 [m] of the kept rows of a split."""
        return np.flatnonzero((self.rows.split == SPLITS.index(split)) & self.rows.keep)

    def windows(self, split: str) -> np.ndarray:
        """Returns the numbers of the windows that hold kept rows of a split, ascending."""
        return np.unique(self.rows.window[self.select(split)])

    def window_tokens(self, model: str, window: int) -> np.ndarray:
        """Returns the token ids int32 [tokens] of one window, without a BOS."""
        return self.table.tokens(self.models.index(model), window)

    def has_bos(self, model: str) -> int | None:
        """Returns the id that is put in front of every window of this model, or None."""
        return self.meta["models"][model]["bos"]

    def sites_of(self, model: str) -> tuple[Site, ...]:
        """Returns the sites of this model that dictionaries read."""
        return tuple(Site.parse(s) for s in self.meta["models"][model]["sites"])

    def output_of(self, model: str, site: Site) -> tuple[str, Site]:
        """Returns the model and site that this place's dictionaries write: of most, itself."""
        other = self.meta["models"][model].get("outputs", {}).get(str(site))
        return (other[0], Site.parse(other[1])) if other else (model, site)

    def _has(self, model: str, site: Site) -> bool:
        places = [(m, s) for m in self.models for s in self.sites_of(m)]
        return (model, site) in {*places, *(self.output_of(*place) for place in places)}

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites at which some model's dictionaries read, ascending."""
        return tuple(sorted({site for m in self.models for site in self.sites_of(m)}))

    def d_model(self, model: str) -> int:
        return self.meta["models"][model]["d_model"]

    def tokens(self, model: str, rows: np.ndarray) -> np.ndarray:
        """Returns the tokens int32 [m] that end at these rows."""
        return self.rows.token[rows, self.models.index(model)]

    def read(self, model: str, site: Site, rows: np.ndarray) -> np.ndarray:
        """Returns bfloat16 activations [m, d_model] of the given row numbers, in their order.

        A shard's checksum is verified when it is first touched.

        Raises:
          UserError: a shard is missing, truncated or altered (it is named), or the store has no
            such model or site.
        """
        if not self._has(model, site):
            there = (f"{m} at {', '.join(map(str, self.sites_of(m)))}" for m in self.models)
            raise UserError(
                f"{self.directory} has no {model} at {site}; it has {'; '.join(there)}."
            )
        rows = np.asarray(rows, np.int64)
        starts = np.asarray(self.meta["shard_starts"])  # first row of every shard, and the end
        shards = np.searchsorted(starts, rows, side="right") - 1
        out = np.empty((len(rows), self.d_model(model)), np.uint16)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._shard(model, str(site), int(shard))[rows[here] - starts[shard]]
        return out.view(ml_dtypes.bfloat16)

    def _shard(self, model: str, site: str, shard: int) -> np.ndarray:
        name = shard_name(model, site, shard)
        elsewhere = self.meta["models"][model].get("directory", ".")  # of another store
        path = Path(os.path.normpath(self.directory / elsewhere / name))
        if name not in self._verified:
            check_file(path, self.meta["checksums"][name])
            self._verified.add(name)
        return np.load(path, mmap_mode="r", allow_pickle=False)


def shard_name(model: str, site: str, shard: int) -> str:
    """Returns a shard's path within the store."""
    return f"{model}/{site}/shard-{shard:05d}.npy"


def digest(path: Path) -> str:
    """Returns the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, expected: str) -> None:
    """Raises UserError if the file is not the one whose sha256 was ``expected``."""
    if not path.exists():
        raise UserError(
            f"{path} is missing; delete the activations folder and run extract_activations again."
        )
    if digest(path) != expected:
        raise UserError(
            f"{path} is altered or cut short (checksum mismatch); delete the activations folder "
            "and run extract_activations again."
        )


def open_store(directory: Path) -> Store:
    """Returns the finished store in ``directory``.

    Raises:
      UserError: it is missing, unfinished or damaged.
    """
    directory = Path(directory)
    if not (directory / "meta.json").exists():
        raise UserError(f"{directory} holds no finished store; run extract_activations first.")
    meta = read_json(directory / "meta.json")
    for name in ("rows.npz", "windows.npz"):
        check_file(directory / name, meta["checksums"][name])
    return Store(
        directory=directory,
        models=tuple(meta["models"]),
        paths=tuple(m["path"] for m in meta["models"].values()),
        meta=meta,
    )


def write_store(
    directory: Path,
    activations: Mapping[str, np.ndarray],
    *,
    site: Site,
    document: np.ndarray,
    tokens: Sequence[np.ndarray],
    split: np.ndarray,
    shard_rows: int = 2**14,
) -> Store:
    """Writes rows that no language model has read as a finished store, and opens it.

    Every document is one window, and the name of a model is its path.

    Args:
      activations: {model: [n, d_model]}; bfloat16 is kept.
      document: int32 [n], ascending from 0.
      tokens: per model int32 [n], the token that ends at the row.
      split: int8 [n], index into SPLITS.
    """
    n, models, files = len(document), len(activations), ["rows.npz", "windows.npz"]
    directory.mkdir(parents=True, exist_ok=True)
    byte_end, position = np.arange(n, dtype=np.int32), np.ones((n, models), np.int32)
    token, keep = np.stack(tokens, axis=-1), np.ones(n, bool)
    rows = Rows(document, document, byte_end, position, token, split, keep)
    save_rows(directory / "rows.npz", rows)
    documents = np.arange(int(document.max()) + 1, dtype=np.int32)
    offsets = np.searchsorted(document, np.arange(len(documents) + 1))
    table = WindowTable(documents, (offsets,) * models, tuple(tokens))
    save_table(directory / "windows.npz", table)
    starts = [*range(0, n, shard_rows), n]
    for name, x in activations.items():
        for shard, start in enumerate(starts[:-1]):
            files.append(shard_name(name, str(site), shard))
            (directory / files[-1]).parent.mkdir(parents=True, exist_ok=True)
            part = x[start : start + shard_rows].astype(ml_dtypes.bfloat16).view(np.uint16)
            np.save(directory / files[-1], part)
    about = {"bos": None, "sites": [str(site)]}
    meta = {
        "models": {
            name: {"path": name, "d_model": x.shape[1]} | about for name, x in activations.items()
        },
        "rows": n,
        "dtype": "bfloat16",
        "shard_starts": starts,
        "documents": [f"document-{i}" for i in documents],
        "text": {"source": "none"},
        "checksums": {file: digest(directory / file) for file in files},
    }
    write_json(directory / "meta.json", meta)
    return open_store(directory)


def _rows(file: Mapping[str, np.ndarray | Column]) -> Rows:
    return Rows(**{f.name: file[f.name] for f in fields(Rows)})


def _table(file: Mapping[str, np.ndarray | Column]) -> WindowTable:
    models = range((len(file) - 1) // 2)
    return WindowTable(
        document=file["document"],
        offsets=tuple(file[f"offsets_{i}"] for i in models),
        ids=tuple(file[f"ids_{i}"] for i in models),
    )


def save_rows(path: Path, rows: Rows) -> None:
    _save(path, {f.name: getattr(rows, f.name) for f in fields(Rows)})


def save_table(path: Path, table: WindowTable) -> None:
    per_model = {f"offsets_{i}": a for i, a in enumerate(table.offsets)}
    per_model |= {f"ids_{i}": a for i, a in enumerate(table.ids)}
    _save(path, {"document": table.document} | per_model)


def _save(path: Path, arrays: dict[str, np.ndarray | Column]) -> None:
    """Writes the file that np.savez would write, a stretch of every array at a time."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                descr = np.lib.format.dtype_to_descr(array.dtype)
                header = {"descr": descr, "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(file, header)
                for here in stretches(len(array)):
                    file.write(array[here].tobytes())
