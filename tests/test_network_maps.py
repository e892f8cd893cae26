"""The trained rungs: heads, gradients of every loss, sparse targets, early stopping, tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from map_problems import (
    CONFIG,
    ROWS,
    feature_r2,
    fit_one,
    identity_dictionary,
    make_problem,
    random_dictionary,
    shuffled_problem,
)

from crossdict_jax import maps, modules
from crossdict_jax.config import MAP_HEADS, LossWeights
from crossdict_jax.errors import UserError
from crossdict_jax.maps import heads, losses
from crossdict_jax.maps.base import encode_rows
from crossdict_jax.maps.ensemble import Ensemble
from crossdict_jax.maps.kinds import mlp, token_mlp

N = sum(ROWS.values())
K = 3
TERMS = ("mse", "cosine", "correlation", "sparsity")


def top_k_identity(width: int):
    """f = the K largest of relu(x)."""
    graphdef, params = modules.split(random_dictionary("topk", width, width))
    eye = {"W_enc": jnp.eye(width), "W_dec": jnp.eye(width)}
    d = modules.merge(graphdef, params | eye)
    d.k = K
    return d


@pytest.fixture(scope="module")
def sparse():
    """B's features are the K strongest of relu(V relu(W f_A)) of 20, and there is noise."""
    rng = np.random.default_rng(0)
    f_a = rng.exponential(size=(N, 24)) * (rng.random((N, 24)) < 0.3)
    hidden = np.maximum(f_a @ rng.normal(size=(24, 16)), 0)
    x_b = hidden @ rng.normal(size=(16, 20)) + 0.3 * rng.normal(size=(N, 20))
    tokens = rng.integers(0, 15, N)
    both = identity_dictionary(24), top_k_identity(20)
    return make_problem(f_a, x_b, tokens=tokens, dictionaries_ab=both)


@pytest.fixture(scope="module")
def fitted(sparse, tmp_path_factory):
    """head -> the mlp with that head, trained once."""

    @functools.cache
    def with_head(head):
        config = dataclasses.replace(CONFIG, head=head, dropout=0.0, steps=300)
        return fit_one("mlp", sparse[0], tmp_path_factory.mktemp(head), config)

    return with_head


# ----------------------------------------------------------------------------------- heads


def test_settings_know_the_heads():
    assert tuple(heads.HEADS) == MAP_HEADS


@pytest.mark.parametrize("name", MAP_HEADS)
def test_heads_select_as_they_say(name):
    d = top_k_identity(20)
    head, z = heads.build(name, d), np.random.default_rng(0).normal(size=(9, 20)).astype("f4")
    scale = np.linspace(0.1, 2, 20).astype("f4")
    kept = {
        "relu": z > 0,
        "topk": z >= np.sort(z, axis=1)[:, -K][:, None],
        "jumprelu": z > heads.INITIAL_THRESHOLD * scale,
    }[name]
    np.testing.assert_array_equal(head(z, scale), np.where(kept, np.maximum(z, 0), 0))


def test_a_feature_that_is_off_can_be_switched_on():
    z = jnp.array([[-2.0, 0.5]])
    np.testing.assert_array_equal(heads.rectified(z), [[0.0, 0.5]])
    gradient = jax.grad(lambda z: jnp.sum((heads.rectified(z) - 1.0) ** 2) / 2)(z)
    np.testing.assert_allclose(gradient, [[-1.0, -0.5]])  # relu(z) - t


def test_thresholds_get_the_gradient_of_the_kernel():
    z, width = jnp.array([[0.8, 1.2, 1.2, 3.0]]).T, heads.BANDWIDTH
    value, gradient = jax.value_and_grad(lambda t: heads.gate(z, t).sum())(jnp.array([[1.0]]))
    assert value == 3
    np.testing.assert_allclose(gradient, [[-3 / width]])  # one for each value within the kernel
    up = jax.grad(lambda z: heads.gate(z, jnp.array([[1.0]])).sum())(z)
    np.testing.assert_allclose(up, jnp.array([[1, 1, 1, 0]]).T / width)


# ------------------------------------------------------------------------------- gradients


def ensemble(problems, cls=mlp.MLP, **settings) -> Ensemble:
    config = {"dropout": 0.0, "hidden": 16} | settings
    return Ensemble(cls, problems, dataclasses.replace(CONFIG, **config), seed=0)


