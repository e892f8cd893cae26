"""A network that writes the weights of a map from descriptions of both dictionaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.config import HypernetworkConfig, MapConfig
from crossdict_jax.errors import UserError
from crossdict_jax.maps.base import Fitted, Map, Problem, Side, build, check_rows, exact_matmul
from crossdict_jax.maps.descriptions import Describer, Description, profile_weights
from crossdict_jax.training.loop import Feed, Trainable, epoch_order, train
from crossdict_jax.training.mesh import DATA, make_mesh, put, shard
from crossdict_jax.workdir import write_json

START = 0.1  # of what the learned part of the weights says at first, in standard deviations
LOOKS = 10  # at validation rows during training; the best network is kept
LOOK_ROWS = 1024  # validation rows that are looked at, at most, evenly spread

Known = Mapping[tuple[str, int], np.ndarray]  # (model, layer): bool [width], what training may use


class Hypernetwork(Map):
    """``f_B = relu(bias + (f_A - mean_a) U V')``, every number of it written by a network.

    The checkpoint holds what was written, low-rank weights, and neither the network nor the
    descriptions: they predict without A's dictionary, and are smaller than what wrote them. The
    network itself stays in the training folder's checkpoint.
    """

    kind = "hypernetwork"
    reads = "features"
    fits_together = True

    def __init__(self, dictionary, *, width_a: int, rank: int):
        super().__init__(dictionary)
        self.mean_a = nnx.Param(jnp.zeros(width_a))
        self.U = nnx.Param(jnp.zeros((width_a, rank)))
        self.V = nnx.Param(jnp.zeros((dictionary.width, rank)))
        self.bias = nnx.Param(jnp.zeros(dictionary.width))

    @property
    def arguments(self) -> dict:
        width_a, rank = self.U.shape
        return {"width_a": width_a, "rank": rank}

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        own = {name: getattr(self, name)[...] for name in ("U", "V", "bias")}
        return _apply(own, inputs - self.mean_a[...][None, :])


def _apply(weights: dict[str, jax.Array], f: jax.Array) -> jax.Array:
    """Returns features of B [batch, width_b] of centred ones of A [batch, width_a]."""
    z = exact_matmul(exact_matmul(f, weights["U"]), weights["V"].T)
    return jax.nn.relu(z + weights["bias"][None, :])


# ---------------------------------------------------------------- what is trained


class Tower(nnx.Module):
    """Turns the direction of every feature of one model, in one role, into ``rank`` numbers.

    ``u = g (L + sum_l e_l L_l)``. Directions g lie in the model's own residual stream, which
    neighbouring layers share: so one tower serves all layers of a model, and e, the layer's place
    between those of training, blends in what is particular to each. Linear, since what features
    say together is a sum: one that was never seen adds its part as all others do.
    """

    def __init__(self, *, d_model: int, layers: int, shape: HypernetworkConfig, rngs: nnx.Rngs):
        self.linear = nnx.Linear(d_model, shape.rank, use_bias=False, rngs=rngs)
        self.by_layer = nnx.Param(jnp.zeros((layers, d_model, shape.rank)))

    def rows(self, directions: jax.Array, place: jax.Array) -> jax.Array:
        """Returns u [width, rank] of directions [width, d_model] at ``place`` [layers]."""
        own = jnp.einsum("l,ldr->dr", place, self.by_layer[...])
        return self.linear(directions) + directions @ own


class TargetTower(Tower):
    """A tower that may also bend what it says, and tells how each feature of the target is used.

    ``v = u(reads) + h A``, with h a hidden layer on all that is known of the feature. Three more
    numbers of h say how strong the feature is, where it starts, and how far the token profiles
    can be trusted.
    """

    def __init__(self, *, d_model: int, layers: int, shape: HypernetworkConfig, rngs: nnx.Rngs):
        super().__init__(d_model=d_model, layers=layers, shape=shape, rngs=rngs)
        small = nnx.initializers.variance_scaling(0.01, "fan_in", "normal")
        zeros = nnx.initializers.zeros_init()
        hidden = shape.hidden
        self.first = nnx.Linear(2 * d_model + 4, hidden, rngs=rngs)
        self.layer_bias = nnx.Param(jnp.zeros((layers, hidden)))
        self.last = nnx.Linear(hidden, shape.rank, use_bias=False, kernel_init=small, rngs=rngs)
        self.numbers = nnx.Linear(hidden, 3, kernel_init=zeros, rngs=rngs)
        self.dropout = shape.dropout

    def __call__(self, b: dict[str, jax.Array], key: jax.Array | None):
        """Returns (v [width, rank], strength [width], start [width], trust [width])."""
        known = jnp.concatenate([b[name] for name in ("reads", "writes", "facts")], axis=1)
        h = self.first(known) + (b["place"] @ self.layer_bias[...])[None, :]
        h = _dropped(jax.nn.gelu(h), self.dropout, key)
        numbers = self.numbers(h)
        v = self.rows(b["reads"], b["place"]) + self.last(h)
        return v, numbers[:, 0], numbers[:, 1], numbers[:, 2]


TOWERS = {"source": Tower, "target": TargetTower}


def _dropped(h: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share of h and scales the rest up; without a key nothing is dropped."""
    if key is None or rate == 0:
        return h
    return jnp.where(jax.random.bernoulli(key, 1 - rate, h.shape), h / (1 - rate), 0.0)


def written(source: Tower, target: TargetTower, given: dict, key: jax.Array | None = None) -> dict:
    """Returns the weights U, V and bias that two towers write for one pair of dictionaries.

    Args:
      given: what ``_given`` says of the pair.
      key: of the dropout.
    """
    a, b = given["source"], given["target"]
    u = source.rows(a["moves"], a["place"])
    v, strength, start, trust = target(b, key)
    v = START / np.sqrt(u.shape[1]) * jnp.exp(strength)[:, None] * v
    scale_a, scale_b = a["scale"][:, None], b["scale"][:, None]
    profiles = jnp.exp(trust)[:, None] * given["V"]
    return {
        "U": jnp.concatenate([u / scale_a, given["U"]], axis=1),
        "V": jnp.concatenate([v * scale_b, profiles], axis=1),
        "bias": b["mean"] + b["scale"] * start,
    }


def _given(
    source: Description,
    target: Description,
    shape: HypernetworkConfig,
    places: dict[str, np.ndarray],
    known: np.ndarray,
) -> dict[str, Any]:
    """Returns all that the network reads of a pair of dictionaries, arrays float32."""
    U, V = profile_weights(source, target, rank=shape.profile_rank, known=known)
    given = {"U": U, "V": V}
    for role, side in (("source", source), ("target", target)):
        given[role] = side.directions | {
            "mean": side.mean,
            "scale": side.scale,
            "place": places[role],
        }
    return jax.tree.map(lambda a: np.asarray(a, np.float32), given)


# ---------------------------------------------------------------- a trained network


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained network, to be asked about any dictionaries of the models that it knows.

    Attributes:
      towers: ("source" | "target", model) -> its tower.
      layers: ("source" | "target", model) -> layers that it has seen, ascending.
    """

    shape: HypernetworkConfig
    towers: dict[tuple[str, str], Tower]
    layers: dict[tuple[str, str], tuple[int, ...]]

    def write(self, problem: Problem, describer: Describer | None = None) -> Hypernetwork:
        """Returns the map from one dictionary to another, seen in training or not.

        Of the problem's rows it uses what each model does on its own, never which row of A goes
        with which of B.

        Raises:
          UserError: the network knows no such model in this role.
        """
        source, target = (describer or Describer()).both(problem.train, problem.label)
        known = np.ones(source.side.dictionary.width, bool)
        places = {
            role: self._place(role, side.side)
            for role, side in (("source", source), ("target", target))
        }
        given = _given(source, target, self.shape, places, known)
        towers = [
            self.towers["source", source.side.model],
            self.towers["target", target.side.model],
        ]
        own = dict(written(*towers, given)) | {"mean_a": given["source"]["mean"]}
        return build(Hypernetwork, target.side.dictionary, _arguments(source, self.shape), own)

    def _place(self, role: str, side: Side) -> np.ndarray:
        if (role, side.model) not in self.layers:
            there = ", ".join(model for r, model in self.layers if r == role)
            raise UserError(
                f"The hypernetwork was not trained with {side.model} as {role}; it knows {there}."
            )
        return place(side.layer, self.layers[role, side.model])


def from_profiles(
    problem: Problem, shape: HypernetworkConfig, describer: Describer | None = None
) -> Hypernetwork:
    """Returns the map that token profiles call for, without any training or any paired row."""
    source, target = (describer or Describer()).both(problem.train, problem.label)
    known = np.ones(source.side.dictionary.width, bool)
    U, V = profile_weights(source, target, rank=shape.profile_rank, known=known)
    own = {"U": U, "V": V, "mean_a": source.mean, "bias": target.mean}
    arguments = {"width_a": len(known), "rank": shape.profile_rank}
    return build(Hypernetwork, target.side.dictionary, arguments, own)


def _arguments(source: Description, shape: HypernetworkConfig) -> dict[str, int]:
    return {
        "width_a": source.side.dictionary.width,
        "rank": shape.rank + shape.profile_rank,
    }


def place(layer: int, layers: Sequence[int]) -> np.ndarray:
    """Returns how near a layer is to each of ``layers`` (ascending), [len(layers)], of sum 1.

    A layer in between is blended from its two neighbours, one outside is the outermost.
    """
    return np.array([np.interp(layer, layers, one) for one in np.eye(len(layers))])


# ---------------------------------------------------------------- training


def fit(
    problems: Sequence[Problem], config: MapConfig, *, seed: int, directory: Path
) -> list[Fitted]:
    """Trains one network for all problems on aligned pairs, and one for all on shuffled ones.

    The squared error of B's features, in units of their variance, is minimised on training rows;
    the network of the best of ten looks at validation rows writes the maps. A killed run goes on
    and ends with the same bits: ``directory/hypernetwork-N`` keeps checkpoints and metrics.

    Raises:
      UserError: a batch is larger than the training rows or does not divide over the devices.
    """
    fitted: dict[int, Fitted] = {}
    describer = Describer()
    for number, members in enumerate(_by_pairing(problems)):
        chosen = [problems[i] for i in members]
        folder = Path(directory) / f"{Hypernetwork.kind}-{number}"
        network, records = train_network(
            chosen, config.hypernetwork, seed=seed, directory=folder, describer=describer
        )
        maps = [network.write(problem, describer) for problem in chosen]
        fitted |= {i: Fitted(m, r) for i, m, r in zip(members, maps, records)}
    return [fitted[i] for i in range(len(problems))]


def _by_pairing(problems: Sequence[Problem]) -> list[list[int]]:
    groups: dict[bool, list[int]] = {}
    for i, problem in enumerate(problems):
        shuffled = problem.train.target.reordered_from is not None
        groups.setdefault(shuffled, []).append(i)
    return [groups[shuffled] for shuffled in sorted(groups)]


def train_network(
    problems: Sequence[Problem],
    shape: HypernetworkConfig,
    *,
    seed: int,
    directory: Path,
    describer: Describer | None = None,
    known: Known | None = None,
) -> tuple[Network, list[dict[str, Any]]]:
    """Returns a network trained on all problems together, and a record for each of them.

    Args:
      directory: gets checkpoints, metrics and the problems' labels.
      known: features that training may use; of the others neither the values as source nor as
        target are read, nor are they described. By default all are known.

    Raises:
      UserError: see ``fit``.
    """
    for problem in problems:
        check_rows(problem, Hypernetwork.kind)
        _check_batch(problem, shape)
    trainer = _Trainer(list(problems), shape, seed, describer or Describer(), known or {})
    labels = [problem.label for problem in problems]
    write_json(Path(directory) / "members.json", [{"label": label} for label in labels])
    state = train(
        trainer.trainable(),
        feed=trainer.feed(),
        steps=shape.steps,
        seed=seed,
        directory=Path(directory),
        checkpoint_every=shape.checkpoint_every,
        title=f"train 1 hypernetwork of {len(labels)} maps",
        shardings=lambda abstract: jax.tree.map(lambda _: shard(trainer.mesh), abstract),
        meta=trainer.meta(labels),
    )
    best = jax.tree.map(np.asarray, state["train"]["best"])
    return trainer.network(best["params"]), trainer.records(best, labels)


def _check_batch(problem: Problem, shape: HypernetworkConfig) -> None:
    rows, devices = len(problem.train), jax.device_count()
    if shape.batch_size > rows:
        raise UserError(
            f"map.hypernetwork.batch_size={shape.batch_size} is larger than the {rows} training "
            f"rows of {problem.label}; lower it or raise text.documents."
        )
    if shape.batch_size % devices:
        raise UserError(
            f"map.hypernetwork.batch_size={shape.batch_size} cannot be shared by {devices} "
            f"devices; use a multiple of {devices}."
        )


class _Trainer:
    """All problems of one pairing; those of one direction and equal shapes are stacked."""

    def __init__(self, problems, shape, seed: int, describer: Describer, known: Known):
        self.problems, self.shape, self.seed, self.known = problems, shape, seed, known
        self.mesh = make_mesh()
        self.described = [describer.both(p.train, p.label) for p in problems]
        self.layers = self._layers()
        self.stacks = self._stacks()
        self.graphs, _ = self._towers(jax.random.key(0), abstract=True)

    def _layers(self) -> dict[tuple[str, str], tuple[int, ...]]:
        found: dict[tuple[str, str], set[int]] = {}
        for pair in self.described:
            for role, side in zip(("source", "target"), pair):
                found.setdefault((role, side.side.model), set()).add(side.side.layer)
        return {key: tuple(sorted(layers)) for key, layers in found.items()}

    def _stacks(self) -> dict[str, list[int]]:
        """Names and members of the groups that one vmapped program serves."""
        groups: dict[tuple, list[int]] = {}
        for i, (problem, pair) in enumerate(zip(self.problems, self.described)):
            graphs = [modules.split(side.side.dictionary)[0] for side in pair]
            shapes = [(s.side.x.shape, s.side.dictionary.width, s.side.model) for s in pair]
            key = (*shapes, len(problem.validation), *graphs)
            groups.setdefault(key, []).append(i)
        return {f"stack_{n}": members for n, members in enumerate(groups.values())}

    def _towers(self, key: jax.Array, *, abstract: bool = False) -> tuple[dict, dict]:
        """Returns (static graphs, parameters) by role and model."""
        graphs, params = {}, {}
        d_model = {
            (role, side.side.model): side.side.dictionary.W_dec.shape[1]
            for pair in self.described
            for role, side in zip(("source", "target"), pair)
        }
        for number, (name, layers) in enumerate(self.layers.items()):
            own = jax.random.fold_in(key, number)
            size = {"d_model": d_model[name], "layers": len(layers), "shape": self.shape}

            def make(own=own, size=size, tower=TOWERS[name[0]]):
                return tower(**size, rngs=nnx.Rngs(params=own))

            split = modules.abstract(make) if abstract else modules.split(make())
            graphs[name], params[_spelled(name)] = split
        return graphs, params

    def meta(self, labels: list[str]) -> dict:
        unknown = {
            f"{model} {layer}": np.flatnonzero(~mask).tolist()
            for (model, layer), mask in self.known.items()
        }
        config = dataclasses.asdict(self.shape)
        return {"config": config, "members": labels, "seed": self.seed, "unknown": unknown}

    # ------------------------------------------------------------ one step

    def trainable(self) -> Trainable:
        optimizer = _optimizer(self.shape)
        every = max(1, self.shape.steps // LOOKS)

        def init(key):
            params = self._towers(key)[1]
            best = {"params": params, "losses": jnp.full(len(self.problems), jnp.inf)}
            best["step"] = jnp.zeros((), jnp.int32)
            return {"params": params, "train": {"optimizer": optimizer.init(params), "best": best}}

        def step(state, batch, number, key):
            def loss_of(params):
                losses = self._losses(params, batch["fixed"], batch["rows"], key)
                return losses.mean(), losses

            grads, losses = jax.grad(loss_of, has_aux=True)(state["params"])
            memory = state["train"]["optimizer"]
            updates, memory = optimizer.update(grads, memory, state["params"])
            params = optax.apply_updates(state["params"], updates)
            last = number + 1
            look = (last % every == 0) | (last == self.shape.steps)
            best = jax.lax.cond(
                look, self._look, lambda best, *_: best, state["train"]["best"], params, batch, last
            )
            new = {"params": params, "train": {"optimizer": memory, "best": best}}
            return new, {"loss": losses}

        return Trainable(init, step)

    def _look(self, best, params, batch, step):
        losses = self._losses(params, batch["fixed"], batch["look"], None)
        better = losses.mean() < best["losses"].mean()
        found = {"params": params, "losses": losses, "step": step}
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), found, best)

    def _losses(self, params, fixed, rows, key) -> jax.Array:
        """Returns every problem's share of variance that is missed, [problems]."""
        losses = jnp.zeros(len(self.problems))
        for number, (name, members) in enumerate(self.stacks.items()):
            source, target = self.described[members[0]]
            towers = [
                modules.merge(self.graphs[tower], params[_spelled(tower)])
                for tower in (("source", source.side.model), ("target", target.side.model))
            ]
            graphs = [modules.split(side.side.dictionary)[0] for side in (source, target)]
            own = None if key is None else jax.random.fold_in(key, number)
            losses = losses.at[np.array(members)].set(
                self._stack_losses(towers, graphs, fixed[name], rows[name], own)
            )
        return losses

    def _stack_losses(self, towers, graphs, fixed, rows, key) -> jax.Array:
        def one(fixed, x_a, x_b, key):
            keys = (None, None) if key is None else jax.random.split(key)
            f_a, f_b = (
                modules.merge(graph, fixed[name]).encode(x)  # made here, never stored
                for graph, name, x in zip(graphs, ("dictionary_a", "dictionary_b"), (x_a, x_b))
            )
            centred = (f_a - fixed["given"]["source"]["mean"][None, :]) * fixed["known_a"][None, :]
            rate = self.shape.feature_dropout
            # Whole features go, so that the network learns to do without any of them.
            kept = _dropped(jnp.ones(centred.shape[1]), rate, keys[0])
            weights = written(*towers, fixed["given"], keys[1])
            error = (_apply(weights, centred * kept[None, :]) - f_b) * fixed["known_b"][None, :]
            return jnp.sum(jnp.square(error)) / (len(x_b) * fixed["variance"])

        if key is None:
            return jax.vmap(lambda *each: one(*each, None))(fixed, rows["x_a"], rows["x_b"])
        keys = jax.random.split(key, len(rows["x_a"]))
        return jax.vmap(one)(fixed, rows["x_a"], rows["x_b"], keys)

    # ------------------------------------------------------------ what a step reads

    def feed(self) -> Feed:
        batch, halves = self.shape.batch_size, {"train": {}, "look": {}}
        for name, members in self.stacks.items():
            for split, rows in halves.items():
                rows[name] = self._rows(members, split)
        fixed = {
            name: self._stacked([self._fixed(i) for i in members])
            for name, members in self.stacks.items()
        }
        by_row = shard(self.mesh, None, DATA)

        def indices(first: int, count: int) -> dict[str, np.ndarray]:
            places = {"start": first * batch, "count": count * batch}
            return {
                name: epoch_order(self.seed, n=rows["x_a"].shape[1], **places).reshape(count, batch)
                for name, rows in halves["train"].items()
            }

        def select(resident, numbers):
            def pick(name):
                def rows(x):
                    return jax.lax.with_sharding_constraint(x[:, numbers[name]], by_row)

                return jax.tree.map(rows, resident["train"][name])

            return {
                "rows": {name: pick(name) for name in numbers},
                "look": resident["look"],
                "fixed": resident["fixed"],
            }

        return Feed(halves | {"fixed": fixed}, indices, select)

    def _rows(self, members: list[int], split: str) -> dict[str, jax.Array]:
        pairs = [
            self.problems[i].train if split == "train" else self.problems[i].validation
            for i in members
        ]
        n = len(pairs[0])
        some = np.arange(n) if split == "train" else np.linspace(0, n - 1, min(n, LOOK_ROWS))
        some = some.astype(np.int64)
        return self._stacked([{"x_a": p.source.x[some], "x_b": p.target.x[some]} for p in pairs])

    def _stacked(self, trees: list) -> dict:
        """Copies on every device: each of them works on a part of the batch's rows."""
        everywhere = shard(self.mesh)
        return jax.tree.map(
            lambda *leaves: put(np.stack([np.asarray(a) for a in leaves]), everywhere), *trees
        )

    def _fixed(self, i: int) -> dict:
        """What a problem's loss reads and does not train."""
        pair = self.described[i]
        known = [self._known(side) for side in pair]
        places = {
            role: place(side.side.layer, self.layers[role, side.side.model])
            for role, side in zip(("source", "target"), pair)
        }
        # Where none of B's features varies, the error stays in raw units.
        variance = np.float32(np.sum(pair[1].variance * known[1]) or 1.0)
        a, b = (modules.split(side.side.dictionary)[1] for side in pair)
        masks = {"known_a": np.float32(known[0]), "known_b": np.float32(known[1])}
        given = _given(*pair, self.shape, places, known[0])
        dictionaries = {"dictionary_a": a, "dictionary_b": b}
        return masks | dictionaries | {"given": given, "variance": variance}

    def _known(self, side: Description) -> np.ndarray:
        everything = np.ones(side.side.dictionary.width, bool)
        return self.known.get((side.side.model, side.side.layer), everything)

    # ------------------------------------------------------------ what comes out

    def network(self, params) -> Network:
        towers = {
            name: modules.merge(graph, params[_spelled(name)])
            for name, graph in self.graphs.items()
        }
        return Network(self.shape, towers, self.layers)

    def records(self, best, labels: list[str]) -> list[dict[str, Any]]:
        return [
            {
                "parameters": "of the best look at validation rows",
                "step": int(best["step"]),
                "validation_fvu": float(loss),
                "trained_with": labels,
            }
            for loss in best["losses"]
        ]


def _spelled(name: tuple[str, str]) -> str:
    return " ".join(name)


def _optimizer(shape: HypernetworkConfig) -> optax.GradientTransformation:
    """Clipped AdamW, warmed up over a tenth of the steps, cosine decay to 0."""
    warm = max(1, shape.steps // 10)
    peak = shape.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warm, max(shape.steps, warm + 1))
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=shape.weight_decay)
    )
