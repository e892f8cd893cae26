"""What every sparse dictionary is: encode, decode, a loss to train it, and how it is stored."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.config import architectures
from crossdict_jax.errors import UserError
from crossdict_jax.ops import (
    Code,
    batch_top_k_code,
    kth_largest,
    matmul,
    nth_largest,
    threshold_code,
)
from crossdict_jax.training import checkpoint

THRESHOLD_RATE = 0.05  # of the running mean of batches' thresholds; a slower one lags behind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WholeBatch:
    """Numbers of a whole batch that losses need where its rows come in parts.

    Attributes:
      rows: how many there are (static).
      variance: [], of the rows to reconstruct.
      residual_variance: [], of what is left of them; 1 while nothing is dead.
      threshold: [], of architectures that choose features over the batch: the least value kept.
      l0: [], active features a row.
    """

    rows: int = dataclasses.field(metadata={"static": True})
    variance: jax.Array
    residual_variance: jax.Array
    threshold: jax.Array
    l0: jax.Array

    def replace(self, **values: jax.Array) -> WholeBatch:
        return dataclasses.replace(self, **values)


@dataclasses.dataclass(frozen=True)
class Hyper:
    """What a loss reads of the settings and of the state at one step.

    Attributes:
      l1_coefficient: weight of the sparsity penalty at this step (after warm-up; traced).
      most_dead: dead features of the member that has most. One scalar for the whole ensemble, so
        that a branch on it stays a branch under vmap (traced).
      k_aux: how many dead features take part in their reconstruction.
      l0_target: active features a row to aim for; 0 for none.
      nested_fractions: of the width, nested dictionaries beside the whole.
      whole: of the batch that the rows are a part of (traced); None where they are all of it.
    """

    l1_coefficient: jax.Array | float
    most_dead: jax.Array | int
    k_aux: int
    l0_target: float = 0.0
    nested_fractions: tuple[float, ...] = ()
    whole: WholeBatch | None = None


AUXK_COEFFICIENT = 1 / 32  # weight of the dead features' reconstruction (Gao et al. 2024)


class Dictionary(nnx.Module):
    """f = act((x s) W_enc + b_enc - (b_dec W_enc)),  x_hat = (f W_dec + b_dec) / s.

    ``s`` is the activation scale: training sees rows of mean norm sqrt(d_model), callers always
    speak raw activation units. Subclasses say what ``act`` is and how the loss is made.

    With ``d_out`` it is a transcoder, which reads one site and predicts another:
    f = act((x s) W_enc + b_enc),  y_hat = (f W_dec + b_dec) / s_out  (Dunefsky et al. 2024, arXiv
    2406.11944). b_dec lives in the space of y and is not taken from x; what that would have done,
    centring, is left to b_enc.

    Attributes:
      W_enc [d_model, width], b_enc [width], W_dec [width, d_out], b_dec [d_out], scale [].
      d_out: size of the rows that are written; d_model where the same rows are read.
      transcodes: whether what is written is not what is read (static).
      scale_out: [], of transcoders: the scale of what they write.
      k: active features a row, for architectures that fix it (static; else 0).
      measured: names of the variables that no gradient updates.
    """

    measured: tuple[str, ...] = ("scale", "scale_out")
    selects_over_rows: bool = False  # whether training chooses features over the whole batch
    pace: float = 1.0  # of the usual learning rate
    usual_l1: float = 1.0  # l1_coefficient at which about a sixth of the dimensions are active
    has_k: bool = False  # whether k fixes the number of active features
    saelens: str = ""  # what SAELens calls the architecture; empty: it has no such form

    def __init__(
        self, *, d_model: int, width: int, k: int, rngs: nnx.Rngs, d_out: int | None = None
    ):
        self.d_model, self.width, self.k = d_model, width, k
        self.d_out, self.transcodes = d_out or d_model, d_out is not None
        W_dec = unit_rows(jax.random.normal(rngs.params(), (width, self.d_out)))
        self.W_dec = nnx.Param(W_dec)
        self.W_enc = nnx.Param(jnp.zeros((d_model, width)) if self.transcodes else W_dec.T)
        self.b_enc = nnx.Param(jnp.zeros(width))
        self.b_dec = nnx.Param(jnp.zeros(self.d_out))
        self.scale = nnx.Variable(jnp.ones(()))
        if self.transcodes:
            self.scale_out = nnx.Variable(jnp.ones(()))

    def encoder(self) -> tuple[jax.Array, jax.Array]:
        """Returns W_enc [d_model, width] and the bias [width] of scaled rows.

        b_dec is subtracted through the bias: the gradient then costs no product with the rows.
        """
        W_enc, bias = self.W_enc[...], self.b_enc[...]
        if not self.transcodes:
            bias = bias - self.b_dec[...] @ W_enc
        return W_enc, bias

    def pre_activations(self, u: jax.Array, dtype=None) -> jax.Array:
        """Returns [batch, width] of scaled rows u [batch, d_model], before the nonlinearity."""
        W_enc, bias = self.encoder()
        return matmul(u, W_enc, dtype) + bias[None, :]

    def activate(self, z: jax.Array) -> jax.Array:
        """Returns the features [batch, width] of pre-activations z."""
        raise NotImplementedError(f"{type(self).__name__} must define activate.")

    def encode(self, x: jax.Array) -> jax.Array:
        """Returns features, float32 [batch, width], of raw activations x [batch, d_model]."""
        return self.activate(self.pre_activations(self._scaled(x)))

    def decode(self, f: jax.Array) -> jax.Array:
        """Returns raw activations x_hat, float32 [batch, d_out], of features [batch, width]."""
        f = jnp.asarray(f, jnp.float32)
        return (f @ self.W_dec[...] + self.b_dec[...][None, :]) / self._output_scale()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the reconstruction x_hat [batch, d_out] of x [batch, d_model]."""
        return self.decode(self.encode(x))

    def losses(
        self,
        x: jax.Array,
        *,
        hyper: Hyper,
        dead: jax.Array,
        y: jax.Array | None = None,
        dtype=None,
    ) -> tuple[jax.Array, dict[str, jax.Array], Code]:
        """Returns (loss to minimise, its parts, features [batch, width] or their code).

        Args:
          x: raw rows [batch, d_model].
          dead: bool [width], features that have been silent too long.
          y: raw rows [batch, d_out] that a transcoder is to predict.
          dtype: of the matmul inputs; sums stay float32.
        """
        raise NotImplementedError(f"{type(self).__name__} must define losses.")

    def training_code(self, z: jax.Array, whole: WholeBatch | None) -> jax.Array:
        """Returns the features [batch, width] that training takes of pre-activations z."""
        return self.activate(z)

    def measure(self, least: jax.Array) -> None:
        """Updates what is measured, not optimised, from a batch's least active value []."""

    def after_update(self) -> None:
        """Imposes the architecture's constraints (such as unit decoder rows) on the parameters."""

    def scaled_pair(self, x: jax.Array, y: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Returns scaled rows: what is read [batch, d_model], and what is to be written."""
        return self._scaled(x), self._targets(x, y)

    def _scaled(self, x: jax.Array) -> jax.Array:
        return jnp.asarray(x, jnp.float32) * jax.lax.stop_gradient(self.scale[...])

    def _targets(self, x: jax.Array, y: jax.Array | None) -> jax.Array:
        """Scaled rows [batch, d_out] that the reconstruction should be."""
        if not self.transcodes:
            return self._scaled(x)
        return jnp.asarray(y, jnp.float32) * jax.lax.stop_gradient(self._output_scale())

    def _output_scale(self) -> jax.Array:
        return (self.scale_out if self.transcodes else self.scale)[...]


def decoder_rows(dictionary: Dictionary, features: np.ndarray, *, size: int = 1024) -> np.ndarray:
    """Returns what one unit of each feature [m] adds to the decoding, float32 [m, d_out].

    In the units that ``decode`` speaks.

    Args:
      size: features at a time.
    """
    nothing = np.zeros((1, dictionary.width), np.float32)
    base = modules.over_rows(dictionary, nothing, method="decode", size=1)
    parts = [np.zeros((0, dictionary.d_out), np.float32)]
    for at in range(0, len(features), size):
        one = np.zeros((size, dictionary.width), np.float32)
        chosen = features[at : at + size]
        one[np.arange(len(chosen)), chosen] = 1
        parts.append(modules.over_rows(dictionary, one, method="decode", size=size)[: len(chosen)])
    return np.concatenate(parts) - base


def keep_top_k(z: jax.Array, k: int) -> jax.Array:
    """Returns relu(z) with all but each row's k largest values zeroed; [batch, width].

    Values that equal the k-th exactly are all kept, so L0 can exceed k there.
    """
    z = jax.nn.relu(z)
    if k >= z.shape[1]:
        return z
    threshold = kth_largest(jax.lax.stop_gradient(z), k)
    return jnp.where(z >= threshold[:, None], z, 0.0)


def keep_batch_top_k(z: jax.Array, k: int) -> jax.Array:
    """Returns relu(z) with all but the batch * k largest values of the batch zeroed."""
    z = jax.nn.relu(z)
    threshold = nth_largest(jax.lax.stop_gradient(z), k * z.shape[0])
    return jnp.where(z >= threshold, z, 0.0)


def running_threshold(threshold: jax.Array, least: jax.Array) -> jax.Array:
    """Returns the running mean [] of batches' least kept values; the first batch starts it.

    A batch without an active feature (least is infinite) changes nothing.
    """
    moved = threshold + THRESHOLD_RATE * (least - threshold)
    moved = jnp.where(threshold == 0, least, moved)
    return jnp.where(jnp.isfinite(least), moved, threshold)


def unit_rows(W: jax.Array) -> jax.Array:
    """Returns W [width, d_out] with every row at norm 1."""
    return W / jnp.maximum(jnp.linalg.norm(W, axis=1, keepdims=True), 1e-8)


class BatchSelected(Dictionary):
    """What architectures share that choose features over the whole batch in training.

    At inference f = relu(z) 1[z > threshold]; unit decoder rows.

    Attributes:
      threshold: [], the running mean of the smallest value that a batch kept.
    """

    measured = (*Dictionary.measured, "threshold")
    selects_over_rows = True

    def __init__(self, **shape):
        super().__init__(**shape)
        self.threshold = nnx.Variable(jnp.zeros(()))

    def activate(self, z: jax.Array) -> jax.Array:
        return jnp.where(z > self.threshold[...], jax.nn.relu(z), 0.0)

    def training_code(self, z: jax.Array, whole: WholeBatch | None) -> jax.Array:
        if whole is None:
            return keep_batch_top_k(z, self.k)
        z = jax.nn.relu(z)
        return jnp.where(z >= whole.threshold, z, 0.0)

    def sparse_code(self, u: jax.Array, whole: WholeBatch | None, dtype=None) -> Code:
        """Returns the code that training takes of scaled rows u [batch, d_model]."""
        if whole is None:
            return batch_top_k_code(u, *self.encoder(), self.k * len(u), dtype)
        n = self.k * whole.rows
        return threshold_code(u, *self.encoder(), whole.threshold, n, dtype)

    def batch_threshold(self, z: jax.Array) -> jax.Array:
        """Returns the least [] of the batch * k values that are kept of non-negative z."""
        return nth_largest(jax.lax.stop_gradient(z), self.k * len(z))

    def measure(self, least: jax.Array) -> None:
        self.threshold[...] = running_threshold(self.threshold[...], least)

    def after_update(self) -> None:
        self.W_dec[...] = unit_rows(self.W_dec[...])


def find(architecture: str) -> type[Dictionary]:
    """Returns the class of an architecture, found by its file's name."""
    if architecture not in architectures():
        raise UserError(
            f"sae.architecture={architecture} is unknown; use one of {', '.join(architectures())}."
        )
    module = importlib.import_module(f"{__package__}.architectures.{architecture}")
    ours = (c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Dictionary))
    return next(c for c in ours if c.__module__ == module.__name__)


