"""Stitching: model B goes on from an activation that was predicted from model A."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from crossdict_jax import dictionaries, maps, models, modules, stats
from crossdict_jax.activations.passages import select_passages, train_mean, whole_spans
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.config import Config, identity
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.maps import Pairs, Side, Task
from crossdict_jax.maps.base import map_class
from crossdict_jax.models import Site
from crossdict_jax.models.run import Effect, Passages, Runner
from crossdict_jax.stats import Resamples
from crossdict_jax.training.stage import Stage, input_digests, progress_bar
from crossdict_jax.workdir import Workdir

CONTROLS = ("clean", "zero", "mean", "own_sae")
Bundle = tuple[Task, ...]  # of one kind of map and one direction, a task for every site of B


def intervene(config: Config, work: Workdir) -> None:
    """Writes causal.jsonl: what becomes of B's next-token loss when a map's prediction is put in.

    At the paired positions of at most ``config.intervention.documents`` test documents B's
    activation is replaced by the map's x_B (stitch_kind "activation") or by B's dictionary's
    decoding of the map's features ("features"). A shuffled map was fitted on shuffled pairs and
    reads shuffled rows here too. Controls edit the same positions: clean (no edit), zero, mean (of
    the training rows), own_sae (B's own reconstruction, the best that features can do).

    With ``intervention.span`` "whole" all tokens of a span take what is put at its end, in controls
    too: B's own tokens inside spans then say nothing.

    Behind these rows stand those of all layer pairs of a direction together, where it has two or
    more (intervention "stitching_together" and "control_together"; ``sites`` are B's; of pairs
    that lead into one site of B, the first): B's activations at all the sites are replaced in one
    pass, each by what the same kind of map predicts from A's site of that pair. In a residual
    stream little flows from one replacement to the next: at the paired positions a higher site's
    replacement overwrites whatever a lower one made of it. What the lower ones do reaches the
    output through attention alone: positions that are not paired read replaced keys and values in
    the blocks between. Were every position paired, all sites together would be the highest one
    alone. What is put in at ``attn_out`` and ``mlp_out`` sites, in contrast, adds up.

    A transcoder's decoding is put in, and controls are, at the site that it writes (site_edited);
    what maps say of the site that it reads is left out, and so is all of a transcoder that writes
    another model. Lines say so.

    ce and kl are means in nats over the n_positions whose next token is in the window;
    loss_recovered = (ce_zero - ce) / (ce_zero - ce_clean), null where zeros cost less than 0.05.

    A finished causal.jsonl whose inputs have not changed is left as it is.

    Raises:
      UserError: a model, the store, a dictionary or a map is missing or damaged.
    """
    store = open_store(work.activations)
    tasks = maps.tasks(config, store)
    folders = [folder for task in tasks for folder in task.folders(work)]
    inputs = input_digests(work, settings=identity(config), store_meta=store.meta, folders=folders)
    stage = Stage(work, "intervene", files=("causal.jsonl",), inputs=inputs)
    if stage.finished:
        return
    todo = bundles_by_sites(_stitchable(tasks, store), store)
    single, together = [], []
    with progress_bar(desc="stitching", unit="window") as progress:
        for name, groups in todo.items():
            target = _Target.read(config, work, store, name)
            windows = len(target.passages.tokens)  # equal for all models
            progress.total = windows * sum(_runs(groups, store) for groups in todo.values())
            for sites, bundles in groups.items():
                rows = single if len(sites) == 1 else together
                rows += _rows_at(target, sites, bundles, progress)
    rows = single + together
    stage.finish({"causal.jsonl": rows}, rows=sum(row["n_positions"] for row in rows))


# ---------------------------------------------------------------- what is put in where


def _stitchable(tasks: list[Task], store: Store) -> list[Task]:
    """The tasks without those whose features are decoded into another model, with lines on it."""
    outputs = {(t.target, t.site_target): store.output_of(t.target, t.site_target) for t in tasks}
    for (model, site), (other, written) in outputs.items():
        dictionary = f"stitching: the dictionary of {model} at {site} writes"
        if other != model:
            print(f"{dictionary} {other}, another model: left out")
        elif written != site:
            print(f"{dictionary} {written}: there only features are put in, decoded")
    return [t for t in tasks if outputs[t.target, t.site_target][0] == t.target]


def bundles_by_sites(
    tasks: list[Task], store: Store
) -> dict[str, dict[tuple[Site, ...], list[Bundle]]]:
    """Returns {B: {its sites that are replaced in one pass: by what}}.

    First every site alone; then, for every kind of map, all layer pairs of a direction that has
    several. Of layer pairs that lead into one site of B, the first counts.
    """
    together: dict[tuple, dict[Site, Task]] = {}
    for task in tasks:
        key = (task.source, task.target, task.kind, task.pairing)
        _, edited = store.output_of(task.target, task.site_target)
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


def _runs(groups: dict[tuple[Site, ...], list[Bundle]], store: Store) -> int:
    """How often all windows are read with an edit."""
    kinds = (len(_stitch_kinds(b[0], store)) for bundles in groups.values() for b in bundles)
    return sum(kinds) + (len(CONTROLS) - 1) * len(groups)


# ---------------------------------------------------------------- one model that is stitched into


@dataclasses.dataclass(frozen=True)
class _Target:
    """A model that is stitched into: its language model on test passages, and the resamples."""

    config: Config
    work: Workdir
    store: Store
    name: str
    runner: Runner
    passages: Passages
    draws: Resamples

    @classmethod
    def read(cls, config: Config, work: Workdir, store: Store, name: str):
        """Loads the model and the text that it reads."""
        passages = passages_of_test(config, store, name)
        runner = Runner(
            models.load(store.paths[store.models.index(name)]),
            batch_size=config.intervention.batch_size,
            dtype=config.extract.matmul_dtype,
        )
        documents, count = passages.document[passages.scored], config.evaluation.bootstrap
        draws = stats.draw(documents, count=count, seed=config.seed)
        return cls(config, work, store, name, runner, passages, draws)

    def edited(self, site: Site) -> Site:
        """Where the dictionary of a site writes: another one for a transcoder."""
        return self.store.output_of(self.name, site)[1]

    def side(self, model: str, site: Site, dictionary: Dictionary) -> Side:
        """The rows of a model at the paired positions."""
        rows = self.passages.rows
        return Side(self.store.read(model, site, rows), self.store.tokens(model, rows), dictionary)


def passages_of_test(config: Config, store: Store, model: str) -> Passages:
    """Returns the test text that a model reads, its spans as ``intervention.span`` says."""
    passages = select_passages(
        store, model, documents=config.intervention.documents, seed=config.seed
    )
    whole = config.intervention.span == "whole"
    return whole_spans(store, model, passages) if whole else passages


def _rows_at(
    target: _Target, sites: tuple[Site, ...], bundles: list[Bundle], progress
) -> list[dict]:
    """The rows of the controls and of every map at one site, or at several at once."""
    loaded = {s: dictionaries.load(target.work.dictionary(target.name, s)) for s in sites}
    sides = {site: target.side(target.name, site, loaded[site]) for site in sites}
    edited = tuple(map(target.edited, sites))
    size = target.config.evaluation.batch_size
    controls: dict[str, dict[Site, np.ndarray]] = {name: {} for name in CONTROLS[1:]}
    for site, side in sides.items():
        at, mean = target.edited(site), train_mean(target.store, target.name, target.edited(site))
        controls["zero"][at], controls["mean"][at] = np.zeros_like(mean), mean
        controls["own_sae"][at] = modules.over_rows(
            side.dictionary, side.x, method="__call__", size=size
        )
    references = target.runner.splice(target.passages, edited, controls, progress)
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
            effects |= target.runner.splice(target.passages, edited, predicted, progress)
        rows += [
            _row(target, effects[bundle, kind], references, sites, bundle=bundle, stitch_kind=kind)
            for bundle in group
            for kind in _stitch_kinds(bundle[0], target.store)
        ]
    return rows


def _pairs(target: _Target, task: Task, sides: dict[Site, Side]) -> dict[str, Pairs]:
    """{pairing: rows}; shuffled, A's are in a random order across documents, B's stay."""
    dictionary = dictionaries.load(target.work.dictionary(task.source, task.site_source))
    pairs = Pairs(
        source=target.side(task.source, task.site_source, dictionary),
        target=sides[task.site_target],
        documents=target.passages.document,
    )
    generator = np.random.Generator(np.random.Philox(key=target.config.seed))
    shuffled = pairs.source.take(generator.permutation(len(pairs)))
    return {"aligned": pairs, "shuffled": dataclasses.replace(pairs, source=shuffled)}


def _predicted(
    target: _Target, bundles: list[Bundle], pairs: dict[Site, dict[str, Pairs]]
) -> dict[tuple, dict[Site, np.ndarray]]:
    """{(bundle, stitch_kind): {site: what is put in, float32 [n, d_model]}}."""
    size = target.config.evaluation.batch_size
    out: dict[tuple, dict[Site, np.ndarray]] = {}
    for bundle in bundles:
        for task in bundle:
            m, rows = maps.load(task.path(target.work)), pairs[task.site_target][task.pairing]
            for kind in _stitch_kinds(task, target.store):
                if kind == "activation":
                    x = maps.predict_activations(m, rows, size)
                else:
                    f = maps.predict(m, rows, size)
                    x = modules.over_rows(rows.target.dictionary, f, method="decode", size=size)
                out.setdefault((bundle, kind), {})[target.edited(task.site_target)] = x
    return out


def _row(
    target: _Target,
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
