"""The ladder: planted truths found, every rung's contract, exact resume, refused input."""

import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from map_problems import (
    CONFIG,
    ROWS,
    activation_r2,
    feature_r2,
    fit_one,
    identity_dictionary,
    make_problem,
    random_dictionary,
    rows_like_a_stream,
    shuffled_problem,
)

from crossdict_jax import dictionaries, maps, modules
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import Config, LossWeights, MapConfig
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Pairs, Problem, base, ensemble, fit, heads, losses, moments, network
from crossdict_jax.maps.kinds import mlp, token_ridge
from crossdict_jax.models import Site
from crossdict_jax.training import checkpoint, loop
from crossdict_jax.workdir import Workdir, read_json, read_jsonl

# Rungs that need a joint code besides their pairs have a file of their own.
KINDS = [kind for kind in maps.map_kinds() if not base.map_class(kind).through_joint]
TRAINED = [kind for kind in KINDS if base.map_class(kind).fits_together]


# ------------------------------------------------------------------------------ moments


def test_streamed_moments_equal_those_of_the_whole_array():
    rng = np.random.default_rng(0)
    a = (rng.normal(size=(9000, 5)) + 300).astype(np.float32)
    b = (a[:, :3] + rng.normal(size=(9000, 3))).astype(np.float32)
    found = moments.activation_moments(a, b)
    a, b = a.astype(np.float64), b.astype(np.float64)
    ca, cb = a - a.mean(0), b - b.mean(0)
    assert found.n == 9000
    np.testing.assert_allclose(found.centre_a, a.mean(0), rtol=1e-7)
    np.testing.assert_allclose(found.aa, ca.T @ ca, rtol=1e-5, atol=0.05)
    np.testing.assert_allclose(found.ab, ca.T @ cb, rtol=1e-5, atol=0.05)
    np.testing.assert_allclose(found.bb, np.sum(cb**2), rtol=1e-5)


def test_moments_about_other_centres():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 4)), rng.normal(size=(500, 3))
    centre_a, centre_b = rng.normal(size=4), rng.normal(size=3)
    moved = moments.activation_moments(a, b).about(centre_a, centre_b)
    da, db = a - centre_a, b - centre_b
    np.testing.assert_allclose(moved.aa, da.T @ da, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(moved.ab, da.T @ db, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(moved.bb, np.sum(db**2), rtol=1e-5)
    W = rng.normal(size=(4, 3))
    np.testing.assert_allclose(moved.error(W), np.mean((db - da @ W) ** 2), rtol=1e-5)
    back = moved.about(a.mean(0), b.mean(0))
    np.testing.assert_allclose(back.sum_a, 0, atol=1e-3)


def test_one_eigendecomposition_gives_the_direct_ridge_solutions():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 6)) * np.arange(1, 7), rng.normal(size=(40, 3))
    products = moments.Products(n=40, aa=a.T @ a, ab=a.T @ b, bb=float(np.sum(b**2)))
    path = moments.RidgePath(products)
    for penalty in (1e-3, 0.5, 10.0):
        damped = a.T @ a + penalty * np.trace(a.T @ a) / 6 * np.eye(6)
        np.testing.assert_allclose(path.solution(penalty), np.linalg.solve(damped, a.T @ b))


