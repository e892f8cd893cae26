"""All layers of two models against each other, and the directions of their matched features."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from crossdict_jax import dictionaries, models
from crossdict_jax.activations.passages import passages_of
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.evaluation.funnel import DictionaryPair, dictionary_pairs
from crossdict_jax.evaluation.similarity import LEAST_ROWS, MEASURES, NEIGHBOURS, Geometry
from crossdict_jax.maps.fit import MEMBER
from crossdict_jax.models import Site
from crossdict_jax.models.run import Runner
from crossdict_jax.results import read_matches
from crossdict_jax.workdir import Workdir, write_jsonl

RANDOM_MATCHINGS = 19  # beating them all by chance has p = 0.05
MOST_MATCHES = 2000  # whose directions are compared: the cost grows with their square


def compare_representations(config: Config, store: Store, work: Workdir) -> None:
    """Writes similarity.jsonl; reads the language models, the store and matches.jsonl.

    Its rows are of three kinds. "layers": every layer of one model against every layer of another
    at ``evaluation.similarity_rows`` held-out positions (none for 0, or where there are fewer than
    LEAST_ROWS); ``*_null`` is the same with the rows of one of them shuffled. "proposal": the layer
    pairs that this suggests. "decoders": the decoder directions of the confirmed matches of two
    dictionaries, as in Lan et al. 2024 (arXiv 2410.06981); ``*_null`` is the mean over random
    matchings of the same features, ``*_p`` the share of them (and this one) that score as high.

    Memory: about n (5 n + 12 d_model) bytes for every layer of every model, n the positions.
    """
    drawn = _held_out_rows(config, store)
    rows = _layer_rows(config, store, drawn) if len(drawn) >= LEAST_ROWS else []
    rows += [_decoder_row(pair, config, work) for pair in dictionary_pairs(config, store)]
    write_jsonl(work.result("similarity.jsonl"), rows)


# ---------------------------------------------------------------- all layers


def _layer_rows(config: Config, store: Store, drawn: np.ndarray) -> list[dict]:
    from tqdm import tqdm

    with tqdm(total=len(store.models), desc="compare layers", unit="model") as progress:
        seen = []
        for name, path in zip(store.models, store.paths):
            seen.append(_geometries(config, store, name, path, drawn))
            progress.update()
    rows = []
    for (source, a), (target, b) in itertools.combinations(zip(store.models, seen), 2):
        every = _compared(config, (source, a), (target, b))
        rows += every + [_proposal(config, store, source, target, every)]
    return rows


def _held_out_rows(config: Config, store: Store) -> np.ndarray:
    """Test rows of the store, drawn by the seed, ascending."""
    rows = store.select("test")
    generator = np.random.Generator(np.random.Philox(key=config.seed))
    return np.sort(generator.permutation(rows)[: config.evaluation.similarity_rows])


def _geometries(config: Config, store: Store, name: str, path: str, rows: np.ndarray):
    """The geometry of every layer of a model, its rows in an order drawn by the seed."""
    lm = models.load(path)
    settings = config.extract
    runner = Runner(lm, batch_size=settings.batch_size, dtype=settings.matmul_dtype)
    sites = [Site(layer, config.site) for layer in range(lm.config.n_layers)]
    x = runner.read_at(passages_of(store, name, rows), sites)
    order = np.random.Generator(np.random.Philox(key=config.seed + 1)).permutation(len(rows))
    return [Geometry.of(layer[order]) for layer in x]


def _compared(config: Config, source: tuple, target: tuple) -> list[dict]:
    (name_a, layers_a), (name_b, layers_b) = source, target
    n = len(layers_a[0].gram)
    order = np.random.Generator(np.random.Philox(key=config.seed)).permutation(n)
    rows = []
    for j, b in enumerate(layers_b):
        shuffled = b.reordered(order)
        for i, a in enumerate(layers_a):
            pair = DictionaryPair(name_a, name_b, Site(i, config.site), Site(j, config.site))
            scores = _beside(a.compared(b), a.compared(shuffled))
            rows.append({"kind": "layers"} | pair.columns() | {"n_rows": n} | scores)
    return rows


def _beside(scores: dict[str, float], null: dict[str, float]) -> dict[str, float]:
    return {key: value for m in MEASURES for key, value in ((m, scores[m]), (f"{m}_null", null[m]))}


def _proposal(config: Config, store: Store, source: str, target: str, rows: list[dict]) -> dict:
    """The layers of the target that suit the run's layers of the source best, in their order."""
    cka = {(row["site_source"], row["site_target"]): row["cka"] for row in rows}
    n_target = len({row["site_target"] for row in rows})
    sites = [Site(j, config.site) for j in range(n_target)]
    own = store.sites_of(source)
    table = np.array([[cka[str(a), str(b)] for b in sites] for a in own])
    chosen = monotone_assignment(table)
    return {
        "kind": "proposal",
        "source": source,
        "target": target,
        "layer_pairs": ",".join(f"{a.layer}:{j}" for a, j in zip(own, chosen)),
        "cka": float(table[np.arange(len(own)), chosen].mean()),
        "cka_of_run": _mean_cka(config, store, source, target, cka),
    }


