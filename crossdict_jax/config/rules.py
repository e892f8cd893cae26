"""Rules and help texts of settings, as metadata of the dataclass field."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")  # as in models, which is slow to import
OUTPUT_SITE = re.compile(rf"(?:([^:]+):)?({'|'.join(SITES)})(?:\.([0-9]{{1,9}}))?")


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    words: str
    allows: Callable[[Any], bool]


def setting(
    default: Any, help: str, rule: Rule | None = None, *, empty: bool = False, repeat: bool = False
) -> Any:
    """Returns a dataclass field that is a setting, with a rule of each of its values.

    ``empty``, ``repeat``: whether a tuple may hold no value, or one twice.
    """
    metadata = {"help": help, "rule": rule, "empty": empty, "repeat": repeat}
    return dataclasses.field(default=default, metadata=metadata)


def one_of(*names: str) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda value: value in names)


def at_least(low: int) -> Rule:
    return Rule(f"{low} or more", lambda value: value >= low)


ABOVE_0 = Rule("above 0", lambda value: value > 0)
SHARE = Rule("above 0 and below 1", lambda value: 0 < value < 1)
SHARE_OR_0 = Rule("0 or more and below 1", lambda value: 0 <= value < 1)
SHARE_OR_0_OR_1 = Rule("0 to 1", lambda value: 0 <= value <= 1)
SHARE_OR_1 = Rule("above 0 and at most 1", lambda value: 0 < value <= 1)
DOSE = Rule("above 0 and at most 1000", lambda value: 0 < value <= 1000)
SIGNED_DOSE = Rule("-1000 to 1000, other than 0", lambda value: 0 < abs(value) <= 1000)
SEED = Rule("0 to 4294967295", lambda value: 0 <= value < 2**32)
SEARCH = Rule("nothing, or text to find", lambda value: not value or bool(value.strip()))
FILLED = Rule("something, not blank", lambda value: bool(value.strip()))
SITE_OR_NONE = Rule(
    f"nothing, or [MODEL:]KIND[.LAYER] with a kind of {', '.join(SITES)}",
    lambda value: not value or OUTPUT_SITE.fullmatch(value) is not None,
)
TWO_OR_0 = Rule("0, or 2 or more", lambda n: n == 0 or n >= 2)
ROWS_OR_0 = Rule("0 or 20 to 5000", lambda n: n == 0 or 20 <= n <= 5000)
DTYPES = ("auto", "float32", "bfloat16")


def choice(help: str, *names: str) -> Any:
    """Returns a setting that is one of several names, by default the first."""
    return setting(names[0], help, one_of(*names))


optional = partial(setting, (), empty=True)  # no value or several, by default none


def files_of(folder: str) -> tuple[str, ...]:
    """Returns the members of a family: the files of its folder in the package."""
    package = Path(__file__).parents[1]
    return tuple(sorted(file.stem for file in (package / folder).glob("[!_]*.py")))


# Kinds of dictionary, kinds of map, and what launch.benchmark measures.
architectures = partial(files_of, "dictionaries/architectures")
map_kinds = partial(files_of, "maps/kinds")
measurements = partial(files_of, "benchmark/measurements")


def gate_files() -> dict[str, str]:
    """Returns {G1: g01_identity, ...}: the gates in order, and their files."""
    files = [name for name in files_of("verify") if re.fullmatch(r"g[0-9][0-9]_.*", name)]
    return {f"G{int(name[1:3])}": name for name in files}


def output_site(text: str) -> tuple[str | None, str, int | None]:
    """Returns (model, kind, layer) of ``sae.output_site``; None where it names none."""
    model, kind, layer = OUTPUT_SITE.fullmatch(text).groups()
    return model, kind, None if layer is None else int(layer)
