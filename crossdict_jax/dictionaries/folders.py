"""Reads files in dictionary folders of other tools; errors name the file."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from crossdict_jax.dictionaries.base import is_finite
from crossdict_jax.errors import UserError
from crossdict_jax.models import KINDS, Site
from crossdict_jax.workdir import as_float32

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]
BRIDGE = {"in": "resid_pre", "out": "resid_post"}  # TransformerLens 3: ours
MODULE = r"(?:[\w.]+\.)?(?:layers|h)\.(\d+)(?:\.([\w.]+))?"  # of transformers, in a layer
SITES = {None: "resid_post", "output": "resid_post", "mlp": "mlp_out", "mlp.output": "mlp_out"}
SITES |= {n + s: "attn_out" for n in ("self_attn", "attn", "attention") for s in ("", ".output")}


def hook_name(site: str) -> str:
    """Returns a site (``resid_pre.6``) in TransformerLens terms; "" for none."""
    kind, _, layer = site.rpartition(".")
    return f"blocks.{layer}.hook_{kind}" if kind else ""


def lens_name(hook: str) -> str:
    """Returns a hook or module of transformers in TransformerLens terms; "" where none is known."""
    module = re.fullmatch(MODULE, hook)
    if not module:
        return hook
    return hook_name(f"{SITES[module[2]]}.{module[1]}") if module[2] in SITES else ""


def site_of(hook: str) -> Site | None:
    """Returns the site that a hook of TransformerLens or a module of transformers is.

    The output of block N is ``resid_pre.N+1`` as well as ``resid_post.N``: here the former. None
    where it is none of our sites.
    """
    kinds = "|".join([*KINDS, *BRIDGE])
    match = re.fullmatch(rf"blocks\.(\d{{1,9}})\.hook_({kinds})", lens_name(hook))
    if not match:
        return None
    layer, kind = int(match[1]), BRIDGE.get(match[2], match[2])
    return Site(layer + 1) if kind == "resid_post" else Site(layer, kind)


def require(config: dict[str, Any], key: str, file: Path) -> Any:
    """Returns a value that a config must have."""
    if config.get(key) is None:
        raise UserError(f"{file} lacks the required key {key!r}; add it as it was in training.")
    return config[key]


def require_count(config: dict[str, Any], key: str, file: Path, *, limit: int | None = None) -> int:
    """Returns a whole number from 1 to ``limit`` that a config must have."""
    value = require(config, key, file)
    number = type(value) in (int, float)
    if not number or not 1 <= value <= (limit or 2**31) or value != int(value):
        allowed = f"to {limit}" if limit else "or more"
        raise UserError(f"{file}: {key}={value!r} must be a whole number, 1 {allowed}.")
    return int(value)


def require_flag(config: dict[str, Any], key: str, file: Path, *, default: bool) -> bool:
    """Returns true or false, which a config may leave out."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{file}: {key}={value!r} must be true or false, as it was in training.")
    return value


def check_arrays(arrays: Arrays, shapes: Shapes, file: Path) -> Arrays:
    """Returns arrays as float32; they must be exactly those of ``shapes``.

    A ``scaling_factor`` of ones, which SAELens once wrote, is left out. UserError: an array is
    missing or unknown, has another shape, is not of floats, or is not finite (``is_finite``).
    """
    arrays = {n: a for n, a in arrays.items() if n != "scaling_factor" or not np.all(a == 1)}
    missing, unknown = shapes.keys() - arrays.keys(), arrays.keys() - shapes.keys()
    if missing or unknown:
        wrong = [f"lacks {', '.join(sorted(missing))}"] * bool(missing)
        wrong += [f"holds {', '.join(sorted(unknown))}, which it should not"] * bool(unknown)
        raise UserError(f"{file} {' and '.join(wrong)}; its weights must be {', '.join(shapes)}.")
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise UserError(
                f"{file}: {name} has shape {arrays[name].shape}, where {shape} is expected; "
                "cfg.json or the weights are of another dictionary."
            )
        arrays[name] = as_float32(arrays[name], name, file)
        if not is_finite(name, arrays[name]):
            raise UserError(f"{file}: {name} holds NaN or infinity; copy it again.")
    return arrays


def centred(arrays: Arrays) -> Arrays:
    """Turns arrays of z = x W_enc + b_enc into those of our z = (x - b_dec) W_enc + b_enc."""
    shift = arrays["b_dec"] @ arrays["W_enc"]
    arrays = arrays | {"b_enc": arrays["b_enc"] + shift}
    if "b_mag" in arrays:
        arrays["b_mag"] = arrays["b_mag"] + shift * np.exp(arrays["r_mag"])
    return arrays
