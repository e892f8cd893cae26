"""The one trainer: members, parts, rows, meshes and kills that must not change what is learnt."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import planted_store
import pytest
from planted_store import PlantedStore, assert_close, gathered, planted_rows, run_steps, slow_but
from tiny_run import refused, slow

from crossdict_jax.config import SAEConfig, architectures
from crossdict_jax.dictionaries import train
from crossdict_jax.models import Site
from crossdict_jax.training import checkpoint, ensemble, loop
from crossdict_jax.training.ensemble import Objective, Stream, make_ensemble
from crossdict_jax.training.mesh import make_mesh

every = pytest.mark.parametrize("architecture", architectures())
STEPS, WIDTH = 6, 20


def small(architecture="topk", *, y=None, resident=None, group=slice(None), n=96, **sae):
    """Dictionaries at two sites, whose rows differ in size: parts of a batch differ in variance."""
    x = np.random.default_rng(0).normal(1.0, 1.0, (96, 6)) * np.linspace(0.3, 2, 96)[:, None]
    store = PlantedStore(x.astype(np.float32), sites=2, y=y)
    settings = {"width": WIDTH, "k": 3, "batch_size": 24, "dead_after_rows": 50, "steps": STEPS}
    settings |= {"l0_target": 4.0} if architecture == "jumprelu" else {}
    sae = SAEConfig(architecture=architecture, **settings | sae)
    everyone = train.members(sae, [("planted", site) for site in store.sites_of("planted")])
    return train.prepare(sae, store, everyone[group], np.arange(n), resident=resident)


def half_dead(state):
    silent = jnp.where(jnp.arange(WIDTH) < 8, 100, state["train"]["memory"])
    return state | {"train": state["train"] | {"memory": silent}}


@functools.cache
def stepped(architecture):
    return run_steps(small(architecture), STEPS, change=half_dead)


@slow_but("topk", "jumprelu")
def test_a_batch_in_parts_trains_as_in_one_piece(architecture, monkeypatch):
    parts = run_steps(small(architecture, accumulate=4), STEPS, change=half_dead)
    assert_close(parts, stepped(architecture), rtol=2e-4, atol=2e-5)
    if architecture not in ("topk", "jumprelu"):
        return
    # What this would miss: taking every part for a batch of its own, which is another one.
    monkeypatch.setattr(train.SparseObjective, "totals", lambda *_: None)
    alone, _ = run_steps(small(architecture, accumulate=4), STEPS, change=half_dead)
    change = np.abs(alone["params"]["W_enc"] - stepped(architecture)[0]["params"]["W_enc"]).max()
    assert change > 1e-3


def test_a_transcoders_parts_too():
    y = np.random.default_rng(1).normal(size=(96, 4)).astype(np.float32)
    both = (small("batchtopk", y=y, accumulate=n) for n in (1, 3))
    whole, parts = (run_steps(made, STEPS, change=half_dead) for made in both)
    assert_close(parts, whole, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("architecture", ["relu", slow("batchtopk")])
def test_members_train_as_if_alone(architecture):
    """Two sites, seeds and penalties or values of k together; each is what it would be alone."""
    sweep = {"relu": {"l1_coefficient": (1.0, 4.0)}, "batchtopk": {"learning_rate": (1e-3, 5e-3)}}
    many = {"seeds": 2, **sweep[architecture]}
    together, _ = run_steps(small(architecture, **many), STEPS, change=half_dead)
    for i in (0, 3, 7):
        alone = small(architecture, **many, group=slice(i, i + 1))
        alone, _ = run_steps(alone, STEPS, change=half_dead)
        member = jax.tree.map(lambda a, i=i: a[i : i + 1], together["params"])
        assert_close(member, alone["params"], atol=2e-5, rtol=0)
    decoders = together["params"]["W_dec"]
    assert min(np.abs(decoders[0] - decoders[i]).max() for i in (1, 2)) > 1e-4


def test_rows_on_the_host_train_to_the_same_dictionaries():
    host = small(resident=False)
    assert "data" not in host.feed.resident
    assert_close(run_steps(host, STEPS, change=half_dead), stepped("topk"), atol=2e-5, rtol=0)


OPTIONS = {  # architecture: settings, other than usual
    "relu": {"learning_rate": 1e-4, "l1_coefficient": 3.0, "steps": 60, "batch_size": 48}
    | {"matmul_dtype": "bfloat16"},
    "gated": {"l1_coefficient": 3.0},
    "topk": {"k": 4, "products": "lists", "dead_after_rows": 7},
    "jumprelu": {"l0_target": 2.0},
    "matryoshka": {"products": "lists", "nested_fractions": (0.3,)},
}


@pytest.mark.parametrize("architecture", OPTIONS)
def test_a_setting_changes_what_a_step_computes(architecture):
    program = planted_store.step_program
    plain = program(small(architecture))
    assert plain == program(small(architecture))
    for field, value in OPTIONS[architecture].items():
        steps = value if field == "steps" else STEPS
        assert plain != program(small(architecture, **{field: value}), steps), field


@pytest.mark.parametrize("dead_after_rows", [200, 10**6])
def test_auxk_revives_features_that_no_row_activates(dead_after_rows):
    x, _ = planted_rows(n=2000)
    sae = SAEConfig(width=48, k=2, batch_size=100, steps=120, dead_after_rows=dead_after_rows)
    store = PlantedStore(x)
    group = train.members(sae, [("planted", Site(0))])

    def silence(state):
        W_enc = state["params"]["W_enc"].at[:, :, :36].multiply(0.05)  # never among the k largest
        return state | {"params": state["params"] | {"W_enc": W_enc}}

    made = train.prepare(sae, store, group, np.arange(2000))
    state, metrics = run_steps(made, sae.steps, change=silence, chunk=10)
    silent = (state["train"]["memory"][0, :36] >= 2000).sum()
    assert silent < 20 if dead_after_rows == 200 else silent > 30
    assert (metrics["dead_fraction"].max() > 0.4) == (dead_after_rows == 200)


def fit(made, directory, **changes):
    how = {"steps": STEPS, "seed": 0, "checkpoint_every": 2, "title": "toy", "meta": {}}
    return loop.train(made, directory=directory, **how | changes)


@slow_but("topk", "jumprelu")
def test_killed_and_resumed_ends_with_the_same_bits(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(ensemble, "WINDOW", loop.BLOCK)  # of 96 rows
    made = small(architecture, resident=architecture == "jumprelu")
    whole = fit(made, tmp_path / "whole")
    planted_store.kill_in_save(3, lambda: fit(made, tmp_path / "killed"))
    assert checkpoint.latest_step(tmp_path / "killed" / "checkpoints") == 4
    assert_close(fit(made, tmp_path / "killed"), whole)


def test_the_choice_of_products_is_kept_with_the_checkpoint(tmp_path, monkeypatch):
    """A training goes on as it began, though another choice would be made by now."""
    sae = SAEConfig(width=WIDTH, k=3, steps=STEPS)

    def chosen(asked="auto"):
        settings = dataclasses.replace(sae, products=asked)
        shape = {"rows": 2**12, "width": 2**10, "k": 3, "members": 1}
        return train.with_products(settings, **shape, directory=tmp_path).products

    made, meta = small(), {"settings": {"products": chosen()}}
    fit(made, tmp_path, steps=2, meta=meta)
    monkeypatch.setattr(train, "fastest_products", lambda size, n: "dense")
    assert chosen() == meta["settings"]["products"] == "lists" and chosen("dense") == "dense"
    refused("sae.products=kernels needs a GPU; use auto", chosen, "kernels")
    monkeypatch.setattr(checkpoint, "load_meta", lambda path: {"settings": {"products": "kernels"}})
    refused("sae.products=kernels needs a GPU; this training began with them", chosen)


@pytest.mark.mesh
@pytest.mark.parametrize(("accumulate", "revived"), [(1, WIDTH // train.FEW), (3, WIDTH)])
@every
def test_no_device_gathers_rows(architecture, accumulate, revived):
    """Members and rows stay where they are: selection must not gather a sharded batch."""
    made = small(architecture, accumulate=accumulate)
    assert dict(made.mesh.shape) == {"member": 2, "data": 4}
    rows = 24 // accumulate
    shapes = gathered(made, STEPS, revived)
    assert not [s for s in shapes if f"{rows}," in s or f"{rows // 4},{WIDTH}" in s], shapes


@pytest.mark.mesh
@every
def test_another_mesh_changes_little(architecture, monkeypatch):
    spread, _ = run_steps(small(architecture, steps=10), 10, change=half_dead)
    one = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(ensemble, "make_mesh", one)
    alone, _ = run_steps(small(architecture, steps=10), 10, change=half_dead)
    assert_close(spread["params"], alone["params"], atol=1e-5, rtol=1e-5)


@pytest.mark.mesh
@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_parts_of_a_batch_on_several_devices_are_one_batch(architecture, devices, monkeypatch):
    some = functools.partial(make_mesh, devices=jax.devices()[:devices])
    monkeypatch.setattr(ensemble, "make_mesh", some)
    parts, whole = (small(architecture, accumulate=n, group=slice(1)) for n in (3, 1))
    assert dict(parts.mesh.shape) == {"member": 1, "data": devices}
    ours, theirs = (run_steps(made, STEPS, change=half_dead) for made in (parts, whole))
    assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.mesh
def test_rows_too_many_for_one_device_are_held_in_parts(monkeypatch):
    """In the same order, without a row that goes to all devices."""
    y = np.random.default_rng(1).normal(size=(96, 4)).astype(np.float32)
    whole = small(y=y, n=95)
    monkeypatch.setattr(ensemble, "device_memory", lambda: 5000)  # of 3,800 bytes of rows
    parts = small(y=y, n=95)
    rows = parts.feed.resident["data"]["rows"]
    assert {a.sharding.shard_shape(a.shape)[1] for a in rows.values()} == {24}
    shapes = gathered(parts, STEPS, WIDTH // train.FEW)
    assert not [s for s in shapes if "24," in s or "96," in s], shapes
    index = parts.feed.indices(0, 1)[0]
    batches = (jax.jit(made.feed.select)(made.feed.resident, index) for made in (parts, whole))
    assert_close(*map(jax.device_get, batches))
    monkeypatch.setattr(ensemble, "device_memory", lambda: 1000)
    assert "data" not in small(n=95).feed.resident


@pytest.mark.mesh
def test_a_batch_is_shared_by_as_many_devices_as_divide_it(capfd):
    assert dict(small(batch_size=26).mesh.shape) == {"member": 2, "data": 2}
    assert "sae.batch_size=26 is trained on 4 of 8 devices" in capfd.readouterr().out


class Walk(Objective):
    """One number that grows by its rate at every step, and is to stop at a target."""

    validate_every, patience, frozen = 2, 3, ("still",)

    def init(self, key, fixed):
        return {"w": jnp.zeros(()), "still": jnp.zeros(())}

    def optimizer(self, fixed):
        return optax.sgd(fixed["rate"])

    def loss(self, params, rows, context):
        return -(params["w"] + params["still"]) * rows["x"].mean(), ({}, ())

    def score(self, params, target, fixed):
        return jnp.minimum(jnp.abs(params["w"] - target), 1000.0)  # ties are not worse


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    rates = np.asarray([1.0, 1.0, 0.5], np.float32)
    how = {"fixed": {"id": np.arange(3, dtype=np.uint32), "rate": rates}, "seeds": (0, 0, 0)}
    how |= {"streams": {"x": Stream(np.ones((1, 8), np.float32), np.zeros(3, np.int32))}}
    how |= {"labels": ("turns", "goes on", "slow"), "batch_size": 4, "setting": "toy.batch_size"}
    made = make_ensemble(Walk(), validation=np.asarray([6.0, 1015.0, 3.0], np.float32), **how)
    directory = tmp_path_factory.mktemp("walk")
    return fit(made, directory, steps=30, checkpoint_every=10), directory, made


def test_the_parameters_of_the_best_validation_are_the_result(walked):
    best = {name: [float(m[name]) for m in walked[0]] for name in ("score", "step", "stale")}
    # Looked at after steps 0, 2, 4, ... and the last one: there w is 1, 3, 5, ..., and 30.
    assert [float(m["params"]["w"]) for m in walked[0]] == [5.0, 30.0, 2.5]
    assert best["score"] == [1.0, 985.0, 0.5] and best["step"] == [4, 29, 4]
    assert best["stale"] == [3, 0, 3]
    assert {float(m["params"]["still"]) for m in walked[0]} == {0.0}
    state, _ = run_steps(walked[2], 30)  # patience ends a member's updates, and nobody else's
    np.testing.assert_allclose(state["params"]["w"], [13.0, 30.0, 6.5])


def test_a_validated_training_resumes_with_the_same_bits(walked, tmp_path):
    made = walked[2]
    planted_store.kill_in_save(2, lambda: fit(made, tmp_path, steps=30, checkpoint_every=10))
    assert_close(fit(made, tmp_path, steps=30, checkpoint_every=10), walked[0])


def test_metrics_and_labels_of_all_members_are_kept(walked, tmp_path):
    _, directory, made = walked
    labels = [row["label"] for row in json.loads((directory / "members.json").read_text())]
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert labels == ["turns", "goes on", "slow"]
    assert [row["step"] for row in rows] == [9, 19, 29]
    assert {len(row[name]) for row in rows for name in ("loss", "validation")} == {3}
    pytest.importorskip("tensorboardX")
    fit(made, tmp_path, steps=2, records=("tensorboard",))
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    assert b"loss/goes on" in events.read_bytes()