def one_member(made: Ensemble):
    """Parameters away from their start, what is fixed, and a batch, of the first member."""
    state = made.trainable().init(jax.random.key(0))
    take = functools.partial(jax.tree.map, lambda a: a[0])
    params, fixed = take(state["params"]), take(made.fixed)
    kernel = params["network"]["last"]["kernel"]
    params["network"]["last"]["kernel"] = jax.random.normal(jax.random.key(1), kernel.shape) / 4
    feed = made.feed()
    rows = jax.tree.map(lambda a: a[0, :64], feed.resident["rows"])
    return params, fixed, rows


@pytest.mark.parametrize("head", MAP_HEADS)
def test_every_loss_moves_the_network_under_every_head(head, sparse):
    made = ensemble([sparse[0]], head=head)
    params, fixed, rows = one_member(made)

    @jax.jit
    def gradients(params):
        def terms(params):
            return made._training_loss(params, fixed, rows, jax.random.key(0))[1]

        return jax.jacrev(terms)(params)

    found = gradients(params)
    for term in TERMS:
        live = jax.tree.map(lambda g: float(np.mean(g != 0)), found[term]["network"])
        assert min(jax.tree.leaves(live)) > 0.3, term
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(found[term]))
        if head == "jumprelu":  # the firing of features alone moves thresholds
            moved = np.mean(found[term]["head"]["threshold"] != 0)
            assert moved > 0.5 if term == "sparsity" else moved == 0


def test_the_correlation_of_some_features_is_of_others_each_step(sparse):
    made = ensemble([sparse[0]], correlation_features=8)
    params, fixed, rows = one_member(made)
    loss = jax.jit(lambda key: made._training_loss(params, fixed, rows, key)[1])
    some = [loss(jax.random.key(seed)) for seed in range(12)]
    assert len({float(terms["correlation"]) for terms in some}) == 12
    assert len({float(terms["mse"]) for terms in some}) == 1
    p, t = np.random.default_rng(0).random((2, 30, 20))
    drawn = np.array([4, 17, 2])
    _, terms = losses.transfer_loss(p, t, LossWeights(), variance=1.0, features=drawn)
    expected = losses.correlation(p[:, drawn], t[:, drawn])
    np.testing.assert_allclose(terms["correlation"], expected, rtol=1e-6)


# -------------------------------------------------------------------------- sparse targets


@pytest.mark.parametrize("head", ["topk", "jumprelu"])
def test_heads_reach_the_targets_l0_and_beat_ridge(head, sparse, fitted, tmp_path):
    problem, test = sparse
    m = fitted(head).map
    active = (maps.predict(m, test) > 0).sum(1).mean()
    target = (encode_rows(test.target.dictionary, test.target.x) > 0).sum(1).mean()
    assert active == pytest.approx(target, rel=0.1)
    score = feature_r2(m, problem, test)
    for linear in ("ridge", "ridge_codes"):
        assert score > feature_r2(fit_one(linear, problem, tmp_path).map, problem, test) + 0.02


