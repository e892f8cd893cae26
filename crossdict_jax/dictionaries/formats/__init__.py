"""Formats of dictionary folders, one file each, with no list of them.

A format has ``load(path)`` and either ``TOOL`` and ``WEIGHTS``, the file that marks its folders,
or ``recognises(path)``.
"""

import importlib
from pathlib import Path

from crossdict_jax.config.rules import files_of
from crossdict_jax.dictionaries import base
from crossdict_jax.errors import UserError

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
    formats = [importlib.import_module(f"{__name__}.{n}") for n in files_of("dictionaries/formats")]
    folder = Path(path)
    for module in formats:
        recognises = getattr(
            module, "recognises", lambda path, m=module: (folder / m.WEIGHTS).is_file()
        )
        if recognises(str(path)):
            return module.load(str(path))
    closed = sorted(file.name for file in folder.glob("*") if file.suffix in NEVER_READ)
    if closed or (folder / "cfg.json").is_file():
        files = {module.WEIGHTS: module.TOOL for module in formats if hasattr(module, "WEIGHTS")}
        names = [f"{file} ({files[file]})" for file in sorted(files, key=len, reverse=True)]
        beside = f", and {closed[0]}, which could run code, is never read" if closed else ""
        raise UserError(
            f"{folder} has neither {' nor '.join(names)}{beside}; copy the folder's weights there."
        )
    return base.load(path)  # which says what is missing
