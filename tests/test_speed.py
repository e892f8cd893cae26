"""The benchmarks of speed: turns, ratios, peers in processes of their own; nothing is timed."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from test_launch import launch

from crossdict_jax import dictionaries, modules
from crossdict_jax.benchmark import documents, harness, machine, peer, startup, steps, table, whole
from crossdict_jax.benchmark.harness import Need, Spent, alternate, compared
from crossdict_jax.benchmark.rows import MODEL, SITE, make_store
from crossdict_jax.benchmark.run import run_benchmarks
from crossdict_jax.benchmark_config import (
    BenchmarkConfig,
    CeilingBenchmark,
    DocumentBenchmark,
    EnsembleBenchmark,
    ExtractionBenchmark,
    MapBenchmark,
    MemoryBenchmark,
    ScalingBenchmark,
    StepBenchmark,
    StoreBenchmark,
    WholeBenchmark,
)
from crossdict_jax.config import SAEConfig, TextConfig
from crossdict_jax.config.settings import put, validate
from crossdict_jax.dictionaries.train import members, prepare
from crossdict_jax.errors import UserError
from crossdict_jax.training.loop import train
from crossdict_jax.workdir import Workdir, read_json

CEILINGS = {"float32": 1e9, "copy": 1e9}


def tiny_config(*benchmarks: str) -> BenchmarkConfig:
    return BenchmarkConfig(
        benchmarks=benchmarks,
        repeats=2,
        ceilings=CeilingBenchmark(matmul_size=32, copy_bytes=4096),
        steps=StepBenchmark(
            architectures=("relu", "topk"), d_model=8, width=16, k=2, batch_size=32, rows=64
        ),
        extraction=ExtractionBenchmark(
            n_layers=3,
            d_model=16,
            n_heads=2,
            vocab_size=50,
            layers=(1, 2),
            windows=3,
            window_tokens=12,
            batch_size=2,
        ),
        map=MapBenchmark(d_model=8, width=16, k=2, hidden=8, batch_size=16),
        store=StoreBenchmark(rows=100, d_model=8),
        ensemble=EnsembleBenchmark(
            members=3, d_model=8, width=16, k=2, batch_size=16, rows=32, steps=1
        ),
        scaling=ScalingBenchmark(
            d_model=8,
            width=8,
            k=2,
            batch_size=16,
            rows=32,
            widths=(4,),
            d_models=(4,),
            ks=(),
            batch_sizes=(),
            members=(2,),
            store_rows=(40,),
        ),
        memory=MemoryBenchmark(
            architectures=("relu",), d_model=8, k=2, batch_size=16, widths=(128,)
        ),
        documents=DocumentBenchmark(documents=20, times=(1, 2), bytes=200),
    )


@pytest.fixture
def no_peers(monkeypatch):
    for variable in peer.PYTHONS.values():
        monkeypatch.delenv(variable, raising=False)


def measured(name: str, tmp_path) -> list[dict]:
    """The rows of one benchmark at a tiny size; every number in them is finite."""
    rows = run_benchmarks(tiny_config(name), Workdir(tmp_path))["rows"]
    assert rows and {row["benchmark"] for row in rows} == {name}
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float)), row
        assert row.get("seconds", 1) > 0 and row.get("per_s", 1) > 0
    written = read_json(tmp_path / "results" / "benchmark.json")
    assert written["rows"] == rows and written["machine"]["versions"]["jax"] == jax.__version__
    assert f"**{name}**" in (tmp_path / "results" / "benchmark.md").read_text()
    return rows


# ---------------------------------------------------------------- turns and ratios


def test_contenders_take_turns_and_the_first_run_does_not_count():
    ran = []

    def contender(name):
        return lambda: ran.append(name) or Spent(len(ran), 0)

    spent = alternate({name: contender(name) for name in "abc"}, repeats=3)
    assert "".join(ran) == "abc" + "abc" + "cba" + "abc"
    turns = {name: [run.seconds for run in runs] for name, runs in spent.items()}
    assert turns == {"a": [4, 9, 10], "b": [5, 8, 11], "c": [6, 7, 12]}


def test_ratios_are_taken_within_a_round():
    """A machine that is ten times slower in one round changes no ratio."""
    took = {"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 30.0, 4.0]}
    spent = {name: [Spent(s, 2.0) for s in seconds] for name, seconds in took.items()}
    need = Need(8, "rows", flops=5e8, bytes=1e9)
    ours, theirs = compared("b", "c", spent, need, ceilings=CEILINGS)
    assert (theirs["ratio"], theirs["ratio_low"], theirs["ratio_high"]) == (3.0, 2.0, 4.0)
    assert ours["ratio"] == 1.0 and ours["seconds"] == 1.0 and ours["per_s"] == 8.0
    assert (theirs["cpu_seconds"], theirs["cpu_ratio"]) == (2.0, 1.0)
    assert (ours["flop_fraction"], ours["byte_fraction"]) == (0.5, 1.0)
    nothing = next(compared("b", "c", spent, Need(8), ceilings=CEILINGS))
    assert nothing["flop_fraction"] is None and nothing["flops"] is None


def test_ceilings_are_measured_for_every_dtype():
    config = CeilingBenchmark(matmul_size=16, copy_bytes=4096, dtypes=("float32", "bfloat16"))
    found = machine.ceilings(config, repeats=1)
    assert found.keys() == {"float32", "bfloat16", "copy", "host_copy"}
    assert all(value > 0 for value in found.values())


def test_work_apart_tells_its_memory():
    size = 300_000_000
    nothing, least = harness.apart(bytes, 1)
    kept, most = harness.apart(_length_of_zeros, size)
    assert nothing == b"\0" and kept == size
    assert 0.5 * size < most - least < 1.5 * size


def _length_of_zeros(size: int) -> int:
    return len(np.ones(size, np.int8))


@pytest.mark.parametrize(
    ("value", "text"), [(1234, "1.23 k"), (0.005, "5 m"), (2e-6, "2 µ"), (3.5e13, "35 T")]
)
def test_numbers_are_short(value, text):
    assert table.si(value) == text


def test_what_fails_keeps_its_rows_and_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    row = {"benchmark": "map", "case": "first", "contender": "ours", "seconds": 1.0}

    def fails(config, folder, ceilings):
        yield row
        raise UserError("There is no more.")

    monkeypatch.setattr("crossdict_jax.benchmark.map.benchmark", fails)
    with pytest.raises(UserError, match=r"^map failed: There is no more\.$"):
        run_benchmarks(tiny_config("map", "store"), Workdir(tmp_path))
    written = read_json(tmp_path / "results" / "benchmark.json")
    assert written["rows"][0] == row and written["rows"][1]["benchmark"] == "store"
    assert written["failed"] == {"map": "There is no more."}


# ---------------------------------------------------------------- steps of dictionaries


def test_steps_are_measured_without_any_peer(no_peers, tmp_path, capsys):
    rows = measured("steps", tmp_path)
    assert [(r["case"], r["contender"]) for r in rows] == [
        ("relu", "ours"),
        ("relu, 2 active a row", "ours"),
        ("topk", "ours"),
        ("ours", "relu"),
        ("ours", "topk"),
    ]
    fresh, few, topk, *_ = rows
    assert fresh["l0"] > 5 and abs(few["l0"] - 2) < 0.7 and topk["l0"] == 2
    assert few["flops"] == topk["flops"] < fresh["flops"]
    printed = capsys.readouterr().out
    for library in steps.PEERS:
        assert f"{library} left out: {peer.PYTHONS[library]} is not set" in printed


def test_the_steps_that_are_timed_are_those_of_training(tmp_path):
    """The same parameters, bit for bit, as the loop leaves after as many steps."""
    store = make_store(tmp_path / "store", 64, 8, seed=0)
    sae = SAEConfig(width=16, k=2, batch_size=32, steps=5)
    timed = steps.dictionary_steps(sae, store)
    timed.run(2)
    timed.run(3)
    ensemble = prepare(sae, store, members(sae, [(MODEL, SITE)]), store.select("train"))
    state = train(
        ensemble.trainable,
        feed=ensemble.feed,
        steps=5,
        seed=0,
        directory=tmp_path / "run",
        checkpoint_every=5,
        what="toy",
        state_shardings=ensemble.by_member,
    )
    jax.tree.map(np.testing.assert_array_equal, timed._state, state)


def test_flops_are_counted_from_the_maths():
    relu = SAEConfig(architecture="relu", width=64, k=4, batch_size=8)
    topk = dataclasses.replace(relu, architecture="topk")
    assert steps.need(relu, 16, steps=3).flops == 3 * 10 * 8 * 16 * 64
    assert steps.need(topk, 16, steps=1, count=2).flops == 2 * (2 * 8 * 16 * 64 + 8 * 8 * 16 * 4)
    assert steps.need(relu, 16, steps=1, l0=5).flops == 2 * 8 * 16 * 64 + 8 * 8 * 16 * 5
    assert steps.need(topk, 16, steps=2).amount == 2 * 8


def test_layers_are_read_as_torch_reads_them(tmp_path):
    """Where torch is, its activations are ours up to bfloat16; where not, ours stands alone."""
    rows = measured("extraction", tmp_path)
    assert {row["case"] for row in rows} == {"equal lengths", "mixed lengths"}
    others = [row for row in rows if row["contender"] != "ours"]
    assert len(others) == (4 if os.environ.get(peer.PYTHONS["torch"]) else 0)
    assert all(row["difference"] < 2**-8 for row in others)


def test_the_map_is_measured(tmp_path):
    first, *others = measured("map", tmp_path)
    assert first["contender"] == "ours" and first["case"] == "16 to 16"
    assert len(others) == bool(os.environ.get(peer.PYTHONS["torch"]))


def test_the_store_is_read_beside_a_copy(tmp_path):
    rows = measured("store", tmp_path)
    assert [row["contender"] for row in rows] == 3 * ["ours", "numpy copy"]
    assert all(row["bytes"] == 2 * 100 * 8 * 2 for row in rows)


COUNT_HITS = """if True:
    import atexit, runpy, sys
    from jax import monitoring
    hits = []
    monitoring.register_event_listener(lambda event, **_: hits.append("cache_hits" in event))
    atexit.register(lambda: print("hits", sum(hits)))
    sys.argv = sys.argv[1:]
    runpy.run_module("launch.train_saes", run_name="__main__")
