"""Trains all dictionaries of a run: members of equal shape as one ensemble."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.activations.store import Store
from crossdict_jax.config import SWEPT, Config, SAEConfig, controlled_layers, has_k, unswept
from crossdict_jax.dictionaries import base, pretrained
from crossdict_jax.dictionaries.base import Dictionary, Hyper
from crossdict_jax.dictionaries.losses import Fired, whole_batch
from crossdict_jax.dictionaries.start import begin, check_rows, fit_length, start_of
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site
from crossdict_jax.training import checkpoint
from crossdict_jax.training.ensemble import (
    Context,
    Ensemble,
    Objective,
    Stream,
    make_ensemble,
    members_at_once,
    stack,
)
from crossdict_jax.training.stage import timed
from crossdict_jax.workdir import Workdir

CEILING_SEED = 1  # of the dictionary that is compared with that of seed 0
LARGEST_RATE = 1.2e-2  # above it narrow dictionaries, too, lose what they found
DEAD_SHARE = 0.02  # of the rows that training reads: leaves AuxK the larger part to revive
WARMUP_FRACTION = 0.05  # of the steps, for the learning rate
L1_WARMUP_FRACTION = 0.1  # of the steps, for the penalty
# Losses that sum squares over d have their longest gradients in the first steps. Adam remembers
# them for 1 / (1 - b2) steps, more than short trainings have, and later steps are too small: at 300
# steps ReLU then leaves a tenth to a quarter more unexplained at an equal L0.
GRADIENT_CLIP = 1.0  # largest global norm
MOMENTS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}


# ---------------------------------------------------------------- what is trained


class SparseObjective(Objective):
    """Trains sparse codes, dictionaries and crosscoders alike: losses, dead features, constraints.

    The step's memory is ``silent`` int [width]: rows since each feature was active.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        *,
        frozen: Sequence[str],
        settings: Any,
        width: int,
        k_aux: int,
        dead_after: int,
    ):
        """
        Args:
          frozen: parameters that are measured, not trained.
          settings: of the training: steps, batch_size, accumulate, matmul_dtype, l0_target,
            nested_fractions (``SAEConfig``).
        """
        self.graphdef, self.frozen, self.settings = graphdef, tuple(frozen), settings
        self.width, self.k_aux, self.dead_after = width, k_aux, dead_after
        self.parts = settings.accumulate
        dtype = settings.matmul_dtype
        self.dtype = None if dtype == "float32" else jnp.dtype(dtype)
        self.rate_factor, self.penalty_factor = schedules(settings.steps)

    def optimizer(self, fixed):
        def schedule(count):
            return -fixed["rate"] * self.rate_factor(count)

        return optax.chain(
            optax.clip_by_global_norm(GRADIENT_CLIP),
            optax.scale_by_adam(**MOMENTS),
            optax.scale_by_schedule(schedule),
        )

    def start(self, params):
        return jnp.zeros(self.width, jnp.int32)

    def shared(self, memory):
        return (memory >= self.dead_after).sum(axis=1).max()

    def hyper(self, context: Context) -> Hyper:
        return Hyper(
            l1_coefficient=context.fixed["penalty"] * self.penalty_factor(context.number),
            most_dead=context.shared,
            k_aux=self.k_aux,
            l0_target=self.settings.l0_target,
            nested_fractions=self.settings.nested_fractions,
            whole=context.whole,
        )

    def losses(self, module, rows, context, dead):
        """Returns the module's losses of a batch: see ``Dictionary.losses``."""
        how = {"hyper": self.hyper(context), "dead": dead, "dtype": self.dtype}
        return module.losses(rows["x"], y=rows.get("y"), **how)

    def loss(self, params, rows, context):
        dead = context.memory >= self.dead_after
        module = modules.merge(self.graphdef, params)
        loss, terms, f = self.losses(module, rows, context, dead)
        fired = jax.lax.stop_gradient(Fired.of(f))
        metrics = {"l0": fired.l0, **terms, "dead_fraction": dead.mean(dtype=jnp.float32)}
        return loss, (metrics, fired)

    def whole_batch(self, params, parts, context):
        d = modules.merge(self.graphdef, params)
        parts = parts["x"], parts.get("y")
        return whole_batch(d, parts, hyper=self.hyper(context), dtype=self.dtype)

    def join(self, aux: Fired) -> Fired:
        return aux.join()

    def update(self, params, silent, fired: Fired):
        module = modules.merge(self.graphdef, params)
        module.measure(fired.least)
        module.after_update()
        silent = jnp.where(fired.active, 0, silent + self.settings.batch_size)
        return modules.split(module)[1], silent


