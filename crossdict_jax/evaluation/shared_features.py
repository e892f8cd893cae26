"""From all features to confirmed matches, for every pair of dictionaries of two models."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from crossdict_jax import maps
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config, EvaluationConfig, layer_pairs
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.evaluation.codes import SideCodes
from crossdict_jax.evaluation.matching import LEAST_R, Confirmation, Matching, confirm, match
from crossdict_jax.evaluation.scoring import pair_columns
from crossdict_jax.maps.fit import Loader
from crossdict_jax.models import Site

SPLITS = ("train", "test")  # matched on the first, confirmed on the second


@dataclasses.dataclass(frozen=True)
class DictionaryPair:
    """The dictionaries of two models, and where they were trained."""

    source: str
    target: str
    site_source: Site
    site_target: Site


def dictionary_pairs(config: Config, store: Store) -> list[DictionaryPair]:
    """Returns each layer pair of each unordered pair of models once, the earlier model first."""
    pairs = []
    for ends in itertools.combinations(range(len(store.models)), 2):
        for layers in layer_pairs(config):
            sites = [Site(layers[min(i, 1)], config.site) for i in ends]
            pairs.append(DictionaryPair(*(store.models[i] for i in ends), *sites))
    return list(dict.fromkeys(pairs))


def shared_features(
    pair: DictionaryPair, loader: Loader, *, settings: EvaluationConfig, seed: int, codes: SideCodes
) -> dict[str, list[dict]]:
    """Returns the rows of matching.jsonl and of matches.jsonl of a pair of dictionaries.

    matching.jsonl has two rows, of aligned and of shuffled pairs: how many features are matched on
    training documents and how many of these hold on test documents, by ever stricter tests.
    matches.jsonl has a row for each aligned match.

    Raises:
      UserError: a dictionary is missing, or has too many features for the method.
    """
    ends = ((pair.source, pair.site_source), (pair.target, pair.site_target))
    sides = {split: [loader.side(*end, split) for end in ends] for split in SPLITS}
    funnels = []
    for pairing in maps.fit.PAIRINGS:
        rows = {}
        for split, (a, b) in sides.items():
            if pairing == "shuffled":
                seed_of_split = maps.shuffle_seed(seed, split)
                order = np.random.Generator(np.random.Philox(key=seed_of_split))
                b = b.reordered(order.permutation(len(b.x)))
            rows[split] = codes(a), codes(b), np.stack([a.tokens, b.tokens], axis=1)
        matching = match(
            *rows["train"][:2], minimum_firings=settings.minimum_firings, method=settings.matching
        )
        a, b, tokens = rows["test"]
        documents = loader.store.rows.document[loader.store.select("test")]
        worth = confirm(
            matching, a, b, documents=documents, tokens=tokens, fdr=settings.fdr, seed=seed
        )
        significant, confirmed = worth.p_adjusted <= settings.fdr, worth.confirmed
        correlations = {"r_train": matching.r, "r_test": worth.r, "r_token": worth.r_token}
        means = {name: _mean(r) for name, r in correlations.items()}
        means |= {f"{name}_confirmed": _mean(r[confirmed]) for name, r in correlations.items()}
        funnels.append(
            pair_columns(pair)
            | {
                "pairing": pairing,
                "method": settings.matching,
                "width_source": matching.width_a,
                "width_target": matching.width_b,
                "live_source": matching.live_a,
                "live_target": matching.live_b,
                "matched": len(matching),
                "significant": int(significant.sum()),
                "strong": int((significant & (worth.r >= LEAST_R)).sum()),
                "confirmed": int(confirmed.sum()),
                "fdr": settings.fdr,
                "minimum_firings": settings.minimum_firings,
                "minimum_r": LEAST_R,
                **means,
                **{f"n_rows_{split}": len(rows[split][2]) for split in SPLITS},
            }
        )
        if pairing == "aligned":
            dictionaries = [side.dictionary for side in sides["train"]]
            matches = [pair_columns(pair) | row for row in _matches(matching, worth, *dictionaries)]
    null = {"null": funnels[-1]["confirmed"]}
    return {"matching.jsonl": [row | null for row in funnels], "matches.jsonl": matches}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _matches(matching: Matching, worth: Confirmation, a: Dictionary, b: Dictionary) -> list[dict]:
    """What matches.jsonl says of each pair of features."""
    ends = (a, matching.features_a), (b, matching.features_b)
    norms = [np.linalg.norm(decoder_rows(d, features), axis=1) for d, features in ends]
    columns = {
        "feature_source": matching.features_a,
        "feature_target": matching.features_b,
        "confirmed": worth.confirmed,
        "r_train": matching.r,
        "r_test": worth.r,
        "r_token": worth.r_token,
        "beyond_token": worth.beyond_token,
        "p": worth.p,
        "p_adjusted": worth.p_adjusted,
        "firings_source": matching.firings_a,
        "firings_target": matching.firings_b,
        "decoder_norm_source": norms[0],
        "decoder_norm_target": norms[1],
    }
    return [dict(zip(columns, row)) for row in zip(*(c.tolist() for c in columns.values()))]
