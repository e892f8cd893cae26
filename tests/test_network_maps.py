"""The trained maps: heads, gradients of every loss, sparse targets, early stopping, tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import map_problems
import numpy as np
import pytest
from map_problems import CONFIG, ROWS, feature_r2, fit_one, identity_dictionary, inputs_of
from tiny_run import refused

from crossdict_jax import maps, modules
from crossdict_jax.config import MAP_HEADS, LossWeights
from crossdict_jax.maps import losses, network
from crossdict_jax.maps.base import encode_rows, look_up
from crossdict_jax.maps.kinds import mlp, token_mlp
from crossdict_jax.maps.network import dropped, initial

N = sum(ROWS.values())
K = 3


@pytest.fixture(scope="module")
def sparse():
    """B's features are the K strongest of relu(V relu(W f_A)) of 20, and there is noise."""
    rng = np.random.default_rng(0)
    f_a = rng.exponential(size=(N, 24)) * (rng.random((N, 24)) < 0.3)
    hidden = np.maximum(f_a @ rng.normal(size=(24, 16)), 0)
    x_b = hidden @ rng.normal(size=(16, 20)) + 0.3 * rng.normal(size=(N, 20))
    tokens = rng.integers(0, 15, N)
    both = identity_dictionary(24), identity_dictionary(20, kind="topk", k=K)
    return map_problems.make_problem(f_a, x_b, tokens=tokens, dictionaries_ab=both)


def untrained(problem, cls=mlp.MLP, head="relu"):
    source, target = problem.train.source.dictionary, problem.train.target.dictionary
    shape = {"width_a": source.width, "hidden": 16, "width_b": target.width}
    trained = initial(0, **shape, head=head)
    return cls(target, trained | cls.measure(problem)[0], head=head)


@pytest.mark.parametrize("name", MAP_HEADS)
def test_heads_select_as_they_say(name):
    z = np.random.default_rng(0).normal(size=(9, 20)).astype("f4")
    threshold = np.linspace(0.1, 2, 20).astype("f4")
    least = {"relu": 0, "topk": np.sort(z, axis=1)[:, -K - 1][:, None], "jumprelu": threshold}
    f = network.select(name, z, k=K, threshold=threshold)
    np.testing.assert_array_equal(f, np.where(z > least[name], np.maximum(z, 0), 0))


def test_features_that_are_off_can_be_switched_on_and_thresholds_have_their_kernels_gradient():
    z = jnp.array([[-2.0, 0.5]])
    np.testing.assert_array_equal(network.rectified(z), [[0.0, 0.5]])
    gradient = jax.grad(lambda z: jnp.sum((network.rectified(z) - 1.0) ** 2) / 2)(z)
    np.testing.assert_allclose(gradient, [[-1.0, -0.5]])  # relu(z) - t
    z, width = jnp.array([[0.8, 1.2, 1.2, 3.0]]).T, network.BANDWIDTH
    value, gradient = jax.value_and_grad(lambda t: network.gate(z, t).sum())(jnp.array([[1.0]]))
    assert value == 3
    np.testing.assert_allclose(gradient, [[-3 / width]])  # one for each value within the kernel
    up = jax.grad(lambda z: network.gate(z, jnp.array([[1.0]])).sum())(z)
    np.testing.assert_allclose(up, jnp.array([[1, 1, 1, 0]]).T / width)


@pytest.mark.parametrize("head", MAP_HEADS)
def test_every_loss_moves_the_network_under_every_head(head, sparse):
    problem, _ = sparse
    graphdef, params = modules.split(untrained(problem, head=head))
    names = ("network", "threshold") if head == "jumprelu" else ("network",)
    trained = {name: params[name] for name in names}
    kernel = trained["network"]["last"]["kernel"]
    trained["network"]["last"]["kernel"] = jax.random.normal(jax.random.key(1), kernel.shape) / 4
    sides = problem.train.source, problem.train.target
    f_a, f_b = (side.features(slice(0, 64)) for side in sides)

    @jax.jit
    @jax.jacrev
    def gradients(trained):
        m = modules.merge(graphdef, params | trained)
        z = m.estimate(f_a)
        p, fires = network.rectified(z), m.fires(z)
        return losses.transfer_loss(p, f_b, LossWeights(), variance=1.0, fires=fires)[1]

    slopes = gradients(trained)
    for term in ("mse", "cosine", "correlation", "sparsity"):
        live = jax.tree.map(lambda g: float(np.mean(g != 0)), slopes[term]["network"])
        assert min(jax.tree.leaves(live)) > 0.3, term
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(slopes[term]))
        if head == "jumprelu":  # the firing of features alone moves thresholds
            moved = np.mean(slopes[term]["threshold"] != 0)
            assert moved > 0.5 if term == "sparsity" else moved == 0


def test_mlp_starts_as_the_mean_predictor_with_live_gradients(sparse):
    problem, test = sparse
    m, target = untrained(problem), problem.train.target
    mean = target.feature_moments.mean
    predicted = maps.predict(m, test)
    np.testing.assert_allclose(predicted, np.broadcast_to(mean, predicted.shape), atol=1e-4)
    graphdef, params = modules.split(m)
    f_a, f_b = inputs_of(m, test)[:64], test.target.features(slice(0, 64))

    @jax.jit
    @jax.grad
    def gradient(trained):
        m = modules.merge(graphdef, params | {"network": trained})
        p = network.rectified(m.estimate(f_a))
        return losses.transfer_loss(p, f_b, LossWeights(), variance=1.0)[0]

    last = gradient(params["network"])["last"]
    np.testing.assert_array_equal(last["bias"] != 0, mean > 0)  # all that ever fire
    assert np.mean(last["kernel"][:, mean > 0] != 0) > 0.9


