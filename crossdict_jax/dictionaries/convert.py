"""Dictionaries from one format into another, one by one or all of a run."""

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

    All formats are read into the same dictionary of raw activation units first.

    Returns:
      The folders that were written, and last the address of the upload, if there was one.

    Raises:
      UserError: the source is no run and no dictionary, or the format cannot hold it.
    """
    if config.push and config.format != "saelens":
        raise UserError(
            f"push={config.push} with format={config.format}: only SAELens folders are uploaded, "
            "which every tool reads; leave format out."
        )
    if config.push:
        hub.parse(config.push)
    root, written, items = Path(config.source), [], []
    if (root / "dictionaries").is_dir() and (root / "config.json").is_file():
        models = read_json(root / "config.json")["models"]
        folders = sorted((root / "dictionaries").glob("*/*/seed-*"))
        paths = dict(zip(model_names(models), models))
        for folder in filter(checkpoint.is_finished, folders):
            inner = folder.relative_to(root / "dictionaries")
            output = checkpoint.load_meta(folder).get("writes")  # (model, site): a transcoder
            names = {
                "hook_name": config.hook_name or hook_name(inner.parts[1]),
                "model_name": config.model_name or paths[inner.parts[0]],
                "hook_name_out": hook_name(output[1]) if output else "",
            }
            items.append((str(folder), str(inner), names))
        if not items:
            raise UserError(f"{root} has no finished dictionary; run train_saes first.")
    else:
        on_hub = config.source.startswith(hub.PREFIX)
        inner = hub.parse(config.source)[1] if on_hub else root
        asked = {"hook_name": config.hook_name, "model_name": config.model_name}
        names = dict.fromkeys(asked, "") | formats.names(config.source)
        names |= {key: value for key, value in asked.items() if value}
        items.append((config.source, Path(inner).name or "dictionary", names))
    for source, name, names in items:
        dictionary, folder = formats.load(source), work.dictionaries / name
        if config.format == "crossdict":
            if folder.exists():
                shutil.rmtree(folder)  # of an earlier conversion with these settings
            base.save(dictionary, folder, meta={"source": source})
        elif names["hook_name"] and names["model_name"]:
            saelens.save(dictionary, folder, **names)
        else:
            raise UserError(
                "A SAELens folder says which model and site it reads; give --config.model_name "
                "and --config.hook_name, as in blocks.6.hook_resid_pre."
            )
        written.append(str(folder))
    return written + ([hub.push(work.dictionaries, config.push)] if config.push else [])
