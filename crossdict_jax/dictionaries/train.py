"""Trains all dictionaries of a run: members of equal shape as one vmapped ensemble."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.activations.store import Store
from crossdict_jax.config import SWEPT, Config, SAEConfig, controlled_layers, has_k, unswept
from crossdict_jax.dictionaries import base, pretrained
from crossdict_jax.dictionaries.accumulation import gradients, whole_of
from crossdict_jax.dictionaries.start import Start, begin, check_rows, fit_length, start_of
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site
from crossdict_jax.training import checkpoint
from crossdict_jax.training.adam import adam
from crossdict_jax.training.loop import Feed, Trainable, epoch_order, train
from crossdict_jax.training.mesh import (
    DATA,
    MEMBER,
    from_bits,
    in_turn,
    make_mesh,
    put,
    shard,
    to_bits,
)
from crossdict_jax.training.stage import device_figures
from crossdict_jax.workdir import Workdir, write_json

SKYLINE_SEED = 1  # of the dictionary that is compared with that of seed 0
MOST_RATE = 1.2e-2  # above it narrow dictionaries, too, lose what they found
ROWS_SHARE = 0.5  # of a device's memory; more rows than that stay on the host
DEAD_SHARE = 0.02  # of the rows that training reads: leaves AuxK most of the run to revive


@dataclasses.dataclass(frozen=True)
class Member:
    """One dictionary of the ensemble.

    Attributes:
      seed: of its initial parameters and of its data order.
    """

    model: str
    site: Site
    seed: int
    width: int
    k: int
    learning_rate: float
    l1_coefficient: float
    name: str  # its folder: seed-N, and the values of swept fields

    @property
    def label(self) -> str:
        return f"{self.model} {self.site} {self.name}"


def members(config: SAEConfig, sites: Sequence[tuple[str, Site]]) -> list[Member]:
    """Returns every dictionary of a run: model and site x seed x sweep, in that order.

    The folder of a member is ``seed-N``; of the second and later values of a swept field,
    ``seed-N-FIELD-VALUE``, so that ``seed-0`` always is the first.
    """
    swept = {
        field: value if isinstance(value, tuple) else (value,)
        for field in SWEPT
        for value in [getattr(config, field)]
    }
    found = []
    for (model, site), seed in itertools.product(sites, range(config.seeds)):
        for values in itertools.product(*swept.values()):
            chosen = dict(zip(swept, values))
            other = [f"{f}-{v:g}" for f, v in chosen.items() if v != swept[f][0]]
            usual = usual_rate(config.architecture, width=chosen["width"])
            chosen["learning_rate"] = chosen["learning_rate"] or usual
            found.append(
                Member(model, site, seed, name="-".join([f"seed-{seed}", *other]), **chosen)
            )
    return found


def usual_rate(architecture: str, *, width: int) -> float:
    """Returns Adam's learning rate: 2e-3 at a width of 4096, falling with its square root.

    The law is that of TopK (Gao et al. 2024, arXiv 2406.04093); a class's ``pace`` multiplies it.
    """
    return base.find(architecture).pace * min(MOST_RATE, 2e-3 * math.sqrt(4096 / width))


def dead_after(sae: SAEConfig) -> int:
    """Returns how many rows of silence mean that a feature is dead: as set, or a share of all."""
    return sae.dead_after_rows or max(1, round(DEAD_SHARE * sae.steps * sae.batch_size))


def train_dictionaries(config: Config, store: Store, work: Workdir) -> None:
    """Trains what is not there yet; each finished dictionary gets a folder of its own.

    Models that ``sae.sources`` gives a dictionary of somebody else train none.

    Members that share d_model, width and k are one ensemble in one compiled step; an ensemble
    too large for the device's memory is split. Killed and run again, it ends with the same bits.

    Raises:
      UserError: k above the width, a batch larger than the training rows, rows that are not finite
        or never vary, or a loss that is not finite.
    """
    adopted = pretrained.adopt(config, store, work)
    sites = [(m, s) for m in store.models if m not in adopted for s in store.sites_of(m)]
    train_members(config, store, work, members(config.sae, sites))


def control_members(config: Config, store: Store) -> list[Member]:
    """Returns the dictionaries that controls need beside those of the run.

    A second seed of every model for the skyline, unless the run has one already, and one for every
    re-initialised model, each at the layers that have controls and with the first value of a sweep.

    Args:
      store: the one that controls read (see ``activations.untrained``).
    """
    sae = dataclasses.replace(unswept(config.sae), seeds=SKYLINE_SEED + 1)
    trained = store.models[: len(config.models)]
    sites = {
        model: [Site(layer, config.site) for layer in layers]
        for model, layers in zip(trained, controlled_layers(config))
    }
    found = []
    if "ceiling" in config.controls and config.sae.seeds <= SKYLINE_SEED:
        places = [(model, site) for model in trained for site in sites[model]]
        found += [m for m in members(sae, places) if m.seed == SKYLINE_SEED]
    untrained = store.models[len(trained) :]
    places = [(model, site) for model in untrained for site in store.sites_of(model)]
    return found + [m for m in members(sae, places) if m.seed == 0]


def train_control_dictionaries(config: Config, store: Store, work: Workdir) -> None:
    """Trains into ``work.controls`` what ``control_members`` names and is not there yet.

    Raises:
      UserError: see ``train_dictionaries``.
    """
    train_members(config, store, work.controls, control_members(config, store))


def train_members(config: Config, store: Store, work: Workdir, everyone: list[Member]) -> None:
    """Trains those of the given dictionaries that are not finished in ``work``."""
    started = time.perf_counter()
    base.find(config.sae.architecture)
    rows = store.select("train")
    _check(config.sae, rows=len(rows))
    todo = [m for m in everyone if not checkpoint.is_finished(_folder(work, m))]
    trained = 0
    for group in _groups(config.sae, store, todo, rows=len(rows)):
        _train_group(config, store, work, group, rows)
        trained += len(group) * config.sae.steps * config.sae.batch_size
    if todo:
        seconds = time.perf_counter() - started
        figures = {"dictionaries": len(todo), "rows_per_s": trained / seconds}
        work.record_timing("train_saes", wall_s=seconds, **figures, **device_figures())


def _check(sae: SAEConfig, *, rows: int) -> None:
    widths = sae.width if isinstance(sae.width, tuple) else (sae.width,)
    ks = sae.k if isinstance(sae.k, tuple) else (sae.k,)
    if min(ks) < 1 and has_k(sae.architecture):
        raise UserError(f"sae.k={min(ks)} must be 1 or more; with none no feature is active.")
    if max(ks) > min(widths) and has_k(sae.architecture):
        raise UserError(f"sae.k={max(ks)} is more than sae.width={min(widths)}; lower k.")
    if sae.batch_size > rows:
        raise UserError(
            f"sae.batch_size={sae.batch_size} is more than the {rows} training rows; lower it or "
            "raise text.documents."
        )


def _folder(work: Workdir, member: Member) -> Path:
    return work.dictionary(member.model, member.site, member.name)


# ---------------------------------------------------------------- groups and memory


def _groups(sae: SAEConfig, store: Store, todo: list[Member], *, rows: int) -> list[list[Member]]:
    """Ensembles of equal shape, each small enough for the device."""
    shape = lambda m: (*_sizes(store, m).values(), m.width, m.k)  # noqa: E731
    groups = []
    for _, same in itertools.groupby(sorted(todo, key=shape), key=shape):
        same = list(same)
        most = _most_members(sae, **_sizes(store, same[0]), width=same[0].width, rows=rows)
        for at in range(0, len(same), most):
            groups.append(same[at : at + most])
    return groups


def _sizes(store: Store, member: Member) -> dict[str, int]:
    """What a member reads and, of a transcoder, writes; d_out is 0 where it is no transcoder."""
    own = (member.model, member.site)
    model, site = store.output_of(*own)
    d_out = 0 if (model, site) == own else store.d_model(model)
    return {"d_model": store.d_model(member.model), "d_out": d_out}


def member_bytes(sae: SAEConfig, *, d_model: int, width: int, d_out: int = 0) -> int:
    """Returns what one member may take of a device's memory: by it ensembles are cut to size.

    A bound for all architectures, known before anything is compiled; what the compiler then says
    of the ensemble is printed at its start. Four float32 copies of the parameters (themselves, two
    moments, gradients), one more while they are updated, and about six [batch, width] arrays live
    at the widest point of a step, of a part of the batch where ``sae.accumulate`` cuts it; what
    chooses features over all rows holds one of the whole batch then.
    """
    both = d_model + (d_out or d_model)
    parameters = both * width + width + (d_out or d_model)
    live = 6 * sae.batch_size // sae.accumulate
    if sae.accumulate > 1 and base.find(sae.architecture).selects_over_rows:
        live += sae.batch_size
    return 4 * (5 * parameters + live * width + 2 * sae.batch_size * both)


def _most_members(sae: SAEConfig, *, d_model: int, width: int, rows: int, d_out: int) -> int:
    limit = _device_memory()
    if limit is None:
        return 1_000_000
    one = member_bytes(sae, d_model=d_model, width=width, d_out=d_out)
    data = 2 * rows * (d_model + d_out)
    one += data if _rows_fit(data) else 0
    return max(1, int(0.8 * limit * jax.device_count() // one))


def _rows_fit(size: int) -> bool:
    """Whether rows of so many bytes stay on every device, and leave room for a training."""
    limit = _device_memory()
    return limit is None or size <= ROWS_SHARE * limit


def _device_memory() -> int | None:
    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit")


# ---------------------------------------------------------------- one group


def _train_group(config: Config, store: Store, work: Workdir, group: list[Member], rows) -> None:
    sae, first = config.sae, group[0]
    sizes = _sizes(store, first)
    d = str(sizes["d_model"]) + (f"-to-{sizes['d_out']}" if sizes["d_out"] else "")
    directory = work.dictionaries / "training" / f"d{d}-width{first.width}-k{first.k}-{_tag(group)}"
    kind = "transcoders" if sizes["d_out"] else "dictionaries"
    what = f"{len(group)} {sae.architecture} {kind}, d {d} width {first.width}"
    labels = [m.label for m in group]
    trained = _train_ensemble(config, store, group, rows, directory, labels=labels, what=what)
    _save_members(config, store, work, group, trained)
    shutil.rmtree(directory / "checkpoints")


def _train_ensemble(
    config: Config,
    store: Store,
    group: list[Member],
    rows: np.ndarray,
    directory: Path,
    *,
    labels: list[str],
    what: str,
    given: Callable[[dict], dict] = lambda params: params,
) -> list[base.Dictionary]:
    """Returns the trained members of one group, of parameters that start as ``given(random)``."""
    sae = config.sae
    write_json(directory / "members.json", [{"label": label} for label in labels])
    ensemble = prepare(sae, store, group, rows)

    def init(root):
        state = ensemble.trainable.init(root)
        return state | {"params": given(state["params"])}

    state = train(
        Trainable(init, ensemble.trainable.step),
        feed=ensemble.feed,
        steps=sae.steps,
        seed=config.seed,
        directory=directory,
        checkpoint_every=min(config.checkpoint_every, sae.checkpoint_every),
        what=what,
        state_shardings=ensemble.by_member,
        meta={"members": labels, "sae": dataclasses.asdict(sae), "rows": len(rows)},
    )
    params = jax.device_get(state["params"])
    each = [jax.tree.map(lambda a, i=i: a[i], params) for i in range(len(group))]
    return [modules.merge(ensemble.graphdef, one) for one in each]


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Members of equal shape, as the loop trains them: every array has members in front."""

    graphdef: nnx.GraphDef
    trainable: Trainable
    feed: Feed
    mesh: jax.sharding.Mesh

    def by_member(self, abstract):
        """Returns the sharding of every array of a stacked tree: members over devices."""
        return jax.tree.map(lambda _: shard(self.mesh, MEMBER), abstract)


