"""Trains crosscoders on arrays or on a run's paired rows."""

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import modules, stats
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config, JointSettings, SAEConfig, crosscoder_settings, layer_pairs
from crossdict_jax.dictionaries import base
from crossdict_jax.dictionaries.crosscoder import Crosscoder
from crossdict_jax.dictionaries.train import SparseObjective, with_products
from crossdict_jax.errors import TooFewRows
from crossdict_jax.models import Site
from crossdict_jax.training import checkpoint
from crossdict_jax.training.ensemble import Ensemble, Stream, make_ensemble
from crossdict_jax.training.loop import train
from crossdict_jax.training.stage import timed
from crossdict_jax.workdir import Workdir

CONTROLS = ("self", "rotated")  # the first model against itself, and against a rotated copy


@dataclasses.dataclass(frozen=True)
class Rows:
    """The training rows of one crosscoder."""

    label: str  # names it in logs and errors
    views: tuple[np.ndarray, ...]  # per model [n, d_m], raw; row i of all is one text position
    seed: int  # of initial parameters, data order and what is dropped
    orders: tuple[np.ndarray | None, ...] | None = None  # int [n] of shuffled pairs; see ``Stream``
    dictionaries: Sequence[str] = ()  # checksums of those that the rows come from


class CrosscoderObjective(SparseObjective):
    """Trains a crosscoder on all models' rows side by side, some models left out at random."""

    def __init__(self, joint: JointSettings, d_models: Sequence[int]):
        self.joint, self.d_models = joint, tuple(d_models)
        shape = {"width": joint.width, "k": joint.k, "shared_fraction": joint.shared_fraction}
        build = functools.partial(Crosscoder, joint.variant, d_models=self.d_models, **shape)
        names = ("steps", "batch_size", "dead_after_rows", "matmul_dtype", "products")
        super().__init__(build, SAEConfig(**{name: getattr(joint, name) for name in names}))

    def init(self, key, fixed):
        # b_dec starts at the mean, so that latents need not spend themselves on it.
        measured = {"scale": fixed["scale"], "center": fixed["center"], "b_dec": fixed["center"]}
        return modules.split(self.build(key=key))[1] | measured

    def pair(self, rows, context):
        n_models = len(self.d_models)
        x = jnp.concatenate([rows[str(m)] for m in range(n_models)], axis=-1)
        # One random model of each row stays, others drop.
        stays, others = jax.random.split(context.key)
        kept = jax.random.randint(stays, (len(x), 1), 0, n_models) == jnp.arange(n_models)[None, :]
        share = 1 - self.joint.drop_probability
        return x, kept | jax.random.bernoulli(others, share, (len(x), n_models))


def fit_crosscoders(
    rows: Sequence[Rows],
    joint: JointSettings,
    *,
    directory: Path,
    checkpoint_every: int = 500,
    records: Sequence[str] = (),
) -> list[Crosscoder]:
    """Returns a trained crosscoder for each of ``rows``, in their order.

    Those of equal shapes are one ensemble, with checkpoints and metrics in ``directory/N``.

    Raises:
      UserError: a batch is larger than the rows, or a loss is not finite.
    """
    groups: dict[tuple, list[Rows]] = {}
    for member in rows:
        n = len(member.views[0])
        if joint.batch_size > n:
            raise TooFewRows(
                f"sae.batch_size={joint.batch_size} is more than the {n} training rows of "
                f"{member.label}; lower it or raise text.documents."
            )
        groups.setdefault(tuple(view.shape for view in member.views), []).append(member)
    fitted: dict[int, Crosscoder] = {}
    for number, (shapes, group) in enumerate(groups.items()):
        folder = Path(directory) / str(number)
        shape = {"rows": joint.batch_size, "width": joint.width, "k": joint.k}
        settings = with_products(joint, **shape, members=len(group), directory=folder)
        ensemble = joint_ensemble(group, settings)
        sizes = "+".join(str(d_model) for _, d_model in shapes)
        seeds = [member.seed for member in group]
        trained = train(
            ensemble,
            steps=joint.steps,
            seed=0,  # members' own seeds tell them apart, whoever else is trained
            directory=folder,
            checkpoint_every=checkpoint_every,
            title=f"{len(group)} crosscoders of {sizes}",
            meta={
                "seeds": seeds,
                "settings": dataclasses.asdict(settings),
                "rows": shapes,
                "dictionaries": [member.dictionaries for member in group],
            },
            records=records,
        )
        for member, params in zip(group, trained):
            fitted[id(member)] = modules.merge(ensemble.objective.graphdef, params)
    return [fitted[id(member)] for member in rows]


