"""The one trainer: members of equal shape, stacked on a leading axis, in one compiled step.

Dictionaries, crosscoders, trained maps, the hypernetwork and small language models are each an
``Objective``: what one member is trained to do. Everything else (stacking, optimiser state, data
order, accumulation, validation, checkpoints, unstacking) is done here, once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crossdict_jax.errors import UserError
from crossdict_jax.training.loop import Feed, PyTree, Trainable, epoch_order, train
from crossdict_jax.training.mesh import DATA, MEMBER, from_bits, make_mesh, put, shard, to_bits
from crossdict_jax.workdir import write_json

ROWS_SHARE = 0.5  # of a device's memory; more rows than that stay on the host


@dataclasses.dataclass(frozen=True)
class Context:
    """What a member's loss reads beside its parameters and its batch.

    Attributes:
      fixed: pytree of this member that training does not change.
      memory: what the objective carries from step to step (``Objective.start``).
      shared: what ``Objective.shared`` made of all members.
      whole: what ``Objective.whole_batch`` says of a batch that comes in parts; else None.
      number: the step's number.
      key: this member's random key at this step.
    """

    fixed: PyTree
    memory: PyTree
    shared: PyTree
    whole: PyTree
    number: jax.Array
    key: jax.Array


class Objective:
    """What one member of an ensemble is trained to do, in pure functions.

    Attributes:
      frozen: top-level parameters that no gradient updates.
      parts: into how many a batch is cut, one after another: less memory, the same gradients.
      validate_every: steps between validations; the parameters of the best one are the result. 0:
        no validation, the last parameters are.
      patience: validations without a better score after which a member's updates end.
    """

    frozen: tuple[str, ...] = ()
    parts: int = 1
    validate_every: int = 0
    patience: float = math.inf

    def init(self, key: jax.Array, fixed: PyTree) -> PyTree:
        """Returns the parameters before the first step."""
        raise NotImplementedError

    def optimizer(self, fixed: PyTree) -> optax.GradientTransformation:
        """Returns what turns gradients into what is added to the parameters."""
        raise NotImplementedError

    def loss(self, params: PyTree, batch: PyTree, context: Context) -> tuple[jax.Array, tuple]:
        """Returns (loss [], ({metric: array}, aux)); ``aux`` is for ``update``."""
        raise NotImplementedError

    def start(self, params: PyTree) -> PyTree:
        """Returns the memory before the first step."""
        return ()

    def shared(self, memory: PyTree) -> PyTree:
        """Returns what every member's loss reads of all members' stacked memory.

        A scalar of it is the same for all members: a branch on it stays a branch under vmap.
        """
        return ()

    def whole_batch(self, params: PyTree, parts: PyTree, context: Context) -> PyTree:
        """Returns what a part's loss must know of the whole batch; gets no gradient.

        Args:
          parts: the batch with a leading axis of parts.
        """
        return None

    def join(self, aux: PyTree) -> PyTree:
        """Returns the ``aux`` of a batch from that of its parts, stacked on a leading axis."""
        return jax.tree.map(lambda a: a.mean(axis=0), aux)

    def update(self, params: PyTree, memory: PyTree, aux: PyTree) -> tuple[PyTree, PyTree]:
        """Returns parameters and memory after a step: constraints, and what is measured."""
        return params, memory

    def score(self, params: PyTree, batch: PyTree, fixed: PyTree) -> jax.Array:
        """Returns the validation score [], lower is better, on the member's validation batch."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """An objective, its members, and where their rows come from.

    Attributes:
      feed: gives batches {"rows": [members, batch, ...], "fixed": [members, ...] and, with
        validation, "validation": [members, ...]}; see ``row_feed``.
      fixed: pytree of arrays stacked over members; ``fixed["id"]`` int [members] tells members'
        random keys apart, so that the others trained beside a member change nothing.
      labels: of the members, in order.
    """

    objective: Objective
    feed: Feed
    fixed: dict[str, PyTree]
    labels: tuple[str, ...]
    mesh: jax.sharding.Mesh

    def by_member(self, abstract: PyTree) -> PyTree:
        """Returns the sharding of every array of a stacked tree: members over devices."""
        return jax.tree.map(lambda _: shard(self.mesh, MEMBER), abstract)

    def trainable(self, steps: int) -> Trainable:
        """Returns the step of the whole ensemble, and its state before the first."""
        objective, fixed = self.objective, self.fixed

        def init(root):
            def member(fixed):
                params = objective.init(jax.random.fold_in(root, fixed["id"]), fixed)
                train = {"optimizer": objective.optimizer(fixed).init(params)}
                train["memory"] = objective.start(params)
                if objective.validate_every:
                    train["best"] = _nothing_validated(params)
                return {"params": params, "train": train}

            return jax.vmap(member)(jax.tree.map(jnp.asarray, fixed))

        def step(state, batch, number, key):
            shared = objective.shared(state["train"]["memory"])

            def member(state, rows, fixed):
                own_key = jax.random.fold_in(key, fixed["id"])
                memory = state["train"]["memory"]
                context = Context(fixed, memory, shared, None, number, own_key)
                return _member_step(objective, state, rows, context)

            # See mesh.on_own_rows: code inside speaks of a member's rows as whole.
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                over_members = jax.vmap(member, spmd_axis_name=MEMBER)
                state, metrics = over_members(state, batch["rows"], batch["fixed"])
                if objective.validate_every:
                    state, metrics = _validated(objective, state, metrics, batch, number, steps)
            return state, metrics

        return Trainable(init, step)

    def fit(
        self,
        *,
        steps: int,
        seed: int,
        directory: Path,
        checkpoint_every: int,
        title: str,
        meta: dict,
        records: Sequence[str] = (),
    ) -> list[PyTree]:
        """Returns every member's trained parameters, as arrays on the host.

        With validation those of its best score, as {"params", "score", "step", "stale"}. A killed
        run goes on and ends with the same bits: ``directory`` keeps checkpoints, metrics and the
        members' labels.

        Args:
          meta: JSON values that the result depends on; a checkpoint with others is refused.
        """
        labels = list(self.labels)
        write_json(Path(directory) / "members.json", [{"label": label} for label in labels])
        state = train(
            self.trainable(steps),
            feed=self.feed,
            steps=steps,
            seed=seed,
            directory=directory,
            checkpoint_every=checkpoint_every,
            title=title,
            shardings=self.by_member,
            meta={"members": labels, **meta},
            records=records,
            labels=labels,
        )
        result = state["train"]["best"] if self.objective.validate_every else state["params"]
        everywhere = jax.jit(lambda tree: tree, out_shardings=shard(self.mesh))(result)
        stacked = jax.tree.map(np.asarray, everywhere)
        return [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(len(labels))]


# ---------------------------------------------------------------- one member's step


def _member_step(objective: Objective, state: PyTree, rows: PyTree, context: Context):
    """(new state, metrics) of one member; nothing moves where its patience is over."""
    params, train = state["params"], state["train"]
    (loss, metrics, aux), grads = _gradients(objective, params, rows, context)
    if objective.frozen:
        zeros = {name: grads[name] for name in objective.frozen if name in grads}
        grads = grads | jax.tree.map(jnp.zeros_like, zeros)
    updates, optimizer = objective.optimizer(context.fixed).update(
        grads, train["optimizer"], params
    )
    new_params, memory = objective.update(
        optax.apply_updates(params, updates), train["memory"], aux
    )
    new_train = train | {"optimizer": optimizer, "memory": memory}
    if objective.validate_every:
        stopped = train["best"]["stale"] >= objective.patience
        old, new = (params, train), (new_params, new_train)
        new_params, new_train = jax.tree.map(lambda a, b: jnp.where(stopped, a, b), old, new)
    return {"params": new_params, "train": new_train}, {"loss": loss} | metrics


def _gradients(objective: Objective, params: PyTree, rows: PyTree, context: Context):
    """((loss, metrics, aux), gradients) of a batch, in parts if the objective asks for them.

    A first pass without gradients takes what a part's loss must know of the whole batch; given
    that, the loss of the whole is the mean of the parts' losses, and so is its gradient.
    """

    def value_and_grad(rows, context):
        loss_of = jax.value_and_grad(objective.loss, has_aux=True)
        (loss, (metrics, aux)), grads = loss_of(params, rows, context)
        return (loss, metrics, grads), aux

    if objective.parts == 1:
        (loss, metrics, grads), aux = value_and_grad(rows, context)
        return (loss, metrics, aux), grads
    # Part j has rows j, j + parts, ...: rows that are spread over devices stay where they are.
    parts = jax.tree.map(
        lambda a: a.reshape(-1, objective.parts, *a.shape[1:]).swapaxes(0, 1), rows
    )
    whole = jax.lax.stop_gradient(objective.whole_batch(params, parts, context))
    context = dataclasses.replace(context, whole=whole)

    def add(total, part):
        result, aux = value_and_grad(part, context)
        return jax.tree.map(jnp.add, total, result), aux

    first = jax.tree.map(lambda a: a[0], parts)
    like, _ = jax.eval_shape(lambda part: value_and_grad(part, context), first)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    total, aux = jax.lax.scan(add, zeros, parts)
    loss, metrics, grads = jax.tree.map(lambda a: a / objective.parts, total)
    return (loss, metrics, objective.join(aux)), grads


# ---------------------------------------------------------------- validation


def _nothing_validated(params: PyTree) -> dict[str, PyTree]:
    return {
        "params": params,
        "score": jnp.full((), jnp.inf, jnp.float32),  # any other is better
        "latest": jnp.zeros(()),
        "step": jnp.zeros((), jnp.int32),  # the number of the best validation's step
        "stale": jnp.zeros((), jnp.int32),  # validations since then
    }


def _validated(objective, state, metrics, batch, number, steps):
    """The state with every member's best parameters till now, looked at every few steps."""

    def member(state, validation, fixed):
        best, params = state["train"]["best"], state["params"]
        score = objective.score(params, validation, fixed)
        better = score < best["score"]
        new = {"params": params, "score": score, "step": jnp.asarray(number, jnp.int32)}
        kept = jax.tree.map(
            lambda a, b: jnp.where(better, b, a), {name: best[name] for name in new}, new
        )
        stopped = best["stale"] >= objective.patience
        stale = jnp.where(better, 0, best["stale"] + 1)
        return kept | {"latest": score, "stale": jnp.where(stopped, best["stale"], stale)}

    look = (number % objective.validate_every == 0) | (number == steps - 1)
    # One predicate for the whole ensemble: under vmap a branch would be computed both ways.
    best = jax.lax.cond(
        look,
        lambda: jax.vmap(member, spmd_axis_name=MEMBER)(state, batch["validation"], batch["fixed"]),
        lambda: state["train"]["best"],
    )
    state = state | {"train": state["train"] | {"best": best}}
    return state, metrics | {"validation": best["latest"]}


