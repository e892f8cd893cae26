"""The programs of a run, from its settings and the shapes of its models alone."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from crossdict_jax import models, modules
from crossdict_jax.activations.extract import dictionary_sites
from crossdict_jax.activations.store import End, Store
from crossdict_jax.activations.untrained import untrained_sites
from crossdict_jax.config import Config, crosscoder_settings, unswept
from crossdict_jax.dictionaries import Dictionary, base, crosscoder_training, train
from crossdict_jax.dictionaries.start import start_of
from crossdict_jax.evaluation import retrieval
from crossdict_jax.evaluation.reconstruction import measure_batch
from crossdict_jax.evaluation.scoring import CONTEXT_ROWS
from crossdict_jax.maps import map_class, tasks
from crossdict_jax.maps.base import predict_batch
from crossdict_jax.maps.codes import Compact
from crossdict_jax.maps.fit import control_tasks
from crossdict_jax.maps.kinds.ridge_codes import RidgeCodes
from crossdict_jax.maps.network import (
    VALIDATION_ROWS,
    NetworkMap,
    TransferObjective,
    streams_of_sides,
)
from crossdict_jax.models import LanguageModel
from crossdict_jax.models.run import Passages, Runner, run_model
from crossdict_jax.training.ensemble import Objective, Stream, make_ensemble
from crossdict_jax.training.loop import MAX_CHUNK, Chunks
from crossdict_jax.training.mesh import all_devices, make_mesh, product_dtype, put, shard, to_bits
from crossdict_jax.workdir import model_names

BYTES_PER_TOKEN = 4.5  # of English text, by the tokenizers of GPT-2 and Pythia
# Of one member's training, beside what only its objective reads.
OF_MEMBER = {"id": np.uint32(0), "rate": np.float32(0), "penalty": np.float32(0)}
DISTINCT = 30.0  # distinct tokens of a text, times the square root of its tokens


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run, ready to be compiled."""

    stage: str  # the command that runs it
    name: str
    lowered: jax.stages.Lowered
    runs: float  # how often it runs in the whole run
    changes: dict[str, int]  # {setting: its value} that take less memory if lowered
    steps: int = 1  # of training, in each run
    rows: int = 0  # bytes of rows that stay on a device, whatever these settings are
    beside: int = 0  # bytes of what else lies on a device meanwhile
    square: str = ""  # the kind of map, if its memory grows as the square of the width
    parameters: int = 0  # of the language model that is read


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will hold, as far as settings and shapes say."""

    config: Config
    lms: dict[str, LanguageModel]  # shapes in place of arrays
    store: Store  # without rows
    windows: int
    rows: dict[str, int]  # of each split

    @property
    def codes(self) -> bool:
        """Whether trained maps read codes: with no k, many features may be active."""
        return "k" in base.find(self.config.sae.architecture).reads


def make_plan(config: Config) -> Plan:
    """Returns the plan of a run; all token ends are taken to be paired, all windows full.

    Raises:
      UserError: the shape of a model is not known, or it has no such layer.
    """
    names, text, lms, about = model_names(config.models), config.text, {}, {}
    sites = dictionary_sites(config, names)
    for name, path in zip(names, config.models):
        shape = models.known_config(path)
        lms[name] = nnx.eval_shape(lambda shape=shape: models.init(shape))
        about[name] = {"d_model": shape.d_model}
        models.check_sites(shape, sites.stored(name), name)
    store = Store(Path(), tuple(names), config.models, {"models": about}, None, None, sites)
    tokens = math.ceil(text.max_bytes / BYTES_PER_TOKEN)
    shares = {"validation": text.validation_fraction, "test": text.test_fraction}
    shares["train"] = 1 - sum(shares.values())
    rows = {split: int(share * text.documents * tokens) for split, share in shares.items()}
    longest = min(text.window_tokens, *(lm.config.context for lm in lms.values()))
    windows = text.documents * math.ceil(tokens / longest)
    return Plan(config, lms, store, windows, rows)


def programs(plan: Plan) -> Iterator[Program]:
    """Yields every program of a run, in the order of its stages, for planned devices."""
    for stage in (extraction, dictionaries, crosscoders, trained_maps, scoring, stitching):
        yield from stage(plan)


def blank(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Returns zeros that take no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


class Recorder(Runner):
    """A runner of a planned model: lowers what it would dispatch, and answers with zeros."""

    def __init__(self, plan: Plan, name: str, batch_size: int):
        lm = plan.lms[name]
        super().__init__(lm, batch_size=batch_size, dtype=plan.config.extract.matmul_dtype)
        length = min(plan.config.text.window_tokens, lm.config.context)
        self.texts = [np.zeros(length, np.int32)] * (batch_size * self.mesh.size)
        self.lowered: dict[str, tuple[jax.stages.Lowered, int]] = {}  # and the texts that it reads

    def dispatch(self, function: Callable, *arrays, static=(), shared=()):
        lowered = run_model.lower(*self.arguments(function, arrays, static, shared))
        self.lowered.setdefault(function.__name__.strip("_"), (lowered, len(arrays[0])))
        return jax.tree.map(lambda a: blank(a.shape, a.dtype), lowered.out_info)


def extraction(plan: Plan) -> Iterator[Program]:
    """Yields what reads the sites of each model."""
    batch_size = plan.config.extract.batch_size
    twice = 1 + ("untrained" in plan.config.controls)  # at fewer layers, but as deep
    params = {name: jax.tree.leaves(modules.split(lm)[1]) for name, lm in plan.lms.items()}
    sizes = {name: sum(math.prod(a.shape) for a in arrays) for name, arrays in params.items()}
    total, itemsize = sum(sizes.values()), product_dtype(plan.config.extract.matmul_dtype).itemsize
    for name, size in sizes.items():
        # All models as loaded, and as the others multiply.
        beside = itemsize * (total - size) + (4 * total if itemsize < 4 else 0)
        runner = Recorder(plan, name, batch_size)
        texts = np.arange(len(runner.texts))
        list(runner.stream(Passages(runner.texts, texts, 0 * texts), plan.store.ends.stored(name)))
        changes = {"extract.batch_size": batch_size}
        for lowered, n in runner.lowered.values():
            about = {"runs": twice * plan.windows / n, "beside": beside, "parameters": size}
            yield Program("extract_activations", f"read {name}", lowered, changes=changes, **about)


def stitching(plan: Plan) -> Iterator[Program]:
    """Yields what puts activations into each model: its reading without them, and with them."""
    settings, todo = plan.config.intervention, tasks(plan.config, plan.store)
    documents = plan.config.text.documents
    tested = min(settings.documents, documents * plan.config.text.test_fraction)
    for name, lm in plan.lms.items():
        runner, sites = Recorder(plan, name, settings.batch_size), plan.store.sites_of(name)
        texts = np.arange(len(runner.texts))
        at = np.arange(len(runner.texts[0]))  # every token, the most that are paired
        passages = Passages(runner.texts, np.repeat(texts, len(at)), np.tile(at, len(texts)))
        runner.splice(passages, sites[0], {"x": np.zeros(lm.config.d_model, np.float32)})
        kinds = [map_class(task.kind) for task in todo if task.target == name]
        edits = sum(1 + cls.predicts_activation for cls in kinds)
        # The controls of each site: three of dictionaries, three of stitching.
        times = {"clean": 2 * len(sites), "edited": edits + 6 * len(sites)}
        changes = {"intervention.batch_size": settings.batch_size}
        for part, (lowered, n) in runner.lowered.items():
            runs = times[part] * tested / documents * plan.windows / n
            yield Program("intervene", f"{part} {name}", lowered, runs, changes)


def _training(
    objective: Objective,
    fixed: dict,
    streams: dict[str, Stream],
    seeds: Sequence[int],
    settings: Any,
    share: float,
    validation: Any = None,
    **about,
) -> Program:
    """A chunk of steps of an ensemble, of the usual variant, which revives no dead features.

    ``fixed`` is of one member; ``share`` is a factor on the runs, because controls are trained too.
    """
    ensemble = make_ensemble(
        objective,
        fixed=jax.tree.map(lambda a: blank((len(seeds), *a.shape), a.dtype), fixed),
        labels=list(map(str, seeds)),
        streams=streams,
        seeds=seeds,
        batch_size=settings.batch_size,
        setting="batch_size",
        validation=jax.tree.map(to_bits, validation),
    )

    root, feed, steps = jax.eval_shape(jax.random.key, 0), ensemble.feed, settings.steps
    state = jax.eval_shape(
        lambda fixed, root: dataclasses.replace(ensemble, fixed=fixed).init(root),
        *(ensemble.fixed, root),
    )
    no_steps = feed.indices(0, 0)  # shapes alone: no rows are there
    sent = jax.tree.map(lambda a: blank((MAX_CHUNK, *a.shape[1:]), a.dtype), no_steps)
    run = Chunks(ensemble, root, steps=steps).run
    lowered = run.lower(put(state, ensemble.layout), feed.resident, sent, 0, 1, root, 0)
    data = jax.tree.leaves(feed.resident.get("data", ()))
    rows = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in data)
    runs = share * steps / MAX_CHUNK
    return Program(lowered=lowered, runs=runs, steps=MAX_CHUNK, rows=rows, **about)


def _rows_of(
    ends: Sequence[Hashable], n: int, d_model: int, order: np.ndarray | None = None
) -> Stream:
    """The rows of distinct ends, and which of them each member reads."""
    distinct = list(dict.fromkeys(ends))
    rows = blank((len(distinct), n, d_model), ml_dtypes.bfloat16)
    return Stream(rows, np.asarray([distinct.index(end) for end in ends]), order)


def dictionaries(plan: Plan) -> Iterator[Program]:
    """Yields the step of each group of dictionaries; those of controls count by their number."""
    store, sae, n_rows = plan.store, plan.config.sae, plan.rows["train"]
    sources = sae.sources or ("train",) * len(store.models)
    trained = [model for model, source in zip(store.models, sources) if source == "train"]
    everyone = train.members(sae, [(m, site) for m in trained for site in store.sites_of(m)])
    controls = len(train.control_members(plan.config, store))
    if "untrained" in plan.config.controls:
        controls += len(untrained_sites(plan.config, store).writes)
    for group in train.grouped(sae, store, everyone, n_rows):
        first, (d_model, d_out) = group[0], train.sizes(store, group[0])
        kept = {"width": first.width, "k": first.k}
        sizes = {"x": d_model} | ({"y": d_out} if d_out else {})
        start = start_of(*(np.zeros((1, d), np.float32) for d in sizes.values()))
        ends = [(member.model, member.site) for member in group]
        part = sae.batch_size // sae.accumulate
        chosen = train.with_products(sae, rows=part, members=len(group), **kept)
        yield _training(
            train.DictionaryObjective(chosen, d_model=d_model, d_out=d_out, **kept),
            OF_MEMBER | {"start": start},
            {name: _rows_of(ends, n_rows, d) for name, d in sizes.items()},
            [member.seed for member in group],
            sae,
            1 + controls / len(everyone),
            stage="train_saes",
            name=f"{len(group)} {sae.architecture} of width {first.width}, d {d_model}",
            changes={"sae.width": first.width, "sae.batch_size": sae.batch_size},
        )


def crosscoders(plan: Plan) -> Iterator[Program]:
    """Yields the step of the crosscoders, where a map goes through them."""
    config, store, n_rows = plan.config, plan.store, plan.rows["train"]
    if not any(map_class(kind).through_joint for kind in config.map.kinds):
        return
    joint, d_models = crosscoder_settings(config), [store.d_model(m) for m in store.models]
    ends = [s for s, name in crosscoder_training.planned(config, store) if len(s) == len(d_models)]
    n, order = len(ends), blank((len(ends), n_rows), np.int32)
    controls = sum(map_class(task.kind).through_joint for task in control_tasks(config, store))
    shape = {"rows": joint.batch_size, "width": joint.width, "k": joint.k}
    chosen = train.with_products(joint, **shape, members=n)
    yield _training(
        crosscoder_training.CrosscoderObjective(chosen, d_models),
        OF_MEMBER | {"scale": blank((len(d_models),)), "center": blank((sum(d_models),))},
        {
            str(m): _rows_of(sites, n_rows, d, order if m else None)
            for m, (sites, d) in enumerate(zip(zip(*ends), d_models))
        },
        [0] * n,
        joint,
        1 + controls / n,
        stage="train_hypernetworks",
        name=f"{n} crosscoders of width {joint.width}, d {'+'.join(map(str, d_models))}",
        changes={"crosscoder.width": joint.width, "sae.batch_size": joint.batch_size},
    )


def trained_maps(plan: Plan) -> Iterator[Program]:
    """Yields the step of each kind of network map, of all pairs of equal shapes."""
    store, settings = plan.store, plan.config.map
    controls = [task.kind for task in control_tasks(plan.config, store)]
    groups, todo = {}, tasks(plan.config, store)
    for task in todo:
        if issubclass(map_class(task.kind), NetworkMap):
            # Maps on codes train together, whatever their models' sizes.
            sizes = () if plan.codes else map(store.d_model, (task.source, task.target))
            groups.setdefault((task.kind, *sizes), []).append(task)
    for (kind, *_), members in groups.items():
        n, n_rows, ends = len(members), plan.rows["train"], members[0].ends
        objective, fixed = _map_objective(plan, kind, ends, codes=plan.codes)
        held_out = min(plan.rows["validation"], VALIDATION_ROWS)
        size = min(settings.batch_size, held_out)
        batches = held_out // size, size
        streams = streams_of_sides(
            *zip(*(task.ends for task in members)),
            lambda ends: _codes(plan, ends[0][0], (len(ends), n_rows)),  # noqa: B023
            blank((n, n_rows), np.int32),
        )
        streams["tokens"] = Stream(blank((n, n_rows), np.int32), np.arange(n))
        validation = {name: _codes(plan, end[0], (n, *batches)) for name, end in zip("ab", ends)}
        validation["tokens"] = blank((n, *batches), np.int32)
        width = unswept(plan.config.sae).width
        yield _training(
            objective,
            fixed,
            streams,
            [0] * n,
            settings,
            1 + controls.count(kind) / [task.kind for task in todo].count(kind),
            validation,
            stage="train_hypernetworks",
            name=f"{n} maps {kind}",
            changes={"sae.width": width, "map.batch_size": settings.batch_size},
        )


def _dictionary(plan: Plan, end: End) -> Dictionary:
    sae = unswept(plan.config.sae)
    d_model, d_out = train.sizes(plan.store, train.members(sae, [end])[0])
    shape = {"d_model": d_model, "d_out": d_out, "width": sae.width, "k": sae.k}
    return base.build(sae.architecture, **shape, key=jax.random.key(0))


def _codes(plan: Plan, model: str, rows: tuple[int, ...]) -> Compact | np.ndarray:
    if not plan.codes:
        return blank((*rows, plan.store.d_model(model)), ml_dtypes.bfloat16)
    sae = unswept(plan.config.sae)
    shape = (*rows, sae.k)
    return Compact(blank(shape), blank(shape, np.int32), sae.width)


def _map_objective(
    plan: Plan, kind: str, ends: tuple[End, End], *, codes: bool = False
) -> tuple[TransferObjective, dict]:
    """The objective of a kind of map, and the shapes of what is fixed for one member."""
    built, cls, settings = [], map_class(kind), plan.config.map
    vocabulary = plan.lms[ends[0][0]].config.vocab_size
    tokens = min(vocabulary, math.ceil(DISTINCT * math.sqrt(plan.rows["train"])))

    def build():
        a, b = (_dictionary(plan, end) for end in ends)
        values = cls.unmeasured(a.width, b.width, tokens)
        built.append(TransferObjective(cls, a, b, values, settings, codes=codes))
        member = {"id": jnp.uint32(0), "values": values, "variance": jnp.float32(1)}
        if not codes:
            member |= {"dictionary_a": modules.split(a)[1], "dictionary_b": modules.split(b)[1]}
        return member

    fixed = jax.eval_shape(build)
    return built[0], fixed


def scoring(plan: Plan) -> Iterator[Program]:
    """Yields what evaluation does with rows, on one device: dictionaries, maps, retrieval."""
    config, store, size = plan.config, plan.store, plan.config.evaluation.batch_size
    mesh, todo = make_mesh(devices=all_devices()[:1]), tasks(config, store)
    graph, params = modules.abstract(lambda: _dictionary(plan, todo[0].ends[1]))
    d_model, width = params["W_enc"].shape
    d_out, test = params["W_dec"].shape[1], plan.rows["test"]
    changes = {"sae.width": width, "evaluation.batch_size": size}

    def program(name, function, runs, arrays, static=(), changes=changes, **about) -> Program:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = function.lower(*static, *put(arrays, shard(mesh)))
        return Program("evaluate", name, lowered, runs, changes, **about)

    bits = ml_dtypes.bfloat16
    y = blank((size, d_out), bits) if config.sae.output_site else None
    runs = len(store.ends.writes) * (plan.rows["train"] + test) / size
    arrays = params, blank((size, d_model), bits), y, blank((d_out,)), blank((), np.int32)
    yield program("measure a dictionary", measure_batch, runs, arrays, (graph,))

    kinds = [kind for kind in config.map.kinds if issubclass(map_class(kind), NetworkMap)]
    fitted = [task.kind for task in [*todo, *control_tasks(config, store)]]
    each = (test + CONTEXT_ROWS) / size  # runs
    if codes := fitted.count(RidgeCodes.kind):  # an array of width by width
        zeros = {"mean_a": (width,), "W": (width, width), "mean_b": (width,)}
        b = todo[0].ends[1]

        def build() -> RidgeCodes:
            return RidgeCodes(_dictionary(plan, b), {n: jnp.zeros(s) for n, s in zeros.items()})

        of_codes, values = modules.abstract(build)
        arrays = values, blank((size, width)), blank((size,), np.int32)
        static, kind = (of_codes, "__call__"), RidgeCodes.kind
        about, name = {"changes": {"sae.width": width}, "square": kind}, f"predict by {kind}"
        yield program(name, predict_batch, codes * each, arrays, static, **about)
    for kind in kinds[:1]:
        objective, fixed = _map_objective(plan, kind, todo[0].ends)
        trained = jax.eval_shape(lambda o=objective: o.init(jax.random.key(0), {}))
        params = fixed["values"] | trained | {"dictionary": fixed["dictionary_b"]}
        arrays = params, blank((size, width)), blank((size,), np.int32)
        static = objective.graph, "__call__"
        runs = (len(fitted) - codes) * each
        yield program(f"predict by {kind}", predict_batch, runs, arrays, static)

    pool = config.evaluation.pool or min(retrieval.LARGEST_DEFAULT_POOL, test)
    chunk = min(retrieval.CHUNK, pool)
    arrays = blank((chunk, width)), blank((chunk,), np.int32), blank((pool, width)), blank((pool,))
    runs = len(fitted) * pool / chunk
    yield program("rank in a pool", retrieval.at_least_as_similar, runs, arrays)