"""


def test_a_second_run_finds_its_programs_compiled(tmp_path, monkeypatch):
    """And ends with the same bits."""
    make_store(tmp_path / "store", 256, 32, seed=0)
    hits, trained = [], []
    for name in ("first", "again"):
        monkeypatch.setattr(startup, "command", partial(count_hits, hits))
        startup.train_once(tmp_path, name, cache=tmp_path / "cache")
        dictionary = dictionaries.load(Workdir(tmp_path / name).dictionary(MODEL, SITE))
        trained.append(modules.split(dictionary)[1])
    assert hits[0] == 0 and hits[1] > 0
    assert any((tmp_path / "cache" / "crossdict_jax" / "jax").iterdir())
    jax.tree.map(np.testing.assert_array_equal, *trained)


def count_hits(hits: list[int], arguments: list[str], cache) -> None:
    """In place of ``startup.command``: the same, with the cache's hits counted."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(startup.ROOT)}
    program = [sys.executable, "-c", COUNT_HITS, "train_saes", *arguments[2:]]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hits.append(int(done.stdout.split("hits")[-1]))


def test_an_ensemble_is_measured_beside_its_members(tmp_path):
    together, alone = measured("ensemble", tmp_path)
    assert together["case"] == "3 of width 16" and alone["contender"] == "one after another"
    assert together["flops"] == alone["flops"] == 3 * 10 * 16 * 8 * 16


