"""Generation: what the cache gives is what the whole text gives, and draws are what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_causal_transfer import SHAPE as LLAMA
from test_models import GOLDENS, REAL
from tiny_run import DATA, SHAPES, needs_data

from crossdict_jax import models
from crossdict_jax.models import Site, run
from crossdict_jax.models.run import Runner, Starts

FAMILIES = {"gpt2": SHAPES["a"], "gpt_neox": SHAPES["b"], "llama": LLAMA}
LENGTHS = (5, 2, 7, 1, 3)


def starts(d_model: int, *, scale: float = 3.0) -> Starts:
    """Five prompts of different length with a vector each, added from the last token on."""
    rng = np.random.default_rng(0)
    n = len(LENGTHS)
    tokens = rng.integers(0, 30, (n, max(LENGTHS))).astype(np.int32)
    vector = (scale * rng.normal(size=(n, d_model))).astype(np.float32)
    prompt, sample = np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    return Starts(tokens, np.array(LENGTHS, np.int32), vector, prompt, sample)


def without_cache(lm, site, s: Starts, count: int) -> np.ndarray:
    """The likeliest tokens, the whole text read again for every one of them."""
    row = np.arange(len(s.length))
    tokens = np.pad(s.tokens, ((0, 0), (0, count)))
    added = np.arange(tokens.shape[1])[None, :] >= s.length[:, None] - 1
    vector = added[..., None] * s.vector[:, None, :]

    @jax.jit
    def likeliest(tokens):
        logits = lm.logits(tokens, tap=lambda at, y: y + vector if at == site else y)
        return jnp.argmax(logits, axis=-1)

    for i in range(count):  # what stands behind a position is not seen from it
        tokens[row, s.length + i] = np.asarray(likeliest(tokens))[row, s.length + i - 1]
    return np.stack([tokens[row, s.length + i] for i in range(count)], axis=1)


def greedy(lm, site, s: Starts, count: int, batch_size: int = 8) -> np.ndarray:
    runner = Runner(lm, batch_size=batch_size)
    return runner.generate(s, site, count=count, temperature=0.0, top_p=1.0, seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_changes_nothing(family):
    """Token for token, with the edit on."""
    lm, site = models.init(FAMILIES[family], seed=1), Site(1)
    s = starts(lm.config.d_model)
    found = greedy(lm, site, s, 6)
    np.testing.assert_array_equal(found, without_cache(lm, site, s, 6))
    plain = without_cache(lm, site, s._replace(vector=0 * s.vector), 6)
    assert (found != plain).any(axis=1).sum() >= 4


def test_a_text_depends_on_its_own_row_alone():
    lm = models.init(FAMILIES["gpt2"], seed=2)
    s, drawn = starts(lm.config.d_model), {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    together, alone = (Runner(lm, batch_size=size) for size in (8, 1))

    def write(runner, s, **changes):
        return runner.generate(s, Site(1), count=8, **drawn | changes)

    expected, order = write(together, s), np.array([3, 1, 4, 0, 2])
    np.testing.assert_array_equal(write(alone, Starts(*(a[order] for a in s))), expected[order])
    np.testing.assert_array_equal(write(together, s), expected)
    for changed in ({"seed": 4}, {"temperature": 3.0}, {"top_p": 0.3}):
        assert (write(together, s, **changed) != expected).any()
    other_sample = write(together, s._replace(sample=s.sample + 1))
    assert (other_sample != expected).any(axis=1).all()


def test_draws_follow_the_probabilities_and_the_nucleus():
    p = np.array([0.5, 0.3, 0.15, 0.05], np.float32)
    logits = jnp.tile(jnp.log(p)[None], (20_000, 1))
    keys = jax.random.split(jax.random.key(0), 20_000)

    def shares(temperature, top_p):
        drawn = run.draw(logits, keys, jnp.float32(temperature), jnp.float32(top_p))
        return np.bincount(np.asarray(drawn), minlength=4) / len(drawn)

    np.testing.assert_allclose(shares(1.0, 1.0), p, atol=0.015)
    np.testing.assert_allclose(shares(1.0, 0.7), [0.625, 0.375, 0, 0], atol=0.015)
    np.testing.assert_allclose(shares(1.0, 0.01), [1, 0, 0, 0])
    np.testing.assert_allclose(shares(0.5, 1.0), p**2 / np.sum(p**2), atol=0.015)
    np.testing.assert_allclose(shares(0.0, 1.0), [1, 0, 0, 0])


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_real_models_write_what_hugging_face_writes(name):
    golden = np.load(GOLDENS / f"greedy-{name}.npz", allow_pickle=False)
    lm = models.load(f"{DATA}/models/{name}")
    prompt, continuation = golden["prompt"], golden["continuation"]
    zero, length = np.zeros(1, np.int32), np.full(1, len(prompt), np.int32)
    s = Starts(prompt[None], length, np.zeros((1, lm.config.d_model), np.float32), zero, zero)
    assert greedy(lm, Site(0), s, len(continuation))[0].tolist() == continuation.tolist()
