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
FEATURE_DROPOUT = 0.2  # of the source's features: the network learns to do without any of them
BATCH_SIZE = 128  # rows of every problem
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-4  # of AdamW
START = 0.1  # initial size of the learned part of the weights, in standard deviations
LOOKS = 10  # validations during training; the best network is kept
LOOK_ROWS = 1024  # validation rows at most, evenly spread

Masks = Mapping[tuple[str, int], np.ndarray]  # (model, layer): bool [width], what training may use
ROLES = ("source", "target")


class Hypernetwork(Map):
    """``f_B = relu(bias + (f_A - mean_a) U V')``, written by a network.

    The checkpoint holds these low-rank weights; the network stays in the training folder.
    """

    kind = "hypernetwork"
    reads = "features"
    fits_together = True

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        weights = {name: getattr(self, name)[...] for name in ("U", "V", "bias")}
        return _apply(weights, inputs - self.mean_a[...][None, :])

    @classmethod
    def fit(
        cls, problems, config, *, seed, directory, checkpoint_every: int = 500, records=()
    ) -> list[Fitted]:
        """Trains one network on all aligned problems, and one on all shuffled ones.

        Minimises the squared error of B's features in units of their variance; the best of ten
        validations writes the maps. ``directory/hypernetwork-N`` keeps checkpoints and metrics: a
        killed run goes on and ends with the same bits.

        Raises:
          UserError: a batch is larger than the training rows or does not divide over the devices.
        """
        fitted, by_pairing = {}, {}
        for problem in problems:
            shuffled = problem.train.target.reordered_from is not None
            by_pairing.setdefault(shuffled, []).append(problem)
        for number, (_, members) in enumerate(sorted(by_pairing.items())):
            network, chosen = train_network(
                members,
                config.hypernetwork,
                seed=seed,
                directory=Path(directory) / f"{cls.kind}-{number}",
                checkpoint_every=checkpoint_every,
                records=records,
            )
            for problem, record in zip(members, chosen):
                fitted[id(problem)] = Fitted(network.write(problem), record)
        return [fitted[id(problem)] for problem in problems]


def _apply(weights: dict[str, jax.Array], f: jax.Array) -> jax.Array:
    """Returns features of B [batch, width_b] of centred ones of A [batch, width_a]."""
    z = exact(exact(f, weights["U"]), weights["V"].T)
    return jax.nn.relu(z + weights["bias"][None, :])


Linear = partial(nnx.Linear, precision=EXACT)


class Tower(nnx.Module):
    """Turns each feature direction of one model, in one role, into ``rank`` numbers.

    ``u = g (L + sum_l e_l L_l)``, g the directions. One tower serves all layers of a model; e, the
    nearness to each training layer, blends what is particular to it. Linear, so that unseen
    features add their part like all others.
    """

    def __init__(self, *, d_model: int, layers: int, rank: int, rngs: nnx.Rngs):
        self.linear = Linear(d_model, rank, use_bias=False, rngs=rngs)
        self.by_layer = nnx.Param(jnp.zeros((layers, d_model, rank)))

    def rows(self, directions: jax.Array, nearness: jax.Array) -> jax.Array:
        """Returns u [width, rank] of directions [width, d_model]; ``nearness`` is e [layers].

        e sums to 1.
        """
        blended = jnp.tensordot(nearness, self.by_layer[...], 1, precision=EXACT)
        return self.linear(directions) + exact(directions, blended)


