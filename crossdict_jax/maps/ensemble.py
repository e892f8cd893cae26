"""Trains the maps of all problems together: one compiled step, the best of each kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crossdict_jax import modules
from crossdict_jax.config import MapConfig
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.errors import UserError
from crossdict_jax.maps import heads
from crossdict_jax.maps.base import Fitted, Pairs, Problem, Side, build, check_rows
from crossdict_jax.maps.compact import Compact, alike
from crossdict_jax.maps.losses import transfer_loss
from crossdict_jax.maps.network import TRAINED, NetworkMap, Standards
from crossdict_jax.training.loop import Feed, Trainable, epoch_order, train
from crossdict_jax.training.mesh import (
    DATA,
    MEMBER,
    from_bits,
    make_mesh,
    on_own_rows,
    put,
    shard,
    to_bits,
)
from crossdict_jax.workdir import write_json

VALIDATION_ROWS = 4096  # at most, evenly spread, on which a member in training is scored


def fit_together(
    cls: type[NetworkMap],
    problems: Sequence[Problem],
    config: MapConfig,
    *,
    seed: int,
    directory: Path,
) -> list[Fitted]:
    """Trains all problems of equal shapes as one ensemble in one compiled step.

    Each map has the parameters with the least loss on validation rows, taken of its features
    without dropout; ``config.patience`` validations without a gain end its updates, and the others
    go on. ``directory/KIND-N`` keeps checkpoints, metrics and member labels, so that a killed run
    goes on and ends with the same bits.

    Raises:
      UserError: a batch is larger than the training rows or does not divide over the devices, or
        a setting does not fit a target's dictionary.
    """
    for problem in problems:
        _check(cls.kind, problem, config)
    fitted: dict[int, Fitted] = {}
    for number, members in enumerate(_groups(problems)):
        ensemble = Ensemble(cls, [problems[i] for i in members], config, seed=seed)
        fitted |= zip(members, ensemble.fit(Path(directory) / f"{cls.kind}-{number}"))
    return [fitted[i] for i in range(len(problems))]


def _check(kind: str, problem: Problem, config: MapConfig) -> None:
    check_rows(problem, kind)
    dictionary, rows = problem.train.target.dictionary, len(problem.train)
    heads.check(config.head, dictionary, problem.label)
    if config.batch_size > rows:
        raise UserError(
            f"map.batch_size={config.batch_size} is larger than the {rows} training rows of "
            f"{problem.label}; lower it or raise text.documents."
        )
    if config.correlation_features > dictionary.width:
        raise UserError(
            f"map.correlation_features={config.correlation_features} is more than the "
            f"{dictionary.width} features that {problem.label} predicts; lower it, or 0 for all."
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


def _sides(pairs: Pairs) -> tuple[Side, Side]:
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


class Ensemble:
    """Problems of equal shapes, with every array stacked over members on a leading axis."""

    def __init__(
        self, cls: type[NetworkMap], problems: list[Problem], config: MapConfig, *, seed: int
    ):
        self.cls, self.problems, self.config, self.seed = cls, problems, config, seed
        self.mesh = make_mesh(members=len(problems))
        over_data = self.mesh.shape[DATA]
        if config.batch_size % over_data:
            raise UserError(
                f"map.batch_size={config.batch_size} cannot be shared by {over_data} devices; "
                f"use a multiple of {over_data}."
            )
        self.optimizer = make_optimizer(config)
        self.graph_a = modules.split(problems[0].train.source.dictionary)[0]
        self.standards = [cls.standards(problem, config) for problem in problems]
        self.alike = cls.alike(self.standards)
        self.graph, _ = modules.abstract(lambda: self._map(self.alike[0]))
        self.fixed = self._stacked([self._fixed(*member) for member in zip(problems, self.alike)])

    def _map(self, standards: Standards, *, key: jax.Array | int = 0) -> NetworkMap:
        """A fresh map of this ensemble's shapes, its standards still to be filled in."""
        arguments, pairs = self._arguments(standards), self.problems[0].train
        return self.cls(pairs.target.dictionary, **arguments, key=key)

    def _arguments(self, standards: Standards) -> dict:
        shape = {
            "width_a": self.problems[0].train.source.dictionary.width,
            "hidden": self.config.hidden,
            "dropout": self.config.dropout,
            "head": self.config.head,
        }
        return shape | standards.arguments

    def _fixed(self, problem: Problem, standards: Standards) -> dict:
        """What a member's step reads and does not train."""
        source, target = _sides(problem.train)
        # Where none of B's features varies, the error stays in raw units.
        variance = np.float32(target.feature_moments[1].mean() or 1.0)
        return {
            "dictionary_a": modules.split(source.dictionary)[1],
            "dictionary_b": modules.split(target.dictionary)[1],
            "standards": standards.values,
            "variance": variance,
        }

    def _stacked(self, trees: list) -> dict:
        by_member = shard(self.mesh, MEMBER)
        return jax.tree.map(
            lambda *leaves: put(np.stack([np.asarray(a) for a in leaves]), by_member), *trees
        )

    def fit(self, directory: Path) -> list[Fitted]:
        """Returns the trained map of every member."""
        labels = [problem.label for problem in self.problems]
        write_json(directory / "members.json", [{"label": label} for label in labels])
        state = train(
            self.trainable(),
            feed=self.feed(),
            steps=self.config.steps,
            seed=self.seed,
            directory=directory,
            checkpoint_every=self.config.checkpoint_every,
            title=f"train {len(labels)} maps",
            shardings=self.by_member,
            meta={"config": dataclasses.asdict(self.config), "members": labels, "seed": self.seed},
        )
        best = self._gathered(state["train"]["best"])
        terms = self._gathered(self._final_scores(best["params"]))
        return [self._fitted(i, best, terms) for i in range(len(labels))]

    def _final_scores(self, params) -> dict[str, jax.Array]:
        scores = jax.vmap(self._scores, spmd_axis_name=MEMBER)
        return jax.jit(scores)(params, self.fixed, self._validation_rows())

    def _fitted(self, i: int, best: dict, terms: dict) -> Fitted:
        problem, standards = self.problems[i], self.standards[i]
        record = {
            "steps": int(best["step"][i]) + 1,  # after which the parameters are those kept
            "stopped": bool(best["stale"][i] >= self.config.patience),
            "validation": {name: float(values[i]) for name, values in terms.items()},
            "validation_rows": int(np.prod(self._validation_shape)),
        }
        own = standards.values | jax.tree.map(lambda a: a[i], best["params"])
        target, arguments = problem.train.target, self._arguments(standards)
        m = build(self.cls, target.dictionary, arguments, own)
        return Fitted(m, standards.record | record)

    def _gathered(self, tree):
        """Copies of stacked arrays on every device, which the host can read."""
        everywhere = jax.jit(lambda t: t, out_shardings=shard(self.mesh))(tree)
        return jax.tree.map(np.asarray, everywhere)

    def by_member(self, abstract):
        """Returns the sharding of every array of a stacked tree: members over devices."""
        return jax.tree.map(lambda _: shard(self.mesh, MEMBER), abstract)

    # ------------------------------------------------------------------------ one step

    def trainable(self) -> Trainable:
        """Returns the step of the whole ensemble, and its state before the first."""
        every, last = self.config.validate_every, self.config.steps - 1
        init, update = (jax.vmap(f, spmd_axis_name=MEMBER) for f in (self._init, self._update))
        look = jax.vmap(self._look, in_axes=(0, 0, 0, None), spmd_axis_name=MEMBER)

        def step(state, batch, number, key):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # see mesh.on_own_rows
                return one_step(state, batch, number, key)

        def one_step(state, batch, number, key):
            fixed, keys = batch["fixed"], self._member_keys(key)
            state, metrics = update(state, fixed, batch["rows"], keys)
            # One predicate for the whole ensemble: under vmap a branch stays a branch.
            best = jax.lax.cond(
                (number % every == 0) | (number == last),
                lambda: look(state, fixed, batch["validation"], number),
                lambda: state["train"]["best"],
            )
            state = state | {"train": state["train"] | {"best": best}}
            return state, metrics | {"validation": best["latest"]}

        return Trainable(lambda key: init(self._member_keys(key)), step)

    def _member_keys(self, key: jax.Array) -> jax.Array:
        members = jnp.arange(len(self.problems))
        return jax.vmap(lambda member: jax.random.fold_in(key, member))(members)

    def _init(self, key: jax.Array) -> dict:
        own = modules.split(self._map(self.alike[0], key=key))[1]
        params = {name: own[name] for name in TRAINED if name in own}
        best = {
            "params": params,
            "score": jnp.full((), jnp.inf, jnp.float32),  # any other is a gain
            "latest": jnp.zeros(()),
            "step": jnp.zeros((), jnp.int32),
            "stale": jnp.zeros((), jnp.int32),  # validations since the last gain
        }
        return {"params": params, "train": {"optimizer": self.optimizer.init(params), "best": best}}

    def _update(self, state, fixed, rows, key):
        """One step of one member; nothing moves where its patience is over."""

        def loss_of(params):
            return self._training_loss(params, fixed, rows, key)

        (loss, terms), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
        before = {"params": state["params"], "optimizer": state["train"]["optimizer"]}
        updates, optimizer = self.optimizer.update(grads, before["optimizer"], before["params"])
        after = {"params": optax.apply_updates(before["params"], updates), "optimizer": optimizer}
        best = state["train"]["best"]
        stopped = best["stale"] >= self.config.patience
        kept = jax.tree.map(lambda old, new: jnp.where(stopped, old, new), before, after)
        train_state = {"optimizer": kept["optimizer"], "best": best}
        return {"params": kept["params"], "train": train_state}, {"loss": loss} | terms

    def _look(self, state, fixed, validation, number):
        """Scores one member on its validation rows; returns its best parameters till now."""
        best, params = state["train"]["best"], state["params"]
        score = self._scores(params, fixed, validation)["loss"]
        gain = score < best["score"]
        new = {"params": params, "score": score, "step": jnp.asarray(number, jnp.int32)}
        kept = {name: best[name] for name in new}
        kept = jax.tree.map(lambda old, new: jnp.where(gain, new, old), kept, new)
        stopped = best["stale"] >= self.config.patience
        stale = jnp.where(gain, 0, best["stale"] + 1)
        return kept | {"latest": score, "stale": jnp.where(stopped, best["stale"], stale)}

    # ------------------------------------------------------------------------ the losses

    def _merged(self, params, fixed) -> NetworkMap:
        own = fixed["standards"] | params | {"dictionary": fixed["dictionary_b"]}
        return modules.merge(self.graph, own)

    def _features(self, m: NetworkMap, fixed, rows) -> tuple[jax.Array, jax.Array]:
        """Both sides' features [batch, width]: of their codes, or encoded here."""
        source = modules.merge(self.graph_a, fixed["dictionary_a"])
        return _dense(rows["a"], source), _dense(rows["b"], m.dictionary)

    def _training_loss(self, params, fixed, rows, key):
        """The losses of what the head selects from, with a gradient wherever the target fires."""
        key_dropped, key_drawn = jax.random.split(key)
        m = self._merged(params, fixed)
        f_a, f_b = self._features(m, fixed, rows)
        z = m.estimate(f_a, tokens=rows["tokens"], key=key_dropped)
        some, features = self.config.correlation_features, None
        if some:
            features = jax.random.choice(key_drawn, f_b.shape[1], (some,), replace=False)
        return transfer_loss(
            heads.rectified(z),
            f_b,
            self.config.loss_weights,
            variance=fixed["variance"],
            fires=m.head.fires(z, m.scale_b[...]),
            features=features,
        )

    def _scores(self, params, fixed, validation) -> dict[str, jax.Array]:
        """The losses of a member's features as they will be used, mean over whole batches."""
        m = self._merged(params, fixed)

        def of_batch(rows):
            f_a, f_b = self._features(m, fixed, rows)
            p = m(f_a, tokens=rows["tokens"])
            fires = m.head.fires(p, m.scale_b[...])
            weights, variance = self.config.loss_weights, fixed["variance"]
            loss, terms = transfer_loss(p, f_b, weights, variance=variance, fires=fires)
            return {"loss": loss} | terms

        return jax.tree.map(jnp.mean, jax.lax.map(of_batch, validation))

    # ------------------------------------------------------------------------ the rows

    def feed(self) -> Feed:
        """Returns the feed: all rows on the devices, one order of batches for all members."""
        n, batch = len(self.problems[0].train), self.config.batch_size
        rows_of = shard(self.mesh, MEMBER, DATA)

        def indices(first: int, count: int) -> np.ndarray:
            order = epoch_order(self.seed, start=first * batch, count=count * batch, n=n)
            return order.reshape(count, batch)

        def select(resident, chosen):
            def pick(rows):
                return jax.lax.with_sharding_constraint(rows[:, chosen], rows_of)

            return resident | {"rows": jax.tree.map(pick, resident["rows"])}

        rows = self._stacked(_rows([problem.train for problem in self.problems]))
        held_out = self._validation_rows()
        return Feed({"rows": rows, "validation": held_out, "fixed": self.fixed}, indices, select)

    @property
    def _validation_shape(self) -> tuple[int, int]:
        """Whole batches of validation rows, and the rows of each."""
        n = min(len(self.problems[0].validation), VALIDATION_ROWS)
        size = min(self.config.batch_size, n)
        return n // size, size

    def _validation_rows(self) -> dict[str, jax.Array]:
        shape, n = self._validation_shape, len(self.problems[0].validation)
        chosen = np.linspace(0, n - 1, shape[0] * shape[1]).astype(np.int64)

        def batches(rows: np.ndarray) -> np.ndarray:
            return rows[chosen].reshape(*shape, *rows.shape[1:])

        held_out = _rows([problem.validation for problem in self.problems])
        return self._stacked([jax.tree.map(batches, rows) for rows in held_out])


def _rows(members: list[Pairs]) -> list[dict]:
    """Returns what a step reads of each member's rows: both sides' codes or activations, tokens."""
    a, b = (_codes_or_rows(sides) for sides in zip(*map(_sides, members)))
    tokens = [pairs.source.tokens for pairs in members]
    return [{"a": a, "b": b, "tokens": t} for a, b, t in zip(a, b, tokens)]


def _codes_or_rows(sides: Sequence[Side]) -> list:
    """Returns the codes of all sides, or of none: the members of an ensemble are alike."""
    codes = [side.code for side in sides]
    return [to_bits(side.x) for side in sides] if None in codes else alike(codes)


def _dense(rows: jax.Array | Compact, dictionary: Dictionary) -> jax.Array:
    """Returns features [batch, width]."""
    if isinstance(rows, Compact):
        return on_own_rows(Compact.dense, rows)
    return dictionary.encode(from_bits(rows))
