"""SAELens folders, in (3 to 6) and out (6): cfg.json and sae_weights.safetensors."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from crossdict_jax import modules
from crossdict_jax.config import architectures
from crossdict_jax.dictionaries.base import (
    Dictionary,
    architecture_of,
    find,
    from_arrays,
    is_finite,
)
from crossdict_jax.dictionaries.folders import (
    Arrays,
    centred,
    check_arrays,
    lens_name,
    require,
    require_count,
    require_flag,
    site_of,
)
from crossdict_jax.dictionaries.wrapped import AbsTopK, ConstantNormed, LayerNormed, Skip, around
from crossdict_jax.errors import UserError
from crossdict_jax.training.checkpoint import latest_step
from crossdict_jax.workdir import check_space, read_object, read_tensors, say_once, write_json

TOOL, CONFIG, WEIGHTS = "SAELens", "cfg.json", "sae_weights.safetensors"
SCALER = "activation_scaler.json"
VERSION = "6.54.12"  # of the format written; hook and model names are dropped below 6

OURS = {"standard": "relu", "topk": "topk", "abstopk": "", "jumprelu": "jumprelu", "gated": "gated"}
OURS |= dict.fromkeys(("batchtopk", "matryoshka_batchtopk"), "jumprelu")  # of unfinished trainings
OURS |= dict.fromkeys(("transcoder", "skip_transcoder"), "relu")
OURS |= dict.fromkeys(("jumprelu_transcoder", "jumprelu_skip_transcoder"), "jumprelu")
TRANSCODERS = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}  # of these alone
FOLDED = "expected_average_only_in"  # a scale within the weights, unless it stands in SCALER
NORMS = {"constant_norm_rescale": ConstantNormed, "layer_norm": LayerNormed}
# How the model was loaded: with its writes into the residual stream centred, or in ways that leave
# the activations at our sites as they are.
OPTIONS, CENTRE = "model_from_pretrained_kwargs", "center_writing_weights"
NEUTRAL = "center_unembed fold_ln fold_value_biases refactor_factored_attn_matrices n_ctx dtype "
NEUTRAL += "torch_dtype device device_map n_devices move_to_device low_cpu_mem_usage first_n_layers"
NEUTRAL += " default_prepend_bos default_padding_side attn_implementation trust_remote_code"


def load(path: str) -> Dictionary:
    """Returns the dictionary of a SAELens folder, finished or from the midst of training.

    Scales of ``activation_scaler.json``, decoder norms, unsubtracted biases and the centring of the
    model's writes are folded into the weights. UserError: see ``formats.load``.
    """
    folder, file = Path(path), Path(path) / CONFIG
    config = _as_6(read_object(file), file)
    theirs = require(config, "architecture", file)
    if theirs not in OURS:
        raise UserError(f"{file}: architecture={theirs!r} is unknown; it may be {', '.join(OURS)}.")
    require(config, "dtype", file)
    transcodes, batch = theirs.endswith("transcoder"), "batchtopk" in theirs
    d_model, width = (require_count(config, key, file) for key in ("d_in", "d_sae"))
    d_out = require_count(config, "d_out", file) if transcodes else d_model
    flags = {"apply_b_dec_to_input": not transcodes, "rescale_acts_by_decoder_norm": batch}
    config |= {key: require_flag(config, key, file, default=d) for key, d in flags.items()}
    shapes = {"W_enc": (d_model, width), "W_dec": (width, d_out), "b_dec": (d_out,)}
    biases = ("b_gate", "b_mag", "r_mag") if theirs == "gated" else ("b_enc",)
    biases += ("threshold",) if theirs.startswith("jumprelu") else ()
    shapes |= dict.fromkeys(biases, (width,))
    shapes |= {"W_skip": (d_out, d_model)} if "skip" in theirs else {}
    shapes |= {"topk_threshold": ()} if batch else {}
    arrays = check_arrays(dict(read_tensors(folder / WEIGHTS)), shapes, folder / WEIGHTS)
    norms = ("none", FOLDED, *NORMS)
    norm, scale = config.get("normalize_activations") or "none", 1.0
    if norm not in norms:
        raise UserError(f"{file}: normalize_activations={norm!r} must be {', '.join(norms)}.")
    options, allowed = _about(config).get(OPTIONS) or {}, [CENTRE, *NEUTRAL.split()]
    if unknown := [key for key, value in options.items() if value and key not in allowed]:
        raise UserError(
            f"{file}: {OPTIONS} has {unknown[0]}={options[unknown[0]]!r}, which may change the "
            f"activations; it may have {', '.join(allowed)}: remove it if it changes nothing."
        )
    if centre := require_flag(options, CENTRE, file, default=False):
        hook = names(path)["hook_name"]
        if norm == "constant_norm_rescale" or not site_of(str(hook)):
            raise UserError(
                f"{file}: {CENTRE}=True with normalize_activations={norm!r} at hook_name={hook!r} "
                "is not supported, only with other normalisations, and in the residual stream, as "
                "at blocks.6.hook_resid_pre; correct what is wrong."
            )
    if (scaler := folder / SCALER).is_file():
        said = read_object(scaler)
        if said.get("has_whitening"):
            raise UserError(f"{scaler}: has_whitening is not supported; finish it in SAELens.")
        if (scale := said.get("scaling_factor")) is None:
            scale = 1.0
        if type(scale) not in (int, float) or not 0 < scale < float("inf"):
            raise UserError(f"{scaler}: scaling_factor={scale!r} must be a number above 0.")
    elif norm == FOLDED:
        mend = f'put {SCALER} beside it, {{"scaling_factor": sqrt(d_in) / mean norm of the rows}}'
        say_once(
            f"{file}: normalize_activations={norm!r} is taken to be folded into the weights, as "
            "SAELens does. Some old ones are not, and have a high fvu: "
            f"{'train another' if transcodes else mend}."
        )
    if not transcodes:
        arrays = _folded(arrays, config, theirs, scale)
    # What SAELens itself leaves undone, or does not do, is refused.
    elif config["apply_b_dec_to_input"]:
        raise UserError(f"{file}: apply_b_dec_to_input must be false for a transcoder.")
    elif norm in NORMS:
        raise UserError(f"{file}: normalize_activations={norm!r} of a transcoder is not supported.")
    elif scale != 1:
        raise UserError(
            f"{scaler}: a transcoder's scale of what it writes is not known; finish the training "
            "where it was begun."
        )
    arrays = _of_centred(arrays, transcodes) if centre else arrays
    architecture = find(OURS[theirs]) if OURS[theirs] else AbsTopK
    for wrapper in filter(None, ("W_skip" in arrays and Skip, NORMS.get(norm))):
        architecture = around(wrapper, architecture)
    k = require_count(config, "k", file, limit=width) if "k" in architecture.reads else 0
    return from_arrays(architecture, arrays, k=k, transcodes=transcodes)


def names(path: str) -> dict[str, str]:
    """Returns what ``formats.names`` does; null says nothing."""
    said = _about(read_object(Path(path) / CONFIG))
    said.setdefault("hook_name", said.get("hook_point") or said.get("hf_hook_name"))
    said.setdefault("hook_name_out", said.get("hf_hook_name_out"))
    said["centred"] = (said.get(OPTIONS) or {}).get(CENTRE)
    return {key: said.get(key) for key in ("model_name", "hook_name", "hook_name_out", "centred")}


def _about(config: dict[str, Any]) -> dict[str, Any]:
    """Returns what a config says at any of the places for it; meta was one before 6.0."""
    said = {}
    for about in (config, config.get("meta"), config.get("metadata")):
        said |= {key: value for key, value in (about or {}).items() if value}
    return said


def _as_6(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Returns a config as version 6 writes it, of one that names no version or an older one.

    As SAELens reads those: an activation function stood beside the architecture. UserError: it is
    one that version 6 does not know, and reads as ReLU.
    """
    about = config if config.get("sae_lens_version") else config.get("metadata") or {}
    major = str(about.get("sae_lens_version")).partition(".")[0]
    if major.isdigit() and int(major) >= 6:
        return config
    config = {"architecture": "standard"} | config
    functions = {config.get("activation_fn_str"), config.get("activation_fn")} - {None, ""}
    function, theirs = " and ".join(sorted(functions)) or "relu", config["architecture"]
    k = (config.get("activation_fn_kwargs") or {}).get("k")
    topk = (function, theirs) in (("topk", "standard"), ("topk", "topk"), ("relu", "topk"))
    if topk and k is not None:
        config |= {"architecture": "topk", "k": k}
    elif function != "relu" and (function, theirs) != ("topk", "topk"):
        raise UserError(
            f"{file}: activation_fn={function!r} and architecture={theirs!r} contradict each other "
            "or are not supported, only relu, or topk with its k and standard or topk; correct one."
        )
    flag = {True: FOLDED, False: "none"}
    if isinstance(norm := config.get("normalize_activations"), bool):
        config["normalize_activations"] = flag[norm]
    return config