def test_sums_by_token_visit_every_row_once():
    rng = np.random.default_rng(0)
    tokens, rows = rng.zipf(1.5, size=9000) % 40000, rng.normal(size=(9000, 3)).astype(np.float32)
    found = moments.token_sums(tokens, lambda numbers: rows[numbers], size=3)
    assert len(found.ids) == len(np.unique(tokens)) < 1000  # seen tokens only, not a vocabulary
    for place in (0, len(found.ids) // 2, -1):
        of_token = rows[tokens == found.ids[place]]
        assert found.counts[place] == len(of_token)
        np.testing.assert_allclose(found.sums[place], of_token.sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.square, np.sum(rows.astype(np.float64) ** 2))
    np.testing.assert_allclose(found.mean, rows.mean(0), atol=1e-5)
    shrunk = found.shrunk(2.0)
    np.testing.assert_allclose(
        shrunk[0], (found.sums[0] + 2 * found.mean) / (found.counts[0] + 2), rtol=1e-6
    )
    assert list(found.places(np.array([found.ids[3], 10**6, -1]))) == [3] + [len(found.ids)] * 2


def test_what_the_token_tables_leave_is_computed_from_sums_alone():
    rng = np.random.default_rng(0)
    x_a, x_b = rows_like_a_stream(rng, 5), rows_like_a_stream(rng, 4)
    problem, _ = make_problem(x_a, x_b, tokens=rng.integers(0, 60, len(x_a)))
    train = token_ridge._statistics(problem.train)
    for pairs in (problem.train, problem.validation):
        found = token_ridge._residual(token_ridge._statistics(pairs), train, 3.0)
        places = train.a.places(pairs.source.tokens)
        a = pairs.source.x.astype(np.float64) - train.a.shrunk(3.0)[places]
        b = pairs.target.x.astype(np.float64) - train.b.shrunk(3.0)[places]
        np.testing.assert_allclose(found.aa, a.T @ a, rtol=1e-3, atol=0.05)
        np.testing.assert_allclose(found.ab, a.T @ b, rtol=1e-3, atol=0.05)
        np.testing.assert_allclose(found.bb, np.sum(b**2), rtol=1e-3)


# ----------------------------------------------------------------------------- recovery


@pytest.mark.parametrize("d_a, d_b", [(12, 12), (10, 14)])
def test_procrustes_finds_a_planted_rotation(tmp_path, d_a, d_b):
    rng = np.random.default_rng(1)
    Q = np.linalg.qr(rng.normal(size=(d_b, d_b)))[0][:d_a]
    x_a = rows_like_a_stream(rng, d_a)
    x_b = 2.5 * (x_a - x_a.mean(0)) @ Q + rng.normal(size=d_b)
    problem, test = make_problem(
        x_a, x_b, dictionaries_ab=(identity_dictionary(d_a), random_dictionary("topk", d_b, 30))
    )
    fitted = fit_one("procrustes", problem, tmp_path)
    assert fitted.record["scale"] == pytest.approx(2.5, rel=0.02)
    np.testing.assert_allclose(fitted.map.W[...], 2.5 * Q, atol=0.05)
    assert activation_r2(fitted.map, problem, test) > 0.99
    assert feature_r2(fitted.map, problem, test) > 0.9  # TopK may pick another feature at a tie


def test_procrustes_to_a_narrower_model_is_semi_orthogonal(tmp_path):
    rng = np.random.default_rng(1)
    x_a = rows_like_a_stream(rng, 14)
    problem, _ = make_problem(x_a, x_a[:, :9])
    fitted = fit_one("procrustes", problem, tmp_path)
    Q = np.asarray(fitted.map.W[...]) / fitted.record["scale"]
    np.testing.assert_allclose(Q.T @ Q, np.eye(9), atol=1e-5)


def test_ridge_finds_a_planted_affine_map(tmp_path):
    rng = np.random.default_rng(2)
    x_a, W = rows_like_a_stream(rng, 12), rng.normal(size=(12, 7))
    x_b = x_a @ W + 5 + 0.1 * rng.normal(size=(len(x_a), 7))
    problem, test = make_problem(x_a, x_b)
    fitted = fit_one("ridge", problem, tmp_path)
    assert activation_r2(fitted.map, problem, test) > 0.99
    assert activation_r2(fit_one("procrustes", problem, tmp_path).map, problem, test) < 0.9
    scores = {row["penalty"]: row["mse"] for row in fitted.record["validation_mse"]}
    assert set(scores) == set(CONFIG.ridge_penalties)
    assert scores[fitted.record["penalty"]] == min(scores.values())


def test_ridge_scores_are_held_out_errors_of_what_it_predicts(tmp_path):
    rng = np.random.default_rng(2)
    x_a = rows_like_a_stream(rng, 6)
    problem, _ = make_problem(x_a, x_a @ rng.normal(size=(6, 5)) + rng.normal(size=(len(x_a), 5)))
    for kind in ("ridge", "procrustes", "token_ridge"):
        fitted = fit_one(kind, problem, tmp_path)
        predicted = maps.predict_activations(fitted.map, problem.validation)
        error = np.mean((predicted - problem.validation.target.x.astype(np.float32)) ** 2)
        best = min(row["mse"] for row in fitted.record["validation_mse"])
        assert best == pytest.approx(error, rel=1e-3)


def test_token_finds_a_target_that_the_token_determines(tmp_path):
    rng = np.random.default_rng(3)
    tokens = 40_000 + rng.integers(0, 30, sum(ROWS.values()))
    table = rng.exponential(size=(30, 8))
    x_b = table[tokens - 40_000] + 0.05 * rng.normal(size=(len(tokens), 8))
    problem, test = make_problem(rng.normal(size=(len(tokens), 5)), x_b, tokens=tokens)
    fitted = fit_one("token", problem, tmp_path)
    assert feature_r2(fitted.map, problem, test) > 0.99
    assert feature_r2(fit_one("mean", problem, tmp_path).map, problem, test) <= 0
    assert fitted.record["pseudocount"] == 0  # 50 clean rows a token want no shrinking
    unseen = fitted.map(np.array([7, 40_000], np.int32))
    np.testing.assert_allclose(unseen[0], problem.train.target.x.astype(np.float32).mean(0), 0.02)
    np.testing.assert_allclose(unseen[1], table[0], atol=0.1)


def test_token_tables_shrink_where_rows_are_few_and_noisy(tmp_path):
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 800, sum(ROWS.values()))  # two rows a token
    problem, _ = make_problem(
        rng.normal(size=(len(tokens), 5)), 3 + rng.normal(size=(len(tokens), 8)), tokens=tokens
    )
    record = fit_one("token", problem, tmp_path).record
    assert record["pseudocount"] == max(CONFIG.token_pseudocounts)
    scores = {row["pseudocount"]: row["mse"] for row in record["validation_mse"]}
    assert list(scores) == list(CONFIG.token_pseudocounts)
    assert scores[0.0] > 1.2 * scores[16.0]


