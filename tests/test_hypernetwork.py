"""The network that writes maps: planted truths asked about zero-shot, and what it may read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from map_problems import feature_r2, r2
from tiny_run import refused

from crossdict_jax import maps, modules
from crossdict_jax.config import HypernetworkConfig
from crossdict_jax.dictionaries.base import build as build_dictionary
from crossdict_jax.maps import Pairs, Problem, Side, base, descriptions
from crossdict_jax.maps.descriptions import describe, profile_weights
from crossdict_jax.maps.kinds import hypernetwork

ROWS = {"train": 800, "validation": 160, "test": 400}
SHAPE = HypernetworkConfig(rank=12, steps=120)
D_MODEL = {"a": 6, "b": 8}
WIDTH = {"a": 48, "b": 64}


def dictionary_of(model: str, layer: int):
    """relu(x W) with W and -W side by side, decoded exactly: x is linear in the features."""
    rng = np.random.default_rng(100 * layer + D_MODEL[model])
    half = rng.normal(size=(D_MODEL[model], WIDTH[model] // 2))
    half /= np.linalg.norm(half, axis=0)
    order = rng.permutation(WIDTH[model])
    W_enc = np.hstack([half, -half])[:, order].astype(np.float32)
    W_dec = np.vstack([np.linalg.pinv(half), -np.linalg.pinv(half)])[order].astype(np.float32)
    shape = {"d_model": D_MODEL[model], "width": WIDTH[model], "k": 1}
    graph, params = modules.split(build_dictionary("relu", **shape, key=jax.random.key(0)))
    return modules.merge(graph, params | {"W_enc": jnp.array(W_enc), "W_dec": jnp.array(W_dec)})


@functools.cache
def planted(seed: int = 0) -> dict[int, dict[str, Pairs]]:
    """layer -> split -> pairs: x_b = x_a (R + layer S), each with its own features."""
    rng = np.random.default_rng(seed)
    R, S = rng.normal(size=(2, D_MODEL["a"], D_MODEL["b"]))
    R = np.linalg.qr(R.T)[0].T
    found = {}
    for layer in (1, 2, 3):
        dictionary = {m: dictionary_of(m, layer) for m in D_MODEL}
        found[layer] = {}
        for split, n in ROWS.items():
            x_a = rng.normal(size=(n, D_MODEL["a"]))
            x = {"a": x_a, "b": x_a @ (R + layer * S / 20)}
            tokens = rng.integers(0, 20, n).astype(np.int32)
            x = {m: rows.astype(ml_dtypes.bfloat16) for m, rows in x.items()}
            sides = [Side(x[m], tokens, dictionary[m], model=m, layer=layer) for m in "ab"]
            found[layer][split] = Pairs(*sides, np.arange(n, dtype=np.int32) // 20)
    return found


def turned(splits: dict[str, Pairs]) -> dict[str, Pairs]:
    return {s: Pairs(p.target, p.source, p.documents) for s, p in splits.items()}


def problems_of(*layers: int) -> list[Problem]:
    return [
        Problem(f"{name} {layer}", splits["train"], splits["validation"])
        for layer in layers
        for name, splits in (("a to b", planted()[layer]), ("b to a", turned(planted()[layer])))
    ]


@functools.cache
def unknown_fifth() -> dict[tuple[str, int], np.ndarray]:
    rng = np.random.default_rng(5)
    known = {}
    for model, width in WIDTH.items():
        for layer in (1, 2, 3):
            known[model, layer] = np.ones(width, bool)
            known[model, layer][rng.permutation(width)[: width // 5]] = False
    return known


def train(problems, directory, **how):
    how |= {"seed": 0, "directory": directory}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hypernetwork, "LEARNING_RATE", 1e-2)  # for few steps
        return hypernetwork.train_network(problems, SHAPE, **how)[0]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Trained on layers 1 and 3, both directions, without a fifth of all features."""
    return train(problems_of(1, 3), tmp_path_factory.mktemp("network"), masks=unknown_fifth())


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("turn", [lambda s: s, turned], ids=["a to b", "b to a"])
def test_features_and_layers_that_it_never_saw_are_written(network, layer, turn):
    splits = turn(planted()[layer])
    problem, test = Problem("asked", splits["train"], splits["validation"]), splits["test"]
    m = network.write(problem)
    unseen = ~unknown_fifth()[test.target.model, layer]
    assert unseen.sum() >= 4 and feature_r2(m, problem, test, unseen) > 0.75
    assert feature_r2(m, problem, test) > 0.75


def test_descriptions_of_other_features_say_nothing(tmp_path, monkeypatch):
    honest = descriptions.Description.directions.func

    def of_others(self):
        order = np.random.default_rng(len(self.rows)).permutation(self.side.dictionary.width)
        return {name: rows[order] for name, rows in honest(self).items()}

    monkeypatch.setattr(descriptions.Description, "directions", property(of_others))
    network = train(problems_of(1, 3), tmp_path, masks=unknown_fifth())
    problem, unseen = problems_of(1)[0], ~unknown_fifth()["b", 1]
    assert feature_r2(network.write(problem), problem, planted()[1]["test"], unseen) < 0.3


