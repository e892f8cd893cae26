"""Gemma Scope folders, in: params.npz, a JumpReLU dictionary of raw activations."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from crossdict_jax.dictionaries.base import Dictionary, find, from_arrays
from crossdict_jax.dictionaries.folders import centred, check_arrays
from crossdict_jax.errors import UserError

TOOL, WEIGHTS = "Gemma Scope", "params.npz"
DAMAGED = (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


def recognises(path: str) -> bool:
    """Whether ``path`` is a .npz file, or a folder with params.npz."""
    return (Path(path) / WEIGHTS).is_file() or (path.endswith(".npz") and Path(path).is_file())


def load(path: str) -> Dictionary:
    """Returns the dictionary in a params.npz: f = z 1[z > threshold] of z = x W_enc + b_enc.

    UserError: see ``formats.load``.
    """
    file = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
    except DAMAGED as error:
        raise UserError(f"{file} is damaged or holds objects ({error}); copy it again.") from error
    width, d_model = arrays["W_dec"].shape if np.ndim(arrays.get("W_dec")) == 2 else (0, 0)
    shapes = {"W_enc": (d_model, width), "b_enc": (width,), "threshold": (width,)}
    shapes |= {"W_dec": (width, d_model), "b_dec": (d_model,)}
    return from_arrays(find("jumprelu"), centred(check_arrays(arrays, shapes, file)))
