"""The trained maps: their network and heads, what is measured beside it, and their training."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.config import MapConfig
from crossdict_jax.errors import TooFewRows, UserError
from crossdict_jax.maps.base import Fitted, Map, Problem, Side, check_rows
from crossdict_jax.maps.codes import Compact, compact
from crossdict_jax.maps.losses import transfer_loss
from crossdict_jax.ops import keep_top_k, matmul
from crossdict_jax.training import loop
from crossdict_jax.training.ensemble import Ensemble, Objective, Stream, make_ensemble, stack
from crossdict_jax.training.mesh import (
    DATA,
    from_bits,
    make_mesh,
    on_own_rows,
    product_dtype,
    to_bits,
)

RARE = 0.01  # of the mean variance, added to each: keeps a rare input from dominating its row
INITIAL_THRESHOLD = 1.0  # in standard units of a feature: near where training ends
BANDWIDTH = 0.5  # in the same units, of the kernel that trains thresholds
SLOTS = 0.5  # active features of a row, times d_model: with more, codes take more memory than rows
VALIDATION_ROWS = 4096  # at most, evenly spread, for a member's validation
WEIGHT_DECAY = 1e-4  # of matrices
PATIENCE = 5  # worse validations without a better one that end a member's training
GRADIENT_CLIP = 1.0  # largest norm of a member's gradient


class NetworkMap(Map):
    """``f_B = head(base_b + scale_b * network((f_A - base_a) / scale_a))``.

    The network is ``h -> linear -> LN -> ReLU -> dropout``, twice, then linear, in standard units.
    It starts at base_b.

    A subclass defines ``measure(problem)`` -> (baselines and scales on training rows, a record);
    ``unmeasured(width_a, width_b, tokens)`` -> zeros in their shapes, for so many distinct tokens;
    ``baselines(tokens, batch)`` -> base_a and base_b, [batch or 1, width] each.

    Trained are ``network`` and, of a jumprelu head, ``threshold`` [width], in standard units, so
    that one learning rate suits all features. The sparsity loss alone trains the threshold: squared
    error would have it at 0, where the estimates of the whole target are kept.
    """

    reads = "features"
    fits_together = True
    settings = ("head",)

    @classmethod
    def alike(cls, measured: list[modules.Params]) -> list[modules.Params]:
        """Returns the measured values in arrays of equal shapes, for one compiled step."""
        return measured

    def estimate(
        self,
        f: jax.Array,
        *,
        tokens: jax.Array | None = None,
        key: jax.Array | None = None,
        dropout: float = 0.0,
        dtype: jnp.dtype | None = None,
    ) -> jax.Array:
        """Returns the head's input [batch, width_b]; with a key there is dropout.

        ``dtype`` is that of the products' inputs; None: float32.
        """
        base_a, base_b = self.baselines(tokens, len(f))
        h = (modules.rows(f, len(self.scale_a[...])) - base_a) / self.scale_a[...][None, :]
        keys = (None, None) if key is None else jax.random.split(key)
        for linear, norm, own_key in zip(("first", "second"), ("norm_1", "norm_2"), keys):
            h, norm = _linear(self.network[linear], h, dtype), self.network[norm]
            variance = jnp.var(h, axis=-1, keepdims=True)
            h = jax.nn.standardize(h, variance=variance, epsilon=1e-6)
            h = jax.nn.relu(h * norm.scale[...][None, :] + norm.bias[...][None, :])
            h = dropped(h, dropout, own_key)
        return base_b + self.scale_b[...][None, :] * _linear(self.network.last, h, dtype)

    def fires(self, z: jax.Array) -> jax.Array | None:
        """Returns 1 where a feature fires, else 0, with a gradient; None: by its value."""
        if self.head != "jumprelu":
            return None
        z_standard = z / self.scale_b[...][None, :]
        return gate(z_standard, self.threshold[...][None, :]) * (z > 0)

    def __call__(self, inputs, *, tokens=None):
        raw = self.threshold[...] * self.scale_b[...] if self.head == "jumprelu" else None
        z = self.estimate(inputs, tokens=tokens)
        return select(self.head, z, k=self.dictionary.k, threshold=raw)

    @classmethod
    def fit(cls, problems, config, *, seed, directory, **training) -> list[Fitted]:
        """Trains all problems of equal shapes as one ensemble in one compiled step.

        Each map has the parameters of its best validation. ``directory/KIND-N`` keeps checkpoints,
        metrics and member labels: a killed run goes on and ends with the same bits.

        Without mse a jumprelu head is trained as relu.

        Raises:
          UserError: a batch is larger than the training rows, or a setting does not fit a target's
            dictionary.
        """
        if config.head == "jumprelu" and not config.loss_weights.mse:
            config = dataclasses.replace(config, head="relu")  # without a scale no threshold fits
        groups: dict[tuple, list[Problem]] = {}
        for problem in problems:
            check_rows(problem, cls.kind)
            dictionary = problem.train.target.dictionary
            if config.head == "topk" and "k" not in dictionary.reads:
                raise UserError(
                    "map.head=topk keeps as many features as the target's dictionary, and that of "
                    f"{problem.label} ({type(dictionary).__name__}) fixes no number; use jumprelu."
                )
            if config.batch_size > len(problem.train):
                raise TooFewRows(
                    f"map.batch_size={config.batch_size} is larger than the {len(problem.train)} "
                    f"training rows of {problem.label}; lower it or raise text.documents."
                )
            groups.setdefault(shapes(problem), []).append(problem)
        fitted: dict[int, Fitted] = {}
        for number, members in enumerate(groups.values()):
            ensemble, measured = prepare(cls, members, config, seed=seed)
            best = loop.train(
                ensemble,
                steps=config.steps,
                seed=seed,
                directory=Path(directory) / f"{cls.kind}-{number}",
                title=f"train {len(members)} maps",
                meta={
                    "config": dataclasses.asdict(config),
                    "seed": seed,
                    "dictionaries": [problem.dictionaries for problem in members],
                },
                **training,
            )
            held, params = ensemble.feed.resident, stack([m["params"] for m in best])
            evaluate = jax.jit(jax.vmap(ensemble.objective.terms))
            terms = evaluate(params, held["validation"], held["fixed"])
            for j, (problem, kept, (values, record)) in enumerate(zip(members, best, measured)):
                record |= {
                    "steps": int(kept["step"]) + 1,  # until the kept parameters
                    "stopped": bool(kept["stale"] >= PATIENCE),
                    "validation": {name: float(value[j]) for name, value in terms.items()},
                }
                target, values = problem.train.target.dictionary, values | kept["params"]
                fitted[id(problem)] = Fitted(cls(target, values, head=config.head), record)
        return [fitted[id(problem)] for problem in problems]


def _linear(layer: nnx.Dict, h: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    return matmul(h, layer.kernel[...], dtype) + layer.bias[...][None, :]


def dropped(h: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Drops a share of h and scales the rest up; without a key (evaluation) drops nothing."""
    if key is None or rate == 0:
        return h
    return jnp.where(jax.random.bernoulli(key, 1 - rate, h.shape), h / (1 - rate), 0.0)


