"""Settings by dotted name: listed, read from text and JSON, and checked."""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

from crossdict_jax.config.fields import (
    BenchmarkConfig,
    Config,
    ConvertConfig,
    Count,
    Number,
    PretrainConfig,
    VerifyConfig,
)
from crossdict_jax.config.rules import SEED
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import COPY, flatten, read_json

WORDS = {  # type of a setting: (the type of one value, whether it may be several, in words)
    int: (int, False, "a whole number, as in 5"),
    float: (float, False, "a number, as in 0.5 or 1e-3"),
    str: (str, False, "text"),
    tuple[int, ...]: (int, True, "whole numbers with commas between, as in 5,6,7"),
    tuple[float, ...]: (float, True, "numbers with commas between, as in 0.1,1"),
    tuple[str, ...]: (str, True, "names with commas between, as in a,b"),
    Number: (float, True, "a number, as in 1e-3, or several with commas between"),
    Count: (int, True, "a whole number, as in 5, or several with commas between"),
}


def settings(kind: type) -> dict[str, dataclasses.Field]:
    """Returns {dotted name: field} of a config class, as in ``sae.width``."""
    listed = {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            inner = settings(field.type)
            listed |= {f"{field.name}.{name}": each for name, each in inner.items()}
        else:
            listed[field.name] = field
    return listed


def get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def put(config: Any, name: str, value: Any) -> None:
    group, _, last = name.rpartition(".")
    setattr(get(config, group) if group else config, last, value)


def check_name(kind: type, name: str) -> None:
    """Raises UserError, with the closest name and its neighbours, if there is no such setting."""
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
    beside = [n for n in names if group and n.startswith(group + ".")]
    groups = dict.fromkeys(re.sub(r"\..*", ".*", n) for n in names)
    raise UserError(f"There is no setting {name!r}{meant} There are {', '.join(beside or groups)}.")


def from_dict(kind: type, tree: dict) -> Any:
    """Returns the config of class ``kind`` from ``to_dict``'s tree; missing settings are defaults.

    Raises:
      UserError: it is no such tree, or holds a setting that ``kind`` has not.
    """
    if not isinstance(tree, dict):
        raise UserError(f"Settings must be a JSON object, not {type(tree).__name__}.")
    config = kind()
    for name, value in flatten(tree):
        check_name(kind, name)
        put(config, name, tuple(value) if isinstance(value, list) else value)
    return config


def read(path: Path) -> Any:
    """Returns the config in a config.json, of the class with most of its settings."""
    tree = read_json(path, mend=COPY)
    kinds = (Config, PretrainConfig, ConvertConfig, VerifyConfig, BenchmarkConfig)
    kind = max(kinds, key=lambda k: len(tree.keys() & {f.name for f in dataclasses.fields(k)}))
    try:
        return from_dict(kind, tree)
    except UserError as error:
        raise UserError(
            f"{path}, perhaps of another version, is not understood: {error}"
        ) from error


def parse(kind: Any, text: str) -> Any:
    """Returns the value of type ``kind`` that ``text`` spells; several have commas between.

    Raises:
      ValueError: the text spells no such value; the message says what would.
    """
    type_, several, words = WORDS[kind]
    if kind is str:
        return text
    parts = [text]
    if several:
        # (5,6,7) and [5, 6, 7] are what Python users type; a path may hold brackets of its own.
        bracketed = type_ is not str and re.fullmatch(r"\s*[(\[](.*?),?\s*[)\]]\s*", text)
        parts = [part.strip() for part in (bracketed[1] if bracketed else text).split(",")]
        if not text.strip():
            return ()  # for whoever checks the setting to allow or refuse
    values = []
    for part in parts:
        try:
            if type_ is str and not part:
                raise ValueError
            values.append(type_(part))
        except ValueError:
            raise ValueError(f"{part!r} is not {words}") from None
    single = not several or (len(values) == 1 and kind in (Number, Count))
    return values[0] if single else tuple(values)


def spell(value: Any) -> str:
    """Returns a value as written on the command line."""
    return ",".join(map(spell, value)) if isinstance(value, tuple) else str(value)


def check_groups(config: Any, kind: type, prefix: str = "") -> None:
    """Raises UserError if a config file set what is no setting, or a group to something else."""
    types = {field.name: field.type for field in dataclasses.fields(config)}
    for name, value in vars(config).items():
        if name not in types:
            check_name(kind, prefix + name)  # raises
        if dataclasses.is_dataclass(type_ := types[name]):
            if not isinstance(value, type_):
                raise UserError(
                    f"{prefix}{name}={value!r} is no {type_.__name__}; set its fields one by one."
                )
            check_groups(value, kind, f"{prefix}{name}.")


def validate(config: Any) -> None:
    """Raises UserError for the first setting of a wrong type or value.

    Reads no text, models or modules; settings that must fit each other are checked by their class's
    ``check``.
    """
    for name, field in settings(type(config)).items():
        value, (type_, may_be_several, words) = get(config, name), WORDS[field.type]
        several, rule = isinstance(value, tuple), field.metadata["rule"]
        values, types = value if several else (value,), (int, float) if type_ is float else (type_,)
        fits = several == may_be_several or field.type in (Number, Count)
        # Also of integers of any length. Arrays count in int32.
        limit = (2**63 if rule is SEED else 2**31) if type_ is int else 1e300
        typed = (type(v) in types and v == v for v in values)
        if not fits or not all(typed):
            raise UserError(f"{name}={spell(value)} is not {words}.")
        if type_ is str and any(re.search("[\ud800-\udfff]", v) for v in values):
            raise UserError(f"{name}={spell(value)!a} is not UTF-8; write or name it in UTF-8.")
        if type_ is not str and any(abs(v) >= limit for v in values):
            raise UserError(f"{name}={spell(value)} must lie between -{limit:g} and {limit:g}.")
        for each in values:
            if rule and not rule.allows(each):
                wrong = f": {spell(each)}" if several else ""
                raise UserError(f"{name}={spell(value)}{wrong} must be {rule.words}.")
        if not values and not field.metadata["empty"]:
            raise UserError(f"{name} is empty; give one value or more, with commas between.")
        if len(set(values)) < len(values) and not field.metadata["repeat"]:
            raise UserError(f"{name}={spell(value)} holds a value twice; give each once.")
    groups = [config]
    for group in groups:  # grows by the groups inside
        inner = [getattr(group, f.name) for f in dataclasses.fields(group)]
        groups += [value for value in inner if dataclasses.is_dataclass(value)]
    for group in reversed(groups):
        if hasattr(group, "check"):
            group.check()