class DictionaryObjective(SparseObjective):
    """Trains a dictionary or a transcoder from what its rows say before the first step."""

    def __init__(self, sae: SAEConfig, *, d_model: int, d_out: int | None, width: int, k: int):
        self.shape = {"d_model": d_model, "d_out": d_out, "width": width, "k": k}
        graphdef, _ = modules.abstract(lambda: self.build(sae.architecture, jax.random.key(0)))
        super().__init__(
            graphdef,
            frozen=base.find(sae.architecture).measured,
            settings=sae,
            width=width,
            k_aux=(d_out or d_model) // 2,
            dead_after=dead_after(sae),
        )

    def build(self, architecture: str, key: jax.Array) -> Dictionary:
        return base.build(architecture, **self.shape, key=key)

    def init(self, key, fixed):
        fresh = modules.split(self.build(self.settings.architecture, key))[1]
        d = modules.merge(self.graphdef, begin(fresh, fixed["start"]))
        fit_length(d, fixed["start"])
        params = modules.split(d)[1]
        if "params" not in fixed:
            return params
        return jax.tree.map(lambda a, b: jnp.where(fixed["begun"], b, a), params, fixed["params"])


def schedules(steps: int) -> tuple[optax.Schedule, optax.Schedule]:
    """Returns the factors of the rate (warm-up, flat, linear decay) and of L1 (warm-up)."""
    warm, decay = max(1, round(WARMUP_FRACTION * steps)), max(1, steps // 5)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(1 / warm, 1.0, warm),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, decay),
        ],
        [warm, max(warm, steps - decay)],
    )
    return rate, optax.linear_schedule(0.0, 1.0, max(1, round(L1_WARMUP_FRACTION * steps)))


def usual_rate(architecture: str, *, width: int) -> float:
    """Returns Adam's learning rate: 2e-3 at a width of 4096, falling with its square root.

    The law is that of TopK (Gao et al. 2024, arXiv 2406.04093); a class's ``pace`` multiplies it.
    """
    return base.find(architecture).pace * min(LARGEST_RATE, 2e-3 * math.sqrt(4096 / width))


def dead_after(sae: SAEConfig) -> int:
    """Returns how many rows of silence mean that a feature is dead: as set, or a share of all."""
    return sae.dead_after_rows or max(1, round(DEAD_SHARE * sae.steps * sae.batch_size))


# ---------------------------------------------------------------- the members of a run


@dataclasses.dataclass(frozen=True)
class Member:
    """One dictionary of the ensemble.

    Attributes:
      seed: of its initial parameters and of its data order.
      name: its folder: seed-N, and the values of swept fields.
    """

    model: str
    site: Site
    seed: int
    width: int
    k: int
    learning_rate: float
    l1_coefficient: float
    name: str

    @property
    def label(self) -> str:
        return f"{self.model} {self.site} {self.name}"


def members(sae: SAEConfig, sites: Sequence[tuple[str, Site]]) -> list[Member]:
    """Returns every dictionary of a run: model and site x seed x sweep, in that order.

    The folder of a member is ``seed-N``; of the second and later values of a swept field,
    ``seed-N-FIELD-VALUE``, so that ``seed-0`` always is the first.
    """
    values = {field: getattr(sae, field) for field in SWEPT}
    swept = {field: v if isinstance(v, tuple) else (v,) for field, v in values.items()}
    result = []
    for (model, site), seed in itertools.product(sites, range(sae.seeds)):
        for combination in itertools.product(*swept.values()):
            chosen = dict(zip(swept, combination))
            other = [f"{f}-{v:g}" for f, v in chosen.items() if v != swept[f][0]]
            usual = usual_rate(sae.architecture, width=chosen["width"])
            chosen["learning_rate"] = chosen["learning_rate"] or usual
            name = "-".join([f"seed-{seed}", *other])
            result.append(Member(model, site, seed, name=name, **chosen))
    return result


