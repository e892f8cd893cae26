"""Gates miss when what they watch is broken, and the command says so."""

import dataclasses
import functools
import json
import types

import jax
import numpy as np
import pytest
from absl import flags
from tiny_run import CONTEXT, SITE, make_models, make_texts

from crossdict_jax import maps, models
from crossdict_jax.activations import extract, pairing
from crossdict_jax.causal import inject
from crossdict_jax.config import GATES, VerifyConfig
from crossdict_jax.dictionaries import crosscoder_training
from crossdict_jax.dictionaries import train as dictionaries
from crossdict_jax.evaluation import scoring
from crossdict_jax.maps import ensemble
from crossdict_jax.maps.kinds import procrustes
from crossdict_jax.training.mesh import make_mesh
from crossdict_jax.verify import (
    g01_identity,
    g02_rotation,
    g03_independence,
    g04_exclusive,
    g05_pairing,
    g06_causal,
    g07_nonlinearity,
    g08_reference_recipe,
    g09_training,
    g10_determinism,
    lab,
    ownership,
    planted,
    real,
    run,
)
from crossdict_jax.verify.gate import Check, Gate, at_least, at_most, equal, shown
from crossdict_jax.workdir import Workdir
from launch import command
from launch import verify as script


@pytest.fixture(scope="module", autouse=True)
def on_one_device():
    """Programs for one device compile several times faster; sharding is tested elsewhere."""
    one = functools.partial(make_mesh, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        for module in (extract, dictionaries, ensemble, inject, crosscoder_training):
            patch.setattr(module, "make_mesh", one)
        yield


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("check", "passed"),
    [
        (at_least("", 1.0, 1.0), True),
        (at_least("", 0.999, 1.0), False),
        (at_most("", 1.0, 1.0), True),
        (at_most("", 1.001, 1.0), False),
        (equal("", True, 1), True),
        (equal("", 0.5, 1), False),
        (at_least("", None, 0.0), False),
        (at_most("", float("nan"), 1.0), False),
        (shown("", None), True),
    ],
)
def test_a_bound_is_kept_or_missed(check, passed):
    assert check.passed is passed


def test_a_gate_without_a_bound_proves_nothing():
    assert not Gate("G0", "", (shown("", 1.0),)).passed
    assert not Gate("G0", "", ()).passed
    assert Gate("G0", "", (shown("", 1.0), at_least("", 1, 0))).passed


# ---------------------------------------------------------------- the command


def fake(name, *checks):
    return lambda seed, directory: Gate(name, f"seed {seed}", checks, note="[a note]")


def broken(seed, directory):
    raise RuntimeError("lost")


def execute(arguments):
    asked = command.Command(script.main, kind=VerifyConfig, default="verify")
    return command.execute(asked, ["verify", *arguments], values=flags.FlagValues())


@pytest.fixture
def gates(monkeypatch):
    known = {
        "G1": fake("G1", at_least("one", 1, 0)),
        "G2": fake("G2", at_least("two", 0, 1)),
        "G3": broken,
    }
    monkeypatch.setattr(run, "gates", lambda: known)


def test_all_gates_passing_is_success(gates, tmp_path, capsys):
    assert execute(["--config.gates=G1", "--seed=7", f"--workdir={tmp_path}/run"]) == 0
    assert "seed 7" in capsys.readouterr().out
    row = json.loads((tmp_path / "run/results/verify.json").read_text())
    expected = {"what": "one", "value": 1, "relation": ">=", "bound": 0, "passed": True}
    assert row["seed"] == 7 and row["gates"][0]["checks"] == [expected]
    assert "seconds" not in json.dumps(row)
    timing = json.loads((tmp_path / "run/results/timing.json").read_text())
    assert timing["verify"].keys() == {"wall_s", "G1"}


