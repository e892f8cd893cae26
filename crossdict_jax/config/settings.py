"""Settings by name: listed, read from text, and checked before anything is started."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_origin

from crossdict_jax.config import (
    CONTROLS,
    SWEPT,
    BenchmarkConfig,
    Config,
    ConvertConfig,
    Count,
    CrosscoderConfig,
    Number,
    PretrainConfig,
    SAEConfig,
    TextConfig,
    VerifyConfig,
    crosscoder_settings,
    layer_pairs,
)
from crossdict_jax.errors import UserError

# No models: the embedded pair. No sources: all are trained. No kinds of controls: all.
MAY_BE_EMPTY = {"models", "records", "sae.sources", "controls", "control_kinds", "benchmarks"}
MAY_BE_EMPTY |= {"pareto.architectures", "pareto.k", "intervention.feature_ids"}
MAY_BE_EMPTY |= {"contrast.source"}  # its own command asks for it
# What a benchmark of growth need not try.
MAY_BE_EMPTY |= {
    f"scaling.{what}"
    for what in ("widths", "d_models", "ks", "batch_sizes", "members", "store_rows")
}
ROOM = Path(__file__).parents[1]  # the package
MAY_REPEAT = {"models", "sae.sources"}  # a model against itself
MAP_HEADS = ("relu", "topk", "jumprelu")  # as in maps/heads.py, which is slow to import
SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")  # as in models, which is slow to import
OUTPUT_SITE = re.compile(rf"(?:([^:]+):)?({'|'.join(SITES)})(?:\.([0-9]+))?")


def from_dict(kind: type, tree: dict) -> Any:
    """Returns the config of class ``kind`` that ``to_dict`` turned into ``tree``.

    A setting that the tree lacks keeps its default.

    Raises:
      UserError: the tree is no such tree, or holds a setting that ``kind`` has not.
    """
    if not isinstance(tree, dict):
        raise UserError(f"Settings must be a JSON object, not {type(tree).__name__}.")
    for name in _flat_names(tree):
        check_name(kind, name)
    return _build(kind, tree)


def _build(kind: type, tree: dict) -> Any:
    given = [f for f in dataclasses.fields(kind) if f.name in tree]
    return kind(**{f.name: _value(f.type, tree[f.name]) for f in given})


def _value(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value)
    return tuple(value) if isinstance(value, list) else value


def _flat_names(tree: dict, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def settings(kind: type, prefix: str = "") -> dict[str, Any]:
    """Returns {dotted name: type} of every setting of a config class, as in ``sae.width``."""
    found = {}
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.type):
            found |= settings(f.type, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = f.type
    return found


def get(config: Any, name: str) -> Any:
    """Returns the value of the setting with a dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def put(config: Any, name: str, value: Any) -> None:
    """Sets the setting with a dotted name."""
    group, _, last = name.rpartition(".")
    setattr(get(config, group) if group else config, last, value)


def check_name(kind: type, name: str) -> None:
    """Raises UserError, with the closest name and those beside it, if there is no such setting."""
    names = list(settings(kind))
    if name in names:
        return
    inside = [n for n in names if n.startswith(name + ".")]
    if inside:
        raise UserError(f"{name!r} is a group of settings; set one of {', '.join(inside)}.")
    close = [n for n in names if n.split(".")[-1] == name.split(".")[-1]]
    close += difflib.get_close_matches(name, names, n=1)
    meant = f", did you mean {close[0]}?" if close else "."
    group = name.rpartition(".")[0]
    beside = [n for n in names if group and n.startswith(group + ".")] or _groups(kind)
    raise UserError(f"There is no setting {name!r}{meant} There are {', '.join(beside)}.")


def _groups(kind: type) -> list[str]:
    fields = dataclasses.fields(kind)
    return [f"{f.name}.*" if dataclasses.is_dataclass(f.type) else f.name for f in fields]


# ---------------------------------------------------------------- values from the command line

_WORDS = {  # type of a setting: (the type of one value, whether it may be several, in words)
    int: (int, False, "a whole number, as in 5"),
    float: (float, False, "a number, as in 0.5 or 1e-3"),
    str: (str, False, "text"),
    tuple[int, ...]: (int, True, "whole numbers with commas between, as in 5,6,7"),
    tuple[float, ...]: (float, True, "numbers with commas between, as in 0.1,1"),
    tuple[str, ...]: (str, True, "names with commas between, as in a,b"),
    Number: (float, True, "a number, as in 1e-3, or several with commas between"),
    Count: (int, True, "a whole number, as in 5, or several with commas between"),
}
TYPES = tuple(_WORDS)