# ---------------------------------------------------------------- rows


@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows that members read: several sources of equal shape, and which of them each member reads.

    Attributes:
      rows: pytree of arrays [sources, n, ...]; bfloat16 ones come out as float32.
      source: int [members].
      order: int [members, n], the order in which a member's rows stand beside the other streams'
        (shuffled pairs); None: as they are.
    """

    rows: PyTree
    source: np.ndarray
    order: np.ndarray | None = None


def row_feed(
    streams: Mapping[str, Stream],
    *,
    mesh: jax.sharding.Mesh,
    fixed: PyTree,
    seeds: Sequence[int],
    batch_size: int,
    setting: str,
    validation: PyTree = None,
    resident: bool | None = None,
) -> Feed:
    """Returns the feed of an ensemble: batch_size rows of every stream for every member and step.

    Members of equal seeds read the same rows in the same order, whoever else is trained.

    Args:
      fixed: stacked over members; handed on with every batch, as ``validation`` is.
      seeds: per member, of its order of rows.
      setting: the name of the batch size's setting, for error messages.
      resident: whether rows stay on the devices, or on the host, which then sends the batches of a
        chunk of steps at a time; None: on the devices if they fit beside the training.

    Raises:
      UserError: the batch does not divide over the devices.
    """
    devices = mesh.shape[DATA]
    if batch_size % devices:
        raise UserError(
            f"{setting}={batch_size} cannot be shared by {devices} devices; use a multiple of "
            f"{devices}."
        )
    data = {name: jax.tree.map(to_bits, stream.rows) for name, stream in streams.items()}
    n = jax.tree.leaves(data)[0].shape[1]
    distinct = sorted(set(seeds))
    order_of = np.asarray([distinct.index(seed) for seed in seeds])
    if resident is None:
        resident = rows_fit(sum(a.nbytes for a in jax.tree.leaves(data)))
    orders = {name: s.order for name, s in streams.items() if s.order is not None}

    def indices(first: int, count: int) -> np.ndarray:
        span = {"start": first * batch_size, "count": count * batch_size, "n": n}
        chosen = [epoch_order(seed, **span).reshape(count, batch_size) for seed in distinct]
        return np.stack(chosen, axis=1)  # [steps, distinct seeds, batch]

    def gather(data, orders, index):
        """Rows [..., members, batch, ...] of every stream, on the device or on the host."""
        index = index[..., order_of, :]
        members = np.arange(len(seeds))[:, None]

        def pick(name, array):
            rows = orders[name][members, index] if name in orders else index
            return array[streams[name].source[:, None], rows]

        return {n: jax.tree.map(lambda a, n=n: pick(n, a), tree) for n, tree in data.items()}

    def select(there, sent):
        rows = gather(there["rows"], there["orders"], sent) if resident else sent
        spread = shard(mesh, MEMBER, DATA)
        rows = jax.tree.map(lambda a: jax.lax.with_sharding_constraint(from_bits(a), spread), rows)
        return {"rows": rows, "fixed": there["fixed"], "validation": there["validation"]}

    by_member = shard(mesh, MEMBER)
    held = {"fixed": put_tree(fixed, by_member), "validation": put_tree(validation, by_member)}
    if resident:
        everywhere = shard(mesh)
        held |= {"rows": put_tree(data, everywhere), "orders": put_tree(orders, everywhere)}
        return Feed(held, indices, select)
    return Feed(held, lambda first, count: gather(data, orders, indices(first, count)), select)


def put_tree(tree: PyTree, sharding: jax.sharding.NamedSharding) -> PyTree:
    """Returns a pytree of arrays on the devices."""
    return jax.tree.map(lambda a: put(np.asarray(a), sharding), tree)


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Returns members' pytrees of equal shapes as one, with members on a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(a) for a in leaves]), *trees)


def members_at_once(one: int, rows: int) -> int:
    """Returns how many members of ``one`` byte each fit the devices beside resident rows."""
    limit = device_memory()
    if limit is None:
        return 1_000_000
    return max(1, int(0.8 * limit * jax.device_count() // (one + (rows if rows_fit(rows) else 0))))


def rows_fit(size: int) -> bool:
    """Whether rows of so many bytes stay on every device, and leave room for a training."""
    limit = device_memory()
    return limit is None or size <= ROWS_SHARE * limit


def device_memory() -> int | None:
    """Returns the bytes of a device's memory; None where it does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def make_ensemble(
    objective: Objective, *, fixed: dict[str, Any], labels: Sequence[str], **rows: Any
) -> Ensemble:
    """Returns an ensemble whose rows come from ``row_feed(**rows)``, on a mesh of its own."""
    mesh = make_mesh(members=len(labels))
    feed = row_feed(**rows, mesh=mesh, fixed=fixed)
    return Ensemble(objective, feed, fixed, tuple(labels), mesh)