def prepare(
    sae: SAEConfig,
    store: Store,
    group: list[Member],
    rows: np.ndarray,
    *,
    resident: bool | None = None,
) -> Ensemble:
    """Returns members that share d_model, width and k, ready to be trained on these rows [n].

    Args:
      resident: whether the rows stay on the devices, or on the host, which then sends the batches
        of a chunk of steps at a time; None: on the devices if they fit beside the training.
    """
    sizes, mesh = _sizes(store, group[0]), make_mesh(members=len(group))
    feed, starts = _feed(sae, store, group, rows, mesh, resident)
    graphdef, _ = modules.abstract(lambda: _build(sae, sizes, group[0], jax.random.key(0)))
    trainable = _trainable(sae, graphdef, group, sizes, starts, mesh)
    return Ensemble(graphdef, trainable, feed, mesh)


def train_from(
    config: Config,
    store: Store,
    group: list[Member],
    starts: Sequence[base.Dictionary | None],
    *,
    directory: Path,
) -> list[base.Dictionary]:
    """Returns trained members of equal shape that begin at given dictionaries instead of random.

    Members with equal seeds see the same rows in the same order, whatever they begin at. They are
    not saved; ``directory`` keeps checkpoints and metrics, so that a killed run goes on.

    Args:
      starts: per member its first parameters, or None for random ones.
    """
    rows = store.select("train")
    _check(config.sae, rows=len(rows))

    def given(params: dict) -> dict:
        for i, start in enumerate(starts):
            if start is not None:
                put_in = lambda all_, one, i=i: all_.at[i].set(one)  # noqa: E731
                params = jax.tree.map(put_in, params, modules.split(start)[1])
        return params

    labels = [f"{m.label} {'random' if s is None else 'given'}" for m, s in zip(group, starts)]
    what = f"{len(group)} dictionaries from two starts"
    return _train_ensemble(
        config, store, group, rows, directory, labels=labels, what=what, given=given
    )