def damped_scale(variance: np.ndarray) -> np.ndarray:
    """Returns the standard units [width] of features with these variances; 1 if none varies."""
    damped = np.sqrt(variance + RARE * variance.mean())
    return np.where(damped > 0, damped, 1.0).astype(np.float32)


# Heads: from estimates z [batch, width] of features' means to features that can be exactly zero


def select(head: str, z: jax.Array, *, k: int, threshold: jax.Array | None) -> jax.Array:
    """Returns features [batch, width], >= 0, of estimates in raw units; ``threshold`` is [width].

    relu: ``relu(z)``; topk: its k largest values in a row; jumprelu: ``z 1[z > threshold]``.
    """
    if head == "topk":
        return keep_top_k(z, k)
    f = jax.nn.relu(z)
    return f if head == "relu" else jnp.where(z <= threshold[None, :], 0.0, f)


def rectified(z: jax.Array) -> jax.Array:
    """Returns relu(z) with the gradient of z: a feature that is off can still be switched on.

    The gradient relu(z) - t belongs to a convex loss whose minimum is the target's mean (Auer,
    Herbster and Warmuth 1996; Kakade et al. 2011). The rectifier's own gradient, 0 where z < 0,
    loses every feature that once is below 0 on all rows.
    """
    return z + jax.lax.stop_gradient(jax.nn.relu(z) - z)


def gate(z: jax.Array, threshold: jax.Array) -> jax.Array:
    """Returns 1[z > threshold] [batch, width] with an estimated gradient.

    A rectangular kernel, 1[|z - threshold| < BANDWIDTH / 2] / BANDWIDTH, in z, and its negative in
    the threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).
    """
    fixed = jax.lax.stop_gradient
    distance = z - threshold
    near = jnp.abs(fixed(distance)) < BANDWIDTH / 2
    return (distance > 0) + near / BANDWIDTH * (distance - fixed(distance))


# Training


@dataclasses.dataclass(frozen=True)
class Selected:
    """What a map in training asks of its dictionary where rows are codes: how many fire, or 0."""

    k: int


class TransferObjective(Objective):
    """Trains a network map on the losses of its head's input.

    Validation is the loss of its final features, mean over whole batches.
    """

    validate_every, patience = 50, PATIENCE

    def __init__(self, cls, source, target, values, config: MapConfig, *, codes: bool = False):
        """For a map class, both dictionaries, and values that ``measure`` gives or of their shapes.

        ``codes``: rows hold codes; then dictionaries of any d_model train together.
        """
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
        """Returns the weighted sum of a batch's losses, and each; without a key final features'."""
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
            p = rectified(z)
        weights, unit = self.config.loss_weights, fixed["variance"]
        return transfer_loss(p, f_b, weights, variance=unit, fires=m.fires(z))

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
        trained["threshold"] = jnp.full(width_b, INITIAL_THRESHOLD, jnp.float32)
    return trained


