"""The study of contrast sets: which features a preference rests on, in both models.

Pairs are split in two. Features are chosen by attribution on the train half; everything that is
ablated is ablated on the test half.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import cache, partial
from operator import itemgetter

import numpy as np

from crossdict_jax import maps, results, stats
from crossdict_jax.activations.store import open_store
from crossdict_jax.causal.directions import (
    best_matches,
    feature_directions,
    map_groups,
    mapped_directions,
    strengths,
)
from crossdict_jax.causal.effects import MATCH
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.config import Config, refuse_transcoders
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Task
from crossdict_jax.models import Site
from crossdict_jax.report.tables import show
from crossdict_jax.stats import columns, correlation
from crossdict_jax.studies.contrast import ablation
from crossdict_jax.studies.contrast.ablation import Cut
from crossdict_jax.studies.contrast.preference import Reader, read_pairs
from crossdict_jax.studies.contrast.section import tables
from crossdict_jax.studies.contrast.sets import ContrastSet, read_sets
from crossdict_jax.training.stage import Stage, progress_bar
from crossdict_jax.workdir import Workdir

FILE = "contrast.jsonl"
OWN = "own"  # B's own features of largest attribution: the most that a mapped direction can do
LEAST_PAIRS = 4  # that all models can read: two for each half
OTHERS = 32  # features at most that lend their directions to controls
EDGES = 4  # top features of each layer that are traced back to the layer before


def run(config: Config, work: Workdir) -> None:
    """Writes contrast.jsonl, what models prefer and on which features it rests, and prints it.

    Raises:
      UserError: a file of pairs is missing or not understood; no set has pairs that all models can
        read; the run holds transcoders, whose features are written elsewhere than where they are
        read; a file of the run is missing or damaged.
    """
    refuse_transcoders(config, "A contrast set")
    settings = config.contrast
    sets = read_sets(settings.source)
    store = open_store(work.activations)
    finished = FinishedRun(config, work, store)
    question = dataclasses.asdict(dataclasses.replace(settings, source=()))
    question = [question, *map(dataclasses.asdict, sets)]
    everywhere = map_groups(config, store, layers="all", kinds=settings.maps)
    stage = Stage(work, "contrast", files=(FILE,), inputs=finished.inputs(everywhere, question))
    if not stage.finished:
        rows = []
        for study in progress_bar(_readable(finished, sets), desc="contrast sets", unit="set"):
            rows += _measure(study, stage)
        pairs = sum(row["n_pairs"] for row in rows if row["what"] == "preference")
        stage.finish({FILE: rows}, pairs=pairs)
    for _, of_set in itertools.groupby(results.read(work, FILE), key=itemgetter("set")):
        show(tables(list(of_set)))


def _readable(run: FinishedRun, sets: list[ContrastSet]) -> list[Halves]:
    """The sets of which all models can read some pairs; the others are named."""
    studies = []
    for pairs in sets:
        study = Halves(run, pairs)
        if study.n_pairs >= LEAST_PAIRS:
            studies.append(study)
            continue
        reading = study.reading
        print(
            f"{pairs.name} is left out: of {len(pairs)} pairs every model can read "
            f"{study.n_pairs} ({reading.too_long} longer than a context, {reading.not_rebuilt} "
            f"with characters that a tokenizer changes, {study.nested} of which one begins the "
            "other).",
            flush=True,
        )
    if not studies:
        raise UserError(
            f"contrast.source={','.join(run.config.contrast.source)} holds no set of which every "
            f"model can read {LEAST_PAIRS} pairs; give shorter texts."
        )
    return studies


class Halves:
    """A set of pairs in all models: features are chosen on one half, tested on the other."""

    def __init__(self, run: FinishedRun, pairs: ContrastSet):
        self.run, self.pairs, self.name = run, pairs, pairs.name
        store = run.store
        self.reading, self.nested = read_pairs(
            pairs,
            run.tokenizers,
            bos={model: store.has_bos(model) for model in store.models},
            contexts={model: run.lm(model).config.context for model in store.models},
        )
        readable = len(self.reading.kept) // 2
        self.n_pairs = min(readable, run.config.contrast.pairs)
        generator = np.random.Generator(np.random.Philox(key=run.config.seed))
        drawn = generator.permutation(readable)[: self.n_pairs]
        self.half = {"train": drawn[: len(drawn) // 2], "test": drawn[len(drawn) // 2 :]}
        self.reader = cache(self._reader)
        self.clean = cache(lambda model: self.reader(model, "test").preference())

    def _reader(self, model: str, half: str) -> Reader:
        chosen = np.sort(self.half[half])
        config = self.run.config
        return Reader(
            self.run.lm(model),
            self.reading.take(np.stack([2 * chosen, 2 * chosen + 1], axis=1).reshape(-1)),
            model,
            batch_size=config.intervention.batch_size,
            whole_span=config.contrast.span == "whole",
            dtype=config.extract.matmul_dtype,
        )

    def draws(self, n: int) -> stats.Resamples:
        config = self.run.config
        return stats.draw(np.arange(n), count=config.evaluation.bootstrap, seed=config.seed)

    def others(self, model: str, site: Site, top: np.ndarray) -> np.ndarray:
        """Live features beside some, which lend their directions to controls."""
        others = np.setdiff1d(self.run.live(model, site), top)
        generator = np.random.Generator(np.random.Philox(key=self.run.config.seed + 1))
        return np.sort(generator.permutation(others)[:OTHERS])

    def cut(self, model: str, site: Site, features: np.ndarray, others=None) -> Cut:
        """A model's own features, taken out where and as strongly as they fire."""
        others = self.others(model, site, features) if others is None else others
        dictionary, ids = self.run.dictionary(model, site), np.concatenate([features, others])
        strength = self.reader(model, "test").strength(site, dictionary, ids)
        return Cut(strength, feature_directions(dictionary, ids), len(features))

    def ablate(self, model: str, site: Site, cut: Cut, prefers: bool) -> tuple[np.ndarray, dict]:
        """What a cut costs each pair, and its row; no verdict where there is no preference."""
        clean = self.clean(model)
        drop, row = ablation.measure(
            self.reader(model, "test"),
            site,
            cut,
            clean=clean,
            controls=self.run.config.contrast.controls,
            draws=self.draws(len(clean)),
            seed=self.run.config.seed,
        )
        return drop, row if prefers else row | {"moves": None}