def _tag(group: list[Member]) -> str:
    return f"{group[0].model}-{group[0].site}-{group[0].name}"


def _build(sae: SAEConfig, sizes: dict[str, int], member: Member, key: jax.Array):
    shape = {"d_model": sizes["d_model"], "d_out": sizes["d_out"] or None}
    return base.build(sae.architecture, **shape, width=member.width, k=member.k, key=key)


def _feed(
    sae: SAEConfig, store: Store, group: list[Member], rows, mesh, resident: bool | None
) -> tuple[Feed, Start]:
    """Rows of all the group's sites, where ``prepare`` says; every seed has an order of its own.

    A batch is (x, y): what is read [members, batch, d_model] and, of transcoders, what is to be
    written [members, batch, d_out], else None.

    Returns the feed, and what rows say before the first step (see ``start_of``), per member.
    """
    sites = list(dict.fromkeys((m.model, m.site) for m in group))
    data = {"x": np.stack([store.read(*site, rows) for site in sites])}
    if _sizes(store, group[0])["d_out"]:
        data["y"] = np.stack([store.read(*store.output_of(*site), rows) for site in sites])
    for place, x in zip(sites, data["x"]):
        check_rows(x, " ".join(map(str, place)), rows)
    for place, y in zip(sites, data.get("y", ())):
        check_rows(y, " ".join(map(str, store.output_of(*place))), rows)
    start = [start_of(*arrays) for arrays in zip(*data.values())]
    which = np.asarray([sites.index((m.model, m.site)) for m in group])
    seeds = sorted({m.seed for m in group})
    order_of = np.asarray([seeds.index(m.seed) for m in group])
    if resident is None:
        resident = _rows_fit(sum(array.nbytes for array in data.values()))

    def orders(first: int, count: int) -> np.ndarray:
        span = {"start": first * sae.batch_size, "count": count * sae.batch_size, "n": len(rows)}
        orders = [epoch_order(seed, **span).reshape(count, sae.batch_size) for seed in seeds]
        return np.stack(orders, axis=1)  # [steps, seeds, batch]

    bits = {name: to_bits(array) for name, array in data.items()}

    def chosen(bits, orders):
        """Orders [..., seeds, batch] to rows [..., members, batch, d] of every array."""
        places = (which[:, None], orders[..., order_of, :])
        return {name: array[places] for name, array in bits.items()}

    def rows_of(bits):
        return jax.lax.with_sharding_constraint(from_bits(bits), shard(mesh, MEMBER, DATA))

    def select(there, sent):
        batch = jax.tree.map(rows_of, chosen(there, sent) if resident else sent)
        return batch["x"], batch.get("y")

    per_member = [start[i] for i in which]
    starts = {name: np.stack([one[name] for one in per_member]) for name in per_member[0]}
    if resident:
        return Feed(put(bits, shard(mesh)), orders, select), starts
    return Feed({}, lambda first, count: chosen(bits, orders(first, count)), select), starts


