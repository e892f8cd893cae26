"""The loop: recovery, exact resume, data order, damaged checkpoints."""

import dataclasses
import functools
import json
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from planted_store import assert_close, kill_in_save
from tiny_run import refused

from crossdict_jax.training import checkpoint, loop
from crossdict_jax.training.ensemble import Objective, Stream, make_ensemble
from crossdict_jax.training.loop import BLOCK, epoch_order, train
from crossdict_jax.training.mesh import DATA, MEMBER, from_bits, make_mesh, put, shard, to_bits

N, D = 96, 3
TRUTH = np.array([1.0, -2.0, 0.5], np.float32)
X = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


class Regression(Objective):
    """Noisy gradient descent on y = x w: a small model whose end depends on every step."""

    def __init__(self, poison_at=None):
        self.poison_at = poison_at

    def init(self, key, fixed):
        return {"w": jax.random.normal(key, (D,))}

    def optimizer(self, fixed):
        return optax.sgd(0.02, momentum=0.9)

    def loss(self, params, rows, context):
        x, noise = rows["x"], 1e-3 * jax.random.normal(context.key, (D,))
        loss = jnp.mean(jnp.square(x @ params["w"] - x @ TRUTH)) + noise @ params["w"]
        return jnp.where(context.number == self.poison_at, jnp.nan, loss), ({}, ())


def regression(**changes):
    how = {"fixed": {"id": np.zeros(1, np.uint32)}, "labels": ("one",), "seeds": (7,)}
    how |= {"streams": {"x": Stream(X[None], np.zeros(1, np.int64))}, "batch_size": 8}
    return make_ensemble(Regression(**changes), setting="toy.batch_size", **how)


def fit(directory, *, steps=130, every=40, meta=None, made=None, **changes):
    how = {"steps": steps, "seed": 3, "checkpoint_every": every, "title": "toy"}
    made = made or regression(**changes)
    return train(made, directory=directory, meta=meta or {}, **how)[0]


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [1, 3])
def test_killed_and_resumed_equals_never_stopped(tmp_path, number):
    whole = fit(tmp_path / "whole")
    kill_in_save(number, lambda: fit(tmp_path / "killed"))
    assert_close(fit(tmp_path / "killed"), whole)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_checkpoint_rhythm_changes_no_bit_and_what_is_finished_stays(tmp_path, monkeypatch):
    often, seldom = fit(tmp_path / "a", every=7), fit(tmp_path / "b", every=1000)
    assert_close(often, seldom)
    assert_close(fit(tmp_path / "a"), often)
    assert metrics(tmp_path / "a")[-1]["step"] == 129
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    kill_in_save(2, lambda: fit(tmp_path / "c", every=1000))
    assert checkpoint.latest_step(tmp_path / "c/checkpoints") == 50
    assert_close(fit(tmp_path / "c", every=1000), often)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    run, save, went_on = loop.Chunks.__call__, checkpoint.save, threading.Event()

    def chunk(self, state, first, count):
        result = jax.block_until_ready(run(self, state, first, count))
        return went_on.set() or result if first == 40 else result

    def slow(*args, **trees):
        assert went_on.wait(60)
        save(*args, **trees)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Chunks, "__call__", chunk)
        patch.setattr(checkpoint, "save", slow)
        fit(tmp_path / "a")
    assert checkpoint.latest_step(tmp_path / "a/checkpoints") == 40
    assert_close(fit(tmp_path / "a"), fit(tmp_path / "b"))


