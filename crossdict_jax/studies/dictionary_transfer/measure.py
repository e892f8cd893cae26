"""Dictionaries of one model used for another through an affine stitch, and as a training start."""

from dataclasses import replace
from functools import partial

import numpy as np

from crossdict_jax import maps, modules, results, stats
from crossdict_jax.activations.passages import train_mean
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.config import Config, identity, refuse_transcoders
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.dictionaries.base import architecture_of
from crossdict_jax.dictionaries.start import activation_scale
from crossdict_jax.dictionaries.train import members, train_from
from crossdict_jax.errors import UserError
from crossdict_jax.evaluation.reconstruction import measure
from crossdict_jax.maps import Problem, Task
from crossdict_jax.maps.fit import Loader
from crossdict_jax.report.tables import show
from crossdict_jax.results import pair_columns
from crossdict_jax.studies.dictionary_transfer import TABLE, TRAINING, savings_table, tables
from crossdict_jax.studies.dictionary_transfer import transferred as transfer
from crossdict_jax.studies.dictionary_transfer.transferred import Affine, Stitch, transferred
from crossdict_jax.training.stage import Stage, input_digests, progress_bar
from crossdict_jax.workdir import Workdir, read_jsonl, say

ERRORS = ("fvu", "mse")  # in the logged losses of every architecture


def run(config: Config, work: Workdir) -> None:
    """Writes dictionary_transfer.jsonl and dictionary_training.jsonl, and prints both.

    Raises:
      UserError: dictionaries are imported, or transcoders (a stitch of what they read says nothing
        of what they write); the store, a model or a dictionary is missing or damaged.
    """
    refuse_transcoders(config, "Starting from another model's dictionaries")
    store = open_store(work.activations)
    loader = Loader(config, store, work)
    tasks = dict.fromkeys(
        replace(task, kind="")
        for task in maps.tasks(config, store)
        if task.pairing == "aligned"
        and transfer.is_ours(loader.side(task.source, task.site_source, "train").dictionary)
    )
    if not tasks:
        raise UserError(
            "No dictionary of this run can be transferred: all are imported ones; leave "
            "sae.sources empty and train_saes again."
        )
    folders = [folder for task in tasks for folder in task.folders(work)[:2]]
    inputs = input_digests(work, settings=identity(config), store_meta=store.meta, folders=folders)
    makes = {TABLE.file: transfer_rows, TRAINING.file: compare_starts}
    stage = Stage(work, "transfer_dictionaries", files=makes, inputs=inputs)
    if not stage.finished:
        rows: dict[str, list[dict]] = {file: [] for file in makes}
        for target in dict.fromkeys(task.target for task in tasks):
            problems = {task: loader.problem(task) for task in tasks if task.target == target}
            for file, make in makes.items():
                made = partial(make, problems, config, store, work)
                rows[file] += stage.part((target, file), made)
        stage.finish(rows, directions=len(tasks))
    scored, trained = (results.read(work, file) for file in makes)
    show([*tables(scored), *([savings_table(trained)] if trained else [])])


def ways(problem: Problem, config: Config) -> dict[str, Dictionary | Stitch]:
    """Returns the ways to reconstruct B by their names in column ``dictionary``.

    orthogonal (McCann 2026, arXiv 2605.24577) needs more rows than dimensions, as_is activations of
    one size. The stitch is about the most that ridge can reach.
    """
    train = problem.train
    a, d_a, d_b = train.source.dictionary, train.source.x.shape[1], train.target.x.shape[1]
    stitches = {"transferred": transfer.fit_stitch(problem, config.map)}
    if len(train) > max(d_a, d_b):
        stitches["orthogonal"] = transfer.fit_stitch(problem, config.map, "procrustes")
    if d_a == d_b:
        same = Affine(np.eye(d_a), np.zeros(d_a))
        stitches["as_is"] = Stitch(same, same)
    stitches["rotated"] = transfer.random_stitch(train, config.seed)
    through = {name: transferred(a, stitch) for name, stitch in stitches.items()}
    return {"own": train.target.dictionary, **through, "stitch": stitches["transferred"]}


