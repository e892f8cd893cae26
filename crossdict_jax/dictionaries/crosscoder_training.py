"""Trains crosscoders: of arrays, and of a run's paired rows, members of equal shape together."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crossdict_jax import modules
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config, CrosscoderConfig, crosscoder_settings, layer_pairs
from crossdict_jax.dictionaries import crosscoder
from crossdict_jax.dictionaries.crosscoder import Crosscoder, Hyper
from crossdict_jax.dictionaries.train import schedules
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site
from crossdict_jax.training import checkpoint
from crossdict_jax.training.adam import MOMENTS
from crossdict_jax.training.loop import Feed, Trainable, epoch_order, train
from crossdict_jax.training.mesh import DATA, MEMBER, from_bits, make_mesh, put, shard, to_bits
from crossdict_jax.training.stage import device_figures
from crossdict_jax.workdir import Workdir, write_json

CONTROLS = ("self", "rotated")  # the first model against itself, and against a rotated copy


@dataclasses.dataclass(frozen=True)
class Rows:
    """What one crosscoder is trained on.

    Attributes:
      label: names it in logs and errors.
      views: per model raw activations [n, d_m]; row i of all is one text position.
      seed: of its initial parameters, of its data order and of what is dropped.
      orders: per model the order int [n] in which its rows stand beside the others'; None: as
        they are. Random orders make shuffled pairs.
    """

    label: str
    views: tuple[np.ndarray, ...]
    seed: int
    orders: tuple[np.ndarray | None, ...] | None = None

    @property
    def shapes(self) -> tuple:
        return tuple(view.shape for view in self.views)


def shuffles(n: int, *, models: int, seed: int) -> tuple[np.ndarray | None, ...]:
    """Returns orders that leave the first model's rows and permute each other one's by itself."""
    generators = [np.random.Generator(np.random.Philox(key=[seed, m])) for m in range(1, models)]
    return (None, *(g.permutation(n).astype(np.int32) for g in generators))


def fit_crosscoders(
    rows: Sequence[Rows], config: CrosscoderConfig, *, directory: Path
) -> list[Crosscoder]:
    """Returns a trained crosscoder for each of ``rows``, in their order.

    All of equal shapes are one ensemble in one compiled step. ``directory/N`` keeps checkpoints,
    metrics and labels of each group, so that a killed run goes on and ends with the same bits.

    Raises:
      UserError: a batch is larger than the rows or does not divide over the devices, or a loss
        is not finite.
    """
    groups: dict[tuple, list[int]] = {}
    for i, one in enumerate(rows):
        _check(one, config)
        groups.setdefault(one.shapes, []).append(i)
    fitted: dict[int, Crosscoder] = {}
    for number, members in enumerate(groups.values()):
        ensemble = _Ensemble([rows[i] for i in members], config)
        fitted |= zip(members, ensemble.fit(Path(directory) / str(number)))
    return [fitted[i] for i in range(len(rows))]


def _check(rows: Rows, config: CrosscoderConfig) -> None:
    n = len(rows.views[0])
    if config.batch_size > n:
        raise UserError(
            f"crosscoder.batch_size={config.batch_size} is more than the {n} training rows of "
            f"{rows.label}; lower it or raise text.documents."
        )
    if any(len(view) != n for view in rows.views):
        raise UserError(f"The views of {rows.label} differ in length; row i must be one position.")


class _Ensemble:
    """Members of equal shapes, their parameters stacked on a leading axis."""

    def __init__(self, members: list[Rows], config: CrosscoderConfig):
        self.members, self.config = members, config
        self.mesh = make_mesh(members=len(members))
        over_data = self.mesh.shape[DATA]
        if config.batch_size % over_data:
            raise UserError(
                f"crosscoder.batch_size={config.batch_size} cannot be shared by {over_data} "
                f"devices; use a multiple of {over_data}."
            )
        self.n = len(members[0].views[0])
        self.d_models = tuple(view.shape[1] for view in members[0].views)
        self.shape = {
            "d_models": self.d_models,
            "width": config.width,
            "k": config.k,
            "shared_fraction": config.shared_fraction,
        }
        self.graph, _ = modules.abstract(lambda: self._build(jax.random.key(0)))

    def _build(self, key: jax.Array) -> Crosscoder:
        return crosscoder.build(self.config.variant, **self.shape, key=key)

    def fit(self, directory: Path) -> list[Crosscoder]:
        labels = [member.label for member in self.members]
        write_json(directory / "members.json", [{"label": label} for label in labels])
        state = train(
            self._trainable(),
            feed=self._feed(),
            steps=self.config.steps,
            seed=0,  # members fold their own seeds in, so that who else is trained changes nothing
            directory=directory,
            checkpoint_every=self.config.checkpoint_every,
            what=f"{len(labels)} crosscoders of {'+'.join(map(str, self.d_models))}",
            state_shardings=lambda a: jax.tree.map(lambda _: shard(self.mesh, MEMBER), a),
            meta={
                "members": labels,
                "seeds": [member.seed for member in self.members],
                "crosscoder": dataclasses.asdict(self.config),
                "rows": [self.n, *self.d_models],
            },
        )
        everywhere = jax.jit(lambda t: t, out_shardings=shard(self.mesh))(state["params"])
        params = jax.tree.map(np.asarray, everywhere)
        return [
            modules.merge(self.graph, jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), params))
            for i in range(len(labels))
        ]

    def _trainable(self) -> Trainable:
        adam, config = optax.scale_by_adam(**MOMENTS), self.config
        seeds = jnp.asarray([member.seed for member in self.members], jnp.uint32)
        statistics = [_statistics(member.views) for member in self.members]
        scales, centers = (jnp.asarray(np.stack(s)) for s in zip(*statistics))

        def init(root):
            def one(seed, scale, center):
                built = self._build(jax.random.fold_in(root, seed))
                # b_dec starts at the mean, so that latents need not spend themselves on it.
                measured = {"scale": scale, "center": center, "b_dec": center}
                params = modules.split(built)[1] | measured
                silent = jnp.zeros(config.width, jnp.int32)
                return {"params": params, "train": {"adam": adam.init(params), "silent": silent}}

            return jax.vmap(one)(seeds, scales, centers)

        def step(state, batch, number, key):
            most_dead = (state["train"]["silent"] >= config.dead_after_rows).sum(axis=1).max()
            keys = jax.vmap(lambda seed: jax.random.fold_in(key, seed))(seeds)
            member = self._member_step(adam, number, most_dead)
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # see mesh.on_own_rows
                return jax.vmap(member, spmd_axis_name=MEMBER)(state, batch, keys)

        return Trainable(init, step)

    def _member_step(self, adam, number, most_dead):
        """The step of one member: (state, rows, key) -> (state, metrics)."""
        config, graph = self.config, self.graph
        rate_factor, l1_factor = schedules(config)
        hyper = Hyper(
            l1_coefficient=config.l1_coefficient * l1_factor(number),
            auxk_coefficient=config.auxk_coefficient,
            k_aux=config.k_aux or sum(self.d_models) // 2,
            most_dead=most_dead,
        )
        dtype = None if config.matmul_dtype == "float32" else jnp.dtype(config.matmul_dtype)

        def step(state, x, key):
            params, train_state = state["params"], state["train"]
            dead = train_state["silent"] >= config.dead_after_rows
            present = draw_present(key, len(x), len(self.d_models), config.drop_probability)

            def loss_of(params):
                joint = modules.merge(graph, params)
                loss, parts, f = joint.losses(
                    x, present=present, hyper=hyper, dead=dead, dtype=dtype
                )
                return loss, (parts, f)

            (loss, (parts, f)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
            grads |= {name: jnp.zeros_like(grads[name]) for name in Crosscoder.measured}
            updates, adam_state = adam.update(grads, train_state["adam"], params)
            rate = config.learning_rate * rate_factor(number)
            updates = jax.tree.map(lambda u: -rate * u, updates)
            params = _updated(graph, optax.apply_updates(params, updates), f)
            active = f > 0
            silent = jnp.where(active.any(axis=0), 0, train_state["silent"] + len(x))
            metrics = {"loss": loss, "l0": active.sum(axis=1).mean(dtype=jnp.float32)}
            metrics |= parts | {"dead_fraction": dead.mean(dtype=jnp.float32)}
            return {"params": params, "train": {"adam": adam_state, "silent": silent}}, metrics

        return step

    def _feed(self) -> Feed:
        """Every distinct view lies on the devices once, whatever members and orders read it."""
        views, which_view = _distinct([member.views for member in self.members])
        plain = (None,) * len(self.d_models)
        orders, which_order = _distinct([member.orders or plain for member in self.members])
        straight = np.arange(self.n, dtype=np.int32)
        orders = [[straight if o is None else o for o in per_model] for per_model in orders]
        everywhere = shard(self.mesh)
        resident = {
            "views": [put(to_bits(np.stack(per_model)), everywhere) for per_model in views],
            "orders": [put(np.stack(per_model), everywhere) for per_model in orders],
        }
        batch = self.config.batch_size
        seeds = sorted({member.seed for member in self.members})
        seed_of = jnp.asarray([seeds.index(member.seed) for member in self.members])

        def indices(first: int, count: int) -> np.ndarray:
            span = {"start": first * batch, "count": count * batch, "n": self.n}
            return np.stack(
                [epoch_order(seed, **span).reshape(count, batch) for seed in seeds], axis=1
            )  # [steps, seeds, batch]

        def select(resident, places):
            places = places[seed_of]  # [members, batch]
            parts = []
            for m, (view, order) in enumerate(zip(resident["views"], resident["orders"])):
                rows = order[which_order[m][:, None], places]
                parts.append(from_bits(view[which_view[m][:, None], rows]))
            x = jnp.concatenate(parts, axis=-1)
            return jax.lax.with_sharding_constraint(x, shard(self.mesh, MEMBER, DATA))

        return Feed(resident, indices, select)


def _updated(graph, params, f):
    joint = modules.merge(graph, params)
    joint.measure(f)
    joint.after_update()
    return modules.split(joint)[1]


def _distinct(per_member: list[Sequence]) -> tuple[list[list], list[jax.Array]]:
    """Returns per model its distinct objects, and int [members], which of them a member has."""
    distinct, which = [], []
    for column in zip(*per_member):
        known = {id(one): one for one in column}
        distinct.append(list(known.values()))
        which.append(jnp.asarray([list(known).index(id(one)) for one in column]))
    return distinct, which


def _statistics(views: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns scale [N] and scaled mean [D]: all models get the mean d_model as their variance."""
    variance = np.mean([view.shape[1] for view in views])
    scales, centers = [], []
    for view in views:
        mean, power = moments(view)
        scales.append(np.sqrt(variance / max(power, 1e-12)))
        centers.append(scales[-1] * mean)
    return np.asarray(scales, np.float32), np.concatenate(centers).astype(np.float32)


