"""The commands as users type them: flags, one-line errors, exit codes, and whole runs."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags

from crossdict_jax.config import Config, PretrainConfig
from crossdict_jax.errors import UserError
from launch import command

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(p.stem for p in (ROOT / "launch").glob("[!_]*.py") if p.stem != "command")


def launch(name: str, arguments: str | list[str] = "", *, cwd: Path = ROOT):
    """Runs a real command in a process of its own."""
    given = shlex.split(arguments) if isinstance(arguments, str) else arguments
    return subprocess.run(
        [sys.executable, "-m", f"launch.{name}", *given],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )


def lines_of(stderr: str) -> list[str]:
    """What stands on stderr beside progress bars."""
    return [line for line in stderr.splitlines() if line.strip() and not re.search(r"\d+%\|", line)]


def parse(arguments: str, *, kind: type = Config, default: str = "quickstart"):
    """The (config, work directory) of a command line."""
    asked = command.Command(main=parse, kind=kind, default=default)
    return command.parse(asked, ["test", *shlex.split(arguments)], values=flags.FlagValues())


def run_here(main, arguments: str | list[str], **how) -> int:
    """The exit code of a command, run in this process."""
    given = shlex.split(arguments) if isinstance(arguments, str) else arguments
    return command.execute(
        command.Command(main, **how), ["test", *given], values=flags.FlagValues()
    )


# ---------------------------------------------------------------- what a command line means


def test_the_default_is_the_quickstart():
    config, workdir = parse("")
    assert config.sae.width == 512
    assert config.models == ()
    assert workdir == "runs/quickstart"


def test_a_config_file_names_its_work_directory():
    config, workdir = parse("--config=configs/pythia410m_gpt2medium_small.py")
    assert config.models == ("EleutherAI/pythia-410m-deduped", "openai-community/gpt2-medium")
    assert workdir == "runs/pythia410m_gpt2medium_small"


@pytest.mark.parametrize(
    "arguments",
    [
        "--models=/x/a,b --layers=1,2 --width=64 --seed=3",
        "--models /x/a,b --layers 1,2 --width 64 --seed 3",
        "--config.models=/x/a,b --config.layers=1,2 --config.sae.width=64 --config.seed=3",
        "--config.models /x/a,b --config.layers (1,2) --config.sae.width 64 --config.seed 3",
        "--seed=3 -width=64 --config.seed=3 --models=/x/a,b --config=configs/quickstart.py "
        "--layers=1,2",
    ],
)
def test_every_spelling_of_a_setting_is_the_same(arguments):
    config, _ = parse(arguments)
    assert config.models == ("/x/a", "b")
    assert (config.layers, config.sae.width, config.seed) == ((1, 2), 64, 3)


def test_sweeps_are_one_value_or_several():
    config, _ = parse("--config.sae.learning_rate=1e-3,3e-3 --config.sae.k=8")
    assert config.sae.learning_rate == (1e-3, 3e-3)
    assert config.sae.k == 8


def test_an_existing_work_directory_brings_its_settings(tmp_path):
    config, _ = parse("--layers=1 --config.map.loss_weights.cosine=0.5 --models=a,b")
    command._prepare(config, str(tmp_path / "run"))
    again, workdir = parse(f"--workdir={tmp_path}/run")
    assert again == config
    assert workdir == f"{tmp_path}/run"
    explicit, _ = parse(f"--workdir={tmp_path}/run --config=configs/quickstart.py")
    assert explicit.layers == (5, 6, 7)


def test_a_new_work_directory_gets_the_default(tmp_path):
    config, _ = parse(f"--workdir={tmp_path}/new")
    assert config == parse("")[0]


def test_no_models_means_the_embedded_pair(tmp_path):
    from crossdict_jax.models import EMBEDDED

    config, workdir = parse(f"--workdir={tmp_path}/run")
    command._prepare(config, workdir)
    assert json.loads((tmp_path / "run/config.json").read_text())["models"] == list(EMBEDDED)


def test_train_lm_has_settings_of_its_own():
    config, workdir = parse(
        "--config.n_layers=2 --seed=5", kind=PretrainConfig, default="docs_gpt2"
    )
    assert (config.n_layers, config.seed, config.model_type) == (2, 5, "gpt2")
    assert workdir == "runs/docs_gpt2"


# ---------------------------------------------------------------- mistakes on the command line

MISTAKES = [  # arguments, what the line names
    ("--config.sae.widht=64", "did you mean sae.width?"),
    ("--config.sae=64", "'sae' is a group"),
    ("--config.layers[0]=3", "layers[0]"),
    ("--config.nothing.at.all=3", "There are models, layers"),
    ("--noconfig.seed", "config.seed"),
    ("--layers=5,x", "--layers=5,x"),
    ("--layers=5, 6", "--layers=5"),
    ("--layers=", "layers is empty"),
    ("--layers=5,5", "layers=5,5"),
    ("--config.layers=5,x", "--config.layers=5,x"),
    ("--config.sae.steps=many", "--config.sae.steps=many"),
    ("--config.sae.steps=1.5", "--config.sae.steps=1.5"),
    ("--config.sae.steps=0", "sae.steps=0"),
    ("--config.sae.steps", "--config.sae.steps"),
    ("--config.sae.learning_rate=nan", "sae.learning_rate=nan"),
    ("--config.sae.learning_rate=1e-3;2e-3", "1e-3;2e-3"),
    ("--config.sae.architecture=gatde", "topk"),
    ("--config.map.kinds=mean,rigde", "rigde must be one of"),
    ("--config.site=resid_mid", "resid_post"),
    ("--config.layer_pairs=6-10", "layer_pairs=6-10"),
    ("--width=16 --config.sae.k=17", "sae.k=17 is larger than sae.width=16"),
    ("--width=16 --config.sae.width=17", "--width=16 and --config.sae.width=17"),
    ("--models=a,b --config.models=a,c", "--models=a,b and --config.models=a,c"),
    ("--models=one", "models=one is one model"),
    ("--models=a,,b", "--models=a,,b"),
    ("--seed=-1", "seed=-1"),
    ("--modles=a,b", "did you mean --models?"),
    ("more", "'more' is not a flag"),
    ("--config=none.py", "--config=none.py"),
    ("--config=", "quickstart"),
    ("--config=configs", "--config=configs"),
    ("--config=README.md", "README.md"),
    ("--config=configs/docs_gpt2.py", "PretrainConfig"),
    ("--config=configs/docs_gpt2.py --config.sae.steps=3", "PretrainConfig"),
    ("--config=configs/stored.py:nowhere", "nowhere"),
    ("--flagfile=nowhere", "nowhere"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=[a for a, _ in MISTAKES])
def test_mistakes_are_told_in_one_line(arguments, named, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = run_here(print, f"{arguments} --workdir={tmp_path}/run")
    (line,) = lines_of(capfd.readouterr().err)
    assert code == 2
    assert named in line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_script_tells_a_mistake_in_one_line(name):
    done = launch(name, "--config.sed=1")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "did you mean seed?" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_quick_and_shows_the_flags(name):
    start = time.perf_counter()
    done = launch(name, "--help")
    assert time.perf_counter() - start < 2
    assert done.returncode == 0
    assert f"python -m launch.{name}" in done.stdout
    for flag in ("--config ", "--workdir ", "--seed ", "--config.text.source=docstrings"):
        assert flag in done.stdout


def test_commands_run_from_any_folder(tmp_path):
    done = launch("extract_activations", "--models=a,./b", cwd=tmp_path)
    assert done.returncode == 2
    assert (tmp_path / "runs/quickstart/config.json").exists()  # found the default config


BROKEN = {
    "no_function": "x = 1\n",
    "syntax": "def get_config(:\n",
    "raises": "def get_config():\n    raise ValueError('two\\nlines')\n",
    "nothing": "def get_config():\n    pass\n",
    "wrong_type": "from crossdict_jax.config import Config\n"
    "def get_config():\n    return Config(layers=[5, 6])\n",
    "missing_file": "def get_config():\n    return open('nowhere')\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_config_files_are_told_in_one_line(name, tmp_path, capfd):
    (tmp_path / f"{name}.py").write_text(BROKEN[name])
    code = run_here(print, f"--config={tmp_path}/{name}.py --workdir={tmp_path}/run")
    (line,) = lines_of(capfd.readouterr().err)
    assert code == 2
    assert f"{name}.py" in line or "layers=" in line
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- the work directory


def test_other_settings_are_refused_with_a_diff(tmp_path, capfd):
    def nothing(config, work):
        del config, work

    assert run_here(nothing, f"--models=a,b --workdir={tmp_path}/run") == 0
    assert run_here(nothing, f"--models=a,b --workdir={tmp_path}/run") == 0
    assert run_here(nothing, f"--workdir={tmp_path}/run") == 0
    assert run_here(nothing, f"--workdir={tmp_path}/run --width=64 --seed=1") == 2
    (line,) = lines_of(capfd.readouterr().err)
    assert "sae.width: 512 there, 64 now" in line
    assert "seed: 0 there, 1 now" in line


def write_settings(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"sae": ')
    return folder


@pytest.mark.parametrize("place", ["a file", "not a run", "damaged", "not writable"])
def test_bad_work_directories_are_told_in_one_line(place, tmp_path, capfd):
    path = tmp_path / place.replace(" ", "-")
    if place == "a file":
        path.write_text("")
    elif place == "not a run":
        path.mkdir()
        (path / "photo.jpg").write_text("")
    elif place == "damaged":
        write_settings(path)
    else:
        path = Path("/proc/run")
    assert run_here(print, f"--models=a,b --workdir={path}") == 2
    (line,) = lines_of(capfd.readouterr().err)
    assert str(path) in line


# ---------------------------------------------------------------- exit codes


def failing(error: BaseException):
    def main(config, work):
        raise error

    return main


def wrapped(error: BaseException) -> Exception:
    outer = ValueError("the library's own words")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("one\nmistake"), 2, "one mistake"),
        (OSError(28, "No space left on device", "x"), 2, "no space left"),
        (wrapped(OSError(28, "No space left on device")), 2, "no space left"),
        (ValueError("RESOURCE_EXHAUSTED: write [No space left on device]"), 2, "no space left"),
        (KeyboardInterrupt(), 130, "the same command again"),
    ],
)
def test_exit_codes(error, code, words, tmp_path, capfd):
    assert run_here(failing(error), f"--models=a,b --workdir={tmp_path}/run") == code
    (line,) = lines_of(capfd.readouterr().err)
    assert words in line


def test_bugs_show_their_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run_here(failing(ZeroDivisionError()), f"--models=a,b --workdir={tmp_path}/run")
