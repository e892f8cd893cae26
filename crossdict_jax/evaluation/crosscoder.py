"""What crosscoders explain, whose their latents are, and whether that survives a check."""

from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import modules, stats
from crossdict_jax.config import Config
from crossdict_jax.dictionaries import crosscoder, crosscoder_training
from crossdict_jax.dictionaries.crosscoder import TAKES_PART, Crosscoder
from crossdict_jax.evaluation.nulls import shifts
from crossdict_jax.maps.base import padded, slices
from crossdict_jax.maps.fit import Loader
from crossdict_jax.ops import exact
from crossdict_jax.training.stage import progress_bar

NORM_EDGES = np.linspace(0, 1, 21)  # of relative decoder norms
SHIFTS = 19  # of the codes against the errors: exceeding all by chance has p = 0.05
SCALING_ROWS = 2**15  # of the test split at most: held at once


class Scaling(NamedTuple):
    """How much of each model's activations every latent explains along its best direction.

    |Y'f|^2 / (|f|^2 |Y|^2), Y [n, d_m] centred, f [n] the latent's code (Minder et al. 2025, arXiv
    2504.02922, in a form without a common space). Above: larger than under every circular shift;
    None where no shift longer than a document exists.
    """

    error: np.ndarray  # [N, width], of the error: above the null, the decoder misses the latent
    alone: np.ndarray  # [N, width], of the error plus the latent's contribution
    error_above: np.ndarray | None  # bool [N, width]
    alone_above: np.ndarray | None


def latent_scaling(
    joint: Crosscoder, x: Sequence[np.ndarray], documents: np.ndarray, *, seed: int
) -> Scaling:
    """Returns Latent Scaling of all models' raw rows [n, d_m], in the order of the text.

    Shifts are longer than the longest of the rows' documents [n].
    """
    rows = jnp.concatenate([jnp.asarray(view, jnp.float32) for view in x], axis=1)
    belongs = jnp.asarray(np.repeat(np.eye(joint.n_models, dtype=np.float32), joint.d_models, 1))
    drawn = np.concatenate([[0], admissible_shifts(documents, seed=seed)])
    error, alone = map(np.asarray, _explained(*modules.split(joint), rows, belongs, drawn))
    above = [s[0] > s[1:].max(axis=0) if len(drawn) > 1 else None for s in (error, alone)]
    return Scaling(error[0], alone[0], *above)


def admissible_shifts(documents: np.ndarray, *, seed: int) -> np.ndarray:
    """Returns SHIFTS random circular shifts longer than any document; none if there is no room."""
    allowed = shifts(documents, len(documents))
    if not allowed:
        return np.zeros(0, np.int64)
    return stats.generator(seed).integers(allowed.start, allowed.stop, SHIFTS)


@partial(jax.jit, static_argnums=0)
def _explained(graphdef, params, rows, belongs, shifts) -> tuple[jax.Array, jax.Array]:
    """The shares (error, alone) of ``Scaling``, [shifts, N, width], of shifted codes.

    rows are [n, D] of all models; belongs [N, D] is 1 where a column is of a model. A latent's
    contribution has rank one, so one product with the error serves both.
    """
    joint = modules.merge(graphdef, params)
    seen, u = joint.scaled_pair(rows, jnp.ones((1, len(belongs)), bool))
    f, W = joint.activate(joint.pre_activations(seen)), joint.W_dec[...].T
    error = u - exact(f, W.T) - joint.b_dec[...][None, :]
    error = error - error.mean(axis=0, keepdims=True)
    centred = f - f.mean(axis=0, keepdims=True)
    variance = exact(belongs, jnp.sum(jnp.square(error), axis=0))[:, None]  # [N, 1]
    cross = exact(belongs, W * exact(error.T, f))
    added = exact(belongs, jnp.square(W)) * jnp.sum(jnp.square(centred), axis=0)[None, :]

    def of_shift(shift):
        moved = jnp.roll(f, shift, axis=0)
        power = jnp.maximum(jnp.sum(jnp.square(moved), axis=0), 1e-30)[None, :]
        G = exact(error.T, moved)  # [D, width]
        put_back = G + W * jnp.sum(centred * moved, axis=0)[None, :]
        return tuple(
            exact(belongs, jnp.square(product)) / (power * jnp.maximum(total, 1e-30))
            for product, total in ((G, variance), (put_back, variance + 2 * cross + added))
        )

    return jax.lax.map(of_shift, shifts)


def crosscoder_rows(run: Loader) -> list[dict]:
    """Returns the rows of crosscoder.jsonl: one per layer tuple, training and model.

    What shuffled pairs share is an artefact, and so is what is exclusive between a model and its
    copy (self, rotated).
    """
    config, store, rows = run.config, run.store, []
    numbers = store.select("test")
    planned = crosscoder_training.planned(config, store)
    for sites, name in progress_bar(planned, desc="evaluate crosscoders", unit="crosscoder"):
        if name in crosscoder_training.CONTROLS:
            names = [store.models[0], f"{store.models[0]} ({name})"]
            x = store.read(store.models[0], sites[0], numbers)
            x = crosscoder_training.copies(x, name, config.seed)
        else:
            names = store.models
            x = tuple(store.read(m, site, numbers) for m, site in zip(names, sites))
        if name == "shuffled":
            orders = crosscoder_training.shuffles(len(numbers), models=len(x), seed=config.seed)
            x = tuple(view if o is None else view[o] for view, o in zip(x, orders))
        joint, documents = crosscoder.load(run.work.crosscoder(sites, name)), store.rows.document
        made = figures(joint, x, documents[numbers], config)
        for model, site, columns in zip(names, sites, made):
            of = {"sites": " ".join(map(str, sites)), "pairing": name}
            rows.append(of | {"model": model, "site": str(site)} | columns)
    return rows


