"""Dictionaries of one model used for another through an affine stitch, without any training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from crossdict_jax import maps, models, modules, stats
from crossdict_jax.activations.passages import select_passages
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.dictionaries.crosscoder_training import moments, rotation
from crossdict_jax.maps import Pairs, Problem
from crossdict_jax.maps.base import AffineMap
from crossdict_jax.maps.kinds import procrustes, ridge
from crossdict_jax.models import Site
from crossdict_jax.models.run import Effect, Passages, Runner
from crossdict_jax.stats import Resamples
from crossdict_jax.studies.dictionary_transfer.transferred import Affine, is_ours, transferred
from crossdict_jax.workdir import Workdir

Place = tuple[str, str, Site, Site]  # source, target, and their sites


def score_dictionary_transfer(config: Config, store: Store, work: Workdir) -> list[dict[str, Any]]:
    """Returns the rows of dictionary_transfer.jsonl: ways to reconstruct B, per direction.

    - dictionary: own, B's dictionary; transferred, A's through ridge from B to A and back (fitted
      on training rows, penalty by validation rows); orthogonal, through one rotation and back
      (McCann 2026, arXiv 2605.24577), where there are rows enough for one; as_is, A's on B's
      activations as if they were A's, where both have one size; rotated, through a random
      rotation and back, at the same scales; stitch, from B to A and back with no dictionary
      between: what no transferred one can exceed.
    - fvu, l0: of the n_rows test rows; ce: nats of the token after each of n_positions paired
      positions of test documents with the reconstruction put in; delta_ce: less the clean one.
      Both are null of the stitch alone, which is not put in.

    Directions whose source dictionary is not of this project's architectures have no rows, and
    transcoders none at all: an affine stitch of what they read says nothing of what they write.

    Raises:
      UserError: the store, a model or a dictionary is missing or damaged.
    """
    from tqdm import tqdm

    if config.sae.output_site:
        print("transfer dictionaries: left out, since transcoders read one site and write another")
        return []
    rows: list[dict] = []
    wanted = places(config, store)
    with tqdm(total=len(wanted), desc="transfer dictionaries", unit="pair") as progress:
        for model in dict.fromkeys(target for _, target, *_ in wanted):
            into = [place for place in wanted if place[1] == model]
            target = _Target.read(config, store, model, into)
            for place in into:
                rows += target.rows(place, work)
                progress.update()
    return rows


def places(config: Config, store: Store) -> list[Place]:
    """Every direction and pair of sites of the run's maps."""
    tasks = maps.tasks(config, store)
    return list(dict.fromkeys((t.source, t.target, t.site_source, t.site_target) for t in tasks))


@dataclasses.dataclass(frozen=True)
class Stitch:
    """The affine maps between two models, fitted on their paired training rows."""

    there: Affine  # from A to B
    back: Affine


def fit_stitch(problem: Problem, config: Config, rung: ModuleType = ridge) -> Stitch:
    """Returns the affine maps of a rung, ridge or procrustes, from A to B and from B to A."""
    swapped = Problem(problem.label, _swapped(problem.train), _swapped(problem.validation))
    fitted = rung.fit([problem, swapped], config.map, seed=config.seed, directory=Path())
    return Stitch(*(_affine(one.map) for one in fitted))


def unstitched(d_model: int) -> Stitch:
    """Returns the identity both ways: two models as if they had one space."""
    same = Affine(np.eye(d_model), np.zeros(d_model))
    return Stitch(same, same)


def _swapped(pairs: Pairs) -> Pairs:
    return dataclasses.replace(pairs, source=pairs.target, target=pairs.source)


def _affine(m: AffineMap) -> Affine:
    W = np.asarray(m.W[...], np.float64)
    mean_a, mean_b = (np.asarray(mean[...], np.float64) for mean in (m.mean_a, m.mean_b))
    return Affine(W, mean_b - mean_a @ W)


def random_stitch(train: Pairs, seed: int) -> Stitch:
    """Returns a random rotation from A to B, and back, that keeps means and mean power."""
    (mean_a, power_a), (mean_b, power_b) = (moments(s.x) for s in (train.source, train.target))
    d_a, d_b = len(mean_a), len(mean_b)
    Q = rotation(max(d_a, d_b), seed).astype(np.float64)[:d_a, :d_b]
    stretch = np.sqrt(max(power_b, 1e-12) / max(power_a, 1e-12))
    there, back = stretch * Q, Q.T / stretch
    return Stitch(Affine(there, mean_b - mean_a @ there), Affine(back, mean_a - mean_b @ back))


