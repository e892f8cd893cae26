"""The commands as users type them: flags, one-line errors, exit codes, and whole runs."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tiny_run import SHAPES, make_models, make_texts

from configs import quickstart
from crossdict_jax.config import Config, PretrainConfig, to_dict
from crossdict_jax.errors import UserError
from launch import (
    command,
    contrast,
    evaluate,
    extract_activations,
    intervene,
    probe,
    report,
    train_hypernetworks,
    train_lm,
    train_saes,
)

ROOT = Path(__file__).parents[1]
PROGRESS = r"\d+%\||\[\d+:\d+"  # a bar with a known end or an unknown one
OWN_SETTINGS = {"convert"}  # commands whose settings are not those of a run
COMMANDS = sorted(p.stem for p in (ROOT / "launch").glob("[!_]*.py") if p.stem != "command")


def launch(name: str, arguments: str | list[str] = "", *, cwd: Path = ROOT):
    """Runs a real command in a process of its own."""
    given = shlex.split(arguments) if isinstance(arguments, str) else arguments
    return subprocess.run(
        [sys.executable, "-m", f"launch.{name}", *given],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
    )


def environment() -> dict[str, str]:
    """As a user's: one CPU device, and the project importable from any folder."""
    return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}


def lines_of(stderr: str) -> list[str]:
    """What stands on stderr beside progress bars."""
    return [line for line in stderr.splitlines() if line.strip() and not re.search(PROGRESS, line)]


def parse(arguments: str, *, kind: type = Config, default: str = "quickstart"):
    """The (config, work directory) of a command line."""
    return command.parse(["test", *shlex.split(arguments)], kind=kind, default=default)[:2]


def run_here(main, arguments: str | list[str], **how) -> int:
    """The exit code of a command, run in this process."""
    given = shlex.split(arguments) if isinstance(arguments, str) else arguments
    return command.execute(main, ["test", *given], **how)


# ---------------------------------------------------------------- what a command line means


