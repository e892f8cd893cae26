"""What a run's crosscoders explain, whose their latents are, and whether that survives a check."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import modules, stats
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config
from crossdict_jax.dictionaries import crosscoder, crosscoder_training
from crossdict_jax.dictionaries.crosscoder import TAKES_PART, Crosscoder
from crossdict_jax.maps.base import map_class
from crossdict_jax.models import Site
from crossdict_jax.stats import Resamples
from crossdict_jax.workdir import Workdir

NORM_EDGES = np.linspace(0, 1, 21)  # of relative decoder norms
SHIFTS = 19  # of the codes against the errors: to exceed them all by chance has p = 0.05
SCALING_ROWS = 2**15  # of the test split at most: what is held at once


# ---------------------------------------------------------------- Latent Scaling


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How much of each model's activations every latent explains along its best direction.

    With Y [n, d_m] centred and a latent's code f [n], the best direction is d = Y'f / |f|^2 and
    the explained share |Y'f|^2 / (|f|^2 |Y|^2) (Minder et al. 2025, arXiv 2504.02922, in a form
    that needs no common space).

    Attributes:
      error: [N, width], of the crosscoder's error: above the null, the latent is needed where the
        decoder does not use it (complete shrinkage).
      own: [N, width], of the error with the latent's own contribution put back: what the latent
        explains where no other one does.
      error_above, own_above: bool [N, width], larger than under every circular shift; None where
        no shift longer than a document is possible.
    """

    error: np.ndarray
    own: np.ndarray
    error_above: np.ndarray | None
    own_above: np.ndarray | None


def latent_scaling(
    joint: Crosscoder, x: Sequence[np.ndarray], documents: np.ndarray, *, seed: int
) -> Scaling:
    """Returns the Latent Scaling of rows, held at once.

    Args:
      x: per model raw activations [n, d_m], in the order of the text.
      documents: [n], the document of each row; shifts are longer than the longest.
    """
    u, f = _scaled_and_coded(joint, x)
    model = np.repeat(np.arange(joint.n_models), joint.d_models)
    belongs = (model[None, :] == np.arange(joint.n_models)[:, None]).astype(np.float32)
    shares = partial(_shares, u, f, joint.W_dec[...], joint.b_dec[...], jnp.asarray(belongs))
    error, own = (np.asarray(s) for s in shares(0))
    shifts = admissible_shifts(documents, seed=seed)
    if not len(shifts):
        return Scaling(error, own, None, None)
    nulls = [shares(int(shift)) for shift in shifts]
    highest = [np.max([np.asarray(null[i]) for null in nulls], axis=0) for i in (0, 1)]
    return Scaling(error, own, error > highest[0], own > highest[1])


def admissible_shifts(documents: np.ndarray, *, seed: int) -> np.ndarray:
    """Returns SHIFTS random circular shifts longer than any document; none if there is no room."""
    n, longest = len(documents), np.unique(documents, return_counts=True)[1].max(initial=0)
    if n < 2 * longest or n == 0:
        return np.zeros(0, np.int64)
    generator = np.random.Generator(np.random.Philox(key=seed))
    return generator.integers(longest, n - longest + 1, SHIFTS)


