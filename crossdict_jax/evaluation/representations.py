"""All layers of two models against each other, and the directions of their matched features."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from crossdict_jax import dictionaries, models
from crossdict_jax.activations.passages import passages_of
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.evaluation.scoring import pair_columns
from crossdict_jax.evaluation.shared_features import DictionaryPair
from crossdict_jax.evaluation.similarity import LEAST_ROWS, MEASURES, NEIGHBOURS, Geometry
from crossdict_jax.maps.fit import MEMBER
from crossdict_jax.models import Site
from crossdict_jax.models.run import Runner
from crossdict_jax.workdir import Workdir

RANDOM_MATCHINGS = 19  # beating them all by chance has p = 0.05
LARGEST_MATCHING = 2000  # matches whose directions are compared: the cost grows with their square


def representation_rows(
    config: Config, store: Store, work: Workdir, pairs: list[DictionaryPair], matches: list[dict]
) -> list[dict]:
    """Returns the rows of similarity.jsonl, of three kinds.

    "layers": every layer of one model against every layer of another at
    ``evaluation.similarity_rows`` held-out positions, and with the rows of one of them shuffled.
    "proposal": the layer pairs that this suggests. "decoders": the decoder directions of the
    confirmed matches of two dictionaries, as in Lan et al. 2024 (arXiv 2410.06981), and those of
    random matchings of the same features.

    Memory: about n (5 n + 12 d_model) bytes for every layer of every model, n the positions.

    Args:
      matches: the rows of matches.jsonl.
    """
    generator = np.random.Generator(np.random.Philox(key=config.seed))
    drawn = generator.permutation(store.select("test"))[: config.evaluation.similarity_rows]
    rows: list[dict] = []
    if len(drawn) >= LEAST_ROWS:
        layers = {name: _geometries(config, store, name, np.sort(drawn)) for name in store.models}
        for source, target in itertools.combinations(store.models, 2):
            compared = _layer_rows(config, {m: layers[m] for m in (source, target)})
            paired = [pair for pair in pairs if (pair.source, pair.target) == (source, target)]
            rows += [*compared, _proposal(store.sites_of(source), paired, compared)]
    return rows + [_decoder_row(pair, matches, config.seed, work) for pair in pairs]


# ---------------------------------------------------------------- all layers


def _geometries(config: Config, store: Store, name: str, rows: np.ndarray) -> dict[Site, Geometry]:
    """The geometry of every layer of a model, its rows in an order drawn by the seed."""
    lm = models.load(store.paths[store.models.index(name)])
    sites = [Site(layer, config.site) for layer in range(lm.config.n_layers)]
    settings = {"batch_size": config.extract.batch_size, "dtype": config.extract.matmul_dtype}
    x = Runner(lm, **settings).read_at(passages_of(store, name, rows), sites)
    order = np.random.Generator(np.random.Philox(key=config.seed + 1)).permutation(len(rows))
    return {site: Geometry.of(layer[order]) for site, layer in zip(sites, x)}


def _layer_rows(config: Config, layers: dict[str, dict[Site, Geometry]]) -> list[dict]:
    (source, layers_a), (target, layers_b) = layers.items()
    n = len(next(iter(layers_a.values())).gram)
    order = np.random.Generator(np.random.Philox(key=config.seed)).permutation(n)
    rows = []
    for site_b, b in layers_b.items():
        shuffled = b.reordered(order)
        for site_a, a in layers_a.items():
            pair = DictionaryPair(source, target, site_a, site_b)
            scores = _beside(a.compared(b), a.compared(shuffled))
            rows.append({"kind": "layers"} | pair_columns(pair) | {"n_rows": n} | scores)
    return rows


def _beside(scores: dict[str, float], null: dict[str, float]) -> dict[str, float]:
    return {key: value for m in MEASURES for key, value in ((m, scores[m]), (f"{m}_null", null[m]))}


def _proposal(sites: Sequence[Site], pairs: list[DictionaryPair], rows: list[dict]) -> dict:
    """The layers of the target that suit these sites of the source best, in their order."""
    cka = {(row["site_source"], row["site_target"]): row["cka"] for row in rows}
    targets = list(dict.fromkeys(site for _, site in cka))
    table = np.array([[cka[str(a), b] for b in targets] for a in sites])
    chosen = monotone_assignment(table)
    of_run = [cka[str(pair.site_source), str(pair.site_target)] for pair in pairs]
    return {
        "kind": "proposal",
        "source": pairs[0].source,
        "target": pairs[0].target,
        "layer_pairs": ",".join(f"{a.layer}:{j}" for a, j in zip(sites, chosen)),
        "cka": float(table[np.arange(len(sites)), chosen].mean()),
        "cka_of_run": float(np.mean(of_run)),
    }


def monotone_assignment(scores: np.ndarray) -> np.ndarray:
    """Returns a column for every row of scores [rows, columns] with the largest sum.

    Columns increase from row to row; where there are more rows than columns, they never decrease.
    """
    step = int(len(scores) <= scores.shape[1])
    total, came_from = scores[0], []
    for row in scores[1:]:
        best = np.maximum.accumulate(total)  # of all columns up to this one
        column = np.maximum.accumulate(np.where(total == best, np.arange(len(row)), 0))
        if step:
            best, column = np.append(-np.inf, best[:-1]), np.append(0, column[:-1])
        total = row + best
        came_from.append(column)
    columns = [int(total.argmax())]
    for column in reversed(came_from):
        columns.append(int(column[columns[-1]]))
    return np.array(columns[::-1])


# ---------------------------------------------------------------- decoder directions


def _decoder_row(
    pair: DictionaryPair, matches: list[dict], seed: int, work: Workdir
) -> dict[str, Any]:
    """How alike the decoder directions of confirmed matches lie in both models."""
    columns = pair_columns(pair)
    confirmed = [m for m in matches if m["confirmed"] and columns.items() <= m.items()]
    row = {"kind": "decoders"} | columns | {"n_features": len(confirmed)}
    if len(confirmed) <= NEIGHBOURS + 1:  # too few to have neighbours
        empty = dict.fromkeys(MEASURES)
        return row | _beside(empty, empty) | {f"{m}_p": None for m in MEASURES}
    generator = np.random.Generator(np.random.Philox(key=seed))
    drawn = generator.permutation(len(confirmed))[:LARGEST_MATCHING]
    geometries = []
    for model, site, feature in (
        (pair.source, pair.site_source, "feature_source"),
        (pair.target, pair.site_target, "feature_target"),
    ):
        dictionary = dictionaries.load(work.dictionary(model, site, MEMBER))
        directions = decoder_rows(dictionary, np.array([confirmed[i][feature] for i in drawn]))
        norms = np.linalg.norm(directions, axis=1, keepdims=True)
        geometries.append(Geometry.of(directions / np.maximum(norms, 1e-30)))
    a, b = geometries
    scores = a.compared(b)
    random = [
        a.compared(b.reordered(generator.permutation(len(drawn)))) for _ in range(RANDOM_MATCHINGS)
    ]
    null = {m: float(np.mean([r[m] for r in random])) for m in MEASURES}
    above = {m: sum(r[m] >= scores[m] for r in random) for m in MEASURES}
    p = {f"{m}_p": (1 + n) / (1 + RANDOM_MATCHINGS) for m, n in above.items()}
    return row | _beside(scores, null) | p
