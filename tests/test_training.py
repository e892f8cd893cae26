"""The loop: recovery, exact resume, data order, damaged checkpoints."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from crossdict_jax.errors import UserError
from crossdict_jax.training import checkpoint, loop
from crossdict_jax.training.loop import Feed, Trainable, epoch_order, train
from crossdict_jax.training.mesh import DATA, MEMBER, from_bits, make_mesh, put, shard, to_bits

N, D = 96, 3
TRUTH = np.array([1.0, -2.0, 0.5], np.float32)
X = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


class Killed(Exception):
    pass


def regression(*, batch=8, poison_at=None):
    """Noisy gradient descent on y = x w: a small model whose end depends on every step."""

    def init(key):
        return {"params": {"w": jax.random.normal(key, (D,))}, "train": {"momentum": jnp.zeros(D)}}

    def step(state, x, number, key):
        def loss_of(w):
            return jnp.mean(jnp.square(x @ w - x @ jnp.asarray(TRUTH)))

        loss, gradient = jax.value_and_grad(loss_of)(state["params"]["w"])
        if poison_at is not None:
            loss = jnp.where(number == poison_at, jnp.nan, loss)
        noise = 1e-3 * jax.random.normal(key, (D,))
        momentum = 0.9 * state["train"]["momentum"] + gradient + noise
        w = state["params"]["w"] - 0.02 * momentum
        return {"params": {"w": w}, "train": {"momentum": momentum}}, {"loss": loss}

    def indices(first, count):
        order = epoch_order(7, start=first * batch, count=count * batch, n=N)
        return order.reshape(count, batch)

    return Trainable(init, step), Feed(jnp.asarray(X), indices, lambda rows, i: rows[i])


def fit(directory, *, steps=130, every=40, meta=None, **kwargs):
    trainable, feed = regression(**kwargs)
    return train(
        trainable,
        feed=feed,
        steps=steps,
        seed=3,
        directory=directory,
        checkpoint_every=every,
        title="toy",
        meta=meta,
    )


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_recovers_the_planted_weights(tmp_path):
    np.testing.assert_allclose(fit(tmp_path, steps=300)["params"]["w"], TRUTH, atol=0.01)


@pytest.mark.parametrize("killed_in_save", [1, 2, 3])
def test_killed_and_resumed_equals_never_stopped(tmp_path, monkeypatch, killed_in_save):
    whole = fit(tmp_path / "whole")
    save, saves = checkpoint.save, []

    def dying(*args, **kwargs):
        saves.append(1)
        if len(saves) == killed_in_save:
            raise Killed
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(Killed):
        fit(tmp_path / "killed")
    monkeypatch.setattr(checkpoint, "save", save)
    resumed = fit(tmp_path / "killed")
    np.testing.assert_array_equal(resumed["params"]["w"], whole["params"]["w"])
    np.testing.assert_array_equal(resumed["train"]["momentum"], whole["train"]["momentum"])
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_checkpoint_rhythm_changes_no_bit(tmp_path):
    often, seldom = fit(tmp_path / "a", every=7), fit(tmp_path / "b", every=1000)
    np.testing.assert_array_equal(often["params"]["w"], seldom["params"]["w"])


def test_a_finished_run_trains_nothing_more(tmp_path):
    first = fit(tmp_path)
    again = fit(tmp_path)
    np.testing.assert_array_equal(first["params"]["w"], again["params"]["w"])
    assert metrics(tmp_path)[-1]["step"] == 129


def test_a_half_written_checkpoint_is_not_used(tmp_path):
    whole = fit(tmp_path / "a")
    fit(tmp_path / "b", steps=80)
    half = tmp_path / "b" / "checkpoints" / "120"
    half.mkdir()
    (half / "garbage").write_text("cut short")
    np.testing.assert_array_equal(fit(tmp_path / "b")["params"]["w"], whole["params"]["w"])


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    fit(tmp_path, steps=40)
    files = [p for p in (tmp_path / "checkpoints" / "40").rglob("*") if p.is_file()]
    victim = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(data[:-1])
    elif damage == "alter":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    else:
        victim.unlink()
    with pytest.raises(UserError, match="checksum") as error:
        fit(tmp_path)
    assert str(victim) in str(error.value) and "\n" not in str(error.value)


def test_other_settings_are_refused(tmp_path):
    fit(tmp_path, meta={"rate": 1}, steps=40)
    with pytest.raises(UserError, match="other settings"):
        fit(tmp_path, meta={"rate": 2})


def test_not_finite_names_step_and_metric(tmp_path):
    with pytest.raises(UserError, match="toy: loss is not finite at step 61"):
        fit(tmp_path, poison_at=61)


def test_every_epoch_is_a_permutation_and_a_pure_function_of_place():
    whole = epoch_order(5, start=0, count=3 * N, n=N)
    for epoch in whole.reshape(3, N):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(N))
    np.testing.assert_array_equal(epoch_order(5, start=50, count=100, n=N), whole[50:150])
    assert (epoch_order(6, start=0, count=N, n=N) != whole[:N]).any()


@pytest.mark.mesh
def test_parameters_restore_alone_onto_another_mesh(tmp_path):
    params = {"W": np.arange(32.0, dtype=np.float32).reshape(8, 4)}
    checkpoint.save_module(tmp_path / "m", params, {"kind": "toy"})
    mesh = make_mesh(members=8)
    layout = shard(mesh, MEMBER)
    abstract = {"W": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=layout)}
    W = checkpoint.load_params(tmp_path / "m", abstract)["W"]
    assert W.sharding == layout
    np.testing.assert_array_equal(W, params["W"])
    assert checkpoint.load_meta(tmp_path / "m")["kind"] == "toy"


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("members", "shape"), [(1, (1, 8)), (6, (2, 4)), (8, (8, 1)), (12, (4, 2)), (5, (1, 8))]
)
def test_members_take_devices_before_data_does(members, shape):
    mesh = make_mesh(members=members)
    assert (mesh.shape[MEMBER], mesh.shape[DATA]) == shape
    assert put(np.zeros((8, 2)), shard(mesh, DATA)).shape == (8, 2)


def test_memory_is_told_before_the_first_step_and_compiles_nothing_twice():
    (trainable, feed), key = regression(), jax.random.key(0)
    run, state = loop.Chunks(trainable, feed, key), loop.initial(trainable, key)
    held = run.memory(state)
    size = sum(a.nbytes for a in jax.tree.leaves((state, feed.resident)))
    assert size < held < size + 1_000_000
    compiled = []

    def listen(event, *_, **__):
        compiled.extend([event] * ("backend_compile" in event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    state, _ = run(state, 0, 2)
    assert not compiled
    jax.jit(lambda x: x + 17.25)(state["params"]["w"])
    assert compiled  # so the listener hears
    jax.monitoring.unregister_event_duration_listener(listen)


def test_rows_are_gathered_as_they_are_stored():
    """The rows of a store to the bit, without a copy of all that grows with their number."""
    x = np.random.default_rng(0).normal(size=(4096, 64)).astype(ml_dtypes.bfloat16)
    x[0, :3] = np.inf, -0.0, 1e-39
    there, places = jnp.asarray(to_bits(x)), np.asarray([0, 77, 4095])
    np.testing.assert_array_equal(from_bits(there[places]), x[places].astype(np.float32))
    assert to_bits(x[:1].astype(np.float32)).dtype == np.float32

    def total(x, places):
        step = lambda i, sum_: sum_ + from_bits(x[places[i]]).sum()  # noqa: E731
        return jax.lax.fori_loop(0, 3, step, 0.0)

    temporary = jax.jit(total).lower(there, places).compile().memory_analysis().temp_size_in_bytes
    assert temporary < x.nbytes / 8


def test_a_chunk_is_compiled_once_whatever_the_first_state_is_made_of(monkeypatch):
    """A number without a dtype has a weak type, and what steps make of it a strong one."""
    trainable, feed = regression()

    def weak(key):
        return trainable.init(key) | {"train": {"momentum": jnp.full(D, 0.0)}}

    assert jax.eval_shape(weak, jax.random.key(0))["train"]["momentum"].weak_type
    programs, original = [], loop._compile
    monkeypatch.setattr(loop, "_compile", lambda *a: programs.append(original(*a)) or programs[-1])
    run = loop.Chunks(Trainable(weak, trainable.step), feed, jax.random.key(0))
    state = loop.initial(Trainable(weak, trainable.step), jax.random.key(0))
    for first in (0, 2, 4):
        state, _ = run(state, first, 2)
    assert programs[0]._cache_size() == 1
