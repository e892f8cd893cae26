"""Hugging Face folders in and out: config.json and weights; nothing remote is run."""

import importlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from crossdict_jax.config.rules import files_of
from crossdict_jax.errors import UserError
from crossdict_jax.models.base import LARGEST, LanguageModel, ModelConfig
from crossdict_jax.models.folders import ASSETS, CONFIG_FILES, EMBEDDED, find_folder
from crossdict_jax.modules import plain
from crossdict_jax.workdir import (
    as_float32,
    disk_words,
    inside,
    read_object,
    read_tensors,
    understood,
    write_json,
)

BUFFERS = (  # masks and tables that old files carry and nobody reads
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


model_types = partial(files_of, "models/families")  # those that can be loaded


def _family(model_type: str):
    return importlib.import_module(f"crossdict_jax.models.families.{model_type}")


@plain
def load(path_or_id: str | Path) -> LanguageModel:
    """The float32 model of a folder in Hugging Face format, an embedded name or a hub id.

    UserError if there is none or if anything in its files is not understood.
    """
    folder = find_folder(path_or_id)
    config = load_config(folder)
    graphdef, leaves = _abstract(config)
    flat = {".".join(map(str, key)): (key, leaf) for key, leaf in leaves}
    weights = _read_weights(folder, config, {name: leaf.shape for name, (_, leaf) in flat.items()})
    filled = [(key, leaf.replace(weights[name])) for name, (key, leaf) in flat.items()]
    lm = nnx.merge(graphdef, nnx.from_flat_state(filled))
    lm.name = Path(os.path.abspath(os.path.expanduser(path_or_id))).name
    lm.path = str(folder)
    return lm


@lru_cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, list]:
    """Returns (graph, flat state of shapes); kept, for tracing takes longer than reading."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: init(config)))
    return graphdef, list(nnx.to_flat_state(state))


@plain
def init(config: ModelConfig | dict, seed: int = 0) -> LanguageModel:
    """An untrained model of a ``ModelConfig`` or a dict as in config.json."""
    if isinstance(config, dict):
        config = read_config(config)
    return _family(config.model_type).Model(config, nnx.Rngs(params=seed))


def save(lm: LanguageModel, path: str | Path, *, dtype: str = "float32", tokenizer=None) -> None:
    """Writes a folder that ``load`` and transformers read; with ``tokenizer``, its files too.

    ``dtype`` of the file: float32, float16 or bfloat16.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if dtype not in DTYPES:
        raise UserError(f"Weights cannot be saved as {dtype!r}, only as {', '.join(DTYPES)}.")
    path, config = Path(os.path.expanduser(path)), lm.config
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(disk_words(path, error)) from error
    flat = {".".join(map(str, key)): leaf for key, leaf in nnx.to_flat_state(nnx.state(lm))}
    tensors = {}
    for in_file, (name, transposed) in _table(config).items():
        if name in flat:
            value = np.asarray(flat[name][...]).astype(DTYPES[dtype])
            tensors[in_file] = np.ascontiguousarray(value.T if transposed else value)
    # Renamed at the end, so that a killed save leaves no half file.
    file, part = path / "model.safetensors", path / "model.part"
    try:
        save_file(tensors, part, metadata={"format": "pt"})  # transformers asks for the format
    except SafetensorError as error:
        raise UserError(
            f"{file} cannot be written ({error}); free space or go elsewhere."
        ) from error
    (path / "config.json").unlink(missing_ok=True)  # nor the weights of one beside that of another
    os.replace(part, file)
    family = _family(config.model_type)
    raw = {"model_type": config.model_type, "architectures": [family.ARCHITECTURE], "dtype": dtype}
    raw |= {key: getattr(config, field) for key, (field, *_) in family.KEYS.items()}
    raw |= {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id")}
    write_json(path / "config.json", raw)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


# config.json


def load_config(path_or_id: str | Path) -> ModelConfig:
    """The settings in a model's config.json; UserError if they are not understood."""
    file = find_folder(path_or_id, CONFIG_FILES) / "config.json"
    if not file.is_file():
        raise UserError(f"{file.parent} has no config.json; it is not a Hugging Face model folder.")
    raw = read_object(file)
    with understood(file, mend="copy it again"):
        try:
            return read_config(raw)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error


def known_config(path_or_id: str | Path) -> ModelConfig:
    """The settings of a model, read without its weights and without the hub.

    For a folder with config.json, an embedded model, or an id in assets/shapes.json; variants of
    a model (-seed3, -deduped) have its shape.
    """
    text = str(path_or_id)
    if text in EMBEDDED or os.path.isdir(os.path.expanduser(text)):
        return load_config(text)
    shapes = read_object(ASSETS / "shapes.json")
    raw = shapes.get(re.sub(r"(-deduped|-seed\d+)+$", "", text))
    if raw is None:
        raise UserError(
            f"The shape of {text!r} is not known here (those of {', '.join(shapes)} are); put its "
            "config.json into a folder and give that folder in models."
        )
    return read_config(raw)


def read_config(raw: dict) -> ModelConfig:
    """Our settings from config.json; UserError on what would change the maths."""
    model_type = raw.get("model_type")
    if model_type not in model_types():
        raise UserError(f"model_type {model_type!r} is not one of {', '.join(model_types())}.")
    family, raw = _family(model_type), dict(raw)
    rope = raw.pop("rope_scaling", None) or raw.get("rope_parameters") or {}  # the older name
    if not isinstance(rope, dict):
        raise UserError(f"rope_scaling {rope!r} must be a JSON object.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(
            f"rope type {kind!r} is not implemented, only 'default'; choose another model."
        )
    raw["rope_parameters"] = rope
    for alias, key in family.SPELLINGS.items():
        if alias in raw and raw.setdefault(key, raw[alias]) != raw[alias]:
            raise UserError(f"{key} {raw[key]!r} and {alias} {raw[alias]!r} contradict each other.")
    raw = family.prepare(raw)
    refused = {"quantization_config": None, "is_causal": True} | family.REFUSED_UNLESS
    for key, allowed in refused.items():
        if raw.get(key) is not None and raw[key] != allowed:
            raise UserError(f"{key} {raw[key]!r} is not implemented, only {allowed!r}.")
    values = {}
    for key, (field, *default) in family.KEYS.items():
        value = raw.get(key)
        if value is None and not default:
            raise UserError(f"{key} is missing.")
        expected = type(default[0]) if default else int
        value = default[0] if value is None else value
        value = float(value) if expected is float and type(value) is int else value
        if type(value) is not expected:
            raise UserError(f"{key} {value!r} must be {expected.__name__}.")
        if expected is int and not 1 <= value <= LARGEST:  # all are counts
            raise UserError(f"{key} {value} must be at least 1 and at most {LARGEST}.")
        values[field] = value
    for key in ("bos_token_id", "eos_token_id"):
        ids = raw.get(key)
        values[key] = tuple(ids) if isinstance(ids, list) else ids
        each = ids if isinstance(ids, list) else [ids]
        if ids is not None and any(type(i) is not int for i in each):
            raise UserError(f"{key} {ids!r} must be token ids.")
    return family.Config(model_type=model_type, **values)


# Weights


def _table(config: ModelConfig) -> dict[str, tuple[str, bool]]:
    """{name in the file: (our name, whether it is transposed)} for every layer of ``config``."""
    family = _family(config.model_type)
    table = {name: (ours, ours == "W_U") for name, ours in family.WEIGHTS.items()}
    for layer in range(config.n_layers):
        for part, ours in family.BLOCK_PARTS.items():
            name = family.BLOCK_PREFIX.format(layer=layer) + part
            weight, bias = ("scale", "bias") if ours.startswith("norm") else ("W", "b")
            transposed = weight == "W" and family.TRANSPOSED
            table[f"{name}.weight"] = f"blocks.{layer}.{ours}.{weight}", transposed
            table[f"{name}.bias"] = f"blocks.{layer}.{ours}.{bias}", False
    return table


def _read_weights(folder: Path, config: ModelConfig, shapes: dict) -> dict[str, jax.Array]:
    """{our name: float32 array} for every {our name: shape}, each found exactly once."""
    prefix = _family(config.model_type).PREFIX
    table = _table(config)
    anew = {"lm_head.weight": ("W_U", True)}  # as transformers 5 names every head that it makes
    weights, tied_head = {}, None
    for file, in_file, value in _tensors(folder):
        ours = table.get(in_file) or table.get(prefix + in_file) or anew.get(in_file)
        name, transposed = ours or (None, False)
        is_tied_head = name == "W_U" and config.tied
        if name not in shapes and not is_tied_head:
            raise UserError(
                f"{folder} holds the unknown weight {in_file!r}, which may change the maths; "
                f"is it a {config.model_type} as config.json says?"
            )
        value = as_float32(value, in_file, file)
        # Embeddings spoil rows of their own alone: extract.nonfinite leaves those out.
        if name not in ("W_E", "W_pos") and not np.isfinite(value).all():
            raise UserError(f"{file}: {in_file} holds NaN or infinity; copy it again.")
        if is_tied_head:
            tied_head = value
            continue
        if name in weights:
            raise UserError(f"{folder} holds the weight {in_file!r} twice.")
        value = value.T if transposed else value
        if value.shape != shapes[name]:
            raise UserError(
                f"{folder}: weight {in_file!r} has shape {list(value.shape)} where config.json "
                f"asks for {list(shapes[name])} (as [d_in, d_out])."
            )
        weights[name] = jax.device_put(value)
    if tied_head is not None and "W_E" not in weights and tied_head.shape == shapes["W_E"]:
        weights["W_E"] = jax.device_put(tied_head)  # either may be the one stored
    missing = [name for name, (ours, _) in table.items() if ours in set(shapes) - set(weights)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{folder} lacks the weight {missing[0]!r}{more}; copy all of its files again."
        )
    if tied_head is not None and not np.array_equal(tied_head, np.asarray(weights["W_E"])):
        raise UserError(
            f"{folder} holds a head that differs from its embedding, but config.json ties them; "
            "set tie_word_embeddings to false."
        )
    return weights


def _tensors(folder: Path) -> Iterator[tuple[Path, str, np.ndarray]]:
    """(file, name, array) of every weight of the folder, known buffers left out."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} holds no weight_map of objects; copy it again.")
        names = sorted(set(map(str, weight_map.values())))
    else:
        raise UserError(
            f"{folder} has no model.safetensors; if it has pytorch_model.bin alone, save the model "
            "again with transformers, which writes safetensors."
        )
    for name in names:
        file = folder / name
        if not os.path.isfile(file):
            raise UserError(
                f"{folder} lacks the shard {name!r} that its index names; copy it again."
            )
        for weight, value in read_tensors(inside(folder, file)):
            if not f".{weight}".endswith(BUFFERS):
                yield file, weight, value
