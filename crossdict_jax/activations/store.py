"""The store: paired rows of bfloat16 activations on disk, with checksums."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import ml_dtypes
import numpy as np

from crossdict_jax import models, modules
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.errors import UserError
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.training.stage import digest
from crossdict_jax.workdir import file_digest, read_json, understood, write_json

BLOCK = 2**14  # rows that are gone through at a time where there may be more than memory holds
MEND = "delete the activations folder and run extract_activations again"
End = tuple[str, Site]  # a model's folder name, and a site of it


@dataclass(frozen=True)
class Sites:
    """What dictionaries read and write."""

    writes: Mapping[End, End]  # {what one reads: what it writes}; the same, but for transcoders

    @classmethod
    def of_meta(cls, models: Mapping[str, dict]) -> Sites:
        """Inverse of ``to_meta``, for all models of a store."""
        writes = {}
        for name, about in models.items():
            for site in about["sites"]:
                model, output = about.get("outputs", {}).get(site, (name, site))
                writes[name, Site.parse(site)] = model, Site.parse(output)
        return cls(writes)

    def to_meta(self, name: str) -> dict:
        """Returns a model's entries of meta.json."""
        writes = {site: end for (model, site), end in self.writes.items() if model == name}
        other = {str(s): [m, str(o)] for s, (m, o) in writes.items() if (m, o) != (name, s)}
        return {"sites": list(map(str, writes))} | ({"outputs": other} if other else {})

    def stored(self, name: str) -> tuple[Site, ...]:
        """Returns the sites of a model that are read or written, ascending."""
        ends = {*self.writes, *self.writes.values()}
        return tuple(sorted(site for model, site in ends if model == name))


@dataclass(frozen=True)
class Rows:
    """An entry per paired text position: train rows, then validation, then test.

    Memory maps where they may be longer than memory.
    """

    document: np.ndarray  # int32 [n], index into the names in meta.json
    window: np.ndarray  # int32 [n], index into the windows
    byte_end: np.ndarray  # int32 [n], in the document's UTF-8 bytes
    position: np.ndarray  # int32 [n, models], token in the window, a BOS not counted
    token: np.ndarray  # int32 [n, models], the token that ends there
    split: np.ndarray  # int8 [n], index into SPLITS
    keep: np.ndarray  # bool [n], False: left out, by its values or after a control token

    def __len__(self) -> int:
        return len(self.document)

    def kept(self) -> dict[str, int]:
        """Returns the number of kept rows per split."""
        counts = np.zeros(len(SPLITS), int)
        for at in range(0, len(self), BLOCK):
            split, keep = self.split[at : at + BLOCK], self.keep[at : at + BLOCK]
            counts += np.bincount(split[keep], minlength=len(SPLITS))
        return dict(zip(SPLITS, counts.tolist()))


@dataclass(frozen=True)
class WindowTable:
    """The windows of text that the models read, as tokens."""

    document: np.ndarray  # int32 [windows]
    offsets: tuple[np.ndarray, ...]  # per model int64 [windows + 1], into ids
    ids: tuple[np.ndarray, ...]  # per model int32 [all tokens]

    def __len__(self) -> int:
        return len(self.document)

    def tokens(self, model: int, window: int) -> np.ndarray:
        """Returns the token ids of a window for the model of that index."""
        start, stop = self.offsets[model][window : window + 2]
        return self.ids[model][start:stop]

    def texts(self, model: int, windows: Iterable[int], bos: int | None) -> list[np.ndarray]:
        """Returns the token ids of windows, int32, with a BOS in front if there is one."""
        front = np.array([] if bos is None else [bos], np.int32)
        return [np.concatenate([front, self.tokens(model, window)]) for window in windows]


class Column:
    """An array that grows in a nameless file, which is gone with the process however that ends."""

    def __init__(self, directory: Path, dtype, *, width: int | None = None):
        """``width`` is the length of an entry that is an array."""
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        self._dtype, self._shape = np.dtype(dtype), () if width is None else (width,)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, array: np.ndarray) -> None:
        """Adds entries at the end, cast to the column's dtype."""
        self._file.write(np.asarray(array).astype(self._dtype).tobytes())
        self._length += len(array)

    def array(self) -> np.ndarray:
        """Returns all entries as a writable memory map."""
        shape = self._length, *self._shape
        if not self._length:  # an empty file cannot be mapped
            return np.empty(shape, self._dtype)
        self._file.flush()
        return np.memmap(self._file, self._dtype, "r+", shape=shape)


