"""A network that writes the weights of a map from descriptions of both dictionaries."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.config import HypernetworkConfig
from crossdict_jax.errors import UserError
from crossdict_jax.maps.base import Fitted, Map, Problem, check_rows
from crossdict_jax.maps.descriptions import Description, describe, profile_weights
from crossdict_jax.maps.network import dropped
from crossdict_jax.ops import EXACT, exact
from crossdict_jax.training import loop
from crossdict_jax.training.ensemble import Objective, Stream, make_ensemble, stack
from crossdict_jax.training.mesh import from_bits, to_bits

HIDDEN = 128  # units of the target's hidden layer
DROPOUT = 0.2  # of hidden units
FEATURE_DROPOUT = 0.2  # of the source's features: the network learns to do without any
BATCH_SIZE = 128  # rows of every problem
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-4  # of AdamW
START = 0.1  # initial size of the learned part of the weights, in standard deviations
LOOKS = 10  # validations during training; the best network is kept
LOOK_ROWS = 1024  # validation rows at most, evenly spread

Masks = Mapping[tuple[str, int], np.ndarray]  # (model, layer): bool [width], what training may use


class Hypernetwork(Map):
    """``f_B = relu(bias + (f_A - mean_a) U V')``, written by a network.

    The checkpoint holds these low-rank weights; the network stays in the training folder.
    """

    kind = "hypernetwork"
    reads = "features"
    fits_together = True

    def __call__(self, inputs, *, tokens=None):
        f = modules.rows(inputs, len(self.mean_a[...])) - self.mean_a[...][None, :]
        return _apply(f, self.U[...], self.V[...], self.bias[...])

    @classmethod
    def fit(cls, problems, config, *, directory, **training) -> list[Fitted]:
        """Trains one network on all aligned problems, and one on all shuffled ones.

        The best of ten validations writes the maps. ``directory/hypernetwork-N`` keeps checkpoints
        and metrics: a killed run goes on and ends with the same bits.

        Raises:
          UserError: a batch is larger than the training rows.
        """
        fitted, by_pairing = {}, {}
        for problem in problems:
            shuffled = problem.train.target.order is not None
            by_pairing.setdefault(shuffled, []).append(problem)
        for number, (_, members) in enumerate(sorted(by_pairing.items())):
            folder = Path(directory) / f"{cls.kind}-{number}"
            network, records = train_network(
                members, config.hypernetwork, directory=folder, **training
            )
            for problem, record in zip(members, records):
                fitted[id(problem)] = Fitted(network.write(problem), record)
        return [fitted[id(problem)] for problem in problems]


def _apply(f: jax.Array, U: jax.Array, V: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns features of B [batch, width_b] of centred ones of A [batch, width_a]."""
    return jax.nn.relu(exact(exact(f, U), V.T) + bias[None, :])


Linear = partial(nnx.Linear, precision=EXACT)


class Tower(nnx.Module):
    """Turns each feature direction of one model, in one role, into ``rank`` numbers.

    ``u = g (L + sum_l e_l L_l)``, g the directions. One tower serves all layers of a model; e, the
    nearness to each training layer, sums to 1. Linear, so that unseen features add their part like
    all others.
    """

    def __init__(self, *, d_model: int, layers: int, rank: int, rngs: nnx.Rngs):
        self.linear = Linear(d_model, rank, use_bias=False, rngs=rngs)
        self.by_layer = nnx.Param(jnp.zeros((layers, d_model, rank)))

    def rows(self, directions: jax.Array, nearness: jax.Array) -> jax.Array:
        """Returns u [width, rank] of directions [width, d_model]; ``nearness`` is e [layers]."""
        blended = jnp.tensordot(nearness, self.by_layer[...], 1, precision=EXACT)
        return self.linear(directions) + exact(directions, blended)


class TargetTower(Tower):
    """A tower with a nonlinear part, and three numbers for each target feature.

    ``v = u(reads) + h A``, h a hidden layer on the feature's whole description. Three more outputs
    of h: the feature's strength, its start, and the trust in its token profiles.
    """

    def __init__(self, *, d_model: int, layers: int, rank: int, rngs: nnx.Rngs):
        super().__init__(d_model=d_model, layers=layers, rank=rank, rngs=rngs)
        small = nnx.initializers.variance_scaling(0.01, "fan_in", "normal")
        zeros = nnx.initializers.zeros_init()
        self.first = Linear(2 * d_model + 4, HIDDEN, rngs=rngs)
        self.layer_bias = nnx.Param(jnp.zeros((layers, HIDDEN)))
        self.last = Linear(HIDDEN, rank, use_bias=False, kernel_init=small, rngs=rngs)
        self.numbers = Linear(HIDDEN, 3, kernel_init=zeros, rngs=rngs)

    def __call__(self, b: dict[str, jax.Array], key: jax.Array | None):
        """Returns v [width, rank] and [width, 3]: strength, start, trust."""
        description = jnp.concatenate([b[name] for name in ("reads", "writes", "facts")], axis=1)
        h = self.first(description) + exact(b["nearness"], self.layer_bias[...])[None, :]
        h = dropped(jax.nn.gelu(h), DROPOUT, key)
        return self.rows(b["reads"], b["nearness"]) + self.last(h), self.numbers(h)


def written(source: Tower, target: TargetTower, pair: dict, key: jax.Array | None = None) -> dict:
    """Returns the U, V and bias that two towers write for what ``read`` returns.

    ``key`` is that of the dropout.
    """
    a, b = pair["source"], pair["target"]
    u = source.rows(a["moves"], a["nearness"])
    v, numbers = target(b, key)
    strength, start, trust = numbers.T
    v = START / np.sqrt(u.shape[1]) * jnp.exp(strength)[:, None] * v
    return {
        "U": jnp.concatenate([u / a["scale"][:, None], pair["U"]], axis=1),
        "V": jnp.concatenate(
            [v * b["scale"][:, None], jnp.exp(trust)[:, None] * pair["V"]], axis=1
        ),
        "bias": b["mean"] + b["scale"] * start,
    }


class Network(nnx.Module):
    """A tower per role and model, for any dictionaries of these models.

    Attributes:
      layers: (name, layers that it has seen, ascending) of each; see ``Description.tower``.
    """

    def __init__(self, layers: tuple, d_models: dict[str, int], rank: int, key: jax.Array):
        self.layers = layers
        for number, (name, seen) in enumerate(layers):
            shape = {"d_model": d_models[name], "layers": len(seen), "rank": rank}
            rngs = nnx.Rngs(params=jax.random.fold_in(key, number))
            tower = Tower if name.startswith("source ") else TargetTower
            setattr(self, name, tower(**shape, rngs=rngs))

    def write(self, problem: Problem) -> Hypernetwork:
        """Returns the map from one dictionary to another, seen in training or not.

        It reads each model's rows alone, never which row of A goes with which of B.

        Raises:
          UserError: the network knows no such model in this role.
        """
        pair = describe(problem.train, problem.label)
        reads = read(pair, dict(self.layers))
        weights = written(*(getattr(self, one.tower) for one in pair), reads)
        mean_a = reads["source"]["mean"]
        return Hypernetwork(pair[1].side.dictionary, weights | {"mean_a": mean_a})


def read(
    pair: Sequence[Description],
    layers: Mapping[str, tuple[int, ...]],
    mask: np.ndarray | None = None,
) -> dict[str, Any]:
    """Returns what a network reads of a pair of dictionaries, arrays float32.

    Args:
      layers: of each tower, those that it has seen.
      mask: bool [width_a], source features that may be used (default: all).
    """
    U, V = profile_weights(*pair, mask)
    reads = {"U": U, "V": V}
    for one in pair:
        if one.tower not in layers:
            models = (tower.split(" ", 1)[1] for tower in layers if tower.startswith(one.role))
            raise UserError(
                f"The hypernetwork was not trained with {one.side.model} as {one.role}; it knows "
                f"{', '.join(models)}."
            )
        # A layer in between is blended from its neighbours, one outside is the outermost.
        seen = layers[one.tower]
        nearness = np.array([np.interp(one.side.layer, seen, unit) for unit in np.eye(len(seen))])
        numbers = {"mean": one.side.feature_moments.mean, "scale": one.scale, "nearness": nearness}
        reads[one.role] = one.directions | numbers
    return jax.tree.map(lambda a: np.asarray(a, np.float32), reads)


def from_profiles(problem: Problem) -> Hypernetwork:
    """Returns the map of token profiles alone, without training or paired rows."""
    source, target = describe(problem.train, problem.label)
    U, V = profile_weights(source, target)
    mean_a, bias = (one.side.feature_moments.mean for one in (source, target))
    values = {"U": U, "V": V, "mean_a": mean_a, "bias": bias}
    return Hypernetwork(target.side.dictionary, values)


class WritingObjective(Objective):
    """Trains one network on all problems: the mean of their unexplained shares of variance.

    Problems of one direction and of equal shapes are stacked into one vmapped program.
    """

    def __init__(self, problems: Sequence[Problem], config: HypernetworkConfig, masks: Masks):
        self.config, self.masks = config, masks
        self.validate_every = max(1, config.steps // LOOKS)
        self.described = [describe(p.train, p.label) for p in problems]
        layers: dict[str, set[int]] = {}
        stacks: dict[tuple, list[int]] = {}
        d_models = {}
        for i, pair in enumerate(self.described):
            shape = []
            for one in pair:
                side = one.side
                layers.setdefault(one.tower, set()).add(side.layer)
                d_models[one.tower] = side.x.shape[1]
                graph = modules.split(side.dictionary)[0]
                shape += [one.tower, side.x.shape, side.dictionary.width, graph]
            stacks.setdefault(tuple(shape), []).append(i)
        self.stacks = list(stacks.values())
        self.layers = {tower: tuple(sorted(seen)) for tower, seen in layers.items()}
        self.build = partial(Network, tuple(self.layers.items()), d_models, config.rank)
        self.graph, _ = modules.abstract(lambda: self.build(jax.random.key(0)))

    def init(self, key, fixed):
        return modules.split(self.build(key))[1]

    def optimizer(self, fixed):
        """Clipped AdamW, warmed up over a tenth of the steps, cosine decay to 0."""
        steps, warm = self.config.steps, max(1, self.config.steps // 10)
        rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warm, max(steps, warm + 1))
        adam = optax.adamw(rate, weight_decay=WEIGHT_DECAY)
        return optax.chain(optax.clip_by_global_norm(1.0), adam)

    def fixed(self, i: int) -> dict:
        """Returns what a problem's loss reads and does not train."""
        pair = self.described[i]
        masks = [
            self.masks.get((s.side.model, s.side.layer), np.ones(s.side.dictionary.width, bool))
            for s in pair
        ]
        # Where none of B's features varies, the error stays in raw units.
        variance = np.float32(np.sum(pair[1].side.feature_moments.variance * masks[1]) or 1.0)
        return {
            "dictionaries": [modules.split(one.side.dictionary)[1] for one in pair],
            "masks": [np.float32(mask) for mask in masks],
            "reads": read(pair, self.layers, masks[0]),
            "variance": variance,
        }

    def losses(self, params, rows, fixed, key=None) -> jax.Array:
        """Returns every problem's unexplained share of variance, [problems].

        Args:
          rows: {"source 0": activations [batch, d_model] of problem 0's source, ...}.
          key: of the dropout; None: no dropout.
        """
        network, losses = modules.merge(self.graph, params), jnp.zeros(len(self.described))
        for number, members in enumerate(self.stacks):
            pair = self.described[members[0]]
            graphs = [modules.split(one.side.dictionary)[0] for one in pair]
            towers = [getattr(network, one.tower) for one in pair]

            def missed(fixed, x_a, x_b, key, graphs=graphs, towers=towers):
                keys = (None, None) if key is None else jax.random.split(key)
                f_a, f_b = (
                    modules.merge(*dictionary).encode(from_bits(x))  # made here, never stored
                    for dictionary, x in zip(zip(graphs, fixed["dictionaries"]), (x_a, x_b))
                )
                mean = fixed["reads"]["source"]["mean"]
                # Whole features are dropped, the same in all rows.
                used = fixed["masks"][0] * dropped(jnp.ones(len(mean)), FEATURE_DROPOUT, keys[0])
                weights = written(*towers, fixed["reads"], keys[1])
                p = _apply((f_a - mean[None, :]) * used[None, :], **weights)
                error = (p - f_b) * fixed["masks"][1][None, :]
                return jnp.sum(jnp.square(error)) / (len(x_b) * fixed["variance"])

            keys = key
            if key is not None:
                keys = jax.random.split(jax.random.fold_in(key, number), len(members))
            x = [jnp.stack([rows[f"{one.role} {i}"] for i in members]) for one in pair]
            shares = jax.vmap(missed)(fixed["stacks"][number], *x, keys)
            losses = losses.at[np.array(members)].set(shares)
        return losses

    def loss(self, params, batch, context):
        losses = self.losses(params, batch, context.fixed, context.key)
        return losses.mean(), ({"problems": losses}, ())

    def score(self, params, batch, fixed):
        return self.losses(params, batch, fixed).mean()


def train_network(
    problems: Sequence[Problem],
    config: HypernetworkConfig,
    *,
    seed: int,
    masks: Masks | None = None,
    **training,
) -> tuple[Network, list[dict[str, Any]]]:
    """Returns a network trained on all problems together, and a record for each of them.

    Args:
      masks: features that training may use (default: all); others are neither read, as source or
        target, nor described.
      training: see ``loop.train``; its ``directory`` gets checkpoints and metrics.
    """
    n, masks, labels = len(problems[0].train), masks or {}, [problem.label for problem in problems]
    for problem in problems:
        check_rows(problem, Hypernetwork.kind, BATCH_SIZE)
        if len(problem.train) != n:
            raise ValueError("problems that train one network need equally many rows")
    objective = WritingObjective(problems, config, masks)
    fixed = [stack([objective.fixed(i) for i in members]) for members in objective.stacks]
    streams, validation, views = {}, {}, {}
    for i, problem in enumerate(problems):
        for role in ("source", "target"):
            train, held_out = (getattr(p, role) for p in (problem.train, problem.validation))
            view = views.setdefault(train, train.x[None])  # of a side, held once
            streams[f"{role} {i}"] = Stream(view, np.zeros(1, np.int64))
            rows = np.linspace(0, len(held_out.x) - 1, min(len(held_out.x), LOOK_ROWS))
            validation[f"{role} {i}"] = to_bits(held_out.x[rows.astype(np.int64)])[None]
    ensemble = make_ensemble(
        objective,
        fixed=stack([{"id": np.uint32(0), "stacks": fixed}]),
        labels=[f"{len(labels)} maps"],
        streams=streams,
        seeds=[seed],
        batch_size=BATCH_SIZE,
        setting="hypernetwork.BATCH_SIZE",
        validation=validation,
    )
    unused = {f"{m} {i}": np.flatnonzero(~v).tolist() for (m, i), v in masks.items()}
    settings = {"config": dataclasses.asdict(config), "problems": labels, "seed": seed}
    (best,) = loop.train(
        ensemble,
        steps=config.steps,
        seed=seed,
        title=f"train 1 hypernetwork of {len(labels)} maps",
        meta=settings | {"unused": unused, "dictionaries": [p.dictionaries for p in problems]},
        **training,
    )
    resident = ensemble.feed.resident
    losses = jax.jit(jax.vmap(objective.losses))(
        stack([best["params"]]), resident["validation"], resident["fixed"]
    )
    step = int(best["step"]) + 1
    records = [
        {"step": step, "validation_fvu": float(loss), "trained_with": labels}
        for loss in np.asarray(losses)[0]
    ]
    return modules.merge(objective.graph, jax.tree.map(jnp.asarray, best["params"])), records
