"""How good each dictionary is: what it explains, how sparse it is, and what it costs the model."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import dictionaries, models, modules, stats
from crossdict_jax.activations.passages import select_passages, train_mean
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site
from crossdict_jax.models.run import Effect, Passages, Runner
from crossdict_jax.stats import Estimate, Resamples
from crossdict_jax.workdir import Workdir

FREQUENCY_EDGES = np.linspace(-6, 0, 25)  # of log10 firing frequency
COSINE_EDGES = np.linspace(0, 1, 21)  # of a decoder row to the one most like it
ROW_SUMS = ("error", "variance", "along", "power", "overlap")  # of a row, see ``measure``
LEAST_KL = 0.05  # nats: where an ablation does less, what is recovered of it means nothing


def reconstruct(config: Config, store: Store, work: Workdir) -> tuple[list[dict], list[dict]]:
    """Returns the rows of reconstruction.jsonl and of features.jsonl, one per dictionary each.

    - site_output: what is reconstructed, x below: the site itself, or what a transcoder writes
      (MODEL:SITE in another model). Edits are made there.
    - l0: active features per row; fvu = sum ||x - x_hat||^2 / sum ||x - mean_train(x)||^2: over
      the n_rows kept test rows.
    - dead_fraction: the share of features that are active in none of the n_rows_dead kept rows of
      training and test together.
    - shrinkage = sum (x - m).(x_hat - m) / sum ||x - m||^2 with m = mean_train(x): 1 is none, below
      1 reconstructions are too short.
    - relative_bias = sum ||x_hat||^2 / sum x.x_hat: 1 is none (Rajamanoharan et al. 2024, arXiv
      2404.16014).
    - decoder_cosine: mean over features of the cosine of their decoder row to the one most like it.
    - ce_*: cross-entropy in nats of the token after each of n_positions paired positions of
      n_documents_ce test documents, with the model's own activations there (clean), zeros, the
      training mean, or the reconstruction (sae); kl_* = KL(clean || *).
    - loss_recovered = (ce_zero - ce_sae) / (ce_zero - ce_clean), null where zeros cost less than
      0.05 nats; loss_recovered_mean: the same with the mean in place of zeros.
    - kl_recovered = 1 - kl_sae / kl_zero, null where zeros cost less than 0.05 nats;
      kl_recovered_mean: the same with the mean in place of zeros.

    Raises:
      UserError: a model and site of the store has no dictionary, or one is damaged.
    """
    from tqdm import tqdm

    places = [(m, site) for m in store.models for site in store.sites_of(m)]
    members = {place: member_folders(work, *place) for place in places}
    into: dict[str, list] = {}  # the model that is written: its places are edited by one runner
    for place in places:
        into.setdefault(store.output_of(*place)[0], []).append(place)
    rows, densities = [], []
    with tqdm(total=sum(map(len, members.values())), desc="dictionaries", unit="sae") as progress:
        for edited, here in into.items():
            runner = Runner(
                models.load(store.paths[store.models.index(edited)]),
                batch_size=config.intervention.batch_size,
                dtype=config.extract.matmul_dtype,
            )
            documents = config.intervention.documents
            passages = select_passages(store, edited, documents=documents, seed=config.seed)
            for model, site in here:
                found = {f: dictionaries.load(f) for f in members[model, site]}
                reader = runner, passages
                losses = _losses(config, store, reader, model, site, list(found.values()))
                for (folder, dictionary), loss in zip(found.items(), losses):
                    where = {
                        "model": model,
                        "site": str(site),
                        "site_output": _name_of_output(store, model, site),
                        "seed": seed_of(folder),
                        "member": folder.name,
                    }
                    figures, histograms = _figures(config, store, model, site, dictionary)
                    rows.append(where | figures | loss)
                    densities.append(where | histograms)
                    progress.update()
    return rows, densities


def _name_of_output(store: Store, model: str, site: Site) -> str:
    other, written = store.output_of(model, site)
    return str(written) if other == model else f"{other}:{written}"


def member_folders(work: Workdir, model: str, site: Site) -> list[Path]:
    """Returns the dictionary folders of a model and site, by seed; the default one at least."""
    default = work.dictionary(model, site)
    found = {p for p in default.parent.glob("*") if p.is_dir()} | {default}
    return sorted(found, key=lambda p: (seed_of(p), p.name))


def seed_of(folder: Path) -> int:
    """Returns N of a folder called seed-N or seed-N-..., where a setting was swept."""
    match = re.match(r"seed-(\d+)(-|$)", folder.name)
    if not match:
        raise UserError(f"{folder} is no dictionary folder (seed-N); move it elsewhere.")
    return int(match[1])


def _figures(
    config: Config, store: Store, model: str, site: Site, dictionary: Dictionary
) -> tuple[dict[str, Any], dict]:
    """What the stored rows say of a dictionary: (columns, histograms)."""
    train, test = store.select("train"), store.select("test")
    written = store.output_of(model, site)
    how = {"mean": train_mean(store, *written), "size": config.evaluation.batch_size}
    in_train, in_test = (
        measure(
            dictionary,
            store.read(model, site, split),
            y=store.read(*written, split) if dictionary.transcodes else None,
            **how,
        )
        for split in (train, test)
    )
    draws = _draw(config, store.rows.document[test])
    fires, n = in_train["fires"] + in_test["fires"], len(train) + len(test)
    frequencies = np.log10(fires[fires > 0] / n)
    cosines = nearest_cosines(dictionary.W_dec[...])
    columns = {
        "width": dictionary.width,
        "n_rows": len(test),
        "n_documents": draws.n_documents,
        **stats.columns("l0", draws.mean(in_test["l0"])),
        **stats.columns("fvu", draws.estimate(in_test["error"], in_test["variance"])),
        **stats.columns("shrinkage", draws.estimate(in_test["along"], in_test["variance"])),
        **stats.columns("relative_bias", draws.estimate(in_test["power"], in_test["overlap"])),
        "dead_fraction": float(np.mean(fires == 0)),
        "n_rows_dead": n,
        "decoder_cosine": None if len(cosines) < 2 else float(cosines.mean(dtype=np.float64)),
    }
    return columns, {
        "log10_frequency_histogram": _histogram(frequencies, FREQUENCY_EDGES),
        "decoder_cosine_histogram": _histogram(cosines, COSINE_EDGES),
    }


def _histogram(values: np.ndarray, edges: np.ndarray) -> dict[str, list]:
    """Counts between edges; what lies beyond the ends is counted in the first and last."""
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def nearest_cosines(W_dec: np.ndarray, *, block: int = 1024) -> np.ndarray:
    """Returns the cosine [width] of every decoder row to the other row that is most like it.

    A row of zeros is like none (0); of width 1 there is no other row, and nothing is returned.

    Args:
      W_dec: [width, d_model].
    """
    W = np.asarray(W_dec, np.float32)
    if len(W) < 2:
        return np.zeros(0, np.float32)
    norms = np.linalg.norm(W, axis=1, keepdims=True)
    unit = W / np.where(norms > 0, norms, 1)
    padded = np.pad(unit, ((0, -len(unit) % block), (0, 0)))
    parts = [
        np.asarray(_nearest(padded[at : at + block], unit, at))
        for at in range(0, len(padded), block)
    ]
    return np.concatenate(parts)[: len(W)]


@jax.jit
def _nearest(rows, everyone, start):
    """The largest cosine [block] of rows ``start``, ``start + 1`` ... to any row but themselves."""
    cosines = jnp.matmul(rows, everyone.T, precision=jax.lax.Precision.HIGHEST)
    own = start + jnp.arange(len(rows))[:, None] == jnp.arange(len(everyone))[None, :]
    return jnp.where(own, -jnp.inf, cosines).max(axis=1)


def _draw(config: Config, documents: np.ndarray) -> Resamples:
    return stats.draw(documents, count=config.evaluation.bootstrap, seed=config.seed)


def measure(
    dictionary: Dictionary,
    x: np.ndarray,
    *,
    mean: np.ndarray,
    size: int,
    y: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Returns what every row x [n, d_model] says of a dictionary, ``size`` rows at a time.

    l0, error = ||x - x_hat||^2, variance = ||x - mean||^2, along = (x - mean).(x_hat - mean),
    power = ||x_hat||^2, overlap = x.x_hat: all [n]; fires [width]: rows in which a feature is
    active.

    Args:
      y: [n, d_out], what a transcoder is to write: x of the formulas, and ``mean`` is its mean.
    """
    graphdef, params = modules.split(dictionary)
    parts, fires = [], 0
    for at in range(0, len(x), size):
        count = min(size, len(x) - at)
        padded = [
            None if a is None else np.pad(a[at : at + size], ((0, size - count), (0, 0)))
            for a in (x, y)
        ]
        active, *values = _measure_batch(graphdef, params, *padded, mean, count)
        fires = fires + np.asarray(active, np.int64)
        parts.append([np.asarray(v)[:count] for v in values])
    columns = map(np.concatenate, zip(*parts))
    return dict(zip(("l0", *ROW_SUMS), columns), fires=fires)


