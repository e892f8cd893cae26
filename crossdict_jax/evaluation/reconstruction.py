"""How good each dictionary is: what it explains, how sparse it is, and what it costs the model."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import dictionaries, modules, stats
from crossdict_jax.activations.passages import select_passages, train_mean
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.errors import UserError
from crossdict_jax.maps.base import padded, slices
from crossdict_jax.maps.fit import Loader
from crossdict_jax.models import Site
from crossdict_jax.models.run import Passages, Runner
from crossdict_jax.ops import exact
from crossdict_jax.training.stage import progress_bar
from crossdict_jax.workdir import Workdir

FREQUENCY_EDGES = np.linspace(-6, 0, 25)  # of log10 firing frequency
COSINE_EDGES = np.linspace(0, 1, 21)  # of a decoder row to the one most like it
MIN_KL = 0.05  # nats: where an ablation does less, the share recovered is meaningless


def reconstruct(run: Loader) -> dict[str, list[dict]]:
    """Returns the rows of reconstruction.jsonl and of features.jsonl, one per dictionary each.

    A transcoder is measured at its site_output, in whichever model that is. Losses are of paired
    positions of test documents with the model's own activations (clean), zeros, the training mean,
    or the reconstruction (sae).

    Raises:
      UserError: a model and site of the store has no dictionary, or one is damaged.
    """
    config, store, work = run.config, run.store, run.work
    edited: dict[str, list] = {}  # by the model that is written, run once
    for model in store.models:
        for site in store.sites_of(model):
            edited.setdefault(store.output_of(model, site)[0], []).append((model, site))
    rows, densities = [], []
    n = sum(len(member_folders(work, *end)) for ends in edited.values() for end in ends)
    with progress_bar(total=n, desc="dictionaries", unit="sae") as progress:
        for other, ends in edited.items():
            lm = store.load_model(other)
            dtype, documents = config.extract.matmul_dtype, config.intervention.documents
            runner = Runner(lm, batch_size=config.intervention.batch_size, dtype=dtype)
            passages = select_passages(store, other, documents=documents, seed=config.seed)
            for model, site in ends:
                folders = member_folders(work, model, site)
                members = [dictionaries.load(folder) for folder in folders]
                losses = _losses(members, runner, passages, store, model, site, config)
                _, output = store.output_of(model, site)
                for folder, dictionary, loss in zip(folders, members, losses):
                    columns = {
                        "model": model,
                        "site": str(site),
                        "site_output": str(output) if other == model else f"{other}:{output}",
                        "seed": seed_of(folder),
                        "member": folder.name,
                    }
                    numbers, histograms = figures(dictionary, store, model, site, config)
                    rows.append(columns | numbers | loss)
                    densities.append(columns | histograms)
                    progress.update()
    return {"reconstruction.jsonl": rows, "features.jsonl": densities}


def member_folders(work: Workdir, model: str, site: Site) -> list[Path]:
    """Returns the dictionary folders of a model and site, by seed; always the default one."""
    default = work.dictionary(model, site)
    folders = {p for p in default.parent.glob("*") if p.is_dir()} | {default}
    return sorted(folders, key=lambda p: (seed_of(p), p.name))


def seed_of(folder: Path) -> int:
    """Returns N of a folder called seed-N or seed-N-..., where a setting was swept."""
    match = re.match(r"seed-(\d+)(-|$)", folder.name)
    if not match:
        raise UserError(f"{folder} is no dictionary folder (seed-N); move it elsewhere.")
    return int(match[1])


def figures(
    dictionary: Dictionary, store: Store, model: str, site: Site, config: Config
) -> tuple[dict, dict]:
    """Returns a dictionary's (columns, histograms) from the stored rows.

    fvu = sum ||x - x_hat||^2 / sum ||x - m||^2 of test rows, m the training mean; dead features are
    active in no row of training and test together.
    """
    output = store.output_of(model, site)
    mean, rows = train_mean(store, *output), {s: store.select(s) for s in ("train", "test")}
    in_train, in_test = (
        measure(
            dictionary,
            store.read(model, site, numbers),
            y=store.read(*output, numbers) if dictionary.transcodes else None,
            mean=mean,
            size=config.evaluation.batch_size,
        )
        for numbers in rows.values()
    )
    documents, count = store.rows.document[rows["test"]], config.evaluation.bootstrap
    draws = stats.draw(documents, count=count, seed=config.seed)
    fires, n = in_train["fires"] + in_test["fires"], sum(map(len, rows.values()))
    frequencies = np.log10(fires[fires > 0] / n)
    cosines = nearest_cosines(dictionary.W_dec[...])
    columns = {
        "width": dictionary.width,
        "n_rows": len(rows["test"]),
        "n_documents": draws.n_documents,
        **stats.columns("l0", draws.mean(in_test["l0"])),
        **stats.columns("fvu", draws.estimate(in_test["error"], in_test["variance"])),
        "dead_fraction": float(np.mean(fires == 0)),
    }
    histograms = {}
    for name, values, edges in (
        ("log10_frequency_histogram", frequencies, FREQUENCY_EDGES),
        ("decoder_cosine_histogram", cosines, COSINE_EDGES),
    ):  # the first and last bin hold what lies beyond
        counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
        histograms[name] = {"edges": edges.tolist(), "counts": counts.tolist()}
    return columns, histograms


def nearest_cosines(W_dec: np.ndarray, *, block: int = 1024) -> np.ndarray:
    """Returns the cosine [width] of every row of W_dec [width, d_model] to the row most like it.

    0 for a row of zeros; empty for width 1.
    """
    W = np.asarray(W_dec, np.float32)
    if len(W) < 2:
        return np.zeros(0, np.float32)
    unit, nearest = stats.normalised(W), []
    for rows in slices(len(unit), block):
        cosines = np.array(exact(unit[rows], unit.T))
        cosines[np.arange(len(cosines)), np.arange(len(unit))[rows]] = -np.inf  # themselves
        nearest.append(cosines.max(axis=1))
    return np.concatenate(nearest)


def measure(
    dictionary: Dictionary,
    x: np.ndarray,
    *,
    mean: np.ndarray,
    size: int,
    y: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Returns a dictionary's numbers on rows x [n, d_model], ``size`` rows at a time.

    l0, error = ||x - x_hat||^2, variance = ||x - mean||^2: [n]; fires [width]: active rows. For a
    transcoder y [n, d_out] is the x of the formulas.
    """
    graphdef, params = modules.split(dictionary)
    parts, fires = [], 0
    for rows in slices(len(x), size):
        count = rows.stop - rows.start
        both = [None if a is None else padded(a[rows], size) for a in (x, y)]
        active, *values = measure_batch(graphdef, params, *both, mean, count)
        fires = fires + np.asarray(active, np.int64)
        parts.append([np.asarray(v)[:count] for v in values])
    return dict(zip(("l0", "error", "variance"), map(np.concatenate, zip(*parts))), fires=fires)


