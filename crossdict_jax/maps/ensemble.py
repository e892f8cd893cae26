"""Trains the network maps of all problems together, those of equal shapes in one step."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.config import MapConfig
from crossdict_jax.maps import heads
from crossdict_jax.maps.base import Map, Pairs, Problem, Side
from crossdict_jax.maps.codes import Compact, compact
from crossdict_jax.maps.losses import transfer_loss
from crossdict_jax.training.ensemble import Ensemble, Objective, Stream, make_ensemble, stack
from crossdict_jax.training.mesh import from_bits, on_own_rows, product_dtype, to_bits

SLOTS = 0.5  # active features of a row, times d_model: with more, codes take more memory than rows
VALIDATION_ROWS = 4096  # at most, evenly spread, for a member's validation
WEIGHT_DECAY = 1e-4  # of matrices
PATIENCE = 5  # validations without a better one that end a member's training
GRADIENT_CLIP = 1.0  # largest norm of a member's gradient


@dataclasses.dataclass(frozen=True)
class Selected:
    """What a map in training asks of its dictionary where rows are codes: how many fire, or 0."""

    k: int


class TransferObjective(Objective):
    """Trains a network map on the losses of its head's input.

    Validation is the loss of its final features without dropout, mean over whole batches; after
    PATIENCE validations without a better one a member stops.
    """

    validate_every, patience = 50, PATIENCE

    def __init__(
        self, cls: type[Map], problem: Problem, values, config: MapConfig, *, codes: bool = False
    ):
        """``codes``: rows hold codes; then dictionaries of any d_model train together."""
        source, target = problem.train.source.dictionary, problem.train.target.dictionary
        self.config, self.dtype = config, product_dtype(config.matmul_dtype)
        self.shape = {"width_a": source.width, "hidden": config.hidden, "width_b": target.width}
        self.source_graph = None if codes else modules.split(source)[0]
        target = Selected(target.k) if codes else target
        self.graph, _ = modules.abstract(
            lambda: cls(target, self.init(jax.random.key(0), {}) | values, head=config.head)
        )

    def init(self, key, fixed):
        return initial(key, **self.shape, head=self.config.head)

    def optimizer(self, fixed):
        """Clipped AdamW with cosine decay to 0; only matrices decay."""
        return optax.chain(
            optax.clip_by_global_norm(GRADIENT_CLIP),
            optax.adamw(
                optax.cosine_decay_schedule(self.config.learning_rate, self.config.steps),
                weight_decay=WEIGHT_DECAY,
                mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
            ),
        )

    def losses(self, params, rows, fixed, key=None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the weighted sum of a batch's losses, and each of them.

        Without a key they are of the final features.
        """
        values = fixed["values"] | params
        if self.source_graph is None:
            m = modules.merge(self.graph, values)
            f_a, f_b = (on_own_rows(Compact.dense, rows[name]) for name in "ab")
        else:
            m = modules.merge(self.graph, values | {"dictionary": fixed["dictionary_b"]})
            source = modules.merge(self.source_graph, fixed["dictionary_a"])
            x_a, x_b = (from_bits(rows[name]).astype(jnp.float32) for name in "ab")
            f_a, f_b = source.encode(x_a), m.dictionary.encode(x_b)
        if key is None:
            z = p = m(f_a, tokens=rows["tokens"])
        else:  # losses read ``rectified(z)``: a gradient wherever the target fires
            settings = {"key": key, "dropout": self.config.dropout, "dtype": self.dtype}
            z = m.estimate(f_a, tokens=rows["tokens"], **settings)
            p = heads.rectified(z)
        weights, variance = self.config.loss_weights, fixed["variance"]
        return transfer_loss(p, f_b, weights, variance=variance, fires=m.fires(z))

    def loss(self, params, batch, context):
        key = jax.random.split(context.key)[0]
        loss, terms = self.losses(params, batch, context.fixed, key)
        return loss, (terms, ())

    def terms(self, params, batches, fixed) -> dict[str, jax.Array]:
        """Returns a member's losses, mean over stacked batches."""
        loss, terms = jax.lax.map(lambda rows: self.losses(params, rows, fixed), batches)
        return jax.tree.map(jnp.mean, {"loss": loss} | terms)

    def score(self, params, batch, fixed):
        return self.terms(params, batch, fixed)["loss"]


def initial(
    key: jax.Array | int, *, width_a: int, hidden: int, width_b: int, head: str
) -> modules.Params:
    """Returns the trained parameters of a network map before the first step."""
    xavier, rngs = nnx.initializers.xavier_uniform(), nnx.Rngs(params=key)
    # Zeros: the map starts at its baseline and every live output has a gradient.
    zeros = nnx.initializers.zeros_init()
    network = {
        "first": nnx.Linear(width_a, hidden, kernel_init=xavier, rngs=rngs),
        "norm_1": nnx.LayerNorm(hidden, rngs=rngs),
        "second": nnx.Linear(hidden, hidden, kernel_init=xavier, rngs=rngs),
        "norm_2": nnx.LayerNorm(hidden, rngs=rngs),
        "last": nnx.Linear(hidden, width_b, kernel_init=zeros, rngs=rngs),
    }
    trained = {"network": {name: modules.split(layer)[1] for name, layer in network.items()}}
    if head == "jumprelu":
        trained["threshold"] = jnp.full(width_b, heads.INITIAL_THRESHOLD, jnp.float32)
    return trained


