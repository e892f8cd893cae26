"""Extraction: every model reads every window once, and its paired rows go into the store."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from crossdict_jax import models
from crossdict_jax.activations.plan import Plan, Reading, make_plan
from crossdict_jax.activations.store import (
    BLOCK,
    Column,
    End,
    Rows,
    Store,
    open_store,
    save_index,
    save_shard,
    shard_name,
)
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import Config, ExtractConfig, model_layers, output_site
from crossdict_jax.errors import UserError
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.models.run import Runner
from crossdict_jax.training.stage import device_figures, progress_bar
from crossdict_jax.workdir import Workdir, model_names, read_json, write_json

Sites = Mapping[str, tuple[Site, ...]]  # by the name of the model


def extract(config: Config, work: Workdir) -> Store:
    """Reads the text with every model, writes the store and results/pairing.json, and returns it.

    Killed and run again, it goes on with the first shard that is not there; a finished store is
    opened as it is.

    Raises:
      UserError: a layer outside a model, text that a model cannot read, no room on the disk,
        activations that are not finite, or a retrieval pool larger than the test rows.
    """
    directory = work.activations
    if (directory / "meta.json").exists():
        store = open_store(directory)
        _check_pool(config, store.rows.kept()["test"])
        return store
    started = time.perf_counter()
    lms = dict(zip(model_names(config.models), map(models.load, config.models)))
    written = outputs(config, list(lms))
    sites = to_read(list(lms), written)
    for name, lm in lms.items():
        for site in sites[name]:
            models.check_site(lm.config, site, lm.name)
    directory.mkdir(parents=True, exist_ok=True)
    plan = make_plan(config, list(lms.values()), directory)
    _check_pool(config, plan.of_split["test"])
    counts = read_models(config.extract, directory, lms, sites, plan)
    counted = {"shards": plan.shards, "documents": plan.documents}
    keep, left_out = masked(config.extract, directory, sites, plan.rows, **counted)
    rows = replace(plan.rows, keep=keep)
    write_json(work.result("pairing.json"), _pairing(config, plan, rows, left_out))
    about = {
        name: {"path": path, "d_model": lm.config.d_model, "bos": bos, **ends_of(name, written)}
        for path, bos, (name, lm) in zip(config.models, plan.bos, lms.items())
    }
    meta = {"models": about, "rows": len(rows), "dtype": "bfloat16"}
    meta |= {"shard_starts": plan.shard_starts.tolist(), "documents": plan.documents}
    finish(directory, rows, plan, meta | {"text": plan.provenance})
    seconds = time.perf_counter() - started
    figures = {"rows": len(rows), "rows_per_s": counts["rows"] / seconds}
    figures["tokens_per_s"] = counts["tokens"] / max(counts["seconds"], 1e-9)
    work.record_timing("extract_activations", wall_s=seconds, **figures, **device_figures())
    _check_pool(config, rows.kept()["test"])  # norm outliers are gone now
    return open_store(directory)


def finish(directory: Path, rows: Rows, reading: Reading, meta: dict) -> None:
    """Writes the index of a store whose shards are there and, last, meta.json."""
    checksums = save_index(directory, rows, reading.table)
    for i in range(reading.shards):
        checksums |= read_json(_stamp(directory, i))["files"]
    checksums = meta.get("checksums", {}) | checksums
    write_json(directory / "meta.json", meta | {"checksums": checksums})
    shutil.rmtree(directory / "shards")


def _check_pool(config: Config, test_rows: int) -> None:
    """Refuses before anything is trained what evaluation could not draw."""
    if config.evaluation.pool > test_rows:
        raise UserError(
            f"evaluation.pool={config.evaluation.pool} is more than the {test_rows} test rows; "
            "lower it, use 0 for min(8192, rows), or raise text.documents."
        )


def _pairing(config: Config, plan: Plan, rows: Rows, left_out: dict) -> dict:
    """The contents of results/pairing.json: coverage, rows kept and dropped, and why."""
    names = model_names(config.models)
    return plan.statistics.to_json(names) | {
        "windows": len(plan.table),
        "rows": rows.kept(),
        "bos": dict(zip(names, plan.bos)),
        "norm_mask": config.extract.norm_mask,
        "dropped": {
            "first_position": plan.statistics.first_positions,
            **left_out,
            "windows_not_rebuilt": dict(zip(names, plan.not_rebuilt)),
            "characters_too_long": plan.too_long,
        },
        "text": plan.provenance,
    }


# ---------------------------------------------------------------- what dictionaries read and write


def outputs(config: Config, names: Sequence[str]) -> dict[End, End]:
    """Returns for each (model, site) that dictionaries read the one that they write.

    The same, but for transcoders.

    Raises:
      UserError: ``sae.output_site`` names a model that the run has not.
    """
    text, written = config.sae.output_site, {}
    model, kind, layer = output_site(text) if text else (None, None, None)
    if model and model not in names:
        raise UserError(
            f"sae.output_site={text}: there is no model {model!r}; this run has {', '.join(names)}."
        )
    for name, layers in zip(names, model_layers(config)):
        for i in layers:
            output = Site(i if layer is None else layer, kind or config.site)
            written[name, Site(i, config.site)] = model or name, output
    return written


def to_read(names: Sequence[str], written: Mapping[End, End]) -> Sites:
    """Returns {model: all its sites that dictionaries read or write, ascending}."""
    both = sorted({*written, *written.values()})
    return {name: tuple(site for model, site in both if model == name) for name in names}


def ends_of(name: str, written: Mapping[End, End]) -> dict:
    """Returns a model's entries of meta.json that say what its dictionaries read and write."""
    of_model = {site: end for (model, site), end in written.items() if model == name}
    other = {str(s): [m, str(o)] for s, (m, o) in of_model.items() if (m, o) != (name, s)}
    return {"sites": list(map(str, of_model))} | ({"outputs": other} if other else {})


