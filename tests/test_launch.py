"""The commands as users type them: flags, one-line errors, exit codes, and whole runs."""

import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run
from tiny_run import ROOT, SHAPES, SMALL, flags, make_models, make_texts, write_rows

from configs import quickstart
from crossdict_jax import models, results
from crossdict_jax.config import FREE, Config, ConvertConfig, PretrainConfig, to_dict
from crossdict_jax.dictionaries import hub
from crossdict_jax.errors import UserError
from crossdict_jax.report.docs import write_docs
from crossdict_jax.training import mesh
from crossdict_jax.workdir import Workdir, open_workdir, read_jsonl, write_json
from launch import command

OWN_SETTINGS = {"convert"}  # commands whose settings are not those of a run
COMMANDS = sorted(p.stem for p in (ROOT / "launch").glob("[!_]*.py") if p.stem != "command")
COMMANDS += ["benchmark", "benchmark.saelens"]
KINDS = ("mean", "ridge", "mlp", "crosscoder")  # of the run that all tests here share
RESULTS = ["pairing.json", *(t.file for t in results.SPINE if t.file != "features.jsonl")]


def launch(program: list, *arguments: str, **variables: str):
    """Runs a program in a process of its own: as a user's, from any folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command_line = [*map(str, program), *arguments]
    return subprocess.run(command_line, capture_output=True, text=True, cwd=ROOT, env=environment)


def parse(arguments: str, *, kind: type = Config, default: str = "quickstart"):
    """The (config, work directory) of a command line."""
    return command.parse(["test", *shlex.split(arguments)], kind=kind, default=default)[:2]


def run_here(main, arguments: str | list[str], **how) -> int:
    """The exit code of a command, a script of launch/ or a function, run in this process."""
    main = importlib.import_module(f"launch.{main}").main if isinstance(main, str) else main
    given = shlex.split(arguments) if isinstance(arguments, str) else arguments
    return command.execute(main, ["test", *given], **how)


def test_what_auto_meant_first_it_means_again(tmp_path, monkeypatch):
    """On another machine too, whether the settings come from the directory or from a file."""
    written = tmp_path / "run" / "config.json"

    def chosen(platform: str, arguments: str = "") -> set[str]:
        with monkeypatch.context() as patch:
            patch.setattr(mesh, "all_devices", lambda: [SimpleNamespace(platform=platform)])
            arguments = f"--models=a,b --config.steer.search=auto {arguments}"
            config, workdir = parse(f"--workdir={tmp_path}/run {arguments}")
            work = open_workdir(workdir, to_dict(config), usual=to_dict(Config()), free=FREE)
            command._choose(config, work)
            assert config.sae.products == "auto"  # checkpoints keep it
            assert config.steer.search == "auto"  # the user's word
            return {group.matmul_dtype for group in (config.extract, config.sae, config.map)}

    assert chosen("gpu") == chosen("tpu") == {"bfloat16"}
    assert chosen("cpu", "--config=configs/quickstart.py") == {"float32"}  # nothing is computed
    write_json(tmp_path / "run/results/pairing.json", {})
    assert chosen("gpu") == {"float32"}  # the settings of the directory
    assert chosen("gpu", "--config=configs/quickstart.py") == {"float32"}
    words = r"map\.matmul_dtype: float32 there, bfloat16 now"
    tiny_run.refused(words, chosen, "gpu", "--config.map.matmul_dtype=bfloat16")
    written.write_text(written.read_text().replace('"float32"', '"float31"'))
    words = "matmul_dtype=float31 must be one of"
    tiny_run.refused(words, chosen, "gpu", "--config=configs/quickstart.py")


@pytest.mark.parametrize("name", ["run", 'it\'s a "b" $(x);&\\z'])
def test_what_a_gpus_compiler_measured_lies_in_the_work_directory(name, tmp_path):
    """It decides how sums are rounded."""
    code = "import sys; from pathlib import Path; from launch import command\n"
    code += "from crossdict_jax.workdir import Workdir; command.GPU = ('json',)\n"
    code += "command._set_up_jax(Workdir(Path(sys.argv[1]))); from jax._src import compiler\n"
    code += "options = compiler.get_compile_options(num_replicas=1, num_partitions=1)\n"
    code += "debug = options.executable_build_options.debug_options\n"
    code += "print(debug.xla_gpu_per_fusion_autotune_cache_dir)"
    (tmp_path / name).mkdir()
    told = launch([sys.executable, "-c", code], str(tmp_path / name))
    assert told.stdout.strip() == str(tmp_path / name / "autotuning"), told.stderr


def refused(capfd, main, arguments) -> str:
    """The one line that a mistake in a command gets, with exit code 2."""
    capfd.readouterr()
    assert run_here(main, arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def test_defaults_are_those_of_the_file(tmp_path):
    assert parse("") == (quickstart.get_config(), "runs/quickstart")
    config, workdir = parse("--config=configs/pythia410m_gpt2medium_small.py")
    assert config.models == ("EleutherAI/pythia-410m-deduped", "openai-community/gpt2-medium")
    assert workdir == "runs/pythia410m_gpt2medium_small"
    config, _ = parse("--config.n_layers=2 --seed=5", kind=PretrainConfig, default="docs_gpt2")
    assert (config.n_layers, config.seed, config.model_type) == (2, 5, "gpt2")
    assert run_here(print, f"--workdir={tmp_path}/run") == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["models"] == list(models.EMBEDDED)


@pytest.mark.parametrize(
    "arguments",
    [
        "--models=/x/a,b --layers=1,2 --width=64 --seed=3",
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


def test_an_existing_work_directory_brings_its_settings(tmp_path):
    asked = "--layers=1 --config.map.loss_weights.cosine=0.5 --models=a,b"
    config, _ = parse(asked)
    assert run_here(print, f"{asked} --workdir={tmp_path}/run") == 0
    assert parse(f"--workdir={tmp_path}/run")[0].layers == (5, 6, 7)  # nothing is computed
    write_json(tmp_path / "run/results/pairing.json", {})
    assert parse(f"--workdir={tmp_path}/run") == (config, f"{tmp_path}/run")
    words = f"--workdir={tmp_path}/run belongs to another command: it has Config settings, where"
    tiny_run.refused(words, parse, f"--workdir={tmp_path}/run", kind=ConvertConfig)
    explicit, _ = parse(f"--workdir={tmp_path}/run --config=configs/quickstart.py")
    assert explicit.layers == (5, 6, 7)


MISTAKES = [  # arguments, what the line names
    ("--config.sae.widht=64", "did you mean sae.width?"),
    ("--config.sae=64", "'sae' is a group"),
    ("--noconfig.seed", "config.seed"),
    ("--layers=5,x", "--layers=5,x"),
    ("--config.controls=ceiling,ceiling", "controls=ceiling,ceiling holds a value twice"),
    ("--config.intervention.feature_ids=1,x", "is not whole numbers with commas between"),
    ("--width=16 --config.sae.k=17", "sae.k=17 is larger than sae.width=16"),
    ("--width=16 --config.sae.width=17", "--width=16 and --config.sae.width=17"),
    ("--modles=a,b", "did you mean --models?"),
    ("more", "'more' is not a flag"),
    ("--config.sae.learning_rate=nan", "sae.learning_rate=nan is not a number"),
    ("--config.control_kinds=mlp --config.map.kinds=mean,ridge", "control_kinds=mlp is not fitted"),
    ("--config.map.kinds=mean --config.probe.maps=mlp", "probe.maps=mlp is not fitted; use "),
    ("--config=none.py", "none.py: there is no file"),
    ("--config=configs/docs_gpt2.py", "PretrainConfig"),
    ("--config=configs/stored.py:nowhere", "nowhere"),
    ("--flagfile=nowhere", "nowhere"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=[a for a, _ in MISTAKES])
def test_mistakes_are_told_in_one_line(arguments, named, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert named in refused(capfd, print, f"{arguments} --workdir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


def script(monkeypatch, name, *arguments) -> int:
    """The exit code of the real script of a command, run in this process."""
    codes = []

    def execute(main, table="", **how):
        codes.append(command.execute(main, [name, *arguments], **how))

    monkeypatch.setattr(command, "run", execute)
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)
    return codes[0]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import")
@pytest.mark.parametrize("name", COMMANDS)
def test_every_script_tells_mistakes_and_shows_its_flags(name, monkeypatch, capfd):
    wrong, right = ("sorce", "source") if name in OWN_SETTINGS else ("sed", "seed")
    assert script(monkeypatch, name, f"--config.{wrong}=1") == 2
    out, err = capfd.readouterr()
    assert f"did you mean {right}?" in err and len(err.splitlines()) == 1 and out == ""
    assert script(monkeypatch, name, "--help") == 0
    out = capfd.readouterr().out
    assert f"python -m launch.{name}" in out
    shown = set(re.findall(r"^  --(\w+) ", out, re.M))
    assert {"config", "workdir", "expect"} <= shown
    assert ("  --seed " in out) == (name not in OWN_SETTINGS)
    if name not in OWN_SETTINGS | {"verify", "benchmark"}:  # which make up their text
        assert "--config.text.source=docstrings" in out


def test_help_is_quick():
    done = launch([sys.executable, "-X", "importtime", "-m", "launch.experiment"], "--help")
    assert done.returncode == 0 and "--config.sae.width=384" in done.stdout
    assert "absl" in done.stderr and not re.search(r"\b(jax|transformers)\b", done.stderr)


def test_variables_that_jax_cannot_read_are_told_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_ENABLE_X64", "maybe")
    done = launch([sys.executable, "-m", "launch.experiment"], f"--workdir={tmp_path}/run")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'" in done.stderr


BROKEN = [
    "x = 1",
    "def get_config():\n    raise ValueError('two\\nlines')",
    "def get_config():\n    pass",
    "from crossdict_jax import config\ndef get_config():\n    return config.Config(layers=[5, 6])",
    "from crossdict_jax import config\ndef get_config():\n    return config.Config(sae={})",
    "def get_config():\n    raise SystemExit('oops')",
]


@pytest.mark.parametrize("program", BROKEN)
def test_broken_config_files_are_told_in_one_line(program, tmp_path, capfd):
    (tmp_path / "own.py").write_text(program)
    line = refused(capfd, print, f"--config={tmp_path}/own.py --workdir={tmp_path}/run")
    assert "own.py" in line or line.startswith(("layers=", "sae="))
    assert not (tmp_path / "run").exists()


def test_a_tilde_is_the_home_and_a_config_may_import_one_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "beside_own.py").write_text("SEED = 7")
    (tmp_path / "own.py").write_text(
        "from beside_own import SEED\nfrom crossdict_jax.config import Config\n"
        "def get_config():\n    return Config(seed=SEED)"
    )
    config, workdir, _ = command.parse(["x", "--config=~/own.py", "--workdir=~/run"])
    assert (config.seed, workdir) == (7, f"{tmp_path}/run")
    assert hub.fetch("~/dictionary") == tmp_path / "dictionary"


def test_bad_work_directories_are_told_in_one_line(tmp_path, capfd):
    (tmp_path / "config.json").write_text('{"sae": ')
    (tmp_path / "file").touch()
    for path in (tmp_path, "/proc/run", tmp_path / "file/run"):
        assert str(path) in refused(capfd, print, f"--models=a,b --workdir={path}")
    assert "--workdir= is empty" in refused(capfd, print, "--models=a,b --workdir=")
    words = r"no README\.md to write; run this in a checkout"  # of an installed package
    tiny_run.refused(words, write_docs, Workdir(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("one\nmistake"), 2, "one mistake"),
        (OSError(28, "No space left on device", "x"), 2, "No space left"),
        (ValueError("RESOURCE_EXHAUSTED: write [No space left on device]"), 2, "No space left"),
        (OSError("4096 requested and 17 written"), 2, "No space left"),  # as numpy says it
        (OSError(30, "Read-only", "x"), 2, "x cannot be read or written (Read-only); make it"),
        (IsADirectoryError(21, "Is a directory", "x"), 2, "x cannot be read or written (Is a dir"),
        (MemoryError(), 2, "lower a batch_size"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2, "lower a batch_size"),
        (KeyboardInterrupt(), 130, "the same command again"),
    ],
)
def test_exit_codes(error, code, words, tmp_path, capfd):
    def failing(config, work):
        raise error

    assert run_here(failing, f"--models=a,b --workdir={tmp_path}/run") == code
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with two untrained models a and b of one shape, tokenizers, and 80 documents."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = make_texts(80)
    write_rows(folder / "text.jsonl", [{"text": text} for text in texts])
    make_models(folder, texts, dict.fromkeys("ab", SHAPES["a"]))  # programs are compiled once
    return folder


def small(tiny: Path, **changes) -> list[str]:
    """The arguments of a run of a few seconds."""
    asked = {"models": f"{tiny}/a,{tiny}/b", "text.source": f"{tiny}/text.jsonl"}
    asked |= {"map.kinds": ",".join(KINDS), "text.documents": 80, "text.max_bytes": 400}
    asked |= dict.fromkeys(("sae.steps", "map.steps", "crosscoder.steps"), 20)
    return flags(SMALL, **asked | changes)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """(work directory, process) of the main job as users run it."""
    work = tmp_path_factory.mktemp("runs") / "run"
    program = [sys.executable, "-m", "launch.experiment", f"--workdir={work}"]
    done = launch(program, *small(tiny))
    assert done.returncode == 0, done.stderr
    return work, done


def test_the_main_job_writes_every_file_and_says_what_it_does(finished):
    work, done = finished
    expected = ["config.json", "activations/meta.json", "report/index.html", "results/timing.json"]
    expected += [f"results/{name}" for name in RESULTS]
    expected += [f"dictionaries/{m}/resid_pre.1/seed-0" for m in "ab"]
    for kind in KINDS:
        for ends in ("a-to-b", "b-to-a"):
            folder = f"maps/{ends}/resid_pre.1--resid_pre.1/{kind}"
            expected += [folder, f"{folder}-shuffled"]
    expected += [f"crosscoders/resid_pre.1--resid_pre.1/{p}" for p in ("aligned", "shuffled")]
    assert not [name for name in expected if not (work / name).exists()]
    assert "One code of all models" in (work / "report/index.html").read_text()
    for file in (work / "results").glob("*.jsonl"):
        text = file.read_text()
        assert str(work.parents[1]) not in text  # no paths
        for line in text.splitlines():
            json.loads(line, parse_constant=pytest.fail)
    for number, stage in enumerate(("extract_activations", "train_saes"), start=1):
        assert f"[{number}/6] {stage}" in done.stdout
    assert "best linear" in done.stdout
    assert done.stdout.splitlines()[-1] == str(work / "report/index.html")
    assert not done.stderr  # nothing is redrawn where nobody looks


def test_the_main_job_again_keeps_what_is_there(finished):
    work, _ = finished
    every_time = {"timing.json", "pairing.json", "index.html", ".lock"}  # written by commands
    files = [p for p in work.rglob("*") if p.is_file() and p.name not in every_time]
    before, pairing = {p: p.stat().st_mtime_ns for p in files}, work / "results/pairing.json"
    paired = pairing.read_bytes()
    assert len(list((work / "results").glob("*.jsonl"))) > 8 and (work / "controls/maps").exists()
    assert run_here("experiment", f"--workdir={work}") == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before and pairing.read_bytes() == paired


def test_other_features_may_be_named_until_some_are_tested(finished, tmp_path, capfd):
    work = Workdir(shutil.copytree(finished[0], tmp_path / "run"))
    work.result("transfer_features.inputs.json").unlink()
    stamps = [work.result(f"{stage}.inputs.json") for stage in ("evaluate", "intervene")]
    before, file = [p.stat().st_mtime_ns for p in stamps], work.result("feature_causal.jsonl")
    tested = read_jsonl(file)[0]["feature"]
    asked = f"--workdir={work.root} --config.intervention.feature_ids="
    assert run_here("experiment", f"{asked}{tested}") == 0
    assert {row["feature"] for row in read_jsonl(file)} == {tested}
    assert [p.stat().st_mtime_ns for p in stamps] == before  # what reads no such settings is kept
    assert "feature_ids: " in refused(capfd, "intervene", f"{asked}1,2")


def test_results_that_are_older_than_a_map_are_a_warning(finished, tmp_path):
    work = shutil.copytree(finished[0], tmp_path / "run")
    told = f"The results of evaluate are older than maps/a-to-b/{MAP}/ridge; run its command again."
    assert told not in (work / "report/index.html").read_text()
    seal = work / f"maps/a-to-b/{MAP}/ridge/0.sha256.json"
    seal.write_text(seal.read_text() + "\n")  # as if it was fitted again
    assert run_here("report", f"--workdir={work}") == 0
    assert told in (work / "report/index.html").read_text()


def test_outputs_that_lack_characters_docstrings_or_a_reader(finished, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("MPLBACKEND", "of_no_library")
    done = launch([sys.executable, "-OO", "-m", "launch.report"], f"--workdir={finished[0]}")
    assert (done.returncode, done.stderr) == (0, "") and "R? " in done.stdout
    pipe = f"{sys.executable} -m launch.report --help | true; echo ${{PIPESTATUS[0]}}"
    done = launch(["bash", "-c", pipe])
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_an_interruption_that_python_drops_comes_again(tmp_path):
    code = "import os, time; from launch import command\n"
    code += "class Dropped:\n def __del__(self): os.kill(os.getpid(), 15); sum(range(9))\n"
    code += "command.run(lambda config, work: [print('a'), Dropped() and 1, time.sleep(20)])"
    done = launch([sys.executable, "-c", code], f"--workdir={tmp_path}/run")
    assert (done.returncode, done.stdout) == (130, "a\n")
    assert done.stderr.startswith("Interrupted; the same command")


def test_a_wrong_source_is_told_before_anything_is_read(tiny, tmp_path, capfd):
    asked, work = small(tiny, **{"sae.sources": "typo,train"}), f"--workdir={tmp_path}/run"
    assert "typo is no dictionary folder" in refused(capfd, "extract_activations", [*asked, work])
    assert not Workdir(tmp_path / "run").computed
    assert parse(work)[0].sae.sources == ()  # its settings are no next command's


def test_wrong_models_and_layers_are_told_in_one_line(tiny, tmp_path, capfd):
    few = tmp_path / "few"  # an embedding too small for the tokenizer
    models.save(models.init(SHAPES["a"] | {"vocab_size": 270}), few)
    shutil.copy(tiny / "a" / "tokenizer.json", few)
    for name, value, named in (
        ("models", f"{tiny}/a,some/where", "some/where"),
        ("models", f"{few},{tiny}/b", "270"),
        ("layers", "1,2", "resid_pre.2"),
    ):
        arguments = [*small(tiny, **{name: value}), f"--workdir={tmp_path}/{named}"]
        assert named in refused(capfd, "extract_activations", arguments)


DICTIONARY = "resid_pre.1/seed-0"
MAP = "resid_pre.1--resid_pre.1"
SHARD = "activations/a/resid_pre.1/shard-00000.npy"
DAMAGE = [  # which file is cut or altered, the stage that reads it, what it has to write again
    (True, SHARD, "train_saes", "dictionaries"),
    (False, f"dictionaries/b/{DICTIONARY}", "train_hypernetworks", "maps"),
    (False, f"maps/a-to-b/{MAP}/ridge", "evaluate", "report"),
    (True, f"maps/b-to-a/{MAP}/mlp", "intervene", "report"),
    (True, "results/transfer.jsonl", "report", "report"),
]


@pytest.mark.parametrize(("cut", "path", "stage", "again"), DAMAGE)
def test_damage_is_named(cut, path, stage, again, finished, capfd, tmp_path):
    work = tmp_path / "run"
    shutil.copytree(finished[0], work, ignore=shutil.ignore_patterns(again))
    file = work / path
    if file.is_dir():
        inside = (p for p in file.rglob("*") if p.is_file() and "sha256" not in p.name)
        file = max(inside, key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    if not cut:
        data[len(data) // 2] ^= 1
    file.write_bytes(data[:-7] if cut else data)
    assert str(file) in refused(capfd, stage, f"--workdir={work}")


@pytest.mark.parametrize("stage", [stage for _, _, stage, _ in DAMAGE])
def test_a_stage_before_its_input_says_what_to_run(stage, tiny, tmp_path, capfd):
    assert "run" in refused(capfd, stage, [*small(tiny), f"--workdir={tmp_path}/work"])


def test_a_finished_run_is_asked_further_questions(finished, capfd):
    asked = f"--workdir={finished[0]} --config.contrast.features=3"
    assert "contrast.source is empty" in refused(capfd, "contrast", asked)
    asked = f"--workdir={finished[0]} --config.probe.source=nowhere.jsonl"
    assert "nowhere.jsonl is no file" in refused(capfd, "probe", asked)


@pytest.mark.slow
def test_train_lm_prints_its_loss_beside_counting(tiny, tmp_path, capfd):
    shape = "n_layers=1 d_model=16 n_heads=2 context=32 vocab_size=270 steps=3 batch_size=8"
    given = flags(shape, **{"text.source": f"{tiny}/text.jsonl"}) + [f"--workdir={tmp_path}/run"]
    assert run_here("train_lm", given, kind=PretrainConfig, default="docs_gpt2") == 0
    *_, names, values, folder = capfd.readouterr().out.splitlines()
    losses = dict(zip(names.split(), map(float, values.split())))
    assert losses.keys() == {"model", "bigram", "unigram"}
    assert losses["bigram"] < losses["unigram"] < losses["model"]  # after three steps
    assert folder == f"{tmp_path}/run/model"
    assert models.load(tmp_path / "run/model").config.d_model == 16