def test_token_ridge_beats_token_and_ridge_where_both_matter(tmp_path):
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, 40, sum(ROWS.values()))
    x_a = rng.normal(size=(len(tokens), 8)) + rng.normal(size=(40, 8))[tokens]
    left = x_a - np.array([x_a[tokens == t].mean(0) for t in range(40)])[tokens]
    x_b = 2 * rng.normal(size=(40, 6))[tokens] + left @ rng.normal(size=(8, 6))
    problem, test = make_problem(x_a, x_b, tokens=tokens)
    scores = {
        kind: feature_r2(fit_one(kind, problem, tmp_path).map, problem, test)
        for kind in ("token", "ridge", "token_ridge")
    }
    assert scores["token_ridge"] > 0.98
    assert max(scores["token"], scores["ridge"]) < 0.8


@pytest.fixture(scope="module")
def nonlinear():
    """Features of B that are relu(f_A W) V, sparsified: no affine map can follow.

    d_a, d_b, width_a and width_b all differ.
    """
    rng = np.random.default_rng(5)
    n = sum(ROWS.values())
    f_a = rng.exponential(size=(n, 24)) * (rng.random((n, 24)) < 0.3)
    hidden = np.maximum(f_a @ rng.normal(size=(24, 12)) - 0.5, 0)
    f_b = np.maximum(hidden @ rng.normal(size=(12, 16)) / 3 - 0.5, 0)
    x_a, x_b = np.hstack([f_a, rng.normal(size=(n, 4))]), np.hstack([f_b, rng.normal(size=(n, 3))])
    both = identity_dictionary(28, 24), identity_dictionary(19, 16)
    return make_problem(x_a, x_b, tokens=rng.integers(0, 20, n), dictionaries_ab=both)


@pytest.fixture(scope="module")
def fitted_on(nonlinear, tmp_path_factory):
    """kind -> the rung fitted on the problem alone, once."""

    @functools.cache
    def fitted(kind):
        return fit_one(kind, nonlinear[0], tmp_path_factory.mktemp(kind))

    return fitted


@pytest.fixture(scope="module")
def ensemble_of_two(nonlinear):
    """(kind, directory) -> the rung on aligned and shuffled pairs, trained together.

    Equal runs share one compiled program: all that differs between them is its arguments.
    """
    problems, programs = [nonlinear[0], shuffled_problem(nonlinear[0])], {}

    def train_both(kind, directory):
        def once(trainable, feed):
            if kind not in programs:
                programs[kind] = original(trainable, feed)
            return programs[kind]

        original = loop._compile
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "_compile", once)
            return maps.map_module(kind).fit(problems, CONFIG, seed=0, directory=directory)

    return train_both


@pytest.fixture(scope="module")
def trained(ensemble_of_two, tmp_path_factory):
    """kind -> (aligned, shuffled) of an ensemble, and its directory; each trained once."""

    @functools.cache
    def both(kind):
        directory = tmp_path_factory.mktemp("both")
        return ensemble_of_two(kind, directory), directory

    return both


