"""The trained rung, called hypernetwork by its users: a three-layer MLP on features."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.config import MapConfig
from crossdict_jax.errors import UserError
from crossdict_jax.maps.base import (
    Fitted,
    Map,
    Problem,
    Side,
    build,
    check_rows,
)
from crossdict_jax.maps.losses import transfer_loss
from crossdict_jax.training.loop import Feed, Trainable, epoch_order, train
from crossdict_jax.training.mesh import DATA, MEMBER, make_mesh, put, shard
from crossdict_jax.workdir import write_json

RARE = 0.01  # of the mean variance, added to each: keeps a rare input from drowning its row


class Network(nnx.Module):
    """What is trained: ``h -> LN -> ReLU -> dropout``, twice, then a linear layer."""

    def __init__(self, *, width_a: int, hidden: int, width_b: int, dropout: float, rngs: nnx.Rngs):
        xavier = nnx.initializers.xavier_uniform()
        self.first = nnx.Linear(width_a, hidden, kernel_init=xavier, rngs=rngs)
        self.norm_1 = nnx.LayerNorm(hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, kernel_init=xavier, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(hidden, rngs=rngs)
        # Zeros, so that the map starts as the mean predictor and every live output has a gradient.
        zeros = nnx.initializers.zeros_init()
        self.last = nnx.Linear(hidden, width_b, kernel_init=zeros, rngs=rngs)
        self.dropout = dropout

    def __call__(self, h: jax.Array, key: jax.Array | None) -> jax.Array:
        keys = (None, None) if key is None else jax.random.split(key)
        h = _dropped(jax.nn.relu(self.norm_1(self.first(h))), self.dropout, keys[0])
        h = _dropped(jax.nn.relu(self.norm_2(self.second(h))), self.dropout, keys[1])
        return self.last(h)


def _dropped(h: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share of h and scales the rest up; without a key (evaluation) nothing is dropped."""
    if key is None or rate == 0:
        return h
    return jnp.where(jax.random.bernoulli(key, 1 - rate, h.shape), h / (1 - rate), 0.0)


class MLP(Map):
    """``f_B = relu(mean_b + scale_b * network((f_A - mean_a) / scale_a))``.

    Means and scales are those of the training rows and are not trained: the network sees and
    gives standard units. It starts as the mean predictor and can never give a negative feature.
    """

    kind = "mlp"
    reads = "features"
    fits_together = True

    def __init__(self, dictionary, *, width_a: int, hidden: int, dropout: float):
        super().__init__(dictionary)
        width_b = dictionary.width
        shape = {"width_a": width_a, "hidden": hidden, "dropout": dropout}
        self.network = Network(**shape, width_b=width_b, rngs=nnx.Rngs(params=0))
        self.mean_a = nnx.Variable(jnp.zeros(width_a))
        self.scale_a = nnx.Variable(jnp.ones(width_a))
        self.mean_b = nnx.Variable(jnp.zeros(width_b))
        self.scale_b = nnx.Variable(jnp.ones(width_b))

    @property
    def arguments(self) -> dict:
        width_a, hidden = self.network.first.kernel.shape
        return {"width_a": width_a, "hidden": hidden, "dropout": self.network.dropout}

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        return self.forward(inputs, key=None)

    def forward(self, inputs: jax.Array, *, key: jax.Array | None) -> jax.Array:
        """Returns B's features [batch, width_b]; with a key, hidden units are dropped."""
        h = (inputs - self.mean_a[...][None, :]) / self.scale_a[...][None, :]
        out = self.network(h, key)
        return jax.nn.relu(self.mean_b[...][None, :] + self.scale_b[...][None, :] * out)


def fit(
    problems: Sequence[Problem], config: MapConfig, *, seed: int, directory: Path
) -> list[Fitted]:
    """Trains all problems of equal shapes as one ensemble in one compiled step.

    Each map is the network after the last step; its record holds the losses on whole validation
    batches, without dropout. ``directory/mlp-N`` keeps checkpoints, metrics and member labels,
    so that a killed run goes on and ends with the same bits.

    Raises:
      UserError: a batch is larger than the training rows or does not divide over the devices.
    """
    _check(problems, config)
    fitted: dict[int, Fitted] = {}
    for number, members in enumerate(_groups(problems)):
        ensemble = _Ensemble([problems[i] for i in members], config, seed=seed)
        fitted |= zip(members, ensemble.fit(Path(directory) / f"{MLP.kind}-{number}"))
    return [fitted[i] for i in range(len(problems))]


