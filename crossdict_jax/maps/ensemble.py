"""Trains the network maps of all problems together: those of equal shapes in one compiled step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.config import MapConfig
from crossdict_jax.maps import heads
from crossdict_jax.maps.base import Map, Problem, Side
from crossdict_jax.maps.codes import Compact, compact
from crossdict_jax.maps.losses import transfer_loss
from crossdict_jax.training.ensemble import Ensemble, Objective, Stream, make_ensemble, stack
from crossdict_jax.training.mesh import from_bits, on_own_rows, to_bits

SLOTS = 0.5  # active features of a row, of d_model: with more, codes take more memory than rows
VALIDATION_ROWS = 4096  # at most, evenly spread, on which a member in training is scored
WEIGHT_DECAY = 1e-4  # of matrices
GRADIENT_CLIP = 1.0  # largest norm of a member's gradient


class TransferObjective(Objective):
    """Trains a network map on the losses of what its head selects from.

    Its validation score is the loss of its features as they will be used, without dropout, mean
    over whole batches; ``config.patience`` validations without a better one end its updates.
    """

    validate_every = 50

    def __init__(self, cls: type[Map], problem: Problem, values, config: MapConfig):
        source, target = problem.train.source.dictionary, problem.train.target.dictionary
        self.config, self.patience = config, config.patience
        self.shape = {"width_a": source.width, "hidden": config.hidden, "width_b": target.width}
        self.source_graph, _ = modules.split(source)
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
        """Returns the weighted sum of the losses, and each of them, of a batch of rows.

        Without a key, of the features as they will be used.
        """
        own = {"dictionary": fixed["dictionary_b"]}
        m = modules.merge(self.graph, fixed["values"] | params | own)
        source = modules.merge(self.source_graph, fixed["dictionary_a"])
        f_a, f_b = (  # both sides' features [batch, width] of codes or activations
            on_own_rows(Compact.dense, rows[name])
            if isinstance(rows[name], Compact)
            else dictionary.encode(from_bits(rows[name]).astype(jnp.float32))
            for name, dictionary in (("a", source), ("b", m.dictionary))
        )
        if key is None:
            z = p = m(f_a, tokens=rows["tokens"])
        else:  # there is a gradient wherever the target fires: the losses read ``rectified(z)``
            settings = {"key": key, "dropout": self.config.dropout}
            z = m.estimate(f_a, tokens=rows["tokens"], **settings)
            p = heads.rectified(z)
        weights, variance = self.config.loss_weights, fixed["variance"]
        return transfer_loss(p, f_b, weights, variance=variance, fires=m.fires(z))

    def loss(self, params, batch, context):
        key = jax.random.split(context.key)[0]
        loss, terms = self.losses(params, batch, context.fixed, key)
        return loss, (terms, ())

    def terms(self, params, batches, fixed) -> dict[str, jax.Array]:
        """Returns the losses of a member's features, mean over stacked batches."""
        loss, terms = jax.lax.map(lambda rows: self.losses(params, rows, fixed), batches)
        return jax.tree.map(jnp.mean, {"loss": loss} | terms)

    def score(self, params, batch, fixed):
        return self.terms(params, batch, fixed)["loss"]


def initial(
    key: jax.Array | int, *, width_a: int, hidden: int, width_b: int, head: str
) -> modules.Params:
    """Returns the trained parameters of a network map before the first step."""
    xavier, rngs = nnx.initializers.xavier_uniform(), nnx.Rngs(params=key)
    # Zeros, so that the map starts at its baseline and every live output has a gradient.
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


def prepare(
    cls: type[Map], problems: Sequence[Problem], config: MapConfig, *, seed: int
) -> tuple[Ensemble, list[tuple[modules.Params, dict]]]:
    """Returns the ensemble of problems of equal shapes, and what ``cls.measure`` says of each.

    Raises:
      UserError: a batch does not divide over the devices.
    """
    measured = [cls.measure(problem) for problem in problems]
    values = cls.alike([values for values, _ in measured])
    fixed = [
        {
            "id": np.uint32(i),
            "dictionary_a": modules.split(problem.train.source.dictionary)[1],
            "dictionary_b": modules.split(problem.train.target.dictionary)[1],
            "values": values[i],
            # Where none of B's features varies, the error stays in raw units.
            "variance": np.float32(problem.train.target.feature_moments.variance.mean() or 1.0),
        }
        for i, problem in enumerate(problems)
    ]
    n = min(len(problems[0].validation), VALIDATION_ROWS)
    size = min(config.batch_size, n)
    rows = np.linspace(0, len(problems[0].validation) - 1, n // size * size).astype(np.int64)

    def batches(stream: Stream) -> dict:
        """Every member's validation rows in whole batches [members, batches, size, ...]."""

        def take(array):
            index = np.broadcast_to(rows, (len(problems), len(rows)))
            index = index if stream.order is None else stream.order[:, rows]
            taken = array[stream.source[:, None], index]
            return to_bits(taken.reshape(len(problems), -1, size, *taken.shape[2:]))

        return jax.tree.map(take, stream.rows)

    ensemble = make_ensemble(
        TransferObjective(cls, problems[0], values[0], config),
        fixed=stack(fixed),
        labels=[problem.label for problem in problems],
        streams=_streams([problem.train for problem in problems]),
        seeds=[seed] * len(problems),
        batch_size=config.batch_size,
        setting="map.batch_size",
        validation={
            name: batches(stream)
            for name, stream in _streams([problem.validation for problem in problems]).items()
        },
    )
    return ensemble, measured


def _streams(members: Sequence) -> dict[str, Stream]:
    """What a step reads of each member's pairs: both sides' codes or activations, and tokens.

    Rows that several members read, in whatever order, are held once.
    """
    streams = {}
    for name, sides in (("a", [p.source for p in members]), ("b", [p.target for p in members])):
        straight = [side if side.reordered_from is None else side.reordered_from for side in sides]
        distinct: dict[int, Side] = {id(side): side for side in straight}
        source = np.array([list(distinct).index(id(side)) for side in straight])
        slots = max(int(np.diff(side.codes.indptr).max(initial=0)) for side in distinct.values())
        few = slots <= SLOTS * sides[0].x.shape[1]
        rows = [compact(side.codes, slots) if few else side.x for side in distinct.values()]
        plain, orders = np.arange(len(sides[0].x)), None
        if any(side.order is not None for side in sides):
            orders = np.stack([plain if s.order is None else s.order for s in sides])
            orders = orders.astype(np.int32)
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
        streams[name] = Stream(stacked, source, orders)
    tokens = np.stack([pairs.source.tokens for pairs in members])
    return streams | {"tokens": Stream(tokens, np.arange(len(members)))}
