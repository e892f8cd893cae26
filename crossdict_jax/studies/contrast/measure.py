"""The study of contrast sets: which features a preference rests on, in both models.

Features are chosen by attribution on one half of the pairs, and ablated on the other.
"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import cache, partial
from operator import itemgetter

import numpy as np

from crossdict_jax import maps, results, stats
from crossdict_jax.activations.store import open_store
from crossdict_jax.causal import directions
from crossdict_jax.causal.directions import MapGroup, map_groups, strengths
from crossdict_jax.causal.effects import MATCH
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.config import Config, refuse_transcoders
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.errors import UserError
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


def run(config: Config, work: Workdir) -> None:
    """Writes contrast.jsonl, what models prefer and on which features it rests, and prints it.

    Raises:
      UserError: pairs are missing or not understood, or too few of them can be read by all models;
        the run holds transcoders; a file of the run is missing or damaged.
    """
    refuse_transcoders(config, "A contrast set")
    settings = config.contrast
    sets = read_sets(settings.source)
    finished = FinishedRun(config, work, open_store(work.activations))
    question = dataclasses.asdict(dataclasses.replace(settings, source=()))
    groups = map_groups(config, finished.store, layers="all", kinds=settings.maps)
    tasks = [task for group in groups for task in group.tasks]
    inputs = finished.inputs(tasks, [question, *map(dataclasses.asdict, sets)])
    stage = Stage(work, "contrast", files=(FILE,), inputs=inputs)
    if not stage.finished:
        studies = [Halves(finished, pairs) for pairs in sets]
        studies = [study for study in studies if study.n_pairs >= LEAST_PAIRS]
        if not studies:
            raise UserError(
                f"contrast.source={','.join(settings.source)} holds no set of which every model "
                f"can read {LEAST_PAIRS} pairs; give shorter texts."
            )
        parts = (_measure(s, stage) for s in progress_bar(studies, desc="contrast", unit="set"))
        rows = [row for of_set in parts for row in of_set]
        stage.finish({FILE: rows}, pairs=sum(study.n_pairs for study in studies))
    for _, of_set in itertools.groupby(results.read(work, FILE), key=itemgetter("set")):
        show(tables(list(of_set)))


class Halves:
    """A set of pairs in all models: features are chosen on one half, tested on the other."""

    def __init__(self, run: FinishedRun, pairs: ContrastSet):
        self.run, self.pairs, self.seed = run, pairs, run.config.seed
        self.reading, nested = read_pairs(run, pairs)
        readable = len(self.reading.kept) // 2
        self.n_pairs = min(readable, run.config.contrast.pairs)
        drawn = stats.generator(self.seed).permutation(readable)
        drawn = drawn[: self.n_pairs]
        self.half = {"train": drawn[: len(drawn) // 2], "test": drawn[len(drawn) // 2 :]}
        self.reader = cache(self._reader)
        print(
            f"{pairs.name}{' is left out' if self.n_pairs < LEAST_PAIRS else ''}: of {len(pairs)} "
            f"pairs every model can read {readable} ({self.reading.too_long} longer than a "
            f"context, {self.reading.not_rebuilt} with characters that a tokenizer changes, "
            f"{nested} of which one begins the other).",
            flush=True,
        )

    def _reader(self, model: str, half: str) -> Reader:
        chosen = np.sort(self.half[half])
        texts = np.stack([2 * chosen, 2 * chosen + 1], axis=1).reshape(-1)
        passages = self.reading.take(texts).passages[model]
        if self.run.config.contrast.span != "whole":
            passages = dataclasses.replace(passages, first=None)
        return Reader(self.run.runner(model), passages)

    def draws(self, n: int) -> stats.Resamples:
        return stats.draw(np.arange(n), count=self.run.config.evaluation.bootstrap, seed=self.seed)

    def others(self, model: str, site: Site, top: np.ndarray) -> np.ndarray:
        """Live features beside some, which lend their directions to controls."""
        others = np.setdiff1d(self.run.live(model, site), top)
        generator = stats.generator(self.seed + 1)
        return np.sort(generator.permutation(others)[:OTHERS])

    def cut(self, model: str, site: Site, features: np.ndarray, others=None) -> Cut:
        """A model's own features, taken out where and as strongly as they fire."""
        others = self.others(model, site, features) if others is None else others
        dictionary, ids = self.run.dictionary(model, site), np.concatenate([features, others])
        strength = self.reader(model, "test").strength(site, dictionary, ids)
        return Cut(strength, decoder_rows(dictionary, ids), len(features))

    def ablate(self, model: str, site: Site, cut: Cut, prefers: bool) -> tuple[np.ndarray, dict]:
        """What a cut costs each pair, and its row; no verdict where there is no preference."""
        drop, row = ablation.measure(self.reader(model, "test"), site, cut, self.run.config)
        return drop, row if prefers else row | {"moves": None}


def _measure(study: Halves, stage: Stage) -> list[dict]:
    """The rows of one set; what an interrupted run kept of it is taken from there."""

    def part(key: tuple, make: Callable, *arguments):
        return stage.part((study.pairs.name, *key), partial(make, study, *arguments))

    run = study.run
    models, config = run.store.models, run.config
    preferences = {m: part(("preference", m), _preference, m) for m in models}
    prefers = {model: row["prefers"] for model, row in preferences.items()}
    sites, transfers = {}, []
    for model, site in ((m, site) for m in models for site in sorted(run.store.sites_of(m))):
        key = "site", model, str(site)
        sites[model, site] = part(key, _features, model, site, prefers[model])
    layers, kinds = config.intervention.layers, config.contrast.maps
    for group in map_groups(config, run.store, layers=layers, kinds=kinds):
        transfers += part(("transfer", group.label), _transfer, group, sites, prefers)
    features = [row for site in sites.values() for row in site["rows"]]
    rows = [*preferences.values(), *features, *transfers]
    return [{"set": study.pairs.name} | row for row in rows]


