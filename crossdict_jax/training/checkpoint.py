"""Orbax checkpoints with checksums: whole and unaltered, or refused with the file's name."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from crossdict_jax.errors import UserError
from crossdict_jax.training.mesh import shapes_of
from crossdict_jax.workdir import check_space, disk_words, folder_digests, read_json, write_json

OVERHEAD = 1 << 18  # bytes of a checkpoint beside its arrays, at most
MARK = "_CHECKPOINT_METADATA"  # in every folder that orbax has written
BESIDE = {"commit_success.txt", "meta"}  # the trees, there
OPTIONS = ocp.CheckpointManagerOptions(max_to_keep=None, enable_async_checkpointing=False)

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every save


def latest_step(directory: Path) -> int | None:
    """Returns the newest finished step, or None; STEP.sha256.json is written last."""
    names = (seal.name.split(".")[0] for seal in Path(directory).glob("[0-9]*.sha256.json"))
    steps = [int(name) for name in names if name.isdecimal()]  # and no copies of one
    return max((s for s in steps if (Path(directory) / str(s)).is_dir()), default=None)


def is_finished(directory: Path) -> bool:
    """Whether ``directory`` holds a finished checkpoint."""
    return latest_step(directory) is not None


def finished_step(directory: Path) -> int:
    """Returns the newest finished step.

    Raises:
      UserError: there is none, or a file of it is missing, truncated or altered.
    """
    step = latest_step(directory)
    if step is None:
        raise UserError(f"{directory} holds no finished checkpoint; run the stage that writes it.")
    folder = Path(directory) / str(step)
    digests = folder_digests(folder)
    for name, digest in read_json(Path(directory) / f"{step}.sha256.json").items():
        if digests.get(name) != digest:
            state = "altered or cut short" if name in digests else "missing"
            raise UserError(
                f"Checkpoint file {folder / name} is {state} (checksum mismatch); "
                f"delete {directory} and run its stage again."
            )
    return step


def save(directory: Path, step: int = 0, *, meta: dict | None = None, **trees) -> None:
    """Writes pytrees (``params=``, ``train=``) and ``meta`` (JSON) as checkpoint ``step``.

    Older checkpoints are deleted once the new one is sealed; what else lies there stays.

    Raises:
      UserError: there is no space, this step or a later one is there already (orbax would write
        nothing), or another folder is named as a step is.
    """
    directory = Path(os.path.expanduser(directory))
    trees = jax.tree.map(np.asarray, trees)
    new, latest = directory / f"{step}.sha256.json", latest_step(directory)
    if latest is not None and latest >= step:
        raise UserError(
            f"{directory} holds checkpoint {latest} already; delete it or go elsewhere."
        )
    for path in directory.glob("[0-9]*"):
        number, _, rest = path.name.partition(".")
        sealed = (directory / f"{path.name}.sha256.json").is_file()
        if sealed or not number.isdecimal() or not path.is_dir():
            continue
        inside = {p.name for p in path.iterdir()}  # as a kill leaves it:
        half = MARK in inside or inside <= BESIDE | trees.keys()
        if rest.startswith("orbax-checkpoint-tmp") or (half and not rest):
            shutil.rmtree(path)
        elif not rest:
            raise UserError(f"{path} is no checkpoint, but named as one; save to another folder.")
    # Checked first: orbax's threads print their own tracebacks when they fail.
    check_space(directory, sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) + OVERHEAD)
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    items["meta"] = ocp.args.JsonSave(meta or {})
    try:
        with ocp.CheckpointManager(directory.absolute(), options=OPTIONS) as manager:
            manager.save(step, args=ocp.args.Composite(**items))
            manager.wait_until_finished()
        write_json(new, folder_digests(directory / str(step)))
    except OSError as error:
        raise UserError(disk_words(directory, error)) from error
    for seal in set(directory.glob("[0-9]*.sha256.json")) - {new}:
        seal.unlink()
        shutil.rmtree(directory / seal.name.split(".")[0], ignore_errors=True)


def restore(directory: Path, **abstract: Any) -> dict[str, Any]:
    """Returns named trees of the newest finished checkpoint.

    Args:
      abstract: per tree, a pytree of ``jax.ShapeDtypeStruct`` with shardings.

    Raises:
      UserError: there is none, or it is damaged or of another shape.
    """
    folder = Path(directory).absolute() / str(finished_step(directory))
    try:
        with ocp.StandardCheckpointer() as checkpointer:  # half as long as by a manager
            return {name: checkpointer.restore(folder / name, abstract[name]) for name in abstract}
    except (PermissionError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # some are bare
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Checkpoint {directory} does not fit ({reason}); delete it and run its stage again."
        ) from error


def load_meta(directory: Path) -> dict:
    """Returns the ``meta`` of the newest finished checkpoint."""
    folder = Path(directory) / str(finished_step(directory))
    return read_json(folder / "meta" / "metadata")  # orbax takes ten times


def load_params(directory: Path, abstract: Any) -> Any:
    """Returns the parameters of the newest finished checkpoint, which go where other arrays are.

    ``abstract`` is a pytree with their shapes and dtypes.
    """
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = restore(directory, params=shapes_of(abstract, first))["params"]
    return jax.device_put(jax.tree.map(np.asarray, params))  # committed nowhere