class TargetTower(Tower):
    """A tower with a nonlinear part, and three numbers on how each target feature is used.

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
    """Returns the weights U, V and bias that two towers write for a pair of ``Network.read``.

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


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, for any dictionaries of the models that it was trained with.

    Attributes:
      layers: (role, model) -> layers that it has seen, ascending.
      towers: by (role, model).
    """

    layers: dict[tuple[str, str], tuple[int, ...]]
    towers: dict[tuple[str, str], Tower]

    def read(self, pair: Sequence[Description], mask: np.ndarray | None = None) -> dict[str, Any]:
        """Returns what the network reads of a pair of dictionaries, arrays float32.

        Args:
          mask: bool [width_a], source features that may be used (default: all).

        Raises:
          UserError: the network knows no such model in this role.
        """
        U, V = profile_weights(*pair, mask)
        reads = {"U": U, "V": V}
        for role, of_role in zip(ROLES, pair):
            model, layer = of_role.side.model, of_role.side.layer
            if (role, model) not in self.layers:
                models = ", ".join(model for r, model in self.layers if r == role)
                raise UserError(
                    f"The hypernetwork was not trained with {model} as {role}; it knows {models}."
                )
            numbers = {"mean": of_role.moments.mean, "scale": of_role.scale}
            # A layer in between is blended from its neighbours, one outside is the outermost.
            layers = self.layers[role, model]
            units = np.eye(len(layers))
            numbers["nearness"] = np.array([np.interp(layer, layers, unit) for unit in units])
            reads[role] = of_role.directions | numbers
        return jax.tree.map(lambda a: np.asarray(a, np.float32), reads)

    def write(self, problem: Problem) -> Hypernetwork:
        """Returns the map from one dictionary to another, seen in training or not.

        It reads each model's rows alone, never which row of A goes with which of B.
        """
        pair = describe(problem.train, problem.label)
        reads = self.read(pair)
        towers = [self.towers[role, side.side.model] for role, side in zip(ROLES, pair)]
        values = written(*towers, reads) | {"mean_a": reads["source"]["mean"]}
        return Hypernetwork(pair[1].side.dictionary, values)


def from_profiles(problem: Problem) -> Hypernetwork:
    """Returns the map of token profiles, without training or paired rows."""
    source, target = describe(problem.train, problem.label)
    U, V = profile_weights(source, target)
    values = {"U": U, "V": V, "mean_a": source.moments.mean, "bias": target.moments.mean}
    return Hypernetwork(target.side.dictionary, values)


class WritingObjective(Objective):
    """Trains one network on all problems: the mean of their unexplained shares of variance.

    Problems of one direction and of equal shapes are stacked into one vmapped program.
    """

    def __init__(self, problems: Sequence[Problem], config: HypernetworkConfig, masks: Masks):
        self.config, self.masks = config, masks
        self.validate_every = max(1, config.steps // LOOKS)
        self.described = [describe(p.train, p.label) for p in problems]
        layers: dict[tuple[str, str], set[int]] = {}
        groups: dict[tuple, list[int]] = {}
        self.d_models = {}  # (role, model)
        for i, pair in enumerate(self.described):
            for role, side in zip(ROLES, pair):
                layers.setdefault((role, side.side.model), set()).add(side.side.layer)
                self.d_models[role, side.side.model] = side.side.x.shape[1]
            sides = [side.side for side in pair]
            graphs = tuple(modules.split(side.dictionary)[0] for side in sides)
            shapes = tuple((side.x.shape[1], side.dictionary.width, side.model) for side in sides)
            groups.setdefault((shapes, graphs), []).append(i)
        self.layers = {key: tuple(sorted(some)) for key, some in layers.items()}
        self.stacks = list(groups.values())
        self.graphs = {}  # (role, model): of its tower
        jax.eval_shape(self.init, jax.random.key(0), {})

    def init(self, key, fixed):
        params = {}
        for number, (name, layers) in enumerate(self.layers.items()):
            tower = (Tower if name[0] == "source" else TargetTower)(
                d_model=self.d_models[name],
                layers=len(layers),
                rank=self.config.rank,
                rngs=nnx.Rngs(params=jax.random.fold_in(key, number)),
            )
            self.graphs[name], params[" ".join(name)] = modules.split(tower)
        return params

    def optimizer(self, fixed):
        """Clipped AdamW, warmed up over a tenth of the steps, cosine decay to 0."""
        steps = self.config.steps
        warm = max(1, steps // 10)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, LEARNING_RATE, warm, max(steps, warm + 1)
        )
        adam = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
        return optax.chain(optax.clip_by_global_norm(1.0), adam)

    def network(self, params) -> Network:
        towers = {n: modules.merge(g, params[" ".join(n)]) for n, g in self.graphs.items()}
        return Network(self.layers, towers)

    def fixed(self, i: int) -> dict:
        """Returns what a problem's loss reads and does not train."""
        pair = self.described[i]
        masks = [
            self.masks.get((s.side.model, s.side.layer), np.ones(s.side.dictionary.width, bool))
            for s in pair
        ]
        # Where none of B's features varies, the error stays in raw units.
        variance = np.float32(np.sum(pair[1].moments.variance * masks[1]) or 1.0)
        return {
            "dictionaries": [modules.split(side.side.dictionary)[1] for side in pair],
            "masks": [np.float32(mask) for mask in masks],
            "reads": Network(self.layers, {}).read(pair, masks[0]),
            "variance": variance,
        }

    def losses(self, params, rows, fixed, key=None) -> jax.Array:
        """Returns every problem's unexplained share of variance, [problems].

        Args:
          rows: {"source 0": activations [batch, d_model] of problem 0's source, ...}.
          key: of the dropout; None: no dropout.
        """
        towers = self.network(params).towers
        losses = jnp.zeros(len(self.described))
        for number, members in enumerate(self.stacks):
            pair = self.described[members[0]]
            graphs = [modules.split(side.side.dictionary)[0] for side in pair]
            own_towers = [towers[role, side.side.model] for role, side in zip(ROLES, pair)]

            def missed(fixed, x_a, x_b, key, graphs=graphs, own_towers=own_towers):
                keys = (None, None) if key is None else jax.random.split(key)
                f_a, f_b = (
                    modules.merge(*dictionary).encode(from_bits(x))  # made here, never stored
                    for dictionary, x in zip(zip(graphs, fixed["dictionaries"]), (x_a, x_b))
                )
                mean = fixed["reads"]["source"]["mean"]
                # Whole features are dropped, the same in all rows.
                used = fixed["masks"][0] * dropped(jnp.ones(len(mean)), FEATURE_DROPOUT, keys[0])
                weights = written(*own_towers, fixed["reads"], keys[1])
                p = _apply(weights, (f_a - mean[None, :]) * used[None, :])
                error = (p - f_b) * fixed["masks"][1][None, :]
                return jnp.sum(jnp.square(error)) / (len(x_b) * fixed["variance"])

            keys = key
            if key is not None:
                keys = jax.random.split(jax.random.fold_in(key, number), len(members))
            x = [jnp.stack([rows[f"{role} {i}"] for i in members]) for role in ROLES]
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
    directory: Path,
    checkpoint_every: int = 500,
    records: Sequence[str] = (),
    masks: Masks | None = None,
) -> tuple[Network, list[dict[str, Any]]]:
    """Returns a network trained on all problems together, and a record for each of them.

    Args:
      directory: gets checkpoints and metrics.
      masks: features that training may use (default: all); others are neither read, as source or
        target, nor described.
    """
    n = len(problems[0].train)
    for problem in problems:
        check_rows(problem, Hypernetwork.kind)
        if len(problem.train) < BATCH_SIZE:
            raise UserError(
                f"{problem.label} has {len(problem.train)} training rows and hypernetwork needs a "
                f"batch of {BATCH_SIZE}; raise text.documents."
            )
        if len(problem.train) != n:
            raise ValueError("problems that train one network need equally many rows")
    masks = masks or {}
    objective = WritingObjective(problems, config, masks)
    fixed = [stack([objective.fixed(i) for i in members]) for members in objective.stacks]
    labels = [problem.label for problem in problems]
    streams, validation, views = {}, {}, {}
    for i, problem in enumerate(problems):
        for role in ROLES:
            train, held_out = (getattr(p, role) for p in (problem.train, problem.validation))
            view = views.setdefault(id(train), train.x[None])  # of a side, held once
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
    (best,) = loop.train(
        ensemble,
        steps=config.steps,
        seed=seed,
        directory=Path(directory),
        checkpoint_every=checkpoint_every,
        records=records,
        title=f"train 1 hypernetwork of {len(labels)} maps",
        meta={
            "config": dataclasses.asdict(config),
            "problems": labels,
            "seed": seed,
            "unused": {f"{m} {i}": np.flatnonzero(~v).tolist() for (m, i), v in masks.items()},
        },
    )
    resident = ensemble.feed.resident
    losses = jax.jit(jax.vmap(objective.losses))(
        stack([best["params"]]), resident["validation"], resident["fixed"]
    )
    step = int(best["step"]) + 1
    chosen = [
        {"step": step, "validation_fvu": float(loss), "trained_with": labels}
        for loss in np.asarray(losses)[0]
    ]
    return objective.network(jax.tree.map(jnp.asarray, best["params"])), chosen