def _preference(study: Halves, model: str) -> dict:
    """A model's accuracy, beside swapped labels and token counts."""
    config, pairs = study.run.config, study.pairs
    readers = [study.reader(model, half) for half in ("train", "test")]
    values = np.concatenate([reader.preference for reader in readers])
    store = study.run.store
    windows = np.unique(store.rows.window[store.select("train")])
    tokens = np.concatenate([store.window_tokens(model, w) for w in windows])
    counts = np.bincount(tokens, minlength=study.run.runner(model).config.vocab_size)
    unigram = np.concatenate([reader.unigram_preference(counts) for reader in readers])
    draws = study.draws(len(values))
    accuracy = draws.mean(values > 0)
    generator = stats.generator(study.seed)
    signs = generator.choice([-1, 1], (max(config.evaluation.bootstrap, 1), len(values)))
    swapped = (signs * values[None] > 0).mean(1)
    return {
        "what": "preference",
        "model": model,
        "n_pairs": len(values),
        "n_in_file": len(pairs) + pairs.duplicates,
        **columns("accuracy", accuracy),
        **columns("accuracy_swapped", stats.Estimate(float(swapped.mean()), swapped)),
        **columns("accuracy_unigram", draws.mean(unigram > 0)),
        **columns("preference", draws.mean(values)),
        "prefers": (accuracy.interval[0] or 0) > 0.5,
    }


def _features(study: Halves, model: str, site: Site, prefers: bool) -> dict:
    """The features of largest attribution on the train half, random others, and their costs."""
    count, dictionary = study.run.config.contrast.features, study.run.dictionary(model, site)
    readers = [study.reader(model, half) for half in ("train", "test")]
    train, test = (r.attribution(site, dictionary).astype(np.float64) for r in readers)
    mean = train.mean(0)
    order = np.argsort(-mean, kind="stable")[:count]
    top = order[mean[order] > 0]
    others = np.setdiff1d(np.flatnonzero(train.any(0)), top)
    generator = stats.generator(study.seed)
    features = np.concatenate([top, np.sort(generator.permutation(others)[:count])])
    cut = study.cut(model, site, features)
    exact = ablation.singles(readers[1], site, cut)
    draws, head = study.draws(len(test)), {"model": model, "site": str(site)}
    rows = [
        {
            "what": "feature",
            **head,
            "feature": int(feature),
            "chosen": "top" if i < len(top) else "random",
            "n_pairs": len(test),
            "firings": int((cut.strength[..., i] > 0).sum()),
            "attribution_train": float(mean[feature]),
            **columns("attribution", draws.mean(test[:, feature])),
            **columns("effect", draws.mean(exact[i])),
        }
        for i, feature in enumerate(features)
    ]
    drop = np.zeros(len(test))
    if len(top):
        drop, row = study.ablate(model, site, study.cut(model, site, top), prefers)
        once = stats.draw(np.arange(len(features)), count=0, seed=0)
        r = correlation(once, test[:, features].mean(0), exact.mean(1))
        row |= {"features": top.tolist(), "attribution_r": r and r.value}
        rows.append({"what": "ablation", **head} | row)
    return {"rows": rows, "top": top.tolist(), "drop": drop.tolist()}


def _transfer(study: Halves, group: MapGroup, sites: dict, prefers: dict) -> list[dict]:
    """What the mapped directions of A's chosen features, taken out of B, cost B's preference."""
    a, b = group.ends
    if not sites[a]["top"]:
        return []
    cuts = _cuts(study, group, np.array(sites[a]["top"]))
    if sites[b]["top"]:
        cuts[OWN] = study.cut(*b, np.array(sites[b]["top"]))
    judged = prefers[group.source] and prefers[group.target]
    ablated = {name: study.ablate(*b, cut, judged) for name, cut in cuts.items()}
    ceiling = ablated[OWN][1] if OWN in ablated else {}
    at_best = ceiling["effect"] if (ceiling.get("effect_low") or 0) > 0 else None
    lost = np.array(sites[a]["drop"])
    draws = study.draws(len(lost))
    return [
        {
            "what": "transfer",
            **results.pair_columns(group),
            "direction": name,
            **row,
            "share_of_own": at_best and row["effect"] / at_best,
            **columns("pair_r", correlation(draws, lost, drop)),
        }
        for name, (drop, row) in ablated.items()
    ]


def _cuts(study: Halves, group: MapGroup, top: np.ndarray) -> dict[str, Cut]:
    """A's features as every map directs them, and their matches, to be taken out of B."""
    a, b = group.ends
    run, n = study.run, len(top)
    features = np.concatenate([top, study.others(*a, top)])
    side, reader = run.side(*a), study.reader(a[0], "test")
    trained = strengths(side.dictionary, side.x, features)
    x = reader.x(a[1])[reader.passages.window, reader.passages.position]
    strength = study.reader(b[0], "test").spread(strengths(side.dictionary, x, features))
    cuts = {}
    for task in group.tasks:
        m = maps.load(task.path(run.work))
        vectors = directions.mapped_directions(m, side, features, trained, seed=study.seed)
        cuts[task.kind] = Cut(strength, vectors, n)
    matches, _ = directions.best_matches(run.codes(*b), trained)
    matched = np.array(list(dict.fromkeys(matches[:n].tolist())))  # two may have one match
    others = [i for i in dict.fromkeys(matches[n:].tolist()) if i not in matched]
    return cuts | {MATCH: study.cut(*b, matched, np.array(others, int))}
