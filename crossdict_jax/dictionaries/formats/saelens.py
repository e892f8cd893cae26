"""SAELens folders (6.x), in and out: cfg.json and sae_weights.safetensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from crossdict_jax.dictionaries.base import Dictionary, architecture_of, find, from_arrays
from crossdict_jax.dictionaries.formats.imported import (
    NORMS,
    AbsTopK,
    Normed,
    Skip,
    read_config,
    read_safetensors,
    require,
    require_count,
)
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import check_space, read_json, write_json

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
VERSION = "6.54.12"  # of the format written; hook and model names are dropped below 6

Arrays = dict[str, np.ndarray]

OURS = {  # SAELens architecture: ours; the last two exist in folders of unfinished training only
    "standard": "relu",
    "topk": "topk",
    "abstopk": "",  # none of ours
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
THEIRS = {  # ours: SAELens architecture that says the same
    "relu": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
}
THEIR_TRANSCODERS = {  # ours, where one site is read and another written
    "relu": "transcoder",
    "jumprelu": "jumprelu_transcoder",
    "batchtopk": "jumprelu_transcoder",
    "matryoshka": "jumprelu_transcoder",
}
BATCH = ("batchtopk", "matryoshka_batchtopk")


# ---------------------------------------------------------------- in


def load(folder: Path) -> Dictionary:
    """Returns the dictionary of a SAELens folder, finished or from the midst of training.

    Everything that is linear is folded into the weights, so that it becomes one of ours: the
    scale of ``activation_scaler.json``, decoder norms, a bias that is not subtracted.

    Raises:
      UserError: a key or weight is missing, damaged, or means something that ours cannot do.
    """
    file = folder / CONFIG
    config = read_config(file)
    theirs = require(config, "architecture", file)
    if theirs not in OURS:
        raise UserError(f"{file}: architecture={theirs!r} is unknown; it may be {', '.join(OURS)}.")
    require(config, "dtype", file)
    arrays = read_safetensors(folder / WEIGHTS, _shapes(config, theirs, file))
    norm = _norm(config, file)
    if _transcodes(theirs):
        _check_transcoder(config, norm, folder)
        dictionary = _dictionary(config, theirs, arrays, file)
        return Skip(dictionary, arrays["W_skip"]) if "W_skip" in arrays else dictionary
    _fold_scale(arrays, _scale(folder), rescaled=_rescales(config, theirs))
    if _rescales(config, theirs):
        _fold_decoder_norms(arrays)
    gate_bias(arrays)
    if not config.get("apply_b_dec_to_input", True):
        keep_b_dec_out(arrays)
    dictionary = _dictionary(config, theirs, arrays, file)
    return Normed(dictionary, norm=norm) if norm in NORMS else dictionary


def _transcodes(theirs: str) -> bool:
    return theirs.endswith("transcoder")


def _check_transcoder(config: dict[str, Any], norm: str, folder: Path) -> None:
    """Refuses what SAELens itself leaves undone, or does not do, for a transcoder."""
    file = folder / CONFIG
    if config.get("apply_b_dec_to_input"):
        raise UserError(f"{file}: apply_b_dec_to_input must be false for a transcoder.")
    if norm in NORMS:
        raise UserError(f"{file}: normalize_activations={norm!r} of a transcoder is not supported.")
    if _scale(folder) != 1:
        raise UserError(
            f"{folder / SCALER}: a transcoder's scale of what it writes is not known; finish the "
            "training where it was begun."
        )


def _shapes(config: dict[str, Any], theirs: str, file: Path) -> dict[str, tuple[int, ...]]:
    d_model, width = (require_count(config, key, file) for key in ("d_in", "d_sae"))
    d_out = require_count(config, "d_out", file) if _transcodes(theirs) else d_model
    shapes = {"W_enc": (d_model, width), "W_dec": (width, d_out), "b_dec": (d_out,)}
    biases = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}
    kind = "jumprelu" if theirs.startswith("jumprelu") else theirs
    shapes |= {name: (width,) for name in biases.get(kind, ("b_enc",))}
    if "skip" in theirs:
        shapes["W_skip"] = (d_out, d_model)
    return shapes | ({"topk_threshold": ()} if theirs in BATCH else {})


def _norm(config: dict[str, Any], file: Path) -> str:
    # expected_average_only_in is folded already, or is what activation_scaler.json says.
    known = ("none", "expected_average_only_in", *NORMS)
    norm = config.get("normalize_activations") or "none"
    if norm not in known:
        raise UserError(f"{file}: normalize_activations={norm!r} must be {', '.join(known)}.")
    return norm


def _rescales(config: dict[str, Any], theirs: str) -> bool:
    """Whether features are multiplied by their decoder norms before the largest are chosen."""
    return theirs in ("topk", "abstopk", *BATCH) and bool(
        config.get("rescale_acts_by_decoder_norm", theirs in BATCH)
    )


def _scale(folder: Path) -> float:
    """The factor that rows were multiplied with in training, where weights are not folded yet."""
    if not (folder / SCALER).is_file():
        return 1.0
    scaler = read_json(folder / SCALER)
    if scaler.get("has_whitening"):
        raise UserError(
            f"{folder / SCALER}: has_whitening is not supported; finish the training in SAELens."
        )
    scale = scaler.get("scaling_factor")
    scale = 1.0 if scale is None else scale
    if not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
        raise UserError(f"{folder / SCALER}: scaling_factor={scale!r} must be a number above 0.")
    return float(scale)


def _fold_scale(arrays: Arrays, scale: float, *, rescaled: bool) -> None:
    arrays["W_enc"] = arrays["W_enc"] * scale
    arrays["W_dec"] = arrays["W_dec"] / scale
    arrays["b_dec"] = arrays["b_dec"] / scale
    if "topk_threshold" in arrays and rescaled:  # decoder norms are in raw units from here on
        arrays["topk_threshold"] = arrays["topk_threshold"] / scale


def _fold_decoder_norms(arrays: Arrays) -> None:
    norms = np.linalg.norm(arrays["W_dec"], axis=1)
    arrays["W_enc"] = arrays["W_enc"] * norms[None, :]
    arrays["b_enc"] = arrays["b_enc"] * norms
    arrays["W_dec"] = arrays["W_dec"] / np.where(norms > 0, norms, 1)[:, None]


def gate_bias(arrays: Arrays) -> None:
    """Renames the gate's bias, which is what b_enc is in ours."""
    if "b_gate" in arrays:
        arrays["b_enc"] = arrays.pop("b_gate")


