"""The stage that fits every map of a run, aligned and shuffled, and the controls of maps."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from crossdict_jax import dictionaries, models, modules, stats
from crossdict_jax.activations.pairing import token_bytes
from crossdict_jax.activations.store import End, Store
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.activations.untrained import open_controls
from crossdict_jax.config import Config, JointSettings, controlled_layers, crosscoder_settings
from crossdict_jax.dictionaries import crosscoder
from crossdict_jax.dictionaries.crosscoder_training import (
    Rows,
    fit_crosscoders,
    joint_sites,
    train_crosscoders,
)
from crossdict_jax.dictionaries.train import CEILING_SEED
from crossdict_jax.errors import UserError
from crossdict_jax.maps import base
from crossdict_jax.maps.base import Pairs, Problem, Side, map_class
from crossdict_jax.models import Site
from crossdict_jax.results import PAIRINGS
from crossdict_jax.training.checkpoint import is_finished
from crossdict_jax.training.stage import progress_bar, timed
from crossdict_jax.workdir import Workdir, check_space

MEMBER = "seed-0"  # the dictionary of each site that maps use


@dataclasses.dataclass(frozen=True)
class Direction:
    """A site of one model, and a site of another."""

    source: str
    target: str
    site_source: Site
    site_target: Site

    @property
    def ends(self) -> tuple[End, End]:
        """(model, site) of what is read, and of what is predicted."""
        return (self.source, self.site_source), (self.target, self.site_target)

    @property
    def label(self) -> str:
        """``A resid_pre.6 to B resid_pre.6``."""
        return f"{self.source} {self.site_source} to {self.target} {self.site_target}"


@dataclasses.dataclass(frozen=True)
class Task(Direction):
    """One map of a run: a direction, its two sites, a kind, and what it is fitted on."""

    kind: str
    pairing: str  # of PAIRINGS
    control: str = ""  # its name, if the map is a control

    def path(self, work: Workdir) -> Path:
        """Returns the checkpoint folder of the map."""
        work = work.controls if self.control else work
        mark = self.control or self.pairing
        name = self.kind if mark == "aligned" else f"{self.kind}-{mark}"
        return work.map(self.source, self.target, self.site_source, self.site_target, name)

    def controlled(self, control: str) -> Task:
        """Returns a control of the map; a ceiling's source is the target's own model."""
        own = {"source": self.target, "site_source": self.site_target}
        return dataclasses.replace(self, control=control, **own if control == "ceiling" else {})

    def folders(self, work: Workdir) -> tuple[Path, Path, Path]:
        """Returns the checkpoints of both dictionaries and the map."""
        return *(work.dictionary(*end) for end in self.ends), self.path(work)

    @property
    def label(self) -> str:
        """That of the direction, and the control or pairing in brackets."""
        mark = self.control or self.pairing
        return super().label if mark == "aligned" else f"{super().label} ({mark})"


def tasks(config: Config, store: Store) -> list[Task]:
    """Returns every map of a run: ordered pairs of models, layer pairs, pairings, kinds.

    A layer pair is (layer of the first model, layer of every other).

    Raises:
      UserError: a layer was not extracted.
    """
    result = []
    for ends in itertools.permutations(range(len(store.models)), 2):
        for of_models in joint_sites(config, store):
            sites = [of_models[i] for i in ends]
            if missing := [site for site in sites if site not in store.sites]:
                extracted = ", ".join(map(str, store.sites))
                raise UserError(
                    f"Site {missing[0]} was not extracted ({extracted} were); add its layer to "
                    "layers."
                )
            names = [store.models[i] for i in ends]
            for pairing, kind in itertools.product(PAIRINGS, config.map.kinds):
                result.append(Task(*names, *sites, kind, pairing))
    return list(dict.fromkeys(result))


def control_tasks(config: Config, store: Store) -> list[Task]:
    """Returns every control of the run's aligned maps, of the kinds and layers that have them.

    - ceiling: B to B at the target's site, for every kind, from B's dictionary of another seed.
    - untrained: A to B's re-initialised model; the task keeps the name of B.
    - reseeded: the map from another seed, of trained kinds that read features: others are not
      random, or have nothing to attribute.
    """
    layers, result = dict(zip(store.models, controlled_layers(config))), []
    kinds = config.control_kinds or config.map.kinds
    controls = [name for name in ("ceiling", "untrained", "reseeded") if name in config.controls]
    for control, task in itertools.product(controls, tasks(config, store)):
        kind = map_class(task.kind)
        random = kind.fits_together and kind.reads == "features"
        asked = task.kind in kinds and task.site_target.layer in layers[task.target]
        if task.pairing == "aligned" and asked and (random or control != "reseeded"):
            result.append(task.controlled(control))
    return list(dict.fromkeys(result))


def shuffled(pairs: Pairs, seed: int, split: str = SPLITS[0]) -> Pairs:
    """Returns pairs with the target's rows in a seeded random order per split, across documents."""
    order = stats.generator(len(SPLITS) * seed + SPLITS.index(split)).permutation(len(pairs))
    return dataclasses.replace(pairs, target=pairs.target.reordered(order))


