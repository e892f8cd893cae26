"""The trainer: members of equal shape, stacked on a leading axis, in one compiled step.

An ``Objective`` says what one member is trained to do.
"""

import dataclasses
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crossdict_jax.training.loop import Feed, PyTree, epoch_order
from crossdict_jax.training.mesh import (
    DATA,
    MEMBER,
    all_devices,
    device_memory,
    from_bits,
    make_mesh,
    put,
    put_filled,
    shard,
    to_bits,
)
from crossdict_jax.workdir import say_once

ROWS_SHARE = 0.5  # of a device's memory; more rows than that stay on the host
WINDOW = 2**17  # rows on the host that are shuffled together, of 2,048 blocks: 32 batches of 4,096
COPIERS = min(8, os.cpu_count() or 1)  # threads: memory is not faster for more
TRAINING_SHARE = 0.8  # of a device's memory, for members beside the rows


@dataclasses.dataclass(frozen=True)
class Context:
    """What a member's loss reads beside its parameters and its batch."""

    fixed: PyTree  # of this member, not changed by training
    memory: PyTree  # what the objective carries from step to step
    variant: Hashable  # of the step (static); see ``Objective.variant``
    totals: PyTree  # what ``Objective.totals`` says of a batch that comes in parts; else None
    number: jax.Array  # of the step
    key: jax.Array  # this member's at this step


class Objective:
    """What one member of an ensemble is trained to do, in pure functions.

    A subclass defines ``init(key, fixed)`` -> parameters; ``optimizer(fixed)`` ->
    ``optax.GradientTransformation``; and ``loss(params, batch, context)`` -> (loss [],
    ({metric: array}, aux)). With validation, also ``score(params, validation, fixed)`` [], lower is
    better; then the best parameters are the result, else the last ones. With ``parts``, also
    ``totals(params, parts, context)``: what a part's loss must know of the whole batch, without a
    gradient; its arrays have a leading axis of parts.
    """

    frozen: tuple[str, ...] = ()  # top-level parameters that no gradient updates
    memory: PyTree = ()  # carried from step to step, before the first one
    parts: int = 1  # of a batch, one after another: less memory, the same gradients
    validate_every: int = 0  # steps; 0: never
    patience: float = math.inf  # validations without a better score that end a member's updates

    def variant(self, memories: PyTree) -> Hashable:
        """Returns which program the next steps need, from all members' memories.

        Asked before each chunk of steps.
        """
        return 0

    def after_step(self, params: PyTree, memory: PyTree, aux: PyTree) -> tuple[PyTree, PyTree]:
        """Returns constrained parameters, and memory with new measurements, after a step.

        ``aux`` is the loss's, with a leading axis of parts.
        """
        return params, memory


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """An objective, its members, and their rows; ``loop.train`` trains them.

    Attributes:
      feed: gives batches {"rows": [members, batch, ...], "fixed": [members, ...] and, with
        validation, "validation": [members, ...]}.
      fixed: pytree of arrays stacked over members; ``fixed["id"]`` int [members] sets a member's
        random keys, whoever else is trained beside it.
      labels: of the members, in order.
    """

    objective: Objective
    feed: Feed
    fixed: dict[str, PyTree]
    labels: tuple[str, ...]
    mesh: jax.sharding.Mesh

    @property
    def layout(self) -> jax.sharding.NamedSharding:
        """The sharding of arrays that are stacked over members."""
        return shard(self.mesh, MEMBER)

    def init(self, root: jax.Array) -> PyTree:
        """Returns {"params", "train"} before the first step; ``train`` is what training needs."""
        objective = self.objective

        def member(fixed):
            params = objective.init(jax.random.fold_in(root, fixed["id"]), fixed)
            train = {"optimizer": objective.optimizer(fixed).init(params)}
            train["memory"] = jax.tree.map(jnp.asarray, objective.memory)
            if objective.validate_every:  # the best one's step, and validations since then
                train["best"] = {"params": params, "score": jnp.full((), jnp.inf, jnp.float32)}
                train["best"] |= {name: jnp.zeros((), jnp.int32) for name in ("step", "stale")}
                train["best"]["latest"] = jnp.zeros(())
            return {"params": params, "train": train}

        return jax.vmap(member)(jax.device_put(self.fixed))

    def step(
        self, state: PyTree, batch: PyTree, number: int, key: jax.Array, variant=0, *, steps: int
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Returns the state after a step, and metrics [members]; the last is ``steps`` - 1."""
        objective = self.objective

        def member(state, rows, fixed):
            params, train = state["params"], state["train"]
            member_key = jax.random.fold_in(key, fixed["id"])
            context = Context(fixed, train["memory"], variant, None, number, member_key)
            (loss, metrics, aux), grads = _gradients(objective, params, rows, context)
            frozen = [name for name in objective.frozen if name in grads]
            grads |= {name: jnp.zeros_like(grads[name]) for name in frozen}
            optimizer = objective.optimizer(fixed)
            with jax.default_matmul_precision("highest"):  # of Muon's products
                updates, slots = optimizer.update(grads, train["optimizer"], params)
            moved = optax.apply_updates(params, updates)
            moved, memory = objective.after_step(moved, train["memory"], aux)
            new = {"params": moved, "train": train | {"optimizer": slots, "memory": memory}}
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


def _gradients(objective: Objective, params: PyTree, rows: PyTree, context: Context):
    """((loss, metrics, aux), gradients) of a batch, in parts if the objective asks for them.

    With ``totals``, a batch's loss is the mean of its parts' losses, and so is its gradient.
    """
    loss_of = jax.value_and_grad(objective.loss, has_aux=True)
    if objective.parts == 1:
        (loss, (metrics, aux)), grads = loss_of(params, rows, context)
        return (loss, metrics, jax.tree.map(lambda a: a[None], aux)), grads
    # Part j has rows j, j + parts, ...: so rows that are spread over devices stay there.
    cut = lambda a: a.reshape(-1, objective.parts, *a.shape[1:]).swapaxes(0, 1)  # noqa: E731
    parts = jax.tree.map(cut, rows)
    totals = jax.lax.stop_gradient(objective.totals(params, parts, context))
    context = dataclasses.replace(context, totals=totals)

    def add(total, part):
        (loss, (metrics, aux)), grads = loss_of(params, part, context)
        return jax.tree.map(jnp.add, total, grads), ((loss, metrics), aux)

    total, (values, aux) = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
    loss, metrics = jax.tree.map(lambda a: a.mean(axis=0), values)
    return (loss, metrics, aux), jax.tree.map(lambda a: a / objective.parts, total)


def _validated(objective, state, metrics, batch, number, steps):
    """The state with every member's best parameters so far."""

    def member(state, validation, fixed):
        best, params = state["train"]["best"], state["params"]
        score, old = objective.score(params, validation, fixed), best["stale"]
        new = {"params": params, "score": score, "step": jnp.asarray(number, jnp.int32)}
        better, before = score < best["score"], {name: best[name] for name in new}
        kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, before)
        worse = old + (score > best["score"])  # a tie is not: a map may begin with zeros alone
        stale = jnp.where(old >= objective.patience, old, jnp.where(better, 0, worse))
        return kept | {"latest": score, "stale": stale}

    look = (number % objective.validate_every == 0) | (number == steps - 1)
    # One predicate for the whole ensemble: under vmap both branches would be computed.
    best = jax.lax.cond(
        look,
        lambda: jax.vmap(member, spmd_axis_name=MEMBER)(state, batch["validation"], batch["fixed"]),
        lambda: state["train"]["best"],
    )
    state = state | {"train": state["train"] | {"best": best}}
    return state, metrics | {"validation": best["latest"]}