def parse(kind: Any, text: str) -> Any:
    """Returns the value of type ``kind`` that ``text`` spells; several have commas between.

    Raises:
      ValueError: the text spells no such value; the message says what would.
    """
    one, many, words = _WORDS[kind]
    if kind is str:
        return text
    if not many:
        return _parse_one(one, text, words)
    if not text.strip():
        return ()  # for whoever checks the setting to allow or refuse
    values = tuple(_parse_one(one, part.strip(), words) for part in _parts(one, text))
    return values[0] if len(values) == 1 and kind in (Number, Count) else values


def _parts(one: type, text: str) -> list[str]:
    # (5,6,7) and [5, 6, 7] are what Python users type; a path may hold brackets of its own.
    bracketed = one is not str and re.fullmatch(r"\s*[(\[](.*?),?\s*[)\]]\s*", text)
    return (bracketed[1] if bracketed else text).split(",")


def _parse_one(one: type, text: str, words: str) -> Any:
    try:
        if one is str and not text:
            raise ValueError
        return one(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {words}") from None


# ---------------------------------------------------------------- what is allowed

Rule = tuple[str, Callable[[Any], bool]]  # what a value must be, in words and as a test


def _one_of(*names: str) -> Rule:
    return f"one of {', '.join(names)}", lambda value: value in names


def _at_least(low: int) -> Rule:
    return f"{low} or more", lambda value: value >= low


_ABOVE_0: Rule = ("above 0", lambda value: value > 0)
_SHARE: Rule = ("above 0 and below 1", lambda value: 0 < value < 1)
_SHARE_OR_0: Rule = ("0 or more and below 1", lambda value: 0 <= value < 1)
_SHARE_OR_0_OR_1: Rule = ("0 to 1", lambda value: 0 <= value <= 1)
_SHARE_OR_1: Rule = ("above 0 and at most 1", lambda value: 0 < value <= 1)
_SEED: Rule = ("0 to 4294967295", lambda value: 0 <= value < 2**32)
_FILLED: Rule = ("something, not blank", lambda value: bool(value.strip()))
_FREE: Rule = ("text", lambda value: True)
_OUTPUT: Rule = (
    f"nothing, or [MODEL:]KIND[.LAYER] with a kind of {', '.join(SITES)}",
    lambda value: not value or OUTPUT_SITE.fullmatch(value) is not None,
)
_MATMUL: Rule = _one_of("float32", "bfloat16")


def output_site(text: str) -> tuple[str | None, str, int | None]:
    """Returns (model, kind, layer) of ``sae.output_site``; None where it names none."""
    model, kind, layer = OUTPUT_SITE.fullmatch(text).groups()
    return model, kind, None if layer is None else int(layer)


def refuse_transcoders(config: Config, what: str) -> None:
    """Raises UserError where ``what`` needs dictionaries that write what they read."""
    if config.sae.output_site:
        raise UserError(
            f"{what} needs dictionaries that write the site that they read, and sae.output_site="
            f"{config.sae.output_site} makes transcoders; use a run without it."
        )


def architectures() -> tuple[str, ...]:
    """Returns the kinds of dictionary: the files of their folder."""
    return _files("dictionaries/architectures")


def has_k(architecture: str) -> bool:
    """Whether a kind of dictionary fixes the number of active features."""
    return architecture not in {"relu", "jumprelu", "gated"}


def map_kinds() -> tuple[str, ...]:
    """Returns the kinds of map: the files of their folder."""
    return _files("maps/kinds")


def gate_files() -> dict[str, str]:
    """Returns {G1: g01_identity, ...}: the files of their room that hold a gate, in order."""
    files = sorted(file.stem for file in (ROOM / "verify").glob("g[0-9][0-9]_*.py"))
    return {f"G{int(file[1:3])}": file for file in files}


def measurements() -> tuple[str, ...]:
    """Returns what can be measured: the files of benchmark/measurements."""
    return _files("benchmark/measurements")


def _files(folder: str) -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in (ROOM / folder).glob("[!_]*.py")))


