"""Chooses features by attribution on half of the pairs, and ablates them on the other half."""

from dataclasses import asdict, replace
from functools import cache, partial

import numpy as np
from scipy.stats import binomtest

from crossdict_jax import results, stats
from crossdict_jax.causal.directions import MapGroup, map_groups, strengths
from crossdict_jax.causal.effects import MATCH
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.config import Config, refuse_transcoders
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site
from crossdict_jax.report.tables import show
from crossdict_jax.stats import columns, correlation
from crossdict_jax.studies.contrast import TABLE, tables
from crossdict_jax.studies.contrast.preference import Cut, Reader, ablate, read_pairs, singles
from crossdict_jax.studies.contrast.sets import ContrastSet, read_sets
from crossdict_jax.training.stage import Stage, progress_bar
from crossdict_jax.workdir import Workdir, say

OWN = "own"  # B's features of largest attribution: the most that a mapped direction can do
LEAST_PAIRS = 4  # readable by all models: two for each half
OTHERS = 32  # features at most that lend their directions to controls


def run(config: Config, work: Workdir) -> None:
    """Writes contrast.jsonl and prints it.

    Raises:
      UserError: pairs are missing, not understood, or too few for all models; transcoders; a file
        of the run is missing or damaged.
    """
    refuse_transcoders(config, "A contrast set")
    settings, finished = config.contrast, FinishedRun(config, work)
    sets = read_sets(settings.source)
    groups = map_groups(config, finished.store, layers="all", kinds=settings.maps)
    question = [asdict(replace(settings, source=())), *map(asdict, sets)]
    inputs = finished.inputs([task for group in groups for task in group.tasks], question)
    stage = Stage(work, "contrast", files=(TABLE.file,), inputs=inputs)
    if not stage.finished:
        studies = [Halves(finished, pairs) for pairs in sets]
        counts = ", ".join(f"{s.n_pairs} of {len(s.pairs.good)} in {s.pairs.name}" for s in studies)
        studies = [study for study in studies if study.n_pairs >= LEAST_PAIRS]
        if not studies:
            raise UserError(
                f"contrast.source={','.join(settings.source)} holds no set of which every model "
                f"can read {LEAST_PAIRS} distinct pairs ({counts}); give more or shorter ones."
            )
        rows = []
        for study in progress_bar(studies, desc="contrast", unit="set"):
            of_set = stage.part((study.pairs.name,), partial(_measure, study))
            rows += [{"set": study.pairs.name} | row for row in of_set]
        stage.finish({TABLE.file: rows}, pairs=sum(study.n_pairs for study in studies))
    show(tables(results.read(work, TABLE.file)))


