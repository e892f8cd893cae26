"""Stitching: model B goes on from an activation that was predicted from model A."""

from dataclasses import replace

import numpy as np

from crossdict_jax import maps, modules, stats
from crossdict_jax.activations.passages import train_mean, whole_spans
from crossdict_jax.activations.store import Store
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.config import Config
from crossdict_jax.maps import Pairs, Task
from crossdict_jax.maps.base import map_class
from crossdict_jax.models import Site
from crossdict_jax.models.run import Effect
from crossdict_jax.training.stage import Stage, progress_bar
from crossdict_jax.workdir import Workdir, say

CONTROLS = ("clean", "zero", "mean", "own_sae")
Bundle = tuple[Task, ...]  # one kind of map and direction, a task for every site of B


def intervene(config: Config, work: Workdir) -> None:
    """Writes causal.jsonl: B's next-token loss when a map's prediction is put in.

    At the paired positions of test documents B's activation is replaced by the map's x_B, by the
    decoding of its features, or by a control. Shuffled maps read shuffled rows here too. Rows of
    all layer pairs together are last.

    Raises:
      UserError: a model, the store, a dictionary or a map is missing or damaged.
    """
    run = FinishedRun(config, work)
    tasks = maps.tasks(config, run.store)
    inputs = run.inputs(tasks, features=False)
    stage = Stage(work, "intervene", files=("causal.jsonl",), inputs=inputs)
    if stage.finished:
        return
    todo = bundles_by_sites(tasks, run.store)
    count = sum(len(bundles) for groups in todo.values() for bundles in groups.values())
    single, together = [], []
    with progress_bar(desc="stitching", unit="map", total=count) as progress:
        for name, groups in todo.items():
            target = Target(FinishedRun(config, work, run.store), name)  # one model at a time
            for sites, bundles in groups.items():
                rows = single if len(sites) == 1 else together
                rows += _rows_at(target, sites, bundles, progress)
    rows = single + together
    stage.finish({"causal.jsonl": rows}, rows=sum(row["n_positions"] for row in rows))


def bundles_by_sites(
    tasks: list[Task], store: Store
) -> dict[str, dict[tuple[Site, ...], list[Bundle]]]:
    """Returns {B: {its sites that are replaced in one pass: bundles}}.

    First every site alone; then, by kind of map, all layer pairs of a direction with several (of
    those into one site of B the first). In a residual stream a higher replacement overwrites what
    a lower one made of the same position: that one acts through attention alone.

    Maps to a dictionary that writes another model are left out, and a line says so.
    """
    outputs = {(t.target, t.site_target): store.output_of(t.target, t.site_target) for t in tasks}
    for (model, site), (other, written) in outputs.items():
        dictionary = f"stitching: the dictionary of {model} at {site} writes"
        if other != model:
            say(f"{dictionary} {other}, another model: left out")
        elif written != site:
            say(f"{dictionary} {written}: there only features are put in, decoded")
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


def _forms(task: Task, store: Store) -> tuple[str, ...]:
    end = (task.target, task.site_target)
    both = map_class(task.kind).predicts_activation and store.output_of(*end) == end
    return ("activation", "features") if both else ("features",)


class Target:
    """A target model, its test text, and resamples of documents.

    Attributes:
      edited: where the dictionary of each site writes; another site for a transcoder.
    """

    def __init__(self, run: FinishedRun, name: str):
        self.run, self.name, self.passages = run, name, run.passages(name)
        if run.config.intervention.span == "whole":
            self.passages = whole_spans(run.store, name, self.passages)
        documents = self.passages.document[self.passages.scored]
        count, seed = run.config.evaluation.bootstrap, run.config.seed
        self.draws = stats.draw(documents, count=count, seed=seed)
        sites = run.store.sites_of(name)
        self.edited = {site: run.store.output_of(name, site)[1] for site in sites}


