"""What a section of the page is made of, and its html.

A section is a list of blocks: a text is a paragraph, a ``Table`` a table, and the rest stands here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from crossdict_jax.report.plots import Figure
from crossdict_jax.report.tables import Table


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str


@dataclasses.dataclass(frozen=True)
class Note:
    """A paragraph in small print, such as what is missing."""

    text: str


@dataclasses.dataclass(frozen=True)
class Code:
    text: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """Pairs of a name and what it is; ``style`` is facts or words."""

    items: list[tuple[str, str]]
    style: str = "facts"


@dataclasses.dataclass(frozen=True)
class Panels:
    """Figures side by side under one caption; ``size`` is small, large or empty."""

    figures: list[Figure]
    caption: str
    size: str = ""


@dataclasses.dataclass(frozen=True)
class Details:
    """Blocks that are shown on request."""

    summary: str
    blocks: list


Block = str | Table | Heading | Note | Code | Facts | Panels | Details


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page; ``id`` is its address in it."""

    id: str
    title: str
    blocks: list[Block]

    @property
    def html(self) -> str:
        return html(self.blocks)


def html(blocks: Iterable[Block]) -> str:
    """Returns the html of blocks; texts are escaped."""
    block = template("macros.html.j2").module.block
    return "".join(str(block(b)) for b in blocks)


def template(name: str):
    """Returns a template of this folder; what is put in is escaped, and nothing may be missing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
