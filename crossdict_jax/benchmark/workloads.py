"""The work that is timed, as the stages do it: training steps, and reading a language model.

Each is prepared in a folder; ``run(count)`` repeats it. ``peers/checkout.py`` asks another checkout
for the same by name.
"""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from crossdict_jax import models
from crossdict_jax.activations.store import Store, open_store, write_store
from crossdict_jax.config import MapConfig, SAEConfig
from crossdict_jax.dictionaries.base import build
from crossdict_jax.dictionaries.train import members, prepare
from crossdict_jax.maps.base import Pairs, Problem, Side
from crossdict_jax.maps.kinds.mlp import MLP
from crossdict_jax.maps.network import prepare as prepare_maps
from crossdict_jax.models import Site
from crossdict_jax.models.run import Passages, Runner
from crossdict_jax.training.ensemble import Ensemble
from crossdict_jax.training.loop import MAX_CHUNK, Chunks, initial

MODEL, SITE = "made-up", Site(0)
DIRECTIONS, SHARE, NOISE = 512, 0.05, 0.1  # of made-up rows: how many, how often active, noise
PART = 2**14  # rows that are made at a time
LONG = 1_000_000  # steps of the schedules: none ends while it is timed
BATCHES = 8  # of training rows of a map


class Training:
    """A training that stands still between runs of at most ``longest`` steps: the loop's code."""

    def __init__(self, ensemble: Ensemble, *, longest: int = MAX_CHUNK):
        self._chunks = Chunks(ensemble, jax.random.key(0), steps=LONG, limit=longest)
        self.state = jax.block_until_ready(initial(ensemble, jax.random.key(0)))
        self._done = 0

    def run(self, count: int) -> None:
        """Takes ``count`` steps."""
        self.state, metrics = self._chunks(self.state, self._done, count)
        self._done += count
        jax.block_until_ready((self.state, metrics))


def dictionary_steps(
    folder: Path, *, resident: bool | None = None, longest: int = MAX_CHUNK, **sae
) -> Training:
    """Returns the training of dictionaries on the store in ``folder``, as one ensemble.

    ``resident``: whether rows stay on the devices; None: if they fit.
    """
    config, store = SAEConfig(steps=LONG, **sae), open_store(folder)
    group = members(config, [(MODEL, SITE)])
    ensemble = prepare(config, store, group, store.select("train"), resident=resident)
    return Training(ensemble, longest=longest)


def map_steps(
    folder: Path, *, d_model: int, width: int, k: int, hidden: int, batch_size: int, seed: int
) -> Training:
    """Returns the training of an ``mlp`` map between made-up rows with random dictionaries."""
    n, sides = BATCHES * batch_size, []
    for key in (seed, seed + 1):
        dictionary = build("topk", d_model=d_model, width=width, k=k, key=jax.random.key(key))
        x = made_up_rows(n, d_model, seed=key)
        sides.append(Side(x, np.zeros(n, np.int32), dictionary))
    pairs = Pairs(*sides, np.zeros(n, np.int32))
    config = MapConfig(hidden=hidden, dropout=0.1, batch_size=batch_size, steps=LONG)
    ensemble, _ = prepare_maps(MLP, [Problem("made-up", pairs, pairs)], config, seed=0)
    ensemble.objective.validate_every = LONG  # validation is not timed
    return Training(ensemble)


class Extraction:
    """Layers of the language model in ``folder``/model, read of the windows in windows.npz."""

    def __init__(self, folder: Path, *, layers: list[int], batch_size: int, matmul_dtype: str):
        lm = models.load(folder / "model")
        self._runner = Runner(lm, batch_size=batch_size, dtype=matmul_dtype)
        self._sites = [Site(layer) for layer in layers]
        with np.load(folder / "windows.npz", allow_pickle=False) as file:
            lengths, tokens = file["lengths"], file["tokens"].astype(np.int32)
        windows = np.split(tokens, np.cumsum(lengths)[:-1])
        position = np.concatenate([np.arange(n) for n in lengths])
        self._passages = Passages(windows, np.repeat(np.arange(len(windows)), lengths), position)

    def run(self, count: int) -> None:
        """Reads all windows ``count`` times."""
        for _ in range(count):
            for _ in self._runner.stream(self._passages, self._sites):
                pass


def made_up_rows(n: int, d_model: int, *, seed: int) -> np.ndarray:
    """Returns bfloat16 rows [n, d_model]: sparse sums of about 26 of 512 directions."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(DIRECTIONS, d_model)).astype(np.float32) / d_model**0.5
    parts = []
    for start in range(0, n, PART):
        size = min(PART, n - start)
        active = rng.random((size, DIRECTIONS), np.float32) < SHARE
        codes = active * rng.standard_exponential((size, DIRECTIONS), np.float32)
        noise = NOISE * rng.standard_normal((size, d_model), np.float32)
        parts.append((codes @ directions + noise).astype(ml_dtypes.bfloat16))
    return np.concatenate(parts)


def made_up_store(folder: Path, n: int, d_model: int, *, seed: int) -> Store:
    """Writes n training rows of one model and site as a store, and opens it."""
    x, zeros = {MODEL: made_up_rows(n, d_model, seed=seed)}, np.zeros(n, np.int32)
    about = {"document": zeros, "tokens": (zeros,), "split": zeros.astype(np.int8)}
    return write_store(folder, x, site=SITE, **about)