def _scaled_and_coded(joint: Crosscoder, x: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """Returns scaled rows [n, D] and their code [n, width]."""
    graphdef, params = modules.split(joint)
    rows = jnp.concatenate([jnp.asarray(view, jnp.float32) for view in x], axis=1)
    return _code(graphdef, params, rows, jnp.ones((len(rows), joint.n_models), bool))


@partial(jax.jit, static_argnums=0)
def _code(graphdef, params, rows, present):
    joint = modules.merge(graphdef, params)
    u = joint.scaled(rows)
    return u, joint.activate(joint.pre_activations(u, present))


@jax.jit
def _shares(u, f, W_dec, b_dec, belongs, shift) -> tuple[jax.Array, jax.Array]:
    """(error, own), each [N, width], of the code moved on by ``shift`` rows.

    The own contribution of a latent is of rank one, so one product with the error serves both.
    """
    matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    error = u - matmul(f, W_dec) - b_dec[None, :]
    error = error - error.mean(axis=0, keepdims=True)
    moved, centred = jnp.roll(f, shift, axis=0), f - f.mean(axis=0, keepdims=True)
    power = jnp.maximum(jnp.sum(jnp.square(moved), axis=0), 1e-30)[None, :]
    G = matmul(error.T, moved)  # [D, width]
    variance = matmul(belongs, jnp.sum(jnp.square(error), axis=0))[:, None]  # [N, 1]
    W = W_dec.T
    with_own = G + W * jnp.sum(centred * moved, axis=0)[None, :]
    cross = matmul(belongs, W * matmul(error.T, f))
    own_power = matmul(belongs, jnp.square(W)) * jnp.sum(jnp.square(centred), axis=0)[None, :]
    own_variance = jnp.maximum(variance + 2 * cross + own_power, 1e-30)

    def share(product, total):
        return matmul(belongs, jnp.square(product)) / (power * jnp.maximum(total, 1e-30))

    return share(G, variance), share(with_own, own_variance)


# ---------------------------------------------------------------- rows of results


def joint_codes(config: Config) -> bool:
    """Whether a run has crosscoders: whether one of its rungs goes through them."""
    return any(map_class(kind).through_joint for kind in config.map.kinds)


def score_crosscoders(config: Config, store: Store, work: Workdir) -> list[dict[str, Any]]:
    """Returns the rows of crosscoder.jsonl: one per layer tuple, training and model.

    - pairing: aligned; shuffled (trained and scored on rows of different positions: what is shared
      there is shared by nothing); self, rotated (the first model beside a copy of itself: what is
      exclusive there is exclusive to nothing).
    - fvu, l0: with the code of all models; fvu_alone, l0_alone: of this one; fvu_from_others: of
      all but this one.
    - dead_fraction: latents that fire in none of the n_rows test rows.
    - shared, exclusive: shares of the n_live others that belong to all models, to this one alone;
      relative_norms: their histogram.
    - exclusive_refuted: the share of the exclusive ones that, by Latent Scaling, belong to another
      model too; shared_confirmed: of the shared ones that explain more than any shift does in
      every model. Null where there is none, or no shift is possible.
    - scaling_ratio: median over the exclusive ones of what they explain best elsewhere, relative to
      what they explain here.

    Raises:
      UserError: a crosscoder is missing or damaged.
    """
    from tqdm import tqdm

    rows: list[dict] = []
    numbers = store.select("test")
    places = [place for place, _ in crosscoder_training.planned(config, store, with_rows=False)]
    for sites, name in tqdm(places, desc="evaluate crosscoders", unit="crosscoder"):
        joint = crosscoder.load(work.crosscoder(sites, name))
        names, x = _views(config, store, sites, name, numbers)
        documents = store.rows.document[numbers]
        where = {"sites": " ".join(map(str, sites)), "pairing": name}
        for m, columns in enumerate(figures(joint, x, documents, config=config)):
            rows.append(where | {"model": names[m], "site": str(sites[m])} | columns)
    return rows


def _views(
    config: Config, store: Store, sites: tuple[Site, ...], name: str, numbers: np.ndarray
) -> tuple[list[str], tuple[np.ndarray, ...]]:
    """Returns the models' names, and their test rows as the crosscoder of that name sees them."""
    if name in crosscoder_training.CONTROLS:
        first = store.models[0]
        x = store.read(first, sites[0], numbers)
        return [first, f"{first} ({name})"], crosscoder_training.copies(x, name, config.seed)
    x = tuple(store.read(m, site, numbers) for m, site in zip(store.models, sites))
    if name == "shuffled":
        orders = crosscoder_training.shuffles(len(numbers), models=len(x), seed=config.seed)
        x = tuple(view if o is None else view[o] for view, o in zip(x, orders))
    return list(store.models), x


def figures(
    joint: Crosscoder, x: Sequence[np.ndarray], documents: np.ndarray, *, config: Config
) -> list[dict[str, Any]]:
    """Returns per model the columns that ``score_crosscoders`` describes.

    Args:
      x: per model raw activations [n, d_m].
      documents: [n], the document of each row.
    """
    draws = stats.draw(documents, count=config.evaluation.bootstrap, seed=config.seed)
    everyone = range(joint.n_models)
    size = config.evaluation.batch_size
    whole = _measure(joint, x, given=tuple(everyone), size=size)
    live = whole["fires"] > 0
    few = slice(0, SCALING_ROWS)
    scaling = latent_scaling(joint, [v[few] for v in x], documents[few], seed=config.seed)
    found = []
    for m in everyone:
        alone = _measure(joint, x, given=(m,), size=size)
        others = _measure(joint, x, given=tuple(o for o in everyone if o != m), size=size)
        columns = {"n_rows": len(documents), "n_documents": draws.n_documents}
        columns |= {"width": joint.width, "variant": joint.variant}
        columns |= _fvu("fvu", whole, m, draws) | _fvu("fvu_alone", alone, m, draws)
        columns |= _fvu("fvu_from_others", others, m, draws)
        columns |= stats.columns("l0", draws.mean(whole["l0"]))
        columns |= {"l0_alone": float(alone["l0"].mean())}
        columns |= {"dead_fraction": float(np.mean(~live)), "n_live": int(live.sum())}
        found.append(columns | ownership(joint, m, live, scaling))
    return found


def _fvu(name: str, measured: dict, m: int, draws: Resamples) -> dict:
    estimate = draws.estimate(measured["error"][:, m], measured["variance"][:, m])
    return stats.columns(name, estimate)


def ownership(joint: Crosscoder, m: int, live: np.ndarray, scaling: Scaling) -> dict[str, Any]:
    """Returns whose the live latents are, seen from one model, and what Latent Scaling says."""
    part = crosscoder.takes_part(joint) & live[None, :]
    shared, exclusive = part.all(axis=0), part[m] & (part.sum(axis=0) == 1)
    counts, _ = np.histogram(crosscoder.relative_norms(joint)[m, live], NORM_EDGES)
    others = np.arange(joint.n_models) != m
    # Shares go as squares of norms: the rule of ``takes_part``, with best directions as norms.
    also = scaling.own >= TAKES_PART**2 * scaling.own[m][None, :]
    above = scaling.own_above
    refuted = None if above is None else (also & above)[others].any(axis=0)
    confirmed = None if above is None else above.all(axis=0)
    elsewhere = scaling.own[others].max(axis=0) / np.maximum(scaling.own[m], 1e-30)
    n_live = max(int(live.sum()), 1)
    return {
        "shared": float(shared.sum() / n_live),
        "exclusive": float(exclusive.sum() / n_live),
        "shared_confirmed": _share(confirmed, shared),
        "exclusive_refuted": _share(refuted, exclusive),
        "scaling_ratio": float(np.median(elsewhere[exclusive])) if exclusive.any() else None,
        "relative_norms": {"edges": NORM_EDGES.tolist(), "counts": counts.tolist()},
    }


def _share(which: np.ndarray | None, among: np.ndarray) -> float | None:
    return None if which is None or not among.any() else float(which[among].mean())


def _measure(
    joint: Crosscoder, x: Sequence[np.ndarray], *, given: tuple[int, ...], size: int
) -> dict[str, np.ndarray]:
    """{error, variance: [n, N], l0: [n], fires: [width]} with the code of the given models."""
    graphdef, params = modules.split(joint)
    present = np.isin(np.arange(joint.n_models), given)
    parts, fires = [], 0
    for at in range(0, len(x[0]), size):
        batch = np.concatenate([view[at : at + size].astype(np.float32) for view in x], axis=1)
        padded = np.pad(batch, ((0, size - len(batch)), (0, 0)))
        active, *values = _measure_batch(graphdef, params, padded, present, len(batch))
        fires = fires + np.asarray(active, np.int64)
        parts.append([np.asarray(v)[: len(batch)] for v in values])
    error, variance, l0 = map(np.concatenate, zip(*parts))
    return {"error": error, "variance": variance, "l0": l0, "fires": fires}


@partial(jax.jit, static_argnums=0)
def _measure_batch(graphdef, params, x, present, count):
    """How often each latent fires in the first ``count`` rows; per row error, variance, l0."""
    joint = modules.merge(graphdef, params)
    u = joint.scaled(x)
    rows = jnp.broadcast_to(present[None, :], (len(x), joint.n_models))
    f = joint.activate(joint.pre_activations(u, rows))
    error = jnp.square(u - joint.reconstruction(f))
    variance = jnp.square(u - joint.center[...][None, :])

    def per_model(values):
        parts = [values[:, joint.part(m)].sum(axis=1) for m in range(joint.n_models)]
        return jnp.stack(parts, axis=1)

    real = jnp.arange(len(x)) < count
    active = f > 0
    fires = jnp.sum(active & real[:, None], axis=0)
    return fires, per_model(error), per_model(variance), active.sum(axis=1)
