"""Stitching: model B goes on from an activation that was predicted from model A."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from crossdict_jax import maps, modules, stats
from crossdict_jax.activations.passages import train_mean, whole_spans
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.config import Config
from crossdict_jax.maps import Pairs, Side, Task
from crossdict_jax.maps.base import map_class
from crossdict_jax.models import Site
from crossdict_jax.models.run import Effect, Passages
from crossdict_jax.stats import Resamples
from crossdict_jax.training.stage import Stage, progress_bar
from crossdict_jax.workdir import Workdir

CONTROLS = ("clean", "zero", "mean", "own_sae")
Bundle = tuple[Task, ...]  # of one kind of map and one direction, a task for every site of B


def intervene(config: Config, work: Workdir) -> None:
    """Writes causal.jsonl: what becomes of B's next-token loss when a map's prediction is put in.

    At the paired positions of some test documents B's activation is replaced by the map's x_B, by
    B's dictionary's decoding of the map's features, or by what a control says. A shuffled map reads
    shuffled rows here too. Behind these rows stand those of all layer pairs of a direction
    together. What a dictionary writes into another model is left out, and a line says so.

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
            target = Target.read(FinishedRun(config, work, store), name)  # one model at a time
            for sites, bundles in groups.items():
                rows = single if len(sites) == 1 else together
                rows += _rows_at(target, sites, bundles, progress)
    rows = single + together
    stage.finish({"causal.jsonl": rows}, rows=sum(row["n_positions"] for row in rows))


# ---------------------------------------------------------------- what is put in where


def bundles_by_sites(
    tasks: list[Task], store: Store
) -> dict[str, dict[tuple[Site, ...], list[Bundle]]]:
    """Returns {B: {its sites that are replaced in one pass: by what}}.

    First every site alone; then, for every kind of map, all layer pairs of a direction that has
    several. Of layer pairs that lead into one site of B, the first counts. In a residual stream
    little flows from one replacement to the next: a higher site's replacement overwrites what a
    lower one made of the same position. What the lower ones do reaches the output through
    attention from positions that are not paired; replaced ``attn_out`` and ``mlp_out`` add up.

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


# ---------------------------------------------------------------- one model that is stitched into


@dataclass(frozen=True)
class Target:
    """A model that is stitched into, the test text that it reads, and resamples of documents."""

    run: FinishedRun
    name: str
    passages: Passages
    draws: Resamples

    @classmethod
    def read(cls, run: FinishedRun, name: str) -> Target:
        passages, config = run.passages(name), run.config
        if config.intervention.span == "whole":
            passages = whole_spans(run.store, name, passages)
        documents, count = passages.document[passages.scored], config.evaluation.bootstrap
        return cls(run, name, passages, stats.draw(documents, count=count, seed=config.seed))

    def edited(self, site: Site) -> Site:
        """Where the dictionary of a site writes: another one for a transcoder."""
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
        pairs = {task.site_target: _pairs(target, task, sides) for task in group[0]}
        # What lies in memory together: at one site all predictions, at several those of one kind.
        kinds = [b[0].kind if len(sites) > 1 else "" for b in group]
        for kind in dict.fromkeys(kinds):
            predicted = _predicted(target, [b for b, k in zip(group, kinds) if k == kind], pairs)
            effects |= runner.splice(target.passages, edited, predicted)
        rows += [
            _row(target, effects[bundle, kind], references, sites, bundle=bundle, stitch_kind=kind)
            for bundle in group
            for kind in _stitch_kinds(bundle[0], run.store)
        ]
        progress.update(len(group))
    return rows


def _pairs(target: Target, task: Task, sides: dict[Site, Side]) -> dict[str, Pairs]:
    """{pairing: rows}; shuffled, A's are in a random order across documents, B's stay."""
    passages = target.passages
    source = target.run.side(task.source, task.site_source, passages.rows)
    pairs = Pairs(source, sides[task.site_target], passages.document)
    generator = np.random.Generator(np.random.Philox(key=target.run.config.seed))
    shuffled = source.take(generator.permutation(len(pairs)))
    return {"aligned": pairs, "shuffled": replace(pairs, source=shuffled)}


def _predicted(
    target: Target, bundles: list[Bundle], pairs: dict[Site, dict[str, Pairs]]
) -> dict[tuple, dict[Site, np.ndarray]]:
    """{(bundle, stitch_kind): {site: what is put in, float32 [n, d_model]}}."""
    run, size = target.run, target.run.config.evaluation.batch_size
    out: dict[tuple, dict[Site, np.ndarray]] = {}
    for bundle in bundles:
        for task in bundle:
            m, rows = maps.load(task.path(run.work)), pairs[task.site_target][task.pairing]
            for kind in _stitch_kinds(task, run.store):
                if kind == "activation":
                    x = maps.predict_activations(m, rows, size)
                else:
                    f = maps.predict(m, rows, size)
                    x = modules.over_rows(rows.target.dictionary, f, method="decode", size=size)
                out.setdefault((bundle, kind), {})[target.edited(task.site_target)] = x
    return out


def _row(
    target: Target,
    effect: Effect,
    references: dict[str, Effect],
    sites: tuple[Site, ...],
    *,
    control: str | None = None,
    bundle: Bundle | None = None,
    stitch_kind: str | None = None,
) -> dict[str, Any]:
    """A row of causal.jsonl: of a control, or of a map's predictions."""
    task = bundle and bundle[0]
    recovered = stats.loss_recovered(
        effect.ce,
        clean=references["clean"].ce,
        baseline=references["zero"].ce,
        resamples=target.draws,
    )
    intervention = "control" if control else "stitching"
    return {
        "intervention": intervention if len(sites) == 1 else f"{intervention}_together",
        "control": control,
        "source": task and task.source,
        "target": target.name,
        "site_source": bundle and "+".join(str(t.site_source) for t in bundle),
        "site_target": "+".join(map(str, sites)),
        "site_edited": "+".join(str(target.edited(site)) for site in sites),
        **({} if len(sites) == 1 else {"sites": list(map(str, sites))}),
        "map": task and task.kind,
        "pairing": task and task.pairing,
        "stitch_kind": stitch_kind,
        "n_positions": len(effect.ce),
        "n_documents": target.draws.n_documents,
        **stats.columns("ce", target.draws.mean(effect.ce)),
        **stats.columns("kl", target.draws.mean(effect.kl)),
        **stats.columns("loss_recovered", recovered),
    }
