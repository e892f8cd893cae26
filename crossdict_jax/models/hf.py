"""Hugging Face folders in and out: config.json, safetensors, tokenizer; nothing remote is run."""

import importlib.util
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from crossdict_jax.errors import UserError
from crossdict_jax.models.base import LanguageModel, ModelConfig

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ("docs-gpt2", "docs-neox")  # folders of ASSETS, loaded by their bare names
CONFIG_FILES = ("config.json",)
SAFETENSORS_FILES = ("model*.safetensors", "model.safetensors.index.json")
TORCH_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is needed
TOKENIZER_EXTRAS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)
BUFFERS = (  # masks and tables that old files carry and nobody reads
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)
TRANSFORMS = {"same": lambda x: x, "transpose": np.transpose}  # each its own inverse
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def families() -> tuple[str, ...]:
    """The model types that can be loaded: the files of their folder."""
    return tuple(sorted(f.stem for f in (Path(__file__).parent / "families").glob("[!_]*.py")))


def load(path_or_id: str | Path) -> LanguageModel:
    """The model in a folder in Hugging Face format, or of a hub id; float32.

    Names in ``EMBEDDED`` are found in the package itself. UserError if there is no such model
    or if anything in its files is not understood.
    """
    folder = _find_weights(path_or_id)
    config = load_config(folder)
    lm = nnx.eval_shape(lambda: init(config))
    lm.name, lm.path = folder_name(path_or_id), str(folder)
    graphdef, state = nnx.split(lm)
    flat = nnx.to_flat_state(state)
    filled = _fill(folder, config, {_place(key): leaf.shape for key, leaf in flat})
    flat = [(key, leaf.replace(filled[_place(key)])) for key, leaf in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def init(config: ModelConfig | dict, seed: int = 0) -> LanguageModel:
    """An untrained model of ``config`` (ours, or a dict as in config.json)."""
    if isinstance(config, dict):
        config = read_config(config)
    return _family(config.model_type).Model(config, nnx.Rngs(params=seed))


def save(lm: LanguageModel, path: str | Path, *, dtype: str = "float32", tokenizer=None) -> None:
    """Writes a folder that ``load`` and transformers read; with ``tokenizer``, its files too.

    ``dtype`` is that of the file: float32, float16 or bfloat16.
    """
    if dtype not in DTYPES:
        raise UserError(f"Weights cannot be saved as {dtype!r}, only as {', '.join(DTYPES)}.")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    _write_safetensors(_named_weights(lm, DTYPES[dtype]), path / "model.safetensors")
    raw = write_config(lm.config) | {"dtype": dtype}
    (path / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


# Where a model lies


def folder_name(path_or_id: str | Path) -> str:
    """The last part of a path or id: what a model is called in a work directory."""
    return Path(os.path.abspath(Path(path_or_id).expanduser())).name


def find_folder(path_or_id: str | Path, patterns: tuple[str, ...]) -> Path:
    """The folder of a path, an embedded model or a hub id; UserError if there is none.

    From the hub (or its local cache) only files that match ``patterns`` are taken.
    """
    text = str(path_or_id)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if text in EMBEDDED and (ASSETS / text).is_dir():
        return ASSETS / text
    if path.is_file():
        raise UserError(f"{text} is a file; name the folder that holds config.json.")
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or not text.strip():
        raise UserError(f"There is no folder {text!r}; name a folder with config.json or a hub id.")
    return _download(text, patterns)


def _download(hub_id: str, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(hub.snapshot_download(hub_id, allow_patterns=list(patterns)))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{hub_id!r} is no folder here and no public model on the hub; check the spelling, or "
            f"use an embedded model ({', '.join(EMBEDDED)})."
        ) from error
    except Exception as error:  # offline, proxies, time-outs: each library raises its own
        raise UserError(
            f"{hub_id!r} is no folder here, and the hub cannot be reached "
            f"({type(error).__name__}); give the folder of a downloaded model, or use an embedded "
            f"one ({', '.join(EMBEDDED)})."
        ) from error


def _find_weights(path_or_id: str | Path) -> Path:
    """The folder with config, weights and tokenizer; old torch files only where torch is."""
    patterns = CONFIG_FILES + SAFETENSORS_FILES + TOKENIZER_FILES + TOKENIZER_EXTRAS
    folder = find_folder(path_or_id, patterns)
    if not any(folder.glob("model*.safetensors")) and importlib.util.find_spec("torch"):
        return find_folder(path_or_id, patterns + TORCH_FILES)
    return folder


# config.json


def load_config(path_or_id: str | Path) -> ModelConfig:
    """The settings in a model's config.json; UserError if they are not understood."""
    file = find_folder(path_or_id, CONFIG_FILES) / "config.json"
    if not file.is_file():
        raise UserError(f"{file.parent} has no config.json; it is not a Hugging Face model folder.")
    raw = _read_json(file)
    try:
        return read_config(raw)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def read_config(raw: dict) -> ModelConfig:
    """Our settings from those of config.json; UserError on what would change the maths."""
    model_type = raw.get("model_type")
    if model_type not in families():
        raise UserError(f"model_type {model_type!r} is not one of {', '.join(families())}.")
    family = _family(model_type)
    raw = family.prepare(_one_spelling(_plain_rope(raw), family.ALIASES))
    refused = {"quantization_config": None, "is_causal": True} | family.REFUSED_UNLESS
    for key, allowed in refused.items():
        if raw.get(key) is not None and raw[key] != allowed:
            raise UserError(f"{key} {raw[key]!r} is not implemented, only {allowed!r}.")
    values = {field: _value(raw, key, *default) for key, (field, *default) in family.KEYS.items()}
    ids = {key: _token_id(raw.get(key)) for key in ("bos_token_id", "eos_token_id")}
    return family.Config(model_type=model_type, **values, **ids)


def write_config(config: ModelConfig) -> dict:
    """The config.json of our settings: ``read_config`` of it gives them back."""
    family = _family(config.model_type)
    raw = {key: getattr(config, field) for key, (field, *_) in family.KEYS.items()}
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    fixed = {"model_type": config.model_type, "architectures": [family.ARCHITECTURE]}
    return fixed | raw | ids


def _plain_rope(raw: dict) -> dict:
    """A copy with ``rope_scaling`` under its newer name; UserError if positions are stretched."""
    raw = dict(raw)
    rope = raw.pop("rope_scaling", None) or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"rope type {kind!r} is not implemented, only 'default'.")
    raw["rope_parameters"] = rope
    return raw


def _one_spelling(raw: dict, aliases: dict) -> dict:
    for alias, key in aliases.items():
        if alias in raw and raw.setdefault(key, raw[alias]) != raw[alias]:
            raise UserError(f"{key} {raw[key]!r} and {alias} {raw[alias]!r} contradict each other.")
    return raw


def _value(raw: dict, key: str, *default):
    if raw.get(key) is None:
        if not default:
            raise UserError(f"{key} is missing.")
        return default[0]
    expected = type(default[0]) if default else int
    value = float(raw[key]) if expected is float and type(raw[key]) is int else raw[key]
    if type(value) is not expected:
        raise UserError(f"{key} {raw[key]!r} must be {expected.__name__}.")
    return value


def _token_id(value):
    return tuple(value) if isinstance(value, list) else value


# Weights


def _table(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """{name in the file: (our place, transform)} for every layer of ``config``."""
    family = _family(config.model_type)
    table = dict(family.WEIGHTS)
    for layer in range(config.n_layers):
        prefix = family.BLOCK_PREFIX.format(layer=layer)
        for name, (place, transform) in family.BLOCK_WEIGHTS.items():
            table[prefix + name] = (f"blocks.{layer}.{place}", transform)
    return table


def _place(key: tuple) -> str:
    return ".".join(map(str, key))


def _fill(folder: Path, config: ModelConfig, shapes: dict) -> dict[str, jax.Array]:
    """{place: float32 array} from the folder's files for every {place: shape}, once each."""
    prefix = _family(config.model_type).PREFIX
    table = _table(config)
    filled, tied_head = {}, None
    for name, read in _tensors(folder):
        if f".{name}".endswith(BUFFERS):
            continue
        place, transform = table.get(name) or table.get(prefix + name) or (None, None)
        if place == "W_U" and config.tied:
            tied_head = read()
            continue
        if place not in shapes:
            raise UserError(f"{folder} holds the unknown weight {name!r}; nothing here reads it.")
        if place in filled:
            raise UserError(f"{folder} holds the weight {name!r} twice, once as {prefix + name!r}.")
        value = TRANSFORMS[transform](read())
        if value.shape != shapes[place]:
            raise UserError(
                f"{folder}: weight {name!r} has shape {list(value.shape)} where config.json asks "
                f"for {list(shapes[place])} (as [d_in, d_out])."
            )
        filled[place] = jnp.asarray(value)
    missing = [name for name, (place, _) in table.items() if place in set(shapes) - set(filled)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder} lacks the weight {missing[0]!r}{more}.")
    if tied_head is not None and not np.array_equal(tied_head, np.asarray(filled["W_E"])):
        raise UserError(
            f"{folder} holds a head that differs from its embedding, but config.json ties them; "
            "set tie_word_embeddings to false."
        )
    return filled


def _tensors(folder: Path) -> Iterator[tuple]:
    """(name, function that reads it as float32 numpy) for every tensor of the folder."""
    for stem, reader in (("model.safetensors", _safetensors), ("pytorch_model.bin", _torch)):
        index = folder / f"{stem}.index.json"
        if (folder / stem).is_file():
            return reader(folder / stem)
        if index.is_file():
            shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
            return (item for shard in shards for item in reader(_shard(folder, shard)))
    raise UserError(
        f"{folder} has no model.safetensors; if its hub page offers only pytorch_model.bin, "
        "install torch, which alone reads that."
    )


def _shard(folder: Path, name: str) -> Path:
    file = folder / name
    if Path(name).name != name or not file.is_file():
        raise UserError(f"{folder} lacks the shard {name!r} that its index names; copy it again.")
    return file


def _safetensors(file: Path) -> Iterator[tuple]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            names = tensors.keys()
            for name in names:
                yield name, lambda name=name: _widen(tensors.get_tensor(name), name, file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}); copy it again.") from error


def _torch(file: Path) -> Iterator[tuple]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{file.parent} has only pytorch_model.bin, which torch alone reads: install torch, "
            "or save the model again as model.safetensors."
        ) from error
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for files that are not plain weights
        raise UserError(
            f"{file} is damaged or holds more than weights ({type(error).__name__}); copy it again."
        ) from error
    for name, tensor in tensors.items():
        yield name, lambda tensor=tensor: tensor.to(torch.float32).numpy()


