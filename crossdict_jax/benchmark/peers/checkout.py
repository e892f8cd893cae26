"""The same work in another checkout of this project, which CROSSDICT_BASELINE names."""

import importlib
import subprocess
from pathlib import Path

import numpy as np

import crossdict_jax
from crossdict_jax import models
from crossdict_jax.activations import store


def make(workload: str, folder: str, **settings):
    try:
        workloads = importlib.import_module("crossdict_jax.benchmark.workloads")
    except ImportError:
        run = EARLIER[workload](Path(folder), **settings)
    else:
        run = getattr(workloads, workload)(Path(folder), **settings).run
    root = str(Path(crossdict_jax.__file__).parent)
    command = ["git", "-C", root, "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return run, {"version": commit or "unknown"}


# ---------------------------------------------------------------- before there were workloads


def dictionary_steps(folder: Path, **sae):
    steps = importlib.import_module("crossdict_jax.benchmark.steps")
    config = steps.SAEConfig(steps=steps.MANY, **sae)
    return steps.dictionary_steps(config, store.open_store(folder)).run


def map_steps(folder: Path, *, hidden: int, batch_size: int, seed: int, **shape):
    maps = importlib.import_module("crossdict_jax.benchmark.map")
    pairs = maps._pairs(maps.MapBenchmark(hidden=hidden, batch_size=batch_size, **shape), seed)
    config = maps.MapConfig(hidden=hidden, dropout=0.1, batch_size=batch_size, steps=maps.MANY)
    config.validate_every = maps.MANY
    ensemble = maps.Ensemble(maps.MLP, [maps.Problem("made-up", pairs, pairs)], config, seed=0)
    return maps.Steps(ensemble.trainable(), ensemble.feed(), ensemble.by_member).run


def extraction(folder: Path, *, layers: list[int], **settings):
    reading = importlib.import_module("crossdict_jax.benchmark.extraction")
    sites = [models.Site(layer) for layer in layers]
    lm, config = models.load(folder / "model"), reading.ExtractConfig(**settings)
    reader = reading.Reader(config, lm, sites, None)
    with np.load(folder / "windows.npz", allow_pickle=False) as file:
        windows = np.split(file["tokens"].astype(np.int32), np.cumsum(file["lengths"])[:-1])
    return lambda count: [reading._read(reader, windows) for _ in range(count)]


EARLIER = {"dictionary_steps": dictionary_steps, "map_steps": map_steps, "Extraction": extraction}