def test_the_default_is_the_quickstart():
    config, workdir = parse("")
    assert config == quickstart.get_config()
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
    command.prepare(config, str(tmp_path / "run"))
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
    command.prepare(config, workdir)
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
    ("--config.records=wandb,wandb", "records=wandb,wandb holds a value twice"),
    ("--config.controls=ceiling,ceiling", "controls=ceiling,ceiling holds a value twice"),
    ("--expect=README.md", "README.md has no usable get_expectations()"),
    ("--config.contrast.controls=5", "contrast.controls=5 must be 19 or more"),
    ("--config.probe.examples=4,16", "probe.examples=4,16: 4 must be 8 or more"),
    ("--config.contrast.span=word", "contrast.span=word must be one of last, whole"),
    ("--config.intervention.feature_ids=1,x", "is not whole numbers with commas between"),
    ("--width=16 --config.sae.k=17", "sae.k=17 is larger than sae.width=16"),
    ("--width=16 --config.sae.width=17", "--width=16 and --config.sae.width=17"),
    ("--models=a,b --config.models=a,c", "--models=a,b and --config.models=a,c"),
    ("--models=one", "models=one is one model"),
    ("--models=a,,b", "--models=a,,b"),
    ("--seed=-1", "seed=-1"),
    ("--modles=a,b", "did you mean --models?"),
    ("more", "'more' is not a flag"),
    ("--config=none.py", "none.py: there is no file"),
    ("--config=", "quickstart"),
    ("--config=configs", "configs: there is no file"),
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
    wrong, right = ("sorce", "source") if name in OWN_SETTINGS else ("sed", "seed")
    done = launch(name, f"--config.{wrong}=1")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"did you mean {right}?" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_quick_and_shows_the_flags(name):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = launch(name, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # seconds
    assert done.returncode == 0
    assert f"python -m launch.{name}" in done.stdout
    for flag in ("--config ", "--workdir "):
        assert flag in done.stdout
    if name not in OWN_SETTINGS:
        assert "--seed " in done.stdout
    if name not in OWN_SETTINGS | {"verify"}:  # that plants its text
        assert "--config.text.source=docstrings" in done.stdout


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
    usual = quickstart.get_config().sae.width
    assert f"sae.width: {usual} there, 64 now" in line
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
        (OSError(28, "No space left on device", "x"), 2, "No space left"),
        (wrapped(OSError(28, "No space left on device")), 2, "No space left"),
        (ValueError("RESOURCE_EXHAUSTED: write [No space left on device]"), 2, "No space left"),
        (OSError("4096 requested and 17 written"), 2, "No space left"),  # as numpy says it
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


# ---------------------------------------------------------------- whole runs, on two tiny models

RESULTS = (
    "pairing.json",
    "reconstruction.jsonl",
    "transfer.jsonl",
    "controls.jsonl",
    "feature_transfer.jsonl",
    "matching.jsonl",
    "matches.jsonl",
    "similarity.jsonl",
    "causal.jsonl",
    "crosscoder.jsonl",
    "feature_causal.jsonl",
    "feature_causal_summary.jsonl",
    "timing.json",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with two untrained models a and b, their tokenizers, and 80 documents."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = make_texts(80)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    make_models(folder, texts)
    return folder


def small(tiny: Path, **changes) -> list[str]:
    """The arguments of a run of a few seconds; changes by dotted name, dots written as __."""
    asked = {
        "models": f"{tiny}/a,{tiny}/b",
        "layers": "1",
        "text__source": f"{tiny}/text.jsonl",
        "text__documents": 80,
        "text__max_bytes": 400,
        "sae__width": 32,
        "sae__k": 4,
        "sae__steps": 20,
        "sae__batch_size": 64,
        "map__steps": 20,
        "map__batch_size": 64,
        "map__hidden": 16,
        "crosscoder__steps": 20,
        "evaluation__bootstrap": 20,
        "intervention__features": 2,
        "intervention__contexts": 8,
    } | changes
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in asked.items()]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """(work directory, process) of the main job as users run it."""
    work = tmp_path_factory.mktemp("runs") / "run"
    return work, launch("experiment", [*small(tiny), f"--workdir={work}"])


def test_the_main_job_writes_every_file(finished):
    work, done = finished
    assert done.returncode == 0, done.stderr
    expected = ["config.json", "activations/meta.json", "report/index.html"]
    expected += [f"results/{name}" for name in RESULTS]
    expected += [f"dictionaries/{m}/resid_pre.1/seed-0" for m in "ab"]
    for kind in Config().map.kinds:
        for place in ("a-to-b", "b-to-a"):
            folder = f"maps/{place}/resid_pre.1--resid_pre.1/{kind}"
            expected += [folder, f"{folder}-shuffled"]
    joint = "crosscoders/resid_pre.1--resid_pre.1"
    expected += [f"{joint}/aligned", f"{joint}/shuffled"]
    assert "One code of all models" in (work / "report/index.html").read_text()
    assert not [name for name in expected if not (work / name).exists()]


def test_the_main_job_says_what_it_does(finished):
    work, done = finished
    for number, stage in enumerate(("extract_activations", "train_saes"), start=1):
        assert f"[{number}/6] {stage}" in done.stdout
    assert "token_ridge" in done.stdout
    assert done.stdout.splitlines()[-1] == str(work / "report/index.html")
    assert not lines_of(done.stderr)  # progress bars alone


def test_the_main_job_again_keeps_what_is_there(finished, tiny):
    work, _ = finished
    files = [p for p in work.rglob("*") if p.is_file() and "results" not in p.parts]
    before = {p: p.stat().st_mtime_ns for p in files if p.suffix != ".html"}
    results = {name: (work / "results" / name).read_bytes() for name in RESULTS[:-1]}
    done = launch("experiment", [f"--workdir={work}"])
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert {name: (work / "results" / name).read_bytes() for name in results} == results


# ---------------------------------------------------------------- mistakes in text and models


def without(folder: Path, name: str) -> Path:
    """A copy of a model's folder that lacks the files matching ``name``."""
    copy = folder.parent / f"{folder.name}-without-{name.strip('*')}"
    shutil.copytree(folder, copy)
    for file in copy.glob(name):
        file.unlink()
    return copy


def text_file(tmp_path: Path, text: str, name: str = "text.jsonl") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def few_tokens(tiny: Path) -> Path:
    """Model a with an embedding too small for its tokenizer."""
    from crossdict_jax import models

    folder = without(tiny / "a", "model.safetensors")
    models.save(models.init(SHAPES["a"] | {"vocab_size": 270}), folder)
    return folder


WRONG = {  # name: (changes of a run, what the line names)
    "no folder": (lambda t, tmp: {"models": f"{t}/a,{t}/c"}, "/c"),
    "no network": (lambda t, tmp: {"models": f"{t}/a,some/where"}, "some/where"),
    "no tokenizer": (
        lambda t, tmp: {"models": f"{t}/a,{without(t / 'b', 'tok*')}"},
        "b-w",
    ),
    "no weights": (
        lambda t, tmp: {"models": f"{t}/a,{without(t / 'b', 'model*')}"},
        "b-w",
    ),
    "token id": (lambda t, tmp: {"models": f"{few_tokens(t)},{t}/b"}, "270"),
    "layer": (lambda t, tmp: {"layers": "1,2"}, "resid_pre.2"),
    "layer pair": (lambda t, tmp: {"layer_pairs": "1:9"}, "resid_pre.9"),
    "no text": (lambda t, tmp: {"text__source": f"{tmp}/none.jsonl"}, "none.jsonl"),
    "empty text": (lambda t, tmp: {"text__source": text_file(tmp, "")}, "text.jsonl"),
    "blank text": (lambda t, tmp: {"text__source": text_file(tmp, '{"text": " "}')}, "blank"),
    "not json": (lambda t, tmp: {"text__source": text_file(tmp, "{")}, "text.jsonl line 1"),
    "no column": (lambda t, tmp: {"text__column": "body"}, "'body'"),
    "no document in a split": (lambda t, tmp: {"text__documents": 3}, "text.documents=3"),
    "text of no kind": (lambda t, tmp: {"text__source": text_file(tmp, "x", "a.doc")}, "a.doc"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_text_and_models_are_told_in_one_line(name, tiny, tmp_path, capfd):
    changes, named = WRONG[name]
    arguments = small(tiny, **changes(tiny, tmp_path))
    capfd.readouterr()
    code = run_here(extract_activations.main, [*arguments, f"--workdir={tmp_path}/run"])
    (line,) = lines_of(capfd.readouterr().err)
    assert code == 2
    assert named in line


@pytest.mark.parametrize(
    ("stage", "changes", "named"),
    [
        (train_saes, {"sae__batch_size": 100_000}, "sae.batch_size=100000"),
        (train_hypernetworks, {"map__batch_size": 100_000}, "map.batch_size=100000"),
    ],
)
def test_a_batch_larger_than_the_data_is_refused(stage, changes, named, finished, tiny, capfd):
    work, _ = finished
    again = copy_of(work, without="maps" if stage is train_hypernetworks else "dictionaries")
    ask(again, small(tiny, **changes))
    assert run_here(stage.main, f"--workdir={again}") == 2
    (line,) = lines_of(capfd.readouterr().err)
    assert named in line


# ---------------------------------------------------------------- what is missing or damaged


def copy_of(work: Path, *, without: str = "none") -> Path:
    """A copy of a work directory that lacks one of its folders."""
    copy = Path(tempfile.mkdtemp(dir=work.parent)) / "run"
    shutil.copytree(work, copy, ignore=shutil.ignore_patterns(without))
    return copy


def ask(work: Path, arguments: list[str]) -> None:
    """Makes a work directory one of other settings."""
    config, _ = parse(shlex.join(arguments))
    (work / "config.json").write_text(json.dumps(to_dict(config)))


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def alter(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DICTIONARY = "resid_pre.1/seed-0"
MAP = "resid_pre.1--resid_pre.1"
SHARD = "activations/a/resid_pre.1/shard-00000.npy"
DAMAGE = [  # what is done to which file, the stage that reads it, the folder it has to write again
    (truncate, SHARD, train_saes, "dictionaries"),
    (alter, SHARD, train_saes, "dictionaries"),
    (Path.unlink, SHARD, train_saes, "dictionaries"),
    (alter, "activations/rows.npz", train_saes, "dictionaries"),
    (truncate, "activations/meta.json", train_saes, "dictionaries"),
    (alter, f"dictionaries/b/{DICTIONARY}", train_hypernetworks, "maps"),
    (truncate, f"dictionaries/a/{DICTIONARY}", evaluate, "report"),
    (alter, f"maps/a-to-b/{MAP}/ridge", evaluate, "report"),
    (truncate, f"maps/b-to-a/{MAP}/mlp", intervene, "report"),
    (truncate, "results/transfer.jsonl", report, "report"),
]


@pytest.mark.parametrize(("harm", "place", "stage", "again"), DAMAGE)
def test_damage_is_named(harm, place, stage, again, finished, capfd):
    work, done = finished
    assert done.returncode == 0, done.stderr
    copy = copy_of(work, without=again)
    file = copy / place if (copy / place).suffix else largest(copy / place)
    harm(file)
    assert run_here(stage.main, f"--workdir={copy}") == 2
    (line,) = lines_of(capfd.readouterr().err)
    assert str(file) in line


@pytest.mark.parametrize(
    "stage",
    [train_saes, train_hypernetworks, evaluate, intervene, report],
    ids=lambda s: s.__name__,
)
def test_a_stage_before_its_input_says_what_to_run(stage, tiny, tmp_path, capfd):
    assert run_here(stage.main, [*small(tiny), f"--workdir={tmp_path}/run"]) == 2
    (line,) = lines_of(capfd.readouterr().err)
    assert "run" in line


@pytest.mark.parametrize(
    ("question", "changes", "named"),
    [
        (contrast, "--config.contrast.features=3", "contrast.source is empty"),
        (contrast, "--config.contrast.source=nowhere.jsonl", "nowhere.jsonl does not exist"),
        (probe, "--config.probe.pooling=max", "probe.source is empty"),
        (probe, "--config.probe.source=nowhere.jsonl", "nowhere.jsonl is no file"),
    ],
)
def test_a_finished_run_is_asked_further_questions(question, changes, named, finished, capfd):
    work, _ = finished
    assert run_here(question.main, f"--workdir={work} {changes}") == 2
    (line,) = lines_of(capfd.readouterr().err)
    assert named in line


# ---------------------------------------------------------------- a full disk, an interruption


@pytest.mark.parametrize(
    ("stage", "again"), [(extract_activations, "activations"), (train_saes, "dictionaries")]
)
def test_a_full_disk_is_told_in_one_line_and_nothing_is_lost(stage, again, finished):
    work, _ = finished
    copy = copy_of(work, without=again)
    limited = f"ulimit -f 16; exec {sys.executable} -m {stage.__name__} --workdir={copy}"
    done = subprocess.run(
        ["bash", "-c", limited], capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    assert done.returncode == 2, done.stderr
    (line,) = lines_of(done.stderr)
    assert "free some" in line
    assert run_here(stage.main, f"--workdir={copy}") == 0


def test_an_interruption_is_told_in_one_line(finished, tiny):
    work, _ = finished
    copy = copy_of(work, without="dictionaries")
    ask(copy, small(tiny, sae__steps=1_000_000))
    # A process started in the background may ignore interruptions, and so do its children.
    listening = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    run = "runpy.run_module('launch.train_saes', run_name='__main__', alter_sys=True)"
    code = f"import runpy, signal; {listening}; {run}"
    program = [sys.executable, "-c", code, f"--workdir={copy}"]
    with subprocess.Popen(program, stderr=subprocess.PIPE, cwd=ROOT, env=environment()) as process:
        stderr = b""
        while not re.search(rb"[1-9]\d*/1000000 ", stderr):  # it trains
            piece = process.stderr.read1(100)
            assert piece, stderr.decode()
            stderr += piece
        process.send_signal(signal.SIGINT)
        stderr += process.stderr.read()
    assert process.returncode == 130
    (line,) = lines_of(stderr.decode())
    assert "the same command again" in line


# ---------------------------------------------------------------- training a language model


def test_train_lm_prints_its_loss_beside_counting(tiny, tmp_path, capfd):
    from crossdict_jax import models

    asked = {
        "n_layers": 1,
        "d_model": 16,
        "n_heads": 2,
        "context": 32,
        "vocab_size": 270,
        "steps": 3,
        "batch_size": 8,
        "text.source": f"{tiny}/text.jsonl",
    }
    arguments = [f"--config.{name}={value}" for name, value in asked.items()]
    given = [*arguments, f"--workdir={tmp_path}/run"]
    assert run_here(train_lm.main, given, kind=PretrainConfig, default="docs_gpt2") == 0
    out = capfd.readouterr().out
    losses = {name: float(loss) for name, loss in re.findall(r"^  (\w+) +([0-9.]+)$", out, re.M)}
    assert losses.keys() == {"model", "bigram", "unigram"}
    assert losses["bigram"] < losses["unigram"] < losses["model"]  # after three steps
    assert out.splitlines()[-1] == f"{tmp_path}/run/model"
    assert models.load(tmp_path / "run/model").config.d_model == 16
