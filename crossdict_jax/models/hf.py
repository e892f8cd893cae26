"""Hugging Face folders in and out: config.json and weights; nothing remote is run."""

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from crossdict_jax.errors import UserError
from crossdict_jax.models.base import LanguageModel, ModelConfig
from crossdict_jax.models.folders import CONFIG_FILES, find_folder, find_model

BUFFERS = (  # masks and tables that old files carry and nobody reads
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)
TRANSFORMS = {"same": lambda x: x, "transpose": np.transpose}  # each its own inverse
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def model_types() -> tuple[str, ...]:
    """The model types that can be loaded: the files of their folder."""
    return tuple(sorted(f.stem for f in (Path(__file__).parent / "families").glob("[!_]*.py")))


def _family(model_type: str):
    return importlib.import_module(f"crossdict_jax.models.families.{model_type}")


def load(path_or_id: str | Path) -> LanguageModel:
    """The model in a folder in Hugging Face format, or of a hub id; float32.

    Names in ``EMBEDDED`` are found in the package itself. UserError if there is no such model
    or if anything in its files is not understood.
    """
    folder = find_model(path_or_id)
    config = load_config(folder)
    lm = nnx.eval_shape(lambda: init(config))
    lm.name = Path(os.path.abspath(Path(path_or_id).expanduser())).name
    lm.path = str(folder)
    graphdef, state = nnx.split(lm)
    flat = nnx.to_flat_state(state)
    weights = _read_weights(folder, config, {_name(key): leaf.shape for key, leaf in flat})
    flat = [(key, leaf.replace(weights[_name(key)])) for key, leaf in flat]
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
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if dtype not in DTYPES:
        raise UserError(f"Weights cannot be saved as {dtype!r}, only as {', '.join(DTYPES)}.")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    flat = nnx.to_flat_state(nnx.state(lm))
    values = {_name(key): np.asarray(leaf[...]).astype(DTYPES[dtype]) for key, leaf in flat}
    tensors = {
        in_file: np.ascontiguousarray(TRANSFORMS[transform](values[name]))
        for in_file, (name, transform) in _table(lm.config).items()
        if name in values
    }
    # Under another name first, so that a killed save leaves no half file to be loaded.
    file, part = path / "model.safetensors", path / "model.part"
    try:
        save_file(tensors, part, metadata={"format": "pt"})  # transformers asks for the format
    except SafetensorError as error:
        raise UserError(
            f"{file} cannot be written ({error}); free space or go elsewhere."
        ) from error
    os.replace(part, file)
    family = _family(lm.config.model_type)
    raw = {"model_type": lm.config.model_type, "architectures": [family.ARCHITECTURE]}
    raw |= {key: getattr(lm.config, field) for key, (field, *_) in family.KEYS.items()}
    raw |= {key: getattr(lm.config, key) for key in ("bos_token_id", "eos_token_id")}
    raw |= {"dtype": dtype}
    (path / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


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
    if model_type not in model_types():
        raise UserError(f"model_type {model_type!r} is not one of {', '.join(model_types())}.")
    family, raw = _family(model_type), dict(raw)
    rope = raw.pop("rope_scaling", None) or raw.get("rope_parameters") or {}  # the older name
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"rope type {kind!r} is not implemented, only 'default'.")
    raw["rope_parameters"] = rope
    for alias, key in family.ALIASES.items():
        if alias in raw and raw.setdefault(key, raw[alias]) != raw[alias]:
            raise UserError(f"{key} {raw[key]!r} and {alias} {raw[alias]!r} contradict each other.")
    raw = family.prepare(raw)
    refused = {"quantization_config": None, "is_causal": True} | family.REFUSED_UNLESS
    for key, allowed in refused.items():
        if raw.get(key) is not None and raw[key] != allowed:
            raise UserError(f"{key} {raw[key]!r} is not implemented, only {allowed!r}.")
    values = {field: _value(raw, key, *default) for key, (field, *default) in family.KEYS.items()}
    for key in ("bos_token_id", "eos_token_id"):
        values[key] = tuple(raw[key]) if isinstance(raw.get(key), list) else raw.get(key)
    return family.Config(model_type=model_type, **values)


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


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); copy it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold a JSON object.")
    return value


