"""Start of a dictionary: scales, means, and the direction and length of its encoder."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax.dictionaries.base import Dictionary
from crossdict_jax.errors import UserError
from crossdict_jax.ops import exact, keep_top_k

PENALTY = 1e-2  # of the linear predictor, in multiples of the mean variance of what it reads
BLOCK = 8192  # rows at a time
SAMPLE = 256  # rows, evenly spread, on which the length of the encoder is fitted
# What features are proportional to. Not JumpReLU's thresholds: at their start kernels reach
# pre-activations, and with a shorter encoder fewer features would start active.
PROPORTIONAL = ("W_enc", "b_enc", "b_mag")

Start = dict[str, np.ndarray]


def check_rows(x: np.ndarray, label: str, rows: np.ndarray) -> None:
    """Raises UserError if training rows x [n, d] hold NaN or infinity, or are all equal.

    ``label`` is their model and site, ``rows`` [n] their numbers in the store.
    """
    blocks = range(0, len(x), BLOCK)
    for at in blocks:
        finite = np.isfinite(x[at : at + BLOCK].astype(np.float32)).all(axis=1)
        if not finite.all():
            raise UserError(
                f"{label}: row {rows[at + int(np.argmin(finite))]} of the store holds NaN or "
                "infinity; extract again with extract.nonfinite=skip."
            )
    if all((x[at : at + BLOCK] == x[:1]).all() for at in blocks):
        raise UserError(
            f"{label}: all {len(x)} training rows are equal, so there is nothing to explain; "
            "choose another site, or more text."
        )


def activation_scale(x: np.ndarray) -> float:
    """Returns the factor that brings rows x [n, d_model] to a mean norm of sqrt(d_model)."""
    blocks = (x[at : at + BLOCK].astype(np.float32) for at in range(0, len(x), BLOCK))
    norms = np.concatenate([np.linalg.norm(block, axis=1) for block in blocks])
    return float(x.shape[1] ** 0.5 / max(norms.mean(dtype=np.float64), 1e-8))


def start_of(x: np.ndarray, y: np.ndarray | None = None) -> Start:
    """Returns scale [], mean [d_model] and a sample of rows [256, d_model] of x [n, d_model].

    With rows y [n, d_out] of a transcoder also those of y, NAME_out, and the ridge regression of
    scaled y on scaled x, predictor [d_model, d_out].
    """
    spread = np.arange(SAMPLE) * len(x) // SAMPLE
    start = {
        "scale": np.float32(activation_scale(x)),
        "mean": x.mean(axis=0, dtype=np.float64).astype(np.float32),
        "rows": x[spread].astype(np.float32),
    }
    if y is None:
        return start
    start |= {f"{name}_out": array for name, array in start_of(y).items()}
    d_model = x.shape[1]
    C_xx, C_xy = np.zeros((d_model, d_model)), np.zeros((d_model, y.shape[1]))
    for at in range(0, len(x), BLOCK):
        u = (x[at : at + BLOCK].astype(np.float32) - start["mean"]) * start["scale"]
        v = (y[at : at + BLOCK].astype(np.float32) - start["mean_out"]) * start["scale_out"]
        C_xx += u.T @ u
        C_xy += u.T @ v
    damping = PENALTY * np.trace(C_xx) / d_model or 1.0  # nothing varies: any will do
    predictor = np.linalg.solve(C_xx + damping * np.eye(d_model), C_xy)
    return start | {"predictor": predictor.astype(np.float32)}


def begin(dictionary: Dictionary, start: dict[str, jax.Array]) -> None:
    """Sets the scales, means and, of a transcoder, the encoder of a fresh dictionary.

    b_dec starts at the mean of what is written, so that features need not spend themselves on it. A
    transcoder's encoder starts at W_enc = P W_dec' with columns of length 1, for the linear
    predictor P of y from x: each feature fires on what foretells its own row. Its b_enc centres x.
    """
    d, mean = dictionary, start["scale"] * start["mean"]
    d.scale[...] = start["scale"]
    if not d.transcodes:
        d.b_dec[...] = mean
        return
    d.scale_out[...], d.b_dec[...] = start["scale_out"], start["scale_out"] * start["mean_out"]
    W_enc = exact(start["predictor"], d.W_dec[...].T)  # [d_model, width]
    d.W_enc[...] = W_enc / jnp.maximum(jnp.linalg.norm(W_enc, axis=0, keepdims=True), 1e-8)
    centred = exact(-mean, d.W_enc[...])
    d.b_enc[...] = d.b_enc[...] + centred
    if hasattr(d, "b_mag"):  # magnitudes of gated ones start from z - b_enc
        d.b_mag[...] = d.b_mag[...] + centred


def fit_length(dictionary: Dictionary, start: dict[str, jax.Array]) -> None:
    """Gives a dictionary's encoder the length at which its first reconstructions err least.

    An encoder c times as long has features c f: c = sum v.w / sum w.w, least squares, for scaled
    rows v less b_dec and w = f W_dec. At c = 1 active features that overlap overshoot together.
    It is left alone where no length explains anything.
    """
    u = start["scale"] * start["rows"]
    v = start["scale_out"] * start["rows_out"] if "rows_out" in start else u
    v = v - dictionary.b_dec[...][None, :]
    z = dictionary.pre_activations(u)
    over_rows = dictionary.selects_over_rows
    f = keep_top_k(z, dictionary.k, over_rows=True) if over_rows else dictionary.activate(z)
    w = exact(f, dictionary.W_dec[...])
    along, power = jnp.sum(v * w), jnp.sum(jnp.square(w))
    c = jnp.where(along > 0, along / jnp.maximum(power, 1e-8), 1.0)
    for name in filter(partial(hasattr, dictionary), PROPORTIONAL):
        variable = getattr(dictionary, name)
        variable[...] = c * variable[...]