@dataclasses.dataclass(frozen=True)
class _Target:
    """The model whose activations are reconstructed, run once on its passages."""

    config: Config
    store: Store
    runner: Runner
    passages: Passages
    draws: Resamples

    @classmethod
    def read(cls, config: Config, store: Store, model: str, places: list[Place]) -> _Target:
        passages = select_passages(
            store, model, documents=config.intervention.documents, seed=config.seed
        )
        runner = Runner(
            models.load(store.paths[store.models.index(model)]),
            batch_size=config.intervention.batch_size,
            dtype=config.extract.matmul_dtype,
        )
        documents, count = passages.document[passages.scored], config.evaluation.bootstrap
        draws = stats.draw(documents, count=count, seed=config.seed)
        return cls(config, store, runner, passages, draws)

    def rows(self, place: Place, work: Workdir) -> list[dict[str, Any]]:
        """Returns the rows of one direction and pair of sites."""
        source, target, site_source, site_target = place
        splits = ("train", "validation")
        train, validation = (maps.load_pairs(self.store, *place, s, work) for s in splits)
        if not is_ours(train.source.dictionary):
            return []
        ways = self._ways(Problem(f"{source} to {target}", train, validation))
        where = {"source": source, "target": target}
        where |= {"site_source": str(site_source), "site_target": str(site_target)}
        held_out = self._held_out(ways, target, site_target, moments(train.target.x)[0])
        losses = self._losses(ways, target, site_target)
        return [where | {"dictionary": n} | held_out[n] | losses[n] for n in ways]

    def _ways(self, problem: Problem) -> dict[str, Dictionary | Stitch]:
        train = problem.train
        sizes = [side.x.shape[1] for side in (train.source, train.target)]
        stitches = {"transferred": fit_stitch(problem, self.config)}
        if len(train) > max(sizes):
            stitches["orthogonal"] = fit_stitch(problem, self.config, procrustes)
        if sizes[0] == sizes[1]:
            stitches["as_is"] = unstitched(sizes[0])
        stitches["rotated"] = random_stitch(train, self.config.seed)
        ways: dict[str, Dictionary | Stitch] = {"own": train.target.dictionary}
        for name, stitch in stitches.items():
            a = train.source.dictionary
            ways[name] = transferred(a, to_source=stitch.back, to_target=stitch.there)
        return ways | {"stitch": stitches["transferred"]}

    def _reconstructed(self, way: Dictionary | Stitch, x: np.ndarray) -> np.ndarray:
        if isinstance(way, Stitch):
            return way.there(way.back(x.astype(np.float64))).astype(np.float32)
        size = self.config.evaluation.batch_size
        return modules.over_rows(way, x.astype(np.float32), method="__call__", size=size)

    def _held_out(self, ways, model: str, site: Site, mean: np.ndarray) -> dict[str, dict]:
        """The columns of each way on all test rows."""
        numbers = self.store.select("test")
        x = self.store.read(model, site, numbers).astype(np.float32)
        settings = self.config.evaluation
        documents = self.store.rows.document[numbers]
        draws = stats.draw(documents, count=settings.bootstrap, seed=self.config.seed)
        variance = np.square(x - mean.astype(np.float32)[None, :]).sum(axis=1)
        found = {}
        for name, way in ways.items():
            error = np.square(x - self._reconstructed(way, x)).sum(axis=1)
            columns = {"n_rows": len(x), "n_documents": draws.n_documents}
            columns |= stats.columns("fvu", draws.estimate(error, variance))
            found[name] = columns | {"l0": self._l0(way, x)}
        return found

    def _l0(self, way: Dictionary | Stitch, x: np.ndarray) -> float | None:
        if isinstance(way, Stitch):
            return None
        size = self.config.evaluation.batch_size
        f = modules.over_rows(way, x, method="encode", size=size)
        return float((f > 0).sum(axis=1).mean())

    def _losses(self, ways, model: str, site: Site) -> dict[str, dict]:
        """The columns of each dictionary put into the model, on its passages."""
        x = self.store.read(model, site, self.passages.rows)
        dictionaries = {n: way for n, way in ways.items() if not isinstance(way, Stitch)}
        put_in = {name: self._reconstructed(d, x) for name, d in dictionaries.items()}
        effects = self.runner.splice(self.passages, site, put_in)
        return {name: self._loss_columns(effects["clean"], effects.get(name)) for name in ways}

    def _loss_columns(self, clean: Effect, effect: Effect | None) -> dict[str, Any]:
        mean = self.draws.mean
        return {
            "n_positions": None if effect is None else len(effect.ce),
            **stats.columns("ce", effect and mean(effect.ce)),
            **stats.columns("delta_ce", effect and mean(effect.ce - clean.ce)),
        }
