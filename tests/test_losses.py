"""The four losses: exact values, live gradients, and the Gram form against the direct one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossdict_jax.config import LossWeights
from crossdict_jax.maps import losses

TERMS = (losses.mse, losses.cosine, losses.correlation, losses.sparsity)


def features(seed: int, *, batch: int = 24, width: int = 17, rate: float = 0.3) -> np.ndarray:
    """Sparse non-negative features; the first column is constant, the second silent."""
    rng = np.random.default_rng(seed)
    f = rng.exponential(size=(batch, width)) * (rng.random((batch, width)) < rate)
    f[:, 0], f[:, 1] = 0.1, 0.0
    return f.astype(np.float32)


def direct_correlation(p, t):
    """The width x width form, which the loss must equal without building it."""

    def corr(x):
        centred = x - x.mean(0, keepdims=True)
        square = jnp.sum(centred**2, 0)
        live = square > 1e-9
        Z = jnp.where(live, 1 / jnp.sqrt(jnp.where(live, square, 1.0)), 0.0)[None, :] * centred
        return Z.T @ Z

    return jnp.mean(jnp.square(corr(p) - corr(t)))


GRADIENT = {term: jax.jit(jax.value_and_grad(term)) for term in (*TERMS, direct_correlation)}


def test_mse_and_cosine_are_their_formulas():
    p, t = features(0), features(1)
    np.testing.assert_allclose(losses.mse(p, t), np.mean((p - t) ** 2), rtol=1e-6)
    terms = losses.transfer_loss(p, t, LossWeights(), variance=4.0)[1]
    np.testing.assert_allclose(terms["nmse"], np.mean((p - t) ** 2) / 4, rtol=1e-6)
    cosines = np.sum(p * t, 1) / (np.linalg.norm(p, axis=1) * np.linalg.norm(t, axis=1))
    np.testing.assert_allclose(losses.cosine(p, t), 1 - cosines.mean(), rtol=1e-5)
    silent = np.array([[1.0, 2.0], [0.0, 0.0]], np.float32)  # cosines with nothing: 0 and 1
    assert float(losses.cosine(np.zeros_like(silent), silent)) == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(24, 17), (8, 40)])
def test_correlation_through_gram_matrices_equals_the_direct_form(shape):
    p, t = (features(i, batch=shape[0], width=shape[1]) for i in (0, 1))
    value, gradient = GRADIENT[losses.correlation](p, t)
    direct, direct_gradient = GRADIENT[direct_correlation](p, t)
    np.testing.assert_allclose(value, direct, rtol=2e-5)
    np.testing.assert_allclose(gradient, direct_gradient, atol=2e-5 * np.abs(direct_gradient).max())


@pytest.mark.parametrize("constant", [0.0, 0.1, 1000.1])
def test_constant_columns_correlate_with_nothing(constant):
    t = features(0)[:, 2:]
    column = np.full((len(t), 1), constant, np.float32)
    with_constant = losses.correlation(np.hstack([t, column]), np.hstack([t, t[:, :1]]))
    # Against a copy of feature 0, that feature's whole row and column of correlations are missed.
    corr = np.corrcoef(np.hstack([t, t[:, :1]]).T)
    missed = 2 * np.sum(corr[-1] ** 2) - corr[-1, -1] ** 2
    np.testing.assert_allclose(with_constant, missed / corr.size, rtol=1e-4)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.__name__)
def test_every_term_is_zero_at_the_target_and_has_a_gradient_elsewhere(term):
    p, t = features(0), features(1)
    assert float(term(t, t)) == pytest.approx(0.0, abs=1e-6)
    value, gradient = GRADIENT[term](p, t)
    assert float(value) > 1e-3 and np.isfinite(gradient).all()
    live = p > 0
    live[:, 0] &= term is not losses.correlation  # a constant column correlates with nothing
    share = np.mean(np.abs(gradient)[live] > 1e-12)
    assert share > 0.2  # firing saturates, so that sparsity pulls on part of the values only


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.__name__)
@pytest.mark.parametrize("fires", [(0, 1), (1, 0), (0, 0)])
def test_gradients_stay_finite_where_nothing_fires(term, fires):
    p, t = (n * features(i) for i, n in enumerate(fires))
    value, gradient = GRADIENT[term](p, t)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_sparsity_pulls_firing_towards_the_target():
    t = features(1, rate=0.3)
    weak = 0.05 * t[t > 0].mean()
    too_dense, too_sparse = np.where(t == 0, weak, t), np.where(t > 0, weak, 0)
    _, gradient_down = GRADIENT[losses.sparsity](too_dense, t)
    _, gradient_up = GRADIENT[losses.sparsity](too_sparse, t)
    assert (gradient_down[t == 0] > 0).all()  # descent switches them off
    assert (gradient_up[t > 0] < 0).all()  # descent switches them on


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(LossWeights)])
def test_each_weight_scales_its_own_term(name):
    p, t = features(0), features(1)
    only = LossWeights(**{f.name: 0.0 for f in dataclasses.fields(LossWeights)} | {name: 3.0})
    loss, terms = losses.transfer_loss(p, t, only, variance=2.0)
    term = terms["nmse" if name == "mse" else name]
    np.testing.assert_allclose(loss, 3.0 * term, rtol=1e-6)
    assert float(loss) > 0
    np.testing.assert_allclose(terms["nmse"], terms["mse"] / 2, rtol=1e-6)
