"""Extraction: every model reads every window once; paired rows go into the store."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from crossdict_jax import models
from crossdict_jax.activations.plan import Reading, make_plan
from crossdict_jax.activations.store import (
    BLOCK,
    MEND,
    Column,
    Rows,
    Sites,
    Store,
    finish,
    open_store,
    save_shard,
    shard_name,
    weights_digest,
)
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import Config, ExtractConfig, model_layers, output_site
from crossdict_jax.errors import UserError
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.models.run import LENGTH_STEP, Passages, Runner
from crossdict_jax.training.stage import progress_bar, timed
from crossdict_jax.workdir import (
    Workdir,
    check_space,
    model_names,
    read_json,
    understood,
    write_json,
)


def extract(config: Config, work: Workdir) -> Store:
    """Returns the store, after reading the text with every model; writes results/pairing.json too.

    Interrupted, it goes on with the first missing shard; a finished store is only opened.

    Raises:
      UserError: a layer outside a model, text that a model cannot read, no room on the disk,
        activations that are not finite, a split without rows, or a retrieval pool larger than the
        test rows.
    """
    directory = work.activations
    if (directory / "meta.json").exists():
        store, result = open_store(directory), work.result("pairing.json")
        _check_rows(config, store.rows, store.meta["pairing"]["dropped"])
        write_json(result, store.meta["pairing"])  # results may be deleted, to be made again
        return store
    check_space(directory)
    with timed(work, "extract_activations") as figures:
        names = model_names(config.models)
        lms = dict(zip(names, map(models.load, config.models)))
        sites = dictionary_sites(config, names)
        for name, lm in lms.items():
            models.check_sites(lm.config, sites.stored(name), lm.name)
        plan = make_plan(config, list(lms.values()), directory)
        dropped = {"after_control_tokens": int(np.sum(~plan.rows.keep))}
        _check_rows(config, plan.rows, dropped)
        digests = digests_of(lms, plan)
        _check_inputs(work, digests)
        counts, shards = read_models(config.extract, directory, lms, sites, plan, digests)
        figures |= counts
        counted = {"shards": len(plan.shard_starts) - 1, "documents": plan.documents}
        keep, left_out = masked(config.extract, directory, sites, plan.rows, **counted)
        rows, dropped = replace(plan.rows, keep=keep), left_out | dropped
        _check_rows(config, rows, dropped)  # norm outliers are gone now
        pairing = plan.statistics.to_json(names) | {
            "windows": len(plan.table),
            "rows": rows.kept(),
            "bos": dict(zip(names, plan.bos)),
            "control_tokens": dict(zip(names, plan.control_tokens)),
            "norm_mask": config.extract.norm_mask,
            "dropped": {
                "first_position": plan.statistics.first_positions,
                **dropped,
                "windows_not_rebuilt": dict(zip(names, plan.not_rebuilt)),
                "characters_too_long": plan.too_long,
            },
            "text": plan.provenance,
        }
        write_json(work.result("pairing.json"), pairing)
        meta = {
            "models": meta_of_models(config.models, plan, lms, sites, digests),
            "rows": len(rows),
            "dtype": "bfloat16",
            "shard_starts": plan.shard_starts.tolist(),
            "documents": plan.documents,
            "text": plan.provenance,
            "pairing": pairing,
        }
        write_json(work.inputs, digests)
        finish(directory, rows, plan.table, meta, shards)
    return open_store(directory)


def dictionary_sites(config: Config, names: Sequence[str]) -> Sites:
    """Returns the sites that the dictionaries of the named models read and write.

    Raises:
      UserError: ``sae.output_site`` names a model that the run has not.
    """
    text, writes = config.sae.output_site, {}
    model, kind, layer = output_site(text) if text else (None, None, None)
    if model and model not in names:
        raise UserError(
            f"sae.output_site={text}: there is no model {model!r}; this run has {', '.join(names)}."
        )
    for name, layers in zip(names, model_layers(config)):
        for i in layers:
            output = Site(i if layer is None else layer, kind or config.site)
            writes[name, Site(i, config.site)] = model or name, output
    return Sites(writes)


def meta_of_models(
    paths: Sequence[str],
    reading: Reading,
    lms: Mapping[str, LanguageModel],
    sites: Sites,
    digests: Mapping[str, str],
) -> dict[str, dict]:
    """Returns the models' entries of meta.json."""
    return {
        name: {
            "path": path,
            "d_model": lm.config.d_model,
            "bos": bos,
            "weights": digests[f"model {name}"],
            **sites.to_meta(name),
        }
        for path, bos, (name, lm) in zip(paths, reading.bos, lms.items())
    }


