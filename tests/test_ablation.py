"""The ablation of losses: what is left out is, rows are of the same documents, tables show them."""

import dataclasses

import pytest
from tiny_run import changed, private_run, refused

from crossdict_jax.config import LossWeights
from crossdict_jax.studies.loss_ablation import measure, section, tables
from crossdict_jax.workdir import read_jsonl

LOSSES = [f.name for f in dataclasses.fields(LossWeights)]


def test_each_loss_with_a_weight_alone_and_left_out():
    made = measure.ablations(LossWeights(mse=2.0))
    alone, without = ([f"{how} {name}" for name in LOSSES] for how in ("only", "without"))
    assert list(made) == ["all", *alone, *without] and made["all"] == LossWeights(mse=2.0)
    assert made["only mse"] == LossWeights(2.0, 0.0, 0.0, 0.0)
    assert made["without sparsity"] == LossWeights(mse=2.0, sparsity=0.0)
    made = measure.ablations(LossWeights(correlation=0.0, sparsity=0.0))
    assert list(made) == ["all", "only mse", "only cosine"]
    one = LossWeights(1.0, 0.0, 0.0, 0.0)
    refused(r"map\.loss_weights has 1 losses above 0; give two", measure.ablations, one)


@pytest.mark.slow
def test_a_row_for_each_direction_and_ablation(tmp_path_factory, capsys):
    config, work = private_run(tmp_path_factory)
    settings = {"map__steps": 20, "map__hidden": 8, "map__batch_size": 64, "map__head": "topk"}
    weights = LossWeights(correlation=0.0, sparsity=0.0)
    measure.run(changed(config, map__loss_weights=weights, **settings), work)
    rows = read_jsonl(work.result("ablation.jsonl"))
    names = ["none", "none", "all", "only mse", "only cosine"]
    assert [row["losses"] for row in rows] == 2 * names
    assert [row["map"] for row in rows] == 2 * ["mean", "ridge", "mlp", "mlp", "mlp"]
    assert all(row["r2_low"] <= row["r2"] <= row["r2_high"] for row in rows)
    assert len({row["n_rows"] for row in rows}) == 1
    assert len({row["r2"] for row in rows[2:5]}) == 3
    assert [len(table.rows) for table in tables(rows)] == [5, 5]
    assert section(rows).count("<table>") == 2
    assert capsys.readouterr().out.count("only cosine") == 2
