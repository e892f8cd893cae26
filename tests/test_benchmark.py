"""Benchmarks: turns, ratios, peers in processes of their own, quality; nothing is timed here."""

import importlib
import itertools
import math
import os
import sys

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import ROOT, refused

from crossdict_jax.benchmark import peer, run, saelens, workloads
from crossdict_jax.benchmark.harness import OURS, Bench, Spent
from crossdict_jax.benchmark.measurements import extraction, scaling, steps, whole
from crossdict_jax.benchmark.measurements import map as map_steps
from crossdict_jax.config import BenchmarkConfig, SAEConfig, measurements
from crossdict_jax.dictionaries.train import members, prepare
from crossdict_jax.errors import UserError
from crossdict_jax.training.loop import train
from crossdict_jax.workdir import Workdir, read_json, read_jsonl
from launch import command
from launch.benchmark import __main__ as script
from launch.benchmark import saelens as quality

DICTIONARY = {"d_model": 8, "width": 16, "k": 2, "batch_size": 32, "rows": 64}
TINY = {  # the sizes of every measurement
    "steps": (DICTIONARY, "float32", 1),
    "extraction": (3, 12, 2, "float32"),
    "map": ({"d_model": 8, "width": 16, "k": 2, "hidden": 8, "batch_size": 16}, 2),
    "scaling": (DICTIONARY | {"seeds": 1}, "float32", 1),
    "products": (DICTIONARY, (16,), "float32", 1),
    "rows": (80, 8, 16, 2),
    "growth": ((300,), (32,)),
}


@pytest.fixture
def tiny(monkeypatch):
    """Tiny sizes, no peers."""
    for variable in peer.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    for name, sizes in TINY.items():
        module = importlib.import_module(f"crossdict_jax.benchmark.measurements.{name}")
        monkeypatch.setitem(module.SIZES, "cpu", sizes)
    monkeypatch.setattr(extraction, "MODEL", tiny_run.SHAPES["a"])
    monkeypatch.setattr(extraction, "LAYERS", [0, 1])
    monkeypatch.setattr(steps, "ARCHITECTURES", ("topk",))
    monkeypatch.setattr(scaling, "POINTS", {"rows": (80,)})


def measured(name: str, tmp_path) -> list[dict]:
    """The rows of one benchmark; every number in them is finite."""
    config = BenchmarkConfig(benchmarks=(name,), repeats=2)
    rows = run.run_benchmarks(config, Workdir(tmp_path))["rows"]
    assert rows and {row["benchmark"] for row in rows} == {name}
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float)), row
        assert row.get("seconds", 1) > 0 and row.get("per_s", 1) > 0
    written = read_json(tmp_path / "results" / "benchmark.json")
    assert written["rows"] == rows and written["machine"]["versions"]["jax"] == jax.__version__
    assert f"**{name}**" in (tmp_path / "results" / "benchmark.md").read_text()
    return rows


def test_contenders_take_turns_and_the_first_run_does_not_count(tmp_path):
    ran = []

    def contender(name):
        return lambda count: ran.append(name) or Spent(len(ran) * count, 0)

    bench = Bench("toy", tmp_path, repeats=3)
    contenders = {name: contender(name) for name in "abc"}
    rows = bench.compare("turns", contenders, 1, count=2, reference="a")
    assert "".join(ran) == "abc" + "abc" + "cba" + "abc"
    assert [row["seconds"] for row in rows] == [18, 16, 14]  # 4 9 10, 5 8 11, 6 7 12


def test_ratios_are_taken_within_a_round(tmp_path):
    """A machine that is ten times slower in one round changes no ratio."""
    took = {OURS: iter([9.0, 1.0, 10.0, 1.0]), "theirs": iter([9.0, 2.0, 30.0, 4.0])}
    contenders = {n: lambda _, s=seconds: Spent(next(s), 2.0) for n, seconds in took.items()}
    bench = Bench("toy", tmp_path, repeats=3)
    ours, theirs = bench.compare("c", contenders, 8, about={"theirs": {"version": "1"}})
    assert (theirs["ratio"], theirs["ratio_low"], theirs["ratio_high"]) == (3.0, 2.0, 4.0)
    assert ours["ratio"] == 1.0 and ours["seconds"] == 1.0 and ours["per_s"] == 8.0
    assert theirs["cpu_ratio"] == 1.0 and theirs["version"] == "1" and "version" not in ours


