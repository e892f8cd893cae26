"""The ablation of losses: what is left out is, rows are of the same documents, tables show them."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import shared_run

from crossdict_jax.config import LossWeights
from crossdict_jax.errors import UserError
from crossdict_jax.report.tables import number
from crossdict_jax.studies.loss_ablation import measure
from crossdict_jax.studies.loss_ablation.section import print_ablation, section, tables
from crossdict_jax.workdir import Workdir, read_jsonl

LOSSES = [f.name for f in dataclasses.fields(LossWeights)]


def test_each_loss_alone_and_left_out():
    found = measure.ablations(LossWeights(mse=2.0))
    assert list(found) == [
        "all",
        *(f"only {name}" for name in LOSSES),
        *(f"without {name}" for name in LOSSES),
    ]
    assert found["all"] == LossWeights(mse=2.0)
    assert found["only mse"] == LossWeights(2.0, 0.0, 0.0, 0.0)
    assert found["without sparsity"] == LossWeights(mse=2.0, sparsity=0.0)


def test_losses_without_a_weight_are_not_ablated():
    assert list(measure.ablations(LossWeights(correlation=0.0, sparsity=0.0))) == [
        *("all", "only mse", "only cosine"),
    ]
    with pytest.raises(UserError, match=r"map\.loss_weights has 1 losses above 0; give two"):
        measure.ablations(LossWeights(1.0, 0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of a run with two losses, and its work directory."""
    config, run = shared_run(tmp_path_factory.getbasetemp())
    work = Workdir(shutil.copytree(run.root, tmp_path_factory.mktemp("ablation") / "run"))
    weights = LossWeights(correlation=0.0, sparsity=0.0)
    settings = dataclasses.replace(
        config.map, loss_weights=weights, steps=20, hidden=8, batch_size=64, head="topk"
    )
    measure.ablate_losses(dataclasses.replace(config, map=settings), work)
    return read_jsonl(work.result("ablation.jsonl")), work


def test_a_row_for_each_direction_and_ablation(rows):
    rows, _ = rows
    names = ["none", "none", "all", "only mse", "only cosine"]
    assert [row["losses"] for row in rows] == 2 * names
    assert [row["map"] for row in rows] == 2 * ["mean", "ridge", "mlp", "mlp", "mlp"]
    for row in rows:
        assert row["pairing"] == "aligned"
        assert row["r2_low"] <= row["r2"] <= row["r2_high"]
        assert {"cosine", "cosine_centered", "l0_predicted", "l0_target"} < set(row)
    assert len({row["n_rows"] for row in rows}) == 1
    for name in ("only mse", "only cosine"):
        ours, everything = (
            next(r for r in rows if r["losses"] == losses) for losses in (name, "all")
        )
        assert ours["r2"] != everything["r2"]


def test_the_tables_show_every_row(rows, capsys):
    rows, work = rows
    shown = tables(rows)
    assert [len(table.rows) for table in shown] == [5, 5]
    assert section(rows).count("<table>") == 2
    assert [row[0].text for row in shown[0].rows][:3] == ["(mean)", "(ridge)", "all"]
    print_ablation(work)
    printed = capsys.readouterr().out
    assert printed.count("only cosine") == 2
    assert all(number(row["r2"]) in printed for row in rows)


def test_without_a_run_there_is_one_line(tmp_path):
    command = [sys.executable, "-m", "launch.ablate_losses", f"--workdir={tmp_path / 'new'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert "run extract_activations first" in done.stderr
    assert done.stderr.count("\n") == 1