def _trainable(
    sae: SAEConfig, graphdef, group: list[Member], sizes: dict[str, int], starts: Start, mesh
) -> Trainable:
    rates = jnp.asarray([m.learning_rate for m in group], jnp.float32)
    penalties = jnp.asarray([m.l1_coefficient for m in group], jnp.float32)
    keys = jnp.asarray([m.seed for m in group])
    adam = optimizer(sae)

    def init(root):
        def one(seed, start):
            d = _build(sae, sizes, group[0], jax.random.fold_in(root, seed))
            d = modules.merge(graphdef, begin(modules.split(d)[1], start))
            fit_length(d, start)
            params = modules.split(d)[1]
            silent = jnp.zeros(group[0].width, jnp.int32)
            return {"params": params, "train": {"adam": adam.init(params), "silent": silent}}

        first = jax.tree.map(jnp.asarray, (keys, starts))
        if sae.accumulate == 1:
            return jax.vmap(one)(*first)
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(jax.vmap(one), *first))
        return in_turn(lambda _, *first: (one(*first), ()), mesh)(nothing, *first)[0]

    def step(state, batch, number, _):
        most_dead = (state["train"]["silent"] >= dead_after(sae)).sum(axis=1).max()
        d_out = sizes["d_out"] or sizes["d_model"]
        member = _member_step(sae, graphdef, adam, number, most_dead, d_out)
        at_once = sae.accumulate == 1
        over_members = jax.vmap(member, spmd_axis_name=MEMBER) if at_once else in_turn(member, mesh)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # see mesh.on_own_rows
            return over_members(state, batch, rates, penalties)

    return Trainable(init, step)