def test_mlp_beats_ridge_where_the_truth_is_not_linear(nonlinear, fitted_on):
    problem, test = nonlinear
    score = feature_r2(fitted_on("mlp").map, problem, test)
    assert score > 0.7
    assert score > feature_r2(fitted_on("ridge").map, problem, test) + 0.1
    assert fitted_on("mlp").record["validation"]["nmse"] == pytest.approx(1 - score, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_shuffled_pairs_teach_nothing(nonlinear, trained, tmp_path, kind):
    problem, test = nonlinear
    if kind in TRAINED:
        m = trained(kind)[0][1].map
    else:
        m = fit_one(kind, shuffled_problem(problem), tmp_path).map
    assert -0.3 < feature_r2(m, problem, test) < 0.01


# ----------------------------------------------------------------------- every rung's contract


def compiled(m):
    """The map as a jitted function of its parameters, as larger programs use it."""
    graphdef, params = modules.split(m)
    call = jax.jit(lambda params, *args: modules.merge(graphdef, params)(args[0], tokens=args[1]))
    return functools.partial(call, params)


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind, nonlinear, fitted_on):
    fitted, test = fitted_on(kind), nonlinear[1]
    m = fitted.map
    assert m.kind == kind
    assert m.reads in ("features", "activations", "tokens")
    inputs = maps.source_inputs(m, test)
    predicted = maps.predict(m, test, batch_size=128)
    assert predicted.shape == (len(test), 16)
    assert predicted.dtype == np.float32
    assert predicted.min() >= 0
    assert predicted.std() > 0
    np.testing.assert_allclose(m(inputs, tokens=test.source.tokens), predicted, atol=1e-3)
    np.testing.assert_allclose(compiled(m)(inputs, test.source.tokens), predicted, atol=1e-3)
    assert m(inputs[:3]).shape == (3, 16)  # tokens beside the inputs are optional
    json.dumps(fitted.record, allow_nan=False)
    if m.predicts_activation:
        x_b = m.activation(inputs, tokens=test.source.tokens)
        assert x_b.shape == (len(test), 19)
        np.testing.assert_allclose(m.dictionary.encode(x_b), predicted, atol=1e-3)
        np.testing.assert_allclose(maps.predict_activations(m, test), x_b, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_gives_the_same_bits(kind, nonlinear, fitted_on, tmp_path):
    m, test = fitted_on(kind).map, nonlinear[1]
    target = tmp_path / "dictionaries" / "b"
    dictionaries.save(test.target.dictionary, target)
    maps.save(m, tmp_path / "maps" / "one", dictionary=target, record={"chosen": 1})
    shutil.move(tmp_path, tmp_path.with_name(tmp_path.name + "-moved"))  # the link is relative
    loaded = maps.load(tmp_path.with_name(tmp_path.name + "-moved") / "maps" / "one")
    assert type(loaded) is type(m)
    for before, after in zip(*(jax.tree.leaves(modules.split(x)[1]) for x in (m, loaded))):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(maps.predict(loaded, test), maps.predict(m, test))


@pytest.mark.parametrize("kind", KINDS)
def test_fitted_again_gives_the_same_bits(kind, nonlinear, fitted_on, tmp_path):
    if base.map_class(kind).fits_together:
        pytest.skip("the test of killing and resuming fits it again")
    again = fit_one(kind, nonlinear[0], tmp_path)
    first, second = (modules.split(f.map)[1] for f in (fitted_on(kind), again))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert again.record == fitted_on(kind).record


# --------------------------------------------------------------------------- the trained rung


@pytest.mark.parametrize("kind", TRAINED)
def test_killed_and_resumed_ends_with_the_same_bits(
    kind, trained, ensemble_of_two, tmp_path, monkeypatch
):
    def killed_after_saving(*args, **kwargs):
        checkpoint.save(*args, **kwargs)
        raise KeyboardInterrupt

    whole, directory = trained(kind)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "checkpoint", SimpleNamespace(**vars(checkpoint)))
        patch.setattr(loop.checkpoint, "save", killed_after_saving)
        with pytest.raises(KeyboardInterrupt):
            ensemble_of_two(kind, tmp_path)
    resumed = ensemble_of_two(kind, tmp_path)
    for first, second in zip(whole, resumed):
        trees = (modules.split(fitted.map)[1] for fitted in (first, second))
        jax.tree.map(np.testing.assert_array_equal, *trees)
        assert first.record == second.record
    logs = [folder / f"{kind}-0" / "metrics.jsonl" for folder in (directory, tmp_path)]
    assert logs[0].read_text() == logs[1].read_text()


