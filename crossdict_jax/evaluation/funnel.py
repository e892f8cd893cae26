"""From all features to confirmed matches, for every pair of dictionaries of two models."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from crossdict_jax import maps
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config, layer_pairs
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.evaluation.codes import Codes, compress
from crossdict_jax.evaluation.matching import LEAST_R, Confirmation, Matching, confirm, match
from crossdict_jax.maps import Side
from crossdict_jax.maps.base import encode_rows
from crossdict_jax.models import Site
from crossdict_jax.workdir import Workdir, write_jsonl

SPLITS = ("train", "test")  # matched on the first, confirmed on the second


@dataclasses.dataclass(frozen=True)
class DictionaryPair:
    """The dictionaries of two models, and where they were trained."""

    source: str
    target: str
    site_source: Site
    site_target: Site

    def columns(self) -> dict[str, str]:
        """Returns the columns that name the pair in a result row."""
        return {f.name: str(getattr(self, f.name)) for f in dataclasses.fields(self)}


def dictionary_pairs(config: Config, store: Store) -> list[DictionaryPair]:
    """Returns each layer pair of each unordered pair of models once, the earlier model first."""
    made = []
    for ends in itertools.combinations(range(len(store.models)), 2):
        for pair in layer_pairs(config):
            sites = [Site(pair[min(i, 1)], config.site) for i in ends]
            made.append(DictionaryPair(*(store.models[i] for i in ends), *sites))
    return list(dict.fromkeys(made))


@dataclasses.dataclass(frozen=True)
class PairedCodes:
    """Both models' features on the same rows of a split."""

    a: Codes
    b: Codes
    tokens: np.ndarray  # int32 [n, 2], of both models
    documents: np.ndarray  # int32 [n]

    def shuffled(self, seed: int) -> PairedCodes:
        """Returns the codes with b's rows, and their tokens, in a random order."""
        order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(self.documents))
        tokens = np.stack([self.tokens[:, 0], self.tokens[order, 1]], axis=1)
        return dataclasses.replace(self, b=self.b[order], tokens=tokens)


def match_dictionaries(config: Config, store: Store, work: Workdir) -> None:
    """Writes matching.jsonl and matches.jsonl: which features two dictionaries share.

    matching.jsonl has two rows for each pair of dictionaries, of aligned and of shuffled pairs:
    how many features are there (width), live, matched on training documents; of those on test
    documents significant at ``evaluation.fdr``, also correlated LEAST_R or more (strong), and
    also beyond the tokens (confirmed); ``null`` is the number confirmed on shuffled pairs.
    matches.jsonl has a row for each aligned match. Features of the source are A's, of the target
    B's; matches have no direction.

    Raises:
      UserError: a dictionary is missing, or has too many features for the method.
    """
    from tqdm import tqdm

    pairs, rows, matches = dictionary_pairs(config, store), [], []
    for pair in tqdm(pairs, desc="match features", unit="pair"):
        sides = [
            [maps.load_side(store, *where, split, work) for split in SPLITS]
            for where in ((pair.source, pair.site_source), (pair.target, pair.site_target))
        ]
        splits = _paired(store, *sides)
        found = _found(splits, config)
        shuffled = {s: c.shuffled(maps.shuffle_seed(config.seed, s)) for s, c in splits.items()}
        null = _found(shuffled, config)
        confirmed = int(null[1].confirmed.sum())
        for pairing, (matching, worth) in (("aligned", found), ("shuffled", null)):
            counts = _funnel(matching, worth, config) | {"null": confirmed}
            counts |= {f"n_rows_{s}": len(c.documents) for s, c in splits.items()}
            rows.append(pair.columns() | {"pairing": pairing} | counts)
        matches += [pair.columns() | match for match in _matches(*found, sides)]
    write_jsonl(work.result("matching.jsonl"), rows)
    write_jsonl(work.result("matches.jsonl"), matches)


def _paired(store: Store, source: list[Side], target: list[Side]) -> dict[str, PairedCodes]:
    return {
        split: PairedCodes(
            a=_codes(a),
            b=_codes(b),
            tokens=np.stack([a.tokens, b.tokens], axis=1),
            documents=store.rows.document[store.select(split)],
        )
        for split, a, b in zip(SPLITS, source, target)
    }


def _codes(side: Side) -> Codes:
    return compress(lambda rows: encode_rows(side.dictionary, side.x[rows]), len(side.x))


def _found(splits: dict[str, PairedCodes], config: Config) -> tuple[Matching, Confirmation]:
    settings = config.evaluation
    train, test = (splits[split] for split in SPLITS)
    matching = match(
        train.a, train.b, minimum_firings=settings.minimum_firings, method=settings.matching
    )
    worth = confirm(
        matching,
        test.a,
        test.b,
        documents=test.documents,
        tokens=test.tokens,
        fdr=settings.fdr,
        seed=config.seed,
    )
    return matching, worth


def _funnel(matching: Matching, worth: Confirmation, config: Config) -> dict[str, Any]:
    significant = worth.p_adjusted <= config.evaluation.fdr
    confirmed = worth.confirmed
    return {
        "method": config.evaluation.matching,
        "width_source": matching.width_a,
        "width_target": matching.width_b,
        "live_source": matching.live_a,
        "live_target": matching.live_b,
        "matched": len(matching),
        "significant": int(significant.sum()),
        "strong": int((significant & (worth.r >= LEAST_R)).sum()),
        "confirmed": int(confirmed.sum()),
        "fdr": config.evaluation.fdr,
        "minimum_firings": config.evaluation.minimum_firings,
        "minimum_r": LEAST_R,
        "r_train": _mean(matching.r),
        "r_test": _mean(worth.r),
        "r_token": _mean(worth.r_token),
        "r_train_confirmed": _mean(matching.r[confirmed]),
        "r_test_confirmed": _mean(worth.r[confirmed]),
        "r_token_confirmed": _mean(worth.r_token[confirmed]),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _matches(matching: Matching, worth: Confirmation, sides: list[list[Side]]) -> list[dict]:
    norms = [
        np.linalg.norm(decoder_rows(side[0].dictionary, features), axis=1)
        for side, features in zip(sides, (matching.features_a, matching.features_b))
    ]
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
    listed = {name: values.tolist() for name, values in columns.items()}
    return [dict(zip(listed, row)) for row in zip(*listed.values())]
