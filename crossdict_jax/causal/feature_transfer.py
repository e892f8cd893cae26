"""The stage that puts single features of one model into the other: feature_causal.jsonl."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from crossdict_jax import dictionaries, maps, models
from crossdict_jax.activations.splice import Passages, select_passages, train_mean, whole_spans
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.causal.directions import (
    best_matches,
    feature_directions,
    map_groups,
    mapped_directions,
    strengths,
)
from crossdict_jax.causal.effects import (
    MATCH,
    Directions,
    Experiment,
    Ground,
    NothingToTest,
    Plan,
    transfer,
)
from crossdict_jax.causal.finished_run import TRAIN_ROWS
from crossdict_jax.causal.inject import Injector, Positions
from crossdict_jax.causal.inputs import digest_of, digests
from crossdict_jax.causal.progress import Progress
from crossdict_jax.causal.vocabulary import translation
from crossdict_jax.config import Config
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Side, Task
from crossdict_jax.maps.base import encode_rows, slices
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.training.stage import device_figures
from crossdict_jax.workdir import Workdir, read_json, read_jsonl, write_json, write_jsonl

ROWS = "feature_causal.jsonl"
SUMMARY = "feature_causal_summary.jsonl"
STAMP = "feature_causal.inputs.json"
PROGRESS = "feature_causal.progress.jsonl"
LEAST_FIRINGS = 4  # places of the text that is read, for a feature to be drawn
LEAST_DOCUMENTS = 2  # that hold them: fewer give no interval


def transfer_features(config: Config, work: Workdir) -> None:
    """Writes feature_causal.jsonl, a row per tested feature and image, and their summary.

    In every direction between two models, at the layer pairs of ``intervention.layers``, features
    of the source are drawn among those that fire (or named), and their images under every rung,
    and by match (the target's feature that correlates best on training rows), are added to the
    target. feature_causal_summary.jsonl has a row per direction, layer pair and image. What
    single features gave is kept at once: an interrupted stage goes on behind the last of them.

    Raises:
      UserError: a model, the store, a dictionary or a map is missing or damaged; a named feature
        does not exist or never fires. A direction in which there is nothing to test has no rows,
        and a line says why; so has a run of transcoders, whose features are written elsewhere than
        where maps of activations read.
    """
    if not config.intervention.features and not config.intervention.feature_ids:
        return
    if config.sae.output_site:
        print("single features: left out, since transcoders read one site and write another")
        return
    started = time.perf_counter()
    store = open_store(work.activations)
    groups = _groups(config, store)
    inputs = digests(config, work, store, [task for _, *rungs in groups for task in rungs])
    if config.intervention.choose == "matched":
        inputs["matches"] = digest_of(_read_matches(work))
    stamp = work.result(STAMP)
    if work.result(SUMMARY).exists() and stamp.exists() and read_json(stamp) == inputs:
        return
    progress = Progress(work.result(PROGRESS), digest_of(inputs))
    rows, summary = _test_all(config, work, store, groups, progress)
    write_jsonl(work.result(ROWS), rows)
    write_jsonl(work.result(SUMMARY), summary)
    write_json(stamp, inputs)
    progress.done()
    wall, tested = time.perf_counter() - started, sum(s["n_features"] for s in summary)
    work.record_timing("transfer_features", wall_s=wall, features=tested, **device_figures())


def _groups(config: Config, store: Store) -> list[list[Task]]:
    settings = config.intervention
    groups = map_groups(config, store, layers=settings.layers, rungs=settings.rungs)
    if settings.feature_ids:  # they are the first model's own
        groups = [tasks for tasks in groups if tasks[0].source == store.models[0]]
    return groups


def _test_all(
    config: Config, work: Workdir, store: Store, groups: list[list[Task]], progress: Progress
) -> tuple[list[dict], list[dict]]:
    from tqdm import tqdm

    rows, summary, plan = [], [], _plan(config)
    texts: dict[str, _Texts] = {}
    for name in dict.fromkeys(n for tasks in groups for n in (tasks[0].source, tasks[0].target)):
        texts[name] = _Texts(config, store, name)
    with tqdm(desc="feature transfer", unit="feature") as bar:
        bar.total = 0
        for tasks in groups:

            def keep(feature: int, record: dict, where: str = tasks[0].label) -> None:
                progress.keep((where, feature), record)
                bar.update()

            try:
                test = _Direction(config, work, store, tasks, texts)
                bar.total += test.tested
                known = {
                    feature: record
                    for (where, feature), record in progress.known.items()
                    if where == tasks[0].label
                }
                bar.update(len(known))
                found, means = transfer(test.experiment, plan, known=known, keep=keep)
            except NothingToTest as reason:
                if config.intervention.feature_ids:
                    raise
                print(f"No features of {tasks[0].label} are put to work: {reason}", flush=True)
                continue
            rows += [test.place | test.match_columns(row) | row for row in found]
            summary += [test.place | row for row in means]
    return rows, summary


def _plan(config: Config) -> Plan:
    settings = config.intervention
    same = ("contexts", "alphas", "norm", "promoted", "random_directions", "shuffled_features")
    return Plan(
        **{name: getattr(settings, name) for name in (*same, "kl_budget", "fdr")},
        whole_span=settings.span == "whole",
        whole_prompt=settings.positions == "prompt",
        bootstrap=config.evaluation.bootstrap,
        seed=config.seed,
    )


class _Texts:
    """A language model and the test text that it reads; sites are read when they are asked for."""

    def __init__(self, config: Config, store: Store, name: str):
        self._config, self._store, self._name = config, store, name
        self.passages = select_passages(
            store, name, documents=config.intervention.documents, seed=config.seed
        )
        self._grounds: dict[Site, Ground] = {}

    @cached_property
    def _lm(self) -> LanguageModel:
        return models.load(self._path)

    @property
    def _path(self) -> str:
        return self._store.paths[self._store.models.index(self._name)]

    @cached_property
    def tokenizer(self):
        return models.load_tokenizer(self._path)

    def ground(self, site: Site) -> Ground:
        if site not in self._grounds:
            injector = Injector(
                self._lm,
                site,
                self.passages.tokens,
                batch_size=self._config.intervention.batch_size,
                dtype=self._config.extract.matmul_dtype,
            )
            places = positions_of(self._store, self._name, self.passages)
            self._grounds[site] = Ground(injector, places)
        return self._grounds[site]


def positions_of(store: Store, model: str, passages: Passages) -> Positions:
    """Returns the paired places of passages: spans reach back to the common end before.

    Continuations reach to the common end behind; a window's last place has none.
    """
    position = store.rows.position[:, store.models.index(model)].astype(np.int64)
    same = store.rows.window[1:] == store.rows.window[:-1]
    behind = position.copy()
    behind[:-1][same] = position[1:][same]
    front = passages.position - position[passages.rows]  # 1 where there is a BOS
    first = whole_spans(store, model, passages).first
    return Positions(passages.window, first, passages.position, behind[passages.rows] + front)


class _Direction:
    """Features of one model to be put into another, at one pair of sites."""

    def __init__(
        self,
        config: Config,
        work: Workdir,
        store: Store,
        tasks: list[Task],
        texts: dict[str, _Texts],
    ):
        self._config, self._work, self._store, self._tasks = config, work, store, tasks[1:]
        self._task = task = tasks[0]
        self._source, self._target = texts[task.source], texts[task.target]
        self._dictionaries = [
            dictionaries.load(work.dictionary(*where))
            for where in ((task.source, task.site_source), (task.target, task.site_target))
        ]
        train = store.select("train")
        generator = np.random.Generator(np.random.Philox(key=config.seed))
        self._train = np.sort(generator.permutation(train)[:TRAIN_ROWS])
        self.features, self.tested = self._choose()

    @property
    def place(self) -> dict[str, str]:
        task = self._task
        return {
            "source": task.source,
            "target": task.target,
            "site_source": str(task.site_source),
            "site_target": str(task.site_target),
        }

    def _read(self, side: int, rows: np.ndarray) -> np.ndarray:
        task = self._task
        where = ((task.source, task.site_source), (task.target, task.site_target))[side]
        return self._store.read(*where, rows)

    # ------------------------------------------------------------ which features

    def _choose(self) -> tuple[np.ndarray, int]:
        """The features to test, first, and then others whose images serve as controls."""
        settings, live = self._config.intervention, self._live()
        generator = np.random.Generator(np.random.Philox(key=self._config.seed))
        drawn = generator.permutation(np.flatnonzero(live))
        if settings.feature_ids:
            chosen = self._named(live)
        elif settings.choose == "matched":
            chosen = self._matched(live)[: settings.features]
        else:
            chosen = drawn[: settings.features]
        if not len(chosen):
            raise NothingToTest(
                f"No feature of {self._task.source} at {self._task.site_source} fires at "
                f"{LEAST_FIRINGS} places of {LEAST_DOCUMENTS} documents; raise "
                "intervention.documents or train the dictionary for longer."
            )
        others = drawn[~np.isin(drawn, chosen)]
        lent = max(0, settings.shuffled_features + 1 - len(chosen))
        return np.concatenate([chosen, others[:lent]]), len(chosen)

    def _live(self) -> np.ndarray:
        """bool [width]: fires in enough places of the text that is read, and in training."""
        rows = self._source.passages.rows
        fires, documents = self._firings(rows, self._source.passages.document)
        trained, _ = self._firings(self._train, np.zeros(len(self._train), int))
        return (fires >= LEAST_FIRINGS) & (documents >= LEAST_DOCUMENTS) & (trained > 0)

    def _firings(self, rows: np.ndarray, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How often each feature of A fires, and in how many documents."""
        width = self._dictionaries[0].width
        names, index = np.unique(document, return_inverse=True)
        in_document = np.zeros((len(names), width), bool)
        fires = np.zeros(width, np.int64)
        for block in slices(len(rows)):
            f = encode_rows(self._dictionaries[0], self._read(0, rows[block])) > 0
            fires += f.sum(0)
            here = index[block]
            for one in np.unique(here):
                in_document[one] |= f[here == one].any(0)
        return fires, in_document.sum(0)

    def _named(self, live: np.ndarray) -> np.ndarray:
        text, source = self._config.intervention.feature_ids, self._task.source
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise UserError(
                f"intervention.feature_ids={text} must be whole numbers with commas between."
            )
        ids = np.array(list(dict.fromkeys(map(int, parts))))
        for i in ids:
            if i >= len(live):
                raise UserError(
                    f"intervention.feature_ids={text}: {source} at {self._task.site_source} has "
                    f"features 0 to {len(live) - 1}, not {i}."
                )
            if not live[i]:
                raise UserError(
                    f"intervention.feature_ids={text}: feature {i} of {source} at "
                    f"{self._task.site_source} is dead, or fires at fewer than {LEAST_FIRINGS} "
                    "places of the text that is read; name another or raise "
                    "intervention.documents."
                )
        return ids

    def _matched(self, live: np.ndarray) -> np.ndarray:
        """A's live features by matches.jsonl: confirmed ones first, by training correlation."""
        task, found = self._task, {}
        ends = [(task.source, str(task.site_source)), (task.target, str(task.site_target))]
        for row in _read_matches(self._work):  # matches have no direction
            there = [(row["source"], row["site_source"]), (row["target"], row["site_target"])]
            if there in (ends, ends[::-1]):
                own = row["feature_source" if there == ends else "feature_target"]
                found[own] = (not row["confirmed"], -row["r_train"])
        best = [i for i in sorted(found, key=found.get) if live[i]]
        return np.array(best, dtype=np.int64)

    # ------------------------------------------------------------ the experiment

    @cached_property
    def experiment(self) -> Experiment:
        task, train = self._task, self._train
        x = self._read(0, train)
        tokens = self._store.tokens(task.source, train)
        strength = self._columns(x)
        passages = self._source.passages
        return Experiment(
            source=self._source.ground(task.site_source),
            target=self._target.ground(task.site_target),
            documents=passages.document,
            features=self.features,
            tested=self.tested,
            strength=self._columns(self._read(0, passages.rows)),
            directions=feature_directions(self._dictionaries[0], self.features),
            mapped={
                **self._images(Side(x, tokens, self._dictionaries[0]), strength),
                MATCH: self._match_image(strength),
            },
            mean=train_mean(self._store, task.target, task.site_target),
            translation=translation(self._source.tokenizer, self._target.tokenizer),
        )

    def _columns(self, x: np.ndarray, side: int = 0, features=None) -> np.ndarray:
        """The activations [n, features] of some features on rows x."""
        features = self.features if features is None else features
        return strengths(self._dictionaries[side], x, features)

    def _images(self, source: Side, strength: np.ndarray) -> dict[str, Directions]:
        seed = self._config.seed
        return {
            task.kind: Directions(
                mapped_directions(
                    maps.load(task.path(self._work)), source, self.features, strength, seed=seed
                )
            )
            for task in self._tasks
        }

    def _match_image(self, strength: np.ndarray) -> Directions:
        matches, self._match_r = best_matches(self._target_codes(), strength)
        self._matches = matches
        rows = self._target.passages.rows
        return Directions(
            vectors=feature_directions(self._dictionaries[1], matches),
            strength=self._columns(self._read(1, rows), 1, matches),
        )

    def _target_codes(self) -> Iterator[np.ndarray]:
        for block in slices(len(self._train)):
            yield encode_rows(self._dictionaries[1], self._read(1, self._train[block]))

    def match_columns(self, row: dict) -> dict:
        """Which feature of B is the match of a row's, and how near the image is to it."""
        at = int(np.flatnonzero(self.features == row["feature"])[0])
        image, match = (
            self.experiment.mapped[name].vectors[at].astype(np.float64)
            for name in (row["direction"], MATCH)
        )
        norms = np.linalg.norm(image) * np.linalg.norm(match)
        return {
            "match": int(self._matches[at]),
            "match_r": float(self._match_r[at]),
            "match_cosine": float(image @ match / norms) if norms else None,
        }


def _read_matches(work: Workdir) -> list[dict]:
    path = work.result("matches.jsonl")
    if not path.exists():
        raise UserError(
            "intervention.choose=matched needs results/matches.jsonl; run evaluate first, or set "
            "intervention.choose=random."
        )
    return read_jsonl(path)
