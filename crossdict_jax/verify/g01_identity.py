"""G1: a model against itself is itself: pairs, activations, features, matches."""

from __future__ import annotations

from pathlib import Path

from crossdict_jax import maps, models
from crossdict_jax.activations.store import open_store
from crossdict_jax.evaluation.matching import match
from crossdict_jax.verify import lab, real
from crossdict_jax.verify.gate import Gate, at_least, at_most, equal, shown
from crossdict_jax.workdir import read_json

DOCUMENTS = 60
MINIMUM_FIRINGS = 30  # test rows in which a feature must be active to count


def gate(*, seed: int, directory: Path) -> Gate:
    name = models.EMBEDDED[0]
    config = real.real_config((name, name), documents=DOCUMENTS, kinds=("ridge",), seed=seed)
    work = real.trained(config, directory)
    rows = lab.ladder(config, work)
    store = open_store(work.activations)
    a, b = store.models
    activations = lab.closed_form("ridge", store, work, a, b, real.SITE)
    test = maps.load_pairs(store, a, b, real.SITE, real.SITE, "test", work)
    found = match(
        lab.features(test.source),
        lab.features(test.target),
        minimum_firings=MINIMUM_FIRINGS,
        merge_duplicates=True,
    )
    coverage = [m["coverage"] for m in read_json(work.result("pairing.json"))["models"].values()]
    return Gate(
        "G1",
        f"{name} against itself",
        (
            equal("coverage of the pairing, the lower one", min(coverage), 1.0),
            at_most("FVU of ridge on activations", activations["fvu"], 1e-4),
            equal("top-1 of ridge", lab.pick(rows, "ridge", source=a)["top1"], 1.0),
            shown("pool of the top-1", lab.pick(rows, "ridge", source=a)["pool"]),
            at_least("live features", found.live_a, 50),
            equal("matched less live features", len(found) - found.live_a, 0),
            at_least("correlation of the worst match", found.r.min(initial=1.0), 0.999),
        ),
    )
