"""Comparisons with other libraries: curves at equal sparsity, a missing peer, a real one."""

import itertools
import os
import sys

import pytest
import tiny_run
from test_launch import launch

from crossdict_jax.activations.extract import extract
from crossdict_jax.benchmark import saelens
from crossdict_jax.config import SAEConfig, to_dict
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import open_workdir, read_jsonl


def test_the_table_sets_equal_rates_side_by_side():
    row = {"model": "m", "site": "resid_pre.1", "width": 32, "k": 4, "steps": 10, "batch_size": 8}
    row |= {"rows_train": 100, "rows_test": 50, "l0": 4.0, "fvu": 0.3, "fvu_at_k": 0.3}
    rows = []
    for architecture in saelens.THEIRS:
        for rate, library in itertools.product((0.01, 3e-4), saelens.LIBRARIES):
            where = {"architecture": architecture, "learning_rate": rate, "library": library}
            rows.append(row | where | {"seconds": 2.0, "name": "one"})
    rows.append(rows[0] | {"l0": 8.0, "seconds": 4.0})
    for place, fvu in ((1, 0.35), (3, 0.25), (4, None), (7, 0.4)):
        rows[place]["fvu_at_k"] = fvu
    every, best = ([[c.text for c in line] for line in t.rows] for t in saelens.tables(rows))
    assert len(every) == 12 and [line[1] for line in every] == ["0.01", "0.0003"] * 6
    assert every[0][2:] == ["4 of 4.0–8.0", "4.0", "0.300", "0.350", "3.0", "2.0"]
    assert best[0] == ["relu", "0.01", "0.300", "0.0003", "0.250", "0.050"]
    assert best[1] == ["gated", "0.01", "–", "0.01", "0.300", "–"] and len(best) == 6


def test_rates_are_that_usual_here_that_of_topk_and_theirs(tiny):
    bench = saelens._Bench(*tiny, "a")
    assert bench.rates("relu") == (2.4e-2, 1.2e-2, 3e-4) and bench.rates("topk") == (1.2e-2, 3e-4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmark")
    config = tiny_run.make_config(root)
    config.sae = SAEConfig(width=32, k=4, steps=4, batch_size=64)
    work = open_workdir(root / "run", to_dict(config))
    return config, extract(config, work), work


def test_without_the_peer_one_line_says_so(tiny, monkeypatch):
    monkeypatch.delenv(saelens.PYTHON, raising=False)
    done = launch("benchmark.saelens", f"--workdir={tiny[2].root}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("skipped: CROSSDICT_SAELENS_PYTHON is not set")
    with pytest.raises(UserError, match="CROSSDICT_SAELENS_PYTHON is not set"):
        saelens.compare_saelens(*tiny)


@pytest.mark.parametrize(
    ("python", "message"),
    [("/nowhere/python", "cannot be run"), (sys.executable, "No module named")],
)
def test_a_peer_that_cannot_work_is_told_in_one_line(python, message, tmp_path):
    (tmp_path / "jobs.json").write_text("[]")
    with pytest.raises(UserError, match=message) as error:
        saelens._run_peer(python, tmp_path)
    assert "\n" not in str(error.value)


def test_both_libraries_on_the_same_rows(tiny):
    if not os.environ.get(saelens.PYTHON):
        pytest.skip(f"{saelens.PYTHON} is not set")
    _, _, work = tiny
    rows = saelens.compare_saelens(*tiny)
    assert {(r["library"], r["architecture"]) for r in rows} == {
        (library, a) for library in ("ours", "sae-lens") for a in saelens.THEIRS
    }
    assert all(r["rows_test"] == rows[0]["rows_test"] and r["fvu"] > 0 for r in rows)
    written = read_jsonl(work.result("benchmark_saelens.jsonl"))
    assert len(written) == len(rows) and "seconds" not in written[0]
