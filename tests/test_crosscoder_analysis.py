"""The analysis of crosscoders: Latent Scaling against its slow formula, planted owners, nulls."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossdict_jax.config import Config, EvaluationConfig
from crossdict_jax.dictionaries import crosscoder
from crossdict_jax.evaluation import crosscoder as analysis

DOCUMENTS = np.repeat(np.arange(30), 20)
SHARED, ONLY_A, ONLY_B = range(4), range(4, 7), range(7, 10)


def planted(*, hide=(), seed=0):
    """A crosscoder whose code is the truth, and rows of two models that it explains."""
    # Latents 0-3 are in both models, 4-6 in the first, 7-9 in the second. What ``hide`` names is
    # exclusive to the first model by its decoder alone: the second shows it too.
    rng = np.random.default_rng(seed)
    n, width, d_models = len(DOCUMENTS), 10, (12, 11)
    codes = (rng.random((n, width)) < 0.2) * rng.uniform(0.5, 1.5, (n, width))
    shows = [np.linalg.qr(rng.standard_normal((d, width)))[0].T for d in d_models]
    seen = np.ones((2, width), bool)
    seen[1, list(ONLY_A)] = seen[0, list(ONLY_B)] = False
    decoders = [show * s[:, None] for show, s in zip(shows, seen)]
    seen[1, list(hide)] = True
    noise = [0.1 * rng.standard_normal((n, d)) for d in d_models]
    x = [codes @ (show * s[:, None]) + e for show, s, e in zip(shows, seen, noise)]
    shape = {"d_models": d_models, "width": width, "k": 0, "shared_fraction": 1.0}
    c = crosscoder.Crosscoder("l1", **shape, key=jax.random.key(0))
    c.W_dec[...] = jnp.asarray(np.concatenate(decoders, axis=1), jnp.float32)
    # Least squares gives the codes back; what is a little below zero is cut.
    W_enc = np.linalg.lstsq(np.concatenate(x, axis=1), codes, rcond=None)[0]
    c.W_enc[...] = jnp.asarray(W_enc, jnp.float32)
    return c, [rows.astype(np.float32) for rows in x]


def by_hand(c, x, *, alone, shift=0):
    """Latent Scaling as it is defined: latent after latent, model after model, in float64."""
    f = np.asarray(c.encode(x), np.float64)
    moved, shares = np.roll(f, shift, axis=0), np.zeros((len(x), c.width))
    for m, x_hat in enumerate(c.decode(f)):
        scale = float(c.scale[...][m])
        error = scale * (np.asarray(x[m], np.float64) - np.asarray(x_hat, np.float64))
        W = np.asarray(c.W_dec[...], np.float64)[:, c.part(m)]
        for j in range(c.width):
            y = error + alone * f[:, j : j + 1] * W[j : j + 1]
            y = y - y.mean(axis=0)
            d = y.T @ moved[:, j] / (moved[:, j] @ moved[:, j])
            shares[m, j] = (d @ d) * (moved[:, j] @ moved[:, j]) / np.square(y).sum()
    return shares


def test_latent_scaling_and_its_null_are_their_definition(monkeypatch):
    c, x = planted(hide=(4,))
    c.scale[...] = jnp.asarray([0.5, 2.0])
    c.W_dec[...] = 0.8 * c.W_dec[...]
    scaling = analysis.latent_scaling(c, x, DOCUMENTS, seed=0)
    np.testing.assert_allclose(scaling.error, by_hand(c, x, alone=False), atol=1e-4)
    np.testing.assert_allclose(scaling.alone, by_hand(c, x, alone=True), atol=1e-4)
    monkeypatch.setattr(analysis, "SHIFTS", 2)
    scaling = analysis.latent_scaling(c, x, DOCUMENTS, seed=3)
    shifts = analysis.admissible_shifts(DOCUMENTS, seed=3)
    errors, alones = (scaling.error, scaling.error_above), (scaling.alone, scaling.alone_above)
    for (value, above), alone in ((errors, False), (alones, True)):
        nulls = [by_hand(c, x, alone=alone, shift=int(shift)) for shift in shifts]
        sure = abs(value - np.max(nulls, axis=0)) > 1e-4
        assert (above == (value > np.max(nulls, axis=0)))[sure].all() and sure.mean() > 0.9


def test_planted_owners_are_confirmed_and_a_hidden_one_is_refuted():
    c, x = planted(hide=(4, 5))
    scaling = analysis.latent_scaling(c, x, DOCUMENTS, seed=0)
    first, second = (analysis.ownership(c, m, np.ones(10, bool), scaling) for m in (0, 1))
    assert first["shared"] == second["shared"] == pytest.approx(0.4)
    assert first["exclusive"] == second["exclusive"] == pytest.approx(0.3)
    assert first["shared_confirmed"] == 1.0
    assert first["exclusive_refuted"] == pytest.approx(2 / 3)  # what is hidden, no more
    assert second["exclusive_refuted"] == 0.0
    assert first["exclusive_missed"] == pytest.approx(2 / 3)
    assert second["exclusive_missed"] < 2 / 3 and sum(first["relative_norms"]["counts"]) == 10
    assert first["relative_norms"]["counts"][-1] == 3 and first["relative_norms"]["counts"][0] == 3


def test_the_null_is_exceeded_as_rarely_as_it_says():
    """Of latents that have nothing to do with the errors, one in twenty exceeds every shift."""
    above = []
    for seed in range(12):
        c, x = planted(seed=seed)
        # Half of the code's input is another model's noise, of which nothing is reconstructed.
        d, rng = x[0].shape[1], np.random.default_rng(100 + seed)
        c.W_enc[...] = jnp.concatenate([2 * c.W_enc[...][:d], 0 * c.W_enc[...][d:]])
        c.W_dec[...] = 0 * c.W_dec[...]
        x = [x[0], rng.standard_normal(x[1].shape).astype(np.float32)]
        above.append(analysis.latent_scaling(c, x, DOCUMENTS, seed=seed).error_above[1])
    assert 0.01 < np.mean(above) < 0.12  # 120 draws at 0.05


def test_shifts_are_longer_than_any_document():
    shifts = analysis.admissible_shifts(DOCUMENTS, seed=3)
    none = analysis.admissible_shifts(0 * DOCUMENTS, seed=0)
    assert len(shifts) == analysis.SHIFTS and not len(none)
    assert shifts.min() >= 20 and shifts.max() <= len(DOCUMENTS) - 20


def test_figures_are_sums_over_the_whole_split():
    c, x = planted()
    c.center[...] = jnp.asarray(np.concatenate([rows.mean(0) for rows in x]))
    c.b_enc[...] = c.center[...] @ c.W_enc[...]  # as without a centre
    config = Config(evaluation=EvaluationConfig(bootstrap=20, batch_size=128))
    rows = analysis.figures(c, x, DOCUMENTS, config)
    for m, row in enumerate(rows):
        json.dumps(row, allow_nan=False)
        alone = [rows_ if i == m else None for i, rows_ in enumerate(x)]
        others = [None if i == m else rows_ for i, rows_ in enumerate(x)]
        for name, given in (("fvu", x), ("fvu_alone", alone), ("fvu_from_others", others)):
            error = np.square(x[m] - np.asarray(c(given)[m])).sum()
            fvu = error / np.square(x[m] - x[m].mean(0)).sum()
            assert row[name] == pytest.approx(fvu, rel=1e-4)
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        f = np.asarray(c.encode(x))
        assert row["l0"] == pytest.approx((f > 0).sum(1).mean())
        assert row["n_live"] == (f > 0).any(0).sum()
