"""Formats of dictionary folders, one file each, with no list of them.

A format has ``load(path)``, ``names(path)``, and ``TOOL`` and ``WEIGHTS``, the file that marks its
folders, or ``recognises(path)``.
"""

import importlib
import os
from itertools import islice
from pathlib import Path
from types import ModuleType

from crossdict_jax.config.rules import files_of
from crossdict_jax.dictionaries import base, hub
from crossdict_jax.dictionaries.folders import hook_name
from crossdict_jax.errors import UserError
from crossdict_jax.training import checkpoint
from crossdict_jax.workdir import understood

COPY = "copy the whole folder again"
NEVER_READ = {".pt", ".pth", ".bin", ".pkl", ".ckpt"}  # they can run code


def load(path: str | Path) -> base.Dictionary:
    """Returns the dictionary at ``path``, in raw activation units, on the first device.

    Args:
      path: a checkpoint folder of ours, a SAELens folder, a sparsify folder, a Gemma Scope folder
        or its params.npz; or ``hub:OWNER/NAME/FOLDER``, where one of these lies.

    Raises:
      UserError: there is none; a key or weight is missing, damaged, or cannot be represented (the
        file is named).
    """
    folder = hub.fetch(str(path))
    finished = checkpoint.is_finished(folder)  # also where an export lies beside it
    if not finished and (module := _format_of(folder)):
        with understood(folder, mend=COPY):
            return module.load(str(folder))
    if finished or not folder.is_dir():
        return base.load(folder)  # which says that there is no folder
    closed = sorted(file.name for file in folder.glob("*") if file.suffix in NEVER_READ)
    files = {module.WEIGHTS: module.TOOL for module in _formats() if hasattr(module, "WEIGHTS")}
    names = [f"{file} ({files[file]})" for file in sorted(files, key=len, reverse=True)]
    beside = f", and {closed[0]}, which could run code, is never read" if closed else ""
    below = (p for level in ("*", "*/*", "*/*/*") for p in sorted(folder.glob(level)))
    read = islice((p for p in below if checkpoint.is_finished(p) or _format_of(p)), 3)
    some = ", ".join(os.path.relpath(p, folder) for p in read)
    raise UserError(
        f"{folder} has neither {' nor '.join(names)}{beside}, and holds no finished checkpoint of "
        f"a run; {f'name what lies in it ({some}), ' if some else ''}copy the weights there, or "
        "run the stage that writes them."
    )


def names(path: str | Path) -> dict[str, str]:
    """Returns what the dictionary at ``path`` says of itself, as far as it does.

    ``model_name``, ``hook_name`` and, of a transcoder, ``hook_name_out``, as TransformerLens or
    transformers names them (``blocks.6.hook_resid_pre``, ``model.layers.6``); ``centred`` where the
    model's writes were.
    """
    folder = hub.fetch(str(path))
    if checkpoint.is_finished(folder):
        with understood(folder):
            meta = checkpoint.load_meta(folder)
            sites = {
                "hook_name": meta.get("site", ""),
                "hook_name_out": meta.get("writes", [""])[-1],
            }
            model = meta.get("path", meta.get("model"))
            said = {"model_name": model} | {k: hook_name(v) for k, v in sites.items()}
            said = dict(meta.get("names", said))
    else:
        module = _format_of(folder)
        with understood(folder, mend=COPY):
            said = module.names(str(folder)) if module else {}
    return {key: " ".join(str(value).split()) for key, value in said.items() if value}


def _formats() -> list[ModuleType]:
    return [importlib.import_module(f"{__name__}.{n}") for n in files_of("dictionaries/formats")]


def _format_of(path: Path) -> ModuleType | None:
    for module in _formats():
        recognises = getattr(module, "recognises", None)
        if recognises(str(path)) if recognises else (path / module.WEIGHTS).is_file():
            return module
    return None
