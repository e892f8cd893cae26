"""Where dictionaries write: at the site that they read, or, of transcoders, at another."""

from __future__ import annotations

from collections.abc import Sequence

from crossdict_jax.config import Config, output_site
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site

Place = tuple[str, Site]  # a model's folder name, and a site of it


def outputs(
    config: Config, names: Sequence[str], sites: Sequence[Sequence[Site]]
) -> dict[Place, Place]:
    """Returns for every place that a dictionary reads the place that it writes.

    Args:
      names: of the models.
      sites: per model those that dictionaries read.

    Raises:
      UserError: ``sae.output_site`` names a model that the run has not.
    """
    return {
        (name, site): _output(config.sae.output_site, name, site, names)
        for name, of_model in zip(names, sites)
        for site in of_model
    }


def _output(text: str, name: str, site: Site, names: Sequence[str]) -> Place:
    if not text:
        return name, site
    model, kind, layer = output_site(text)
    if model and model not in names:
        raise UserError(
            f"sae.output_site={text}: there is no model {model!r}; this run has {', '.join(names)}."
        )
    return model or name, Site(site.layer if layer is None else layer, kind)


def to_read(name: str, written: dict[Place, Place]) -> tuple[Site, ...]:
    """Returns all sites of a model that dictionaries read or write, ascending."""
    both = {*written, *written.values()}
    return tuple(sorted(site for model, site in both if model == name))