def _member_step(sae: SAEConfig, graphdef, adam, number, most_dead, d_out):
    """The step of one member: (state, (x, y), rate, L1 coefficient) -> (state, metrics)."""
    rate_factor, l1_factor = schedules(sae)
    dtype = _dtype(sae)
    measured = base.find(sae.architecture).measured

    def step(state, batch, rate, penalty):
        (x, y), params, train_state = batch, state["params"], state["train"]
        hyper = hyper_of(sae, penalty * l1_factor(number), d_out=d_out, most_dead=most_dead)
        dead = train_state["silent"] >= dead_after(sae)

        if sae.accumulate > 1:
            d, how = modules.merge(graphdef, params), {"parts": sae.accumulate, "dtype": dtype}
            whole = whole_of(d, (x, y), hyper=hyper, **how)
            hyper = dataclasses.replace(hyper, whole=jax.lax.stop_gradient(whole))

        def loss_of(params, x, y, hyper, dead):
            d = modules.merge(graphdef, params)
            loss, parts, f = d.losses(x, y=y, hyper=hyper, dead=dead, dtype=dtype)
            return loss, (parts, f)

        how = (sae.accumulate, hyper, dead)
        loss, parts, fired, grads = gradients(loss_of, params, (x, y), *how)
        grads |= {name: jnp.zeros_like(grads[name]) for name in measured if name in grads}
        updates, adam_state = adam.update(grads, train_state["adam"], params)
        updates = jax.tree.map(lambda u: -rate * rate_factor(number) * u, updates)
        params = _updated(graphdef, optax.apply_updates(params, updates), fired.least)
        silent = jnp.where(fired.active, 0, train_state["silent"] + x.shape[0])
        metrics = {"loss": loss, "l0": fired.l0}
        metrics |= parts | {"dead_fraction": dead.mean(dtype=jnp.float32)}
        return {"params": params, "train": {"adam": adam_state, "silent": silent}}, metrics

    return step


def hyper_of(sae: SAEConfig, l1_coefficient, *, d_out: int, most_dead) -> base.Hyper:
    """Returns what a member's losses read of the settings, with its coefficient at a step."""
    return base.Hyper(
        l1_coefficient=l1_coefficient,
        auxk_coefficient=sae.auxk_coefficient,
        k_aux=sae.k_aux or d_out // 2,
        bandwidth=sae.bandwidth,
        l0_target=sae.l0_target,
        nested_fractions=sae.nested_fractions,
        nested_balance=sae.nested_balance,
        most_dead=most_dead,
    )


def _dtype(sae: SAEConfig):
    return None if sae.matmul_dtype == "float32" else jnp.dtype(sae.matmul_dtype)


def _updated(graphdef, params, least):
    d = modules.merge(graphdef, params)
    d.measure(least)
    d.after_update()
    return modules.split(d)[1]


def optimizer(sae: SAEConfig) -> optax.GradientTransformation:
    """Returns Adam behind a limit to the gradient's norm; what it gives is to be times the rate.

    Losses that sum squares over d have their longest gradients in the first steps. Adam remembers
    them for 1 / (1 - b2) steps, more than short trainings have, and later steps are too small: at
    300 steps ReLU then leaves a tenth to a quarter more unexplained at an equal L0.
    """
    return adam(sae.gradient_clip)


def schedules(sae: SAEConfig) -> tuple[optax.Schedule, optax.Schedule]:
    """Returns the factors of the rate (warm-up, flat, linear decay) and of L1 (warm-up)."""
    warm = max(1, round(sae.warmup_fraction * sae.steps))
    decay = max(1, sae.steps // 5)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(1 / warm, 1.0, warm),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, decay),
        ],
        [warm, max(warm, sae.steps - decay)],
    )
    return rate, optax.linear_schedule(0.0, 1.0, max(1, round(sae.l1_warmup_fraction * sae.steps)))


def _save_members(
    config: Config,
    store: Store,
    work: Workdir,
    group: list[Member],
    trained: list[base.Dictionary],
) -> None:
    for member, dictionary in zip(group, trained):
        meta = dataclasses.asdict(member) | {"site": str(member.site), "steps": config.sae.steps}
        if dictionary.transcodes:
            model, site = store.output_of(member.model, member.site)
            meta |= {"writes": [model, str(site)]}
        base.save(dictionary, _folder(work, member), meta=meta)
