"""Curves for other tools: each point once, live, and nothing without being asked."""

import copy
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from tiny_run import shared_run

from crossdict_jax import dictionaries
from crossdict_jax.activations.store import open_store
from crossdict_jax.config import Config
from crossdict_jax.config.settings import validate
from crossdict_jax.errors import UserError
from crossdict_jax.report import records
from crossdict_jax.workdir import Workdir


class Remembered:
    """A writer that keeps what it gets."""

    def __init__(self, work=None):
        self.points, self.closed = [], False

    def write(self, curve, step, values):
        self.points.append((curve, step, values))

    def close(self):
        self.closed = True


@pytest.fixture
def work(tmp_path):
    made = Workdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "maps/training/mlp-0").mkdir(parents=True)
    return made


def add(work, step, text=None, **values):
    with (work.maps / "training/mlp-0/metrics.jsonl").open("a") as file:
        file.write(text or json.dumps({"step": step} | values) + "\n")


@pytest.fixture
def remembered(monkeypatch):
    writer = Remembered()
    monkeypatch.setitem(records.WRITERS, "wandb", lambda work: writer)
    monkeypatch.setitem(records.MODULES, "wandb", "json")  # installed everywhere
    return writer


def test_every_point_is_handed_on_once_over_all_runs(work, remembered):
    add(work, 49, loss=[3.0, 4.0])
    (work.maps / "training/mlp-0/members.json").write_text('[{"label": "x"}, {"label": "y"}]')
    with records.following(work, ("wandb",)):
        add(work, 99, loss=[1.0, 2.0], rate=0.5)
    with records.following(work, ("wandb",)):
        add(work, 149, loss=[0.0, 1.0])
    curve = "maps/training/mlp-0"
    assert remembered.points == [
        (curve, 49, {"loss/x": 3.0, "loss/y": 4.0}),
        (curve, 99, {"loss/x": 1.0, "loss/y": 2.0, "rate": 0.5}),
        (curve, 149, {"loss/x": 0.0, "loss/y": 1.0}),
    ]
    assert remembered.closed


def test_points_arrive_while_the_work_goes_on(work, remembered, monkeypatch):
    monkeypatch.setattr(records, "SECONDS", 0.01)
    with records.following(work, ("wandb",)):
        add(work, 1, loss=1.0)
        limit = time.monotonic() + 20
        while not remembered.points and time.monotonic() < limit:
            time.sleep(0.01)
        assert remembered.points


def test_a_line_that_is_not_finished_waits(work, remembered):
    with records.following(work, ("wandb",)):
        add(work, 0, text='{"step": 5, "lo')
    assert not remembered.points
    with records.following(work, ("wandb",)):
        add(work, 0, text='ss": 1.5}\n')
    assert remembered.points == [("maps/training/mlp-0", 5, {"loss": 1.5})]


def test_what_was_held_is_handed_on_when_the_work_fails(work, remembered):
    with pytest.raises(ZeroDivisionError), records.following(work, ("wandb",)):
        add(work, 1, loss=1.0)
        raise ZeroDivisionError
    assert remembered.points
    assert remembered.closed


def test_nobody_gets_anything_by_default(work):
    assert Config().records == ()
    validate(Config())
    with records.following(work, Config().records):
        add(work, 1, loss=1.0)
    assert not records.folder(work).exists()


def test_a_missing_package_is_told_in_one_line(work, monkeypatch):
    monkeypatch.setitem(records.MODULES, "wandb", "no_such_package")
    with (
        pytest.raises(UserError, match="pip install no_such_package"),
        records.following(work, ("wandb",)),
    ):
        pass


def test_an_unknown_writer_is_refused():
    with pytest.raises(UserError, match="tensorboard, wandb"):
        validate(Config(records=("mlflow",)))


def test_weights_and_biases_get_a_run_with_the_settings(work, monkeypatch):
    asked, logged = {}, []
    run = types.SimpleNamespace(log=logged.append, finish=lambda: logged.append("finished"))
    fake = types.ModuleType("wandb")
    fake.init = lambda **how: asked.update(how) or run
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with records.following(work, ("wandb",)):
        add(work, 7, loss=2.0)
    assert asked["project"] == "crossdict_jax"
    assert asked["config"] == {}
    assert logged == [{"maps/training/mlp-0/loss": 2.0, "step": 7}, "finished"]


def test_tensorboard_reads_what_is_written(work):
    pytest.importorskip("tensorboardX")
    with records.following(work, ("tensorboard",)):
        add(work, 7, loss=[2.0])
    (events,) = (records.folder(work) / "tensorboard").rglob("events.out.tfevents.*")
    assert b"loss/0" in events.read_bytes()


def test_records_change_no_bit(tmp_path_factory, tmp_path, remembered):
    config, tiny = shared_run(tmp_path_factory.getbasetemp())
    config = copy.deepcopy(config)
    config.sae.steps, config.sae.batch_size = 4, 32
    files = []
    for name, writers in (("without", ()), ("with", ("wandb",))):
        there = Workdir(tmp_path / name)
        with records.following(there, writers):
            dictionaries.train_dictionaries(config, open_store(tiny.activations), there)
        files.append(dictionaries.load(there.dictionary("a", "resid_pre.1")))
    assert remembered.points
    assert (files[0].W_dec[...] == files[1].W_dec[...]).all()


def test_starting_a_command_imports_no_writer():
    program = "import sys, launch.command; print({'wandb', 'tensorboardX'} & set(sys.modules))"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "set()"