@dataclass(frozen=True)
class Store:
    """Activations of several models at several sites, on the same rows (text positions).

    ``rows`` and ``table`` are memory maps.
    """

    directory: Path
    models: tuple[str, ...]  # folder names
    paths: tuple[str, ...]  # the paths or ids that were read
    meta: dict
    rows: Rows
    table: WindowTable
    ends: Sites
    _verified: set = field(default_factory=set, repr=False)

    def select(self, split: str) -> np.ndarray:
        """Returns the row numbers int64 [m] of a split, kept rows alone; UserError if unknown."""
        if split not in SPLITS:
            raise UserError(f"There is no split {split!r}; use {', '.join(SPLITS)}.")
        return np.flatnonzero((self.rows.split == SPLITS.index(split)) & self.rows.keep)

    def has_bos(self, model: str) -> int | None:
        """Returns the id in front of every window of this model, or None."""
        return self.meta["models"][model]["bos"]

    def load_model(self, name: str) -> LanguageModel:
        """Returns a language model of the run; UserError if it is not the one that was read."""
        path, read = self.paths[self.models.index(name)], self.meta["models"][name].get("weights")
        lm = models.load(path)
        if read not in (None, weights_digest(lm)):
            raise UserError(
                f"{path} has changed since {self.directory} was extracted; restore it, or {MEND}."
            )
        return lm

    def sites_of(self, model: str) -> tuple[Site, ...]:
        """Returns the sites of this model that dictionaries read."""
        return tuple(site for name, site in self.ends.writes if name == model)

    def output_of(self, model: str, site: Site) -> End:
        """Returns the (model, site) that dictionaries of a site write; mostly the same."""
        return self.ends.writes[model, site]

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites at which some model's dictionaries read, ascending."""
        return tuple(sorted({site for _, site in self.ends.writes}))

    def d_model(self, model: str) -> int:
        return self.meta["models"][model]["d_model"]

    def tokens(self, model: str, rows: np.ndarray) -> np.ndarray:
        """Returns the tokens int32 [m] that end at these rows."""
        return self.rows.token[rows, self.models.index(model)]

    def read(self, model: str, site: Site, rows: np.ndarray) -> np.ndarray:
        """Returns bfloat16 activations [m, d_model] of these row numbers, in their order.

        A shard's checksum is verified when it is first read. ``rows`` may also be a mask of all.

        Raises:
          UserError: a shard is missing, truncated or altered, or there is no such model, site or
            row.
        """
        if site not in self.ends.stored(model):
            sites = (f"{m} at {', '.join(map(str, self.sites_of(m)))}" for m in self.models)
            raise UserError(
                f"{self.directory} has no {model} at {site}; it has {'; '.join(sites)}."
            )
        rows, n = np.asarray(rows), len(self.rows.document)
        if rows.dtype == bool and len(rows) != n:
            raise UserError(f"A mask of the rows of {self.directory} is {n} long, not {len(rows)}.")
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        if len(strange := rows[(rows < 0) | (rows >= n)]):
            raise UserError(f"{self.directory} has the rows 0 to {n - 1}, not {strange[0]}.")
        with understood(self.directory / "meta.json", mend=MEND):
            starts = np.asarray(self.meta["shard_starts"])  # first row of every shard, and the end
            shards = np.searchsorted(starts, rows, side="right") - 1
            elsewhere = self.meta["models"][model].get("directory", ".")  # of another store
            d_model = self.d_model(model)
            out = np.empty((0, d_model), np.uint16)
            for shard in np.unique(shards):
                index, name = shards == shard, shard_name(model, str(site), shard)
                path = Path(os.path.normpath(self.directory / elsewhere / name))
                if name not in self._verified:
                    check_file(path, self.meta["checksums"][name])
                    self._verified.add(name)
                with understood(path, mend=MEND):
                    x = np.load(path, mmap_mode="r", allow_pickle=False)
                    if x.shape[1] != d_model:  # before memory is asked for
                        raise ValueError(f"{x.shape[1]} wide, not {d_model}")
                    out = out if len(out) else np.empty((len(rows), d_model), np.uint16)
                    out[index] = x[rows[index] - starts[shard]]
        return out.view(ml_dtypes.bfloat16)


def weights_digest(lm: LanguageModel) -> str:
    """Returns a checksum of all that a language model computes with."""
    return digest([repr(lm.config), modules.fingerprint(lm)])


def shard_name(model: str, site: str, shard: int) -> str:
    """Returns a shard's path in the store."""
    return f"{model}/{site}/shard-{shard:05d}.npy"