@pytest.mark.parametrize("missing", ["G1,G2", "G3,G1", "G2"])
def test_a_miss_or_an_exception_exits_with_1(missing, gates, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        execute([f"--config.gates={missing}", f"--workdir={tmp_path}/run"])
    assert stopped.value.code == 1
    written = json.loads((tmp_path / "run/results/verify.json").read_text())["gates"]
    assert [g["gate"] for g in written if g["passed"]] == ["G1"] * missing.count("G1")
    assert "MISS" in capsys.readouterr().out


def test_a_raised_error_is_told(gates, tmp_path, capsys):
    with pytest.raises(SystemExit):
        execute(["--config.gates=G3", f"--workdir={tmp_path}/run"])
    told = capsys.readouterr()
    assert "raised RuntimeError: lost" in told.out and "Traceback" in told.err


def test_an_unknown_gate_is_a_mistake_of_the_user(tmp_path, capsys):
    assert execute(["--config.gates=G1,G77", f"--workdir={tmp_path}/run"]) == 2
    assert "G77" in capsys.readouterr().err


def test_every_gate_has_a_file_that_runs_it():
    assert tuple(run.gates()) == GATES
    assert all(callable(gate) for gate in run.gates().values())


# ---------------------------------------------------------------- sabotage


def smaller(monkeypatch, module, **changes):
    monkeypatch.setattr(module, "PLANTED", dataclasses.replace(module.PLANTED, **changes))


def judge(module, tmp_path, seed=0) -> dict[str, Check]:
    """The checks of a gate that it misses, by name."""
    gate = module.gate(seed=seed, directory=tmp_path / "gate")
    missed = {check.what: check for check in gate.checks if not check.passed}
    assert gate.passed is not bool(missed)
    return missed


def in_sample(monkeypatch):
    """Maps are scored on the rows that they were fitted on."""
    load = scoring._load

    def train_for_test(*arguments):
        splits = load(*arguments)
        return splits | {"test": splits["train"]}

    monkeypatch.setattr(scoring, "_load", train_for_test)


def late(pair_many):
    """Pairs whose second position is one token late."""

    def shifted(ends):
        byte_end, positions = pair_many(ends)
        inside = positions[:, 1] + 1 < len(ends[1])
        return byte_end[inside], (positions + np.array([[0, 1]]))[inside]

    return shifted


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The embedded models replaced by random ones of two layers, and short text for them."""
    texts = make_texts(60)
    (tmp_path / "text").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    whole = real.real_config

    def config(names, **settings):
        made = whole(names, **settings | {"width": 64, "k": 4, "steps": 20, "batch_size": 64})
        made.text.source, made.text.documents = str(tmp_path / "text"), 60
        made.text.window_tokens, made.map.batch_size = CONTEXT, 32
        return made

    monkeypatch.setattr(models, "EMBEDDED", make_models(tmp_path, texts))
    monkeypatch.setattr(real, "SITE", SITE)
    monkeypatch.setattr(real, "real_config", config)


@pytest.mark.soak
@pytest.mark.parametrize("shifted", [False, True])
def test_g1_misses_a_shifted_pairing(shifted, tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(g01_identity, "MINIMUM_FIRINGS", 3)
    if shifted:
        monkeypatch.setattr(extract.pairing, "pair_many", late(pairing.pair_many))
    missed = judge(g01_identity, tmp_path).keys() - {"live features"}
    wrong = {"FVU of ridge on activations", "top-1 of ridge", "correlation of the worst match"}
    assert wrong <= missed if shifted else not missed


@pytest.mark.soak
@pytest.mark.parametrize("sabotage", [None, "rotation", "matching"])
def test_g2_misses_a_wrong_rotation_and_wrong_matches(sabotage, monkeypatch, tmp_path):
    smaller(monkeypatch, g02_rotation, rows=3000, documents=60, features=40, widths=(20,))
    short = {"width": 48, "steps": 150, "batch_size": 256}
    monkeypatch.setattr(g02_rotation, "SAE", dataclasses.replace(g02_rotation.SAE, **short))
    monkeypatch.setattr(g02_rotation, "MINIMUM_FIRINGS", 5)
    if sabotage == "rotation":
        true = procrustes.rotation
        monkeypatch.setattr(procrustes, "rotation", lambda m: (true(m)[0][::-1], true(m)[1]))
    if sabotage == "matching":
        match = g02_rotation.match

        def rolled(*arguments, **settings):
            found = match(*arguments, **settings)
            return dataclasses.replace(found, features_b=np.roll(found.features_b, 1))

        monkeypatch.setattr(g02_rotation, "match", rolled)
    missed = judge(g02_rotation, tmp_path).keys() - {"live features"}
    expected = {
        None: set(),
        "rotation": {"share of it after Procrustes from the copy"},
        "matching": {"share of the planted permutation that matching recovers"},
    }
    assert missed == expected[sabotage]


def leaked(make):
    """Views whose second shows what the first does."""

    def views(config, seed):
        made = make(config, seed)
        one, other = (made.exclusive(v) for v in (0, 1))
        codes = made.codes.copy()
        codes[:, other] = codes[:, one]
        x = tuple(codes @ d for d in made.directions)
        return dataclasses.replace(made, codes=codes, x=x)

    return views


@pytest.mark.parametrize("sabotage", ["leak", "in-sample"])
def test_g3_misses_a_leak_and_scores_in_sample(sabotage, monkeypatch, tmp_path):
    smaller(monkeypatch, g03_independence, rows=1600, documents=40, features=64, widths=(36, 40))
    monkeypatch.setattr(g03_independence, "SEEDS", 2)
    monkeypatch.setattr(g03_independence, "KINDS", ("ridge",))
    if sabotage == "leak":
        monkeypatch.setattr(g03_independence, "views", leaked(planted.views))
    else:
        in_sample(monkeypatch)
    missed = judge(g03_independence, tmp_path)
    assert "R² of ridge" in missed and "centred cosine of ridge, absolute" in missed
    confirmed = {
        "share of seeds with a match significant at q",
        "share of seeds with a confirmed match",
    }
    assert (confirmed <= missed.keys()) is (sabotage == "leak")


SCORES = [f"{kind}_{what}" for kind in ("shared", "exclusive") for what in ("precision", "recall")]


@pytest.mark.parametrize(("low", "missed"), [(None, 0), *((name, 1) for name in SCORES)])
def test_g4_misses_any_low_median_of_batchtopk(low, missed, monkeypatch, tmp_path):
    def found(settings, config, seeds, *, directory):
        bad = settings.variant == "l1"
        medians = {name: 0.1 if bad or name == low else 0.9 for name in SCORES}
        lucky, unlucky = dict.fromkeys(SCORES, 1.0), dict.fromkeys(SCORES, 0.0)
        assert len(seeds) == g04_exclusive.SEEDS
        return [medians, lucky, unlucky, lucky | medians, unlucky | medians]

    monkeypatch.setattr(g04_exclusive, "ownership", found)
    assert len(judge(g04_exclusive, tmp_path)) == missed


@pytest.mark.soak
def test_g4_misses_shuffled_pairs(monkeypatch, tmp_path):
    def torn(config, seed):
        made = planted.views(config, seed)
        order = np.random.default_rng(seed).permutation(len(made))
        return dataclasses.replace(made, x=(made.x[0], made.x[1][order]))

    monkeypatch.setattr(ownership, "views", torn)
    monkeypatch.setattr(g04_exclusive, "SEEDS", 2)
    assert "BatchTopK: recall of shared features" in judge(g04_exclusive, tmp_path)


@pytest.mark.parametrize(
    ("right", "wrong", "lead", "missed"),
    [(8, 0, 0.05, 0), (7, 0, 0.05, 1), (8, 1, 0.05, 3), (8, 0, -0.01, 2)],
)
def test_g6_misses_too_few_and_the_wrong_ones(right, wrong, lead, missed, monkeypatch, tmp_path):
    """Of the directions ``wrong`` unlinked features transfer, and as many by either control."""
    names = (g06_causal.RUNG, "random", "shuffled")
    hits = {name: [11] * wrong for name in names} | {names[0]: [*range(right)] + [11] * wrong}
    rows = [{"direction": n, "feature": f, "transfers": True} for n in names for f in hits[n]]
    leads = {names[0]: lead, "random": -0.01, "shuffled": -0.01}
    summary = [
        {"direction": n, "effect": 0, "specific_random_low": at, "specific_shuffled_low": at}
        for n, at in leads.items()
    ]
    made = types.SimpleNamespace(mapped=names)
    monkeypatch.setattr(g06_causal, "plant", lambda **settings: None)
    monkeypatch.setattr(g06_causal, "_with_directions", lambda *arguments: made)
    monkeypatch.setattr(g06_causal, "transfer", lambda *arguments: (rows, summary))
    assert len(judge(g06_causal, tmp_path)) == missed


@pytest.mark.soak
def test_g6_misses_directions_of_the_wrong_feature(monkeypatch, tmp_path):
    monkeypatch.setattr(g06_causal, "TEXTS", 24)
    monkeypatch.setattr(g06_causal, "CONTEXTS", 8)
    true = g06_causal.mapped_directions
    monkeypatch.setattr(
        g06_causal, "mapped_directions", lambda *a, **k: np.roll(true(*a, **k), 2, axis=0)
    )
    missed = judge(g06_causal, tmp_path)
    assert any("linked features" in what for what in missed)
    assert any("lead over random" in what for what in missed)


def test_g5_misses_a_shifted_pairing(monkeypatch, tmp_path):
    smaller(monkeypatch, g05_pairing, documents=60)
    monkeypatch.setattr(g05_pairing, "TEXTS", 20)
    monkeypatch.setattr(pairing, "pair_many", late(pairing.pair_many))
    monkeypatch.setattr(planted, "pair_many", late(planted.pair_many))
    missed = judge(g05_pairing, tmp_path)
    assert len(missed) == 2
    assert "context gain of ridge on planted streams" in missed


@pytest.mark.parametrize(
    ("ridge", "mlp", "low", "missed"),
    [
        ((1.0, 0.8), (0.9, 0.9), 0.89, []),
        ((0.9, 0.8), (1.0, 0.9), 0.89, ["less R² of the network, linear truth"]),
        ((1.0, 0.8), (0.9, 0.9), 0.80, ["network less ridge, bent truth"]),
    ],
)
def test_g7_misses_the_wrong_winner(ridge, mlp, low, missed, monkeypatch, tmp_path):
    scores = iter(
        {
            "ridge": {"r2": ridge[i], "r2_high": ridge[i] + 0.01},
            "mlp": {"r2": mlp[i], "r2_low": low},
        }
        for i in (0, 1)
    )
    monkeypatch.setattr(g07_nonlinearity, "_scores", lambda *arguments: next(scores))
    found = judge(g07_nonlinearity, tmp_path)
    assert [what.partition(":")[0] for what in found] == missed


@pytest.mark.soak
def test_g7_misses_a_network_that_does_not_learn(monkeypatch, tmp_path):
    smaller(monkeypatch, g07_nonlinearity, rows=2000, documents=60)
    budget = {"steps": 5, "hidden": 16, "batch_size": 128}
    monkeypatch.setattr(g07_nonlinearity, "BUDGET", budget)
    (missed,) = judge(g07_nonlinearity, tmp_path)
    assert missed.startswith("network less ridge, bent truth")


def test_g8_misses_scores_in_sample(monkeypatch, tmp_path):
    monkeypatch.setattr(g08_reference_recipe, "WIDTH", 24)
    monkeypatch.setattr(g08_reference_recipe, "ROWS", 1200)
    recipe = {"hidden": 64, "steps": 200, "batch_size": 64, "dropout": 0.0}
    monkeypatch.setattr(g08_reference_recipe, "RECIPE", recipe)
    in_sample(monkeypatch)
    missed = judge(g08_reference_recipe, tmp_path)
    assert any("labels" in what for what in missed)


@pytest.mark.parametrize(
    ("trained", "untrained", "missed"), [(0.3, 0.0, 0), (0.19, 0.0, 2), (0.3, 0.06, 1)]
)
def test_g9_misses_too_little_and_too_much(trained, untrained, missed, monkeypatch, tmp_path):
    def gain(kind, store, work, source, target, site):
        value = untrained if "new" in (source, target) else trained
        return {"context_gain": value, "r2": 0, "n_rows": 1}

    monkeypatch.setattr(lab, "closed_form", gain)
    monkeypatch.setattr(real, "extracted", lambda config, directory: Workdir(directory))
    monkeypatch.setattr(g09_training, "_untrained", lambda name, folder, seed: str(folder))
    models_of = types.SimpleNamespace(models=("a", "b", "new"))
    monkeypatch.setattr(g09_training, "open_store", lambda directory: models_of)
    assert len(judge(g09_training, tmp_path)) == missed


@pytest.mark.soak
def test_g9_misses_models_that_were_never_trained(tiny, tmp_path):
    missed = judge(g09_training, tmp_path)
    assert len([what for what in missed if "to untrained" not in what]) == 2


@pytest.mark.parametrize(
    ("again", "other", "missed"),
    [
        ({}, {"dictionaries": "x", "maps": "x", "scores": "x"}, []),
        ({"maps": "x"}, {"dictionaries": "x", "maps": "x", "scores": "x"}, ["maps"]),
        ({}, {"dictionaries": "x", "maps": "x"}, ["of dictionaries, maps, scores"]),
    ],
)
def test_g10_misses_chance_and_seeds_that_change_nothing(
    again, other, missed, monkeypatch, tmp_path
):
    first = dict.fromkeys(("activations", "dictionaries", "maps", "scores"), "0")
    made = iter((first, first | again, first | other))
    (tmp_path / "gate/first/activations").mkdir(parents=True)
    monkeypatch.setattr(g10_determinism, "_bits", lambda seed, directory: next(made))
    found = judge(g10_determinism, tmp_path)
    assert [what.partition(":")[0] for what in found] == missed


def test_planted_stores_are_stores(tmp_path):
    made = planted.views(planted.PlantedConfig(rows=400, documents=20), seed=0)
    store = lab.write_store(made, tmp_path / "activations")
    splits = [store.select(s) for s in ("train", "validation", "test")]
    assert [len(s) for s in splits] == [280, 60, 60]
    for name, x in zip(store.models, made.x):
        read = store.read(name, lab.SITE, splits[2]).astype(np.float32)
        np.testing.assert_allclose(read, x[splits[2]], rtol=2**-8, atol=1e-6)
    documents = [set(store.rows.document[s]) for s in splits]
    assert not documents[0] & documents[2]
    assert maps.tasks(lab.planted_config(), store)