def shapes(problem: Problem) -> tuple:
    """Returns what problems must share to be trained in one step; first, whether rows are codes.

    They are where that takes less memory than activations; dictionaries then matter little.
    """
    sides = [s for p in (problem.train, problem.validation) for s in (p.source, p.target)]
    if all(_slots(s) <= SLOTS * s.x.shape[1] for s in sides):
        return True, *((len(s.x), s.dictionary.width, s.dictionary.k) for s in sides)
    return False, *((s.x.shape, modules.split(s.dictionary)[0]) for s in sides)


def _slots(side: Side) -> int:
    return int(np.diff((side.reordered_from or side).codes.indptr).max(initial=0))


def prepare(
    cls: type[Map], problems: Sequence[Problem], config: MapConfig, *, seed: int
) -> tuple[Ensemble, list[tuple[modules.Params, dict]]]:
    """Returns the ensemble of problems of equal shapes, and ``cls.measure`` of each.

    Raises:
      UserError: a batch does not divide over the devices.
    """
    measured = [cls.measure(problem) for problem in problems]
    values = cls.alike([values for values, _ in measured])
    codes, fixed, alike = shapes(problems[0])[0], [], Counter()
    for problem, of_problem in zip(problems, values):
        source, target = problem.train.source, problem.train.target
        sizes = source.x.shape, target.x.shape
        member = {"id": np.uint32(alike[sizes]), "values": of_problem}  # others change no start
        alike[sizes] += 1
        # Where none of B's features varies, the error stays in raw units.
        member["variance"] = np.float32(target.feature_moments.variance.mean() or 1.0)
        if not codes:
            for name, side in (("a", source), ("b", target)):
                member[f"dictionary_{name}"] = modules.split(side.dictionary)[1]
        fixed.append(member)
    n = min(len(problems[0].validation), VALIDATION_ROWS)
    size = min(config.batch_size, n)
    rows = np.linspace(0, len(problems[0].validation) - 1, n // size * size).astype(np.int64)

    def batches(stream: Stream) -> dict:
        """Members' validation rows in whole batches [members, batches, size, ...]."""

        def take(array):
            index = np.broadcast_to(rows, (len(problems), len(rows)))
            index = index if stream.order is None else stream.order[:, rows]
            taken = array[stream.source[:, None], index]
            return to_bits(taken.reshape(len(problems), -1, size, *taken.shape[2:]))

        return jax.tree.map(take, stream.rows)

    ensemble = make_ensemble(
        TransferObjective(cls, problems[0], values[0], config, codes=codes),
        fixed=stack(fixed),
        labels=[problem.label for problem in problems],
        streams=_streams([problem.train for problem in problems], codes),
        seeds=[seed] * len(problems),
        batch_size=config.batch_size,
        setting="map.batch_size",
        validation={
            name: batches(stream)
            for name, stream in _streams(
                [problem.validation for problem in problems], codes
            ).items()
        },
    )
    return ensemble, measured


def _streams(members: Sequence[Pairs], codes: bool) -> dict[str, Stream]:
    """What a step reads of each member's pairs: both sides' codes or activations, and tokens."""
    ends, orders = ([p.source for p in members], [p.target for p in members]), []
    straight = [[side.reordered_from or side for side in sides] for sides in ends]
    by_id = {id(side): side for sides in straight for side in sides}
    plain = np.arange(len(members[0]), dtype=np.int32)
    for sides in ends:
        stacked = np.stack([plain if s.order is None else s.order for s in sides]).astype(np.int32)
        orders.append(stacked if any(s.order is not None for s in sides) else None)

    def hold(numbers: tuple[int, ...]):
        some = [by_id[number] for number in numbers]
        slots = max(map(_slots, some)) if codes else 0
        return stack([compact(side.codes, slots) if codes else side.x for side in some])

    streams = streams_of_sides(*([id(s) for s in sides] for sides in straight), hold, orders)
    tokens = np.stack([pairs.source.tokens for pairs in members])
    return streams | {"tokens": Stream(tokens, np.arange(len(members)))}


def streams_of_sides(
    sources: Sequence[Hashable], targets: Sequence[Hashable], hold: Callable, orders: Sequence
) -> dict[str, Stream]:
    """Returns the streams "a" and "b" of members' sides, in these orders.

    ``hold`` gives the rows of distinct sides, asked once for a side, whoever reads it in any order,
    as source or as target.
    """
    a, b = (tuple(dict.fromkeys(sides)) for sides in (sources, targets))
    if set(a) & set(b):
        a = b = tuple(dict.fromkeys(a + b))
    hold = functools.cache(hold)
    return {
        name: Stream(hold(held), np.array([held.index(side) for side in sides]), order)
        for name, held, sides, order in zip("ab", (a, b), (sources, targets), orders)
    }
