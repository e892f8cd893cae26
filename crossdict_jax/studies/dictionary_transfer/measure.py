"""Dictionaries of one model used for another through an affine stitch, and as a training start."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from crossdict_jax import maps, models, modules, results, stats
from crossdict_jax.activations.passages import select_passages, train_mean
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.config import Config, identity, refuse_transcoders
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.errors import UserError
from crossdict_jax.evaluation.scoring import pair_columns
from crossdict_jax.maps import Problem, Task
from crossdict_jax.maps.fit import Loader
from crossdict_jax.models.run import Runner
from crossdict_jax.report.tables import show
from crossdict_jax.studies.dictionary_transfer.section import savings_table, tables
from crossdict_jax.studies.dictionary_transfer.transferred import (
    Affine,
    Stitch,
    fit_stitch,
    is_ours,
    random_stitch,
    transferred,
)
from crossdict_jax.studies.dictionary_transfer.warm_start import compare_starts
from crossdict_jax.training.stage import Stage, input_digests, progress_bar
from crossdict_jax.workdir import Workdir

FILE, TRAINING = "dictionary_transfer.jsonl", "dictionary_training.jsonl"


def run(config: Config, work: Workdir) -> None:
    """Writes dictionary_transfer.jsonl and dictionary_training.jsonl, and prints both.

    The first holds, in every direction whose source dictionary is of this project's architectures,
    the ways of ``ways`` to reconstruct the target: on all test rows, and put into the target at
    paired positions of test documents. The second compares training the target's dictionaries from
    random parameters and from the source's.

    Raises:
      UserError: dictionaries are transcoders, since a stitch of what they read says nothing of what
        they write, or imported; the store, a model or a dictionary is missing or damaged.
    """
    refuse_transcoders(config, "Starting from another model's dictionaries")
    store = open_store(work.activations)
    loader = Loader(store, work, config.seed)
    directions = dict.fromkeys(
        dataclasses.replace(task, kind="")
        for task in maps.tasks(config, store)
        if task.pairing == "aligned"
        and is_ours(loader.side(task.source, task.site_source, "train").dictionary)
    )
    if not directions:
        raise UserError(
            "No dictionary of this run can be transferred: all are imported ones; leave "
            "sae.sources empty and train_saes again."
        )
    folders = [work.dictionary(t.source, t.site_source) for t in directions]
    folders += [work.dictionary(t.target, t.site_target) for t in directions]
    inputs = input_digests(work, settings=identity(config), store_meta=store.meta, folders=folders)
    stage = Stage(work, "transfer_dictionaries", files=(FILE, TRAINING), inputs=inputs)
    if not stage.finished:
        rows, training = [], []
        for target in dict.fromkeys(task.target for task in directions):
            problems = {t: loader.problem(t) for t in directions if t.target == target}
            rows += stage.part((target, FILE), lambda p=problems: transfer_rows(p, config, store))
            training += stage.part(
                (target, TRAINING), lambda p=problems: compare_starts(p, config, store, work)
            )
        stage.finish({FILE: rows, TRAINING: training}, directions=len(directions))
    show([*tables(results.read(work, FILE)), savings_table(results.read(work, TRAINING))])


def ways(problem: Problem, config: Config) -> dict[str, Dictionary | Stitch]:
    """Returns the ways to reconstruct B, by the name of column ``dictionary``.

    own, B's dictionary; transferred, A's through ridge from B to A and back; orthogonal, through
    one rotation and back (McCann 2026, arXiv 2605.24577), where there are rows enough for one;
    as_is, A's on B's activations as if they were A's, where both have one size; rotated, through a
    random rotation and back, at the same scales; stitch, from B to A and back with no dictionary
    between: what no transferred one can exceed.
    """
    train = problem.train
    d_a, d_b = (side.x.shape[1] for side in (train.source, train.target))
    stitches = {"transferred": fit_stitch(problem, config.map)}
    if len(train) > max(d_a, d_b):
        stitches["orthogonal"] = fit_stitch(problem, config.map, "procrustes")
    if d_a == d_b:
        same = Affine(np.eye(d_a), np.zeros(d_a))
        stitches["as_is"] = Stitch(same, same)
    stitches["rotated"] = random_stitch(train, config.seed)
    a = train.source.dictionary
    through = {name: transferred(a, stitch) for name, stitch in stitches.items()}
    return {"own": train.target.dictionary, **through, "stitch": stitches["transferred"]}


def transfer_rows(
    problems: dict[Task, Problem], config: Config, store: Store
) -> list[dict[str, Any]]:
    """Returns the rows of dictionary_transfer.jsonl of the directions into one target.

    Nothing is put in of the stitch alone: its losses and l0 are null.
    """
    settings, seed, target = config.evaluation, config.seed, next(iter(problems)).target
    passages = select_passages(store, target, documents=config.intervention.documents, seed=seed)
    runner = Runner(
        models.load(store.paths[store.models.index(target)]),
        batch_size=config.intervention.batch_size,
        dtype=config.extract.matmul_dtype,
    )
    numbers = store.select("test")
    draws, draws_ce = (
        stats.draw(documents, count=settings.bootstrap, seed=seed)
        for documents in (store.rows.document[numbers], passages.document[passages.scored])
    )

    def over_rows(way: Dictionary, x: np.ndarray, method: str = "__call__") -> np.ndarray:
        x = x.astype(np.float32)
        return modules.over_rows(way, x, method=method, size=settings.batch_size)

    rows = []
    for task, problem in progress_bar(problems.items(), desc=f"dictionaries used for {target}"):
        site = task.site_target
        x, at_passages = (store.read(target, site, n) for n in (numbers, passages.rows))
        x, made = x.astype(np.float32), ways(problem, config)
        variance = np.square(x - train_mean(store, target, site)[None, :]).sum(axis=1)
        dictionaries = {name: way for name, way in made.items() if name != "stitch"}
        put_in = {name: over_rows(way, at_passages) for name, way in dictionaries.items()}
        effects = runner.splice(passages, site, put_in)
        clean = effects["clean"]
        for name, way in made.items():
            effect, l0 = effects.get(name), None
            if isinstance(way, Stitch):
                x_hat = way.forth(way.back(x.astype(np.float64))).astype(np.float32)
            else:
                x_hat = over_rows(way, x)
                l0 = float((over_rows(way, x, "encode") > 0).sum(axis=1).mean())
            error = np.square(x - x_hat).sum(axis=1)
            rows.append(
                {
                    **pair_columns(task),
                    "dictionary": name,
                    "n_rows": len(x),
                    "n_documents": draws.n_documents,
                    **stats.columns("fvu", draws.estimate(error, variance)),
                    "l0": l0,
                    "n_positions": None if effect is None else len(effect.ce),
                    **stats.columns("ce", effect and draws_ce.mean(effect.ce)),
                    **stats.columns("delta_ce", effect and draws_ce.mean(effect.ce - clean.ce)),
                }
            )
    return rows