# Rows


@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows that members read: sources of equal shape, and which of them each member reads.

    Streams of the same ``rows`` object hold it once. ``order`` permutes a member's rows against
    the other streams' (shuffled pairs).
    """

    rows: PyTree  # arrays [sources, n, ...]; bfloat16 ones come out as float32
    source: np.ndarray  # int [members]
    order: np.ndarray | None = None  # int [members, n]; None: as they are


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
    """Returns an ensemble that reads batch_size rows of every stream per member and step.

    Members of equal seeds read the same rows in the same order, whoever else is trained.

    Args:
      fixed: stacked over members; see ``Ensemble``. In every batch, as is ``validation``.
      seeds: per member, of its order of rows.
      setting: the name of the batch size's setting, for messages.
      resident: whether rows stay on the devices; False: the host sends a chunk's batches at a
        time, shuffled in blocks (``epoch_order``); None: on the devices if they fit beside the
        training, all of them on each or else in parts.
    """
    mesh = make_mesh(members=len(labels), batch=batch_size // objective.parts)
    n, devices = mesh.shape[DATA], len(all_devices())
    if mesh.size < devices:
        used = f"{mesh.size} of {devices} devices, the most that can share it evenly"
        say_once(f"{setting}={batch_size} is trained on {used}")
    distinct, members = sorted(set(seeds)), np.arange(len(seeds))[:, None]
    order_of = np.asarray([distinct.index(seed) for seed in seeds])
    held_as = {id(stream.rows): name for name, stream in streams.items()}
    data = {
        "rows": {name: jax.tree.map(to_bits, streams[name].rows) for name in held_as.values()},
        "orders": {name: s.order for name, s in streams.items() if s.order is not None},
    }
    arrays, limit = jax.tree.leaves(data["rows"]), device_memory()
    n_rows, size = arrays[0].shape[1], sum(a.nbytes for a in arrays)
    whole = limit is None or size <= ROWS_SHARE * limit
    if resident is None:  # in parts: beside members that take all that they may
        resident = whole or (n > 1 and size <= (1 - TRAINING_SHARE) * limit * n)
    parts = n > 1 and not whole

    def indices(first: int, count: int) -> np.ndarray:
        span = {"start": first * batch_size, "count": count * batch_size, "n": n_rows}
        span["window"] = None if resident else WINDOW
        orders = [epoch_order(seed, **span).reshape(count, batch_size) for seed in distinct]
        return np.stack(orders, axis=1)  # [steps, distinct seeds, batch]

    def gather(data, index, take):
        """Rows [..., members, batch, ...] of every stream."""
        index, batch = index[..., order_of, :], {}
        for name, stream in streams.items():
            orders = data["orders"].get(name)
            at = index if orders is None else orders[members, index]
            rows = data["rows"][held_as[id(stream.rows)]]
            batch[name] = jax.tree.map(lambda a, s=stream, at=at: take(a, s.source, at), rows)
        return batch

    def send(first: int, count: int) -> PyTree:
        batch = gather(data, indices(first, count), _copied)
        return put(batch, shard(mesh, None, MEMBER, DATA))

    def look_up(rows, source, at):
        return _looked_up_in_parts(mesh, rows, source, at) if parts else rows[source[:, None], at]

    def select(held, sent):
        rows = gather(held["data"], sent, look_up) if resident else sent
        spread = shard(mesh, MEMBER, DATA)
        rows = jax.tree.map(lambda a: jax.lax.with_sharding_constraint(from_bits(a), spread), rows)
        return {"rows": rows, "fixed": held["fixed"], "validation": held["validation"]}

    held = put({"fixed": fixed, "validation": validation}, shard(mesh, MEMBER))
    if resident:
        # If every member reads a source of its own, devices hold those of their members alone;
        # from rows on all devices the partitioner would cut these in every step.
        for name, rows in data["rows"].items():
            readers = [s.source for s in streams.values() if held_as[id(s.rows)] == name]
            own = all(np.array_equal(source, np.arange(len(labels))) for source in readers)
            layout = shard(mesh, None, DATA) if parts else shard(mesh, *[MEMBER] * own)
            data["rows"][name] = jax.tree.map(lambda a: put_filled(a, layout), rows)  # noqa: B023
        data["orders"] = put(data["orders"], shard(mesh, MEMBER))
        feed = Feed(held | {"data": data}, indices, select)
    else:
        feed = Feed(held, send, select)
    return Ensemble(objective, feed, fixed, tuple(labels), mesh)


def _looked_up_in_parts(mesh, rows: jax.Array, source: np.ndarray, at: jax.Array) -> jax.Array:
    """``rows[source[:, None], at]`` [members, batch, ...] of rows that devices hold in parts.

    Each looks up its own for the whole batch, zeros for others; the sum gives each its share of it.
    """

    def own(rows, source, at):
        index = at - jax.lax.axis_index(DATA) * rows.shape[1]
        here = (index >= 0) & (index < rows.shape[1])
        x = rows[source[:, None], jnp.where(here, index, 0)]
        x = jnp.where(here.reshape(here.shape + (1,) * (x.ndim - 2)), x, jnp.zeros_like(x))
        return jax.lax.psum_scatter(x, DATA, scatter_dimension=1, tiled=True)

    specs = tuple(shard(mesh, *axes).spec for axes in ((None, DATA), (MEMBER,), (MEMBER,)))
    spread = {"mesh": mesh, "in_specs": specs, "out_specs": shard(mesh, MEMBER, DATA).spec}
    return jax.shard_map(own, check_vma=False, **spread)(rows, source, at)


def _copied(rows: np.ndarray, source: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows [steps, members, batch, ...] at these indices of rows [sources, n, ...]."""
    shape = *at.shape, *rows.shape[2:]
    size = math.prod(shape) * rows.itemsize
    memory = np.empty(size + 64, np.uint8)  # aligned, it is read in place by XLA's CPU backend
    out = memory[-memory.ctypes.data % 64 :][:size].view(rows.dtype).reshape(shape)

    def copy(i: tuple[int, int]) -> None:  # of a step and member
        # To clip: else numpy would copy into an array of its own first.
        np.take(rows[source[i[1]]], at[i], axis=0, out=out[i], mode="clip")

    with ThreadPoolExecutor(COPIERS) as threads:
        list(threads.map(copy, np.ndindex(at.shape[:2])))
    return out


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Returns members' pytrees of equal shapes as one, members on a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(a) for a in leaves]), *trees)


def members_at_once(member: int, rows: int) -> int:
    """Returns how many members fit the devices beside resident rows; sizes in bytes."""
    limit = device_memory()
    if limit is None:
        return 1_000_000
    rows = rows if rows <= ROWS_SHARE * limit else 0
    return max(1, int(TRAINING_SHARE * limit * len(all_devices()) // (member + rows)))
