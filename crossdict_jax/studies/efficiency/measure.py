"""What a map is worth in paired rows: every rung fitted on few of them, a hypernetwork on none."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crossdict_jax import maps, stats
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.config import Config, crosscoder_settings, layer_pairs
from crossdict_jax.config.settings import refuse_transcoders
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Map, Pairs, Problem, Task
from crossdict_jax.maps.base import build, encode_rows, map_class, slices
from crossdict_jax.maps.descriptions import Describer
from crossdict_jax.maps.fit import Loader
from crossdict_jax.maps.joint import with_own_codes
from crossdict_jax.maps.kinds.hypernetwork import Hypernetwork, from_profiles, train_network
from crossdict_jax.maps.kinds.ridge import Ridge
from crossdict_jax.maps.moments import Products, RidgePath, activation_moments
from crossdict_jax.stats import Resamples
from crossdict_jax.training.stage import device_figures
from crossdict_jax.workdir import Workdir, write_jsonl

NETWORK = Hypernetwork.kind
PROFILES = "token_profiles"  # the part of the hypernetwork's weights that needs no training
ELSEWHERE = "ridge_elsewhere"  # ridge of the other layer pairs, about this one's means
ALL, HIDDEN = "all", "hidden"  # what is scored: all target features, or those never trained on


def measure_efficiency(config: Config, work: Workdir) -> None:
    """Writes efficiency.jsonl in ``work.results``: R^2 by the number of paired rows, and with none.

    At one layer pair, in every direction, on the test rows: every rung of ``map.kinds`` fitted on
    the first n training rows of documents in a seeded random order, its hyper-parameters chosen
    on all validation rows (a rung that refuses so few rows has none in the file); and zero-shot,
    with no paired row of this layer pair (held_out "layer") or of these features (held_out
    "features"): a hypernetwork trained on everything else, the ridge of the other layer pairs,
    and token profiles, which need no pairs at all. The means and scales of either model's
    features are of all training rows and need no pairs. Rungs that are trained read batches of all
    rows where there are fewer than one.

    Raises:
      UserError: the store or the dictionaries are missing, there is one layer pair only, or a
        setting asks for a layer pair or for rows that are not there.
    """
    started = time.perf_counter()
    refuse_transcoders(config, "The hypernetwork of launch.efficiency")
    store = open_store(work.activations)
    asked, others = _tasks(config, store)
    counts = _counts(config, len(store.select("train")))
    loader = Loader(store, work, config.seed)
    rows = list(_Study(config, work, loader, asked, others).rows(counts))
    write_jsonl(work.result("efficiency.jsonl"), rows)
    wall = time.perf_counter() - started
    work.record_timing("efficiency", wall_s=wall, maps=len(rows), **device_figures())


def _tasks(config: Config, store: Store) -> tuple[list[Task], list[Task]]:
    """Returns the aligned directions of the layer pair that is left out, and of all others."""
    pairs = layer_pairs(config)
    if len(pairs) < 2:
        raise UserError(
            f"layers give one layer pair, {_spelled(pairs[0])}: none can be left out of the "
            "hypernetwork's training; give two layers or more."
        )
    chosen = pairs[len(pairs) // 2]
    if config.efficiency.layer_pair:
        named = {_spelled(pair): pair for pair in pairs}
        if config.efficiency.layer_pair not in named:
            raise UserError(
                f"efficiency.layer_pair={config.efficiency.layer_pair} is no layer pair of this "
                f"run; use one of {', '.join(named)}."
            )
        chosen = named[config.efficiency.layer_pair]
    both = []
    for few in ((chosen,), tuple(pair for pair in pairs if pair != chosen)):
        text = ",".join(map(_spelled, few))
        kinds = dataclasses.replace(config.map, kinds=(NETWORK,))
        part = dataclasses.replace(config, layer_pairs=text, map=kinds)
        both.append([task for task in maps.tasks(part, store) if task.pairing == "aligned"])
    asked, others = both
    return asked, [task for task in others if task not in asked]


def _spelled(pair: tuple[int, int]) -> str:
    return f"{pair[0]}:{pair[1]}"


def _counts(config: Config, n: int) -> list[int]:
    for rows in config.efficiency.rows:
        if rows > n:
            raise UserError(
                f"efficiency.rows={rows} is more than the {n} paired training rows of this run; "
                "leave it out or raise text.documents."
            )
    return sorted({*config.efficiency.rows, n})


@dataclasses.dataclass(frozen=True)
class _Question:
    """One direction at the layer pair that is left out, and what its answers are scored on.

    Attributes:
      hidden: bool [width], target features that the hypernetwork of features never sees.
      target: [n, width], B's features on test rows.
      order: int [train rows], documents in a seeded order, rows of each as they come.
    """

    task: Task
    problem: Problem
    test: Pairs
    hidden: np.ndarray
    target: np.ndarray
    resamples: Resamples
    order: np.ndarray
    seed: int
    batch_size: int

    def first(self, n: int) -> Problem:
        """Returns the problem of the first n training rows and all validation rows."""
        train, rows = self.problem.train, np.sort(self.order[:n])
        sides = (
            dataclasses.replace(side, x=side.x[rows], tokens=side.tokens[rows])
            for side in (train.source, train.target)
        )
        few = Pairs(*sides, train.documents[rows])
        return Problem(f"{self.problem.label} on {n} rows", few, self.problem.validation)

    def rows(
        self, m: Map, kind: str, *, n: int, scored: Sequence[str], held_out: str | None = None
    ):
        """Yields the result rows of a map: one for each set of features that is scored."""
        predicted = maps.predict(m, self.test, self.batch_size)
        mean = self.problem.train.target.feature_moments[0]
        for what in scored:
            columns = self.hidden if what == HIDDEN else np.ones_like(self.hidden)
            t, p = self.target[:, columns].astype(np.float64), predicted[:, columns]
            error, variance = np.square(t - p).sum(1), np.square(t - mean[None, columns]).sum(1)
            fvu = self.resamples.estimate(error, variance)
            yield {
                "source": self.task.source,
                "target": self.task.target,
                "site_source": str(self.task.site_source),
                "site_target": str(self.task.site_target),
                "map": kind,
                "n": n,
                "seed": self.seed,
                "zero_shot": held_out is not None,
                "held_out": held_out,
                "scored": what,
                "n_features": int(columns.sum()),
                "n_rows": len(t),
                "n_documents": self.resamples.n_documents,
                **stats.columns("fvu", fvu),
                **stats.columns("r2", 1.0 - fvu),
                "l0_target": float((t > 0).sum(1).mean()),
                "l0_predicted": float((p > 0).sum(1).mean()),
            }


@dataclasses.dataclass(frozen=True)
class _Study:
    """Everything that is fitted and asked, in the order of the result rows."""

    config: Config
    work: Workdir
    loader: Loader
    asked: list[Task]
    others: list[Task]

    def rows(self, counts: list[int]) -> Iterator[dict[str, Any]]:
        from tqdm import tqdm

        known = self._known()
        questions = [self._question(task, known) for task in self.asked]
        kinds = [kind for kind in self.config.map.kinds if kind != NETWORK]
        with tqdm(total=len(questions) * len(kinds) * len(counts), desc="few rows") as bar:
            for question in questions:
                for kind in kinds:
                    for n in counts:
                        yield from self._few(question, kind, n)
                        bar.update()
        yield from self._none(questions, known)

    def _known(self) -> dict[tuple[str, int], np.ndarray]:
        """(model, layer) -> bool [width]: features that the hypernetwork of features may see."""
        known = {}
        generator = np.random.Generator(np.random.Philox(key=self.config.seed))
        for task in (*self.asked, *self.others):
            side = self.loader.side(task.target, task.site_target, "train")
            order = generator.permutation(side.dictionary.width)
            hidden = order[: max(1, round(self.config.efficiency.hidden_features * len(order)))]
            mask = ~np.isin(np.arange(len(order)), hidden)
            known.setdefault((task.target, task.site_target.layer), mask)
        return known

    def _question(self, task: Task, known) -> _Question:
        test = self.loader.pairs(task, "test")
        problem, seed = self.loader.problem(task), self.config.seed
        target = [encode_rows(test.target.dictionary, test.target.x[r]) for r in slices(len(test))]
        evaluation = self.config.evaluation
        return _Question(
            task=task,
            problem=problem,
            test=test,
            hidden=~known[task.target, task.site_target.layer],
            target=np.concatenate(target),
            resamples=stats.draw(test.documents, count=evaluation.bootstrap, seed=seed),
            order=document_order(problem.train.documents, seed),
            seed=seed,
            batch_size=evaluation.batch_size,
        )

    def _few(self, question: _Question, kind: str, n: int) -> Iterator[dict]:
        batch = min(self.config.map.batch_size, n)
        settings = dataclasses.replace(self.config.map, batch_size=batch)
        task = question.task
        folder = self._folder / f"{task.source}-to-{task.target}" / f"{kind}-{n}"
        few = question.first(n)
        try:
            if map_class(kind).through_joint:
                joint = crosscoder_settings(self.config)
                joint = dataclasses.replace(joint, batch_size=min(joint.batch_size, n))
                (few,) = with_own_codes([few], joint, seed=self.config.seed, directory=folder)
            (fitted,) = maps.rung(kind).fit(
                [few], settings, seed=self.config.seed, directory=folder
            )
        except UserError:
            if n == len(question.order):
                raise  # not for want of rows
            return
        yield from question.rows(fitted.map, kind, n=n, scored=(ALL, HIDDEN))

    @property
    def _folder(self) -> Path:
        task, share = self.asked[0], self.config.efficiency.hidden_features
        place = f"{task.site_source}--{task.site_target}-hidden-{share:g}"
        return self.work.root / "efficiency" / place

    def _none(self, questions: list[_Question], known) -> Iterator[dict]:
        """Answers without paired rows; last the hypernetwork that was trained on everything."""
        describer = Describer()
        of_others = [self.loader.problem(task) for task in self.others]
        everything = of_others + [question.problem for question in questions]
        for q in questions:
            m = from_profiles(q.problem, self.config.map.hypernetwork, describer)
            yield from q.rows(m, PROFILES, n=0, scored=(ALL,), held_out="layer")
            yield from q.rows(m, PROFILES, n=0, scored=(HIDDEN,), held_out="features")
            near = [
                p for p, task in zip(of_others, self.others) if _direction(task) == _direction(q)
            ]
            if near:
                m = _ridge_elsewhere(near, q.problem, self.config.map.ridge_penalties)
                yield from q.rows(m, ELSEWHERE, n=0, scored=(ALL,), held_out="layer")
        for held_out, problems, seen, scored in (
            ("layer", of_others, None, ALL),
            ("features", everything, known, HIDDEN),
            (None, everything, None, ALL),
        ):
            network, _ = train_network(
                problems,
                self.config.map.hypernetwork,
                seed=self.config.seed,
                directory=self._folder / f"{NETWORK}-without-{held_out or 'nothing'}",
                describer=describer,
                known=seen,
            )
            for q in questions:
                n = 0 if held_out else len(q.problem.train)
                m = network.write(q.problem, describer)
                yield from q.rows(m, NETWORK, n=n, scored=(scored,), held_out=held_out)


def _direction(of: Task | _Question) -> tuple[str, str]:
    task = of.task if isinstance(of, _Question) else of
    return task.source, task.target


def document_order(documents: np.ndarray, seed: int) -> np.ndarray:
    """Returns the rows' numbers by document, documents in one seeded random order."""
    names, place = np.unique(documents, return_inverse=True)
    rank = np.random.Generator(np.random.Philox(key=seed)).permutation(len(names))
    return np.argsort(rank[place], kind="stable")


def _ridge_elsewhere(near: list[Problem], asked: Problem, penalties: Sequence[float]) -> Ridge:
    """Returns the ridge of other layer pairs together, each about its own means, moved to this one.

    Its penalty is the one that is best on the validation rows of the others.
    """
    fitted, held_out = [], []
    for problem in near:
        train = activation_moments(problem.train.source.x, problem.train.target.x)
        rows = problem.validation
        validation = activation_moments(rows.source.x, rows.target.x)
        fitted.append(train)
        held_out.append(validation.about(train.centre_a, train.centre_b))
    train, validation = (
        Products(
            sum(p.n for p in all_), *(sum(getattr(p, k) for p in all_) for k in ("aa", "ab", "bb"))
        )
        for all_ in (fitted, held_out)
    )
    path = RidgePath(train)
    best = min(penalties, key=lambda penalty: validation.error(path.solution(penalty)))
    means = (
        np.asarray(side.x, np.float32).mean(0) for side in (asked.train.source, asked.train.target)
    )
    values = dict(zip(("mean_a", "mean_b"), means)) | {"W": path.solution(best)}
    arguments = {"d_a": len(values["W"])}
    return build(Ridge, asked.train.target.dictionary, arguments, values)
