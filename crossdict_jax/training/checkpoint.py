"""Orbax checkpoints with checksums: whole and unaltered, or refused with the file's name."""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from crossdict_jax.errors import UserError
from crossdict_jax.workdir import check_space, read_json, write_json

OVERHEAD = 1 << 18  # bytes of a checkpoint beside its arrays, at most

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every save


def _manager(directory: Path, keep: int | None = None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(Path(directory).absolute(), options=options)


def _seal(directory: Path, step: int) -> Path:
    """The checksum file; it is written last, so a checkpoint without one was never finished."""
    return directory / f"{step}.sha256.json"


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def sealed_steps(directory: Path) -> list[int]:
    """Returns the steps of all finished checkpoints in ``directory``, ascending."""
    seals = Path(directory).glob("*.sha256.json") if Path(directory).is_dir() else []
    steps = (int(seal.name.split(".")[0]) for seal in seals)
    return sorted(s for s in steps if (Path(directory) / str(s)).is_dir())


def latest_step(directory: Path) -> int | None:
    """Returns the newest finished step, or None if there is none."""
    return max(sealed_steps(directory), default=None)


def verify(directory: Path, step: int) -> None:
    """Raises UserError naming the first file that is missing, truncated or altered."""
    folder = Path(directory) / str(step)
    written, found = read_json(_seal(Path(directory), step)), _digests(folder)
    for name, digest in written.items():
        if found.get(name) != digest:
            what = "altered or cut short" if name in found else "missing"
            raise UserError(
                f"Checkpoint file {folder / name} is {what} (checksum mismatch); "
                f"delete {directory} and run its stage again."
            )


def save(directory: Path, step: int, *, keep: int = 1, meta: dict | None = None, **trees) -> None:
    """Writes pytrees (``params=``, ``train=``) and ``meta`` (JSON) as checkpoint ``step``.

    Older checkpoints beyond ``keep`` are deleted once the new one is sealed.
    """
    directory = Path(directory)
    drop_unsealed(directory)
    # Asked for first: orbax writes in threads that print their own tracebacks when they fail.
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
    check_space(directory, arrays + OVERHEAD)
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    try:
        with _manager(directory) as manager:
            manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta or {}), **items))
            manager.wait_until_finished()
        write_json(_seal(directory, step), _digests(directory / str(step)))
    except OSError as error:
        raise UserError(
            f"Cannot write checkpoint {directory} ({error}); free some space."
        ) from error
    for old in sealed_steps(directory)[:-keep]:
        _seal(directory, old).unlink()
        shutil.rmtree(directory / str(old))


def drop_unsealed(directory: Path) -> None:
    """Deletes what a kill left half written."""
    sealed = {str(s) for s in sealed_steps(directory)}
    for path in Path(directory).glob("*") if Path(directory).is_dir() else ():
        if path.is_dir() and path.name not in sealed:
            shutil.rmtree(path)


def restore(directory: Path, step: int, **abstract: Any) -> dict[str, Any]:
    """Returns the named trees of checkpoint ``step``, laid out as their abstract trees say.

    Args:
      abstract: per tree, a pytree of ``jax.ShapeDtypeStruct`` with shardings.

    Raises:
      UserError: the checkpoint is damaged or of another shape.
    """
    verify(directory, step)
    items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    try:
        with _manager(Path(directory)) as manager:
            restored = manager.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError) as error:
        raise UserError(
            f"Checkpoint {directory} does not fit ({str(error).splitlines()[0]}); "
            "delete it and run its stage again."
        ) from error
    return {name: restored[name] for name in abstract}


def save_module(directory: Path, params: Any, meta: dict, *, step: int = 0) -> None:
    """Writes a finished module: its parameters (pure nested dict of arrays) and ``meta``."""
    save(directory, step, params=jax.tree.map(np.asarray, params), meta=meta)


def is_finished(directory: Path) -> bool:
    """Whether ``directory`` holds a sealed checkpoint."""
    return latest_step(directory) is not None


def _finished_step(directory: Path) -> int:
    step = latest_step(directory)
    if step is None:
        raise UserError(f"{directory} holds no finished checkpoint; run the stage that writes it.")
    return step


def load_meta(directory: Path) -> dict:
    """Returns the ``meta`` of the newest finished checkpoint in ``directory``."""
    step = _finished_step(directory)
    verify(directory, step)
    with _manager(Path(directory)) as manager:
        return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def load_params(directory: Path, abstract: Any) -> Any:
    """Returns the parameters alone of the newest finished checkpoint, onto any mesh.

    Args:
      abstract: pytree of ``jax.ShapeDtypeStruct``; where a leaf has no sharding it goes to the
        first device.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=getattr(a, "sharding", None) or device
        ),
        abstract,
    )
    return restore(directory, _finished_step(directory), params=placed)["params"]
