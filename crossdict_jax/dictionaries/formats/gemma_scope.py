"""Gemma Scope folders, in: a JumpReLU dictionary of raw activations.

The first Gemma Scope has params.npz, the second params.safetensors beside config.json.
"""

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from crossdict_jax.dictionaries.base import Dictionary, find, from_arrays
from crossdict_jax.dictionaries.folders import Arrays, centred, check_arrays
from crossdict_jax.dictionaries.wrapped import Skip, around
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import NOT_UNDERSTOOD, inside, read_object, read_tensors

TOOL, WEIGHTS = "Gemma Scope; the second: params.safetensors", "params.npz"
CONFIG, WEIGHTS_2 = "config.json", "params.safetensors"  # of the second
MOST_PACKED = 100  # bytes of an array per byte of the file: weights hardly shrink
DAMAGED = (*NOT_UNDERSTOOD, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)


def recognises(path: str) -> bool:
    """Whether ``path`` is a .npz file, or a folder with one of their files of weights."""
    files = [Path(path) / name for name in (WEIGHTS, WEIGHTS_2)]
    return any(map(Path.is_file, files + [Path(path)] * path.endswith(".npz")))


def names(path: str) -> dict[str, str]:
    """Returns what ``formats.names`` does: the second's config.json says it."""
    said = read_object(file) if (file := Path(path) / CONFIG).is_file() else {}
    hooks = {"hook_name": "hf_hook_point_in", "hook_name_out": "hf_hook_point_out"}
    return {"model_name": said.get("model_name")} | {key: said.get(hooks[key]) for key in hooks}


def load(path: str) -> Dictionary:
    """Returns the dictionary or transcoder: f = z 1[z > threshold] of z = x W_enc + b_enc.

    UserError: see ``formats.load``.
    """
    file, transcodes, kind = Path(path), False, find("jumprelu")
    if file.is_dir():
        file /= WEIGHTS if (file / WEIGHTS).is_file() else WEIGHTS_2
    if file.name == WEIGHTS_2:
        arrays, transcodes = _second(file)
    else:
        arrays = _first(file)
    width, d_out = arrays["W_dec"].shape if np.ndim(arrays.get("W_dec")) == 2 else (0, 0)
    d_model = len(arrays.get("W_enc", ())) if transcodes else d_out
    shapes = {"W_enc": (d_model, width), "b_enc": (width,), "threshold": (width,)}
    shapes |= {"W_dec": (width, d_out), "b_dec": (d_out,)}
    if transcodes and "affine_skip_connection" in arrays:
        shapes["W_skip"], kind = (d_out, d_model), around(Skip, kind)
        arrays["W_skip"] = arrays.pop("affine_skip_connection").T
    arrays = check_arrays(arrays, shapes, file)
    return from_arrays(kind, arrays if transcodes else centred(arrays), transcodes=transcodes)


def _first(file: Path) -> Arrays:
    """Returns the arrays of params.npz; none may take more memory than weights can."""
    try:
        with zipfile.ZipFile(inside(file.parent, file)) as archive:
            for member in archive.infolist():
                with archive.open(member) as data:
                    major, _ = np.lib.format.read_magic(data)
                    header = getattr(np.lib.format, f"read_array_header_{major}_0")
                    shape, _, dtype = header(data)
                    if dtype.hasobject:
                        raise ValueError(f"{member.filename} is an array of objects")
                    size = math.prod(shape) * dtype.itemsize + data.tell()
                usual = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                largest = MOST_PACKED * member.compress_size + 2**20
                if not usual or size != member.file_size or size > largest:
                    raise UserError(
                        f"{file}: {member.filename} says that it holds {size} bytes, packed into "
                        f"{member.compress_size}: no weights are like that; copy it again."
                    )
        with np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except DAMAGED as error:
        raise UserError(
            f"{file} is damaged or holds objects or unknown types ({error}); copy it again, or "
            "save its weights as float32."
        ) from error


def _second(file: Path) -> tuple[Arrays, bool]:
    """Returns the arrays of the second Gemma Scope, and whether it is a transcoder."""
    said = read_object(config := file.with_name(CONFIG))  # alone tells what is a transcoder
    arrays = {n.replace("w_", "W_"): array for n, array in read_tensors(file)}
    reads, writes = hooks = [said.get(f"hf_hook_point_{way}") for way in ("in", "out")]
    transcodes = bool(writes) and reads != writes
    only = {"architecture": "jump_relu", "type": "transcoder" if transcodes else "sae"}
    only["affine_connection"] = "affine_skip_connection" in arrays
    wrong = [f"{k}={said[k]!r}" for k in only if said.get(k) not in (None, False, only[k])]
    wrong += [f"a hook point {hook!r}" for hook in hooks if not isinstance(hook, str | None)]
    if wrong:
        raise UserError(
            f"{config}: {wrong[0]} is not supported with hook points {hooks}; only architecture "
            "'jump_relu', type 'sae' of one hook point or 'transcoder' of two, and "
            "affine_connection true where the weights hold affine_skip_connection."
        )
    return arrays, transcodes