@partial(jax.jit, static_argnums=0)
def _measure_batch(graphdef, params, x, y, mean, count):
    """Over the first ``count`` rows how often each feature fires; per row l0 and ROW_SUMS."""
    dictionary, x = modules.merge(graphdef, params), x.astype(jnp.float32)
    f = dictionary.encode(x)  # [batch, width]
    active = f > 0
    real = jnp.arange(len(x)) < count
    x = x if y is None else y.astype(jnp.float32)
    x_hat, m = dictionary.decode(f), mean[None, :]
    products = ((x - x_hat,) * 2, (x - m,) * 2, (x - m, x_hat - m), (x_hat,) * 2, (x, x_hat))
    sums = [jnp.sum(a * b, axis=1) for a, b in products]
    return jnp.sum(active & real[:, None], axis=0), jnp.sum(active, axis=1), *sums


def _losses(
    config: Config,
    store: Store,
    reader: tuple[Runner, Passages],
    model: str,
    site: Site,
    members: list[Dictionary],
) -> list[dict[str, Any]]:
    """The loss columns of each dictionary, all from one clean pass."""
    runner, passages = reader
    x, written = store.read(model, site, passages.rows), store.output_of(model, site)
    whole = partial(modules.over_rows, method="__call__", size=config.evaluation.batch_size)
    reconstructions = {f"sae {i}": whole(d, x) for i, d in enumerate(members)}
    mean = train_mean(store, *written)
    references = {"zero": np.zeros_like(mean), "mean": mean}
    effects = runner.splice(passages, written[1], references | reconstructions)
    draws = _draw(config, passages.document[passages.scored])
    return [_loss_columns(effects, effects[name], draws) for name in reconstructions]