# ---------------------------------------------------------------- running the models


def read_models(
    settings: ExtractConfig,
    directory: Path,
    lms: Mapping[str, LanguageModel],
    sites: Sites,
    reading: Reading,
) -> dict[str, float]:
    """Runs every model over all windows, only as deep as its highest site.

    Writes every shard that is not there yet; returns how much was read, and how fast.

    Raises:
      UserError: the disk cannot take the store, or shards there are of other text.
    """
    directory.mkdir(parents=True, exist_ok=True)
    numbers = sum(len(sites[name]) * lm.config.d_model for name, lm in lms.items())
    needed, free = 2 * len(reading.rows) * numbers, shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"The store needs {needed / 1e9:.1f} GB and {directory} has {free / 1e9:.1f} GB free; "
            "free some space or lower text.documents."
        )
    done = [i for i in range(reading.shards) if _stamp(directory, i).exists()]
    if any(read_json(_stamp(directory, i))["text"] != reading.text for i in done):
        raise UserError(
            f"The text has changed since {directory} was begun; delete it to extract again."
        )
    options = {"batch_size": settings.batch_size, "dtype": settings.matmul_dtype}
    runners = [Runner(lm, **options) for lm in lms.values()]
    counts = {"rows": 0, "tokens": 0, "seconds": 0.0}
    todo = [i for i in range(reading.shards) if i not in done]
    with progress_bar(
        total=len(todo) * len(lms), desc="extract activations", unit="shard"
    ) as progress:
        for i in todo:
            started, checksums, windows = time.perf_counter(), {}, reading.windows(i)
            for m, (name, runner) in enumerate(zip(lms, runners)):
                for site, x in zip(sites[name], _read_shard(runner, sites[name], reading, m, i)):
                    checksums |= save_shard(directory, shard_name(name, str(site), i), x)
                offsets = reading.table.offsets[m]
                counts["tokens"] += int(offsets[windows.stop] - offsets[windows.start])
                progress.update()
            write_json(_stamp(directory, i), {"text": reading.text, "files": checksums})
            counts["seconds"] += time.perf_counter() - started
            counts["rows"] += int(reading.shard_starts[i + 1] - reading.shard_starts[i])
    return counts


def _stamp(directory: Path, i: int) -> Path:
    """The file that says a shard is finished, and of what text."""
    return directory / "shards" / f"{i:05d}.json"