def test_a_save_leaves_what_is_not_a_checkpoint(tmp_path):
    for name in ("thesis/1", "2024.old/1", "3/params", "7.orbax-checkpoint-tmp-1/x"):
        (tmp_path / name).mkdir(parents=True)
    save = functools.partial(checkpoint.save, tmp_path, params={"w": np.zeros(1)})
    save(1)
    kept = {"thesis", "2024.old", "1", "1.sha256.json"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    refused("holds checkpoint 1 already", save, 0)
    (tmp_path / "2024/thesis").mkdir(parents=True)
    refused("2024 is no checkpoint, but named as one", save, 2)


def test_a_half_written_checkpoint_is_not_used(tmp_path):
    whole = fit(tmp_path / "a", steps=300)
    np.testing.assert_allclose(whole["w"], TRUTH, atol=0.01)
    fit(tmp_path / "b", steps=80)
    half = tmp_path / "b" / "checkpoints" / "120"
    (half / "params").mkdir(parents=True)
    (half / "params" / "garbage").write_text("cut short")
    assert_close(fit(tmp_path / "b", steps=300), whole)


@pytest.mark.parametrize("damage", [None, lambda data: data[:-1], lambda data: data + b"x"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    fit(tmp_path, steps=40)
    files = [p for p in (tmp_path / "checkpoints" / "40").rglob("*") if p.is_file()]
    victim = max(files, key=lambda p: p.stat().st_size)
    data = victim.read_bytes()
    victim.write_bytes(damage(data)) if damage else victim.unlink()
    assert str(victim) in refused("checksum", fit, tmp_path)


def test_other_settings_and_what_is_not_finite_are_refused(tmp_path):
    fit(tmp_path / "a", meta={"rate": 1}, steps=40)
    refused("other settings", fit, tmp_path / "a", meta={"rate": 2})
    refused("toy: loss is not finite at step 61", fit, tmp_path / "b", poison_at=61)


@pytest.mark.parametrize(("n", "window"), [(N, None), (20 * BLOCK + 7, 4 * BLOCK)])
def test_every_epoch_is_a_permutation_and_a_pure_function_of_position(n, window):
    order = functools.partial(epoch_order, n=n, window=window)
    whole = order(5, start=0, count=3 * n)
    for epoch in whole.reshape(3, n):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
    np.testing.assert_array_equal(order(5, start=50, count=2 * n), whole[50 : 2 * n + 50])
    assert (order(6, start=0, count=n) != whole[:n]).any()
    assert (whole[:n] != whole[n : 2 * n]).any()


def test_rows_in_a_window_are_shuffled_and_come_from_whole_blocks():
    n, window = 20 * BLOCK + 7, 4 * BLOCK
    epochs = epoch_order(5, start=0, count=2 * n, n=n, window=window).reshape(2, n) // BLOCK
    read = [[set(epoch[at : at + window]) for at in range(0, n, window)] for epoch in epochs]
    assert [len(blocks) for blocks in read[0]] == [4, 4, 4, 4, 4, 1] and read[0] != read[1]
    assert len(set(epochs[0, :BLOCK])) == 4  # mixed, not one block after another
    small = epoch_order(5, start=9, count=300, n=N, window=window)
    np.testing.assert_array_equal(small, epoch_order(5, start=9, count=300, n=N))


def test_rows_that_cannot_be_gathered_end_the_training(tmp_path):
    made = regression()

    def indices(first, count):
        if first >= 40:
            raise OSError("the disk is gone")
        return made.feed.indices(first, count)

    broken = dataclasses.replace(made, feed=dataclasses.replace(made.feed, indices=indices))
    with pytest.raises(OSError, match="the disk is gone"):
        fit(tmp_path, made=broken)
    assert checkpoint.latest_step(tmp_path / "checkpoints") == 40


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("members", "shape"), [(1, (1, 8)), (6, (2, 4)), (8, (8, 1)), (12, (4, 2)), (5, (1, 8))]
)
def test_members_take_devices_before_data_does(members, shape):
    mesh = make_mesh(members=members)
    assert (mesh.shape[MEMBER], mesh.shape[DATA]) == shape
    assert put(np.zeros((8, 2)), shard(mesh, DATA)).shape == (8, 2)


def test_memory_is_told_before_the_first_step_and_compiles_nothing_twice():
    made, key = regression(), jax.random.key(0)
    state, run = loop.initial(made, key), loop.Chunks(made, key, steps=130)
    held = run.memory(state)
    size = sum(a.nbytes for a in jax.tree.leaves(state)) + X.nbytes
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
    bits, index = jnp.asarray(to_bits(x)), np.asarray([0, 77, 4095])
    np.testing.assert_array_equal(from_bits(bits[index]), x[index].astype(np.float32))
    assert to_bits(x[:1].astype(np.float32)).dtype == np.float32

    def total(x, index):
        step = lambda i, sum_: sum_ + from_bits(x[index[i]]).sum()  # noqa: E731
        return jax.lax.fori_loop(0, 3, step, 0.0)

    temporary = jax.jit(total).lower(bits, index).compile().memory_analysis().temp_size_in_bytes
    assert temporary < x.nbytes / 8


def test_a_chunk_is_compiled_once_whatever_the_first_state_is_made_of():
    """A number without a dtype has a weak type, and what steps make of it a strong one."""
    made, key = regression(), jax.random.key(0)
    made.objective.init = lambda key, fixed: {"w": jnp.full(D, 0.0)}
    assert jax.eval_shape(made.init, key)["params"]["w"].weak_type
    run, state = loop.Chunks(made, key, steps=130), loop.initial(made, key)
    for first in (0, 2, 4):
        state, _ = run(state, first, 2)
    assert run.run._cache_size() == 1
