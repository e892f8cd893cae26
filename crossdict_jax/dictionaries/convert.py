"""Dictionaries from one format into another, one by one or all of a run."""

import os
import shutil
from pathlib import Path

from crossdict_jax.config import ConvertConfig
from crossdict_jax.dictionaries import base, formats, hub
from crossdict_jax.dictionaries.folders import hook_name
from crossdict_jax.dictionaries.formats import saelens
from crossdict_jax.errors import UserError
from crossdict_jax.training import checkpoint
from crossdict_jax.workdir import Workdir, model_names, read_json


def convert(config: ConvertConfig, work: Workdir) -> list[str]:
    """Writes ``config.source`` in ``config.format`` below ``work.dictionaries``.

    Returns:
      The folders that were written, and last the address of the upload, if there was one.

    Raises:
      UserError: the source is no run and no dictionary, or the format cannot hold it.
    """
    if config.push and config.format != "saelens":
        raise UserError(
            f"push={config.push} with format={config.format}: only SAELens folders are uploaded; "
            "leave format out."
        )
    if config.push:
        hub.parse(config.push)
    root, written, items = Path(os.path.expanduser(config.source)), [], []
    asked = {"model_name": config.model_name, "hook_name": config.hook_name}
    if (root / "dictionaries").is_dir() and (root / "config.json").is_file():
        if extra := [f"--config.{key}={value}" for key, value in asked.items() if value]:
            raise UserError(
                f"{root} is a run, which knows its own; leave out {' and '.join(extra)}."
            )
        models = read_json(root / "config.json").get("models")
        if not isinstance(models, list) or not all(isinstance(path, str) for path in models):
            raise UserError(
                f"{root} is no run of launch.experiment; name one dictionary below "
                f"{root / 'dictionaries'}."
            )
        folders = sorted((root / "dictionaries").glob("*/*/seed-*"))
        paths = dict(zip(model_names(models), models))
        for folder in folders:
            checkpoint.finished_step(folder)  # or it says so: none is left out
            model, site, seed = folder.parts[-3:]
            if model not in paths:
                raise UserError(
                    f"{folder} is of no model of the run ({', '.join(paths)}); move it away."
                )
            names = formats.names(folder)  # with the other site of a transcoder
            names |= {"hook_name": hook_name(site), "model_name": paths[model]}
            items.append((str(folder), f"{model}/{site}/{seed}", names))
        if not items:
            raise UserError(f"{root} has no finished dictionary; run train_saes first.")
    else:
        if config.source.startswith(hub.PREFIX):
            root = Path(*hub.parse(config.source)[:2])
        name = Path(os.path.abspath(root)).name or "dictionary"
        items.append((config.source, name, formats.names(config.source)))
    for source, name, said in items:
        dictionary, folder = formats.load(source), work.dictionaries / name
        names = said | {key: value or said.get(key) for key, value in asked.items()}
        if config.format == "crossdict":
            if folder.exists():
                shutil.rmtree(folder)  # of an earlier conversion with these settings
            base.save(dictionary, folder, meta={"source": source, "names": names})
        elif names["hook_name"] and names["model_name"]:
            saelens.save(dictionary, folder, **names)
        else:
            missing = " and ".join(f"--config.{key}" for key in asked if not names[key])
            raise UserError(
                f"A SAELens folder says which model and site it reads; give {missing} (hooks as "
                "blocks.6.hook_resid_pre)."
            )
        written.append(str(folder))
    return written + ([hub.push(work.dictionaries, config.push)] if config.push else [])