def _rules() -> dict[str, Rule]:
    """Returns what each setting must be (of several values, each)."""
    return {
        "models": _FILLED,
        "layers": _at_least(0),
        "layer_pairs": _FREE,
        "site": _one_of(*SITES),
        "seed": _SEED,
        "records": _one_of("tensorboard", "wandb"),
        "controls": _one_of(*CONTROLS),
        "control_kinds": _one_of(*map_kinds()),
        "control_pairs": _at_least(0),
        "text.source": _FILLED,
        "text.column": _FILLED,
        "text.documents": _at_least(3),  # one for each split
        "text.max_bytes": _at_least(1),
        "text.window_tokens": _at_least(2),
        "text.validation_fraction": _SHARE,
        "text.test_fraction": _SHARE,
        "extract.batch_size": _at_least(1),
        "extract.shard_windows": _at_least(1),
        "extract.norm_mask": _ABOVE_0,
        "extract.nonfinite": _one_of("refuse", "skip"),
        "extract.matmul_dtype": _MATMUL,
        "sae.architecture": _one_of(*architectures()),
        "sae.output_site": _OUTPUT,
        "sae.sources": _FILLED,
        "sae.source_codes": _one_of("own", "relu"),
        "sae.width": _at_least(1),
        "sae.k": _at_least(1),
        "sae.l1_coefficient": _at_least(0),
        "sae.learning_rate": _at_least(0),
        "sae.steps": _at_least(1),
        "sae.batch_size": _at_least(1),
        "sae.accumulate": _at_least(1),
        "sae.seeds": _at_least(1),
        "sae.warmup_fraction": _SHARE_OR_0,
        "sae.l1_warmup_fraction": _SHARE_OR_0,
        "sae.gradient_clip": _ABOVE_0,
        "sae.auxk_coefficient": _at_least(0),
        "sae.k_aux": _at_least(0),
        "sae.dead_after_rows": _at_least(0),
        "sae.bandwidth": _ABOVE_0,
        "sae.l0_target": _at_least(0),
        "sae.nested_fractions": _SHARE_OR_1,
        "sae.nested_balance": _SHARE_OR_1,
        "sae.matmul_dtype": _MATMUL,
        "sae.checkpoint_every": _at_least(1),
        "map.kinds": _one_of(*map_kinds()),
        "map.ridge_penalties": _ABOVE_0,
        "map.ranks": _at_least(1),
        "map.token_pseudocounts": _at_least(0),
        "map.hidden": _at_least(1),
        "map.head": _one_of(*MAP_HEADS),
        "map.dropout": _SHARE_OR_0,
        "map.steps": _at_least(1),
        "map.batch_size": _at_least(1),
        "map.learning_rate": _ABOVE_0,
        "map.validate_every": _at_least(1),
        "map.patience": _at_least(1),
        "map.correlation_features": _at_least(0),
        "map.weight_decay": _at_least(0),
        "map.gradient_clip": _ABOVE_0,
        "map.checkpoint_every": _at_least(1),
        "map.loss_weights.mse": _at_least(0),
        "map.loss_weights.cosine": _at_least(0),
        "map.loss_weights.correlation": _at_least(0),
        "map.loss_weights.sparsity": _at_least(0),
        "map.hypernetwork.rank": _at_least(1),
        "map.hypernetwork.profile_rank": _at_least(1),
        "map.hypernetwork.hidden": _at_least(1),
        "map.hypernetwork.dropout": _SHARE_OR_0,
        "map.hypernetwork.feature_dropout": _SHARE_OR_0,
        "map.hypernetwork.steps": _at_least(1),
        "map.hypernetwork.batch_size": _at_least(1),
        "map.hypernetwork.learning_rate": _ABOVE_0,
        "map.hypernetwork.weight_decay": _at_least(0),
        "map.hypernetwork.checkpoint_every": _at_least(1),
        "crosscoder.variant": _one_of("batchtopk", "l1"),
        "crosscoder.width": _at_least(0),
        "crosscoder.k": _at_least(0),
        "crosscoder.l1_coefficient": _at_least(0),
        "crosscoder.shared_fraction": _SHARE_OR_0_OR_1,
        "crosscoder.drop_probability": _SHARE_OR_0,
        "crosscoder.learning_rate": _at_least(0),
        "crosscoder.steps": _at_least(0),
        "crosscoder.batch_size": _at_least(0),
        "crosscoder.warmup_fraction": _SHARE_OR_0,
        "crosscoder.l1_warmup_fraction": _SHARE_OR_0,
        "crosscoder.auxk_coefficient": _at_least(0),
        "crosscoder.k_aux": _at_least(0),
        "crosscoder.dead_after_rows": _at_least(1),
        "crosscoder.matmul_dtype": _MATMUL,
        "crosscoder.checkpoint_every": _at_least(1),
        "crosscoder.self_nulls": _at_least(0),
        "evaluation.bootstrap": _at_least(1),
        "evaluation.pool": _at_least(0),
        "evaluation.features_shown": _at_least(0),
        "evaluation.batch_size": _at_least(1),
        "evaluation.matching": _one_of("mutual_best", "hungarian"),
        "evaluation.minimum_firings": _at_least(1),
        "evaluation.fdr": _SHARE,
        "evaluation.similarity_rows": ("0 or 20 to 5000", lambda n: n == 0 or 20 <= n <= 5000),
        "efficiency.rows": _at_least(2),
        "efficiency.layer_pair": _FREE,
        "efficiency.hidden_features": _SHARE,
        "pareto.architectures": _one_of(*architectures()),
        "pareto.k": _at_least(1),
        "pareto.penalties": _ABOVE_0,
        "intervention.documents": _at_least(1),
        "intervention.batch_size": _at_least(1),
        "intervention.features": _at_least(0),
        "intervention.feature_ids": _at_least(0),
        "intervention.choose": _one_of("random", "matched"),
        "intervention.layers": _one_of("middle", "all"),
        "intervention.maps": _one_of("all", *map_kinds()),
        "intervention.contexts": _at_least(1),
        "intervention.positions": _one_of("firing", "prompt"),
        "intervention.span": _one_of("last", "whole"),
        "intervention.norm": _one_of("residual", "feature", "mapped"),
        "intervention.alphas": _ABOVE_0,
        "contrast.source": _FILLED,
        "contrast.pairs": _at_least(4),  # two halves of which each has an interval
        "contrast.features": _at_least(1),
        "contrast.controls": _at_least(19),  # fewer never show p = 0.05
        "contrast.maps": _one_of("all", *map_kinds()),
        "contrast.span": _one_of("last", "whole"),
        "steer.source": _FREE,
        "steer.target": _FREE,
        "steer.layer_pair": _FREE,
        "steer.feature": _at_least(-1),
        "steer.search": _FREE,
        "steer.map": _one_of("match", *map_kinds()),
        "steer.alphas": ("other than 0", lambda alpha: alpha != 0),
        "steer.norm": _one_of("residual", "feature", "mapped"),
        "steer.prompts": _FREE,
        "steer.samples": _at_least(1),
        "steer.tokens": _at_least(0),
        "steer.temperature": _at_least(0),
        "steer.top_p": _SHARE_OR_1,
        "probe.source": _FREE,  # its own command asks for it
        "probe.text": _FILLED,
        "probe.label": _FILLED,
        "probe.pooling": _one_of("last", "max", "mean"),
        "probe.examples": _at_least(8),  # two of each fold
        "probe.maps": _one_of("all", *map_kinds()),
        "gates": _one_of(*gate_files()),
        "benchmarks": _one_of(*measurements()),
        "suite": _one_of("cpu", "gpu"),
        "repeats": _at_least(1),
        "model_type": _one_of("gpt2", "gpt_neox"),
        "d_model": _at_least(1),
        "n_layers": _at_least(1),
        "n_heads": _at_least(1),
        "context": _at_least(2),
        "vocab_size": _at_least(257),  # every byte, and the end of a text
        "rotary_fraction": _SHARE_OR_1,
        "steps": _at_least(1),
        "batch_size": _at_least(1),
        "learning_rate": _ABOVE_0,
        "warmup_fraction": _SHARE_OR_0,
        "weight_decay": _at_least(0),
        "gradient_clip": _ABOVE_0,
        "matmul_dtype": _MATMUL,
        "checkpoint_every": _at_least(1),
        "save_dtype": _one_of("float32", "float16", "bfloat16"),
        "source": _FILLED,
        "format": _one_of("saelens", "crossdict"),
        "hook_name": _FREE,
        "model_name": _FREE,
        "push": _FREE,
    }