def _measure(study: Halves, stage: Stage) -> list[dict]:
    """The rows of one set; what an interrupted run kept of it is taken from there."""

    def part(key: tuple, make: Callable, *arguments):
        return stage.part((study.name, *key), partial(make, study, *arguments))

    run = study.run
    models, settings = run.store.models, run.config.contrast
    preferences, sites, edges, transfers = {}, {}, [], []
    for model in models:
        preferences[model] = part(("preference", model), _preference, model)
    prefers = {model: row["prefers"] for model, row in preferences.items()}
    for model in models:
        for site in sorted(run.store.sites_of(model)):
            key = "site", model, str(site)
            sites[model, site] = part(key, _features, model, site, prefers[model])
    for model in models:
        for pair in itertools.pairwise(sorted(run.store.sites_of(model))):
            tops = [sites[model, site]["top"][:EDGES] for site in pair]
            edges += part(("edges", model, *map(str, pair)), _edges, model, pair, tops)
    layers = run.config.intervention.layers
    for tasks in map_groups(run.config, run.store, layers=layers, kinds=settings.maps):
        transfers += part(("transfer", tasks[0].label), _transfer, tasks, sites, prefers)
    features = [row for site in sites.values() for row in site["rows"]]
    rows = [*preferences.values(), *features, *edges, *transfers]
    return [{"set": study.name} | row for row in rows]


def _preference(study: Halves, model: str) -> dict:
    """A model's accuracy, beside swapped labels and token counts."""
    config, pairs = study.run.config, study.pairs
    readers = [study.reader(model, half) for half in ("train", "test")]
    values = np.concatenate([readers[0].preference(), study.clean(model)])
    counts = study.run.token_counts[model]
    unigram = np.concatenate([reader.unigram_preference(counts) for reader in readers])
    draws = study.draws(len(values))
    accuracy = draws.mean(values > 0)
    generator = np.random.Generator(np.random.Philox(key=config.seed))
    signs = generator.choice([-1, 1], (max(config.evaluation.bootstrap, 1), len(values)))
    swapped = (signs * values[None] > 0).mean(1)
    low, high = np.percentile(swapped, (2.5, 97.5))
    return {
        "what": "preference",
        "model": model,
        "n_pairs": len(values),
        "n_in_file": len(pairs) + pairs.duplicates,
        "n_duplicates": pairs.duplicates,
        "n_too_long": study.reading.too_long,
        "n_not_rebuilt": study.reading.not_rebuilt,
        "n_nested": study.nested,
        **columns("accuracy", accuracy),
        "accuracy_swapped": float(swapped.mean()),
        "accuracy_swapped_low": float(low),
        "accuracy_swapped_high": float(high),
        **columns("accuracy_unigram", draws.mean(unigram > 0)),
        **columns("preference", draws.mean(values)),
        "prefers": accuracy.interval[0] is not None and accuracy.interval[0] > 0.5,
    }


