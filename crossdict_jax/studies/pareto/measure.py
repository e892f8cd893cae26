"""L0 against FVU of every architecture, swept."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from crossdict_jax import dictionaries, stats
from crossdict_jax.activations.passages import train_mean
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config, architectures, unswept
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.dictionaries.base import find
from crossdict_jax.dictionaries.train import Member, members, train_members
from crossdict_jax.evaluation.reconstruction import measure
from crossdict_jax.models import Site
from crossdict_jax.workdir import Workdir

SHARES = (0.25, 0.5, 1.0, 2.0)  # of sae.k: the curve of an architecture that fixes k


def curves(
    config: Config, store: Store, work: Workdir, *, model: str, site: Site
) -> Iterator[tuple[dict, Dictionary]]:
    """Trains and yields each dictionary of each curve, with its row on the test rows.

    ``work`` gets a folder per architecture; finished dictionaries are kept.

    Raises:
      UserError: a batch is larger than the training rows.
    """
    test, mean = store.select("test"), train_mean(store, model, site)
    x, size = store.read(model, site, test), config.evaluation.batch_size
    documents = store.rows.document[test]
    draws = stats.draw(documents, count=config.evaluation.bootstrap, seed=config.seed)
    for architecture in config.pareto.architectures or architectures():
        sae = dataclasses.replace(config.sae, architecture=architecture, l0_target=0.0)
        settings, folder = dataclasses.replace(config, sae=sae), Workdir(work.root / architecture)
        made, has_k = curve(settings, model=model, site=site), "k" in find(architecture).reads
        train_members(settings, store, folder, made)
        for member in made:
            dictionary = dictionaries.load(folder.dictionary(model, site, member.name))
            seen = measure(dictionary, x, mean=mean, size=size)
            row = {
                "model": model,
                "site": str(site),
                "architecture": architecture,
                "seed": member.seed,
                "k": member.k if has_k else None,
                "l1_coefficient": None if has_k else member.l1_coefficient,
                "width": member.width,
                "steps": sae.steps,
                "n_rows": len(x),
                "n_documents": draws.n_documents,
                **stats.columns("l0", draws.mean(seen["l0"])),
                **stats.columns("fvu", draws.estimate(seen["error"], seen["variance"])),
                "dead_fraction": float(np.mean(seen["fires"] == 0)),
            }
            yield row, dictionary


def curve(config: Config, *, model: str, site: Site) -> list[Member]:
    """Returns the dictionaries of the curve of ``sae.architecture``.

    Their names hold the seed, and k (``pareto.k``) or the penalty (``pareto.penalties``).
    """
    sae, pareto = unswept(config.sae), config.pareto
    if "k" in find(sae.architecture).reads:
        usual_ks = {min(max(1, round(share * sae.k)), sae.width) for share in SHARES}
        ks = sorted({*(pareto.k or usual_ks)}, reverse=True)
        points = {f"k-{k}": {"k": k} for k in ks}
    else:
        penalties = sorted({share * find(sae.architecture).usual_l1 for share in pareto.penalties})
        points = {f"l1-{c:g}": {"l1_coefficient": c} for c in penalties}
    return [
        dataclasses.replace(member, **point, name=f"{member.name}-{name}")
        for member in members(sae, [(model, site)])
        for name, point in points.items()
    ]
