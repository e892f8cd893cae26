"""Stitching: model B goes on from an activation that was predicted from model A."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import numpy as np

from crossdict_jax import dictionaries, maps, models, modules, stats
from crossdict_jax.activations.splice import (
    Effect,
    Splicer,
    loss_recovered,
    select_passages,
    train_mean,
    whole_spans,
)
from crossdict_jax.activations.store import Store, open_store
from crossdict_jax.causal.inputs import digests
from crossdict_jax.config import Config
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.maps import Pairs, Side, Task
from crossdict_jax.maps.base import map_class
from crossdict_jax.models import Site
from crossdict_jax.stats import Resamples
from crossdict_jax.training.stage import device_figures
from crossdict_jax.workdir import Workdir, read_json, write_json, write_jsonl

CONTROLS = ("clean", "zero", "mean", "own_sae")
Bundle = tuple[Task, ...]  # of one rung and one direction, a task for every site of B


def intervene(config: Config, work: Workdir) -> None:
    """Writes causal.jsonl: what becomes of B's next-token loss when a rung's prediction is put in.

    At the paired positions of at most ``config.intervention.documents`` test documents B's
    activation is replaced by the rung's x_B (stitch_kind "activation") or by B's dictionary's
    decoding of the rung's features ("features"). A shuffled rung was fitted on shuffled pairs and
    reads shuffled rows here too. Controls edit the same positions: clean (no edit), zero, mean (of
    the training rows), own_sae (B's own reconstruction, the best that features can do).

    With ``intervention.span`` "whole" all tokens of a span take what is put at its end, in controls
    too: B's own tokens inside spans then say nothing.

    Behind these rows stand those of all layer pairs of a direction together, where it has two or
    more (intervention "stitching_together" and "control_together"; ``sites`` are B's; of pairs
    that lead into one site of B, the first): B's activations at all the sites are replaced in one
    pass, each by what the same rung predicts from A's site of that pair. In a residual stream
    little flows from one replacement to the next: at the paired positions a higher site's
    replacement overwrites whatever a lower one made of it. What the lower ones do reaches the
    output through attention alone: positions that are not paired read replaced keys and values in
    the blocks between. Were every position paired, all sites together would be the highest one
    alone. What is put in at ``attn_out`` and ``mlp_out`` sites, in contrast, adds up.

    A transcoder's decoding is put in, and controls are, at the site that it writes (site_edited);
    what rungs say of the site that it reads is left out, and so is all of a transcoder that writes
    another model. Lines say so.

    ce and kl are means in nats over the n_positions whose next token is in the window;
    loss_recovered = (ce_zero - ce) / (ce_zero - ce_clean), null where zeros cost less than 0.05.

    A finished causal.jsonl whose inputs have not changed is left as it is.

    Raises:
      UserError: a model, the store, a dictionary or a map is missing or damaged.
    """
    started = time.perf_counter()
    store = open_store(work.activations)
    tasks = maps.tasks(config, store)
    inputs = digests(config, work, store, tasks)
    stamp = work.result("causal.inputs.json")
    if work.result("causal.jsonl").exists() and stamp.exists() and read_json(stamp) == inputs:
        return
    rows, positions = _stitch(config, work, store, tasks)
    write_jsonl(work.result("causal.jsonl"), rows)
    write_json(stamp, inputs)
    wall = time.perf_counter() - started
    work.record_timing(
        "intervene",
        wall_s=wall,
        rows=positions,
        rows_per_s=positions / wall,
        **device_figures(),
    )


def _stitch(
    config: Config, work: Workdir, store: Store, tasks: list[Task]
) -> tuple[list[dict], int]:
    """Returns the rows, and how many edited positions were scored in all."""
    from tqdm import tqdm

    rows: list[dict] = []
    together: list[dict] = []
    tasks = _stitchable(tasks, store)
    with tqdm(desc="stitching", unit="window") as progress:
        for model in dict.fromkeys(task.target for task in tasks):
            into = [task for task in tasks if task.target == model]
            target = _Target.read(config, work, store, model, into)
            windows = len(target.splicer.passages.tokens)  # equal for all models
            progress.total = _runs(tasks, store) * windows
            for site in dict.fromkeys(task.site_target for task in into):
                here = [(task,) for task in into if task.site_target == site]
                rows += target.rows_at((site,), here, progress)
            bundles = _bundles(into, store)
            for sites in dict.fromkeys(map(_sites, bundles)):
                here = [bundle for bundle in bundles if _sites(bundle) == sites]
                together += target.rows_at(sites, here, progress)
    rows += together
    return rows, sum(row["n_positions"] for row in rows)


def _stitchable(tasks: list[Task], store: Store) -> list[Task]:
    """The tasks without those whose features are decoded into another model, with lines on it."""
    outputs = {(t.target, t.site_target): store.output_of(t.target, t.site_target) for t in tasks}
    for (model, site), (other, written) in outputs.items():
        place = f"stitching: the dictionary of {model} at {site} writes"
        if other != model:
            print(f"{place} {other}, another model: left out")
        elif written != site:
            print(f"{place} {written}: there only features are put in, decoded")
    return [t for t in tasks if outputs[t.target, t.site_target][0] == t.target]


def _bundles(tasks: list[Task], store: Store) -> list[Bundle]:
    """The tasks of every rung over all layer pairs of its direction, where there are several.

    Of layer pairs that lead into one site of B, the first counts.
    """
    found: dict[tuple, dict[Site, Task]] = {}
    for task in tasks:
        rung = (task.source, task.target, task.kind, task.pairing)
        _, edited = store.output_of(task.target, task.site_target)
        found.setdefault(rung, {}).setdefault(edited, task)
    return [tuple(at[site] for site in sorted(at)) for at in found.values() if len(at) > 1]


def _sites(bundle: Bundle) -> tuple[Site, ...]:
    return tuple(task.site_target for task in bundle)


def _runs(tasks: list[Task], store: Store) -> int:
    """How often all windows are read with an edit."""
    bundles = [*((task,) for task in tasks), *_bundles(tasks, store)]
    places = {(bundle[0].target, _sites(bundle)) for bundle in bundles}
    kinds = sum(len(_stitch_kinds(bundle[0], store)) for bundle in bundles)
    return kinds + (len(CONTROLS) - 1) * len(places)


def _stitch_kinds(task: Task, store: Store) -> tuple[str, ...]:
    own = (task.target, task.site_target)
    both = map_class(task.kind).predicts_activation and store.output_of(*own) == own
    return ("activation", "features") if both else ("features",)


@dataclasses.dataclass(frozen=True)
class _Target:
    """A model that is stitched into: its language model on test passages, and the resamples."""

    config: Config
    work: Workdir
    store: Store
    name: str
    splicer: Splicer
    draws: Resamples

    @classmethod
    def read(cls, config: Config, work: Workdir, store: Store, name: str, tasks: list[Task]):
        """Loads the model and runs it once on its passages."""
        passages = select_passages(
            store, name, documents=config.intervention.documents, seed=config.seed
        )
        if config.intervention.span == "whole":
            passages = whole_spans(store, name, passages)
        splicer = Splicer(
            models.load(store.paths[store.models.index(name)]),
            passages,
            sites=tuple(dict.fromkeys(store.output_of(name, t.site_target)[1] for t in tasks)),
            batch_size=config.intervention.batch_size,
            dtype=config.extract.matmul_dtype,
        )
        documents, count = passages.document[passages.scored], config.evaluation.bootstrap
        draws = stats.draw(documents, count=count, seed=config.seed)
        return cls(config, work, store, name, splicer, draws)

    def rows_at(self, sites: tuple[Site, ...], bundles: list[Bundle], progress) -> list[dict]:
        """Returns the rows of the controls and of every rung at one site, or at several at once."""
        own = {site: dictionaries.load(self.work.dictionary(self.name, site)) for site in sites}
        controls = {site: self._controls(site, own[site]) for site in sites}
        edited = tuple(map(self._edited, sites))
        given = {
            name: {self._edited(site): controls[site][name] for site in sites}
            for name in CONTROLS[1:]
        }
        effects = self.splicer.effects(edited, given, progress)
        references = {name: effects[name] for name in ("clean", "zero")}
        rows = [self._row(effects[c], references, sites, control=c) for c in CONTROLS]
        for _, group in itertools.groupby(bundles, key=_sources):
            group = list(group)
            pairs = {
                task.site_target: self._pairs(task, own[task.site_target]) for task in group[0]
            }
            effects = {}
            for rungs in _at_once(group):
                stitched = self._stitched(rungs, pairs, own)
                effects |= self.splicer.effects(edited, stitched, progress)
            for bundle in group:
                for kind in _stitch_kinds(bundle[0], self.store):
                    effect = effects[bundle, kind]
                    rows.append(
                        self._row(effect, references, sites, bundle=bundle, stitch_kind=kind)
                    )
        return rows

    def _edited(self, site: Site) -> Site:
        """Where the dictionary of a site writes: another one for a transcoder."""
        return self.store.output_of(self.name, site)[1]

    def _controls(self, site: Site, dictionary: Dictionary) -> dict[str, np.ndarray]:
        x = self.store.read(self.name, site, self.splicer.passages.rows)
        mean = train_mean(self.store, self.name, self._edited(site))
        size = self.config.evaluation.batch_size
        return {
            "zero": np.zeros_like(mean),
            "mean": mean,
            "own_sae": modules.over_rows(dictionary, x, method="__call__", size=size),
        }

    def _stitched(
        self, bundles: list[Bundle], pairs: dict[Site, Pairs], own: dict[Site, Dictionary]
    ) -> dict[tuple, dict[Site, np.ndarray]]:
        """{(bundle, stitch_kind): {site: what is put in, float32 [n, d_model]}}, of one source."""
        shuffled = {site: _shuffled_source(p, self.config.seed) for site, p in pairs.items()}
        out: dict[tuple, dict[Site, np.ndarray]] = {}
        for bundle in bundles:
            read = pairs if bundle[0].pairing == "aligned" else shuffled
            for task in bundle:
                site = task.site_target
                for kind, values in self._predicted(task, read[site], own[site]).items():
                    out.setdefault((bundle, kind), {})[self._edited(site)] = values
        return out

    def _predicted(self, task: Task, pairs: Pairs, own: Dictionary) -> dict[str, np.ndarray]:
        m, size, out = maps.load(task.path(self.work)), self.config.evaluation.batch_size, {}
        for kind in _stitch_kinds(task, self.store):
            if kind == "activation":
                out[kind] = maps.predict_activations(m, pairs, size)
            else:
                f = maps.predict(m, pairs, size)
                out[kind] = modules.over_rows(own, f, method="decode", size=size)
        return out

    def _pairs(self, task: Task, dictionary: Dictionary) -> Pairs:
        rows = self.splicer.passages.rows

        def side(model: str, site: Site, d: Dictionary) -> Side:
            return Side(self.store.read(model, site, rows), self.store.tokens(model, rows), d)

        own = dictionaries.load(self.work.dictionary(task.source, task.site_source))
        return Pairs(
            source=side(task.source, task.site_source, own),
            target=side(task.target, task.site_target, dictionary),
            documents=self.splicer.passages.document,
        )

    def _row(
        self,
        effect: Effect,
        references: dict[str, Effect],
        sites: tuple[Site, ...],
        *,
        control: str | None = None,
        bundle: Bundle | None = None,
        stitch_kind: str | None = None,
    ) -> dict[str, Any]:
        """A row of causal.jsonl: of a control, or of a rung's predictions."""
        task = bundle and bundle[0]
        recovered = loss_recovered(
            effect,
            clean=references["clean"],
            baseline=references["zero"],
            resamples=self.draws,
        )
        what = "control" if control else "stitching"
        return {
            "intervention": what if len(sites) == 1 else f"{what}_together",
            "control": control,
            "source": task and task.source,
            "target": self.name,
            "site_source": bundle and "+".join(str(t.site_source) for t in bundle),
            "site_target": "+".join(map(str, sites)),
            "site_edited": "+".join(str(self._edited(site)) for site in sites),
            **({} if len(sites) == 1 else {"sites": list(map(str, sites))}),
            "map": task and task.kind,
            "pairing": task and task.pairing,
            "stitch_kind": stitch_kind,
            "n_positions": len(effect.ce),
            "n_documents": self.draws.n_documents,
            **stats.columns("ce", self.draws.mean(effect.ce)),
            **stats.columns("kl", self.draws.mean(effect.kl)),
            **stats.columns("loss_recovered", recovered),
        }


def _sources(bundle: Bundle) -> tuple:
    return tuple((task.source, task.site_source) for task in bundle)


def _at_once(bundles: list[Bundle]) -> list[list[Bundle]]:
    """Groups whose predictions lie in memory together: of several sites, those of one rung."""
    if len(bundles[0]) == 1:
        return [bundles]
    kinds = dict.fromkeys(bundle[0].kind for bundle in bundles)
    return [[bundle for bundle in bundles if bundle[0].kind == kind] for kind in kinds]


def _shuffled_source(pairs: Pairs, seed: int) -> Pairs:
    """The pairs with A's rows in a random order across documents: B's positions stay in place."""
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(pairs))
    source = pairs.source
    source = dataclasses.replace(source, x=source.x[order], tokens=source.tokens[order])
    return dataclasses.replace(pairs, source=source)
