"""Faults of the machine and of others: each is told in one line, and the rerun ends the same."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
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


@pytest.fixture
def code_and_line(capfd):
    """(main, *arguments) -> the exit code of a command run here, and the one line on stderr."""

    def run(main, *arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        code = command.execute(main, ["test", "--models=a,b", *map(str, arguments)])
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == (code != 0)
        return code, *lines

    return run


def test_two_processes_do_not_share_a_directory(tmp_path, code_and_line):
    hold = "import sys, time; from pathlib import Path; from crossdict_jax.workdir import alone\n"
    hold += "with alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    where = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "run")], **where) as other:
        assert other.stdout.readline() == "held\n"
        code, line = code_and_line(print, f"--workdir={tmp_path}/run")
        assert code == 2 and f"Process {other.pid} on" in line and "is working in" in line
        (tmp_path / "run/.lock").write_bytes(b"Caf\xe9")  # whoever wrote that
        assert "Caf\ufffd is working in" in code_and_line(print, f"--workdir={tmp_path}/run")[1]
        other.kill()
    assert code_and_line(print, f"--workdir={tmp_path}/run") == (0,)  # the dead hold nothing


def test_a_directory_in_which_nothing_was_computed_takes_new_settings(tmp_path, code_and_line):
    def typo(config, work):
        (work.root / "activations").mkdir(exist_ok=True)
        raise UserError("text.source=typo.txt does not exist.")

    where, right = f"--workdir={tmp_path}/run", "--config.text.source=right.txt"
    assert code_and_line(typo, where, "--config.text.source=typo.txt")[0] == 2
    assert code_and_line(print, where, right) == (0,)
    workdir.write_json(tmp_path / "run/results/pairing.json", {})
    assert code_and_line(print, where, right) == (0,)
    code, line = code_and_line(print, where, "--config.text.source=other.txt")
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
    meta.write_bytes(before)
    flip(meta, b'"d_model": 16', b'"d_model": 17')
    refused(r"meta\.json is altered", open_store, work.activations)
    meta.write_text("{}")
    refused(r"rows-document\.npy is altered", open_store, work.activations)
    for file in (meta, work.timing, work.result("transfer.jsonl")):
        file.write_text("[]")
        read = workdir.read_jsonl if file.suffix == ".jsonl" else workdir.read_json
        refused(rf"{file.name} .*no JSON object", read, file)


def test_parts_that_a_stage_kept(tmp_path):
    stage = Stage(Workdir(tmp_path), "x", files=("transfer.jsonl",), inputs={})
    stage.part(("a",), lambda: 1)
    file = tmp_path / "results/x.parts.jsonl"
    file.write_bytes(file.read_bytes() + b'{"key": ["b"], "val')  # a kill cut it off
    again = Stage(Workdir(tmp_path), "x", files=("transfer.jsonl",), inputs={})
    assert [again.part((key,), lambda: 2) for key in "ab"] == [1, 2]
    flip(file, b'"key"', b'"key')
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


class Poisoned(Regression):
    """Its last update is not a number, while every loss is one."""

    def optimizer(self, fixed):
        poison = optax.scale_by_schedule(lambda count: jnp.where(count == 129, jnp.nan, 1.0))
        return optax.chain(super().optimizer(fixed), poison)


def test_an_update_that_is_not_finite_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("test_training.Regression", Poisoned)
        refused(r"toy: parameter \['w'\] is not finite after step 129", fit, tmp_path)
        assert [p.name for p in (tmp_path / "checkpoints").glob("*.json")] == ["120.sha256.json"]


WRITTEN = {"extract_activations": "activations", "train_saes": "dictionaries"}  # by every stage
WRITTEN |= {"train_hypernetworks": "maps", "evaluate": "results/transfer.jsonl"}
WRITTEN |= {"intervene": "results/causal.jsonl", "report": "report"}


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[str]:
    """The settings of a small run, its models and text in a folder of odd characters."""
    return tiny_run.small_flags(tmp_path_factory.mktemp("odd") / "a b'ü,;$(x)")


def start(name: str, work: Path, *arguments: str, before: list[str] = (), **how):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [*before, sys.executable, "-m", f"launch.{name}", f"--workdir={work}", *arguments]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, **pipes, **{"cwd": ROOT, "env": environment} | how)


def finish(process) -> tuple[int, str]:
    _, told = process.communicate()
    assert len(told.splitlines()) == (process.returncode > 0), told
    return process.returncode, told


def same_results(work: Path, other: Path) -> None:
    names = sorted(p.name for p in other.glob("results/*.jsonl"))
    assert len(names) > 8
    for name in names:
        assert (work / "results" / name).read_bytes() == (other / "results" / name).read_bytes()
    for folder in other.glob("dictionaries/*/*/seed-*"):
        both = (folder, work / folder.relative_to(other))
        dictionary, again = map(tiny_run.dictionaries.load, both)
        np.testing.assert_array_equal(dictionary.W_enc[...], again.W_enc[...])


@pytest.fixture(scope="module")
def undisturbed(asked, tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("run") / "undisturbed"
    assert finish(start("experiment", work, *asked)) == (0, "")
    return work


@pytest.mark.slow
def test_killed_at_random_moments_of_all_stages(asked, undisturbed, tmp_path):
    draw, work, kills = random.Random(KILLS), tmp_path / "killed", 0
    while True:
        process = start("experiment", work, *asked)
        try:
            process.wait(draw.uniform(3, 30) if kills < KILLS else None)
        except subprocess.TimeoutExpired:
            process.send_signal((signal.SIGKILL, signal.SIGTERM)[kills % 2])
            process.communicate()
            kills += 1
            continue
        assert finish(process) == (0, "")
        same_results(work, undisturbed)
        if kills >= KILLS:
            break
        shutil.rmtree(work)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "again"), WRITTEN.items())
def test_a_full_disk_loses_nothing(stage, again, undisturbed, tmp_path):
    work = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    shutil.rmtree(work / again) if (work / again).is_dir() else (work / again).unlink()
    limited = ["bash", "-c", 'ulimit -f 1; exec "$0" "$@"']
    code, told = finish(start(stage, work, before=limited))
    assert code == 2 and "free some" in told and finish(start(stage, work)) == (0, "")
    same_results(work, undisturbed)


@pytest.mark.slow
def test_a_read_only_run_can_be_looked_at(undisturbed, tmp_path):
    work = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    fixed = ["unshare", "-rm", "sh", "-c", mount, str(work)]
    if subprocess.run([*fixed, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    assert finish(start("report", work)) == (0, "")  # the page tells the folder's name
    for stage in WRITTEN:
        assert finish(start(stage, work, before=fixed)) == (0, ""), stage
    (work / "results/causal.jsonl").unlink()
    code, told = finish(start("intervene", work, before=fixed))
    assert code == 2 and "results cannot be written (Read-only file system)" in told


@pytest.mark.slow
def test_a_run_is_found_wherever_it_lies(undisturbed, tmp_path):
    """Moved, by a link, from another folder, without a home."""
    work, link = tmp_path / "moved, ü'$(x)", tmp_path / "link"
    shutil.copytree(undisturbed, work)
    link.symlink_to(work)
    (work / "results/causal.jsonl").unlink()
    (work / "results/transfer.jsonl").unlink()
    gone = ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
    bare = {k: v for k, v in os.environ.items() if k not in gone} | {"PYTHONPATH": str(ROOT)}
    assert finish(start("evaluate", link, cwd=tmp_path, env=bare)) == (0, "")
    assert finish(start("intervene", work, cwd="/", env=bare)) == (0, "")
    same_results(work, undisturbed)