@pytest.mark.parametrize("kind", TRAINED)
def test_members_train_as_if_alone(kind, nonlinear, fitted_on, trained):
    alone, together = fitted_on(kind), trained(kind)[0][0]
    ours, theirs = (maps.predict(fitted.map, nonlinear[1]) for fitted in (alone, together))
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.02 * ours.std()


@pytest.mark.mesh
def test_members_on_their_own_devices_never_talk(nonlinear):
    eight = ensemble.Ensemble(mlp.MLP, [nonlinear[0]] * 8, CONFIG, seed=0)
    trainable, feed = eight.trainable(), eight.feed()
    abstract = jax.eval_shape(trainable.init, jax.random.key(0))
    shardings = eight.by_member(abstract)
    state = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )

    def step(state, resident, rows):
        return trainable.step(state, feed.select(resident, rows), 0, jax.random.key(0))

    lowered = jax.jit(step, out_shardings=(shardings, None)).lower(
        state, feed.resident, feed.indices(0, 1)[0]
    )
    program = lowered.compile().as_text()
    assert eight.mesh.shape["member"] == 8
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f"{collective}(" not in program


def test_the_log_has_a_column_per_member(trained):
    directory = trained("mlp")[1] / "mlp-0"
    labels = [row["label"] for row in read_json(directory / "members.json")]
    assert labels == ["A to B", "A to B (shuffled)"]
    rows = read_jsonl(directory / "metrics.jsonl")
    assert rows[-1]["step"] == CONFIG.steps - 1
    assert {"loss", "mse", "nmse", "cosine", "correlation", "sparsity", "validation"} < set(rows[0])
    curves = np.array([row["loss"] for row in rows])
    assert curves.shape[1] == 2
    assert curves[-1, 0] < 0.6 * curves[0, 0]


def untrained(problem: Problem):
    """The MLP of a problem before training."""
    source, target = problem.train.source, problem.train.target
    m = mlp.MLP(target.dictionary, width_a=source.dictionary.width, hidden=16, dropout=0.3)
    values = mlp.MLP.standards(problem, CONFIG).values
    own = base.own_parameters(modules.split(m)[1]) | values
    return base.build(mlp.MLP, target.dictionary, m.arguments, own)


def test_mlp_starts_as_the_mean_predictor_with_live_gradients(nonlinear):
    m, target = untrained(nonlinear[0]), nonlinear[0].train.target
    mean = base.encode_rows(target.dictionary, target.x).mean(0)
    predicted = maps.predict(m, nonlinear[1])
    np.testing.assert_allclose(predicted, np.broadcast_to(mean, predicted.shape), atol=1e-4)
    graphdef, params = modules.split(m)
    f_a = maps.source_inputs(m, nonlinear[1])[:64]
    f_b = base.encode_rows(target.dictionary, nonlinear[1].target.x[:64])

    @jax.jit
    def gradient(network):
        def loss(network):
            m = modules.merge(graphdef, params | {"network": network})
            p = heads.rectified(m.estimate(f_a, tokens=None, key=None))
            return losses.transfer_loss(p, f_b, LossWeights(), variance=1.0)[0]

        return jax.grad(loss)(network)

    network = params["network"]
    last = gradient(network)["last"]
    np.testing.assert_array_equal(last["bias"] != 0, mean > 0)  # all that ever fire
    assert np.mean(last["kernel"][:, mean > 0] != 0) > 0.9
    network["last"]["kernel"] += 1e-3 * jax.random.normal(jax.random.key(1), (16, 16))
    live = jax.tree.map(lambda g: np.mean(g != 0), gradient(network))
    assert min(jax.tree.leaves(live)) > 0.5


