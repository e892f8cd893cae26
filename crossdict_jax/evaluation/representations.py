"""All layers of two models against each other, and the directions of their matched features."""

import itertools
from collections.abc import Sequence

import numpy as np

from crossdict_jax import dictionaries, stats
from crossdict_jax.activations.passages import passages_of
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.evaluation.similarity import LEAST_ROWS, MEASURES, NEIGHBOURS, Geometry
from crossdict_jax.maps import Task
from crossdict_jax.maps.fit import MEMBER, Loader
from crossdict_jax.models import Site
from crossdict_jax.models.run import Runner
from crossdict_jax.results import PAIR, pair_columns
from crossdict_jax.workdir import Workdir

RANDOM_MATCHINGS = 19  # beating them all by chance has p = 0.05
LARGEST_MATCHING = 2000  # matches whose directions are compared: the cost is quadratic


def representation_rows(run: Loader, pairs: list[Task], matches: list[dict]) -> list[dict]:
    """Returns the rows of similarity.jsonl, of three kinds.

    "layers": every layer of one model against every layer of another at n =
    ``evaluation.similarity_rows`` held-out positions, also with one side's rows shuffled.
    "proposal": the layer pairs that this suggests.
    "decoders": decoder directions of the confirmed matches (rows of matches.jsonl), as in Lan et
    al. 2024 (arXiv 2410.06981), and of random matchings of the same features.
    """
    config, store = run.config, run.store
    drawn = stats.generator(config.seed).permutation(store.select("test"))
    drawn = np.sort(drawn[: config.evaluation.similarity_rows])
    rows: list[dict] = []
    if len(drawn) >= LEAST_ROWS:
        layers, settings = {}, config.extract
        mixed = stats.generator(config.seed + 1).permutation(len(drawn))
        for name in store.models:
            lm = store.load_model(name)
            runner = Runner(lm, batch_size=settings.batch_size, dtype=settings.matmul_dtype)
            sites = [Site(layer, config.site) for layer in range(lm.config.n_layers)]
            x = runner.read_at(passages_of(store, name, drawn), sites)
            layers[name] = {str(site): Geometry.of(of[mixed]) for site, of in zip(sites, x)}
        order = stats.generator(config.seed).permutation(len(drawn))
        for ends in itertools.combinations(store.models, 2):
            compared = []
            for site_b, b in layers[ends[1]].items():
                shuffled = b.reordered(order)
                for site_a, a in layers[ends[0]].items():
                    names = dict(zip(PAIR, (*ends, site_a, site_b)))
                    scores = _beside(a.compared(b), a.compared(shuffled))
                    compared.append({"kind": "layers"} | names | {"n_rows": len(drawn)} | scores)
            paired = [pair for pair in pairs if (pair.source, pair.target) == ends]
            rows += compared
            if ends[0] == store.models[0]:  # layer_pairs names layers of the first and of others
                rows.append(_proposal(sorted(store.sites_of(ends[0])), paired, compared))
    return rows + [_decoder_row(pair, matches, config.seed, run.work) for pair in pairs]


def _beside(scores: dict[str, float], null: dict[str, float]) -> dict[str, float]:
    return {key: value for m in MEASURES for key, value in ((m, scores[m]), (f"{m}_null", null[m]))}


def _proposal(sites: Sequence[Site], pairs: list[Task], rows: list[dict]) -> dict:
    """The target's layers that suit these source sites best, in their order."""
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

    Columns increase from row to row; with more rows than columns they never decrease.
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


def _decoder_row(pair: Task, matches: list[dict], seed: int, work: Workdir) -> dict:
    """How alike the decoder directions of confirmed matches lie in both models."""
    columns = pair_columns(pair)
    of_pair = [m for m in matches if columns.items() <= m.items()]
    confirmed = [m for m in of_pair if m["confirmed"]]
    tested = all(m["confirmed"] is not None for m in of_pair)
    row = {"kind": "decoders"} | columns | {"n_features": len(confirmed) if tested else None}
    if len(confirmed) <= NEIGHBOURS + 1:  # too few to have neighbours
        empty = dict.fromkeys(MEASURES)
        return row | _beside(empty, empty) | {f"{m}_p": None for m in MEASURES}
    generator = stats.generator(seed)
    drawn = generator.permutation(len(confirmed))[:LARGEST_MATCHING]
    geometries = []
    for model, site, feature in (
        (pair.source, pair.site_source, "feature_source"),
        (pair.target, pair.site_target, "feature_target"),
    ):
        dictionary = dictionaries.load(work.dictionary(model, site, MEMBER))
        directions = decoder_rows(dictionary, np.array([confirmed[i][feature] for i in drawn]))
        geometries.append(Geometry.of(stats.normalised(directions)))
    a, b = geometries
    scores = a.compared(b)
    orders = [generator.permutation(len(drawn)) for _ in range(RANDOM_MATCHINGS)]
    random = [a.compared(b.reordered(order)) for order in orders]
    null = {m: float(np.mean([r[m] for r in random])) for m in MEASURES}
    p = {
        f"{m}_p": (1 + sum(r[m] >= scores[m] for r in random)) / (1 + RANDOM_MATCHINGS)
        for m in MEASURES
    }
    return row | _beside(scores, null) | p
