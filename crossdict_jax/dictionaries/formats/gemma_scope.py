"""Gemma Scope folders, in: params.npz, a JumpReLU dictionary of raw activations."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from crossdict_jax.dictionaries.base import Dictionary, find, from_arrays
from crossdict_jax.dictionaries.formats.imported import check_arrays
from crossdict_jax.dictionaries.formats.saelens import keep_b_dec_out
from crossdict_jax.errors import UserError

WEIGHTS = "params.npz"
DAMAGED = (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


def load(file: Path) -> Dictionary:
    """Returns the dictionary in a params.npz: f = z 1[z > threshold] of z = x W_enc + b_enc.

    Raises:
      UserError: the file is damaged or holds other arrays.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = dict(arrays)
    except DAMAGED as error:
        raise UserError(f"{file} is damaged or holds objects ({error}); copy it again.") from error
    width, d_model = found["W_dec"].shape if np.ndim(found.get("W_dec")) == 2 else (0, 0)
    shapes = {"W_enc": (d_model, width), "b_enc": (width,), "threshold": (width,)}
    shapes |= {"W_dec": (width, d_model), "b_dec": (d_model,)}
    arrays = check_arrays(found, shapes, file)
    keep_b_dec_out(arrays)
    return from_arrays(find("jumprelu"), arrays)