def check_file(path: Path, expected: str) -> None:
    """Raises UserError if the sha256 of the file is not ``expected``."""
    if not os.path.exists(path):  # also where the name is none
        raise UserError(f"{path} is missing; {MEND}.")
    if file_digest(path) != expected:
        raise UserError(f"{path} is altered or cut short (checksum mismatch); {MEND}.")


def open_store(directory: Path) -> Store:
    """Returns the finished store in ``directory``; UserError if missing, unfinished or damaged."""
    directory = Path(directory)
    if not (directory / "meta.json").exists():
        raise UserError(f"{directory} holds no finished store; run extract_activations first.")
    with understood(directory, mend=MEND):
        meta = read_json(directory / "meta.json")
        if (sealed := meta.pop("seal", None)) and sealed != digest(meta):
            raise UserError(f"{directory / 'meta.json'} is altered (checksum mismatch); {MEND}.")
        checksums = meta.get("checksums", {})
        index = {name for name in checksums if "/" not in name}  # shards: when they are read
        for name in sorted(index | {"rows-document.npy"}):
            check_file(directory / name, checksums.get(name, ""))

        def column(name: str) -> np.ndarray:
            return np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(
                np.ndarray
            )

        models = range(len(meta["models"]))
        offsets, ids = (
            tuple(column(f"windows-{n}-{i}") for i in models) for n in ("offsets", "ids")
        )
        return Store(
            directory=directory,
            models=tuple(meta["models"]),
            paths=tuple(m["path"] for m in meta["models"].values()),
            meta=meta,
            rows=Rows(**{f.name: column(f"rows-{f.name}") for f in fields(Rows)}),
            table=WindowTable(column("windows-document"), offsets, ids),
            ends=Sites.of_meta(meta["models"]),
        )


def finish(directory: Path, rows: Rows, table: WindowTable, meta: dict, shards: dict) -> None:
    """Writes the columns of rows and windows and, last, meta.json with all checksums and its own.

    ``shards`` are {file: sha256} of those that lie there, beside what ``meta`` knows.
    """
    columns = {f"rows-{f.name}.npy": getattr(rows, f.name) for f in fields(Rows)}
    columns["windows-document.npy"] = table.document
    for name in ("offsets", "ids"):
        of_models = enumerate(getattr(table, name))
        columns |= {f"windows-{name}-{i}.npy": column for i, column in of_models}
    for name, column in columns.items():
        np.save(directory / name, column)
    index = {name: file_digest(directory / name) for name in columns}
    meta = meta | {"checksums": meta.get("checksums", {}) | index | shards}
    write_json(directory / "meta.json", meta | {"seal": digest(meta)})
    shutil.rmtree(directory / "shards", ignore_errors=True)  # stamps of an interrupted run


def save_shard(directory: Path, name: str, x: np.ndarray) -> dict[str, str]:
    """Writes bfloat16 rows [n, d_model] as a shard; returns {name: sha256}."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, x.view(np.uint16))
    return {name: file_digest(path)}


def write_store(
    directory: Path,
    activations: Mapping[str, np.ndarray],
    *,
    site: Site,
    document: np.ndarray,
    tokens: Sequence[np.ndarray],
    split: np.ndarray,
) -> Store:
    """Writes rows that no language model has read as a finished store, and opens it.

    Every document is one window; a model's name is its path.

    Args:
      activations: {model: [n, d_model]}; bfloat16 is kept.
      document: int32 [n], ascending from 0.
      tokens: per model int32 [n], the token that ends at the row.
      split: int8 [n], index into SPLITS.
    """
    n, token = len(document), np.stack(tokens, axis=-1)
    byte_end, position = np.arange(n, dtype=np.int32), np.ones(token.shape, np.int32)
    rows = Rows(document, document, byte_end, position, token, split, np.ones(n, bool))
    documents = np.arange(int(document.max()) + 1, dtype=np.int32)
    offsets = np.searchsorted(document, np.arange(len(documents) + 1))
    table = WindowTable(documents, (offsets,) * len(activations), tuple(tokens))
    starts, shards = [*range(0, n, BLOCK), n], {}
    for model, x in activations.items():
        for shard, start in enumerate(starts[:-1]):
            part = x[start : start + BLOCK].astype(ml_dtypes.bfloat16)
            shards |= save_shard(directory, shard_name(model, str(site), shard), part)
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
    }
    finish(directory, rows, table, meta, shards)
    return open_store(directory)
