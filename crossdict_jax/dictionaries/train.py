"""Trains all dictionaries of a run: members of equal shape as one ensemble."""

import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config, JointSettings, SAEConfig, controlled_layers, swept, unswept
from crossdict_jax.dictionaries import base, pretrained
from crossdict_jax.dictionaries.base import Dictionary, Hyper, power
from crossdict_jax.dictionaries.start import begin, check_rows, fit_length, start_of
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site
from crossdict_jax.ops import activity, decode, fastest_products, nth_largest
from crossdict_jax.training import checkpoint, loop
from crossdict_jax.training.ensemble import (
    Context,
    Ensemble,
    Objective,
    Stream,
    make_ensemble,
    members_at_once,
    stack,
)
from crossdict_jax.training.mesh import DATA, GPUS, all_devices, make_mesh, product_dtype
from crossdict_jax.training.stage import timed
from crossdict_jax.workdir import Workdir

CEILING_SEED = 1  # of the dictionary that is compared with that of seed 0
LARGEST_RATE = 1.2e-2  # above it narrow dictionaries, too, lose what they found
DEAD_SHARE = 0.02  # of the rows that training reads: leaves AuxK the larger part to revive
FEW = 8  # dead features are few up to this part of the width: then AuxK takes these alone
WARMUP_FRACTION = 0.05  # of the steps, for the learning rate
L1_WARMUP_FRACTION = 0.1  # of the steps, for the penalty
# Largest global norm. Losses that sum squares have their longest gradients in the first steps, and
# Adam remembers them for 1 / (1 - b2): at 300 steps ReLU would leave a tenth to a quarter more.
GRADIENT_CLIP = 1.0