def _mean_cka(config: Config, store: Store, source: str, target: str, cka: dict) -> float:
    pairs = [p for p in dictionary_pairs(config, store) if (p.source, p.target) == (source, target)]
    return float(np.mean([cka[str(p.site_source), str(p.site_target)] for p in pairs]))


def monotone_assignment(scores: np.ndarray) -> np.ndarray:
    """Returns a column for every row of scores [rows, columns] with the largest sum.

    Columns increase from row to row; where there are more rows than columns, they never decrease.
    """
    step = int(len(scores) <= scores.shape[1])
    total, came_from = scores[0], []
    for row in scores[1:]:
        best = np.maximum.accumulate(total)  # of all columns up to this one
        where = np.maximum.accumulate(np.where(total == best, np.arange(len(row)), 0))
        if step:
            best, where = np.append(-np.inf, best[:-1]), np.append(0, where[:-1])
        total = row + best
        came_from.append(where)
    columns = [int(total.argmax())]
    for where in reversed(came_from):
        columns.append(int(where[columns[-1]]))
    return np.array(columns[::-1])


# ---------------------------------------------------------------- decoder directions


def _decoder_row(pair: DictionaryPair, config: Config, work: Workdir) -> dict[str, Any]:
    """How alike the decoder directions of confirmed matches lie in both models."""
    matches = [m for m in read_matches(work, **pair.columns()) if m["confirmed"]]
    row = {"kind": "decoders"} | pair.columns() | {"n_features": len(matches)}
    if len(matches) <= NEIGHBOURS + 1:  # too few to have neighbours
        empty = dict.fromkeys(MEASURES)
        return row | _beside(empty, empty) | {f"{m}_p": None for m in MEASURES}
    generator = np.random.Generator(np.random.Philox(key=config.seed))
    drawn = generator.permutation(len(matches))[:MOST_MATCHES]
    a, b = (
        Geometry.of(_unit_rows(work, model, site, [matches[i][feature] for i in drawn]))
        for model, site, feature in (
            (pair.source, pair.site_source, "feature_source"),
            (pair.target, pair.site_target, "feature_target"),
        )
    )
    scores = a.compared(b)
    random = [
        a.compared(b.reordered(generator.permutation(len(drawn)))) for _ in range(RANDOM_MATCHINGS)
    ]
    null = {m: float(np.mean([r[m] for r in random])) for m in MEASURES}
    above = {m: sum(r[m] >= scores[m] for r in random) for m in MEASURES}
    p = {f"{m}_p": (1 + n) / (1 + RANDOM_MATCHINGS) for m, n in above.items()}
    return row | _beside(scores, null) | p


def _unit_rows(work: Workdir, model: str, site: Site, features: list[int]) -> np.ndarray:
    dictionary = dictionaries.load(work.dictionary(model, site, MEMBER))
    rows = decoder_rows(dictionary, np.array(features))
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