def shown(task: Task, pairs: Pairs) -> Pairs:
    """Returns rows as the task's map reads them.

    A ceiling reads the features of its source's dictionary and, instead of activations, their
    reconstruction.
    """
    if task.control != "ceiling" or map_class(task.kind).reads != "activations":
        return pairs
    source = pairs.source
    x = modules.over_rows(source.dictionary, source.x, method="__call__", size=base.ROWS)
    return dataclasses.replace(pairs, source=dataclasses.replace(source, x=x))


class Loader:
    """Makes problems of a store; shared sides are read once.

    For controls the store is that of ``open_controls``, with re-initialised models.
    """

    def __init__(self, config: Config, store: Store, work: Workdir):
        self.config, self.store, self.work = config, store, work
        self._sides: dict[tuple, Side] = {}
        self._problems: dict[tuple, Problem] = {}  # of one direction, layer pair and pairing
        self._dictionary = functools.cache(dictionaries.load)
        self._read = functools.cache(lambda *end, split: store.read(*end, store.select(split)))

    def side(self, model: str, site: Site, split: str, dictionary: Path | None = None) -> Side:
        """Returns one model's rows of a split, with the dictionary of seed 0, or of a folder."""
        folder = dictionary or self.work.dictionary(model, site, MEMBER)
        key = (model, site, split, folder)
        if key not in self._sides:
            store, rows = self.store, self.store.select(split)
            path = store.paths[store.models.index(model)]
            self._sides[key] = Side(
                x=self._read(model, site, split=split),
                tokens=store.tokens(model, rows),
                dictionary=self._dictionary(folder),
                model=model,
                layer=site.layer,
                token_bytes=lambda: token_bytes(models.load_tokenizer(path)),
                keys=np.stack([store.rows.document[rows], store.rows.byte_end[rows]], axis=1),
            )
        return self._sides[key]

    def ends(self, task: Task) -> tuple[tuple[str, Site, Path], tuple[str, Site, Path]]:
        """Returns (model, site, dictionary folder) of what a map reads and of what it predicts.

        A ceiling reads the target's second dictionary; an untrained control predicts the
        re-initialised target.
        """
        source, target = ((*end, self.work.dictionary(*end, MEMBER)) for end in task.ends)
        if task.control == "ceiling":
            end = *task.ends[0], f"seed-{CEILING_SEED}"
            folder = self.work.dictionary(*end)
            if not folder.exists():  # the run has one seed
                folder = self.work.controls.dictionary(*end)
            source = (*end[:2], folder)
        if task.control == "untrained":
            names = self.store.models
            end = names[names.index(task.target) + len(names) // 2], task.site_target
            target = (*end, self.work.controls.dictionary(*end, MEMBER))
        return source, target

    def rows(self, task: Task, split: str) -> Pairs:
        """Returns the paired rows of a split, shuffled if the task's pairing is."""
        documents = self.store.rows.document[self.store.select(split)]
        sides = (self.side(model, site, split, path) for model, site, path in self.ends(task))
        pairs = Pairs(*sides, documents)
        return pairs if task.pairing == "aligned" else shuffled(pairs, self.config.seed, split)

    def problem(self, task: Task) -> Problem:
        """Returns what the task's map is fitted on; successive kinds share it."""
        alike = dataclasses.replace(task, kind="")
        key = alike, task.control and map_class(task.kind).reads  # see ``shown``
        if key not in self._problems:
            self._problems = {k: p for k, p in self._problems.items() if k[0] == alike}
            splits = (shown(task, self.rows(task, split)) for split in ("train", "validation"))
            self._problems[key] = Problem(task.label, *splits)
        return self._problems[key]


def load_pairs(
    store: Store, a: str, b: str, site_a: Site, site_b: Site, split: str, work: Workdir
) -> Pairs:
    """Returns the paired rows of a split ("train", "validation", "test") of models a and b."""
    return Loader(Config(), store, work).rows(Task(a, b, site_a, site_b, "", "aligned"), split)


def fit_maps(config: Config, store: Store, work: Workdir) -> None:
    """Fits every map of the run that has no finished checkpoint."""
    fit_tasks(tasks(config, store), Loader(config, store, work), seed=config.seed)


def fit_controls(config: Config, store: Store, work: Workdir) -> None:
    """Fits every control into ``work.controls``."""
    todo = control_tasks(config, store)
    loader = Loader(config, open_controls(config, work, store) if todo else store, work)
    for name in config.controls:  # apart: some kinds learn from all problems that they get
        seed = (config.seed + (name == "reseeded")) % 2**32
        fit_tasks([task for task in todo if task.control == name], loader, seed=seed)


def fit_tasks(todo: list[Task], loader: Loader, *, seed: int) -> None:
    """Fits the unfinished maps of a run, or of one control.

    Closed forms are fitted one at a time; kinds that train together are trained together, unless
    all their maps are finished. Equal runs end with the same bits, killed or not.

    Raises:
      UserError: a map has too few rows, or a batch is larger than the data.
    """
    if any(map_class(task.kind).through_joint and not task.control for task in todo):
        train_crosscoders(loader.config, loader.store, loader.work)  # a stage of its own
    unfinished = {task for task in todo if not is_finished(task.path(loader.work))}
    if not unfinished:
        return
    check_space(loader.work.maps)
    alone, together = [], {}
    for task in todo:
        if map_class(task.kind).fits_together:
            together.setdefault(task.kind, []).append(task)
        else:
            alone.append([task])
    batches = [batch for batch in alone + [*together.values()] if unfinished & set(batch)]
    control, finished = todo[0].control, len(todo) - len(unfinished)
    work, config = loader.work.controls if control else loader.work, loader.config
    options = {
        "seed": seed,
        "directory": work.maps / "training" / control,
        "records": config.records,
        "checkpoint_every": config.checkpoint_every,
    }
    stage = f"train_hypernetworks_{control}" if control else "train_hypernetworks"
    bar = progress_bar(total=len(todo), initial=finished, desc="maps", unit="map")

    def write(item: tuple[Task, base.Fitted, dictionaries.Dictionary]) -> None:
        task, result, source = item
        ends = {"dictionary": loader.ends(task)[1][2]}
        if result.map.reads == "features" or task.control == "ceiling":
            ends["source"] = source
        base.save(result.map, task.path(loader.work), record=result.record, **ends)
        bar.update()

    with timed(work, stage) as figures, bar, ThreadPoolExecutor(1) as disk:
        written = iter(())
        for batch in batches:
            kind = map_class(batch[0].kind)
            bar.set_postfix_str(f"{batch[0].kind}: {batch[0].label}", refresh=True)
            problems = [loader.problem(task) for task in batch]
            if kind.through_joint:
                problems = with_codes(problems, batch, loader, seed, options["directory"])
            fitted = kind.fit(problems, config.map, **options)
            sources = (problem.train.source.dictionary for problem in problems)
            new = [item for item in zip(batch, fitted, sources) if item[0] in unfinished]
            list(written)  # those of the batch before; raises what went wrong
            written = disk.map(write, new)
        list(written)
        figures["maps"] = len(unfinished)
        figures["rows"] = len(loader.store.select("train")) * len(unfinished)


def with_codes(
    problems: Sequence[Problem], batch: Sequence[Task], loader: Loader, seed: int, directory: Path
) -> list[Problem]:
    """Returns the problems with the map from A to B through a joint code.

    One crosscoder of all models per layer tuple serves all directions of the run; shuffled problems
    get the one of shuffled rows, a control one of its own two sides.
    """
    config, store, work = loader.config, loader.store, loader.work
    if batch[0].control:  # a batch is of one control, or of the run's own maps
        joint = crosscoder_settings(config)
        return with_own_codes(problems, joint, seed=seed, directory=directory)
    load, result = functools.cache(crosscoder.load), []
    for problem, task in zip(problems, batch):
        a, b = store.models.index(task.source), store.models.index(task.target)
        ends = task.site_source, task.site_target
        sites = next(s for s in joint_sites(config, store) if (s[a], s[b]) == ends)
        joint = load(work.crosscoder(sites, task.pairing))
        result.append(dataclasses.replace(problem, joint=joint.between(a, b)))
    return result


def with_own_codes(
    problems: Sequence[Problem], config: JointSettings, *, seed: int, directory: Path
) -> list[Problem]:
    """Returns the problems with a code trained on their own training rows.

    Raises:
      UserError: these are fewer than a batch.
    """
    trained = fit_crosscoders(
        [
            Rows(p.label, (p.train.source.x, p.train.target.x), seed, dictionaries=p.dictionaries)
            for p in problems
        ],
        config,
        directory=directory / "crosscoder",
    )
    return [dataclasses.replace(p, joint=c.between(0, 1)) for p, c in zip(problems, trained)]