def _folded(arrays: Arrays, config: dict[str, Any], theirs: str, scale: float) -> Arrays:
    """Returns the weights of a dictionary of ours that reads and writes raw rows."""
    arrays = arrays | {"W_enc": arrays["W_enc"] * scale}
    arrays |= {name: arrays[name] / scale for name in ("W_dec", "b_dec")}
    if "b_gate" in arrays:
        arrays["b_enc"] = arrays.pop("b_gate")
    if batch := "topk_threshold" in arrays:
        arrays["threshold"] = np.full(len(arrays["W_dec"]), arrays.pop("topk_threshold"))
    # Features are multiplied by their decoder norms before the largest are chosen.
    if theirs.endswith("topk") and config["rescale_acts_by_decoder_norm"]:
        norms = np.linalg.norm(arrays["W_dec"], axis=1)  # in raw units, as the threshold from here
        arrays |= {name: arrays[name] * norms for name in ("W_enc", "b_enc")}
        arrays["W_dec"] = arrays["W_dec"] / np.where(norms > 0, norms, 1)[:, None]
        if batch:
            arrays["threshold"] = arrays["threshold"] / scale
    return arrays if config["apply_b_dec_to_input"] else centred(arrays)


def _of_centred(arrays: Arrays, transcodes: bool) -> Arrays:
    """Returns weights that give for rows x what these give for x less the mean of each row.

    Exact where layer norms read the stream, which ignore that mean. Twice is as once.
    """
    W_enc, W_skip = arrays["W_enc"], arrays.get("W_skip")
    mean = np.broadcast_to(W_enc.mean(axis=0, keepdims=True), W_enc.shape)
    if not transcodes:  # b_dec, which is subtracted from x, is to be multiplied as before
        arrays = centred(arrays | {"W_enc": -mean})
    skip = {} if W_skip is None else {"W_skip": W_skip - W_skip.mean(axis=1, keepdims=True)}
    return arrays | skip | {"W_enc": W_enc - mean}


