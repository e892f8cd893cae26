"""sparsify folders (EleutherAI), in: cfg.json and sae.safetensors."""

import os
import re
from pathlib import Path

from crossdict_jax.dictionaries.base import Dictionary, find, from_arrays
from crossdict_jax.dictionaries.folders import MODULE, check_arrays, require_count, require_flag
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import read_object, read_tensors

TOOL, CONFIG, WEIGHTS = "sparsify", "cfg.json", "sae.safetensors"
ONLY = {"activation": "topk", "signed": False, "skip_connection": False}
FREE = {"normalize_decoder", "multi_topk", "transcode"}  # may be true; of others it is not known


def names(path: str) -> dict[str, str]:
    """Returns what ``formats.names`` does.

    Folders, or those of seeds, are named as layers.6; the config.json beside says of which model.
    """
    path = os.path.abspath(path)
    if not (module := re.fullmatch(rf"(?:.*/)?({MODULE})(?:/seed\d+)?", path)):
        return {}
    run = Path(path[: module.start(1)]) / "config.json"
    model = read_object(run).get("model") if run.is_file() else None
    reads, writes, file = module[1], None, Path(path) / CONFIG
    if file.is_file() and read_object(file).get("transcode"):  # the module's input, its output
        reads, writes = reads + ".input" if module[3] else f"blocks.{module[2]}.hook_in", reads
    return {"hook_name": reads, "hook_name_out": writes, "model_name": model}


def load(path: str) -> Dictionary:
    """Returns the TopK dictionary of a sparsify folder, whose ``layers.N`` is our ``resid_post.N``.

    A transcoder's ``layers.N`` reads ``resid_pre.N`` and writes ``resid_post.N``.

    UserError: see ``formats.load``.
    """
    file, weights = Path(path) / CONFIG, Path(path) / WEIGHTS
    config = read_object(file)
    unknown = (key for key, value in config.items() if value is True and key not in FREE)
    for key, only in (dict.fromkeys(unknown, False) | ONLY).items():
        if config.get(key, only) != only:
            raise UserError(f"{file}: {key}={config[key]!r} is not supported, only {only!r}.")
    d_model = require_count(config, "d_in", file)
    size = "num_latents" if config.get("num_latents") else "expansion_factor"
    width = require_count(config, size, file) * (1 if size == "num_latents" else d_model)
    shapes = {"encoder.weight": (width, d_model), "encoder.bias": (width,)}
    shapes |= {"W_dec": (width, d_model), "b_dec": (d_model,)}
    arrays = check_arrays(dict(read_tensors(weights)), shapes, weights)
    arrays["W_enc"] = arrays.pop("encoder.weight").T
    arrays["b_enc"] = arrays.pop("encoder.bias")
    k = require_count(config, "k", file, limit=width)
    transcodes = require_flag(config, "transcode", file, default=False)
    return from_arrays(find("topk"), arrays, k=k, transcodes=transcodes)