def _check(problems: Sequence[Problem], config: MapConfig) -> None:
    for problem in problems:
        check_rows(problem, MLP.kind)
        rows = len(problem.train)
        if config.batch_size > rows:
            raise UserError(
                f"map.batch_size={config.batch_size} is larger than the {rows} training rows of "
                f"{problem.label}; lower it or raise text.documents."
            )


def _groups(problems: Sequence[Problem]) -> list[list[int]]:
    """Splits problems by what must be equal inside one compiled step: shapes and architectures."""
    groups: dict[tuple, list[int]] = {}
    for i, problem in enumerate(problems):
        shapes = [s.x.shape for p in (problem.train, problem.validation) for s in _sides(p)]
        graphs = [modules.split(side.dictionary)[0] for side in _sides(problem.train)]
        shapes += [side.dictionary.width for side in _sides(problem.train)]
        groups.setdefault((*shapes, *graphs), []).append(i)
    return list(groups.values())


def _sides(pairs) -> tuple[Side, Side]:
    return pairs.source, pairs.target


def make_optimizer(config: MapConfig) -> optax.GradientTransformation:
    """Returns clipped AdamW with cosine decay to 0; only matrices decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(
            optax.cosine_decay_schedule(config.learning_rate, config.steps),
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )


class _Ensemble:
    """Problems of equal shapes, with every array stacked over members on a leading axis."""

    def __init__(self, problems: list[Problem], config: MapConfig, *, seed: int):
        self.problems, self.config, self.seed = problems, config, seed
        self.mesh = make_mesh(members=len(problems))
        over_data = self.mesh.shape[DATA]
        if config.batch_size % over_data:
            raise UserError(
                f"map.batch_size={config.batch_size} cannot be shared by {over_data} devices; "
                f"use a multiple of {over_data}."
            )
        first = problems[0].train
        self.graph_a = modules.split(first.source.dictionary)[0]
        width_a = first.source.dictionary.width
        self.shape = {"width_a": width_a, "hidden": config.hidden, "dropout": config.dropout}
        self.graph, _ = modules.abstract(lambda: MLP(first.target.dictionary, **self.shape))
        self.standards = [_standards(*_sides(p.train)) for p in problems]
        self.fixed = self._stacked([self._fixed(i) for i in range(len(problems))])

    def _fixed(self, i: int) -> dict:
        """What a member's step reads and does not train."""
        source, target = _sides(self.problems[i].train)
        a, b = modules.split(source.dictionary)[1], modules.split(target.dictionary)[1]
        # Where none of B's features varies, the error stays in raw units.
        variance = np.float32(target.feature_moments[1].mean() or 1.0)
        dictionaries = {"dictionary_a": a, "dictionary_b": b}
        return dictionaries | {"standards": self.standards[i], "variance": variance}

    def _stacked(self, trees: list) -> dict:
        by_member = shard(self.mesh, MEMBER)
        return jax.tree.map(
            lambda *leaves: put(np.stack([np.asarray(a) for a in leaves]), by_member), *trees
        )

    def fit(self, directory: Path) -> list[Fitted]:
        labels = [problem.label for problem in self.problems]
        write_json(directory / "members.json", [{"label": label} for label in labels])
        trainable = self._trainable()
        state = train(
            trainable,
            feed=self._feed(),
            steps=self.config.steps,
            seed=self.seed,
            directory=directory,
            checkpoint_every=self.config.checkpoint_every,
            what=f"train {len(labels)} maps",
            state_shardings=self._by_member,
            meta={"config": dataclasses.asdict(self.config), "members": labels, "seed": self.seed},
        )
        networks = self._gathered(state["params"])
        records = self._validation(state["params"])
        return [self._fitted(i, networks, records[i]) for i in range(len(labels))]

    def _gathered(self, tree):
        """Copies of stacked arrays on every device, which the host can read."""
        everywhere = jax.jit(lambda t: t, out_shardings=shard(self.mesh))(tree)
        return jax.tree.map(np.asarray, everywhere)

    def _by_member(self, abstract):
        return jax.tree.map(lambda _: shard(self.mesh, MEMBER), abstract)

    def _trainable(self) -> Trainable:
        optimizer = make_optimizer(self.config)
        width_b = self.problems[0].train.target.dictionary.width

        def init_member(key):
            network = Network(**self.shape, width_b=width_b, rngs=nnx.Rngs(params=key))
            params = modules.split(network)[1]
            return {"params": params, "train": optimizer.init(params)}

        def step_member(state, fixed, x_a, x_b, key):
            def loss_of(network):
                return self._loss(network, fixed, x_a, x_b, key)

            (loss, terms), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
            updates, train_state = optimizer.update(grads, state["train"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            return {"params": params, "train": train_state}, {"loss": loss} | terms

        def step(state, batch, _, key):
            keys = self._member_keys(key)
            step_all = jax.vmap(step_member, spmd_axis_name=MEMBER)
            return step_all(state, batch["fixed"], batch["x_a"], batch["x_b"], keys)

        return Trainable(lambda key: jax.vmap(init_member)(self._member_keys(key)), step)

    def _member_keys(self, key: jax.Array) -> jax.Array:
        return jax.vmap(lambda member: jax.random.fold_in(key, member))(
            jnp.arange(len(self.problems))
        )

    def _loss(self, network, fixed, x_a, x_b, key):
        own = fixed["standards"] | {"network": network, "dictionary": fixed["dictionary_b"]}
        m = modules.merge(self.graph, own)
        source = modules.merge(self.graph_a, fixed["dictionary_a"])
        f_a, f_b = source.encode(x_a), m.dictionary.encode(x_b)  # made here, never stored
        predicted = m.forward(f_a, key=key)
        weights = self.config.loss_weights
        return transfer_loss(predicted, f_b, weights, variance=fixed["variance"])

    def _feed(self) -> Feed:
        n, batch = len(self.problems[0].train), self.config.batch_size
        rows_of = shard(self.mesh, MEMBER, DATA)

        def indices(first: int, count: int) -> np.ndarray:
            order = epoch_order(self.seed, start=first * batch, count=count * batch, n=n)
            return order.reshape(count, batch)

        def select(resident, rows):
            def pick(x):
                return jax.lax.with_sharding_constraint(x[:, rows], rows_of)

            return resident | {"x_a": pick(resident["x_a"]), "x_b": pick(resident["x_b"])}

        return Feed(self._resident("train") | {"fixed": self.fixed}, indices, select)

    def _resident(self, split: str) -> dict[str, jax.Array]:
        pairs = [getattr(problem, split) for problem in self.problems]
        return self._stacked([{"x_a": p.source.x, "x_b": p.target.x} for p in pairs])

    def _validation(self, networks) -> list[dict[str, float]]:
        """Each member's losses, mean over whole batches of its validation rows."""
        n = len(self.problems[0].validation)
        size = min(self.config.batch_size, n)
        resident = self._resident("validation")

        @partial(jax.jit, out_shardings=shard(self.mesh))
        def losses(networks, fixed, resident, start):
            def one(network, fixed, x_a, x_b):
                x_a, x_b = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (x_a, x_b))
                loss, terms = self._loss(network, fixed, x_a, x_b, None)
                return {"loss": loss} | terms

            return jax.vmap(one)(networks, fixed, resident["x_a"], resident["x_b"])

        starts = range(0, n - size + 1, size)
        rows = [losses(networks, self.fixed, resident, start) for start in starts]
        means = {name: np.mean([np.asarray(r[name]) for r in rows], axis=0) for name in rows[0]}
        return [
            {name: float(values[i]) for name, values in means.items()} | {"rows": len(rows) * size}
            for i in range(len(self.problems))
        ]

    def _fitted(self, i: int, networks, validation: dict[str, float]) -> Fitted:
        own = self.standards[i] | {"network": jax.tree.map(lambda a: a[i], networks)}
        record = {"parameters": "of the last step", "validation": validation}
        target = self.problems[i].train.target
        return Fitted(build(MLP, target.dictionary, self.shape, own), record)


def _standards(source: Side, target: Side) -> dict[str, np.ndarray]:
    """The parameters of a map that are not trained: means and scales of either side's features."""
    standards = {}
    for name, side in (("a", source), ("b", target)):
        mean, variance = side.feature_moments
        damped = np.sqrt(variance + RARE * variance.mean())
        standards[f"mean_{name}"] = mean.astype(np.float32)
        standards[f"scale_{name}"] = np.where(damped > 0, damped, 1.0).astype(np.float32)
    return standards