def build(
    architecture: str,
    *,
    d_model: int,
    width: int,
    k: int,
    key: jax.Array,
    d_out: int | None = None,
) -> Dictionary:
    """Returns a freshly initialised dictionary of the named architecture; see ``Dictionary``.

    The encoder of a transcoder (``d_out``) starts at zeros: what to put there, data must say.
    """
    shape = {"d_model": d_model, "width": width, "k": k, "d_out": d_out}
    return find(architecture)(**shape, rngs=nnx.Rngs(params=key))


def architecture_of(dictionary: Dictionary) -> str:
    """Returns the name that ``find`` knows a dictionary's class by.

    Raises:
      UserError: it is none of ours, as some imported ones are.
    """
    name = type(dictionary).__module__.rsplit(".", 1)[-1]
    if name not in architectures():
        raise UserError(
            f"{type(dictionary).__name__} dictionaries have no checkpoint of their own; keep the "
            f"folder they were imported from. Ours are {', '.join(architectures())}."
        )
    return name


def from_arrays(
    kind: type[Dictionary], arrays: dict[str, np.ndarray], *, k: int = 0, transcodes: bool = False
) -> Dictionary:
    """Returns the dictionary of a class with these parameters, which speak raw units."""
    (d_model, width), d_out = arrays["W_enc"].shape, arrays["W_dec"].shape[1]
    shape = {"d_model": d_model, "width": width, "k": k, "d_out": d_out if transcodes else None}
    graphdef, _ = modules.abstract(lambda: kind(**shape, rngs=nnx.Rngs(params=0)))
    scales = ("scale", "scale_out") if transcodes else ("scale",)
    filled = {name: np.ones(()) for name in scales} | arrays
    return modules.merge(graphdef, {n: jnp.asarray(a, jnp.float32) for n, a in filled.items()})


def save(dictionary: Dictionary, path: Path, *, meta: dict | None = None, step: int = 0) -> None:
    """Writes an orbax checkpoint that ``load`` reads: parameters, and what is needed to build."""
    shape = {
        "architecture": architecture_of(dictionary),
        "d_model": dictionary.d_model,
        "width": dictionary.width,
        "k": dictionary.k,
        "d_out": dictionary.d_out if dictionary.transcodes else None,
    }
    checkpoint.save_module(path, modules.split(dictionary)[1], (meta or {}) | shape, step=step)


def load(path: str | Path) -> Dictionary:
    """Returns the dictionary in a checkpoint directory, parameters alone, on the first device.

    Raises:
      UserError: there is none, or a file of it is damaged (it is named).
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no dictionary folder; train it first or correct the path.")
    meta = checkpoint.load_meta(path)
    shape = {name: meta[name] for name in ("architecture", "d_model", "width", "k")}
    shape["d_out"] = meta.get("d_out")  # checkpoints from before there were transcoders lack it
    graphdef, abstract = modules.abstract(lambda: build(**shape, key=jax.random.key(0)))
    return modules.merge(graphdef, checkpoint.load_params(path, abstract))