def test_the_whole_run_is_of_the_exact_architectures():
    from test_presets import ARCHITECTURES

    assert [shape for _, shape in whole.shapes(WholeBenchmark())] == list(ARCHITECTURES.values())


def test_a_whole_run_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match=r"The whole run failed \(.*'nowhere'"):
        whole._run(tmp_path, ["nowhere", "nowhere"], WholeBenchmark())


def test_rows_of_a_whole_run_are_times_alone():
    row = {"case": "all stages", "contender": "ours", "seconds": 80.0}
    assert table.text([row]).split() == [
        "case",
        "contender",
        "time",
        "all",
        "stages",
        "ours",
        "80",
        "s",
    ]


def test_growth_is_measured_against_the_base(tmp_path):
    rows = measured("scaling", tmp_path)
    assert [row["case"] for row in rows] == [
        "width 4",
        "d_model 4",
        "members 2",
        "store rows 40",
        "store rows 40, on the host",
    ]
    assert rows[2]["flops"] == 2 * 16 * (2 * 8 * 8 + 8 * 8 * 2)


def test_memory_is_measured_beside_its_prediction(tmp_path):
    (row,) = measured("memory", tmp_path)
    assert row["case"] == "relu, width 128"
    state, rows = 3 * 4 * (2 * 8 * 128 + 128 + 8), 4 * 16 * 128  # two moments beside parameters
    assert state + 2 * rows < row["predicted"] < row["bound"]