def _read_shard(runner: Runner, sites, reading: Reading, m: int, i: int) -> list[np.ndarray]:
    """Returns per site the activations of a shard's rows, bfloat16 [rows, d_model]."""
    windows, (start, stop) = reading.windows(i), reading.shard_starts[i : i + 2]
    front = np.array([] if reading.bos[m] is None else [reading.bos[m]], np.int32)
    window = reading.rows.window[start:stop]
    position = reading.rows.position[start:stop, m] + len(front)
    out = [np.empty((stop - start, runner.config.d_model), ml_dtypes.bfloat16) for _ in sites]
    tokens = [np.concatenate([front, reading.table.tokens(m, w)]) for w in windows]
    for number, captured in runner.stream(tokens, sites):
        of_window = slice(*np.searchsorted(window, windows[number] + np.arange(2)))
        for array, x in zip(out, captured):
            array[of_window] = x[position[of_window]]
    return out


# ---------------------------------------------------------------- rows that are left out


def masked(
    settings: ExtractConfig,
    directory: Path,
    sites: Sites,
    rows: Rows,
    *,
    shards: int,
    documents: Sequence[str],
) -> tuple[np.ndarray, dict]:
    """Returns (bool [n]: which rows of a directory of shards are kept, counts of the others).

    Left out are rows that hold NaN or infinity, and outliers: those of a norm far above the median
    of the training rows that are finite. Attention sinks have such norms, tens of times the
    others'. Counts are of rows, outliers first, and of rows by model and site.

    Args:
      documents: their names.

    Raises:
      UserError: a row is not finite and ``extract.nonfinite`` says refuse (it is named), or no
        training row is finite.
    """
    n_train = int(np.searchsorted(rows.split, SPLITS.index("train"), side="right"))
    norms, highest, nonfinite = {}, {}, {}
    for model, site in ((model, site) for model, of_model in sites.items() for site in of_model):
        name, first, column = f"{model} {site}", None, Column(directory, np.float32)
        training, nonfinite[name] = Column(directory, np.float32), 0
        for shard in range(shards):
            file = directory / shard_name(model, str(site), shard)
            x = np.load(file, mmap_mode="r", allow_pickle=False).view(ml_dtypes.bfloat16)
            for at in range(0, len(x), BLOCK):
                block = x[at : at + BLOCK].astype(np.float32)
                finite, norm = np.isfinite(block).all(axis=1), np.linalg.norm(block, axis=1)
                in_training = np.arange(len(column), len(column) + len(norm)) < n_train
                training.append(norm[finite & in_training])
                if first is None and not finite.all():
                    first = len(column) + int(np.argmin(finite))
                nonfinite[name] += int(np.sum(~finite))
                column.append(np.where(finite, norm, np.nan))
        if nonfinite[name] and settings.nonfinite == "refuse":
            raise UserError(
                f"{name}: row {first} (document {documents[rows.document[first]]}, byte "
                f"{rows.byte_end[first]}) holds NaN or infinity, the first of {nonfinite[name]} "
                f"such rows of {len(rows)}; extract.nonfinite=skip leaves them out (in a new "
                "--workdir)."
            )
        if not len(training):
            raise UserError(f"{name}: no training row is finite; look at the model's weights.")
        # In place, in the file: nothing is held.
        median = np.float32(np.median(training.array(), overwrite_input=True))
        norms[name], highest[name] = column.array(), settings.norm_mask * median
    keep, counts = Column(directory, bool), Counter()
    for at in range(0, len(rows), BLOCK):
        block = {name: column[at : at + BLOCK] for name, column in norms.items()}
        high = {name: norm > highest[name] for name, norm in block.items()}
        outlier = np.any(list(high.values()), axis=0)
        bad = np.any(np.isnan(list(block.values())), axis=0)
        keep.append(~(outlier | bad))
        counts.update({name: int(values.sum()) for name, values in high.items()})
        counts.update(outliers=int(outlier.sum()), nonfinite=int((bad & ~outlier).sum()))
    return keep.array(), {
        "norm_outliers": counts["outliers"],
        "norm_outliers_by_site": {name: counts[name] for name in norms},
        "nonfinite": counts["nonfinite"],
        "nonfinite_by_site": nonfinite,
    }