@partial(jax.jit, static_argnums=0)
def measure_batch(graphdef, params, x, y, mean, count):
    """Returns how often each feature fires in ``count`` rows; per row l0, error, variance."""
    dictionary, x = modules.merge(graphdef, params), x.astype(jnp.float32)
    f = dictionary.encode(x)  # [batch, width]
    x = x if y is None else y.astype(jnp.float32)
    active, real = f > 0, (jnp.arange(len(x)) < count)[:, None]
    error, variance = (
        jnp.sum(jnp.square(x - other), axis=1) for other in (dictionary.decode(f), mean[None, :])
    )
    return jnp.sum(active & real, axis=0), jnp.sum(active, axis=1), error, variance


def _losses(
    members: list[Dictionary],
    runner: Runner,
    passages: Passages,
    store: Store,
    model: str,
    site: Site,
    config: Config,
) -> list[dict]:
    """The loss columns of each dictionary, all from one clean pass."""
    output = store.output_of(model, site)
    x, mean = store.read(model, site, passages.rows), train_mean(store, *output)
    replacements = {"zero": np.zeros_like(mean), "mean": mean}
    size, count = config.evaluation.batch_size, config.evaluation.bootstrap
    for i, dictionary in enumerate(members):
        replacements[i] = modules.over_rows(dictionary, x, method="__call__", size=size)
    effects = runner.splice(passages, output[1], replacements)
    draws = stats.draw(passages.document[passages.scored], count=count, seed=config.seed)
    rows = []
    for i in range(len(members)):
        sae, row = effects[i], {"n_positions": len(effects[i].ce)}
        for name, of in (("clean", "clean"), ("zero", "zero"), ("mean", "mean"), ("sae", i)):
            row |= stats.columns(f"ce_{name}", draws.mean(effects[of].ce))
        row |= stats.columns("kl_sae", draws.mean(sae.kl))
        for suffix, name in (("", "zero"), ("_mean", "mean")):
            baseline, undefined = effects[name], draws.mean(effects[name].kl).value < MIN_KL
            share = None if undefined else 1 - draws.estimate(sae.kl, baseline.kl)
            row |= stats.columns(f"kl_recovered{suffix}", share)
            ce = {"clean": effects["clean"].ce, "baseline": baseline.ce}
            recovered = stats.loss_recovered(sae.ce, **ce, resamples=draws)
            row |= stats.columns(f"loss_recovered{suffix}", recovered)
        rows.append(row)
    return rows
