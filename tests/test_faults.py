"""Faults of the machine and of others: each is told in one line, and the rerun ends the same."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest
import tiny_run
from planted_store import assert_close
from test_training import Regression, fit, metrics
from tiny_run import ROOT, refused

from crossdict_jax import results, workdir
from crossdict_jax.activations.store import open_store
from crossdict_jax.errors import UserError
from crossdict_jax.training import loop
from crossdict_jax.training.stage import Stage, digest
from crossdict_jax.workdir import Workdir
from launch import command

KILLS = int(os.environ.get("CROSSDICT_KILLS", "2"))  # of the run that is killed at random moments


def ended(capfd, main, *arguments: str) -> tuple[int, str]:
    """The exit code of a command run here, and the one line on stderr."""
    capfd.readouterr()
    code = command.execute(main, ["test", "--models=a,b", *map(str, arguments)])
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == (code != 0)
    return code, *lines


def test_two_processes_do_not_share_a_directory(tmp_path, capfd):
    hold = "import sys, time; from pathlib import Path; from crossdict_jax.workdir import alone\n"
    hold += "with alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    where = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "run")], **where) as other:
        assert other.stdout.readline() == "held\n"
        code, line = ended(capfd, print, f"--workdir={tmp_path}/run")
        assert code == 2 and f"Process {other.pid} on" in line and "is working in" in line
        (tmp_path / "run/.lock").write_bytes(b"Caf\xe9")  # whoever wrote that
        assert "Caf\ufffd is working in" in ended(capfd, print, f"--workdir={tmp_path}/run")[1]
        other.kill()
    assert ended(capfd, print, f"--workdir={tmp_path}/run") == (0,)  # the dead hold nothing


def test_a_directory_in_which_nothing_was_computed_takes_new_settings(tmp_path, capfd):
    def typo(config, work):
        (work.root / "activations").mkdir(exist_ok=True)
        raise UserError("text.source=typo.txt does not exist.")

    where, right = f"--workdir={tmp_path}/run", "--config.text.source=right.txt"
    assert ended(capfd, typo, where, "--config.text.source=typo.txt")[0] == 2
    assert ended(capfd, print, where, right) == (0,)
    workdir.write_json(tmp_path / "run/results/pairing.json", {})
    assert ended(capfd, print, where, right) == (0,)
    code, line = ended(capfd, print, where, "--config.text.source=other.txt")
    assert code == 2 and "was made with other settings (text.source: right.txt there" in line


def test_a_finished_run_may_lie_where_nothing_can_be_written(tmp_path, monkeypatch):
    table = {"transfer.jsonl": [{"r2": 0.5}]}
    stage = Stage(Workdir(tmp_path), "x", files=table, inputs={})
    assert not stage.finished
    stage.finish(table)

    def read_only(*arguments, **settings):
        raise OSError(30, "Read-only file system", str(arguments[0]))

    monkeypatch.setattr(Path, "write_text", read_only)
    monkeypatch.setattr(os, "posix_fallocate", read_only)
    assert stage.finished
    results.write(stage.work, "transfer.jsonl", table["transfer.jsonl"])  # it says so already
    with pytest.raises(OSError, match=r"Read-only file system: '.*/transfer\.jsonl'"):
        results.write(stage.work, "transfer.jsonl", [])
    with pytest.raises(UserError, match=r"results cannot be written \(Read-only file system\)"):
        assert Stage(Workdir(tmp_path), "y", files=("y",), inputs={}).finished  # before any work
    monkeypatch.setattr(Path, "open", read_only)
    with workdir.alone(tmp_path):  # where nobody can write, nobody is kept out
        assert not (tmp_path / workdir.LOCK).exists()


def flip(file: Path, before: bytes, after: bytes) -> None:
    data = file.read_bytes()
    assert before in data
    file.write_bytes(data.replace(before, after, 1))


def test_a_changed_digit_is_noticed(tmp_path_factory):
    _, work = tiny_run.private_run(tmp_path_factory)
    results.write(work, "transfer.jsonl", [{"r2": 0.25}])
    flip(work.result("transfer.jsonl"), b"0.25", b"0.35")
    refused(r"transfer\.jsonl is altered or cut short", results.read, work, "transfer.jsonl")
    meta = work.activations / "meta.json"
    before, whole = meta.read_bytes(), workdir.read_json(meta)
    del whole["seal"]
    whole["checksums"] = {k: v for k, v in whole["checksums"].items() if "shard" not in k}
    workdir.write_json(meta, whole | {"seal": digest(whole)})
    store = open_store(work.activations)
    where = *next(iter(store.ends.writes)), store.select("train")
    refused(r"meta\.json is damaged .*KeyError", store.read, *where)
    refused(r"has the rows 0 to \d+, not -1", store.read, *where[:2], [3, -1])
    refused(r"A mask of the rows of .* long, not 2", store.read, *where[:2], [True, False])
    refused("no split 'tests'; use train", store.select, "tests")
    store.meta["models"][where[0]]["d_model"] = 2**40  # which no memory holds
    store.meta["checksums"] = workdir.parse_json(before)["checksums"]
    refused(r"shard.* is damaged .*16 wide, not 1099511627776", store.read, *where)
    meta.write_bytes(before)
    flip(meta, b'"d_model": 16', b'"d_model": 17')
    refused(r"meta\.json is altered", open_store, work.activations)
    meta.write_text("{}")
    refused(r"rows-document\.npy is altered", open_store, work.activations)
    for file in (meta, work.timing, work.result("transfer.jsonl")):
        file.write_text("[]")
        read = workdir.read_jsonl if file.suffix == ".jsonl" else workdir.read_json
        refused(rf"{file.name} .*no JSON object", read, file)


def test_damaged_parts_that_a_stage_kept_are_named(tmp_path):
    stage = Stage(Workdir(tmp_path), "x", files=("transfer.jsonl",), inputs={})
    assert [stage.part((key,), lambda: 1) for key in "ab"] == [1, 1]
    flip(tmp_path / "results/x.parts.jsonl", b'"key"', b'"key')
    again = Stage(Workdir(tmp_path), "x", files=("transfer.jsonl",), inputs={})
    refused(r"x\.parts\.jsonl is damaged .*; delete it and run", again.part, ("a",), print)


def test_a_training_that_is_told_to_stop_saves_and_goes_on_the_same(tmp_path, monkeypatch):
    undisturbed, run = fit(tmp_path / "a", every=1000), loop.Chunks.__call__

    def interrupted(self, state, first, count):
        if first == 50:
            os.kill(os.getpid(), signal.SIGTERM)
        return run(self, state, first, count)

    monkeypatch.setattr(loop.Chunks, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", every=1000)
    assert (tmp_path / "b/checkpoints/100.sha256.json").exists()
    monkeypatch.undo()
    assert_close(fit(tmp_path / "b", every=1000), undisturbed)
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")


def test_an_update_that_is_not_finite_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """The last update is not a number, while every loss is one."""
    poison = optax.scale_by_schedule(lambda count: jnp.where(count == 129, jnp.nan, 1.0))
    poisoned = optax.chain(Regression().optimizer({}), poison)
    monkeypatch.setattr(Regression, "optimizer", lambda self, fixed: poisoned)
    refused(r"toy: parameter \['w'\] is not finite after step 129", fit, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").glob("*.json")] == ["120.sha256.json"]


@pytest.mark.slow
def test_no_fault_of_the_machine_loses_a_bit():
    """Every fault of the table once, and some kills, in a process that has not started JAX."""
    table = [sys.executable, "tests/fault_table.py", f"--kills={KILLS}", "--times=1"]
    done = subprocess.run(table, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
