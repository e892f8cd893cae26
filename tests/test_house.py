"""The house itself: imports run downwards, files stay small, heavy libraries come late."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from test_launch import launch
from tiny_run import ROOT

# From the ground up: a room may use those of lower floors, and itself.
ROOMS = """errors stats / modules workdir / results / config / training / ops / models
    / activations / dictionaries pretraining / maps / evaluation causal / report / studies
    / benchmark verify / compile / launch"""
FLOOR = {room: n for n, rooms in enumerate(ROOMS.split("/")) for room in rooms.split()}
LATE = {"torch", "transformers", "datasets", "matplotlib", "pyarrow", "pandas", "jinja2"}
LATE |= {"wandb", "tensorboardX"}
DISTRIBUTIONS = {"absl": "absl-py", "orbax": "orbax-checkpoint"}
TOOLS = {"pytest-xdist", "ruff"}  # run, not imported
NOT_REQUIRED = {"torch", "tensorboardX", "tensorboard", "wandb"}  # used where somebody has it
NOT_REQUIRED |= {"setuptools"}  # of pip
NOT_REQUIRED |= {"sae_lens", "sparsify", "dictionary_learning"}  # in environments of their own

PACKAGES = ("crossdict_jax", "launch", "configs")
SOURCES = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name of a module's file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path) for path in SOURCES}


def imports(tree: ast.AST) -> set[str]:
    """The dotted names that a module imports anywhere, as far down as they are modules."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {n if n in NAMES else node.module for n in inner}
    return found


def room_of(name: str) -> str | None:
    """The room of a module: a file or folder of the package, launch, or None for other code."""
    parts = name.split(".")
    if parts[0] in ("launch", "configs"):
        return parts[0]
    return parts[1] if parts[0] == "crossdict_jax" and len(parts) > 1 else None


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {name_of(path): ast.parse(path.read_text()) for path in SOURCES}


def test_imports_run_downwards(trees):
    assert {room_of(name) for name in trees} - {"configs", None} <= FLOOR.keys()
    wrong = []
    for name, tree in trees.items():
        own = room_of(name)
        for other in imports(tree):
            room = room_of(other)
            if room in (None, own) or own is None:
                continue
            allowed = room == "config" if own == "configs" else FLOOR[room] < FLOOR[own]
            if not allowed:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_no_modules_import_each_other_in_a_circle(trees):
    needs = {name: (imports(tree) & trees.keys()) - {name} for name, tree in trees.items()}
    while leaves := {name for name, found in needs.items() if not found & needs.keys()}:
        needs = {name: found for name, found in needs.items() if name not in leaves}
    assert not needs


def test_every_module_says_what_lives_there_and_commands_are_thin(trees):
    assert not [name for name, tree in trees.items() if not ast.get_docstring(tree)]
    lines = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "launch").glob("*.py")}
    del lines["command.py"]
    assert max(lines.values()) <= 60, lines


def test_a_member_of_a_family_is_one_file_with_one_class(trees):
    for folder in ("dictionaries.architectures", "maps.kinds", "models.families"):
        prefix = f"crossdict_jax.{folder}."
        members = {name: tree for name, tree in trees.items() if name.startswith(prefix)}
        assert members
        for name, tree in members.items():
            classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
            assert any(c.bases for c in classes), f"{name} defines no member of its family"
            assert not imports(tree) & (members.keys() - {name}), f"{name} knows another member"


def test_importing_every_room_loads_no_heavy_library_and_flags_no_jax():
    rooms = sorted(name for name in NAMES if name.startswith("crossdict_jax"))
    program = """if True:
        import importlib, sys, launch.command, launch.experiment
        assert "jax" not in sys.modules
        for name in sys.argv[1].split():
            importlib.import_module(name)
        print(*sys.modules)"""
    done = launch([sys.executable, "-c", program, " ".join(rooms)])
    assert done.returncode == 0, done.stderr
    assert not LATE & set(done.stdout.split())


def test_requirements_are_what_is_imported(trees):
    text = (ROOT / "requirements.txt").read_text()
    required = set(re.findall(r"^([A-Za-z0-9_-]+)", text, re.MULTILINE))
    everything = [*trees.values(), *(ast.parse(path.read_text()) for path in TESTS)]
    used = {name.split(".")[0] for tree in everything for name in imports(tree)}
    used -= set(sys.stdlib_module_names) | set(PACKAGES) | NOT_REQUIRED
    used -= {path.stem for path in (*TESTS, *SOURCES)} - DISTRIBUTIONS.keys()
    assert {DISTRIBUTIONS.get(name, name) for name in used} == required - TOOLS


def test_an_installation_holds_every_file():
    setuptools = pytest.importorskip("setuptools")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = setuptools.find_namespace_packages(str(ROOT), **project["packages"]["find"])
    files = [p for name in PACKAGES for p in (ROOT / name).rglob("*.*")]
    folders = {".".join(path.relative_to(ROOT).parent.parts) for path in files}
    assert {f for f in folders if not f.endswith("__pycache__")} <= set(packages)
    assert project["package-data"] == {"*": ["*"]}


UNSAFE = re.compile(
    r"\bpickle\b|allow_pickle=True|trust_remote_code=True|weights_only=False|\beval\(|\bexec\("
)


def test_nothing_that_is_read_can_run_code():
    assert not [str(path) for path in SOURCES if UNSAFE.search(path.read_text())]
