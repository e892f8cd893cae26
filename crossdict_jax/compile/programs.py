"""The programs of a run, from its settings and the shapes of its models alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from crossdict_jax import models, modules
from crossdict_jax.activations.extract import dictionary_sites
from crossdict_jax.activations.store import Sites, Store
from crossdict_jax.activations.untrained import untrained_names, untrained_sites
from crossdict_jax.config import Config, crosscoder_settings, unswept
from crossdict_jax.dictionaries import base, crosscoder_training, train
from crossdict_jax.dictionaries.start import start_of
from crossdict_jax.evaluation.reconstruction import measure_batch
from crossdict_jax.evaluation.retrieval import CHUNK, LARGEST_DEFAULT_POOL, at_least_as_similar
from crossdict_jax.evaluation.scoring import CONTEXT_ROWS
from crossdict_jax.maps import Pairs, Problem, Side, Task, map_class, tasks
from crossdict_jax.maps.base import predict_batch
from crossdict_jax.maps.compact import Compact
from crossdict_jax.maps.controls import control_tasks
from crossdict_jax.maps.ensemble import VALIDATION_ROWS, TransferObjective
from crossdict_jax.maps.network import NetworkMap
from crossdict_jax.models import LanguageModel
from crossdict_jax.models.run import Passages, Runner, run_model
from crossdict_jax.training.ensemble import Ensemble, Stream, make_ensemble
from crossdict_jax.training.loop import MAX_CHUNK, Chunks
from crossdict_jax.training.mesh import all_devices, make_mesh, put, shard, to_bits
from crossdict_jax.workdir import model_names

BYTES_PER_TOKEN = 4.5  # of English text, by the tokenizers of GPT-2 and Pythia
DISTINCT = 30.0  # times the square root of the tokens of a text: different ones among them


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run, ready to be compiled.

    Attributes:
      stage: the command that runs it.
      runs: how often it runs in the whole run.
      steps: training steps of each; 0: it does not train.
      changes: {setting: its value}, which take less memory if they are lower.
      rows: bytes of rows that stay on a device, whatever these settings are.
    """

    stage: str
    name: str
    lowered: jax.stages.Lowered
    runs: float
    steps: int
    changes: Mapping[str, int]
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will hold, as far as settings and shapes say; see ``make_plan``."""

    config: Config
    lms: dict[str, LanguageModel]  # shapes in place of arrays
    store: Store  # without rows
    controls: Store  # with the re-initialised models
    windows: int
    rows: dict[str, int]  # of each split; upper bounds


def make_plan(config: Config) -> Plan:
    """Returns the plan of a run: every token's end is taken to be paired, all windows to be full.

    Raises:
      UserError: the shape of a model is not known, or it has no such layer.
    """
    names = model_names(config.models)
    lms = {}
    for name, path in zip(names, config.models):
        shape = models.known_config(path)
        lms[name] = nnx.eval_shape(lambda shape=shape: models.init(shape))
        lms[name].name = name
    sites = dictionary_sites(config, names)
    for name, lm in lms.items():
        for site in sites.stored(name):
            models.check_site(lm.config, site, name)

    def store(names, ends: Sites) -> Store:
        d_models = [lms[names[i % len(lms)]].config.d_model for i in range(len(names))]
        meta = {"models": {name: {"d_model": d} for name, d in zip(names, d_models)}}
        return Store(Path(), tuple(names), tuple(config.models), meta, None, None, ends)

    run = controls = store(names, sites)
    if "untrained" in config.controls:
        ends = Sites({**sites.writes, **untrained_sites(config, run).writes})
        controls = store([*names, *untrained_names(run)], ends)
    text = config.text
    tokens = math.ceil(text.max_bytes / BYTES_PER_TOKEN)
    shares = {"validation": text.validation_fraction, "test": text.test_fraction}
    shares = {"train": 1 - sum(shares.values())} | shares
    rows = {split: int(share * text.documents * tokens) for split, share in shares.items()}
    windows = text.documents * math.ceil(tokens / text.window_tokens)
    return Plan(config, lms, run, controls, windows, rows)


def programs(plan: Plan) -> Iterator[Program]:
    """Yields every program of a run, in the order of its stages, for devices that are planned."""
    for stage in (extraction, dictionaries, crosscoders, trained_maps, scoring, stitching):
        yield from stage(plan)


def blank(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Returns zeros that take no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


# ---------------------------------------------------------------- language models


class Recorder(Runner):
    """Lowers what a runner would dispatch, and answers with zeros."""

    def __init__(self, lm: LanguageModel, **options):
        super().__init__(lm, **options)
        self.lowered: dict[str, jax.stages.Lowered] = {}

    def dispatch(self, function: Callable, *arrays, static=(), shared=()):
        lowered = run_model.lower(*self.arguments(function, arrays, static, shared))
        self.lowered.setdefault(function.__name__.strip("_"), lowered)
        return jax.tree.map(lambda a: blank(a.shape, a.dtype), lowered.out_info)


def extraction(plan: Plan) -> Iterator[Program]:
    """Yields what reads the sites of each model."""
    config, batch_size = plan.config, plan.config.extract.batch_size
    twice = 1 + ("untrained" in config.controls)  # at fewer layers, but as deep
    for name, lm in plan.lms.items():
        runner = Recorder(lm, batch_size=batch_size, dtype=config.extract.matmul_dtype)
        text = np.zeros(min(config.text.window_tokens, lm.config.context), np.int32)
        list(runner.stream([text] * batch_size, plan.store.ends.stored(name)))
        runs = twice * plan.windows / batch_size
        changes = {"extract.batch_size": batch_size}
        for lowered in runner.lowered.values():
            yield Program("extract_activations", f"read {name}", lowered, runs, 0, changes)


def stitching(plan: Plan) -> Iterator[Program]:
    """Yields what puts activations into each model: its reading without them, and with them."""
    config, batch_size = plan.config, plan.config.intervention.batch_size
    todo = tasks(config, plan.store)
    documents = min(config.intervention.documents, int(plan.rows["test"]))
    windows = documents * plan.windows / config.text.documents
    for name, lm in plan.lms.items():
        runner = Recorder(lm, batch_size=batch_size, dtype=config.extract.matmul_dtype)
        text = np.zeros(min(config.text.window_tokens, lm.config.context), np.int32)
        last = np.full(batch_size, max(0, len(text) - 2))
        site = plan.store.sites_of(name)[0]
        passages = Passages((text,) * batch_size, np.arange(batch_size), last)
        runner.splice(passages, site, {"x": np.zeros(lm.config.d_model, np.float32)})
        into = [task for task in todo if task.target == name]
        edits = sum(1 + map_class(task.kind).predicts_activation for task in into)
        sites = len(plan.store.sites_of(name))
        times = {"clean": 2 * sites, "edited": edits + 6 * sites}  # evaluate puts in three, too
        for kind, lowered in runner.lowered.items():
            runs = times[kind] * windows / batch_size
            changes = {"intervention.batch_size": batch_size}
            yield Program("intervene", f"{kind} {name}", lowered, runs, 0, changes)


# ---------------------------------------------------------------- training


def dictionaries(plan: Plan) -> Iterator[Program]:
    """Yields the step of each group of dictionaries; those of controls count by their number."""
    config, store, n_rows = plan.config, plan.store, plan.rows["train"]
    sae = config.sae
    if set(sae.sources) - {"train"}:
        trains = [source == "train" for source in sae.sources]
    else:
        trains = [True] * len(store.models)
    ends = [
        (m, s) for m, train_it in zip(store.models, trains) if train_it for s in store.sites_of(m)
    ]
    everyone = train.members(sae, ends)
    if not everyone:
        return
    controls = len(train.control_members(config, plan.controls)) / len(everyone)
    for group in train.grouped(sae, store, everyone, n_rows):
        first, n = group[0], len(group)
        d_model, d_out = train.sizes(store, first)
        sites = list(dict.fromkeys((m.model, m.site) for m in group))
        sizes = {"x": d_model} | ({"y": d_out} if d_out else {})
        start = start_of(*(np.zeros((1, d), np.float32) for d in sizes.values()))
        fixed = {"id": np.zeros(n, np.uint32), "rate": blank((n,)), "penalty": blank((n,))}
        fixed["start"] = {name: blank((n, *a.shape), a.dtype) for name, a in start.items()}
        source = np.asarray([sites.index((m.model, m.site)) for m in group])
        shape = {"d_model": d_model, "d_out": d_out, "width": first.width, "k": first.k}
        ensemble = make_ensemble(
            train.DictionaryObjective(sae, **shape),
            fixed=fixed,
            labels=[member.label for member in group],
            streams={
                name: Stream(blank((len(sites), n_rows, d), ml_dtypes.bfloat16), source)
                for name, d in sizes.items()
            },
            seeds=[member.seed for member in group],
            batch_size=sae.batch_size,
            setting="sae.batch_size",
        )
        name = f"{n} {sae.architecture} of width {first.width}, d {d_model}"
        changes = {"sae.width": first.width, "sae.batch_size": sae.batch_size}
        yield _training("train_saes", name, ensemble, sae.steps, changes, 1 + controls)


def crosscoders(plan: Plan) -> Iterator[Program]:
    """Yields the step of the crosscoders, where a map goes through them."""
    config, store, n_rows = plan.config, plan.store, plan.rows["train"]
    if not any(map_class(kind).through_joint for kind in config.map.kinds):
        return
    joint, planned = crosscoder_settings(config), crosscoder_training.planned(config, store)
    planned = [sites for sites, name in planned if name not in crosscoder_training.CONTROLS]
    d_models, n = [store.d_model(model) for model in store.models], len(planned)
    streams = {}
    for m, d in enumerate(d_models):
        sites = list(dict.fromkeys(ends[m] for ends in planned))
        source = np.asarray([sites.index(ends[m]) for ends in planned])
        order = blank((n, n_rows), np.int32) if m else None
        rows = blank((len(sites), n_rows, d), ml_dtypes.bfloat16)
        streams[str(m)] = Stream(rows, source, order)
    fixed = {"id": np.zeros(n, np.uint32), "rate": blank((n,)), "penalty": blank((n,))}
    fixed |= {"scale": blank((n, len(d_models))), "center": blank((n, sum(d_models)))}
    ensemble = make_ensemble(
        crosscoder_training.CrosscoderObjective(joint, d_models),
        fixed=fixed,
        labels=[str(i) for i in range(n)],
        streams=streams,
        seeds=[0] * n,
        batch_size=joint.batch_size,
        setting="crosscoder.batch_size",
    )
    controls = [task for task in control_tasks(config, store) if map_class(task.kind).through_joint]
    name = f"{n} crosscoders of width {joint.width}, d {'+'.join(map(str, d_models))}"
    changes = {"crosscoder.width": joint.width, "sae.batch_size": joint.batch_size}
    share = 1 + len(controls) / n
    yield _training("train_hypernetworks", name, ensemble, joint.steps, changes, share)


def trained_maps(plan: Plan) -> Iterator[Program]:
    """Yields the step of each kind of map that is a network, of all pairs of equal shapes.

    Where dictionaries have no k, rows are read as activations, as where many features are active.
    """
    store, settings = plan.store, plan.config.map
    controls = [task.kind for task in control_tasks(plan.config, store)]
    groups: dict[tuple, list[Task]] = {}
    for task in tasks(plan.config, store):
        if issubclass(map_class(task.kind), NetworkMap):
            shape = store.d_model(task.source), store.d_model(task.target)
            groups.setdefault((task.kind, *shape), []).append(task)
    for (kind, *_), members in groups.items():
        first, n, n_rows = members[0], len(members), plan.rows["train"]
        ends = [(first.source, first.site_source), (first.target, first.site_target)]
        objective, fixed = _map_objective(plan, kind, ends)
        held_out = min(plan.rows["validation"], VALIDATION_ROWS)
        size = min(settings.batch_size, held_out)
        streams, validation = {}, {}
        for name, (model, _) in zip("ab", ends):
            rows = _codes(plan, model, (len(store.sites_of(model)), n_rows))
            order = None if name == "a" else blank((n, n_rows), np.int32)
            streams[name] = Stream(rows, np.zeros(n, np.int64), order)
            validation[name] = _codes(plan, model, (n, held_out // size, size))
        streams["tokens"] = Stream(blank((n, n_rows), np.int32), np.arange(n))
        validation["tokens"] = blank((n, held_out // size, size), np.int32)
        ensemble = make_ensemble(
            objective,
            fixed=jax.tree.map(lambda a, n=n: blank((n, *a.shape), a.dtype), fixed),
            labels=[task.label for task in members],
            streams=streams,
            seeds=[0] * n,
            batch_size=settings.batch_size,
            setting="map.batch_size",
            validation=jax.tree.map(to_bits, validation),
        )
        share = 1 + controls.count(kind) / sum(len(m) for k, m in groups.items() if k[0] == kind)
        changes = {"sae.width": unswept(plan.config.sae).width}
        changes |= {"map.hidden": settings.hidden, "map.batch_size": settings.batch_size}
        name = f"{n} maps {kind}"
        yield _training("train_hypernetworks", name, ensemble, settings.steps, changes, share)


def _training(stage, name, ensemble: Ensemble, steps: int, changes, share: float) -> Program:
    """A chunk of steps of an ensemble as a program; ``share``: how much as often it runs."""

    def init(fixed, root):
        whole = dataclasses.replace(ensemble, fixed=fixed)
        return whole.trainable(steps).init(root)

    root = jax.eval_shape(lambda: jax.random.key(0))
    state = put(jax.eval_shape(init, ensemble.fixed, root), ensemble.layout)
    sent = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((MAX_CHUNK, *a.shape[1:]), a.dtype),
        ensemble.feed.indices(0, 1),
    )
    chunks = Chunks(ensemble.trainable(steps), ensemble.feed, root)
    lowered = chunks.run.lower(state, ensemble.feed.resident, sent, 0, 1, root)
    rows = jax.tree.leaves(ensemble.feed.resident.get("data", ()))
    size = sum(a.size * a.dtype.itemsize for a in rows)
    return Program(stage, name, lowered, share * steps / MAX_CHUNK, MAX_CHUNK, changes, size)


def _abstract_dictionary(plan: Plan, model: str, site, key) -> base.Dictionary:
    sae = unswept(plan.config.sae)
    member = train.members(sae, [(model, site)])[0]
    d_model, d_out = train.sizes(plan.store, member)
    shape = {"d_model": d_model, "d_out": d_out, "width": sae.width, "k": sae.k}
    return base.build(sae.architecture, **shape, key=key)


def _codes(plan: Plan, model: str, rows: tuple[int, ...]) -> Compact | np.ndarray:
    """What trained maps read of a model's rows: codes of k slots, or activations."""
    sae = unswept(plan.config.sae)
    if not base.find(sae.architecture).has_k:
        return blank((*rows, plan.store.d_model(model)), ml_dtypes.bfloat16)
    shape = (*rows, sae.k)
    return Compact(blank(shape), blank(shape, np.int32), sae.width)