def test_documents_are_read_in_two_amounts(tmp_path):
    few, many = measured("documents", tmp_path)
    assert few["ratio"] == 1 and many["case"].startswith("40 documents of 200 bytes")
    assert many["rows"] > 1.5 * few["rows"] and many["index"] > 30 * many["rows"]
    assert few["growth"] is None and many["growth"] is not None


def test_the_fewest_documents_fill_shards_and_batches(tmp_path):
    own = DocumentBenchmark(batch_size=3, shard_windows=5)
    asked = documents.settings(tmp_path, 20, own).extract
    assert (asked.batch_size, asked.shard_windows) == (3, 5)
    own, least = DocumentBenchmark(), 300  # tokens of a document: 600 bytes of made-up words
    windows = own.documents * least // TextConfig().window_tokens
    assert windows >= own.batch_size and own.times[0] == 1


def test_growth_is_of_what_came_after():
    before = {"memory": 500, "rows": 10, "seconds": 4.0}
    now = {"memory": 900, "rows": 110, "seconds": 6.0}
    assert documents.further_than(before, now) == {"growth": 4.0, "rows_per_s": 50.0}
    assert documents.further_than(before, now | {"seconds": 3.0})["rows_per_s"] is None


def test_a_killed_process_is_told_in_one_line():
    with pytest.raises(UserError, match="has been killed; if memory has run out, ask for less"):
        harness.apart(os._exit, 9)


@pytest.mark.parametrize("library", steps.PEERS)
def test_each_peer_trains_on_the_same_rows(library, tmp_path):
    if not os.environ.get(peer.PYTHONS[library]):
        pytest.skip(f"{peer.PYTHONS[library]} is not set")
    store = make_store(tmp_path / "store", 128, 16, seed=0)
    steps._hand_over(tmp_path, store, 64)
    file, architectures = steps.PEERS[library]
    with peer.Peer(library, file) as other:
        for architecture in architectures:
            about = other.make(folder=str(tmp_path), architecture=architecture, width=32, k=4)
            assert about["version"] and other.run(3).seconds > 0


# ---------------------------------------------------------------- peers


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


@pytest.fixture
def counter(tmp_path, monkeypatch):
    monkeypatch.setenv(peer.PYTHONS["torch"], sys.executable)
    (tmp_path / "counter.py").write_text(COUNTER)
    return tmp_path / "counter.py"


def test_a_peer_does_what_it_is_told_until_it_fails(counter):
    with peer.Peer("torch", counter) as other:
        assert other.make(start=4) == {"version": "1", "started": 4}
        assert other.make(start=0)["started"] == 0
        assert other.run(2).seconds >= 0 and other.run(4).cpu_seconds >= 0
        with pytest.raises(UserError, match=r"torch failed \(ValueError: too far\)") as error:
            other.run(1)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="torch failed"):
            other.run(1)


def test_a_python_that_is_none_is_told_in_one_line(counter, monkeypatch):
    monkeypatch.setenv(peer.PYTHONS["torch"], "/nowhere/python")
    with pytest.raises(UserError, match="CROSSDICT_TORCH_PYTHON=/nowhere/python cannot be run"):
        peer.Peer("torch", counter)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps.rows", 16, "steps.batch_size=32 is more than steps.rows=16"),
        ("steps.k", 17, "steps.k=17 is more than steps.width=16"),
        ("steps.architectures", ("dense",), "steps.architectures=dense: dense must be one of"),
        ("extraction.layers", (1, 3), "extraction.layers=1,3 are not all below"),
        ("whole.layers", (24,), "whole.layers=24 are not all below whole.n_layers=24"),
        ("ensemble.k", 17, "ensemble.k=17 is more than ensemble.width=16"),
        ("steps.steps", 51, "steps.steps=51 must be 1 to 50"),
        ("extraction.n_heads", 3, "extraction.n_heads=3 does not divide extraction.d_model=16"),
    ],
)
def test_settings_that_cannot_be_are_refused(name, value, message):
    config = tiny_config("steps")
    put(config, name, value)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_the_command_refuses_what_it_does_not_know(tmp_path):
    done = launch("benchmark", f"--workdir={tmp_path / 'run'} --config.benchmarks=luck")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "benchmarks=luck: luck must be one of whole" in done.stderr


def test_a_workdir_knows_its_settings(tmp_path, no_peers):
    from configs import stored

    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(tiny_config("steps"))))
    assert stored.get_config(str(tmp_path)) == tiny_config("steps")
