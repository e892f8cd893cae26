"""Which format a dictionary folder is in: ours, SAELens, sparsify or Gemma Scope."""

from __future__ import annotations

from pathlib import Path

from crossdict_jax.dictionaries import base
from crossdict_jax.dictionaries.formats import gemma_scope, hub, saelens, sparsify
from crossdict_jax.errors import UserError

NEVER_READ = {".pt", ".pth", ".bin", ".pkl", ".ckpt"}  # they can run code


def load(path: str | Path) -> base.Dictionary:
    """Returns the dictionary at ``path``, in raw activation units, on the first device.

    Args:
      path: a checkpoint folder of ours, a SAELens folder, a sparsify folder, or a Gemma Scope
        folder or its params.npz; or ``hub:OWNER/NAME/FOLDER``, where one of these lies.

    Raises:
      UserError: there is none, it is damaged (the file is named), or it is of an unknown kind.
    """
    path = hub.pull(str(path)) if str(path).startswith(hub.PREFIX) else Path(path)
    if path.is_file() and path.suffix == ".npz":
        return gemma_scope.load(path)
    if not path.is_dir():
        base.load(path)  # says so
    if (path / gemma_scope.WEIGHTS).is_file():
        return gemma_scope.load(path / gemma_scope.WEIGHTS)
    if (path / saelens.WEIGHTS).is_file():
        return saelens.load(path)
    if (path / sparsify.WEIGHTS).is_file():
        return sparsify.load(path)
    _refuse_unreadable(path)
    return base.load(path)


def _refuse_unreadable(folder: Path) -> None:
    closed = sorted(f.name for f in folder.iterdir() if f.suffix in NEVER_READ)
    if closed or (folder / saelens.CONFIG).is_file():
        beside = f", and {closed[0]}, which could run code, is never read" if closed else ""
        raise UserError(
            f"{folder} has neither {saelens.WEIGHTS} (SAELens) nor {sparsify.WEIGHTS} (sparsify) "
            f"nor {gemma_scope.WEIGHTS} (Gemma Scope){beside}; copy the folder's weights there."
        )