def _widen(value: np.ndarray, name: str, file: Path) -> np.ndarray:
    if value.dtype.name not in DTYPES:
        raise UserError(
            f"{file}: weight {name!r} is {value.dtype.name}, not one of {', '.join(DTYPES)}."
        )
    return value.astype(np.float32)


def _named_weights(lm: LanguageModel, dtype) -> dict[str, np.ndarray]:
    """{name in the file: array} of every parameter: the inverse of ``_fill``."""
    flat = nnx.to_flat_state(nnx.state(lm))
    values = {_place(key): np.asarray(leaf[...]).astype(dtype) for key, leaf in flat}
    return {
        name: np.ascontiguousarray(TRANSFORMS[transform](values[place]))
        for name, (place, transform) in _table(lm.config).items()
        if place in values
    }


def _write_safetensors(tensors: dict[str, np.ndarray], file: Path) -> None:
    """Under another name first, so that a killed save leaves no half file to be loaded."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    part = file.with_suffix(".part")
    try:
        save_file(tensors, part, metadata={"format": "pt"})  # transformers asks for the format
    except SafetensorError as error:
        raise UserError(
            f"{file} cannot be written ({error}); free space or go elsewhere."
        ) from error
    os.replace(part, file)


# Tokenizer


def load_tokenizer(path_or_id: str | Path):
    """The transformers tokenizer of a folder or hub id; UserError if there is none."""
    folder = find_folder(path_or_id, CONFIG_FILES + TOKENIZER_FILES + TOKENIZER_EXTRAS)
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise UserError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); only commands that read "
            "text need it: copy the tokenizer files of its model there."
        )
    return _tokenizer(folder, max(file.stat().st_mtime_ns for file in files))


@lru_cache(maxsize=16)
def _tokenizer(folder: Path, changed: int):
    """``changed`` only keeps a rewritten folder from being answered from the cache."""
    # transformers would advise to install torch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json")):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except Exception as error:  # the Rust library raises bare exceptions
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"The tokenizer in {folder} cannot be read ({reason}).") from error


def _family(model_type: str):
    return importlib.import_module(f"crossdict_jax.models.families.{model_type}")


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); copy it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold a JSON object.")
    return value