def test_what_fails_keeps_its_rows_and_does_not_stop_the_others(tiny, tmp_path, monkeypatch):
    row = {"benchmark": "map", "case": "first", "contender": "ours", "seconds": 1.0}

    def fails(bench):
        yield row
        raise UserError("There is no more.")

    monkeypatch.setattr(map_steps, "benchmark", fails)
    monkeypatch.setattr(steps, "benchmark", lambda bench: iter([row | {"benchmark": "steps"}]))
    config = BenchmarkConfig(benchmarks=("map", "steps"), repeats=1)
    refused(r"^map failed: There is no more\.$", run.run_benchmarks, config, Workdir(tmp_path))
    written = read_json(tmp_path / "results" / "benchmark.json")
    assert written["rows"] == [row, row | {"benchmark": "steps"}]
    assert written["failed"] == {"map": "There is no more."}


def test_the_steps_that_are_timed_are_those_of_training(tmp_path):
    """The same parameters, bit for bit, as the loop leaves after as many steps."""
    rows = workloads.made_up_store(tmp_path / "store", 64, 8, seed=0)
    settings = {"width": 16, "k": 2, "batch_size": 32}
    timed = workloads.dictionary_steps(tmp_path / "store", **settings)
    timed.run(2)
    timed.run(3)
    sae = SAEConfig(steps=workloads.LONG, **settings)
    group = members(sae, [(workloads.MODEL, workloads.SITE)])
    ensemble = prepare(sae, rows, group, rows.select("train"))
    how = {"steps": 5, "seed": 0, "checkpoint_every": 5, "title": "toy", "meta": {}}
    (params,) = train(ensemble, directory=tmp_path / "run", **how)
    member = jax.tree.map(lambda a: a[0], timed.state["params"])
    jax.tree.map(np.testing.assert_array_equal, member, params)


def test_steps_are_measured_and_absent_peers_named(tiny, tmp_path, capsys):
    assert [row["contender"] for row in measured("steps", tmp_path)] == [OURS]
    printed = capsys.readouterr().out
    for library in steps.PEERS:
        assert f"{library} left out: {peer.VARIABLES[library]} is not set" in printed


@pytest.mark.slow
def test_each_measurement_has_its_rows(tiny, tmp_path, monkeypatch):
    rows = measured("scaling", tmp_path)
    assert [row["case"] for row in rows] == ["rows 80", "rows 80, on the host"]
    rows = measured("growth", tmp_path)
    assert [row["contender"] for row in rows][2:] == ["fit mlp", "score a map", "match features"]
    assert all(row["memory"] >= 0 for row in rows)
    rows = measured("extraction", tmp_path)
    assert [row["case"] for row in rows] == ["equal lengths", "mixed lengths"]
    assert [row["contender"] for row in measured("rows", tmp_path)] == [OURS, "rows alone"]
    kinds = [row["contender"] for row in measured("products", tmp_path)]
    assert kinds == ["dense", "lists", "kernels"]
    # Another checkout does the same in the same run.
    monkeypatch.setenv(peer.VARIABLES[peer.BASELINE], str(ROOT))
    ours, other = measured("map", tmp_path)
    assert ours["contender"] == OURS and other["contender"] == peer.BASELINE
    assert ours["case"] == other["case"] == "16 to 16" and other["version"]


def test_a_whole_run_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "MODELS", {})
    monkeypatch.setitem(whole.SIZES, "gpu", {"models": "nowhere,nowhere"})
    rows = whole.benchmark(Bench("whole", tmp_path, "gpu"))
    refused(r"The whole run failed \(.*'nowhere'", list, rows)


@pytest.mark.parametrize("library", steps.PEERS)
def test_each_peer_trains_on_the_same_rows(library, tmp_path):
    if not os.environ.get(peer.VARIABLES[library]):
        pytest.skip(f"{peer.VARIABLES[library]} is not set")
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(128, 16)).astype("f4"))
    np.save(tmp_path / "order.npy", np.arange(128).reshape(2, 64))
    with peer.Peer(library, steps.PEERS[library]) as other:
        for architecture in steps.ALONE.get(library, steps.ARCHITECTURES):
            about = other.make(folder=str(tmp_path), architecture=architecture, width=32, k=4)
            assert about["version"] and other.run(3).seconds > 0


COUNTER = """
def make(start):
    counted = [start]
    print("a library that talks")
    def run(count):
        counted[0] += count
        if counted[0] > 6:
            raise ValueError("too far")
    return run, {"version": "1", "started": start}
"""