def _loss_columns(effects: dict[str, Effect], sae: Effect, draws: Resamples) -> dict[str, Any]:
    row = {"n_positions": len(sae.ce), "n_documents_ce": draws.n_documents}
    for name in ("clean", "zero", "mean"):
        row |= stats.columns(f"ce_{name}", draws.mean(effects[name].ce))
    row |= stats.columns("ce_sae", draws.mean(sae.ce))
    row |= stats.columns("kl_sae", draws.mean(sae.kl))
    for suffix, name in (("", "zero"), ("_mean", "mean")):
        row |= stats.columns(f"kl_{name}", draws.mean(effects[name].kl))
        row |= stats.columns(f"kl_recovered{suffix}", _kl_recovered(sae, effects[name], draws))
    for name, baseline in (("loss_recovered", "zero"), ("loss_recovered_mean", "mean")):
        share = stats.loss_recovered(
            sae.ce, clean=effects["clean"].ce, baseline=effects[baseline].ce, resamples=draws
        )
        row |= stats.columns(name, share)
    return row


def _kl_recovered(sae: Effect, baseline: Effect, draws: Resamples) -> Estimate | None:
    if draws.mean(baseline.kl).value < LEAST_KL:
        return None
    return 1 - draws.estimate(sae.kl, baseline.kl)