def transfer_rows(
    problems: dict[Task, Problem], config: Config, store: Store, work: Workdir
) -> list[dict]:
    """Returns the rows of dictionary_transfer.jsonl of the directions into one target.

    The stitch alone is not put into the target: its losses and l0 are null.
    """
    settings, target = config.evaluation, next(iter(problems)).target
    finished, test = FinishedRun(config, work, store), store.select("test")
    passages, size, rows = finished.passages(target), settings.batch_size, []
    draws, draws_ce = (
        stats.draw(documents, count=settings.bootstrap, seed=config.seed)
        for documents in (store.rows.document[test], passages.document[passages.scored])
    )
    for task, problem in progress_bar(problems.items(), desc=f"dictionaries used for {target}"):
        site, made = task.site_target, ways(problem, config)
        x, replaced = (
            store.read(target, site, numbers).astype(np.float32)
            for numbers in (test, passages.rows)
        )
        mean, stitch = train_mean(store, target, site), made.pop("stitch")
        x_hat = stitch.forth(stitch.back(x.astype(np.float64))).astype(np.float32)
        seen = {name: measure(d, x, mean=mean, size=size) for name, d in made.items()}
        alone = {"error": x - x_hat, "variance": x - mean}
        seen["stitch"] = {key: np.square(rest).sum(axis=1) for key, rest in alone.items()}
        put_in = {
            name: modules.over_rows(d, replaced, method="__call__", size=size)
            for name, d in made.items()
        }
        effects = finished.runner(target).splice(passages, site, put_in)
        for name, values in seen.items():
            effect = effects.get(name)
            more = effect and draws_ce.mean(effect.ce - effects["clean"].ce)
            row = {
                "dictionary": name,
                "n_rows": len(x),
                "n_documents": draws.n_documents,
                **stats.columns("fvu", draws.estimate(values["error"], values["variance"])),
                "l0": effect and float(values["l0"].mean()),
                "n_positions": effect and len(effect.ce),
                **stats.columns("ce", effect and draws_ce.mean(effect.ce)),
                **stats.columns("delta_ce", more),
            }
            rows.append(pair_columns(task) | row)
    return rows


def compare_starts(
    problems: dict[Task, Problem], config: Config, store: Store, work: Workdir
) -> list[dict]:
    """Returns the rows of dictionary_training.jsonl of the directions into one target.

    Its dictionary of seed 0 is trained from random parameters and from the source's, on the same
    batches, in one ensemble. Sources of another shape, as ``sae.sources`` may be, start nothing.
    """
    group, starts, tasks = [], [], []
    for task, problem in problems.items():
        member, *_ = members(config.sae, [(task.target, task.site_target)])
        a = problem.train.source.dictionary
        alike = architecture_of(a) == config.sae.architecture and a.width == member.width
        if not alike or ("k" in a.reads and a.k != member.k):
            say(f"{task.label}: no start of a training, since sae.* is of another kind or size")
            continue
        scale = activation_scale(problem.train.target.x)
        moved = transferred(a, transfer.fit_stitch(problem, config.map), scale)
        group += 2 * [member]
        starts += [None, transfer.with_unit_rows(moved)]
        tasks.append(task)
    if not tasks:
        return []
    directory = work.dictionaries / "transfer" / group[0].model
    trained = train_from(config, store, group, starts, directory=directory)
    log = read_jsonl(directory / "metrics.jsonl")
    error = next(name for name in ERRORS if name in log[0])
    steps, rows = [row["step"] + 1 for row in log], []
    for i, task in enumerate(tasks):
        random, moved = ([row[error][2 * i + j] for row in log] for j in (0, 1))
        end = task.target, task.site_target
        x = store.read(*end, store.select("test")).astype(np.float32)
        settings = {"mean": train_mean(store, *end), "size": config.evaluation.batch_size}
        sums = (measure(d, x, **settings) for d in trained[2 * i :][:2])
        fvus = (float(each["error"].sum() / each["variance"].sum()) for each in sums)
        curves = {"error": error, "steps": steps, "random": random, "transferred": moved}
        scores = dict(zip(("fvu_random", "fvu_transferred"), fvus))
        rows.append(pair_columns(task) | curves | scores | steps_saved(steps, random, moved))
    return rows


def steps_saved(steps: list[int], random: list[float], moved: list[float]) -> dict:
    """Returns when the moved start first equals the random start's final error, if ever."""
    first = next((step for step, error in zip(steps, moved) if error <= random[-1]), None)
    return {"steps_to_reach": first, "saved": first and 1 - first / steps[-1]}
