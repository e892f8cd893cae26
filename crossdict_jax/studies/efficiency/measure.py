"""What a map is worth in paired rows: fitted on few of them, or zero-shot."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from crossdict_jax import maps, results, stats
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.config import (
    Config,
    crosscoder_settings,
    identity,
    layer_pairs,
    refuse_transcoders,
)
from crossdict_jax.errors import TooFewRows, UserError
from crossdict_jax.maps import Map, Pairs, Problem, Task
from crossdict_jax.maps.base import map_class
from crossdict_jax.maps.fit import Loader, with_own_codes
from crossdict_jax.maps.kinds.hypernetwork import Masks, from_profiles, train_network
from crossdict_jax.maps.kinds.ridge import Ridge
from crossdict_jax.maps.moments import Products, Regression
from crossdict_jax.report.tables import show
from crossdict_jax.results import pair_columns
from crossdict_jax.studies.efficiency import TABLE, curves, r2_table
from crossdict_jax.training.stage import Stage, input_digests, progress_bar
from crossdict_jax.workdir import Workdir

HIDDEN_FEATURES = 0.2  # share of every dictionary's features that a hypernetwork never sees
NETWORK = "hypernetwork"
ALL, HIDDEN = "all", "hidden"  # which target features are scored: all, or those never trained on


@dataclass(frozen=True)
class Question:
    """A direction at the left-out layer pair, and the rows that its maps are scored on."""

    task: Task
    problem: Problem
    test: Pairs
    hidden: np.ndarray  # bool [width], target features that the hypernetwork never sees
    target: np.ndarray  # [n, width], B's features on test rows
    draws: stats.Resamples

    def score(
        self, m: Map, kind: str, n: int, *scored: str, held_out: str | None = None
    ) -> list[dict]:
        """Returns the map's result rows, one for each scored set of features."""
        predicted, rows = maps.predict(m, self.test), []
        mean = self.problem.train.target.feature_moments.mean
        for features in scored:
            mask = self.hidden | (features == ALL)
            t = self.target[:, mask].astype(np.float64)
            sums = (np.square(t - x).sum(1) for x in (predicted[:, mask], mean[None, mask]))
            fvu = self.draws.estimate(*sums)
            row = {
                "map": kind,
                "n": n,
                "held_out": held_out,
                "scored": features,
                "n_features": int(mask.sum()),
                "n_rows": len(t),
                "n_documents": self.draws.n_documents,
                **stats.columns("fvu", fvu),
                **stats.columns("r2", 1.0 - fvu),
            }
            rows.append(pair_columns(self.task) | row)
        return rows


def run(config: Config, work: Workdir) -> None:
    """Writes efficiency.jsonl, R^2 by the number of paired rows and zero-shot, and prints it.

    At the middle layer pair: each map of ``map.kinds`` fitted on the first n training rows of
    documents in a random order, and zero-shot ones that have not seen this layer pair (held_out
    "layer") or these features ("features").

    Raises:
      UserError: the store or dictionaries are missing, there is only one layer pair, or a setting
        asks for rows that do not exist.
    """
    refuse_transcoders(config, "The hypernetwork of launch.efficiency")
    store = open_store(work.activations)
    asked, others = left_out(config, store)
    documents, counts = store.rows.document[store.select("train")], config.efficiency.rows
    if max(counts) > len(documents):
        raise UserError(
            f"efficiency.rows={max(counts)} is more than the {len(documents)} paired training rows "
            f"of this run; give --config.efficiency.rows=N,… up to {len(documents)}."
        )
    settings, tasks = [identity(config), list(counts)], asked + others
    folders = [work.dictionary(task.target, task.site_target) for task in tasks]
    inputs = input_digests(work, settings=settings, store_meta=store.meta, folders=folders)
    stage = Stage(work, "efficiency", files=(TABLE.file,), inputs=inputs)
    if not stage.finished:
        folder = work.root / "efficiency" / f"{asked[0].site_source}--{asked[0].site_target}"
        loader, generator = Loader(config, store, work), stats.generator(config.seed)
        seen: dict[tuple[str, int], np.ndarray] = {}  # (model, layer) -> bool [width]
        for task in tasks:
            width = loader.side(task.target, task.site_target, "train").dictionary.width
            rank = np.argsort(generator.permutation(width))
            mask = rank >= max(1, round(HIDDEN_FEATURES * width))
            seen.setdefault((task.target, task.site_target.layer), mask)
        questions = []
        for task in asked:
            test, hidden = loader.rows(task, "test"), ~seen[task.target, task.site_target.layer]
            draws = stats.draw(test.documents, count=config.evaluation.bootstrap, seed=config.seed)
            target = test.target.features(slice(None))
            questions.append(Question(task, loader.problem(task), test, hidden, target, draws))
        names, index = np.unique(documents, return_inverse=True)
        rank = stats.generator(config.seed).permutation(len(names))
        order = np.argsort(rank[index], kind="stable")  # keeps the rows of a document together
        rows, kinds = [], [kind for kind in config.map.kinds if kind != NETWORK]
        keys = [*itertools.product(questions, kinds, sorted({*counts, len(order)}))]
        for question, kind, n in progress_bar(keys, desc="few rows", unit="map"):
            make = partial(_few_rows, question, kind, order[:n], config, folder)
            rows += stage.part((question.task.label, kind, n), make)
        problems = {task: loader.problem(task) for task in others}
        make = partial(_no_rows, questions, problems, seen, config, folder)
        rows += stage.part((NETWORK,), make)
        stage.finish({TABLE.file: rows}, maps=len(rows))
    show(map(r2_table, curves(results.read(work, TABLE.file))))