def test_dropout_drops_in_training_only(sparse):
    m = untrained(sparse[0])
    m.network.last.kernel[...] = jnp.ones((16, 20))
    f_a = inputs_of(m, sparse[1])[:32]

    def estimate(seed=None):
        key = None if seed is None else jax.random.key(seed)
        return m.estimate(f_a, key=key, dropout=0.3)

    np.testing.assert_array_equal(estimate(0), estimate(0))
    assert not np.array_equal(estimate(0), estimate(1))
    np.testing.assert_array_equal(jax.nn.relu(estimate()), m(f_a))
    h = dropped(jnp.ones((1000, 16)), 0.3, jax.random.key(0))
    assert np.mean(h) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("head", ["topk", "jumprelu"])
def test_heads_reach_the_targets_l0_and_beat_ridge(head, sparse, tmp_path):
    problem, test = sparse
    config = dataclasses.replace(CONFIG, head=head, dropout=0.0, steps=300)
    m = fit_one("mlp", problem, tmp_path, config).map
    active = (maps.predict(m, test) > 0).sum(1).mean()
    target = (encode_rows(test.target.dictionary, test.target.x) > 0).sum(1).mean()
    assert active == pytest.approx(target, rel=0.1)
    score = feature_r2(m, problem, test)
    for linear in ("ridge", "ridge_codes"):
        assert score > feature_r2(fit_one(linear, problem, tmp_path).map, problem, test) + 0.02


@pytest.mark.parametrize(("mse", "head"), [(0.0, "relu"), (1.0, "jumprelu")])
def test_without_mse_a_jumprelu_head_is_trained_as_relu(mse, head, sparse, tmp_path):
    config = dataclasses.replace(CONFIG, head="jumprelu", steps=2)
    config.loss_weights = LossWeights(mse=mse)
    assert fit_one("mlp", sparse[0], tmp_path, config).map.head == head


@pytest.fixture(scope="module")
def tokens_matter():
    """B's features: a part that the token fixes, and relu(left W) V of independent features."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 25, N)
    left = rng.exponential(size=(N, 10)) * (rng.random((N, 10)) < 0.4)
    x_a = np.hstack([left, np.eye(25)[tokens] * 3])
    hidden = np.maximum(left @ rng.normal(size=(10, 12)) - 0.5, 0) @ rng.normal(size=(12, 8))
    x_b = rng.normal(size=(25, 8))[tokens] + 6 + (hidden - hidden.mean(0)) / 2
    both = identity_dictionary(35), identity_dictionary(8)
    return map_problems.make_problem(x_a, x_b, tokens=tokens, dictionaries_ab=both)


def test_token_mlp_beats_what_it_stands_on_and_the_linear_rival(tokens_matter, tmp_path):
    problem, test = tokens_matter
    config = dataclasses.replace(CONFIG, head="relu", dropout=0.0, steps=300)
    kinds = ("token", "token_ridge", "token_mlp")
    fitted = (fit_one(kind, problem, tmp_path, config) for kind in kinds)
    token, linear, network = (feature_r2(one.map, problem, test) for one in fitted)
    assert network > linear + 0.02 > token


def test_token_mlp_starts_as_the_token_map(tokens_matter, tmp_path):
    problem, test = tokens_matter
    m = untrained(problem, token_mlp.TokenMLP)
    token = fit_one("token", problem, tmp_path)
    ours, theirs = (maps.predict(one, test) for one in (m, token.map))
    np.testing.assert_allclose(ours, np.maximum(theirs, 0), atol=1e-5)
    values, record = token_mlp.TokenMLP.measure(problem)
    assert record == {"pseudocount": token.record["pseudocount"]}
    table = values["table_b"]
    f = encode_rows(problem.train.target.dictionary, problem.train.target.x)
    left = f - table["rows"][np.searchsorted(table["ids"], problem.train.source.tokens)]
    expected = np.sqrt(np.mean(left**2, axis=0) + 0.01 * np.mean(left**2))
    np.testing.assert_allclose(values["scale_b"], expected, rtol=1e-3)


def test_tables_of_unequal_lengths_are_made_equal_and_say_the_same(tokens_matter):
    problem, _ = tokens_matter
    fewer = dataclasses.replace(problem.train.source, tokens=problem.train.source.tokens % 11)
    other = dataclasses.replace(problem, train=dataclasses.replace(problem.train, source=fewer))
    measured = [token_mlp.TokenMLP.measure(p)[0] for p in (problem, other)]
    alike = token_mlp.TokenMLP.alike(measured)
    assert [len(values["table_a"]["ids"]) for values in measured] == [25, 11]
    assert alike[1]["table_a"]["rows"].shape == (26, 35)
    tokens = np.array([0, 10, 11, 99, -1], np.int32)
    d = problem.train.target.dictionary
    tables = [token_mlp.TokenMLP(d, values, head="relu") for values in (measured[1], alike[1])]
    for name in ("table_a", "table_b"):
        short, long = (look_up(getattr(m, name), tokens, 5) for m in tables)
        np.testing.assert_array_equal(short, long)


def test_a_head_that_does_not_fit_the_target_is_refused(tokens_matter, tmp_path):
    message = r"map.head=topk .*that of A to B \(ReLU\) fixes no number; use jump"
    top_k = dataclasses.replace(CONFIG, head="topk")
    refused(message, fit_one, "mlp", tokens_matter[0], tmp_path, top_k)