def keep_b_dec_out(arrays: Arrays) -> None:
    """Makes z = x W_enc + b_enc of our z = (x - b_dec) W_enc + b_enc, through the bias."""
    shift = arrays["b_dec"] @ arrays["W_enc"]
    arrays["b_enc"] = arrays["b_enc"] + shift
    if "b_mag" in arrays:
        arrays["b_mag"] = arrays["b_mag"] + shift * np.exp(arrays["r_mag"])


def _dictionary(config: dict[str, Any], theirs: str, arrays: Arrays, file: Path) -> Dictionary:
    width = len(arrays["W_dec"])
    if "topk_threshold" in arrays:
        arrays["threshold"] = np.full(width, arrays.pop("topk_threshold"))
    kind = AbsTopK if theirs == "abstopk" else find(OURS[theirs])
    has_k = theirs in ("topk", "abstopk")
    k = require_count(config, "k", file, most=width) if has_k else 0
    ours = {name: array for name, array in arrays.items() if name != "W_skip"}
    return from_arrays(kind, ours, k=k, transcodes=_transcodes(theirs))


# ---------------------------------------------------------------- out


def save_saelens(
    dictionary: Dictionary,
    path: str | Path,
    *,
    hook_name: str,
    model_name: str,
    hook_name_out: str = "",
) -> None:
    """Writes a folder that SAELens 6 loads: the same features of the same raw activations.

    batchtopk and matryoshka become jumprelu, as SAELens itself saves them. Of transcoders it knows
    relu and jumprelu ones alone, so topk and gated ones are refused.

    Args:
      hook_name: where the activations are from, in TransformerLens terms, such as
        ``blocks.6.hook_resid_pre``.
      model_name: of the language model.
      hook_name_out: of a transcoder: where the activations belong that it writes.
    """
    forms = THEIR_TRANSCODERS if dictionary.transcodes else THEIRS
    theirs = forms.get(architecture_of(dictionary))
    if theirs is None:
        kind = "transcoder" if dictionary.transcodes else "dictionary"
        raise UserError(
            f"A {architecture_of(dictionary)} {kind} has no SAELens form; {', '.join(forms)} "
            "have one."
        )
    config = {
        "architecture": theirs,
        "d_in": dictionary.d_model,
        "d_sae": dictionary.width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not dictionary.transcodes,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION,
            "model_name": model_name,
            "hook_name": hook_name,
        },
    }
    if dictionary.transcodes:
        config |= {"d_out": dictionary.d_out}
        config["metadata"] |= {"hook_name_out": hook_name_out} if hook_name_out else {}
    if theirs == "topk":
        config |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}
    _write(Path(path), config, _in_raw_units(dictionary, theirs))


def _in_raw_units(dictionary: Dictionary, theirs: str) -> Arrays:
    scale = np.asarray(dictionary.scale[...])
    arrays = {name: np.asarray(getattr(dictionary, name)[...]) for name in ("W_enc", "W_dec")}
    arrays |= {name: np.asarray(getattr(dictionary, name)[...]) for name in ("b_enc", "b_dec")}
    _fold_scale(arrays, scale, rescaled=False)
    if dictionary.transcodes:  # what is written has a scale of its own
        ratio = scale / np.asarray(dictionary.scale_out[...])
        arrays |= {name: arrays[name] * ratio for name in ("W_dec", "b_dec")}
    if theirs.startswith("jumprelu"):
        arrays["threshold"] = np.broadcast_to(dictionary.threshold[...], dictionary.width)
    if theirs == "gated":
        arrays["b_gate"] = arrays.pop("b_enc")
        arrays |= {name: np.asarray(getattr(dictionary, name)[...]) for name in ("b_mag", "r_mag")}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def _write(folder: Path, config: dict[str, Any], arrays: Arrays) -> None:
    """The config last: a folder without one was never finished."""
    from safetensors.numpy import save_file

    if folder.is_file():
        raise UserError(f"{folder} is a file; name a folder, new or of an earlier export.")
    (folder / CONFIG).unlink(missing_ok=True)
    check_space(folder, sum(array.nbytes for array in arrays.values()) + 4096)
    part = folder / f".{WEIGHTS}.part"
    save_file(arrays, part)
    os.replace(part, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
