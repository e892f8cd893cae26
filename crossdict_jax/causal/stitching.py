"""Stitching: model B goes on from an activation that was predicted from model A."""

from dataclasses import replace
from typing import Any

import numpy as np

from crossdict_jax import maps, modules, stats
from crossdict_jax.activations.passages import train_mean, whole_spans
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.config import Config
from crossdict_jax.maps import Pairs, Task
from crossdict_jax.maps.base import map_class
from crossdict_jax.models import Site
from crossdict_jax.models.run import Effect
from crossdict_jax.training.stage import Stage, progress_bar
from crossdict_jax.workdir import Workdir

CONTROLS = ("clean", "zero", "mean", "own_sae")
Bundle = tuple[Task, ...]  # of one kind of map and one direction, a task for every site of B


def intervene(config: Config, work: Workdir) -> None:
    """Writes causal.jsonl: what becomes of B's next-token loss when a map's prediction is put in.

    At the paired positions of some test documents B's activation is replaced by the map's x_B, by
    the decoding of the map's features, or by a control. Shuffled maps read shuffled rows here too.
    Behind these rows stand those of all layer pairs together.

    Raises:
      UserError: a model, the store, a dictionary or a map is missing or damaged.
    """
    store = open_store(work.activations)
    tasks = maps.tasks(config, store)
    inputs = FinishedRun(config, work, store).inputs(tasks)
    stage = Stage(work, "intervene", files=("causal.jsonl",), inputs=inputs)
    if stage.finished:
        return
    todo = bundles_by_sites(tasks, store)
    count = sum(len(bundles) for groups in todo.values() for bundles in groups.values())
    single, together = [], []
    with progress_bar(desc="stitching", unit="map", total=count) as progress:
        for name, groups in todo.items():
            target = Target(FinishedRun(config, work, store), name)  # one model at a time
            for sites, bundles in groups.items():
                rows = single if len(sites) == 1 else together
                rows += _rows_at(target, sites, bundles, progress)
    rows = single + together
    stage.finish({"causal.jsonl": rows}, rows=sum(row["n_positions"] for row in rows))


def bundles_by_sites(
    tasks: list[Task], store: Store
) -> dict[str, dict[tuple[Site, ...], list[Bundle]]]:
    """Returns {B: {its sites that are replaced in one pass: by what}}.

    First every site alone; then, for every kind of map, all layer pairs of a direction that has
    several, the first of those that lead into one site of B. In a residual stream a higher
    replacement overwrites what a lower one made of the same position; that one acts through
    attention alone.

    Maps to a dictionary that writes another model are left out, and a line says so.
    """
    outputs = {(t.target, t.site_target): store.output_of(t.target, t.site_target) for t in tasks}
    for (model, site), (other, written) in outputs.items():
        dictionary = f"stitching: the dictionary of {model} at {site} writes"
        if other != model:
            print(f"{dictionary} {other}, another model: left out")
        elif written != site:
            print(f"{dictionary} {written}: there only features are put in, decoded")
    tasks = [task for task in tasks if outputs[task.target, task.site_target][0] == task.target]
    together: dict[tuple, dict[Site, Task]] = {}
    for task in tasks:
        key = (task.source, task.target, task.kind, task.pairing)
        _, edited = outputs[task.target, task.site_target]
        together.setdefault(key, {}).setdefault(edited, task)
    bundles = [(task,) for task in tasks]
    bundles += [tuple(at[site] for site in sorted(at)) for at in together.values() if len(at) > 1]
    by_sites: dict[str, dict[tuple[Site, ...], list[Bundle]]] = {}
    for bundle in bundles:
        sites = tuple(task.site_target for task in bundle)
        by_sites.setdefault(bundle[0].target, {}).setdefault(sites, []).append(bundle)
    return by_sites


def _stitch_kinds(task: Task, store: Store) -> tuple[str, ...]:
    site = (task.target, task.site_target)
    both = map_class(task.kind).predicts_activation and store.output_of(*site) == site
    return ("activation", "features") if both else ("features",)


class Target:
    """A model that is stitched into, the test text that it reads, and resamples of documents."""

    def __init__(self, run: FinishedRun, name: str):
        self.run, self.name, self.passages = run, name, run.passages(name)
        if run.config.intervention.span == "whole":
            self.passages = whole_spans(run.store, name, self.passages)
        documents = self.passages.document[self.passages.scored]
        count, seed = run.config.evaluation.bootstrap, run.config.seed
        self.draws = stats.draw(documents, count=count, seed=seed)

    def edited(self, site: Site) -> Site:
        """Returns where the dictionary of a site writes: another one for a transcoder."""
        return self.run.store.output_of(self.name, site)[1]


