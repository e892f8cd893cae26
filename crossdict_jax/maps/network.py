"""The network of the trained maps, and what is measured beside it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.errors import UserError
from crossdict_jax.maps import heads
from crossdict_jax.maps.base import Fitted, Map, check_rows
from crossdict_jax.maps.ensemble import PATIENCE, prepare, shapes
from crossdict_jax.ops import matmul
from crossdict_jax.training import loop
from crossdict_jax.training.ensemble import stack

RARE = 0.01  # of the mean variance, added to each: keeps a rare input from dominating its row


class NetworkMap(Map):
    """``f_B = head(base_b + scale_b * network((f_A - base_a) / scale_a))``.

    The network is ``h -> linear -> LN -> ReLU -> dropout``, twice, then linear, in standard units.
    It starts at base_b.

    A subclass defines ``measure(problem)`` -> (baselines and scales on training rows, a record of
    them); ``unmeasured(width_a, width_b, tokens)`` -> zeros in their shapes, for rows with so many
    tokens; ``baselines(tokens, batch)`` -> base_a and base_b, [batch or 1, width] each.

    Trained are ``network`` and, of a jumprelu head, ``threshold`` [width], in standard units, so
    that one learning rate suits all features. The sparsity loss alone trains the threshold: squared
    error would have it at 0, where the estimates of the whole target are kept.
    """

    reads = "features"
    fits_together = True
    settings = ("head",)

    @classmethod
    def alike(cls, measured: list[modules.Params]) -> list[modules.Params]:
        """Returns the same baselines in arrays of equal shapes, for one compiled step."""
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
        h = (f - base_a) / self.scale_a[...][None, :]
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
        return heads.gate(z_standard, self.threshold[...][None, :]) * (z > 0)

    def __call__(self, inputs: jax.Array, *, tokens: jax.Array | None = None) -> jax.Array:
        raw = self.threshold[...] * self.scale_b[...] if self.head == "jumprelu" else None
        z = self.estimate(inputs, tokens=tokens)
        return heads.select(self.head, z, k=self.dictionary.k, threshold=raw)

    @classmethod
    def fit(
        cls, problems, config, *, seed, directory, checkpoint_every: int = 500, records=()
    ) -> list[Fitted]:
        """Trains all problems of equal shapes as one ensemble in one compiled step.

        Each map has the parameters of its best validation. ``directory/KIND-N`` keeps checkpoints,
        metrics and member labels: a killed run goes on and ends with the same bits.

        Raises:
          UserError: a batch is larger than the training rows or does not divide over the devices,
            or a setting does not fit a target's dictionary.
        """
        groups: dict[tuple, list[int]] = {}
        for i, problem in enumerate(problems):
            check_rows(problem, cls.kind)
            dictionary = problem.train.target.dictionary
            if config.head == "topk" and "k" not in dictionary.reads:
                raise UserError(
                    "map.head=topk keeps as many features as the target's dictionary, and that of "
                    f"{problem.label} ({type(dictionary).__name__}) fixes no number; use jumprelu."
                )
            if config.batch_size > len(problem.train):
                raise UserError(
                    f"map.batch_size={config.batch_size} is larger than the {len(problem.train)} "
                    f"training rows of {problem.label}; lower it or raise text.documents."
                )
            groups.setdefault(shapes(problem), []).append(i)
        fitted: dict[int, Fitted] = {}
        for number, members in enumerate(groups.values()):
            ensemble, measured = prepare(cls, [problems[i] for i in members], config, seed=seed)
            best = loop.train(
                ensemble,
                steps=config.steps,
                seed=seed,
                directory=Path(directory) / f"{cls.kind}-{number}",
                checkpoint_every=checkpoint_every,
                records=records,
                title=f"train {len(members)} maps",
                meta={"config": dataclasses.asdict(config), "seed": seed},
            )
            resident = ensemble.feed.resident
            held_out, params = resident["validation"], stack([m["params"] for m in best])
            evaluate = jax.jit(jax.vmap(ensemble.objective.terms))
            terms = evaluate(params, held_out, resident["fixed"])
            for j, (i, (values, record)) in enumerate(zip(members, measured)):
                record |= {
                    "steps": int(best[j]["step"]) + 1,  # until the kept parameters
                    "stopped": bool(best[j]["stale"] >= PATIENCE),
                    "validation": {name: float(value[j]) for name, value in terms.items()},
                }
                target = problems[i].train.target.dictionary
                m = cls(target, values | best[j]["params"], head=config.head)
                fitted[i] = Fitted(m, record)
        return [fitted[i] for i in range(len(problems))]


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