def test_unknown_features_are_not_read_in_training():
    known = unknown_fifth()
    problem = problems_of(1)[0]
    objective = hypernetwork.WritingObjective([problem], SHAPE, known)
    fixed = jax.tree.map(lambda a: jnp.asarray(a)[None], objective.fixed(0))
    params = objective.init(jax.random.key(0), {})
    rows = {"source 0": problem.train.source.x[:128], "target 0": problem.train.target.x[:128]}

    @jax.jit
    @jax.grad
    def slopes(reads):
        return objective.losses(params, rows, {"stacks": [fixed | {"reads": reads}]}).sum()

    slope = slopes(fixed["reads"])
    for model, read in (("a", slope["source"]["moves"]), ("b", slope["target"]["reads"])):
        moved = np.abs(np.asarray(read[0])).max(axis=1) > 0
        np.testing.assert_array_equal(moved, known[model, 1])
    assert not np.asarray(fixed["reads"]["U"])[0, ~known["a", 1]].any()


def lexical(names_b: bool):
    """Two models whose features hold what the token says; rows of a and b of different texts."""
    rng = np.random.default_rng(3)
    table = {m: rng.exponential(size=(10, D_MODEL[m])) for m in D_MODEL}
    order = rng.permutation(10)  # b numbers its tokens in another way
    spelled = {"a": [b"%d" % i for i in range(10)], "b": [b"%d" % i for i in order]}
    if not names_b:
        spelled["b"] = [b"%d" % i for i in rng.permutation(10)]
    splits = {}
    for split, n in ROWS.items():
        token = rng.integers(0, 10, n)
        own = {"a": token, "b": np.argsort(order)[token]}
        sides = []
        for m in "ab":
            x = (table[m][token] + 0.1 * rng.normal(size=(n, D_MODEL[m]))).astype(np.float32)
            about = {"model": m, "layer": 1, "token_bytes": lambda m=m: spelled[m]}
            sides.append(Side(x, own[m].astype(np.int32), dictionary_of(m, 1), **about))
        splits[split] = Pairs(*sides, np.arange(n, dtype=np.int32) // 20)
    return splits


@pytest.mark.parametrize(("same_names", "least", "most"), [(True, 0.8, 1.0), (False, -9.0, 0.2)])
def test_token_profiles_alone_give_a_map_if_names_are_true(same_names, least, most):
    splits = lexical(same_names)
    a, b = describe(splits["train"], "a to b")
    U, V = profile_weights(a, b)
    test = splits["test"]
    f_a, f_b = (base.encode_rows(s.dictionary, s.x) for s in (test.source, test.target))
    predicted = (f_a - a.side.feature_moments.mean) @ U @ V.T + b.side.feature_moments.mean
    assert least < r2(predicted, f_b, b.side.feature_moments.mean) < most


def test_profiles_are_of_texts_that_the_other_role_never_reads():
    pairs = planted()[1]["train"]
    a, b = describe(pairs, "a to b")
    assert not set(pairs.documents[a.rows]) & set(pairs.documents[b.rows])
    assert len(a.rows) + len(b.rows) == len(pairs)
    f = base.encode_rows(pairs.source.dictionary, pairs.source.x)
    mine, token = f[a.rows], pairs.source.tokens[a.rows]
    index = a.profile.names.index(int(token[0]))
    expected = mine[token == token[0]].mean(0) - mine.mean(0)
    np.testing.assert_allclose(a.profile.means[index], expected, atol=1e-5)
    np.testing.assert_allclose(a.profile.covariance, np.cov(mine.T, bias=True), atol=1e-4)
    np.testing.assert_allclose(a.side.feature_moments.variance, f.var(0), rtol=1e-3)


def test_shuffling_pairs_changes_no_description_and_tokens_are_their_bytes():
    pairs = planted()[1]["train"]
    for one, other in zip(describe(pairs, ""), describe(maps.shuffled(pairs, 3), "")):
        np.testing.assert_array_equal(one.profile.means, other.profile.means)
        jax.tree.map(np.testing.assert_array_equal, one.directions, other.directions)
    # Tokens of equal bytes are one.
    side = dataclasses.replace(pairs.source, token_bytes=lambda: [b"even", b"odd"] * 10)
    a, _ = describe(dataclasses.replace(pairs, source=side), "")
    assert sorted(a.profile.names) == [b"even", b"odd"] and a.profile.counts.sum() == len(a.rows)


def test_too_few_rows_or_documents_and_unknown_models_are_refused(network, tmp_path):
    splits = planted()[1]
    pairs, validation = splits["train"], splits["validation"]
    few = Problem("a to b", pairs.take(slice(100)), validation)
    words = "a to b has 100 paired train rows and hypernetwork needs 128"
    refused(words, train, [few], tmp_path)
    one = Problem("a to b", dataclasses.replace(pairs, documents=0 * pairs.documents), validation)
    words = "a to b has 1 training documents and hypernetwork needs 2"
    refused(words, train, [one], tmp_path)
    stranger = dataclasses.replace(pairs, source=dataclasses.replace(pairs.source, model="c"))
    words = "not trained with c as source; it knows a, b"
    refused(words, network.write, Problem("c to b", stranger, stranger))
