"""Work directories: whose run lies there, and which settings make it another one."""

import pytest
from absl import logging
from tiny_run import changed, refused

from crossdict_jax.config import FREE, LATER, Config, to_dict
from crossdict_jax.training.stage import progress_bar
from crossdict_jax.workdir import Workdir, model_names, open_workdir, read_json, write_json

USUAL = {"seed": 0, "sae": {"width": 8, "k": 2}, "efficiency": {"rows": [1, 2]}}


def opened(path, **changes):
    """The work directory, in which something is computed from then on."""
    work = open_workdir(path, USUAL | changes, usual=USUAL, free=("efficiency",))
    write_json(work.result("pairing.json"), {})
    return work


def test_an_equal_run_goes_on(tmp_path):
    assert opened(tmp_path / "run") == opened(tmp_path / "run")
    opened(tmp_path / "run", efficiency={"rows": [4]})  # of a finished run: another question
    assert read_json(tmp_path / "run" / "config.json") == USUAL


JOINT = "crosscoders/resid_pre.1--resid_pre.1/aligned"
TRAINED = [("sae.k", "dictionaries/a/resid_pre.1/seed-0"), ("sae.k", JOINT)]  # theirs by default
TRAINED += [("crosscoder.width", JOINT), ("map.steps", "maps/a-to-b/resid_pre.1--resid_pre.1/mlp")]
TRAINED += [("map.ridge_penalties", "dictionaries/transfer/a/checkpoints")]
TRAINED += [("evaluation.bootstrap", "results/probe.inputs.json")]
TRAINED += [("intervention.contexts", "results/steering/x.jsonl")]


@pytest.mark.parametrize(("name", "folder"), TRAINED)
def test_a_setting_may_change_until_something_is_trained_with_it(name, folder, tmp_path):
    def opened(value):
        config = changed(Config(models=("a", "b")), **{name.replace(".", "__"): value})
        how = {"usual": to_dict(Config()), "free": FREE, "later": LATER}
        return open_workdir(tmp_path, to_dict(config), **how)

    write_json(opened(7).result("pairing.json"), {})
    write_json(tmp_path / folder.partition("/")[0] / "training/x/0.sha256.json", {})
    opened(8)  # what is only begun is not
    made = tmp_path / folder
    write_json(made if made.suffix else made / "0.sha256.json", {})
    refused(f"{name}: 8 there, 9 now", opened, 9)


def test_each_difference_is_named(tmp_path):
    """A setting younger than the run counts as its default, one that is no more is named, too."""
    opened(tmp_path)
    line = refused("sae.k: 2 there", opened, tmp_path, seed=1, sae={"width": 8, "k": 3})
    assert "sae.k: 2 there, 3 now; seed: 0 there, 1 now" in line
    assert read_json(tmp_path / "config.json") == USUAL
    write_json(tmp_path / "config.json", USUAL | {"sae": {"width": 8}})
    opened(tmp_path)
    refused(r"sae\.k: 2 there, 5 now", opened, tmp_path, sae={"width": 8, "k": 5})
    write_json(tmp_path / "config.json", USUAL | {"gone": 1})
    refused("gone: 1 there, absent now", opened, tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused(r"is not empty and holds no config\.json", opened, tmp_path)
    refused("is a file", opened, tmp_path / "notes.txt")


def test_names_of_models_collide_in_order(tmp_path, monkeypatch):
    assert model_names(["org/a", "other/a/", "a b", "/"]) == ["a", "a-2", "a-b", "model"]
    assert model_names(["shards", "x/training"]) == ["shards-2", "training-2"]  # not ours
    paths = ["/x/a", "/x/a/", "/x/a/.", "/x/a/b/..", "/y//a", "x/../a"]
    assert model_names(paths) == ["a", *(f"a-{n}" for n in range(2, 7))]
    (tmp_path / "mine" / "inner").mkdir(parents=True)  # the current folder has a name, too
    monkeypatch.chdir(tmp_path / "mine" / "inner")
    assert model_names([".", "..", "../", "./"]) == ["inner", "mine", "mine-2", "inner-2"]


def test_a_stage_says_one_line_and_bars_are_for_terminals(tmp_path, capfd, monkeypatch):
    figures = {"wall_s": 12.34, "rows_per_s": 33808.4, "rows": 417_194, "dictionaries": 6}
    Workdir(tmp_path).record_timing("train_saes", **figures, device="cpu", devices=1)
    assert sum(progress_bar(range(3), delay=0)) == 3
    said = capfd.readouterr()
    assert said.out == "train_saes: 12.3 s, 33,808 rows/s, 6 dictionaries\n" and said.err == ""
    monkeypatch.setattr(logging, "get_verbosity", lambda: logging.ERROR)
    Workdir(tmp_path).record_timing("train_saes", **figures)
    assert capfd.readouterr().out == ""
    assert read_json(tmp_path / "results/timing.json") == {"train_saes": figures}
