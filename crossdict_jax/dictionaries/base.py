"""Sparse dictionaries: encode, decode, a loss, and how they are stored."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossdict_jax import modules
from crossdict_jax.config import SWEPT, Config, ParetoConfig, SAEConfig, architectures, unswept
from crossdict_jax.config.settings import get, spell
from crossdict_jax.errors import UserError
from crossdict_jax.ops import Code, decode, exact, keep_top_k, matmul, nth_largest, sparse_code
from crossdict_jax.training import checkpoint
from crossdict_jax.workdir import understood

AUXK_COEFFICIENT = 1 / 32  # weight of the dead features' reconstruction (Gao et al. 2024)
THRESHOLD_RATE = 0.05  # of the running mean of batches' thresholds; a slower one lags behind


@dataclasses.dataclass(frozen=True)
class Hyper:
    """What a loss reads of the settings and of the state at one step."""

    l1_coefficient: jax.Array | float = 0.0  # of the sparsity penalty, after warm-up (traced)
    revived: int = 0  # dead features that AuxK makes room for; 0: none is dead (static)
    k_aux: int = 0  # how many of them take part in the reconstruction of a row
    dead: jax.Array | None = None  # bool [width], features that have been silent too long
    l0_target: float = 0.0  # active features a row to aim for; 0 for none
    nested_fractions: tuple[float, ...] = ()  # of the width, beside all features
    rows: int = 0  # of the whole batch (static)
    products: str | None = None  # of sparse codes, see ``ops.sparse_code`` (static)
    dtype: Any = None  # of inputs of products; sums stay float32
    # Of a batch that comes in parts; else None.
    variance: jax.Array | None = None  # [], of the rows to reconstruct
    residual_variance: jax.Array | None = None  # [], of their residuals
    threshold: jax.Array | None = None  # [], least value kept, where features compete over rows
    l0: jax.Array | None = None  # [], active features a row


def power(x: jax.Array) -> jax.Array:
    """Returns the mean squared norm [] of rows x [batch, d_model]."""
    return jnp.mean(jnp.sum(jnp.square(x), axis=1))


def fvu(x: jax.Array, x_hat: jax.Array, variance: jax.Array | None = None) -> jax.Array:
    """Returns the fraction [] of the variance of x [batch, d] that x_hat leaves unexplained.

    ``variance`` [] is the rows' mean squared distance to their mean; None: that of x.
    """
    if variance is None:
        variance = power(x - x.mean(axis=0, keepdims=True))
    return power(x - x_hat) / jnp.maximum(variance, 1e-8)


class Dictionary(modules.Plain):
    """f = act((x s) W_enc + b_enc - (b_dec W_enc)),  x_hat = (f W_dec + b_dec) / s.

    ``s`` brings rows to mean norm sqrt(d_model) in training; callers always use raw activation
    units. An architecture defines ``act`` as ``activate(z)``, and its loss.

    With ``d_out`` it is a transcoder, which reads one site and predicts another:
    f = act((x s) W_enc + b_enc),  y_hat = (f W_dec + b_dec) / s_out  (Dunefsky et al. 2024, arXiv
    2406.11944). b_dec lives in the space of y, so it is not subtracted from x: b_enc centres.

    Attributes:
      W_enc [d_model, width], b_enc [width], W_dec [width, d_out], b_dec [d_out], scale [].
      transcodes: whether other rows are written than read (static); then scale_out [] is of those.
      k: active features a row, for architectures that fix it (static; else 0).
    """

    measured: tuple[str, ...] = ("scale", "scale_out")  # variables that no gradient updates
    selects_over_rows: bool = False  # whether training chooses features over the whole batch
    unit_decoder: bool = True  # whether decoder rows are kept at norm 1
    revives: bool = True  # whether the loss has a term for dead features
    pace: float = 1.0  # of the usual learning rate
    usual_l1: float = 1.0  # l1_coefficient at which about a sixth of the dimensions are active
    reads: tuple[str, ...] = ()  # settings of SAEConfig that not all architectures read
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
        if self.selects_over_rows:
            self.threshold = nnx.Variable(jnp.zeros(()))

    def encoder(self) -> tuple[jax.Array, jax.Array]:
        """Returns W_enc [d_model, width] and the bias [width] of scaled rows.

        Subtracting b_dec through the bias saves a product with the rows in the gradient.
        """
        W_enc, bias = self.W_enc[...], self.b_enc[...]
        if not self.transcodes:
            bias = bias - exact(self.b_dec[...], W_enc)
        return W_enc, bias

    def pre_activations(self, u: jax.Array, dtype=None) -> jax.Array:
        """Returns z [batch, width] of scaled rows u [batch, d_model]."""
        W_enc, bias = self.encoder()
        return matmul(u, W_enc, dtype) + bias[None, :]

    def activate(self, z: jax.Array) -> jax.Array:
        """Returns features [batch, width]: relu(z) above a threshold, if any. NaN stays."""
        threshold = jnp.reshape(self.threshold[...], (1, -1)) if hasattr(self, "threshold") else 0.0
        return jnp.where(z <= threshold, 0.0, jax.nn.relu(z))

    def encode(self, x: jax.Array) -> jax.Array:
        """Returns features, float32 [batch, width], of raw activations x [batch, d_model]."""
        return self.activate(self.pre_activations(self.scaled_pair(x)[0]))

    def decode(self, f: jax.Array) -> jax.Array:
        """Returns raw activations x_hat, float32 [batch, d_out], of features [batch, width]."""
        f = modules.rows(f, self.width, "f")
        u_hat = exact(f, self.W_dec[...]) + self.b_dec[...][None, :]
        return u_hat / (self.scale_out if self.transcodes else self.scale)[...]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the reconstruction x_hat [batch, d_out] of x [batch, d_model]."""
        return self.decode(self.encode(x))

    # Training

    def scaled_pair(self, x: jax.Array, y: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns scaled rows: read [batch, d_model], and to be written.

        ``y`` are raw rows [batch, d_out] that a transcoder is to predict.
        """
        u = modules.rows(x, self.d_model) * jax.lax.stop_gradient(self.scale[...])
        if y is None:
            return u, u
        return u, jnp.asarray(y, jnp.float32) * jax.lax.stop_gradient(self.scale_out[...])

    def training_code(self, u: jax.Array, hyper: Hyper = Hyper()) -> Code:
        """Returns the code of scaled rows u [batch, d_model], a part of the batch of ``hyper``."""
        return self.activate(self.pre_activations(u, hyper.dtype))

    def reconstruction(self, f: Code, dtype=None) -> jax.Array:
        """Returns scaled rows u_hat [batch, d_out] of a code."""
        return decode(f, self.W_dec[...], dtype) + self.b_dec[...][None, :]

    def losses(
        self, x: jax.Array, hyper: Hyper, y: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array], Code]:
        """Returns (loss to minimise, its parts, the code of raw rows x and y of ``scaled_pair``).

        By default FVU + auxk * (residual FVU of k_aux dead features) (Gao et al. 2024, arXiv
        2406.04093).
        """
        u_in, u = self.scaled_pair(x, y)
        f = self.training_code(u_in, hyper)
        u_hat = self.reconstruction(f, hyper.dtype)
        auxk = self.auxk(u_in, u - u_hat, hyper)
        parts = {"fvu": fvu(u, u_hat, hyper.variance), "auxk": auxk}
        return parts["fvu"] + AUXK_COEFFICIENT * parts["auxk"], parts, f

    def auxk(self, u: jax.Array, residual: jax.Array, hyper: Hyper) -> jax.Array:
        """Returns the share [] of the residual that k_aux strongest dead features leave; else 0.

        Divided by the residual's variance (Gao et al. 2024, arXiv 2406.04093, section A.2). Of more
        dead features than there is room for, n, the first n are revived; costs 10 B d n operations.

        Args:
          u: scaled rows that the encoder reads [batch, d_model].
          residual: scaled rows less their reconstruction [batch, d_out]; gets no gradient.
        """
        n, used = hyper.revived, hyper.dead
        if not n:
            return jnp.zeros(())
        (W_enc, bias), W_dec = self.encoder(), self.W_dec[...]
        if n < self.width:
            used = jnp.arange(n) < jnp.sum(hyper.dead)
            features = jnp.nonzero(hyper.dead, size=n, fill_value=0)[0]
            W_enc, bias, W_dec = W_enc[:, features], bias[features], W_dec[features]
        z = matmul(u, W_enc, hyper.dtype) + bias[None, :]
        f = keep_top_k(jnp.where(used[None, :], z, 0.0), min(hyper.k_aux, n))
        residual, u_hat = jax.lax.stop_gradient(residual), matmul(f, W_dec, hyper.dtype)
        left = fvu(residual, u_hat, hyper.residual_variance)
        return jnp.where(hyper.dead.any(), left, 0.0)

    @property
    def meta(self) -> dict:
        """A checkpoint's entries to build it again; UserError: it is none of our architectures."""
        sizes = {"d_model": self.d_model, "width": self.width, "k": self.k}
        d_out = self.d_out if self.transcodes else None
        return sizes | {"architecture": architecture_of(self), "d_out": d_out}

    def after_update(self, smallest: jax.Array) -> None:
        """Imposes constraints on the parameters, and updates running statistics.

        ``smallest`` [] is the smallest active value of the batch; infinite without one.
        """
        if self.unit_decoder:
            self.W_dec[...] = unit_rows(self.W_dec[...])


def decoder_rows(dictionary: Dictionary, features: np.ndarray) -> np.ndarray:
    """Returns each feature's [m] decoder row in raw units, [m, d_out]."""
    scale = dictionary.scale_out if dictionary.transcodes else dictionary.scale
    return np.asarray(dictionary.W_dec[...])[features] / np.asarray(scale[...])


def unit_rows(W: jax.Array) -> jax.Array:
    """Returns W [width, d_out] with rows of norm 1."""
    return W / jnp.maximum(jnp.linalg.norm(W, axis=1, keepdims=True), 1e-8)


class BatchSelected(Dictionary):
    """An architecture that chooses features over the whole batch in training.

    At inference f = relu(z) 1[z > threshold].

    Attributes:
      threshold: [], the running mean of the smallest value that a batch kept.
    """

    measured = (*Dictionary.measured, "threshold")
    selects_over_rows = True

    def training_code(self, u: jax.Array, hyper: Hyper = Hyper()) -> Code:
        in_parts = hyper.threshold is not None
        n = self.k * (hyper.rows if in_parts else len(u))
        threshold = (lambda z: hyper.threshold) if in_parts else (lambda z: nth_largest(z, n))
        return sparse_code(u, *self.encoder(), threshold, n, hyper.dtype, hyper.products)

    def after_update(self, smallest: jax.Array) -> None:
        super().after_update(smallest)
        old = self.threshold[...]
        new = jnp.where(old == 0, smallest, old + THRESHOLD_RATE * (smallest - old))
        self.threshold[...] = jnp.where(jnp.isfinite(smallest), new, old)


def find(architecture: str) -> type[Dictionary]:
    """Returns the class of an architecture, found by its file's name."""
    if architecture not in architectures():
        raise UserError(
            f"sae.architecture={architecture} is unknown; use one of {', '.join(architectures())}."
        )
    module = importlib.import_module(f"{__package__}.architectures.{architecture}")
    ours = (c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Dictionary))
    return next(c for c in ours if c.__module__ == module.__name__)