def joint_ensemble(members: Sequence[Rows], joint: JointSettings) -> Ensemble:
    """Returns the ensemble of crosscoders of equal shapes.

    Scales give every model the mean d_model as its variance.
    """
    d_models = [view.shape[1] for view in members[0].views]
    scale, center, streams = [], [], {}
    for member in members:
        means, powers = zip(*map(moments, member.views))
        scale.append(np.sqrt(np.mean(d_models) / np.maximum(powers, 1e-12)))
        center.append(np.concatenate([s * mean for s, mean in zip(scale[-1], means)]))
    for m in range(len(d_models)):  # every distinct view once, whatever members and orders read it
        views = {id(member.views[m]): member.views[m] for member in members}
        source = np.asarray([list(views).index(id(member.views[m])) for member in members])
        orders = [member.orders and member.orders[m] for member in members]
        if shuffled := any(order is not None for order in orders):
            straight = np.arange(len(members[0].views[m]), dtype=np.int32)
            orders = np.stack([straight if order is None else order for order in orders])
        x = np.stack(list(views.values()))
        streams[str(m)] = Stream(x, source, orders if shuffled else None)
    n, seeds = len(members), [member.seed for member in members]
    return make_ensemble(
        CrosscoderObjective(joint, d_models),
        fixed={
            "id": np.asarray(seeds, np.uint32),
            "rate": np.full(n, joint.learning_rate, np.float32),
            "penalty": np.full(n, joint.l1_coefficient, np.float32),
            "scale": np.asarray(scale, np.float32),
            "center": np.asarray(center, np.float32),
        },
        labels=[member.label for member in members],
        streams=streams,
        seeds=seeds,
        batch_size=joint.batch_size,
        setting="sae.batch_size",
    )


def moments(view: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the mean [d] and the mean squared distance to it of rows [n, d], in float64."""
    blocks = [slice(at, at + 8192) for at in range(0, len(view), 8192)]
    mean = sum(view[b].sum(axis=0, dtype=np.float64) for b in blocks) / len(view)
    power = sum(np.square(view[b].astype(np.float64) - mean[None, :]).sum() for b in blocks)
    return mean, float(power / len(view))


def joint_sites(config: Config, store: Store) -> list[tuple[Site, ...]]:
    """Returns the layer tuples of a run: a site of every model per layer pair."""
    n = len(store.models) - 1
    pairs = ([Site(layer, config.site) for layer in pair] for pair in layer_pairs(config))
    return [(first, *[other] * n) for first, other in pairs]


def planned(config: Config, store: Store) -> list[tuple[tuple[Site, ...], str]]:
    """Returns (sites, name) of every crosscoder of a run.

    Per layer tuple one on aligned rows and one on shuffled rows, and for the first
    ``crosscoder.self_nulls`` the first model beside itself and beside a rotated copy.
    """
    plan = []
    for index, sites in enumerate(joint_sites(config, store)):
        plan += [(sites, "aligned"), (sites, "shuffled")]
        if index < config.crosscoder.self_nulls:
            plan += [((sites[0], sites[0]), name) for name in CONTROLS]
    return list(dict.fromkeys(plan))  # layer pairs may share the first model's layer


def train_crosscoders(config: Config, store: Store, work: Workdir) -> None:
    """Trains the run's missing crosscoders; interrupted, it ends with the same bits.

    UserError: see ``fit_crosscoders``.
    """
    folders = {work.crosscoder(*ends): ends for ends in planned(config, store)}
    todo = [folder for folder in folders if not checkpoint.is_finished(folder)]
    if not todo:
        return
    directory, joint = work.crosscoders / "training", crosscoder_settings(config)
    with timed(work, "train_crosscoders") as figures:
        numbers = store.select("train")
        orders = shuffles(len(numbers), models=len(store.models), seed=config.seed)
        read = functools.cache(lambda model, site: store.read(model, site, numbers))
        rows = []
        for sites, name in folders.values():
            models = store.models[:1] if name in CONTROLS else store.models
            label = " ".join([*(f"{m} {s}" for m, s in zip(models, sites)), name])
            views = tuple(map(read, models, sites))
            views = copies(views[0], name, config.seed) if name in CONTROLS else views
            rows.append(Rows(label, views, config.seed, orders if name == "shuffled" else None))
        options = {"checkpoint_every": config.checkpoint_every, "records": config.records}
        fitted = fit_crosscoders(rows, joint, directory=directory, **options)
        for folder, result in zip(folders, fitted):
            if folder in todo:
                base.save(result, folder, meta={"steps": joint.steps})
        for finished in directory.glob("*/checkpoints"):
            shutil.rmtree(finished)
        seen = len(folders) * joint.steps * joint.batch_size
        figures |= {"crosscoders": len(folders), "rows": seen}


def shuffles(n: int, *, models: int, seed: int) -> tuple[np.ndarray | None, ...]:
    """Returns random orders of each model's rows; None (unpermuted) for the first."""
    permuted = (stats.generator(seed, m).permutation(n) for m in range(1, models))
    return (None, *(order.astype(np.int32) for order in permuted))


def copies(x: np.ndarray, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows [n, d] beside themselves ("self"), or beside a random rotation of them."""
    if name == "self":
        return x, x
    return x, (x.astype(np.float32) @ rotation(x.shape[1], seed)).astype(x.dtype)


def rotation(d: int, seed: int) -> np.ndarray:
    """Returns a random orthogonal matrix float32 [d, d]."""
    Q, R = np.linalg.qr(stats.generator(seed).standard_normal((d, d)))
    return (Q * np.sign(np.diag(R))[None, :]).astype(np.float32)