def control_members(config: Config, store: Store) -> list[Member]:
    """Returns the dictionaries that controls need beside those of the run.

    A second seed of every model for the seed-to-seed ceiling, unless the run has one already, and
    one of every re-initialised model, each at the layers that have controls and with the first
    value of a sweep.

    Args:
      store: the one that controls read (see ``activations.untrained``).
    """
    sae = dataclasses.replace(unswept(config.sae), seeds=CEILING_SEED + 1)
    trained = store.models[: len(config.models)]
    sites = [
        (model, Site(layer, config.site))
        for model, layers in zip(trained, controlled_layers(config))
        for layer in layers
    ]
    result = []
    if "ceiling" in config.controls and config.sae.seeds <= CEILING_SEED:
        result += [m for m in members(sae, sites) if m.seed == CEILING_SEED]
    untrained = store.models[len(trained) :]
    sites = [(model, site) for model in untrained for site in store.sites_of(model)]
    return result + [m for m in members(sae, sites) if m.seed == 0]


# ---------------------------------------------------------------- stages


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


def train_control_dictionaries(config: Config, store: Store, work: Workdir) -> None:
    """Trains into ``work.controls`` what ``control_members`` names and is not there yet.

    Raises:
      UserError: see ``train_dictionaries``.
    """
    train_members(config, store, work.controls, control_members(config, store))


def train_members(config: Config, store: Store, work: Workdir, everyone: list[Member]) -> None:
    """Trains those of some dictionaries that are not finished in ``work``."""
    sae, rows = config.sae, store.select("train")
    _check(sae, rows=len(rows))
    folders = {m: work.dictionary(m.model, m.site, m.name) for m in everyone}
    todo = [m for m in everyone if not checkpoint.is_finished(folders[m])]
    with timed(work, "train_saes") as figures:
        for group in _groups(sae, store, todo, rows=len(rows)):
            first = group[0]
            tag = f"{first.model}-{first.site}-{first.name}-width{first.width}-k{first.k}"
            directory = work.dictionaries / "training" / tag
            trained = train_from(config, store, group, directory=directory)
            for member, dictionary in zip(group, trained):
                meta = dataclasses.asdict(member) | {"site": str(member.site), "steps": sae.steps}
                if dictionary.transcodes:
                    model, site = store.output_of(member.model, member.site)
                    meta |= {"writes": [model, str(site)]}
                base.save(dictionary, folders[member], meta=meta)
            shutil.rmtree(directory / "checkpoints")
        if todo:
            figures |= {"dictionaries": len(todo), "rows": len(todo) * sae.steps * sae.batch_size}


def _check(sae: SAEConfig, *, rows: int) -> None:
    widths = sae.width if isinstance(sae.width, tuple) else (sae.width,)
    ks = sae.k if isinstance(sae.k, tuple) else (sae.k,)
    base.find(sae.architecture)
    if min(ks) < 1 and has_k(sae.architecture):
        raise UserError(f"sae.k={min(ks)} must be 1 or more; with none no feature is active.")
    if max(ks) > min(widths) and has_k(sae.architecture):
        raise UserError(f"sae.k={max(ks)} is more than sae.width={min(widths)}; lower k.")
    if sae.batch_size > rows:
        raise UserError(
            f"sae.batch_size={sae.batch_size} is more than the {rows} training rows; lower it or "
            "raise text.documents."
        )


