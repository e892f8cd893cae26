"""The stage that fits every rung: both directions, every layer pair, aligned and shuffled."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from crossdict_jax import dictionaries, models, modules
from crossdict_jax.activations.pairing import token_bytes
from crossdict_jax.activations.store import Store
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import Config, layer_pairs
from crossdict_jax.errors import UserError
from crossdict_jax.maps import base
from crossdict_jax.maps.base import ActivationMap, Map, Pairs, Problem, Side, map_class, map_module
from crossdict_jax.maps.joint import with_codes
from crossdict_jax.models import Site
from crossdict_jax.training.checkpoint import is_finished
from crossdict_jax.training.stage import device_figures, progress_bar
from crossdict_jax.workdir import Workdir

MEMBER = "seed-0"  # the dictionary of each site that maps speak about
PAIRINGS = ("aligned", "shuffled")


@dataclasses.dataclass(frozen=True)
class Task:
    """One map of a run: a direction, its two sites, a rung, and what it is fitted on.

    Attributes:
      pairing: "aligned" or "shuffled".
      control: "" for the ladder itself, or the control that stands for the target or the source.
    """

    source: str
    target: str
    site_source: Site
    site_target: Site
    kind: str
    pairing: str
    control: str = ""

    def path(self, work: Workdir) -> Path:
        """Returns the checkpoint folder of the map."""
        work = work.controls if self.control else work
        name = "-".join([self.kind, *self._apart])
        return work.map(self.source, self.target, self.site_source, self.site_target, name)

    def folders(self, work: Workdir) -> tuple[Path, Path, Path]:
        """Returns the checkpoints that it is about: both dictionaries and the map."""
        return (
            work.dictionary(self.source, self.site_source),
            work.dictionary(self.target, self.site_target),
            self.path(work),
        )

    @property
    def _apart(self) -> list[str]:
        """What sets a map apart from the aligned one of the ladder."""
        return [word for word in (self.pairing, self.control) if word not in ("", "aligned")]

    @property
    def label(self) -> str:
        """``A resid_pre.6 to B resid_pre.6``, and the pairing where it is not the true one."""
        name = f"{self.source} {self.site_source} to {self.target} {self.site_target}"
        return f"{name} ({', '.join(self._apart)})" if self._apart else name


def tasks(config: Config, store: Store) -> list[Task]:
    """Returns every map of a run: ordered pairs of models, layer pairs, pairings, rungs.

    A layer pair is (layer of the first model, layer of every other).

    Raises:
      UserError: a rung is unknown, or a layer was not extracted.
    """
    for kind in config.map.kinds:
        map_class(kind)
    made = []
    for ends in itertools.permutations(range(len(store.models)), 2):
        names = [store.models[i] for i in ends]
        for pair in layer_pairs(config):
            layers = [pair[min(i, 1)] for i in ends]
            sites = [_extracted(Site(layer, config.site), store) for layer in layers]
            for pairing, kind in itertools.product(PAIRINGS, config.map.kinds):
                made.append(Task(*names, *sites, kind, pairing))
    return list(dict.fromkeys(made))


def _extracted(site: Site, store: Store) -> Site:
    if site not in store.sites:
        there = ", ".join(str(s) for s in store.sites)
        raise UserError(f"Site {site} was not extracted ({there} were); add its layer to layers.")
    return site


def shuffle_seed(seed: int, split: str) -> int:
    """Returns the seed that shuffles a split's pairs: another one for each split."""
    return len(SPLITS) * seed + SPLITS.index(split)


def shuffled(pairs: Pairs, seed: int) -> Pairs:
    """Returns the pairs with the target's rows in one seeded random order, across documents."""
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(pairs))
    return dataclasses.replace(pairs, target=pairs.target.reordered(order))


def load_side(store: Store, model: str, site: Site, split: str, work: Workdir) -> Side:
    """Returns one model's rows of a split at a site, with the dictionary that maps speak about."""
    rows = store.select(split)
    return Side(
        x=store.read(model, site, rows),
        tokens=store.tokens(model, rows),
        dictionary=dictionaries.load(work.dictionary(model, site, MEMBER)),
        model=model,
        layer=site.layer,
        token_bytes=partial(_token_bytes, store, model),
        keys=np.stack([store.rows.document[rows], store.rows.byte_end[rows]], axis=1),
    )


def _token_bytes(store: Store, model: str) -> tuple[bytes, ...]:
    tokenizer = models.load_tokenizer(store.paths[store.models.index(model)])
    return token_bytes(tokenizer)


def load_pairs(
    store: Store, a: str, b: str, site_a: Site, site_b: Site, split: str, work: Workdir
) -> Pairs:
    """Returns the paired rows of a split ("train", "validation", "test") of models a and b."""
    return _pairs(partial(load_side, store, work=work), store, (a, site_a), (b, site_b), split)


def _pairs(sides: Callable[..., Side], store: Store, source, target, split: str) -> Pairs:
    documents = store.rows.document[store.select(split)]
    return Pairs(sides(*source, split=split), sides(*target, split=split), documents)