class Halves:
    """A set of pairs in all models: features are chosen on one half, tested on the other.

    Attributes:
      n_pairs: how many pairs are used.
      readers: of a model, for the pairs of either half (train, test).
    """

    def __init__(self, run: FinishedRun, pairs: ContrastSet):
        self.run, self.pairs, self.seed = run, pairs, run.config.seed
        reading, nested = read_pairs(run, pairs)
        readable = len(reading.kept) // 2
        self.n_pairs = min(readable, run.config.contrast.pairs)
        say(
            f"{pairs.name}{' is left out' if self.n_pairs < LEAST_PAIRS else ''}: of "
            f"{len(pairs.good)} pairs every model can read {readable} ({reading.too_long} longer "
            f"than a context, {reading.not_rebuilt} with characters that a tokenizer changes, "
            f"{nested} of which one begins the other)."
        )
        drawn = stats.generator(self.seed).permutation(readable)[: self.n_pairs]
        halves = np.split(drawn, [len(drawn) // 2])
        texts = [np.sort(np.append(2 * half, 2 * half + 1)) for half in halves]

        @cache
        def readers(model: str) -> list[Reader]:
            passages = [reading.take(of_half).passages[model] for of_half in texts]
            if run.config.contrast.span != "whole":
                passages = [replace(of_half, first=None) for of_half in passages]
            return [Reader(run.runner(model), of_half) for of_half in passages]

        self.readers = readers

    def draws(self, n: int) -> stats.Resamples:
        return stats.draw(np.arange(n), count=self.run.config.evaluation.bootstrap, seed=self.seed)

    def with_others(self, model: str, site: Site, top: np.ndarray) -> np.ndarray:
        """Returns features, then live ones that lend their directions to controls."""
        others = np.setdiff1d(self.run.live(model, site), top)
        drawn = stats.generator(self.seed + 1).permutation(others)
        return np.concatenate([top, np.sort(drawn[:OTHERS])])

    def cut(self, model: str, site: Site, features: np.ndarray, n: int) -> Cut:
        """Returns a model's own features as a cut of the first n."""
        dictionary = self.run.dictionary(model, site)
        strength = self.readers(model)[1].strength(site, dictionary, features)
        return Cut(strength, decoder_rows(dictionary, features), n)


def _measure(study: Halves) -> list[dict]:
    store, config = study.run.store, study.run.config
    rows = [_preference(study, model) for model in store.models]
    prefers = {row["model"]: row["prefers"] for row in rows}
    sites, layers = {}, config.intervention.layers
    for model in store.models:
        for site in sorted(store.sites_of(model)):
            found = sites[model, site] = _features(study, model, site, prefers[model])
            rows += [{"model": model, "site": str(site)} | row for row in found["rows"]]
    for group in map_groups(config, store, layers=layers, kinds=config.contrast.maps):
        rows += _transfer(study, group, sites, prefers)
    study.readers.cache_clear()  # the activations of all texts
    return rows


def _preference(study: Halves, model: str) -> dict:
    store, readers = study.run.store, study.readers(model)
    values = np.concatenate([reader.preference for reader in readers])
    windows = np.unique(store.rows.window[store.select("train")])
    tokens = np.concatenate(store.table.texts(store.models.index(model), windows, bos=None))
    counts = np.bincount(tokens, minlength=study.run.runner(model).config.vocab_size)
    log_p = np.log((counts + 1) / (counts.sum() + len(counts)))
    sums = (np.sum(log_p[reader.tokens] * reader.scored, axis=1) for reader in readers)
    unigram = np.concatenate([of_texts[::2] - of_texts[1::2] for of_texts in sums])
    accuracy, draws = _share("accuracy", values > 0), study.draws(len(values))
    return {
        "what": "preference",
        "model": model,
        "n_pairs": len(values),
        "n_in_file": len(study.pairs.good) + study.pairs.duplicates,
        **accuracy,
        **_share("accuracy_unigram", unigram > 0),
        **columns("preference", draws.mean(values)),
        "prefers": accuracy["accuracy_low"] > 0.5,
    }


def _share(name: str, of_pairs: np.ndarray) -> dict[str, float]:
    """A share of pairs and its exact interval; all resamples of few pairs may say the same."""
    low, high = binomtest(int(of_pairs.sum()), len(of_pairs)).proportion_ci()
    return {name: float(of_pairs.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


def _features(study: Halves, model: str, site: Site, prefers: bool) -> dict:
    """The features of largest attribution on the train half, and their cost on the other."""
    dictionary, readers = study.run.dictionary(model, site), study.readers(model)
    train, test = (r.attribution(site, dictionary).astype(np.float64) for r in readers)
    mean, reader = train.mean(0), readers[1]
    order = np.argsort(-mean, kind="stable")[: study.run.config.contrast.features]
    top = order[mean[order] > 0]
    if not len(top):
        return {"rows": [], "top": top}
    cut = study.cut(model, site, study.with_others(model, site, top), len(top))
    alone, draws = singles(reader, site, cut), study.draws(len(test))
    rows = [
        {
            "what": "feature",
            "feature": int(feature),
            "n_pairs": len(test),
            "firings": int((cut.strength[..., i] > 0).sum()),
            "attribution_train": float(mean[feature]),
            **columns("attribution", draws.mean(test[:, feature])),
            **columns("effect", draws.mean(alone[i])),
        }
        for i, feature in enumerate(top)
    ]
    drop, row = ablate(reader, site, cut, study.run.config, judged=prefers)
    return {"rows": [*rows, {"what": "ablation"} | row], "top": top, "drop": drop}


def _transfer(study: Halves, group: MapGroup, sites: dict, prefers: dict) -> list[dict]:
    """What removing the mapped directions of A's features, or their matches, costs B."""
    (a, b), run = group.ends, study.run
    (_, in_a), (_, in_b), top = study.readers(a[0]), study.readers(b[0]), sites[a]["top"]
    if not len(top):
        return []
    features = study.with_others(*a, top)
    vectors, matches, _ = run.map_features(group, features)
    x = in_a.x(a[1])[in_a.passages.window, in_a.passages.position]
    strength = in_b.spread(strengths(run.dictionary(*a), x, features))
    cuts = {kind: Cut(strength, of_map, len(top)) for kind, of_map in vectors.items()}
    matched = np.array(list(dict.fromkeys(matches)))  # two may have one match
    cuts[MATCH] = study.cut(*b, matched, len({*matches[: len(top)]}))
    judged = prefers[group.source] and prefers[group.target]
    ablated = {
        name: ablate(in_b, b[1], cut, run.config, judged=judged) for name, cut in cuts.items()
    }
    best = None  # what a mapped direction could cost, where that is surely above 0
    if sites[b]["rows"]:
        row = sites[b]["rows"][-1]
        ablated[OWN] = sites[b]["drop"], row if judged else row | {"moves": None}
        best = row["effect"] if (row["effect_low"] or 0) > 0 else None
    lost = sites[a]["drop"]
    draws = study.draws(len(lost))
    return [
        {
            **row,
            "what": "transfer",
            **results.pair_columns(group),
            "direction": name,
            "share_of_own": best and row["effect"] / best,
            **columns("pair_r", correlation(draws, lost, drop)),
        }
        for name, (drop, row) in ablated.items()
    ]