def test_without_its_head_the_same_network_predicts_more_features(sparse, fitted):
    m, test = fitted("topk").map, sparse[1]
    dense = np.maximum(m.estimate(maps.source_inputs(m, test), tokens=None, key=None), 0)
    selected = maps.predict(m, test)
    assert (dense > 0).sum(1).mean() > 1.1 * (selected > 0).sum(1).mean()
    np.testing.assert_allclose(selected[selected > 0], dense[selected > 0], rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- early stopping


def steps_of(made: Ensemble, count: int) -> list[dict]:
    """The states after each of the first steps, on the host."""
    trainable, feed = made.trainable(), made.feed()
    state, orders = trainable.init(jax.random.key(0)), feed.indices(0, count)

    @jax.jit
    def step(state, resident, rows, number):
        key = jax.random.fold_in(jax.random.key(0), number)
        return trainable.step(state, feed.select(resident, rows), number, key)[0]

    states = []
    for number in range(count):
        state = step(state, feed.resident, orders[number], number)
        states.append(jax.device_get(state))
    return states


def test_the_best_is_kept_and_patience_ends_one_members_updates(sparse):
    """On pairs that teach nothing a fast learner gets worse; the other member goes on."""
    problems = [shuffled_problem(sparse[0]), sparse[0]]
    settings = {"validate_every": 3, "patience": 2, "steps": 200, "learning_rate": 0.03}
    states = steps_of(ensemble(problems, **settings), 40)
    kernels = np.array([s["params"]["network"]["second"]["kernel"] for s in states])
    looks = range(0, 40, 3)
    scores = np.array([states[i]["train"]["best"]["latest"] for i in looks])
    best = states[-1]["train"]["best"]
    assert best["stale"][0] == 2 and best["stale"][1] < 2
    last = int(np.argmin(scores[:, 0]))
    assert best["step"][0] == looks[last]
    assert best["score"][0] == scores[last, 0]
    np.testing.assert_array_equal(
        best["params"]["network"]["second"]["kernel"][0], kernels[best["step"][0], 0]
    )
    stop = looks[last + 2]
    assert stop < 36
    np.testing.assert_array_equal(
        kernels[stop:, 0], np.broadcast_to(kernels[stop, 0], (40 - stop, 16, 16))
    )
    assert all((kernels[1:, 1] != kernels[:-1, 1]).any((1, 2)))
    assert all((kernels[1 : stop + 1, 0] != kernels[:stop, 0]).any((1, 2)))


def test_the_record_says_when_and_how_good(sparse, fitted):
    record = fitted("jumprelu").record
    assert 1 <= record["steps"] <= 300
    assert record["stopped"] is False
    weights = dataclasses.asdict(LossWeights())
    terms = record["validation"]
    total = sum(weights[n] * terms["nmse" if n == "mse" else n] for n in weights)
    assert terms["loss"] == pytest.approx(total, rel=1e-5)


# ------------------------------------------------------------------------------ token_mlp


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
    return make_problem(x_a, x_b, tokens=tokens, dictionaries_ab=both)


def test_token_mlp_beats_what_it_stands_on_and_the_linear_rival(tokens_matter, tmp_path):
    problem, test = tokens_matter
    config = dataclasses.replace(CONFIG, head="relu", dropout=0.0, steps=300)
    score = {
        kind: feature_r2(fit_one(kind, problem, tmp_path, config).map, problem, test)
        for kind in ("token", "token_ridge", "token_mlp")
    }
    assert score["token_mlp"] > score["token_ridge"] + 0.02 > score["token"]


def test_token_mlp_starts_as_the_token_rung(tokens_matter, tmp_path):
    problem, test = tokens_matter
    made = ensemble([problem], token_mlp.TokenMLP, head="relu", token_pseudocounts=(4.0,))
    state = made.trainable().init(jax.random.key(0))
    own = jax.tree.map(lambda a: a[0], state["params"]) | made.standards[0].values
    m = made._map(made.standards[0])
    m = maps.base.build(type(m), problem.train.target.dictionary, m.arguments, own)
    config = dataclasses.replace(CONFIG, token_pseudocounts=(4.0,))
    token = fit_one("token", problem, tmp_path, config).map
    ours, theirs = (maps.predict(rung, test) for rung in (m, token))
    np.testing.assert_allclose(ours, np.maximum(theirs, 0), atol=1e-5)
    tables = made.standards[0].values
    left = encode_rows(problem.train.target.dictionary, problem.train.target.x)
    left = (
        left
        - tables["table_b"]["rows"][
            np.searchsorted(tables["table_b"]["ids"], problem.train.source.tokens)
        ]
    )
    expected = np.sqrt(np.mean(left**2, axis=0) + 0.01 * np.mean(left**2))
    np.testing.assert_allclose(tables["scale_b"], expected, rtol=1e-3)


def test_tables_of_unequal_lengths_train_together_unchanged(tokens_matter):
    problem, _ = tokens_matter
    fewer = dataclasses.replace(problem.train.source, tokens=problem.train.source.tokens % 11)
    other = dataclasses.replace(problem, train=dataclasses.replace(problem.train, source=fewer))
    made = ensemble([problem, other], token_mlp.TokenMLP)
    assert [s.arguments["seen"] for s in made.standards] == [25, 11]
    padded = made.alike[1].values
    assert padded["table_a"]["rows"].shape == (26, 35)
    tokens = np.array([0, 10, 11, 99, -1], np.int32)
    for name, size in (("table_a", 35), ("table_b", 8)):
        short, long = (maps.base.TokenTable(seen, size) for seen in (11, 25))
        for table, values in ((short, made.standards[1].values), (long, padded)):
            table.ids[...], table.rows[...] = values[name]["ids"], values[name]["rows"]
        np.testing.assert_array_equal(short(tokens, 5), long(tokens, 5))


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"head": "softmax"}, "map.head=softmax is no head; use relu, topk, jumprelu"),
        ({"head": "topk"}, r"map.head=topk .*that of A to B \(ReLU\) fixes no number; use jump"),
        ({"correlation_features": 9}, "map.correlation_features=9 is more than the 8 features"),
    ],
)
def test_settings_that_do_not_fit_the_target_are_refused(
    tokens_matter, tmp_path, settings, message
):
    with pytest.raises(UserError, match=message):
        fit_one("mlp", tokens_matter[0], tmp_path, dataclasses.replace(CONFIG, **settings))
