"""From all features to confirmed matches, for every pair of dictionaries of two models."""

import dataclasses
import itertools

import numpy as np

from crossdict_jax import maps
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config, layer_pairs
from crossdict_jax.evaluation.matching import LEAST_R, confirm, match
from crossdict_jax.evaluation.nulls import fast_length, shifts
from crossdict_jax.maps import Task
from crossdict_jax.maps.fit import Loader
from crossdict_jax.models import Site
from crossdict_jax.results import pair_columns

SPLITS = ("train", "test")  # matched on the first, confirmed on the second


def dictionary_pairs(config: Config, store: Store) -> list[Task]:
    """Returns each layer pair of each unordered pair of models once, the earlier model first."""
    pairs = []
    for a, b in itertools.combinations(store.models, 2):
        for layers in layer_pairs(config):
            sites = [Site(layers[min(store.models.index(m), 1)], config.site) for m in (a, b)]
            pairs.append(Task(a, b, *sites, kind="", pairing="aligned"))
    return list(dict.fromkeys(pairs))


def shared_features(pair: Task, loader: Loader) -> dict[str, list[dict]]:
    """Returns the rows of matching.jsonl and of matches.jsonl of a pair of dictionaries.

    matching.jsonl has two rows, of aligned and of shuffled pairs: features matched on training
    documents, and how many hold on test documents, by ever stricter tests. What needs a circular
    shift is None where none leaves the documents.
    """
    names, funnels, matches, settings = pair_columns(pair), [], [], loader.config.evaluation
    for pairing in maps.fit.PAIRINGS:
        task = dataclasses.replace(pair, pairing=pairing)
        train, test = (loader.rows(task, split) for split in SPLITS)
        sides, minimum = (test.source, test.target), settings.minimum_firings
        codes = train.source.codes, train.target.codes
        matched = match(*codes, minimum_firings=minimum, method=settings.matching)
        worth = confirm(
            matched,
            *(side.codes for side in sides),
            documents=test.documents,
            tokens=np.stack([side.tokens for side in sides], axis=1),
            fdr=settings.fdr,
            seed=loader.config.seed,
        )
        significant, confirmed = worth.p_adjusted <= settings.fdr, worth.confirmed
        counts = {
            "significant": int(significant.sum()),
            "strong": int((significant & (worth.r >= LEAST_R)).sum()),
            "confirmed": int(confirmed.sum()),
        }
        by_shifts = {"confirmed": confirmed, "p": worth.p, "p_adjusted": worth.p_adjusted}
        if not shifts(test.documents, fast_length(len(test))):
            counts = dict.fromkeys(counts)
            by_shifts = dict.fromkeys(by_shifts, np.full(len(confirmed), None))
        correlations = {"r_train": matched.r, "r_test": worth.r, "r_token": worth.r_token}
        means = {
            name: float(r.mean()) if len(r) else None
            for name, r in (correlations | {"r_test_confirmed": worth.r[confirmed]}).items()
        }
        funnels.append(
            names
            | {
                "pairing": pairing,
                "method": settings.matching,
                "width_source": matched.width_a,
                "width_target": matched.width_b,
                "live_source": matched.live_a,
                "live_target": matched.live_b,
                "matched": len(matched.r),
                **counts,
                "fdr": settings.fdr,
                "minimum_firings": minimum,
                "minimum_r": LEAST_R,
                **means,
                "n_rows_train": len(train),
                "n_rows_test": len(test),
            }
        )
        if pairing == "aligned":
            columns = {
                "feature_source": matched.features_a,
                "feature_target": matched.features_b,
                **correlations,
                "beyond_token": worth.beyond_token,
                **by_shifts,
            }
            values = zip(*(c.tolist() for c in columns.values()))
            matches = [names | dict(zip(columns, row)) for row in values]
    null = {"null": funnels[-1]["confirmed"]}
    return {"matching.jsonl": [row | null for row in funnels], "matches.jsonl": matches}