class SparseObjective(Objective):
    """Trains sparse codes.

    The memory is int [width]: rows since each feature was active. The variant is how many dead
    features AuxK makes room for: enough for the member that had most. ``totals`` fill ``Hyper``
    without a [batch, width] array, but one for architectures that choose over the batch.
    """

    def __init__(self, build: Callable[..., Dictionary], settings: SAEConfig):
        module = nnx.eval_shape(lambda: build(key=jax.random.key(0)))
        self.build, self.settings, self.k_aux = build, settings, module.d_out // 2
        self.graphdef, self.frozen = nnx.split(module)[0], module.measured
        self.revives, self.width = module.revives, module.width
        self.memory, self.parts = np.zeros(module.width, np.int32), settings.accumulate
        self.dtype = product_dtype(settings.matmul_dtype)
        seen = settings.steps * settings.batch_size
        after = settings.dead_after_rows or max(1, round(DEAD_SHARE * seen))
        self.dead_after = min(after, 2**30)  # of int32

    def variant(self, memories):  # once a chunk, for all: others, too, decide when AuxK begins
        if not self.revives:
            return 0
        n_dead = int((memories >= self.dead_after).sum(axis=1).max())
        return next(n for n in (0, self.width // FEW, self.width) if n_dead <= n)

    def optimizer(self, fixed):
        """Clipped Adam; the rate warms up, stays, and falls to 0 over the last fifth of steps."""
        steps = self.settings.steps
        warm, decay = max(1, round(WARMUP_FRACTION * steps)), max(1, steps // 5)
        rise = optax.linear_schedule(1 / warm, 1.0, warm)
        fall = optax.linear_schedule(1.0, 0.0, decay)
        factor = optax.join_schedules([rise, fall], [max(warm, steps - decay)])
        return optax.chain(
            optax.clip_by_global_norm(GRADIENT_CLIP),
            optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
            optax.scale_by_schedule(lambda count: -fixed["rate"] * factor(count)),
        )

    def pair(self, rows, context) -> tuple:
        """Returns x and y of ``Dictionary.losses``."""
        return rows["x"], rows.get("y")

    def hyper(self, context: Context) -> Hyper:
        warm = max(1, round(L1_WARMUP_FRACTION * self.settings.steps))
        factor = optax.linear_schedule(0.0, 1.0, warm)(context.number)
        return Hyper(
            l1_coefficient=context.fixed["penalty"] * factor,
            revived=context.variant,
            k_aux=self.k_aux,
            dead=context.memory >= self.dead_after,
            dtype=self.dtype,
            l0_target=self.settings.l0_target,
            nested_fractions=self.settings.nested_fractions,
            rows=self.settings.batch_size,
            products=None if self.settings.products == "auto" else self.settings.products,
            **context.totals or {},
        )

    def loss(self, params, rows, context):
        (x, y), hyper = self.pair(rows, context), self.hyper(context)
        loss, terms, f = modules.merge(self.graphdef, params).losses(x, hyper, y)
        active, l0, smallest = jax.lax.stop_gradient(activity(f))
        metrics = {"l0": l0, **terms, "dead_fraction": hyper.dead.mean(dtype=jnp.float32)}
        return loss, (metrics, (active, smallest))

    def totals(self, params, parts, context):
        d, over = modules.merge(self.graphdef, params), jax.lax.map
        u, t = over(lambda part: d.scaled_pair(part["x"], part.get("y")), parts)

        def variance(x):
            mean = x.mean(axis=(0, 1))
            return over(lambda part: power(part - mean[None, :]), x).mean()

        def residual(pair):
            u, t = pair
            u_hat = decode(d.training_code(u, hyper), d.W_dec[...], self.dtype)
            return t - u_hat - d.b_dec[...][None, :]

        totals = {"variance": variance(t)}
        if d.selects_over_rows:
            z = over(lambda part: jax.nn.relu(d.pre_activations(part, self.dtype)), u)
            z = z.swapaxes(0, 1).reshape(-1, d.width)  # rows stay on their devices
            totals["threshold"] = nth_largest(z, d.k * len(z))
        hyper = dataclasses.replace(self.hyper(context), **totals)
        if hyper.revived:
            totals["residual_variance"] = variance(over(residual, (u, t)))
        l0 = over(lambda part: activity(d.training_code(part, hyper))[1], u)
        return totals | {"l0": l0.mean()}

    def after_step(self, params, silent, aux):
        module, (active, smallest) = modules.merge(self.graphdef, params), aux
        module.after_update(smallest.min())
        silent = jnp.minimum(silent, self.dead_after) + self.settings.batch_size  # no overflow
        silent = jnp.where(active.any(axis=0), 0, silent)
        return modules.split(module)[1], silent


class DictionaryObjective(SparseObjective):
    """Trains a dictionary or a transcoder from a start that its rows determine."""

    def __init__(self, sae: SAEConfig, **shape: int | None):
        super().__init__(partial(base.build, sae.architecture, **shape), sae)

    def init(self, key, fixed):
        d = self.build(key=key)
        begin(d, fixed["start"])
        fit_length(d, fixed["start"])
        params = modules.split(d)[1]
        if "params" not in fixed:
            return params
        return jax.tree.map(lambda a, b: jnp.where(fixed["begun"], b, a), params, fixed["params"])


def usual_rate(architecture: str, *, width: int) -> float:
    """Returns Adam's learning rate: 2e-3 at a width of 4096, falling with its square root.

    As of TopK (Gao et al. 2024, arXiv 2406.04093), times the class's ``pace``.
    """
    return base.find(architecture).pace * min(LARGEST_RATE, 2e-3 * math.sqrt(4096 / width))


@dataclasses.dataclass(frozen=True)
class Member:
    """One dictionary of the ensemble."""

    model: str
    site: Site
    seed: int  # of initial parameters and data order
    width: int
    k: int
    learning_rate: float
    l1_coefficient: float
    name: str  # its folder: seed-N, and the values of swept fields


def members(sae: SAEConfig, sites: Sequence[tuple[str, Site]]) -> list[Member]:
    """Returns every dictionary of a run: model and site x seed x sweep, in that order.

    Later values of a swept field are ``seed-N-FIELD-VALUE``: ``seed-0`` always is the first.
    """
    result, values = [], swept(sae)
    for end, seed, *chosen in itertools.product(sites, range(sae.seeds), *values.values()):
        fields = dict(zip(values, chosen))
        other = [f"{f}-{v:.9g}" for f, v in fields.items() if v != values[f][0]]
        usual = usual_rate(sae.architecture, width=fields["width"])
        fields["learning_rate"] = fields["learning_rate"] or usual
        result.append(Member(*end, seed, name="-".join([f"seed-{seed}", *other]), **fields))
    return result


def control_members(config: Config, store: Store) -> list[Member]:
    """Returns the dictionaries that controls need beside those of the run.

    A second seed of every model for the seed-to-seed ceiling, unless the run has one, and one of
    every re-initialised model, at the layers that have controls and with the first value of a
    sweep.
    """
    sae = dataclasses.replace(unswept(config.sae), seeds=CEILING_SEED + 1)
    n, ceiling = len(config.models), []
    if "ceiling" in config.controls and config.sae.seeds <= CEILING_SEED:
        layers = zip(store.models[:n], controlled_layers(config))
        ceiling = [(model, Site(layer, config.site)) for model, those in layers for layer in those]
    untrained = [(model, site) for model in store.models[n:] for site in store.sites_of(model)]
    wanted = ((CEILING_SEED, ceiling), (0, untrained))
    return [m for seed, sites in wanted for m in members(sae, sites) if m.seed == seed]


def train_dictionaries(
    config: Config, store: Store, work: Workdir, controls: Store | None = None
) -> None:
    """Trains the missing dictionaries of a run; interrupted, it ends with the same bits.

    Models with dictionaries from ``sae.sources`` train none.

    Args:
      controls: the store that controls read; ``control_members`` are trained too, into
        ``work.controls``.

    Raises:
      UserError: a batch larger than the training rows, rows that are not finite or never vary, or
        a loss that is not finite.
    """
    adopted = pretrained.adopt(config, store, work)
    sites = [(m, s) for m in store.models if m not in adopted for s in store.sites_of(m)]
    train_members(config, store, work, members(config.sae, sites))
    if controls:
        train_members(config, controls, work.controls, control_members(config, controls))


def train_members(config: Config, store: Store, work: Workdir, everyone: list[Member]) -> None:
    """Trains members, each into a folder of its own in ``work``, unless it is finished.

    Those that share d_model, width and k are one ensemble, split if too large for the device. It is
    trained whole where one is missing: alone, a member would end with other bits.
    """
    sae, n_rows = config.sae, len(store.select("train"))
    folders, new = {m: work.dictionary(m.model, m.site, m.name) for m in everyone}, 0
    with timed(work, "train_saes") as figures:
        for group in grouped(sae, store, everyone, n_rows):
            todo = [m for m in group if not checkpoint.is_finished(folders[m])]
            if not todo:
                continue
            first = group[0]
            tag = f"{first.model}-{first.site}-{first.name}-width{first.width}-k{first.k}"
            directory = work.dictionaries / "training" / tag
            trained = train_from(config, store, group, directory=directory)
            for member, dictionary in zip(group, trained):
                if member not in todo:
                    continue
                meta = vars(member) | {"site": str(member.site), "steps": sae.steps}
                meta["path"] = store.paths[store.models.index(member.model)]
                if dictionary.transcodes:
                    model, site = store.output_of(member.model, member.site)
                    meta |= {"writes": [model, str(site)]}
                base.save(dictionary, folders[member], meta=meta)
            shutil.rmtree(directory / "checkpoints")
            new += len(todo)
        if new:
            figures |= {"dictionaries": new, "rows": new * sae.steps * sae.batch_size}


def grouped(
    sae: SAEConfig, store: Store, everyone: list[Member], n_rows: int
) -> list[list[Member]]:
    """Returns members in groups of equal shapes that fit the devices' memory.

    A member takes at most, whatever its architecture, five float32 copies of the parameters
    (themselves, two moments, gradients, one while they are updated) and six [batch, width] arrays
    at the widest point of a step, of a part of the batch with ``sae.accumulate``; choosing features
    over all rows holds one more, of all rows.
    """
    alike, groups = {}, []
    for member in everyone:
        alike.setdefault((*sizes(store, member), member.width, member.k), []).append(member)
    live = 6 * sae.batch_size // sae.accumulate
    if sae.accumulate > 1 and base.find(sae.architecture).selects_over_rows:
        live += sae.batch_size
    for (d_model, d_out, width, _), same in alike.items():
        both, written = d_model + (d_out or d_model), d_out or d_model
        size = 4 * (5 * (both * width + width + written) + live * width + 2 * sae.batch_size * both)
        limit = members_at_once(size, rows=2 * n_rows * (d_model + (d_out or 0)))
        groups += [same[at : at + limit] for at in range(0, len(same), limit)]
    return groups


def sizes(store: Store, member: Member) -> tuple[int, int | None]:
    """Returns (d_model, d_out) of a member; d_out is None unless it is a transcoder."""
    reads = (member.model, member.site)
    writes = store.output_of(*reads)
    return store.d_model(member.model), None if writes == reads else store.d_model(writes[0])


def train_from(
    config: Config,
    store: Store,
    group: list[Member],
    starts: Sequence[Dictionary | None] | None = None,
    *,
    directory: Path,
) -> list[Dictionary]:
    """Returns trained members of equal shape; ``directory`` keeps checkpoints and metrics.

    ``starts`` are per member its first parameters, or None for random ones.
    """
    sae, rows, first = config.sae, store.select("train"), group[0]
    shape = {"rows": sae.batch_size // sae.accumulate, "width": first.width, "k": first.k}
    sae = with_products(sae, **shape, members=len(group), directory=directory)
    ensemble = prepare(sae, store, group, rows, starts=starts)
    kind = "transcoders" if sizes(store, group[0])[1] else "dictionaries"
    trained = loop.train(
        ensemble,
        steps=sae.steps,
        seed=config.seed,
        directory=directory,
        checkpoint_every=config.checkpoint_every,
        title=f"{len(group)} {sae.architecture} {kind}, width {group[0].width}",
        meta={"settings": dataclasses.asdict(sae), "rows": len(rows)},
        records=config.records,
    )
    return [modules.merge(ensemble.objective.graphdef, params) for params in trained]


def with_products(
    settings: SAEConfig | JointSettings,
    *,
    rows: int,
    width: int,
    k: int,
    members: int,
    directory: Path | None = None,
) -> SAEConfig | JointSettings:
    """Returns settings with the products of sparse codes: as asked, or chosen and then kept.

    The choice depends on the machine, so a resumed training reads it from the checkpoint in
    ``directory``, if any. ``rows`` are those of a batch, or of a part of it.

    Raises:
      UserError: the machine cannot take the products that are asked for.
    """
    asked, mesh = settings.products, make_mesh(members=members, batch=rows)
    if asked in ("lists", "kernels") and mesh.shape[DATA] > 1:
        raise UserError(
            f"sae.products={asked} is for one device to a dictionary; use auto or dense."
        )
    if (chosen := asked) == "auto":
        if directory and checkpoint.is_finished(checkpoints := directory / "checkpoints"):
            chosen = checkpoint.load_meta(checkpoints).get("settings", {}).get("products", "dense")
        else:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                chosen = fastest_products(rows * width, rows * k)
    began = "this training began with them, so go on there"
    check_products(chosen, began if asked == "auto" else "use auto, dense or lists")
    return dataclasses.replace(settings, products=chosen)


def check_products(products: str, mend: str = "use auto, dense or lists") -> None:
    """Raises UserError for kernels without a GPU."""
    if products == "kernels" and all_devices()[0].platform not in GPUS:
        raise UserError(f"sae.products=kernels needs a GPU; {mend}.")


def prepare(
    sae: SAEConfig,
    store: Store,
    group: list[Member],
    rows: np.ndarray,
    *,
    starts: Sequence[Dictionary | None] | None = None,
    resident: bool | None = None,
) -> Ensemble:
    """Returns the ensemble of members that share d_model, width and k, on these rows [n].

    For ``starts`` see ``train_from``, for ``resident`` ``make_ensemble``.
    """
    if sae.batch_size > len(rows):
        raise UserError(
            f"sae.batch_size={sae.batch_size} is more than the {len(rows)} training rows; lower it "
            "or raise text.documents."
        )
    d_model, d_out = sizes(store, group[0])
    sites = list(dict.fromkeys((m.model, m.site) for m in group))
    ends = {"x": sites} | ({"y": [store.output_of(*site) for site in sites]} if d_out else {})
    data = {name: [store.read(*end, rows) for end in those] for name, those in ends.items()}
    for name, arrays in data.items():
        for (model, site), array in zip(ends[name], arrays):
            check_rows(array, f"{model} {site}", rows)
    start = [start_of(*arrays) for arrays in zip(*data.values())]
    source = np.asarray([sites.index((m.model, m.site)) for m in group])
    fixed = {
        "id": np.asarray([m.seed for m in group], np.uint32),
        "rate": np.asarray([m.learning_rate for m in group], np.float32),
        "penalty": np.asarray([m.l1_coefficient for m in group], np.float32),
        "start": stack([start[i] for i in source]),
    }
    labels = [f"{m.model} {m.site} {m.name}" for m in group]
    if starts is not None:
        begun = [d is not None for d in starts]
        anyone = starts[begun.index(True)]
        params = stack([modules.split(d or anyone)[1] for d in starts])
        fixed |= {"params": params, "begun": np.asarray(begun)}
        labels = [f"{m} {'begun' if d else 'random'}" for m, d in zip(labels, begun)]
    shape = {"d_model": d_model, "d_out": d_out, "width": group[0].width, "k": group[0].k}
    return make_ensemble(
        DictionaryObjective(sae, **shape),
        fixed=fixed,
        labels=labels,
        streams={name: Stream(np.stack(arrays), source) for name, arrays in data.items()},
        seeds=[m.seed for m in group],
        batch_size=sae.batch_size,
        setting="sae.batch_size",
        resident=resident,
    )
