"""Stitching: model B goes on from an activation that was predicted from model A."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from crossdict_jax import maps, modules, stats
from crossdict_jax.activations.passages import train_mean, whole_spans
from crossdict_jax.activations.store import Store
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.config import Config
from crossdict_jax.maps import Pairs, Side, Task
from crossdict_jax.maps.base import map_class
from crossdict_jax.models import Site
from crossdict_jax.models.run import Effect
from crossdict_jax.training.stage import Stage, progress_bar
from crossdict_jax.workdir import Workdir, say

CONTROLS = ("clean", "zero", "mean", "own_sae")
PREDICTED = 2**31  # bytes of predictions in memory: each portion has passes without an edit, too
Bundle = tuple[Task, ...]  # one kind of map and direction, a task for every site of B
Groups = dict[tuple[Site, ...], list[Bundle]]  # by the sites that are replaced in one pass


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
            for sites, rows in _target_rows(target, groups, progress).items():
                (single if len(sites) == 1 else together).extend(rows)
    rows = single + together
    stage.finish({"causal.jsonl": rows}, rows=sum(row["n_positions"] for row in rows))


def bundles_by_sites(tasks: list[Task], store: Store) -> dict[str, Groups]:
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
    by_sites: dict[str, Groups] = {}
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
        self._sides: dict[tuple, dict[str, Side]] = {}

    def side(self, model: str, site: Site, pairing: str = "aligned") -> Side:
        """A model's side of the text; shuffled: in a random order across documents."""
        if (model, site) not in self._sides:
            side = self.run.side(model, site, self.passages.rows)
            order = stats.generator(self.run.config.seed).permutation(len(side.x))
            self._sides[model, site] = {"aligned": side, "shuffled": side.reordered(order)}
        return self._sides[model, site][pairing]

    def controls(self, sites: tuple[Site, ...]) -> dict[str, dict[Site, np.ndarray]]:
        """What the controls put in place of the activations, beside "clean": by edited site."""
        made: dict[str, dict[Site, np.ndarray]] = {name: {} for name in CONTROLS[1:]}
        for site in sites:
            mean = train_mean(self.run.store, self.name, at := self.edited[site])
            side, size = self.side(self.name, site), self.run.config.evaluation.batch_size
            x_hat = modules.over_rows(side.dictionary, side.x, method="__call__", size=size)
            for of_control, values in zip(made.values(), (np.zeros_like(mean), mean, x_hat)):
                of_control[at] = values
        return made

    def predicted(self, task: Task) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (form, what a map puts in place of the activations, float32 [n, d_model])."""
        source = self.side(task.source, task.site_source, task.pairing)
        target = self.side(task.target, task.site_target)
        size = self.run.config.evaluation.batch_size
        pairs = Pairs(source, target, self.passages.document)
        m = maps.load(task.path(self.run.work), target.dictionary, source.dictionary)
        for form in _forms(task, self.run.store):
            if form == "activation":
                yield form, maps.predict_activations(m, pairs, size)
            else:
                f = maps.predict(m, pairs, size)
                yield form, modules.over_rows(target.dictionary, f, method="decode", size=size)


def _target_rows(target: Target, groups: Groups, progress) -> dict[tuple[Site, ...], list[dict]]:
    """The rows of the controls and of every bundle, by sites."""
    effects: dict[tuple, Effect] = {}
    for tasks in _portions(target, groups):
        effects |= _effects(target, groups, tasks, progress, controls=not effects)
    rows = {}
    for sites, bundles in groups.items():
        references = {control: effects[sites, control] for control in CONTROLS}
        row = partial(_row, target, sites, references)
        rows[sites] = [row(references[control], control=control) for control in CONTROLS]
        rows[sites] += [
            row(effects[sites, (bundle, form)], bundle, stitch_kind=form)
            for bundle in bundles
            for form in _forms(bundle[0], target.run.store)
        ]
    return rows


def _effects(target: Target, groups: Groups, tasks: list[Task], progress, *, controls) -> dict:
    """{(sites, control or (bundle, form)): effect} of the bundles of some tasks."""
    effects, runner = {}, target.run.runner(target.name)
    predicted = {(task, form): x for task in tasks for form, x in target.predicted(task)}
    for sites, bundles in groups.items():
        edited = tuple(target.edited[site] for site in sites)
        values = target.controls(sites) if controls else {}
        ready = [bundle for bundle in bundles if bundle[0] in tasks]
        for bundle in ready:
            for form in _forms(bundle[0], target.run.store):
                values[bundle, form] = {at: predicted[t, form] for at, t in zip(edited, bundle)}
        made = runner.splice(target.passages, edited, values) if values else {}
        effects |= {(sites, name): effect for name, effect in made.items()}
        progress.update(len(ready))
    return effects


def _portions(target: Target, groups: Groups) -> Iterator[list[Task]]:
    """The tasks in portions whose predictions fit in PREDICTED; a bundle lies in one."""
    families: dict[tuple, dict[Task, None]] = {}
    for task in (t for bundles in groups.values() for bundle in bundles for t in bundle):
        families.setdefault((task.source, task.kind, task.pairing), {})[task] = None
    d_model = target.run.runner(target.name).config.d_model
    of_task = 2 * 4 * d_model * len(target.passages.position)  # bytes of two forms
    portion: list[Task] = []
    for family in families.values():
        if portion and (len(portion) + len(family)) * of_task > PREDICTED:
            yield portion
            portion = []
        portion = [*portion, *family]
    yield portion


def _row(
    target: Target,
    sites: tuple[Site, ...],
    references: dict[str, Effect],
    effect: Effect,
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
