"""Extraction: every model reads every window once, and its paired rows go into the store."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from crossdict_jax import models
from crossdict_jax.activations.column import stretches
from crossdict_jax.activations.masking import Masked, masked
from crossdict_jax.activations.outputs import Place, outputs, to_read
from crossdict_jax.activations.plan import Plan, Reading, make_plan
from crossdict_jax.activations.store import (
    Rows,
    Store,
    digest,
    open_store,
    save_rows,
    save_table,
    shard_name,
)
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import Config, ExtractConfig, model_layers
from crossdict_jax.errors import UserError
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.models.run import Runner
from crossdict_jax.training.stage import device_figures
from crossdict_jax.workdir import Workdir, model_names, read_json, write_json


def extract(config: Config, work: Workdir) -> Store:
    """Reads the text with every model, writes the store and results/pairing.json, and returns it.

    Killed and run again, it goes on with the first shard that is not there; a finished store is
    opened as it is.

    Raises:
      UserError: a layer outside a model, text that a model cannot read, no room on the disk,
        activations that are not finite, or a retrieval pool larger than the test rows.
    """
    if (work.activations / "meta.json").exists():
        store = open_store(work.activations)
        _check_pool(config, _kept(store.columns()[0])["test"])
        return store
    started = time.perf_counter()
    names = model_names(config.models)
    lms = [models.load(path) for path in config.models]
    inputs = [tuple(Site(i, config.site) for i in layers) for layers in model_layers(config)]
    written = outputs(config, names, inputs)
    sites = [to_read(name, written) for name in names]
    for lm, of_model in zip(lms, sites):
        for site in of_model:
            models.check_site(lm.config, site, lm.name)
    work.activations.mkdir(parents=True, exist_ok=True)
    plan = make_plan(config, lms, work.activations)
    _check_pool(config, plan.of_split["test"])
    check_space(work.activations, lms, sites, rows=len(plan.rows))
    counts = read_models(config, work.activations, names, lms, sites, plan)
    kept = _finish(config, work, names, lms, sites, plan, written)
    seconds = time.perf_counter() - started
    rows = len(plan.rows)
    figures = {"rows": rows, "rows_per_s": counts["rows"] / seconds}
    figures["tokens_per_s"] = counts["tokens"] / max(counts["seconds"], 1e-9)
    work.record_timing("extract_activations", wall_s=seconds, **figures, **device_figures())
    _check_pool(config, kept["test"])  # norm outliers are gone now
    return open_store(work.activations)


def _check_pool(config: Config, test_rows: int) -> None:
    """Refuses before anything is trained what evaluation could not draw."""
    if config.evaluation.pool > test_rows:
        raise UserError(
            f"evaluation.pool={config.evaluation.pool} is more than the {test_rows} test rows; "
            "lower it, use 0 for min(8192, rows), or raise text.documents."
        )


def check_space(directory: Path, lms, sites, *, rows: int) -> None:
    """Raises UserError if the disk cannot take the store of these models."""
    needed = 2 * rows * sum(len(s) * lm.config.d_model for lm, s in zip(lms, sites))
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"The store needs {needed / 1e9:.1f} GB and {directory} has {free / 1e9:.1f} GB free; "
            "free some space or lower text.documents."
        )


# ---------------------------------------------------------------- running the models


def read_models(config, directory, names, lms, sites, plan: Reading) -> dict:
    """Runs every model over all windows, only as deep as its highest site.

    Writes every shard that is not there yet; returns how much was read, and how fast.
    """
    from tqdm import tqdm

    counts = {"rows": 0, "tokens": 0, "seconds": 0.0}
    shards = len(plan.shard_starts) - 1
    todo = [i for i in range(shards) if not _is_done(directory, i, plan)]
    readers = [Reader(config.extract, lm, s, bos) for lm, s, bos in zip(lms, sites, plan.bos)]
    total = len(todo) * len(lms)
    with tqdm(total=total, desc="extract activations", unit="shard") as progress:
        for i in todo:
            started, checksums = time.perf_counter(), {}
            for m, reader in enumerate(readers):
                checksums |= _write_shard(directory, names[m], reader, plan, m, i)
                progress.update()
            write_json(_done(directory, i), {"text": plan.text, "files": checksums})
            counts["seconds"] += time.perf_counter() - started
            first, last = _shard_windows(plan, i)
            counts["rows"] += int(plan.shard_starts[i + 1] - plan.shard_starts[i])
            spans = [plan.table.span(m, first, last) for m in range(len(lms))]
            counts["tokens"] += sum(stop - start for start, stop in spans)
    return counts


def _done(directory: Path, i: int) -> Path:
    return directory / "shards" / f"{i:05d}.json"


def _is_done(directory: Path, i: int, plan: Reading) -> bool:
    if not _done(directory, i).exists():
        return False
    if read_json(_done(directory, i))["text"] != plan.text:
        raise UserError(
            f"The text has changed since {directory} was begun; delete it to extract again."
        )
    return True


def _shard_windows(plan: Reading, i: int) -> tuple[int, int]:
    """First window of a shard, and the one after its last."""
    return i * plan.shard_windows, min((i + 1) * plan.shard_windows, len(plan.table))


class Reader:
    """Runs one model over windows of tokens, only as deep as its highest site.

    Args:
      bos: the id put in front of every window, or None.
    """

    def __init__(
        self, config: ExtractConfig, lm: LanguageModel, sites: Sequence[Site], bos: int | None
    ):
        self.lm, self.sites = lm, tuple(sites)
        self._front = np.array([] if bos is None else [bos], np.int32)
        self._runner = Runner(lm, batch_size=config.batch_size, dtype=config.matmul_dtype)

    def read(self, windows: Sequence[np.ndarray]) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yields (window's index, per site bfloat16 [tokens, d_model]), in order of length."""
        tokens = [np.concatenate([self._front, w]) for w in windows]
        for i, x in self._runner.stream(tokens, self.sites):
            yield i, [of_site[len(self._front) :] for of_site in x]