def shapes(problem: Problem) -> tuple:
    """Returns what problems must share to be trained in one step; first, whether rows are codes.

    They are where that takes less memory than activations; dictionaries then matter little.
    """
    sides = [s for p in (problem.train, problem.validation) for s in (p.source, p.target)]
    slots = (np.diff(side.straight.codes.indptr).max(initial=0) for side in sides)
    if all(most <= SLOTS * side.x.shape[1] for most, side in zip(slots, sides)):
        return True, *((len(s.x), s.dictionary.width, s.dictionary.k) for s in sides)
    return False, *((s.x.shape, modules.split(s.dictionary)[0]) for s in sides)


def prepare(
    cls: type[Map], problems: Sequence[Problem], config: MapConfig, *, seed: int
) -> tuple[Ensemble, list[tuple[modules.Params, dict]]]:
    """Returns the ensemble of problems of equal shapes, and ``cls.measure`` of each."""
    measured = [cls.measure(problem) for problem in problems]
    values = cls.alike([values for values, _ in measured])
    train, validation = ([getattr(p, n) for p in problems] for n in ("train", "validation"))
    codes, fixed, alike = shapes(problems[0])[0], [], Counter()
    for pairs, of_problem in zip(train, values):
        sides = {"a": pairs.source, "b": pairs.target}
        sizes = tuple(side.x.shape for side in sides.values())
        member = {"id": np.uint32(alike[sizes]), "values": of_problem}  # others change no start
        alike[sizes] += 1
        # Where none of B's features varies, the error stays in raw units.
        member["variance"] = np.float32(pairs.target.feature_moments.variance.mean() or 1.0)
        if not codes:
            member |= {f"dictionary_{n}": modules.split(s.dictionary)[1] for n, s in sides.items()}
        fixed.append(member)
    n = min(len(validation[0]), VALIDATION_ROWS)
    devices = make_mesh(members=len(problems), batch=config.batch_size).shape[DATA]
    size = max(min(config.batch_size, n) // devices, 1) * devices
    rows = np.linspace(0, len(validation[0]) - 1, max(n // size, 1) * size).astype(np.int64)
    held_out = {
        "a": held([pairs.source for pairs in validation], codes, rows),
        "b": held([pairs.target for pairs in validation], codes, rows),
        "tokens": np.stack([pairs.source.tokens[rows] for pairs in validation]),
    }
    sources, targets = ([getattr(pairs, n) for pairs in train] for n in ("source", "target"))
    straight, order = [side.straight for side in targets], None
    if straight != targets:
        plain = np.arange(len(train[0]))
        order = [plain if side.order is None else side.order for side in targets]
        order = np.stack(order).astype(np.int32)
    streams = streams_of_sides(sources, straight, lambda sides: held(sides, codes), order)
    tokens = np.stack([side.tokens for side in sources])
    dictionaries = sources[0].dictionary, targets[0].dictionary
    ensemble = make_ensemble(
        TransferObjective(cls, *dictionaries, values[0], config, codes=codes),
        fixed=stack(fixed),
        labels=[problem.label for problem in problems],
        streams=streams | {"tokens": Stream(tokens, np.arange(len(problems)))},
        seeds=[seed] * len(problems),
        batch_size=config.batch_size,
        setting="map.batch_size",
        validation=jax.tree.map(  # in whole batches
            lambda a: to_bits(a.reshape(len(problems), -1, size, *a.shape[2:])), held_out
        ),
    )
    return ensemble, measured


def held(
    sides: Sequence[Side], codes: bool, rows: np.ndarray | None = None
) -> np.ndarray | Compact:
    """Returns rows (default: all) of sides as training holds them, stacked [sides, n, ...]."""
    parts = [side.codes if codes else side.x for side in sides]
    parts = parts if rows is None else [part[rows] for part in parts]
    if codes:
        slots = max(int(np.diff(part.indptr).max(initial=0)) for part in parts)
        parts = [compact(part, slots) for part in parts]
    return stack(parts)


def streams_of_sides(
    sources: Sequence[Hashable], targets: Sequence[Hashable], hold: Callable, order
) -> dict[str, Stream]:
    """Returns the streams "a" and "b" of members' sides, the targets in this order.

    ``hold`` gives the rows of distinct sides: each once, whoever reads it, as source or target.
    """
    a, b = (tuple(dict.fromkeys(sides)) for sides in (sources, targets))
    if set(a) & set(b):
        a = b = tuple(dict.fromkeys(a + b))
    hold = functools.cache(hold)
    return {
        name: Stream(hold(held), np.array([held.index(side) for side in sides]), order)
        for name, held, sides, order in zip("ab", (a, b), (sources, targets), (None, order))
    }