# Weights


def _table(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """{name in the file: (our name, transform)} for every layer of ``config``."""
    family = _family(config.model_type)
    table = dict(family.WEIGHTS)
    for layer in range(config.n_layers):
        prefix = family.BLOCK_PREFIX.format(layer=layer)
        for name, (ours, transform) in family.BLOCK_WEIGHTS.items():
            table[prefix + name] = (f"blocks.{layer}.{ours}", transform)
    return table


def _name(key: tuple) -> str:
    return ".".join(map(str, key))


def _read_weights(folder: Path, config: ModelConfig, shapes: dict) -> dict[str, jax.Array]:
    """{our name: float32 array} from the folder's files for every {our name: shape}, once each."""
    prefix = _family(config.model_type).PREFIX
    table = _table(config)
    weights, tied_head = {}, None
    for in_file, read in _tensors(folder):
        if f".{in_file}".endswith(BUFFERS):
            continue
        name, transform = table.get(in_file) or table.get(prefix + in_file) or (None, None)
        if name == "W_U" and config.tied:
            tied_head = read()
            continue
        if name not in shapes:
            raise UserError(
                f"{folder} holds the unknown weight {in_file!r}; nothing here reads it."
            )
        if name in weights:
            raise UserError(
                f"{folder} holds the weight {in_file!r} twice, once as {prefix + in_file!r}."
            )
        value = TRANSFORMS[transform](read())
        if value.shape != shapes[name]:
            raise UserError(
                f"{folder}: weight {in_file!r} has shape {list(value.shape)} where config.json "
                f"asks for {list(shapes[name])} (as [d_in, d_out])."
            )
        weights[name] = jnp.asarray(value)
    missing = [name for name, (ours, _) in table.items() if ours in set(shapes) - set(weights)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder} lacks the weight {missing[0]!r}{more}.")
    if tied_head is not None and not np.array_equal(tied_head, np.asarray(weights["W_E"])):
        raise UserError(
            f"{folder} holds a head that differs from its embedding, but config.json ties them; "
            "set tie_word_embeddings to false."
        )
    return weights


def _tensors(folder: Path) -> Iterator[tuple]:
    """(name, function that reads it as float32 numpy) for every tensor of the folder."""
    for stem, reader in (("model.safetensors", _safetensors), ("pytorch_model.bin", _torch)):
        files, index = [folder / stem], folder / f"{stem}.index.json"
        if not files[0].is_file() and index.is_file():
            names = sorted(set(_read_json(index).get("weight_map", {}).values()))
            for name in names:
                if Path(name).name != name or not (folder / name).is_file():
                    raise UserError(
                        f"{folder} lacks the shard {name!r} that its index names; copy it again."
                    )
            files = [folder / name for name in names]
        if files and files[0].is_file():
            return (item for file in files for item in reader(file))
    raise UserError(
        f"{folder} has no model.safetensors; if its hub page offers only pytorch_model.bin, "
        "install torch, which alone reads that."
    )


def _safetensors(file: Path) -> Iterator[tuple]:
    from safetensors import SafetensorError, safe_open

    def read(name: str) -> np.ndarray:
        value = tensors.get_tensor(name)
        if value.dtype.name not in DTYPES:
            raise UserError(
                f"{file}: weight {name!r} is {value.dtype.name}, not one of {', '.join(DTYPES)}."
            )
        return value.astype(np.float32)

    try:
        with safe_open(file, framework="numpy") as tensors:
            names = tensors.keys()
            for name in names:
                yield name, lambda name=name: read(name)
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