def test_dropout_drops_in_training_only(nonlinear):
    m = untrained(nonlinear[0])
    m.network.last.kernel[...] = jnp.ones((16, 16))
    f_a = maps.source_inputs(m, nonlinear[1])[:32]

    def estimate(seed=None):
        key = None if seed is None else jax.random.key(seed)
        return m.estimate(f_a, tokens=None, key=key)

    np.testing.assert_array_equal(estimate(0), estimate(0))
    assert not np.array_equal(estimate(0), estimate(1))
    np.testing.assert_array_equal(jax.nn.relu(estimate()), m(f_a))
    h = jnp.ones((1000, 16))
    dropped = network._dropped(h, 0.3, jax.random.key(0))
    assert np.mean(np.asarray(dropped) == 0) == pytest.approx(0.3, abs=0.02)
    assert np.mean(dropped) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": 1e-3}, {"steps": 5}, {"weight_decay": 1.0}, {"gradient_clip": 1e-6}],
    ids=lambda settings: next(iter(settings)),
)
def test_every_option_of_the_optimizer_changes_the_update(settings):
    def after_three_steps(config):
        optimizer, params = ensemble.make_optimizer(config), {"kernel": np.ones((3, 2), np.float32)}
        state = optimizer.init(params)
        for step in range(3):
            gradient = {"kernel": np.cos(step + params["kernel"])}
            updates, state = optimizer.update(gradient, state, params)
            params = jax.tree.map(np.add, params, updates)
        return params["kernel"]

    changed = dataclasses.replace(CONFIG, **settings)
    assert not np.allclose(after_three_steps(CONFIG), after_three_steps(changed), rtol=1e-7)


def test_the_loss_is_the_weighted_sum_and_shapes_are_as_asked(nonlinear, fitted_on):
    fitted = fitted_on("mlp")
    terms = fitted.record["validation"]
    weights = dataclasses.asdict(CONFIG.loss_weights)
    weighted = [weights[n] * terms["nmse" if n == "mse" else n] for n in weights]
    assert terms["loss"] == pytest.approx(sum(weighted), rel=1e-5)
    assert fitted.record["validation_rows"] == 256  # four whole batches of 300 rows
    assert fitted.map.network.second.kernel.shape == (CONFIG.hidden, CONFIG.hidden)
    assert fitted.map.network.dropout == CONFIG.dropout
    feed = ensemble.Ensemble(mlp.MLP, [nonlinear[0]], CONFIG, seed=0).feed()
    batches = feed.indices(0, 25)
    assert batches.shape == (25, CONFIG.batch_size)
    np.testing.assert_array_equal(np.sort(batches, axis=None), np.arange(1600))  # one epoch
    np.testing.assert_array_equal(feed.indices(7, 3), batches[7:10])


# ---------------------------------------------------------------------------------- the stage