def moments(view: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the mean [d] and the mean squared distance to it of rows [n, d], in float64."""
    blocks = [slice(at, at + 8192) for at in range(0, len(view), 8192)]
    mean = sum(view[b].sum(axis=0, dtype=np.float64) for b in blocks) / len(view)
    power = sum(np.square(view[b].astype(np.float64) - mean[None, :]).sum() for b in blocks)
    return mean, float(power / len(view))


def draw_present(key: jax.Array, batch: int, models: int, drop: float) -> jax.Array:
    """Returns bool [batch, models]: a random one stays, each other is dropped with that chance."""
    stays, others = jax.random.split(key)
    kept = jax.random.randint(stays, (batch, 1), 0, models) == jnp.arange(models)[None, :]
    return kept | jax.random.bernoulli(others, 1 - drop, (batch, models))


# ---------------------------------------------------------------- a run's crosscoders


def joint_sites(config: Config, store: Store) -> list[tuple[Site, ...]]:
    """Returns the layer tuples of a run: a site of every model, one tuple for each layer pair."""
    return [
        tuple(Site(pair[min(m, 1)], config.site) for m in range(len(store.models)))
        for pair in layer_pairs(config)
    ]


def train_crosscoders(config: Config, store: Store, work: Workdir) -> None:
    """Trains the run's crosscoders that are not there yet; each gets a folder of its own.

    For every layer tuple one of all models on aligned rows, and its control on shuffled rows; for
    the first ``crosscoder.self_nulls`` layer tuples also the first model beside itself, and beside
    a rotated copy of itself. Killed and run again, it ends with the same bits.

    Raises:
      UserError: see ``fit_crosscoders``.
    """
    places = [place for place, _ in planned(config, store, with_rows=False)]
    todo = [place for place in places if not checkpoint.is_finished(work.crosscoder(*place))]
    if not todo:
        return
    started, directory = time.perf_counter(), work.crosscoders / "training"
    rows = [rows for _, rows in planned(config, store, with_rows=True)]
    settings = crosscoder_settings(config)
    fitted = fit_crosscoders(rows, settings, directory=directory)
    for place, one in zip(places, fitted):
        if place in todo:
            crosscoder.save(one, work.crosscoder(*place), meta={"steps": settings.steps})
    for finished in directory.glob("*/checkpoints"):
        shutil.rmtree(finished)
    wall = time.perf_counter() - started
    seen = len(places) * settings.steps * settings.batch_size
    figures = {"crosscoders": len(places), "rows_per_s": seen / wall}
    work.record_timing("train_crosscoders", wall_s=wall, **figures, **device_figures())


def planned(
    config: Config, store: Store, *, with_rows: bool
) -> Iterator[tuple[tuple[tuple[Site, ...], str], Rows | None]]:
    """Yields ((sites, name), training rows) of every crosscoder of a run."""
    numbers, seed = store.select("train"), config.seed
    order = shuffles(len(numbers), models=len(store.models), seed=seed) if with_rows else None
    for place, sites in enumerate(joint_sites(config, store)):
        views = tuple(
            store.read(model, site, numbers) if with_rows else None
            for model, site in zip(store.models, sites)
        )
        label = " ".join(f"{m} {s}" for m, s in zip(store.models, sites))
        for name, orders in (("aligned", None), ("shuffled", order)):
            rows = Rows(f"{label} {name}", views, seed, orders) if with_rows else None
            yield (sites, name), rows
        if place < config.crosscoder.self_nulls:
            for name in CONTROLS:
                label = f"{store.models[0]} {sites[0]} {name}"
                rows = Rows(label, copies(views[0], name, seed), seed) if with_rows else None
                yield ((sites[0], sites[0]), name), rows


def copies(x: np.ndarray, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows [n, d] beside themselves ("self"), or beside a random rotation of them."""
    if name == "self":
        return x, x
    return x, (x.astype(np.float32) @ rotation(x.shape[1], seed)).astype(x.dtype)


def rotation(d: int, seed: int) -> np.ndarray:
    """Returns a random orthogonal matrix float32 [d, d]."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    Q, R = np.linalg.qr(generator.standard_normal((d, d)))
    return (Q * np.sign(np.diag(R))[None, :]).astype(np.float32)