def validate(
    config: Config | PretrainConfig | ConvertConfig | VerifyConfig | BenchmarkConfig,
) -> None:
    """Raises UserError for the first setting that is of a wrong type or outside what it may be.

    Only what can be said without reading text or models; nothing is imported for it.
    """
    rules = _rules()
    for name, kind in settings(type(config)).items():
        value = get(config, name)
        if not _fits(value, kind):
            raise UserError(f"{name}={spell(value)} is not {_WORDS[kind][2]}.")
        _check_values(name, value, rules[name])
    if isinstance(config, Config | PretrainConfig):
        _check_fractions(config.text)
    if isinstance(config, PretrainConfig) and config.text.window_tokens != TextConfig.window_tokens:
        raise UserError(
            f"text.window_tokens={config.text.window_tokens} means nothing here: windows are of "
            f"context={config.context} tokens; set context and leave it out."
        )
    if isinstance(config, Config):
        _check_models(config.models)
        _check_dictionaries(config.sae)
        _check_transcoders(config)
        _check_crosscoder(crosscoder_settings(config))
        layer_pairs(config)


def _check_values(name: str, value: Any, rule: Rule) -> None:
    words, allowed = rule
    several = isinstance(value, tuple)
    values = value if several else (value,)
    for one in values:
        if not allowed(one):
            which = f": {spell(one)}" if several else ""
            raise UserError(f"{name}={spell(value)}{which} must be {words}.")
    if not values and name not in MAY_BE_EMPTY:
        raise UserError(f"{name} is empty; give one value or more, with commas between.")
    if len(set(values)) < len(values) and name not in MAY_REPEAT:
        raise UserError(f"{name}={spell(value)} holds a value twice; give each once.")


