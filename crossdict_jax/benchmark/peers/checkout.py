"""The same work in another checkout of this project, which CROSSDICT_BASELINE names."""

import subprocess
from pathlib import Path

import crossdict_jax


def make(workload: str, folder: str, **settings):
    try:
        from crossdict_jax.benchmark import workloads
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
    from crossdict_jax.activations.store import open_store
    from crossdict_jax.benchmark import steps
    from crossdict_jax.config import SAEConfig

    return steps.dictionary_steps(SAEConfig(steps=steps.MANY, **sae), open_store(folder)).run


def map_steps(folder: Path, *, hidden: int, batch_size: int, seed: int, **shape):
    from crossdict_jax.benchmark import map as maps
    from crossdict_jax.benchmark_config import MapBenchmark

    sizes = MapBenchmark(hidden=hidden, batch_size=batch_size, **shape)
    pairs = maps._pairs(sizes, seed)
    config = maps.MapConfig(hidden=hidden, dropout=0.1, batch_size=batch_size, steps=maps.MANY)
    config.validate_every = maps.MANY
    ensemble = maps.Ensemble(maps.MLP, [maps.Problem("made-up", pairs, pairs)], config, seed=0)
    return maps.Steps(ensemble.trainable(), ensemble.feed(), ensemble.by_member).run


def extraction(folder: Path, *, layers: list[int], batch_size: int, matmul_dtype: str):
    import numpy as np
    from crossdict_jax import models
    from crossdict_jax.activations.extract import Reader
    from crossdict_jax.config import ExtractConfig

    config = ExtractConfig(batch_size=batch_size, matmul_dtype=matmul_dtype)
    sites = [models.Site(layer) for layer in layers]
    reader = Reader(config, models.load(folder / "model"), sites, None)
    with np.load(folder / "windows.npz", allow_pickle=False) as file:
        windows = np.split(file["tokens"].astype(np.int32), np.cumsum(file["lengths"])[:-1])

    def run(count: int) -> None:
        for _ in range(count):
            for _ in reader.read(windows):
                pass

    return run


EARLIER = {"dictionary_steps": dictionary_steps, "map_steps": map_steps, "Extraction": extraction}