def left_out(config: Config, store: Store) -> tuple[list[Task], list[Task]]:
    """Returns the aligned directions of the middle layer pair (left out), and all others."""
    pairs = [f"{a}:{b}" for a, b in layer_pairs(config)]
    if len(pairs) < 2:
        raise UserError(
            f"layers or layer_pairs give one layer pair, {pairs[0]}: none can be left out of the "
            "hypernetwork's training; give two or more."
        )
    every = replace(config, map=replace(config.map, kinds=(NETWORK,)))
    middle = replace(every, layer_pairs=pairs[len(pairs) // 2])
    asked, others = (
        [task for task in maps.tasks(part, store) if task.pairing == "aligned"]
        for part in (middle, every)
    )
    return asked, [task for task in others if task not in asked]


def _few_rows(
    question: Question, kind: str, rows: np.ndarray, config: Config, folder: Path
) -> list[dict]:
    """A map fitted on few rows; a crosscoder is trained on these alone."""
    n, task, problem = len(rows), question.task, question.problem
    train = problem.train.take(np.sort(rows))
    few = Problem(f"{problem.label} on {n} rows", train, problem.validation)
    settings = replace(config.map, batch_size=min(config.map.batch_size, n))
    directory = folder / f"{task.source}-to-{task.target}" / f"{kind}-{n}"
    asked = {"seed": config.seed, "directory": directory}
    try:
        if map_class(kind).through_joint:
            joint = crosscoder_settings(config)
            joint = replace(joint, batch_size=min(joint.batch_size, n))
            (few,) = with_own_codes([few], joint, **asked)
        (fitted,) = map_class(kind).fit([few], settings, **asked)
    except TooFewRows:
        if n == len(problem.train):
            raise
        return []
    return question.score(fitted.map, kind, n, ALL, HIDDEN)


def _no_rows(
    questions: list[Question],
    problems: dict[Task, Problem],
    seen: Masks,
    config: Config,
    folder: Path,
) -> list[dict]:
    """Zero-shot answers; last the hypernetwork that was trained on everything."""
    rows = []
    for q in questions:
        profiles = from_profiles(q.problem)  # the part that needs no training
        rows += q.score(profiles, "token_profiles", 0, ALL, held_out="layer")
        rows += q.score(profiles, "token_profiles", 0, HIDDEN, held_out="features")
        direction = q.task.source, q.task.target
        if near := [p for t, p in problems.items() if (t.source, t.target) == direction]:
            m = ridge_elsewhere(near, q.problem, config.map.ridge_penalties)
            rows += q.score(m, "ridge_elsewhere", 0, ALL, held_out="layer")
    others = list(problems.values())
    everything = others + [q.problem for q in questions]
    for held_out, trained_on, masks, scored in (
        ("layer", others, None, ALL),
        ("features", everything, seen, HIDDEN),
        (None, everything, None, ALL),
    ):
        directory = folder / f"{NETWORK}-without-{held_out or 'nothing'}"
        asked = {"seed": config.seed, "directory": directory}
        network, _ = train_network(trained_on, config.map.hypernetwork, masks=masks, **asked)
        for q in questions:
            n = 0 if held_out else len(q.problem.train)
            rows += q.score(network.write(q.problem), NETWORK, n, scored, held_out=held_out)
    return rows


def ridge_elsewhere(near: Sequence[Problem], asked: Problem, penalties: Sequence[float]) -> Ridge:
    """Returns ridge fitted on the other layer pairs, each centred, moved to this pair's means."""
    splits = zip(*((p.regression.train, p.regression.validation) for p in near))
    train, validation = (
        Products(*(sum(getattr(p, name) for p in parts) for name in ("n", "aa", "ab", "bb")))
        for parts in splits
    )
    elsewhere = Regression(asked.regression.means, train, validation)
    errors = elsewhere.errors(penalties)
    values = elsewhere.affine(elsewhere.solution(min(errors, key=errors.get)))
    return Ridge(asked.train.target.dictionary, values)