def _features(study: Halves, model: str, site: Site, prefers: bool) -> dict:
    """Which features a model's preference rests on at a site, and what they cost.

    Chosen are those of largest attribution above 0 on the train half, and as many random others
    that fire.
    """
    config, dictionary = study.run.config, study.run.dictionary(model, site)
    train, test = (
        study.reader(model, half).attribution(site, dictionary).astype(np.float64)
        for half in ("train", "test")
    )
    mean = train.mean(0)
    order = np.argsort(-mean, kind="stable")[: config.contrast.features]
    top = order[mean[order] > 0]
    others = np.setdiff1d(np.flatnonzero(train.any(0)), top)
    generator = np.random.Generator(np.random.Philox(key=config.seed))
    drawn = np.sort(generator.permutation(others)[: config.contrast.features])
    features = np.concatenate([top, drawn])
    cut = study.cut(model, site, features)
    clean = study.clean(model)
    exact = ablation.singles(study.reader(model, "test"), site, cut, clean)
    draws, head = study.draws(len(clean)), {"model": model, "site": str(site)}
    rows = [
        {
            "what": "feature",
            **head,
            "feature": int(feature),
            "chosen": "top" if i < len(top) else "random",
            "n_pairs": len(clean),
            "firings": int((cut.strength[..., i] > 0).sum()),
            "attribution_train": float(mean[feature]),
            **columns("attribution", draws.mean(test[:, feature])),
            **columns("effect", draws.mean(exact[i])),
        }
        for i, feature in enumerate(features)
    ]
    drop = np.zeros(len(clean))
    if len(top):
        drop, row = study.ablate(model, site, study.cut(model, site, top), prefers)
        once = stats.draw(np.arange(len(features)), count=0, seed=0)
        means = {"attribution_r_train": mean[features], "attribution_r": test[:, features].mean(0)}
        r = {name: correlation(once, values, exact.mean(1)) for name, values in means.items()}
        agreement = {name: estimate and estimate.value for name, estimate in r.items()}
        rows.append({"what": "ablation", **head, "features": top.tolist()} | row | agreement)
    return {"rows": rows, "top": top.tolist(), "drop": drop.tolist()}


def _edges(study: Halves, model: str, pair: tuple[Site, Site], tops: list[list[int]]) -> list[dict]:
    """What the chosen features of a site add through those of the next one."""
    lower, upper = tops
    if not lower or not upper:
        return []
    sides = ((site, study.run.dictionary(model, site)) for site in pair)
    through = study.reader(model, "test").edges(*sides, upper)[:, :, lower].astype(np.float64)
    draws = study.draws(len(through))
    return [
        {
            "what": "edge",
            "model": model,
            "site_lower": str(pair[0]),
            "feature_lower": low,
            "site_upper": str(pair[1]),
            "feature_upper": high,
            **columns("attribution", draws.mean(through[:, j, i])),
        }
        for j, high in enumerate(upper)
        for i, low in enumerate(lower)
    ]


def _transfer(study: Halves, tasks: list[Task], sites: dict, prefers: dict) -> list[dict]:
    """What the mapped directions of A's chosen features, taken out of B, cost B's preference."""
    task = tasks[0]
    a, b = (task.source, task.site_source), (task.target, task.site_target)
    if not sites[a]["top"]:
        return []
    cuts = _cuts(study, a, b, tasks[1:], np.array(sites[a]["top"]))
    if sites[b]["top"]:
        cuts[OWN] = study.cut(*b, np.array(sites[b]["top"]))
    judged = prefers[task.source] and prefers[task.target]
    ablated = {name: study.ablate(*b, cut, judged) for name, cut in cuts.items()}
    ceiling = ablated[OWN][1] if OWN in ablated else {}
    at_best = ceiling["effect"] if (ceiling.get("effect_low") or 0) > 0 else None
    lost, head = np.array(sites[a]["drop"]), (a[0], b[0], str(a[1]), str(b[1]))
    draws = study.draws(len(lost))
    return [
        {
            "what": "transfer",
            **dict(zip(results.PAIR, head)),
            "direction": name,
            "prefers_source": prefers[task.source],
            "prefers_target": prefers[task.target],
            **row,
            "share_of_own": at_best and row["effect"] / at_best,
            **columns("pair_r", correlation(draws, lost, drop)),
        }
        for name, (drop, row) in ablated.items()
    ]


def _cuts(
    study: Halves, a: tuple[str, Site], b: tuple[str, Site], tasks: list[Task], top: np.ndarray
) -> dict[str, Cut]:
    """A's features as every map directs them, and their matches, to be taken out of B."""
    run, n = study.run, len(top)
    features = np.concatenate([top, study.others(*a, top)])
    side = run.side(*a)
    trained = strengths(side.dictionary, side.x, features)
    at_rows = study.reader(a[0], "test").row_activations(a[1])
    strength = study.reader(b[0], "test").spread(strengths(side.dictionary, at_rows, features))
    cuts = {}
    for task in tasks:
        m = maps.load(task.path(run.work))
        vectors = mapped_directions(m, side, features, trained, seed=run.config.seed)
        cuts[task.kind] = Cut(strength, vectors, n)
    matches, _ = best_matches(run.codes(*b), trained)
    matched = np.array(list(dict.fromkeys(matches[:n].tolist())))  # two may have one match
    others = [i for i in dict.fromkeys(matches[n:].tolist()) if i not in matched]
    return cuts | {MATCH: study.cut(*b, matched, np.array(others, int))}