def _rows_at(target: Target, sites: tuple[Site, ...], bundles: list[Bundle], progress):
    """The rows of the controls and of every map at one site, or at several at once."""
    run, passages = target.run, target.passages
    runner, size = run.runner(target.name), run.config.evaluation.batch_size
    sides = {site: run.side(target.name, site, passages.rows) for site in sites}
    edited = tuple(target.edited[site] for site in sites)
    controls: dict[str, dict[Site, np.ndarray]] = {name: {} for name in CONTROLS[1:]}
    for site, at in zip(sites, edited):
        mean = train_mean(run.store, target.name, at)
        x_hat = modules.over_rows(
            sides[site].dictionary, sides[site].x, method="__call__", size=size
        )
        for of_control, values in zip(controls.values(), (np.zeros_like(mean), mean, x_hat)):
            of_control[at] = values
    references = runner.splice(passages, edited, controls)
    rows = [_row(target, sites, references[c], references, control=c) for c in CONTROLS]

    by_source: dict[tuple, list[Bundle]] = {}
    for bundle in bundles:
        sources = tuple((task.source, task.site_source) for task in bundle)
        by_source.setdefault(sources, []).append(bundle)
    for group in by_source.values():
        pairs: dict[tuple, Pairs] = {}
        for task in group[0]:  # shuffled: in a random order across documents
            source = run.side(task.source, task.site_source, passages.rows)
            aligned = Pairs(source, sides[task.site_target], passages.document)
            order = stats.generator(run.config.seed).permutation(len(aligned))
            pairs[task.site_target, "aligned"] = aligned
            pairs[task.site_target, "shuffled"] = replace(aligned, source=source.take(order))
        effects: dict[tuple, Effect] = {}
        # In memory together: at one site all predictions, at several those of one kind.
        kinds = [b[0].kind if len(sites) > 1 else "" for b in group]
        for kind in dict.fromkeys(kinds):
            predicted: dict[tuple, dict[Site, np.ndarray]] = {}
            for bundle, task in ((b, t) for b, k in zip(group, kinds) if k == kind for t in b):
                rows_of = pairs[task.site_target, task.pairing]
                ends = rows_of.target.dictionary, rows_of.source.dictionary
                m = maps.load(task.path(run.work), *ends)
                for form in _forms(task, run.store):
                    if form == "activation":
                        x = maps.predict_activations(m, rows_of, size)
                    else:
                        f, d = maps.predict(m, rows_of, size), rows_of.target.dictionary
                        x = modules.over_rows(d, f, method="decode", size=size)
                    at = target.edited[task.site_target]
                    predicted.setdefault((bundle, form), {})[at] = x
            effects |= runner.splice(passages, edited, predicted)
        rows += [
            _row(target, sites, effects[bundle, form], references, bundle, stitch_kind=form)
            for bundle in group
            for form in _forms(bundle[0], run.store)
        ]
        progress.update(len(group))
    return rows


def _row(
    target: Target,
    sites: tuple[Site, ...],
    effect: Effect,
    references: dict[str, Effect],
    bundle: Bundle = (),
    **about: str,
) -> dict:
    task, draws = bundle[0] if bundle else None, target.draws
    losses = {"clean": references["clean"].ce, "baseline": references["zero"].ce}
    recovered = stats.loss_recovered(effect.ce, **losses, resamples=draws)
    intervention = "stitching" if bundle else "control"
    together = {"sites": list(map(str, sites))} if len(sites) > 1 else {}
    return {
        "intervention": f"{intervention}_together" if together else intervention,
        "control": None,
        "source": task and task.source,
        "target": target.name,
        "site_source": "+".join(str(t.site_source) for t in bundle) or None,
        "site_target": "+".join(map(str, sites)),
        "site_edited": "+".join(str(target.edited[site]) for site in sites),
        **together,
        "map": task and task.kind,
        "pairing": task and task.pairing,
        "stitch_kind": None,
        **about,
        "n_positions": len(effect.ce),
        "n_documents": draws.n_documents,
        **stats.columns("ce", draws.mean(effect.ce)),
        **stats.columns("kl", draws.mean(effect.kl)),
        **stats.columns("loss_recovered", recovered),
    }
