"""Problems with planted answers for the tests of maps, and scores of what is fitted on them."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from crossdict_jax import maps, modules
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import HypernetworkConfig, MapConfig
from crossdict_jax.dictionaries.base import build as build_dictionary
from crossdict_jax.dictionaries.base import find, from_arrays
from crossdict_jax.maps import Pairs, Problem, Side, base
from crossdict_jax.models import Site

ROWS = {"train": 1600, "validation": 300, "test": 400}
CONFIG = MapConfig(hidden=64, steps=200, batch_size=64, learning_rate=1e-2, dropout=0.05)
CONFIG.hypernetwork = HypernetworkConfig(rank=8, steps=60)


class FakeStore:
    """The part of a store that the stages of maps read, in memory: rows of a few codes."""

    def __init__(self, widths, *, counts=(180, 40, 40), layers=(1, 2), codes=None):
        """``widths`` are {model: d_model}; ``counts`` are rows of train, validation and test."""
        rng, n = np.random.default_rng(7), sum(counts)
        self.models = self.paths = tuple(widths)
        self.sites = tuple(map(Site, layers))
        self.split = np.repeat([0, 1, 2], counts)
        places = np.arange(n, dtype=np.int32)
        self.rows = SimpleNamespace(document=places // 10, byte_end=places % 10)
        self._tokens = {model: rng.integers(0, 9, n).astype(np.int32) for model in widths}
        codes = rng.normal(size=(n, 4)) if codes is None else codes
        self.x = {}
        for end in itertools.product(widths, self.sites):
            x = codes @ rng.normal(size=(codes.shape[1], widths[end[0]]))
            self.x[end] = x.astype(ml_dtypes.bfloat16)

    def select(self, split):
        return np.flatnonzero(self.split == SPLITS.index(split))

    def tokens(self, model, rows):
        return self._tokens[model][rows]

    def d_model(self, model):
        return self.x[model, self.sites[0]].shape[1]

    def read(self, model, site, rows):
        return self.x[model, site][rows]


def r2(predicted, target, train_mean) -> float:
    """1 - FVU over all rows."""
    return 1 - np.sum((target - predicted) ** 2) / np.sum((target - train_mean) ** 2)


@functools.cache
def random_dictionary(architecture: str, d_model: int, width: int, seed: int = 0, k: int = 4):
    key = jax.random.key(seed)
    return build_dictionary(architecture, d_model=d_model, width=width, k=k, key=key)


@functools.cache
def identity_dictionary(d_model: int, width: int | None = None, kind: str = "relu", k: int = 4):
    """f = relu(the first ``width`` of x), or the k largest: a test can set them row by row."""
    width = width or d_model
    graphdef, params = modules.split(random_dictionary(kind, d_model, width, k=k))
    eye = {"W_enc": jnp.eye(d_model, width), "W_dec": jnp.eye(width, d_model)}
    return modules.merge(graphdef, params | eye)


def signed_dictionary(d_model: int, order=slice(None)):
    """f = relu([x, -x]) in some order of its features, the signed coordinates."""
    W_dec = np.concatenate([np.eye(d_model), -np.eye(d_model)])[order]
    biases = {"b_enc": np.zeros(2 * d_model), "b_dec": np.zeros(d_model)}
    return from_arrays(find("relu"), {"W_enc": W_dec.T, "W_dec": W_dec} | biases)


def make_problem(x_a, x_b, *, tokens=None, dictionaries_ab=None):
    """Splits rows in order; returns (Problem, test pairs)."""
    n = sum(ROWS.values())
    tokens = np.zeros(n, np.int32) if tokens is None else tokens.astype(np.int32)
    a, b = dictionaries_ab or [identity_dictionary(x.shape[1]) for x in (x_a, x_b)]
    pairs, start = {}, 0
    for split, count in ROWS.items():
        rows = slice(start, start := start + count)
        pairs[split] = Pairs(
            Side(x_a[rows].astype(ml_dtypes.bfloat16), tokens[rows], a),
            Side(x_b[rows].astype(ml_dtypes.bfloat16), tokens[rows], b),
            np.arange(start - count, start, dtype=np.int32) // 20,
        )
    return Problem("A to B", pairs["train"], pairs["validation"]), pairs["test"]


def shuffled_problem(problem: Problem) -> Problem:
    train = maps.shuffled(problem.train, 0, "train")
    validation = maps.shuffled(problem.validation, 0, "validation")
    return Problem(f"{problem.label} (shuffled)", train, validation)


def fit_one(kind: str, problem: Problem, tmp_path, config: MapConfig = CONFIG) -> base.Fitted:
    (fitted,) = maps.map_class(kind).fit([problem], config, seed=0, directory=tmp_path)
    return fitted


def inputs_of(m, pairs: Pairs):
    """What a map reads of A's side, for all rows."""
    source = pairs.source
    inputs = {"tokens": source.tokens, "activations": source.x}.get(m.reads)
    return source.features(slice(None)) if inputs is None else inputs


def activation_r2(m, problem: Problem, test: Pairs) -> float:
    mean = problem.train.target.x.astype(np.float32).mean(0)
    predicted = maps.predict_activations(m, test, batch_size=128)
    return r2(predicted, test.target.x.astype(np.float32), mean)


def feature_r2(m, problem: Problem, test: Pairs, columns=slice(None)) -> float:
    train, held_out = problem.train.target, test.target
    mean = base.encode_rows(train.dictionary, train.x).mean(0)
    target = base.encode_rows(held_out.dictionary, held_out.x)
    predicted = maps.predict(m, test, batch_size=128)
    return r2(predicted[:, columns], target[:, columns], mean[columns])


def rows_like_a_stream(rng, d: int) -> np.ndarray:
    """Correlated rows with unequal scales and a large mean, as residual streams have."""
    n = sum(ROWS.values())
    return rng.normal(size=(n, d)) @ np.diag(np.geomspace(0.3, 3, d)) + 20 * rng.normal(size=d)