def _groups(sae: SAEConfig, store: Store, todo: list[Member], *, rows: int) -> list[list[Member]]:
    """Ensembles of equal shape, each small enough for the device."""

    def shape(member):
        d_model, d_out = sizes(store, member)
        return d_model, d_out or 0, member.width, member.k

    groups = []
    for (d_model, d_out, width, _), same in itertools.groupby(sorted(todo, key=shape), key=shape):
        same = list(same)
        one = member_bytes(sae, d_model=d_model, width=width, d_out=d_out)
        limit = members_at_once(one, rows=2 * rows * (d_model + d_out))
        groups += [same[at : at + limit] for at in range(0, len(same), limit)]
    return groups


def sizes(store: Store, member: Member) -> tuple[int, int | None]:
    """Returns (d_model, d_out) of what a member reads and, of a transcoder, writes; else None."""
    reads = (member.model, member.site)
    model, site = store.output_of(*reads)
    d_out = None if (model, site) == reads else store.d_model(model)
    return store.d_model(member.model), d_out


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


def train_from(
    config: Config,
    store: Store,
    group: list[Member],
    starts: Sequence[Dictionary | None] | None = None,
    *,
    directory: Path,
) -> list[Dictionary]:
    """Returns trained members of equal shape; ``directory`` keeps checkpoints and metrics.

    Members with equal seeds see the same rows in the same order, whatever they begin at.

    Args:
      starts: per member its first parameters, or None for random ones.
    """
    sae, rows = config.sae, store.select("train")
    _check(sae, rows=len(rows))
    ensemble = prepare(sae, store, group, rows, starts=starts)
    kind = "transcoders" if sizes(store, group[0])[1] else "dictionaries"
    trained = ensemble.fit(
        steps=sae.steps,
        seed=config.seed,
        directory=directory,
        checkpoint_every=config.checkpoint_every,
        title=f"{len(group)} {sae.architecture} {kind}, width {group[0].width}",
        meta={"sae": dataclasses.asdict(sae), "rows": len(rows)},
        records=config.records,
    )
    return [modules.merge(ensemble.objective.graphdef, params) for params in trained]


def prepare(
    sae: SAEConfig,
    store: Store,
    group: list[Member],
    rows: np.ndarray,
    *,
    starts: Sequence[Dictionary | None] | None = None,
    resident: bool | None = None,
) -> Ensemble:
    """Returns members that share d_model, width and k, ready to be trained on these rows [n].

    Args:
      starts: see ``train_from``.
      resident: see ``row_feed``.
    """
    d_model, d_out = sizes(store, group[0])
    sites = list(dict.fromkeys((m.model, m.site) for m in group))
    data = {"x": [store.read(*site, rows) for site in sites]}
    if d_out:
        data["y"] = [store.read(*store.output_of(*site), rows) for site in sites]
    for site, *arrays in zip(sites, *data.values()):
        for end, array in zip((site, store.output_of(*site)), arrays):
            check_rows(array, " ".join(map(str, end)), rows)
    start = [start_of(*arrays) for arrays in zip(*data.values())]
    source = np.asarray([sites.index((m.model, m.site)) for m in group])
    fixed = {
        "id": np.asarray([m.seed for m in group], np.uint32),
        "rate": np.asarray([m.learning_rate for m in group], np.float32),
        "penalty": np.asarray([m.l1_coefficient for m in group], np.float32),
        "start": stack([start[i] for i in source]),
    }
    labels = [m.label for m in group]
    objective = DictionaryObjective(
        sae, d_model=d_model, d_out=d_out, width=group[0].width, k=group[0].k
    )
    if starts is not None:
        first = [modules.split(d)[1] for d in starts if d is not None]
        params = [first[0] if d is None else modules.split(d)[1] for d in starts]
        fixed |= {"params": stack(params), "begun": np.asarray([d is not None for d in starts])}
        labels = [f"{m} {'random' if d is None else 'begun'}" for m, d in zip(labels, starts)]
    return make_ensemble(
        objective,
        fixed=fixed,
        labels=labels,
        streams={name: Stream(np.stack(arrays), source) for name, arrays in data.items()},
        seeds=[m.seed for m in group],
        batch_size=sae.batch_size,
        setting="sae.batch_size",
        resident=resident,
    )