def _map_objective(plan: Plan, kind: str, ends) -> tuple[TransferObjective, dict]:
    """The objective of a kind of map, and the shapes of what is fixed for one member."""
    built, cls = [], map_class(kind)
    vocabulary = plan.lms[ends[0][0]].config.vocab_size
    distinct = min(vocabulary, math.ceil(DISTINCT * math.sqrt(plan.rows["train"])))

    def build(key):
        a, b = (_abstract_dictionary(plan, *end, key) for end in ends)
        values = cls.unmeasured(a.width, b.width, tokens=distinct)
        sides = [Side(blank((1, d.d_model)), np.zeros(1, np.int32), d) for d in (a, b)]
        pairs = Pairs(*sides, np.zeros(1, np.int32))
        built.append(TransferObjective(cls, Problem(kind, pairs, pairs), values, plan.config.map))
        return {
            "id": jax.numpy.uint32(0),
            "dictionary_a": modules.split(a)[1],
            "dictionary_b": modules.split(b)[1],
            "values": values,
            "variance": jax.numpy.float32(1),
        }

    fixed = jax.eval_shape(build, jax.eval_shape(lambda: jax.random.key(0)))
    return built[0], fixed


# ---------------------------------------------------------------- scoring


def scoring(plan: Plan) -> Iterator[Program]:
    """Yields what evaluation does with rows, on one device: dictionaries, maps, retrieval."""
    config, store, size = plan.config, plan.store, plan.config.evaluation.batch_size
    mesh, todo = make_mesh(devices=all_devices()[:1]), tasks(config, store)
    ends = [(todo[0].source, todo[0].site_source), (todo[0].target, todo[0].site_target)]
    graph, params = modules.abstract(
        lambda: _abstract_dictionary(plan, *ends[1], jax.random.key(0))
    )
    d_model, width = params["W_enc"].shape
    d_out = params["W_dec"].shape[1] if params["W_dec"].shape[1] != d_model else None
    test, read = plan.rows["test"], plan.rows["train"] + plan.rows["test"]

    def program(name: str, function, static: tuple, arrays: tuple, runs: float) -> Program:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = function.lower(*static, *put(arrays, shard(mesh)))
        changes = {"sae.width": width, "evaluation.batch_size": size}
        return Program("evaluate", name, lowered, runs, 0, changes)

    def rows(d: int) -> np.ndarray:
        return blank((size, d), ml_dtypes.bfloat16)

    y = rows(d_out) if d_out else None
    arrays = params, rows(d_model), y, blank((d_out or d_model,)), blank((), np.int32)
    runs = sum(map(len, map(store.sites_of, store.models))) * read / size
    yield program("measure a dictionary", measure_batch, (graph,), arrays, runs)

    kinds = [kind for kind in config.map.kinds if issubclass(map_class(kind), NetworkMap)]
    maps = len(todo) + len(control_tasks(config, store))
    for kind in kinds[:1]:
        objective, fixed = _map_objective(plan, kind, ends)
        trained = jax.eval_shape(lambda o=objective: o.init(jax.random.key(0), {}))
        of_map = fixed["values"] | trained | {"dictionary": fixed["dictionary_b"]}
        x = rows(store.d_model(ends[0][0]))
        arrays = of_map, fixed["dictionary_a"], x, blank((size,), np.int32)
        static, runs = (objective.graph, objective.source_graph, "__call__"), (test + CONTEXT_ROWS)
        yield program(f"predict by {kind}", predict_batch, static, arrays, maps * runs / size)

    pool = config.evaluation.pool or min(LARGEST_DEFAULT_POOL, test)
    queries, units = blank((min(CHUNK, pool), width)), blank((pool, width))
    arrays = queries, blank(queries.shape[:1], np.int32), units, blank((pool,))
    runs = maps * pool / len(queries)
    yield program("rank in a pool", at_least_as_similar, (), arrays, runs)
