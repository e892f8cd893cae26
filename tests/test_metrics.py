"""Training metrics: the jsonl file after a resume, and the same numbers in other tools."""

import json
import sys
import types

from tiny_run import refused

from crossdict_jax.training import metrics
from crossdict_jax.training.metrics import MetricsWriter


def test_rows_behind_the_restored_step_are_written_once(tmp_path):
    path = tmp_path / "a" / "metrics.jsonl"
    first = MetricsWriter(path, start=0)
    for step in (49, 99):
        first(step, {"loss": [1.0, 2.0]})
    path.write_text(path.read_text() + '{"step": 149, "lo')  # a kill
    second = MetricsWriter(path, start=50)
    second(99, {"loss": [0.5, 1.5]})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 49, "loss": [1.0, 2.0]}, {"step": 99, "loss": [0.5, 1.5]}]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_other_tools_get_a_curve_for_each_member(tmp_path, monkeypatch):
    told, wandb = [], types.ModuleType("wandb")  # a stand-in for the package; what it is told
    run = types.SimpleNamespace(log=told.append, finish=lambda: told.append("finished"))
    wandb.init = lambda **settings: told.append(settings["project"]) or run
    wandb.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    writer = MetricsWriter(tmp_path / "m.jsonl", start=0, records=("wandb",), labels=("x", "y"))
    writer(7, {"loss": [2.0, 3.0], "rate": 0.5})
    writer.close()
    curves = {"loss/x": 2.0, "loss/y": 3.0, "rate": 0.5, "step": 7}
    assert told == ["crossdict_jax", curves, "finished"]


def test_a_missing_package_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(metrics.PACKAGES, "wandb", "no_such_package")
    how = {"start": 0, "records": ("wandb",)}
    refused("pip install no_such_package", MetricsWriter, tmp_path / "m.jsonl", **how)
