"""What each loss of the trained map is good for: alone, left out, and all, at equal budget."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from crossdict_jax import maps
from crossdict_jax.activations.store import open_store
from crossdict_jax.config import Config, LossWeights
from crossdict_jax.errors import UserError
from crossdict_jax.evaluation.scoring import Bench, where
from crossdict_jax.maps import Task
from crossdict_jax.maps.fit import Loader
from crossdict_jax.training.stage import device_figures
from crossdict_jax.workdir import Workdir, write_jsonl

KIND = "mlp"
BASELINES = ("mean", "ridge")
COLUMNS = ("r2", "cosine", "cosine_centered", "l0_predicted")  # with intervals
PLAIN = ("l0_target", "rate_correlation", "cosine_mean_predictor", "n_rows", "n_documents")


def ablations(weights: LossWeights) -> dict[str, LossWeights]:
    """Returns {name: weights}: all losses, each alone, and all but each.

    Raises:
      UserError: fewer than two losses have a weight, so that there is nothing to compare.
    """
    given = {name: w for name, w in dataclasses.asdict(weights).items() if w}
    if len(given) < 2:
        raise UserError(
            f"map.loss_weights has {len(given)} losses above 0; give two or more, to compare them."
        )
    nothing = LossWeights(**dict.fromkeys(dataclasses.asdict(weights), 0.0))
    found = {"all": weights}
    found |= {f"only {n}": dataclasses.replace(nothing, **{n: w}) for n, w in given.items()}
    if len(given) > 2:
        found |= {f"without {n}": dataclasses.replace(weights, **{n: 0.0}) for n in given}
    return found


def ablate_losses(config: Config, work: Workdir) -> None:
    """Trains the mlp of aligned pairs once per ablation and writes results/ablation.jsonl.

    A row for each direction, pair of sites and ablation, and of the mean and of ridge beside
    them. Everything but the weights is the run's; the thresholds of a jumprelu head stay where
    they start where the sparsity loss is left out, because nothing else trains them.

    Raises:
      UserError: the store or a dictionary is missing or damaged.
    """
    start, store = time.perf_counter(), open_store(work.activations)
    kinds = dataclasses.replace(config.map, kinds=(KIND,))
    everything = maps.tasks(dataclasses.replace(config, map=kinds), store)
    tasks = [task for task in everything if task.pairing == "aligned"]
    loader = Loader(store, work, config.seed)
    benches = [_bench(loader, task, config) for task in tasks]
    rows: dict[Task, list[dict]] = {task: [] for task in tasks}
    for name, kind, fitted in _fitted(config, work, [loader.problem(task) for task in tasks]):
        for task, bench, m in zip(tasks, benches, fitted):
            rows[task].append(where(task, kind, "aligned") | {"losses": name} | _score(bench, m))
    write_jsonl(work.result("ablation.jsonl"), [row for one in rows.values() for row in one])
    wall = time.perf_counter() - start
    work.record_timing("ablate_losses", wall_s=wall, maps=len(tasks), **device_figures())


def _fitted(config: Config, work: Workdir, problems) -> Iterator[tuple[str, str, list]]:
    """Yields (losses, rung, maps in the order of the problems)."""
    directory, seed = work.maps / "ablation", config.seed
    for kind in BASELINES:
        fitted = maps.rung(kind).fit(problems, config.map, seed=seed, directory=directory)
        yield "none", kind, [f.map for f in fitted]
    for name, weights in ablations(config.map.loss_weights).items():
        settings = dataclasses.replace(config.map, loss_weights=weights)
        folder = directory / name.replace(" ", "-")
        fitted = maps.rung(KIND).fit(problems, settings, seed=seed, directory=folder)
        yield name, KIND, [f.map for f in fitted]


def _bench(loader: Loader, task: Task, config: Config) -> Bench:
    splits = {s: loader.pairs(task, s) for s in ("train", "validation", "test")}
    train_mean, _ = splits["train"].target.feature_moments
    return Bench.make(splits, train_mean=train_mean, config=config)


def _score(bench: Bench, m: maps.Map) -> dict:
    row = bench.score(m).row()
    intervals = [f"{name}_{end}" for name in COLUMNS for end in ("low", "high")]
    return {name: row[name] for name in (*COLUMNS, *PLAIN, *intervals)}