def _fits(value: Any, kind: Any) -> bool:
    one, many, _ = _WORDS[kind]
    if isinstance(value, tuple):
        return many and all(_is(v, one) for v in value)
    return _is(value, one) and (not many or get_origin(kind) is Annotated)


def _is(value: Any, one: type) -> bool:
    if one is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is one


def spell(value: Any) -> str:
    """Returns a value as it is written on the command line."""
    return ",".join(map(spell, value)) if isinstance(value, tuple) else str(value)


def _check_fractions(text: TextConfig) -> None:
    if text.validation_fraction + text.test_fraction >= 1:
        raise UserError(
            f"text.validation_fraction={text.validation_fraction} and "
            f"text.test_fraction={text.test_fraction} leave nothing to train on; their sum must "
            "be below 1."
        )


def _check_models(models: tuple[str, ...]) -> None:
    if len(models) == 1:
        raise UserError(
            f"models={models[0]} is one model; give two or more with commas between, or none for "
            "the embedded pair."
        )


def _check_dictionaries(sae: SAEConfig) -> None:
    swept = [name for name in SWEPT if isinstance(getattr(sae, name), tuple)]
    if sae.sources and set(sae.sources) != {"train"} and (swept or sae.seeds > 1):
        raise UserError(
            f"sae.sources names one dictionary for each model, and sae.{(*swept, 'seeds')[0]} asks "
            "for several; give one value."
        )
    if sae.batch_size % sae.accumulate:
        raise UserError(
            f"sae.accumulate={sae.accumulate} must divide sae.batch_size={sae.batch_size}: parts "
            "are of equal size."
        )
    k, width = _largest(sae.k), _smallest(sae.width)
    if has_k(sae.architecture) and k > width:
        raise UserError(f"sae.k={k} is larger than sae.width={width}; k must be width or less.")


def _check_transcoders(config: Config) -> None:
    if config.sae.output_site and "hypernetwork" in config.map.kinds:
        raise UserError(
            f"sae.output_site={config.sae.output_site} with map.kinds=...,hypernetwork: it takes "
            "features to read and write at one site; leave one of the two out."
        )


def _check_crosscoder(crosscoder: CrosscoderConfig) -> None:
    k, width = crosscoder.k, crosscoder.width
    if crosscoder.variant == "batchtopk" and k > width:
        raise UserError(
            f"crosscoder.k={k} is larger than crosscoder.width={width}; k must be width or less."
        )


def _largest(value: int | tuple[int, ...]) -> int:
    return max(value) if isinstance(value, tuple) else value


def _smallest(value: int | tuple[int, ...]) -> int:
    return min(value) if isinstance(value, tuple) else value
