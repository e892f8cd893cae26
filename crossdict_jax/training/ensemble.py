"""The one trainer: members of equal shape, stacked on a leading axis, in one compiled step.

Dictionaries, crosscoders, trained maps, the hypernetwork and small language models are each an
``Objective``, what one member is trained to do; everything else is done here, once.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crossdict_jax.errors import UserError
from crossdict_jax.training.loop import Feed, PyTree, Trainable, epoch_order
from crossdict_jax.training.mesh import (
    DATA,
    MEMBER,
    all_devices,
    device_memory,
    from_bits,
    make_mesh,
    put,
    shard,
    to_bits,
)

ROWS_SHARE = 0.5  # of a device's memory; more rows than that stay on the host
TRAINING_SHARE = 0.8  # of a device's memory, for members beside the rows


@dataclasses.dataclass(frozen=True)
class Context:
    """What a member's loss reads beside its parameters and its batch.

    Attributes:
      fixed: pytree of this member that training does not change.
      memory: what the objective carries from step to step.
      variant: of the step (static); see ``Objective.variant``.
      totals: what ``Objective.totals`` says of a batch that comes in parts; else None.
      number: of the step.
      key: this member's random key at this step.
    """

    fixed: PyTree
    memory: PyTree
    variant: Hashable
    totals: PyTree
    number: jax.Array
    key: jax.Array


class Objective:
    """What one member of an ensemble is trained to do, in pure functions.

    A subclass defines ``init(key, fixed)``, which returns the parameters before the first step;
    ``optimizer(fixed)``, which returns an ``optax.GradientTransformation``; and
    ``loss(params, batch, context)``, which returns (loss [], ({metric: array}, aux)). If it
    validates, also ``score(params, validation, fixed)`` [], lower is better; and if it cuts batches
    into parts, ``totals(params, parts, context)``: what a part's loss must know, without a
    gradient, of the batch, whose arrays have a leading axis of parts.

    Attributes:
      frozen: top-level parameters that no gradient updates.
      memory: pytree that is carried from step to step, before the first one.
      parts: into how many a batch is cut, one after another: less memory, the same gradients.
      validate_every: steps between validations; the parameters of the best one are the result. 0:
        no validation, the last parameters are.
      patience: validations without a better score after which a member's updates end.
    """

    frozen: tuple[str, ...] = ()
    memory: PyTree = ()
    parts: int = 1
    validate_every: int = 0
    patience: float = math.inf

    def variant(self, memories: PyTree) -> Hashable:
        """Returns which of several programs the next steps need, of all members' memories.

        Asked before each chunk of steps. Each is compiled when it is needed first.
        """
        return 0

    def after_step(self, params: PyTree, memory: PyTree, aux: PyTree) -> tuple[PyTree, PyTree]:
        """Returns parameters and memory after a step: constraints, and what is measured.

        Args:
          aux: of the loss, with a leading axis of parts.
        """
        return params, memory


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """An objective, its members, and where their rows come from; ``loop.train`` trains them.

    Attributes:
      feed: gives batches {"rows": [members, batch, ...], "fixed": [members, ...] and, with
        validation, "validation": [members, ...]}.
      fixed: pytree of arrays stacked over members; ``fixed["id"]`` int [members] tells members'
        random keys apart, so that the others trained beside a member change nothing.
      labels: of the members, in order.
    """

    objective: Objective
    feed: Feed
    fixed: dict[str, PyTree]
    labels: tuple[str, ...]
    mesh: jax.sharding.Mesh

    @property
    def layout(self) -> jax.sharding.NamedSharding:
        """Where arrays that are stacked over members lie."""
        return shard(self.mesh, MEMBER)

    def trainable(self, steps: int) -> Trainable:
        """Returns the step of the whole ensemble, and its state before the first."""
        objective, fixed = self.objective, self.fixed

        def init(root):
            def member(fixed):
                params = objective.init(jax.random.fold_in(root, fixed["id"]), fixed)
                train = {"optimizer": objective.optimizer(fixed).init(params)}
                train["memory"] = jax.tree.map(jnp.asarray, objective.memory)
                if objective.validate_every:  # the best one's step, and validations since then
                    train["best"] = {"params": params, "score": jnp.full((), jnp.inf, jnp.float32)}
                    train["best"] |= {name: jnp.zeros((), jnp.int32) for name in ("step", "stale")}
                    train["best"]["latest"] = jnp.zeros(())
                return {"params": params, "train": train}

            return jax.vmap(member)(jax.tree.map(jnp.asarray, fixed))

        def step(state, batch, number, key, variant=0):
            def member(state, rows, fixed):
                params, train = state["params"], state["train"]
                member_key = jax.random.fold_in(key, fixed["id"])
                context = Context(fixed, train["memory"], variant, None, number, member_key)
                (loss, metrics, aux), grads = _gradients(objective, params, rows, context)
                frozen = {name: grads[name] for name in objective.frozen if name in grads}
                grads |= jax.tree.map(jnp.zeros_like, frozen)
                optimizer = objective.optimizer(fixed)
                updates, slots = optimizer.update(grads, train["optimizer"], params)
                moved = optax.apply_updates(params, updates)
                moved, memory = objective.after_step(moved, train["memory"], aux)
                train = train | {"optimizer": slots, "memory": memory}
                new = {"params": moved, "train": train}
                if objective.validate_every:
                    stopped = train["best"]["stale"] >= objective.patience
                    new = jax.tree.map(lambda a, b: jnp.where(stopped, a, b), state, new)
                return new, {"loss": loss} | metrics

            # See mesh.on_own_rows: code inside speaks of a member's rows as a whole.
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                over_members = jax.vmap(member, spmd_axis_name=MEMBER)
                state, metrics = over_members(state, batch["rows"], batch["fixed"])
                if objective.validate_every:
                    state, metrics = _validated(objective, state, metrics, batch, number, steps)
            return state, metrics

        return Trainable(init, step, lambda state: objective.variant(state["train"]["memory"]))


def _gradients(objective: Objective, params: PyTree, rows: PyTree, context: Context):
    """((loss, metrics, aux), gradients) of a batch, in parts if the objective asks for them.

    Given its totals, the loss of a batch is the mean of its parts' losses, and so is its gradient.
    """
    loss_of = jax.value_and_grad(objective.loss, has_aux=True)
    if objective.parts == 1:
        (loss, (metrics, aux)), grads = loss_of(params, rows, context)
        return (loss, metrics, jax.tree.map(lambda a: a[None], aux)), grads
    # Part j has rows j, j + parts, ...: rows that are spread over devices stay where they are.
    parts = jax.tree.map(
        lambda a: a.reshape(-1, objective.parts, *a.shape[1:]).swapaxes(0, 1), rows
    )
    totals = jax.lax.stop_gradient(objective.totals(params, parts, context))
    context = dataclasses.replace(context, totals=totals)

    def add(total, part):
        (loss, (metrics, aux)), grads = loss_of(params, part, context)
        return jax.tree.map(jnp.add, total, (loss, metrics, grads)), aux

    first = jax.tree.map(lambda a: a[0], parts)
    (loss, (metrics, _)), grads = jax.eval_shape(lambda part: loss_of(params, part, context), first)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (loss, metrics, grads))
    total, aux = jax.lax.scan(add, zeros, parts)
    loss, metrics, grads = jax.tree.map(lambda a: a / objective.parts, total)
    return (loss, metrics, aux), grads


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


def make_ensemble(
    objective: Objective,
    *,
    fixed: dict[str, PyTree],
    labels: Sequence[str],
    streams: Mapping[str, Stream],
    seeds: Sequence[int],
    batch_size: int,
    setting: str,
    validation: PyTree = None,
    resident: bool | None = None,
) -> Ensemble:
    """Returns an ensemble that reads batch_size rows of every stream for every member and step.

    Members of equal seeds read the same rows in the same order, whoever else is trained.

    Args:
      fixed: stacked over members; see ``Ensemble``. Handed on with every batch, as ``validation``.
      seeds: per member, of its order of rows.
      setting: the name of the batch size's setting, for error messages.
      resident: whether rows stay on the devices, or on the host, which then sends a chunk's batches
        at a time; None: on the devices if they fit beside the training.

    Raises:
      UserError: the batch does not divide over the devices.
    """
    mesh = make_mesh(members=len(labels))
    devices = mesh.shape[DATA]
    if batch_size % devices:
        raise UserError(
            f"{setting}={batch_size} cannot be shared by {devices} devices; use a multiple of "
            f"{devices}."
        )
    distinct = sorted(set(seeds))
    order_of = np.asarray([distinct.index(seed) for seed in seeds])
    members = np.arange(len(seeds))[:, None]
    data = {
        "rows": {name: jax.tree.map(to_bits, stream.rows) for name, stream in streams.items()},
        "orders": {name: s.order for name, s in streams.items() if s.order is not None},
    }
    arrays = jax.tree.leaves(data["rows"])
    n = arrays[0].shape[1]
    if resident is None:
        limit = device_memory()
        resident = limit is None or sum(a.nbytes for a in arrays) <= ROWS_SHARE * limit

    def indices(first: int, count: int) -> np.ndarray:
        span = {"start": first * batch_size, "count": count * batch_size, "n": n}
        orders = [epoch_order(seed, **span).reshape(count, batch_size) for seed in distinct]
        return np.stack(orders, axis=1)  # [steps, distinct seeds, batch]

    def gather(data, index):
        """Rows [..., members, batch, ...] of every stream, on the device or on the host."""
        index, batch = index[..., order_of, :], {}
        for name, stream in streams.items():
            orders = data["orders"].get(name)
            at = (stream.source[:, None], index if orders is None else orders[members, index])
            batch[name] = jax.tree.map(lambda a, at=at: a[at], data["rows"][name])
        return batch

    def select(held, sent):
        rows = gather(held["data"], sent) if resident else sent
        spread = shard(mesh, MEMBER, DATA)
        rows = jax.tree.map(lambda a: jax.lax.with_sharding_constraint(from_bits(a), spread), rows)
        return {"rows": rows, "fixed": held["fixed"], "validation": held["validation"]}

    held = put({"fixed": fixed, "validation": validation}, shard(mesh, MEMBER))
    if resident:
        feed = Feed(held | {"data": put(data, shard(mesh))}, indices, select)
    else:
        feed = Feed(held, lambda first, count: gather(data, indices(first, count)), select)
    return Ensemble(objective, feed, fixed, tuple(labels), mesh)


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Returns members' pytrees of equal shapes as one, with members on a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(a) for a in leaves]), *trees)


def members_at_once(member: int, rows: int) -> int:
    """Returns how many members of so many bytes each fit the devices beside resident rows."""
    limit = device_memory()
    if limit is None:
        return 1_000_000
    rows = rows if rows <= ROWS_SHARE * limit else 0
    return max(1, int(TRAINING_SHARE * limit * len(all_devices()) // (member + rows)))
