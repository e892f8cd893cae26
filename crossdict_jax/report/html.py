"""Templates filled in: pages, and the sections that others hand to them."""

from __future__ import annotations

from pathlib import Path

SHARED = Path(__file__).parent  # macros.html.j2, for every template


def fill(template: Path, **fields) -> str:
    """Returns the html that a template gives with these fields; it may import the shared macros."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**fields)