def _check_rows(config: Config, rows: Rows, dropped: Mapping) -> None:
    """Refuses a split without rows, and a pool that evaluation could not draw.

    Before anything is trained; ``dropped`` counts rows by reason, as in pairing.json.
    """
    kept = rows.kept()
    if empty := [split for split, count in kept.items() if not count]:
        reasons = {
            f"extract.norm_mask={config.extract.norm_mask}": "norm_outliers",
            "extract.nonfinite=skip": "nonfinite",
            "extract.control_tokens=skip": "after_control_tokens",
        }
        counts = ((dropped.get(key), name) for name, key in reasons.items())
        told = ", ".join(f"{count} dropped by {name}" for count, name in counts if count)
        raise UserError(
            f"Of {len(rows)} paired rows none is left in the split {' or '.join(empty)}"
            f"{f' ({told}); change that or' if told else ';'} use more text, in a new --workdir."
        )
    test_rows = kept["test"]
    if config.evaluation.pool > test_rows:
        raise UserError(
            f"evaluation.pool={config.evaluation.pool} is more than the {test_rows} test rows; "
            "lower it, use 0 for min(8192, rows), or raise text.documents."
        )


def _check_inputs(work: Workdir, digests: Mapping[str, str]) -> None:
    """Refuses to extract from other text or models than what was trained here has seen."""
    made = [folder.name for folder in work.trained]
    before = read_json(work.inputs) if made and work.inputs.exists() else digests
    if changed := [what for what, then in before.items() if digests.get(what) != then]:
        raise UserError(
            f"The {changed[0]} has changed since {', '.join(made)} in {work.root} were made; "
            "delete these folders too, or name a new --workdir."
        )


def read_models(
    settings: ExtractConfig,
    directory: Path,
    lms: Mapping[str, LanguageModel],
    sites: Sites,
    reading: Reading,
    digests: Mapping[str, str],
) -> tuple[dict[str, int], dict[str, str]]:
    """Writes every missing shard; returns (counts of their rows and tokens, {any shard: sha256}).

    Models run only as deep as their highest site. ``digests``: see ``digests_of``.

    Raises:
      UserError: the disk cannot take the store, or its shards are of other text or models.
    """
    directory.mkdir(parents=True, exist_ok=True)
    numbers = sum(len(sites.stored(name)) * lm.config.d_model for name, lm in lms.items())
    starts = reading.shard_starts
    stamps = [directory / "shards" / f"{i:05d}.json" for i in range(len(starts) - 1)]
    todo = [i for i, stamp in enumerate(stamps) if not stamp.exists()]
    needed = 2 * numbers * sum(int(starts[i + 1] - starts[i]) for i in todo)
    if needed > (free := shutil.disk_usage(directory).free):
        raise UserError(
            f"The store needs {needed / 1e9:.1f} GB more and {directory} has {free / 1e9:.1f} GB "
            "free; free some space or lower text.documents in a new --workdir."
        )
    for what, digest in digests.items():
        if {read_json(stamp).get(what) for stamp in stamps if stamp.exists()} - {digest}:
            raise UserError(
                f"The {what} has changed since {directory} was begun; delete it to extract again."
            )
    options = {"batch_size": settings.batch_size, "dtype": settings.matmul_dtype}
    runners = [Runner(lm, **options) for lm in lms.values()]
    counts = {"rows": 0, "tokens": 0}
    bar = {"total": len(todo) * len(lms), "desc": "extract activations", "unit": "shard"}

    def save(i: int, arrays: Mapping[str, np.ndarray], checksums: dict, last: bool) -> None:
        with ThreadPoolExecutor() as files:
            for saved in files.map(partial(save_shard, directory), arrays, arrays.values()):
                checksums |= saved
        if last:
            write_json(stamps[i], digests | {"files": checksums})

    # What a model gives is saved while the next one reads, or the first one the next shard.
    with progress_bar(**bar) as progress, ThreadPoolExecutor(1) as disk:
        saving = disk.submit(int)
        for i in todo:
            windows, rows, checksums = reading.windows(i), slice(*starts[i : i + 2]), {}
            window = reading.rows.window[rows] - windows.start
            for m, (name, runner) in enumerate(zip(lms, runners)):
                names = [shard_name(name, str(site), i) for site in sites.stored(name)]
                texts = reading.table.texts(m, windows, reading.bos[m])
                position = reading.rows.position[rows, m] + (reading.bos[m] is not None)
                passages = Passages(texts, window, position)
                how = {"dtype": ml_dtypes.bfloat16, "length_step": LENGTH_STEP}
                x = runner.read_at(passages, sites.stored(name), **how)
                saving.result()
                last = m == len(lms) - 1
                saving = disk.submit(save, i, dict(zip(names, x)), checksums, last)
                offsets = reading.table.offsets[m]
                counts["tokens"] += int(offsets[windows.stop] - offsets[windows.start])
                progress.update()
            counts["rows"] += len(window)
        saving.result()
    return counts, {k: v for stamp in stamps for k, v in read_json(stamp)["files"].items()}


