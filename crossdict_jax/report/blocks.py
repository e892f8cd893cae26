"""The blocks of a section of the page, and their html: a text is a paragraph."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from crossdict_jax.report.plots import Figure
from crossdict_jax.report.tables import Table


class Heading(str):
    """A heading inside a section."""


class Code(str):
    """Text to copy."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    items: Iterable[tuple[str, str]]
    style: str = "facts"  # or "words"


@dataclasses.dataclass(frozen=True)
class Panels:
    """Figures side by side under one caption."""

    figures: list[Figure]
    caption: str
    size: str = ""  # or "small", "large"


@dataclasses.dataclass(frozen=True)
class Details:
    """Blocks that are shown on request."""

    summary: str
    blocks: list


Block = str | Table | Facts | Panels | Details


def html(blocks: Iterable[Block]) -> str:
    """Returns the html of blocks; texts are escaped."""
    block = template("macros.html.j2").module.block
    return "".join(str(block(b)) for b in blocks)


def template(name: str):
    """Returns a template of this folder; values are escaped, and none may be missing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