class Loader:
    """Makes problems; sides that several problems share are read once."""

    def __init__(self, store: Store, work: Workdir, seed: int):
        self.store, self.work, self._seed = store, work, seed
        self._sides: dict[tuple, Side] = {}

    def problem(self, task: Task) -> Problem:
        """Returns what the task's rung is fitted on."""
        return Problem(task.label, self.pairs(task, "train"), self.pairs(task, "validation"))

    def pairs(self, task: Task, split: str) -> Pairs:
        """Returns the task's rows of a split, shuffled if its pairing is."""
        source, target = (task.source, task.site_source), (task.target, task.site_target)
        pairs = _pairs(self.side, self.store, source, target, split)
        if task.pairing == "aligned":
            return pairs
        return shuffled(pairs, shuffle_seed(self._seed, split))

    def target_dictionary(self, task: Task) -> Path:
        """Returns the folder of the dictionary that the task's map speaks."""
        return self.work.dictionary(task.target, task.site_target, MEMBER)

    def side(self, model: str, site: Site, split: str) -> Side:
        """Returns one model's rows of a split, with the dictionary of seed 0."""
        key = (model, site, split)
        if key not in self._sides:
            self._sides[key] = load_side(self.store, model, site, split, self.work)
        return self._sides[key]


def fit_maps(config: Config, store: Store, work: Workdir) -> None:
    """Fits every map of the run that has no finished checkpoint yet.

    Closed forms are fitted one at a time; rungs that train together are trained together, or
    not at all where all their maps are there. Equal runs end with the same bits, killed or not.

    Raises:
      UserError: see ``tasks``; or a rung has too few rows, or a batch is larger than the data.
    """
    loader = Loader(store, work, config.seed)
    fit_tasks(tasks(config, store), config, loader, work, directory=work.maps / "training")


def fit_tasks(
    todo: list[Task],
    config: Config,
    loader: Loader,
    work: Workdir,
    *,
    directory: Path,
    stage: str = "train_hypernetworks",
) -> None:
    """Fits those of the given maps that are not finished.

    Args:
      work: of the run; maps of controls go to ``work.controls``.
      directory: for what training keeps on the way.
      stage: what the time is written down as.
    """
    unfinished = [task for task in todo if not is_finished(task.path(work))]
    if not unfinished:
        return
    start = time.perf_counter()
    with progress_bar(
        total=len(todo), initial=len(todo) - len(unfinished), desc="maps", unit="map"
    ) as bar:
        for batch in _batches(todo, set(unfinished)):
            _fit(batch, config, loader, work, directory, bar)
    wall, rows = time.perf_counter() - start, len(loader.store.select("train"))
    home = work.controls if todo[0].control else work
    home.record_timing(
        stage,
        wall_s=wall,
        maps=len(unfinished),
        rows_per_s=rows * len(unfinished) / wall,
        **device_figures(),
    )


def _batches(todo: list[Task], unfinished: set[Task]) -> list[list[Task]]:
    """Groups tasks by what one call of ``fit`` gets: one, or all of a rung that fits together."""
    together: dict[str, list[Task]] = {}
    alone = []
    for task in todo:
        if map_class(task.kind).fits_together:
            together.setdefault(task.kind, []).append(task)
        elif task in unfinished:
            alone.append([task])
    return alone + [group for group in together.values() if unfinished & set(group)]


def _fit(batch: list[Task], config: Config, loader: Loader, work: Workdir, directory, bar) -> None:
    kind = batch[0].kind
    bar.set_postfix_str(f"{kind}: {batch[0].label}", refresh=True)
    problems = [loader.problem(task) for task in batch]
    if map_class(kind).through_joint:
        problems = with_codes(problems, batch, config, loader.store, work, directory=directory)
    fitted = map_module(kind).fit(problems, config.map, seed=config.seed, directory=directory)
    for task, result in zip(batch, fitted):
        if not is_finished(task.path(work)):
            target = loader.target_dictionary(task)
            base.save(result.map, task.path(work), dictionary=target, record=result.record)
            bar.update()


def source_inputs(m: Map, pairs: Pairs) -> np.ndarray:
    """Returns what the map reads of A's side, for all rows: features are encoded."""
    if m.reads == "tokens":
        return pairs.source.tokens
    if m.reads == "activations":
        return pairs.source.x
    x, dictionary = pairs.source.x, pairs.source.dictionary
    return np.concatenate([base.encode_rows(dictionary, x[rows]) for rows in base.slices(len(x))])


def predict(m: Map, pairs: Pairs, batch_size: int = base.ROWS) -> np.ndarray:
    """Returns B's predicted features float32 [n, width_b], a batch at a time."""
    return _stream(_features, m, pairs, batch_size)


def predict_activations(m: ActivationMap, pairs: Pairs, batch_size: int = base.ROWS) -> np.ndarray:
    """Returns B's predicted activations float32 [n, d_b] of a map that predicts them."""
    return _stream(_activations, m, pairs, batch_size)


def _stream(compiled, m: Map, pairs: Pairs, batch_size: int) -> np.ndarray:
    graph, params = modules.split(m)
    source_graph, source_params = modules.split(pairs.source.dictionary)
    parts = []
    for rows in base.slices(len(pairs), batch_size):
        x, tokens = pairs.source.x[rows], pairs.source.tokens[rows]
        inputs = (base.padded(x, batch_size), base.padded(tokens, batch_size))
        out = compiled(graph, source_graph, params, source_params, *inputs)
        parts.append(np.asarray(out)[: len(x)])
    return np.concatenate(parts)


@partial(jax.jit, static_argnums=(0, 1))
def _features(graph, source_graph, params, source_params, x, tokens):
    m = modules.merge(graph, params)
    if m.reads == "features":
        return m(modules.merge(source_graph, source_params).encode(x), tokens=tokens)
    return m(x if m.reads == "activations" else tokens, tokens=tokens)


@partial(jax.jit, static_argnums=(0, 1))
def _activations(graph, source_graph, params, source_params, x, tokens):
    return modules.merge(graph, params).activation(x, tokens=tokens)
