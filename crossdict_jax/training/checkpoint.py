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


def _manager(directory: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=None, enable_async_checkpointing=False)
    return ocp.CheckpointManager(Path(directory).absolute(), options=options)


def _seal(directory: Path, step: int) -> Path:
    """The checksum file; it is written last, so a checkpoint without one was never finished."""
    return Path(directory) / f"{step}.sha256.json"


def _digests(folder: Path) -> dict[str, str]:
    """{name: sha256} of all files below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def latest_step(directory: Path) -> int | None:
    """Returns the newest finished step, or None if there is none."""
    seals = Path(directory).glob("*.sha256.json")
    steps = [int(seal.name.split(".")[0]) for seal in seals]
    return max((s for s in steps if (Path(directory) / str(s)).is_dir()), default=None)


def finished_step(directory: Path) -> int:
    """Returns the newest finished step; UserError if there is none."""
    step = latest_step(directory)
    if step is None:
        raise UserError(f"{directory} holds no finished checkpoint; run the stage that writes it.")
    return step


def is_finished(directory: Path) -> bool:
    """Whether ``directory`` holds a sealed checkpoint."""
    return latest_step(directory) is not None


def verify(directory: Path, step: int) -> None:
    """Raises UserError naming the first file that is missing, truncated or altered."""
    folder = Path(directory) / str(step)
    digests = _digests(folder)
    for name, digest in read_json(_seal(directory, step)).items():
        if digests.get(name) != digest:
            state = "altered or cut short" if name in digests else "missing"
            raise UserError(
                f"Checkpoint file {folder / name} is {state} (checksum mismatch); "
                f"delete {directory} and run its stage again."
            )


def save(directory: Path, step: int, *, meta: dict | None = None, **trees) -> None:
    """Writes pytrees (``params=``, ``train=``) and ``meta`` (JSON) as checkpoint ``step``.

    Older checkpoints are deleted once the new one is sealed.
    """
    directory = Path(directory)
    for path in directory.glob("*"):
        if path.is_dir() and not (directory / f"{path.name}.sha256.json").is_file():
            shutil.rmtree(path)  # a kill left it half written
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
    for seal in directory.glob("*.sha256.json"):
        if seal != _seal(directory, step):
            seal.unlink()
            shutil.rmtree(directory / seal.name.split(".")[0], ignore_errors=True)


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
        with _manager(directory) as manager:
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


def load_meta(directory: Path) -> dict:
    """Returns the ``meta`` of the newest finished checkpoint in ``directory``."""
    step = finished_step(directory)
    verify(directory, step)
    with _manager(directory) as manager:
        return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def load_params(directory: Path, abstract: Any) -> Any:
    """Returns the parameters alone of the newest finished checkpoint, onto any mesh.

    Args:
      abstract: pytree of ``jax.ShapeDtypeStruct``; where a leaf has no sharding it goes to the
        first device.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def on_device(leaf):
        sharding = getattr(leaf, "sharding", None) or device
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = jax.tree.map(on_device, abstract)
    return restore(directory, finished_step(directory), params=params)["params"]
