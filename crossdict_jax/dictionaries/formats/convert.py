"""Dictionaries from one format into another, one by one or all of a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crossdict_jax.config import ConvertConfig
from crossdict_jax.dictionaries import base
from crossdict_jax.dictionaries.formats import exchange, hub, saelens
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site
from crossdict_jax.training import checkpoint
from crossdict_jax.workdir import Workdir, model_names, read_json

HOOKS = {  # kinds of sites in the words of TransformerLens
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}


@dataclass(frozen=True)
class Item:
    """One dictionary to convert: where it lies, where it goes, and what it is about."""

    source: str
    folder: str  # within the result
    hook_name: str
    model_name: str
    hook_name_out: str = ""  # of a transcoder


def hook_name(site: Site) -> str:
    """Returns a site's name in TransformerLens terms, as in ``blocks.6.hook_resid_pre``."""
    return f"blocks.{site.layer}.{HOOKS[site.kind]}"


def convert(config: ConvertConfig, work: Workdir) -> list[str]:
    """Writes ``config.source`` in ``config.format`` below ``work.dictionaries``.

    Every format is read into the same dictionary of raw activation units first, so what is
    written means exactly what was read.

    Returns:
      The folders that were written, and last the address of the upload, if there was one.

    Raises:
      UserError: the source is no run and no dictionary, or it has no such form.
    """
    if config.push and config.format != "saelens":
        raise UserError(
            f"push={config.push} with format={config.format}: only SAELens folders are uploaded, "
            "which every tool reads; leave format out."
        )
    if config.push:
        hub.parse(config.push)
    written = [str(_convert_one(config, item, work)) for item in _items(config)]
    return written + ([hub.push(work.dictionaries, config.push)] if config.push else [])


def _items(config: ConvertConfig) -> list[Item]:
    run = Path(config.source) / "config.json"
    if (Path(config.source) / "dictionaries").is_dir() and run.is_file():
        found = list(_items_of_run(config, Path(config.source), read_json(run)))
        if not found:
            raise UserError(f"{config.source} has no finished dictionary; run train_saes first.")
        return found
    name = hub.parse(config.source).folder if _is_remote(config.source) else config.source
    folder = Path(name).name or "dictionary"
    return [Item(config.source, folder, config.hook_name, config.model_name)]


def _is_remote(source: str) -> bool:
    return source.startswith(hub.PREFIX)


def _items_of_run(config: ConvertConfig, root: Path, settings: dict) -> Iterator[Item]:
    paths = dict(zip(model_names(settings["models"]), settings["models"]))
    for model, path in paths.items():
        for folder in sorted((root / "dictionaries" / model).glob("*/seed-*")):
            if checkpoint.is_finished(folder):
                site = Site.parse(folder.parent.name)
                yield Item(
                    str(folder),
                    str(folder.relative_to(root / "dictionaries")),
                    config.hook_name or hook_name(site),
                    config.model_name or path,
                    _hook_name_out(folder),
                )


def _hook_name_out(folder: Path) -> str:
    written = checkpoint.load_meta(folder).get("writes")  # (model, site), of transcoders
    return hook_name(Site.parse(written[1])) if written else ""


def _convert_one(config: ConvertConfig, item: Item, work: Workdir) -> Path:
    folder = work.dictionaries / item.folder
    dictionary = exchange.load(item.source)
    if config.format == "crossdict":
        if folder.exists():
            shutil.rmtree(folder)  # of an earlier conversion with these settings
        base.save(dictionary, folder, meta={"source": item.source})
        return folder
    if not (item.hook_name and item.model_name):
        raise UserError(
            "A SAELens folder says which model and place it reads; give --config.model_name and "
            "--config.hook_name, as in blocks.6.hook_resid_pre."
        )
    names = {"hook_name": item.hook_name, "hook_name_out": item.hook_name_out}
    saelens.save_saelens(dictionary, folder, **names, model_name=item.model_name)
    return folder