def check_settings(config: Config) -> None:
    """Raises UserError for settings that the architecture does not read or cannot fulfil."""
    sae, pareto, kinds = config.sae, config.pareto, architectures()
    joint = ("products",) if "crosscoder" in config.map.kinds else ()  # those read it, too
    reads, narrowest = find(sae.architecture).reads + joint, np.min(sae.width)
    for name in ("k", "l1_coefficient", "l0_target", "nested_fractions", "products"):
        value = getattr(sae, name)
        # Presets set k and l1_coefficient for any architecture; a sweep is never by accident.
        asked = isinstance(value, tuple) if name in SWEPT else value != getattr(SAEConfig(), name)
        if asked and name not in reads:
            able = ", ".join(kind for kind in kinds if name in find(kind).reads)
            raise UserError(
                f"sae.{name}={spell(value)} means nothing to sae.architecture={sae.architecture}, "
                f"only to {able}; leave it out."
            )
        if name in ("k", "l0_target") and name in reads and np.max(value) > narrowest:
            raise UserError(
                f"sae.{name}={np.max(value)} is larger than sae.width={narrowest}; it must be the "
                "width or less."
            )
    kinds = pareto.architectures or kinds
    for name, of_sae in (("k", "k"), ("penalties", "l1_coefficient")):
        read, value = any(of_sae in find(kind).reads for kind in kinds), getattr(pareto, name)
        if value != getattr(ParetoConfig(), name) and not read:
            raise UserError(
                f"pareto.{name}={spell(value)} means nothing to pareto.architectures="
                f"{spell(kinds)}; leave it out."
            )
    needs = {"intervention.feature_ids": "intervention.features", "sae.source_codes": "sae.sources"}
    for name, other in needs.items():
        value = get(config, name)
        if value != get(Config(), name) and not get(config, other):
            raise UserError(f"{name}={spell(value)} means nothing without {other}; leave it out.")
    width = unswept(sae).width
    limits = {"pareto.k": width}
    if not set(sae.sources) - {"train"}:
        limits["intervention.feature_ids"] = width - 1
    for name, limit in limits.items():
        if (highest := max(get(config, name), default=0)) > limit:
            raise UserError(
                f"{name}={highest} is too high for sae.width={width}; give {limit} or less."
            )