class FakeStore:
    """The part of the store that the stage reads, in memory."""

    def __init__(self, widths: dict[str, int], layers=(1, 2)):
        rng = np.random.default_rng(7)
        n = 260
        self.models = tuple(widths)
        self.sites = tuple(Site(layer) for layer in layers)
        self._split = np.repeat([0, 1, 2], [180, 40, 40])
        places = np.arange(n, dtype=np.int32)
        self.rows = SimpleNamespace(document=places // 10, byte_end=places % 10)
        self._tokens = {model: rng.integers(0, 9, n).astype(np.int32) for model in widths}
        shared = rng.normal(size=(n, 4))
        self._x = {
            (model, site): (shared @ rng.normal(size=(4, d))).astype(ml_dtypes.bfloat16)
            for model, d in widths.items()
            for site in self.sites
        }

    def select(self, split):
        return np.flatnonzero(self._split == SPLITS.index(split))

    def tokens(self, model, rows):
        return self._tokens[model][rows]

    def read(self, model, site, rows):
        return self._x[model, site][rows]


def stage(root, widths, *, kinds, layers=(1, 2), steps=4):
    """A store, its dictionaries on disk, a config and a work directory."""
    store, work = FakeStore(widths, layers), Workdir(root)
    for (model, site), x in store._x.items():
        d = random_dictionary("topk", x.shape[1], 20, seed=site.layer)
        dictionaries.save(d, work.dictionary(model, site, "seed-0"))
    settings = MapConfig(kinds=kinds, steps=steps, batch_size=32, hidden=8)
    return Config(models=store.models, layers=layers, map=settings), store, work


def test_the_stage_fits_every_rung_both_ways_and_goes_on(tmp_path, monkeypatch):
    calls = []

    def untrained_maps(problems, config, *, seed, directory):
        calls.append([problem.label for problem in problems])
        assert directory == tmp_path / "maps" / "training"
        return [base.Fitted(untrained(problem)) for problem in problems]

    monkeypatch.setattr(mlp, "fit", untrained_maps)
    config, store, work = stage(tmp_path, {"a": 6, "b": 6}, kinds=("ridge", "mlp"), layers=(1,))
    fit.fit_maps(config, store, work)
    ends = "a resid_pre.1 to b resid_pre.1", "b resid_pre.1 to a resid_pre.1"
    together = [label + pairing for label in ends for pairing in ("", " (shuffled)")]
    assert calls == [together]  # both directions, aligned and shuffled, in one call
    tasks = maps.tasks(config, store)
    assert len(tasks) == 2 * 2 * 2
    timing = read_json(work.timing)["train_hypernetworks"]
    assert timing["maps"] == len(tasks)
    assert timing["wall_s"] > 0

    site = Site(1)
    test = maps.load_pairs(store, "b", "a", site, site, "test", work)
    ours, null = (
        maps.predict(maps.load(work.map("b", "a", site, site, kind)), test)
        for kind in ("ridge", "ridge-shuffled")
    )
    assert not np.allclose(ours, null)

    gone = work.map("b", "a", site, site, "ridge")
    shutil.rmtree(gone)
    kept = {p: p.stat().st_mtime_ns for p in work.maps.glob("*-to-*/*/*/*.sha256.json")}
    assert len(kept) == len(tasks) - 1
    fit.fit_maps(config, store, work)
    fit.fit_maps(config, store, work)  # now there is nothing left to do
    assert all(p.stat().st_mtime_ns == then for p, then in kept.items())
    assert read_json(work.timing)["train_hypernetworks"]["maps"] == 1
    assert len(calls) == 1
    np.testing.assert_array_equal(maps.predict(maps.load(gone), test), ours)


def test_the_tasks_of_three_models_and_unequal_layers(tmp_path):
    store = FakeStore({"a": 6, "b": 5, "c": 4}, layers=(1, 2))
    config = Config(layer_pairs="1:2", map=MapConfig(kinds=("mean",)))
    found = {
        (t.source, t.site_source.layer, t.target, t.site_target.layer)
        for t in maps.tasks(config, store)
        if t.pairing == "aligned"
    }
    assert found == {
        *(("a", 1, "b", 2), ("a", 1, "c", 2), ("b", 2, "a", 1)),
        *(("c", 2, "a", 1), ("b", 2, "c", 2), ("c", 2, "b", 2)),
    }
    assert maps.tasks(config, store)[0].path(Workdir(tmp_path)) == (
        tmp_path / "maps" / "a-to-b" / "resid_pre.1--resid_pre.2" / "mean"
    )
    shuffled = maps.tasks(config, store)[1].path(Workdir(tmp_path))
    assert shuffled.name == "mean-shuffled"


def test_pairs_are_the_rows_of_their_split(tmp_path):
    _, store, work = stage(tmp_path, {"a": 6, "b": 5}, kinds=("mean",))
    site_a, site_b = Site(1), Site(2)
    pairs = maps.load_pairs(store, "a", "b", site_a, site_b, "validation", work)
    rows = store.select("validation")
    np.testing.assert_array_equal(pairs.source.x, store.read("a", site_a, rows))
    np.testing.assert_array_equal(pairs.target.x, store.read("b", site_b, rows))
    np.testing.assert_array_equal(pairs.target.tokens, store.tokens("b", rows))
    np.testing.assert_array_equal(pairs.documents, store.rows.document[rows])
    assert pairs.source.dictionary.d_model == 6


def test_shuffling_moves_whole_target_rows_and_nothing_else(nonlinear):
    pairs = nonlinear[0].train
    moved = maps.shuffled(pairs, 3)
    assert moved.source is pairs.source
    assert np.mean(moved.target.x[:, -1] == pairs.target.x[:, -1]) < 0.05
    together = [
        sorted(map(tuple, np.column_stack([p.target.tokens, p.target.x.astype(np.float32)])))
        for p in (pairs, moved)
    ]
    assert together[0] == together[1]
    again = maps.shuffled(pairs, 3)
    np.testing.assert_array_equal(moved.target.x, again.target.x)
    assert not np.array_equal(moved.target.x, maps.shuffled(pairs, 4).target.x)
    for ours, theirs in zip(moved.target.feature_moments, pairs.target.feature_moments):
        np.testing.assert_array_equal(ours, theirs)
    f = base.encode_rows(pairs.target.dictionary, pairs.target.x)
    np.testing.assert_allclose(pairs.target.feature_moments[0], f.mean(0), rtol=1e-5)
    np.testing.assert_allclose(pairs.target.feature_moments[1], f.var(0), rtol=1e-4)
    seeds = {maps.shuffle_seed(seed, split) for seed in range(4) for split in SPLITS}
    assert len(seeds) == 12


# ------------------------------------------------------------------------------- bad input


def test_an_unknown_rung_is_refused_with_those_that_exist(tmp_path):
    store = FakeStore({"a": 6, "b": 5})
    config = Config(layers=(1,), map=MapConfig(kinds=("mean", "rigde")))
    with pytest.raises(
        UserError, match=r"map.kinds=rigde is no map; use .*ridge, ridge_codes, token"
    ):
        fit.fit_maps(config, store, Workdir(tmp_path))


def test_a_layer_that_was_not_extracted_is_refused(tmp_path):
    config = Config(layers=(1, 9), map=MapConfig(kinds=("mean",)))
    with pytest.raises(UserError, match=r"resid_pre\.9 was not extracted \(resid_pre\.1, resid"):
        fit.fit_maps(config, FakeStore({"a": 6, "b": 5}), Workdir(tmp_path))


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("mlp", {"batch_size": 4096}, "map.batch_size=4096 is larger than the 1600 training rows"),
        pytest.param(
            *(
                "mlp",
                {"batch_size": 33},
                "map.batch_size=33 cannot be shared by 8 devices; use a mult",
            ),
            marks=pytest.mark.mesh,
        ),
        ("ridge", {"ridge_penalties": ()}, r"map.ridge_penalties=\(\) cannot be tried"),
        ("ridge", {"ridge_penalties": (0.0,)}, "map.ridge_penalties=0.0 .*give numbers above 0"),
        ("token", {"token_pseudocounts": (1.0, -1.0)}, "map.token_pseudocounts=-1.0 cannot"),
        ("token_ridge", {"ridge_penalties": (float("nan"),)}, "map.ridge_penalties=nan cannot"),
    ],
)
def test_settings_that_cannot_work_are_refused(nonlinear, tmp_path, kind, settings, message):
    with pytest.raises(UserError, match=message):
        fit_one(kind, nonlinear[0], tmp_path, dataclasses.replace(CONFIG, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_a_problem_without_rows_is_refused(nonlinear, tmp_path, kind):
    def first(pairs, n):
        sides = (
            dataclasses.replace(side, x=side.x[:n], tokens=side.tokens[:n])
            for side in (pairs.source, pairs.target)
        )
        return Pairs(*sides, pairs.documents[:n])

    nothing = dataclasses.replace(nonlinear[0], train=first(nonlinear[0].train, 0))
    with pytest.raises(UserError, match=f"A to B has 0 paired train rows and {kind} needs"):
        fit_one(kind, nothing, tmp_path)


def saved(nonlinear, fitted_on, root, kind="ridge"):
    dictionaries.save(nonlinear[1].target.dictionary, root / "dictionary")
    maps.save(fitted_on(kind).map, root / "map", dictionary=root / "dictionary")
    return root / "map"


def test_a_map_without_its_dictionary_is_refused(nonlinear, fitted_on, tmp_path):
    path = saved(nonlinear, fitted_on, tmp_path)
    shutil.rmtree(tmp_path / "dictionary")
    with pytest.raises(UserError, match=r"needs the target's dictionary .*missing; restore"):
        maps.load(path)


def test_a_map_of_another_dictionary_is_refused(nonlinear, fitted_on, tmp_path):
    path = saved(nonlinear, fitted_on, tmp_path)
    shutil.rmtree(tmp_path / "dictionary")
    dictionaries.save(random_dictionary("relu", 19, 16, seed=2), tmp_path / "dictionary")
    with pytest.raises(UserError, match="was fitted with another dictionary than"):
        maps.load(path)


def test_a_damaged_map_is_refused(nonlinear, fitted_on, tmp_path):
    path = saved(nonlinear, fitted_on, tmp_path)
    files = (p for p in (path / "0").rglob("*") if p.is_file())
    victim = max(files, key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(UserError, match="checksum mismatch"):
        maps.load(path)


def test_a_folder_that_is_no_map_is_refused(tmp_path):
    with pytest.raises(UserError, match="no finished checkpoint"):
        maps.load(tmp_path / "nothing")
