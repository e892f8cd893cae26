"""Start of a dictionary: scales, means, and the direction and length of its encoder."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax.dictionaries.base import Dictionary
from crossdict_jax.errors import UserError
from crossdict_jax.modules import Params
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
    start = {}
    for end, array in (("", x), ("_out", y))[: 1 if y is None else 2]:
        start[f"scale{end}"] = np.float32(activation_scale(array))
        start[f"mean{end}"] = array.mean(axis=0, dtype=np.float32)
        spread = np.arange(SAMPLE) * len(array) // SAMPLE
        start[f"rows{end}"] = array[spread].astype(np.float32)
    if y is None:
        return start
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


def begin(params: Params, start: dict[str, jax.Array]) -> Params:
    """Returns fresh parameters with scales, means and a transcoder's encoder set.

    b_dec starts at the mean of what is written, so that features need not spend themselves on it. A
    transcoder's encoder starts at W_enc = P W_dec' with columns of length 1, for the linear
    predictor P of y from x: each feature fires on what foretells its own row. Its b_enc centres x.
    """
    params = params | {"scale": start["scale"]}
    if "predictor" not in start:
        return params | {"b_dec": start["scale"] * start["mean"]}
    W_enc = exact(start["predictor"], params["W_dec"].T)  # [d_model, width]
    W_enc = W_enc / jnp.maximum(jnp.linalg.norm(W_enc, axis=0, keepdims=True), 1e-8)
    centred = exact(-(start["scale"] * start["mean"]), W_enc)
    changed = {"scale_out": start["scale_out"], "b_dec": start["scale_out"] * start["mean_out"]}
    changed |= {"W_enc": W_enc, "b_enc": params["b_enc"] + centred}
    if "b_mag" in params:  # magnitudes of gated ones start from z - b_enc
        changed["b_mag"] = params["b_mag"] + centred
    return params | changed


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