def _write_shard(directory, name, reader: Reader, plan: Reading, m: int, i: int) -> dict:
    """Writes one model's files of one shard; returns their checksums."""
    first, last = _shard_windows(plan, i)
    start, stop = plan.shard_starts[i : i + 2]
    rows, position = plan.rows.window[start:stop], plan.rows.position[start:stop][:, m]
    d_model = reader.lm.config.d_model
    out = [np.empty((stop - start, d_model), ml_dtypes.bfloat16) for _ in reader.sites]
    windows = [plan.table.tokens(m, w) for w in range(first, last)]
    for place, captured in reader.read(windows):
        here = slice(*np.searchsorted(rows, [first + place, first + place + 1]))
        positions = position[here]
        for array, x in zip(out, captured):
            array[here] = x[positions]
    checksums = {}
    for site, array in zip(reader.sites, out):
        relative = shard_name(name, str(site), i)
        path = directory / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array.view(np.uint16))
        checksums[relative] = digest(path)
    return checksums


# ---------------------------------------------------------------- the end


def _finish(config: Config, work: Workdir, names, lms, sites, plan: Plan, written) -> dict:
    """Masks rows that are left out and writes rows, windows, pairing.json and, last, meta.json.

    Returns how many rows of each split are kept.
    """
    directory = work.activations
    save_table(directory / "windows.npz", plan.table)
    left_out = masked(
        config.extract,
        directory,
        dict(zip(names, sites)),
        plan.rows,
        shards=len(plan.shard_starts) - 1,
        documents=plan.documents,
    )
    rows = replace(plan.rows, keep=left_out.keep)
    save_rows(directory / "rows.npz", rows)
    kept = _kept(rows)
    checksums = checksums_of(directory, plan)
    write_json(work.result("pairing.json"), _pairing(config, names, plan, kept, left_out))
    meta = {
        "models": {
            name: {
                "path": path,
                "d_model": lm.config.d_model,
                "bos": bos,
                **dictionary_places(name, written),
            }
            for name, path, lm, bos in zip(names, config.models, lms, plan.bos)
        },
        "rows": len(rows),
        "dtype": "bfloat16",
        "shard_starts": plan.shard_starts.tolist(),
        "documents": plan.documents,
        "text": plan.provenance,
        "checksums": checksums,
    }
    write_json(directory / "meta.json", meta)
    shutil.rmtree(directory / "shards")
    return kept


def _kept(rows: Rows) -> dict[str, int]:
    """Returns how many rows of each split are kept."""
    parts = ((rows.split[here], rows.keep[here]) for here in stretches(len(rows)))
    counts = sum(np.bincount(split[keep], minlength=len(SPLITS)) for split, keep in parts)
    return dict(zip(SPLITS, counts.tolist()))


def dictionary_places(name: str, written: dict[Place, Place]) -> dict:
    """Returns a model's entries of meta.json that say what its dictionaries read and write."""
    own = {site: out for (model, site), out in written.items() if model == name}
    elsewhere = {str(s): [m, str(o)] for s, (m, o) in own.items() if (m, o) != (name, s)}
    return {"sites": [str(s) for s in own]} | ({"outputs": elsewhere} if elsewhere else {})


def checksums_of(directory: Path, plan: Reading) -> dict[str, str]:
    """Returns the checksums of all files that the finished shards and their rows are in."""
    checksums = {n: digest(directory / n) for n in ("rows.npz", "windows.npz")}
    for i in range(len(plan.shard_starts) - 1):
        checksums |= read_json(_done(directory, i))["files"]
    return checksums


def _pairing(config: Config, names, plan: Plan, kept: dict[str, int], left_out: Masked) -> dict:
    """The contents of results/pairing.json: coverage, rows kept and dropped, and why."""
    return plan.statistics.to_json(names) | {
        "windows": len(plan.table),
        "rows": kept,
        "bos": dict(zip(names, plan.bos)),
        "norm_mask": config.extract.norm_mask,
        "dropped": {
            "first_position": plan.statistics.first_positions,
            **left_out.to_json(),
            "windows_not_rebuilt": dict(zip(names, plan.not_rebuilt)),
            "characters_too_long": plan.too_long,
        },
        "text": plan.provenance,
    }