def digests_of(lms: Mapping[str, LanguageModel], reading: Reading) -> dict[str, str]:
    """Returns sha256 of all that shards are made of, by what a user may have changed."""
    tokens = hashlib.sha256()
    for array in (*reading.table.ids, *reading.table.offsets):
        tokens.update(np.ascontiguousarray(array))
    weights = {f"model {name}": weights_digest(lm) for name, lm in lms.items()}
    return {"text": reading.text, "tokenizer": tokens.hexdigest(), **weights}


def masked(
    settings: ExtractConfig,
    directory: Path,
    sites: Sites,
    rows: Rows,
    *,
    shards: int,
    documents: Sequence[str],
) -> tuple[np.ndarray, dict]:
    """Returns (keep, bool [n], of the rows in a directory of shards; counts of the others).

    Dropped are rows with NaN or infinity, and outliers: a norm far above the median of the finite
    training rows, as attention sinks have. Counts are of rows, outliers first, and of rows by
    model and site.

    Raises:
      UserError: a row is not finite and ``extract.nonfinite`` says refuse, or no training row is
        finite.
    """
    n_train = int(np.searchsorted(rows.split, SPLITS.index("train"), side="right"))
    readers = dict.fromkeys(model for model, _ in sites.writes)
    ends = [(model, site) for model in readers for site in sites.stored(model)]
    norms, highest, nonfinite = {}, {}, {}
    for model, site in ends:
        name = f"{model} {site}"
        column, training = Column(directory, np.float32), Column(directory, np.float32)
        for shard in range(shards):
            file = directory / shard_name(model, str(site), shard)
            with understood(file, mend=MEND):
                x = np.load(file, mmap_mode="r", allow_pickle=False).view(ml_dtypes.bfloat16)
            for at in range(0, len(x), BLOCK):
                block = x[at : at + BLOCK].astype(np.float32)
                finite, norm = np.isfinite(block).all(axis=1), np.linalg.norm(block, axis=1)
                of_training = slice(max(0, n_train - len(column)))
                training.append(norm[of_training][finite[of_training]])
                column.append(np.where(finite, norm, np.nan))
        norms[name] = column.array()
        bad = np.isnan(norms[name])
        nonfinite[name] = int(bad.sum())
        if bad.any() and settings.nonfinite == "refuse":
            first = bad.argmax()
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
        highest[name] = settings.norm_mask * median
    keep, counts = Column(directory, bool), Counter()
    for at in range(0, len(rows), BLOCK):
        block = {name: column[at : at + BLOCK] for name, column in norms.items()}
        high = {name: norm > highest[name] for name, norm in block.items()}
        outlier = np.any(list(high.values()), axis=0)
        bad = np.any(np.isnan(list(block.values())), axis=0)
        kept = rows.keep[at : at + BLOCK]
        keep.append(kept & ~(outlier | bad))
        counts.update({name: int(values.sum()) for name, values in high.items()})
        outlier, bad = kept & outlier, kept & bad & ~outlier  # a dropped row is counted once
        counts.update(outliers=int(outlier.sum()), nonfinite=int(bad.sum()))
    return keep.array(), {
        "norm_outliers": counts["outliers"],
        "norm_outliers_by_site": {name: counts[name] for name in norms},
        "nonfinite": counts["nonfinite"],
        "nonfinite_by_site": nonfinite,
    }