def save(
    dictionary: Dictionary,
    path: str | Path,
    *,
    hook_name: str,
    model_name: str,
    hook_name_out: str = "",
    centred: str = "",
) -> None:
    """Writes a folder that SAELens 6 loads: the same features of the same raw activations.

    batchtopk and matryoshka become jumprelu, as there. Topk and gated transcoders are refused.

    Args:
      hook_name: of what is read, in TransformerLens terms, as ``blocks.6.hook_resid_pre``. A
        module of transformers (``model.layers.6``) is written as ``hf_hook_name``, and beside it
        the hook that it is, if it is one.
      hook_name_out: of what a transcoder writes.
      centred: whether it was trained on a model with centred writes; empty: no.
    """
    from safetensors.numpy import save_file

    name, folder = architecture_of(dictionary), Path(os.path.expanduser(path))
    kind, forms = "dictionary", {a: find(a).saelens for a in architectures()}
    if dictionary.transcodes:
        kind, forms = "transcoder", {a: TRANSCODERS.get(form) for a, form in forms.items()}
    if not (theirs := forms[name]):
        able = ", ".join(a for a, form in forms.items() if form)
        raise UserError(f"A {name} {kind} has no SAELens form; {able} have one.")
    if folder.is_file() or latest_step(folder) is not None:
        wrong = "is a file" if folder.is_file() else "holds a checkpoint"
        raise UserError(f"{folder} {wrong}; name a folder, new or of an earlier export.")
    config = {
        "architecture": theirs,
        "d_in": dictionary.d_model,
        "d_sae": dictionary.width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not dictionary.transcodes,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    about, hooks = {"sae_lens_version": VERSION, "model_name": model_name}, {"hook_name": hook_name}
    if dictionary.transcodes:
        config |= {"d_out": dictionary.d_out}
        hooks["hook_name_out"] = hook_name_out
    for key, hook in hooks.items():
        lens = lens_name(hook)
        about |= {key: lens} if lens else {}
        about |= {f"hf_{key}": hook} if hook != lens else {}
    about |= {OPTIONS: {CENTRE: True}} if centred else {}
    if theirs == "topk":
        config |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}
    config |= {"metadata": about}
    arrays = {name: np.asarray(array) for name, array in modules.split(dictionary)[1].items()}
    scale = arrays.pop("scale")
    scale_out = arrays.pop("scale_out", scale)
    arrays["W_enc"] = arrays["W_enc"] * scale
    arrays |= {name: arrays[name] / scale_out for name in ("W_dec", "b_dec")}
    if "threshold" in arrays:
        arrays["threshold"] = np.broadcast_to(arrays["threshold"], dictionary.width)
    if theirs == "gated":
        arrays["b_gate"] = arrays.pop("b_enc")
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    if bad := [name for name, array in arrays.items() if not is_finite(name, array)]:
        raise UserError(f"{bad[0]} of the dictionary holds NaN or infinity; train it again.")
    # The config last: a folder without one was never finished.
    for file in (CONFIG, SCALER):
        (folder / file).unlink(missing_ok=True)
    check_space(folder, sum(array.nbytes for array in arrays.values()) + 4096)
    part = folder / f".{WEIGHTS}.part"
    save_file(arrays, part)
    os.replace(part, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
