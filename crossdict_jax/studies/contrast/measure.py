"""The stage about contrast sets: which features a preference rests on, and do their images bear it?

Pairs are split in two. Features are chosen by attribution on the train half; everything that is
ablated is ablated on the test half.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from crossdict_jax import maps, results, stats
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.causal.directions import (
    best_matches,
    feature_directions,
    map_groups,
    mapped_directions,
    strengths,
)
from crossdict_jax.causal.effects import MATCH
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.causal.inputs import digest_of, digests
from crossdict_jax.causal.progress import Progress
from crossdict_jax.config import Config
from crossdict_jax.config.settings import refuse_transcoders
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Task
from crossdict_jax.models import Site
from crossdict_jax.report.tables import show
from crossdict_jax.stats import Resamples, columns, correlation
from crossdict_jax.studies.contrast import ablation, preference
from crossdict_jax.studies.contrast.ablation import Cut
from crossdict_jax.studies.contrast.preference import Reader, Readings
from crossdict_jax.studies.contrast.section import tables
from crossdict_jax.studies.contrast.sets import ContrastSet, read_sets
from crossdict_jax.training.stage import device_figures
from crossdict_jax.workdir import Workdir, read_json, write_json, write_jsonl

ROWS = "contrast.jsonl"
STAMP = "contrast.inputs.json"
PROGRESS = "contrast.progress.jsonl"
NATIVE = "own"  # B's own features of largest attribution: the most that an image can do
LEAST_PAIRS = 4  # that all models can read: two for each half
OTHERS = 32  # features at most that lend their directions to controls


def run(config: Config, work: Workdir) -> None:
    """Measures, and prints what came out."""
    measure_contrast(config, work)
    show(tables(results.read(work, ROWS)))


def measure_contrast(config: Config, work: Workdir) -> None:
    """Writes contrast.jsonl: per set of pairs, what models prefer, and on which features it rests.

    A row says ``what`` it is about. preference: a model's accuracy on a set, beside swapped labels
    and token counts. feature: one feature's attribution, and what its ablation costs on the test
    half; of the chosen ("top"), and of as many random ones. ablation: all chosen features at
    once. edge: what a feature adds through one of the next layer. transfer: the images of A's
    features under a rung, or their matches, or B's own ("native"), ablated in B at the same
    text positions; pair_r says whether A and B lose their preference on the same pairs.

    A finished contrast.jsonl whose inputs have not changed is left as it is. What parts gave is
    kept at once: an interrupted stage goes on behind them.

    Raises:
      UserError: a file of pairs is missing or not understood; no set has pairs that all models can
        read; the run holds transcoders, whose features are written elsewhere than where they are
        read; the store, a model, a dictionary or a map is missing or damaged.
    """
    refuse_transcoders(config, "A contrast set")
    started = time.perf_counter()
    sets = read_sets(config.contrast.source)
    store = open_store(work.activations)
    asked = dataclasses.replace(config.contrast, source=())
    groups = map_groups(config, store, layers=asked.layers, kinds=asked.rungs)
    everywhere = map_groups(config, store, layers="all", kinds=asked.rungs)
    inputs = digests(config, work, store, [task for _, *rungs in everywhere for task in rungs])
    inputs["contrast"] = digest_of([dataclasses.asdict(asked), *map(dataclasses.asdict, sets)])
    stamp = work.result(STAMP)
    if work.result(ROWS).exists() and stamp.exists() and read_json(stamp) == inputs:
        return
    progress = Progress(work.result(PROGRESS), digest_of(inputs))
    rows = list(_rows(config, work, store, sets, groups, progress))
    write_jsonl(work.result(ROWS), rows)
    write_json(stamp, inputs)
    progress.done()
    wall = time.perf_counter() - started
    pairs = sum(row["n_pairs"] for row in rows if row["what"] == "preference")
    work.record_timing("contrast", wall_s=wall, pairs=pairs, **device_figures())


def _rows(
    config: Config,
    work: Workdir,
    store: Store,
    sets: list[ContrastSet],
    groups: list[list[Task]],
    progress: Progress,
) -> Iterator[dict]:
    """Yields the rows of all sets; parts that ``progress`` knows are taken from there."""
    from tqdm import tqdm

    run = FinishedRun(config, work, store)
    studies = [_Study(run, pairs) for pairs in sets]
    for study in studies:
        if study.n_pairs < LEAST_PAIRS:
            print(study.too_few, flush=True)
    studies = [study for study in studies if study.n_pairs >= LEAST_PAIRS]
    if not studies:
        raise UserError(
            f"contrast.source={','.join(config.contrast.source)} holds no set of which every "
            f"model can read {LEAST_PAIRS} pairs; give shorter texts."
        )
    parts = [(study, *part) for study in studies for part in study.parts(groups)]
    with tqdm(total=len(parts), desc="contrast sets", unit="part") as bar:
        for study, key, make in parts:
            key = (study.name, *key)
            if key not in progress.known:
                progress.keep(key, make(progress.known))
            yield from ({"set": study.name} | row for row in progress.known[key]["rows"])
            bar.update()


class _Study:
    """One set of pairs in all models."""

    def __init__(self, run: FinishedRun, pairs: ContrastSet):
        self._run, self._pairs, self.name = run, pairs, pairs.name
        self._settings = run.config.contrast
        self._readers: dict[tuple[str, str], Reader] = {}
        self._clean: dict[str, np.ndarray] = {}

    # ------------------------------------------------------------ the pairs

    @cached_property
    def _all(self) -> Readings:
        """Everything that all models can read."""
        store, run = self._run.store, self._run
        return preference.read(
            self._pairs,
            run.tokenizers,
            bos={model: store.has_bos(model) for model in store.models},
            contexts={model: run.lm(model).config.context for model in store.models},
        )

    @cached_property
    def _halves(self) -> dict[str, Readings]:
        generator = np.random.Generator(np.random.Philox(key=self._run.config.seed))
        drawn = generator.permutation(self._all.n_pairs)[: self.n_pairs]
        train, test = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
        return {"train": self._all.take(np.sort(train)), "test": self._all.take(np.sort(test))}

    @property
    def n_pairs(self) -> int:
        return min(self._all.n_pairs, self._settings.pairs)

    @property
    def too_few(self) -> str:
        found = self._all
        return (
            f"{self.name} is left out: of {len(self._pairs)} pairs every model can read "
            f"{found.n_pairs} ({found.too_long} longer than a context, {found.not_rebuilt} with "
            f"characters that a tokenizer changes, {found.nested} of which one begins the other)."
        )

    def _reader(self, model: str, half: str) -> Reader:
        if (model, half) not in self._readers:
            self._readers[model, half] = Reader(
                self._run.lm(model),
                self._halves[half],
                model,
                batch_size=self._settings.batch_size,
                whole_span=self._settings.span == "whole",
                dtype=self._run.config.extract.matmul_dtype,
            )
        return self._readers[model, half]

    def _preference(self, model: str) -> np.ndarray:
        """Of a model without any change, on the test half."""
        if model not in self._clean:
            self._clean[model] = self._reader(model, "test").preference()
        return self._clean[model]

    def _draws(self, n: int) -> Resamples:
        config = self._run.config
        return stats.draw(np.arange(n), count=config.evaluation.bootstrap, seed=config.seed)

    # ------------------------------------------------------------ the parts

    def parts(self, groups: list[list[Task]]) -> Iterator[tuple]:
        """Yields (key, what makes its record from those that are known), in an order that works."""
        run = self._run
        for model in run.store.models:
            yield ("preference", model), lambda known, m=model: self._prefers(m)
        for model in run.store.models:
            for site in sorted(run.store.sites_of(model)):
                yield (
                    ("site", model, str(site)),
                    lambda known, m=model, s=site: self._rests_on(m, s, known),
                )
        for model in run.store.models:
            sites = sorted(run.store.sites_of(model))
            for low, high in itertools.pairwise(sites):
                if self._settings.edges:
                    yield (
                        ("edges", model, str(low), str(high)),
                        lambda known, m=model, s=(low, high): self._edges(m, *s, known),
                    )
        for tasks in groups:
            yield ("transfer", tasks[0].label), lambda known, t=tasks: self._transfer(t, known)

    def _site_record(self, known: dict, model: str, site: Site) -> dict:
        return known[self.name, "site", model, str(site)]

    def _prefers(self, model: str) -> dict:
        both = {half: self._halves[half].of[model] for half in ("train", "test")}
        train = self._reader(model, "train").preference()
        values = np.concatenate([train, self._preference(model)])
        counts = self._run.token_counts[model]
        unigram = np.concatenate([preference.unigram_preference(r, counts) for r in both.values()])
        draws = self._draws(len(values))
        accuracy = draws.mean(values > 0)
        row = {
            "what": "preference",
            "model": model,
            "n_pairs": len(values),
            "n_in_file": len(self._pairs) + self._pairs.duplicates,
            "n_duplicates": self._pairs.duplicates,
            "n_too_long": self._all.too_long,
            "n_not_rebuilt": self._all.not_rebuilt,
            "n_nested": self._all.nested,
            **columns("accuracy", accuracy),
            **self._swapped(values),
            **columns("accuracy_unigram", draws.mean(unigram > 0)),
            **columns("preference", draws.mean(values)),
            "prefers": accuracy.interval[0] is not None and accuracy.interval[0] > 0.5,
        }
        return {"rows": [row]}

    def _swapped(self, values: np.ndarray) -> dict:
        """The accuracy where every pair's labels are swapped or not by chance."""
        config = self._run.config
        generator = np.random.Generator(np.random.Philox(key=config.seed))
        signs = generator.choice([-1, 1], (max(config.evaluation.bootstrap, 1), len(values)))
        null = (signs * values[None] > 0).mean(1)
        low, high = np.percentile(null, (2.5, 97.5))
        return {
            "accuracy_swapped": float(null.mean()),
            "accuracy_swapped_low": float(low),
            "accuracy_swapped_high": float(high),
        }

    def _known_preference(self, known: dict, model: str) -> bool:
        return known[self.name, "preference", model]["rows"][0]["prefers"]

    def _rests_on(self, model: str, site: Site, known: dict) -> dict:
        """Which features a model's preference rests on at a site, and what they cost."""
        dictionary, steps = self._run.dictionary(model, site), self._settings.steps
        train, test = (
            self._reader(model, half).attribution(site, dictionary, steps=steps).astype(np.float64)
            for half in ("train", "test")
        )
        top, drawn = self._choose(train)
        reader, clean = self._reader(model, "test"), self._preference(model)
        draws = self._draws(len(clean))
        features = np.concatenate([top, drawn])
        cut = self._own_cut(model, site, features)
        exact = ablation.singles(reader, site, cut, clean)
        rows = [
            {
                "what": "feature",
                "model": model,
                "site": str(site),
                "feature": int(feature),
                "chosen": "top" if i < len(top) else "random",
                "n_pairs": len(clean),
                "firings": int((cut.strength[..., i] > 0).sum()),
                "attribution_train": float(train[:, feature].mean()),
                **columns("attribution", draws.mean(test[:, feature])),
                **columns("effect", draws.mean(exact[i])),
            }
            for i, feature in enumerate(features)
        ]
        drop = np.zeros(len(clean))
        if len(top):
            joint = self._measure(model, site, self._own_cut(model, site, top))
            drop = joint.drop
            means = train[:, features].mean(0), test[:, features].mean(0), exact.mean(1)
            agreement = {
                "attribution_r_train": _correlated(means[0], means[2]),
                "attribution_r": _correlated(means[1], means[2]),
            }
            head = {"what": "ablation", "model": model, "site": str(site)}
            row = _judged(joint.row, self._known_preference(known, model))
            rows.append(head | {"features": top.tolist()} | row | agreement)
        return {"rows": rows, "top": top.tolist(), "drop": drop.tolist()}

    def _choose(self, attribution: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the features of largest attribution above 0, as many random others that fire)."""
        mean = attribution.mean(0)
        order = np.argsort(-mean, kind="stable")[: self._settings.features]
        top = order[mean[order] > 0]
        others = np.setdiff1d(np.flatnonzero(attribution.any(0)), top)
        generator = np.random.Generator(np.random.Philox(key=self._run.config.seed))
        return top, np.sort(generator.permutation(others)[: self._settings.features])

    def _others(self, model: str, site: Site, top: np.ndarray) -> np.ndarray:
        """Live features beside the chosen ones, which lend their directions to controls."""
        others = np.setdiff1d(self._run.live(model, site), top)
        generator = np.random.Generator(np.random.Philox(key=self._run.config.seed + 1))
        return np.sort(generator.permutation(others)[:OTHERS])

    def _own_cut(self, model: str, site: Site, features: np.ndarray) -> Cut:
        """A model's own features, taken out where and as strongly as they fire."""
        dictionary = self._run.dictionary(model, site)
        ids = np.concatenate([features, self._others(model, site, features)])
        strength = self._reader(model, "test").own_strength(site, dictionary, ids)
        return Cut(strength, feature_directions(dictionary, ids), len(features))

    def _measure(self, model: str, site: Site, cut: Cut) -> ablation.Losses:
        clean = self._preference(model)
        return ablation.measure(
            self._reader(model, "test"),
            site,
            cut,
            clean=clean,
            controls=self._settings.controls,
            draws=self._draws(len(clean)),
            seed=self._run.config.seed,
        )

    def _edges(self, model: str, low: Site, high: Site, known: dict) -> dict:
        """What the chosen features of a site add through those of the next one."""
        lower, upper = (
            self._site_record(known, model, site)["top"][: self._settings.edges]
            for site in (low, high)
        )
        if not lower or not upper:
            return {"rows": []}
        sides = ((site, self._run.dictionary(model, site)) for site in (low, high))
        found = self._reader(model, "test").edges(*sides, upper)[:, :, lower]
        draws = self._draws(len(found))
        rows = [
            {
                "what": "edge",
                "model": model,
                "site_lower": str(low),
                "feature_lower": a,
                "site_upper": str(high),
                "feature_upper": b,
                **columns("attribution", draws.mean(found[:, j, i].astype(np.float64))),
            }
            for j, b in enumerate(upper)
            for i, a in enumerate(lower)
        ]
        return {"rows": rows}

    # ------------------------------------------------------------ into the other model

    def _transfer(self, tasks: list[Task], known: dict) -> dict:
        """What the images of A's chosen features, taken out of B, cost B's preference."""
        task, rungs = tasks[0], tasks[1:]
        a, b = (task.source, task.site_source), (task.target, task.site_target)
        source, target = (self._site_record(known, *side) for side in (a, b))
        prefers = [self._known_preference(known, model) for model in (task.source, task.target)]
        if not source["top"]:
            return {"rows": []}
        cuts = self._cuts(a, b, rungs, np.array(source["top"]))
        if target["top"]:
            cuts[NATIVE] = self._own_cut(*b, np.array(target["top"]))
        drop, draws = np.array(source["drop"]), self._draws(len(source["drop"]))
        measured = {name: self._measure(*b, cut) for name, cut in cuts.items()}
        native = measured[NATIVE].row if NATIVE in measured else {}
        at_best = native["effect"] if (native.get("effect_low") or 0) > 0 else None
        rows = []
        for name, losses in measured.items():
            effect = losses.row["effect"]
            rows.append(
                {
                    "what": "transfer",
                    "source": task.source,
                    "target": task.target,
                    "site_source": str(task.site_source),
                    "site_target": str(task.site_target),
                    "direction": name,
                    "prefers_source": prefers[0],
                    "prefers_target": prefers[1],
                    **_judged(losses.row, all(prefers)),
                    "share_of_own": at_best and effect / at_best,
                    **columns("pair_r", correlation(draws, drop, losses.drop)),
                }
            )
        return {"rows": rows}

    def _cuts(
        self, a: tuple[str, Site], b: tuple[str, Site], rungs: list[Task], top: np.ndarray
    ) -> dict[str, Cut]:
        """The images of A's features under every rung, and their matches, to be taken out of B."""
        run, n = self._run, len(top)
        features = np.concatenate([top, self._others(*a, top)])
        side = run.side(*a)
        fired = strengths(side.dictionary, side.x, features)
        reader_a, reader_b = (self._reader(model, "test") for model, _ in (a, b))
        here = strengths(side.dictionary, reader_a.row_activations(a[1]), features)
        strength = reader_b.spread(here)
        cuts = {}
        for task in rungs:
            m = maps.load(task.path(run.work))
            found = mapped_directions(m, side, features, fired, seed=run.config.seed)
            cuts[task.kind] = Cut(strength, found, n)
        matches, _ = best_matches(run.codes(*b), fired)
        own = list(dict.fromkeys(matches[:n].tolist()))  # two features may have one match
        others = [i for i in dict.fromkeys(matches[n:].tolist()) if i not in own]
        dictionary, ids = run.dictionary(*b), np.array(own + others)
        cuts[MATCH] = Cut(
            reader_b.own_strength(b[1], dictionary, ids),
            feature_directions(dictionary, ids),
            len(own),
        )
        return cuts


def _judged(row: dict, prefers: bool) -> dict:
    """The row, without a verdict where there is no preference to move."""
    return row if prefers else row | {"moves": None}


def _correlated(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's r; None of fewer than three, or where one does not vary."""
    if len(a) < 3 or not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])