@modules.plain
def build(architecture: str, *, key: jax.Array, **shape: int | None) -> Dictionary:
    """Returns a fresh dictionary of this d_model, width, k and, of a transcoder, d_out.

    The encoder of a transcoder starts at zeros, to be set from data.
    """
    seed = jax.random.key_data(key)[..., :2]  # which begins the longer keys of other generators
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return find(architecture)(**shape, rngs=nnx.Rngs(params=key))


def architecture_of(dictionary: Dictionary) -> str:
    """Returns the name of a dictionary's class for ``find``; UserError for imported kinds."""
    name = type(dictionary).__module__.rsplit(".", 1)[-1]
    if name not in architectures():
        raise UserError(
            f"{type(dictionary).__name__} dictionaries have no checkpoint of their own; keep the "
            f"folder they were imported from. Ours are {', '.join(architectures())}."
        )
    return name


@modules.plain
def from_arrays(
    kind: type[Dictionary], arrays: dict[str, np.ndarray], *, k: int = 0, transcodes: bool = False
) -> Dictionary:
    """Returns the dictionary of a class with these parameters, in raw units."""
    for name, array in arrays.items():
        if not is_finite(name, array):
            raise UserError(
                f"{name} of a {kind.__name__} dictionary is not finite; look at its file."
            )
    (d_model, width), d_out = arrays["W_enc"].shape, arrays["W_dec"].shape[1]
    shape = {"d_model": d_model, "width": width, "k": k, "d_out": d_out if transcodes else None}
    graphdef, _ = modules.abstract(lambda: kind(**shape, rngs=nnx.Rngs(params=0)))
    filled = {"scale": np.ones(())} | ({"scale_out": np.ones(())} if transcodes else {}) | arrays
    return modules.merge(graphdef, {n: jnp.asarray(a, jnp.float32) for n, a in filled.items()})


def is_finite(name: str, array: np.ndarray) -> bool:
    """Whether all values are finite; a threshold may be infinite, as that of a dead feature."""
    return bool((np.isfinite(array) | ((array == np.inf) & (name == "threshold"))).all())


def save(dictionary: Dictionary, path: Path, *, meta: dict | None = None) -> None:
    """Writes a checkpoint that ``load`` reads."""
    params = modules.split(dictionary)[1]
    checkpoint.save(path, params=params, meta=(meta or {}) | dictionary.meta)


@modules.plain
def load(path: str | Path) -> Dictionary:
    """Returns the dictionary in a checkpoint directory.

    UserError: there is none, or a file of it is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no dictionary folder; train it first or correct the path.")
    meta = checkpoint.load_meta(path)
    if "architecture" not in meta:
        raise UserError(f"{path} holds another checkpoint than a dictionary's; correct the path.")
    with understood(path):
        shape = {name: meta[name] for name in ("architecture", "d_model", "width", "k")}
        shape["d_out"] = meta.get("d_out")  # checkpoints from before there were transcoders lack it
        graphdef, abstract = modules.abstract(lambda: build(**shape, key=jax.random.key(0)))
        return modules.merge(graphdef, checkpoint.load_params(path, abstract))