def _rows_at(target: Target, sites: tuple[Site, ...], bundles: list[Bundle], progress):
    """The rows of the controls and of every map at one site, or at several at once."""
    run, rows = target.run, target.passages.rows
    runner, size = run.runner(target.name), run.config.evaluation.batch_size
    sides = {site: run.side(target.name, site, rows) for site in sites}
    edited = tuple(map(target.edited, sites))
    controls: dict[str, dict[Site, np.ndarray]] = {name: {} for name in CONTROLS[1:]}
    for site, at in zip(sites, edited):
        d, mean = sides[site].dictionary, train_mean(run.store, target.name, at)
        x_hat = modules.over_rows(d, sides[site].x, method="__call__", size=size)
        for name, values in zip(CONTROLS[1:], (np.zeros_like(mean), mean, x_hat)):
            controls[name][at] = values
    references = runner.splice(target.passages, edited, controls)
    rows = [_row(target, references[c], references, sites, control=c) for c in CONTROLS]

    by_source: dict[tuple, list[Bundle]] = {}
    for bundle in bundles:
        sources = tuple((task.source, task.site_source) for task in bundle)
        by_source.setdefault(sources, []).append(bundle)
    for group in by_source.values():
        effects: dict[tuple, Effect] = {}
        pairs: dict[Site, dict[str, Pairs]] = {}
        for task in group[0]:  # shuffled, A's rows are in a random order across documents
            source = run.side(task.source, task.site_source, target.passages.rows)
            aligned = Pairs(source, sides[task.site_target], target.passages.document)
            generator = stats.generator(run.config.seed)
            shuffled = replace(aligned, source=source.take(generator.permutation(len(aligned))))
            pairs[task.site_target] = {"aligned": aligned, "shuffled": shuffled}
        # What lies in memory together: at one site all predictions, at several those of one kind.
        kinds = [b[0].kind if len(sites) > 1 else "" for b in group]
        for kind in dict.fromkeys(kinds):
            predicted: dict[tuple, dict[Site, np.ndarray]] = {}
            for bundle in (b for b, k in zip(group, kinds) if k == kind):
                for task in bundle:
                    m, rows_of = maps.load(task.path(run.work)), pairs[task.site_target]
                    at = target.edited(task.site_target)
                    for form in _stitch_kinds(task, run.store):
                        x = _put_in(m, rows_of[task.pairing], form, size)
                        predicted.setdefault((bundle, form), {})[at] = x
            effects |= runner.splice(target.passages, edited, predicted)
        rows += [
            _row(target, effects[bundle, kind], references, sites, bundle=bundle, stitch_kind=kind)
            for bundle in group
            for kind in _stitch_kinds(bundle[0], run.store)
        ]
        progress.update(len(group))
    return rows


def _put_in(m: maps.Map, rows: Pairs, form: str, size: int) -> np.ndarray:
    """What takes the place of B's activations, float32 [n, d_model]."""
    if form == "activation":
        return maps.predict_activations(m, rows, size)
    f = maps.predict(m, rows, size)
    return modules.over_rows(rows.target.dictionary, f, method="decode", size=size)


def _row(
    target: Target,
    effect: Effect,
    references: dict[str, Effect],
    sites: tuple[Site, ...],
    *,
    control: str | None = None,
    bundle: Bundle = (),
    stitch_kind: str | None = None,
) -> dict[str, Any]:
    """A row of causal.jsonl: of a control, or of a map's predictions."""
    task, draws = bundle[0] if bundle else None, target.draws
    losses = {"clean": references["clean"].ce, "baseline": references["zero"].ce}
    recovered = stats.loss_recovered(effect.ce, **losses, resamples=draws)
    intervention = "control" if control else "stitching"
    return {
        "intervention": intervention if len(sites) == 1 else f"{intervention}_together",
        "control": control,
        "source": task and task.source,
        "target": target.name,
        "site_source": "+".join(str(t.site_source) for t in bundle) or None,
        "site_target": "+".join(map(str, sites)),
        "site_edited": "+".join(str(target.edited(site)) for site in sites),
        **({} if len(sites) == 1 else {"sites": list(map(str, sites))}),
        "map": task and task.kind,
        "pairing": task and task.pairing,
        "stitch_kind": stitch_kind,
        "n_positions": len(effect.ce),
        "n_documents": draws.n_documents,
        **stats.columns("ce", draws.mean(effect.ce)),
        **stats.columns("kl", draws.mean(effect.kl)),
        **stats.columns("loss_recovered", recovered),
    }