def test_a_peer_does_what_it_is_told_until_it_fails(tmp_path, monkeypatch):
    monkeypatch.setenv(peer.VARIABLES["torch"], sys.executable)
    (tmp_path / "counter.py").write_text(COUNTER)
    with peer.Peer("torch", tmp_path / "counter.py") as other:
        assert other.make(start=4) == {"version": "1", "started": 4}
        assert other.make(start=0)["started"] == 0
        assert other.run(2).seconds >= 0 and other.run(4).cpu_seconds >= 0
        refused(r"torch failed \(ValueError: too far\)", other.run, 1)
        refused("torch failed", other.run, 1)


def test_the_command_refuses_what_it_does_not_know(tmp_path, capsys):
    given = ["benchmark", f"--workdir={tmp_path / 'run'}", "--config.benchmarks=luck"]
    assert command.execute(script.main, given, kind=BenchmarkConfig, default="benchmark") == 2
    told = capsys.readouterr().err
    assert f"benchmarks=luck: luck must be one of {', '.join(measurements())}" in told
    config = BenchmarkConfig(benchmarks=("whole",))
    words = "whole has no sizes for suite=cpu, only for gpu"
    refused(words, run.run_benchmarks, config, Workdir(tmp_path))


def test_the_table_sets_the_usual_rate_beside_their_best():
    row = {"model": "m", "site": "resid_pre.1", "width": 32, "k": 4, "steps": 10, "batch_size": 8}
    row |= {"n_rows": 50, "architecture": "relu"}
    scores = {OURS: ((0.01, 0.3),), "sae-lens": ((0.01, 0.35), (3e-4, 0.25))}
    found = [(library, *pair) for library, pairs in scores.items() for pair in pairs]
    keys = ("library", "learning_rate", "fvu_at_k")
    rows = [row | dict(zip(keys, values)) for values in found]
    rows += [r | {"architecture": "gated", "fvu_at_k": None} for r in rows]
    lines = [[cell.text for cell in line] for line in saelens.comparison(rows).rows]
    assert lines[0] == ["m resid_pre.1", "relu", "0.01", "0.300", "0.0003", "0.250", "0.050"]
    assert lines[1] == ["m resid_pre.1", "gated", "0.01", "–", "–", "–", "–"]


def test_without_the_peer_one_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(peer.VARIABLES["sae-lens"], raising=False)
    quality.main(None, Workdir(tmp_path))
    assert capsys.readouterr().out.startswith("skipped: CROSSDICT_SAELENS_PYTHON is not set")


@pytest.mark.slow
def test_both_libraries_on_the_same_rows(monkeypatch, tmp_path):
    """Where SAELens is not, a stand-in for it saves a dictionary of ours."""
    config = tiny_run.make_config(tmp_path)
    config.sae = SAEConfig(width=32, k=4, steps=4, batch_size=64)
    store, work = tiny_run.extracted(config, tmp_path / "run")
    if not os.environ.get(peer.VARIABLES["sae-lens"]):
        monkeypatch.setenv(peer.VARIABLES["sae-lens"], sys.executable)
        (tmp_path / "stand_in.py").write_text(STAND_IN)
        monkeypatch.setattr(saelens, "FILE", tmp_path / "stand_in.py")
    monkeypatch.setattr(saelens, "SHARES", (0.5, 1.0))
    monkeypatch.setattr(saelens, "ARCHITECTURES", ("relu", "topk"))
    rows = saelens.compare_saelens(config, store, work)
    both = set(itertools.product((OURS, "sae-lens"), saelens.ARCHITECTURES))
    assert {(r["library"], r["architecture"]) for r in rows} == both
    assert all(r["n_rows"] == rows[0]["n_rows"] and r["fvu"] > 0 for r in rows)
    assert read_jsonl(work.result("benchmark_saelens.jsonl")) == rows


STAND_IN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})

def make(folder, name, width, **settings):
    import jax, numpy as np
    from pathlib import Path
    from crossdict_jax import dictionaries
    from crossdict_jax.dictionaries.base import build
    d_model = np.load(Path(folder) / "rows.npy").shape[1]
    made = build("topk", d_model=d_model, width=width, k=4, key=jax.random.key(0))
    dictionaries.save_saelens(made, Path(folder) / name, hook_name="a", model_name="b")
    return None, {{"version": "stand-in"}}
"""
