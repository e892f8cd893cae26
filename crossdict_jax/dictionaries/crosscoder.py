"""Crosscoders: one sparse code of the activations of N models."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.dictionaries.base import BatchSelected, fvu, power, unit_rows
from crossdict_jax.errors import UserError
from crossdict_jax.ops import exact
from crossdict_jax.training import checkpoint
from crossdict_jax.workdir import understood

SHAPE = ("d_models", "width", "k", "shared_fraction")  # what a checkpoint says to build it
TAKES_PART = 0.25  # of a latent's largest decoder norm: from here on a model takes part in it


class Crosscoder(BatchSelected):
    """f = act(N / |S| sum_{m in S} (s_m x_m - c_m) W_enc_m + b_enc), x_m = (f W_dec_m + b_m) / s_m.

    S are the models that are given, N / |S| makes up for the missing ones. s_m brings every model
    to the same variance, the mean d_model, so that decoder norms can be compared; c_m are the
    training means. Callers use raw units (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer
    Features and Model Diffing"). act keeps what is above both 0 and ``threshold``.

    Variant ``batchtopk`` trains as BatchTopK dictionaries do. A latent's decoder rows of all models
    together have norm 1, so a large f is a large share of the reconstruction. It is free of the
    shrinkage by which L1 invents latents of one model (Minder et al. 2025, arXiv 2504.02922).

    Variant ``l1``: loss = mean ||u - u_hat||^2 + l1 * mean sum_i f_i sum_m ||W_dec_m,i||, as
    published; decoder rows are free, and ``threshold`` is 0.

    With ``shared_fraction`` below 1 the other latents are dedicated, equally many to each model:
    their weights in every other model are zero and stay so.

    Attributes:
      W_enc [D, width], W_dec [width, D], b_dec [D], center [D]: all models' side by side, with
        D = sum of d_models; ``part`` says where one model's lie.
      b_enc [width], scale [N], threshold [].
      n_models: N.
    """

    measured = ("scale", "center", "threshold")

    def __init__(
        self, variant: str, *, d_models: Sequence[int], key: jax.Array, shared_fraction=1.0, **shape
    ):
        self.variant, self.shared_fraction = variant, shared_fraction
        self.d_models, self.n_models = tuple(d_models), len(d_models)
        total = sum(self.d_models)
        super().__init__(d_model=total, d_out=total, rngs=nnx.Rngs(params=key), **shape)
        self.unit_decoder = self.revives = variant == "batchtopk"
        W_dec = unit_rows(self.W_dec[...] * self.allowed().T)
        self.W_dec, self.W_enc = nnx.Param(W_dec), nnx.Param(W_dec.T)
        self.center = nnx.Variable(jnp.zeros(total))
        self.scale = nnx.Variable(jnp.ones(self.n_models))
        del self.scale_out

    @property
    def meta(self) -> dict:
        return {name: getattr(self, name) for name in SHAPE} | {"crosscoder": self.variant}

    def part(self, model: int) -> slice:
        """Returns the slice of a model's dimensions among all D."""
        start = sum(self.d_models[:model])
        return slice(start, start + self.d_models[model])

    def allowed(self) -> jax.Array:
        """Returns float32 [D, width]: 1 where a weight may differ from zero."""
        shared = round(self.shared_fraction * self.width)
        dedicated = np.arange(self.width - shared) * self.n_models // max(self.width - shared, 1)
        owner = np.concatenate([np.full(shared, -1), dedicated])[None, :]
        model = np.repeat(np.arange(self.n_models), self.d_models)[:, None]
        return jnp.asarray((owner < 0) | (owner == model), jnp.float32)

    def decoder_norms(self) -> jax.Array:
        """Returns [N, width], each latent's decoder norm per model, in units of equal variance."""
        squares, models = jnp.square(self.W_dec[...]), range(self.n_models)
        power = jnp.stack([squares[:, self.part(m)].sum(axis=1) for m in models])
        # Rows of zeros, as of another model's latents, have no gradient; that of sqrt is infinite.
        return jnp.where(power > 0, jnp.sqrt(jnp.where(power > 0, power, 1.0)), 0.0)

    def encode(self, x: Sequence[jax.Array | None]) -> jax.Array:
        """Returns the code f, float32 [batch, width].

        ``x`` is per model raw activations [batch, d_m], or None where the model is not given.
        ValueError: none is given, or not one entry per model.
        """
        present = np.array([rows is not None for rows in x])
        if len(x) != self.n_models or not present.any():
            raise ValueError(f"{len(x)} entries, {present.sum()} given, of {self.n_models} models")
        batch = len(x[present.argmax()])
        parts = [jnp.zeros((batch, d)) if r is None else r for r, d in zip(x, self.d_models)]
        seen, _ = self.scaled_pair(jnp.concatenate(parts, axis=1), present[None, :])
        return self.activate(self.pre_activations(seen))

    def decode(self, f: jax.Array) -> tuple[jax.Array, ...]:
        """Returns per model raw activations x_hat [batch, d_m] of a code f [batch, width]."""
        u_hat, scale = self.reconstruction(jnp.asarray(f, jnp.float32)), self.scale[...]
        return tuple(u_hat[:, self.part(m)] / scale[m] for m in range(self.n_models))

    def between(self, source: int, target: int) -> dict[str, jax.Array]:
        """Returns the weights from one model to another, in raw units of both.

        ``f = act(x W_enc + b_enc)``, ``x_hat = f W_dec + b_dec`` with W_enc [d_source, width] and
        W_dec [width, d_target]; act keeps what is above both 0 and ``threshold`` [].
        """
        a, b, scale = self.part(source), self.part(target), self.scale[...]
        W_enc = self.n_models * self.W_enc[...][a]
        return {
            "W_enc": scale[source] * W_enc,
            "b_enc": self.b_enc[...] - exact(self.center[...][a], W_enc),
            "threshold": self.threshold[...],
            "W_dec": self.W_dec[...][:, b] / scale[target],
            "b_dec": self.b_dec[...][b] / scale[target],
        }

    def scaled_pair(self, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns centred rows, 0 for absent models, and u = s x: both [batch, D].

        Args:
          x: raw rows of all models side by side [batch, D].
          y: bool [batch, N] or [1, N], the given models, at least one.
        """
        sizes, fixed = np.asarray(self.d_models), jax.lax.stop_gradient
        u = jnp.asarray(x, jnp.float32) * jnp.repeat(fixed(self.scale[...]), sizes)[None, :]
        share = y / y.sum(axis=1, keepdims=True) * self.n_models
        return (u - fixed(self.center[...])[None, :]) * jnp.repeat(share, sizes, axis=1), u

    def losses(self, x, hyper, y=None):
        if self.variant == "batchtopk":
            return super().losses(x, hyper, y)
        seen, u = self.scaled_pair(x, y)
        f = self.activate(self.pre_activations(seen, hyper.dtype))
        u_hat = self.reconstruction(f, hyper.dtype)
        l1 = jnp.mean(exact(f, self.decoder_norms().sum(axis=0)))
        parts = {"fvu": fvu(u, u_hat), "mse": power(u - u_hat), "l1": l1}
        return parts["mse"] + hyper.l1_coefficient * l1, parts, f

    def after_update(self, smallest: jax.Array) -> None:
        if self.shared_fraction < 1:
            allowed = self.allowed()
            self.W_enc[...] = self.W_enc[...] * allowed
            self.W_dec[...] = self.W_dec[...] * allowed.T
        if self.variant == "batchtopk":
            super().after_update(smallest)


def relative_norms(crosscoder: Crosscoder) -> np.ndarray:
    """Returns [N, width]: each model's share of a latent's decoder norms; 0 without any."""
    norms = np.asarray(crosscoder.decoder_norms(), np.float64)
    return norms / np.maximum(norms.sum(axis=0, keepdims=True), 1e-12)


def takes_part(crosscoder: Crosscoder) -> np.ndarray:
    """Returns bool [N, width]: the models that a latent belongs to.

    Those whose decoder norm is at least a quarter of the latent's largest; of two models, a
    relative norm between 0.2 and 0.8. A latent of all models is shared, of one exclusive.
    """
    norms = np.asarray(crosscoder.decoder_norms())
    largest = norms.max(axis=0, keepdims=True)
    return (norms >= TAKES_PART * largest) & (largest > 0)


@modules.plain
def load(path: str | Path) -> Crosscoder:
    """Returns the crosscoder in a checkpoint folder; UserError: there is none, or it is damaged."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no crosscoder; run train_hypernetworks with that map first.")
    meta = checkpoint.load_meta(path)
    if "crosscoder" not in meta:
        raise UserError(f"{path} holds another checkpoint than a crosscoder's; correct the path.")
    with understood(path):
        shape = {name: meta[name] for name in SHAPE} | {"key": jax.random.key(0)}
        graphdef, abstract = modules.abstract(lambda: Crosscoder(meta["crosscoder"], **shape))
        return modules.merge(graphdef, checkpoint.load_params(path, abstract))