def figures(
    joint: Crosscoder, x: Sequence[np.ndarray], documents: np.ndarray, config: Config
) -> list[dict]:
    """Returns each model's columns of crosscoder.jsonl, from raw rows [n, d_m] of documents [n]."""
    draws = stats.draw(documents, count=config.evaluation.bootstrap, seed=config.seed)
    measure = cache(lambda *present: _measure(joint, x, config.evaluation.batch_size, present))
    models, some = np.eye(joint.n_models, dtype=bool), slice(0, SCALING_ROWS)
    together = measure(*models.any(axis=0))
    live = together["fires"] > 0
    scaling = latent_scaling(joint, [view[some] for view in x], documents[some], seed=config.seed)
    rows = []
    for m, only in enumerate(models):
        alone, others = measure(*only), measure(*~only)
        columns = {"n_rows": len(documents), "n_documents": draws.n_documents}
        columns |= {"width": joint.width, "variant": joint.variant}
        for name, sums in (("", together), ("_alone", alone), ("_from_others", others)):
            fvu = draws.estimate(sums["error"][:, m], sums["variance"][:, m])
            columns |= stats.columns(f"fvu{name}", fvu)
        columns |= stats.columns("l0", draws.mean(together["l0"]))
        columns |= {"dead_fraction": float(np.mean(~live)), "n_live": int(live.sum())}
        rows.append(columns | ownership(joint, m, live, scaling))
    return rows


def ownership(joint: Crosscoder, m: int, live: np.ndarray, scaling: Scaling) -> dict:
    """Returns whose the live latents are, seen from one model, and Latent Scaling's verdicts.

    An exclusive latent is refuted where it explains another model above every shift, and missed
    where it explains another's error so; a shared latent is confirmed where it explains every
    model above all shifts.
    """
    part = crosscoder.takes_part(joint) & live[None, :]
    shared, exclusive = part.all(axis=0), part[m] & (part.sum(axis=0) == 1)
    counts, _ = np.histogram(crosscoder.relative_norms(joint)[m, live], NORM_EDGES)
    confirmed_share = refuted_share = missed_share = None
    if scaling.alone_above is not None:
        others = np.arange(joint.n_models) != m
        # Shares go as squared norms: the rule of ``takes_part`` for best directions.
        also = scaling.alone >= TAKES_PART**2 * scaling.alone[m][None, :]
        refuted = (also & scaling.alone_above)[others].any(axis=0)
        missed = scaling.error_above[others].any(axis=0)
        if shared.any():
            confirmed_share = float(scaling.alone_above.all(axis=0)[shared].mean())
        if exclusive.any():
            refuted_share, missed_share = (float(x[exclusive].mean()) for x in (refuted, missed))
    n_live = max(int(live.sum()), 1)
    return {
        "shared": float(shared.sum() / n_live),
        "exclusive": float(exclusive.sum() / n_live),
        "shared_confirmed": confirmed_share,
        "exclusive_refuted": refuted_share,
        "exclusive_missed": missed_share,
        "relative_norms": {"edges": NORM_EDGES.tolist(), "counts": counts.tolist()},
    }


def _measure(
    joint: Crosscoder, x: Sequence[np.ndarray], size: int, present: tuple[bool, ...]
) -> dict[str, np.ndarray]:
    """{error, variance: [n, N], l0: [n], fires: [width]} with the code of the models present."""
    graphdef, params = modules.split(joint)
    parts, fires = [], 0
    for rows in slices(len(x[0]), size):
        batch = np.concatenate([view[rows].astype(np.float32) for view in x], axis=1)
        f, *values = _measure_batch(graphdef, params, padded(batch, size), np.array(present))
        fires = fires + np.count_nonzero(np.asarray(f)[: len(batch)], axis=0)
        parts.append([np.asarray(v)[: len(batch)] for v in values])
    return dict(zip(("error", "variance", "l0"), map(np.concatenate, zip(*parts))), fires=fires)


@partial(jax.jit, static_argnums=0)
def _measure_batch(graphdef, params, x, present):
    """The code; per row l0 and each model's error and variance."""
    joint = modules.merge(graphdef, params)
    seen, u = joint.scaled_pair(x, present[None, :])
    f = joint.activate(joint.pre_activations(seen))
    squares = (jnp.square(u - v) for v in (joint.reconstruction(f), joint.center[...][None, :]))
    of_model = np.repeat(np.eye(joint.n_models, dtype=np.float32), joint.d_models, axis=0)
    return f, *(exact(s, of_model) for s in squares), (f > 0).sum(axis=1)
